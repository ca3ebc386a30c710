//! Unpacked images, one folder for each digest, shared by the releases that run them.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use daybook_events::spec::PinnedImage;
use daybook_events::{DeploymentId, Digest};
use daybook_failpoints::reached;

use super::state_file;
use crate::image::ImageError;
use crate::image::manifest::ImageConfig;
use crate::image::store::ImageStore;

/// An image that is ready to run.
#[derive(Debug, Clone)]
pub(super) struct Unpacked {
    /// Its files.
    pub(super) root: PathBuf,
    pub(super) config: ImageConfig,
    /// How long it took to be fetched and unpacked; none if it was there.
    pub(super) took: Option<Duration>,
}

/// The unpacked images of a cluster.
#[derive(Debug)]
pub(super) struct Images {
    dir: PathBuf,
    store: Arc<dyn ImageStore>,
    entries: Mutex<HashMap<Digest, Entry>>,
}

#[derive(Debug, Default)]
struct Entry {
    users: HashSet<DeploymentId>,
    /// Held while the folder is being made or removed.
    busy: Arc<tokio::sync::Mutex<()>>,
}

impl Images {
    pub(super) fn new(dir: PathBuf, store: Arc<dyn ImageStore>) -> Self {
        Self {
            dir,
            store,
            entries: Mutex::default(),
        }
    }

    /// Says that a release needs an image, so that it is kept.
    pub(super) fn hold(&self, digest: &Digest, by: DeploymentId) {
        self.with_entry(digest, |e| e.users.insert(by));
    }

    /// Gives an image, unpacking it if that was not done before.
    pub(super) async fn get(
        &self,
        image: &PinnedImage,
        by: DeploymentId,
    ) -> Result<Unpacked, ImageError> {
        let busy = self.with_entry(&image.digest, |e| {
            e.users.insert(by);
            e.busy.clone()
        });
        let _busy = busy.lock().await;
        let folder = self.folder(&image.digest);
        let root = folder.join("root");
        let about = folder.join("image.json");
        if let Ok(Some(config)) = state_file::read(&about) {
            return Ok(Unpacked {
                root,
                config,
                took: None,
            });
        }
        let begun = Instant::now();
        // Made beside its place and moved there as a whole, so that a folder in its place is
        // complete.
        let partial = Partial(self.dir.join(format!("{}.partial", uuid::Uuid::new_v4())));
        let refused = |source| ImageError::Io {
            doing: format!("unpacking into {}", self.dir.display()),
            source,
        };
        state_file::remove(&folder).map_err(refused)?;
        std::fs::create_dir_all(&partial.0).map_err(refused)?;
        self.store.unpack(image, &partial.0.join("root")).await?;
        let config = self.store.config(image).await?;
        state_file::write(&partial.0.join("image.json"), &config).map_err(refused)?;
        reached("unpack.before");
        std::fs::rename(&partial.0, &folder).map_err(refused)?;
        reached("unpack.after");
        Ok(Unpacked {
            root,
            config,
            took: Some(begun.elapsed()),
        })
    }

    /// Says that a release no longer needs an image, and removes the image if nobody does.
    pub(super) async fn release(&self, digest: &Digest, by: DeploymentId) {
        let busy = self.with_entry(digest, |e| {
            e.users.remove(&by);
            e.busy.clone()
        });
        let _busy = busy.lock().await;
        if self.with_entry(digest, |e| e.users.is_empty()) {
            let folder = self.folder(digest);
            let removed = tokio::task::spawn_blocking(move || state_file::remove(&folder)).await;
            if let Ok(Err(error)) = removed {
                tracing::warn!(%digest, %error, "an unused image could not be removed");
            }
        }
    }

    /// Removes all images but these, and what was left unfinished. Nobody may use others yet.
    pub(super) fn keep_only(&self, digests: &HashSet<Digest>) -> std::io::Result<()> {
        let kept: HashSet<&str> = digests.iter().map(Digest::hex).collect();
        for entry in std::fs::read_dir(&self.dir)?.flatten() {
            if !kept.contains(&*entry.file_name().to_string_lossy()) {
                state_file::remove(&entry.path())?;
            }
        }
        Ok(())
    }

    fn folder(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.hex())
    }

    fn with_entry<T>(&self, digest: &Digest, act: impl FnOnce(&mut Entry) -> T) -> T {
        act(self.lock().entry(digest.clone()).or_default())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Digest, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A folder that is removed unless it was moved away.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        if let Err(error) = state_file::remove(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "a partial image stays behind");
        }
    }
}
