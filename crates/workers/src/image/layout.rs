//! An OCI image layout folder as content store.
//!
//! The folder is what the OCI image specification calls an image layout: `oci-layout`,
//! `index.json` and `blobs/sha256/<digest>`. Any OCI tool can read it, for example with
//! `buildah pull oci:<folder>:<reference>`; a reference is the full `repository:tag`, kept in the
//! annotation `org.opencontainers.image.ref.name`.
//!
//! Any number of threads and processes may read and write one folder at the same time:
//!
//! - A blob appears under its digest only when all of it is on disk: it is written to a file of
//!   its own in `tmp/`, synced, and renamed. Two writers of the same blob do no harm to each
//!   other.
//! - `index.json` is replaced as a whole, by one writer at a time (`index.lock`); readers need no
//!   lock.
//! - What a crash leaves in `tmp/` is removed when the folder is next opened. A file that a
//!   writer still works on is locked and stays; none is made while somebody looks (`index.lock`),
//!   so that one without a lock is nobody's.
//! - Reading checks the digest: [`BlobReader`] fails at the end of content that is not what its
//!   name says, and [`Layout::read`] returns nothing of it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use daybook_events::Digest;
use daybook_failpoints::reached;
use oci_spec::image::{
    ANNOTATION_REF_NAME, Descriptor, ImageIndex, ImageIndexBuilder, MediaType, OciLayout,
    OciLayoutBuilder,
};
use sha2::{Digest as _, Sha256};

use super::{ImageError, canonical_json};

/// Manifests, indexes and configurations are small; a larger one is refused. In bytes.
pub const MAX_DOCUMENT: u64 = 4 * 1024 * 1024;

/// A content store in the form of an OCI image layout folder. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Layout {
    root: Arc<Path>,
}

impl Layout {
    /// Opens the folder, making it if it is not there, and removes what crashed writers left.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, ImageError> {
        let root = root.into();
        let layout = Self {
            root: root.as_path().into(),
        };
        for folder in [layout.blobs(), layout.temporary()] {
            fs::create_dir_all(&folder)
                .map_err(ImageError::io(format!("creating {}", folder.display())))?;
        }
        let _lock = layout.lock_index()?;
        if !root.join("oci-layout").exists() {
            let version = OciLayoutBuilder::default()
                .image_layout_version("1.0.0")
                .build()
                .map_err(|e| layout.invalid("oci-layout", e))?;
            layout.replace("oci-layout", &version)?;
        } else {
            let version = OciLayout::from_file(root.join("oci-layout"))
                .map_err(|e| layout.invalid("oci-layout", e))?;
            if !version.image_layout_version().starts_with("1.") {
                return Err(layout.invalid(
                    "oci-layout",
                    format!(
                        "layout version {:?} is not known",
                        version.image_layout_version()
                    ),
                ));
            }
        }
        if !root.join("index.json").exists() {
            layout.replace("index.json", &empty_index()?)?;
        }
        layout.remove_abandoned()?;
        Ok(layout)
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether both are the same folder.
    pub fn is_same_as(&self, other: &Self) -> bool {
        match (self.root.canonicalize(), other.root.canonicalize()) {
            (Ok(a), Ok(b)) => a == b,
            _ => self.root == other.root,
        }
    }

