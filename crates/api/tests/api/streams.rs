use std::time::Duration;

use daybook_events::memory::MemoryLog;
use daybook_events::{Event, EventLog, Position};
use futures_util::{Stream, StreamExt};
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::*;

/// One server-sent event, as the specification reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    pub id: String,
    pub event: String,
    pub data: String,
}

/// Reads server-sent events; comments are given as events named `:`.
pub fn sent(response: reqwest::Response) -> impl Stream<Item = Sent> + Unpin {
    let state = (Box::pin(response.bytes_stream()), Vec::<u8>::new());
    Box::pin(futures_util::stream::unfold(
        state,
        |(mut bytes, mut buffer)| async move {
            loop {
                if let Some(end) = buffer.windows(2).position(|w| w == b"\n\n") {
                    let block = String::from_utf8(buffer.drain(..end + 2).collect()).unwrap();
                    let mut sent = Sent {
                        id: String::new(),
                        event: String::new(),
                        data: String::new(),
                    };
                    for line in block.lines() {
                        if let Some(id) = line.strip_prefix("id: ") {
                            sent.id = id.to_owned();
                        } else if let Some(event) = line.strip_prefix("event: ") {
                            sent.event = event.to_owned();
                        } else if let Some(data) = line.strip_prefix("data: ") {
                            sent.data.push_str(data);
                        } else if line.starts_with(':') {
                            sent.event = ":".to_owned();
                        }
                    }
                    if sent.event.is_empty() && sent.data.is_empty() {
                        continue;
                    }
                    return Some((sent, (bytes, buffer)));
                }
                match bytes.next().await? {
                    Ok(chunk) => buffer.extend_from_slice(&chunk),
                    Err(_) => return None,
                }
            }
        },
    ))
}

pub async fn next(stream: &mut (impl Stream<Item = Sent> + Unpin)) -> Sent {
    tokio::time::timeout(PATIENCE, stream.next())
        .await
        .expect("nothing came")
        .expect("the stream ended")
}

async fn events(server: &Server, query: &str) -> Value {
    server.get(&format!("/api/v1/events?{query}")).await.ok()
}

#[tokio::test]
async fn pages_hold_the_stored_bytes() {
    let server = server().await;
    server.shop().await;
    let page = server.get("/api/v1/events?limit=2").await;
    let json = page.json();
    assert_eq!(json["events"][0]["position"], 1);
    assert_eq!(
        json["events"][0]["event"]["type"],
        "dev.daybook.project.created.v1"
    );
    assert_eq!(json["next_after"], 2);
    assert_eq!(json["head"], 5);
    let stored = server.get("/api/v1/events/2").await;
    assert_eq!(
        stored.header("content-type"),
        Some("application/cloudevents+json")
    );
    // Byte for byte, also within the page.
    assert!(page.text.contains(&stored.text));
    Event::from_bytes(stored.text.as_bytes()).unwrap();

    let rest = events(&server, "after=2").await;
    assert_eq!(rest["events"].as_array().unwrap().len(), 3);
    assert_eq!(rest["next_after"], 5);
    let none = events(&server, "after=5").await;
    assert_eq!(none["events"], json!([]));
    assert_eq!(none["next_after"], 5);
    server
        .get("/api/v1/events/6")
        .await
        .refused(404, "event_not_found");
    server
        .get("/api/v1/events/0")
        .await
        .refused(404, "event_not_found");
}

#[tokio::test]
async fn pages_are_filtered() {
    let server = server().await;
    server.shop().await;
    server
        .post("/api/v1/projects", json!({ "name": "blog" }))
        .await
        .ok();
    let api = server.deploy("shop.production.api", "v1").await;
    server.make_live(api).await;
    let cache = server.deploy("shop.staging.cache", "7").await;
    let head = server.ledger.projections().position().0;
    let kinds = async |query: &str| -> Vec<String> {
        let page = events(&server, &format!("limit=500&{query}")).await;
        // A filter that nothing passes at the end still moves on.
        assert_eq!(page["next_after"], head, "{query}");
        let events = page["events"].as_array().unwrap().clone();
        let kind =
            |e: &Value| e["event"]["type"].as_str().unwrap()["dev.daybook.".len()..].to_owned();
        events.iter().map(kind).collect()
    };
    assert_eq!(kinds("project=blog").await, ["project.created.v1"]);
    assert_eq!(
        kinds("environment=staging").await,
        ["environment.created.v1", "deployment.requested.v1"]
    );
    assert_eq!(kinds("kind=environment").await.len(), 2);
    assert_eq!(kinds("kind=deployment.requested.v1").await.len(), 2);
    assert_eq!(
        kinds("kind=dev.daybook.deployment.succeeded.v1").await,
        ["deployment.succeeded.v1"]
    );
    assert_eq!(
        kinds("service=cache").await,
        ["project.service_defined.v1", "deployment.requested.v1"]
    );
    assert!(
        kinds("service=api")
            .await
            .contains(&"routing.switched.v1".to_owned())
    );
    assert_eq!(
        kinds(&format!("deployment={cache}")).await,
        ["deployment.requested.v1"]
    );
    let run = kinds(&format!("deployment={api}")).await;
    assert!(
        run.contains(&"routing.switched.v1".to_owned()) && run.len() > 8,
        "{run:?}"
    );
}

