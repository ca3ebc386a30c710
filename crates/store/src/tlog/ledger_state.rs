//! What a notary keeps beside the tiles: which heads were ever to be signed, which log they are
//! of, and what was found to be wrong with it.
//!
//! Heads form a chain of numbered files, each made exclusively. To sign a head is to have made the
//! next file of the chain, so of any number of notaries one at a time gets further, whether or not
//! they can see each other's locks. ADR `docs/adr/0006` says more.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use daybook_events::Position;
use daybook_events::tree::{Breach, TreeHead};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::checkpoint::{parse_decimal, parse_hash};
use super::reader::ReadTiles;
use super::storage::{StorageError, TileStorage};

/// The signed head.
pub(super) const CHECKPOINT: &str = "checkpoint";
/// The public keys of all times, one a line.
pub(super) const KEYS: &str = "keys";
/// What is wrong with the log. While it is there, nothing is signed.
pub(super) const BREACH: &str = "breach.json";
/// Why the log is doubted. Counts for as long as the notary writes it again and again.
pub(super) const DOUBT: &str = "notary/doubt";
/// Touched by the notary as long as it lives.
pub(super) const ALIVE: &str = "notary/alive";
const HEADS: &str = "notary/heads";
const LOGS: &str = "notary/logs.json";
/// Heads that are kept. One would do; more let people see what was done last.
const KEPT_HEADS: u64 = 64;

/// A head that was, or is about to be, signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ClaimedHead {
    /// Its number in the chain, from 1.
    pub number: u64,
    pub head: TreeHead,
}

/// A file of the notary's own is not what it wrote.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The storage cannot be used.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A file cannot be read.
    #[error("{path} cannot be read")]
    Io {
        /// Which, below the folder.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file has been changed by somebody else, or by a failing disk.
    #[error("{path} is damaged; restore the folder from a backup")]
    Damaged {
        /// Which, below the folder.
        path: String,
    },
}

async fn read(storage: &dyn ReadTiles, path: &str) -> Result<Option<Bytes>, StateError> {
    let read = storage.get(path).await;
    read.map_err(|source| StateError::Io {
        path: path.to_owned(),
        source,
    })
}

impl ClaimedHead {
    fn path(number: u64) -> String {
        format!("{HEADS}/{number:020}")
    }

    fn to_bytes(self) -> Bytes {
        let TreeHead { size, root } = self.head;
        format!("{}\n{size}\n{}\n", self.number, BASE64.encode(root)).into()
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut lines = std::str::from_utf8(bytes).ok()?.lines();
        let number = parse_decimal(lines.next()?)?;
        let size = parse_decimal(lines.next()?)?;
        let root = parse_hash(lines.next()?)?;
        let head = TreeHead { size, root };
        let complete = Self { number, head }.to_bytes() == bytes;
        complete.then_some(Self { number, head })
    }

    /// The end of the chain.
    pub(super) async fn newest(storage: &dyn TileStorage) -> Result<Option<Self>, StateError> {
        loop {
            let names = storage.list(HEADS).await?;
            let Some(number) = names.iter().filter_map(|n| n.parse().ok()).max() else {
                return Ok(None);
            };
            let path = Self::path(number);
            // It may have been collected in between, and then there is a newer one.
            let Some(bytes) = read(storage, &path).await? else {
                continue;
            };
            return match Self::parse(&bytes) {
                Some(head) if head.number == number => Ok(Some(head)),
                _ => Err(StateError::Damaged { path }),
            };
        }
    }

    /// Extends the chain, and says whether that succeeded: if not, somebody else was faster, and
    /// this head must not be signed.
    pub(super) async fn claim(self, storage: &dyn TileStorage) -> Result<bool, StateError> {
        let path = Self::path(self.number);
        if !storage.create(&path, self.to_bytes()).await? {
            // Perhaps by an earlier attempt of this very notary, which failed after it was made.
            let found = read(storage, &path).await?;
            return Ok(found.is_some_and(|found| found == self.to_bytes())
                && Self::newest(storage).await?.map(|h| h.number) == Some(self.number));
        }
        // One who slept through many heads may have found a number that was collected.
        Ok(Self::newest(storage).await?.map(|h| h.number) == Some(self.number))
    }

    /// Removes what is far behind the end of the chain.
    pub(super) async fn collect(self, storage: &dyn TileStorage) -> Result<(), StorageError> {
        let Some(old) = self.number.checked_sub(KEPT_HEADS) else {
            return Ok(());
        };
        storage.remove(vec![Self::path(old)]).await
    }
}

/// Which logs the leaves came from, the present one last.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LogHistory {
    logs: Vec<BoundLog>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct BoundLog {
    /// As [`LogInfo::identity`](daybook_events::log::LogInfo::identity) has it.
    identity: String,
    /// Size of the tree when this log took the place of the one before.
    from: u64,
    since: Timestamp,
    /// Whether a repair wrote it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    restored: bool,
}

