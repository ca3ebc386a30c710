//! Who may do what: asked on every surface, with tokens of every kind.

use std::path::Path;
use std::process::Output;
use std::time::Duration;

use daybook_api::access::{AccessMode, Principal};
use daybook_api::commands::{Caller, CommandError, Commands};
use daybook_events::access::{Grant, Projects, Role};
use futures_util::{SinkExt, StreamExt};
use reqwest::Method;
use serde_json::{Value, json};

use crate::sockets;
use crate::support::*;

/// A server that asks for tokens, with the one that may do everything.
struct Guarded {
    server: Server,
    admin: String,
}

/// A token that nobody has made.
const UNKNOWN: &str =
    "daybook_000000000000_0000000000000000000000000000000000000000000000000000000000000000";

impl Guarded {
    async fn start() -> Self {
        Self::start_with(|_, _| {}).await
    }

    async fn start_with(adjust: impl FnOnce(&mut daybook_api::Settings, &Path)) -> Self {
        let server = server_with(|settings, dir| {
            settings.access = AccessMode::Required;
            settings.git_root = Some(dir.join("git"));
            adjust(settings, dir);
            let git = dir.join("git");
            for project in ["shop", "bank"] {
                let made = std::process::Command::new("git")
                    .args(["init", "-q", "--bare"])
                    .arg(git.join(format!("{project}.git")))
                    .status()
                    .unwrap();
                assert!(made.success());
            }
        })
        .await;
        let commands = commands(&server);
        let admin = commands.first_token().await.unwrap().unwrap();
        let admin = admin.reveal().to_string();
        let guarded = Self { server, admin };
        guarded.fill().await;
        guarded
    }

    /// Two projects, `shop` and `bank`, each with a deployment.
    async fn fill(&self) {
        for project in ["shop", "bank"] {
            let paths = format!("/api/v1/projects/{project}");
            let create = json!({ "name": project });
            self.admin(Method::POST, "/api/v1/projects", create)
                .await
                .ok();
            let service = json!({ "image_repository": "registry.example/cache" });
            self.admin(Method::PUT, &format!("{paths}/services/cache"), service)
                .await
                .ok();
            let environment = json!({ "name": "production", "clusters": ["east"], "live": true });
            self.admin(Method::POST, &format!("{paths}/environments"), environment)
                .await
                .ok();
            self.deploy(project).await;
        }
    }

    async fn deploy(&self, project: &str) -> String {
        let body =
            json!({ "instance_id": format!("{project}.production.cache"), "version": "1.0" });
        let made = self.admin(Method::POST, "/api/v1/deployments", body).await;
        made.ok()["id"].as_str().unwrap().to_owned()
    }

    async fn admin(&self, method: Method, path: &str, body: Value) -> Reply {
        self.with(&self.admin, method, path, body).await
    }

    async fn with(&self, token: &str, method: Method, path: &str, body: Value) -> Reply {
        let request = self.server.request(method, path).bearer_auth(token);
        let request = match body {
            Value::Null => request,
            body => request.json(&body),
        };
        self.server.send(request).await
    }

    async fn get(&self, token: &str, path: &str) -> Reply {
        self.with(token, Method::GET, path, Value::Null).await
    }

    /// Makes a token and returns its id and the whole of it.
    async fn token(&self, name: &str, role: &str, projects: &[&str]) -> (String, String) {
        let projects = match projects {
            [] => json!("all"),
            names => json!({ "named": names }),
        };
        let body = json!({ "name": name, "grants": [{ "role": role, "projects": projects }] });
        let made = self.admin(Method::POST, "/api/v1/tokens", body).await.ok();
        let text = |key: &str| made[key].as_str().unwrap().to_owned();
        (text("id"), text("token"))
    }

    /// Makes a webhook with a token and answers what came of it.
    async fn webhook(&self, token: &str, project: &str) -> Reply {
        let body = json!({ "project": project, "url": format!("https://{project}.example/hook") });
        self.with(token, Method::POST, "/api/v1/webhooks", body)
            .await
    }

    async fn revoke(&self, id: &str) {
        let path = format!("/api/v1/tokens/{id}");
        self.admin(Method::DELETE, &path, json!({})).await.ok();
    }

    async fn deployment_of(&self, project: &str) -> String {
        let path = format!("/api/v1/deployments?project={project}");
        let listed = self.get(&self.admin, &path).await.ok();
        listed["deployments"][0]["id"].as_str().unwrap().to_owned()
    }
}

fn commands(server: &Server) -> Commands {
    let settings = daybook_api::Settings::loopback(7080);
    Commands::new(server.ledger.clone(), std::sync::Arc::new(settings))
}

async fn ls_remote(base: &str, token: Option<&str>, project: &str) -> Output {
    let base = match token {
        None => base.to_owned(),
        Some(token) => base.replacen("http://", &format!("http://git:{token}@"), 1),
    };
    tokio::process::Command::new("git")
        .args(["ls-remote", &format!("{base}/git/{project}.git")])
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_TERMINAL_PROMPT", "0")
        .output()
        .await
        .unwrap()
}

#[tokio::test]
async fn whoever_shows_nothing_good_is_refused_at_the_door_of_every_surface() {
    let guarded = Guarded::start().await;
    let server = &guarded.server;
    let (id, revoked) = guarded.token("gone", "admin", &[]).await;
    guarded.revoke(&id).await;
    let surfaces = [
        "/api/v1/projects",
        "/api/v1/projects/shop",
        "/api/v1/whoami",
        "/api/v1/events",
        "/api/v1/events?follow=true",
        "/api/v1/cdevents",
        "/api/v1/cdevents?follow=true",
        "/api/v1/webhooks",
        "/api/v1/events/chain",
        "/graphql",
        "/api/v1/tokens",
        "/metrics",
        "/tlog/tile/entries/000",
    ];
    for path in surfaces {
        let reply = server.get(path).await;
        reply.refused(401, "unauthenticated");
        let challenge = reply.header("www-authenticate").unwrap();
        assert!(challenge.starts_with("Bearer "), "{challenge}");
        for (token, code) in [
            (UNKNOWN, "unknown_token"),
            ("nonsense", "invalid_credential"),
            (revoked.as_str(), "token_revoked"),
        ] {
            let reply = guarded.get(token, path).await;
            reply.refused(401, code);
            let challenge = reply.header("www-authenticate").unwrap();
            assert!(challenge.contains("invalid_token"), "{challenge}");
        }
    }
    // A wrong secret of a token that exists says nothing of the token.
    let wrong = format!("daybook_{id}_{}", "0".repeat(64));
    guarded
        .get(&wrong, "/api/v1/projects")
        .await
        .refused(401, "unknown_token");
    // Two credentials are none.
    let request = server.request(Method::GET, "/api/v1/projects");
    let request = request.bearer_auth(&guarded.admin).bearer_auth(UNKNOWN);
    server
        .send(request)
        .await
        .refused(401, "invalid_credential");
    // The REST interface takes no passwords, which a browser would send by itself.
    let request = server.request(Method::GET, "/api/v1/projects");
    let request = request.basic_auth("x", Some(&guarded.admin));
    server
        .send(request)
        .await
        .refused(401, "invalid_credential");
    for path in [
        "/healthz",
        "/readyz",
        "/openapi.json",
        "/",
        "/api/v1/ledger",
    ] {
        assert_ne!(server.get(path).await.status.as_u16(), 401, "{path}");
    }
    let git = ls_remote(&server.base, None, "shop").await;
    assert!(!git.status.success());
    for bad in [UNKNOWN, revoked.as_str()] {
        assert!(
            !ls_remote(&server.base, Some(bad), "shop")
                .await
                .status
                .success()
        );
    }
    let git = ls_remote(&server.base, Some(&guarded.admin), "shop").await;
    assert!(git.status.success(), "{git:?}");
}

/// Which of viewer, deployer, approver, auditor and admin may.
const ALL: [bool; 5] = [true; 5];
const DEPLOYS: [bool; 5] = [false, true, false, false, true];
const APPROVES: [bool; 5] = [false, false, true, false, true];
const OVERSEES: [bool; 5] = [false, false, false, true, true];
const ADMINISTERS: [bool; 5] = [false, false, false, false, true];

