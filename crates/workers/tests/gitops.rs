//! GitOps repositories: what `git` makes of them, commits that are made once, others who commit
//! too, and remotes that are elsewhere, refuse, or are gone.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use daybook_events::chart::PinnedChart;
use daybook_events::gitops::LedgerAnchor;
use daybook_events::spec::{PinnedImage, RunSpec};
use daybook_events::{
    ClusterName, CommitId, DeploymentId, Digest, EnvironmentName, EventId, ImageRepository,
    ImageTag, ProjectName, RepositoryUrl, ServiceName,
};
use daybook_testkit::git::{BareRemote, GitHttpServer, git};
use daybook_workers::git_transport::{
    GitTransport, HostCredential, Secret, SourcePolicy, SshConfig, TransportConfig,
};
use daybook_workers::gitops::{
    Author, Change, CommitRequest, Committed, GitopsError, GitopsRepositories, GitopsRepository,
    LedgerPoint, Remote, RevertRequest, Witness,
};
use daybook_workers::values::{EnvironmentValues, ReleaseValues, RenderedChart};
use futures_util::future::join_all;
use jiff::Timestamp;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

fn project() -> ProjectName {
    ProjectName::parse("shop").unwrap()
}

fn env(name: &str) -> EnvironmentName {
    EnvironmentName::parse(name).unwrap()
}

fn api() -> ServiceName {
    ServiceName::parse("api").unwrap()
}

fn event(n: u128) -> EventId {
    EventId(Uuid::from_u128(0xe000 + n))
}

fn deployment(n: u128) -> DeploymentId {
    DeploymentId(Uuid::from_u128(0xd000 + n))
}

fn release(tag: &str) -> ReleaseValues {
    ReleaseValues {
        secret_env: std::collections::BTreeMap::new(),
        image: PinnedImage {
            repository: ImageRepository::parse("localhost:5000/shop/api").unwrap(),
            tag: ImageTag::parse(tag).unwrap(),
            digest: Digest::of(tag.as_bytes()),
        },
        clusters: vec![ClusterName::parse("local").unwrap()],
        run: RunSpec::default(),
    }
}

fn request(environment: &str, n: u128, change: Change) -> CommitRequest {
    CommitRequest {
        environment: env(environment),
        change,
        author: Author::new("Ada Example", "ada@example.com"),
        at: Timestamp::from_second(1_700_000_000).unwrap(),
        event: event(n),
        body: None,
        witness: Witness::default(),
    }
}

/// Deploys release `n` with tag `tag`.
fn deploy(environment: &str, n: u128, tag: &str) -> CommitRequest {
    let change = Change::Deploy {
        service: api(),
        deployment: deployment(n),
        release: release(tag),
    };
    request(environment, n, change)
}

fn scale(environment: &str, n: u128, of: u128, replicas: u32) -> CommitRequest {
    let change = Change::Scale {
        service: api(),
        deployment: deployment(of),
        replicas,
    };
    request(environment, n, change)
}

async fn commit(
    repository: &GitopsRepository,
    request: CommitRequest,
) -> Result<Committed, GitopsError> {
    repository.commit(request, &CancellationToken::new()).await
}

async fn open(path: &Path) -> GitopsRepository {
    GitopsRepository::open_or_create(path, &project(), None)
        .await
        .unwrap()
}

/// A repository in a folder of its own.
async fn repository() -> (TempDir, GitopsRepository) {
    let folder = TempDir::new().unwrap();
    let repository = open(&folder.path().join("shop.git")).await;
    (folder, repository)
}

/// Checks what must hold of every GitOps repository: whole, one line, one commit an event.
fn check(path: &Path) -> Vec<String> {
    git(path, &["fsck", "--full", "--strict"]);
    let parents = git(path, &["log", "--format=%P", "main"]);
    assert!(parents.lines().all(|p| !p.contains(' ')), "linear history");
    let events = git(
        path,
        &[
            "log",
            "--reverse",
            "--format=%(trailers:key=Daybook-Event,valueonly)",
            "main",
        ],
    );
    let events: Vec<String> = events
        .lines()
        .filter(|l| !l.is_empty())
        .map(str::to_owned)
        .collect();
    let distinct: BTreeSet<_> = events.iter().collect();
    assert_eq!(distinct.len(), events.len(), "one commit an event");
    events
}

fn titles(path: &Path) -> Vec<String> {
    git(path, &["log", "--reverse", "--format=%s", "main"])
        .lines()
        .map(str::to_owned)
        .collect()
}

#[tokio::test]
async fn git_accepts_what_is_made() {
    let (folder, repository) = repository().await;
    let mut first = deploy("development", 1, "a1b2c3d");
    first.body = Some("Requested by pipeline 7.\n\nDaybook-Event: forged".into());
    first.witness.ledger = Some(LedgerPoint {
        anchor: LedgerAnchor {
            size: 17,
            root: "cm9vdA==".to_owned(),
        },
        checkpoint: "a signed checkpoint\n".into(),
    });
    let done = commit(&repository, first).await.unwrap();
    let path = repository.path();

    check(path);
    assert_eq!(git(path, &["symbolic-ref", "HEAD"]), "refs/heads/main");
    let setting = &[
        "config",
        "--file",
        "daybook.config",
        "core.fsyncObjectFiles",
    ];
    assert_eq!(git(path, setting), "true");
    let format = "%H%n%P%n%T%n%an <%ae> %at%n%cn%n%s%n%B";
    assert_eq!(
        git(path, &["log", "-1", &format!("--format={format}")]),
        format!(
            "{}\n{}\n{}\nAda Example <ada@example.com> 1700000000\ndaybook\n\
             deploy(development): api a1b2c3d\ndeploy(development): api a1b2c3d\n\n\
             Requested by pipeline 7.\n\nDaybook-Event: forged\n\n\
             Daybook-Deployment: {}\nDaybook-Event: {}\n\
             Daybook-Ledger-Size: 17\nDaybook-Ledger-Root: cm9vdA==",
            done.commit,
            done.parent.as_ref().unwrap(),
            done.tree,
            deployment(1),
            event(1),
        )
    );
    assert_eq!(done.title, "deploy(development): api a1b2c3d");
    assert_eq!(done.author, "Ada Example <ada@example.com>");
    assert!(!done.found && !done.unchanged);

    let clone = folder.path().join("clone");
    git(
        folder.path(),
        &["clone", "--quiet", path.to_str().unwrap(), "clone"],
    );
    let listed = git(&clone, &["ls-files"]);
    assert_eq!(
        listed.lines().collect::<Vec<_>>(),
        [
            ".daybook/checkpoint",
            "README.md",
            "base/Chart.yaml",
            "base/charts/daybook-app/Chart.yaml",
            "base/charts/daybook-app/templates/_helpers.tpl",
            "base/charts/daybook-app/templates/autoscaling.yaml",
            "base/charts/daybook-app/templates/charts.yaml",
            "base/charts/daybook-app/templates/configmap.yaml",
            "base/charts/daybook-app/templates/deployment.yaml",
            "base/charts/daybook-app/templates/disruption.yaml",
            "base/charts/daybook-app/templates/httproute.yaml",
            "base/charts/daybook-app/templates/service.yaml",
            "base/charts/daybook-app/templates/volumes.yaml",
            "base/charts/daybook-app/values.yaml",
            "base/values.yaml",
            "environments/development/values.yaml"
        ]
    );
    // The digests are those of the files, and the digest over them can be made with a shell.
    let file = "environments/development/values.yaml";
    let digest = Digest::of(&fs::read(clone.join(file)).unwrap());
    assert_eq!(done.files[file].as_ref(), Some(&digest));
    assert_eq!(done.files.len(), 2);
    let checkpoint = Digest::of(b"a signed checkpoint\n");
    assert_eq!(
        done.files_digest,
        Digest::of(
            // As `sort` puts them.
            [
                format!("{digest}  {file}\n"),
                format!("{checkpoint}  .daybook/checkpoint\n"),
            ]
            .into_iter()
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect::<String>()
            .as_bytes()
        )
    );
    let chart = fs::read_to_string(clone.join("base/Chart.yaml")).unwrap();
    assert!(chart.starts_with("apiVersion: v2\nname: shop\n"), "{chart}");
    assert!(chart.contains("- name: daybook-app\n"), "{chart}");
    let values = fs::read_to_string(clone.join(file)).unwrap();
    for label in [
        "daybook.dev/project: shop",
        "daybook.dev/environment: development",
        "daybook.dev/ephemeral: \"false\"",
    ] {
        assert!(values.contains(label), "{values}");
    }
}

