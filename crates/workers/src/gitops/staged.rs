//! What is made of a repository in memory, before it is written: new objects above those that are
//! there.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use daybook_events::Digest;
use git2::{ErrorClass, ErrorCode, ObjectType, Odb, Oid, Repository};

use super::pack::NewObject;
use crate::git_transport::printable;
use crate::values::EnvironmentValues;

/// How much is kept of what was read and made lately, in bytes.
const KEPT: usize = 16 << 20;

/// The modes of what Daybook puts into trees.
const FOLDER: &[u8] = b"40000";
const FILE: &[u8] = b"100644";
/// The mode of a submodule.
const SUBMODULE: &[u8] = b"160000";

/// A values file as it was read or written.
#[derive(Debug)]
pub(super) struct ValuesFile {
    pub(super) values: EnvironmentValues,
    pub(super) text: String,
}

/// What was read and made lately. An object never changes, so that it is good for ever; that it is
/// here says nothing about whether it is on the disk.
#[derive(Debug, Default)]
pub(super) struct Lately {
    objects: HashMap<Oid, Arc<[u8]>>,
    values: HashMap<Oid, Arc<ValuesFile>>,
    bytes: usize,
}

impl Lately {
    fn make_room(&mut self, bytes: usize) {
        if self.bytes + bytes > KEPT {
            *self = Self::default();
        }
        self.bytes += bytes;
    }
}

/// Objects above those of a repository.
pub(super) struct Staged<'r> {
    odb: Odb<'r>,
    lately: Lately,
    new: Vec<NewObject>,
    known: HashSet<Oid>,
    bytes: usize,
}

impl<'r> Staged<'r> {
    pub(super) fn new(repository: &'r Repository, lately: Lately) -> Result<Self, git2::Error> {
        Ok(Self {
            odb: repository.odb()?,
            lately,
            new: Vec::new(),
            known: HashSet::new(),
            bytes: 0,
        })
    }

    /// What is to be written, and what is worth keeping for the next time.
    pub(super) fn into_parts(self) -> (Vec<NewObject>, Lately) {
        (self.new, self.lately)
    }

    /// How many objects there are to be written.
    pub(super) fn len(&self) -> usize {
        self.new.len()
    }

    /// How much is to be written, in bytes before it is compressed.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Forgets the objects after the first `len`.
    pub(super) fn truncate(&mut self, len: usize) {
        for object in self.new.drain(len..) {
            self.known.remove(&object.id);
            self.bytes -= object.content.len();
        }
    }

    pub(super) fn read(&mut self, id: Oid) -> Result<Arc<[u8]>, git2::Error> {
        if let Some(content) = self.lately.objects.get(&id) {
            return Ok(content.clone());
        }
        let content: Arc<[u8]> = self.odb.read(id)?.data().into();
        self.keep(id, &content);
        Ok(content)
    }

    pub(super) fn add(&mut self, kind: ObjectType, content: &[u8]) -> Result<Oid, git2::Error> {
        let id = Oid::hash_object(kind, content)?;
        // One that the repository has may be one that nothing refers to and that is cleared away
        // at this moment. So it is written again.
        if self.known.insert(id) {
            let content: Arc<[u8]> = content.into();
            self.keep(id, &content);
            self.bytes += content.len();
            self.new.push(NewObject { id, kind, content });
        }
        Ok(id)
    }

    fn keep(&mut self, id: Oid, content: &Arc<[u8]>) {
        self.lately.make_room(content.len() + 64);
        self.lately.objects.insert(id, content.clone());
    }

    /// The values of a file, if it was read or written lately.
    pub(super) fn values(&self, id: Oid) -> Option<Arc<ValuesFile>> {
        self.lately.values.get(&id).cloned()
    }

    pub(super) fn keep_values(&mut self, id: Oid, file: Arc<ValuesFile>) {
        // Parsed, it takes a few times as much as its text.
        self.lately.make_room(4 * file.text.len());
        self.lately.values.insert(id, file);
    }

