//! Images: into a real registry, out of it by tag and by digest, and from a Dockerfile.

use daybook_testkit::left_out;
use daybook_testkit::registry::{Registry, RegistryConfig};

use crate::support::{Server, Settings, application, until};

#[test]
fn an_image_goes_to_a_registry_and_is_deployed_from_there_by_tag_and_by_digest() {
    let Some(registry) = Registry::start(RegistryConfig::default()) else {
        return;
    };
    let prefix = format!("{}/team", registry.host());
    let settings = Settings::default().arg("--image-prefix").arg(&prefix);
    let server = Server::start(settings);
    let source = application("--text from-a-registry --describe Shop");
    server.define("shop", "web", &source, &[]);
    let built = server.deploy("shop.production.web", &[]);
    let image = server.deployment(&built)["image"].clone();
    let repository = format!("{prefix}/shop/web");
    assert_eq!(image["repository"], repository.as_str());
    let tag = image["tag"].as_str().unwrap().to_owned();
    let digest = image["digest"].as_str().unwrap().to_owned();

    // What it took, and what it says of itself.
    until("its API description", || {
        (server.deployment(&built)["openapi"]["title"] == "Shop").then_some(())
    });
    let shown = server.deployment(&built);
    assert!(shown["durations"]["image_pull_ms"].is_u64(), "{shown:#}");
    let shown = server.ok(&["status", &built]).stdout;
    for part in ["/openapi.json Shop 1", " in all, queue ", ", image pull "] {
        assert!(shown.contains(part), "{part}: {shown}");
    }

    // A service that is nothing but an image.
    server.ok(&["service", "create", "shop", "copy"]);
    let references = [
        format!("{repository}:{tag}"),
        format!("{repository}@{digest}"),
        format!("{repository}:{tag}@{digest}"),
    ];
    for reference in &references {
        let id = server.deploy("shop.production.copy", &["--image", reference]);
        let answer = server.get_from("copy.shop.localhost", "/", &id);
        assert_eq!(answer.body, "from-a-registry");
        assert_eq!(server.deployment(&id)["image"]["digest"], digest.as_str());
        // It is there already.
        let took = server.deployment(&id)["durations"].clone();
        assert!(took["image_pull_ms"].is_null(), "{took}");
        let kinds = server.kinds(&id);
        assert!(!kinds.iter().any(|k| k.contains("building")), "{kinds:?}");
    }

    // What is not there is not deployed.
    let missing = format!("{repository}:no-such-tag");
    let id = server.begin("shop.production.copy", &["--image", &missing]);
    assert_eq!(server.wait_for_failure(&id), "image_not_found");
    server.check_replay();
}

#[test]
fn a_dockerfile_is_built_and_runs() {
    if std::process::Command::new("buildah")
        .arg("--version")
        .output()
        .is_err()
    {
        left_out("no buildah on PATH");
        return;
    }
    let source = application("--text unused");
    source.git(&["rm", "--quiet", "Procfile"]);
    let dockerfile = "FROM scratch\nCOPY bin/app /app/server\nENV GREETING=hello\nCMD [\"/app/server\", \"--text\", \"from-a-dockerfile\"]\n";
    source.commit("Build by Dockerfile", &[("Dockerfile", dockerfile)]);
    let server = Server::start(Settings::default());
    server.define("shop", "web", &source, &["--builder", "dockerfile"]);
    let id = server.deploy("shop.production.web", &[]);
    let answer = server.get_from("web.shop.localhost", "/", &id);
    assert_eq!(answer.body, "from-a-dockerfile");
    let answer = server.get_from("web.shop.localhost", "/env", &id);
    assert!(answer.body.contains("GREETING=hello\n"), "{answer:?}");
    let log = server.ok(&["logs", &id, "--type", "build"]).stdout;
    assert!(log.contains("FROM scratch"), "{log}");

    // A Dockerfile that fails says where.
    source.commit(
        "Break it",
        &[("Dockerfile", "FROM scratch\nCOPY nothing /nothing\n")],
    );
    let id = server.begin("shop.production.web", &[]);
    server.wait_for_failure(&id);
    let log = server.ok(&["logs", &id, "--type", "build"]).stdout;
    assert!(log.contains("nothing"), "{log}");
    until("the first one still serving", || {
        (server.get("web.shop.localhost", "/").body == "from-a-dockerfile").then_some(())
    });
}
