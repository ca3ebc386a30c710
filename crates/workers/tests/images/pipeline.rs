//! Builders and stores as the pipeline uses them.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use daybook_events::deployment::SourceCommit;
use daybook_events::spec::BuildSpec;
use daybook_events::{BuildId, CommitId, ProjectName, RepositoryUrl, ServiceName};
use daybook_workers::builder::AnyBuilder;
use daybook_workers::builder::dockerfile::DockerfileBuilder;
use daybook_workers::builder::port::BuiltImages;
use daybook_workers::image::store::ImageStore as _;
use daybook_workers::ports::{BuildInput, BuiltImage, Images as _, Output, StepError};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::archive::World;
use super::fixtures::{COMMIT, repository, tag, write_files};

/// An attempt as the build worker makes it: a checkout, and a folder to work in beside it.
struct Attempt {
    checkout: PathBuf,
    path: &'static str,
    scratch: PathBuf,
    project: ProjectName,
    service: ServiceName,
    spec: BuildSpec,
    commit: SourceCommit,
    url: RepositoryUrl,
}

impl Attempt {
    fn of(world: &World, path: &'static str) -> Self {
        let attempt = world.dir.path().join("attempt");
        Self {
            checkout: attempt.join("source"),
            path,
            scratch: attempt.join("work"),
            project: ProjectName::parse("shop").unwrap(),
            service: ServiceName::parse("api").unwrap(),
            spec: BuildSpec::default(),
            commit: SourceCommit {
                commit: CommitId::parse(COMMIT).unwrap(),
                message: "first".into(),
                author_name: "Alice".into(),
                author_email: "alice@example.org".into(),
                committed_at: "2024-05-06T07:08:09Z".parse().unwrap(),
                url: String::new(),
            },
            url: RepositoryUrl::parse("/srv/git/api").unwrap(),
        }
    }

    async fn build(&self, images: &BuiltImages, output: &Output) -> Result<BuiltImage, StepError> {
        let input = BuildInput {
            build: BuildId::derived(uuid::Uuid::nil(), "build"),
            request: 1,
            project: &self.project,
            service: &self.service,
            checkout: &self.checkout,
            path: self.path,
            spec: &self.spec,
            commit: &self.commit,
            url: &self.url,
            scratch: &self.scratch,
            repository: &repository("local.daybook/shop/api"),
            tag: &tag("0123456"),
            handed_over: &CancellationToken::new(),
        };
        images.build(input, output, &CancellationToken::new()).await
    }
}

fn images(world: &World) -> BuiltImages {
    let dockerfile = DockerfileBuilder::new(world.scratch());
    let builder = AnyBuilder::new(world.builder(), dockerfile);
    BuiltImages::new(Arc::new(builder), world.images.clone())
}

#[tokio::test]
async fn a_build_is_pushed_and_found_again() {
    let world = World::new();
    let files = [
        ("attempt/source/services/api/app.py", ""),
        ("attempt/work/", ""),
    ];
    write_files(world.dir.path(), &files);
    let images = images(&world);
    let attempt = Attempt::of(&world, "services/api");
    let (output, mut lines) = mpsc::channel(100);
    let built = attempt.build(&images, &output).await.unwrap();
    assert_eq!(built.builder, "archive");
    assert_eq!(built.detected, "Python: python3 app.py");
    assert!(built.size_bytes > 0);
    assert_eq!(
        lines.recv().await.unwrap(),
        "detected Python: python3 app.py"
    );

    let repo = repository("local.daybook/shop/api");
    for _ in 0..2 {
        let pinned = images
            .push(&built, &attempt.scratch, &repo, &tag("0123456"), &output)
            .await
            .unwrap();
        assert_eq!(pinned.digest, built.digest);
    }
    // What is needed to run it is in the store, and the attempt's folder is not needed any more.
    fs::remove_dir_all(world.dir.path().join("attempt")).unwrap();
    let reference = format!("{repo}:0123456").parse().unwrap();
    let pinned = images.resolve(&reference).await.unwrap();
    let root = world.dir.path().join("root");
    world.images.unpack(&pinned, &root).await.unwrap();
    assert!(root.join("app/app.py").is_file());

    let other = format!("{repo}:other").parse().unwrap();
    let error = images.resolve(&other).await.unwrap_err();
    assert_eq!(error.code, "image_not_found");
    assert!(!error.retryable);
}

#[tokio::test]
async fn a_folder_that_is_a_link_out_of_the_checkout_is_refused() {
    let world = World::new();
    let files = [
        ("attempt/source/x", ""),
        ("attempt/work/", ""),
        ("outside/app.py", ""),
    ];
    write_files(world.dir.path(), &files);
    let evil = world.dir.path().join("attempt/source/evil");
    std::os::unix::fs::symlink("../../outside", evil).unwrap();
    let (output, _lines) = mpsc::channel(100);
    let error = Attempt::of(&world, "evil")
        .build(&images(&world), &output)
        .await
        .unwrap_err();
    assert_eq!(error.code, "source_path_escapes");
}
