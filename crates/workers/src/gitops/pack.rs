//! Packs: many objects that reach the disk together.
//!
//! A pack that is written here holds whole objects, none as a difference from another one. It is
//! written aside with its index, both are synced, they take their names, and the folder is synced:
//! whoever finds a pack finds all of it, and what died on the way was never found. Packs are joined
//! now and then, by copying what they hold as it is, so that there are never many of them. The
//! formats are those of git: `gitformat-pack(5)`.
//!
//! Whoever writes here holds the right to write to the repository.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use flate2::{Compress, Compression, FlushCompress, Status};
use git2::{ObjectType, Oid};
use sha1_smol::Sha1;

/// How many packs of about the same size are joined.
const JOINED: usize = 16;

/// The largest pack that is made by joining, in bytes.
const MAX_JOINED: u64 = 256 << 20;

/// What lies beside a pack while it is written. Git takes files that begin with `tmp_` for the same.
const ASIDE: &str = "tmp_daybook_";

/// A pack without its index is somebody's who writes it at this moment, or nobody's after this.
const ABANDONED: Duration = Duration::from_secs(3600);

const PACK_HEADER: usize = 12;
const HASH: usize = 20;
const FANOUT: usize = 256;

/// An object that is to be written.
#[derive(Debug)]
pub(super) struct NewObject {
    pub(super) id: Oid,
    pub(super) kind: ObjectType,
    pub(super) content: std::sync::Arc<[u8]>,
}

/// An object as it is in a pack.
struct Packed {
    id: [u8; HASH],
    crc: u32,
    offset: u64,
}

/// A pack that is being made.
struct Pack {
    bytes: Vec<u8>,
    objects: Vec<Packed>,
}

impl Pack {
    fn new() -> Self {
        let mut bytes = b"PACK\0\0\0\x02".to_vec();
        // How many there are is known at the end.
        bytes.extend_from_slice(&[0; 4]);
        Self {
            bytes,
            objects: Vec::new(),
        }
    }

    fn add(&mut self, object: &NewObject, deflate: &mut Compress) -> io::Result<()> {
        let start = self.bytes.len();
        push_header(&mut self.bytes, kind_of(object.kind)?, object.content.len());
        deflate.reset();
        self.bytes.reserve(object.content.len() / 2 + 64);
        loop {
            let done = deflate.total_in() as usize;
            let status = deflate
                .compress_vec(
                    &object.content[done..],
                    &mut self.bytes,
                    FlushCompress::Finish,
                )
                .map_err(io::Error::other)?;
            match status {
                Status::StreamEnd => break,
                Status::Ok | Status::BufError => self.bytes.reserve(1024),
            }
        }
        self.note(object.id.as_bytes(), start)
    }

    /// Takes over an object as another pack has it.
    fn copy(&mut self, id: &[u8], entry: &[u8]) -> io::Result<()> {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(entry);
        self.note(id, start)
    }

    fn note(&mut self, id: &[u8], start: usize) -> io::Result<()> {
        self.objects.push(Packed {
            id: id.try_into().map_err(io::Error::other)?,
            crc: crc32fast::hash(&self.bytes[start..]),
            offset: start as u64,
        });
        Ok(())
    }

    /// Puts it into the folder under its name, so that it is there after a power cut.
    fn install(mut self, folder: &Path) -> io::Result<PathBuf> {
        let count = u32::try_from(self.objects.len()).map_err(io::Error::other)?;
        self.bytes[8..PACK_HEADER].copy_from_slice(&count.to_be_bytes());
        let hash = Sha1::from(&self.bytes).digest().bytes();
        self.bytes.extend_from_slice(&hash);
        let index = self.index(&hash)?;
        let aside = |what: &str| {
            folder.join(format!(
                "{ASIDE}{what}_{}",
                uuid::Uuid::now_v7().as_simple()
            ))
        };
        let (pack_aside, index_aside) = (aside("pack"), aside("idx"));
        let written = write_synced(&pack_aside, &self.bytes)
            .and_then(|()| write_synced(&index_aside, &index));
        let pack = folder.join(format!("pack-{}.pack", hex::encode(hash)));
        let installed = written.and_then(|()| {
            daybook_failpoints::reached("gitops.pack.written");
            fs::rename(&pack_aside, &pack)?;
            daybook_failpoints::reached("gitops.pack.renamed");
            // A pack is looked for by its index, which therefore comes last.
            fs::rename(&index_aside, pack.with_extension("idx"))?;
            File::open(folder)?.sync_all()
        });
        if let Err(e) = installed {
            // The next one who writes removes what cannot be removed now.
            let _ = fs::remove_file(&pack_aside);
            let _ = fs::remove_file(&index_aside);
            return Err(e);
        }
        Ok(pack)
    }