/// What is asked for, and who may have it. The answer beyond the door does not matter here: it may be
/// a refusal for another reason.
const TABLE: &[(&str, &str, [bool; 5])] = &[
    ("GET", "/api/v1/whoami", ALL),
    ("GET", "/api/v1/projects", ALL),
    ("GET", "/api/v1/projects/shop", ALL),
    ("GET", "/api/v1/projects/shop/services", ALL),
    ("GET", "/api/v1/projects/shop/services/cache", ALL),
    ("GET", "/api/v1/projects/shop/environments", ALL),
    ("GET", "/api/v1/projects/shop/environments/production", ALL),
    (
        "GET",
        "/api/v1/projects/shop/environments/production/freezes",
        ALL,
    ),
    ("GET", "/api/v1/projects/shop/logs?q=x", ALL),
    ("GET", "/api/v1/projects/shop/hooks", ALL),
    ("GET", "/api/v1/projects/shop/secrets", ALL),
    ("GET", "/api/v1/projects/shop/routes", ALL),
    ("GET", "/api/v1/projects/shop/records", ALL),
    ("GET", "/api/v1/projects/shop/domains", ALL),
    ("GET", "/api/v1/projects/shop/gitops", ALL),
    ("GET", "/api/v1/projects/shop/gitops/eject", ALL),
    (
        "GET",
        "/api/v1/projects/shop/gitops/commits/{commit}/diff",
        ALL,
    ),
    ("GET", "/api/v1/instances", ALL),
    ("GET", "/api/v1/instances/shop.production.cache", ALL),
    ("GET", "/api/v1/deployments", ALL),
    ("GET", "/api/v1/deployments/{id}", ALL),
    ("GET", "/api/v1/deployments/{id}/logs", ALL),
    ("GET", "/api/v1/deployments/{id}/approval", ALL),
    ("GET", "/api/v1/deployments/{id}/attestation", ALL),
    ("GET", "/api/v1/approvals", ALL),
    ("GET", "/api/v1/templates", ALL),
    ("GET", "/api/v1/templates/none", ALL),
    ("GET", "/api/v1/dora", ALL),
    ("GET", "/api/v1/history", ALL),
    ("GET", "/api/v1/audit", ALL),
    ("GET", "/api/v1/state?project=shop", ALL),
    ("GET", "/api/v1/events?project=shop", ALL),
    ("GET", "/api/v1/events/chain", ALL),
    ("GET", "/api/v1/events/2", ALL),
    ("GET", "/api/v1/cdevents", ALL),
    ("GET", "/api/v1/webhooks", ALL),
    ("GET", "/api/v1/webhooks/{webhook}", ALL),
    ("GET", "/api/v1/webhooks/{webhook}/deliveries", ALL),
    ("GET", "/graphql", ALL),
    ("POST", "/graphql", ALL),
    (
        "GET",
        "/git/shop.git/info/refs?service=git-upload-pack",
        ALL,
    ),
    ("POST", "/git/shop.git/git-upload-pack", ALL),
    (
        "GET",
        "/uploads/shop/cache.git/info/refs?service=git-upload-pack",
        DEPLOYS,
    ),
    ("POST", "/uploads/shop/cache.git/git-upload-pack", DEPLOYS),
    (
        "POST",
        "/api/v1/projects/shop/services/cache/uploads?commit={commit}",
        DEPLOYS,
    ),
    (
        "POST",
        "/api/v1/projects/shop/services/cache/uploads/missing",
        DEPLOYS,
    ),
    (
        "GET",
        "/api/v1/projects/shop/services/cache/uploads/{commit}",
        DEPLOYS,
    ),
    ("POST", "/api/v1/deployments", DEPLOYS),
    ("DELETE", "/api/v1/deployments/{id}", DEPLOYS),
    ("POST", "/api/v1/deployments/{id}/stop", DEPLOYS),
    ("POST", "/api/v1/deployments/{id}/start", DEPLOYS),
    ("POST", "/api/v1/deployments/{id}/retry", DEPLOYS),
    ("POST", "/api/v1/deployments/{id}/terminate", DEPLOYS),
    ("POST", "/api/v1/deployments/{id}/cancel", DEPLOYS),
    ("POST", "/api/v1/deployments/{id}/keep", DEPLOYS),
    ("POST", "/api/v1/deployments/{id}/mark-main", DEPLOYS),
    ("POST", "/api/v1/deployments/{id}/redeploy", DEPLOYS),
    ("POST", "/api/v1/rollback", DEPLOYS),
    ("POST", "/api/v1/promote", DEPLOYS),
    ("POST", "/api/v1/scale", DEPLOYS),
    ("POST", "/api/v1/config", DEPLOYS),
    ("POST", "/api/v1/templates/none/deploy", DEPLOYS),
    ("PUT", "/api/v1/projects/shop/services/cache", DEPLOYS),
    ("PUT", "/api/v1/projects/shop/secrets/NAME", DEPLOYS),
    ("DELETE", "/api/v1/projects/shop/secrets/NAME", DEPLOYS),
    ("POST", "/api/v1/projects/shop/secrets/NAME/verify", DEPLOYS),
    ("POST", "/api/v1/projects/shop/routes", DEPLOYS),
    ("POST", "/api/v1/projects/shop/routes/policy", DEPLOYS),
    (
        "POST",
        "/api/v1/projects/shop/gitops/commits/{commit}/adopt",
        DEPLOYS,
    ),
    (
        "POST",
        "/api/v1/projects/shop/gitops/commits/{commit}/revert",
        DEPLOYS,
    ),
    ("POST", "/api/v1/deployments/{id}/approve", APPROVES),
    ("POST", "/api/v1/deployments/{id}/reject", APPROVES),
    ("POST", "/api/v1/deployments/{id}/review", APPROVES),
    ("POST", "/api/v1/deployments/{id}/override", APPROVES),
    ("POST", "/api/v1/deployments/{id}/override-freeze", APPROVES),
    ("POST", "/api/v1/projects/shop/environments", ADMINISTERS),
    (
        "PUT",
        "/api/v1/projects/shop/environments/production",
        ADMINISTERS,
    ),
    (
        "PATCH",
        "/api/v1/projects/shop/environments/production",
        ADMINISTERS,
    ),
    (
        "DELETE",
        "/api/v1/projects/shop/environments/production",
        ADMINISTERS,
    ),
    (
        "PUT",
        "/api/v1/projects/shop/environments/production/auto-deploy",
        ADMINISTERS,
    ),
    (
        "PUT",
        "/api/v1/projects/shop/environments/production/freezes/f",
        ADMINISTERS,
    ),
    (
        "DELETE",
        "/api/v1/projects/shop/environments/production/freezes/f",
        ADMINISTERS,
    ),
    ("PUT", "/api/v1/projects/shop/hooks/github", ADMINISTERS),
    ("DELETE", "/api/v1/projects/shop/hooks/github", ADMINISTERS),
    ("DELETE", "/api/v1/projects/shop/secrets", ADMINISTERS),
    ("POST", "/api/v1/projects/shop/domains", ADMINISTERS),
    (
        "DELETE",
        "/api/v1/projects/shop/domains/a.example",
        ADMINISTERS,
    ),
    ("PUT", "/api/v1/projects/shop/gitops/remote", ADMINISTERS),
    ("DELETE", "/api/v1/projects/shop/gitops/remote", ADMINISTERS),
    ("POST", "/api/v1/webhooks", ADMINISTERS),
    ("PUT", "/api/v1/webhooks/{webhook}", ADMINISTERS),
    ("DELETE", "/api/v1/webhooks/{webhook}", ADMINISTERS),
    ("POST", "/api/v1/webhooks/{webhook}/rotate", ADMINISTERS),
    ("POST", "/api/v1/webhooks/{webhook}/pause", ADMINISTERS),
    ("POST", "/api/v1/webhooks/{webhook}/resume", ADMINISTERS),
    ("POST", "/api/v1/webhooks/{webhook}/test", ADMINISTERS),
    ("POST", "/api/v1/webhooks/{webhook}/replay", ADMINISTERS),
    ("POST", "/api/v1/webhooks/{webhook}/discard", ADMINISTERS),
    ("POST", "/api/v1/projects", ADMINISTERS),
    ("GET", "/api/v1/projections", OVERSEES),
    ("GET", "/metrics", OVERSEES),
    ("GET", "/tlog/tile/entries/000", OVERSEES),
    ("GET", "/api/v1/tokens", OVERSEES),
    ("POST", "/api/v1/tokens", ADMINISTERS),
    ("POST", "/api/v1/tokens/000000000000/rotate", ADMINISTERS),
    ("DELETE", "/api/v1/tokens/000000000000", ADMINISTERS),
];

