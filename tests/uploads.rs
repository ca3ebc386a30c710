//! Deploying what is in a folder: without a remote, without a repository, and from elsewhere.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use daybook_testkit::TESTAPP;
use daybook_testkit::nats::{NatsBinary, NatsServer};
use serde_json::{Value, json};

use crate::support::{Done, Folder, Process, Server, Settings, daybook, until};

const INSTANCE: &str = "shop.production.web";
const HOST: &str = "web.shop.localhost";
/// What is in a file that nobody should get.
const CANARY: &str = "canary-of-a-dot-env-4711";

/// A folder with the test application.
struct Source(tempfile::TempDir);

impl Source {
    fn new(flags: &str) -> Self {
        let source = Self(
            tempfile::Builder::new()
                .prefix("shop web ")
                .tempdir()
                .unwrap(),
        );
        fs::create_dir_all(source.path().join("bin")).unwrap();
        let app = source.path().join("bin/app");
        fs::copy(TESTAPP, &app).unwrap();
        fs::set_permissions(&app, fs::Permissions::from_mode(0o755)).unwrap();
        source.starts(flags);
        source
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path().join(name), text).unwrap();
    }

    fn starts(&self, flags: &str) {
        self.write("Procfile", &format!("web: exec ./bin/app {flags}\n"));
    }

    fn git(&self, arguments: &[&str]) -> String {
        let mut git = Command::new("git");
        git.args(["-c", "user.name=Ada", "-c", "user.email=ada@shop.example"]);
        git.env("GIT_CONFIG_GLOBAL", "/dev/null");
        let done = git
            .args(arguments)
            .current_dir(self.path())
            .output()
            .unwrap();
        assert!(done.status.success(), "{arguments:?}: {done:?}");
        String::from_utf8(done.stdout).unwrap().trim().to_owned()
    }
}

/// A server with the service, which has no source.
fn server(settings: Settings) -> Server {
    let server = Server::start(settings);
    server.ok(&["project", "create", "shop"]);
    let cluster = ["--cluster", "local-a"];
    server.ok(&[&["env", "create", "shop", "production"][..], &cluster].concat());
    server.ok(&["service", "create", "shop", "web"]);
    server
}

/// Runs `daybook deploy` in a folder.
fn deploy_in(server: &Server, folder: &Path, flags: &[&str]) -> Done {
    let mut command = server.command(&[&["deploy", INSTANCE][..], flags].concat());
    Done::of(command.current_dir(folder))
}

/// Runs it until it is live: the deployment, and what was said.
fn live(server: &Server, folder: &Path, flags: &[&str]) -> (String, Done) {
    let done = deploy_in(server, folder, flags);
    assert_eq!(done.code, 0, "{done:?}");
    let id = done.stdout.lines().find_map(|line| {
        let id = line.strip_prefix(INSTANCE)?.trim();
        (id.len() == 36).then(|| id.to_owned())
    });
    let id = id.unwrap_or_else(|| panic!("{done:?}"));
    server.wait_for(&id, "started");
    (id, done)
}

fn uploads(server: &Server) -> Vec<Value> {
    let events = server
        .events()
        .into_iter()
        .map(|line| line["event"].clone());
    let kind = "dev.daybook.project.source_uploaded.v1";
    events.filter(|event| event["type"] == kind).collect()
}

fn commit_of(server: &Server, id: &str) -> String {
    let detail = server.deployment(id);
    let commit = detail.pointer("/source/commit").and_then(Value::as_str);
    commit.unwrap_or_else(|| panic!("{detail}")).to_owned()
}

fn repository(server: &Server) -> std::path::PathBuf {
    server.folder().data().join("uploads/shop/web.git")
}

