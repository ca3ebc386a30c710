//! CDEvents, made from long histories, against what their specification asks for, and read by its SDK.
#![allow(clippy::unwrap_used)]

#[path = "cdevents/sdk.rs"]
mod sdk;
#[path = "cdevents/spec.rs"]
mod spec;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use daybook_events::asyncapi::CDEVENT_KINDS;
use daybook_events::deployment::{DeploymentEvent, Version};
use daybook_events::envelope::{NewEvent, Payload};
use daybook_events::memory::MemoryLog;
use daybook_events::testing::fleet::{Fleet, Size, choices};
use daybook_events::testing::{context, samples, time};
use daybook_events::{EventLog, InstanceRef, Position, Recorded, Subject};
use daybook_projections::Projections;
use daybook_projections::runner::run;
use jsonschema::{Registry, Validator};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

/// Where the published schemas are, for whoever wants to check against them as they are: the folder
/// `schemas` of the specification at the tag `v0.5.1`. No registry has them as a package, so without it
/// what they ask for is taken from [`spec`]; [`sdk`] judges in any case.
const PUBLISHED: &str = "DAYBOOK_CDEVENTS_SCHEMAS";

/// The schemas by the type that they are for.
fn schemas() -> BTreeMap<String, Validator> {
    let (links, schemas) = match std::env::var_os(PUBLISHED) {
        Some(folder) => {
            let folder = Path::new(&folder);
            (files(&folder.join("links")), files(folder))
        }
        None => (Vec::new(), spec::schemas()),
    };
    let links = links.into_iter().map(|link| {
        let id = link["$id"].as_str().unwrap().to_owned();
        (id, link)
    });
    let registry = links.fold(Registry::new(), |all, (id, link)| {
        all.add(id, link).unwrap()
    });
    let registry = registry.prepare().unwrap();
    let mut found = BTreeMap::new();
    for schema in schemas {
        let kind = &schema["properties"]["context"]["properties"]["type"]["enum"][0];
        let options = jsonschema::options().should_validate_formats(true);
        let validator = options.with_registry(&registry).build(&schema).unwrap();
        found.insert(kind.as_str().unwrap().to_owned(), validator);
    }
    found
}

/// The JSON files of a folder.
fn files(folder: &Path) -> Vec<Value> {
    let entries = std::fs::read_dir(folder).unwrap();
    let paths = entries.map(|e| e.unwrap().path());
    let files = paths.filter(|p| p.extension().is_some_and(|e| e == "json"));
    files
        .map(|p| serde_json::from_slice(&std::fs::read(p).unwrap()).unwrap())
        .collect()
}

/// A history in a log, and its projections.
async fn history(events: u32, seed: u64) -> (Projections, Vec<Recorded>) {
    let log = MemoryLog::new();
    let mut fleet = Fleet::new(Size::default());
    let mut choose = choices(seed);
    for _ in 0..events {
        let happened = fleet.next(&mut choose);
        log.store(happened.subject, happened.bytes);
    }
    folded(&log).await
}

/// The projections of a log, and all its events.
async fn folded(log: &MemoryLog) -> (Projections, Vec<Recorded>) {
    let projections = Projections::in_memory();
    let cancel = CancellationToken::new();
    let task = tokio::spawn(run(
        projections.clone(),
        Arc::new(log.clone()),
        cancel.clone(),
    ));
    let head = log.head().await.unwrap();
    let patience = Duration::from_secs(30);
    projections.wait_for(head, patience).await.unwrap();
    cancel.cancel();
    task.await.unwrap().unwrap();
    let all = log
        .read(Position::ZERO, &Default::default(), 100_000)
        .await
        .unwrap();
    (projections, all)
}

