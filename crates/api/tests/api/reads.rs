use daybook_events::memory::MemoryLog;
use daybook_events::{DeploymentId, Position};
use serde_json::{Value, json};

use crate::support::*;

/// Follows a listing to its end, a few rows at a time.
async fn all_pages(server: &Server, path: &str, field: &str, limit: usize) -> Vec<Value> {
    let mut rows = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = server
            .get(&format!("{path}limit={limit}{cursor}"))
            .await
            .ok();
        let items = page[field].as_array().unwrap().clone();
        assert!(items.len() <= limit);
        rows.extend(items);
        match page["next"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return rows,
        }
        assert!(rows.len() < 1000, "the pages do not end");
    }
}

#[tokio::test]
async fn listings_are_paged_without_gap_or_repeat_while_more_is_appended() {
    let server = server().await;
    server.shop().await;
    let mut made = Vec::new();
    for n in 0..7 {
        made.push(
            server
                .deploy("shop.staging.api", &format!("v{n}"))
                .await
                .to_string(),
        );
    }
    made.reverse();
    let ids = |rows: &[Value], field: &str| -> Vec<String> {
        rows.iter()
            .map(|r| r[field].as_str().unwrap().to_owned())
            .collect()
    };
    let rows = all_pages(&server, "/api/v1/deployments?", "deployments", 3).await;
    assert_eq!(ids(&rows, "id"), made);
    let rows = all_pages(&server, "/api/v1/history?project=shop&", "history", 2).await;
    assert_eq!(ids(&rows, "deployment"), made);

    // What is appended between two pages does not move the second one.
    let first = server.get("/api/v1/deployments?limit=3").await.ok();
    server.deploy("shop.staging.api", "later").await;
    let cursor = first["next"].as_str().unwrap();
    let second = server
        .get(&format!("/api/v1/deployments?limit=3&cursor={cursor}"))
        .await
        .ok();
    let second = second["deployments"].as_array().unwrap();
    assert_eq!(ids(second, "id"), made[3..6]);

    let rows = all_pages(&server, "/api/v1/audit?kind=deployment&", "audit", 3).await;
    assert_eq!(rows.len(), 8);
    for (path, found) in [
        ("instance_id=shop.staging.api", 8),
        ("project=shop&environment=production", 0),
        ("project=none", 0),
        ("status=queued", 8),
        ("status=started", 0),
        ("version=v3", 1),
    ] {
        let list = server
            .get(&format!("/api/v1/deployments?{path}"))
            .await
            .ok();
        assert_eq!(
            list["deployments"].as_array().unwrap().len(),
            found,
            "{path}"
        );
    }
}

