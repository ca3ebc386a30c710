//! What is on the wire: a frozen event of each kind, the schemas that are generated from the
//! code, and both against each other.
//!
//! `DAYBOOK_REGENERATE=1 cargo test -p daybook-events --test wire` writes the schemas anew and adds
//! the events that are missing. An event that is there is never changed: what was once written
//! has to be readable for ever.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use daybook_events::envelope::Payload;
use daybook_events::subject::PREFIX;
use daybook_events::testing::{context, samples, time};
use daybook_events::{
    Actor, Event, EventId, EventView, NewEvent, Subject, build, catalog, deployment, environment,
    gitops, ledger, project, routing,
};
use serde_json::Value;

fn regenerate() -> bool {
    // Tests are the outside here.
    #[allow(clippy::disallowed_methods)]
    std::env::var_os("DAYBOOK_REGENERATE").is_some()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The bytes of one event of each kind.
fn samples_by_kind() -> BTreeMap<&'static str, String> {
    let shop = samples::shop();
    let id = samples::deployment_id(1);
    let production = shop.environment.clone();
    let p = || shop.project.clone();
    let mut all = BTreeMap::new();
    add(&mut all, Subject::Project(p()), samples::project_events());
    add(
        &mut all,
        Subject::Environment(p(), production.clone()),
        samples::environment_events(),
    );
    add(
        &mut all,
        Subject::Build(p(), samples::build_id(1)),
        samples::build_events(1),
    );
    add(
        &mut all,
        Subject::Deployment(p(), production, id),
        samples::deployment_events(shop.clone(), 1),
    );
    add(
        &mut all,
        Subject::Gitops(p()),
        samples::gitops_events(&shop, id),
    );
    add(
        &mut all,
        Subject::Routing(p()),
        samples::routing_events(&shop, id),
    );
    add(
        &mut all,
        Subject::Domain("www.example.com".parse().unwrap()),
        samples::domain_events(&shop),
    );
    add(
        &mut all,
        Subject::Subscription(p(), samples::subscription_id()),
        samples::subscription_events(),
    );
    add(&mut all, Subject::Ledger, samples::ledger_events());
    add(&mut all, Subject::Access, samples::access_events(&shop));
    all
}

fn add<P: Payload>(all: &mut BTreeMap<&'static str, String>, subject: Subject, events: Vec<P>) {
    for (number, payload) in (1_u32..).zip(events) {
        let kind = payload.kind();
        let mut context = context(u64::from(number));
        context.actor = Actor {
            kind: "user".into(),
            id: "alice".into(),
        };
        context.causation = Some(EventId::derived(uuid::Uuid::NAMESPACE_OID, "cause"));
        context.traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            .parse()
            .ok();
        context.request_digest = (number == 1).then(|| "0".repeat(64));
        let event = NewEvent {
            subject: subject.clone(),
            revision: number,
            context,
            payload,
        };
        let bytes = event.to_bytes(time(100)).unwrap();
        let value: Value = serde_json::from_slice(&bytes).unwrap();
        all.insert(kind, serde_json::to_string_pretty(&value).unwrap() + "\n");
    }
}

/// Kinds whose events have more than one form, with the further frozen ones.
const OTHER_FORMS: &[(&str, &str)] = &[
    ("deployment.requested.v1", "helm"),
    ("deployment.requested.v1", "resources"),
    ("deployment.requested.v1", "autoscaling"),
    ("deployment.requested.v1", "volumes"),
    ("deployment.requested.v1", "chart_values"),
];

/// The frozen event of a kind.
fn frozen(kind: &str) -> String {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let path = dir.join(format!("{kind}.json"));
    if regenerate() && !path.exists() {
        fs::create_dir_all(&dir).unwrap();
        fs::write(&path, &samples_by_kind()[kind]).unwrap();
    }
    fs::read_to_string(&path)
        .unwrap_or_else(|_| panic!("{kind} has no frozen event; set DAYBOOK_REGENERATE=1"))
}

fn decode_and_encode(kind: &str, event: &Event) -> Value {
    fn again<P: Payload>(event: &Event) -> Value {
        let payload: P = event.payload().unwrap();
        serde_json::from_str(payload.encode().unwrap().get()).unwrap()
    }
    match kind.split('.').next().unwrap() {
        "project" => again::<project::ProjectEvent>(event),
        "environment" => again::<environment::EnvironmentEvent>(event),
        "build" => again::<build::BuildEvent>(event),
        "deployment" => again::<deployment::DeploymentEvent>(event),
        "gitops" => again::<gitops::GitopsEvent>(event),
        "routing" => again::<routing::RoutingEvent>(event),
        "domain" => again::<daybook_events::domain::DomainEvent>(event),
        "subscription" => again::<daybook_events::subscription::SubscriptionEvent>(event),
        "ledger" => again::<ledger::LedgerEvent>(event),
        "access" => again::<daybook_events::access::AccessEvent>(event),
        other => panic!("{other} is not an aggregate"),
    }
}

