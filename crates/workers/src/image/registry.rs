//! Images in any OCI registry.

use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use daybook_events::spec::{ImageReference, PinnedImage};
use daybook_events::{Digest, ImageRepository, ImageTag};
use daybook_trace::{KeyValue, attribute};
use futures_util::{StreamExt as _, TryStreamExt as _};
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::errors::{OciDistributionError, OciError, OciErrorCode};
use oci_client::manifest::{OCI_IMAGE_INDEX_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use oci_spec::image::Descriptor;
use tokio_util::io::ReaderStream;

use super::ImageError;
use super::credentials::Credentials;
use super::layout::{Layout, MAX_DOCUMENT, from_oci};
use super::manifest::{
    DOCKER_INDEX, DOCKER_MANIFEST, Document, Image, ImageConfig, choose_platform,
};
use super::store::{ImageStore, asked_tag, blocking, digest_tag};
use super::unpack::{UnpackLimits, unpack};
use crate::builder::BuiltImage;
use crate::output::LineSender;

/// The registry of repositories that name none.
const DOCKER_HUB: &str = "docker.io";

/// How registries are talked to.
#[derive(Debug, Clone)]
pub struct RegistryOptions {
    /// Registries, as `host[:port]`, that are asked over plain HTTP. Loopback addresses always
    /// are; all others are asked over HTTPS.
    pub plain_http: BTreeSet<String>,
    /// Where credentials come from.
    pub credentials: Credentials,
    /// How often a request is made before its failure counts, at least once. Only failures that
    /// may pass are repeated.
    pub attempts: u32,
    /// How long to wait before the second attempt; twice as long before each further one.
    pub first_delay: Duration,
    /// The most that an image may unpack to.
    pub limits: UnpackLimits,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            plain_http: BTreeSet::new(),
            credentials: Credentials::from_environment(),
            attempts: 4,
            first_delay: Duration::from_millis(500),
            limits: UnpackLimits::default(),
        }
    }
}

/// Images in registries: each repository's host says which.
///
/// What is fetched is kept in a layout folder, by digest, so that it is fetched once.
///
/// A TLS provider must have been installed (`rustls::crypto::ring`) before the first request.
pub struct RegistryStore {
    options: RegistryOptions,
    cache: Layout,
    /// One client for each registry, with its credentials. A client whose credentials changed is
    /// replaced.
    clients: Mutex<HashMap<String, (Client, RegistryAuth)>>,
    /// A repository of the registry in which a blob was seen, from which the registry can take
    /// it over into another repository.
    seen: Mutex<HashMap<(String, Digest), Reference>>,
}

/// How many blobs are remembered in [`RegistryStore::seen`]. After that it starts anew: it only
/// saves work.
const MAX_SEEN: usize = 10_000;

impl std::fmt::Debug for RegistryStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryStore")
            .field("options", &self.options)
            .field("cache", &self.cache.root())
            .finish_non_exhaustive()
    }
}

impl RegistryStore {
    /// Registries, with a layout folder for what is fetched from them.
    pub fn new(cache: Layout, options: RegistryOptions) -> Self {
        Self {
            options,
            cache,
            clients: Mutex::default(),
            seen: Mutex::default(),
        }
    }

