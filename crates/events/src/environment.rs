//! The environment aggregate: where a project's services run, from its creation to its end.
//!
//! An environment is deleted in two steps. From the moment when that is asked for, nothing new is
//! deployed to it; once nothing of it runs or is routed, and its folder is out of the GitOps
//! repository, it is gone, and its name can be used again.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::ser::SerializeStruct as _;
use serde::{Deserialize, Serialize, Serializer};

use crate::aggregate::{Aggregate, At, Decision, Illegal, Refusal, events};
use crate::approval::ApprovalRule;
use crate::deployment::SwitchMode;
use crate::envelope::Payload;
use crate::freeze::{self, FreezeRemoved, FreezeSet, Freezes};
use crate::log::Position;
use crate::names::{ClusterName, CommitId, EnvironmentName, EventId, GitRef, ProjectName};
use crate::preview::{
    Preview, PullRequestClosed, PullRequestHeadFound, PullRequestOpened, PullRequestUpdated,
};
use crate::subject::AggregateKind;
use crate::timer::KeepFor;

/// What an environment is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EnvironmentSpec {
    /// Clusters that deployments go to unless they name others.
    #[serde(default)]
    pub clusters: Vec<ClusterName>,
    /// Whether its services answer on the project's live hostnames. One environment of a project
    /// usually does: production.
    #[serde(default)]
    pub live: bool,
    /// Whether traffic follows a new deployment by itself.
    #[serde(default)]
    pub switch: SwitchMode,
    /// Whether it goes away with its pull request.
    #[serde(default)]
    pub ephemeral: bool,
    /// How long a deployment is kept running that is no longer the main one; as the server says
    /// if not given.
    #[serde(default)]
    pub keep_old: Option<KeepFor>,
    /// How long a deployment is kept running that nobody asks for through the gateway; 24 hours for
    /// an ephemeral environment, and for ever for any other one, if not given.
    #[serde(default)]
    pub keep_idle: Option<KeepFor>,
    /// Who has to allow what is deployed to it; nobody if not given.
    #[serde(default)]
    pub approval: Option<ApprovalRule>,
}

impl EnvironmentSpec {
    /// How long a deployment is kept that nobody asks for.
    pub fn idle(&self) -> KeepFor {
        match self.keep_idle {
            Some(keep) => keep,
            None if self.ephemeral => KeepFor::IDLE,
            None => KeepFor::Never,
        }
    }
}

/// As derived, but that JSON leaves out what is not given of that which came later. Rows of
/// projections, which are not self-describing, always have it.
impl Serialize for EnvironmentSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let json = serializer.is_human_readable();
        let keep_old = !(json && self.keep_old.is_none());
        let keep_idle = !(json && self.keep_idle.is_none());
        let approval = !(json && self.approval.is_none());
        let later = [keep_old, keep_idle, approval];
        let fields = 4 + later.into_iter().filter(|given| *given).count();
        let mut out = serializer.serialize_struct("EnvironmentSpec", fields)?;
        out.serialize_field("clusters", &self.clusters)?;
        out.serialize_field("live", &self.live)?;
        out.serialize_field("switch", &self.switch)?;
        out.serialize_field("ephemeral", &self.ephemeral)?;
        if keep_old {
            out.serialize_field("keep_old", &self.keep_old)?;
        }
        if keep_idle {
            out.serialize_field("keep_idle", &self.keep_idle)?;
        }
        if approval {
            out.serialize_field("approval", &self.approval)?;
        }
        out.end()
    }
}

/// An environment was created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Created {
    /// The project.
    pub project: ProjectName,
    /// Its name.
    pub name: EnvironmentName,
    /// What it is.
    pub spec: EnvironmentSpec,
    /// The environment that it was made from: whatever takes the traffic there is promoted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<EnvironmentName>,
    /// The branch whose pushes are deployed to it by themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_deploy: Option<GitRef>,
}

