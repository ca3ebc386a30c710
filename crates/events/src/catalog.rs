//! All event kinds in one place, for schemas and documentation.

use schemars::Schema;

use crate::AggregateKind;

/// Every event type (without the common prefix) with the JSON Schema of its payload.
pub fn payload_schemas() -> Vec<(&'static str, Schema)> {
    let kinds = AggregateKind::ALL.into_iter();
    kinds.flat_map(|kind| kind.schemas()).collect()
}

/// The JSON Schema (2020-12) of a whole event of one kind: the CloudEvents envelope with the
/// payload in `data`, as it is committed to `schemas/events/<kind>.json`.
pub fn event_schema(kind: &str, payload: Schema) -> serde_json::Value {
    let mut payload = payload.to_value();
    let defs = payload.as_object_mut().and_then(|o| {
        o.remove("$schema");
        o.remove("$defs")
    });
    let string = |d: &str| serde_json::json!({ "type": "string", "description": d });
    let uuid =
        |d: &str| serde_json::json!({ "type": "string", "format": "uuid", "description": d });
    let time =
        |d: &str| serde_json::json!({ "type": "string", "format": "date-time", "description": d });
    let mut schema = serde_json::json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": kind,
        "type": "object",
        "required": [
            "specversion", "id", "source", "type", "subject", "time", "recordedtime",
            "datacontenttype", "revision", "correlationid", "authtype", "authid", "data"
        ],
        "properties": {
            "specversion": { "const": "1.0" },
            "id": uuid("Unique id of the event; its message id on the log."),
            "source": string("`/projects/<project>`; `/` for what concerns the ledger itself"),
            "type": { "const": format!("{}{kind}", crate::envelope::TYPE_PREFIX) },
            "subject": string("The aggregate: `<project>/<environment or _>/<kind>/<id>`."),
            "time": time("When it happened."),
            "recordedtime": time("When the writer handed it to the log."),
            "datacontenttype": { "const": "application/json" },
            "revision": {
                "type": "integer", "minimum": 1, "maximum": 2_147_483_647_u32,
                "description": "Its number among the events of its aggregate, from 1."
            },
            "correlationid": uuid("The request or run that it belongs to."),
            "causationid": uuid("The event that directly led to it."),
            "authtype": string("How the actor was authenticated."),
            "authid": string("Who did it."),
            "traceparent": string("W3C trace context."),
            "requestdigest": string("SHA-256 of the request that an Idempotency-Key was first used for."),
            "data": payload,
        }
    });
    if let (Some(defs), Some(o)) = (defs, schema.as_object_mut()) {
        o.insert("$defs".into(), defs);
    }
    schema
}
