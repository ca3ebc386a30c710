//! What events mean in the words of CDEvents 0.5.1.
//!
//! [`translate`] is a pure function of one event and of what cannot change any more about the
//! deployment or build that it belongs to: the same event is always translated to the same. One
//! event becomes one CDEvent or none, and has its id.
//!
//! | event | CDEvent |
//! |---|---|
//! | `deployment.requested` | `pipelinerun.queued` |
//! | `deployment.queued` | `pipelinerun.started` |
//! | `deployment.cloning_started`, `source_resolved` | `taskrun.started`, `taskrun.finished` |
//! | the first of `deployment.succeeded`, `partially_succeeded`, `failed`, `cancelled` | `pipelinerun.finished` |
//! | `deployment.image_pinned`, of a build of its own | `artifact.published` |
//! | `deployment.endpoint_observed`, where it answers | `service.published` |
//! | `build.requested`, `started` | `build.queued`, `build.started` |
//! | `build.push_started` | `artifact.packaged` |
//! | `build.succeeded`, `failed`, `cancelled` | `build.finished` |
//! | `gitops.committed` | `change.merged` |
//! | `routing.switched`, to the first main deployment of a service | `service.deployed` |
//! | the same to another one | `service.upgraded` |
//! | the same back | `service.rolledback` |
//! | the same to none | `service.removed` |
//! | `environment.created`, `changed`, `deleted` | `environment.created`, `modified`, `deleted` |

use daybook_events::build::{Build, BuildEvent};
use daybook_events::chart::{ChartReference, ChartVersion};
use daybook_events::deployment::{Deployment, DeploymentEvent, Version};
use daybook_events::environment::EnvironmentEvent;
use daybook_events::gitops::GitopsEvent;
use daybook_events::routing::{RoutingEvent, SwitchReason, Switched};
use daybook_events::spec::PinnedImage;
use daybook_events::{
    DeploymentId, Digest, Event, ImageRepository, InstanceRef, Position, Recorded, Subject,
};
use serde_json::{Value, json};

use crate::store::{Projections, QueryError};

/// The version of the specification.
pub const SPEC: &str = "0.5.1";

/// The version of all event types that are used here, in that version of the specification.
const TYPES: &str = "0.3.0";

/// What does not change any more about whom an event belongs to.
#[derive(Debug, Default)]
struct Known {
    deployment: Option<Deployment>,
    build: Option<Build>,
}

impl Projections {
    /// What an event means in the words of CDEvents, as JSON; none if it means nothing there, or
    /// is void. The event must be folded.
    pub fn cdevent(&self, recorded: &Recorded, event: &Event) -> Result<Option<Value>, QueryError> {
        let deployment = match &recorded.subject {
            Subject::Deployment(_, _, id) => Some(*id),
            Subject::Routing(_) => match event.payload() {
                Ok(RoutingEvent::Switched(e)) => e.main.and_then(|main| main.next),
                _ => None,
            },
            _ => None,
        };
        let mut known = Known::default();
        if let Some(id) = deployment {
            known.deployment = self.deployment(id)?.map(|row| row.state);
        }
        if let Subject::Build(..) = &recorded.subject {
            known.build = self.folded::<Build>(&recorded.subject)?.state;
        }
        let (at, subject) = (recorded.position, &recorded.subject);
        let found = translate(at, subject, event, &known);
        // Of two events that were accepted beside each other one does not count.
        if found.is_some() && self.is_void(at)? {
            return Ok(None);
        }
        Ok(found)
    }

    /// The same as a CloudEvent in structured mode, as the CloudEvents binding of CDEvents has it.
    pub fn cdevent_message(
        &self,
        recorded: &Recorded,
        event: &Event,
    ) -> Result<Option<Vec<u8>>, QueryError> {
        let Some(cdevent) = self.cdevent(recorded, event)? else {
            return Ok(None);
        };
        let message = json!({
            "specversion": "1.0",
            "id": cdevent["context"]["id"],
            "source": cdevent["context"]["source"],
            "type": cdevent["context"]["type"],
            "subject": cdevent["subject"]["id"],
            "time": cdevent["context"]["timestamp"],
            "datacontenttype": "application/json",
            "data": cdevent,
        });
        // What is made of texts, maps and numbers can be written.
        Ok(serde_json::to_vec(&message).ok())
    }
}

/// What happened to what.
struct Meaning {
    /// Such as `service.deployed`.
    kind: &'static str,
    subject: String,
    content: Value,
    /// What the standard has no place for.
    more: Value,
}

