//! A web server at the edge, as users meet it: with a certificate of an issuer of its own, and
//! whatever is to be wrong with it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;

/// Issues certificates that only those trust who know it.
pub struct Issuer(CertifiedIssuer<'static, KeyPair>);

/// A certificate with its key.
#[derive(Debug, Clone)]
pub struct Certificate(Arc<rustls::ServerConfig>);

impl Issuer {
    /// A new one.
    ///
    /// # Panics
    /// If there is no randomness.
    pub fn new() -> Self {
        Self::named("an issuer for tests")
    }

    /// A new one of this name. Of two with one name, a client takes either for the issuer of what
    /// the other has signed, and finds the signature wrong.
    ///
    /// # Panics
    /// If there is no randomness.
    pub fn named(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        Self(CertifiedIssuer::self_signed(params, key).expect("an issuer"))
    }

    /// Its own certificate, as PEM.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// Issues a certificate for these names that ends with this day.
    ///
    /// # Panics
    /// If one of them is no name, or there is no such day.
    pub fn issue(&self, names: &[&str], end: (i32, u8, u8)) -> Certificate {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.not_after = date_time_ymd(end.0, end.1, end.2);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .expect("a server's configuration");
        Certificate(Arc::new(config))
    }
}

impl Default for Issuer {
    fn default() -> Self {
        Self::new()
    }
}

/// What the server does with a connection.
#[derive(Debug, Clone)]
pub enum Conduct {
    /// Hands it on, byte for byte.
    Forward(SocketAddr),
    /// Answers each request with this status and, if there is one, this deployment's id.
    Answer(u16, Option<String>),
    /// Accepts it, and says nothing.
    Silence,
}

#[derive(Debug)]
struct Shared {
    certificate: Option<Certificate>,
    conduct: Conduct,
}

/// A running server. It ends when this is dropped.
#[derive(Debug)]
pub struct Website {
    /// Where it answers.
    pub addr: SocketAddr,
    shared: Arc<Mutex<Shared>>,
    runtime: Option<Runtime>,
}

impl Website {
    /// Starts one on a free port; without a certificate it speaks plain HTTP.
    ///
    /// # Panics
    /// If there is no free port.
    pub fn start(certificate: Option<Certificate>, conduct: Conduct) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let addr = listener.local_addr().expect("an address");
        listener.set_nonblocking(true).expect("a socket");
        let shared = Arc::new(Mutex::new(Shared {
            certificate,
            conduct,
        }));
        {
            let _within = runtime.enter();
            let listener = TcpListener::from_std(listener).expect("a socket");
            runtime.spawn(accept(listener, shared.clone()));
        }
        Self {
            addr,
            shared,
            runtime: Some(runtime),
        }
    }

    /// From now on it shows this certificate.
    pub fn show(&self, certificate: Certificate) {
        self.shared().certificate = Some(certificate);
    }

    /// From now on it does this.
    pub fn conduct(&self, conduct: Conduct) {
        self.shared().conduct = conduct;
    }

    fn shared(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Website {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn accept(listener: TcpListener, shared: Arc<Mutex<Shared>>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (certificate, conduct) = {
            let shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            (shared.certificate.clone(), shared.conduct.clone())
        };
        tokio::spawn(async move {
            // Whoever goes away has seen enough.
            let _ = serve(stream, certificate, conduct).await;
        });
    }
}

async fn serve(
    stream: TcpStream,
    certificate: Option<Certificate>,
    conduct: Conduct,
) -> std::io::Result<()> {
    match (conduct, certificate) {
        (Conduct::Silence, _) => {
            let _open = stream;
            std::future::pending().await
        }
        (conduct, None) => go_on(stream, conduct).await,
        (conduct, Some(certificate)) => {
            let stream = TlsAcceptor::from(certificate.0).accept(stream).await?;
            go_on(stream, conduct).await
        }
    }
}

async fn go_on<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    conduct: Conduct,
) -> std::io::Result<()> {
    match conduct {
        Conduct::Silence => std::future::pending().await,
        Conduct::Forward(to) => {
            let mut there = TcpStream::connect(to).await?;
            tokio::io::copy_bidirectional(&mut stream, &mut there).await?;
            Ok(())
        }
        Conduct::Answer(status, by) => {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") && head.len() < 8192 {
                head.push(stream.read_u8().await?);
                // What begins a TLS handshake is no request, as web servers say at once.
                if !head[0].is_ascii_alphabetic() {
                    let refusal = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n";
                    stream.write_all(refusal).await?;
                    return stream.shutdown().await;
                }
            }
            let by = by.map(|id| format!("X-Daybook-Deployment: {id}\r\n"));
            let by = by.unwrap_or_default();
            let answer = format!(
                "HTTP/1.1 {status} Told\r\n{by}Content-Length: 0\r\nConnection: close\r\n\r\n"
            );
            stream.write_all(answer.as_bytes()).await?;
            stream.shutdown().await
        }
    }
}