#[test]
fn the_table_has_every_address_that_asks_for_something() {
    let fits = |path: &str, row: &str| {
        let row = row.split('?').next().unwrap_or_default();
        let (path, row): (Vec<_>, Vec<_>) = (path.split('/').collect(), row.split('/').collect());
        let same = |(p, r): (&&str, &&str)| p == r || p.starts_with('{');
        path.len() == row.len() && path.iter().zip(&row).all(same)
    };
    let document = daybook_api::openapi();
    let mut missing = Vec::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for method in operations.as_object().unwrap().keys() {
            let public = method == "post" && path == "/api/v1/projects/{project}/hooks/{hook}";
            let hashes = path.starts_with("/tlog/");
            let public = public
                || hashes
                || ["/healthz", "/readyz", "/api/v1/ledger"].contains(&path.as_str());
            let known = TABLE
                .iter()
                .any(|(m, row, _)| m.eq_ignore_ascii_case(method) && fits(path, row));
            if !known && !public {
                missing.push(format!("{method} {path}"));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

#[tokio::test]
async fn every_surface_asks_the_same_of_the_same_role() {
    let guarded = Guarded::start().await;
    let id = guarded.deployment_of("shop").await;
    let webhook = guarded.webhook(&guarded.admin, "shop").await.ok();
    let webhook = webhook["webhook"]["id"].as_str().unwrap();
    for (number, role) in ROLES.into_iter().enumerate() {
        let (_, token) = guarded.token(&format!("t-{role}"), role, &[]).await;
        for &(method, path, may) in TABLE {
            let path = path.replace("{id}", &id).replace("{webhook}", webhook);
            let path = path.replace("{commit}", COMMIT);
            let method: Method = method.parse().unwrap();
            // A body that no use case takes, so that nothing is changed beyond the door.
            let body = match method {
                Method::GET => Value::Null,
                // Some take no body, and do at once what is asked for: not to what there is.
                Method::DELETE if may[number] => continue,
                _ => json!({ "surely": "not" }),
            };
            let request = self::request(&guarded, &token, method.clone(), &path, &body);
            let reply = guarded.server.send(request).await;
            if may[number] {
                assert!(
                    !matches!(reply.status.as_u16(), 401 | 403),
                    "{role} {method} {path}: {reply:?}"
                );
            } else {
                let problem = reply.refused(403, "role_missing");
                let detail = problem["detail"].as_str().unwrap();
                assert!(detail.contains("admin"), "{detail}");
            }
        }
    }
}

#[tokio::test]
async fn a_stream_asks_what_a_list_asks() {
    let guarded = Guarded::start().await;
    let id = guarded.deployment_of("bank").await;
    let (_, token) = guarded.token("shop", "viewer", &["shop"]).await;
    let logs = format!("/api/v1/deployments/{id}/logs?follow=true");
    for (path, shown, status) in [
        ("/api/v1/events?follow=true", None, 401),
        ("/api/v1/events?follow=true", Some(UNKNOWN), 401),
        ("/api/v1/events?follow=true", Some(token.as_str()), 200),
        (logs.as_str(), None, 401),
        (logs.as_str(), Some(token.as_str()), 404),
        (logs.as_str(), Some(guarded.admin.as_str()), 200),
    ] {
        let request = guarded.server.request(Method::GET, path);
        let request = request.header("Accept", "text/event-stream");
        let request = match shown {
            Some(token) => request.bearer_auth(token),
            None => request,
        };
        let response = request.send().await.unwrap();
        assert_eq!(response.status().as_u16(), status, "{path} with {shown:?}");
    }
}

#[tokio::test]
async fn a_token_that_asks_too_often_is_told_to_wait_and_holds_up_nobody_else() {
    let guarded = Guarded::start_with(|settings, _| {
        settings.rate = Some(daybook_api::access::Rate {
            per_second: 1.try_into().unwrap(),
            burst: 30.try_into().unwrap(),
        });
    })
    .await;
    let (_, greedy) = guarded.token("greedy", "viewer", &[]).await;
    let (_, other) = guarded.token("other", "viewer", &[]).await;
    let mut refused = None;
    for _ in 0..100 {
        let reply = guarded.get(&greedy, "/api/v1/whoami").await;
        if reply.status.as_u16() == 429 {
            refused = Some(reply);
            break;
        }
    }
    let refused = refused.expect("it is told to wait");
    refused.refused(429, "rate_limited");
    assert_eq!(refused.header("retry-after"), Some("1"));
    guarded.get(&other, "/api/v1/whoami").await.ok();
}

fn request(
    guarded: &Guarded,
    token: &str,
    method: Method,
    path: &str,
    body: &Value,
) -> reqwest::RequestBuilder {
    let request = guarded.server.request(method, path);
    let request = match path.starts_with("/git/") {
        true => request.basic_auth("git", Some(token)),
        false => request.bearer_auth(token),
    };
    match body {
        Value::Null => request,
        body => request.json(body),
    }
}

/// The text of an answer without what only says what was asked for.
fn told(reply: &Reply, name: &str) -> (u16, String) {
    (reply.status.as_u16(), reply.text.replace(name, "NAME"))
}

#[tokio::test]
async fn what_is_of_another_project_looks_like_what_is_missing() {
    let guarded = Guarded::start().await;
    let theirs = guarded.deployment_of("bank").await;
    let none = "01890a5d-ac96-774b-bcce-b302099a8057";
    let (_, token) = guarded.token("shop-admin", "admin", &["shop"]).await;
    let instance = |project: &str| json!({ "instance_id": format!("{project}.production.cache") });
    let pairs = [
        ("GET", "/api/v1/projects/{}"),
        ("GET", "/api/v1/projects/{}/services"),
        ("GET", "/api/v1/projects/{}/environments/production"),
        ("GET", "/api/v1/projects/{}/routes"),
        ("GET", "/api/v1/projects/{}/records"),
        ("GET", "/api/v1/projects/{}/gitops"),
        ("GET", "/api/v1/projects/{}/gitops/eject"),
        ("GET", "/api/v1/projects/{}/gitops/commits/{commit}/diff"),
        ("POST", "/api/v1/projects/{}/gitops/commits/{commit}/adopt"),
        ("POST", "/api/v1/projects/{}/gitops/commits/{commit}/revert"),
        ("PUT", "/api/v1/projects/{}/gitops/remote"),
        ("DELETE", "/api/v1/projects/{}/gitops/remote"),
        ("GET", "/api/v1/projects/{}/environments/production/freezes"),
        (
            "PUT",
            "/api/v1/projects/{}/environments/production/freezes/f",
        ),
        (
            "DELETE",
            "/api/v1/projects/{}/environments/production/freezes/f",
        ),
        (
            "PUT",
            "/api/v1/projects/{}/environments/production/auto-deploy",
        ),
        ("GET", "/api/v1/projects/{}/secrets"),
        ("PUT", "/api/v1/projects/{}/secrets/NAME"),
        ("DELETE", "/api/v1/projects/{}/secrets/NAME"),
        ("POST", "/api/v1/projects/{}/secrets/NAME/verify"),
        ("GET", "/api/v1/projects/{}/hooks"),
        ("PUT", "/api/v1/projects/{}/hooks/github"),
        ("DELETE", "/api/v1/projects/{}/hooks/github"),
        ("GET", "/api/v1/projects/{}/domains"),
        ("POST", "/api/v1/projects/{}/domains"),
        ("DELETE", "/api/v1/projects/{}/domains/a.example"),
        ("GET", "/api/v1/projects/{}/logs?q=x"),
        ("GET", "/api/v1/instances/{}.production.cache"),
        ("GET", "/api/v1/instances?project={}"),
        ("GET", "/git/{}.git/info/refs?service=git-upload-pack"),
        ("PUT", "/api/v1/projects/{}/services/new"),
        ("POST", "/api/v1/projects/{}/environments"),
        ("DELETE", "/api/v1/projects/{}/environments/production"),
    ];
    for (method, path) in pairs {
        let told = async |project: &str| {
            let path = path.replace("{}", project).replace("{commit}", COMMIT);
            let body = match method {
                "GET" | "DELETE" => Value::Null,
                _ => json!({ "name": "x", "image_repository": "registry.example/x" }),
            };
            let method = method.parse().unwrap();
            let request = request(&guarded, &token, method, &path, &body);
            self::told(&guarded.server.send(request).await, project)
        };
        let (found, missing) = (told("bank").await, told("nada").await);
        assert_eq!(found, missing, "{method} {path}");
        assert_eq!(found.0, 404, "{method} {path}: {found:?}");
    }
    for (path, more) in [
        ("/api/v1/deployments", json!({ "version": "2.0" })),
        ("/api/v1/rollback", json!({})),
        ("/api/v1/scale", json!({ "replicas": 2 })),
        ("/api/v1/config", json!({ "set": { "A": "b" } })),
    ] {
        let told = async |project: &str| {
            let mut body = instance(project);
            for (key, value) in more.as_object().unwrap() {
                body[key] = value.clone();
            }
            let reply = guarded.with(&token, Method::POST, path, body).await;
            self::told(&reply, project)
        };
        let (found, missing) = (told("bank").await, told("nada").await);
        assert_eq!(found, missing, "{path}");
        assert_eq!(found.0, 404, "{path}: {found:?}");
    }
    for (method, path) in [
        ("GET", "/api/v1/deployments/{}"),
        ("GET", "/api/v1/deployments/{}/logs"),
        ("GET", "/api/v1/deployments/{}/approval"),
        ("GET", "/api/v1/deployments/{}/attestation"),
        ("POST", "/api/v1/deployments/{}/stop"),
        ("POST", "/api/v1/deployments/{}/mark-main"),
        ("POST", "/api/v1/deployments/{}/approve"),
        ("POST", "/api/v1/deployments/{}/reject"),
        ("POST", "/api/v1/deployments/{}/review"),
        ("POST", "/api/v1/deployments/{}/override"),
        ("POST", "/api/v1/deployments/{}/override-freeze"),
        ("POST", "/api/v1/deployments/{}/keep"),
        ("DELETE", "/api/v1/deployments/{}"),
    ] {
        // With a body that is none, too: nobody looks at it before the token.
        for body in [json!({}), json!([7])] {
            let told = async |id: &str| {
                let path = path.replace("{}", id);
                let body = if method == "GET" {
                    Value::Null
                } else {
                    body.clone()
                };
                let reply = guarded
                    .with(&token, method.parse().unwrap(), &path, body)
                    .await;
                self::told(&reply, id)
            };
            let (found, missing) = (told(&theirs).await, told(none).await);
            assert_eq!(found, missing, "{method} {path}");
            assert_eq!(found.0, 404, "{method} {path}: {found:?}");
        }
    }
    // A deployment of theirs named in a request about one's own is as missing.
    let promote = |id: &str| {
        json!({ "project": "shop", "service": "cache", "from": "production", "to": "staging",
            "deployment": id })
    };
    let found = guarded
        .with(&token, Method::POST, "/api/v1/promote", promote(&theirs))
        .await;
    let missing = guarded
        .with(&token, Method::POST, "/api/v1/promote", promote(none))
        .await;
    assert_eq!(told(&found, &theirs), told(&missing, none));
}

#[tokio::test]
async fn lists_streams_and_history_have_what_may_be_seen_and_no_more() {
    let guarded = Guarded::start().await;
    let (_, token) = guarded.token("shop-viewer", "viewer", &["shop"]).await;
    for path in [
        "/api/v1/projects",
        "/api/v1/instances",
        "/api/v1/deployments",
        "/api/v1/history",
        "/api/v1/audit?limit=500",
        "/api/v1/state",
        "/api/v1/events?limit=500",
        "/api/v1/events?project=bank",
        "/api/v1/history?project=bank",
        "/api/v1/state?project=bank",
        "/api/v1/audit?project=bank",
        "/api/v1/cdevents?limit=500",
        "/api/v1/cdevents?project=bank",
    ] {
        let ours = guarded.get(&token, path).await;
        assert!(ours.status.is_success(), "{path}: {ours:?}");
        assert!(!ours.text.contains("bank."), "{path}: {}", ours.text);
        assert!(!ours.text.contains("\"bank\""), "{path}: {}", ours.text);
        assert!(!ours.text.contains("access.token"), "{path}: {}", ours.text);
        let all = guarded.get(&guarded.admin, path).await;
        assert!(
            all.text.contains("bank"),
            "{path} shows an admin nothing: {}",
            all.text
        );
    }
    // Each event by its position, too.
    let head = guarded.server.log.head().await.unwrap().0;
    for position in 1..=head {
        let path = format!("/api/v1/events/{position}");
        let whole = guarded.get(&guarded.admin, &path).await;
        let shop = whole.json()["subject"]
            .as_str()
            .unwrap()
            .starts_with("shop/");
        let ours = guarded.get(&token, &path).await;
        if shop {
            assert_eq!(ours.text, whole.text);
        } else {
            ours.refused(404, "event_not_found");
        }
    }
    // A stream passes over what is not to be seen, and goes on.
    for path in ["/api/v1/events?follow=true", "/api/v1/cdevents?follow=true"] {
        let request = guarded.server.request(Method::GET, path);
        let response = request.bearer_auth(&token).send().await.unwrap();
        let mut stream = response.bytes_stream();
        guarded.deploy("bank").await;
        let id = guarded.deploy("shop").await;
        let mut seen = String::new();
        let waited = tokio::time::timeout(PATIENCE, async {
            while !seen.contains(&id) {
                let bytes = stream.next().await.expect("the stream goes on").unwrap();
                seen.push_str(&String::from_utf8_lossy(&bytes));
            }
        });
        waited.await.expect("the event arrives");
        assert!(!seen.contains("bank"), "{path}: {seen}");
    }
}

#[tokio::test]
async fn a_webhook_is_of_its_project_for_whoever_may_configure_that() {
    let guarded = Guarded::start().await;
    let (_, admin) = guarded.token("shop-admin", "admin", &["shop"]).await;
    let (_, viewer) = guarded.token("shop-viewer", "viewer", &["shop"]).await;
    let id = |reply: Reply| reply.ok()["webhook"]["id"].as_str().unwrap().to_owned();
    let ours = id(guarded.webhook(&admin, "shop").await);
    let theirs = id(guarded.webhook(&guarded.admin, "bank").await);
    let refused = guarded.webhook(&viewer, "shop").await;
    refused.refused(403, "role_missing");
    let (found, missing) = (
        guarded.webhook(&admin, "bank").await,
        guarded.webhook(&admin, "nada").await,
    );
    assert_eq!(told(&found, "bank"), told(&missing, "nada"));
    assert_eq!(found.status.as_u16(), 404);

    for token in [&admin, &viewer] {
        let listed = guarded.get(token, "/api/v1/webhooks").await;
        assert!(listed.text.contains(&ours), "{listed:?}");
        assert!(!listed.text.contains("bank"), "{listed:?}");
        let foreign = guarded.get(token, "/api/v1/webhooks?project=bank").await;
        foreign.refused(404, "project_not_found");
    }
    let none = "01890a5d-ac96-774b-bcce-b302099a8057";
    let change = json!({ "url": "https://elsewhere.example/" });
    for (method, tail, body) in [
        ("GET", "", Value::Null),
        ("GET", "/deliveries", Value::Null),
        ("PUT", "", change),
        ("POST", "/pause", json!({})),
        ("POST", "/resume", json!({})),
        ("POST", "/test", json!({})),
        ("POST", "/replay", json!({})),
        ("POST", "/discard", json!({})),
        ("POST", "/discard", json!({})),
        ("POST", "/rotate", json!({})),
        ("DELETE", "", json!({})),
    ] {
        let ask = async |token: &str, id: &str| {
            let path = format!("/api/v1/webhooks/{id}{tail}");
            let method = method.parse().unwrap();
            guarded.with(token, method, &path, body.clone()).await
        };
        let (found, missing) = (ask(&admin, &theirs).await, ask(&admin, none).await);
        assert_eq!(
            told(&found, &theirs),
            told(&missing, none),
            "{method} {tail}"
        );
        assert_eq!(found.status.as_u16(), 404, "{method} {tail}: {found:?}");
        if method == "GET" {
            ask(&viewer, &ours).await.ok();
        } else {
            let refused = ask(&viewer, &ours).await;
            refused.refused(403, "role_missing");
        }
        // What there is nothing to do for, such as resuming, is refused as such.
        let done = ask(&admin, &ours).await;
        assert!(
            !matches!(done.status.as_u16(), 401 | 403 | 404),
            "{method} {tail}: {done:?}"
        );
    }
    guarded
        .get(&admin, &format!("/api/v1/webhooks/{ours}"))
        .await
        .refused(404, "webhook_not_found");
}

#[tokio::test]
async fn a_token_acts_under_its_own_name_whatever_the_request_says() {
    let guarded = Guarded::start().await;
    let body = json!({ "name": "ci-2026", "account": "release-robot",
        "grants": [{ "role": "deployer", "projects": { "named": ["shop"] } }] });
    let made = guarded
        .admin(Method::POST, "/api/v1/tokens", body)
        .await
        .ok();
    let token = made["token"].as_str().unwrap();
    let body = json!({ "instance_id": "shop.production.cache", "version": "3.0" });
    let request = guarded.server.request(Method::POST, "/api/v1/deployments");
    let request = request
        .bearer_auth(token)
        .header("Daybook-Actor", "mallory");
    guarded.server.send(request.json(&body)).await.ok();
    let audit = guarded
        .get(token, "/api/v1/audit?kind=deployment&limit=1")
        .await
        .ok();
    assert_eq!(
        audit["audit"][0]["actor"],
        json!({ "kind": "api_key", "id": "release-robot" })
    );
    let who = guarded.get(token, "/api/v1/whoami").await.ok();
    assert_eq!(who["actor"]["id"], "release-robot");
    assert_eq!(who["grants"][0]["role"], "deployer");
}

/// Reads a stream until it ends.
async fn ends(response: reqwest::Response) {
    let mut stream = response.bytes_stream();
    let ended = async { while let Some(Ok(_)) = stream.next().await {} };
    tokio::time::timeout(PATIENCE, ended)
        .await
        .expect("the stream ends");
}

#[tokio::test]
async fn streams_end_with_their_token() {
    let guarded = Guarded::start().await;
    let deployment = guarded.deployment_of("shop").await;
    let streams = [
        "/api/v1/events?follow=true".to_owned(),
        format!("/api/v1/deployments/{deployment}/logs?follow=true"),
    ];
    let open = async |token: &str, path: &str| {
        let request = guarded.server.request(Method::GET, path);
        let response = request.bearer_auth(token).send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
        response
    };
    let (id, token) = guarded.token("viewer", "viewer", &["shop"]).await;
    let (_, other) = guarded.token("other", "viewer", &["shop"]).await;
    // With an overlap the old secret is taken for a while, and without one it ends with its streams.
    let cut = open(&token, &streams[0]).await;
    let rotate = format!("/api/v1/tokens/{id}/rotate");
    let overlap = json!({ "overlap_seconds": 600 });
    let newer = guarded.admin(Method::POST, &rotate, overlap).await.ok();
    for taken in [token.as_str(), newer["token"].as_str().unwrap()] {
        guarded.get(taken, "/api/v1/whoami").await.ok();
    }
    guarded.admin(Method::POST, &rotate, Value::Null).await.ok();
    ends(cut).await;
    guarded
        .get(&token, "/api/v1/whoami")
        .await
        .refused(401, "unknown_token");
    for (number, path) in streams.iter().enumerate() {
        let (id, token) = guarded
            .token(&format!("cut-{number}"), "viewer", &["shop"])
            .await;
        let cut = open(&token, path).await;
        let mut goes_on = Box::pin(open(&other, path).await.bytes_stream());
        guarded.revoke(&id).await;
        ends(cut).await;
        // Whoever has another token notices nothing.
        let quiet = tokio::time::timeout(Duration::from_millis(200), async {
            while goes_on.next().await.is_some() {}
        });
        assert!(quiet.await.is_err(), "{path}: another stream ended too");
    }
    let soon = jiff::Timestamp::now() + Duration::from_secs(8);
    let body = json!({ "name": "short", "expires_at": soon,
        "grants": [{ "role": "viewer", "projects": "all" }] });
    let made = guarded
        .admin(Method::POST, "/api/v1/tokens", body)
        .await
        .ok();
    let token = made["token"].as_str().unwrap();
    ends(open(token, &streams[0]).await).await;
    guarded
        .get(token, "/api/v1/whoami")
        .await
        .refused(401, "token_expired");
}

#[tokio::test]
async fn a_secret_is_shown_once_and_stands_nowhere() {
    let guarded = Guarded::start().await;
    let body = json!({ "name": "ci", "grants": [{ "role": "viewer", "projects": "all" }] });
    let send = async |path: &str, body: Value| {
        let request = guarded.server.request(Method::POST, path).json(&body);
        let request = request.header("Idempotency-Key", path);
        guarded
            .server
            .send(request.bearer_auth(&guarded.admin))
            .await
    };
    let made = send("/api/v1/tokens", body.clone()).await;
    assert_eq!(made.header("cache-control"), Some("no-store"));
    let made = made.ok();
    send("/api/v1/tokens", body)
        .await
        .refused(409, "secret_shown_once");
    let rotate = format!("/api/v1/tokens/{}/rotate", made["id"].as_str().unwrap());
    let rotated = send(&rotate, json!({})).await.ok();
    send(&rotate, json!({}))
        .await
        .refused(409, "secret_shown_once");
    let list = guarded.get(&guarded.admin, "/api/v1/tokens").await;
    let metrics = guarded.get(&guarded.admin, "/metrics").await;
    let audit = guarded
        .get(&guarded.admin, "/api/v1/audit?kind=access")
        .await;
    let mut everything = vec![list.text, metrics.text, audit.text];
    let all = daybook_events::SubjectFilter::default();
    let events = guarded
        .server
        .log
        .read(daybook_events::Position::ZERO, &all, 1000);
    for event in events.await.unwrap() {
        everything.push(String::from_utf8_lossy(&event.bytes).into_owned());
    }
    for bad in [UNKNOWN, "x"] {
        everything.push(guarded.get(bad, "/api/v1/projects").await.text);
    }
    for token in [
        guarded.admin.as_str(),
        made["token"].as_str().unwrap(),
        rotated["token"].as_str().unwrap(),
    ] {
        let (_, secret) = token.rsplit_once('_').unwrap();
        for text in &everything {
            assert!(!text.contains(secret), "{text}");
        }
    }
    assert!(
        everything
            .iter()
            .any(|t| t.contains("access.token_created"))
    );
}

#[tokio::test]
async fn the_first_token_is_made_once_whoever_starts_at_once() {
    let server = server().await;
    let (a, b) = (commands(&server), commands(&server));
    let (one, other) = tokio::join!(a.first_token(), b.first_token());
    let made = [one.unwrap(), other.unwrap()];
    assert_eq!(made.iter().flatten().count(), 1, "{made:?}");
    assert!(a.first_token().await.unwrap().is_none());
}

#[tokio::test]
async fn an_open_server_asks_nobody_and_still_refuses_what_is_no_token() {
    let server = server().await;
    server.shop().await;
    let who = server.get("/api/v1/whoami").await.ok();
    assert_eq!(who["authentication"], "open");
    let request = server.request(Method::GET, "/api/v1/projects");
    server
        .send(request.bearer_auth(UNKNOWN))
        .await
        .refused(401, "unknown_token");
    let made = server
        .post(
            "/api/v1/tokens",
            json!({ "name": "v", "grants": [{ "role": "viewer", "projects": { "named": ["other"] } }] }),
        )
        .await
        .ok();
    let request = server.request(Method::GET, "/api/v1/projects/shop");
    let limited = server
        .send(request.bearer_auth(made["token"].as_str().unwrap()))
        .await;
    limited.refused(404, "project_not_found");
}

/// The data of a GraphQL answer, or the code of its one error.
async fn graphql(guarded: &Guarded, token: &str, query: &str) -> Result<Value, String> {
    let body = json!({ "query": query });
    let reply = guarded.with(token, Method::POST, "/graphql", body).await;
    let mut answer = reply.ok();
    match answer["errors"][0]["extensions"]["code"].as_str() {
        Some(code) => Err(code.to_owned()),
        None => Ok(answer["data"].take()),
    }
}

#[tokio::test]
async fn graphql_asks_what_rest_asks() {
    let guarded = Guarded::start().await;
    let (shop, bank) = (
        guarded.deployment_of("shop").await,
        guarded.deployment_of("bank").await,
    );
    let (_, viewer) = guarded.token("reads", "viewer", &["shop"]).await;
    let (_, deployer) = guarded.token("deploys", "deployer", &["shop"]).await;
    // What may be seen is seen, and nothing of what may not.
    let all = r#"{ projects { name } state { instances { projectId } } history { deployments {
        projectId } } audit { entries { projectId } } events { events { subject } } }"#;
    let seen = graphql(&guarded, &viewer, all).await.unwrap().to_string();
    assert!(seen.contains("shop") && !seen.contains("bank"), "{seen}");
    let seen = graphql(&guarded, &guarded.admin, all).await.unwrap();
    assert!(seen.to_string().contains("bank"));
    // What may not be seen looks like what is not there.
    for (query, code) in [
        (r#"{ project(id: "bank") { name } }"#, "project_not_found"),
        (
            r#"{ environments(projectId: "bank") { name } }"#,
            "project_not_found",
        ),
        (
            r#"{ routes(projectId: "bank") { table } }"#,
            "project_not_found",
        ),
        (
            &format!(r#"{{ deployStatus(id: "{bank}") {{ phase }} }}"#),
            "deployment_not_found",
        ),
        (
            &format!(r#"mutation {{ stopDeployment(id: "{bank}") {{ phase }} }}"#),
            "deployment_not_found",
        ),
        (
            r#"mutation { deploy(input: { projectId: "bank", service: "cache",
                environment: "production" }) { id } }"#,
            "project_not_found",
        ),
    ] {
        for token in [&viewer, &deployer] {
            let found = graphql(&guarded, token, query).await;
            assert_eq!(found, Err(code.to_owned()), "{query}");
        }
    }
    let status = format!(r#"{{ deployStatus(id: "{shop}") {{ phase }} }}"#);
    assert!(graphql(&guarded, &viewer, &status).await.is_ok());
    // Commands take the role that REST asks for.
    let build = r#"mutation { deployBuild(input: { projectId: "shop", service: "cache",
        environment: "production", tag: "2" }) }"#;
    let lacking = Err("role_missing".to_owned());
    assert_eq!(graphql(&guarded, &viewer, build).await, lacking);
    assert!(graphql(&guarded, &deployer, build).await.is_ok());
    for query in [
        r#"mutation { createProject(name: "new") { name } }"#,
        r#"mutation { deleteEnvironment(projectId: "shop", name: "production") { name } }"#,
    ] {
        assert_eq!(graphql(&guarded, &deployer, query).await, lacking);
    }
}

