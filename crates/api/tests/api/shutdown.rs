use std::time::Duration;

use futures_util::StreamExt;
use reqwest::Method;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::*;

#[tokio::test]
async fn a_drain_ends_streams_and_finishes_requests() {
    let mut server = server().await;
    server.shop().await;
    let request = server.request(Method::GET, "/api/v1/events?follow=true");
    let mut stream = request.send().await.unwrap().bytes_stream();
    assert!(stream.next().await.is_some());
    server.cancel.cancel();
    let drained = tokio::time::timeout(PATIENCE, async {
        while let Some(chunk) = stream.next().await {
            // It ends as a stream does, and is not torn off.
            chunk.unwrap();
        }
    });
    drained.await.unwrap();
    let serving = server.serving.take().unwrap();
    tokio::time::timeout(PATIENCE, serving)
        .await
        .unwrap()
        .unwrap();
    let address = server.base.strip_prefix("http://").unwrap();
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn what_does_not_end_is_cut_off() {
    let mut server = server_with(|settings, _| settings.drain = Duration::from_millis(50)).await;
    let address = server.base.strip_prefix("http://").unwrap();
    let mut stuck = tokio::net::TcpStream::connect(address).await.unwrap();
    // A request whose body never comes.
    let head = "POST /api/v1/projects HTTP/1.1\r\nHost: localhost\r\n\
                Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{";
    stuck.write_all(head.as_bytes()).await.unwrap();
    // Another one shows that the server has seen the first by now.
    server.get("/healthz").await.ok();
    server.cancel.cancel();
    let serving = server.serving.take().unwrap();
    tokio::time::timeout(PATIENCE, serving)
        .await
        .unwrap()
        .unwrap();
    let mut rest = Vec::new();
    let _ = stuck.read_to_end(&mut rest).await;
    assert!(rest.is_empty());
}

#[tokio::test]
async fn a_request_that_takes_too_long_is_ended() {
    let server = server_with(|settings, _| {
        settings.request_timeout = Duration::from_millis(30);
    })
    .await;
    let request = server
        .request(Method::GET, "/api/v1/projects")
        .header("Daybook-Min-Position", "1000");
    let problem = server.send(request).await.refused(504, "timeout");
    assert_eq!(problem["retryable"], true);
}
