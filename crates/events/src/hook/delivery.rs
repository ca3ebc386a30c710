//! What a delivery to a webhook says, in one form for all providers.
//!
//! Only what is needed is read; whatever else a provider sends, today or later, is skipped.

use jiff::Timestamp;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Provider;
use crate::names::{CommitId, GitRef};
use crate::preview::Action;

/// What a delivery is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delivered {
    /// A pull request or merge request.
    PullRequest(Box<PullRequestDelivery>),
    /// A push to a branch.
    Push(PushDelivery),
    /// Nothing that concerns deployments.
    Other {
        /// A stable code for programs.
        code: &'static str,
        /// Why it does not.
        why: String,
    },
}

/// A pull request or merge request, as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullRequestDelivery {
    /// The addresses of the repository that it is to be merged into.
    pub repository: Vec<String>,
    /// Its number.
    pub number: u64,
    /// What was done.
    pub action: Action,
    /// Whether it is open.
    pub open: bool,
    /// Its head.
    pub head: CommitId,
    /// The head before, if it is said.
    pub before: Option<CommitId>,
    /// Whether its head is in another repository.
    pub foreign: bool,
    /// Its title.
    pub title: String,
    /// Where people read it.
    pub url: String,
    /// When it was changed last.
    pub updated_at: Timestamp,
    /// The ref of the repository that leads to its newest head.
    pub head_ref: String,
    /// The account that did it.
    pub sender: Option<String>,
}

/// A push to a branch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PushDelivery {
    /// The addresses of the repository.
    pub repository: Vec<String>,
    /// The branch.
    pub branch: GitRef,
    /// Its newest commit.
    pub head: CommitId,
    /// The account that did it.
    pub sender: Option<String>,
}