/// Viewer, deployer, approver, auditor and admin.
const ROLES: [&str; 5] = ["viewer", "deployer", "approver", "auditor", "admin"];
const DEPLOY: [bool; 5] = [false, true, false, false, true];
const APPROVE: [bool; 5] = [false, false, true, false, true];
const CONFIGURE: [bool; 5] = [false, false, false, false, true];

/// Every mutation, with which of the roles may do it. What is asked for is not possible, so that it
/// changes nothing beyond the door.
fn mutations(id: &str) -> Vec<(&'static str, String, [bool; 5])> {
    let instance = r#"projectId: "shop", service: "none", environment: "production""#;
    let hash = format!("sha256:{}", "0".repeat(64));
    let on = |name: &str| format!("{name}(id: \"{id}\") {{ id }}");
    let why = |name: &str| format!("{name}(id: \"{id}\", reason: \"it has to be\") {{ id }}");
    let plan = |name: &str| {
        format!("{name}(id: \"{id}\", hash: \"{hash}\", reason: \"it has to be\") {{ id }}")
    };
    let input = |name: &str, more: &str| format!("{name}(input: {{ {instance} {more} }}) {{ id }}");
    let all = [
        ("deploy", input("deploy", ""), DEPLOY),
        (
            "deployBuild",
            format!("deployBuild(input: {{ {instance} tag: \"1\" }})"),
            DEPLOY,
        ),
        (
            "promote",
            r#"promote(input: { projectId: "shop", service: "none", from: "production",
                to: "none" }) { id }"#
                .to_owned(),
            DEPLOY,
        ),
        ("rollback", input("rollback", ""), DEPLOY),
        (
            "markMain",
            format!("markMain(id: \"{id}\", expectedMain: \"{id}\") {{ id }}"),
            DEPLOY,
        ),
        ("redeploy", on("redeploy"), DEPLOY),
        ("stopDeployment", on("stopDeployment"), DEPLOY),
        ("startDeployment", on("startDeployment"), DEPLOY),
        ("terminateDeployment", on("terminateDeployment"), DEPLOY),
        ("retryDeployment", on("retryDeployment"), DEPLOY),
        ("cancelDeployment", on("cancelDeployment"), DEPLOY),
        ("scale", input("scale", "replicas: 2"), DEPLOY),
        (
            "changeConfig",
            input("changeConfig", r#"set: [{ name: "A", value: "1" }]"#),
            DEPLOY,
        ),
        (
            "deployTemplate",
            input("deployTemplate", r#"template: "none""#),
            DEPLOY,
        ),
        (
            "setRoutes",
            format!(
                "setRoutes(input: {{ projectId: \"shop\", instanceId: \"shop.none.cache\", \
                 to: [{{ deployment: \"{id}\", weight: 1 }}] }}) {{ instanceId }}"
            ),
            DEPLOY,
        ),
        ("approveDeployment", plan("approveDeployment"), APPROVE),
        ("rejectDeployment", why("rejectDeployment"), APPROVE),
        ("reviewDeployment", why("reviewDeployment"), APPROVE),
        ("overrideApproval", plan("overrideApproval"), APPROVE),
        ("overrideFreeze", why("overrideFreeze"), APPROVE),
        (
            "createProject",
            r#"createProject(name: "shop") { name }"#.to_owned(),
            CONFIGURE,
        ),
        (
            "defineService",
            r#"defineService(projectId: "shop", service: "none", spec: {}) { name }"#.to_owned(),
            DEPLOY,
        ),
        (
            "createEnvironment",
            r#"createEnvironment(input: { projectId: "shop", name: "production" }) { name }"#
                .to_owned(),
            CONFIGURE,
        ),
        (
            "deleteEnvironment",
            r#"deleteEnvironment(projectId: "shop", name: "none") { name }"#.to_owned(),
            CONFIGURE,
        ),
        (
            "setFreeze",
            r#"setFreeze(input: { projectId: "shop", environment: "none", name: "night",
                rule: { once: { from: "2099-01-01T00:00:00" } } }) { name }"#
                .to_owned(),
            CONFIGURE,
        ),
        (
            "removeFreeze",
            r#"removeFreeze(projectId: "shop", environment: "none", name: "night")"#.to_owned(),
            CONFIGURE,
        ),
    ];
    all.to_vec()
}

