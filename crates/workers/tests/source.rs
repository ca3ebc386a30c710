//! Source repositories: what a ref stands for, what a checkout contains, and every way in which
//! a repository can be wrong, against real git servers and repositories.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use daybook_events::{CommitId, GitRef, RepositoryUrl};
use daybook_testkit::git::{
    BareRemote, GitHttpServer, SourceRepository, SshServer, git, git_command,
};
use daybook_workers::source::{
    Checkout, CheckoutLimits, GitTransport, HostCredential, Progress, ResolvedSource, Secret,
    SourceError, SourcePolicy, SourceRepositories, SshConfig, TransportConfig, TransportLimits,
    no_progress,
};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// A worker's view: its folders, and the repositories that it may use.
struct Worker {
    folder: TempDir,
    sources: SourceRepositories,
}

impl Worker {
    fn new(config: TransportConfig) -> Self {
        Self::with_limits(config, CheckoutLimits::default())
    }

    fn trusting() -> Self {
        Self::new(TransportConfig::with_policy(SourcePolicy::trusting()))
    }

    fn with_limits(config: TransportConfig, limits: CheckoutLimits) -> Self {
        let folder = TempDir::new().unwrap();
        let sources = SourceRepositories::with_limits(
            folder.path().join("sources"),
            GitTransport::new(config),
            limits,
        );
        Self { folder, sources }
    }

    async fn resolve(&self, url: &str, git_ref: &str) -> Result<ResolvedSource, SourceError> {
        self.sources
            .resolve(
                &RepositoryUrl::parse(url).unwrap(),
                &GitRef::parse(git_ref).unwrap(),
                &no_progress(),
                &CancellationToken::new(),
            )
            .await
    }

    async fn checkout(&self, url: &str, commit: &str) -> Result<(PathBuf, Checkout), SourceError> {
        let into = self.folder.path().join("work").join(commit);
        let done = self
            .sources
            .checkout(
                &RepositoryUrl::parse(url).unwrap(),
                &CommitId::parse(commit).unwrap(),
                &into,
                &no_progress(),
                &CancellationToken::new(),
            )
            .await?;
        Ok((into, done))
    }

    /// The mirror's repository, of which there is one.
    fn mirror(&self) -> PathBuf {
        let sources = self.folder.path().join("sources");
        let one = fs::read_dir(sources).unwrap().next().unwrap().unwrap();
        one.path().join("repository.git")
    }
}

fn code<T: std::fmt::Debug>(result: Result<T, SourceError>) -> &'static str {
    result.unwrap_err().code()
}

/// Files and links of a folder with their contents and targets.
fn contents(folder: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(at) = folders.pop() {
        for entry in fs::read_dir(&at).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(folder).unwrap().display().to_string();
            let kind = fs::symlink_metadata(&path).unwrap().file_type();
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_symlink() {
                let target = fs::read_link(&path).unwrap();
                found.insert(name, format!("-> {}", target.display()));
            } else {
                found.insert(name, fs::read_to_string(&path).unwrap());
            }
        }
    }
    found
}

#[tokio::test]
async fn every_spelling_of_a_ref_stands_for_its_commit() {
    let repo = SourceRepository::new();
    let first = repo.commit("First\n\nIts body.", &[("a.txt", "1")]);
    repo.tag("v1", None);
    repo.tag("v1-annotated", Some("the first release"));
    repo.branch("feature/login");
    let feature = repo.commit("On the branch", &[("b.txt", "2")]);
    repo.checkout("main");
    let main = repo.commit("Second", &[("a.txt", "3")]);
    repo.git(&["update-ref", "refs/pull/7/head", &feature]);
    // A name that is both: the branch counts, as for `git clone --branch`.
    repo.git(&["branch", "both", &main]);
    repo.git(&["tag", "both", &first]);

    let worker = Worker::trusting();
    for (git_ref, expected) in [
        ("main", &main),
        ("HEAD", &main),
        ("refs/heads/main", &main),
        ("heads/main", &main),
        ("feature/login", &feature),
        ("refs/pull/7/head", &feature),
        ("v1", &first),
        ("v1-annotated", &first),
        ("refs/tags/v1-annotated", &first),
        ("both", &main),
        (first.as_str(), &first),
        (&first[..7], &first),
        (&feature[..10].to_uppercase(), &feature),
    ] {
        for url in [repo.url(), format!("file://{}", repo.url())] {
            let found = worker.resolve(&url, git_ref).await.unwrap();
            assert_eq!(found.commit.as_str(), expected, "{git_ref} of {url}");
        }
    }

    let found = worker.resolve(&repo.url(), "v1-annotated").await.unwrap();
    assert_eq!(found.summary, "First");
    assert_eq!(found.message, "First\n\nIts body.");
    assert_eq!(found.author_name, "Ada Example");
    assert_eq!(found.author_email, "ada@example.com");
    assert_eq!(found.committed_at.to_string(), "2024-05-06T07:08:09Z");
    assert_eq!(found.url.as_str(), repo.url());
    assert_eq!(found.source_url, None);
}