#[test]
fn every_kind_has_a_frozen_event_that_can_be_read() {
    let samples = samples_by_kind();
    let kinds: Vec<_> = catalog::payload_schemas()
        .into_iter()
        .map(|(k, _)| k)
        .collect();
    assert_eq!(samples.len(), kinds.len(), "a kind has no sample, or two");
    for kind in kinds {
        let text = frozen(kind);
        let event = Event::from_bytes(text.as_bytes()).unwrap();
        assert_eq!(event.short_kind(), kind);
        let subject: Subject = format!("{PREFIX}.{}", event.subject.replace('/', "."))
            .parse()
            .unwrap();
        assert_eq!(subject.kind().map(|k| k.as_str()), kind.split('.').next());
        // Whatever was written once is still understood completely.
        let data: Value = serde_json::from_str(event.data.get()).unwrap();
        assert_eq!(decode_and_encode(kind, &event), data, "{kind}");
        // An event is stored as it was decided.
        let whole: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_value(&event).unwrap(), whole);
    }
}

#[test]
fn every_frozen_event_of_any_version_is_still_read() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let event = Event::from_bytes(&fs::read(&path).unwrap()).unwrap();
        // What stands behind a hyphen says which form of its kind it is.
        let name = path.file_stem().unwrap().to_str().unwrap();
        let kind = name.split('-').next().unwrap();
        assert_eq!(event.short_kind(), kind);
        let data: Value = serde_json::from_str(event.data.get()).unwrap();
        assert_eq!(decode_and_encode(kind, &event), data, "{name}");
        // The envelope that folds borrow says the same as the one that is kept.
        let bytes = fs::read(&path).unwrap();
        let view = EventView::from_bytes(&bytes).unwrap();
        assert_eq!(view.short_kind(), event.short_kind());
        assert_eq!((view.id, view.revision), (event.id, event.revision));
        assert_eq!(
            (view.time, view.recordedtime),
            (event.time, event.recordedtime)
        );
        assert_eq!(
            (view.causationid, view.correlationid),
            (event.causationid, event.correlationid)
        );
        assert_eq!(view.actor(), event.actor());
        assert_eq!(
            view.requestdigest.as_deref(),
            event.requestdigest.as_deref()
        );
        found.insert(kind.to_owned());
    }
    assert_eq!(found.len(), catalog::payload_schemas().len());
}

#[test]
fn schemas_are_up_to_date_and_hold_for_the_frozen_events() {
    let dir = root().join("schemas/events");
    let mut expected = Vec::new();
    for (kind, payload) in catalog::payload_schemas() {
        let schema = catalog::event_schema(kind, payload);
        let path = dir.join(format!("{kind}.json"));
        let text = serde_json::to_string_pretty(&schema).unwrap() + "\n";
        if regenerate() {
            fs::create_dir_all(&dir).unwrap();
            fs::write(&path, &text).unwrap();
        }
        let found = fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(
            found, text,
            "{kind}: set DAYBOOK_REGENERATE=1 to write its schema anew"
        );
        expected.push(format!("{kind}.json"));

        let validator = jsonschema::validator_for(&schema).unwrap();
        let event: Value = serde_json::from_str(&frozen(kind)).unwrap();
        let forms = OTHER_FORMS.iter().filter(|(of, _)| *of == kind);
        let forms = forms.map(|(kind, form)| frozen(&format!("{kind}-{form}")));
        let forms = forms.map(|text| serde_json::from_str::<Value>(&text).unwrap());
        for event in forms.chain([event.clone()]) {
            if let Err(e) = validator.validate(&event) {
                panic!("{kind}: {e} at {}", e.instance_path());
            }
        }
        for (pointer, bad) in [
            ("/specversion", Value::from("0.3")),
            ("/type", Value::from("dev.daybook.other.v1")),
            ("/revision", Value::from(0)),
            ("/data", Value::from("text")),
        ] {
            let mut changed = event.clone();
            *changed.pointer_mut(pointer).unwrap() = bad;
            assert!(
                !validator.is_valid(&changed),
                "{kind}: {pointer} is not checked"
            );
        }
    }
    let mut found: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected, "a schema is left over");
}

#[test]
fn an_event_of_a_newer_version_keeps_its_envelope() {
    let text = samples_by_kind().remove("deployment.succeeded.v1").unwrap();
    let newer = text
        .replace("succeeded.v1", "succeeded.v9")
        .replace("\"table\"", "\"tables\"");
    let event = Event::from_bytes(newer.as_bytes()).unwrap();
    assert_eq!(event.short_kind(), "deployment.succeeded.v9");
    assert_eq!(event.actor().id, "alice");
    let error = event.payload::<deployment::DeploymentEvent>().unwrap_err();
    assert!(error.to_string().contains("not known"), "{error}");
}

#[test]
fn what_is_no_event_is_refused() {
    let good = samples_by_kind().remove("deployment.queued.v1").unwrap();
    Event::from_bytes(good.as_bytes()).unwrap();
    let bad = [
        String::new(),
        "[]".to_owned(),
        good.replace("\"1.0\"", "\"2.0\""),
        good.replace("\"revision\"", "\"rev\""),
        good.replace("\"2026-", "\"yesterday"),
        good.replacen("\"id\": \"", "\"id\": \"x", 1),
        good[..good.len() / 2].to_owned(),
    ];
    for text in bad {
        assert!(Event::from_bytes(text.as_bytes()).is_err(), "{text}");
    }
}
