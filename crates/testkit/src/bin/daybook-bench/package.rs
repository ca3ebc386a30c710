//! Workload D: signed GitOps commits into a repository of 10,000 files, against the `git` CLI's
//! plumbing commands doing the same.
//!
//! All sides have the same repository at the start, each its own copy of it, on the same disk. A
//! commit replaces two files, an environment's values and the signed checkpoint, is signed with an
//! SSH key, and is synced before whoever asked for it hears of it. Daybook is measured twice: asked
//! for one commit after the other, and asked for several by as many who wait at the same time, each
//! for the own one, as the deployments of a project do. Plumbing commands can only make one after
//! the other: each needs the commit before.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use daybook_events::gitops::LedgerAnchor;
use daybook_events::spec::{PinnedImage, RunSpec};
use daybook_events::{
    ClusterName, DeploymentId, Digest, EnvironmentName, EventId, ImageRepository, ImageTag,
    ProjectName, ServiceName,
};
use daybook_workers::gitops::{
    Author, BRANCH, CHECKPOINT, Change, CommitRequest, Committed, GitopsRepository, LedgerPoint,
    SigningKey, Witness,
};
use daybook_workers::values::ReleaseValues;
use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::report::{Comparison, Report};
use crate::{Failure, temporary_folder};

/// How many times as fast as git a commit is to be.
const LIMIT: f64 = 60.0;
/// Folders of other files on each of two levels; ten files in each of the inner ones.
const FOLDERS: usize = 31;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Commits of Daybook in each round
    #[arg(long, default_value_t = 300)]
    commits: u32,

    /// How many wait for a commit at once, in the row of those who do; at most as many as there are
    /// environments
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    at_once: u16,

    /// Commits of the git CLI in each round
    #[arg(long, default_value_t = 8)]
    git_commits: u32,

    /// Environments, which take turns
    #[arg(long, default_value_t = 100)]
    environments: usize,

    /// Rounds; each side runs once in each of them
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// Folder for the repositories, on the disk that is to be measured
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

pub(crate) async fn run(options: Options) -> Result<Report, Failure> {
    let folder = temporary_folder(options.folder.as_deref())?;
    let at_once = usize::from(options.at_once).min(options.environments);
    let mut single = Ours::prepare(folder.path(), "single", options.environments).await?;
    // A worker that keeps nothing between commits reads the tree each time; one that keeps its
    // index need not.
    let mut stateless = Git::clone_of(&single, folder.path(), "stateless", false)?;
    let mut keeping = Git::clone_of(&single, folder.path(), "keeping", true)?;
    let mut together = Ours::prepare(folder.path(), "together", options.environments).await?;
    let (mut one, mut many, mut against_stateless, mut against_keeping) =
        (vec![], vec![], vec![], vec![]);
    for round in 0..options.rounds {
        for turn in 0..4 {
            match (round + turn) % 4 {
                0 => one.push(single.round(options.commits, 1).await?),
                1 => many.push(together.round(options.commits, at_once).await?),
                2 => against_stateless.push(stateless.round(options.git_commits)?),
                _ => against_keeping.push(keeping.round(options.git_commits)?),
            }
        }
    }
    for git in [&stateless, &keeping] {
        git.check()?;
    }
    for ours in [&single, &together] {
        ours.check()?;
    }
    let waiting = format!("daybook, {at_once} who wait at once");
    let comparison =
        |subject: &str, measured: &[f64], yardstick, against: &[f64], limit| Comparison {
            subject: subject.to_owned(),
            yardstick,
            measured: measured.to_vec(),
            against: against.to_vec(),
            limit,
        };
    let single = "daybook, one commit after the other";
    let (plumbing, kept) = ("git plumbing", "git plumbing, index kept");
    Ok(Report {
        title: format!(
            "Signed commits of two files into a repository of {} files, synced; medians of {} \
             interleaved rounds",
            FOLDERS * FOLDERS * 10 + options.environments,
            options.rounds
        ),
        unit: "commits/s",
        notes: vec![
            format!(
                "Where {at_once} wait at once, each has asked for a commit of its own and hears of \
                 it when that is on the disk; those that wait are synced together."
            ),
            "git makes one commit after the other in all rows: each of its commands needs the \
             commit before."
                .to_owned(),
        ],
        comparisons: vec![
            comparison(&waiting, &many, plumbing, &against_stateless, Some(LIMIT)),
            comparison(&waiting, &many, kept, &against_keeping, None),
            comparison(single, &one, plumbing, &against_stateless, None),
            comparison(single, &one, kept, &against_keeping, None),
        ],
    })
}

/// Daybook's side.
struct Ours {
    repository: GitopsRepository,
    path: PathBuf,
    key: PathBuf,
    environments: Vec<(EnvironmentName, DeploymentId)>,
    made: u32,
}

