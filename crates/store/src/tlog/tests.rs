//! Trees, tiles and proofs against an independent implementation, around the sizes at which
//! something changes.

use std::collections::HashMap;
use std::io;
use std::sync::Mutex;

use async_trait::async_trait;
use bytes::Bytes;
use ct_merkle::mem_backed_tree::MemoryBackedTree;
use daybook_events::tree::TreeHead;
use proptest::prelude::*;
use sha2::Sha256;

use super::*;

/// Tiles in memory.
#[derive(Debug, Default)]
struct Tiles(Mutex<HashMap<String, Bytes>>);

#[async_trait]
impl ReadTiles for Tiles {
    async fn get(&self, path: &str) -> io::Result<Option<Bytes>> {
        Ok(self.0.lock().unwrap().get(path).cloned())
    }
}

fn entry(index: u64) -> Bytes {
    format!("entry {index}").into()
}

/// A tree of so many leaves, as one notary would write it that signs at these sizes and keeps no
/// partial tile but the newest.
fn written(sizes: &[u64]) -> (Tiles, Growth) {
    let tiles = Tiles::default();
    let mut growth = Growth::empty();
    for &size in sizes {
        while growth.size() < size {
            growth.push(entry(growth.size())).unwrap();
        }
        let mut all = tiles.0.lock().unwrap();
        all.retain(|path, _| !path.contains(".p/"));
        for (path, bytes) in growth.files().unwrap() {
            assert!(!bytes.is_empty(), "{path} is empty");
            all.insert(path.to_string(), bytes);
        }
        growth.stored();
    }
    (tiles, growth)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    use futures_util::FutureExt;
    future
        .now_or_never()
        .expect("tiles in memory are there at once")
}

/// The same tree by `ct-merkle`.
fn reference(size: u64) -> MemoryBackedTree<Sha256, Vec<u8>> {
    let mut tree = MemoryBackedTree::new();
    for index in 0..size {
        tree.push(entry(index).to_vec());
    }
    tree
}

fn root_of(tree: &MemoryBackedTree<Sha256, Vec<u8>>) -> Hash {
    tree.root().as_bytes().as_slice().try_into().unwrap()
}

const SIZES: [u64; 13] = [
    0, 1, 2, 3, 255, 256, 257, 511, 512, 513, 65_535, 65_536, 65_537,
];

#[test]
fn roots_are_those_of_an_independent_implementation() {
    let (tiles, _) = written(&SIZES);
    let mut other = reference(0);
    let mut growth = Growth::empty();
    for size in SIZES {
        while other.len() < size {
            other.push(entry(other.len()).to_vec());
            growth.push(entry(growth.size())).unwrap();
        }
        let root = if size == 0 {
            empty_root()
        } else {
            root_of(&other)
        };
        assert_eq!(growth.head(), TreeHead { size, root });
        // Partial tiles are gone by now: they are cut from the full ones.
        let read = block_on(TreeReader::new(&tiles, size).head()).unwrap();
        assert_eq!(read, TreeHead { size, root });
    }
}

#[test]
fn proofs_from_tiles_are_those_of_an_independent_implementation() {
    let (tiles, _) = written(&[65_537]);
    for size in [1, 2, 3, 5, 255, 256, 257, 700] {
        let other = reference(size);
        let reader = TreeReader::new(&tiles, size);
        let head = block_on(reader.head()).unwrap();
        for index in (0..size).filter(|i| size < 10 || i % 37 == 0 || i + 2 > size) {
            let proof = block_on(reader.inclusion(index)).unwrap();
            assert_eq!(
                proof.concat(),
                other.prove_inclusion(index as usize).as_bytes()
            );
            verify_inclusion(&leaf_hash(&entry(index)), index, &head, &proof).unwrap();
        }
        for old in (1..size).filter(|i| size < 10 || i % 37 == 0 || i + 2 > size) {
            let proof = block_on(reader.consistency(old)).unwrap();
            let added = (size - old) as usize;
            assert_eq!(proof.concat(), other.prove_consistency(added).as_bytes());
        }
    }
}

#[test]
fn every_size_is_consistent_with_every_larger_one() {
    let (tiles, _) = written(&[65_537]);
    for (number, new) in SIZES.into_iter().enumerate() {
        let reader = TreeReader::new(&tiles, new);
        let new_head = block_on(reader.head()).unwrap();
        for &old in &SIZES[..=number] {
            let old_head = block_on(TreeReader::new(&tiles, old).head()).unwrap();
            let proof = block_on(reader.consistency(old)).unwrap();
            verify_consistency(&old_head, &new_head, &proof).unwrap();
            assert_eq!(
                verify_consistency(&new_head, &old_head, &proof).is_ok(),
                old == new
            );
        }
    }
}

#[test]
fn a_tree_continues_from_its_tiles() {
    for size in [0, 1, 255, 256, 257, 513, 65_536] {
        let (tiles, whole) = written(&[size]);
        let reader = TreeReader::new(&tiles, size);
        let mut continued = block_on(Growth::load(&reader)).unwrap();
        assert_eq!(continued.head(), whole.head());
        let mut whole = whole;
        for index in size..size + 300 {
            continued.push(entry(index)).unwrap();
            whole.push(entry(index)).unwrap();
        }
        assert_eq!(continued.head(), whole.head());
        assert_eq!(continued.files().unwrap(), whole.files().unwrap());
    }
}

