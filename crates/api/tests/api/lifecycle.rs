use daybook_events::deployment::{
    ClusterFailed, DeploymentEvent, Failed, ImagePulled, OpenapiFound, Problem, Status,
};
use serde_json::json;

use crate::support::*;

#[tokio::test]
async fn a_deployment_in_the_shapes_of_the_seed() {
    let server = server().await;
    server.shop().await;
    let accepted = server
        .post(
            "/api/v1/deployments",
            json!({
                "instance_id": "shop.production.api",
                "version": "v1.2.4",
                "cluster_ids": ["east", "west"]
            }),
        )
        .await;
    assert_eq!(accepted.status, 201);
    let body = accepted.json();
    assert_eq!(body["status"], "queued");
    let id = body["id"].as_str().unwrap().to_owned();
    let path = format!("/api/v1/deployments/{id}");
    assert_eq!(accepted.header("location"), Some(path.as_str()));

    server.make_live(id.parse().unwrap()).await;
    let list = server
        .get("/api/v1/deployments?instance_id=shop.production.api")
        .await
        .ok();
    let entry = &list["deployments"][0];
    assert_eq!(entry["id"], id.as_str());
    assert_eq!(entry["instance_id"], "shop.production.api");
    assert_eq!(entry["version"], "v1.2.4");
    assert_eq!(entry["status"], "started");
    assert_eq!(entry["main"], true);
    assert_eq!(entry["clusters"], json!(["east", "west"]));
    assert_eq!(entry["url"], "http://api.shop.localhost:7080");
    assert!(entry["created_at"].is_string());

    let second = server.deploy("shop.production.api", "v1.2.5").await;
    server.make_live(second).await;
    let marked = server
        .post(&format!("{path}/mark-main"), json!({}))
        .await
        .ok();
    assert_eq!(marked["main"], true);
    assert_eq!(marked["previous_main"], second.to_string());
    let stopped = server
        .post(&format!("/api/v1/deployments/{second}/stop"), json!({}))
        .await;
    assert_eq!(stopped.status, 200);
    assert_eq!(stopped.json()["status"], "stopping");
}

#[tokio::test]
async fn what_keeps_it_from_being_ready_is_shown_with_what_it_comes_of_and_what_helps() {
    let server = server().await;
    server.shop().await;
    let id = server.deploy("shop.production.api", "v1.2.4").await;
    server.make_live_to_building(id).await;
    let problem = Problem {
        reason: "OOMKilled".to_owned(),
        message: "it used more memory than it may".to_owned(),
        remedy: "Raise the limit.".to_owned(),
        transient: true,
        likely_causes: vec!["The limit is too low.".to_owned(), "It leaks.".to_owned()],
        remedies: vec!["Raise the limit.".to_owned(), "Mend the leak.".to_owned()],
    };
    server.make_stuck(id, problem.clone()).await;
    let shown = server.get(&format!("/api/v1/deployments/{id}")).await.ok();
    let seen = &shown["cluster_status"][0]["problem"];
    assert_eq!(seen["code"], "OOMKilled", "{shown}");
    assert_eq!(seen["remedy"], json!(problem.remedy));
    assert_eq!(seen["likely_causes"], json!(problem.likely_causes));
    assert_eq!(seen["remedies"], json!(problem.remedies));
    let state = server
        .get("/api/v1/state?project=shop")
        .await
        .ok()
        .to_string();
    assert!(state.contains("Mend the leak."), "{state}");

    let query = format!(
        "{{ deployStatus(id: \"{id}\") {{ clusters {{ problem remedy likelyCauses remedies }} }} }}"
    );
    let asked = server.post("/graphql", json!({ "query": query })).await;
    let answer = asked.json();
    assert_eq!(
        answer["data"]["deployStatus"]["clusters"][0],
        json!({
            "problem": "OOMKilled: it used more memory than it may",
            "remedy": problem.remedy,
            "likelyCauses": problem.likely_causes,
            "remedies": problem.remedies,
        }),
        "{answer}"
    );

    // Given up for something else: that is the reason, and not what is still seen.
    let failed = ClusterFailed {
        cluster: "east".parse().unwrap(),
        code: "cluster_unavailable".to_owned(),
        message: "it does not answer".to_owned(),
        remedy: "Look at its API server.".to_owned(),
    };
    server
        .happens(id, DeploymentEvent::ClusterFailed(failed.clone()))
        .await;
    let shown = server.get(&format!("/api/v1/deployments/{id}")).await.ok();
    let seen = &shown["cluster_status"][0]["problem"];
    assert_eq!(seen["code"], json!(failed.code), "{shown}");
    assert_eq!(seen["likely_causes"], json!(null), "{shown}");
    let asked = server.post("/graphql", json!({ "query": query })).await;
    let answer = asked.json();
    assert_eq!(
        answer["data"]["deployStatus"]["clusters"][0],
        json!({
            "problem": "cluster_unavailable: it does not answer",
            "remedy": failed.remedy,
            "likelyCauses": [],
            "remedies": [],
        }),
        "{answer}"
    );
}