    /// The registry of an image, with credentials.
    async fn connect(&self, reference: Reference) -> Result<Remote<'_>, ImageError> {
        let registry = reference.resolve_registry().to_owned();
        let auth = self.options.credentials.of(&registry).await?;
        let client = self.client(&registry, &auth)?;
        client.store_auth_if_needed(&registry, &auth).await;
        Ok(Remote {
            store: self,
            client,
            auth,
            registry,
            reference,
        })
    }

    fn client(&self, registry: &str, auth: &RegistryAuth) -> Result<Client, ImageError> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((client, known)) = clients.get(registry)
            && known == auth
        {
            return Ok(client.clone());
        }
        let client = self.new_client(registry)?;
        clients.insert(registry.to_owned(), (client.clone(), auth.clone()));
        Ok(client)
    }

    fn new_client(&self, registry: &str) -> Result<Client, ImageError> {
        let plain = is_loopback(registry) || self.options.plain_http.contains(registry);
        let config = ClientConfig {
            protocol: if plain {
                ClientProtocol::Http
            } else {
                ClientProtocol::Https
            },
            // One request a blob: faster, and understood by every registry.
            use_monolithic_push: true,
            connect_timeout: Some(Duration::from_secs(10)),
            read_timeout: Some(Duration::from_secs(60)),
            user_agent: concat!("daybook/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        };
        Client::try_from(config).map_err(|e| ImageError::Unreachable {
            registry: registry.to_owned(),
            source: Box::new(e),
        })
    }

    /// Does something with a bound of attempts.
    async fn attempt<T, F: Future<Output = Result<T, ImageError>>>(
        &self,
        what: &str,
        progress: &LineSender,
        mut work: impl FnMut() -> F,
    ) -> Result<T, ImageError> {
        let mut delay = self.options.first_delay;
        let mut attempt = 1;
        loop {
            match work().await {
                Err(error) if error.is_retryable() && attempt < self.options.attempts => {
                    tracing::debug!(%error, attempt, what, "an attempt at the registry failed");
                    progress
                        .send(format!(
                            "{what} failed ({error}), trying again in {delay:?}"
                        ))
                        .await;
                    tokio::time::sleep(delay).await;
                    delay = delay.saturating_mul(2);
                    attempt += 1;
                }
                result => return result,
            }
        }
    }

    /// Sends configuration and layers.
    async fn push_blobs(
        &self,
        image: &Image,
        from: &Layout,
        remote: &Remote<'_>,
        progress: &LineSender,
    ) -> Result<(), ImageError> {
        let total = image.manifest.layers().len();
        for (i, blob) in image.blobs().enumerate() {
            let name = match i {
                0 => "configuration".to_owned(),
                i => format!("layer {i} of {total}"),
            };
            let digest = from_oci(blob.digest())?;
            let how = self
                .attempt(&format!("pushing {name}"), progress, || {
                    remote.asked("registry push", remote.upload(from, &digest, blob.size()))
                })
                .await?;
            self.remember(remote, &digest);
            progress
                .send(match how {
                    Uploaded::Sent => format!("pushed {name} ({})", megabytes(blob.size())),
                    Uploaded::Mounted => format!("{name} taken over from another repository"),
                    Uploaded::AlreadyThere => format!("{name} is already there"),
                })
                .await;
        }
        Ok(())
    }

    /// Brings manifest and configuration of an image into a layout. Returns the image.
    async fn fetch_documents(
        &self,
        image: &PinnedImage,
        into: &Layout,
        remote: &Remote<'_>,
        progress: &LineSender,
    ) -> Result<Image, ImageError> {
        let mut digest = image.digest.clone();
        let manifest = loop {
            match self.fetch_document(&digest, into, remote, progress).await? {
                Document::Manifest(manifest) => break manifest,
                Document::Index(index) if digest == image.digest => {
                    digest = choose_platform(&index, &digest)?;
                }
                Document::Index(_) => {
                    return Err(ImageError::Unsupported(format!(
                        "{digest} is an index within an index"
                    )));
                }
            }
        };
        if manifest.config().size() > MAX_DOCUMENT {
            return Err(ImageError::Invalid {
                what: format!("the configuration of {digest}"),
                reason: format!("it has more than {MAX_DOCUMENT} bytes"),
            });
        }
        self.fetch_blob(manifest.config(), into, remote, progress)
            .await?;
        let into = into.clone();
        blocking(move |_| Image::read(&into, &digest)).await
    }

    /// A manifest or index by digest: from the layout if it is there and sound.
    async fn fetch_document(
        &self,
        digest: &Digest,
        into: &Layout,
        remote: &Remote<'_>,
        progress: &LineSender,
    ) -> Result<Document, ImageError> {
        if let Ok(document) = Document::read(into, digest) {
            return Ok(document);
        }
        let bytes = self
            .attempt("reading the manifest", progress, || {
                remote.asked("registry pull", remote.manifest(digest))
            })
            .await?;
        let document = Document::parse(&bytes, digest)?;
        let (layout, digest) = (into.clone(), digest.clone());
        blocking(move |_| {
            let mut writer = layout.writer()?;
            writer
                .write_all(&bytes)
                .map_err(ImageError::io("writing a manifest"))?;
            writer.finish(Some(&digest))
        })
        .await?;
        Ok(document)
    }

    async fn fetch_blob(
        &self,
        blob: &Descriptor,
        into: &Layout,
        remote: &Remote<'_>,
        progress: &LineSender,
    ) -> Result<(), ImageError> {
        let digest = from_oci(blob.digest())?;
        if into.size(&digest)? != Some(blob.size()) {
            self.attempt("reading a layer", progress, || {
                remote.asked("registry pull", remote.download(&digest, blob.size(), into))
            })
            .await?;
        }
        self.remember(remote, &digest);
        Ok(())
    }

    /// Brings all of an image into a layout.
    async fn fetch_into(
        &self,
        image: &PinnedImage,
        into: &Layout,
        progress: &LineSender,
    ) -> Result<Image, ImageError> {
        let remote = self
            .connect(by_digest(&image.repository, &image.digest)?)
            .await?;
        let fetched = self.fetch_documents(image, into, &remote, progress).await?;
        let layers = fetched.manifest.layers();
        for (i, layer) in layers.iter().enumerate() {
            if into.size(&from_oci(layer.digest())?)? != Some(layer.size()) {
                progress
                    .send(format!(
                        "fetching layer {} of {} ({})",
                        i + 1,
                        layers.len(),
                        megabytes(layer.size())
                    ))
                    .await;
            }
            self.fetch_blob(layer, into, &remote, progress).await?;
        }
        Ok(fetched)
    }

    fn remember(&self, remote: &Remote<'_>, digest: &Digest) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= MAX_SEEN {
            seen.clear();
        }
        seen.insert(
            (remote.registry.clone(), digest.clone()),
            remote.reference.clone(),
        );
    }

    /// Another repository of the same registry that has the blob.
    fn elsewhere(&self, remote: &Remote<'_>, digest: &Digest) -> Option<Reference> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(&(remote.registry.clone(), digest.clone()))
            .filter(|r| r.repository() != remote.reference.repository())
            .cloned()
    }
}

