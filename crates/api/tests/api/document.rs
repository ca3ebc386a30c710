use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::Value;

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
