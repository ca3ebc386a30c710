//! Layers to a folder, without trust in what the archives say.
//!
//! The result is what the image specification defines: layers applied in order, `.wh.<name>`
//! removes what a lower layer put there, `.wh..wh..opq` empties a folder of what lower layers put
//! there. Three things differ, because the folder is used without `chroot`:
//!
//! - Symbolic links with absolute targets become relative ones that lead to the same place within
//!   the folder.
//! - Owners are not set and set-user-id bits are dropped: everything belongs to the user that
//!   unpacks.
//! - Time stamps of files are kept, those of folders are not.
//!
//! An archive is refused as a whole, and nothing of it stays, if an entry has an absolute path or
//! a `..` in it, would be written through a symbolic link that leads out of the folder, is a hard
//! link to something outside, or is a device, a pipe or a socket; if a symbolic link leads out of
//! the folder once all layers are there; or if the contents exceed [`UnpackLimits`]. The limits
//! also bound memory: what an archive says about its sizes is not believed.
//!
//! All is built in a folder beside the goal, which only this process uses, and renamed when it is
//! complete.

use std::cell::Cell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::OsStr;
use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Read, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, UNIX_EPOCH};

use daybook_events::Digest;
use flate2::bufread::MultiGzDecoder;
use oci_spec::image::{Descriptor, MediaType};
use tokio_util::sync::CancellationToken;

use super::ImageError;
use super::layout::{BlobReader, Layout, from_oci, is_mismatch};
use super::manifest::Image;

/// What is the most that an image may unpack to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnpackLimits {
    /// Bytes of all layers together, uncompressed.
    pub bytes: u64,
    /// Entries of all layers together.
    pub entries: u64,
}

impl Default for UnpackLimits {
    /// 8 GiB and a million entries.
    fn default() -> Self {
        Self {
            bytes: 8 << 30,
            entries: 1_000_000,
        }
    }
}

/// How many bytes of names and attributes one entry may have. They are held in memory.
const MAX_ENTRY_HEADERS: u64 = 1 << 20;

/// How many symbolic links are followed on one path, as Linux does.
const MAX_LINKS: usize = 40;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Unpacks all layers of an image into the folder `into`, which must be empty or not exist. Its
/// parent must exist. Blocks; stops soon after `stop` is cancelled. If this fails, `into` is what
/// it was before.
pub fn unpack(
    layout: &Layout,
    image: &Image,
    into: &Path,
    limits: UnpackLimits,
    stop: &CancellationToken,
) -> Result<(), ImageError> {
    let parent = match into.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let staging = tempfile::Builder::new()
        .prefix(".unpack-")
        .tempdir_in(parent)
        .map_err(ImageError::io(format!(
            "creating a folder in {}",
            parent.display()
        )))?;

    let mut tree = Tree::new(staging.path().to_owned(), limits);
    for layer in image.manifest.layers() {
        if let Err(error) = tree.apply(layout, layer, stop) {
            return Err(damage_first(layout, layer, error));
        }
    }
    tree.check_links()?;
    tree.set_folder_modes()?;

    fs::rename(staging.path(), into).map_err(ImageError::io(format!(
        "moving the image to {}",
        into.display()
    )))?;
    // The folder has moved: there is nothing left to remove under its old name.
    let _ = staging.keep();
    Ok(())
}

/// What to say when a layer cannot be applied: that it is damaged, if it is, since anything may
/// follow from that.
fn damage_first(layout: &Layout, layer: &Descriptor, error: ImageError) -> ImageError {
    if matches!(error, ImageError::Cancelled | ImageError::Io { .. }) {
        return error;
    }
    let checked = from_oci(layer.digest()).and_then(|digest| layout.open_blob(&digest)?.finish());
    match checked {
        Err(damaged @ ImageError::Damaged { .. }) => damaged,
        _ => error,
    }
}

/// The tree being built. Paths in it are relative to `root`, and *physical*: no component but the
/// last is a symbolic link.
struct Tree {
    root: PathBuf,
    limits: UnpackLimits,
    bytes: u64,
    entries: u64,
    /// What the layer that is being applied has put here, with all folders above.
    added: HashSet<PathBuf>,
    /// The modes of folders are set at the end, so that a read-only one can be filled.
    folder_modes: HashMap<PathBuf, u32>,
}

