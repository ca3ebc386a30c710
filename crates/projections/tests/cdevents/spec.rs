//! What CDEvents 0.5.1 asks of the events that Daybook sends: which members there are, of which kind,
//! and which of them must be there. Whatever is not named may not be there.
//!
//! Source: <https://github.com/cdevents/spec>, the tag `v0.5.1`.

use serde_json::{Map, Value, json};

/// What stands for a member.
#[derive(Clone, Copy)]
enum Kind {
    /// Any text.
    Text,
    /// A text that is not empty.
    Some,
    /// An absolute address.
    Uri,
    /// Something with an `id`, and with a `source` if that is another one.
    Reference,
    /// A list of what an image is made of, by its address.
    Sbom,
    /// How a pipeline ended.
    Outcome,
}

use Kind::{Outcome, Reference, Sbom, Some, Text, Uri};

/// A member of a subject's content: its name, what stands for it, and whether it must be there.
type Member = (&'static str, Kind, bool);

/// The events, each with the members of its subject's content.
const EVENTS: &[(&str, &[Member])] = &[
    (
        "artifact.packaged",
        &[("change", Reference, true), ("sbom", Sbom, false)],
    ),
    (
        "artifact.published",
        &[("sbom", Sbom, false), ("user", Some, false)],
    ),
    ("build.queued", &[]),
    ("build.started", &[]),
    ("build.finished", &[("artifactId", Text, false)]),
    ("change.merged", &[("repository", Reference, false)]),
    (
        "environment.created",
        &[("name", Text, false), ("uri", Uri, false)],
    ),
    (
        "environment.modified",
        &[("name", Text, false), ("uri", Uri, false)],
    ),
    ("environment.deleted", &[("name", Text, false)]),
    (
        "pipelinerun.queued",
        &[("pipelineName", Text, false), ("uri", Uri, false)],
    ),
    (
        "pipelinerun.started",
        &[("pipelineName", Text, true), ("uri", Uri, true)],
    ),
    (
        "pipelinerun.finished",
        &[
            ("pipelineName", Text, false),
            ("uri", Uri, false),
            ("outcome", Outcome, false),
            ("errors", Text, false),
        ],
    ),
    (
        "taskrun.started",
        &[
            ("taskName", Text, false),
            ("uri", Uri, false),
            ("pipelineRun", Reference, false),
        ],
    ),
    (
        "taskrun.finished",
        &[
            ("taskName", Text, false),
            ("uri", Uri, false),
            ("pipelineRun", Reference, false),
            ("outcome", Text, false),
            ("errors", Text, false),
        ],
    ),
    (
        "service.deployed",
        &[("environment", Reference, true), ("artifactId", Some, true)],
    ),
    (
        "service.upgraded",
        &[("environment", Reference, true), ("artifactId", Some, true)],
    ),
    (
        "service.rolledback",
        &[("environment", Reference, true), ("artifactId", Some, true)],
    ),
    ("service.removed", &[("environment", Reference, false)]),
    ("service.published", &[("environment", Reference, false)]),
];

/// A schema for each event.
pub(crate) fn schemas() -> Vec<Value> {
    EVENTS
        .iter()
        .map(|(name, content)| event(name, content))
        .collect()
}

fn event(name: &str, content: &[Member]) -> Value {
    let kind = format!("dev.cdevents.{name}.0.3.0");
    let content: Vec<_> = content
        .iter()
        .map(|(name, kind, must)| (*name, kind.schema(), *must))
        .collect();
    object(&[
        (
            "context",
            object(&[
                ("specversion", Some.schema(), true),
                ("id", Some.schema(), true),
                ("source", source(), true),
                ("type", json!({ "enum": [kind] }), true),
                (
                    "timestamp",
                    json!({ "type": "string", "format": "date-time" }),
                    true,
                ),
                ("schemaUri", Uri.schema(), false),
                ("chainId", Some.schema(), false),
                ("links", links(), false),
            ]),
            true,
        ),
        (
            "subject",
            object(&[
                ("id", Some.schema(), true),
                ("source", source(), false),
                ("content", object(&content), true),
            ]),
            true,
        ),
        ("customData", json!({ "type": ["object", "string"] }), false),
        ("customDataContentType", Text.schema(), false),
    ])
}

impl Kind {
    fn schema(self) -> Value {
        match self {
            Text => json!({ "type": "string" }),
            Some => json!({ "type": "string", "minLength": 1 }),
            Uri => json!({ "type": "string", "format": "uri" }),
            Reference => object(&[("id", Some.schema(), true), ("source", source(), false)]),
            Sbom => object(&[("uri", source(), true)]),
            Outcome => json!({ "enum": ["success", "failure", "cancel", "error"] }),
        }
    }
}

fn source() -> Value {
    json!({ "type": "string", "minLength": 1, "format": "uri-reference" })
}

/// How an event goes on from others: by the event before, as the last one, or related to another.
fn links() -> Value {
    let context = || object(&[("contextId", Some.schema(), true)]);
    let link = |kind: &str, more: &[(&str, Value, bool)]| {
        let mut members = vec![
            ("linkType", json!({ "enum": [kind] }), true),
            ("tags", json!({ "type": "object" }), false),
        ];
        members.extend_from_slice(more);
        object(&members)
    };
    json!({ "type": "array", "items": { "anyOf": [
        link("PATH", &[("from", context(), true)]),
        link("END", &[("from", context(), false)]),
        link("RELATION", &[("linkKind", Some.schema(), true), ("target", context(), true)]),
    ] } })
}

fn object(members: &[(&str, Value, bool)]) -> Value {
    let properties: Map<String, Value> = members
        .iter()
        .map(|(name, schema, _)| ((*name).to_owned(), schema.clone()))
        .collect();
    let must = members.iter().filter(|(_, _, must)| *must);
    let required: Vec<&str> = must.map(|(name, _, _)| *name).collect();
    json!({
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}
