//! Every command of the interface is carried out once, however often it comes with its key.

use std::collections::BTreeSet;
use std::sync::Arc;

use daybook_api::catalogue::Catalogue;
use daybook_events::approval::{ApprovalRequested, ApprovalRule, Plan};
use daybook_events::deployment::{
    ClusterFailed, DeployingStarted, DeploymentEvent, ImagePinned, Instance, PartiallySucceeded,
    StopScheduled, WorkloadObserved,
};
use daybook_events::freeze::Held;
use daybook_events::gitops::{self, ForeignCommitFound, GitopsEvent, RepositoryCreated};
use daybook_events::routing::Hostnames;
use daybook_events::spec::PinnedImage;
use daybook_events::subscription::{self, EventDeadLettered};
use daybook_events::timer::{KeepFor, StopCause};
use daybook_events::{
    CommitId, DeploymentId, EventId, Hostname, Position, ProjectName, Subject, SubscriptionId,
};
use jiff::Timestamp;
use reqwest::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::*;

/// What takes a key as every POST does, and needs none.
const OTHERWISE: [(&str, &str); 8] = [
    (
        "/api/v1/tokens",
        "its secret is shown once: access.rs sends it twice",
    ),
    (
        "/api/v1/tokens/{token}/rotate",
        "its secret is shown once: access.rs sends it twice",
    ),
    (
        "/api/v1/projects/{project}/hooks/{hook}",
        "a delivery is known by its own id: tests/previews.rs sends it twice",
    ),
    (
        "/api/v1/projects/{project}/secrets/{name}/verify",
        "it compares, and records nothing",
    ),
    (
        "/api/v1/projects/{project}/services/{service}/uploads",
        "the same content counts once: tests/uploads.rs sends it twice",
    ),
    (
        "/api/v1/projects/{project}/services/{service}/uploads/missing",
        "it asks what is not there yet, and records nothing",
    ),
    ("/git/{repository}/git-upload-pack", "it is how git reads"),
    (
        "/uploads/{project}/{repository}/git-upload-pack",
        "it is how git reads",
    ),
];

/// Sends each command twice.
struct Twice<'a> {
    server: &'a Server,
    sent: BTreeSet<&'static str>,
    actor: &'static str,
}

impl Twice<'_> {
    async fn send(&mut self, address: &'static str, names: &[&str], body: Value) -> Value {
        let mut path = String::new();
        let mut names = names.iter();
        for part in address.split_inclusive('/') {
            let end = if part.ends_with('/') { "/" } else { "" };
            match part.starts_with('{') {
                true => path.extend([*names.next().unwrap(), end]),
                false => path.push_str(part),
            }
        }
        let key = format!("key {}", self.sent.len());
        let send = async || {
            let request = self.server.request(Method::POST, &path).json(&body);
            let request = request.header("Daybook-Actor", self.actor);
            self.server
                .send(request.header("Idempotency-Key", &key))
                .await
        };
        let done = send().await;
        assert!(done.status.is_success(), "{path}: {done:?}");
        assert_eq!(done.header("idempotency-replayed"), None, "{path}");
        let position = done.position();
        let again = send().await;
        assert_eq!(again.status, done.status, "{path}: {again:?}");
        assert_eq!(again.text, done.text, "{path}");
        assert_eq!(again.header("idempotency-replayed"), Some("true"), "{path}");
        let head = self.server.log.head().await.unwrap();
        assert_eq!(head, position, "{path}: it was done again");
        assert!(self.sent.insert(address), "{address} twice");
        done.ok()
    }
}

impl Server {
    async fn pin(&self, id: DeploymentId) {
        let image = PinnedImage {
            repository: "registry.local:5000/daybook/shop/api".parse().unwrap(),
            tag: "0123456".parse().unwrap(),
            digest: DIGEST.parse().unwrap(),
        };
        let pinned = ImagePinned {
            image,
            build: None,
            shared: false,
        };
        self.happens(id, DeploymentEvent::ImagePinned(pinned)).await;
    }

