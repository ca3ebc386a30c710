//! Sources that were uploaded, for services whose source is in no repository that a worker could
//! read.
//!
//! Each service has a bare repository of its own, `<root>/<project>/<service>.git`. An upload is a
//! pack with one commit without parents and what the repository does not have of its content. It is
//! read through ([`scan`]), then given to git aside, which verifies every object and that the commit
//! is complete; only then it is moved in. A ref `refs/uploads/<tree>/<commit>` is made last, after
//! the ledger says who uploaded it: what has no such ref is not there. So the same content, which has
//! the same tree, is found and not uploaded again.
//!
//! Nothing is removed: a deployment may be repeated years later.

mod places;
mod scan;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use daybook_events::{CommitId, ProjectName, ServiceName, with_causes};
use futures_util::StreamExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;

use crate::git::git;
use crate::problem::Problem;
use places::{Place, Places};
use scan::{Limits, Scanned, Unfit};

/// The media type of a pack.
pub(crate) const PACK: &str = "application/x-git-packed-objects";
/// Most bytes of an upload where nothing else is said: 100 MiB.
pub const UPLOAD_MAX: u64 = 100 << 20;
/// Most bytes that all uploads of a project may take on disk where nothing else is said: 10 GiB.
pub const UPLOADS_OF_PROJECT_MAX: u64 = 10 << 30;
/// How long an upload may take, as slow as the line may be.
pub(crate) const RECEIVE_WITHIN: Duration = Duration::from_secs(15 * 60);
/// How long git may take for what was received.
const GIT_WITHIN: Duration = Duration::from_secs(5 * 60);
/// Most objects of an upload: files and folders.
const OBJECTS_MAX: u32 = 100_000;
/// How much larger than what was sent its content may be, and how large in any case: somewhat more than
/// what a client takes of a folder.
const UNPACKED: u64 = 8;
const UNPACKED_MIN: u64 = (1 << 30) + (128 << 20);
/// What is aside for so long is nobody's any more: its process was killed.
const ABANDONED: Duration = Duration::from_secs(3600);
/// How many uploads are received at once, and how many of them for one project: whoever sends slowly
/// keeps nobody else waiting. One that is received takes a connection, a buffer and some disk.
const RECEIVED_AT_ONCE: usize = 16;
const RECEIVED_OF_PROJECT: usize = 4;
/// How many are unpacked and checked at once, which takes a core each.
const CHECKED_AT_ONCE: usize = 4;
/// From this many packs on they are joined.
const PACKS_MAX: usize = 50;
/// How deep folders may lie in one another. libgit2 and git go down by recursion.
const DEPTH_MAX: usize = 128;
/// What a repository of uploads is set to. Nobody is to make git hold large files in memory, by
/// uploading them or by cloning.
const CONFIG: &str =
    "[core]\n\tbigFileThreshold = 8m\n[pack]\n\tthreads = 1\n\twindowMemory = 64m\n";
/// How slow a line may be on average, in bytes a second, once it had [`SLOW_AFTER`].
const SLOWEST: u64 = 16 * 1024;
const SLOW_AFTER: Duration = Duration::from_secs(60);

static PLACES: LazyLock<Arc<Places>> =
    LazyLock::new(|| Places::new(RECEIVED_AT_ONCE, RECEIVED_OF_PROJECT));
static CHECKS: LazyLock<Arc<Semaphore>> =
    LazyLock::new(|| Arc::new(Semaphore::new(CHECKED_AT_ONCE)));

/// Where uploads are kept, and how large one may be.
#[derive(Debug, Clone)]
pub struct UploadSettings {
    /// A folder, which is made when it is first needed. Every process with the role `api` and
    /// every worker that is to read it directly shares it.
    pub root: PathBuf,
    /// Most bytes that are received for one upload.
    pub max_bytes: u64,
    /// From this many bytes on disk on, a project's uploads are refused.
    pub project_max_bytes: u64,
}

