//! Dockerfiles, built by a real tool.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::symlink;

use daybook_events::spec::{BuildSpec, BuilderKind};
use daybook_workers::builder::dockerfile::{DockerfileBuilder, Tool};
use daybook_workers::builder::{AnyBuilder, BuildError, Builder, BuiltImage};
use daybook_workers::image::manifest::{Image, ImageConfig};
use daybook_workers::output::LineSender;
use tokio_util::sync::CancellationToken;

use super::archive::World;
use super::fixtures::{collect, line_with, names};

const DOCKERFILE: &str = "FROM scratch\n\
    COPY index.html /srv/\n\
    ENV GREETING=hello\n\
    EXPOSE 8080\n\
    WORKDIR /srv\n\
    ENTRYPOINT [\"/bin/serve\"]\n\
    CMD [\"--port\", \"8080\"]\n";

const FILES: &[(&str, &str)] = &[("Dockerfile", DOCKERFILE), ("index.html", "<p>hello")];

/// The builder with what works without a daemon, if that is here.
async fn builder(world: &World) -> Option<DockerfileBuilder> {
    let builder = DockerfileBuilder::new(world.scratch()).with_tools([Tool::Buildah, Tool::Podman]);
    if builder.tool().await.is_none() {
        daybook_testkit::left_out("neither buildah nor podman is on PATH");
        return None;
    }
    Some(builder)
}

async fn build(
    world: &World,
    builder: &dyn Builder,
    spec: BuildSpec,
) -> Result<BuiltImage, BuildError> {
    let (sender, _lines) = collect();
    let context = world.context(spec);
    let built = builder
        .build(&context, &sender, &CancellationToken::new())
        .await;
    assert!(
        names(&world.scratch()).is_empty(),
        "something was left behind"
    );
    built
}

fn spec(builder: BuilderKind) -> BuildSpec {
    BuildSpec {
        builder,
        ..BuildSpec::default()
    }
}

#[tokio::test]
async fn a_dockerfile_becomes_an_image() {
    let world = World::with(FILES);
    let Some(builder) = builder(&world).await else {
        return;
    };
    let (sender, lines) = collect();
    let context = world.context(spec(BuilderKind::Dockerfile));
    let built = builder
        .build(&context, &sender, &CancellationToken::new())
        .await
        .unwrap();
    let lines = lines.lock().unwrap().clone();
    assert!(
        lines.iter().any(|l| l.contains("COPY index.html")),
        "{lines:?}"
    );
    assert_eq!(built.kind, "Dockerfile");

    let image = Image::read(&world.output, &built.digest).unwrap();
    let config = ImageConfig::from(&image.configuration);
    assert_eq!(config.command(&[]), ["/bin/serve", "--port", "8080"]);
    assert_eq!(config.working_dir, "/srv");
    assert_eq!(config.exposed_ports, [8080]);
    assert!(
        config
            .env
            .contains(&("GREETING".to_owned(), "hello".to_owned()))
    );
    assert_eq!(
        config.labels["org.opencontainers.image.revision"],
        super::fixtures::COMMIT
    );
    let annotations = image.manifest.annotations().clone().unwrap();
    assert_eq!(annotations["dev.daybook.build"], context.build.to_string());
    let root = world.unpacked(&built);
    assert_eq!(
        fs::read_to_string(root.join("srv/index.html")).unwrap(),
        "<p>hello"
    );

    let again = build(&world, &builder, spec(BuilderKind::Dockerfile))
        .await
        .unwrap();
    assert_eq!(
        again.digest, built.digest,
        "the same source makes the same image"
    );
}

#[tokio::test]
async fn a_failing_step_is_told() {
    let world = World::with(&[("Dockerfile", "FROM scratch\nCOPY not-there /\n")]);
    let Some(builder) = builder(&world).await else {
        return;
    };
    let error = build(&world, &builder, spec(BuilderKind::Dockerfile))
        .await
        .unwrap_err();
    assert_eq!(error.code(), "dockerfile_build_failed");
    assert!(error.to_string().contains("not-there"), "{error}");
}

