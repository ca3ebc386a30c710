//! One process per folder.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a held lock is waited for. A process that another one is just starting has a copy of
/// its parent's open files from `fork` to `exec`, and with it the lock of a parent that has died
/// in between.
const PATIENCE: Duration = Duration::from_millis(500);

/// Why a folder could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process, or another part of this one, has the folder open.
    #[error(
        "{} is in use by {}; stop it, or use another folder", path.display(),
        holder.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
    )]
    Held {
        /// The folder.
        path: PathBuf,
        /// Who has it, where it said so.
        holder: Option<u32>,
    },
    /// The lock file could not be opened or written.
    #[error("the lock file {} cannot be used", path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Keeps other processes out of a folder for as long as it lives. The system releases it when the
/// process dies, however it dies.
#[derive(Debug)]
pub(super) struct FolderLock {
    file: File,
}

impl Drop for FolderLock {
    /// Closing alone would leave the lock to a copy of the file in a process that is just being
    /// started; unlocking takes it from all copies.
    fn drop(&mut self) {
        let _ = self.file.unlock();
    }
}

impl FolderLock {
    /// Takes the folder, which must exist, and writes this process's id into its lock file. Blocks
    /// for up to half a second while another process has it.
    pub(super) fn acquire(folder: &Path) -> Result<Self, LockError> {
        let path = folder.join("lock");
        let io = |source| LockError::Io {
            path: path.clone(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(io)?;
        match wait_for_lock(&file) {
            Ok(()) => {}
            Err(TryLockError::Error(e)) => return Err(io(e)),
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                let holder = file
                    .read_to_string(&mut text)
                    .ok()
                    .and_then(|_| text.trim().parse().ok());
                return Err(LockError::Held {
                    path: folder.to_owned(),
                    holder,
                });
            }
        }
        // The id serves people only, so that a full disk does not keep the log from being read.
        let _ = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(Self { file })
    }
}

fn wait_for_lock(file: &File) -> Result<(), TryLockError> {
    let start = Instant::now();
    loop {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) if start.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            answer => return answer,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_of_the_file_does_not_keep_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let lock = FolderLock::acquire(dir.path()).unwrap();
        // What a process that is being started has of its parent.
        let _copy = lock.file.try_clone().unwrap();
        drop(lock);
        FolderLock::acquire(dir.path()).unwrap();
    }

    #[test]
    fn a_lock_that_stays_is_refused_with_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let _lock = FolderLock::acquire(dir.path()).unwrap();
        let refused = FolderLock::acquire(dir.path()).unwrap_err();
        assert!(
            matches!(refused, LockError::Held { holder, .. } if holder == Some(std::process::id()))
        );
    }

    #[test]
    fn a_lock_that_a_dying_process_still_has_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let lock = FolderLock::acquire(dir.path()).unwrap();
        let path = dir.path().to_owned();
        let waiting = std::thread::spawn(move || FolderLock::acquire(&path).map(drop));
        // Long enough for the other thread to have asked in vain at least once.
        std::thread::sleep(Duration::from_millis(50));
        drop(lock);
        waiting.join().unwrap().unwrap();
    }
}
