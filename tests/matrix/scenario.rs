//! What happens in every run: a deployment, a second one, a switch, the way back, a stop and a
//! termination, asked for by a client that repeats what it has no answer to.

use daybook_testkit::git::SourceRepository;
use reqwest::Method;
use serde_json::{Value, json};

use crate::stage::Stage;
use crate::support::{application, replace_flags, request};
use crate::traffic::Traffic;

/// Where the service answers.
pub const HOST: &str = "web.shop.localhost";

/// What is deployed: one repository for all runs, with two versions.
pub struct Versions {
    source: SourceRepository,
    first: String,
    second: String,
}

impl Versions {
    /// Two versions of the test application.
    pub fn new() -> Self {
        let source = application("--text one");
        let first = replace_flags(&source, "--text first");
        let second = replace_flags(&source, "--text second");
        Self {
            source,
            first,
            second,
        }
    }
}

/// The deployments of a run. Their ids are derived from the keys of their requests, and so the same
/// in every run.
#[derive(Debug, Clone)]
pub struct Cast {
    pub first: String,
    pub second: String,
}

/// Goes through everything. Returns the deployments and what the traffic has to complain about.
pub fn play(stage: &mut Stage, versions: &Versions) -> (Cast, Vec<String>) {
    let post = |stage: &mut Stage, path: &str, body: Value, key: &str| {
        stage.ask(&Method::POST, path, Some(&body), key)
    };
    post(
        stage,
        "/api/v1/projects",
        json!({"name": "shop"}),
        "project",
    );
    if let Some(url) = stage.forge.as_ref().map(|forge| forge.url()) {
        let path = "/api/v1/projects/shop/gitops/remote";
        stage.ask(&Method::PUT, path, Some(&json!({ "url": url })), "remote");
    }
    post(
        stage,
        "/api/v1/projects/shop/environments",
        json!({"name": "production", "clusters": ["local-a"], "live": true}),
        "environment",
    );
    stage.ask(
        &Method::PUT,
        "/api/v1/projects/shop/services/web",
        Some(&json!({"source": {"url": versions.source.url()}})),
        "service",
    );
    let instance = "shop.production.web";

    let body = json!({"instance_id": instance, "git_ref": versions.first});
    let first = id_of(&post(stage, "/api/v1/deployments", body, "first"));
    wait_for(stage, &first, "started");
    answered_by(stage, &first);
    let traffic = Traffic::to(&stage.gateway, HOST, &first);

    let body = json!({"instance_id": instance, "git_ref": versions.second, "switch": "manual"});
    let second = id_of(&post(stage, "/api/v1/deployments", body, "second"));
    wait_for(stage, &second, "started");

    traffic.may_come_from(&[&first, &second]);
    let path = format!("/api/v1/deployments/{second}/mark-main");
    post(stage, &path, json!({}), "switch");
    answered_by(stage, &second);
    traffic.may_come_from(&[&second]);
    will_be_stopped(stage, &first, true);

    traffic.may_come_from(&[&first, &second]);
    let body = json!({"instance_id": instance});
    post(stage, "/api/v1/rollback", body, "rollback");
    answered_by(stage, &first);
    traffic.may_come_from(&[&first]);
    will_be_stopped(stage, &first, false);
    will_be_stopped(stage, &second, true);

    for (operation, state) in [("stop", "stopped"), ("terminate", "terminated")] {
        let path = format!("/api/v1/deployments/{second}/{operation}");
        post(stage, &path, json!({}), operation);
        wait_for(stage, &second, state);
    }
    stage.until("its processes ended", |stage| {
        stage.processes_of(&second).is_empty().then_some(())
    });
    // What comes after the last answer, acknowledgements and checkpoints, may still be deadly.
    let mut patience = 400;
    while stage.is_doomed() && patience > 0 {
        stage.rest();
        patience -= 1;
    }
    answered_by(stage, &first);
    let outages = stage.outages.lock().unwrap().clone();
    let (served, mut wrong) = traffic.end(&outages);
    if served == 0 {
        wrong.push("no visit was served".into());
    }
    (Cast { first, second }, wrong)
}

fn id_of(answer: &Value) -> String {
    answer["id"].as_str().unwrap().to_owned()
}

fn wait_for(stage: &mut Stage, id: &str, state: &str) {
    let path = format!("/api/v1/deployments/{id}");
    stage.until(&format!("{id} {state}"), |stage| {
        let detail = stage.read(&path);
        assert!(
            detail["failure"].is_null(),
            "{id} failed: {}",
            detail["failure"]
        );
        (detail["state"] == state).then_some(())
    });
}

/// Waits until it is recorded whether a deployment will be stopped by itself. A later decision
/// would come before it, or not, as chance has it.
fn will_be_stopped(stage: &mut Stage, id: &str, expected: bool) {
    let path = format!("/api/v1/deployments/{id}");
    stage.until(&format!("stop of {id} is scheduled: {expected}"), |stage| {
        (stage.read(&path)["stops"].is_object() == expected).then_some(())
    });
}

/// Waits until a deployment answers where the service does. From then on, no other one does.
fn answered_by(stage: &mut Stage, id: &str) {
    stage.until(&format!("{HOST} answered by {id}"), |stage| {
        let answer = request(Method::GET, &stage.gateway, &[("Host", HOST)], None).ok()?;
        (answer.status == 200 && answer.by() == Some(id)).then_some(())
    });
}
