//! The traffic of a service that runs in several clusters.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{Server, Settings, application, processes_of, until};

const INSTANCE: &str = "shop.production.web";
const HOST: &str = "web.shop.localhost";

/// Ends what a deployment runs in a cluster.
fn end(deployment: &str, cluster: &str) {
    let mark = format!("DAYBOOK_CLUSTER={cluster}");
    for pid in processes_of(deployment) {
        let environment = Path::new("/proc").join(pid.to_string()).join("environ");
        let environment = fs::read(environment).unwrap_or_default();
        if environment.split(|b| *b == 0).any(|v| v == mark.as_bytes()) {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
    }
}

/// Waits until all of many answers in a row come from this cluster.
#[track_caller]
fn served_from(server: &Server, cluster: &str) {
    until(&format!("served from {cluster}"), || {
        let mut answers = (0..20).map(|_| server.get(HOST, "/"));
        answers
            .all(|a| a.status == 200 && a.body == cluster)
            .then_some(())
    });
}

#[test]
fn the_first_cluster_of_a_failover_that_is_ready_serves_and_weights_are_kept() {
    let server = Server::start(Settings::default());
    let broken = server.folder().path().join("broken");
    let source = application("");
    let command = format!(
        "web: if [ \"$DAYBOOK_CLUSTER\" = local-b ] && [ -e {} ]; then exit 3; fi; \
         exec ./bin/app --text $DAYBOOK_CLUSTER\n",
        broken.display()
    );
    source.write("Procfile", command);
    source.commit_all("Say where");
    server.ok(&["project", "create", "shop"]);
    let mut env = vec!["env", "create", "shop", "production"];
    env.extend(["--cluster", "local-a", "--cluster", "local-b"]);
    server.ok(&env);
    server.service("shop", "web", &source, &[]);
    let id = server.deploy(INSTANCE, &[]);
    server.get_from(HOST, "/", &id);

    let policy = ["routes", "policy", INSTANCE];
    server.ok(&[&policy[..], &["failover", "local-b", "local-a"]].concat());
    served_from(&server, "local-b");
    fs::write(&broken, "").unwrap();
    end(&id, "local-b");
    served_from(&server, "local-a");
    fs::remove_file(&broken).unwrap();
    served_from(&server, "local-b");

    server.ok(&[&policy[..], &["weighted", "local-a=3", "local-b=1"]].concat());
    until("both serve", || {
        (server.get(HOST, "/").body == "local-a").then_some(())
    });
    // An instance that was starved for a moment gets nothing meanwhile.
    until("the weights are kept", || {
        let mut counted = BTreeMap::<String, u32>::new();
        for _ in 0..200 {
            *counted.entry(server.get(HOST, "/").body).or_default() += 1;
        }
        let a = counted.get("local-a").copied().unwrap_or_default();
        (145..=155).contains(&a).then_some(())
    });
    let listed = server.ok(&["routes", "list", INSTANCE]).stdout;
    assert!(listed.contains("weighted"), "{listed}");
    server.check_replay();
}
