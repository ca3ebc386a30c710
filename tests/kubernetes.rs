//! A Kubernetes cluster as the target: a real API server, and a kubelet that is played.

use std::path::Path;
use std::sync::{Arc, Mutex};

use daybook_testkit::TestApp;
use daybook_testkit::git::{GitHttpServer, SourceRepository};
use daybook_testkit::kubernetes::argocd::{self, ArgoCd};
use daybook_testkit::kubernetes::proxy::FaultProxy;
use daybook_testkit::kubernetes::{ControlPlane, Crd, Fate, Gateway, Kubelet, Node};
use daybook_testkit::nameserver::Nameserver;
use daybook_testkit::registry::{Registry, RegistryConfig};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};

use reqwest::Method;
use serde_json::Value;

use crate::support::request;
use crate::support::{Server, Settings, application, until};

/// What the kubelet does next, and the runtime that it is played in.
pub(crate) struct Cluster {
    pub(crate) plane: &'static ControlPlane,
    pub(crate) fate: Arc<Mutex<Fate>>,
    pub(crate) runtime: tokio::runtime::Runtime,
    _kubelet: Kubelet,
}

impl Cluster {
    /// One for all tests; the kubelet is played for one project only.
    fn start(project: &str) -> Option<Self> {
        Some(Self::on(ControlPlane::shared()?, project))
    }

    /// The same with a control plane of its own.
    pub(crate) fn on(plane: &'static ControlPlane, project: &str) -> Self {
        let namespace = format!("{project}--production");
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
            Kubelet::start(client, Some(&namespace), move |_| {
                next.lock().unwrap().clone()
            })
        });
        Self {
            plane,
            fate,
            runtime,
            _kubelet: kubelet,
        }
    }

    /// How many objects of a kind a namespace has.
    pub(crate) fn count<K>(&self, namespace: &str) -> usize
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

/// The same life on any kind of cluster: a source is deployed and served, stopped and started, and
/// another deployment takes its place. Returns the last one.
fn a_life(
    server: &Server,
    project: &str,
    cluster: &str,
    source: &SourceRepository,
    port: &str,
) -> String {
    server.ok(&["project", "create", project]);
    let env = ["env", "create", project, "production", "--live"];
    server.ok(&[&env[..], &["--cluster", cluster]].concat());
    let flags = ["--port", port, "--health-deadline", "20"];
    server.service(project, "web", source, &flags);
    let (instance, host) = (
        format!("{project}.production.web"),
        format!("web.{project}.localhost"),
    );
    let first = server.deploy(&instance, &[]);
    server.get_from(&host, "/", &first);

    server.ok(&["stop", &first]);
    server.wait_for(&first, "stopped");
    server.ok(&["start", &first]);
    server.wait_for(&first, "started");
    server.get_from(&host, "/", &first);

    source.commit("Another", &[("another", "file")]);
    let second = server.deploy(&instance, &[]);
    server.get_from(&host, "/", &second);

    // Back to what still runs, forward again, and back to what was stopped and has to start first.
    server.ok(&["rollback", &instance, "--reason", "too new"]);
    server.get_from(&host, "/", &first);
    server.ok(&["mark-main", &second]);
    server.get_from(&host, "/", &second);
    server.ok(&["stop", &first]);
    server.wait_for(&first, "stopped");
    server.ok(&["rollback", &instance, "--start", "--to", &first]);
    server.wait_for(&first, "started");
    server.get_from(&host, "/", &first);
    assert_eq!(server.deployment(&first)["main"], true);

    server.ok(&["mark-main", &second]);
    server.get_from(&host, "/", &second);
    server.ok(&["stop", &first]);
    server.wait_for(&first, "stopped");
    server.ok(&["terminate", &first]);
    server.wait_for(&first, "terminated");
    server.get_from(&host, "/", &second);
    second
}

#[test]
fn a_life_on_a_local_cluster() {
    let server = Server::start(Settings::default().arg("--local-cluster").arg("local-a"));
    let source = application("--text here");
    a_life(&server, "kubeless", "local-a", &source, "8080");
    server.check_replay();
}

