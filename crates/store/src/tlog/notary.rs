//! The notary: reads the log in order, adds each event to the tree, and signs.
//!
//! The order of a round is: bundles and tiles are on disk; then what is about to be signed; then
//! the chain of heads is extended by it, unless somebody else was faster; only then it is signed,
//! and published. Whatever is cut off in between, the next start goes on from the end of the chain.
//! Nothing that was signed is ever made anew from the log.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use daybook_events::Position;
use daybook_events::log::{EventLog, EventStream, ReadError};
use daybook_events::subject::SubjectFilter;
use daybook_events::tree::{Breach, PublishedTree, SignedHead, TreeCondition, TreeHead};
use daybook_events::with_causes;
use futures_util::{FutureExt, StreamExt};
use jiff::Timestamp;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::checkpoint::{Checkpoint, CheckpointError};
use super::compare::{
    Mismatch, compare_bundle, compare_event, judge_read_error, judge_tree_error, replaced,
    tree_damaged, truncated, unsigned_differs,
};
use super::growth::Growth;
use super::hash::{Hash, empty_root};
use super::keys::{KeyFileError, KeyRing};
use super::leaf::{event_entry, gap_entry};
use super::ledger_state::{
    ALIVE, CHECKPOINT, ClaimedHead, DOUBT, KEYS, LogHistory, StateError, read_breach, write_breach,
};
use super::path::{TILE_WIDTH, TilePath};
use super::published::NotaryTree;
use super::reader::TreeReader;
use super::storage::{StorageError, TileStorage};
use super::verify::verify_consistency;

/// How long the notary waits after something went wrong that may pass.
const RETRY: Duration = Duration::from_secs(1);
/// How soon a log that looks too short is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// How long a log is doubted that does not answer any more.
const DOUBT_LASTS: Duration = Duration::from_secs(15);
/// So often the slow comparison tries what cannot be read, before it goes on with what follows.
const SWEEP_TRIES: u32 = 3;
/// A round takes no more than so many bytes of events into memory.
const ROUND_BYTES: usize = 32 << 20;

/// How a notary works.
#[derive(Debug, Clone)]
pub struct NotaryOptions {
    /// An event is signed for at most so long after it was read. What it takes to store and to
    /// publish comes on top.
    pub max_delay: Duration,
    /// So many events are signed for at once, however young they are.
    pub max_events: usize,
    /// How often the log's identity, its length and its newest event are compared with what was
    /// signed.
    pub check_every: Duration,
    /// How long a log may look shorter than it was before that is a loss: a new leader of a
    /// cluster needs a moment. Appends wait for as long.
    pub settle: Duration,
    /// How many old events a second are compared with their leaves, over and over.
    pub sweep_rate: u32,
}

impl Default for NotaryOptions {
    fn default() -> Self {
        Self {
            max_delay: Duration::from_millis(700),
            max_events: 256,
            check_every: Duration::from_secs(1),
            settle: Duration::from_secs(2),
            sweep_rate: 1000,
        }
    }
}

/// Why a notary does not work, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum NotaryError {
    /// The log is not what was signed, or the tiles are not. It has been written into the folder.
    #[error("{} ({})", .0.message, .0.code)]
    Breach(Breach),
    /// What is published was signed by other keys, or for another origin.
    #[error("the published checkpoint is not of these keys; give the keys it was signed with")]
    Keys(#[source] CheckpointError),
    /// These keys have signed events of this ledger, and there are no tiles. Nothing was written:
    /// the folder may not be mounted.
    #[error(
        "these keys signed {size} events of {origin}, and there are no tiles of it: they are not made \
         anew from the log"
    )]
    TreeMissing {
        /// The ledger.
        origin: String,
        /// So many, at least.
        size: u64,
    },
    /// What is kept beside the keys is not what they signed.
    #[error("{} is no checkpoint that these keys signed", path.display())]
    Signed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: CheckpointError,
    },
    /// What is kept beside the keys cannot be read.
    #[error(transparent)]
    KeyFile(KeyFileError),
    /// The notary's own files are damaged.
    #[error("the state of the notary cannot be used")]
    State(#[source] StateError),
    /// An event does not fit the tree.
    #[error("{0}")]
    Entry(String),
}

