//! Where the files of a ledger come from: an export, a folder, a server.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use daybook_store::tlog::{TileKind, TilePath};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::archive::{Reader, Stop};
use crate::finding::{Findings, Kind, Place};
use crate::layout::order;
use crate::manifest::{self, Listed};
use crate::spares::Spares;

/// Names of files that every ledger has.
pub(crate) const CHECKPOINT: &str = "checkpoint";
pub(crate) const KEYS: &str = "keys";
/// What the server says that the state hash is: `<position> <hash>`.
pub(crate) const STATE: &str = "state_hash";
/// Folders of an export.
pub(crate) const SCHEMAS: &str = "schemas/";
pub(crate) const GITOPS: &str = "gitops/";
/// How the two files of a repository end.
pub(crate) const BUNDLE: &str = ".bundle";
pub(crate) const SIGNERS: &str = ".allowed_signers";

/// No checkpoint, key list or schema is larger.
const MAX_SMALL: u64 = 1 << 20;
/// A bundle of entries is not larger: 256 entries of 65,535 bytes, each with its length.
const MAX_BUNDLE: u64 = 256 * (65_535 + 2);
/// No export has more schemas and repositories.
const MAX_OTHERS: usize = 10_000;
/// Bundles are much larger, and so are read into their own memory at once.
const READ_BUFFER: usize = 8 << 10;

/// Files that are read by name: those of a folder, or those of a server.
pub trait ReadFiles: Send {
    /// A file by its name below the root, such as `checkpoint` or `tile/0/000.p/17`; `None` if
    /// there is no such file. One of more than `most` bytes is an error of the kind
    /// [`io::ErrorKind::FileTooLarge`].
    fn get(&mut self, name: &str, most: u64) -> io::Result<Option<Bytes>>;

    /// The names of the files in a folder, in order; none where they cannot be listed.
    fn list(&mut self, folder: &str) -> io::Result<Vec<String>>;

    /// Where a file is on this machine, if it is on it.
    fn path(&self, name: &str) -> Option<PathBuf>;

    /// Whether it is asked for what is there now, so that going back is a finding.
    fn is_live(&self) -> bool {
        false
    }
}

/// A GitOps repository that came with a ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repository {
    /// Whose it is.
    pub project: String,
    /// A git bundle of all of it.
    pub bundle: PathBuf,
    /// Who may sign its commits, as `git verify-commit` reads it.
    pub allowed_signers: Option<PathBuf>,
}

/// A ledger to be verified.
pub struct Source {
    name: String,
    origin: Origin,
    front: Front,
    spares: Arc<Spares>,
}

enum Origin {
    Archive(Box<Reader>),
    Files(Box<dyn ReadFiles>),
}

/// What comes before the tree.
#[derive(Debug, Default)]
struct Front {
    small: BTreeMap<String, Bytes>,
    repositories: BTreeMap<String, Repository>,
    /// In the order in which they came.
    listed: Vec<Listed>,
    /// Where repositories of an archive are unpacked to.
    folder: Option<TempDir>,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Source").field(&self.name).finish()
    }
}

/// Why a ledger could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It cannot be read.
    #[error("{name} cannot be read")]
    Io {
        /// What was opened.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// It is neither an export nor a folder with a ledger.
    #[error("{name} is no export of a ledger: {reason}")]
    NoLedger {
        /// What was opened.
        name: String,
        /// What is missing.
        reason: String,
    },
}

impl OpenError {
    fn io(name: &str) -> impl FnOnce(io::Error) -> Self {
        let name = name.to_owned();
        move |source| Self::Io { name, source }
    }
}

/// A tile or a bundle as it was found.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) path: TilePath,
    pub(crate) bytes: Bytes,
    /// Where it begins in the archive.
    pub(crate) offset: Option<u64>,
}

impl Found {
    pub(crate) fn place(&self) -> Place {
        Place::file(self.path.to_string()).at(self.offset)
    }
}

/// How large a tile can be.
pub(crate) fn most(path: TilePath) -> u64 {
    match path.kind {
        TileKind::Entries => MAX_BUNDLE,
        TileKind::Hashes { .. } => 32 * path.width() as u64,
    }
}