#[tokio::test]
async fn everything_that_is_known_is_shown() {
    let server = server().await;
    server.shop().await;
    let accepted = server
        .post(
            "/api/v1/deployments",
            json!({
                "project": "shop", "environment": "production", "service": "api",
                "git_ref": "release", "switch": "manual", "reason": "Tuesday",
                "run": { "env": { "EXTRA": "1" }, "replicas": 1 }
            }),
        )
        .await
        .ok();
    let id = accepted["id"].as_str().unwrap();
    let deployment = id.parse().unwrap();
    server.make_live(deployment).await;
    for (cluster, took_ms) in [("east", 300), ("west", 1250)] {
        let pulled = ImagePulled {
            cluster: cluster.parse().unwrap(),
            took_ms,
        };
        let pulled = DeploymentEvent::ImagePulled(pulled);
        server.happens(deployment, pulled).await;
    }
    let described = DeploymentEvent::OpenapiFound(OpenapiFound {
        path: "/openapi.json".into(),
        digest: DIGEST.parse().unwrap(),
        title: Some("Shop".into()),
        version: None,
    });
    server.happens(deployment, described).await;
    let shown = server.get(&format!("/api/v1/deployments/{id}")).await.ok();
    assert_eq!(shown["state"], "started");
    assert_eq!(shown["phase"], "SUCCEEDED");
    for answer in ["build", "workload"] {
        assert_eq!(shown["readiness"][answer]["state"], "ready", "{answer}");
    }
    assert_eq!(shown["readiness"]["endpoint"]["state"], "pending");
    assert_eq!(shown["cluster_status"][1]["cluster"], "west");
    assert_eq!(shown["cluster_status"][1]["ready"], true);
    assert_eq!(shown["cluster_status"][0]["instances"][0]["name"], "east-0");
    for duration in [
        "queue_ms",
        "clone_ms",
        "build_ms",
        "sync_ms",
        "startup_ms",
        "total_ms",
    ] {
        assert!(shown["durations"][duration].is_i64(), "{duration}");
    }
    // Nobody has said that it was pushed, or that it answers.
    for duration in ["push_ms", "endpoint_ms"] {
        assert!(shown["durations"][duration].is_null(), "{duration}");
    }
    assert_eq!(shown["durations"]["image_pull_ms"], 1250);
    assert_eq!(shown["openapi"]["title"], "Shop");
    assert_eq!(shown["snapshot"]["image"]["digest"], DIGEST);
    assert_eq!(shown["source"]["commit"], COMMIT);
    assert_eq!(shown["source"]["message"], "Faster carts\n");
    assert_eq!(shown["image"]["digest"], DIGEST);
    assert_eq!(shown["commit"], COMMIT);
    assert_eq!(shown["reason"], "Tuesday");
    assert_eq!(shown["switch"], "manual");
    // The definition of the service, and what this deployment adds to it.
    let run = &shown["snapshot"]["run"];
    assert_eq!(run["port"], 3000);
    assert_eq!(run["env"], json!({ "EXTRA": "1", "MODE": "live" }));
    let hostnames: Vec<_> = shown["hostnames"]
        .as_array()
        .unwrap()
        .iter()
        .map(|h| h["stickiness"].as_str().unwrap())
        .collect();
    assert_eq!(hostnames, ["live", "environment", "deployment"]);
    let operations = shown["operations"].as_array().unwrap();
    assert!(operations.contains(&json!("stop")) && !operations.contains(&json!("start")));
}

