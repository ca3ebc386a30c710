//! `daybook ledger repair`: a damaged log is replaced by a new one, written from what was signed. And
//! `daybook ledger recheck`: a log that is what was signed again is used again.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use clap::Args;
use daybook_events::ledger::{self, FoundBreach, LedgerEvent, LedgerRecord, Repaired};
use daybook_events::log::{Append, Expected};
use daybook_events::tree::{Breach, PublishedTree, TreeCondition};
use daybook_events::with_causes;
use daybook_events::{
    Actor, Context, Decision, Digest, EventId, EventLog, Folded, NewEvent, Subject,
};
use daybook_store::embedded::{EmbeddedConfig, EmbeddedLog, LockError, OpenError};
use daybook_store::jetstream::{Connection, JetStreamLog, LogOptions, set_aside};
use daybook_store::tlog::{
    self, FolderStorage, FolderTree, KeyRing, RecheckError, RepairError, clear_breach, compare_log,
    is_repairable, recheck,
};
use jiff::Timestamp;
use serde_json::json;
use uuid::Uuid;

use super::Outcome;
use crate::exit::{Code, Failure};
use crate::node::{self, NodeOptions};
use crate::output;

/// Where the new log of a data folder is until it takes the place of the old one.
const RESTORED: &str = "log.restored";

/// Replace a damaged log by a new one with every signed event, each where it was.
///
/// Nothing of Daybook may run on the data folder or the stream meanwhile. The damaged log is kept
/// aside. Events that had not been signed are in it only: at most those of the last second before
/// the damage.
#[derive(Debug, Args)]
pub struct RepairArgs {
    #[command(flatten)]
    node: Box<super::up::NodeArgs>,
    /// The NATS server that has the log, if it is not embedded.
    #[arg(long, env = "DAYBOOK_NATS", hide_env_values = true, value_name = "URL")]
    nats: Option<String>,
    /// Name of the stream that takes the place of the damaged one. A number is put behind the old
    /// name, or counted on, if not given.
    #[arg(long, value_name = "NAME", requires = "nats")]
    new_stream: Option<String>,
}

/// Compare the whole log with all that was signed, and use it again if nothing is wrong.
///
/// For a ledger that is broken, when the cause is gone: Daybook is pointed at the log that was signed
/// again, or the log or the folder of tiles was brought back from a backup. Nothing of Daybook may
/// run on the data folder or the stream meanwhile.
#[derive(Debug, Args)]
pub struct RecheckArgs {
    #[command(flatten)]
    node: Box<super::up::NodeArgs>,
    /// The NATS server that has the log, if it is not embedded.
    #[arg(long, env = "DAYBOOK_NATS", hide_env_values = true, value_name = "URL")]
    nats: Option<String>,
}

/// A log and what was signed of it, as a node would use them.
struct Signed {
    options: NodeOptions,
    data: PathBuf,
    keys: KeyRing,
    storage: FolderStorage,
}

impl Signed {
    fn open(node: &super::up::NodeArgs, nats: Option<String>) -> Result<Self, Failure> {
        let mut options = node.options()?;
        options.nats = nats;
        let data = std::path::absolute(&options.data)?;
        let keys = KeyRing::open(&options.ledger_keys_folder(&data))
            .map_err(|e| super::keys_unusable(&e))?;
        let storage = FolderStorage::new(options.tlog_folder(&data));
        Ok(Self {
            options,
            data,
            keys,
            storage,
        })
    }

    /// Where a log is restored that is to take the place of the embedded one.
    fn restored(&self) -> PathBuf {
        self.data.join(RESTORED)
    }

    async fn connect(&self) -> Result<Connection, Failure> {
        let nats = node::nats_options(&self.options)
            .ok_or_else(|| nats_unusable("no NATS server is named".to_owned()))?;
        let connected = Connection::open(nats).await;
        connected.map_err(|e| nats_unusable(with_causes(&e)))
    }

    fn stream(&self, name: &str) -> LogOptions {
        let mut log = LogOptions {
            stream: name.to_owned(),
            ..LogOptions::default()
        };
        log.replicas = self.options.nats_replicas;
        log
    }

    /// What cannot be restored from, or trusted: how to bring it back.
    fn tiles_damaged(&self, what: &str) -> Failure {
        Failure::new(
            Code::Refused,
            "not_repairable",
            format!("a log is restored from its tiles, and they are what is damaged: {what}"),
        )
        .hint(format!(
            "bring back what it names in {} from a copy of that folder: a tile never changes, so one \
             that an auditor fetched will do. Then run `daybook ledger recheck`",
            self.storage.folder().display()
        ))
    }