/// From now on pushes to a branch are deployed to it by themselves, or no longer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AutoDeploySet {
    /// The branch; none for no pushes.
    pub branch: Option<GitRef>,
}

/// Its definition was replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Changed {
    /// What it is now.
    pub spec: EnvironmentSpec,
}

/// Somebody asked to delete it, with all that runs in it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct DeletionRequested {
    /// Why, in the caller's words.
    pub reason: Option<String>,
}

/// Nothing of it is left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Deleted {
    /// The GitOps commit that took its folder out; none if there never was one.
    pub commit: Option<CommitId>,
}

events! {
    /// The events of an environment.
    EnvironmentEvent {
        /// It was created.
        Created(Created) = "environment.created.v1",
        /// It was redefined.
        Changed(Changed) = "environment.changed.v1",
        /// Pushes to a branch are deployed to it, or no longer.
        AutoDeploySet(AutoDeploySet) = "environment.auto_deploy_set.v1",
        /// Its pull request was opened.
        PullRequestOpened(Box<PullRequestOpened>) = "environment.pull_request_opened.v1",
        /// Its pull request has changed.
        PullRequestUpdated(Box<PullRequestUpdated>) = "environment.pull_request_updated.v1",
        /// The newest head of its pull request was found.
        PullRequestHeadFound(PullRequestHeadFound) = "environment.pull_request_head_found.v1",
        /// Its pull request was closed.
        PullRequestClosed(Box<PullRequestClosed>) = "environment.pull_request_closed.v1",
        /// It has a window in which it is frozen.
        FreezeSet(FreezeSet) = "environment.freeze_set.v1",
        /// It has that window no more.
        FreezeRemoved(FreezeRemoved) = "environment.freeze_removed.v1",
        /// It is to be deleted.
        DeletionRequested(DeletionRequested) = "environment.deletion_requested.v1",
        /// It is deleted.
        Deleted(Deleted) = "environment.deleted.v1",
    }
}

/// Whether an environment is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EnvironmentStatus {
    /// It can be deployed to.
    Active,
    /// What runs in it is being removed.
    Deleting,
    /// It is gone.
    Deleted,
}

/// The state of an environment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// The project.
    pub project: ProjectName,
    /// Its name.
    pub name: EnvironmentName,
    /// What it is.
    pub spec: EnvironmentSpec,
    /// The environment that it was made from.
    pub from: Option<EnvironmentName>,
    /// When it was created.
    pub created_at: Timestamp,
    /// Whether it is there.
    pub status: EnvironmentStatus,
    /// The event that made the status what it is.
    pub status_event: EventId,
    /// Where that event is.
    pub status_position: Position,
    /// The branch whose pushes are deployed to it by themselves.
    pub auto_deploy: Option<GitRef>,
    /// The pull request that it is for, if there ever was one.
    pub preview: Option<Preview>,
    /// The windows in which it is frozen.
    pub freezes: Freezes,
}

impl Environment {
    fn new(e: Created, at: At) -> Self {
        Self {
            project: e.project,
            name: e.name,
            spec: e.spec,
            from: e.from,
            created_at: at.time,
            status: EnvironmentStatus::Active,
            status_event: at.id,
            status_position: at.position,
            auto_deploy: e.auto_deploy,
            preview: None,
            freezes: Freezes::new(),
        }
    }

    /// An environment that is there for as long as its pull request.
    fn of_pull_request(e: PullRequestOpened, at: At) -> Self {
        let created = Created {
            project: e.project.clone(),
            name: e.name.clone(),
            spec: e.spec.clone(),
            from: e.from.clone(),
            auto_deploy: None,
        };
        Self {
            preview: Some(Preview::opened(e, at)),
            ..Self::new(created, at)
        }
    }

    /// What is known of an environment whose pull request was closed before it could be made.
    fn never_made(e: PullRequestClosed, at: At) -> Self {
        let created = Created {
            project: e.project.clone(),
            name: e.name.clone(),
            spec: EnvironmentSpec::default(),
            from: None,
            auto_deploy: None,
        };
        Self {
            status: EnvironmentStatus::Deleted,
            preview: Some(Preview::closed(e, at)),
            ..Self::new(created, at)
        }
    }