#[tokio::test]
async fn each_change_has_its_message_and_its_effect() {
    let (_folder, repository) = repository().await;
    let create = |from: Option<&str>, ephemeral| Change::CreateEnvironment {
        from: from.map(env),
        ephemeral,
    };
    let promote = Change::Promote {
        from: env("development"),
        service: api(),
        deployment: deployment(4),
        release: release("a1b2c3d"),
    };
    let configure = Change::Configure {
        service: api(),
        deployment: deployment(4),
        run: RunSpec {
            replicas: 2,
            port: 9000,
            ..RunSpec::default()
        },
    };
    let remove = Change::Remove {
        service: api(),
        deployment: deployment(4),
    };
    for change in [
        request("development", 1, create(None, false)),
        deploy("development", 2, "a1b2c3d"),
        request("pr-142", 3, create(Some("development"), true)),
        request("staging", 4, promote),
        scale("staging", 5, 4, 3),
        request("staging", 6, configure),
        scale("staging", 7, 4, 0),
        request("staging", 8, remove),
        request("pr-142", 9, Change::DeleteEnvironment),
    ] {
        let done = commit(&repository, change).await.unwrap();
        assert!(!done.unchanged && !done.found, "{}", done.title);
    }
    assert_eq!(
        titles(repository.path()),
        [
            "init: shop",
            "env(create): development",
            "deploy(development): api a1b2c3d",
            "env(create): pr-142 from development",
            "promote(staging): api a1b2c3d from development",
            "config(staging): update replicas to 3",
            "config(staging): update api a1b2c3d",
            "config(staging): update replicas to 0",
            "config(staging): remove api a1b2c3d",
            "env(delete): pr-142",
        ]
    );
    check(repository.path());

    // The state at each commit is what it was then.
    let log = repository.log(None, 100).await.unwrap();
    let at = |i: usize| &log[i].commit;
    let staging = |i: usize| {
        let (repository, commit) = (repository.clone(), at(i).clone());
        async move {
            let values = repository
                .read_environment(&commit, &env("staging"))
                .await
                .unwrap();
            values.services[&api()]
                .releases
                .get(&deployment(4))
                .map(|r| (r.run.replicas, r.run.port))
        }
    };
    assert_eq!(staging(4).await, Some((1, 8080)));
    assert_eq!(staging(5).await, Some((3, 8080)));
    assert_eq!(staging(6).await, Some((2, 9000)));
    assert_eq!(staging(7).await, Some((0, 9000)));
    assert_eq!(staging(8).await, None);
    let preview = repository
        .read_environment(at(3), &env("pr-142"))
        .await
        .unwrap();
    assert!(preview.ephemeral);
    assert_eq!(
        preview.services[&api()].image,
        Some(release("a1b2c3d").image)
    );
    assert!(preview.services[&api()].releases.is_empty());
    assert_eq!(
        repository.environments(at(8)).await.unwrap(),
        [env("development"), env("pr-142"), env("staging")]
    );
    assert_eq!(
        repository.environments(at(9)).await.unwrap(),
        [env("development"), env("staging")]
    );
    assert!(repository.environments(at(0)).await.unwrap().is_empty());

    let diff = repository.diff(Some(at(4)), at(5)).await.unwrap();
    let changed = &diff.files["environments/staging/values.yaml"];
    assert!(changed.before.is_some() && changed.after.is_some());
    assert!(
        diff.patch.contains("-          replicas: 1\n"),
        "{}",
        diff.patch
    );
    assert!(
        diff.patch.contains("+          replicas: 3\n"),
        "{}",
        diff.patch
    );
    let deleted = repository.diff(Some(at(8)), at(9)).await.unwrap();
    assert_eq!(deleted.files["environments/pr-142/values.yaml"].after, None);
    assert_eq!(log[9].files, ["environments/pr-142/values.yaml"]);
    assert_eq!(log[4].deployment, Some(deployment(4)));
    assert_eq!(log[4].event, Some(event(4)));
}

#[tokio::test]
async fn a_release_that_is_removed_leaves_no_image_behind() {
    let (_folder, repository) = repository().await;
    for (n, tag) in [(3, "one"), (1, "two"), (2, "bad")] {
        commit(&repository, deploy("development", n, tag))
            .await
            .unwrap();
    }
    // The image of the newest release that is left, whatever the order of their ids; then none.
    for (n, of, expected) in [(4, 2, Some("two")), (5, 1, Some("one")), (6, 3, None)] {
        let change = Change::Remove {
            service: api(),
            deployment: deployment(of),
        };
        let done = commit(&repository, request("development", n, change))
            .await
            .unwrap();
        let values = repository
            .read_environment(&done.commit, &env("development"))
            .await
            .unwrap();
        let image = values.services[&api()].image.as_ref();
        assert_eq!(image.map(|i| i.tag.as_str()), expected);
    }
}

#[tokio::test]
async fn the_same_event_makes_one_commit() {
    let (folder, repository) = repository().await;
    let first = commit(&repository, deploy("development", 1, "one"))
        .await
        .unwrap();
    commit(&repository, deploy("development", 2, "two"))
        .await
        .unwrap();
    let again = commit(&repository, deploy("development", 1, "one"))
        .await
        .unwrap();
    assert!(again.found);
    assert_eq!(
        again,
        Committed {
            found: true,
            ..first.clone()
        }
    );
    // Another process, which has seen nothing yet.
    let other = open(repository.path()).await;
    let again = commit(&other, deploy("development", 1, "one"))
        .await
        .unwrap();
    assert_eq!(
        again,
        Committed {
            found: true,
            ..first
        }
    );
    // What the other one commits is known here too.
    commit(&other, deploy("development", 3, "three"))
        .await
        .unwrap();
    assert!(
        commit(&repository, deploy("development", 3, "three"))
            .await
            .unwrap()
            .found
    );
    assert_eq!(check(repository.path()).len(), 3);
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        2,
        "the repository and its lock"
    );
}

