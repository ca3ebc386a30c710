//! Images in an OCI layout folder of this machine: what is used when no registry is configured.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use daybook_events::spec::{ImageReference, PinnedImage};
use daybook_events::{Digest, ImageRepository, ImageTag};
use daybook_failpoints::reached;

use super::ImageError;
use super::layout::{Layout, from_oci};
use super::manifest::{Document, Image, ImageConfig};
use super::store::{ImageStore, asked_tag, blocking, digest_tag};
use super::unpack::{UnpackLimits, unpack};
use crate::builder::BuiltImage;
use crate::output::LineSender;

/// Images in a layout folder. Several processes may use the same one.
#[derive(Debug, Clone)]
pub struct LayoutStore {
    layout: Layout,
    limits: UnpackLimits,
}

impl LayoutStore {
    /// Opens the folder, making it if it is not there.
    pub fn open(root: impl Into<PathBuf>, limits: UnpackLimits) -> Result<Self, ImageError> {
        Ok(Self {
            layout: Layout::open(root)?,
            limits,
        })
    }

    /// The folder. A builder may write into it directly; a push then only has to set the tag.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }
}

#[async_trait]
impl ImageStore for LayoutStore {
    async fn push(
        &self,
        image: &BuiltImage,
        repository: &ImageRepository,
        tag: &ImageTag,
        progress: &LineSender,
    ) -> Result<PinnedImage, ImageError> {
        let pinned = PinnedImage {
            repository: repository.clone(),
            tag: tag.clone(),
            digest: image.digest.clone(),
        };
        let (layout, from) = (self.layout.clone(), image.layout.clone());
        let (name, digest) = (format!("{repository}:{tag}"), image.digest.clone());
        reached("image.push.before");
        blocking(move |_| copy_image(&from, &layout, &digest, Some(&name))).await?;
        reached("image.push.after");
        progress.send(format!("stored {pinned}")).await;
        Ok(pinned)
    }

    async fn resolve(&self, reference: &ImageReference) -> Result<PinnedImage, ImageError> {
        let (layout, reference) = (self.layout.clone(), reference.clone());
        blocking(move |_| {
            let missing = || ImageError::NotFound {
                reference: reference.to_string(),
            };
            let digest = match (asked_tag(&reference), &reference.digest) {
                (Some(tag), given) => {
                    let name = format!("{}:{tag}", reference.repository);
                    let actual = layout.reference(&name)?.ok_or_else(missing)?;
                    if let Some(expected) = given
                        && *expected != actual
                    {
                        return Err(ImageError::TagMoved {
                            reference: reference.to_string(),
                            expected: expected.clone(),
                            actual,
                        });
                    }
                    actual
                }
                (None, Some(digest)) => digest.clone(),
                (None, None) => return Err(missing()),
            };
            if layout.size(&digest)?.is_none() {
                return Err(missing());
            }
            Ok(PinnedImage {
                tag: asked_tag(&reference)
                    .cloned()
                    .unwrap_or_else(|| digest_tag(&digest)),
                repository: reference.repository,
                digest,
            })
        })
        .await
    }

    async fn config(&self, image: &PinnedImage) -> Result<ImageConfig, ImageError> {
        let (layout, image) = (self.layout.clone(), image.clone());
        blocking(move |_| Ok(ImageConfig::from(&read(&layout, &image)?.configuration))).await
    }

    async fn size(&self, image: &PinnedImage) -> Result<u64, ImageError> {
        let (layout, image) = (self.layout.clone(), image.clone());
        blocking(move |_| Ok(read(&layout, &image)?.size())).await
    }

    async fn unpack(&self, image: &PinnedImage, into: &Path) -> Result<(), ImageError> {
        let (layout, image, into) = (self.layout.clone(), image.clone(), into.to_owned());
        let limits = self.limits;
        blocking(move |stop| unpack(&layout, &read(&layout, &image)?, &into, limits, stop)).await
    }

    async fn fetch(
        &self,
        image: &PinnedImage,
        into: &Layout,
        _progress: &LineSender,
    ) -> Result<(), ImageError> {
        let (from, into, digest) = (self.layout.clone(), into.clone(), image.digest.clone());
        blocking(move |_| copy_image(&from, &into, &digest, None)).await
    }
}

/// Reads an image by digest; one that is not there is missing under its full name.
fn read(layout: &Layout, image: &PinnedImage) -> Result<Image, ImageError> {
    if layout.size(&image.digest)?.is_none() {
        return Err(ImageError::NotFound {
            reference: image.to_string(),
        });
    }
    Image::read(layout, &image.digest)
}

/// Copies an image from layout to layout, contents first, so that what points at something never
/// appears before it.
fn copy_image(
    from: &Layout,
    to: &Layout,
    digest: &Digest,
    name: Option<&str>,
) -> Result<(), ImageError> {
    let document = Document::read(from, digest)?;
    let image = Image::read(from, digest)?;
    for blob in image.blobs() {
        to.copy_blob(from, &from_oci(blob.digest())?, blob.size())?;
    }
    for manifest in [&image.digest, digest] {
        if let Some(size) = from.size(manifest)? {
            to.copy_blob(from, manifest, size)?;
        }
    }
    match name {
        Some(name) => {
            reached("image.push.copied");
            to.set_reference(name, digest, document.media_type())
        }
        None => Ok(()),
    }
}