impl Ours {
    async fn prepare(folder: &Path, name: &str, environments: usize) -> Result<Self, Failure> {
        let (path, key) = (folder.join(format!("{name}.git")), folder.join("key"));
        let signing = SigningKey::open_or_create(&key)?;
        let project = ProjectName::parse("shop")?;
        let open = GitopsRepository::open_signing(&path, &project, None, Some(signing.into()));
        let mut ours = Self {
            repository: open.await?,
            path: path.clone(),
            key,
            environments: Vec::new(),
            made: 0,
        };
        add_other_files(&path)?;
        for number in 0..environments {
            let environment = EnvironmentName::parse(format!("pr-{number}"))?;
            let deployment = DeploymentId(Uuid::now_v7());
            let deploy = Change::Deploy {
                service: ServiceName::parse("web")?,
                deployment,
                release: release()?,
            };
            ours.commit(0, environment.clone(), deploy).await?;
            ours.environments.push((environment, deployment));
        }
        git(&path, &["repack", "-adq"], "")?;
        Ok(ours)
    }

    async fn commit(
        &self,
        number: u32,
        environment: EnvironmentName,
        change: Change,
    ) -> Result<Committed, Failure> {
        let request = CommitRequest {
            environment,
            change,
            author: Author::parse("Ada <ada@example.com>"),
            at: Timestamp::now(),
            event: EventId(Uuid::now_v7()),
            body: None,
            witness: Witness {
                ledger: Some(LedgerPoint {
                    anchor: LedgerAnchor {
                        size: u64::from(number) + 1,
                        root: "A".repeat(43) + "=",
                    },
                    checkpoint: checkpoint(number).into(),
                }),
                ..Witness::default()
            },
        };
        let cancel = CancellationToken::new();
        Ok(self.repository.commit(request, &cancel).await?)
    }

    /// Commits a second, where so many wait at once.
    async fn round(&mut self, commits: u32, at_once: usize) -> Result<f64, Failure> {
        let first = self.made + 1;
        self.made += commits;
        let begun = Instant::now();
        let all = (first..first + commits).map(|number| self.scale(number));
        let mut done = stream::iter(all).buffer_unordered(at_once);
        while let Some(done) = done.next().await {
            let done = done?;
            if done.unchanged || done.files.len() != 2 {
                return Err(format!("no commit of two files: {done:?}").into());
            }
        }
        Ok(f64::from(commits) / begun.elapsed().as_secs_f64())
    }

    /// The commit with this number.
    async fn scale(&self, number: u32) -> Result<Committed, Failure> {
        let turn = number as usize % self.environments.len();
        let (environment, deployment) = self.environments[turn].clone();
        let scale = Change::Scale {
            service: ServiceName::parse("web")?,
            deployment,
            replicas: 2 + number % 40 + number / 40 % 2,
        };
        self.commit(number, environment, scale).await
    }

    fn check(&self) -> Result<(), Failure> {
        git(&self.path, &["fsck", "--strict", "--connectivity-only"], "").map(|_| ())
    }
}

fn release() -> Result<ReleaseValues, Failure> {
    Ok(ReleaseValues {
        image: PinnedImage {
            repository: ImageRepository::parse("registry.example/shop/web")?,
            tag: ImageTag::parse("v1")?,
            digest: Digest::of(b"an image"),
        },
        clusters: vec![ClusterName::parse("local-a")?],
        run: RunSpec::default(),
        secret_env: Default::default(),
    })
}

/// As long as a signed checkpoint is.
fn checkpoint(number: u32) -> String {
    format!(
        "localhost/bench\n{number}\n{}=\n\n— localhost/bench {}\n",
        "A".repeat(43),
        "B".repeat(92)
    )
}

/// Puts files of somebody else into a repository, in nested folders.
fn add_other_files(repository: &Path) -> Result<(), Failure> {
    let mut stream = format!(
        "commit refs/heads/{BRANCH}\ncommitter Bob <bob@example.com> 1700000000 +0000\ndata 6\nfiles\n\
         from refs/heads/{BRANCH}^0\n"
    );
    for (outer, inner) in (0..FOLDERS).flat_map(|o| (0..FOLDERS).map(move |i| (o, i))) {
        for file in 0..10 {
            let text = format!("{outer} {inner} {file}\n").repeat(30);
            stream += &format!(
                "M 100644 inline files/{outer}/{inner}/{file}.yaml\ndata {}\n{text}\n",
                text.len()
            );
        }
    }
    git(repository, &["fast-import", "--quiet"], &stream).map(|_| ())
}

/// The other side: `git`, a process for each step.
struct Git {
    path: PathBuf,
    name: &'static str,
    index: PathBuf,
    keeps_index: bool,
    environments: Vec<EnvironmentName>,
    values: String,
    head: String,
    made: u32,
}

