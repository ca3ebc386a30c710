//! Writing a commit's files into a folder.
//!
//! libgit2's own checkout would read the repository's attributes and apply filters, needs an
//! index, and writes links while it writes files. This one is made for trees of strangers:
//! - it goes into a new folder beside the target, which is renamed when all is written;
//! - every folder is created by itself and every file exclusively, and links come last: while
//!   anything is written, no link exists that it could be written through;
//! - links that lead out of the folder are left out, also those that do so by way of other links.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io::{ErrorKind, Write as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Component, Path, PathBuf};

use git2::{Oid, Repository};
use uuid::Uuid;

use super::SourceError;
use super::cache::Trouble;
use crate::git_transport::{Progress, Session, printable};

/// How many links are followed before they are taken for a circle.
const MAX_LINKS: usize = 40;

/// How much may be checked out. A small pack can hold a huge tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckoutLimits {
    /// Most files, folders and links.
    pub entries: u64,
    /// Most bytes in files.
    pub bytes: u64,
    /// Deepest nesting of folders.
    pub depth: u64,
}

impl Default for CheckoutLimits {
    fn default() -> Self {
        Self {
            entries: 500_000,
            bytes: 4 << 30,
            depth: 128,
        }
    }
}

/// What was checked out, and what was left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checkout {
    /// How many files were written.
    pub files: u64,
    /// How many bytes they have.
    pub bytes: u64,
    /// Paths of submodules. They are not followed, and their folders are not made.
    pub submodules: Vec<String>,
    /// Links that were not made, because they lead out of the folder.
    pub links_left_out: Vec<String>,
}

/// Checks a commit out. Its objects are in the repository; one that is missing or does not verify
/// is the mirror's trouble.
pub(super) fn check_out(
    repository: &Repository,
    commit: Oid,
    into: &Path,
    limits: CheckoutLimits,
    progress: &Progress,
    session: &Session,
) -> Result<Checkout, Trouble> {
    refuse_used_folder(into)?;
    let parent = into.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).map_err(SourceError::disk(parent))?;
    let partial = Partial(parent.join(format!(".checkout-{}", Uuid::now_v7().simple())));
    let mut writer = Writer {
        repository,
        root: &partial.0,
        limits,
        progress,
        session,
        entries: 0,
        links: HashMap::new(),
        done: Checkout::default(),
    };
    writer.write_tree(repository.find_commit(commit)?.tree_id())?;
    writer.write_links()?;
    let done = writer.done;
    // Renaming replaces an empty folder, and nothing else.
    fs::rename(&partial.0, into).map_err(|e| match e.kind() {
        ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists | ErrorKind::NotADirectory => {
            SourceError::FolderInUse {
                path: into.to_owned(),
            }
        }
        _ => SourceError::disk(into)(e),
    })?;
    progress(format!("checked out {} files", done.files));
    Ok(done)
}

fn refuse_used_folder(into: &Path) -> Result<(), SourceError> {
    let in_use = || SourceError::FolderInUse {
        path: into.to_owned(),
    };
    match fs::symlink_metadata(into) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(SourceError::disk(into)(e)),
        Ok(m) if !m.is_dir() => Err(in_use()),
        Ok(_) => match fs::read_dir(into).map_err(SourceError::disk(into))?.next() {
            None => Ok(()),
            Some(_) => Err(in_use()),
        },
    }
}

/// The folder that is written to. Removed with all in it unless it was renamed.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Writer<'a> {
    repository: &'a Repository,
    root: &'a Path,
    limits: CheckoutLimits,
    progress: &'a Progress,
    session: &'a Session,
    entries: u64,
    /// Links to be made, by their path within the folder.
    links: HashMap<PathBuf, PathBuf>,
    done: Checkout,
}