#[test]
fn entries_and_leaves_are_found_by_index() {
    let (tiles, _) = written(&[600]);
    let reader = TreeReader::new(&tiles, 600);
    for index in [0, 255, 256, 599] {
        assert_eq!(block_on(reader.entry(index)).unwrap(), entry(index));
        assert_eq!(
            block_on(reader.leaf(index)).unwrap(),
            leaf_hash(&entry(index))
        );
    }
    for index in [600, u64::MAX] {
        assert!(matches!(
            block_on(reader.entry(index)),
            Err(TreeError::OutOfRange { .. })
        ));
        assert!(block_on(reader.inclusion(index)).is_err());
    }
    assert!(block_on(reader.consistency(601)).is_err());
    assert_eq!(block_on(reader.entries(2)).unwrap().len(), 88);
}

#[test]
fn a_missing_or_damaged_tile_is_named() {
    let (tiles, _) = written(&[600]);
    let damage = |path: &str, bytes: Option<&'static [u8]>| {
        let mut all = tiles.0.lock().unwrap();
        let old = all.remove(path).unwrap();
        if let Some(bytes) = bytes {
            all.insert(path.to_owned(), Bytes::from_static(bytes));
        }
        old
    };
    let restore = |path: &str, old| tiles.0.lock().unwrap().insert(path.to_owned(), old);
    let reader = || TreeReader::new(&tiles, 600);
    let old = damage("tile/0/002.p/88", None);
    let error = block_on(reader().root()).unwrap_err();
    assert!(
        matches!(&error, TreeError::Missing { path, .. } if path.to_string() == "tile/0/002.p/88")
    );
    restore("tile/0/002.p/88", old);
    let old = damage("tile/1/000.p/2", Some(&[0; 63]));
    let error = block_on(reader().root()).unwrap_err();
    assert!(
        error.is_damage() && error.to_string().contains("63 bytes and not 64"),
        "{error}"
    );
    restore("tile/1/000.p/2", old);
    damage("tile/entries/000", Some(&[0, 9, 1]));
    let error = block_on(reader().entry(3)).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("tile/entries/000 is damaged: its entry 0"),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is changed in what is proven, a verifier notices.
    #[test]
    fn no_changed_proof_is_believed(
        size in 1_u64..700,
        at in any::<prop::sample::Index>(),
        before in any::<prop::sample::Index>(),
        flip in 0_usize..256,
    ) {
        let (tiles, growth) = written(&[size]);
        let reader = TreeReader::new(&tiles, size);
        let head = growth.head();
        let index = at.index(size as usize) as u64;
        let leaf = leaf_hash(&entry(index));
        let proof = block_on(reader.inclusion(index)).unwrap();
        prop_assert_eq!(verify_inclusion(&leaf, index, &head, &proof), Ok(()));
        let flipped = |mut hash: Hash| { hash[flip / 8] ^= 1 << (flip % 8); hash };
        prop_assert!(verify_inclusion(&flipped(leaf), index, &head, &proof).is_err());
        for number in 0..proof.len() {
            let mut bad = proof.clone();
            bad[number] = flipped(bad[number]);
            prop_assert!(verify_inclusion(&leaf, index, &head, &bad).is_err());
            let mut short = proof.clone();
            short.remove(number);
            prop_assert!(verify_inclusion(&leaf, index, &head, &short).is_err());
        }
        let mut long = proof.clone();
        long.push([0; 32]);
        prop_assert!(verify_inclusion(&leaf, index, &head, &long).is_err());
        for other in 0..size {
            let believed = verify_inclusion(&leaf, other, &head, &proof).is_ok();
            prop_assert_eq!(believed, other == index);
        }

        let old = before.index(size as usize) as u64 + 1;
        let old_head = block_on(TreeReader::part_of(&tiles, old, size).head()).unwrap();
        let proof = block_on(reader.consistency(old)).unwrap();
        prop_assert_eq!(verify_consistency(&old_head, &head, &proof), Ok(()));
        let forked = TreeHead { root: flipped(old_head.root), ..old_head };
        prop_assert!(verify_consistency(&forked, &head, &proof).is_err());
        let forked = TreeHead { root: flipped(head.root), ..head };
        prop_assert!(verify_consistency(&old_head, &forked, &proof).is_err());
        for number in 0..proof.len() {
            let mut bad = proof.clone();
            bad[number] = flipped(bad[number]);
            prop_assert!(verify_consistency(&old_head, &head, &bad).is_err());
        }
    }

    #[test]
    fn verifiers_never_panic(
        a: u64, b: u64, index: u64, proof: Vec<Hash>, root: Hash,
    ) {
        let head = |size| TreeHead { size, root };
        let _ = verify_inclusion(&root, index, &head(a), &proof);
        let _ = verify_consistency(&head(a), &head(b), &proof);
    }
}
