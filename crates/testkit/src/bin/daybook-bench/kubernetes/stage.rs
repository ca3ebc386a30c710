//! A control plane with what is played on it, and Daybook in front of it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use daybook_testkit::TestApp;
use daybook_testkit::git::SourceRepository;
use daybook_testkit::kubernetes::proxy::{Asked, FaultProxy};
use daybook_testkit::kubernetes::{ControlPlane, Fate, Kubelet};
use daybook_testkit::registry::{Registry, RegistryConfig};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::{DeleteParams, ListParams};
use kube::{Api, Client, ResourceExt};
use reqwest::Method;
use serde_json::{Value, json};

use super::feed::{Feed, has_problem, is_ready, is_unready};
use crate::switch::Server;
use crate::{Failure, temporary_folder};

pub(super) const CLUSTER: &str = "oslo";
/// The label that says which deployment a pod is of.
const DEPLOYMENT: &str = "daybook.dev/deployment";
/// How long many deployments may take together.
const LONG: Duration = Duration::from_secs(1800);
/// So long nothing may be asked for until it is quiet.
const QUIET: Duration = Duration::from_secs(4);

pub(super) struct Stage {
    pub(super) plane: ControlPlane,
    pub(super) client: Client,
    pub(super) proxy: FaultProxy,
    registry: Registry,
    app: TestApp,
    folder: tempfile::TempDir,
    program: PathBuf,
    /// An image in the registry, once there is one.
    pub(super) image: Option<String>,
}

/// How Daybook reaches the API server.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Through {
    /// As anybody does.
    Tls,
    /// Past who counts.
    Proxy,
}

impl Stage {
    pub(super) async fn start(program: PathBuf, parent: Option<&Path>) -> Result<Self, Failure> {
        let plane = tokio::task::spawn_blocking(ControlPlane::start).await?;
        let plane = plane.ok_or("there is no control plane: `cargo xtask tools kubernetes`")?;
        let registry = Registry::start(RegistryConfig::default());
        let registry = registry.ok_or("there is no docker-registry")?;
        let folder = temporary_folder(parent)?;
        let proxy = FaultProxy::start(&plane).await;
        proxy.write_kubeconfig(&folder.path().join("counted"));
        Ok(Self {
            client: plane.client().await,
            proxy,
            plane,
            registry,
            app: TestApp::start(&["--text", "from-a-pod"]),
            folder,
            program,
            image: None,
        })
    }

    /// `daybook up` on a data folder of this name.
    pub(super) async fn daybook(
        &self,
        data: &str,
        through: Through,
        listen: &str,
        more: &[String],
    ) -> Result<Server, Failure> {
        let kubeconfig = match through {
            Through::Tls => self.plane.kubeconfig(),
            Through::Proxy => self.folder.path().join("counted"),
        };
        let mut arguments = vec![
            "--image-prefix".to_owned(),
            format!("{}/team", self.registry.host()),
            "--kubeconfig".to_owned(),
            kubeconfig.display().to_string(),
            "--kubernetes".to_owned(),
            format!("{CLUSTER}=test"),
        ];
        arguments.extend_from_slice(more);
        let folder = self.folder.path().join(data);
        std::fs::create_dir_all(&folder)?;
        Server::start(&self.program, &folder, listen, &arguments).await
    }

    /// A project with a service.
    pub(super) async fn define(&self, server: &Server, project: &str) -> Result<(), Failure> {
        let projects = json!({ "name": project });
        server
            .ask(Method::POST, "/api/v1/projects", projects)
            .await?;
        self.service(server, project, "web", &Value::Null).await
    }

    /// A service whose pods answer what the application of this bench answers.
    pub(super) async fn service(
        &self,
        server: &Server,
        project: &str,
        service: &str,
        source: &Value,
    ) -> Result<(), Failure> {
        let run = json!({
            "port": self.app.addr.port(),
            "env": { "GREETING": "hello" },
            "health": { "path": "/", "deadline_seconds": 3600 },
        });
        let path = format!("/api/v1/projects/{project}/services/{service}");
        let service = match source {
            Value::Null => json!({ "run": run }),
            source => json!({ "run": run, "source": source }),
        };
        server.ask(Method::PUT, &path, service).await?;
        Ok(())
    }

    pub(super) async fn environment(
        &self,
        server: &Server,
        project: &str,
        name: &str,
    ) -> Result<(), Failure> {
        let path = format!("/api/v1/projects/{project}/environments");
        let environment = json!({ "name": name, "clusters": [CLUSTER] });
        server.ask(Method::POST, &path, environment).await?;
        Ok(())
    }

    /// Asks for a deployment of the image, or of the service's source before there is one.
    pub(super) async fn deploy(&self, server: &Server, instance: &str) -> Result<String, Failure> {
        let mut wish = json!({ "instance_id": instance });
        if let Some(image) = &self.image {
            wish["image"] = json!(image);
        }
        let accepted = server
            .ask(Method::POST, "/api/v1/deployments", wish)
            .await?;
        let id = accepted["id"].as_str().ok_or("a deployment has no id")?;
        Ok(id.to_owned())
    }