    fn enter(&mut self, status: EnvironmentStatus, at: At) {
        self.status = status;
        self.status_event = at.id;
        self.status_position = at.position;
    }

    /// Refuses whatever only an environment can be asked for that is there to stay.
    pub fn must_be_active(&self) -> Result<(), Refusal> {
        match self.status {
            EnvironmentStatus::Active => Ok(()),
            EnvironmentStatus::Deleting => Err(Refusal::new(
                "environment_deleting",
                format!("the environment {} is being deleted", self.name),
                "wait until it is gone and create it again, or use another one",
            )),
            EnvironmentStatus::Deleted => Err(not_found()),
        }
    }
}

impl Aggregate for Environment {
    type Event = EnvironmentEvent;
    const KIND: AggregateKind = AggregateKind::Environment;

    fn first(event: EnvironmentEvent, at: At) -> Result<Self, Illegal> {
        match event {
            EnvironmentEvent::Created(e) => Ok(Self::new(e, at)),
            EnvironmentEvent::PullRequestOpened(e) => Ok(Self::of_pull_request(*e, at)),
            EnvironmentEvent::PullRequestClosed(e) => Ok(Self::never_made(*e, at)),
            other => Err(Illegal::new(
                other.kind(),
                "an environment that does not exist",
            )),
        }
    }

    fn apply(&mut self, event: EnvironmentEvent, at: At) -> Result<(), Illegal> {
        use EnvironmentStatus::{Active, Deleted, Deleting};
        let kind = event.kind();
        match (self.status, event) {
            (Deleted, EnvironmentEvent::Created(e)) => {
                let preview = self.preview.take().map(|known| Preview {
                    dismissed: false,
                    ..known
                });
                *self = Self {
                    preview,
                    ..Self::new(e, at)
                };
            }
            (Active, EnvironmentEvent::Changed(e)) => self.spec = e.spec,
            (Active, EnvironmentEvent::AutoDeploySet(e)) => self.auto_deploy = e.branch,
            (Active, EnvironmentEvent::FreezeSet(e)) => {
                self.freezes.insert(e.name, e.freeze);
            }
            (Active, EnvironmentEvent::FreezeRemoved(e)) => {
                self.freezes.remove(&e.name);
            }
            (Active, EnvironmentEvent::DeletionRequested(_)) => {
                if let Some(preview) = &mut self.preview {
                    preview.dismissed = preview.open;
                }
                self.enter(Deleting, at);
            }
            (Deleting, EnvironmentEvent::DeletionRequested(_)) => {
                if let Some(preview) = &mut self.preview {
                    preview.dismissed = preview.open;
                }
            }
            (Deleted, EnvironmentEvent::PullRequestOpened(e)) => {
                *self = Self::of_pull_request(*e, at);
            }
            // It is made again when it is gone.
            (Deleting, EnvironmentEvent::PullRequestOpened(e)) => {
                self.preview = Some(Preview::opened(*e, at));
            }
            (_, EnvironmentEvent::PullRequestUpdated(e)) if self.preview.is_some() => {
                self.preview
                    .iter_mut()
                    .for_each(|p| p.update((*e).clone(), at));
            }
            (_, EnvironmentEvent::PullRequestHeadFound(e)) if self.preview.is_some() => {
                self.preview
                    .iter_mut()
                    .for_each(|p| p.find_head(e.clone(), at));
            }
            (_, EnvironmentEvent::PullRequestClosed(e)) => {
                let closed = Preview::closed(*e, at);
                self.preview = Some(match self.preview.take() {
                    Some(known) => Preview {
                        pull_request: closed.pull_request,
                        open: false,
                        rivals: Vec::new(),
                        ..known
                    },
                    None => closed,
                });
                if self.status == Active {
                    self.enter(Deleting, at);
                }
            }
            (Deleting, EnvironmentEvent::Deleted(_)) => self.enter(Deleted, at),
            (status, _) => {
                let state = match status {
                    Active => "an environment that exists",
                    Deleting => "an environment that is being deleted",
                    Deleted => "an environment that was deleted",
                };
                return Err(Illegal::new(kind, state));
            }
        }
        Ok(())
    }
}

