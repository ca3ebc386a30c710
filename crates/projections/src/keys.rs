//! Keys of the rows. One table holds all of them; the first byte says what a row is.
//!
//! Names hold only lowercase letters, digits and hyphens, so that a zero byte or a dot after one
//! ends it: no key of one project is ever a prefix of another's. Positions are big-endian, so
//! that the order of keys is the order of the log.

use daybook_events::{
    AggregateKind, BuildId, DeploymentId, EnvironmentName, EventId, InstanceRef, Position,
    ProjectName, Subject, SubscriptionId,
};
use jiff::Timestamp;

/// Which version of this layout a store holds.
pub(crate) const FORMAT: &[u8] = b"mformat";
/// The log that a store was folded from.
pub(crate) const IDENTITY: &[u8] = b"midentity";
/// How far the rows will be, written before them: as [`CHECKPOINT`], unless writing them was
/// interrupted.
pub(crate) const BEGUN: &[u8] = b"mbegun";
/// How far the rows are, with the counters.
pub(crate) const CHECKPOINT: &[u8] = b"c";

/// The sum over all states.
pub(crate) const SUM: &[u8] = b"L";

/// What the rows of all timers start with.
pub(crate) const TIMERS: &[u8] = b"t";

/// From how many positions to the next the sum over all states is kept. Half as many events at most
/// are looked at for a state hash of the past; at each mark the elements of all aggregates that
/// changed since the last one are made anew.
pub(crate) const MARK: u64 = 1024;

/// From how many positions to the next, at least, the active deployments are written down.
pub(crate) const LISTED: u64 = 4096;

/// How many events one full row of the audit holds. sled rewrites sixteen neighbouring rows at a
/// time, and puts what is then larger than 128 KiB into a file of its own.
pub(crate) const CHUNK: u64 = 32;

/// How many chunks share one row of terms.
pub(crate) const BLOCK: u64 = 32;

fn kind_letter(kind: AggregateKind) -> u8 {
    match kind {
        AggregateKind::Project => b'p',
        AggregateKind::Environment => b'e',
        AggregateKind::Build => b'b',
        AggregateKind::Deployment => b'd',
        AggregateKind::Gitops => b'g',
        AggregateKind::Routing => b'r',
        AggregateKind::Domain => b'n',
        AggregateKind::Subscription => b'w',
        AggregateKind::Ledger => b'l',
        AggregateKind::Access => b'a',
    }
}

/// The folded state of an aggregate; none for one of a newer version, which has no state here.
pub(crate) fn state(subject: &Subject) -> Option<Vec<u8>> {
    let kind = subject.kind()?;
    let mut key = vec![b's', kind_letter(kind)];
    if let Subject::Ledger | Subject::Access = subject {
        return Some(key);
    }
    if let Subject::Domain(hostname) = subject {
        key.extend_from_slice(hostname.as_str().as_bytes());
        return Some(key);
    }
    key.extend_from_slice(subject.project()?.as_str().as_bytes());
    let rest = match subject {
        Subject::Environment(_, e) => e.to_string(),
        Subject::Build(_, b) => b.to_string(),
        Subject::Subscription(_, s) => s.to_string(),
        Subject::Deployment(_, e, d) => format!("{e}.{d}"),
        _ => return Some(key),
    };
    key.push(b'.');
    key.extend_from_slice(rest.as_bytes());
    Some(key)
}

/// A snapshot of an aggregate, as it was after the event at a position; none for an aggregate of
/// a newer version.
pub(crate) fn snapshot(subject: &Subject, position: Position) -> Option<Vec<u8>> {
    Some(placed(snapshots(subject)?, position))
}

/// What the snapshots of an aggregate start with.
pub(crate) fn snapshots(subject: &Subject) -> Option<Vec<u8>> {
    let mut key = state(subject)?;
    key[0] = b'S';
    key.push(0);
    Some(key)
}

/// What the states of one kind, of one project if it is given, start with.
pub(crate) fn states(kind: AggregateKind, project: Option<&ProjectName>) -> Vec<u8> {
    let mut key = vec![b's', kind_letter(kind)];
    if let Some(p) = project {
        key.extend_from_slice(p.as_str().as_bytes());
        key.push(b'.');
    }
    key
}

/// Where a deployment stands: its position of creation and its instance.
pub(crate) fn deployment(id: DeploymentId) -> Vec<u8> {
    [b"d".as_slice(), id.0.as_bytes()].concat()
}

/// A build's project. Two projects may share the id of a build and still build for themselves.
pub(crate) fn build(id: BuildId, project: &ProjectName) -> Vec<u8> {
    [builds(id).as_slice(), project.as_str().as_bytes()].concat()
}

/// What the rows of a build's projects start with.
pub(crate) fn builds(id: BuildId) -> Vec<u8> {
    [b"b".as_slice(), id.0.as_bytes()].concat()
}

/// Whose a webhook is.
pub(crate) fn subscription(id: SubscriptionId) -> Vec<u8> {
    [b"z".as_slice(), id.0.as_bytes()].concat()
}

/// A deployment that waits for a build.
pub(crate) fn waiting(build: BuildId, deployment: DeploymentId) -> Vec<u8> {
    [waiting_for(build).as_slice(), deployment.0.as_bytes()].concat()
}

/// What the rows of all that wait for a build start with.
pub(crate) fn waiting_for(build: BuildId) -> Vec<u8> {
    [b"w".as_slice(), build.0.as_bytes()].concat()
}

/// A deployment that waits for a time, by that time.
pub(crate) fn timer(due: Timestamp, deployment: DeploymentId) -> Vec<u8> {
    // Times before 1970 are not scheduled by anybody.
    let micros = u64::try_from(due.as_microsecond()).unwrap_or_default();
    [TIMERS, &micros.to_be_bytes(), deployment.0.as_bytes()].concat()
}

