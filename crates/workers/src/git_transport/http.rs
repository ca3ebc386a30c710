//! The smart HTTP transport.

use std::error::Error as _;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Buf as _, Bytes};
use daybook_events::with_causes;
use git2::transport::{Service, SmartSubtransport, SmartSubtransportStream};
use reqwest::StatusCode;
use reqwest::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, LOCATION};
use url::{Host, Url};

use super::session::{Session, printable};
use super::{TransportConfig, TransportError, address};

const MAX_REDIRECTS: usize = 5;

/// A client that follows no redirect by itself, uses no proxy, and connects to checked addresses
/// only.
pub(super) fn build_client(config: &TransportConfig) -> Result<reqwest::Client, TransportError> {
    let setup = |reason: String| TransportError::Protocol {
        reason: format!("the HTTP client cannot be set up: {reason}"),
    };
    // Another part of the process may have chosen its provider already; that is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut roots = Vec::new();
    for pem in &config.extra_roots {
        roots.extend(
            reqwest::Certificate::from_pem_bundle(pem.as_bytes())
                .map_err(|e| setup(e.to_string()))?,
        );
    }
    reqwest::Client::builder()
        // Some servers answer only what calls itself git.
        .user_agent(concat!("git/2.0 (daybook ", env!("CARGO_PKG_VERSION"), ")"))
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .no_proxy()
        .connect_timeout(config.limits.connect)
        .dns_resolver(CheckedResolver(Arc::new(config.policy.clone())))
        .tls_certs_merge(roots)
        .build()
        .map_err(|e| setup(with_causes(&e)))
}

/// Resolves names to addresses that may be connected to.
pub(crate) struct CheckedResolver(pub(crate) Arc<super::SourcePolicy>);

impl reqwest::dns::Resolve for CheckedResolver {
    fn resolve(&self, name: reqwest::dns::Name) -> reqwest::dns::Resolving {
        let policy = self.0.clone();
        Box::pin(async move {
            let found = address::resolve(&policy, name.as_str(), 0).await?;
            Ok(Box::new(found.into_iter()) as reqwest::dns::Addrs)
        })
    }
}

/// Carries the protocol of one remote.
pub(super) struct HttpTransport {
    session: Session,
    /// Where the repository really is, once a redirect has told.
    base: Arc<Mutex<Option<Url>>>,
}

impl HttpTransport {
    pub(super) fn of_this_thread() -> Result<Self, git2::Error> {
        Ok(Self {
            session: Session::of_this_thread()?,
            base: Arc::default(),
        })
    }
}

impl SmartSubtransport for HttpTransport {
    fn action(
        &self,
        url: &str,
        action: Service,
    ) -> Result<Box<dyn SmartSubtransportStream>, git2::Error> {
        let (service, is_discovery) = match action {
            Service::UploadPackLs => ("git-upload-pack", true),
            Service::UploadPack => ("git-upload-pack", false),
            Service::ReceivePackLs => ("git-receive-pack", true),
            Service::ReceivePack => ("git-receive-pack", false),
        };
        let stream = self
            .open(url, service, is_discovery)
            .map_err(|e| self.session.fail(e))?;
        Ok(Box::new(stream))
    }

    fn close(&self) -> Result<(), git2::Error> {
        Ok(())
    }
}

impl HttpTransport {
    fn open(
        &self,
        url: &str,
        service: &'static str,
        is_discovery: bool,
    ) -> Result<HttpStream, TransportError> {
        let mut base = self.base.lock().unwrap_or_else(PoisonError::into_inner);
        if is_discovery {
            let given = Url::parse(url).map_err(|e| TransportError::NotARepository {
                url: url.to_owned(),
                reason: e.to_string(),
            })?;
            let (found, response) = discover(&self.session, given, service)?;
            *base = Some(found.clone());
            return Ok(HttpStream {
                session: self.session.clone(),
                base: found,
                service,
                state: State::Receiving(Body::new(response)),
            });
        }
        let base = base.clone().ok_or_else(|| TransportError::Protocol {
            reason: "a request without its discovery".into(),
        })?;
        Ok(HttpStream {
            session: self.session.clone(),
            base,
            service,
            state: State::Sending(Vec::new()),
        })
    }
}

