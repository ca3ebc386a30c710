//! Uploading the source of a service, where it is in no repository that a worker could read.

use axum::extract::{Request, State};
use axum::http::header;
use daybook_events::{CommitId, Digest, ProjectName, Refusal, RepositoryUrl, ServiceName};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use crate::access::Principal;
use crate::answer::Answer;
use crate::commands::{Caller, CommandError, RequestKey};
use crate::extract::{Command, CommandBody, Named, NoParams, Params, actor, trace_here};
use crate::problem::Problem;
use crate::state::AppState;
use crate::uploads::{self, PACK, Uploads};

/// Most objects that one request asks after.
const ASKED_MAX: usize = 5000;

/// The address that uploads are sent to: requests to it may take longer than others.
pub(crate) const RECEIVES: &str = "/api/v1/projects/{project}/services/{service}/uploads";

type Handled<T> = Result<Answer<T>, Problem>;

/// The content of a folder that was uploaded.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct UploadView {
    /// The service that it is for.
    service: ServiceName,
    /// The commit to deploy: `upload` of POST /api/v1/deployments.
    commit: CommitId,
    /// The id of its tree: the same content has the same.
    tree: CommitId,
    /// What deployments of it name as their repository. No server has it: `git clone` finds it below
    /// `/uploads/` of this one.
    url: RepositoryUrl,
}

/// Objects of git: files and folders by what they contain.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct AskedObjects {
    /// Their ids, at most 5000.
    objects: Vec<CommitId>,
}
impl CommandBody for AskedObjects {}

/// What has to be uploaded.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct MissingObjects {
    /// Those that are not here yet.
    missing: Vec<CommitId>,
    /// Most bytes of an upload.
    max_bytes: u64,
}

/// What is uploaded.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct UploadQuery {
    /// The commit that the pack has: forty hexadecimal digits.
    commit: String,
}

/// The uploads of a service that there is.
fn of(state: &AppState, project: &ProjectName, service: &ServiceName) -> Result<Uploads, Problem> {
    if !state
        .commands
        .project(project)?
        .services
        .contains_key(service)
    {
        return Err(Refusal::new(
            "service_not_found",
            format!("the project {project} has no service {service}"),
            "define the service first: `daybook service create`",
        )
        .into());
    }
    Ok(uploads(state)?.of(project, service))
}

fn uploads(state: &AppState) -> Result<&uploads::UploadSettings, Problem> {
    let uploads = state.settings.uploads.as_ref();
    Ok(uploads.ok_or_else(|| {
        Refusal::new(
            "uploads_off",
            "this server takes no uploads",
            "deploy a git ref or an image, or ask another server",
        )
    })?)
}

fn view(
    project: &ProjectName,
    service: ServiceName,
    commit: CommitId,
    tree: CommitId,
) -> UploadView {
    UploadView {
        url: RepositoryUrl::of_uploads(project, &service),
        service,
        commit,
        tree,
    }
}

/// What was uploaded with this content, if anything was: then it need not be uploaded again.
#[utoipa::path(get, path = "/api/v1/projects/{project}/services/{service}/uploads/{tree}",
    tag = "uploads",
    params(
        ("project" = String, Path, description = "The project."),
        ("service" = String, Path, description = "The service."),
        ("tree" = String, Path, description = "The id of the tree: forty hexadecimal digits."),
    ),
    responses((status = 200, description = "The first upload with this content.", body = UploadView)))]
pub(crate) async fn get_upload(
    State(state): State<AppState>,
    Named((project, service, tree)): Named<(ProjectName, ServiceName, CommitId)>,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<UploadView> {
    let found = of(&state, &project, &service)?.by_tree(&tree).await?;
    let commit = found.ok_or_else(|| {
        Refusal::new(
            "upload_not_found",
            format!(
                "nothing with the tree {} was uploaded for {service}",
                tree.short()
            ),
            "upload it",
        )
    })?;
    Ok(Answer::ok(view(&project, service, commit, tree)))
}

/// Which objects have to be uploaded, as the server does not have them yet. Changes nothing.
#[utoipa::path(post, path = "/api/v1/projects/{project}/services/{service}/uploads/missing",
    tag = "uploads",
    params(
        ("project" = String, Path, description = "The project."),
        ("service" = String, Path, description = "The service."),
    ),
    request_body = AskedObjects,
    responses((status = 200, description = "Those that are missing.", body = MissingObjects)))]