#[tokio::test]
async fn every_cdevent_is_what_the_specification_asks_of_its_type() {
    let schemas = schemas();
    let (projections, events) = history(6000, 11).await;
    let document = daybook_events::asyncapi::asyncapi("1.2.3");
    let mut described = BTreeMap::<String, Validator>::new();
    let mut seen = BTreeSet::new();
    let mut unread = Vec::new();
    for recorded in &events {
        let Ok(event) = recorded.event() else {
            continue;
        };
        let Some(cdevent) = projections.cdevent(recorded, &event).unwrap() else {
            continue;
        };
        let kind = cdevent["context"]["type"].as_str().unwrap().to_owned();
        let schema = schemas
            .get(&kind)
            .unwrap_or_else(|| panic!("{kind} is not in the specification"));
        if let Err(e) = schema.validate(&cdevent) {
            panic!("{kind}: {e} at {}: {cdevent:#}", e.instance_path());
        }
        // The schema is one that finds mistakes.
        let mut wrong = cdevent.clone();
        wrong["subject"]["content"]["weather"] = "fine".into();
        assert!(!schema.is_valid(&wrong));
        unread.extend(sdk::takes(&cdevent).err());
        assert!(sdk::takes(&wrong).is_err(), "the SDK takes {wrong:#}");
        assert_eq!(cdevent["context"]["id"], event.id.to_string());
        assert_eq!(cdevent["customData"]["position"], recorded.position.0);
        // The binding to CloudEvents.
        let message = projections
            .cdevent_message(recorded, &event)
            .unwrap()
            .unwrap();
        let message: Value = serde_json::from_slice(&message).unwrap();
        assert_eq!(message["type"], kind.as_str());
        assert_eq!(message["subject"], cdevent["subject"]["id"]);
        assert_eq!(message["data"], cdevent);
        let described = described.entry(kind.clone()).or_insert_with(|| {
            let mut schema = document["components"]["schemas"][&kind].clone();
            assert!(schema.is_object(), "{kind} is not in the AsyncAPI document");
            schema["components"] = json!({ "schemas": document["components"]["schemas"] });
            jsonschema::validator_for(&schema).unwrap()
        });
        if let Err(e) = described.validate(&message) {
            panic!("{kind}: {e} at {}: {message:#}", e.instance_path());
        }
        seen.insert(kind);
    }
    assert_eq!(unread, Vec::<String>::new());
    for (kind, _) in CDEVENT_KINDS {
        // Nobody of the fleet deletes an environment; see below.
        let occurs = seen.contains(&format!("dev.cdevents.{kind}.0.3.0"));
        assert!(
            occurs || kind == "environment.deleted",
            "{kind} did not occur: {seen:#?}"
        );
    }
}

/// Stores all events of a subject as they are, whatever they make of it.
fn store<P: Payload>(log: &MemoryLog, subject: &Subject, events: impl IntoIterator<Item = P>) {
    for (payload, revision) in events.into_iter().zip(1..) {
        let number = u64::from(revision) + 1000 * subject.to_string().len() as u64;
        let event = NewEvent {
            subject: subject.clone(),
            revision,
            payload,
            context: context(number),
        };
        log.store(subject.clone(), event.to_bytes(time(number)).unwrap());
    }
}

/// The types of the CDEvents of a log, without what all have in common, with their outcomes.
async fn told(log: &MemoryLog) -> Vec<String> {
    let (projections, events) = folded(log).await;
    let told = events.iter().filter_map(|recorded| {
        let event = recorded.event().unwrap();
        let cdevent = projections.cdevent(recorded, &event).unwrap()?;
        sdk::takes(&cdevent).unwrap();
        let kind = cdevent["context"]["type"].as_str().unwrap();
        let kind = kind.strip_prefix("dev.cdevents.").unwrap();
        let kind = kind.strip_suffix(".0.3.0").unwrap();
        Some(match cdevent["subject"]["content"]["outcome"].as_str() {
            Some(outcome) => format!("{kind} {outcome}"),
            None => kind.to_owned(),
        })
    });
    told.collect()
}

fn place() -> (Subject, InstanceRef) {
    let of = samples::shop();
    let (project, environment) = (of.project.clone(), of.environment.clone());
    let subject = Subject::Deployment(project, environment, samples::deployment_id(1));
    (subject, of)
}

#[tokio::test]
async fn what_is_void_is_told_to_nobody() {
    let log = MemoryLog::new();
    let (_, of) = place();
    let subject = Subject::Environment(of.project, of.environment);
    let made = samples::environment_events().remove(0);
    store(&log, &subject, [made.clone(), made]);
    assert_eq!(told(&log).await, ["environment.created"]);
}

#[tokio::test]
async fn the_end_of_an_environment_is_told() {
    let log = MemoryLog::new();
    let (_, of) = place();
    let subject = Subject::Environment(of.project, of.environment);
    store(&log, &subject, samples::environment_events());
    let told = told(&log).await;
    assert!(told.iter().any(|t| t == "environment.deleted"), "{told:?}");
}

