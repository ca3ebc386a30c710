//! The custom resource definitions that tests install, from the Go modules that they are published
//! in.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{folder, pinned};
use crate::Failure;
use crate::command::{on_path, output, root};

/// The files, each with its module, its path there, and what it is called in the cache.
const FILES: [(&str, &str, &str); 4] = [
    (
        "github.com/argoproj/argo-cd/v3",
        "manifests/crds/application-crd.yaml",
        "application.yaml",
    ),
    (
        "sigs.k8s.io/external-dns",
        "config/crd/standard/dnsendpoints.externaldns.k8s.io.yaml",
        "dnsendpoint.yaml",
    ),
    (
        "sigs.k8s.io/gateway-api",
        "config/crd/standard/gateway.networking.k8s.io_gateways.yaml",
        "gateway.yaml",
    ),
    (
        "sigs.k8s.io/gateway-api",
        "config/crd/standard/gateway.networking.k8s.io_httproutes.yaml",
        "httproute.yaml",
    ),
];

/// Puts the definitions into the cache, unless they are there at the pinned versions, and returns
/// their folder.
pub(crate) fn fetch() -> Result<PathBuf, Failure> {
    let crds = folder()?.join("crds");
    let module = root().join("tools/crds");
    let go_mod = fs::read_to_string(module.join("go.mod"))?;
    let stamp = crds.join("version");
    let all = FILES.iter().all(|(_, _, name)| crds.join(name).is_file());
    if all && fs::read_to_string(&stamp).is_ok_and(|known| known == go_mod) {
        return Ok(crds);
    }
    fs::create_dir_all(&crds)?;
    // The stamp goes first and comes last: it never vouches for another version's files.
    let _ = fs::remove_file(&stamp);
    for (name, path, to) in FILES {
        let version = pinned(&go_mod, name);
        let version = version.ok_or_else(|| format!("tools/crds/go.mod does not pin {name}"))?;
        let unpacked = download(&module, &format!("{name}@{version}"))?;
        // What the module cache holds is read-only; a copy is not to be.
        fs::write(crds.join(to), fs::read(unpacked.join(path))?)?;
    }
    fs::write(stamp, go_mod)?;
    Ok(crds)
}

/// Where a module is unpacked. What is downloaded is checked against go.sum.
fn download(module: &Path, version: &str) -> Result<PathBuf, Failure> {
    let go = on_path("go").ok_or("Go is not on PATH")?;
    let said = output(
        Command::new(go)
            .current_dir(module)
            .env("GOWORK", "off")
            .args(["mod", "download", "-json", version]),
    )?;
    let folder = said.lines().find_map(|line| {
        let value = line.trim().strip_prefix("\"Dir\": \"")?;
        value.trim_end_matches(',').strip_suffix('"')
    });
    Ok(folder.ok_or_else(|| format!("{version}: {said}"))?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_definition_is_pinned_in_the_repository() {
        let module = root().join("tools/crds");
        let go_mod = fs::read_to_string(module.join("go.mod")).unwrap();
        let go_sum = fs::read_to_string(module.join("go.sum")).unwrap();
        for (name, _, _) in FILES {
            let version = pinned(&go_mod, name).unwrap();
            assert!(go_sum.contains(&format!("{name} {version} h1:")), "{name}");
        }
    }
}