fn files_of(server: &Server, commit: &str) -> Vec<String> {
    let mut git = Command::new("git");
    git.arg("--git-dir").arg(repository(server));
    let done = git
        .args(["ls-tree", "-r", "--name-only", commit])
        .output()
        .unwrap();
    let text = String::from_utf8(done.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn a_folder_without_a_repository_is_deployed_changed_and_rolled_back() {
    let source = Source::new("--text one");
    source.write(".gitignore", "*.log\n");
    source.write("debug.log", CANARY);
    source.write(".env", CANARY);
    source.write(".env.example", "TOKEN=\n");
    let server = server(Settings::default());
    let (first, said) = live(&server, source.path(), &[]);
    assert!(said.stderr.contains("taking "), "{said:?}");
    assert!(said.stderr.contains("uploaded "), "{said:?}");
    assert!(said.stderr.contains("left out .env,"), "{said:?}");
    assert_eq!(server.get_from(HOST, "/", &first).body, "one");

    // The whole of what was uploaded is recorded, with who did.
    let uploaded = uploads(&server);
    let [upload] = uploaded.as_slice() else {
        panic!("{uploaded:?}");
    };
    let commit = commit_of(&server, &first);
    assert_eq!(upload["data"]["commit"], commit.as_str());
    assert_eq!(upload["data"]["service"], "web");
    assert!(upload["data"]["bytes"].as_u64().unwrap() > 0);
    assert_eq!(upload["authid"], "tester", "{upload}");
    assert_eq!(
        files_of(&server, &commit),
        [".env.example", ".gitignore", "Procfile", "bin/app"]
    );
    let requested = server.deployment(&first);
    let text = requested.to_string();
    assert!(
        text.contains("https://uploads.daybook/shop/web.git"),
        "{text}"
    );

    // The same content is uploaded once, and its build shared.
    let (again, said) = live(&server, source.path(), &[]);
    assert!(said.stderr.contains("nothing to upload"), "{said:?}");
    assert_eq!(commit_of(&server, &again), commit);
    assert_eq!(uploads(&server).len(), 1);
    let builds = |kind: &str| {
        let events = server.events();
        let of_kind = events.iter().filter(|e| e["event"]["type"] == kind);
        of_kind.count()
    };
    assert_eq!(builds("dev.daybook.build.succeeded.v1"), 1);

    // What has changed is another commit, and only the change is sent.
    source.starts("--text two");
    let (second, _) = live(&server, source.path(), &[]);
    assert_eq!(server.get_from(HOST, "/", &second).body, "two");
    let sizes: Vec<_> = uploads(&server)
        .iter()
        .map(|e| e["data"]["bytes"].as_u64().unwrap())
        .collect();
    assert!(
        sizes.len() == 2 && sizes[1] < 2000 && sizes[0] > 2000,
        "{sizes:?}"
    );

    // Back, by switching and by repeating.
    server.ok(&["rollback", INSTANCE]);
    server.get_from(HOST, "/", &again);
    server.ok(&["mark-main", &second]);
    let repeated = server.json(&["redeploy", &first, "--detach"]);
    let repeated = repeated["id"].as_str().unwrap().to_owned();
    server.wait_for(&repeated, "started");
    assert_eq!(server.get_from(HOST, "/", &repeated).body, "one");
    // A tag or branch of nowhere is none of it, and what was not uploaded is refused.
    let body = json!({ "instance_id": INSTANCE, "upload": "0".repeat(40) });
    let refused = server.post("/api/v1/deployments", &body, None);
    assert_eq!(refused.json()["code"], "upload_not_found", "{refused:?}");
    // It is nobody's source.
    let mine = ["--repo", "https://uploads.daybook/bank/api.git"];
    let create = ["service", "create", "shop", "thief", "--output", "json"];
    let refused = server.cli(&[&create[..], &mine].concat());
    assert_eq!(refused.error()["code"], "source_is_uploads", "{refused:?}");
    // It can be cloned.
    let clone = server.folder().path().join("clone");
    let url = format!("{}/uploads/shop/web.git", server.url());
    let mut git = Command::new("git");
    git.args(["clone", "--quiet", "--mirror", &url]).arg(&clone);
    assert!(git.status().unwrap().success());
    let mut show = Command::new("git");
    show.arg("--git-dir").arg(&clone);
    let shown = show
        .args(["show", &format!("{commit}:Procfile")])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&shown.stdout).contains("--text one"));
    for secret in [repository(&server).as_path(), server.folder().path()] {
        let mut grep = Command::new("grep");
        let found = grep
            .args(["-r", "-l", CANARY])
            .arg(secret)
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8_lossy(&found.stdout),
            "",
            "it was uploaded"
        );
    }
    server.check_replay();
}

