//! What an acknowledgement of these servers is worth, as far as they say.
//!
//! By default nats-server acknowledges what it has handed to the operating system, and syncs it
//! to disk up to two minutes later. Only `sync_interval: always` (a server option since 2.10)
//! makes an acknowledged event survive the loss of power. A client cannot read that option; the
//! system account can.

use std::time::Duration;

use async_nats::jetstream::stream::Info;
use daybook_events::log::Durability;
use futures_util::StreamExt;
use serde::Deserialize;

use super::connection::Connection;

/// Asks every server for its JetStream settings.
const ASK_ALL_SERVERS: &str = "$SYS.REQ.SERVER.PING.JSZ";
/// How long the servers of a cluster may take to answer.
const ANSWERS_WITHIN: Duration = Duration::from_millis(1000);

const WHAT_TO_SET: &str = "set `sync_interval: always` in the `jetstream` block of each server";

/// Says what an acknowledgement means, and warns of what an operator should know.
pub(super) async fn judge(
    connection: &Connection,
    info: &Info,
    warnings: &mut Vec<String>,
) -> Durability {
    let version = connection.server_version();
    warn_of_version(version, warnings);
    warn_of_state(info, warnings);
    if version < REFUSES_WITHOUT_HOLES {
        warn_of_account(account_limit(connection).await, warnings);
    }
    if version < (2, 10, 0) {
        warnings.push(
            "this NATS server acknowledges events before they are on disk, and has no option to \
             change that: the loss of power can lose what was acknowledged in the last minutes; \
             use NATS 2.10 or later with `sync_interval: always`"
                .to_owned(),
        );
        return Durability::Buffered;
    }
    match settings_of_servers(connection).await {
        None => {
            warnings.push(format!(
                "it cannot be seen whether the NATS servers sync events to disk before they \
                 acknowledge them; {WHAT_TO_SET}, and give Daybook access to the system account \
                 if it is to check that"
            ));
            Durability::Unknown
        }
        Some(Err(reason)) => {
            warnings.push(format!(
                "the NATS servers could not be asked whether they sync events to disk ({reason}); \
                 {WHAT_TO_SET}"
            ));
            Durability::Unknown
        }
        Some(Ok(servers)) => {
            let mut lazy: Vec<&str> = servers
                .iter()
                .filter(|server| !server.sync_always)
                .map(|server| server.name.as_str())
                .collect();
            lazy.sort_unstable();
            if lazy.is_empty() {
                return Durability::Synced;
            }
            warnings.push(format!(
                "NATS acknowledges events before they are on disk ({}): the loss of power can lose \
                 what was acknowledged; {WHAT_TO_SET}",
                lazy.join(", ")
            ));
            Durability::Buffered
        }
    }
}

fn warn_of_version(version: (u64, u64, u64), warnings: &mut Vec<String>) {
    if ((2, 10, 20)..=(2, 10, 22)).contains(&version) {
        warnings.push(
            "NATS 2.10.20 to 2.10.22 can lose a whole stream when the server is killed \
             (nats-server#6888); use another version"
                .to_owned(),
        );
    }
}

/// Earlier servers store an event that the account has no room for, and then take it out again.
const REFUSES_WITHOUT_HOLES: (u64, u64, u64) = (2, 10, 12);

fn warn_of_account(limit: Option<u64>, warnings: &mut Vec<String>) {
    if let Some(limit) = limit {
        warnings.push(format!(
            "the NATS account may store {limit} bytes; when they are used up, this version of NATS \
             leaves a hole in the ledger, which nobody reads beyond: lift the limit, or use NATS \
             2.10.12 or later"
        ));
    }
}

/// How many bytes the account may store, if that is limited.
async fn account_limit(connection: &Connection) -> Option<u64> {
    let answer = connection
        .client()
        .request("$JS.API.INFO", "".into())
        .await
        .ok()?;
    read_account_limit(&answer.payload)
}

/// The library's own type for this answer does not fit what 2.9 sends.
fn read_account_limit(answer: &[u8]) -> Option<u64> {
    #[derive(Deserialize)]
    struct Answer {
        limits: Limits,
    }
    #[derive(Deserialize)]
    struct Limits {
        max_storage: i64,
    }
    let answer: Answer = serde_json::from_slice(answer).ok()?;
    // -1 is "as much as there is", 0 is an account with limits of another kind.
    u64::try_from(answer.limits.max_storage)
        .ok()
        .filter(|&limit| limit > 0)
}

