//! Where a run ended, as far as it must be the same in every run.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use daybook_testkit::git::git;
use serde_json::{Value, json};

use crate::scenario::Cast;
use crate::stage::Stage;
use crate::support::{Done, daybook};

/// Events that may be there more or less often after a crash, because what they tell did: a build's
/// further attempts, what was seen of processes before and after, and images that were there when
/// their processes were taken over.
const MAY_REPEAT: [&str; 6] = [
    "build.started",
    "build.builder_started",
    "build.push_started",
    "deployment.workload_observed",
    "deployment.endpoint_observed",
    "deployment.image_pulled",
];

/// What is there at the end.
pub fn outcome(stage: &mut Stage, cast: &Cast) -> BTreeMap<String, Value> {
    let mut all = BTreeMap::new();
    let mut note = |name: &str, value: Value| drop(all.insert(name.to_owned(), value));
    for (name, id) in [("first", &cast.first), ("second", &cast.second)] {
        let detail = stage.read(&format!("/api/v1/deployments/{id}"));
        let mut kept = serde_json::Map::new();
        for field in [
            "id",
            "state",
            "phase",
            "main",
            "image",
            "hostnames",
            "operations",
            "failure",
        ] {
            kept.insert(field.into(), detail[field].clone());
        }
        for host in kept["hostnames"].as_array_mut().into_iter().flatten() {
            let host = host.as_object_mut().unwrap();
            host.remove("since");
            host.remove("url");
        }
        note(&format!("deployment {name}"), Value::Object(kept));
        let own = stage.processes_of(id).len();
        note(&format!("processes of {name}"), json!(own));
    }
    note("processes at all", json!(stage.processes().len()));
    note("events", json!(events(stage)));
    let repository = stage.folder.data().join("git/shop.git");
    let log = git(&repository, &["log", "--reverse", "--format=%an: %s"]);
    note("commits", json!(log.lines().collect::<Vec<_>>()));
    let list = git(&repository, &["ls-tree", "-r", "--name-only", "HEAD"]);
    for file in list.lines().filter(|f| !f.starts_with(".daybook/")) {
        let text = git(&repository, &["show", &format!("HEAD:{file}")]);
        note(&format!("GitOps file {file}"), json!(text));
    }
    let images = fs::read(stage.folder.data().join("images/index.json")).unwrap_or_default();
    note(
        "images",
        serde_json::from_slice(&images).unwrap_or_default(),
    );
    note("files", json!(files(&stage.folder.data())));
    all
}

/// How many events of each kind there are.
fn events(stage: &mut Stage) -> BTreeMap<String, u64> {
    let done = command(stage, &["events", "--output", "json"]);
    let mut counts = BTreeMap::new();
    for line in done.json_lines() {
        let kind = line["event"]["type"].as_str().unwrap_or_default();
        let kind = kind.trim_start_matches("dev.daybook.");
        let kind = kind.trim_end_matches(".v1").to_owned();
        *counts.entry(kind).or_default() += 1;
    }
    for kind in MAY_REPEAT {
        counts.entry(kind.to_owned()).and_modify(|n| *n = 1);
    }
    counts
}

/// How many files there are of each name, but for those that each run has in its own number: of the log, its
/// consumers and its tree, of projections, of git objects, which carry times, and what a notary that died
/// did not finish beside its keys.
fn files(data: &Path) -> BTreeMap<String, u32> {
    const OWN: [&str; 8] = [
        "log/segments/",
        "log/index/",
        "log/consumers/",
        "log/lines/",
        "projections",
        "tlog/",
        ".git/objects/",
        "keys/ledger/.notary.signed.",
    ];
    let mut found: BTreeMap<String, u32> = BTreeMap::new();
    let mut folders = vec![data.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = path.strip_prefix(data).unwrap_or(&path);
            let name = name.to_string_lossy().into_owned();
            if OWN.iter().any(|own| name.contains(own)) {
                continue;
            }
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                folders.push(path);
            } else {
                // A process that was started again has a file of output more, or another one; a
                // process of Daybook has a folder of its own for work in progress.
                let output = name.contains("/output-") && name.ends_with(".log");
                let name = match name.rsplit_once('/') {
                    Some((folder, _)) if output => format!("{folder}/output"),
                    Some((folder, file)) if folder.starts_with("scratch/") => {
                        format!("scratch/*/{file}")
                    }
                    _ => name,
                };
                *found.entry(name).or_default() += 1;
            }
        }
    }
    found
}

/// What is wrong in a run that ended, beside where it ended.
pub fn complaints(stage: &mut Stage) -> Vec<String> {
    let mut wrong = Vec::new();
    let report = stage.until("everything is signed", |stage| {
        let report = stage.read("/api/v1/ledger");
        (report["head"] == report["signed"]["size"]).then_some(report)
    });
    if report["condition"]["state"] == "broken" {
        wrong.push(format!("the ledger is broken: {report}"));
    }
    for args in [&["audit", "verify"][..], &["replay", "--quiet"]] {
        let done = command(stage, args);
        if done.code != 0 {
            wrong.push(format!("daybook {args:?}: {done:?}"));
        }
    }
    let repository = stage.folder.data().join("git/shop.git");
    git(&repository, &["fsck", "--strict", "--no-dangling"]);
    if let Some(forge) = &stage.forge {
        let (here, there) = (
            git(&repository, &["rev-parse", "main"]),
            forge.repository.git(&["rev-parse", "main"]),
        );
        if here != there {
            wrong.push(format!("the remote is at {there}, and here is {here}"));
        }
    }
    wrong
}

fn command(stage: &mut Stage, args: &[&str]) -> Done {
    let state = stage.folder.path().join("auditor");
    Done::of(
        daybook()
            .args(args)
            .env("XDG_STATE_HOME", state)
            .env("DAYBOOK_URL", &stage.url),
    )
}
