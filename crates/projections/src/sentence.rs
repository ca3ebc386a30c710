//! What an event says, as a sentence for people.

use std::fmt::{self, Write as _};

use daybook_events::access::{AccessEvent, Grant, Projects, TokenId};
use daybook_events::build::BuildEvent;
use daybook_events::deployment::{DeploymentEvent, EndpointPlanesChanged, PlaneState, Version};
use daybook_events::domain::DomainEvent;
use daybook_events::environment::EnvironmentEvent;
use daybook_events::freeze::ReleaseCause;
use daybook_events::gitops::{Change, GitopsEvent};
use daybook_events::ledger::LedgerEvent;
use daybook_events::preview::PullRequest;
use daybook_events::project::ProjectEvent;
use daybook_events::routing::{Applied, Ingresses, RoutingEvent, SwitchReason};
use daybook_events::subscription::{PauseReason, SubscriptionEvent};
use daybook_events::timer::KeepCause;
use daybook_events::{
    AnyPayload, ClusterName, DeploymentId, EnvironmentName, ServiceName, Subject,
};

use crate::slot::State;

/// To whom an event belongs, beyond what its subject says, and why it happened.
#[derive(Debug, Default)]
pub(crate) struct Said<'a> {
    pub(crate) reason: Option<&'a str>,
    pub(crate) environment: Option<&'a EnvironmentName>,
    pub(crate) service: Option<&'a ServiceName>,
    pub(crate) deployment: Option<DeploymentId>,
}

/// Puts an event into words, in the place of what `summary` holds. `before` is the state that it
/// meets.
pub(crate) fn say<'a>(
    summary: &mut String,
    subject: &Subject,
    payload: &'a AnyPayload,
    before: Option<&'a State>,
) -> Said<'a> {
    summary.clear();
    let s = summary;
    let mut said = match payload {
        AnyPayload::Project(Ok(e)) => project(s, e),
        AnyPayload::Environment(Ok(e)) => environment(s, e),
        AnyPayload::Build(Ok(e)) => build(s, e, before),
        AnyPayload::Deployment(Ok(e)) => deployment(s, e, before),
        AnyPayload::Gitops(Ok(e)) => gitops(s, e),
        AnyPayload::Routing(Ok(e)) => routing(s, e),
        AnyPayload::Domain(Ok(e)) => domain(s, e),
        AnyPayload::Access(Ok(e)) => access(s, e, before),
        AnyPayload::Subscription(Ok(e)) => subscription(s, e),
        AnyPayload::Ledger(Ok(LedgerEvent::Repaired(e))) => plain(
            s,
            format_args!("The log was restored from its {} signed events.", e.size),
        ),
        AnyPayload::Project(Err(_))
        | AnyPayload::Environment(Err(_))
        | AnyPayload::Build(Err(_))
        | AnyPayload::Deployment(Err(_))
        | AnyPayload::Gitops(Err(_))
        | AnyPayload::Routing(Err(_))
        | AnyPayload::Domain(Err(_))
        | AnyPayload::Subscription(Err(_))
        | AnyPayload::Ledger(Err(_))
        | AnyPayload::Access(Err(_))
        | AnyPayload::Other => plain(s, format_args!("An event that this version cannot read.")),
    };
    if subject.environment().is_some() {
        said.environment = None;
    }
    if let Subject::Deployment(..) = subject {
        said.deployment = None;
        if let (None, Some(State::Deployment(slot))) = (&said.service, before)
            && let Some(state) = &slot.folded.state
        {
            said.service = Some(&state.request.instance.service);
        }
    }
    said
}

fn plain<'a>(out: &mut String, summary: fmt::Arguments<'_>) -> Said<'a> {
    because(out, summary, None)
}

fn because<'a>(
    out: &mut String,
    summary: fmt::Arguments<'_>,
    reason: Option<&'a String>,
) -> Said<'a> {
    // Nothing that is written to a text fails.
    let _ = out.write_fmt(summary);
    Said {
        reason: reason.map(String::as_str),
        ..Said::default()
    }
}

/// The planes of an address that have changed, one after the other.
struct Changed<'a>(&'a EndpointPlanesChanged);

