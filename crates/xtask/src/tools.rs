//! Tools and servers that are built from source at a pinned version, into a cache outside the
//! checkout, once.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

mod crds;
pub(crate) mod packages;

use crate::Failure;
use crate::command::{cargo, is_executable, on_path, output, root, run as run_command};

pub(crate) const HELP: &str = "\
Build the pinned servers and tools into a cache outside the checkout, each once

Usage: cargo xtask tools [nats|nats-oldest|judge|tessera|kubernetes|crds|helm|python|node|deny]...

Without a name all of them are built:
  nats         the newest nats-server, as tools/go.mod pins it (needs Go)
  nats-oldest  the oldest supported one, as tools/nats-oldest/go.mod pins it (needs Go)
  judge        the program in tools/judges that checks transparency logs (needs Go)
  tessera      the log that the notary is measured against, in tools/judges too (needs Go)
  kubernetes   kube-apiserver, kube-controller-manager and etcd, as tools/kubernetes/go.mod and
               tools/etcd/go.mod pin them (needs Go and about 15 minutes of one core), or those in
               $KUBEBUILDER_ASSETS; with them comes what `crds` is
  crds         the custom resource definitions of Argo CD, Gateway API and external-dns that tests
               install, as tools/crds/go.mod pins them (needs Go)
  helm         helm, as tools/helm/go.mod pins it (needs Go)
  python       the programs in Python that judge the interfaces, as
               tools/judges-python/requirements.txt pins them (needs Python with venv)
  node         those of Node.js, as tools/judges-node/package-lock.json pins them (needs npm)
  deny         cargo-deny, unless a fitting one is on PATH

The cache is $DAYBOOK_TOOLS, or daybook/tools in $XDG_CACHE_HOME or in ~/.cache. The paths of what
was built are printed, one a line.
";

/// The version of cargo-deny that deny.toml is written for.
const CARGO_DENY: &str = "0.20.2";
/// The version of cargo-fuzz.
const CARGO_FUZZ: &str = "0.13.1";