#[tokio::test]
async fn a_run_ends_once() {
    let log = MemoryLog::new();
    let (subject, of) = place();
    let mut events = samples::deployment_events(of, 1);
    let rest = events.split_off(9);
    let find = |kind: &str| {
        let found = rest.iter().find(|e| e.kind() == kind);
        found.unwrap_or_else(|| panic!("no {kind}")).clone()
    };
    events.push(find("deployment.partially_succeeded.v1"));
    events.push(find("deployment.retry_requested.v1"));
    events.push(find("deployment.cluster_retried.v1"));
    events.push(find("deployment.succeeded.v1"));
    store(&log, &subject, events);
    let told = told(&log).await;
    let ends: Vec<_> = told
        .iter()
        .filter(|kind| kind.starts_with("pipelinerun.finished"))
        .collect();
    assert_eq!(ends, ["pipelinerun.finished error"], "{told:?}");
}

#[tokio::test]
async fn a_chart_is_deployed_as_a_package() {
    let log = MemoryLog::new();
    let (subject, of) = place();
    let mut request = samples::request(of.clone());
    request.version = Version::Helm {
        chart: "oci://charts.example.com/stable/web".parse().unwrap(),
        version: "1.2.3".parse().unwrap(),
    };
    let requested = DeploymentEvent::Requested(Box::new(request));
    store(&log, &subject, [requested]);
    let switched = samples::routing_events(&of, samples::deployment_id(1)).remove(0);
    store(&log, &Subject::Routing(of.project), [switched]);
    let (projections, events) = folded(&log).await;
    let event = events[1].event().unwrap();
    let cdevent = projections.cdevent(&events[1], &event).unwrap().unwrap();
    assert_eq!(
        cdevent["subject"]["content"]["artifactId"],
        "pkg:helm/web@1.2.3?repository_url=oci%3A%2F%2Fcharts.example.com%2Fstable"
    );
    let kind = cdevent["context"]["type"].as_str().unwrap();
    let schema = &schemas()[kind];
    assert!(schema.is_valid(&cdevent), "{cdevent:#}");
    sdk::takes(&cdevent).unwrap();
}

/// One with nothing wrong: what is done to it below is all that is.
fn good() -> Value {
    json!({
        "context": {
            "specversion": "0.5.1",
            "id": "1",
            "source": "/daybook",
            "type": "dev.cdevents.pipelinerun.finished.0.3.0",
            "timestamp": "2026-03-01T12:00:00Z",
        },
        "subject": {
            "id": "7",
            "source": "/daybook",
            "content": { "pipelineName": "deploy", "uri": "urn:x:7", "outcome": "success" },
        },
    })
}

#[test]
fn the_sdk_finds_mistakes() {
    sdk::takes(&good()).unwrap();
    type Change = fn(&mut Value);
    let changes: [(&str, Change); 9] = [
        ("an outcome that is none", |e| {
            e["subject"]["content"]["outcome"] = "well".into();
        }),
        ("a member that is none", |e| {
            e["subject"]["content"]["weather"] = "fine".into();
        }),
        ("a member of the subject", |e| {
            e["subject"]["weather"] = "fine".into();
        }),
        ("a member of the context", |e| {
            e["context"]["weather"] = "fine".into();
        }),
        ("a member of the whole", |e| {
            e["weather"] = "fine".into();
        }),
        ("no subject", |e| {
            e.as_object_mut().unwrap().remove("subject");
        }),
        ("a subject without a name", |e| {
            e["subject"]["id"] = "".into();
        }),
        ("a type that is none", |e| {
            e["context"]["type"] = "dev.cdevents.pipelinerun.paused.0.3.0".into();
        }),
        ("a version that a type never had", |e| {
            e["context"]["type"] = "dev.cdevents.pipelinerun.finished.0.9.0".into();
        }),
    ];
    for (what, change) in changes {
        let mut wrong = good();
        change(&mut wrong);
        assert!(sdk::takes(&wrong).is_err(), "it takes {what}");
    }
    // What must be there.
    let mut wrong = good();
    wrong["context"]["type"] = "dev.cdevents.service.deployed.0.3.0".into();
    wrong["subject"]["content"] = json!({ "environment": { "id": "production" } });
    let said = sdk::takes(&wrong).unwrap_err();
    assert!(said.contains("artifactId"), "{said}");
}
