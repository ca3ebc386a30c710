//! How Daybook's streams are set up, and what is made of one that is set up differently.

use std::time::Duration;

use async_nats::jetstream::context::{CreateStreamErrorKind, GetStreamErrorKind};
use async_nats::jetstream::stream::{
    Config, DiscardPolicy, PersistenceMode, RetentionPolicy, StorageType, Stream,
};
use daybook_events::log::MAX_EVENT_BYTES;

use super::bulletin::BulletinOptions;
use super::connection::Connection;
use super::line_log::LineOptions;
use super::log::{LogOptions, all_subjects};

/// Room for the headers of a message beside its payload.
const HEADER_BYTES: usize = 1024;
/// How long the servers may take to answer for JetStream when the log is opened.
const PATIENCE: Duration = Duration::from_secs(30);
/// The first with direct get and with consumers that are created or updated in one call.
const OLDEST_SERVER: (u64, u64, u64) = (2, 9, 0);
/// How long a message id is remembered.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(120);

/// What a stream is for, which says how strictly it is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// Nothing may ever vanish from it.
    Ledger,
    /// Old messages go.
    Output,
}

/// What a stream of output that is there is changed to have as it is wanted. All else stays as
/// somebody has set it up.
#[derive(Debug, Clone, Copy, Default)]
struct Insists {
    /// How long it keeps messages.
    age: bool,
    /// How many bytes of them.
    bytes: bool,
}

/// A stream as Daybook wants it.
#[derive(Debug, Clone)]
pub(super) struct StreamSetup {
    purpose: Purpose,
    insists: Insists,
    config: Config,
}

/// A stream that is there.
pub(super) struct OpenedStream {
    pub(super) stream: Stream<()>,
    /// In nanoseconds since 1970.
    pub(super) created: i128,
    pub(super) allow_direct: bool,
    /// Several servers have to agree on what is stored.
    pub(super) replicated: bool,
    /// In which harmless ways it is not what was wanted.
    pub(super) notes: Vec<String>,
}

/// Why a log on NATS could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The server is older than what JetStream is used for here.
    #[error("NATS {version} is too old; Daybook needs 2.9 or later")]
    ServerTooOld {
        /// Its version.
        version: String,
    },
    /// The servers do not take messages as large as an event may be.
    #[error(
        "the NATS servers take messages of at most {max_payload} bytes, and events need up to \
         {needed}; raise `max_payload` in their configuration"
    )]
    MessagesTooSmall {
        /// What they take.
        max_payload: usize,
        /// What an event may have, its headers included.
        needed: usize,
    },
    /// The servers do not answer for JetStream.
    #[error(
        "JetStream does not answer ({reason}); is it enabled on the servers and for this account?"
    )]
    Unavailable {
        /// What they said last.
        reason: String,
    },
    /// There is no stream, and none was to be created.
    #[error("there is no stream {stream}")]
    Missing {
        /// Its name.
        stream: String,
    },
    /// There is no stream, and none could be created.
    #[error("the stream {stream} could not be created: {reason}")]
    NotCreated {
        /// Its name.
        stream: String,
        /// What the server said.
        reason: String,
    },
    /// There is a stream of this name, and it would not keep what is entrusted to it.
    #[error(
        "the stream {stream} is not set up as a ledger: {}; change it with `nats stream edit \
         {stream}`, or choose another stream name",
        problems.join("; ")
    )]
    Unsuitable {
        /// Its name.
        stream: String,
        /// What is wrong with it.
        problems: Vec<String>,
    },
}

impl StreamSetup {
    /// The stream of events: everything is kept, nothing can be taken out.
    pub(super) fn events(options: &LogOptions) -> Self {
        Self {
            purpose: Purpose::Ledger,
            insists: Insists::default(),
            config: Config {
                name: options.stream.clone(),
                description: Some("Daybook: the ledger".to_owned()),
                subjects: vec![all_subjects()],
                max_message_size: (MAX_EVENT_BYTES + HEADER_BYTES) as i32,
                discard: DiscardPolicy::New,
                deny_delete: true,
                deny_purge: true,
                ..common(options.replicas)
            },
        }
    }

