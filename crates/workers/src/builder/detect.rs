//! What a source folder is, and how it is started.
//!
//! | what is there | what is run |
//! |---|---|
//! | `Procfile` with a line `web: …` | that line, by `/bin/sh` |
//! | `app.py`, `main.py`, `server.py` or `wsgi.py` | `python3` with it |
//! | `package.json` with a `start` script | the script; `node <file>` directly if that is all it is |
//! | `server.js`, `index.js`, `app.js`, or the `main` of `package.json` | `node` with it |
//! | an executable ELF file named like the service in the folder, `bin/` or `target/release/`, or the only one in `bin/` or `target/release/` | it |
//! | `index.html` in the folder or in `public/`, `dist/`, `build/` | [`STATIC_SERVER`] with the folder |
//!
//! The first that fits is taken.

use std::fmt;
use std::fs;
use std::io::Read as _;
use std::path::Path;

use super::command::is_executable;

/// The program that a static site is started with: `daybook-static <folder>`, serving the folder
/// on the port that the variable `PORT` names.
///
/// The local target serves such a site by itself. Elsewhere a program of this name must be on the
/// base image's `PATH`, or the service must have a command of its own, such as
/// `["python3", "-m", "http.server", "8080"]` on a Python image.
pub const STATIC_SERVER: &str = "daybook-static";

/// What a source is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It says itself how it is started.
    Procfile,
    /// A Python program.
    Python,
    /// A Node.js program.
    Node,
    /// A compiled program.
    Binary,
    /// Files to be served as they are.
    Static,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Procfile => "Procfile",
            Self::Python => "Python",
            Self::Node => "Node.js",
            Self::Binary => "binary",
            Self::Static => "static site",
        })
    }
}

/// How a source is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// What it is.
    pub kind: Kind,
    /// The command, in the source folder.
    pub command: Vec<String>,
    /// What people may want to know, in whole sentences.
    pub notes: Vec<String>,
}

impl fmt::Display for Start {
    /// `Python: python3 app.py`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = match self.command.as_slice() {
            [sh, c, script] if sh == "/bin/sh" && c == "-c" => script.clone(),
            words => words.join(" "),
        };
        write!(f, "{}: {shown}", self.kind)
    }
}

/// Nothing says how the source is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotDetected {
    /// What was looked for, in order.
    pub looked_for: Vec<String>,
    /// What was found that may help, in whole sentences.
    pub hints: Vec<String>,
}

const PYTHON: &[&str] = &["app.py", "main.py", "server.py", "wsgi.py"];
const NODE: &[&str] = &["server.js", "index.js", "app.js"];
const SITE: &[&str] = &[".", "public", "dist", "build"];
const BINARIES: &[&str] = &["bin", "target/release"];

/// Finds out what a folder is and how it is started. `service` is the name that a program may
/// have. Whether a build command ran decides only what is said about dependencies.
pub fn detect(folder: &Path, service: &str, built: bool) -> Result<Start, NotDetected> {
    let start = procfile(folder)
        .or_else(|| python(folder, built))
        .or_else(|| node(folder, built))
        .or_else(|| binary(folder, service))
        .or_else(|| site(folder));
    start.ok_or_else(|| NotDetected {
        looked_for: vec![
            "a Procfile with a `web:` line".into(),
            PYTHON.join(", "),
            "a package.json with a start script".into(),
            NODE.join(", "),
            format!("an executable `{service}`, `bin/{service}` or `target/release/{service}`"),
            "an index.html".into(),
        ],
        hints: hints(folder, built),
    })
}

fn procfile(folder: &Path) -> Option<Start> {
    let text = read_text(&folder.join("Procfile"))?;
    let command = text
        .lines()
        .find_map(|line| line.strip_prefix("web:"))
        .map(str::trim)
        .filter(|c| !c.is_empty())?;
    Some(Start {
        kind: Kind::Procfile,
        command: vec!["/bin/sh".into(), "-c".into(), command.into()],
        notes: Vec::new(),
    })
}

