//! `daybook login`, `logout`, `whoami` and `context`: which server, and who one is there.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::secret::read_hidden;
use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::contexts::{self, Context, Contexts, Token};
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// Keep a token for a server, so that the other commands use both.
///
/// The token is read from standard input, or from a person at a terminal, who does not see it. It is
/// tried first, and kept in a file that nobody else can read.
#[derive(Debug, Args)]
pub struct LoginArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// What the context is called; the server's host and port if not given.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Forget what the context of that name has had, also if it is of another server or account.
    #[arg(long)]
    replace: bool,
}

/// Forget a context with its token. The token itself is still taken: `daybook token revoke` ends it.
#[derive(Debug, Args)]
pub struct LogoutArgs {
    /// The context; the current one if not given.
    name: Option<String>,
}

/// Who the server takes one for, and what one may do there.
#[derive(Debug, Args)]
pub struct WhoAmIArgs {
    #[command(flatten)]
    server: ServerArgs,
}

/// Servers that one talks to, each with a token.
#[derive(Debug, Subcommand)]
pub enum ContextCommand {
    /// The contexts that there are.
    List,
    /// Use this one from now on.
    Use {
        /// The context.
        name: String,
    },
    /// Forget one, with its token.
    Remove {
        /// The context.
        name: String,
    },
}

pub async fn login(args: LoginArgs) -> Outcome {
    let mut file = Contexts::load()?;
    let target = contexts::target(&args.server)?;
    let name = args.name.clone().or(args.server.context.clone());
    let name = name.unwrap_or_else(|| host_and_port(&target.server));
    let from = contexts::token_file(&args.server);
    let token = Token::new(&read_hidden(from.as_deref(), "token (not shown): ")?);
    let client = Client::with_token(&args.server, Some(token.clone()))?;
    let who: Value = client.get("/api/v1/whoami", &[]).await?;
    if !args.replace
        && let Some(kept) = file.contexts.get(&name)
    {
        must_be_another_of_the_same(&args.server, &name, kept, &client, &who).await?;
    }
    let context = Context {
        server: client.base().to_owned(),
        token: Some(token),
        insecure: target.insecure,
    };
    file.contexts.insert(name.clone(), context);
    file.current = Some(name.clone());
    let kept = file.save()?;
    if output::is_json() {
        output::json(
            &json!({ "context": name, "file": kept, "actor": who["actor"], "grants": who["grants"] }),
        );
        return Ok(Code::Success);
    }
    output::line(&format!(
        "{} {} at {} as {}: {}",
        output::style().good("logged in"),
        name,
        client.shown(),
        who["actor"]["id"].as_str().unwrap_or_default(),
        grants(&who["grants"])
    ));
    Ok(Code::Success)
}

/// Refuses to forget a token that is no older one of the same account on the same server: it was shown
/// once, and may be the only one of its kind.
async fn must_be_another_of_the_same(
    args: &ServerArgs,
    name: &str,
    kept: &Context,
    client: &Client,
    who: &Value,
) -> Result<(), Failure> {
    let Some(token) = &kept.token else {
        return Ok(());
    };
    let of_another = |what: &str| {
        Failure::new(
            Code::Refused,
            "context_exists",
            format!("the context {name} has the token of {what}, which nobody can show again"),
        )
        .hint("keep this one under another name with --name, or that one no longer with --replace")
    };
    if kept.server.trim_end_matches('/') != client.base() {
        return Err(of_another(&format!(
            "another server, {}",
            shown(&kept.server)
        )));
    }
    let earlier = Client::with_token(args, Some(token.clone()))?;
    match earlier.get::<Value>("/api/v1/whoami", &[]).await {
        Ok(earlier) if earlier["actor"] == who["actor"] => Ok(()),
        Ok(earlier) => {
            let id = earlier["actor"]["id"].as_str().unwrap_or_default();
            Err(of_another(&format!("another account, {id}")))
        }
        // What is not taken any more is no loss.
        Err(failure) if is_no_good(&failure.kind) => Ok(()),
        Err(failure) => Err(failure),
    }
}

