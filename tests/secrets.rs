//! Secrets: values reach the processes that they are for, and nothing else. Canaries are set as
//! secrets, put into addresses and headers, printed and failed with on purpose, and then looked
//! for in every artefact, in every form.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use daybook_testkit::git::{SourceRepository, git, git_command};
use reqwest::Method;
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use serde_json::{Value, json};

use crate::support::{Done, Search, Server, Settings, application, processes_of, request, until};

const INSTANCE: &str = "shop.production.web";
const HOST: &str = "web.shop.localhost";

/// What every canary contains somewhere, in plain letters.
const API_KEY: &str = "sk-Canary/1\"quoted\\+7Qx%zz&ü=end";
const API_KEY_2: &str = "sk-Canary/2 rotated: Wq8+!";
const PEM: &str = "-----BEGIN CANARY-----\nMIICanaryLineOne0123456789\nCanaryLineTwo9876543210==\n-----END CANARY-----";
const IN_ADDRESS: &str = "CanaryInAddress4711";
/// What only a commit of somebody else may have.
const IN_MESSAGE: &str = "CanaryInMessage0042";
const IN_HEADER: &str = "CanaryInHeader0815";

impl Server {
    /// Runs `daybook secret …` with a value on its standard input.
    #[track_caller]
    fn secret(&self, args: &[&str], value: &str) -> Done {
        let mut command = self.command(&["secret"]);
        command
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // One that complains about its arguments does not read.
        let _ = stdin.write_all(value.as_bytes());
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        Done {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    #[track_caller]
    fn set_secret(&self, name: &str, value: &str, more: &[&str]) -> String {
        let done = self.secret(&[&["set", "shop", name], more].concat(), value);
        assert_eq!(done.code, 0, "{done:?}");
        done.stdout
    }
}

/// Looks for all of them.
fn canaries() -> Search {
    Search::new(texts().chain([IN_MESSAGE]))
}

/// Those that are not even in a commit.
fn texts() -> impl Iterator<Item = &'static str> {
    let lines = PEM.lines().filter(|l| l.contains("Line"));
    [API_KEY, API_KEY_2, IN_ADDRESS, IN_HEADER]
        .into_iter()
        .chain(lines)
        // Also if it is cut: its beginning, or its end.
        .chain(["sk-Canary/1\"quo", "sk-Canary/2 rot"])
        .chain(["Qx%zz&ü=end", "rotated: Wq8+!"])
}

/// An application that prints its secrets in every form before it serves.
fn talkative(source: &SourceRepository) {
    let script = r#"env
env | sort | tr '\n' ' '; echo
printf '%s' "$API_KEY" | base64
printf 'user:%s' "$API_KEY" | base64 -w0; echo
printf '%s' "$TLS_KEY" | base64
printf '%s' "$TLS_KEY" | od -An -tx1 | tr -d ' \n'; echo
printf 'first half %s' "sk-Canary/1"; sleep 0.4; printf '%s\n' "${API_KEY#sk-Canary/1}"
printf '%16360s%s and more\n' '' "$API_KEY"
printf 'login failed for https://user:%s@db.example/\n' "$API_KEY" >&2
exec ./bin/app --describe "$API_KEY"
"#;
    source.write("talk.sh", script);
    source.write("Procfile", "web: exec sh ./talk.sh\n");
    source.commit_all(&format!("Talk too much: {API_KEY}"));
}

/// An application whose last words are so long that what is told of them begins within a secret.
fn failing(source: &SourceRepository) {
    let script = r#"echo "$TLS_KEY"
printf '%s %431s\n' "$API_KEY" . >&2
echo "cannot connect with $API_KEY" >&2
exit 3
"#;
    source.write("fail.sh", script);
    source.write("Procfile", "web: exec sh ./fail.sh\n");
    source.commit_all("Fail loudly");
}

/// A source whose build command, which gets no secrets, knows one all the same.
fn unbuildable(source: &SourceRepository) {
    // The source itself is in images, and does not have it in one piece.
    let (start, rest) = API_KEY.split_at(6);
    let (middle, end) = rest.split_once('x').unwrap();
    let script = format!(
        "printf '%s%sx%s\\n' '{start}' '{middle}' '{end}'\n\
         printf '%16350s%s%sx%s and more\\n' '' '{start}' '{middle}' '{end}'\nexit 4\n"
    );
    source.write("build.sh", script);
    source.commit_all("Build loudly");
}

/// A registry that quotes a secret wherever it refuses something: `refused/…` for good, `busy/…`
/// for now, and of `half/…` everything but the manifest. Returns its address.
fn quoting_registry() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for mut connection in listener.incoming().map_while(Result::ok) {
            let mut request = Vec::new();
            let mut buffer = [0; 4096];
            while !request.ends_with(b"\r\n\r\n") {
                match connection.read(&mut buffer) {
                    Ok(n) if n > 0 => request.extend_from_slice(&buffer[..n]),
                    _ => break,
                }
            }
            let request = String::from_utf8_lossy(&request).into_owned();
            let path = request.split(' ').nth(1).unwrap_or_default();
            let (status, kind, body) = if path.starts_with("/v2/half/")
                && path.contains("/manifests/")
            {
                (
                    "200 OK",
                    "application/vnd.oci.image.manifest.v1+json",
                    manifest(),
                )
            } else if path == "/v2/" {
                ("200 OK", "application/json", json!({}))
            } else {
                let message = format!("not with {API_KEY}");
                let errors = json!({ "errors": [{ "code": "UNSUPPORTED", "message": message }] });
                let status = if path.starts_with("/v2/busy/") {
                    "503 Service Unavailable"
                } else {
                    "400 Bad Request"
                };
                (status, "application/json", errors)
            };
            let body = body.to_string();
            let length = body.len();
            let body = if request.starts_with("HEAD ") {
                ""
            } else {
                &body
            };
            let _ = write!(
                connection,
                "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\
                 Connection: close\r\n\r\n{body}"
            );
        }
    });
    address
}

