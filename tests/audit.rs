//! An auditor's way from a running server to a verdict, through the binary.

use std::fs;
use std::path::Path;

use daybook_store::tlog::{Checkpoint, SignerKey};
use daybook_testkit::git::git;
use daybook_testkit::judge::TlogJudge;
use daybook_testkit::left_out;
use daybook_testkit::nats::{NatsBinary, NatsServer};
use serde_json::{Value, json};

use crate::support::{Done, Server, Settings, daybook, site, until};

const INSTANCE: &str = "shop.production.web";

/// Waits until all that happened is signed.
fn signed(server: &Server) {
    until("everything is signed", || {
        let report = server.read("/api/v1/ledger");
        (report["head"] == report["signed"]["size"]).then_some(())
    });
}

/// Runs `daybook keys` on a server's data, and returns the public keys that it prints.
fn keys(server: &Server, verb: &str) -> Vec<String> {
    let data = server.folder().data();
    let done = Done::of(daybook().args(["keys", verb, "--data", data.to_str().unwrap()]));
    assert_eq!(done.code, 0, "{done:?}");
    done.stdout.lines().map(str::to_owned).collect()
}

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

/// Has a program that has nothing of Daybook judge what is served and what was exported, as it is
/// and with a byte changed.
fn judged(server: &Server, unpacked: &Path) {
    let key = keys(server, "show").remove(0);
    let origin = key.split('+').next().unwrap();
    let Some(judge) = TlogJudge::find(origin, &key) else {
        return left_out("tlog-judge is not there; `cargo xtask tools judge` builds it");
    };
    let served = format!("{}/tlog", server.url());
    let folder = server.folder().data().join("tlog");
    for (at, files) in [
        (served.as_str(), &*folder),
        (unpacked.to_str().unwrap(), unpacked),
    ] {
        let said = judge.log(at);
        // Tiles of older sizes stay published; the tree of this one has those of its own.
        let size = said.expect(at).split(' ').nth(3).unwrap().to_owned();
        assert!(size.parse::<u64>().unwrap() < 256, "{size}");
        let mut tiles = Vec::new();
        let mut folders = vec![files.join("tile")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => folders.push(path),
                    false => tiles.push(path),
                }
            }
        }
        tiles.retain(|tile| tile.ends_with(&size));
        assert_eq!(tiles.len(), 2, "{tiles:?}");
        for tile in tiles {
            let good = fs::read(&tile).unwrap();
            let mut bad = good.clone();
            bad[good.len() / 2] ^= 1;
            fs::write(&tile, bad).unwrap();
            let said = judge.log(at);
            assert!(said.is_err(), "{}: {said:?}", tile.display());
            fs::write(&tile, good).unwrap();
        }
    }
}