    /// The stream of lines: the oldest go when they are too old or too many.
    pub(super) fn lines(options: &LineOptions) -> Self {
        Self {
            purpose: Purpose::Output,
            insists: Insists {
                age: options.insists_age,
                bytes: options.insists_bytes,
            },
            config: Config {
                name: options.stream.clone(),
                description: Some("Daybook: output of builds and containers".to_owned()),
                subjects: vec![super::line_log::all_subjects()],
                max_age: options.max_age,
                max_bytes: i64::try_from(options.max_bytes).unwrap_or(i64::MAX),
                discard: DiscardPolicy::Old,
                ..common(options.replicas)
            },
        }
    }

    /// A stream of what is made from the log: the oldest go when they are too old or too many.
    pub(super) fn bulletin(options: &BulletinOptions) -> Self {
        Self {
            purpose: Purpose::Output,
            insists: Insists::default(),
            config: Config {
                name: options.stream.clone(),
                description: Some("Daybook: the ledger in the words of others".to_owned()),
                subjects: vec![format!("{}.>", options.prefix)],
                max_age: options.max_age,
                max_bytes: i64::try_from(options.max_bytes).unwrap_or(i64::MAX),
                discard: DiscardPolicy::Old,
                ..common(options.replicas)
            },
        }
    }

    /// What a stream that is there is to be changed to, if it is not what is insisted on.
    fn changed(&self, found: &Config) -> Option<Config> {
        let mut config = found.clone();
        if self.insists.age {
            config.max_age = self.config.max_age;
        }
        if self.insists.bytes {
            config.max_bytes = self.config.max_bytes;
        }
        (kept(&config) != kept(found)).then_some(config)
    }
}

fn common(replicas: usize) -> Config {
    Config {
        retention: RetentionPolicy::Limits,
        storage: StorageType::File,
        num_replicas: replicas,
        max_bytes: -1,
        max_messages: -1,
        max_messages_per_subject: -1,
        max_consumers: -1,
        duplicate_window: DUPLICATE_WINDOW,
        allow_direct: true,
        ..Config::default()
    }
}

