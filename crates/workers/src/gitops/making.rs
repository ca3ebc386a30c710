//! Making commits in memory, each on top of the one before.

use std::collections::BTreeMap;
use std::sync::Arc;

use daybook_events::spec::PinnedImage;
use daybook_events::{EnvironmentName, EventId, ProjectName, ServiceName};
use git2::{ObjectType, Oid, Repository};
use jiff::Timestamp;

use super::change::{self, After, CannotChange, Change};
use super::history::{self, commit_id};
use super::message::{self, ALLOWED_SIGNERS, Author, CHECKPOINT};
use super::repository::{CommitRequest, Committed, RevertRequest, Witness, digest_of, find};
use super::signing::{SigningKey, allowed_signers};
use super::staged::{Edits, Lately, Staged, ValuesFile};
use super::{GitopsError, chart, survey, template};
use crate::git_transport::printable;
use crate::values::{CHART, EnvironmentValues};

/// How many commits are looked through for the image that a service had before.
const IMAGE_MEMORY: usize = 500;

/// What a request came to.
pub(super) enum Made {
    /// A commit.
    Commit(Box<Committed>),
    /// All is as it should be already. This would have been the title.
    Nothing { title: String },
}

/// Commits that are made on a base and are nowhere but here.
pub(super) struct Making<'a> {
    project: &'a ProjectName,
    key: Option<&'a SigningKey>,
    repository: &'a Repository,
    staged: Staged<'a>,
    tip: Option<Tip>,
    commits: Vec<(EventId, Oid)>,
}

/// What the next commit is made on.
#[derive(Debug, Clone, Copy)]
struct Tip {
    commit: Oid,
    tree: Oid,
    ordinal: u64,
}

impl<'a> Making<'a> {
    /// Commits on `base`, a commit with its place in history; without one, the first commit.
    pub(super) fn on(
        base: Option<(Oid, u64)>,
        repository: &'a Repository,
        project: &'a ProjectName,
        key: Option<&'a SigningKey>,
        lately: Lately,
    ) -> Result<Self, GitopsError> {
        let mut staged = Staged::new(repository, lately)?;
        let tip = match base {
            Some((commit, ordinal)) => Some(Tip {
                commit,
                tree: staged.tree_of(commit)?.0,
                ordinal,
            }),
            None => None,
        };
        Ok(Self {
            project,
            key,
            repository,
            staged,
            tip,
            commits: Vec::new(),
        })
    }

    /// The commits that were made, with the events that caused them.
    pub(super) fn commits(&self) -> &[(EventId, Oid)] {
        &self.commits
    }

    /// Where the branch is to be moved.
    pub(super) fn tip(&self) -> Option<Oid> {
        self.tip.map(|tip| tip.commit)
    }

