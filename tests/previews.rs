//! Webhooks, and the environments of pull requests, with deliveries of the form that each provider
//! documents.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use daybook_testkit::git::{SourceRepository, git};
use hmac::{Hmac, Mac};
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    Answer, Server, Settings, application, processes_of, replace_flags, request_with, until,
};

const SECRET: &str = "whsec_c2VjcmV0IGtleSBvZiAzMiBieXRlcywgYXQgbGVhc3Q=";
const HOST: &str = "web.pr-142.shop.localhost";

/// A project with a service, a running staging environment and a webhook.
struct Shop {
    server: Server,
    source: SourceRepository,
    provider: &'static str,
}

/// How a provider signs a body.
fn mac(key: &[u8], body: &[u8]) -> Vec<u8> {
    let mut mac = Hmac::<sha2::Sha256>::new_from_slice(key).unwrap();
    mac.update(body);
    mac.finalize().into_bytes().to_vec()
}

impl Shop {
    fn new(provider: &'static str, hook: &[&str]) -> Self {
        Self::with(provider, hook, &[])
    }

    fn with(provider: &'static str, hook: &[&str], service: &[&str]) -> Self {
        let server = Server::start(Settings::default());
        let source = application("--text one");
        server.define("shop", "web", &source, service);
        let shop = Self {
            server,
            source,
            provider,
        };
        let file = shop.server.folder().path().join("secret");
        std::fs::write(&file, format!("{SECRET}\n")).unwrap();
        let file = file.to_str().unwrap().to_owned();
        let mut add = vec!["hook", "add", "shop", "--provider", provider];
        add.extend(["--secret-file", &file]);
        add.extend(hook);
        shop.server.ok(&add);
        shop
    }

    fn path(&self) -> String {
        format!("/api/v1/projects/shop/hooks/{}", self.provider)
    }

    /// Sends a delivery as its provider does.
    fn send(&self, event: &str, id: &str, body: &Value) -> Answer {
        let body = body.to_string();
        let hex = hex::encode(mac(SECRET.as_bytes(), body.as_bytes()));
        let headers: Vec<(&str, String)> = match self.provider {
            "github" => vec![
                ("X-GitHub-Event", event.into()),
                ("X-GitHub-Delivery", id.into()),
                ("X-Hub-Signature-256", format!("sha256={hex}")),
            ],
            "gitea" => vec![
                ("X-Gitea-Event", event.into()),
                ("X-Gitea-Delivery", id.into()),
                ("X-Gitea-Signature", hex),
            ],
            _ => vec![
                ("X-Gitlab-Event", event.into()),
                ("Idempotency-Key", id.into()),
                ("X-Gitlab-Token", SECRET.into()),
            ],
        };
        self.raw(&headers, &body)
    }

    fn raw(&self, headers: &[(&str, String)], body: &str) -> Answer {
        let mut all: Vec<(&str, &str)> = headers.iter().map(|(k, v)| (*k, v.as_str())).collect();
        all.push(("Content-Type", "application/json"));
        let url = format!("{}{}", self.server.url(), self.path());
        request_with(Method::POST, &url, &all, body).unwrap()
    }

    /// A delivery about pull request 142, at this second.
    fn pull_request(&self, action: &str, head: &str, second: u32) -> (&'static str, Value) {
        let url = self.source.url();
        let closed = matches!(action, "closed" | "close" | "merge");
        match self.provider {
            "gitlab" => (
                "Merge Request Hook",
                json!({
                    "object_kind": "merge_request",
                    "event_type": "merge_request",
                    "user": { "id": 1, "name": "Alice", "username": "alice" },
                    "project": {
                        "id": 7, "path_with_namespace": "acme/shop",
                        "web_url": "http://gitlab.example.com/acme/shop",
                        "git_ssh_url": "git@gitlab.example.com:acme/shop.git",
                        "git_http_url": url,
                    },
                    "object_attributes": {
                        "id": 99, "iid": 142, "target_branch": "main", "source_branch": "tax",
                        "source_project_id": 7, "target_project_id": 7,
                        "title": "Show prices with tax",
                        "state": if closed { "closed" } else { "opened" },
                        "url": "http://gitlab.example.com/acme/shop/merge_requests/142",
                        "updated_at": format!("2026-01-31 10:00:{second:02} UTC"),
                        "last_commit": { "id": head, "message": "Tax" },
                        "action": action,
                    },
                }),
            ),
            _ => {
                let repository = json!({
                    "id": 7, "full_name": "acme/shop", "clone_url": url,
                    "ssh_url": "git@git.example.com:acme/shop.git",
                    "html_url": "https://git.example.com/acme/shop",
                });
                (
                    "pull_request",
                    json!({
                        "action": action,
                        "number": 142,
                        "pull_request": {
                            "number": 142,
                            "html_url": "https://git.example.com/acme/shop/pull/142",
                            "state": if closed { "closed" } else { "open" },
                            "title": "Show prices with tax",
                            "updated_at": format!("2026-01-31T10:00:{second:02}Z"),
                            "merged": closed,
                            "head": { "ref": "tax", "sha": head, "repo": repository },
                            "base": { "ref": "main", "repo": repository },
                        },
                        "repository": repository,
                        "sender": { "login": "alice", "id": 1 },
                    }),
                )
            }
        }
    }

