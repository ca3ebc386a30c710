//! The `daybook` binary: parses the command line, composes the adapters, runs roles, and talks to
//! servers.

#![allow(
    unreachable_pub,
    reason = "a binary has no public interface; `pub` says what a module offers"
)]

mod access;
mod attestor;
mod builds;
mod bulletin;
mod client;
mod commands;
mod confirm;
mod contexts;
mod endpoint_checks;
mod exit;
mod folder;
mod gitops_remotes;
mod kubernetes;
mod memory;
mod node;
mod output;
mod proofs;
mod remote;
mod roles;
mod scratch;
mod served_tree;
mod telemetry;
mod uploads;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use clap::error::{ContextKind, ContextValue};

use crate::commands::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|error| without_credentials(error).exit());
    output::init(&cli.global);
    // Settings of libgit2 are global to the process, and are made before there are threads.
    if let Err(error) = daybook_workers::git_transport::prepare_process() {
        eprintln!("error: git is not usable: {error}");
        return exit::Code::Failure.into();
    }
    // One TLS implementation for everything: rustls with ring.
    if rustls::crypto::ring::default_provider()
        .install_default()
        .is_err()
    {
        tracing::debug!("a TLS provider was installed before");
    }
    // What ends soon has no use for it.
    if matches!(cli.command, Command::Up(_) | Command::Serve(_)) {
        memory::share_arenas();
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        // What blocks takes turns on the threads that there are: a thread that is used once in ten seconds,
        // which is how long tokio waits by itself, would never end after a burst.
        .thread_keep_alive(Duration::from_secs(1))
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: no threads can be started: {error}");
            return exit::Code::Failure.into();
        }
    };
    let code = match runtime.block_on(commands::run(cli)) {
        Ok(code) => code,
        Err(error) => {
            error.print();
            error.code
        }
    };
    // Blocking work that nobody waits for any more does not hold the exit.
    runtime.shutdown_timeout(Duration::from_millis(500));
    code.into()
}

/// What is wrong with the command line, quoted as it may be shown: it may be an address.
fn without_credentials(mut error: clap::Error) -> clap::Error {
    let shown = |text: &String| daybook_events::without_credentials(text);
    for kind in [
        ContextKind::InvalidValue,
        ContextKind::InvalidArg,
        ContextKind::InvalidSubcommand,
    ] {
        let quoted = match error.get(kind) {
            Some(ContextValue::String(text)) => ContextValue::String(shown(text)),
            Some(ContextValue::Strings(texts)) => {
                ContextValue::Strings(texts.iter().map(shown).collect())
            }
            _ => continue,
        };
        error.insert(kind, quoted);
    }
    error
}
