//! Images as the pipeline asks for them: built by a builder, kept by a store.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use daybook_events::spec::{ImageReference, PinnedImage};
use daybook_events::{ImageRepository, ImageTag, with_causes};
use tokio_util::sync::CancellationToken;

use super::{BuildContext, BuildError, Builder};
use crate::image::ImageError;
use crate::image::layout::Layout;
use crate::image::store::{ImageStore, blocking};
use crate::output::LineSender;
use crate::ports::{BuildInput, BuiltImage, Images, Output, StepError};

/// The folder of an attempt's scratch space in which the built image waits to be pushed.
const IMAGE_FOLDER: &str = "image";

/// A builder and a store of images, as the one port that the build worker knows.
#[derive(Debug, Clone)]
pub struct BuiltImages {
    builder: Arc<dyn Builder>,
    store: Arc<dyn ImageStore>,
}

impl BuiltImages {
    /// Puts the two together.
    pub fn new(builder: Arc<dyn Builder>, store: Arc<dyn ImageStore>) -> Self {
        Self { builder, store }
    }
}

#[async_trait]
impl Images for BuiltImages {
    async fn build(
        &self,
        input: BuildInput<'_>,
        output: &Output,
        cancel: &CancellationToken,
    ) -> Result<BuiltImage, StepError> {
        let context = BuildContext {
            checkout: input.checkout.to_owned(),
            path: input.path.to_owned(),
            service: input.service.clone(),
            spec: input.spec.clone(),
            url: input.url.clone(),
            commit: input.commit.commit.clone(),
            committed_at: input.commit.committed_at,
            build: input.build,
            labels: Default::default(),
            output: open_layout(input.scratch).await?,
        };
        let lines = LineSender::from(output.clone());
        let built = self.builder.build(&context, &lines, cancel).await?;
        Ok(BuiltImage {
            digest: built.digest,
            builder: built.builder.to_owned(),
            detected: built.kind,
            size_bytes: built.size,
        })
    }

    async fn push(
        &self,
        image: &BuiltImage,
        scratch: &Path,
        repository: &ImageRepository,
        tag: &ImageTag,
        output: &Output,
    ) -> Result<PinnedImage, StepError> {
        let layout = open_layout(scratch).await?;
        let kind = image.detected.clone();
        let built = super::BuiltImage::read(&layout, &image.digest, "", kind, None)?;
        let lines = LineSender::from(output.clone());
        Ok(self.store.push(&built, repository, tag, &lines).await?)
    }

    async fn resolve(&self, reference: &ImageReference) -> Result<PinnedImage, StepError> {
        Ok(self.store.resolve(reference).await?)
    }
}

async fn open_layout(scratch: &Path) -> Result<Layout, ImageError> {
    let folder = scratch.join(IMAGE_FOLDER);
    blocking(move |_| Layout::open(folder)).await
}

impl From<BuildError> for StepError {
    fn from(error: BuildError) -> Self {
        Self {
            code: error.code().to_owned(),
            remedy: error.remedy(),
            retryable: error.is_retryable(),
            message: with_causes(&error),
        }
    }
}

impl From<ImageError> for StepError {
    fn from(error: ImageError) -> Self {
        Self {
            code: error.code().to_owned(),
            remedy: error.remedy().to_owned(),
            retryable: error.is_retryable(),
            message: with_causes(&error),
        }
    }
}
