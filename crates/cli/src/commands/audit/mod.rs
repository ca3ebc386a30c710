//! `daybook audit`: what an auditor does, with a file or with a server.

mod attestation;
mod consistency;
mod diff;
mod export;
mod gitops;
mod ledger;
mod receipt;
mod report;
mod verify;

use clap::Subcommand;

use super::Outcome;

/// Check the ledger without trusting who keeps it. See docs/auditing.md.
#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// Verify a whole ledger: an export, a folder of tiles, or a server.
    Verify(verify::VerifyArgs),
    /// Write one file with all that it takes to verify the ledger offline.
    Export(export::ExportArgs),
    /// Write one file that proves what the signed ledger says of a deployment.
    Receipt(receipt::ReceiptArgs),
    /// Check a receipt, with nothing but the receipt and a key.
    CheckReceipt(receipt::CheckReceiptArgs),
    /// Print the signed in-toto attestation of a deployment that succeeded.
    Attestation(attestation::AttestationArgs),
    /// Check an attestation, with nothing but the attestation and a key.
    CheckAttestation(attestation::CheckAttestationArgs),
    /// Whether one checkpoint of a ledger is the beginning of another.
    Consistency(consistency::ConsistencyArgs),
    /// What changed between two positions: what runs where, routes, settings.
    Diff(diff::DiffArgs),
    /// A report from the whole ledger, which is verified for it.
    Report(report::ReportArgs),
}

pub async fn run(command: AuditCommand) -> Outcome {
    match command {
        AuditCommand::Verify(args) => verify::run(args).await,
        AuditCommand::Export(args) => export::run(args).await,
        AuditCommand::Receipt(args) => receipt::make(args).await,
        AuditCommand::CheckReceipt(args) => receipt::check(args).await,
        AuditCommand::Attestation(args) => attestation::make(args).await,
        AuditCommand::CheckAttestation(args) => attestation::check(args),
        AuditCommand::Consistency(args) => consistency::run(args).await,
        AuditCommand::Diff(args) => diff::run(args).await,
        AuditCommand::Report(args) => report::run(args).await,
    }
}
