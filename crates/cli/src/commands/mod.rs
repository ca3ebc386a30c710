//! The commands. Help lives on the argument structs; each function calls the library or the
//! server, and prints what came of it.

mod approvals;
mod audit;
mod config;
mod demo;
mod deploy;
mod deploy_folder;
mod doctor;
mod domain;
mod dora;
mod events;
mod freeze;
mod gitops;
mod gitops_key;
mod history;
mod hook;
mod ledger;
mod lifecycle;
mod login;
mod logs;
mod manage;
mod records;
mod repair;
mod replay;
mod routes;
mod schema;
mod secret;
mod serve;
mod status;
mod template;
mod token;
mod up;
mod watch;
mod webhook;

pub use events::print as print_event;
pub use ledger::unusable as keys_unusable;

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::exit::{Code, Failure};
use crate::output::Format;

/// What a command comes to.
pub type Outcome = Result<Code, Failure>;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed, or the server does not let one in
  2  the command line is wrong
  3  the server cannot be reached
  4  there is no such project, service, environment or deployment
  5  not possible now, with the reason and the way out
  6  the deployment failed
  7  the deployment was cancelled or superseded
  8  the ledger and what was derived from it differ
  9  the deployment runs in some of its clusters only";

/// Daybook: the event-sourced deployment ledger for Kubernetes.
///
/// Every phase change, GitOps commit and route switch of a deployment is an event in an
/// append-only ledger; everything else is derived from it.
#[derive(Debug, Parser)]
#[command(name = "daybook", version, after_help = EXIT_CODES, propagate_version = true, disable_help_subcommand = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of all commands.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// How to print: tables and sentences, or JSON.
    #[arg(
        long,
        short,
        global = true,
        value_enum,
        default_value_t,
        env = "DAYBOOK_OUTPUT"
    )]
    pub output: Format,
    /// Say more about what the program does; twice for more.
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Write the program's own log as JSON lines.
    #[arg(long, global = true, env = "DAYBOOK_LOG_JSON")]
    pub log_json: bool,
}

/// Which server a command talks to.
#[derive(Debug, Clone, Args)]
pub struct ServerArgs {
    // The environment is read where the server is found: a flag goes before all of it, and clap would
    // take it for a flag.
    /// The server, in place of the one of DAYBOOK_URL.
    #[arg(long, value_name = "URL")]
    pub server: Option<String>,
    /// One of the servers that `daybook login` has kept, with its token, in place of the one of
    /// DAYBOOK_CONTEXT; the current one if no server is named either, and http://127.0.0.1:7070 if
    /// there is none.
    #[arg(long, value_name = "NAME", conflicts_with = "server")]
    pub context: Option<String>,
    /// A file with the token to be shown to the server, in place of DAYBOOK_TOKEN, of the file of
    /// DAYBOOK_TOKEN_FILE and of the one that is kept.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<std::path::PathBuf>,
    /// Let the token go to a server on another machine in the clear: over http.
    #[arg(long, env = "DAYBOOK_INSECURE")]
    pub insecure: bool,
    /// Who you are, for the ledger of a server that asks for no token: an account name.
    #[arg(long, env = "DAYBOOK_ACTOR", value_name = "NAME")]
    pub actor: Option<String>,
}

