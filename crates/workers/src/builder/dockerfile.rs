//! A Dockerfile, built with buildah, podman or docker, whichever is here first.
//!
//! buildah and podman work without any daemon. Each build has a storage of its own, which is
//! removed afterwards, so that nothing stays behind however a build ends; the price is that base
//! images are fetched anew for each build. They use the plainest storage driver and isolation
//! (`vfs`, `chroot`), which work everywhere, also as root in a container; `STORAGE_DRIVER` and
//! `BUILDAH_ISOLATION` choose others. docker is used if its daemon answers; the image is exported
//! from it and removed there.
//!
//! The commit's time becomes the image's. With buildah and podman the same Dockerfile, whose steps
//! are themselves reproducible, makes the same image; docker stamps layers with the time of the
//! build.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use daybook_events::spec::BuildSpec;
use oci_spec::image::{Descriptor, MediaType};
use serde::Deserialize;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use super::command::{self, Ended, RunError, find_program};
use super::scratch::Scratch;
use super::{BuildContext, BuildError, Builder, BuiltImage, within_checkout};
use crate::image::ImageError;
use crate::image::layout::{Layout, MAX_DOCUMENT, from_oci, to_oci};
use crate::image::manifest::Image;
use crate::image::store::blocking_until;
use crate::output::LineSender;

/// What the image is called between the tool's steps.
const IMAGE: &str = "localhost/daybook-build:latest";

/// How long docker's daemon may take to say that it is there.
const DAEMON_TIMEOUT: Duration = Duration::from_secs(5);

/// Variables that these tools need besides those that every build gets.
const TOOL_VARIABLES: &[&str] = &[
    "DOCKER_CONFIG",
    "DOCKER_HOST",
    "DOCKER_CONTEXT",
    "DOCKER_TLS_VERIFY",
    "DOCKER_CERT_PATH",
    "REGISTRY_AUTH_FILE",
    "STORAGE_DRIVER",
    "BUILDAH_ISOLATION",
    "CONTAINERS_CONF",
    "CONTAINERS_REGISTRIES_CONF",
];

/// A tool that builds Dockerfiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    /// buildah.
    Buildah,
    /// podman.
    Podman,
    /// docker, with its daemon.
    Docker,
}

impl Tool {
    /// In the order of preference.
    pub const ALL: [Self; 3] = [Self::Buildah, Self::Podman, Self::Docker];

    /// The program's name.
    pub fn program(self) -> &'static str {
        match self {
            Self::Buildah => "buildah",
            Self::Podman => "podman",
            Self::Docker => "docker",
        }
    }

    async fn is_usable(self) -> bool {
        if find_program(self.program()).is_none() {
            return false;
        }
        if self != Self::Docker {
            return true;
        }
        let mut command = self.command();
        command.args(["version", "--format", "{{.Server.Version}}"]);
        let cancel = CancellationToken::new();
        let output = LineSender::discard();
        let asking = command::run(command, &output, &cancel);
        matches!(
            tokio::time::timeout(DAEMON_TIMEOUT, asking).await,
            Ok(Ok(ended)) if ended.status.success()
        )
    }

    fn command(self) -> Command {
        let mut command = command::command(self.program());
        command::pass_on(&mut command, TOOL_VARIABLES);
        command
    }
}

impl fmt::Display for Tool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.program())
    }
}

/// Builds images from Dockerfiles.
#[derive(Debug)]
pub struct DockerfileBuilder {
    scratch: PathBuf,
    tools: Vec<Tool>,
}

impl DockerfileBuilder {
    /// A builder that works in folders of its own below `scratch`, which is made if it is not
    /// there, with the first tool that is usable.
    pub fn new(scratch: impl Into<PathBuf>) -> Self {
        Self {
            scratch: scratch.into(),
            tools: Tool::ALL.to_vec(),
        }
    }

    /// Only these tools, in this order.
    pub fn with_tools(mut self, tools: impl Into<Vec<Tool>>) -> Self {
        self.tools = tools.into();
        self
    }

    /// The tool that a build would use now.
    pub async fn tool(&self) -> Option<Tool> {
        for tool in &self.tools {
            if tool.is_usable().await {
                return Some(*tool);
            }
        }
        None
    }
}

/// Where the Dockerfile is, within the service's folder.
pub(crate) fn dockerfile_of(context: &BuildContext) -> Result<PathBuf, BuildError> {
    let folder = context.source_folder()?;
    let name = context.spec.dockerfile.as_deref().unwrap_or("Dockerfile");
    match within_checkout(&folder, Path::new(name)) {
        Ok(file) if file.is_file() => Ok(file),
        Err(BuildError::SourcePathEscapes { path }) => Err(BuildError::SourcePathEscapes { path }),
        _ => Err(BuildError::DockerfileMissing { path: name.into() }),
    }
}