    /// The tree of a commit, and its first parent.
    pub(super) fn tree_of(&mut self, commit: Oid) -> Result<(Oid, Option<Oid>), git2::Error> {
        let content = self.read(commit)?;
        let line = |at: usize, name: &[u8]| -> Option<Oid> {
            let rest = content.get(at..)?.strip_prefix(name)?;
            Oid::from_str(std::str::from_utf8(rest.get(..40)?).ok()?).ok()
        };
        let tree =
            line(0, b"tree ").ok_or_else(|| odd(format!("{commit} is no commit with a tree")))?;
        Ok((tree, line(46, b"parent ")))
    }

    /// What is at a path: none if nothing is.
    pub(super) fn at(&mut self, tree: Oid, path: &str) -> Result<Option<At>, git2::Error> {
        let (name, rest) = match path.split_once('/') {
            Some((name, rest)) => (name, Some(rest)),
            None => (path, None),
        };
        let content = self.read(tree)?;
        let found = entries(&content)?
            .into_iter()
            .find(|e| e.name == name.as_bytes());
        match (found, rest) {
            (Some(entry), Some(rest)) if entry.is_folder() => self.at(entry.id, rest),
            (_, Some(_)) => Ok(None),
            (found, None) => Ok(found.map(|entry| At {
                id: entry.id,
                is_file: !entry.is_folder() && entry.mode != SUBMODULE,
            })),
        }
    }

    /// A tree with some paths changed: to a file, or to nothing. Folders are made where they are
    /// missing, and go where nothing remains in them.
    pub(super) fn edit(&mut self, tree: Oid, edits: &Edits) -> Result<Oid, git2::Error> {
        match self.edit_folder(Some(tree), &edits.0)? {
            Some(edited) => Ok(edited),
            None => self.add(ObjectType::Tree, b""),
        }
    }

    fn edit_folder(
        &mut self,
        tree: Option<Oid>,
        edits: &BTreeMap<String, Edit>,
    ) -> Result<Option<Oid>, git2::Error> {
        let content = match tree {
            Some(tree) => self.read(tree)?,
            None => Arc::from(&b""[..]),
        };
        let mut entries = entries(&content)?;
        for (name, edit) in edits {
            let at = entries.iter().position(|e| e.name == name.as_bytes());
            let before = at.map(|at| entries.remove(at));
            let (mode, id) = match edit {
                Edit::File(id) => (FILE, Some(*id)),
                Edit::Removed => (FILE, None),
                Edit::Folder(edits) => {
                    let before = match before {
                        Some(entry) if entry.is_folder() => Some(entry.id),
                        Some(_) => return Err(odd(format!("{name} is no folder"))),
                        None => None,
                    };
                    (FOLDER, self.edit_folder(before, edits)?)
                }
            };
            if let Some(id) = id {
                let name = name.as_bytes();
                let entry = RawEntry { mode, name, id };
                let at = entries.partition_point(|e| e.place().lt(entry.place()));
                entries.insert(at, entry);
            }
        }
        if entries.is_empty() {
            return Ok(None);
        }
        let mut bytes = Vec::with_capacity(content.len() + 64 * edits.len());
        for entry in &entries {
            bytes.extend_from_slice(entry.mode);
            bytes.push(b' ');
            bytes.extend_from_slice(entry.name);
            bytes.push(0);
            bytes.extend_from_slice(entry.id.as_bytes());
        }
        self.add(ObjectType::Tree, &bytes).map(Some)
    }

    /// The files that differ between two trees, with the SHA-256 of each new content; none for one
    /// that is there no more.
    pub(super) fn files_between(
        &mut self,
        before: Option<Oid>,
        after: Option<Oid>,
    ) -> Result<BTreeMap<String, Option<Digest>>, git2::Error> {
        let mut found = BTreeMap::new();
        self.compare("", before, after, &mut found)?;
        Ok(found)
    }

