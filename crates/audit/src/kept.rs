//! What an auditor keeps from one audit to the next: for each log the newest checkpoint that held,
//! and the keys that it was believed by.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use daybook_store::tlog::{VerifierKey, parse_verifiers};
use sha2::{Digest, Sha256};

/// What was kept of one log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// The signed checkpoint.
    pub checkpoint: Bytes,
    /// The keys.
    pub keys: Vec<VerifierKey>,
}

/// A folder of the auditor's own, in which that is kept.
#[derive(Debug, Clone)]
pub struct Keeper(PathBuf);

/// Why something could not be kept or found again.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The system refused.
    #[error("{} cannot be used", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The keys are none.
    #[error("line {line} of {} is no key", path.display())]
    Keys {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
    },
}

impl Keeper {
    /// Keeps things in this folder, which is made when something is kept.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self(folder.into())
    }

    /// Where things of this log are kept.
    pub fn folder(&self, origin: &str) -> PathBuf {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-');
        let name: String = origin
            .chars()
            .take(80)
            .map(|c| if plain(c) { c } else { '_' })
            .collect();
        // Origins that look alike have folders of their own.
        let hash = hex::encode(&Sha256::digest(origin)[..4]);
        self.0
            .join(format!("{}-{hash}", name.trim_start_matches('.')))
    }

    /// What was kept of a log, if anything was.
    pub fn load(&self, origin: &str) -> Result<Option<Kept>, KeepError> {
        let folder = self.folder(origin);
        let read = |name: &str| {
            let path = folder.join(name);
            match fs::read(&path) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(KeepError::Io { path, source }),
            }
        };
        let (Some(checkpoint), Some(keys)) = (read("checkpoint")?, read("keys")?) else {
            return Ok(None);
        };
        let keys = parse_verifiers(&String::from_utf8_lossy(&keys)).map_err(|(line, _)| {
            let path = folder.join("keys");
            KeepError::Keys { path, line }
        })?;
        let checkpoint = checkpoint.into();
        Ok(Some(Kept { checkpoint, keys }))
    }

    /// Keeps this instead of what was kept before.
    pub fn save(&self, origin: &str, kept: &Kept) -> Result<(), KeepError> {
        let folder = self.folder(origin);
        let keys: String = kept.keys.iter().map(|k| format!("{k}\n")).collect();
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.join(name);
            replace(&path, bytes).map_err(|source| KeepError::Io { path, source })
        };
        fs::create_dir_all(&folder).map_err(|source| KeepError::Io {
            path: folder.clone(),
            source,
        })?;
        write("keys", keys.as_bytes())?;
        write("checkpoint", &kept.checkpoint)
    }
}

/// Puts a file in the place of another in one step.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|e| e.error)?;
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use daybook_store::tlog::SignerKey;

    #[test]
    fn what_is_kept_is_found_again_by_its_origin_only() {
        let folder = tempfile::tempdir().unwrap();
        let keeper = Keeper::new(folder.path());
        let kept = Kept {
            checkpoint: Bytes::from_static(b"note"),
            keys: vec![SignerKey::generate("a/b").unwrap().verifier().clone()],
        };
        assert_eq!(keeper.load("a/b").unwrap(), None);
        keeper.save("a/b", &kept).unwrap();
        assert_eq!(keeper.load("a/b").unwrap(), Some(kept));
        assert_eq!(keeper.load("a_b").unwrap(), None);
        let below = keeper.folder("../../etc");
        assert_eq!(below.parent(), Some(folder.path()));
    }
}
