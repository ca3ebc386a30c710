//! Streams end with the credential that they were opened with.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::control::AccessControl;
use super::principal::{Credential, Principal};

/// How often the credentials of open streams are looked at.
const EVERY: Duration = Duration::from_millis(500);

/// The streams that depend on a credential.
#[derive(Debug, Default)]
pub(super) struct Leases(Mutex<Open>);

#[derive(Debug, Default)]
struct Open {
    last: u64,
    streams: HashMap<u64, (Principal, CancellationToken)>,
}

/// How long a stream may go on: until the server ends, or the credential it was opened with does.
/// Kept for as long as the stream is open.
#[derive(Debug)]
pub struct Lease {
    ended: CancellationToken,
    kept: Option<(Arc<Leases>, u64)>,
}

impl Lease {
    /// Is cancelled when the stream must end.
    pub fn ended(&self) -> &CancellationToken {
        &self.ended
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some((leases, number)) = &self.kept {
            let mut open = leases.0.lock().unwrap_or_else(PoisonError::into_inner);
            open.streams.remove(number);
        }
    }
}

impl AccessControl {
    /// Lets a principal have a stream. `server` ends it with the server.
    pub fn lease(&self, principal: &Principal, server: &CancellationToken) -> Lease {
        let ended = server.child_token();
        if *principal.credential() == Credential::None {
            return Lease { ended, kept: None };
        }
        let mut open = self.leases.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.last += 1;
        let number = open.last;
        open.streams
            .insert(number, (principal.clone(), ended.clone()));
        Lease {
            ended,
            kept: Some((self.leases.clone(), number)),
        }
    }

    /// Ends streams whose credentials have ended, until it is cancelled itself.
    pub(crate) async fn watch(self, cancel: CancellationToken) {
        let mut tick = tokio::time::interval(EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                _ = tick.tick() => self.look(Timestamp::now()),
            }
        }
    }

    fn look(&self, now: Timestamp) {
        let open: Vec<_> = {
            let open = self.leases.0.lock().unwrap_or_else(PoisonError::into_inner);
            open.streams.values().cloned().collect()
        };
        for (principal, ended) in open {
            if !self.holds(&principal, now) {
                ended.cancel();
            }
        }
    }
}
