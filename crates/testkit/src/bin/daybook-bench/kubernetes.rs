//! Clusters as targets, on the real binary and a real API server, whose kubelets and Argo CD are
//! played: how long it takes from what a kubelet or Argo CD writes to the event in the ledger, what
//! it takes to follow many Applications, and what an environment that is as it is to be is asked.
//!
//! Times are from before the request that writes until somebody who follows the ledger over HTTP
//! has the event, which is stored by then. What is asked of the API server is counted at a proxy;
//! times and memory are those of a process that reaches it over TLS, as anybody does.

mod feed;
mod stage;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use daybook_testkit::kubernetes::argocd::{self, ArgoCd};
use daybook_testkit::kubernetes::proxy::Asked;
use daybook_testkit::kubernetes::{Crd, Fate, Kubelet, Node};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Service};
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

use crate::report::{Comparison, Report};
use crate::switch::{Server, percentile};
use crate::{Failure, idle};
use feed::{Feed, has_problem};
use stage::{Stage, Taken, Through, pods_change};

/// What is promised of the 99th percentile, in milliseconds.
const PROMISED_MS: f64 = 250.0;
/// What is promised of the memory of a process that follows many Applications.
const PROMISED_MB: f64 = 150.0;
/// Environments of one project.
const A_PROJECT: usize = 50;
/// Service instances whose pods change one after the other.
const CHANGING: usize = 10;
const ARGOCD: &str = "argocd";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Changes of each kind in each round
    #[arg(long, default_value_t = 200)]
    patches: usize,
    /// Rounds; the median of their 99th percentiles counts
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Applications in one cluster; none leaves that part out
    #[arg(long, default_value_t = 500)]
    applications: usize,
    /// Seconds in which nothing changes and what is asked for is counted
    #[arg(long, default_value_t = 60)]
    quiet: u64,
    /// The program; the one beside this one if it is not named
    #[arg(long, value_name = "FILE")]
    daybook: Option<PathBuf>,
    /// Where the data folders are meanwhile
    #[arg(long)]
    folder: Option<PathBuf>,
}

pub(crate) async fn run(options: Options) -> Result<Report, Failure> {
    // A socket for each pod whose output is followed, here and in the servers, which inherit this.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    )?;
    let program = idle::program(options.daybook.as_deref())?;
    let mut stage = Stage::start(program, options.folder.as_deref()).await?;
    let mut comparisons = Vec::new();
    direct(&options, &mut stage, &mut comparisons).await?;
    if options.applications > 0 {
        applications(&options, &stage, &mut comparisons).await?;
    }
    Ok(Report {
        title: format!(
            "From what is written about a pod or an Application to the event in the ledger, {} \
             changes a round; what {} Applications take; what unchanged environments are asked",
            options.patches, options.applications
        ),
        unit: "1000/figure",
        notes: vec![
            "Times are from before the request that writes until a subscriber over HTTP has the \
             event."
                .to_owned(),
        ],
        comparisons,
    })
}

