//! The project aggregate: a project, its services and its secret variables.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::aggregate::{Aggregate, At, Decision, Illegal, Refusal, events};
use crate::envelope::Payload;
use crate::hook::{self, BranchPushed, Hook, HookDefined, HookRemoved};
use crate::names::{HookName, ProjectName, RepositoryUrl, ServiceName};
use crate::secret::{self, Secret, SecretId, SecretSet, SecretUnset, SecretsErased};
use crate::spec::ServiceSpec;
use crate::subject::AggregateKind;
use crate::template::{TemplateOrigin, TemplateResolved};
use crate::upload::{self, SourceUploaded};

/// A project was created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Created {
    /// Its name.
    pub name: ProjectName,
    /// What it is, for people.
    pub description: Option<String>,
}

/// A service was added, or its definition replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ServiceDefined {
    /// Its name.
    pub name: ServiceName,
    /// The whole definition. Deployments take a snapshot of it when they are requested.
    pub spec: ServiceSpec,
}

/// The project's GitOps repository is pushed elsewhere from here on, or nowhere any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GitopsRemoteChanged {
    /// Where its commits go; none to keep them on the machine of the workers alone. It never
    /// contains a credential: those are the server's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<RepositoryUrl>,
}

events! {
    /// The events of a project.
    ProjectEvent {
        /// It was created.
        Created(Created) = "project.created.v1",
        /// A service was added or redefined.
        ServiceDefined(Box<ServiceDefined>) = "project.service_defined.v1",
        /// A service was made from a template.
        TemplateResolved(Box<TemplateResolved>) = "project.template_resolved.v1",
        /// A secret was given a value.
        SecretSet(SecretSet) = "project.secret_set.v1",
        /// A secret was taken away.
        SecretUnset(SecretUnset) = "project.secret_unset.v1",
        /// A webhook was added or redefined.
        HookDefined(Box<HookDefined>) = "project.hook_defined.v1",
        /// A webhook was removed.
        HookRemoved(HookRemoved) = "project.hook_removed.v1",
        /// A branch was pushed to.
        BranchPushed(BranchPushed) = "project.branch_pushed.v1",
        /// All secrets were taken away, and their values and keys erased.
        SecretsErased(SecretsErased) = "project.secrets_erased.v1",
        /// Its GitOps repository has another remote.
        GitopsRemoteChanged(GitopsRemoteChanged) = "project.gitops_remote_changed.v1",
        /// The content of a folder was uploaded for a service.
        SourceUploaded(SourceUploaded) = "project.source_uploaded.v1",
    }
}

/// The state of a project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Project {
    /// Its name.
    pub name: ProjectName,
    /// What it is.
    pub description: Option<String>,
    /// When it was created.
    pub created_at: Timestamp,
    /// Its services.
    pub services: BTreeMap<ServiceName, ServiceSpec>,
    /// Its secrets, by name and scope; also those that are no longer set, for their versions.
    pub secrets: Vec<Secret>,
    /// Where the commits of its GitOps repository are pushed.
    pub gitops_remote: Option<RepositoryUrl>,
    /// Its webhooks.
    pub hooks: BTreeMap<HookName, Hook>,
    /// The templates that services were made from, as long as nobody has redefined them.
    pub templates: BTreeMap<ServiceName, TemplateOrigin>,
}

impl Project {
    /// What is known of a secret, whether it is still set or not.
    pub fn secret(&self, id: &SecretId) -> Option<&Secret> {
        let found = self.secrets.binary_search_by(|s| s.id.cmp(id)).ok()?;
        self.secrets.get(found)
    }

    /// The keys that the newest versions of its secrets are committed under.
    pub fn secret_keys(&self) -> BTreeSet<Uuid> {
        self.secrets.iter().map(|s| s.key).collect()
    }

    fn change_secret(&mut self, secret: Secret) {
        match self.secrets.binary_search_by(|s| s.id.cmp(&secret.id)) {
            Ok(found) => self.secrets[found] = secret,
            Err(place) => self.secrets.insert(place, secret),
        }
    }
}

impl Aggregate for Project {
    type Event = ProjectEvent;
    const KIND: AggregateKind = AggregateKind::Project;

