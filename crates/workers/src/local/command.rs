//! What is run for an instance: program, arguments, environment and folder.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use super::image::Unpacked;
use crate::builder::detect::STATIC_SERVER;

/// What an instance inherits from the environment of Daybook itself; nothing else, so that no
/// secret of Daybook reaches an application.
const INHERITED: &[&str] = &[
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LOGNAME",
    "SHELL",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "TMPDIR",
    "TZ",
    "USER",
];

/// A command line that can be run. Its environment holds secrets.
pub(super) struct Launch {
    pub(super) program: PathBuf,
    pub(super) args: Vec<OsString>,
    pub(super) env: BTreeMap<OsString, OsString>,
    pub(super) dir: PathBuf,
}

impl fmt::Debug for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Launch")
            .field("program", &self.program)
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

/// Why there is nothing to run.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoCommand {
    #[error("neither the image nor the service names a command")]
    Empty,
    #[error("the command {0:?} was not found, neither in the image nor on this machine")]
    NotFound(String),
    #[error("the file {0:?} of the image is not executable")]
    NotExecutable(String),
    #[error("the folder {dir:?} of the image cannot be entered: {reason}")]
    Folder {
        /// As the image names it.
        dir: String,
        /// Why.
        reason: String,
    },
}

/// Makes the command line of an instance. `own` replaces the image's command, if it says
/// anything; `env` comes on top of the image's.
///
/// The command `daybook-static <folder>`, which images of static sites have, is run by Daybook's
/// own file server. There is no isolation: the image's files are in a folder, not at the root. A program that the
/// image names by an absolute path is taken from that folder, or else from this machine; a bare
/// name is looked for in the image's and then in this machine's `PATH`.
pub(super) fn launch(
    unpacked: &Unpacked,
    own: &[String],
    env: &BTreeMap<String, String>,
    static_server: &[OsString],
) -> Result<Launch, NoCommand> {
    let image = &unpacked.config;
    let dir = within(&unpacked.root, &image.working_dir);
    std::fs::create_dir_all(&dir).map_err(|e| NoCommand::Folder {
        dir: image.working_dir.clone(),
        reason: e.to_string(),
    })?;
    let command = image.command(own);
    let (program, args) = command.split_first().ok_or(NoCommand::Empty)?;
    let path = search_path(unpacked);
    let mut all: BTreeMap<OsString, OsString> = INHERITED
        .iter()
        .filter_map(|name| Some(((*name).into(), std::env::var_os(name)?)))
        .collect();
    all.extend(image.env.iter().map(|(k, v)| (k.into(), v.into())));
    let joined = std::env::join_paths(&path).unwrap_or_default();
    all.insert("PATH".into(), joined);
    all.extend(env.iter().map(|(k, v)| (k.into(), v.into())));

    if program == STATIC_SERVER {
        let (program, fixed) = static_server.split_first().ok_or(NoCommand::Empty)?;
        let folder = args.first().map_or("", String::as_str);
        let folder = if folder.starts_with('/') {
            within(&unpacked.root, folder)
        } else {
            within(&dir, folder)
        };
        let args = fixed.iter().cloned().chain([folder.into()]).collect();
        return Ok(Launch {
            program: program.into(),
            args,
            env: all,
            dir,
        });
    }
    Ok(Launch {
        program: find(program, unpacked, &dir, &path)?,
        args: args.iter().map(Into::into).collect(),
        env: all,
        dir,
    })
}

fn find(
    program: &str,
    unpacked: &Unpacked,
    dir: &Path,
    path: &[PathBuf],
) -> Result<PathBuf, NoCommand> {
    let candidates: Vec<PathBuf> = if program.starts_with('/') {
        vec![within(&unpacked.root, program), program.into()]
    } else if program.contains('/') {
        vec![dir.join(program)]
    } else {
        path.iter().map(|folder| folder.join(program)).collect()
    };
    let mut found = candidates.into_iter().filter(|c| c.is_file()).peekable();
    if found.peek().is_none() {
        return Err(NoCommand::NotFound(program.into()));
    }
    found
        .find(|c| {
            c.metadata()
                .is_ok_and(|m| m.permissions().mode() & 0o111 != 0)
        })
        .ok_or_else(|| NoCommand::NotExecutable(program.into()))
}

