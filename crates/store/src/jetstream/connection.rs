//! The connection to NATS: how it is made, and how its users learn that it was lost.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::ConnectOptions;
use async_nats::jetstream;
use daybook_events::log::Link;
use tokio::sync::watch;

/// How a client proves who it is.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum NatsAuth {
    /// Not at all, or with what the URL carries (`nats://user:password@host`).
    #[default]
    None,
    /// With a credentials file (JWT and seed), as `nsc` writes it.
    CredentialsFile(PathBuf),
    /// With a user and a password.
    UserPassword {
        /// The user.
        user: String,
        /// The password.
        password: String,
    },
    /// With a token.
    Token(String),
}

impl fmt::Debug for NatsAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::CredentialsFile(path) => f.debug_tuple("CredentialsFile").field(path).finish(),
            Self::UserPassword { user, .. } => write!(f, "UserPassword({user:?}, …)"),
            Self::Token(_) => f.write_str("Token(…)"),
        }
    }
}

/// Where NATS is, and how to talk to it. What it shows of itself has no secrets.
#[derive(Clone)]
pub struct NatsOptions {
    /// Addresses of servers of one cluster: `nats://host:port` or `tls://host:port`. One that
    /// answers is enough.
    pub servers: Vec<String>,
    /// How to prove who we are.
    pub auth: NatsAuth,
    /// Certificates (PEM) of the authority that signed the servers' certificates, if it is not
    /// one that the system knows.
    pub root_certificates: Vec<PathBuf>,
    /// Our own certificate and key (PEM), where the servers ask for them.
    pub client_certificate: Option<(PathBuf, PathBuf)>,
    /// The name under which the servers list this connection.
    pub name: String,
    /// How long to wait for an acknowledgement or an answer before asking what became of it.
    pub answer_timeout: Duration,
    /// How long to try to reach a server at the start. Afterwards reconnecting never ends.
    pub connect_timeout: Duration,
    /// How to get into the system account, if that is allowed. Only there can be read whether the
    /// servers sync before they acknowledge.
    pub system_auth: Option<NatsAuth>,
}

impl fmt::Debug for NatsOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An address may carry a user and a password before its `@`.
        let without_user = |server: &String| match server.rsplit_once('@') {
            Some((_, host)) => host.to_owned(),
            None => server.clone(),
        };
        let servers: Vec<String> = self.servers.iter().map(without_user).collect();
        f.debug_struct("NatsOptions")
            .field("servers", &servers)
            .field("auth", &self.auth)
            .field("name", &self.name)
            .field("answer_timeout", &self.answer_timeout)
            .field("connect_timeout", &self.connect_timeout)
            .field("system_auth", &self.system_auth)
            .finish_non_exhaustive()
    }
}

impl NatsOptions {
    /// Options with the usual timeouts for one or several addresses separated by commas.
    pub fn new(servers: &str) -> Self {
        Self {
            servers: servers
                .split(',')
                .map(|server| server.trim().to_owned())
                .filter(|server| !server.is_empty())
                .collect(),
            auth: NatsAuth::None,
            root_certificates: Vec::new(),
            client_certificate: None,
            name: "daybook".to_owned(),
            answer_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(10),
            system_auth: None,
        }
    }