impl Git {
    fn clone_of(
        ours: &Ours,
        folder: &Path,
        name: &'static str,
        keeps_index: bool,
    ) -> Result<Self, Failure> {
        let path = folder.join(name);
        git(
            folder,
            &[
                "clone",
                "-q",
                "--bare",
                "--no-hardlinks",
                "single.git",
                name,
            ],
            "",
        )?;
        let key = ours.key.display().to_string();
        for (setting, value) in [
            // What Daybook syncs: objects and the branch.
            ("core.fsync", "objects,reference"),
            ("core.fsyncMethod", "fsync"),
            ("gpg.format", "ssh"),
            ("user.signingKey", &key),
            ("user.name", "daybook"),
            ("user.email", "daybook@daybook.invalid"),
            ("gc.auto", "0"),
        ] {
            git(&path, &["config", setting, value], "")?;
        }
        let first = ours.environments.first().ok_or("no environments")?;
        let file = format!("HEAD:environments/{}/values.yaml", first.0);
        let mut git_side = Self {
            values: git(&path, &["cat-file", "blob", &file], "")?,
            head: git(&path, &["rev-parse", "HEAD"], "")?.trim().to_owned(),
            path,
            name,
            index: folder.join(format!("{name}.index")),
            keeps_index,
            environments: ours.environments.iter().map(|(e, _)| e.clone()).collect(),
            made: 0,
        };
        git_side.read_tree()?;
        // Warm-up.
        git_side.commit()?;
        Ok(git_side)
    }

    fn run(&self, arguments: &[&str], input: &str) -> Result<String, Failure> {
        let mut command = git_command(&self.path, arguments);
        command.env("GIT_INDEX_FILE", &self.index);
        finish(command, input)
    }

    fn read_tree(&mut self) -> Result<(), Failure> {
        self.run(&["read-tree", "HEAD"], "").map(|_| ())
    }

    fn round(&mut self, commits: u32) -> Result<f64, Failure> {
        let begun = Instant::now();
        for _ in 0..commits {
            self.commit()?;
        }
        Ok(f64::from(commits) / begun.elapsed().as_secs_f64())
    }

    fn commit(&mut self) -> Result<(), Failure> {
        self.made += 1;
        let environment = &self.environments[self.made as usize % self.environments.len()];
        let values = format!("{}# {}\n", self.values, self.made);
        let (values_file, point_file) = (self.file("values"), self.file("checkpoint"));
        fs::write(&values_file, values)?;
        fs::write(&point_file, checkpoint(self.made))?;
        let files = format!("{}\n{}\n", values_file.display(), point_file.display());
        let blobs = self.run(&["hash-object", "-w", "--stdin-paths"], &files)?;
        let (values, point) = blobs.trim().split_once('\n').ok_or("two blobs")?;
        let entries = format!(
            "100644 {values}\tenvironments/{environment}/values.yaml\n100644 {point}\t{CHECKPOINT}\n",
        );
        if !self.keeps_index {
            self.run(&["read-tree", "HEAD"], "")?;
        }
        self.run(&["update-index", "--add", "--index-info"], &entries)?;
        let tree = self.run(&["write-tree"], "")?;
        let message = format!("deploy({environment}): web {}", self.made);
        let commit = self.run(
            &[
                "commit-tree",
                "-S",
                "-p",
                &self.head,
                "-m",
                &message,
                tree.trim(),
            ],
            "",
        )?;
        let (branch, commit) = (format!("refs/heads/{BRANCH}"), commit.trim().to_owned());
        self.run(&["update-ref", &branch, &commit, &self.head], "")?;
        self.head = commit;
        Ok(())
    }

    fn file(&self, what: &str) -> PathBuf {
        self.index.with_extension(what)
    }

    fn check(&self) -> Result<(), Failure> {
        let signed = self.run(&["log", "-1", "--format=%B%n%GK", "HEAD"], "")?;
        let count = self.run(&["rev-list", "--count", "HEAD"], "")?;
        let made: u32 = count.trim().parse()?;
        if made <= self.made {
            return Err(format!("{}: {made} commits, ending with {signed}", self.name).into());
        }
        Ok(())
    }
}

fn git(folder: &Path, arguments: &[&str], input: &str) -> Result<String, Failure> {
    finish(git_command(folder, arguments), input)
}

fn git_command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("git");
    command
        .current_dir(folder)
        .args(arguments)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null");
    command
}

fn finish(mut command: Command, input: &str) -> Result<String, Failure> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stdin = child.stdin.take();
    stdin.ok_or("no stdin")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{command:?}: {said}").into());
    }
    Ok(String::from_utf8(output.stdout)?)
}
