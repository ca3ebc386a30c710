//! Several requests for one service instance at once.

use crate::support::{Done, Server, Settings, application, replace_flags, until};

const INSTANCE: &str = "shop.production.web";

#[test]
fn of_those_that_wait_only_the_newest_is_deployed() {
    let server = Server::start(Settings::default());
    let source = application("--text one");
    // The first one is not ready before the others have asked.
    let go = server.folder().path().join("go");
    let procfile = format!(
        "web: while [ ! -e {} ]; do sleep 0.05; done; exec ./bin/app --text one\n",
        go.display()
    );
    source.commit("Wait", &[("Procfile", &procfile)]);
    server.define("shop", "web", &source, &[]);
    let running = server.begin(INSTANCE, &[]);
    server.wait_for(&running, "deploying");
    replace_flags(&source, "--text two");
    // It is followed until it is superseded, and the exit code says so.
    let mut command = server.command(&["deploy", INSTANCE, "--output", "json"]);
    let followed = std::thread::spawn(move || Done::of(&mut command));
    until("the second request", || {
        let list = server.read("/api/v1/deployments");
        (list["deployments"].as_array()?.len() == 2).then_some(())
    });
    replace_flags(&source, "--text three");
    let newest = server.begin(INSTANCE, &[]);
    let done = followed.join().unwrap();
    std::fs::write(&go, "").unwrap();
    assert_eq!(done.code, 7, "{done:?}");
    let detail = done.json();
    assert_eq!(detail["state"], "cancelled");
    assert_eq!(detail["cancelled"]["superseded_by"], newest.as_str());
    let superseded = detail["id"].as_str().unwrap();
    assert!(server.wait_until_cancelled(superseded).contains(&newest));
    server.wait_for(&running, "started");
    server.wait_for(&newest, "started");
    assert_eq!(
        server.get_from("web.shop.localhost", "/", &newest).body,
        "three"
    );
    server.check_replay();
}

#[test]
fn many_services_are_deployed_at_once() {
    let server = Server::start(Settings::default());
    let source = application("--text many");
    server.define("shop", "s0", &source, &[]);
    let mut ids = vec![server.begin("shop.production.s0", &[])];
    for n in 1..5 {
        let name = format!("s{n}");
        server.service("shop", &name, &source, &[]);
        ids.push(server.begin(&format!("shop.production.{name}"), &[]));
    }
    for (n, id) in ids.iter().enumerate() {
        server.wait_for(id, "started");
        let host = format!("s{n}.shop.localhost");
        assert_eq!(server.get_from(&host, "/", id).body, "many");
    }
    server.check_replay();
}

#[test]
fn requests_at_the_same_moment_all_end_and_one_of_them_serves() {
    let server = Server::start(Settings::default());
    let source = application("--text together");
    server.define("shop", "web", &source, &[]);
    let ids: Vec<_> = std::thread::scope(|scope| {
        let requests: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| server.begin(INSTANCE, &[])))
            .collect();
        requests.into_iter().map(|r| r.join().unwrap()).collect()
    });
    let mut started = Vec::new();
    for id in &ids {
        let state = until(&format!("{id} at an end"), || {
            let state = server.deployment(id)["state"].as_str()?.to_owned();
            ["started", "cancelled", "failed"]
                .contains(&state.as_str())
                .then_some(state)
        });
        if state == "started" {
            started.push(id.as_str());
        } else {
            assert!(server.wait_until_cancelled(id).starts_with("superseded by"));
        }
    }
    // Exactly one of those that started has the traffic.
    let main = until("a main deployment that answers", || {
        let answer = server.get("web.shop.localhost", "/");
        answer.by().map(str::to_owned)
    });
    assert!(started.contains(&main.as_str()), "{main} of {started:?}");
    let active = started
        .iter()
        .filter(|id| server.history(id)["active"] == true);
    assert_eq!(active.count(), 1);
    server.check_replay();
}
