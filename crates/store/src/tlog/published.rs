//! The published tree, for those who only read it: the notary's own, and one over a folder that
//! another process writes.

use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use daybook_events::tree::{Breach, PublishedTree, SignedHead, TreeCondition};
use jiff::Timestamp;

use super::checkpoint::{Checkpoint, CheckpointError};
use super::ledger_state::{ALIVE, BREACH, CHECKPOINT, DOUBT, KEYS, parse_breach};
use super::path::TilePath;
use super::reader::{ReadTiles, cut};
use super::storage::FolderStorage;

/// How often a folder is looked at, at most.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// A notary that has not touched its folder for so long is not heard of any more.
const SILENCE: Duration = Duration::from_secs(15);
/// A doubt that was not seen to be written again for so long is of a notary that died.
const OLD_DOUBT: Duration = Duration::from_secs(5);

/// Answers for static resources below the published head.
async fn resource(
    tiles: &dyn ReadTiles,
    head: Option<SignedHead>,
    path: &str,
) -> io::Result<Option<Bytes>> {
    let Some(head) = head else {
        return Ok(None);
    };
    match path {
        CHECKPOINT => return Ok(Some(head.note)),
        KEYS => return tiles.get(KEYS).await,
        _ => {}
    }
    let Ok(path) = path.parse::<TilePath>() else {
        return Ok(None);
    };
    if !path.is_covered_by(head.head.size) {
        return Ok(None);
    }
    let found = tiles.get(&path.to_string()).await?;
    if found.is_some() || path.is_full() {
        return Ok(found);
    }
    let full = tiles.get(&path.when_full().to_string()).await?;
    Ok(full.and_then(|full| cut(path, &full)))
}

/// What a notary has published, and what it knows of the log.
#[derive(Debug)]
pub(super) struct NotaryTree {
    tiles: Arc<dyn ReadTiles>,
    state: RwLock<(Option<SignedHead>, TreeCondition)>,
}

impl NotaryTree {
    pub(super) fn new(tiles: Arc<dyn ReadTiles>) -> Self {
        let unknown = TreeCondition::Unknown("the notary has not looked yet".to_owned());
        Self {
            tiles,
            state: RwLock::new((None, unknown)),
        }
    }

    fn update(&self, change: impl FnOnce(&mut Option<SignedHead>, &mut TreeCondition)) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let (head, condition) = &mut *state;
        change(head, condition);
    }

    /// A head was published. Readers never see one go back.
    pub(super) fn publish(&self, new: SignedHead) {
        self.update(|head, _| {
            let newer = |old: &SignedHead| old.head.size <= new.head.size;
            if head.as_ref().is_none_or(newer) {
                *head = Some(new);
            }
        });
    }

    /// What is known of the log. Once broken it stays so.
    pub(super) fn set(&self, new: TreeCondition) {
        self.update(|_, condition| {
            if !matches!(condition, TreeCondition::Broken(_)) {
                *condition = new;
            }
        });
    }

    pub(super) fn breach(&self) -> Option<Breach> {
        match self.condition() {
            TreeCondition::Broken(breach) => Some(breach),
            _ => None,
        }
    }
}

#[async_trait]
impl PublishedTree for NotaryTree {
    fn head(&self) -> Option<SignedHead> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.0.clone()
    }

    fn condition(&self) -> TreeCondition {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.1.clone()
    }

    async fn resource(&self, path: &str) -> io::Result<Option<Bytes>> {
        resource(&self.tiles, self.head(), path).await
    }
}

/// The tree in a folder that a notary in another process writes, on this machine or on a disk that
/// machines share.
///
/// The folder is looked at when it is asked for and was not for 100 ms: that costs four `stat`s.
/// Nothing is verified; that is for those who do not trust the folder.
pub struct FolderTree {
    storage: FolderStorage,
    seen: Mutex<Seen>,
}

struct Seen {
    looked: Option<Instant>,
    /// Of which file the head is: its number and when it was written, for the clock of a file
    /// system may stand still while two are written.
    file: Option<(u64, SystemTime)>,
    head: Option<SignedHead>,
    condition: TreeCondition,
    /// Which doubt was seen, and since when: the clock of whoever wrote it may be another.
    doubt: Option<((u64, SystemTime), Instant)>,
}

