//! Folders of builds, which go away with them, however they end.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::BuildError;

/// A folder that is removed with all that is in it when this is dropped.
///
/// A lock file beside it says that its build is alive. What a process that was killed has left
/// behind is removed when the next folder is made.
#[derive(Debug)]
pub(crate) struct Scratch {
    folder: PathBuf,
    lock: PathBuf,
    _locked: File,
}

impl Scratch {
    /// Makes a folder below `parent`, which is made if it is not there.
    pub(crate) async fn new(parent: &Path) -> Result<Arc<Self>, BuildError> {
        let parent = parent.to_owned();
        let doing = format!("creating a folder in {}", parent.display());
        let making = tokio::task::spawn_blocking(move || {
            fs::create_dir_all(&parent)?;
            remove_abandoned(&parent)?;
            Self::make(&parent)
        });
        match making.await {
            Ok(made) => made.map(Arc::new).map_err(BuildError::io(doing)),
            // The runtime is shutting down.
            Err(_) => Err(BuildError::Cancelled),
        }
    }

    fn make(parent: &Path) -> io::Result<Self> {
        loop {
            let (file, lock) = tempfile::Builder::new()
                .prefix("build-")
                .suffix(".lock")
                .tempfile_in(parent)?
                .keep()?;
            file.lock()?;
            // Somebody may have found the file before it was locked, and taken it for abandoned.
            if !lock.exists() {
                continue;
            }
            let folder = lock.with_extension("");
            let this = Self {
                folder,
                lock,
                _locked: file,
            };
            fs::create_dir(&this.folder)?;
            return Ok(this);
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.folder
    }

    /// Removes the folder now, on a thread that may block, unless somebody else still uses it.
    pub(crate) async fn remove(self: Arc<Self>) {
        // If the runtime is shutting down, dropping it has removed the folder.
        let _ = tokio::task::spawn_blocking(move || drop(self)).await;
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let removed = remove_folder(&self.folder).and_then(|()| fs::remove_file(&self.lock));
        if let Err(error) = removed {
            tracing::warn!(%error, folder = %self.folder.display(), "a build's folder could not be removed");
        }
    }
}

/// Removes folders whose builds are no longer alive.
fn remove_abandoned(parent: &Path) -> io::Result<()> {
    for entry in fs::read_dir(parent)? {
        let lock = entry?.path();
        if lock.extension().is_none_or(|e| e != "lock") {
            continue;
        }
        // Another process may be doing the same.
        let Ok(file) = File::open(&lock) else {
            continue;
        };
        if file.try_lock().is_ok()
            && let Err(error) =
                remove_folder(&lock.with_extension("")).and_then(|()| fs::remove_file(&lock))
        {
            tracing::warn!(%error, lock = %lock.display(), "an abandoned build's folder could not be removed");
        }
    }
    Ok(())
}

/// Removes a folder, if it is there, also where it contains folders that nobody may change, such
/// as those of Go's module cache.
fn remove_folder(folder: &Path) -> io::Result<()> {
    let absent = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
    match fs::remove_dir_all(folder) {
        Ok(()) => return Ok(()),
        Err(e) if absent(&e) => return Ok(()),
        Err(_) => make_writable(folder),
    }
    match fs::remove_dir_all(folder) {
        Err(e) if !absent(&e) => Err(e),
        _ => Ok(()),
    }
}

fn make_writable(folder: &Path) {
    // What this cannot change will be reported by the removal.
    let _ = fs::set_permissions(folder, Permissions::from_mode(0o700));
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            make_writable(&entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_killed_process_left_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let parent = dir.path().join("scratch");
        let alive = Scratch::new(&parent).await.unwrap();
        fs::write(alive.path().join("file"), "x").unwrap();
        fs::create_dir_all(parent.join("build-dead/sub")).unwrap();
        fs::write(parent.join("build-dead.lock"), "").unwrap();
        fs::write(parent.join("foreign"), "x").unwrap();

        let other = Scratch::new(&parent).await.unwrap();
        assert!(alive.path().join("file").exists());
        assert!(!parent.join("build-dead").exists());
        assert!(!parent.join("build-dead.lock").exists());
        alive.remove().await;
        other.remove().await;
        let left: Vec<_> = fs::read_dir(&parent).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }
}