impl UploadSettings {
    /// Uploads of the usual size, in this folder.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            max_bytes: UPLOAD_MAX,
            project_max_bytes: UPLOADS_OF_PROJECT_MAX,
        }
    }

    /// What was uploaded for a service.
    pub(crate) fn of(&self, project: &ProjectName, service: &ServiceName) -> Uploads {
        Uploads {
            settings: self.clone(),
            project: project.clone(),
            // Names are no paths.
            folder: self
                .root
                .join(project.as_str())
                .join(format!("{service}.git")),
        }
    }
}

/// What was uploaded for one service.
#[derive(Debug, Clone)]
pub(crate) struct Uploads {
    settings: UploadSettings,
    project: ProjectName,
    folder: PathBuf,
}

/// An upload that was checked and is not moved in yet. Dropping it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct Received {
    aside: Aside,
    /// The commit.
    pub(crate) commit: CommitId,
    /// Its tree.
    pub(crate) tree: CommitId,
    /// How many bytes were received.
    pub(crate) bytes: u64,
    _place: Place,
    _check: OwnedSemaphorePermit,
}

/// A folder of an upload that is being received. Removed with all in it.
#[derive(Debug)]
struct Aside(PathBuf);

impl Drop for Aside {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn disk(error: io::Error) -> Problem {
    tracing::error!(error = with_causes(&error), "an upload cannot be kept");
    Problem::new(
        StatusCode::INSUFFICIENT_STORAGE,
        "uploads_disk",
        "the server cannot keep the upload",
        "look at the server's log: its disk may be full, or the folder `uploads` not be writable",
    )
    .retry_after(10)
}

fn invalid(why: impl Into<String>) -> Problem {
    Problem::new(
        StatusCode::UNPROCESSABLE_ENTITY,
        "invalid_upload",
        format!("the upload is not taken: {}", why.into()),
        "upload with `daybook deploy --from DIR`, or a pack that git has written of one commit \
         without parents and all that belongs to it",
    )
}

fn too_many_bytes(max: u64) -> Problem {
    too_large(format!("it has more than {max} bytes"))
}

fn too_large(why: String) -> Problem {
    Problem::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        "upload_too_large",
        format!("the upload is too large: {why}"),
        "put what is not source into .gitignore, or have the server started with a larger \
         --upload-max-mib",
    )
}

fn too_full(project: &ProjectName, taken: u64, max: u64) -> Problem {
    let (taken, max) = (taken >> 20, max >> 20);
    Problem::new(
        StatusCode::INSUFFICIENT_STORAGE,
        "uploads_full",
        format!("the uploads of {project} take {taken} MiB, and may take {max} MiB"),
        "deploy from a git repository, have the folders in uploads/ of services that need not be \
         built again deleted while Daybook is stopped, or have the server started with a larger \
         --uploads-project-max-mib",
    )
}

/// How many bytes the files below a folder have. What is gone meanwhile counts nothing.
fn size_of(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else {
        return 0;
    };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(about) if about.is_dir() => size_of(&entry.path()),
        Ok(about) => about.len(),
        Err(_) => 0,
    });
    sizes.sum()
}

fn too_slow() -> Problem {
    Problem::new(
        StatusCode::REQUEST_TIMEOUT,
        "upload_too_slow",
        "the upload takes too long",
        "upload less, or over a faster line",
    )
}

impl Uploads {
    /// The repository, for reading; none before the first upload.
    pub(crate) fn folder(&self) -> Option<PathBuf> {
        self.folder.is_dir().then(|| self.folder.clone())
    }

    /// The oldest commit with this tree.
    pub(crate) async fn by_tree(&self, tree: &CommitId) -> Result<Option<CommitId>, Problem> {
        let refs = self.refs(&[&format!("refs/uploads/{tree}/")]).await?;
        Ok(refs.into_iter().next().map(|(_, commit)| commit))
    }

