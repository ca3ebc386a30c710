//! Where a tree is kept: a port, and a folder behind it.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;

use super::reader::ReadTiles;

/// Where unfinished files are, below the folder.
const UNFINISHED: &str = "notary/unfinished";
/// What was not finished for so long is of a process that died.
const ABANDONED: Duration = Duration::from_secs(3600);

/// How many files are written at once.
const AT_ONCE: usize = 8;

/// Why something could not be stored.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A file that must never change is there with other bytes. Nothing was changed.
    #[error("{path} is already stored with other bytes")]
    Differs {
        /// Which, below the folder.
        path: String,
    },
    /// The system refused.
    #[error("{action} {} failed", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Where a tree is written. Whoever writes may die at any moment; what readers see is at each
/// moment either as before a call or as after it, file by file.
#[async_trait]
pub trait TileStorage: ReadTiles {
    /// Stores files that never change. When it returns they are all on disk. A file that is there
    /// with the same bytes is left as it is; one with other bytes is [`StorageError::Differs`].
    async fn put(&self, files: Vec<(String, Bytes)>) -> Result<(), StorageError>;

    /// Stores a file unless there is one of this name, and says whether it did. Of any number of
    /// callers, on any number of machines, one is told `true`; the file is then on disk.
    async fn create(&self, path: &str, bytes: Bytes) -> Result<bool, StorageError>;

    /// Stores a file in the place of whatever was there. When it returns it is on disk.
    async fn replace(&self, path: &str, bytes: Bytes) -> Result<(), StorageError>;

    /// The names in a folder, in no order; none if there is no such folder.
    async fn list(&self, folder: &str) -> Result<Vec<String>, StorageError>;

    /// Removes files, or folders with all that is in them. What is not there is no error.
    async fn remove(&self, paths: Vec<String>) -> Result<(), StorageError>;

    /// Removes what writers that died long ago left unfinished. Nobody ever sees that.
    async fn tidy(&self) -> Result<(), StorageError>;
}

/// A tree in a folder, which may be on a disk of its own, and which a web server may serve as it
/// is: `checkpoint`, `keys` and `tile/` are for everybody. `notary/` is the notary's own.
#[derive(Debug, Clone)]
pub struct FolderStorage {
    root: Arc<Path>,
}

impl FolderStorage {
    /// The tree in this folder, which is made when something is first written.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into().into(),
        }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.root
    }

    /// Runs file operations where they may block.
    async fn blocking<T: Send + 'static>(
        &self,
        action: &'static str,
        work: impl FnOnce(&Path) -> Result<T, StorageError> + Send + 'static,
    ) -> Result<T, StorageError> {
        let root = Arc::clone(&self.root);
        let path = root.to_path_buf();
        let done = tokio::task::spawn_blocking(move || work(&root)).await;
        done.unwrap_or_else(|e| {
            let source = io::Error::other(e);
            Err(failed(action, &path)(source))
        })
    }
}

/// A path below the root, and nowhere else.
fn below(root: &Path, path: &str) -> Result<PathBuf, StorageError> {
    let relative = Path::new(path);
    let plain = relative
        .components()
        .all(|c| matches!(c, Component::Normal(_)));
    if plain && !path.is_empty() {
        return Ok(root.join(relative));
    }
    let source = io::Error::new(io::ErrorKind::InvalidInput, "not a path below the folder");
    Err(failed("using", relative)(source))
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StorageError {
    let path = path.to_owned();
    move |source| StorageError::Io {
        action,
        path,
        source,
    }
}

/// Reads a file; `None` if there is none.
fn read_if_there(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if is_absent(&e) => Ok(None),
        Err(e) => Err(e),
    }
}

fn is_absent(error: &io::Error) -> bool {
    use io::ErrorKind::{IsADirectory, NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory | IsADirectory)
}

fn sync_folder(path: &Path) -> Result<(), StorageError> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .map_err(failed("syncing", path))
}

/// Makes a folder and those above it, such that they survive the loss of power.
fn make_folder(path: &Path) -> Result<(), StorageError> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    if let Some(parent) = parent {
        make_folder(parent)?;
    }
    match fs::create_dir(path) {
        Ok(()) => sync_folder(parent.unwrap_or(Path::new("."))),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e) => Err(failed("making", path)(e)),
    }
}

/// A file that nobody sees yet, complete and on disk. Removed when dropped.
struct Unfinished(PathBuf);

