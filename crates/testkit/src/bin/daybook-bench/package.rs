//! Workload D: signed GitOps commits into a repository of 10,000 files, against the `git` CLI's
//! plumbing commands doing the same.
//!
//! Both sides have the same repository at the start, each its own copy of it, on the same disk. A
//! commit replaces two files, an environment's values and the signed checkpoint, is signed with an
//! SSH key, and is synced before the branch is moved to it.

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
    let mut ours = Ours::prepare(folder.path(), options.environments).await?;
    // A worker that keeps nothing between commits reads the tree each time; one that keeps its
    // index need not.
    let mut stateless = Git::clone_of(&ours, folder.path(), "stateless", false)?;
    let mut keeping = Git::clone_of(&ours, folder.path(), "keeping", true)?;
    let (mut measured, mut against_stateless, mut against_keeping) = (vec![], vec![], vec![]);
    for round in 0..options.rounds {
        for turn in 0..3 {
            match (round + turn) % 3 {
                0 => measured.push(ours.round(options.commits).await?),
                1 => against_stateless.push(stateless.round(options.git_commits)?),
                _ => against_keeping.push(keeping.round(options.git_commits)?),
            }
        }
    }
    stateless.check()?;
    keeping.check()?;
    ours.check()?;
    let comparison = |yardstick, against, limit| Comparison {
        subject: "daybook, one commit after the other".into(),
        yardstick,
        measured: measured.clone(),
        against,
        limit,
    };
    Ok(Report {
        title: format!(
            "Signed commits of two files into a repository of {} files, synced; medians of {} \
             interleaved rounds",
            FOLDERS * FOLDERS * 10 + options.environments,
            options.rounds
        ),
        unit: "commits/s",
        notes: Vec::new(),
        comparisons: vec![
            comparison("git plumbing", against_stateless, Some(LIMIT)),
            comparison("git plumbing, index kept", against_keeping, None),
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
    async fn prepare(folder: &Path, environments: usize) -> Result<Self, Failure> {
        let (path, key) = (folder.join("ours.git"), folder.join("key"));
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
            ours.commit(environment.clone(), deploy).await?;
            ours.environments.push((environment, deployment));
        }
        git(&path, &["repack", "-adq"], "")?;
        Ok(ours)
    }

    async fn commit(
        &self,
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
                        size: u64::from(self.made) + 1,
                        root: "A".repeat(43) + "=",
                    },
                    checkpoint: checkpoint(self.made).into(),
                }),
                ..Witness::default()
            },
        };
        let cancel = CancellationToken::new();
        Ok(self.repository.commit(request, &cancel).await?)
    }

    /// Commits a second.
    async fn round(&mut self, commits: u32) -> Result<f64, Failure> {
        let begun = Instant::now();
        for _ in 0..commits {
            self.made += 1;
            let turn = self.made as usize % self.environments.len();
            let (environment, deployment) = self.environments[turn].clone();
            let scale = Change::Scale {
                service: ServiceName::parse("web")?,
                deployment,
                replicas: 2 + self.made % 40 + self.made / 40 % 2,
            };
            let done = self.commit(environment, scale).await?;
            if done.unchanged || done.files.len() != 2 {
                return Err(format!("no commit of two files: {done:?}").into());
            }
        }
        Ok(f64::from(commits) / begun.elapsed().as_secs_f64())
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
            &["clone", "-q", "--bare", "--no-hardlinks", "ours.git", name],
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
