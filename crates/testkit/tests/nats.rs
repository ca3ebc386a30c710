//! The servers that tests rely on do what the tests rely on.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use async_nats::jetstream::{self, stream};
use async_nats::{HeaderMap, header};
use daybook_testkit::left_out;
use daybook_testkit::nats::{NatsBinary, NatsCluster, NatsServer, NatsSettings};

async fn jetstream_at(url: &str) -> jetstream::Context {
    let servers: Vec<async_nats::ServerAddr> =
        url.split(',').map(|url| url.parse().unwrap()).collect();
    let client = async_nats::ConnectOptions::new()
        .request_timeout(Some(Duration::from_secs(5)))
        .connect(servers)
        .await
        .unwrap();
    jetstream::new(client)
}

fn all_binaries() -> Vec<NatsBinary> {
    let mut binaries = NatsBinary::installed();
    match NatsBinary::newest() {
        Some(newest) if !binaries.contains(&newest) => binaries.push(newest),
        Some(_) => {}
        None => left_out("there is no newest nats-server; run `cargo xtask tools`"),
    }
    binaries
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_comes_back_on_its_port_with_its_store() {
    for binary in all_binaries() {
        let mut server = NatsServer::start(&binary).await;
        let url = server.url();
        let js = jetstream_at(&url).await;
        js.create_stream(stream::Config {
            name: "KEPT".into(),
            subjects: vec!["kept".into()],
            ..Default::default()
        })
        .await
        .unwrap();
        js.publish("kept", "1".into()).await.unwrap().await.unwrap();
        server.kill();
        assert!(!server.is_running());
        server.start_again().await;
        assert_eq!(server.url(), url);
        let stream = jetstream_at(&url).await.get_stream("KEPT").await.unwrap();
        assert_eq!(stream.cached_info().state.messages, 1);

        let folder = server.folder().to_owned();
        drop(server);
        assert!(!folder.exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_server_answers_nothing_until_it_is_resumed() {
    for binary in all_binaries() {
        let mut server = NatsServer::start(&binary).await;
        let client = jetstream_at(&server.url()).await.client();
        let asked = || client.request("$JS.API.INFO", "".into());
        server.pause();
        assert!(asked().await.is_err());
        server.resume();
        assert!(asked().await.is_ok());
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_can_sync_every_write() {
    let Some(binary) = NatsBinary::newest() else {
        return left_out("there is no newest nats-server; run `cargo xtask tools`");
    };
    let settings = NatsSettings {
        sync_always: true,
        ..NatsSettings::default()
    };
    let server = NatsServer::start_with(&binary, settings).await;
    assert!(server.log().contains("Server is ready"));
}

#[tokio::test(flavor = "multi_thread")]
async fn three_servers_keep_a_stream_whose_leader_is_killed() {
    for binary in all_binaries() {
        let mut cluster = NatsCluster::start(&binary).await;
        let js = jetstream_at(&cluster.url()).await;
        let config = stream::Config {
            name: "KEPT".into(),
            subjects: vec!["kept".into()],
            num_replicas: 3,
            ..Default::default()
        };
        // Servers that are ready may still be choosing who places streams.
        let created = async {
            loop {
                if let Ok(stream) = js.get_or_create_stream(config.clone()).await {
                    break stream;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let stream = tokio::time::timeout(Duration::from_secs(60), created)
            .await
            .expect("the cluster places a stream");
        // The stream's own leader may be a moment later than its creation; by its id the message
        // is stored once.
        let stored = async {
            loop {
                let mut headers = HeaderMap::new();
                headers.insert(header::NATS_MESSAGE_ID, "1");
                let sent = js.publish_with_headers("kept", headers, "1".into()).await;
                if sent.unwrap().await.is_ok() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), stored)
            .await
            .expect("the stream takes a message");
        let leader = stream
            .cached_info()
            .cluster
            .clone()
            .unwrap()
            .leader
            .unwrap();
        cluster.server_mut(&leader).kill();
        cluster.start_again().await;
        let answer = async {
            loop {
                if let Ok(stream) = js.get_stream("KEPT").await {
                    break stream;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let stream = tokio::time::timeout(Duration::from_secs(60), answer)
            .await
            .expect("the stream has a leader again");
        assert_eq!(stream.cached_info().state.messages, 1);
    }
}
