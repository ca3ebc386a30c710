//! The AsyncAPI 3.1 document: which events there are, and where they are to be had.

use schemars::Schema;
use serde_json::{Map, Value, json};

use crate::AggregateKind;
use crate::catalog::event_schema;
use crate::envelope::MEDIA_TYPE;
use crate::lines::Line;
use crate::subject::PREFIX;
use crate::subscription::delivery::Try;

/// Where the definitions of all schemas are.
const DEFINITIONS: &str = "#/components/schemas/";

/// What every subject of CDEvents starts with.
const CDEVENTS_PREFIX: &str = "daybook.cdevents";

/// The version of CDEvents, and that of its types which are used here.
const CDEVENTS: (&str, &str) = ("0.5.1", "0.3.0");

/// What the ledger is told as in the words of CDEvents.
pub const CDEVENT_KINDS: [(&str, &str); 19] = [
    ("artifact.packaged", "An image was made."),
    ("artifact.published", "An image is in its registry."),
    ("build.finished", "A build has ended, with its outcome."),
    ("build.queued", "A build is asked for."),
    ("build.started", "A build was taken up."),
    ("change.merged", "A GitOps commit was made."),
    ("environment.created", "There is an environment."),
    ("environment.deleted", "An environment is gone."),
    ("environment.modified", "An environment was defined anew."),
    (
        "pipelinerun.finished",
        "A deployment has ended, with its outcome.",
    ),
    ("pipelinerun.queued", "A deployment is asked for."),
    ("pipelinerun.started", "A deployment was admitted."),
    (
        "service.deployed",
        "A service has its first main deployment.",
    ),
    ("service.published", "A service answers at its address."),
    (
        "service.removed",
        "A service has no main deployment any more.",
    ),
    (
        "service.rolledback",
        "A service went back to a former deployment.",
    ),
    ("service.upgraded", "A service has another main deployment."),
    ("taskrun.finished", "The source of a deployment is there."),
    ("taskrun.started", "The source of a deployment is fetched."),
];

/// The document, with a message for each kind of event.
pub fn asyncapi(version: &str) -> Value {
    let mut document = Document::default();
    for aggregate in AggregateKind::ALL {
        let kinds = aggregate.schemas();
        let names: Vec<_> = kinds.iter().map(|(kind, _)| *kind).collect();
        for (kind, schema) in kinds {
            document.message(kind, schema);
        }
        document.channel(aggregate, &names);
    }
    for (kind, summary) in CDEVENT_KINDS {
        document.cdevent(kind, summary);
    }
    document.streams();
    document.connections();
    json!({
        "asyncapi": "3.1.0",
        "id": "urn:dev.daybook:events",
        "info": {
            "title": "Daybook",
            "version": version,
            "description": "The events of the deployment ledger: CloudEvents 1.0 in structured \
                mode, each on the subject of its aggregate, and all of them as server-sent \
                events and as signed webhooks; and what they mean in the words of CDEvents.",
            "license": { "name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0" }
        },
        "defaultContentType": MEDIA_TYPE,
        "servers": {
            "nats": {
                "host": "127.0.0.1:4222",
                "protocol": "nats",
                "description": "The NATS server with the log, where there is one. Subscribers have \
                    accounts of their own that can only read.",
                "security": schemes(&["natsUser", "natsCredentials"])
            },
            "http": {
                "host": "127.0.0.1:7070",
                "protocol": "http",
                "description": "The HTTP interface of a Daybook server. One on loopback may ask \
                    nobody for a token.",
                "security": schemes(&["token"])
            },
            "websocket": {
                "host": "127.0.0.1:7070",
                "protocol": "ws",
                "description": "The same server, for WebSockets.",
                "security": schemes(&["token"])
            }
        },
        "channels": document.channels,
        "operations": document.operations,
        "components": {
            "messages": document.messages,
            "messageTraits": message_traits(),
            "schemas": document.schemas,
            "securitySchemes": security_schemes()
        }
    })
}

fn schemes(names: &[&str]) -> Vec<Value> {
    let reference = |name: &&str| json!({ "$ref": format!("#/components/securitySchemes/{name}") });
    names.iter().map(reference).collect()
}

