//! `daybook demo`: the whole job by one command.

use std::path::Path;

use crate::support::{Done, Folder, daybook, processes_in};

fn demo(folder: &Folder, args: &[&str]) -> Done {
    let done = Done::of(
        daybook()
            .arg("demo")
            .args(args)
            .env("TMPDIR", folder.path())
            .env("HOME", folder.path()),
    );
    assert_eq!(done.code, 0, "{done:?}");
    done
}

fn is_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).unwrap().next().is_none()
}

#[test]
fn the_demo_tells_the_whole_story_and_leaves_nothing_behind() {
    let folder = Folder::new();
    let done = demo(&folder, &[]);
    for told in [
        "$ daybook project create shop",
        "Hello from Daybook",
        "HELLO FROM DAYBOOK!",
        "$ daybook rollback shop.production.web",
        "deploy(production): web",
        "the same: every row",
        "Done in",
    ] {
        assert!(done.stdout.contains(told), "{told:?} in {}", done.stdout);
    }
    assert_eq!(done.stderr, "");
    assert_eq!(processes_in(folder.path()), Vec::<i32>::new());
    assert!(is_empty(folder.path()), "the demo leaves something behind");
}

#[test]
fn the_demo_speaks_json_and_keeps_its_folder_when_asked() {
    let folder = Folder::new();
    let kept = folder.path().join("kept");
    let done = demo(
        &folder,
        &["--output", "json", "--keep", kept.to_str().unwrap()],
    );
    let lines = done.json_lines();
    assert_eq!(lines.last().unwrap()["same"], true);
    assert!(
        kept.join("gitops-clone/environments/production/values.yaml")
            .is_file()
    );
    // A folder with something in it is not written over.
    let mut again = daybook();
    again
        .args(["demo", "--output", "json", "--keep"])
        .arg(&kept);
    let refused = Done::of(&mut again);
    assert_eq!(refused.code, 2);
    assert_eq!(refused.error()["code"], "folder_not_empty");
}
