//! GitOps repositories as people meet them: commits by hand, and what is decided about them.

use std::fs;
use std::path::Path;

use daybook_testkit::git::{git, git_command};

use crate::support::{Server, Settings, Visitor, site, until};

/// Commits by hand into a bare repository.
fn by_hand(repository: &Path, file: &str, text: &str) -> String {
    let clone = tempfile::tempdir().unwrap();
    let at = clone.path();
    git(at, &["clone", "--quiet", repository.to_str().unwrap(), "."]);
    fs::write(at.join(file), text).unwrap();
    git(at, &["add", "--all"]);
    git(at, &["commit", "--quiet", "-m", &format!("write {file}")]);
    git(at, &["push", "--quiet", "origin", "HEAD:main"]);
    git(at, &["rev-parse", "HEAD"])
}

#[test]
fn commits_by_hand_are_shown_adopted_and_undone() {
    let server = Server::start(Settings::default().arg("--gitops-watch").arg("1"));
    let source = site("one");
    server.define("shop", "web", &source, &[]);
    server.deploy("shop.production.web", &[]);
    let repository = server.gitops("shop");

    // Every commit is signed, and nothing that git says about the repository is a warning.
    let clone = tempfile::tempdir().unwrap();
    let url = format!("{}/git/shop.git", server.url());
    for from in [url.as_str(), repository.to_str().unwrap()] {
        let into = clone.path().join(from.replace('/', "_"));
        let cloned = git_command(clone.path())
            .args(["clone", "--quiet", from, into.to_str().unwrap()])
            .output()
            .unwrap();
        assert!(cloned.status.success());
        assert_eq!(String::from_utf8_lossy(&cloned.stderr), "");
    }
    let allowed = server.ok(&["gitops", "allowed-signers", "shop"]).stdout;
    let file = clone.path().join("allowed_signers");
    fs::write(&file, allowed).unwrap();
    let verify = |commit: &str| {
        let setting = format!("gpg.ssh.allowedSignersFile={}", file.display());
        let verdict = git_command(&repository)
            .args(["-c", &setting, "verify-commit", commit])
            .output()
            .unwrap();
        assert!(verdict.status.success(), "{commit}: {verdict:?}");
    };
    let signs = std::process::Command::new("ssh-keygen").arg("-?").output();
    match &signs {
        Ok(_) => git(&repository, &["rev-list", "main"])
            .lines()
            .for_each(verify),
        Err(_) => daybook_testkit::left_out("ssh-keygen is not installed"),
    }
    let anchored = git(&repository, &["show", "main:.daybook/checkpoint"]);
    assert!(anchored.lines().count() >= 5, "{anchored}");

    let first = by_hand(&repository, "NOTES", "a\nb\n");
    let second = by_hand(&repository, "OTHER", "c\n");
    let show = || server.json(&["gitops", "show", "shop"]);
    until("both are found", || {
        (show()["undecided"].as_u64() == Some(2)).then_some(())
    });
    let shown = server.ok(&["gitops", "show", "shop"]).stdout;
    assert!(
        shown.contains("write NOTES") && shown.contains(&first[..7]),
        "{shown}"
    );
    let status = server.ok(&["status"]).stdout;
    assert!(
        status.contains("2 commits in the GitOps repository of shop"),
        "{status}"
    );
    let diff = server.ok(&["gitops", "diff", "shop", &first[..9]]).stdout;
    assert!(
        diff.contains("+++ b/NOTES") && diff.contains("+a\n+b"),
        "{diff}"
    );
    let kinds: Vec<_> = server.events();
    let found = kinds
        .iter()
        .filter(|e| {
            e["event"]["type"]
                .as_str()
                .unwrap_or_default()
                .ends_with("foreign_commit_found.v1")
        })
        .count();
    assert_eq!(found, 2);

    server.ok(&["gitops", "adopt", "shop", &first, "--reason", "agreed"]);
    server.ok(&["gitops", "revert", "shop", &second[..7], "--reason", "no"]);
    let shown = until("one is adopted and one undone", || {
        let shown = show();
        let of = |n: usize| shown["foreign"][n]["status"].as_str().map(str::to_owned);
        (of(0).as_deref() == Some("adopted") && of(1).as_deref() == Some("reverted"))
            .then_some(shown)
    });
    let head = shown["head"].as_str().unwrap();
    assert_eq!(git(&repository, &["rev-parse", "main"]), head);
    let listed = git(&repository, &["ls-tree", "--name-only", "main"]);
    assert!(
        listed.contains("NOTES") && !listed.contains("OTHER"),
        "{listed}"
    );
    if signs.is_ok() {
        verify(head);
    }
    let refused = server.cli(&["gitops", "adopt", "shop", &second]);
    assert_eq!(refused.code, 5, "{refused:?}");
    let unknown = "0".repeat(40);
    assert_eq!(server.cli(&["gitops", "adopt", "shop", &unknown]).code, 4);
    assert_eq!(server.cli(&["gitops", "diff", "shop", &unknown]).code, 4);
    assert_eq!(server.cli(&["gitops", "adopt", "shop", "nonsense"]).code, 2);
    assert_eq!(server.cli(&["gitops", "show", "nothing"]).code, 4);

    // The next deployment commits on top.
    source.commit("Two", &[("index.html", "two")]);
    server.deploy("shop.production.web", &[]);
    assert_eq!(git(&repository, &["rev-parse", "main^"]), head);
    server.check_replay();
}