/// The folders of the image's `PATH` that exist in it, then those of this machine.
fn search_path(unpacked: &Unpacked) -> Vec<PathBuf> {
    let of_image = unpacked.config.env.iter().find(|(k, _)| k == "PATH");
    let of_image = of_image.map_or("", |(_, v)| v.as_str());
    let here = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    std::env::split_paths(of_image)
        .filter(|p| p.is_absolute())
        .map(|p| within(&unpacked.root, &p.to_string_lossy()))
        .filter(|p| p.is_dir())
        .chain(std::env::split_paths(&here))
        .collect()
}

/// A path of the image as a path of this machine: never outside `root`, whatever it says.
fn within(root: &Path, path: &str) -> PathBuf {
    let mut full = root.to_owned();
    let mut depth = 0;
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => {
                full.push(name);
                depth += 1;
            }
            Component::ParentDir if depth > 0 => {
                full.pop();
                depth -= 1;
            }
            _ => {}
        }
    }
    full
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::image::manifest::ImageConfig;

    fn unpacked(root: &Path, config: ImageConfig) -> Unpacked {
        Unpacked {
            root: root.into(),
            config,
            took: None,
        }
    }

    fn executable(path: &Path) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    }

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn the_images_program_comes_first_and_this_machines_second() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        executable(&root.join("usr/local/bin/serve"));
        executable(&root.join("app/run"));
        let image = ImageConfig {
            entrypoint: strings(&["serve", "--x"]),
            cmd: strings(&["y"]),
            env: vec![
                ("PATH".into(), "/usr/local/bin:/gone".into()),
                ("A".into(), "image".into()),
            ],
            working_dir: "/app".into(),
            ..ImageConfig::default()
        };
        let unpacked = unpacked(root, image);
        let env = BTreeMap::from([("A".to_owned(), "release".to_owned())]);
        let made = launch(&unpacked, &[], &env, &[]).unwrap();
        assert_eq!(made.program, root.join("usr/local/bin/serve"));
        assert_eq!(made.args, ["--x", "y"]);
        assert_eq!(made.dir, root.join("app"));
        assert_eq!(made.env[&OsString::from("A")], "release");
        for (own, program) in [
            ("./run", root.join("app/./run")),
            ("/app/run", root.join("app/run")),
            ("/bin/sh", "/bin/sh".into()),
        ] {
            let made = launch(&unpacked, &strings(&[own]), &env, &[]).unwrap();
            assert_eq!(made.program, program);
            assert!(made.args.is_empty());
        }
    }

    #[test]
    fn what_cannot_be_run_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let image = unpacked(dir.path(), ImageConfig::default());
        let attempt = |own: &[&str]| launch(&image, &strings(own), &BTreeMap::new(), &[]);
        assert_eq!(attempt(&[]).unwrap_err(), NoCommand::Empty);
        let missing = "no-such-program-here";
        assert_eq!(
            attempt(&[missing]).unwrap_err(),
            NoCommand::NotFound(missing.into())
        );
        std::fs::write(dir.path().join("data"), "").unwrap();
        assert_eq!(
            attempt(&["./data"]).unwrap_err(),
            NoCommand::NotExecutable("./data".into())
        );
    }

    #[test]
    fn paths_of_an_image_stay_within_it() {
        let root = Path::new("/root");
        for (path, full) in [
            ("/a/b", "/root/a/b"),
            ("../../etc", "/root/etc"),
            ("/a/../../b", "/root/b"),
            ("", "/root"),
        ] {
            assert_eq!(within(root, path), Path::new(full));
        }
    }

    #[test]
    fn a_static_site_is_served_by_the_own_file_server() {
        let dir = tempfile::tempdir().unwrap();
        let image = ImageConfig {
            entrypoint: strings(&[STATIC_SERVER, "public"]),
            working_dir: "/site".into(),
            ..ImageConfig::default()
        };
        let server = ["/bin/daybook".into(), "static-server".into()];
        let made = launch(&unpacked(dir.path(), image), &[], &BTreeMap::new(), &server).unwrap();
        assert_eq!(made.program, Path::new("/bin/daybook"));
        let folder = dir.path().join("site/public").into_os_string();
        assert_eq!(made.args, [OsString::from("static-server"), folder]);
    }
}
