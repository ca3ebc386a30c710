//! `daybook hook`

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use daybook_secrets::SecretValue;
use reqwest::Method;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::manage::{list, segment, text};
use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::confirm::confirm;
use crate::exit::{Code, Failure};
use crate::output;

/// Let the provider of a source repository tell of pushes and pull requests.
///
/// Each pull request gets an environment of its own, `pr-N`, for as long as it is open. See
/// docs/previews.md.
#[derive(Debug, Subcommand)]
pub enum HookCommand {
    /// Add a webhook, and print its address and its secret, which nobody can look up later.
    Add(AddArgs),
    /// Give a webhook a new secret, and print it. The one before is void at once.
    Rotate {
        #[command(flatten)]
        hook: HookArgs,
        #[command(flatten)]
        secret: SecretFile,
    },
    /// Remove a webhook. Environments of pull requests stay.
    Remove {
        #[command(flatten)]
        hook: HookArgs,
        /// Do not ask.
        #[arg(long, short)]
        yes: bool,
    },
    /// List the webhooks of a project.
    List {
        #[command(flatten)]
        server: ServerArgs,
        /// The project.
        project: String,
    },
}

/// Who calls a webhook.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Provider {
    /// GitHub, in the cloud or of one's own.
    Github,
    /// GitLab, in the cloud or of one's own.
    Gitlab,
    /// Gitea and Forgejo.
    #[value(alias = "forgejo")]
    Gitea,
}

impl Provider {
    fn as_str(self) -> &'static str {
        match self {
            Self::Github => "github",
            Self::Gitlab => "gitlab",
            Self::Gitea => "gitea",
        }
    }
}

/// A new webhook.
#[derive(Debug, Args)]
pub struct AddArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The project.
    project: String,
    /// Who calls it.
    #[arg(long, value_enum)]
    provider: Provider,
    /// Its name; that of the provider if not given.
    #[arg(long)]
    name: Option<String>,
    /// The environment that those of pull requests are made from: whatever takes the traffic there
    /// is promoted into them, but for the services that the pull request changes. Empty ones if
    /// not given.
    #[arg(long, value_name = "ENVIRONMENT")]
    base: Option<String>,
    /// What the names of those environments begin with.
    #[arg(long, default_value = "pr")]
    prefix: String,
    /// Pull requests from other repositories get one too: their code is built and run here.
    #[arg(long)]
    forks: bool,
    #[command(flatten)]
    secret: SecretFile,
}

/// Which webhook.
#[derive(Debug, Args)]
pub struct HookArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The project.
    project: String,
    /// Its name.
    name: String,
}

/// Where the secret comes from: never an argument, which every process of the machine can see.
#[derive(Debug, Args)]
pub struct SecretFile {
    /// Take the secret from this file in place of a new random one. One line break at its end is
    /// no part of it.
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
}

impl SecretFile {
    fn read(&self) -> Result<Zeroizing<String>, Failure> {
        let Some(file) = &self.secret_file else {
            return random();
        };
        let read = std::fs::read_to_string(file).map_err(|e| {
            Failure::new(
                Code::Usage,
                "file_unreadable",
                format!("{} cannot be read: {e}", file.display()),
            )
        })?;
        let read = Zeroizing::new(read);
        let line = read.strip_suffix('\n').unwrap_or(&read);
        Ok(Zeroizing::new(
            line.strip_suffix('\r').unwrap_or(line).to_owned(),
        ))
    }
}

/// A secret in the form of the Standard Webhooks specification, which all providers take.
fn random() -> Result<Zeroizing<String>, Failure> {
    let key = SecretValue::new_key().map_err(|e| {
        Failure::new(
            Code::Failure,
            "no_random_numbers",
            format!("the system gives no random numbers: {e}"),
        )
    })?;
    Ok(Zeroizing::new(key.expose().to_owned()))
}

fn path(project: &str, name: &str) -> Result<String, Failure> {
    let (project, name) = (segment(project)?, segment(name)?);
    Ok(format!("/api/v1/projects/{project}/hooks/{name}"))
}

pub async fn run(command: HookCommand) -> Outcome {
    match command {
        HookCommand::Add(args) => add(args).await,
        HookCommand::Rotate { hook, secret } => rotate(hook, secret).await,
        HookCommand::Remove { hook, yes } => remove(hook, yes).await,
        HookCommand::List { server, project } => {
            let path = format!("/api/v1/projects/{}/hooks", segment(&project)?);
            list(
                &server,
                &path,
                "hooks",
                ["NAME", "PROVIDER", "BASE", "PREFIX", "FORKS", "PATH"],
                |h| {
                    vec![
                        text(h, "name"),
                        text(h, "provider"),
                        text(h, "base"),
                        text(h, "prefix"),
                        text(h, "forks"),
                        text(h, "path"),
                    ]
                },
            )
            .await
        }
    }
}