    fn compare(
        &mut self,
        folder: &str,
        before: Option<Oid>,
        after: Option<Oid>,
        found: &mut BTreeMap<String, Option<Digest>>,
    ) -> Result<(), git2::Error> {
        let before = before.map(|id| self.read(id)).transpose()?;
        let after = after.map(|id| self.read(id)).transpose()?;
        let (before, after) = (by_name(before.as_deref())?, by_name(after.as_deref())?);
        let names: BTreeSet<&[u8]> = before.keys().chain(after.keys()).copied().collect();
        for name in names {
            let (old, new) = (before.get(name), after.get(name));
            if old == new {
                continue;
            }
            let path = format!("{folder}{}", String::from_utf8_lossy(name));
            let folder_of = |entry: Option<&(&[u8], Oid)>| {
                entry.filter(|(mode, _)| *mode == FOLDER).map(|(_, id)| *id)
            };
            let (old_folder, new_folder) = (folder_of(old), folder_of(new));
            if old_folder.is_some() || new_folder.is_some() {
                self.compare(&format!("{path}/"), old_folder, new_folder, found)?;
            }
            let path = printable(&path);
            match new {
                Some((mode, _)) if *mode == FOLDER => {}
                // It has no content here.
                Some((mode, id)) if *mode == SUBMODULE => {
                    found.insert(path, Some(Digest::of(id.as_bytes())));
                }
                Some((_, id)) => {
                    let digest = Digest::of(&self.read(*id)?);
                    found.insert(path, Some(digest));
                }
                None if old_folder.is_none() => {
                    found.insert(path, None);
                }
                None => {}
            }
            // A file that a folder takes the place of is gone.
            if new_folder.is_some() && old.is_some() && old_folder.is_none() {
                let path = printable(&format!("{folder}{}", String::from_utf8_lossy(name)));
                found.insert(path, None);
            }
        }
        Ok(())
    }
}

/// What is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct At {
    pub(super) id: Oid,
    pub(super) is_file: bool,
}

/// Changes of some paths of a tree.
#[derive(Debug, Default)]
pub(super) struct Edits(BTreeMap<String, Edit>);

#[derive(Debug)]
enum Edit {
    File(Oid),
    Removed,
    Folder(BTreeMap<String, Edit>),
}

impl Edits {
    /// Has a file with this content at a path.
    pub(super) fn put(&mut self, path: &str, content: Oid) {
        self.set(path, Edit::File(content));
    }

    /// Has nothing at a path.
    pub(super) fn remove(&mut self, path: &str) {
        self.set(path, Edit::Removed);
    }

    fn set(&mut self, path: &str, edit: Edit) {
        let mut folder = &mut self.0;
        let mut rest = path;
        while let Some((name, below)) = rest.split_once('/') {
            let inner = folder
                .entry(name.to_owned())
                .or_insert_with(|| Edit::Folder(BTreeMap::new()));
            if !matches!(inner, Edit::Folder(_)) {
                *inner = Edit::Folder(BTreeMap::new());
            }
            let Edit::Folder(inner) = inner else { return };
            (folder, rest) = (inner, below);
        }
        folder.insert(rest.to_owned(), edit);
    }
}

/// A line of a tree.
#[derive(Debug, Clone, Copy)]
struct RawEntry<'a> {
    mode: &'a [u8],
    name: &'a [u8],
    id: Oid,
}

impl<'a> RawEntry<'a> {
    fn is_folder(&self) -> bool {
        self.mode == FOLDER
    }

    /// Git sorts a folder as if its name ended with a slash.
    fn place(&self) -> impl Iterator<Item = u8> + 'a {
        let slash: &[u8] = if self.is_folder() { b"/" } else { b"" };
        self.name.iter().chain(slash).copied()
    }
}

fn entries(tree: &[u8]) -> Result<Vec<RawEntry<'_>>, git2::Error> {
    let broken = || odd("a tree that is none".to_owned());
    let mut found = Vec::with_capacity(tree.len() / 32);
    let mut rest = tree;
    while !rest.is_empty() {
        let space = rest.iter().position(|b| *b == b' ').ok_or_else(broken)?;
        let end = rest.iter().position(|b| *b == 0).ok_or_else(broken)?;
        let id = rest.get(end + 1..end + 21).ok_or_else(broken)?;
        found.push(RawEntry {
            mode: rest.get(..space).ok_or_else(broken)?,
            name: rest.get(space + 1..end).ok_or_else(broken)?,
            id: Oid::from_bytes(id)?,
        });
        rest = &rest[end + 21..];
    }
    Ok(found)
}

