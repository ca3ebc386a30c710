//! The AsyncAPI 3.1 document: which events there are, and where they are to be had.

use schemars::Schema;
use serde_json::{Map, Value, json};

use crate::AggregateKind;
use crate::catalog::event_schema;
use crate::envelope::MEDIA_TYPE;
use crate::subject::PREFIX;

/// Where the definitions of all schemas are.
const DEFINITIONS: &str = "#/components/schemas/";

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
    document.streams();
    json!({
        "asyncapi": "3.1.0",
        "id": "urn:dev.daybook:events",
        "info": {
            "title": "Daybook",
            "version": version,
            "description": "The events of the deployment ledger: CloudEvents 1.0 in structured \
                mode, each on the subject of its aggregate, and all of them as server-sent \
                events and as signed webhooks.",
            "license": { "name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0" }
        },
        "defaultContentType": MEDIA_TYPE,
        "servers": {
            "nats": {
                "host": "127.0.0.1:4222",
                "protocol": "nats",
                "description": "The NATS server with the log, where there is one."
            },
            "http": {
                "host": "127.0.0.1:7070",
                "protocol": "http",
                "description": "The HTTP interface of a Daybook server."
            }
        },
        "channels": document.channels,
        "operations": document.operations,
        "components": { "messages": document.messages, "schemas": document.schemas }
    })
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
        let mut schema = event_schema(kind, payload);
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
        let message = json!({
            "name": kind,
            "title": kind,
            "contentType": MEDIA_TYPE,
            "payload": schema
        });
        self.messages.insert(kind.to_owned(), message);
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
            "messages": references(kinds)
        });
        self.channels.insert(name.to_owned(), channel);
        self.sends(
            name,
            &format!("Daybook records what happens to one {name}."),
        );
    }

    /// The channels on which all events are.
    fn streams(&mut self) {
        let kinds: Vec<_> = self.messages.keys().cloned().collect();
        let kinds: Vec<_> = kinds.iter().map(String::as_str).collect();
        let stream = json!({
            "address": "/api/v1/events",
            "title": "All events, as server-sent events",
            "description": "With `Accept: text/event-stream`. The id of each is its position, from \
                which `Last-Event-ID` resumes; the query parameters filter.",
            "servers": [{ "$ref": "#/servers/http" }],
            "messages": references(&kinds)
        });
        self.channels.insert("events".into(), stream);
        self.sends("events", "Daybook streams its ledger.");
        let webhook = json!({
            "address": null,
            "title": "Events of a project, as signed webhooks",
            "description": "POST to the URL of a webhook, with `webhook-id`, `webhook-timestamp` and \
                `webhook-signature` as Standard Webhooks has them. At least once, in order within \
                a deployment.",
            "messages": references(&kinds)
        });
        self.channels.insert("webhook".into(), webhook);
        self.sends(
            "webhook",
            "Daybook sends events to those who asked for them.",
        );
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
fn references(kinds: &[&str]) -> Map<String, Value> {
    let reference = |kind: &str| json!({ "$ref": format!("#/components/messages/{kind}") });
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
