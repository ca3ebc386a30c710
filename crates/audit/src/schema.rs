//! JSON Schemas of events, those of this version.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use daybook_events::catalog;
use jsonschema::Validator;
use serde_json::Value;

/// The schemas of this version by the short type of the event: `deployment.requested.v1`. Most
/// ledgers need none of them, and so they are made when the first one is asked.
static ALL: LazyLock<BTreeMap<String, Validator>> = LazyLock::new(compile);

/// Whether events are held against schemas.
#[derive(Debug, Clone, Default)]
pub(crate) struct Schemas {
    are_asked: bool,
}

/// The schemas of the events of this version, as they are published: name and text.
pub(crate) fn published() -> Vec<(&'static str, String)> {
    catalog::payload_schemas()
        .into_iter()
        .map(|(kind, payload)| {
            let schema = catalog::event_schema(kind, payload);
            (kind, format!("{schema:#}\n"))
        })
        .collect()
}

impl Schemas {
    /// Those of this version. What came with a ledger is not asked: a schema can be written such
    /// that asking it never ends.
    pub(crate) fn of_this_version() -> Self {
        Self { are_asked: true }
    }

    /// Why an event does not fit the schema of its kind; `None` if it does, or if there is none.
    pub(crate) fn violation(&self, kind: &str, event: &str) -> Option<String> {
        if !self.are_asked {
            return None;
        }
        let validator = ALL.get(kind)?;
        let event: Value = match serde_json::from_str(event) {
            Ok(event) => event,
            Err(e) => return Some(e.to_string()),
        };
        let error = validator.validate(&event).err()?;
        let place = error.instance_path().to_string();
        let at = if place.is_empty() { "/" } else { &place };
        Some(format!("at {at}: {error}"))
    }
}

fn compile() -> BTreeMap<String, Validator> {
    let mut all = BTreeMap::new();
    for (kind, payload) in catalog::payload_schemas() {
        let schema = catalog::event_schema(kind, payload);
        if let Ok(validator) = jsonschema::validator_for(&schema) {
            all.insert(kind.to_owned(), validator);
        }
    }
    all
}
