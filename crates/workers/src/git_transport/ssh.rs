//! The ssh transport: the system's `ssh`, run without a shell and without the user's settings.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::Stdio;

use git2::transport::{Service, SmartSubtransport, SmartSubtransportStream};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use url::Url;

use super::session::{Session, printable};
use super::{SshConfig, TransportError, address};

/// How much of what `ssh` complains about is kept.
const MAX_STDERR: usize = 8 * 1024;

/// Carries the protocol of one remote.
pub(super) struct SshTransport {
    session: Session,
}

impl SshTransport {
    pub(super) fn of_this_thread() -> Result<Self, git2::Error> {
        Ok(Self {
            session: Session::of_this_thread()?,
        })
    }
}

impl SmartSubtransport for SshTransport {
    fn action(
        &self,
        url: &str,
        action: Service,
    ) -> Result<Box<dyn SmartSubtransportStream>, git2::Error> {
        let service = match action {
            Service::UploadPackLs | Service::UploadPack => "git-upload-pack",
            Service::ReceivePackLs | Service::ReceivePack => "git-receive-pack",
        };
        let stream = connect(&self.session, url, service).map_err(|e| self.session.fail(e))?;
        Ok(Box::new(stream))
    }

    fn close(&self) -> Result<(), git2::Error> {
        Ok(())
    }
}

/// What an ssh URL says.
#[derive(Debug, PartialEq, Eq)]
struct Destination {
    user: Option<String>,
    host: String,
    port: u16,
    path: String,
}

impl Destination {
    fn parse(url: &str) -> Result<Self, TransportError> {
        let bad = |reason: &str| TransportError::NotARepository {
            url: url.to_owned(),
            reason: reason.to_owned(),
        };
        let parsed = Url::parse(url).map_err(|e| bad(&e.to_string()))?;
        let host = parsed.host_str().unwrap_or_default().to_owned();
        let user = decode(parsed.username()).ok_or_else(|| bad("the user is not UTF-8"))?;
        let path = decode(parsed.path()).ok_or_else(|| bad("the path is not UTF-8"))?;
        for (what, text) in [("user", &user), ("host", &host), ("path", &path)] {
            if text.starts_with('-') {
                return Err(bad(&format!("the {what} starts with a hyphen")));
            }
            if text.chars().any(char::is_control) {
                return Err(bad(&format!("the {what} has control characters")));
            }
        }
        if user.contains(['@', ' ']) {
            return Err(bad("the user has an @ or a space"));
        }
        if host.is_empty() || path.len() < 2 {
            return Err(bad("host or path is missing"));
        }
        Ok(Self {
            user: (!user.is_empty()).then_some(user),
            host,
            port: parsed.port().unwrap_or(22),
            // ssh://host/~user/repo means a path relative to a home, as with git.
            path: match path.strip_prefix("/~") {
                Some(rest) => format!("~{rest}"),
                None => path,
            },
        })
    }

    /// The name that known_hosts lists the host under.
    fn key_alias(&self) -> String {
        let bare = self.host.trim_start_matches('[').trim_end_matches(']');
        match self.port {
            22 => bare.to_owned(),
            port => format!("[{bare}]:{port}"),
        }
    }

    /// The arguments for `ssh` to connect to this address and run the service there.
    fn arguments(
        &self,
        config: &SshConfig,
        known_hosts: &Path,
        address: std::net::IpAddr,
        connect_seconds: u64,
        service: &str,
    ) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["-T".into(), "-F".into(), "none".into()];
        let mut option = |text: String| {
            arguments.push("-o".into());
            arguments.push(text.into());
        };
        option("BatchMode=yes".into());
        option("StrictHostKeyChecking=yes".into());
        option(format!("UserKnownHostsFile={}", quoted_path(known_hosts)));
        option("GlobalKnownHostsFile=/dev/null".into());
        option("UpdateHostKeys=no".into());
        option("CheckHostIP=no".into());
        option("ClearAllForwardings=yes".into());
        option("ForwardAgent=no".into());
        option("PermitLocalCommand=no".into());
        option("ProxyCommand=none".into());
        option(format!("ConnectTimeout={}", connect_seconds.max(1)));
        // Connect to the address that was checked, and expect the key of the host that was named.
        option(format!("HostName={address}"));
        option(format!("HostKeyAlias={}", self.key_alias()));
        option(format!("Port={}", self.port));
        if let Some(user) = &self.user {
            option(format!("User={user}"));
        }
        if let Some(identity) = &config.identity {
            option("IdentitiesOnly=yes".into());
            option(format!("IdentityFile={}", quoted_path(identity)));
        }
        arguments.push("--".into());
        arguments.push(
            self.host
                .trim_start_matches('[')
                .trim_end_matches(']')
                .into(),
        );
        arguments.push(format!("{service} {}", quoted_for_shell(&self.path)).into());
        arguments
    }
}

