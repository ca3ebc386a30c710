//! The connection to NATS: how it is made, and how its users learn that it was lost.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_nats::ConnectOptions;
use async_nats::jetstream;
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
        options = match auth {
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

    fn addresses(&self) -> Result<Vec<async_nats::ServerAddr>, ConnectError> {
        if self.servers.is_empty() {
            return Err(ConnectError::NoServer);
        }
        self.servers
            .iter()
            .map(|server| {
                server
                    .parse()
                    .map_err(|source| ConnectError::Address { source })
            })
            .collect()
    }
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

/// Whether the connection stands, and how often it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) up: bool,
    pub(crate) made: u64,
}

/// A connection that is made again whenever it is lost, for ever. Clones share it.
#[derive(Clone)]
pub struct Connection {
    client: async_nats::Client,
    context: jetstream::Context,
    link: watch::Receiver<Link>,
    options: Arc<NatsOptions>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("servers", &self.options.servers.len())
            .field("link", &*self.link.borrow())
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects to one of the servers. Tries again until `connect_timeout` has passed, unless the
    /// answer is one that no waiting mends.
    pub async fn open(options: NatsOptions) -> Result<Self, ConnectError> {
        let addresses = options.addresses()?;
        let (link_sender, link) = watch::channel(Link { up: true, made: 1 });
        let link_sender = Arc::new(link_sender);
        let connect_options = options
            .connect_options(&options.auth)
            .await?
            .event_callback(move |event| {
                let link_sender = link_sender.clone();
                async move { note_event(&link_sender, &event) }
            });
        let client = connect(&addresses, connect_options, options.connect_timeout).await?;
        let context = jetstream::context::ContextBuilder::new()
            .timeout(options.answer_timeout)
            .build(client.clone());
        Ok(Self {
            client,
            context,
            link,
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

    /// Watches the connection from its present state on.
    pub(crate) fn watch(&self) -> LinkWatch {
        let mut receiver = self.link.clone();
        let seen = *receiver.borrow_and_update();
        LinkWatch { receiver, seen }
    }

    /// Waits until the connection stands, at most as long as an answer may take.
    pub(crate) async fn wait_until_up(&self) -> bool {
        if self.link.borrow().up {
            return true;
        }
        let mut link = self.link.clone();
        let up = link.wait_for(|link| link.up);
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
    receiver: watch::Receiver<Link>,
    seen: Link,
}

impl LinkWatch {
    /// Ends when the connection has been lost since this watch was made: what was asked before
    /// will get no answer, and what was subscribed may have missed something.
    pub(crate) async fn lost(&mut self) {
        loop {
            let link = *self.receiver.borrow_and_update();
            if !link.up || link.made != self.seen.made {
                return;
            }
            if self.receiver.changed().await.is_err() {
                // The client is being torn down: there is nothing to wait for, and nobody to tell.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Whether the connection stood when this watch was made.
    pub(crate) fn was_up(&self) -> bool {
        self.seen.up
    }
}

fn note_event(link: &watch::Sender<Link>, event: &async_nats::Event) {
    match event {
        // The event of the very first connection comes when `Link` says so already.
        async_nats::Event::Connected => {
            link.send_if_modified(|link| {
                let again = !link.up;
                if again {
                    link.up = true;
                    link.made += 1;
                }
                again
            });
        }
        async_nats::Event::Disconnected | async_nats::Event::Closed => {
            link.send_if_modified(|link| std::mem::replace(&mut link.up, false));
        }
        async_nats::Event::SlowConsumer(subscription) => {
            tracing::warn!(subscription, "a reader of the log did not keep up");
        }
        async_nats::Event::ServerError(error) => {
            tracing::warn!(%error, "the NATS server reports an error");
        }
        async_nats::Event::ClientError(error) => {
            tracing::debug!(%error, "connecting to NATS");
        }
        _ => {}
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