impl LogHistory {
    pub(super) async fn read(storage: &dyn ReadTiles) -> Result<Self, StateError> {
        let Some(bytes) = read(storage, LOGS).await? else {
            return Ok(Self::default());
        };
        serde_json::from_slice(&bytes).map_err(|_| StateError::Damaged { path: LOGS.into() })
    }

    /// The identity of the present one.
    pub(super) fn identity(&self) -> Option<&str> {
        self.logs.last().map(|log| log.identity.as_str())
    }

    /// The identity of the one before.
    pub(super) fn before(&self) -> Option<&str> {
        self.logs
            .iter()
            .nth_back(1)
            .map(|log| log.identity.as_str())
    }

    /// Whether a repair wrote the present one. Before that was noted, nothing else took the place of
    /// a log.
    pub(super) fn is_restored(&self) -> bool {
        self.logs.last().is_some_and(|log| log.restored) || self.logs.len() > 1
    }

    /// From now on this log is the present one.
    pub(super) async fn bind(
        self,
        storage: &dyn TileStorage,
        identity: &str,
        from: u64,
    ) -> Result<(), StateError> {
        self.push(storage, identity, from, false).await
    }

    /// From now on this log is the present one, into which a repair wrote all events.
    pub(super) async fn bind_restored(
        self,
        storage: &dyn TileStorage,
        identity: &str,
    ) -> Result<(), StateError> {
        self.push(storage, identity, 0, true).await
    }

    async fn push(
        mut self,
        storage: &dyn TileStorage,
        identity: &str,
        from: u64,
        restored: bool,
    ) -> Result<(), StateError> {
        self.logs.push(BoundLog {
            identity: identity.to_owned(),
            from,
            since: Timestamp::now(),
            restored,
        });
        let bytes = serde_json::to_vec_pretty(&self).map_err(|e| StateError::Io {
            path: LOGS.into(),
            source: e.into(),
        })?;
        Ok(storage.replace(LOGS, bytes.into()).await?)
    }
}

/// All codes of breaches, which the README of the operator explains.
pub mod codes {
    /// The log ends before what was signed.
    pub const TRUNCATED: &str = "log_truncated";
    /// An event is not the one that was signed.
    pub const DIFFERS: &str = "log_differs";
    /// The log is another one than that which was signed.
    pub const REPLACED: &str = "log_replaced";
    /// An event that was not signed yet cannot be read.
    pub const DAMAGED: &str = "log_damaged";
    /// The tiles are not what was signed.
    pub const TREE_DAMAGED: &str = "tree_damaged";
    /// Something is wrong that this version has no name for.
    pub(super) const OTHER: &str = "log_broken";
    pub(super) const ALL: [&str; 5] = [TRUNCATED, DIFFERS, REPLACED, DAMAGED, TREE_DAMAGED];
}

/// A breach as it is stored for other processes.
#[derive(Serialize, Deserialize)]
struct StoredBreach {
    code: String,
    position: Option<Position>,
    message: String,
    remedy: String,
    found_at: Timestamp,
}

/// What is written of a breach. That there is something is what counts.
pub(super) async fn read_breach(storage: &dyn ReadTiles) -> Result<Option<Breach>, StateError> {
    let bytes = read(storage, BREACH).await?;
    Ok(bytes.map(|bytes| parse_breach(&bytes)))
}

/// The code of a breach that somebody else told of; a common one for those of a newer version.
pub fn breach_code(told: &str) -> &'static str {
    let known = codes::ALL.into_iter().find(|code| *code == told);
    known.unwrap_or(codes::OTHER)
}

pub(super) fn parse_breach(bytes: &[u8]) -> Breach {
    let Ok(stored) = serde_json::from_slice::<StoredBreach>(bytes) else {
        return Breach {
            code: codes::OTHER,
            position: None,
            message: format!("the log is broken, and {BREACH}, which says how, cannot be read"),
            remedy: "stop all writers, and run `daybook ledger recheck`, which says what is wrong"
                .to_owned(),
        };
    };
    Breach {
        code: breach_code(&stored.code),
        position: stored.position,
        message: stored.message,
        remedy: stored.remedy,
    }
}

/// Tells all who read the folder.
pub(super) async fn write_breach(
    storage: &dyn TileStorage,
    breach: &Breach,
) -> Result<(), StateError> {
    let stored = StoredBreach {
        code: breach.code.to_owned(),
        position: breach.position,
        message: breach.message.clone(),
        remedy: breach.remedy.clone(),
        found_at: Timestamp::now(),
    };
    let bytes = serde_json::to_vec_pretty(&stored).map_err(|e| StateError::Io {
        path: BREACH.into(),
        source: e.into(),
    })?;
    Ok(storage.replace(BREACH, bytes.into()).await?)
}
