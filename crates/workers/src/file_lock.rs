//! Locks across processes.

use std::fs::{File, TryLockError};
use std::io;
use std::path::Path;
use std::time::Duration;

/// How often a lock that somebody else holds is tried again.
const POLL: Duration = Duration::from_millis(20);

/// A locked file. The lock ends when it is dropped, and when the process dies.
#[derive(Debug)]
pub(crate) struct FileLock {
    _file: File,
}

impl FileLock {
    /// Locks a file, which is created if need be: for one (`exclusive`) or for all who want it
    /// shared. While somebody else holds it, `waiting` is asked now and then whether to go on.
    pub(crate) fn acquire<E>(
        path: &Path,
        exclusive: bool,
        disk: impl Fn(io::Error) -> E,
        mut waiting: impl FnMut() -> Result<(), E>,
    ) -> Result<Self, E> {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .map_err(&disk)?;
        loop {
            let tried = if exclusive {
                file.try_lock()
            } else {
                file.try_lock_shared()
            };
            match tried {
                Ok(()) => return Ok(Self { _file: file }),
                Err(TryLockError::WouldBlock) => {
                    waiting()?;
                    std::thread::sleep(POLL);
                }
                Err(TryLockError::Error(e)) => return Err(disk(e)),
            }
        }
    }
}
