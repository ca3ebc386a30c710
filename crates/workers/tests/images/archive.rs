//! The built-in builder.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use daybook_events::spec::{BuildSpec, BuilderKind};
use daybook_testkit::registry::{Registry, RegistryConfig};
use daybook_workers::builder::archive::ArchiveBuilder;
use daybook_workers::builder::{BuildContext, BuildError, Builder, BuiltImage};
use daybook_workers::image::credentials::Credentials;
use daybook_workers::image::layout::Layout;
use daybook_workers::image::local::LayoutStore;
use daybook_workers::image::manifest::{Image, ImageConfig};
use daybook_workers::image::registry::{RegistryOptions, RegistryStore};
use daybook_workers::image::store::{ImageStore, Images};
use daybook_workers::image::unpack::{UnpackLimits, unpack};
use daybook_workers::output::LineSender;
use oci_spec::image::MediaType;
use tokio_util::sync::CancellationToken;

use super::fixtures::{
    Tar, built, collect, context, image_of, install_tls, line_with, names, repository, tag,
    write_files,
};

pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) output: Layout,
    pub(crate) images: Arc<Images>,
}

impl World {
    pub(crate) fn new() -> Self {
        install_tls();
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("source")).unwrap();
        let output = Layout::open(dir.path().join("output")).unwrap();
        let local = LayoutStore::open(dir.path().join("images"), UnpackLimits::default()).unwrap();
        let registries = RegistryStore::new(
            Layout::open(dir.path().join("cache")).unwrap(),
            RegistryOptions {
                credentials: Credentials::none(),
                first_delay: Duration::from_millis(10),
                ..RegistryOptions::default()
            },
        );
        let images = Arc::new(Images::new(local, registries));
        Self {
            dir,
            output,
            images,
        }
    }

    pub(crate) fn with(files: &[(&str, &str)]) -> Self {
        let world = Self::new();
        write_files(&world.source(), files);
        world
    }

    pub(crate) fn source(&self) -> PathBuf {
        self.dir.path().join("source")
    }

    pub(crate) fn scratch(&self) -> PathBuf {
        self.dir.path().join("scratch")
    }

    pub(crate) fn builder(&self) -> ArchiveBuilder {
        ArchiveBuilder::new(self.images.clone(), self.scratch())
    }

    pub(crate) fn context(&self, spec: BuildSpec) -> BuildContext {
        context(&self.source(), &self.output, spec)
    }

    async fn build(&self, spec: BuildSpec) -> Result<BuiltImage, BuildError> {
        let (sender, _lines) = collect();
        let context = self.context(spec);
        self.builder()
            .build(&context, &sender, &CancellationToken::new())
            .await
    }

    async fn refused(&self, spec: BuildSpec, code: &str) -> BuildError {
        let error = self.build(spec).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(!error.remedy().is_empty());
        assert!(
            names(&self.scratch()).is_empty(),
            "something was left behind"
        );
        error
    }

    pub(crate) fn unpacked(&self, image: &BuiltImage) -> PathBuf {
        let into = self
            .dir
            .path()
            .join(format!("unpacked-{}", image.digest.hex()));
        let image = Image::read(&self.output, &image.digest).unwrap();
        let limits = UnpackLimits::default();
        unpack(
            &self.output,
            &image,
            &into,
            limits,
            &CancellationToken::new(),
        )
        .unwrap();
        into
    }
}

fn spec(command: &[&str]) -> BuildSpec {
    BuildSpec {
        builder: BuilderKind::Archive,
        command: command.iter().map(|w| (*w).to_owned()).collect(),
        ..BuildSpec::default()
    }
}

fn shell(script: &str) -> BuildSpec {
    spec(&["sh", "-c", script])
}

const PYTHON: &[(&str, &str)] = &[
    ("app.py", "print('hello')\n"),
    ("lib/a/deep.py", ""),
    ("lib/empty/", ""),
    (".git/config", "[core]"),
    (
        "static/a-name-that-is-longer-than-the-hundred-characters-that-fit-into-the-header-of-an-archive-entry/and-goes-on.txt",
        "x",
    ),
];

