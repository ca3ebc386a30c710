//! A zip archive without compression: the same bytes for the same files.
//!
//! What is ejected is small, or packed by git already. Times are not kept: every entry has the
//! earliest one that the format knows.

use std::io::{self, Write};

use flate2::Crc;

/// First of January 1980, midnight, in the format of DOS.
const TIME: [u8; 4] = [0, 0, 0x21, 0];
/// Version 2.0 of the format, made by Unix.
const MADE_BY: [u8; 2] = [20, 3];
/// Names are UTF-8.
const FLAGS: [u8; 2] = [0, 0x08];

/// Writes an archive.
#[derive(Debug)]
pub(super) struct Zip<W> {
    out: W,
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    name: String,
    executable: bool,
    crc: u32,
    size: u32,
    offset: u32,
}

fn too_large() -> io::Error {
    io::Error::other("it is too large for a zip archive")
}

impl<W: Write + io::Seek> Zip<W> {
    /// An archive without entries.
    pub(super) fn new(out: W) -> Self {
        Self {
            out,
            entries: Vec::new(),
        }
    }

    /// Adds a file.
    pub(super) fn add(&mut self, name: &str, executable: bool, content: &[u8]) -> io::Result<()> {
        let mut crc = Crc::new();
        crc.update(content);
        let offset = self.out.stream_position()?;
        let entry = Entry {
            name: name.to_owned(),
            executable,
            crc: crc.sum(),
            size: u32::try_from(content.len()).map_err(|_| too_large())?,
            offset: u32::try_from(offset).map_err(|_| too_large())?,
        };
        self.out.write_all(b"PK\x03\x04")?;
        self.out.write_all(&[20, 0])?;
        self.out.write_all(&entry.common()?)?;
        self.out.write_all(name.as_bytes())?;
        self.out.write_all(content)?;
        self.entries.push(entry);
        Ok(())
    }

    /// Writes the list of the entries.
    pub(super) fn finish(mut self) -> io::Result<W> {
        let begin = self.out.stream_position()?;
        for entry in &self.entries {
            self.out.write_all(b"PK\x01\x02")?;
            self.out.write_all(&MADE_BY)?;
            self.out.write_all(&[20, 0])?;
            self.out.write_all(&entry.common()?)?;
            // No comment, one disk, no attributes but the mode of a regular file.
            self.out.write_all(&[0; 6])?;
            let mode: u32 = if entry.executable {
                0o100_755
            } else {
                0o100_644
            };
            self.out.write_all(&(mode << 16).to_le_bytes())?;
            self.out.write_all(&entry.offset.to_le_bytes())?;
            self.out.write_all(entry.name.as_bytes())?;
        }
        let end = self.out.stream_position()?;
        let count = u16::try_from(self.entries.len()).map_err(|_| too_large())?;
        let (begin, size) = (u32::try_from(begin), u32::try_from(end - begin));
        self.out.write_all(b"PK\x05\x06\0\0\0\0")?;
        self.out.write_all(&count.to_le_bytes())?;
        self.out.write_all(&count.to_le_bytes())?;
        self.out
            .write_all(&size.map_err(|_| too_large())?.to_le_bytes())?;
        self.out
            .write_all(&begin.map_err(|_| too_large())?.to_le_bytes())?;
        self.out.write_all(&[0, 0])?;
        self.out.flush()?;
        Ok(self.out)
    }
}

impl Entry {
    /// What both headers of an entry have: from the flags to the lengths of its name and of extra
    /// fields, of which there are none.
    fn common(&self) -> io::Result<Vec<u8>> {
        let length = u16::try_from(self.name.len()).map_err(|_| too_large())?;
        let mut out = Vec::with_capacity(24);
        out.extend(FLAGS);
        out.extend([0, 0]);
        out.extend(TIME);
        out.extend(self.crc.to_le_bytes());
        out.extend(self.size.to_le_bytes());
        out.extend(self.size.to_le_bytes());
        out.extend(length.to_le_bytes());
        out.extend([0, 0]);
        Ok(out)
    }
}
