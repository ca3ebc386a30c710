//! The address of a branch, which leads to its newest deployment.

use reqwest::Method;

use crate::support::{Server, Settings, application, replace_flags, request, until};

const INSTANCE: &str = "shop.production.web";

#[test]
fn a_branch_has_an_address_that_goes_to_its_newest_deployment() {
    let source = application("--text one");
    let server = Server::start(Settings::default());
    server.define("shop", "web", &source, &[]);
    let first = server.deploy(INSTANCE, &["--ref", "main"]);
    let main = "main.web.production.shop.localhost";
    assert_eq!(server.host_of(&first, "branch"), main);
    assert_eq!(server.get_from(main, "/", &first).body, "one");

    // All the ways to it are told.
    let access = server.deployment(&first)["access"].clone();
    for (kind, host) in [
        ("main", "web.shop.localhost"),
        ("environment", "web.production.shop.localhost"),
        ("branch", main),
        ("preview", server.host_of(&first, "deployment").as_str()),
    ] {
        let url = access[kind][0].as_str().unwrap();
        assert!(url.starts_with(&format!("http://{host}:")), "{access}");
    }
    let instances = access["instances"].as_object().unwrap();
    assert!(!instances.is_empty(), "{access}");
    for instances in instances.values() {
        let address = instances[0].as_str().unwrap();
        assert!(address.starts_with("127.0.0.1:"), "{access}");
    }
    let gateway = access["load_balancer"].as_str().unwrap();
    assert!(gateway.starts_with("http://localhost:"), "{access}");

    // Another branch has an address of its own, although its name is no label.
    source.git(&["checkout", "--quiet", "-b", "Feature/Cart"]);
    replace_flags(&source, "--text cart");
    let cart = server.deploy(INSTANCE, &["--ref", "Feature/Cart", "--no-switch"]);
    let host = server.host_of(&cart, "branch");
    assert!(host.starts_with("feature-cart-"), "{host}");
    assert_eq!(server.get_from(&host, "/", &cart).body, "cart");
    assert_eq!(server.get_from(main, "/", &first).body, "one");

    // A newer deployment takes the address, also where it does not take the traffic.
    source.git(&["checkout", "--quiet", "main"]);
    let commit = replace_flags(&source, "--text two");
    let second = server.deploy(INSTANCE, &["--ref", "main", "--no-switch"]);
    assert_eq!(server.get_from(main, "/", &second).body, "two");
    assert_eq!(
        server.get_from("web.shop.localhost", "/", &first).body,
        "one"
    );
    // What names a commit is of no branch.
    replace_flags(&source, "--text three");
    let pinned = server.deploy(INSTANCE, &["--ref", &commit, "--no-switch"]);
    assert_eq!(server.get_from(main, "/", &second).body, "two");
    let own = server.deployment(&pinned)["hostnames"].clone();
    assert_eq!(own.as_array().unwrap().len(), 1, "{own}");

    // When that one goes, the one before has the address again, and gives it back.
    server.ok(&["stop", &second]);
    assert_eq!(server.get_from(main, "/", &first).body, "one");
    server.ok(&["start", &second]);
    assert_eq!(server.get_from(main, "/", &second).body, "two");
    server.ok(&["stop", &second]);
    server.ok(&["terminate", &second]);
    assert_eq!(server.get_from(main, "/", &first).body, "one");
    server.check_replay();
}

/// The address at which other services on the machine ask for a service: no name to be resolved,
/// no `Host` to be set.
#[test]
fn a_service_is_asked_by_others_at_an_address_that_follows_its_main_deployment() {
    if std::net::TcpListener::bind(("127.83.12.7", 0)).is_err() {
        return daybook_testkit::left_out("this system has but one loopback address");
    }
    let source = application("--text one");
    let mut server = Server::start(Settings::default());
    server.define("shop", "web", &source, &[]);
    let first = server.deploy(INSTANCE, &[]);
    let address = |server: &Server, id: &str| {
        let internal = server.deployment(id)["access"]["internal"].clone();
        internal.as_str().map(str::to_owned)
    };
    let ask = |url: &str, by: &str| {
        until(&format!("{url} answered by {by}"), || {
            let answer = request(Method::GET, url, &[], None).ok()?;
            (answer.status == 200 && answer.by() == Some(by)).then_some(answer.body)
        })
    };
    let internal = address(&server, &first).unwrap();
    assert_eq!(ask(&internal, &first), "one");
    let told = server.ok(&["status", &first]).stdout;
    assert!(told.contains(&internal), "{told}");

    replace_flags(&source, "--text two");
    let second = server.deploy(INSTANCE, &["--no-switch"]);
    assert_eq!(address(&server, &second), None);
    server.ok(&["mark-main", &second]);
    assert_eq!(ask(&internal, &second), "two");
    assert_eq!(address(&server, &second), Some(internal.clone()));
    assert_eq!(address(&server, &first), None);
    // It is the same after a restart, on the same port.
    let gateway = server.gateway().trim_start_matches("http://").to_owned();
    server.kill();
    server.restart_with(&["--listen", "127.0.0.1:0", "--gateway", &gateway]);
    assert_eq!(ask(&internal, &second), "two");
}
