//! GitOps and ledger witness each other: what real `git` says of signatures, and what is recorded
//! of commits of others, with everything real but clusters and builds.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use daybook_events::gitops::{
    self, Change, Committed, ForeignCommitFound, ForeignSignature, ForeignStatus, Gitops,
    GitopsEvent, RepositoryCreated, SignerAdded,
};
use daybook_events::spec::{PinnedImage, RunSpec};
use daybook_events::tree::{PublishedTree, SignedHead, TreeCondition, TreeHead};
use daybook_events::{
    Actor, ClusterName, CommitId, Context, DeploymentId, Digest, EnvironmentName, EventId,
    EventLog, Hostname, ImageRepository, ImageTag, Position, ProjectName, ServiceName, Subject,
    SubjectFilter,
};
use daybook_projections::{Ledger, Projections};
use daybook_store::embedded::{EmbeddedConfig, EmbeddedLines, EmbeddedLog, LineRetention};
use daybook_testkit::git::{git, git_command};
use daybook_workers::crew::Crew;
use daybook_workers::driver::DriverOptions;
use daybook_workers::git_transport::{GitTransport, TransportConfig};
use daybook_workers::gitops::witness::verify_repository;
use daybook_workers::gitops::{GitopsRepositories, SigningKey, allowed_signers};
use daybook_workers::pipeline::{Bench, Settings};
use daybook_workers::ports::{GitopsChange, KnownHistory, Repositories, StepError};
use daybook_workers::values::ReleaseValues;
use jiff::Timestamp;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

fn project() -> ProjectName {
    ProjectName::parse("shop").unwrap()
}

fn subject() -> Subject {
    Subject::Gitops(project())
}

fn deployment(n: u128) -> DeploymentId {
    DeploymentId(Uuid::from_u128(0xd000 + n))
}

fn cause(n: u128) -> EventId {
    EventId(Uuid::from_u128(0xe000 + n))
}

fn change(n: u128, known: KnownHistory) -> GitopsChange {
    let tag = ImageTag::parse(format!("tag{n}")).unwrap();
    GitopsChange {
        environment: EnvironmentName::parse("production").unwrap(),
        change: Change::Deploy {
            service: ServiceName::parse("api").unwrap(),
            deployment: deployment(n),
            from: None,
        },
        release: Some(ReleaseValues {
            image: PinnedImage {
                repository: ImageRepository::parse("localhost:5000/shop/api").unwrap(),
                tag: tag.clone(),
                digest: Digest::of(tag.as_str().as_bytes()),
            },
            clusters: vec![ClusterName::parse("local").unwrap()],
            run: RunSpec::default(),
            secret_env: std::collections::BTreeMap::new(),
        }),
        chart: None,
        config: Vec::new(),
        author: "ada <ada@example.com>".into(),
        ephemeral: false,
        cause: cause(n),
        known,
    }
}

/// A tree whose head is always the same.
#[derive(Debug)]
struct FixedTree;

#[async_trait::async_trait]
impl PublishedTree for FixedTree {
    fn head(&self) -> Option<SignedHead> {
        Some(SignedHead {
            head: TreeHead {
                size: 42,
                root: [7; 32],
            },
            published_at: Timestamp::UNIX_EPOCH,
            note: "example.org/log\n42\nBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=\n\n— note\n"
                .into(),
        })
    }
    fn condition(&self) -> TreeCondition {
        TreeCondition::Sound
    }
    async fn resource(&self, _: &str) -> std::io::Result<Option<bytes::Bytes>> {
        Ok(None)
    }
}

/// What `git verify-commit` says, with this list of keys; none if this machine cannot ask.
fn verify(repository: &Path, commit: &str, allowed: &str) -> Option<Result<(), String>> {
    if std::process::Command::new("ssh-keygen")
        .arg("-?")
        .output()
        .is_err()
    {
        daybook_testkit::left_out("ssh-keygen is not installed (package openssh-client)");
        return None;
    }
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("allowed_signers");
    fs::write(&file, allowed).unwrap();
    let setting = format!("gpg.ssh.allowedSignersFile={}", file.display());
    let output = git_command(repository)
        .args(["-c", &setting, "verify-commit", commit])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Some(output.status.success().then_some(()).ok_or(said))
}

