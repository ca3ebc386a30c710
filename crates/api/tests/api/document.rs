use std::collections::BTreeSet;
use std::io::Read as _;

use daybook_events::lines::{LineKind, LineSource};
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::*;

fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(map) => {
            if let Some(Value::String(reference)) = map.get("$ref") {
                found.push(reference);
            }
            map.values().for_each(|v| references(v, found));
        }
        Value::Array(items) => items.iter().for_each(|v| references(v, found)),
        _ => {}
    }
}

#[tokio::test]
async fn the_document_is_whole_and_is_what_is_served() {
    let document = daybook_api::openapi();
    assert_eq!(document["openapi"], "3.1.0");
    let mut found = Vec::new();
    references(&document, &mut found);
    assert!(found.len() > 100);
    for reference in found {
        let pointer = reference.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{reference}");
    }
    let mut ids = BTreeSet::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            let id = operation["operationId"].as_str().unwrap();
            assert!(ids.insert(id.to_owned()), "{id} twice");
            assert!(operation["summary"].is_string() || operation["description"].is_string());
            let responses = operation["responses"].as_object().unwrap();
            assert!(responses.contains_key("4XX"), "{method} {path}");
            assert!(responses.keys().any(|status| status.starts_with('2')));
            // Every name in the path is described.
            let described: Vec<_> = operation["parameters"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|p| p["in"] == "path")
                .map(|p| p["name"].as_str().unwrap())
                .collect();
            for name in path
                .split('{')
                .skip(1)
                .map(|p| p.split('}').next().unwrap())
            {
                assert!(described.contains(&name), "{path}: {name}");
            }
        }
    }
    // Schemas are described, none is a placeholder.
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        assert!(schema.as_object().unwrap().len() > 1, "{name} says nothing");
    }
    let server = server().await;
    assert_eq!(server.get("/openapi.json").await.ok(), document);
}

#[tokio::test]
async fn every_route_of_the_document_is_served() {
    let server = server().await;
    let document = daybook_api::openapi();
    let mut routes = 0;
    for (path, operations) in document["paths"].as_object().unwrap() {
        for method in operations.as_object().unwrap().keys() {
            routes += 1;
            let method = method.to_uppercase().parse().unwrap();
            let path = path.replace(['{', '}'], "");
            let reply = server.send(server.request(method, &path)).await;
            let code = reply.status.as_u16();
            assert!(code != 405 && code < 500, "{path}: {reply:?}");
            assert!(!reply.text.contains("no_such_address"), "{path}");
        }
    }
    assert!(routes > 80, "{routes}");
}

#[tokio::test]
async fn the_page_is_served_for_browsers_that_may_load_nothing_from_elsewhere() {
    let server = server().await;
    let page = server.get("/").await;
    assert_eq!(page.status.as_u16(), 200);
    let header = |name: &str| page.header(name).unwrap_or_default().to_owned();
    assert!(header("content-security-policy").starts_with("default-src 'none'"));
    assert!(header("content-type").starts_with("text/html"));
    assert_eq!(header("x-content-type-options"), "nosniff");
    let known = server.request(Method::GET, "/");
    let known = server.send(known.header("if-none-match", header("etag")));
    let known = known.await;
    assert_eq!((known.status.as_u16(), known.text.as_str()), (304, ""));
    let script = server.get("/page/main.js").await;
    assert!(
        script
            .header("content-type")
            .unwrap()
            .starts_with("text/javascript")
    );
    server
        .get("/page/nothing.js")
        .await
        .refused(404, "no_such_address");
}

/// What an address answers to whoever takes codings: the head, and the bytes as they were sent.
async fn coded(
    server: &Server,
    path: &str,
    codings: &str,
) -> (reqwest::header::HeaderMap, Vec<u8>) {
    let request = server.request(Method::GET, path);
    let response = request
        .header("Accept-Encoding", codings)
        .send()
        .await
        .unwrap();
    assert_eq!(response.status().as_u16(), 200, "{path}");
    let headers = response.headers().clone();
    (headers, response.bytes().await.unwrap().to_vec())
}

fn unpacked(bytes: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    let mut decoder = flate2::read::GzDecoder::new(bytes);
    decoder.read_to_end(&mut all).unwrap();
    all
}

#[tokio::test]
async fn documents_and_the_page_are_sent_in_gzip_to_those_who_take_it() {
    let server = server().await;
    server.shop().await;
    let id = server.deploy("shop.production.api", "v1").await;
    server.make_live(id).await;
    for path in [
        "/",
        "/page/main.js",
        "/openapi.json",
        "/asyncapi.json",
        "/api/v1/audit?limit=50",
        "/api/v1/events?limit=20",
        "/api/v1/state?project=shop",
    ] {
        let (plain_head, plain) = coded(&server, path, "identity").await;
        let (head, sent) = coded(&server, path, "gzip, deflate, br").await;
        assert_eq!(plain_head.get("content-encoding"), None, "{path}");
        assert_eq!(head["content-encoding"], "gzip", "{path}");
        assert_eq!(head["content-length"], sent.len().to_string(), "{path}");
        assert!(sent.len() < plain.len(), "{path}");
        assert_eq!(unpacked(&sent), plain, "{path}");
        for head in [&head, &plain_head] {
            assert_eq!(head["vary"], "accept-encoding", "{path}");
        }
        // A strong tag stands for the bytes that were sent with it.
        if let Some(tag) = head.get("etag") {
            assert_ne!(Some(tag), plain_head.get("etag"), "{path}");
            let request = server
                .request(Method::GET, path)
                .header("if-none-match", tag);
            let known = server.send(request.header("accept-encoding", "gzip")).await;
            assert_eq!(known.status.as_u16(), 304, "{path}");
        }
    }
}

#[tokio::test]
async fn what_has_a_form_of_its_own_a_tag_or_output_is_not_compressed() {
    let server = server().await;
    server.shop().await;
    let id = server.deploy("shop.production.api", "v1").await;
    let text = "a".repeat(3000);
    let own = LineSource::Deployment(id);
    server.print(own, LineKind::Status, 0, &text).await;
    for path in [
        format!("/api/v1/deployments/{id}/logs"),
        "/api/v1/projects/shop/logs".to_owned(),
        "/metrics".to_owned(),
        "/api/v1/events/1".to_owned(),
        "/api/v1/projects".to_owned(),
    ] {
        let (head, sent) = coded(&server, &path, "gzip").await;
        assert_eq!(head.get("content-encoding"), None, "{path}");
        assert!(std::str::from_utf8(&sent).is_ok(), "{path}");
    }
    // The answer to a command may have a secret beside what the caller chose, and what changes depend on
    // has a strong tag, which stands for the bytes as they are.
    let url = format!("https://receiver.example/{}", "a".repeat(900));
    let body = json!({ "project": "shop", "url": url });
    let request = server.request(Method::POST, "/api/v1/webhooks").json(&body);
    let made = server.send(request.header("accept-encoding", "gzip")).await;
    assert_eq!(made.header("content-encoding"), None);
    assert!(made.text.len() > 1024, "{made:?}");
    let webhook = made.ok()["webhook"]["id"].as_str().unwrap().to_owned();
    let path = format!("/api/v1/webhooks/{webhook}");
    let (head, sent) = coded(&server, &path, "gzip").await;
    assert!(sent.len() > 1024);
    assert!(head.contains_key("etag"));
    assert_eq!(head.get("content-encoding"), None);
}
