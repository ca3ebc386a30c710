//! A service in constant use, on connections that are kept alive and by requests that take their
//! time, while its routes change all the time.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::support::{
    Connection, Expected, Load, Server, Settings, application, replace_flags, until,
};

const INSTANCE: &str = "shop.production.web";
const LIVE: &str = "web.shop.localhost";
const ENVIRONMENT: &str = "web.production.shop.localhost";
const WWW: &str = "www.example.com";
const MORE: &str = "more.example.com";
const HOSTS: [&str; 3] = [LIVE, ENVIRONMENT, WWW];

/// The tables that gateways say they have applied, in the order of the ledger, by gateway.
fn applied(server: &Server) -> BTreeMap<String, Vec<u64>> {
    let mut tables = BTreeMap::<String, Vec<u64>>::new();
    for entry in server.events() {
        let event = &entry["event"];
        if event["type"].as_str().unwrap().contains("routing.applied") {
            let gateway = event["data"]["gateway"].as_str().unwrap().to_owned();
            let table = event["data"]["table"].as_u64().unwrap();
            tables.entry(gateway).or_default().push(table);
        }
    }
    tables
}

/// Waits until a gateway has applied the newest table.
fn served(server: &Server) {
    until("the newest table to be applied", || {
        let routes = server.read("/api/v1/projects/shop/routes");
        let mut gateways = routes["gateways"].as_object()?.values();
        gateways
            .any(|applied| *applied == routes["table"])
            .then_some(())
    });
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

/// A request that an instance has begun to answer, and does not end before it is told to.
struct Held {
    connection: Connection,
    by: String,
    text: String,
}

impl Held {
    fn on(server: &Server, host: &str) -> Self {
        let mut connection = Connection::open(&server.gateway());
        let answer = connection.begin(host, "/hold").unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
        Self {
            by: answer.by().unwrap().to_owned(),
            text: connection.part().unwrap().unwrap(),
            connection,
        }
    }

    /// Has it answered to its end. The deployment that began it must do so.
    fn ends(mut self, server: &Server) {
        let own = server.host_of(&self.by, "deployment");
        assert_eq!(server.get(&own, "/release").status, 200);
        while let Some(part) = self.connection.part().unwrap() {
            self.text += &part;
        }
        let (first, _) = self.text.split_once(' ').unwrap();
        assert_eq!(self.text, format!("{first} holds\n{first} ends\n"));
        // The connection is as good as new.
        assert_eq!(self.connection.get(LIVE, "/").unwrap().status, 200);
    }
}

/// Two deployments of a service in constant use, and whatever changes where its traffic goes.
struct Switches<'a> {
    server: &'a Server,
    load: &'a Load,
    /// One connection, which asks once after each switch.
    visitor: Connection,
    first: &'a str,
    second: &'a str,
}

