//! SSH signatures of commits, as `git verify-commit` checks them.
//!
//! The private key is a file in OpenSSH's form that only its owner may read. It is made at the
//! first use, may be shared by several processes, and is read again when the file changes, so that
//! a rotation needs no restart. Which keys count is for the ledger to say, not for a file that
//! whoever pushes to the repository can change.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use git2::{Oid, Repository};
use ssh_key::rand_core::OsRng;
use ssh_key::{Algorithm, HashAlg, LineEnding, PrivateKey, PublicKey, SshSig};

use super::message::COMMITTER_ADDRESS;

/// What git signs and verifies under.
const NAMESPACE: &str = "git";

/// Why the key that commits are signed with cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Its file cannot be read or written.
    #[error("the signing key {}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// Others than its owner may read it.
    #[error("the signing key {} may be read by others than its owner", .path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
    },
    /// It holds no Ed25519 key, or one behind a passphrase.
    #[error("{} holds no Ed25519 key in OpenSSH's form without a passphrase: {reason}", .path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl KeyError {
    /// A stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::File { .. } => "gitops_key_unusable",
            Self::Exposed { .. } => "gitops_key_exposed",
            Self::Invalid { .. } => "gitops_key_invalid",
        }
    }

    /// What to do about it, in one sentence.
    pub fn remedy(&self) -> String {
        match self {
            Self::File { .. } => "Check the file's folder, owner and permissions.".into(),
            Self::Exposed { path } => format!(
                "Run `chmod 600 {}`, and make a new key with `daybook keys gitops rotate` if \
                 somebody may have read it.",
                path.display()
            ),
            Self::Invalid { .. } => {
                "Name a key made with `ssh-keygen -t ed25519 -N ''`, or move the file away to \
                 have a new one made."
                    .into()
            }
        }
    }

    fn file(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { path, source }
    }
}

/// A public key that commits are signed with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signer {
    /// In OpenSSH's form, without a comment: `ssh-ed25519 AAAA…`.
    pub public_key: String,
    /// `SHA256:…`
    pub fingerprint: String,
}

impl Signer {
    fn of(key: &PublicKey) -> Self {
        let mut key = key.clone();
        key.set_comment("");
        Self {
            // A key that was parsed or made can be written.
            public_key: key.to_openssh().unwrap_or_default().trim_end().to_owned(),
            fingerprint: key.fingerprint(HashAlg::Sha256).to_string(),
        }
    }
}

/// The key that commits are signed with.
#[derive(Debug)]
pub struct SigningKey {
    path: PathBuf,
    loaded: Mutex<Option<(Seen, Arc<Loaded>)>>,
}

/// Which file a key was read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    inode: u64,
    modified: (i64, i64),
}

#[derive(Debug)]
pub(super) struct Loaded {
    key: PrivateKey,
    pub(super) signer: Signer,
}

impl SigningKey {
    /// The key in this file, which is made if there is none. Of several processes that make it at
    /// once, one does and the others take it.
    pub fn open_or_create(path: impl Into<PathBuf>) -> Result<Self, KeyError> {
        let this = Self {
            path: path.into(),
            loaded: Mutex::default(),
        };
        if !this.path.exists() {
            let fresh = write_fresh(&this.path)?;
            let linked = fs::hard_link(&fresh, &this.path);
            let _ = fs::remove_file(&fresh);
            match linked {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(KeyError::file(&this.path)(e));
                }
                _ => sync_folder_of(&this.path)?,
            }
        }
        this.load()?;
        Ok(this)
    }

    /// Replaces the key in this file by a new one. Commits that are signed already stay good: the
    /// ledger keeps the public key of each.
    pub fn rotate(path: &Path) -> Result<Signer, KeyError> {
        let fresh = write_fresh(path)?;
        fs::rename(&fresh, path).map_err(KeyError::file(path))?;
        sync_folder_of(path)?;
        Self::open_or_create(path)?.signer()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its public key, as it is now.
    pub fn signer(&self) -> Result<Signer, KeyError> {
        Ok(self.load()?.signer.clone())
    }

    /// The key as its file has it now.
    pub(super) fn load(&self) -> Result<Arc<Loaded>, KeyError> {
        let found = fs::metadata(&self.path).map_err(KeyError::file(&self.path))?;
        let seen = Seen {
            inode: found.ino(),
            modified: (found.mtime(), found.mtime_nsec()),
        };
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((before, key)) = &*loaded
            && *before == seen
        {
            return Ok(key.clone());
        }
        if found.permissions().mode() & 0o077 != 0 {
            let path = self.path.clone();
            return Err(KeyError::Exposed { path });
        }
        let invalid = |reason: String| KeyError::Invalid {
            path: self.path.clone(),
            reason,
        };
        let text = fs::read(&self.path).map_err(KeyError::file(&self.path))?;
        let key = PrivateKey::from_openssh(text).map_err(|e| invalid(e.to_string()))?;
        if key.is_encrypted() {
            return Err(invalid("it has a passphrase".into()));
        }
        if key.algorithm() != Algorithm::Ed25519 {
            return Err(invalid(format!("it is of kind {}", key.algorithm())));
        }
        let signer = Signer::of(key.public_key());
        let key = Arc::new(Loaded { key, signer });
        *loaded = Some((seen, key.clone()));
        Ok(key)
    }
}

