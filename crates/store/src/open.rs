//! Opening whichever backend a configuration names.

use std::path::PathBuf;
use std::sync::Arc;

use daybook_events::lines::LineLog;
use daybook_events::log::EventLog;

use crate::embedded::{self, EmbeddedConfig, EmbeddedLines, EmbeddedLog, LineRetention};
use crate::jetstream::{
    self, ConnectError, Connection, JetStreamLines, JetStreamLog, LineOptions, LogOptions,
    NatsOptions,
};

/// Where the log of record and the output lines are.
#[derive(Debug, Clone)]
#[non_exhaustive]
#[allow(clippy::large_enum_variant, reason = "one is made, at the start")]
pub enum LogConfig {
    /// In a folder of this machine.
    Embedded {
        /// The folder; the lines are in a folder of their own within it.
        dir: PathBuf,
        /// How the events are kept.
        log: EmbeddedConfig,
        /// How long lines are kept.
        lines: LineRetention,
    },
    /// On NATS JetStream.
    Nats {
        /// Where NATS is, and how to get in.
        nats: Box<NatsOptions>,
        /// How the stream of events is to be.
        log: LogOptions,
        /// How the stream of lines is to be.
        lines: LineOptions,
    },
}

impl LogConfig {
    /// A log in a folder, synced before it acknowledges.
    pub fn embedded(dir: impl Into<PathBuf>) -> Self {
        Self::Embedded {
            dir: dir.into(),
            log: EmbeddedConfig::default(),
            lines: LineRetention::default(),
        }
    }

    /// A log on these servers with streams of the usual names.
    pub fn nats(nats: NatsOptions) -> Self {
        Self::Nats {
            nats: Box::new(nats),
            log: LogOptions::default(),
            lines: LineOptions::default(),
        }
    }
}

/// Why a log could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// NATS cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// NATS can be reached, but a stream cannot be used.
    #[error(transparent)]
    JetStream(#[from] jetstream::OpenError),
    /// The folder cannot be used.
    #[error(transparent)]
    Embedded(#[from] embedded::OpenError),
}

/// Opens the log of record and the line log that stands beside it.
pub async fn open(config: LogConfig) -> Result<(Arc<dyn EventLog>, Arc<dyn LineLog>), OpenError> {
    match config {
        LogConfig::Embedded { dir, log, lines } => {
            // The log first: its lock says who else has the folder.
            let log = EmbeddedLog::open(&dir, log).await?;
            let lines = EmbeddedLines::open(dir.join("lines"), lines).await?;
            Ok((Arc::new(log), Arc::new(lines)))
        }
        LogConfig::Nats { nats, log, lines } => {
            let connection = Connection::open(*nats).await?;
            let log = JetStreamLog::open(connection.clone(), &log).await?;
            let lines = JetStreamLines::open(connection, &lines).await?;
            Ok((Arc::new(log), Arc::new(lines)))
        }
    }
}