    /// Refuses to replace a log that is what was signed.
    async fn must_be_damaged(&self, log: &dyn EventLog) -> Result<(), Failure> {
        match compare_log(&self.storage, &self.keys, log).await {
            Ok(head) => Err(Failure::new(
                Code::Refused,
                "log_is_sound",
                format!("this log has all {} signed events as they were", head.size),
            )
            .hint("run `daybook ledger recheck`: Daybook uses it again then")),
            Err(_) => Ok(()),
        }
    }
}

fn nats_unusable(why: String) -> Failure {
    Failure::new(Code::Failure, "log_unavailable", why)
        .hint("check that the nats-server answers, and that the account may change streams")
}

fn in_use(error: &LockError) -> Failure {
    Failure::new(Code::Refused, "log_in_use", error.to_string())
        .hint("stop `daybook up` on this data folder first")
}

pub async fn run(args: RepairArgs) -> Outcome {
    let signed = Signed::open(&args.node, args.nats)?;
    let is_embedded = signed.options.nats.is_none();
    let cut_off = is_embedded && signed.restored().exists();
    match FolderTree::new(signed.storage.folder()).condition() {
        TreeCondition::Broken(breach) if !is_repairable(&breach) => {
            return Err(signed.tiles_damaged(&breach.message));
        }
        TreeCondition::Broken(_) => {}
        _ if cut_off => {}
        _ => {
            return Err(Failure::new(
                Code::Refused,
                "nothing_to_repair",
                "nobody has found that the log is not what was signed",
            )
            .hint("a notary looks at each start: run `daybook up` or `daybook serve --role notary`, and ask `daybook ledger status`"));
        }
    }
    let (done, aside, next) = if is_embedded {
        embedded(&signed).await?
    } else {
        on_nats(&signed, args.new_stream).await?
    };
    if output::is_json() {
        output::json(&json!({ "repaired": done, "aside": aside, "next": next }));
        return Ok(Code::Success);
    }
    let style = output::style();
    output::line(&format!(
        "{} {} signed events are in the new log {}, each where it was",
        style.good("restored:"),
        done.size,
        done.identity
    ));
    if done.gaps > 0 {
        output::line(&format!(
            "{} of them stand for positions that were lost before they were signed",
            done.gaps
        ));
    }
    if let Some(aside) = aside {
        output::line(&format!("the old log is kept as {aside}"));
    }
    output::line(&next);
    Ok(Code::Success)
}

async fn embedded(signed: &Signed) -> Result<(Repaired, Option<String>, String), Failure> {
    let (old, new) = (signed.data.join("log"), signed.restored());
    if old.exists() {
        match EmbeddedLog::open(&old, EmbeddedConfig::default()).await {
            Err(OpenError::Lock(error @ LockError::Held { .. })) => return Err(in_use(&error)),
            Ok(log) if !new.exists() => {
                let damaged = signed.must_be_damaged(&log).await;
                log.close().await;
                damaged?;
            }
            Ok(log) => log.close().await,
            // Whether a damaged log can be opened does not matter.
            Err(_) => {}
        }
    }
    let target = EmbeddedLog::open(&new, EmbeddedConfig::default())
        .await
        .map_err(|e| Failure::new(Code::Failure, "new_log_unusable", with_causes(&e)))?;
    let done = restore(signed, &target).await;
    target.close().await;
    drop(target);
    let done = done?;

    // For as long as the new log has its own name a repair that was cut off is to be seen.
    let aside = old.exists().then(|| free_name(&signed.data)).transpose()?;
    if let Some(aside) = &aside {
        // Output lines are no part of the ledger; they stay with the log that is used. What is there
        // is of a repair that was cut off here.
        if !new.join("lines").exists() {
            match std::fs::rename(old.join("lines"), new.join("lines")) {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(e.into()),
            }
        }
        std::fs::rename(&old, aside)?;
    }
    std::fs::rename(&new, &old)?;
    std::fs::File::open(&signed.data)?.sync_all()?;
    Ok((
        done,
        aside.map(|aside| aside.display().to_string()),
        "start `daybook up` again: it goes on from there".to_owned(),
    ))
}

fn free_name(data: &Path) -> Result<PathBuf, Failure> {
    (1..1000)
        .map(|n| data.join(format!("log.damaged-{n}")))
        .find(|path| !path.exists())
        .ok_or_else(|| {
            Failure::new(
                Code::Failure,
                "too_many_logs",
                "there are a thousand damaged logs in the data folder",
            )
            .hint("move the folders log.damaged-… to another disk")
        })
}

