//! Commit messages, their authors and their trailers.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use daybook_events::gitops::LedgerAnchor;
use daybook_events::tree::SignedHead;
use daybook_events::{CommitId, DeploymentId, EnvKey, EnvironmentName, EventId};

use super::change::Change;

/// Who commits, whoever the author is.
pub const COMMITTER: &str = "daybook";
/// The committer's address. No mail is ever received there.
pub(super) const COMMITTER_ADDRESS: &str = "daybook@daybook.invalid";

const EVENT: &str = "Daybook-Event";
const DEPLOYMENT: &str = "Daybook-Deployment";
const LEDGER_SIZE: &str = "Daybook-Ledger-Size";
const LEDGER_ROOT: &str = "Daybook-Ledger-Root";

/// The file with the newest signed checkpoint of the ledger.
pub const CHECKPOINT: &str = ".daybook/checkpoint";
/// The file with the public keys that Daybook's commits are signed with.
pub const ALLOWED_SIGNERS: &str = ".daybook/allowed_signers";

/// What `git revert` writes before the commit that it undoes.
const REVERTS: &str = "This reverts commit ";

/// How many variables a title names.
const LISTED: usize = 4;

/// The longest body, in bytes.
const MAX_BODY: usize = 4 * 1024;

/// The author of a commit: a person, or a program, that asked for the change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Author {
    name: String,
    email: String,
}

impl Author {
    /// An author. What git could take for the end of a name or of a line is replaced by spaces;
    /// what is missing then is called `unknown`.
    pub fn new(name: &str, email: &str) -> Self {
        let clean = |text: &str| {
            let text: String = text
                .chars()
                .map(|c| match c {
                    '<' | '>' => ' ',
                    c if c.is_control() => ' ',
                    c => c,
                })
                .take(200)
                .collect();
            // libgit2 trims these from the ends, too.
            let crud = |c: char| c.is_whitespace() || ".,:;\"\\'".contains(c);
            match text.trim_matches(crud) {
                "" => "unknown".to_owned(),
                rest => rest.split_whitespace().collect::<Vec<_>>().join(" "),
            }
        };
        Self {
            name: clean(name),
            email: match clean(email).replace(' ', "") {
                e if e.contains('@') => e,
                e => format!("{e}@daybook.invalid"),
            },
        }
    }

    /// An author from `Name <address>`, or from a bare name.
    pub fn parse(text: &str) -> Self {
        match text.split_once('<') {
            Some((name, address)) => Self::new(name, address.trim_end().trim_end_matches('>')),
            None => Self::new(text, &text.replace(char::is_whitespace, ".")),
        }
    }

    /// Daybook itself.
    pub fn daybook() -> Self {
        Self::new(COMMITTER, COMMITTER_ADDRESS)
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The address.
    pub fn email(&self) -> &str {
        &self.email
    }
}

impl std::fmt::Display for Author {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} <{}>", self.name, self.email)
    }
}

/// How far the ledger was signed when a commit was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LedgerPoint {
    /// Size and root, for the trailers.
    pub anchor: LedgerAnchor,
    /// The signed checkpoint that says so, for the file [`CHECKPOINT`].
    pub checkpoint: Bytes,
}

impl From<SignedHead> for LedgerPoint {
    fn from(published: SignedHead) -> Self {
        Self {
            anchor: LedgerAnchor {
                size: published.head.size,
                root: BASE64.encode(published.head.root),
            },
            checkpoint: published.note,
        }
    }
}

/// The first line of a commit's message. `tag` is the image tag of the release that it is about.
pub(super) fn title(environment: &EnvironmentName, change: &Change, tag: Option<&str>) -> String {
    let tag = tag.map(short_tag).unwrap_or_default();
    let title = match change {
        Change::Deploy { service, .. } | Change::DeployChart { service, .. } => {
            format!("deploy({environment}): {service} {tag}")
        }
        Change::Promote { from, service, .. } => {
            format!("promote({environment}): {service} {tag} from {from}")
        }
        Change::Scale { replicas, .. } => {
            format!("config({environment}): update replicas to {replicas}")
        }
        Change::Reconfigure { keys, .. } => {
            format!("config({environment}): update {}", listed(keys))
        }
        Change::Configure { service, .. } => {
            format!("config({environment}): update {service} {tag}")
        }
        Change::Remove { service, .. } => format!("config({environment}): remove {service} {tag}"),
        Change::CreateEnvironment { from: None, .. } => format!("env(create): {environment}"),
        Change::CreateEnvironment {
            from: Some(from), ..
        } => format!("env(create): {environment} from {from}"),
        Change::DeleteEnvironment => format!("env(delete): {environment}"),
    };
    title.trim_end().to_owned()
}

/// What a message says below its title: the release whose configuration changes.
pub(super) fn body(change: &Change, tag: Option<&str>) -> Option<String> {
    let service = change.configures()?;
    let tag = tag.map(short_tag).unwrap_or_default();
    Some(format!("{service} {tag}").trim_end().to_owned())
}

