//! A real OCI registry: the reference implementation that Debian packages as `docker-registry`.
//!
//! Which binary: `DAYBOOK_REGISTRY`, otherwise `docker-registry` or `registry` on `PATH`.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// How long a registry may take to be ready.
const PATIENCE: Duration = Duration::from_secs(30);

/// The user of a registry that asks for a password.
pub const USER: &str = "alice";
/// The user's password.
pub const PASSWORD: &str = "correct horse";
/// The same as the registry wants to have it.
const HTPASSWD: &str = "alice:$2b$04$tWcDWyE/.wuVm3vz9.zBu.K9aoYQ9A/Eg3Wbr5coYZC087/K4lara\n";

/// How a registry is set up.
#[derive(Debug, Clone, Copy, Default)]
pub struct RegistryConfig {
    /// Only [`USER`] with [`PASSWORD`] may use it.
    pub password: bool,
}

/// A registry on a free port of the loopback interface with a folder of its own, killed and
/// removed when this is dropped. Its log is shown if the test panics.
#[derive(Debug)]
pub struct Registry {
    dir: TempDir,
    binary: PathBuf,
    address: SocketAddr,
    process: Option<Child>,
}

impl Registry {
    /// Starts a registry; `None`, after saying so with [`crate::left_out`], if there is none here.
    ///
    /// # Panics
    /// If it does not become ready.
    pub fn start(config: RegistryConfig) -> Option<Self> {
        let Some(binary) = installed() else {
            crate::left_out("no docker-registry on PATH and none in DAYBOOK_REGISTRY");
            return None;
        };
        let dir = tempfile::tempdir().expect("a temporary folder");
        let mut registry = Self {
            address: crate::free_addr(),
            dir,
            binary,
            process: None,
        };
        // Somebody else may take the free port before the registry does.
        for _ in 0..5 {
            registry.write_config(config);
            if registry.try_start() {
                return Some(registry);
            }
            registry.address = crate::free_addr();
        }
        panic!("the registry does not start:\n{}", registry.log());
    }

    /// Its address as the first part of an image repository: `127.0.0.1:34567`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// The folder that it keeps its contents in.
    pub fn storage(&self) -> PathBuf {
        self.dir.path().join("storage")
    }

    /// A `config.json` as `docker login` would have left it.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn login(&self, password: &str) -> PathBuf {
        use base64::Engine as _;
        let path = self.dir.path().join("config.json");
        let auth = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{password}"));
        let config = serde_json::json!({ "auths": { self.host(): { "auth": auth } } });
        fs::write(&path, config.to_string()).expect("writing config.json");
        path
    }

    /// Kills it with SIGKILL. Its folder stays.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Starts it again on the same port and folder.
    ///
    /// # Panics
    /// If it does not become ready.
    pub fn restart(&mut self) {
        self.kill();
        assert!(
            self.try_start(),
            "the registry does not start again:\n{}",
            self.log()
        );
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    fn write_config(&self, config: RegistryConfig) {
        let mut text = format!(
            "version: 0.1\n\
             log: {{ level: info, formatter: json, accesslog: {{ disabled: false }} }}\n\
             storage: {{ filesystem: {{ rootdirectory: '{}' }}, delete: {{ enabled: true }} }}\n\
             http: {{ addr: '{}', secret: test }}\n",
            self.storage().display(),
            self.address
        );
        if config.password {
            let htpasswd = self.dir.path().join("htpasswd");
            fs::write(&htpasswd, HTPASSWD).expect("writing htpasswd");
            text += &format!(
                "auth: {{ htpasswd: {{ realm: test, path: '{}' }} }}\n",
                htpasswd.display()
            );
        }
        fs::write(self.dir.path().join("config.yml"), text).expect("writing the configuration");
    }

    /// Starts it and waits until it answers; `false` if it ended instead.
    fn try_start(&mut self) -> bool {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .expect("opening the log");
        let mut process = Command::new(&self.binary)
            .arg("serve")
            .arg(self.dir.path().join("config.yml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle of the log"))
            .stderr(log)
            .spawn()
            .expect("starting the registry");
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if process
                .try_wait()
                .expect("asking for the registry")
                .is_some()
            {
                return false;
            }
            if TcpStream::connect(self.address).is_ok() {
                self.process = Some(process);
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = process.kill();
        let _ = process.wait();
        false
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("log of the registry {}:\n{}", self.host(), self.log());
        }
    }
}

/// The registry that is installed, if there is one.
fn installed() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("DAYBOOK_REGISTRY").filter(|p| !p.is_empty()) {
        return Some(PathBuf::from(path));
    }
    let path = std::env::var_os("PATH")?;
    ["docker-registry", "registry"].iter().find_map(|name| {
        std::env::split_paths(&path)
            .map(|folder| folder.join(name))
            .find(|file| is_file(file))
    })
}

fn is_file(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|m| m.is_file())
}