#[tokio::test]
async fn a_branch_is_asked_for_anew_and_a_known_commit_is_not() {
    let repo = SourceRepository::new();
    let first = repo.commit("One", &[("a", "1")]);
    let worker = Worker::trusting();
    let resolved = |r: Result<ResolvedSource, SourceError>| r.unwrap().commit.to_string();
    assert_eq!(resolved(worker.resolve(&repo.url(), "main").await), first);
    let second = repo.commit("Two", &[("a", "2")]);
    assert_eq!(resolved(worker.resolve(&repo.url(), "main").await), second);

    // Rewritten history is followed, too.
    repo.git(&["checkout", "--quiet", "--orphan", "other"]);
    let other = repo.commit("Other", &[("a", "3")]);
    repo.git(&["branch", "--force", "main", &other]);
    assert_eq!(resolved(worker.resolve(&repo.url(), "main").await), other);

    // What was resolved stays available after the repository is gone.
    let url = repo.url();
    drop(repo);
    assert_eq!(resolved(worker.resolve(&url, &second).await), second);
    let (folder, _) = worker.checkout(&url, &first).await.unwrap();
    assert_eq!(contents(&folder)["a"], "1");
    assert_eq!(code(worker.resolve(&url, "main").await), "not_a_repository");
}

#[tokio::test]
async fn a_branch_that_becomes_a_folder_of_branches_stands_in_nobodys_way() {
    let repo = SourceRepository::new();
    repo.commit("One", &[("a", "1")]);
    repo.git(&["branch", "topic"]);
    let worker = Worker::trusting();
    worker.resolve(&repo.url(), "topic").await.unwrap();
    // All branches are fetched for a short id.
    let head = repo.head();
    worker.resolve(&repo.url(), &head[..6]).await.unwrap();
    repo.git(&["branch", "--delete", "--force", "topic"]);
    repo.git(&["checkout", "--quiet", "-b", "topic/one"]);
    let one = repo.commit("Two", &[("a", "2")]);
    let found = worker.resolve(&repo.url(), "topic/one").await.unwrap();
    assert_eq!(found.commit.as_str(), one);
    let found = worker.resolve(&repo.url(), &one[..6]).await.unwrap();
    assert_eq!(found.commit.as_str(), one);
}

#[tokio::test]
async fn what_does_not_exist_is_named_with_what_may_have_been_meant() {
    let repo = SourceRepository::new();
    let worker = Worker::trusting();
    assert_eq!(
        code(worker.resolve(&repo.url(), "main").await),
        "repository_empty"
    );

    let commit = repo.commit("One", &[("a", "1")]);
    repo.tag("v1.2.3", None);
    let missing = worker
        .resolve(&repo.url(), "origin/main")
        .await
        .unwrap_err();
    assert_eq!(missing.code(), "ref_not_found");
    assert!(!missing.is_retryable());
    assert_eq!(missing.remedy(), "Did you mean main?");
    let missing = worker.resolve(&repo.url(), "v1.2.4").await.unwrap_err();
    assert_eq!(missing.remedy(), "Did you mean v1.2.3?");
    for git_ref in ["refs/heads/none", "deadbee", &"0".repeat(40), "zzzz"] {
        assert_eq!(
            code(worker.resolve(&repo.url(), git_ref).await),
            "ref_not_found",
            "{git_ref}"
        );
    }
    assert_eq!(
        code(worker.checkout(&repo.url(), &"0".repeat(40)).await),
        "commit_not_found"
    );

    repo.git(&["tag", "a-file", &format!("{commit}:a")]);
    repo.git(&[
        "tag",
        "-a",
        "-m",
        "a tree",
        "a-tree",
        &format!("{commit}^{{tree}}"),
    ]);
    for tag in ["a-file", "a-tree"] {
        let error = worker.resolve(&repo.url(), tag).await.unwrap_err();
        assert_eq!(error.code(), "ref_not_a_commit", "{error}");
    }

    let nothing = TempDir::new().unwrap();
    fs::write(nothing.path().join("file"), "").unwrap();
    for path in ["", "file", "none"] {
        let url = nothing.path().join(path).display().to_string();
        let error = worker
            .resolve(url.trim_end_matches('/'), "main")
            .await
            .unwrap_err();
        assert_eq!(error.code(), "not_a_repository", "{path}: {error}");
    }
}

