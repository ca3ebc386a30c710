//! Webhooks: their definitions, and what their deliveries change.

use std::collections::BTreeMap;

use daybook_events::environment::{AutoDeploySet, Environment, EnvironmentEvent, EnvironmentSpec};
use daybook_events::hook::delivery::{Delivered, PullRequestDelivery, PushDelivery};
use daybook_events::hook::{
    BranchPushed, Hook, HookDefined, HookRemoved, Provider, repository_key,
};
use daybook_events::preview::{self, PullRequest, Seen};
use daybook_events::project::{self, Project, ProjectEvent};
use daybook_events::secret::SecretRef;
use daybook_events::{
    EnvironmentName, GitRef, HookName, ProjectName, Refusal, Subject, environment,
};
use daybook_secrets::SecretValue;

use super::{Caller, CommandError, Commands, Done};
use crate::access::Verb;

/// Most characters of a title that are kept.
const TITLE_MAX: usize = 200;
/// Most characters of an address that are kept.
const URL_MAX: usize = 500;

/// What a webhook is to be.
#[derive(Debug, Clone)]
pub struct HookWish {
    /// Its name.
    pub name: HookName,
    /// Who calls it.
    pub provider: Provider,
    /// What its deliveries are signed with; as it is, if not given.
    pub secret: Option<SecretValue>,
    /// The environment that those of pull requests are made from.
    pub base: Option<EnvironmentName>,
    /// What their names begin with.
    pub prefix: EnvironmentName,
    /// Whether pull requests from other repositories get one.
    pub forks: bool,
}

/// What became of a delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Received {
    /// It is recorded, and carried out from here on whatever happens.
    Accepted {
        /// How it was recorded.
        done: Done,
        /// What follows.
        message: String,
        /// The environment of the pull request.
        environment: Option<EnvironmentName>,
    },
    /// There is nothing to be done for it.
    Ignored {
        /// A stable code for programs.
        code: &'static str,
        /// Why.
        message: String,
    },
}

fn ignored(code: &'static str, message: impl Into<String>) -> Received {
    Received::Ignored {
        code,
        message: message.into(),
    }
}

impl Commands {
    /// A webhook of a project.
    pub fn hook(&self, project: &ProjectName, name: &HookName) -> Result<Hook, CommandError> {
        let found = self.project(project)?.hooks.remove(name);
        Ok(found.ok_or_else(|| {
            Refusal::new(
                "hook_not_found",
                format!("the project {project} has no webhook {name}"),
                format!("add it with `daybook hook add {project} --provider PROVIDER`"),
            )
        })?)
    }

    /// What the deliveries of a webhook are signed with.
    pub(crate) async fn hook_secret(
        &self,
        project: &ProjectName,
        hook: &Hook,
    ) -> Result<SecretValue, CommandError> {
        let variable = hook.secret.secret.clone();
        let wanted = BTreeMap::from([(variable.clone(), hook.secret.clone())]);
        let mut found = self.secret_store()?.resolve(project, &wanted).await?;
        Ok(found.remove(&variable).ok_or_else(|| {
            Refusal::new(
                "secret_missing",
                format!(
                    "the secret of the webhook {} is not in the secret store",
                    hook.name
                ),
                "make a new one with `daybook hook rotate`",
            )
        })?)
    }

    /// Adds a webhook, or defines it anew. Its secret is kept first and recorded then, as a
    /// commitment; the one before is erased.
    pub async fn define_hook(
        &self,
        caller: &Caller,
        project: ProjectName,
        wish: HookWish,
    ) -> Result<Done, CommandError> {
        self.admit(caller, Verb::Configure, &project)?;
        if let Some((done, _)) = self.earlier(caller).await? {
            return Ok(done);
        }
        let known = self.project(&project)?;
        if let Some(base) = &wish.base {
            self.environment(&project, base)?.must_be_active()?;
        }
        let before = known.hooks.get(&wish.name).map(|h| h.secret.clone());
        let secret = match (&wish.secret, &before) {
            (Some(value), _) => {
                let version = before.as_ref().map_or(1, |s| s.version.saturating_add(1));
                let id = Hook::secret_id(&wish.name, version)?;
                let committed = self.secret_store()?.put(&project, &id, value).await?;
                SecretRef {
                    secret: id.name,
                    scope: id.scope,
                    version,
                    commitment: committed.commitment,
                }
            }
            (None, Some(secret)) => secret.clone(),
            (None, None) => {
                return Err(Refusal::new(
                    "hook_secret_required",
                    "a new webhook needs a secret",
                    "send a long random text; `daybook hook add` makes one",
                )
                .into());
            }
        };
        let event = HookDefined {
            hook: Hook {
                name: wish.name,
                provider: wish.provider,
                secret: secret.clone(),
                base: wish.base,
                prefix: wish.prefix,
                forks: wish.forks,
            },
        };
        let subject = Subject::Project(project.clone());
        let done = self
            .run(caller, &subject, None, |state| {
                project::decide(state, ProjectEvent::HookDefined(Box::new(event.clone())))
            })
            .await?;
        if let Some(old) = before.filter(|old| *old != secret) {
            self.secret_store()?.erase(&project, &old.id()).await?;
        }
        Ok(done)
    }