/// What ended a round.
enum Trouble {
    Breach(Breach),
    /// It may work later.
    Passing(String),
    /// Another notary was faster: read what it did, and go on from there.
    Overtaken,
    Fatal(NotaryError),
}

impl From<Mismatch> for Trouble {
    fn from(mismatch: Mismatch) -> Self {
        match mismatch {
            Mismatch::Breach(breach) => Self::Breach(breach),
            Mismatch::Short { head, size } => Self::Passing(format!(
                "the log ended at {head} for a moment, and not at {size}"
            )),
            Mismatch::Passing(reason) => Self::Passing(reason),
        }
    }
}

impl From<Breach> for Trouble {
    fn from(breach: Breach) -> Self {
        Self::Breach(breach)
    }
}

impl From<StateError> for Trouble {
    fn from(error: StateError) -> Self {
        match error {
            StateError::Damaged { .. } => Self::Fatal(NotaryError::State(error)),
            passing => Self::Passing(with_causes(&passing)),
        }
    }
}

impl From<StorageError> for Trouble {
    fn from(error: StorageError) -> Self {
        Self::Passing(with_causes(&error))
    }
}

/// Reads a log and signs it.
///
/// Any number of notaries may work on the same storage, by mistake or for availability: they
/// extend one tree, one at a time, and none ever signs what does not extend it.
pub struct Notary {
    log: Arc<dyn EventLog>,
    storage: Arc<dyn TileStorage>,
    keys: KeyRing,
    options: NotaryOptions,
    tree: Arc<NotaryTree>,
    /// A head with events that these keys signed, if there is one that they know of.
    signed_before: Mutex<Option<TreeHead>>,
    /// Whether one was kept beside them since the start, or cannot be.
    is_kept: AtomicBool,
}

impl fmt::Debug for Notary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notary")
            .field("origin", &self.keys.origin())
            .field("log", &self.log)
            .field("storage", &self.storage)
            .finish_non_exhaustive()
    }
}

/// The tree as it was signed last, and where the next leaf goes.
struct Edge {
    claimed: ClaimedHead,
    growth: Growth,
    /// The newest signed leaf.
    newest: Option<Hash>,
}

impl Edge {
    fn signed(&self) -> u64 {
        self.claimed.head.size
    }

    fn pending(&self) -> usize {
        (self.growth.size() - self.signed()) as usize
    }
}

impl Notary {
    /// Opens the tree in a storage and compares it with the log, before anything is appended.
    ///
    /// A breach is no error here: [`tree`](Self::tree) is then broken, and [`run`](Self::run)
    /// ends as soon as the folder says so. Neither is a log or storage that is not available: `run`
    /// tries again.
    pub async fn open(
        log: Arc<dyn EventLog>,
        storage: Arc<dyn TileStorage>,
        keys: KeyRing,
        options: NotaryOptions,
    ) -> Result<Self, NotaryError> {
        let tiles: Arc<dyn super::reader::ReadTiles> = storage.clone();
        let notary = Self {
            tree: Arc::new(NotaryTree::new(tiles)),
            log,
            storage,
            signed_before: Mutex::new(signed_before(&keys)?),
            is_kept: AtomicBool::new(false),
            keys,
            options,
        };
        match notary.recover().await {
            Ok(edge) => notary.warn_of_older_tiles(&edge),
            Err(Trouble::Overtaken) => {}
            Err(Trouble::Breach(breach)) => {
                notary.report(&breach);
                // Where it is not taken now, `run` goes on.
                notary.tell_breach(&breach).await;
            }
            Err(Trouble::Passing(reason)) => notary.tree.set(TreeCondition::Unknown(reason)),
            Err(Trouble::Fatal(error)) => return Err(error),
        }
        Ok(notary)
    }

