//! Values in a folder of this machine, which several processes may share.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use daybook_events::secret::{SecretId, SecretRef};
use daybook_events::{EnvKey, ProjectName};

use crate::cipher::Cipher;
use crate::masker::Masker;
use crate::project_file::ProjectSecrets;
use crate::store::{Committed, SecretError, SecretStore};
use crate::value::SecretValue;

const EXTENSION: &str = "secrets";

/// A secret store in a folder: one encrypted file for each project, written in full, synced and
/// put in place at once, and a key file. All of them only this user can read.
///
/// The encryption protects copies of the files that come without the key file: backups of the
/// folder when the key file is kept elsewhere, and disks that are thrown away. It does not protect
/// against whoever can read both, such as this user's processes; deployments of a local cluster
/// are such processes.
#[derive(Debug, Clone)]
pub struct SecretFolder(Arc<Folder>);

#[derive(Debug)]
struct Folder {
    dir: PathBuf,
    key_file: PathBuf,
    /// Maskers by project, with the file that they were made from; `None` is for all projects.
    maskers: Mutex<HashMap<Option<ProjectName>, Remembered>>,
}

#[derive(Debug)]
struct Remembered {
    of: Vec<(PathBuf, Stamp)>,
    masker: Arc<Masker>,
}

/// Changes whenever a file is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    modified: (i64, i64),
    length: u64,
}

impl SecretFolder {
    /// The store in a folder, which is made when the first value is kept. The key is in `key` in
    /// the folder unless another file is named.
    pub fn new(dir: impl Into<PathBuf>, key_file: Option<PathBuf>) -> Self {
        let dir = dir.into();
        let key_file = key_file.unwrap_or_else(|| dir.join("key"));
        Self(Arc::new(Folder {
            dir,
            key_file,
            maskers: Mutex::default(),
        }))
    }

    /// Does something that may take a while with the folder.
    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Folder) -> Result<T, SecretError> + Send + 'static,
    ) -> Result<T, SecretError> {
        let folder = self.0.clone();
        let dir = folder.dir.clone();
        tokio::task::spawn_blocking(move || work(&folder))
            .await
            .unwrap_or_else(|e| Err(unusable(&dir, io::Error::other(e))))
    }
}

#[async_trait]
impl SecretStore for SecretFolder {
    async fn put(
        &self,
        project: &ProjectName,
        id: &SecretId,
        value: &SecretValue,
    ) -> Result<Committed, SecretError> {
        let (project, id, value) = (project.clone(), id.clone(), value.clone());
        self.with(move |folder| {
            folder.change(&project, |secrets| {
                let committed = secrets.commit(&project, &id, &value);
                let changed = secrets.keep(&id, &committed.commitment, &value);
                (committed, changed)
            })
        })
        .await
    }

    async fn commitment(
        &self,
        project: &ProjectName,
        id: &SecretId,
        value: &SecretValue,
    ) -> Result<Committed, SecretError> {
        let (project, id, value) = (project.clone(), id.clone(), value.clone());
        self.with(move |folder| {
            folder.change(&project, |secrets| {
                (secrets.commit(&project, &id, &value), false)
            })
        })
        .await
    }

    async fn request_digest(
        &self,
        project: &ProjectName,
        request: &[u8],
    ) -> Result<String, SecretError> {
        let (project, request) = (project.clone(), zeroize::Zeroizing::new(request.to_owned()));
        self.with(move |folder| {
            folder.change(&project, |secrets| {
                (secrets.request_digest(&project, &request), false)
            })
        })
        .await
    }

    async fn resolve(
        &self,
        project: &ProjectName,
        references: &BTreeMap<EnvKey, SecretRef>,
    ) -> Result<BTreeMap<EnvKey, SecretValue>, SecretError> {
        if references.is_empty() {
            return Ok(BTreeMap::new());
        }
        let (project, references) = (project.clone(), references.clone());
        self.with(move |folder| {
            let secrets = folder.read(&project)?;
            let value = |(variable, reference): (EnvKey, SecretRef)| {
                let id = reference.id();
                let found = secrets
                    .as_ref()
                    .and_then(|s| s.find(&id, &reference.commitment));
                let version = reference.version;
                let value = found.ok_or(SecretError::Missing { id, version })?;
                Ok((variable, value))
            };
            references.into_iter().map(value).collect()
        })
        .await
    }

