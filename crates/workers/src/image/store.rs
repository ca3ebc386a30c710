//! The port to where images are kept, and the choice between the two places that there are.

use std::fmt;
use std::path::Path;

use async_trait::async_trait;
use daybook_events::spec::{ImageReference, PinnedImage};
use daybook_events::{Digest, ImageRepository, ImageTag};
use tokio_util::sync::CancellationToken;

use super::layout::Layout;
use super::local::LayoutStore;
use super::manifest::ImageConfig;
use super::registry::RegistryStore;
use super::{ImageError, LOCAL_HOST};
use crate::builder::BuiltImage;
use crate::output::LineSender;

/// Where images are pushed to, and fetched and run from.
///
/// Every method may be cancelled by dropping its future: work on other threads stops soon after,
/// and nothing half-done is seen by anybody.
#[async_trait]
pub trait ImageStore: Send + Sync + fmt::Debug {
    /// Puts a built image under a repository and a tag, and tells each step. What is there
    /// already is not sent again, so that an interrupted push may simply be repeated. When this
    /// returns, the tag is the image's digest.
    async fn push(
        &self,
        image: &BuiltImage,
        repository: &ImageRepository,
        tag: &ImageTag,
        progress: &LineSender,
    ) -> Result<PinnedImage, ImageError>;

    /// Pins a reference: checks that the image exists and says which digest it is.
    ///
    /// If a tag and a digest are given they must agree; [`ImageError::TagMoved`] says that they do
    /// not. If only a digest is given, the pinned image gets [`digest_tag`] as its tag.
    async fn resolve(&self, reference: &ImageReference) -> Result<PinnedImage, ImageError>;

    /// How the image wants to be run. Only its digest is looked at, not its tag.
    async fn config(&self, image: &PinnedImage) -> Result<ImageConfig, ImageError>;

    /// The size of configuration and layers together, as stored, in bytes. For an image that exists
    /// for several platforms, the one for this machine. Only its digest is looked at, not its tag.
    async fn size(&self, image: &PinnedImage) -> Result<u64, ImageError>;

    /// Unpacks all layers into the folder `into`, which must be empty or not exist; its parent
    /// must exist. See [`super::unpack`] for what is refused. If this fails, `into` is what it was
    /// before. Only the image's digest is looked at, not its tag.
    async fn unpack(&self, image: &PinnedImage, into: &Path) -> Result<(), ImageError>;

    /// Brings the image into a layout folder: manifest, configuration and all layers, checked.
    /// For an image that exists for several platforms, the one for this machine. Only the image's
    /// digest is looked at, not its tag.
    async fn fetch(
        &self,
        image: &PinnedImage,
        into: &Layout,
        progress: &LineSender,
    ) -> Result<(), ImageError>;
}

/// The tag of an image that was given by digest only: `sha256-` and the first twelve digits. No
/// such tag needs to exist anywhere.
pub fn digest_tag(digest: &Digest) -> ImageTag {
    ImageTag::parse(format!("sha256-{}", &digest.hex()[..12]))
        .expect("a digest's digits make a valid tag")
}

/// The tag that a reference really asks for: none if it is only the stand-in for its digest.
pub(crate) fn asked_tag(reference: &ImageReference) -> Option<&ImageTag> {
    match (&reference.tag, &reference.digest) {
        (Some(tag), Some(digest)) if *tag == digest_tag(digest) => None,
        (tag, _) => tag.as_ref(),
    }
}

/// All images: those whose repository's host is [`LOCAL_HOST`] in the layout folder of this
/// machine, all others in the registry that their repository names.
#[derive(Debug)]
pub struct Images {
    local: LayoutStore,
    registries: RegistryStore,
}

impl Images {
    /// Puts the two together.
    pub fn new(local: LayoutStore, registries: RegistryStore) -> Self {
        Self { local, registries }
    }

    fn of(&self, repository: &ImageRepository) -> &dyn ImageStore {
        if is_local(repository) {
            &self.local
        } else {
            &self.registries
        }
    }
}

/// Whether images of this repository are kept in the layout folder of this machine.
pub fn is_local(repository: &ImageRepository) -> bool {
    repository
        .as_str()
        .strip_prefix(LOCAL_HOST)
        .is_some_and(|rest| rest.starts_with('/'))
}

#[async_trait]
impl ImageStore for Images {
    async fn push(
        &self,
        image: &BuiltImage,
        repository: &ImageRepository,
        tag: &ImageTag,
        progress: &LineSender,
    ) -> Result<PinnedImage, ImageError> {
        let store = self.of(repository);
        store.push(image, repository, tag, progress).await
    }

    async fn resolve(&self, reference: &ImageReference) -> Result<PinnedImage, ImageError> {
        self.of(&reference.repository).resolve(reference).await
    }

    async fn config(&self, image: &PinnedImage) -> Result<ImageConfig, ImageError> {
        self.of(&image.repository).config(image).await
    }

    async fn size(&self, image: &PinnedImage) -> Result<u64, ImageError> {
        self.of(&image.repository).size(image).await
    }

    async fn unpack(&self, image: &PinnedImage, into: &Path) -> Result<(), ImageError> {
        self.of(&image.repository).unpack(image, into).await
    }

    async fn fetch(
        &self,
        image: &PinnedImage,
        into: &Layout,
        progress: &LineSender,
    ) -> Result<(), ImageError> {
        let store = self.of(&image.repository);
        store.fetch(image, into, progress).await
    }
}

/// Does blocking work on another thread. When the future is dropped, the token that the work is
/// given is cancelled.
pub(crate) async fn blocking<T, E>(
    work: impl FnOnce(&CancellationToken) -> Result<T, E> + Send + 'static,
) -> Result<T, E>
where
    T: Send + 'static,
    E: From<ImageError> + Send + 'static,
{
    blocking_until(&CancellationToken::new(), work).await
}

/// As [`blocking`], with a token from outside. When it is cancelled this still waits for the work
/// to end.
pub(crate) async fn blocking_until<T, E>(
    cancel: &CancellationToken,
    work: impl FnOnce(&CancellationToken) -> Result<T, E> + Send + 'static,
) -> Result<T, E>
where
    T: Send + 'static,
    E: From<ImageError> + Send + 'static,
{
    let stop = cancel.child_token();
    let stop_on_drop = stop.clone().drop_guard();
    let result = tokio::task::spawn_blocking(move || work(&stop)).await;
    drop(stop_on_drop);
    match result {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down.
            Err(_) => Err(ImageError::Cancelled.into()),
        },
    }
}
