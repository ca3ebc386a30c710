//! Layers of all kinds, honest and hostile.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use daybook_workers::image::ImageError;
use daybook_workers::image::layout::Layout;
use daybook_workers::image::unpack::{UnpackLimits, unpack};
use oci_spec::image::MediaType;
use proptest::prelude::*;
use tokio_util::sync::CancellationToken;

use super::fixtures::{Tar, gzip, image_of, image_of_blobs, names};

/// A place to unpack to, with something beside it that must stay as it is.
struct Place {
    dir: tempfile::TempDir,
    layout: Layout,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("here")).unwrap();
        fs::create_dir_all(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/canary"), "untouched").unwrap();
        let layout = Layout::open(dir.path().join("layout")).unwrap();
        Self { dir, layout }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("here/root")
    }

    fn unpack(&self, layers: &[Vec<u8>]) -> Result<(), ImageError> {
        self.unpack_within(layers, UnpackLimits::default())
    }

    fn unpack_within(&self, layers: &[Vec<u8>], limits: UnpackLimits) -> Result<(), ImageError> {
        let image = image_of(&self.layout, layers);
        unpack(
            &self.layout,
            &image,
            &self.root(),
            limits,
            &CancellationToken::new(),
        )
    }

    fn assert_nothing_happened(&self) {
        assert!(names(&self.dir.path().join("here")).is_empty());
        self.assert_outside_untouched();
    }

    fn assert_outside_untouched(&self) {
        let outside = self.dir.path().join("outside");
        assert_eq!(names(&outside), ["canary"]);
        let canary = outside.join("canary");
        assert_eq!(fs::read_to_string(&canary).unwrap(), "untouched");
        assert_eq!(fs::metadata(&canary).unwrap().nlink(), 1);
        assert_eq!(names(self.dir.path()), ["here", "layout", "outside"]);
    }

    fn text(&self, path: &str) -> String {
        fs::read_to_string(self.root().join(path)).unwrap_or_else(|e| format!("{e}"))
    }

    fn exists(&self, path: &str) -> bool {
        fs::symlink_metadata(self.root().join(path)).is_ok()
    }
}

#[test]
fn layers_are_applied_in_order() {
    let place = Place::new();
    let lower = Tar::new()
        .dir("./etc/")
        .file("etc/kept", "lower")
        .file("etc/replaced", "lower")
        .file("etc/removed", "lower")
        .file("var/cache/a/deep", "lower")
        .file("var/cache/b", "lower")
        .file("became-folder", "lower")
        .dir("became-file")
        .file("became-file/x", "lower");
    let upper = Tar::new()
        .file("etc/replaced", "upper")
        .file("etc/.wh.removed", "")
        // The order within a layer does not matter: what it adds itself is not hidden.
        .file("var/cache/a/new", "upper")
        .file("var/cache/.wh..wh..opq", "")
        .file("var/cache/c", "upper")
        .dir("became-folder")
        .file("became-folder/x", "upper")
        .file("became-file", "upper");
    place.unpack(&[lower.bytes(), upper.bytes()]).unwrap();

    assert_eq!(place.text("etc/kept"), "lower");
    assert_eq!(place.text("etc/replaced"), "upper");
    assert!(!place.exists("etc/removed"));
    assert!(!place.exists("etc/.wh.removed"));
    assert_eq!(place.text("var/cache/a/new"), "upper");
    assert!(!place.exists("var/cache/a/deep"));
    assert!(!place.exists("var/cache/b"));
    assert_eq!(place.text("var/cache/c"), "upper");
    assert_eq!(place.text("became-folder/x"), "upper");
    assert_eq!(place.text("became-file"), "upper");
    assert_eq!(names(&place.dir.path().join("here")), ["root"]);
}

