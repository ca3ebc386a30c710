//! What an event says, as a sentence for people.

use daybook_events::build::BuildEvent;
use daybook_events::deployment::{DeploymentEvent, Version};
use daybook_events::environment::EnvironmentEvent;
use daybook_events::gitops::{Change, GitopsEvent};
use daybook_events::project::ProjectEvent;
use daybook_events::routing::{RoutingEvent, SwitchReason};
use daybook_events::{DeploymentId, EnvironmentName, ServiceName, Subject};

use crate::decode::Payload;
use crate::slot::State;

/// What an event says, to whom it belongs, and why it happened.
#[derive(Debug, Default)]
pub(crate) struct Said {
    pub(crate) summary: String,
    pub(crate) reason: Option<String>,
    pub(crate) environment: Option<EnvironmentName>,
    pub(crate) service: Option<ServiceName>,
    pub(crate) deployment: Option<DeploymentId>,
}

/// Puts an event into words. `before` is the state that it meets.
pub(crate) fn say(subject: &Subject, payload: &Payload, before: Option<&State>) -> Said {
    let mut said = match payload {
        Payload::Project(Ok(e)) => project(e),
        Payload::Environment(Ok(e)) => environment(e),
        Payload::Build(Ok(e)) => build(e, before),
        Payload::Deployment(Ok(e)) => deployment(e, before),
        Payload::Gitops(Ok(e)) => gitops(e),
        Payload::Routing(Ok(e)) => routing(e),
        Payload::Project(Err(_))
        | Payload::Environment(Err(_))
        | Payload::Build(Err(_))
        | Payload::Deployment(Err(_))
        | Payload::Gitops(Err(_))
        | Payload::Routing(Err(_))
        | Payload::Other => Said {
            summary: "An event that this version cannot read.".to_owned(),
            ..Said::default()
        },
    };
    if let Some(e) = subject.environment() {
        said.environment = Some(e.clone());
    }
    if let Subject::Deployment(_, _, d) = subject {
        said.deployment = Some(*d);
        if let (None, Some(State::Deployment(slot))) = (&said.service, before)
            && let Some(state) = &slot.folded.state
        {
            said.service = Some(state.request.instance.service.clone());
        }
    }
    said
}

fn plain(summary: impl Into<String>) -> Said {
    Said {
        summary: summary.into(),
        ..Said::default()
    }
}

fn because(summary: impl Into<String>, reason: Option<&String>) -> Said {
    Said {
        summary: summary.into(),
        reason: reason.cloned(),
        ..Said::default()
    }
}

fn project(event: &ProjectEvent) -> Said {
    match event {
        ProjectEvent::Created(e) => plain(format!("Project {} was created.", e.name)),
        ProjectEvent::ServiceDefined(e) => Said {
            service: Some(e.name.clone()),
            ..plain(format!("Service {} was defined.", e.name))
        },
    }
}

fn environment(event: &EnvironmentEvent) -> Said {
    match event {
        EnvironmentEvent::Created(e) => plain(format!("Environment {} was created.", e.name)),
        EnvironmentEvent::Changed(_) => plain("The environment was redefined."),
    }
}

fn build(event: &BuildEvent, before: Option<&State>) -> Said {
    let mut said = match event {
        BuildEvent::Requested(e) => plain(format!(
            "A build of {} at commit {} was asked for.",
            e.service,
            e.commit.commit.short()
        )),
        BuildEvent::Started(e) => plain(format!(
            "Worker {} took the build on (attempt {}).",
            e.worker, e.attempt
        )),
        BuildEvent::BuilderStarted(e) => plain(format!(
            "Commit {} was checked out; the builder runs.",
            e.commit.short()
        )),
        BuildEvent::PushStarted(e) => plain(format!(
            "The image was made by {} and is being pushed.",
            e.builder
        )),
        BuildEvent::Succeeded(e) => plain(format!("Image {} was built and pushed.", e.image)),
        BuildEvent::Failed(e) => because("The build failed.", Some(&e.message)),
        BuildEvent::Cancelled(e) => because("The build was given up.", Some(&e.message)),
    };
    said.service = match (event, before) {
        (BuildEvent::Requested(e), _) => Some(e.service.clone()),
        (_, Some(State::Build(f))) => f.state.as_ref().map(|b| b.request.service.clone()),
        _ => None,
    };
    said
}