    /// A deployment whose plan waits to be allowed, and the hash of that.
    async fn asks(&self) -> (String, String) {
        let id = self.deploy("shop.staging.api", "v3").await;
        self.make_live_to_building(id).await;
        self.pin(id).await;
        let state = self
            .ledger
            .projections()
            .deployment(id)
            .unwrap()
            .unwrap()
            .state;
        let rule = ApprovalRule {
            required: 1,
            approvers: BTreeSet::new(),
            expires: KeepFor::IDLE,
        };
        let domain = Hostname::parse("localhost").unwrap();
        let hostnames = Hostnames::under(&domain, &state.request.instance, id, false).unwrap();
        let plan = Plan::of(&state, &rule, None, None, None, &hostnames).unwrap();
        let hash = plan.hash();
        let asked = ApprovalRequested {
            plan,
            hash: hash.clone(),
            requester: "alice".into(),
            author: None,
            expires: None,
            nonce: EventId(Uuid::now_v7()),
        };
        self.happens(id, DeploymentEvent::ApprovalRequested(Box::new(asked)))
            .await;
        (id.to_string(), hash.to_string())
    }

    /// A deployment that runs in one of its two clusters.
    async fn runs_in_part(&self) -> String {
        let body = json!({
            "instance_id": "shop.production.api", "version": "v4", "allow_partial": true,
            "switch": "manual",
        });
        let accepted = self.post("/api/v1/deployments", body).await.ok();
        let id: DeploymentId = accepted["id"].as_str().unwrap().parse().unwrap();
        self.make_live_to_building(id).await;
        self.pin(id).await;
        let revision = CommitId::parse(COMMIT).unwrap();
        let commit = revision.clone();
        self.happens(
            id,
            DeploymentEvent::DeployingStarted(DeployingStarted { commit }),
        )
        .await;
        let seen = WorkloadObserved {
            cluster: "east".parse().unwrap(),
            revision: revision.clone(),
            wanted: 1,
            instances: vec![Instance {
                name: "east-0".into(),
                address: "127.0.0.1:4000".into(),
                ready: true,
                restarts: 0,
            }],
            problem: None,
        };
        self.happens(id, DeploymentEvent::WorkloadObserved(seen))
            .await;
        let failed = ClusterFailed {
            cluster: "west".parse().unwrap(),
            code: "rollout_timeout".into(),
            message: "it was not seen ready in time".into(),
            remedy: "look at the cluster".into(),
        };
        self.happens(id, DeploymentEvent::ClusterFailed(failed.clone()))
            .await;
        let partly = PartiallySucceeded {
            revision,
            table: self.assign(id).await,
            ready: vec!["east".parse().unwrap()],
            failed: vec![failed],
        };
        self.happens(id, DeploymentEvent::PartiallySucceeded(partly))
            .await;
        id.to_string()
    }

    async fn gitops_happens(&self, event: GitopsEvent) {
        let subject = Subject::Gitops(ProjectName::parse("shop").unwrap());
        let executed = self
            .ledger
            .execute(&subject, &context(DeploymentId(Uuid::now_v7())), |state| {
                gitops::decide(state, event.clone())
            })
            .await
            .unwrap();
        self.folded(executed).await;
    }

    /// An event that a webhook's receiver did not take.
    async fn sets_aside(&self, webhook: &str) {
        let id: SubscriptionId = webhook.parse().unwrap();
        let subject = Subject::Subscription(ProjectName::parse("shop").unwrap(), id);
        let letter = EventDeadLettered {
            position: Position(1),
            event: EventId(Uuid::now_v7()),
            tries: 3,
            code: "timeout".into(),
        };
        let executed = self
            .ledger
            .execute(&subject, &context(DeploymentId(Uuid::now_v7())), |state| {
                subscription::decide(state, subscription::Command::SetAside(letter.clone()))
            })
            .await
            .unwrap();
        self.folded(executed).await;
    }

