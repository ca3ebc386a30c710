//! What the command line shows on a terminal.

use std::process::Child;

use crate::support::{Server, Settings, Terminal, application, site, until, without_colours};

/// A command that goes on until it is dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is to be read of a text, however it is wrapped.
fn letters(text: &str) -> Vec<char> {
    let mut letters: Vec<_> = text.chars().filter(|c| !c.is_whitespace()).collect();
    letters.sort_unstable();
    letters
}

#[test]
fn tables_are_wrapped_to_the_terminal_and_stay_in_colour() {
    let server = Server::start(Settings::default());
    let repository = site("hello");
    server.define("shop", "web", &repository, &[]);
    let id = server.deploy("shop.production.web", &[]);
    until("traffic", || {
        (server.history(&id)["active"] == true).then_some(())
    });
    // Wide enough, nothing is wrapped.
    let wide = |command: &str| {
        let shown = Terminal::start(server.command(&[command]), 400).ended();
        without_colours(&shown)
    };
    let status = wide("status");
    let row = status.lines().nth(1).unwrap_or_default();
    for part in ["shop.production.web *", &id[28..], "started", "ready"] {
        assert!(row.contains(part), "no {part} in {status}");
    }
    let history = wide("history");
    for columns in [80, 120] {
        for command in ["status", "history"] {
            let shown = Terminal::start(server.command(&[command]), columns).ended();
            let text = without_colours(&shown);
            assert!(text.len() < shown.len(), "no colours: {shown:?}");
            for line in text.lines() {
                let width = line.chars().count();
                assert!(width <= usize::from(columns), "{width} in {line:?}");
            }
            if command == "history" {
                assert_eq!(letters(&text), letters(&history), "{text}");
            }
        }
    }
}

#[test]
fn what_is_watched_is_shown_again_when_an_event_has_changed_it() {
    let mut server = Server::start(Settings::default());
    let repository = site("hello");
    server.define("shop", "web", &repository, &[]);
    let address = server.url().replace("http://", "");
    let terminal = Terminal::start(server.command(&["status", "--watch"]), 400);
    let file = server.folder().path().join("watched");
    let _watching = Killed(
        server
            .command(&["status", "--watch", "--project", "shop"])
            .stdout(std::fs::File::create(&file).unwrap())
            .spawn()
            .unwrap(),
    );
    let screen = || {
        let shown = terminal.shown();
        shown.rsplit("\x1b[2J\x1b[H").next().unwrap().to_owned()
    };
    let lines = || std::fs::read_to_string(&file).unwrap();
    until("an empty table", || {
        screen().contains("nothing runs").then_some(())
    });
    let one = server.deploy("shop.production.web", &[]);
    let one = &one[28..];
    until("the first deployment", || {
        let line = format!("shop.production.web * {one}: started; build ready");
        let shown = screen();
        let drawn = shown.contains(one) && shown.contains("started");
        // In the place of what was there before.
        let once = shown.matches("SERVICE").count() == 1;
        (drawn && once && lines().contains(&line)).then_some(())
    });
    // No colours and nothing drawn over, where there is no terminal.
    assert!(!lines().contains('\x1b'), "{}", lines());

    // The server goes away and comes back; what happens then is seen.
    server.stop();
    server.restart_with(&["--listen", &address, "--gateway", "127.0.0.1:0"]);
    let two = server.deploy("shop.production.web", &[]);
    let two = &two[28..];
    until("the second deployment", || {
        (screen().contains(two) && lines().contains(two)).then_some(())
    });
    let done = server.cli(&["status", "--watch", "--at", "3"]);
    assert_eq!(done.code, 2, "{done:?}");
}

#[test]
fn a_deployment_is_followed_in_one_line() {
    let server = Server::start(Settings::default());
    let repository = application("--text one");
    server.define("shop", "web", &repository, &[]);
    // What is left of the lines once all was drawn.
    let left = |args: &[&str]| -> Vec<String> {
        let shown = Terminal::start(server.command(args), 100).ended();
        assert!(shown.contains("it is live"), "{shown}");
        let lines = shown.lines();
        let drawn = lines.map(|line| line.rsplit("\r\x1b[2K").next().unwrap().to_owned());
        drawn.collect()
    };
    let has = |lines: &[String], text: &str| lines.iter().any(|line| line.contains(text));
    let live = left(&["deploy", "shop.production.web"]);
    assert!(!has(&live, "cloning started"), "{live:#?}");
    assert!(has(&live, "shop.production.web"), "{live:#?}");
    let all = left(&["deploy", "shop.production.web", "--verbose"]);
    assert!(has(&all, "cloning started"), "{all:#?}");
    assert!(all.len() > live.len() + 5, "{} {}", all.len(), live.len());
}

#[test]
fn what_somebody_has_to_do_is_a_whole_line_while_a_deployment_is_followed() {
    let server = Server::start(Settings::default());
    let repository = site("hello");
    server.define("shop", "web", &repository, &[]);
    let freeze = ["freeze", "add", "shop", "production", "sale"];
    let when = ["--from", "2020-01-01T00:00", "--reason", "the sale"];
    server.ok(&[&freeze[..], &when[..]].concat());
    let terminal = Terminal::start(server.command(&["deploy", "shop.production.web"]), 40);
    let told = "its environment is frozen by sale until that is taken away; \
                `daybook freeze override` lets it through";
    // Whole, and what goes on is shown below.
    until("what to do", || {
        let shown = terminal.shown();
        let (_, after) = shown.split_once(told)?;
        after.starts_with("\r\n").then_some(())
    });
    server.ok(&["freeze", "remove", "shop", "production", "sale"]);
    let shown = terminal.ended();
    assert_eq!(shown.matches(told).count(), 1, "{shown}");
    assert!(shown.contains("it is live"), "{shown}");
}
