//! What a name stands for in a repository.

use daybook_events::{CommitId, GitRef, RepositoryUrl};
use git2::{Oid, Repository};
use jiff::Timestamp;

use super::near_names::near;
use super::{MAX_MESSAGE_BYTES, ResolvedSource, SourceError, commit_url};

/// The refs of a repository elsewhere, as it told them.
pub(super) struct Advertised {
    refs: Vec<(String, Oid)>,
    /// What HEAD stands for, where the repository says so.
    head: Option<String>,
}

impl Advertised {
    pub(super) fn from_heads(heads: &[git2::RemoteHead<'_>]) -> Self {
        let head = heads.iter().find(|h| h.name() == "HEAD");
        Self {
            head: head.and_then(|h| h.symref_target()).map(str::to_owned),
            refs: heads
                .iter()
                .map(|h| (h.name().to_owned(), h.oid()))
                // Names become parts of refspecs.
                .filter(|(name, _)| git2::Reference::is_valid_name(name))
                // What an annotated tag stands for is found in the tag itself.
                .filter(|(name, _)| !name.ends_with("^{}"))
                .collect(),
        }
    }

    /// The full name and the object of a branch, tag or ref.
    pub(super) fn find(&self, name: &str) -> Result<Option<(String, Oid)>, SourceError> {
        if self.refs.is_empty() {
            return Err(SourceError::EmptyRepository);
        }
        let candidates = if name == "HEAD" || name.starts_with("refs/") {
            vec![name.to_owned()]
        } else {
            vec![
                format!("refs/heads/{name}"),
                format!("refs/tags/{name}"),
                format!("refs/{name}"),
            ]
        };
        Ok(candidates
            .into_iter()
            .find_map(|c| self.refs.iter().find(|(n, _)| *n == c).cloned()))
    }

    /// The branch that a full name stands for, if it stands for one.
    pub(super) fn branch(&self, name: &str) -> Option<GitRef> {
        let name = match name {
            "HEAD" => self.head.as_deref()?,
            name => name,
        };
        let branch = name.strip_prefix("refs/heads/")?;
        GitRef::parse(branch).ok()
    }

    /// A ref that stands exactly at this commit.
    pub(super) fn ref_at(&self, id: Oid) -> Option<String> {
        self.refs
            .iter()
            .find(|(_, oid)| *oid == id)
            .map(|(name, _)| name.clone())
    }

    /// Names that may have been meant.
    pub(super) fn near(&self, wanted: &str) -> Vec<String> {
        near(
            wanted
                .trim_start_matches("refs/heads/")
                .trim_start_matches("refs/tags/"),
            self.refs.iter().filter_map(|(name, _)| {
                name.strip_prefix("refs/heads/")
                    .or_else(|| name.strip_prefix("refs/tags/"))
                    .map(str::to_owned)
            }),
        )
    }
}

/// Everything that is recorded of what an object stands for. The object is in the repository.
pub(super) fn describe(
    repository: &Repository,
    url: &RepositoryUrl,
    git_ref: &GitRef,
    branch: Option<GitRef>,
    id: Oid,
) -> Result<ResolvedSource, super::cache::Trouble> {
    let target = without_tags(repository.find_object(id, None)?)?;
    let Some(commit) = target.as_commit() else {
        return Err(SourceError::NotACommit {
            git_ref: git_ref.to_string(),
            kind: target.kind().map_or("thing", |k| k.str()).to_owned(),
        }
        .into());
    };
    let message = readable(&String::from_utf8_lossy(commit.message_bytes()));
    let author = commit.author();
    let commit_id = CommitId::parse(commit.id().to_string())
        .map_err(|e| git2::Error::from_str(&e.to_string()))?;
    Ok(ResolvedSource {
        source_url: commit_url(url, &commit_id),
        url: url.clone(),
        git_ref: git_ref.clone(),
        branch,
        commit: commit_id,
        summary: message.lines().next().unwrap_or_default().to_owned(),
        message: shortened(message),
        author_name: one_line(author.name_bytes()),
        author_email: one_line(author.email_bytes()),
        // Commits can claim any number of seconds; what is no time is taken for the epoch.
        committed_at: Timestamp::from_second(commit.time().seconds())
            .unwrap_or(Timestamp::UNIX_EPOCH),
    })
}

/// What an object stands for: itself or, for an annotated tag, what it was put on.
pub(super) fn without_tags(mut object: git2::Object<'_>) -> Result<git2::Object<'_>, git2::Error> {
    while let Some(tag) = object.as_tag() {
        object = tag.target()?;
    }
    Ok(object)
}

/// Text of a commit without surrounding space and without control characters, which could take
/// over a terminal that shows it.
fn readable(text: &str) -> String {
    text.trim()
        .chars()
        .filter(|c| *c != '\r')
        .map(|c| match c {
            '\n' | '\t' => c,
            c if c.is_control() => char::REPLACEMENT_CHARACTER,
            c => c,
        })
        .collect()
}

fn one_line(bytes: &[u8]) -> String {
    readable(&String::from_utf8_lossy(bytes))
        .replace(['\n', '\t'], " ")
        .chars()
        .take(200)
        .collect()
}

fn shortened(mut message: String) -> String {
    if message.len() > MAX_MESSAGE_BYTES {
        let end = message.floor_char_boundary(MAX_MESSAGE_BYTES - '…'.len_utf8());
        message.truncate(end);
        message.push('…');
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_commits_are_cut_and_cleaned() {
        assert_eq!(readable(" a\r\nb\x1b[2J\tc\n\n"), "a\nb\u{fffd}[2J\tc");
        assert_eq!(one_line(b"A\nB \xff"), "A B \u{fffd}");
        let long = shortened("ä".repeat(MAX_MESSAGE_BYTES));
        assert!(long.len() <= MAX_MESSAGE_BYTES && long.ends_with('…'));
    }
}