    /// The index, in its version 2.
    fn index(&mut self, pack_hash: &[u8; HASH]) -> io::Result<Vec<u8>> {
        self.objects.sort_unstable_by_key(|o| o.id);
        let mut out = Vec::with_capacity(8 + 4 * FANOUT + 28 * self.objects.len() + 2 * HASH);
        out.extend_from_slice(b"\xfftOc\0\0\0\x02");
        let mut below = 0u32;
        let mut next = self.objects.iter().peekable();
        for first in 0..FANOUT {
            while next.next_if(|o| usize::from(o.id[0]) == first).is_some() {
                below += 1;
            }
            out.extend_from_slice(&below.to_be_bytes());
        }
        for object in &self.objects {
            out.extend_from_slice(&object.id);
        }
        for object in &self.objects {
            out.extend_from_slice(&object.crc.to_be_bytes());
        }
        for object in &self.objects {
            // A larger one would need the table of large offsets. Packs are far smaller here.
            let offset = u32::try_from(object.offset)
                .ok()
                .filter(|o| *o < 1 << 31)
                .ok_or_else(|| io::Error::other("a pack of more than 2 GiB"))?;
            out.extend_from_slice(&offset.to_be_bytes());
        }
        out.extend_from_slice(pack_hash);
        let hash = Sha1::from(&out).digest().bytes();
        out.extend_from_slice(&hash);
        Ok(out)
    }
}

/// Writes a pack of these objects into `objects/pack` of a repository. It is there after a power
/// cut when this returns.
pub(super) fn write(folder: &Path, objects: &[NewObject]) -> io::Result<PathBuf> {
    let mut pack = Pack::new();
    // What is written in an instant is read for years by whoever compresses it better: `git gc`.
    let mut deflate = Compress::new(Compression::fast(), true);
    for object in objects {
        pack.add(object, &mut deflate)?;
    }
    pack.install(folder)
}

/// Removes what processes that died left here, and joins packs where there are many of about the
/// same size. Returns whether packs that others may have open were replaced.
pub(super) fn tidy(folder: &Path) -> io::Result<bool> {
    let mut sizes: BTreeMap<u32, Vec<PathBuf>> = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let (path, name) = {
            let entry = entry?;
            (entry.path(), entry.file_name())
        };
        if name.to_string_lossy().starts_with(ASIDE) {
            fs::remove_file(&path)?;
            continue;
        }
        if path.extension().is_none_or(|e| e != "pack") {
            continue;
        }
        let found = fs::metadata(&path)?;
        if !path.with_extension("idx").exists() {
            let age = found.modified()?.elapsed().unwrap_or_default();
            if age > ABANDONED {
                fs::remove_file(&path)?;
            }
            continue;
        }
        // Somebody asks for it to stay, or it is no plain one.
        let special = ["keep", "promisor", "mtimes", "bitmap"];
        if found.len() < MAX_JOINED && special.iter().all(|e| !path.with_extension(e).exists()) {
            let class = found.len().max(1).ilog2() / 3;
            sizes.entry(class).or_default().push(path);
        }
    }
    let mut replaced = false;
    for packs in sizes.values().filter(|packs| packs.len() >= JOINED) {
        replaced |= join(folder, packs)?;
    }
    Ok(replaced)
}

