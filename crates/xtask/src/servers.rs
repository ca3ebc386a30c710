//! The servers and programs that tests and benchmarks run against: found, or installed.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Failure;
use crate::command::{is_executable, on_path, output, run};
use crate::left_out::LeftOut;
use crate::tools::{GoProgram, folder, kubernetes, packages};

/// Environment variables that tell tests where the servers are. What a person has set wins; what
/// is neither there nor to be had is entered into `left_out`.
pub(crate) fn find_all(left_out: &LeftOut) -> Result<Vec<(&'static str, OsString)>, Failure> {
    let mut found = nats(left_out)?;
    let sshd = locate("DAYBOOK_SSHD", sshd);
    found.extend(entered(left_out, "DAYBOOK_SSHD", "sshd", sshd)?);
    // git asks it whether a commit's signature is good. It is looked for on PATH only.
    if let Err(why) = installed("ssh-keygen", "openssh-client") {
        let what = "ssh-keygen, which judges the signatures of commits";
        left_out.add(what, &why.to_string())?;
    }
    let buildah = locate("DAYBOOK_BUILDAH", || installed("buildah", "buildah"));
    found.extend(entered(left_out, "DAYBOOK_BUILDAH", "buildah", buildah)?);
    found.extend(chromium(left_out)?);
    let judge = locate("DAYBOOK_TLOG_JUDGE", || GoProgram::JUDGE.build());
    found.extend(kubernetes_with_registry(left_out)?);
    let python = locate("DAYBOOK_JUDGES_PYTHON", packages::python);
    let what = "the judges in Python (schemathesis, clients, SDKs)";
    found.extend(entered(left_out, "DAYBOOK_JUDGES_PYTHON", what, python)?);
    let node = locate("DAYBOOK_JUDGES_NODE", packages::node);
    let schema = locate("DAYBOOK_ASYNCAPI_SCHEMA", || asyncapi_schema(&node));
    let what = "the judges of Node.js (axe-core, clients, graphql)";
    found.extend(entered(left_out, "DAYBOOK_JUDGES_NODE", what, node)?);
    let what = "the published schema of AsyncAPI";
    found.extend(entered(left_out, "DAYBOOK_ASYNCAPI_SCHEMA", what, schema)?);
    let what = "tlog-judge, which checks transparency logs";
    found.extend(entered(left_out, "DAYBOOK_TLOG_JUDGE", what, judge)?);
    Ok(found)
}

/// The browser that the page is tested and measured in.
pub(crate) fn chromium(left_out: &LeftOut) -> Result<Vec<(&'static str, OsString)>, Failure> {
    let chromium = locate("DAYBOOK_CHROMIUM", || installed("chromium", "chromium"));
    let what = "Chromium, which the page is tested in";
    let found = entered(left_out, "DAYBOOK_CHROMIUM", what, chromium)?;
    Ok(found.into_iter().collect())
}

/// The schema of AsyncAPI documents, as those who write the specification publish it, among the packages
/// of Node.js.
fn asyncapi_schema(node: &Result<OsString, Failure>) -> Result<PathBuf, Failure> {
    let folder = node.as_ref().map_err(ToString::to_string)?;
    let file = Path::new(folder).join("node_modules/@asyncapi/specs/schemas/3.1.0.json");
    if file.is_file() {
        return Ok(file);
    }
    Err(format!("there is no {}", file.display()).into())
}

/// An sshd. It needs a user of its own, so it cannot be taken out of its package; and installing
/// the package may start a service, which only a machine that is thrown away afterwards may get.
fn sshd() -> Result<PathBuf, Failure> {
    if let Some(path) = on_path("sshd") {
        return Ok(path);
    }
    if std::env::var_os("CI").is_some() {
        return installed("sshd", "openssh-server");
    }
    Err(not_here(
        "sshd",
        "it is installed in CI only; set DAYBOOK_SSHD to one",
    ))
}

/// The same for the two nats-servers alone.
pub(crate) fn nats(left_out: &LeftOut) -> Result<Vec<(&'static str, OsString)>, Failure> {
    let mut found = Vec::new();
    let oldest = locate("DAYBOOK_NATS_SERVER", || {
        installed_or_extracted("nats-server").or_else(|packages| {
            GoProgram::NATS_OLDEST
                .build()
                .map_err(|go| format!("{packages}; {go}").into())
        })
    });
    found.extend(entered(
        left_out,
        "DAYBOOK_NATS_SERVER",
        "nats-server",
        oldest,
    )?);
    let newest = locate("DAYBOOK_NATS_SERVER_NEW", || GoProgram::NATS_NEWEST.build());
    let what = "the newest nats-server";
    found.extend(entered(left_out, "DAYBOOK_NATS_SERVER_NEW", what, newest)?);
    Ok(found)
}