    /// Removes a webhook, and erases its secret.
    pub async fn remove_hook(
        &self,
        caller: &Caller,
        project: ProjectName,
        name: HookName,
    ) -> Result<Done, CommandError> {
        self.admit(caller, Verb::Configure, &project)?;
        let secret = self
            .project(&project)?
            .hooks
            .remove(&name)
            .map(|h| h.secret);
        let subject = Subject::Project(project.clone());
        let event = HookRemoved { name };
        let done = self
            .run(caller, &subject, None, |state| {
                project::decide(state, ProjectEvent::HookRemoved(event.clone()))
            })
            .await?;
        // A removal that is asked for once more was carried out: what is there now was added since.
        if let Some(secret) = secret.filter(|_| !done.replayed) {
            self.secret_store()?.erase(&project, &secret.id()).await?;
        }
        Ok(done)
    }

    /// From now on pushes to a branch are deployed to an environment by themselves, or no longer.
    pub async fn set_auto_deploy(
        &self,
        caller: &Caller,
        project: ProjectName,
        name: EnvironmentName,
        branch: Option<GitRef>,
    ) -> Result<Done, CommandError> {
        self.admit(caller, Verb::Configure, &project)?;
        self.environment(&project, &name)?;
        let subject = Subject::Environment(project, name);
        let event = AutoDeploySet { branch };
        self.run(caller, &subject, None, |state| {
            environment::decide(state, EnvironmentEvent::AutoDeploySet(event.clone()))
        })
        .await
    }

    /// Records what a delivery changes, if it changes anything. The caller's key is the
    /// provider's id of the delivery.
    pub async fn receive(
        &self,
        caller: &Caller,
        project: &ProjectName,
        hook: &Hook,
        delivered: Delivered,
    ) -> Result<Received, CommandError> {
        match delivered {
            Delivered::PullRequest(delivery) => {
                self.pull_request(caller, project, hook, *delivery).await
            }
            Delivered::Push(push) => self.pushed(caller, project, hook, push).await,
            Delivered::Other { code, why } => Ok(ignored(code, why)),
        }
    }