impl Source {
    /// Opens an export, or a folder that has the files of one or of a notary.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let name = path.display().to_string();
        let found = fs::metadata(path).map_err(OpenError::io(&name))?;
        if found.is_dir() {
            return Self::files(name, Box::new(Folder(path.to_owned())));
        }
        let file = File::open(path).map_err(OpenError::io(&name))?;
        Self::archive(name, Box::new(BufReader::with_capacity(READ_BUFFER, file)))
    }

    /// A ledger whose files are read by name.
    pub fn files(name: String, mut files: Box<dyn ReadFiles>) -> Result<Self, OpenError> {
        let mut front = Front::default();
        for small in [CHECKPOINT, KEYS, STATE] {
            let found = files.get(small, MAX_SMALL).map_err(OpenError::io(&name))?;
            if let Some(bytes) = found {
                front.take_small(small, bytes);
            }
        }
        if !front.small.contains_key(CHECKPOINT) {
            let reason = "it has no checkpoint".to_owned();
            return Err(OpenError::NoLedger { name, reason });
        }
        for folder in [SCHEMAS, "schemas/events/", GITOPS] {
            let names = files.list(folder).map_err(OpenError::io(&name))?;
            for file in names.into_iter().take(MAX_OTHERS) {
                let file = format!("{folder}{file}");
                let Some(path) = files.path(&file) else {
                    continue;
                };
                let listed = list(&file, &path).map_err(OpenError::io(&file))?;
                front.listed.push(listed);
                front.repository(&file, &path);
            }
        }
        let origin = Origin::Files(files);
        Ok(Self {
            name,
            origin,
            front,
            spares: Arc::default(),
        })
    }

    /// An export that is read from its beginning.
    pub fn archive(name: String, input: Box<dyn Read + Send>) -> Result<Self, OpenError> {
        let mut reader = Reader::new(input);
        match reader.peek() {
            Ok(Some(_)) => {}
            Ok(None) => {
                let reason = "it is empty".to_owned();
                return Err(OpenError::NoLedger { name, reason });
            }
            Err(Stop::Io(source)) => return Err(OpenError::Io { name, source }),
            Err(Stop::Broken(finding)) => {
                let reason = finding.to_string();
                return Err(OpenError::NoLedger { name, reason });
            }
        }
        Ok(Self {
            name,
            origin: Origin::Archive(Box::new(reader)),
            front: Front::default(),
            spares: Arc::default(),
        })
    }

    /// What it is called: a path or a URL.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is a server, which shows what it has now.
    pub fn is_live(&self) -> bool {
        matches!(&self.origin, Origin::Files(files) if files.is_live())
    }

    /// Reads what comes before the tree.
    pub(crate) fn begin(&mut self, findings: &mut Findings) -> Result<(), Stop> {
        let Origin::Archive(reader) = &mut self.origin else {
            return Ok(());
        };
        while let Some(member) = reader.peek()? {
            if member.name == manifest::NAME || member.name.starts_with("tile/") {
                break;
            }
            let member = member.clone();
            let place = Place::file(&member.name).at(Some(member.offset));
            let front = &mut self.front;
            let before = front.listed.last().map(|l| rank(&l.name));
            if before.is_some_and(|before| before >= rank(&member.name)) {
                let message = "it stands after a file that comes after it, or it is there twice";
                findings.push(Kind::FileOutOfOrder, place.clone(), message);
            }
            let known = match member.name.as_str() {
                CHECKPOINT | KEYS | STATE => true,
                name => name.starts_with(SCHEMAS) || repository_of(name).is_some(),
            };
            if !known || front.listed.len() == MAX_OTHERS {
                let message = "no export has such a file";
                findings.push(Kind::FileUnexpected, place, message);
                reader.copy(&mut io::sink())?;
            } else if member.name.starts_with(GITOPS) {
                front.unpack(&member.name, member.len, reader)?;
            } else {
                let bytes = reader.read(MAX_SMALL)?;
                front.take_small(&member.name, bytes);
            }
        }
        Ok(())
    }

    /// Where the memory of bundles goes that nobody reads any more.
    pub(crate) fn spares(&self) -> Arc<Spares> {
        Arc::clone(&self.spares)
    }

    /// The checkpoint or the keys.
    pub(crate) fn small(&self, name: &str) -> Option<Bytes> {
        self.front.small.get(name).cloned()
    }

    /// The repositories that came with it.
    pub(crate) fn repositories(&self) -> Vec<Repository> {
        self.front.repositories.values().cloned().collect()
    }

    /// Reads a tile of a tree of this size. The tiles are asked for in the order of an export.
    pub(crate) fn tile(
        &mut self,
        path: TilePath,
        size: u64,
        findings: &mut Findings,
    ) -> Result<Option<Found>, Stop> {
        match &mut self.origin {
            Origin::Archive(reader) => from_archive(reader, path, size, &self.spares, findings),
            Origin::Files(files) => from_files(files.as_mut(), path, findings),
        }
    }

    /// Reads what comes after the tree, and compares the manifest with all files that there were.
    pub(crate) fn end(
        &mut self,
        origin: &str,
        head: &daybook_events::tree::TreeHead,
        tiles: impl Iterator<Item = Listed>,
        findings: &mut Findings,
    ) -> Result<Option<manifest::Said>, Stop> {
        let listed = std::mem::take(&mut self.front.listed);
        let all = listed.into_iter().chain(tiles);
        match &mut self.origin {
            Origin::Archive(reader) => {
                let mut manifest = None;
                while let Some(member) = reader.peek()? {
                    let (name, offset) = (member.name.clone(), member.offset);
                    if name == manifest::NAME && manifest.is_none() {
                        let mut file = tempfile::tempfile().map_err(Stop::Io)?;
                        reader.copy(&mut file)?;
                        file.rewind().map_err(Stop::Io)?;
                        manifest = Some(file);
                        continue;
                    }
                    let place = Place::file(&name).at(Some(offset));
                    let message = "no such file can follow on the tree";
                    findings.push(Kind::FileUnexpected, place, message);
                    reader.copy(&mut io::sink())?;
                }
                let Some(manifest) = manifest else {
                    let place = Place::file(manifest::NAME);
                    findings.push(Kind::FileMissing, place, "the export has no manifest");
                    return Ok(None);
                };
                let manifest = BufReader::new(manifest);
                manifest::check(manifest, origin, head, all, findings)
                    .map(Some)
                    .map_err(Stop::Io)
            }
            Origin::Files(files) => {
                let Some(path) = files.path(manifest::NAME).filter(|p| p.exists()) else {
                    return Ok(None);
                };
                let manifest = BufReader::new(File::open(path).map_err(Stop::Io)?);
                manifest::check(manifest, origin, head, all, findings)
                    .map(Some)
                    .map_err(Stop::Io)
            }
        }
    }
}

