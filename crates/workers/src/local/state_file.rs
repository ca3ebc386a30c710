//! Small files that are replaced as a whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Replaces a file, so that a reader sees the old content or the new one and never a part, also
/// after a loss of power. Only its owner may read it: it may hold environment variables.
pub(super) fn write<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let temporary = write_temporary(path, value, true)?;
    fs::rename(&temporary, path)?;
    if let Some(parent) = path.parent() {
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}

/// As [`write`], but without waiting for the disk: enough against the death of this process.
pub(super) fn write_lazily<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let temporary = write_temporary(path, value, false)?;
    fs::rename(temporary, path)
}

fn write_temporary<T: Serialize>(
    path: &Path,
    value: &T,
    sync: bool,
) -> io::Result<std::path::PathBuf> {
    let temporary = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(&serde_json::to_vec_pretty(value)?)?;
    if sync {
        file.sync_data()?;
    }
    Ok(temporary)
}

/// Reads a file; `None` if there is none.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes a file or a folder with all that is in it; none is fine too.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    let done = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match done {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
