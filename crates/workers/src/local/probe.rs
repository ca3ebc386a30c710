//! Asking an instance whether it is ready.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use daybook_events::spec::HealthSpec;
use http_body_util::Empty;
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// How long one answer may take.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Between two questions to an instance that is ready.
const STEADY: Duration = Duration::from_secs(1);
/// The first and the longest pause between two questions to one that is not.
const EAGER: Duration = Duration::from_millis(5);
const PATIENT: Duration = Duration::from_millis(250);

/// Why an instance is not ready.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotReady {
    #[error("nothing listens on port {0}")]
    NobodyListens(u16),
    #[error("GET {path} was answered with {status}")]
    Status { path: String, status: u16 },
    #[error("GET {path} got no answer: {reason}")]
    NoAnswer { path: String, reason: String },
    #[error("the health path {0:?} is not a path")]
    NoPath(String),
}

/// Asks one instance, again and again.
#[derive(Debug)]
pub(super) struct Probe {
    port: u16,
    path: String,
    pause: Duration,
}

impl Probe {
    pub(super) fn new(port: u16, health: &HealthSpec) -> Self {
        Self {
            port,
            path: health.path.clone(),
            pause: EAGER,
        }
    }

    /// Waits until it is time, and asks. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<(), NotReady> {
        tokio::time::sleep(self.pause).await;
        let answer = self.ask().await;
        self.pause = match answer {
            Ok(()) => STEADY,
            Err(_) if self.pause == STEADY => EAGER,
            Err(_) => (self.pause * 2).min(PATIENT),
        };
        answer
    }

    async fn ask(&self) -> Result<(), NotReady> {
        let asked = tokio::time::timeout(TIMEOUT, async {
            let stream = self.connect().await?;
            if self.path.is_empty() {
                Ok(())
            } else {
                self.get(stream).await
            }
        });
        asked.await.unwrap_or_else(|_| {
            Err(self.no_answer(format!("it took longer than {} s", TIMEOUT.as_secs())))
        })
    }

    async fn connect(&self) -> Result<TcpStream, NotReady> {
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        TcpStream::connect(addr)
            .await
            .map_err(|_| NotReady::NobodyListens(self.port))
    }

    async fn get(&self, stream: TcpStream) -> Result<(), NotReady> {
        let path: Uri = self
            .path
            .parse()
            .ok()
            .filter(|_| self.path.starts_with('/'))
            .ok_or_else(|| NotReady::NoPath(self.path.clone()))?;
        let failed = |error: &dyn std::error::Error| self.no_answer(error.to_string());
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| failed(&e))?;
        let request = Request::get(path)
            .header("host", format!("127.0.0.1:{}", self.port))
            .header("user-agent", "daybook-probe")
            .header("connection", "close")
            .body(Empty::<Bytes>::new())
            .map_err(|e| failed(&e))?;
        let answer = sender.send_request(request);
        // Driven together and dropped together: no task is left behind.
        let mut connection = std::pin::pin!(connection);
        let mut answer = std::pin::pin!(answer);
        let response = tokio::select! {
            biased;
            response = &mut answer => response,
            _ = &mut connection => answer.await,
        };
        let status = response.map_err(|e| failed(&e))?.status();
        if status.is_success() || status.is_redirection() {
            Ok(())
        } else {
            Err(NotReady::Status {
                path: self.path.clone(),
                status: status.as_u16(),
            })
        }
    }

    fn no_answer(&self, reason: String) -> NotReady {
        NotReady::NoAnswer {
            path: self.path.clone(),
            reason,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use daybook_testkit::{TestApp, free_addr};

    async fn ask(port: u16, path: &str) -> Result<(), NotReady> {
        let health = HealthSpec {
            path: path.into(),
            ..HealthSpec::default()
        };
        Probe::new(port, &health).next().await
    }

    #[tokio::test]
    async fn readiness_is_an_answer_on_the_path_or_a_connection() {
        let app = TestApp::start(&["--unhealthy"]);
        let port = app.addr.port();
        let status = |status| NotReady::Status {
            path: "/".into(),
            status,
        };
        assert_eq!(ask(port, "/").await, Err(status(503)));
        assert_eq!(ask(port, "").await, Ok(()));
        assert_eq!(ask(port, "/status?302").await, Ok(()));
        assert!(matches!(
            ask(port, "/drop").await,
            Err(NotReady::NoAnswer { .. })
        ));
        assert!(matches!(
            ask(port, "no path").await,
            Err(NotReady::NoPath(_))
        ));
        assert_eq!(ask(port, "/heal").await, Ok(()));
        assert_eq!(ask(port, "/").await, Ok(()));
        let nobody = free_addr().port();
        assert_eq!(ask(nobody, "/").await, Err(NotReady::NobodyListens(nobody)));
    }
}