/// Of an image of which there is nothing else.
fn manifest() -> Value {
    let blob = |kind: &str, digit: &str| {
        json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": format!("sha256:{}", digit.repeat(64)),
            "size": 100,
        })
    };
    json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob("config.v1+json", "1"),
        "layers": [blob("layer.v1.tar+gzip", "2")],
    })
}

#[test]
fn canaries_are_nowhere_but_where_they_belong() {
    let settings = Settings::default().env("DAYBOOK_LOG", "debug");
    let settings = settings.arg("--gitops-watch").arg("1");
    let mut server = Server::start(settings);
    let source = application("--text unused");
    talkative(&source);
    server.define("shop", "web", &source, &["--health-deadline", "20"]);
    let mut search = canaries();
    let done = server.secret(&["set", "shop", "API_KEY"], &format!("{API_KEY}\n"));
    assert_eq!(done.code, 0, "{done:?}");
    search.look_at("secret set", &done);
    let file = server.folder().path().join("pem");
    fs::write(&file, PEM).unwrap();
    let path = file.display().to_string();
    let more = [
        "--env",
        "production",
        "--service",
        "web",
        "--from-file",
        &path,
    ];
    server.set_secret("TLS_KEY", "", &more);
    fs::remove_file(&file).unwrap();

    // The application gets them, and prints them; people who visit it may see them, nobody else.
    let done = server.ok(&["deploy", INSTANCE]);
    search.look_at("deploy", &done);
    assert!(done.stdout.contains("API_KEY=***"), "{done:?}");
    let id = server.json(&["status", INSTANCE])["main"].clone();
    let first = match id.as_str() {
        Some(id) => id.to_owned(),
        None => newest(&server),
    };
    let env = server.get_from(HOST, "/env", &first).body;
    assert!(env.contains(API_KEY) && env.contains(PEM), "{env}");
    until("everything that it printed", || {
        let logs = server.ok(&["logs", &first]).stdout;
        logs.contains("login failed for https://user:***@db.example/")
            .then_some(())
    });

    // It fails with a secret in its last words: what ran before goes on.
    failing(&source);
    let failed = server.begin(INSTANCE, &[]);
    let code = server.wait_for_failure(&failed);
    assert_eq!(code, "CrashLoopBackOff");
    let message = server.deployment(&failed)["failure"]["message"].clone();
    let message = message.as_str().unwrap().to_owned();
    assert!(message.contains("cannot connect with ***"), "{message}");

    // So does a build.
    unbuildable(&source);
    let definition = server.folder().path().join("service.json");
    let command = json!({ "build": { "command": ["sh", "build.sh"] } });
    fs::write(&definition, command.to_string()).unwrap();
    let definition = definition.display().to_string();
    server.service("shop", "web", &source, &["--file", &definition]);
    let unbuilt = server.begin(INSTANCE, &[]);
    assert_eq!(server.wait_for_failure(&unbuilt), "build_command_failed");
    let message = server.deployment(&unbuilt)["failure"]["message"].clone();
    assert!(message.as_str().unwrap().contains("***"), "{message}");
    server.service("shop", "web", &source, &["--health-deadline", "20"]);

    // And a registry quotes one: while it is asked for a digest, for good and for now, and while a
    // cluster fetches from it.
    let registry = quoting_registry();
    let image = |name: &str| format!("{registry}/{name}/web:v1");
    let refused = server.begin(INSTANCE, &["--image", &image("refused")]);
    server.wait_for_failure(&refused);
    let message = server.deployment(&refused)["failure"]["message"].clone();
    assert!(
        message.as_str().unwrap().contains("not with ***"),
        "{message}"
    );
    let busy = server.begin(INSTANCE, &["--image", &image("busy")]);
    until("it is tried again", || {
        let log = server.process().log();
        let told = log
            .lines()
            .any(|l| l.contains("will be tried again") && l.contains("***"));
        told.then_some(())
    });
    server.ok(&["cancel", &busy]);
    let half = server.begin(INSTANCE, &["--image", &image("half")]);
    server.wait_for_failure(&half);
    let message = server.deployment(&half)["failure"]["message"].clone();
    assert!(
        message.as_str().unwrap().contains("not with ***"),
        "{message}"
    );

    server.set_secret("NOTE", IN_MESSAGE, &[]);
    // Somebody writes one into the GitOps repository, where everybody with access to it sees it.
    // The ledger does not repeat it.
    let by_hand = server.folder().path().join("by-hand");
    let path = by_hand.display().to_string();
    let gitops = server.gitops("shop").display().to_string();
    git(
        server.folder().path(),
        &["clone", "--quiet", &gitops, &path],
    );
    fs::write(by_hand.join("note"), "nothing secret").unwrap();
    git(&by_hand, &["add", "note"]);
    let author = format!("Eve{IN_MESSAGE} <eve@example.com>");
    let message = format!("rotate to {IN_MESSAGE}");
    git(
        &by_hand,
        &["commit", "--quiet", "--author", &author, "-m", &message],
    );
    git(&by_hand, &["push", "--quiet", "origin", "main"]);
    fs::remove_dir_all(&by_hand).unwrap();
    until("the commit is found", || {
        let kinds = server.events().into_iter();
        let mut found =
            kinds.filter(|e| e["event"]["type"] == "dev.daybook.gitops.foreign_commit_found.v1");
        let event = found.next()?["event"]["data"].clone();
        assert_eq!(event["message"], "rotate to ***");
        assert_eq!(event["author"], "Eve*** <eve@example.com>");
        Some(())
    });

    // Another value: nothing restarts, the next deployment gets it and says so.
    let before = processes_of(&first);
    let told = server.set_secret("API_KEY", API_KEY_2, &[]);
    assert!(told.contains("version 2"), "{told}");
    assert_eq!(processes_of(&first), before);
    talkative(&source);
    let done = server.ok(&["deploy", INSTANCE]);
    search.look_at("deploy", &done);
    assert!(
        done.stdout
            .contains("secrets changed since the main deployment: API_KEY version 2 (was 1)"),
        "{done:?}"
    );
    let second = newest(&server);
    assert!(
        server
            .get_from(HOST, "/env", &second)
            .body
            .contains(API_KEY_2)
    );
    let own = server.host_of(&first, "deployment");
    // The older one still runs with what it was started with, and its words are still masked.
    assert!(server.get(&own, "/env").body.contains(API_KEY));
    server.get(&own, &format!("/print?again {}", "sk-Canary/1"));
    search.look_at("status", &server.ok(&["status", &first]));
    let detail = server.deployment(&first);
    assert_eq!(detail["snapshot"]["secrets"]["API_KEY"]["version"], 1);
    assert_eq!(
        detail["snapshot"]["secrets"]["API_KEY"]["newest_version"],
        2
    );

    // In addresses, headers and wherever else they do not belong.
    let in_address = format!("https://ada:{IN_ADDRESS}@git.example/shop.git?token={IN_ADDRESS}");
    for args in [
        vec!["service", "create", "shop", "other", "--repo", &in_address],
        vec!["deploy", INSTANCE, "--image", &in_address],
        vec!["deploy", INSTANCE, "--ref", &in_address],
        vec!["deploy", INSTANCE, "--reason", API_KEY_2],
        vec![
            "service",
            "create",
            "shop",
            "web",
            "--env",
            "KEY=sk-Canary/2 rotated: Wq8+!",
        ],
        vec!["status", "--server", &in_address],
    ] {
        let done = server.cli(&args);
        assert_ne!(done.code, 0, "{done:?}");
        search.look_at(args[0], &done);
    }
    let secrets = format!("{}/api/v1/projects/shop/secrets", server.url());
    let key = format!("{secrets}/API_KEY");
    for (method, url, body) in [
        (
            Method::PUT,
            &key,
            json!({ "value": API_KEY, "version": API_KEY }),
        ),
        (Method::PUT, &key, json!({ "value": [API_KEY] })),
        (Method::PUT, &key, json!(API_KEY)),
        (
            Method::PUT,
            &format!("{secrets}/PORT"),
            json!({ "value": API_KEY }),
        ),
        (
            Method::PUT,
            &key,
            json!({ "value": API_KEY, "environment": "none" }),
        ),
        (
            Method::POST,
            &format!("{key}/verify"),
            json!({ "value": API_KEY, "version": 99 }),
        ),
    ] {
        let headers = [
            ("Authorization", format!("Bearer {IN_HEADER}")),
            (
                "Idempotency-Key",
                format!("{method} {body}").len().to_string(),
            ),
        ];
        let headers: Vec<_> = headers.iter().map(|(k, v)| (*k, v.as_str())).collect();
        let answer = request(method, url, &headers, Some(&body)).unwrap();
        assert!(answer.status >= 400, "{answer:?}");
        search.look(
            "the answer to a bad request",
            format!("{answer:?}").as_bytes(),
        );
    }

    let authorization = format!("Bearer {IN_HEADER}");
    for deployment in [&first, &second, &failed, &unbuilt, &refused, &busy, &half] {
        search.look_at_answers(&server, deployment, &authorization);
    }
    server.check_replay();
    let logs = server.ok(&["logs", &second]).stdout;
    assert!(logs.matches("***").count() > 5, "{logs}");
    // What a process prints stands in its file until it is carried from there.
    let clusters = server.folder().data().join("clusters");
    until("all output is carried", || {
        let mut printed = canaries();
        printed.look_in(&clusters, Path::new(""));
        printed.is_clean().then_some(())
    });
    assert!(server.stop().success());
    look_at_files(&server, &mut search);
    search.found_nothing(100);
}

