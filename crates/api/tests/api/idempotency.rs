use daybook_events::DeploymentId;
use daybook_events::memory::{Fault, MemoryLog};
use serde_json::json;

use crate::support::*;

#[tokio::test]
async fn the_same_key_and_body_is_carried_out_once() {
    let server = server().await;
    server.shop().await;
    let body = json!({ "instance_id": "shop.staging.api", "version": "v1" });
    let first = server
        .post_with_key("/api/v1/deployments", "k1", body.clone())
        .await;
    assert_eq!(first.header("idempotency-replayed"), None);
    let id: DeploymentId = first.json()["id"].as_str().unwrap().parse().unwrap();
    server.make_live(id).await;
    // Other order, other white space: the same request. And the answer is that of the first,
    // whatever has become of the deployment since.
    let text = r#"{ "version":"v1",   "instance_id":"shop.staging.api" }"#;
    let request = server
        .request(reqwest::Method::POST, "/api/v1/deployments")
        .header("Idempotency-Key", "k1")
        .header("Content-Type", "application/json")
        .body(text);
    let second = server.send(request).await;
    assert_eq!(second.status, 201);
    assert_eq!(second.header("idempotency-replayed"), Some("true"));
    assert_eq!(second.header("location"), first.header("location"));
    assert_eq!(second.text, first.text);
    let list = server.get("/api/v1/deployments").await.ok();
    assert_eq!(list["deployments"].as_array().unwrap().len(), 1);

    let other = json!({ "instance_id": "shop.staging.api", "version": "v2" });
    server
        .post_with_key("/api/v1/deployments", "k1", other.clone())
        .await
        .refused(422, "idempotency_key_reused");
    // Another actor's key is another key.
    let request = server
        .request(reqwest::Method::POST, "/api/v1/deployments")
        .header("Idempotency-Key", "k1")
        .header("Daybook-Actor", "alice")
        .json(&other);
    let third = server.send(request).await.ok();
    assert_ne!(third["id"], id.to_string());
}

#[tokio::test]
async fn every_command_is_repeatable_with_its_key() {
    let server = server().await;
    server.shop().await;
    let first = server.deploy("shop.production.api", "v1").await;
    server.make_live(first).await;
    let second = server.deploy("shop.production.api", "v2").await;
    server.make_live(second).await;
    let third = server.deploy("shop.staging.api", "v2").await;
    for (path, body) in [
        ("/api/v1/projects".to_owned(), json!({ "name": "blog" })),
        (
            "/api/v1/projects/shop/environments".to_owned(),
            json!({ "name": "edge" }),
        ),
        (
            "/api/v1/rollback".to_owned(),
            json!({ "instance_id": "shop.production.api" }),
        ),
        (
            format!("/api/v1/deployments/{second}/mark-main"),
            json!({ "reason": "fixed" }),
        ),
        (format!("/api/v1/deployments/{first}/redeploy"), json!({})),
        (format!("/api/v1/deployments/{first}/stop"), json!({})),
        (format!("/api/v1/deployments/{third}/cancel"), json!({})),
    ] {
        let done = server.post_with_key(&path, "key", body.clone()).await;
        assert!(done.status.is_success(), "{path}: {done:?}");
        let position = done.position();
        let again = server.post_with_key(&path, "key", body).await;
        assert_eq!(again.status, done.status, "{path}");
        assert_eq!(again.text, done.text, "{path}");
        assert_eq!(again.header("idempotency-replayed"), Some("true"), "{path}");
        assert_eq!(server.ledger.projections().position(), position, "{path}");
        server
            .post_with_key(
                &path,
                "key",
                json!({ "name": "zzz", "instance_id": "a.b.c" }),
            )
            .await;
    }
    // A start while it stops, with a new key, is refused and leaves the key unused.
    let start = format!("/api/v1/deployments/{first}/start");
    server
        .post_with_key(&start, "s", json!({}))
        .await
        .refused(409, "illegal_state");
    server.finish_stop(first).await;
    let started = server.post_with_key(&start, "s", json!({})).await;
    assert_eq!(started.header("idempotency-replayed"), None);
    assert_eq!(started.ok()["status"], "starting");
}

#[tokio::test]
async fn many_at_once_with_one_key_make_one_deployment() {
    let server = server().await;
    server.shop().await;
    let body = json!({ "instance_id": "shop.staging.api", "version": "v1" });
    let replies = futures_util::future::join_all(
        (0..16).map(|_| server.post_with_key("/api/v1/deployments", "k", body.clone())),
    )
    .await;
    let first = replies[0].json();
    let mut fresh = 0;
    for reply in replies {
        assert_eq!(reply.status, 201);
        assert_eq!(reply.json(), first);
        fresh += u32::from(reply.header("idempotency-replayed").is_none());
    }
    assert_eq!(fresh, 1);
    let list = server.get("/api/v1/deployments").await.ok();
    assert_eq!(list["deployments"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_lost_acknowledgement_is_found_out_about() {
    let log = MemoryLog::new();
    let server = server_on_memory(&log).await;
    server.shop().await;
    log.inject(Fault::LostAck);
    let body = json!({ "name": "blog" });
    let reply = server
        .post_with_key("/api/v1/projects", "k", body.clone())
        .await;
    assert_eq!(reply.status, 201, "{reply:?}");
    log.inject(Fault::Unavailable);
    let body = json!({ "name": "wiki" });
    let refused = server
        .post_with_key("/api/v1/projects", "w", body.clone())
        .await;
    assert_eq!(refused.header("retry-after"), Some("1"));
    let problem = refused.refused(503, "log_unavailable");
    assert_eq!(problem["retryable"], true);
    server
        .post_with_key("/api/v1/projects", "w", body)
        .await
        .ok();
}
