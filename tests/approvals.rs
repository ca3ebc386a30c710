//! Environments that ask for approvals: what is deployed to them waits until people have allowed it.

use daybook_testkit::git::{SourceRepository, git};
use serde_json::Value;

use crate::support::{Done, Server, Settings, application, replace_flags, until};

const INSTANCE: &str = "shop.production.web";
const HOST: &str = "web.shop.localhost";

/// A service whose environment asks for so many approvals.
fn start(rules: &[&str]) -> (Server, SourceRepository) {
    let server = Server::start(Settings::default());
    let source = application("--text one");
    server.ok(&["project", "create", "shop"]);
    let mut env = vec![
        "env",
        "create",
        "shop",
        "production",
        "--cluster",
        "local-a",
    ];
    env.extend(rules);
    server.ok(&env);
    server.service("shop", "web", &source, &[]);
    (server, source)
}

fn by(server: &Server, who: &str, args: &[&str]) -> Done {
    let mut all = vec!["approvals"];
    all.extend(args);
    all.extend(["--actor", who, "--output", "json"]);
    server.cli(&all)
}

#[track_caller]
fn allowed(done: &Done) {
    assert_eq!(done.code, 0, "{done:?}");
}

#[track_caller]
fn refused(done: &Done, code: &str) {
    assert_eq!(done.error()["code"], code, "{done:?}");
}

fn approval(server: &Server, id: &str) -> Value {
    server.read(&format!("/api/v1/deployments/{id}/approval"))
}

fn count(server: &Server, id: &str, kind: &str) -> usize {
    let kind = format!("deployment.{kind}.v1");
    server.kinds(id).iter().filter(|k| **k == kind).count()
}

#[test]
fn two_of_three_allow_exactly_one_plan() {
    let (mut server, source) = start(&[
        "--approvals",
        "2",
        "--approver",
        "bob",
        "--approver",
        "carol",
        "--approver",
        "tester",
    ]);
    let first = server.begin(INSTANCE, &[]);
    server.wait_for(&first, "awaiting_approval");
    assert!(
        server
            .kinds(&first)
            .contains(&"deployment.image_pinned.v1".to_owned())
    );
    assert_eq!(count(&server, &first, "deploying_started"), 0);
    let told = server.ok(&["status"]).stdout;
    assert!(told.contains("waits for approvals, 0 of 2"), "{told}");
    let listed = server.json(&["approvals", "list"]);
    assert_eq!(listed["approvals"][0]["id"], first.as_str());
    let plan = approval(&server, &first);
    let detail = server.deployment(&first);
    assert_eq!(plan["plan"]["source"], detail["source"]["commit"]);
    assert_eq!(plan["plan"]["image"], detail["image"]);
    assert_eq!(plan["requester"], "tester");
    assert!(plan["plan"]["routes"][HOST].is_array(), "{plan}");
    let shown = server.ok(&["approvals", "show", &first]).stdout;
    assert!(shown.contains(plan["hash"].as_str().unwrap()), "{shown}");

    // Not by who asked for it, nor by anybody else, nor for another plan, nor twice by one.
    refused(&by(&server, "tester", &["approve", &first]), "own_change");
    refused(
        &by(&server, "mallory", &["approve", &first]),
        "not_an_approver",
    );
    let other = format!("sha256:{}", "0".repeat(64));
    refused(
        &by(&server, "bob", &["approve", &first, "--plan", &other]),
        "plan_changed",
    );
    refused(&by(&server, "bob", &["review", &first]), "no_review_open");
    allowed(&by(&server, "bob", &["approve", &first]));
    allowed(&by(&server, "bob", &["approve", &first]));
    assert_eq!(count(&server, &first, "approval_granted"), 1);
    assert_eq!(server.deployment(&first)["state"], "awaiting_approval");

    // It waits also through a crash.
    server.kill();
    server.restart();
    assert_eq!(approval(&server, &first)["grants"][0]["approver"], "bob");
    allowed(&by(
        &server,
        "carol",
        &["approve", &first, "--reason", "as discussed"],
    ));
    server.wait_for(&first, "started");
    server.get_from(HOST, "/", &first);
    assert_eq!(count(&server, &first, "approved"), 1);

    // The next plan says what becomes different. When something else does, what was granted is void.
    replace_flags(&source, "--text two");
    server.service("shop", "web", &source, &["--replicas", "2"]);
    let second = server.begin(INSTANCE, &[]);
    server.wait_for(&second, "awaiting_approval");
    let plan = approval(&server, &second);
    let replicas = &plan["plan"]["values"]["run.replicas"];
    assert_eq!(
        (&replicas["before"], &replicas["after"]),
        (&"1".into(), &"2".into())
    );
    assert_eq!(plan["plan"]["main"], first.as_str());
    allowed(&by(&server, "bob", &["approve", &second]));
    server.ok(&[
        "env",
        "set",
        "shop",
        "production",
        "--approvals",
        "1",
        "--approver",
        "carol",
    ]);
    let changed = until("the plan is another one", || {
        let now = approval(&server, &second);
        (now["hash"] != plan["hash"]).then_some(now)
    });
    assert_eq!(changed["grants"], Value::Array(vec![]));
    assert_eq!(count(&server, &second, "approvals_voided"), 1);
    let old = plan["hash"].as_str().unwrap();
    refused(
        &by(&server, "carol", &["approve", &second, "--plan", old]),
        "plan_changed",
    );
    allowed(&by(&server, "carol", &["approve", &second]));
    server.wait_for(&second, "started");
    server.get_from(HOST, "/", &second);

    // A way back is always open.
    server.ok(&["rollback", INSTANCE]);
    server.get_from(HOST, "/", &first);
    server.check_replay();
}

