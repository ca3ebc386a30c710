//! What the command line shows on a terminal.

use crate::support::{Server, Settings, Terminal, site, until, without_colours};

/// What is to be read of a text, however it is wrapped.
fn letters(text: &str) -> Vec<char> {
    let mut letters: Vec<_> = text.chars().filter(|c| !c.is_whitespace()).collect();
    letters.sort_unstable();
    letters
}

#[test]
fn tables_are_wrapped_to_the_terminal_and_stay_in_colour() {
    let server = Server::start(Settings::default());
    server.define("shop", "web", &site("hello"), &[]);
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
