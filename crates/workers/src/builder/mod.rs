//! Builders: from a checkout to an image.
//!
//! - [`archive`]: built in, needs no daemon: the source as layers on a base image or on none.
//! - [`dockerfile`]: a Dockerfile, with buildah, podman or docker.
//! - [`port`]: a builder and a store as the pipeline asks for them.
//! - [`AnyBuilder`]: chooses between them as the service's [`BuildSpec`] says.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use async_trait::async_trait;
use daybook_events::spec::{BuildSpec, BuilderKind, PinnedImage};
use daybook_events::{BuildId, CommitId, Digest, RepositoryUrl, ServiceName};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::image::layout::Layout;
use crate::output::LineSender;

pub mod archive;
pub mod command;
pub mod detect;
pub mod dockerfile;
mod error;
mod pack;
pub mod port;
mod scratch;

pub use dockerfile::dockerfile_within;
pub use error::BuildError;

use archive::ArchiveBuilder;
use dockerfile::DockerfileBuilder;

/// The label and annotation that carries the build's id.
pub const LABEL_BUILD: &str = "dev.daybook.build";

/// What is built, and from what.
#[derive(Debug, Clone)]
pub struct BuildContext {
    /// The root of the checked-out source. It is only read.
    pub checkout: PathBuf,
    /// The service's folder within it, relative; empty for the root.
    pub path: String,
    /// The service, after which its program may be named.
    pub service: ServiceName,
    /// How it is built.
    pub spec: BuildSpec,
    /// Where the source is from.
    pub url: RepositoryUrl,
    /// The commit that is checked out.
    pub commit: CommitId,
    /// When it was committed: the time that everything in the image gets, so that the same commit
    /// makes the same image.
    pub committed_at: Timestamp,
    /// The build's id.
    pub build: BuildId,
    /// Further labels and annotations of the image.
    pub labels: BTreeMap<String, String>,
    /// Where the image is put. It may be the folder of a [`LayoutStore`](crate::image::local::LayoutStore).
    pub output: Layout,
}

impl BuildContext {
    /// The service's folder, which is certain to be within the checkout.
    pub(crate) fn source_folder(&self) -> Result<PathBuf, BuildError> {
        let folder = within_checkout(&self.checkout, Path::new(&self.path))?;
        if folder.is_dir() {
            Ok(folder)
        } else {
            Err(BuildError::SourcePathMissing {
                path: self.path.clone(),
            })
        }
    }

    /// All labels and annotations, by the names that the OCI specification gives them.
    pub(crate) fn all_labels(&self) -> BTreeMap<String, String> {
        let mut labels = self.labels.clone();
        labels.extend([
            (
                oci_spec::image::ANNOTATION_CREATED.to_owned(),
                self.created(),
            ),
            (
                oci_spec::image::ANNOTATION_REVISION.to_owned(),
                self.commit.to_string(),
            ),
            (
                oci_spec::image::ANNOTATION_SOURCE.to_owned(),
                self.url.to_string(),
            ),
            (LABEL_BUILD.to_owned(), self.build.to_string()),
        ]);
        labels
    }

    /// The commit's time in the form of RFC 3339, in whole seconds.
    pub(crate) fn created(&self) -> String {
        self.committed_at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
    }

    /// The commit's time in seconds since 1970; 0 for times before.
    pub(crate) fn created_seconds(&self) -> u64 {
        u64::try_from(self.committed_at.as_second()).unwrap_or(0)
    }
}

/// A path within a checkout, followed through its symbolic links. Refused if it leads out.
pub(crate) fn within_checkout(checkout: &Path, path: &Path) -> Result<PathBuf, BuildError> {
    let shown = || path.display().to_string();
    let plain = path
        .components()
        .all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
    if !plain {
        return Err(BuildError::SourcePathEscapes { path: shown() });
    }
    let root = checkout
        .canonicalize()
        .map_err(BuildError::io(format!("reading {}", checkout.display())))?;
    let full = match root.join(path).canonicalize() {
        Ok(full) => full,
        Err(_) => return Err(BuildError::SourcePathMissing { path: shown() }),
    };
    if full.starts_with(&root) {
        Ok(full)
    } else {
        Err(BuildError::SourcePathEscapes { path: shown() })
    }
}

