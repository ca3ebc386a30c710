//! What answers at an address: a connection as a browser makes it, with the hostname in the
//! handshake and in the request.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use daybook_events::deployment::{Plane, PlaneSeen, PlaneState};
use daybook_events::with_causes;
use futures_util::future::join_all;
use http_body_util::Empty;
use hyper::header::{CONNECTION, HOST, USER_AGENT};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;
use x509_parser::extensions::GeneralName;

use super::{
    Address, DEPLOYMENT_HEADER, TlsCheck, WebCheck, cut, failing, listed, not_asked, not_configured,
};

/// At most so many addresses of a name are connected to.
const ADDRESSES_MAX: usize = 4;

/// What was seen of TLS and of HTTP. Each address that users may be led to is looked at, and the
/// worst that was found counts.
pub(super) async fn look(
    check: &WebCheck,
    address: &Address,
    to: &[IpAddr],
    timeout: Duration,
) -> (PlaneSeen, PlaneSeen) {
    let without_tls = check.tls.is_none();
    if to.is_empty() {
        let why = "it is not known where to connect to: the name has no address";
        let tls = match without_tls {
            true => not_configured(Plane::Tls),
            false => not_asked(Plane::Tls, why),
        };
        return (tls, not_asked(Plane::Http, why));
    }
    let looks = to.iter().take(ADDRESSES_MAX);
    let looks = join_all(looks.map(|ip| look_at(check, address, *ip, timeout))).await;
    // A machine without IPv6 cannot judge what users with it see.
    let (no_way, there): (Vec<_>, Vec<_>) = looks.into_iter().partition(|seen| seen.no_way);
    let counting = if there.is_empty() { no_way } else { there };
    let (tls, http): (Vec<_>, Vec<_>) = counting.into_iter().map(|s| (s.tls, s.http)).unzip();
    (
        worst(tls).unwrap_or_else(|| not_configured(Plane::Tls)),
        worst(http).unwrap_or_else(|| not_configured(Plane::Http)),
    )
}

fn worst(seen: Vec<PlaneSeen>) -> Option<PlaneSeen> {
    seen.into_iter().max_by_key(|seen| {
        let how_bad = match seen.state {
            PlaneState::Ok => 0,
            PlaneState::Unknown => 1,
            PlaneState::Drifted => 2,
            PlaneState::Failing => 3,
        };
        (how_bad, std::cmp::Reverse(seen.expires))
    })
}

/// What was seen at one address.
struct Seen {
    tls: PlaneSeen,
    http: PlaneSeen,
    /// There is no way there from this machine.
    no_way: bool,
}

async fn look_at(check: &WebCheck, address: &Address, ip: IpAddr, timeout: Duration) -> Seen {
    let at = SocketAddr::new(ip, check.port);
    let stream = match within(timeout, TcpStream::connect(at)).await {
        Ok(stream) => stream,
        Err(error) => {
            let (reason, why) = no_connection(&error, at);
            let (tls, http) = match check.tls {
                Some(_) => (
                    failing(Plane::Tls, reason, why),
                    not_asked(Plane::Http, "there is no connection"),
                ),
                None => (
                    not_configured(Plane::Tls),
                    failing(Plane::Http, reason, why),
                ),
            };
            let no_way = ip.is_ipv6() && is_no_way(&error);
            return Seen { tls, http, no_way };
        }
    };
    let (tls, http) = match &check.tls {
        None => {
            let http = ask(stream, check, address, at, timeout).await;
            (not_configured(Plane::Tls), http)
        }
        Some(tls) => match shake_hands(tls, stream, address, at, timeout).await {
            (seen, Some(stream)) => {
                let http = ask(stream, check, address, at, timeout).await;
                (seen, http)
            }
            (seen, None) => {
                let http = not_asked(Plane::Http, "TLS is in the way");
                (seen, http)
            }
        },
    };
    Seen {
        tls,
        http,
        no_way: false,
    }
}