impl fmt::Display for Changed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, change) in self.0.changes.iter().enumerate() {
            let (now, was_bad) = (&change.now, change.before.is_some_and(PlaneState::is_bad));
            let and = if i == 0 { "" } else { "; " };
            let name = now.plane.name();
            match now.state {
                PlaneState::Ok if was_bad => write!(f, "{and}{name} is as it should be again")?,
                PlaneState::Ok => write!(f, "{and}{name} is as it should be")?,
                PlaneState::Failing => write!(f, "{and}{name} fails ({})", now.reason)?,
                PlaneState::Drifted => write!(f, "{and}{name} has drifted ({})", now.reason)?,
                PlaneState::Unknown => write!(f, "{and}{name} is not known ({})", now.reason)?,
            }
            if now.state.is_bad()
                && let (Some(expected), Some(actual)) = (&now.expected, &now.actual)
            {
                write!(f, ", expected {expected}, actual {actual}")?;
            }
            if now.state == PlaneState::Ok
                && let Some(expires) = now.expires
            {
                write!(f, ", the certificate ends {expires:.0}")?;
            }
        }
        Ok(())
    }
}

fn project<'a>(out: &mut String, event: &'a ProjectEvent) -> Said<'a> {
    match event {
        ProjectEvent::Created(e) => plain(out, format_args!("Project {} was created.", e.name)),
        ProjectEvent::TemplateResolved(e) => plain(
            out,
            format_args!(
                "Service {} was made from the template {} {}.",
                e.name, e.template.name, e.template.version
            ),
        ),
        ProjectEvent::SecretSet(e) => Said {
            environment: e.secret.scope.environment.as_ref(),
            service: e.secret.scope.service.as_ref(),
            ..plain(
                out,
                format_args!("Secret {} was set: version {}.", e.secret, e.version),
            )
        },
        ProjectEvent::SecretUnset(e) => Said {
            environment: e.secret.scope.environment.as_ref(),
            service: e.secret.scope.service.as_ref(),
            ..plain(out, format_args!("Secret {} was taken away.", e.secret))
        },
        ProjectEvent::SecretsErased(_) => plain(
            out,
            format_args!("All secrets were taken away, and their values and keys erased."),
        ),
        ProjectEvent::GitopsRemoteChanged(e) => match &e.url {
            Some(url) => plain(out, format_args!("GitOps commits are pushed to {url}.")),
            None => plain(
                out,
                format_args!("GitOps commits are pushed nowhere any more."),
            ),
        },
        ProjectEvent::SourceUploaded(e) => Said {
            service: Some(&e.service),
            ..plain(
                out,
                format_args!(
                    "A folder was uploaded for {}: commit {}, {} bytes sent.",
                    e.service,
                    e.commit.short(),
                    e.bytes
                ),
            )
        },
        ProjectEvent::HookDefined(e) => plain(
            out,
            format_args!(
                "Webhook {} of {} was defined.",
                e.hook.name,
                e.hook.provider.as_str()
            ),
        ),
        ProjectEvent::HookRemoved(e) => plain(out, format_args!("Webhook {} was removed.", e.name)),
        ProjectEvent::BranchPushed(e) => plain(
            out,
            format_args!(
                "Branch {} of {} was pushed to: {}.",
                e.branch,
                e.repository,
                e.head.short()
            ),
        ),
        ProjectEvent::ServiceDefined(e) => Said {
            service: Some(&e.name),
            ..plain(out, format_args!("Service {} was defined.", e.name))
        },
    }
}

fn pull_request<'a>(out: &mut String, about: &PullRequest, what: &str) -> Said<'a> {
    plain(
        out,
        format_args!(
            "Pull request {} {what}, with head {}: {}.",
            about.number,
            about.head.short(),
            about.title
        ),
    )
}