    async fn pull_request(
        &self,
        caller: &Caller,
        name: &ProjectName,
        hook: &Hook,
        delivery: PullRequestDelivery,
    ) -> Result<Received, CommandError> {
        let project = self.project(name)?;
        let Some(repository) = source_among(&project, &delivery.repository) else {
            return Ok(other_repository(name));
        };
        let environment = hook.environment(delivery.number)?;
        let subject = Subject::Environment(name.clone(), environment.clone());
        let known = self.ledger.projections().environment(name, &environment)?;
        // One that has an environment, from when it was allowed, still loses it.
        if delivery.foreign && !hook.forks && known.is_none_or(|e| e.preview.is_none()) {
            return Ok(ignored(
                "foreign_head",
                "its head is in another repository, whose code would be built and run here; \
                 `daybook hook add --forks` allows that",
            ));
        }
        if delivery.foreign && !hook.forks && delivery.open {
            return Ok(ignored(
                "foreign_head",
                "its head is in another repository, and the webhook does not allow that any more",
            ));
        }
        let clusters = match &hook.base {
            Some(base) => match self.ledger.projections().environment(name, base)? {
                Some(base) => base.spec.clusters,
                None => self.settings.known_clusters.clone(),
            },
            None => self.settings.known_clusters.clone(),
        };
        let from = match &hook.base {
            Some(base) => self
                .ledger
                .projections()
                .environment(name, base)?
                .filter(|e| e.must_be_active().is_ok())
                .map(|e| e.name),
            None => None,
        };
        let seen = Seen {
            project: name.clone(),
            name: environment.clone(),
            spec: EnvironmentSpec {
                clusters,
                ephemeral: true,
                ..EnvironmentSpec::default()
            },
            from,
            action: delivery.action,
            open: delivery.open,
            pull_request: PullRequest {
                hook: hook.name.clone(),
                repository,
                number: delivery.number,
                title: self.shown(name, &delivery.title, TITLE_MAX),
                url: web_address(&self.shown(name, &delivery.url, URL_MAX)),
                head: delivery.head,
                before: delivery.before,
                head_ref: delivery.head_ref,
                updated_at: delivery.updated_at,
            },
        };
        let (open, head) = (seen.open, seen.pull_request.head.clone());
        let done = self
            .run(caller, &subject, None, |state: Option<&Environment>| {
                preview::decide(state, seen.clone())
            })
            .await;
        let done = match done {
            Ok(done) => done,
            Err(CommandError::Refused(r)) if preview::IGNORED.contains(&r.code) => {
                return Ok(ignored(r.code, r.message));
            }
            Err(e) => return Err(e),
        };
        if done.event.is_none() {
            return Ok(ignored("unchanged", "this is known already"));
        }
        let message = if open {
            format!("{} gets the commit {}", environment, head.short())
        } else {
            format!("{environment} goes, if it is there")
        };
        Ok(Received::Accepted {
            done,
            message,
            environment: Some(environment),
        })
    }

    async fn pushed(
        &self,
        caller: &Caller,
        name: &ProjectName,
        hook: &Hook,
        push: PushDelivery,
    ) -> Result<Received, CommandError> {
        let project = self.project(name)?;
        let Some(repository) = source_among(&project, &push.repository) else {
            return Ok(other_repository(name));
        };
        let asking: Vec<_> = self
            .ledger
            .projections()
            .environments(name)?
            .into_iter()
            .filter(|e| e.auto_deploy.as_ref() == Some(&push.branch) && e.must_be_active().is_ok())
            .map(|e| e.name.to_string())
            .collect();
        if asking.is_empty() {
            return Ok(ignored(
                "branch_not_wanted",
                "no environment asks for this branch; `daybook env auto-deploy` makes one ask",
            ));
        }
        let event = BranchPushed {
            hook: hook.name.clone(),
            repository,
            branch: push.branch,
            head: push.head,
        };
        let subject = Subject::Project(name.clone());
        let done = self
            .run(caller, &subject, None, |state| {
                project::decide(state, ProjectEvent::BranchPushed(event.clone()))
            })
            .await?;
        Ok(Received::Accepted {
            done,
            message: format!("{} is deployed to {}", event.branch, asking.join(", ")),
            environment: None,
        })
    }

    /// A text from outside as it may be kept and shown.
    fn shown(&self, project: &ProjectName, text: &str, max: usize) -> String {
        let plain = text.chars().map(|c| if c.is_control() { ' ' } else { c });
        let plain: String = plain.collect();
        // Masked before it is cut: nobody recognises half a secret.
        let masked = match &self.secrets {
            Some(store) => store
                .masker_or_withhold(Some(project))
                .mask(&plain)
                .into_owned(),
            None => plain,
        };
        masked.chars().take(max).collect()
    }
}

/// The repository that services of a project have their source in and that has one of these
/// addresses.
fn source_among(project: &Project, addresses: &[String]) -> Option<String> {
    let delivered: Vec<_> = addresses.iter().map(|a| repository_key(a)).collect();
    let sources = project.services.values().filter_map(|s| s.source.as_ref());
    sources
        .map(|source| repository_key(source.url.as_str()))
        .find(|key| delivered.contains(key))
}

fn other_repository(project: &ProjectName) -> Received {
    ignored(
        "other_repository",
        format!("no service of the project {project} has its source in this repository"),
    )
}

/// An address that a page may link to.
fn web_address(text: &str) -> String {
    if text.starts_with("https://") || text.starts_with("http://") {
        text.to_owned()
    } else {
        String::new()
    }
}
