//! Which texts of an event may come from outside: from processes, servers, repositories and
//! people. Secrets are masked in them before the event is appended.

use daybook_events::approval::Plan;
use daybook_events::build::BuildEvent;
use daybook_events::deployment::{DeploymentEvent, SourceCommit};
use daybook_events::gitops::GitopsEvent;
use daybook_events::routing::{Applied, Ingresses, Rejected};

/// An event with texts from outside.
pub(crate) trait Texts {
    /// Shows each of them.
    fn texts(&mut self, see: &mut dyn FnMut(&mut String));
}

impl Texts for DeploymentEvent {
    fn texts(&mut self, see: &mut dyn FnMut(&mut String)) {
        match self {
            Self::SourceResolved(e) => e.source.texts(see),
            Self::WorkloadObserved(e) => {
                if let Some(problem) = &mut e.problem {
                    see(&mut problem.message);
                    see(&mut problem.remedy);
                    problem.remedies.iter_mut().for_each(see);
                }
            }
            Self::EndpointObserved(e) => e.message.iter_mut().for_each(see),
            Self::EndpointPlanesChanged(e) => {
                for change in &mut e.changes {
                    change.now.message.iter_mut().for_each(&mut *see);
                    change.now.actual.iter_mut().for_each(&mut *see);
                }
            }
            Self::OpenapiFound(e) => {
                e.title.iter_mut().for_each(&mut *see);
                e.version.iter_mut().for_each(see);
            }
            Self::Failed(e) => {
                see(&mut e.message);
                see(&mut e.remedy);
            }
            Self::ClusterFailed(e) => {
                see(&mut e.message);
                see(&mut e.remedy);
            }
            Self::PartiallySucceeded(e) => {
                for failed in &mut e.failed {
                    see(&mut failed.message);
                    see(&mut failed.remedy);
                }
            }
            Self::Cancelled(e) => see(&mut e.message),
            Self::StopFailed(e) | Self::StartFailed(e) | Self::TerminateFailed(e) => {
                see(&mut e.message);
                see(&mut e.remedy);
            }
            Self::ApprovalRequested(e) => e.plan.texts(see),
            Self::ApprovalsVoided(e) => e.plan.texts(see),
            // What people write is masked where it comes in.
            Self::CancelRequested(_)
            | Self::RetryRequested(_)
            | Self::ApprovalGranted(_)
            | Self::ApprovalRejected(_)
            | Self::EmergencyOverride(_)
            | Self::FreezeOverride(_)
            | Self::PostReviewCompleted(_)
            | Self::StopRequested(_)
            | Self::StartRequested(_)
            | Self::TerminateRequested(_)
            | Self::Deleted(_)
            | Self::StopUnscheduled(_)
            | Self::Requested(_)
            | Self::ScaleRequested(_)
            // Nothing but names, numbers and digests.
            | Self::Queued(_)
            | Self::CloningStarted(_)
            | Self::BuildingStarted(_)
            | Self::PushingStarted(_)
            | Self::ImagePinned(_)
            | Self::ChartPinned(_)
            | Self::ImagePulled(_)
            | Self::DeployingStarted(_)
            | Self::Succeeded(_)
            | Self::ClusterRetried(_)
            | Self::Overtaken(_)
            | Self::Stopped(_)
            | Self::RestartDone(_)
            | Self::Terminated(_)
            | Self::StopScheduled(_)
            | Self::Held(_)
            | Self::Released(_)
            | Self::Approved(_)
            | Self::ChangeCommitted(_) => {}
        }
    }
}

/// Plain values were checked against secrets when they were written; a secret that was set later may
/// still be among them.
impl Texts for Plan {
    fn texts(&mut self, see: &mut dyn FnMut(&mut String)) {
        for change in self.values.values_mut() {
            change.before.iter_mut().for_each(&mut *see);
            change.after.iter_mut().for_each(&mut *see);
        }
    }
}

impl Texts for BuildEvent {
    fn texts(&mut self, see: &mut dyn FnMut(&mut String)) {
        match self {
            Self::Requested(e) => e.commit.texts(see),
            Self::PushStarted(e) => see(&mut e.detected),
            Self::Failed(e) => {
                see(&mut e.message);
                see(&mut e.remedy);
            }
            Self::Cancelled(e) => see(&mut e.message),
            Self::Started(_) | Self::BuilderStarted(_) | Self::Succeeded(_) => {}
        }
    }
}

impl Texts for GitopsEvent {
    fn texts(&mut self, see: &mut dyn FnMut(&mut String)) {
        match self {
            Self::ForeignCommitFound(e) => {
                see(&mut e.author);
                see(&mut e.message);
                e.files.iter_mut().for_each(&mut *see);
                e.committer.iter_mut().for_each(see);
            }
            // Its title quotes that of the commit which it undoes.
            Self::Reverted(e) => see(&mut e.message),
            Self::RevertFailed(e) => {
                see(&mut e.message);
                see(&mut e.remedy);
            }
            Self::RemoteFailing(e) => {
                see(&mut e.message);
                see(&mut e.remedy);
            }
            // What people write is masked where it comes in; the rest is Daybook's own.
            Self::RepositoryCreated(_)
            | Self::Committed(_)
            | Self::SignerAdded(_)
            | Self::ForeignCommitAdopted(_)
            | Self::RevertRequested(_)
            | Self::HistoryRewritten(_)
            | Self::HistoryRestored(_)
            | Self::RewriteAccepted(_)
            | Self::RemoteRecovered(_) => {}
        }
    }
}

impl Texts for SourceCommit {
    fn texts(&mut self, see: &mut dyn FnMut(&mut String)) {
        see(&mut self.message);
        see(&mut self.author_name);
        see(&mut self.author_email);
        see(&mut self.url);
    }
}

impl Texts for Applied {
    fn texts(&mut self, see: &mut dyn FnMut(&mut String)) {
        match &mut self.ingresses {
            None => {}
            Some(Ingresses::Unread(why)) => see(why),
            Some(Ingresses::Seen(seen)) => {
                for ingress in seen {
                    see(&mut ingress.namespace);
                    see(&mut ingress.name);
                    ingress.backends.iter_mut().for_each(&mut *see);
                }
            }
        }
    }
}

impl Texts for Rejected {
    fn texts(&mut self, see: &mut dyn FnMut(&mut String)) {
        see(&mut self.message);
    }
}
