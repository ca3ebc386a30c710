//! WebSockets: the feed of events, and what all sockets have in common.

use std::time::Duration;

use daybook_events::Position;
use daybook_events::feed::{FeedChain, FeedFilter, leaf_hash};
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use crate::graphql;
use crate::streams::{next, sent};
use crate::support::*;

pub type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Opens a socket, with these headers.
pub async fn open(
    server: &Server,
    path: &str,
    headers: &[(&'static str, &str)],
) -> Result<Socket, Error> {
    let url = format!("{}{path}", server.base.replacen("http", "ws", 1));
    let mut request = url.into_client_request().unwrap();
    for (name, value) in headers {
        request.headers_mut().insert(*name, value.parse().unwrap());
    }
    tokio_tungstenite::connect_async(request)
        .await
        .map(|(socket, _)| socket)
}

/// The next message that is no ping.
pub async fn message(socket: &mut Socket) -> Message {
    loop {
        let message = tokio::time::timeout(PATIENCE, socket.next())
            .await
            .expect("nothing came")
            .expect("the socket ended")
            .expect("the socket broke");
        if !matches!(message, Message::Ping(_) | Message::Pong(_)) {
            return message;
        }
    }
}

pub async fn text(socket: &mut Socket) -> Value {
    match message(socket).await {
        Message::Text(text) => serde_json::from_str(&text).unwrap(),
        other => panic!("{other:?}"),
    }
}

pub async fn closed(socket: &mut Socket) -> CloseFrame {
    loop {
        if let Message::Close(frame) = message(socket).await {
            return frame.expect("the server says why");
        }
    }
}

/// The code of a refused upgrade.
async fn refused(server: &Server, path: &str, headers: &[(&'static str, &str)]) -> (u16, Value) {
    match open(server, path, headers).await {
        Err(Error::Http(answer)) => {
            let body = answer.body().clone().unwrap_or_default();
            let problem: Value = serde_json::from_slice(&body).unwrap_or_default();
            (answer.status().as_u16(), problem["code"].clone())
        }
        other => panic!("{other:?}"),
    }
}

async fn streams_open(server: &Server, count: usize) {
    let wanted = format!("daybook_http_streams {count}\n");
    tokio::time::timeout(PATIENCE, async {
        while !server.get("/metrics").await.text.contains(&wanted) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("the stream is still open");
}

/// The subscription of GraphQL to what a query of REST asks for.
fn subscription(query: &str) -> String {
    let mut filter = Vec::new();
    let mut after = String::new();
    for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
        match name {
            "after" => after = format!(", after: {value}"),
            "project" => filter.push(format!("projectId: \"{value}\"")),
            name => filter.push(format!("{name}: \"{value}\"")),
        }
    }
    let filter = filter.join(", ");
    format!("subscription {{ events(filter: {{ {filter} }}{after}) {{ position subject event }} }}")
}

#[tokio::test]
async fn sockets_streams_graphql_and_pages_deliver_the_same_whatever_the_filter() {
    let server = server().await;
    server.shop().await;
    let api = server.deploy("shop.production.api", "v1").await;
    server.make_live(api).await;
    server.deploy("shop.staging.cache", "7").await;
    server
        .post("/api/v1/projects", json!({ "name": "blog" }))
        .await
        .ok();
    for filter in [
        "",
        "project=shop",
        "environment=staging",
        "service=api",
        "kind=deployment",
        "kind=deployment.requested.v1",
        &format!("deployment={api}"),
        "project=shop&environment=production&service=api&kind=routing",
        "after=7&project=shop",
    ] {
        let path = format!("/api/v1/events?limit=500&{filter}");
        let page = server.get(&path).await.ok();
        let expected = page["events"].as_array().unwrap();
        let stream = server.request(
            reqwest::Method::GET,
            &format!("/api/v1/events?follow=true&{filter}"),
        );
        let mut stream = sent(stream.send().await.unwrap());
        let mut socket = open(&server, &format!("/api/v1/events?{filter}"), &[])
            .await
            .unwrap();
        let mut graphql = graphql::socket(&server).await;
        graphql::subscribe(&mut graphql, "e", &subscription(filter)).await;
        for event in expected {
            let over_graphql = graphql::next(&mut graphql, "e").await["events"].take();
            for field in ["position", "subject", "event"] {
                assert_eq!(over_graphql[field], event[field], "{filter}: {field}");
            }
            let over_socket = text(&mut socket).await;
            for field in ["position", "subject", "stored_at", "event"] {
                assert_eq!(over_socket[field], event[field], "{filter}: {field}");
            }
            let over_stream = next(&mut stream).await;
            assert_eq!(over_stream.id, event["position"].to_string());
            let data: Value = serde_json::from_str(&over_stream.data).unwrap();
            assert_eq!(data, event["event"]);
        }
        // And what comes next, if it fits: nothing of the past is left over.
        if filter.is_empty() {
            let id = server.deploy("shop.staging.api", "v2").await.to_string();
            assert!(text(&mut socket).await.to_string().contains(&id));
            assert!(next(&mut stream).await.data.contains(&id));
            let over_graphql = graphql::next(&mut graphql, "e").await;
            assert!(over_graphql.to_string().contains(&id));
        }
    }
}

#[tokio::test]
async fn a_subscriber_proves_that_it_missed_nothing_also_across_a_cut() {
    let server = server().await;
    server.shop().await;
    let id = server.deploy("shop.production.api", "v1").await;
    server.make_live(id).await;
    let feed = "project=shop&kind=deployment";
    let filter = FeedFilter {
        project: Some("shop".parse().unwrap()),
        kind: Some("deployment".into()),
        ..FeedFilter::default()
    };
    let mut chain = FeedChain::begin(&filter, Position(2));
    let mut last = 2;
    let count = server
        .get(&format!("/api/v1/events/chain?{feed}&after=2"))
        .await
        .ok()["events"]
        .as_u64()
        .unwrap();
    assert!(count > 8, "{count}");
    // Cut off after every third event, it goes on where it was, with the value that it had.
    let mut had = 0;
    while had < count {
        let going_on = match had {
            0 => String::new(),
            _ => format!("&chain={chain}"),
        };
        let path = format!("/api/v1/events?{feed}&after={last}{going_on}");
        let mut socket = open(&server, &path, &[]).await.unwrap();
        for _ in 0..3 {
            if had == count {
                break;
            }
            let event = text(&mut socket).await;
            last = event["position"].as_u64().unwrap();
            let bytes = server.get(&format!("/api/v1/events/{last}")).await.text;
            chain = chain.then(&leaf_hash(bytes.as_bytes()));
            assert_eq!(event["chain"], chain.to_string(), "{event}");
            had += 1;
        }
    }
    let path = format!("/api/v1/events/chain?{feed}&after=2&to={last}");
    let report = server.get(&path).await.ok();
    assert_eq!(report["chain"], chain.to_string());
    assert_eq!(report["to"], last);
    // In two parts it is the same; without one of the events, or for another feed, it is not.
    let half = server
        .get(&format!("/api/v1/events/chain?{feed}&after=2&to=9"))
        .await
        .ok();
    let value = half["chain"].as_str().unwrap();
    let path = format!("/api/v1/events/chain?{feed}&after=9&to={last}&chain={value}");
    assert_eq!(server.get(&path).await.ok()["chain"], chain.to_string());
    let other = format!("/api/v1/events/chain?project=shop&after=2&to={last}");
    assert_ne!(server.get(&other).await.ok()["chain"], chain.to_string());
    server
        .get("/api/v1/events/chain?chain=abc")
        .await
        .refused(400, "invalid_chain");
    server
        .get("/api/v1/events/chain?to=9999")
        .await
        .refused(409, "position_ahead");
}

#[tokio::test]
async fn what_is_wrong_with_a_subscription_is_said_before_the_upgrade() {
    let server = server().await;
    server.shop().await;
    for (path, headers, status, code) in [
        ("/api/v1/events?after=99", &[][..], 409, "position_ahead"),
        ("/api/v1/events?after=x", &[], 400, "invalid_position"),
        ("/api/v1/events?kind=nothing", &[], 422, "unknown_kind"),
        ("/api/v1/events?chain=1", &[], 400, "invalid_chain"),
        ("/api/v1/events?nothing=1", &[], 400, "invalid_query"),
        ("/graphql", &[], 400, "unknown_subprotocol"),
        // A page of another origin may open sockets, as far as browsers are concerned.
        (
            "/api/v1/events",
            &[("origin", "https://evil.example")],
            403,
            "cross_origin",
        ),
        (
            "/graphql",
            &[("origin", "http://localhost:1")],
            403,
            "cross_origin",
        ),
    ] {
        let found = refused(&server, path, headers).await;
        assert_eq!(found, (status, code.into()), "{path}");
    }
    let half = server
        .request(reqwest::Method::GET, "/api/v1/events")
        .header("Connection", "upgrade")
        .header("Upgrade", "websocket");
    server.send(half).await.refused(400, "invalid_upgrade");
}

#[tokio::test]
async fn a_slow_client_of_a_socket_misses_nothing() {
    let server = server().await;
    let mut slow = open(&server, "/api/v1/events", &[]).await.unwrap();
    // More than all buffers between the two hold, and more than the server keeps for the quick.
    for n in 0..400 {
        let bytes = format!("{{\"n\":{n},\"text\":\"{}\"}}", "x".repeat(60_000));
        server.store(bytes).await;
    }
    let mut quick = open(&server, "/api/v1/events?after=399", &[])
        .await
        .unwrap();
    assert_eq!(text(&mut quick).await["position"], 400);
    for position in 1..=400 {
        let event = text(&mut slow).await;
        assert_eq!(event["position"], position);
        assert_eq!(event["event"]["n"], position - 1);
    }
}

/// A client that speaks no further than the upgrade.
async fn mute(server: &Server, path: &str) -> TcpStream {
    let address = server.base.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nAccept: text/event-stream\r\n{}\r\n",
        match path.contains("follow") {
            true => "",
            false =>
                "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                 Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
        }
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = [0; 12];
    stream.read_exact(&mut head).await.unwrap();
    assert!(head.starts_with(b"HTTP/1.1 "), "{head:?}");
    stream
}

#[tokio::test]
async fn clients_that_never_read_are_let_go() {
    let server = server_with(|settings, _| settings.heartbeat = Duration::from_secs(1)).await;
    for n in 0..400 {
        let bytes = format!("{{\"n\":{n},\"text\":\"{}\"}}", "x".repeat(60_000));
        server.store(bytes).await;
    }
    let socket = mute(&server, "/api/v1/events").await;
    let stream = mute(&server, "/api/v1/events?follow=true").await;
    streams_open(&server, 2).await;
    // Both have all that their machine takes; then there is no progress any more.
    streams_open(&server, 0).await;
    drop((socket, stream));
}

#[tokio::test]
async fn a_client_that_does_not_answer_is_let_go() {
    let server = server_with(|settings, _| settings.heartbeat = Duration::from_millis(700)).await;
    let mut silent = mute(&server, "/api/v1/events").await;
    let mut polite = open(&server, "/api/v1/events", &[]).await.unwrap();
    // It reads, but answers no ping: a machine between the two may have forgotten the connection.
    let ended = async {
        let mut rest = Vec::new();
        tokio::time::timeout(PATIENCE, silent.read_to_end(&mut rest))
            .await
            .expect("it is let go")
            .unwrap();
        server.shop().await;
    };
    // One that reads answers by itself.
    let (event, ()) = tokio::join!(text(&mut polite), ended);
    assert_eq!(event["position"], 1);
}

#[tokio::test]
async fn a_subscriber_has_nothing_to_say() {
    let server = server().await;
    for nonsense in [Message::text("hello"), Message::binary(vec![1, 2, 3])] {
        let mut socket = open(&server, "/api/v1/events", &[]).await.unwrap();
        socket.send(nonsense).await.unwrap();
        assert_eq!(u16::from(closed(&mut socket).await.code), 1003);
    }
    // What is larger than anything that could be meant is not even read.
    let mut socket = open(&server, "/api/v1/events", &[]).await.unwrap();
    let _ = socket.send(Message::text("x".repeat(100_000))).await;
    let ended = tokio::time::timeout(PATIENCE, async {
        while let Some(Ok(_)) = socket.next().await {}
    });
    ended.await.expect("it is let go");
    streams_open(&server, 0).await;
}

#[tokio::test]
async fn sockets_end_with_the_server_and_say_so() {
    let mut server = server().await;
    let mut socket = open(&server, "/api/v1/events", &[]).await.unwrap();
    let _held_up = mute(&server, "/api/v1/events").await;
    streams_open(&server, 2).await;
    server.cancel.cancel();
    assert_eq!(u16::from(closed(&mut socket).await.code), 1001);
    let serving = server.serving.take().unwrap();
    tokio::time::timeout(PATIENCE, serving)
        .await
        .expect("the server ends")
        .unwrap();
}