    fn first(event: ProjectEvent, at: At) -> Result<Self, Illegal> {
        match event {
            ProjectEvent::Created(e) => Ok(Self {
                name: e.name,
                description: e.description,
                created_at: at.time,
                services: BTreeMap::new(),
                secrets: Vec::new(),
                gitops_remote: None,
                hooks: BTreeMap::new(),
                templates: BTreeMap::new(),
            }),
            other => Err(Illegal::new(other.kind(), "a project that does not exist")),
        }
    }

    fn apply(&mut self, event: ProjectEvent, at: At) -> Result<(), Illegal> {
        match event {
            ProjectEvent::Created(_) => {
                return Err(Illegal::new("project.created.v1", "a project that exists"));
            }
            ProjectEvent::ServiceDefined(e) => {
                self.templates.remove(&e.name);
                self.services.insert(e.name, e.spec);
            }
            ProjectEvent::TemplateResolved(e) => {
                self.templates.insert(e.name.clone(), e.origin());
                self.services.insert(e.name, e.spec);
            }
            ProjectEvent::SecretSet(e) => {
                let last = self.secret(&e.secret).map_or(0, |s| s.version);
                if Some(e.version) != last.checked_add(1) {
                    let state = format!("version {last} of {}", e.secret);
                    return Err(Illegal::new("project.secret_set.v1", state));
                }
                self.change_secret(Secret {
                    id: e.secret,
                    version: e.version,
                    commitment: e.commitment,
                    key: e.key,
                    is_set: true,
                    changed_at: at.time,
                    changed_by: at.position,
                });
            }
            ProjectEvent::SecretUnset(e) => match self.secret(&e.secret) {
                Some(secret) if secret.is_set && secret.version == e.version => {
                    self.change_secret(Secret {
                        is_set: false,
                        changed_at: at.time,
                        changed_by: at.position,
                        ..secret.clone()
                    });
                }
                _ => {
                    let state = format!("no version {} of {}", e.version, e.secret);
                    return Err(Illegal::new("project.secret_unset.v1", state));
                }
            },
            ProjectEvent::HookDefined(e) => {
                self.hooks.insert(e.hook.name.clone(), e.hook);
            }
            ProjectEvent::HookRemoved(e) => {
                if self.hooks.remove(&e.name).is_none() {
                    let state = format!("no webhook {}", e.name);
                    return Err(Illegal::new("project.hook_removed.v1", state));
                }
            }
            // What follows from it is for the workers; the project stays as it is.
            ProjectEvent::BranchPushed(_) => {}
            ProjectEvent::SecretsErased(e) => {
                if e.keys != self.secret_keys() {
                    return Err(Illegal::new("project.secrets_erased.v1", "other keys"));
                }
                for secret in self.secrets.iter_mut().filter(|s| s.is_set) {
                    secret.is_set = false;
                    secret.changed_at = at.time;
                    secret.changed_by = at.position;
                }
            }
            ProjectEvent::GitopsRemoteChanged(e) => self.gitops_remote = e.url,
            // What is there is for the repository of uploads to say; the project stays as it is.
            ProjectEvent::SourceUploaded(_) => {}
        }
        Ok(())
    }
}

/// Refuses a definition that could never be deployed.
fn check_spec(spec: &ServiceSpec) -> Result<(), Refusal> {
    if let Some(source) = &spec.source {
        crate::deployment::check_folder(&source.path)?;
        upload::refuse_as_source(&source.url)?;
    }
    if let Some(dockerfile) = &spec.build.dockerfile {
        crate::deployment::check_folder(dockerfile)?;
    }
    spec.run.check_capacity()?;
    spec.run.check_volumes()
}