fn environment<'a>(out: &mut String, event: &'a EnvironmentEvent) -> Said<'a> {
    match event {
        EnvironmentEvent::Created(e) => match &e.from {
            Some(from) => plain(
                out,
                format_args!("Environment {} was created from {from}.", e.name),
            ),
            None => plain(out, format_args!("Environment {} was created.", e.name)),
        },
        EnvironmentEvent::Changed(_) => plain(out, format_args!("The environment was redefined.")),
        EnvironmentEvent::DeletionRequested(e) => because(
            out,
            format_args!("The environment is to be deleted, with all that runs in it."),
            e.reason.as_ref(),
        ),
        EnvironmentEvent::AutoDeploySet(e) => match &e.branch {
            Some(branch) => plain(
                out,
                format_args!("Pushes to {branch} are deployed by themselves."),
            ),
            None => plain(
                out,
                format_args!("Pushes are no longer deployed by themselves."),
            ),
        },
        EnvironmentEvent::FreezeSet(e) => because(
            out,
            format_args!("It is frozen by {} {}.", e.name, e.freeze.rule),
            e.freeze.reason.as_ref(),
        ),
        EnvironmentEvent::FreezeRemoved(e) => because(
            out,
            format_args!("It is frozen by {} no more.", e.name),
            e.reason.as_ref(),
        ),
        EnvironmentEvent::PullRequestOpened(e) => pull_request(out, &e.pull_request, "is open"),
        EnvironmentEvent::PullRequestUpdated(e) => {
            pull_request(out, &e.pull_request, "has changed")
        }
        EnvironmentEvent::PullRequestHeadFound(e) => plain(
            out,
            format_args!(
                "The newest head of the pull request is {}: {}.",
                e.head.short(),
                e.reason
            ),
        ),
        EnvironmentEvent::PullRequestClosed(e) => pull_request(out, &e.pull_request, "is closed"),
        EnvironmentEvent::Deleted(_) => plain(out, format_args!("The environment is deleted.")),
    }
}

fn build<'a>(out: &mut String, event: &'a BuildEvent, before: Option<&'a State>) -> Said<'a> {
    let mut said = match event {
        BuildEvent::Requested(e) => plain(
            out,
            format_args!(
                "A build of {} at commit {} was asked for.",
                e.service,
                e.commit.commit.short()
            ),
        ),
        BuildEvent::Started(e) => plain(
            out,
            format_args!(
                "Worker {} took the build on (attempt {}).",
                e.worker, e.attempt
            ),
        ),
        BuildEvent::BuilderStarted(e) => plain(
            out,
            format_args!(
                "Commit {} was checked out; the builder runs.",
                e.commit.short()
            ),
        ),
        BuildEvent::PushStarted(e) => plain(
            out,
            format_args!("The image was made by {} and is being pushed.", e.builder),
        ),
        BuildEvent::Succeeded(e) => {
            plain(out, format_args!("Image {} was built and pushed.", e.image))
        }
        BuildEvent::Failed(e) => because(out, format_args!("The build failed."), Some(&e.message)),
        BuildEvent::Cancelled(e) => because(
            out,
            format_args!("The build was given up."),
            Some(&e.message),
        ),
    };
    said.service = match (event, before) {
        (BuildEvent::Requested(e), _) => Some(&e.service),
        (_, Some(State::Build(f))) => f.state.as_ref().map(|b| &b.request.service),
        _ => None,
    };
    said
}

/// Names, with commas between them.
fn listed(names: &[ClusterName]) -> String {
    let names: Vec<_> = names.iter().map(ClusterName::as_str).collect();
    names.join(", ")
}

