//! Finding the events about one deployment in a ledger.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use aho_corasick::AhoCorasick;
use bytes::Bytes;
use daybook_events::deployment::DeploymentEvent;
use daybook_events::gitops::{Change, GitopsEvent};
use daybook_events::{DeploymentId, Event, Position};
use daybook_store::tlog::{Checkpoint, ReadTiles, TILE_WIDTH, TreeReader};

use crate::receipt::{MAX_EVENTS, ReceiptError};
use crate::source::CHECKPOINT;

/// Where the events about a deployment are looked for.
#[derive(Debug, Clone, Default)]
pub enum Look {
    /// In the whole ledger.
    #[default]
    Everywhere,
    /// At these positions only, because somebody says that the events are there. Those that are
    /// about something else are passed over all the same.
    At(BTreeSet<Position>),
}

/// Events by their positions.
pub(crate) type Events = BTreeMap<Position, Bytes>;

/// Which events are about a deployment: its own, those of its build that say what was built and
/// pushed, the commits about it, and the switches of traffic to it and away from it.
#[derive(Debug)]
struct About {
    deployment: DeploymentId,
    id: String,
    /// Its builds, and whether the first event of each was seen.
    builds: BTreeMap<String, bool>,
}

impl About {
    fn of(deployment: DeploymentId) -> Self {
        Self {
            deployment,
            id: deployment.to_string(),
            builds: BTreeMap::new(),
        }
    }

    fn has(&mut self, event: &Event) -> bool {
        let mut tokens = event.subject.split('/').skip(2);
        let (aggregate, id) = (tokens.next(), tokens.next());
        match aggregate {
            Some("deployment") if id == Some(self.id.as_str()) => {
                if let Ok(DeploymentEvent::SourceResolved(e)) = event.payload() {
                    self.builds.entry(e.build.to_string()).or_default();
                }
                true
            }
            Some("build") => {
                let Some(begun) = id.and_then(|id| self.builds.get_mut(id)) else {
                    return false;
                };
                *begun |= event.revision == 1;
                true
            }
            Some("gitops") => match event.payload() {
                Ok(GitopsEvent::Committed(e)) => match e.change {
                    Change::Deploy { deployment, .. }
                    | Change::Scale { deployment, .. }
                    | Change::Remove { deployment, .. } => deployment == self.deployment,
                    _ => false,
                },
                _ => false,
            },
            Some("routing") => event.data.get().contains(&self.id),
            // Of a newer version, and about the same run: an approval, perhaps.
            _ => event.correlationid == self.deployment.0,
        }
    }

    /// What an event that is about the deployment has in its bytes.
    fn marks(&self) -> io::Result<AhoCorasick> {
        let builds = self.builds.keys().map(String::as_str);
        any_of(builds.chain([self.id.as_str()]))
    }
}

fn any_of<'a>(texts: impl Iterator<Item = &'a str>) -> io::Result<AhoCorasick> {
    AhoCorasick::new(texts).map_err(io::Error::other)
}

/// The entries of a bundle with their positions.
async fn bundle(
    tree: &TreeReader<'_>,
    number: u64,
) -> Result<impl DoubleEndedIterator<Item = (Position, Bytes)>, ReceiptError> {
    let entries = tree.entries(number).await?;
    let positions = (number * TILE_WIDTH + 1..).map(Position);
    let all: Vec<_> = positions.zip(entries).collect();
    Ok(all.into_iter())
}

