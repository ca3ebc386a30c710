//! The signed tree that a server on another machine publishes, for a process that has no notary and
//! shares no folder with one.

use std::fmt;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use daybook_events::Position;
use daybook_events::tree::{Breach, PublishedTree, SignedHead, TreeCondition};
use daybook_store::tlog::{Checkpoint, breach_code};
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

/// A tree over HTTP: its head, its tiles, and what the server's notary says of the log.
///
/// The server is believed, as a shared folder is: verifying is for those who do not trust it.
pub struct ServedTree {
    client: Client,
    seen: RwLock<(Option<SignedHead>, TreeCondition)>,
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
}

#[derive(Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
enum Condition {
    Sound {},
    Unknown {
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
            client: Client::new(&ServerArgs {
                server: server.to_owned(),
                actor: None,
            })?,
            seen: RwLock::new((
                None,
                TreeCondition::Unknown("the server was not asked yet".to_owned()),
            )),
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

    async fn look(&self) {
        let asked = tokio::time::timeout(PATIENCE, self.ask()).await;
        let asked = asked.unwrap_or_else(|_| Err("it does not answer in time".to_owned()));
        let mut seen = self.seen.write().unwrap_or_else(PoisonError::into_inner);
        match asked {
            Ok((head, condition)) => {
                let newer = |new: &SignedHead| {
                    let old = seen.0.as_ref().map_or(0, |old| old.head.size);
                    old <= new.head.size
                };
                if let Some(head) = head.filter(newer) {
                    seen.0 = Some(head);
                }
                seen.1 = condition;
            }
            // What was broken is not mended because nobody answers any more.
            Err(_) if matches!(seen.1, TreeCondition::Broken(_)) => {}
            Err(why) => {
                let server = self.client.shown();
                seen.1 = TreeCondition::Unknown(format!("{server} publishes no tree: {why}"));
            }
        }
    }

    async fn ask(&self) -> Result<(Option<SignedHead>, TreeCondition), String> {
        let said = |failure: Failure| failure.message;
        let report: Report = self.client.get("/api/v1/ledger", &[]).await.map_err(said)?;
        let note = self
            .client
            .resource(&format!("{PREFIX}/checkpoint"))
            .await
            .map_err(said)?;
        let head = note.map(|note| {
            let (checkpoint, _) = Checkpoint::parse_unverified(&note).map_err(|e| e.to_string())?;
            Ok::<_, String>(SignedHead {
                head: checkpoint.head,
                published_at: Timestamp::now(),
                note,
            })
        });
        Ok((head.transpose()?, report.condition.into()))
    }
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
        if path == "checkpoint" {
            return Ok(self.head().map(|head| head.note));
        }
        let found = self.client.resource(&format!("{PREFIX}/{path}")).await;
        found.map_err(|failure| io::Error::other(failure.message))
    }
}