#[test]
fn what_is_rejected_expires_or_is_cancelled_ends_and_an_emergency_is_reviewed() {
    let (server, _source) = start(&[]);
    server.deploy(INSTANCE, &[]);
    server.ok(&[
        "env",
        "set",
        "shop",
        "production",
        "--approvals",
        "1",
        "--approval-expires",
        "1h",
    ]);
    let rejected = server.begin(INSTANCE, &[]);
    server.wait_for(&rejected, "awaiting_approval");
    refused(
        &by(&server, "bob", &["reject", &rejected]),
        "reason_required",
    );
    allowed(&by(
        &server,
        "bob",
        &["reject", &rejected, "--reason", "not before the sale"],
    ));
    let code = server.wait_for_failure(&rejected);
    assert_eq!(code, "approval_rejected");
    let told = server.ok(&["status", &rejected]).stdout;
    assert!(
        told.contains("bob rejected it: not before the sale"),
        "{told}"
    );

    let cancelled = server.begin(INSTANCE, &[]);
    server.wait_for(&cancelled, "awaiting_approval");
    server.ok(&["cancel", &cancelled]);
    server.wait_until_cancelled(&cancelled);

    let urgent = server.begin(INSTANCE, &[]);
    server.wait_for(&urgent, "awaiting_approval");
    refused(
        &by(&server, "tester", &["override", &urgent]),
        "reason_required",
    );
    allowed(&by(
        &server,
        "tester",
        &["override", &urgent, "--reason", "the shop is down"],
    ));
    server.wait_for(&urgent, "started");
    server.get_from(HOST, "/", &urgent);
    let told = server.ok(&["status"]).stdout;
    assert!(told.contains("tester went ahead with"), "{told}");
    assert_eq!(
        server.json(&["approvals", "list"])["approvals"][0]["to_review"],
        true
    );
    refused(&by(&server, "tester", &["review", &urgent]), "own_change");
    allowed(&by(
        &server,
        "bob",
        &["review", &urgent, "--reason", "it was one"],
    ));
    let listed = server.json(&["approvals", "list"]);
    assert_eq!(listed["approvals"], Value::Array(vec![]));

    server.ok(&[
        "env",
        "set",
        "shop",
        "production",
        "--approvals",
        "1",
        "--approval-expires",
        "1s",
    ]);
    let late = server.begin(INSTANCE, &[]);
    let code = server.wait_for_failure(&late);
    assert_eq!(code, "approval_expired");

    server.ok(&["env", "set", "shop", "production", "--approvals", "0"]);
    server.deploy(INSTANCE, &[]);
    let bad = server.cli(&[
        "env",
        "set",
        "shop",
        "production",
        "--approvals",
        "2",
        "--approver",
        "bob",
        "--output",
        "json",
    ]);
    refused(&bad, "invalid_approval_rule");
    server.check_replay();
}

