//! An ssh server on a loopback port: the real `sshd`, with keys made for the test.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// The server. It is killed when dropped.
#[derive(Debug)]
pub struct SshServer {
    folder: TempDir,
    process: Child,
    port: u16,
}

impl Drop for SshServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl SshServer {
    /// Starts a server that lets the test's own user in with [`Self::identity`]. None if this
    /// machine has no `sshd`; `DAYBOOK_SSHD` names one that is not in the usual places.
    ///
    /// # Panics
    /// When there is one and it does not start.
    pub fn start() -> Option<Self> {
        let program = std::env::var_os("DAYBOOK_SSHD")
            .map(PathBuf::from)
            .into_iter()
            .chain(["/usr/sbin/sshd", "/usr/local/sbin/sshd", "/usr/bin/sshd"].map(PathBuf::from))
            .find(|p| p.exists())?;
        let folder = TempDir::new().expect("a temporary folder");
        let at = |name: &str| folder.path().join(name);
        for key in ["host", "identity", "stranger"] {
            make_key(&at(key));
        }
        fs::copy(at("identity.pub"), at("authorized_keys")).expect("a file can be copied");
        let port = crate::free_port();
        let shown = |name: &str| at(name).display().to_string();
        let config = format!(
            "ListenAddress 127.0.0.1:{port}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\n\
             StrictModes no\nUsePAM no\nPasswordAuthentication no\n\
             KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n",
            shown("host"),
            shown("authorized_keys"),
        );
        fs::write(at("sshd_config"), config).expect("a file can be written");
        let host_key = fs::read_to_string(at("host.pub")).expect("a key");
        fs::write(at("known_hosts"), format!("[127.0.0.1]:{port} {host_key}"))
            .expect("a file can be written");
        // As root, sshd wants the folder that its package makes at every boot. Where nothing was booted
        // since it was installed, nobody has made it; anybody else needs none.
        let _ = fs::create_dir_all("/run/sshd");
        let log = fs::File::create(at("log")).expect("a file can be made");
        let process = Command::new(&program)
            .args(["-D", "-e", "-f", &shown("sshd_config")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("sshd starts");
        let server = Self {
            folder,
            process,
            port,
        };
        server.wait_until_it_listens();
        Some(server)
    }

    fn wait_until_it_listens(&self) {
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        let started = Instant::now();
        while TcpStream::connect(address).is_err() {
            assert!(
                started.elapsed() < Duration::from_secs(20),
                "sshd does not listen: {}",
                fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The URL of a path on this machine.
    pub fn url(&self, path: &Path) -> String {
        let user = Command::new("id")
            .arg("-un")
            .output()
            .expect("id is on PATH");
        let user = String::from_utf8_lossy(&user.stdout).trim().to_owned();
        format!("ssh://{user}@127.0.0.1:{}{}", self.port, path.display())
    }

    /// The server's key, as `known_hosts` lists it.
    pub fn known_hosts(&self) -> PathBuf {
        self.folder.path().join("known_hosts")
    }

    /// A known_hosts file with another key for the server.
    pub fn wrong_known_hosts(&self) -> PathBuf {
        let path = self.folder.path().join("wrong_known_hosts");
        let key = fs::read_to_string(self.stranger().with_extension("pub")).expect("a key");
        fs::write(&path, format!("[127.0.0.1]:{} {key}", self.port)).expect("a file");
        path
    }

    /// A private key that is let in.
    pub fn identity(&self) -> PathBuf {
        self.folder.path().join("identity")
    }

    /// A private key that is not let in.
    pub fn stranger(&self) -> PathBuf {
        self.folder.path().join("stranger")
    }
}

fn make_key(path: &Path) {
    let status = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "", "-f"])
        .arg(path)
        .stdin(Stdio::null())
        .status()
        .expect("ssh-keygen comes with ssh");
    assert!(status.success(), "ssh-keygen makes a key");
}
