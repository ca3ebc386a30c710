//! The built-in builder: the source as layers on a base image or on none, without any daemon.
//!
//! 1. If the service has a build command, it runs in a private copy of the checkout, in the
//!    service's folder, with `SOURCE_DATE_EPOCH`, `CI=true` and few other variables; its output is
//!    passed on. It runs on this machine and is not isolated from it.
//! 2. [`detect`] finds out how the source is started.
//! 3. The service's folder becomes one layer, the folder [`APP_DIR`] of the image: sorted, with
//!    the commit's time, the same bytes for the same commit.
//! 4. The configuration is the base image's, with entrypoint, working folder and labels replaced
//!    or added. Without a base image there is nothing but the source: the local target runs it
//!    with what the machine has; nothing else can.
//!
//! The same commit, configuration and base image make the same digest. A build command may break
//! that by what it writes, and a base image that is named by a tag by moving: name it by digest.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use daybook_events::spec::{ImageReference, PinnedImage};
use oci_spec::image::{
    ANNOTATION_BASE_IMAGE_DIGEST, ANNOTATION_BASE_IMAGE_NAME, Config, Descriptor, HistoryBuilder,
    ImageConfiguration, MediaType, Os,
};
use tokio_util::sync::CancellationToken;

use super::command::{self, RunError};
use super::detect::{Start, detect};
use super::pack::{copy_tree, pack};
use super::scratch::Scratch;
use super::{BuildContext, BuildError, Builder, BuiltImage, within_checkout};
use crate::image::ImageError;
use crate::image::layout::to_oci;
use crate::image::manifest::Image;
use crate::image::store::{ImageStore, blocking_until};
use crate::output::LineSender;

/// Where the source is in the image, without the leading slash.
pub const APP_DIR: &str = "app";

/// Builds images from source without any daemon.
#[derive(Debug)]
pub struct ArchiveBuilder {
    images: Arc<dyn ImageStore>,
    scratch: PathBuf,
}

impl ArchiveBuilder {
    /// A builder that gets base images from `images` and runs build commands in folders of its
    /// own below `scratch`, which is made if it is not there.
    pub fn new(images: Arc<dyn ImageStore>, scratch: impl Into<PathBuf>) -> Self {
        Self {
            images,
            scratch: scratch.into(),
        }
    }

    /// Brings the base image into the output.
    async fn base(
        &self,
        reference: &ImageReference,
        context: &BuildContext,
        output: &LineSender,
    ) -> Result<(PinnedImage, Image), BuildError> {
        let unavailable = |source| BuildError::BaseImageUnavailable {
            reference: reference.to_string(),
            source: Box::new(source),
        };
        let pinned = self.images.resolve(reference).await.map_err(unavailable)?;
        output.send(format!("base image {pinned}")).await;
        let fetching = self.images.fetch(&pinned, &context.output, output);
        fetching.await.map_err(unavailable)?;
        let image = Image::read(&context.output, &pinned.digest).map_err(unavailable)?;
        Ok((pinned, image))
    }

    /// Runs the build command in a private copy of the checkout and returns the service's folder
    /// in it.
    async fn run_command(
        &self,
        context: &BuildContext,
        scratch: &Arc<Scratch>,
        output: &LineSender,
        cancel: &CancellationToken,
    ) -> Result<PathBuf, BuildError> {
        let (from, copy) = (context.checkout.clone(), Arc::clone(scratch));
        blocking_until(cancel, move |stop| copy_tree(&from, copy.path(), stop)).await?;

        let folder = || within_checkout(scratch.path(), Path::new(&context.path));
        let words = &context.spec.command;
        let Some((program, arguments)) = words.split_first() else {
            return folder();
        };
        let shown = words.join(" ");
        output.send(format!("$ {shown}")).await;
        let mut command = command::command(program);
        command
            .args(arguments)
            .current_dir(folder()?)
            .env("CI", "true")
            .env("DAYBOOK_COMMIT", context.commit.as_str())
            .env("SOURCE_DATE_EPOCH", context.created_seconds().to_string());
        match command::run(command, output, cancel).await {
            // Looked up anew: the command may have put a link in its place.
            Ok(ended) if ended.status.success() => folder(),
            Ok(ended) => Err(BuildError::CommandFailed {
                command: shown,
                how: ended.how(),
                exit_code: ended.status.code(),
                tail: ended.tail,
            }),
            Err(RunError::NotFound) => Err(BuildError::CommandNotFound {
                program: program.clone(),
            }),
            Err(RunError::Io(e)) => Err(BuildError::io(format!("running `{shown}`"))(e)),
            Err(RunError::Cancelled) => Err(BuildError::Cancelled),
        }
    }
}

