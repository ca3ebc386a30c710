//! `daybook project|service|env`

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use daybook_events::timer::KeepFor;
use daybook_events::without_credentials;
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::confirm::confirm;
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// Create and list projects.
#[derive(Debug, Subcommand)]
pub enum ProjectCommand {
    /// Create a project.
    Create {
        #[command(flatten)]
        server: ServerArgs,
        /// Its name: lowercase letters, digits and hyphens, at most 30.
        name: String,
        /// What it is.
        #[arg(long)]
        description: Option<String>,
        /// Where the commits of its GitOps repository are pushed: an https or ssh URL without a
        /// credential. `daybook gitops remote` changes it later.
        #[arg(long, value_name = "URL")]
        gitops_remote: Option<String>,
    },
    /// List all projects.
    List {
        #[command(flatten)]
        server: ServerArgs,
    },
}

/// Define and list the services of a project.
#[derive(Debug, Subcommand)]
pub enum ServiceCommand {
    /// Define a service, or define it anew.
    Create(Box<ServiceArgs>),
    /// List the services of a project.
    List {
        #[command(flatten)]
        server: ServerArgs,
        /// The project.
        project: String,
    },
}

/// How an image is made.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Builder {
    /// Dockerfile if there is one and a tool for it, else archive.
    Auto,
    /// Built in: the source as layers on a base image, or on none.
    Archive,
    /// A Dockerfile, with buildah, podman or docker.
    Dockerfile,
}

/// A service's definition.
#[derive(Debug, Args)]
pub struct ServiceArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The project.
    project: String,
    /// Name of the service.
    name: String,
    /// The source repository: an https or ssh URL, or a folder on the server's machine.
    #[arg(long, value_name = "URL")]
    repo: Option<String>,
    /// What is deployed when no ref is named.
    #[arg(long = "ref", value_name = "REF", requires = "repo")]
    git_ref: Option<String>,
    /// Folder of the service within the repository.
    #[arg(long, requires = "repo")]
    path: Option<String>,
    /// Where its images are kept, if not in the server's default place.
    #[arg(long, value_name = "REPOSITORY")]
    image_repository: Option<String>,
    /// The builder.
    #[arg(long, value_enum)]
    builder: Option<Builder>,
    /// The image that the archive builder puts its layers on.
    #[arg(long, value_name = "IMAGE")]
    base_image: Option<String>,
    /// Path of the Dockerfile within the service's folder.
    #[arg(long)]
    dockerfile: Option<String>,
    /// The port that it listens on in a container.
    #[arg(long)]
    port: Option<u16>,
    /// An environment variable; may be given several times.
    #[arg(long = "env", value_name = "KEY=VALUE")]
    variables: Vec<String>,
    /// A folder that is kept from one deployment to the next, and how large a cluster makes it:
    /// `data=/data`, `data=/data:5Gi`; may be given several times.
    #[arg(long = "volume", value_name = "NAME=PATH[:SIZE]")]
    volumes: Vec<String>,
    /// Instances in each cluster; with `--max-replicas` at least.
    #[arg(long)]
    replicas: Option<u32>,
    /// The most instances in each cluster: they come and go by their use of cpu. Kubernetes sees to
    /// it; local clusters do not.
    #[arg(long, value_name = "NUMBER")]
    max_replicas: Option<u32>,
    /// The use of cpu that is aimed for, in percent of what instances request.
    #[arg(long, value_name = "PERCENT")]
    cpu_target: Option<u32>,
    #[command(flatten)]
    resources: ResourceArgs,
    /// The HTTP path that answers when an instance is ready; empty for a TCP connection.
    #[arg(long, value_name = "PATH")]
    health_path: Option<String>,
    /// How long an instance may take to become ready.
    #[arg(long, value_name = "SECONDS")]
    health_deadline: Option<u32>,
    /// The whole definition as a JSON file; flags win over it.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The command, if not the image's own.
    #[arg(last = true)]
    command: Vec<String>,
}

/// What each instance is given of cpu and memory. Kubernetes sees to it; local clusters do not.
#[derive(Debug, Default, Args)]
pub struct ResourceArgs {
    /// The cpu that a node keeps for each instance, in cores: 250m is a quarter of one.
    #[arg(long, value_name = "CORES")]
    cpu: Option<String>,
    /// The most cpu that an instance gets.
    #[arg(long, value_name = "CORES")]
    cpu_limit: Option<String>,
    /// The memory that a node keeps for each instance: 256Mi.
    #[arg(long, value_name = "BYTES")]
    memory: Option<String>,
    /// The most memory that an instance gets; one that takes more is ended and started again.
    #[arg(long, value_name = "BYTES")]
    memory_limit: Option<String>,
}