impl Tree {
    fn new(root: PathBuf, limits: UnpackLimits) -> Self {
        Self {
            root,
            limits,
            bytes: 0,
            entries: 0,
            added: HashSet::new(),
            folder_modes: HashMap::new(),
        }
    }

    fn apply(
        &mut self,
        layout: &Layout,
        layer: &Descriptor,
        stop: &CancellationToken,
    ) -> Result<(), ImageError> {
        let digest = from_oci(layer.digest())?;
        self.added.clear();
        let blob = layout.open_blob(&digest)?;
        let budget = Budget::default();
        let reader = Metered {
            inner: open_layer(blob, layer.media_type(), &digest)?,
            budget: budget.clone(),
        };
        let mut archive = tar::Archive::new(reader);
        let failed = |e: io::Error| layer_error(&digest, &budget, e);

        let mut entries = archive.entries().map_err(failed)?;
        loop {
            if stop.is_cancelled() {
                return Err(ImageError::Cancelled);
            }
            budget.set(MAX_ENTRY_HEADERS);
            let Some(entry) = entries.next() else { break };
            let mut entry = entry.map_err(failed)?;
            self.entries += 1;
            if self.entries > self.limits.entries {
                return Err(ImageError::TooLarge {
                    limit: self.limits.entries,
                    unit: "entries",
                });
            }
            budget.set(u64::MAX);
            self.entry(&mut entry, &digest, stop)?;
        }
        // Behind the end of the archive there may be padding, which counts for the digest; it is
        // bounded, as it costs time.
        budget.set(
            self.limits
                .bytes
                .saturating_sub(self.bytes)
                .max(MAX_ENTRY_HEADERS),
        );
        let mut rest = archive.into_inner();
        io::copy(&mut rest, &mut io::sink()).map_err(failed)?;
        rest.inner.finish()
    }

