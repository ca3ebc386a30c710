//! A source folder as one layer, the same bytes for the same files.
//!
//! Entries are in order of name, with the commit's time, owner 0:0 and mode 755 or 644. Left out
//! are `.git`, what `.dockerignore` names, and what Cargo leaves in `target/` besides finished
//! programs. `.gitignore` is *not* looked at: what is committed belongs in, and so does what the
//! build command made, which is usually ignored by git.
//!
//! Symbolic links are kept if they lead to something within the folder. Others, and all that is
//! neither file, folder nor link, are refused: they would mean something else in the image.

use std::ffi::{OsStr, OsString};
use std::fs::{self, OpenOptions};
use std::io::{self, Read as _, Write};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Component, Path, PathBuf};

use daybook_events::Digest;
use flate2::{Compression, GzBuilder, write::GzEncoder};
use ignore::gitignore::{Gitignore, GitignoreBuilder};
use rustix::fs::OFlags;
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use super::BuildError;
use crate::image::layout::{BlobWriter, Layout};

/// A layer that was written into a layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layer {
    /// The digest of the compressed layer, by which it is stored.
    pub(crate) digest: Digest,
    /// Its compressed size in bytes.
    pub(crate) size: u64,
    /// The digest of the uncompressed layer, as the configuration names it.
    pub(crate) diff_id: Digest,
    /// How many files and links are in it.
    pub(crate) files: u64,
}

/// Packs a folder as the folder `prefix` of an image.
pub(crate) fn pack(
    layout: &Layout,
    folder: &Path,
    prefix: &str,
    modified: u64,
    stop: &CancellationToken,
) -> Result<Layer, BuildError> {
    let root = folder
        .canonicalize()
        .map_err(BuildError::io(format!("reading {}", folder.display())))?;
    // Nothing in the compressed form tells when, where or from what it was made.
    let compressed = GzBuilder::new()
        .mtime(0)
        .write(layout.writer()?, Compression::default());
    let hashed = Hashed {
        inner: compressed,
        hash: Sha256::new(),
    };
    let mut packer = Packer {
        ignored: dockerignore(&root)?,
        has_cargo: root.join("Cargo.toml").is_file(),
        root,
        prefix: PathBuf::from(prefix),
        modified,
        archive: tar::Builder::new(hashed),
        files: 0,
        stop,
    };
    packer.folder(Path::new(""))?;

    let failed = || BuildError::io("writing the layer");
    let files = packer.files;
    let hashed = packer.archive.into_inner().map_err(failed())?;
    let diff_id = Digest::from_sha256(&hashed.hash.finalize().into());
    let written = hashed.inner.finish().map_err(failed())?.finish(None)?;
    Ok(Layer {
        digest: written.digest,
        size: written.size,
        diff_id,
        files,
    })
}

/// Copies a checkout, without `.git`, so that a build command may write in it.
pub(crate) fn copy_tree(
    from: &Path,
    to: &Path,
    stop: &CancellationToken,
) -> Result<(), BuildError> {
    let mut todo = vec![PathBuf::new()];
    while let Some(folder) = todo.pop() {
        for name in names(&from.join(&folder))? {
            if stop.is_cancelled() {
                return Err(BuildError::Cancelled);
            }
            let path = folder.join(name);
            let (source, target) = (from.join(&path), to.join(&path));
            let doing = || format!("copying {}", path.display());
            let kind = fs::symlink_metadata(&source)
                .map_err(BuildError::io(doing()))?
                .file_type();
            if kind.is_dir() {
                fs::create_dir(&target).map_err(BuildError::io(doing()))?;
                todo.push(path);
            } else if kind.is_symlink() {
                fs::read_link(&source)
                    .and_then(|t| std::os::unix::fs::symlink(t, &target))
                    .map_err(BuildError::io(doing()))?;
            } else if kind.is_file() {
                fs::copy(&source, &target).map_err(BuildError::io(doing()))?;
            } else {
                return Err(refused(&path, NOT_A_FILE));
            }
        }
    }
    Ok(())
}

const NOT_A_FILE: &str = "only files, folders and symbolic links can be in an image";

struct Packer<'a> {
    root: PathBuf,
    prefix: PathBuf,
    modified: u64,
    ignored: Gitignore,
    has_cargo: bool,
    archive: tar::Builder<Hashed<GzEncoder<BlobWriter>>>,
    files: u64,
    stop: &'a CancellationToken,
}

