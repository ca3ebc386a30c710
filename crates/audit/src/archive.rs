//! The archive: a tar file of one exact form.
//!
//! Names are plain, headers are ustar with nothing in them but name and length, padding is zero,
//! two zero blocks end it. Whatever is written in another way is refused with the byte at which it
//! begins, so that nothing hides between the files, and nothing in a header can make a reader write
//! outside of a folder or reserve memory for a length that somebody made up.

use std::io::{self, Read, Write};

use bytes::{Bytes, BytesMut};

use crate::finding::{Finding, Kind, Place};

/// Blocks of a tar file.
const BLOCK: usize = 512;
/// A longer name is not written.
const MAX_NAME: usize = 100;

/// The header of a file; `None` if the name cannot be one.
fn header(name: &str, len: u64) -> Option<[u8; BLOCK]> {
    let plain = |part: &str| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
    };
    if name.len() > MAX_NAME || !name.split('/').all(plain) || len >= 1 << 33 {
        return None;
    }
    let mut header = tar::Header::new_ustar();
    header.set_path(name).ok()?;
    header.set_size(len);
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_entry_type(tar::EntryType::Regular);
    header.set_cksum();
    Some(*header.as_bytes())
}

fn padding(len: u64) -> usize {
    (BLOCK - (len % BLOCK as u64) as usize) % BLOCK
}

/// Writes an archive.
#[derive(Debug)]
pub(crate) struct Writer<W> {
    out: W,
}

impl<W: Write> Writer<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out }
    }

    /// Writes a file of exactly this length.
    pub(crate) fn file(&mut self, name: &str, len: u64, mut content: impl Read) -> io::Result<()> {
        let header = header(name, len).ok_or_else(|| {
            io::Error::other(format!("{name} of {len} bytes cannot be in an archive"))
        })?;
        self.out.write_all(&header)?;
        let written = io::copy(&mut content.by_ref().take(len), &mut self.out)?;
        if written != len {
            return Err(io::Error::other(format!("{name} became shorter meanwhile")));
        }
        self.out.write_all(&[0; BLOCK][..padding(len)])
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        Ok(self.out)
    }
}

/// Why an archive cannot be read on.
#[derive(Debug)]
pub(crate) enum Stop {
    /// It is not what an export is. The finding says where.
    Broken(Box<Finding>),
    /// The file cannot be read.
    Io(io::Error),
}

impl Stop {
    fn malformed(offset: u64, message: impl Into<String>) -> Self {
        let place = Place::archive(offset);
        Self::Broken(Box::new(Finding::new(
            Kind::ArchiveMalformed,
            place,
            message,
        )))
    }

    fn truncated(offset: u64, what: &str) -> Self {
        let message = format!("the archive ends in the middle of {what}");
        let place = Place::archive(offset);
        Self::Broken(Box::new(Finding::new(
            Kind::ArchiveTruncated,
            place,
            message,
        )))
    }
}

/// What comes next in an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) len: u64,
    /// Where its content begins.
    pub(crate) offset: u64,
}

/// Reads an archive from its beginning to its end.
pub(crate) struct Reader {
    input: Box<dyn Read + Send>,
    offset: u64,
    next: Option<Member>,
    ended: bool,
}

impl Reader {
    pub(crate) fn new(input: Box<dyn Read + Send>) -> Self {
        Self {
            input,
            offset: 0,
            next: None,
            ended: false,
        }
    }

    /// The file that comes next; none at the end.
    pub(crate) fn peek(&mut self) -> Result<Option<&Member>, Stop> {
        if self.next.is_none() && !self.ended {
            self.next = self.read_header()?;
            self.ended = self.next.is_none();
        }
        Ok(self.next.as_ref())
    }