impl ResourceArgs {
    /// What is given, by its place in `run.resources`.
    pub fn given(self) -> impl Iterator<Item = ([&'static str; 2], String)> {
        [
            (["requests", "cpu"], self.cpu),
            (["limits", "cpu"], self.cpu_limit),
            (["requests", "memory"], self.memory),
            (["limits", "memory"], self.memory_limit),
        ]
        .into_iter()
        .filter_map(|(place, amount)| Some((place, amount?)))
    }
}

/// Create and list the environments of a project.
#[derive(Debug, Subcommand)]
pub enum EnvCommand {
    /// Create an environment.
    Create {
        #[command(flatten)]
        server: ServerArgs,
        /// The project.
        project: String,
        /// Its name.
        name: String,
        /// A cluster that deployments go to; may be given several times. All clusters that the
        /// server knows if none is given.
        #[arg(long = "cluster", value_name = "NAME")]
        clusters: Vec<String>,
        /// Its services answer on the project's live hostnames. So it is for `production`.
        #[arg(long)]
        live: bool,
        /// New deployments run beside the main one until `daybook mark-main`.
        #[arg(long)]
        manual_switch: bool,
        /// An environment to make it from: whatever takes the traffic there is promoted.
        #[arg(long, value_name = "ENVIRONMENT")]
        from: Option<String>,
        /// The branch whose pushes are deployed to it by themselves: `daybook hook add` lets them
        /// be known.
        #[arg(long, value_name = "BRANCH")]
        auto_deploy: Option<String>,
        #[command(flatten)]
        rules: Box<EnvRules>,
    },
    /// Deploy pushes to a branch by themselves from now on, or no longer.
    AutoDeploy {
        #[command(flatten)]
        server: ServerArgs,
        /// The project.
        project: String,
        /// The environment.
        name: String,
        /// The branch.
        #[arg(required_unless_present = "off")]
        branch: Option<String>,
        /// Deploy no pushes any more.
        #[arg(long, conflicts_with = "branch")]
        off: bool,
    },
    /// Change what an environment is. What is not named stays as it is.
    Set(Box<SetEnvArgs>),
    /// Delete an environment, with all that runs in it. Its history stays in the ledger.
    Delete(DeleteEnvArgs),
    /// List the environments of a project.
    List {
        #[command(flatten)]
        server: ServerArgs,
        /// The project.
        project: String,
    },
}

/// How an environment treats its deployments.
#[derive(Debug, Default, Args)]
pub struct EnvRules {
    /// How long a deployment is kept running that is no longer the main one: 45s, 30m, 24h, 7d or
    /// `never` to stop it; as the server says if never given.
    #[arg(long, value_name = "TIME")]
    keep_old: Option<KeepFor>,
    /// How long a deployment is kept running that nobody asks for through the gateway: 24h for
    /// previews, and `never` to stop it for all others, if never given.
    #[arg(long, value_name = "TIME")]
    keep_idle: Option<KeepFor>,
    /// How many people have to allow a plan before it is deployed; 0 for nobody.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=20))]
    approvals: Option<u32>,
    /// Who may allow it; may be given several times. Anybody but the requester and the author if
    /// nobody is named.
    #[arg(long = "approver", value_name = "NAME", requires = "approvals")]
    approvers: Vec<String>,
    /// How long a plan may wait to be allowed; 24h if not given.
    #[arg(long, value_name = "TIME", requires = "approvals")]
    approval_expires: Option<KeepFor>,
}

impl EnvRules {
    /// Writes what is given into a request.
    fn write(&self, body: &mut Value) {
        for (name, keep) in [("keep_old", self.keep_old), ("keep_idle", self.keep_idle)] {
            if let Some(keep) = keep {
                body[name] = keep.to_string().into();
            }
        }
        match self.approvals {
            None => {}
            Some(0) => body["approval"] = Value::Null,
            Some(required) => {
                let expires = self.approval_expires.unwrap_or(KeepFor::IDLE);
                body["approval"] = json!({
                    "required": required,
                    "approvers": self.approvers,
                    "expires": expires.to_string(),
                });
            }
        }
    }
}

/// What is to change about an environment.
#[derive(Debug, Args)]
pub struct SetEnvArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The project.
    project: String,
    /// Its name.
    name: String,
    /// The clusters that deployments go to, in place of those that it has; may be given several
    /// times.
    #[arg(long = "cluster", value_name = "NAME")]
    clusters: Vec<String>,
    /// Whether its services answer on the project's live hostnames.
    #[arg(long)]
    live: Option<bool>,
    /// Whether new deployments run beside the main one until `daybook mark-main`.
    #[arg(long)]
    manual_switch: Option<bool>,
    #[command(flatten)]
    rules: EnvRules,
}

