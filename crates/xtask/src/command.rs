//! Running other programs.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};

use crate::Failure;

/// What tests, the crash matrix and the schemas are built with. What one step has compiled the next
/// one has too only if all name the same packages and features: cargo unites the features of what it
/// is asked for.
pub(crate) const WHOLE: [&str; 3] = ["--workspace", "--features", "daybook-testkit/bench"];

/// The root of the workspace.
pub(crate) fn root() -> PathBuf {
    // Cargo sets the variable when it runs a task; the built-in path serves a bare executable.
    let here = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    here.ancestors().nth(2).map_or(here.clone(), Path::to_owned)
}

/// The cargo that runs this task.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// The executable of this name that a shell would run.
pub(crate) fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|folder| folder.join(name))
        .find(|file| is_executable(file))
}

/// Whether a file is there that may be run.
pub(crate) fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    file.metadata()
        .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// The command as one would type it.
pub(crate) fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let mut text = name.to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}

/// Shows a command, runs it without standard input and returns how it ended.
pub(crate) fn status(command: &mut Command) -> Result<ExitStatus, Failure> {
    eprintln!("$ {}", shown(command));
    command
        .stdin(Stdio::null())
        .status()
        .map_err(|e| format!("{} cannot be run: {e}", shown(command)).into())
}

/// Like [`status`], with the lines of its standard output, which are shown as they come.
pub(crate) fn status_and_lines(
    command: &mut Command,
) -> Result<(ExitStatus, Vec<String>), Failure> {
    eprintln!("$ {}", shown(command));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| format!("{} cannot be run: {e}", shown(command)))?;
    let mut lines = Vec::new();
    if let Some(output) = child.stdout.take() {
        let mut shown = std::io::stdout().lock();
        for line in BufReader::new(output).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            writeln!(shown, "{line}")?;
            lines.push(line);
        }
    }
    Ok((child.wait()?, lines))
}

/// Shows and runs a command; it is an error if that fails.
pub(crate) fn run(command: &mut Command) -> Result<(), Failure> {
    match status(command)? {
        s if s.success() => Ok(()),
        s => Err(format!("`{}` failed ({s})", shown(command)).into()),
    }
}

/// What a command prints; it is an error if it fails, with what it said.
pub(crate) fn output(command: &mut Command) -> Result<String, Failure> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("{} cannot be run: {e}", shown(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("`{}` failed: {}", shown(command), said.trim()).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// The exit code to end with when a child ended so.
pub(crate) fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().and_then(|c| u8::try_from(c).ok());
    ExitCode::from(code.unwrap_or(1))
}