fn python(folder: &Path, built: bool) -> Option<Start> {
    let file = PYTHON.iter().find(|f| folder.join(f).is_file())?;
    let mut notes = Vec::new();
    let dependencies = ["requirements.txt", "pyproject.toml", "Pipfile"]
        .iter()
        .find(|f| folder.join(f).is_file());
    if let Some(dependencies) = dependencies
        && !built
    {
        notes.push(format!(
            "{dependencies} is not installed: the service has no build command, so what it needs must be in the base image or on the machine."
        ));
    }
    if folder.join("package.json").is_file() {
        notes.push("There is a package.json too; a Procfile would say which to start.".into());
    }
    Some(Start {
        kind: Kind::Python,
        command: vec!["python3".into(), (*file).into()],
        notes,
    })
}

fn node(folder: &Path, built: bool) -> Option<Start> {
    let package: serde_json::Value = read_text(&folder.join("package.json"))
        .and_then(|text| serde_json::from_str(&text).ok())
        .unwrap_or_default();
    let command = match package["scripts"]["start"].as_str() {
        Some(script) => match script.split_whitespace().collect::<Vec<_>>()[..] {
            // Without npm in between, signals reach the program itself.
            ["node", file] if plain_path(file) => vec!["node".to_owned(), file.to_owned()],
            _ => vec!["npm".into(), "start".into(), "--silent".into()],
        },
        None => {
            let main = package["main"]
                .as_str()
                .filter(|m| plain_path(m) && folder.join(m).is_file());
            let file = main.or_else(|| NODE.iter().copied().find(|f| folder.join(f).is_file()))?;
            vec!["node".into(), file.into()]
        }
    };
    let mut notes = Vec::new();
    let has_dependencies = package["dependencies"]
        .as_object()
        .is_some_and(|d| !d.is_empty());
    if has_dependencies && !built && !folder.join("node_modules").is_dir() {
        notes.push(
            "The dependencies of package.json are not installed: set the service's build command, for example to [\"npm\", \"ci\"]."
                .into(),
        );
    }
    Some(Start {
        kind: Kind::Node,
        command,
        notes,
    })
}

fn binary(folder: &Path, service: &str) -> Option<Start> {
    let named = std::iter::once(service.to_owned())
        .chain(BINARIES.iter().map(|dir| format!("{dir}/{service}")))
        .find(|path| is_elf(&folder.join(path)));
    let path = named.or_else(|| BINARIES.iter().find_map(|dir| only_elf(folder, dir)))?;
    Some(Start {
        kind: Kind::Binary,
        command: vec![format!("./{path}")],
        notes: Vec::new(),
    })
}

fn site(folder: &Path) -> Option<Start> {
    let root = SITE
        .iter()
        .find(|dir| folder.join(dir).join("index.html").is_file())?;
    Some(Start {
        kind: Kind::Static,
        command: vec![STATIC_SERVER.into(), (*root).into()],
        notes: Vec::new(),
    })
}