#[tokio::test]
async fn the_same_source_makes_the_same_image() {
    let one = World::with(PYTHON);
    let first = one.build(spec(&[])).await.unwrap();
    assert_eq!(first.kind, "Python: python3 app.py");
    assert_eq!(first.builder, "archive");

    // Elsewhere, later, written in another order, by somebody with another umask.
    let other = World::new();
    for file in PYTHON.iter().rev() {
        write_files(&other.source(), &[*file]);
    }
    let app = other.source().join("app.py");
    fs::set_permissions(&app, fs::Permissions::from_mode(0o600)).unwrap();
    let file = fs::File::options().write(true).open(&app).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    fs::remove_dir_all(other.source().join(".git")).unwrap();
    let second = other.build(spec(&[])).await.unwrap();
    assert_eq!(first.digest, second.digest);

    let again = other.build(spec(&[])).await.unwrap();
    assert_eq!(first.digest, again.digest);

    for (name, text) in [("app.py", "print('changed')\n"), ("new", "")] {
        write_files(&other.source(), &[(name, text)]);
        assert_ne!(other.build(spec(&[])).await.unwrap().digest, first.digest);
    }
    let other = World::with(PYTHON);
    let mut changed = other.context(spec(&[]));
    changed.committed_at = "2025-01-01T00:00:00Z".parse().unwrap();
    let quiet = LineSender::discard();
    let third = other
        .builder()
        .build(&changed, &quiet, &CancellationToken::new())
        .await
        .unwrap();
    assert_ne!(third.digest, first.digest);
}

#[tokio::test]
async fn a_bare_image_says_where_it_is_from_and_how_it_starts() {
    let world = World::with(PYTHON);
    fs::set_permissions(
        world.source().join("lib/a/deep.py"),
        fs::Permissions::from_mode(0o777),
    )
    .unwrap();
    symlink("../app.py", world.source().join("lib/link.py")).unwrap();
    let built = world.build(spec(&[])).await.unwrap();
    let image = Image::read(&world.output, &built.digest).unwrap();

    assert_eq!(image.manifest.media_type(), &Some(MediaType::ImageManifest));
    let annotations = image.manifest.annotations().clone().unwrap();
    for (key, value) in [
        ("org.opencontainers.image.revision", super::fixtures::COMMIT),
        (
            "org.opencontainers.image.source",
            "https://git.example/shop/api",
        ),
        ("org.opencontainers.image.created", "2024-05-06T07:08:09Z"),
        ("dev.daybook.project", "shop"),
    ] {
        assert_eq!(annotations[key], value);
    }
    let configuration = &image.configuration;
    assert_eq!(
        configuration.created().as_deref(),
        Some("2024-05-06T07:08:09Z")
    );
    assert_eq!(configuration.os(), &oci_spec::image::Os::Linux);
    assert_eq!(configuration.rootfs().diff_ids().len(), 1);
    let config = ImageConfig::from(configuration);
    assert_eq!(config.command(&[]), ["python3", "app.py"]);
    assert_eq!(config.working_dir, "/app");
    assert!(config.labels.contains_key("dev.daybook.build"));

    let root = world.unpacked(&built);
    assert_eq!(names(&root), ["app"]);
    assert_eq!(names(&root.join("app")), ["app.py", "lib", "static"]);
    assert_eq!(names(&root.join("app/lib")), ["a", "empty", "link.py"]);
    let mode = |path: &str| {
        let meta = fs::metadata(root.join(path)).unwrap();
        meta.permissions().mode() & 0o777
    };
    assert_eq!(mode("app/app.py"), 0o644);
    assert_eq!(mode("app/lib/a/deep.py"), 0o755);

    // It runs.
    let output = std::process::Command::new("python3")
        .arg("app.py")
        .current_dir(root.join("app"))
        .output();
    match output {
        Ok(output) => assert_eq!(output.stdout, b"hello\n"),
        Err(e) => daybook_testkit::left_out(format!("python3 cannot be run: {e}")),
    }
}