    /// What is published, for those who read it.
    pub fn tree(&self) -> Arc<dyn PublishedTree> {
        self.tree.clone()
    }

    /// Signs what is appended, and compares the log with what was signed, until it is cancelled.
    /// What was read by then is signed first. A breach ends it, once that has been written into the
    /// folder.
    pub async fn run(self, cancel: CancellationToken) -> Result<(), NotaryError> {
        let breach = tokio::select! {
            ended = self.keep_signing(&cancel) => return ended,
            // Beside it: whatever interrupts the signing does not make it start over.
            breach = self.sweep() => breach,
        };
        self.report(&breach);
        self.end_with(breach, &cancel).await
    }

    /// Signs until it is cancelled or something is wrong for good.
    async fn keep_signing(&self, cancel: &CancellationToken) -> Result<(), NotaryError> {
        loop {
            if let Some(breach) = self.tree.breach() {
                return self.end_with(breach, cancel).await;
            }
            let Err(trouble) = self.follow(cancel).await else {
                return Ok(());
            };
            let wait = match trouble {
                Trouble::Breach(breach) => {
                    self.report(&breach);
                    continue;
                }
                Trouble::Fatal(error) => {
                    self.tree.set(TreeCondition::Unknown(with_causes(&error)));
                    return Err(error);
                }
                Trouble::Overtaken => {
                    tracing::info!("another notary signs as well; going on from what it signed");
                    self.options.max_delay
                }
                Trouble::Passing(reason) => {
                    tracing::warn!(reason, "nothing is signed for now");
                    self.tree.set(TreeCondition::Unknown(reason));
                    RETRY
                }
            };
            tokio::select! {
                () = cancel.cancelled() => return Ok(()),
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Ends once the folder has taken a breach: until then, processes that only see the folder append
    /// to a broken log.
    async fn end_with(
        &self,
        breach: Breach,
        cancel: &CancellationToken,
    ) -> Result<(), NotaryError> {
        while !self.tell_breach(&breach).await {
            tokio::select! {
                () = cancel.cancelled() => break,
                () = tokio::time::sleep(RETRY) => {}
            }
        }
        Err(NotaryError::Breach(breach))
    }

    /// Stops everything in this process.
    fn report(&self, breach: &Breach) {
        self.tree.set(TreeCondition::Broken(breach.clone()));
        let position = breach.position.map(|p| p.0);
        let Breach {
            code,
            message,
            remedy,
            ..
        } = breach;
        tracing::error!(
            code,
            position,
            message,
            remedy,
            "the log is not what was signed"
        );
    }

    /// Stops everything wherever the folder is read, and says whether the folder has taken it.
    async fn tell_breach(&self, breach: &Breach) -> bool {
        // Whoever was first found the cause, and when.
        if let Ok(Some(_)) = read_breach(&*self.storage).await {
            return true;
        }
        let told = write_breach(&*self.storage, breach).await;
        if let Err(error) = &told {
            let error = with_causes(error);
            tracing::error!(error, "other processes could not be told of the breach");
        }
        told.is_ok()
    }

    fn reader(&self, size: u64) -> TreeReader<'_> {
        TreeReader::new(&*self.storage, size)
    }

    /// Finds out where the last notary stopped, and that log and tiles are what was signed. Signs
    /// and publishes what the last one did not come to publish.
    async fn recover(&self) -> Result<Edge, Trouble> {
        let storage = &*self.storage;
        let published = self.published().await?;
        if let Some(published) = &published {
            // It was signed, whatever the log has become since.
            self.tree.publish(published.clone());
        }
        if let Some(breach) = read_breach(storage).await? {
            return Err(breach.into());
        }
        storage.tidy().await?;
        let newest = ClaimedHead::newest(storage).await?;
        let head = newest.map(|newest| newest.head);
        let head = head.or(published.as_ref().map(|p| p.head));
        let head = head.unwrap_or_else(|| TreeHead {
            size: 0,
            root: empty_root(),
        });
        if let Some(before) = self.signed_before()
            && head.size == 0
        {
            return Err(Trouble::Fatal(NotaryError::TreeMissing {
                origin: self.keys.origin().to_owned(),
                size: before.size,
            }));
        }
        let claimed = match newest {
            Some(newest) => newest,
            None => {
                let first = ClaimedHead { number: 1, head };
                self.check_tiles(&first).await?;
                if !first.claim(storage).await? {
                    return Err(Trouble::Overtaken);
                }
                first
            }
        };
        self.check_tiles(&claimed).await?;
        if let Some(published) = &published {
            self.check_published(&published.head, &claimed.head).await?;
        }
        self.check_signed_before(0, claimed.head.size).await?;
        let size = claimed.head.size;
        self.check_log(size).await?;
        let reader = self.reader(size);
        let of_tree = |error| judge_tree_error(error, None);
        if size > 0 {
            let last = (size - 1) / TILE_WIDTH;
            self.compare(size, || compare_bundle(&*self.log, &reader, last))
                .await?;
        }
        let growth = Growth::load(&reader).await.map_err(of_tree)?;
        let newest = growth.newest_leaf();
        self.publish_keys().await?;
        let note = self.sign(&claimed.head);
        self.keep(&claimed.head, &note).await;
        match published {
            Some(p) if p.head == claimed.head && p.note == note => self.tree.publish(p),
            _ => self.publish(claimed).await?,
        }
        self.tree.set(TreeCondition::Sound);
        Ok(Edge {
            claimed,
            growth,
            newest,
        })
    }

    /// What is published, if it is signed by keys that are known.
    async fn published(&self) -> Result<Option<SignedHead>, Trouble> {
        let read = self.storage.get(CHECKPOINT).await;
        let Some(note) = read.map_err(|e| Trouble::Passing(e.to_string()))? else {
            return Ok(None);
        };
        let keys = &self.keys;
        let opened = Checkpoint::open(&note, keys.origin(), keys.verifiers());
        let head = opened
            .map_err(|e| Trouble::Fatal(NotaryError::Keys(e)))?
            .head;
        Ok(Some(SignedHead {
            head,
            published_at: Timestamp::now(),
            note,
        }))
    }

    /// That the tiles have the root that is claimed.
    async fn check_tiles(&self, claimed: &ClaimedHead) -> Result<(), Trouble> {
        let TreeHead { size, root } = claimed.head;
        let found = self.reader(size).root().await;
        if found.map_err(|e| judge_tree_error(e, None))? != root {
            let what = format!("they do not lead to the signed root of size {size}");
            return Err(tree_damaged(None, what).into());
        }
        Ok(())
    }

    /// That what is published is the beginning of what is claimed.
    async fn check_published(&self, old: &TreeHead, new: &TreeHead) -> Result<(), Trouble> {
        if old.size > new.size {
            let what = format!(
                "the checkpoint is of {} events, and the newest head of {}: the folder was \
                 restored in part",
                old.size, new.size
            );
            return Err(tree_damaged(None, what).into());
        }
        let proof = self.reader(new.size).consistency(old.size).await;
        let proof = proof.map_err(|e| judge_tree_error(e, None))?;
        verify_consistency(old, new, &proof).map_err(|e| {
            tree_damaged(None, format!("the checkpoint is not a part of them: {e}"))
        })?;
        Ok(())
    }

    fn signed_before(&self) -> Option<TreeHead> {
        let before = self.signed_before.lock();
        *before.unwrap_or_else(PoisonError::into_inner)
    }

    /// That a tree of this size, which had the other one before, has the head that these keys are
    /// known to have signed.
    async fn check_signed_before(&self, old: u64, new: u64) -> Result<(), Trouble> {
        let Some(before) = self.signed_before() else {
            return Ok(());
        };
        if before.size <= old || before.size > new {
            return Ok(());
        }
        let reader = TreeReader::part_of(&*self.storage, before.size, new);
        let root = reader.root().await.map_err(|e| judge_tree_error(e, None))?;
        if root == before.root {
            return Ok(());
        }
        let what = format!(
            "these keys signed another tree of size {}, and never sign a second one",
            before.size
        );
        Err(tree_damaged(None, what).into())
    }

    /// Tiles from a backup may lack what was signed since. The log may have it still.
    fn warn_of_older_tiles(&self, edge: &Edge) {
        let size = edge.signed();
        if let Some(before) = self.signed_before()
            && before.size > size
        {
            tracing::warn!(
                size,
                signed = before.size,
                "the tiles are older than what these keys signed; it is signed again if the log has \
                 the same events"
            );
        }
    }

    /// Keeps a head beside the keys before it is published, once in a start: it says that there was
    /// a tree, where the tiles get lost.
    async fn keep(&self, head: &TreeHead, note: &bytes::Bytes) {
        let before = self.signed_before().map_or(0, |before| before.size);
        if head.size <= before || self.is_kept.swap(true, Ordering::Relaxed) {
            return;
        }
        let (keys, note) = (self.keys.clone(), note.clone());
        let kept = tokio::task::spawn_blocking(move || keys.keep_signed(&note)).await;
        let error = match kept {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(with_causes(&error)),
            Err(error) => Some(error.to_string()),
        };
        if let Some(error) = error {
            tracing::warn!(
                error,
                "it cannot be kept beside the keys what they signed: if the folder of tiles is \
                 lost, the next start does not notice"
            );
        }
        let mut before = self
            .signed_before
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *before = Some(*head);
    }

    /// That the log is the one that was signed, and has all that was signed.
    async fn check_log(&self, size: u64) -> Result<(), Trouble> {
        let read = |error| judge_read_error(error, size);
        let identity = self.log.info().await.map_err(read)?.identity;
        let history = LogHistory::read(&*self.storage).await?;
        match history.identity() {
            Some(bound) if bound != identity => {
                return Err(replaced(&identity, bound).into());
            }
            Some(_) => {}
            None => history.bind(&*self.storage, &identity, size).await?,
        }
        self.check_length(size).await
    }

    /// Compares with a log that is as long as it is to be: one that looks shorter is doubted first.
    async fn compare<C>(&self, size: u64, compare: impl Fn() -> C) -> Result<(), Trouble>
    where
        C: Future<Output = Result<(), Mismatch>>,
    {
        loop {
            match compare().await {
                Err(Mismatch::Short { .. }) => {
                    tokio::time::sleep(ASK_AGAIN).await;
                    self.check_length(size).await?;
                }
                compared => return Ok(compared?),
            }
        }
    }

    /// That the log reaches as far as it is to. One that does not is doubted at once, so that
    /// nobody appends to it, and broken if that lasts.
    async fn check_length(&self, size: u64) -> Result<(), Trouble> {
        let head = self.log.head().await;
        let head = head.map_err(|error| judge_read_error(error, size))?;
        if head.0 >= size {
            return Ok(());
        }
        let why = format!(
            "the log looks as if it ended at {head}, although {size} events were read of it; \
             appends wait until that is clear"
        );
        tracing::warn!(why, "the log is doubted");
        let before = self.tree.condition();
        self.tree.set(TreeCondition::Doubted(why.clone()));
        let mut tell = tokio::time::interval(RETRY);
        let mut settled = std::pin::pin!(self.settle(size, head));
        let settled = loop {
            tokio::select! {
                biased;
                // Before others believe that the notary died, also where the log does not answer.
                _ = tell.tick() => self.tell_doubt(&why).await,
                settled = &mut settled => break settled,
            }
        };
        if settled.is_ok() {
            self.tree.set(before);
        }
        // A breach takes the place of the doubt, with nothing in between that lets appends through.
        if !matches!(settled, Err(Trouble::Breach(_)))
            && let Err(error) = self.storage.remove(vec![DOUBT.to_owned()]).await
        {
            let error = with_causes(&error);
            tracing::warn!(error, "a doubt that is over is still in the folder");
        }
        settled
    }

    async fn tell_doubt(&self, why: &str) {
        let told = self.storage.replace(DOUBT, why.to_owned().into()).await;
        if let Err(error) = told {
            let error = with_causes(&error);
            tracing::warn!(error, "other processes could not be told of the doubt");
        }
    }

    /// Waits until a log that looked too short is as long as it is to be. That it is too short counts
    /// for as long as it says so without a pause: while it does not answer, a new leader is chosen.
    async fn settle(&self, size: u64, mut head: Position) -> Result<(), Trouble> {
        let began = Instant::now();
        let mut short_since = Some(began);
        loop {
            if short_since.is_some_and(|since| since.elapsed() >= self.options.settle) {
                return Err(truncated(head, size).into());
            }
            tokio::time::sleep(ASK_AGAIN).await;
            match self.log.head().await {
                Ok(now) if now.0 >= size => return Ok(()),
                Ok(now) => {
                    head = now;
                    short_since.get_or_insert_with(Instant::now);
                }
                Err(error) => match judge_read_error(error, size) {
                    Mismatch::Passing(_) if began.elapsed() < DOUBT_LASTS => short_since = None,
                    judged => return Err(judged.into()),
                },
            }
        }
    }

    /// Signs until something goes wrong or it is cancelled.
    async fn follow(&self, cancel: &CancellationToken) -> Result<(), Trouble> {
        let mut edge = self.recover().await?;
        let mut events = self.tail(&edge).await?;
        let mut due: Option<Instant> = None;
        let mut check = tokio::time::interval(self.options.check_every);
        check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = cancel.cancelled() => {
                    return if edge.pending() > 0 { self.commit(&mut edge).await } else { Ok(()) };
                }
                _ = check.tick() => self.check(&edge).await?,
                () = until(due) => {
                    self.commit(&mut edge).await?;
                    due = None;
                }
                event = events.next() => {
                    match event {
                        Some(Ok(event)) => add(&mut edge, event.position, event_entry(event.position, &event.bytes))?,
                        Some(Err(ReadError::Missing { position })) if position.0 == edge.growth.size() + 1 => {
                            self.add_gap(&mut edge, position).await?;
                            events = self.tail(&edge).await?;
                        }
                        Some(Err(error)) => return Err(self.judge(error, &edge).await),
                        None => return Err(Trouble::Passing("the log closed".to_owned())),
                    }
                    due.get_or_insert_with(|| Instant::now() + self.options.max_delay);
                    if edge.pending() >= self.options.max_events {
                        take_what_is_there(&mut edge, &mut events)?;
                        self.commit(&mut edge).await?;
                        due = None;
                    }
                }
            }
        }
    }