/// A ledger begins with 1 and has no holes.
fn warn_of_state(info: &Info, warnings: &mut Vec<String>) {
    let state = &info.state;
    if state.messages > 0 && state.first_sequence > 1 || state.messages < state.last_sequence {
        warnings.push(format!(
            "the stream {} has lost events: it holds {} of {}",
            info.config.name, state.messages, state.last_sequence
        ));
    }
    let missing = info.cluster.as_ref().map_or(0, |cluster| {
        cluster.replicas.iter().filter(|peer| peer.offline).count()
    });
    if missing > 0 {
        warnings.push(format!(
            "{missing} of {} servers that hold the stream {} are offline",
            info.config.num_replicas, info.config.name
        ));
    }
}

/// How one server treats what it acknowledges.
#[derive(Debug, PartialEq, Eq)]
struct ServerSettings {
    name: String,
    sync_always: bool,
}

/// Asks the servers, if there is a way into the system account.
async fn settings_of_servers(
    connection: &Connection,
) -> Option<Result<Vec<ServerSettings>, String>> {
    let client = match connection.open_system().await? {
        Ok(client) => client,
        Err(error) => return Some(Err(error.to_string())),
    };
    Some(ask_all(&client).await.map_err(|error| error.to_string()))
}

async fn ask_all(client: &async_nats::Client) -> Result<Vec<ServerSettings>, async_nats::Error> {
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await?;
    client
        .publish_with_reply(ASK_ALL_SERVERS, inbox, r#"{"config":true}"#.into())
        .await?;
    let mut servers = Vec::new();
    // How many servers there are nobody knows: the answers end when no more of them come.
    let until = tokio::time::Instant::now() + ANSWERS_WITHIN;
    while let Ok(Some(answer)) = tokio::time::timeout_at(until, answers.next()).await {
        servers.extend(read_settings(&answer.payload)?);
    }
    if servers.is_empty() {
        return Err("no server answered in the system account".into());
    }
    Ok(servers)
}

/// Reads the answer of one server; `None` if it has no JetStream.
fn read_settings(answer: &[u8]) -> Result<Option<ServerSettings>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Answer {
        server: Server,
        data: Option<Data>,
    }
    #[derive(Deserialize)]
    struct Server {
        #[serde(default)]
        name: String,
    }
    #[derive(Deserialize)]
    struct Data {
        config: Option<Config>,
        #[serde(default)]
        disabled: bool,
    }
    #[derive(Deserialize)]
    struct Config {
        #[serde(default)]
        sync_always: bool,
    }
    let answer: Answer = serde_json::from_slice(answer)?;
    let Some(data) = answer.data.filter(|data| !data.disabled) else {
        return Ok(None);
    };
    Ok(Some(ServerSettings {
        name: answer.server.name,
        // A server that does not say so does not.
        sync_always: data.config.is_some_and(|config| config.sync_always),
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn bad_versions_are_named() {
        for (version, bad) in [
            ((2, 10, 19), false),
            ((2, 10, 20), true),
            ((2, 10, 22), true),
            ((2, 10, 23), false),
            ((2, 9, 21), false),
        ] {
            let mut warnings = Vec::new();
            warn_of_version(version, &mut warnings);
            assert_eq!(!warnings.is_empty(), bad, "{version:?}");
        }
    }

    #[test]
    fn limits_of_an_account_are_read() {
        let read = |text: &str| read_account_limit(text.as_bytes());
        assert_eq!(
            read(r#"{"type":"x","limits":{"max_memory":-1,"max_storage":200000}}"#),
            Some(200_000)
        );
        assert_eq!(read(r#"{"limits":{"max_storage":-1}}"#), None);
        assert_eq!(read(r#"{"error":{"code":503}}"#), None);
    }

    #[test]
    fn settings_of_a_server_are_read() {
        let read = |text: &str| read_settings(text.as_bytes()).unwrap();
        let always = read(
            r#"{"server":{"name":"n0","ver":"2.12.1"},"data":{"config":{"sync_interval":120000000000,"sync_always":true}}}"#,
        );
        assert!(always.unwrap().sync_always);
        let lazy = read(r#"{"server":{"name":"n0"},"data":{"config":{"max_memory":1}}}"#);
        assert!(!lazy.unwrap().sync_always);
        let none = read(r#"{"server":{"name":"n0"},"data":{"disabled":true}}"#);
        assert_eq!(none, None);
        assert!(read_settings(b"nonsense").is_err());
    }
}
