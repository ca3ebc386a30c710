//! The AsyncAPI document: as its specification asks for it, whole, and without loose ends.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;

use daybook_events::asyncapi::{CDEVENT_KINDS, asyncapi};
use daybook_events::catalog;
use serde_json::{Value, json};

fn references<'v>(value: &'v Value, found: &mut Vec<&'v str>) {
    match value {
        Value::Object(members) => {
            for (key, member) in members {
                match member {
                    Value::String(target) if key == "$ref" => found.push(target),
                    other => references(other, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| references(item, found)),
        _ => {}
    }
}

/// What AsyncAPI 3.1 asks of the parts that the document has: which members there may be, and which
/// there must be. Source: <https://www.asyncapi.com/docs/reference/specification/v3.1.0>.
fn rules() -> Value {
    let text = || json!({ "type": "string" });
    let reference = |to: &str| {
        json!({
            "type": "object",
            "properties": { "$ref": { "type": "string", "pattern": format!("^#/{to}/[^/]+$") } },
            "required": ["$ref"],
            "additionalProperties": false,
        })
    };
    let object = |members: Value, required: &[&str]| {
        json!({
            "type": "object",
            "properties": members,
            "required": required,
            "additionalProperties": false,
        })
    };
    let map = |of: Value| json!({ "type": "object", "additionalProperties": of });
    let security = json!({ "type": "array", "items": reference("components/securitySchemes") });
    let server = json!({ "host": text(), "protocol": text(), "pathname": text(),
        "title": text(), "summary": text(), "description": text(), "security": security.clone() });
    let parameter = json!({ "description": text(), "location": text(), "default": text(),
        "enum": { "type": "array", "items": text() } });
    let channel = json!({ "address": { "type": ["string", "null"] }, "title": text(),
        "summary": text(), "description": text(),
        "messages": map(reference("components/messages")),
        "servers": { "type": "array", "items": reference("servers") },
        "parameters": map(object(parameter, &[])) });
    let operation = json!({ "action": { "enum": ["send", "receive"] },
        "channel": reference("channels"), "title": text(), "summary": text(),
        "description": text(), "messages": { "type": "array" }, "security": security });
    // Headers are a schema of an object, says the specification.
    let headers = json!({ "type": "object", "required": ["type", "properties"],
        "properties": { "type": { "const": "object" } } });
    let of_trait = json!({ "name": text(), "title": text(), "summary": text(),
        "description": text(), "contentType": text(), "headers": headers });
    let mut message = of_trait.clone();
    message["payload"] = reference("components/schemas");
    message["traits"] = json!({ "type": "array", "items": reference("components/messageTraits") });
    // The types of security schemes, as far as the document has them, with what each must have.
    let scheme = json!({ "oneOf": [
        object(json!({ "type": { "enum": ["userPassword", "asymmetricEncryption", "X509"] },
            "description": text() }), &["type"]),
        object(json!({ "type": { "const": "http" }, "scheme": { "const": "bearer" },
            "bearerFormat": text(), "description": text() }), &["type", "scheme"]),
    ] });
    let named = |mut of: Value| {
        of["propertyNames"] = json!({ "pattern": "^[A-Za-z0-9_.-]+$" });
        of
    };
    let components = json!({ "messages": named(map(object(message, &["payload"]))),
        "messageTraits": named(map(object(of_trait, &["headers"]))),
        "securitySchemes": named(map(scheme)),
        "schemas": named(map(json!({ "type": ["object", "boolean"] }))) });
    let license = json!({ "name": text(), "url": { "type": "string", "format": "uri" } });
    let info = json!({ "title": text(), "version": text(), "description": text(),
        "license": object(license, &["name"]) });
    object(
        json!({
            "asyncapi": { "const": "3.1.0" },
            "id": { "type": "string", "format": "uri" },
            "info": object(info, &["title", "version"]),
            "defaultContentType": text(),
            "servers": map(object(server, &["host", "protocol"])),
            "channels": map(object(channel, &[])),
            "operations": map(object(operation, &["action", "channel"])),
            "components": object(components, &[]),
        }),
        &["asyncapi", "info"],
    )
}

/// Where the published schema is: `schemas/3.1.0.json` of
/// <https://github.com/asyncapi/spec-json-schemas>. `cargo xtask test` finds it in a package. What it
/// asks for is checked by [`rules`] in any case.
const PUBLISHED: &str = "DAYBOOK_ASYNCAPI_SCHEMA";

#[test]
fn it_is_what_the_specification_asks_for() {
    #[allow(
        clippy::disallowed_methods,
        reason = "a test's choice of judge, no decision of the events"
    )]
    let published = std::env::var_os(PUBLISHED);
    let published =
        published.map(|file| serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap());
    for schema in [Some(rules()), published].into_iter().flatten() {
        accepts_it(&schema);
    }
}

