//! `daybook audit attestation` and `daybook audit check-attestation`

use std::path::PathBuf;

use clap::Args;
use daybook_events::attestation::{PAYLOAD, PREDICATE, STATEMENT};
use daybook_store::tlog::Envelope;
use serde_json::{Value, json};

use super::ledger::{TrustArgs, unreadable};
use crate::client::Client;
use crate::commands::{Outcome, ServerArgs, lifecycle};
use crate::exit::{Code, Failure};
use crate::output;

/// Print the signed in-toto attestation of a deployment that succeeded.
#[derive(Debug, Args)]
pub struct AttestationArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The deployment: its id, or at least the first or last four digits of it.
    deployment: String,
    /// The file that it is written to.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Check an attestation, with nothing but the attestation and a key.
#[derive(Debug, Args)]
pub struct CheckAttestationArgs {
    /// The attestation.
    file: PathBuf,
    #[command(flatten)]
    trust: TrustArgs,
}

pub async fn make(args: AttestationArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let id = lifecycle::find(&client, &args.deployment).await?;
    let envelope: Value = client
        .get(&format!("/api/v1/deployments/{id}/attestation"), &[])
        .await?;
    let text = format!("{envelope:#}\n");
    match args.out {
        None => output::line(text.trim_end()),
        Some(path) => {
            std::fs::write(&path, text).map_err(|e| {
                let message = format!("{} cannot be written: {e}", path.display());
                Failure::new(Code::Failure, "not_written", message)
            })?;
            output::line(&format!(
                "check it with `daybook audit check-attestation {}`",
                path.display()
            ));
        }
    }
    Ok(Code::Success)
}

fn broken(message: impl Into<String>) -> Failure {
    Failure::new(Code::Mismatch, "attestation_broken", message).hint(
        "ask for it again, and compare the key with what the operator tells you by another way",
    )
}

pub fn check(args: CheckAttestationArgs) -> Outcome {
    let bytes = std::fs::read(&args.file).map_err(|e| unreadable(&args.file, &e))?;
    let envelope: Envelope = serde_json::from_slice(&bytes)
        .map_err(|e| broken(format!("the file is no signed envelope: {e}")))?;
    let keys = args.trust.named()?;
    if keys.is_empty() {
        return Err(Failure::new(
            Code::Usage,
            "key_missing",
            "there is no key to check the attestation with",
        )
        .hint("name the ledger's key with --key; `daybook keys show` prints it"));
    }
    let (payload, by) = envelope
        .verify(PAYLOAD, &keys)
        .map_err(|e| broken(e.to_string()))?;
    let statement: Value = serde_json::from_slice(&payload)
        .map_err(|e| broken(format!("what is signed is no statement: {e}")))?;
    for (field, wanted) in [("_type", STATEMENT), ("predicateType", PREDICATE)] {
        if statement[field] != wanted {
            return Err(broken(format!("its {field} is not {wanted}")));
        }
    }
    let origin = by[0].name();
    if statement["predicate"]["ledger"]["origin"] != origin {
        return Err(broken(format!("it is not about the ledger {origin}")));
    }
    if output::is_json() {
        output::json(&json!({ "verdict": "holds", "statement": statement }));
        return Ok(Code::Success);
    }
    let said = &statement["predicate"];
    let word = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    output::line(&format!(
        "deployment {} of {}.{}.{} succeeded at {}",
        word(&said["deployment"]),
        word(&said["target"]["project"]),
        word(&said["target"]["environment"]),
        word(&said["target"]["service"]),
        word(&said["succeededAt"]),
    ));
    for subject in statement["subject"].as_array().into_iter().flatten() {
        output::line(&format!(
            "  {} {}",
            word(&subject["name"]),
            subject["digest"]
        ));
    }
    let style = output::style();
    output::line(&style.good(&format!(
        "the attestation holds: {origin} signed it, and it is event {} of its ledger",
        said["ledger"]["position"]
    )));
    Ok(Code::Success)
}
