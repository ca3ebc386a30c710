//! Credentials in a file, as `git credential-store` keeps them.

use std::path::{Path, PathBuf};

use super::ssh::decode;
use super::{HostCredential, Secret};

/// The largest file that is read, in bytes.
const MAX_SIZE: u64 = 64 * 1024;

/// Why a file with credentials cannot be used. It never shows what is in it.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsFileError {
    /// It cannot be read.
    #[error("the credentials in {} cannot be read", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// It is no such file.
    #[error("line {line} of {} is not https://USER:TOKEN@HOST", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
    },
}

impl HostCredential {
    /// Reads a file with a line `https://USER:TOKEN@HOST[:PORT]` for each host, percent-encoded as
    /// in a URL. Empty lines and those that begin with `#` are left out. A line with `http://` has
    /// its token sent without TLS.
    pub fn read_file(path: &Path) -> Result<Vec<Self>, CredentialsFileError> {
        let unreadable = |source| CredentialsFileError::Unreadable {
            path: path.to_owned(),
            source,
        };
        let size = std::fs::metadata(path).map_err(unreadable)?.len();
        if size > MAX_SIZE {
            return Err(unreadable(std::io::Error::other("it is too large")));
        }
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        let mut found = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            found.push(parse(line).ok_or_else(|| CredentialsFileError::Malformed {
                path: path.to_owned(),
                line: number,
            })?);
        }
        Ok(found)
    }
}

fn parse(line: &str) -> Option<HostCredential> {
    let url = url::Url::parse(line).ok()?;
    let plain = match url.scheme() {
        "https" => false,
        "http" => true,
        _ => return None,
    };
    let password = decode(url.password()?)?;
    Some(HostCredential {
        host: url.host_str()?.to_ascii_lowercase(),
        port: url.port(),
        username: decode(url.username())?,
        password: Secret::new(password),
        allow_plain_http: plain,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<HostCredential>, CredentialsFileError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("credentials");
        std::fs::write(&path, text).unwrap();
        HostCredential::read_file(&path)
    }

    #[test]
    fn a_line_is_a_credential_of_a_host() {
        let found = read(
            "# the forge\nhttps://daybook:t%40ken@Git.example.com\n\nhttp://x:y@127.0.0.1:3000/\n",
        )
        .unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].host, "git.example.com");
        assert_eq!(found[0].username, "daybook");
        assert_eq!(found[0].password.reveal(), "t@ken");
        assert!(!found[0].allow_plain_http);
        assert_eq!(found[1].port, Some(3000));
        assert!(found[1].allow_plain_http);
    }

    #[test]
    fn what_is_wrong_is_told_by_its_line_alone() {
        for text in [
            "https://daybook@host",
            "token",
            "ssh://a:hunter2@host",
            "https://:x@",
        ] {
            let told = format!("{:?}", read(&format!("# one\n{text}")).unwrap_err());
            assert!(told.contains("line: 2"), "{told}");
            assert!(!told.contains("hunter2"), "{told}");
        }
    }
}