#[test]
fn a_life_on_a_kubernetes_cluster_and_what_keeps_the_next_from_it_is_said() {
    let Some(stage) = Stage::start("kube") else {
        return;
    };
    let edge = "edge-for-all";
    let Some((client, _gateway)) = stage.cluster.runtime.block_on(async {
        let client = stage.cluster.plane.client().await;
        for crd in [Crd::Gateway, Crd::HttpRoute] {
            if !crd.install(&client).await {
                return None;
            }
        }
        make_namespace(&client, edge).await;
        let gateway = Gateway::start(client.clone(), edge, "public", |_| None).await;
        // Somebody has an Ingress for what is to be led there.
        let theirs = serde_json::json!({
            "metadata": { "name": "theirs" },
            "spec": {
                "defaultBackend": { "service": { "name": "old", "port": { "name": "http" } } },
                "rules": [{ "host": "web.kube.localhost" }],
            },
        });
        let theirs = serde_json::from_value(theirs).unwrap();
        let api: kube::Api<k8s_openapi::api::networking::v1::Ingress> =
            kube::Api::namespaced(client.clone(), edge);
        api.create(&Default::default(), &theirs).await.unwrap();
        Some((client, gateway))
    }) else {
        return;
    };
    let settings = stage.settings();
    let settings = settings
        .arg("--kubernetes-gateway")
        .arg(format!("{edge}/public"));
    let server = Server::start(settings);
    stage.life(&server, "kube", |running| {
        // The cluster's Gateway leads there as well.
        let kind = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", "HTTPRoute");
        let kind = ApiResource::from_gvk(&kind);
        let api: kube::Api<DynamicObject> =
            kube::Api::namespaced_with(client, "kube--production", &kind);
        let release = format!("web-{}", &running[running.len() - 8..]);
        until("it leads to the release", || {
            let route = stage
                .cluster
                .runtime
                .block_on(api.get("web.kube.localhost"));
            let route = route.ok()?.data;
            let backends = route["spec"]["rules"][0]["backendRefs"].as_array()?;
            let names: Vec<_> = backends.iter().map(|b| b["name"].clone()).collect();
            (names == [release.clone()]).then_some(())
        });
        until("the ledger says so", || {
            let mut events = server.events().into_iter();
            let said = |e: &Value| {
                e["event"]["type"]
                    .as_str()
                    .is_some_and(|t| t.ends_with("routing.applied.v1"))
                    && e["event"]["data"]["gateway"] == "oslo"
            };
            events.any(|e| said(&e)).then_some(())
        });
        until("the Ingress is said", || {
            let list = server.ok(&["routes", "list", "kube"]).stdout;
            let note = format!("Ingress {edge}/theirs of oslo serves web.kube.localhost as well");
            (list.contains(&note) && list.contains("old:http")).then_some(())
        });
    });
}

#[test]
fn a_life_on_a_cluster_that_argocd_brings_to_the_repository() {
    let Some(stage) = Stage::start("argo") else {
        return;
    };
    let Some(helm) = argocd::helm_program() else {
        return;
    };
    let namespace = "argocd-for-all";
    let client = stage.cluster.runtime.block_on(stage.cluster.plane.client());
    let installed = stage.cluster.runtime.block_on(async {
        make_namespace(&client, namespace).await;
        Crd::Application.install(&client).await
    });
    if !installed {
        return;
    }
    let port = daybook_testkit::free_port();
    let settings = stage
        .settings()
        .arg("--argocd")
        .arg(namespace)
        .arg("--argocd-repositories")
        .arg(format!("http://127.0.0.1:{port}/git"));
    let mut server = Server::stopped(settings);
    let listen = format!("127.0.0.1:{port}");
    server.restart_with(&["--listen", &listen, "--gateway", "127.0.0.1:0"]);
    let _controller = {
        let _within = stage.cluster.runtime.enter();
        ArgoCd::start_healing(client.clone(), namespace, argocd::helm(helm))
    };
    stage.life(&server, "argo", |_| {
        // It was rolled back, and goes on being synced and healed.
        let kind = GroupVersionKind::gvk("argoproj.io", "v1alpha1", "Application");
        let kind = ApiResource::from_gvk(&kind);
        let api: kube::Api<DynamicObject> = kube::Api::namespaced_with(client, namespace, &kind);
        let found = stage.cluster.runtime.block_on(api.get("argo--production"));
        let policy = found.unwrap().data["spec"]["syncPolicy"]["automated"].take();
        let both = serde_json::json!({ "prune": true, "selfHeal": true });
        assert_eq!(policy, both);
    });
}

