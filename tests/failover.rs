//! Daybook's own gateway over two Kubernetes clusters: two real API servers, whose kubelets are
//! played, and pods that answer on this machine.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;

use daybook_testkit::kubernetes::{ControlPlane, Fate};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, ListParams};
use serde_json::Value;

use crate::kubernetes::{Cluster, Stage};
use crate::records::both;
use crate::support::{Server, application, until};

const PROJECT: &str = "over";
const INSTANCE: &str = "over.production.web";
const HOST: &str = "web.over.localhost";

/// Where pods of the other cluster answer; the port is that of the service.
const THERE: &str = "127.0.0.2";

/// Answers every request there with the same words, for as long as the tests run.
fn answer_there(port: u16, says: &'static str) {
    let listener = TcpListener::bind((THERE, port)).expect("nobody else is there");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            std::thread::spawn(move || {
                // What is asked for fits into one packet.
                if stream.read(&mut [0; 8192]).unwrap_or(0) == 0 {
                    return;
                }
                let length = says.len();
                let _ = write!(
                    stream,
                    "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{says}"
                );
            });
        }
    });
}

fn ready(ip: &str) -> Fate {
    Fate::Ready { ip: ip.to_owned() }
}

/// Takes all pods of the project away, so that new ones come.
fn remove_pods(cluster: &Cluster) {
    cluster.runtime.block_on(async {
        let client = cluster.plane.client().await;
        let pods: Api<Pod> = Api::namespaced(client, "over--production");
        let (params, all) = (DeleteParams::default(), ListParams::default());
        pods.delete_collection(&params, &all).await.unwrap();
    });
}

fn state(detail: &Value, cluster: &str) -> String {
    let clusters = detail["cluster_status"].as_array().unwrap();
    let found = clusters.iter().find(|c| c["cluster"] == cluster).unwrap();
    found["state"].as_str().unwrap().to_owned()
}

#[test]
fn traffic_goes_to_the_next_cluster_and_back_and_a_partial_success_becomes_whole() {
    let Some(stage) = Stage::start(PROJECT) else {
        return;
    };
    let Some(plane) = ControlPlane::start() else {
        return;
    };
    let bergen = Cluster::on(Box::leak(Box::new(plane)), PROJECT);
    let next = |fate| *bergen.fate.lock().unwrap() = fate;
    next(ready(THERE));
    answer_there(stage.app.addr.port(), "from-bergen");
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = folder.path().join("kubeconfig");
    std::fs::write(&kubeconfig, both(&stage.cluster, &bergen).to_string()).unwrap();
    let settings = stage.settings_with(&kubeconfig);
    let server = Server::start(settings.arg("--kubernetes").arg("bergen"));
    server.ok(&["project", "create", PROJECT]);
    let env = ["env", "create", PROJECT, "production", "--live"];
    server.ok(&[&env[..], &["--cluster", "oslo", "--cluster", "bergen"]].concat());
    let port = stage.app.addr.port().to_string();
    let source = application("--text unused");
    let flags = ["--port", &port, "--health-deadline", "20"];
    server.service(PROJECT, "web", &source, &flags);
    let first = server.deploy(INSTANCE, &[]);
    server.ok(&["routes", "policy", INSTANCE, "failover", "bergen", "oslo"]);
    let answers = |says: &str| {
        until(&format!("it says {says}"), || {
            // The policy is applied a moment after it was asked for, and so is what is ready.
            let all = (0..5).map(|_| server.get(HOST, "/"));
            let all: Vec<_> = all.collect();
            let is_it = |body: &str| body.trim() == says;
            all.iter().all(|answer| is_it(&answer.body)).then_some(())
        });
    };
    answers("from-bergen");

    // Nothing is ready there any more.
    next(Fate::NoImage("manifest unknown".to_owned()));
    remove_pods(&bergen);
    answers("from-a-pod");
    next(ready(THERE));
    remove_pods(&bergen);
    answers("from-bergen");

    // The next one is taken by one of them only, and becomes whole with a new try.
    next(Fate::NoImage("manifest unknown".to_owned()));
    source.commit("Another", &[("another", "file")]);
    let second = server.begin(INSTANCE, &[]);
    let detail = server.wait_for(&second, "partially_started");
    assert_eq!(state(&detail, "oslo"), "started", "{detail}");
    assert_eq!(state(&detail, "bergen"), "failed", "{detail}");
    assert!(detail.to_string().contains("manifest unknown"), "{detail}");
    server.get_from(HOST, "/", &first);
    next(ready(THERE));
    server.ok(&["retry", &second, "--cluster", "bergen"]);
    let detail = server.wait_for(&second, "started");
    assert_eq!(state(&detail, "bergen"), "started", "{detail}");
    server.get_from(HOST, "/", &second);
    answers("from-bergen");
    server.check_replay();
}