/// Daybook applies: pods that change, and what comes of applying again.
async fn direct(
    options: &Options,
    stage: &mut Stage,
    comparisons: &mut Vec<Comparison>,
) -> Result<(), Failure> {
    say("pods of a cluster without Argo CD");
    let kubelet = Kubelet::start(stage.client.clone(), None, |_| running());
    let any = "127.0.0.1:0";
    let server = stage.daybook("direct", Through::Tls, any, &[]).await?;
    stage.build(&server).await?;
    stage.define(&server, "direct").await?;
    stage.environment(&server, "direct", "production").await?;
    let mut deployments = Vec::new();
    for n in 0..CHANGING {
        let service = format!("web-{n}");
        stage
            .service(&server, "direct", &service, &Value::Null)
            .await?;
        let instance = format!("direct.production.{service}");
        deployments.push(stage.deploy(&server, &instance).await?);
    }
    for id in &deployments {
        stage.reached(&server, id, &["started"]).await?;
    }
    drop(kubelet);
    let pods = stage.pods(&deployments).await?;
    let pods: Vec<_> = deployments.into_iter().zip(pods).collect();
    let mut feed = Feed::open(&server.url).await?;
    let mut rounds = Vec::new();
    for _ in 0..options.rounds {
        let changes = pods_change(&stage.client, &mut feed, &pods, options.patches);
        rounds.push(changes.await?);
    }
    of_pods("directly applied", rounds, comparisons);
    drop(feed);
    server.stop().await?;

    say("environments that are as they are to be");
    let before = versions(stage).await?;
    stage.proxy.take_asked();
    let server = stage.daybook("direct", Through::Proxy, any, &[]).await?;
    let asked = stage.calm().await?;
    let is_looked_at = |a: &Asked| a.path().ends_with("/namespaces/direct--production/secrets");
    if !asked.iter().any(is_looked_at) {
        return Err("it was not applied again".into());
    }
    let writes = count(&asked, Asked::is_write);
    let differs = versions(stage).await? != before;
    comparisons.push(none_of(
        format!(
            "{} writes in {} requests when a new process applies {} service instances again \
             (resource versions {})",
            writes,
            asked.len(),
            CHANGING + 1,
            if differs { "DIFFER" } else { "are the same" }
        ),
        writes + usize::from(differs),
    ));
    server.stop().await?;
    // They are no part of what follows.
    let namespaces = ["source--production", "direct--production"];
    stage.clear(&namespaces).await
}

/// What is written of an environment, in which version.
async fn versions(stage: &Stage) -> Result<BTreeMap<String, Option<String>>, Failure> {
    let (client, list) = (&stage.client, ListParams::default());
    let namespace = "direct--production";
    let mut all = BTreeMap::new();
    let spaces: Api<Namespace> = Api::all(client.clone());
    all.insert(
        "namespace".to_owned(),
        spaces.get(namespace).await?.resource_version(),
    );
    let workloads: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    for o in workloads.list(&list).await? {
        // The controller writes the status of it.
        let version = o.metadata.generation.map(|g| g.to_string());
        all.insert(format!("deployment {}", o.name_any()), version);
    }
    let services: Api<Service> = Api::namespaced(client.clone(), namespace);
    for o in services.list(&list).await? {
        all.insert(format!("service {}", o.name_any()), o.resource_version());
    }
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    for o in maps.list(&list).await? {
        all.insert(format!("map {}", o.name_any()), o.resource_version());
    }
    Ok(all)
}

