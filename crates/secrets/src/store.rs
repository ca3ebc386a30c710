//! The port to where values are kept.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use daybook_events::secret::{Commitment, SecretId, SecretRef};
use daybook_events::{EnvKey, ProjectName};
use uuid::Uuid;

use crate::masker::Masker;
use crate::value::SecretValue;

/// A commitment, and the key that it was made under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// The commitment.
    pub commitment: Commitment,
    /// Names the key. It says nothing about it.
    pub key: Uuid,
}

/// Where the values of secrets are kept, with the key of each project's commitments.
///
/// A value is found by its commitment, so that keeping it before the ledger knows of it does no
/// harm: what is never recorded is never referred to. Every value that was kept stays until it is
/// erased, for deployments that still run with it and for masking.
#[async_trait]
pub trait SecretStore: Send + Sync + fmt::Debug + 'static {
    /// Keeps a value, and returns its commitment. Keeping it again changes nothing. The key of a
    /// project is made when its first value is kept.
    async fn put(
        &self,
        project: &ProjectName,
        id: &SecretId,
        value: &SecretValue,
    ) -> Result<Committed, SecretError>;

    /// The commitment that a value would have, without keeping it.
    async fn commitment(
        &self,
        project: &ProjectName,
        id: &SecretId,
        value: &SecretValue,
    ) -> Result<Committed, SecretError>;

    /// A digest of a request that contains a value: keyed, so that nobody can find the value by
    /// guessing. Requests of one project have the same digest only if they are the same.
    async fn request_digest(
        &self,
        project: &ProjectName,
        request: &[u8],
    ) -> Result<String, SecretError>;

    /// The values of what a deployment runs with, by variable: all of them, or the first that is
    /// missing.
    async fn resolve(
        &self,
        project: &ProjectName,
        references: &BTreeMap<EnvKey, SecretRef>,
    ) -> Result<BTreeMap<EnvKey, SecretValue>, SecretError>;

    /// Erases all values of a secret.
    async fn erase(&self, project: &ProjectName, id: &SecretId) -> Result<(), SecretError>;

    /// Erases all values of a project and the key of its commitments, which are meaningless from
    /// then on.
    async fn forget(&self, project: &ProjectName) -> Result<(), SecretError>;

    /// Masks all values that are kept for a project, or for all projects if none is named.
    /// Answers at once from what it remembers, and notices what other processes have changed.
    fn masker(&self, project: Option<&ProjectName>) -> Result<Arc<Masker>, SecretError>;
}

impl dyn SecretStore {
    /// The masker of a project, or of all. Where the values cannot be read, one that withholds
    /// every text: what nobody can check nobody gets to see.
    pub fn masker_or_withhold(&self, project: Option<&ProjectName>) -> Arc<Masker> {
        self.masker(project)
            .unwrap_or_else(|_| Arc::new(Masker::withholding()))
    }
}

/// Why a value could not be kept or found.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// There is no such value here.
    #[error("the value of {id} in version {version} is not in the secret store")]
    Missing {
        /// The secret.
        id: SecretId,
        /// Its version.
        version: u32,
    },
    /// The key file is gone although there are values that need it.
    #[error("the key file {} of the secret store is missing", .0.display())]
    NoKey(PathBuf),
    /// A file is no (longer) what was written, or belongs to another key.
    #[error("{} cannot be decrypted: it is damaged, or of another key file", .0.display())]
    Damaged(PathBuf),
    /// A file cannot be read or written. Waiting may help.
    #[error("{} cannot be used", .path.display())]
    Unusable {
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// This process has no secret store.
    #[error("this process has no secret store")]
    None,
}

impl SecretError {
    /// A stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "secret_missing",
            Self::NoKey(_) | Self::Damaged(_) => "secrets_damaged",
            Self::Unusable { .. } => "secrets_unusable",
            Self::None => "secrets_unavailable",
        }
    }

    /// What helps.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Missing { .. } => {
                "set the secret again with `daybook secret set` and deploy anew; processes on \
                 several machines need the same folder in --secrets"
            }
            Self::NoKey(_) | Self::Damaged(_) => {
                "restore the folder of --secrets, with its key file, from a backup"
            }
            Self::Unusable { .. } => "check free space and permissions of the folder of --secrets",
            Self::None => "start the server with --secrets DIR",
        }
    }

    /// Whether waiting may help.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unusable { .. })
    }

    /// The error with its cause, in one line.
    pub fn to_line(&self) -> String {
        match self {
            Self::Unusable { source, .. } => format!("{self}: {source}"),
            other => other.to_string(),
        }
    }
}

/// For processes that have no secrets: keeps none, finds none, masks nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoSecrets;

#[async_trait]
impl SecretStore for NoSecrets {
    async fn put(
        &self,
        _: &ProjectName,
        _: &SecretId,
        _: &SecretValue,
    ) -> Result<Committed, SecretError> {
        Err(SecretError::None)
    }
    async fn commitment(
        &self,
        _: &ProjectName,
        _: &SecretId,
        _: &SecretValue,
    ) -> Result<Committed, SecretError> {
        Err(SecretError::None)
    }
    async fn request_digest(&self, _: &ProjectName, _: &[u8]) -> Result<String, SecretError> {
        Err(SecretError::None)
    }
    async fn resolve(
        &self,
        _: &ProjectName,
        references: &BTreeMap<EnvKey, SecretRef>,
    ) -> Result<BTreeMap<EnvKey, SecretValue>, SecretError> {
        if references.is_empty() {
            Ok(BTreeMap::new())
        } else {
            Err(SecretError::None)
        }
    }
    async fn erase(&self, _: &ProjectName, _: &SecretId) -> Result<(), SecretError> {
        Ok(())
    }
    async fn forget(&self, _: &ProjectName) -> Result<(), SecretError> {
        Ok(())
    }
    fn masker(&self, _: Option<&ProjectName>) -> Result<Arc<Masker>, SecretError> {
        Ok(Arc::default())
    }
}