fn deployment<'a>(
    out: &mut String,
    event: &'a DeploymentEvent,
    before: Option<&'a State>,
) -> Said<'a> {
    use DeploymentEvent as E;
    match event {
        E::Requested(e) if e.promoted_from.is_some() => {
            let from = e.promoted_from.as_ref().map(|p| &p.environment);
            let i = &e.instance;
            Said {
                service: Some(&i.service),
                ..because(
                    out,
                    format_args!(
                        "A promotion of {} from {} to {} was asked for.",
                        i.service,
                        from.map_or("", |f| f.as_str()),
                        i.environment
                    ),
                    e.reason.as_ref(),
                )
            }
        }
        E::Requested(e) => {
            let what = &e.version;
            let verb = if e.redeploy_of.is_some() {
                "redeploy"
            } else {
                "deployment"
            };
            let i = &e.instance;
            Said {
                service: Some(&i.service),
                ..because(
                    out,
                    format_args!(
                        "A {verb} of {what} to {} in {} was asked for.",
                        i.service, i.environment
                    ),
                    e.reason.as_ref(),
                )
            }
        }
        E::Queued(_) => plain(out, format_args!("It was admitted to the pipeline.")),
        E::CloningStarted(_) => plain(
            out,
            format_args!("Its source is being resolved and fetched."),
        ),
        E::SourceResolved(e) => {
            let commit = e.source.commit.short();
            let asked = match before {
                Some(State::Deployment(slot)) => slot.folded.state.as_ref(),
                _ => None,
            }
            .map(|d| &d.request.version);
            match asked {
                Some(Version::Git { git_ref, .. }) => plain(
                    out,
                    format_args!("{git_ref} was resolved to commit {commit}."),
                ),
                _ => plain(
                    out,
                    format_args!("Its source was resolved to commit {commit}."),
                ),
            }
        }
        E::BuildingStarted(_) => plain(out, format_args!("Its image is being built.")),
        E::PushingStarted(_) => plain(out, format_args!("Its image is being pushed.")),
        E::ImagePinned(e) => plain(
            out,
            format_args!(
                "Its image is {}{}.",
                e.image,
                if e.shared {
                    ", built for another deployment before"
                } else {
                    ""
                }
            ),
        ),
        E::ChartPinned(e) => plain(out, format_args!("Its chart is {}.", e.chart)),
        E::DeployingStarted(e) => plain(
            out,
            format_args!(
                "It was committed as {}; its clusters converge.",
                e.commit.short()
            ),
        ),
        E::ChangeCommitted(e) => {
            let commit = e.commit.short();
            match e.replicas {
                Some(n) => plain(
                    out,
                    format_args!("{n} replicas of it were committed as {commit}."),
                ),
                None => plain(out, format_args!("Its removal was committed as {commit}.")),
            }
        }
        E::WorkloadObserved(e) => because(
            out,
            format_args!(
                "{} of {} instances are ready in {}.",
                e.ready(),
                e.wanted,
                e.cluster
            ),
            e.problem.as_ref().map(|p| &p.message),
        ),
        E::EndpointObserved(e) => because(
            out,
            format_args!(
                "It {} at {}.",
                if e.ready {
                    "answers"
                } else {
                    "does not answer"
                },
                e.url
            ),
            e.message.as_ref(),
        ),
        E::EndpointPlanesChanged(e) => {
            let bad = e.changes.iter().find(|c| c.now.state.is_bad());
            because(
                out,
                format_args!("Seen from where users are, {}: {}.", e.hostname, Changed(e)),
                bad.and_then(|c| c.now.message.as_ref()),
            )
        }
        E::ImagePulled(e) => plain(
            out,
            format_args!(
                "{} has fetched its image in {}.{:03} s.",
                e.cluster,
                e.took_ms / 1000,
                e.took_ms % 1000
            ),
        ),
        E::OpenapiFound(e) => plain(
            out,
            format_args!("It serves an OpenAPI document at {}.", e.path),
        ),
        E::Succeeded(_) => plain(out, format_args!("It is live.")),
        E::PartiallySucceeded(e) => plain(
            out,
            format_args!(
                "It is live in {} of its {} clusters, and has failed in the others.",
                e.ready.len(),
                e.ready.len() + e.failed.len()
            ),
        ),
        E::ClusterFailed(e) => because(
            out,
            format_args!("It has failed in {} ({}).", e.cluster, e.code),
            Some(&e.message),
        ),
        E::RetryRequested(e) => because(
            out,
            format_args!("It is to be tried again in {}.", listed(&e.clusters)),
            e.reason.as_ref(),
        ),
        E::ClusterRetried(e) => plain(out, format_args!("{} tries it again.", e.cluster)),
        E::Overtaken(e) => because(
            out,
            format_args!("{} was admitted before it.", e.by.short()),
            Some(&e.reason),
        ),
        E::Failed(e) => because(
            out,
            format_args!("It failed while {} ({}).", e.during.as_str(), e.code),
            Some(&e.message),
        ),
        E::CancelRequested(e) => because(
            out,
            format_args!("Its cancellation was asked for."),
            e.reason.as_ref(),
        ),
        E::Cancelled(e) => because(out, format_args!("It was cancelled."), Some(&e.message)),
        E::ScaleRequested(e) => because(
            out,
            format_args!("It is to run {} instances in each cluster.", e.replicas),
            e.reason.as_ref(),
        ),
        E::StopRequested(e) => {
            because(out, format_args!("It is to be stopped."), e.reason.as_ref())
        }
        E::ApprovalRequested(e) => plain(
            out,
            format_args!(
                "Its plan {} waits for {} approvals.",
                e.hash, e.plan.rule.required
            ),
        ),
        E::ApprovalsVoided(e) => plain(
            out,
            format_args!(
                "Its plan became {}; {} approvals are void.",
                e.hash,
                e.voided.len()
            ),
        ),
        E::ApprovalGranted(e) => because(
            out,
            format_args!("{} allowed plan {}.", e.approver, e.hash),
            e.reason.as_ref(),
        ),
        E::ApprovalRejected(e) => because(
            out,
            format_args!("{} rejected it.", e.approver),
            Some(&e.reason),
        ),
        E::EmergencyOverride(e) => because(
            out,
            format_args!("{} goes ahead in an emergency; to be reviewed later.", e.by),
            Some(&e.reason),
        ),
        E::Approved(e) if e.emergency => plain(
            out,
            format_args!("It goes on with plan {} in an emergency.", e.hash),
        ),
        E::Approved(e) => plain(
            out,
            format_args!(
                "Its plan {} is allowed by {}.",
                e.hash,
                e.approvers.join(", ")
            ),
        ),
        E::PostReviewCompleted(e) => because(
            out,
            format_args!("{} reviewed the emergency.", e.reviewer),
            e.reason.as_ref(),
        ),
        E::Held(e) => match e.until {
            Some(until) => plain(
                out,
                format_args!("It waits for the freeze {}, until {until:.0}.", e.freeze),
            ),
            None => plain(
                out,
                format_args!(
                    "It waits for the freeze {}, which has no end yet.",
                    e.freeze
                ),
            ),
        },
        E::Released(e) => {
            let why = match e.cause {
                ReleaseCause::Ended => "has ended",
                ReleaseCause::Removed => "was taken away",
            };
            plain(
                out,
                format_args!("It goes on: the freeze {} {why}.", e.freeze),
            )
        }
        E::FreezeOverride(e) => because(
            out,
            format_args!(
                "{} lets it through the freeze {} in an emergency; to be reviewed later.",
                e.by, e.freeze
            ),
            Some(&e.reason),
        ),
        E::StopScheduled(e) => plain(
            out,
            format_args!("It will be stopped at {:.0}: {}.", e.due, e.because()),
        ),
        E::StopUnscheduled(e) => because(
            out,
            match e.cause {
                KeepCause::Asked => format_args!("It is kept: its scheduled stop is called off."),
                KeepCause::Traffic => format_args!("It is kept, as it has traffic again."),
            },
            e.reason.as_ref(),
        ),
        E::Stopped(_) => plain(out, format_args!("It is stopped.")),
        E::StopFailed(e) => because(
            out,
            format_args!("It could not be stopped."),
            Some(&e.message),
        ),
        E::StartRequested(e) => because(
            out,
            format_args!("It is to be started again."),
            e.reason.as_ref(),
        ),
        E::RestartDone(_) => plain(out, format_args!("It is started again.")),
        E::StartFailed(e) => because(
            out,
            format_args!("It could not be started again."),
            Some(&e.message),
        ),
        E::TerminateRequested(e) => {
            because(out, format_args!("It is to be removed."), e.reason.as_ref())
        }
        E::Terminated(_) => plain(out, format_args!("It is removed.")),
        E::TerminateFailed(e) => because(
            out,
            format_args!("It could not be removed."),
            Some(&e.message),
        ),
        E::Deleted(e) => because(
            out,
            format_args!("Its record was put away."),
            e.reason.as_ref(),
        ),
    }
}