    /// Where the blob of this digest is, if it is there.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    /// The size of a blob in bytes, if it is there. Says nothing about its content.
    pub fn size(&self, digest: &Digest) -> Result<Option<u64>, ImageError> {
        match fs::metadata(self.blob_path(digest)) {
            Ok(meta) => Ok(Some(meta.len())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(ImageError::io(format!("looking for blob {digest}"))(e)),
        }
    }

    /// Stores some bytes and returns their digest.
    pub fn put(&self, bytes: &[u8]) -> Result<Digest, ImageError> {
        let mut writer = self.writer()?;
        writer
            .write_all(bytes)
            .map_err(ImageError::io("writing a blob"))?;
        Ok(writer.finish(None)?.digest)
    }

    /// Starts a blob. Nothing of it is seen before [`BlobWriter::finish`].
    pub fn writer(&self) -> Result<BlobWriter, ImageError> {
        // Whoever removes what was abandoned holds the lock alone, and so never meets a file that
        // is made and not locked yet.
        let index = self.index_lock(File::lock_shared)?;
        let file = self
            .temporary_file("blob-")
            .map_err(ImageError::io(format!(
                "creating a file in {}",
                self.temporary().display()
            )))?;
        drop(index);
        Ok(BlobWriter {
            layout: self.clone(),
            file,
            hash: Sha256::new(),
            size: 0,
        })
    }

    /// Opens a blob for reading in sequence. The reader fails at the end if the content is not
    /// what the digest says.
    pub fn open_blob(&self, digest: &Digest) -> Result<BlobReader, ImageError> {
        match File::open(self.blob_path(digest)) {
            Ok(file) => Ok(BlobReader {
                file,
                hash: Sha256::new(),
                digest: digest.clone(),
                state: ReadState::Reading,
            }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(ImageError::NotFound {
                reference: digest.to_string(),
            }),
            Err(e) => Err(ImageError::io(format!("opening blob {digest}"))(e)),
        }
    }

    /// Reads a whole blob of at most `max` bytes, checked against its digest.
    pub fn read(&self, digest: &Digest, max: u64) -> Result<Vec<u8>, ImageError> {
        let mut bytes = Vec::new();
        self.open_blob(digest)?
            .take(max + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| damaged_or_io(digest, e))?;
        if bytes.len() as u64 > max {
            return Err(ImageError::Invalid {
                what: format!("the document {digest}"),
                reason: format!("it has more than {max} bytes"),
            });
        }
        Ok(bytes)
    }

    /// Copies a blob from another layout, checking it on the way. Nothing is done if it is here
    /// already, in the size given.
    pub fn copy_blob(&self, from: &Self, digest: &Digest, size: u64) -> Result<(), ImageError> {
        if self.is_same_as(from) || self.size(digest)? == Some(size) {
            return Ok(());
        }
        let mut reader = from.open_blob(digest)?;
        let mut writer = self.writer()?;
        io::copy(&mut reader, &mut writer).map_err(|e| damaged_or_io(digest, e))?;
        writer.finish(Some(digest))?;
        Ok(())
    }

    /// Removes a blob that was found damaged, so that it can be fetched again.
    pub fn discard_blob(&self, digest: &Digest) -> Result<(), ImageError> {
        match fs::remove_file(self.blob_path(digest)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(ImageError::io(format!("removing blob {digest}"))(e))
            }
            _ => Ok(()),
        }
    }

    /// Lets a reference name point at a manifest, which must be here.
    pub fn set_reference(
        &self,
        name: &str,
        digest: &Digest,
        media_type: MediaType,
    ) -> Result<(), ImageError> {
        let size = self.size(digest)?.ok_or_else(|| ImageError::NotFound {
            reference: digest.to_string(),
        })?;
        let mut descriptor = Descriptor::new(media_type, size, to_oci(digest)?);
        descriptor.set_annotations(Some(
            [(ANNOTATION_REF_NAME.to_owned(), name.to_owned())].into(),
        ));

        let _lock = self.lock_index()?;
        let mut index = self.index()?;
        let mut manifests = index.manifests().clone();
        manifests.retain(|d| ref_name(d) != Some(name));
        manifests.push(descriptor);
        // In order of name, so that equal contents make equal files.
        manifests.sort_by(|a, b| ref_name(a).cmp(&ref_name(b)));
        index.set_manifests(manifests);
        self.replace("index.json", &index)
    }

    /// The digest that a reference name points at.
    pub fn reference(&self, name: &str) -> Result<Option<Digest>, ImageError> {
        self.index()?
            .manifests()
            .iter()
            .find(|d| ref_name(d) == Some(name))
            .map(|d| from_oci(d.digest()))
            .transpose()
    }

    /// All reference names with what they point at, in order of name.
    pub fn references(&self) -> Result<Vec<(String, Digest)>, ImageError> {
        let index = self.index()?;
        let mut all = Vec::new();
        for descriptor in index.manifests() {
            if let Some(name) = ref_name(descriptor) {
                all.push((name.to_owned(), from_oci(descriptor.digest())?));
            }
        }
        Ok(all)
    }

    fn blobs(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    fn temporary(&self) -> PathBuf {
        self.root.join("tmp")
    }

    fn index(&self) -> Result<ImageIndex, ImageError> {
        let path = self.root.join("index.json");
        let bytes =
            fs::read(&path).map_err(ImageError::io(format!("reading {}", path.display())))?;
        serde_json::from_slice(&bytes).map_err(|e| self.invalid("index.json", e))
    }

    /// Keeps other writers of `index.json`, and makers of temporary files, out until the returned
    /// file is dropped.
    fn lock_index(&self) -> Result<File, ImageError> {
        self.index_lock(File::lock)
    }

    fn index_lock(&self, lock: fn(&File) -> io::Result<()>) -> Result<File, ImageError> {
        let path = self.root.join("index.lock");
        let doing = || format!("locking {}", path.display());
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(ImageError::io(doing()))?;
        lock(&file).map_err(ImageError::io(doing()))?;
        Ok(file)
    }

    /// A new file in `tmp/`, locked for as long as it is there. The index must be locked meanwhile.
    fn temporary_file(&self, prefix: &str) -> io::Result<tempfile::NamedTempFile> {
        let file = tempfile::Builder::new()
            .prefix(prefix)
            .tempfile_in(self.temporary())?;
        file.as_file().lock()?;
        Ok(file)
    }

    /// Replaces a document of the layout as a whole. The index must be locked.
    fn replace(&self, name: &str, document: &impl serde::Serialize) -> Result<(), ImageError> {
        let bytes = canonical_json(document).map_err(|e| self.invalid(name, e))?;
        let path = self.root.join(name);
        let write = || -> io::Result<()> {
            let mut file = self.temporary_file("document-")?;
            file.write_all(&bytes)?;
            publish(file, &path)
        };
        write().map_err(ImageError::io(format!("writing {}", path.display())))
    }

    /// Removes what no writer works on any more. The index must be locked.
    fn remove_abandoned(&self) -> Result<(), ImageError> {
        let folder = self.temporary();
        let doing = || format!("cleaning {}", folder.display());
        for entry in fs::read_dir(&folder).map_err(ImageError::io(doing()))? {
            let path = entry.map_err(ImageError::io(doing()))?.path();
            // Another process may finish or remove the file at any moment; then it is not ours.
            let Ok(file) = File::open(&path) else {
                continue;
            };
            if file.try_lock().is_ok() {
                let _ = fs::remove_file(&path);
            }
        }
        Ok(())
    }

    fn invalid(&self, name: &str, reason: impl ToString) -> ImageError {
        ImageError::Invalid {
            what: self.root.join(name).display().to_string(),
            reason: reason.to_string(),
        }
    }
}

/// What was written by a [`BlobWriter`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

/// A blob being written. Dropped unfinished, nothing is left of it.
#[derive(Debug)]
pub struct BlobWriter {
    layout: Layout,
    file: tempfile::NamedTempFile,
    hash: Sha256,
    size: u64,
}

impl BlobWriter {
    /// How many bytes were written so far.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Syncs the blob and puts it under its digest; refuses it if another digest was expected.
    /// When this returns, the blob survives a loss of power.
    pub fn finish(self, expected: Option<&Digest>) -> Result<Written, ImageError> {
        let digest = Digest::from_sha256(&self.hash.finalize().into());
        if let Some(expected) = expected
            && *expected != digest
        {
            return Err(ImageError::Damaged {
                digest: expected.clone(),
                reason: format!("{} bytes arrived whose digest is {digest}", self.size),
            });
        }
        // A blob that is there already is replaced: it has the same content, unless the disk
        // damaged it.
        publish(self.file, &self.layout.blob_path(&digest))
            .map_err(ImageError::io(format!("storing blob {digest}")))?;
        Ok(Written {
            digest,
            size: self.size,
        })
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.hash.update(&bytes[..n]);
        self.size += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReadState {
    Reading,
    Intact,
    Damaged,
}

/// Reads a blob and checks it: the read that meets the end fails if the content is not what the
/// digest says.
#[derive(Debug)]
pub struct BlobReader {
    file: File,
    hash: Sha256,
    digest: Digest,
    state: ReadState,
}

impl BlobReader {
    /// Reads what is left, so that all of the blob is checked.
    pub fn finish(mut self) -> Result<(), ImageError> {
        let digest = self.digest.clone();
        io::copy(&mut self, &mut io::sink()).map_err(|e| damaged_or_io(&digest, e))?;
        Ok(())
    }
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        match self.state {
            ReadState::Intact => return Ok(0),
            ReadState::Damaged => return Err(io::Error::new(io::ErrorKind::InvalidData, Mismatch)),
            ReadState::Reading => {}
        }
        let n = self.file.read(buffer)?;
        if n > 0 {
            self.hash.update(&buffer[..n]);
            return Ok(n);
        }
        let hash = std::mem::take(&mut self.hash).finalize();
        if Digest::from_sha256(&hash.into()) == self.digest {
            self.state = ReadState::Intact;
            Ok(0)
        } else {
            self.state = ReadState::Damaged;
            Err(io::Error::new(io::ErrorKind::InvalidData, Mismatch))
        }
    }
}

/// The mark of an I/O error that means damaged content.
#[derive(Debug, thiserror::Error)]
#[error("the content does not have the digest that it is stored under")]
struct Mismatch;

/// Tells damaged content, which a [`BlobReader`] reports as an I/O error, from a failing disk.
pub(crate) fn damaged_or_io(digest: &Digest, error: io::Error) -> ImageError {
    if is_mismatch(&error) {
        ImageError::Damaged {
            digest: digest.clone(),
            reason: "it is truncated or was changed".into(),
        }
    } else {
        ImageError::io(format!("reading blob {digest}"))(error)
    }
}

/// Whether a [`BlobReader`] said that the content is damaged. Readers above it may have wrapped
/// its error in theirs.
pub(crate) fn is_mismatch(error: &io::Error) -> bool {
    let mut cause = error
        .get_ref()
        .map(|e| e as &(dyn std::error::Error + 'static));
    while let Some(error) = cause {
        if error.is::<Mismatch>() {
            return true;
        }
        // `io::Error::source` skips the error that it wraps, so that one is looked at here.
        cause = match error.downcast_ref::<io::Error>() {
            Some(inner) => inner
                .get_ref()
                .map(|e| e as &(dyn std::error::Error + 'static)),
            None => error.source(),
        };
    }
    false
}

/// Syncs a temporary file, renames it to where it belongs and syncs the folder.
fn publish(file: tempfile::NamedTempFile, to: &Path) -> io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        file.as_file()
            .set_permissions(fs::Permissions::from_mode(0o644))?;
    }
    file.as_file().sync_all()?;
    reached("image.file.before");
    file.persist(to).map_err(|e| e.error)?;
    reached("image.file.after");
    if let Some(folder) = to.parent() {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

fn empty_index() -> Result<ImageIndex, ImageError> {
    ImageIndexBuilder::default()
        .schema_version(2u32)
        .media_type(MediaType::ImageIndex)
        .manifests(Vec::new())
        .build()
        .map_err(|e| ImageError::Invalid {
            what: "index.json".into(),
            reason: e.to_string(),
        })
}

fn ref_name(descriptor: &Descriptor) -> Option<&str> {
    descriptor
        .annotations()
        .as_ref()?
        .get(ANNOTATION_REF_NAME)
        .map(String::as_str)
}

/// A digest of ours as one of `oci-spec`.
pub(crate) fn to_oci(digest: &Digest) -> Result<oci_spec::image::Digest, ImageError> {
    digest
        .as_str()
        .parse()
        .map_err(|e: oci_spec::OciSpecError| ImageError::Invalid {
            what: format!("the digest {digest}"),
            reason: e.to_string(),
        })
}

/// A digest of `oci-spec` as one of ours; only SHA-256 is used here.
pub(crate) fn from_oci(digest: &oci_spec::image::Digest) -> Result<Digest, ImageError> {
    Digest::parse(digest).map_err(|e| ImageError::Unsupported(e.to_string()))
}