#[test]
fn a_work_tree_is_taken_as_it_is_and_its_repository_is_left_alone() {
    let source = Source::new("--text committed");
    fs::create_dir(source.path().join("docs")).unwrap();
    source.write("docs/notes.txt", "kept\n");
    source.write("gone.txt", "gone\n");
    source.git(&["init", "--quiet", "--initial-branch=main"]);
    source.write(".gitignore", "kept.cfg\n*.tmp\n");
    source.write("kept.cfg", "ignored, and committed all the same\n");
    source.git(&["add", "--all"]);
    source.git(&["add", "--force", "kept.cfg"]);
    source.git(&["commit", "--quiet", "-m", "Start the shop"]);
    source.git(&["stash", "list"]);
    let server = server(Settings::default());

    let (clean, _) = live(&server, source.path(), &[]);
    let said = server.deployment(&clean).to_string();
    assert!(said.contains("Start the shop"), "{said}");

    // Changed, staged, deleted, new and ignored: what counts is what lies there.
    source.starts("--text worktree");
    source.write("staged.txt", "staged\n");
    source.git(&["add", "staged.txt"]);
    source.write("new.txt", "new\n");
    source.write("left.tmp", CANARY);
    fs::remove_file(source.path().join("gone.txt")).unwrap();
    let before = (
        source.git(&["status", "--porcelain=v2"]),
        fs::read(source.path().join(".git/index")).unwrap(),
        source.git(&["for-each-ref"]),
        source.git(&["rev-parse", "HEAD"]),
        source.git(&["count-objects", "-v"]),
    );
    // From a folder within it: that is where the service is then.
    let (changed, _) = live(&server, source.path(), &["--from", "."]);
    assert_eq!(server.get_from(HOST, "/", &changed).body, "worktree");
    assert_eq!(
        files_of(&server, &commit_of(&server, &changed)),
        [
            ".gitignore",
            "Procfile",
            "bin/app",
            "docs/notes.txt",
            "kept.cfg",
            "new.txt",
            "staged.txt"
        ]
    );
    let after = (
        source.git(&["status", "--porcelain=v2"]),
        fs::read(source.path().join(".git/index")).unwrap(),
        source.git(&["for-each-ref"]),
        source.git(&["rev-parse", "HEAD"]),
        source.git(&["count-objects", "-v"]),
    );
    assert!(before == after, "{before:?} {after:?}");
    let said = server.deployment(&changed).to_string();
    assert!(said.contains("Start the shop, with changes"), "{said}");

    // One with a remote is for the server to clone, unless it is said otherwise.
    source.git(&[
        "remote",
        "add",
        "origin",
        "git@git.example.com:shop/web.git",
    ]);
    let refused = deploy_in(&server, source.path(), &["--output", "json"]);
    assert_eq!(refused.error()["code"], "source_has_remote", "{refused:?}");
    source.write("Procfile", "web: exec ../bin/app --text within\n");
    fs::rename(
        source.path().join("Procfile"),
        source.path().join("docs/Procfile"),
    )
    .unwrap();
    let within = source.path().join("docs");
    let done = deploy_in(
        &server,
        &within,
        &["--from", ".", "--detach", "--output", "json"],
    );
    let id = done.json()["id"].as_str().unwrap().to_owned();
    let asked = server.deployment(&id).to_string();
    assert!(asked.contains(r#""path":"docs""#), "{asked}");
    let ended = until("it has ended", || {
        let detail = server.deployment(&id);
        let state = detail["state"].as_str().unwrap().to_owned();
        ["started", "failed", "start_error"]
            .contains(&state.as_str())
            .then_some(detail)
    });
    assert!(ended["source"]["commit"].is_string(), "{ended}");
}

#[test]
fn what_is_too_large_or_no_source_is_refused_with_a_way_out() {
    let source = Source::new("--text one");
    let bounds = ["--upload-max-mib", "1", "--uploads-project-max-mib", "1"];
    let server = server(bounds.into_iter().fold(Settings::default(), Settings::arg));
    // It does not compress.
    let mut noise = vec![0; 3 << 20];
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for chunk in noise.chunks_mut(8) {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        chunk.copy_from_slice(&seed.to_le_bytes()[..chunk.len()]);
    }
    fs::create_dir(source.path().join("dataset")).unwrap();
    fs::write(source.path().join("dataset/noise"), &noise).unwrap();
    let refused = deploy_in(&server, source.path(), &["--output", "json"]);
    let error = refused.error();
    assert_eq!(error["code"], "upload_too_large", "{error}");
    assert!(
        error["message"].as_str().unwrap().contains("dataset"),
        "{error}"
    );
    assert!(error.to_string().contains(".gitignore"), "{error}");
    // Whoever does not ask first is refused by the server.
    let path = "/api/v1/projects/shop/services/web/uploads";
    let send = |body: Vec<u8>, commit: &str| {
        let url = format!("{}{path}?commit={commit}", server.url());
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let request = reqwest::Client::new().post(url).body(body);
            let request = request.header("Content-Type", "application/x-git-packed-objects");
            let answer = request.send().await.unwrap();
            let status = answer.status().as_u16();
            (status, answer.json::<Value>().await.unwrap())
        })
    };
    let zero = "0".repeat(40);
    let (status, problem) = send(vec![0; (1 << 20) + 1], &zero);
    assert_eq!(
        (status, problem["code"].as_str()),
        (413, Some("upload_too_large"))
    );
    for body in [b"".to_vec(), b"PACK".to_vec(), noise[..4000].to_vec()] {
        let (status, problem) = send(body, &zero);
        assert_eq!(
            (status, problem["code"].as_str()),
            (422, Some("invalid_upload"))
        );
    }
    // Folders in folders in folders, which programs go down by recursion; and the same content by
    // somebody else, who says that it was made long ago.
    let made = |script: &str| {
        let folder = tempfile::tempdir().unwrap();
        let run = |script: &str| {
            let mut shell = Command::new("sh");
            shell.args(["-ec", script]).current_dir(folder.path());
            shell.env("GIT_CONFIG_GLOBAL", "/dev/null");
            for who in ["AUTHOR", "COMMITTER"] {
                shell.env(format!("GIT_{who}_NAME"), "Ada");
                shell.env(format!("GIT_{who}_EMAIL"), "ada@shop.example");
            }
            let done = shell.output().unwrap();
            assert!(done.status.success(), "{script}: {done:?}");
            done.stdout
        };
        let commit = run(&format!(
            "git init --quiet --bare .; t=$(printf '100644 blob %s\\tf\\n' \
             $(echo text | git hash-object -w --stdin) | git mktree); {script}"
        ));
        let commit = String::from_utf8(commit).unwrap().trim().to_owned();
        let pack = run(&format!(
            "git rev-list --objects {commit} | cut -d ' ' -f 1 \
             | git pack-objects --quiet --window=0 --stdout"
        ));
        (pack, commit)
    };
    let (deep, commit) = made(
        "for i in $(seq 200); do t=$(printf '040000 tree %s\\td\\n' $t | git mktree); done; \
         git commit-tree -m Deep $t",
    );
    let (status, problem) = send(deep, &commit);
    assert_eq!(status, 422, "{problem}");
    assert!(problem.to_string().contains("128 deep"), "{problem}");
    let (pack, first) = made("git commit-tree -m First $t");
    let (status, answer) = send(pack, &first);
    assert_eq!((status, answer["commit"].as_str()), (201, Some(&*first)));
    let (pack, older) =
        made("GIT_COMMITTER_DATE='2001-01-01T00:00:00Z' git commit-tree -m Older $t");
    let (status, answer) = send(pack, &older);
    assert_eq!((status, answer["commit"].as_str()), (201, Some(&*first)));
    assert_eq!(uploads(&server).len(), 1);
    // All that a project has uploaded has a bound as well.
    for (expected, code) in [(201, None), (507, Some("uploads_full"))] {
        let (pack, commit) = made(
            "b=$(head -c 700000 /dev/urandom | git hash-object -w --stdin); \
             t=$(printf '100644 blob %s\\tf\\n' $b | git mktree); git commit-tree -m Noise $t",
        );
        let (status, answer) = send(pack, &commit);
        assert_eq!(
            (status, answer["code"].as_str()),
            (expected, code),
            "{answer}"
        );
    }
    assert_eq!(uploads(&server).len(), 2);
    let incoming = server.folder().data().join("uploads/.incoming");
    assert_eq!(fs::read_dir(incoming).unwrap().count(), 0);

    let empty = tempfile::tempdir().unwrap();
    for (folder, code) in [
        (empty.path().to_str().unwrap(), "folder_empty"),
        ("/", "folder_too_broad"),
        ("/no/such/folder", "folder_missing"),
    ] {
        let refused = deploy_in(
            &server,
            empty.path(),
            &["--from", folder, "--output", "json"],
        );
        assert_eq!(refused.error()["code"], code, "{refused:?}");
    }
    // A service of an image is not made from whatever lies here.
    let image = ["--image-repository", "registry.example/web"];
    server.ok(&[&["service", "create", "shop", "web"][..], &image].concat());
    let refused = deploy_in(&server, source.path(), &["--output", "json"]);
    assert_eq!(refused.error()["code"], "version_required", "{refused:?}");
    assert_eq!(uploads(&server).len(), 2);
}