#[tokio::test]
async fn what_is_so_already_makes_no_commit() {
    let (_folder, repository) = repository().await;
    commit(&repository, deploy("development", 1, "one"))
        .await
        .unwrap();
    let head = repository.head().await.unwrap();
    let create = Change::CreateEnvironment {
        from: None,
        ephemeral: true,
    };
    let remove = Change::Remove {
        service: api(),
        deployment: deployment(99),
    };
    for request in [
        scale("development", 2, 1, 1),
        scale("development", 3, 99, 0),
        request("development", 4, create),
        request("development", 5, remove.clone()),
        request("nowhere", 6, Change::DeleteEnvironment),
        request("nowhere", 7, remove),
    ] {
        let done = commit(&repository, request).await.unwrap();
        assert!(done.unchanged, "{}", done.title);
        assert_eq!(done.commit, head);
        assert!(done.files.is_empty());
    }
    assert_eq!(repository.head().await.unwrap(), head);
}

#[tokio::test]
async fn what_cannot_be_done_is_said_and_leaves_nothing() {
    let (folder, repository) = repository().await;
    commit(&repository, deploy("development", 1, "one"))
        .await
        .unwrap();
    let head = repository.head().await.unwrap();
    let promote = |tag: &str, from: &str| Change::Promote {
        from: env(from),
        service: api(),
        deployment: deployment(2),
        release: release(tag),
    };
    let configure = Change::Configure {
        service: api(),
        deployment: deployment(99),
        run: RunSpec::default(),
    };
    let create = Change::CreateEnvironment {
        from: Some(env("nowhere")),
        ephemeral: false,
    };
    for (request, code) in [
        (scale("nowhere", 2, 1, 3), "environment_missing"),
        (scale("development", 3, 99, 3), "release_missing"),
        (request("development", 4, configure), "release_missing"),
        (
            request("staging", 5, promote("other", "development")),
            "nothing_to_promote",
        ),
        (
            request("staging", 6, promote("one", "nowhere")),
            "nothing_to_promote",
        ),
        (request("staging", 7, create), "environment_missing"),
    ] {
        let error = commit(&repository, request).await.unwrap_err();
        assert_eq!(error.code(), code);
        assert!(!error.is_retryable() && !error.remedy().is_empty());
    }
    assert_eq!(repository.head().await.unwrap(), head);

    let none = CommitId::parse("0".repeat(40)).unwrap();
    let error = repository
        .read_environment(&none, &env("development"))
        .await;
    assert_eq!(error.unwrap_err().code(), "commit_not_found");
    let error = repository.read_environment(&head, &env("nowhere")).await;
    assert_eq!(error.unwrap_err().code(), "environment_missing");
    assert_eq!(
        repository.diff(None, &none).await.unwrap_err().code(),
        "commit_not_found"
    );
    assert_eq!(
        repository.log(Some(&none), 9).await.unwrap_err().code(),
        "commit_not_found"
    );

    let code = |path: PathBuf, project: &'static str| async move {
        let project = ProjectName::parse(project).unwrap();
        GitopsRepository::open_or_create(path, &project, None)
            .await
            .unwrap_err()
            .code()
    };
    assert_eq!(
        code(repository.path().into(), "other").await,
        "gitops_other_project"
    );
    git(folder.path(), &["init", "--quiet", "--bare", "plain.git"]);
    assert_eq!(
        code(folder.path().join("plain.git"), "shop").await,
        "gitops_not_a_repository"
    );
    fs::create_dir(folder.path().join("folder")).unwrap();
    assert_eq!(
        code(folder.path().join("folder"), "shop").await,
        "gitops_damaged"
    );
}

/// Clones a repository, lets somebody change it by hand and push.
fn by_hand(path: &Path, message: &str, change: impl Fn(&Path)) -> String {
    let clone = TempDir::new().unwrap();
    git(
        clone.path(),
        &["clone", "--quiet", path.to_str().unwrap(), "."],
    );
    change(clone.path());
    git(clone.path(), &["add", "--all"]);
    git(
        clone.path(),
        &["commit", "--quiet", "--allow-empty", "-m", message],
    );
    git(clone.path(), &["push", "--quiet", "origin", "HEAD:main"]);
    git(clone.path(), &["rev-parse", "HEAD"])
}

#[tokio::test]
async fn an_earlier_chart_is_renewed_and_one_that_somebody_changed_is_not() {
    let (_folder, repository) = repository().await;
    let path = repository.path();
    let first = commit(&repository, deploy("production", 1, "a1b2c3d"));
    first.await.unwrap();
    let chart = "base/charts/daybook-app";
    let tree = || git(path, &["rev-parse", &format!("main:{chart}")]);
    let present = tree();
    let earlier = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/charts/0.1.0");
    let put_back = |clone: &Path| {
        for (file, _) in daybook_workers::gitops::chart_files() {
            let to = clone.join(chart).join(file);
            match earlier.join(file) {
                from if from.exists() => drop(fs::copy(from, to).unwrap()),
                // It may be gone already.
                _ => drop(fs::remove_file(to)),
            }
        }
    };
    by_hand(path, "as it was", put_back);
    assert_ne!(tree(), present);
    let second = commit(&repository, deploy("production", 2, "b1b2c3d"));
    let second = second.await.unwrap();
    assert_eq!(tree(), present);
    assert_eq!(second.title, "deploy(production): api b1b2c3d");
    assert!(second.files.keys().any(|file| file.starts_with(chart)));
    // Nor does it become what it was when that commit is undone.
    let undo = RevertRequest {
        commit: second.commit.clone(),
        author: Author::new("Ada Example", "ada@example.com"),
        at: Timestamp::from_second(1_700_000_000).unwrap(),
        event: event(20),
        reason: None,
        witness: Witness::default(),
    };
    let undone = repository.revert(undo, &CancellationToken::new()).await;
    let undone = undone.unwrap();
    assert_eq!(tree(), present);
    let changed: Vec<_> = undone.files.keys().collect();
    assert_eq!(changed, ["environments/production/values.yaml"]);

    by_hand(path, "as it was, and a value", |clone| {
        put_back(clone);
        fs::write(clone.join(chart).join("values.yaml"), "domain: mine\n").unwrap();
    });
    let theirs = tree();
    let third = commit(&repository, deploy("production", 3, "c1b2c3d"));
    third.await.unwrap();
    assert_eq!(tree(), theirs);
    // It makes nothing of charts, which are not committed then.
    let of_chart = || Change::DeployChart {
        service: api(),
        deployment: deployment(4),
        chart: RenderedChart {
            chart: PinnedChart {
                chart: "https://charts.example.com/stable/web".parse().unwrap(),
                version: "1.4.2".parse().unwrap(),
                digest: Digest::of(b"web"),
            },
            clusters: vec![ClusterName::parse("oslo").unwrap()],
            secret_env: std::collections::BTreeMap::new(),
            stopped: false,
            objects: Vec::new(),
        },
    };
    let head = git(path, &["rev-parse", "main"]);
    let refused = commit(&repository, request("production", 4, of_chart()));
    let refused = refused.await.unwrap_err();
    assert_eq!(refused.code(), "repository_chart_outdated");
    assert!(!refused.is_retryable() && refused.remedy().contains("templates/charts.yaml"));
    assert_eq!(git(path, &["rev-parse", "main"]), head);
    by_hand(path, "as it was, once more", put_back);
    let fourth = commit(&repository, request("production", 5, of_chart()));
    fourth.await.unwrap();
    assert_eq!(tree(), present);
    check(path);
}