/// Argo CD applies: many Applications, followed.
async fn applications(
    options: &Options,
    stage: &Stage,
    comparisons: &mut Vec<Comparison>,
) -> Result<(), Failure> {
    let client = &stage.client;
    if !Crd::Application.install(client).await {
        return Err("there is no definition of Applications".into());
    }
    let space = serde_json::from_value(json!({ "metadata": { "name": ARGOCD } }))?;
    let spaces: Api<Namespace> = Api::all(client.clone());
    spaces.create(&PostParams::default(), &space).await?;
    let port = daybook_testkit::free_port();
    let listen = format!("127.0.0.1:{port}");
    let arguments = [
        "--argocd".to_owned(),
        ARGOCD.to_owned(),
        "--argocd-repositories".to_owned(),
        format!("http://{listen}/git"),
    ];
    stage.proxy.take_asked();
    let server = stage
        .daybook("argocd", Through::Proxy, &listen, &arguments)
        .await?;
    let helm = argocd::helm_program().ok_or("there is no helm")?;
    let controller = ArgoCd::start(client.clone(), ARGOCD, argocd::helm(helm));
    // The pod of the last one is never done, so that what Argo CD says of it counts.
    let (unready, names) = names(options.applications);
    let of_unready = application(&unready);
    let kubelet = Kubelet::start(client.clone(), None, move |pod: &Pod| {
        match pod.namespace().as_deref() == Some(&of_unready) {
            true => Fate::Creating,
            false => running(),
        }
    });
    say(&format!("{} Applications come to be", names.len()));
    let begun = Instant::now();
    let deployments = deploy_all(stage, &server, &names).await?;
    say(&format!("they run after {:.0?}", begun.elapsed()));
    drop(controller);
    drop(kubelet);
    let all_pods = stage.pods(&deployments).await?;
    let node = Node::start(client.clone(), "node-of-many").await;
    for pod in &all_pods {
        node.bind(pod).await;
        node.print(&pod.name_any(), "begun");
    }

    say("nothing changes");
    let asked = stage.calm().await?;
    let refreshed = count(&asked, Asked::is_write);
    say(&format!(
        "{} requests so far, {refreshed} of them writes",
        asked.len()
    ));
    tokio::time::sleep(Duration::from_secs(options.quiet)).await;
    let mut asked = stage.proxy.take_asked();
    asked.retain(|a| !a.is_watch());
    for asked in asked.iter().take(10) {
        say(&format!("asked while nothing changes: {asked:?}"));
    }
    comparisons.push(none_of(
        format!(
            "{} requests in {} s in which nothing changes in {} Applications",
            asked.len(),
            options.quiet,
            names.len()
        ),
        asked.len(),
    ));
    let watches = stage.proxy.open_watches();
    let listed = watches.iter().map(|(kind, open)| format!("{open} {kind}"));
    let listed: Vec<_> = listed.collect();
    let most = watches.values().max().copied().unwrap_or_default();
    comparisons.push(Comparison {
        subject: format!("watches: {}", listed.join(", ")),
        yardstick: "one a kind",
        measured: vec![1000.0 / figure(most)],
        against: vec![1000.0],
        limit: Some(1.0),
    });
    memory(
        &server,
        "the process that deployed them all",
        comparisons,
        false,
    )?;
    server.stop().await?;

    say("a new process takes them over");
    let server = stage
        .daybook("argocd", Through::Proxy, &listen, &arguments)
        .await?;
    let asked = stage.calm().await?;
    let writes = count(&asked, Asked::is_write);
    let of: BTreeSet<_> = asked.iter().filter(|a| a.is_write()).take(5).collect();
    for asked in of {
        say(&format!("written: {asked:?}"));
    }
    comparisons.push(none_of(
        format!(
            "{writes} writes in {} requests when a new process takes over {} Applications",
            asked.len(),
            names.len()
        ),
        writes,
    ));
    server.stop().await?;
    let server = stage
        .daybook("argocd", Through::Tls, &listen, &arguments)
        .await?;
    tokio::time::sleep(Duration::from_secs(options.quiet)).await;
    memory(&server, "a process that follows them", comparisons, true)?;

    say("pods and Applications change");
    let mut feed = Feed::open(&server.url).await?;
    let changing = deployments.iter().cloned().zip(all_pods);
    let changing: Vec<_> = changing.take(CHANGING).collect();
    let (mut rounds, mut healths, mut syncs) = (Vec::new(), Vec::new(), Vec::new());
    let late = format!("{}.late.web", project(0));
    stage.environment(&server, &project(0), "late").await?;
    let late_id = stage.deploy(&server, &late).await?;
    stage.reached(&server, &late_id, &["deploying"]).await?;
    let unready_id = deployments.last().ok_or("there is no Application")?;
    let of_many = Changing {
        stage,
        patches: options.patches,
    };
    of_many.exists(&late).await?;
    for _ in 0..options.rounds {
        let changes = pods_change(client, &mut feed, &changing, options.patches);
        rounds.push(changes.await?);
        healths.push(of_many.health(&mut feed, &unready, unready_id).await?);
        syncs.push(of_many.sync(&mut feed, &late, &late_id).await?);
    }
    of_pods(
        &format!("among {} Applications", names.len()),
        rounds,
        comparisons,
    );
    comparisons.push(promised("Argo CD's word on a sync", syncs));
    comparisons.push(promised("Argo CD's word on health", healths));
    memory(&server, "the same after that", comparisons, true)?;
    server.stop().await
}

fn project(n: usize) -> String {
    format!("shop-{}", n / A_PROJECT)
}