/// Opens a socket for GraphQL without a credential.
async fn unnamed(server: &Server) -> sockets::Socket {
    let protocol = ("sec-websocket-protocol", "graphql-transport-ws");
    sockets::open(server, "/graphql", &[protocol])
        .await
        .unwrap()
}

async fn say(socket: &mut sockets::Socket, message: Value) {
    let message = tokio_tungstenite::tungstenite::Message::text(message.to_string());
    socket.send(message).await.unwrap();
}

fn init(token: &str) -> Value {
    let payload = json!({ "authorization": format!("Bearer {token}") });
    json!({ "type": "connection_init", "payload": payload })
}

/// The code that an operation over a socket is refused with, if it is.
async fn over_a_socket(socket: &mut sockets::Socket, query: &str) -> Option<String> {
    let payload = json!({ "query": query });
    say(
        socket,
        json!({ "type": "subscribe", "id": "1", "payload": payload }),
    )
    .await;
    let message = sockets::text(socket).await;
    let errors = match message["type"].as_str().unwrap() {
        "error" => &message["payload"],
        "next" => {
            assert_eq!(sockets::text(socket).await["type"], "complete");
            &message["payload"]["errors"]
        }
        _ => panic!("{message}"),
    };
    errors[0]["extensions"]["code"].as_str().map(str::to_owned)
}

