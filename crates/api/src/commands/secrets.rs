//! Secret variables: set, verified and taken away. Their values go to the secret store, and
//! commitments to them into the ledger.

use std::sync::Arc;

use daybook_events::project::{self, Project, ProjectEvent};
use daybook_events::secret::{self, Secret, SecretId, SecretSet, SecretUnset, SecretsErased};
use daybook_events::{Aggregate, Event, Position, ProjectName, Refusal, Subject, SubjectFilter};
use daybook_secrets::{SecretError, SecretStore, SecretValue};

use super::{Caller, CommandError, Commands, Done};
use crate::access::Verb;

/// What a comparison with a committed value came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    /// The version that the value was compared with.
    pub version: u32,
    /// Whether it is that version's value.
    pub matches: bool,
}

impl Commands {
    /// Where values are kept, if this server keeps any.
    pub(crate) fn secret_store(&self) -> Result<&Arc<dyn SecretStore>, Refusal> {
        self.secrets.as_ref().ok_or_else(|| {
            Refusal::new(
                "secrets_unavailable",
                "this server has no secret store",
                "start the server with --secrets DIR",
            )
        })
    }

    /// The secrets of a project that are set, by name and scope.
    pub(crate) fn secrets(&self, project: &ProjectName) -> Result<Vec<Secret>, CommandError> {
        let mut secrets = self.project(project)?.secrets;
        secrets.retain(|s| s.is_set);
        Ok(secrets)
    }

    /// One secret, whether it is still set or not.
    pub(crate) fn secret(
        &self,
        project: &ProjectName,
        id: &SecretId,
    ) -> Result<Secret, CommandError> {
        let found = self.project(project)?.secret(id).cloned();
        Ok(found.ok_or_else(|| secret_not_found(project, id))?)
    }

    /// The event that changed a secret last.
    pub(crate) async fn last_change(&self, secret: &Secret) -> Result<Event, CommandError> {
        self.event(secret.changed_by).await
    }

    /// Gives a secret a value. The value is kept first and recorded then: what the ledger knows
    /// of can be found. Setting the value that it has already changes nothing.
    pub async fn set_secret(
        &self,
        caller: &Caller,
        project: ProjectName,
        id: SecretId,
        value: &SecretValue,
    ) -> Result<Done, CommandError> {
        self.admit(caller, Verb::Deploy, &project)?;
        secret::check_name(&id.name)?;
        self.project(&project)?;
        if let Some(environment) = &id.scope.environment {
            self.environment(&project, environment)?;
        }
        if let Some(service) = &id.scope.service {
            self.service(&project, service)?;
        }
        if let Some((done, _)) = self.earlier(caller).await? {
            return Ok(done);
        }
        let committed = self.secret_store()?.put(&project, &id, value).await?;
        self.run(
            caller,
            &Subject::Project(project),
            None,
            |state: Option<&Project>| {
                let last = state.and_then(|p| p.secret(&id));
                let event = SecretSet {
                    secret: id.clone(),
                    version: last.map_or(1, |s| s.version.saturating_add(1)),
                    commitment: committed.commitment.clone(),
                    key: committed.key,
                };
                project::decide(state, ProjectEvent::SecretSet(event))
            },
        )
        .await
    }

    /// Takes a secret away: later deployments do not get it. With `erase`, its values are erased
    /// too, of all versions.
    pub async fn unset_secret(
        &self,
        caller: &Caller,
        project: ProjectName,
        id: SecretId,
        erase: bool,
    ) -> Result<Done, CommandError> {
        self.admit(caller, Verb::Deploy, &project)?;
        self.project(&project)?;
        let store = self.secret_store()?.clone();
        let subject = Subject::Project(project.clone());
        let done = self
            .run(caller, &subject, None, |state: Option<&Project>| {
                let last = state.and_then(|p| p.secret(&id));
                let event = SecretUnset {
                    secret: id.clone(),
                    version: last.map_or(0, |s| s.version),
                };
                project::decide(state, ProjectEvent::SecretUnset(event))
            })
            .await?;
        if erase {
            store.erase(&project, &id).await?;
        }
        Ok(done)
    }

    /// Takes all secrets of a project away, and erases their values, of all versions, with the key
    /// of their commitments. It is recorded first: whoever repeats it after a crash in between
    /// erases what was left.
    pub async fn erase_secrets(
        &self,
        caller: &Caller,
        project: ProjectName,
    ) -> Result<Done, CommandError> {
        self.admit(caller, Verb::Configure, &project)?;
        self.project(&project)?;
        let store = self.secret_store()?.clone();
        let subject = Subject::Project(project.clone());
        let done = self
            .run(caller, &subject, None, |state: Option<&Project>| {
                let keys = state.map(Project::secret_keys).unwrap_or_default();
                project::decide(state, ProjectEvent::SecretsErased(SecretsErased { keys }))
            })
            .await?;
        store.forget(&project).await?;
        Ok(done)
    }

    /// Compares a value with what is committed to, of one version or the newest.
    pub async fn verify_secret(
        &self,
        caller: &Caller,
        project: &ProjectName,
        id: &SecretId,
        version: Option<u32>,
        value: &SecretValue,
    ) -> Result<Verified, CommandError> {
        self.admit(caller, Verb::Deploy, project)?;
        let secret = self.secret(project, id)?;
        let version = version.unwrap_or(secret.version);
        let (commitment, key) = if version == secret.version {
            (secret.commitment, secret.key)
        } else {
            self.committed(project, id, version).await?
        };
        let given = self.secret_store()?.commitment(project, id, value).await?;
        if given.key != key {
            return Err(Refusal::new(
                "secret_key_erased",
                format!("the key that version {version} of {id} was committed under is erased"),
                "nothing can be said about its value any more",
            )
            .into());
        }
        let matches = given.commitment == commitment;
        Ok(Verified { version, matches })
    }

    /// What the ledger holds of an older version.
    async fn committed(
        &self,
        project: &ProjectName,
        id: &SecretId,
        version: u32,
    ) -> Result<(secret::Commitment, uuid::Uuid), CommandError> {
        const PAGE: usize = 500;
        let filter = SubjectFilter::exactly(Subject::Project(project.clone()));
        let mut after = Position::ZERO;
        loop {
            let page = self.ledger.log().read(after, &filter, PAGE).await?;
            let Some(last) = page.last() else {
                return Err(no_such_version(id, version).into());
            };
            after = last.position;
            for recorded in &page {
                let event = recorded.event().ok();
                let payload = event.and_then(|e| e.payload::<<Project as Aggregate>::Event>().ok());
                if let Some(ProjectEvent::SecretSet(e)) = payload
                    && e.secret == *id
                    && e.version == version
                {
                    return Ok((e.commitment, e.key));
                }
            }
        }
    }
}

impl From<SecretError> for CommandError {
    fn from(e: SecretError) -> Self {
        if e.is_retryable() {
            Self::Secrets(e)
        } else {
            Self::Refused(Refusal::new(e.code(), e.to_string(), e.remedy()))
        }
    }
}

fn secret_not_found(project: &ProjectName, id: &SecretId) -> Refusal {
    Refusal::new(
        "secret_not_found",
        format!("the project {project} has no secret {id}"),
        format!(
            "`daybook secret list {project}` shows all with their scopes, as does GET \
             /api/v1/projects/{project}/secrets"
        ),
    )
}

fn no_such_version(id: &SecretId, version: u32) -> Refusal {
    Refusal::new(
        "secret_version_not_found",
        format!("there is no version {version} of {id}"),
        "leave the version out to compare with the newest one",
    )
}