#[tokio::test]
async fn other_tools_can_read_the_image() {
    let world = World::with(PYTHON);
    let image = world.build(spec(&[])).await.unwrap();
    world
        .output
        .set_reference(
            "local.daybook/shop/api:v1",
            &image.digest,
            MediaType::ImageManifest,
        )
        .unwrap();
    if daybook_workers::builder::command::find_program("buildah").is_none() {
        daybook_testkit::left_out("no buildah on PATH to read an image with");
        return;
    }
    // This tool makes a name from the folder's path, in which it takes no capital letters.
    let storage = tempfile::Builder::new()
        .prefix(&format!("daybook-images-{}", std::process::id()))
        .rand_bytes(0)
        .tempdir()
        .unwrap();
    let copy = Layout::open(storage.path().join("layout")).unwrap();
    let output = LayoutStore::open(world.output.root(), UnpackLimits::default()).unwrap();
    let pinned = output
        .resolve(&"local.daybook/shop/api:v1".parse().unwrap())
        .await
        .unwrap();
    let quiet = LineSender::discard();
    output.fetch(&pinned, &copy, &quiet).await.unwrap();
    copy.set_reference(
        "local.daybook/shop/api:v1",
        &image.digest,
        MediaType::ImageManifest,
    )
    .unwrap();
    let buildah = |arguments: &[&str]| {
        let output = std::process::Command::new("buildah")
            .arg("--root")
            .arg(storage.path().join("root"))
            .arg("--runroot")
            .arg(storage.path().join("run"))
            .args(["--storage-driver", "vfs"])
            .args(arguments)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    };
    let name = format!("oci:{}:local.daybook/shop/api:v1", copy.root().display());
    let id = buildah(&["pull", "--quiet", &name]);
    let text = buildah(&["inspect", "--type", "image", id.trim()]);
    let seen: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(seen["FromImageDigest"], image.digest.as_str());
    assert_eq!(seen["OCIv1"]["config"]["Entrypoint"][0], "python3");
    assert_eq!(seen["OCIv1"]["config"]["WorkingDir"], "/app");
}

#[tokio::test]
async fn a_base_image_is_kept_below() {
    let Some(registry) = Registry::start(RegistryConfig::default()) else {
        return;
    };
    let world = World::with(PYTHON);
    let upstream = Layout::open(world.dir.path().join("upstream")).unwrap();
    let base = image_of(
        &upstream,
        &[Tar::new().file("usr/bin/python3", "#!").bytes()],
    );
    let repo = repository(format!("{}/library/python", registry.host()));
    world
        .images
        .push(
            &built(&upstream, &base),
            &repo,
            &tag("3"),
            &LineSender::discard(),
        )
        .await
        .unwrap();

    let mut with_base = spec(&[]);
    with_base.base_image = Some(format!("{repo}:3").parse().unwrap());
    let built = world.build(with_base.clone()).await.unwrap();
    assert_eq!(built.base.as_ref().unwrap().digest, base.digest);
    let image = Image::read(&world.output, &built.digest).unwrap();
    assert_eq!(image.manifest.layers().len(), 2);
    assert_eq!(image.configuration.rootfs().diff_ids().len(), 2);
    let annotations = image.manifest.annotations().clone().unwrap();
    assert_eq!(
        annotations["org.opencontainers.image.base.digest"],
        base.digest.as_str()
    );
    let config = ImageConfig::from(&image.configuration);
    assert_eq!(
        config.env[0],
        ("PATH".to_owned(), "/usr/bin:/bin".to_owned())
    );
    assert_eq!(config.exposed_ports, [8080]);
    assert_eq!(
        config.command(&[]),
        ["python3", "app.py"],
        "nothing of the base's command"
    );
    let root = world.unpacked(&built);
    assert_eq!(names(&root), ["app", "usr"]);
    assert_eq!(
        world.build(with_base.clone()).await.unwrap().digest,
        built.digest
    );

    // The base's layers are not sent to another repository of the same registry again.
    let (progress, lines) = collect();
    let own = repository(format!("{}/shop/api", registry.host()));
    world
        .images
        .push(&built, &own, &tag("v1"), &progress)
        .await
        .unwrap();
    let lines = lines.lock().unwrap().clone();
    assert!(
        lines
            .iter()
            .any(|l| l == "layer 1 of 2 taken over from another repository"),
        "{lines:?}"
    );

    with_base.base_image = Some(format!("{repo}:4").parse().unwrap());
    let error = world
        .refused(with_base.clone(), "base_image_unavailable")
        .await;
    assert!(!error.is_retryable());
    drop(registry);
    let error = world.refused(with_base, "base_image_unavailable").await;
    assert!(
        error.is_retryable(),
        "a registry that is down may come back"
    );
}

