//! What the tests have in common: small archives, images and sources.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;

use daybook_events::spec::BuildSpec;
use daybook_events::{
    BuildId, CommitId, Digest, ImageRepository, ImageTag, RepositoryUrl, ServiceName,
};
use daybook_workers::builder::{BuildContext, BuiltImage};
use daybook_workers::image::layout::Layout;
use daybook_workers::image::manifest::Image;
use daybook_workers::output::LineSender;
use oci_spec::image::{
    ConfigBuilder, Descriptor, ImageConfigurationBuilder, ImageManifestBuilder, MediaType,
    RootFsBuilder,
};
use tokio::sync::mpsc;

/// An archive in the making. Names are written as they are, also those that no honest tool
/// would write.
pub(crate) struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    pub(crate) fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    pub(crate) fn entry(
        mut self,
        kind: tar::EntryType,
        path: &str,
        target: &str,
        data: &[u8],
    ) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(if kind == tar::EntryType::Directory {
            0o755
        } else {
            0o644
        });
        header.set_size(data.len() as u64);
        header.set_mtime(1_600_000_000);
        let fields = header.as_gnu_mut().unwrap();
        fields.name[..path.len()].copy_from_slice(path.as_bytes());
        fields.linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    pub(crate) fn file(self, path: &str, text: &str) -> Self {
        self.entry(tar::EntryType::Regular, path, "", text.as_bytes())
    }

    pub(crate) fn dir(self, path: &str) -> Self {
        self.entry(tar::EntryType::Directory, path, "", b"")
    }

    pub(crate) fn link(self, path: &str, target: &str) -> Self {
        self.entry(tar::EntryType::Symlink, path, target, b"")
    }

    pub(crate) fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(tar::EntryType::Link, path, target, b"")
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An image of these uncompressed layers, gzipped.
pub(crate) fn image_of(layout: &Layout, layers: &[Vec<u8>]) -> Image {
    let zipped: Vec<_> = layers.iter().map(|l| gzip(l)).collect();
    image_of_blobs(layout, &zipped, MediaType::ImageLayerGzip)
}

pub(crate) fn image_of_blobs(layout: &Layout, blobs: &[Vec<u8>], media_type: MediaType) -> Image {
    let configuration = ImageConfigurationBuilder::default()
        .os("linux")
        .config(
            ConfigBuilder::default()
                .env(vec!["PATH=/usr/bin:/bin".to_owned(), "LANG=C".to_owned()])
                .entrypoint(vec!["/bin/start".to_owned()])
                .cmd(vec!["--now".to_owned()])
                .working_dir("/srv")
                .exposed_ports(vec!["8080/tcp".to_owned(), "53/udp".to_owned()])
                .build()
                .unwrap(),
        )
        .rootfs(
            RootFsBuilder::default()
                .typ("layers")
                .diff_ids(
                    blobs
                        .iter()
                        .map(|b| Digest::of(b).to_string())
                        .collect::<Vec<_>>(),
                )
                .build()
                .unwrap(),
        )
        .build()
        .unwrap();
    let put = |bytes: &[u8], media_type: MediaType| {
        let digest = layout.put(bytes).unwrap();
        let digest: oci_spec::image::Digest = digest.as_str().parse().unwrap();
        Descriptor::new(media_type, bytes.len() as u64, digest)
    };
    let manifest = ImageManifestBuilder::default()
        .schema_version(2u32)
        .media_type(MediaType::ImageManifest)
        .config(put(
            configuration.to_string().unwrap().as_bytes(),
            MediaType::ImageConfig,
        ))
        .layers(
            blobs
                .iter()
                .map(|b| put(b, media_type.clone()))
                .collect::<Vec<_>>(),
        )
        .build()
        .unwrap();
    let digest = layout
        .put(manifest.to_string().unwrap().as_bytes())
        .unwrap();
    Image::read(layout, &digest).unwrap()
}

/// The same as a builder would have returned it.
pub(crate) fn built(layout: &Layout, image: &Image) -> BuiltImage {
    let digests: Vec<Digest> = image
        .blobs()
        .map(|b| Digest::parse(b.digest()).unwrap())
        .collect();
    BuiltImage {
        layout: layout.clone(),
        digest: image.digest.clone(),
        config: digests[0].clone(),
        layers: digests[1..].to_vec(),
        builder: "test",
        kind: "test".into(),
        size: image.blobs().map(Descriptor::size).sum(),
        base: None,
    }
}

pub(crate) fn repository(text: impl AsRef<str>) -> ImageRepository {
    ImageRepository::parse(text).unwrap()
}

pub(crate) fn tag(text: &str) -> ImageTag {
    ImageTag::parse(text).unwrap()
}

/// A folder with these files; names that end in a slash are folders.
pub(crate) fn write_files(folder: &Path, files: &[(&str, &str)]) {
    for (name, text) in files {
        let path = folder.join(name);
        if name.ends_with('/') {
            fs::create_dir_all(&path).unwrap();
        } else {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
        }
    }
}

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What a build of a checkout is told.
pub(crate) fn context(checkout: &Path, output: &Layout, spec: BuildSpec) -> BuildContext {
    BuildContext {
        checkout: checkout.to_owned(),
        path: String::new(),
        service: ServiceName::parse("api").unwrap(),
        spec,
        url: RepositoryUrl::parse("https://git.example/shop/api").unwrap(),
        commit: CommitId::parse(COMMIT).unwrap(),
        committed_at: "2024-05-06T07:08:09.5Z".parse().unwrap(),
        build: BuildId::derived(uuid::Uuid::nil(), COMMIT),
        labels: BTreeMap::from([("dev.daybook.project".to_owned(), "shop".to_owned())]),
        output: output.clone(),
    }
}

/// Collects lines in the background.
pub(crate) fn collect() -> (LineSender, Arc<std::sync::Mutex<Vec<String>>>) {
    let (sender, mut receiver) = LineSender::channel(64);
    let lines = Arc::new(std::sync::Mutex::new(Vec::new()));
    let kept = Arc::clone(&lines);
    tokio::spawn(async move {
        while let Some(line) = receiver.recv().await {
            kept.lock().unwrap().push(line);
        }
    });
    (sender, lines)
}

/// Waits for a line that contains a text.
pub(crate) async fn line_with(lines: &mut mpsc::Receiver<String>, text: &str) -> String {
    let waiting = async {
        loop {
            let line = lines.recv().await.expect("the output ended");
            if line.contains(text) {
                return line;
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), waiting)
        .await
        .unwrap_or_else(|_| panic!("no line with {text:?}"))
}

/// The names in a folder; none if it does not exist.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// TLS is set up by the binary, and here by the tests.
pub(crate) fn install_tls() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}
