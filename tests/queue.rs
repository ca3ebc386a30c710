//! More is asked for than can be built at once: production goes first, and whoever waits is told why.

use serde_json::{Value, json};

use crate::support::{Server, Settings, application, until};

/// The position of an event of a deployment.
fn position(events: &[Value], kind: &str, id: &str) -> u64 {
    let found = events.iter().find(|line| {
        let event = &line["event"];
        let subject = event["subject"].as_str().unwrap();
        event["type"] == format!("dev.daybook.{kind}") && subject.ends_with(id)
    });
    let found = found.unwrap_or_else(|| panic!("no {kind} of {id}"));
    found["position"].as_u64().unwrap()
}

#[test]
fn production_is_built_first_and_status_says_why_a_deployment_waits() {
    let server = Server::start(Settings::default().arg("--builds").arg("1"));
    let go = server.folder().path().join("go");
    let command = format!("while [ ! -e {} ]; do sleep 0.05; done", go.display());
    let spec = server.folder().path().join("service.json");
    let build = json!({ "build": { "command": ["/bin/sh", "-c", command] } });
    std::fs::write(&spec, build.to_string()).unwrap();
    let flags = ["--file", spec.to_str().unwrap()];
    let source = application("--text one");
    server.define("shop", "web", &source, &flags);
    server.ok(&["env", "create", "shop", "staging", "--cluster", "local-a"]);

    // One is built, a few are admitted after it, and the others wait.
    let mut staging = Vec::new();
    for number in 0..6 {
        let service = format!("s{number}");
        server.service("shop", &service, &source, &flags);
        let id = server.begin(&format!("shop.staging.{service}"), &[]);
        if number == 0 {
            server.wait_for(&id, "building");
        }
        staging.push(id);
    }
    let admitted = |ids: &[String]| {
        let states = ids.iter().map(|id| server.deployment(id)["state"].clone());
        states.filter(|s| *s != "requested").count()
    };
    until("as many are admitted as are built next", || {
        (admitted(&staging) == 4).then_some(())
    });
    let status = |id: &str| server.ok(&["status", id]).stdout;
    assert!(
        status(&staging[4]).contains("1 of 2: it is built next, as soon as a build worker is free"),
        "{}",
        status(&staging[4])
    );
    let behind = "2 of 2: all build workers are busy, and another deployment goes first";
    assert!(
        status(&staging[5]).contains(behind),
        "{}",
        status(&staging[5])
    );

    // Whoever comes from production later stands before both.
    let production = server.begin("shop.production.web", &[]);
    let before = server.deployment(&production);
    assert_eq!(before["queue"]["position"], 1, "{before}");
    let behind = "2 of 3: all build workers are busy, and another deployment goes first, to \
                  production, although asked for later";
    assert!(
        status(&staging[4]).contains(behind),
        "{}",
        status(&staging[4])
    );

    // One that waits for an earlier one of its own service.
    let second = server.begin("shop.staging.s0", &[]);
    let short = &staging[0][staging[0].len() - 8..];
    let reason = format!("deployment {short} of its service is building; it goes next");
    assert!(status(&second).contains(&reason), "{}", status(&second));

    std::fs::write(&go, "").unwrap();
    for id in staging.iter().chain([&production, &second]) {
        let detail = server.wait_for(id, "started");
        assert!(detail.get("queue").is_none(), "{detail}");
    }
    let events = server.events();
    let queued = |id: &str| position(&events, "deployment.queued.v1", id);
    assert!(queued(&production) < queued(&staging[4]));
    let overtaken = server.deployment(&staging[4]);
    assert_eq!(overtaken["overtaken_by"], json!([production]));
    assert!(status(&staging[4]).contains(&format!("overtaken  by {production}")));
    for id in [&staging[0], &staging[5], &production] {
        assert_eq!(server.deployment(id)["overtaken_by"], json!([]));
    }
    server.check_replay();
}