fn gitops<'a>(out: &mut String, event: &'a GitopsEvent) -> Said<'a> {
    match event {
        GitopsEvent::RepositoryCreated(e) => plain(
            out,
            format_args!("The GitOps repository was made, with branch {}.", e.branch),
        ),
        GitopsEvent::Committed(e) => {
            let (service, deployment) = match &e.change {
                Change::Deploy {
                    service,
                    deployment,
                    ..
                }
                | Change::Scale {
                    service,
                    deployment,
                    ..
                }
                | Change::Remove {
                    service,
                    deployment,
                } => (Some(service), Some(*deployment)),
                Change::EnvironmentCreated { .. } | Change::EnvironmentDeleted {} => (None, None),
            };
            Said {
                environment: Some(&e.environment),
                service,
                deployment,
                ..plain(
                    out,
                    format_args!("Commit {}: {}", e.commit.short(), e.message),
                )
            }
        }
        GitopsEvent::ForeignCommitFound(e) => Said {
            environment: e.environments.first(),
            ..plain(
                out,
                format_args!(
                    "Commit {} by {} was found, which Daybook did not make: {}",
                    e.commit.short(),
                    e.author,
                    e.message
                ),
            )
        },
        GitopsEvent::SignerAdded(e) => plain(
            out,
            format_args!("Commits are signed with key {}.", e.fingerprint),
        ),
        GitopsEvent::ForeignCommitAdopted(e) => because(
            out,
            format_args!("Commit {} was adopted.", e.commit.short()),
            e.reason.as_ref(),
        ),
        GitopsEvent::RevertRequested(e) => because(
            out,
            format_args!("Commit {} is to be undone.", e.commit.short()),
            e.reason.as_ref(),
        ),
        GitopsEvent::Reverted(e) => Said {
            environment: e.environments.first(),
            ..plain(
                out,
                format_args!("Commit {}: {}", e.commit.short(), e.message),
            )
        },
        GitopsEvent::RevertFailed(e) => because(
            out,
            format_args!(
                "Commit {} could not be undone ({}).",
                e.commit.short(),
                e.code
            ),
            Some(&e.message),
        ),
        GitopsEvent::HistoryRewritten(e) => plain(
            out,
            format_args!(
                "The history was rewritten: the branch is at {} and no longer contains {}, which \
                 the ledger records. Nothing is committed until somebody decides.",
                e.found.short(),
                e.expected.short()
            ),
        ),
        GitopsEvent::HistoryRestored(e) => plain(
            out,
            format_args!(
                "The branch is at {} and contains again what the ledger records.",
                e.found.short()
            ),
        ),
        GitopsEvent::RemoteFailing(e) => plain(
            out,
            format_args!(
                "The GitOps remote does not do what it is asked: {}.",
                e.message
            ),
        ),
        GitopsEvent::RemoteRecovered(_) => plain(
            out,
            format_args!("The GitOps remote does what it is asked again."),
        ),
        GitopsEvent::RewriteAccepted(e) => because(
            out,
            format_args!(
                "The rewritten history up to {} was accepted.",
                e.commit.short()
            ),
            e.reason.as_ref(),
        ),
    }
}