/// A clone with a work tree, as somebody has it who works on the repository by hand.
fn clone_of(repository: &Path) -> tempfile::TempDir {
    let clone = tempfile::tempdir().unwrap();
    let url = repository.to_str().unwrap();
    git(clone.path(), &["clone", "--quiet", url, "."]);
    clone
}

#[test]
fn a_git_revert_of_a_deployment_is_a_rollback_by_who_made_it() {
    let server = Server::start(Settings::default().arg("--gitops-watch").arg("1"));
    let source = site("one");
    server.define("shop", "web", &source, &[]);
    let instance = "shop.production.web";
    let first = server.deploy(instance, &[]);
    source.commit("Two", &[("index.html", "two")]);
    let second = server.deploy(instance, &[]);
    server.get_from("web.production.shop.localhost", "/", &second);
    let repository = server.gitops("shop");
    let deployed = git(&repository, &["rev-parse", "main"]);

    // A message alone reverts nothing.
    let lie = clone_of(&repository);
    fs::write(lie.path().join("NOTES"), "x").unwrap();
    git(lie.path(), &["add", "--all"]);
    let message = format!("Revert it\n\nThis reverts commit {deployed}.");
    git(lie.path(), &["commit", "--quiet", "-m", &message]);
    git(lie.path(), &["push", "--quiet", "origin", "HEAD:main"]);
    let show = || server.json(&["gitops", "show", "shop"]);
    let shown = until("the first one is found", || {
        let shown = show();
        (shown["undecided"].as_u64() == Some(1)).then_some(shown)
    });
    assert_eq!(shown["foreign"][0]["reverts"], deployed.as_str());
    assert!(shown["foreign"][0]["undoes"].is_null(), "{shown}");

    let clone = clone_of(&repository);
    git(clone.path(), &["revert", "--no-edit", &deployed]);
    git(clone.path(), &["push", "--quiet", "origin", "HEAD:main"]);
    let revert = git(clone.path(), &["rev-parse", "HEAD"]);
    server.wait_for(&second, "stopped");
    server.get_from("web.production.shop.localhost", "/", &first);
    let detail = server.deployment(&first);
    assert_eq!(detail["main"], true);
    let shown = show();
    assert_eq!(shown["foreign"][1]["commit"], revert.as_str());
    assert_eq!(shown["foreign"][1]["undoes"], second.as_str());
    assert_eq!(shown["foreign"][1]["status"], "adopted");
    assert_eq!(shown["undecided"], 1);
    let said = server.ok(&["logs", &second]).stdout;
    assert!(said.contains("reverted its commit"), "{said}");
    let events = server.events();
    let by_ada: Vec<_> = events
        .iter()
        .filter(|e| e["event"]["authid"] == "ada@example.com")
        .map(|e| e["event"]["type"].as_str().unwrap_or_default())
        .collect();
    assert_eq!(
        by_ada,
        [
            "dev.daybook.routing.switched.v1",
            "dev.daybook.gitops.foreign_commit_adopted.v1",
            "dev.daybook.deployment.stop_requested.v1"
        ]
    );

    // It is pinned as after `daybook rollback`: nothing takes over by itself.
    source.commit("Three", &[("index.html", "three")]);
    let third = server.deploy(instance, &[]);
    assert_eq!(server.deployment(&third)["main"], false);
    assert_eq!(server.deployment(&first)["main"], true);
    server.check_replay();
}