/// Makes one pack of several. Those that hold differences, or are not whole, stay as they are.
fn join(folder: &Path, packs: &[PathBuf]) -> io::Result<bool> {
    let mut joined = Pack::new();
    let mut known = HashSet::new();
    let mut replaced = Vec::new();
    for path in packs {
        if joined.bytes.len() as u64 + fs::metadata(path)?.len() > MAX_JOINED {
            break;
        }
        let bytes = fs::read(path)?;
        let index = fs::read(path.with_extension("idx"))?;
        let Some(entries) = entries(&bytes, &index) else {
            continue;
        };
        for (id, entry) in entries {
            if known.insert(id) {
                joined.copy(&id, entry)?;
            }
        }
        replaced.push(path);
    }
    if replaced.len() < 2 {
        return Ok(false);
    }
    let kept = joined.install(folder)?;
    daybook_failpoints::reached("gitops.pack.joined");
    // An index over several packs, as `git maintenance` makes one, would name packs that are gone. Git
    // itself drops it then, and makes it anew.
    for file in fs::read_dir(folder)? {
        let file = file?;
        if file
            .file_name()
            .as_encoded_bytes()
            .starts_with(b"multi-pack-index")
        {
            fs::remove_file(file.path())?;
        }
    }
    for path in replaced {
        if *path == kept {
            continue;
        }
        // Nobody is to find an index without its pack.
        fs::remove_file(path.with_extension("idx"))?;
        let _ = fs::remove_file(path.with_extension("rev"));
        fs::remove_file(path)?;
    }
    Ok(true)
}

/// The objects of a pack as they are in it, if all are whole and undamaged.
fn entries<'a>(pack: &'a [u8], index: &[u8]) -> Option<Vec<([u8; HASH], &'a [u8])>> {
    let number = |bytes: &[u8], at: usize| -> Option<u32> {
        Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
    };
    if index.get(..8)? != b"\xfftOc\0\0\0\x02" || pack.get(..8)? != b"PACK\0\0\0\x02" {
        return None;
    }
    let count = number(index, 8 + 4 * (FANOUT - 1))? as usize;
    if number(pack, 8)? as usize != count {
        return None;
    }
    let ids = 8 + 4 * FANOUT;
    let (crcs, offsets) = (ids + HASH * count, ids + (HASH + 4) * count);
    let mut found = Vec::with_capacity(count);
    for n in 0..count {
        let id: [u8; HASH] = index.get(ids + HASH * n..)?.get(..HASH)?.try_into().ok()?;
        let offset = number(index, offsets + 4 * n)?;
        found.push((offset as usize, id, number(index, crcs + 4 * n)?));
    }
    found.sort_unstable();
    let end = pack.len().checked_sub(HASH)?;
    let ends: Vec<usize> = found.iter().skip(1).map(|e| e.0).chain([end]).collect();
    found
        .into_iter()
        .zip(ends)
        .map(|((start, id, crc), end)| {
            let entry = pack.get(start..end)?;
            let kind = entry.first()? >> 4 & 7;
            ((1..=4).contains(&kind) && crc32fast::hash(entry) == crc).then_some((id, entry))
        })
        .collect()
}

/// What an object's entry begins with: its kind, and its size when it is unpacked.
fn push_header(out: &mut Vec<u8>, kind: u8, size: usize) {
    let mut byte = kind << 4 | (size & 15) as u8;
    let mut rest = size >> 4;
    while rest > 0 {
        out.push(byte | 0x80);
        byte = (rest & 0x7f) as u8;
        rest >>= 7;
    }
    out.push(byte);
}