/// The order of files before the tree.
fn rank(name: &str) -> (u8, &str) {
    let rank = match name {
        CHECKPOINT => 0,
        KEYS => 1,
        STATE => 2,
        name if name.starts_with(SCHEMAS) => 3,
        _ => 4,
    };
    (rank, name)
}

/// The project of a file of a repository.
fn repository_of(name: &str) -> Option<(&str, bool)> {
    let name = name.strip_prefix(GITOPS)?;
    match name.strip_suffix(BUNDLE) {
        Some(project) => Some((project, true)),
        None => Some((name.strip_suffix(SIGNERS)?, false)),
    }
}

fn list(name: &str, path: &Path) -> io::Result<Listed> {
    let mut hash = Sha256::new();
    let len = io::copy(&mut File::open(path)?, &mut hash)?;
    Ok(Listed {
        name: name.to_owned(),
        len,
        sha256: Some(hash.finalize().into()),
    })
}

impl Front {
    fn take_small(&mut self, name: &str, bytes: Bytes) {
        self.listed.push(Listed {
            name: name.to_owned(),
            len: bytes.len() as u64,
            sha256: Some(Sha256::digest(&bytes).into()),
        });
        // Schemas are for others; see `schema`.
        if !name.starts_with(SCHEMAS) {
            self.small.entry(name.to_owned()).or_insert(bytes);
        }
    }

    fn repository(&mut self, name: &str, path: &Path) {
        let Some((project, is_bundle)) = repository_of(name) else {
            return;
        };
        let entry = self
            .repositories
            .entry(project.to_owned())
            .or_insert_with(|| Repository {
                project: project.to_owned(),
                bundle: PathBuf::new(),
                allowed_signers: None,
            });
        if is_bundle {
            entry.bundle = path.to_owned();
        } else {
            entry.allowed_signers = Some(path.to_owned());
        }
    }

    fn unpack(&mut self, name: &str, len: u64, reader: &mut Reader) -> Result<(), Stop> {
        let folder = match self.folder.take() {
            Some(folder) => folder,
            None => tempfile::tempdir().map_err(Stop::Io)?,
        };
        // The archive has only plain names; this one has no folder in it any more.
        let path = folder.path().join(name.replace('/', "_"));
        self.folder = Some(folder);
        let mut out = Hashing {
            file: File::create(&path).map_err(Stop::Io)?,
            hash: Sha256::new(),
        };
        reader.copy(&mut out)?;
        self.listed.push(Listed {
            name: name.to_owned(),
            len,
            sha256: Some(out.hash.finalize().into()),
        });
        self.repository(name, &path);
        Ok(())
    }
}