    async fn tail(&self, edge: &Edge) -> Result<EventStream, Trouble> {
        let after = Position(edge.growth.size());
        let tail = self.log.tail(after, SubjectFilter::default()).await;
        tail.map_err(|error| judge_read_error(error, edge.signed()).into())
    }

    /// What an error in the middle of the log means. That it is too short says more than that
    /// something cannot be read.
    async fn judge(&self, error: ReadError, edge: &Edge) -> Trouble {
        if let ReadError::Damaged { .. } = &error
            && let Err(trouble) = self.check_log(edge.signed()).await
        {
            return trouble;
        }
        judge_read_error(error, edge.signed()).into()
    }

    /// Records that the log has nothing at a position that it has gone past.
    async fn add_gap(&self, edge: &mut Edge, position: Position) -> Result<(), Trouble> {
        let signed = edge.signed();
        let head = self.log.head().await;
        let past = head.map_err(|e| judge_read_error(e, signed))? > position;
        match self.log.get(position).await {
            Ok(None) | Err(ReadError::Missing { .. }) if past => {}
            // It is there after all, or may be soon: the tail is opened again.
            Ok(_) | Err(ReadError::Missing { .. }) => return Ok(()),
            Err(error) => return Err(judge_read_error(error, signed).into()),
        }
        tracing::error!(
            position = position.0,
            "the log lost an event before it was signed; the gap is recorded in the tree"
        );
        add(edge, position, gap_entry(position))
    }

