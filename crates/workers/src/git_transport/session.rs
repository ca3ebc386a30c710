//! One operation on a remote: its cancel token, its deadline, and the cause of its failure.
//!
//! libgit2 calls a transport on the thread that started the operation and keeps of an error no
//! more than a text. So the operation stands in a thread-local while libgit2 runs, and the
//! transport notes there, with its type, why it gave up.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use daybook_events::RepositoryUrl;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::policy::local_path;
use super::{GitTransport, TransportError, prepare_process};

thread_local! {
    static CURRENT: RefCell<Option<Session>> = const { RefCell::new(None) };
}

/// One operation. Its network work is done on the runtime that it was made in, while its thread
/// waits: so the thread is one of those for blocking work, never a worker of the runtime.
#[derive(Clone)]
pub(crate) struct Session {
    inner: Arc<Inner>,
}

struct Inner {
    transport: GitTransport,
    cancel: CancellationToken,
    started: Instant,
    received: AtomicU64,
    failure: Mutex<Option<TransportError>>,
    runtime: Handle,
}

impl Session {
    pub(crate) fn new(transport: &GitTransport, cancel: &CancellationToken) -> Self {
        Self {
            inner: Arc::new(Inner {
                transport: transport.clone(),
                cancel: cancel.clone(),
                started: Instant::now(),
                received: AtomicU64::new(0),
                failure: Mutex::new(None),
                runtime: Handle::current(),
            }),
        }
    }

    /// Runs an operation of libgit2 on a remote, if its URL is allowed. The error says what our
    /// transport found, where it found something.
    pub(crate) fn run<T>(
        &self,
        url: &RepositoryUrl,
        operation: impl FnOnce() -> Result<T, git2::Error>,
    ) -> Result<T, TransportError> {
        prepare_process()?;
        self.check_cancelled()?;
        self.transport()
            .config()
            .policy
            .check_scheme(url.as_str())?;
        check_local(url)?;
        let before = CURRENT.with(|c| c.replace(Some(self.clone())));
        let result = operation();
        CURRENT.with(|c| *c.borrow_mut() = before);
        result.map_err(|e| {
            let noted = self.failure().take();
            if self.is_cancelled() {
                return TransportError::Cancelled;
            }
            noted.unwrap_or_else(|| TransportError::from_git(&e))
        })
    }

    /// The operation that this thread is in.
    pub(super) fn of_this_thread() -> Result<Self, git2::Error> {
        CURRENT.with(|c| c.borrow().clone()).ok_or_else(|| {
            git2::Error::from_str("this transport is only used through daybook's sessions")
        })
    }

    pub(super) fn transport(&self) -> &GitTransport {
        &self.inner.transport
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.inner.cancel.is_cancelled()
    }

    pub(crate) fn check_cancelled(&self) -> Result<(), TransportError> {
        if self.is_cancelled() {
            return Err(TransportError::Cancelled);
        }
        Ok(())
    }

    /// Waits for network work, until the token is cancelled, the other side stays silent for too
    /// long, or the whole operation takes too long.
    pub(super) fn wait<T>(
        &self,
        host: &str,
        work: impl Future<Output = Result<T, TransportError>>,
    ) -> Result<T, TransportError> {
        let limits = self.transport().config().limits;
        let left = limits.total.saturating_sub(self.inner.started.elapsed());
        self.inner.runtime.block_on(async {
            tokio::select! {
                biased;
                () = self.inner.cancel.cancelled() => Err(TransportError::Cancelled),
                done = tokio::time::timeout(left.min(limits.idle), work) => done.unwrap_or_else(|_| {
                    Err(TransportError::Unavailable {
                        host: host.to_owned(),
                        reason: if left < limits.idle {
                            format!("the operation takes longer than {} s", limits.total.as_secs())
                        } else {
                            format!("no answer within {} s", limits.idle.as_secs())
                        },
                    })
                }),
            }
        })
    }

    /// Counts what was received, and refuses what is too much.
    pub(super) fn received(&self, bytes: usize) -> Result<(), TransportError> {
        let sum = self
            .inner
            .received
            .fetch_add(bytes as u64, Ordering::Relaxed)
            .saturating_add(bytes as u64);
        self.check_received(sum)
    }

    /// Refuses a number of received bytes that is too large; for transports that count themselves.
    pub(crate) fn check_received(&self, bytes: u64) -> Result<(), TransportError> {
        let limit = self.transport().config().limits.received_bytes;
        if bytes > limit {
            return Err(TransportError::TooLarge {
                what: "what is received",
                limit,
            });
        }
        Ok(())
    }

    /// Whether the whole operation has taken too long; for transports that do not wait here.
    pub(crate) fn is_overdue(&self) -> bool {
        self.inner.started.elapsed() > self.transport().config().limits.total
    }

    /// Notes why the transport gives up, and makes of it what libgit2 passes through.
    pub(crate) fn fail(&self, error: TransportError) -> git2::Error {
        let text = git2::Error::from_str(&error.to_string());
        // The first cause counts; what fails after it fails because of it.
        self.failure().get_or_insert(error);
        text
    }

    /// The same for a stream.
    pub(super) fn fail_io(&self, error: TransportError) -> io::Error {
        let text = io::Error::other(error.to_string());
        self.failure().get_or_insert(error);
        text
    }

    fn failure(&self) -> std::sync::MutexGuard<'_, Option<TransportError>> {
        self.inner
            .failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a local URL leads to a repository: libgit2 has but one error for whatever is wrong.
fn check_local(url: &RepositoryUrl) -> Result<(), TransportError> {
    let Some(path) = local_path(url) else {
        return Ok(());
    };
    let not_one = |reason: String| TransportError::NotARepository {
        url: url.to_string(),
        reason,
    };
    match std::fs::metadata(&path) {
        Ok(m) if m.is_dir() => {}
        Ok(_) => return Err(not_one("it is no folder".into())),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            return Err(TransportError::Forbidden {
                host: url.to_string(),
                reason: e.to_string(),
            });
        }
        Err(e) => return Err(not_one(e.to_string())),
    }
    match git2::Repository::open(&path) {
        Ok(_) => Ok(()),
        Err(e) => Err(not_one(printable(e.message()))),
    }
}

/// Does blocking work on a thread of its own and waits for it. When the caller stops waiting, the
/// work's token is cancelled, so that it stops too.
pub(crate) async fn in_background<T: Send + 'static>(
    cancel: &CancellationToken,
    work: impl FnOnce(CancellationToken) -> T + Send + 'static,
) -> T {
    let token = cancel.child_token();
    let guard = token.clone().drop_guard();
    // What is asked of a remote on that thread belongs to the same trace.
    let work = daybook_trace::carried(move || work(token));
    let result = tokio::task::spawn_blocking(work).await;
    guard.disarm();
    match result {
        Ok(value) => value,
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is going down; nobody waits for the result any more.
            Err(_) => std::future::pending().await,
        },
    }
}

/// Text from elsewhere, fit for a log line: one line, no control characters, at most 500 of them.
pub(crate) fn printable(text: &str) -> String {
    let mut line: String = text
        .trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(500)
        .collect();
    line.truncate(line.trim_end().len());
    line
}