fn security_schemes() -> Value {
    json!({
        "token": {
            "type": "http",
            "scheme": "bearer",
            "description": "A token of Daybook (`daybook_…`), or one of the identity provider that \
                the server is set up with, in the header `Authorization`."
        },
        "natsUser": {
            "type": "userPassword",
            "description": "User and password of an account of the NATS server."
        },
        "natsCredentials": {
            "type": "asymmetricEncryption",
            "description": "A credentials file of the NATS server: a JWT, and the NKey that signs \
                the server's nonce."
        }
    })
}

/// The headers of messages, by what they are sent over.
fn message_traits() -> Value {
    let text = |description: &str| json!({ "type": "string", "description": description });
    let content_type = json!({ "const": MEDIA_TYPE });
    json!({
        "nats": { "headers": {
            "type": "object",
            "required": ["Nats-Msg-Id", "Content-Type"],
            "properties": {
                "Nats-Msg-Id": text("The id of the event, by which the stream knows a repetition."),
                "Nats-Expected-Last-Subject-Sequence": {
                    "type": "string",
                    "pattern": "^[0-9]+$",
                    "description": "The position of the aggregate's event before this one, which the \
                        server has checked; 0 for the first. CDEvents have none."
                },
                "Content-Type": content_type.clone()
            }
        } },
        "webhook": { "headers": {
            "type": "object",
            "required": ["webhook-id", "webhook-timestamp", "webhook-signature", "content-type"],
            "properties": {
                "webhook-id": text("The id of the event: the same for each try."),
                "webhook-timestamp": {
                    "type": "string",
                    "pattern": "^[0-9]+$",
                    "description": "When this try was made, in seconds since 1970."
                },
                "webhook-signature": text(
                    "One or more signatures with spaces between: `v1,` and the Base64 of HMAC-SHA256 \
                     over `id.timestamp.body`."
                ),
                "content-type": content_type
            }
        } }
    })
}

/// What a message is sent over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Over {
    /// Server-sent events, which have no headers each.
    Http,
    Nats,
    Webhook,
}

impl Over {
    const ALL: [Self; 3] = [Self::Http, Self::Nats, Self::Webhook];

    /// The name of the trait that it gives to messages.
    fn name(self) -> Option<&'static str> {
        match self {
            Self::Http => None,
            Self::Nats => Some("nats"),
            Self::Webhook => Some("webhook"),
        }
    }

    /// The name of a kind's message.
    fn message(self, kind: &str) -> String {
        match self.name() {
            Some(name) => format!("{name}.{kind}"),
            None => kind.to_owned(),
        }
    }
}

#[derive(Default)]
struct Document {
    channels: Map<String, Value>,
    operations: Map<String, Value>,
    messages: Map<String, Value>,
    schemas: Map<String, Value>,
    /// Definitions as they were first met, by name.
    written: Map<String, Value>,
}

impl Document {
    fn message(&mut self, kind: &str, payload: Schema) {
        self.adopt(kind, event_schema(kind, payload));
        for over in Over::ALL {
            self.message_over(over, kind, kind, MEDIA_TYPE, None);
        }
    }

    /// Puts a schema among the others, with its own definitions beside it.
    fn adopt(&mut self, kind: &str, mut schema: Value) {
        let definitions = schema.as_object_mut().and_then(|o| {
            o.remove("$schema");
            o.remove("$defs")
        });
        let definitions = match definitions {
            Some(Value::Object(definitions)) => definitions,
            _ => Map::new(),
        };
        // Two types of one name are told apart by the event that has the second.
        let place = |written: &Map<String, Value>, name: &str| match written.get(name) {
            Some(other) if Some(other) != definitions.get(name) => format!("{kind}.{name}"),
            _ => name.to_owned(),
        };
        let written = &self.written;
        redirect(&mut schema, &|name| place(written, name));
        for (name, definition) in &definitions {
            let mut redirected = definition.clone();
            redirect(&mut redirected, &|name| place(written, name));
            self.schemas.insert(place(written, name), redirected);
        }
        for (name, definition) in definitions {
            self.written.entry(name).or_insert(definition);
        }
        self.schemas.insert(kind.to_owned(), schema);
    }