#[tokio::test]
async fn the_build_command_runs_in_a_copy_and_is_heard() {
    let world = World::with(&[
        ("src/main.txt", "source"),
        (".gitignore", "out\n"),
        ("Procfile", "web: cat out/made\n"),
    ]);
    let gate = world.dir.path().join("gate");
    let script = format!(
        "echo begin; while [ ! -e {} ]; do sleep 0.02; done; \
         mkdir out; cat src/main.txt > out/made; echo $DAYBOOK_COMMIT >> out/made; \
         echo changed > src/main.txt; echo warning >&2",
        gate.display()
    );
    let (sender, mut lines) = LineSender::channel(64);
    let (builder, job) = (world.builder(), world.context(shell(&script)));
    let building = tokio::spawn(async move {
        builder
            .build(&job, &sender, &CancellationToken::new())
            .await
    });
    line_with(&mut lines, "$ sh -c").await;
    line_with(&mut lines, "begin").await;
    fs::write(&gate, "").unwrap();
    line_with(&mut lines, "warning").await;
    line_with(&mut lines, "detected Procfile: cat out/made").await;
    line_with(&mut lines, "packed 4 files").await;
    let image = building.await.unwrap().unwrap();

    let source = fs::read_to_string(world.source().join("src/main.txt")).unwrap();
    assert_eq!(source, "source", "the checkout is only read");
    assert!(!world.source().join("out").exists());
    let made = fs::read_to_string(world.unpacked(&image).join("app/out/made")).unwrap();
    assert_eq!(made, format!("source{}\n", super::fixtures::COMMIT));
    assert!(names(&world.scratch()).is_empty());
}

#[tokio::test]
async fn the_build_command_sees_no_secrets_of_the_worker() {
    let world = World::with(PYTHON);
    let image = world
        .build(shell("env | cut -d= -f1 | sort > environment"))
        .await
        .unwrap();
    let seen = fs::read_to_string(world.unpacked(&image).join("app/environment")).unwrap();
    // Cargo sets many for a test, which stand for what a worker may have.
    assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some());
    assert!(!seen.contains("CARGO_MANIFEST_DIR"), "{seen}");
    assert!(seen.contains("SOURCE_DATE_EPOCH"));
}

#[tokio::test]
async fn a_service_in_a_folder_may_use_what_is_beside_it() {
    let world = World::with(&[("shared/text", "shared"), ("services/api/app.py", "")]);
    let mut job = world.context(shell("cp ../../shared/text ."));
    job.path = "services/api".into();
    let image = world
        .builder()
        .build(&job, &LineSender::discard(), &CancellationToken::new())
        .await
        .unwrap();
    assert_eq!(
        names(&world.unpacked(&image).join("app")),
        ["app.py", "text"]
    );
}

#[tokio::test]
async fn a_failing_command_is_told_with_its_last_words() {
    let world = World::with(PYTHON);
    let script = "for i in $(seq 100); do echo line $i; done; echo no compiler >&2; exit 7";
    let error = world.refused(shell(script), "build_command_failed").await;
    let BuildError::CommandFailed {
        exit_code, tail, ..
    } = &error
    else {
        panic!("{error:?}");
    };
    assert_eq!(*exit_code, Some(7));
    assert_eq!(tail.last().unwrap(), "no compiler");
    assert!(error.to_string().contains("no compiler"));
    assert!(!error.is_retryable());

    let error = world
        .refused(shell("kill -9 $$"), "build_command_failed")
        .await;
    assert!(error.to_string().contains("signal 9"), "{error}");
    world
        .refused(spec(&["no-such-program-here"]), "build_command_not_found")
        .await;
}

#[tokio::test]
async fn a_cancelled_build_leaves_nothing() {
    let world = World::with(PYTHON);
    let cancel = CancellationToken::new();
    let (sender, mut lines) = LineSender::channel(64);
    let (builder, token) = (world.builder(), cancel.clone());
    // Also what only its owner's mode forbids to remove.
    let job = world.context(shell(
        "mkdir -p cache/x && chmod 555 cache; sleep 1000 & echo child $!; wait",
    ));
    let building = tokio::spawn(async move { builder.build(&job, &sender, &token).await });
    let line = line_with(&mut lines, "child").await;
    cancel.cancel();
    let error = building.await.unwrap().unwrap_err();
    assert_eq!(error.code(), "cancelled");
    let child = line.trim_start_matches("child ");
    let running = fs::read_to_string(format!("/proc/{child}/cmdline")).unwrap_or_default();
    assert!(!running.contains("sleep"), "the command's child still runs");
    assert!(names(&world.scratch()).is_empty());
    assert!(names(&world.output.root().join("tmp")).is_empty());
}

