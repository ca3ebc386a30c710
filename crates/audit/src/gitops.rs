//! Comparing GitOps repositories with what the ledger says of them, through a port: this crate
//! knows no git.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use daybook_events::gitops::GitopsEvent;
use daybook_events::{Event, Position};
use serde::Serialize;

use crate::finding::{Findings, Kind, Place};
use crate::source::Repository;

/// Compares one repository with its events.
pub trait CompareRepository: fmt::Debug + Send + Sync {
    /// The events are those of the project's `gitops` aggregate that counted, with their positions,
    /// in the order of the ledger, which vouches for them. The repository was copied when the ledger
    /// had `copied_at` entries at least, if that is known: a commit that was recorded by then has to
    /// be in it. An error says in a sentence why the repository cannot be read.
    fn compare(
        &self,
        repository: &Repository,
        copied_at: Option<u64>,
        events: &mut dyn Iterator<Item = (Position, GitopsEvent)>,
    ) -> Result<Compared, String>;
}

/// What a comparison came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Compared {
    /// Whose repository it is.
    pub project: String,
    /// Commits on its branch.
    pub commits: u64,
    /// Those of them that Daybook made.
    pub own: u64,
    /// Those that others made, and that the ledger records as such.
    pub foreign: u64,
    /// Those of Daybook's that no signature protects, because they are older than its keys.
    pub unsigned: u64,
    /// Commits of the ledger that are not in the copy, and that may have been made after it.
    pub newer: u64,
    /// Where repository and ledger differ.
    #[serde(skip)]
    pub differences: Vec<Difference>,
}

/// A difference between a repository and the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// What kind.
    pub kind: Kind,
    /// The commit.
    pub commit: String,
    /// What is wrong, in a sentence.
    pub message: String,
}

/// So many bytes are written at once.
const UNWRITTEN: usize = 256 << 10;

/// The events of the repositories that came with a ledger, in a file without a name.
#[derive(Debug)]
pub(crate) struct Spool {
    /// Whose repositories came.
    came: BTreeSet<String>,
    file: File,
    /// How long the file is.
    len: u64,
    /// What comes behind that.
    unwritten: Vec<u8>,
    /// Of each project that has such events, where they are; nowhere without its repository.
    places: BTreeMap<String, Vec<(Position, u64, u32)>>,
}

impl Spool {
    pub(crate) fn new(came: impl Iterator<Item = String>) -> io::Result<Self> {
        Ok(Self {
            came: came.collect(),
            file: tempfile::tempfile()?,
            len: 0,
            unwritten: Vec::new(),
            places: BTreeMap::new(),
        })
    }

    /// Adds an event of a project.
    pub(crate) fn add(
        &mut self,
        project: &str,
        position: Position,
        event: &[u8],
    ) -> io::Result<()> {
        if !self.came.contains(project) {
            if !self.places.contains_key(project) {
                self.places.insert(project.to_owned(), Vec::new());
            }
            return Ok(());
        }
        let at = self.len + self.unwritten.len() as u64;
        let place = (position, at, event.len() as u32);
        self.unwritten.extend_from_slice(event);
        match self.places.get_mut(project) {
            Some(places) => places.push(place),
            None => {
                self.places.insert(project.to_owned(), vec![place]);
            }
        }
        if self.unwritten.len() > UNWRITTEN {
            self.write()?;
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.unwritten, self.len)?;
        self.len += self.unwritten.len() as u64;
        self.unwritten.clear();
        Ok(())
    }

    /// Compares all repositories that came with a ledger.
    pub(crate) fn compare(
        &mut self,
        repositories: &[Repository],
        copied_at: Option<u64>,
        by: &dyn CompareRepository,
        findings: &mut Findings,
    ) -> io::Result<Vec<Compared>> {
        self.write()?;
        let mut all = Vec::new();
        for project in self.places.keys() {
            if !repositories.iter().any(|r| r.project == *project) {
                let message = format!(
                    "the ledger has commits of {project}, whose repository did not come with it"
                );
                findings.push(Kind::RepositoryMissing, Place::default(), message);
            }
        }
        for repository in repositories {
            let project = &repository.project;
            let places = self.places.get(project).map_or(&[][..], Vec::as_slice);
            let mut trouble = None;
            let mut events = places.iter().map_while(|(position, at, len)| {
                let mut bytes = vec![0; *len as usize];
                if let Err(e) = self.file.read_exact_at(&mut bytes, *at) {
                    trouble = Some(e);
                    return None;
                }
                // They were read before, or they would not be here.
                let event = Event::from_bytes(&bytes).ok()?.payload().ok()?;
                Some((*position, event))
            });
            let compared = by.compare(repository, copied_at, &mut events);
            if let Some(e) = trouble {
                return Err(e);
            }
            let place = || Place::file(format!("gitops/{project}.bundle"));
            match compared {
                Err(why) => findings.push(Kind::RepositoryUnreadable, place(), why),
                Ok(mut compared) => {
                    compared.project.clone_from(project);
                    if compared.newer > 0 {
                        let message = format!(
                            "{} commits of the ledger are not in this copy: it may be older than they are",
                            compared.newer
                        );
                        findings.push(Kind::RepositoryBehind, place(), message);
                    }
                    for difference in std::mem::take(&mut compared.differences) {
                        let message =
                            format!("commit {}: {}", difference.commit, difference.message);
                        findings.push(difference.kind, place(), message);
                    }
                    all.push(compared);
                }
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use daybook_events::testing::fleet::{Fleet, Size, choices};

    use super::*;

    /// Counts the events that it is given.
    #[derive(Debug)]
    struct Count;

    impl CompareRepository for Count {
        fn compare(
            &self,
            _: &Repository,
            _: Option<u64>,
            events: &mut dyn Iterator<Item = (Position, GitopsEvent)>,
        ) -> Result<Compared, String> {
            Ok(Compared {
                commits: events.count() as u64,
                ..Compared::default()
            })
        }
    }

    #[test]
    fn events_are_kept_for_the_repositories_that_came_and_others_are_missed() {
        let mut fleet = Fleet::new(Size::default());
        let mut choose = choices(2);
        let all = std::iter::repeat_with(|| fleet.next(&mut choose).bytes);
        let is_gitops = |bytes: &[u8]| {
            let event = Event::from_bytes(bytes).unwrap();
            event.kind.starts_with("dev.daybook.gitops.")
        };
        let events: Vec<_> = all.filter(|bytes| is_gitops(bytes)).take(900).collect();
        let mut spool = Spool::new(["shop".to_owned()].into_iter()).unwrap();
        for event in &events {
            spool.add("shop", Position(1), event).unwrap();
            spool.add("bank", Position(2), event).unwrap();
        }
        let kept: usize = events.iter().map(|event| event.len()).sum();
        let repository = |project: &str| Repository {
            project: project.to_owned(),
            bundle: PathBuf::new(),
            allowed_signers: None,
        };
        let mut findings = Findings::default();
        let compared = spool
            .compare(&[repository("shop")], None, &Count, &mut findings)
            .unwrap();
        assert!(kept > UNWRITTEN);
        assert_eq!(spool.len, kept as u64);
        assert_eq!(compared.len(), 1);
        assert_eq!(
            (compared[0].project.as_str(), compared[0].commits),
            ("shop", 900)
        );
        assert_eq!(findings.count(Kind::RepositoryMissing), 1);
        let missing = findings.list().next().unwrap();
        assert!(missing.message.contains("commits of bank"), "{missing:?}");
    }
}