fn not_found() -> Refusal {
    Refusal::new(
        "environment_not_found",
        "there is no such environment",
        "create it with `daybook env create PROJECT NAME`",
    )
}

/// Decides whether `event` may be appended. Asking again to delete what is being deleted is an event
/// of its own, with which the workers go on where they gave up; what is deleted stays so.
pub fn decide(
    state: Option<&Environment>,
    event: EnvironmentEvent,
) -> Result<Decision<EnvironmentEvent>, Refusal> {
    use EnvironmentStatus::{Active, Deleted, Deleting};
    let status = state.map_or(Deleted, |e| e.status);
    if let EnvironmentEvent::Created(Created { spec, .. })
    | EnvironmentEvent::Changed(Changed { spec }) = &event
        && let Some(rule) = &spec.approval
    {
        rule.check()?;
    }
    match (state, &event) {
        (_, EnvironmentEvent::Created(_)) if status == Deleted => Ok(Decision::Append(event)),
        (Some(e), EnvironmentEvent::Created(_)) => {
            e.must_be_active()?;
            Err(Refusal::new(
                "environment_exists",
                format!("the environment {} exists already", e.name),
                "use it, or choose another name",
            ))
        }
        (None, _) => Err(not_found()),
        (Some(s), EnvironmentEvent::Changed(e)) => {
            s.must_be_active()?;
            Ok(if s.spec == e.spec {
                Decision::Nothing
            } else {
                Decision::Append(event)
            })
        }
        (Some(s), EnvironmentEvent::AutoDeploySet(e)) => {
            s.must_be_active()?;
            Ok(if s.auto_deploy == e.branch {
                Decision::Nothing
            } else {
                Decision::Append(event)
            })
        }
        (Some(s), EnvironmentEvent::FreezeSet(e)) => {
            s.must_be_active()?;
            Ok(match freeze::sets(s, e)? {
                true => Decision::Append(event),
                false => Decision::Nothing,
            })
        }
        (Some(s), EnvironmentEvent::FreezeRemoved(e)) => {
            s.must_be_active()?;
            freeze::removes(s, e)?;
            Ok(Decision::Append(event))
        }
        // Deliveries are decided on in `preview::decide`, which knows what came before them.
        (Some(s), EnvironmentEvent::PullRequestHeadFound(e)) => match &s.preview {
            Some(p) if !p.rivals.is_empty() => Ok(Decision::Append(event)),
            Some(p) if p.pull_request.head == e.head => Ok(Decision::Nothing),
            _ => Err(Refusal::new(
                "head_known",
                "the newest head of the pull request is known already",
                "nothing has to be done",
            )),
        },
        (
            Some(_),
            EnvironmentEvent::PullRequestOpened(_)
            | EnvironmentEvent::PullRequestUpdated(_)
            | EnvironmentEvent::PullRequestClosed(_),
        ) => Err(Refusal::new(
            "not_a_delivery",
            "pull requests are opened and closed by their provider",
            "change the pull request itself",
        )),
        (Some(_), EnvironmentEvent::DeletionRequested(_)) => Ok(match status {
            Active | Deleting => Decision::Append(event),
            Deleted => Decision::Nothing,
        }),
        (Some(_), EnvironmentEvent::Deleted(_)) => match status {
            Deleting => Ok(Decision::Append(event)),
            Deleted => Ok(Decision::Nothing),
            Active => Err(Refusal::new(
                "environment_active",
                "nobody asked to delete the environment",
                "ask for it with `daybook env delete PROJECT NAME`",
            )),
        },
    }
}
