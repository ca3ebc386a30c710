use serde_json::json;

use crate::support::*;

#[tokio::test]
async fn projects_services_and_environments_are_made_and_listed() {
    let server = server().await;
    let created = server
        .post(
            "/api/v1/projects",
            json!({ "name": "shop", "description": "Sells" }),
        )
        .await;
    assert_eq!(created.status, 201);
    assert_eq!(created.header("location"), Some("/api/v1/projects/shop"));
    assert_eq!(created.json()["description"], "Sells");
    assert_eq!(created.position().0, 1);

    server
        .post("/api/v1/projects", json!({ "name": "blog" }))
        .await
        .ok();
    let list = server.get("/api/v1/projects").await.ok();
    assert_eq!(list["projects"][0]["name"], "blog");
    assert_eq!(list["projects"][1]["name"], "shop");

    let spec = json!({ "source": { "url": "https://git.example/shop.git", "path": "api" } });
    let defined = server
        .put("/api/v1/projects/shop/services/api", spec.clone())
        .await;
    let position = defined.position();
    assert_eq!(defined.ok()["source"]["default_ref"], "HEAD");
    // The same definition again is no event.
    let again = server.put("/api/v1/projects/shop/services/api", spec).await;
    assert_eq!(again.position(), position);
    let service = server.get("/api/v1/projects/shop/services/api").await.ok();
    assert_eq!(service["name"], "api");
    let services = server.get("/api/v1/projects/shop/services").await.ok();
    assert_eq!(services["services"].as_array().unwrap().len(), 1);

    let environments = "/api/v1/projects/shop/environments";
    let made = server
        .post(
            environments,
            json!({ "name": "production", "clusters": ["east"] }),
        )
        .await;
    assert_eq!(made.status, 201);
    assert_eq!(
        made.header("location"),
        Some("/api/v1/projects/shop/environments/production")
    );
    let production = format!("{environments}/production");
    let changed = server
        .put(&production, json!({ "clusters": ["west"], "live": true }))
        .await
        .ok();
    assert_eq!(changed["live"], true);
    let shown = server.get(&production).await.ok();
    assert_eq!(shown["clusters"], json!(["west"]));
    assert_eq!(shown["created_at"], changed["created_at"]);
    let all = server.get(environments).await.ok();
    assert_eq!(all["environments"][0]["name"], "production");

    let instances = server.get("/api/v1/instances?project=shop").await.ok();
    assert_eq!(
        instances["instances"][0]["instance_id"],
        "shop.production.api"
    );
    let instance = server
        .get("/api/v1/instances/shop.production.api")
        .await
        .ok();
    assert_eq!(instance["main"], json!(null));
}

#[tokio::test]
async fn what_exists_or_is_missing_is_refused_with_a_way_out() {
    let server = server().await;
    server.shop().await;
    let before = server.get("/api/v1/projects").await.position();
    server
        .post("/api/v1/projects", json!({ "name": "shop" }))
        .await
        .refused(409, "project_exists");
    server
        .post(
            "/api/v1/projects/shop/environments",
            json!({ "name": "staging" }),
        )
        .await
        .refused(409, "environment_exists");
    let problem = server
        .get("/api/v1/projects/none")
        .await
        .refused(404, "project_not_found");
    assert!(
        problem["remedy"]
            .as_str()
            .unwrap()
            .contains("project create none")
    );
    for path in ["services", "environments"] {
        server
            .get(&format!("/api/v1/projects/none/{path}"))
            .await
            .refused(404, "project_not_found");
    }
    server
        .put("/api/v1/projects/none/services/api", json!({}))
        .await
        .refused(404, "project_not_found");
    server
        .get("/api/v1/projects/shop/services/none")
        .await
        .refused(404, "service_not_found");
    server
        .put("/api/v1/projects/shop/environments/none", json!({}))
        .await
        .refused(404, "environment_not_found");
    server
        .patch("/api/v1/projects/shop/environments/none", json!({}))
        .await
        .refused(404, "environment_not_found");
    server
        .get("/api/v1/instances/shop.none.api")
        .await
        .refused(404, "environment_not_found");
    server
        .post(
            "/api/v1/projects/shop/environments",
            json!({ "name": "edge", "clusters": ["mars"] }),
        )
        .await
        .refused(422, "unknown_cluster");
    for (name, spec, code) in [
        (
            "api",
            json!({ "run": { "replicas": 0 } }),
            "invalid_replicas",
        ),
        ("api", json!({ "run": { "port": 0 } }), "invalid_port"),
        (
            "api",
            json!({ "run": { "health": { "path": "x" } } }),
            "invalid_health_path",
        ),
        (
            "api",
            json!({ "run": { "health": { "deadline_seconds": 0 } } }),
            "invalid_health_deadline",
        ),
        (
            "api",
            json!({ "run": { "command": [""] } }),
            "invalid_command",
        ),
        (
            "api",
            json!({ "run": { "env": { "A": "\u{0}" } } }),
            "invalid_env_value",
        ),
        (
            "api",
            json!({ "run": { "env": { "1": "" } } }),
            "invalid_body",
        ),
        (
            "api",
            json!({ "source": { "url": "/r", "path": "../.." } }),
            "invalid_source_path",
        ),
        ("Api", json!({}), "invalid_service_name"),
    ] {
        server
            .put(&format!("/api/v1/projects/shop/services/{name}"), spec)
            .await
            .refused(422, code);
    }
    // Nothing of all that left a trace.
    assert_eq!(server.get("/api/v1/projects").await.position(), before);
}

/// Two that change different things of an environment at once undo nothing of each other.
#[tokio::test]
async fn a_patch_changes_what_it_names_and_nothing_else() {
    let server = server().await;
    server.shop().await;
    let path = "/api/v1/projects/shop/environments/production";
    let before = server.get(path).await.ok();
    let rule = json!({ "required": 2, "approvers": ["ada", "bob"], "expires": "1h" });
    let changed = server.patch(path, json!({ "approval": rule })).await.ok();
    assert_eq!(changed["approval"]["required"], 2);
    assert_eq!(changed["clusters"], before["clusters"]);
    assert_eq!(changed["live"], before["live"]);
    let patches = [
        json!({ "approval": { "required": 1 } }),
        json!({ "keep_old": "1h" }),
        json!({ "switch": "manual" }),
    ];
    let [one, two, three] = patches.map(|patch| server.patch(path, patch));
    let (one, two, three) = tokio::join!(one, two, three);
    for done in [one, two, three] {
        done.ok();
    }
    let after = server.get(path).await.ok();
    assert_eq!(after["approval"]["required"], 1);
    assert_eq!(after["approval"]["approvers"], json!(["ada", "bob"]));
    assert_eq!(after["keep_old"], "1h");
    assert_eq!(after["switch"], "manual");
    assert_eq!(after["clusters"], before["clusters"]);
    let without = server.patch(path, json!({ "approval": null })).await.ok();
    assert!(without["approval"].is_null(), "{without:#}");

    for (patch, code) in [
        (
            json!({ "aproval": null, "wrong": 1 }),
            "invalid_environment",
        ),
        (json!({ "live": "perhaps" }), "invalid_environment"),
        (json!({ "clusters": ["mars"] }), "unknown_cluster"),
    ] {
        server.patch(path, patch).await.refused(422, code);
    }
}
