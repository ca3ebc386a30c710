//! GitOps repositories: what the ledger knows of them, and what people decide about commits that
//! Daybook did not make.

use axum::body::Body;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use daybook_events::environment::EnvironmentStatus;
use daybook_events::gitops::{
    ForeignCommit, ForeignSignature, ForeignStatus, Gitops, HistoryRewritten, RemoteStep,
    RemoteTrouble,
};
use daybook_events::{
    CommitId, DeploymentId, EnvironmentName, ProjectName, Refusal, RepositoryUrl,
};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio_util::io::ReaderStream;
use utoipa::IntoParams;

use super::deployments::Why;
use super::secrets::Nothing;
use crate::answer::Answer;
use crate::commands::{Caller, CommandError, Commands};
use crate::extract::{Command, CommandBody, Named, NoParams, Params};
use crate::problem::Problem;
use crate::state::AppState;
use crate::view::ProjectView;
use crate::{eject, git};

/// A GitOps repository, as the ledger knows it.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct GitopsView {
    /// The project.
    project: ProjectName,
    /// Its branch.
    branch: String,
    /// The newest commit that the ledger records.
    head: CommitId,
    /// How many commits it records.
    commits: u64,
    /// Public keys that commits were or are signed with, oldest first.
    signers: Vec<String>,
    /// Commits that Daybook did not make, oldest first, at most 256.
    foreign: Vec<ForeignView>,
    /// How many of them wait for somebody's decision.
    undecided: usize,
    /// Set while the branch does not contain what the ledger records: nothing is committed then.
    rewritten: Option<HistoryRewritten>,
    /// Where its commits are pushed; none if it is on the server alone.
    remote: Option<RepositoryUrl>,
    /// Set while the remote does not do what it is asked: since when, and why. Commits wait, and
    /// are tried again.
    remote_trouble: Option<RemoteTroubleView>,
}

/// What is wrong with a remote.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct RemoteTroubleView {
    /// Since when it does not do what it is asked, whatever the reasons were.
    since: Timestamp,
    /// What it was asked last.
    during: RemoteStep,
    /// A stable code.
    code: String,
    /// What happened, in one sentence.
    message: String,
    /// What helps.
    remedy: String,
}

impl From<RemoteTrouble> for RemoteTroubleView {
    fn from(t: RemoteTrouble) -> Self {
        Self {
            since: t.since,
            during: t.failing.during,
            code: t.failing.code,
            message: t.failing.message,
            remedy: t.failing.remedy,
        }
    }
}

/// Where commits are to be pushed.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SetRemote {
    /// An https or ssh URL without a credential. Its branch `main` must be new, or have what the
    /// repository has.
    url: String,
}
impl CommandBody for SetRemote {}

/// A commit that Daybook did not make.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ForeignView {
    /// The commit.
    commit: CommitId,
    /// How many commits its history has, itself included.
    ordinal: Option<u64>,
    /// Author as `Name <address>`; whoever commits can write anything here.
    author: String,
    /// First line of its message.
    message: String,
    /// Environments whose files it changes.
    environments: Vec<EnvironmentName>,
    /// The commit that it says it reverts.
    reverts: Option<CommitId>,
    /// The deployment that it takes back, which is rolled back for it.
    undoes: Option<DeploymentId>,
    /// Whose signature it carries.
    signature: ForeignSignature,
    /// When it was found.
    found_at: Timestamp,
    /// What became of it.
    status: ForeignStatus,
    /// Why it could not be undone, when that was tried last.
    problem: Option<String>,
}

impl From<ForeignCommit> for ForeignView {
    fn from(f: ForeignCommit) -> Self {
        Self {
            commit: f.commit,
            ordinal: f.ordinal,
            author: f.author,
            message: f.message,
            environments: f.environments,
            reverts: f.reverts,
            undoes: f.undoes.map(|u| u.deployment),
            signature: f.signature,
            found_at: f.found,
            status: f.status,
            problem: f.problem,
        }
    }
}

/// A decision that was recorded.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Decided {
    /// The commit.
    commit: CommitId,
    /// What becomes of it.
    status: ForeignStatus,
}

type Handled<T> = Result<Answer<T>, Problem>;

fn repository(commands: &Commands, project: &ProjectName) -> Result<Gitops, Problem> {
    commands.project(project)?;
    let found = commands.ledger().projections().gitops(project)?;
    Ok(found.ok_or_else(|| {
        Refusal::new(
            "repository_not_found",
            format!("the project {project} has no GitOps repository yet"),
            "deploy something, which makes it",
        )
    })?)
}