/// The first few of some variables.
fn listed(keys: &[EnvKey]) -> String {
    let mut names: Vec<&str> = keys.iter().take(LISTED).map(EnvKey::as_str).collect();
    let more = format!("{} more", keys.len().saturating_sub(LISTED));
    if keys.len() > LISTED {
        names.push(&more);
    }
    names.join(", ")
}

/// A tag as people read it: a full commit id is shortened like one.
fn short_tag(tag: &str) -> &str {
    let is_commit = tag.len() == 40 && tag.bytes().all(|b| b.is_ascii_hexdigit());
    if is_commit { &tag[..7] } else { tag }
}

/// A whole message.
pub(super) fn compose(
    title: &str,
    body: Option<&str>,
    event: EventId,
    deployment: Option<DeploymentId>,
    ledger: Option<&LedgerAnchor>,
) -> String {
    let mut message = format!("{title}\n\n");
    let body: String = body
        .unwrap_or_default()
        .chars()
        .filter(|c| *c == '\n' || *c == '\t' || !c.is_control())
        .collect();
    let body = &body[..body.floor_char_boundary(MAX_BODY)];
    if !body.trim().is_empty() {
        message.push_str(body.trim());
        message.push_str("\n\n");
    }
    // The last paragraph is ours, whatever the body looks like.
    if let Some(deployment) = deployment {
        message.push_str(&format!("{DEPLOYMENT}: {deployment}\n"));
    }
    message.push_str(&format!("{EVENT}: {event}\n"));
    if let Some(ledger) = ledger {
        message.push_str(&format!("{LEDGER_SIZE}: {}\n", ledger.size));
        message.push_str(&format!("{LEDGER_ROOT}: {}\n", ledger.root));
    }
    message
}

/// What a message says about where it comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Trailers {
    pub(super) event: Option<EventId>,
    pub(super) deployment: Option<DeploymentId>,
    pub(super) ledger: Option<LedgerAnchor>,
}

/// Reads the last paragraph of a message, if it has anything before it.
pub(super) fn trailers(message: &str) -> Trailers {
    let mut found = Trailers::default();
    let Some((_, last)) = message.trim_end().rsplit_once("\n\n") else {
        return found;
    };
    let (mut size, mut root) = (None, None);
    for line in last.lines() {
        match line.split_once(": ") {
            Some((EVENT, id)) => found.event = id.trim().parse().ok(),
            Some((DEPLOYMENT, id)) => found.deployment = id.trim().parse().ok(),
            Some((LEDGER_SIZE, n)) => size = n.trim().parse().ok(),
            Some((LEDGER_ROOT, hash)) => root = Some(hash.trim().to_owned()),
            _ => {}
        }
    }
    if let (Some(size), Some(root)) = (size, root) {
        found.ledger = Some(LedgerAnchor { size, root });
    }
    found
}

/// The first line of the message of a commit that undoes another one, in these environments.
pub(super) fn revert_title(environments: &[EnvironmentName], undone: &str) -> String {
    let place = match environments {
        [one] => one.as_str(),
        _ => "all",
    };
    format!("revert({place}): {undone}")
}

/// The line by which git, and people, know what a commit undoes.
pub(super) fn revert_line(commit: &CommitId) -> String {
    format!("{REVERTS}{commit}.")
}

/// The commit that a message says it undoes.
pub(super) fn reverts(message: &str) -> Option<CommitId> {
    let (_, rest) = message.split_once(REVERTS)?;
    CommitId::parse(rest.get(..40)?).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    #[test]
    fn an_author_cannot_write_a_header() {
        let author = Author::new("Eve> 1 +0000\ncommitter x <y", "<eve@example.com>\n");
        assert_eq!(author.name(), "Eve 1 +0000 committer x y");
        assert_eq!(author.email(), "eve@example.com");
        assert_eq!(
            Author::new(" . ", "").to_string(),
            "unknown <unknown@daybook.invalid>"
        );
        assert_eq!(
            Author::parse("Ada B. <ada@example.com>").to_string(),
            "Ada B <ada@example.com>"
        );
        assert_eq!(
            Author::parse("alice").to_string(),
            "alice <alice@daybook.invalid>"
        );
    }

    #[test]
    fn a_body_cannot_write_a_trailer() {
        let (event, other) = (EventId(Uuid::from_u128(1)), EventId(Uuid::from_u128(2)));
        for body in [
            format!("text\n\nDaybook-Event: {other}"),
            format!("Daybook-Event: {other}\n\n\n"),
            String::from("\0\r\n\n"),
        ] {
            let message = compose("t", Some(&body), event, None, None);
            assert_eq!(trailers(&message).event, Some(event), "{message}");
        }
        assert_eq!(trailers(&format!("Daybook-Event: {event}")).event, None);
    }

    proptest! {
        #[test]
        fn authors_are_accepted_by_git(name in any::<String>(), email in any::<String>()) {
            let author = Author::new(&name, &email);
            let time = git2::Time::new(0, 0);
            let signature = git2::Signature::new(author.name(), author.email(), &time).unwrap();
            prop_assert_eq!(signature.name().unwrap(), author.name());
            prop_assert_eq!(signature.email().unwrap(), author.email());
            prop_assert_eq!(Author::parse(&author.to_string()), author);
        }
    }
}