/// Adds a line to the environment's values, as somebody does who has a clone.
fn by_hand(server: &Server) {
    let clone = tempfile::tempdir().unwrap();
    let repository = server.gitops("shop");
    let url = repository.to_str().unwrap();
    git(clone.path(), &["clone", "--quiet", url, "."]);
    let file = clone.path().join("environments/production/values.yaml");
    let values = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{values}# by hand\n")).unwrap();
    git(clone.path(), &["commit", "--quiet", "-am", "By hand"]);
    git(clone.path(), &["push", "--quiet", "origin", "HEAD:main"]);
}

#[test]
fn whatever_changes_the_plan_voids_what_was_granted() {
    let server = Server::start(Settings::default().arg("--gitops-watch").arg("1"));
    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    server.deploy(INSTANCE, &[]);
    replace_flags(&source, "--text two");
    let beside = server.deploy(INSTANCE, &["--no-switch"]);
    server.ok(&["env", "set", "shop", "production", "--approvals", "2"]);
    let waits = server.begin(INSTANCE, &["--no-switch", "--replicas", "2"]);
    server.wait_for(&waits, "awaiting_approval");
    // Also where the traffic does not follow by itself: somebody may move it later.
    let plan = approval(&server, &waits);
    assert!(plan["plan"]["routes"][HOST].is_array(), "{plan}");
    assert_eq!(plan["plan"]["values"]["run.replicas"]["after"], "2");

    let voids = |what: &str, change: &dyn Fn()| {
        let before = count(&server, &waits, "approvals_voided");
        allowed(&by(&server, "bob", &["approve", &waits]));
        let plan = approval(&server, &waits);
        assert_eq!(plan["grants"][0]["approver"], "bob", "{what}");
        change();
        let now = until(what, || {
            let now = approval(&server, &waits);
            (now["hash"] != plan["hash"]).then_some(now)
        });
        assert_eq!(now["grants"], Value::Array(vec![]), "{what}");
        assert!(
            count(&server, &waits, "approvals_voided") > before,
            "{what}"
        );
        assert_eq!(server.deployment(&waits)["state"], "awaiting_approval");
    };
    voids("a commit by hand in the GitOps repository", &|| {
        by_hand(&server)
    });
    voids("another main deployment", &|| {
        server.ok(&["mark-main", &beside]);
    });
    voids("another hostname", &|| {
        server.ok(&["domain", "add", INSTANCE, "www.example.com"]);
    });

    // What is not deployed cannot be allowed.
    let scale = ["scale", INSTANCE, "--replicas", "2", "--output", "json"];
    let done = server.cli(&scale);
    assert_eq!(done.code, 5, "{done:?}");
    refused(&done, "approval_required");
    // Two of them for one and the same plan.
    allowed(&by(&server, "Bob", &["approve", &waits]));
    allowed(&by(&server, "bob", &["approve", &waits]));
    assert_eq!(server.deployment(&waits)["state"], "awaiting_approval");
    allowed(&by(&server, "carol", &["approve", &waits]));
    server.wait_for(&waits, "started");
    server.check_replay();
}