    /// Whether this commit was uploaded.
    pub(crate) async fn has(&self, commit: &CommitId) -> Result<bool, Problem> {
        let at = format!("--points-at={commit}");
        if self.folder().is_none() || !self.knows(commit).await? {
            return Ok(false);
        }
        Ok(!self.refs(&[&at, "refs/uploads/"]).await?.is_empty())
    }

    async fn knows(&self, commit: &CommitId) -> Result<bool, Problem> {
        let mut command = self.git();
        command.args(["cat-file", "-e"]).arg(commit.as_str());
        Ok(ended(command).await?.is_ok())
    }

    /// Refs as tree and commit, in order of time.
    async fn refs(&self, what: &[&str]) -> Result<Vec<(CommitId, CommitId)>, Problem> {
        if self.folder().is_none() {
            return Ok(Vec::new());
        }
        let mut command = self.git();
        command
            .args(["for-each-ref", "--sort=creatordate", "--format=%(refname)"])
            .args(what);
        let text = ended(command)
            .await?
            .map_err(|e| failed("for-each-ref", &e))?;
        Ok(text
            .lines()
            .filter_map(|name| {
                let (tree, commit) = name.strip_prefix("refs/uploads/")?.split_once('/')?;
                Some((CommitId::parse(tree).ok()?, CommitId::parse(commit).ok()?))
            })
            .collect())
    }

    /// Which of these objects are not here.
    pub(crate) async fn missing(&self, objects: Vec<CommitId>) -> Result<Vec<CommitId>, Problem> {
        if self.folder().is_none() {
            return Ok(objects);
        }
        let mut command = self.git();
        command.args(["cat-file", "--batch-check=%(objectname)"]);
        let asked: String = objects.iter().map(|id| format!("{id}\n")).collect();
        let text = run(command, Some(asked.into_bytes())).await?;
        let text = text.map_err(|e| failed("cat-file", &e))?;
        Ok(text
            .lines()
            .filter_map(|line| CommitId::parse(line.strip_suffix(" missing")?).ok())
            .collect())
    }

    fn git(&self) -> Command {
        let mut command = Command::from(git());
        command.arg("--git-dir").arg(&self.folder);
        command.stdin(Stdio::null());
        command
    }

