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
pub enum LogConfig {
    /// In a folder of this machine, for one process at a time.
    Embedded {
        /// The folder, which is made if it does not exist. Events are in `log` in it, lines in
        /// `lines`.
        dir: PathBuf,
        /// How the events are kept.
        log: EmbeddedConfig,
        /// How long the lines are kept.
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
    /// A log in this folder, synced before it acknowledges.
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
    /// The folder cannot be used.
    #[error(transparent)]
    Embedded(#[from] embedded::OpenError),
    /// NATS cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// NATS can be reached, but a stream cannot be used.
    #[error(transparent)]
    JetStream(#[from] jetstream::OpenError),
}

/// Opens the log of record and the line log that stands beside it.
pub async fn open(config: LogConfig) -> Result<(Arc<dyn EventLog>, Arc<dyn LineLog>), OpenError> {
    match config {
        LogConfig::Embedded { dir, log, lines } => {
            let log = EmbeddedLog::open(dir.join("log"), log).await?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use daybook_events::Position;

    #[tokio::test]
    async fn a_folder_has_both_logs_and_one_owner() {
        let dir = tempfile::tempdir().unwrap();
        let (log, lines) = open(LogConfig::embedded(dir.path())).await.unwrap();
        assert_eq!(log.head().await.unwrap(), Position::ZERO);
        let second = open(LogConfig::embedded(dir.path())).await;
        assert!(matches!(second, Err(OpenError::Embedded(_))));
        drop((log, lines));
        open(LogConfig::embedded(dir.path())).await.unwrap();
    }
}
