//! The content of a folder as a commit, and as a pack to be uploaded.
//!
//! The work is git's own, so that what git ignores is ignored, whoever says so: the folder, the
//! repository, or the user. In a repository the work tree is taken as it is. Nothing of it is
//! touched: neither its index nor HEAD, a branch or its objects, as git is given an index and a place
//! for objects aside. A folder that is in no repository is taken as if it was about to be committed to
//! a new one.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::exit::{Code, Failure};

/// Most files of an upload. Those of a clone with its dependencies are more than that.
const FILES_MAX: u64 = 50_000;
/// Most bytes of them.
const BYTES_MAX: u64 = 1 << 30;
/// So many of the largest things are named where there is too much.
const NAMED: usize = 3;

/// A folder whose content can be uploaded.
#[derive(Debug)]
pub struct Folder {
    /// The whole of what is uploaded: the work tree, or the folder itself.
    root: PathBuf,
    /// The folder within it, without slashes at its ends; empty if it is the whole.
    within: String,
    /// The repository that it is the work tree of.
    repository: Option<Repository>,
}

#[derive(Debug)]
struct Repository {
    git_dir: PathBuf,
    objects: PathBuf,
    index: PathBuf,
}

/// The content of a folder, with an id, ready to be packed.
#[derive(Debug)]
pub struct Content {
    scratch: TempDir,
    git_dir: PathBuf,
    root: PathBuf,
    /// The id of its tree: the same content has the same.
    pub tree: String,
    /// How many files it has.
    pub files: u64,
    /// How many bytes they have.
    pub bytes: u64,
    /// Files that look as if secrets were in them, and that git does not know.
    pub secrets: Vec<String>,
    /// Folders that are repositories of their own, whose content is not in it.
    pub nested: Vec<String>,
    objects: Vec<String>,
    message: String,
}

fn unusable(what: &str, said: impl AsRef<str>) -> Failure {
    Failure::new(
        Code::Failure,
        "folder_unusable",
        format!("{what}: {}", said.as_ref()),
    )
}

