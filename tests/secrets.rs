//! Secrets: values reach the processes that they are for, and nothing else. Canaries are set as
//! secrets, put into addresses and headers, printed and failed with on purpose, and then looked
//! for in every artefact, in every form.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use aho_corasick::AhoCorasick;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
use daybook_testkit::git::{SourceRepository, git_command};
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{Done, Server, Settings, application, processes_of, request, until};

const INSTANCE: &str = "shop.production.web";
const HOST: &str = "web.shop.localhost";

/// What every canary contains somewhere, in plain letters.
const API_KEY: &str = "sk-Canary/1\"quoted\\+7Qx%zz&ü=end";
const API_KEY_2: &str = "sk-Canary/2 rotated: Wq8+!";
const PEM: &str = "-----BEGIN CANARY-----\nMIICanaryLineOne0123456789\nCanaryLineTwo9876543210==\n-----END CANARY-----";
const IN_ADDRESS: &str = "CanaryInAddress4711";
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

/// The forms of a text that give it away.
fn forms(text: &str) -> Vec<Vec<u8>> {
    let json = serde_json::to_string(text).unwrap();
    let json = json[1..json.len() - 1].to_owned();
    let percent: String = text
        .bytes()
        .map(|b| match b {
            b if b.is_ascii_alphanumeric() || b"-._~".contains(&b) => char::from(b).to_string(),
            b => format!("%{b:02X}"),
        })
        .collect();
    let hex: String = text.bytes().map(|b| format!("{b:02x}")).collect();
    let mut all = vec![text.to_owned(), json, percent, hex];
    for before in ["", ".", ".."] {
        let whole = format!("{before}{text}");
        // Characters that what stands before and behind it has no part in.
        let (from, to) = ((8 * before.len()).div_ceil(6), 8 * whole.len() / 6);
        all.push(STANDARD.encode(&whole)[from..to].to_owned());
        all.push(URL_SAFE.encode(&whole)[from..to].to_owned());
    }
    all.into_iter().map(String::into_bytes).collect()
}

/// Looks for canaries, and remembers where it looked.
struct Search {
    /// Which canary each pattern of `forms` is one of.
    texts: Vec<&'static str>,
    forms: AhoCorasick,
    seen: usize,
    found: Vec<String>,
}

impl Search {
    fn new() -> Self {
        let lines = PEM.lines().filter(|l| l.contains("Line"));
        let texts = [API_KEY, API_KEY_2, IN_ADDRESS, IN_HEADER]
            .into_iter()
            .chain(lines)
            // Also if it is cut: its beginning.
            .chain(["sk-Canary/1\"quo", "sk-Canary/2 rot"]);
        let (texts, forms): (Vec<_>, Vec<_>) = texts
            .flat_map(|t| forms(t).into_iter().map(move |f| (t, f)))
            .unzip();
        Self {
            texts,
            forms: AhoCorasick::new(forms).unwrap(),
            seen: 0,
            found: Vec::new(),
        }
    }

    fn look(&mut self, place: &str, bytes: &[u8]) {
        self.seen += 1;
        if let Some(found) = self.forms.find(bytes) {
            let from = found.start().saturating_sub(60);
            let to = (found.end() + 20).min(bytes.len());
            let around = String::from_utf8_lossy(&bytes[from..to]);
            let text = self.texts[found.pattern().as_usize()];
            self.found
                .push(format!("{text:?} is in {place}: {around:?}"));
        }
    }

    fn look_in(&mut self, folder: &Path, except: &Path) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let kind = fs::symlink_metadata(&path).unwrap().file_type();
            if path == except || kind.is_symlink() {
                continue;
            }
            if kind.is_dir() {
                self.look_in(&path, except);
            } else if kind.is_file() {
                let bytes = fs::read(&path).unwrap_or_default();
                let place = path.display().to_string();
                self.look(&place, &bytes);
                if bytes.starts_with(&[0x1f, 0x8b]) {
                    let unpacked = Command::new("gzip").arg("-dc").arg(&path).output();
                    self.look(&format!("{place}, unpacked"), &unpacked.unwrap().stdout);
                }
            }
        }
    }

    #[track_caller]
    fn found_nothing(self, at_least: usize) {
        assert_eq!(self.found, Vec::<String>::new());
        assert!(self.seen >= at_least, "looked at {} places only", self.seen);
    }
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
exec ./bin/app
"#;
    source.write("talk.sh", script);
    source.write("Procfile", "web: exec sh ./talk.sh\n");
    source.commit_all("Talk too much");
}