    fn entry(
        &mut self,
        entry: &mut tar::Entry<'_, impl Read>,
        layer: &Digest,
        stop: &CancellationToken,
    ) -> Result<(), ImageError> {
        let shown = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let refuse = |reason| ImageError::UnsafeEntry {
            path: shown.clone(),
            reason,
        };
        let path = relative(&entry.path_bytes()).map_err(refuse)?;
        let Some(name) = path.file_name().map(OsStr::to_owned) else {
            // The root folder itself. Its mode is not the image's business.
            return match entry.header().entry_type() {
                tar::EntryType::Directory => Ok(()),
                _ => Err(refuse("the root must be a folder")),
            };
        };
        let parent = self
            .folder(path.parent().unwrap_or(Path::new("")))
            .map_err(|e| e.of_entry(&shown))?;
        self.mark_added(&parent);

        if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) {
            if name.as_bytes() == OPAQUE {
                return self.hide_lower_contents(&parent);
            }
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(refuse("the whiteout names no entry"));
            }
            return self.hide_lower(&parent.join(OsStr::from_bytes(hidden)));
        }

        let place = parent.join(&name);
        let header = entry.header();
        let kind = header.entry_type();
        let mode = header.mode().unwrap_or(0o644);
        match kind {
            tar::EntryType::Directory => {
                if !self.is_folder(&place)? {
                    self.remove(&place)?;
                    self.make_folder(&place)?;
                }
                self.folder_modes
                    .insert(place.clone(), mode & 0o777 | 0o700);
            }
            tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => {
                let modified = header.mtime().ok();
                self.remove(&place)?;
                self.write_file(entry, &place, mode, modified, layer, stop)?;
            }
            tar::EntryType::Symlink => {
                let target = entry
                    .link_name_bytes()
                    .filter(|t| !t.is_empty())
                    .ok_or_else(|| refuse("the symbolic link has no target"))?;
                let target = within(&parent, Path::new(OsStr::from_bytes(&target)));
                self.remove(&place)?;
                symlink(&target, self.root.join(&place))
                    .map_err(ImageError::io(format!("linking {}", place.display())))?;
            }
            tar::EntryType::Link => {
                let target = entry
                    .link_name_bytes()
                    .ok_or_else(|| refuse("the hard link has no target"))?;
                let target = relative(&target)
                    .map_err(|_| refuse("the hard link leads out of the image"))?;
                self.hard_link(&target, &place, &shown)?;
            }
            _ => return Err(refuse("only files, folders and links are allowed")),
        }
        self.mark_added(&place);
        Ok(())
    }

    fn write_file(
        &mut self,
        entry: &mut impl Read,
        place: &Path,
        mode: u32,
        modified: Option<u64>,
        layer: &Digest,
        stop: &CancellationToken,
    ) -> Result<(), ImageError> {
        let doing = || format!("writing {}", place.display());
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(self.root.join(place))
            .map_err(ImageError::io(doing()))?;
        let mut buffer = vec![0; 64 * 1024];
        loop {
            if stop.is_cancelled() {
                return Err(ImageError::Cancelled);
            }
            let n = match entry.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(layer_error(layer, &Budget::default(), e)),
            };
            self.bytes += n as u64;
            if self.bytes > self.limits.bytes {
                return Err(ImageError::TooLarge {
                    limit: self.limits.bytes,
                    unit: "bytes",
                });
            }
            file.write_all(&buffer[..n])
                .map_err(ImageError::io(doing()))?;
        }
        file.set_permissions(Permissions::from_mode(mode & 0o777))
            .map_err(ImageError::io(doing()))?;
        if let Some(at) = modified.and_then(|s| UNIX_EPOCH.checked_add(Duration::from_secs(s))) {
            // A time that the file system cannot hold is no reason to refuse the file.
            let _ = file.set_modified(at);
        }
        Ok(())
    }

    fn hard_link(&mut self, target: &Path, place: &Path, shown: &str) -> Result<(), ImageError> {
        let refuse = |reason| ImageError::UnsafeEntry {
            path: shown.to_owned(),
            reason,
        };
        let missing = || refuse("the hard link leads to nothing in the image");
        let name = target.file_name().ok_or_else(missing)?;
        let folder = self
            .resolve(target.parent().unwrap_or(Path::new("")), Missing::Refuse)
            .map_err(|e| e.of_entry(shown))?;
        let target = folder.join(name);
        match fs::symlink_metadata(self.root.join(&target)) {
            Ok(meta) if meta.is_file() => {}
            Ok(_) => return Err(refuse("a hard link must lead to a file")),
            Err(_) => return Err(missing()),
        }
        if target == place {
            return Ok(());
        }
        self.remove(place)?;
        fs::hard_link(self.root.join(&target), self.root.join(place))
            .map_err(ImageError::io(format!("linking {}", place.display())))
    }

    /// Removes what lower layers put at a path, and keeps what this layer did.
    fn hide_lower(&mut self, place: &Path) -> Result<(), ImageError> {
        if !self.added.contains(place) {
            return self.remove(place);
        }
        if self.is_folder(place)? {
            return self.hide_lower_contents(place);
        }
        Ok(())
    }

    fn hide_lower_contents(&mut self, folder: &Path) -> Result<(), ImageError> {
        let doing = || format!("emptying {}", folder.display());
        let path = self.root.join(folder);
        for child in fs::read_dir(path).map_err(ImageError::io(doing()))? {
            let name = child.map_err(ImageError::io(doing()))?.file_name();
            self.hide_lower(&folder.join(name))?;
        }
        Ok(())
    }

    /// Removes whatever is at a path; nothing if there is nothing. Follows no link.
    fn remove(&mut self, place: &Path) -> Result<(), ImageError> {
        let path = self.root.join(place);
        let doing = || format!("removing {}", place.display());
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => {
                fs::remove_dir_all(&path).map_err(ImageError::io(doing()))?;
                self.folder_modes.retain(|p, _| !p.starts_with(place));
                self.added.retain(|p| !p.starts_with(place));
                Ok(())
            }
            Ok(_) => fs::remove_file(&path).map_err(ImageError::io(doing())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(ImageError::io(doing())(e)),
        }
    }

    fn is_folder(&self, place: &Path) -> Result<bool, ImageError> {
        match fs::symlink_metadata(self.root.join(place)) {
            Ok(meta) => Ok(meta.is_dir()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(ImageError::io(format!("looking at {}", place.display()))(e)),
        }
    }

    fn make_folder(&self, place: &Path) -> Result<(), ImageError> {
        fs::create_dir(self.root.join(place))
            .map_err(ImageError::io(format!("creating {}", place.display())))
    }

    fn mark_added(&mut self, place: &Path) {
        for ancestor in place.ancestors() {
            if !self.added.insert(ancestor.to_owned()) {
                break;
            }
        }
    }

    /// The physical path of a folder, made if it is not there.
    fn folder(&mut self, path: &Path) -> Result<PathBuf, Unresolved> {
        self.resolve(path, Missing::Make)
    }

    /// Follows a path as the kernel would with the root as `/`, except that it never leaves it.
    fn resolve(&self, path: &Path, missing: Missing) -> Result<PathBuf, Unresolved> {
        let mut todo: VecDeque<PathBuf> = components(path)?;
        let mut at = PathBuf::new();
        let mut links = 0;
        while let Some(part) = todo.pop_front() {
            if part == Path::new("..") {
                if !at.pop() {
                    return Err(Unresolved::Escapes);
                }
                continue;
            }
            let next = at.join(&part);
            match fs::symlink_metadata(self.root.join(&next)) {
                Ok(meta) if meta.is_symlink() => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Unresolved::TooManyLinks);
                    }
                    let target = fs::read_link(self.root.join(&next)).map_err(Unresolved::Io)?;
                    let mut followed = components(&target)?;
                    followed.append(&mut todo);
                    todo = followed;
                }
                Ok(meta) if meta.is_dir() || (missing == Missing::Check && todo.is_empty()) => {
                    at = next;
                }
                Ok(_) => return Err(Unresolved::NotAFolder),
                Err(e) if e.kind() == io::ErrorKind::NotFound => match missing {
                    Missing::Make => {
                        fs::create_dir(self.root.join(&next)).map_err(Unresolved::Io)?;
                        at = next;
                    }
                    Missing::Refuse | Missing::Check => return Err(Unresolved::Missing),
                },
                Err(e) => return Err(Unresolved::Io(e)),
            }
        }
        Ok(at)
    }

    /// Refuses the image if a symbolic link leads out of it, now that all links are there. A link
    /// that leads to nothing is kept.
    fn check_links(&self) -> Result<(), ImageError> {
        let mut todo = vec![PathBuf::new()];
        while let Some(folder) = todo.pop() {
            let doing = || format!("checking {}", folder.display());
            for child in fs::read_dir(self.root.join(&folder)).map_err(ImageError::io(doing()))? {
                let child = child.map_err(ImageError::io(doing()))?;
                let place = folder.join(child.file_name());
                let kind = child.file_type().map_err(ImageError::io(doing()))?;
                if kind.is_dir() {
                    todo.push(place);
                } else if kind.is_symlink() {
                    match self.resolve(&place, Missing::Check) {
                        Err(Unresolved::Escapes) => {
                            return Err(Unresolved::Escapes.of_entry(&place.to_string_lossy()));
                        }
                        Err(Unresolved::Io(e)) => return Err(ImageError::io(doing())(e)),
                        // Dangling and circular links are common and do no harm.
                        _ => {}
                    }
                }
            }
        }
        Ok(())
    }

    fn set_folder_modes(&self) -> Result<(), ImageError> {
        for (place, mode) in &self.folder_modes {
            let path = self.root.join(place);
            fs::set_permissions(&path, Permissions::from_mode(*mode)).map_err(ImageError::io(
                format!("setting the mode of {}", place.display()),
            ))?;
        }
        fs::set_permissions(&self.root, Permissions::from_mode(0o755))
            .map_err(ImageError::io("setting the mode of the image's root"))
    }
}