async fn within<T>(timeout: Duration, step: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(timeout, step).await {
        Ok(result) => result,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

fn is_no_way(error: &io::Error) -> bool {
    use io::ErrorKind::{AddrNotAvailable, HostUnreachable, NetworkUnreachable, Unsupported};
    let kinds = [
        AddrNotAvailable,
        HostUnreachable,
        NetworkUnreachable,
        Unsupported,
    ];
    kinds.contains(&error.kind())
}

fn no_connection(error: &io::Error, at: SocketAddr) -> (&'static str, String) {
    match error.kind() {
        io::ErrorKind::TimedOut => ("Timeout", format!("{at} does not answer in time")),
        io::ErrorKind::ConnectionRefused => ("Refused", format!("nobody listens on {at}")),
        _ => ("Unreachable", format!("{at} cannot be reached: {error}")),
    }
}

/// Shakes hands, and says what certificate was shown. Without a right one there is no connection.
async fn shake_hands(
    check: &TlsCheck,
    stream: TcpStream,
    address: &Address,
    at: SocketAddr,
    timeout: Duration,
) -> (
    PlaneSeen,
    Option<tokio_rustls::client::TlsStream<TcpStream>>,
) {
    let no_tls = |reason, why| (failing(Plane::Tls, reason, why), None);
    let name = match ServerName::try_from(address.hostname.to_string()) {
        Ok(name) => name,
        Err(error) => return no_tls("HandshakeFailed", error.to_string()),
    };
    let witness = match Witness::new(check) {
        Ok(witness) => Arc::new(witness),
        Err(error) => return no_tls("HandshakeFailed", error),
    };
    let config = match config(witness.clone()) {
        Ok(config) => config,
        Err(error) => return no_tls("HandshakeFailed", error.to_string()),
    };
    let connector = TlsConnector::from(Arc::new(config));
    let shaken = within(timeout, connector.connect(name, stream)).await;
    let shown = witness.shown();
    match shaken {
        Ok(stream) => (valid(check, shown), Some(stream)),
        Err(error) => (refused(&error, shown, address, at), None),
    }
}

fn config(witness: Arc<Witness>) -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider);
    let mut config = builder
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(witness)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // Each look shakes hands in full, and sees the certificate.
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// What is kept of a certificate that was shown.
#[derive(Debug, Clone, Default)]
struct Shown {
    expires: Option<Timestamp>,
    names: Vec<String>,
    wrong: Option<CertificateError>,
}

/// Judges certificates as browsers do, and remembers what was shown.
#[derive(Debug)]
struct Witness {
    judge: Arc<WebPkiServerVerifier>,
    shown: Mutex<Shown>,
}

impl Witness {
    fn new(check: &TlsCheck) -> Result<Self, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let judge = WebPkiServerVerifier::builder_with_provider(check.roots.clone(), provider);
        Ok(Self {
            judge: judge.build().map_err(|e| e.to_string())?,
            shown: Mutex::default(),
        })
    }

    fn shown(&self) -> Shown {
        let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        shown.clone()
    }
}

impl ServerCertVerifier for Witness {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verdict = self.judge.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        let mut shown = read(end_entity);
        if let Err(rustls::Error::InvalidCertificate(wrong)) = &verdict {
            shown.wrong = Some(wrong.clone());
        }
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = shown;
        verdict
    }
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.judge.verify_tls12_signature(message, cert, dss)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.judge.verify_tls13_signature(message, cert, dss)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.judge.supported_verify_schemes()
    }
}

/// When a certificate ends, and for which names it is. Nothing of one that cannot be read.
fn read(certificate: &CertificateDer<'_>) -> Shown {
    let Ok((_, certificate)) = x509_parser::parse_x509_certificate(certificate) else {
        return Shown::default();
    };
    let expires = certificate.validity().not_after.timestamp();
    let names = certificate.subject_alternative_name().ok().flatten();
    let names = names.iter().flat_map(|names| &names.value.general_names);
    let names = names.filter_map(|name| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        _ => None,
    });
    Shown {
        expires: Timestamp::from_second(expires).ok(),
        names: names.take(16).collect(),
        wrong: None,
    }
}

fn valid(check: &TlsCheck, shown: Shown) -> PlaneSeen {
    let seen = PlaneSeen {
        actual: Some(listed(&shown.names)),
        expires: shown.expires,
        ..PlaneSeen::new(Plane::Tls, PlaneState::Ok, "Valid")
    };
    let soon = |expires: &Timestamp| {
        let warn = jiff::SignedDuration::try_from(check.warn).unwrap_or(jiff::SignedDuration::MAX);
        expires.duration_since(Timestamp::now()) < warn
    };
    match shown.expires.filter(soon) {
        None => seen,
        Some(expires) => PlaneSeen {
            reason: "ExpiresSoon".to_owned(),
            message: Some(format!("the certificate ends soon, at {expires:.0}")),
            ..seen
        },
    }
}