/// Where the Dockerfile of a service is within its folder `path` of a checkout, relative, for
/// builders elsewhere; none if it has none and none is asked for by name.
///
/// # Errors
/// If the folder is not there, leads out, or has no Dockerfile of the name that is asked for.
pub fn dockerfile_within(
    checkout: &Path,
    path: &str,
    spec: &BuildSpec,
) -> Result<Option<String>, BuildError> {
    let folder = within_checkout(checkout, Path::new(path))?;
    if !folder.is_dir() {
        return Err(BuildError::SourcePathMissing { path: path.into() });
    }
    let name = spec.dockerfile.as_deref().unwrap_or("Dockerfile");
    match within_checkout(&folder, Path::new(name)) {
        Ok(file) if file.is_file() => Ok(Some(name.to_owned())),
        Err(BuildError::SourcePathEscapes { path }) => Err(BuildError::SourcePathEscapes { path }),
        _ if spec.dockerfile.is_some() => Err(BuildError::DockerfileMissing { path: name.into() }),
        _ => Ok(None),
    }
}

#[async_trait]
impl Builder for DockerfileBuilder {
    async fn build(
        &self,
        context: &BuildContext,
        output: &LineSender,
        cancel: &CancellationToken,
    ) -> Result<BuiltImage, BuildError> {
        let dockerfile = dockerfile_of(context)?;
        let tool = self.tool().await.ok_or(BuildError::BuilderMissing)?;
        let job = Job {
            tool,
            context,
            dockerfile,
            scratch: Scratch::new(&self.scratch).await?,
            output,
            cancel,
        };
        output
            .send(format!("building the Dockerfile with {tool}"))
            .await;
        let result = match tool {
            Tool::Buildah | Tool::Podman => job.without_daemon().await,
            Tool::Docker => job.with_docker().await,
        };
        job.clean_up().await;
        job.scratch.remove().await;
        let image = result?;
        output.send(format!("image {}", image.digest)).await;
        Ok(image)
    }
}

/// One build.
struct Job<'a> {
    tool: Tool,
    context: &'a BuildContext,
    dockerfile: PathBuf,
    scratch: Arc<Scratch>,
    output: &'a LineSender,
    cancel: &'a CancellationToken,
}