fn meaning(kind: &'static str, subject: impl Into<String>, content: Value) -> Meaning {
    Meaning {
        kind,
        subject: subject.into(),
        content,
        more: json!({}),
    }
}

fn translate(at: Position, subject: &Subject, event: &Event, known: &Known) -> Option<Value> {
    let found = match subject {
        Subject::Deployment(_, _, id) => of_deployment(at, *id, event.payload().ok()?, known)?,
        Subject::Build(_, id) => of_build(&id.to_string(), event.payload().ok()?, known)?,
        Subject::Routing(_) => match event.payload().ok()? {
            RoutingEvent::Switched(e) => of_switch(&e, known)?,
            _ => return None,
        },
        Subject::Gitops(project) => match event.payload().ok()? {
            GitopsEvent::Committed(e) => {
                let repository = json!({ "repository": { "id": format!("{project}/gitops") } });
                meaning("change.merged", e.commit.to_string(), repository)
            }
            _ => return None,
        },
        Subject::Environment(project, name) => {
            let kind = match event.payload().ok()? {
                EnvironmentEvent::Created(_) => "environment.created",
                EnvironmentEvent::Changed(_) => "environment.modified",
                EnvironmentEvent::Deleted(_) => "environment.deleted",
                _ => return None,
            };
            meaning(kind, format!("{project}/{name}"), json!({ "name": name }))
        }
        Subject::Project(_)
        | Subject::Domain(_)
        | Subject::Subscription(..)
        | Subject::Ledger
        | Subject::Access
        | Subject::Other(_) => return None,
    };
    let mut more = found.more;
    more["position"] = at.0.into();
    more["event"] = event.kind.as_str().into();
    more["actor"] = event.authid.as_str().into();
    Some(json!({
        "context": {
            "specversion": SPEC,
            "id": event.id,
            "chainId": event.correlationid,
            "source": event.source,
            "type": format!("dev.cdevents.{}.{TYPES}", found.kind),
            "timestamp": event.time,
        },
        "subject": { "id": found.subject, "source": event.source, "content": found.content },
        "customData": more,
        "customDataContentType": "application/json",
    }))
}

/// The name of a deployment's pipeline.
fn pipeline(instance: &InstanceRef) -> String {
    format!("deploy {instance}")
}

fn of_deployment(
    at: Position,
    id: DeploymentId,
    event: DeploymentEvent,
    known: &Known,
) -> Option<Meaning> {
    let state = known.deployment.as_ref()?;
    // A run ends once. That a cluster was tried again, or a deployment started after it was
    // stopped, is no other end of it.
    let finished = |content: Value, run: &dyn Fn(&'static str, Value) -> Meaning| {
        (state.ended == Some(at)).then(|| run("pipelinerun.finished", content))
    };
    let instance = &state.request.instance;
    let run = |kind, more: Value| {
        let mut content = json!({
            "pipelineName": pipeline(instance),
            "uri": format!("urn:uuid:{id}"),
        });
        if let (Some(content), Value::Object(more)) = (content.as_object_mut(), more) {
            content.extend(more);
        }
        Meaning {
            more: json!({ "instance": instance.to_string() }),
            ..meaning(kind, id.to_string(), content)
        }
    };
    let cloning = |kind| {
        let content = json!({ "taskName": "clone", "pipelineRun": { "id": id } });
        meaning(kind, format!("{id}/clone"), content)
    };
    Some(match event {
        DeploymentEvent::Requested(_) => run("pipelinerun.queued", json!({})),
        DeploymentEvent::Queued(_) => run("pipelinerun.started", json!({})),
        DeploymentEvent::CloningStarted(_) => cloning("taskrun.started"),
        DeploymentEvent::SourceResolved(_) => {
            let mut done = cloning("taskrun.finished");
            done.content["outcome"] = "success".into();
            done
        }
        DeploymentEvent::Succeeded(_) => finished(json!({ "outcome": "success" }), &run)?,
        DeploymentEvent::PartiallySucceeded(e) => {
            let failed: Vec<_> = e.failed.iter().map(|f| f.cluster.to_string()).collect();
            let errors = format!("it failed in {}", failed.join(", "));
            let content = json!({ "outcome": "error", "errors": errors });
            finished(content, &run)?
        }
        DeploymentEvent::Failed(e) => {
            let errors = format!("{}: {}", e.code, e.message);
            let content = json!({ "outcome": "failure", "errors": errors });
            finished(content, &run)?
        }
        DeploymentEvent::Cancelled(e) => {
            let content = json!({ "outcome": "cancel", "errors": e.message });
            finished(content, &run)?
        }
        DeploymentEvent::ImagePinned(e) if e.build.is_some() && !e.shared => {
            meaning("artifact.published", artifact_of(&e.image), json!({}))
        }
        DeploymentEvent::EndpointObserved(e) if e.ready => Meaning {
            more: json!({ "deployment": id, "url": e.url }),
            ..meaning(
                "service.published",
                service(instance),
                json!({ "environment": environment(instance) }),
            )
        },
        _ => return None,
    })
}