    /// Stores, claims, signs and publishes what was added.
    async fn commit(&self, edge: &mut Edge) -> Result<(), Trouble> {
        let head = edge.growth.head();
        self.check_length(head.size).await?;
        if let Some(breach) = self.tree.breach() {
            return Err(breach.into());
        }
        let files = edge.growth.files();
        let files = files.map_err(|e| Trouble::Fatal(NotaryError::Entry(e.to_string())))?;
        let newest = edge.growth.newest_leaf();
        let named = |(path, bytes): (TilePath, _)| (path.to_string(), bytes);
        daybook_failpoints::reached("checkpoint.before");
        let stored = self
            .storage
            .put(files.into_iter().map(named).collect())
            .await;
        stored.map_err(|error| self.judge_storage_error(error, edge.signed()))?;
        let claimed = ClaimedHead {
            number: edge.claimed.number + 1,
            head,
        };
        self.check_signed_before(edge.signed(), head.size).await?;
        daybook_failpoints::reached("checkpoint.stored");
        if !claimed.claim(&*self.storage).await? {
            return Err(Trouble::Overtaken);
        }
        daybook_failpoints::reached("checkpoint.claimed");
        self.publish(claimed).await?;
        daybook_failpoints::reached("checkpoint.after");
        self.tree.set(TreeCondition::Sound);
        edge.claimed = claimed;
        edge.newest = newest;
        // Each partial tile was there until now, when the full one is published.
        let full = edge.growth.stored();
        let partials = full.iter().map(TilePath::partials).collect();
        self.storage.remove(partials).await?;
        claimed.collect(&*self.storage).await?;
        Ok(())
    }