/// A path as the value of an ssh option: quoted, with the percent sign that starts a token doubled.
fn quoted_path(path: &Path) -> String {
    format!("\"{}\"", path.display().to_string().replace('%', "%%"))
}

/// A word for the shell at the other end.
fn quoted_for_shell(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''").replace('!', r"'\!'"))
}

/// Percent-decoding, as git does it for ssh URLs.
pub(super) fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first == b'%'
            && let [a, b, tail @ ..] = rest
            && let (Some(a), Some(b)) = ((*a as char).to_digit(16), (*b as char).to_digit(16))
        {
            bytes.push((a * 16 + b) as u8);
            rest = tail;
        } else {
            bytes.push(*first);
        }
    }
    String::from_utf8(bytes).ok()
}

fn connect(
    session: &Session,
    url: &str,
    service: &'static str,
) -> Result<SshStream, TransportError> {
    let config = session.transport().config();
    let destination = Destination::parse(url)?;
    let host = destination.host.clone();
    let Some(known_hosts) = &config.ssh.known_hosts else {
        return Err(TransportError::HostKey {
            host,
            reason: "no known_hosts file is configured".into(),
        });
    };
    let found = session.wait(
        &host,
        address::resolve(&config.policy, &host, destination.port),
    )?;
    let address = found
        .first()
        .ok_or_else(|| TransportError::Unavailable {
            host: host.clone(),
            reason: "its name has no address".into(),
        })?
        .ip();
    let mut command = Command::new(&config.ssh.program);
    command
        .args(destination.arguments(
            &config.ssh,
            known_hosts,
            address,
            config.limits.connect.as_secs(),
            service,
        ))
        .env_clear()
        .envs(
            ["PATH", "HOME", "USER", "LOGNAME", "SSH_AUTH_SOCK"]
                .into_iter()
                .filter_map(|k| Some((k, std::env::var_os(k)?))),
        )
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    session.wait(&host, async {
        let broken = |reason: String| TransportError::Unavailable {
            host: host.clone(),
            reason,
        };
        let mut child = command.spawn().map_err(|e| {
            broken(format!(
                "{} does not start: {e}",
                config.ssh.program.display()
            ))
        })?;
        let (Some(input), Some(output), Some(complaints)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(broken("ssh has no pipes".into()));
        };
        Ok(SshStream {
            session: session.clone(),
            url: url.to_owned(),
            host: host.clone(),
            child,
            input,
            output,
            complaints,
        })
    })
}

/// A running `ssh`. It is killed when the stream is dropped.
struct SshStream {
    session: Session,
    url: String,
    host: String,
    child: Child,
    input: ChildStdin,
    output: ChildStdout,
    complaints: ChildStderr,
}

impl SshStream {
    /// Why `ssh` or the service at the other end gave up, if it did.
    fn ending(&mut self) -> Result<(), TransportError> {
        let host = self.host.clone();
        let (status, complaints) = self.session.wait(&host, async {
            let mut text = Vec::new();
            // A failed read leaves us with less to say, and with the exit status.
            let _ = (&mut self.complaints)
                .take(MAX_STDERR as u64)
                .read_to_end(&mut text)
                .await;
            let status = self
                .child
                .wait()
                .await
                .map_err(|e| TransportError::Unavailable {
                    host: host.clone(),
                    reason: e.to_string(),
                })?;
            Ok((status, String::from_utf8_lossy(&text).into_owned()))
        })?;
        if status.success() {
            return Ok(());
        }
        Err(explain(&self.url, &self.host, &complaints))
    }

    fn broken(&mut self, error: io::Error) -> io::Error {
        let cause = match self.ending() {
            Err(cause) => cause,
            Ok(()) => TransportError::Unavailable {
                host: self.host.clone(),
                reason: error.to_string(),
            },
        };
        self.session.fail_io(cause)
    }
}