#[tokio::test]
async fn an_image_is_named_in_every_way_that_fits_the_service() {
    let server = server().await;
    server.shop().await;
    let digest = format!("sha256:{}", "a".repeat(64));
    for (instance, field, text, reference) in [
        (
            "shop.staging.cache",
            "version",
            "7.2",
            "registry.example/cache:7.2".to_owned(),
        ),
        (
            "shop.staging.cache",
            "image",
            "7.2",
            "registry.example/cache:7.2".to_owned(),
        ),
        (
            "shop.staging.cache",
            "version",
            &digest,
            format!("registry.example/cache@{digest}"),
        ),
        (
            "shop.staging.api",
            "image",
            "a1b2c3d",
            "registry.local:5000/daybook/shop/api:a1b2c3d".to_owned(),
        ),
        (
            "shop.staging.api",
            "version",
            &digest,
            format!("registry.local:5000/daybook/shop/api@{digest}"),
        ),
        (
            "shop.staging.api",
            "version",
            "other.example/x:1",
            "other.example/x:1".to_owned(),
        ),
    ] {
        let body = json!({ "instance_id": instance, field: text });
        let id = server.post("/api/v1/deployments", body).await.ok()["id"].clone();
        let path = format!("/api/v1/deployments/{}", id.as_str().unwrap());
        let shown = server.get(&path).await.ok();
        assert_eq!(
            shown["snapshot"]["version"]["image"]["reference"],
            reference.as_str()
        );
    }
    // Without a version, a service with a source takes its default ref.
    let body = json!({ "instance_id": "shop.staging.api" });
    let id = server.post("/api/v1/deployments", body).await.ok()["id"].clone();
    let path = format!("/api/v1/deployments/{}", id.as_str().unwrap());
    assert_eq!(server.get(&path).await.ok()["version"], "main");
}

#[tokio::test]
async fn a_deployment_that_cannot_be_is_refused() {
    let server = server().await;
    server.shop().await;
    let empty = json!({ "name": "empty" });
    server
        .post("/api/v1/projects/shop/environments", empty)
        .await
        .ok();
    // One that is made without clusters has all that the server knows.
    let path = "/api/v1/projects/shop/environments/empty";
    let made = server.get(path).await.ok();
    assert_eq!(made["clusters"], json!(["east", "west"]));
    server.put(path, json!({ "clusters": [] })).await.ok();
    let before = server.get("/api/v1/projects").await.position();
    let api = "shop.staging.api";
    for (body, status, code) in [
        (
            json!({ "instance_id": "none.staging.api" }),
            404,
            "project_not_found",
        ),
        (
            json!({ "instance_id": "shop.none.api" }),
            404,
            "environment_not_found",
        ),
        (
            json!({ "instance_id": "shop.staging.none" }),
            404,
            "service_not_found",
        ),
        (
            json!({ "instance_id": "shop.staging" }),
            422,
            "invalid_instance_id",
        ),
        (
            json!({ "instance_id": "Shop.staging.api" }),
            422,
            "invalid_project_name",
        ),
        (json!({ "project": "shop" }), 422, "instance_required"),
        (
            json!({ "instance_id": api, "project": "shop" }),
            422,
            "instance_required",
        ),
        (
            json!({ "instance_id": api, "cluster_ids": ["mars"] }),
            422,
            "unknown_cluster",
        ),
        (
            json!({ "instance_id": api, "clusters": ["east", "east"] }),
            422,
            "duplicate_cluster",
        ),
        (
            json!({ "instance_id": api, "clusters": [] }),
            422,
            "no_clusters",
        ),
        (
            json!({ "instance_id": api, "clusters": ["East"] }),
            422,
            "invalid_cluster_name",
        ),
        (
            json!({ "instance_id": "shop.empty.api" }),
            422,
            "no_clusters",
        ),
        (
            json!({ "instance_id": api, "git_ref": "--upload-pack=x" }),
            422,
            "invalid_git_ref",
        ),
        (
            json!({ "instance_id": api, "version": "a..b" }),
            422,
            "invalid_git_ref",
        ),
        (
            json!({ "instance_id": api, "image": "UPPER/x:1" }),
            422,
            "invalid_image_repository",
        ),
        (
            json!({ "instance_id": api, "image": "x/y" }),
            422,
            "invalid_image_reference",
        ),
        (
            json!({ "instance_id": api, "git_ref": "a", "image": "b" }),
            422,
            "version_ambiguous",
        ),
        (
            json!({ "instance_id": "shop.staging.cache" }),
            422,
            "version_required",
        ),
        (
            json!({ "instance_id": "shop.staging.cache", "git_ref": "main" }),
            422,
            "no_source",
        ),
        (
            json!({ "instance_id": api, "run": { "replicas": 1000 } }),
            422,
            "invalid_replicas",
        ),
        (
            json!({ "instance_id": api, "reason": "" }),
            422,
            "invalid_text",
        ),
        (
            json!({ "instance_id": api, "reason": "\u{1b}[2J" }),
            422,
            "invalid_text",
        ),
        (
            json!({ "instance_id": api, "verison": "v1" }),
            422,
            "invalid_body",
        ),
    ] {
        let reply = server.post("/api/v1/deployments", body.clone()).await;
        assert_eq!(reply.json()["code"], code, "{body}");
        reply.refused(status, code);
    }
    assert_eq!(server.get("/api/v1/projects").await.position(), before);
}