#[tokio::test]
async fn every_mutation_asks_for_its_role_over_http_and_over_a_socket() {
    let guarded = Guarded::start().await;
    let id = guarded.deployment_of("shop").await;
    let mutations = mutations(&id);
    let schema = r#"{ __type(name: "Mutation") { fields { name } } }"#;
    let schema = graphql(&guarded, &guarded.admin, schema).await.unwrap();
    let fields = schema["__type"]["fields"].as_array().unwrap().iter();
    let fields: std::collections::BTreeSet<_> = fields.map(|f| f["name"].as_str()).collect();
    let known = mutations.iter().map(|(name, ..)| Some(*name)).collect();
    assert_eq!(fields, known, "one of them is not asked about");
    for (number, role) in ROLES.into_iter().enumerate() {
        let (_, token) = guarded.token(&format!("t-{role}"), role, &["shop"]).await;
        let mut socket = unnamed(&guarded.server).await;
        say(&mut socket, init(&token)).await;
        assert_eq!(sockets::text(&mut socket).await["type"], "connection_ack");
        for (name, mutation, may) in &mutations {
            let may = may[number];
            let query = format!("mutation {{ {mutation} }}");
            let over_http = graphql(&guarded, &token, &query).await.err();
            let socket = over_a_socket(&mut socket, &query).await;
            for (surface, found) in [("http", over_http), ("socket", socket)] {
                let found = found.as_deref();
                let lacks = found == Some("role_missing");
                assert_eq!(lacks, !may, "{role} {name} over {surface}: {found:?}");
                assert!(found != Some("internal") && found != Some("invalid_query"));
            }
        }
    }
}

#[tokio::test]
async fn streams_ask_for_the_role_that_their_lists_ask_for() {
    let guarded = Guarded::start().await;
    let id = guarded.deployment_of("shop").await;
    let logs = format!("/api/v1/deployments/{id}/logs?follow=true");
    for (number, role) in ROLES.into_iter().enumerate() {
        let (_, token) = guarded.token(&format!("t-{role}"), role, &[]).await;
        for (path, may) in [
            ("/api/v1/events?follow=true", [true; 5]),
            (&logs, [true; 5]),
            ("/api/v1/cdevents?follow=true", [true; 5]),
        ] {
            let request = guarded.server.request(Method::GET, path);
            let request = request.header("Accept", "text/event-stream");
            let response = request.bearer_auth(&token).send().await.unwrap();
            let status = response.status().as_u16();
            assert_eq!(status, if may[number] { 200 } else { 403 }, "{role} {path}");
            if !may[number] {
                let problem: Value = response.json().await.unwrap();
                assert_eq!(problem["code"], "role_missing", "{role} {path}");
            }
        }
        let bearer = format!("Bearer {token}");
        let token = ("authorization", bearer.as_str());
        let mut socket = sockets::open(&guarded.server, "/api/v1/events", &[token])
            .await
            .unwrap();
        assert_eq!(sockets::text(&mut socket).await["position"], 1);
    }
}

#[tokio::test]
async fn a_socket_may_bring_its_credential_with_its_first_message() {
    let guarded = Guarded::start().await;
    let server = &guarded.server;
    let (id, viewer) = guarded.token("reads", "viewer", &["shop"]).await;
    let (gone, revoked) = guarded.token("gone", "viewer", &["shop"]).await;
    guarded.revoke(&gone).await;
    // Nothing is served before somebody is recognised.
    let query = json!({ "query": "subscription { events { position } }" });
    let subscribe = json!({ "type": "subscribe", "id": "1", "payload": query });
    let bare = |value: Value| json!({ "type": "connection_init", "payload": value });
    for (messages, code) in [
        (vec![subscribe.clone()], 4401),
        (vec![json!({ "type": "connection_init" })], 4401),
        (vec![bare(json!({}))], 4401),
        (vec![bare(json!({ "authorization": null }))], 4401),
        (vec![bare(json!({ "authorization": viewer }))], 4401),
        (
            vec![bare(json!({ "authorization": "Bearer nonsense" }))],
            4401,
        ),
        (vec![init(UNKNOWN)], 4401),
        (vec![init(&revoked)], 4401),
        (vec![bare(json!({ "authorization": 1 }))], 4400),
        (vec![bare(json!({ "authorization": "Bearer a\nb" }))], 4400),
        (
            vec![bare(json!({ "authorization": "a", "Authorization": "b" }))],
            4400,
        ),
        (vec![init(&viewer), init(&viewer)], 4429),
    ] {
        let mut socket = unnamed(server).await;
        for message in &messages {
            say(&mut socket, message.clone()).await;
        }
        let frame = sockets::closed(&mut socket).await;
        assert_eq!(u16::from(frame.code), code, "{messages:?}");
        assert!(!frame.reason.contains("daybook_"), "{frame:?}");
    }
    // A socket that has said who asks does not say it twice.
    let bearer = format!("Bearer {viewer}");
    let token = ("authorization", bearer.as_str());
    let protocol = ("sec-websocket-protocol", "graphql-transport-ws");
    let mut twice = sockets::open(server, "/graphql", &[token, protocol])
        .await
        .unwrap();
    say(&mut twice, init(&guarded.admin)).await;
    assert_eq!(u16::from(sockets::closed(&mut twice).await.code), 4401);
    // It sees what its credential sees, acts as that, and ends with it.
    let mut socket = unnamed(server).await;
    say(&mut socket, init(&viewer)).await;
    assert_eq!(sockets::text(&mut socket).await["type"], "connection_ack");
    let query =
        json!({ "query": "{ whoami { actor grants { role projects } } projects { name } }" });
    say(
        &mut socket,
        json!({ "type": "subscribe", "id": "q", "payload": query }),
    )
    .await;
    let answer = sockets::text(&mut socket).await;
    assert_eq!(
        answer["payload"]["data"],
        json!({
            "whoami": { "actor": "reads", "grants": [{ "role": "viewer", "projects": ["shop"] }] },
            "projects": [{ "name": "shop" }]
        })
    );
    assert_eq!(sockets::text(&mut socket).await["type"], "complete");
    say(&mut socket, subscribe).await;
    assert_eq!(sockets::text(&mut socket).await["type"], "next");
    guarded.revoke(&id).await;
    assert_eq!(u16::from(sockets::closed(&mut socket).await.code), 1001);
    // Where nobody is asked, a credential that is shown is checked all the same.
    let open = crate::support::server().await;
    let mut socket = unnamed(&open).await;
    say(&mut socket, init(UNKNOWN)).await;
    assert_eq!(u16::from(sockets::closed(&mut socket).await.code), 4401);
}