    /// Tiles that are there with other bytes were written for other events, by a notary that died
    /// before it signed them: the log had them, and has others now.
    fn judge_storage_error(&self, error: StorageError, signed: u64) -> Trouble {
        match error {
            StorageError::Differs { path } => unsigned_differs(&path, signed).into(),
            passing => passing.into(),
        }
    }

    fn sign(&self, head: &TreeHead) -> bytes::Bytes {
        let checkpoint = Checkpoint {
            origin: self.keys.origin().to_owned(),
            head: *head,
            extensions: Vec::new(),
        };
        checkpoint.sign(self.keys.signers())
    }

    /// Publishes a claimed head, and then, for as long as another notary has gone further in the
    /// meantime, what that one claimed: the last to publish never leaves an old one there.
    async fn publish(&self, mut claimed: ClaimedHead) -> Result<(), Trouble> {
        loop {
            let note = self.sign(&claimed.head);
            self.keep(&claimed.head, &note).await;
            self.storage.replace(CHECKPOINT, note.clone()).await?;
            self.tree.publish(SignedHead {
                head: claimed.head,
                published_at: Timestamp::now(),
                note,
            });
            match ClaimedHead::newest(&*self.storage).await? {
                Some(newest) if newest.number > claimed.number => {
                    self.check_tiles(&newest).await?;
                    self.check_published(&claimed.head, &newest.head).await?;
                    claimed = newest;
                }
                _ => return Ok(()),
            }
        }
    }