/// What the ledger knows of a project's GitOps repository, and which commits it did not make.
#[utoipa::path(get, path = "/api/v1/projects/{project}/gitops", tag = "gitops",
    params(("project" = String, Path, description = "The project.")),
    responses((status = 200, description = "The repository.", body = GitopsView)))]
pub(crate) async fn get_gitops(
    State(state): State<AppState>,
    Named(project): Named<ProjectName>,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<GitopsView> {
    let gitops = repository(&state.commands, &project)?;
    let remote = state.commands.project(&project)?.gitops_remote;
    Ok(Answer::ok(GitopsView {
        project,
        undecided: gitops.undecided().count(),
        remote,
        remote_trouble: gitops.remote_trouble.map(Into::into),
        branch: gitops.branch,
        head: gitops.head,
        commits: gitops.commits,
        signers: gitops.signers,
        foreign: gitops.foreign.into_iter().map(Into::into).collect(),
        rewritten: gitops.rewritten,
    }))
}

/// Says where the commits of a project's GitOps repository are pushed from here on. What is there
/// already is pushed within moments. The credentials for it are the server's own.
#[utoipa::path(put, path = "/api/v1/projects/{project}/gitops/remote", tag = "gitops",
    params(("project" = String, Path, description = "The project.")),
    request_body = SetRemote,
    responses((status = 200, description = "It is set.", body = ProjectView)))]
pub(crate) async fn set_remote(
    State(state): State<AppState>,
    Named(project): Named<ProjectName>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<SetRemote>,
) -> Handled<ProjectView> {
    let url = RepositoryUrl::parse(body.url)?;
    change_remote(&state, &caller, project, Some(url)).await
}

/// Says that commits are pushed nowhere any more. The repository stays on the server as it is.
#[utoipa::path(delete, path = "/api/v1/projects/{project}/gitops/remote", tag = "gitops",
    params(("project" = String, Path, description = "The project.")),
    responses((status = 200, description = "There is none any more.", body = ProjectView)))]
pub(crate) async fn clear_remote(
    State(state): State<AppState>,
    Named(project): Named<ProjectName>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, .. }: Command<Nothing>,
) -> Handled<ProjectView> {
    change_remote(&state, &caller, project, None).await
}

async fn change_remote(
    state: &AppState,
    caller: &Caller,
    project: ProjectName,
    url: Option<RepositoryUrl>,
) -> Handled<ProjectView> {
    let commands = &state.commands;
    let done = commands
        .change_gitops_remote(caller, project.clone(), url.clone())
        .await?;
    let mut view = ProjectView::from(&commands.project(&project)?);
    view.gitops_remote = url;
    Ok(Answer::done(&done, view))
}

/// What a commit of a project's GitOps repository changes, as `git` shows it; at most one mebibyte.
#[utoipa::path(get, path = "/api/v1/projects/{project}/gitops/commits/{commit}/diff",
    tag = "gitops",
    params(
        ("project" = String, Path, description = "The project."),
        ("commit" = String, Path, description = "The commit: forty hexadecimal digits."),
    ),
    responses((status = 200, description = "The difference to its first parent.", body = String,
        content_type = "text/x-diff")))]
pub(crate) async fn commit_diff(
    State(state): State<AppState>,
    Named((project, commit)): Named<(ProjectName, CommitId)>,
    Params(NoParams {}): Params<NoParams>,
) -> Result<Response, Problem> {
    repository(&state.commands, &project)?;
    let diff = git::diff(&state, &project, &commit).await?;
    let headers = [
        (header::CONTENT_TYPE, "text/x-diff; charset=utf-8"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    Ok((headers, diff).into_response())
}

/// The form of an archive.
#[derive(Debug, Default, Clone, Copy, Deserialize, JsonSchema, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ArchiveForm {
    /// A zip archive without compression.
    #[default]
    Zip,
    /// A tar archive.
    Tar,
}

/// How a repository is ejected.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct EjectQuery {
    /// `zip` (if not given) or `tar`.
    #[serde(default)]
    #[param(inline)]
    format: ArchiveForm,
}

/// The whole GitOps repository of a project as an archive that stands alone: files, history, an Argo
/// CD Application for each environment, and how to go on without Daybook. Secrets are not in it; if
/// somebody committed the value of one, it is refused. The same state gives the same bytes.
#[utoipa::path(get, path = "/api/v1/projects/{project}/gitops/eject", tag = "gitops",
    params(("project" = String, Path, description = "The project."), EjectQuery),
    responses((status = 200, description = "The archive.", content(
        (String = "application/zip"), (String = "application/x-tar")))))]
