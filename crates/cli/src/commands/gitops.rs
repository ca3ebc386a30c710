//! `daybook gitops`: commits that Daybook did not make, and what becomes of them.

use std::io::Seek as _;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};

use super::manage::segment;
use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// Look at a project's GitOps repository, and decide about commits that Daybook did not make.
#[derive(Debug, Subcommand)]
pub enum GitopsCommand {
    /// Its head, the commits that Daybook did not make, and whether its history is whole.
    Show(ProjectArgs),
    /// Push its commits to a repository elsewhere, or stop doing so.
    Remote(RemoteArgs),
    /// Take the whole repository away, with its history and all that is needed to go on without
    /// Daybook.
    Eject(EjectArgs),
    /// What a commit changes.
    Diff(CommitArgs),
    /// Accept a commit that Daybook did not make, or a history that was rewritten.
    Adopt(DecisionArgs),
    /// Undo a commit that Daybook did not make by a further, signed one.
    Revert(DecisionArgs),
    /// Print the keys whose signatures count, for `gpg.ssh.allowedSignersFile`.
    AllowedSigners(ProjectArgs),
}

/// Which repository.
#[derive(Debug, Args)]
pub struct ProjectArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The project.
    project: String,
}

/// Where commits go.
#[derive(Debug, Args)]
pub struct RemoteArgs {
    #[command(flatten)]
    project: ProjectArgs,
    /// An https or ssh URL without a credential. Its branch `main` must be new, or have what the
    /// repository has. Without one, it is shown where commits go now.
    #[arg(conflicts_with = "clear")]
    url: Option<String>,
    /// Push nowhere any more. The repository stays on the server as it is.
    #[arg(long)]
    clear: bool,
}

/// Where the repository goes.
#[derive(Debug, Args)]
pub struct EjectArgs {
    #[command(flatten)]
    project: ProjectArgs,
    /// A folder that is not there yet, or a file whose name ends in `.zip`. The same state of the
    /// repository gives the same bytes.
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
}

/// Which commit.
#[derive(Debug, Args)]
pub struct CommitArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The project.
    project: String,
    /// The commit, or the beginning of it as `daybook gitops show` prints it.
    commit: String,
}

/// What is decided.
#[derive(Debug, Args)]
pub struct DecisionArgs {
    #[command(flatten)]
    commit: CommitArgs,
    /// Why, for the ledger.
    #[arg(long)]
    reason: Option<String>,
}

pub async fn run(command: GitopsCommand) -> Outcome {
    match command {
        GitopsCommand::Show(args) => show(args).await,
        GitopsCommand::Remote(args) => remote(args).await,
        GitopsCommand::Eject(args) => eject(args).await,
        GitopsCommand::Diff(args) => diff(args).await,
        GitopsCommand::Adopt(args) => decide("adopt", args).await,
        GitopsCommand::Revert(args) => decide("revert", args).await,
        GitopsCommand::AllowedSigners(args) => signers(args).await,
    }
}

