//! The notary's keys, in files.
//!
//! ```text
//! notary.key     the private keys that sign, one a line, mode 0600: `PRIVATE+KEY+<name>+<id>+<key>`
//! notary.pub     the public keys of all times, one a line: `<name>+<id>+<key>`
//! notary.signed  a checkpoint that they signed, as soon as there is one of an event
//! ```
//!
//! While keys are rotated there are two private ones, and both sign. The public ones stay for
//! ever, because old checkpoints are checked with them. The checkpoint says, where the tiles are
//! lost, that there were some: what was signed is never made anew from the log.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::note::{GenerateError, KeyError, SignerKey, VerifierKey};

const PRIVATE: &str = "notary.key";
const PUBLIC: &str = "notary.pub";
const SIGNED: &str = "notary.signed";

/// Why keys could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// There are keys already. They are never overwritten.
    #[error("{} has keys already; rotate them instead", path.display())]
    Exists {
        /// The key file.
        path: PathBuf,
    },
    /// There are none.
    #[error("{} has no key of a notary; make one with `daybook keys generate`", path.display())]
    Missing {
        /// The key file.
        path: PathBuf,
    },
    /// Others than the owner may read the private keys.
    #[error("{} may be read by others (mode {mode:04o}); chmod 600 it", path.display())]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A line is no key.
    #[error("line {line} of {} is no key", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong with it.
        source: KeyError,
    },
    /// The keys are of different logs.
    #[error("{} has keys of {first} and of {second}; all must be of one log", path.display())]
    Mixed {
        /// The file.
        path: PathBuf,
        /// One name.
        first: String,
        /// Another.
        second: String,
    },
    /// No key could be made.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// The system refused.
    #[error("{} cannot be read or written", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The keys of one log, named by its origin.
#[derive(Debug, Clone)]
pub struct KeyRing {
    signers: Vec<SignerKey>,
    verifiers: Vec<VerifierKey>,
    /// Where they are, unless they are in no file.
    folder: Option<PathBuf>,
}

impl KeyRing {
    /// Makes the first key of the log with this origin: the URL prefix under which it is
    /// published, without scheme, such as `daybook.example.com/tlog`.
    pub fn generate(folder: &Path, origin: &str) -> Result<Self, KeyFileError> {
        let path = folder.join(PRIVATE);
        if path.exists() {
            return Err(KeyFileError::Exists { path });
        }
        let mut ring = Self::of(SignerKey::generate(origin)?);
        ring.folder = Some(folder.to_owned());
        // Of a key that is gone. The new one has signed nothing.
        let signed = folder.join(SIGNED);
        match fs::remove_file(&signed) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_error(&signed, e)),
            _ => {}
        }
        ring.save(folder)?;
        Ok(ring)
    }

    /// Reads the keys of a folder.
    pub fn open(folder: &Path) -> Result<Self, KeyFileError> {
        let path = folder.join(PRIVATE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(KeyFileError::Missing { path });
            }
            Err(source) => return Err(KeyFileError::Io { path, source }),
        };
        let found = fs::metadata(&path).map_err(|e| io_error(&path, e))?;
        let mode = found.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(KeyFileError::Exposed { path, mode });
        }
        let signers: Vec<SignerKey> = lines(&path, &text)?;
        let public = folder.join(PUBLIC);
        let mut verifiers: Vec<VerifierKey> = match fs::read_to_string(&public) {
            Ok(text) => lines(&public, &text)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(io_error(&public, e)),
        };
        let Some(first) = signers.first().map(|s| s.verifier().name().to_owned()) else {
            return Err(KeyFileError::Missing { path });
        };
        for signer in &signers {
            if !verifiers.contains(signer.verifier()) {
                verifiers.push(signer.verifier().clone());
            }
        }
        if let Some(other) = verifiers.iter().find(|v| v.name() != first) {
            let second = other.name().to_owned();
            return Err(KeyFileError::Mixed {
                path,
                first,
                second,
            });
        }
        Ok(Self {
            signers,
            verifiers,
            folder: Some(folder.to_owned()),
        })
    }

    /// A ring of one key that is in no file.
    pub fn of(key: SignerKey) -> Self {
        Self {
            verifiers: vec![key.verifier().clone()],
            signers: vec![key],
            folder: None,
        }
    }

    /// Begins a rotation: a new key signs beside the old ones. Hand its public key to those who
    /// verify, and [`retire`](Self::retire) the old ones when all have it.
    pub fn rotate(folder: &Path) -> Result<Self, KeyFileError> {
        let mut ring = Self::open(folder)?;
        let key = SignerKey::generate(ring.origin())?;
        ring.verifiers.push(key.verifier().clone());
        ring.signers.push(key);
        ring.save(folder)?;
        Ok(ring)
    }

    /// Ends a rotation: only the newest key signs from now on. The old private keys are gone; the
    /// public ones stay.
    pub fn retire(folder: &Path) -> Result<Self, KeyFileError> {
        let mut ring = Self::open(folder)?;
        let newest = ring.signers.len() - 1;
        ring.signers.drain(..newest);
        ring.save(folder)?;
        Ok(ring)
    }

    /// Whose keys these are: the origin of the log.
    pub fn origin(&self) -> &str {
        // A ring has a key at least.
        self.signers[0].verifier().name()
    }

    /// Those that sign, the oldest first.
    pub fn signers(&self) -> &[SignerKey] {
        &self.signers
    }

    /// The public keys of all times.
    pub fn verifiers(&self) -> &[VerifierKey] {
        &self.verifiers
    }

    /// The public keys of all times, one a line.
    pub fn public_text(&self) -> String {
        self.verifiers.iter().map(|v| format!("{v}\n")).collect()
    }

    /// The file with a checkpoint that these keys signed, and what is in it. Nothing if they are in
    /// no file, or have signed no event that they know of.
    pub(super) fn signed(&self) -> Result<Option<(PathBuf, Vec<u8>)>, KeyFileError> {
        let Some(folder) = &self.folder else {
            return Ok(None);
        };
        let path = folder.join(SIGNED);
        match fs::read(&path) {
            Ok(note) => Ok(Some((path, note))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(io_error(&path, e)),
        }
    }

    /// Keeps a checkpoint that these keys sign beside them. When it returns it is on disk.
    pub(super) fn keep_signed(&self, note: &[u8]) -> Result<(), KeyFileError> {
        match &self.folder {
            Some(folder) => write(folder, SIGNED, note, 0o644),
            None => Ok(()),
        }
    }

    /// Public first: a key that signs is always one that others can know.
    fn save(&self, folder: &Path) -> Result<(), KeyFileError> {
        fs::create_dir_all(folder).map_err(|e| io_error(folder, e))?;
        let private: String = self.signers.iter().map(|s| s.expose() + "\n").collect();
        write(folder, PUBLIC, self.public_text().as_bytes(), 0o644)?;
        write(folder, PRIVATE, private.as_bytes(), 0o600)
    }
}

