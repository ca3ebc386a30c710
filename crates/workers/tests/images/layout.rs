//! The content store.

use std::fs;
use std::io::{Read as _, Write as _};
use std::process::Command;

use daybook_events::Digest;
use daybook_workers::image::layout::Layout;
use oci_spec::image::{ImageIndex, MediaType, OciLayout};

use super::fixtures::names;

#[test]
fn blobs_are_stored_by_digest_once() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::open(dir.path().join("images")).unwrap();
    let digest = layout.put(b"hello").unwrap();
    assert_eq!(digest, Digest::of(b"hello"));
    assert_eq!(layout.put(b"hello").unwrap(), digest);
    assert_eq!(layout.read(&digest, 5).unwrap(), b"hello");
    assert_eq!(layout.size(&digest).unwrap(), Some(5));
    assert_eq!(names(&layout.root().join("blobs/sha256")), [digest.hex()]);
    assert!(names(&layout.root().join("tmp")).is_empty());

    assert_eq!(
        layout.read(&digest, 4).unwrap_err().code(),
        "image_invalid",
        "a document that is too large is refused"
    );
    let missing = Digest::of(b"missing");
    assert_eq!(
        layout.read(&missing, 9).unwrap_err().code(),
        "image_not_found"
    );
}

#[test]
fn the_folder_is_an_oci_layout() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::open(dir.path()).unwrap();
    let digest = layout.put(b"{}").unwrap();
    for name in ["r.example/a:1", "r.example/a:1", "r.example/a:2"] {
        layout
            .set_reference(name, &digest, MediaType::ImageManifest)
            .unwrap();
    }
    let version = OciLayout::from_file(dir.path().join("oci-layout")).unwrap();
    assert_eq!(version.image_layout_version(), "1.0.0");
    let index = ImageIndex::from_file(dir.path().join("index.json")).unwrap();
    assert_eq!(index.manifests().len(), 2);
    assert_eq!(index.manifests()[0].size(), 2);

    let again = Layout::open(dir.path()).unwrap();
    assert_eq!(again.reference("r.example/a:1").unwrap(), Some(digest));
    assert_eq!(again.reference("r.example/a:3").unwrap(), None);
}

#[test]
fn a_reference_never_points_at_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::open(dir.path()).unwrap();
    let error = layout
        .set_reference("a:1", &Digest::of(b"x"), MediaType::ImageManifest)
        .unwrap_err();
    assert_eq!(error.code(), "image_not_found");
    assert!(layout.references().unwrap().is_empty());
}

#[test]
fn damaged_content_is_not_returned_and_is_healed_by_storing_it_again() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::open(dir.path()).unwrap();
    let content = vec![7; 200_000];
    let digest = layout.put(&content).unwrap();
    let path = layout.blob_path(&digest);
    let truncated = &content[..199_999];
    let mut flipped = content.clone();
    flipped[100_000] ^= 1;
    for damaged in [truncated, &flipped, b""] {
        fs::write(&path, damaged).unwrap();
        let error = layout.read(&digest, 1 << 20).unwrap_err();
        assert_eq!(error.code(), "image_content_damaged");
        let mut reader = layout.open_blob(&digest).unwrap();
        assert!(std::io::copy(&mut reader, &mut std::io::sink()).is_err());
        assert!(reader.read(&mut [0; 8]).is_err(), "it stays damaged");
    }
    layout.put(&content).unwrap();
    assert_eq!(layout.read(&digest, 1 << 20).unwrap(), content);
}

#[test]
fn what_is_not_finished_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::open(dir.path()).unwrap();
    let mut writer = layout.writer().unwrap();
    writer.write_all(b"half").unwrap();
    drop(writer);
    let mut writer = layout.writer().unwrap();
    writer.write_all(b"other").unwrap();
    let error = writer.finish(Some(&Digest::of(b"expected"))).unwrap_err();
    assert_eq!(error.code(), "image_content_damaged");
    assert!(names(&dir.path().join("blobs/sha256")).is_empty());
    assert!(names(&dir.path().join("tmp")).is_empty());
}

#[test]
fn what_a_crash_left_is_removed_and_what_is_being_written_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::open(dir.path()).unwrap();
    fs::write(dir.path().join("tmp/blob-left"), "half").unwrap();
    let mut writer = layout.writer().unwrap();
    writer.write_all(b"slow").unwrap();

    Layout::open(dir.path()).unwrap();
    let left = names(&dir.path().join("tmp"));
    assert!(left.len() == 1 && left[0] != "blob-left", "{left:?}");
    writer.finish(Some(&Digest::of(b"slow"))).unwrap();
}

#[test]
fn a_folder_of_another_kind_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("oci-layout"),
        r#"{"imageLayoutVersion":"2.0.0"}"#,
    )
    .unwrap();
    assert_eq!(
        Layout::open(dir.path()).unwrap_err().code(),
        "image_invalid"
    );
}

const WRITERS: usize = 4;
const EACH: usize = 25;
const FOLDER: &str = "TEST_LAYOUT_FOLDER";
const NUMBER: &str = "TEST_LAYOUT_NUMBER";

#[test]
fn several_processes_write_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::open(dir.path()).unwrap();
    let shared = layout.put(&vec![1; 1 << 20]).unwrap();
    let mut writers: Vec<_> = (0..WRITERS)
        .map(|number| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "--ignored", "layout::one_of_several_writers"])
                .env(FOLDER, dir.path())
                .env(NUMBER, number.to_string())
                .spawn()
                .unwrap()
        })
        .collect();
    // Whoever reads meanwhile always sees a whole index and whole blobs.
    while writers.iter_mut().any(|w| w.try_wait().unwrap().is_none()) {
        for (_, digest) in layout.references().unwrap() {
            layout.read(&digest, 2 << 20).unwrap();
        }
        layout.read(&shared, 2 << 20).unwrap();
    }
    for mut writer in writers {
        assert!(writer.wait().unwrap().success());
    }
    assert_eq!(layout.references().unwrap().len(), WRITERS * EACH);
    assert!(names(&dir.path().join("tmp")).is_empty());
}

#[test]
#[ignore = "started by several_processes_write_at_once"]
fn one_of_several_writers() {
    let layout = Layout::open(std::env::var_os(FOLDER).unwrap()).unwrap();
    let number = std::env::var(NUMBER).unwrap();
    for i in 0..EACH {
        layout.put(&vec![1; 1 << 20]).unwrap();
        let digest = layout.put(format!("{number} {i}").as_bytes()).unwrap();
        layout
            .set_reference(
                &format!("r/{number}:{i}"),
                &digest,
                MediaType::ImageManifest,
            )
            .unwrap();
    }
}