#[tokio::test]
async fn a_stream_resumes_without_gap_or_repeat_under_concurrent_appends() {
    const EVENTS: u64 = 300;
    let server = server().await;
    let writers = futures_util::future::join_all((0..3).map(|writer| {
        let server = &server;
        async move {
            for n in 0..EVENTS / 3 {
                let name = format!("p{writer}-{n}");
                server
                    .post("/api/v1/projects", json!({ "name": name }))
                    .await
                    .ok();
            }
        }
    }));
    let reader = async {
        let mut seen = Vec::new();
        // Breaks off every few events, and goes on with Last-Event-ID as browsers do.
        while (seen.len() as u64) < EVENTS {
            let mut request = server
                .request(Method::GET, "/api/v1/events")
                .header("Accept", "text/event-stream");
            if let Some(Sent { id, .. }) = seen.last() {
                request = request.header("Last-Event-ID", id);
            }
            let response = request.send().await.unwrap();
            assert_eq!(response.headers()["content-type"], "text/event-stream");
            let mut stream = sent(response);
            for _ in 0..37 {
                seen.push(next(&mut stream).await);
                if seen.len() as u64 == EVENTS {
                    break;
                }
            }
        }
        seen
    };
    let (_, seen) = tokio::join!(writers, reader);
    let ids: Vec<u64> = seen.iter().map(|s| s.id.parse().unwrap()).collect();
    assert_eq!(ids, (1..=EVENTS).collect::<Vec<_>>());
    for sent in [&seen[0], &seen[EVENTS as usize - 1]] {
        let stored = server.get(&format!("/api/v1/events/{}", sent.id)).await;
        assert_eq!(sent.data, stored.text);
        assert_eq!(sent.event, "dev.daybook.project.created.v1");
    }
}

#[tokio::test]
async fn a_filtered_stream_goes_on_and_says_that_it_lives() {
    let server = server_with(|settings, _| settings.heartbeat = Duration::from_millis(20)).await;
    server.shop().await;
    let request = server.request(
        Method::GET,
        "/api/v1/events?follow=true&service=api&after=2",
    );
    let mut stream = sent(request.send().await.unwrap());
    // Nothing fits yet, so only heartbeats come.
    assert_eq!(next(&mut stream).await.event, ":");
    assert_eq!(next(&mut stream).await.event, ":");
    let metrics = server.get("/metrics").await.text;
    assert!(metrics.contains("daybook_http_streams 1"));
    server.deploy("shop.staging.cache", "7").await;
    let id = server.deploy("shop.staging.api", "v1").await;
    let event = loop {
        let sent = next(&mut stream).await;
        if sent.event != ":" {
            break sent;
        }
    };
    assert_eq!(event.event, "dev.daybook.deployment.requested.v1");
    assert!(event.data.contains(&id.to_string()));
    drop(stream);
    // A client that went away is noticed.
    tokio::time::timeout(PATIENCE, async {
        while !server
            .get("/metrics")
            .await
            .text
            .contains("daybook_http_streams 0")
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_slow_subscriber_misses_nothing_and_holds_up_nobody() {
    let server = server().await;
    let request = server.request(Method::GET, "/api/v1/events?follow=true");
    let mut slow = sent(request.send().await.unwrap());
    // More than all buffers between the two hold.
    for n in 0..400 {
        let bytes = format!("{{\"n\":{n},\"text\":\"{}\"}}", "x".repeat(60_000));
        server.store(bytes).await;
    }
    let request = server.request(Method::GET, "/api/v1/events?follow=true&after=399");
    let mut quick = sent(request.send().await.unwrap());
    assert_eq!(next(&mut quick).await.id, "400");
    for position in 1..=400 {
        let sent = next(&mut slow).await;
        assert_eq!(sent.id, position.to_string());
        assert!(sent.data.starts_with(&format!("{{\"n\":{},", position - 1)));
    }
}

#[tokio::test]
async fn a_position_that_the_log_does_not_reach_is_refused() {
    let server = server().await;
    server.shop().await;
    server
        .get("/api/v1/events?after=6")
        .await
        .refused(409, "position_ahead");
    server
        .get("/api/v1/events?after=6&follow=true")
        .await
        .refused(409, "position_ahead");
    let request = server
        .request(Method::GET, "/api/v1/events")
        .header("Accept", "text/event-stream")
        .header("Last-Event-ID", "x");
    server.send(request).await.refused(400, "invalid_position");
}

#[tokio::test]
async fn what_is_no_event_is_passed_on_as_it_is() {
    let server = server().await;
    let position = server.store(&b"\xff not json"[..]).await;
    let page = events(&server, "").await;
    assert_eq!(page["events"][0]["bytes"], "/yBub3QganNvbg==");
    assert_eq!(position, Position(1));
    assert_eq!(events(&server, "service=api").await["events"], json!([]));
}

#[tokio::test]
async fn a_page_of_cdevents_does_not_wait_for_ever() {
    let log = MemoryLog::new();
    let server = server_on_memory(&log).await;
    server.shop().await;
    let page = server.get("/api/v1/cdevents").await.ok();
    let whole = page["cdevents"].as_array().unwrap().len();
    assert_eq!(whole, 2);
    // Nothing is folded any more.
    server.folding.cancel();
    let some = log.get(Position(1)).await.unwrap().unwrap();
    let projections = server.ledger.projections();
    let unfolded = loop {
        let position = log.store(some.subject.clone(), some.bytes.clone());
        let wait = Duration::from_millis(200);
        if projections.wait_for(position, wait).await.is_err() {
            break position;
        }
    };
    let after = unfolded.0 - 1;
    let refused = server.get(&format!("/api/v1/cdevents?after={after}")).await;
    refused.refused(503, "behind");
    // What is folded is there all the same.
    let page = server.get(&format!("/api/v1/cdevents?limit={whole}")).await;
    assert_eq!(page.ok()["cdevents"].as_array().unwrap().len(), whole);
}
