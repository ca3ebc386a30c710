//! Reading a tree on as many cores as there are: one thread reads files in order, some hash and
//! skim them, and the caller gets the outcome in order again. What is on its way is bounded by
//! bytes, however large the ledger is.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Condvar, Mutex, PoisonError};

use daybook_events::Position;
use daybook_store::tlog::{Hash, TILE_WIDTH, TileKind, TilePath, entry_places, leaf_hash};

use crate::archive::Stop;
use crate::entry::Checks;
use crate::finding::{Finding, Findings, Kind, Place};
use crate::layout::TreeFiles;
use crate::manifest::Listed;
use crate::shares::Skimmed;
use crate::source::{Found, Source};
use crate::tree::root_over;

/// Bytes of files that are on their way at once. What is parsed of them takes about as much again.
const BYTES_ON_THE_WAY: usize = 16 << 20;
const FILES_ON_THE_WAY: usize = 64;

/// So many files in a row may be missing. A tree may claim more of them than anybody can miss one by
/// one.
const MISSING: usize = 256;

/// A bundle with the tile over it, as they were read.
#[derive(Debug)]
pub(crate) struct Read {
    entries: Option<Found>,
    tile: Option<Found>,
    index: u64,
    width: usize,
}

/// A bundle with the tile over it, hashed and skimmed.
#[derive(Debug)]
pub(crate) struct Bundle {
    /// Where it was found.
    pub(crate) place: Place,
    pub(crate) width: usize,
    /// The root over the entries; none if they could not be read.
    pub(crate) by_entries: Option<Hash>,
    /// The root over the hashes of the tile; none if it could not be read.
    pub(crate) by_tile: Option<Hash>,
    /// The roots over the first leaves, as far as an old tree had them: by the entries, and by the
    /// hashes of the tile, as far as they can be read.
    pub(crate) prefixes: Vec<(usize, Roots)>,
    /// The entries; none if they could not be read, or nobody wants to know.
    pub(crate) skimmed: Skimmed,
    /// Entries that are not what the tile says.
    pub(crate) suspects: Vec<Suspect>,
    pub(crate) findings: Findings,
}

/// The roots over the same leaves, by what they are computed from; none where that cannot be read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Roots {
    pub(crate) by_entries: Option<Hash>,
    /// By the hashes of the tiles, and by the entries where there is no tile.
    pub(crate) by_tiles: Option<Hash>,
}

/// An entry that is not what the tile over it says: one of the two was changed.
#[derive(Debug)]
pub(crate) struct Suspect {
    pub(crate) entry: Place,
    pub(crate) tile: Place,
}

/// One step of reading a tree.
#[derive(Debug)]
pub(crate) enum Step {
    /// A bundle.
    Bundle(Box<Bundle>),
    /// A tile above the leaves; none if it is missing.
    Tile(TilePath, Option<Found>),
}

enum Job {
    Bundle(Box<Read>),
    Tile(TilePath, Option<Found>),
}

/// What reading came to.
pub(crate) struct Ended {
    pub(crate) source: Source,
    pub(crate) findings: Findings,
    /// The tiles that there were, in order.
    pub(crate) listed: Vec<Listed>,
    /// Why it ended early, if it did.
    pub(crate) stop: Option<Stop>,
}

/// How a tree is read.
pub(crate) struct Plan<'a> {
    pub(crate) size: u64,
    /// Sizes of older trees, whose roots are wanted.
    pub(crate) older: &'a [u64],
    pub(crate) checks: &'a Checks,
    /// Whether events are parsed.
    pub(crate) parse: bool,
    /// Whether the digests of files are computed too.
    pub(crate) digests: bool,
    pub(crate) threads: usize,
    pub(crate) stop: &'a AtomicBool,
}

/// A bound on what is on its way. Once it is reached, half of it has to arrive before more is sent:
/// who is woken for each file does little else.
#[derive(Debug, Default)]
struct Budget {
    taken: Mutex<Taken>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Taken {
    bytes: usize,
    files: usize,
    /// How many bytes somebody waits for.
    wanted: Option<usize>,
    /// Nobody has to wait any more.
    over: bool,
}

impl Taken {
    fn has_room(&self, bytes: usize, part: usize) -> bool {
        let fits = self.bytes + bytes <= BYTES_ON_THE_WAY && self.bytes <= BYTES_ON_THE_WAY / part;
        self.over || self.files == 0 || (fits && self.files < FILES_ON_THE_WAY / part)
    }
}

impl Budget {
    fn take(&self, bytes: usize) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if !taken.has_room(bytes, 1) {
            taken.wanted = Some(bytes);
            let waited = self.changed.wait_while(taken, |t| t.wanted.is_some());
            taken = waited.unwrap_or_else(PoisonError::into_inner);
        }
        taken.bytes += bytes;
        taken.files += 1;
    }