impl ServerArgs {
    /// Of this very server.
    pub fn of(server: String, actor: Option<String>) -> Self {
        Self {
            server: Some(server),
            context: None,
            token_file: None,
            insecure: false,
            actor,
        }
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the whole job on a real repository, in a folder of its own, in under a minute.
    Demo(demo::DemoArgs),
    /// Run everything in one process.
    Up(up::UpArgs),
    /// Run some roles in this process, against NATS.
    Serve(serve::ServeArgs),
    /// Keep a token for a server.
    Login(login::LoginArgs),
    /// Forget a server and its token.
    Logout(login::LogoutArgs),
    /// Who the server takes one for, and what one may do there.
    Whoami(login::WhoAmIArgs),
    /// The servers that one talks to.
    #[command(subcommand)]
    Context(login::ContextCommand),
    /// Say who may use the server, and what for.
    #[command(subcommand)]
    Token(token::TokenCommand),
    /// Create and list projects.
    #[command(subcommand)]
    Project(manage::ProjectCommand),
    /// Define and list the services of a project.
    #[command(subcommand)]
    Service(manage::ServiceCommand),
    /// Create and list the environments of a project.
    #[command(subcommand, alias = "environment")]
    Env(manage::EnvCommand),
    /// Let GitHub, GitLab or Gitea tell of pushes and pull requests.
    #[command(subcommand)]
    Hook(hook::HookCommand),
    /// Send events to others: signed webhooks, with what was sent and what was set aside.
    #[command(subcommand)]
    Webhook(webhook::WebhookCommand),
    /// Set and take away secret variables, without ever showing them.
    #[command(subcommand)]
    Secret(secret::SecretCommand),
    /// Deploy a git ref or an image, and follow it until it is live.
    Deploy(deploy::DeployArgs),
    /// Deploy to one environment what runs in another.
    Promote(deploy::PromoteArgs),
    /// Look at plans that wait to be allowed, and decide about them.
    #[command(subcommand)]
    Approvals(approvals::ApprovalsCommand),
    /// Make services from a catalogue.
    #[command(subcommand)]
    Template(template::TemplateCommand),
    /// Say when nothing new is brought to an environment.
    #[command(subcommand)]
    Freeze(freeze::FreezeCommand),
    /// What runs where, with the three readiness answers.
    Status(status::StatusArgs),
    /// What was deployed when, by whom, and what became of it.
    History(history::HistoryArgs),
    /// How often, how fast and how well is delivered: the four measures of DORA.
    Dora(dora::DoraArgs),
    /// Output of a build and of running instances.
    Logs(logs::LogsArgs),
    /// The events of the ledger, as they are or as they come.
    Events(events::EventsArgs),
    /// Give a running deployment the traffic of its service.
    #[command(alias = "mark_main")]
    MarkMain(lifecycle::MarkMainArgs),
    /// Go back to the main deployment before, or to another one.
    Rollback(lifecycle::RollbackArgs),
    /// Look at the route table, share traffic between deployments, choose between clusters.
    #[command(subcommand)]
    Routes(routes::RoutesCommand),
    /// Run another number of instances of a service.
    Scale(config::ScaleArgs),
    /// Change the environment variables of a service instance.
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Bring hostnames of your own along.
    #[command(subcommand)]
    Domain(domain::DomainCommand),
    /// Scale a deployment to zero; it can be started again.
    Stop(lifecycle::OperationArgs),
    /// Start a stopped deployment.
    Start(lifecycle::OperationArgs),
    /// Keep a deployment running whose stop is scheduled.
    Keep(lifecycle::KeepArgs),
    /// Try again in the clusters where a deployment has failed.
    Retry(lifecycle::RetryArgs),
    /// Remove a stopped deployment for good.
    Terminate(lifecycle::OperationArgs),
    /// Cancel a deployment that is not live yet.
    Cancel(lifecycle::OperationArgs),
    /// Put away the record of a deployment that is gone.
    Delete(lifecycle::OperationArgs),
    /// Deploy again what an older deployment was made from.
    Redeploy(lifecycle::RedeployArgs),
    /// Print the ledger, fold it anew, and compare with what the server says.
    Replay(replay::ReplayArgs),
    /// Check the ledger without trusting who keeps it. See docs/auditing.md.
    #[command(subcommand)]
    Audit(audit::AuditCommand),
    /// Look for what is wrong, and say what helps.
    Doctor(doctor::DoctorArgs),
    /// Look after the projections.
    #[command(subcommand)]
    Projections(replay::ProjectionsCommand),
    /// Look after the ledger itself.
    #[command(subcommand)]
    Ledger(ledger::LedgerCommand),
    /// Look after the keys that the ledger and GitOps commits are signed with.
    #[command(subcommand)]
    Keys(ledger::KeysCommand),
    /// Look at a GitOps repository, and decide about commits that Daybook did not make.
    #[command(subcommand)]
    Gitops(gitops::GitopsCommand),
    /// Print the JSON Schemas of events, and the OpenAPI document.
    Schema(schema::SchemaArgs),
    /// Print a completion script for a shell.
    Completion {
        /// The shell.
        shell: Shell,
    },
    /// Write the manual pages, one for each command.
    Man {
        /// The folder: /usr/local/share/man/man1, say. It is made if it is not there.
        #[arg(value_name = "FOLDER")]
        folder: PathBuf,
    },
    /// Serve a folder of static files on $PORT: what runs images of static sites.
    #[command(hide = true)]
    StaticServer(up::StaticServerArgs),
}

/// Runs a command.
pub async fn run(cli: Cli) -> Outcome {
    match cli.command {
        Command::Demo(args) => Box::pin(demo::run(args)).await,
        Command::Up(args) => Box::pin(up::run(args)).await,
        Command::Serve(args) => Box::pin(serve::run(args)).await,
        Command::Login(args) => login::login(args).await,
        Command::Logout(args) => login::logout(args),
        Command::Whoami(args) => login::whoami(args).await,
        Command::Context(command) => login::context(command),
        Command::Token(command) => token::run(command).await,
        Command::Project(command) => manage::project(command).await,
        Command::Service(command) => manage::service(command).await,
        Command::Env(command) => manage::environment(command).await,
        Command::Hook(command) => hook::run(command).await,
        Command::Webhook(command) => webhook::run(command).await,
        Command::Secret(command) => secret::run(command).await,
        Command::Deploy(args) => deploy::run(args).await,
        Command::Promote(args) => deploy::promote(args).await,
        Command::Approvals(command) => approvals::run(command).await,
        Command::Template(command) => template::run(command).await,
        Command::Freeze(command) => freeze::run(command).await,
        Command::Status(args) => status::run(args).await,
        Command::History(args) => history::run(args).await,
        Command::Dora(args) => dora::run(args).await,
        Command::Logs(args) => logs::run(args).await,
        Command::Events(args) => events::run(args).await,
        Command::MarkMain(args) => lifecycle::mark_main(args).await,
        Command::Rollback(args) => lifecycle::rollback(args).await,
        Command::Routes(command) => routes::run(command).await,
        Command::Scale(args) => config::scale(args).await,
        Command::Config(command) => config::run(command).await,
        Command::Domain(command) => domain::run(command).await,
        Command::Stop(args) => lifecycle::operate("stop", args).await,
        Command::Start(args) => lifecycle::operate("start", args).await,
        Command::Keep(args) => lifecycle::keep(args).await,
        Command::Retry(args) => lifecycle::retry(args).await,
        Command::Terminate(args) => lifecycle::operate("terminate", args).await,
        Command::Cancel(args) => lifecycle::operate("cancel", args).await,
        Command::Delete(args) => lifecycle::delete(args).await,
        Command::Redeploy(args) => lifecycle::redeploy(args).await,
        Command::Replay(args) => replay::run(args).await,
        Command::Audit(command) => audit::run(command).await,
        Command::Doctor(args) => doctor::run(args).await,
        Command::Projections(command) => replay::projections(command).await,
        Command::Ledger(command) => ledger::run(command).await,
        Command::Keys(command) => ledger::keys(command),
        Command::Gitops(command) => gitops::run(command).await,
        Command::Schema(args) => schema::run(args),
        Command::Completion { shell } => {
            clap_complete::generate(
                shell,
                &mut Cli::command(),
                "daybook",
                &mut std::io::stdout(),
            );
            Ok(Code::Success)
        }
        Command::Man { folder } => {
            let written = std::fs::create_dir_all(&folder)
                .and_then(|()| clap_mangen::generate_to(Cli::command(), &folder));
            written.map_err(|e| {
                let message = format!("{} cannot be written: {e}", folder.display());
                Failure::new(Code::Failure, "not_written", message)
            })?;
            Ok(Code::Success)
        }
        Command::StaticServer(args) => up::static_server(args).await,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The commands that the documentation shows, as a shell would split them.
    fn shown(text: &str) -> Vec<Vec<String>> {
        text.replace("\\\n", " ")
            .lines()
            .map(str::trim)
            .filter_map(|line| line.strip_prefix("$ "))
            .filter(|line| line.starts_with("daybook "))
            .map(|line| {
                let line = line.split([';', '|', '<', '>', '&']).next().unwrap();
                shlex::split(line).unwrap_or_else(|| panic!("quotes do not match: {line}"))
            })
            .collect()
    }

    #[test]
    fn commands_in_the_documentation_are_commands() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../");
        let mut files = vec![format!("{root}README.md")];
        for entry in std::fs::read_dir(format!("{root}docs")).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "md") {
                files.push(path.to_str().unwrap().to_owned());
            }
        }
        let mut count = 0;
        for file in files {
            for mut words in shown(&std::fs::read_to_string(&file).unwrap()) {
                // The text around it sets the variable.
                if words[1] == "serve" && !words.iter().any(|w| w == "--nats") {
                    words.extend(["--nats".to_owned(), "nats://127.0.0.1:4222".to_owned()]);
                }
                if let Err(error) = Cli::try_parse_from(&words) {
                    panic!("{file}: {}\n{error}", words.join(" "));
                }
                count += 1;
            }
        }
        assert!(count > 10, "only {count} commands were found");
    }
}