async fn on_nats(
    signed: &Signed,
    new_stream: Option<String>,
) -> Result<(Repaired, Option<String>, String), Failure> {
    let old = signed.options.nats_stream.clone();
    let new = new_stream.unwrap_or_else(|| counted_on(&old));
    if new == old {
        return Err(Failure::new(
            Code::Usage,
            "same_stream",
            format!("{new} is the damaged stream"),
        )
        .hint("name another one with --new-stream NAME"));
    }
    let connection = signed.connect().await?;
    // One that was set aside, or that cannot be opened, is not what it was.
    if let Ok(log) = JetStreamLog::open_existing(connection.clone(), &signed.stream(&old)).await {
        signed.must_be_damaged(&log).await?;
    }
    set_aside(&connection, &old)
        .await
        .map_err(|e| nats_unusable(with_causes(&e)))?;
    let target = JetStreamLog::open(connection, &signed.stream(&new))
        .await
        .map_err(|e| nats_unusable(with_causes(&e)))?;
    let done = restore(signed, &target).await?;
    Ok((
        done,
        Some(format!("the stream {old}, which takes no more events")),
        format!("start every process of Daybook with --nats-stream {new} (DAYBOOK_NATS_STREAM)"),
    ))
}

/// `DAYBOOK-2` after `DAYBOOK`, `DAYBOOK-3` after that.
fn counted_on(stream: &str) -> String {
    let number = stream.rsplit_once('-').and_then(|(stem, number)| {
        let number: u32 = number.parse().ok()?;
        Some(format!("{stem}-{}", number.checked_add(1)?))
    });
    number.unwrap_or_else(|| format!("{stream}-2"))
}

/// Writes all that is signed into a new log, and an event that says so behind it. Then appends go on.
async fn restore(signed: &Signed, target: &dyn EventLog) -> Result<Repaired, Failure> {
    let done = match tlog::repair(&signed.storage, &signed.keys, target).await {
        Ok(done) => done,
        Err(error @ RepairError::SameLog { .. }) => {
            let way_out = match &signed.options.nats {
                None => format!("remove {}, and run it again", signed.restored().display()),
                Some(_) => "name the damaged stream with --nats-stream NAME, and one that is not \
                            there yet with --new-stream NAME"
                    .to_owned(),
            };
            return Err(Failure::new(Code::Refused, "same_log", error.to_string()).hint(way_out));
        }
        Err(error) => {
            return Err(match RecheckError::from(error) {
                RecheckError::Breach(breach) => signed.tiles_damaged(&breach.message),
                RecheckError::Tiles(error) => failed(&error),
                unavailable @ RecheckError::Unavailable(_) => failed(&unavailable),
            });
        }
    };
    let repaired = say(target, done).await?;
    clear_breach(&signed.storage)
        .await
        .map_err(|e| failed(&e))?;
    Ok(repaired)
}

fn failed(error: &dyn std::error::Error) -> Failure {
    Failure::new(Code::Failure, "repair_failed", with_causes(error))
        .hint("mend what it names and run the same command again: it goes on where it stopped")
}

/// Appends an event that says what was done, unless a repair that was cut off has; returns what is
/// said.
async fn say(target: &dyn EventLog, done: tlog::Repaired) -> Result<Repaired, Failure> {
    let repaired = Repaired {
        breach: done.breach.map(|breach| FoundBreach {
            code: breach.code.to_owned(),
            position: breach.position,
            message: breach.message,
        }),
        size: done.head.size,
        root: Digest::from_sha256(&done.head.root),
        gaps: done.gaps,
        identity: done.identity,
        replaces: done.replaces,
    };
    let subject = Subject::Ledger;
    let events = target.read_aggregate(&subject).await;
    let events = events.map_err(|e| failed(&e))?;
    let folded = Folded::<LedgerRecord>::replay(events.iter());
    let decision = ledger::decide(
        folded.state.as_ref(),
        LedgerEvent::Repaired(repaired.clone()),
    );
    let payload = match decision {
        Ok(Decision::Append(payload)) => payload,
        Ok(Decision::Nothing) => return Ok(folded.state.map_or(repaired, |record| record.last)),
        Err(refusal) => {
            return Err(Failure::new(
                Code::Failure,
                "repair_failed",
                refusal.message,
            ));
        }
    };
    let id = EventId::derived(Uuid::NAMESPACE_OID, &repaired.identity);
    let context = Context {
        id,
        time: Timestamp::now(),
        correlation: id.0,
        causation: None,
        actor: Actor::system("ledger/repair"),
        traceparent: None,
        request_digest: None,
    };
    let event = NewEvent {
        subject: subject.clone(),
        revision: folded.revision + 1,
        context,
        payload,
    };
    let append = Append {
        subject,
        id,
        expected: Expected::Last(folded.position),
        bytes: event.to_bytes(Timestamp::now()).map_err(|e| failed(&e))?,
    };
    target.append(append).await.map_err(|e| failed(&e))?;
    Ok(repaired)
}

