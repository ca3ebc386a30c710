//! Signs statements with the keys of the ledger.

use std::path::Path;

use daybook_events::attestation::Attestor;
use daybook_store::tlog::{Envelope, KeyRing};
use serde_json::Value;

/// The keys of the ledger, read anew for each signature, so that a rotation is noticed.
#[derive(Debug)]
pub struct LedgerKeys {
    folder: std::path::PathBuf,
    known: KeyRing,
}

impl LedgerKeys {
    /// The keys in a folder, if there are any that can be used.
    pub fn open(folder: &Path) -> Option<Self> {
        let known = KeyRing::open(folder).ok()?;
        Some(Self {
            folder: folder.to_owned(),
            known,
        })
    }
}

impl Attestor for LedgerKeys {
    fn origin(&self) -> String {
        self.known.origin().to_owned()
    }

    fn seal(&self, payload_type: &str, payload: &[u8]) -> Value {
        let now = KeyRing::open(&self.folder);
        let keys = now.as_ref().unwrap_or(&self.known);
        let envelope = Envelope::sign(payload_type, payload, keys.signers());
        // Texts in a list can be written.
        serde_json::to_value(envelope).unwrap_or_default()
    }
}