/// The service instances, and the last of them.
fn names(applications: usize) -> (String, Vec<String>) {
    let names: Vec<_> = (0..applications)
        .map(|n| format!("{}.e{n}.web", project(n)))
        .collect();
    (names.last().cloned().unwrap_or_default(), names)
}

async fn deploy_all(
    stage: &Stage,
    server: &Server,
    names: &[String],
) -> Result<Vec<String>, Failure> {
    let mut deployments = Vec::new();
    for (n, instance) in names.iter().enumerate() {
        let project = project(n);
        if n % A_PROJECT == 0 {
            let body = json!({ "name": project });
            server
                .ask(reqwest::Method::POST, "/api/v1/projects", body)
                .await?;
            stage.service(server, &project, "web", &Value::Null).await?;
        }
        stage
            .environment(server, &project, &format!("e{n}"))
            .await?;
        deployments.push(stage.deploy(server, instance).await?);
    }
    for (n, id) in deployments.iter().enumerate() {
        let is_last = n + 1 == deployments.len();
        let state = if is_last { "deploying" } else { "started" };
        stage.reached(server, id, &[state]).await?;
        if n % 50 == 49 {
            say(&format!("{} run", n + 1));
        }
    }
    if let Some(last) = deployments.last() {
        // Argo CD has to have synced it.
        let pods = async {
            while stage.pods(std::slice::from_ref(last)).await.is_err() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(600), pods).await?;
    }
    Ok(deployments)
}

/// What Argo CD says of Applications.
struct Changing<'a> {
    stage: &'a Stage,
    patches: usize,
}

impl Changing<'_> {
    fn api(&self) -> Api<DynamicObject> {
        let kind = GroupVersionKind::gvk("argoproj.io", "v1alpha1", "Application");
        let client = self.stage.client.clone();
        Api::namespaced_with(client, ARGOCD, &ApiResource::from_gvk(&kind))
    }

    async fn exists(&self, instance: &str) -> Result<(), Failure> {
        let name = application(instance);
        let there = kube::runtime::wait::await_condition(
            self.api(),
            &name,
            |found: Option<&DynamicObject>| found.is_some(),
        );
        tokio::time::timeout(Duration::from_secs(60), there).await??;
        Ok(())
    }

    /// Says of one, again and again, that its workload is not well.
    async fn health(&self, feed: &mut Feed, instance: &str, id: &str) -> Result<Vec<f64>, Failure> {
        let workload = format!("web-{}", &id[id.len() - 8..]);
        let status = |words: &str| {
            json!({ "resources": [{
                "group": "apps",
                "version": "v1",
                "kind": "Deployment",
                "namespace": application(instance),
                "name": workload,
                "status": "Synced",
                "health": { "status": "Degraded", "message": words },
            }]})
        };
        self.say_often(feed, instance, id, "Degraded", status).await
    }

    /// Says of one that is not synced, again and again, that it cannot be.
    async fn sync(&self, feed: &mut Feed, instance: &str, id: &str) -> Result<Vec<f64>, Failure> {
        let found = self.api().get(&application(instance)).await?;
        let source = found.data["spec"]["source"].clone();
        let destination = found.data["spec"]["destination"].clone();
        let status = |words: &str| {
            json!({
                "sync": {
                    "status": "Unknown",
                    "comparedTo": { "source": source, "destination": destination },
                },
                "conditions": [{ "type": "ComparisonError", "message": words }],
            })
        };
        self.say_often(feed, instance, id, "SyncPending", status)
            .await
    }

    async fn say_often(
        &self,
        feed: &mut Feed,
        instance: &str,
        id: &str,
        reason: &str,
        status: impl Fn(&str) -> Value,
    ) -> Result<Vec<f64>, Failure> {
        let (api, name) = (self.api(), application(instance));
        let mut taken = Vec::new();
        for n in 0..self.patches {
            feed.forget();
            let words = format!("for the {n}th time since {}", api_time());
            let patch = Patch::Merge(json!({ "status": status(&words) }));
            let params = PatchParams::default();
            let begun = Instant::now();
            let (came, patched) = tokio::join!(
                feed.observed(id, |seen| has_problem(seen, reason, &words)),
                api.patch(&name, &params, &patch)
            );
            patched?;
            taken.push(came?.duration_since(begun).as_secs_f64() * 1000.0);
        }
        Ok(taken)
    }
}

