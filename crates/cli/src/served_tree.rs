//! The signed tree that a server on another machine publishes, for a process that has no notary and
//! shares no folder with one.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use daybook_events::Position;
use daybook_events::tree::{Breach, PublishedTree, SignedHead, TreeCondition};
use daybook_store::tlog::{Checkpoint, TilePath, breach_code};
use jiff::Timestamp;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use crate::client::Client;
use crate::commands::ServerArgs;
use crate::exit::{Code, Failure};

/// How often the server is asked. A breach stops appends that much later than on its own machine.
const ASK_EVERY: Duration = Duration::from_millis(500);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Where every Daybook server publishes its tree.
const PREFIX: &str = "/tlog";
/// The most that a tile, a bundle of entries or a list of keys has.
pub(crate) const LARGEST: usize = 256 * (65_535 + 2);
/// The most that a checkpoint has, whoever has signed it.
const LARGEST_NOTE: usize = 1 << 20;

/// For how long a doubt counts that the server has not repeated.
const OLD_DOUBT: Duration = Duration::from_secs(5);

/// A tree over HTTP: its head, its tiles, and what the server's notary says of the log.
///
/// The server is believed, as a shared folder is: verifying is for those who do not trust it.
pub struct ServedTree {
    client: Client,
    seen: RwLock<(Option<SignedHead>, TreeCondition)>,
    /// When the server doubted last.
    doubted: Mutex<Option<Instant>>,
}

impl fmt::Debug for ServedTree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ServedTree")
            .field(&self.client.shown())
            .finish()
    }
}

/// The part of `GET /api/v1/ledger` that matters here.
#[derive(Deserialize)]
struct Report {
    condition: Condition,
    signed: Option<Signed>,
}

#[derive(Deserialize)]
struct Signed {
    size: u64,
    published_at: Timestamp,
}

#[derive(Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
enum Condition {
    Sound {},
    Unknown {
        reason: String,
    },
    Doubted {
        reason: String,
    },
    Broken {
        code: String,
        position: Option<Position>,
        message: String,
        remedy: String,
    },
}

impl From<Condition> for TreeCondition {
    fn from(condition: Condition) -> Self {
        match condition {
            Condition::Sound {} => Self::Sound,
            Condition::Unknown { reason } => Self::Unknown(reason),
            Condition::Doubted { reason } => Self::Doubted(reason),
            Condition::Broken {
                code,
                position,
                message,
                remedy,
            } => Self::Broken(Breach {
                code: breach_code(&code),
                position,
                message,
                remedy,
            }),
        }
    }
}

impl ServedTree {
    /// The tree at a URL that ends in `/tlog`. It is asked for once; a server that does not answer
    /// is asked again by [`follow`](Self::follow).
    pub async fn open(url: &str) -> Result<Arc<Self>, Failure> {
        let server = url.trim_end_matches('/').strip_suffix(PREFIX);
        let server = server.ok_or_else(|| {
            Failure::new(
                Code::Usage,
                "invalid_tlog_url",
                "that is no address of a server's tree",
            )
            .hint("give --tlog-url the address that ends in /tlog: https://HOST/tlog")
        })?;
        let tree = Arc::new(Self {
            client: Client::new(&ServerArgs::of(server.to_owned(), None))?,
            seen: RwLock::new((
                None,
                TreeCondition::Unknown("the server was not asked yet".to_owned()),
            )),
            doubted: Mutex::default(),
        });
        tree.look().await;
        Ok(tree)
    }

    /// Asks again and again, until it is cancelled.
    pub async fn follow(self: Arc<Self>, cancel: CancellationToken) {
        let ask = async {
            loop {
                tokio::time::sleep(ASK_EVERY).await;
                self.look().await;
            }
        };
        tokio::select! {
            () = cancel.cancelled() => {}
            () = ask => {}
        }
    }

