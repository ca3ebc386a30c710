//! `daybook secret`

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use reqwest::Method;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use serde::Serialize;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::manage::segment;
use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::confirm::confirm;
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// The longest value that is read, with a byte to see that one is too long.
const READ_MAX: u64 = 32 * 1024 + 3;

/// Set and take away secret variables, without ever showing them.
///
/// Deployments get the secrets of their project, environment and service in their environment.
/// The ledger holds who set which version when, and a keyed commitment to the value; the GitOps
/// repository holds references. A change takes effect with the next `daybook deploy`.
#[derive(Debug, Subcommand)]
pub enum SecretCommand {
    /// Give a secret a value, read from standard input, a file, or a prompt.
    Set {
        #[command(flatten)]
        secret: SecretArgs,
        #[command(flatten)]
        value: ValueArgs,
        /// Names this request: repeating it with the same key sets it once.
        #[arg(long, value_name = "KEY")]
        idempotency_key: Option<String>,
    },
    /// List the secrets of a project: names, scopes and versions, never values.
    List {
        #[command(flatten)]
        server: ServerArgs,
        /// The project.
        project: String,
    },
    /// Take a secret away: later deployments do not get it.
    Unset {
        #[command(flatten)]
        secret: SecretArgs,
        /// Erase its values too. Deployments that run with it cannot be started again then, and
        /// their output is no longer masked against it.
        #[arg(long)]
        erase: bool,
    },
    /// Erase all values of a project, and the key of its commitments, for ever.
    ///
    /// The ledger still says who set which version when, and nobody can find out any more to what.
    /// Deployments that run with them cannot be started again, and their output is no longer
    /// masked. Copies of the secret store, such as backups, are yours to erase.
    Erase {
        #[command(flatten)]
        server: ServerArgs,
        /// The project.
        project: String,
        /// Do not ask.
        #[arg(long, short)]
        yes: bool,
    },
    /// Ask whether a value is the one that a secret has, or had in some version.
    Verify {
        #[command(flatten)]
        secret: SecretArgs,
        #[command(flatten)]
        value: ValueArgs,
        /// The version to compare with; the newest if not given.
        #[arg(long, value_name = "N")]
        of_version: Option<u32>,
    },
}

/// Which secret.
#[derive(Debug, Args)]
pub struct SecretArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The project.
    project: String,
    /// The environment variable that it becomes.
    name: String,
    /// Only for this environment.
    #[arg(long, short, value_name = "ENVIRONMENT")]
    env: Option<String>,
    /// Only for this service.
    #[arg(long, short)]
    service: Option<String>,
}

/// Where the value comes from: never an argument, which every process of the machine can see.
#[derive(Debug, Args)]
pub struct ValueArgs {
    /// Read the value from this file instead of standard input. One line break at its end is no
    /// part of it.
    #[arg(long, value_name = "FILE")]
    from_file: Option<PathBuf>,
}

/// A value on its way to the server.
#[derive(Serialize)]
struct Body<'a> {
    value: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    environment: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u32>,
}

impl SecretArgs {
    fn path(&self) -> Result<String, Failure> {
        let (project, name) = (segment(&self.project)?, segment(&self.name)?);
        Ok(format!("/api/v1/projects/{project}/secrets/{name}"))
    }

    fn body<'a>(&'a self, value: &'a str) -> Body<'a> {
        Body {
            value,
            environment: self.env.as_deref(),
            service: self.service.as_deref(),
            version: None,
        }
    }
}

pub async fn run(command: SecretCommand) -> Outcome {
    match command {
        SecretCommand::Set {
            secret,
            value,
            idempotency_key,
        } => set(&secret, &value, idempotency_key.as_deref()).await,
        SecretCommand::List { server, project } => list(&server, &project).await,
        SecretCommand::Erase {
            server,
            project,
            yes,
        } => erase(&server, &project, yes).await,
        SecretCommand::Unset { secret, erase } => unset(&secret, erase).await,
        SecretCommand::Verify {
            secret,
            value,
            of_version,
        } => verify(&secret, &value, of_version).await,
    }
}

async fn set(args: &SecretArgs, value: &ValueArgs, key: Option<&str>) -> Outcome {
    let path = args.path()?;
    let client = Client::new(&args.server)?;
    let value = read(value, &args.name)?;
    let answer: Value = client
        .command(Method::PUT, &path, &args.body(&value), key)
        .await?;
    if output::is_json() {
        output::json(&answer);
        return Ok(Code::Success);
    }
    let (name, version) = (&args.name, &answer["version"]);
    let style = output::style();
    if answer["changed"] == json!(true) {
        output::line(&format!("{} {name} version {version}", style.good("set")));
        output::line("it takes effect with the next `daybook deploy`");
    } else {
        output::line(&format!("{name} has this value already: version {version}"));
    }
    Ok(Code::Success)
}

