//! Programs of Python and Node.js that judge Daybook's interfaces, each installed once at its pinned
//! version. Nothing of them is run while they are installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::folder;
use crate::Failure;
use crate::command::{on_path, root, run};

/// The interpreter of an environment that has what `tools/judges-python` pins.
pub(crate) fn python() -> Result<PathBuf, Failure> {
    let pins = root().join("tools/judges-python/requirements.txt");
    let environment = installed("judges-python", &[&pins], |unfinished| {
        let python = on_path("python3").ok_or("python3 is not on PATH")?;
        run(Command::new(python).args(["-m", "venv"]).arg(unfinished))?;
        run(Command::new(unfinished.join("bin/python"))
            .args(["-m", "pip", "install", "--quiet", "--no-deps"])
            .args([
                "--disable-pip-version-check",
                "--only-binary",
                ":all:",
                "-r",
            ])
            .arg(&pins))
    })?;
    Ok(environment.join("bin/python"))
}

/// The folder whose `node_modules` has what `tools/judges-node` pins.
pub(crate) fn node() -> Result<PathBuf, Failure> {
    let from = root().join("tools/judges-node");
    let [package, lock] = ["package.json", "package-lock.json"].map(|name| from.join(name));
    installed("judges-node", &[&package, &lock], |unfinished| {
        on_path("node").ok_or("node is not on PATH")?;
        let npm = on_path("npm").ok_or("npm is not on PATH")?;
        fs::create_dir_all(unfinished)?;
        for file in [&package, &lock] {
            fs::copy(file, unfinished.join(file.file_name().unwrap_or_default()))?;
        }
        run(Command::new(npm).current_dir(unfinished).args([
            "ci",
            "--ignore-scripts",
            "--no-audit",
            "--no-fund",
            "--loglevel=error",
        ]))
    })
}

/// A folder of the cache that `install` has filled, once for each content of the `pins`. Nobody ever
/// takes one that was left unfinished: a stamp in it says what it was made for.
///
/// It is made where it stays, as environments of Python have their own path in them.
fn installed(
    name: &str,
    pins: &[&Path],
    install: impl FnOnce(&Path) -> Result<(), Failure>,
) -> Result<PathBuf, Failure> {
    let mut wanted = String::new();
    for pin in pins {
        wanted.push_str(&fs::read_to_string(pin)?);
    }
    let home = folder()?.join(name);
    let stamp = home.join("installed.txt");
    if fs::read_to_string(&stamp).is_ok_and(|made_for| made_for == wanted) {
        return Ok(home);
    }
    if home.exists() {
        fs::remove_dir_all(&home)?;
    }
    fs::create_dir_all(folder()?)?;
    install(&home)?;
    fs::write(&stamp, wanted)?;
    Ok(home)
}