    /// Builds an image from a source, once. A kubelet has to be played.
    pub(super) async fn build(&mut self, server: &Server) -> Result<(), Failure> {
        let source = SourceRepository::new();
        source.commit("A page", &[("index.html", "one")]);
        self.define(server, "source").await?;
        let from = json!({ "url": source.url() });
        self.service(server, "source", "web", &from).await?;
        self.environment(server, "source", "production").await?;
        let id = self.deploy(server, "source.production.web").await?;
        let detail = self.reached(server, &id, &["started"]).await?;
        let text = |name: &str| {
            detail["image"][name]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        self.image = Some(format!("{}@{}", text("repository"), text("digest")));
        Ok(())
    }

    /// Waits until a deployment is in one of these states.
    pub(super) async fn reached(
        &self,
        server: &Server,
        id: &str,
        states: &[&str],
    ) -> Result<Value, Failure> {
        let path = format!("/api/v1/deployments/{id}");
        let begun = Instant::now();
        loop {
            let seen = server.ask(Method::GET, &path, Value::Null).await?;
            match seen["state"].as_str() {
                Some(state) if states.contains(&state) => return Ok(seen),
                Some("failed" | "cancelled") => return Err(format!("it failed: {seen}").into()),
                _ if begun.elapsed() > LONG => {
                    return Err(format!("it did not get there: {seen}").into());
                }
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// The pods of these deployments, in their order.
    pub(super) async fn pods(&self, deployments: &[String]) -> Result<Vec<Pod>, Failure> {
        let api: Api<Pod> = Api::all(self.client.clone());
        let list = ListParams::default().labels(DEPLOYMENT);
        let all = api.list(&list).await?.items;
        let of = |id: &String| {
            let mut all = all.iter();
            let pod = all.find(|pod| pod.labels().get(DEPLOYMENT) == Some(id));
            pod.cloned().ok_or_else(|| format!("{id} has no pod"))
        };
        Ok(deployments.iter().map(of).collect::<Result<_, _>>()?)
    }

    /// Deletes namespaces, and waits until nothing runs any more.
    pub(super) async fn clear(&self, namespaces: &[&str]) -> Result<(), Failure> {
        let spaces: Api<Namespace> = Api::all(self.client.clone());
        for name in namespaces {
            spaces.delete(name, &DeleteParams::default()).await?;
        }
        let (begun, pods) = (Instant::now(), Api::<Pod>::all(self.client.clone()));
        while !pods.list(&ListParams::default()).await?.items.is_empty() {
            if begun.elapsed() > LONG {
                return Err("the pods of a namespace do not go".into());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Ok(())
    }

    /// Waits until Daybook asks for nothing any more, and returns what it has asked for.
    pub(super) async fn calm(&self) -> Result<Vec<Asked>, Failure> {
        let (begun, mut all) = (Instant::now(), Vec::new());
        loop {
            tokio::time::sleep(QUIET).await;
            let asked = self.proxy.take_asked();
            let is_calm = asked.iter().all(Asked::is_watch);
            all.extend(asked);
            if is_calm {
                return Ok(all);
            }
            if begun.elapsed() > LONG {
                return Err("the API server is asked for things all the time".into());
            }
        }
    }
}

/// How long changes of pods took until they were in the ledger, in milliseconds.
#[derive(Default)]
pub(super) struct Taken {
    pub(super) ready: Vec<f64>,
    pub(super) diagnosis: Vec<f64>,
    pub(super) recovery: Vec<f64>,
}

/// Plays so many rounds of a kubelet's work, each with another pod.
pub(super) async fn pods_change(
    client: &Client,
    feed: &mut Feed,
    pods: &[(String, Pod)],
    patches: usize,
) -> Result<Taken, Failure> {
    let running = Fate::Ready {
        ip: "127.0.0.1".to_owned(),
    };
    let mut taken = Taken::default();
    for (n, (id, pod)) in pods.iter().cycle().take(patches).enumerate() {
        feed.forget();
        Kubelet::play(client, pod, &Fate::Creating).await;
        feed.observed(id, is_unready).await?;
        let words = format!("manifest {n} unknown");
        let no_image = Fate::NoImage(words.clone());
        for (fate, all) in [
            (&running, &mut taken.ready),
            (&no_image, &mut taken.diagnosis),
            (&running, &mut taken.recovery),
        ] {
            let begun = Instant::now();
            // The time of the request counts.
            let (came, ()) = tokio::join!(
                feed.observed(id, |seen| match fate {
                    Fate::NoImage(_) => has_problem(seen, "ImagePullBackOff", &words),
                    _ => is_ready(seen),
                }),
                Kubelet::play(client, pod, fate)
            );
            all.push(came?.duration_since(begun).as_secs_f64() * 1000.0);
        }
    }
    Ok(taken)
}
