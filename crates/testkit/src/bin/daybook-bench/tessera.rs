//! The yardstick of the notary: a log of Tessera with its POSIX driver, in a process of its own. See
//! `tools/judges/tessera-bench`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;

use crate::{Failure, temporary_folder};

/// The least checkpoint interval that the driver takes.
pub(crate) const LEAST_INTERVAL: Duration = Duration::from_millis(100);

/// The program that appends to such a log.
#[derive(Debug)]
pub(crate) struct Tessera {
    program: PathBuf,
}

/// What to append, and how the log is set.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load<'a> {
    /// The folder on the disk that is measured.
    pub(crate) folder: Option<&'a Path>,
    pub(crate) seconds: f64,
    pub(crate) bytes: usize,
    /// Writers at once, where there is no rate.
    pub(crate) in_flight: usize,
    /// Entries a second; flat out without it.
    pub(crate) rate: Option<u32>,
    pub(crate) checkpoint_interval: Duration,
    pub(crate) batch: u32,
}

/// What one run found.
#[derive(Debug)]
pub(crate) struct Run {
    /// The version of Tessera.
    pub(crate) version: String,
    /// Whether it syncs before it acknowledges, and how.
    pub(crate) syncs: String,
    pub(crate) durable_per_second: f64,
    pub(crate) published_per_second: f64,
    /// From the call to the published checkpoint.
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
}

impl Tessera {
    /// The program that `DAYBOOK_TESSERA_BENCH` names, or that is where `cargo xtask tools` puts it.
    /// Where there is none, that is said, and the comparison is left out.
    pub(crate) fn find() -> Option<Self> {
        let program = match std::env::var_os("DAYBOOK_TESSERA_BENCH") {
            Some(program) => Some(program.into()),
            None => daybook_testkit::nats::tools_folder().map(|f| f.join("bin/tessera-bench")),
        };
        let program = program.filter(|program: &PathBuf| program.is_file());
        if program.is_none() {
            daybook_testkit::left_out(
                "there is no tessera-bench to measure the notary against; run cargo xtask tools \
                 tessera, which needs Go",
            );
        }
        program.map(|program| Self { program })
    }

    /// Appends to a new log.
    pub(crate) async fn run(&self, load: Load<'_>) -> Result<Run, Failure> {
        let folder = temporary_folder(load.folder)?;
        let mut command = Command::new(&self.program);
        command
            .arg("-folder")
            .arg(folder.path())
            .args(["-seconds", &load.seconds.to_string()])
            .args(["-bytes", &load.bytes.to_string()])
            .args(["-in-flight", &load.in_flight.to_string()])
            .args(["-rate", &load.rate.unwrap_or(0).to_string()])
            .args(["-interval", &in_milliseconds(load.checkpoint_interval)])
            .args(["-batch", &load.batch.to_string()])
            .kill_on_drop(true);
        let output = command.output().await?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("tessera-bench failed: {said}").into());
        }
        eprint!(".");
        Run::read(&output.stdout)
    }
}

impl Run {
    fn read(json: &[u8]) -> Result<Self, Failure> {
        let said: Value = serde_json::from_slice(json)?;
        let missing = |name: &str| format!("tessera-bench said no {name}: {said}");
        let text = |name: &str| {
            let text = said[name].as_str().map(str::to_owned);
            text.ok_or_else(|| missing(name))
        };
        let figure = |name: &str| said[name].as_f64().ok_or_else(|| missing(name));
        Ok(Self {
            version: text("tessera")?,
            syncs: text("syncs")?,
            durable_per_second: figure("durable_per_second")?,
            published_per_second: figure("published_per_second")?,
            p50_ms: figure("p50_ms")?,
            p99_ms: figure("p99_ms")?,
        })
    }
}

/// A duration as Go reads it.
fn in_milliseconds(duration: Duration) -> String {
    format!("{}ms", duration.as_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_says_is_read() {
        let said = r#"{"tessera":"v1.0.4","syncs":"yes","entries":3,"durable_per_second":2.5,
            "published_per_second":2,"p50_ms":1.5,"p99_ms":3,"max_ms":4}"#;
        let run = Run::read(said.as_bytes()).unwrap();
        assert_eq!(
            (run.version.as_str(), run.syncs.as_str()),
            ("v1.0.4", "yes")
        );
        let figures = [run.durable_per_second, run.published_per_second];
        assert_eq!(figures.map(f64::to_bits), [2.5, 2.0].map(f64::to_bits));
        assert!(Run::read(b"{}").is_err());
    }
}
