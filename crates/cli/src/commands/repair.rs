//! `daybook ledger repair`: a damaged log is replaced by a new one, written from what was signed.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use clap::Args;
use daybook_events::ledger::{self, FoundBreach, LedgerEvent, LedgerRecord, Repaired};
use daybook_events::log::{Append, Expected};
use daybook_events::tree::{PublishedTree, TreeCondition};
use daybook_events::with_causes;
use daybook_events::{
    Actor, Context, Decision, Digest, EventId, EventLog, Folded, NewEvent, Subject,
};
use daybook_store::embedded::{EmbeddedConfig, EmbeddedLog, LockError, OpenError};
use daybook_store::jetstream::{Connection, JetStreamLog, LogOptions, set_aside};
use daybook_store::tlog::{FolderStorage, FolderTree, KeyRing, RepairError, repair};
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
    #[arg(long, env = "DAYBOOK_NATS", value_name = "URL")]
    nats: Option<String>,
    /// Name of the stream that takes the place of the damaged one. A number is put behind the old
    /// name, or counted on, if not given.
    #[arg(long, value_name = "NAME", requires = "nats")]
    new_stream: Option<String>,
}

pub async fn run(args: RepairArgs) -> Outcome {
    let mut options = args.node.options()?;
    options.nats = args.nats.clone();
    let data = std::path::absolute(&options.data)?;
    let keys =
        KeyRing::open(&options.ledger_keys_folder(&data)).map_err(|e| super::keys_unusable(&e))?;
    let storage = FolderStorage::new(options.tlog_folder(&data));
    let cut_off = data.join(RESTORED).exists() || args.new_stream.is_some();
    let condition = FolderTree::new(storage.folder()).condition();
    if !cut_off && !matches!(condition, TreeCondition::Broken(_)) {
        return Err(Failure::new(
            Code::Refused,
            "nothing_to_repair",
            "nobody has found that the log is not what was signed",
        )
        .hint("a notary looks at each start: run `daybook up` or `daybook serve --role notary`, and ask `daybook ledger status`"));
    }
    let (done, aside, next) = match &options.nats {
        None => embedded(&data, &storage, &keys).await?,
        Some(_) => on_nats(&options, args.new_stream, &storage, &keys).await?,
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
    output::line(&format!("the old log is kept as {aside}"));
    output::line(&next);
    Ok(Code::Success)
}

async fn embedded(
    data: &Path,
    storage: &FolderStorage,
    keys: &KeyRing,
) -> Result<(Repaired, String, String), Failure> {
    let (old, new) = (data.join("log"), data.join(RESTORED));
    let nobody_has = |opened: Result<EmbeddedLog, OpenError>| match opened {
        Err(OpenError::Lock(error @ LockError::Held { .. })) => {
            Err(Failure::new(Code::Refused, "log_in_use", error.to_string())
                .hint("stop `daybook up` on this data folder first"))
        }
        // Whether a damaged log can be opened does not matter.
        _ => Ok(()),
    };
    if old.exists() {
        nobody_has(EmbeddedLog::open(&old, EmbeddedConfig::default()).await)?;
    }
    let target = EmbeddedLog::open(&new, EmbeddedConfig::default())
        .await
        .map_err(|e| Failure::new(Code::Failure, "new_log_unusable", with_causes(&e)))?;
    let done = restore(storage, keys, &target).await?;
    target.close().await;
    drop(target);

    let aside = free_name(data)?;
    match std::fs::rename(&old, &aside) {
        Ok(()) => {}
        // A repair that was cut off here has moved it already, or there was none.
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(e.into()),
    }
    // Output lines are no part of the ledger; they stay with the log that is used.
    match std::fs::rename(aside.join("lines"), new.join("lines")) {
        Ok(()) => {}
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(e.into()),
    }
    std::fs::rename(&new, &old)?;
    std::fs::File::open(data)?.sync_all()?;
    Ok((
        done,
        aside.display().to_string(),
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
    options: &NodeOptions,
    new_stream: Option<String>,
    storage: &FolderStorage,
    keys: &KeyRing,
) -> Result<(Repaired, String, String), Failure> {
    let old = options.nats_stream.clone();
    let new = new_stream.unwrap_or_else(|| counted_on(&old));
    if new == old {
        return Err(Failure::new(
            Code::Usage,
            "same_stream",
            format!("{new} is the damaged stream"),
        )
        .hint("name another one with --new-stream NAME"));
    }
    let unavailable = |e: String| {
        Failure::new(Code::Failure, "log_unavailable", e)
            .hint("check that the nats-server answers, and that the account may change streams")
    };
    let nats = node::nats_options(options)
        .ok_or_else(|| unavailable("no NATS server is named".to_owned()))?;
    let connection = Connection::open(nats)
        .await
        .map_err(|e| unavailable(with_causes(&e)))?;
    set_aside(&connection, &old)
        .await
        .map_err(|e| unavailable(with_causes(&e)))?;
    let mut log = LogOptions {
        stream: new.clone(),
        ..LogOptions::default()
    };
    log.replicas = options.nats_replicas;
    let target = JetStreamLog::open(connection, &log)
        .await
        .map_err(|e| unavailable(with_causes(&e)))?;
    let done = restore(storage, keys, &target).await?;
    Ok((
        done,
        format!("the stream {old}, which takes no more events"),
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

/// Writes all that is signed into a new log, and an event that says so behind it.
async fn restore(
    storage: &FolderStorage,
    keys: &KeyRing,
    target: &dyn EventLog,
) -> Result<Repaired, Failure> {
    let failed = |message: String| {
        Failure::new(Code::Failure, "repair_failed", message)
            .hint("mend what it names and run the same command again: it goes on where it stopped")
    };
    let repaired = match repair(storage, keys, target).await {
        Ok(done) => Repaired {
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
        },
        // A repair that was cut off had come to its end.
        Err(RepairError::SameLog { identity }) => return said(target, &identity).await,
        Err(error) => return Err(failed(with_causes(&error))),
    };
    let subject = Subject::Ledger;
    let events = target
        .read_aggregate(&subject)
        .await
        .map_err(|e| failed(with_causes(&e)))?;
    let folded = Folded::<LedgerRecord>::replay(events.iter());
    let event = LedgerEvent::Repaired(repaired.clone());
    let decision = ledger::decide(folded.state.as_ref(), event)
        .map_err(|refusal| failed(refusal.message.clone()))?;
    let Decision::Append(payload) = decision else {
        return Ok(repaired);
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
    let bytes = event
        .to_bytes(Timestamp::now())
        .map_err(|e| failed(e.to_string()))?;
    let append = Append {
        subject,
        id,
        expected: Expected::Last(folded.position),
        bytes,
    };
    target
        .append(append)
        .await
        .map_err(|e| failed(with_causes(&e)))?;
    Ok(repaired)
}

/// What the newest event of a log says of its repair.
async fn said(target: &dyn EventLog, identity: &str) -> Result<Repaired, Failure> {
    let events = target
        .read_aggregate(&Subject::Ledger)
        .await
        .map_err(|e| Failure::new(Code::Failure, "log_unavailable", with_causes(&e)))?;
    Folded::<LedgerRecord>::replay(events.iter())
        .state
        .map(|record| record.last)
        .filter(|last| last.identity == identity)
        .ok_or_else(|| {
            Failure::new(
                Code::Refused,
                "nothing_to_repair",
                format!("the log {identity} is the one that was signed"),
            )
            .hint("`daybook ledger status` says what is wrong, if anything is")
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
