//! A real Kubernetes control plane: etcd, kube-apiserver and kube-controller-manager, without
//! nodes.
//!
//! Deployments make ReplicaSets and Pods, and there they stay: no kubelet runs them. [`Kubelet`]
//! stands in for it and writes the pods' status as a kubelet does.
//!
//! Which binaries: the folder in `KUBEBUILDER_ASSETS`, otherwise those that
//! `cargo xtask tools kubernetes` built.

use std::fs::{self, File};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use tempfile::TempDir;

use crate::free_port;
use crate::nats::tools_folder;

pub mod argocd;
mod crds;
pub mod gateway;
mod kubelet;
mod node;
pub mod proxy;

pub use crds::Crd;
pub use gateway::Gateway;
pub use kubelet::{Fate, Kubelet};
pub use node::Node;

/// How long each of the servers may take to be ready.
const PATIENCE: Duration = Duration::from_secs(90);

/// What the only user says.
const TOKEN: &str = "an-administrator-for-tests";

/// A control plane. Its servers end with the process that started it, however that ends.
#[derive(Debug)]
pub struct ControlPlane {
    dir: TempDir,
    port: u16,
    etcd: Server,
    api: Server,
    manager: Server,
}

impl ControlPlane {
    /// The control plane that all tests of this process share, each in namespaces of its own;
    /// `None`, after saying so with [`crate::left_out`], if there is none here.
    ///
    /// # Panics
    /// If it does not become ready.
    pub fn shared() -> Option<&'static Self> {
        static SHARED: OnceLock<Option<ControlPlane>> = OnceLock::new();
        SHARED.get_or_init(Self::start).as_ref()
    }

    /// One more, for tests that stop it or need several.
    ///
    /// # Panics
    /// If it does not become ready.
    pub fn start() -> Option<Self> {
        let Some(bin) = installed() else {
            crate::left_out(
                "no kube-apiserver: neither KUBEBUILDER_ASSETS nor `cargo xtask tools kubernetes`",
            );
            return None;
        };
        let dir = tempfile::tempdir().expect("a temporary folder");
        certificates(dir.path());
        let (etcd, peers, port) = (free_port(), free_port(), free_port());
        let etcd_url = format!("http://127.0.0.1:{etcd}");
        let peers = format!("http://127.0.0.1:{peers}");
        let at = |name: &str| dir.path().join(name).display().to_string();
        write_kubeconfig(dir.path(), port);
        let token = format!("{TOKEN},administrator,administrator,system:masters\n");
        fs::write(at("tokens.csv"), token).expect("the token can be written");
        let mut plane = Self {
            port,
            etcd: Server::new(&bin, "etcd", etcd),
            api: Server::new(&bin, "kube-apiserver", port),
            manager: Server::new(&bin, "kube-controller-manager", free_port()),
            dir,
        };
        let at = |name: &str| plane.dir.path().join(name).display().to_string();
        plane.etcd.arguments = vec![
            format!("--data-dir={}", at("etcd")),
            format!("--listen-client-urls={etcd_url}"),
            format!("--advertise-client-urls={etcd_url}"),
            format!("--listen-peer-urls={peers}"),
            format!("--initial-advertise-peer-urls={peers}"),
            format!("--initial-cluster=default={peers}"),
            "--unsafe-no-fsync".to_owned(),
            "--log-level=error".to_owned(),
        ];
        plane.api.arguments = vec![
            format!("--etcd-servers={etcd_url}"),
            format!("--secure-port={port}"),
            "--bind-address=127.0.0.1".to_owned(),
            "--advertise-address=127.0.0.1".to_owned(),
            "--endpoint-reconciler-type=none".to_owned(),
            "--service-cluster-ip-range=10.0.0.0/16".to_owned(),
            format!("--cert-dir={}", at("certificates")),
            format!("--tls-cert-file={}", at("server.crt")),
            format!("--tls-private-key-file={}", at("server.key")),
            format!("--service-account-key-file={}", at("accounts.pub")),
            format!("--service-account-signing-key-file={}", at("accounts.key")),
            "--service-account-issuer=https://kubernetes.test".to_owned(),
            format!("--token-auth-file={}", at("tokens.csv")),
            "--authorization-mode=RBAC".to_owned(),
            "--allow-privileged=true".to_owned(),
        ];
        plane.manager.arguments = vec![
            format!("--kubeconfig={}", at("kubeconfig")),
            format!("--service-account-private-key-file={}", at("accounts.key")),
            format!("--root-ca-file={}", at("ca.crt")),
            "--leader-elect=false".to_owned(),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={}", plane.manager.port),
            format!("--cert-dir={}", at("certificates-of-manager")),
            // Without nodes there is nothing for these to do.
            "--controllers=*,-node-lifecycle-controller,-node-ipam-controller,\
             -persistentvolume-binder-controller,-ttl-controller"
                .to_owned(),
        ];
        plane.etcd.run(plane.dir.path());
        plane.api.run(plane.dir.path());
        plane.wait_until_ready();
        plane.manager.run(plane.dir.path());
        Some(plane)
    }

    /// A kubeconfig with one context, `test`.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    /// A client of its administrator.
    ///
    /// # Panics
    /// If the kubeconfig cannot be read.
    pub async fn client(&self) -> kube::Client {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let config = kube::config::Kubeconfig::read_from(self.kubeconfig()).expect("a kubeconfig");
        let options = kube::config::KubeConfigOptions::default();
        let config = kube::Config::from_custom_kubeconfig(config, &options).await;
        kube::Client::try_from(config.expect("a configuration")).expect("a client")
    }

    /// Where the API server is.
    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// Kills the API server with SIGKILL. What it stored stays.
    pub fn kill_api_server(&mut self) {
        self.api.end();
    }

    /// Starts the API server again.
    ///
    /// # Panics
    /// If it does not become ready.
    pub fn restart_api_server(&mut self) {
        self.api.end();
        self.api.run(self.dir.path());
        self.wait_until_ready();
    }

    /// Waits until the API server says that it is.
    fn wait_until_ready(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.is_ready() {
            let ended = self.api.log(self.dir.path()).contains("command failed");
            assert!(
                !ended && Instant::now() < deadline,
                "the API server does not start:\n{}\n{}",
                self.etcd.log(self.dir.path()),
                self.api.log(self.dir.path())
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn is_ready(&self) -> bool {
        if TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            return false;
        }
        let (sender, receiver) = std::sync::mpsc::channel();
        let url = format!("{}/readyz", self.url());
        let ca = fs::read(self.dir.path().join("ca.crt")).expect("the certificate is there");
        // A test may or may not run in a runtime of its own.
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            let answer = runtime.block_on(async {
                let _ = rustls::crypto::ring::default_provider().install_default();
                let ca = reqwest::Certificate::from_pem(&ca).ok()?;
                let client = reqwest::Client::builder()
                    .tls_certs_only([ca])
                    .timeout(Duration::from_secs(5))
                    .build();
                let answer = client.ok()?.get(url).bearer_auth(TOKEN).send().await.ok()?;
                Some(answer.status().is_success())
            });
            let _ = sender.send(answer == Some(true));
        });
        receiver.recv().unwrap_or(false)
    }
}

