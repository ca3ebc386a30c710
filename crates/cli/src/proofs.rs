//! Proofs for events that are sent, from the published tree.

use std::sync::Arc;

use async_trait::async_trait;
use daybook_events::with_causes;
use daybook_events::{Position, PublishedTree};
use daybook_store::tlog::{Published, TreeReader};
use daybook_workers::notify::Proofs;

/// Makes proofs against the newest signed head.
#[derive(Debug)]
pub struct TreeProofs(pub Arc<dyn PublishedTree>);

#[async_trait]
impl Proofs for TreeProofs {
    async fn proof(&self, position: Position) -> Result<Option<String>, String> {
        let Some(signed) = self.0.head().filter(|s| position.0 <= s.head.size) else {
            return Ok(None);
        };
        let Some(index) = position.0.checked_sub(1) else {
            return Ok(None);
        };
        let tiles = Published(self.0.clone());
        let tree = TreeReader::new(&tiles, signed.head.size);
        let proof = tree.proof_file(index, signed.note).await;
        match proof {
            Ok(proof) => Ok(Some(proof.to_string())),
            Err(e) => Err(with_causes(&e)),
        }
    }
}