    /// What an event is told as in the words of CDEvents.
    fn cdevent(&mut self, kind: &str, summary: &str) {
        let (spec, types) = CDEVENTS;
        let name = format!("dev.cdevents.{kind}.{types}");
        let text = || json!({ "type": "string", "minLength": 1 });
        let time = json!({ "type": "string", "format": "date-time" });
        let cdevent = json!({
            "type": "object",
            "required": ["context", "subject"],
            "properties": {
                "context": {
                    "type": "object",
                    "required": ["specversion", "id", "source", "type", "timestamp"],
                    "properties": {
                        "specversion": { "const": spec },
                        "id": text(),
                        "chainId": { "type": "string", "format": "uuid" },
                        "source": { "type": "string", "format": "uri-reference" },
                        "type": { "const": name },
                        "timestamp": time.clone()
                    }
                },
                "subject": {
                    "type": "object",
                    "required": ["id", "content"],
                    "properties": {
                        "id": text(),
                        "source": { "type": "string", "format": "uri-reference" },
                        "content": {
                            "type": "object",
                            "description": "What the specification says of this type."
                        }
                    }
                },
                "customData": {
                    "type": "object",
                    "description": "The position of the event in the ledger, its type and its actor, \
                        and what the standard has no place for."
                },
                "customDataContentType": { "const": "application/json" }
            }
        });
        let payload = json!({
            "description": format!("{summary} A CloudEvent whose data is the CDEvent."),
            "type": "object",
            "required": ["specversion", "id", "source", "type", "subject", "time", "datacontenttype", "data"],
            "properties": {
                "specversion": { "const": "1.0" },
                "id": text(),
                "source": { "type": "string", "format": "uri-reference" },
                "type": { "const": name },
                "subject": text(),
                "time": time,
                "datacontenttype": { "const": "application/json" },
                "data": { "$ref": format!("{DEFINITIONS}cdevents.{kind}") }
            }
        });
        let bare = format!("cdevents.{kind}");
        self.schemas.insert(bare.clone(), cdevent);
        self.schemas.insert(name.clone(), payload);
        // A stream of CDEvents is no stream of CloudEvents.
        self.message_over(Over::Http, &name, &bare, "application/json", Some(summary));
        for over in [Over::Nats, Over::Webhook] {
            self.message_over(over, &name, &name, MEDIA_TYPE, Some(summary));
        }
    }

    /// A kind's message over one of what it is sent over, with the payload of this schema.
    fn message_over(
        &mut self,
        over: Over,
        kind: &str,
        payload: &str,
        content_type: &str,
        summary: Option<&str>,
    ) {
        let mut message = json!({
            "name": kind,
            "title": kind,
            "contentType": content_type,
            "payload": { "$ref": format!("{DEFINITIONS}{payload}") }
        });
        if let Some(summary) = summary {
            message["summary"] = summary.into();
        }
        if let Some(name) = over.name() {
            let reference = format!("#/components/messageTraits/{name}");
            message["traits"] = json!([{ "$ref": reference }]);
        }
        self.messages.insert(over.message(kind), message);
    }

    fn channel(&mut self, aggregate: AggregateKind, kinds: &[&str]) {
        let name = aggregate.as_str();
        let channel = json!({
            "address": format!("{PREFIX}.{{project}}.{{environment}}.{name}.{{id}}"),
            "title": format!("Events of one {name}"),
            "description": "Events are stored in a JetStream stream: subscribe with a consumer of \
                it, by the subject or with wildcards.",
            "servers": [{ "$ref": "#/servers/nats" }],
            "parameters": {
                "project": { "description": "The project; `_` where it belongs to none." },
                "environment": { "description": "The environment; `_` where it belongs to none." },
                "id": { "description": "Which one it is." }
            },
            "messages": references(kinds, Over::Nats)
        });
        self.channels.insert(name.to_owned(), channel);
        self.sends(
            name,
            &format!("Daybook records what happens to one {name}."),
        );
    }