pub(crate) async fn missing_objects(
    State(state): State<AppState>,
    Named((project, service)): Named<(ProjectName, ServiceName)>,
    Params(NoParams {}): Params<NoParams>,
    Command { body, .. }: Command<AskedObjects>,
) -> Handled<MissingObjects> {
    let uploads = of(&state, &project, &service)?;
    if body.objects.len() > ASKED_MAX {
        return Err(Refusal::new(
            "too_many_objects",
            format!("these are more than {ASKED_MAX} objects"),
            "ask after them in several requests",
        )
        .into());
    }
    Ok(Answer::ok(MissingObjects {
        missing: uploads.missing(body.objects).await?,
        max_bytes: self::uploads(&state)?.max_bytes,
    }))
}

fn location(project: &ProjectName, service: &ServiceName, tree: &CommitId) -> String {
    format!("/api/v1/projects/{project}/services/{service}/uploads/{tree}")
}

/// Takes an upload: a pack with one commit without parents and all of its content that is not here
/// yet, as whole objects. The same content is kept once; uploading it again changes nothing.
#[utoipa::path(post, path = "/api/v1/projects/{project}/services/{service}/uploads",
    tag = "uploads",
    params(
        ("project" = String, Path, description = "The project."),
        ("service" = String, Path, description = "The service."),
        UploadQuery,
    ),
    request_body(content = String, content_type = "application/x-git-packed-objects"),
    responses((status = 201, description = "It is here, and can be deployed.", body = UploadView)))]
pub(crate) async fn create_upload(
    State(state): State<AppState>,
    Named((project, service)): Named<(ProjectName, ServiceName)>,
    Params(query): Params<UploadQuery>,
    principal: Principal,
    request: Request,
) -> Handled<UploadView> {
    let uploads = of(&state, &project, &service)?;
    let named = CommitId::parse(query.commit)?;
    let (parts, body) = request.into_parts();
    if parts
        .headers
        .get(header::CONTENT_TYPE)
        .is_none_or(|t| t != PACK)
    {
        return Err(Problem::new(
            axum::http::StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            "the body is not said to be a pack",
            format!("send a pack with the header Content-Type: {PACK}"),
        ));
    }
    let actor = actor(&principal, &parts.headers)?;
    let received = uploads.receive(&parts.headers, body).await?;
    if received.commit != named {
        return Err(Refusal::new(
            "other_commit",
            format!(
                "the pack has commit {} and not {}",
                received.commit.short(),
                named.short()
            ),
            "name the commit that the pack has",
        )
        .into());
    }
    // Whoever uploads the same once more gets what the ledger has, whatever they say of when it was
    // made and by whom.
    if let Some(commit) = uploads.by_tree(&received.tree).await?
        && commit != named
    {
        let location = location(&project, &service, &received.tree);
        let body = view(&project, service, commit, received.tree.clone());
        return Ok(Answer::ok(body).created(location));
    }
    // First what is, then the record of it, then what makes it found: whoever is interrupted uploads
    // again, and the record is made once.
    let keeps = uploads.take_in(&received)?;
    let operation = format!("upload {project}/{service}");
    let key = RequestKey::new(
        &actor,
        &operation,
        named.as_str(),
        Digest::of(named.as_str().as_bytes()).to_string(),
    );
    let caller = Caller {
        key: Some(key),
        traceparent: trace_here(&parts.headers),
        ..Caller::of(actor, principal)
    };
    let event = daybook_events::upload::SourceUploaded {
        service: service.clone(),
        commit: received.commit.clone(),
        tree: received.tree.clone(),
        bytes: received.bytes,
    };
    let recorded = state.commands.record_upload(&caller, &project, event);
    let done = recorded.await.inspect_err(|error| {
        // What is refused gets no ref; where the outcome is not known, it may have got its record.
        if matches!(error, CommandError::Refused(_) | CommandError::Denied(_)) {
            Uploads::give_up(&keeps);
        }
    })?;
    uploads.publish(&received, &keeps).await?;
    let location = location(&project, &service, &received.tree);
    let body = view(&project, service, named, received.tree.clone());
    drop(received);
    tokio::spawn(async move { uploads.tidy().await });
    Ok(Answer::done(&done, body).created(location))
}