    /// What the notary says of the log counts as soon as it is known, whether or not the head that
    /// goes with it can be read.
    async fn look(&self) {
        let (condition, signed) = match in_time(self.report()).await {
            Ok(report) => (report.condition.into(), report.signed),
            Err(why) => (TreeCondition::Unknown(self.silent(&why)), None),
        };
        let still_doubted = {
            let mut doubted = self.doubted.lock().unwrap_or_else(PoisonError::into_inner);
            if let TreeCondition::Doubted(_) = condition {
                *doubted = Some(Instant::now());
            }
            doubted.is_some_and(|at| at.elapsed() <= OLD_DOUBT)
        };
        self.change(|_, known| {
            use TreeCondition::{Broken, Doubted, Unknown};
            match (&*known, &condition) {
                // What was broken is not mended because nobody knows any more.
                (Broken(_), Unknown(_) | Doubted(_)) => {}
                // A server that does not answer for a moment has not said that all is well.
                (Doubted(_), Unknown(_)) if still_doubted => {}
                _ => *known = condition,
            }
        });
        let Some(signed) = signed else {
            return;
        };
        let known = self.head();
        if known.is_some_and(|known| {
            known.head.size == signed.size && known.published_at == signed.published_at
        }) {
            return;
        }
        match in_time(self.newest(&signed)).await {
            Ok(head) => self.take(head),
            Err(why) => self.doubt(&why),
        }
    }

    fn change(&self, change: impl FnOnce(&mut Option<SignedHead>, &mut TreeCondition)) {
        let mut seen = self.seen.write().unwrap_or_else(PoisonError::into_inner);
        let (head, condition) = &mut *seen;
        change(head, condition);
    }

    /// Takes a head, unless it is older than the one that is known, or is another of the same size.
    fn take(&self, new: Option<SignedHead>) {
        let Some(new) = new else {
            return;
        };
        let mut other = None;
        self.change(|head, _| match head {
            Some(old) if old.head.size > new.head.size => {}
            Some(old) if old.head.size == new.head.size && old.head.root != new.head.root => {
                other = Some(format!(
                    "it has signed two trees of {} entries",
                    new.head.size
                ));
            }
            head => *head = Some(new),
        });
        if let Some(why) = other {
            self.doubt(&why);
        }
    }

    /// Not even a sound log is known to be so where the head cannot be believed.
    fn doubt(&self, why: &str) {
        let doubt = TreeCondition::Unknown(self.silent(why));
        self.change(|_, condition| {
            if matches!(condition, TreeCondition::Sound) {
                *condition = doubt;
            }
        });
    }

    fn silent(&self, why: &str) -> String {
        format!("{} publishes no tree: {why}", self.client.shown())
    }

    /// The server is asked as it is: one that still folds the log knows already whether the log is
    /// what was signed.
    async fn report(&self) -> Result<Report, String> {
        let report = self.client.get_as_it_is("/api/v1/ledger").await;
        report.map_err(|failure| failure.message)
    }

    async fn newest(&self, signed: &Signed) -> Result<Option<SignedHead>, String> {
        let path = format!("{PREFIX}/checkpoint");
        let note = self.client.resource(&path, LARGEST_NOTE).await;
        let Some(note) = note.map_err(|failure| failure.message)? else {
            return Ok(None);
        };
        let (checkpoint, _) = Checkpoint::parse_unverified(&note).map_err(|e| e.to_string())?;
        // One that was published after the report was made is newer than the report says.
        let published_at = if checkpoint.head.size == signed.size {
            signed.published_at
        } else {
            Timestamp::now()
        };
        Ok(Some(SignedHead {
            head: checkpoint.head,
            published_at,
            note,
        }))
    }
}

async fn in_time<T>(asked: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let answered = tokio::time::timeout(PATIENCE, asked).await;
    answered.unwrap_or_else(|_| Err("it does not answer in time".to_owned()))
}

#[async_trait]
impl PublishedTree for ServedTree {
    fn head(&self) -> Option<SignedHead> {
        let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
        seen.0.clone()
    }

    fn condition(&self) -> TreeCondition {
        let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
        seen.1.clone()
    }

    async fn resource(&self, path: &str) -> io::Result<Option<Bytes>> {
        let Some(head) = self.head() else {
            return Ok(None);
        };
        let asked = match path {
            "checkpoint" => return Ok(Some(head.note)),
            "keys" => path.to_owned(),
            // Nothing else of the server is reached through here, whatever the path looks like.
            _ => match path.parse::<TilePath>() {
                Ok(tile) if tile.is_covered_by(head.head.size) => tile.to_string(),
                _ => return Ok(None),
            },
        };
        let found = self
            .client
            .resource(&format!("{PREFIX}/{asked}"), LARGEST)
            .await;
        found.map_err(|failure| io::Error::other(failure.message))
    }
}