#[tokio::test]
async fn commits_by_hand_stay_and_are_told_apart() {
    let (_folder, repository) = repository().await;
    let file = "environments/development/values.yaml";
    let ours = commit(&repository, deploy("development", 1, "one"))
        .await
        .unwrap();
    let foreign = by_hand(repository.path(), "scale up\n\nFor the sale.", |clone| {
        let text = fs::read_to_string(clone.join(file)).unwrap();
        let text = text.replace("replicas: 1", "replicas: 5");
        fs::write(
            clone.join(file),
            format!("# a comment\nglobal:\n  note: kept\n{text}  nodeSelector:\n    disk: ssd\n"),
        )
        .unwrap();
        fs::write(clone.join("NOTES"), "by hand").unwrap();
    });
    // A copy of our commit by somebody else is not ours, whatever its message says.
    let copied = by_hand(repository.path(), &ours.message, |clone| {
        fs::write(clone.join("NOTES"), "copied").unwrap();
    });
    let next = commit(&repository, deploy("development", 2, "two"))
        .await
        .unwrap();
    assert_eq!(next.parent.as_ref().unwrap().as_str(), copied);

    let log = repository.log(Some(&ours.commit), 10).await.unwrap();
    let seen: Vec<_> = log
        .iter()
        .map(|c| {
            (
                c.commit.as_str(),
                c.author.as_str(),
                c.message.as_str(),
                c.event,
            )
        })
        .collect();
    let ada = "Ada Example <ada@example.com>";
    assert_eq!(
        seen,
        [
            (foreign.as_str(), ada, "scale up", None),
            (copied.as_str(), ada, "deploy(development): api one", None),
            (
                next.commit.as_str(),
                ada,
                "deploy(development): api two",
                Some(event(2))
            ),
        ]
    );
    assert_eq!(log[0].files, ["NOTES", file]);
    // Our commit is still found, and the one that looks like it is not taken for it.
    let again = commit(&repository, deploy("development", 1, "one"))
        .await
        .unwrap();
    assert_eq!(again.commit, ours.commit);

    let values = repository
        .read_environment(&next.commit, &env("development"))
        .await
        .unwrap();
    let releases = &values.services[&api()].releases;
    assert_eq!(releases[&deployment(1)].run.replicas, 5);
    assert_eq!(releases[&deployment(2)].run.replicas, 1);
    let text = git(repository.path(), &["show", &format!("main:{file}")]);
    assert!(
        text.contains("note: kept") && text.contains("disk: ssd"),
        "{text}"
    );
    assert_eq!(git(repository.path(), &["show", "main:NOTES"]), "copied");
}

