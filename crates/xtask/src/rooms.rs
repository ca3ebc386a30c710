//! The house has rooms: what each crate must not know. Dependencies are what cargo says they are,
//! so a crate that is renamed, optional or for one platform only is found as well.

use std::collections::BTreeMap;
use std::process::ExitCode;

use crate::Failure;
use crate::command::{cargo, output};

pub(crate) const HELP: &str = "\
Check that no crate knows what it must not know

Usage: cargo xtask rooms

The tables are in crates/xtask/src/rooms.rs; ARCHITECTURE.md says why they are as they are.
Dependencies of tests alone are free.
";

/// Which crates of the workspace a crate may build on.
const MAY_USE: [(&str, &[&str]); 13] = [
    ("daybook-events", &[]),
    ("daybook-failpoints", &[]),
    ("daybook-trace", &["daybook-events"]),
    ("daybook-store", &["daybook-events", "daybook-failpoints"]),
    (
        "daybook-projections",
        &["daybook-events", "daybook-failpoints", "daybook-trace"],
    ),
    ("daybook-secrets", &["daybook-events"]),
    (
        "daybook-workers",
        &[
            "daybook-events",
            "daybook-failpoints",
            "daybook-projections",
            "daybook-secrets",
            "daybook-trace",
        ],
    ),
    (
        "daybook-kubernetes",
        &["daybook-events", "daybook-secrets", "daybook-workers"],
    ),
    (
        "daybook-api",
        &[
            "daybook-events",
            "daybook-projections",
            "daybook-secrets",
            "daybook-trace",
        ],
    ),
    (
        "daybook-audit",
        &["daybook-events", "daybook-projections", "daybook-store"],
    ),
    (
        "daybook",
        &[
            "daybook-api",
            "daybook-audit",
            "daybook-events",
            "daybook-failpoints",
            "daybook-kubernetes",
            "daybook-projections",
            "daybook-secrets",
            "daybook-store",
            "daybook-trace",
            "daybook-workers",
        ],
    ),
    // Its benchmarks measure the others.
    (
        "daybook-testkit",
        &[
            "daybook-audit",
            "daybook-events",
            "daybook-projections",
            "daybook-secrets",
            "daybook-store",
            "daybook-workers",
        ],
    ),
    ("xtask", &[]),
];

/// Libraries that only some crates may name, so that what they stand for can be exchanged there.
const ONLY_IN: [(&[&str], &[&str], &str); 13] = [
    (
        &["async-nats"],
        &["daybook-store", "daybook", "daybook-testkit"],
        "how events are transported is the store's business",
    ),
    (
        &["fjall"],
        &["daybook-store"],
        "the embedded log is the store's business",
    ),
    (
        &["sled", "bincode"],
        &["daybook-projections"],
        "they hold only what can be thrown away and rebuilt",
    ),
    (
        &["axum"],
        // A benchmark measures against it.
        &["daybook-api", "daybook-testkit"],
        "the HTTP interface is the api's business",
    ),
    (
        &[
            "axum-extra",
            "tower-http",
            "utoipa",
            "utoipa-axum",
            "async-graphql",
        ],
        &["daybook-api"],
        "the HTTP interface is the api's business",
    ),
    (
        &["kube", "k8s-openapi", "gateway-api"],
        &["daybook-kubernetes", "daybook", "daybook-testkit"],
        "Kubernetes is a target behind a port of the workers",
    ),
    (
        &["git2"],
        &[
            "daybook-workers",
            "daybook-api",
            "daybook",
            "daybook-testkit",
        ],
        "git is an effect, and neither log nor fold knows it",
    ),
    (
        &["opentelemetry"],
        &["daybook-trace", "daybook"],
        "what a span is, is said in one place",
    ),
    (
        &[
            "opentelemetry_sdk",
            "opentelemetry-otlp",
            "opentelemetry-http",
        ],
        &["daybook"],
        "where spans are sent is the binary's business",
    ),
    (
        &["clap", "comfy-table", "indicatif", "unicode-width"],
        &["daybook", "daybook-testkit"],
        "the terminal is the command line's business",
    ),
    (
        &["hickory-resolver", "hickory-server", "x509-parser"],
        &["daybook-workers", "daybook-testkit"],
        "names and certificates are looked at in one place",
    ),
    (
        &["chacha20poly1305", "hmac", "aho-corasick"],
        &["daybook-secrets"],
        "values of secrets are encrypted, committed to and masked in one place",
    ),
    (
        &["tokio", "reqwest", "hyper", "rustix"],
        &[
            "daybook-failpoints",
            "daybook-secrets",
            "daybook-store",
            "daybook-projections",
            "daybook-workers",
            "daybook-api",
            "daybook",
            "daybook-testkit",
        ],
        "deciding and folding do no I/O",
    ),
];