    /// The channels on which all events are, and all CDEvents.
    fn streams(&mut self) {
        let kinds = crate::catalog::payload_schemas();
        let kinds: Vec<_> = kinds.iter().map(|(kind, _)| *kind).collect();
        let cdevents = CDEVENT_KINDS.map(|(kind, _)| format!("dev.cdevents.{kind}.{}", CDEVENTS.1));
        let cdevents: Vec<_> = cdevents.iter().map(String::as_str).collect();
        let http = [json!({ "$ref": "#/servers/http" })];
        let stream = json!({
            "address": "/api/v1/events",
            "title": "All events, as server-sent events",
            "description": "With `Accept: text/event-stream`. The id of each is its position, from \
                which `Last-Event-ID` resumes; the query parameters filter.",
            "servers": http,
            "messages": references(&kinds, Over::Http)
        });
        self.channels.insert("events".into(), stream);
        self.sends("events", "Daybook streams its ledger.");
        let webhook = json!({
            "address": null,
            "title": "Events of a project, as signed webhooks",
            "description": "POST to the URL of a webhook, with `webhook-id`, `webhook-timestamp` and \
                `webhook-signature` as Standard Webhooks has them. At least once, in order within \
                a deployment.",
            "messages": references(&kinds, Over::Webhook)
        });
        self.channels.insert("webhook".into(), webhook);
        self.sends(
            "webhook",
            "Daybook sends events to those who asked for them.",
        );
        let stream = json!({
            "address": "/api/v1/cdevents",
            "title": "The ledger in the words of CDEvents, as server-sent events",
            "description": "With `Accept: text/event-stream`. The data of each is the CDEvent by \
                itself, without a CloudEvent around it; the id is the position of the event that it \
                tells, from which `Last-Event-ID` resumes; the query parameters filter.",
            "servers": http,
            "messages": references(&cdevents, Over::Http)
        });
        self.channels.insert("cdevents".into(), stream);
        self.sends("cdevents", "Daybook streams what its events mean.");
        let nats = json!({
            "address": format!("{CDEVENTS_PREFIX}.{{project}}.{{environment}}.{{run}}"),
            "title": "CDEvents of one run",
            "description": "In the order of the ledger, in the JetStream stream `DAYBOOK_CDEVENTS`, \
                which keeps them for a week: subscribe with a consumer of it. The role `notify` \
                publishes them.",
            "servers": [{ "$ref": "#/servers/nats" }],
            "parameters": {
                "project": { "description": "The project." },
                "environment": { "description": "The environment; `_` where it belongs to none." },
                "run": { "description": "The id of the deployment, or of the run that it belongs to." }
            },
            "messages": references(&cdevents, Over::Nats)
        });
        self.channels.insert("cdevents-nats".into(), nats);
        self.sends("cdevents-nats", "Daybook publishes what its events mean.");
        let webhook = json!({
            "address": null,
            "title": "CDEvents of a project, as signed webhooks",
            "description": "POST to the URL of a webhook of the format `cdevents`, as for events.",
            "messages": references(&cdevents, Over::Webhook)
        });
        self.channels.insert("cdevents-webhook".into(), webhook);
        self.sends(
            "cdevents-webhook",
            "Daybook sends CDEvents to those who asked for them.",
        );
    }