fn hints(folder: &Path, built: bool) -> Vec<String> {
    let mut hints = Vec::new();
    let sources: &[(&str, &str, &str)] = &[
        ("Cargo.toml", "Rust", r#"["cargo", "build", "--release"]"#),
        ("go.mod", "Go", r#"["go", "build", "-o", "bin/", "./..."]"#),
    ];
    for (file, language, command) in sources {
        if folder.join(file).is_file() {
            hints.push(if built {
                format!("There is a {file}, but the build command left no program named like the service.")
            } else {
                format!("This is {language} source: set the service's build command to {command}.")
            });
        }
    }
    if ["requirements.txt", "pyproject.toml"]
        .iter()
        .any(|f| folder.join(f).is_file())
    {
        hints.push(format!(
            "This is a Python project without any of {}.",
            PYTHON.join(", ")
        ));
    }
    if folder.join("Dockerfile").is_file() {
        hints.push("There is a Dockerfile: choose the dockerfile builder.".into());
    }
    hints
}

/// A file name that cannot be taken for an option or for something outside.
fn plain_path(path: &str) -> bool {
    !path.starts_with(['-', '/'])
        && !path.split('/').any(|p| p == "..")
        && path
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/'))
}

fn read_text(path: &Path) -> Option<String> {
    const MAX: u64 = 1 << 20;
    let mut text = String::new();
    fs::File::open(path)
        .ok()?
        .take(MAX)
        .read_to_string(&mut text)
        .ok()?;
    Some(text)
}

fn is_elf(path: &Path) -> bool {
    let mut magic = [0; 4];
    is_executable(path)
        && fs::File::open(path).is_ok_and(|mut f| f.read_exact(&mut magic).is_ok())
        && magic == *b"\x7fELF"
}

fn only_elf(folder: &Path, dir: &str) -> Option<String> {
    let mut found = fs::read_dir(folder.join(dir))
        .ok()?
        .flatten()
        .filter(|e| is_elf(&e.path()))
        // Cargo leaves libraries beside programs.
        .filter_map(|e| {
            e.file_name()
                .into_string()
                .ok()
                .filter(|n| !n.contains('.'))
        });
    match (found.next(), found.next()) {
        (Some(name), None) => Some(format!("{dir}/{name}")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            if text.starts_with("\x7fELF") {
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            }
        }
        dir
    }

    fn detected(files: &[(&str, &str)]) -> String {
        match detect(folder(files).path(), "api", false) {
            Ok(start) => start.to_string(),
            Err(none) => format!("none; {}", none.hints.join(" ")),
        }
    }

    #[test]
    fn what_is_there_says_how_it_starts() {
        let cases: &[(&[(&str, &str)], &str)] = &[
            (
                &[
                    ("Procfile", "worker: x\nweb: ./run --port $PORT\n"),
                    ("app.py", ""),
                ],
                "Procfile: ./run --port $PORT",
            ),
            (&[("app.py", "")], "Python: python3 app.py"),
            (
                &[("main.py", ""), ("requirements.txt", "flask")],
                "Python: python3 main.py",
            ),
            (
                &[(
                    "package.json",
                    r#"{"scripts":{"start":"node src/server.js"}}"#,
                )],
                "Node.js: node src/server.js",
            ),
            (
                &[(
                    "package.json",
                    r#"{"scripts":{"start":"next start -p $PORT"}}"#,
                )],
                "Node.js: npm start --silent",
            ),
            (
                &[
                    ("package.json", r#"{"main":"lib/main.js"}"#),
                    ("lib/main.js", ""),
                ],
                "Node.js: node lib/main.js",
            ),
            (
                &[
                    ("package.json", r#"{"main":"/etc/passwd"}"#),
                    ("server.js", ""),
                ],
                "Node.js: node server.js",
            ),
            (&[("index.js", "")], "Node.js: node index.js"),
            (
                &[("bin/api", "\x7fELF"), ("bin/other", "\x7fELF")],
                "binary: ./bin/api",
            ),
            (&[("bin/other", "\x7fELF")], "binary: ./bin/other"),
            (
                &[("target/release/api", "\x7fELF"), ("Cargo.toml", "")],
                "binary: ./target/release/api",
            ),
            (&[("index.html", "")], "static site: daybook-static ."),
            (
                &[("dist/index.html", "")],
                "static site: daybook-static dist",
            ),
        ];
        for (files, expected) in cases {
            assert_eq!(detected(files), *expected);
        }
    }

    #[test]
    fn what_is_not_enough_leads_to_a_hint() {
        assert!(detected(&[("Cargo.toml", "")]).contains("cargo"));
        assert!(detected(&[("bin/a", "\x7fELF"), ("bin/b", "\x7fELF")]).starts_with("none"));
        assert!(detected(&[("bin/api", "#!/bin/sh")]).starts_with("none"));
        assert!(detected(&[("pyproject.toml", "")]).contains("Python project"));
        assert!(detected(&[("Procfile", "web:\n")]).starts_with("none"));
    }

    #[test]
    fn dependencies_that_nobody_installs_are_pointed_out() {
        let dir = folder(&[("app.py", ""), ("requirements.txt", "flask")]);
        assert_eq!(detect(dir.path(), "api", false).unwrap().notes.len(), 1);
        assert_eq!(detect(dir.path(), "api", true).unwrap().notes.len(), 0);
    }
}