pub(crate) fn run(arguments: &[String]) -> Result<ExitCode, Failure> {
    let all = [
        "nats",
        "nats-oldest",
        "judge",
        "tessera",
        "kubernetes",
        "crds",
        "helm",
        "python",
        "node",
        "deny",
    ];
    let mut names: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if names.is_empty() {
        names = all.to_vec();
    }
    for name in names {
        let path = match name {
            "kubernetes" => kubernetes()?,
            "crds" => crds::fetch()?,
            "helm" => GoProgram::HELM.build()?,
            "nats" => GoProgram::NATS_NEWEST.build()?,
            "nats-oldest" => GoProgram::NATS_OLDEST.build()?,
            "judge" => GoProgram::JUDGE.build()?,
            "tessera" => GoProgram::TESSERA_BENCH.build()?,
            "python" => packages::python()?,
            "node" => packages::node()?,
            "deny" => cargo_deny()?,
            other => {
                return Err(format!("no tool is called {other:?}; there are {all:?}").into());
            }
        };
        println!("{}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// The folder that all of this is built into.
pub(crate) fn folder() -> Result<PathBuf, Failure> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(folder) = set("DAYBOOK_TOOLS") {
        return Ok(folder.into());
    }
    let cache = set("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(set("HOME")?).join(".cache")))
        .ok_or("neither DAYBOOK_TOOLS nor XDG_CACHE_HOME nor HOME says where tools go")?;
    Ok(cache.join("daybook/tools"))
}

/// A program written in Go, pinned by a go.mod of this repository.
pub(crate) struct GoProgram {
    /// The file name in the cache's `bin`.
    name: &'static str,
    /// The folder of the go.mod, from the root of the workspace.
    module: &'static str,
    /// The package to build: a package of a module that go.mod pins, or a folder of the module's own
    /// that begins with a dot.
    package: &'static str,
    /// The variable of the package that says which version it is, where it must be told.
    says_version: Option<&'static str>,
}

impl GoProgram {
    pub(crate) const NATS_NEWEST: Self = Self {
        name: "nats-server",
        module: "tools",
        package: "github.com/nats-io/nats-server/v2",
        says_version: None,
    };
    pub(crate) const NATS_OLDEST: Self = Self {
        name: "nats-server-oldest",
        module: "tools/nats-oldest",
        package: "github.com/nats-io/nats-server/v2",
        says_version: None,
    };
    pub(crate) const JUDGE: Self = Self {
        name: "tlog-judge",
        module: "tools/judges",
        package: ".",
        says_version: None,
    };
    pub(crate) const TESSERA_BENCH: Self = Self {
        name: "tessera-bench",
        module: "tools/judges",
        package: "./tessera-bench",
        says_version: None,
    };
    pub(crate) const KUBE_APISERVER: Self = Self {
        name: "kube-apiserver",
        module: "tools/kubernetes",
        package: "k8s.io/kubernetes/cmd/kube-apiserver",
        says_version: Some("k8s.io/component-base/version.gitVersion"),
    };
    pub(crate) const KUBE_CONTROLLER_MANAGER: Self = Self {
        name: "kube-controller-manager",
        package: "k8s.io/kubernetes/cmd/kube-controller-manager",
        ..Self::KUBE_APISERVER
    };
    pub(crate) const ETCD: Self = Self {
        name: "etcd",
        module: "tools/etcd",
        package: "go.etcd.io/etcd/server/v3",
        says_version: None,
    };
    pub(crate) const HELM: Self = Self {
        name: "helm",
        module: "tools/helm",
        package: "helm.sh/helm/v4/cmd/helm",
        says_version: Some("helm.sh/helm/v4/internal/version.version"),
    };

    /// What tells one build from another: the pinned version, or the sources.
    fn version(&self) -> Result<String, Failure> {
        let module = root().join(self.module);
        let go_mod = fs::read_to_string(module.join("go.mod"))?;
        if self.package.starts_with('.') {
            let sources = fs::read_to_string(module.join(self.package).join("main.go"))?;
            return Ok(go_mod + &fs::read_to_string(module.join("go.sum"))? + &sources);
        }
        let version = pinned(&go_mod, self.package);
        let version = version
            .ok_or_else(|| format!("{}/go.mod does not pin {}", self.module, self.package))?;
        Ok(version.to_owned())
    }

    /// Builds the program unless the cache has it at the pinned version, and returns its path.
    /// Nobody ever sees a half-built one.
    pub(crate) fn build(&self) -> Result<PathBuf, Failure> {
        let module = root().join(self.module);
        let version = self.version()?;
        let bin = folder()?.join("bin");
        let server = bin.join(self.name);
        let stamp = bin.join(format!("{}.version", self.name));
        if is_executable(&server) && fs::read_to_string(&stamp).is_ok_and(|s| s == version) {
            return Ok(server);
        }
        let go = on_path("go").ok_or("Go is not on PATH")?;
        fs::create_dir_all(&bin)?;
        let told = self
            .says_version
            .map(|name| format!(" -X {name}={version}"));
        let told = told.unwrap_or_default();
        let unfinished = bin.join(format!("{}.{}", self.name, std::process::id()));
        let built = run_command(
            Command::new(go)
                .current_dir(&module)
                .env("CGO_ENABLED", "0")
                // A go.work of the surroundings has nothing to say about pinned versions.
                .env("GOWORK", "off")
                .args(["build", "-trimpath", "-buildvcs=false"])
                .arg(format!("-ldflags=-s -w{told}"))
                .args(["-o".as_ref(), unfinished.as_os_str(), self.package.as_ref()]),
        );
        if let Err(failure) = built {
            let _ = fs::remove_file(&unfinished);
            return Err(failure);
        }
        // The stamp goes first and comes last: it never vouches for another version's binary.
        let _ = fs::remove_file(&stamp);
        fs::rename(&unfinished, &server)?;
        fs::write(&stamp, version)?;
        Ok(server)
    }
}

/// The version at which a go.mod requires the module that a package is in.
fn pinned<'a>(go_mod: &'a str, package: &str) -> Option<&'a str> {
    let module = |line: &'a str| {
        let mut words = line
            .trim()
            .trim_start_matches("require ")
            .split_whitespace();
        let rest = package.strip_prefix(words.next()?)?;
        let version = words.next().filter(|v| v.starts_with('v'))?;
        let is_major = |rest: &str| {
            let major = rest[1..].split('/').next().unwrap_or_default();
            major.len() > 1 && major.starts_with('v') && major[1..].parse::<u32>().is_ok()
        };
        (rest.is_empty() || rest.starts_with('/') && !is_major(rest)).then_some(version)
    };
    go_mod.lines().find_map(module)
}

