//! Uploading a folder, for a service whose source is in no repository that the server could read.

use std::path::Path;

use reqwest::Method;
use serde_json::{Value, json};

use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::folder::{Content, Folder, size};
use crate::output;

/// How many objects are asked after in one request.
const ASKED: usize = 5000;
/// So many paths are named; the others are counted.
const NAMED: usize = 3;

/// What is deployed of a folder.
pub struct Uploaded {
    /// The commit.
    pub commit: String,
    /// The service's folder in it; empty if it is the whole.
    pub within: String,
}

/// The folder that a service is deployed from of which nothing else is named: the one that was named
/// or, where the service has neither a source nor images of its own, the one that this runs in. None
/// where the server knows what to deploy.
pub async fn find(
    client: &Client,
    named: Option<&Path>,
    project: &str,
    service: &str,
) -> Result<Option<Folder>, Failure> {
    if let Some(named) = named {
        return Folder::open(named).map(Some);
    }
    let path = format!("/api/v1/projects/{project}/services/{service}");
    // What is wrong with it is said when it is to be deployed, which is tried several times.
    let Ok(defined) = client.get::<Value>(&path, &[]).await else {
        return Ok(None);
    };
    if !defined["source"].is_null() || !defined["image_repository"].is_null() {
        return Ok(None);
    }
    let folder = Folder::open(Path::new("."))?;
    match folder.remote()? {
        None => Ok(Some(folder)),
        Some((name, url)) => Err(Failure::new(
            Code::Usage,
            "source_has_remote",
            format!(
                "the service {service} has no source, and what is here has the remote {name}: {}",
                daybook_events::without_credentials(&url)
            ),
        )
        .hint(
            "give the service that source with `daybook service create --repo URL`, or upload what is \
             here with --from .",
        )),
    }
}

/// Uploads a folder, unless the server has its content already.
pub async fn upload(
    client: &Client,
    folder: &Folder,
    project: &str,
    service: &str,
) -> Result<Uploaded, Failure> {
    let content = tokio::task::block_in_place(|| folder.content())?;
    tell_of(folder, &content);
    let uploads = format!("/api/v1/projects/{project}/services/{service}/uploads");
    let uploaded = |commit: String| Uploaded {
        commit,
        within: folder.within().to_owned(),
    };
    let known: Result<Value, _> = client
        .get(&format!("{uploads}/{}", content.tree), &[])
        .await;
    match known {
        Ok(known) => {
            let commit = text(&known, "commit")?;
            say(&format!(
                "nothing to upload: {} has this content",
                short(&commit)
            ));
            return Ok(uploaded(commit));
        }
        Err(failure) if failure.kind == "upload_not_found" => {}
        Err(failure) => return Err(failure),
    }
    let mut missing = Vec::new();
    let mut max = u64::MAX;
    for objects in content.objects().chunks(ASKED) {
        let asked = json!({ "objects": objects });
        let answer: Value = client
            .command(Method::POST, &format!("{uploads}/missing"), &asked, None)
            .await?;
        let ids = answer["missing"].as_array().into_iter().flatten();
        missing.extend(ids.filter_map(|id| id.as_str().map(str::to_owned)));
        max = answer["max_bytes"].as_u64().unwrap_or(max);
    }
    let (commit, (pack, bytes)) = tokio::task::block_in_place(|| {
        let commit = content.commit()?;
        let pack = content.pack(&commit, &missing)?;
        Ok::<_, Failure>((commit, pack))
    })?;
    // Said before it is sent: a server that has had enough hangs up.
    if bytes > max {
        return Err(Failure::new(
            Code::Usage,
            "upload_too_large",
            format!(
                "this is {} compressed, and the server takes {}; the most is in {}",
                size(bytes),
                size(max),
                content.largest()
            ),
        )
        .hint(
            "put what is not source into .gitignore, or have the server started with a larger \
             --upload-max-mib",
        ));
    }
    let path = format!("{uploads}?commit={commit}");
    let answer = client.upload(&path, &pack, bytes).await?;
    let commit = text(&answer, "commit")?;
    say(&format!(
        "uploaded {}: {} sent",
        short(&commit),
        size(bytes)
    ));
    Ok(uploaded(commit))
}

fn text(answer: &Value, key: &str) -> Result<String, Failure> {
    let text = answer[key].as_str().map(str::to_owned);
    text.ok_or_else(|| {
        Failure::new(
            Code::Failure,
            "unexpected_answer",
            format!("the server did not say its {key}"),
        )
    })
}

fn short(commit: &str) -> &str {
    commit.get(..7).unwrap_or(commit)
}

/// Beside the answer, which a program may read.
fn say(text: &str) {
    if !output::is_json() {
        eprintln!("{text}");
    }
}

/// Says what is uploaded, and what is not although somebody may expect it.
fn tell_of(folder: &Folder, content: &Content) {
    let files = match content.files {
        1 => "1 file".to_owned(),
        files => format!("{files} files"),
    };
    say(&format!(
        "taking {}: {files}, {}",
        folder.shown(),
        size(content.bytes)
    ));
    let warning = output::style().warn("warning:");
    if !content.secrets.is_empty() {
        eprintln!(
            "{warning} left out {}, as secrets may be in there, for which `daybook secret set` is; what \
             git tracks is taken",
            some_of(&content.secrets)
        );
    }
    if !content.nested.is_empty() {
        eprintln!(
            "{warning} left out the content of {}: a repository of its own",
            some_of(&content.nested)
        );
    }
}

fn some_of(paths: &[String]) -> String {
    let named = paths.iter().take(NAMED).cloned().collect::<Vec<_>>();
    let named = named.join(", ");
    match paths.len().saturating_sub(NAMED) {
        0 => named,
        more => format!("{named} and {more} more"),
    }
}