/// Why there was no handshake.
fn refused(error: &io::Error, shown: Shown, address: &Address, at: SocketAddr) -> PlaneSeen {
    let seen = |state, reason: &str, message: String| PlaneSeen {
        message: Some(cut(&message)),
        expires: shown.expires,
        ..PlaneSeen::new(Plane::Tls, state, reason)
    };
    let failing = |reason, message| seen(PlaneState::Failing, reason, message);
    match &shown.wrong {
        Some(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            let end = shown.expires.map(|end| format!("{end:.0}"));
            let end = end.unwrap_or_default();
            failing(
                "CertificateExpired",
                format!("the certificate that {at} shows has ended at {end}"),
            )
        }
        Some(CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }) => {
            failing(
                "CertificateNotYetValid",
                format!("the certificate that {at} shows is not valid yet"),
            )
        }
        Some(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => PlaneSeen {
            expected: Some(address.hostname.to_string()),
            actual: Some(listed(&shown.names)),
            ..seen(
                PlaneState::Drifted,
                "WrongName",
                format!(
                    "the certificate that {at} shows is for {}",
                    listed(&shown.names)
                ),
            )
        },
        Some(CertificateError::UnknownIssuer) => failing(
            "UnknownIssuer",
            format!("nobody who is trusted has issued the certificate that {at} shows"),
        ),
        Some(wrong) => failing(
            "CertificateInvalid",
            format!("the certificate that {at} shows is not valid: {wrong}"),
        ),
        None if error.kind() == io::ErrorKind::TimedOut => failing(
            "Timeout",
            format!("{at} accepts the connection, and does not shake hands in time"),
        ),
        None => failing(
            "HandshakeFailed",
            format!("{at} does not shake hands: {}", with_causes(error)),
        ),
    }
}

/// Asks for a page, and says who has answered.
async fn ask<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    check: &WebCheck,
    address: &Address,
    at: SocketAddr,
    timeout: Duration,
) -> PlaneSeen {
    let usual = if check.tls.is_some() { 443 } else { 80 };
    let host = match check.port == usual {
        true => address.hostname.to_string(),
        false => format!("{}:{}", address.hostname, check.port),
    };
    let request = Request::get(&address.path)
        .header(HOST, host)
        .header(
            USER_AGENT,
            concat!("daybook-probe/", env!("CARGO_PKG_VERSION")),
        )
        .header(CONNECTION, "close")
        .body(Empty::<Bytes>::new());
    let request = match request {
        Ok(request) => request,
        Err(error) => return failing(Plane::Http, "NoAnswer", error.to_string()),
    };
    let answer = tokio::time::timeout(timeout, async {
        let shaken = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = shaken?;
        // Whatever comes after the head of the answer is not waited for.
        let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
        sender.send_request(request).await
    });
    match answer.await {
        Ok(Ok(answer)) => judge(&answer, address),
        Ok(Err(error)) => failing(
            Plane::Http,
            "NoAnswer",
            format!("{at} does not answer in HTTP: {}", with_causes(&error)),
        ),
        Err(_) => failing(
            Plane::Http,
            "Timeout",
            format!("{at} does not answer in time"),
        ),
    }
}

fn judge<B>(answer: &Response<B>, address: &Address) -> PlaneSeen {
    let status = answer.status().as_u16();
    let by = answer.headers().get(DEPLOYMENT_HEADER);
    let by = by.and_then(|by| by.to_str().ok()).map(cut);
    let is_one = |by: &str| address.deployments.iter().any(|id| id.to_string() == by);
    let seen = match &by {
        Some(by) if !is_one(by) => PlaneSeen {
            message: Some(format!("deployment {by} answers instead")),
            ..PlaneSeen::new(Plane::Http, PlaneState::Drifted, "AnotherDeployment")
        },
        Some(_) if status < 500 => PlaneSeen::new(Plane::Http, PlaneState::Ok, "Answers"),
        Some(_) => failing(
            Plane::Http,
            "ServerError",
            format!("it answers with HTTP status {status}"),
        ),
        None if status >= 500 || [404, 410, 421].contains(&status) => failing(
            Plane::Http,
            "NobodyAnswers",
            format!("HTTP status {status}, from something that names no deployment"),
        ),
        None => PlaneSeen {
            message: Some(format!(
                "HTTP status {status}; what answers does not say which deployment it is"
            )),
            ..PlaneSeen::new(Plane::Http, PlaneState::Ok, "NotIdentified")
        },
    };
    PlaneSeen {
        expected: Some(address.expected()),
        actual: by,
        ..seen
    }
}
