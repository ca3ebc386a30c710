//! The image of Daybook, made by Daybook and deployed by it.

use std::path::Path;
use std::process::Command;

use daybook_testkit::{free_port, left_out};

use crate::support::{Server, Settings, application};

/// The last stage of the Dockerfile on an empty base: that of the file, and the compilers, come from
/// a registry that tests do not have, so what the stages before would have made is copied instead.
fn without_registries(dockerfile: &str) -> String {
    let last = dockerfile.rfind("\nFROM ").expect("a last stage") + 1;
    let stage: Vec<_> = dockerfile[last..].lines().collect();
    let mut lines = vec![
        "FROM scratch AS build",
        "COPY out /out",
        "FROM scratch AS helm",
    ];
    lines.extend(["COPY out/LICENSE /out/", "FROM scratch"]);
    let mut of_packages = false;
    for line in &stage[1..] {
        of_packages |= line.starts_with("RUN ");
        if !of_packages {
            lines.push(line);
        }
        of_packages &= line.ends_with('\\');
    }
    lines.join("\n") + "\n"
}

#[test]
fn daybook_builds_its_own_image_and_deploys_it() {
    if Command::new("buildah").arg("--version").output().is_err() {
        left_out("no buildah on PATH");
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let dockerfile = std::fs::read_to_string(root.join("Dockerfile")).unwrap();
    let source = application("--text unused");
    source.git(&["rm", "--quiet", "Procfile"]);
    let bin = source.path().join("out/usr/local/bin");
    std::fs::create_dir_all(&bin).unwrap();
    // As the Dockerfile has it; symbols make most of a program that was built for tests.
    let mut strip = Command::new("strip");
    strip.arg("-o").arg(bin.join("daybook"));
    strip.arg(env!("CARGO_BIN_EXE_daybook"));
    assert!(strip.status().unwrap().success());
    std::fs::copy(root.join("LICENSE"), source.path().join("out/LICENSE")).unwrap();
    source.write("Dockerfile", without_registries(&dockerfile));
    source.commit_all("Daybook");

    let server = Server::start(Settings::default());
    let (port, gateway) = (free_port().to_string(), free_port().to_string());
    let data = tempfile::tempdir().unwrap();
    let port_of_it = format!("PORT={port}");
    let address = format!("127.0.0.1:{port}");
    let gateway = format!("127.0.0.1:{gateway}");
    server.define(
        "daybook",
        "server",
        &source,
        &[
            "--builder",
            "dockerfile",
            "--health-path",
            "/healthz",
            "--env",
            &port_of_it,
            "--",
            "daybook",
            "up",
            "--host",
            "server.daybook.localhost",
            "--listen",
            &address,
            "--gateway",
            &gateway,
            "--data",
            data.path().to_str().unwrap(),
        ],
    );
    let id = server.deploy("daybook.production.server", &[]);
    let answer = server.get_from("server.daybook.localhost", "/api/v1/state", &id);
    assert_eq!(answer.status, 200, "{answer:?}");
    server.ok(&["stop", &id]);
    server.wait_for(&id, "stopped");
}