    fn tell(&self, action: &str, head: &str, second: u32) -> Value {
        let (event, body) = self.pull_request(action, head, second);
        let id = format!("{action}-{head}-{second}");
        let answer = self.send(event, &id, &body);
        assert!(matches!(answer.status, 200 | 202), "{answer:?}");
        answer.json()
    }

    /// The deployments of the environment, newest first.
    fn deployments(&self, environment: &str) -> Vec<Value> {
        let path = format!("/api/v1/deployments?project=shop&environment={environment}");
        self.server.read(&path)["deployments"]
            .as_array()
            .cloned()
            .unwrap()
    }

    /// Waits until this commit is deployed to the environment, and live.
    fn live(&self, environment: &str, commit: &str) -> String {
        let id = until("the commit is deployed", || {
            let found = self.deployments(environment);
            let found = found.iter().find(|d| d["version"] == commit)?;
            Some(found["id"].as_str().unwrap().to_owned())
        });
        self.server.wait_for(&id, "started");
        id
    }

    fn gone(&self, environment: &str) {
        until("the environment is gone", || {
            self.environment(environment).is_none().then_some(())
        });
    }

    fn environment(&self, name: &str) -> Option<Value> {
        let all = self.server.read("/api/v1/projects/shop/environments");
        let all = all["environments"].as_array().unwrap().clone();
        all.into_iter().find(|e| e["name"] == name)
    }
}

/// The words of each provider for the same things.
fn words(provider: &str) -> [&'static str; 4] {
    match provider {
        "gitlab" => ["open", "update", "reopen", "merge"],
        "gitea" => ["opened", "synchronized", "reopened", "closed"],
        _ => ["opened", "synchronize", "reopened", "closed"],
    }
}

fn from_open_to_closed(provider: &'static str) {
    let shop = Shop::new(provider, &["--base", "production"]);
    let [opened, updated, reopened, closed] = words(provider);
    let first = shop.source.head();
    let answer = shop.tell(opened, &first, 1);
    assert_eq!(answer["outcome"], "accepted", "{answer}");
    assert_eq!(answer["environment"], "pr-142");
    let id = shop.live("pr-142", &first);
    assert_eq!(shop.server.get_from(HOST, "/", &id).body, "one");

    let listed = shop.environment("pr-142").unwrap();
    assert_eq!(listed["ephemeral"], true);
    assert_eq!(listed["pull_request"]["number"], 142);
    assert_eq!(listed["pull_request"]["title"], "Show prices with tax");
    assert_eq!(listed["pull_request"]["head"], first.as_str());
    let url = listed["urls"][0].as_str().unwrap();
    assert!(url.starts_with(&format!("http://{HOST}")), "{url}");
    let table = shop.server.ok(&["env", "list", "shop"]).stdout;
    assert!(table.contains("#142") && table.contains(HOST), "{table}");
    let who = shop.server.read("/api/v1/audit?limit=100");
    assert!(who.to_string().contains("\"alice\""), "{who}");

    let second = replace_flags(&shop.source, "--text two");
    assert_eq!(shop.tell(updated, &second, 2)["outcome"], "accepted");
    let next = shop.live("pr-142", &second);
    assert_eq!(shop.server.get_from(HOST, "/", &next).body, "two");
    // What comes late changes nothing.
    let late = shop.tell(updated, &first, 1);
    assert_eq!(late["outcome"], "ignored", "{late}");
    assert_eq!(late["code"], "stale_delivery");

    assert_eq!(shop.tell(closed, &second, 3)["outcome"], "accepted");
    shop.gone("pr-142");
    assert!(processes_of(&next).is_empty());
    until("the gateway to have heard of it", || {
        (shop.server.get(HOST, "/").status == 404).then_some(())
    });
    // Whatever follows from a pull request is by who sent it.
    let authors = git(
        &shop.server.gitops("shop"),
        &["log", "--format=%an", "--grep=pr-142", "main"],
    );
    assert!(authors.lines().all(|a| a == "alice"), "{authors}");
    for (action, head, at) in [
        (opened, &first, 1),
        (updated, &second, 2),
        (updated, &second, 3),
    ] {
        let answer = shop.tell(action, head, at);
        let repeated = answer["outcome"] == "accepted";
        assert!(repeated || answer["code"] == "stale_delivery", "{answer}");
    }
    assert!(shop.environment("pr-142").is_none());

    assert_eq!(shop.tell(reopened, &second, 4)["outcome"], "accepted");
    let again = until("it is deployed again", || {
        let found = shop.deployments("pr-142");
        let newest = found.first()?["id"].as_str()?.to_owned();
        (newest != next).then_some(newest)
    });
    shop.server.wait_for(&again, "started");
    assert_eq!(shop.server.get_from(HOST, "/", &again).body, "two");
    shop.server.check_replay();
}