/// The same for a Kubernetes control plane, and what makes and keeps what runs there.
pub(crate) fn kubernetes_with_registry(
    left_out: &LeftOut,
) -> Result<Vec<(&'static str, OsString)>, Failure> {
    let mut found = Vec::new();
    let registry = locate("DAYBOOK_REGISTRY", || {
        installed_or_extracted("docker-registry")
    });
    let what = "docker-registry";
    found.extend(entered(left_out, "DAYBOOK_REGISTRY", what, registry)?);
    let kubernetes = locate("KUBEBUILDER_ASSETS", kubernetes);
    let what = "a Kubernetes control plane";
    found.extend(entered(left_out, "KUBEBUILDER_ASSETS", what, kubernetes)?);
    let helm = locate("DAYBOOK_HELM", || {
        on_path("helm").map_or_else(|| GoProgram::HELM.build(), Ok)
    });
    found.extend(entered(left_out, "DAYBOOK_HELM", "helm", helm)?);
    Ok(found)
}

/// The program that Daybook's notary is measured against.
pub(crate) fn tessera(left_out: &LeftOut) -> Result<Option<(&'static str, OsString)>, Failure> {
    let bench = locate("DAYBOOK_TESSERA_BENCH", || GoProgram::TESSERA_BENCH.build());
    let what = "tessera-bench, which the notary is measured against";
    entered(left_out, "DAYBOOK_TESSERA_BENCH", what, bench)
}

/// What the environment says, or else what can be found.
fn locate(
    variable: &str,
    find: impl FnOnce() -> Result<PathBuf, Failure>,
) -> Result<OsString, Failure> {
    match std::env::var_os(variable).filter(|value| !value.is_empty()) {
        Some(value) => Ok(value),
        None => find().map(Into::into),
    }
}

/// Prints where a server is, or enters it as left out.
fn entered(
    left_out: &LeftOut,
    variable: &'static str,
    what: &str,
    found: Result<OsString, Failure>,
) -> Result<Option<(&'static str, OsString)>, Failure> {
    match found {
        Ok(path) => {
            eprintln!("{variable}={}", Path::new(&path).display());
            Ok(Some((variable, path)))
        }
        Err(why) => {
            left_out.add(what, &why.to_string())?;
            Ok(None)
        }
    }
}

/// A program from PATH, or else from the system's packages, installed now.
fn installed(name: &str, package: &str) -> Result<PathBuf, Failure> {
    if let Some(path) = on_path(name) {
        return Ok(path);
    }
    let mut apt = apt_get()?;
    apt.args(["install", "--yes", "--no-install-recommends", package]);
    updating_once(|| run(&mut apt))?;
    on_path(name).ok_or_else(|| format!("package {package} brings no program {name}").into())
}

/// A server that is a single file: from PATH, or else taken out of its package into the cache.
/// The package is not installed, because then the system would start the server as a service.
fn installed_or_extracted(name: &str) -> Result<PathBuf, Failure> {
    if let Some(path) = on_path(name) {
        return Ok(path);
    }
    let home = folder()?.join("packages").join(name);
    for bin in ["usr/bin", "usr/sbin"] {
        let file = home.join(bin).join(name);
        if is_executable(&file) {
            return Ok(file);
        }
    }
    on_path("apt-get").ok_or_else(|| not_here(name, "there is no apt-get"))?;
    let work = home.with_extension(std::process::id().to_string());
    let extracted = extract_package(name, &work).and_then(|()| {
        let _ = fs::remove_dir_all(&home);
        fs::rename(work.join("root"), &home).map_err(Failure::from)
    });
    let _ = fs::remove_dir_all(&work);
    extracted?;
    ["usr/bin", "usr/sbin"]
        .map(|bin| home.join(bin).join(name))
        .into_iter()
        .find(|file| is_executable(file))
        .ok_or_else(|| not_here(name, "its package has no such program"))
}

/// Downloads a package into `work` and unpacks it into `work/root`.
fn extract_package(name: &str, work: &Path) -> Result<(), Failure> {
    fs::create_dir_all(work)?;
    let mut download = Command::new("apt-get");
    download.current_dir(work).args(["download", name]);
    updating_once(|| run(&mut download))?;
    let package = fs::read_dir(work)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
        .ok_or_else(|| not_here(name, "apt-get downloaded no package"))?;
    run(Command::new("dpkg-deb")
        .arg("--extract")
        .args([package, work.join("root")]))
}

fn not_here(name: &str, why: &str) -> Failure {
    format!("{name} is not on PATH, and {why}").into()
}

/// Tries something with packages, and once more after refreshing the lists of packages, which on
/// a fresh machine are empty or out of date.
fn updating_once(mut attempt: impl FnMut() -> Result<(), Failure>) -> Result<(), Failure> {
    let Err(first) = attempt() else {
        return Ok(());
    };
    match apt_get().and_then(|mut apt| run(apt.arg("update"))) {
        Ok(()) => attempt(),
        Err(second) => Err(format!("{first}; {second}").into()),
    }
}

/// `apt-get` with the right to change the system, without asking anybody for a password.
fn apt_get() -> Result<Command, Failure> {
    if on_path("apt-get").is_none() {
        return Err("it is not on PATH, and there is no apt-get to install it".into());
    }
    let is_root = output(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0");
    let mut command = if is_root {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    } else if output(Command::new("sudo").args(["-n", "true"])).is_ok() {
        let mut command = Command::new("sudo");
        command.args(["-n", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        command
    } else {
        return Err("installing packages needs root or a sudo that does not ask".into());
    };
    command.arg("--quiet");
    Ok(command)
}
