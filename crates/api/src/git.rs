//! GitOps repositories for reading, over Git's smart protocol: `git clone <server>/git/<project>.git`.
//!
//! The work is done by `git upload-pack` on the bare repository, a process for each request, which
//! ends with it. Errors are plain text, which is what Git shows to people.

use std::io::{self, Read as _};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Query, RawPathParams, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{BufMut, Bytes, BytesMut};
use daybook_events::{CommitId, ProjectName, ServiceName};
use futures_util::stream::{self, StreamExt};
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use crate::access::{Lease, Principal};
use crate::extract::read_at_most;
use crate::problem::Problem;
use crate::state::AppState;

/// Most bytes of a request: what a client wants and has. A hundred thousand commits fit.
const REQUEST_MAX: usize = 8 * 1024 * 1024;
/// How long one request may take altogether.
const TIME_MAX: Duration = Duration::from_secs(600);
/// How many requests are served at once, over all repositories.
const AT_ONCE: usize = 16;
/// Most bytes of a diff.
const DIFF_MAX: u64 = 1024 * 1024;
/// Bytes that are passed on at once.
const CHUNK: usize = 64 * 1024;

static PLACES: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(AT_ONCE)));

/// A refusal that Git shows to people.
#[derive(Debug)]
pub(crate) struct GitRefusal(StatusCode, String);

impl IntoResponse for GitRefusal {
    fn into_response(self) -> Response {
        let headers = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
        (self.0, headers, format!("{}\n", self.1)).into_response()
    }
}

fn refuse(status: StatusCode, text: impl Into<String>) -> GitRefusal {
    GitRefusal(status, text.into())
}

#[derive(Debug, Deserialize)]
pub(crate) struct Service {
    #[serde(default)]
    service: String,
}

/// The refs of a project's GitOps repository, for `git clone` and `git fetch`.
#[utoipa::path(get, path = "/git/{repository}/info/refs", tag = "gitops", params(
    ("repository" = String, Path, description = "`<project>.git`"),
    ("service" = String, Query, description = "`git-upload-pack`")),
    responses(
        (status = 200, description = "The refs.", body = String,
            content_type = "application/x-git-upload-pack-advertisement"),
        (status = "4XX", description = "It is refused.", body = String,
            content_type = "text/plain")))]
pub(crate) async fn advertise(
    State(state): State<AppState>,
    principal: Principal,
    segments: RawPathParams,
    Query(Service { service }): Query<Service>,
    headers: HeaderMap,
) -> Result<Response, GitRefusal> {
    check_service(&service)?;
    let repository = repository(&state, &segments)?;
    tell_refs(&state, &principal, repository, &headers).await
}

fn check_service(service: &str) -> Result<(), GitRefusal> {
    match service {
        "git-upload-pack" => Ok(()),
        "git-receive-pack" => Err(refuse(
            StatusCode::FORBIDDEN,
            "this repository is read-only: Daybook alone writes to it. Change what runs with \
             `daybook deploy`, or copy the repository and push there",
        )),
        _ => Err(refuse(
            StatusCode::FORBIDDEN,
            "only Git's smart protocol is served; use a client that speaks it",
        )),
    }
}

async fn tell_refs(
    state: &AppState,
    principal: &Principal,
    repository: PathBuf,
    headers: &HeaderMap,
) -> Result<Response, GitRefusal> {
    let protocol = protocol(headers);
    let mut head = BytesMut::new();
    if protocol.as_deref() != Some("version=2") {
        head.put_slice(b"001e# service=git-upload-pack\n0000");
    }
    let run = Run {
        repository,
        protocol,
        advertise: true,
        input: Vec::new(),
        lease: lease(state, principal)?,
    };
    run.answer("advertisement", head.freeze()).await
}

/// Objects of a project's GitOps repository, for `git clone` and `git fetch`.
#[utoipa::path(post, path = "/git/{repository}/git-upload-pack", tag = "gitops",
    params(("repository" = String, Path, description = "`<project>.git`")),
    request_body(content = String, content_type = "application/x-git-upload-pack-request"),
    responses(
        (status = 200, description = "The objects.", body = String,
            content_type = "application/x-git-upload-pack-result"),
        (status = "4XX", description = "It is refused.", body = String,
            content_type = "text/plain")))]
