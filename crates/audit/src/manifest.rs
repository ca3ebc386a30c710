//! The manifest: what an export says of itself, and the list of its files.
//!
//! ```text
//! daybook.dev/ledger-export/v1
//! origin daybook.example.com/tlog
//! size 1000000
//! root 5qh…=
//! exported 2026-01-01T00:00:00Z
//! repositories 999990                how many entries were signed when they were copied
//! files 7843
//!
//! <SHA-256>  <length>  <name>        one line a file, in the order of the archive
//!
//! sha256 <SHA-256 of everything above this line>
//! ```
//!
//! It is the last file, because it is written while the others are. Nothing is believed because it
//! stands here: what is proven follows from the signed checkpoint.

use std::fs::File;
use std::io::{self, BufRead, BufWriter, Read, Seek, Write};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use daybook_events::tree::TreeHead;
use jiff::Timestamp;
use sha2::{Digest, Sha256};

use crate::finding::{Findings, Kind, Place};

/// The name of the manifest in an export.
pub(crate) const NAME: &str = "MANIFEST";
/// The version of the format of an export.
pub const FORMAT: &str = "daybook.dev/ledger-export/v1";
/// A longer line is none of ours.
const MAX_LINE: u64 = 1024;
/// The first lines, up to the empty one.
const MAX_HEAD: usize = 16;

/// What a file is known by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) name: String,
    pub(crate) len: u64,
    /// Unknown where something stronger than a digest has judged the file.
    pub(crate) sha256: Option<[u8; 32]>,
}

/// Writes a manifest while the files are written.
#[derive(Debug)]
pub(crate) struct ManifestWriter {
    lines: BufWriter<File>,
    files: u64,
}

impl ManifestWriter {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            lines: BufWriter::new(tempfile::tempfile()?),
            files: 0,
        })
    }

    pub(crate) fn add(&mut self, name: &str, len: u64, sha256: &[u8; 32]) -> io::Result<()> {
        self.files += 1;
        writeln!(self.lines, "{}  {len}  {name}", hex::encode(sha256))
    }

    /// The whole manifest, and how long it is.
    pub(crate) fn finish(
        self,
        origin: &str,
        head: &TreeHead,
        exported: Timestamp,
        repositories: Option<u64>,
    ) -> io::Result<(u64, impl Read)> {
        let Self { lines, files } = self;
        let mut lines = lines.into_inner().map_err(io::IntoInnerError::into_error)?;
        let (size, root) = (head.size, BASE64.encode(head.root));
        let copied = repositories.map(|size| format!("repositories {size}\n"));
        let copied = copied.unwrap_or_default();
        let begin = format!(
            "{FORMAT}\norigin {origin}\nsize {size}\nroot {root}\nexported {exported}\n{copied}files {files}\n\n"
        );
        let mut hash = Sha256::new();
        hash.update(&begin);
        lines.rewind()?;
        let listed = io::copy(&mut lines, &mut hash)?;
        hash.update("\n");
        let end = format!("\nsha256 {}\n", hex::encode(hash.finalize()));
        lines.rewind()?;
        let len = begin.len() as u64 + listed + end.len() as u64;
        let whole = io::Cursor::new(begin)
            .chain(lines)
            .chain(io::Cursor::new(end));
        Ok((len, whole))
    }
}

/// What a manifest says of its export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) exported: Option<Timestamp>,
    /// How many entries were signed when the repositories were copied.
    pub(crate) repositories: Option<u64>,
}