impl Writer<'_> {
    fn write_tree(&mut self, root: Oid) -> Result<(), Trouble> {
        let mut folders = vec![(root, PathBuf::new(), 0)];
        while let Some((id, path, depth)) = folders.pop() {
            if depth > self.limits.depth {
                return Err(too_large(self.limits.depth, "nested folders"));
            }
            self.make_folder(&path)?;
            let tree = self.repository.find_tree(id)?;
            for entry in &tree {
                self.session.check_cancelled()?;
                self.entries += 1;
                if self.entries > self.limits.entries {
                    return Err(too_large(self.limits.entries, "files and folders"));
                }
                let path = path.join(checked_name(&path, entry.name_bytes())?);
                match entry.filemode() {
                    0o040000 => folders.push((entry.id(), path, depth + 1)),
                    0o100644 => self.write_file(entry.id(), &path, 0o644)?,
                    0o100755 => self.write_file(entry.id(), &path, 0o755)?,
                    0o120000 => self.note_link(entry.id(), path)?,
                    0o160000 => self.done.submodules.push(shown(&path)),
                    _ => return Err(unsafe_path(&path, "its mode is none that git knows")),
                }
            }
        }
        Ok(())
    }

    fn make_folder(&self, path: &Path) -> Result<(), Trouble> {
        let full = self.root.join(path);
        fs::create_dir(&full).map_err(|e| self.not_written(path, &full, e))
    }

    fn write_file(&mut self, id: Oid, path: &Path, mode: u32) -> Result<(), Trouble> {
        let (size, _) = self.repository.odb()?.read_header(id)?;
        if self.done.bytes.saturating_add(size as u64) > self.limits.bytes {
            return Err(too_large(self.limits.bytes, "bytes"));
        }
        let blob = self.repository.find_blob(id)?;
        let full = self.root.join(path);
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&full)
            .and_then(|mut f| f.write_all(blob.content()))
            .map_err(|e| self.not_written(path, &full, e))?;
        self.done.files += 1;
        self.done.bytes += size as u64;
        if self.done.files.is_multiple_of(1000) {
            (self.progress)(format!("checking out file {}", self.done.files));
        }
        Ok(())
    }

    fn note_link(&mut self, id: Oid, path: PathBuf) -> Result<(), Trouble> {
        let (size, _) = self.repository.odb()?.read_header(id)?;
        if size == 0 || size >= 4096 {
            return Err(unsafe_path(
                &path,
                "the target of the link is too long or empty",
            ));
        }
        let target = self.repository.find_blob(id)?.content().to_owned();
        if target.contains(&0) {
            return Err(unsafe_path(
                &path,
                "the target of the link contains a zero byte",
            ));
        }
        if self
            .links
            .insert(path.clone(), PathBuf::from(OsString::from_vec(target)))
            .is_some()
        {
            return Err(unsafe_path(&path, "it is there twice"));
        }
        Ok(())
    }

    fn write_links(&mut self) -> Result<(), Trouble> {
        let mut paths: Vec<&PathBuf> = self.links.keys().collect();
        paths.sort();
        for path in paths {
            if !stays_inside(&self.links, path) {
                self.done.links_left_out.push(shown(path));
                (self.progress)(format!(
                    "left out the link {}: it leads out of the repository",
                    shown(path)
                ));
                continue;
            }
            let full = self.root.join(path);
            std::os::unix::fs::symlink(&self.links[path], &full)
                .map_err(|e| self.not_written(path, &full, e))?;
        }
        Ok(())
    }

    fn not_written(&self, path: &Path, full: &Path, error: std::io::Error) -> Trouble {
        match error.kind() {
            ErrorKind::AlreadyExists if !path.as_os_str().is_empty() => {
                unsafe_path(path, "it is there twice")
            }
            _ => SourceError::disk(full)(error).into(),
        }
    }
}

/// Whether following a link ends inside the folder, by whatever other links. What does not exist
/// is taken for folders: nothing is read there now, and nothing is linked there later.
fn stays_inside(links: &HashMap<PathBuf, PathBuf>, link: &Path) -> bool {
    let mut at = PathBuf::new();
    // The components still to be walked, last one first.
    let mut ahead: Vec<OsString> = components(link).rev().collect();
    let mut followed = 0;
    while let Some(name) = ahead.pop() {
        if name == ".." {
            if !at.pop() {
                return false;
            }
            continue;
        }
        at.push(&name);
        let Some(target) = links.get(&at) else {
            continue;
        };
        followed += 1;
        if target.is_absolute() || followed > MAX_LINKS {
            return false;
        }
        at.pop();
        ahead.extend(components(target).rev());
    }
    true
}

/// The names of a relative path, `..` included.
fn components(path: &Path) -> impl DoubleEndedIterator<Item = OsString> {
    path.components().filter_map(|c| match c {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::CurDir | Component::RootDir | Component::Prefix(_) => None,
    })
}

fn checked_name(folder: &Path, name: &[u8]) -> Result<OsString, Trouble> {
    let rule = match name {
        b"" => "it has no name",
        b"." | b".." => "it would be another folder",
        n if n.contains(&b'/') || n.contains(&0) => "it has a slash or a zero byte in a name",
        n if n.eq_ignore_ascii_case(b".git") => "git would take it for its own",
        n => return Ok(OsString::from_vec(n.to_owned())),
    };
    let path = folder.join(std::ffi::OsStr::from_bytes(name));
    Err(unsafe_path(&path, rule))
}

fn unsafe_path(path: &Path, rule: &'static str) -> Trouble {
    SourceError::UnsafeTree {
        path: shown(path),
        rule,
    }
    .into()
}

fn too_large(limit: u64, unit: &'static str) -> Trouble {
    SourceError::CheckoutTooLarge { limit, unit }.into()
}

fn shown(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_followed_to_see_whether_they_stay_inside() {
        let links: HashMap<PathBuf, PathBuf> = [
            ("inside", "dir/file"),
            ("dangling", "no/such/file"),
            ("dir/up", ".."),
            ("dir/sibling", "../other/./x"),
            ("absolute", "/etc/passwd"),
            ("out", "../x"),
            ("deep/out", "../../x"),
            // Each of its two steps looks harmless.
            ("sneaky", "dir/up/.."),
            ("via", "out/y"),
            ("circle", "circle"),
            ("there-and-back", "dir/../dir"),
        ]
        .into_iter()
        .map(|(a, b)| (a.into(), b.into()))
        .collect();
        for ok in [
            "inside",
            "dangling",
            "dir/up",
            "dir/sibling",
            "there-and-back",
        ] {
            assert!(stays_inside(&links, Path::new(ok)), "{ok}");
        }
        for bad in ["absolute", "out", "deep/out", "sneaky", "via", "circle"] {
            assert!(!stays_inside(&links, Path::new(bad)), "{bad}");
        }
    }
}