    /// How much is to be written, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.staged.bytes()
    }

    /// The objects to be written, and what is worth keeping for the next time.
    pub(super) fn into_staged(self) -> Staged<'a> {
        self.staged
    }

    /// The first commit of a project.
    pub(super) fn begin(&mut self) -> Result<(), GitopsError> {
        let mut edits = Edits::default();
        for (path, content) in template::files(self.project) {
            self.put(&mut edits, &path, content.as_bytes())?;
        }
        if let Some(key) = self.key {
            let text = allowed_signers([key.signer()?.public_key.as_str()]);
            self.put(&mut edits, ALLOWED_SIGNERS, text.as_bytes())?;
        }
        let empty = self.staged.add(ObjectType::Tree, b"")?;
        let tree = self.staged.edit(empty, &edits)?;
        let message = format!("init: {}\n", self.project);
        let (commit, _) =
            self.write_commit(&Author::daybook(), Timestamp::now(), &message, tree)?;
        let ordinal = 1;
        self.tip = Some(Tip {
            commit,
            tree,
            ordinal,
        });
        Ok(())
    }

    /// Makes what is asked for on top of all that was made. What fails leaves nothing behind.
    pub(super) fn change(&mut self, request: &CommitRequest) -> Result<Made, GitopsError> {
        let begun = self.staged.len();
        let made = self.try_change(request);
        if !matches!(made, Ok(Made::Commit(_))) {
            self.staged.truncate(begun);
        }
        made
    }

    /// The same for undoing a commit. What it is made on must be written already.
    pub(super) fn revert(&mut self, request: &RevertRequest) -> Result<Made, GitopsError> {
        let begun = self.staged.len();
        let made = self.try_revert(request);
        if made.is_err() {
            self.staged.truncate(begun);
        }
        made
    }

    fn base(&self) -> Result<Tip, GitopsError> {
        let missing = || git2::Error::from_str("a change of nothing");
        Ok(self.tip.ok_or_else(missing)?)
    }

    fn put(&mut self, edits: &mut Edits, path: &str, content: &[u8]) -> Result<(), GitopsError> {
        edits.put(path, self.staged.add(ObjectType::Blob, content)?);
        Ok(())
    }

    fn try_change(&mut self, request: &CommitRequest) -> Result<Made, GitopsError> {
        let base = self.base()?;
        let environment = &request.environment;
        let current = self.values(base.commit, base.tree, environment)?;
        let other = match request.change.reads() {
            Some(name) => self.values(base.commit, base.tree, name)?,
            None => None,
        };
        let mut changed = change::make(
            &request.change,
            EnvironmentValues::new(self.project.clone(), environment.clone(), false),
            current.as_ref().map(|file| &file.values),
            other.as_ref().map(|file| &file.values),
        )
        .map_err(|why| cannot(why, request))?;
        if let (Change::Remove { service, .. }, After::Values(values)) =
            (&request.change, &mut changed.after)
        {
            self.settle_image(base, environment, service, values)?;
        }
        let tag = changed.tag.as_deref();
        let title = message::title(environment, &request.change, tag);
        let path = values_path(environment);
        let mut edits = Edits::default();
        match (changed.after, &current) {
            (After::AsBefore, _) => return Ok(Made::Nothing { title }),
            (After::Values(values), Some(before)) if before.values == values => {
                return Ok(Made::Nothing { title });
            }
            (After::Values(values), current) => {
                let text = match current {
                    Some(before) => values.to_yaml_over(&before.text, &before.values),
                    None => values.to_yaml(),
                };
                let at = commit_id(base.commit)?;
                let text = text.map_err(|e| GitopsError::InvalidValues {
                    path: path.clone(),
                    commit: at,
                    reason: e.to_string(),
                })?;
                let blob = self.staged.add(ObjectType::Blob, text.as_bytes())?;
                self.staged
                    .keep_values(blob, Arc::new(ValuesFile { values, text }));
                edits.put(&path, blob);
            }
            (After::Deleted, _) => {
                let folder = format!("environments/{environment}");
                if self.staged.at(base.tree, &folder)?.is_none() {
                    return Ok(Made::Nothing { title });
                }
                edits.remove(&folder);
            }
        }
        self.furnish(base.tree, &mut edits)?;
        self.renew(base.tree, &mut edits)?;
        self.witness(base.tree, &request.witness, &mut edits)?;
        let tree = self.staged.edit(base.tree, &edits)?;
        if let Change::DeployChart { .. } = &request.change {
            self.check_prints_charts(tree)?;
        }
        let body = request.body.clone().or(message::body(&request.change, tag));
        let text = message::compose(
            &title,
            body.as_deref(),
            request.event,
            request.change.deployment(),
            request.witness.ledger.as_ref().map(|l| &l.anchor),
        );
        let (author, at) = (&request.author, request.at);
        self.commit(request.event, author, at, text, tree, &request.witness)
    }

    fn try_revert(&mut self, request: &RevertRequest) -> Result<Made, GitopsError> {
        let base = self.base()?;
        let repository = self.repository;
        let commit = request.commit.clone();
        let undone = repository.find_commit(find(repository, &commit)?)?;
        if undone.parent_count() > 1 {
            return Err(GitopsError::RevertOfMerge { commit });
        }
        let on = repository.find_commit(base.commit)?;
        let mut index = repository.revert_commit(&undone, &on, 0, None)?;
        if index.has_conflicts() {
            let paths = conflicts(&index)?;
            return Err(GitopsError::RevertConflicts { commit, paths });
        }
        let reverted = repository.find_tree(index.write_tree_to(repository)?)?;
        // A chart that was renewed is not taken back with what it was renewed with.
        let mut edits = Edits::default();
        self.renew(reverted.id(), &mut edits)?;
        let renewed = self.staged.edit(reverted.id(), &edits)?;
        if [reverted.id(), renewed].contains(&base.tree) {
            return Err(GitopsError::NothingToRevert { commit });
        }
        let difference = repository.diff_tree_to_tree(Some(&on.tree()?), Some(&reverted), None)?;
        let environments = survey::environments(difference.deltas());
        let mut edits = Edits::default();
        self.witness(base.tree, &request.witness, &mut edits)?;
        let tree = self.staged.edit(renewed, &edits)?;
        let line = message::revert_line(&commit);
        let body = match request.reason.as_deref().map(str::trim) {
            None | Some("") => line,
            Some(reason) => format!("{reason}\n\n{line}"),
        };
        let undone = format!("{} {}", commit.short(), history::title_of(&undone));
        let text = message::compose(
            &message::revert_title(&environments, undone.trim_end()),
            Some(&body),
            request.event,
            None,
            request.witness.ledger.as_ref().map(|l| &l.anchor),
        );
        let (author, at) = (&request.author, request.at);
        self.commit(request.event, author, at, text, tree, &request.witness)
    }

    /// Makes a commit of a tree, which the next one is made on.
    fn commit(
        &mut self,
        event: EventId,
        author: &Author,
        at: Timestamp,
        message: String,
        tree: Oid,
        witness: &Witness,
    ) -> Result<Made, GitopsError> {
        let base = self.base()?;
        let files = self.staged.files_between(Some(base.tree), Some(tree))?;
        let (commit, signer) = self.write_commit(author, at, &message, tree)?;
        let ordinal = base.ordinal + 1;
        self.tip = Some(Tip {
            commit,
            tree,
            ordinal,
        });
        self.commits.push((event, commit));
        Ok(Made::Commit(Box::new(Committed {
            commit: commit_id(commit)?,
            parent: Some(commit_id(base.commit)?),
            tree: tree.to_string(),
            title: printable(message.lines().next().unwrap_or_default()),
            message,
            author: printable(&author.to_string()),
            files_digest: digest_of(&files),
            files,
            ordinal,
            ledger: witness.ledger.as_ref().map(|l| l.anchor.clone()),
            signer,
            found: false,
            unchanged: false,
        })))
    }

    /// A commit object on top of what was made, signed if there is a key, and with whose key.
    fn write_commit(
        &mut self,
        author: &Author,
        at: Timestamp,
        message: &str,
        tree: Oid,
    ) -> Result<(Oid, Option<String>), GitopsError> {
        let parent = match self.tip {
            Some(tip) => format!("parent {}\n", tip.commit),
            None => String::new(),
        };
        let (committer, at) = (Author::daybook(), at.as_second());
        let now = Timestamp::now().as_second();
        let header = format!(
            "tree {tree}\n{parent}author {author} {at} +0000\ncommitter {committer} {now} +0000\n"
        );
        let text = format!("{header}\n{message}");
        let Some(key) = self.key else {
            return Ok((self.staged.add(ObjectType::Commit, text.as_bytes())?, None));
        };
        let key = key.load()?;
        let signature = key.sign(&text).map_err(GitopsError::Signing)?;
        let signature = signature.trim_end().replace('\n', "\n ");
        let text = format!("{header}gpgsig {signature}\n\n{message}");
        let commit = self.staged.add(ObjectType::Commit, text.as_bytes())?;
        Ok((commit, Some(key.signer.fingerprint.clone())))
    }

    /// Puts in what every repository begins with, where a remote brought a history of its own that
    /// has nothing of it: a README and a licence, as forges make them.
    fn furnish(&mut self, tree: Oid, edits: &mut Edits) -> Result<(), GitopsError> {
        for there in ["base", "environments"] {
            if self.staged.at(tree, there)?.is_some() {
                return Ok(());
            }
        }
        for (path, content) in template::files(self.project) {
            if self.staged.at(tree, &path)?.is_none() {
                self.put(edits, &path, content.as_bytes())?;
            }
        }
        Ok(())
    }

    /// Puts in the chart as it is now, where Daybook has put in an earlier one and nobody has changed
    /// it since.
    fn renew(&mut self, tree: Oid, edits: &mut Edits) -> Result<(), GitopsError> {
        let folder = format!("base/charts/{CHART}");
        let there = self.staged.at(tree, &folder)?;
        let there = there.map(|there| there.id.to_string());
        if !there.is_some_and(|there| chart::EARLIER.contains(&there.as_str())) {
            return Ok(());
        }
        for (path, content) in chart::chart_files() {
            self.put(edits, &format!("{folder}/{path}"), content.as_bytes())?;
        }
        Ok(())
    }

    /// Refuses a tree whose chart makes nothing of a release of a chart: whoever applies what the repository
    /// says would make nothing, and it would be waited for.
    fn check_prints_charts(&mut self, tree: Oid) -> Result<(), GitopsError> {
        let folder = format!("base/charts/{CHART}");
        // Who has none applies what the repository says in a way of their own.
        if self.staged.at(tree, &folder)?.is_none() {
            return Ok(());
        }
        let path = chart::OF_CHARTS;
        match self.staged.at(tree, &format!("{folder}/{path}"))? {
            Some(_) => Ok(()),
            None => Err(GitopsError::ChartOutdated { path }),
        }
    }

    /// Puts in what the commit witnesses of the ledger.
    fn witness(
        &mut self,
        tree: Oid,
        witness: &Witness,
        edits: &mut Edits,
    ) -> Result<(), GitopsError> {
        if let Some(ledger) = &witness.ledger {
            self.put(edits, CHECKPOINT, &ledger.checkpoint)?;
        }
        if let Some(signers) = signers(self.key, witness)? {
            let text = allowed_signers(signers.iter().map(String::as_str));
            let id = Oid::hash_object(ObjectType::Blob, text.as_bytes())?;
            let there = self.staged.at(tree, ALLOWED_SIGNERS)?;
            if there.is_none_or(|there| there.id != id) {
                self.put(edits, ALLOWED_SIGNERS, text.as_bytes())?;
            }
        }
        Ok(())
    }

    /// What a service was deployed with last, after a release was removed: if none that is left has
    /// that image, the newest one before that one of them has. A deployment that failed so leaves
    /// nothing behind that could be promoted.
    fn settle_image(
        &mut self,
        base: Tip,
        environment: &EnvironmentName,
        service: &ServiceName,
        values: &mut EnvironmentValues,
    ) -> Result<(), GitopsError> {
        let Some(left) = values.services.get_mut(service) else {
            return Ok(());
        };
        let runs = |image: &PinnedImage| left.releases.values().any(|r| r.image == *image);
        if left.image.as_ref().is_none_or(runs) {
            return Ok(());
        }
        let path = values_path(environment);
        let mut found = None;
        let mut at = (!left.releases.is_empty()).then_some(base.commit);
        let mut seen = None;
        for _ in 0..IMAGE_MEMORY {
            let Some(commit) = at else { break };
            let (tree, parent) = self.staged.tree_of(commit)?;
            at = parent;
            let blob = self.staged.at(tree, &path)?.map(|file| file.id);
            if blob == seen {
                continue;
            }
            seen = blob;
            // Somebody may have broken it then.
            if let Ok(Some(then)) = self.values(commit, tree, environment)
                && let Some(image) = then
                    .values
                    .services
                    .get(service)
                    .and_then(|s| s.image.clone())
                && runs(&image)
            {
                found = Some(image);
                break;
            }
        }
        left.image = found.or_else(|| left.releases.values().next().map(|r| r.image.clone()));
        Ok(())
    }

    /// An environment's values in the tree of a commit; none if it is not there.
    fn values(
        &mut self,
        commit: Oid,
        tree: Oid,
        environment: &EnvironmentName,
    ) -> Result<Option<Arc<ValuesFile>>, GitopsError> {
        let path = values_path(environment);
        let Some(at) = self.staged.at(tree, &path)? else {
            return Ok(None);
        };
        let commit = commit_id(commit)?;
        let invalid = |reason: String| GitopsError::InvalidValues {
            path: path.clone(),
            commit: commit.clone(),
            reason,
        };
        if !at.is_file {
            return Err(invalid("it is no file".into()));
        }
        let file = match self.staged.values(at.id) {
            Some(file) => file,
            None => {
                let content = self.staged.read(at.id)?;
                let text = std::str::from_utf8(&content)
                    .map_err(|_| invalid("it is not UTF-8".into()))?
                    .to_owned();
                let values =
                    EnvironmentValues::from_yaml(&text).map_err(|e| invalid(e.to_string()))?;
                let file = Arc::new(ValuesFile { values, text });
                self.staged.keep_values(at.id, file.clone());
                file
            }
        };
        let EnvironmentValues {
            project,
            environment: said,
            ..
        } = &file.values;
        if project != self.project || said != environment {
            return Err(invalid(format!("it says that it is {project}/{said}")));
        }
        Ok(Some(file))
    }

    /// The desired state of an environment at the base.
    pub(super) fn read_environment(
        &mut self,
        environment: &EnvironmentName,
    ) -> Result<Option<EnvironmentValues>, GitopsError> {
        let base = self.base()?;
        let file = self.values(base.commit, base.tree, environment)?;
        Ok(file.map(|file| file.values.clone()))
    }
}