/// What the server says of a project's repository.
async fn repository(client: &Client, project: &str) -> Result<Value, Failure> {
    let path = format!("/api/v1/projects/{project}/gitops");
    client.get(&path, &[]).await
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

fn short(commit: &str) -> &str {
    commit.get(..7).unwrap_or(commit)
}

async fn show(args: ProjectArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let found = repository(&client, &args.project).await?;
    if output::is_json() {
        output::json(&found);
        return Ok(Code::Success);
    }
    let style = output::style();
    let field = |name: &str, value: &str| {
        output::line(&format!("  {} {value}", style.dim(&format!("{name:<10}"))));
    };
    output::line(&style.bold(&format!("GitOps repository of {}", args.project)));
    field("branch", text(&found, "/branch"));
    field("head", text(&found, "/head"));
    field("commits", &found["commits"].to_string());
    if let Some(url) = found["remote"].as_str() {
        field("remote", url);
    }
    for key in found["signers"].as_array().into_iter().flatten() {
        field("signed by", key.as_str().unwrap_or_default());
    }
    let foreign = found["foreign"].as_array().cloned().unwrap_or_default();
    if foreign.is_empty() {
        output::line("every commit is Daybook's");
    } else {
        let mut table = Table::new([
            "COMMIT",
            "FOUND",
            "AUTHOR",
            "SIGNATURE",
            "STATUS",
            "MESSAGE",
        ]);
        for commit in &foreign {
            let found = text(commit, "/found_at");
            let found = found
                .parse()
                .map_or_else(|_| found.to_owned(), output::time);
            table.row(Row::new([
                short(text(commit, "/commit")).to_owned(),
                found,
                text(commit, "/author").to_owned(),
                text(commit, "/signature").to_owned(),
                text(commit, "/status").to_owned(),
                text(commit, "/message").to_owned(),
            ]));
        }
        table.print();
        for commit in &foreign {
            let problem = text(commit, "/problem");
            if !problem.is_empty() {
                let commit = short(text(commit, "/commit"));
                output::line(&style.warn(&format!("{commit} was not undone: {problem}")));
            }
        }
    }
    for line in attention(&args.project, &found) {
        output::line(&style.warn(&line));
    }
    Ok(Code::Success)
}

/// What somebody has to decide about a repository, a line each.
pub fn attention(project: &str, found: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(rewritten) = found.get("rewritten").filter(|r| !r.is_null()) {
        lines.push(format!(
            "the GitOps history of {project} was rewritten: the branch is at {} and no longer \
             contains {}; nothing is committed until it is put back, or accepted with `daybook \
             gitops adopt {project} {}`",
            short(text(rewritten, "/found")),
            short(text(rewritten, "/expected")),
            short(text(rewritten, "/found")),
        ));
    }
    if let Some(trouble) = found.get("remote_trouble").filter(|t| !t.is_null()) {
        let since = text(trouble, "/since");
        let since = since
            .parse()
            .map_or_else(|_| since.to_owned(), output::time);
        lines.push(format!(
            "commits to the GitOps repository of {project} wait for its remote since {since}: {} \
             ({}). {}",
            text(trouble, "/message"),
            text(trouble, "/code"),
            text(trouble, "/remedy"),
        ));
    }
    match found.get("undecided").and_then(Value::as_u64) {
        None | Some(0) => {}
        Some(1) => lines.push(format!(
            "1 commit in the GitOps repository of {project} is not Daybook's: `daybook gitops \
             show {project}`"
        )),
        Some(n) => lines.push(format!(
            "{n} commits in the GitOps repository of {project} are not Daybook's: `daybook \
             gitops show {project}`"
        )),
    }
    lines
}

async fn remote(args: RemoteArgs) -> Outcome {
    let client = Client::new(&args.project.server)?;
    let project = &args.project.project;
    let answer = if args.url.is_some() || args.clear {
        set_remote(&client, project, args.url.as_deref()).await?
    } else {
        let path = format!("/api/v1/projects/{}", segment(project)?);
        client.get(&path, &[]).await?
    };
    if output::is_json() {
        output::json(&json!({ "project": project, "remote": answer["gitops_remote"] }));
        return Ok(Code::Success);
    }
    output::line(&match answer["gitops_remote"].as_str() {
        Some(url) => format!("GitOps commits of {project} are pushed to {url}"),
        None => format!("GitOps commits of {project} stay on the server"),
    });
    Ok(Code::Success)
}

async fn eject(args: EjectArgs) -> Outcome {
    let client = Client::new(&args.project.server)?;
    let project = &args.project.project;
    let out = std::path::absolute(&args.out)?;
    if out.exists() {
        return Err(Failure::new(
            Code::Usage,
            "path_exists",
            format!("{} is there already", out.display()),
        )
        .hint("name a path with --out that is not there yet"));
    }
    let is_zip = out
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("zip"));
    let folder = out.parent().unwrap_or(Path::new("/"));
    let unwritable = |e: std::io::Error| {
        Failure::new(
            Code::Failure,
            "out_unwritable",
            format!("{} cannot be written: {e}", out.display()),
        )
        .hint("name another path with --out")
    };
    let form = if is_zip { "zip" } else { "tar" };
    let path = format!(
        "/api/v1/projects/{}/gitops/eject?format={form}",
        segment(project)?
    );
    // It gets its name when it is whole.
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(unwritable)?;
    client.download(&path, file.as_file_mut()).await?;
    if is_zip {
        file.persist_noclobber(&out)
            .map_err(|e| unwritable(e.error))?;
    } else {
        let unpacked = tempfile::tempdir_in(folder).map_err(unwritable)?;
        file.as_file_mut().rewind().map_err(unwritable)?;
        tar::Archive::new(file.as_file())
            .unpack(unpacked.path())
            .map_err(unwritable)?;
        std::fs::rename(unpacked.path(), &out).map_err(unwritable)?;
        let _ = unpacked.keep();
    }
    if output::is_json() {
        output::json(&json!({ "project": project, "out": out }));
    } else {
        output::line(&format!(
            "{} {project} to {}; EJECTED.md says how to go on",
            output::style().good("ejected"),
            out.display()
        ));
    }
    Ok(Code::Success)
}

