//! The local target with real processes.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use daybook_events::EnvKey;
use daybook_testkit::{TestApp, free_addr};
use daybook_workers::gateway::{Backend, ClusterPolicy, Gateway, Route, RouteTable};
use daybook_workers::local::{LocalCluster, OpenError, Workloads};
use daybook_workers::target::{Target, TargetError};
use support::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_release_runs_answers_and_is_known_by_its_revision() {
    let bench = Bench::new().await;
    let cluster = bench.cluster().await;
    let id = deployment();
    let mut values = bench.release(&["--text", "one"]);
    values.run.replicas = 2;
    let key = EnvKey::parse("COLOUR").unwrap();
    values.run.env.insert(key, "blue".into());
    let mut status = apply(&cluster, 1, &[(id, &values)]).await;
    let seen = wait_ready(&mut status, id, 2).await;
    assert_eq!(
        (seen.revision, seen.wanted, seen.problem),
        (commit(1), 2, None)
    );
    assert_ne!(seen.instances[0].address, seen.instances[1].address);
    for instance in &seen.instances {
        assert_eq!(get(&instance.address, "/").await.unwrap(), "one");
        let env = get(&instance.address, "/env").await.unwrap();
        let port = instance.address.rsplit(':').next().unwrap();
        for expected in [
            "COLOUR=blue".to_owned(),
            "HOST=127.0.0.1".into(),
            format!("PORT={port}"),
            "DAYBOOK_PROJECT=shop".into(),
            "DAYBOOK_ENVIRONMENT=production".into(),
            "DAYBOOK_SERVICE=web".into(),
            "DAYBOOK_CLUSTER=one".into(),
            format!("DAYBOOK_DEPLOYMENT={id}"),
        ] {
            assert!(
                env.lines().any(|l| l == expected),
                "{expected} is not in {env}"
            );
        }
        // Nothing of the environment of Daybook itself, such as what cargo has set here.
        assert!(!env.contains("CARGO"), "{env}");
    }
    // Applying the same again changes nothing.
    let before = processes_of(id);
    apply(&cluster, 1, &[(id, &values)]).await;
    apply(&cluster, 2, &[(id, &values)]).await;
    let seen = wait_ready(&mut status, id, 2).await;
    assert_eq!(seen.revision, commit(2));
    assert_eq!(processes_of(id), before);
    // Another cluster's releases are none of its business.
    values.clusters = vec![daybook_events::ClusterName::parse("two").unwrap()];
    apply(&cluster, 3, &[(id, &values)]).await;
    wait_gone(&mut status, id).await;
    assert!(processes_of(id).is_empty());
    cluster.shutdown(Workloads::Stop).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_come_and_go_and_zero_keeps_the_release() {
    let bench = Bench::new().await;
    let cluster = bench.cluster().await;
    let id = deployment();
    let mut values = bench.release(&[]);
    let mut status = apply(&cluster, 1, &[(id, &values)]).await;
    let first = wait_ready(&mut status, id, 1).await.instances[0].clone();
    for (revision, count) in [(2, 3), (3, 1)] {
        values.run.replicas = count;
        apply(&cluster, revision, &[(id, &values)]).await;
        let seen = wait_ready(&mut status, id, count).await;
        assert_eq!(seen.instances[0], first, "the first one was not touched");
    }
    values.run.replicas = 0;
    apply(&cluster, 4, &[(id, &values)]).await;
    let seen = wait_ready(&mut status, id, 0).await;
    assert_eq!((seen.wanted, seen.problem), (0, None));
    assert!(processes_of(id).is_empty());

    values.run.replicas = 1;
    apply(&cluster, 5, &[(id, &values)]).await;
    wait_ready(&mut status, id, 1).await;
    // Removed: its processes, its files and the image that only it has used.
    let other = deployment();
    let mut others = bench.release(&[]);
    others.image = bench.image("v2");
    apply(&cluster, 6, &[(other, &others)]).await;
    wait_gone(&mut status, id).await;
    assert!(processes_of(id).is_empty());
    wait_ready(&mut status, other, 1).await;
    let names = |folder: &str| -> Vec<String> {
        let path = bench.dir.path().join("cluster").join(folder);
        let entries = std::fs::read_dir(path).unwrap().flatten();
        entries
            .map(|e| e.file_name().into_string().unwrap())
            .collect()
    };
    assert_eq!(names("releases"), [other.to_string()]);
    assert_eq!(names("images"), [others.image.digest.hex()]);
    cluster.shutdown(Workloads::Stop).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_run_says_why() {
    let bench = Bench::new().await;
    let cluster = bench.cluster().await;
    let mut missing = bench.release(&[]);
    missing.image.digest = daybook_events::Digest::of(b"no such image");
    let mut unknown = bench.release(&[]);
    unknown.run.command = vec!["no-such-program".into()];
    let mut silent = bench.release(&["--silent"]);
    silent.run.health.deadline_seconds = 1;
    let mut unhealthy = bench.release(&["--unhealthy"]);
    unhealthy.run.health.deadline_seconds = 1;
    let elsewhere_port = free_addr().port().to_string();
    let mut elsewhere = bench.release(&["--port", &elsewhere_port]);
    elsewhere.run.health.deadline_seconds = 1;
    let mut no_path = bench.release(&[]);
    no_path.run.health.path = "health".into();
    let cases = [
        (missing, "ImagePullBackOff", "does not exist"),
        (unknown, "StartError", "no-such-program"),
        (
            bench.release(&["--exit", "7"]),
            "CrashLoopBackOff",
            "exited with code 7",
        ),
        (
            bench.release(&["--exit", "7"]),
            "CrashLoopBackOff",
            "exiting as told",
        ),
        (silent, "ReadinessProbeFailed", "nothing listens on port"),
        (unhealthy, "ReadinessProbeFailed", "503"),
        (elsewhere, "ReadinessProbeFailed", &elsewhere_port),
        (no_path, "ReadinessProbeFailed", "is not a path"),
    ];
    let cases: Vec<_> = cases.into_iter().map(|c| (deployment(), c)).collect();
    let releases: Vec<_> = cases
        .iter()
        .map(|(id, (values, ..))| (*id, values))
        .collect();
    let mut status = apply(&cluster, 1, &releases).await;
    for (id, (_, reason, words)) in &cases {
        let failed = |r: &daybook_workers::target::ReleaseStatus| {
            r.problem.as_ref().is_some_and(|p| !p.transient)
        };
        let seen = wait(&mut status, *id, reason, failed).await;
        let problem = seen.problem.unwrap();
        assert_eq!(problem.reason, *reason, "{problem:?}");
        assert!(problem.message.contains(words), "{words}: {problem:?}");
        assert!(!problem.remedy.is_empty());
        assert_eq!(seen.instances.iter().filter(|i| i.ready).count(), 0);
    }
    cluster.shutdown(Workloads::Stop).await;
    for (id, _) in cases {
        assert!(processes_of(id).is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_of_what_was_ready_is_mended_by_a_restart() {
    let bench = Bench::new().await;
    let cluster = bench.cluster().await;
    let id = deployment();
    let mut status = apply(&cluster, 1, &[(id, &bench.release(&[]))]).await;
    let address = wait_ready(&mut status, id, 1).await.instances[0]
        .address
        .clone();
    let _ = get(&address, "/exit?9").await;
    let crashed = wait(&mut status, id, "crashed", |r| r.problem.is_some()).await;
    let problem = crashed.problem.unwrap();
    assert_eq!(
        (problem.reason.as_str(), problem.transient),
        ("CrashLoopBackOff", true)
    );
    assert!(
        problem.message.contains("exited with code 9"),
        "{problem:?}"
    );
    let seen = wait_ready(&mut status, id, 1).await;
    assert_eq!((seen.instances[0].restarts, seen.problem), (1, None));
    cluster.shutdown(Workloads::Stop).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stops_answering_is_not_ready_until_it_answers_again() {
    let bench = Bench::new().await;
    let cluster = bench.cluster().await;
    let id = deployment();
    let mut status = apply(
        &cluster,
        1,
        &[(id, &bench.release(&["--slow-start", "200"]))],
    )
    .await;
    let address = wait_ready(&mut status, id, 1).await.instances[0]
        .address
        .clone();
    get(&address, "/break").await.unwrap();
    let seen = wait(&mut status, id, "unready", |r| r.ready() == 0).await;
    let problem = seen.problem.unwrap();
    assert_eq!(
        (problem.reason.as_str(), problem.transient),
        ("ReadinessProbeFailed", true)
    );
    get(&address, "/heal").await.unwrap();
    let seen = wait_ready(&mut status, id, 1).await;
    assert_eq!((seen.instances[0].restarts, seen.problem), (0, None));
    cluster.shutdown(Workloads::Stop).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_the_service_insists_on_and_that_is_taken_is_a_problem() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let bench = Bench::new().await;
    let cluster = bench.cluster().await;
    let mut by_variable = bench.release(&[]);
    by_variable.run.env = BTreeMap::from([(EnvKey::parse("PORT").unwrap(), port.clone())]);
    let by_program = bench.release(&["--port", &port]);
    let (first, second) = (deployment(), deployment());
    let releases = [(first, &by_variable), (second, &by_program)];
    let mut status = apply(&cluster, 1, &releases).await;
    for id in [first, second] {
        let seen = wait(&mut status, id, "failed", |r| {
            r.problem.as_ref().is_some_and(|p| !p.transient)
        });
        let problem = seen.await.problem.unwrap();
        assert_eq!(problem.reason, "PortInUse", "{problem:?}");
        assert!(problem.message.contains(&port), "{problem:?}");
    }
    // Once the port is free, the one that insisted on it gets it by itself.
    apply(&cluster, 2, &[(first, &by_variable)]).await;
    wait_gone(&mut status, second).await;
    drop(taken);
    let seen = wait_ready(&mut status, first, 1).await;
    assert_eq!(seen.instances[0].address, format!("127.0.0.1:{port}"));
    cluster.shutdown(Workloads::Stop).await;
}

/// Somebody takes the port between its choice and the moment when the application listens.
#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_snatched_away_is_replaced_by_another() {
    let bench = Bench::new().await;
    let cluster = bench.cluster().await;
    // One ends because of it, the other lives on without listening.
    for flags in [["--slow-start", "1500"].as_slice(), &["--silent"]] {
        let id = deployment();
        let mut status = apply(&cluster, 1, &[(id, &bench.release(flags))]).await;
        let started = |r: &daybook_workers::target::ReleaseStatus| {
            r.instances.iter().any(|i| !i.address.is_empty())
        };
        let seen = wait(&mut status, id, "started", started).await;
        let address = seen.instances[0].address.clone();
        let thief = TestApp::start_on(address.parse().unwrap(), &["--text", "thief"]);
        assert!(thief.is_some());
        let elsewhere = |r: &daybook_workers::target::ReleaseStatus| {
            let now = &r.instances[0].address;
            assert!(
                r.ready() == 0 || *now != address,
                "the thief was taken for the instance"
            );
            !now.is_empty() && *now != address
        };
        if flags[0] == "--silent" {
            wait(&mut status, id, "moved", elsewhere).await;
        } else {
            let seen = wait(&mut status, id, "moved", |r| elsewhere(r) && r.ready() == 1).await;
            assert_eq!(get(&seen.instances[0].address, "/").await.unwrap(), "hello");
            assert_eq!(seen.problem, None);
        }
    }
    cluster.shutdown(Workloads::Stop).await;
}

/// A change of the specification under one deployment: the old instance serves until the new one
/// is ready, and does not count as ready for the new revision.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_specification_replaces_without_a_gap() {
    let bench = Bench::new().await;
    let cluster = bench.cluster().await;
    let id = deployment();
    let mut status = apply(&cluster, 1, &[(id, &bench.release(&["--text", "old"]))]).await;
    wait_ready(&mut status, id, 1).await;
    let new = bench.release(&["--text", "new", "--slow-start", "300"]);
    apply(&cluster, 2, &[(id, &new)]).await;
    {
        let now = status.borrow();
        assert_eq!(now.releases[0].ready(), 0);
        assert!(
            now.releases[0]
                .instances
                .iter()
                .any(|i| i.ready && i.outdated)
        );
    }
    let mut versions = Vec::new();
    loop {
        let seen = status.borrow_and_update().releases[0].clone();
        let ready = seen.instances.iter().find(|i| i.ready);
        let address = &ready.expect("one is ready at any time").address;
        if let Some(text) = get(address, "/").await {
            versions.push(text);
        }
        if seen.ready() == 1 && seen.instances.len() == 1 {
            break;
        }
        tokio::time::timeout(PATIENCE, status.changed())
            .await
            .unwrap()
            .unwrap();
    }
    assert_eq!(versions.first().unwrap(), "old");
    assert_eq!(versions.last().unwrap(), "new");
    cluster.shutdown(Workloads::Stop).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_after_a_shutdown() {
    let bench = Bench::new().await;
    let cluster = bench.cluster().await;
    let (stubborn, parent) = (deployment(), deployment());
    let releases = [
        (stubborn, &bench.release(&["--ignore-term"])),
        (parent, &bench.release(&["--child"])),
    ];
    let mut status = apply(&cluster, 1, &releases).await;
    wait_ready(&mut status, stubborn, 1).await;
    wait_ready(&mut status, parent, 1).await;
    assert_eq!(
        processes_of(parent).len(),
        2,
        "the child in its own session"
    );
    cluster.shutdown(Workloads::Stop).await;
    assert!(processes_of(stubborn).is_empty());
    assert!(processes_of(parent).is_empty());
    let refused = cluster.apply(&app(), &commit(2), &desired(&[])).await;
    assert!(matches!(refused, Err(TargetError::Unavailable(_))));
    // The next one starts what was wanted.
    let cluster = bench.cluster().await;
    let mut status = cluster.watch(&app());
    wait_ready(&mut status, stubborn, 1).await;
    wait_ready(&mut status, parent, 1).await;
    cluster.shutdown(Workloads::Stop).await;
    assert!(processes_of(stubborn).is_empty() && processes_of(parent).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_values_are_refused_and_change_nothing() {
    let bench = Bench::new().await;
    let cluster = bench.cluster().await;
    let mut foreign = desired(&[]);
    foreign.project = daybook_events::ProjectName::parse("other").unwrap();
    let refused = cluster.apply(&app(), &commit(1), &foreign).await;
    assert!(matches!(refused, Err(TargetError::Refused(_))));
    let id = deployment();
    let mut twice = desired(&[(id, &bench.release(&[]))]);
    let service = twice.services.values().next().unwrap().clone();
    let name = daybook_events::ServiceName::parse("api").unwrap();
    twice.services.insert(name, service);
    let refused = cluster.apply(&app(), &commit(1), &twice).await;
    assert!(matches!(refused, Err(TargetError::Refused(_))));
    assert_eq!(cluster.watch(&app()).borrow().revision, None);
    cluster.shutdown(Workloads::Stop).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_at_a_time_runs_a_cluster() {
    let bench = Bench::new().await;
    let cluster = bench.cluster().await;
    match LocalCluster::open(bench.options()).await {
        Err(OpenError::Held { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
        other => panic!("{other:?}"),
    }
    let waiting = tokio::spawn(LocalCluster::open_when_free(bench.options()));
    cluster.shutdown(Workloads::Stop).await;
    let next = tokio::time::timeout(PATIENCE, waiting)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    next.shutdown(Workloads::Stop).await;

    let mut other = bench.options();
    other.name = daybook_events::ClusterName::parse("two").unwrap();
    let refused = LocalCluster::open(other).await;
    assert!(matches!(refused, Err(OpenError::OtherCluster { .. })));

    let cancelled = bench.options();
    let _holder = bench.cluster().await;
    cancelled.cancel.cancel();
    let refused = LocalCluster::open_when_free(cancelled).await;
    assert!(matches!(refused, Err(OpenError::Cancelled)));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_line_arrives_once_even_if_answers_get_lost() {
    let bench = Bench::new().await;
    let cluster = bench.cluster().await;
    let id = deployment();
    bench.lines.lost_answers.store(2, SeqCst);
    let mut status = apply(&cluster, 1, &[(id, &bench.release(&["--print", "3000"]))]).await;
    wait_ready(&mut status, id, 1).await;
    let lines = bench.lines.clone();
    eventually("all lines", || lines.printed(id).len() >= 3001).await;
    cluster.shutdown(Workloads::Stop).await;
    let printed = bench.lines.printed(id);
    let expected: Vec<String> = (1..=3000).map(|n| format!("line {n}")).collect();
    assert_eq!(printed[..3000], expected);
    assert!(
        printed[3000].starts_with("listening on"),
        "{}",
        printed[3000]
    );
    assert_eq!(printed.len(), 3001);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_words_of_a_crash_and_of_a_stop_arrive() {
    let bench = Bench::new().await;
    let cluster = bench.cluster().await;
    let id = deployment();
    let mut status = apply(&cluster, 1, &[(id, &bench.release(&[]))]).await;
    let address = wait_ready(&mut status, id, 1).await.instances[0]
        .address
        .clone();
    get(&address, "/print?before-the-crash").await.unwrap();
    let _ = get(&address, "/exit?1").await;
    let again =
        |r: &daybook_workers::target::ReleaseStatus| r.ready() == 1 && r.instances[0].restarts == 1;
    let address = wait(&mut status, id, "restarted", again).await.instances[0]
        .address
        .clone();
    get(&address, "/print?before-the-stop").await.unwrap();
    cluster.shutdown(Workloads::Stop).await;
    let printed = bench.lines.printed(id);
    let words: Vec<&str> = printed
        .iter()
        .map(String::as_str)
        .filter(|l| !l.starts_with("listening"))
        .collect();
    assert_eq!(words, ["before-the-crash", "before-the-stop"]);
}

/// The options of a Daybook that uses the folder of another process's bench.
fn other_options(dir: &std::path::Path) -> daybook_workers::local::LocalOptions {
    daybook_workers::local::LocalOptions::new(
        dir.join("cluster"),
        daybook_events::ClusterName::parse("one").unwrap(),
        TestImages::open(dir),
        FileLines::open(&dir.join("lines")),
        tokio_util::sync::CancellationToken::new(),
    )
}

/// A Daybook in a process of its own, to be killed. Runs until that happens.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by other tests as a process of its own"]
async fn another_daybook() {
    let Some(dir) = std::env::var_os("DAYBOOK_TEST_DIR") else {
        return;
    };
    let options = other_options(dir.as_ref());
    let _cluster = LocalCluster::open_when_free(options).await.unwrap();
    std::fs::write(std::path::Path::new(&dir).join("running"), "").unwrap();
    std::future::pending::<()>().await;
}

/// Runs the cluster of a bench in another process until it is dropped, and then kills that.
struct OtherDaybook(std::process::Child);

impl OtherDaybook {
    async fn start(bench: &Bench) -> Self {
        let running = bench.dir.path().join("running");
        let _ = std::fs::remove_file(&running);
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "another_daybook", "--ignored", "--nocapture"])
            .env("DAYBOOK_TEST_DIR", bench.dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let this = Self(child);
        eventually("the other Daybook runs", || running.exists()).await;
        this
    }
}

impl Drop for OtherDaybook {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Whoever records what a cluster shows, and takes away the traffic of what is not ready, starts
/// once it is open.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_ready_is_ready_as_soon_as_the_cluster_is_open_again() {
    let bench = Bench::new().await;
    let (id, release) = (deployment(), bench.release(&[]));
    let cluster = bench.cluster().await;
    let mut status = apply(&cluster, 1, &[(id, &release)]).await;
    wait_ready(&mut status, id, 1).await;
    cluster.shutdown(Workloads::Leave).await;
    for _ in 0..5 {
        let cluster = bench.cluster().await;
        let shown = cluster.watch(&app()).borrow().clone();
        assert_eq!(shown.releases[0].ready(), 1, "{shown:?}");
        cluster.shutdown(Workloads::Leave).await;
    }
    bench.cluster().await.shutdown(Workloads::Stop).await;
}

/// What runs keeps running when its Daybook is killed, the next one takes it over without
/// starting a second, and the lines that it printed all the while arrive once each.
#[tokio::test(flavor = "multi_thread")]
async fn processes_outlive_daybook_and_are_taken_over() {
    let bench = Bench::new().await;
    let (kept, unwanted, changed) = (deployment(), deployment(), deployment());
    let ticking = bench.release(&["--print-every", "2"]);
    let old = bench.release(&["--text", "old"]);
    let cluster = bench.cluster().await;
    let all = [(kept, &ticking), (unwanted, &old), (changed, &old)];
    let mut status = apply(&cluster, 1, &all).await;
    let before = wait_ready(&mut status, kept, 1).await.instances[0].clone();
    wait_ready(&mut status, unwanted, 1).await;
    wait_ready(&mut status, changed, 1).await;
    cluster.shutdown(Workloads::Leave).await;
    let pids = processes_of(kept);
    assert_eq!(pids.len(), 1);

    // Killed again and again while lines come.
    for _ in 0..3 {
        let other = OtherDaybook::start(&bench).await;
        let had = bench.lines.printed(kept).len();
        eventually("more lines", || bench.lines.printed(kept).len() > had + 20).await;
        drop(other);
        assert_eq!(processes_of(kept), pids);
        assert!(
            get(&before.address, "/").await.is_some(),
            "it answers without Daybook"
        );
    }

    let cluster = bench.cluster().await;
    let mut status = cluster.watch(&app());
    let after = wait_ready(&mut status, kept, 1).await;
    assert_eq!(after.revision, commit(1));
    let instance = &after.instances[0];
    assert_eq!(
        (&instance.name, &instance.address),
        (&before.name, &before.address)
    );
    assert_eq!(
        (instance.restarts, instance.started_at),
        (before.restarts, before.started_at)
    );
    assert_eq!(
        processes_of(kept),
        pids,
        "still the same process, and only one"
    );

    let new = bench.release(&["--text", "new"]);
    apply(&cluster, 2, &[(kept, &ticking), (changed, &new)]).await;
    wait_gone(&mut status, unwanted).await;
    assert!(processes_of(unwanted).is_empty());
    let seen = wait_ready(&mut status, changed, 1).await;
    assert_eq!(get(&seen.instances[0].address, "/").await.unwrap(), "new");
    assert_eq!(processes_of(changed).len(), 1);
    assert_eq!(processes_of(kept), pids);

    cluster.shutdown(Workloads::Stop).await;
    assert!(processes_of(kept).is_empty());
    let printed = bench.lines.printed(kept);
    let ticks = printed
        .iter()
        .filter_map(|l| l.strip_prefix("tick "))
        .map(|n| n.parse().unwrap());
    let ticks: Vec<usize> = ticks.collect();
    let expected: Vec<usize> = (1..=ticks.len()).collect();
    let differs = ticks.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!(differs, None, "each line once, in order");
}

/// A Daybook in a process of its own that keeps changing its mind, to be killed meanwhile.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by other tests as a process of its own"]
async fn a_restless_daybook() {
    let (Some(dir), Ok(values)) = (
        std::env::var_os("DAYBOOK_TEST_DIR"),
        std::env::var("DAYBOOK_TEST_RELEASE"),
    ) else {
        return;
    };
    let (id, mut values): (_, daybook_workers::values::ReleaseValues) =
        serde_json::from_str(&values).unwrap();
    let cluster = LocalCluster::open_when_free(other_options(dir.as_ref()))
        .await
        .unwrap();
    for revision in 1.. {
        values.run.replicas = [1, 3, 0, 2][revision as usize % 4];
        values.run.command.truncate(1);
        values
            .run
            .command
            .extend(["--text".into(), format!("{}", revision / 4 % 2)]);
        apply(&cluster, revision, &[(id, &values)]).await;
        tokio::time::sleep(Duration::from_millis(u64::from(revision * 37 % 90))).await;
    }
}

/// Whenever Daybook is killed, there is never a second process of one instance, and nothing is
/// forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_moment_nothing_is_doubled_or_forgotten() {
    let bench = Bench::new().await;
    let id = deployment();
    let mut values = bench.release(&[]);
    let text = serde_json::to_string(&(id, &values)).unwrap();
    for round in 0..12u64 {
        let mut other = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_restless_daybook", "--ignored", "--nocapture"])
            .env("DAYBOOK_TEST_DIR", bench.dir.path())
            .env("DAYBOOK_TEST_RELEASE", &text)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let desired = bench.dir.path().join("cluster/apps/shop.production.json");
        eventually("it has begun", || desired.exists()).await;
        tokio::time::sleep(Duration::from_millis(150 + round * 61 % 400)).await;
        assert!(other.try_wait().unwrap().is_none(), "it ended by itself");
        other.kill().unwrap();
        other.wait().unwrap();
    }
    let cluster = bench.cluster().await;
    for (revision, count) in [(1000, 3), (1001, 1)] {
        values.run.replicas = count;
        let mut status = apply(&cluster, revision, &[(id, &values)]).await;
        let seen = wait_ready(&mut status, id, count).await;
        for instance in &seen.instances {
            assert_eq!(get(&instance.address, "/").await.unwrap(), "hello");
        }
        assert_eq!(processes_of(id).len(), count as usize);
    }
    let mut status = apply(&cluster, 1002, &[]).await;
    wait_gone(&mut status, id).await;
    assert!(processes_of(id).is_empty());
    let releases = std::fs::read_dir(bench.dir.path().join("cluster/releases")).unwrap();
    assert_eq!(releases.count(), 0);
    cluster.shutdown(Workloads::Stop).await;
}

/// A process that dies while no Daybook looks is started again by the next.
#[tokio::test(flavor = "multi_thread")]
async fn what_died_meanwhile_is_started_again() {
    let bench = Bench::new().await;
    let cluster = bench.cluster().await;
    let id = deployment();
    let mut status = apply(&cluster, 1, &[(id, &bench.release(&["--child"]))]).await;
    let address = wait_ready(&mut status, id, 1).await.instances[0]
        .address
        .clone();
    cluster.shutdown(Workloads::Leave).await;
    let before = processes_of(id);
    assert_eq!(before.len(), 2);
    let _ = get(&address, "/exit?1").await;
    eventually("the process is gone", || processes_of(id).len() == 1).await;
    let cluster = bench.cluster().await;
    let mut status = cluster.watch(&app());
    wait_ready(&mut status, id, 1).await;
    let after = processes_of(id);
    assert_eq!(after.len(), 2, "{before:?} {after:?}");
    assert!(
        after.iter().all(|pid| !before.contains(pid)),
        "nothing old is left"
    );
    cluster.shutdown(Workloads::Stop).await;
}

/// Daybook is killed after it started a process and before it noted the process's id.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_was_not_noted_in_time_is_found_by_its_mark() {
    let bench = Bench::new().await;
    let cluster = bench.cluster().await;
    let id = deployment();
    let mut status = apply(&cluster, 1, &[(id, &bench.release(&[]))]).await;
    wait_ready(&mut status, id, 1).await;
    cluster.shutdown(Workloads::Leave).await;
    let pids = processes_of(id);
    let release_dir = bench
        .dir
        .path()
        .join("cluster/releases")
        .join(id.to_string());
    let dir = std::fs::read_dir(release_dir)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let path = dir.join("instance.json");
    let mut record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert!(record["process"].is_object());
    record["process"] = serde_json::Value::Null;
    std::fs::write(&path, record.to_string()).unwrap();

    let cluster = bench.cluster().await;
    let mut status = cluster.watch(&app());
    wait_ready(&mut status, id, 1).await;
    assert_eq!(processes_of(id), pids);
    cluster.shutdown(Workloads::Leave).await;

    // No record at all: it is nobody's any more, and another is started.
    std::fs::remove_file(&path).unwrap();
    let cluster = bench.cluster().await;
    let mut status = cluster.watch(&app());
    wait_ready(&mut status, id, 1).await;
    let after = processes_of(id);
    assert_eq!(after.len(), 1);
    assert_ne!(after, pids);
    cluster.shutdown(Workloads::Stop).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_folder_stops_nothing() {
    let bench = Bench::new().await;
    let cluster = bench.cluster().await;
    let id = deployment();
    let mut status = apply(&cluster, 1, &[(id, &bench.release(&[]))]).await;
    wait_ready(&mut status, id, 1).await;
    cluster.shutdown(Workloads::Leave).await;
    let pids = processes_of(id);
    let path = bench.dir.path().join("cluster/apps/shop.production.json");
    let good = std::fs::read(&path).unwrap();
    std::fs::write(&path, &good[..good.len() / 2]).unwrap();
    match LocalCluster::open(bench.options()).await {
        Err(OpenError::Unusable { path: named, .. }) => {
            assert!(named.ends_with("shop.production.json"))
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(processes_of(id), pids);
    std::fs::write(&path, good).unwrap();
    let cluster = bench.cluster().await;
    wait_ready(&mut cluster.watch(&app()), id, 1).await;
    assert_eq!(processes_of(id), pids);
    cluster.shutdown(Workloads::Stop).await;
}

/// The file server, as the process that a static site's instance is.
#[tokio::test]
#[ignore = "started by other tests as a process of its own"]
async fn static_server() {
    let (Ok(port), Some(dir)) = (std::env::var("PORT"), std::env::args().next_back()) else {
        return;
    };
    let port = port.parse().unwrap();
    daybook_workers::local::static_server::run(dir.as_ref(), port)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_static_site_is_served() {
    let bench = Bench::new().await;
    let mut options = bench.options();
    options.static_server = [
        std::env::current_exe().unwrap().to_str().unwrap(),
        "--exact",
        "static_server",
        "--ignored",
        "--nocapture",
    ]
    .map(Into::into)
    .to_vec();
    let cluster = LocalCluster::open(options).await.unwrap();
    let id = deployment();
    let mut site = bench.release(&[]);
    site.run.command = Vec::new();
    site.image = bench.image("site");
    let mut status = apply(&cluster, 1, &[(id, &site)]).await;
    let address = wait_ready(&mut status, id, 1).await.instances[0]
        .address
        .clone();
    assert_eq!(get(&address, "/").await.unwrap(), "a static site");
    cluster.shutdown(Workloads::Stop).await;
}

/// Two versions side by side, a switch, a crash and a rollback behind the gateway.
#[tokio::test(flavor = "multi_thread")]
async fn the_gateway_follows_what_the_cluster_observes() {
    let bench = Bench::new().await;
    let cluster = bench.cluster().await;
    let gateway = Gateway::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    gateway.track(cluster.cluster().clone(), cluster.watch(&app()));
    let (blue, green) = (deployment(), deployment());
    let to = |revision, deployment| {
        let backend = Backend {
            deployment,
            clusters: vec![cluster.cluster().clone()],
            weight: 1,
        };
        let route = Route {
            backends: vec![backend],
            policy: ClusterPolicy::Simple,
            internal: None,
        };
        let host = daybook_events::Hostname::parse("x").unwrap();
        RouteTable {
            project: app().project,
            revision,
            routes: BTreeMap::from([(host, route)]),
        }
    };
    let addr = gateway.addr().to_string();
    let ask = || async { get(&addr, "/").await.unwrap() };
    let (first, second) = (
        bench.release(&["--text", "blue"]),
        bench.release(&["--text", "green"]),
    );
    let mut status = apply(&cluster, 1, &[(blue, &first)]).await;
    wait_ready(&mut status, blue, 1).await;
    gateway.apply(to(1, blue)).unwrap();
    assert_eq!(ask().await, "blue");
    apply(&cluster, 2, &[(blue, &first), (green, &second)]).await;
    let instance = wait_ready(&mut status, green, 1).await.instances[0].clone();
    gateway.apply(to(2, green)).unwrap();
    assert_eq!(ask().await, "green");

    // A crash: for a moment nothing is ready, then the same deployment answers again.
    let _ = get(&instance.address, "/exit?1").await;
    let again =
        |r: &daybook_workers::target::ReleaseStatus| r.ready() == 1 && r.instances[0].restarts == 1;
    wait(&mut status, green, "restarted", again).await;
    let until = std::time::Instant::now() + PATIENCE;
    while ask().await != "green" {
        assert!(std::time::Instant::now() < until);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    gateway.apply(to(3, blue)).unwrap();
    assert_eq!(ask().await, "blue");

    let mut stopped = first.clone();
    stopped.run.replicas = 0;
    apply(&cluster, 3, &[(blue, &stopped)]).await;
    wait_ready(&mut status, blue, 0).await;
    // The gateway is told by a watch of its own.
    let until = std::time::Instant::now() + PATIENCE;
    loop {
        let answer = ask().await;
        if answer.contains("it is stopped") {
            break;
        }
        assert!(std::time::Instant::now() < until, "{answer}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    gateway.shutdown(Duration::from_secs(1)).await;
    cluster.shutdown(Workloads::Stop).await;
}

/// Instances are replaced three times under constant load on kept-alive connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn replacing_instances_under_load_fails_no_request() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let bench = Bench::new().await;
    let cluster = bench.cluster().await;
    let gateway = Gateway::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    gateway.track(cluster.cluster().clone(), cluster.watch(&app()));
    let id = deployment();
    let mut status = apply(&cluster, 1, &[(id, &bench.release(&["--text", "0"]))]).await;
    wait_ready(&mut status, id, 1).await;
    let backend = Backend {
        deployment: id,
        clusters: vec![cluster.cluster().clone()],
        weight: 1,
    };
    let route = Route {
        backends: vec![backend],
        policy: ClusterPolicy::Simple,
        internal: None,
    };
    let table = RouteTable {
        project: app().project,
        revision: 1,
        routes: BTreeMap::from([(daybook_events::Hostname::parse("x").unwrap(), route)]),
    };
    gateway.apply(table).unwrap();
    let (done, answered) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let addr = gateway.addr();
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (done, answered) = (done.clone(), answered.clone());
            tokio::spawn(async move {
                let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
                while !done.load(SeqCst) {
                    stream
                        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                        .await
                        .unwrap();
                    let mut answer = Vec::new();
                    // The application's text has one character.
                    while !answer.windows(4).any(|w| w == b"\r\n\r\n") || answer.ends_with(b"\n") {
                        let n = stream.read_buf(&mut answer).await.unwrap();
                        assert!(n > 0, "cut off: {}", String::from_utf8_lossy(&answer));
                    }
                    let text = String::from_utf8_lossy(&answer);
                    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
                    answered.fetch_add(1, SeqCst);
                }
            })
        })
        .collect();
    for revision in 2..5u32 {
        let values = bench.release(&["--text", &revision.to_string()]);
        apply(&cluster, revision, &[(id, &values)]).await;
        wait_ready(&mut status, id, 1).await;
        let before = answered.load(SeqCst);
        eventually("more answers", || answered.load(SeqCst) > before + 50).await;
        let latest = get(&addr.to_string(), "/").await.unwrap();
        assert_eq!(latest, revision.to_string());
    }
    done.store(true, SeqCst);
    for client in clients {
        client.await.unwrap();
    }
    assert_eq!(gateway.traffic()[&id].failures, 0);
    gateway.shutdown(Duration::from_secs(1)).await;
    cluster.shutdown(Workloads::Stop).await;
}
