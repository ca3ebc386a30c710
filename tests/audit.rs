//! An auditor's way from a running server to a verdict, through the binary.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::support::{Done, Server, Settings, daybook, site, until};

const INSTANCE: &str = "shop.production.web";

/// Runs a command as an auditor with a memory of their own.
fn auditor(server: &Server, args: &[&str]) -> Done {
    let state = server.folder().path().join("auditor");
    Done::of(
        daybook()
            .args(args)
            .env("XDG_STATE_HOME", state)
            .env("DAYBOOK_URL", server.url()),
    )
}

fn replaced(from: &Path, to: &Path, old: &str, new: &str) {
    assert_eq!(old.len(), new.len());
    let mut bytes = fs::read(from).unwrap();
    let mut found = 0;
    for at in 0..bytes.len() - old.len() {
        if bytes[at..].starts_with(old.as_bytes()) {
            bytes[at..at + new.len()].copy_from_slice(new.as_bytes());
            found += 1;
        }
    }
    assert!(found > 0, "{old} is not in the export");
    fs::write(to, bytes).unwrap();
}

#[test]
fn an_auditor_gets_from_one_file_to_a_verdict() {
    let mut server = Server::start(Settings::default());
    let site = site("one");
    server.define("shop", "web", &site, &[]);
    let first = server.deploy(INSTANCE, &["--reason", "CHG-1042"]);
    until("everything is signed", || {
        let report = server.read("/api/v1/ledger");
        (report["head"] == report["signed"]["size"]).then_some(())
    });
    let export = server.folder().path().join("ledger.tar");
    let file = export.to_str().unwrap();
    let done = auditor(&server, &["audit", "export", "--out", file]);
    assert_eq!(done.code, 0, "{done:?}");
    let receipt = server.folder().path().join("receipt.json");
    let receipt = receipt.to_str().unwrap();
    let done = auditor(&server, &["audit", "receipt", &first, "--out", receipt]);
    assert_eq!(done.code, 0, "{done:?}");
    // Online the same is proven.
    let done = auditor(&server, &["audit", "verify"]);
    assert_eq!(done.code, 0, "{done:?}");

    // The rest needs no server.
    let data = server.folder().data();
    let keys = Done::of(daybook().args(["keys", "show", "--data", data.to_str().unwrap()]));
    let keys_file = server.folder().path().join("keys.txt");
    fs::write(&keys_file, keys.stdout).unwrap();
    let folder = server.folder().path().to_owned();
    let url = server.url();
    server.stop();
    let auditor = |args: &[&str]| {
        Done::of(
            daybook()
                .args(args)
                .env("XDG_STATE_HOME", folder.join("auditor"))
                .env("DAYBOOK_URL", &url),
        )
    };
    let keys = keys_file.to_str().unwrap();
    let done = auditor(&["audit", "verify", file, "--keys", keys, "--output", "json"]);
    assert_eq!(done.code, 0, "{done:?}");
    let verdict: Value = done.json_document();
    assert_eq!(verdict["verdict"], "holds", "{verdict}");
    let done = auditor(&["audit", "verify", file]);
    assert!(done.stdout.contains("the ledger holds"), "{}", done.stdout);
    assert!(
        done.stdout.contains("that you saw last time"),
        "{}",
        done.stdout
    );
    assert!(
        !done.stdout.contains("no GitOps repository was compared"),
        "{}",
        done.stdout
    );
    let done = auditor(&["audit", "check-receipt", receipt]);
    assert_eq!(done.code, 0, "{done:?}");
    let done = auditor(&["audit", "report", "population", file]);
    assert!(done.stdout.contains(&first), "{}", done.stdout);

    // One changed character, anywhere, and it does not hold.
    let changed = folder.join("changed.tar");
    replaced(&export, &changed, "CHG-1042", "CHG-1043");
    let done = auditor(&["audit", "verify", changed.to_str().unwrap()]);
    assert_eq!(done.code, 8, "{done:?}");
    assert!(done.stdout.contains("entry_differs"), "{}", done.stdout);
    let text = fs::read_to_string(receipt).unwrap();
    let forged = folder.join("forged.json");
    fs::write(&forged, text.replacen('7', "8", 1)).unwrap();
    let done = auditor(&["audit", "check-receipt", forged.to_str().unwrap()]);
    assert_ne!(done.code, 0, "{done:?}");
}
