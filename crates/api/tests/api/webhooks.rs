//! Webhooks, and the log of their deliveries.

use std::sync::atomic::Ordering;

use daybook_events::lines::{LineKind, LineSource, NewLine};
use daybook_events::subscription::delivery::{Entry, Outcome, Try, retrying};
use daybook_events::{EventId, Position, SubscriptionId};
use futures_util::StreamExt;
use jiff::Timestamp;
use reqwest::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::streams::{next, sent};
use crate::support::*;

/// A webhook of `shop`, and its id.
async fn webhook(server: &Server, name: &str) -> SubscriptionId {
    let url = format!("https://receiver.example/{name}");
    let body = json!({ "project": "shop", "url": url });
    let made = server.post("/api/v1/webhooks", body).await.ok();
    made["webhook"]["id"].as_str().unwrap().parse().unwrap()
}

fn entry(position: u64, outcome: Outcome, mark: u64, since: u64) -> Entry {
    Entry {
        attempt: Some(Try {
            position: Position(position),
            due_by: Position(position),
            event: EventId(Uuid::from_u128(position.into())),
            kind: "environment.created.v1".to_owned(),
            deployment: None,
            number: 1,
            outcome,
            status: None,
            code: Some("timeout".to_owned()),
            message: None,
            millis: 1,
            next_at: None,
        }),
        mark: Position(mark),
        since,
    }
}

/// Appends texts to the delivery log.
async fn recorded(server: &Server, id: SubscriptionId, texts: Vec<String>) {
    let lines = texts.into_iter().map(|text| NewLine {
        time: Timestamp::from_second(1_700_000_000).unwrap(),
        kind: LineKind::Status,
        cluster: None,
        instance: None,
        text,
    });
    let source = LineSource::Subscription(id);
    server.lines.append(source, lines.collect()).await.unwrap();
}

/// Deliveries that all went well, of the events after a position.
fn well(after: u64, count: u64) -> Vec<Entry> {
    (after + 1..=after + count)
        .map(|at| entry(at, Outcome::Delivered, at, 0))
        .collect()
}

/// Deliveries of which the first failed, and stays open.
fn stuck(after: u64, count: u64, line: u64) -> Vec<Entry> {
    let mut all = vec![entry(after + 1, Outcome::Failed, after, 0)];
    let rest = after + 2..=after + count;
    all.extend(rest.map(|at| entry(at, Outcome::Delivered, after, line)));
    all
}

#[tokio::test]
async fn what_is_tried_again_is_found_without_reading_what_is_dealt_with() {
    let server = server().await;
    server.shop().await;
    let masked = || "***".to_owned();
    let text = |entries: Vec<Entry>| -> Vec<String> {
        let written = entries.iter().map(|e| e.to_text().unwrap());
        written.collect()
    };
    // Each with its delivery log, and how often at most it is read.
    let logs: Vec<(&str, Vec<String>, usize)> = vec![
        ("empty", Vec::new(), 0),
        ("well", text(well(0, 2_500)), 1),
        ("well-too", text(well(0, 700)), 1),
        ("short", text([well(0, 3), stuck(3, 2, 4)].concat()), 1),
        (
            "near",
            text([well(0, 900), stuck(900, 30, 901)].concat()),
            1,
        ),
        (
            "far",
            text([well(0, 400), stuck(400, 1_500, 401)].concat()),
            8,
        ),
        ("too-far", text(stuck(0, 2_400, 1)), 9),
        (
            "masked-last",
            [
                text([well(0, 400), stuck(400, 300, 401)].concat()),
                vec![masked(); 5],
            ]
            .concat(),
            3,
        ),
        (
            "masked",
            [text(stuck(0, 200, 1)), vec![masked(); 100]].concat(),
            3,
        ),
    ];
    let mut ids = Vec::new();
    for (name, texts, _) in &logs {
        let id = webhook(&server, name).await;
        recorded(&server, id, texts.clone()).await;
        ids.push(id);
    }
    let reads = &server.watched.reads;
    let mut allowed = 0;
    for ((name, texts, most), id) in logs.iter().zip(&ids) {
        let before = reads.load(Ordering::Relaxed);
        let shown = server.get(&format!("/api/v1/webhooks/{id}")).await.ok();
        let newest = texts.iter().skip(texts.len().saturating_sub(2_000));
        let open = retrying(newest.filter_map(|text| Entry::from_text(text)));
        let open: Vec<_> = open.iter().map(|t| t.position.0).collect();
        let told = shown["retrying"].as_array().unwrap().iter();
        let told: Vec<_> = told.map(|r| r["position"].as_u64().unwrap()).collect();
        assert_eq!(told, open, "{name}");
        let needed = reads.load(Ordering::Relaxed) - before;
        assert!(needed <= *most, "{name}: {needed} reads");
        allowed += most;
    }
    // All of them at once say the same, the oldest first.
    let before = reads.load(Ordering::Relaxed);
    let listed = server.get("/api/v1/webhooks").await.ok();
    let listed = listed["webhooks"].as_array().unwrap().clone();
    let of = |w: &Value| w["id"].as_str().unwrap().parse().unwrap();
    assert_eq!(listed.iter().map(of).collect::<Vec<SubscriptionId>>(), ids);
    assert!(reads.load(Ordering::Relaxed) - before <= allowed);
    for (webhook, id) in listed.iter().zip(&ids) {
        let alone = server.get(&format!("/api/v1/webhooks/{id}")).await.ok();
        assert_eq!(*webhook, alone);
    }
    let open = listed.iter().filter(|w| w["retrying"][0].is_object());
    assert_eq!(open.count(), 5);
}