    /// Receives a pack and checks it. Nothing of it is in the repository yet.
    pub(crate) async fn receive(
        &self,
        headers: &HeaderMap,
        body: Body,
    ) -> Result<Received, Problem> {
        let max = self.settings.max_bytes;
        let announced = headers
            .get(header::CONTENT_LENGTH)
            .and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|n| n > max) {
            return Err(too_many_bytes(max));
        }
        self.room(announced.unwrap_or_default()).await?;
        let place = PLACES.take(&self.project).ok_or_else(|| {
            Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "too_many_uploads",
                "too many uploads are being received at once",
                "try again in a moment",
            )
            .retry_after(2)
        })?;
        let aside = self.aside().map_err(disk)?;
        fs::create_dir_all(aside.0.join("objects/pack")).map_err(disk)?;
        let file = aside.0.join("pack");
        let bytes = keep(body, &file, max).await?;
        self.room(bytes).await?;
        let check = CHECKS.clone().acquire_owned().await;
        let check = check.map_err(|e| Problem::internal(&e))?;
        let limits = Limits {
            objects: OBJECTS_MAX,
            bytes: max.saturating_mul(UNPACKED).max(UNPACKED_MIN),
        };
        let scanned = {
            let file = file.clone();
            tokio::task::spawn_blocking(move || {
                let pack = fs::File::open(file).map_err(Unfit::Disk)?;
                scan::scan(io::BufReader::with_capacity(64 * 1024, pack), limits)
            })
        };
        let Scanned { commit, tree } = match scanned.await.map_err(|e| Problem::internal(&e))? {
            Ok(scanned) => scanned,
            Err(Unfit::Disk(e)) => return Err(disk(e)),
            Err(unfit @ Unfit::TooLarge { .. }) => return Err(too_large(unfit.to_string())),
            Err(unfit) => return Err(invalid(unfit.to_string())),
        };
        self.make().await?;
        self.verify(&aside, &file, &commit).await?;
        Ok(Received {
            commit: CommitId::parse(commit)?,
            tree: CommitId::parse(tree)?,
            bytes,
            aside,
            _place: place,
            _check: check,
        })
    }

    /// Whether the project may have so many bytes more. Several at once may go beyond it by what they
    /// have.
    async fn room(&self, more: u64) -> Result<(), Problem> {
        let (root, project) = (self.settings.root.clone(), self.project.clone());
        let taken = tokio::task::spawn_blocking(move || size_of(&root.join(project.as_str())));
        let taken = taken.await.map_err(|e| Problem::internal(&e))?;
        let max = self.settings.project_max_bytes;
        if taken.saturating_add(more) > max {
            return Err(too_full(&self.project, taken, max));
        }
        Ok(())
    }

    /// A name for a folder aside, beside those of others. What was abandoned goes.
    fn aside(&self) -> io::Result<Aside> {
        let all = self.settings.root.join(".incoming");
        fs::create_dir_all(&all)?;
        for entry in fs::read_dir(&all)? {
            let entry = entry?;
            let age = entry.metadata().and_then(|about| about.modified());
            let age = age.ok().and_then(|at| at.elapsed().ok());
            if age.is_some_and(|age| age > ABANDONED) {
                drop(Aside(entry.path()));
            }
        }
        Ok(Aside(all.join(Uuid::now_v7().simple().to_string())))
    }

    /// Has git check every object, and that the commit is complete.
    async fn verify(&self, aside: &Aside, file: &Path, commit: &str) -> Result<(), Problem> {
        let objects = aside.0.join("objects");
        let here = |command: &mut Command| {
            command.env("GIT_OBJECT_DIRECTORY", &objects).env(
                "GIT_ALTERNATE_OBJECT_DIRECTORIES",
                self.folder.join("objects"),
            );
        };
        let mut index = self.git();
        here(&mut index);
        // What is larger is not held in memory.
        index
            .args(["-c", "core.bigFileThreshold=8m", "-c", "pack.threads=1"])
            .args(["index-pack", "--strict", "--stdin"])
            .stdin(fs::File::open(file).map_err(disk)?);
        if let Err(said) = ended(index).await? {
            return Err(invalid(format!("git says: {said}")));
        }
        let mut names = self.git();
        here(&mut names);
        names.args(["ls-tree", "-r", "-t", "-z", "--name-only", commit]);
        shallow(names).await?;
        let mut walk = self.git();
        here(&mut walk);
        walk.args(["rev-list", "--objects", "--quiet", commit, "--"]);
        if let Err(said) = ended(walk).await? {
            return Err(invalid(format!("it is not complete, git says: {said}")));
        }
        Ok(())
    }

    /// Moves what was received in. It is found once [`Uploads::publish`] has made its ref.
    ///
    /// Returns the files that keep it from being joined with other packs until then.
    pub(crate) fn take_in(&self, received: &Received) -> Result<Vec<PathBuf>, Problem> {
        let (from, into) = (
            received.aside.0.join("objects/pack"),
            self.folder.join("objects/pack"),
        );
        fs::create_dir_all(&into).map_err(disk)?;
        let mut names = Vec::new();
        for entry in fs::read_dir(&from).map_err(disk)? {
            names.push(entry.map_err(disk)?.file_name());
        }
        // Whoever finds an index finds its pack. Whoever joins packs meanwhile leaves alone those that
        // are kept: until it has its ref, nothing says that this one is needed.
        names.sort_by_key(|name| name.to_string_lossy().ends_with(".idx"));
        let mut keeps = Vec::new();
        for name in &names {
            if let Some(name) = name.to_string_lossy().strip_suffix(".pack") {
                let keep = into.join(format!("{name}.keep"));
                fs::write(&keep, "").map_err(disk)?;
                keeps.push(keep);
            }
        }
        for name in names {
            fs::rename(from.join(&name), into.join(&name)).map_err(disk)?;
        }
        fs::File::open(&into)
            .and_then(|folder| folder.sync_all())
            .map_err(disk)?;
        Ok(keeps)
    }

    /// Says that a commit is here, whose upload is in the ledger.
    pub(crate) async fn publish(
        &self,
        received: &Received,
        keeps: &[PathBuf],
    ) -> Result<(), Problem> {
        let Received { commit, tree, .. } = received;
        let mut command = self.git();
        command
            .args(["update-ref", "--no-deref"])
            .arg(format!("refs/uploads/{tree}/{commit}"))
            .arg(commit.as_str());
        ended(command)
            .await?
            .map_err(|e| failed("update-ref", &e))?;
        Self::give_up(keeps);
        Ok(())
    }

    /// Lets packs be joined with others from now on.
    pub(crate) fn give_up(keeps: &[PathBuf]) {
        for keep in keeps {
            // One that stays is not joined, and does no other harm.
            let _ = fs::remove_file(keep);
        }
    }

    /// Joins packs once there are many. One process at a time does.
    pub(crate) async fn tidy(&self) {
        let packs = fs::read_dir(self.folder.join("objects/pack"))
            .map(|entries| {
                let names = entries.flatten().map(|entry| entry.path());
                names
                    .filter(|p| p.extension().is_some_and(|e| e == "pack"))
                    .count()
            })
            .unwrap_or_default();
        if packs < PACKS_MAX {
            return;
        }
        let Ok(lock) = fs::File::create(self.folder.join("daybook-tidy")) else {
            return;
        };
        if lock.try_lock().is_err() {
            return;
        }
        let mut command = self.git();
        command.args(["-c", "pack.threads=1"]);
        // What another process moves in at this moment has no ref yet.
        command.args(["repack", "-a", "-d", "-k", "-q"]);
        if let Ok(Err(said)) = ended(command).await {
            tracing::warn!(said, "the packs of uploads were not joined");
        }
    }

    /// Makes the repository, if it is not there.
    async fn make(&self) -> Result<(), Problem> {
        if self.folder.is_dir() {
            return Ok(());
        }
        let parent = self.folder.parent().unwrap_or(&self.settings.root);
        fs::create_dir_all(parent).map_err(disk)?;
        let fresh = self.aside().map_err(disk)?;
        let mut command = Command::from(git());
        command
            .args(["init", "--quiet", "--bare", "--template="])
            .arg(&fresh.0)
            .stdin(Stdio::null());
        ended(command).await?.map_err(|e| failed("init", &e))?;
        let mut config = fs::OpenOptions::new()
            .append(true)
            .open(fresh.0.join("config"))
            .map_err(disk)?;
        io::Write::write_all(&mut config, CONFIG.as_bytes()).map_err(disk)?;
        match fs::rename(&fresh.0, &self.folder) {
            // Somebody else has made it meanwhile.
            Err(_) if self.folder.is_dir() => Ok(()),
            made => made.map_err(disk),
        }
    }
}