#[async_trait]
impl ImageStore for RegistryStore {
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
        let remote = self.connect(by_tag(repository, tag)?).await?;
        let (layout, digest) = (image.layout.clone(), image.digest.clone());
        let (bytes, content) = blocking(move |_| {
            Ok::<_, ImageError>((
                layout.read(&digest, MAX_DOCUMENT)?,
                Image::read(&layout, &digest)?,
            ))
        })
        .await?;
        if content.digest != image.digest {
            return Err(ImageError::Unsupported(
                "an image for several platforms cannot be pushed".into(),
            ));
        }

        let media_type = Document::parse(&bytes, &image.digest)?.media_type();
        let mut rounds = 1..self.options.attempts;
        let found = loop {
            self.push_blobs(&content, &image.layout, &remote, progress)
                .await?;
            let pushed = self
                .attempt("pushing the manifest", progress, || {
                    let pushing = remote.push_manifest(&bytes, media_type.as_ref());
                    remote.asked("registry push", pushing)
                })
                .await?;
            match pushed {
                Pushed::Done => {
                    break self
                        .attempt("checking the tag", progress, || {
                            remote.asked("registry resolve", remote.digest())
                        })
                        .await?;
                }
                // Some registries do that for a moment if others push the same blobs.
                Pushed::BlobsMissing(error) => {
                    if rounds.next().is_none() {
                        return Err(error);
                    }
                    progress
                        .send("the registry misses layers, pushing them again")
                        .await;
                    tokio::time::sleep(self.options.first_delay).await;
                }
            }
        };
        if found != image.digest {
            return Err(ImageError::TagMoved {
                reference: pinned.to_string(),
                expected: image.digest.clone(),
                actual: found,
            });
        }
        progress.send(format!("pushed {pinned}")).await;
        Ok(pinned)
    }

    async fn resolve(&self, reference: &ImageReference) -> Result<PinnedImage, ImageError> {
        let quiet = LineSender::discard();
        let tag = asked_tag(reference);
        let asked = match (tag, &reference.digest) {
            (Some(tag), _) => by_tag(&reference.repository, tag)?,
            (None, Some(digest)) => by_digest(&reference.repository, digest)?,
            (None, None) => {
                return Err(ImageError::NotFound {
                    reference: reference.to_string(),
                });
            }
        };
        let remote = self.connect(asked).await?;
        let actual = self
            .attempt("asking the registry", &quiet, || {
                remote.asked("registry resolve", remote.digest())
            })
            .await?;
        if let Some(expected) = &reference.digest
            && *expected != actual
        {
            return Err(ImageError::TagMoved {
                reference: reference.to_string(),
                expected: expected.clone(),
                actual,
            });
        }
        Ok(PinnedImage {
            repository: reference.repository.clone(),
            tag: tag.cloned().unwrap_or_else(|| digest_tag(&actual)),
            digest: actual,
        })
    }

    async fn config(&self, image: &PinnedImage) -> Result<ImageConfig, ImageError> {
        let remote = self
            .connect(by_digest(&image.repository, &image.digest)?)
            .await?;
        let quiet = LineSender::discard();
        let fetched = self
            .fetch_documents(image, &self.cache, &remote, &quiet)
            .await?;
        Ok(ImageConfig::from(&fetched.configuration))
    }

    async fn size(&self, image: &PinnedImage) -> Result<u64, ImageError> {
        let remote = self
            .connect(by_digest(&image.repository, &image.digest)?)
            .await?;
        let quiet = LineSender::discard();
        let fetched = self
            .fetch_documents(image, &self.cache, &remote, &quiet)
            .await?;
        Ok(fetched.size())
    }

    async fn unpack(&self, image: &PinnedImage, into: &Path) -> Result<(), ImageError> {
        let quiet = LineSender::discard();
        let mut healed = false;
        loop {
            let fetched = self.fetch_into(image, &self.cache, &quiet).await?;
            let (cache, limits, into) = (self.cache.clone(), self.options.limits, into.to_owned());
            let result = blocking(move |stop| unpack(&cache, &fetched, &into, limits, stop)).await;
            match result {
                // What the disk damaged is fetched again, once.
                Err(ImageError::Damaged { digest, .. }) if !healed => {
                    tracing::warn!(%digest, %image, "a cached blob is damaged and is fetched again");
                    self.cache.discard_blob(&digest)?;
                    healed = true;
                }
                other => return other,
            }
        }
    }

    async fn fetch(
        &self,
        image: &PinnedImage,
        into: &Layout,
        progress: &LineSender,
    ) -> Result<(), ImageError> {
        self.fetch_into(image, into, progress).await?;
        Ok(())
    }
}