    async fn erase(&self, project: &ProjectName, id: &SecretId) -> Result<(), SecretError> {
        let (project, id) = (project.clone(), id.clone());
        self.with(move |folder| match folder.read(&project)? {
            Some(_) => folder.change(&project, |secrets| ((), secrets.erase(&id))),
            None => Ok(()),
        })
        .await
    }

    async fn forget(&self, project: &ProjectName) -> Result<(), SecretError> {
        let project = project.clone();
        self.with(move |folder| folder.forget(&project)).await
    }

    fn masker(&self, project: Option<&ProjectName>) -> Result<Arc<Masker>, SecretError> {
        self.0.masker(project)
    }
}

impl Folder {
    fn path(&self, project: &ProjectName) -> PathBuf {
        self.dir.join(format!("{project}.{EXTENSION}"))
    }

    /// One change at a time, of all processes.
    fn lock(&self) -> Result<File, SecretError> {
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir);
        made.map_err(|e| unusable(&self.dir, e))?;
        let path = self.dir.join("lock");
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|e| unusable(&path, e))?;
        lock.lock().map_err(|e| unusable(&path, e))?;
        Ok(lock)
    }

    /// The secrets of a project, if it has any.
    fn read(&self, project: &ProjectName) -> Result<Option<ProjectSecrets>, SecretError> {
        let path = self.path(project);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(unusable(&path, e)),
        };
        let cipher = Cipher::read(&self.key_file)?;
        ProjectSecrets::open(&bytes, &cipher, project, &path).map(Some)
    }

    /// Looks at the secrets of a project, which are made if there are none, and keeps them if
    /// `work` says that it changed them.
    fn change<T>(
        &self,
        project: &ProjectName,
        work: impl FnOnce(&mut ProjectSecrets) -> (T, bool),
    ) -> Result<T, SecretError> {
        let _lock = self.lock()?;
        let path = self.path(project);
        let (mut secrets, new) = match self.read(project)? {
            Some(secrets) => (secrets, false),
            None => {
                let secrets = ProjectSecrets::generate().map_err(|e| unusable(&path, e))?;
                (secrets, true)
            }
        };
        let (answer, changed) = work(&mut secrets);
        if changed || new {
            let cipher = self.key()?;
            let bytes = secrets.seal(&cipher, project);
            let written = bytes.and_then(|bytes| write_private(&path, &bytes));
            written.map_err(|e| unusable(&path, e))?;
        }
        Ok(answer)
    }

    /// The key; made if nothing was encrypted with one that is lost.
    fn key(&self) -> Result<Cipher, SecretError> {
        match Cipher::read(&self.key_file) {
            Err(SecretError::NoKey(_)) if self.files()?.is_empty() => {
                Cipher::create(&self.key_file)
            }
            other => other,
        }
    }

    fn forget(&self, project: &ProjectName) -> Result<(), SecretError> {
        let _lock = self.lock()?;
        let path = self.path(project);
        // Where the file system writes in place, nothing of it is left on the disk either.
        overwrite(&path).map_err(|e| unusable(&path, e))?;
        match fs::remove_file(&path) {
            Ok(()) => sync_folder(&self.dir).map_err(|e| unusable(&self.dir, e)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(unusable(&path, e)),
        }
    }

    /// The projects that have a file.
    fn files(&self) -> Result<Vec<ProjectName>, SecretError> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(unusable(&self.dir, e)),
        };
        let mut projects = Vec::new();
        for entry in entries {
            let path = entry.map_err(|e| unusable(&self.dir, e))?.path();
            let stem = path.file_stem().and_then(|s| s.to_str());
            if path.extension().is_some_and(|e| e == EXTENSION)
                && let Some(Ok(project)) = stem.map(ProjectName::parse)
            {
                projects.push(project);
            }
        }
        projects.sort();
        Ok(projects)
    }

    fn masker(&self, project: Option<&ProjectName>) -> Result<Arc<Masker>, SecretError> {
        let projects = match project {
            Some(project) => vec![project.clone()],
            None => self.files()?,
        };
        // Looked at before the files are read: what changes meanwhile is noticed next time.
        let mut of = Vec::new();
        for project in &projects {
            let path = self.path(project);
            if let Some(stamp) = stamp(&path).map_err(|e| unusable(&path, e))? {
                of.push((path, stamp));
            }
        }
        let key = project.cloned();
        {
            let maskers = self.maskers.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(found) = maskers.get(&key)
                && found.of == of
            {
                return Ok(found.masker.clone());
            }
        }
        let mut values = Vec::new();
        for project in &projects {
            if let Some(secrets) = self.read(project)? {
                values.extend(secrets.values());
            }
        }
        let masker = Arc::new(Masker::new(&values));
        let remembered = Remembered {
            of,
            masker: masker.clone(),
        };
        let mut maskers = self.maskers.lock().unwrap_or_else(PoisonError::into_inner);
        maskers.insert(key, remembered);
        Ok(masker)
    }
}