    fn read_header(&mut self) -> Result<Option<Member>, Stop> {
        let begin = self.offset;
        let mut block = [0; BLOCK];
        let read = self.fill(&mut block)?;
        if read < BLOCK {
            let what = if read == 0 {
                "it: its end is missing"
            } else {
                "a header"
            };
            return Err(Stop::truncated(begin + read as u64, what));
        }
        if block == [0; BLOCK] {
            return self.read_end(begin).map(|()| None);
        }
        let found = tar::Header::from_byte_slice(&block);
        let name = found.path_bytes();
        let name = std::str::from_utf8(&name).unwrap_or_default().to_owned();
        let len = found.entry_size().unwrap_or(u64::MAX);
        match header(&name, len) {
            Some(canonical) if canonical == block => {}
            Some(canonical) => {
                let byte = canonical.iter().zip(&block).position(|(a, b)| a != b);
                let offset = begin + byte.unwrap_or(0) as u64;
                let message = format!("the header of {name:?} is not as an export writes it");
                return Err(Stop::malformed(offset, message));
            }
            None => {
                let message = "this is no header of a file in an export".to_owned();
                return Err(Stop::malformed(begin, message));
            }
        }
        let offset = self.offset;
        Ok(Some(Member { name, len, offset }))
    }

    /// The first of two zero blocks was read: the second and nothing else must follow.
    fn read_end(&mut self, begin: u64) -> Result<(), Stop> {
        let mut block = [0; BLOCK];
        let read = self.fill(&mut block)?;
        if read < BLOCK {
            return Err(Stop::truncated(begin + (BLOCK + read) as u64, "its end"));
        }
        if let Some(byte) = block.iter().position(|b| *b != 0) {
            let offset = begin + (BLOCK + byte) as u64;
            return Err(Stop::malformed(
                offset,
                "the end of the archive is not zero",
            ));
        }
        let end = self.offset;
        if self.fill(&mut block[..1])? > 0 {
            let message = "something follows on the end of the archive";
            let finding = Finding::new(Kind::ArchiveTrailing, Place::archive(end), message);
            return Err(Stop::Broken(Box::new(finding)));
        }
        Ok(())
    }

    /// Reads the file that comes next, of at most so many bytes.
    pub(crate) fn read(&mut self, most: u64) -> Result<Bytes, Stop> {
        self.read_into(most, BytesMut::zeroed)
    }

    /// The same, into memory of the length that is asked for.
    pub(crate) fn read_into(
        &mut self,
        most: u64,
        memory: impl FnOnce(usize) -> BytesMut,
    ) -> Result<Bytes, Stop> {
        let Some(member) = self.next.take() else {
            return Ok(Bytes::new());
        };
        if member.len > most {
            let place = Place::file(&member.name).at(Some(member.offset));
            let message = format!("it has {} bytes; at most {most} are possible", member.len);
            let finding = Finding::new(Kind::FileTooLarge, place, message);
            return Err(Stop::Broken(Box::new(finding)));
        }
        // Bounded by `most`.
        let mut bytes = memory(member.len as usize);
        let read = self.fill(&mut bytes)?;
        if read < bytes.len() {
            let end = member.offset + read as u64;
            return Err(Stop::truncated(end, &member.name));
        }
        self.read_padding(&member)?;
        Ok(bytes.freeze())
    }

    /// Copies the file that comes next, however long it is.
    pub(crate) fn copy(&mut self, out: &mut dyn Write) -> Result<(), Stop> {
        let Some(member) = self.next.take() else {
            return Ok(());
        };
        let mut left = member.len;
        let mut buffer = vec![0; 64 << 10];
        while left > 0 {
            let most = buffer
                .len()
                .min(usize::try_from(left).unwrap_or(usize::MAX));
            let read = self.fill(&mut buffer[..most])?;
            if read < most {
                let end = member.offset + member.len - left + read as u64;
                return Err(Stop::truncated(end, &member.name));
            }
            out.write_all(&buffer[..read]).map_err(Stop::Io)?;
            left -= read as u64;
        }
        self.read_padding(&member)
    }

    fn read_padding(&mut self, member: &Member) -> Result<(), Stop> {
        let mut block = [0; BLOCK];
        let padding = &mut block[..padding(member.len)];
        let begin = self.offset;
        let read = self.fill(padding)?;
        if read < padding.len() {
            return Err(Stop::truncated(begin + read as u64, &member.name));
        }
        match padding.iter().position(|b| *b != 0) {
            None => Ok(()),
            Some(byte) => {
                let message = format!("the padding after {} is not zero", member.name);
                Err(Stop::malformed(begin + byte as u64, message))
            }
        }
    }

