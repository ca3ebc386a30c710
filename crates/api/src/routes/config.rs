//! How a service instance runs: instances and environment variables.

use std::collections::{BTreeMap, BTreeSet};

use axum::extract::State;
use daybook_events::EnvKey;
use daybook_events::deployment::SwitchMode;
use schemars::JsonSchema;
use serde::Deserialize;

use super::deployments::instance;
use crate::answer::Answer;
use crate::commands::Configure;
use crate::extract::{Command, CommandBody, NoParams, Params};
use crate::problem::Problem;
use crate::state::AppState;
use crate::view::{DeploymentAccepted, OperationAccepted};

type Handled<T> = Result<Answer<T>, Problem>;

/// How many instances are to run: of an instance (`instance_id`, or `project`, `environment` and
/// `service`).
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ScaleTo {
    /// `project.environment.service`.
    instance_id: Option<String>,
    /// The project.
    project: Option<String>,
    /// The environment.
    environment: Option<String>,
    /// The service.
    service: Option<String>,
    /// Instances in each cluster: 1 to 100.
    replicas: u32,
    /// Why.
    reason: Option<String>,
}
impl CommandBody for ScaleTo {}

/// Environment variables to be changed: of an instance (`instance_id`, or `project`, `environment`
/// and `service`).
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ChangeConfig {
    /// `project.environment.service`.
    instance_id: Option<String>,
    /// The project.
    project: Option<String>,
    /// The environment.
    environment: Option<String>,
    /// The service.
    service: Option<String>,
    /// Variables with their new values.
    #[serde(default)]
    set: BTreeMap<String, String>,
    /// Variables to be taken away.
    #[serde(default)]
    unset: BTreeSet<String>,
    /// Whether traffic follows by itself; as the environment says if not given.
    switch: Option<SwitchMode>,
    /// Why.
    reason: Option<String>,
}
impl CommandBody for ChangeConfig {}

/// Scales the main deployment of a service in place. Later deployments have as many instances.
#[utoipa::path(post, path = "/api/v1/scale", tag = "deployments",
    request_body = ScaleTo,
    responses((status = 202, description = "It is accepted.", body = OperationAccepted)))]
pub(crate) async fn scale(
    State(state): State<AppState>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<ScaleTo>,
) -> Handled<OperationAccepted> {
    let instance = instance(
        body.instance_id,
        body.project,
        body.environment,
        body.service,
    )?;
    let commands = &state.commands;
    let operated = commands
        .scale(&caller, &instance, body.replicas, body.reason)
        .await?;
    let accepted = OperationAccepted {
        id: operated.id,
        status: "scaling",
    };
    Ok(Answer::done(&operated.done, accepted).accepted())
}

/// Changes environment variables of a service: a new deployment of what runs already, with the same
/// image. Later deployments have them too.
#[utoipa::path(post, path = "/api/v1/config", tag = "deployments",
    request_body = ChangeConfig,
    responses(
        (status = 200, description = "It was so already.", body = DeploymentAccepted),
        (status = 201, description = "It is accepted.", body = DeploymentAccepted),
    ))]
pub(crate) async fn change_config(
    State(state): State<AppState>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<ChangeConfig>,
) -> Handled<DeploymentAccepted> {
    let instance = instance(
        body.instance_id,
        body.project,
        body.environment,
        body.service,
    )?;
    let set = body.set.into_iter();
    let wish = Configure {
        set: set
            .map(|(key, value)| Ok((EnvKey::parse(key)?, value)))
            .collect::<Result<_, Problem>>()?,
        unset: body
            .unset
            .into_iter()
            .map(|key| Ok(EnvKey::parse(key)?))
            .collect::<Result<_, Problem>>()?,
        instance: instance.clone(),
        switch: body.switch,
        reason: body.reason,
    };
    let deployed = state.commands.configure(&caller, wish).await?;
    let changed = deployed.done.event.is_some();
    let accepted = DeploymentAccepted {
        id: deployed.id,
        status: if changed { "queued" } else { "unchanged" },
        instance_id: instance.to_string(),
    };
    let answer = Answer::done(&deployed.done, accepted);
    Ok(if changed {
        answer.created(format!("/api/v1/deployments/{}", deployed.id))
    } else {
        answer
    })
}
