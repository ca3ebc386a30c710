//! A service in constant use, on connections that are kept alive and by requests that take their
//! time, while its routes change all the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;

use serde_json::json;

use crate::support::{Server, Settings, application, replace_flags};

const INSTANCE: &str = "shop.production.web";
const LIVE: &str = "web.shop.localhost";

/// Clients that each keep one connection, and ask again as soon as they are answered.
struct Clients {
    done: Arc<AtomicBool>,
    answers: Arc<AtomicU32>,
    threads: Vec<JoinHandle<Vec<String>>>,
}

impl Clients {
    /// Half of them ask for what is answered at once, half for an answer of many pieces.
    fn of(server: &Server) -> Self {
        let (done, answers) = (Arc::<AtomicBool>::default(), Arc::<AtomicU32>::default());
        let threads = (0..8).map(|number| {
            let (done, answers, url) = (done.clone(), answers.clone(), server.gateway());
            std::thread::spawn(move || {
                let path = if number % 2 == 0 { "/" } else { "/stream?10" };
                let mut failed = Vec::new();
                let _ = rustls::crypto::ring::default_provider().install_default();
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .unwrap();
                let client = reqwest::Client::builder().no_proxy().build().unwrap();
                while !done.load(Ordering::Relaxed) {
                    let asked = runtime.block_on(async {
                        let request = client.get(format!("{url}{path}")).header("Host", LIVE);
                        let answer = request.send().await?;
                        let status = answer.status().as_u16();
                        Ok::<_, reqwest::Error>((status, answer.text().await?))
                    });
                    match asked {
                        Ok((200, text)) if whole(path, &text) => {}
                        other => failed.push(format!("{path}: {other:?}")),
                    }
                    answers.fetch_add(1, Ordering::Relaxed);
                }
                failed
            })
        });
        Self {
            threads: threads.collect(),
            done,
            answers,
        }
    }

    /// Waits until there were some more answers.
    fn go_on(&self) {
        let before = self.answers.load(Ordering::Relaxed);
        crate::support::until("more answers", || {
            (self.answers.load(Ordering::Relaxed) >= before + 40).then_some(())
        });
    }

    #[track_caller]
    fn were_all_served(self) {
        self.done.store(true, Ordering::Relaxed);
        let failed: Vec<_> = self
            .threads
            .into_iter()
            .map(|t| t.join().unwrap())
            .collect();
        assert_eq!(failed.concat(), Vec::<String>::new());
    }
}

/// Whether an answer is whole, and of one deployment from its beginning to its end.
fn whole(path: &str, text: &str) -> bool {
    ["one", "two"].iter().any(|version| match path {
        "/" => text == *version,
        _ => {
            let pieces = text.matches(&format!("{version}-")).count();
            pieces == 10 && text.contains(&format!("{version}-9"))
        }
    })
}

/// The tables that gateways say they have applied, in the order of the ledger, by gateway.
fn applied(server: &Server) -> std::collections::BTreeMap<String, Vec<u64>> {
    let mut tables = std::collections::BTreeMap::<String, Vec<u64>>::new();
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

#[test]
fn no_request_fails_while_routes_change_and_gateways_never_go_back() {
    let source = application("--text one");
    let mut server = Server::start(Settings::default());
    server.define("shop", "web", &source, &[]);
    let first = server.deploy(INSTANCE, &[]);
    replace_flags(&source, "--text two");
    let second = server.deploy(INSTANCE, &["--no-switch"]);

    let main = |server: &Server, id: &str| {
        let path = format!("/api/v1/deployments/{id}/mark-main");
        assert_eq!(server.post(&path, &json!({}), None).status, 200);
    };
    let split = |server: &Server, weight: u32| {
        let to = json!([
            { "deployment": first, "weight": 100 - weight },
            { "deployment": second, "weight": weight },
        ]);
        let body = json!({ "instance_id": INSTANCE, "to": to });
        let answer = server.post("/api/v1/projects/shop/routes", &body, None);
        assert_eq!(answer.status, 200, "{answer:?}");
    };
    let back = |server: &Server, id: &str| {
        let body = json!({ "instance_id": INSTANCE, "to": id });
        let answer = server.post("/api/v1/rollback", &body, None);
        assert_eq!(answer.status, 200, "{answer:?}");
    };
    let policy = |server: &Server, policy: &str| {
        let body = json!({ "instance_id": INSTANCE, "policy": policy });
        let answer = server.post("/api/v1/projects/shop/routes/policy", &body, None);
        assert_eq!(answer.status, 200, "{answer:?}");
    };
    let clients = Clients::of(&server);
    for _ in 0..4 {
        main(&server, &second);
        clients.go_on();
        split(&server, 10);
        clients.go_on();
        policy(&server, "latency");
        split(&server, 50);
        clients.go_on();
        back(&server, &first);
        policy(&server, "simple");
        clients.go_on();
    }
    main(&server, &second);
    clients.go_on();
    clients.were_all_served();
    assert_eq!(server.get_from(LIVE, "/", &second).body, "two");

    // A gateway that comes back serves the newest table from its first answer on.
    let before = applied(&server);
    server.kill();
    server.restart();
    let answer = server.get(LIVE, "/");
    assert!(answer.status != 200 || answer.body == "two", "{answer:?}");
    let clients = {
        server.get_from(LIVE, "/", &second);
        Clients::of(&server)
    };
    split(&server, 50);
    clients.go_on();
    back(&server, &first);
    clients.go_on();
    clients.were_all_served();
    assert_eq!(server.get_from(LIVE, "/", &first).body, "one");
    let after = applied(&server);
    assert!(after.values().map(Vec::len).sum::<usize>() > before.values().map(Vec::len).sum());
    for (gateway, tables) in after {
        assert!(tables.is_sorted_by(|a, b| a < b), "{gateway}: {tables:?}");
    }
    server.check_replay();
}