#[tokio::test]
async fn a_values_file_that_somebody_broke_stops_only_its_environment() {
    let (_folder, repository) = repository().await;
    commit(&repository, deploy("development", 1, "one"))
        .await
        .unwrap();
    commit(&repository, deploy("staging", 2, "one"))
        .await
        .unwrap();
    let file = "environments/development/values.yaml";
    for (what, content) in [
        ("no YAML", "{".to_owned()),
        ("empty", String::new()),
        ("not UTF-8 either", "daybook-app: [".to_owned()),
        ("another one's", {
            EnvironmentValues::new(project(), env("staging"), false)
                .to_yaml()
                .unwrap()
        }),
    ] {
        by_hand(repository.path(), what, |clone| {
            fs::write(clone.join(file), &content).unwrap();
        });
        let error = commit(&repository, deploy("development", 3, "two"))
            .await
            .unwrap_err();
        assert_eq!(error.code(), "invalid_values", "{what}: {error}");
        assert!(error.remedy().contains(file));
    }
    commit(&repository, deploy("staging", 4, "two"))
        .await
        .unwrap();
    let clone = TempDir::new().unwrap();
    let url = repository.path().to_str().unwrap();
    git(clone.path(), &["clone", "--quiet", url, "."]);
    git(clone.path(), &["checkout", "--quiet", "HEAD~5", "--", file]);
    git(clone.path(), &["commit", "--quiet", "-m", "restore"]);
    git(clone.path(), &["push", "--quiet", "origin", "HEAD:main"]);
    commit(&repository, deploy("development", 3, "two"))
        .await
        .unwrap();
    check(repository.path());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_who_commit_at_once_all_get_through() {
    let (_folder, repository) = repository().await;
    let path = repository.path().to_owned();
    let mut tasks = Vec::new();
    for worker in 0..4u128 {
        // Two share a handle, two have their own, as other processes would.
        let repository = if worker % 2 == 0 {
            repository.clone()
        } else {
            open(&path).await
        };
        tasks.push(tokio::spawn(async move {
            for i in 0..8 {
                let n = worker * 100 + i;
                commit(&repository, deploy("development", n, &format!("t{n}")))
                    .await
                    .unwrap();
            }
        }));
    }
    // And somebody who pushes by hand, and has to try again when others were faster.
    let hand = tokio::task::spawn_blocking({
        let path = path.clone();
        move || {
            let clone = TempDir::new().unwrap();
            git(
                clone.path(),
                &["clone", "--quiet", path.to_str().unwrap(), "."],
            );
            for i in 0..4 {
                fs::write(clone.path().join(format!("by-hand-{i}")), "x").unwrap();
                git(clone.path(), &["add", "--all"]);
                git(clone.path(), &["commit", "--quiet", "-m", "by hand"]);
                loop {
                    git(clone.path(), &["pull", "--quiet", "--rebase"]);
                    let pushed = daybook_testkit::git::git_command(clone.path())
                        .args(["push", "--quiet", "origin", "HEAD:main"])
                        .stderr(Stdio::null())
                        .status()
                        .unwrap();
                    if pushed.success() {
                        break;
                    }
                }
            }
        }
    });
    for task in tasks {
        task.await.unwrap();
    }
    hand.await.unwrap();
    assert_eq!(check(&path).len(), 32);
    let head = repository.head().await.unwrap();
    let values = repository
        .read_environment(&head, &env("development"))
        .await
        .unwrap();
    assert_eq!(values.services[&api()].releases.len(), 32);
    assert_eq!(
        git(&path, &["log", "--format=%s", "--grep=^by hand$", "main"])
            .lines()
            .count(),
        4
    );
}

/// What a child process of the tests below does: commits a range of events, one line for each.
#[tokio::test]
#[ignore = "run by other tests, as a process of its own"]
async fn child_that_commits() {
    let Ok(job) = std::env::var("DAYBOOK_TEST_COMMITS") else {
        return;
    };
    let mut parts = job.split(';');
    let path = PathBuf::from(parts.next().unwrap());
    let first: u128 = parts.next().unwrap().parse().unwrap();
    let count: u128 = parts.next().unwrap().parse().unwrap();
    let remote = parts
        .next()
        .map(|url| remote(url, SourcePolicy::trusting()));
    let repository = GitopsRepository::open_or_create(&path, &project(), remote)
        .await
        .unwrap();
    // Some of them wait for it at the same time.
    let all: Vec<u128> = (first..first + count).collect();
    for some in all.chunks(3) {
        let some = some.iter().map(async |n| {
            commit(&repository, deploy("development", *n, &format!("t{n}")))
                .await
                .unwrap();
            println!("COMMITTED {n}");
        });
        join_all(some).await;
    }
}

fn child(path: &Path, first: u128, count: u128, remote: Option<&str>) -> std::process::Child {
    let mut job = format!("{};{first};{count}", path.display());
    if let Some(remote) = remote {
        job = format!("{job};{remote}");
    }
    Command::new(std::env::current_exe().unwrap())
        .args(["child_that_commits", "--exact", "--ignored", "--nocapture"])
        .env("DAYBOOK_TEST_COMMITS", job)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Has all of these asked for before the first one is made, in this order.
async fn together(
    repository: &GitopsRepository,
    requests: Vec<CommitRequest>,
) -> Vec<Result<Committed, GitopsError>> {
    let lock = repository.path().with_extension("git.lock");
    let lock = fs::File::open(lock).unwrap();
    lock.lock().unwrap();
    let none = CancellationToken::new();
    let all = requests.into_iter().map(|r| repository.commit(r, &none));
    let mut all = join_all(all);
    assert!(futures_util::poll!(&mut all).is_pending());
    lock.unlock().unwrap();
    all.await
}

fn packs(path: &Path) -> usize {
    let packs = fs::read_dir(path.join("objects/pack")).unwrap();
    let names = packs.map(|e| e.unwrap().path());
    names
        .filter(|p| p.extension().is_some_and(|e| e == "pack"))
        .count()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_at_the_same_time_is_written_together_and_fails_alone() {
    let (_folder, repository) = repository().await;
    let path = repository.path();
    commit(&repository, deploy("development", 1, "one"))
        .await
        .unwrap();
    let before = packs(path);
    let elsewhere = CommitId::parse("a".repeat(40)).unwrap();
    let unknown = CommitRequest {
        witness: Witness {
            after: Some(elsewhere),
            ..Witness::default()
        },
        ..deploy("development", 5, "five")
    };
    let requests = vec![
        deploy("development", 2, "two"),
        // There is no such release.
        scale("development", 3, 99, 2),
        deploy("staging", 4, "four"),
        // The ledger knows a commit that is not here.
        unknown,
        // So it is already, with what comes before it in the same group.
        scale("staging", 6, 4, 1),
        // The same once more, made here and made before.
        deploy("development", 2, "two"),
        deploy("development", 1, "one"),
        scale("development", 7, 2, 0),
    ];
    let done = together(&repository, requests).await;
    let codes: Vec<_> = done
        .iter()
        .map(|d| d.as_ref().map_or_else(GitopsError::code, |_| ""))
        .collect();
    let expected = [
        "",
        "release_missing",
        "",
        "gitops_history_rewritten",
        "",
        "",
        "",
        "",
    ];
    assert_eq!(codes, expected);
    let done: Vec<_> = done.into_iter().map(Result::ok).collect();
    let at = |n: usize| done[n].as_ref().unwrap();
    assert_eq!(at(2).parent.as_ref(), Some(&at(0).commit));
    assert_eq!(at(7).parent.as_ref(), Some(&at(2).commit));
    assert_eq!((at(0).ordinal, at(2).ordinal, at(7).ordinal), (3, 4, 5));
    assert!(at(4).unchanged && at(4).commit == at(2).commit);
    assert!(at(5).found && at(5).commit == at(0).commit);
    assert!(at(6).found && at(6).ordinal == 2);
    assert_eq!(repository.head().await.unwrap(), at(7).commit);
    assert_eq!(check(path).len(), 4);
    assert_eq!(packs(path), before + 1);
    // What is reported of one that was made is what is found of it.
    for n in [0, 2, 7] {
        let made = at(n);
        let again = open(path).await;
        let event = [2, 0, 4, 0, 0, 0, 0, 7][n];
        let found = again
            .find(self::event(event), Vec::new(), &CancellationToken::new())
            .await
            .unwrap();
        let expected = Committed {
            found: true,
            ..made.clone()
        };
        assert_eq!(found, Some(expected));
    }
    let cancel = CancellationToken::new();
    let none = repository.find(event(3), Vec::new(), &cancel).await;
    assert_eq!(none.unwrap(), None);
}

/// Whoever leads ends when nobody waits, and somebody may come in that very moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn leaders_come_and_go_and_nobody_is_left_waiting() {
    let (_folder, repository) = repository().await;
    let tasks = (0..6u128).map(|worker| {
        let repository = repository.clone();
        tokio::spawn(async move {
            for n in (0..40).map(|i| worker * 100 + i) {
                let environment = format!("pr-{worker}");
                let done = commit(&repository, deploy(&environment, n, "x")).await;
                assert!(!done.unwrap().found);
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    assert_eq!(check(repository.path()).len(), 240);
}

#[tokio::test(flavor = "multi_thread")]
async fn packs_are_joined_and_clones_and_open_handles_go_on() {
    let (folder, repository) = repository().await;
    let reader = open(repository.path()).await;
    let mut last = None;
    for n in 0..70 {
        let done = commit(&repository, deploy("development", n, &format!("t{n}")))
            .await
            .unwrap();
        // Another process reads with what it opened long ago.
        if n % 10 == 0 {
            let values = reader
                .read_environment(&done.commit, &env("development"))
                .await
                .unwrap();
            assert_eq!(values.services[&api()].releases.len() as u128, n + 1);
        }
        last = Some(done.commit);
    }
    assert!(
        packs(repository.path()) < 35,
        "{}",
        packs(repository.path())
    );
    assert_eq!(check(repository.path()).len(), 70);
    let path = repository.path().to_str().unwrap();
    git(folder.path(), &["clone", "--quiet", path, "clone"]);
    let head = git(&folder.path().join("clone"), &["rev-parse", "HEAD"]);
    assert_eq!(Some(head.as_str()), last.as_ref().map(CommitId::as_str));
    // `git gc` by hand is welcome, too.
    git(repository.path(), &["gc", "--quiet", "--prune=now"]);
    commit(&repository, deploy("development", 100, "more"))
        .await
        .unwrap();
    assert_eq!(check(repository.path()).len(), 71);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_those_that_wait_together_one_can_be_cancelled() {
    let (_folder, repository) = repository().await;
    let lock = fs::File::open(repository.path().with_extension("git.lock")).unwrap();
    lock.lock().unwrap();
    let (none, cancel) = (CancellationToken::new(), CancellationToken::new());
    let kept = repository.commit(deploy("development", 1, "one"), &none);
    let gone = repository.commit(deploy("development", 2, "two"), &cancel);
    let dropped = Box::pin(repository.commit(deploy("development", 3, "three"), &none));
    let (mut kept, mut gone, mut dropped) = (Box::pin(kept), Box::pin(gone), dropped);
    assert!(futures_util::poll!(&mut kept).is_pending());
    assert!(futures_util::poll!(&mut gone).is_pending());
    assert!(futures_util::poll!(&mut dropped).is_pending());
    cancel.cancel();
    drop(dropped);
    assert!(gone.await.unwrap_err().is_cancelled());
    lock.unlock().unwrap();
    kept.await.unwrap();
    assert_eq!(check(repository.path()), [event(1).to_string()]);
}

#[tokio::test]
async fn processes_that_commit_at_once_all_get_through() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("shop.git");
    // They also race to make the repository.
    let mut children: Vec<_> = (0..3).map(|i| child(&path, i * 100, 6, None)).collect();
    for child in &mut children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(check(&path).len(), 18);
    assert_eq!(
        titles(&path).iter().filter(|t| *t == "init: shop").count(),
        1
    );
}

/// Kills a process that commits, again and again, each time a little further on, and lets it
/// start over from the first event each time.
fn kill_often(path: &Path, remote: Option<&str>) {
    const COUNT: u128 = 12;
    for rounds in 0..40u32 {
        let mut child = child(path, 0, COUNT, remote);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // Some lines, and then some more time, which differs from round to round.
        for _ in 0..rounds / 3 {
            if lines.next().is_none() {
                break;
            }
        }
        let busy = std::time::Instant::now();
        while busy.elapsed().as_micros() < u128::from(rounds % 7) * 700 {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(child(path, 0, COUNT, remote).wait().unwrap().success());
    let expected: Vec<String> = (0..COUNT).map(|n| event(n).to_string()).collect();
    assert_eq!(check(path), expected);
}

#[tokio::test]
async fn a_process_killed_anywhere_commits_once() {
    let folder = TempDir::new().unwrap();
    kill_often(&folder.path().join("shop.git"), None);
}

#[tokio::test]
async fn a_process_killed_anywhere_pushes_once() {
    let folder = TempDir::new().unwrap();
    let remote = BareRemote::new();
    kill_often(
        &folder.path().join("shop.git"),
        Some(remote.path().to_str().unwrap()),
    );
    let expected: Vec<String> = (0..12).map(|n| event(n).to_string()).collect();
    assert_eq!(check(&remote.path()), expected);
}

#[tokio::test]
async fn a_lock_that_a_dead_process_left_is_removed() {
    let (_folder, repository) = repository().await;
    fs::write(repository.path().join("refs/heads/main.lock"), "").unwrap();
    commit(&repository, deploy("development", 1, "one"))
        .await
        .unwrap();
    check(repository.path());
}

#[tokio::test]
async fn a_commit_that_waits_for_its_turn_can_be_cancelled() {
    let (folder, repository) = repository().await;
    let lock = fs::File::open(folder.path().join("shop.git.lock")).unwrap();
    lock.lock().unwrap();
    let cancel = CancellationToken::new();
    cancel.cancel();
    let error = repository
        .commit(deploy("development", 1, "one"), &cancel)
        .await
        .unwrap_err();
    assert!(error.is_cancelled());
    drop(lock);
    commit(&repository, deploy("development", 1, "one"))
        .await
        .unwrap();
}

fn remote(url: &str, policy: SourcePolicy) -> Remote {
    with_config(url, TransportConfig::with_policy(policy))
}

fn with_config(url: &str, config: TransportConfig) -> Remote {
    Remote {
        url: RepositoryUrl::parse(url).unwrap(),
        transport: GitTransport::new(config),
    }
}

/// A remote, served over HTTP, and a repository that pushes there.
struct Pushed {
    folder: TempDir,
    remote: BareRemote,
    server: GitHttpServer,
    repository: GitopsRepository,
}

impl Pushed {
    async fn new() -> Self {
        let remote = BareRemote::new();
        let server = GitHttpServer::start(remote.root()).await;
        let folder = TempDir::new().unwrap();
        let repository = GitopsRepository::open_or_create(
            folder.path().join("shop.git"),
            &project(),
            Some(self::remote(
                &server.url(BareRemote::NAME),
                SourcePolicy::trusting(),
            )),
        )
        .await
        .unwrap();
        Self {
            folder,
            remote,
            server,
            repository,
        }
    }

    /// Both branches are at the same commit, and all is well.
    fn check(&self) -> Vec<String> {
        let here = git(self.repository.path(), &["rev-parse", "main"]);
        assert_eq!(self.remote.git(&["rev-parse", "main"]), here);
        check(&self.remote.path())
    }
}

#[tokio::test]
async fn commits_are_pushed_and_others_pushes_are_built_upon() {
    let p = Pushed::new().await;
    commit(&p.repository, deploy("development", 1, "one"))
        .await
        .unwrap();
    p.check();
    let foreign = p.remote.foreign_commit("by hand", &[("NOTES", "x")]);
    let next = commit(&p.repository, deploy("development", 2, "two"))
        .await
        .unwrap();
    assert_eq!(next.parent.as_ref().unwrap().as_str(), foreign);
    assert_eq!(p.check().len(), 2);
    // What others pushed is also taken over when nothing is committed.
    let foreign = p.remote.foreign_commit("by hand again", &[("NOTES", "y")]);
    let head = p
        .repository
        .refresh(&CancellationToken::new())
        .await
        .unwrap();
    assert_eq!(head.as_str(), foreign);
    let log = p.repository.log(Some(&next.commit), 9).await.unwrap();
    assert_eq!(log.len(), 1);
    assert_eq!(log[0].event, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_together_is_pushed_once_and_refused_alone() {
    let p = Pushed::new().await;
    p.remote.hook(
        "pre-receive",
        "echo push >> pushes\n\
         while read old new ref; do\n\
         git log --format=%s $old..$new | grep -q poison && echo 'no poison' >&2 && exit 1\n\
         done\n\
         exit 0",
    );
    let pushes = || {
        let text = fs::read_to_string(p.remote.path().join("pushes"));
        text.unwrap_or_default().lines().count()
    };
    let some = (1..=6).map(|n| deploy("development", n, &format!("t{n}")));
    for done in together(&p.repository, some.collect()).await {
        done.unwrap();
    }
    assert_eq!(p.check().len(), 6);
    assert_eq!(pushes(), 1);
    let tags = [(11, "x"), (12, "poison"), (13, "y")];
    let some = tags.map(|(n, tag)| deploy("development", n, tag));
    let done = together(&p.repository, some.into()).await;
    assert!(done[0].is_ok() && done[2].is_ok(), "{done:?}");
    let refused = done[1].as_ref().unwrap_err();
    assert_eq!(refused.code(), "gitops_push_refused", "{refused:?}");
    assert_eq!(p.check().len(), 8);
    // Somebody pushed: all of them are made on top of that.
    let foreign = p.remote.foreign_commit("by hand", &[("NOTES", "x")]);
    let some = (21..=23).map(|n| deploy("development", n, "x")).collect();
    let done = together(&p.repository, some).await;
    let first = done[0].as_ref().unwrap();
    assert_eq!(first.parent.as_ref().unwrap().as_str(), foreign);
    assert_eq!(p.check().len(), 11);
    // What keeps all of them is said to all.
    p.server.answer("/", 503, "text/plain", "");
    let some = (31..=33).map(|n| deploy("development", n, "x")).collect();
    for done in together(&p.repository, some).await {
        let error = done.unwrap_err();
        assert_eq!(error.code(), "gitops_remote_unavailable");
        assert!(error.is_retryable(), "{error:?}");
    }
}

#[tokio::test]
async fn a_push_that_arrived_without_our_knowing_is_found() {
    let p = Pushed::new().await;
    let before = p.repository.head().await.unwrap();
    let made = commit(&p.repository, deploy("development", 1, "one"))
        .await
        .unwrap();
    // As if we had died after the push and before the local branch moved.
    git(
        p.repository.path(),
        &["update-ref", "refs/heads/main", before.as_str()],
    );
    let again = open_with(&p).await;
    let found = commit(&again, deploy("development", 1, "one"))
        .await
        .unwrap();
    assert_eq!(found.commit, made.commit);
    // The same without starting again, with a commit by somebody else on top.
    git(
        p.repository.path(),
        &["update-ref", "refs/heads/main", before.as_str()],
    );
    p.remote.foreign_commit("by hand", &[("NOTES", "x")]);
    let found = commit(&p.repository, deploy("development", 1, "one"))
        .await
        .unwrap();
    assert_eq!(
        found,
        Committed {
            found: true,
            ..made
        }
    );
    assert_eq!(p.check().len(), 1);

    // The answer to a push is lost on the way: we know nothing, and try again.
    let path = format!("/{}/git-receive-pack", BareRemote::NAME);
    p.server.cut_after(&path, 0);
    let error = commit(&p.repository, deploy("development", 2, "two"))
        .await
        .unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
    p.server.behave();
    commit(&p.repository, deploy("development", 2, "two"))
        .await
        .unwrap();
    assert_eq!(p.check().len(), 2);
}

async fn open_with(p: &Pushed) -> GitopsRepository {
    let remote = remote(&p.server.url(BareRemote::NAME), SourcePolicy::trusting());
    GitopsRepository::open_or_create(p.repository.path(), &project(), Some(remote))
        .await
        .unwrap()
}

#[tokio::test]
async fn a_remote_that_refuses_or_is_gone_is_tried_again_later() {
    let p = Pushed::new().await;
    let head = p.repository.head().await.unwrap();
    let try_it = || commit(&p.repository, deploy("development", 1, "one"));

    p.remote.refuse_pushes("not today");
    let error = try_it().await.unwrap_err();
    assert_eq!(error.code(), "gitops_push_refused", "{error:?}");
    assert!(error.is_retryable());
    p.remote.accept_pushes();

    p.server.require("daybook", "secret");
    let error = try_it().await.unwrap_err();
    assert_eq!(error.code(), "gitops_remote_auth", "{error:?}");
    assert!(error.is_retryable());
    let p = {
        let server = GitHttpServer::start(p.remote.root()).await;
        Pushed { server, ..p }
    };

    for (status, code) in [
        (503, "gitops_remote_unavailable"),
        (403, "gitops_remote_auth"),
        (404, "gitops_remote_not_a_repository"),
    ] {
        p.server.answer("/", status, "text/plain", "");
        let again = open_elsewhere(&p).await.unwrap_err();
        assert_eq!(again.code(), code, "{again:?}");
        p.server.behave();
    }
    // Nothing was moved by all of this.
    assert_eq!(p.repository.head().await.unwrap(), head);
    assert_eq!(p.remote.git(&["rev-parse", "main"]), head.as_str());
    let again = open_with(&p).await;
    commit(&again, deploy("development", 1, "one"))
        .await
        .unwrap();
    assert_eq!(p.check().len(), 1);
}

/// The same remote from a new data folder.
async fn open_elsewhere(p: &Pushed) -> Result<GitopsRepository, GitopsError> {
    let remote = remote(&p.server.url(BareRemote::NAME), SourcePolicy::trusting());
    let path = p.folder.path().join("elsewhere/shop.git");
    GitopsRepository::open_or_create(path, &project(), Some(remote)).await
}

#[tokio::test]
async fn a_lost_data_folder_is_restored_from_the_remote() {
    let p = Pushed::new().await;
    let made = commit(&p.repository, deploy("development", 1, "one"))
        .await
        .unwrap();
    let again = open_elsewhere(&p).await.unwrap();
    assert_eq!(again.head().await.unwrap(), made.commit);
    assert!(
        commit(&again, deploy("development", 1, "one"))
            .await
            .unwrap()
            .found
    );
    // Both go on, each on top of the other.
    for n in 2..6 {
        let repository = if n % 2 == 0 { &again } else { &p.repository };
        commit(repository, deploy("development", n, "x"))
            .await
            .unwrap();
    }
    p.repository
        .refresh(&CancellationToken::new())
        .await
        .unwrap();
    assert_eq!(p.check().len(), 5);

    // A remote that lost its branch is given it back.
    p.remote.git(&["update-ref", "-d", "refs/heads/main"]);
    commit(&p.repository, deploy("development", 6, "x"))
        .await
        .unwrap();
    assert_eq!(p.check().len(), 6);
}

#[tokio::test]
async fn rewritten_history_is_not_guessed_about() {
    let p = Pushed::new().await;
    commit(&p.repository, deploy("development", 1, "one"))
        .await
        .unwrap();
    let head = p.repository.head().await.unwrap();
    let tree = p.remote.git(&["rev-parse", "main^{tree}"]);
    let other = p.remote.git(&["commit-tree", "-m", "rewritten", &tree]);
    p.remote.git(&["update-ref", "refs/heads/main", &other]);
    let error = commit(&p.repository, deploy("development", 2, "two"))
        .await
        .unwrap_err();
    assert_eq!(error.code(), "gitops_diverged", "{error:?}");
    assert!(!error.is_retryable());
    // Nobody's history was touched.
    assert_eq!(p.remote.git(&["rev-parse", "main"]), other);
    assert_eq!(p.repository.head().await.unwrap(), head);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn machines_that_push_to_one_remote_at_once_all_get_through() {
    for over_http in [true, false] {
        let remote = BareRemote::new();
        let server = GitHttpServer::start(remote.root()).await;
        let url = if over_http {
            server.url(BareRemote::NAME)
        } else {
            remote.path().display().to_string()
        };
        let folder = TempDir::new().unwrap();
        let tasks: Vec<_> = (0..3u128)
            .map(|machine| {
                let path = folder.path().join(format!("{machine}/shop.git"));
                let remote = self::remote(&url, SourcePolicy::trusting());
                tokio::spawn(async move {
                    let repository =
                        GitopsRepository::open_or_create(path, &project(), Some(remote)).await;
                    // They race for the first commit, too.
                    let repository = repository.unwrap();
                    for i in 0..4 {
                        let n = machine * 100 + i;
                        commit(&repository, deploy("development", n, "x"))
                            .await
                            .unwrap();
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(check(&remote.path()).len(), 12);
        assert_eq!(titles(&remote.path())[0], "init: shop");
    }
}

#[tokio::test]
async fn pushes_go_over_https_with_credentials() {
    let remote = BareRemote::new();
    let server = GitHttpServer::start_tls(remote.root()).await;
    server.require("daybook", "canary");
    let config = TransportConfig {
        credentials: vec![HostCredential {
            host: "localhost".into(),
            port: Some(server.address().port()),
            username: "daybook".into(),
            password: Secret::new("canary"),
            allow_plain_http: false,
        }],
        extra_roots: vec![server.certificate().unwrap().to_owned()],
        ..TransportConfig::with_policy(SourcePolicy {
            private_hosts: vec!["localhost".into()],
            ..SourcePolicy::default()
        })
    };
    let folder = TempDir::new().unwrap();
    let repository = GitopsRepository::open_or_create(
        folder.path().join("shop.git"),
        &project(),
        Some(with_config(&server.url(BareRemote::NAME), config)),
    )
    .await
    .unwrap();
    commit(&repository, deploy("development", 1, "one"))
        .await
        .unwrap();
    assert_eq!(check(&remote.path()).len(), 1);
    assert!(!format!("{repository:?}").contains("canary"));
}

#[tokio::test]
async fn pushes_go_over_ssh() {
    use std::os::unix::fs::PermissionsExt as _;
    let remote = BareRemote::new();
    let folder = TempDir::new().unwrap();
    // In place of `ssh`: notes how it was called, and runs the command at "the other end".
    let program = folder.path().join("ssh");
    fs::write(
        &program,
        "#!/bin/sh\nprintf '%s\\n' \"$@\" >> \"$(dirname \"$0\")/calls\"\n\
         for last; do :; done\nexec sh -c \"$last\"\n",
    )
    .unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let config = |known_hosts: Option<&str>| TransportConfig {
        ssh: SshConfig {
            program: program.clone(),
            known_hosts: known_hosts.map(Into::into),
            identity: None,
        },
        ..TransportConfig::with_policy(SourcePolicy::trusting())
    };
    let open = |path: PathBuf, url: String, known_hosts| {
        let remote = with_config(&url, config(known_hosts));
        let path = folder.path().join(path);
        async move { GitopsRepository::open_or_create(path, &project(), Some(remote)).await }
    };
    let url = format!("ssh://git@127.0.0.1:2222{}", remote.path().display());
    let repository = open("shop.git".into(), url.clone(), Some("/etc/hosts-known"))
        .await
        .unwrap();
    commit(&repository, deploy("development", 1, "one"))
        .await
        .unwrap();
    remote.foreign_commit("by hand", &[("NOTES", "x")]);
    commit(&repository, deploy("development", 2, "two"))
        .await
        .unwrap();
    assert_eq!(check(&remote.path()).len(), 2);
    let calls = fs::read_to_string(folder.path().join("calls")).unwrap();
    for argument in [
        "BatchMode=yes",
        "StrictHostKeyChecking=yes",
        "HostName=127.0.0.1",
    ] {
        assert!(calls.contains(argument), "{calls}");
    }

    let error = open("b.git".into(), url, None).await.unwrap_err();
    assert_eq!(error.code(), "gitops_remote_auth", "{error:?}");
    let gone = "ssh://127.0.0.1/nowhere/none.git".to_owned();
    let error = open("c.git".into(), gone, Some("/k")).await.unwrap_err();
    assert_eq!(error.code(), "gitops_remote_not_a_repository", "{error:?}");
    fs::write(
        &program,
        "#!/bin/sh\nsleep 0\necho 'Host key verification failed.' >&2\nexit 255\n",
    )
    .unwrap();
    let any = "ssh://127.0.0.1/x.git".to_owned();
    let error = open("d.git".into(), any, Some("/k")).await.unwrap_err();
    assert_eq!(error.code(), "gitops_remote_auth", "{error:?}");
    assert!(!folder.path().join("d.git").exists());
}

#[tokio::test]
async fn the_pipeline_has_one_repository_a_project() {
    use daybook_events::gitops::Change as Asked;
    use daybook_workers::ports::{GitopsChange, Repositories as _};
    let folder = TempDir::new().unwrap();
    let all = GitopsRepositories::new(
        folder.path(),
        std::collections::HashMap::new(),
        GitTransport::new(TransportConfig::default()),
    );
    let (branch, first) = all.ensure(&project()).await.unwrap();
    assert_eq!(branch, "main");
    assert_eq!(all.ensure(&project()).await.unwrap().1, first);
    let asked = |n, change, release| GitopsChange {
        environment: env("production"),
        change,
        release,
        chart: None,
        config: Vec::new(),
        author: "alice".into(),
        ephemeral: false,
        cause: event(n),
        known: Default::default(),
    };
    let change = Asked::Deploy {
        service: api(),
        deployment: deployment(1),
        from: None,
    };
    let done = all
        .commit(&project(), asked(1, change.clone(), Some(release("one"))))
        .await
        .unwrap();
    assert_eq!(done.message, "deploy(production): api one");
    assert_eq!(done.author, "alice <alice@daybook.invalid>");
    assert_eq!(done.parent, Some(first));
    let again = all
        .commit(&project(), asked(1, change, Some(release("one"))))
        .await
        .unwrap();
    assert_eq!(again, done);
    let values = all
        .read(&project(), &env("production"), &done.commit)
        .await
        .unwrap();
    assert!(
        values.services[&api()]
            .releases
            .contains_key(&deployment(1))
    );
    // Removed by hand, it is made anew.
    fs::remove_dir_all(all.path(&project())).unwrap();
    all.ensure(&project()).await.unwrap();
    check(&all.path(&project()));
    let change = Asked::Deploy {
        service: api(),
        deployment: deployment(1),
        from: None,
    };
    all.commit(&project(), asked(1, change, Some(release("one"))))
        .await
        .unwrap();
    let change = Asked::Scale {
        service: api(),
        deployment: deployment(9),
        replicas: 2,
    };
    let error = all
        .commit(&project(), asked(2, change, None))
        .await
        .unwrap_err();
    assert_eq!(
        (error.code.as_str(), error.retryable),
        ("release_missing", false)
    );
}