fn newest(server: &Server) -> String {
    let page = server.read("/api/v1/deployments?limit=1");
    page["deployments"][0]["id"].as_str().unwrap().to_owned()
}

/// Everything that is on disk but the secret store: the ledger, lines, projections, images, the
/// clusters' files, the program's own log; and the GitOps repository, unpacked.
fn look_at_files(server: &Server, search: &mut Search) {
    let data = server.folder().data();
    let store = data.join("secrets");
    let mut of_store = canaries();
    of_store.look_in(&store, Path::new(""));
    of_store.found_nothing(2);
    search.look_in(server.folder().path(), &store);
    let objects = git_command(&server.gitops("shop"))
        .args(["cat-file", "--batch-all-objects", "--batch"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&objects.stdout);
    assert!(text.contains("secretEnv:"), "{text}");
    let mut of_repository = Search::new(texts());
    of_repository.look("the GitOps repository", &objects.stdout);
    of_repository.found_nothing(1);
}

#[test]
fn a_secret_is_set_listed_verified_and_taken_away() {
    let server = Server::start(Settings::default());
    let source = application("--text hello");
    server.define("shop", "web", &source, &[]);
    server.set_secret("KEY", "the first value", &[]);
    let again = server.set_secret("KEY", "the first value", &[]);
    assert!(again.contains("has this value already"), "{again}");
    server.set_secret("KEY", "the second value", &[]);
    server.set_secret("KEY", "only for production", &["--env", "production"]);

    let listed = server.json(&["secret", "list", "shop"]);
    let rows: Vec<_> = listed["secrets"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| {
            (
                s["environment"].clone(),
                s["version"].clone(),
                s["changed_by"]["id"].clone(),
            )
        })
        .collect();
    let expected = [(Value::Null, 2), (json!("production"), 1)];
    assert_eq!(
        rows,
        expected
            .map(|(e, v)| (e, json!(v), json!("tester")))
            .to_vec()
    );
    for (value, version, code) in [
        ("the second value", None, 0),
        ("the first value", None, 8),
        ("the first value", Some("1"), 0),
        ("the first value", Some("3"), 4),
    ] {
        let mut args = vec!["verify", "shop", "KEY"];
        args.extend(version.iter().flat_map(|v| ["--of-version", v]));
        let done = server.secret(&args, value);
        assert_eq!(done.code, code, "{done:?}");
    }

    // The nearest one reaches the process, and survives a restart of it.
    let id = server.deploy(INSTANCE, &[]);
    let env = server.get_from(HOST, "/env", &id).body;
    assert!(env.contains("KEY=only for production\n"), "{env}");
    server.ok(&["secret", "unset", "shop", "KEY", "--env", "production"]);
    server.get(HOST, "/exit?1");
    let env = server.get_from(HOST, "/env", &id).body;
    assert!(env.contains("KEY=only for production\n"), "{env}");
    // A redeployment has the secrets of now, not those of then.
    let redone = server.json(&["redeploy", &id, "--detach"]);
    let redone = redone["id"].as_str().unwrap().to_owned();
    server.wait_for(&redone, "started");
    let env = server.get_from(HOST, "/env", &redone).body;
    assert!(env.contains("KEY=the second value\n"), "{env}");

    // A value that is gone fails the deployment before anything is replaced.
    fs::remove_file(server.folder().data().join("secrets/shop.secrets")).unwrap();
    let done = server.cli(&["deploy", INSTANCE, "--output", "json"]);
    assert_eq!(done.code, 2, "{done:?}");
    assert_eq!(done.error()["code"], "secret_missing");
    assert!(
        done.error()["hint"]
            .as_str()
            .unwrap()
            .contains("daybook secret set")
    );
    assert_eq!(server.get(HOST, "/").by(), Some(redone.as_str()));
    let done = server.secret(
        &["verify", "shop", "KEY", "--output", "json"],
        "the second value",
    );
    assert_eq!(done.error()["code"], "secret_key_erased");

    // The same request sets it once; what could not be masked is refused.
    let key = ["--idempotency-key", "one", "--output", "json"];
    server.set_secret("KEY", "the third value", &key);
    let repeated = server.set_secret("KEY", "the third value", &key);
    assert!(repeated.contains("\"version\":3"), "{repeated}");
    let done = server.secret(
        &[&["set", "shop", "KEY"][..], &key].concat(),
        "another value",
    );
    assert_eq!(done.error()["code"], "idempotency_key_reused");
    let done = server.secret(&["set", "shop", "KEY", "--output", "json"], "short");
    assert_eq!(done.error()["code"], "secret_too_short");
    server.check_replay();
}

#[test]
fn erased_secrets_cannot_be_found_out_any_more() {
    let server = Server::start(Settings::default());
    let source = application("--text hello");
    server.define("shop", "web", &source, &[]);
    let done = server.cli(&["secret", "erase", "shop", "--yes", "--output", "json"]);
    assert_eq!(done.error()["code"], "no_secrets");
    server.set_secret("KEY", "the first value", &[]);
    server.set_secret("KEY", "the second value", &[]);
    server.set_secret("OTHER", "another value", &["--env", "production"]);
    let id = server.deploy(INSTANCE, &[]);
    let file = server.folder().data().join("secrets/shop.secrets");
    let mut kept = fs::File::open(&file).unwrap();

    let done = server.cli(&["secret", "erase", "shop", "--output", "json"]);
    assert_eq!(
        (done.code, &done.error()["code"]),
        (2, &json!("not_confirmed"))
    );
    assert!(file.exists());
    let erased = server.ok(&["secret", "erase", "shop", "--yes"]).stdout;
    assert!(erased.contains("erased"), "{erased}");

    // Not even whoever still holds the file open can read it.
    assert!(!file.exists());
    let mut bytes = Vec::new();
    kept.read_to_end(&mut bytes).unwrap();
    assert!(bytes.len() > 100 && bytes.iter().all(|b| *b == 0));
    let listed = server.json(&["secret", "list", "shop"]);
    assert_eq!(listed["secrets"], json!([]));
    for version in ["1", "2"] {
        let args = [
            "verify",
            "shop",
            "KEY",
            "--of-version",
            version,
            "--output",
            "json",
        ];
        let done = server.secret(&args, "the second value");
        assert_eq!(done.error()["code"], "secret_key_erased", "{done:?}");
    }
    // What was deployed cannot be started again, and says so; what comes has no secrets.
    let env = server.get_from(HOST, "/env", &id).body;
    assert!(env.contains("KEY=the second value\n"), "{env}");
    let next = server.deploy(INSTANCE, &[]);
    let env = server.get_from(HOST, "/env", &next).body;
    assert!(!env.contains("KEY="), "{env}");

    // The ledger says what happened, under whatever key is next.
    let of = |kind: &str| -> Vec<Value> {
        let kind = format!("dev.daybook.project.{kind}.v1");
        let events = server.events().into_iter();
        let of_kind = events.filter(|e| e["event"]["type"] == kind);
        of_kind.map(|e| e["event"]["data"].clone()).collect()
    };
    let set = of("secret_set");
    assert_eq!(of("secrets_erased"), [json!({ "keys": [set[0]["key"]] })]);
    for event in &set {
        let commitment = event["commitment"].as_str().unwrap();
        assert!(commitment.starts_with("hmac-sha256:") && commitment.len() == 76);
    }
    let told = server.set_secret("KEY", "the third value", &[]);
    assert!(told.contains("version 3"), "{told}");
    assert_ne!(of("secret_set").last().unwrap()["key"], set[0]["key"]);
    server.ok(&["secret", "erase", "shop", "--yes"]);
    server.check_replay();
}

#[cfg(target_os = "linux")]
#[test]
fn a_crash_leaves_no_memory_behind() {
    let limitless = Rlimit {
        current: None,
        maximum: None,
    };
    let folder = crate::support::Folder::new();
    let mut other = Command::new("sleep")
        .arg("1000")
        .current_dir(folder.path())
        .spawn()
        .unwrap();
    let pid = |pid: u32| Pid::from_raw(i32::try_from(pid).unwrap());
    let may = prlimit(pid(other.id()), Resource::Core, limitless).is_ok();
    kill_process(pid(other.id()).unwrap(), Signal::ABORT).unwrap();
    if !may || !other.wait().unwrap().core_dumped() {
        daybook_testkit::left_out("core files: this machine writes none");
        return;
    }
    let mut server = Server::start(Settings::default());
    server.ok(&["project", "create", "shop"]);
    server.set_secret("API_KEY", API_KEY, &[]);
    prlimit(pid(server.process().pid()), Resource::Core, limitless).unwrap();
    server.process().signal(Signal::ABORT);
    let ended = server.stop();
    assert_eq!((ended.signal(), ended.core_dumped()), (Some(6), false));
}