impl Job<'_> {
    async fn without_daemon(&self) -> Result<BuiltImage, BuildError> {
        let mut build = self.storage_command();
        build.args(["build", "--layers=false", "--format", "oci"]);
        if std::env::var_os("BUILDAH_ISOLATION").is_none() {
            build.args(["--isolation", "chroot"]);
        }
        build
            .arg("--timestamp")
            .arg(self.context.created_seconds().to_string());
        self.add_build_arguments(&mut build, IMAGE)?;
        self.run(build).await?;

        let exported = self.scratch.path().join("image");
        let mut export = self.storage_command();
        export
            .args(["push", "--quiet", IMAGE])
            .arg(format!("oci:{}:image", exported.display()));
        self.run(export).await?;
        self.take_over(move |_| {
            let layout = Layout::open(exported)?;
            let digest = layout
                .reference("image")?
                .ok_or_else(|| not_exported("there is no image in the folder"))?;
            let image = Image::read(&layout, &digest)?;
            Ok((layout, image))
        })
        .await
    }

    async fn with_docker(&self) -> Result<BuiltImage, BuildError> {
        // The daemon's storage is shared, so the name must be this build's own.
        let name = self.docker_name();
        let mut build = self.tool.command();
        build.arg("build");
        self.add_build_arguments(&mut build, &name)?;
        self.run(build).await?;

        let archive = self.scratch.path().join("image.tar");
        let mut save = self.tool.command();
        save.arg("save").arg("-o").arg(&archive).arg(&name);
        self.run(save).await?;
        let folder = self.scratch.path().join("image");
        self.take_over(move |stop| {
            let layout = Layout::open(folder)?;
            let image = read_docker_archive(&archive, &layout, stop)?;
            Ok((layout, image))
        })
        .await
    }

    /// A command on this build's own storage.
    fn storage_command(&self) -> Command {
        let mut command = self.tool.command();
        command
            .arg("--root")
            .arg(self.scratch.path().join("storage"))
            .arg("--runroot")
            .arg(self.scratch.path().join("run"));
        if std::env::var_os("STORAGE_DRIVER").is_none() {
            command.args(["--storage-driver", "vfs"]);
        }
        // What the tool writes while it works belongs to the build as well.
        command.env("TMPDIR", self.scratch.path());
        command
    }

    fn add_build_arguments(&self, command: &mut Command, name: &str) -> Result<(), BuildError> {
        for (key, value) in self.context.all_labels() {
            command.arg("--label").arg(format!("{key}={value}"));
        }
        command
            .arg("--file")
            .arg(&self.dockerfile)
            .args(["--tag", name])
            .arg(self.context.source_folder()?);
        Ok(())
    }

    async fn run(&self, command: Command) -> Result<(), BuildError> {
        match command::run(command, self.output, self.cancel).await {
            Ok(ended) if ended.status.success() => Ok(()),
            Ok(ended) => Err(self.failed(ended)),
            Err(RunError::Cancelled) => Err(BuildError::Cancelled),
            Err(RunError::NotFound) => Err(BuildError::BuilderMissing),
            Err(RunError::Io(e)) => Err(BuildError::io(format!("running {}", self.tool))(e)),
        }
    }

    fn failed(&self, ended: Ended) -> BuildError {
        BuildError::DockerfileFailed {
            tool: self.tool.program(),
            how: ended.how(),
            exit_code: ended.status.code(),
            tail: ended.tail,
        }
    }

    /// Copies the image that the tool made into the output, with the annotations of ours.
    async fn take_over(
        &self,
        read: impl FnOnce(&CancellationToken) -> Result<(Layout, Image), ImageError> + Send + 'static,
    ) -> Result<BuiltImage, BuildError> {
        let (to, annotations) = (self.context.output.clone(), self.context.all_labels());
        let tool = self.tool.program();
        // The folder must not go away under the thread that reads it.
        let scratch = Arc::clone(&self.scratch);
        blocking_until(self.cancel, move |stop| {
            let _scratch = scratch;
            let (from, image) = read(stop)?;
            for blob in image.blobs() {
                if stop.is_cancelled() {
                    return Err(BuildError::Cancelled);
                }
                to.copy_blob(&from, &from_oci(blob.digest())?, blob.size())?;
            }
            let digest = Image::write_manifest(
                &to,
                image.manifest.config().clone(),
                image.manifest.layers().clone(),
                annotations,
            )?;
            Ok(BuiltImage::read(
                &to,
                &digest,
                tool,
                "Dockerfile".into(),
                None,
            )?)
        })
        .await
    }

    fn docker_name(&self) -> String {
        format!("daybook-build:{}", self.context.build)
    }

    /// Removes what the tool keeps outside of the build's folder, or in a form that only the tool
    /// can remove. What fails here is no failure of the build.
    async fn clean_up(&self) {
        let mut command = self.tool.command();
        match self.tool {
            Tool::Docker => {
                command.args(["rmi", "--force", &self.docker_name()]);
            }
            // Without root, files of the storage belong to other users of the user namespace.
            Tool::Buildah | Tool::Podman if !rustix::process::geteuid().is_root() => {
                command
                    .args(["unshare", "rm", "-rf"])
                    .arg(self.scratch.path().join("storage"));
            }
            Tool::Buildah | Tool::Podman => return,
        }
        // Also after a cancellation, so with a token of its own.
        let _ = command::run(command, &LineSender::discard(), &CancellationToken::new()).await;
    }
}

/// Reads what `docker save` writes: an archive whose `manifest.json` names a configuration and
/// layers, in the form of any version of docker. Layers are kept as they are.
fn read_docker_archive(
    archive: &Path,
    layout: &Layout,
    stop: &CancellationToken,
) -> Result<Image, ImageError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Saved {
        config: String,
        layers: Vec<String>,
    }
    let failed = |e: io::Error| not_exported(&e.to_string());
    let mut saved: Option<Vec<Saved>> = None;
    // The manifest may come last, so all files are taken in on the way.
    let mut files: HashMap<String, Descriptor> = HashMap::new();
    let mut links: HashMap<String, String> = HashMap::new();

    let mut reader = tar::Archive::new(File::open(archive).map_err(failed)?);
    for entry in reader.entries().map_err(failed)? {
        if stop.is_cancelled() {
            return Err(ImageError::Cancelled);
        }
        let mut entry = entry.map_err(failed)?;
        let path = entry.path().map_err(failed)?.to_string_lossy().into_owned();
        match entry.header().entry_type() {
            tar::EntryType::Regular if path == "manifest.json" => {
                let mut text = Vec::new();
                entry
                    .take(MAX_DOCUMENT)
                    .read_to_end(&mut text)
                    .map_err(failed)?;
                saved =
                    Some(serde_json::from_slice(&text).map_err(|e| not_exported(&e.to_string()))?);
            }
            tar::EntryType::Regular => {
                files.insert(path, store_layer(layout, &mut entry)?);
            }
            // Old versions save a layer that occurs twice as a link to the first.
            tar::EntryType::Symlink => {
                let target = entry.link_name().map_err(failed)?.unwrap_or_default();
                let target = target.to_string_lossy();
                links.insert(path, target.trim_start_matches("../").to_owned());
            }
            _ => {}
        }
    }

    let saved = saved
        .and_then(|images| images.into_iter().next())
        .ok_or_else(|| not_exported("it has no manifest.json"))?;
    let file = |name: &String| {
        files
            .get(links.get(name).unwrap_or(name))
            .cloned()
            .ok_or_else(|| not_exported(&format!("it has no {name}")))
    };
    let mut config = file(&saved.config)?;
    config.set_media_type(MediaType::ImageConfig);
    let layers = saved.layers.iter().map(file).collect::<Result<_, _>>()?;
    let digest = Image::write_manifest(layout, config, layers, [])?;
    Image::read(layout, &digest)
}

