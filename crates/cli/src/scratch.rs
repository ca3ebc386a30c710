//! The folder for work in progress: each process has one of its own, however many share a data
//! folder.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use uuid::Uuid;

/// Locked while its process lives.
const LOCK: &str = "lock";

/// A folder that belongs to this process. Removed when dropped; if the process is killed, by the
/// next one that claims a folder beside it.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    lock: File,
}

impl Scratch {
    /// Makes a folder in `root`, and removes what processes that are gone left there.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn claim(root: &Path) -> io::Result<Self> {
        fs::create_dir_all(root)?;
        // Nobody takes a folder for abandoned that is just being made.
        let gate = open(&root.join(LOCK))?;
        gate.lock()?;
        for entry in fs::read_dir(root)?.flatten() {
            let path = entry.path();
            if path.is_dir() && is_abandoned(&path) {
                let _ = fs::remove_dir_all(path);
            }
        }
        let path = root.join(Uuid::now_v7().simple().to_string());
        fs::create_dir(&path)?;
        let lock = open(&path.join(LOCK))?;
        lock.lock()?;
        gate.unlock()?;
        Ok(Self { path, lock })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
        // Closing alone would leave the lock to a copy of the file in a process that is just being
        // started.
        let _ = self.lock.unlock();
    }
}

fn is_abandoned(folder: &Path) -> bool {
    match File::options().write(true).open(folder.join(LOCK)) {
        Ok(lock) => !matches!(lock.try_lock(), Err(TryLockError::WouldBlock)),
        Err(_) => true,
    }
}

fn open(path: &Path) -> io::Result<File> {
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_the_living_stay_and_those_of_the_dead_go() {
        let root = tempfile::tempdir().unwrap();
        let first = Scratch::claim(root.path()).unwrap();
        fs::write(first.path().join("work"), "in progress").unwrap();
        let dead = root.path().join("dead");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join(LOCK), "").unwrap();
        let older = root.path().join("of-an-older-version");
        fs::create_dir(&older).unwrap();

        let second = Scratch::claim(root.path()).unwrap();
        assert!(first.path().join("work").exists());
        assert_ne!(first.path(), second.path());
        assert!(!dead.exists() && !older.exists());

        let path = first.path().to_owned();
        drop(first);
        assert!(!path.exists());
        assert!(second.path().exists());
    }
}
