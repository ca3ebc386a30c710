//! Making an export: one file with all that it takes to verify a ledger offline.

use std::fs::File;
use std::io::{self, BufWriter, Read};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use daybook_events::tree::TreeHead;
use daybook_store::tlog::{Checkpoint, CheckpointError, ReadTiles, TileKind, TilePath, TreeError};
use futures_util::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::archive::Writer;
use crate::layout::TreeFiles;
use crate::manifest::{self, ManifestWriter};
use crate::schema;
use crate::source::{BUNDLE, CHECKPOINT, GITOPS, KEYS, Repository, SCHEMAS, SIGNERS, STATE};

/// Tiles that are asked for at once.
const AHEAD: usize = 8;

/// Why no export was made. Nothing is left behind then.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The ledger cannot be read.
    #[error("{name} of the ledger cannot be read")]
    Read {
        /// Which file.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// Nothing was signed yet.
    #[error("the ledger has no checkpoint: nothing was signed yet")]
    NothingSigned,
    /// The checkpoint is none.
    #[error("the checkpoint of the ledger cannot be read")]
    Checkpoint(#[from] CheckpointError),
    /// A tile is missing.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The export cannot be written.
    #[error("{} cannot be written", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// What an export came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Exported {
    /// The log.
    pub origin: String,
    /// How many entries it has.
    pub size: u64,
    /// Repositories that are in it.
    pub repositories: usize,
    /// How many files are in it.
    pub files: u64,
    /// How long the export is, in bytes.
    pub bytes: u64,
}

/// Writes the ledger as it was signed last, with these repositories, to a file. `copied_at` is how
/// many entries were signed before the repositories were copied: commits that were recorded by then
/// are missed by the auditor where a copy does not have them. The same ledger,
/// repositories and time make the same bytes. The file appears under its name when it is complete
/// and on disk; until then, and after an error, what was there before is untouched. It takes a
/// constant amount of memory.
pub async fn export(
    tiles: &dyn ReadTiles,
    repositories: &[Repository],
    copied_at: Option<u64>,
    exported: Timestamp,
    path: &Path,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<Exported, ExportError> {
    let failed = |source| ExportError::Write {
        path: path.to_owned(),
        source,
    };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let unfinished = tempfile::Builder::new()
        .prefix(".daybook-export")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(folder)
        .map_err(failed)?;
    let note = resource(tiles, CHECKPOINT).await?;
    let note = note.ok_or(ExportError::NothingSigned)?;
    let (checkpoint, _) = Checkpoint::parse_unverified(&note)?;
    let head = checkpoint.head;
    let keys = resource(tiles, KEYS).await?;

    let mut out = Output {
        archive: Writer::new(BufWriter::with_capacity(1 << 20, unfinished)),
        manifest: ManifestWriter::new().map_err(failed)?,
        files: 0,
    };
    out.bytes(CHECKPOINT, &note).map_err(failed)?;
    if let Some(keys) = keys {
        out.bytes(KEYS, &keys).map_err(failed)?;
    }
    // What the server claims about its state, for the auditor to contradict.
    if let Some(state) = resource(tiles, STATE).await? {
        out.bytes(STATE, &state).map_err(failed)?;
    }
    let mut schemas = schema::published();
    schemas.sort_unstable();
    for (kind, text) in schemas {
        let name = format!("{SCHEMAS}events/{kind}.json");
        out.bytes(&name, text.as_bytes()).map_err(failed)?;
    }
    let mut sorted: Vec<&Repository> = repositories.iter().collect();
    sorted.sort_by(|a, b| a.project.cmp(&b.project));
    for repository in &sorted {
        let name = format!("{GITOPS}{}", repository.project);
        if let Some(signers) = &repository.allowed_signers {
            out.file(&format!("{name}{SIGNERS}"), signers)
                .map_err(failed)?;
        }
        out.file(&format!("{name}{BUNDLE}"), &repository.bundle)
            .map_err(failed)?;
    }
    let mut read = stream::iter(TreeFiles::new(head.size))
        .map(|path| tile(tiles, path, head.size))
        .buffered(AHEAD);
    while let Some((path, bytes)) = read.try_next().await? {
        out.bytes(&path.to_string(), &bytes).map_err(failed)?;
        if path.kind == TileKind::Entries {
            progress(path.index * 256 + path.width() as u64, head.size);
        }
    }
    drop(read);
    let files = out.files + 1;
    let bytes = out
        .finish(&checkpoint.origin, &head, exported, copied_at, path)
        .map_err(failed)?;
    Ok(Exported {
        origin: checkpoint.origin,
        size: head.size,
        repositories: sorted.len(),
        files,
        bytes,
    })
}

async fn resource(tiles: &dyn ReadTiles, name: &str) -> Result<Option<Bytes>, ExportError> {
    tiles.get(name).await.map_err(|source| ExportError::Read {
        name: name.to_owned(),
        source,
    })
}

async fn tile(
    tiles: &dyn ReadTiles,
    path: TilePath,
    size: u64,
) -> Result<(TilePath, Bytes), ExportError> {
    if let Some(bytes) = resource(tiles, &path.to_string()).await? {
        return Ok((path, bytes));
    }
    // The partial form may be gone since the full one is there.
    let full = path.when_full();
    let whole = match resource(tiles, &full.to_string()).await? {
        Some(whole) if !path.is_full() => whole,
        _ => return Err(TreeError::Missing { path, size }.into()),
    };
    Ok((path, crate::source::cut(path, whole)))
}

struct Output {
    archive: Writer<BufWriter<tempfile::NamedTempFile>>,
    manifest: ManifestWriter,
    files: u64,
}

impl Output {
    fn bytes(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let digest = Sha256::digest(bytes).into();
        self.files += 1;
        self.manifest.add(name, bytes.len() as u64, &digest)?;
        self.archive.file(name, bytes.len() as u64, bytes)
    }

    fn file(&mut self, name: &str, path: &Path) -> io::Result<()> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let mut hashing = Hashing {
            input: file,
            hash: Sha256::new(),
        };
        self.archive.file(name, len, &mut hashing)?;
        let digest = hashing.hash.finalize().into();
        self.files += 1;
        self.manifest.add(name, len, &digest)
    }

    fn finish(
        self,
        origin: &str,
        head: &TreeHead,
        exported: Timestamp,
        copied_at: Option<u64>,
        path: &Path,
    ) -> io::Result<u64> {
        let Self {
            mut archive,
            manifest,
            ..
        } = self;
        let (len, whole) = manifest.finish(origin, head, exported, copied_at)?;
        archive.file(manifest::NAME, len, whole)?;
        let buffered = archive.finish()?;
        let file = buffered
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        file.as_file().sync_all()?;
        let bytes = file.as_file().metadata()?.len();
        file.persist(path).map_err(|e| e.error)?;
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
        Ok(bytes)
    }
}

struct Hashing {
    input: File,
    hash: Sha256,
}

impl Read for Hashing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.input.read(buffer)?;
        self.hash.update(&buffer[..read]);
        Ok(read)
    }
}
