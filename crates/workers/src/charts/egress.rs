//! The way out for a call of `helm` that fetches: a proxy that connects to checked addresses only.
//!
//! What a repository answers leads on to other hosts: an index to archives, a registry to whoever
//! hands out tokens and has the blobs. Each of them is looked up here, once, and connected to at the
//! address that was checked.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use crate::git_transport::{SourcePolicy, TransportError, resolve};

/// How many connections there are at a time; further ones wait.
const CONNECTIONS_MAX: usize = 16;
/// The most that is read of what asks for a connection, in bytes.
const HEAD_MAX: usize = 8 << 10;
/// How long asking for one, and making it, may take.
const WITHIN: Duration = Duration::from_secs(15);
/// How long an address may take, so that the next one gets its turn.
const EACH_WITHIN: Duration = Duration::from_secs(4);

/// The proxy of one call. It ends when this is dropped, with its connections.
pub(super) struct Egress {
    address: SocketAddr,
    refused: Arc<Mutex<Option<TransportError>>>,
    _serving: AbortOnDropHandle<()>,
}

impl Egress {
    /// Listens on loopback. Whoever else on this machine finds it can reach no more through it than
    /// without it.
    pub(super) async fn start(policy: SourcePolicy) -> std::io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let refused = Arc::default();
        let serving = serve(listener, policy, Arc::clone(&refused));
        Ok(Self {
            address,
            refused,
            _serving: AbortOnDropHandle::new(tokio::spawn(serving)),
        })
    }

    /// What is given to the call as its proxy.
    pub(super) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Why a connection was not made, if one was refused for where it leads.
    pub(super) fn refused(&self) -> Option<TransportError> {
        let refused = self.refused.lock();
        refused.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn serve(
    listener: TcpListener,
    policy: SourcePolicy,
    refused: Arc<Mutex<Option<TransportError>>>,
) {
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= CONNECTIONS_MAX {
            connections.join_next().await;
        }
        let Ok((inner, _)) = listener.accept().await else {
            return;
        };
        while connections.try_join_next().is_some() {}
        let (policy, refused) = (policy.clone(), Arc::clone(&refused));
        connections.spawn(async move { pass_on(inner, &policy, &refused).await });
    }
}

/// Serves one connection, and notes why it may not lead where it is to before that is answered.
async fn pass_on(
    mut inner: TcpStream,
    policy: &SourcePolicy,
    refused: &Mutex<Option<TransportError>>,
) {
    let asked = tokio::time::timeout(WITHIN, connect(&mut inner, policy)).await;
    let (mut outer, early) = match asked {
        Ok(Ok(connected)) => connected,
        Ok(Err(Some(why))) => {
            note(refused, why);
            answer(&mut inner, "403 Refused").await;
            return;
        }
        Ok(Err(None)) | Err(_) => {
            answer(&mut inner, "502 Unreachable").await;
            return;
        }
    };
    let established = inner.write_all(b"HTTP/1.1 200 Connected\r\n\r\n").await;
    if established.is_ok() && outer.write_all(&early).await.is_ok() {
        // However it ends, both sides see it.
        let _ = tokio::io::copy_bidirectional(&mut inner, &mut outer).await;
    }
}

/// The first one is what the rest follows from.
fn note(refused: &Mutex<Option<TransportError>>, why: TransportError) {
    let mut refused = refused.lock().unwrap_or_else(PoisonError::into_inner);
    if refused.is_none() {
        *refused = Some(why);
    }
}

async fn answer(inner: &mut TcpStream, status: &str) {
    let text = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    // It may be gone by now, and needs no answer then.
    let _ = inner.write_all(text.as_bytes()).await;
}

/// Reads where a connection is to lead, and makes it; with what was sent too early. Where there is a
/// reason to refuse it, that is what it fails with.
async fn connect(
    inner: &mut TcpStream,
    policy: &SourcePolicy,
) -> Result<(TcpStream, Vec<u8>), Option<TransportError>> {
    let mut head: Vec<u8> = Vec::new();
    let end = loop {
        if let Some(end) = head.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
        if head.len() > HEAD_MAX || inner.read_buf(&mut head).await.unwrap_or(0) == 0 {
            return Err(None);
        }
    };
    let early = head.split_off(end);
    let head = String::from_utf8_lossy(&head);
    let mut words = head.split_whitespace();
    let (Some(method), Some(to)) = (words.next(), words.next()) else {
        return Err(None);
    };
    if method != "CONNECT" {
        return Err(Some(TransportError::NotAllowed {
            what: "plain http",
            setting: "allow_plain_http",
        }));
    }
    let to = to.rsplit_once(':');
    let to = to.and_then(|(host, port)| Some((host, port.parse().ok()?)));
    let Some((host, port)) = to else {
        return Err(None);
    };
    let addresses = match resolve(policy, host, port).await {
        Ok(addresses) => addresses,
        Err(why @ TransportError::AddressRefused { .. }) => return Err(Some(why)),
        Err(_) => return Err(None),
    };
    for address in addresses {
        let outer = tokio::time::timeout(EACH_WITHIN, TcpStream::connect(address)).await;
        if let Ok(Ok(outer)) = outer {
            return Ok((outer, early));
        }
    }
    Err(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is answered to this, up to its end or as long as `wanted`.
    async fn ask(egress: &Egress, request: &str, wanted: usize) -> String {
        let answered = async {
            let mut stream = TcpStream::connect(egress.address).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer: Vec<u8> = Vec::new();
            while answer.len() < wanted && stream.read_buf(&mut answer).await.unwrap() > 0 {}
            String::from_utf8(answer).unwrap()
        };
        let within = tokio::time::timeout(Duration::from_secs(60), answered);
        within.await.unwrap()
    }

    #[tokio::test]
    async fn nothing_leads_to_an_address_that_is_not_public() {
        let private = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = private.local_addr().unwrap().port();
        for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]"] {
            let egress = Egress::start(SourcePolicy::default()).await.unwrap();
            let request = format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: x\r\n\r\n");
            let answer = ask(&egress, &request, usize::MAX).await;
            assert!(answer.starts_with("HTTP/1.1 403 "), "{host}: {answer}");
            let refused = egress.refused();
            assert!(
                matches!(refused, Some(TransportError::AddressRefused { .. })),
                "{host}: {refused:?}"
            );
        }
        let egress = Egress::start(SourcePolicy::default()).await.unwrap();
        let request = format!("GET http://127.0.0.1:{port}/ HTTP/1.1\r\nHost: x\r\n\r\n");
        let answer = ask(&egress, &request, usize::MAX).await;
        assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
        assert!(egress.refused().is_some());
    }

    #[tokio::test]
    async fn what_may_be_connected_to_is_spoken_to() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let other = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut heard = [0; 5];
            stream.read_exact(&mut heard).await.unwrap();
            stream.write_all(b"answer").await.unwrap();
            heard
        });
        let egress = Egress::start(SourcePolicy::trusting()).await.unwrap();
        let request = format!("CONNECT 127.0.0.1:{port} HTTP/1.1\r\n\r\nearly");
        let expected = "HTTP/1.1 200 Connected\r\n\r\nanswer";
        assert_eq!(ask(&egress, &request, expected.len()).await, expected);
        assert_eq!(&other.await.unwrap(), b"early");
        assert_eq!(egress.refused(), None);
    }
}