/// The files below a folder with what they hold, by name.
fn contents(folder: &Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    let mut found = std::collections::BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(at) = folders.pop() {
        for entry in fs::read_dir(&at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().display().to_string();
                found.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    found
}

#[test]
fn an_ejected_repository_stands_alone_and_is_the_same_each_time() {
    const CANARY: &str = "canary-value-5f1d9c";
    let server = Server::start(Settings::default());
    let source = site("one");
    server.define("shop", "web", &source, &[]);
    assert_eq!(
        server
            .cli(&["gitops", "eject", "shop", "--out", "x.zip"])
            .code,
        4
    );
    let value = server.folder().path().join("value");
    fs::write(&value, CANARY).unwrap();
    let from = ["--from-file", value.to_str().unwrap()];
    server.ok(&[&["secret", "set", "shop", "TOKEN"][..], &from].concat());
    server.deploy("shop.production.web", &[]);
    source.commit("Two", &[("index.html", "two")]);
    server.deploy("shop.production.web", &[]);
    let out = |name: &str| server.folder().path().join(name);
    let eject = |name: &str| {
        let path = out(name);
        let path = path.to_str().unwrap();
        server.cli(&["gitops", "eject", "shop", "--out", path])
    };
    for name in ["one", "two", "one.zip", "two.zip"] {
        let done = eject(name);
        assert_eq!(done.code, 0, "{done:?}");
        // However the repository keeps its objects.
        git(&server.gitops("shop"), &["repack", "-adq"]);
    }
    let files = contents(&out("one"));
    assert_eq!(files, contents(&out("two")));
    assert_eq!(
        fs::read(out("one.zip")).unwrap(),
        fs::read(out("two.zip")).unwrap()
    );
    assert_eq!(eject("one").code, 2, "it is there already");
    for name in [
        "EJECTED.md",
        "argocd/shop-production.yaml",
        "base/Chart.yaml",
    ] {
        assert!(files.contains_key(name), "{name} in {:?}", files.keys());
    }

    // It is a repository like any other, with its history, and clean.
    let ejected = out("one");
    git(&ejected, &["fsck", "--strict"]);
    let log = ["log", "--format=%H %s", "main"];
    assert_eq!(git(&ejected, &log), git(&server.gitops("shop"), &log));
    git(&ejected, &["reset", "--quiet"]);
    assert_eq!(
        git(&ejected, &["status", "--porcelain"]),
        "?? EJECTED.md\n?? argocd/"
    );
    let clone = tempfile::tempdir().unwrap();
    git(
        clone.path(),
        &["clone", "--quiet", ejected.to_str().unwrap(), "."],
    );

    // No value of a secret is in it, packed or not.
    let shown = git(&ejected, &["log", "--patch", "main"]);
    assert!(shown.contains("TOKEN") && !shown.contains(CANARY));
    let has = |bytes: &[u8]| bytes.windows(CANARY.len()).any(|w| w == CANARY.as_bytes());
    assert!(!files.values().any(|content| has(content)));
    assert!(!has(&fs::read(out("one.zip")).unwrap()));

    // What other programs make of the archive.
    match std::process::Command::new("python3")
        .args(["-m", "zipfile", "-t"])
        .arg(out("one.zip"))
        .output()
    {
        Ok(tested) => {
            assert!(tested.status.success(), "{tested:?}");
            let into = out("unzipped");
            let unzipped = std::process::Command::new("python3")
                .args(["-m", "zipfile", "-e"])
                .args([out("one.zip"), into.clone()])
                .status();
            assert!(unzipped.unwrap().success());
            assert_eq!(contents(&into), files);
        }
        Err(_) => daybook_testkit::left_out("python3 is not installed"),
    }

    // Somebody commits the value of one: nothing leaves.
    by_hand(&server.gitops("shop"), "NOTES", CANARY);
    let refused = eject("three");
    assert_eq!(refused.code, 5, "{refused:?}");
    assert!(refused.stderr.contains("value of a secret") && !refused.stderr.contains(CANARY));
    assert!(!out("three").exists());
}

/// Reverts the commit of a deployment by hand. Where the stop of the one before came after it, that
/// conflicts, and is resolved as a person does: what was before, and stopped.
fn revert_by_hand(repository: &Path, commit: &str) {
    let clone = clone_of(repository);
    let at = clone.path();
    let mut revert = git_command(at);
    revert.args(["revert", "--no-commit", commit]);
    revert.output().unwrap();
    let values = "environments/production/values.yaml";
    if git(at, &["ls-files", "--unmerged"]).contains(values) {
        let before = git(at, &["show", &format!("{commit}^:{values}")]);
        let stopped = before.replace("replicas: 1", "replicas: 0");
        fs::write(at.join(values), format!("{stopped}\n")).unwrap();
        git(at, &["add", values]);
    }
    git(at, &["checkout", "--quiet", "HEAD", "--", ".daybook"]);
    let message = format!("Revert it\n\nThis reverts commit {commit}.");
    git(at, &["commit", "--quiet", "-m", &message]);
    git(at, &["push", "--quiet", "origin", "HEAD:main"]);
}

fn newest_deploy(repository: &Path) -> String {
    let newest = ["log", "-1", "--format=%H", "--grep=^deploy(", "main"];
    git(repository, &newest)
}

#[test]
fn a_git_revert_starts_what_was_stopped_and_no_request_fails() {
    let settings = Settings::default().arg("--gitops-watch").arg("1");
    let server = Server::start(settings.arg("--keep-old").arg("1s"));
    let source = site("one");
    server.define("shop", "web", &source, &[]);
    let instance = "shop.production.web";
    let first = server.deploy(instance, &[]);
    source.commit("Two", &[("index.html", "two")]);
    let second = server.deploy(instance, &[]);
    server.get_from("web.shop.localhost", "/", &second);
    server.wait_for(&first, "stopped");
    let repository = server.gitops("shop");
    let visitor = Visitor::of_any(&server, "web.shop.localhost", &["one", "two"]);

    revert_by_hand(&repository, &newest_deploy(&repository));
    server.get_from("web.shop.localhost", "/", &first);
    server.wait_for(&second, "stopped");
    visitor.was_always_served();
    let detail = server.deployment(&first);
    assert_eq!(
        (&detail["main"], &detail["state"]),
        (&true.into(), &"started".into())
    );
    // The commit is settled by whoever waits for the gateways, which the visitors do not do.
    let shown = until("the commit is adopted", || {
        let shown = server.json(&["gitops", "show", "shop"]);
        (shown["foreign"][0]["status"] == "adopted").then_some(shown)
    });
    assert_eq!(shown["foreign"][0]["undoes"], second.as_str(), "{shown}");
    let said = server.ok(&["logs", &second]).stdout;
    assert!(said.contains("gets the traffic when it is ready"), "{said}");
    let events = server.events();
    let by_ada = events
        .iter()
        .filter(|e| e["event"]["authid"] == "ada@example.com");
    let mut kinds: Vec<_> = by_ada.filter_map(|e| e["event"]["type"].as_str()).collect();
    // Whether the old one is stopped before or after the commit is settled is nobody's promise.
    kinds[2..].sort_unstable();
    assert_eq!(
        kinds,
        [
            "dev.daybook.deployment.start_requested.v1",
            "dev.daybook.routing.switched.v1",
            "dev.daybook.deployment.stop_requested.v1",
            "dev.daybook.gitops.foreign_commit_adopted.v1",
        ]
    );
    server.check_replay();
}

#[test]
fn what_has_the_traffic_is_kept_although_its_release_was_taken_out_by_hand() {
    let mut server = Server::start(Settings::default().arg("--gitops-watch").arg("1"));
    let source = site("one");
    server.define("shop", "web", &source, &[]);
    let instance = "shop.production.web";
    let first = server.deploy(instance, &[]);
    server.get_from("web.shop.localhost", "/", &first);
    let repository = server.gitops("shop");
    let visitor = Visitor::of(&server, "web.shop.localhost", "one");
    // There is nothing to go back to.
    revert_by_hand(&repository, &newest_deploy(&repository));
    until("it is found", || {
        let shown = server.json(&["gitops", "show", "shop"]);
        (shown["undecided"].as_u64() == Some(1)).then_some(())
    });
    // The next commits are made on top of it, and none of them ends what leads there.
    server.service("shop", "api", &source, &[]);
    let other = server.deploy("shop.production.api", &[]);
    server.get_from("api.shop.localhost", "/", &other);
    visitor.was_always_served();
    server.kill();
    server.restart();
    server.get_from("web.shop.localhost", "/", &first);
    source.commit("Two", &[("index.html", "two")]);
    let second = server.deploy(instance, &[]);
    assert_eq!(
        server.get_from("web.shop.localhost", "/", &second).body,
        "two"
    );
    server.check_replay();
}