    /// The channels of one connection each, whose messages are no events by themselves.
    fn connections(&mut self) {
        let kinds = crate::catalog::payload_schemas();
        let kinds = kinds
            .iter()
            .map(|(kind, _)| json!({ "$ref": format!("{DEFINITIONS}{kind}") }));
        let position = json!({ "type": "integer", "minimum": 0 });
        let sent = json!({
            "type": "object",
            "required": ["position", "subject", "stored_at", "chain"],
            "properties": {
                "position": position,
                "subject": { "type": "string", "description": "Its subject on the log." },
                "stored_at": { "type": "string", "format": "date-time" },
                "event": {
                    "description": "The stored CloudEvent.",
                    "anyOf": kinds.collect::<Vec<_>>()
                },
                "bytes": {
                    "type": "string",
                    "contentEncoding": "base64",
                    "description": "The stored bytes, if they are not JSON."
                },
                "chain": {
                    "type": "string",
                    "description": "The hash chain over all that was sent, with which a client goes \
                        on after an interruption, and which GET /api/v1/events/chain works out too."
                }
            }
        });
        self.schemas.insert("stream.event".into(), sent);
        let mut tried = schemars::schema_for!(Try).to_value();
        if let Some(required) = tried["required"].as_array_mut() {
            required.extend(["seq".into(), "time".into()]);
        }
        tried["properties"]["seq"] = json!({ "type": "integer", "minimum": 1,
            "description": "Its number in the delivery log, which is the id of the event." });
        tried["properties"]["time"] = json!({ "type": "string", "format": "date-time" });
        self.adopt("stream.try", tried);
        let mut line = schemars::schema_for!(Line).to_value();
        if let Some(required) = line["required"].as_array_mut() {
            required.extend(["cursor".into(), "level".into()]);
        }
        line["properties"]["cursor"] = json!({ "type": "string",
            "description": "Lines after this one are asked for with it; it is the id of the event." });
        line["properties"]["level"] = json!({ "enum": ["DEBUG", "INFO", "WARN", "ERROR"],
            "description": "As far as the text says so; `INFO` otherwise." });
        self.adopt("stream.line", line);
        let end = json!({ "type": "object", "additionalProperties": false });
        self.schemas.insert("stream.end".into(), end);
        for (message, summary) in [
            (
                "stream.event",
                "An event, its position, and the chain up to it.",
            ),
            (
                "stream.try",
                "A try to deliver an event, and what came of it.",
            ),
            ("stream.line", "A line of output."),
            (
                "stream.end",
                "Nothing more comes: connecting again is of no use.",
            ),
        ] {
            self.message_over(
                Over::Http,
                message,
                message,
                "application/json",
                Some(summary),
            );
        }
        let socket = json!({
            "address": "/api/v1/events",
            "title": "All events, over a WebSocket",
            "description": "The upgrade of RFC 6455. Each message is a text. The query parameters \
                filter, `after` and `chain` resume. A client that sends anything is cut off.",
            "servers": [{ "$ref": "#/servers/websocket" }],
            "messages": references(&["stream.event"], Over::Http)
        });
        self.channels.insert("events-socket".into(), socket);
        self.sends("events-socket", "Daybook streams its ledger over a socket.");
        let http = [json!({ "$ref": "#/servers/http" })];
        let deliveries = json!({
            "address": "/api/v1/webhooks/{webhook}/deliveries",
            "title": "What is sent to a webhook, as server-sent events",
            "description": "With `Accept: text/event-stream`. The id of each is its number, from \
                which `Last-Event-ID` resumes; the query parameters filter. It ends with an event \
                `end` when the webhook is deleted.",
            "servers": http,
            "parameters": { "webhook": { "description": "The id of the webhook." } },
            "messages": references(&["stream.try", "stream.end"], Over::Http)
        });
        self.channels.insert("deliveries".into(), deliveries);
        self.sends("deliveries", "Daybook tells each try to deliver an event.");
        let lines = json!({
            "address": "/api/v1/deployments/{id}/logs",
            "title": "The output of a deployment, as server-sent events",
            "description": "With `Accept: text/event-stream`. The id of each is its cursor, from \
                which `Last-Event-ID` resumes; the query parameters filter, and `follow` goes on as \
                lines come. It ends with an event `end`.",
            "servers": http,
            "parameters": { "id": { "description": "The id of the deployment." } },
            "messages": references(&["stream.line", "stream.end"], Over::Http)
        });
        self.channels.insert("lines".into(), lines);
        self.sends("lines", "Daybook streams what a deployment prints.");
    }

    fn sends(&mut self, channel: &str, summary: &str) {
        let operation = json!({
            "action": "send",
            "channel": { "$ref": format!("#/channels/{channel}") },
            "summary": summary
        });
        self.operations.insert(format!("send-{channel}"), operation);
    }
}

/// The messages of a channel.
fn references(kinds: &[&str], over: Over) -> Map<String, Value> {
    let reference = |kind: &str| {
        let name = over.message(kind);
        json!({ "$ref": format!("#/components/messages/{name}") })
    };
    kinds
        .iter()
        .map(|kind| ((*kind).to_owned(), reference(kind)))
        .collect()
}

/// Makes references to a schema's own definitions lead to where they are in the document.
fn redirect(value: &mut Value, name_of: &dyn Fn(&str) -> String) {
    match value {
        Value::Object(members) => {
            for (key, member) in members {
                match member {
                    Value::String(target) if key == "$ref" => {
                        if let Some(name) = target.strip_prefix("#/$defs/") {
                            *target = format!("{DEFINITIONS}{}", name_of(name));
                        }
                    }
                    other => redirect(other, name_of),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| redirect(item, name_of)),
        _ => {}
    }
}