/// Puts zeros in the place of what is in a file, if there is one.
fn overwrite(path: &Path) -> io::Result<()> {
    let mut file = match OpenOptions::new().write(true).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    let length = file.metadata()?.len();
    io::copy(&mut io::repeat(0).take(length), &mut file)?;
    file.sync_data()
}

fn stamp(path: &Path) -> io::Result<Option<Stamp>> {
    match fs::metadata(path) {
        Ok(m) => Ok(Some(Stamp {
            inode: m.ino(),
            modified: (m.mtime(), m.mtime_nsec()),
            length: m.len(),
        })),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

fn unusable(path: &Path, source: io::Error) -> SecretError {
    SecretError::Unusable {
        path: path.to_owned(),
        source,
    }
}

/// Writes a file that only this user can read: all of it or nothing, and on disk when this
/// returns. Nobody else may write it at the same time.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = folder.join(name);
    // One that a process left behind in the middle of this may be of another mode.
    match fs::remove_file(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    sync_folder(folder)
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use daybook_events::secret::{Commitment, SecretScope};
    use zeroize::Zeroizing;

    use super::*;

    fn project(name: &str) -> ProjectName {
        ProjectName::parse(name).unwrap()
    }

    fn id(name: &str) -> SecretId {
        SecretId {
            name: name.parse().unwrap(),
            scope: SecretScope::default(),
        }
    }

    fn value(text: &str) -> SecretValue {
        SecretValue::new(Zeroizing::new(text.to_owned())).unwrap()
    }

    fn reference(id: &SecretId, commitment: &Commitment) -> SecretRef {
        SecretRef {
            secret: id.name.clone(),
            scope: id.scope.clone(),
            version: 1,
            commitment: commitment.clone(),
        }
    }

    async fn get(
        store: &SecretFolder,
        project: &ProjectName,
        reference: &SecretRef,
    ) -> Result<SecretValue, SecretError> {
        let variable = reference.secret.clone();
        let wanted = BTreeMap::from([(variable.clone(), reference.clone())]);
        let mut found = store.resolve(project, &wanted).await?;
        Ok(found.remove(&variable).unwrap())
    }

    #[tokio::test]
    async fn values_are_kept_by_their_commitment_and_only_for_this_user() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("secrets");
        let store = SecretFolder::new(&folder, None);
        let (shop, key) = (project("shop"), id("KEY"));
        let one = store
            .put(&shop, &key, &value("correct horse"))
            .await
            .unwrap();
        let two = store
            .put(&shop, &key, &value("battery staple"))
            .await
            .unwrap();
        assert_ne!(one.commitment, two.commitment);
        assert_eq!(one.key, two.key);
        let again = store
            .put(&shop, &key, &value("correct horse"))
            .await
            .unwrap();
        assert_eq!(one, again);
        // Neither another name nor another project has the same commitment to the same value.
        let other = store
            .put(&shop, &id("OTHER"), &value("correct horse"))
            .await
            .unwrap();
        assert_ne!(one.commitment, other.commitment);
        let foreign = store
            .put(&project("other"), &key, &value("correct horse"))
            .await
            .unwrap();
        assert_ne!(one.commitment, foreign.commitment);
        assert_ne!(one.key, foreign.key);

        // Another process finds them.
        let store = SecretFolder::new(&folder, None);
        for (committed, text) in [(&one, "correct horse"), (&two, "battery staple")] {
            let found = get(&store, &shop, &reference(&key, &committed.commitment)).await;
            assert_eq!(found.unwrap().expose(), text);
        }
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o600, "{}", path.display());
            let bytes = fs::read(&path).unwrap();
            for text in ["correct", "staple", "KEY"] {
                let found = bytes.windows(text.len()).any(|w| w == text.as_bytes());
                assert!(!found, "{text} is in {}", path.display());
            }
        }
        let mode = fs::metadata(&folder).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o700);
    }

    #[tokio::test]
    async fn what_is_erased_or_of_another_project_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let store = SecretFolder::new(dir.path(), None);
        let (shop, key) = (project("shop"), id("KEY"));
        let kept = store
            .put(&shop, &key, &value("correct horse"))
            .await
            .unwrap();
        let wanted = reference(&key, &kept.commitment);
        let missing = get(&store, &project("other"), &wanted).await.unwrap_err();
        assert_eq!(missing.code(), "secret_missing");
        store.erase(&shop, &key).await.unwrap();
        let missing = get(&store, &shop, &wanted).await.unwrap_err();
        assert_eq!(missing.code(), "secret_missing");

        // A key that is forgotten takes the meaning of all commitments with it.
        let before = store
            .put(&shop, &key, &value("correct horse"))
            .await
            .unwrap();
        assert_eq!(before, kept);
        store.forget(&shop).await.unwrap();
        let after = store
            .put(&shop, &key, &value("correct horse"))
            .await
            .unwrap();
        assert_ne!(before.commitment, after.commitment);
        assert_ne!(before.key, after.key);
    }

    #[tokio::test]
    async fn a_file_that_was_changed_or_swapped_is_refused_and_texts_are_withheld() {
        let dir = tempfile::tempdir().unwrap();
        let store = SecretFolder::new(dir.path(), None);
        let (shop, other, key) = (project("shop"), project("other"), id("KEY"));
        let kept = store
            .put(&shop, &key, &value("correct horse"))
            .await
            .unwrap();
        store
            .put(&other, &key, &value("battery staple"))
            .await
            .unwrap();
        let (of_shop, of_other) = (
            dir.path().join("shop.secrets"),
            dir.path().join("other.secrets"),
        );
        let good = fs::read(&of_shop).unwrap();
        let wanted = reference(&key, &kept.commitment);
        let mut flipped = good.clone();
        *flipped.last_mut().unwrap() ^= 1;
        let swapped = fs::read(&of_other).unwrap();
        for bad in [&flipped, &swapped, &good[..20].to_vec(), &Vec::new()] {
            fs::write(&of_shop, bad).unwrap();
            let error = get(&store, &shop, &wanted).await.unwrap_err();
            assert_eq!(error.code(), "secrets_damaged");
            let store: &dyn SecretStore = &store;
            let shown = store
                .masker_or_withhold(Some(&shop))
                .mask("text")
                .into_owned();
            assert!(shown.contains("withheld"), "{shown}");
        }
        fs::write(&of_shop, &good).unwrap();
        assert!(get(&store, &shop, &wanted).await.is_ok());

        // A key that is lost is not replaced in silence.
        fs::remove_file(dir.path().join("key")).unwrap();
        let error = store
            .put(&shop, &key, &value("another one"))
            .await
            .unwrap_err();
        assert!(matches!(error, SecretError::NoKey(_)), "{error:?}");
        assert!(!dir.path().join("key").exists());
    }

    #[tokio::test]
    async fn a_masker_notices_what_another_process_sets() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = (
            SecretFolder::new(dir.path(), None),
            SecretFolder::new(dir.path(), None),
        );
        let shop = project("shop");
        let mask =
            |text: &str, of: Option<&ProjectName>| ours.masker(of).unwrap().mask(text).into_owned();
        assert_eq!(mask("correct horse", Some(&shop)), "correct horse");
        theirs
            .put(&shop, &id("KEY"), &value("correct horse"))
            .await
            .unwrap();
        assert_eq!(mask("correct horse", Some(&shop)), "***");
        assert_eq!(mask("correct horse", None), "***");
        assert_eq!(
            mask("correct horse", Some(&project("other"))),
            "correct horse"
        );
        theirs
            .put(&shop, &id("KEY"), &value("battery staple"))
            .await
            .unwrap();
        assert_eq!(mask("correct horse battery staple", Some(&shop)), "*** ***");
        theirs.erase(&shop, &id("KEY")).await.unwrap();
        assert_eq!(mask("correct horse", None), "correct horse");
    }

    #[tokio::test]
    async fn many_at_once_lose_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let shop = project("shop");
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..20 {
            let store = SecretFolder::new(dir.path(), None);
            let shop = shop.clone();
            tasks.spawn(async move {
                let id = id(&format!("KEY_{n}"));
                let value = value(&format!("the value {n}"));
                (
                    id.clone(),
                    value.clone(),
                    store.put(&shop, &id, &value).await.unwrap(),
                )
            });
        }
        let store = SecretFolder::new(dir.path(), None);
        while let Some(done) = tasks.join_next().await {
            let (id, value, committed) = done.unwrap();
            let found = get(&store, &shop, &reference(&id, &committed.commitment)).await;
            assert_eq!(found.unwrap(), value);
        }
    }
}