/// Writes a body into a file, unless it is too long or too slow.
async fn keep(body: Body, file: &Path, max: u64) -> Result<u64, Problem> {
    let begun = Instant::now();
    let deadline = begun + RECEIVE_WITHIN;
    let mut chunks = body.into_data_stream();
    let mut file = tokio::fs::File::create(file).await.map_err(disk)?;
    let mut bytes = 0;
    loop {
        let patience = deadline.min(Instant::now() + SLOW_AFTER);
        let next = timeout_at(patience, chunks.next()).await;
        let Some(chunk) = next.map_err(|_| too_slow())? else {
            break;
        };
        let chunk = chunk.map_err(|_| {
            Problem::new(
                StatusCode::BAD_REQUEST,
                "body_incomplete",
                "the upload broke off",
                "upload again",
            )
        })?;
        bytes += chunk.len() as u64;
        if bytes > max {
            return Err(too_many_bytes(max));
        }
        let since = begun.elapsed();
        if since > SLOW_AFTER && bytes < since.as_secs() * SLOWEST {
            return Err(too_slow());
        }
        file.write_all(&chunk).await.map_err(disk)?;
    }
    file.flush().await.map_err(disk)?;
    Ok(bytes)
}

/// Runs git to its end: what it printed, or what it said was wrong.
async fn ended(command: Command) -> Result<Result<String, String>, Problem> {
    run(command, None).await
}

