//! `daybook token`: who may use a server, and what for.

use clap::{Args, Subcommand};
use daybook_events::ProjectName;
use daybook_events::access::{Grant, Projects, Role};
use daybook_events::timer::KeepFor;
use jiff::Timestamp;
use reqwest::Method;
use serde_json::{Value, json};

use super::login::grants;
use super::manage::segment;
use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// Make tokens for people and programs, and take them back.
///
/// The server keeps a digest of a token's secret: what `create` and `rotate` print is printed once.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token.
    Create(CreateArgs),
    /// The tokens that there are, without their secrets.
    List {
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Give a token another secret.
    Rotate(RotateArgs),
    /// Take a token no longer: what it has open ends within a second.
    Revoke {
        #[command(flatten)]
        server: ServerArgs,
        /// The token: its name or its id.
        token: String,
        /// Why, for the ledger.
        #[arg(long)]
        reason: Option<String>,
    },
}

/// A token.
#[derive(Debug, Args)]
pub struct CreateArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// What it is called, such as `ci`.
    name: String,
    /// What it may do; may be given several times.
    #[arg(long = "role", required = true, value_name = "ROLE", value_parser = role)]
    roles: Vec<Role>,
    /// A project that the roles hold in; may be given several times. They hold everywhere without.
    #[arg(long = "project", value_name = "PROJECT")]
    projects: Vec<ProjectName>,
    /// Who acts with it, as the ledger says it; its name if not given.
    #[arg(long, value_name = "NAME")]
    account: Option<String>,
    /// How long it is taken: 24h, 90d, or `never` to end it.
    #[arg(long, default_value = "90d", value_name = "TIME")]
    expires: KeepFor,
}

/// Another secret.
#[derive(Debug, Args)]
pub struct RotateArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The token: its name or its id.
    token: String,
    /// How long the secret before is taken too: 10m, 24h. Not at all if not given.
    #[arg(long, value_name = "TIME")]
    overlap: Option<KeepFor>,
    /// How long the token is taken from now on: 24h, 90d, or `never` to end it; until when it was, if
    /// not given.
    #[arg(long, value_name = "TIME")]
    expires: Option<KeepFor>,
}

fn role(text: &str) -> Result<Role, String> {
    text.parse::<Role>().map_err(|e| e.remedy)
}

pub async fn run(command: TokenCommand) -> Outcome {
    match command {
        TokenCommand::Create(args) => create(args).await,
        TokenCommand::List { server } => list(&server).await,
        TokenCommand::Rotate(args) => rotate(args).await,
        TokenCommand::Revoke {
            server,
            token,
            reason,
        } => revoke(&server, &token, reason).await,
    }
}

async fn create(args: CreateArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let projects = match args.projects.is_empty() {
        true => Projects::All,
        false => Projects::Named(args.projects.into_iter().collect()),
    };
    let grants: Vec<_> = args
        .roles
        .into_iter()
        .map(|role| Grant {
            role,
            projects: projects.clone(),
        })
        .collect();
    let body = json!({
        "name": args.name,
        "account": args.account,
        "grants": grants,
        "expires_at": end(args.expires)?,
    });
    let made = client.post("/api/v1/tokens", &body).await?;
    show(&made)
}

async fn rotate(args: RotateArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let id = id_of(&client, &args.token).await?;
    let overlap = match args.overlap {
        None => 0,
        Some(time) => time.duration().map(|d| d.as_secs()).ok_or_else(|| {
            Failure::new(
                Code::Usage,
                "overlap_too_long",
                "the secret before has to end",
            )
            .hint("give a time, such as 10m or 24h")
        })?,
    };
    let body = json!({
        "overlap_seconds": overlap,
        // What is not given stays as it is.
        "expires_at": match args.expires.map(end).transpose()? {
            None => Value::Null,
            Some(None) => json!("never"),
            Some(Some(end)) => json!(end),
        },
    });
    let made = client
        .post(&format!("/api/v1/tokens/{id}/rotate"), &body)
        .await?;
    show(&made)
}

async fn revoke(server: &ServerArgs, token: &str, reason: Option<String>) -> Outcome {
    let client = Client::new(server)?;
    let id = id_of(&client, token).await?;
    let query = match reason {
        Some(reason) => {
            let query: String = url::form_urlencoded::Serializer::new(String::new())
                .append_pair("reason", &reason)
                .finish();
            format!("?{query}")
        }
        None => String::new(),
    };
    let path = format!("/api/v1/tokens/{id}{query}");
    let gone: Value = client
        .command(Method::DELETE, &path, &json!({}), None)
        .await?;
    if output::is_json() {
        output::json(&gone);
    } else {
        output::line(&format!("{} {token}", output::style().good("revoked")));
    }
    Ok(Code::Success)
}

async fn list(server: &ServerArgs) -> Outcome {
    let client = Client::new(server)?;
    let answer: Value = client.get("/api/v1/tokens", &[]).await?;
    if output::is_json() {
        output::json(&answer);
        return Ok(Code::Success);
    }
    let mut table = Table::new(["NAME", "ID", "ACCOUNT", "MAY", "STATUS", "UNTIL"]);
    for token in answer["tokens"].as_array().into_iter().flatten() {
        let text = |key: &str| token[key].as_str().unwrap_or("never").to_owned();
        table.row(Row::new([
            text("name"),
            text("id"),
            text("account"),
            grants(&token["grants"]),
            text("status"),
            text("expires_at"),
        ]));
    }
    table.print();
    Ok(Code::Success)
}

fn show(made: &Value) -> Outcome {
    if output::is_json() {
        output::json(made);
        return Ok(Code::Success);
    }
    output::line(made["token"].as_str().unwrap_or_default());
    eprintln!("this is the only time that it is shown; `daybook login` keeps it");
    Ok(Code::Success)
}

/// The id of a token that a person names.
async fn id_of(client: &Client, named: &str) -> Result<String, Failure> {
    let answer: Value = client.get("/api/v1/tokens", &[]).await?;
    let tokens = answer["tokens"].as_array().into_iter().flatten();
    let mut fitting: Vec<_> = tokens
        .filter(|t| t["id"] == named || (t["name"] == named && t["status"] != "revoked"))
        .filter_map(|t| t["id"].as_str())
        .collect();
    match fitting.pop() {
        Some(id) => segment(id).map(str::to_owned),
        None => Err(Failure::new(
            Code::NotFound,
            "token_not_found",
            format!("there is no token {named}"),
        )
        .hint("`daybook token list` shows the tokens")),
    }
}

fn end(time: KeepFor) -> Result<Option<Timestamp>, Failure> {
    let Some(time) = time.duration() else {
        return Ok(None);
    };
    let end = Timestamp::now().checked_add(time);
    end.map(Some).map_err(|_| {
        Failure::new(
            Code::Usage,
            "expiry_too_far",
            "the token would end too far in the future",
        )
        .hint("give a shorter time, or `never`")
    })
}