/// Stores a layer of `docker save`, which newer versions compress.
fn store_layer(layout: &Layout, layer: &mut impl Read) -> Result<Descriptor, ImageError> {
    let failed = |e: io::Error| not_exported(&e.to_string());
    let mut start = Vec::new();
    layer
        .by_ref()
        .take(2)
        .read_to_end(&mut start)
        .map_err(failed)?;
    let media_type = if start == [0x1f, 0x8b] {
        MediaType::ImageLayerGzip
    } else {
        MediaType::ImageLayer
    };
    let mut writer = layout.writer()?;
    io::copy(&mut start.as_slice().chain(layer), &mut writer).map_err(failed)?;
    let written = writer.finish(None)?;
    Ok(Descriptor::new(
        media_type,
        written.size,
        to_oci(&written.digest)?,
    ))
}

fn not_exported(reason: &str) -> ImageError {
    ImageError::Invalid {
        what: "the image that the tool exported".into(),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn archive(files: &[(&str, &[u8])], links: &[(&str, &str)]) -> tempfile::NamedTempFile {
        let mut builder = tar::Builder::new(tempfile::NamedTempFile::new().unwrap());
        for (path, data) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, path, *data).unwrap();
        }
        for (path, target) in links {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            builder.append_link(&mut header, path, target).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn read(archive: &tempfile::NamedTempFile) -> Result<(Layout, Image), ImageError> {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::open(dir.path().join("layout"))?;
        let image = read_docker_archive(archive.path(), &layout, &CancellationToken::new())?;
        for layer in image.manifest.layers() {
            layout.read(&from_oci(layer.digest())?, 1 << 20)?;
        }
        Ok((layout, image))
    }

    const CONFIG: &[u8] = br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"config":{"Cmd":["/bin/x"],"Env":null}}"#;

    #[test]
    fn what_old_and_new_versions_of_docker_save_is_read() {
        let old = archive(
            &[
                ("abc.json", CONFIG),
                ("one/layer.tar", b"first"),
                ("manifest.json", br#"[{"Config":"abc.json","RepoTags":null,"Layers":["one/layer.tar","two/layer.tar"]}]"#),
            ],
            &[("two/layer.tar", "../one/layer.tar")],
        );
        let (_, image) = read(&old).unwrap();
        let layers = image.manifest.layers();
        assert_eq!(layers.len(), 2);
        assert_eq!(layers[0].digest(), layers[1].digest());
        assert_eq!(layers[0].media_type(), &MediaType::ImageLayer);
        assert_eq!(
            image.manifest.config().media_type(),
            &MediaType::ImageConfig
        );

        let mut zipped = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        zipped.write_all(b"layer").unwrap();
        let zipped = zipped.finish().unwrap();
        let new = archive(
            &[
                (
                    "manifest.json",
                    br#"[{"Config":"blobs/sha256/c","Layers":["blobs/sha256/l"]}]"#,
                ),
                ("blobs/sha256/c", CONFIG),
                ("blobs/sha256/l", &zipped),
                ("index.json", b"{}"),
            ],
            &[],
        );
        let (_, image) = read(&new).unwrap();
        let layer = &image.manifest.layers()[0];
        assert_eq!(layer.media_type(), &MediaType::ImageLayerGzip);
        assert_eq!(layer.size(), zipped.len() as u64);
    }

    #[test]
    fn an_archive_without_what_it_names_is_refused() {
        for files in [
            &[("abc.json", CONFIG)][..],
            &[("manifest.json", b"[]")],
            &[("manifest.json", b"no json")],
            &[("manifest.json", br#"[{"Config":"abc.json","Layers":[]}]"#)],
            &[
                ("abc.json", CONFIG),
                (
                    "manifest.json",
                    br#"[{"Config":"abc.json","Layers":["l"]}]"#,
                ),
            ],
        ] {
            let error = read(&archive(files, &[])).unwrap_err();
            assert_eq!(error.code(), "image_invalid");
        }
    }
}