/// A server, which a shell ends when this process does: its standard input is a pipe from here.
#[derive(Debug)]
struct Server {
    program: PathBuf,
    name: &'static str,
    port: u16,
    arguments: Vec<String>,
    guard: Option<Child>,
}

const GUARD: &str = r#""$@" & server=$!; cat > /dev/null; kill -9 $server"#;

impl Server {
    fn new(bin: &Path, name: &'static str, port: u16) -> Self {
        Self {
            program: bin.join(name),
            name,
            port,
            arguments: Vec::new(),
            guard: None,
        }
    }

    fn run(&mut self, dir: &Path) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(dir.join(format!("{}.log", self.name)))
            .expect("a log can be written");
        let errors = log.try_clone().expect("the log can be shared");
        let guard = Command::new("sh")
            .args(["-c", GUARD, "sh"])
            .arg(&self.program)
            .args(&self.arguments)
            .stdin(Stdio::piped())
            .stdout(log)
            .stderr(errors)
            .spawn()
            .expect("a shell can be started");
        self.guard = Some(guard);
    }

    /// Kills it.
    fn end(&mut self) {
        if let Some(mut guard) = self.guard.take() {
            drop(guard.stdin.take());
            let _ = guard.wait();
        }
    }

    fn log(&self, dir: &Path) -> String {
        let log = fs::read_to_string(dir.join(format!("{}.log", self.name))).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(20).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// The folder with the servers.
fn installed() -> Option<PathBuf> {
    let set = std::env::var_os("KUBEBUILDER_ASSETS").filter(|v| !v.is_empty());
    let bin = match set {
        Some(folder) => PathBuf::from(folder),
        None => tools_folder()?.join("bin"),
    };
    let all = ["etcd", "kube-apiserver", "kube-controller-manager"];
    all.iter().all(|n| bin.join(n).is_file()).then_some(bin)
}

/// An authority, a certificate of it for the API server, and the key of service accounts.
fn certificates(dir: &Path) {
    let write = |name: &str, text: String| {
        fs::write(dir.join(name), text).expect("a certificate can be written");
    };
    let mut authority = CertificateParams::new(vec![]).expect("parameters");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().expect("a key");
    let authority = CertifiedIssuer::self_signed(authority, key).expect("an authority");
    let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
    let mut server = CertificateParams::new(names).expect("parameters");
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate().expect("a key");
    let certificate = server.signed_by(&key, &authority).expect("a certificate");
    write("ca.crt", authority.pem());
    write("server.crt", certificate.pem());
    write("server.key", key.serialize_pem());
    let accounts = KeyPair::generate().expect("a key");
    write("accounts.key", accounts.serialize_pem());
    write("accounts.pub", accounts.public_key_pem());
}

fn write_kubeconfig(dir: &Path, port: u16) {
    let ca = dir.join("ca.crt").display().to_string();
    let config = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "test", "cluster": {
            "server": format!("https://127.0.0.1:{port}"),
            "certificate-authority": ca,
        }}],
        "users": [{ "name": "test", "user": { "token": TOKEN } }],
        "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
        "current-context": "test",
    });
    // JSON is YAML.
    fs::write(dir.join("kubeconfig"), config.to_string()).expect("the kubeconfig can be written");
}
