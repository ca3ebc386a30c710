//! Hostnames that their owners bring along.

use std::sync::Barrier;

use serde_json::{Value, json};

use crate::support::{Server, Settings, application, replace_flags, site, until};

const INSTANCE: &str = "shop.production.web";
const WWW: &str = "www.example.com";

fn refused(server: &Server, command: &[&str]) -> String {
    let done = server.cli(&[command, &["--output", "json"]].concat());
    assert_ne!(done.code, 0, "{done:?}");
    done.error()["code"].as_str().unwrap().to_owned()
}

#[test]
fn a_hostname_of_ones_own_moves_with_the_main_deployment() {
    let source = application("--text one");
    let mut server = Server::start(Settings::default());
    server.define("shop", "web", &source, &[]);
    // It may be claimed before there is anything to lead to.
    server.ok(&["domain", "add", INSTANCE, "early.example.com"]);
    let first = server.deploy(INSTANCE, &[]);
    assert_eq!(
        server.get_from("early.example.com", "/", &first).body,
        "one"
    );
    let added = server.json(&["domain", "add", INSTANCE, "WWW.Example.com"]);
    assert_eq!(added["hostname"], WWW);
    assert_eq!(added["stickiness"], "live");
    assert_eq!(added["status"], "routed");
    assert_eq!(server.get_from(WWW, "/", &first).body, "one");

    replace_flags(&source, "--text two");
    let second = server.deploy(INSTANCE, &[]);
    assert_eq!(server.get_from(WWW, "/", &second).body, "two");
    server.ok(&["rollback", INSTANCE, "--reason", "too loud"]);
    assert_eq!(server.get_from(WWW, "/", &first).body, "one");
    // The pin holds on it, and one event moves it with all the others.
    replace_flags(&source, "--text three");
    let third = server.deploy(INSTANCE, &[]);
    assert_eq!(server.get_from(WWW, "/", &first).body, "one");
    server.ok(&["mark-main", &third]);
    assert_eq!(server.get_from(WWW, "/", &third).body, "three");
    let routes = server.read("/api/v1/projects/shop/routes");
    let switches = routes["switches"].as_array().unwrap().iter();
    let marked = switches.clone().find(|s| s["reason"] == "mark_main");
    let moved: Vec<_> = marked.unwrap()["changes"]
        .as_array()
        .unwrap()
        .iter()
        .collect();
    let moved = |name: &str| moved.iter().any(|c| c["hostname"] == name);
    assert!(moved(WWW) && moved("web.shop.localhost") && moved("early.example.com"));

    // All of it is in the ledger.
    server.kill();
    server.restart();
    for host in [WWW, "early.example.com"] {
        assert_eq!(server.get_from(host, "/", &third).body, "three");
    }
    let access = server.deployment(&third)["access"]["main"].clone();
    let told = access.as_array().unwrap().iter();
    let mut told = told.map(|url| url.as_str().unwrap());
    assert!(
        told.any(|url| url.starts_with("http://www.example.com:")),
        "{access}"
    );

    // What is Daybook's own, or no hostname, cannot be brought along.
    for (name, code) in [
        ("api.shop.localhost", "hostname_reserved"),
        ("localhost", "hostname_reserved"),
        ("*.example.com", "invalid_hostname"),
        ("127.0.0.1", "invalid_hostname"),
    ] {
        assert_eq!(refused(&server, &["domain", "add", INSTANCE, name]), code);
    }
    server.ok(&["domain", "remove", INSTANCE, WWW]);
    let routes = server.read("/api/v1/projects/shop/routes");
    assert!(!routes["routes"].to_string().contains(WWW), "{routes}");
    until("the gateway to have heard of it", || {
        (server.get(WWW, "/").status == 404).then_some(())
    });
    let remove = ["domain", "remove", INSTANCE, WWW];
    assert_eq!(refused(&server, &remove), "domain_not_found");
    let list = server.ok(&["domain", "list", "shop"]).stdout;
    assert!(
        list.contains("early.example.com") && !list.contains(WWW),
        "{list}"
    );
    server.check_replay();
}