fn is_no_good(code: &str) -> bool {
    [
        "unknown_token",
        "token_revoked",
        "token_expired",
        "invalid_credential",
    ]
    .contains(&code)
}

pub fn logout(args: LogoutArgs) -> Outcome {
    let file = Contexts::load()?;
    let name = args.name.or(file.current.clone()).ok_or_else(|| {
        Failure::new(
            Code::NotFound,
            "context_not_found",
            "there is no current context",
        )
        .hint("`daybook context list` shows those that there are")
    })?;
    remove(file, &name)
}

pub async fn whoami(args: WhoAmIArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let who: Value = client.get("/api/v1/whoami", &[]).await?;
    if output::is_json() {
        output::json(&who);
        return Ok(Code::Success);
    }
    let id = who["actor"]["id"].as_str().unwrap_or_default();
    output::line(&format!(
        "{id} at {}: {}",
        client.shown(),
        grants(&who["grants"])
    ));
    if who["authentication"] == "open" {
        output::line("this server asks nobody for a token");
    }
    Ok(Code::Success)
}

pub fn context(command: ContextCommand) -> Outcome {
    let mut file = Contexts::load()?;
    match command {
        ContextCommand::List => list(&file),
        ContextCommand::Use { name } => {
            file.find(&name)?;
            file.current = Some(name.clone());
            file.save()?;
            output::line(&format!("commands go to {name} from now on"));
            Ok(Code::Success)
        }
        ContextCommand::Remove { name } => remove(file, &name),
    }
}

fn list(file: &Contexts) -> Outcome {
    let current = |name: &str| file.current.as_deref() == Some(name);
    if output::is_json() {
        let contexts: Vec<_> = file
            .contexts
            .iter()
            .map(|(name, c)| {
                json!({ "name": name, "server": shown(&c.server), "token": c.token.is_some(), "current": current(name) })
            })
            .collect();
        output::json(&json!({ "contexts": contexts }));
        return Ok(Code::Success);
    }
    if file.contexts.is_empty() {
        output::line("there is no context; `daybook login` makes one");
        return Ok(Code::Success);
    }
    let mut table = Table::new(["", "NAME", "SERVER", "TOKEN"]);
    for (name, context) in &file.contexts {
        table.row(Row::new([
            if current(name) { "*" } else { "" }.to_owned(),
            name.clone(),
            shown(&context.server),
            if context.token.is_some() {
                "kept"
            } else {
                "none"
            }
            .to_owned(),
        ]));
    }
    table.print();
    Ok(Code::Success)
}

fn remove(mut file: Contexts, name: &str) -> Outcome {
    file.find(name)?;
    file.contexts.remove(name);
    if file.current.as_deref() == Some(name) {
        file.current = None;
    }
    file.save()?;
    output::line(&format!(
        "{name} is forgotten here; its token is still taken by the server"
    ));
    Ok(Code::Success)
}

fn shown(server: &str) -> String {
    daybook_events::without_credentials(server)
}

/// What tells servers apart: `daybook.example`, and `127.0.0.1:7070` where the port is not its
/// scheme's own.
fn host_and_port(server: &str) -> String {
    let Ok(url) = url::Url::parse(server) else {
        return "default".to_owned();
    };
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => "default".to_owned(),
    }
}

/// Grants in words: `deployer in shop; viewer everywhere`.
pub fn grants(grants: &Value) -> String {
    let one = |grant: &Value| {
        let role = grant["role"].as_str().unwrap_or_default();
        match grant["projects"]["named"].as_array() {
            Some(names) => {
                let names: Vec<_> = names.iter().filter_map(Value::as_str).collect();
                format!("{role} in {}", names.join(", "))
            }
            None => format!("{role} everywhere"),
        }
    };
    let all: Vec<_> = grants.as_array().into_iter().flatten().map(one).collect();
    all.join("; ")
}