/// An environment that is to go.
#[derive(Debug, Args)]
pub struct DeleteEnvArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The project.
    project: String,
    /// Its name.
    name: String,
    /// Why, for the ledger.
    #[arg(long)]
    reason: Option<String>,
    /// Do not ask.
    #[arg(long, short)]
    yes: bool,
    /// Return as soon as it is accepted.
    #[arg(long)]
    detach: bool,
}

/// How often it is asked whether an environment is gone.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// Prints what was made.
fn made(what: &str, answer: &Value) -> Outcome {
    if output::is_json() {
        output::json(answer);
    } else {
        output::line(&format!("{} {what}", output::style().good("created")));
    }
    Ok(Code::Success)
}

pub async fn project(command: ProjectCommand) -> Outcome {
    match command {
        ProjectCommand::Create {
            server,
            name,
            description,
            gitops_remote,
        } => {
            let body = json!({ "name": name, "description": description });
            let client = Client::new(&server)?;
            let mut answer = client.post("/api/v1/projects", &body).await?;
            if let Some(url) = &gitops_remote {
                answer = super::gitops::set_remote(&client, &name, Some(url)).await?;
            }
            made(&format!("project {name}"), &answer)
        }
        ProjectCommand::List { server } => {
            list(
                &server,
                "/api/v1/projects",
                "projects",
                ["NAME", "SERVICES", "DESCRIPTION"],
                |p| vec![text(p, "name"), join(p, "services"), text(p, "description")],
            )
            .await
        }
    }
}

pub async fn service(command: ServiceCommand) -> Outcome {
    match command {
        ServiceCommand::Create(args) => define(*args).await,
        ServiceCommand::List { server, project } => {
            let path = format!("/api/v1/projects/{}/services", segment(&project)?);
            list(
                &server,
                &path,
                "services",
                ["NAME", "SOURCE", "REF", "PORT", "REPLICAS"],
                |s| {
                    vec![
                        text(s, "name"),
                        text(s, "/source/url"),
                        text(s, "/source/default_ref"),
                        text(s, "/run/port"),
                        text(s, "/run/replicas"),
                    ]
                },
            )
            .await
        }
    }
}

async fn define(args: ServiceArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let mut spec: Map<String, Value> = match &args.file {
        Some(file) => {
            let bytes = std::fs::read(file).map_err(|e| {
                Failure::new(
                    Code::Usage,
                    "file_unreadable",
                    format!("{} cannot be read: {e}", file.display()),
                )
            })?;
            serde_json::from_slice(&bytes).map_err(|e| {
                Failure::new(
                    Code::Usage,
                    "file_invalid",
                    format!(
                        "{} is not a service definition in JSON: {e}",
                        file.display()
                    ),
                )
                .hint("`daybook schema service` prints its schema")
            })?
        }
        None => Map::new(),
    };
    let mut set = |path: &[&str], value: Option<Value>| {
        let Some(value) = value else { return };
        let mut at = &mut spec;
        for key in &path[..path.len() - 1] {
            let entry = at.entry(*key).or_insert_with(|| json!({}));
            if !entry.is_object() {
                *entry = json!({});
            }
            let Some(inner) = entry.as_object_mut() else {
                return;
            };
            at = inner;
        }
        at.insert(path[path.len() - 1].to_owned(), value);
    };
    set(
        &["source", "url"],
        args.repo.as_deref().map(absolute).map(Value::from),
    );
    set(&["source", "default_ref"], args.git_ref.map(Value::from));
    set(&["source", "path"], args.path.map(Value::from));
    set(
        &["image_repository"],
        args.image_repository.map(Value::from),
    );
    set(
        &["build", "builder"],
        args.builder.map(|b| {
            Value::from(match b {
                Builder::Auto => "auto",
                Builder::Archive => "archive",
                Builder::Dockerfile => "dockerfile",
            })
        }),
    );
    set(&["build", "base_image"], args.base_image.map(Value::from));
    set(&["build", "dockerfile"], args.dockerfile.map(Value::from));
    set(&["run", "port"], args.port.map(Value::from));
    set(&["run", "replicas"], args.replicas.map(Value::from));
    set(
        &["run", "autoscaling", "max"],
        args.max_replicas.map(Value::from),
    );
    set(
        &["run", "autoscaling", "cpu_percent"],
        args.cpu_target.map(Value::from),
    );
    for ([kind, what], amount) in args.resources.given() {
        set(&["run", "resources", kind, what], Some(amount.into()));
    }
    set(
        &["run", "health", "path"],
        args.health_path.map(Value::from),
    );
    set(
        &["run", "health", "deadline_seconds"],
        args.health_deadline.map(Value::from),
    );
    if !args.command.is_empty() {
        set(&["run", "command"], Some(args.command.into()));
    }
    for variable in &args.variables {
        let Some((key, value)) = variable.split_once('=') else {
            return Err(Failure::new(
                Code::Usage,
                "invalid_variable",
                format!("{:?} is not KEY=VALUE", without_credentials(variable)),
            ));
        };
        set(&["run", "env", key], Some(value.into()));
    }
    for volume in &args.volumes {
        let Some((name, place)) = volume.split_once('=') else {
            return Err(Failure::new(
                Code::Usage,
                "invalid_volume",
                format!("{volume:?} is not NAME=PATH or NAME=PATH:SIZE"),
            ));
        };
        let (path, size) = match place.split_once(':') {
            Some((path, size)) => (path, Some(size)),
            None => (place, None),
        };
        set(&["run", "volumes", name, "path"], Some(path.into()));
        set(&["run", "volumes", name, "size"], size.map(Value::from));
    }
    let path = format!(
        "/api/v1/projects/{}/services/{}",
        segment(&args.project)?,
        segment(&args.name)?
    );
    let answer: Value = client.command(Method::PUT, &path, &spec, None).await?;
    made(
        &format!("service {} of project {}", args.name, args.project),
        &answer,
    )
}