/// A body that is not what its provider documents.
#[derive(Debug, thiserror::Error)]
pub enum InvalidPayload {
    /// It is no JSON.
    #[error("the body is not JSON: {0}")]
    Malformed(serde_json::Error),
    /// It is JSON of another form.
    #[error("the body does not fit: {0}")]
    Unfit(String),
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, InvalidPayload> {
    serde_json::from_slice(body).map_err(|e| {
        if e.is_data() {
            InvalidPayload::Unfit(e.to_string())
        } else {
            InvalidPayload::Malformed(e)
        }
    })
}

fn other(code: &'static str, why: impl Into<String>) -> Delivered {
    Delivered::Other {
        code,
        why: why.into(),
    }
}

/// Reads a delivery. `event` is what its header names.
pub fn parse(provider: Provider, event: &str, body: &[u8]) -> Result<Delivered, InvalidPayload> {
    match (provider, event) {
        (Provider::Github | Provider::Gitea, "pull_request" | "pull_request_sync") => {
            github_pull_request(body)
        }
        (Provider::Github | Provider::Gitea, "push") => {
            let push: GithubPush = read(body)?;
            let sender = push.sender.map(|s| s.login);
            let repository = push.repository.addresses();
            pushed(repository, &push.git_ref, push.after, sender)
        }
        (Provider::Github, "ping") => {
            read::<serde_json::Value>(body)?;
            Ok(other("ping", "the webhook works"))
        }
        (Provider::Gitlab, "Merge Request Hook") => gitlab_merge_request(body),
        (Provider::Gitlab, "Push Hook") => {
            let push: GitlabPush = read(body)?;
            let repository = push.project.addresses();
            pushed(repository, &push.git_ref, push.after, push.user_username)
        }
        (_, event) => {
            read::<serde_json::Value>(body)?;
            let event: String = event.chars().take(40).collect();
            Ok(other(
                "unknown_event",
                format!("events {event:?} concern no deployment"),
            ))
        }
    }
}

#[derive(Deserialize)]
struct GithubRepository {
    #[serde(default)]
    full_name: String,
    clone_url: Option<String>,
    ssh_url: Option<String>,
    html_url: Option<String>,
}

impl GithubRepository {
    fn addresses(self) -> Vec<String> {
        [self.clone_url, self.ssh_url, self.html_url]
            .into_iter()
            .flatten()
            .collect()
    }
}

#[derive(Deserialize)]
struct Account {
    login: String,
}

#[derive(Deserialize)]
struct GithubPush {
    #[serde(rename = "ref")]
    git_ref: String,
    after: String,
    repository: GithubRepository,
    sender: Option<Account>,
}

#[derive(Deserialize)]
struct GithubPullRequest {
    action: String,
    before: Option<String>,
    pull_request: GithubDetails,
    repository: GithubRepository,
    sender: Option<Account>,
}

#[derive(Deserialize)]
struct GithubDetails {
    number: u64,
    state: String,
    #[serde(default)]
    title: String,
    #[serde(default)]
    html_url: String,
    updated_at: String,
    head: GithubSide,
}

#[derive(Deserialize)]
struct GithubSide {
    sha: String,
    repo: Option<GithubRepository>,
}

fn github_pull_request(body: &[u8]) -> Result<Delivered, InvalidPayload> {
    let delivery: GithubPullRequest = read(body)?;
    let details = delivery.pull_request;
    let action = match delivery.action.as_str() {
        "opened" => Action::Opened,
        // Gitea says it so.
        "synchronize" | "synchronized" | "edited" => Action::Updated,
        "reopened" => Action::Reopened,
        "closed" => Action::Closed,
        other_action => {
            let action: String = other_action.chars().take(40).collect();
            return Ok(other(
                "unknown_action",
                format!("what was done, {action:?}, changes no commit"),
            ));
        }
    };
    // A repository that is gone was another one.
    let foreign = details.head.repo.is_none_or(|head| {
        !head
            .full_name
            .eq_ignore_ascii_case(&delivery.repository.full_name)
    });
    Ok(Delivered::PullRequest(Box::new(PullRequestDelivery {
        repository: delivery.repository.addresses(),
        number: details.number,
        action,
        open: details.state == "open" && action != Action::Closed,
        head: commit(details.head.sha)?,
        before: delivery.before.map(commit).transpose()?,
        foreign,
        title: details.title,
        url: details.html_url,
        updated_at: time(&details.updated_at)?,
        head_ref: format!("refs/pull/{}/head", details.number),
        sender: delivery.sender.map(|s| s.login),
    })))
}

#[derive(Deserialize)]
struct GitlabProject {
    git_http_url: Option<String>,
    git_ssh_url: Option<String>,
    web_url: Option<String>,
}

impl GitlabProject {
    fn addresses(self) -> Vec<String> {
        [self.git_http_url, self.git_ssh_url, self.web_url]
            .into_iter()
            .flatten()
            .collect()
    }
}

#[derive(Deserialize)]
struct GitlabPush {
    #[serde(rename = "ref")]
    git_ref: String,
    after: String,
    project: GitlabProject,
    user_username: Option<String>,
}

#[derive(Deserialize)]
struct GitlabMergeRequest {
    project: GitlabProject,
    object_attributes: GitlabDetails,
    user: Option<GitlabUser>,
}

#[derive(Deserialize)]
struct GitlabUser {
    username: Option<String>,
}

#[derive(Deserialize)]
struct GitlabDetails {
    iid: u64,
    state: String,
    action: Option<String>,
    #[serde(default)]
    title: String,
    url: Option<String>,
    updated_at: String,
    oldrev: Option<String>,
    last_commit: GitlabCommit,
    source_project_id: Option<u64>,
    target_project_id: Option<u64>,
}

#[derive(Deserialize)]
struct GitlabCommit {
    id: String,
}

fn gitlab_merge_request(body: &[u8]) -> Result<Delivered, InvalidPayload> {
    let delivery: GitlabMergeRequest = read(body)?;
    let details = delivery.object_attributes;
    let action = match details.action.as_deref() {
        Some("open") => Action::Opened,
        Some("update") => Action::Updated,
        Some("reopen") => Action::Reopened,
        Some("close" | "merge") => Action::Closed,
        other_action => {
            let action: String = other_action.unwrap_or("").chars().take(40).collect();
            return Ok(other(
                "unknown_action",
                format!("what was done, {action:?}, changes no commit"),
            ));
        }
    };
    Ok(Delivered::PullRequest(Box::new(PullRequestDelivery {
        repository: delivery.project.addresses(),
        number: details.iid,
        action,
        // A merge request that is locked is being merged.
        open: details.state == "opened" && action != Action::Closed,
        head: commit(details.last_commit.id)?,
        before: details.oldrev.map(commit).transpose()?,
        foreign: details.source_project_id.is_none()
            || details.source_project_id != details.target_project_id,
        title: details.title,
        url: details.url.unwrap_or_default(),
        updated_at: time(&details.updated_at)?,
        head_ref: format!("refs/merge-requests/{}/head", details.iid),
        sender: delivery.user.and_then(|u| u.username),
    })))
}

fn pushed(
    repository: Vec<String>,
    git_ref: &str,
    after: String,
    sender: Option<String>,
) -> Result<Delivered, InvalidPayload> {
    let Some(branch) = git_ref.strip_prefix("refs/heads/") else {
        return Ok(other("no_branch", "it is no branch that was pushed to"));
    };
    if !after.is_empty() && after.bytes().all(|b| b == b'0') {
        return Ok(other("branch_deleted", "the branch was deleted"));
    }
    let branch = GitRef::parse(branch).map_err(|e| InvalidPayload::Unfit(e.to_string()))?;
    Ok(Delivered::Push(PushDelivery {
        repository,
        branch,
        head: commit(after)?,
        sender,
    }))
}

fn commit(text: String) -> Result<CommitId, InvalidPayload> {
    CommitId::parse(text).map_err(|e| InvalidPayload::Unfit(e.to_string()))
}

/// A time in RFC 3339, or in the form that GitLab writes: `2026-01-31 10:00:00 UTC`, or with
/// `+0100` in place of `UTC`.
fn time(text: &str) -> Result<Timestamp, InvalidPayload> {
    let plain = match text.trim().rsplit_once(' ') {
        Some((rest, "UTC")) => format!("{rest}Z"),
        Some((rest, offset)) if offset.starts_with(['+', '-']) => format!("{rest}{offset}"),
        _ => text.trim().to_owned(),
    };
    plain.parse().map_err(|_| {
        let shown: String = text.chars().take(40).collect();
        InvalidPayload::Unfit(format!("{shown:?} is not a time"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_each_provider_writes_them() {
        for text in [
            "2026-01-31T10:00:00Z",
            "2026-01-31T11:00:00+01:00",
            "2026-01-31 10:00:00 UTC",
            "2026-01-31 11:00:00 +0100",
            "2026-01-31T10:00:00.000Z",
        ] {
            let read = time(text).unwrap();
            assert_eq!(read.to_string(), "2026-01-31T10:00:00Z", "{text}");
        }
        for text in [
            "",
            " ",
            "yesterday",
            "2026-01-31",
            "UTC",
            "99999-01-01 00:00:00 UTC",
        ] {
            assert!(time(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn what_is_no_delivery_is_refused_or_ignored_by_name() {
        let unfit = |provider, event, body: &str| match parse(provider, event, body.as_bytes()) {
            Ok(Delivered::Other { code, .. }) => code,
            Ok(_) => "taken",
            Err(InvalidPayload::Malformed(_)) => "malformed",
            Err(InvalidPayload::Unfit(_)) => "unfit",
        };
        use Provider::{Gitea, Github, Gitlab};
        let zero = r#"{"ref":"refs/heads/a","after":"0000000000000000000000000000000000000000","repository":{}}"#;
        for (provider, event, body, outcome) in [
            (Github, "push", "{", "malformed"),
            (Github, "push", "", "malformed"),
            (Github, "push", "{}", "unfit"),
            (Github, "push", "[]", "unfit"),
            (Github, "ping", "{}", "ping"),
            (Github, "star", "{}", "unknown_event"),
            (Github, "star", "{", "malformed"),
            (Github, "Push Hook", "{}", "unknown_event"),
            (Gitlab, "push", "{}", "unknown_event"),
            (Gitlab, "Merge Request Hook", "{}", "unfit"),
            (Gitea, "pull_request", "null", "unfit"),
            (Github, "push", zero, "branch_deleted"),
            (Gitea, "push", &zero.replace("heads", "tags"), "no_branch"),
            (Github, "push", &zero.replace("0\"", "1\""), "taken"),
            (Github, "push", &zero.replace("0\"", "g\""), "unfit"),
            (
                Github,
                "push",
                &zero.replace("ds/a", "ds/a..b").replace("0\"", "1\""),
                "unfit",
            ),
        ] {
            assert_eq!(
                unfit(provider, event, body),
                outcome,
                "{provider} {event} {body}"
            );
        }
    }
}
