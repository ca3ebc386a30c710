//! `daybook audit verify`

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use daybook_audit::{
    Observe, Options, Severity, Thoroughness, Trust, Verified, VerifyError, observe, verify,
};
use serde_json::json;

use super::gitops::ByGit;
use super::ledger::{LedgerArgs, TrustArgs, blocking, failed, progress_bar, unreadable};
use crate::commands::Outcome;
use crate::exit::{Code, Failure};
use crate::output;

/// Findings that are printed for people; all are in `--output json`.
const PRINTED: usize = 20;

/// Verify a whole ledger: signatures, every event, every aggregate, and that history was not
/// rewritten since the last time.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    ledger: LedgerArgs,
    #[command(flatten)]
    trust: TrustArgs,
    /// A checkpoint from elsewhere that the ledger must go on from.
    #[arg(long, value_name = "FILE")]
    checkpoint: Option<PathBuf>,
    /// Also hold every event against its JSON Schema, and every file against the manifest.
    #[arg(long, conflicts_with = "quick")]
    full: bool,
    /// Only signatures, tree and continuity; do not read the events.
    #[arg(long)]
    quick: bool,
}

pub async fn run(args: VerifyArgs) -> Outcome {
    let begun = Instant::now();
    let verified = blocking(move |runtime, stop| {
        let earlier = match &args.checkpoint {
            Some(path) => Some(
                std::fs::read(path)
                    .map_err(|e| unreadable(path, &e))?
                    .into(),
            ),
            None => None,
        };
        let source = args.ledger.open(runtime)?;
        let keeper = args.trust.keeper()?;
        let options = Options {
            keeper: Some(keeper.clone()),
            gitops: Some(Arc::new(ByGit)),
            keys: args.trust.named()?,
            earlier,
            thoroughness: match (args.full, args.quick) {
                (true, _) => Thoroughness::Full,
                (_, true) => Thoroughness::Quick,
                _ => Thoroughness::Normal,
            },
            stop,
            ..Options::default()
        };
        let bar = progress_bar(0, "events");
        let verified = verify(source, &options, &mut |done, size| {
            bar.set_length(size);
            bar.set_position(done);
        })
        .map_err(|e| failure(&e))?;
        bar.finish_and_clear();
        if let (Some(origin), Some(keep)) = (&verified.origin, &verified.keep) {
            keeper
                .save(origin, keep)
                .map_err(|e| failed("not_kept", &e))?;
        }
        Ok(verified)
    })
    .await?;
    print(&verified, begun.elapsed().as_secs_f64());
    code_of(&verified)
}

/// Verifies a ledger while somebody looks on, and gives them back. Nothing is kept for the next
/// time: that is for `daybook audit verify`.
pub async fn observed<O: Observe + Send + 'static>(
    ledger: LedgerArgs,
    trust: TrustArgs,
    mut observer: O,
) -> Result<(Verified, O), Failure> {
    blocking(move |runtime, stop| {
        let source = ledger.open(runtime)?;
        let options = Options {
            keys: trust.named()?,
            keeper: Some(trust.keeper()?),
            stop,
            ..Options::default()
        };
        let bar = progress_bar(0, "events");
        let verified = observe(source, &options, &mut observer, &mut |done, size| {
            bar.set_length(size);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        Ok((verified.map_err(|e| failure(&e))?, observer))
    })
    .await
}

fn failure(error: &VerifyError) -> Failure {
    match error {
        VerifyError::Stopped => Failure::new(Code::Failure, "stopped", error.to_string()),
        other => failed("unreadable", other),
    }
}

/// The exit code of what rests on a ledger.
pub fn code_of(verified: &Verified) -> Outcome {
    Ok(if verified.holds() {
        Code::Success
    } else {
        Code::Mismatch
    })
}

fn print(verified: &Verified, seconds: f64) {
    let findings: Vec<_> = verified.findings.list().collect();
    if output::is_json() {
        let counts: serde_json::Map<_, _> = verified
            .findings
            .counts()
            .iter()
            .map(|(kind, count)| (kind.code().to_owned(), json!(count)))
            .collect();
        let mut document = json!(verified);
        document["verdict"] = json!(if verified.holds() { "holds" } else { "differs" });
        document["findings"] = json!(findings);
        document["finding_counts"] = json!(counts);
        document["proven"] = json!(verified.proven());
        document["not_proven"] = json!(verified.not_proven());
        output::json(&document);
        return;
    }
    let style = output::style();
    output::line(&format!(
        "{}: {} entries, verified in {seconds:.2} s",
        verified.origin.as_deref().unwrap_or(&verified.source),
        verified.counts.entries
    ));
    let trust = match verified.trust {
        Trust::Given => "the key that you named",
        Trust::Kept => "the key that you kept from last time",
        Trust::FirstUse => "the key that came with the ledger: trusted on first use",
    };
    output::line(&format!("key: {trust}"));
    for finding in findings.iter().take(PRINTED) {
        let code = match finding.severity {
            Severity::Problem => style.error(finding.kind.code()),
            Severity::Notice => style.warn(finding.kind.code()),
        };
        output::line("");
        let place = finding.place.to_string();
        output::line(&format!("{code}  {}", style.dim(&place)));
        output::line(&format!("  {}", finding.message));
        output::line(&format!(
            "  {} {}",
            style.dim("what to do:"),
            finding.remedy
        ));
    }
    let all: u64 = verified.findings.counts().values().sum();
    if all > PRINTED as u64 {
        output::line("");
        output::line(&format!("{} more findings:", all - PRINTED as u64));
        for (kind, count) in verified.findings.counts() {
            output::line(&format!("  {count} {kind} in all"));
        }
    }
    output::line("");
    output::line(&style.bold("Proven"));
    for sentence in verified.proven() {
        output::line(&format!("  {sentence}"));
    }
    output::line(&style.bold("Not proven"));
    for sentence in verified.not_proven() {
        output::line(&format!("  {sentence}"));
    }
    output::line("");
    output::line(&if verified.holds() {
        style.good("the ledger holds")
    } else {
        style.error(&format!(
            "the ledger does NOT hold: {}",
            match verified.findings.problems() {
                0 | 1 => "1 problem".to_owned(),
                problems => format!("{problems} problems"),
            }
        ))
    });
}