/// The pod of the only build in a namespace, on a node that runs it.
async fn build_pod(
    client: &kube::Client,
    namespace: &str,
    node: &Node,
) -> k8s_openapi::api::core::v1::Pod {
    use kube::ResourceExt as _;
    let pods = kube::Api::namespaced(client.clone(), namespace);
    let list = kube::api::ListParams::default();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let all: Vec<k8s_openapi::api::core::v1::Pod> = pods.list(&list).await.unwrap().items;
        let new = |pod: &&k8s_openapi::api::core::v1::Pod| {
            let is_bound = pod
                .spec
                .as_ref()
                .is_some_and(|spec| spec.node_name.is_some());
            !is_bound && pod.metadata.deletion_timestamp.is_none()
        };
        if let Some(pod) = all.iter().find(new) {
            node.bind(pod).await;
            node.print_in(&pod.name_any(), "source", "fetching the commit");
            node.end_in(&pod.name_any(), "source");
            return pod.clone();
        }
        assert!(std::time::Instant::now() < deadline, "no build has a pod");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[test]
fn an_image_is_built_in_the_cluster_that_runs_it() {
    use kube::ResourceExt as _;
    let Some(stage) = Stage::start("built") else {
        return;
    };
    let namespace = "builds-of-a-server";
    let (client, node) = stage.cluster.runtime.block_on(async {
        let client = stage.cluster.plane.client().await;
        make_namespace(&client, namespace).await;
        let node = Node::start(client.clone(), "node-of-builds").await;
        (client, node)
    });
    let source = application("--text unused");
    source.commit("With a Dockerfile", &[("Dockerfile", "FROM scratch\n")]);
    let git = stage
        .cluster
        .runtime
        .block_on(GitHttpServer::start(source.path().parent().unwrap()));
    let folder = source.path().file_name().unwrap().to_str().unwrap();
    let url = git.url(&format!("{folder}/.git"));
    let port = stage.app.addr.port().to_string();
    let create = |server: &Server, cluster: &str, flags: &[&str]| {
        server.ok(&["project", "create", "built"]);
        let env = ["env", "create", "built", "production", "--cluster", cluster];
        server.ok(&env);
        let service = ["service", "create", "built", "web", "--repo", &url];
        server.ok(&[&service[..], &["--port", &port], flags].concat());
    };
    // The image that the builder pushes is one that another Daybook has made.
    let prefix = format!("{}/team", stage.registry.host());
    let other = Server::start(Settings::default().arg("--image-prefix").arg(prefix));
    create(&other, "local-a", &["--builder", "archive"]);
    let pushed = other.begin("built.production.web", &[]);
    let digest = until("the image is pushed", || {
        let detail = other.deployment(&pushed);
        let digest = detail["image"]["digest"].as_str();
        digest.map(str::to_owned)
    });

    let settings = stage.settings();
    let settings = settings.arg("--builder").arg("buildkit");
    let server = Server::start(settings.arg("--build-namespace").arg(namespace));
    create(&server, "oslo", &[]);
    let begun = server.begin("built.production.web", &[]);
    let pod = stage.cluster.runtime.block_on(async {
        let pod = build_pod(&client, namespace, &node).await;
        node.print_in(
            &pod.name_any(),
            "build",
            "#1 load build definition from Dockerfile",
        );
        Kubelet::play(&client, &pod, &Fate::Runs).await;
        pod
    });
    until("its lines, while it runs", || {
        let log = server.ok(&["logs", &begun]).stdout;
        log.contains("load build definition").then_some(())
    });
    let ends = Fate::Ends {
        code: 0,
        reason: "Completed",
        message: digest.clone(),
    };
    node.end_in(&pod.name_any(), "build");
    stage
        .cluster
        .runtime
        .block_on(Kubelet::play(&client, &pod, &ends));
    let detail = server.wait_for(&begun, "started");
    assert!(detail.to_string().contains(&digest), "{detail}");
    println!("{}", server.ok(&["logs", &begun]).stdout);

    // One that nobody waits for any more leaves no Job that runs.
    source.commit("Another", &[("another", "file")]);
    let second = server.begin("built.production.web", &[]);
    stage.cluster.runtime.block_on(async {
        let pod = build_pod(&client, namespace, &node).await;
        Kubelet::play(&client, &pod, &Fate::Runs).await;
    });
    server.ok(&["cancel", &second]);
    let jobs: kube::Api<k8s_openapi::api::batch::v1::Job> =
        kube::Api::namespaced(client, namespace);
    until("its Job is being deleted", || {
        let all = stage
            .cluster
            .runtime
            .block_on(jobs.list(&Default::default()));
        let is_left = |job: &k8s_openapi::api::batch::v1::Job| {
            let runs = job
                .status
                .as_ref()
                .is_none_or(|s| s.completion_time.is_none());
            runs && job.metadata.deletion_timestamp.is_none()
        };
        (!all.unwrap().items.iter().any(is_left)).then_some(())
    });
    server.check_replay();
}

#[test]
fn a_cluster_that_has_failed_is_tried_again_alone() {
    let Some(stage) = Stage::start("again") else {
        return;
    };
    let next = |fate| *stage.cluster.fate.lock().unwrap() = fate;
    next(Fate::NoImage("manifest unknown".to_owned()));
    let server = Server::start(stage.settings().arg("--local-cluster").arg("local-a"));
    let source = application("--text here");
    server.ok(&["project", "create", "again"]);
    let clusters = ["--cluster", "local-a", "--cluster", "oslo"];
    server.ok(&[&["env", "create", "again", "production"][..], &clusters].concat());
    let port = stage.app.addr.port().to_string();
    let flags = ["--port", &port, "--health-deadline", "20"];
    server.service("again", "web", &source, &flags);
    let id = server.begin("again.production.web", &[]);
    let detail = server.wait_for(&id, "partially_started");
    assert!(detail.to_string().contains("manifest unknown"), "{detail}");

    next(Fate::Ready {
        ip: "127.0.0.1".to_owned(),
    });
    server.ok(&["retry", &id]);
    server.wait_for(&id, "started");
    let kinds = server.kinds(&id);
    let retried = kinds
        .iter()
        .filter(|k| k.as_str() == "deployment.cluster_retried.v1");
    assert_eq!(retried.count(), 1, "{kinds:?}");
    server.check_replay();
}

pub(crate) async fn make_namespace(client: &kube::Client, name: &str) {
    let spaces: kube::Api<k8s_openapi::api::core::v1::Namespace> = kube::Api::all(client.clone());
    let space = serde_json::json!({ "metadata": { "name": name } });
    let space = serde_json::from_value(space).unwrap();
    spaces.create(&Default::default(), &space).await.unwrap();
}

/// A cluster with a registry, and an application that is what its pods answer.
pub(crate) struct Stage {
    pub(crate) cluster: Cluster,
    pub(crate) registry: Registry,
    pub(crate) app: TestApp,
}

impl Stage {
    pub(crate) fn start(project: &str) -> Option<Self> {
        Some(Self {
            cluster: Cluster::start(project)?,
            registry: Registry::start(RegistryConfig::default())?,
            app: TestApp::start(&["--text", "from-a-pod"]),
        })
    }

    pub(crate) fn settings(&self) -> Settings {
        self.settings_with(&self.cluster.plane.kubeconfig())
    }

    /// The same with a kubeconfig that has other clusters, too.
    pub(crate) fn settings_with(&self, kubeconfig: &Path) -> Settings {
        Settings::default()
            .arg("--image-prefix")
            .arg(format!("{}/team", self.registry.host()))
            .arg("--kubeconfig")
            .arg(kubeconfig.display().to_string())
            .arg("--kubernetes")
            .arg("oslo=test")
    }

    fn life(&self, server: &Server, project: &str, while_it_runs: impl FnOnce(&str)) {
        let source = application("--text unused");
        let port = self.app.addr.port().to_string();
        let running = a_life(server, project, "oslo", &source, &port);
        let host = format!("web.{project}.localhost");
        assert_eq!(server.get_from(&host, "/", &running).body, "from-a-pod");

        while_it_runs(&running);

        // The next one cannot be pulled: said while it is tried, and in the end the failure's cause.
        let next = |fate| *self.cluster.fate.lock().unwrap() = fate;
        next(Fate::NoImage("manifest unknown".to_owned()));
        source.commit("A third", &[("third", "file")]);
        let third = server.begin(&format!("{project}.production.web"), &[]);
        until("the cause, while it is tried", || {
            let detail = server.deployment(&third);
            let text = detail.to_string();
            (detail["state"] == "deploying" && text.contains("ImagePullBackOff")).then_some(())
        });
        assert_eq!(server.wait_for_failure(&third), "ImagePullBackOff");
        server.get_from(&host, "/", &running);

        // One that ends again and again: with what it printed last, what that comes of, what helps.
        next(Fate::Crashes(3, "starting\nno database\n".to_owned()));
        source.commit("A fourth", &[("fourth", "file")]);
        let fourth = server.begin(&format!("{project}.production.web"), &[]);
        until("what it said, while it is tried", || {
            let shown = server.ok(&["status", &fourth]).stdout;
            let said = [
                "(CrashLoopBackOff)",
                "exit code 3",
                "its last words: starting | no database",
                "  likely     The application ends with an error while it starts",
                "  remedy     Read the log, correct the application or its variables",
                "  remedy     Go back to what ran before: `daybook rollback`.",
            ];
            said.iter().all(|said| shown.contains(said)).then_some(())
        });
        assert_eq!(server.wait_for_failure(&fourth), "CrashLoopBackOff");
        server.get_from(&host, "/", &running);

        // What is stopped has no pods, and what is terminated leaves nothing.
        next(Fate::Ready {
            ip: "127.0.0.1".to_owned(),
        });
        server.ok(&["stop", &running]);
        server.wait_for(&running, "stopped");
        let namespace = format!("{project}--production");
        until("no pods are left", || {
            let left = self
                .cluster
                .count::<k8s_openapi::api::core::v1::Pod>(&namespace);
            (left == 0).then_some(())
        });
        server.ok(&["terminate", &running]);
        server.wait_for(&running, "terminated");
        until("nothing is left", || {
            let left = self
                .cluster
                .count::<k8s_openapi::api::apps::v1::Deployment>(&namespace)
                + self
                    .cluster
                    .count::<k8s_openapi::api::core::v1::Service>(&namespace);
            (left == 0).then_some(())
        });
        server.check_replay();
    }
}

#[test]
fn a_cluster_that_does_not_answer_shows_and_delays_no_other() {
    let Some(cluster) = Cluster::start("shop") else {
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

#[test]
fn a_cluster_that_takes_requests_and_never_answers_delays_only_itself() {
    let Some(stage) = Stage::start("silent") else {
        return;
    };
    let runtime = &stage.cluster.runtime;
    let proxy = runtime.block_on(FaultProxy::start(stage.cluster.plane));
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = folder.path().join("kubeconfig");
    proxy.write_kubeconfig(&kubeconfig);
    let settings = stage.settings_with(&kubeconfig);
    let server = Server::start(settings.arg("--local-cluster").arg("local-a"));
    // It is looked after, and not only looked for.
    until("the cluster is watched", || {
        let watches = proxy.open_watches();
        watches.contains_key("pods").then_some(())
    });
    let source = application("--text here");
    server.ok(&["project", "create", "silent"]);
    let clusters = ["--cluster", "oslo", "--cluster", "local-a"];
    let env = ["env", "create", "silent", "production"];
    server.ok(&[&env[..], &clusters].concat());
    let port = stage.app.addr.port().to_string();
    let flags = ["--port", &port, "--health-deadline", "600"];
    server.service("silent", "web", &source, &flags);

    proxy.hang();
    proxy.cut();
    proxy.take_asked();
    let id = server.begin("silent.production.web", &[]);
    let state = |detail: &Value, cluster: &str| {
        let clusters = detail["cluster_status"].as_array().unwrap();
        let found = clusters.iter().find(|c| c["cluster"] == cluster);
        found.map(|c| c["state"].as_str().unwrap().to_owned())
    };
    until("it is asked for what it does not answer", || {
        let asked = proxy.take_asked();
        let namespace = |path: &str| path.ends_with("/silent--production");
        asked.iter().any(|a| namespace(a.path())).then_some(())
    });
    let detail = until("it runs in the other", || {
        let detail = server.deployment(&id);
        (state(&detail, "local-a").as_deref() == Some("started")).then_some(detail)
    });
    assert_ne!(
        state(&detail, "oslo").as_deref(),
        Some("started"),
        "{detail}"
    );
    assert_ne!(
        state(&detail, "oslo").as_deref(),
        Some("failed"),
        "{detail}"
    );
    assert_eq!(detail["state"], "deploying", "{detail}");

    proxy.behave();
    proxy.cut();
    server.wait_for(&id, "started");
    server.check_replay();
}

#[test]
fn a_route_that_somebody_has_changed_by_hand_is_drift_and_so_is_said() {
    let Some(stage) = Stage::start("byhand") else {
        return;
    };
    let (edge, host) = ("edge-by-hand", "www.byhand.example.com");
    let Some((client, _gateway)) = stage.cluster.runtime.block_on(async {
        let client = stage.cluster.plane.client().await;
        for crd in [Crd::Gateway, Crd::HttpRoute] {
            if !crd.install(&client).await {
                return None;
            }
        }
        make_namespace(&client, edge).await;
        let gateway = Gateway::start(client.clone(), edge, "public", |_| None).await;
        Some((client, gateway))
    }) else {
        return;
    };
    let nameserver = Nameserver::start();
    nameserver.point(host, "127.0.0.1");
    let folder = tempfile::tempdir().unwrap();
    let checks = folder.path().join("checks.toml");
    let text = format!(
        "every = 1\n[[domain]]\nname = \"{host}\"\nnameservers = [\"{}\"]\n",
        nameserver.addr
    );
    std::fs::write(&checks, text).unwrap();
    let settings = stage
        .settings()
        .arg("--kubernetes-gateway")
        .arg(format!("{edge}/public"))
        .arg("--endpoint-checks")
        .arg(checks.display().to_string());
    let server = Server::start(settings);
    server.ok(&["project", "create", "byhand"]);
    let env = ["env", "create", "byhand", "production", "--live"];
    server.ok(&[&env[..], &["--cluster", "oslo"]].concat());
    let port = stage.app.addr.port().to_string();
    let source = application("--text unused");
    server.service("byhand", "web", &source, &["--port", &port]);
    let id = server.deploy("byhand.production.web", &[]);
    server.ok(&["domain", "add", "byhand.production.web", host]);
    let route = |reason: &'static str| {
        until(&format!("the route is {reason}"), || {
            let detail = server.deployment(&id);
            let planes = detail["endpoints"][0]["planes"].as_array()?.clone();
            let mut planes = planes.into_iter();
            planes.find(|p| p["plane"] == "route" && p["reason"] == reason)
        })
    };
    assert_eq!(route("Applied")["state"], "ok");
    until("the cluster has applied it", || {
        let events = server.events();
        let applied = events.iter().filter(|e| {
            let kind = e["event"]["type"].as_str();
            kind.is_some_and(|t| t.ends_with("routing.applied.v1"))
        });
        let newest = |gateway: &str| {
            let of = applied.clone().map(|e| &e["event"]["data"]);
            let of = of.filter(|data| data["gateway"] == gateway);
            of.filter_map(|data| data["table"].as_u64()).max()
        };
        let (here, there) = (newest("local")?, newest("oslo")?);
        (here == there).then_some(())
    });

    // Somebody leads it elsewhere.
    let kind = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", "HTTPRoute");
    let kind = ApiResource::from_gvk(&kind);
    let api: kube::Api<DynamicObject> =
        kube::Api::namespaced_with(client, "byhand--production", &kind);
    let runtime = &stage.cluster.runtime;
    let found = until("the cluster has the route", || {
        runtime.block_on(api.get(host)).ok()
    });
    let mut rules = found.data["spec"]["rules"].clone();
    let patched = |rules: &Value| {
        let patch = kube::api::Patch::Merge(serde_json::json!({ "spec": { "rules": rules } }));
        let params = kube::api::PatchParams::default();
        runtime.block_on(api.patch(host, &params, &patch)).unwrap();
    };
    let right = rules.clone();
    rules[0]["backendRefs"][0]["name"] = "theirs".into();
    patched(&rules);
    let drifted = route("RouteChanged");
    let release = format!("web-{}", &id[id.len() - 8..]);
    assert_eq!(drifted["state"], "drifted");
    assert_eq!(drifted["expected"], format!("{host}: {release} 100"));
    assert_eq!(drifted["actual"], format!("{host}: theirs 100"));
    let shown = server.ok(&["status", &id]).stdout;
    assert!(
        shown.contains("its route on cluster oslo was changed"),
        "{shown}"
    );
    let detail = server.deployment(&id);
    assert_eq!(detail["readiness"]["endpoint"]["reason"], "RouteDrifted");

    patched(&right);
    assert_eq!(route("Applied")["state"], "ok");
    let gone = runtime.block_on(api.delete(host, &Default::default()));
    gone.unwrap();
    assert_eq!(route("RouteMissing")["actual"], "no route");
    server.check_replay();
}