/// The folder that holds a Kubernetes control plane: `KUBEBUILDER_ASSETS` if it is set, or the
/// cache, where what is missing is built now.
pub(crate) fn kubernetes() -> Result<PathBuf, Failure> {
    crds::fetch()?;
    let set = std::env::var_os("KUBEBUILDER_ASSETS").filter(|value| !value.is_empty());
    if let Some(folder) = set {
        return Ok(folder.into());
    }
    for program in [
        GoProgram::ETCD,
        GoProgram::KUBE_APISERVER,
        GoProgram::KUBE_CONTROLLER_MANAGER,
    ] {
        program.build()?;
    }
    Ok(folder()?.join("bin"))
}

/// A cargo-deny of the pinned version: from PATH, from the cache, or installed there now.
pub(crate) fn cargo_deny() -> Result<PathBuf, Failure> {
    cargo_program("cargo-deny", CARGO_DENY, &["--version"])
}

/// A cargo-fuzz of the pinned version: from PATH, from the cache, or installed there now.
pub(crate) fn cargo_fuzz() -> Result<PathBuf, Failure> {
    cargo_program("cargo-fuzz", CARGO_FUZZ, &["fuzz", "--version"])
}

/// A program for cargo of one version, which `ask` makes it print.
fn cargo_program(name: &str, version: &str, ask: &[&str]) -> Result<PathBuf, Failure> {
    let root = folder()?.join(format!("{name}-{version}"));
    let cached = root.join("bin").join(name);
    let is_pinned = |program: &PathBuf| {
        is_executable(program)
            && output(Command::new(program).args(ask))
                .is_ok_and(|said| said.split_whitespace().nth(1) == Some(version))
    };
    let candidates = [on_path(name), Some(cached.clone())];
    if let Some(found) = candidates.into_iter().flatten().find(is_pinned) {
        return Ok(found);
    }
    run_command(
        cargo()
            .args(["install", "--quiet", "--locked", "--version", version])
            .arg("--root")
            .args([root.as_os_str(), name.as_ref()]),
    )?;
    Ok(cached)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pinned_version_is_read_from_either_form_of_require() {
        let block = "module x\n\nrequire (\n\ta.b/c v1.0.0 // indirect\n\ta.b/c/v2 v2.3.4\n)\n";
        assert_eq!(pinned(block, "a.b/c/v2"), Some("v2.3.4"));
        assert_eq!(pinned(block, "a.b/c"), Some("v1.0.0"));
        assert_eq!(pinned("require a.b/c v9.9.9\n", "a.b/c"), Some("v9.9.9"));
        assert_eq!(pinned(block, "a.b"), None);
        assert_eq!(pinned(block, "a.b/c/cmd/d"), Some("v1.0.0"));
        assert_eq!(pinned(block, "a.b/c/v2/cmd/d"), Some("v2.3.4"));
        assert_eq!(pinned(block, "a.b/c/v3"), None);
    }

    #[test]
    fn each_program_is_pinned_in_the_repository() {
        for program in [
            GoProgram::NATS_NEWEST,
            GoProgram::NATS_OLDEST,
            GoProgram::JUDGE,
            GoProgram::TESSERA_BENCH,
            GoProgram::ETCD,
            GoProgram::KUBE_APISERVER,
            GoProgram::KUBE_CONTROLLER_MANAGER,
            GoProgram::HELM,
        ] {
            assert!(program.version().is_ok(), "{}", program.name);
        }
    }
}