impl Packer<'_> {
    fn folder(&mut self, folder: &Path) -> Result<(), BuildError> {
        let mut header = self.header(tar::EntryType::Directory, 0o755, 0);
        self.append(&mut header, folder, io::empty())?;
        for name in names(&self.root.join(folder))? {
            if self.stop.is_cancelled() {
                return Err(BuildError::Cancelled);
            }
            let path = folder.join(name);
            let meta = fs::symlink_metadata(self.root.join(&path))
                .map_err(BuildError::io(format!("reading {}", path.display())))?;
            if meta.is_dir() {
                // A folder that is left out may still have parts that a later rule lets in, so
                // its contents are looked at; it appears only if there are any.
                if self.is_left_out(&path, true) && !self.has_wanted_contents(&path)? {
                    continue;
                }
                self.folder(&path)?;
            } else if self.is_left_out(&path, false) {
                continue;
            } else if meta.is_symlink() {
                self.link(&path)?;
            } else if meta.is_file() {
                self.file(&path)?;
            } else {
                return Err(refused(&path, NOT_A_FILE));
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path) -> Result<(), BuildError> {
        let doing = || format!("packing {}", path.display());
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(self.root.join(path))
            .map_err(BuildError::io(doing()))?;
        let meta = file.metadata().map_err(BuildError::io(doing()))?;
        let mode = if meta.permissions().mode() & 0o111 == 0 {
            0o644
        } else {
            0o755
        };
        let mut header = self.header(tar::EntryType::Regular, mode, meta.len());
        let mut contents = file.take(meta.len());
        self.append(&mut header, path, &mut contents)?;
        if contents.limit() > 0 {
            return Err(refused(path, "it changed while it was packed"));
        }
        self.files += 1;
        Ok(())
    }

    fn link(&mut self, path: &Path) -> Result<(), BuildError> {
        let full = self.root.join(path);
        let target = fs::read_link(&full).map_err(BuildError::io(format!(
            "reading the link {}",
            path.display()
        )))?;
        let stays = match full.canonicalize() {
            Ok(end) => end.starts_with(&self.root),
            // It leads to nothing; then only what it says can be judged.
            Err(_) => stays_within(path, &target),
        };
        if target.is_absolute() || !stays {
            return Err(refused(path, "the symbolic link leads out of the source"));
        }
        let mut header = self.header(tar::EntryType::Symlink, 0o777, 0);
        self.archive
            .append_link(&mut header, self.prefix.join(path), &target)
            .map_err(BuildError::io(format!("packing {}", path.display())))?;
        self.files += 1;
        Ok(())
    }

    fn header(&self, kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header.set_mtime(self.modified);
        header.set_uid(0);
        header.set_gid(0);
        header
    }

    fn append(
        &mut self,
        header: &mut tar::Header,
        path: &Path,
        contents: impl io::Read,
    ) -> Result<(), BuildError> {
        self.archive
            .append_data(header, self.prefix.join(path), contents)
            .map_err(BuildError::io(format!("packing {}", path.display())))
    }

    fn is_left_out(&self, path: &Path, is_folder: bool) -> bool {
        (self.has_cargo && is_cargo_residue(path, is_folder, &self.root))
            || self
                .ignored
                .matched_path_or_any_parents(path, is_folder)
                .is_ignore()
    }

    fn has_wanted_contents(&self, folder: &Path) -> Result<bool, BuildError> {
        if self.ignored.num_whitelists() == 0 && !self.has_cargo {
            return Ok(false);
        }
        for name in names(&self.root.join(folder))? {
            let path = folder.join(name);
            let is_folder = fs::symlink_metadata(self.root.join(&path)).is_ok_and(|m| m.is_dir());
            let wanted = if is_folder {
                self.has_wanted_contents(&path)?
            } else {
                !self.is_left_out(&path, false)
            };
            if wanted {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// The names in a folder in order, without `.git`.
fn names(folder: &Path) -> Result<Vec<OsString>, BuildError> {
    let read = || -> io::Result<Vec<OsString>> {
        let mut names = fs::read_dir(folder)?
            .map(|entry| entry.map(|e| e.file_name()))
            .collect::<io::Result<Vec<_>>>()?;
        names.retain(|name| name != OsStr::new(".git"));
        names.sort();
        Ok(names)
    };
    read().map_err(BuildError::io(format!("reading {}", folder.display())))
}

/// Whether this is something in Cargo's `target/` that is no finished program. A release build
/// leaves gigabytes of it.
fn is_cargo_residue(path: &Path, is_folder: bool, root: &Path) -> bool {
    let parts: Vec<_> = path.components().map(|c| c.as_os_str()).collect();
    match parts.as_slice() {
        [target, ..] if *target != "target" => false,
        [_, release, name] if *release == "release" => {
            is_folder
                || Path::new(name).extension().is_some()
                || !super::command::is_executable(&root.join(path))
        }
        [] => false,
        _ => true,
    }
}

/// The rules of `.dockerignore`. Its patterns are anchored to the folder, unlike those of
/// `.gitignore`.
fn dockerignore(root: &Path) -> Result<Gitignore, BuildError> {
    let path = root.join(".dockerignore");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Gitignore::empty()),
        Err(e) => return Err(BuildError::io("reading .dockerignore")(e)),
    };
    // Paths are matched relative to the folder.
    let mut rules = GitignoreBuilder::new("");
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (not, pattern) = match line.strip_prefix('!') {
            Some(rest) => ("!", rest.trim()),
            None => ("", line),
        };
        let pattern = pattern.trim_start_matches("./").trim_matches('/');
        if pattern.is_empty() || pattern == "." {
            continue;
        }
        rules
            .add_line(None, &format!("{not}/{pattern}"))
            .map_err(|_| {
                refused(
                    Path::new(".dockerignore"),
                    "it has a pattern that is not valid",
                )
            })?;
    }
    rules.build().map_err(|_| {
        refused(
            Path::new(".dockerignore"),
            "it has a pattern that is not valid",
        )
    })
}

/// Whether the target of a link at `path`, as it is written, stays within the folder.
fn stays_within(path: &Path, target: &Path) -> bool {
    let mut depth = path.components().count().saturating_sub(1);
    for component in target.components() {
        match component {
            Component::ParentDir if depth == 0 => return false,
            Component::ParentDir => depth -= 1,
            Component::Normal(_) => depth += 1,
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return false,
        }
    }
    true
}

fn refused(path: &Path, reason: &'static str) -> BuildError {
    BuildError::SourceRefused {
        path: path.display().to_string(),
        reason,
    }
}

/// Hashes what passes through.
struct Hashed<W> {
    inner: W,
    hash: Sha256,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hash.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