#[test]
fn links_work_without_chroot() {
    let place = Place::new();
    let layer = Tar::new()
        .dir("usr/bin")
        .file("usr/bin/tool", "tool")
        .link("bin", "usr/bin")
        .link("usr/bin/alias", "/usr/bin/tool")
        .link("sbin", "/usr/bin")
        .link("root", "/")
        .link("dangling", "/nowhere/at/all")
        .hard_link("usr/bin/same", "bin/tool")
        // Through a link within the image.
        .file("bin/more", "more");
    place.unpack(&[layer.bytes()]).unwrap();
    assert_eq!(place.text("bin/tool"), "tool");
    assert_eq!(place.text("usr/bin/alias"), "tool");
    assert_eq!(place.text("sbin/same"), "tool");
    assert_eq!(place.text("usr/bin/more"), "more");
    assert_eq!(place.text("root/usr/bin/tool"), "tool");
    assert!(place.exists("dangling"));
    for link in ["usr/bin/alias", "sbin", "root", "dangling"] {
        let target = fs::read_link(place.root().join(link)).unwrap();
        assert!(target.is_relative(), "{link} -> {}", target.display());
    }
}

#[test]
fn modes_and_times_are_kept_within_reason() {
    let place = Place::new();
    let mut archive = tar::Builder::new(Vec::new());
    for (path, kind, mode) in [
        ("locked/", tar::EntryType::Directory, 0o555),
        ("locked/tool", tar::EntryType::Regular, 0o4755),
    ] {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_mtime(1_600_000_000);
        header.set_size(0);
        archive
            .append_data(&mut header, path, std::io::empty())
            .unwrap();
    }
    place.unpack(&[archive.into_inner().unwrap()]).unwrap();
    let tool = fs::metadata(place.root().join("locked/tool")).unwrap();
    assert_eq!(tool.permissions().mode() & 0o7777, 0o755, "no set-user-id");
    assert_eq!(tool.mtime(), 1_600_000_000);
    let folder = fs::metadata(place.root().join("locked")).unwrap();
    assert_eq!(
        folder.permissions().mode() & 0o7777,
        0o755,
        "its owner may remove it"
    );
}

#[test]
fn hostile_archives_are_refused_whole() {
    use tar::EntryType as Kind;
    let good = || Tar::new().file("good", "x");
    let cases: Vec<(&str, Vec<Tar>)> = vec![
        ("absolute", vec![good().file("/tmp/evil", "x")]),
        ("parent", vec![good().file("../evil", "x")]),
        ("parent inside", vec![good().file("a/../../evil", "x")]),
        ("parent folder", vec![good().dir("../outside/evil")]),
        (
            "whiteout outside",
            vec![good().file("../outside/.wh.canary", "")],
        ),
        ("whiteout of parent", vec![good().file("a/.wh...", "")]),
        ("whiteout of self", vec![good().file("a/.wh..", "")]),
        ("whiteout of nothing", vec![good().file("a/.wh.", "")]),
        (
            "link out",
            vec![good().link("evil", "../../outside/canary")],
        ),
        (
            "link out, absolute",
            vec![good().link("evil", "/../../../outside/canary")],
        ),
        (
            "write through a link",
            vec![
                good()
                    .link("evil", "../../outside")
                    .file("evil/canary", "x"),
            ],
        ),
        (
            "write through a link of a lower layer",
            vec![
                good().link("evil", "../../outside"),
                Tar::new().file("evil/canary", "x"),
            ],
        ),
        (
            "whiteout through a link",
            vec![
                good().link("evil", "../../outside"),
                Tar::new().file("evil/.wh.canary", ""),
            ],
        ),
        (
            "opaque through a link",
            vec![
                good().link("evil", "../../outside"),
                Tar::new().file("evil/.wh..wh..opq", ""),
            ],
        ),
        (
            "link that is harmless as text",
            vec![
                good()
                    .link("here", ".")
                    .link("evil", "here/../../outside/canary"),
            ],
        ),
        (
            "link that a later layer makes harmful",
            vec![
                good().dir("a/b").link("c", "a/b/../../good"),
                Tar::new().link("a/b", ".."),
            ],
        ),
        (
            "hard link out",
            vec![good().hard_link("evil", "../../outside/canary")],
        ),
        (
            "hard link, absolute",
            vec![good().hard_link("evil", "/etc/passwd")],
        ),
        (
            "hard link through a link",
            vec![
                good()
                    .link("l", "../../outside")
                    .hard_link("evil", "l/canary"),
            ],
        ),
        (
            "hard link to a link",
            vec![
                good()
                    .link("l", "../../outside/canary")
                    .hard_link("evil", "l"),
            ],
        ),
        (
            "hard link to nothing",
            vec![good().hard_link("evil", "missing")],
        ),
        (
            "hard link to a folder",
            vec![good().dir("d").hard_link("evil", "d")],
        ),
        (
            "character device",
            vec![good().entry(Kind::Char, "dev/mem", "", b"")],
        ),
        (
            "block device",
            vec![good().entry(Kind::Block, "dev/sda", "", b"")],
        ),
        ("pipe", vec![good().entry(Kind::Fifo, "pipe", "", b"")]),
        ("root as a link", vec![good().link("./", "/")]),
        (
            "circle",
            vec![good().link("a", "b").link("b", "a").file("a/x", "x")],
        ),
        ("through a file", vec![good().file("good/x", "x")]),
    ];
    for (name, layers) in cases {
        let place = Place::new();
        let layers: Vec<_> = layers.into_iter().map(Tar::bytes).collect();
        match place.unpack(&layers) {
            Err(error) => assert_eq!(error.code(), "image_archive_refused", "{name}: {error}"),
            Ok(()) => panic!("{name}: unpacked"),
        }
        place.assert_nothing_happened();
    }
}

