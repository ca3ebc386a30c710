//! `cargo xtask schemas`: the files in `schemas/` are generated from the code and committed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::Failure;
use crate::command::{WHOLE, cargo, output, root, run as run_command};

pub(crate) const HELP: &str = "\
Generate schemas/, or check that it is up to date

Usage: cargo xtask schemas [--check]

Options:
  --check  change nothing; fail if a file in schemas/ differs from what the code generates
";

pub(crate) fn run(arguments: &[String]) -> Result<ExitCode, Failure> {
    let check = match arguments {
        [] => false,
        [only] if only == "--check" => true,
        other => return Err(format!("unknown arguments {other:?}; see --help").into()),
    };
    if check {
        self::check()?
    } else {
        write()?
    }
    Ok(ExitCode::SUCCESS)
}

/// It is an error if the committed files differ from what the code generates.
pub(crate) fn check() -> Result<(), Failure> {
    if compare()?.is_empty() {
        return Ok(());
    }
    Err(
        "schemas/ is not up to date. `cargo xtask schemas` writes it anew; read the difference \
         before you commit it: a released event type never changes its meaning"
            .into(),
    )
}

fn write() -> Result<(), Failure> {
    for (file, difference) in compare()? {
        let target = committed().join(&file);
        match difference {
            Difference::NoLongerGenerated => fs::remove_file(&target)?,
            Difference::New | Difference::Changed => {
                if let Some(folder) = target.parent() {
                    fs::create_dir_all(folder)?;
                }
                fs::copy(generated().join(&file), &target)?;
            }
        }
    }
    Ok(())
}

fn committed() -> PathBuf {
    root().join("schemas")
}

fn generated() -> PathBuf {
    root().join("target/xtask/schemas")
}

/// Where cargo puts the binary.
fn binary() -> Result<PathBuf, Failure> {
    let metadata = output(cargo().args(["metadata", "--format-version=1", "--no-deps"]))?;
    let target = metadata
        .split_once("\"target_directory\":\"")
        .and_then(|(_, rest)| rest.split_once('"'))
        .ok_or("cargo names no target folder")?
        .0;
    Ok(Path::new(target).join("debug/daybook"))
}

/// Generates all files and prints how they differ from the committed ones.
fn compare() -> Result<BTreeMap<PathBuf, Difference>, Failure> {
    let generated = generated();
    let _ = fs::remove_dir_all(&generated);
    fs::create_dir_all(&generated)?;
    // The binary of the end-to-end tests, which `cargo xtask test` has made or will need.
    run_command(
        cargo()
            .arg("test")
            .args(WHOLE)
            .args(["--no-run", "--test", "e2e"]),
    )?;
    run_command(
        Command::new(binary()?)
            .args(["schema", "--all"])
            .arg(&generated),
    )?;
    let differences = differences(&files(&committed())?, &files(&generated)?);
    if differences.is_empty() {
        eprintln!("schemas/ is up to date");
    }
    for (file, difference) in &differences {
        eprintln!("schemas/{}: {}", file.display(), difference.in_words());
    }
    Ok(differences)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Difference {
    New,
    Changed,
    NoLongerGenerated,
}

impl Difference {
    fn in_words(self) -> &'static str {
        match self {
            Self::New => "is generated, but not committed",
            Self::Changed => "differs from what is generated",
            Self::NoLongerGenerated => "is committed, but no longer generated",
        }
    }
}

type Files = BTreeMap<PathBuf, Vec<u8>>;

fn differences(committed: &Files, generated: &Files) -> BTreeMap<PathBuf, Difference> {
    let gone = committed
        .keys()
        .filter(|file| !generated.contains_key(*file))
        .map(|file| (file.clone(), Difference::NoLongerGenerated));
    let new = generated
        .iter()
        .filter_map(|(file, bytes)| match committed.get(file) {
            None => Some((file.clone(), Difference::New)),
            Some(old) if old != bytes => Some((file.clone(), Difference::Changed)),
            Some(_) => None,
        });
    gone.chain(new).collect()
}

/// All files below a folder. Documents for people (`*.md`) are written by hand.
fn files(folder: &Path) -> Result<Files, Failure> {
    let mut files = Files::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        if !next.exists() {
            continue;
        }
        for entry in fs::read_dir(&next)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_none_or(|e| e != "md") {
                files.insert(path.strip_prefix(folder)?.to_owned(), fs::read(&path)?);
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_told_apart() {
        let committed = Files::from([
            ("same".into(), b"1".to_vec()),
            ("old".into(), b"1".to_vec()),
            ("changed".into(), b"1".to_vec()),
        ]);
        let generated = Files::from([
            ("same".into(), b"1".to_vec()),
            ("new".into(), b"1".to_vec()),
            ("changed".into(), b"2".to_vec()),
        ]);
        let expected = BTreeMap::from([
            ("changed".into(), Difference::Changed),
            ("new".into(), Difference::New),
            ("old".into(), Difference::NoLongerGenerated),
        ]);
        assert_eq!(differences(&committed, &generated), expected);
    }
}