/// A build worker that shares neither folder nor token with anybody.
#[test]
fn a_worker_on_another_machine_fetches_what_was_uploaded() {
    let Some(binary) = NatsBinary::newest().or_else(|| NatsBinary::installed().pop()) else {
        return daybook_testkit::left_out("uploads on two machines: there is no nats-server");
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let nats = runtime.block_on(NatsServer::start(&binary));
    let env = [("DAYBOOK_NATS".to_owned(), nats.url().to_owned())];
    let (here, there) = (Folder::new(), Folder::new());
    let roles = "api,package,sync,route,probe,timers,gateway,notary";
    let ports = ["--listen", "127.0.0.1:0", "--gateway", "127.0.0.1:0"];
    let serve = ["serve", "--role", roles, "--auth", "required"];
    let server = Process::start(&here, &[&serve[..], &ports].concat(), &env);
    let (url, admin) = (server.fact("url"), server.fact("admin_token"));
    let source = Source::new("--text elsewhere");
    let run = |token: &str, args: &[&str]| {
        let mut command = daybook();
        command.env("DAYBOOK_URL", &url).env("DAYBOOK_TOKEN", token);
        Done::of(command.args(args).current_dir(source.path()))
    };
    let ok = |token: &str, args: &[&str]| {
        let done = run(token, args);
        assert_eq!(done.code, 0, "{args:?}: {done:?}");
        done
    };
    ok(&admin, &["project", "create", "shop"]);
    let cluster = ["--cluster", "local-a"];
    ok(
        &admin,
        &[&["env", "create", "shop", "production"][..], &cluster].concat(),
    );
    ok(&admin, &["service", "create", "shop", "web"]);
    let token = |name: &str, role: &str| {
        let create = ["token", "create", name, "--role", role, "--project", "shop"];
        ok(&admin, &create).stdout.trim().to_owned()
    };
    let (ci, worker, viewer) = (
        token("ci", "deployer"),
        token("worker", "deployer"),
        token("reads", "viewer"),
    );
    let detached = ["deploy", INSTANCE, "--detach", "--output", "json"];
    // Whoever may only look may neither upload nor read what was uploaded.
    let refused = run(&viewer, &[&detached[..], &["--from", "."]].concat());
    assert_eq!(refused.error()["code"], "role_missing", "{refused:?}");
    let begin = || ok(&ci, &detached).json()["id"].as_str().unwrap().to_owned();
    let read = |id: &str| ok(&admin, &["status", id, "--output", "json"]).json();

    // One that nobody told where uploads are says so.
    let secrets = here.data().join("secrets");
    let build = [
        "serve",
        "--role",
        "build",
        "--secrets",
        secrets.to_str().unwrap(),
        "--allow-local-sources",
        "false",
    ];
    // What stands for a registry.
    fs::create_dir_all(there.data()).unwrap();
    std::os::unix::fs::symlink(here.data().join("images"), there.data().join("images")).unwrap();
    let lost = Process::start(&there, &build, &env);
    let id = begin();
    until("it says what it lacks", || {
        let status = read(&id).to_string();
        status.contains("upload_out_of_reach").then_some(())
    });
    lost.kill();

    let credentials = there.path().join("credentials");
    let address = url.replace("http://", &format!("http://worker:{worker}@"));
    fs::write(&credentials, format!("{address}\n")).unwrap();
    let more = [
        "--uploads-url",
        url.as_str(),
        "--uploads-credentials",
        credentials.to_str().unwrap(),
    ];
    let _knows = Process::start(&there, &[&build[..], &more].concat(), &env);
    let id = begin();
    until("it is built elsewhere, and live", || {
        let status = read(&id);
        assert_ne!(status["state"], "failed", "{status}");
        (status["state"] == "started").then_some(())
    });
    for (who, may) in [(&ci, true), (&viewer, false)] {
        let mut git = Command::new("git");
        let address = url.replace("http://", &format!("http://any:{who}@"));
        git.args(["ls-remote", &format!("{address}/uploads/shop/web.git")]);
        git.env("GIT_TERMINAL_PROMPT", "0");
        assert_eq!(git.output().unwrap().status.success(), may);
    }
}
