//! A server that asks for tokens, from its first start on.

use std::io::Write as _;
use std::process::Stdio;

use reqwest::Method;

use crate::support::{Done, Server, Settings, application, daybook, request, until};

fn guarded() -> (Server, String) {
    // What is logged on the way is searched for secrets, too.
    let settings = Settings::default().arg("--auth").arg("required");
    let server = Server::start(settings.env("DAYBOOK_LOG", "debug,hyper=trace"));
    let token = server.process().fact("admin_token");
    assert!(token.starts_with("daybook_"), "{token}");
    (server, token)
}

/// Runs a command with a token.
#[track_caller]
fn with(server: &Server, token: &str, args: &[&str]) -> Done {
    let mut command = server.command(args);
    command.env("DAYBOOK_TOKEN", token);
    Done::of(&mut command)
}

#[track_caller]
fn ok(server: &Server, token: &str, args: &[&str]) -> Done {
    let done = with(server, token, args);
    assert_eq!(done.code, 0, "daybook {args:?}: {done:?}");
    done
}

#[track_caller]
fn refused(done: &Done, code: &str) {
    assert_ne!(done.code, 0, "{done:?}");
    assert_eq!(done.error()["code"], code, "{done:?}");
}

#[test]
fn from_the_first_token_to_a_deployment_and_to_its_revocation() {
    let (mut server, admin) = guarded();
    // Nobody comes in without one, and whoever does is told how.
    let done = server.cli(&["project", "list", "--output", "json"]);
    refused(&done, "unauthenticated");
    assert!(done.stderr.contains("daybook login"), "{done:?}");

    let source = application("--text one");
    let url = source.url();
    for args in [
        &["project", "create", "shop"][..],
        &["project", "create", "bank"],
        &[
            "env",
            "create",
            "shop",
            "production",
            "--cluster",
            "local-a",
        ],
        &["service", "create", "shop", "web", "--repo", &url],
    ] {
        ok(&server, &admin, args);
    }
    let create = [
        "token",
        "create",
        "ci",
        "--role",
        "deployer",
        "--project",
        "shop",
    ];
    let ci = ok(&server, &admin, &create).stdout.trim().to_owned();
    let deployed = ok(
        &server,
        &ci,
        &["deploy", "shop.production.web", "--output", "json"],
    );
    assert!(
        deployed.stdout.contains("shop.production.web"),
        "{deployed:?}"
    );
    // Another project is not there for it, and what others do is not for it to decide.
    let listed = ok(&server, &ci, &json(&["project", "list"])).json();
    assert_eq!(listed["projects"].as_array().unwrap().len(), 1, "{listed}");
    refused(
        &with(&server, &ci, &json(&["env", "list", "bank"])),
        "project_not_found",
    );
    refused(
        &with(&server, &ci, &json(&["project", "create", "mine"])),
        "role_missing",
    );
    refused(
        &with(&server, &ci, &json(&["token", "list"])),
        "role_missing",
    );

    // A stream that is open ends with the token.
    let mut events = server.command(&["events", "--follow"]);
    let file = std::fs::File::create(server.folder().path().join("events")).unwrap();
    let mut events = events
        .env("DAYBOOK_TOKEN", &ci)
        .stdout(file)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("the stream is open", || {
        let metrics = metrics(&server, &admin);
        metrics.contains("daybook_http_streams 1").then_some(())
    });
    ok(
        &server,
        &admin,
        &["token", "revoke", "ci", "--reason", "it leaked"],
    );
    until("the stream has ended", || {
        let metrics = metrics(&server, &admin);
        metrics.contains("daybook_http_streams 0").then_some(())
    });
    let _ = events.kill();
    let _ = events.wait();
    refused(
        &with(&server, &ci, &json(&["project", "list"])),
        "token_revoked",
    );

    // The next start makes no other token, unless it is asked to.
    server.stop();
    server.restart();
    assert!(server.process().facts()["admin_token"].is_null());
    ok(&server, &admin, &["token", "list"]);
    server.stop();
    server.settings().args.push("--new-admin-token".into());
    server.restart();
    let second = server.process().fact("admin_token");
    ok(&server, &second, &["token", "list"]);

    // No secret of a token is in anything that was written down.
    let data = server.folder().path().to_owned();
    for token in [&admin, &ci, &second] {
        let (_, secret) = token.rsplit_once('_').unwrap();
        let found = containing(&data, secret);
        // The facts of a start, with the token that it shows once, are what the test itself reads.
        assert!(found.is_empty(), "{found:?}");
    }
}