/// A relative path names something on this machine; the server needs it whole.
fn absolute(repo: &str) -> String {
    if repo.contains("://") {
        return repo.to_owned();
    }
    std::fs::canonicalize(repo).map_or_else(|_| repo.to_owned(), |p| p.display().to_string())
}

pub async fn environment(command: EnvCommand) -> Outcome {
    match command {
        EnvCommand::Create {
            server,
            project,
            name,
            clusters,
            live,
            manual_switch,
            from,
            rules,
            auto_deploy,
        } => {
            let path = format!("/api/v1/projects/{}/environments", segment(&project)?);
            let switch = if manual_switch { "manual" } else { "automatic" };
            let mut body = json!({
                "name": name,
                "live": live || name == "production",
                "switch": switch,
            });
            if !clusters.is_empty() {
                body["clusters"] = clusters.into();
            }
            if let Some(from) = from {
                body["from"] = from.into();
            }
            if let Some(branch) = auto_deploy {
                body["auto_deploy"] = branch.into();
            }
            rules.write(&mut body);
            let answer = Client::new(&server)?.post(&path, &body).await?;
            made(&format!("environment {name} of project {project}"), &answer)
        }
        EnvCommand::Set(args) => set_environment(*args).await,
        EnvCommand::AutoDeploy {
            server,
            project,
            name,
            branch,
            ..
        } => auto_deploy(&server, &project, &name, branch.as_deref()).await,
        EnvCommand::Delete(args) => delete_environment(args).await,
        EnvCommand::List { server, project } => {
            let path = format!("/api/v1/projects/{}/environments", segment(&project)?);
            list(
                &server,
                &path,
                "environments",
                [
                    "NAME",
                    "STATUS",
                    "CLUSTERS",
                    "LIVE",
                    "SWITCH",
                    "AUTO-DEPLOY",
                    "PULL REQUEST",
                    "FROZEN BY",
                    "URL",
                ],
                |e| {
                    vec![
                        text(e, "name"),
                        text(e, "status"),
                        join(e, "clusters"),
                        text(e, "live"),
                        text(e, "switch"),
                        text(e, "auto_deploy"),
                        pull_request(e),
                        frozen_by(e),
                        join(e, "urls"),
                    ]
                },
            )
            .await
        }
    }
}

/// The windows of an environment that are open.
fn frozen_by(environment: &Value) -> String {
    let freezes = environment["freezes"].as_array().into_iter().flatten();
    let open = freezes.filter(|f| f["open"] == true);
    let names: Vec<_> = open.map(|f| text(f, "name")).collect();
    names.join(", ")
}