/// The modes and ids of a tree's entries.
type ByName<'a> = BTreeMap<&'a [u8], (&'a [u8], Oid)>;

/// The entries of a tree; none of one that is not there.
fn by_name(tree: Option<&[u8]>) -> Result<ByName<'_>, git2::Error> {
    let entries = entries(tree.unwrap_or_default())?;
    Ok(entries
        .into_iter()
        .map(|e| (e.name, (e.mode, e.id)))
        .collect())
}

/// What no repository should have, as libgit2 would say it.
fn odd(text: String) -> git2::Error {
    git2::Error::new(ErrorCode::GenericError, ErrorClass::Tree, text)
}

#[cfg(test)]
mod tests {
    use git2::build::TreeUpdateBuilder;
    use git2::{FileMode, Repository};
    use proptest::prelude::*;

    use super::*;
    use crate::gitops::{history, pack};

    fn path() -> impl Strategy<Value = String> {
        // Names that git sorts otherwise than strings, and files where others have folders.
        let name = prop::sample::select(vec!["a", "a-b", "a0", "a.c", "b", "z"]);
        prop::collection::vec(name, 1..4).prop_map(|names| names.join("/"))
    }

    fn collides(paths: &[String], new: &str) -> bool {
        paths
            .iter()
            .any(|p| p.starts_with(&format!("{new}/")) || new.starts_with(&format!("{p}/")))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn trees_are_those_that_libgit2_makes(steps in prop::collection::vec((path(), any::<u8>()), 1..24)) {
            let folder = tempfile::tempdir().unwrap();
            let repository = Repository::init_bare(folder.path()).unwrap();
            let empty = repository.treebuilder(None).unwrap().write().unwrap();
            let mut staged = Staged::new(&repository, Lately::default()).unwrap();
            let (mut ours, mut paths) = (empty, Vec::<String>::new());
            let mut contents = BTreeMap::new();
            for (path, content) in steps {
                let before = ours;
                let mut edits = Edits::default();
                if paths.contains(&path) && content % 3 == 0 {
                    paths.retain(|p| *p != path);
                    contents.remove(&path);
                    edits.remove(&path);
                } else if collides(&paths, &path) {
                    continue;
                } else {
                    paths.push(path.clone());
                    contents.insert(path.clone(), content);
                    let blob = staged.add(ObjectType::Blob, &[content]).unwrap();
                    edits.put(&path, blob);
                }
                ours = staged.edit(ours, &edits).unwrap();
                // Made anew from nothing: a folder that lost all has left nothing behind.
                let mut update = TreeUpdateBuilder::new();
                for (path, content) in &contents {
                    let blob = repository.blob(&[*content]).unwrap();
                    update.upsert(path.as_str(), blob, FileMode::Blob);
                }
                let none = repository.find_tree(empty).unwrap();
                let theirs = update.create_updated(&repository, &none).unwrap();
                prop_assert_eq!(ours, theirs);
                let changed = staged.files_between(Some(before), Some(ours)).unwrap();
                let after = contents.get(&path).map(|c| Digest::of(&[*c]));
                if before == ours {
                    prop_assert!(changed.is_empty());
                } else {
                    prop_assert_eq!(changed, BTreeMap::from([(path.clone(), after)]));
                }
                let at = staged.at(ours, &path).unwrap();
                prop_assert_eq!(at.is_some(), contents.contains_key(&path));
            }
            // What libgit2 sees of it when it is written.
            let all = staged.files_between(None, Some(ours)).unwrap();
            prop_assert_eq!(all.len(), contents.len());
            let (new, _) = staged.into_parts();
            pack::write(&folder.path().join("objects/pack"), &new).unwrap();
            let who = git2::Signature::now("a", "a@example.com").unwrap();
            let tree = repository.find_tree(ours).unwrap();
            let commit = repository.commit(None, &who, &who, "x", &tree, &[]).unwrap();
            let seen = history::files_between(&repository, None, commit).unwrap();
            let seen: BTreeMap<_, _> = seen.into_iter().map(|(p, f)| (p, f.after)).collect();
            prop_assert_eq!(seen, all);
        }
    }
}