#[test]
fn a_pull_request_of_github_has_an_environment_for_as_long_as_it_is_open() {
    from_open_to_closed("github");
}

#[test]
fn a_merge_request_of_gitlab_has_an_environment_for_as_long_as_it_is_open() {
    from_open_to_closed("gitlab");
}

#[test]
fn a_pull_request_of_gitea_has_an_environment_for_as_long_as_it_is_open() {
    from_open_to_closed("gitea");
}

#[test]
fn a_delivery_counts_once_and_a_close_counts_before_its_opening() {
    let shop = Shop::new("github", &[]);
    let head = shop.source.head();
    // The close comes first: the opening is late, whenever it comes.
    assert_eq!(shop.tell("closed", &head, 5)["outcome"], "accepted");
    assert_eq!(shop.tell("opened", &head, 1)["code"], "stale_delivery");
    assert_eq!(shop.tell("synchronize", &head, 5)["code"], "stale_delivery");
    assert!(shop.environment("pr-142").is_none());

    let (event, body) = shop.pull_request("reopened", &head, 6);
    let first = shop.send(event, "one", &body);
    let again = shop.send(event, "one", &body);
    assert_eq!((first.status, again.status), (202, 202));
    assert_eq!(first.json()["position"], again.json()["position"]);
    assert_eq!(again.headers["idempotency-replayed"], "true");
    // The same under another id is known already.
    assert_eq!(shop.send(event, "two", &body).json()["code"], "unchanged");
    // Another delivery under the same id is none.
    let (_, other) = shop.pull_request("synchronize", &head, 7);
    let reused = shop.send(event, "one", &other);
    assert_eq!(reused.json()["code"], "idempotency_key_reused");
    shop.live("pr-142", &head);
    assert_eq!(shop.deployments("pr-142").len(), 1);
    shop.server.check_replay();
}

#[test]
fn a_close_ends_a_build_and_a_kill_after_the_answer_loses_nothing() {
    let mut shop = Shop::new("github", &[]);
    let head = shop.source.head();
    let spec = shop.server.folder().path().join("service.json");
    let build = json!({ "build": { "command": ["/bin/sh", "-c", "sleep 600"] } });
    std::fs::write(&spec, build.to_string()).unwrap();
    let flags = ["--file", spec.to_str().unwrap()];
    shop.server.service("shop", "web", &shop.source, &flags);
    assert_eq!(shop.tell("opened", &head, 1)["outcome"], "accepted");
    // Killed as soon as it is answered.
    shop.server.kill();
    shop.server.restart();
    let id = until("it is being built", || {
        let found = shop.deployments("pr-142");
        let found = found.iter().find(|d| d["state"] == "building")?;
        Some(found["id"].as_str().unwrap().to_owned())
    });
    assert_eq!(shop.tell("closed", &head, 2)["outcome"], "accepted");
    shop.server.kill();
    shop.server.restart();
    shop.gone("pr-142");
    assert_eq!(shop.server.deployment(&id)["state"], "cancelled");
    assert_eq!(shop.deployments("pr-142").len(), 1);
    assert!(processes_of(&id).is_empty());
    until("the files of the build are removed", || {
        (shop.server.folder().work_in_progress() == 0).then_some(())
    });
    shop.server.check_replay();
}