#[test]
fn an_auditor_gets_from_one_file_to_a_verdict() {
    let mut server = Server::start(Settings::default());
    let site = site("one");
    server.define("shop", "web", &site, &[]);
    let first = server.deploy(INSTANCE, &["--reason", "CHG-1042"]);
    signed(&server);
    let export = server.folder().path().join("ledger.tar");
    let file = export.to_str().unwrap();
    let done = auditor(&server, &["audit", "export", "--out", file]);
    assert_eq!(done.code, 0, "{done:?}");
    let receipt = server.folder().path().join("receipt.json");
    let receipt = receipt.to_str().unwrap();
    // The end of its id is enough. Where the server says that the events are, there are the same
    // as a walk over the whole ledger finds.
    let end = &first[first.len() - 6..];
    let statement = |more: &[&str], out: &str| -> Value {
        let args = [
            &["audit", "receipt", end],
            more,
            &["--out", out, "--output", "json"],
        ]
        .concat();
        let done = auditor(&server, &args);
        assert_eq!(done.code, 0, "{done:?}");
        done.json_document()
    };
    let walked = server.folder().path().join("walked.json");
    let walked = walked.to_str().unwrap();
    let (asked, found) = (statement(&[], receipt), statement(&[file], walked));
    let events = |statement: &Value| statement["events"].as_array().unwrap().clone();
    let signed_then: Vec<Value> = events(&asked)
        .into_iter()
        .filter(|e| e["position"].as_u64() <= found["size"].as_u64())
        .collect();
    assert_eq!(signed_then, events(&found));
    let done = auditor(&server, &["audit", "receipt", "0ff", file, "--out", walked]);
    assert_eq!(done.code, 2, "{done:?}");
    // Online the same is proven.
    let done = auditor(&server, &["audit", "verify"]);
    assert_eq!(done.code, 0, "{done:?}");

    // Programs of others say the same of what is served, and of what was exported.
    let unpacked = server.folder().path().join("unpacked");
    fs::create_dir(&unpacked).unwrap();
    let bytes = fs::read(&export).unwrap();
    tar::Archive::new(&bytes[..]).unpack(&unpacked).unwrap();
    signed(&server);
    judged(&server, &unpacked);

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
    let csv = folder.join("population.csv");
    let to = csv.to_str().unwrap();
    let done = auditor(&["audit", "report", "population", file, "--csv", to]);
    assert_eq!(done.code, 0, "{done:?}");
    let csv = fs::read_to_string(csv).unwrap();
    let mut lines = csv.lines();
    assert!(
        lines.next().unwrap().starts_with("# report population"),
        "{csv}"
    );
    let rows: Vec<&str> = lines.filter(|line| !line.starts_with('#')).collect();
    assert!(rows.len() == 2 && rows[1].contains(&first), "{csv}");
    // An older checkpoint is the beginning of it, and one of another ledger is not.
    let checkpoint = unpacked.join("checkpoint");
    let then = checkpoint.to_str().unwrap();
    let done = auditor(&["audit", "consistency", then, file, "--output", "json"]);
    assert_eq!(done.code, 0, "{done:?}");
    let size = verdict["size"].as_u64().unwrap();
    assert_eq!(done.json_document()["size"], size, "{done:?}");
    let other = folder.join("checkpoint-of-others");
    let text = fs::read_to_string(&checkpoint).unwrap();
    fs::write(&other, text.replacen(&format!("\n{size}\n"), "\n1\n", 1)).unwrap();
    let done = auditor(&["audit", "consistency", other.to_str().unwrap(), file]);
    assert_eq!(done.code, 8, "{done:?}");
    // What changed from nothing to now: the deployment runs.
    let now = size.to_string();
    let diff = |before: &str, after: &str| {
        let done = auditor(&["audit", "diff", before, after, file, "--output", "json"]);
        assert_eq!(done.code, 0, "{done:?}");
        done.json_document()
    };
    let changes = diff("0", &now);
    let of_it = |c: &Value| c["what"].as_str().unwrap().contains(&first) && c["before"].is_null();
    let listed = changes["changes"].as_array().unwrap();
    assert!(listed.iter().any(of_it), "{changes}");
    assert_eq!(diff(&now, &now)["changes"], json!([]));
    let beyond = (size + 1).to_string();
    let done = auditor(&["audit", "diff", "0", &beyond, file]);
    assert_eq!(done.code, 4, "{done:?}");
    let done = auditor(&["audit", "diff", "2", "1", file]);
    assert_eq!(done.code, 2, "{done:?}");

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

/// Somebody writes to NATS past Daybook what no entry of the tree can hold.
#[test]
fn an_event_that_is_too_large_is_named_and_folded_by_nobody() {
    let Some(binary) = NatsBinary::newest().or_else(|| NatsBinary::installed().pop()) else {
        return left_out("an event that is too large: there is no nats-server");
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let nats = runtime.block_on(NatsServer::start(&binary));
    let server = Server::start(Settings::default().env("DAYBOOK_NATS", nats.url()));
    server.ok(&["project", "create", "shop"]);
    let events = server.events();
    let is_first = |e: &&Value| e["event"]["type"] == "dev.daybook.project.created.v1";
    let created = &events.iter().find(is_first).unwrap()["event"];
    // Spaces change nothing about what it says.
    let id = created["id"].as_str().unwrap();
    let event = created.to_string().replace("shop", "huge");
    let event = event.replace(id, "5f0c6f3e-6c5e-4f0a-9d5b-2c8e0f6a7b11") + &" ".repeat(65_536);
    runtime.block_on(async {
        let client = async_nats::connect(nats.url()).await.unwrap();
        let context = async_nats::jetstream::new(client);
        let subject = "daybook.ev.huge._.project.huge";
        let published = context.publish(subject, event.into()).await.unwrap();
        published.await.unwrap();
    });
    server.ok(&["project", "create", "next"]);
    signed(&server);
    let projects = server.read("/api/v1/projects").to_string();
    assert!(projects.contains("next"), "{projects}");
    assert!(!projects.contains("huge"), "{projects}");
    // What would be appended to its subject has to expect its position, which auditors do not know
    // of: that the server's state is another one than theirs is named, too.
    let done = auditor(&server, &["audit", "verify", "--output", "json"]);
    let counts = &done.json_document()["finding_counts"];
    let wanted = json!({ "event_too_large": 1, "state_differs": 1 });
    assert_eq!(*counts, wanted, "{done:?}");
}

#[test]
fn commits_that_were_taken_away_are_missed_before_daybook_notices_and_after() {
    for watch in ["3600", "1"] {
        let server = Server::start(Settings::default().arg("--gitops-watch").arg(watch));
        let site = site("one");
        server.define("shop", "web", &site, &[]);
        server.deploy(INSTANCE, &[]);
        site.commit("Two", &[("index.html", "two")]);
        server.deploy(INSTANCE, &[]);
        let verdict = || {
            signed(&server);
            let export = server.folder().path().join("ledger.tar");
            let file = export.to_str().unwrap();
            let done = auditor(&server, &["audit", "export", "--out", file]);
            assert_eq!(done.code, 0, "{done:?}");
            auditor(&server, &["audit", "verify", file, "--output", "json"])
        };
        let before = verdict();
        assert_eq!(before.code, 0, "{before:?}");

        let repository = server.gitops("shop");
        git(&repository, &["update-ref", "refs/heads/main", "main~1"]);
        if watch == "1" {
            until("the rewrite is found", || {
                let all = server.events();
                let is = |e: &&Value| e["event"]["type"].to_string().contains("history_rewritten");
                all.iter().find(is).map(|_| ())
            });
        }
        let after = verdict();
        assert_eq!(after.code, 8, "{watch}: {after:?}");
        let document = after.json_document();
        let counts = &document["finding_counts"];
        assert_eq!(counts["commit_missing"], 1, "{watch}: {counts}");
        assert_eq!(
            counts["repository_behind"],
            Value::Null,
            "{watch}: {counts}"
        );
        let proven = document["proven"].to_string();
        assert!(!proven.contains("one to one"), "{watch}: {proven}");
    }
}

#[test]
fn keys_change_between_two_audits() {
    let mut server = Server::start(Settings::default());
    let verify = |server: &Server, more: &[&str]| {
        let args = [&["audit", "verify", "--output", "json"], more].concat();
        let done = auditor(server, &args);
        (done.code, done.json_document())
    };
    let codes = |verdict: &Value| -> Vec<String> {
        let findings = verdict["findings"].as_array().unwrap().iter();
        let codes = findings.map(|f| f["code"].as_str().unwrap().to_owned());
        codes.collect()
    };
    server.ok(&["project", "create", "one"]);
    signed(&server);
    let [first] = &keys(&server, "show")[..] else {
        panic!("a ledger begins with one key");
    };
    // The first audit believes the key by the operator's word, and keeps it with the checkpoint.
    let (code, verdict) = verify(&server, &["--key", first]);
    assert_eq!(code, 0, "{verdict}");
    let before = verdict["size"].as_u64().unwrap();

    // Both keys sign. Who only knows the old one still believes the ledger, and is told of the
    // other.
    server.stop();
    let both = keys(&server, "rotate");
    let second = both[1].as_str();
    assert_eq!((both.len(), &both[0]), (2, first));
    server.restart();
    server.ok(&["project", "create", "two"]);
    signed(&server);
    let (code, verdict) = verify(&server, &[]);
    assert_eq!((code, &verdict["trust"]), (0, &json!("kept")), "{verdict}");
    assert_eq!(
        verdict["continuity"],
        json!({"outcome": "continues", "size": before})
    );
    assert!(first.starts_with(verdict["signed_by"][0].as_str().unwrap()));
    assert!(second.starts_with(verdict["strangers"][0].as_str().unwrap()));

    // The old key is retired. Who was not told of the new one believes nothing: it came with the
    // ledger, and so could a key of anybody else.
    server.stop();
    assert_eq!(keys(&server, "retire"), both);
    server.restart();
    server.ok(&["project", "create", "three"]);
    signed(&server);
    let (code, verdict) = verify(&server, &[]);
    assert_eq!(code, 8, "{verdict}");
    assert!(
        codes(&verdict).contains(&"checkpoint_untrusted".to_owned()),
        "{verdict}"
    );
    // Who is told has an unbroken history, from the checkpoint that the old key signed.
    let (code, verdict) = verify(&server, &["--key", second]);
    assert_eq!((code, &verdict["trust"]), (0, &json!("given")), "{verdict}");
    assert_eq!(verdict["continuity"]["outcome"], "continues", "{verdict}");
    assert!(
        verdict["continuity"]["size"].as_u64() > Some(before),
        "{verdict}"
    );
    let (code, verdict) = verify(&server, &[]);
    assert_eq!((code, &verdict["trust"]), (0, &json!("kept")), "{verdict}");

    // The keys of all times are in every export, and a receipt of the old days stays good.
    let export = server.folder().path().join("ledger.tar");
    let export = export.to_str().unwrap();
    assert_eq!(
        auditor(&server, &["audit", "export", "--out", export]).code,
        0
    );
    let bytes = fs::read(export).unwrap();
    for key in &both {
        assert!(bytes.windows(key.len()).any(|w| w == key.as_bytes()));
    }

    // Another key of the same name: neither the one that the auditor has, nor the one that signed.
    let origin = first.split('+').next().unwrap();
    let foreign = server.folder().path().join("foreign");
    let foreign = foreign.to_str().unwrap();
    let made =
        Done::of(daybook().args(["keys", "generate", "--origin", origin, "--keys", foreign]));
    let (code, verdict) = verify(&server, &["--key", made.stdout.trim()]);
    assert_eq!(code, 8, "{verdict}");
    assert!(
        codes(&verdict).contains(&"checkpoint_untrusted".to_owned()),
        "{verdict}"
    );
    // The same ledger with a checkpoint that this key signed, and with its public key, is refused
    // by what the auditor kept.
    let forged = server.folder().path().join("forged");
    fs::create_dir(&forged).unwrap();
    tar::Archive::new(&bytes[..]).unpack(&forged).unwrap();
    let private = fs::read_to_string(Path::new(foreign).join("notary.key")).unwrap();
    let signer: SignerKey = private.trim().parse().unwrap();
    let note = fs::read(forged.join("checkpoint")).unwrap();
    let (checkpoint, _) = Checkpoint::parse_unverified(&note).unwrap();
    fs::write(forged.join("keys"), &made.stdout).unwrap();
    fs::write(forged.join("checkpoint"), checkpoint.sign(&[signer])).unwrap();
    let (code, verdict) = verify(&server, &[forged.to_str().unwrap()]);
    assert_eq!(code, 8, "{verdict}");
    assert!(
        codes(&verdict).contains(&"checkpoint_untrusted".to_owned()),
        "{verdict}"
    );
}
