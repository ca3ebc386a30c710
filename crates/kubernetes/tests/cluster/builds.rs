//! Builds as Jobs: the API server takes them, their lives are played, and nothing is left of them.

use std::process::Command;
use std::sync::Mutex;

use daybook_events::deployment::SourceCommit;
use daybook_events::spec::{BuildSpec, BuilderKind};
use daybook_events::{BuildId, ImageRepository, ImageTag, RepositoryUrl};
use daybook_kubernetes::builds::{BUILD, BuildOptions, ClusterBuilds, REQUEST, Tool};
use daybook_testkit::git::{GitHttpServer, SourceRepository};
use daybook_testkit::kubernetes::Node;
use daybook_testkit::kubernetes::proxy::{FaultProxy, refusal};
use daybook_testkit::registry::{Registry, RegistryConfig};
use daybook_workers::builder::archive::ArchiveBuilder;
use daybook_workers::builder::{BuildContext, Builder as _};
use daybook_workers::idle::IdleImages;
use daybook_workers::image::credentials::Credentials;
use daybook_workers::image::layout::Layout;
use daybook_workers::image::local::LayoutStore;
use daybook_workers::image::registry::{RegistryOptions, RegistryStore};
use daybook_workers::image::store::{ImageStore, Images as AllImages};
use daybook_workers::image::unpack::UnpackLimits;
use daybook_workers::output::LineSender;
use daybook_workers::ports::{BuildInput, BuiltImage, Images as _, StepError};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Container, ResourceQuota};
use kube::api::DeleteParams;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::*;

/// A namespace for builds, a node, and a source with a Dockerfile.
struct Yard {
    client: Client,
    namespace: String,
    folder: tempfile::TempDir,
    images: Arc<AllImages>,
    node: Arc<Node>,
    _undertaker: Undertaker,
}