impl fmt::Debug for FolderTree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FolderTree")
            .field(&self.storage.folder())
            .finish()
    }
}

impl FolderTree {
    /// The tree in this folder, which need not exist yet.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            storage: FolderStorage::new(folder),
            seen: Mutex::new(Seen {
                looked: None,
                file: None,
                head: None,
                condition: TreeCondition::Unknown("nothing is published yet".to_owned()),
                doubt: None,
            }),
        }
    }

    fn seen<T>(&self, of: impl FnOnce(&Seen) -> T) -> T {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.looked.is_none_or(|at| at.elapsed() > LOOK_AGAIN) {
            self.look(&mut seen);
            seen.looked = Some(Instant::now());
        }
        of(&seen)
    }

    fn look(&self, seen: &mut Seen) {
        let head = self.look_at_head(seen);
        // A breach counts whatever else is wrong with the folder.
        seen.condition = match (self.look_at_breach(), head) {
            (Some(breach), _) => TreeCondition::Broken(breach),
            (None, Err(trouble)) => TreeCondition::Unknown(trouble),
            (None, Ok(())) => self.look_at_condition(seen),
        };
    }

    fn look_at_breach(&self) -> Option<Breach> {
        let bytes = std::fs::read(self.storage.folder().join(BREACH)).ok()?;
        Some(parse_breach(&bytes))
    }

    fn look_at_head(&self, seen: &mut Seen) -> Result<(), String> {
        let path = self.storage.folder().join(CHECKPOINT);
        let trouble = |e: &dyn fmt::Display| format!("{}: {e}", path.display());
        let (file, modified) = match which(&path) {
            Ok(found) => (Some(found), found.1),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(trouble(&e)),
        };
        if seen.file == file {
            return Ok(());
        }
        let note = std::fs::read(&path).map_err(|e| trouble(&e))?;
        let read: Result<_, CheckpointError> = Checkpoint::parse_unverified(&note);
        let (checkpoint, _) = read.map_err(|e| trouble(&e))?;
        let goes_back = |old: &SignedHead| old.head.size > checkpoint.head.size;
        if !seen.head.as_ref().is_some_and(goes_back) {
            seen.head = Some(SignedHead {
                head: checkpoint.head,
                published_at: Timestamp::try_from(modified).unwrap_or(Timestamp::UNIX_EPOCH),
                note: note.into(),
            });
        }
        seen.file = file;
        Ok(())
    }

    fn look_at_condition(&self, seen: &mut Seen) -> TreeCondition {
        let folder = self.storage.folder();
        if seen.head.is_none() {
            return TreeCondition::Unknown("nothing is published yet".to_owned());
        }
        let doubt = which(&folder.join(DOUBT)).ok();
        seen.doubt = doubt.map(|file| match seen.doubt {
            Some((known, since)) if known == file => (known, since),
            _ => (file, Instant::now()),
        });
        if seen
            .doubt
            .is_some_and(|(_, since)| since.elapsed() <= OLD_DOUBT)
            && let Ok(why) = std::fs::read_to_string(folder.join(DOUBT))
        {
            return TreeCondition::Doubted(why);
        }
        let heard = std::fs::metadata(folder.join(ALIVE)).and_then(|m| m.modified());
        let silent = heard.map(|at| SystemTime::now().duration_since(at).unwrap_or_default());
        match silent {
            Ok(silent) if silent <= SILENCE => TreeCondition::Sound,
            Ok(silent) => TreeCondition::Unknown(format!(
                "the notary has not been heard of for {} s",
                silent.as_secs()
            )),
            Err(_) => TreeCondition::Unknown("the notary has not been heard of".to_owned()),
        }
    }
}

/// Which file this is: its number, and when it was written.
fn which(path: &Path) -> io::Result<(u64, SystemTime)> {
    let file = std::fs::metadata(path)?;
    Ok((file.ino(), file.modified()?))
}

#[async_trait]
impl PublishedTree for FolderTree {
    fn head(&self) -> Option<SignedHead> {
        self.seen(|seen| seen.head.clone())
    }

    fn condition(&self) -> TreeCondition {
        self.seen(|seen| seen.condition.clone())
    }

    async fn resource(&self, path: &str) -> io::Result<Option<Bytes>> {
        resource(&self.storage, self.head(), path).await
    }
}
