//! The exclusive claim on a cluster's folder.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;

/// A held claim. It ends when this is dropped, and with the process, however it dies.
#[derive(Debug)]
pub(super) struct Claim {
    file: File,
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Closing is not enough while a process that is just being started has inherited the file.
        let _ = self.file.unlock();
    }
}

/// How asking for a claim ended, unless the file system refused.
#[derive(Debug)]
pub(super) enum Claimed {
    /// It is ours.
    Ours(Claim),
    /// Another process has it; its id, if it could be read.
    Held(Option<u32>),
}

impl Claim {
    /// Asks once.
    pub(super) fn take(path: &Path) -> std::io::Result<Claimed> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                file.read_to_string(&mut text)?;
                return Ok(Claimed::Held(text.trim().parse().ok()));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // For people, and for the message above; the lock itself is what counts.
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Claimed::Ours(Self { file }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_one_holds_it_and_another_takes_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let Claimed::Ours(first) = Claim::take(&path).unwrap() else {
            panic!("nobody holds it");
        };
        let held = Claim::take(&path).unwrap();
        assert!(matches!(held, Claimed::Held(Some(pid)) if pid == std::process::id()));
        drop(first);
        assert!(matches!(Claim::take(&path).unwrap(), Claimed::Ours(_)));
    }
}