#[test]
fn what_is_not_signed_or_not_understood_is_refused_and_changes_nothing() {
    let shop = Shop::new("github", &[]);
    let before = shop.server.events().len();
    let head = shop.source.head();
    let (event, body) = shop.pull_request("opened", &head, 1);
    let text = body.to_string();
    let signature = |body: &str| {
        let mac = mac(SECRET.as_bytes(), body.as_bytes());
        format!("sha256={}", hex::encode(mac))
    };
    let deliver = |event: &str, signature: Option<String>, body: &str| {
        let mut headers = vec![("X-GitHub-Delivery", "d".to_owned())];
        if !event.is_empty() {
            headers.push(("X-GitHub-Event", event.to_owned()));
        }
        headers.extend(signature.map(|s| ("X-Hub-Signature-256", s)));
        let answer = shop.raw(&headers, body);
        let code = answer.json()["code"].as_str().unwrap().to_owned();
        (answer.status, code)
    };
    let wrong = signature("other");
    let long = "x".repeat(5 * 1024 * 1024);
    let mut fork = body.clone();
    fork["pull_request"]["head"]["repo"]["full_name"] = "mallory/shop".into();
    let fork = fork.to_string();
    let mut elsewhere = body.clone();
    elsewhere["repository"]["clone_url"] = "https://git.example.com/acme/other.git".into();
    let elsewhere = elsewhere.to_string();
    for (event, signature, body, status, code) in [
        (event, None, text.as_str(), 401, "invalid_signature"),
        (event, Some(wrong), &text, 401, "invalid_signature"),
        (
            event,
            Some("sha256=".into()),
            &text,
            401,
            "invalid_signature",
        ),
        (
            event,
            Some("sha256=zz".into()),
            &text,
            401,
            "invalid_signature",
        ),
        (event, Some("sha1=00".into()), "{", 401, "invalid_signature"),
        (event, None, &long, 413, "body_too_large"),
        ("", Some(signature(&text)), &text, 400, "event_missing"),
        (event, Some(signature("{")), "{", 400, "malformed_json"),
        (event, Some(signature("[1]")), "[1]", 422, "invalid_payload"),
        ("ping", Some(signature("{}")), "{}", 200, "ping"),
        ("star", Some(signature("{}")), "{}", 200, "unknown_event"),
        (event, Some(signature(&fork)), &fork, 200, "foreign_head"),
        (
            event,
            Some(signature(&elsewhere)),
            &elsewhere,
            200,
            "other_repository",
        ),
    ] {
        let got = deliver(event, signature, body);
        assert_eq!(got, (status, code.to_owned()));
    }
    assert_eq!(shop.server.events().len(), before);
    let metrics = shop.server.ok(&["events", "--output", "json"]).stdout;
    assert!(!metrics.contains(SECRET), "the secret is in the ledger");

    // A new secret makes the one before void.
    let rotated = shop.server.json(&["hook", "rotate", "shop", "github"]);
    assert!(rotated["secret"].as_str().unwrap().starts_with("whsec_"));
    let old = deliver(event, Some(signature(&text)), &text);
    assert_eq!(old, (401, "invalid_signature".to_owned()));
    let listed = shop.server.ok(&["hook", "list", "shop"]).stdout;
    assert!(
        listed.contains("github") && !listed.contains("whsec_"),
        "{listed}"
    );
    shop.server
        .ok(&["hook", "remove", "shop", "github", "--yes"]);
    let gone = deliver(event, Some(signature(&text)), &text);
    // It says as much as of one that never was.
    assert_eq!(gone, (401, "invalid_signature".to_owned()));
}