/// Decides whether `event` may be appended. Creating what exists already is refused; defining a
/// service exactly as it is changes nothing, and so does setting a secret to the value that it
/// has.
pub fn decide(
    state: Option<&Project>,
    event: ProjectEvent,
) -> Result<Decision<ProjectEvent>, Refusal> {
    match (state, &event) {
        (None, ProjectEvent::Created(_)) => Ok(Decision::Append(event)),
        (None, _) => Err(Refusal::new(
            "project_not_found",
            "there is no such project",
            "create it with `daybook project create NAME`",
        )),
        (Some(p), ProjectEvent::Created(_)) => Err(Refusal::new(
            "project_exists",
            format!("the project {} exists already", p.name),
            "use it, or choose another name",
        )),
        (Some(p), ProjectEvent::ServiceDefined(e)) => {
            check_spec(&e.spec)?;
            if p.services.get(&e.name) == Some(&e.spec) {
                Ok(Decision::Nothing)
            } else {
                Ok(Decision::Append(event))
            }
        }
        (Some(p), ProjectEvent::TemplateResolved(e)) => {
            check_spec(&e.spec)?;
            let same = p.services.get(&e.name) == Some(&e.spec)
                && p.templates.get(&e.name) == Some(&e.origin());
            Ok(match same {
                true => Decision::Nothing,
                false => Decision::Append(event),
            })
        }
        (Some(p), ProjectEvent::SecretSet(e)) => {
            secret::check_name(&e.secret.name)?;
            if let Some(service) = &e.secret.scope.service
                && !p.services.contains_key(service)
            {
                return Err(Refusal::new(
                    "service_not_found",
                    format!("the project {} has no service {service}", p.name),
                    "define the service first, or leave it out to set the secret for all",
                ));
            }
            let last = p.secret(&e.secret);
            if last.is_some_and(|s| s.is_set && s.commitment == e.commitment) {
                return Ok(Decision::Nothing);
            }
            let next = last.map_or(1, |s| s.version.saturating_add(1));
            if e.version != next {
                return Err(Refusal::new(
                    "stale_secret_version",
                    format!("the next version of {} is {next}", e.secret),
                    "look at the secret again and repeat the command",
                ));
            }
            Ok(Decision::Append(event))
        }
        (Some(p), ProjectEvent::SecretUnset(e)) => match p.secret(&e.secret) {
            None => Err(Refusal::new(
                "secret_not_found",
                format!("the project {} has no secret {}", p.name, e.secret),
                format!(
                    "`daybook secret list {}` shows all with their scopes",
                    p.name
                ),
            )),
            Some(s) if !s.is_set => Ok(Decision::Nothing),
            Some(s) if s.version != e.version => Err(Refusal::new(
                "stale_secret_version",
                format!("{} is at version {} by now", e.secret, s.version),
                "look at the secret again and repeat the command",
            )),
            Some(_) => Ok(Decision::Append(event)),
        },
        (Some(p), ProjectEvent::HookDefined(e)) => {
            hook::check(p, &e.hook)?;
            Ok(if p.hooks.get(&e.hook.name) == Some(&e.hook) {
                Decision::Nothing
            } else {
                Decision::Append(event)
            })
        }
        (Some(p), ProjectEvent::HookRemoved(e)) => match p.hooks.contains_key(&e.name) {
            true => Ok(Decision::Append(event)),
            false => Err(hook::not_found(&e.name)),
        },
        (Some(p), ProjectEvent::BranchPushed(e)) => match p.hooks.contains_key(&e.hook) {
            true => Ok(Decision::Append(event)),
            false => Err(hook::not_found(&e.hook)),
        },
        (Some(p), ProjectEvent::SecretsErased(e)) => {
            if p.secrets.is_empty() {
                return Err(Refusal::new(
                    "no_secrets",
                    format!("the project {} never had a secret", p.name),
                    "there is nothing to erase",
                ));
            }
            if e.keys != p.secret_keys() {
                return Err(Refusal::new(
                    "stale_secret_keys",
                    format!("a secret of {} was set meanwhile", p.name),
                    "repeat the command if that one is to be erased too",
                ));
            }
            Ok(Decision::Append(event))
        }
        (Some(p), ProjectEvent::GitopsRemoteChanged(e)) if p.gitops_remote == e.url => {
            Ok(Decision::Nothing)
        }
        (Some(_), ProjectEvent::GitopsRemoteChanged(_)) => Ok(Decision::Append(event)),
        (Some(p), ProjectEvent::SourceUploaded(e)) => match p.services.contains_key(&e.service) {
            true => Ok(Decision::Append(event)),
            false => Err(Refusal::new(
                "service_not_found",
                format!("the project {} has no service {}", p.name, e.service),
                "define the service first",
            )),
        },
    }
}