/// What `ssh` and git say, sorted by what helps.
fn explain(url: &str, host: &str, complaints: &str) -> TransportError {
    let lower = complaints.to_lowercase();
    let reason = complaints
        .lines()
        .map(str::trim)
        .rfind(|l| !l.is_empty() && !l.starts_with('@'))
        .map_or_else(|| "ssh ended without a word".to_owned(), printable);
    let any = |patterns: &[&str]| patterns.iter().any(|p| lower.contains(p));
    let host = host.to_owned();
    if any(&[
        "host key verification failed",
        "host identification has changed",
        "no matching host key",
    ]) {
        let reason = complaints
            .lines()
            .find(|l| l.to_lowercase().contains("host key is known"))
            .map_or(reason, printable);
        return TransportError::HostKey { host, reason };
    }
    if any(&["permission denied", "too many authentication failures"]) {
        return TransportError::AuthenticationRequired { host, sent: true };
    }
    if any(&[
        "does not appear to be a git repository",
        "repository not found",
        "no such file or directory",
        "not a git repository",
    ]) {
        return TransportError::NotARepository {
            url: url.to_owned(),
            reason,
        };
    }
    TransportError::Unavailable { host, reason }
}

impl Read for SshStream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let host = self.host.clone();
        let read = self
            .session
            .clone()
            .wait(&host, async { Ok(self.output.read(into).await) })
            .map_err(|e| self.session.fail_io(e))?;
        match read {
            Ok(0) => match self.ending() {
                Ok(()) => Ok(0),
                Err(cause) => Err(self.session.fail_io(cause)),
            },
            Ok(n) => {
                self.session
                    .received(n)
                    .map_err(|e| self.session.fail_io(e))?;
                Ok(n)
            }
            Err(e) => Err(self.broken(e)),
        }
    }
}

impl Write for SshStream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let host = self.host.clone();
        let written = self
            .session
            .clone()
            .wait(&host, async { Ok(self.input.write(from).await) })
            .map_err(|e| self.session.fail_io(e))?;
        written.map_err(|e| self.broken(e))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_becomes_arguments_that_carry_no_option_and_no_shell_word() {
        let destination =
            Destination::parse("ssh://git@example.com:2222/srv/it's%20here;$(id).git").unwrap();
        let config = SshConfig {
            identity: Some("/keys/id 100%".into()),
            ..SshConfig::default()
        };
        let arguments = destination.arguments(
            &config,
            Path::new("/etc/known hosts"),
            "192.0.2.7".parse().unwrap(),
            10,
            "git-upload-pack",
        );
        let text: Vec<String> = arguments
            .iter()
            .map(|a| a.to_string_lossy().into_owned())
            .collect();
        assert_eq!(
            text[text.len() - 3..],
            [
                "--",
                "example.com",
                r"git-upload-pack '/srv/it'\''s here;$(id).git'"
            ]
        );
        for option in [
            "BatchMode=yes",
            "StrictHostKeyChecking=yes",
            "HostName=192.0.2.7",
            "HostKeyAlias=[example.com]:2222",
            "Port=2222",
            "User=git",
            "UserKnownHostsFile=\"/etc/known hosts\"",
            "IdentityFile=\"/keys/id 100%%\"",
        ] {
            assert!(text.iter().any(|a| a == option), "{option} in {text:?}");
        }
    }

    #[test]
    fn urls_that_ssh_could_take_for_something_else_are_refused() {
        for url in [
            "ssh://-oProxyCommand=id/repo",
            "ssh://-oProxyCommand=id@host/repo",
            "ssh://%2doProxyCommand=id@host/repo",
            "ssh://user%40evil@host/repo",
            "ssh://user%0a@host/repo",
            "ssh://host/a%0ab",
            "ssh://host/",
            "ssh://host",
        ] {
            assert!(Destination::parse(url).is_err(), "{url}");
        }
        assert_eq!(
            Destination::parse("ssh://host/~me/repo.git").unwrap().path,
            "~me/repo.git"
        );
    }

    #[test]
    fn what_ssh_says_is_sorted_by_what_helps() {
        let code = |text| explain("ssh://h/r", "h", text).code();
        assert_eq!(
            code(
                "No ED25519 host key is known for h and you have requested strict checking.\nHost key verification failed.\n"
            ),
            "source_host_key"
        );
        assert_eq!(
            code("git@h: Permission denied (publickey).\n"),
            "source_auth_required"
        );
        assert_eq!(
            code("fatal: '/r' does not appear to be a git repository\n"),
            "not_a_repository"
        );
        assert_eq!(
            code("ssh: connect to host h port 22: Connection refused\n"),
            "source_unavailable"
        );
        assert_eq!(code(""), "source_unavailable");
    }
}