    fn give(&self, bytes: usize) {
        self.change(|taken| {
            taken.bytes = taken.bytes.saturating_sub(bytes);
            taken.files = taken.files.saturating_sub(1);
        });
    }

    fn end(&self) {
        self.change(|taken| taken.over = true);
    }

    fn change(&self, change: impl FnOnce(&mut Taken)) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut taken);
        if taken.wanted.is_some_and(|bytes| taken.has_room(bytes, 2)) {
            taken.wanted = None;
            self.changed.notify_all();
        }
    }
}

/// The end of the walk, also of one that panics, and of a thread that hashes, whose step would never
/// come: whoever still sends finds nobody, and ends; whoever waits for room gets it.
struct Ending<'a> {
    budget: &'a Budget,
    gone: &'a AtomicBool,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::Relaxed);
        self.budget.end();
    }
}

/// Reads all of a tree. `each` gets every step in order, and ends the reading by returning false.
pub(crate) fn read(source: Source, plan: &Plan<'_>, each: impl FnMut(Step) -> bool) -> Ended {
    read_with(source, plan, |read| hash(plan, read), each)
}

/// The same, where bundles are hashed so. A panic in it ends the reading, and is passed on.
fn read_with(
    source: Source,
    plan: &Plan<'_>,
    hash: impl Fn(Read) -> Bundle + Sync,
    mut each: impl FnMut(Step) -> bool,
) -> Ended {
    let budget = Budget::default();
    let gone = AtomicBool::new(false);
    let (jobs, waiting) = sync_channel::<(u64, usize, Job)>(FILES_ON_THE_WAY + 8);
    let (done, results) = sync_channel::<(u64, usize, Step)>(FILES_ON_THE_WAY);
    let waiting = Mutex::new(waiting);
    std::thread::scope(|scope| {
        let (budget, gone) = (&budget, &gone);
        let end = Ending { budget, gone };
        let reader = scope.spawn(move || read_files(source, plan, budget, gone, &jobs));
        for _ in 0..plan.threads.max(1) {
            let (waiting, done, hash) = (&waiting, done.clone(), &hash);
            scope.spawn(move || {
                let _end = Ending { budget, gone };
                work(hash, waiting, &done);
            });
        }
        drop(done);
        let mut early: BTreeMap<u64, (usize, Step)> = BTreeMap::new();
        let mut due = 0;
        'all: for (number, bytes, step) in results.iter() {
            early.insert(number, (bytes, step));
            while let Some((bytes, step)) = early.remove(&due) {
                due += 1;
                let wanted = each(step);
                budget.give(bytes);
                if !wanted {
                    break 'all;
                }
            }
        }
        drop(results);
        drop(end);
        reader
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn read_files(
    mut source: Source,
    plan: &Plan<'_>,
    budget: &Budget,
    gone: &AtomicBool,
    jobs: &SyncSender<(u64, usize, Job)>,
) -> Ended {
    let mut findings = Findings::default();
    let mut listed = Vec::new();
    let mut stop = None;
    let mut number = 0;
    let mut missing = 0;
    let mut bundle: Option<Box<Read>> = None;
    for path in TreeFiles::new(plan.size) {
        if gone.load(Ordering::Relaxed) || plan.stop.load(Ordering::Relaxed) {
            break;
        }
        let found = match source.tile(path, plan.size, &mut findings) {
            Ok(found) => found,
            Err(why) => {
                stop = Some(why);
                break;
            }
        };
        missing = if found.is_some() { 0 } else { missing + 1 };
        if missing == MISSING {
            let message = format!(
                "it and {} before it are missing: the rest was not looked for",
                MISSING - 1
            );
            let place = Place::file(path.to_string());
            stop = Some(Stop::Broken(Box::new(Finding::new(
                Kind::FileMissing,
                place,
                message,
            ))));
            break;
        }
        if let Some(found) = &found {
            listed.push(Listed {
                name: path.to_string(),
                len: found.bytes.len() as u64,
                sha256: plan.digests.then(|| {
                    use sha2::Digest;
                    sha2::Sha256::digest(&found.bytes).into()
                }),
            });
        }
        let job = match (path.kind, bundle.take()) {
            (TileKind::Entries, _) => {
                bundle = Some(Box::new(Read {
                    entries: found,
                    tile: None,
                    index: path.index,
                    width: path.width(),
                }));
                continue;
            }
            (_, Some(mut read)) => {
                read.tile = found;
                Job::Bundle(read)
            }
            (_, None) => Job::Tile(path, found),
        };
        let bytes = match &job {
            Job::Bundle(read) => read.entries.as_ref().map_or(0, |f| f.bytes.len()),
            Job::Tile(_, found) => found.as_ref().map_or(0, |f| f.bytes.len()),
        };
        budget.take(bytes);
        if jobs.send((number, bytes, job)).is_err() {
            break;
        }
        number += 1;
    }
    Ended {
        source,
        findings,
        listed,
        stop,
    }
}

fn work(
    hash: &impl Fn(Read) -> Bundle,
    waiting: &Mutex<Receiver<(u64, usize, Job)>>,
    done: &SyncSender<(u64, usize, Step)>,
) {
    loop {
        let job = waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .recv();
        let Ok((number, bytes, job)) = job else {
            return;
        };
        let step = match job {
            Job::Bundle(read) => Step::Bundle(Box::new(hash(*read))),
            Job::Tile(path, found) => Step::Tile(path, found),
        };
        if done.send((number, bytes, step)).is_err() {
            return;
        }
    }
}

/// Hashes a bundle, compares it with the tile over it, and skims its entries.
fn hash(plan: &Plan<'_>, read: Read) -> Bundle {
    let Read { index, width, .. } = read;
    let mut findings = Findings::default();
    let first = index * TILE_WIDTH;
    let entries = read.entries.as_ref().and_then(|found| {
        entry_places(&found.bytes, width)
            .inspect_err(|e| {
                findings.push(Kind::BundleMalformed, found.place(), e.to_string());
            })
            .ok()
    });
    let tile = read.tile.as_ref().and_then(|found| {
        let (hashes, rest) = found.bytes.as_chunks::<32>();
        if hashes.len() == width && rest.is_empty() {
            return Some(hashes);
        }
        let message = format!("it has {} bytes and not {}", found.bytes.len(), 32 * width);
        findings.push(Kind::TileDiffers, found.place(), message);
        None
    });
    let bytes = read.entries.as_ref().map(|found| found.bytes.clone());
    let bytes = bytes.unwrap_or_default();
    let leaves: Option<Vec<Hash>> = entries.as_ref().map(|entries| {
        let hash = |place: &Range<usize>| leaf_hash(&bytes[place.clone()]);
        entries.iter().map(hash).collect()
    });
    let by_entries = leaves.as_deref().and_then(root_over);
    let same = leaves.as_deref() == tile;
    let by_tile = if same {
        by_entries
    } else {
        tile.and_then(root_over)
    };

    let mut suspects = Vec::new();
    if let (false, Some(leaves), Some(tile)) = (same, &leaves, tile) {
        let places = read.entries.as_ref().map(Found::place).unwrap_or_default();
        let tile_place = read.tile.as_ref().map(Found::place).unwrap_or_default();
        for (number, _) in leaves
            .iter()
            .zip(tile)
            .enumerate()
            .filter(|(_, (leaf, hash))| leaf != hash)
        {
            let entry = entries.as_ref().and_then(|e| e.get(number));
            let entry = entry.cloned().unwrap_or_default();
            let position = Position(first + number as u64 + 1);
            suspects.push(suspect(&places, &tile_place, &bytes, entry, position));
        }
    }
    let mut prefixes = Vec::new();
    for size in plan.older {
        let width_then = (size % TILE_WIDTH) as usize;
        let here = size / TILE_WIDTH == index && width_then > 0;
        if here {
            let root = |leaves: &[Hash]| leaves.get(..width_then).and_then(root_over);
            let by_entries = leaves.as_deref().and_then(root);
            let by_tiles = tile.and_then(root).or(by_entries);
            let roots = Roots {
                by_entries,
                by_tiles,
            };
            prefixes.push((width_then, roots));
        }
    }
    let parsed = match entries {
        Some(entries) if plan.parse => (first + 1..)
            .zip(entries)
            .map(|(position, place)| plan.checks.skim(Position(position), &bytes, place))
            .collect(),
        _ => Vec::new(),
    };
    Bundle {
        place: read.entries.as_ref().map(Found::place).unwrap_or_default(),
        width,
        by_entries,
        by_tile,
        prefixes,
        skimmed: Skimmed::new(parsed, bytes),
        suspects,
        findings,
    }
}

/// The entry at a position, which is at `entry` in its bundle, is not what its hash in the tile
/// says.
fn suspect(
    bundle: &Place,
    tile: &Place,
    bytes: &[u8],
    entry: Range<usize>,
    position: Position,
) -> Suspect {
    let number = (position.0 - 1) % TILE_WIDTH;
    let event = daybook_events::Event::from_bytes(&bytes[entry.clone()]).ok();
    let at = |place: &Place, offset: u64| Place {
        file_offset: Some(offset),
        archive_offset: place.archive_offset.map(|at| at + offset),
        entry: u16::try_from(number).ok(),
        position: Some(position),
        ..place.clone()
    };
    Suspect {
        entry: Place {
            event: event.map(|e| e.id),
            // With its length, which comes before it.
            ..at(bundle, entry.start.saturating_sub(2) as u64)
        },
        tile: at(tile, 32 * number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_room_goes_on_when_half_of_it_is_there() {
        let mut taken = Taken::default();
        assert!(taken.has_room(2 * BYTES_ON_THE_WAY, 1), "a first one");
        taken.files = FILES_ON_THE_WAY - 1;
        assert!(taken.has_room(1, 1));
        taken.files += 1;
        assert!(!taken.has_room(1, 1));
        taken.files = FILES_ON_THE_WAY / 2;
        assert!(taken.has_room(1, 1) && !taken.has_room(1, 2));
        taken.files -= 1;
        assert!(taken.has_room(1, 2));
        taken.bytes = BYTES_ON_THE_WAY / 2;
        assert!(taken.has_room(BYTES_ON_THE_WAY / 2, 2));
        assert!(!taken.has_room(BYTES_ON_THE_WAY / 2 + 1, 1));
        taken.bytes += 1;
        assert!(taken.has_room(1, 1) && !taken.has_room(1, 2));
        taken.over = true;
        assert!(taken.has_room(BYTES_ON_THE_WAY, 2));
    }

    #[test]
    fn nobody_waits_for_a_thread_that_panicked() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(crate::source::CHECKPOINT), "none").unwrap();
        let source = Source::open(folder.path()).unwrap();
        let (ended, outcome) = sync_channel(1);
        let reading = std::thread::spawn(move || {
            let checks = crate::fold::tests::checks(true);
            let stop = AtomicBool::new(false);
            let plan = Plan {
                size: 10 * FILES_ON_THE_WAY as u64 * TILE_WIDTH,
                older: &[],
                checks: &checks,
                parse: false,
                digests: false,
                threads: 2,
                stop: &stop,
            };
            let mut steps = 0;
            let panics = |read: Read| {
                assert_ne!(read.index, 3, "a panic, for the test");
                hash(&plan, read)
            };
            let read = || {
                read_with(source, &plan, panics, |_| {
                    steps += 1;
                    true
                })
            };
            let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)).is_err();
            ended.send((panicked, steps)).unwrap();
        });
        let deadline = std::time::Duration::from_secs(60);
        assert_eq!(outcome.recv_timeout(deadline), Ok((true, 3)));
        reading.join().unwrap();
    }

    #[test]
    fn nobody_waits_for_ever() {
        let fill = |budget: &Budget| (0..FILES_ON_THE_WAY).for_each(|_| budget.take(1));
        let given = Budget::default();
        let over = Budget::default();
        fill(&given);
        fill(&over);
        std::thread::scope(|scope| {
            scope.spawn(|| given.take(BYTES_ON_THE_WAY));
            scope.spawn(|| over.take(1));
            (0..FILES_ON_THE_WAY).for_each(|_| given.give(1));
            over.end();
        });
        let [given, over] = [given, over].map(|b| b.taken.into_inner().unwrap());
        assert_eq!((given.files, given.bytes), (1, BYTES_ON_THE_WAY));
        assert_eq!(over.files, FILES_ON_THE_WAY + 1);
    }
}
