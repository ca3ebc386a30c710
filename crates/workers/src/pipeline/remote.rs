//! What is known of the GitOps remotes: that one does not do what it is asked is recorded when it
//! begins and when it ends, so that everybody sees why commits wait, and since when.

use daybook_events::gitops::{
    self, Gitops, GitopsEvent, RemoteFailing, RemoteRecovered, RemoteStep,
};
use daybook_events::{Actor, Context, EventId, ProjectName, Subject};
use jiff::Timestamp;
use uuid::Uuid;

use super::{Bench, Stop};
use crate::ports::StepError;

/// Whether an error is one of the remote, and not of what is here.
fn is_of_the_remote(error: &StepError) -> bool {
    error.code.starts_with("gitops_remote_") || error.code == "gitops_push_refused"
}

/// Records that a remote does not do what it is asked, if that is what went wrong. A repository
/// that the ledger does not know yet has nowhere to record it: its first deployment says it.
pub(super) async fn failed(
    bench: &Bench,
    project: &ProjectName,
    during: RemoteStep,
    error: &StepError,
) -> Result<(), Stop> {
    if !is_of_the_remote(error) || bench.ledger.projections().gitops(project)?.is_none() {
        return Ok(());
    }
    let event = GitopsEvent::RemoteFailing(RemoteFailing {
        during,
        code: error.code.clone(),
        message: error.message.clone(),
        remedy: error.remedy.clone(),
    });
    record(bench, project, event).await
}

/// Records that a remote did what it was asked, if it was thought not to.
pub(super) async fn worked(
    bench: &Bench,
    project: &ProjectName,
    state: Option<&Gitops>,
) -> Result<(), Stop> {
    if state.is_none_or(|s| s.remote_trouble.is_none()) {
        return Ok(());
    }
    let event = GitopsEvent::RemoteRecovered(RemoteRecovered {});
    record(bench, project, event).await
}

async fn record(bench: &Bench, project: &ProjectName, event: GitopsEvent) -> Result<(), Stop> {
    let subject = Subject::Gitops(project.clone());
    let event = bench.masked(&subject, event);
    let id = EventId(Uuid::now_v7());
    let context = Context {
        id,
        time: Timestamp::now(),
        correlation: id.0,
        causation: None,
        actor: Actor::system("worker/package"),
        traceparent: None,
        request_digest: None,
    };
    bench
        .append::<Gitops>(&subject, &context, |state| {
            gitops::decide(state, event.clone())
        })
        .await?;
    Ok(())
}