fn json<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [args, &["--output", "json"]].concat()
}

fn metrics(server: &Server, token: &str) -> String {
    let authorization = format!("Bearer {token}");
    let headers = [("Authorization", authorization.as_str())];
    let url = format!("{}/metrics", server.url());
    request(Method::GET, &url, &headers, None).unwrap().body
}

/// The files below a folder that hold a text.
fn containing(folder: &std::path::Path, text: &str) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        // A folder may go while others are looked through.
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(path),
                Ok(kind) if kind.is_file() => {
                    let bytes = std::fs::read(&path).unwrap_or_default();
                    if bytes.windows(text.len()).any(|w| w == text.as_bytes()) {
                        found.push(path);
                    }
                }
                _ => {}
            }
        }
    }
    found
}

#[test]
fn what_others_could_reach_is_not_served_to_everybody_or_in_the_clear() {
    let mut server = Server::stopped(Settings::default());
    for (more, code) in [
        (&["--auth", "open"][..], "open_to_network"),
        (&[], "tls_missing"),
        (&["--auth", "required"], "tls_missing"),
        (
            &["--tls-cert", "/none", "--tls-key", "/none"],
            "tls_unusable",
        ),
    ] {
        server.settings().args = more.iter().map(|a| (*a).to_owned()).collect();
        let addresses = ["--listen", "0.0.0.0:0", "--gateway", "127.0.0.1:0"];
        let refused = server.try_restart_with(&addresses).unwrap_err();
        assert!(
            format!("{refused:?}").contains(code),
            "{more:?}: {refused:?}"
        );
    }
    assert!(!server.folder().data().exists(), "something was made");
}

#[test]
fn where_operators_ask_how_a_process_does_the_same_holds() {
    let mut server = Server::stopped(Settings::default());
    let loopback = ["--listen", "127.0.0.1:0", "--gateway", "127.0.0.1:0"];
    for (more, code) in [
        (&["--auth", "open"][..], "open_to_network"),
        (&["--auth", "required"], "tls_missing"),
        (&[], "tls_missing"),
    ] {
        let address = ["--operations-listen", "0.0.0.0:0"];
        let args = address.iter().chain(more);
        server.settings().args = args.map(|a| (*a).to_owned()).collect();
        let refused = server.try_restart_with(&loopback).unwrap_err();
        assert_eq!(refused.code, 2, "{refused:?}");
        assert!(refused.stderr.contains(code), "{more:?}: {refused:?}");
    }

    let asks = |server: &Server, path: &str, headers: &[(&str, &str)]| {
        let url = format!("{}{path}", server.process().fact("operations"));
        request(Method::GET, &url, headers, None).unwrap()
    };
    let settings = Settings::default()
        .arg("--operations-listen")
        .arg("127.0.0.1:0");
    let server = Server::start(settings.clone());
    assert_ne!(server.process().fact("operations"), server.url());
    let figures = asks(&server, "/metrics", &[]);
    assert!(figures.body.contains("# TYPE daybook_webhooks gauge\n"));
    // No page of a browser reads it through a name of its own.
    let elsewhere = asks(&server, "/metrics", &[("Host", "evil.example")]);
    assert_eq!(elsewhere.json()["code"], "host_not_allowed");
    assert_eq!(asks(&server, "/", &[]).status, 404);
    drop(server);

    let server = Server::start(settings.arg("--auth").arg("required"));
    let admin = server.process().fact("admin_token");
    // Probes have no token, and name whatever host.
    for path in ["/healthz", "/readyz"] {
        let host = [("Host", "10.0.0.7:7071")];
        until(path, || {
            (asks(&server, path, &host).status == 200).then_some(())
        });
    }
    let refused = asks(&server, "/metrics", &[]);
    assert_eq!(refused.status, 401, "{refused:?}");
    let authorization = format!("Bearer {admin}");
    let headers = [
        ("Host", "10.0.0.7:7071"),
        ("Authorization", authorization.as_str()),
    ];
    assert_eq!(asks(&server, "/metrics", &headers).status, 200);
}

