//! Images in a real registry.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use daybook_events::Digest;
use daybook_events::spec::{ImageReference, PinnedImage};
use daybook_testkit::registry::{PASSWORD, Registry, RegistryConfig};
use daybook_workers::builder::BuiltImage;
use daybook_workers::image::credentials::Credentials;
use daybook_workers::image::layout::Layout;
use daybook_workers::image::local::LayoutStore;
use daybook_workers::image::manifest::Image;
use daybook_workers::image::registry::{RegistryOptions, RegistryStore};
use daybook_workers::image::store::{ImageStore, Images, digest_tag};
use daybook_workers::image::unpack::UnpackLimits;
use daybook_workers::output::LineSender;

use super::fixtures::{
    Tar, built, collect, image_of, image_of_blobs, install_tls, names, repository, tag,
};

struct World {
    dir: tempfile::TempDir,
    source: Layout,
}

impl World {
    fn new() -> Self {
        install_tls();
        let dir = tempfile::tempdir().unwrap();
        let source = Layout::open(dir.path().join("source")).unwrap();
        Self { dir, source }
    }

    fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    fn store(&self, credentials: Credentials) -> RegistryStore {
        let options = RegistryOptions {
            credentials,
            first_delay: Duration::from_millis(20),
            ..RegistryOptions::default()
        };
        RegistryStore::new(Layout::open(self.cache()).unwrap(), options)
    }

    fn anonymous(&self) -> RegistryStore {
        self.store(Credentials::none())
    }

    fn image(&self, text: &str) -> (Image, BuiltImage) {
        let layers = [
            Tar::new().dir("srv").file("srv/base", "base").bytes(),
            Tar::new().file("srv/app", text).bytes(),
        ];
        let image = image_of(&self.source, &layers);
        let built = built(&self.source, &image);
        (image, built)
    }
}

fn reference(text: String) -> ImageReference {
    text.parse().unwrap()
}

#[tokio::test]
async fn what_is_pushed_can_be_found_fetched_and_unpacked() {
    let Some(registry) = Registry::start(RegistryConfig::default()) else {
        return;
    };
    let world = World::new();
    let store = world.anonymous();
    let repo = repository(format!("{}/shop/api", registry.host()));
    let (image, built) = world.image("one");
    let (progress, lines) = collect();
    let pinned = store
        .push(&built, &repo, &tag("v1"), &progress)
        .await
        .unwrap();
    assert_eq!(pinned.digest, image.digest);
    drop(progress);
    let lines = lines.lock().unwrap().clone();
    assert!(
        lines.iter().any(|l| l.starts_with("pushed layer 2 of 2")),
        "{lines:?}"
    );

    for text in [format!("{repo}:v1"), format!("{repo}:v1@{}", image.digest)] {
        assert_eq!(store.resolve(&reference(text)).await.unwrap(), pinned);
    }
    let by_digest = store
        .resolve(&reference(format!("{repo}@{}", image.digest)))
        .await
        .unwrap();
    assert_eq!(by_digest.digest, image.digest);
    assert_eq!(by_digest.tag, digest_tag(&image.digest));
    // What was pinned by digest may be asked for again as it is shown.
    let shown = reference(by_digest.to_string());
    assert_eq!(store.resolve(&shown).await.unwrap(), by_digest);

    let config = store.config(&pinned).await.unwrap();
    assert_eq!(config.command(&[]), ["/bin/start", "--now"]);
    assert_eq!(config.command(&["own".to_owned()]), ["own"]);
    assert_eq!(config.working_dir, "/srv");
    assert_eq!(config.exposed_ports, [8080]);
    assert_eq!(config.env[1], ("LANG".to_owned(), "C".to_owned()));

    let into = world.dir.path().join("root");
    store.unpack(&by_digest, &into).await.unwrap();
    assert_eq!(fs::read_to_string(into.join("srv/app")).unwrap(), "one");
}