#[tokio::test]
async fn a_stream_of_deliveries_ends_with_its_webhook() {
    let server = server().await;
    server.shop().await;
    let id = webhook(&server, "gone").await;
    let kept = webhook(&server, "kept").await;
    let follow = async |id: SubscriptionId| {
        let path = format!("/api/v1/webhooks/{id}/deliveries");
        let request = server.request(Method::GET, &path);
        let request = request.header("Accept", "text/event-stream");
        sent(request.send().await.unwrap())
    };
    let mut stream = follow(id).await;
    let mut other = follow(kept).await;
    let first = well(0, 1).remove(0).to_text().unwrap();
    recorded(&server, id, vec![first]).await;
    assert_eq!(next(&mut stream).await.id, "1");
    // What was recorded before it was deleted is told before the end.
    let last = well(1, 600);
    let last = last.iter().map(|e| e.to_text().unwrap()).collect();
    recorded(&server, id, last).await;
    let path = format!("/api/v1/webhooks/{id}");
    server
        .send(server.request(Method::DELETE, &path))
        .await
        .ok();
    for line in 2..=601 {
        assert_eq!(next(&mut stream).await.id, line.to_string());
    }
    assert_eq!(next(&mut stream).await.event, "end");
    let rest = tokio::time::timeout(PATIENCE, stream.next()).await;
    assert!(rest.unwrap().is_none());
    let path = format!("/api/v1/webhooks/{id}/deliveries");
    let gone = server.request(Method::GET, &path);
    let gone = server
        .send(gone.header("Accept", "text/event-stream"))
        .await;
    gone.refused(404, "webhook_not_found");
    // The other one goes on.
    let more = well(0, 1).remove(0).to_text().unwrap();
    recorded(&server, kept, vec![more]).await;
    assert_eq!(next(&mut other).await.id, "1");
}