async fn run(
    mut command: Command,
    input: Option<Vec<u8>>,
) -> Result<Result<String, String>, Problem> {
    if input.is_some() {
        command.stdin(Stdio::piped());
    }
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| Problem::internal(&e))?;
    let stdin = child.stdin.take();
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let written = async {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            // Git that ends early says why.
            let _ = stdin.write_all(&input).await;
        }
    };
    let said = async {
        // The end of what is wrong is not worth more.
        let mut said = Vec::new();
        if let Some(stderr) = stderr {
            let mut first = stderr.take(4096);
            first.read_to_end(&mut said).await?;
            tokio::io::copy(&mut first.into_inner(), &mut tokio::io::sink()).await?;
        }
        io::Result::Ok(said)
    };
    let printed = async {
        let mut printed = Vec::new();
        if let Some(mut stdout) = stdout {
            stdout.read_to_end(&mut printed).await?;
        }
        io::Result::Ok(printed)
    };
    let all = async {
        let ((), said, printed) = tokio::join!(written, said, printed);
        io::Result::Ok((said?, printed?, child.wait().await?))
    };
    let (said, printed, status) = timeout(GIT_WITHIN, all)
        .await
        .map_err(|_| too_slow())?
        .map_err(|e| Problem::internal(&e))?;
    if status.success() {
        return Ok(Ok(String::from_utf8_lossy(&printed).into_owned()));
    }
    let said = String::from_utf8_lossy(&said);
    let line = said.lines().find(|line| !line.trim().is_empty());
    let plain = line.unwrap_or("nothing").trim_start_matches("fatal: ");
    let shown = plain.chars().filter(|c| !c.is_control()).take(300);
    Ok(Err(shown.collect()))
}

/// Runs a command of git that prints the names of all files and folders, and refuses what lies too
/// deep as soon as it is seen.
async fn shallow(mut command: Command) -> Result<(), Problem> {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| Problem::internal(&e))?;
    let look = async {
        let Some(mut names) = child.stdout.take() else {
            return Ok(());
        };
        let (mut chunk, mut depth) = (vec![0; 64 * 1024], 0);
        loop {
            let n = names
                .read(&mut chunk)
                .await
                .map_err(|e| Problem::internal(&e))?;
            if n == 0 {
                return Ok(());
            }
            for byte in &chunk[..n] {
                match byte {
                    0 => depth = 0,
                    b'/' => depth += 1,
                    _ => {}
                }
                if depth > DEPTH_MAX {
                    return Err(invalid(format!(
                        "its folders lie more than {DEPTH_MAX} deep in one another"
                    )));
                }
            }
        }
    };
    timeout(GIT_WITHIN, look).await.map_err(|_| too_slow())??;
    let status = timeout(GIT_WITHIN, child.wait()).await;
    let status = status.map_err(|_| too_slow())?;
    match status.map_err(|e| Problem::internal(&e))?.success() {
        true => Ok(()),
        false => Err(invalid("it is not complete: folders are missing")),
    }
}

/// Git did not do what it always does.
fn failed(what: &str, said: &str) -> Problem {
    tracing::error!(what, said, "git failed on the repository of uploads");
    Problem::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "uploads_unusable",
        "the repository of uploads cannot be used",
        "look at the server's log",
    )
}
