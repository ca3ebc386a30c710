//! A GitOps repository as its branch has it: files, history, and whether a secret is in it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The largest object that is read, in bytes.
const OBJECT_MAX: u64 = 64 * 1024 * 1024;

/// A repository at the newest commit of its branch.
#[derive(Debug)]
pub(super) struct AtHead {
    path: PathBuf,
    /// The commit.
    pub(super) head: String,
}

/// One file of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TreeFile {
    pub(super) path: String,
    pub(super) executable: bool,
    object: String,
}

impl AtHead {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut this = Self {
            path: path.to_owned(),
            head: String::new(),
        };
        let head = this.output(&["rev-parse", "--verify", "refs/heads/main^{commit}"], b"")?;
        this.head = String::from_utf8_lossy(&head).trim().to_owned();
        Ok(this)
    }

    fn git(&self, arguments: &[&str]) -> Command {
        let mut command = crate::git::git();
        command
            .arg("--git-dir")
            .arg(&self.path)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        command
    }

    fn output(&self, arguments: &[&str], input: &[u8]) -> io::Result<Vec<u8>> {
        let mut child = self.git(arguments).spawn()?;
        let written = match child.stdin.take() {
            Some(mut stdin) => stdin.write_all(input),
            None => Ok(()),
        };
        let output = child.wait_with_output()?;
        if output.status.success() {
            return written.map(|()| output.stdout);
        }
        let what = arguments.first().copied().unwrap_or_default();
        Err(io::Error::other(format!("git {what}: {}", output.status)))
    }

    /// The files of the newest commit that any machine can have: no links, no submodules, and no
    /// paths that lead out of a folder or into git's own.
    pub(super) fn files(&self) -> io::Result<Vec<TreeFile>> {
        let listed = self.output(&["ls-tree", "-r", "-z", "--full-tree", &self.head], b"")?;
        let entries = listed.split(|b| *b == 0).filter(|e| !e.is_empty());
        let mut files: Vec<TreeFile> = entries.filter_map(tree_file).collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(files)
    }

    /// Reads objects one after the other.
    pub(super) fn objects(&self) -> io::Result<Objects> {
        let mut child = self.git(&["cat-file", "--batch"]).spawn()?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(stdin), Some(stdout)) => Ok(Objects {
                child,
                stdin: Some(stdin),
                stdout: BufReader::new(stdout),
            }),
            _ => Err(io::Error::other("git cat-file has no pipes")),
        }
    }

    /// All objects of the history.
    pub(super) fn reachable(&self) -> io::Result<Vec<String>> {
        let listed = self.output(
            &["rev-list", "--objects", "--no-object-names", &self.head],
            b"",
        )?;
        let text = String::from_utf8_lossy(&listed);
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// Packs the whole history into a folder; the same bytes for the same history, however the
    /// repository keeps it. Returns the name of the pack, without its ending.
    pub(super) fn pack_into(&self, folder: &Path) -> io::Result<String> {
        let base = folder.join("pack");
        let base = base
            .to_str()
            .ok_or_else(|| io::Error::other("the folder's name is not UTF-8"))?;
        let name = self.output(
            &[
                "-c",
                "pack.threads=1",
                "-c",
                "pack.writeReverseIndex=false",
                "-c",
                "core.compression=6",
                "pack-objects",
                "--revs",
                "--no-reuse-delta",
                "--no-reuse-object",
                "--quiet",
                base,
            ],
            format!("{}\n", self.head).as_bytes(),
        )?;
        Ok(format!("pack-{}", String::from_utf8_lossy(&name).trim()))
    }
}

fn tree_file(entry: &[u8]) -> Option<TreeFile> {
    let entry = std::str::from_utf8(entry).ok()?;
    let (about, path) = entry.split_once('\t')?;
    let mut about = about.split(' ');
    let executable = match about.next()? {
        "100644" | "100664" => false,
        "100755" => true,
        _ => return None,
    };
    let object = about.nth(1)?.to_owned();
    let harmless = |part: &str| {
        !(part.is_empty()
            || part == "."
            || part == ".."
            || part.eq_ignore_ascii_case(".git")
            || part.contains(['\\', ':'])
            || part.chars().any(char::is_control))
    };
    path.split('/').all(harmless).then(|| TreeFile {
        path: path.to_owned(),
        executable,
        object,
    })
}

/// A running `git cat-file`. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Objects {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Drop for Objects {
    fn drop(&mut self) {
        self.stdin = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Objects {
    /// The content of a file.
    pub(super) fn file(&mut self, file: &TreeFile) -> io::Result<Vec<u8>> {
        self.object(&file.object)
    }

    /// The content of an object.
    pub(super) fn object(&mut self, id: &str) -> io::Result<Vec<u8>> {
        let stdin = self.stdin.as_mut();
        let stdin = stdin.ok_or_else(|| io::Error::other("git cat-file has ended"))?;
        stdin.write_all(format!("{id}\n").as_bytes())?;
        stdin.flush()?;
        let mut head = String::new();
        self.stdout.read_line(&mut head)?;
        let size = head.trim_end().rsplit(' ').next();
        let size: u64 = size
            .and_then(|size| size.parse().ok())
            .ok_or_else(|| io::Error::other(format!("git cat-file: {}", head.trim_end())))?;
        if size > OBJECT_MAX {
            return Err(io::Error::other(format!("object {id} is too large")));
        }
        let mut content = Vec::new();
        let mut rest = (&mut self.stdout).take(size + 1);
        rest.read_to_end(&mut content)?;
        // It is followed by a line break that is no part of it.
        if content.pop().is_none() || content.len() as u64 != size {
            return Err(io::Error::other(format!("git cat-file ended within {id}")));
        }
        Ok(content)
    }
}

#[cfg(test)]
mod tests {
    use super::tree_file;

    #[test]
    fn only_files_that_stay_in_their_folder_are_taken() {
        let entry = |mode: &str, path: &str| format!("{mode} blob {}\t{path}", "a".repeat(40));
        for (mode, path, taken) in [
            ("100644", "base/Chart.yaml", true),
            ("100755", "run me.sh", true),
            ("120000", "link", false),
            ("160000", "submodule", false),
            ("100644", "../up", false),
            ("100644", "a/.GIT/hooks/x", false),
            ("100644", "c:x", false),
            ("100644", "a\\..\\b", false),
            ("100644", "/root", false),
        ] {
            assert_eq!(
                tree_file(entry(mode, path).as_bytes()).is_some(),
                taken,
                "{path}"
            );
        }
    }
}