    /// Reads until the buffer is full or the input ends.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, Stop> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.input.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Stop::Io(e)),
            }
        }
        self.offset += filled as u64;
        Ok(filled)
    }
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader")
            .field("offset", &self.offset)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        for (name, content) in files {
            writer.file(name, content.len() as u64, *content).unwrap();
        }
        writer.finish().unwrap()
    }

    /// All files of an archive, or what is wrong with it.
    fn read(bytes: &[u8]) -> Result<Vec<(String, Bytes)>, Box<Finding>> {
        let mut reader = Reader::new(Box::new(io::Cursor::new(bytes.to_vec())));
        let mut files = Vec::new();
        let broken = |stop| match stop {
            Stop::Broken(finding) => finding,
            Stop::Io(e) => panic!("{e}"),
        };
        loop {
            let Some(member) = reader.peek().map_err(broken)? else {
                return Ok(files);
            };
            let name = member.name.clone();
            files.push((name, reader.read(10_000).map_err(broken)?));
        }
    }

    const FILES: &[(&str, &[u8])] = &[
        ("checkpoint", b"log\n1\n"),
        ("tile/0/000.p/1", &[7; 32]),
        ("tile/entries/000.p/1", &[1; 512]),
        ("empty", b""),
    ];

    #[test]
    fn an_archive_reads_as_it_was_written_and_tar_reads_it_too() {
        let bytes = written(FILES);
        let files = read(&bytes).unwrap();
        let same = |((name, content), (n, c)): (&(String, Bytes), &(&str, &[u8]))| {
            name == n && content == c
        };
        assert!(files.len() == FILES.len() && files.iter().zip(FILES).all(same));
        let mut other = tar::Archive::new(bytes.as_slice());
        let names: Vec<_> = other
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(names, FILES.iter().map(|(n, _)| *n).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_not_content_may_not_be_changed_by_a_bit() {
        let bytes = written(FILES);
        let good = read(&bytes).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            match read(&bad) {
                // A changed content is for others to notice.
                Ok(files) => assert_ne!(files, good, "bit {bit}"),
                Err(finding) => {
                    let at = finding.place.archive_offset.unwrap();
                    assert!(at <= bytes.len() as u64, "bit {bit}: {finding}");
                }
            }
        }
    }

    #[test]
    fn a_cut_archive_is_refused_wherever_it_is_cut() {
        let bytes = written(FILES);
        for len in 0..bytes.len() {
            let finding = read(&bytes[..len]).unwrap_err();
            assert_eq!(finding.kind, Kind::ArchiveTruncated, "{len}: {finding}");
            assert_eq!(finding.place.archive_offset, Some(len as u64), "{finding}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        let finding = read(&longer).unwrap_err();
        assert_eq!(finding.kind, Kind::ArchiveTrailing);
    }

    #[test]
    fn names_that_lead_elsewhere_and_lengths_that_somebody_made_up_are_refused() {
        for name in [
            "../x", "/x", "a/../x", "./x", "a//b", "a/", "", "a\\b", "é", "a b",
        ] {
            assert!(header(name, 1).is_none(), "{name:?}");
        }
        let mut huge = tar::Header::new_ustar();
        huge.set_path("checkpoint").unwrap();
        huge.set_size(u64::MAX >> 1);
        huge.set_cksum();
        let finding = read(huge.as_bytes()).unwrap_err();
        assert_eq!(finding.kind, Kind::ArchiveMalformed);
        // Within what a header can say, but more than the file can have.
        let bytes = header("checkpoint", 1 << 32).unwrap();
        let finding = read(&bytes).unwrap_err();
        assert_eq!(finding.kind, Kind::FileTooLarge);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, at in any::<prop::sample::Index>()) {
            let _ = read(&bytes);
            let mut archive = written(FILES);
            let at = at.index(archive.len());
            archive.splice(at..(at + bytes.len()).min(archive.len()), bytes);
            let _ = read(&archive);
        }
    }
}
