//! The catalogue, and what is deployed from it.

use std::collections::BTreeMap;

use axum::extract::State;
use daybook_events::template::Template;
use daybook_events::{Digest, InstanceRef, ParameterName, TemplateName, TemplateVersion};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::answer::Answer;
use crate::catalogue::Shelf;
use crate::commands::DeployTemplate;
use crate::extract::{Command, CommandBody, Named, NoParams, Params};
use crate::problem::Problem;
use crate::routes::deployments::accepted;
use crate::state::AppState;
use crate::view::DeploymentAccepted;

type Handled<T> = Result<Answer<T>, Problem>;

/// An entry of the catalogue in short.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct TemplateEntry {
    /// Its name.
    name: TemplateName,
    /// Its version.
    version: TemplateVersion,
    /// The digest that names exactly this entry.
    digest: Digest,
    /// What it makes.
    description: String,
    /// Where it comes from.
    shelf: Shelf,
}

/// The catalogue.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct TemplateList {
    /// By name.
    templates: Vec<TemplateEntry>,
}

/// An entry of the catalogue.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct TemplateDetail {
    /// The digest that names exactly this entry.
    digest: Digest,
    /// Where it comes from.
    shelf: Shelf,
    /// The entry.
    #[serde(flatten)]
    template: Template,
}

/// What an entry is to become.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DeployFrom {
    /// `project.environment.service`.
    instance_id: String,
    /// The values of its parameters.
    #[serde(default)]
    parameters: BTreeMap<ParameterName, String>,
    /// Why.
    reason: Option<String>,
}
impl CommandBody for DeployFrom {}

/// The templates of the catalogue, by name.
#[utoipa::path(get, path = "/api/v1/templates", tag = "templates",
    responses((status = 200, description = "The catalogue.", body = TemplateList)))]
pub(crate) async fn list_templates(
    State(state): State<AppState>,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<TemplateList> {
    let entry = |(shelf, template): (Shelf, &Template)| TemplateEntry {
        name: template.name.clone(),
        version: template.version.clone(),
        digest: template.digest(),
        description: template.description.clone(),
        shelf,
    };
    let templates = state.settings.catalogue.entries().map(entry).collect();
    Ok(Answer::ok(TemplateList { templates }))
}

/// One template.
#[utoipa::path(get, path = "/api/v1/templates/{template}", tag = "templates",
    params(("template" = String, Path, description = "The template.")),
    responses((status = 200, description = "The template.", body = TemplateDetail)))]
pub(crate) async fn get_template(
    State(state): State<AppState>,
    Named(name): Named<TemplateName>,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<TemplateDetail> {
    let (shelf, template) = state.settings.catalogue.find(&name)?;
    Ok(Answer::ok(TemplateDetail {
        digest: template.digest(),
        shelf,
        template: template.clone(),
    }))
}

/// Resolves a template to the definition of a service, and requests its deployment.
#[utoipa::path(post, path = "/api/v1/templates/{template}/deploy", tag = "templates",
    params(("template" = String, Path, description = "The template.")),
    request_body = DeployFrom,
    responses((status = 201, description = "It is queued.", body = DeploymentAccepted)))]
pub(crate) async fn deploy_template(
    State(state): State<AppState>,
    Named(name): Named<TemplateName>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<DeployFrom>,
) -> Handled<DeploymentAccepted> {
    let instance: InstanceRef = body.instance_id.parse()?;
    let (_, template) = state.settings.catalogue.find(&name)?;
    let wish = DeployTemplate {
        template: template.clone(),
        instance: instance.clone(),
        parameters: body.parameters,
        reason: body.reason,
    };
    let deployed = state.commands.deploy_template(&caller, wish).await?;
    Ok(accepted(&deployed, &instance))
}