fn failing(source: &SourceRepository) {
    let script = "echo \"$TLS_KEY\"\necho \"cannot connect with $API_KEY\" >&2\nexit 3\n";
    source.write("fail.sh", script);
    source.write("Procfile", "web: exec sh ./fail.sh\n");
    source.commit_all("Fail loudly");
}

#[test]
fn canaries_are_nowhere_but_where_they_belong() {
    let settings = Settings::default().env("DAYBOOK_LOG", "debug");
    let mut server = Server::start(settings);
    let source = application("--text unused");
    talkative(&source);
    server.define("shop", "web", &source, &["--health-deadline", "6"]);
    let mut search = Search::new();
    let tell = |search: &mut Search, what: &str, done: &Done| {
        search.look(&format!("stdout of {what}"), done.stdout.as_bytes());
        search.look(&format!("stderr of {what}"), done.stderr.as_bytes());
    };

    let done = server.secret(&["set", "shop", "API_KEY"], &format!("{API_KEY}\n"));
    assert_eq!(done.code, 0, "{done:?}");
    tell(&mut search, "secret set", &done);
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
    tell(&mut search, "deploy", &done);
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

    // Another value: nothing restarts, the next deployment gets it and says so.
    let before = processes_of(&first);
    let told = server.set_secret("API_KEY", API_KEY_2, &[]);
    assert!(told.contains("version 2"), "{told}");
    assert_eq!(processes_of(&first), before);
    talkative(&source);
    let done = server.ok(&["deploy", INSTANCE]);
    tell(&mut search, "deploy", &done);
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
    tell(&mut search, "status", &server.ok(&["status", &first]));
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
        vec!["up", "--nats", "nats://ada:CanaryInAddress4711@127.0.0.1:1"],
    ] {
        if args[0] == "up" {
            continue;
        }
        let done = server.cli(&args);
        assert_ne!(done.code, 0, "{done:?}");
        tell(&mut search, args[0], &done);
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

    look_at_answers(&server, &mut search, &[&first, &second, &failed]);
    server.check_replay();
    let logs = server.ok(&["logs", &second]).stdout;
    assert!(logs.matches("***").count() > 5, "{logs}");
    assert!(server.stop().success());
    look_at_files(&server, &mut search);
    search.found_nothing(100);
}

fn newest(server: &Server) -> String {
    let page = server.read("/api/v1/deployments?limit=1");
    page["deployments"][0]["id"].as_str().unwrap().to_owned()
}

/// Everything that can be asked.
fn look_at_answers(server: &Server, search: &mut Search, deployments: &[&String]) {
    let document = server.read("/openapi.json");
    let paths = document["paths"].as_object().unwrap();
    let mut asked = 0;
    for (path, operations) in paths {
        if operations.get("get").is_none() || path.starts_with("/git/") {
            continue;
        }
        for deployment in deployments {
            let path = path
                .replace("{project}", "shop")
                .replace("{environment}", "production")
                .replace("{service}", "web")
                .replace("{instance}", INSTANCE)
                .replace("{position}", "5")
                .replace("{id}", deployment);
            let url = format!("{}{path}", server.url());
            let authorization = format!("Bearer {IN_HEADER}");
            let headers = [("Authorization", authorization.as_str())];
            let answer = request(Method::GET, &url, &headers, None).unwrap();
            search.look(&format!("GET {path}"), format!("{answer:?}").as_bytes());
            search.look(&format!("GET {path}"), answer.body.as_bytes());
            asked += u32::from(answer.status == 200);
        }
    }
    assert!(asked > 20, "{asked} answers");
    for event in server.events() {
        search.look("an event", event.to_string().as_bytes());
    }
}

/// Everything that is on disk but the secret store: the ledger, lines, projections, images, the
/// clusters' files, the program's own log; and the GitOps repository, unpacked.
fn look_at_files(server: &Server, search: &mut Search) {
    let data = server.folder().data();
    let store = data.join("secrets");
    let mut of_store = Search::new();
    of_store.look_in(&store, Path::new(""));
    of_store.found_nothing(2);
    search.look_in(server.folder().path(), &store);
    let objects = git_command(&server.gitops("shop"))
        .args(["cat-file", "--batch-all-objects", "--batch"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&objects.stdout);
    assert!(text.contains("secretEnv:"), "{text}");
    search.look("the GitOps repository", &objects.stdout);
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
