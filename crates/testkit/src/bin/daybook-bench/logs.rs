//! The two logs of Daybook, as a benchmark opens them.

use std::path::Path;
use std::sync::Arc;

use daybook_events::log::EventLog;
use daybook_store::embedded::{EmbeddedConfig, EmbeddedLog};
use daybook_store::jetstream::{Connection, JetStreamLog, LogOptions, NatsOptions};

use crate::Failure;

/// A subject of the log, by which its stream is found.
pub(crate) const ANY_SUBJECT: &str = "daybook.ev.bench.production.deployment.x";

/// Which log to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Backend {
    /// The log in a folder.
    Embedded,
    /// The log on a nats-server.
    Jetstream,
}

/// An embedded log with the settings that it has by default.
pub(crate) async fn embedded(folder: &Path) -> Result<Arc<dyn EventLog>, Failure> {
    Ok(Arc::new(
        EmbeddedLog::open(folder, EmbeddedConfig::default()).await?,
    ))
}

/// A log on this server with the settings that it has by default.
pub(crate) async fn jetstream(url: &str) -> Result<Arc<dyn EventLog>, Failure> {
    let connection = Connection::open(NatsOptions::new(url)).await?;
    Ok(Arc::new(
        JetStreamLog::open(connection, &LogOptions::default()).await?,
    ))
}