pub(crate) async fn upload_pack(
    State(state): State<AppState>,
    principal: Principal,
    segments: RawPathParams,
    request: Request,
) -> Result<Response, GitRefusal> {
    let repository = || repository(&state, &segments);
    send_objects(&state, &principal, repository, request).await
}

/// The refs of what was uploaded for a service, for `git clone` and `git fetch` of whoever may deploy.
#[utoipa::path(get, path = "/uploads/{project}/{repository}/info/refs", tag = "uploads", params(
    ("project" = String, Path, description = "The project."),
    ("repository" = String, Path, description = "`<service>.git`"),
    ("service" = String, Query, description = "`git-upload-pack`")),
    responses(
        (status = 200, description = "The refs.", body = String,
            content_type = "application/x-git-upload-pack-advertisement"),
        (status = "4XX", description = "It is refused.", body = String,
            content_type = "text/plain")))]
pub(crate) async fn advertise_uploads(
    State(state): State<AppState>,
    principal: Principal,
    segments: RawPathParams,
    Query(Service { service }): Query<Service>,
    headers: HeaderMap,
) -> Result<Response, GitRefusal> {
    check_service(&service)?;
    let repository = uploads(&state, &segments)?;
    tell_refs(&state, &principal, repository, &headers).await
}

/// Objects of what was uploaded for a service, for `git clone` and `git fetch` of whoever may deploy.
#[utoipa::path(post, path = "/uploads/{project}/{repository}/git-upload-pack", tag = "uploads",
    params(
        ("project" = String, Path, description = "The project."),
        ("repository" = String, Path, description = "`<service>.git`")),
    request_body(content = String, content_type = "application/x-git-upload-pack-request"),
    responses(
        (status = 200, description = "The objects.", body = String,
            content_type = "application/x-git-upload-pack-result"),
        (status = "4XX", description = "It is refused.", body = String,
            content_type = "text/plain")))]
pub(crate) async fn fetch_uploads(
    State(state): State<AppState>,
    principal: Principal,
    segments: RawPathParams,
    request: Request,
) -> Result<Response, GitRefusal> {
    let repository = || uploads(&state, &segments);
    send_objects(&state, &principal, repository, request).await
}

async fn send_objects(
    state: &AppState,
    principal: &Principal,
    repository: impl FnOnce() -> Result<PathBuf, GitRefusal>,
    request: Request,
) -> Result<Response, GitRefusal> {
    let (parts, body) = request.into_parts();
    let media_type = parts.headers.get(header::CONTENT_TYPE);
    if media_type.is_none_or(|t| t != "application/x-git-upload-pack-request") {
        return Err(refuse(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "this is no request of git fetch",
        ));
    }
    let repository = repository()?;
    let input = read_at_most(body, REQUEST_MAX)
        .await
        .map_err(|problem| refuse(problem.status(), problem.to_text()))?;
    let run = Run {
        repository,
        protocol: protocol(&parts.headers),
        advertise: false,
        input: unpack(&parts.headers, input)?,
        lease: lease(state, principal)?,
    };
    run.answer("result", Bytes::new()).await
}

/// Clones are streams, too.
fn lease(state: &AppState, principal: &Principal) -> Result<Lease, GitRefusal> {
    let lease = state.access.stream(principal, &state.cancel);
    lease.map_err(|e| refuse(StatusCode::TOO_MANY_REQUESTS, Problem::from(e).to_text()))
}

/// The folder of the repository that a path names.
fn repository(state: &AppState, segments: &RawPathParams) -> Result<PathBuf, GitRefusal> {
    let missing = || refuse(StatusCode::NOT_FOUND, "there is no such repository");
    let root = state.settings.git_root.as_ref().ok_or_else(missing)?;
    let (_, name) = segments.iter().next().ok_or_else(missing)?;
    let project = name.strip_suffix(".git").ok_or_else(missing)?;
    // A project's name can be no path.
    let project = ProjectName::parse(project).map_err(|_| missing())?;
    let folder = root.join(format!("{project}.git"));
    if folder.is_dir() {
        Ok(folder)
    } else {
        Err(missing_repository(&project))
    }
}