fn repositories(folder: &Path) -> GitopsRepositories {
    let key = SigningKey::open_or_create(folder.join("keys/gitops")).unwrap();
    GitopsRepositories::new(
        folder.join("git"),
        std::collections::HashMap::new(),
        GitTransport::new(TransportConfig::default()),
    )
    .signing(Arc::new(key))
    .anchoring(Arc::new(FixedTree))
}

#[tokio::test]
async fn git_verifies_every_commit_with_our_key_and_with_no_other() {
    let folder = TempDir::new().unwrap();
    let all = repositories(folder.path());
    let (_, first) = all.ensure(&project()).await.unwrap();
    let path = all.path(&project());
    let made = all
        .commit(&project(), change(1, KnownHistory::default()))
        .await
        .unwrap();
    assert_eq!(made.ledger.as_ref().unwrap().size, 42);
    let signer = all.signer().unwrap().unwrap();
    assert_eq!(made.signer.as_ref(), Some(&signer.fingerprint));

    let allowed = git(&path, &["show", "main:.daybook/allowed_signers"]);
    let stranger = SigningKey::open_or_create(folder.path().join("other")).unwrap();
    let stranger = stranger.signer().unwrap();
    let others = allowed_signers([stranger.public_key.as_str()]);
    for commit in [first.as_str(), made.commit.as_str()] {
        let Some(verdict) = verify(&path, commit, &allowed) else {
            return;
        };
        verdict.unwrap();
        let refused = verify(&path, commit, &others).unwrap().unwrap_err();
        assert!(refused.contains("No principal matched"), "{refused}");
    }
    let format = "%cn|%an|%(trailers:key=Daybook-Event,valueonly,separator=)|\
                  %(trailers:key=Daybook-Ledger-Size,valueonly,separator=)|\
                  %(trailers:key=Daybook-Ledger-Root,valueonly,separator=)";
    let said = git(&path, &["log", "-1", &format!("--format={format}")]);
    let root = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";
    assert_eq!(said, format!("daybook|ada|{}|42|{root}", cause(1)));
    let checkpoint = git(&path, &["show", "main:.daybook/checkpoint"]);
    assert_eq!(checkpoint.lines().nth(2), Some(root));
    assert!(made.files.contains_key(".daybook/checkpoint"));

    // The digest can be made with a shell, as docs/auditing.md says.
    let recipe = r#"git diff-tree --root --no-commit-id --no-renames -r --name-status "$1" |
        while read status path; do
            case $status in
                D) echo "-  $path" ;;
                *) echo "sha256:$(git cat-file blob "$1:$path" | sha256sum | cut -d' ' -f1)  $path" ;;
            esac
        done | LC_ALL=C sort | sha256sum | cut -d' ' -f1"#;
    let shell = std::process::Command::new("sh")
        .current_dir(&path)
        .args(["-c", recipe, "sh", made.commit.as_str()])
        .output()
        .unwrap();
    let digest = String::from_utf8(shell.stdout).unwrap();
    assert_eq!(
        format!("sha256:{}", digest.trim()),
        made.files_digest.as_str()
    );

    // After a rotation both keys are good, and the older commit is still found by its mark.
    let second = SigningKey::rotate(&folder.path().join("keys/gitops")).unwrap();
    let known = KnownHistory {
        head: None,
        signers: vec![signer.public_key.clone(), second.public_key.clone()],
    };
    let again = all.commit(&project(), change(1, known.clone())).await;
    assert_eq!(again.unwrap(), made);
    let next = all.commit(&project(), change(2, known)).await.unwrap();
    assert_eq!(next.signer.as_ref(), Some(&second.fingerprint));
    let allowed = git(&path, &["show", "main:.daybook/allowed_signers"]);
    for commit in [&made.commit, &next.commit] {
        verify(&path, commit.as_str(), &allowed).unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_trailer_that_somebody_else_wrote_is_not_taken_for_ours() {
    let folder = TempDir::new().unwrap();
    let all = repositories(folder.path());
    all.ensure(&project()).await.unwrap();
    let path = all.path(&project());
    let message = format!(
        "deploy(production): api tag1\n\nDaybook-Event: {}",
        cause(1)
    );
    let forged = by_hand_as(&path, "daybook", &message, |clone| {
        fs::write(clone.join("forged"), "1").unwrap();
    });
    let made = all
        .commit(&project(), change(1, KnownHistory::default()))
        .await
        .unwrap();
    assert_eq!(made.parent.unwrap().as_str(), forged);
}

/// Clones a repository, lets somebody change it by hand and push.
fn by_hand_as(path: &Path, committer: &str, message: &str, change: impl Fn(&Path)) -> String {
    let clone = TempDir::new().unwrap();
    let at = clone.path();
    git(at, &["clone", "--quiet", path.to_str().unwrap(), "."]);
    change(at);
    git(at, &["add", "--all"]);
    let done = git_command(at)
        .env("GIT_COMMITTER_NAME", committer)
        .args(["commit", "--quiet", "-m", message])
        .status()
        .unwrap();
    assert!(done.success());
    git(at, &["push", "--quiet", "origin", "HEAD:main"]);
    git(at, &["rev-parse", "HEAD"])
}

fn by_hand(path: &Path, file: &str, content: &str) -> String {
    by_hand_as(path, "Ada Example", &format!("write {file}"), |clone| {
        let file = clone.join(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, content).unwrap();
    })
}

/// Everything of a process that packages.
struct World {
    folder: PathBuf,
    log: Arc<EmbeddedLog>,
    ledger: Ledger,
    repositories: Arc<GitopsRepositories>,
    crews: Vec<Crew>,
    cancel: CancellationToken,
    runner: tokio::task::JoinHandle<()>,
}

impl World {
    /// With a repository, and as many watchers as two processes have.
    async fn start(folder: &Path) -> Self {
        let config = EmbeddedConfig::default();
        let log = EmbeddedLog::open(folder.join("log"), config).await;
        let log = Arc::new(log.unwrap());
        let lines = EmbeddedLines::open(folder.join("lines"), LineRetention::default());
        let lines = Arc::new(lines.await.unwrap());
        let cancel = CancellationToken::new();
        let projections = Projections::open(&folder.join("projections")).unwrap();
        let runner = tokio::spawn({
            let (projections, log) = (projections.clone(), log.clone() as Arc<dyn EventLog>);
            let cancel = cancel.clone();
            async move {
                daybook_projections::runner::run(projections, log, cancel)
                    .await
                    .unwrap();
            }
        });
        let ledger = Ledger::new(log.clone(), projections);
        let repositories = Arc::new(repositories(folder));
        let mut world = Self {
            folder: folder.to_owned(),
            log,
            ledger,
            repositories: repositories.clone(),
            crews: Vec::new(),
            cancel: cancel.clone(),
            runner,
        };
        if world.state().is_none() {
            let (branch, commit) = repositories.ensure(&project()).await.unwrap();
            let created = RepositoryCreated { commit, branch };
            world.record(GitopsEvent::RepositoryCreated(created)).await;
            let signer: SignerAdded = repositories.signer().unwrap().unwrap();
            world.record(GitopsEvent::SignerAdded(signer)).await;
        }
        for worker in ["one", "two"] {
            let bench = Bench {
                ledger: world.ledger.clone(),
                lines: lines.clone(),
                secrets: Arc::new(daybook_secrets::NoSecrets),
                settings: Arc::new(Settings {
                    worker: worker.into(),
                    domain: Hostname::parse("localhost").unwrap(),
                    image_prefix: "registry.example/daybook".into(),
                    scratch: folder.join("scratch"),
                    gateway_url: None,
                    builds: 1,
                    keep_old: daybook_events::timer::KeepFor::Never,
                }),
            };
            let crew = Crew::new(bench, DriverOptions::default(), cancel.clone());
            crew.package_watching(repositories.clone(), Duration::from_millis(50));
            world.crews.push(crew);
        }
        world
    }

    async fn stop(self) {
        self.cancel.cancel();
        for crew in &self.crews {
            crew.ended().await;
        }
        self.runner.await.unwrap();
        self.log.close().await;
    }

    fn path(&self) -> PathBuf {
        self.folder.join("git/shop.git")
    }

    fn state(&self) -> Option<Gitops> {
        self.ledger.projections().gitops(&project()).unwrap()
    }

    async fn record(&self, event: GitopsEvent) {
        let context = Context {
            id: EventId(Uuid::now_v7()),
            time: Timestamp::now(),
            correlation: Uuid::now_v7(),
            causation: None,
            actor: Actor::unauthenticated("ada"),
            traceparent: None,
            request_digest: None,
        };
        let done = self
            .ledger
            .execute::<Gitops>(&subject(), &context, |s| gitops::decide(s, event.clone()))
            .await
            .unwrap();
        if let Some(position) = done.position() {
            let wait = Duration::from_secs(60);
            let projections = self.ledger.projections();
            projections.wait_for(position, wait).await.unwrap();
        }
    }

    /// What the package worker does.
    async fn deploy(&self, n: u128) -> Result<CommitId, StepError> {
        let state = self.state().unwrap();
        let known = KnownHistory {
            head: Some(state.head),
            signers: state.signers,
        };
        let asked = change(n, known);
        let change = asked.change.clone();
        let environment = asked.environment.clone();
        let made = self.repositories.commit(&project(), asked).await?;
        self.record(GitopsEvent::Committed(Box::new(Committed {
            commit: made.commit.clone(),
            parent: made.parent,
            ordinal: Some(made.ordinal),
            environment,
            change,
            message: made.message,
            author: made.author,
            cause: cause(n),
            files: made.files,
            files_digest: made.files_digest,
            ledger: made.ledger,
            signer: made.signer,
            unchanged: made.unchanged,
        })))
        .await;
        Ok(made.commit)
    }

    async fn until(&self, what: &str, holds: impl Fn(&Gitops) -> bool) -> Gitops {
        let mut changes = self.ledger.projections().changes();
        let waited = tokio::time::timeout(Duration::from_secs(60), async {
            loop {
                if let Some(state) = self.state()
                    && holds(&state)
                {
                    return state;
                }
                changes.changed().await.unwrap();
            }
        });
        waited
            .await
            .unwrap_or_else(|_| panic!("{what}: {:#?}", self.state()))
    }

    async fn events(&self) -> Vec<GitopsEvent> {
        let filter = SubjectFilter::default();
        let all = self.log.read(Position::ZERO, &filter, 10_000).await;
        let all = all.unwrap().into_iter();
        all.map(|r| r.event().unwrap().payload().unwrap()).collect()
    }

    async fn foreign(&self) -> Vec<ForeignCommitFound> {
        let events = self.events().await.into_iter();
        events
            .filter_map(|e| match e {
                GitopsEvent::ForeignCommitFound(e) => Some(*e),
                _ => None,
            })
            .collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_by_hand_are_recorded_once_each_in_order_and_built_upon() {
    let folder = TempDir::new().unwrap();
    let world = World::start(folder.path()).await;
    let ours = world.deploy(1).await.unwrap();
    let values = "environments/production/values.yaml";
    let one = by_hand(&world.path(), "NOTES", "one\ntwo\n");
    let two = by_hand(&world.path(), "base/values.yaml", "# nothing\n");
    // The next deployment commits on top, whether they are recorded yet or not.
    let next = world.deploy(2).await.unwrap();
    let parent = git(&world.path(), &["rev-parse", "main^"]);
    assert_eq!(parent, two);
    let undo = by_hand_as(
        &world.path(),
        "Ada Example",
        &format!("Revert \"deploy\"\n\nThis reverts commit {ours}."),
        |clone| {
            let text = fs::read_to_string(clone.join(values)).unwrap();
            fs::write(clone.join(values), text + "# undone\n").unwrap();
        },
    );
    let state = world
        .until("three are found", |s| s.foreign.len() == 3)
        .await;
    assert_eq!(state.head.as_str(), undo);
    assert_eq!(state.environments.values().collect::<Vec<_>>(), [&next]);
    let found = world.foreign().await;
    let commits: Vec<_> = found.iter().map(|f| f.commit.as_str()).collect();
    assert_eq!(commits, [&one, &two, &undo]);
    let ordinals: Vec<_> = found.iter().map(|f| f.ordinal.unwrap()).collect();
    assert_eq!(ordinals, [3, 4, 6]);
    assert_eq!(found[0].author, "Ada Example <ada@example.com>");
    assert_eq!(found[0].files, ["NOTES"]);
    let diff = found[0].diff.as_ref().unwrap();
    assert_eq!((diff.files, diff.insertions, diff.deletions), (1, 2, 0));
    assert_eq!(found[0].signature, Some(ForeignSignature::None));
    assert_eq!(found[2].reverts, Some(ours));
    assert_eq!(found[2].environments.len(), 1);
    // A restart finds nothing that it knows.
    world.stop().await;
    let world = World::start(folder.path()).await;
    let four = by_hand(&world.path(), "NOTES", "again");
    world
        .until("one more is found", |s| s.head.as_str() == four)
        .await;
    assert_eq!(world.foreign().await.len(), 4);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_by_hand_is_recorded_with_what_it_brings() {
    let folder = TempDir::new().unwrap();
    let world = World::start(folder.path()).await;
    let clone = TempDir::new().unwrap();
    let at = clone.path();
    git(
        at,
        &["clone", "--quiet", world.path().to_str().unwrap(), "."],
    );
    fs::write(at.join("NOTES"), "aside").unwrap();
    git(at, &["add", "--all"]);
    git(at, &["commit", "--quiet", "-m", "aside"]);
    let ours = world.deploy(1).await.unwrap();
    git(
        at,
        &[
            "pull",
            "--quiet",
            "--no-rebase",
            "--no-edit",
            "origin",
            "main",
        ],
    );
    git(at, &["push", "--quiet", "origin", "HEAD:main"]);
    let merge = git(at, &["rev-parse", "HEAD"]);
    let state = world
        .until("both are found", |s| s.foreign.len() == 2)
        .await;
    assert_eq!(state.head.as_str(), merge);
    assert_eq!(state.head_ordinal, Some(4));
    let found = world.foreign().await;
    assert_eq!(found[1].parents.len(), 2);
    assert_eq!(found[1].parents[1], ours);
    world.deploy(2).await.unwrap();
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewritten_history_stops_commits_until_somebody_decides() {
    let folder = TempDir::new().unwrap();
    let world = World::start(folder.path()).await;
    let first = world.deploy(1).await.unwrap();
    let second = world.deploy(2).await.unwrap();
    let path = world.path();
    let branch = "refs/heads/main";
    git(&path, &["update-ref", branch, first.as_str()]);
    let state = world
        .until("the rewrite is found", |s| s.rewritten.is_some())
        .await;
    let rewritten = state.rewritten.unwrap();
    assert_eq!((&rewritten.expected, &rewritten.found), (&second, &first));
    assert_eq!(rewritten.common.as_ref(), Some(&first));
    let refused = world.deploy(3).await.unwrap_err();
    assert_eq!(refused.code, "gitops_history_rewritten");
    assert_eq!(git(&path, &["rev-parse", "main"]), first.as_str());
    // Put back, it goes on.
    git(&path, &["update-ref", branch, second.as_str()]);
    world
        .until("the branch is back", |s| s.rewritten.is_none())
        .await;
    let third = world.deploy(3).await.unwrap();
    // Rewritten again, and accepted as it is, with a commit by hand on it.
    git(&path, &["update-ref", branch, first.as_str()]);
    let hand = by_hand(&path, "NOTES", "instead");
    world
        .until("it is found again", |s| {
            s.rewritten
                .as_ref()
                .is_some_and(|r| r.found.as_str() == hand)
        })
        .await;
    world
        .record(GitopsEvent::RewriteAccepted(gitops::RewriteAccepted {
            commit: CommitId::parse(hand.clone()).unwrap(),
            reason: Some("it had to go".into()),
        }))
        .await;
    let state = world
        .until("what is new is found", |s| s.foreign.len() == 1)
        .await;
    assert_eq!(state.foreign[0].commit.as_str(), hand);
    let fourth = world.deploy(4).await.unwrap();
    assert_eq!(git(&path, &["rev-parse", "main^"]), hand);
    assert_eq!(world.state().unwrap().head, fourth);
    // What is gone from the branch is still in the ledger and in the repository.
    git(&path, &["cat-file", "-e", third.as_str()]);
    let rewrites = world.events().await.into_iter();
    let rewrites = rewrites.filter(|e| matches!(e, GitopsEvent::HistoryRewritten(_)));
    assert!((2..=3).contains(&rewrites.count()));
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_by_hand_is_undone_by_a_signed_one_or_says_why_not() {
    let folder = TempDir::new().unwrap();
    let world = World::start(folder.path()).await;
    world.deploy(1).await.unwrap();
    let hand = by_hand(
        &world.path(),
        "environments/production/extra.yaml",
        "a: 1\n",
    );
    let hand = CommitId::parse(hand).unwrap();
    world.until("it is found", |s| s.foreign.len() == 1).await;
    world.deploy(2).await.unwrap();
    let revert = |commit: &CommitId| {
        GitopsEvent::RevertRequested(gitops::RevertRequested {
            commit: commit.clone(),
            reason: Some("not agreed".into()),
        })
    };
    world.record(revert(&hand)).await;
    let status = |s: &Gitops, commit: &CommitId| s.foreign_commit(commit).unwrap().status;
    let state = world
        .until("it is undone", |s| {
            status(s, &hand) == ForeignStatus::Reverted
        })
        .await;
    let path = world.path();
    assert_eq!(git(&path, &["rev-parse", "main"]), state.head.as_str());
    let said = git(&path, &["log", "-1", "--format=%an|%cn|%B"]);
    let title = format!(
        "ada|daybook|revert(production): {} write environments/production/extra.yaml",
        hand.short()
    );
    assert!(said.starts_with(&title), "{said}");
    assert!(said.contains(&format!("not agreed\n\nThis reverts commit {hand}.\n\n")));
    let listed = git(&path, &["ls-tree", "-r", "--name-only", "main"]);
    assert!(!listed.contains("extra.yaml"), "{listed}");
    let allowed = git(&path, &["show", "main:.daybook/allowed_signers"]);
    if let Some(verdict) = verify(&path, "main", &allowed) {
        verdict.unwrap();
    }
    assert_eq!(state.environments.values().next(), Some(&state.head));
    // One that somebody built upon cannot be taken out.
    let below = CommitId::parse(by_hand(&path, "NOTES", "one\n")).unwrap();
    by_hand(&path, "NOTES", "two\n");
    world
        .until("both are found", |s| s.foreign.len() == 3)
        .await;
    world.record(revert(&below)).await;
    let state = world
        .until("it is said", |s| {
            s.foreign_commit(&below).unwrap().problem.is_some()
        })
        .await;
    assert_eq!(status(&state, &below), ForeignStatus::Found);
    let problem = state.foreign_commit(&below).unwrap().problem.clone();
    assert!(problem.unwrap().contains("NOTES"));
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_changes_very_much_makes_a_small_event() {
    let folder = TempDir::new().unwrap();
    let world = World::start(folder.path()).await;
    by_hand_as(
        &world.path(),
        "Ada Example",
        &"long ".repeat(1000),
        |clone| {
            for n in 0..600 {
                let folder = clone.join(format!("{}/{n}", "x".repeat(200)));
                fs::create_dir_all(&folder).unwrap();
                fs::write(folder.join("file"), "x").unwrap();
            }
        },
    );
    world.until("it is found", |s| s.foreign.len() == 1).await;
    let found = &world.foreign().await[0];
    assert_eq!(found.diff.as_ref().unwrap().files, 600);
    assert!(found.files.len() < 100);
    assert!(serde_json::to_vec(found).unwrap().len() < 20_000);
    world.stop().await;
}

/// What the auditor's tool says, as text.
fn audit(path: &Path, events: &[GitopsEvent], trusted: Option<&[String]>) -> Vec<String> {
    let report = verify_repository(path, events.to_vec(), trusted).unwrap();
    assert_eq!(report.is_sound(), report.findings.is_empty());
    report
        .findings
        .into_iter()
        .map(|f| format!("{} {}", f.commit.short(), f.problem))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn repository_and_ledger_prove_each_other_and_any_difference_is_named() {
    let folder = TempDir::new().unwrap();
    let world = World::start(folder.path()).await;
    let path = world.path();
    world.deploy(1).await.unwrap();
    let hand = CommitId::parse(by_hand(&path, "NOTES", "one")).unwrap();
    let ours = world.deploy(2).await.unwrap();
    world.until("it is found", |s| s.foreign.len() == 1).await;
    let request = gitops::RevertRequested {
        commit: hand.clone(),
        reason: None,
    };
    world.record(GitopsEvent::RevertRequested(request)).await;
    let state = world
        .until("it is undone", |s| {
            s.foreign[0].status == ForeignStatus::Reverted
        })
        .await;
    let undo = state.head.clone();
    let events = world.events().await;
    let report = verify_repository(&path, events.clone(), None).unwrap();
    assert_eq!(report.findings, []);
    assert_eq!((report.commits, report.own, report.foreign), (5, 4, 1));
    assert_eq!(report.unsigned, 0);

    // The ledger was changed.
    let changed = |change: &dyn Fn(&mut GitopsEvent)| {
        let mut events = events.clone();
        events.iter_mut().for_each(change);
        audit(&path, &events, None)
    };
    let of_ours = |change: &dyn Fn(&mut Committed)| {
        changed(&|event| {
            if let GitopsEvent::Committed(e) = event
                && e.commit == ours
            {
                change(e);
            }
        })
    };
    let says = |what: &str| vec![format!("{} {what}", ours.short())];
    assert_eq!(
        of_ours(&|e| e.cause = cause(9)),
        says("its trailer Daybook-Event does not say what its event says")
    );
    assert_eq!(
        of_ours(&|e| e.ledger.as_mut().unwrap().root = "AAAA".into()),
        says("its trailer Daybook-Ledger-Root does not say what its event says")
    );
    assert_eq!(
        of_ours(&|e| e.ordinal = Some(9)),
        says("its history has 4 commits, and its event says 9")
    );
    let values = "environments/production/values.yaml";
    assert_eq!(
        of_ours(&|e| {
            e.files.insert(values.into(), Some(Digest::of(b"other")));
        }),
        says(&format!("its files are not those of its event: {values}"))
    );
    assert_eq!(
        of_ours(&|e| e.files_digest = Digest::of(b"other")),
        says("the digest over its files is not the one of its event")
    );
    assert_eq!(
        of_ours(&|e| e.author = "eve <eve@example.com>".into()),
        says("its author is not the one that its event names")
    );
    assert_eq!(
        of_ours(&|e| e.signer = Some("SHA256:other".into())),
        says("it is signed with another key than its event says")
    );
    assert_eq!(
        of_ours(&|e| e.parent = None),
        says("its parents are not those that its event names")
    );
    let mut without = events.clone();
    without.retain(|e| !matches!(e, GitopsEvent::Committed(e) if e.commit == ours));
    assert_eq!(audit(&path, &without, None), says("no event records it"));
    let mut twice = events.clone();
    twice.extend(
        events
            .iter()
            .find(|e| matches!(e, GitopsEvent::Committed(e) if e.commit == ours))
            .cloned(),
    );
    assert_eq!(
        audit(&path, &twice, None),
        says("more than one event records it")
    );
    let mut keyless = events.clone();
    keyless.retain(|e| !matches!(e, GitopsEvent::SignerAdded(_)));
    let said = audit(&path, &keyless, None);
    assert_eq!(said.len(), 4, "{said:?}");
    assert!(said[0].contains("which is no key of Daybook"), "{said:?}");
    assert_eq!(audit(&path, &events, Some(&[])).len(), 4);

    // The repository was changed: an unrecorded commit; a commit that looks the same, made anew.
    world.stop().await;
    let branch = "refs/heads/main";
    let forged = by_hand(&path, "NOTES", "later");
    assert_eq!(
        audit(&path, &events, None),
        [format!("{} no event records it", &forged[..7])]
    );
    let tree = git(&path, &["rev-parse", &format!("{undo}^{{tree}}")]);
    let message = git(&path, &["log", "-1", "--format=%B", undo.as_str()]);
    let copy = git_command(&path)
        .env("GIT_COMMITTER_NAME", "daybook")
        .args(["commit-tree", &tree, "-p", ours.as_str(), "-m", &message])
        .output()
        .unwrap();
    let copy = String::from_utf8(copy.stdout).unwrap().trim().to_owned();
    git(&path, &["update-ref", branch, &copy]);
    let mut expected = vec![
        format!("{} no event records it", &copy[..7]),
        format!(
            "{} an event records it, and the branch does not contain it",
            undo.short()
        ),
    ];
    let mut said = audit(&path, &events, None);
    said.sort();
    expected.sort();
    assert_eq!(said, expected);
    // An auditor who pretends that it was recorded sees that the signature is missing.
    let mut pretended = events.clone();
    for event in &mut pretended {
        if let GitopsEvent::Reverted(e) = event {
            e.commit = CommitId::parse(copy.clone()).unwrap();
        }
    }
    let said = audit(&path, &pretended, None);
    assert!(
        said.contains(&format!("{} it is not signed", &copy[..7])),
        "{said:?}"
    );

    // An object is gone: the repository cannot be vouched for at all.
    git(&path, &["update-ref", branch, undo.as_str()]);
    assert_eq!(audit(&path, &events, None), Vec::<String>::new());
    let lone = path.join("objects").join(&ours.as_str()[..2]);
    unpack(&path);
    fs::remove_file(lone.join(&ours.as_str()[2..])).unwrap();
    assert!(verify_repository(&path, events, None).is_err());
}

/// Gives every object of a repository a file of its own.
fn unpack(repository: &Path) {
    let packs = repository.join("objects/pack");
    let aside = TempDir::new().unwrap();
    for file in fs::read_dir(&packs).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), aside.path().join(file.file_name())).unwrap();
        fs::remove_file(file.path()).unwrap();
    }
    for pack in fs::read_dir(aside.path()).unwrap() {
        let pack = pack.unwrap().path();
        if pack.extension().is_some_and(|e| e == "pack") {
            let unpacked = git_command(repository)
                .args(["unpack-objects", "-q"])
                .stdin(fs::File::open(pack).unwrap())
                .status()
                .unwrap();
            assert!(unpacked.success());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewrite_that_somebody_accepted_is_part_of_the_story() {
    let folder = TempDir::new().unwrap();
    let world = World::start(folder.path()).await;
    let path = world.path();
    let first = world.deploy(1).await.unwrap();
    let mut lost = Vec::new();
    for number in 2..=4 {
        lost.push(world.deploy(number).await.unwrap());
    }
    git(&path, &["update-ref", "refs/heads/main", first.as_str()]);
    world
        .until("the rewrite is found", |s| s.rewritten.is_some())
        .await;
    let said = audit(&path, &world.events().await, None);
    assert_eq!(said.len(), 4, "{said:?}");
    assert!(said.iter().any(|s| s.contains("nobody decided about it")));
    for commit in &lost {
        let missing = format!("{} an event records it", commit.short());
        assert!(said.iter().any(|s| s.starts_with(&missing)), "{said:?}");
    }
    let commit = first.clone();
    let reason = None;
    let accepted = gitops::RewriteAccepted { commit, reason };
    world.record(GitopsEvent::RewriteAccepted(accepted)).await;
    // What an auditor has is a clone, in which nothing is kept of them.
    let cloned = |name: &str| {
        let (clone, url) = (
            folder.path().join(name),
            format!("file://{}", path.display()),
        );
        git(
            folder.path(),
            &[
                "clone",
                "--quiet",
                "--mirror",
                &url,
                clone.to_str().unwrap(),
            ],
        );
        for commit in &lost {
            let looked = git_command(&clone)
                .args(["cat-file", "-e", commit.as_str()])
                .output();
            assert!(!looked.unwrap().status.success());
        }
        clone
    };
    let clone = cloned("accepted");
    for repository in [&path, &clone] {
        let report = verify_repository(repository, world.events().await, None).unwrap();
        assert_eq!(report.findings, []);
        assert_eq!((report.commits, report.abandoned), (2, 3));
    }
    // What was accepted is not that the one before them is taken away, too.
    git(&clone, &["update-ref", "refs/heads/main", "main^"]);
    let said = audit(&clone, &world.events().await, None);
    let missing = format!("{} an event records it", first.short());
    assert!(said.len() == 1 && said[0].starts_with(&missing), "{said:?}");

    world.deploy(5).await.unwrap();
    for repository in [&path, &cloned("gone-on")] {
        let report = verify_repository(repository, world.events().await, None).unwrap();
        assert_eq!(report.findings, []);
        assert_eq!((report.commits, report.abandoned), (3, 3));
    }
    world.stop().await;
}
