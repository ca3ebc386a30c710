//! What an image says about itself: its manifest, its layers and how it wants to be run.

use std::collections::{BTreeMap, HashMap};

use daybook_events::Digest;
use oci_spec::image::{
    Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, ImageManifestBuilder,
    MediaType, Os,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::layout::{Layout, MAX_DOCUMENT, from_oci, to_oci};
use super::{ImageError, canonical_json};

/// Docker's own name for a manifest, which says the same as OCI's.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker's own name for an index.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// How an image wants to be run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ImageConfig {
    /// The program with its fixed arguments.
    pub entrypoint: Vec<String>,
    /// Arguments of the entrypoint, or the whole command if there is no entrypoint.
    pub cmd: Vec<String>,
    /// Environment variables in the order of the image.
    pub env: Vec<(String, String)>,
    /// The working folder, an absolute path within the image; `/` if the image names none.
    pub working_dir: String,
    /// The TCP ports that the image says it listens on, in ascending order.
    pub exposed_ports: Vec<u16>,
    /// The user that it wants to run as: `name`, `uid`, `user:group`.
    pub user: Option<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

impl ImageConfig {
    /// What to run: the release's own command if it has one, else the image's. Empty if neither
    /// says anything.
    pub fn command(&self, own: &[String]) -> Vec<String> {
        if own.is_empty() {
            [self.entrypoint.as_slice(), self.cmd.as_slice()].concat()
        } else {
            own.to_vec()
        }
    }
}

impl From<&ImageConfiguration> for ImageConfig {
    fn from(configuration: &ImageConfiguration) -> Self {
        let mut this = Self {
            working_dir: "/".into(),
            ..Self::default()
        };
        let Some(config) = configuration.config() else {
            return this;
        };
        this.entrypoint = config.entrypoint().clone().unwrap_or_default();
        this.cmd = config.cmd().clone().unwrap_or_default();
        for variable in config.env().iter().flatten() {
            let (key, value) = variable.split_once('=').unwrap_or((variable, ""));
            this.env.push((key.to_owned(), value.to_owned()));
        }
        if let Some(dir) = config.working_dir().as_deref().filter(|d| !d.is_empty()) {
            this.working_dir = format!("/{}", dir.trim_start_matches('/'));
        }
        for port in config.exposed_ports().iter().flatten() {
            let (number, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
            if protocol == "tcp"
                && let Ok(number) = number.parse()
            {
                this.exposed_ports.push(number);
            }
        }
        this.exposed_ports.sort_unstable();
        this.user = config.user().clone().filter(|u| !u.is_empty());
        this.labels = config
            .labels()
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect();
        this
    }
}

/// One image for this platform, read from a layout.
#[derive(Debug, Clone)]
pub struct Image {
    /// The digest of the manifest. Where a reference points at an index, this is the manifest
    /// that was chosen from it.
    pub digest: Digest,
    /// The manifest.
    pub manifest: ImageManifest,
    /// The configuration.
    pub configuration: ImageConfiguration,
}

impl Image {
    /// Reads the manifest or index of this digest, and the configuration. Every document is
    /// checked against its digest.
    pub fn read(layout: &Layout, digest: &Digest) -> Result<Self, ImageError> {
        let (digest, manifest) = match Document::read(layout, digest)? {
            Document::Manifest(manifest) => (digest.clone(), *manifest),
            Document::Index(index) => {
                let chosen = choose_platform(&index, digest)?;
                match Document::read(layout, &chosen)? {
                    Document::Manifest(manifest) => (chosen, *manifest),
                    Document::Index(_) => {
                        return Err(ImageError::Unsupported(format!(
                            "{chosen} is an index within an index"
                        )));
                    }
                }
            }
        };
        let configuration: ImageConfiguration = parse(
            &layout.read(&from_oci(manifest.config().digest())?, MAX_DOCUMENT)?,
            || format!("the configuration of {digest}"),
        )?;
        Ok(Self {
            digest,
            manifest,
            configuration,
        })
    }

    /// Writes a manifest for a configuration and layers that are blobs of the layout, and returns
    /// its digest. Equal inputs make equal bytes.
    pub(crate) fn write_manifest(
        layout: &Layout,
        config: Descriptor,
        layers: Vec<Descriptor>,
        annotations: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Digest, ImageError> {
        let manifest = ImageManifestBuilder::default()
            .schema_version(2u32)
            .media_type(MediaType::ImageManifest)
            .config(config)
            .layers(layers)
            .annotations(annotations.into_iter().collect::<HashMap<_, _>>())
            .build()
            .map_err(|e| ImageError::Invalid {
                what: "the new manifest".into(),
                reason: e.to_string(),
            })?;
        layout.put(&to_json(&manifest)?)
    }

    /// Writes a configuration and returns what a manifest says of it.
    pub(crate) fn write_configuration(
        layout: &Layout,
        configuration: &ImageConfiguration,
    ) -> Result<Descriptor, ImageError> {
        let bytes = to_json(configuration)?;
        let digest = layout.put(&bytes)?;
        Ok(Descriptor::new(
            MediaType::ImageConfig,
            bytes.len() as u64,
            to_oci(&digest)?,
        ))
    }

    /// The blobs that the manifest names: the configuration and then the layers, lowest first.
    pub fn blobs(&self) -> impl Iterator<Item = &Descriptor> {
        std::iter::once(self.manifest.config()).chain(self.manifest.layers())
    }

    /// The size of configuration and layers together, as stored, in bytes.
    pub fn size(&self) -> u64 {
        self.blobs().map(Descriptor::size).sum()
    }
}

/// What a digest of an image can point at.
#[derive(Debug)]
pub(crate) enum Document {
    /// One image.
    Manifest(Box<ImageManifest>),
    /// The same image for several platforms.
    Index(Box<ImageIndex>),
}

impl Document {
    pub(crate) fn read(layout: &Layout, digest: &Digest) -> Result<Self, ImageError> {
        Self::parse(&layout.read(digest, MAX_DOCUMENT)?, digest)
    }

    /// Tells the two apart by what they contain: the media type within the document is optional.
    pub(crate) fn parse(bytes: &[u8], digest: &Digest) -> Result<Self, ImageError> {
        #[derive(serde::Deserialize)]
        struct Shape {
            manifests: Option<serde::de::IgnoredAny>,
        }
        let what = || format!("the manifest {digest}");
        let shape: Shape = parse(bytes, what)?;
        if shape.manifests.is_some() {
            parse(bytes, what).map(|i| Self::Index(Box::new(i)))
        } else {
            parse(bytes, what).map(|m| Self::Manifest(Box::new(m)))
        }
    }

    /// The media type under which the document is stored and sent.
    pub(crate) fn media_type(&self) -> MediaType {
        match self {
            Self::Manifest(m) => m.media_type().clone().unwrap_or(MediaType::ImageManifest),
            Self::Index(i) => i.media_type().clone().unwrap_or(MediaType::ImageIndex),
        }
    }
}

/// The manifest for Linux on this machine's processor.
pub(crate) fn choose_platform(index: &ImageIndex, digest: &Digest) -> Result<Digest, ImageError> {
    let host = Arch::default();
    let fits = |d: &&Descriptor| {
        d.platform()
            .as_ref()
            .is_some_and(|p| *p.os() == Os::Linux && *p.architecture() == host)
    };
    let manifests = index.manifests();
    match (manifests.iter().find(fits), manifests.as_slice()) {
        (Some(fitting), _) => from_oci(fitting.digest()),
        // One image whose platform is not told.
        (None, [only]) if only.platform().is_none() => from_oci(only.digest()),
        _ => Err(ImageError::Unsupported(format!(
            "the image {digest} has no variant for linux/{host}"
        ))),
    }
}

fn parse<T: DeserializeOwned>(
    bytes: &[u8],
    what: impl FnOnce() -> String,
) -> Result<T, ImageError> {
    serde_json::from_slice(bytes).map_err(|e| ImageError::Invalid {
        what: what(),
        reason: e.to_string(),
    })
}

fn to_json(document: &impl Serialize) -> Result<Vec<u8>, ImageError> {
    canonical_json(document).map_err(|e| ImageError::Invalid {
        what: "the new image".into(),
        reason: e.to_string(),
    })
}