#[tokio::test]
async fn what_is_there_is_not_sent_again() {
    let Some(registry) = Registry::start(RegistryConfig::default()) else {
        return;
    };
    let world = World::new();
    let store = world.anonymous();
    let puts = |log: String| {
        log.lines()
            .filter(|l| l.contains("\"PUT /v2/") && l.contains("/blobs/uploads/"))
            .count()
    };
    let first = repository(format!("{}/shop/api", registry.host()));
    let (_, one) = world.image("one");
    let quiet = LineSender::discard();
    store.push(&one, &first, &tag("v1"), &quiet).await.unwrap();
    assert_eq!(puts(registry.log()), 3, "two layers and a configuration");
    store.push(&one, &first, &tag("v2"), &quiet).await.unwrap();
    assert_eq!(puts(registry.log()), 3, "nothing new");

    // Another image shares the lower layer.
    let (_, two) = world.image("two");
    store.push(&two, &first, &tag("v3"), &quiet).await.unwrap();
    assert_eq!(puts(registry.log()), 5, "its upper layer and configuration");

    // Another repository of the same registry takes over what it has.
    let second = repository(format!("{}/shop/web", registry.host()));
    let (progress, lines) = collect();
    let pinned = store
        .push(&two, &second, &tag("v1"), &progress)
        .await
        .unwrap();
    assert_eq!(
        puts(registry.log()),
        5,
        "all mounted: {:?}",
        lines.lock().unwrap()
    );
    store
        .unpack(&pinned, &world.dir.path().join("root"))
        .await
        .unwrap();
}

#[tokio::test]
async fn each_failure_says_what_it_is() {
    let Some(mut registry) = Registry::start(RegistryConfig::default()) else {
        return;
    };
    let world = World::new();
    let store = world.anonymous();
    let repo = repository(format!("{}/shop/api", registry.host()));
    let (one, built_one) = world.image("one");
    let (two, built_two) = world.image("two");
    let quiet = LineSender::discard();
    store
        .push(&built_one, &repo, &tag("v1"), &quiet)
        .await
        .unwrap();
    store
        .push(&built_two, &repo, &tag("v2"), &quiet)
        .await
        .unwrap();

    let code = async |text: String| match store.resolve(&reference(text)).await {
        Ok(pinned) => pinned.to_string(),
        Err(error) => {
            assert!(!error.remedy().is_empty());
            error.code().to_owned()
        }
    };
    assert_eq!(code(format!("{repo}:v9")).await, "image_not_found");
    assert_eq!(
        code(format!("{}/none/such:v1", registry.host())).await,
        "image_not_found"
    );
    assert_eq!(
        code(format!("{repo}@{}", Digest::of(b"missing"))).await,
        "image_not_found"
    );
    assert_eq!(
        code(format!("{repo}:v1@{}", two.digest)).await,
        "image_digest_mismatch"
    );
    assert_eq!(
        code(format!("{repo}:v9@{}", one.digest)).await,
        "image_not_found",
        "the tag is missing although the digest is there"
    );

    registry.kill();
    assert_eq!(code(format!("{repo}:v1")).await, "registry_unreachable");
    let error = store
        .push(&built_one, &repo, &tag("v1"), &quiet)
        .await
        .unwrap_err();
    assert_eq!(error.code(), "registry_unreachable");
    assert!(error.is_retryable());
}