fn io_error(path: &Path, source: io::Error) -> KeyFileError {
    KeyFileError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Reads one key a line. Empty lines and lines that begin with `#` are left out.
fn lines<K: std::str::FromStr<Err = KeyError>>(
    path: &Path,
    text: &str,
) -> Result<Vec<K>, KeyFileError> {
    let mut keys = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        keys.push(line.parse().map_err(|source| KeyFileError::Malformed {
            path: path.to_owned(),
            line: number + 1,
            source,
        })?);
    }
    Ok(keys)
}

/// Replaces a file in one step.
fn write(folder: &Path, name: &str, bytes: &[u8], mode: u32) -> Result<(), KeyFileError> {
    let path = folder.join(name);
    // Several notaries may share the folder, each with the same process id.
    let unfinished = folder.join(format!(".{name}.{}", uuid::Uuid::new_v4()));
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&unfinished)
        .and_then(|mut file| {
            file.set_permissions(Permissions::from_mode(mode))?;
            file.write_all(bytes)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&unfinished, &path))
        .and_then(|()| File::open(folder)?.sync_all());
    written.map_err(|e| {
        let _ = fs::remove_file(&unfinished);
        io_error(&path, e)
    })
}

/// Reads the public keys of a text: one a line, as [`KeyRing::public_text`] writes them.
pub fn parse_verifiers(text: &str) -> Result<Vec<VerifierKey>, (usize, KeyError)> {
    lines(Path::new(""), text).map_err(|e| match e {
        KeyFileError::Malformed { line, source, .. } => (line, source),
        _ => (1, KeyError::Form("one key a line")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_rotated_and_old_public_ones_stay() {
        let folder = tempfile::tempdir().unwrap();
        let first = KeyRing::generate(folder.path(), "log.example.com").unwrap();
        assert!(matches!(
            KeyRing::generate(folder.path(), "log.example.com"),
            Err(KeyFileError::Exists { .. })
        ));
        let both = KeyRing::rotate(folder.path()).unwrap();
        assert_eq!((both.signers().len(), both.verifiers().len()), (2, 2));
        assert_eq!(both.origin(), first.origin());
        let second = KeyRing::retire(folder.path()).unwrap();
        assert_eq!(second.signers().len(), 1);
        assert_eq!(second.signers()[0].verifier(), &both.verifiers()[1]);
        assert_eq!(second.verifiers(), both.verifiers());
        assert_eq!(
            parse_verifiers(&second.public_text()).unwrap(),
            both.verifiers()
        );
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        KeyRing::generate(folder.path(), "log").unwrap();
        let path = folder.path().join(PRIVATE);
        let mode = |mode| fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        mode(0o640);
        let error = KeyRing::open(folder.path()).unwrap_err();
        assert!(error.to_string().ends_with("chmod 600 it"), "{error}");
        mode(0o400);
        KeyRing::open(folder.path()).unwrap();
    }

    #[test]
    fn a_broken_key_file_is_refused_with_the_line() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(
            KeyRing::open(folder.path()),
            Err(KeyFileError::Missing { .. })
        ));
        KeyRing::generate(folder.path(), "log").unwrap();
        let path = folder.path().join(PRIVATE);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(
            &path,
            format!("# ours\n\n{}", text.replace("+log+", "+lag+")),
        )
        .unwrap();
        match KeyRing::open(folder.path()) {
            Err(KeyFileError::Malformed {
                line: 3,
                source: KeyError::Id,
                ..
            }) => {}
            other => panic!("{other:?}"),
        }
        fs::write(&path, "").unwrap();
        assert!(matches!(
            KeyRing::open(folder.path()),
            Err(KeyFileError::Missing { .. })
        ));
    }
}