#[tokio::test]
async fn operations_are_possible_in_their_states_only() {
    let server = server().await;
    server.shop().await;
    let id = server.deploy("shop.staging.api", "main").await;
    let path = format!("/api/v1/deployments/{id}");
    let operate = async |operation: &str| {
        let request = server.request(reqwest::Method::POST, &format!("{path}/{operation}"));
        server.send(request).await
    };
    let delete = async || {
        server
            .send(server.request(reqwest::Method::DELETE, &path))
            .await
    };

    let refused = operate("stop").await.refused(409, "illegal_state");
    assert!(refused["remedy"].as_str().unwrap().contains("started"));
    operate("start").await.refused(409, "illegal_state");
    operate("terminate").await.refused(409, "illegal_state");
    delete().await.refused(409, "illegal_state");
    operate("mark-main")
        .await
        .refused(409, "target_not_running");

    server.make_live(id).await;
    operate("cancel").await.refused(409, "illegal_state");
    assert_eq!(operate("stop").await.ok()["status"], "stopping");
    // What is under way already is accepted again.
    assert_eq!(operate("stop").await.ok()["status"], "stopping");
    server.finish_stop(id).await;
    operate("mark-main")
        .await
        .refused(409, "target_not_running");
    assert_eq!(operate("terminate").await.ok()["status"], "terminating");
    server.finish_terminate(id).await;
    operate("start").await.refused(409, "illegal_state");
    assert_eq!(delete().await.ok()["status"], "deleted");
    let shown = server.get(&path).await.ok();
    assert_eq!(shown["state"], "deleted");
    for (query, found) in [("", 0), ("?status=terminated", 0), ("?status=deleted", 1)] {
        let path = format!("/api/v1/deployments{query}");
        let list = server.get(&path).await.ok();
        assert_eq!(
            list["deployments"].as_array().unwrap().len(),
            found,
            "{query}"
        );
    }

    let other = server.deploy("shop.staging.api", "main").await;
    let cancelled = server
        .post(
            &format!("/api/v1/deployments/{other}/cancel"),
            json!({ "reason": "wrong branch" }),
        )
        .await
        .ok();
    assert_eq!(cancelled["status"], "cancelling");
    let shown = server
        .get(&format!("/api/v1/deployments/{other}"))
        .await
        .ok();
    assert_eq!(shown["cancel_requested"], true);

    let nobody = "/api/v1/deployments/0190c0de-0000-7000-8000-000000000000";
    server
        .get(nobody)
        .await
        .refused(404, "deployment_not_found");
    for operation in [
        "stop",
        "start",
        "terminate",
        "cancel",
        "mark-main",
        "redeploy",
    ] {
        server
            .post(&format!("{nobody}/{operation}"), json!({}))
            .await
            .refused(404, "deployment_not_found");
    }
}

#[tokio::test]
async fn a_failure_is_shown_with_its_remedy() {
    let server = server().await;
    server.shop().await;
    let id = server.deploy("shop.staging.api", "nowhere").await;
    let failed = Failed {
        during: Status::Cloning,
        code: "ref_not_found".into(),
        message: "the repository has no ref nowhere".into(),
        remedy: "push it, or name another".into(),
    };
    server.happens(id, DeploymentEvent::Failed(failed)).await;
    let shown = server.get(&format!("/api/v1/deployments/{id}")).await.ok();
    assert_eq!(shown["status"], "start_error");
    assert_eq!(shown["phase"], "FAILED");
    assert_eq!(shown["failure"]["code"], "ref_not_found");
    assert_eq!(shown["failure"]["remedy"], "push it, or name another");
    assert_eq!(shown["readiness"]["build"]["state"], "failed");
    server
        .post(&format!("/api/v1/deployments/{id}/redeploy"), json!({}))
        .await
        .refused(422, "nothing_to_redeploy");
}