async fn add(args: AddArgs) -> Outcome {
    let name = args.name.as_deref().unwrap_or(args.provider.as_str());
    let client = Client::new(&args.server)?;
    let all = format!("/api/v1/projects/{}/hooks", segment(&args.project)?);
    if find(&client, &all, name).await?.is_some() {
        return Err(Failure::new(
            Code::Refused,
            "hook_exists",
            format!("the project {} has a webhook {name} already", args.project),
        )
        .hint("choose another --name, or give it a new secret with `daybook hook rotate`"));
    }
    let secret = args.secret.read()?;
    let body = json!({
        "provider": args.provider.as_str(),
        "secret": secret.as_str(),
        "base": args.base,
        "prefix": args.prefix,
        "forks": args.forks,
    });
    let path = path(&args.project, name)?;
    let answer: Value = client.command(Method::PUT, &path, &body, None).await?;
    made(
        "added",
        &client,
        &answer,
        args.secret.secret_file.is_none().then_some(&secret),
    )
}

async fn rotate(hook: HookArgs, secret: SecretFile) -> Outcome {
    let client = Client::new(&hook.server)?;
    let all = format!("/api/v1/projects/{}/hooks", segment(&hook.project)?);
    let Some(known) = find(&client, &all, &hook.name).await? else {
        return Err(Failure::new(
            Code::NotFound,
            "hook_not_found",
            format!("the project {} has no webhook {}", hook.project, hook.name),
        )
        .hint("`daybook hook list` shows all of a project"));
    };
    let new = secret.read()?;
    let body = json!({
        "provider": known["provider"],
        "secret": new.as_str(),
        "base": known["base"],
        "prefix": known["prefix"],
        "forks": known["forks"],
    });
    let path = path(&hook.project, &hook.name)?;
    let answer: Value = client.command(Method::PUT, &path, &body, None).await?;
    made(
        "rotated",
        &client,
        &answer,
        secret.secret_file.is_none().then_some(&new),
    )
}

async fn find(client: &Client, path: &str, name: &str) -> Result<Option<Value>, Failure> {
    let answer: Value = client.get(path, &[]).await?;
    let hooks = answer["hooks"].as_array().cloned().unwrap_or_default();
    Ok(hooks.into_iter().find(|h| h["name"] == name))
}

/// Prints a webhook, with its secret if it was made here.
fn made(word: &str, client: &Client, hook: &Value, secret: Option<&Zeroizing<String>>) -> Outcome {
    let url = format!("{}{}", client.shown(), text(hook, "path"));
    if output::is_json() {
        let mut all = hook.clone();
        all["url"] = url.into();
        if let Some(secret) = secret {
            all["secret"] = secret.as_str().into();
        }
        output::json(&all);
        return Ok(Code::Success);
    }
    let style = output::style();
    output::line(&format!(
        "{} webhook {} of project {}",
        style.good(word),
        text(hook, "name"),
        text(hook, "project")
    ));
    output::line(&format!("  URL           {url}"));
    if let Some(secret) = secret {
        output::line(&format!("  secret        {}", secret.as_str()));
        output::line("  the secret is shown this once");
    }
    let (events, content) = match hook["provider"].as_str() {
        Some("gitlab") => ("Push events, Merge request events", "always JSON"),
        _ => ("Pushes, Pull requests", "application/json"),
    };
    output::line(&format!("  events        {events}"));
    output::line(&format!("  content type  {content}"));
    Ok(Code::Success)
}

async fn remove(hook: HookArgs, yes: bool) -> Outcome {
    let path = path(&hook.project, &hook.name)?;
    if !yes {
        let what = format!("the webhook {} of {} is removed", hook.name, hook.project);
        confirm(&what, &hook.name)?;
    }
    let answer: Value = Client::new(&hook.server)?
        .command(Method::DELETE, &path, &json!({}), None)
        .await?;
    if output::is_json() {
        output::json(&answer);
    } else {
        let style = output::style();
        output::line(&format!(
            "{} webhook {} of project {}; its secret is erased",
            style.dim("removed"),
            hook.name,
            hook.project
        ));
    }
    Ok(Code::Success)
}