pub(crate) fn run(arguments: &[String]) -> Result<ExitCode, Failure> {
    if !arguments.is_empty() {
        return Err(format!("unknown arguments {arguments:?}; see --help").into());
    }
    check()?;
    Ok(ExitCode::SUCCESS)
}

/// It is an error if any crate knows what it must not know.
pub(crate) fn check() -> Result<(), Failure> {
    let trespasses = trespasses(&direct_dependencies()?);
    if trespasses.is_empty() {
        eprintln!("no crate knows what it must not know");
        return Ok(());
    }
    Err(trespasses.join("\n       ").into())
}

type Dependencies = BTreeMap<String, Vec<String>>;

/// What each crate of the workspace names in its manifest, except for its tests.
fn direct_dependencies() -> Result<Dependencies, Failure> {
    let tree = output(cargo().args([
        "tree",
        "--workspace",
        "--locked",
        "--all-features",
        "--target=all",
        "--edges=normal,build",
        "--depth=1",
        "--prefix=depth",
        "--format= {p}",
    ]))?;
    Ok(parse_tree(&tree))
}

/// Reads lines such as `0 daybook-api v0.1.0 (…)` and, below it, `1 axum v0.8.9`.
fn parse_tree(tree: &str) -> Dependencies {
    let mut all = Dependencies::new();
    let mut current = None;
    for line in tree.lines() {
        let mut words = line.split_whitespace();
        let (depth, Some(name)) = (words.next(), words.next()) else {
            continue;
        };
        if depth == Some("0") {
            all.entry(name.to_owned()).or_default();
            current = Some(name);
        } else if let Some(dependencies) = current.and_then(|c| all.get_mut(c)) {
            dependencies.push(name.to_owned());
        }
    }
    all
}

fn trespasses(all: &Dependencies) -> Vec<String> {
    let mut found = Vec::new();
    for (name, dependencies) in all {
        let Some((_, may_use)) = MAY_USE.iter().find(|(room, _)| room == name) else {
            found.push(format!("{name} has no row in crates/xtask/src/rooms.rs"));
            continue;
        };
        for dependency in dependencies {
            if all.contains_key(dependency) && !may_use.contains(&dependency.as_str()) {
                found.push(format!("{name} must not build on {dependency}"));
            }
            let owned = ONLY_IN
                .iter()
                .find(|(libraries, _, _)| libraries.contains(&dependency.as_str()));
            if let Some((_, rooms, why)) = owned
                && !rooms.contains(&name.as_str())
            {
                let rooms = rooms.join(", ");
                found.push(format!(
                    "{name} must not know {dependency}: {why} (only {rooms} may)"
                ));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trespass_is_named_with_its_reason() {
        let tree = "0 daybook-api v0.1.0 (/x)\n1 axum v0.8.0\n1 async-nats v0.51.0\n\
                    1 daybook-workers v0.1.0 (/x)\n\n0 daybook-workers v0.1.0 (/x)\n1 kube v5.0.0\n";
        let found = trespasses(&parse_tree(tree));
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].starts_with("daybook-api must not know async-nats: how events"));
        assert_eq!(found[1], "daybook-api must not build on daybook-workers");
        assert!(found[2].starts_with("daybook-workers must not know kube: "));
    }

    #[test]
    fn a_new_crate_needs_a_row() {
        let found = trespasses(&parse_tree("0 daybook-new v0.1.0 (/x)\n"));
        assert_eq!(
            found,
            ["daybook-new has no row in crates/xtask/src/rooms.rs"]
        );
    }

    #[test]
    fn the_workspace_keeps_to_its_rooms() {
        let all = direct_dependencies().unwrap_or_default();
        assert!(all.len() >= MAY_USE.len(), "{all:?}");
        assert_eq!(trespasses(&all), Vec::<String>::new());
    }
}