fn domain<'a>(out: &mut String, event: &'a DomainEvent) -> Said<'a> {
    match event {
        DomainEvent::Claimed(e) => Said {
            environment: Some(&e.instance.environment),
            service: Some(&e.instance.service),
            ..plain(
                out,
                format_args!("{} belongs to {} from here on.", e.hostname, e.instance),
            )
        },
        DomainEvent::ReleaseRequested(_) => plain(out, format_args!("It is to be given up.")),
        DomainEvent::Released(_) => plain(out, format_args!("It belongs to nobody.")),
    }
}

fn access<'a>(out: &mut String, event: &'a AccessEvent, before: Option<&State>) -> Said<'a> {
    let called = |id: &TokenId| match before {
        Some(State::Access(folded)) => folded
            .state
            .as_ref()
            .and_then(|access| access.tokens.get(id))
            .map_or_else(|| id.to_string(), |token| token.name.to_string()),
        _ => id.to_string(),
    };
    let grant = |g: &Grant| match &g.projects {
        Projects::All => format!("{} everywhere", g.role),
        Projects::Named(names) => {
            let names: Vec<_> = names.iter().map(|n| n.as_str()).collect();
            format!("{} in {}", g.role, names.join(", "))
        }
    };
    match event {
        AccessEvent::TokenCreated(e) => {
            let grants: Vec<_> = e.grants.iter().map(grant).collect();
            plain(
                out,
                format_args!(
                    "The token {} was made for {}: {}.",
                    e.name,
                    e.account,
                    grants.join("; ")
                ),
            )
        }
        AccessEvent::TokenRotated(e) => plain(
            out,
            format_args!("The token {} got another secret.", called(&e.token)),
        ),
        AccessEvent::TokenRevoked(e) => because(
            out,
            format_args!("The token {} was revoked.", called(&e.token)),
            e.reason.as_ref(),
        ),
    }
}

