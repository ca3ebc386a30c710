//! `daybook schema`

use std::path::PathBuf;

use clap::Args;
use daybook_events::catalog;
use serde_json::Value;

use super::Outcome;
use crate::exit::{Code, Failure};
use crate::output;

/// The JSON Schemas of events and settings, the OpenAPI document, and the GraphQL schema.
#[derive(Debug, Args)]
pub struct SchemaArgs {
    /// What to print: an event type (`deployment.requested.v1`), `service`, `template`,
    /// `openapi`, `asyncapi/daybook`, or `graphql`. Lists what there is if nothing is named.
    name: Option<String>,
    /// Write all of them into a folder instead.
    #[arg(long, value_name = "DIR", conflicts_with = "name")]
    all: Option<PathBuf>,
}

pub fn run(args: SchemaArgs) -> Outcome {
    let mut all: Vec<(String, Value)> = catalog::payload_schemas()
        .into_iter()
        .map(|(kind, schema)| {
            (
                format!("events/{kind}"),
                catalog::event_schema(kind, schema),
            )
        })
        .collect();
    all.push(("openapi".into(), openapi()?));
    all.push((
        "asyncapi/daybook".into(),
        daybook_events::asyncapi::asyncapi(env!("CARGO_PKG_VERSION")),
    ));
    all.push((
        "service".into(),
        schemars_value::<daybook_events::spec::ServiceSpec>()?,
    ));
    all.push((
        "template".into(),
        schemars_value::<daybook_events::template::Template>()?,
    ));
    if let Some(dir) = args.all {
        for (name, value) in &all {
            let file = dir.join(format!("{name}.json"));
            if let Some(parent) = file.parent() {
                std::fs::create_dir_all(parent)?;
            }
            std::fs::write(&file, pretty(value)?)?;
        }
        let folder = dir.join("graphql");
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("daybook.graphql"), daybook_api::graphql_sdl())?;
        return Ok(Code::Success);
    }
    let Some(name) = args.name else {
        for (name, _) in &all {
            output::line(name.trim_start_matches("events/"));
        }
        output::line("graphql");
        return Ok(Code::Success);
    };
    if name == "graphql" {
        output::line(daybook_api::graphql_sdl().trim_end());
        return Ok(Code::Success);
    }
    let found = all
        .iter()
        .find(|(n, _)| n.trim_start_matches("events/") == name.trim_start_matches("events/"));
    match found {
        Some((_, value)) => {
            output::line(pretty(value)?.trim_end());
            Ok(Code::Success)
        }
        None => Err(Failure::new(
            Code::NotFound,
            "schema_not_found",
            format!("there is no schema {name:?}"),
        )
        .hint("`daybook schema` lists them")),
    }
}

fn pretty(value: &Value) -> Result<String, Failure> {
    serde_json::to_string_pretty(value)
        .map(|text| text + "\n")
        .map_err(|e| Failure::new(Code::Failure, "schema", e.to_string()))
}

fn openapi() -> Result<Value, Failure> {
    serde_json::to_value(daybook_api::openapi())
        .map_err(|e| Failure::new(Code::Failure, "schema", e.to_string()))
}

fn schemars_value<T: schemars::JsonSchema>() -> Result<Value, Failure> {
    serde_json::to_value(schemars::schema_for!(T))
        .map_err(|e| Failure::new(Code::Failure, "schema", e.to_string()))
}
