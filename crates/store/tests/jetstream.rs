//! The JetStream backend passes the suite: on each nats-server that is installed, on the newest
//! one, and on a cluster of three.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use daybook_events::EventLog;
use daybook_events::lines::LineLog;
use daybook_store::jetstream::{
    Connection, JetStreamLines, JetStreamLog, LineOptions, LogOptions, NatsOptions,
};
use daybook_testkit::left_out;
use daybook_testkit::nats::{NatsBinary, NatsCluster, NatsServer, NatsSettings};
use tokio::sync::{Mutex, Semaphore, SemaphorePermit};

#[macro_use]
mod conformance;

use conformance::{Abilities, Backend};

/// Soon enough for a test, and long enough for a busy machine.
fn options(url: &str) -> NatsOptions {
    NatsOptions {
        answer_timeout: Duration::from_secs(6),
        ..NatsOptions::new(url)
    }
}

async fn open(url: &str, replicas: usize) -> (Arc<dyn EventLog>, Arc<dyn LineLog>) {
    let connection = Connection::open(options(url)).await.unwrap();
    let log_options = LogOptions {
        replicas,
        ..LogOptions::default()
    };
    let line_options = LineOptions {
        replicas,
        ..LineOptions::default()
    };
    let log = JetStreamLog::open(connection.clone(), &log_options)
        .await
        .unwrap();
    let lines = JetStreamLines::open(connection, &line_options)
        .await
        .unwrap();
    (Arc::new(log), Arc::new(lines))
}

/// One server.
struct Single {
    log: Arc<dyn EventLog>,
    lines: Arc<dyn LineLog>,
    server: Mutex<NatsServer>,
}

impl Single {
    async fn start(binary: NatsBinary, settings: NatsSettings) -> Self {
        let server = NatsServer::start_with(&binary, settings).await;
        let (log, lines) = open(&server.url(), 1).await;
        Self {
            log,
            lines,
            server: Mutex::new(server),
        }
    }
}

#[async_trait]
impl Backend for Single {
    async fn log(&self) -> Arc<dyn EventLog> {
        self.log.clone()
    }

    async fn lines(&self) -> Arc<dyn LineLog> {
        self.lines.clone()
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            handles_survive: true,
            pauses: true,
            may_accept_twice: false,
        }
    }

    async fn restart(&self) {
        let mut server = self.server.lock().await;
        server.stop().await;
        server.start_again().await;
    }

    async fn crash(&self) {
        let mut server = self.server.lock().await;
        server.kill();
        server.start_again().await;
    }

    async fn pause(&self) {
        self.server.lock().await.pause();
    }

    async fn resume(&self) {
        self.server.lock().await.resume();
    }
}

mod installed {
    use super::*;

    async fn start() -> Vec<Single> {
        let binaries = NatsBinary::installed();
        if binaries.is_empty() {
            left_out("no nats-server is on PATH or in DAYBOOK_NATS_SERVER");
        }
        let mut backends = Vec::new();
        for binary in binaries {
            let settings = NatsSettings::default();
            backends.push(Box::pin(Single::start(binary, settings)).await);
        }
        backends
    }

    conformance_suite!(start);
}

mod newest {
    use super::*;

    async fn start() -> Vec<Single> {
        let Some(binary) = NatsBinary::newest() else {
            left_out("the newest nats-server is not there; `cargo xtask tools` builds it");
            return Vec::new();
        };
        let settings = NatsSettings {
            sync_always: binary.at_least(2, 10, 0),
            ..NatsSettings::default()
        };
        vec![Box::pin(Single::start(binary, settings)).await]
    }

    conformance_suite!(start);
}

mod cluster {
    use super::*;

    /// Three servers are much for a small machine: one cluster at a time.
    static ONE_AT_A_TIME: Semaphore = Semaphore::const_new(1);

    /// Three servers, each of which keeps everything.
    struct Three {
        log: Arc<dyn EventLog>,
        lines: Arc<dyn LineLog>,
        cluster: Mutex<NatsCluster>,
        _turn: SemaphorePermit<'static>,
    }

    impl Three {
        /// The server that leads the stream of events at the moment.
        async fn leader(&self, cluster: &NatsCluster) -> String {
            let servers: Vec<async_nats::ServerAddr> = cluster
                .url()
                .split(',')
                .map(|url| url.parse().unwrap())
                .collect();
            conformance::within("a leader of the stream", async {
                loop {
                    if let Ok(client) = async_nats::connect(&servers).await
                        && let Ok(stream) = async_nats::jetstream::new(client)
                            .get_stream("DAYBOOK")
                            .await
                        && let Some(leader) = stream
                            .cached_info()
                            .cluster
                            .as_ref()
                            .and_then(|cluster| cluster.leader.clone())
                    {
                        return leader;
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            })
            .await
        }
    }

    #[async_trait]
    impl Backend for Three {
        async fn log(&self) -> Arc<dyn EventLog> {
            self.log.clone()
        }

        async fn lines(&self) -> Arc<dyn LineLog> {
            self.lines.clone()
        }

        fn abilities(&self) -> Abilities {
            Abilities {
                handles_survive: true,
                pauses: true,
                may_accept_twice: true,
            }
        }

        async fn restart(&self) {
            let mut cluster = self.cluster.lock().await;
            cluster.stop_all().await;
            cluster.start_again().await;
        }

        /// Kills the server that leads the stream, and brings it back when another one leads.
        async fn crash(&self) {
            let mut cluster = self.cluster.lock().await;
            let leader = self.leader(&cluster).await;
            cluster.server_mut(&leader).kill();
            conformance::within("another leader", async {
                while self.log.head().await.is_err() {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            })
            .await;
            cluster.start_again().await;
        }

        async fn pause(&self) {
            let mut cluster = self.cluster.lock().await;
            for server in cluster.servers_mut() {
                server.pause();
            }
        }

        async fn resume(&self) {
            let mut cluster = self.cluster.lock().await;
            for server in cluster.servers_mut() {
                server.resume();
            }
        }
    }

    async fn start() -> Vec<Three> {
        let newest = NatsBinary::newest();
        if newest.is_none() {
            left_out("the newest nats-server is not there; `cargo xtask tools` builds it");
        }
        let Some(binary) = newest else {
            return Vec::new();
        };
        let turn = ONE_AT_A_TIME.acquire().await.unwrap();
        let cluster = NatsCluster::start(&binary).await;
        let (log, lines) = open(&cluster.url(), 3).await;
        vec![Three {
            log,
            lines,
            cluster: Mutex::new(cluster),
            _turn: turn,
        }]
    }

    conformance_suite!(start);
}