#[tokio::test]
async fn a_socket_without_a_first_message_is_closed_in_time() {
    let guarded = Guarded::start().await;
    let mut socket = unnamed(&guarded.server).await;
    let frame = tokio::time::timeout(PATIENCE, sockets::closed(&mut socket)).await;
    assert_eq!(u16::from(frame.unwrap().code), 4408);
}

#[tokio::test]
async fn operations_over_a_socket_and_mutations_of_a_document_are_counted() {
    let guarded = Guarded::start_with(|settings, _| {
        settings.rate = Some(daybook_api::access::Rate {
            per_second: 1.try_into().unwrap(),
            burst: 30.try_into().unwrap(),
        });
    })
    .await;
    let (_, greedy) = guarded.token("greedy", "deployer", &[]).await;
    let mut socket = unnamed(&guarded.server).await;
    say(&mut socket, init(&greedy)).await;
    assert_eq!(sockets::text(&mut socket).await["type"], "connection_ack");
    let mut refused = None;
    for _ in 0..100 {
        refused = over_a_socket(&mut socket, "{ whoami { actor } }").await;
        if refused.is_some() {
            break;
        }
    }
    assert_eq!(refused.as_deref(), Some("rate_limited"));
    // Others are not held up; and of several mutations in one document each counts.
    let (_, other) = guarded.token("other", "deployer", &[]).await;
    let many = |n: usize| {
        let one = r#"deployBuild(input: { projectId: "shop", service: "cache",
            environment: "production", tag: "2" })"#;
        let all: String = (0..n).map(|n| format!(" a{n}: {one}")).collect();
        json!({ "query": format!("mutation {{{all} }}") })
    };
    let reply = guarded
        .with(&other, Method::POST, "/graphql", many(2))
        .await;
    assert_eq!(reply.json().get("errors"), None, "{reply:?}");
    let before = guarded.server.ledger.projections().position();
    let reply = guarded
        .with(&other, Method::POST, "/graphql", many(60))
        .await;
    assert_eq!(reply.status.as_u16(), 429, "{reply:?}");
    assert!(reply.header("retry-after").is_some());
    assert_eq!(
        reply.json()["errors"][0]["extensions"]["code"],
        "rate_limited"
    );
    assert_eq!(guarded.server.ledger.projections().position(), before);
}

#[tokio::test]
async fn sockets_show_what_may_be_seen_and_end_with_their_credential() {
    let guarded = Guarded::start().await;
    let server = &guarded.server;
    let bank = guarded.deployment_of("bank").await;
    let (id, viewer) = guarded.token("reads", "viewer", &["shop"]).await;
    let bearer = format!("Bearer {viewer}");
    let token = ("authorization", bearer.as_str());
    let protocol = ("sec-websocket-protocol", "graphql-transport-ws");
    let bad = ("authorization", "Bearer nonsense");
    for (path, headers) in [
        ("/api/v1/events", &[][..]),
        ("/api/v1/events", &[bad]),
        ("/graphql", &[protocol, bad]),
    ] {
        let refused = sockets::open(server, path, headers).await.unwrap_err();
        assert!(refused.to_string().contains("401"), "{path}: {refused}");
    }
    let mut events = sockets::open(server, "/api/v1/events", &[token])
        .await
        .unwrap();
    let mut graphql = sockets::open(server, "/graphql", &[token, protocol])
        .await
        .unwrap();
    // All that there is of the one project, and nothing of the other.
    let listed = guarded.get(&viewer, "/api/v1/events?limit=500").await.ok();
    for event in listed["events"].as_array().unwrap() {
        let seen = sockets::text(&mut events).await;
        assert_eq!(seen["position"], event["position"]);
        assert!(!seen.to_string().contains("bank"), "{seen}");
    }
    let logs = format!("subscription {{ deployLogs(id: \"{bank}\") }}");
    for message in [
        json!({ "type": "connection_init" }),
        json!({ "type": "subscribe", "id": "1", "payload": { "query": logs } }),
    ] {
        let message = tokio_tungstenite::tungstenite::Message::text(message.to_string());
        graphql.send(message).await.unwrap();
    }
    assert_eq!(sockets::text(&mut graphql).await["type"], "connection_ack");
    let answer = sockets::text(&mut graphql).await.to_string();
    assert!(answer.contains("deployment_not_found"), "{answer}");
    guarded.revoke(&id).await;
    for socket in [&mut events, &mut graphql] {
        assert_eq!(u16::from(sockets::closed(socket).await.code), 1001);
    }
}

#[tokio::test]
async fn what_another_replica_wrote_is_waited_for_before_it_is_looked_up() {
    let guarded = Guarded::start().await;
    let (_, token) = guarded.token("ci", "deployer", &["shop"]).await;
    let mut replica = replica_of(&guarded.server, |settings, _| {
        settings.access = AccessMode::Required;
        settings.min_position_wait = PATIENCE;
    })
    .await;
    let head = guarded.server.log.head().await.unwrap();
    let projections = replica.ledger.projections().clone();
    projections.wait_for(head, PATIENCE).await.unwrap();
    replica.stop_folding().await;
    let body = json!({ "instance_id": "shop.production.cache", "version": "4.0" });
    let made = guarded.with(&token, Method::POST, "/api/v1/deployments", body);
    let made = made.await;
    let position = made.position().to_string();
    let id = made.ok()["id"].as_str().unwrap().to_owned();
    // Nobody waits for strangers, nor strangers for anything.
    for (path, shown, status) in [
        ("/api/v1/projects", None, 401),
        ("/api/v1/projects", Some(UNKNOWN), 401),
        ("/api/v1/ledger", None, 200),
        ("/healthz", None, 200),
    ] {
        let request = replica.request(Method::GET, path);
        let request = request.header("Daybook-Min-Position", "1000000");
        let request = match shown {
            Some(token) => request.bearer_auth(token),
            None => request,
        };
        let answered = tokio::time::timeout(PATIENCE / 2, replica.send(request)).await;
        let answered = answered.unwrap_or_else(|_| panic!("{path} with {shown:?} waits"));
        assert_eq!(answered.status.as_u16(), status, "{path} with {shown:?}");
    }
    let path = format!("/api/v1/deployments/{id}");
    let request = replica.request(Method::GET, &path).bearer_auth(&token);
    let asked = replica.send(request.header("Daybook-Min-Position", &position));
    let mut asked = Box::pin(asked);
    let early = tokio::time::timeout(Duration::from_millis(300), &mut asked).await;
    assert!(early.is_err(), "it is answered before it can be: {early:?}");
    drop(asked);
    let request = replica.request(Method::GET, &path).bearer_auth(&token);
    let request = request.header("Daybook-Min-Position", &position);
    replica.go_on_folding();
    assert_eq!(replica.send(request).await.ok()["id"], id);
}

#[tokio::test]
async fn all_rows_are_read_once_however_many_ask_and_not_for_everybody() {
    let guarded = Guarded::start().await;
    let (_, viewer) = guarded.token("viewer", "viewer", &[]).await;
    let (_, auditor) = guarded.token("auditor", "auditor", &[]).await;
    let (_, own) = guarded.token("own", "auditor", &["shop"]).await;
    let path = "/api/v1/projections";
    for token in [&viewer, &own] {
        guarded.get(token, path).await.refused(403, "role_missing");
    }
    let many = (0..20).map(|_| guarded.get(&auditor, path));
    let answers = futures_util::future::join_all(many).await;
    let first = answers[0].json();
    for answer in answers {
        assert_eq!(answer.ok(), first);
    }
    let metrics = guarded.get(&guarded.admin, "/metrics").await.text;
    assert!(
        metrics.contains("\ndaybook_projection_digests_total 1\n"),
        "{metrics}"
    );
    // What comes after is in the next one.
    guarded.deploy("shop").await;
    let next = guarded.get(&auditor, path).await.ok();
    assert_ne!(next["digest"], first["digest"]);
    assert!(next["position"].as_u64() > first["position"].as_u64());
}

#[tokio::test]
async fn a_rotation_says_whether_the_end_stays_moves_or_goes() {
    let guarded = Guarded::start().await;
    let end = "2035-01-01T00:00:00Z";
    let body = json!({ "name": "ci", "expires_at": end,
        "grants": [{ "role": "viewer", "projects": "all" }] });
    let made = guarded
        .admin(Method::POST, "/api/v1/tokens", body)
        .await
        .ok();
    let path = format!("/api/v1/tokens/{}/rotate", made["id"].as_str().unwrap());
    let later = "2036-01-01T00:00:00Z";
    for (wanted, kept) in [
        (json!({}), json!(end)),
        (json!({ "expires_at": null }), json!(end)),
        (json!({ "expires_at": later }), json!(later)),
        (json!({ "expires_at": "never" }), Value::Null),
        (json!({}), Value::Null),
    ] {
        guarded
            .admin(Method::POST, &path, wanted.clone())
            .await
            .ok();
        let listed = guarded.get(&guarded.admin, "/api/v1/tokens").await.ok();
        let tokens = listed["tokens"].as_array().unwrap();
        let token = tokens.iter().find(|t| t["name"] == "ci").unwrap();
        assert_eq!(token["expires_at"], kept, "{wanted}");
    }
    for (wanted, status, code) in [
        (json!("2001-01-01T00:00:00Z"), 422, "expiry_in_past"),
        (json!("soon"), 422, "invalid_body"),
    ] {
        let body = json!({ "expires_at": wanted });
        let reply = guarded.admin(Method::POST, &path, body).await;
        reply.refused(status, code);
    }
}