#[tokio::test]
async fn rollback_goes_to_the_main_one_before_if_it_still_runs() {
    let server = server().await;
    server.shop().await;
    let instance = json!({ "instance_id": "shop.production.api", "reason": "errors" });
    server
        .post("/api/v1/rollback", instance.clone())
        .await
        .refused(409, "nothing_to_roll_back");
    let first = server.deploy("shop.production.api", "v1").await;
    server.make_live(first).await;
    server
        .post("/api/v1/rollback", instance.clone())
        .await
        .refused(409, "nothing_to_roll_back");
    let second = server.deploy("shop.production.api", "v2").await;
    server.make_live(second).await;

    let back = server.post("/api/v1/rollback", instance.clone()).await.ok();
    assert_eq!(back["id"], first.to_string());
    assert_eq!(back["previous_main"], second.to_string());
    let shown = server
        .get("/api/v1/instances/shop.production.api")
        .await
        .ok();
    assert_eq!(shown["main"], first.to_string());
    assert_eq!(shown["rolled_back"], true);

    // A deployment that becomes ready now does not take over.
    let third = server.deploy("shop.production.api", "v3").await;
    server.make_live(third).await;
    let shown = server
        .get("/api/v1/instances/shop.production.api")
        .await
        .ok();
    assert_eq!(shown["main"], first.to_string());

    let elsewhere = server.deploy("shop.staging.api", "v1").await;
    server.make_live(elsewhere).await;
    let to = |id: &str| json!({ "instance_id": "shop.production.api", "to": id });
    server
        .post("/api/v1/rollback", to(&elsewhere.to_string()))
        .await
        .refused(422, "other_instance");
    server
        .post("/api/v1/rollback", to(&first.to_string()))
        .await
        .refused(409, "already_main");
    server
        .post("/api/v1/rollback", to("x"))
        .await
        .refused(422, "invalid_deployment_id");

    let stop = format!("/api/v1/deployments/{second}/stop");
    server.post(&stop, json!({})).await.ok();
    server.finish_stop(second).await;
    let refused = server
        .post("/api/v1/rollback", to(&second.to_string()))
        .await
        .refused(409, "target_not_running");
    let remedy = refused["remedy"].as_str().unwrap();
    assert!(
        remedy.contains("start") && remedy.contains("redeploy"),
        "{remedy}"
    );

    let marked = server
        .post(
            &format!("/api/v1/deployments/{third}/mark-main"),
            json!({ "expected_main": second.to_string() }),
        )
        .await;
    marked.refused(409, "main_changed");
    let marked = server
        .post(
            &format!("/api/v1/deployments/{third}/mark-main"),
            json!({ "expected_main": first.to_string() }),
        )
        .await
        .ok();
    assert_eq!(marked["previous_main"], first.to_string());
    let shown = server
        .get("/api/v1/instances/shop.production.api")
        .await
        .ok();
    assert_eq!(shown["rolled_back"], false);
}

#[tokio::test]
async fn redeploying_repeats_the_snapshot_and_not_the_name() {
    let server = server().await;
    server.shop().await;
    let id = server.deploy("shop.staging.api", "main").await;
    server.make_live(id).await;
    // The service changes, and the branch may move; the snapshot does not.
    let spec = json!({ "source": { "url": "https://git.example/new.git" }, "run": { "port": 1 } });
    server
        .put("/api/v1/projects/shop/services/api", spec)
        .await
        .ok();
    let again = server
        .post(
            &format!("/api/v1/deployments/{id}/redeploy"),
            json!({ "reason": "back" }),
        )
        .await;
    assert_eq!(again.status, 201);
    let again = again.json()["id"].as_str().unwrap().to_owned();
    let shown = server
        .get(&format!("/api/v1/deployments/{again}"))
        .await
        .ok();
    assert_eq!(shown["redeploy_of"], id.to_string());
    assert_eq!(shown["snapshot"]["run"]["port"], 3000);
    assert_eq!(shown["reason"], "back");
    let reference = shown["snapshot"]["version"]["image"]["reference"]
        .as_str()
        .unwrap();
    assert!(reference.ends_with(DIGEST), "{reference}");
}