/// Sets the remote of a project's GitOps repository, or clears it.
pub async fn set_remote(
    client: &Client,
    project: &str,
    url: Option<&str>,
) -> Result<Value, Failure> {
    let path = format!("/api/v1/projects/{}/gitops/remote", segment(project)?);
    match url {
        Some(url) => {
            let body = json!({ "url": url });
            client.command(Method::PUT, &path, &body, None).await
        }
        None => {
            client
                .command(Method::DELETE, &path, &json!({}), None)
                .await
        }
    }
}

/// The full id of a commit that was named by the beginning of it.
async fn find(client: &Client, args: &CommitArgs) -> Result<String, Failure> {
    let name = args.commit.to_ascii_lowercase();
    if name.len() >= 40 {
        return Ok(name);
    }
    let wrong = |code, message: String| {
        Err(Failure::new(Code::Usage, code, message)
            .hint("give the commit as `daybook gitops show` or `git log` prints it"))
    };
    if name.len() < 4 || !name.bytes().all(|b| b.is_ascii_hexdigit()) {
        return wrong(
            "invalid_commit_id",
            format!("{:?} is not the id of a commit", args.commit),
        );
    }
    let found = repository(client, &args.project).await?;
    let foreign = found["foreign"].as_array().into_iter().flatten();
    let mut known: Vec<&str> = foreign.map(|c| text(c, "/commit")).collect();
    known.extend([text(&found, "/head"), text(&found, "/rewritten/found")]);
    known.retain(|commit| commit.starts_with(&name));
    known.sort_unstable();
    known.dedup();
    match known[..] {
        [one] => Ok(one.to_owned()),
        [] => wrong(
            "foreign_commit_not_found",
            format!("no known commit that Daybook did not make begins with {name}"),
        ),
        _ => wrong(
            "ambiguous_commit_id",
            format!("several commits begin with {name}"),
        ),
    }
}

async fn diff(args: CommitArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let commit = find(&client, &args).await?;
    let path = format!(
        "/api/v1/projects/{}/gitops/commits/{commit}/diff",
        args.project
    );
    let diff = client.text(&path).await?;
    if output::is_json() {
        output::json(&json!({ "commit": commit, "diff": diff }));
    } else {
        output::line(diff.trim_end());
    }
    Ok(Code::Success)
}

async fn decide(what: &str, args: DecisionArgs) -> Outcome {
    let client = Client::new(&args.commit.server)?;
    let commit = find(&client, &args.commit).await?;
    let path = format!(
        "/api/v1/projects/{}/gitops/commits/{commit}/{what}",
        args.commit.project
    );
    let answer = client
        .post(&path, &json!({ "reason": args.reason }))
        .await?;
    if output::is_json() {
        output::json(&answer);
    } else {
        let done = match what {
            "adopt" => "adopted",
            _ => "being undone:",
        };
        output::line(&format!(
            "{} {}",
            output::style().good(done),
            short(&commit)
        ));
    }
    Ok(Code::Success)
}

async fn signers(args: ProjectArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let found = repository(&client, &args.project).await?;
    let keys: Vec<&str> = found["signers"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    if output::is_json() {
        output::json(&keys);
    } else {
        let text = daybook_workers::gitops::allowed_signers(keys);
        output::line(text.trim_end());
    }
    Ok(Code::Success)
}