impl Switches<'_> {
    /// Does something that changes the routes, while requests are under way at all addresses.
    /// What it comes to holds for every request, from the moment on in which a gateway says that
    /// it is there.
    fn then(&mut self, during: Expected, after: Expected, change: impl FnOnce(&Server)) {
        let held = HOSTS.map(|host| Held::on(self.server, host));
        self.load.expect(during);
        change(self.server);
        served(self.server);
        self.load.expect(after.clone());
        for host in HOSTS {
            let answer = self.visitor.get(host, "/").unwrap();
            let by = answer.by().unwrap();
            assert!(
                after.allows(None, by),
                "{host}: {answer:?} is not {after:?}"
            );
        }
        held.into_iter().for_each(|held| held.ends(self.server));
        self.load.go_on();
    }

    fn shared(&self) -> Expected {
        Expected::Shared(self.first.to_owned(), self.second.to_owned())
    }

    fn post(&mut self, during: Expected, after: Expected, path: &str, body: Value) {
        self.then(during, after, |server| {
            let answer = server.post(path, &body, None);
            assert_eq!(answer.status, 200, "{answer:?}");
        });
    }

    fn main(&mut self, from: &str, to: &str) {
        let path = format!("/api/v1/deployments/{to}/mark-main");
        let during = Expected::Switch(from.to_owned(), to.to_owned());
        self.post(during, Expected::only(to), &path, json!({}));
    }

    fn back(&mut self, during: Expected, to: &str) {
        let body = json!({ "instance_id": INSTANCE, "to": to });
        self.post(during, Expected::only(to), "/api/v1/rollback", body);
    }

    fn split(&mut self, weight: u32) {
        let to = json!([
            { "deployment": self.first, "weight": 100 - weight },
            { "deployment": self.second, "weight": weight },
        ]);
        let body = json!({ "instance_id": INSTANCE, "to": to });
        let path = "/api/v1/projects/shop/routes";
        self.post(self.shared(), self.shared(), path, body);
    }

    fn policy(&mut self, expected: Expected, policy: &str) {
        let body = json!({ "instance_id": INSTANCE, "policy": policy });
        let path = "/api/v1/projects/shop/routes/policy";
        self.post(expected.clone(), expected, path, body);
    }

    /// Brings a hostname along, and gives it up while a request to it is under way.
    fn domain(&mut self, id: &str) {
        let same = || (Expected::only(id), Expected::only(id));
        let (during, after) = same();
        self.then(during, after, |server| {
            server.ok(&["domain", "add", INSTANCE, MORE]);
        });
        assert_eq!(self.visitor.get(MORE, "/").unwrap().by(), Some(id));
        let held = Held::on(self.server, MORE);
        let (during, after) = same();
        self.then(during, after, |server| {
            server.ok(&["domain", "remove", INSTANCE, MORE]);
        });
        assert_eq!(self.visitor.get(MORE, "/").unwrap().status, 404);
        held.ends(self.server);
    }

    /// Every way of changing routes, from the first and back to it.
    fn round(&mut self) {
        let (first, second) = (self.first, self.second);
        self.main(first, second);
        self.main(second, first);
        self.main(first, second);
        self.split(10);
        self.policy(self.shared(), "latency");
        self.split(50);
        self.back(self.shared(), first);
        self.policy(Expected::only(first), "simple");
        self.domain(first);
        self.main(first, second);
        self.back(Expected::Switch(second.to_owned(), first.to_owned()), first);
    }
}

#[test]
fn no_request_fails_while_routes_change_and_gateways_never_go_back() {
    let source = application("--text one");
    let mut server = Server::start(Settings::default());
    server.define("shop", "web", &source, &[]);
    let first = server.deploy(INSTANCE, &[]);
    replace_flags(&source, "--text two");
    let second = server.deploy(INSTANCE, &["--no-switch"]);
    server.ok(&["domain", "add", INSTANCE, WWW]);
    served(&server);

    let load = Load::on(&server, &HOSTS, Expected::only(&first));
    load.go_on();
    let mut switches = Switches {
        server: &server,
        load: &load,
        visitor: Connection::open(&server.gateway()),
        first: &first,
        second: &second,
    };
    for _ in 0..4 {
        switches.round();
    }
    switches.main(&first, &second);
    let requests = load.was_always_served();
    let routes = server.read("/api/v1/projects/shop/routes");
    println!("{requests} requests over {} tables", routes["table"]);

    // A gateway that comes back serves the newest table from its first answer on.
    let before = applied(&server);
    server.kill();
    server.restart();
    for host in HOSTS {
        let answer = server.get(host, "/");
        assert!(answer.status != 200 || answer.body == "two", "{answer:?}");
    }
    for host in HOSTS {
        assert_eq!(server.get_from(host, "/", &second).body, "two");
    }
    // Only what is known to be ready again can be gone back to.
    until("the first one is ready", || {
        let detail = server.deployment(&first);
        let clusters = detail["cluster_status"].as_array()?;
        clusters.iter().all(|c| c["ready"] == true).then_some(())
    });
    let load = Load::on(&server, &HOSTS, Expected::only(&second));
    let mut switches = Switches {
        server: &server,
        load: &load,
        visitor: Connection::open(&server.gateway()),
        first: &first,
        second: &second,
    };
    let back = Expected::Switch(second.clone(), first.clone());
    switches.back(back, &first);
    switches.round();
    load.was_always_served();

    let routes = server.read("/api/v1/projects/shop/routes");
    let newest = routes["table"].as_u64();
    let after = applied(&server);
    let count = |tables: &BTreeMap<String, Vec<u64>>| tables.values().map(Vec::len).sum::<usize>();
    assert!(count(&after) > count(&before));
    for (gateway, tables) in after {
        assert!(tables.is_sorted_by(|a, b| a < b), "{gateway}: {tables:?}");
        assert_eq!(tables.last().copied(), newest, "{gateway}");
    }
    let rejected = server.events().into_iter();
    let mut kinds = rejected.map(|e| text(&e["event"]["type"]));
    assert!(!kinds.any(|k| k.contains("routing.rejected")));
    server.check_replay();
}