/// Takes pods away that are to end, as kubelets do.
struct Undertaker(JoinHandle<()>);
impl Drop for Undertaker {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Undertaker {
    fn start(pods: Api<Pod>) -> Self {
        Self(tokio::spawn(async move {
            loop {
                let all = pods.list(&ListParams::default()).await.unwrap();
                for pod in all {
                    if pod.metadata.deletion_timestamp.is_some() {
                        let now = DeleteParams::default().grace_period(0);
                        let _ = pods.delete(&pod.name_any(), &now).await;
                    }
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }))
    }
}

/// A build under way, with what it printed so far.
struct Running {
    handed_over: CancellationToken,
    cancel: CancellationToken,
    lines: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<Result<BuiltImage, StepError>>,
}

impl Running {
    fn said(&self, text: &str) -> bool {
        self.lines.lock().unwrap().iter().any(|l| l.contains(text))
    }

    async fn ended(self) -> Result<BuiltImage, StepError> {
        let ended = tokio::time::timeout(PATIENCE, self.task).await;
        ended
            .unwrap_or_else(|_| panic!("it does not end: {:#?}", self.lines.lock().unwrap()))
            .unwrap()
    }

    async fn failed(self, code: &str) -> StepError {
        let lines = self.lines.clone();
        let error = self.ended().await.unwrap_err();
        assert_eq!(error.code, code, "{error:?}\n{:#?}", lines.lock().unwrap());
        assert!(!error.remedy.is_empty());
        error
    }
}

impl Yard {
    async fn new(namespace: &str) -> Option<Self> {
        Self::with(namespace, "privileged").await
    }

    async fn with(namespace: &str, security: &str) -> Option<Self> {
        let plane = tokio::task::spawn_blocking(ControlPlane::shared)
            .await
            .unwrap()?;
        let client = plane.client().await;
        let spaces: Api<Namespace> = Api::all(client.clone());
        let space = json!({ "metadata": {
            "name": namespace,
            "labels": { "pod-security.kubernetes.io/enforce": security },
        }});
        let space: Namespace = serde_json::from_value(space).unwrap();
        spaces.create(&PostParams::default(), &space).await.unwrap();
        Some(Self::of(client, namespace).await)
    }

    /// One in a namespace that is there.
    async fn of(client: Client, namespace: &str) -> Self {
        let accounts: Api<k8s_openapi::api::core::v1::ServiceAccount> =
            Api::namespaced(client.clone(), namespace);
        // The controller makes it; pods are not admitted before.
        until("the namespace has its account", || async {
            accounts.get_opt("default").await.unwrap()
        })
        .await;
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source/services/web");
        std::fs::create_dir_all(&source).unwrap();
        std::fs::write(source.join("Dockerfile"), "FROM scratch\n").unwrap();
        let at = |name: &str| folder.path().join(name);
        let local = LayoutStore::open(at("images"), UnpackLimits::default()).unwrap();
        let options = RegistryOptions {
            credentials: Credentials::none(),
            first_delay: Duration::from_millis(10),
            ..RegistryOptions::default()
        };
        let registries = RegistryStore::new(Layout::open(at("cache")).unwrap(), options);
        Self {
            node: Arc::new(Node::start(client.clone(), &format!("node-{namespace}")).await),
            _undertaker: Undertaker::start(Api::namespaced(client.clone(), namespace)),
            namespace: namespace.to_owned(),
            images: Arc::new(AllImages::new(local, registries)),
            client,
            folder,
        }
    }

    fn options(&self, tool: Tool) -> BuildOptions {
        let oslo = "oslo".parse().unwrap();
        BuildOptions::new(oslo, self.client.clone(), &self.namespace, tool)
    }

    fn builds(&self, set: impl FnOnce(&mut BuildOptions)) -> Arc<ClusterBuilds> {
        let mut options = self.options(Tool::BuildKit);
        set(&mut options);
        Arc::new(ClusterBuilds::new(
            options,
            Arc::new(IdleImages),
            self.images.clone(),
        ))
    }

    fn attempt(&self, request: u32) -> Attempt {
        Attempt {
            checkout: self.folder.path().join("source"),
            scratch: self.folder.path().join("scratch"),
            path: "services/web".to_owned(),
            request,
            spec: BuildSpec::default(),
            commit: SourceCommit {
                commit: commit(7),
                message: "first".into(),
                author_name: "Alice".into(),
                author_email: "alice@example.org".into(),
                committed_at: "2024-05-06T07:08:09Z".parse().unwrap(),
                url: String::new(),
            },
            url: "https://git.example.com/shop/web.git".parse().unwrap(),
            repository: "registry.example.com/shop/web".parse().unwrap(),
        }
    }

    fn start(&self, builds: &Arc<ClusterBuilds>, attempt: Attempt) -> Running {
        let (output, mut receiver) = mpsc::channel(16);
        let lines = Arc::new(Mutex::new(Vec::new()));
        let kept = lines.clone();
        tokio::spawn(async move {
            while let Some(line) = receiver.recv().await {
                kept.lock().unwrap().push(line);
            }
        });
        let handed_over = CancellationToken::new();
        let cancel = handed_over.child_token();
        let (builds, tokens) = (builds.clone(), (handed_over.clone(), cancel.clone()));
        let task = tokio::spawn(async move {
            let input = attempt.input(&tokens.0);
            builds.build(input, &output, &tokens.1).await
        });
        Running {
            handed_over,
            cancel,
            lines,
            task,
        }
    }

    fn jobs(&self) -> Api<Job> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    async fn job(&self, request: u32) -> Job {
        let list = ListParams::default().labels(&format!("{REQUEST}={request}"));
        let jobs = self.jobs();
        until("the Job is made", || async {
            jobs.list(&list).await.unwrap().items.pop()
        })
        .await
    }

    /// The pod of a Job.
    async fn pod(&self, request: u32) -> Pod {
        let list = format!("job-name={}", self.job(request).await.name_any());
        let (pods, list) = (self.pods(), ListParams::default().labels(&list));
        until("the pod is made", || async {
            pods.list(&list).await.unwrap().items.pop()
        })
        .await
    }

    /// The pod of a Job, which a node runs.
    async fn bound(&self, request: u32) -> Pod {
        let pod = self.pod(request).await;
        self.node.bind(&pod).await;
        pod
    }

    async fn play(&self, pod: &Pod, fate: &Fate) {
        Kubelet::play(&self.client, pod, fate).await;
    }

    /// Nothing is left of Jobs and pods.
    async fn empty(&self) {
        let (jobs, pods, all) = (self.jobs(), self.pods(), ListParams::default());
        until("nothing is left", || async {
            let jobs = jobs.list(&all).await.unwrap().items.len();
            let pods = pods.list(&all).await.unwrap().items.len();
            (jobs + pods == 0).then_some(())
        })
        .await;
    }
}

/// Asks again and again until there is an answer.
pub(super) async fn until<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut ask: impl FnMut() -> F,
) -> T {
    let found = tokio::time::timeout(PATIENCE, async {
        loop {
            if let Some(found) = ask().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    found
        .await
        .unwrap_or_else(|_| panic!("not in time: {what}"))
}

/// A whole life by an account that may do no more than the chart lets it.
pub(super) async fn a_build_with_the_rights_of_an_installation(
    options: BuildOptions,
    admin: Client,
) {
    let yard = Yard::of(admin, &options.namespace).await;
    let builds = ClusterBuilds::new(options, Arc::new(IdleImages), yard.images.clone());
    let builds = Arc::new(builds);
    let running = yard.start(&builds, yard.attempt(1));
    let pod = yard.bound(1).await;
    yard.node.end_in(&pod.name_any(), "source");
    yard.node.print_in(&pod.name_any(), "build", "a step");
    yard.play(&pod, &Fate::Runs).await;
    until("its lines", || async {
        running.said("a step").then_some(())
    })
    .await;
    running.cancel.cancel();
    running.failed("cancelled").await;
    yard.empty().await;
    let running = yard.start(&builds, yard.attempt(2));
    let pod = yard.pod(2).await;
    let why = Fate::Unmounted("secret \"push\" not found".to_owned());
    yard.play(&pod, &why).await;
    running.failed("build_config_missing").await;
    yard.empty().await;
    let swept = builds.sweep(&|_, _| true).await;
    assert!(swept.unwrap().is_empty());
}

fn build_id() -> BuildId {
    BuildId(uuid(77))
}

/// What a build worker hands over.
#[derive(Clone)]
struct Attempt {
    checkout: std::path::PathBuf,
    scratch: std::path::PathBuf,
    path: String,
    request: u32,
    spec: BuildSpec,
    commit: SourceCommit,
    url: RepositoryUrl,
    repository: ImageRepository,
}

impl Attempt {
    fn input<'a>(&'a self, handed_over: &'a CancellationToken) -> BuildInput<'a> {
        static SERVICE: std::sync::OnceLock<ServiceName> = std::sync::OnceLock::new();
        static PROJECT: std::sync::OnceLock<ProjectName> = std::sync::OnceLock::new();
        static TAG: std::sync::OnceLock<ImageTag> = std::sync::OnceLock::new();
        BuildInput {
            build: build_id(),
            request: self.request,
            project: PROJECT.get_or_init(|| "shop".parse().unwrap()),
            service: SERVICE.get_or_init(web),
            checkout: &self.checkout,
            path: &self.path,
            spec: &self.spec,
            commit: &self.commit,
            url: &self.url,
            scratch: &self.scratch,
            repository: &self.repository,
            tag: TAG.get_or_init(|| "0707070".parse().unwrap()),
            handed_over,
        }
    }
}

fn ends(code: i32, reason: &'static str, message: &str) -> Fate {
    Fate::Ends {
        code,
        reason,
        message: message.to_owned(),
    }
}

fn containers(job: &Job) -> Vec<Container> {
    let spec = job.spec.clone().unwrap().template.spec.unwrap();
    let first = spec.init_containers.unwrap_or_default();
    first.into_iter().chain(spec.containers).collect()
}

/// Pushes an image as the builder in the pod would, and returns its digest.
async fn push_one(yard: &Yard, attempt: &Attempt) -> Digest {
    let source = yard.folder.path().join("pushed");
    std::fs::create_dir_all(&source).unwrap();
    std::fs::write(source.join("Procfile"), "web: ./run\n").unwrap();
    std::fs::write(source.join("run"), "#!/bin/sh\n").unwrap();
    let scratch = yard.folder.path().join("pushing");
    let context = BuildContext {
        checkout: source,
        path: String::new(),
        service: web(),
        spec: BuildSpec::default(),
        url: attempt.url.clone(),
        commit: attempt.commit.commit.clone(),
        committed_at: attempt.commit.committed_at,
        build: build_id(),
        labels: BTreeMap::new(),
        output: Layout::open(yard.folder.path().join("output")).unwrap(),
    };
    let quiet = LineSender::discard();
    let builder = ArchiveBuilder::new(yard.images.clone(), scratch);
    let never = CancellationToken::new();
    let built = builder.build(&context, &quiet, &never).await.unwrap();
    let tag: ImageTag = "0707070".parse().unwrap();
    let pushed = yard.images.push(&built, &attempt.repository, &tag, &quiet);
    pushed.await.unwrap().digest
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_is_seen_from_its_first_line_to_the_image_in_the_registry() {
    let Some(registry) = Registry::start(RegistryConfig::default()) else {
        return;
    };
    let Some(yard) = Yard::new("builds-life").await else {
        return;
    };
    let mut attempt = yard.attempt(1);
    attempt.repository = format!("{}/shop/web", registry.host()).parse().unwrap();
    let builds = yard.builds(|_| {});
    let running = yard.start(&builds, attempt.clone());
    let pod = yard.pod(1).await;
    for labels in [yard.job(1).await.labels(), pod.labels()] {
        let said =
            ["project", "service"].map(|name| labels[&format!("daybook.dev/{name}")].clone());
        assert_eq!(said, ["shop", "web"]);
    }
    let why = "0/3 nodes are available: 3 Insufficient cpu.";
    yard.play(&pod, &Fate::Unschedulable(why.to_owned())).await;
    until("what it waits for", || async {
        running.said("Insufficient cpu").then_some(())
    })
    .await;
    yard.node.bind(&pod).await;
    let name = pod.name_any();
    yard.node.print_in(&name, "source", "fetching 0707");
    yard.node.end_in(&name, "source");
    yard.node
        .print_in(&name, "build", "#1 [internal] load Dockerfile");
    yard.play(&pod, &Fate::Runs).await;
    until("lines while it runs", || async {
        (running.said("fetching 0707") && running.said("load Dockerfile")).then_some(())
    })
    .await;
    // A connection that is cut loses nothing and repeats nothing.
    yard.node.cut();
    yard.node.print_in(&name, "build", "#2 exporting layers");
    until("lines after the cut", || async {
        running.said("exporting layers").then_some(())
    })
    .await;
    assert!(!running.task.is_finished());

    let digest = push_one(&yard, &attempt).await;
    yard.node.print_in(&name, "build", "#3 pushed");
    yard.node.end_in(&name, "build");
    yard.play(&pod, &ends(0, "Completed", &format!("{digest}\n")))
        .await;
    let lines = running.lines.clone();
    let built = running.ended().await.unwrap();
    assert_eq!(
        (&built.digest, built.builder.as_str()),
        (&digest, "buildkit")
    );
    assert_eq!(built.detected, "Dockerfile");
    assert!(built.size_bytes > 0);
    let lines = lines.lock().unwrap().clone();
    let of_pod = ["fetching 0707", "#1 ", "#2 ", "#3 "];
    let once = |text: &&str| lines.iter().filter(|l| l.starts_with(*text)).count() == 1;
    assert!(of_pod.iter().all(once), "{lines:#?}");

    let (output, _lines) = mpsc::channel(16);
    let tag: ImageTag = "0707070".parse().unwrap();
    let pushed = builds.push(&built, &attempt.scratch, &attempt.repository, &tag, &output);
    let pushed = pushed.await.unwrap();
    assert_eq!((&pushed.digest, &pushed.tag), (&digest, &tag));

    // A worker that was lost before it could tell finds what was made, and makes nothing again.
    let first = yard.job(1).await.uid();
    let again = yard.start(&yard.builds(|_| {}), attempt.clone());
    assert_eq!(again.ended().await.unwrap(), built);
    assert_eq!(yard.job(1).await.uid(), first);

    // What the registry does not have was not pushed.
    let gone = BuiltImage {
        digest: Digest::of(b"another"),
        ..built
    };
    let pushed = builds.push(&gone, &attempt.scratch, &attempt.repository, &tag, &output);
    assert_eq!(pushed.await.unwrap_err().code, "image_not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_build_fails_of_is_said_and_what_may_pass_leaves_no_job() {
    let Some(yard) = Yard::new("builds-failures").await else {
        return;
    };
    let builds = yard.builds(|_| {});
    let step = "ERROR: process \"/bin/sh -c make\" did not complete successfully: exit code: 2";
    let stays = [
        (ends(1, "Error", step), "dockerfile_build_failed", step),
        (ends(137, "OOMKilled", ""), "build_out_of_memory", "memory"),
    ];
    let mut request = 0;
    for (fate, code, said) in stays {
        request += 1;
        let running = yard.start(&builds, yard.attempt(request));
        let pod = yard.bound(request).await;
        yard.node.end_in(&pod.name_any(), "source");
        yard.node.end_in(&pod.name_any(), "build");
        yard.play(&pod, &fate).await;
        let error = running.failed(code).await;
        assert!(
            error.message.contains(said) && !error.retryable,
            "{error:?}"
        );
        // To be looked at, until Kubernetes removes it.
        let job = yard.job(request).await;
        assert!(job.metadata.deletion_timestamp.is_none());
        assert_eq!(job.spec.unwrap().ttl_seconds_after_finished, Some(3600));
        let delete = DeleteParams::foreground();
        let name = job.metadata.name.unwrap();
        yard.jobs().delete(&name, &delete).await.unwrap();
        yard.empty().await;
    }
    let passes = [
        (
            Fate::Unprepared(128, "fatal: unable to access".to_owned()),
            "build_source_failed",
            "unable to access",
        ),
        (
            Fate::Evicted("The node was low on resource: memory.".to_owned()),
            "build_evicted",
            "low on resource",
        ),
    ];
    for (fate, code, said) in passes {
        // The same request each time: what is tried again needs the name.
        let running = yard.start(&builds, yard.attempt(9));
        let pod = yard.bound(9).await;
        yard.node.end_in(&pod.name_any(), "source");
        yard.play(&pod, &fate).await;
        let error = running.failed(code).await;
        assert!(error.message.contains(said) && error.retryable, "{error:?}");
        yard.empty().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bursts_of_refusals_of_a_job_are_tried_again_and_make_one_job() {
    let Some(yard) = Yard::new("builds-bursts").await else {
        return;
    };
    let plane = tokio::task::spawn_blocking(ControlPlane::shared);
    let proxy = FaultProxy::start(plane.await.unwrap().unwrap()).await;
    let through = proxy.client();
    let builds = yard.builds(|options| options.client = through);
    for (code, reason) in super::faults::BURSTS {
        proxy.answer(move |method, address| {
            let write = method == "POST" && address.contains("/jobs");
            write.then(|| refusal(code, reason))
        });
        let error = yard.start(&builds, yard.attempt(1));
        let error = error.failed("build_cluster_unavailable").await;
        let says = error.message.contains(&code.to_string());
        assert!(error.retryable && says, "{error:?}");
    }
    proxy.behave();
    let running = yard.start(&builds, yard.attempt(1));
    yard.pod(1).await;
    let made = yard.jobs().list(&ListParams::default()).await.unwrap();
    assert_eq!(made.items.len(), 1);
    running.cancel.cancel();
    running.failed("cancelled").await;
    yard.empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_a_build_from_beginning_is_said_and_ends_it_in_time() {
    let Some(yard) = Yard::new("builds-stuck").await else {
        return;
    };
    let soon = |options: &mut BuildOptions| options.start_within = Duration::from_secs(1);
    let cases = [
        (
            Fate::NoImage("manifest unknown".to_owned()),
            "build_image_pull_failed",
            "manifest unknown",
        ),
        (
            Fate::Unschedulable("0/3 nodes are available".to_owned()),
            "build_unschedulable",
            "0/3 nodes",
        ),
        (
            Fate::Unmounted("MountVolume.SetUp failed: secret \"push\" not found".to_owned()),
            "build_config_missing",
            "secret \"push\" not found",
        ),
    ];
    for (fate, code, said) in cases {
        let running = yard.start(&yard.builds(soon), yard.attempt(1));
        let pod = yard.pod(1).await;
        yard.play(&pod, &fate).await;
        let lines = running.lines.clone();
        let error = running.failed(code).await;
        assert!(error.message.contains(said), "{error:?}");
        let lines = lines.lock().unwrap().clone();
        assert!(lines.iter().any(|l| l.contains(said)), "{lines:#?}");
        yard.empty().await;
    }

    let quotas: Api<ResourceQuota> = Api::namespaced(yard.client.clone(), &yard.namespace);
    let none = json!({ "metadata": { "name": "none" }, "spec": { "hard": { "pods": "0" } } });
    let none: ResourceQuota = serde_json::from_value(none).unwrap();
    quotas.create(&PostParams::default(), &none).await.unwrap();
    until("the quota counts", || async {
        let quota = quotas.get("none").await.unwrap();
        quota.status.and_then(|status| status.used).map(|_| ())
    })
    .await;
    let running = yard.start(&yard.builds(soon), yard.attempt(2));
    let error = running.failed("build_quota_exceeded").await;
    assert!(error.message.contains("exceeded quota"), "{error:?}");
    yard.empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_build_leaves_nothing_and_one_that_is_handed_over_goes_on() {
    let Some(yard) = Yard::new("builds-cancelled").await else {
        return;
    };
    // Cancelled while it runs, and before there is a pod.
    for bound in [true, false] {
        let running = yard.start(&yard.builds(|_| {}), yard.attempt(1));
        if bound {
            let pod = yard.bound(1).await;
            yard.play(&pod, &Fate::Runs).await;
        } else {
            yard.job(1).await;
        }
        running.cancel.cancel();
        running.failed("cancelled").await;
        yard.empty().await;
    }

    let running = yard.start(&yard.builds(|_| {}), yard.attempt(2));
    let pod = yard.bound(2).await;
    yard.node.end_in(&pod.name_any(), "source");
    yard.node
        .print_in(&pod.name_any(), "build", "of the first worker");
    yard.play(&pod, &Fate::Runs).await;
    until("it runs", || async {
        running.said("of the first worker").then_some(())
    })
    .await;
    running.handed_over.cancel();
    running.failed("cancelled").await;
    let uid = yard.job(2).await.uid();

    let next = yard.start(&yard.builds(|_| {}), yard.attempt(2));
    until("another worker follows it", || async {
        next.said("of the first worker").then_some(())
    })
    .await;
    assert!(next.said("is there already"));
    let job = yard.job(2).await;
    assert!(job.uid() == uid && job.metadata.deletion_timestamp.is_none());
    assert_eq!(yard.pod(2).await.uid(), pod.uid());

    // Somebody deletes it.
    let delete = DeleteParams::foreground();
    yard.jobs().delete(&job.name_any(), &delete).await.unwrap();
    next.failed("build_job_deleted").await;
    yard.empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_of_builds_that_are_over_are_swept_and_others_are_not_touched() {
    let Some(yard) = Yard::new("builds-swept").await else {
        return;
    };
    let builds = yard.builds(|_| {});
    let mut abandoned = Vec::new();
    for request in [1, 2, 3] {
        let running = yard.start(&builds, yard.attempt(request));
        let job = yard.job(request).await;
        running.handed_over.cancel();
        running.failed("cancelled").await;
        abandoned.push(job.name_any());
    }
    // The third has ended: Kubernetes removes it when its time has come.
    let pod = yard.bound(3).await;
    yard.play(&pod, &ends(1, "Error", "")).await;
    let jobs = yard.jobs();
    until("it has ended", || async {
        let job = jobs.get(&abandoned[2]).await.unwrap();
        job.status
            .filter(|status| status.failed == Some(1))
            .map(|_| ())
    })
    .await;
    // Somebody else's, one of which says that it is Daybook's.
    let theirs = |name: &str, labels: serde_json::Value| {
        let job = json!({
            "metadata": { "name": name, "labels": labels },
            "spec": { "template": { "spec": {
                "restartPolicy": "Never",
                "containers": [{ "name": "x", "image": "x" }],
            }}},
        });
        serde_json::from_value::<Job>(job).unwrap()
    };
    let taken = abandoned[0].trim_end_matches('1').to_owned() + "4";
    let foreign = [
        theirs("plain", json!({})),
        theirs(
            "copied",
            json!({ "app.kubernetes.io/managed-by": "daybook" }),
        ),
        theirs(&taken, json!({ "app": "x" })),
    ];
    for job in &foreign {
        jobs.create(&PostParams::default(), job).await.unwrap();
    }

    let nothing = builds.sweep(&|_, _| false).await.unwrap();
    assert!(nothing.is_empty());
    // Of a later request it is not known that it is over.
    let over = |id: BuildId, request: u32| id == build_id() && request != 2;
    let swept = builds.sweep(&over).await.unwrap();
    assert_eq!(swept, [abandoned[0].clone()]);
    until("it is gone", || async {
        jobs.get_opt(&abandoned[0])
            .await
            .unwrap()
            .is_none()
            .then_some(())
    })
    .await;
    let refused = yard.start(&builds, yard.attempt(4));
    refused.failed("build_job_foreign").await;
    for name in [&abandoned[1], &abandoned[2], "plain", "copied", &taken] {
        let job = jobs.get(name).await.unwrap();
        assert!(job.metadata.deletion_timestamp.is_none(), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_missing_is_named() {
    let Some(yard) = Yard::new("builds-rights").await else {
        return;
    };
    let plane = tokio::task::spawn_blocking(ControlPlane::shared);
    let plane = plane.await.unwrap().unwrap();
    let config = kube::config::Kubeconfig::read_from(plane.kubeconfig()).unwrap();
    let all = kube::config::KubeConfigOptions::default();
    let config = kube::Config::from_custom_kubeconfig(config, &all).await;
    let mut config = config.unwrap();
    config.auth_info.impersonate = Some("builder".to_owned());
    let limited = Client::try_from(config).unwrap();
    let builds = yard.builds(|options| options.client = limited);
    let error = yard.start(&builds, yard.attempt(1));
    let error = error.failed("build_forbidden").await;
    let said = "cannot create resource \"jobs\" in API group \"batch\"";
    assert!(
        error.message.contains(said) && !error.retryable,
        "{error:?}"
    );

    // Jobs, and nothing else: what was made is not left behind.
    let roles: Api<k8s_openapi::api::rbac::v1::Role> =
        Api::namespaced(yard.client.clone(), &yard.namespace);
    let role = json!({ "metadata": { "name": "builder" }, "rules": [{
        "apiGroups": ["batch"],
        "resources": ["jobs"],
        "verbs": ["create", "get", "list", "watch", "delete"],
    }]});
    let role = serde_json::from_value(role).unwrap();
    roles.create(&PostParams::default(), &role).await.unwrap();
    let bindings: Api<k8s_openapi::api::rbac::v1::RoleBinding> =
        Api::namespaced(yard.client.clone(), &yard.namespace);
    let binding = json!({
        "metadata": { "name": "builder" },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "builder" },
        "subjects": [{ "kind": "User", "name": "builder" }],
    });
    let binding = serde_json::from_value(binding).unwrap();
    bindings
        .create(&PostParams::default(), &binding)
        .await
        .unwrap();
    until("the right to make Jobs counts", || async {
        builds.sweep(&|_, _| false).await.ok()
    })
    .await;
    let error = yard.start(&builds, yard.attempt(1));
    let error = error.failed("build_forbidden").await;
    let said = [
        "cannot list resource \"pods\"",
        "cannot list resource \"events\"",
    ];
    assert!(said.iter().any(|s| error.message.contains(s)), "{error:?}");
    yard.empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_takes_every_job_as_it_is_written() {
    let Some(yard) = Yard::new("builds-taken").await else {
        return;
    };
    // What forbids more than what is known to be harmful takes Kaniko, too.
    let strict = Yard::with("builds-strict", "baseline").await.unwrap();
    let nothing = CancellationToken::new();
    let with_secrets = |options: &mut BuildOptions| {
        options.registry_secret = Some("push".to_owned());
        options.git_secret = Some("fetch".to_owned());
    };
    let mut planned = yard.attempt(1);
    planned.path = String::new();
    let attempts = [
        (&yard, Tool::BuildKit, yard.attempt(1)),
        (&yard, Tool::BuildKit, planned),
        (&strict, Tool::Kaniko, strict.attempt(1)),
    ];
    for (yard, tool, attempt) in attempts {
        let mut options = yard.options(tool);
        with_secrets(&mut options);
        let builds = ClusterBuilds::new(options, Arc::new(IdleImages), yard.images.clone());
        let job = builds.job(&attempt.input(&nothing)).unwrap();
        let text = serde_json::to_string(&job).unwrap();
        assert!(!text.contains("password"), "{text}");
        let name = job.name_any();
        let params = PatchParams::apply("daybook").validation_strict().dry_run();
        let patch = Patch::Apply(&job);
        let taken = yard.jobs().patch(&name, &params, &patch).await.unwrap();
        let pod = taken.spec.unwrap().template;
        // Pods are what security is asked of.
        let body = json!({
            "metadata": { "name": name, "labels": pod.metadata.unwrap().labels },
            "spec": pod.spec,
        });
        let body: Pod = serde_json::from_value(body).unwrap();
        let dry_run = PostParams {
            dry_run: true,
            ..PostParams::default()
        };
        yard.pods().create(&dry_run, &body).await.unwrap();

        let spec = job.spec.as_ref().unwrap();
        assert_eq!(spec.backoff_limit, Some(0));
        assert_eq!(spec.active_deadline_seconds, Some(3600));
        let containers = containers(&job);
        let mounts = |volume: &str| {
            let mut with = containers
                .iter()
                .filter(|c| c.volume_mounts.iter().flatten().any(|m| m.name == volume));
            (with.next().map(|c| c.name.clone()), with.count())
        };
        // Each credential is seen where it is needed, and nowhere else.
        assert_eq!(mounts("git"), (Some("source".to_owned()), 0));
        assert_eq!(mounts("registry"), (Some("build".to_owned()), 0));
        let security = containers.last().unwrap().security_context.clone().unwrap();
        assert_ne!(security.privileged, Some(true));
        assert_eq!(
            security.run_as_user,
            Some(match tool {
                Tool::BuildKit => 1000,
                Tool::Kaniko => 0,
            })
        );
        let names: Vec<_> = containers.iter().map(|c| c.name.as_str()).collect();
        match attempt.path.as_str() {
            "" => assert_eq!(names, ["source", "plan", "build"]),
            _ => assert_eq!(names, ["source", "build"]),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_cluster_can_build_is_refused_before_anything_is_made() {
    let Some(yard) = Yard::new("builds-refused").await else {
        return;
    };
    let kaniko = yard.builds(|options| options.tool = Tool::Kaniko);
    let buildkit = yard.builds(|_| {});
    let change = |set: &dyn Fn(&mut Attempt)| {
        let mut attempt = yard.attempt(1);
        set(&mut attempt);
        attempt
    };
    let cases = [
        (
            &kaniko,
            change(&|a| a.path = String::new()),
            "dockerfile_missing",
        ),
        (
            &buildkit,
            change(&|a| a.spec.dockerfile = Some("Other".to_owned())),
            "dockerfile_missing",
        ),
        (
            &buildkit,
            change(&|a| a.path = "nowhere".to_owned()),
            "source_path_missing",
        ),
        (
            &buildkit,
            change(&|a| a.repository = "local.daybook/shop/web".parse().unwrap()),
            "image_not_pushable",
        ),
        (
            &buildkit,
            change(&|a| a.url = "ssh://git@git.example.com/web".parse().unwrap()),
            "source_not_in_reach",
        ),
        (
            &buildkit,
            change(&|a| a.url = "/srv/git/web".parse().unwrap()),
            "source_not_in_reach",
        ),
        (
            &buildkit,
            change(&|a| a.url = "https://uploads.daybook/shop/web.git".parse().unwrap()),
            "upload_out_of_reach",
        ),
    ];
    for (builds, attempt, code) in cases {
        yard.start(builds, attempt).failed(code).await;
    }
    // A source that was uploaded is fetched from where Daybook is for the cluster.
    let told = yard.builds(|options| options.uploads = Some("http://daybook:7070/".to_owned()));
    let mut uploaded = yard.attempt(1);
    uploaded.url = "https://uploads.daybook/shop/web.git".parse().unwrap();
    let job = told
        .job(&uploaded.input(&CancellationToken::new()))
        .unwrap();
    let fetches = containers(&job).remove(0).env.unwrap();
    let url = fetches.into_iter().find(|v| v.name == "URL").unwrap().value;
    let expected = "http://daybook:7070/uploads/shop/web.git";
    assert_eq!(url.as_deref(), Some(expected));
    // The archive builder needs no cluster.
    let archive = change(&|a| a.spec.builder = BuilderKind::Archive);
    let built = yard.start(&buildkit, archive).ended().await.unwrap();
    assert_eq!(built.builder, "idle");
    assert!(
        yard.jobs()
            .list(&ListParams::default())
            .await
            .unwrap()
            .items
            .is_empty()
    );
    let nowhere = yard.builds(|options| options.namespace = "builds-nowhere".to_owned());
    let error = yard.start(&nowhere, yard.attempt(1));
    error.failed("build_namespace_missing").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scripts_of_the_containers_do_what_they_say() {
    let Some(yard) = Yard::new("builds-scripts").await else {
        return;
    };
    let builds = yard.builds(|options| options.git_secret = Some("fetch".to_owned()));
    let nothing = CancellationToken::new();
    let job = builds.job(&yard.attempt(1).input(&nothing)).unwrap();
    let all = containers(&job);
    let script = |n: usize| all[n].command.clone().unwrap()[2].clone();

    // The source, from a server that asks for a password: the commit, and not what came after it.
    let source = SourceRepository::new();
    let first = source.commit("first", &[("a", "1"), ("deep/b", "2")]);
    source.commit("second", &[("a", "3")]);
    let server = GitHttpServer::start(source.path().parent().unwrap()).await;
    server.require("alice", "correct horse");
    let name = source.path().file_name().unwrap().to_str().unwrap();
    let url = server.url(&format!("{name}/.git"));
    let at = |name: &str| yard.folder.path().join(name);
    let stored = |host: &str| format!("http://alice:correct%20horse@{host}\n");
    std::fs::write(at("credentials"), stored(&server.address().to_string())).unwrap();
    std::fs::write(at("others"), stored("git.example.com")).unwrap();
    let fetch = |credentials: &str, into: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", &script(0)]).env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap());
        command.env("HOME", yard.folder.path()).env("URL", &url);
        command.env("COMMIT", &first).env("INTO", at(into));
        command.env("GIT_CREDENTIALS", at(credentials));
        command
    };
    let (mut right, mut wrong) = (fetch("credentials", "right"), fetch("others", "wrong"));
    let run = tokio::task::spawn_blocking(move || (right.output(), wrong.output()));
    let (right, wrong) = run.await.unwrap();
    let right = right.unwrap();
    assert!(
        right.status.success(),
        "{}",
        String::from_utf8_lossy(&right.stderr)
    );
    assert_eq!(std::fs::read_to_string(at("right/a")).unwrap(), "1");
    assert_eq!(std::fs::read_to_string(at("right/deep/b")).unwrap(), "2");
    assert!(!at("right/.git").exists());
    assert!(!wrong.unwrap().status.success());

    // The digest, out of what BuildKit leaves, and a failure is one.
    let digest = Digest::of(b"image");
    let metadata = json!({
        "containerimage.config.digest": Digest::of(b"config"),
        "containerimage.descriptor": { "digest": Digest::of(b"descriptor") },
        "containerimage.digest": digest,
    });
    let fake = format!(
        "#!/bin/sh\nfor last; do :; done\ncat > \"$last\" <<'X'\n{metadata:#}\nX\n[ \"$2\" != fail ]\n"
    );
    let tool = at("buildctl-daemonless.sh");
    std::fs::write(&tool, fake).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&tool, mode).unwrap();
    let build = |what: &str, into: &str| {
        let mut path = yard.folder.path().as_os_str().to_owned();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap());
        let mut command = Command::new("sh");
        command.args(["-c", &script(1), "build", "build", what]);
        command.env("PATH", path).env("METADATA", at("metadata"));
        command.env("DIGEST", at(into)).status().unwrap()
    };
    assert!(build("work", "digest").success());
    let left = std::fs::read_to_string(at("digest")).unwrap();
    assert_eq!(left, format!("{digest}\n"));
    assert!(!build("fail", "none").success());
    assert!(!at("none").exists());
    assert_eq!(job.metadata.labels.unwrap()[BUILD], build_id().to_string());
}