/// A schema accepts the document, and finds what is wrong with others.
fn accepts_it(schema: &Value) {
    let validator = jsonschema::validator_for(schema).unwrap();
    let document = asyncapi("1.2.3");
    if let Err(e) = validator.validate(&document) {
        panic!("{e} at {}", e.instance_path());
    }
    for (pointer, bad) in [
        ("/asyncapi", Value::from("2.6.0")),
        ("/channels/deployment/address", Value::from(7)),
        ("/operations/send-deployment/action", Value::from("sends")),
        ("/components/messageTraits/nats/headers", Value::from(7)),
        ("/components/securitySchemes/token/scheme", Value::from(7)),
        ("/components/securitySchemes/natsUser/type", "trust".into()),
        ("/servers/http/security", json!({ "token": [] })),
    ] {
        let mut changed = document.clone();
        *changed.pointer_mut(pointer).unwrap() = bad;
        assert!(!validator.is_valid(&changed), "{pointer} is not checked");
    }
}

#[test]
fn every_reference_leads_somewhere_and_every_kind_is_a_message() {
    let document = asyncapi("1.2.3");
    let mut found = Vec::new();
    references(&document, &mut found);
    assert!(found.len() > 200, "{}", found.len());
    for target in found {
        let pointer = target.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{target}");
    }
    for (kind, _) in catalog::payload_schemas() {
        let aggregate = kind.split('.').next().unwrap();
        for channel in [aggregate, "events", "webhook"] {
            let messages = &document["channels"][channel]["messages"];
            assert!(messages.get(kind).is_some(), "{channel}: {kind}");
        }
    }
    for (kind, _) in CDEVENT_KINDS {
        let kind = format!("dev.cdevents.{kind}.0.3.0");
        for channel in ["cdevents", "cdevents-nats", "cdevents-webhook"] {
            let messages = &document["channels"][channel]["messages"];
            assert!(messages.get(&kind).is_some(), "{channel}: {kind}");
        }
    }
}

#[test]
fn each_message_says_its_headers_and_each_server_who_may_read() {
    let document = asyncapi("1.2.3");
    let headers = |channel: &str, kind: &str| -> Vec<String> {
        let message = &document["channels"][channel]["messages"][kind]["$ref"];
        let at = |reference: &Value| {
            let pointer = reference.as_str().unwrap().strip_prefix('#').unwrap();
            document.pointer(pointer).unwrap()
        };
        let traits = at(message)["traits"].as_array();
        let traits = traits.into_iter().flatten();
        let headers = traits.map(|t| &at(&t["$ref"])["headers"]["properties"]);
        headers
            .flat_map(|of| of.as_object().unwrap().keys().cloned())
            .collect()
    };
    let kind = "deployment.requested.v1";
    let cdevent = "dev.cdevents.pipelinerun.queued.0.3.0";
    for (channel, kind) in [("deployment", kind), ("cdevents-nats", cdevent)] {
        assert!(headers(channel, kind).contains(&"Nats-Msg-Id".to_owned()));
    }
    for (channel, kind) in [("webhook", kind), ("cdevents-webhook", cdevent)] {
        assert!(headers(channel, kind).contains(&"webhook-signature".to_owned()));
    }
    assert!(headers("events", kind).is_empty());
    for (channel, message) in [
        ("events-socket", "stream.event"),
        ("deliveries", "stream.try"),
        ("deliveries", "stream.end"),
        ("lines", "stream.line"),
        ("lines", "stream.end"),
    ] {
        assert!(headers(channel, message).is_empty());
    }
    for (name, server) in document["servers"].as_object().unwrap() {
        assert!(server["security"][0]["$ref"].is_string(), "{name}");
    }
}

