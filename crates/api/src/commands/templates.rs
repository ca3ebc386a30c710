//! Deploying an entry of the catalogue: it is resolved first, and is a service like any other then.

use std::collections::BTreeMap;

use daybook_events::project::{self, ProjectEvent};
use daybook_events::secret::{SecretId, SecretScope};
use daybook_events::template::{Template, TemplateResolved};
use daybook_events::{EnvKey, InstanceRef, ParameterName, Refusal, Subject};
use daybook_secrets::SecretValue;

use super::{Caller, CommandError, Commands, Deploy, Deployed, RunOverrides, What, check};
use crate::access::Verb;

/// A wish for an entry of the catalogue.
#[derive(Debug, Clone)]
pub struct DeployTemplate {
    /// The entry.
    pub template: Template,
    /// What it becomes.
    pub instance: InstanceRef,
    /// The values of its parameters.
    pub parameters: BTreeMap<ParameterName, String>,
    /// Why.
    pub reason: Option<String>,
}

impl Commands {
    /// Resolves an entry to the definition of a service, gives that the secrets which it lacks, and
    /// requests its deployment. Each step leaves what is there as it is: whoever repeats it goes on
    /// where it ended.
    pub async fn deploy_template(
        &self,
        caller: &Caller,
        wish: DeployTemplate,
    ) -> Result<Deployed, CommandError> {
        self.admit(caller, Verb::Deploy, &wish.instance.project)?;
        if let Some((done, Subject::Deployment(_, _, id))) = self.earlier(caller).await? {
            return Ok(Deployed { id, done });
        }
        check::text("reason", wish.reason.as_deref())?;
        let instance = wish.instance;
        let environment = self.environment(&instance.project, &instance.environment)?;
        environment.must_be_active()?;
        let resolved = wish
            .template
            .resolve(instance.service.clone(), &wish.parameters)?;
        check::service(&resolved.spec)?;
        self.clusters(&environment.spec.clusters)?;
        self.can_be_given(&instance, &wish.template)?;
        self.define(caller, &instance, resolved.clone()).await?;
        self.give_secrets(caller, &instance, &wish.template).await?;
        let what = match &resolved.image {
            Some(image) => What::Image(image.to_string()),
            None => What::Default,
        };
        let wish = Deploy {
            instance,
            what,
            clusters: None,
            switch: None,
            allow_partial: false,
            run: RunOverrides::default(),
            reason: wish.reason,
        };
        // Somebody may have defined the service otherwise since: what was resolved is deployed.
        let id = caller.deployment_id();
        self.deploy_as(caller, id, wish, (resolved.spec, environment))
            .await
    }

    async fn define(
        &self,
        caller: &Caller,
        instance: &InstanceRef,
        resolved: TemplateResolved,
    ) -> Result<(), CommandError> {
        let subject = Subject::Project(instance.project.clone());
        let event = Box::new(resolved);
        self.run(&caller.step("template"), &subject, None, |state| {
            project::decide(state, ProjectEvent::TemplateResolved(event.clone()))
        })
        .await
        .map(|_| ())
    }

    /// Refuses an entry with a secret that is neither set nor made by itself, before anything is done.
    fn can_be_given(
        &self,
        instance: &InstanceRef,
        template: &Template,
    ) -> Result<(), CommandError> {
        for (name, secret) in &template.secrets {
            if self.has_secret(instance, name)? {
                continue;
            }
            if secret.generate.is_some() {
                self.secret_store()?;
            } else {
                let InstanceRef {
                    project,
                    environment,
                    service,
                } = instance;
                return Err(Refusal::new(
                    "template_secret_missing",
                    format!("the secret {name} is not set: {}", secret.description),
                    format!(
                        "set it first with `daybook secret set {project} {name} --env \
                         {environment}`; with `--service {service}` where there is that service"
                    ),
                )
                .into());
            }
        }
        Ok(())
    }

    async fn give_secrets(
        &self,
        caller: &Caller,
        instance: &InstanceRef,
        template: &Template,
    ) -> Result<(), CommandError> {
        for (name, secret) in &template.secrets {
            let Some(length) = secret.generate else {
                continue;
            };
            if self.has_secret(instance, name)? {
                continue;
            }
            let value = SecretValue::generate(length as usize).map_err(CommandError::from)?;
            let id = SecretId {
                name: name.clone(),
                scope: SecretScope {
                    environment: Some(instance.environment.clone()),
                    service: Some(instance.service.clone()),
                },
            };
            // Without a key: a repetition that comes here has another value.
            let caller = Caller {
                key: None,
                ..caller.clone()
            };
            self.set_secret(&caller, instance.project.clone(), id, &value)
                .await?;
        }
        Ok(())
    }

    /// Whether an instance gets a secret of this name.
    fn has_secret(&self, instance: &InstanceRef, name: &EnvKey) -> Result<bool, CommandError> {
        let secrets = self.project(&instance.project)?.secrets;
        Ok(daybook_events::secret::applicable(&secrets, instance).contains_key(name))
    }
}