#[test]
fn behind_a_proxy_tokens_are_asked_for_on_loopback_too() {
    let proxy = "--tls-terminated-by-proxy";
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("admin-token");
    let settings = Settings::default()
        .arg(proxy)
        .arg("--admin-token-file")
        .arg(file.to_str().unwrap());
    let mut server = Server::start(settings);
    refused(
        &server.cli(&["project", "list", "--output", "json"]),
        "unauthenticated",
    );
    // The first token is in the file, for its owner alone, and not in what was printed.
    assert!(server.process().facts()["admin_token"].is_null());
    let token = std::fs::read_to_string(&file).unwrap().trim().to_owned();
    ok(&server, &token, &["token", "list"]);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    let (_, secret) = token.rsplit_once('_').unwrap();
    let found = containing(server.folder().path(), secret);
    assert!(found.is_empty(), "{found:?}");
    server.stop();
    server.settings().args = vec![proxy.to_owned(), "--auth".to_owned(), "open".to_owned()];
    let open = server.try_restart_with(&[]).unwrap_err();
    assert!(
        format!("{open:?}").contains("open_behind_proxy"),
        "{open:?}"
    );
}

#[test]
fn a_token_that_was_kept_is_not_lost_by_another_login() {
    let (server, admin) = guarded();
    let elsewhere = Server::start(Settings::default().arg("--auth").arg("required"));
    let other = elsewhere.process().fact("admin_token");
    let create = ["token", "create", "reads", "--role", "viewer"];
    let viewer = ok(&server, &admin, &create).stdout.trim().to_owned();
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.toml");
    let run = |token: &str, args: &[&str]| {
        let file = folder.path().join("token");
        std::fs::write(&file, token).unwrap();
        let mut command = daybook();
        command.env("DAYBOOK_CONFIG", &config).args(args);
        command.args(["--output", "json"]);
        if args[0] == "login" {
            command.arg("--token-file").arg(&file);
        }
        Done::of(&mut command)
    };
    let (url, other_url) = (server.url(), elsewhere.url());
    let done = run(&admin, &["login", "--server", &url]);
    assert_eq!(done.code, 0, "{done:?}");
    // The port is in the name: another server of this machine has another.
    let name = done.json()["context"].as_str().unwrap().to_owned();
    assert_eq!(url, format!("http://{name}"));
    let kept = || run("", &["whoami", "--context", &name]).json()["actor"]["id"].clone();
    // Another account, and another server under the same name.
    refused(
        &run(&viewer, &["login", "--server", &url]),
        "context_exists",
    );
    let taken = ["login", "--server", &other_url, "--name", &name];
    refused(&run(&other, &taken), "context_exists");
    assert_eq!(kept(), "admin");
    // A newer token of the same account takes the place of the one before, and whoever says so
    // forgets it.
    assert_eq!(run(&admin, &["login", "--server", &url]).code, 0);
    let replaced = run(&viewer, &["login", "--server", &url, "--replace"]);
    assert_eq!(replaced.code, 0, "{replaced:?}");
    assert_eq!(kept(), "reads");

    // Of several contexts of a server the current one gives the token.
    for (token, name) in [(&admin, "a"), (&viewer, "b")] {
        let done = run(token, &["login", "--server", &url, "--name", name]);
        assert_eq!(done.code, 0, "{done:?}");
    }
    let who =
        |args: &[&str]| run("", &[&["whoami"][..], args].concat()).json()["actor"]["id"].clone();
    assert_eq!(who(&["--server", &url]), "reads");
    run("", &["context", "use", "a"]);
    assert_eq!(who(&["--server", &url]), "admin");
    // A context that is named goes before the environment, with its own token.
    let mut named = daybook();
    named.env("DAYBOOK_CONFIG", &config);
    named
        .env("DAYBOOK_URL", &other_url)
        .env("DAYBOOK_TOKEN", &other);
    let named = Done::of(named.args(["whoami", "--context", "b", "--output", "json"]));
    assert_eq!(named.json()["actor"]["id"], "reads", "{named:?}");
}

#[test]
fn no_token_leaves_the_machine_in_the_clear() {
    let mut command = daybook();
    let token = format!("daybook_{}_{}", "0".repeat(12), "0".repeat(64));
    command.env("DAYBOOK_TOKEN", &token);
    let args = ["project", "list", "--output", "json", "--server"];
    // Nobody answers at this address, which is for documentation alone.
    let done = Done::of(command.args(args).arg("http://192.0.2.1:7070"));
    refused(&done, "token_in_the_clear");
    assert!(done.stderr.contains("--insecure"), "{done:?}");
}