async fn unset(args: &SecretArgs, erase: bool) -> Outcome {
    let mut query = Vec::new();
    if let Some(environment) = &args.env {
        query.push(format!("environment={}", segment(environment)?));
    }
    if let Some(service) = &args.service {
        query.push(format!("service={}", segment(service)?));
    }
    if erase {
        query.push("erase=true".to_owned());
    }
    let path = format!("{}?{}", args.path()?, query.join("&"));
    let answer: Value = Client::new(&args.server)?
        .command(Method::DELETE, &path, &json!({}), None)
        .await?;
    if output::is_json() {
        output::json(&answer);
        return Ok(Code::Success);
    }
    let what = if erase { "unset and erased" } else { "unset" };
    output::line(&format!("{} {}", output::style().good(what), args.name));
    Ok(Code::Success)
}

async fn erase(server: &ServerArgs, project: &str, yes: bool) -> Outcome {
    let path = format!("/api/v1/projects/{}/secrets", segment(project)?);
    let client = Client::new(server)?;
    if !yes {
        let what = format!("all secrets of {project} are erased");
        confirm(&what, project)?;
    }
    let answer: Value = client
        .command(Method::DELETE, &path, &json!({}), None)
        .await?;
    if output::is_json() {
        output::json(&answer);
        return Ok(Code::Success);
    }
    let style = output::style();
    output::line(&format!(
        "{} all secrets of {project}, and the key of their commitments",
        style.good("erased")
    ));
    Ok(Code::Success)
}

async fn verify(args: &SecretArgs, value: &ValueArgs, version: Option<u32>) -> Outcome {
    let path = format!("{}/verify", args.path()?);
    let client = Client::new(&args.server)?;
    let value = read(value, &args.name)?;
    let body = Body {
        version,
        ..args.body(&value)
    };
    let answer: Value = client.command(Method::POST, &path, &body, None).await?;
    let matches = answer["matches"] == json!(true);
    if output::is_json() {
        output::json(&answer);
    } else {
        let style = output::style();
        let (name, version) = (&args.name, &answer["version"]);
        output::line(&if matches {
            format!(
                "{}: this is what the ledger is committed to as {name} version {version}",
                style.good("the same")
            )
        } else {
            format!(
                "{}: this is not {name} version {version}",
                style.warn("different")
            )
        });
    }
    Ok(if matches {
        Code::Success
    } else {
        Code::Mismatch
    })
}

async fn list(server: &ServerArgs, project: &str) -> Outcome {
    let path = format!("/api/v1/projects/{}/secrets", segment(project)?);
    let answer: Value = Client::new(server)?.get(&path, &[]).await?;
    if output::is_json() {
        output::json(&answer);
        return Ok(Code::Success);
    }
    let secrets = answer["secrets"].as_array().cloned().unwrap_or_default();
    if secrets.is_empty() {
        output::line("no secrets");
        return Ok(Code::Success);
    }
    let mut table = Table::new(["NAME", "ENVIRONMENT", "SERVICE", "VERSION", "CHANGED", "BY"]);
    for secret in &secrets {
        let text = |pointer: &str| match secret.pointer(pointer) {
            Some(Value::String(s)) => s.clone(),
            Some(Value::Null) | None => "all".to_owned(),
            Some(other) => other.to_string(),
        };
        let changed = text("/changed_at");
        table.row(Row::new([
            text("/name"),
            text("/environment"),
            text("/service"),
            text("/version"),
            changed.parse().map_or(changed, output::time),
            text("/changed_by/id"),
        ]));
    }
    table.print();
    Ok(Code::Success)
}

/// Reads a value: from a file, from standard input, or from a person at a terminal, who does not
/// see it. One line break at its end is no part of it.
fn read(args: &ValueArgs, name: &str) -> Result<Zeroizing<String>, Failure> {
    read_hidden(
        args.from_file.as_deref(),
        &format!("value of {name} (not shown): "),
    )
}

/// The same, asking a person at a terminal with these words.
pub fn read_hidden(file: Option<&Path>, prompt: &str) -> Result<Zeroizing<String>, Failure> {
    let unreadable = |e: io::Error| {
        Failure::new(
            Code::Usage,
            "value_unreadable",
            format!("the value cannot be read: {e}"),
        )
        .hint("pipe it into standard input, or name a file with --from-file")
    };
    let stdin = io::stdin();
    let mut value = Zeroizing::new(String::new());
    match file {
        Some(file) => {
            let file = File::open(file).map_err(unreadable)?;
            file.take(READ_MAX)
                .read_to_string(&mut value)
                .map_err(unreadable)?;
        }
        None if stdin.is_terminal() => {
            eprint!("{prompt}");
            let quiet = NoEcho::begin().map_err(unreadable)?;
            let read = stdin.read_line(&mut value);
            drop(quiet);
            eprintln!();
            read.map_err(unreadable)?;
        }
        None => {
            let stdin = stdin.lock();
            stdin
                .take(READ_MAX)
                .read_to_string(&mut value)
                .map_err(unreadable)?;
        }
    }
    if value.ends_with('\n') {
        value.pop();
        if value.ends_with('\r') {
            value.pop();
        }
    }
    Ok(value)
}

/// A terminal that does not show what is typed, until this is dropped.
struct NoEcho(Termios);

impl NoEcho {
    fn begin() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut quiet = before.clone();
        quiet.local_modes.remove(LocalModes::ECHO);
        tcsetattr(io::stdin(), OptionalActions::Flush, &quiet)?;
        Ok(Self(before))
    }
}

impl Drop for NoEcho {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Flush, &self.0);
    }
}