#[tokio::test]
async fn dockerignore_is_heeded() {
    let world = World::with(&[
        ("app.py", ""),
        ("secret.env", "x"),
        ("sub/secret.env", "x"),
        ("docs/a.md", "x"),
        ("docs/keep/b.md", "x"),
        ("logs/x.log", "x"),
        ("deep/logs/y.log", "x"),
        (".gitignore", "app.py\n"),
        (
            ".dockerignore",
            "# comment\nsecret.env\ndocs\n!docs/keep/b.md\n**/*.log\n.dockerignore\n",
        ),
    ]);
    let image = world.build(spec(&[])).await.unwrap();
    let app = world.unpacked(&image).join("app");
    let mut found = Vec::new();
    all_files(&app, &app, &mut found);
    found.sort();
    assert_eq!(
        found,
        [".gitignore", "app.py", "docs/keep/b.md", "sub/secret.env"]
    );
}

fn all_files(root: &Path, folder: &Path, found: &mut Vec<String>) {
    for name in names(folder) {
        let path = folder.join(name);
        if path.is_dir() {
            all_files(root, &path, found);
        } else {
            found.push(path.strip_prefix(root).unwrap().display().to_string());
        }
    }
}

#[tokio::test]
async fn of_a_rust_build_only_the_program_is_packed() {
    let world = World::with(&[("Cargo.toml", ""), ("src/main.rs", "")]);
    let script = "mkdir -p target/release/deps target/debug && cd target && \
        printf '\\177ELF' > release/api && chmod 755 release/api && cp release/api release/deps/ && \
        touch release/api.d debug/junk CACHEDIR.TAG";
    let image = world.build(shell(script)).await.unwrap();
    assert_eq!(image.kind, "binary: ./target/release/api");
    let app = world.unpacked(&image).join("app");
    assert_eq!(names(&app), ["Cargo.toml", "src", "target"]);
    assert_eq!(names(&app.join("target")), ["release"]);
    assert_eq!(names(&app.join("target/release")), ["api"]);
}

#[tokio::test]
async fn sources_that_reach_out_are_refused() {
    let links: &[(&str, &str)] = &[
        ("/etc/passwd", "absolute"),
        ("../outside", "parent"),
        ("sub/../../outside", "parent inside"),
        ("../missing", "parent, to nothing"),
        ("here/../outside", "through a link"),
    ];
    for (target, name) in links {
        let world = World::with(&[("app.py", ""), ("sub/x", "")]);
        write_files(world.dir.path(), &[("outside", "canary")]);
        symlink(".", world.source().join("here")).unwrap();
        symlink(target, world.source().join("evil")).unwrap();
        let error = world.refused(spec(&[]), "source_refused").await;
        assert!(error.to_string().contains("evil"), "{name}: {error}");
    }
    let world = World::with(PYTHON);
    let pipe = world.source().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    world.refused(spec(&[]), "source_refused").await;
    // With a command as well, where the source is copied first.
    world.refused(shell("true"), "source_refused").await;
}

#[tokio::test]
async fn service_folders_stay_within_the_source() {
    let world = World::with(&[("app.py", ""), ("file", "")]);
    write_files(world.dir.path(), &[("outside/app.py", "")]);
    symlink("../outside", world.source().join("link")).unwrap();
    for (path, code) in [
        ("missing", "source_path_missing"),
        ("file", "source_path_missing"),
        ("..", "source_path_escapes"),
        ("a/../..", "source_path_escapes"),
        ("/etc", "source_path_escapes"),
        ("link", "source_path_escapes"),
    ] {
        let mut job = world.context(spec(&[]));
        job.path = path.into();
        let quiet = LineSender::discard();
        let builder = world.builder();
        let never = CancellationToken::new();
        let error = builder.build(&job, &quiet, &never).await.unwrap_err();
        assert_eq!(error.code(), code, "{path}");
    }
}

#[tokio::test]
async fn without_a_start_command_there_is_advice() {
    let world = World::with(&[("README.md", ""), ("Cargo.toml", "")]);
    let error = world.refused(spec(&[]), "no_start_command").await;
    assert!(error.to_string().contains("Procfile"), "{error}");
    assert!(error.remedy().contains("cargo"), "{}", error.remedy());
}