#[test]
fn limits_hold() {
    let limits = UnpackLimits {
        bytes: 1 << 20,
        entries: 10,
    };
    let zeros = "\0".repeat((1 << 20) + 1);
    let many = (0..11).fold(Tar::new(), |t, i| t.file(&i.to_string(), ""));
    // A name of two megabytes would be held in memory.
    let long_name = Tar::new().entry(
        tar::EntryType::GNULongName,
        "././@LongLink",
        "",
        &vec![b'a'; 2 << 20],
    );
    let mut endless_padding = Tar::new().file("a", "").bytes();
    endless_padding.extend(vec![0; 3 << 20]);
    for (name, layer) in [
        ("bytes", Tar::new().file("zeros", &zeros).bytes()),
        (
            "bytes of several files",
            Tar::new()
                .file("a", &zeros[..600_000])
                .file("b", &zeros[..600_000])
                .bytes(),
        ),
        ("entries", many.bytes()),
        ("names", long_name.file("x", "").bytes()),
        ("padding", endless_padding),
    ] {
        let place = Place::new();
        let error = place.unpack_within(&[layer], limits).unwrap_err();
        assert_eq!(error.code(), "image_too_large", "{name}: {error}");
        place.assert_nothing_happened();
    }
}

#[test]
fn a_damaged_layer_leaves_nothing() {
    let place = Place::new();
    let image = image_of(
        &place.layout,
        &[
            Tar::new().file("a", "a").bytes(),
            Tar::new().file("b", "b").bytes(),
        ],
    );
    let layer = daybook_events::Digest::parse(image.manifest.layers()[1].digest());
    let path = place.layout.blob_path(&layer.unwrap());
    let bytes = fs::read(&path).unwrap();
    for damaged in [
        &bytes[..bytes.len() - 1],
        &bytes[..bytes.len() / 2],
        b"",
        b"no gzip",
    ] {
        fs::write(&path, damaged).unwrap();
        let error = unpack(
            &place.layout,
            &image,
            &place.root(),
            UnpackLimits::default(),
            &CancellationToken::new(),
        )
        .unwrap_err();
        assert_eq!(error.code(), "image_content_damaged", "{error}");
        place.assert_nothing_happened();
    }
    // Something behind the end of the archive counts as well.
    let mut longer = bytes.clone();
    longer.push(0);
    fs::write(&path, longer).unwrap();
    let limits = UnpackLimits::default();
    let stop = CancellationToken::new();
    assert!(unpack(&place.layout, &image, &place.root(), limits, &stop).is_err());
    place.assert_nothing_happened();
}