impl Unfinished {
    fn write(root: &Path, bytes: &[u8]) -> Result<Self, StorageError> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let folder = root.join(UNFINISHED);
        make_folder(&folder)?;
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        // Process ids are not unique over machines that share a folder.
        let name = format!("{}-{number}-{}", std::process::id(), uuid::Uuid::new_v4());
        let unfinished = Self(folder.join(name));
        let path = &unfinished.0;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(path)
            .map_err(failed("creating", path))?;
        // Whatever the umask says: a web server of another user is to read it.
        file.set_permissions(Permissions::from_mode(0o644))
            .and_then(|()| file.write_all(bytes))
            .and_then(|()| file.sync_all())
            .map_err(failed("writing", path))?;
        Ok(unfinished)
    }

    /// Gives the file its name, unless there is one of that name.
    fn link(self, to: &Path) -> Result<bool, StorageError> {
        match fs::hard_link(&self.0, to) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(failed("creating", to)(e)),
        }
    }

    /// Gives the file its name, in the place of another.
    fn rename(self, to: &Path) -> Result<(), StorageError> {
        fs::rename(&self.0, to).map_err(failed("replacing", to))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Stores files, some at a time: each is synced by itself, and syncs that wait together share what
/// the file system writes for them.
fn put(root: &Path, files: &[(String, Bytes)]) -> Result<(), StorageError> {
    let share = files.len().div_ceil(AT_ONCE).max(1);
    let folders = std::thread::scope(|scope| {
        let shares = files.chunks(share);
        let writers: Vec<_> = shares
            .map(|files| scope.spawn(move || put_each(root, files)))
            .collect();
        let mut folders = BTreeSet::new();
        for writer in writers {
            let written = writer.join().unwrap_or_else(|_| {
                let source = io::Error::other("a writer panicked");
                Err(failed("writing", root)(source))
            });
            folders.extend(written?);
        }
        Ok(folders)
    })?;
    folders.iter().try_for_each(|folder| sync_folder(folder))
}

/// Stores files whose folders, which are returned, are not synced yet.
fn put_each(root: &Path, files: &[(String, Bytes)]) -> Result<BTreeSet<PathBuf>, StorageError> {
    let mut folders = BTreeSet::new();
    for (name, bytes) in files {
        let path = below(root, name)?;
        let folder = path.parent().unwrap_or(root);
        let there = |path: &Path| read_if_there(path).map_err(failed("reading", path));
        let mut found = there(&path)?;
        if found.is_none() {
            make_folder(folder)?;
            if !Unfinished::write(root, bytes)?.link(&path)? {
                // Another notary was faster.
                found = there(&path)?;
            }
        }
        if found.is_some_and(|found| found != *bytes) {
            return Err(StorageError::Differs { path: name.clone() });
        }
        // Also for what was there: whoever made it may have died before this.
        folders.insert(folder.to_owned());
    }
    Ok(folders)
}

#[async_trait]
impl ReadTiles for FolderStorage {
    async fn get(&self, path: &str) -> io::Result<Option<Bytes>> {
        let Ok(path) = below(&self.root, path) else {
            return Ok(None);
        };
        let read = tokio::task::spawn_blocking(move || read_if_there(&path));
        Ok(read.await.map_err(io::Error::other)??.map(Bytes::from))
    }
}

#[async_trait]
impl TileStorage for FolderStorage {
    async fn put(&self, files: Vec<(String, Bytes)>) -> Result<(), StorageError> {
        self.blocking("writing", move |root| put(root, &files))
            .await
    }

    async fn create(&self, path: &str, bytes: Bytes) -> Result<bool, StorageError> {
        let name = path.to_owned();
        self.blocking("creating", move |root| {
            let path = below(root, &name)?;
            let folder = path.parent().unwrap_or(root);
            make_folder(folder)?;
            let created = Unfinished::write(root, &bytes)?.link(&path)?;
            sync_folder(folder)?;
            Ok(created)
        })
        .await
    }

    async fn replace(&self, path: &str, bytes: Bytes) -> Result<(), StorageError> {
        let name = path.to_owned();
        self.blocking("replacing", move |root| {
            let path = below(root, &name)?;
            let folder = path.parent().unwrap_or(root);
            make_folder(folder)?;
            Unfinished::write(root, &bytes)?.rename(&path)?;
            sync_folder(folder)
        })
        .await
    }

    async fn list(&self, folder: &str) -> Result<Vec<String>, StorageError> {
        let name = folder.to_owned();
        self.blocking("listing", move |root| {
            let folder = below(root, &name)?;
            let entries = match fs::read_dir(&folder) {
                Ok(entries) => entries,
                Err(e) if is_absent(&e) => return Ok(Vec::new()),
                Err(e) => return Err(failed("listing", &folder)(e)),
            };
            let mut names = Vec::new();
            for entry in entries {
                let entry = entry.map_err(failed("listing", &folder))?;
                names.extend(entry.file_name().into_string());
            }
            Ok(names)
        })
        .await
    }

    async fn remove(&self, paths: Vec<String>) -> Result<(), StorageError> {
        self.blocking("removing", move |root| {
            for name in paths {
                let path = below(root, &name)?;
                let removed = match fs::symlink_metadata(&path) {
                    Ok(found) if found.is_dir() => fs::remove_dir_all(&path),
                    Ok(_) => fs::remove_file(&path),
                    Err(e) => Err(e),
                };
                match removed {
                    Err(e) if !is_absent(&e) => return Err(failed("removing", &path)(e)),
                    _ => {}
                }
            }
            Ok(())
        })
        .await
    }

    async fn tidy(&self) -> Result<(), StorageError> {
        self.blocking("removing", |root| {
            let Ok(entries) = fs::read_dir(root.join(UNFINISHED)) else {
                return Ok(());
            };
            for entry in entries.flatten() {
                let written = entry.metadata().and_then(|m| m.modified());
                let age = written.map(|w| SystemTime::now().duration_since(w).unwrap_or_default());
                if age.is_ok_and(|age| age > ABANDONED) {
                    let _ = fs::remove_file(entry.path());
                }
            }
            Ok(())
        })
        .await
    }
}