fn lossy(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// Git as the user has it, but in no repository that its surroundings name.
fn git() -> Command {
    let mut command = Command::new("git");
    for name in [
        "GIT_DIR",
        "GIT_WORK_TREE",
        "GIT_INDEX_FILE",
        "GIT_OBJECT_DIRECTORY",
        "GIT_ALTERNATE_OBJECT_DIRECTORIES",
        "GIT_COMMON_DIR",
        "GIT_PREFIX",
        "GIT_NAMESPACE",
        "GIT_LITERAL_PATHSPECS",
    ] {
        command.env_remove(name);
    }
    command
        .env("LC_ALL", "C")
        .env("GIT_TERMINAL_PROMPT", "0")
        // No program of the repository's is run, and nothing is tidied up beside.
        .args([
            "-c",
            "core.fsmonitor=false",
            "-c",
            "core.hooksPath=/dev/null",
        ])
        .args([
            "-c",
            "core.splitIndex=false",
            "-c",
            "core.untrackedCache=false",
        ])
        .args(["-c", "gc.auto=0", "-c", "maintenance.auto=false"])
        .args(["-c", "core.safecrlf=false"])
        .stdin(Stdio::null());
    command
}

/// What git printed, or what it said was wrong.
fn run(command: &mut Command, input: Option<&[u8]>) -> Result<Result<Vec<u8>, String>, Failure> {
    if input.is_some() {
        command.stdin(Stdio::piped());
    }
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.map_err(not_started)?;
    let stdin = child.stdin.take();
    let done = std::thread::scope(|scope| {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            // Git that ends early says why.
            scope.spawn(move || drop(stdin.write_all(input)));
        }
        child.wait_with_output()
    })?;
    if done.status.success() {
        return Ok(Ok(done.stdout));
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let line = said
        .lines()
        .find(|l| l.starts_with("fatal:") || l.starts_with("error:"));
    let line = line
        .or_else(|| said.lines().next())
        .unwrap_or("it does not say why");
    Ok(Err(lossy(line.as_bytes())))
}

fn not_started(e: std::io::Error) -> Failure {
    match e.kind() {
        ErrorKind::NotFound => Failure::new(
            Code::Failure,
            "git_missing",
            "git is not installed here, which reads the folder",
        )
        .hint("install git, or deploy with --ref or --image"),
        _ => unusable("git cannot be started", e.to_string()),
    }
}

fn line(bytes: Vec<u8>) -> OsString {
    let mut bytes = bytes;
    while bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    OsString::from_vec(bytes)
}

impl Folder {
    /// A folder, and the repository that it is in, if it is in one.
    pub fn open(named: &Path) -> Result<Self, Failure> {
        let not_one = |why: String| {
            Failure::new(
                Code::Usage,
                "folder_missing",
                format!("{} cannot be uploaded: {why}", named.display()),
            )
            .hint("name the folder of the source with --from DIR")
        };
        let folder = named.canonicalize().map_err(|e| not_one(e.to_string()))?;
        if !folder.is_dir() {
            return Err(not_one("it is no folder".into()));
        }
        let plain = |root: PathBuf, within: String| Self {
            root,
            within,
            repository: None,
        };
        let of = |arguments: &[&str]| {
            let mut command = git();
            run(command.current_dir(&folder).args(arguments), None)
        };
        let found = match of(&["rev-parse", "--show-toplevel"])? {
            Ok(root) => Self {
                root: PathBuf::from(line(root)),
                within: match of(&["rev-parse", "--show-prefix"])? {
                    Ok(prefix) => line(prefix).to_string_lossy().trim_matches('/').to_owned(),
                    Err(said) => return Err(unusable("git does not say where it is", said)),
                },
                repository: None,
            },
            Err(said) if said.contains("not a git repository") => {
                plain(folder.clone(), String::new())
            }
            Err(said) => {
                return Err(unusable("git cannot read the folder", said)
                    .hint("a folder that is a bare repository has no files; name a work tree"));
            }
        };
        // A repository of somebody's whole home is not that of a source in it.
        let found = match is_too_broad(&found.root) && !found.within.is_empty() {
            true => plain(folder.clone(), String::new()),
            false => found,
        };
        if is_too_broad(&found.root) {
            return Err(Failure::new(
                Code::Usage,
                "folder_too_broad",
                format!("{} is no folder of a source", found.root.display()),
            )
            .hint("go into the folder of the source, or name it with --from DIR"));
        }
        if found.root.join(".git").exists() || !found.within.is_empty() {
            return found.with_repository();
        }
        Ok(found)
    }

    /// Finds the repository, unless it ignores the folder or is of a kind that uploads are not.
    fn with_repository(mut self) -> Result<Self, Failure> {
        let root = self.root.clone();
        let of = |arguments: &[&str]| {
            let mut command = git();
            run(command.current_dir(&root).args(arguments), None)
        };
        let is_ignored = !self.within.is_empty()
            && of(&["check-ignore", "--quiet", "--", &self.within])?.is_ok();
        if is_ignored {
            // What its surroundings leave out stands alone.
            return Ok(Self {
                root: self.root.join(&self.within),
                within: String::new(),
                repository: None,
            });
        }
        let format = of(&["rev-parse", "--show-object-format"])?.unwrap_or_default();
        if line(format) == "sha256" {
            return Ok(self);
        }
        let path = |name: &str| match of(&["rev-parse", "--git-path", name])? {
            Ok(path) => Ok(root.join(line(path))),
            Err(said) => Err(unusable("git does not say where it keeps things", said)),
        };
        let git_dir = match of(&["rev-parse", "--absolute-git-dir"])? {
            Ok(path) => PathBuf::from(line(path)),
            Err(said) => return Err(unusable("git does not say where it keeps things", said)),
        };
        self.repository = Some(Repository {
            git_dir,
            objects: path("objects")?,
            index: path("index")?,
        });
        Ok(self)
    }

    /// What is uploaded, for people.
    pub fn shown(&self) -> String {
        lossy(self.root.as_os_str().as_bytes())
    }

    /// The service's folder in what is uploaded; empty if it is the whole.
    pub fn within(&self) -> &str {
        &self.within
    }

    /// A remote that is somewhere else than on this machine: its name and its address.
    pub fn remote(&self) -> Result<Option<(String, String)>, Failure> {
        if self.repository.is_none() {
            return Ok(None);
        }
        let mut command = git();
        command.current_dir(&self.root);
        let listed = run(
            command.args(["config", "--get-regexp", r"^remote\..*\.url$"]),
            None,
        )?;
        let listed = String::from_utf8_lossy(&listed.unwrap_or_default()).into_owned();
        Ok(listed.lines().find_map(|line| {
            let (key, url) = line.split_once(' ')?;
            let name = key.strip_prefix("remote.")?.strip_suffix(".url")?;
            is_elsewhere(url).then(|| (name.to_owned(), url.to_owned()))
        }))
    }

    /// Takes the content as it is now.
    pub fn content(&self) -> Result<Content, Failure> {
        let scratch = tempfile::Builder::new()
            .prefix("daybook-upload-")
            .tempdir()?;
        let objects = scratch.path().join("objects");
        fs::create_dir_all(objects.join("info"))?;
        let git_dir = match &self.repository {
            Some(repository) => {
                let mut list = repository
                    .objects
                    .canonicalize()?
                    .into_os_string()
                    .into_vec();
                list.push(b'\n');
                fs::write(objects.join("info/alternates"), list)?;
                // What is committed although it is ignored is in there.
                match fs::copy(&repository.index, scratch.path().join("index")) {
                    Err(e) if e.kind() != ErrorKind::NotFound => return Err(e.into()),
                    _ => {}
                }
                repository.git_dir.clone()
            }
            None => {
                let fresh = scratch.path().join("repository");
                let mut init = git();
                init.args([
                    "init",
                    "--quiet",
                    "--bare",
                    "--template=",
                    "--object-format=sha1",
                ]);
                if let Err(said) = run(init.arg(&fresh), None)? {
                    return Err(unusable("no repository can be made aside", said));
                }
                fresh
            }
        };
        let mut content = Content {
            scratch,
            git_dir,
            root: self.root.clone(),
            tree: String::new(),
            files: 0,
            bytes: 0,
            secrets: Vec::new(),
            nested: Vec::new(),
            objects: Vec::new(),
            message: String::new(),
        };
        content.take()?;
        content.message = self.message(&content)?;
        Ok(content)
    }

    /// What the commit says of itself.
    fn message(&self, content: &Content) -> Result<String, Failure> {
        let name = self
            .root
            .file_name()
            .unwrap_or_else(|| OsStr::new("a folder"));
        let name = lossy(name.as_bytes());
        let head = match &self.repository {
            None => None,
            Some(_) => {
                let mut log = content.git();
                log.args([
                    "log",
                    "-1",
                    "--no-show-signature",
                    "--format=%H%n%T%n%s",
                    "HEAD",
                ]);
                run(&mut log, None)?.ok()
            }
        };
        let head = head.map(|text| String::from_utf8_lossy(&text).into_owned());
        let mut lines = head.as_deref().unwrap_or_default().lines();
        Ok(match (lines.next(), lines.next(), lines.next()) {
            (Some(commit), Some(tree), summary) => {
                let summary = summary.unwrap_or_default();
                if tree == content.tree {
                    format!("{summary}\n\nUploaded from the folder {name}, at commit {commit}.\n")
                } else {
                    format!(
                        "{summary}, with changes\n\nUploaded from the folder {name}, at commit \
                         {commit} with changes that are not committed.\n"
                    )
                }
            }
            _ => format!("Content of {name}\n\nUploaded from a folder.\n"),
        })
    }
}

/// Whether a folder is all that a machine or somebody has.
fn is_too_broad(folder: &Path) -> bool {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let home = home.and_then(|home| home.canonicalize().ok());
    folder.parent().is_none() || home.is_some_and(|home| home == folder)
}

/// Whether an address is on another machine: a URL, or what ssh takes as `host:path`.
fn is_elsewhere(url: &str) -> bool {
    if let Some((scheme, _)) = url.split_once("://") {
        return !scheme.eq_ignore_ascii_case("file");
    }
    let before = url.split('/').next().unwrap_or_default();
    before.contains(':')
}

/// Whether a file of this name is likely to hold secrets. Examples of such files do not.
fn looks_secret(path: &[u8]) -> bool {
    let name = path.rsplit(|b| *b == b'/').next().unwrap_or_default();
    let name = String::from_utf8_lossy(name).to_ascii_lowercase();
    let example = ["example", "sample", "template", "dist", "defaults"];
    let folders = String::from_utf8_lossy(path).to_ascii_lowercase();
    let mut folders: Vec<&str> = folders.split('/').collect();
    folders.pop();
    if folders
        .iter()
        .any(|folder| matches!(*folder, ".ssh" | ".aws" | ".gnupg" | ".kube"))
    {
        return true;
    }
    if name == ".env" || name.starts_with(".env.") || name.ends_with(".env") {
        return !name
            .rsplit('.')
            .next()
            .is_some_and(|end| example.contains(&end));
    }
    matches!(
        name.as_str(),
        ".netrc"
            | ".git-credentials"
            | ".pgpass"
            | "id_rsa"
            | "id_dsa"
            | "id_ecdsa"
            | "id_ed25519"
            | "credentials.json"
            | "kubeconfig"
            | ".envrc"
            | ".npmrc"
            | ".pypirc"
    ) || [
        ".pem",
        ".key",
        ".p12",
        ".pfx",
        ".jks",
        ".keystore",
        ".tfstate",
        ".tfvars",
        ".kdbx",
    ]
    .iter()
    .any(|end| name.ends_with(end))
}

impl Content {
    fn git(&self) -> Command {
        let mut command = git();
        command
            .current_dir(&self.root)
            .env("GIT_DIR", &self.git_dir)
            .env("GIT_WORK_TREE", &self.root)
            .env("GIT_INDEX_FILE", self.scratch.path().join("index"))
            .env("GIT_OBJECT_DIRECTORY", self.scratch.path().join("objects"))
            .args(["-c", "core.bare=false"]);
        command
    }

    /// Makes the tree of what is in the folder.
    fn take(&mut self) -> Result<(), Failure> {
        let counted = Counted::default();
        let mut left_out: Vec<u8> = Vec::new();
        let (mut secrets, mut nested) = (Vec::new(), Vec::new());
        self.list(&["--others", "--exclude-standard"], |path| {
            let leave_out = if path.ends_with(b"/") {
                nested.push(lossy(path.trim_ascii_end()));
                true
            } else if looks_secret(path) {
                secrets.push(lossy(path));
                true
            } else {
                false
            };
            if leave_out {
                left_out.extend_from_slice(b":(exclude,literal)");
                left_out.extend_from_slice(path.strip_suffix(b"/").unwrap_or(path));
                left_out.push(0);
                return Ok(());
            }
            counted.add(&self.root, path)
        })?;
        self.list(&["--cached"], |path| counted.add(&self.root, path))?;
        (self.files, self.bytes) = (counted.files.get(), counted.bytes.get());
        let mut add = self.git();
        add.args([
            "add",
            "--all",
            "--pathspec-from-file=-",
            "--pathspec-file-nul",
        ]);
        let wanted = [b".\0".as_slice(), &left_out].concat();
        if let Err(said) = run(&mut add, Some(&wanted))? {
            return Err(unusable("git cannot take all of the folder", said)
                .hint("make it readable, or put it into .gitignore"));
        }
        self.tree = match run(self.git().arg("write-tree"), None)? {
            Ok(tree) => line(tree).to_string_lossy().into_owned(),
            Err(said) => return Err(unusable("git cannot make a tree of the folder", said)),
        };
        let mut list = self.git();
        list.args(["ls-tree", "-r", "-t", "-z", "--full-tree", &self.tree]);
        let listed = match run(&mut list, None)? {
            Ok(listed) => listed,
            Err(said) => return Err(unusable("git cannot list what it took", said)),
        };
        let mut objects = vec![self.tree.clone()];
        for entry in listed.split(|b| *b == 0).filter(|entry| !entry.is_empty()) {
            let entry = String::from_utf8_lossy(entry);
            let (about, path) = entry.split_once('\t').unwrap_or_default();
            let mut about = about.split(' ').skip(1);
            match (about.next(), about.next()) {
                (Some("commit"), _) => nested.push(lossy(path.as_bytes())),
                (Some(_), Some(id)) => objects.push(id.to_owned()),
                _ => {}
            }
        }
        if objects.len() == 1 {
            return Err(Failure::new(
                Code::Usage,
                "folder_empty",
                format!("there is nothing to upload in {}", self.root.display()),
            )
            .hint("name the folder of the source with --from DIR; what git ignores is left out"));
        }
        objects.sort();
        objects.dedup();
        (self.objects, self.secrets, self.nested) = (objects, secrets, nested);
        Ok(())
    }

    /// Lists paths as git does, one after the other, as there may be any number.
    fn list(
        &self,
        which: &[&str],
        mut each: impl FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut command = self.git();
        command.args(["ls-files", "-z"]).args(which);
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = child.map_err(not_started)?;
        let stdout = child.stdout.take().map(BufReader::new);
        let listed = stdout
            .into_iter()
            .flat_map(|out| out.split(0))
            .try_for_each(|path| each(&path?));
        if listed.is_err() {
            let _ = child.kill();
        }
        let mut said = String::new();
        if let Some(stderr) = &mut child.stderr {
            let _ = stderr.take(4096).read_to_string(&mut said);
        }
        let status = child.wait()?;
        listed?;
        if !status.success() {
            let said = lossy(said.lines().next().unwrap_or_default().as_bytes());
            return Err(unusable("git cannot list the folder", said));
        }
        Ok(())
    }

    /// The ids of all files and folders in it.
    pub fn objects(&self) -> &[String] {
        &self.objects
    }

    /// Makes the commit.
    pub fn commit(&self) -> Result<String, Failure> {
        let mut command = self.git();
        let known = run(self.git().args(["var", "GIT_AUTHOR_IDENT"]), None)?.is_ok()
            && run(self.git().args(["var", "GIT_COMMITTER_IDENT"]), None)?.is_ok();
        if !known {
            let name = std::env::var("USER").unwrap_or_default();
            let name = if name.trim().is_empty() {
                "unknown"
            } else {
                &name
            };
            for of in ["AUTHOR", "COMMITTER"] {
                command.env(format!("GIT_{of}_NAME"), name);
                command.env(format!("GIT_{of}_EMAIL"), "");
            }
        }
        command.args(["commit-tree", &self.tree, "-F", "-"]);
        match run(&mut command, Some(self.message.as_bytes()))? {
            Ok(id) => Ok(line(id).to_string_lossy().into_owned()),
            Err(said) => Err(unusable("git cannot make a commit of the folder", said)),
        }
    }

    /// Packs the commit with these objects of it, each as a whole, and says where the pack is. It is
    /// gone with this.
    pub fn pack(&self, commit: &str, objects: &[String]) -> Result<(PathBuf, u64), Failure> {
        let path = self.scratch.path().join("pack");
        let mut command = self.git();
        command
            .args([
                "pack-objects",
                "--stdout",
                "-q",
                "--window=0",
                "--no-reuse-delta",
            ])
            .stdin(Stdio::piped())
            .stdout(fs::File::create(&path)?)
            .stderr(Stdio::null());
        let mut child = command.spawn().map_err(not_started)?;
        if let Some(mut stdin) = child.stdin.take() {
            for id in std::iter::once(commit).chain(objects.iter().map(String::as_str)) {
                // Git that ends early has failed.
                if writeln!(stdin, "{id}").is_err() {
                    break;
                }
            }
        }
        if !child.wait()?.success() {
            return Err(unusable(
                "git cannot pack the folder",
                "it does not say why",
            ));
        }
        let bytes = fs::metadata(&path)?.len();
        Ok((path, bytes))
    }

    /// What the most room is taken by, for people.
    pub fn largest(&self) -> String {
        let counted = Counted::default();
        let each = |path: &[u8]| {
            counted.note(&self.root, path);
            Ok(())
        };
        match self.list(&["--cached"], each) {
            Ok(()) => counted.largest(),
            Err(_) => "not known".into(),
        }
    }
}

/// How much there is, and of what.
#[derive(Default)]
struct Counted {
    files: Cell<u64>,
    bytes: Cell<u64>,
    tops: std::cell::RefCell<BTreeMap<Vec<u8>, (u64, u64)>>,
}

impl Counted {
    /// Counts a file, unless it is one too many.
    fn add(&self, root: &Path, path: &[u8]) -> Result<(), Failure> {
        self.note(root, path);
        let too_much = if self.files.get() > FILES_MAX {
            format!("more than {FILES_MAX} files")
        } else if self.bytes.get() > BYTES_MAX {
            format!("more than {}", size(BYTES_MAX))
        } else {
            return Ok(());
        };
        Err(Failure::new(
            Code::Usage,
            "folder_too_large",
            format!(
                "{} has {too_much} that git does not ignore; the most so far is in {}",
                root.display(),
                self.largest()
            ),
        )
        .hint("put what is not source, such as dependencies and build output, into .gitignore"))
    }

    fn note(&self, root: &Path, path: &[u8]) {
        let full = root.join(OsStr::from_bytes(path));
        // What is deleted is in the index still.
        let Ok(about) = full.symlink_metadata() else {
            return;
        };
        if about.is_dir() {
            return;
        }
        self.files.set(self.files.get() + 1);
        self.bytes.set(self.bytes.get().saturating_add(about.len()));
        let top = path.split(|b| *b == b'/').next().unwrap_or_default();
        let mut tops = self.tops.borrow_mut();
        let (files, bytes) = tops.entry(top.to_vec()).or_default();
        *files += 1;
        *bytes = bytes.saturating_add(about.len());
    }

    fn largest(&self) -> String {
        let tops = self.tops.borrow();
        let mut tops: Vec<_> = tops.iter().collect();
        tops.sort_by_key(|(_, (files, bytes))| std::cmp::Reverse((*bytes, *files)));
        let named = tops.iter().take(NAMED).map(|(name, (files, bytes))| {
            let files = match files {
                1 => String::new(),
                files => format!("{files} files, "),
            };
            format!("{} ({files}{})", lossy(name), size(*bytes))
        });
        named.collect::<Vec<_>>().join(", ")
    }
}

/// Bytes in words.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} bytes"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}
