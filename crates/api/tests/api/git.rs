use std::path::Path;
use std::process::Output;

use reqwest::Method;

use crate::support::*;

async fn git(dir: &Path, arguments: &[&str]) -> Output {
    tokio::process::Command::new("git")
        .args(arguments)
        .current_dir(dir)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_AUTHOR_NAME", "a")
        .env("GIT_AUTHOR_EMAIL", "a@example.com")
        .env("GIT_COMMITTER_NAME", "a")
        .env("GIT_COMMITTER_EMAIL", "a@example.com")
        .output()
        .await
        .unwrap()
}

async fn must(dir: &Path, arguments: &[&str]) -> String {
    let output = git(dir, arguments).await;
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "git {arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A server with the repository of `shop`, and the folder that it was made in.
async fn with_repository() -> (Server, tempfile::TempDir) {
    let work = tempfile::tempdir().unwrap();
    let root = work.path().to_owned();
    must(&root, &["init", "-q", "-b", "main", "source"]).await;
    let source = root.join("source");
    // Enough commits that a client compresses what it says about them.
    for n in 0..60 {
        std::fs::write(source.join(format!("values-{n}.yaml")), format!("n: {n}\n")).unwrap();
        must(&source, &["add", "."]).await;
        must(
            &source,
            &[
                "commit",
                "-q",
                "-m",
                &format!("deploy(production): api {n}"),
            ],
        )
        .await;
    }
    std::fs::create_dir(root.join("repositories")).unwrap();
    must(
        &root,
        &["clone", "-q", "--bare", "source", "repositories/shop.git"],
    )
    .await;
    let repositories = root.join("repositories");
    let server = server_with(|settings, _| settings.git_root = Some(repositories)).await;
    (server, work)
}

#[tokio::test]
async fn a_repository_is_cloned_and_fetched_by_git() {
    let (server, work) = with_repository().await;
    let url = format!("{}/git/shop.git", server.base);
    for version in ["0", "1", "2"] {
        let protocol = format!("protocol.version={version}");
        let folder = format!("clone-{version}");
        must(
            work.path(),
            &["-c", &protocol, "clone", "-q", &url, &folder],
        )
        .await;
        let clone = work.path().join(&folder);
        let count = must(&clone, &["rev-list", "--count", "HEAD"]).await;
        assert_eq!(count, "60", "protocol {version}");
        must(&clone, &["fsck", "--strict"]).await;
    }
    let source = work.path().join("source");
    must(
        &source,
        &["commit", "-q", "--allow-empty", "-m", "one more"],
    )
    .await;
    must(&source, &["push", "-q", "../repositories/shop.git", "main"]).await;
    let clone = work.path().join("clone-2");
    // Commits of its own make the client list what it has at length.
    for n in 0..40 {
        let message = format!("mine {n}");
        must(&clone, &["commit", "-q", "--allow-empty", "-m", &message]).await;
    }
    must(&clone, &["fetch", "-q", "origin"]).await;
    let subject = must(&clone, &["log", "-1", "--format=%s", "origin/main"]).await;
    assert_eq!(subject, "one more");
    let shallow = must(
        work.path(),
        &["clone", "-q", "--depth", "1", &url, "shallow"],
    )
    .await;
    assert_eq!(shallow, "");
}

#[tokio::test]
async fn pushing_is_refused_in_words() {
    let (server, work) = with_repository().await;
    let url = format!("{}/git/shop.git", server.base);
    must(work.path(), &["clone", "-q", &url, "clone"]).await;
    let clone = work.path().join("clone");
    must(&clone, &["commit", "-q", "--allow-empty", "-m", "mine"]).await;
    let output = git(&clone, &["push", "origin", "main"]).await;
    assert!(!output.status.success());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("read-only"), "{errors}");
    let receive = server.request(Method::POST, "/git/shop.git/git-receive-pack");
    assert_eq!(server.send(receive).await.status, 404);
}

#[tokio::test]
async fn only_repositories_of_projects_are_served() {
    let (server, work) = with_repository().await;
    for name in [
        "none.git",
        "shop",
        "..%2fsource.git",
        "..%2f..%2fetc.git",
        ".git",
        "%00.git",
        "SHOP.git",
        "-x.git",
    ] {
        let path = format!("/git/{name}/info/refs?service=git-upload-pack");
        let reply = server.get(&path).await;
        assert_eq!(reply.status, 404, "{name}: {reply:?}");
    }
    let output = git(
        work.path(),
        &["clone", &format!("{}/git/none.git", server.base), "none"],
    )
    .await;
    assert!(!output.status.success());
    for query in ["", "?service=x", "?service=git-upload-archive"] {
        let reply = server.get(&format!("/git/shop.git/info/refs{query}")).await;
        assert_eq!(reply.status, 403, "{query}");
    }
    let post = |media_type: &str, body: Vec<u8>| {
        server
            .request(Method::POST, "/git/shop.git/git-upload-pack")
            .header("Content-Type", media_type)
            .body(body)
    };
    let media_type = "application/x-git-upload-pack-request";
    assert_eq!(server.send(post("text/plain", vec![])).await.status, 415);
    let large = server
        .send(post(media_type, vec![b'0'; 9 * 1024 * 1024]))
        .await;
    assert_eq!(large.status, 413);
    let request = post(media_type, b"no gzip".to_vec()).header("Content-Encoding", "gzip");
    assert_eq!(server.send(request).await.status, 400);
    // Nonsense is answered by git in its own words, or not at all.
    let nonsense = server.send(post(media_type, b"zzzz".to_vec())).await;
    assert!(nonsense.status.as_u16() >= 200, "{nonsense:?}");
    assert_eq!(server.get("/healthz").await.status, 200);
}