struct Hashing {
    file: File,
    hash: Sha256,
}

impl io::Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// The tile that comes next in the archive, if it is the one that is asked for. What is there and
/// belongs before it is reported and passed over; what belongs after it waits.
fn from_archive(
    reader: &mut Reader,
    path: TilePath,
    size: u64,
    spares: &Spares,
    findings: &mut Findings,
) -> Result<Option<Found>, Stop> {
    let name = path.to_string();
    while let Some(member) = reader.peek()? {
        let member = member.clone();
        if member.name == name {
            let bytes = match path.kind {
                TileKind::Entries => reader.read_into(most(path), |len| spares.take(len))?,
                TileKind::Hashes { .. } => reader.read(most(path))?,
            };
            let offset = Some(member.offset);
            return Ok(Some(Found {
                path,
                bytes,
                offset,
            }));
        }
        if member.name == manifest::NAME {
            break;
        }
        let place = Place::file(&member.name).at(Some(member.offset));
        let found = member.name.parse().ok().and_then(|p| order(p, size));
        match found {
            Some(found) if Some(found) > order(path, size) => break,
            Some(_) => {
                let message = "it stands after a file that comes after it, or it is there twice";
                findings.push(Kind::FileOutOfOrder, place, message);
            }
            None => {
                let message = format!("no ledger of {size} entries has such a file");
                findings.push(Kind::FileUnexpected, place, message);
            }
        }
        reader.copy(&mut io::sink())?;
    }
    findings.push(
        Kind::FileMissing,
        Place::file(&name),
        format!("a ledger of {size} entries has it"),
    );
    Ok(None)
}

fn from_files(
    files: &mut dyn ReadFiles,
    path: TilePath,
    findings: &mut Findings,
) -> Result<Option<Found>, Stop> {
    let mut get = |at: TilePath| match files.get(&at.to_string(), most(at)) {
        Ok(found) => Ok(found),
        Err(e) if e.kind() == io::ErrorKind::FileTooLarge => {
            let place = Place::file(at.to_string());
            findings.push(Kind::FileTooLarge, place, e.to_string());
            Ok(Some(Bytes::new()))
        }
        Err(e) => Err(Stop::Io(e)),
    };
    let mut found = get(path)?;
    if found.is_none() && !path.is_full() {
        // A server may have removed the partial form when the full one was there.
        found = get(path.when_full())?.map(|full| cut(path, full));
    }
    if found.is_none() {
        let place = Place::file(path.to_string());
        findings.push(Kind::FileMissing, place, "this ledger has it");
    }
    Ok(found.map(|bytes| Found {
        path,
        bytes,
        offset: None,
    }))
}

/// The first hashes or entries of a full tile; all of it where it has too few.
pub(crate) fn cut(path: TilePath, full: Bytes) -> Bytes {
    let len = match path.kind {
        TileKind::Hashes { .. } => 32 * path.width(),
        TileKind::Entries => (0..path.width()).fold(0, |at, _| {
            let len = full
                .get(at..at + 2)
                .map(|b| u16::from_be_bytes([b[0], b[1]]));
            at + 2 + usize::from(len.unwrap_or(0))
        }),
    };
    full.slice(..len.min(full.len()))
}

/// The files of a folder.
struct Folder(PathBuf);

impl ReadFiles for Folder {
    fn get(&mut self, name: &str, most: u64) -> io::Result<Option<Bytes>> {
        use io::ErrorKind::{IsADirectory, NotADirectory, NotFound};
        let file = match File::open(self.0.join(name)) {
            Ok(file) => file,
            Err(e) if matches!(e.kind(), NotFound | NotADirectory | IsADirectory) => {
                return Ok(None);
            }
            Err(e) => return Err(e),
        };
        let found = file.metadata()?;
        if found.is_dir() {
            return Ok(None);
        }
        let mut bytes = Vec::with_capacity(found.len().min(most) as usize);
        file.take(most + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > most {
            let message = format!("{name} has more than {most} bytes");
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
        }
        Ok(Some(bytes.into()))
    }

    fn list(&mut self, folder: &str) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(self.0.join(folder)) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                names.extend(entry.file_name().into_string());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        Some(self.0.join(name))
    }
}