#[async_trait]
impl Builder for ArchiveBuilder {
    async fn build(
        &self,
        context: &BuildContext,
        output: &LineSender,
        cancel: &CancellationToken,
    ) -> Result<BuiltImage, BuildError> {
        context.source_folder()?;
        if context.spec.command.is_empty() {
            return self.build_from(context, None, output, cancel).await;
        }
        let scratch = Scratch::new(&self.scratch).await?;
        let image = self
            .build_from(context, Some(&scratch), output, cancel)
            .await;
        scratch.remove().await;
        image
    }
}

impl ArchiveBuilder {
    /// Builds from the checkout, or from a copy of it in which the build command has run.
    async fn build_from(
        &self,
        context: &BuildContext,
        copy: Option<&Arc<Scratch>>,
        output: &LineSender,
        cancel: &CancellationToken,
    ) -> Result<BuiltImage, BuildError> {
        let base = match &context.spec.base_image {
            Some(reference) => tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(BuildError::Cancelled),
                base = self.base(reference, context, output) => Some(base?),
            },
            None => None,
        };
        let folder = match copy {
            Some(scratch) => self.run_command(context, scratch, output, cancel).await?,
            None => context.source_folder()?,
        };

        let start = detect(&folder, context.service.as_str(), copy.is_some()).map_err(|none| {
            BuildError::NoStartCommand {
                looked_for: none.looked_for,
                hints: none.hints,
            }
        })?;
        output.send(format!("detected {start}")).await;
        for note in &start.notes {
            output.send(format!("note: {note}")).await;
        }

        let (job, copy) = (context.clone(), copy.cloned());
        let (layer, image) = blocking_until(cancel, move |stop| {
            // It must not go away under this thread.
            let _copy = copy;
            let seconds = job.created_seconds();
            let layer = pack(&job.output, &folder, APP_DIR, seconds, stop)?;
            let image = assemble(&job, &layer, base, &start)?;
            Ok::<_, BuildError>((layer, image))
        })
        .await?;
        let (files, size) = (layer.files, layer.size);
        output
            .send(format!("packed {files} files into {size} bytes"))
            .await;
        output.send(format!("image {}", image.digest)).await;
        Ok(image)
    }
}

/// Writes configuration and manifest.
fn assemble(
    context: &BuildContext,
    layer: &super::pack::Layer,
    base: Option<(PinnedImage, Image)>,
    start: &Start,
) -> Result<BuiltImage, BuildError> {
    let mut annotations = context.all_labels();
    let (mut configuration, mut layers, pinned) = match base {
        Some((pinned, image)) => {
            annotations.extend([
                (
                    ANNOTATION_BASE_IMAGE_NAME.to_owned(),
                    format!("{}:{}", pinned.repository, pinned.tag),
                ),
                (
                    ANNOTATION_BASE_IMAGE_DIGEST.to_owned(),
                    pinned.digest.to_string(),
                ),
            ]);
            let layers = image.manifest.layers().iter().map(as_oci_layer).collect();
            (image.configuration, layers, Some(pinned))
        }
        None => {
            let mut bare = ImageConfiguration::default();
            bare.set_os(Os::Linux);
            bare.set_history(Some(Vec::new()));
            (bare, Vec::new(), None)
        }
    };

    let mut config = configuration
        .config()
        .clone()
        .unwrap_or_else(Config::default);
    config.set_entrypoint(Some(start.command.clone()));
    config.set_cmd(None);
    config.set_working_dir(Some(format!("/{APP_DIR}")));
    let mut labels = config.labels().clone().unwrap_or_default();
    labels.extend(context.all_labels());
    config.set_labels(Some(labels));
    configuration.set_config(Some(config));
    configuration.set_created(Some(context.created()));
    configuration
        .rootfs_mut()
        .diff_ids_mut()
        .push(layer.diff_id.to_string());
    // An image either tells of all its layers or of none.
    if let Some(history) = configuration.history_mut() {
        let entry = HistoryBuilder::default()
            .created(context.created())
            .created_by(format!("daybook archive {}", context.commit))
            .build()
            .map_err(|e| ImageError::Invalid {
                what: "the new image's history".into(),
                reason: e.to_string(),
            })?;
        history.push(entry);
    }

    let config = Image::write_configuration(&context.output, &configuration)?;
    layers.push(Descriptor::new(
        MediaType::ImageLayerGzip,
        layer.size,
        to_oci(&layer.digest)?,
    ));
    let digest = Image::write_manifest(&context.output, config, layers, annotations)?;
    Ok(BuiltImage::read(
        &context.output,
        &digest,
        "archive",
        start.to_string(),
        pinned,
    )?)
}

/// The same layer under the media type that belongs in an OCI manifest.
fn as_oci_layer(layer: &Descriptor) -> Descriptor {
    let mut layer = layer.clone();
    match layer.media_type().as_ref() {
        "application/vnd.docker.image.rootfs.diff.tar.gzip" => {
            layer.set_media_type(MediaType::ImageLayerGzip);
        }
        "application/vnd.docker.image.rootfs.diff.tar" => {
            layer.set_media_type(MediaType::ImageLayer);
        }
        _ => {}
    }
    layer
}
