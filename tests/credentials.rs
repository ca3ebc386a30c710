//! Passwords and tokens in addresses: wherever an address may be given, what stands in it for
//! nobody's eyes is in no message, no answer, no log and no file.

use daybook_testkit::nats::{NatsBinary, NatsServer, NatsSettings};
use reqwest::Method;

use crate::support::{
    Done, Folder, Search, Server, Settings, application, daybook, request, until,
};

const PASSWORD: &str = "CanaryPassword4711";

fn search() -> Search {
    Search::new([PASSWORD, "CanaryPassw", "Password4711"])
}

#[test]
fn what_is_refused_or_not_reached_is_told_without_credentials() {
    let folder = Folder::new();
    let data = folder.data().display().to_string();
    let mut search = search();
    let nats = format!("nats://ada:{PASSWORD}@127.0.0.1:1");
    let web = format!("http://ada:{PASSWORD}@127.0.0.1:1");
    let bare = format!("ada:{PASSWORD}@127.0.0.1:1");
    let query = format!("http://127.0.0.1:1/?token={PASSWORD}");
    let token = format!("nats://{PASSWORD}@127.0.0.1:1");
    let several = format!("{nats},nats://bob:{PASSWORD}@127.0.0.1:2");
    let broken = format!("nats://ada:{PASSWORD}@[::1");
    let node = [
        "--data",
        &data,
        "--listen",
        "127.0.0.1:0",
        "--gateway",
        "127.0.0.1:0",
    ];
    let mut commands: Vec<Vec<&str>> = Vec::new();
    for address in [&nats, &token, &several, &broken, &web, &bare] {
        commands.push([&["up", "--nats", address][..], &node].concat());
        commands.push(vec!["ledger", "repair", "--data", &data, "--nats", address]);
    }
    for option in [
        "--image-prefix",
        "--domain",
        "--host",
        "--origin",
        "--listen",
        "--gateway",
        "--local-cluster",
        "--nats-stream",
        "--no-such-option",
    ] {
        for address in [&web, &bare, &query] {
            // What is not refused for the address is for the folder.
            commands.push(vec!["up", "--data", "/dev/null/data", option, address]);
        }
    }
    for address in [&web, &bare, &query] {
        let nowhere = ["--nats", "nats://127.0.0.1:1", "--data", "/dev/null/data"];
        let serve = ["serve", "--role", "api", "--gateway-url", address];
        commands.push([&serve[..], &nowhere].concat());
        for command in [
            &["status"][..],
            &["ledger", "status"],
            &["history"],
            &["events"],
        ] {
            commands.push([command, &["--server", address]].concat());
        }
        commands.push(vec!["deploy", address]);
        commands.push(vec!["project", "create", address]);
        commands.push(vec![address]);
    }
    let ended: Vec<(Vec<&str>, Done)> = std::thread::scope(|scope| {
        let running: Vec<_> = commands
            .iter()
            .map(|args| {
                scope.spawn(move || {
                    let both = ["text", "json"].map(|output| (args, output)).into_iter();
                    both.map(|(args, output)| {
                        let mut command = daybook();
                        command.args(args).args(["--output", output]);
                        (args.clone(), Done::of(command.env("DAYBOOK_LOG", "debug")))
                    })
                    .collect::<Vec<_>>()
                })
            })
            .collect();
        running
            .into_iter()
            .flat_map(|r| r.join().unwrap())
            .collect()
    });
    for (args, done) in &ended {
        assert_ne!(done.code, 0, "{args:?} {done:?}");
        search.look_at(&format!("{:?}", &args[..2.min(args.len())]), done);
    }
    search.look_in(folder.path(), std::path::Path::new(""));
    search.found_nothing(2 * ended.len());
}

#[test]
fn a_server_that_uses_credentials_never_shows_them() {
    let Some(binary) = NatsBinary::newest().or_else(|| NatsBinary::installed().pop()) else {
        return daybook_testkit::left_out("credentials for NATS: there is no nats-server");
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let settings = NatsSettings {
        extra: format!("authorization {{ user: ada, password: {PASSWORD} }}"),
        user: Some(("ada".into(), PASSWORD.into())),
        ..NatsSettings::default()
    };
    let mut nats = runtime.block_on(NatsServer::start_with(&binary, settings));
    let url = nats.url().replace("://", &format!("://ada:{PASSWORD}@"));
    let settings = Settings::default()
        .env("DAYBOOK_NATS", url)
        .env("DAYBOOK_LOG", "trace,h2=info,mio=info");
    let mut server = Server::start(settings);
    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    let mut search = search();
    let id = server.deploy("shop.production.web", &[]);

    search.look(
        "what it says of itself",
        server.process().facts().to_string().as_bytes(),
    );
    for command in [
        &["status"][..],
        &["ledger", "status"],
        &["history"],
        &["replay"],
        &["status", "--output", "json"],
    ] {
        search.look_at(&format!("{command:?}"), &server.ok(command));
    }
    search.look_at_answers(&server, &id, "Bearer none");
    // A deployment gets nothing of the server's environment.
    let env = server.get_from("web.shop.localhost", "/env", &id).body;
    search.look("the environment of a deployment", env.as_bytes());

    // While NATS is away, and after it was.
    nats.kill();
    until("it is said not to be ready", || {
        let url = format!("{}/readyz", server.url());
        let answer = request(Method::GET, &url, &[], None).unwrap();
        search.look("readyz", answer.body.as_bytes());
        (answer.status == 503).then_some(())
    });
    search.look_at(
        "deploy",
        &server.cli(&["deploy", "shop.production.web", "--detach"]),
    );
    runtime.block_on(nats.start_again());
    server.deploy("shop.production.web", &[]);
    assert!(server.stop().success());
    search.look_in(server.folder().path(), std::path::Path::new(""));
    search.found_nothing(100);
}