#[tokio::test]
async fn a_caller_has_so_many_streams_open_and_holds_up_nobody_else() {
    let guarded = Guarded::start_with(|settings, _| {
        settings.streams_max = Some(2.try_into().unwrap());
    })
    .await;
    let (_, greedy) = guarded.token("greedy", "viewer", &["shop"]).await;
    let (_, other) = guarded.token("other", "viewer", &["shop"]).await;
    let id = guarded.deployment_of("shop").await;
    let follow = "/api/v1/events?follow=true".to_owned();
    let open = async |token: &str, path: &str| {
        let request = guarded.server.request(Method::GET, path).bearer_auth(token);
        request.send().await.unwrap()
    };
    let first = open(&greedy, &follow).await;
    let bearer = format!("Bearer {greedy}");
    let header = [("authorization", bearer.as_str())];
    let socket = sockets::open(&guarded.server, "/api/v1/events", &header).await;
    let _socket = socket.unwrap();
    let logs = format!("/api/v1/deployments/{id}/logs?follow=true");
    for path in [&follow, &logs] {
        let reply = guarded.get(&greedy, path).await;
        let problem = reply.refused(429, "too_many_streams");
        assert_eq!(problem["retryable"], true);
    }
    let refused = sockets::open(&guarded.server, "/api/v1/events", &header).await;
    assert!(refused.unwrap_err().to_string().contains("429"));
    assert!(
        !ls_remote(&guarded.server.base, Some(&greedy), "shop")
            .await
            .status
            .success()
    );
    // What is no stream is answered, and so is whoever else asks.
    guarded.get(&greedy, "/api/v1/events").await.ok();
    assert_eq!(open(&other, &follow).await.status(), 200);
    // There is room again once one is closed.
    drop(first);
    let deadline = std::time::Instant::now() + PATIENCE;
    while open(&greedy, &follow).await.status() != 200 {
        assert!(
            std::time::Instant::now() < deadline,
            "there is no room again"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Sends the head of a request for `/healthz`, and what comes back until the end.
async fn health_of(server: &Server) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let address = server.base.strip_prefix("http://").unwrap();
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = "GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    // It may be closed by then, which what it has sent says.
    let _ = stream.write_all(request.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn connections_beyond_what_there_is_room_for_are_told_so() {
    let server = server_with(|settings, _| settings.connections_max = 3).await;
    let address = server.base.strip_prefix("http://").unwrap();
    let idle = [
        tokio::net::TcpStream::connect(address).await.unwrap(),
        tokio::net::TcpStream::connect(address).await.unwrap(),
    ];
    // One that was upgraded keeps its place.
    let socket = sockets::open(&server, "/api/v1/events", &[]).await.unwrap();
    let refused = health_of(&server).await;
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
    assert!(refused.contains("\"too_many_connections\""), "{refused}");
    assert!(refused.contains("\r\nretry-after: 1\r\n"), "{refused}");
    drop(socket);
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let answer = health_of(&server).await;
        if answer.starts_with("HTTP/1.1 200 ") {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{answer}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(idle);
    let metrics = loop {
        let answer = server.request(Method::GET, "/metrics").send().await;
        if let Ok(answer) = answer
            && answer.status() == 200
        {
            break answer.text().await.unwrap();
        }
        assert!(std::time::Instant::now() < deadline);
    };
    let refused = metrics
        .lines()
        .find_map(|l| l.strip_prefix("daybook_http_connections_refused_total "))
        .unwrap();
    assert!(refused.parse::<u64>().unwrap() >= 1, "{refused}");
    assert!(metrics.contains("\ndaybook_http_connections "), "{metrics}");
}

#[tokio::test]
async fn strangers_learn_nothing_of_what_there_is() {
    let guarded = Guarded::start().await;
    let hook = json!({ "provider": "github", "secret": "0123456789abcdef0123456789abcdef" });
    let path = "/api/v1/projects/shop/hooks/github";
    guarded.admin(Method::PUT, path, hook).await.ok();
    // A delivery that is not signed, to a webhook, to none, and to no project at all.
    let deliver = async |project: &str, hook: &str| {
        let path = format!("/api/v1/projects/{project}/hooks/{hook}");
        let request = guarded.server.request(Method::POST, &path).json(&json!({}));
        let reply = guarded
            .server
            .send(request.header("X-GitHub-Event", "push"));
        reply.await
    };
    let found = deliver("shop", "github").await;
    found.refused(401, "invalid_signature");
    for (project, hook) in [("shop", "gitlab"), ("nada", "github")] {
        let missing = deliver(project, hook).await;
        assert_eq!(missing.text, found.text, "{project} {hook}");
    }
    // Which part is not ready is for everybody; why is for who oversees.
    guarded
        .server
        .parts
        .not_ready("worker/sync", "oslo.internal:6443 does not answer");
    let (_, viewer) = guarded.token("viewer", "viewer", &[]).await;
    let (_, auditor) = guarded.token("auditor", "auditor", &[]).await;
    let ready = async |token: Option<&str>| {
        let request = guarded.server.request(Method::GET, "/readyz");
        let request = match token {
            Some(token) => request.bearer_auth(token),
            None => request,
        };
        let reply = guarded.server.send(request).await;
        assert_eq!(reply.status, 503);
        assert!(reply.text.contains("worker/sync"), "{}", reply.text);
        reply.text.contains("oslo.internal")
    };
    for stranger in [None, Some(UNKNOWN), Some(viewer.as_str())] {
        assert!(!ready(stranger).await, "{stranger:?}");
    }
    assert!(ready(Some(&auditor)).await);
}

#[tokio::test]
async fn strangers_who_ask_too_often_are_told_to_wait_and_hold_up_nobody_else() {
    let guarded = Guarded::start_with(|settings, _| {
        settings.stranger_rate = daybook_api::access::Rate {
            per_second: 1.try_into().unwrap(),
            burst: 20.try_into().unwrap(),
        };
    })
    .await;
    let server = &guarded.server;
    let mut refused = false;
    for number in 0..200 {
        let path = ["/readyz", "/api/v1/ledger", "/openapi.json"][number % 3];
        let reply = server.get(path).await;
        if reply.status == 429 {
            reply.refused(429, "rate_limited");
            refused = true;
            break;
        }
    }
    assert!(refused, "nobody is told to wait");
    for path in ["/healthz", "/", "/page/main.js"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    guarded.get(&guarded.admin, "/api/v1/projects").await.ok();
}

#[tokio::test]
async fn use_cases_ask_by_themselves_whatever_surface_calls_them() {
    let guarded = Guarded::start().await;
    let webhook = guarded.webhook(&guarded.admin, "shop").await.ok();
    let id: daybook_events::SubscriptionId =
        webhook["webhook"]["id"].as_str().unwrap().parse().unwrap();
    let commands = commands(&guarded.server);
    let caller = |project: &str, role: Role| {
        let actor = daybook_events::Actor {
            kind: "api_key".into(),
            id: "somebody".into(),
        };
        let grant = Grant {
            role,
            projects: Projects::Named([project.parse().unwrap()].into()),
        };
        Caller::of(actor.clone(), Principal::granted(actor, vec![grant]))
    };
    let code = |result: Result<(), CommandError>| {
        let problem = daybook_api::Problem::from(result.unwrap_err());
        problem.code()
    };
    let shop: daybook_events::ProjectName = "shop".parse().unwrap();
    let secret = daybook_events::secret::SecretId {
        name: "NAME".parse().unwrap(),
        scope: daybook_events::secret::SecretScope::default(),
    };
    let value =
        daybook_secrets::SecretValue::new(zeroize::Zeroizing::new("not the value".to_owned()))
            .unwrap();
    for (asks, expected) in [
        (
            caller("shop", Role::Viewer),
            ["role_missing", "role_missing"],
        ),
        (
            caller("bank", Role::Admin),
            ["project_not_found", "webhook_not_found"],
        ),
    ] {
        let [of_project, of_webhook] = expected;
        let verified = commands
            .verify_secret(&asks, &shop, &secret, None, &value)
            .await;
        assert_eq!(code(verified.map(drop)), of_project);
        let done = [
            commands.pause_webhook(&asks, id).await.map(drop),
            commands.resume_webhook(&asks, id).await.map(drop),
            commands.test_webhook(&asks, id).await.map(drop),
            commands.replay_webhook(&asks, id, None).await.map(drop),
            commands
                .rotate_webhook(&asks, id, Duration::ZERO)
                .await
                .map(drop),
            commands.delete_webhook(&asks, id, None).await.map(drop),
        ];
        for refused in done {
            assert_eq!(code(refused), of_webhook);
        }
    }
}