pub(crate) async fn eject_gitops(
    State(state): State<AppState>,
    Named(project): Named<ProjectName>,
    Params(query): Params<EjectQuery>,
) -> Result<Response, Problem> {
    let commands = &state.commands;
    repository(commands, &project)?;
    let missing = || {
        Refusal::new(
            "repository_not_here",
            format!("the GitOps repository of {project} is not on this server"),
            "ask the server that has it, or clone its remote",
        )
    };
    let root = state.settings.git_root.as_ref().ok_or_else(missing)?;
    let folder = root.join(format!("{project}.git"));
    if !folder.is_dir() {
        return Err(missing().into());
    }
    let environments = state.projections().environments(&project)?.into_iter();
    let store = commands.secret_store().ok();
    let masker = store.map(|store| store.masker(Some(&project))).transpose();
    let (form, media_type, ending) = match query.format {
        ArchiveForm::Zip => (eject::Form::Zip, "application/zip", "zip"),
        ArchiveForm::Tar => (eject::Form::Tar, "application/x-tar", "tar"),
    };
    let wish = eject::Wish {
        repository: folder,
        places: environments
            .filter(|e| e.status != EnvironmentStatus::Deleted)
            .map(|e| eject::Place {
                name: e.name,
                ephemeral: e.spec.ephemeral,
            })
            .collect(),
        remote: commands.project(&project)?.gitops_remote,
        form,
        masker: masker.map_err(CommandError::Secrets)?,
        project,
    };
    let place = git::place()?;
    let name = format!("{}-gitops.{ending}", wish.project);
    let made = tokio::task::spawn_blocking(move || {
        let made = eject::archive(&wish);
        drop(place);
        made
    });
    let file = made
        .await
        .map_err(|e| Problem::internal(&e))?
        .map_err(|e| match e {
            eject::EjectError::Secret { .. } => Problem::from(Refusal::new(
                "repository_contains_secret",
                e.to_string(),
                "somebody committed it by hand: change the secret, and take the value out of the \
                 history",
            )),
            eject::EjectError::Io(_) => Problem::internal(&e),
        })?;
    let body = Body::from_stream(ReaderStream::new(tokio::fs::File::from_std(file)));
    let headers = [
        (header::CONTENT_TYPE, media_type.to_owned()),
        (
            header::CONTENT_DISPOSITION,
            format!("attachment; filename=\"{name}\""),
        ),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
    ];
    Ok((headers, body).into_response())
}

/// Accepts a commit that Daybook did not make: what it changes is synced from here on. For a
/// history that was rewritten, the commit that the branch is at accepts what it is now.
#[utoipa::path(post, path = "/api/v1/projects/{project}/gitops/commits/{commit}/adopt",
    tag = "gitops",
    params(
        ("project" = String, Path, description = "The project."),
        ("commit" = String, Path, description = "The commit: forty hexadecimal digits."),
    ),
    request_body = Option<Why>,
    responses((status = 200, description = "It is adopted.", body = Decided)))]
pub(crate) async fn adopt_commit(
    State(state): State<AppState>,
    Named((project, commit)): Named<(ProjectName, CommitId)>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<Why>,
) -> Handled<Decided> {
    let done = state
        .commands
        .adopt_commit(&caller, &project, &commit, body.reason)
        .await?;
    let status = ForeignStatus::Adopted;
    Ok(Answer::done(&done, Decided { commit, status }))
}

/// Asks for a commit that Daybook did not make to be undone by a further, signed one.
#[utoipa::path(post, path = "/api/v1/projects/{project}/gitops/commits/{commit}/revert",
    tag = "gitops",
    params(
        ("project" = String, Path, description = "The project."),
        ("commit" = String, Path, description = "The commit: forty hexadecimal digits."),
    ),
    request_body = Option<Why>,
    responses((status = 200, description = "It is being undone.", body = Decided)))]
pub(crate) async fn revert_commit(
    State(state): State<AppState>,
    Named((project, commit)): Named<(ProjectName, CommitId)>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<Why>,
) -> Handled<Decided> {
    let done = state
        .commands
        .revert_commit(&caller, &project, &commit, body.reason)
        .await?;
    let status = ForeignStatus::Reverting;
    Ok(Answer::done(&done, Decided { commit, status }))
}