impl Loaded {
    /// The signature of a commit's text, as its header `gpgsig` has it.
    pub(super) fn sign(&self, text: &str) -> Result<String, ssh_key::Error> {
        self.key
            .sign(NAMESPACE, HashAlg::Sha512, text.as_bytes())?
            .to_pem(LineEnding::LF)
    }
}

fn write_fresh(path: &Path) -> Result<PathBuf, KeyError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    if !folder.exists() {
        fs::create_dir_all(folder).map_err(KeyError::file(folder))?;
        let owner_only = fs::Permissions::from_mode(0o700);
        fs::set_permissions(folder, owner_only).map_err(KeyError::file(folder))?;
    }
    let invalid = |e: ssh_key::Error| KeyError::Invalid {
        path: path.to_owned(),
        reason: e.to_string(),
    };
    let mut key = PrivateKey::random(&mut OsRng, Algorithm::Ed25519).map_err(invalid)?;
    key.set_comment("daybook");
    let text = key.to_openssh(LineEnding::LF).map_err(invalid)?;
    let fresh = path.with_extension(format!("{}.new", uuid::Uuid::now_v7().simple()));
    let written = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&fresh)
        .and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
    match written {
        Ok(()) => Ok(fresh),
        Err(e) => {
            let _ = fs::remove_file(&fresh);
            Err(KeyError::file(path)(e))
        }
    }
}

fn sync_folder_of(path: &Path) -> Result<(), KeyError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(KeyError::file(folder))
}

/// The file that `gpg.ssh.allowedSignersFile` names: these public keys may sign commits, and
/// nothing else.
pub fn allowed_signers<'a>(public_keys: impl IntoIterator<Item = &'a str>) -> String {
    let mut text = String::new();
    for key in public_keys {
        text.push_str(&format!(
            "{COMMITTER_ADDRESS} namespaces=\"{NAMESPACE}\" {key}\n"
        ));
    }
    text
}

/// What a commit's signature is worth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// There is none.
    Unsigned,
    /// It is good, and of one of the keys that were asked for: the one with this fingerprint.
    Good(String),
    /// It is good, and of another key.
    UnknownKey(String),
    /// It is not this commit's, or no SSH signature at all.
    Bad,
}

/// Fingerprint of the key that a commit says it is signed with.
pub(super) fn signer_of(
    repository: &Repository,
    commit: Oid,
) -> Result<Option<String>, git2::Error> {
    Ok(match verify(repository, commit, &[])? {
        Verdict::Good(fingerprint) | Verdict::UnknownKey(fingerprint) => Some(fingerprint),
        Verdict::Unsigned | Verdict::Bad => None,
    })
}

/// Checks a commit's signature against these public keys.
pub(super) fn verify(
    repository: &Repository,
    commit: Oid,
    public_keys: &[String],
) -> Result<Verdict, git2::Error> {
    let (signature, text) = match repository.extract_signature(&commit, None) {
        Ok(found) => found,
        Err(e) if e.code() == git2::ErrorCode::NotFound => return Ok(Verdict::Unsigned),
        Err(e) => return Err(e),
    };
    let Ok(signature) = SshSig::from_pem(&signature[..]) else {
        return Ok(Verdict::Bad);
    };
    let key = PublicKey::from(signature.public_key().clone());
    if key.verify(NAMESPACE, &text, &signature).is_err() {
        return Ok(Verdict::Bad);
    }
    let signer = Signer::of(&key);
    Ok(if public_keys.contains(&signer.public_key) {
        Verdict::Good(signer.fingerprint)
    } else {
        Verdict::UnknownKey(signer.fingerprint)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_read_again_when_it_was_rotated() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys/gitops");
        let key = SigningKey::open_or_create(&path).unwrap();
        let first = key.signer().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        let again = SigningKey::open_or_create(&path).unwrap();
        assert_eq!(again.signer().unwrap(), first);
        let second = SigningKey::rotate(&path).unwrap();
        assert_ne!(second, first);
        assert_eq!(key.signer().unwrap(), second);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn many_who_make_a_key_at_once_have_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gitops");
        let all: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| SigningKey::open_or_create(&path)?.signer()))
                .collect();
            threads
                .into_iter()
                .map(|t| t.join().unwrap().unwrap())
                .collect()
        });
        assert!(all.windows(2).all(|w| w[0] == w[1]));
    }

    #[test]
    fn a_key_that_others_may_read_or_that_is_none_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gitops");
        SigningKey::open_or_create(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let exposed = SigningKey::open_or_create(&path).unwrap_err();
        assert_eq!(exposed.code(), "gitops_key_exposed");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "no key").unwrap();
        let invalid = SigningKey::open_or_create(&path).unwrap_err();
        assert_eq!(invalid.code(), "gitops_key_invalid");
        assert_eq!(fs::read(&path).unwrap(), b"no key");
    }
}