/// Reads a manifest and compares it with what was found: the origin, the head, and every file in
/// order. Says at most one thing about the list.
pub(crate) fn check(
    manifest: impl BufRead,
    origin: &str,
    head: &TreeHead,
    mut found: impl Iterator<Item = Listed>,
    findings: &mut Findings,
) -> io::Result<Said> {
    let mut said = Said {
        exported: None,
        repositories: None,
    };
    let mut lines = Lines {
        input: manifest,
        hash: Sha256::new(),
        number: 0,
        offset: 0,
    };
    let wrong = |at: &Lines<_>, kind, what: String| {
        let place = Place {
            file_offset: Some(at.offset),
            ..Place::file(NAME)
        };
        (kind, place, format!("line {}: {what}", at.number))
    };
    let mut judge = || -> io::Result<Option<(Kind, Place, String)>> {
        let root = BASE64.encode(head.root);
        let claims = [
            ("origin ", origin.to_owned()),
            ("size ", head.size.to_string()),
            ("root ", root),
        ];
        let mut files = None;
        match lines.next()? {
            Some(line) if line == FORMAT => {}
            _ => {
                let what = format!("this version reads only {FORMAT}");
                return Ok(Some(wrong(&lines, Kind::ManifestMalformed, what)));
            }
        }
        for _ in 0..MAX_HEAD {
            let Some(line) = lines.next()? else { break };
            if line.is_empty() {
                break;
            }
            for (name, value) in &claims {
                if let Some(claimed) = line.strip_prefix(name)
                    && claimed != value
                {
                    let what = format!("{name}is {claimed}, and {value} in the checkpoint");
                    return Ok(Some(wrong(&lines, Kind::ManifestDiffers, what)));
                }
            }
            if let Some(time) = line.strip_prefix("exported ") {
                said.exported = time.parse().ok();
            }
            if let Some(size) = line.strip_prefix("repositories ") {
                said.repositories = size.parse().ok();
            }
            if let Some(count) = line.strip_prefix("files ") {
                files = count.parse::<u64>().ok();
            }
        }
        let mut listed = 0;
        loop {
            let Some(line) = lines.next()? else {
                let what = "the manifest ends before its list does".to_owned();
                return Ok(Some(wrong(&lines, Kind::ManifestMalformed, what)));
            };
            if line.is_empty() {
                break;
            }
            let mut parts = line.splitn(3, "  ");
            let (Some(sha256), Some(len), Some(name)) = (parts.next(), parts.next(), parts.next())
            else {
                let what = "it is not <SHA-256>  <length>  <name>".to_owned();
                return Ok(Some(wrong(&lines, Kind::ManifestMalformed, what)));
            };
            listed += 1;
            let Some(file) = found.next() else {
                let what = format!("{name} is not there");
                return Ok(Some(wrong(&lines, Kind::ManifestDiffers, what)));
            };
            let same = file.name == name
                && file.len.to_string() == len
                && file.sha256.is_none_or(|s| hex::encode(s) == sha256);
            if !same {
                let is = file.sha256.map(hex::encode).unwrap_or_default();
                let what = format!(
                    "it lists {name} of {len} bytes with {sha256}; there is {} of {} bytes {is}",
                    file.name, file.len
                );
                return Ok(Some(wrong(&lines, Kind::ManifestDiffers, what)));
            }
        }
        if let Some(file) = found.next() {
            let what = format!("{} is not listed", file.name);
            return Ok(Some(wrong(&lines, Kind::ManifestDiffers, what)));
        }
        if files != Some(listed) {
            let what = format!("{listed} files are listed, and another number is given");
            return Ok(Some(wrong(&lines, Kind::ManifestDiffers, what)));
        }
        let digest = hex::encode(lines.hash.clone().finalize());
        let last = lines.next()?;
        if last.as_deref() != Some(format!("sha256 {digest}").as_str()) || lines.next()?.is_some() {
            let what = format!("it is not the digest of the lines before it, {digest}");
            return Ok(Some(wrong(&lines, Kind::ManifestDiffers, what)));
        }
        Ok(None)
    };
    if let Some((kind, place, message)) = judge()? {
        findings.push(kind, place, message);
    }
    Ok(said)
}

/// Reads lines that end with a newline, and hashes them.
struct Lines<R> {
    input: R,
    hash: Sha256,
    number: u64,
    /// Where the last line began.
    offset: u64,
}

impl<R: BufRead> Lines<R> {
    /// The next line. One that is too long, is not text or has no end is none.
    fn next(&mut self) -> io::Result<Option<String>> {
        let mut bytes = Vec::new();
        let read = (&mut self.input)
            .take(MAX_LINE)
            .read_until(b'\n', &mut bytes)?;
        self.number += 1;
        if bytes.pop() != Some(b'\n') {
            return Ok(None);
        }
        self.hash.update(&bytes);
        self.hash.update("\n");
        self.offset += read as u64;
        Ok(String::from_utf8(bytes).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (Vec<u8>, TreeHead, Vec<Listed>) {
        let head = TreeHead {
            size: 5,
            root: [7; 32],
        };
        let files: Vec<Listed> = (0..3)
            .map(|n| Listed {
                name: format!("file-{n}"),
                len: n,
                sha256: Some([n as u8; 32]),
            })
            .collect();
        let mut writer = ManifestWriter::new().unwrap();
        for file in &files {
            writer
                .add(&file.name, file.len, &file.sha256.unwrap())
                .unwrap();
        }
        let (len, mut whole) = writer
            .finish("log", &head, Timestamp::UNIX_EPOCH, Some(41))
            .unwrap();
        let mut bytes = Vec::new();
        whole.read_to_end(&mut bytes).unwrap();
        assert_eq!(len, bytes.len() as u64);
        (bytes, head, files)
    }

    fn checked(bytes: &[u8], head: &TreeHead, files: &[Listed]) -> Findings {
        let mut findings = Findings::default();
        let files = files.iter().cloned();
        let said = check(bytes, "log", head, files, &mut findings).unwrap();
        if findings.problems() == 0 {
            let expected = Said {
                exported: Some(Timestamp::UNIX_EPOCH),
                repositories: Some(41),
            };
            assert_eq!(said, expected);
        }
        findings
    }

    #[test]
    fn any_changed_bit_of_a_manifest_is_noticed() {
        let (bytes, head, files) = sample();
        assert_eq!(checked(&bytes, &head, &files), Findings::default());
        // Also where nothing else is known of the files.
        let unknown: Vec<Listed> = files
            .iter()
            .cloned()
            .map(|f| Listed { sha256: None, ..f })
            .collect();
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(checked(&bad, &head, &files).problems(), 1, "bit {bit}");
            assert_eq!(checked(&bad, &head, &unknown).problems(), 1, "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert_eq!(checked(&bytes[..len], &head, &files).problems(), 1, "{len}");
        }
    }

    #[test]
    fn files_that_are_not_as_listed_are_noticed() {
        let (bytes, head, files) = sample();
        assert_eq!(checked(&bytes, &head, &files[..2]).problems(), 1);
        let mut more = files.clone();
        more.push(files[0].clone());
        assert_eq!(checked(&bytes, &head, &more).problems(), 1);
        let other = TreeHead { size: 6, ..head };
        assert_eq!(checked(&bytes, &other, &files).problems(), 1);
    }
}