/// What to do with a part of a path that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missing {
    /// Make it, as a folder.
    Make,
    /// Say that it is missing.
    Refuse,
    /// The same, and let the path lead to a file.
    Check,
}

/// Why a path cannot be followed.
#[derive(Debug)]
enum Unresolved {
    Escapes,
    TooManyLinks,
    NotAFolder,
    Missing,
    Io(io::Error),
}

impl Unresolved {
    fn of_entry(self, path: &str) -> ImageError {
        let reason = match self {
            Self::Escapes => "it leads out of the image through a symbolic link",
            Self::TooManyLinks => "its symbolic links lead in a circle",
            Self::NotAFolder => "a part of its path is no folder",
            Self::Missing => "a part of its path does not exist",
            Self::Io(e) => return ImageError::io(format!("following {path:?}"))(e),
        };
        ImageError::UnsafeEntry {
            path: path.to_owned(),
            reason,
        }
    }
}

/// The parts of a link's target or of a path, where an absolute one starts at the root.
fn components(path: &Path) -> Result<VecDeque<PathBuf>, Unresolved> {
    path.components()
        .filter_map(|c| match c {
            Component::Normal(part) => Some(Ok(PathBuf::from(part))),
            Component::ParentDir => Some(Ok(PathBuf::from(".."))),
            Component::CurDir => None,
            // Absolute links are rewritten when they are made.
            Component::RootDir | Component::Prefix(_) => Some(Err(Unresolved::Escapes)),
        })
        .collect()
}