    async fn publish_keys(&self) -> Result<(), Trouble> {
        let text = self.keys.public_text();
        let there = self.storage.get(KEYS).await;
        let there = there.map_err(|e| Trouble::Passing(e.to_string()))?;
        if there.as_deref() != Some(text.as_bytes()) {
            self.storage.replace(KEYS, text.into()).await?;
        }
        Ok(())
    }

    /// The frequent comparison: identity, length and newest event.
    async fn check(&self, edge: &Edge) -> Result<(), Trouble> {
        let size = edge.signed();
        self.check_length(size).await?;
        if let Some(newest) = &edge.newest {
            let newest = || compare_event(&*self.log, Position(size), newest, size);
            self.compare(size, newest).await?;
        }
        // That another process found something stops this one, too.
        if let Some(breach) = read_breach(&*self.storage).await? {
            return Err(breach.into());
        }
        self.storage
            .replace(ALIVE, Timestamp::now().to_string().into())
            .await?;
        Ok(())
    }

    /// The slow comparison: every event, entry and tile, over and over. Ends with a breach.
    async fn sweep(&self) -> Breach {
        let rate = self.options.sweep_rate.max(1);
        let pause = Duration::from_secs(1).mul_f64(TILE_WIDTH as f64 / f64::from(rate));
        let (mut index, mut tries) = (0, 0);
        let mut left_out = BTreeSet::new();
        loop {
            tokio::time::sleep(pause).await;
            let size = self.tree.head().map_or(0, |signed| signed.head.size);
            if size == 0 {
                continue;
            }
            if index >= size.div_ceil(TILE_WIDTH) {
                index = 0;
            }
            match compare_bundle(&*self.log, &self.reader(size), index).await {
                Ok(()) => {
                    if left_out.remove(&index) {
                        tracing::info!(index, "what could not be compared was compared again");
                    }
                }
                Err(Mismatch::Breach(breach)) => return breach,
                // How long the log is, is looked at every second.
                Err(Mismatch::Short { .. }) => continue,
                Err(Mismatch::Passing(reason)) => {
                    tries += 1;
                    // A log that does not answer at all is waited for.
                    if tries < SWEEP_TRIES || self.log.head().await.is_err() {
                        tracing::debug!(reason, index, "not compared now");
                        continue;
                    }
                    if left_out.insert(index) {
                        tracing::warn!(
                            reason,
                            index,
                            "256 events cannot be compared with what was signed; the next round \
                             tries them again"
                        );
                    }
                }
            }
            (index, tries) = (index + 1, 0);
        }
    }
}

