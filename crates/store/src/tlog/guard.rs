//! No more appends to a log that is not what was signed.

use std::sync::Arc;

use async_trait::async_trait;
use daybook_events::log::{
    Append, AppendError, Appended, Consumer, ConsumerConfig, EventLog, EventStream, LogInfo,
    Position, ReadError, Recorded,
};
use daybook_events::subject::{Subject, SubjectFilter};
use daybook_events::tree::{PublishedTree, TreeCondition};

/// A log whose appends are answered with [`AppendError::Stopped`] from the moment on at which the
/// tree says that the log is broken. All else passes through: what is there can still be read.
#[derive(Debug)]
pub struct GuardedLog {
    log: Arc<dyn EventLog>,
    tree: Arc<dyn PublishedTree>,
}

impl GuardedLog {
    /// Guards a log by the tree over it.
    pub fn new(log: Arc<dyn EventLog>, tree: Arc<dyn PublishedTree>) -> Self {
        Self { log, tree }
    }
}

#[async_trait]
impl EventLog for GuardedLog {
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        if let TreeCondition::Broken(breach) = self.tree.condition() {
            return Err(AppendError::Stopped(format!(
                "{} ({}); {}",
                breach.message, breach.code, breach.remedy
            )));
        }
        self.log.append(append).await
    }

    async fn head(&self) -> Result<Position, ReadError> {
        self.log.head().await
    }

    async fn get(&self, position: Position) -> Result<Option<Recorded>, ReadError> {
        self.log.get(position).await
    }

    async fn read_aggregate(&self, subject: &Subject) -> Result<Vec<Recorded>, ReadError> {
        self.log.read_aggregate(subject).await
    }

    async fn read(
        &self,
        after: Position,
        filter: &SubjectFilter,
        limit: usize,
    ) -> Result<Vec<Recorded>, ReadError> {
        self.log.read(after, filter, limit).await
    }

    async fn tail(&self, after: Position, filter: SubjectFilter) -> Result<EventStream, ReadError> {
        self.log.tail(after, filter).await
    }

    async fn consumer(&self, config: ConsumerConfig) -> Result<Arc<dyn Consumer>, ReadError> {
        self.log.consumer(config).await
    }

    async fn info(&self) -> Result<LogInfo, ReadError> {
        self.log.info().await
    }
}