#[tokio::test]
async fn an_abbreviation_of_several_commits_is_refused() {
    let repo = SourceRepository::new();
    // Two commits with the same first four digits come along among a few hundred.
    let mut seen = BTreeMap::new();
    let stream: String = (0..2000)
        .map(|i| format!("commit refs/heads/main\ncommitter A <a@b> {i} +0000\ndata 1\nx\n"))
        .collect();
    let mut child = git_command(repo.path())
        .args(["fast-import", "--quiet"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), stream.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    let log = repo.git(&["log", "--format=%H", "main"]);
    let prefix = log
        .lines()
        .find_map(|id| seen.insert(id[..4].to_owned(), ()).map(|()| &id[..4]))
        .unwrap();
    let worker = Worker::trusting();
    assert_eq!(
        code(worker.resolve(&repo.url(), prefix).await),
        "ref_ambiguous"
    );
}

#[test]
fn hostile_refs_are_refused_before_anything_is_asked() {
    for git_ref in [
        "",
        "-main",
        "--upload-pack=id",
        "a..b",
        "a b",
        "a\nb",
        "main^{commit}",
        "main@{1}",
        "@",
        "main~1",
        "a:b",
        "refs/heads/*",
        "a\\b",
        "/abs",
        "a//b",
        ".hidden",
        "a/.b",
        "a.lock",
        "a.",
    ] {
        assert!(GitRef::parse(git_ref).is_err(), "{git_ref:?}");
    }
}

#[tokio::test]
async fn a_checkout_is_exactly_the_commit() {
    let repo = SourceRepository::new();
    repo.commit("One", &[("old", "gone"), ("kept/deep/file", "1")]);
    repo.git(&["rm", "--quiet", "old"]);
    repo.write("run.sh", "#!/bin/sh\r\n");
    repo.write(".gitattributes", "* text=auto eol=crlf\nfile filter=lfs\n");
    repo.git(&["add", "run.sh"]);
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(repo.path().join("run.sh"), executable).unwrap();
    std::os::unix::fs::symlink("kept/deep", repo.path().join("link")).unwrap();
    let commit = repo.commit_all("Two");
    repo.commit("Three", &[("later", "x")]);

    let worker = Worker::trusting();
    let (folder, done) = worker.checkout(&repo.url(), &commit).await.unwrap();
    let listed = repo.git(&["ls-tree", "-r", "--name-only", &commit]);
    let found = contents(&folder);
    assert_eq!(
        found.keys().map(String::as_str).collect::<Vec<_>>(),
        listed.lines().collect::<Vec<_>>()
    );
    for (path, content) in &found {
        let stored = repo.git(&["cat-file", "blob", &format!("{commit}:{path}")]);
        assert_eq!(
            content.trim_start_matches("-> ").trim_end(),
            stored.trim_end()
        );
    }
    assert_eq!(found["link"], "-> kept/deep");
    assert_eq!(done.files, 3);
    use std::os::unix::fs::PermissionsExt as _;
    let mode = |p: &str| fs::metadata(folder.join(p)).unwrap().permissions().mode() & 0o111;
    assert_ne!(mode("run.sh"), 0);
    assert_eq!(mode(".gitattributes"), 0);

    // Once more into the same folder: refused, and what is there stays as it is.
    let again = worker.checkout(&repo.url(), &commit).await;
    assert_eq!(code(again), "folder_in_use");
    assert_eq!(contents(&folder), found);
    // Nothing else was left beside it.
    assert_eq!(fs::read_dir(folder.parent().unwrap()).unwrap().count(), 1);
}

#[tokio::test]
async fn submodules_and_links_that_lead_out_are_left_out() {
    let inner = SourceRepository::new();
    let inner_commit = inner.commit("Inner", &[("x", "1")]);
    let repo = SourceRepository::new();
    repo.write("dir/file", "content");
    repo.git(&["add", "--all"]);
    repo.git(&[
        "update-index",
        "--add",
        "--cacheinfo",
        &format!("160000,{inner_commit},vendored/lib"),
    ]);
    for (path, target) in [
        ("etc", "/etc"),
        ("up", "../../outside"),
        ("dir/self", ".."),
        ("sneaky", "dir/self/.."),
        ("fine", "dir/file"),
    ] {
        std::os::unix::fs::symlink(target, repo.path().join(path)).unwrap();
        repo.git(&["add", path]);
    }
    repo.git(&["commit", "--quiet", "-m", "Links"]);
    let worker = Worker::trusting();
    let (folder, done) = worker.checkout(&repo.url(), &repo.head()).await.unwrap();
    assert_eq!(
        contents(&folder).into_keys().collect::<Vec<_>>(),
        ["dir/file", "dir/self", "fine"]
    );
    assert_eq!(done.submodules, ["vendored/lib"]);
    assert_eq!(done.links_left_out, ["etc", "sneaky", "up"]);
}

/// Writes a tree that `git` itself would refuse to make.
fn raw_tree(repo: &SourceRepository, entries: &[(&str, &str, &str)]) -> String {
    let mut tree = Vec::new();
    for (mode, name, id) in entries {
        tree.extend_from_slice(format!("{mode} {name}\0").as_bytes());
        tree.extend(
            (0..40)
                .step_by(2)
                .map(|i| u8::from_str_radix(&id[i..i + 2], 16).unwrap()),
        );
    }
    let file = repo.path().join(".git/raw");
    fs::write(&file, tree).unwrap();
    repo.git(&["hash-object", "-t", "tree", "-w", "--literally", ".git/raw"])
}

#[tokio::test]
async fn trees_that_no_honest_client_makes_do_no_harm() {
    let repo = SourceRepository::new();
    repo.commit("One", &[("file", "evil")]);
    let file = repo.git(&["rev-parse", "HEAD:file"]);
    let outside = TempDir::new().unwrap();
    repo.write("../link-target", "");
    let link = {
        let path = repo.path().join(".git/target");
        fs::write(&path, outside.path().display().to_string()).unwrap();
        repo.git(&["hash-object", "-w", ".git/target"])
    };
    let plain = raw_tree(&repo, &[("100644", "pwned", &file)]);
    let worker = Worker::trusting();
    for (what, tree) in [
        ("up", raw_tree(&repo, &[("40000", "..", &plain)])),
        ("here", raw_tree(&repo, &[("40000", ".", &plain)])),
        ("dot-git", raw_tree(&repo, &[("40000", ".GIT", &plain)])),
        (
            "slash",
            raw_tree(&repo, &[("100644", "a/../../pwned", &file)]),
        ),
        (
            "twice",
            raw_tree(&repo, &[("120000", "x", &link), ("40000", "x", &plain)]),
        ),
        (
            "same",
            raw_tree(&repo, &[("100644", "x", &file), ("100644", "x", &file)]),
        ),
    ] {
        let commit = repo.git(&["commit-tree", "-m", what, &tree]);
        repo.git(&["update-ref", &format!("refs/heads/{what}"), &commit]);
        match worker.checkout(&repo.url(), &commit).await {
            // Refused by name, or by libgit2 as an object that is none.
            Err(e) => assert!(
                ["source_unsafe_path", "source_protocol"].contains(&e.code()),
                "{what}: {e}"
            ),
            // Or all of it stays inside.
            Ok((folder, done)) => {
                assert_eq!(done.links_left_out, ["x"], "{what}");
                assert_eq!(contents(&folder)["x/pwned"], "evil");
            }
        }
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    assert!(!worker.folder.path().join("pwned").exists());
    assert!(!worker.folder.path().join("work/pwned").exists());
}

#[tokio::test]
async fn a_small_pack_with_a_huge_tree_is_stopped() {
    let repo = SourceRepository::new();
    let mut tree = {
        repo.commit("One", &[("f", "0123456789")]);
        repo.git(&["rev-parse", "HEAD^{tree}"])
    };
    for _ in 0..12 {
        tree = raw_tree(
            &repo,
            &[
                ("40000", "a", &tree),
                ("40000", "b", &tree),
                ("40000", "c", &tree),
            ],
        );
    }
    let commit = repo.git(&["commit-tree", "-m", "bomb", &tree]);
    repo.git(&["update-ref", "refs/heads/bomb", &commit]);
    let config = || TransportConfig::with_policy(SourcePolicy::trusting());
    for limits in [
        CheckoutLimits {
            entries: 500,
            ..CheckoutLimits::default()
        },
        CheckoutLimits {
            bytes: 500,
            ..CheckoutLimits::default()
        },
        CheckoutLimits {
            depth: 5,
            ..CheckoutLimits::default()
        },
    ] {
        let worker = Worker::with_limits(config(), limits);
        let result = worker.checkout(&repo.url(), &commit).await;
        assert_eq!(code(result), "source_too_large", "{limits:?}");
        let left = fs::read_dir(worker.folder.path().join("work")).unwrap();
        assert_eq!(left.count(), 0);
    }
}

#[tokio::test]
async fn the_policy_decides_before_anything_is_opened() {
    let repo = SourceRepository::new();
    repo.commit("One", &[("a", "1")]);
    let server = GitHttpServer::start(repo.path()).await;
    let worker = Worker::new(TransportConfig::default());
    let port = server.address().port();
    for (url, expected) in [
        (repo.url(), "source_not_allowed"),
        (format!("file://{}", repo.url()), "source_not_allowed"),
        (server.url("x.git"), "source_not_allowed"),
        (
            format!("https://127.0.0.1:{port}/x.git"),
            "source_address_refused",
        ),
        (
            format!("https://[::1]:{port}/x.git"),
            "source_address_refused",
        ),
        (
            format!("https://2130706433:{port}/x.git"),
            "source_address_refused",
        ),
        (
            format!("https://localhost:{port}/x.git"),
            "source_address_refused",
        ),
        (
            "https://169.254.169.254/x.git".into(),
            "source_address_refused",
        ),
    ] {
        let error = worker.resolve(&url, "main").await.unwrap_err();
        assert_eq!(error.code(), expected, "{url}: {error}");
        assert!(!error.is_retryable());
    }
    assert!(server.seen().is_empty());
}

fn with_credential(server: &GitHttpServer, password: &str) -> TransportConfig {
    TransportConfig {
        credentials: vec![HostCredential {
            host: "localhost".into(),
            port: Some(server.address().port()),
            username: "daybook".into(),
            password: Secret::new(password),
            allow_plain_http: false,
        }],
        extra_roots: server
            .certificate()
            .map(str::to_owned)
            .into_iter()
            .collect(),
        ..TransportConfig::with_policy(SourcePolicy::trusting())
    }
}

#[tokio::test]
async fn sources_come_over_https_with_credentials_that_nobody_sees() {
    let source = SourceRepository::new();
    source.commit("One", &[("a", "1")]);
    let commit = source.commit("Two", &[("a", "2")]);
    source.tag("v1", Some("annotated"));
    let remote = BareRemote::copy_of(&source);
    let server = GitHttpServer::start_tls(remote.root()).await;
    server.require("daybook", "canary-token");
    let url = server.url(BareRemote::NAME);

    let worker = Worker::new(with_credential(&server, "canary-token"));
    let found = worker.resolve(&url, "v1").await.unwrap();
    assert_eq!(found.commit.as_str(), commit);
    let (folder, _) = worker.checkout(&url, &commit).await.unwrap();
    assert_eq!(contents(&folder)["a"], "2");
    // Fetched in full, and again only what is new.
    let found = worker.resolve(&url, &commit[..8]).await.unwrap();
    assert_eq!(found.commit.as_str(), commit);
    let next = remote.foreign_commit("Three", &[("a", "3")]);
    let found = worker.resolve(&url, "main").await.unwrap();
    assert_eq!(found.commit.as_str(), next);
    assert!(
        server
            .seen()
            .iter()
            .all(|s| !s.line.contains("canary") && s.authorization.is_some())
    );

    let wrong = Worker::new(with_credential(&server, "canary-wrong"));
    let error = wrong.resolve(&url, "main").await.unwrap_err();
    assert_eq!(error.code(), "source_auth_required");
    assert!(!format!("{error} {error:?} {}", error.remedy()).contains("canary"));
    assert!(!format!("{:?}", with_credential(&server, "canary-x")).contains("canary"));

    // Without the certificate nothing is even asked.
    let before = server.seen().len();
    let distrustful = Worker::trusting();
    let error = distrustful.resolve(&url, "main").await.unwrap_err();
    assert_eq!(error.code(), "source_unavailable", "{error}");
    assert_eq!(server.seen().len(), before);
}

#[tokio::test]
async fn credentials_do_not_travel_without_tls() {
    let remote = BareRemote::new();
    let server = GitHttpServer::start(remote.root()).await;
    let url = server.url(BareRemote::NAME);
    let mut config = with_credential(&server, "canary");
    config.credentials[0].host = "127.0.0.1".into();
    let _ = Worker::new(config.clone()).resolve(&url, "main").await;
    assert!(server.seen().iter().all(|s| s.authorization.is_none()));
    config.credentials[0].allow_plain_http = true;
    let _ = Worker::new(config).resolve(&url, "main").await;
    assert!(server.seen().last().unwrap().authorization.is_some());
}

#[tokio::test]
async fn redirects_are_followed_and_checked() {
    let source = SourceRepository::new();
    let commit = source.commit("One", &[("a", "1")]);
    let remote = BareRemote::copy_of(&source);
    let target = GitHttpServer::start(remote.root()).await;
    let server = GitHttpServer::start(remote.root()).await;
    let trusting = Worker::trusting();

    // To another host: followed, without the credentials of the first.
    server.redirect("/old.git", &target.url(BareRemote::NAME));
    let mut config = with_credential(&server, "canary");
    config.credentials[0].host = "127.0.0.1".into();
    config.credentials[0].allow_plain_http = true;
    let worker = Worker::new(config);
    let found = worker
        .resolve(&server.url("old.git"), "main")
        .await
        .unwrap();
    assert_eq!(found.commit.as_str(), commit);
    assert!(server.seen().iter().all(|s| s.authorization.is_some()));
    assert!(!target.seen().is_empty());
    assert!(target.seen().iter().all(|s| s.authorization.is_none()));
    // The rest of the protocol goes to where the redirect led.
    assert!(target.seen().iter().any(|s| s.line.starts_with("POST ")));

    for (path, to) in [
        ("circle.git", server.url("circle.git")),
        ("file.git", "file:///etc".to_owned()),
        ("page.git", format!("{}/login?from=", server.url("x"))),
        (
            "secret.git",
            target.url(BareRemote::NAME).replace("//", "//user:canary@"),
        ),
    ] {
        server.redirect(&format!("/{path}"), &to);
        let error = trusting
            .resolve(&server.url(path), "main")
            .await
            .unwrap_err();
        assert_eq!(error.code(), "source_redirect_refused", "{path}: {error}");
        assert!(!format!("{error:?}").contains("canary"));
    }
}

#[tokio::test]
async fn a_redirect_to_a_private_address_is_refused() {
    let remote = BareRemote::new();
    let server = GitHttpServer::start_tls(remote.root()).await;
    let port = server.address().port();
    let mut config = with_credential(&server, "canary");
    config.policy = SourcePolicy {
        private_hosts: vec!["localhost".into()],
        ..SourcePolicy::default()
    };
    let worker = Worker::new(config);
    assert_eq!(
        code(worker.resolve(&server.url(BareRemote::NAME), "main").await),
        "repository_empty",
        "the server itself is allowed"
    );
    for (path, target, expected) in [
        (
            "a",
            format!("https://127.0.0.1:{port}/x"),
            "source_address_refused",
        ),
        (
            "b",
            "https://169.254.169.254/x".into(),
            "source_address_refused",
        ),
        (
            "c",
            format!("https://[::1]:{port}/x"),
            "source_address_refused",
        ),
        (
            "d",
            format!("http://localhost:{port}/x"),
            "source_redirect_refused",
        ),
    ] {
        server.redirect(&format!("/{path}"), &target);
        let before = server.seen().len();
        let error = worker.resolve(&server.url(path), "main").await.unwrap_err();
        assert_eq!(error.code(), expected, "{target}: {error}");
        assert_eq!(server.seen().len(), before + 1, "{target}");
    }
}

#[tokio::test]
async fn what_is_no_git_server_is_told_apart() {
    let remote = BareRemote::new();
    let server = GitHttpServer::start(remote.root()).await;
    server.answer("/page", 200, "text/html", "<h1>Hello</h1>");
    server.answer("/gone", 404, "text/plain", "");
    server.answer("/forbidden", 403, "text/plain", "");
    server.answer("/teapot", 418, "text/plain", "");
    server.answer("/busy", 503, "text/plain", "");
    server.answer("/slow-down", 429, "text/plain", "");
    server.answer(
        "/garbage",
        200,
        "application/x-git-upload-pack-advertisement",
        "zzzz this is no pkt-line",
    );
    let worker = Worker::trusting();
    for (path, expected, retryable) in [
        ("page", "not_a_repository", false),
        ("gone", "not_a_repository", false),
        ("none.git", "not_a_repository", false),
        ("forbidden", "source_forbidden", false),
        ("teapot", "not_a_repository", false),
        ("busy", "source_unavailable", true),
        ("slow-down", "source_unavailable", true),
        ("garbage", "source_protocol", true),
    ] {
        let error = worker.resolve(&server.url(path), "main").await.unwrap_err();
        assert_eq!(error.code(), expected, "{path}: {error}");
        assert_eq!(error.is_retryable(), retryable, "{path}");
        assert!(!error.remedy().is_empty());
    }
    server.require("somebody", "else");
    assert_eq!(
        code(worker.resolve(&server.url(BareRemote::NAME), "main").await),
        "source_auth_required"
    );
    let url = server.url("x.git");
    drop(server);
    let error = worker.resolve(&url, "main").await.unwrap_err();
    assert_eq!(error.code(), "source_unavailable", "{error}");
    let error = worker
        .resolve("https://no-such-host.invalid/x.git", "main")
        .await
        .unwrap_err();
    assert_eq!(error.code(), "source_unavailable", "{error}");
}

#[tokio::test]
async fn a_connection_that_breaks_off_or_stalls_leaves_a_mirror_that_works() {
    let source = SourceRepository::new();
    let noise: String = (0..20_000u64)
        .map(|i| format!("{:x}", i.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
        .collect();
    let commit = source.commit("One", &[("noise", &noise)]);
    let remote = BareRemote::copy_of(&source);
    let server = GitHttpServer::start(remote.root()).await;
    let url = server.url(BareRemote::NAME);
    let mut config = TransportConfig::with_policy(SourcePolicy::trusting());
    config.limits = TransportLimits {
        idle: Duration::from_secs(5),
        ..TransportLimits::default()
    };
    let worker = Worker::new(config);
    let pack = format!("/{}/git-upload-pack", BareRemote::NAME);

    server.cut_after(&pack, 5_000);
    let error = worker.resolve(&url, "main").await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    // What the remote does wrong is no reason to throw the mirror away and ask again.
    let asks = server.seen();
    assert_eq!(
        asks.iter().filter(|s| s.line.starts_with("POST")).count(),
        1
    );
    server.behave();
    server.stay_silent(&pack);
    let error = worker.resolve(&url, "main").await.unwrap_err();
    assert_eq!(error.code(), "source_unavailable", "{error}");
    server.behave();
    let (folder, _) = worker.checkout(&url, &commit).await.unwrap();
    assert_eq!(contents(&folder)["noise"], noise);

    // The same with a bound on what is received.
    let mut config = TransportConfig::with_policy(SourcePolicy::trusting());
    config.limits.received_bytes = 10_000;
    let worker = Worker::new(config);
    assert_eq!(code(worker.resolve(&url, "main").await), "source_too_large");
    let local = remote.path().display().to_string();
    assert_eq!(
        code(worker.resolve(&local, "main").await),
        "source_too_large"
    );
}

#[tokio::test]
async fn a_cancelled_fetch_stops_at_once() {
    let remote = BareRemote::new();
    let server = GitHttpServer::start(remote.root()).await;
    server.stay_silent("/");
    let worker = Worker::trusting();
    let cancel = CancellationToken::new();
    let url = RepositoryUrl::parse(server.url(BareRemote::NAME)).unwrap();
    let git_ref = GitRef::parse("main").unwrap();
    let progress = no_progress();
    let asked = async {
        while server.seen().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cancel.cancel();
    };
    let (result, ()) = tokio::time::timeout(
        Duration::from_secs(60),
        futures_util::future::join(
            worker.sources.resolve(&url, &git_ref, &progress, &cancel),
            asked,
        ),
    )
    .await
    .unwrap();
    let error = result.unwrap_err();
    assert!(error.is_cancelled(), "{error}");
}

#[tokio::test]
async fn progress_comes_in_lines() {
    let source = SourceRepository::new();
    for i in 0..30 {
        source.commit("c", &[(&format!("dir/{i}"), &format!("{i}"))]);
    }
    let lines: Arc<Mutex<Vec<String>>> = Arc::default();
    let progress: Progress = {
        let lines = lines.clone();
        Arc::new(move |line| lines.lock().unwrap().push(line))
    };
    let worker = Worker::trusting();
    let into = worker.folder.path().join("out");
    worker
        .sources
        .checkout(
            &RepositoryUrl::parse(source.url()).unwrap(),
            &CommitId::parse(source.head()).unwrap(),
            &into,
            &progress,
            &CancellationToken::new(),
        )
        .await
        .unwrap();
    let lines = lines.lock().unwrap();
    assert!(
        lines.iter().any(|l| l.starts_with("receiving objects ")),
        "{lines:?}"
    );
    assert_eq!(lines.last().unwrap(), "checked out 30 files");
}

#[tokio::test]
async fn a_broken_mirror_is_made_anew() {
    let source = SourceRepository::new();
    let commit = source.commit("One", &[("a", "1"), ("b/c", "2")]);
    let worker = Worker::trusting();
    worker.resolve(&source.url(), "main").await.unwrap();
    let mirror = worker.mirror();
    type Damage = (&'static str, fn(&Path));
    let damages: [Damage; 5] = [
        ("no HEAD", |m| fs::remove_file(m.join("HEAD")).unwrap()),
        ("no objects", |m| {
            fs::remove_dir_all(m.join("objects")).unwrap();
        }),
        ("cut packs", |m| {
            for file in fs::read_dir(m.join("objects/pack")).unwrap() {
                let path = file.unwrap().path();
                let bytes = fs::read(&path).unwrap();
                fs::remove_file(&path).unwrap();
                fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
            }
        }),
        ("flipped bits", |m| {
            for file in fs::read_dir(m.join("objects/pack")).unwrap() {
                let path = file.unwrap().path();
                if path.extension().is_some_and(|e| e == "pack") {
                    let mut bytes = fs::read(&path).unwrap();
                    for b in &mut bytes[20..] {
                        *b ^= 0x10;
                    }
                    fs::remove_file(&path).unwrap();
                    fs::write(&path, &bytes).unwrap();
                }
            }
        }),
        ("a file", |m| {
            fs::remove_dir_all(m).unwrap();
            fs::write(m, "not a folder").unwrap();
        }),
    ];
    for (what, damage) in damages {
        damage(&mirror);
        let (folder, _) = worker
            .checkout(&source.url(), &commit)
            .await
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(contents(&folder).len(), 2, "{what}");
        fs::remove_dir_all(folder).unwrap();
        git(&mirror, &["fsck", "--full"]);
    }
}

#[tokio::test]
async fn what_a_killed_fetch_left_is_cleared() {
    let source = SourceRepository::new();
    source.commit("One", &[("a", "1")]);
    let worker = Worker::trusting();
    worker.resolve(&source.url(), "main").await.unwrap();
    let mirror = worker.mirror();
    // What a process that dies in the middle of a fetch leaves.
    fs::write(mirror.parent().unwrap().join("busy"), "").unwrap();
    let kept = fs::read_dir(mirror.join("refs/daybook")).unwrap();
    for file in kept {
        let path = file.unwrap().path();
        fs::write(path.with_extension("lock"), "").unwrap();
    }
    fs::write(mirror.join("packed-refs.lock"), "").unwrap();
    fs::write(mirror.join("objects/pack/pack_git2_abc123"), "part").unwrap();
    let second = source.commit("Two", &[("a", "2")]);
    let found = worker.resolve(&source.url(), "main").await.unwrap();
    assert_eq!(found.commit.as_str(), second);
    // The same mirror, cleared; not a new one.
    assert!(!mirror.join("packed-refs.lock").exists());
    assert!(!mirror.join("objects/pack/pack_git2_abc123").exists());
    assert!(!mirror.parent().unwrap().join("busy").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_at_once_share_one_mirror() {
    let source = SourceRepository::new();
    let commit = source.commit("One", &[("a", "1")]);
    let worker = Arc::new(Worker::trusting());
    let tasks: Vec<_> = (0..8)
        .map(|i| {
            let (worker, url) = (worker.clone(), source.url());
            let commit = CommitId::parse(&commit).unwrap();
            tokio::spawn(async move {
                let into = worker.folder.path().join(format!("out-{i}"));
                worker
                    .sources
                    .checkout(
                        &RepositoryUrl::parse(url).unwrap(),
                        &commit,
                        &into,
                        &no_progress(),
                        &CancellationToken::new(),
                    )
                    .await
                    .map(|_| into)
            })
        })
        .collect();
    for task in tasks {
        let folder = task.await.unwrap().unwrap();
        assert_eq!(contents(&folder)["a"], "1");
    }
    let mirrors = fs::read_dir(worker.folder.path().join("sources")).unwrap();
    assert_eq!(mirrors.count(), 1);
}

#[tokio::test]
async fn a_server_that_gives_out_single_commits_is_asked_for_one() {
    let source = SourceRepository::new();
    source.commit("One", &[("a", "1")]);
    let remote = BareRemote::copy_of(&source);
    remote.git(&["config", "uploadpack.allowAnySHA1InWant", "true"]);
    let server = GitHttpServer::start(remote.root()).await;
    // A commit that no branch has any more, as after a forced push.
    let lost = remote.foreign_commit("Lost", &[("a", "lost")]);
    remote.git(&["update-ref", "refs/heads/main", &source.head()]);
    let worker = Worker::trusting();
    let url = server.url(BareRemote::NAME);
    let (folder, _) = worker.checkout(&url, &lost).await.unwrap();
    assert_eq!(contents(&folder)["a"], "lost");
}

#[tokio::test]
async fn sources_come_over_ssh() {
    let Some(server) = SshServer::start() else {
        daybook_testkit::left_out("sources over ssh: there is no sshd on this machine");
        return;
    };
    let source = SourceRepository::new();
    let commit = source.commit("One", &[("a", "1")]);
    let url = server.url(source.path());
    let worker = |known_hosts: Option<PathBuf>, identity: PathBuf| {
        Worker::new(TransportConfig {
            ssh: SshConfig {
                known_hosts,
                identity: Some(identity),
                ..SshConfig::default()
            },
            ..TransportConfig::with_policy(SourcePolicy {
                allow_private_addresses: true,
                ..SourcePolicy::default()
            })
        })
    };
    let good = worker(Some(server.known_hosts()), server.identity());
    assert_eq!(
        good.resolve(&url, "main").await.unwrap().commit.as_str(),
        commit
    );
    let (folder, _) = good.checkout(&url, &commit).await.unwrap();
    assert_eq!(contents(&folder)["a"], "1");
    assert_eq!(code(good.resolve(&url, "none").await), "ref_not_found");
    let none = server.url(Path::new("/nowhere/it's; touch pwned"));
    assert!(RepositoryUrl::parse(none).is_err());
    let none = server.url(Path::new("/nowhere/it's;touch$IFS'pwned"));
    assert_eq!(code(good.resolve(&none, "main").await), "not_a_repository");

    for (known_hosts, identity, expected) in [
        (None, server.identity(), "source_host_key"),
        (
            Some(server.wrong_known_hosts()),
            server.identity(),
            "source_host_key",
        ),
        (
            Some("/nonexistent".into()),
            server.identity(),
            "source_host_key",
        ),
        (
            Some(server.known_hosts()),
            server.stranger(),
            "source_auth_required",
        ),
    ] {
        let error = worker(known_hosts, identity)
            .resolve(&url, "main")
            .await
            .unwrap_err();
        assert_eq!(error.code(), expected, "{error}");
    }
    let private = Worker::new(TransportConfig {
        ssh: SshConfig {
            known_hosts: Some(server.known_hosts()),
            ..SshConfig::default()
        },
        ..TransportConfig::default()
    });
    assert_eq!(
        code(private.resolve(&url, "main").await),
        "source_address_refused"
    );
    drop(server);
    let error = good.resolve(&url, "main").await.unwrap_err();
    assert_eq!(error.code(), "source_unavailable", "{error}");
}

#[tokio::test]
async fn a_repository_of_another_user_is_read() {
    let repo = SourceRepository::new();
    let commit = repo.commit("One", &[("a", "1")]);
    let remote = BareRemote::copy_of(&repo);
    for path in [repo.path(), &remote.path()] {
        if std::os::unix::fs::chown(path, Some(12_345), None).is_err() {
            daybook_testkit::left_out("repositories of other users: only root can make some");
            return;
        }
        let worker = Worker::trusting();
        let url = path.display().to_string();
        let found = worker.resolve(&url, "main").await.unwrap();
        assert_eq!(found.commit.as_str(), commit);
    }
}

#[tokio::test]
async fn the_machines_git_configuration_changes_nothing() {
    // The repository's own one does not, either: it is somebody else's.
    let repo = SourceRepository::new();
    let commit = repo.commit("One", &[("a", "1\n")]);
    let other = SourceRepository::new();
    other.commit("Other", &[("a", "2\n")]);
    repo.git(&["config", "core.autocrlf", "true"]);
    repo.git(&[
        "config",
        &format!("url.{}.insteadOf", other.url()),
        &repo.url(),
    ]);
    let mark = repo.path().join("program-was-run");
    repo.git(&[
        "config",
        "core.fsmonitor",
        &format!("touch {}", mark.display()),
    ]);
    let worker = Worker::trusting();
    let (folder, _) = worker.checkout(&repo.url(), &commit).await.unwrap();
    assert_eq!(contents(&folder)["a"], "1\n");
    assert!(!mark.exists());
}

/// What a child process of the test below does: fetches a repository into a folder of mirrors.
#[tokio::test]
#[ignore = "run by another test, as a process of its own"]
async fn child_that_fetches() {
    let Ok(job) = std::env::var("DAYBOOK_TEST_FETCH") else {
        return;
    };
    let (folder, url) = job.split_once(';').unwrap();
    let transport = GitTransport::new(TransportConfig::with_policy(SourcePolicy::trusting()));
    SourceRepositories::new(folder, transport)
        .resolve(
            &RepositoryUrl::parse(url).unwrap(),
            &GitRef::parse("main").unwrap(),
            &no_progress(),
            &CancellationToken::new(),
        )
        .await
        .unwrap();
    println!("FETCHED");
}

#[tokio::test]
async fn a_process_killed_anywhere_leaves_a_mirror_that_works() {
    let source = SourceRepository::new();
    let worker = Worker::trusting();
    let sources = worker.folder.path().join("sources");
    let mut finished = 0;
    for round in 0..25u64 {
        for i in 0..40 {
            source.write(&format!("{round}/{i}"), format!("{round} {i}"));
        }
        source.commit_all("More");
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["child_that_fetches", "--exact", "--ignored", "--nocapture"])
            .env(
                "DAYBOOK_TEST_FETCH",
                format!("{};{}", sources.display(), source.url()),
            )
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // From before it began to after it ended.
        tokio::time::sleep(Duration::from_millis(round * 2)).await;
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        finished += usize::from(String::from_utf8_lossy(&output.stdout).contains("FETCHED"));
    }
    assert!(finished < 25, "nobody was killed in the middle");
    let head = source.head();
    let found = worker.resolve(&source.url(), "main").await.unwrap();
    assert_eq!(found.commit.as_str(), head);
    let (folder, _) = worker.checkout(&source.url(), &head).await.unwrap();
    assert_eq!(contents(&folder).len(), 25 * 40);
    git(&worker.mirror(), &["fsck", "--full"]);
}
