//! Any store of images as the source of a local cluster's images.

use std::path::Path;

use async_trait::async_trait;
use daybook_events::spec::PinnedImage;

use super::image::{ImageUnpacker, PrepareError, RunnableImage};
use crate::image::ImageError;
use crate::image::store::{ImageStore, Images};

#[async_trait]
impl ImageUnpacker for Images {
    async fn prepare(
        &self,
        image: &PinnedImage,
        into: &Path,
    ) -> Result<RunnableImage, PrepareError> {
        let config = self.config(image).await?;
        self.unpack(image, into).await?;
        Ok(RunnableImage {
            entrypoint: config.entrypoint,
            cmd: config.cmd,
            env: config.env,
            working_dir: config.working_dir,
        })
    }
}

impl From<ImageError> for PrepareError {
    fn from(error: ImageError) -> Self {
        let mut message = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(c) = cause {
            message = format!("{message}: {c}");
            cause = c.source();
        }
        Self {
            message,
            remedy: error.remedy().to_owned(),
            transient: error.is_retryable(),
        }
    }
}