#[test]
fn layers_may_be_uncompressed_and_must_not_be_of_unknown_kinds() {
    let tar = Tar::new().file("a", "a").bytes();
    let place = Place::new();
    let stop = CancellationToken::new();
    let plain = image_of_blobs(
        &place.layout,
        std::slice::from_ref(&tar),
        MediaType::ImageLayer,
    );
    unpack(
        &place.layout,
        &plain,
        &place.root(),
        UnpackLimits::default(),
        &stop,
    )
    .unwrap();
    assert_eq!(place.text("a"), "a");

    let place = Place::new();
    for kind in [
        MediaType::ImageLayerZstd,
        MediaType::ImageLayerNonDistributableGzip,
    ] {
        let image = image_of_blobs(&place.layout, &[gzip(&tar)], kind);
        let error = unpack(
            &place.layout,
            &image,
            &place.root(),
            UnpackLimits::default(),
            &stop,
        )
        .unwrap_err();
        assert_eq!(error.code(), "image_unsupported");
    }
    place.assert_nothing_happened();
}

#[test]
fn a_folder_that_is_not_empty_is_left_alone() {
    let place = Place::new();
    fs::create_dir(place.root()).unwrap();
    fs::write(place.root().join("mine"), "mine").unwrap();
    let error = place
        .unpack(&[Tar::new().file("a", "a").bytes()])
        .unwrap_err();
    assert_eq!(error.code(), "image_io_failed");
    assert_eq!(names(&place.root()), ["mine"]);
    assert_eq!(names(&place.dir.path().join("here")), ["root"]);
}

#[test]
fn it_stops_when_it_is_told_to() {
    let place = Place::new();
    let image = image_of(&place.layout, &[Tar::new().file("a", "a").bytes()]);
    let stop = CancellationToken::new();
    stop.cancel();
    let error = unpack(
        &place.layout,
        &image,
        &place.root(),
        UnpackLimits::default(),
        &stop,
    );
    assert_eq!(error.unwrap_err().code(), "cancelled");
    place.assert_nothing_happened();
}

/// One entry of a random archive: its kind, its path and the target of a link. Most paths are
/// harmless, so that an archive gets far; targets are not.
fn entry() -> impl Strategy<Value = (u8, String, String)> {
    let name = || prop::sample::select(vec!["a", "b", "c"]);
    let path = prop_oneof![
        20 => name(),
        2 => prop::sample::select(vec![".wh.a", ".wh.b", ".wh..wh..opq", "."]),
        1 => prop::sample::select(vec!["..", "", "outside", "canary"]),
    ];
    let target = prop_oneof![
        3 => name(),
        3 => Just(".."),
        1 => prop::sample::select(vec!["", ".", "outside", "canary"]),
    ];
    let join = |parts: Vec<&str>| parts.join("/");
    (
        0..5u8,
        prop::collection::vec(path, 1..4).prop_map(join),
        prop::collection::vec(target, 1..5).prop_map(join),
    )
}

proptest! {
    // Each case writes and syncs several files, so there are fewer than usual unless asked for.
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(64)
    ))]

    /// Whatever an archive contains: nothing outside changes, nothing inside leads out, and a
    /// failure leaves nothing.
    #[test]
    fn nothing_gets_out(layers in prop::collection::vec(prop::collection::vec(entry(), 1..8), 1..4)) {
        let place = Place::new();
        let layers: Vec<Vec<u8>> = layers
            .into_iter()
            .map(|entries| {
                let add = |tar: Tar, (kind, path, target): (u8, String, String)| match kind {
                    0 => tar.file(&path, "x"),
                    1 => tar.dir(&path),
                    2 | 3 => tar.link(&path, &target),
                    _ => tar.hard_link(&path, &target),
                };
                entries.into_iter().fold(Tar::new(), add).bytes()
            })
            .collect();
        match place.unpack(&layers) {
            Ok(()) => {
                place.assert_outside_untouched();
                let root = place.root().canonicalize().unwrap();
                assert_all_within(&root, &root);
            }
            Err(_) => place.assert_nothing_happened(),
        }
    }
}

fn assert_all_within(root: &Path, folder: &Path) {
    for child in fs::read_dir(folder).unwrap() {
        let child = child.unwrap();
        if child.file_type().unwrap().is_dir() {
            assert_all_within(root, &child.path());
        } else if let Ok(end) = child.path().canonicalize() {
            assert!(
                end.starts_with(root),
                "{} leads to {}",
                child.path().display(),
                end.display()
            );
        }
    }
}