#[test]
fn of_several_projects_that_claim_a_hostname_at_once_one_has_it() {
    let server = Server::start(Settings::default());
    let projects = ["bakery", "cafe", "deli", "eatery"];
    let sites = projects.map(site);
    for (project, source) in projects.iter().zip(&sites) {
        server.define(project, "web", source, &[]);
        server.deploy(&format!("{project}.production.web"), &[]);
    }
    let together = Barrier::new(projects.len());
    let claim = |project: &str| {
        let body = json!({ "hostname": WWW, "instance_id": format!("{project}.production.web") });
        together.wait();
        server.post(&format!("/api/v1/projects/{project}/domains"), &body, None)
    };
    let answers: Vec<_> = std::thread::scope(|scope| {
        let claims = projects.map(|project| scope.spawn(move || claim(project)));
        claims.into_iter().map(|c| c.join().unwrap()).collect()
    });
    let won: Vec<_> = (0..4).filter(|i| answers[*i].status == 202).collect();
    assert_eq!(won.len(), 1, "{answers:?}");
    for (i, answer) in answers.iter().enumerate().filter(|(i, _)| *i != won[0]) {
        assert_eq!(answer.json()["code"], "hostname_taken", "{answer:?}");
        let detail: Value = answer.json()["detail"].clone();
        let named = projects.iter().filter(|p| **p != projects[i]);
        assert!(
            named
                .into_iter()
                .all(|p| !detail.as_str().unwrap().contains(p))
        );
    }
    let owner = projects[won[0]];
    let heir = projects[(won[0] + 1) % 4];
    let instance = |project: &str| format!("{project}.production.web");
    server.ok(&["domain", "add", &instance(owner), WWW]);
    // A gateway hears a moment later of what is recorded.
    until("the hostname to lead to its owner", || {
        (server.get(WWW, "/").body == owner).then_some(())
    });
    // Given up, it is free, and leads to the next owner and nobody else.
    server.ok(&["domain", "remove", &instance(owner), WWW]);
    until("the gateway to have heard of it", || {
        (server.get(WWW, "/").status == 404).then_some(())
    });
    server.ok(&["domain", "add", &instance(heir), WWW]);
    until("the hostname to lead to its next owner", || {
        let answer = server.get(WWW, "/");
        assert_ne!(answer.body, owner);
        (answer.body == heir).then_some(())
    });
    let rejected = server.events();
    let mut kinds = rejected
        .iter()
        .map(|e| e["event"]["type"].as_str().unwrap());
    assert!(!kinds.any(|k| k.contains("routing.rejected")));
}

#[test]
fn a_hostname_is_its_services_alone_and_is_given_up_with_its_environment() {
    let server = Server::start(Settings::default());
    let (shop, bakery) = (site("shop"), site("bakery"));
    server.define("shop", "web", &shop, &[]);
    server.service("shop", "api", &shop, &[]);
    server.define("bakery", "web", &bakery, &[]);
    let env = ["env", "create", "shop", "trial", "--cluster", "local-a"];
    server.ok(&env);
    let owner = "shop.trial.web";
    let added = server.json(&["domain", "add", owner, WWW]);
    assert_eq!(added["stickiness"], "environment");
    let id = server.deploy(owner, &[]);
    assert_eq!(server.get_from(WWW, "/", &id).body, "shop");

    // Nobody else gets it, or can take it away, in whatever way it is written.
    for other in [
        "shop.production.web",
        "shop.trial.api",
        "bakery.production.web",
    ] {
        let add = ["domain", "add", other, "WWW.example.com"];
        assert_eq!(refused(&server, &add), "hostname_taken", "{other}");
    }
    let remove = ["domain", "remove", "bakery.production.web", WWW];
    assert_eq!(refused(&server, &remove), "domain_not_found");
    let remove = ["domain", "remove", "shop.trial.api", WWW];
    assert_eq!(refused(&server, &remove), "other_instance");
    let body = json!({ "hostname": "x.example.com", "instance_id": owner });
    let answer = server.post("/api/v1/projects/bakery/domains", &body, None);
    assert_eq!(answer.json()["code"], "other_project", "{answer:?}");
    let add = ["domain", "add", "shop.nowhere.web", "x.example.com"];
    assert_eq!(refused(&server, &add), "environment_not_found");
    assert_eq!(server.get(WWW, "/").body, "shop");

    // It waits for its service where that goes, and is free when its environment goes.
    server.ok(&["env", "delete", "shop", "trial", "--yes"]);
    until("the hostname to be free", || {
        let domains = server.read("/api/v1/projects/shop/domains");
        domains["domains"].as_array()?.is_empty().then_some(())
    });
    let heir = server.deploy("bakery.production.web", &[]);
    server.ok(&["domain", "add", "bakery.production.web", WWW]);
    assert_eq!(server.get_from(WWW, "/", &heir).body, "bakery");
    server.check_replay();
}
