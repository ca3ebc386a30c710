//! What a pack holds, looked at before git reads it.
//!
//! Git checks objects and their connections. What it has no bound for is what a small pack becomes:
//! so this reads it through first, keeping nothing, and lets only those pass that hold whole objects
//! of bounded size and exactly one commit, without parents. Uploads are written so.

use std::io::{self, BufRead, Read};

use flate2::bufread::ZlibDecoder;
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};

/// Most bytes of a commit.
const COMMIT_MAX: u64 = 64 * 1024;
/// Most bytes of one folder's list of names, which git holds in memory.
const TREE_MAX: u64 = 16 * 1024 * 1024;
/// Most bytes of the lists of all folders together: git makes an object of every name that it reads.
const TREES_MAX: u64 = 32 * 1024 * 1024;

/// How much a pack may hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Most objects.
    pub(super) objects: u32,
    /// Most bytes of all of them, unpacked.
    pub(super) bytes: u64,
}

/// What a pack holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Scanned {
    /// The id of its only commit.
    pub(super) commit: String,
    /// The id of the commit's tree.
    pub(super) tree: String,
}

/// Why a pack is not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unfit {
    /// It is no pack, or broken.
    #[error("it is no pack of git's: {0}")]
    Malformed(&'static str),
    /// It holds what uploads do not need.
    #[error("{0}")]
    NotAllowed(&'static str),
    /// It becomes too large.
    #[error("it holds more than {limit} {unit}")]
    TooLarge { limit: u64, unit: &'static str },
    /// It cannot be read here.
    #[error("it cannot be read")]
    Disk(#[source] io::Error),
}

/// Reads a whole pack. Memory is bounded by [`COMMIT_MAX`].
pub(super) fn scan(mut pack: impl BufRead, limits: Limits) -> Result<Scanned, Unfit> {
    let mut header = [0; 12];
    read(&mut pack, &mut header)?;
    if header[..8] != *b"PACK\0\0\0\x02" {
        return Err(Unfit::Malformed("it does not begin as one of version 2"));
    }
    let objects = u32::from_be_bytes([header[8], header[9], header[10], header[11]]);
    if objects > limits.objects {
        return Err(Unfit::TooLarge {
            limit: limits.objects.into(),
            unit: "objects",
        });
    }
    let mut found = None;
    let (mut left, mut left_of_trees) = (limits.bytes, TREES_MAX);
    for _ in 0..objects {
        let (kind, size) = object_header(&mut pack)?;
        left = left.checked_sub(size).ok_or(Unfit::TooLarge {
            limit: limits.bytes,
            unit: "bytes",
        })?;
        if kind == 2 {
            left_of_trees = left_of_trees.checked_sub(size).ok_or(Unfit::TooLarge {
                limit: TREES_MAX,
                unit: "bytes of all folders' names",
            })?;
        }
        match kind {
            1 if found.is_some() => return Err(Unfit::NotAllowed("it holds several commits")),
            1 if size > COMMIT_MAX => {
                return Err(Unfit::TooLarge {
                    limit: COMMIT_MAX,
                    unit: "bytes of a commit",
                });
            }
            1 => {
                let mut content = Vec::new();
                inflate(&mut pack, size, |part| content.extend_from_slice(part))?;
                found = Some(commit(&content)?);
            }
            2 if size > TREE_MAX => {
                return Err(Unfit::TooLarge {
                    limit: TREE_MAX,
                    unit: "bytes of one folder's names",
                });
            }
            2 | 3 => inflate(&mut pack, size, |_| {})?,
            4 => return Err(Unfit::NotAllowed("it holds a tag")),
            6 | 7 => {
                return Err(Unfit::NotAllowed(
                    "it holds objects as differences; write it with `git pack-objects --window=0 \
                     --no-reuse-delta`",
                ));
            }
            _ => return Err(Unfit::Malformed("it holds an object of no kind")),
        }
    }
    // The checksum is compared by git.
    read(&mut pack, &mut [0; 20])?;
    if !pack.fill_buf().map_err(Unfit::Disk)?.is_empty() {
        return Err(Unfit::Malformed("something follows on its end"));
    }
    found.ok_or(Unfit::NotAllowed("it holds no commit"))
}

fn read(pack: &mut impl BufRead, into: &mut [u8]) -> Result<(), Unfit> {
    pack.read_exact(into).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => Unfit::Malformed("it breaks off"),
        _ => Unfit::Disk(e),
    })
}

/// The kind and the size of the next object.
fn object_header(pack: &mut impl BufRead) -> Result<(u8, u64), Unfit> {
    let mut byte = [0];
    read(pack, &mut byte)?;
    let kind = (byte[0] >> 4) & 7;
    let mut size = u64::from(byte[0] & 15);
    let mut shift = 4;
    while byte[0] & 0x80 != 0 {
        // Sizes of more than 53 bits are none that could be allowed.
        if shift > 46 {
            return Err(Unfit::Malformed("the size of an object has no end"));
        }
        read(pack, &mut byte)?;
        size |= u64::from(byte[0] & 0x7f) << shift;
        shift += 7;
    }
    Ok((kind, size))
}

/// Inflates exactly one object of this size.
fn inflate(pack: &mut impl BufRead, size: u64, mut part: impl FnMut(&[u8])) -> Result<(), Unfit> {
    let mut stream = ZlibDecoder::new(pack);
    let mut chunk = [0; 16 * 1024];
    let mut left = size;
    loop {
        let n = stream.read(&mut chunk).map_err(|e| match e.kind() {
            io::ErrorKind::InvalidInput
            | io::ErrorKind::InvalidData
            | io::ErrorKind::UnexpectedEof => Unfit::Malformed("an object cannot be unpacked"),
            _ => Unfit::Disk(e),
        })?;
        if n == 0 {
            break;
        }
        left = left
            .checked_sub(n as u64)
            .ok_or(Unfit::Malformed("an object is longer than it says"))?;
        part(&chunk[..n]);
    }
    match left {
        0 => Ok(()),
        _ => Err(Unfit::Malformed("an object is shorter than it says")),
    }
}

/// The id of a commit, and that of its tree.
fn commit(content: &[u8]) -> Result<Scanned, Unfit> {
    let mut lines = content.split(|b| *b == b'\n');
    let tree = lines.next().and_then(|line| line.strip_prefix(b"tree "));
    let is_id = |text: &&[u8]| {
        let digit = |b: &u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        text.len() == 40 && text.iter().all(digit)
    };
    let tree = tree
        .filter(is_id)
        .ok_or(Unfit::Malformed("its commit names no tree"))?;
    if lines
        .next()
        .is_none_or(|line| !line.starts_with(b"author "))
    {
        return Err(Unfit::NotAllowed(
            "its commit has parents; an upload is a commit without any",
        ));
    }
    let mut object = format!("commit {}\0", content.len()).into_bytes();
    object.extend_from_slice(content);
    Ok(Scanned {
        commit: hex::encode(digest(&SHA1_FOR_LEGACY_USE_ONLY, &object)),
        tree: String::from_utf8_lossy(tree).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::Compression;
    use flate2::write::ZlibEncoder;

    use super::*;

    const LIMITS: Limits = Limits {
        objects: 10,
        bytes: 1000,
    };
    const COMMIT: &str = "tree 4b825dc642cb6eb9a060e54bf8d69288fbee4904\n\
         author A <a@b> 0 +0000\ncommitter A <a@b> 0 +0000\n\nA page\n";

    /// A pack of objects: their kind, the size that they claim, and their content.
    fn pack(objects: &[(u8, usize, &[u8])]) -> Vec<u8> {
        let mut bytes = b"PACK\0\0\0\x02".to_vec();
        bytes.extend_from_slice(&(objects.len() as u32).to_be_bytes());
        for (kind, size, content) in objects {
            let mut rest = size >> 4;
            let mut byte = (kind << 4) | (size & 15) as u8;
            while rest > 0 {
                bytes.push(byte | 0x80);
                byte = (rest & 0x7f) as u8;
                rest >>= 7;
            }
            bytes.push(byte);
            let mut deflate = ZlibEncoder::new(bytes, Compression::default());
            deflate.write_all(content).unwrap();
            bytes = deflate.finish().unwrap();
        }
        bytes.extend_from_slice(&[0; 20]);
        bytes
    }

    fn whole(kind: u8, content: &[u8]) -> (u8, usize, &[u8]) {
        (kind, content.len(), content)
    }

    fn refusal(bytes: &[u8]) -> String {
        scan(bytes, LIMITS).unwrap_err().to_string()
    }

    #[test]
    fn a_pack_with_one_commit_of_whole_objects_passes() {
        let bytes = pack(&[
            whole(1, COMMIT.as_bytes()),
            whole(2, b""),
            whole(3, &[b'a'; 300]),
        ]);
        let found = scan(bytes.as_slice(), LIMITS).unwrap();
        assert_eq!(found.tree, "4b825dc642cb6eb9a060e54bf8d69288fbee4904");
        assert_eq!(found.commit.len(), 40);
        // However few bytes come at once.
        let slow = io::BufReader::with_capacity(1, bytes.as_slice());
        assert_eq!(scan(slow, LIMITS).unwrap(), found);
        // And nothing that is cut off does.
        for end in 0..bytes.len() {
            assert!(scan(&bytes[..end], LIMITS).is_err(), "{end}");
        }
    }

    #[test]
    fn no_damage_makes_it_panic_or_go_on_for_ever() {
        let bytes = pack(&[
            whole(1, COMMIT.as_bytes()),
            whole(2, b"tree"),
            whole(3, &[b'a'; 300]),
        ]);
        for at in 0..bytes.len() {
            for flipped in 0..8 {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << flipped;
                // Whatever comes of it, it comes.
                let _ = scan(damaged.as_slice(), LIMITS);
            }
        }
    }

    #[test]
    fn the_names_of_all_folders_together_are_bounded() {
        let names = vec![0; 12 << 20];
        let bytes = pack(&[
            whole(1, COMMIT.as_bytes()),
            whole(2, &names),
            whole(2, &names),
            whole(2, &names),
        ]);
        let limits = Limits {
            bytes: 1 << 30,
            ..LIMITS
        };
        let said = scan(bytes.as_slice(), limits).unwrap_err().to_string();
        assert!(said.contains("bytes of all folders' names"), "{said}");
    }

    #[test]
    fn what_uploads_do_not_need_is_refused() {
        let one = whole(1, COMMIT.as_bytes());
        let child = COMMIT.replace(
            "author",
            "parent 4b825dc642cb6eb9a060e54bf8d69288fbee4904\nauthor",
        );
        let big = vec![0; 1001];
        for (objects, why) in [
            (vec![], "it holds no commit"),
            (vec![one, one], "it holds several commits"),
            (vec![whole(1, child.as_bytes())], "has parents"),
            (vec![whole(1, b"tree 1234\nauthor A")], "names no tree"),
            (vec![whole(4, b"object")], "it holds a tag"),
            (vec![whole(6, b"x")], "as differences"),
            (vec![whole(7, b"x")], "as differences"),
            (vec![whole(5, b"x")], "of no kind"),
            (vec![whole(3, &big)], "more than 1000 bytes"),
            // A bomb that says it is small, and one that says it is none.
            (vec![(3, 5, &big[..])], "longer than it says"),
            (vec![(3, 900, b"x")], "shorter than it says"),
            (vec![whole(3, b""); 11], "more than 10 objects"),
        ] {
            let said = refusal(&pack(&objects));
            assert!(said.contains(why), "{said}, and not {why}");
        }
        let mut more = pack(&[one]);
        more.push(0);
        assert!(refusal(&more).contains("follows on its end"));
        assert!(refusal(b"PACK\0\0\0\x03\0\0\0\0").contains("version 2"));
        let endless = [b"PACK\0\0\0\x02\0\0\0\x01".as_slice(), &[0xff; 40]].concat();
        assert!(refusal(&endless).contains("has no end"));
    }
}