/// Opens a stream, creating it if there is none. Waits for servers that are only starting.
pub(super) async fn open(
    connection: &Connection,
    setup: &StreamSetup,
) -> Result<OpenedStream, OpenError> {
    let server = connection.client().server_info();
    if connection.server_version() < OLDEST_SERVER {
        return Err(OpenError::ServerTooOld {
            version: server.version,
        });
    }
    if server.max_payload < MAX_EVENT_BYTES + HEADER_BYTES {
        return Err(OpenError::MessagesTooSmall {
            max_payload: server.max_payload,
            needed: MAX_EVENT_BYTES + HEADER_BYTES,
        });
    }
    let until = tokio::time::Instant::now() + PATIENCE;
    loop {
        let reason = match try_to_open(connection, setup).await {
            Ok(opened) => return Ok(opened),
            Err(Setback::Final(error)) => return Err(error),
            Err(Setback::Passing(reason)) => reason,
        };
        if tokio::time::Instant::now() > until {
            return Err(OpenError::Unavailable { reason });
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// That a stream is there. What else is wrong shows when it is opened.
pub(super) async fn must_exist(connection: &Connection, stream: &str) -> Result<(), OpenError> {
    match connection.context().get_stream(stream).await {
        Err(error) if matches!(error.kind(), GetStreamErrorKind::JetStream(e) if e.code() == 404) => {
            Err(OpenError::Missing {
                stream: stream.to_owned(),
            })
        }
        _ => Ok(()),
    }
}

enum Setback {
    Passing(String),
    Final(OpenError),
}

async fn try_to_open(
    connection: &Connection,
    setup: &StreamSetup,
) -> Result<OpenedStream, Setback> {
    let context = connection.context();
    let name = &setup.config.name;
    let found = match context.get_stream(name).await {
        Ok(found) => Some(found),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(error) if error.code() == 404 => None,
            GetStreamErrorKind::InvalidStreamName | GetStreamErrorKind::EmptyName => {
                return Err(not_created(name, "this cannot be a stream's name"));
            }
            _ => return Err(Setback::Passing(error.to_string())),
        },
    };
    let stream = match found {
        Some(found) => found,
        None => match context.create_stream(&setup.config).await {
            Ok(created) => created,
            Err(error) => {
                return Err(match error.kind() {
                    // Another process was faster; it wants the same.
                    CreateStreamErrorKind::JetStream(e) if e.error_code().0 == 10058 => {
                        Setback::Passing(e.to_string())
                    }
                    // "Subjects overlap with an existing stream", which may be the very stream that
                    // is asked for: a server that makes it for another process at that moment has
                    // looked for the name before, and for the subjects after.
                    CreateStreamErrorKind::JetStream(e) if e.error_code().0 == 10065 => {
                        match in_the_way(connection, setup).await {
                            Some(other) => not_created(name, format!("{e}, {other}")),
                            None => Setback::Passing(e.to_string()),
                        }
                    }
                    CreateStreamErrorKind::JetStream(e) if e.code() == 503 => {
                        Setback::Passing(e.to_string())
                    }
                    // "No suitable peers for placement", because of a member of the cluster that
                    // is only starting.
                    CreateStreamErrorKind::JetStream(e)
                        if e.error_code().0 == 10005 && e.to_string().contains("peer offline") =>
                    {
                        Setback::Passing(e.to_string())
                    }
                    CreateStreamErrorKind::JetStream(e) => not_created(name, e),
                    CreateStreamErrorKind::TimedOut
                    | CreateStreamErrorKind::JetStreamUnavailable
                    | CreateStreamErrorKind::Response => Setback::Passing(error.to_string()),
                    _ => not_created(name, error),
                });
            }
        },
    };
    let info = stream.cached_info();
    let Findings {
        problems,
        mut notes,
    } = compare(setup, &info.config);
    if !problems.is_empty() {
        return Err(Setback::Final(OpenError::Unsuitable {
            stream: name.clone(),
            problems,
        }));
    }
    if let Some(config) = setup.changed(&info.config) {
        match context.update_stream(&config).await {
            Ok(_) => notes = compare(setup, &config).notes,
            Err(error) => notes.push(format!("the stream {name} could not be changed: {error}")),
        }
    }
    let created = info.created.unix_timestamp_nanos();
    // nats-server 2.9.10 shows a stream that another process is just making before it has its time,
    // with that of the year 1: who took it for the stream's would see another stream a moment later.
    if created < 0 {
        return Err(Setback::Passing(format!(
            "the stream {name} is only being made"
        )));
    }
    let allow_direct = info.config.allow_direct;
    let replicated = info.config.num_replicas > 1;
    let stream = context
        .get_stream_no_info(name)
        .await
        .map_err(|error| Setback::Passing(error.to_string()))?;
    Ok(OpenedStream {
        stream,
        created,
        allow_direct,
        replicated,
        notes,
    })
}

/// The stream of another name that has subjects of this one.
async fn in_the_way(connection: &Connection, setup: &StreamSetup) -> Option<String> {
    for subject in &setup.config.subjects {
        // An answer that does not come says nothing about who is in the way.
        if let Ok(holder) = connection.context().stream_by_subject(subject).await
            && holder != setup.config.name
        {
            return Some(holder);
        }
    }
    None
}

fn not_created(stream: &str, reason: impl ToString) -> Setback {
    Setback::Final(OpenError::NotCreated {
        stream: stream.to_owned(),
        reason: reason.to_string(),
    })
}

/// Takes the subjects of the ledger from a stream, so that another can have them. Its messages stay
/// as they are. Returns the subject that it has from now on, under which nobody publishes.
///
/// It is no error if there is no such stream, or if it was set aside before.
pub async fn set_aside(connection: &Connection, stream: &str) -> Result<String, SetAsideError> {
    let failed = |reason: String| SetAsideError {
        stream: stream.to_owned(),
        reason,
    };
    let subject = format!("daybook.aside.{stream}.>");
    let context = connection.context();
    let mut config = match context.get_stream(stream).await {
        Ok(found) => found.cached_info().config.clone(),
        Err(error) => {
            return match error.kind() {
                GetStreamErrorKind::JetStream(error) if error.code() == 404 => Ok(subject),
                _ => Err(failed(error.to_string())),
            };
        }
    };
    config.subjects = vec![subject.clone()];
    let updated = context.update_stream(&config).await;
    updated.map_err(|error| failed(error.to_string()))?;
    Ok(subject)
}

/// Why a stream could not be set aside.
#[derive(Debug, thiserror::Error)]
#[error("the stream {stream} could not be set aside: {reason}")]
pub struct SetAsideError {
    /// Its name.
    stream: String,
    /// What the server said.
    reason: String,
}

/// What was found out about a stream.
#[derive(Debug, Default)]
struct Findings {
    /// Why it must not be used.
    problems: Vec<String>,
    /// What is different, and harmless.
    notes: Vec<String>,
}

impl Findings {
    fn refuse_if(&mut self, wrong: bool, problem: impl FnOnce() -> String) {
        if wrong {
            self.problems.push(problem());
        }
    }

    fn note_if(&mut self, different: bool, note: impl FnOnce() -> String) {
        if different {
            self.notes.push(note());
        }
    }
}

/// How long a stream keeps messages, and how many bytes of them.
fn kept(config: &Config) -> (Duration, i64) {
    (config.max_age, config.max_bytes.max(0))
}

/// Compares a stream that is there with what is wanted.
fn compare(setup: &StreamSetup, found: &Config) -> Findings {
    let wanted = &setup.config;
    let mut findings = Findings::default();
    findings.refuse_if(found.subjects != wanted.subjects, || {
        format!(
            "its subjects are {:?} and not {:?}",
            found.subjects, wanted.subjects
        )
    });
    findings.refuse_if(found.mirror.is_some() || found.sources.is_some(), || {
        "it copies another stream".to_owned()
    });
    findings.refuse_if(found.subject_transform.is_some(), || {
        "it changes subjects".to_owned()
    });
    findings.refuse_if(found.no_ack, || "it acknowledges nothing".to_owned());
    findings.refuse_if(found.sealed, || "it is sealed".to_owned());
    findings.refuse_if(found.retention != RetentionPolicy::Limits, || {
        "its messages go when they were consumed (retention must be limits)".to_owned()
    });
    let size = found.max_message_size;
    findings.refuse_if(size > 0 && size < wanted.max_message_size, || {
        format!("it takes messages of at most {size} bytes")
    });
    match setup.purpose {
        Purpose::Ledger => look_as_at_a_ledger(found, wanted, &mut findings),
        Purpose::Output => {
            findings.note_if(kept(found) != kept(wanted), || {
                format!(
                    "the stream {} keeps output for {:?} and at most {} bytes, as it was set up",
                    found.name, found.max_age, found.max_bytes
                )
            });
        }
    }
    findings.note_if(found.num_replicas != wanted.num_replicas, || {
        format!(
            "the stream {} has {} replicas and not {}; `nats stream edit` changes that",
            found.name, found.num_replicas, wanted.num_replicas
        )
    });
    findings
}

fn look_as_at_a_ledger(found: &Config, wanted: &Config, findings: &mut Findings) {
    findings.refuse_if(found.storage != StorageType::File, || {
        "it is kept in memory only".to_owned()
    });
    findings.refuse_if(found.persist_mode == Some(PersistenceMode::Async), || {
        "it acknowledges before it stores (persist_mode async)".to_owned()
    });
    findings.refuse_if(
        found.max_bytes > 0
            || found.max_messages > 0
            || found.max_messages_per_subject > 0
            || !found.max_age.is_zero(),
        || "it has limits (bytes, messages, messages per subject or age)".to_owned(),
    );
    findings.refuse_if(found.allow_rollup, || "it allows rollups".to_owned());
    findings.refuse_if(!found.deny_delete, || {
        "messages can be deleted (deny_delete must be set)".to_owned()
    });
    findings.refuse_if(!found.deny_purge, || {
        "it can be purged (deny_purge must be set)".to_owned()
    });
    findings.refuse_if(found.allow_message_ttl, || {
        "messages can expire (allow_msg_ttl)".to_owned()
    });
    findings.refuse_if(found.allow_message_counter, || "it counts".to_owned());
    findings.refuse_if(found.first_sequence.is_some_and(|first| first > 1), || {
        "it does not begin with sequence 1".to_owned()
    });
    findings.refuse_if(found.duplicate_window < wanted.duplicate_window, || {
        format!(
            "it remembers message ids for {:?} only (duplicate_window must be {:?} or more)",
            found.duplicate_window, wanted.duplicate_window
        )
    });
    findings.note_if(found.discard != wanted.discard, || {
        format!(
            "the stream {} would discard old messages at a limit; it has none",
            found.name
        )
    });
    findings.note_if(!found.allow_direct, || {
        format!(
            "the stream {} does not allow direct get; reading single events is slower",
            found.name
        )
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> StreamSetup {
        StreamSetup::events(&LogOptions::default())
    }

    #[test]
    fn a_stream_as_wanted_is_taken_without_a_word() {
        let findings = compare(&ledger(), &ledger().config);
        assert!(findings.problems.is_empty() && findings.notes.is_empty());
        let lines = StreamSetup::lines(&LineOptions::default());
        let findings = compare(&lines, &lines.config);
        assert!(findings.problems.is_empty() && findings.notes.is_empty());
    }

    #[test]
    fn what_could_lose_events_is_refused() {
        let changes: [fn(&mut Config); 14] = [
            |c| c.subjects = vec!["daybook.ev.shop.>".to_owned()],
            |c| c.subjects.push("other".to_owned()),
            |c| c.retention = RetentionPolicy::WorkQueue,
            |c| c.storage = StorageType::Memory,
            |c| c.max_bytes = 1 << 30,
            |c| c.max_messages = 1_000_000,
            |c| c.max_messages_per_subject = 1,
            |c| c.max_age = Duration::from_secs(86_400),
            |c| c.allow_rollup = true,
            |c| c.deny_delete = false,
            |c| c.deny_purge = false,
            |c| c.max_message_size = 1000,
            |c| c.duplicate_window = Duration::from_secs(1),
            |c| c.persist_mode = Some(PersistenceMode::Async),
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut found = ledger().config;
            change(&mut found);
            let findings = compare(&ledger(), &found);
            assert_eq!(findings.problems.len(), 1, "change {number}: {findings:?}");
        }
    }

    #[test]
    fn what_is_merely_different_is_said() {
        let changes: [fn(&mut Config); 3] = [
            |c| c.num_replicas = 3,
            |c| c.allow_direct = false,
            |c| c.discard = DiscardPolicy::Old,
        ];
        for change in changes {
            let mut found = ledger().config;
            change(&mut found);
            let findings = compare(&ledger(), &found);
            assert!(findings.problems.is_empty(), "{findings:?}");
            assert_eq!(findings.notes.len(), 1);
        }
    }
}