fn of_build(id: &str, event: BuildEvent, known: &Known) -> Option<Meaning> {
    let request = &known.build.as_ref()?.request;
    let finished = |outcome: &str, content| Meaning {
        more: json!({ "outcome": outcome }),
        ..meaning("build.finished", id, content)
    };
    Some(match event {
        BuildEvent::Requested(_) => meaning("build.queued", id, json!({})),
        BuildEvent::Started(_) => meaning("build.started", id, json!({})),
        BuildEvent::PushStarted(e) => meaning(
            "artifact.packaged",
            artifact(&request.repository, &e.digest),
            json!({ "change": { "id": request.commit.commit } }),
        ),
        BuildEvent::Succeeded(e) => {
            finished("success", json!({ "artifactId": artifact_of(&e.image) }))
        }
        BuildEvent::Failed(_) => finished("failure", json!({})),
        BuildEvent::Cancelled(_) => finished("cancel", json!({})),
        BuildEvent::BuilderStarted(_) => return None,
    })
}

fn of_switch(switch: &Switched, known: &Known) -> Option<Meaning> {
    let main = switch.main.as_ref()?;
    let place = json!({ "environment": environment(&switch.instance) });
    let service = service(&switch.instance);
    let Some(to) = main.next else {
        return main
            .previous
            .map(|_| meaning("service.removed", service, place));
    };
    let kind = match (switch.reason, main.previous) {
        (SwitchReason::Rollback | SwitchReason::Compensation, Some(_)) => "service.rolledback",
        (_, Some(_)) => "service.upgraded",
        (_, None) => "service.deployed",
    };
    let deployment = known.deployment.as_ref()?;
    let artifact = match (&deployment.image, &deployment.request.version) {
        (Some(image), _) => artifact_of(image),
        (None, Version::Helm { chart, version }) => chart_artifact(chart, version),
        (None, _) => return None,
    };
    let mut content = place;
    content["artifactId"] = artifact.into();
    Some(Meaning {
        more: json!({ "deployment": to, "table": switch.table }),
        ..meaning(kind, service, content)
    })
}

fn service(instance: &InstanceRef) -> String {
    let InstanceRef {
        project,
        environment,
        service,
    } = instance;
    format!("{project}/{environment}/{service}")
}

fn environment(instance: &InstanceRef) -> Value {
    json!({ "id": format!("{}/{}", instance.project, instance.environment) })
}

fn artifact_of(image: &PinnedImage) -> String {
    artifact(&image.repository, &image.digest)
}

/// A package URL of the type `oci`.
fn artifact(repository: &ImageRepository, digest: &Digest) -> String {
    let path = repository.as_str();
    let name = path.rsplit('/').next().unwrap_or(path);
    let digest = digest.as_str().replace(':', "%3A");
    let place = path.replace('/', "%2F").replace(':', "%3A");
    format!("pkg:oci/{name}@{digest}?repository_url={place}")
}

/// A package URL of the type `helm`.
fn chart_artifact(chart: &ChartReference, version: &ChartVersion) -> String {
    let path = chart.as_str();
    let (place, name) = path.rsplit_once('/').unwrap_or(("", path));
    let version = version.as_str().replace('+', "%2B");
    let place = place.replace('/', "%2F").replace(':', "%3A");
    format!("pkg:helm/{name}@{version}?repository_url={place}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_has_a_package_url() {
        let chart = ChartReference::parse("https://charts.example.com:8443/stable/web").unwrap();
        let version = ChartVersion::parse("1.2.3+build.4").unwrap();
        assert_eq!(
            chart_artifact(&chart, &version),
            "pkg:helm/web@1.2.3%2Bbuild.4?repository_url=https%3A%2F%2Fcharts.example.com%3A8443%2Fstable"
        );
    }
}
