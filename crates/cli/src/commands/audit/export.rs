//! `daybook audit export`

use std::path::{Path, PathBuf};
use std::process::Stdio;

use clap::Args;
use daybook_audit::{ExportError, Repository, export};
use daybook_store::tlog::{Checkpoint, FolderStorage, ReadTiles};
use jiff::Timestamp;
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::Command;

use super::ledger::{ServerTiles, failed, progress_bar};
use crate::client::Client;
use crate::commands::{Outcome, ServerArgs};
use crate::exit::{Code, Failure};
use crate::output;
use crate::served_tree::LARGEST;

/// Write one file with all that it takes to verify the ledger offline.
#[derive(Debug, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The file; one that is there is replaced when the new one is complete.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Take the tree from a notary's folder, and ask no server.
    #[arg(long, value_name = "FOLDER")]
    tiles: Option<PathBuf>,
    /// Leave out the GitOps repositories.
    #[arg(long)]
    without_repositories: bool,
}

pub async fn run(args: ExportArgs) -> Outcome {
    let working = async {
        let folder = tempfile::tempdir()?;
        let mut repositories = Vec::new();
        let bar = progress_bar(0, "events");
        let mut progress = |done, size| {
            bar.set_length(size);
            bar.set_position(done);
        };
        let exported = match &args.tiles {
            Some(tiles) => {
                let tiles = FolderStorage::new(tiles);
                export(&tiles, &repositories, None, now(), &args.out, &mut progress).await
            }
            None => {
                let client = Client::new(&args.server)?;
                let mut copied_at = None;
                if !args.without_repositories {
                    copied_at = Some(signed(&ServerTiles::new(client.clone())).await?);
                    repositories = bundles(&client, &folder).await?;
                }
                let tiles = ServerTiles::new(client);
                let out = &args.out;
                export(&tiles, &repositories, copied_at, now(), out, &mut progress).await
            }
        };
        bar.finish_and_clear();
        exported.map_err(|e| {
            let kind = match &e {
                ExportError::NothingSigned => "nothing_signed",
                ExportError::Write { .. } => "not_written",
                _ => "ledger_unreadable",
            };
            let mut failure = failed(kind, &e);
            failure.code = Code::Failure;
            failure
        })
    };
    let exported = tokio::select! {
        exported = working => exported?,
        _ = tokio::signal::ctrl_c() => {
            return Err(Failure::new(Code::Failure, "stopped", "the export was stopped; nothing was written"));
        }
    };
    if output::is_json() {
        output::json(&exported);
    } else {
        output::line(&format!(
            "{}: {} entries of {} and {} GitOps repositories, in {} files, {} bytes",
            args.out.display(),
            exported.size,
            exported.origin,
            exported.repositories,
            exported.files,
            exported.bytes
        ));
        output::line(&format!(
            "verify it with `daybook audit verify {}`",
            args.out.display()
        ));
    }
    Ok(Code::Success)
}

/// The time that an export bears; builds that are to be repeated give it.
fn now() -> Timestamp {
    std::env::var("SOURCE_DATE_EPOCH")
        .ok()
        .and_then(|seconds| Timestamp::from_second(seconds.parse().ok()?).ok())
        .unwrap_or_else(Timestamp::now)
}

/// How many entries are signed now.
async fn signed(tiles: &ServerTiles) -> Result<u64, Failure> {
    let unreadable = |e: &dyn std::error::Error| failed("ledger_unreadable", e);
    let note = tiles.get("checkpoint").await.map_err(|e| unreadable(&e))?;
    let Some(note) = note else {
        return Ok(0);
    };
    let (checkpoint, _) = Checkpoint::parse_unverified(&note).map_err(|e| unreadable(&e))?;
    Ok(checkpoint.head.size)
}

/// The repositories of all projects, as git bundles in a folder.
async fn bundles(client: &Client, folder: &TempDir) -> Result<Vec<Repository>, Failure> {
    let projects: Value = client.get("/api/v1/projects", &[]).await?;
    let list = projects.get("projects").unwrap_or(&projects);
    let mut all = Vec::new();
    for project in list.as_array().into_iter().flatten() {
        let Some(name) = project.get("name").and_then(Value::as_str) else {
            continue;
        };
        let url = format!("{}/git/{name}.git", client.base());
        let mirror = folder.path().join(format!("{name}.git"));
        if let Err(why) = git(
            None,
            &["clone", "--quiet", "--mirror", &url, &text(&mirror)],
        )
        .await
        {
            // A project that nothing was deployed to has no repository yet.
            if client
                .resource(
                    &format!("/git/{name}.git/info/refs?service=git-upload-pack"),
                    LARGEST,
                )
                .await?
                .is_none()
            {
                continue;
            }
            return Err(Failure::new(Code::Failure, "repository_unreadable", why));
        }
        let bundle = folder.path().join(format!("{name}.bundle"));
        let path = text(&bundle);
        // One thread packs the same objects in the same way each time.
        git(
            Some(&mirror),
            &[
                "-c",
                "pack.threads=1",
                "bundle",
                "create",
                "--quiet",
                &path,
                "--all",
            ],
        )
        .await
        .map_err(|why| Failure::new(Code::Failure, "repository_unreadable", why))?;
        all.push(Repository {
            project: name.to_owned(),
            bundle,
            allowed_signers: None,
        });
    }
    Ok(all)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Runs git with no configuration but its own defaults, and says what it said if it failed.
pub async fn git(repository: Option<&Path>, arguments: &[&str]) -> Result<(), String> {
    let mut command = Command::new("git");
    if let Some(repository) = repository {
        command.arg("--git-dir").arg(repository);
    }
    let ended = command
        .args(arguments)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_TERMINAL_PROMPT", "0")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|e| format!("git cannot be run: {e}"))?;
    if ended.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&ended.stderr).trim().to_owned())
}