/// Asks for the refs, following redirects; returns where the repository really is.
fn discover(
    session: &Session,
    given: Url,
    service: &'static str,
) -> Result<(Url, reqwest::Response), TransportError> {
    let repository = given.as_str().to_owned();
    let mut base = given;
    for _ in 0..=MAX_REDIRECTS {
        let url = with_suffix(&base, &format!("info/refs?service={service}"))?;
        let response = send(session, &url, |client| {
            client.get(url.clone()).header(CACHE_CONTROL, "no-cache")
        })?;
        if !response.status().is_redirection() {
            check_status(session, &repository, &base, &response)?;
            let expected = format!("application/x-{service}-advertisement");
            if content_type(&response) != expected {
                return Err(TransportError::NotARepository {
                    url: repository,
                    reason: format!(
                        "the server answers with {:?} instead of git's smart protocol",
                        printable(content_type(&response))
                    ),
                });
            }
            return Ok((base, response));
        }
        base = redirect_target(&url, &response)?;
    }
    Err(TransportError::RedirectRefused {
        target: without_query(&base),
        reason: format!("more than {MAX_REDIRECTS} redirects"),
    })
}

/// The repository that a redirected discovery points to.
fn redirect_target(from: &Url, response: &reqwest::Response) -> Result<Url, TransportError> {
    let location = response
        .headers()
        .get(LOCATION)
        .and_then(|l| l.to_str().ok())
        .unwrap_or_default();
    let refused = |target: String, reason: &str| TransportError::RedirectRefused {
        target,
        reason: reason.to_owned(),
    };
    let target = from
        .join(location)
        .map_err(|e| refused(printable(location), &e.to_string()))?;
    let shown = without_query(&target);
    if !matches!(target.scheme(), "https" | "http") {
        return Err(refused(shown, "only https and http are followed"));
    }
    if from.scheme() == "https" && target.scheme() == "http" {
        return Err(refused(shown, "it would leave TLS"));
    }
    if !target.username().is_empty() || target.password().is_some() {
        return Err(refused(shown, "it carries credentials"));
    }
    let Some(path) = target.path().strip_suffix("/info/refs") else {
        return Err(refused(shown, "it does not lead to a git repository"));
    };
    let path = path.to_owned();
    let mut base = target;
    base.set_path(&path);
    base.set_query(None);
    base.set_fragment(None);
    Ok(base)
}

/// One response or one request of the protocol. libgit2 writes the request, then reads.
struct HttpStream {
    session: Session,
    base: Url,
    service: &'static str,
    state: State,
}

enum State {
    Sending(Vec<u8>),
    Receiving(Body),
}

struct Body {
    response: reqwest::Response,
    chunk: Bytes,
}

impl Body {
    fn new(response: reqwest::Response) -> Self {
        Self {
            response,
            chunk: Bytes::new(),
        }
    }
}

impl HttpStream {
    fn post(&self, request: Vec<u8>) -> Result<Body, TransportError> {
        let url = with_suffix(&self.base, self.service)?;
        let response = send(&self.session, &url, |client| {
            client
                .post(url.clone())
                .header(
                    CONTENT_TYPE,
                    format!("application/x-{}-request", self.service),
                )
                .header(ACCEPT, format!("application/x-{}-result", self.service))
                .body(request)
        })?;
        check_status(&self.session, self.base.as_str(), &self.base, &response)?;
        let expected = format!("application/x-{}-result", self.service);
        if content_type(&response) != expected {
            return Err(TransportError::Protocol {
                reason: format!(
                    "the server answers with {:?} instead of {expected}",
                    printable(content_type(&response))
                ),
            });
        }
        Ok(Body::new(response))
    }

    fn fill(&mut self) -> Result<&mut Bytes, TransportError> {
        if let State::Sending(request) = &mut self.state {
            let request = std::mem::take(request);
            self.state = State::Receiving(self.post(request)?);
        }
        let State::Receiving(body) = &mut self.state else {
            return Err(TransportError::Protocol {
                reason: "nothing was asked".into(),
            });
        };
        if body.chunk.is_empty() {
            let host = host_of(&self.base);
            let next = self.session.wait(&host, async {
                body.response
                    .chunk()
                    .await
                    .map_err(|e| failed_request(&host, e))
            })?;
            body.chunk = next.unwrap_or_default();
            self.session.received(body.chunk.len())?;
        }
        Ok(&mut body.chunk)
    }
}

impl Read for HttpStream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let session = self.session.clone();
        let chunk = self.fill().map_err(|e| session.fail_io(e))?;
        let n = chunk.len().min(into.len());
        chunk.copy_to_slice(&mut into[..n]);
        Ok(n)
    }
}