/// An image that was built. Its contents are blobs of `layout`; no reference points at it yet.
#[derive(Debug, Clone)]
pub struct BuiltImage {
    /// Where its blobs are.
    pub layout: Layout,
    /// The digest of its manifest: what it is called from here on.
    pub digest: Digest,
    /// The digest of its configuration.
    pub config: Digest,
    /// The digests of its layers, lowest first.
    pub layers: Vec<Digest>,
    /// What made it: `archive`, `buildah`, `podman`, `docker`.
    pub builder: &'static str,
    /// What the source was taken for: "Python: python3 app.py", "Dockerfile".
    pub kind: String,
    /// The size of configuration and layers together, as stored, in bytes.
    pub size: u64,
    /// The image that it stands on, where the builder knows it.
    pub base: Option<PinnedImage>,
}

impl BuiltImage {
    /// Describes an image that was written into a layout.
    pub(crate) fn read(
        layout: &Layout,
        digest: &Digest,
        builder: &'static str,
        kind: String,
        base: Option<PinnedImage>,
    ) -> Result<Self, crate::image::ImageError> {
        let image = crate::image::manifest::Image::read(layout, digest)?;
        let mut blobs = Vec::new();
        let mut size = 0;
        for blob in image.blobs() {
            blobs.push(crate::image::layout::from_oci(blob.digest())?);
            size += blob.size();
        }
        let config = blobs.remove(0);
        Ok(Self {
            layout: layout.clone(),
            digest: image.digest,
            config,
            layers: blobs,
            builder,
            kind,
            size,
            base,
        })
    }
}

/// The port to what makes images.
#[async_trait]
pub trait Builder: Send + Sync + std::fmt::Debug {
    /// Builds an image and tells what happens while it happens.
    ///
    /// After `cancel` is cancelled the build ends soon with [`BuildError::Cancelled`]; then all
    /// processes that it started are gone, and so is everything that it wrote outside of the
    /// output's blobs. If the future is dropped instead, processes are killed without warning, and
    /// what only a tool can remove may stay until the next build.
    async fn build(
        &self,
        context: &BuildContext,
        output: &LineSender,
        cancel: &CancellationToken,
    ) -> Result<BuiltImage, BuildError>;
}

/// The builder that a service's [`BuildSpec`] asks for.
///
/// [`BuilderKind::Auto`] is the Dockerfile builder if the source has a Dockerfile and a tool to
/// build it is there, else the archive builder.
#[derive(Debug)]
pub struct AnyBuilder {
    archive: ArchiveBuilder,
    dockerfile: DockerfileBuilder,
}

impl AnyBuilder {
    /// Puts the two together.
    pub fn new(archive: ArchiveBuilder, dockerfile: DockerfileBuilder) -> Self {
        Self {
            archive,
            dockerfile,
        }
    }
}

#[async_trait]
impl Builder for AnyBuilder {
    async fn build(
        &self,
        context: &BuildContext,
        output: &LineSender,
        cancel: &CancellationToken,
    ) -> Result<BuiltImage, BuildError> {
        match context.spec.builder {
            BuilderKind::Archive => self.archive.build(context, output, cancel).await,
            BuilderKind::Dockerfile => self.dockerfile.build(context, output, cancel).await,
            BuilderKind::Auto => {
                let dockerfile = match dockerfile::dockerfile_of(context) {
                    Ok(path) => path,
                    // One that is asked for by name must be there.
                    Err(error) if context.spec.dockerfile.is_some() => return Err(error),
                    Err(_) => return self.archive.build(context, output, cancel).await,
                };
                if self.dockerfile.tool().await.is_some() {
                    return self.dockerfile.build(context, output, cancel).await;
                }
                output
                    .send(format!(
                        "{} is not used: none of buildah, podman and docker is here; building an archive",
                        dockerfile.display()
                    ))
                    .await;
                match self.archive.build(context, output, cancel).await {
                    // The Dockerfile would have known.
                    Err(BuildError::NoStartCommand { .. }) => Err(BuildError::BuilderMissing),
                    other => other,
                }
            }
        }
    }
}