fn subscription<'a>(out: &mut String, event: &'a SubscriptionEvent) -> Said<'a> {
    match event {
        SubscriptionEvent::Created(e) => plain(
            out,
            format_args!("Events go to {} from here on.", e.endpoint.url),
        ),
        SubscriptionEvent::Changed(e) => plain(
            out,
            format_args!("The webhook to {} was defined anew.", e.endpoint.url),
        ),
        SubscriptionEvent::SecretRotated(_) => plain(out, format_args!("It has a new secret.")),
        SubscriptionEvent::Paused(e) => plain(
            out,
            format_args!(
                "Nothing is sent any more{}.",
                match e.reason {
                    PauseReason::Asked => "",
                    PauseReason::Gone => ", because the receiver wants no more",
                    PauseReason::Failing => ", because too much could not be delivered",
                }
            ),
        ),
        SubscriptionEvent::Resumed(_) => plain(out, format_args!("It is sent again.")),
        SubscriptionEvent::TestRequested(_) => plain(out, format_args!("A test was asked for.")),
        SubscriptionEvent::EventDeadLettered(e) => plain(
            out,
            format_args!(
                "Event {} was set aside after {} tries ({}).",
                e.position, e.tries, e.code
            ),
        ),
        SubscriptionEvent::ReplayRequested(e) => plain(
            out,
            format_args!("{} events are to be sent again.", e.positions.len()),
        ),
        SubscriptionEvent::EventReplayed(e) => plain(
            out,
            format_args!("Event {} was delivered after all.", e.position),
        ),
        SubscriptionEvent::DeadLettersDiscarded(e) => plain(
            out,
            format_args!(
                "{} events that were set aside are never sent.",
                e.positions.len()
            ),
        ),
        SubscriptionEvent::Progressed(e) => plain(
            out,
            format_args!("All up to event {} is dealt with.", e.position),
        ),
        SubscriptionEvent::Deleted(_) => plain(out, format_args!("It was deleted.")),
    }
}

fn routing<'a>(out: &mut String, event: &'a RoutingEvent) -> Said<'a> {
    match event {
        RoutingEvent::Switched(e) => {
            let why = match e.reason {
                SwitchReason::Deploy => "because a deployment became ready",
                SwitchReason::MarkMain => "because a deployment was marked as main",
                SwitchReason::Rollback => "to go back to an older deployment",
                SwitchReason::Withdraw => "because a deployment is being removed",
                SwitchReason::Compensation => "back, because the switch could not be applied",
                SwitchReason::Split => "because somebody said which deployments share it",
                SwitchReason::Leave => "because a deployment is being stopped",
                SwitchReason::Branch => "because a deployment is the newest of its branch",
                SwitchReason::Domain => "because it was claimed or given up",
                SwitchReason::Policy => "to another policy across clusters",
            };
            let names: Vec<_> = e.changes.iter().map(|c| c.hostname.as_str()).collect();
            let what = if names.is_empty() {
                "Traffic was decided anew".to_owned()
            } else {
                format!("{} switched", names.join(", "))
            };
            Said {
                environment: Some(&e.instance.environment),
                service: Some(&e.instance.service),
                deployment: Some(e.deployment),
                ..because(
                    out,
                    format_args!("{what} {why} (table {}).", e.table),
                    e.note.as_ref(),
                )
            }
        }
        RoutingEvent::Applied(e) => plain(
            out,
            format_args!(
                "Gateway {} serves table {}{}.",
                e.gateway,
                e.table,
                besides(e)
            ),
        ),
        RoutingEvent::Rejected(e) => because(
            out,
            format_args!("Gateway {} could not apply table {}.", e.gateway, e.table),
            Some(&e.message),
        ),
    }
}

/// What a gateway says besides the table that it serves.
fn besides(report: &Applied) -> String {
    let mut said = String::new();
    let at = report.addresses.as_ref().map(|all| {
        let all: Vec<_> = all.iter().map(ToString::to_string).collect();
        all.join(", ")
    });
    match at.as_deref() {
        None => {}
        Some("") => said.push_str(", and has no address"),
        Some(at) => said.push_str(&format!(", and is reached at {at}")),
    }
    match &report.ingresses {
        None => {}
        Some(Ingresses::Seen(seen)) if seen.is_empty() => {
            said.push_str("; no Ingress serves its hostnames as well");
        }
        Some(Ingresses::Seen(seen)) => {
            let all: Vec<_> = seen
                .iter()
                .map(|i| format!("{} ({}/{})", i.hostname, i.namespace, i.name))
                .collect();
            said.push_str(&format!("; Ingresses serve as well: {}", all.join(", ")));
        }
        Some(Ingresses::Unread(why)) => {
            said.push_str(&format!("; its Ingresses are not read: {why}"));
        }
    }
    said
}