fn kind_of(kind: ObjectType) -> io::Result<u8> {
    match kind {
        ObjectType::Commit => Ok(1),
        ObjectType::Tree => Ok(2),
        ObjectType::Blob => Ok(3),
        ObjectType::Tag => Ok(4),
        ObjectType::Any => Err(io::Error::other("an object of no kind")),
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o444)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use git2::{Odb, Repository};

    use super::*;

    fn object(content: &[u8]) -> NewObject {
        NewObject {
            id: Oid::hash_object(ObjectType::Blob, content).unwrap(),
            kind: ObjectType::Blob,
            content: content.into(),
        }
    }

    fn repository() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        Repository::init_bare(folder.path()).unwrap();
        let packs = folder.path().join("objects/pack");
        (folder, packs)
    }

    fn git(folder: &Path, arguments: &[&str]) {
        let done = Command::new("git")
            .arg("-C")
            .arg(folder)
            .args(arguments)
            .output()
            .unwrap();
        assert!(done.status.success(), "{done:?}");
    }

    fn verify(folder: &Path) -> usize {
        git(folder, &["fsck", "--full", "--strict"]);
        let packs: Vec<_> = fs::read_dir(folder.join("objects/pack"))
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        for pack in packs
            .iter()
            .filter(|p| p.extension().is_some_and(|e| e == "idx"))
        {
            git(folder, &["verify-pack", pack.to_str().unwrap()]);
        }
        packs.len()
    }

    fn read(odb: &Odb<'_>, object: &NewObject) -> Vec<u8> {
        odb.read(object.id).unwrap().data().to_vec()
    }

    #[test]
    fn an_index_over_packs_that_are_joined_goes_with_them() {
        let (folder, packs) = repository();
        for number in 0..JOINED {
            write(&packs, &[object(&number.to_le_bytes())]).unwrap();
        }
        git(folder.path(), &["multi-pack-index", "write"]);
        assert!(packs.join("multi-pack-index").exists());
        assert!(tidy(&packs).unwrap());
        assert!(!packs.join("multi-pack-index").exists());
        verify(folder.path());
    }

    #[test]
    fn git_reads_what_is_written() {
        let (folder, packs) = repository();
        let large: Vec<u8> = (0..70_000u32).flat_map(|n| n.to_le_bytes()).collect();
        let random: Vec<u8> = (0..2000)
            .flat_map(|_| *uuid::Uuid::new_v4().as_bytes())
            .collect();
        let objects: Vec<_> = [&b""[..], b"x", &[b'a'; 15], &[b'a'; 16], &large, &random]
            .into_iter()
            .map(object)
            .collect();
        write(&packs, &objects).unwrap();
        assert_eq!(verify(folder.path()), 2);
        let repository = Repository::open_bare(folder.path()).unwrap();
        let odb = repository.odb().unwrap();
        for object in &objects {
            assert_eq!(read(&odb, object), &*object.content);
        }
    }

    #[test]
    fn packs_do_not_pile_up_and_whoever_reads_goes_on() {
        let (folder, packs) = repository();
        let repository = Repository::open_bare(folder.path()).unwrap();
        let odb = repository.odb().unwrap();
        let mut all = Vec::new();
        for n in 0..150u32 {
            let some = [object(b"shared"), object(&n.to_le_bytes())];
            write(&packs, &some).unwrap();
            // Some packs are open when they are replaced, of others only the index is.
            if n % 3 == 0 {
                read(&odb, &some[1]);
            }
            all.extend(some);
            if n % 8 == 0 {
                tidy(&packs).unwrap();
                for object in &all {
                    assert_eq!(read(&odb, object), &*object.content);
                }
            }
        }
        assert!(verify(folder.path()) < 2 * 3 * JOINED);
    }

    #[test]
    fn what_died_on_the_way_is_removed_and_what_is_not_ours_stays() {
        let (folder, packs) = repository();
        fs::write(packs.join(format!("{ASIDE}pack_1")), "half").unwrap();
        let somebodys = packs.join(format!("pack-{}.pack", "a".repeat(40)));
        fs::write(&somebodys, "PACK").unwrap();
        for n in 0..JOINED as u32 {
            write(&packs, &[object(&n.to_le_bytes())]).unwrap();
        }
        // A damaged one is left for `git fsck` to be seen.
        let damaged = write(&packs, &[object(b"damaged")]).unwrap();
        let mut bytes = fs::read(&damaged).unwrap();
        let last = bytes.len() - HASH - 1;
        bytes[last] ^= 1;
        fs::remove_file(&damaged).unwrap();
        fs::write(&damaged, bytes).unwrap();
        assert!(tidy(&packs).unwrap());
        assert!(damaged.exists() && somebodys.exists());
        assert_eq!(fs::read_dir(&packs).unwrap().count(), 5);
        fs::remove_file(&damaged).unwrap();
        fs::remove_file(damaged.with_extension("idx")).unwrap();
        fs::remove_file(somebodys).unwrap();
        assert_eq!(verify(folder.path()), 2);
    }
}
