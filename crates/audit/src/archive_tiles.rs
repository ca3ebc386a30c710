//! The tree in an export, for those who read single tiles.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader};
use std::os::unix::fs::FileExt;
use std::path::Path;

use async_trait::async_trait;
use bytes::Bytes;
use daybook_store::tlog::ReadTiles;

use crate::archive::{Reader, Stop};

/// No file that is read alone is larger: see `source`.
const MAX_FILE: u64 = 256 * (65_535 + 2);

/// The files of an export, by name. Nothing that is read here is verified by that. It takes some
/// memory for each file, of which there are two for 256 events.
#[derive(Debug)]
pub struct ArchiveTiles {
    file: File,
    places: HashMap<String, (u64, u64)>,
}

impl ArchiveTiles {
    /// Reads all headers of an export.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut reader = Reader::new(Box::new(BufReader::with_capacity(
            1 << 20,
            File::open(path)?,
        )));
        let mut places = HashMap::new();
        let failed = |stop| match stop {
            Stop::Io(e) => e,
            Stop::Broken(finding) => {
                io::Error::new(io::ErrorKind::InvalidData, finding.to_string())
            }
        };
        while let Some(member) = reader.peek().map_err(failed)? {
            places.insert(member.name.clone(), (member.offset, member.len));
            reader.copy(&mut io::sink()).map_err(failed)?;
        }
        let file = File::open(path)?;
        Ok(Self { file, places })
    }
}

#[async_trait]
impl ReadTiles for ArchiveTiles {
    async fn get(&self, path: &str) -> io::Result<Option<Bytes>> {
        let Some((offset, len)) = self.places.get(path) else {
            return Ok(None);
        };
        if *len > MAX_FILE {
            return Err(io::Error::from(io::ErrorKind::FileTooLarge));
        }
        let mut bytes = vec![0; *len as usize];
        self.file.read_exact_at(&mut bytes, *offset)?;
        Ok(Some(bytes.into()))
    }
}