/// The folder of the uploads that a path names.
fn uploads(state: &AppState, segments: &RawPathParams) -> Result<PathBuf, GitRefusal> {
    let missing = || refuse(StatusCode::NOT_FOUND, "there is no such repository");
    let settings = state.settings.uploads.as_ref().ok_or_else(missing)?;
    let mut segments = segments.iter().map(|(_, text)| text);
    let (project, name) = (segments.next(), segments.next());
    // Names can be no paths.
    let project = project.and_then(|text| ProjectName::parse(text).ok());
    let project = project.ok_or_else(missing)?;
    let service = name.and_then(|text| ServiceName::parse(text.strip_suffix(".git")?).ok());
    let service = service.ok_or_else(missing)?;
    let folder = settings.of(&project, &service).folder();
    folder.ok_or_else(|| missing_uploads(&project))
}

/// Nothing was uploaded for a service of a project, or nothing that may be seen.
pub(crate) fn missing_uploads(project: &ProjectName) -> GitRefusal {
    refuse(
        StatusCode::NOT_FOUND,
        format!("nothing was uploaded here for such a service of {project}"),
    )
}

/// A project has no repository, or none that may be seen.
pub(crate) fn missing_repository(project: &ProjectName) -> GitRefusal {
    refuse(
        StatusCode::NOT_FOUND,
        format!("the project {project} has no GitOps repository here; a deployment makes it"),
    )
}

/// The protocol version that a client asks for. Anything else in this header is ignored.
fn protocol(headers: &HeaderMap) -> Option<String> {
    let text = headers.get("git-protocol")?.to_str().ok()?;
    matches!(text, "version=1" | "version=2").then(|| text.to_owned())
}

/// Undoes the compression that Git uses for larger requests, within the same bound.
fn unpack(headers: &HeaderMap, input: Vec<u8>) -> Result<Vec<u8>, GitRefusal> {
    match headers.get(header::CONTENT_ENCODING) {
        None => Ok(input),
        Some(encoding) if encoding == "gzip" => {
            let mut plain = Vec::new();
            flate2::read::GzDecoder::new(input.as_slice())
                .take(REQUEST_MAX as u64 + 1)
                .read_to_end(&mut plain)
                .map_err(|_| refuse(StatusCode::BAD_REQUEST, "the request is not gzip"))?;
            if plain.len() > REQUEST_MAX {
                return Err(refuse(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    "the request is too large",
                ));
            }
            Ok(plain)
        }
        Some(_) => Err(refuse(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "only gzip is understood",
        )),
    }
}

/// `git` without anybody's configuration.
pub(crate) fn git() -> std::process::Command {
    let mut command = std::process::Command::new("git");
    command
        .env_clear()
        .env("LC_ALL", "C")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_NO_REPLACE_OBJECTS", "1")
        .env("GIT_TERMINAL_PROMPT", "0");
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    // Folders are named by this server and not by the caller, whoever owns them.
    command.args(["-c", "safe.directory=*"]);
    command
}

/// A place among those that read a repository at once.
pub(crate) fn place() -> Result<OwnedSemaphorePermit, Problem> {
    PLACES.clone().try_acquire_owned().map_err(|_| {
        Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "too_many_clones",
            "too many GitOps repositories are being read at once",
            "try again in a moment",
        )
        .retry_after(1)
    })
}

/// What a commit changes against its first parent, as text; cut at one mebibyte.
pub(crate) async fn diff(
    state: &AppState,
    project: &ProjectName,
    commit: &CommitId,
) -> Result<Vec<u8>, Problem> {
    let missing = || {
        Problem::new(
            StatusCode::NOT_FOUND,
            "commit_not_found",
            format!(
                "the GitOps repository of {project} has no commit {}",
                commit.short()
            ),
            "look at the commits with `git log` in a clone of it",
        )
    };
    let root = state.settings.git_root.as_ref().ok_or_else(missing)?;
    let _place = place()?;
    let mut child = Command::from(git())
        .arg("--git-dir")
        .arg(root.join(format!("{project}.git")))
        .args([
            "show",
            "--format=",
            "--patch",
            "--no-color",
            "--no-ext-diff",
        ])
        .args(["--no-textconv", "--diff-merges=first-parent"])
        .arg(commit.as_str())
        .arg("--")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| Problem::internal(&e))?;
    let mut text = Vec::new();
    if let Some(stdout) = &mut child.stdout {
        let read = tokio::io::AsyncReadExt::take(stdout, DIFF_MAX);
        tokio::pin!(read);
        read.read_to_end(&mut text)
            .await
            .map_err(|e| Problem::internal(&e))?;
    }
    if text.len() as u64 == DIFF_MAX {
        return Ok(text);
    }
    let ended = child.wait().await.map_err(|e| Problem::internal(&e))?;
    if ended.success() {
        Ok(text)
    } else {
        Err(missing())
    }
}