#[tokio::test]
async fn passwords_open_the_door_and_show_up_nowhere() {
    let Some(registry) = Registry::start(RegistryConfig { password: true }) else {
        return;
    };
    let world = World::new();
    let repo = repository(format!("{}/shop/api", registry.host()));
    let (image, built) = world.image("one");
    let quiet = LineSender::discard();
    let push = async |store: &RegistryStore| store.push(&built, &repo, &tag("v1"), &quiet).await;

    let anonymous = world.anonymous();
    let error = push(&anonymous).await.unwrap_err();
    assert_eq!(error.code(), "registry_access_refused");
    assert!(error.to_string().contains("no credentials are configured"));
    let error = anonymous
        .resolve(&reference(format!("{repo}:v1")))
        .await
        .unwrap_err();
    assert_eq!(error.code(), "registry_access_refused");

    // The file is read anew each time: a login needs no restart.
    let file = registry.login("wrong canary");
    let store = world.store(Credentials::from_file(&file));
    let error = push(&store).await.unwrap_err();
    assert_eq!(error.code(), "registry_access_refused");
    assert!(
        error
            .to_string()
            .contains("with the configured credentials")
    );
    assert!(!format!("{error} {error:?} {store:?}").contains("canary"));

    registry.login(PASSWORD);
    let pinned = push(&store).await.unwrap();
    assert_eq!(pinned.digest, image.digest);
    assert!(!format!("{store:?}").contains(PASSWORD));
    store
        .unpack(&pinned, &world.dir.path().join("root"))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_killed_in_the_middle_of_a_push_is_no_end() {
    let Some(mut registry) = Registry::start(RegistryConfig::default()) else {
        return;
    };
    let world = World::new();
    // Large enough that the registry is killed while it is sent.
    let mut noise = vec![0u8; 96 << 20];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for chunk in noise.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
    let small = Tar::new().file("small", "small").bytes();
    let large = Tar::new()
        .entry(tar::EntryType::Regular, "large", "", &noise)
        .bytes();
    let image = image_of_blobs(
        &world.source,
        &[small, large],
        oci_spec::image::MediaType::ImageLayer,
    );
    let built = built(&world.source, &image);
    let repo = repository(format!("{}/shop/api", registry.host()));
    let store = Arc::new(world.anonymous());

    let pushing = tokio::spawn({
        let (store, built, repo) = (Arc::clone(&store), built.clone(), repo.clone());
        async move {
            store
                .push(&built, &repo, &tag("v1"), &LineSender::discard())
                .await
        }
    });
    let uploads = registry
        .storage()
        .join("docker/registry/v2/repositories/shop/api/_uploads");
    wait_for(|| {
        let begun = fs::read_dir(&uploads).into_iter().flatten().flatten();
        begun
            .filter_map(|u| fs::metadata(u.path().join("data")).ok())
            .any(|m| m.len() > 1 << 20)
    })
    .await;
    registry.kill();
    let error = pushing.await.unwrap().unwrap_err();
    assert_eq!(error.code(), "registry_unreachable", "{error}");

    registry.restart();
    assert_eq!(
        store
            .resolve(&reference(format!("{repo}:v1")))
            .await
            .unwrap_err()
            .code(),
        "image_not_found",
        "a tag appears only when all is there"
    );
    let (progress, lines) = collect();
    let pinned = store
        .push(&built, &repo, &tag("v1"), &progress)
        .await
        .unwrap();
    assert_eq!(pinned.digest, image.digest);
    let lines = lines.lock().unwrap().clone();
    assert!(
        lines.iter().any(|l| l == "layer 1 of 2 is already there"),
        "it goes on where it was interrupted: {lines:?}"
    );
    store
        .unpack(&pinned, &world.dir.path().join("root"))
        .await
        .unwrap();
}

async fn wait_for(mut condition: impl FnMut() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), waiting)
        .await
        .expect("the state is never reached");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_comes_back_is_waited_for() {
    let Some(mut registry) = Registry::start(RegistryConfig::default()) else {
        return;
    };
    let world = World::new();
    let store = RegistryStore::new(
        Layout::open(world.cache()).unwrap(),
        RegistryOptions {
            credentials: Credentials::none(),
            attempts: 1000,
            first_delay: Duration::from_millis(1),
            ..RegistryOptions::default()
        },
    );
    let repo = repository(format!("{}/shop/api", registry.host()));
    let (image, built) = world.image("one");
    registry.kill();
    let (progress, mut lines) = LineSender::channel(64);
    let pushing =
        tokio::spawn(async move { store.push(&built, &repo, &tag("v1"), &progress).await });
    super::fixtures::line_with(&mut lines, "trying again").await;
    registry.restart();
    tokio::spawn(async move { while lines.recv().await.is_some() {} });
    assert_eq!(pushing.await.unwrap().unwrap().digest, image.digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_push_the_same_at_once() {
    let Some(registry) = Registry::start(RegistryConfig::default()) else {
        return;
    };
    let world = World::new();
    let (image, built) = world.image("one");
    let repo = repository(format!("{}/shop/api", registry.host()));
    let mut pushes = tokio::task::JoinSet::new();
    for i in 0..8 {
        let store = world.anonymous();
        let (built, repo) = (built.clone(), repo.clone());
        pushes.spawn(async move {
            let tag = tag(&format!("v{}", i % 2));
            store
                .push(&built, &repo, &tag, &LineSender::discard())
                .await
        });
    }
    while let Some(pushed) = pushes.join_next().await {
        assert_eq!(pushed.unwrap().unwrap().digest, image.digest);
    }
    let store = world.anonymous();
    for tag in ["v0", "v1"] {
        let pinned = store
            .resolve(&reference(format!("{repo}:{tag}")))
            .await
            .unwrap();
        assert_eq!(pinned.digest, image.digest);
    }
}

#[tokio::test]
async fn what_the_registry_damaged_is_not_taken() {
    let Some(registry) = Registry::start(RegistryConfig::default()) else {
        return;
    };
    let world = World::new();
    let store = world.anonymous();
    let repo = repository(format!("{}/shop/api", registry.host()));
    let (image, built) = world.image("one");
    let pinned = store
        .push(&built, &repo, &tag("v1"), &LineSender::discard())
        .await
        .unwrap();
    let hex = built.layers[1].hex();
    let blob = registry.storage().join(format!(
        "docker/registry/v2/blobs/sha256/{}/{hex}/data",
        &hex[..2]
    ));
    let sound = fs::read(&blob).unwrap();
    let mut damaged = sound.clone();
    *damaged.last_mut().unwrap() ^= 1;
    fs::write(&blob, damaged).unwrap();

    let into = world.dir.path().join("root");
    let error = store.unpack(&pinned, &into).await.unwrap_err();
    assert!(
        ["image_content_damaged", "registry_unreachable"].contains(&error.code()),
        "{error:?}"
    );
    assert!(!into.exists());
    let cached = world.cache().join("blobs/sha256").join(hex);
    assert!(!cached.exists(), "damaged content was kept");

    fs::write(&blob, &sound).unwrap();
    store.unpack(&pinned, &into).await.unwrap();

    // What our own disk damaged is fetched again.
    let mut flipped = sound.clone();
    flipped[20] ^= 0xff;
    for damaged in [sound[..sound.len() / 2].to_vec(), flipped] {
        fs::write(&cached, damaged).unwrap();
        let into = tempfile::tempdir().unwrap();
        store.unpack(&pinned, into.path()).await.unwrap();
        assert_eq!(names(into.path()), ["srv"]);
    }
    assert_eq!(image.digest, pinned.digest);
}

#[tokio::test]
async fn what_our_disk_damaged_is_not_pushed() {
    let Some(registry) = Registry::start(RegistryConfig::default()) else {
        return;
    };
    let world = World::new();
    let store = world.anonymous();
    let repo = repository(format!("{}/shop/api", registry.host()));
    let (_, built) = world.image("one");
    let path = world.source.blob_path(&built.layers[0]);
    let sound = fs::read(&path).unwrap();
    let mut flipped = sound.clone();
    flipped[20] ^= 1;
    for damaged in [&flipped[..], &sound[1..]] {
        fs::write(&path, damaged).unwrap();
        let error = store
            .push(&built, &repo, &tag("v1"), &LineSender::discard())
            .await
            .unwrap_err();
        assert_eq!(error.code(), "image_content_damaged", "{error}");
    }
    let missing = store.resolve(&reference(format!("{repo}:v1"))).await;
    assert_eq!(missing.unwrap_err().code(), "image_not_found");
}

#[tokio::test]
async fn a_local_image_needs_no_registry() {
    let world = World::new();
    let folder = world.dir.path().join("images");
    let local = || LayoutStore::open(&folder, UnpackLimits::default()).unwrap();
    let images = Images::new(local(), world.anonymous());
    let repo = repository("local.daybook/shop/api");
    let (image, built) = world.image("one");
    let pinned = images
        .push(&built, &repo, &tag("v1"), &LineSender::discard())
        .await
        .unwrap();
    assert_eq!(pinned.digest, image.digest);

    // Another process, later.
    let images = Images::new(local(), world.anonymous());
    let resolve = async |text: String| images.resolve(&reference(text)).await;
    assert_eq!(resolve(format!("{repo}:v1")).await.unwrap(), pinned);
    assert_eq!(
        resolve(format!("{repo}:v1@{}", image.digest))
            .await
            .unwrap(),
        pinned
    );
    let by_digest = resolve(format!("{repo}@{}", image.digest)).await.unwrap();
    assert_eq!(resolve(by_digest.to_string()).await.unwrap(), by_digest);
    for (text, code) in [
        (format!("{repo}:v2"), "image_not_found"),
        (format!("{repo}@{}", Digest::of(b"x")), "image_not_found"),
        (
            format!("{repo}:v1@{}", Digest::of(b"x")),
            "image_digest_mismatch",
        ),
    ] {
        assert_eq!(resolve(text).await.unwrap_err().code(), code);
    }
    let into = world.dir.path().join("root");
    images.unpack(&by_digest, &into).await.unwrap();
    assert_eq!(fs::read_to_string(into.join("srv/app")).unwrap(), "one");
    assert_eq!(images.config(&pinned).await.unwrap().working_dir, "/srv");

    let missing = PinnedImage {
        digest: Digest::of(b"x"),
        ..pinned
    };
    assert_eq!(
        images.config(&missing).await.unwrap_err().code(),
        "image_not_found"
    );
    let error = images
        .unpack(&missing, &world.dir.path().join("no"))
        .await
        .unwrap_err();
    assert_eq!(error.code(), "image_not_found");
}