/// An entry's path, relative and without `.` parts.
fn relative(bytes: &[u8]) -> Result<PathBuf, &'static str> {
    if bytes.contains(&0) {
        return Err("a path must not contain a zero byte");
    }
    let mut path = PathBuf::new();
    for component in Path::new(OsStr::from_bytes(bytes)).components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::CurDir => {}
            Component::ParentDir => return Err("a path must not contain `..`"),
            Component::RootDir | Component::Prefix(_) => return Err("a path must not be absolute"),
        }
    }
    Ok(path)
}

/// The target of a symbolic link in the folder `parent`, relative if it was absolute.
fn within(parent: &Path, target: &Path) -> PathBuf {
    let Ok(from_root) = target.strip_prefix("/") else {
        return target.to_owned();
    };
    let mut path: PathBuf = parent.components().map(|_| "..").collect();
    path.push(from_root);
    if path.as_os_str().is_empty() {
        path.push(".");
    }
    path
}

/// A layer's blob, decompressed.
enum LayerReader {
    Plain(io::BufReader<BlobReader>),
    Gzip(Box<MultiGzDecoder<io::BufReader<BlobReader>>>),
}

impl LayerReader {
    /// Reads the rest of the blob, so that its digest is checked.
    fn finish(self) -> Result<(), ImageError> {
        match self {
            Self::Plain(reader) => reader.into_inner().finish(),
            Self::Gzip(decoder) => decoder.into_inner().into_inner().finish(),
        }
    }
}

impl Read for LayerReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(reader) => reader.read(buffer),
            Self::Gzip(decoder) => decoder.read(buffer),
        }
    }
}

fn open_layer(
    blob: BlobReader,
    media_type: &MediaType,
    digest: &Digest,
) -> Result<LayerReader, ImageError> {
    let reader = io::BufReader::with_capacity(64 * 1024, blob);
    match media_type.as_ref() {
        "application/vnd.oci.image.layer.v1.tar"
        | "application/vnd.docker.image.rootfs.diff.tar" => Ok(LayerReader::Plain(reader)),
        "application/vnd.oci.image.layer.v1.tar+gzip"
        | "application/vnd.docker.image.rootfs.diff.tar.gzip" => {
            Ok(LayerReader::Gzip(Box::new(MultiGzDecoder::new(reader))))
        }
        other => Err(ImageError::Unsupported(format!(
            "the layer {digest} is of type {other}, which cannot be unpacked here"
        ))),
    }
}

/// How many bytes may still be read from an archive before it is given up.
#[derive(Debug, Clone)]
struct Budget(Rc<Cell<u64>>);

impl Default for Budget {
    fn default() -> Self {
        Self(Rc::new(Cell::new(u64::MAX)))
    }
}

impl Budget {
    fn set(&self, bytes: u64) {
        self.0.set(bytes);
    }
}

/// A reader that stops when its budget is used up.
struct Metered<R> {
    inner: R,
    budget: Budget,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.budget.0.get();
        if left == 0 {
            return Err(io::Error::other("too many bytes"));
        }
        let max = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let n = self.inner.read(&mut buffer[..max])?;
        self.budget.set(left - n as u64);
        Ok(n)
    }
}

/// Why a layer could not be read: its content is not what its digest says, its names are
/// excessive, it is no archive, or the disk failed.
fn layer_error(digest: &Digest, budget: &Budget, error: io::Error) -> ImageError {
    if is_mismatch(&error) {
        return ImageError::Damaged {
            digest: digest.clone(),
            reason: "it is truncated or was changed".into(),
        };
    }
    if budget.0.get() == 0 {
        return ImageError::TooLarge {
            limit: MAX_ENTRY_HEADERS,
            unit: "bytes besides the contents of files",
        };
    }
    if error.raw_os_error().is_some() {
        return ImageError::io(format!("reading layer {digest}"))(error);
    }
    ImageError::Invalid {
        what: format!("the layer {digest}"),
        reason: error.to_string(),
    }
}