    async fn connect_options(&self, auth: &NatsAuth) -> Result<ConnectOptions, ConnectError> {
        let mut options = ConnectOptions::new()
            .name(&self.name)
            .request_timeout(Some(self.answer_timeout))
            .connection_timeout(self.connect_timeout.min(Duration::from_secs(5)))
            .ping_interval(Duration::from_secs(20))
            .max_reconnects(None)
            .reconnect_delay_callback(reconnect_delay)
            // A reader asks for at most this many messages before it has taken some.
            .subscription_capacity(super::pull::MOST_OUTSTANDING + 1024)
            .client_capacity(8192)
            .read_buffer_capacity(u16::MAX);
        let carried = match auth {
            NatsAuth::None => self.carried()?,
            _ => None,
        };
        options = match carried.as_ref().unwrap_or(auth) {
            NatsAuth::None => options,
            NatsAuth::CredentialsFile(path) => {
                let text = tokio::fs::read_to_string(path).await.map_err(|source| {
                    ConnectError::Credentials {
                        path: path.clone(),
                        source,
                    }
                })?;
                options
                    .credentials(&text)
                    .map_err(|source| ConnectError::Credentials {
                        path: path.clone(),
                        source,
                    })?
            }
            NatsAuth::UserPassword { user, password } => {
                options.user_and_password(user.clone(), password.clone())
            }
            NatsAuth::Token(token) => options.token(token.clone()),
        };
        for path in &self.root_certificates {
            options = options.add_root_certificates(path.clone());
        }
        if let Some((certificate, key)) = &self.client_certificate {
            options = options.add_client_certificate(certificate.clone(), key.clone());
        }
        Ok(options)
    }

    /// The servers, without the credentials that their addresses carry: the client writes
    /// addresses into its log.
    fn addresses(&self) -> Result<Vec<async_nats::ServerAddr>, ConnectError> {
        if self.servers.is_empty() {
            return Err(ConnectError::NoServer);
        }
        self.servers
            .iter()
            .map(|server| {
                let address = parse(server)?;
                let mut url = address.into_inner();
                // Only addresses that can have none refuse to be without.
                let _ = url.set_username("");
                let _ = url.set_password(None);
                async_nats::ServerAddr::from_url(url)
                    .map_err(|source| ConnectError::Address { source })
            })
            .collect()
    }

    /// The credentials that the addresses carry; those of the first one that does, as servers of one
    /// cluster know the same users.
    fn carried(&self) -> Result<Option<NatsAuth>, ConnectError> {
        for server in &self.servers {
            let address = parse(server)?;
            match (address.username(), address.password()) {
                (Some(user), Some(password)) => {
                    let (user, password) = (decoded(user), decoded(password));
                    return Ok(Some(NatsAuth::UserPassword { user, password }));
                }
                (Some(token), None) => return Ok(Some(NatsAuth::Token(decoded(token)))),
                (None, _) => {}
            }
        }
        Ok(None)
    }
}

fn parse(server: &str) -> Result<async_nats::ServerAddr, ConnectError> {
    server
        .parse()
        .map_err(|source| ConnectError::Address { source })
}