async fn set_environment(args: SetEnvArgs) -> Outcome {
    let SetEnvArgs { project, name, .. } = &args;
    let path = format!(
        "/api/v1/projects/{}/environments/{}",
        segment(project)?,
        segment(name)?
    );
    let client = Client::new(&args.server)?;
    let mut spec = json!({});
    if !args.clusters.is_empty() {
        spec["clusters"] = args.clusters.clone().into();
    }
    if let Some(live) = args.live {
        spec["live"] = live.into();
    }
    if let Some(manual) = args.manual_switch {
        spec["switch"] = if manual { "manual" } else { "automatic" }.into();
    }
    args.rules.write(&mut spec);
    let answer: Value = client.command(Method::PATCH, &path, &spec, None).await?;
    if output::is_json() {
        output::json(&answer);
    } else {
        let changed = output::style().good("changed");
        output::line(&format!(
            "{changed} environment {name} of project {project}"
        ));
    }
    Ok(Code::Success)
}

async fn auto_deploy(
    server: &ServerArgs,
    project: &str,
    name: &str,
    branch: Option<&str>,
) -> Outcome {
    let path = format!(
        "/api/v1/projects/{}/environments/{}/auto-deploy",
        segment(project)?,
        segment(name)?
    );
    let body = json!({ "branch": branch });
    let answer: Value = Client::new(server)?
        .command(Method::PUT, &path, &body, None)
        .await?;
    if output::is_json() {
        output::json(&answer);
    } else {
        output::line(&match branch {
            Some(branch) => format!("pushes to {branch} are deployed to {name} of {project}"),
            None => format!("pushes are no longer deployed to {name} of {project}"),
        });
    }
    Ok(Code::Success)
}

async fn delete_environment(args: DeleteEnvArgs) -> Outcome {
    let DeleteEnvArgs { project, name, .. } = &args;
    let path = format!(
        "/api/v1/projects/{}/environments/{}",
        segment(project)?,
        segment(name)?
    );
    let client = Client::new(&args.server)?;
    if !args.yes {
        let what = format!("the environment {name} of {project} is deleted with all it runs");
        confirm(&what, name)?;
    }
    let body = json!({ "reason": args.reason });
    let answer: Value = client.command(Method::DELETE, &path, &body, None).await?;
    if !args.detach {
        loop {
            match client.get::<Value>(&path, &[]).await {
                Err(gone) if gone.kind == "environment_not_found" => break,
                Err(failure) => return Err(failure),
                Ok(_) => tokio::time::sleep(ASK_EVERY).await,
            }
        }
    }
    if output::is_json() {
        output::json(&answer);
    } else {
        let word = if args.detach { "deleting" } else { "deleted" };
        output::line(&format!(
            "{} environment {name} of project {project}; its history stays in the ledger",
            output::style().dim(word)
        ));
    }
    Ok(Code::Success)
}

/// `#142 a1b2c3d Show prices with tax`
fn pull_request(environment: &Value) -> String {
    let Some(about) = environment.get("pull_request") else {
        return String::new();
    };
    let head = text(about, "head");
    format!(
        "#{} {} {}",
        text(about, "number"),
        head.get(..7).unwrap_or(&head),
        text(about, "title")
    )
}

pub(super) async fn list<const N: usize>(
    server: &ServerArgs,
    path: &str,
    key: &str,
    headings: [&str; N],
    cells: impl Fn(&Value) -> Vec<String>,
) -> Outcome {
    let answer: Value = Client::new(server)?.get(path, &[]).await?;
    if output::is_json() {
        output::json(&answer);
        return Ok(Code::Success);
    }
    let rows = answer
        .get(key)
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    if rows.is_empty() {
        output::line(&format!("no {key}"));
        return Ok(Code::Success);
    }
    let mut table = Table::new(headings);
    for row in &rows {
        table.row(Row::new(cells(row)));
    }
    table.print();
    Ok(Code::Success)
}

pub(super) fn text(value: &Value, key: &str) -> String {
    let found = if key.starts_with('/') {
        value.pointer(key)
    } else {
        value.get(key)
    };
    match found {
        Some(Value::String(s)) => s.clone(),
        Some(Value::Null) | None => String::new(),
        Some(other) => other.to_string(),
    }
}

fn join(value: &Value, key: &str) -> String {
    let items = value.get(key).and_then(Value::as_array);
    let items: Vec<_> = items
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    items.join(", ")
}

/// A name as a part of a path. What is no name is refused here, before it can change the path.
pub fn segment(name: &str) -> Result<&str, Failure> {
    if name.is_empty()
        || name.contains(['/', '?', '#', '%', ' '])
        || name.chars().any(char::is_control)
    {
        return Err(Failure::new(
            Code::Usage,
            "invalid_name",
            format!("{:?} is not a name", without_credentials(name)),
        ));
    }
    Ok(name)
}