    /// A commit that somebody else made.
    async fn foreign_commit(&self, digit: &str) -> String {
        let commit = digit.repeat(40);
        let found = json!({
            "commit": commit, "author": "Eve <eve@example.com>", "message": "more replicas",
            "files": ["environments/production/values.yaml"],
        });
        let found: ForeignCommitFound = serde_json::from_value(found).unwrap();
        self.gitops_happens(GitopsEvent::ForeignCommitFound(Box::new(found)))
            .await;
        commit
    }
}

#[tokio::test]
async fn every_command_of_the_document_is_carried_out_once() {
    let catalogue = Arc::new(Catalogue::load(None).unwrap());
    let server = server_with(|settings, _| settings.catalogue = catalogue).await;
    server.shop().await;
    let mut twice = Twice {
        server: &server,
        sent: BTreeSet::new(),
        actor: "bob",
    };
    let first = server.deploy("shop.production.api", "v1").await;
    server.make_live(first).await;
    let second = server.deploy("shop.production.api", "v2").await;
    server.make_live(second).await;
    let [old, main] = [first, second].map(|id| id.to_string());
    let instance = "shop.production.api";

    twice
        .send("/api/v1/projects", &[], json!({ "name": "blog" }))
        .await;
    twice
        .send(
            "/api/v1/projects/{project}/environments",
            &["shop"],
            json!({ "name": "edge" }),
        )
        .await;
    let accepted = twice
        .send(
            "/api/v1/deployments",
            &[],
            json!({ "instance_id": "shop.staging.api", "version": "v2" }),
        )
        .await;
    let id = accepted["id"].as_str().unwrap().to_owned();
    let held = Held {
        freeze: "night".parse().unwrap(),
        until: None,
        nonce: EventId(Uuid::now_v7()),
    };
    server
        .happens(id.parse().unwrap(), DeploymentEvent::Held(held))
        .await;
    let why = || json!({ "reason": "it cannot wait" });
    twice
        .send("/api/v1/deployments/{id}/override-freeze", &[&id], why())
        .await;
    twice
        .send("/api/v1/deployments/{id}/cancel", &[&id], why())
        .await;

    twice
        .send("/api/v1/rollback", &[], json!({ "instance_id": instance }))
        .await;
    twice
        .send("/api/v1/deployments/{id}/mark-main", &[&main], why())
        .await;
    twice
        .send(
            "/api/v1/scale",
            &[],
            json!({ "instance_id": instance, "replicas": 3 }),
        )
        .await;
    twice
        .send(
            "/api/v1/projects/{project}/routes",
            &["shop"],
            json!({ "instance_id": instance, "to": [
                { "deployment": main, "weight": 90 }, { "deployment": old, "weight": 10 },
            ] }),
        )
        .await;
    twice
        .send(
            "/api/v1/projects/{project}/routes/policy",
            &["shop"],
            json!({ "instance_id": instance, "policy": "latency" }),
        )
        .await;
    twice
        .send(
            "/api/v1/projects/{project}/domains",
            &["shop"],
            json!({ "instance_id": instance, "hostname": "www.example.com" }),
        )
        .await;
    twice
        .send(
            "/api/v1/promote",
            &[],
            json!({
                "project": "shop", "service": "api", "from": "production", "to": "staging",
            }),
        )
        .await;
    twice
        .send(
            "/api/v1/config",
            &[],
            json!({ "instance_id": instance, "set": { "LOG_LEVEL": "debug" } }),
        )
        .await;
    twice
        .send("/api/v1/deployments/{id}/redeploy", &[&old], json!({}))
        .await;
    twice
        .send(
            "/api/v1/templates/{template}/deploy",
            &["image"],
            json!({
                "instance_id": "shop.staging.notes",
                "parameters": { "image": "registry.example/notes:v1" },
            }),
        )
        .await;

    let scheduled = StopScheduled {
        due: Timestamp::now() + std::time::Duration::from_secs(3600),
        cause: StopCause::Idle,
        keep: KeepFor::IDLE,
        by: None,
        table: None,
        nonce: EventId(Uuid::now_v7()),
    };
    server
        .happens(first, DeploymentEvent::StopScheduled(scheduled))
        .await;
    twice
        .send("/api/v1/deployments/{id}/keep", &[&old], why())
        .await;
    twice
        .send("/api/v1/deployments/{id}/stop", &[&old], why())
        .await;
    server.finish_stop(first).await;
    twice
        .send("/api/v1/deployments/{id}/start", &[&old], why())
        .await;
    let third = server.deploy("shop.staging.cache", "v1").await;
    server.make_live(third).await;
    // It has to be stopped before.
    let stop = format!("/api/v1/deployments/{third}/stop");
    server.post(&stop, json!({})).await.ok();
    server.finish_stop(third).await;
    twice
        .send(
            "/api/v1/deployments/{id}/terminate",
            &[&third.to_string()],
            why(),
        )
        .await;

    let (id, hash) = server.asks().await;
    twice
        .send(
            "/api/v1/deployments/{id}/approve",
            &[&id],
            json!({ "hash": hash }),
        )
        .await;
    let (id, _) = server.asks().await;
    twice
        .send("/api/v1/deployments/{id}/reject", &[&id], why())
        .await;
    let (id, hash) = server.asks().await;
    twice
        .send(
            "/api/v1/deployments/{id}/override",
            &[&id],
            json!({ "hash": hash, "reason": "production is down" }),
        )
        .await;
    let request = server.request(Method::POST, &format!("/api/v1/deployments/{id}/review"));
    let own = server.send(request.header("Daybook-Actor", "bob")).await;
    assert_eq!(own.status, 409, "{own:?}");
    twice.actor = "carol";
    twice
        .send("/api/v1/deployments/{id}/review", &[&id], why())
        .await;
    let id = server.runs_in_part().await;
    twice
        .send("/api/v1/deployments/{id}/retry", &[&id], why())
        .await;

    let created = RepositoryCreated {
        commit: CommitId::parse(COMMIT).unwrap(),
        branch: "main".into(),
    };
    server
        .gitops_happens(GitopsEvent::RepositoryCreated(created))
        .await;
    let commit = server.foreign_commit("a").await;
    twice
        .send(
            "/api/v1/projects/{project}/gitops/commits/{commit}/adopt",
            &["shop", &commit],
            why(),
        )
        .await;
    let commit = server.foreign_commit("b").await;
    twice
        .send(
            "/api/v1/projects/{project}/gitops/commits/{commit}/revert",
            &["shop", &commit],
            why(),
        )
        .await;

    let made = twice
        .send(
            "/api/v1/webhooks",
            &[],
            json!({ "project": "shop", "url": "https://hooks.example.com/x", "tries": 3 }),
        )
        .await;
    let id = made["webhook"]["id"].as_str().unwrap().to_owned();
    for (address, body) in [
        ("/api/v1/webhooks/{webhook}/rotate", json!({})),
        ("/api/v1/webhooks/{webhook}/test", json!({})),
        ("/api/v1/webhooks/{webhook}/pause", json!({})),
        ("/api/v1/webhooks/{webhook}/resume", json!({})),
    ] {
        twice.send(address, &[&id], body).await;
    }
    server.sets_aside(&id).await;
    twice
        .send("/api/v1/webhooks/{webhook}/replay", &[&id], json!({}))
        .await;
    twice
        .send("/api/v1/webhooks/{webhook}/discard", &[&id], json!({}))
        .await;

    // There is none that has no row here.
    let document = daybook_api::openapi();
    let commands = document["paths"].as_object().unwrap().iter();
    let commands = commands.filter(|(_, operations)| operations["post"].is_object());
    let commands: BTreeSet<&str> = commands.map(|(path, _)| path.as_str()).collect();
    let mut shown = twice.sent;
    shown.extend(OTHERWISE.map(|(path, _)| path));
    assert_eq!(shown, commands);
}