/// The head that is kept beside the keys.
fn signed_before(keys: &KeyRing) -> Result<Option<TreeHead>, NotaryError> {
    let Some((path, note)) = keys.signed().map_err(NotaryError::KeyFile)? else {
        return Ok(None);
    };
    match Checkpoint::open(&note, keys.origin(), keys.verifiers()) {
        Ok(checkpoint) => Ok(Some(checkpoint.head)),
        Err(source) => Err(NotaryError::Signed { path, source }),
    }
}

fn add(edge: &mut Edge, position: Position, entry: bytes::Bytes) -> Result<(), Trouble> {
    if position.0 != edge.growth.size() + 1 {
        let at = edge.growth.size() + 1;
        return Err(Trouble::Passing(format!(
            "the log delivered {position} and not {at}"
        )));
    }
    let added = edge.growth.push(entry);
    added.map_err(|e| Trouble::Fatal(NotaryError::Entry(e.to_string())))
}

/// Adds further events that need not be waited for.
fn take_what_is_there(edge: &mut Edge, events: &mut EventStream) -> Result<(), Trouble> {
    let mut bytes = 0;
    while bytes < ROUND_BYTES {
        // An error comes again when the tail is asked next, or with the next round.
        let Some(Some(Ok(event))) = events.next().now_or_never() else {
            return Ok(());
        };
        bytes += event.bytes.len();
        add(
            edge,
            event.position,
            event_entry(event.position, &event.bytes),
        )?;
    }
    Ok(())
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}