/// The keys whose signatures count; none if nothing is signed here.
pub(super) fn signers(
    key: Option<&SigningKey>,
    witness: &Witness,
) -> Result<Option<Vec<String>>, GitopsError> {
    let Some(key) = key else {
        return Ok(None);
    };
    let mut signers = witness.signers.clone();
    let own = key.signer()?.public_key;
    if !signers.contains(&own) {
        signers.push(own);
    }
    Ok(Some(signers))
}

/// What is reported of a request that found all as it should be, of the commit that has it so.
pub(super) fn unchanged(has_it: Committed, title: String, author: &Author) -> Committed {
    Committed {
        message: title.clone(),
        title,
        author: author.to_string(),
        files: BTreeMap::new(),
        files_digest: digest_of(&BTreeMap::new()),
        unchanged: true,
        ..has_it
    }
}

fn conflicts(index: &git2::Index) -> Result<Vec<String>, GitopsError> {
    let mut paths = Vec::new();
    for conflict in index.conflicts()? {
        let conflict = conflict?;
        let entry = conflict.our.or(conflict.their).or(conflict.ancestor);
        if let Some(entry) = entry {
            paths.push(printable(&String::from_utf8_lossy(&entry.path)));
        }
    }
    paths.dedup();
    Ok(paths)
}

fn cannot(why: CannotChange, request: &CommitRequest) -> GitopsError {
    let environment = request.environment.clone();
    match (why, &request.change) {
        (
            CannotChange::ReleaseMissing,
            Change::Scale {
                service,
                deployment,
                ..
            }
            | Change::Configure {
                service,
                deployment,
                ..
            },
        ) => GitopsError::ReleaseMissing {
            environment,
            service: service.clone(),
            deployment: *deployment,
        },
        (CannotChange::NothingToPromote, Change::Promote { from, service, .. }) => {
            GitopsError::NothingToPromote {
                from: from.clone(),
                service: service.clone(),
            }
        }
        (
            CannotChange::EnvironmentMissing,
            Change::CreateEnvironment {
                from: Some(from), ..
            },
        ) => GitopsError::EnvironmentMissing {
            environment: from.clone(),
        },
        _ => GitopsError::EnvironmentMissing { environment },
    }
}

fn values_path(environment: &EnvironmentName) -> String {
    format!("environments/{environment}/values.yaml")
}