#[tokio::test]
async fn a_cancelled_build_leaves_nothing() {
    // A server that takes connections and never says anything.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/file", silent.local_addr().unwrap());
    let world = World::with(&[("Dockerfile", &format!("FROM scratch\nADD {url} /\n"))]);
    let Some(builder) = builder(&world).await else {
        return;
    };
    let (sender, mut lines) = LineSender::channel(64);
    let cancel = CancellationToken::new();
    let (token, context) = (cancel.clone(), world.context(spec(BuilderKind::Dockerfile)));
    let building = tokio::spawn(async move { builder.build(&context, &sender, &token).await });
    line_with(&mut lines, "ADD").await;
    cancel.cancel();
    assert_eq!(building.await.unwrap().unwrap_err().code(), "cancelled");
    assert!(names(&world.scratch()).is_empty());
}

#[tokio::test]
async fn what_is_missing_is_named() {
    let world = World::with(&[("sub/x", "")]);
    let builder = DockerfileBuilder::new(world.scratch()).with_tools([]);
    for (path, code) in [
        (None, "dockerfile_missing"),
        (Some("deploy/Dockerfile"), "dockerfile_missing"),
        (Some("sub"), "dockerfile_missing"),
        (Some("../Dockerfile"), "source_path_escapes"),
        (Some("/etc/passwd"), "source_path_escapes"),
        (Some("link"), "source_path_escapes"),
    ] {
        let _ = symlink("/etc/passwd", world.source().join("link"));
        let mut spec = spec(BuilderKind::Dockerfile);
        spec.dockerfile = path.map(str::to_owned);
        let error = build(&world, &builder, spec).await.unwrap_err();
        assert_eq!(error.code(), code, "{path:?}");
    }
    let world = World::with(FILES);
    let builder = DockerfileBuilder::new(world.scratch()).with_tools([]);
    let error = build(&world, &builder, spec(BuilderKind::Dockerfile))
        .await
        .unwrap_err();
    assert_eq!(error.code(), "builder_missing");
    assert!(error.remedy().contains("apt install buildah"));
}

#[tokio::test]
async fn auto_takes_the_dockerfile_if_it_can() {
    let world = World::with(FILES);
    let auto = |tools: &[Tool]| {
        let dockerfile = DockerfileBuilder::new(world.scratch()).with_tools(tools);
        AnyBuilder::new(world.builder(), dockerfile)
    };
    // Without a tool the source itself is looked at.
    let built = build(&world, &auto(&[]), spec(BuilderKind::Auto))
        .await
        .unwrap();
    assert_eq!(built.kind, "static site: daybook-static .");
    // If that does not help either, the tool is what is missing.
    fs::remove_file(world.source().join("index.html")).unwrap();
    let error = build(&world, &auto(&[]), spec(BuilderKind::Auto))
        .await
        .unwrap_err();
    assert_eq!(error.code(), "builder_missing");
    // A Dockerfile that was asked for must be there.
    let mut named = spec(BuilderKind::Auto);
    named.dockerfile = Some("Other".into());
    let error = build(&world, &auto(&[]), named).await.unwrap_err();
    assert_eq!(error.code(), "dockerfile_missing");

    fs::write(world.source().join("index.html"), "x").unwrap();
    if builder(&world).await.is_some() {
        let tools = [Tool::Buildah, Tool::Podman];
        let built = build(&world, &auto(&tools), spec(BuilderKind::Auto))
            .await
            .unwrap();
        assert_eq!(built.kind, "Dockerfile");
        let built = build(&world, &auto(&tools), spec(BuilderKind::Archive))
            .await
            .unwrap();
        assert_eq!(built.builder, "archive");
    }
    fs::remove_file(world.source().join("Dockerfile")).unwrap();
    let built = build(&world, &auto(&Tool::ALL), spec(BuilderKind::Auto))
        .await
        .unwrap();
    assert_eq!(built.builder, "archive");
}