#[tokio::test]
async fn history_audit_and_state_say_what_happened_and_what_is() {
    let server = server().await;
    server.shop().await;
    let request = server
        .request(reqwest::Method::POST, "/api/v1/deployments")
        .header("Daybook-Actor", "alice@example")
        .json(&json!({ "instance_id": "shop.production.api", "version": "v1", "reason": "go" }));
    let id = server.send(request).await.ok()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    server.make_live(id.parse().unwrap()).await;
    let history = server
        .get("/api/v1/history?instance_id=shop.production.api")
        .await
        .ok();
    let row = &history["history"][0];
    assert_eq!(row["deployment"], id.as_str());
    assert_eq!(row["image_tag"], "0123456");
    assert_eq!(row["active"], true);
    assert_eq!(row["revision"], COMMIT);
    assert_eq!(row["source_commit_message"], "Faster carts\n");
    assert_eq!(row["source_url"], "https://git.example/shop.git");

    let audit = server.get("/api/v1/audit?actor=alice@example").await.ok();
    let row = &audit["audit"][0];
    assert_eq!(row["kind"], "deployment.requested.v1");
    assert_eq!(row["reason"], "go");
    assert_eq!(row["actor"]["kind"], "unauthenticated");
    assert_eq!(audit["audit"].as_array().unwrap().len(), 1);

    let other = server.deploy("shop.staging.api", "v2").await;
    let state = server.get("/api/v1/state?project=shop").await.ok();
    let instances = state["instances"].as_array().unwrap();
    assert_eq!(instances.len(), 2);
    assert_eq!(instances[0]["main"]["id"], id.as_str());
    assert_eq!(instances[0]["main"]["workload"]["state"], "ready");
    assert_eq!(instances[1]["others"][0]["id"], other.to_string());
    let pages = all_pages(&server, "/api/v1/state?", "instances", 1).await;
    assert_eq!(&pages, instances);
    let one = server
        .get("/api/v1/state?project=shop&environment=staging")
        .await
        .ok();
    assert_eq!(one["instances"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn the_past_is_read_by_position_and_by_time_with_its_state_hash() {
    let server = server().await;
    server.shop().await;
    let id = server.deploy("shop.production.api", "v1").await;
    server.make_live(id).await;
    let then = server.get("/api/v1/state").await;
    let position = then.position();
    let hash = then.header("daybook-state-hash").unwrap().to_owned();
    let history = server.get("/api/v1/history").await;
    assert_eq!(history.header("daybook-state-hash"), Some(hash.as_str()));
    let (then, history) = (then.ok(), history.ok());
    assert_eq!(then["state_hash"], hash.as_str());
    let written = |audit: serde_json::Value| audit["audit"][0]["recorded"].clone();
    let time = written(server.get("/api/v1/audit?limit=1").await.ok());

    // Later, something else runs.
    let other = server.deploy("shop.production.api", "v2").await;
    server.make_live(other).await;
    let now = server.get("/api/v1/state").await;
    assert_ne!(now.header("daybook-state-hash"), Some(hash.as_str()));
    assert_ne!(now.ok()["instances"], then["instances"]);

    for at in [position.to_string(), time.as_str().unwrap().to_owned()] {
        let past = server.get(&format!("/api/v1/state?at={at}")).await;
        assert_eq!(past.position(), position);
        assert_eq!(past.header("daybook-state-hash"), Some(hash.as_str()));
        assert_eq!(past.ok(), then, "{at}");
        let past = server.get(&format!("/api/v1/history?at={at}")).await;
        assert_eq!(past.position(), position);
        assert_eq!(past.ok(), history, "{at}");
    }
    let nothing = server.get("/api/v1/state?at=0").await.ok();
    assert_eq!(nothing["instances"], json!([]));
    let before = server.get("/api/v1/history?at=2000-01-01T00:00:00Z").await;
    assert_eq!(before.position().0, 0);
}

/// Whatever is asked again about the same position is sent as it was sent: nothing is read for it.
#[tokio::test]
async fn what_was_answered_about_a_position_is_answered_again_without_the_log() {
    let log = MoodyLog::new();
    let server = server_on_moody(&log).await;
    server.shop().await;
    let id = server.deploy("shop.production.api", "v1").await;
    let at = server.get("/api/v1/state").await.position();
    // What it was is not what it is: only the log knows.
    server.make_live(id).await;
    let paths = [
        format!("/api/v1/state?project=shop&at={at}"),
        format!("/api/v1/history?project=shop&at={at}"),
    ];
    let first = async |path: &String| {
        let reply = server.get(path).await;
        assert_eq!(reply.position(), at);
        let hash = reply.header("daybook-state-hash").unwrap().to_owned();
        (hash, reply.ok())
    };
    let (state, history) = (first(&paths[0]).await, first(&paths[1]).await);
    for mood in [Mood::IsUnavailable, Mood::Panics] {
        log.becomes(mood);
        assert_eq!(first(&paths[0]).await, state);
        assert_eq!(first(&paths[1]).await, history);
    }
    // Another question about it is none that was answered.
    log.becomes(Mood::IsUnavailable);
    let other = server.get(&format!("{}&limit=7", paths[1])).await;
    other.refused(503, "log_unavailable");
}

/// What happens elsewhere changes nothing in a project but the position that the answer stands on;
/// whoever has never answered before says the same.
#[tokio::test]
async fn what_is_in_a_project_is_the_same_after_something_happened_elsewhere() {
    let server = server().await;
    server.shop().await;
    let id = server.deploy("shop.production.api", "v1").await;
    let mut seen = Vec::new();
    for step in 0..4 {
        match step {
            0 => {}
            1 => {
                let body = json!({ "name": "other" });
                server.post("/api/v1/projects", body).await.ok();
            }
            2 => {
                server.make_live(id).await;
            }
            _ => {
                server.store("no event").await;
            }
        }
        let replica = replica_of(&server, |_, _| {}).await;
        let position = server.get("/api/v1/state").await.position();
        let reached = replica.ledger.projections().wait_for(position, PATIENCE);
        reached.await.unwrap();
        for path in ["/api/v1/state?project=shop", "/api/v1/history?project=shop"] {
            let (own, other) = (server.get(path).await, replica.get(path).await);
            assert_eq!(own.position(), position, "{path}");
            let hash = |reply: &Reply| reply.header("daybook-state-hash").unwrap().to_owned();
            assert_eq!(hash(&own), hash(&other), "{path} after step {step}");
            assert_eq!(own.text, other.text, "{path} after step {step}");
            seen.push(own.text);
        }
    }
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 8, "each says where it stands");
}

/// What breaks in a handler breaks one answer: it is said, and nothing is left behind.
#[tokio::test]
async fn a_handler_that_panics_is_answered_for() {
    let log = MoodyLog::new();
    let server = server_on_moody(&log).await;
    server.shop().await;
    let id = server.deploy("shop.production.api", "v1").await;
    let at = server.get("/api/v1/state").await.position();
    server.make_live(id).await;
    let path = format!("/api/v1/history?at={at}");
    log.becomes(Mood::Panics);
    for _ in 0..2 {
        let problem = server.get(&path).await.refused(500, "internal");
        assert_eq!(problem["retryable"], false, "{problem}");
    }
    log.becomes(Mood::Reads);
    let list = server.get(&path).await.ok();
    assert_eq!(list["history"][0]["deployment"], id.to_string());
}

/// The hashes at the newest 1024 positions are at hand; those before are worked out.
#[tokio::test]
async fn the_distant_past_has_its_state_hash_too() {
    let log = MemoryLog::new();
    let server = server_on_memory(&log).await;
    server.shop().await;
    let id = server.deploy("shop.production.api", "v1").await;
    server.make_live(id).await;
    let then = server.get("/api/v1/state").await;
    let (position, hash) = (then.position(), then.header("daybook-state-hash"));
    let hash = hash.unwrap().to_owned();
    for _ in 0..1_100 {
        server.store("no event").await;
    }
    let projections = server.ledger.projections();
    assert_eq!(projections.recent_state_hash(position), None);
    for path in ["state", "history"] {
        let path = format!("/api/v1/{path}?at={position}");
        let past = server.get(&path).await;
        assert_eq!(
            past.header("daybook-state-hash"),
            Some(hash.as_str()),
            "{path}"
        );
    }
    let between = Position(position.0 + 30);
    let past = server.get(&format!("/api/v1/state?at={between}")).await;
    let replayed = daybook_projections::replay::state_at(&server.log, between);
    let replayed = replayed.await.unwrap().state_hash().1.to_string();
    assert_ne!(replayed, hash);
    assert_eq!(past.header("daybook-state-hash"), Some(replayed.as_str()));
}

#[tokio::test]
async fn own_writes_are_read_and_positions_are_waited_for() {
    let server = server_with(|settings, _| {
        settings.min_position_wait = std::time::Duration::from_secs(2);
    })
    .await;
    let written = server
        .post("/api/v1/projects", json!({ "name": "shop" }))
        .await;
    let position = written.position().to_string();
    let request = server
        .request(reqwest::Method::GET, "/api/v1/projects/shop")
        .header("Daybook-Min-Position", &position);
    let read = server.send(request).await;
    assert_eq!(read.status, 200);
    assert!(read.position() >= written.position());

    let ahead = server
        .request(reqwest::Method::GET, "/api/v1/projects/shop")
        .header("Daybook-Min-Position", "1000");
    let refused = server.send(ahead).await;
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(refused.refused(503, "behind")["retryable"], true);

    // What this log does not get to is not waited for, however long that may take.
    let patient = server_with(|settings, _| {
        settings.min_position_wait = std::time::Duration::from_hours(1);
    })
    .await;
    for far in ["1000000", "18446744073709551615"] {
        let far = patient
            .request(reqwest::Method::GET, "/api/v1/projects")
            .header("Daybook-Min-Position", far);
        patient.send(far).await.refused(409, "position_ahead");
    }

    // A request that waits is answered as soon as the position is there.
    let waiting = server_with(|_, _| {}).await;
    let request = waiting
        .request(reqwest::Method::GET, "/api/v1/projects/late")
        .header("Daybook-Min-Position", "1");
    let (read, _) = tokio::join!(waiting.send(request), async {
        waiting
            .post("/api/v1/projects", json!({ "name": "late" }))
            .await
    });
    assert_eq!(read.status, 200, "{read:?}");
}

#[tokio::test]
async fn operators_are_told_what_is_the_case() {
    let server = server().await;
    assert_eq!(server.get("/healthz").await.ok()["status"], "ok");
    assert_eq!(server.get("/readyz").await.ok()["ready"], true);
    server
        .parts
        .not_ready("worker/build", "no builder is installed");
    let unready = server.get("/readyz").await;
    assert_eq!(unready.status, 503);
    let report = unready.json();
    let part = report["parts"]
        .as_array()
        .unwrap()
        .iter()
        .find(|p| p["name"] == "worker/build")
        .unwrap();
    assert_eq!(part["reason"], "no builder is installed");
    server.parts.ready("worker/build");
    assert_eq!(server.get("/readyz").await.status, 200);

    server.shop().await;
    server.deploy("shop.staging.api", "v1").await;
    server.get("/nowhere").await;
    let metrics = server.get("/metrics").await;
    assert!(
        metrics
            .header("content-type")
            .unwrap()
            .starts_with("text/plain")
    );
    for line in [
        "daybook_events_appended_total 6",
        "daybook_events_folded_total{outcome=\"all\"} 6",
        "daybook_log_head_position 6",
        "daybook_projection_lag_events 0",
        "daybook_deployments{state=\"requested\"} 1",
        "daybook_http_requests_total{method=\"POST\",route=\"/api/v1/deployments\",status=\"201\"} 1",
        "daybook_http_requests_total{method=\"GET\",route=\"other\",status=\"404\"} 1",
        "daybook_http_request_duration_seconds_count{method=\"POST\",route=\"/api/v1/deployments\"} 1",
        "daybook_http_streams 0",
        "daybook_queue_deployments{reason=\"capacity\"} 1",
        "daybook_queue_deployments{reason=\"freeze\"} 0",
        "daybook_queue_deployments{reason=\"other\"} 0",
        "daybook_webhooks{state=\"active\"} 0",
        "daybook_webhooks{state=\"paused\"} 0",
        "daybook_builds_running 0",
        "daybook_webhook_tries_total{outcome=\"dead_lettered\"} 0",
    ] {
        assert!(
            metrics.text.lines().any(|l| l == line),
            "{line}\n{}",
            metrics.text
        );
    }
}

#[tokio::test]
async fn measures_of_delivery_go_on_with_what_was_switched_since() {
    let server = server().await;
    server.shop().await;
    let measured = async || {
        let path = "/api/v1/dora?from=2000-01-01T00:00:00Z";
        let all = server.get(path).await.ok();
        let one = all["instances"][0].clone();
        let count = |name: &str| one[name].as_u64().unwrap_or_default();
        (count("deployments"), count("failed_changes"))
    };
    assert_eq!(measured().await, (0, 0));
    let one = server.deploy("shop.production.api", "v1").await;
    server.make_live(one).await;
    assert_eq!(measured().await, (1, 0));
    // A canary that gets all shares in the end is delivered by that.
    let body = json!({ "instance_id": "shop.production.api", "version": "v2", "switch": "manual" });
    let canary = server.post("/api/v1/deployments", body).await.ok();
    let canary: DeploymentId = canary["id"].as_str().unwrap().parse().unwrap();
    server.make_live(canary).await;
    let split = async |shares: Value| {
        let body = json!({ "instance_id": "shop.production.api", "to": shares });
        server.post("/api/v1/projects/shop/routes", body).await.ok();
    };
    let share = |id: DeploymentId, weight: u32| json!({ "deployment": id, "weight": weight });
    split(json!([share(one, 90), share(canary, 10)])).await;
    assert_eq!(measured().await, (1, 0));
    split(json!([share(canary, 100)])).await;
    assert_eq!(measured().await, (2, 0));
    let back = json!({ "instance_id": "shop.production.api", "to": one });
    server.post("/api/v1/rollback", back).await.ok();
    assert_eq!(measured().await, (2, 1));
    assert_eq!(measured().await, (2, 1));
}

#[tokio::test]
async fn marking_as_main_is_offered_as_long_as_one_address_leads_elsewhere() {
    let server = server().await;
    server.shop().await;
    let one = server.deploy("shop.production.api", "v1").await;
    server.make_live(one).await;
    let body = json!({ "instance_id": "shop.production.api", "version": "v2", "switch": "manual" });
    let other = server.post("/api/v1/deployments", body).await.ok();
    let other: DeploymentId = other["id"].as_str().unwrap().parse().unwrap();
    server.make_live(other).await;
    let offered = async || {
        let shown = server.get(&format!("/api/v1/deployments/{one}")).await.ok();
        assert_eq!(shown["main"], true);
        let operations = shown["operations"].as_array().unwrap();
        let listed = operations.contains(&json!("mark_main"));
        let mut possibilities = shown["possibilities"].as_array().unwrap().iter();
        let possible = possibilities.find(|p| p["name"] == "mark_main").unwrap();
        assert_eq!(possible["possible"], listed, "{shown}");
        listed
    };
    assert!(!offered().await);
    let share = json!({ "deployment": other, "weight": 1 });
    let body = json!({ "hostname": "api.shop.localhost", "to": [share] });
    server.post("/api/v1/projects/shop/routes", body).await.ok();
    assert!(offered().await);
    let mark = format!("/api/v1/deployments/{one}/mark-main");
    server.post(&mark, json!({})).await.ok();
    assert!(!offered().await);
}