fn deployment(event: &DeploymentEvent, before: Option<&State>) -> Said {
    use DeploymentEvent as E;
    match event {
        E::Requested(e) => {
            let what = match &e.version {
                Version::Git { git_ref, .. } => git_ref.to_string(),
                Version::Image { reference } => reference.to_string(),
            };
            let verb = if e.redeploy_of.is_some() {
                "redeploy"
            } else {
                "deployment"
            };
            let i = &e.instance;
            Said {
                service: Some(i.service.clone()),
                ..because(
                    format!(
                        "A {verb} of {what} to {} in {} was asked for.",
                        i.service, i.environment
                    ),
                    e.reason.as_ref(),
                )
            }
        }
        E::Queued(_) => plain("It was admitted to the pipeline."),
        E::CloningStarted(_) => plain("Its source is being resolved and fetched."),
        E::SourceResolved(e) => {
            let commit = e.source.commit.short();
            let asked = match before {
                Some(State::Deployment(slot)) => slot.folded.state.as_ref(),
                _ => None,
            }
            .map(|d| &d.request.version);
            match asked {
                Some(Version::Git { git_ref, .. }) => {
                    plain(format!("{git_ref} was resolved to commit {commit}."))
                }
                _ => plain(format!("Its source was resolved to commit {commit}.")),
            }
        }
        E::BuildingStarted(_) => plain("Its image is being built."),
        E::PushingStarted(_) => plain("Its image is being pushed."),
        E::ImagePinned(e) => plain(format!(
            "Its image is {}{}.",
            e.image,
            if e.shared {
                ", built for another deployment before"
            } else {
                ""
            }
        )),
        E::DeployingStarted(e) => plain(format!(
            "It was committed as {}; its clusters converge.",
            e.commit.short()
        )),
        E::ChangeCommitted(e) => plain(match e.replicas {
            Some(n) => format!("{n} replicas of it were committed as {}.", e.commit.short()),
            None => format!("Its removal was committed as {}.", e.commit.short()),
        }),
        E::WorkloadObserved(e) => because(
            format!(
                "{} of {} instances are ready in {}.",
                e.ready(),
                e.wanted,
                e.cluster
            ),
            e.problem.as_ref().map(|p| &p.message),
        ),
        E::EndpointObserved(e) => because(
            if e.ready {
                format!("It answers at {}.", e.url)
            } else {
                format!("It does not answer at {}.", e.url)
            },
            e.message.as_ref(),
        ),
        E::OpenapiFound(e) => plain(format!("It serves an OpenAPI document at {}.", e.path)),
        E::Succeeded(_) => plain("It is live."),
        E::Failed(e) => because(
            format!("It failed while {} ({}).", e.during.as_str(), e.code),
            Some(&e.message),
        ),
        E::CancelRequested(e) => because("Its cancellation was asked for.", e.reason.as_ref()),
        E::Cancelled(e) => because("It was cancelled.", Some(&e.message)),
        E::StopRequested(e) => because("It is to be stopped.", e.reason.as_ref()),
        E::Stopped(_) => plain("It is stopped."),
        E::StopFailed(e) => because("It could not be stopped.", Some(&e.message)),
        E::StartRequested(e) => because("It is to be started again.", e.reason.as_ref()),
        E::RestartDone(_) => plain("It is started again."),
        E::StartFailed(e) => because("It could not be started again.", Some(&e.message)),
        E::TerminateRequested(e) => because("It is to be removed.", e.reason.as_ref()),
        E::Terminated(_) => plain("It is removed."),
        E::TerminateFailed(e) => because("It could not be removed.", Some(&e.message)),
        E::Deleted(e) => because("Its record was put away.", e.reason.as_ref()),
    }
}

fn gitops(event: &GitopsEvent) -> Said {
    match event {
        GitopsEvent::RepositoryCreated(e) => plain(format!(
            "The GitOps repository was made, with branch {}.",
            e.branch
        )),
        GitopsEvent::Committed(e) => {
            let (service, deployment) = match &e.change {
                Change::Deploy {
                    service,
                    deployment,
                }
                | Change::Scale {
                    service,
                    deployment,
                    ..
                }
                | Change::Remove {
                    service,
                    deployment,
                } => (Some(service.clone()), Some(*deployment)),
                Change::EnvironmentCreated {} | Change::EnvironmentDeleted {} => (None, None),
            };
            Said {
                environment: Some(e.environment.clone()),
                service,
                deployment,
                ..plain(format!("Commit {}: {}", e.commit.short(), e.message))
            }
        }
        GitopsEvent::ForeignCommitFound(e) => plain(format!(
            "Commit {} by {} was found, which Daybook did not make: {}",
            e.commit.short(),
            e.author,
            e.message
        )),
    }
}

fn routing(event: &RoutingEvent) -> Said {
    match event {
        RoutingEvent::Switched(e) => {
            let why = match e.reason {
                SwitchReason::Deploy => "because a deployment became ready",
                SwitchReason::MarkMain => "because a deployment was marked as main",
                SwitchReason::Rollback => "to go back to an older deployment",
                SwitchReason::Withdraw => "because a deployment is being removed",
                SwitchReason::Compensation => "back, because the switch could not be applied",
            };
            let names: Vec<_> = e.changes.iter().map(|c| c.hostname.as_str()).collect();
            let what = if names.is_empty() {
                "Traffic was decided anew".to_owned()
            } else {
                format!("{} switched", names.join(", "))
            };
            Said {
                environment: Some(e.instance.environment.clone()),
                service: Some(e.instance.service.clone()),
                deployment: Some(e.deployment),
                ..because(
                    format!("{what} {why} (table {}).", e.table),
                    e.note.as_ref(),
                )
            }
        }
        RoutingEvent::Applied(e) => {
            plain(format!("Gateway {} serves table {}.", e.gateway, e.table))
        }
        RoutingEvent::Rejected(e) => because(
            format!("Gateway {} could not apply table {}.", e.gateway, e.table),
            Some(&e.message),
        ),
    }
}