impl Write for HttpStream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let limit = self.session.transport().config().limits.sent_bytes;
        match &mut self.state {
            State::Sending(request) if request.len() + from.len() <= limit => {
                request.extend_from_slice(from);
                Ok(from.len())
            }
            State::Sending(_) => Err(self.session.fail_io(TransportError::TooLarge {
                what: "what is sent",
                limit: limit as u64,
            })),
            State::Receiving(_) => Err(self.session.fail_io(TransportError::Protocol {
                reason: "a request after its response".into(),
            })),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends one request to a checked URL, with the credential of its host.
fn send(
    session: &Session,
    url: &Url,
    request: impl FnOnce(&reqwest::Client) -> reqwest::RequestBuilder,
) -> Result<reqwest::Response, TransportError> {
    let config = session.transport().config();
    config.policy.check_scheme(url.as_str())?;
    // An address in the URL does not pass through the resolver.
    let address = match url.host() {
        Some(Host::Ipv4(a)) => Some(a.into()),
        Some(Host::Ipv6(a)) => Some(a.into()),
        Some(Host::Domain(_)) | None => None,
    };
    if let (Some(address), Some(host)) = (address, url.host_str()) {
        config.policy.check_address(host, address)?;
    }
    let mut request = request(session.transport().http_client()?);
    if let Some(credential) = config.credential_for(url) {
        request = request.basic_auth(&credential.username, Some(credential.password.reveal()));
    }
    let host = host_of(url);
    let asking = async {
        let sent = request.send().await;
        if let Ok(answer) = &sent {
            daybook_trace::answered(answer.status().as_u16());
        }
        sent.map_err(|e| failed_request(&host, e))
    };
    let asked = daybook_trace::request("git request", &host, asking, TransportError::code);
    session.wait(&host, asked)
}

fn check_status(
    session: &Session,
    repository: &str,
    base: &Url,
    response: &reqwest::Response,
) -> Result<(), TransportError> {
    let status = response.status();
    let host = host_of(base);
    match status {
        StatusCode::OK => Ok(()),
        StatusCode::UNAUTHORIZED => Err(TransportError::AuthenticationRequired {
            host,
            sent: session.transport().config().credential_for(base).is_some(),
        }),
        StatusCode::FORBIDDEN => Err(TransportError::Forbidden {
            host,
            reason: format!("it answers {status}"),
        }),
        StatusCode::NOT_FOUND | StatusCode::GONE => Err(TransportError::NotARepository {
            url: repository.to_owned(),
            reason: format!("the server answers {status}"),
        }),
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => {
            Err(TransportError::Unavailable {
                host,
                reason: format!("it answers {status}"),
            })
        }
        s if s.is_server_error() => Err(TransportError::Unavailable {
            host,
            reason: format!("it answers {status}"),
        }),
        _ => Err(TransportError::NotARepository {
            url: repository.to_owned(),
            reason: format!("the server answers {status}"),
        }),
    }
}

/// The refused address that a failed request goes back to, or that its host is not available.
fn failed_request(host: &str, error: reqwest::Error) -> TransportError {
    let error = error.without_url();
    if let Some(known) = refusal_in(&error) {
        return known;
    }
    TransportError::Unavailable {
        host: host.to_owned(),
        reason: printable(&with_causes(&error)),
    }
}

/// What [`CheckedResolver`] had against a host, if a request failed for that.
pub(crate) fn refusal_in(error: &reqwest::Error) -> Option<TransportError> {
    let mut cause = error.source();
    while let Some(c) = cause {
        if let Some(known) = c.downcast_ref::<TransportError>() {
            return Some(known.clone());
        }
        cause = c.source();
    }
    None
}

fn content_type(response: &reqwest::Response) -> &str {
    response
        .headers()
        .get(CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default()
}

fn with_suffix(base: &Url, suffix: &str) -> Result<Url, TransportError> {
    let text = format!("{}/{suffix}", base.as_str().trim_end_matches('/'));
    Url::parse(&text).map_err(|e| TransportError::Protocol {
        reason: e.to_string(),
    })
}

fn host_of(url: &Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => String::new(),
    }
}

fn without_query(url: &Url) -> String {
    let mut shown = url.clone();
    shown.set_query(None);
    shown.set_fragment(None);
    // Both fail only for URLs that cannot carry credentials.
    let _ = shown.set_username("");
    let _ = shown.set_password(None);
    printable(shown.as_str())
}