/// Finds the events about a deployment.
pub(crate) async fn events_of(
    tree: &TreeReader<'_>,
    deployment: DeploymentId,
    look: &Look,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<Events, ReceiptError> {
    let mut about = About::of(deployment);
    let found = match look {
        Look::Everywhere => everywhere(tree, &mut about, progress).await?,
        Look::At(positions) => at(tree, &mut about, positions).await?,
    };
    if found.is_empty() {
        return Err(ReceiptError::NotFound {
            deployment: about.id,
            size: tree.size(),
        });
    }
    Ok(found)
}

/// Looks at these positions, as far as they are signed.
async fn at(
    tree: &TreeReader<'_>,
    about: &mut About,
    positions: &BTreeSet<Position>,
) -> Result<Events, ReceiptError> {
    let mut candidates = Events::new();
    let mut read = None;
    if tree.size() == 0 {
        return Ok(candidates);
    }
    for position in positions.range(Position(1)..=Position(tree.size())) {
        let number = (position.0 - 1) / TILE_WIDTH;
        if read != Some(number) {
            read = Some(number);
            let entries = bundle(tree, number).await?;
            candidates.extend(entries.filter(|(position, _)| positions.contains(position)));
        }
    }
    // A build that is shared may stand before what says whose it is.
    let mut found = Events::new();
    for _ in 0..2 {
        for (position, entry) in &candidates {
            if let Ok(event) = Event::from_bytes(entry)
                && about.has(&event)
                && found.len() < MAX_EVENTS
            {
                found.insert(*position, entry.clone());
            }
        }
    }
    Ok(found)
}

/// Walks from the first entry to the last, as traffic can switch away from a deployment late, and
/// then back as far as there are builds that are older than what says whose they are.
async fn everywhere(
    tree: &TreeReader<'_>,
    about: &mut About,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<Events, ReceiptError> {
    let size = tree.size();
    let mut found = Events::new();
    let mut marks = about.marks()?;
    for number in 0..size.div_ceil(TILE_WIDTH) {
        for (position, entry) in bundle(tree, number).await? {
            if !marks.is_match(&entry) || found.len() == MAX_EVENTS {
                continue;
            }
            let builds = about.builds.len();
            if let Ok(event) = Event::from_bytes(&entry)
                && about.has(&event)
            {
                found.insert(position, entry);
            }
            if about.builds.len() > builds {
                marks = about.marks()?;
            }
        }
        progress(((number + 1) * TILE_WIDTH).min(size), size);
    }
    let Some(last) = found.keys().next_back().map(|p| (p.0 - 1) / TILE_WIDTH) else {
        return Ok(found);
    };
    for number in (0..=last).rev() {
        if about.builds.values().all(|begun| *begun) {
            break;
        }
        for (position, entry) in bundle(tree, number).await?.rev() {
            if found.contains_key(&position) || found.len() == MAX_EVENTS || !marks.is_match(&entry)
            {
                continue;
            }
            if let Ok(event) = Event::from_bytes(&entry)
                && about.has(&event)
            {
                found.insert(position, entry);
            }
        }
    }
    Ok(found)
}

/// The deployment whose id this is, or the beginning or the end of it, in a ledger as it was
/// signed last.
pub async fn named(
    tiles: &dyn ReadTiles,
    part: &str,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<DeploymentId, ReceiptError> {
    let part = part.to_ascii_lowercase();
    if let Ok(id) = part.parse() {
        return Ok(id);
    }
    let note = tiles.get(CHECKPOINT).await?;
    let note = note.ok_or(ReceiptError::NothingSigned)?;
    let size = Checkpoint::parse_unverified(&note)?.0.head.size;
    let tree = TreeReader::new(tiles, size);
    let requests = any_of([r#"dev.daybook.deployment.requested."#].into_iter())?;
    let mut found = BTreeSet::new();
    for number in 0..size.div_ceil(TILE_WIDTH) {
        for (_, entry) in bundle(&tree, number).await? {
            if !requests.is_match(&entry) {
                continue;
            }
            let Ok(event) = Event::from_bytes(&entry) else {
                continue;
            };
            let mut tokens = event.subject.split('/').skip(2);
            if let (Some("deployment"), Some(id)) = (tokens.next(), tokens.next())
                && (id.starts_with(&part) || id.ends_with(&part))
                && let Ok(id) = id.parse::<DeploymentId>()
            {
                found.insert(id);
            }
        }
        progress(((number + 1) * TILE_WIDTH).min(size), size);
        if found.len() > 1 {
            let found = found.into_iter().collect();
            return Err(ReceiptError::Ambiguous { part, found });
        }
    }
    found.into_iter().next().ok_or(ReceiptError::NotFound {
        deployment: part,
        size,
    })
}