#[test]
fn gitlab_may_sign_as_the_standard_says() {
    let shop = Shop::new("gitlab", &[]);
    let head = shop.source.head();
    let (event, body) = shop.pull_request("open", &head, 1);
    let text = body.to_string();
    let key = STANDARD
        .decode(SECRET.trim_start_matches("whsec_"))
        .unwrap();
    let deliver = |signature: String| {
        let headers = [
            ("X-Gitlab-Event", event.to_owned()),
            ("webhook-id", "d1".to_owned()),
            ("webhook-timestamp", "1769853600".to_owned()),
            ("webhook-signature", signature),
            // A token beside it does not help.
            ("X-Gitlab-Token", SECRET.to_owned()),
        ];
        shop.raw(&headers, &text)
    };
    let signed = format!("d1.1769853600.{text}");
    let right = STANDARD.encode(mac(&key, signed.as_bytes()));
    let wrong = STANDARD.encode(mac(&key, text.as_bytes()));
    assert_eq!(deliver(format!("v1,{wrong}")).status, 401);
    assert_eq!(deliver(format!("v1,{wrong} v1,{right}")).status, 202);
    shop.live("pr-142", &head);
}

#[test]
fn pushes_go_where_they_are_asked_for_and_never_over_a_rollback() {
    let shop = Shop::new("github", &[]);
    let branch = shop.source.git(&["branch", "--show-current"]);
    let push = |id: &str, head: &str| {
        let body = json!({
            "ref": format!("refs/heads/{branch}"),
            "before": "0".repeat(40), "after": head,
            "repository": { "full_name": "acme/shop", "clone_url": shop.source.url() },
            "sender": { "login": "alice" },
            "commits": [],
        });
        shop.send("push", id, &body).json()
    };
    let first = shop.source.head();
    assert_eq!(push("p1", &first)["code"], "branch_not_wanted");
    shop.server
        .ok(&["env", "auto-deploy", "shop", "production", &branch]);
    assert_eq!(push("p2", &first)["outcome"], "accepted");
    let one = shop.live("production", &first);
    let host = "web.shop.localhost";
    assert_eq!(shop.server.get_from(host, "/", &one).body, "one");
    let second = replace_flags(&shop.source, "--text two");
    push("p3", &second);
    let two = shop.live("production", &second);
    shop.server.get_from(host, "/", &two);
    // An older push that comes late finds that its branch has moved on.
    assert_eq!(push("p4", &first)["outcome"], "accepted");

    shop.server.ok(&["rollback", "shop.production.web"]);
    shop.server.get_from(host, "/", &one);
    let third = replace_flags(&shop.source, "--text three");
    push("p5", &third);
    let three = shop.live("production", &third);
    assert_eq!(shop.server.get(host, "/").by(), Some(one.as_str()));
    assert_ne!(three, one);
    assert_eq!(shop.deployments("production").len(), 3);
    shop.server
        .ok(&["env", "auto-deploy", "shop", "production", "--off"]);
    assert_eq!(push("p6", &third)["code"], "branch_not_wanted");
    shop.server.check_replay();
}

#[test]
fn a_push_to_a_frozen_environment_waits_and_the_newest_goes() {
    let shop = Shop::new("github", &[]);
    let server = &shop.server;
    let branch = shop.source.git(&["branch", "--show-current"]);
    server.ok(&["env", "auto-deploy", "shop", "production", &branch]);
    let freeze = ["freeze", "add", "shop", "production", "sale"];
    server.ok(&[&freeze[..], &["--from", "2020-01-01T00:00"]].concat());
    let push = |id: &str, head: &str| {
        let body = json!({
            "ref": format!("refs/heads/{branch}"),
            "before": "0".repeat(40), "after": head,
            "repository": { "full_name": "acme/shop", "clone_url": shop.source.url() },
            "sender": { "login": "alice" },
            "commits": [],
        });
        assert_eq!(shop.send("push", id, &body).json()["outcome"], "accepted");
    };
    let held = |number: usize| {
        until("a deployment waits", || {
            let all = shop.deployments("production");
            let newest = all.first().filter(|_| all.len() == number)?;
            let id = newest["id"].as_str()?.to_owned();
            (server.deployment(&id)["hold"]["waits"] == true).then_some(id)
        })
    };
    push("p1", &shop.source.head());
    let first = held(1);
    let second = replace_flags(&shop.source, "--text two");
    push("p2", &second);
    let newest = held(2);
    server.wait_for(&first, "cancelled");
    server.ok(&["freeze", "remove", "shop", "production", "sale"]);
    assert_eq!(shop.live("production", &second), newest);
    server.get_from("web.shop.localhost", "/", &newest);
    server.check_replay();
}
