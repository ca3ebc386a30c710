//! Source repositories as the pipeline asks for them.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use daybook_events::deployment::SourceCommit;
use daybook_events::{CommitId, GitRef, RepositoryUrl};
use tokio_util::sync::CancellationToken;

use super::{Progress, ResolvedSource, SourceError, SourceRepositories, no_progress};
use crate::ports::{Output, Resolved, Sources, StepError};

impl From<ResolvedSource> for SourceCommit {
    fn from(source: ResolvedSource) -> Self {
        Self {
            url: source
                .source_url
                .unwrap_or_else(|| source.url.as_str().to_owned()),
            commit: source.commit,
            message: source.message,
            author_name: source.author_name,
            author_email: source.author_email,
            committed_at: source.committed_at,
        }
    }
}

impl From<SourceError> for StepError {
    fn from(error: SourceError) -> Self {
        let mut message = error.to_string();
        if let SourceError::Disk { source, .. } = &error {
            message = format!("{message}: {source}");
        }
        Self {
            code: error.code().to_owned(),
            message,
            remedy: error.remedy(),
            retryable: error.is_retryable(),
        }
    }
}

#[async_trait]
impl Sources for SourceRepositories {
    async fn resolve(&self, url: &RepositoryUrl, git_ref: &GitRef) -> Result<Resolved, StepError> {
        // Dropping the future stops the work.
        let never = CancellationToken::new();
        let silent = no_progress();
        let found = SourceRepositories::resolve(self, url, git_ref, &silent, &never).await?;
        Ok(Resolved {
            branch: found.branch.clone(),
            commit: found.into(),
        })
    }

    async fn checkout(
        &self,
        url: &RepositoryUrl,
        commit: &CommitId,
        into: &Path,
        output: &Output,
        cancel: &CancellationToken,
    ) -> Result<(), StepError> {
        SourceRepositories::checkout(self, url, commit, into, &lines_to(output), cancel).await?;
        Ok(())
    }
}

/// Progress as lines of a step's output. A slow reader slows the work down; one that is gone is
/// no reason to stop.
fn lines_to(output: &Output) -> Progress {
    let output = output.clone();
    Arc::new(move |line| {
        let _ = output.blocking_send(line);
    })
}