#[tokio::test]
async fn a_definition_is_replaced_only_as_it_was_read() {
    let server = server().await;
    server.shop().await;
    let id = webhook(&server, "first").await;
    let path = format!("/api/v1/webhooks/{id}");
    let read = async || {
        let reply = server.get(&path).await;
        let tag = reply.header("etag").unwrap().to_owned();
        assert_eq!(reply.json()["etag"], tag.as_str());
        tag
    };
    let put = async |tag: Option<&str>, body: &Value| {
        let mut request = server.request(Method::PUT, &path).json(body);
        if let Some(tag) = tag {
            request = request.header("If-Match", tag);
        }
        server.send(request).await
    };
    let to = |name: &str| json!({ "url": format!("https://receiver.example/{name}") });
    let first = read().await;
    // What happens to it without another definition is no other definition.
    server.post(&format!("{path}/pause"), json!({})).await.ok();
    server.post(&format!("{path}/rotate"), json!({})).await.ok();
    assert_eq!(read().await, first);
    let listed = server.get("/api/v1/webhooks").await.ok();
    assert_eq!(listed["webhooks"][0]["etag"], first.as_str());
    let changed = put(Some(&first), &to("second")).await;
    let second = changed.header("etag").unwrap().to_owned();
    assert_eq!(changed.ok()["etag"], second.as_str());
    assert_ne!(first, second);
    assert_eq!(read().await, second);

    // Whoever read the first one overwrites nothing.
    let refused = put(Some(&first), &to("third")).await;
    let refused = refused.refused(412, "webhook_changed");
    assert_eq!(refused["retryable"], false);
    assert_eq!(read().await, second);
    // A tag that is weak matches nothing, and what is no tag is said to be none.
    for tag in [format!("W/{second}"), "\"other\"".to_owned(), String::new()] {
        let refused = put(Some(&tag), &to("third")).await;
        let problem = refused.refused(412, "webhook_changed");
        let is_weak = problem.to_string().contains("weak");
        assert_eq!(is_weak, !tag.starts_with('"'), "{problem}");
    }
    for tag in ["second", "\"a"] {
        let refused = put(Some(tag), &to("third")).await;
        refused.refused(400, "invalid_if_match");
    }
    // Whose answer was lost asks again, and finds it as it was to be.
    put(Some(&first), &to("second")).await.ok();
    let several = format!("\"other\", {second}");
    put(Some(&several), &to("third")).await.ok();
    put(Some("*"), &to("fourth")).await.ok();
    put(None, &to("fifth")).await.ok();

    // Of those who change the same one at once, one does.
    let tag = read().await;
    let names: Vec<_> = (0..8).map(|n| to(&format!("racer-{n}"))).collect();
    let racers = names.iter().map(|body| put(Some(&tag), body));
    let replies = futures_util::future::join_all(racers).await;
    let won = replies.iter().filter(|r| r.status.is_success()).count();
    let refused = replies.iter().filter(|r| r.status == 412).count();
    assert_eq!((won, refused), (1, 7), "{replies:?}");

    // Whose answer was lost has not read what somebody else has made of it meanwhile.
    let lost = async || {
        let request = server.request(Method::PUT, &path).json(&to("mine"));
        server.send(request.header("Idempotency-Key", "lost")).await
    };
    let mine = lost().await;
    assert_eq!(mine.header("etag"), Some(read().await.as_str()));
    put(None, &to("theirs")).await.ok();
    let again = lost().await;
    assert_eq!(again.header("etag"), None);
    assert_eq!(again.ok()["url"], "https://receiver.example/theirs");

    let delete = async |tag: &str| {
        let request = server.request(Method::DELETE, &path);
        server.send(request.header("If-Match", tag)).await
    };
    delete(&tag).await.refused(412, "webhook_changed");
    delete(&read().await).await.ok();
    put(Some("*"), &to("sixth"))
        .await
        .refused(404, "webhook_not_found");
}

#[tokio::test]
async fn a_webhook_to_an_address_that_is_not_public_is_refused_when_it_is_made() {
    let server = server().await;
    server.shop().await;
    let id = webhook(&server, "there").await;
    let path = format!("/api/v1/webhooks/{id}");
    for host in [
        "127.0.0.1",
        "2130706433",
        "localhost",
        "LOCALHOST.:7070",
        "web.shop.localhost",
        "[::1]:443",
        "[::ffff:10.0.0.1]",
        "10.0.0.1",
        "169.254.169.254",
    ] {
        let url = format!("https://{host}/hook");
        let body = json!({ "project": "shop", "url": &url });
        let made = server.post("/api/v1/webhooks", body).await;
        made.refused(422, "webhook_address_refused");
        let changed = server.request(Method::PUT, &path);
        let changed = server.send(changed.json(&json!({ "url": &url }))).await;
        changed.refused(422, "webhook_address_refused");
    }
    let listed = server.get("/api/v1/webhooks").await.ok();
    assert_eq!(listed["webhooks"].as_array().unwrap().len(), 1);

    // Whoever runs the server can allow it.
    let server = server_with(|settings, _| settings.allow_private_webhooks = true).await;
    server.shop().await;
    let body = json!({ "project": "shop", "url": "http://127.0.0.1:7393/hook" });
    server.post("/api/v1/webhooks", body).await.ok();
}