/// What became of an upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Uploaded {
    Sent,
    Mounted,
    AlreadyThere,
}

/// What became of a manifest.
enum Pushed {
    Done,
    /// The registry says that it does not have all blobs that the manifest names.
    BlobsMissing(ImageError),
}

/// One image of one registry.
struct Remote<'a> {
    store: &'a RegistryStore,
    client: Client,
    auth: RegistryAuth,
    registry: String,
    reference: Reference,
}

impl Remote<'_> {
    /// Asks the registry for something, with a span of its own.
    fn asked<T>(
        &self,
        name: &'static str,
        work: impl Future<Output = Result<T, ImageError>>,
    ) -> impl Future<Output = Result<T, ImageError>> {
        // What is asked for may be a large future, and each that holds it would be larger still.
        let work = Box::pin(work);
        daybook_trace::request(name, &self.registry, work, ImageError::code)
    }

    /// The digest that the reference has now.
    async fn digest(&self) -> Result<Digest, ImageError> {
        let digest = self
            .client
            .fetch_manifest_digest(&self.reference, &self.auth)
            .await
            .map_err(|e| self.error(e))?;
        Digest::parse(digest).map_err(|e| self.misbehaves(&e))
    }

    async fn manifest(&self, digest: &Digest) -> Result<Vec<u8>, ImageError> {
        let accepted = [
            OCI_IMAGE_MEDIA_TYPE,
            OCI_IMAGE_INDEX_MEDIA_TYPE,
            DOCKER_MANIFEST,
            DOCKER_INDEX,
        ];
        let reference = self.reference.clone_with_digest(digest.to_string());
        let (bytes, _) = self
            .client
            .pull_manifest_raw(&reference, &self.auth, &accepted)
            .await
            .map_err(|e| self.error(e))?;
        Ok(bytes.to_vec())
    }

    async fn push_manifest(&self, bytes: &[u8], media_type: &str) -> Result<Pushed, ImageError> {
        let content_type = media_type.parse().map_err(|_| ImageError::Invalid {
            what: "the manifest's media type".into(),
            reason: media_type.to_owned(),
        })?;
        let pushing = self
            .client
            .push_manifest_raw(&self.reference, bytes.to_vec(), content_type);
        let Err(error) = pushing.await else {
            return Ok(Pushed::Done);
        };
        let error = told(error);
        let blobs_missing = matches!(&error, OciDistributionError::RegistryError { envelope, .. }
            if envelope.errors.iter().any(|e| e.code == OciErrorCode::ManifestBlobUnknown));
        let error = self.error(error);
        if blobs_missing {
            daybook_trace::failed(error.code());
            Ok(Pushed::BlobsMissing(error))
        } else {
            Err(error)
        }
    }

    async fn download(&self, digest: &Digest, size: u64, into: &Layout) -> Result<(), ImageError> {
        let source = self
            .client
            .pull_blob_stream(&self.reference, digest.as_str())
            .await
            .map_err(|e| self.error(e))?;
        let mut stream = source.stream;
        let mut writer = into.writer()?;
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|e| ImageError::Unreachable {
                registry: self.registry.clone(),
                source: Box::new(e),
            })?;
            writer
                .write_all(&chunk)
                .map_err(ImageError::io("writing a layer"))?;
            if writer.size() > size {
                return Err(ImageError::Damaged {
                    digest: digest.clone(),
                    reason: format!("the registry sends more than the {size} bytes that it has"),
                });
            }
        }
        let digest = digest.clone();
        blocking(move |_| writer.finish(Some(&digest))).await?;
        Ok(())
    }

    /// Sends a blob, unless the registry has it or can take it over from another repository.
    async fn upload(
        &self,
        layout: &Layout,
        digest: &Digest,
        size: u64,
    ) -> Result<Uploaded, ImageError> {
        if self
            .client
            .blob_exists(&self.reference, digest.as_str())
            .await
            .map_err(|e| self.error(e))?
        {
            return Ok(Uploaded::AlreadyThere);
        }
        if let Some(source) = self.store.elsewhere(self, digest) {
            let mounting = self
                .client
                .mount_blob(&self.reference, &source, digest.as_str());
            // A registry may refuse this for many reasons, and then the blob is sent.
            if mounting.await.is_ok() {
                return Ok(Uploaded::Mounted);
            }
        }
        let found = layout.size(digest)?.unwrap_or_default();
        if found != size {
            return Err(ImageError::Damaged {
                digest: digest.clone(),
                reason: format!("it has {found} bytes instead of {size}"),
            });
        }
        let path = layout.blob_path(digest);
        let file = tokio::fs::File::open(&path)
            .await
            .map_err(ImageError::io(format!("opening {}", path.display())))?;
        let stream =
            ReaderStream::with_capacity(file, 64 * 1024).map_err(OciDistributionError::from);
        let sent = self
            .client
            .push_blob_stream(&self.reference, stream, digest.as_str(), Some(size))
            .await;
        match sent.map_err(|e| self.error(e)) {
            Ok(_) => Ok(Uploaded::Sent),
            // It may be our content that the registry does not like.
            Err(error @ ImageError::Registry { .. }) => {
                let (layout, digest) = (layout.clone(), digest.clone());
                blocking(move |_| layout.open_blob(&digest)?.finish()).await?;
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    fn error(&self, error: OciDistributionError) -> ImageError {
        use OciDistributionError as E;
        match told(error) {
            E::RequestError(e) => match e.status() {
                Some(status) => self.by_status(status.as_u16(), &status.to_string()),
                None => ImageError::Unreachable {
                    registry: self.registry.clone(),
                    // A URL may carry an upload's state; the registry's name says enough.
                    source: Box::new(e.without_url()),
                },
            },
            E::UnauthorizedError { .. } | E::AuthenticationFailure(_) => self.refused(),
            E::ServerError { code, message, .. } => self.by_status(code, &message),
            E::RegistryError { envelope, .. } => self.by_codes(&envelope.errors),
            E::IoError(source) => ImageError::Unreachable {
                registry: self.registry.clone(),
                source: Box::new(source),
            },
            other => self.misbehaves(&other),
        }
    }

    fn by_codes(&self, errors: &[OciError]) -> ImageError {
        use OciErrorCode as C;
        let has = |codes: &[C]| errors.iter().any(|e| codes.contains(&e.code));
        if has(&[C::Unauthorized, C::Denied]) {
            return self.refused();
        }
        if has(&[
            C::ManifestUnknown,
            C::NameUnknown,
            C::NotFound,
            C::BlobUnknown,
        ]) {
            return self.not_found();
        }
        let messages: Vec<_> = errors.iter().map(|e| e.message.as_str()).collect();
        ImageError::Registry {
            registry: self.registry.clone(),
            message: shortened(&messages.join("; ")),
            // An upload that the registry has forgotten or mixed up is begun anew.
            transient: has(&[
                C::Toomanyrequests,
                C::BlobUploadUnknown,
                C::BlobUploadInvalid,
                C::ManifestBlobUnknown,
                C::DigestInvalid,
            ]),
        }
    }

    fn by_status(&self, status: u16, message: &str) -> ImageError {
        daybook_trace::say(|| vec![KeyValue::new(attribute::STATUS, i64::from(status))]);
        match status {
            401 | 403 => self.refused(),
            404 => self.not_found(),
            _ => ImageError::Registry {
                registry: self.registry.clone(),
                message: shortened(&format!("{status} {message}")),
                transient: status == 429 || status >= 500,
            },
        }
    }

    fn refused(&self) -> ImageError {
        ImageError::AccessRefused {
            registry: self.registry.clone(),
            reference: self.reference.to_string(),
            with_credentials: self.auth != RegistryAuth::Anonymous,
        }
    }

    fn not_found(&self) -> ImageError {
        ImageError::NotFound {
            reference: self.reference.to_string(),
        }
    }

    fn misbehaves(&self, error: &dyn std::fmt::Display) -> ImageError {
        ImageError::Registry {
            registry: self.registry.clone(),
            message: shortened(&error.to_string()),
            transient: false,
        }
    }
}

/// Reads what the registry says about a refused request where the client has not done so: in
/// answers to uploads.
fn told(error: OciDistributionError) -> OciDistributionError {
    match error {
        OciDistributionError::ServerError { url, code, message } if (400..500).contains(&code) => {
            match serde_json::from_str(&message) {
                Ok(envelope) => OciDistributionError::RegistryError { envelope, url },
                Err(_) => OciDistributionError::ServerError { url, code, message },
            }
        }
        other => other,
    }
}

fn by_tag(repository: &ImageRepository, tag: &ImageTag) -> Result<Reference, ImageError> {
    let (registry, path) = place(repository)?;
    Ok(Reference::with_tag(registry, path, tag.to_string()))
}

fn by_digest(repository: &ImageRepository, digest: &Digest) -> Result<Reference, ImageError> {
    let (registry, path) = place(repository)?;
    Ok(Reference::with_digest(registry, path, digest.to_string()))
}

/// The registry of a repository, and where it is there, as Docker reads it: without a host it is Docker
/// Hub's, where what has one part only is official.
///
/// `Reference::from_str` says the same, with a regular expression that keeps 13 MB once it was used.
fn place(repository: &ImageRepository) -> Result<(String, String), ImageError> {
    let name = repository.as_str();
    let (registry, path) = match name.split_once('/') {
        Some((host, path)) if host.contains(['.', ':']) || host == "localhost" => (host, path),
        _ => (DOCKER_HUB, name),
    };
    let registry = match registry {
        "index.docker.io" => DOCKER_HUB,
        other => other,
    };
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    // What is a host is written as one, or as a part of a path.
    let hosts = host.split('.').all(is_label) || (host == registry && is_component(host));
    let unfit = match hosts {
        true => path.split('/').find(|part| !is_component(part)),
        false => Some(host),
    };
    if let Some(part) = unfit {
        return Err(ImageError::Invalid {
            what: format!("the image repository {name}"),
            reason: format!(
                "in {part:?} letters and digits are to be separated by one dot, one or two underscores, or \
                 hyphens"
            ),
        });
    }
    let path = match registry == DOCKER_HUB && !path.contains('/') {
        true => format!("library/{path}"),
        false => path.to_owned(),
    };
    Ok((registry.to_owned(), path))
}

/// Whether this may be between the dots of a host.
fn is_label(part: &str) -> bool {
    let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    part.starts_with(is_word)
        && part.ends_with(is_word)
        && part.chars().all(|c| is_word(c) || c == '-')
}

/// Whether this may be between the slashes of a repository's path (`path-component` of
/// [the distribution project's grammar](https://pkg.go.dev/github.com/distribution/reference)).
fn is_component(part: &str) -> bool {
    let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let mut separators = part.split(is_word).filter(|between| !between.is_empty());
    let is_separator =
        |between: &str| matches!(between, "." | "_" | "__") || between.bytes().all(|b| b == b'-');
    part.starts_with(is_word) && part.ends_with(is_word) && separators.all(is_separator)
}

/// Whether a registry is on this machine, where nobody can listen in between.
fn is_loopback(registry: &str) -> bool {
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

fn megabytes(bytes: u64) -> String {
    if bytes < 1_000_000 {
        format!("{:.1} kB", bytes as f64 / 1e3)
    } else {
        format!("{:.1} MB", bytes as f64 / 1e6)
    }
}

fn shortened(message: &str) -> String {
    message.trim().chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the library reads them, which is not asked because of what that costs.
    #[test]
    fn repositories_are_where_docker_says() {
        for name in [
            "busybox",
            "team/web",
            "docker.io/web",
            "index.docker.io/web",
            "docker.io/team/web",
            "localhost/web",
            "localhost:5000/team/web",
            "127.0.0.1:5000/web",
            "ghcr.io/team/a.b_c__d--e/web",
            "registry.example.com/web",
            "a..b/c",
            "a._b/c",
            "a_b.c/d",
            "a_b:80/c",
            "a-b.c:80/d",
            "a-.b/c",
            "a___b/c",
            "a_-b",
        ] {
            let theirs = format!("{name}:v1").parse::<Reference>().ok();
            let Ok(repository) = ImageRepository::parse(name) else {
                assert!(theirs.is_none(), "{name}");
                continue;
            };
            let tag = ImageTag::parse("v1").unwrap();
            assert_eq!(by_tag(&repository, &tag).ok(), theirs, "{name}");
        }
    }

    #[test]
    fn only_loopback_is_plain() {
        for registry in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.9.9.9"] {
            assert!(is_loopback(registry), "{registry}");
        }
        for registry in [
            "localhost.example",
            "10.0.0.1:5000",
            "ghcr.io",
            "127.0.0.1.example",
        ] {
            assert!(!is_loopback(registry), "{registry}");
        }
    }
}