/// What is between braces in an address has a parameter, and the other way round.
#[test]
fn parameters_are_those_of_their_addresses() {
    let document = asyncapi("1.2.3");
    for (name, channel) in document["channels"].as_object().unwrap() {
        let address = channel["address"].as_str().unwrap_or_default();
        let named = address.split('{').skip(1).map(|part| {
            let (parameter, _) = part.split_once('}').unwrap();
            parameter.to_owned()
        });
        let named: BTreeSet<String> = named.collect();
        let said = channel["parameters"].as_object();
        let said: BTreeSet<String> = said.into_iter().flat_map(|p| p.keys().cloned()).collect();
        assert_eq!(named, said, "{name}");
    }
}

#[test]
fn the_messages_describe_the_frozen_events() {
    let document = asyncapi("1.2.3");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for (kind, _) in catalog::payload_schemas() {
        // The definitions stand beside the payload, as they do in the document.
        let mut schema = document["components"]["schemas"][kind].clone();
        schema["components"] = json!({ "schemas": document["components"]["schemas"] });
        let validator = jsonschema::validator_for(&schema).unwrap();
        let event = std::fs::read(golden.join(format!("{kind}.json"))).unwrap();
        let event: Value = serde_json::from_slice(&event).unwrap();
        if let Err(e) = validator.validate(&event) {
            panic!("{kind}: {e} at {}", e.instance_path());
        }
    }
}

#[test]
fn what_connections_send_is_described() {
    let document = asyncapi("1.2.3");
    let validator = |name: &str| {
        let mut schema = document["components"]["schemas"][name].clone();
        schema["components"] = json!({ "schemas": document["components"]["schemas"] });
        jsonschema::validator_for(&schema).unwrap()
    };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let event = std::fs::read(golden.join("environment.created.v1.json")).unwrap();
    let event: Value = serde_json::from_slice(&event).unwrap();
    let sent = json!({ "position": 7, "subject": "daybook.ev.shop.production.environment.production",
        "stored_at": "2026-03-01T12:00:00Z", "chain": "00", "event": event });
    let tried = json!({ "seq": 3, "time": "2026-03-01T12:00:00Z", "position": 7, "due_by": 7,
        "event": "0190c0de-0000-7000-8000-000000000000", "kind": "environment.created.v1",
        "number": 1, "outcome": "delivered", "status": 204, "millis": 9 });
    let line = json!({ "cursor": "0-1", "seq": 1, "time": "2026-03-01T12:00:00Z",
        "kind": "container", "level": "WARN", "text": "WARNING: old pip" });
    for (name, good, bad) in [
        ("stream.event", sent, ("event", json!({}))),
        ("stream.try", tried, ("outcome", "lost".into())),
        ("stream.line", line, ("level", "LOUD".into())),
        ("stream.end", json!({}), ("why", "it is over".into())),
    ] {
        let validator = validator(name);
        if let Err(e) = validator.validate(&good) {
            panic!("{name}: {e} at {}", e.instance_path());
        }
        let mut wrong = good.clone();
        wrong[bad.0] = bad.1;
        assert!(!validator.is_valid(&wrong), "{name}");
    }
}
