//! Git repositories and remotes, made and served by the real `git` program.
//!
//! `git` runs without the machine's configuration and with fixed names and times, so that the
//! same steps give the same commit ids everywhere.

mod http;
mod ssh;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

pub use http::{GitHttpServer, Seen};
pub use ssh::SshServer;

/// Runs `git` in a folder and returns what it prints.
///
/// # Panics
/// When it fails, with what it said.
pub fn git(folder: &Path, arguments: &[&str]) -> String {
    let output = git_command(folder)
        .args(arguments)
        .output()
        .expect("git is on PATH");
    assert!(
        output.status.success(),
        "git {arguments:?} in {}: {}",
        folder.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout)
        .trim_end()
        .to_owned()
}

/// `git` in a folder, without the machine's configuration.
pub fn git_command(folder: &Path) -> Command {
    let mut command = Command::new("git");
    command
        .current_dir(folder)
        .stdin(Stdio::null())
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_AUTHOR_NAME", "Ada Example")
        .env("GIT_AUTHOR_EMAIL", "ada@example.com")
        .env("GIT_AUTHOR_DATE", "2024-05-06T07:08:09Z")
        .env("GIT_COMMITTER_NAME", "Ada Example")
        .env("GIT_COMMITTER_EMAIL", "ada@example.com")
        .env("GIT_COMMITTER_DATE", "2024-05-06T07:08:09Z")
        .env("LC_ALL", "C")
        .env_remove("GIT_DIR")
        .env_remove("GIT_WORK_TREE");
    command
}

/// A repository with a work tree, as a developer has it. Removed when dropped.
#[derive(Debug)]
pub struct SourceRepository {
    folder: TempDir,
}

impl Default for SourceRepository {
    fn default() -> Self {
        Self::new()
    }
}

impl SourceRepository {
    /// An empty repository on branch `main`.
    pub fn new() -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        git(folder.path(), &["init", "--quiet", "--initial-branch=main"]);
        Self { folder }
    }

    /// Where it is. An absolute path, which is also a URL for git.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The path as text.
    pub fn url(&self) -> String {
        self.path().display().to_string()
    }

    /// Writes a file, with the folders that it needs, without committing it.
    pub fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.path().join(path);
        fs::create_dir_all(path.parent().expect("a file within the repository"))
            .expect("folders can be made");
        fs::write(path, content).expect("a file can be written");
    }

    /// Commits these files, beside those that are there, and returns the commit's id.
    pub fn commit(&self, message: &str, files: &[(&str, &str)]) -> String {
        for (path, content) in files {
            self.write(path, content);
        }
        self.commit_all(message)
    }

    /// Commits all that is in the work tree and returns the commit's id.
    pub fn commit_all(&self, message: &str) -> String {
        self.git(&["add", "--all"]);
        self.git(&["commit", "--quiet", "--allow-empty", "-m", message]);
        self.head()
    }

    /// The commit that is checked out.
    pub fn head(&self) -> String {
        self.git(&["rev-parse", "HEAD"])
    }

    /// Makes a branch here and checks it out.
    pub fn branch(&self, name: &str) {
        self.git(&["checkout", "--quiet", "-b", name]);
    }

    /// Checks a branch out.
    pub fn checkout(&self, name: &str) {
        self.git(&["checkout", "--quiet", name]);
    }

    /// Makes a tag here: a lightweight one, or an annotated one with a message.
    pub fn tag(&self, name: &str, message: Option<&str>) {
        match message {
            Some(message) => self.git(&["tag", "-a", name, "-m", message]),
            None => self.git(&["tag", name]),
        };
    }

    /// Runs `git` here.
    pub fn git(&self, arguments: &[&str]) -> String {
        git(self.path(), arguments)
    }
}

/// A bare repository to push to. Removed when dropped.
#[derive(Debug)]
pub struct BareRemote {
    folder: TempDir,
}

impl Default for BareRemote {
    fn default() -> Self {
        Self::new()
    }
}

impl BareRemote {
    /// The repository's folder within [`Self::root`].
    pub const NAME: &str = "repository.git";

    /// An empty bare repository on branch `main`, which may be pushed to over HTTP.
    pub fn new() -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        git(
            folder.path(),
            &[
                "init",
                "--quiet",
                "--bare",
                "--initial-branch=main",
                Self::NAME,
            ],
        );
        let remote = Self { folder };
        remote.git(&["config", "http.receivepack", "true"]);
        remote
    }

    /// A bare copy of a repository.
    pub fn copy_of(source: &SourceRepository) -> Self {
        let remote = Self::new();
        source.git(&[
            "push",
            "--quiet",
            "--all",
            &remote.path().display().to_string(),
        ]);
        source.git(&[
            "push",
            "--quiet",
            "--tags",
            &remote.path().display().to_string(),
        ]);
        remote
    }

    /// The folder that an HTTP server serves.
    pub fn root(&self) -> &Path {
        self.folder.path()
    }

    /// Where the repository is.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join(Self::NAME)
    }

    /// Runs `git` in it.
    pub fn git(&self, arguments: &[&str]) -> String {
        git(&self.path(), arguments)
    }

    /// From now on every push through `git receive-pack` is refused with this message.
    pub fn refuse_pushes(&self, message: &str) {
        self.hook("pre-receive", &format!("echo '{message}' >&2; exit 1"));
    }

    /// Accepts pushes again.
    pub fn accept_pushes(&self) {
        let _ = fs::remove_file(self.path().join("hooks/pre-receive"));
    }

    /// Installs a hook, as a shell script.
    pub fn hook(&self, name: &str, script: &str) {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.path().join("hooks").join(name);
        fs::create_dir_all(path.parent().expect("hooks")).expect("a folder can be made");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("a hook can be written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("permissions");
    }

    /// Somebody else's commit on `main`, pushed by hand from a clone.
    pub fn foreign_commit(&self, message: &str, files: &[(&str, &str)]) -> String {
        let clone = TempDir::new().expect("a temporary folder");
        let url = self.path().display().to_string();
        git(clone.path(), &["clone", "--quiet", &url, "."]);
        for (path, content) in files {
            let path = clone.path().join(path);
            fs::create_dir_all(path.parent().expect("a file within")).expect("folders");
            fs::write(path, content).expect("a file can be written");
        }
        git(clone.path(), &["add", "--all"]);
        git(
            clone.path(),
            &["commit", "--quiet", "--allow-empty", "-m", message],
        );
        git(clone.path(), &["push", "--quiet", "origin", "HEAD:main"]);
        git(clone.path(), &["rev-parse", "HEAD"])
    }
}