#[test]
fn a_rotation_takes_an_end_away_only_if_that_is_said() {
    let (server, admin) = guarded();
    ok(
        &server,
        &admin,
        &["token", "create", "ci", "--role", "viewer"],
    );
    let end = || {
        let listed = ok(&server, &admin, &json(&["token", "list"])).json();
        let tokens = listed["tokens"].as_array().unwrap();
        let token = tokens.iter().find(|t| t["name"] == "ci").unwrap();
        token["expires_at"].clone()
    };
    let first = end();
    assert!(first.is_string(), "{first}");
    ok(&server, &admin, &["token", "rotate", "ci"]);
    assert_eq!(end(), first);
    ok(
        &server,
        &admin,
        &["token", "rotate", "ci", "--expires", "never"],
    );
    assert!(end().is_null(), "{}", end());
    // The last that administers without an end keeps it.
    let done = with(
        &server,
        &admin,
        &json(&["token", "rotate", "admin", "--expires", "90d"]),
    );
    refused(&done, "last_admin");
    let second = ["token", "create", "second", "--role", "admin"];
    ok(&server, &admin, &second);
    refused(
        &with(&server, &admin, &json(&["token", "revoke", "admin"])),
        "last_admin",
    );
}

#[test]
fn a_login_is_kept_for_its_server_alone() {
    let (server, admin) = guarded();
    let config = server.folder().path().join("config/config.toml");
    let command = |args: &[&str]| {
        let mut command = daybook();
        command.env("DAYBOOK_CONFIG", &config).args(args);
        command
    };
    let login = |token: &str, name: &str| {
        let url = server.url();
        let mut login = command(&[
            "login", "--server", &url, "--name", name, "--output", "json",
        ]);
        let mut login = login
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = login.stdin.take().unwrap();
        writeln!(input, "{token}").unwrap();
        drop(input);
        login.wait_with_output().unwrap()
    };
    // What the server does not take is not kept.
    let bad = format!("daybook_{}_{}", "0".repeat(12), "0".repeat(64));
    assert!(!login(&bad, "prod").status.success());
    assert!(!config.exists());
    let done = login(&admin, "prod");
    assert!(done.status.success(), "{done:?}");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::metadata(&config).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    let run = |args: &[&str]| Done::of(&mut command(args));
    let who = run(&["whoami", "--output", "json"]);
    assert_eq!(who.json()["actor"]["id"], "admin", "{who:?}");
    let contexts = run(&["context", "list", "--output", "json"]);
    assert_eq!(contexts.json()["contexts"][0]["current"], true);
    assert!(!contexts.stdout.contains(&admin));
    // A token of the environment goes before the one that is kept, and a server that is named gets
    // none that is kept for another.
    let mut other = command(&["whoami", "--output", "json"]);
    refused(&Done::of(other.env("DAYBOOK_TOKEN", &bad)), "unknown_token");
    let elsewhere = Server::start(Settings::default().arg("--auth").arg("required"));
    let url = elsewhere.url();
    refused(
        &run(&["whoami", "--server", &url, "--output", "json"]),
        "unauthenticated",
    );
    // What others can read is not used.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let open = std::fs::Permissions::from_mode(0o644);
        std::fs::set_permissions(&config, open).unwrap();
        refused(&run(&["whoami", "--output", "json"]), "config_readable");
        let closed = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&config, closed).unwrap();
    }
    assert_eq!(run(&["logout"]).code, 0);
    assert!(!std::fs::read_to_string(&config).unwrap().contains(&admin));
}

#[test]
fn tls_is_spoken_where_there_is_a_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let (cert, key) = (
        folder.path().join("cert.pem"),
        folder.path().join("key.pem"),
    );
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let settings = Settings::default()
        .arg("--tls-cert")
        .arg(cert.to_str().unwrap())
        .arg("--tls-key")
        .arg(key.to_str().unwrap());
    let server = Server::start(settings);
    let url = server.url();
    assert!(url.starts_with("https://"), "{url}");
    let port = url.rsplit_once(':').unwrap().1;
    let url = format!("https://localhost:{port}/healthz");
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let ask = |trusted: Option<&str>| {
        let mut client = reqwest::Client::builder().no_proxy();
        if let Some(pem) = trusted {
            let certificate = reqwest::Certificate::from_pem(pem.as_bytes()).unwrap();
            client = client.tls_certs_only([certificate]);
        }
        let client = client.build().unwrap();
        runtime
            .block_on(client.get(&url).send())
            .map(|a| a.status().as_u16())
    };
    assert_eq!(ask(Some(&made.cert.pem())).unwrap(), 200);
    assert!(
        ask(None).is_err(),
        "a certificate that nobody knows is believed"
    );
    // In the clear there is no answer.
    let clear = format!("http://localhost:{port}/healthz");
    assert!(request(Method::GET, &clear, &[], None).is_err());
}