/// A user or a password as it stands in an address, without its percent signs.
fn decoded(text: &str) -> String {
    let text = text.as_bytes();
    let mut bytes = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let hex = |i: usize| char::from(*text.get(i)?).to_digit(16);
        match (text[at], hex(at + 1), hex(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push((16 * high + low) as u8);
                at += 3;
            }
            (byte, ..) => {
                bytes.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Why no connection to NATS could be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The options name no server.
    #[error("no NATS server is given")]
    NoServer,
    /// An address is none. It is not shown, because it may carry a password.
    #[error("a NATS address is not valid; it should look like nats://host:4222")]
    Address {
        /// What is wrong with it.
        source: std::io::Error,
    },
    /// The credentials file cannot be used.
    #[error("the NATS credentials file {path} cannot be used")]
    Credentials {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// No server answers, or none lets us in.
    #[error("no NATS server could be reached")]
    Unreachable(#[source] async_nats::ConnectError),
}

/// Fast at first, then twice as long each time, up to two seconds.
fn reconnect_delay(attempts: usize) -> Duration {
    let doublings = attempts.saturating_sub(1).min(8) as u32;
    Duration::from_millis(10 * 2_u64.pow(doublings)).min(Duration::from_secs(2))
}

/// How often the connection was lost and made again, both counted: it stands if this is even.
type Turns = u64;

fn is_up(turns: Turns) -> bool {
    turns.is_multiple_of(2)
}

/// A connection that is made again whenever it is lost, for ever. Clones share it.
#[derive(Clone)]
pub struct Connection {
    client: async_nats::Client,
    context: jetstream::Context,
    turns: watch::Receiver<Turns>,
    /// The same number, cheap enough to be looked at for every append.
    turns_now: Arc<AtomicU64>,
    options: Arc<NatsOptions>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("servers", &self.options.servers.len())
            .field("is_up", &self.is_up())
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects to one of the servers. Tries again until `connect_timeout` has passed, unless the
    /// answer is one that no waiting mends.
    pub async fn open(options: NatsOptions) -> Result<Self, ConnectError> {
        let addresses = options.addresses()?;
        let (sender, turns) = watch::channel(0);
        let sender = Arc::new(sender);
        let turns_now = Arc::new(AtomicU64::new(0));
        let now = turns_now.clone();
        let connect_options = options
            .connect_options(&options.auth)
            .await?
            .event_callback(move |event| {
                let (sender, now) = (sender.clone(), now.clone());
                async move { note_event(&sender, &now, &event) }
            });
        let client = connect(&addresses, connect_options, options.connect_timeout).await?;
        let context = jetstream::context::ContextBuilder::new()
            .timeout(options.answer_timeout)
            .build(client.clone());
        Ok(Self {
            client,
            context,
            turns,
            turns_now,
            options: Arc::new(options),
        })
    }

    /// A connection of its own into the system account, if the options say how to get there.
    pub(crate) async fn open_system(&self) -> Option<Result<async_nats::Client, ConnectError>> {
        let auth = self.options.system_auth.as_ref()?;
        let client = async {
            let options = self.options.connect_options(auth).await?;
            connect(&self.options.addresses()?, options, self.answer_timeout()).await
        };
        Some(client.await)
    }

    pub(crate) fn client(&self) -> &async_nats::Client {
        &self.client
    }

    pub(crate) fn context(&self) -> &jetstream::Context {
        &self.context
    }

    pub(crate) fn answer_timeout(&self) -> Duration {
        self.options.answer_timeout
    }

    /// Another number than before means that the connection was lost in between: what was asked
    /// before will get no answer.
    pub(crate) fn turns(&self) -> Turns {
        self.turns_now.load(Ordering::Acquire)
    }

    pub(crate) fn is_up(&self) -> bool {
        is_up(self.turns())
    }

    /// How it does.
    pub(crate) fn link(&self) -> Link {
        let seen = self.client.statistics();
        Link {
            is_up: self.is_up(),
            connects: seen.connects.load(Ordering::Relaxed),
            messages_in: seen.in_messages.load(Ordering::Relaxed),
            messages_out: seen.out_messages.load(Ordering::Relaxed),
            bytes_in: seen.in_bytes.load(Ordering::Relaxed),
            bytes_out: seen.out_bytes.load(Ordering::Relaxed),
        }
    }

    /// Watches the connection from its present state on.
    pub(crate) fn watch(&self) -> LinkWatch {
        let mut turns = self.turns.clone();
        let seen = *turns.borrow_and_update();
        LinkWatch { turns, seen }
    }

    /// Waits until the connection stands, at most as long as an answer may take.
    pub(crate) async fn wait_until_up(&self) -> bool {
        if self.is_up() {
            return true;
        }
        let mut turns = self.turns.clone();
        let up = turns.wait_for(|&turns| is_up(turns));
        matches!(
            tokio::time::timeout(self.answer_timeout(), up).await,
            Ok(Ok(_))
        )
    }

    /// Version of the server at the other end: major, minor, patch.
    pub(crate) fn server_version(&self) -> (u64, u64, u64) {
        parse_version(&self.client.server_info().version)
    }
}

/// Notices that the connection was lost since it was last asked.
#[derive(Debug, Clone)]
pub(crate) struct LinkWatch {
    turns: watch::Receiver<Turns>,
    seen: Turns,
}

impl LinkWatch {
    /// Ends when the connection has been lost since this watch was made: what was asked before
    /// will get no answer, and what was subscribed may have missed something.
    pub(crate) async fn lost(&mut self) {
        loop {
            let turns = *self.turns.borrow_and_update();
            if turns != self.seen || !is_up(turns) {
                return;
            }
            if self.turns.changed().await.is_err() {
                // The client is being torn down: there is nothing to wait for, and nobody to tell.
                std::future::pending::<()>().await;
            }
        }
    }
}

/// Events come one after the other, and nothing else changes the number.
fn note_event(sender: &watch::Sender<Turns>, now: &AtomicU64, event: &async_nats::Event) {
    let up = match event {
        async_nats::Event::Connected => true,
        async_nats::Event::Disconnected | async_nats::Event::Closed => false,
        async_nats::Event::SlowConsumer(subscription) => {
            tracing::warn!(subscription, "a reader of the log did not keep up");
            return;
        }
        async_nats::Event::ServerError(error) => {
            tracing::warn!(%error, "the NATS server reports an error");
            return;
        }
        async_nats::Event::ClientError(error) => {
            tracing::debug!(%error, "connecting to NATS");
            return;
        }
        _ => return,
    };
    // The very first connection is known of before its event comes.
    let turns = *sender.borrow();
    if is_up(turns) != up {
        now.store(turns + 1, Ordering::Release);
        sender.send_replace(turns + 1);
    }
}

async fn connect(
    addresses: &[async_nats::ServerAddr],
    options: ConnectOptions,
    within: Duration,
) -> Result<async_nats::Client, ConnectError> {
    let until = tokio::time::Instant::now() + within;
    let mut attempts = 0;
    loop {
        let error = match options.clone().connect(addresses).await {
            Ok(client) => return Ok(client),
            Err(error) => error,
        };
        attempts += 1;
        let delay = reconnect_delay(attempts).max(Duration::from_millis(50));
        let hopeless = matches!(
            error.kind(),
            async_nats::ConnectErrorKind::Authentication
                | async_nats::ConnectErrorKind::AuthorizationViolation
                | async_nats::ConnectErrorKind::ServerParse
        );
        if hopeless || tokio::time::Instant::now() + delay >= until {
            return Err(ConnectError::Unreachable(error));
        }
        tokio::time::sleep(delay).await;
    }
}

/// Reads `2.10.29`, `v2.12.0-RC.1` and the like; what is missing counts as 0.
fn parse_version(text: &str) -> (u64, u64, u64) {
    let mut numbers = text
        .trim_start_matches('v')
        .split(['.', '-', '+'])
        .map(|number| number.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    (next(), next(), next())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(parse_version("2.9.10"), (2, 9, 10));
        assert_eq!(parse_version("v2.12.0-RC.1"), (2, 12, 0));
        assert_eq!(parse_version("3"), (3, 0, 0));
    }

    #[test]
    fn secrets_are_not_shown() {
        let options = NatsOptions {
            auth: NatsAuth::UserPassword {
                user: "alice".into(),
                password: "hunter2".into(),
            },
            system_auth: Some(NatsAuth::Token("hunter2".into())),
            ..NatsOptions::new("nats://bob:hunter2@127.0.0.1:4222")
        };
        let shown = format!("{options:?}");
        assert!(shown.contains("alice"));
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    #[tokio::test]
    async fn a_wrong_address_is_refused_without_being_shown() {
        let error = Connection::open(NatsOptions::new("http://u:hunter2@h:1"))
            .await
            .unwrap_err();
        assert!(matches!(error, ConnectError::Address { .. }));
        assert!(!format!("{error} {error:?}").contains("hunter2"));
        let error = Connection::open(NatsOptions::new(" , ")).await.unwrap_err();
        assert!(matches!(error, ConnectError::NoServer));
    }

    #[tokio::test]
    async fn an_unreachable_server_is_given_up_in_time() {
        let options = NatsOptions {
            connect_timeout: Duration::from_millis(100),
            // A port on which nothing listens: privileged and unassigned.
            ..NatsOptions::new("nats://127.0.0.1:2")
        };
        let error = Connection::open(options).await.unwrap_err();
        assert!(matches!(error, ConnectError::Unreachable(_)));
    }

    #[test]
    fn reconnecting_slows_down_and_never_stops() {
        assert!(reconnect_delay(1) < reconnect_delay(5));
        assert_eq!(reconnect_delay(1_000_000), Duration::from_secs(2));
    }
}