/// A deployment whose plan waits to be allowed.
pub(crate) fn undecided(project: &ProjectName, deployment: DeploymentId) -> Vec<u8> {
    [undecided_of(project).as_slice(), deployment.0.as_bytes()].concat()
}

/// What the rows of all of a project whose plans wait to be allowed start with.
pub(crate) fn undecided_of(project: &ProjectName) -> Vec<u8> {
    [b"u", project.as_str().as_bytes(), b"\0"].concat()
}

/// The event of a request that carried an idempotency key.
pub(crate) fn request(id: EventId) -> Vec<u8> {
    [b"k".as_slice(), id.0.as_bytes()].concat()
}

fn placed(mut prefix: Vec<u8>, position: Position) -> Vec<u8> {
    prefix.extend_from_slice(&position.0.to_be_bytes());
    prefix
}

/// Reads the position at a key's end.
pub(crate) fn position_of(key: &[u8]) -> Option<Position> {
    let tail = key.len().checked_sub(8)?;
    Some(Position(u64::from_be_bytes(
        key.get(tail..)?.try_into().ok()?,
    )))
}

/// A set of deployments that is listed: all, a project's, an environment's or an instance's.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Scope<'a> {
    All,
    Project(&'a ProjectName),
    Environment(&'a ProjectName, &'a EnvironmentName),
    Instance(&'a InstanceRef),
}

impl Scope<'_> {
    fn prefix(self, letter: u8) -> Vec<u8> {
        let mut key = vec![letter];
        match self {
            Self::All => {}
            Self::Project(p) => key.extend_from_slice(p.as_str().as_bytes()),
            Self::Environment(p, e) => key.extend_from_slice(format!("{p}.{e}").as_bytes()),
            Self::Instance(i) => key.extend_from_slice(i.to_string().as_bytes()),
        }
        key.push(0);
        key
    }

    /// What the index rows of this scope start with.
    pub(crate) fn listed(self) -> Vec<u8> {
        self.prefix(b'x')
    }

    /// What the index rows of this scope's active deployments start with.
    pub(crate) fn active(self) -> Vec<u8> {
        self.prefix(b'n')
    }
}

/// The index row of a deployment in a scope, by its position of creation.
pub(crate) fn listed(scope: Scope<'_>, created: Position) -> Vec<u8> {
    placed(scope.listed(), created)
}

/// The index row of an active deployment in a scope.
pub(crate) fn active(scope: Scope<'_>, created: Position) -> Vec<u8> {
    placed(scope.active(), created)
}

/// A row of the history, by the position of its deployment's creation.
pub(crate) fn history(created: Position) -> Vec<u8> {
    placed(vec![b'h'], created)
}

/// A chunk of the audit. The last one may not be full.
pub(crate) fn chunk(number: u64) -> Vec<u8> {
    placed(vec![b'A'], Position(number))
}

/// What is to be found in a block of chunks.
pub(crate) fn terms(block: u64) -> Vec<u8> {
    placed(vec![b'T'], Position(block))
}

/// The chunk that a position belongs to, from 0.
pub(crate) fn chunk_of(position: Position) -> u64 {
    position.0.saturating_sub(1) / CHUNK
}

/// The sum over all states, as it was at a position.
pub(crate) fn sum(position: Position) -> Vec<u8> {
    placed(vec![b'H'], position)
}

/// The deployments that were active at a position, by the positions of their requests.
pub(crate) fn were_active(position: Position) -> Vec<u8> {
    placed(vec![b'o'], position)
}

/// The first position of a chunk.
pub(crate) fn first_of(chunk: u64) -> Position {
    Position(chunk * CHUNK + 1)
}

/// Whether a row says something about this store, and nothing about the ledger.
pub(crate) fn is_local(key: &[u8]) -> bool {
    [FORMAT, IDENTITY, BEGUN].contains(&key)
}

/// What a row is, for people.
pub(crate) fn describe(key: &[u8]) -> String {
    let text = |from: usize| String::from_utf8_lossy(key.get(from..).unwrap_or_default());
    let uuid = || {
        let id = key.get(1..17).and_then(|k| uuid::Uuid::from_slice(k).ok());
        id.map_or_else(|| "?".to_owned(), |id| id.to_string())
    };
    let place = || position_of(key).map_or_else(|| "?".to_owned(), |p| p.to_string());
    match key.first() {
        Some(b's') => {
            let kind = AggregateKind::ALL
                .into_iter()
                .find(|k| key.get(1) == Some(&kind_letter(*k)));
            format!("state of {} {}", kind.map_or("?", |k| k.as_str()), text(2))
        }
        Some(b'd') => format!("place of deployment {}", uuid()),
        Some(b'b') => format!("project of build {}", uuid()),
        Some(b'w') => format!("deployments that wait for build {}", uuid()),
        Some(b'k') => format!("request {}", uuid()),
        Some(b't') => "a timer".to_owned(),
        Some(b'u') => "a deployment whose plan waits to be allowed".to_owned(),
        Some(b'x') => format!("list of deployments, at event {}", place()),
        Some(b'n') => format!("list of active deployments, at event {}", place()),
        Some(b'h') => format!("history of the deployment of event {}", place()),
        Some(b'A') => format!("audit, chunk {}", place()),
        Some(b'T') => format!("terms of the audit, block {}", place()),
        Some(b'S') => format!("snapshot at event {}", place()),
        Some(b'H') => format!("sum of states at event {}", place()),
        Some(b'L') => "sum of states".to_owned(),
        Some(b'o') => format!("active deployments at event {}", place()),
        Some(b'c') => "checkpoint".to_owned(),
        _ => format!("row {}", String::from_utf8_lossy(key)),
    }
}