/// Ends with [`Code::Mismatch`] if the log is not what was signed.
pub async fn recheck_log(args: RecheckArgs) -> Outcome {
    let signed = Signed::open(&args.node, args.nats)?;
    let (storage, keys) = (&signed.storage, &signed.keys);
    let compared = match &signed.options.nats {
        None => {
            let log = embedded_log(&signed).await?;
            let compared = recheck(storage, keys, &log).await;
            log.close().await;
            compared
        }
        Some(_) => {
            let stream = signed.stream(&signed.options.nats_stream);
            let opened = JetStreamLog::open_existing(signed.connect().await?, &stream).await;
            let log = opened.map_err(|e| {
                let why = with_causes(&e);
                Failure::new(Code::Failure, "log_unavailable", why)
                    .hint("name the stream that was signed with --nats-stream NAME")
            })?;
            recheck(storage, keys, &log).await
        }
    };
    let (head, cleared) = compared.map_err(|error| match error {
        // A repair that was cut off has bound what is signed to a log that is not in its place yet.
        RecheckError::Breach(breach)
            if signed.options.nats.is_none() && signed.restored().exists() =>
        {
            still(&breach).hint("a repair was cut off: run `daybook ledger repair` again")
        }
        RecheckError::Breach(breach) => still(&breach).hint(breach.remedy.clone()),
        RecheckError::Unavailable(_) => {
            Failure::new(Code::Failure, "log_unavailable", error.to_string())
                .hint("try again later; nothing was changed")
        }
        RecheckError::Tiles(RepairError::NothingSigned) => Failure::new(
            Code::Refused,
            "nothing_signed",
            "nothing was signed yet, so there is nothing to compare with",
        )
        .hint("name the folder of tiles with --tlog DIR"),
        RecheckError::Tiles(error) => {
            Failure::new(Code::Failure, "recheck_failed", with_causes(&error))
                .hint("check the folders of --tlog and --tlog-keys")
        }
    })?;
    let root = Digest::from_sha256(&head.root);
    if output::is_json() {
        let cleared = cleared.map(|breach| {
            json!({ "code": breach.code, "position": breach.position, "message": breach.message })
        });
        output::json(&json!({ "size": head.size, "root": root, "cleared": cleared }));
        return Ok(Code::Success);
    }
    output::line(&format!(
        "{} the log has all {} signed events as they were",
        output::style().good("sound:"),
        head.size
    ));
    match cleared {
        Some(breach) => {
            output::line(&format!("forgotten: {} ({})", breach.message, breach.code));
            output::line(
                "start the notary again, and the processes that read the tree over HTTP (--tlog-url)",
            );
        }
        None => output::line("nobody had found it to be anything else"),
    }
    Ok(Code::Success)
}

/// What is wrong still, under the code that it has everywhere.
fn still(breach: &Breach) -> Failure {
    Failure::new(Code::Mismatch, breach.code, breach.message.clone())
}

/// The embedded log, if it is there.
async fn embedded_log(signed: &Signed) -> Result<EmbeddedLog, Failure> {
    let folder = signed.data.join("log");
    if !folder.exists() {
        let missing = format!("there is no log at {}", folder.display());
        return Err(Failure::new(Code::NotFound, "log_missing", missing).hint(
            "bring it back from a backup, or name another data folder with --data DIR; \
                 `daybook ledger repair` restores the signed events",
        ));
    }
    let opened = EmbeddedLog::open(&folder, EmbeddedConfig::default()).await;
    opened.map_err(|error| match error {
        OpenError::Lock(error @ LockError::Held { .. }) => in_use(&error),
        error => Failure::new(Code::Failure, "log_unusable", with_causes(&error)).hint(
            "bring it back from a backup; if there is none, `daybook ledger repair` restores the \
             signed events",
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_counted_on() {
        assert_eq!(counted_on("DAYBOOK"), "DAYBOOK-2");
        assert_eq!(counted_on("DAYBOOK-2"), "DAYBOOK-3");
        assert_eq!(counted_on("DAYBOOK-EU"), "DAYBOOK-EU-2");
    }
}