/// One run of `git upload-pack`.
struct Run {
    repository: PathBuf,
    protocol: Option<String>,
    advertise: bool,
    input: Vec<u8>,
    lease: Lease,
}

/// A running `git upload-pack`. Dropping it, as when the client goes away, kills the process.
struct Output {
    stdout: ChildStdout,
    deadline: Instant,
    lease: Lease,
    _child: Child,
    _input: AbortOnDropHandle<()>,
    _place: OwnedSemaphorePermit,
}

impl Run {
    async fn answer(self, kind: &str, head: Bytes) -> Result<Response, GitRefusal> {
        let mut output = self.start()?;
        // What fails at once is answered with an error, and not in the middle of a body.
        let Some(Ok(first)) = output.next().await else {
            tracing::error!("git upload-pack ended without an answer");
            return Err(refuse(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the repository could not be read; look at the server's log",
            ));
        };
        let rest = stream::unfold(output, |mut output| async move {
            output.next().await.map(|bytes| (bytes, output))
        });
        let chunks = [head, first].into_iter().filter(|b| !b.is_empty());
        let body = Body::from_stream(stream::iter(chunks.map(Ok)).chain(rest));
        let headers = [
            (
                header::CONTENT_TYPE,
                format!("application/x-git-upload-pack-{kind}"),
            ),
            (header::CACHE_CONTROL, "no-cache".to_owned()),
        ];
        Ok((headers, body).into_response())
    }

    fn start(self) -> Result<Output, GitRefusal> {
        let place = PLACES.clone().try_acquire_owned().map_err(|_| {
            refuse(
                StatusCode::SERVICE_UNAVAILABLE,
                "too many clones at once; try again in a moment",
            )
        })?;
        let mut command = Command::from(git());
        if let Some(protocol) = &self.protocol {
            command.env("GIT_PROTOCOL", protocol);
        }
        // Builds ask for a commit by its id.
        command.args(["-c", "uploadpack.allowTipSHA1InWant=true"]);
        command.args(["upload-pack", "--stateless-rpc"]);
        if self.advertise {
            command.arg("--advertise-refs");
        }
        command
            .arg("--strict")
            .arg(&self.repository)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(|e| {
            tracing::error!(error = %e, "git could not be started");
            refuse(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the server cannot run git; it has to be installed there",
            )
        })?;
        let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(refuse(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the server cannot talk to git",
            ));
        };
        let input = self.input;
        // Beside reading, because git may answer before it has read everything.
        let input = tokio::spawn(async move {
            // Git that ends before it has read all says why itself.
            let _ = stdin.write_all(&input).await;
        });
        Ok(Output {
            stdout,
            deadline: Instant::now() + TIME_MAX,
            lease: self.lease,
            _child: child,
            _input: AbortOnDropHandle::new(input),
            _place: place,
        })
    }
}

impl Output {
    /// The next bytes; none at the end. An error breaks the connection off, so that nobody takes
    /// a part for the whole.
    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        let mut chunk = BytesMut::with_capacity(CHUNK);
        let read = tokio::select! {
            () = self.lease.ended().cancelled() => {
                Ok(Err(io::Error::other("the server ends, or the token is no longer taken")))
            },
            read = timeout_at(self.deadline, self.stdout.read_buf(&mut chunk)) => read,
        };
        match read {
            Ok(Ok(0)) => None,
            Ok(Ok(_)) => Some(Ok(chunk.freeze())),
            Ok(Err(e)) => Some(Err(e)),
            Err(_) => {
                tracing::warn!("git took longer than {TIME_MAX:?} and was ended");
                Some(Err(io::ErrorKind::TimedOut.into()))
            }
        }
    }
}
