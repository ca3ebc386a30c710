//! A deployment is cancelled in each of its phases: it ends as cancelled, and nothing is left.

use serde_json::json;

use crate::support::{Server, Settings, Visitor, application, processes_in, replace_flags, until};

const INSTANCE: &str = "shop.production.web";
const HOST: &str = "web.shop.localhost";

fn cancel(server: &Server, id: &str) {
    let done = server.ok(&["cancel", id, "--reason", "a change of mind"]);
    assert!(done.stdout.contains("a change of mind"), "{done:?}");
    assert_eq!(
        server.wait_until_cancelled(id),
        "cancelled: a change of mind"
    );
    // Once more changes nothing.
    let own = || -> Vec<String> {
        // What its build says of its own end comes when it comes.
        let kinds = server.kinds(id).into_iter();
        kinds.filter(|k| k.starts_with("deployment.")).collect()
    };
    let events = own();
    server.ok(&["cancel", id]);
    assert_eq!(own(), events);
}

#[test]
fn a_deployment_is_cancelled_while_it_waits_is_built_and_starts() {
    let server = Server::start(Settings::default());
    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    let first = server.deploy(INSTANCE, &[]);
    server.get_from(HOST, "/", &first);
    let visitor = Visitor::of(&server, HOST, "one");

    // While it starts, and another one waits behind it.
    replace_flags(&source, "--text two --slow-start 600000");
    let starting = server.begin(INSTANCE, &[]);
    server.wait_for(&starting, "deploying");
    let waiting = server.begin(INSTANCE, &[]);
    cancel(&server, &waiting);
    assert_eq!(server.deployment(&starting)["state"], "deploying");
    cancel(&server, &starting);

    // While its build runs.
    let spec = server.folder().path().join("service.json");
    let command =
        json!({ "build": { "command": ["/bin/sh", "-c", "echo begun; exec sleep 600"] } });
    std::fs::write(&spec, command.to_string()).unwrap();
    server.service("shop", "web", &source, &["--file", spec.to_str().unwrap()]);
    let building = server.begin(INSTANCE, &[]);
    let scratch = server.folder().data().join("scratch");
    until("the build command runs", || {
        (!processes_in(&scratch).is_empty()).then_some(())
    });
    cancel(&server, &building);
    until("the build command ended", || {
        processes_in(&scratch).is_empty().then_some(())
    });
    until("the build is recorded as cancelled", || {
        let events = server.events();
        let cancelled = events
            .iter()
            .any(|e| e["event"]["type"] == "dev.daybook.build.cancelled.v1");
        cancelled.then_some(())
    });

    // After all of it the next one goes through.
    assert_eq!(server.get(HOST, "/").by(), Some(first.as_str()));
    replace_flags(&source, "--text one --print 2");
    server.service("shop", "web", &source, &[]);
    let last = server.deploy(INSTANCE, &[]);
    server.get_from(HOST, "/", &last);
    visitor.was_always_served();
    // What is live is not cancelled.
    assert_eq!(server.cli(&["cancel", &last]).code, 5);
    server.check_replay();
}
