//! The port to the transparency log: what others may know of the signed tree over the ledger.
//!
//! `daybook-store` maintains the tree and signs its checkpoints. The api serves what stands here
//! as it is, and the package worker writes its newest head into GitOps commits; neither can
//! change anything. Formats: C2SP `tlog-tiles`, `tlog-checkpoint` and `signed-note`; hashing of
//! RFC 6962.

use std::fmt;
use std::io;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;

/// The root of an RFC 6962 tree over the first `size` events.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TreeHead {
    /// How many leaves it covers. Leaf `i` is the event (or recorded gap) at position `i + 1`.
    pub size: u64,
    /// The Merkle tree hash over them.
    pub root: [u8; 32],
}

impl fmt::Debug for TreeHead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.size)?;
        self.root.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// A head as it was signed and published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedHead {
    /// What was signed.
    pub head: TreeHead,
    /// When it was published, by the notary's clock. For display; nothing is decided by it.
    pub published_at: Timestamp,
    /// The signed note, byte for byte as `GET <prefix>/checkpoint` answers it.
    pub note: Bytes,
}

/// Whether the log still is what was signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TreeCondition {
    /// The log begins with what was signed; new events are being signed.
    Sound,
    /// Nothing can be said yet, or no longer: no notary has been heard of for a while.
    Unknown(String),
    /// The log looks shorter than it was signed. For a moment that may be a new leader of a cluster;
    /// until it is clear appends wait, and nothing is signed. Followed by one of the others.
    Doubted(String),
    /// The log lost, changed or replaced something. Nothing is signed or appended any more.
    Broken(Breach),
}

/// What is wrong with the log, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Breach {
    /// A stable code, such as `log_truncated`, `log_differs` or `log_replaced`.
    pub code: &'static str,
    /// The first position concerned, where one can be named.
    pub position: Option<crate::Position>,
    /// What was found, in a sentence.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
}

/// The published tree, for reading. Cheap to ask: a head is kept in memory.
#[async_trait]
pub trait PublishedTree: fmt::Debug + Send + Sync {
    /// The newest published head; none before the first checkpoint.
    fn head(&self) -> Option<SignedHead>;

    /// Whether the log still is what was signed, as far as this process knows.
    fn condition(&self) -> TreeCondition;

    /// One static resource by its path below the prefix, as it was published: `checkpoint`,
    /// `tile/0/x001/067`, `tile/entries/000.p/17`. `None` if there is no such resource; paths
    /// that are not in canonical form name none.
    async fn resource(&self, path: &str) -> io::Result<Option<Bytes>>;
}
