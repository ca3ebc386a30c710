//! A Kubernetes cluster as the target: a real API server, and a kubelet that is played.

use std::sync::{Arc, Mutex};

use daybook_testkit::TestApp;
use daybook_testkit::kubernetes::{ControlPlane, Fate, Kubelet};
use daybook_testkit::registry::{Registry, RegistryConfig};

use reqwest::Method;

use crate::support::request;
use crate::support::{Server, Settings, application, until};

/// What the kubelet does next, and the runtime that it is played in.
struct Cluster {
    plane: &'static ControlPlane,
    fate: Arc<Mutex<Fate>>,
    runtime: tokio::runtime::Runtime,
    _kubelet: Kubelet,
}

impl Cluster {
    fn start() -> Option<Self> {
        let plane = ControlPlane::shared()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let fate = Arc::new(Mutex::new(Fate::Ready {
            ip: "127.0.0.1".to_owned(),
        }));
        let next = fate.clone();
        let kubelet = runtime.block_on(async {
            let client = plane.client().await;
            Kubelet::start(client, None, move |_| next.lock().unwrap().clone())
        });
        Some(Self {
            plane,
            fate,
            runtime,
            _kubelet: kubelet,
        })
    }

    /// How many objects of a kind a namespace has.
    fn count<K>(&self, namespace: &str) -> usize
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
    {
        self.runtime.block_on(async {
            let api: kube::Api<K> = kube::Api::namespaced(self.plane.client().await, namespace);
            let labels = "app.kubernetes.io/managed-by=daybook";
            let list = kube::api::ListParams::default().labels(labels);
            api.list(&list).await.unwrap().items.len()
        })
    }
}

#[test]
fn a_source_runs_on_a_cluster_and_what_keeps_the_next_from_it_is_said() {
    let Some(cluster) = Cluster::start() else {
        return;
    };
    let Some(registry) = Registry::start(RegistryConfig::default()) else {
        return;
    };
    // The pods' address is that of an application that runs here.
    let app = TestApp::start(&["--text", "from-a-pod"]);
    let settings = Settings::default()
        .arg("--image-prefix")
        .arg(format!("{}/team", registry.host()))
        .arg("--kubeconfig")
        .arg(cluster.plane.kubeconfig().display().to_string())
        .arg("--kubernetes")
        .arg("oslo=test");
    let server = Server::start(settings);
    let source = application("--text unused");
    server.ok(&["project", "create", "kube"]);
    server.ok(&[
        "env",
        "create",
        "kube",
        "production",
        "--cluster",
        "oslo",
        "--live",
    ]);
    let port = app.addr.port().to_string();
    server.service(
        "kube",
        "web",
        &source,
        &["--port", &port, "--health-deadline", "5"],
    );

    let first = server.deploy("kube.production.web", &[]);
    let answer = server.get_from("web.kube.localhost", "/", &first);
    assert_eq!(answer.body, "from-a-pod");

    // The next one cannot be pulled: said while it is tried, and in the end the failure's cause.
    *cluster.fate.lock().unwrap() = Fate::NoImage("manifest unknown".to_owned());
    source.commit("Another", &[("another", "file")]);
    let second = server.begin("kube.production.web", &[]);
    until("the cause, while it is tried", || {
        let detail = server.deployment(&second);
        let text = detail.to_string();
        (detail["state"] == "deploying" && text.contains("ImagePullBackOff")).then_some(())
    });
    assert_eq!(server.wait_for_failure(&second), "ImagePullBackOff");
    server.get_from("web.kube.localhost", "/", &first);

    // What is stopped has no pods, and what is terminated leaves nothing.
    *cluster.fate.lock().unwrap() = Fate::Ready {
        ip: "127.0.0.1".to_owned(),
    };
    server.ok(&["stop", &first]);
    server.wait_for(&first, "stopped");
    let namespace = "kube--production";
    assert_eq!(
        cluster.count::<k8s_openapi::api::core::v1::Pod>(namespace),
        0
    );
    server.ok(&["start", &first]);
    server.wait_for(&first, "started");
    server.ok(&["stop", &first]);
    server.wait_for(&first, "stopped");
    server.ok(&["terminate", &first]);
    server.wait_for(&first, "terminated");
    until("nothing is left", || {
        let left = cluster.count::<k8s_openapi::api::apps::v1::Deployment>(namespace)
            + cluster.count::<k8s_openapi::api::core::v1::Service>(namespace);
        (left == 0).then_some(())
    });
    server.check_replay();
}

#[test]
fn a_cluster_that_does_not_answer_shows_and_delays_no_other() {
    let Some(cluster) = Cluster::start() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = std::fs::read_to_string(cluster.plane.kubeconfig()).unwrap();
    let nobody = daybook_testkit::free_addr().to_string();
    let address = cluster.plane.url().replace("https://", "");
    let dead = folder.path().join("kubeconfig");
    std::fs::write(&dead, kubeconfig.replace(&address, &nobody)).unwrap();
    let settings = Settings::default()
        .arg("--kubeconfig")
        .arg(dead.display().to_string())
        .arg("--kubernetes")
        .arg("oslo=test")
        .arg("--local-cluster")
        .arg("local-a");
    let server = Server::start(settings);
    let source = application("--text here");
    server.define("shop", "web", &source, &[]);
    let id = server.deploy("shop.production.web", &[]);
    server.get_from("web.shop.localhost", "/", &id);
    until("it is named", || {
        let url = format!("{}/readyz", server.url());
        let ready = request(Method::GET, &url, &[], None).unwrap();
        ready.body.contains("cluster oslo").then_some(())
    });
}