/// So that no two rounds say the same.
fn api_time() -> u128 {
    let now = std::time::SystemTime::now();
    let since = now.duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis())
}

/// The name of a service instance's Application, which is that of its namespace.
fn application(instance: &str) -> String {
    let mut parts = instance.split('.');
    let (project, environment) = (parts.next(), parts.next());
    format!(
        "{}--{}",
        project.unwrap_or_default(),
        environment.unwrap_or_default()
    )
}

fn running() -> Fate {
    Fate::Ready {
        ip: "127.0.0.1".to_owned(),
    }
}

fn count(asked: &[Asked], is: impl Fn(&Asked) -> bool) -> usize {
    asked.iter().filter(|a| is(a)).count()
}

fn figure(count: usize) -> f64 {
    u32::try_from(count).map_or(f64::INFINITY, f64::from)
}

/// Something that there is to be none of.
fn none_of(subject: String, found: usize) -> Comparison {
    Comparison {
        subject,
        yardstick: "none",
        measured: vec![1000.0 / (1.0 + figure(found))],
        against: vec![1000.0],
        limit: Some(1.0),
    }
}

fn of_pods(where_to: &str, rounds: Vec<Taken>, comparisons: &mut Vec<Comparison>) {
    let (mut ready, mut diagnosis, mut recovery) = (Vec::new(), Vec::new(), Vec::new());
    for round in rounds {
        ready.push(round.ready);
        diagnosis.push(round.diagnosis);
        recovery.push(round.recovery);
    }
    comparisons.push(promised(&format!("a pod is ready, {where_to}"), ready));
    let subject = format!("its image cannot be pulled, {where_to}");
    comparisons.push(promised(&subject, diagnosis));
    comparisons.push(promised(
        &format!("it is ready again, {where_to}"),
        recovery,
    ));
}

fn promised(subject: &str, mut rounds: Vec<Vec<f64>>) -> Comparison {
    let mut all: Vec<f64> = rounds.iter().flatten().copied().collect();
    let p99s: Vec<f64> = rounds.iter_mut().map(|r| percentile(r, 99)).collect();
    Comparison {
        subject: format!(
            "{subject} (p50 {:.1} ms, p99 {:.1} ms, longest {:.1} ms)",
            percentile(&mut all, 50),
            percentile(&mut all, 99),
            percentile(&mut all, 100),
        ),
        yardstick: "250 ms",
        measured: p99s.iter().map(|ms| 1000.0 / ms).collect(),
        against: p99s.iter().map(|_| 1000.0 / PROMISED_MS).collect(),
        limit: Some(1.0),
    }
}

/// What a process takes, in megabytes: now, and at most since it began.
fn memory(
    server: &Server,
    which: &str,
    comparisons: &mut Vec<Comparison>,
    is_promised: bool,
) -> Result<(), Failure> {
    let status = idle::status_of(&server.child)?;
    let megabytes = |name| Ok::<_, Failure>(idle::mib(&status, name)? * 1.048_576);
    let (now, most) = (megabytes("VmRSS")?, megabytes("VmHWM")?);
    let anonymous = megabytes("RssAnon")?;
    comparisons.push(Comparison {
        subject: format!(
            "{which}: {now:.0} MB ({anonymous:.0} MB of it anonymous), {most:.0} MB at most"
        ),
        yardstick: "150 MB",
        measured: vec![1000.0 / most],
        against: vec![1000.0 / PROMISED_MB],
        limit: is_promised.then_some(1.0),
    });
    Ok(())
}

/// What goes on, for whoever waits.
fn say(what: &str) {
    eprintln!("{what}");
}
