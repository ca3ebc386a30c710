//! CDEvents on NATS.

use async_trait::async_trait;
use bytes::Bytes;
use daybook_store::jetstream::JetStreamBulletin;
use daybook_workers::notify::Bulletin;

/// Publishes to a stream beside the log.
#[derive(Debug)]
pub struct NatsBulletin(pub JetStreamBulletin);

#[async_trait]
impl Bulletin for NatsBulletin {
    async fn publish(
        &self,
        place: &str,
        id: &str,
        event: Bytes,
        again: bool,
    ) -> Result<(), String> {
        let published = self.0.publish(place, id, event, again).await;
        published.map_err(|e| e.to_string())
    }
}
