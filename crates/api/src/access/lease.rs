//! Streams end with the credential that they were opened with.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::StatusCode;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::control::AccessControl;
use super::limits::Caller;
use super::principal::Principal;
use crate::problem::Problem;

/// How often the credentials of open streams are looked at.
const EVERY: Duration = Duration::from_millis(500);

/// The streams that depend on a credential.
#[derive(Debug, Default)]
pub(super) struct Leases(Mutex<Open>);

#[derive(Debug, Default)]
struct Open {
    last: u64,
    streams: HashMap<u64, (Principal, CancellationToken)>,
    /// How many each caller has.
    of: HashMap<Caller, usize>,
}

/// A caller has as many streams open as one may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this caller has {0} streams open, which is as many as one may have")]
pub struct TooManyStreams(usize);

impl From<TooManyStreams> for Problem {
    fn from(e: TooManyStreams) -> Self {
        Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            "too_many_streams",
            e.to_string(),
            "close some, or use a token for each program; --stream-limit of the server says how \
             many there may be",
        )
        .retry_after(5)
    }
}

/// How long a stream may go on: until the server ends, or the credential it was opened with does.
/// Kept for as long as the stream is open.
#[derive(Debug)]
pub struct Lease {
    ended: CancellationToken,
    kept: Option<(Arc<Leases>, u64, Caller)>,
}

impl Lease {
    /// Is cancelled when the stream must end.
    pub fn ended(&self) -> &CancellationToken {
        &self.ended
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some((leases, number, caller)) = &self.kept {
            let mut open = leases.0.lock().unwrap_or_else(PoisonError::into_inner);
            open.streams.remove(number);
            if let Some(count) = open.of.get_mut(caller) {
                *count -= 1;
                if *count == 0 {
                    open.of.remove(caller);
                }
            }
        }
    }
}

impl AccessControl {
    /// Lets a principal have a stream, if it does not have as many as one may have. `server` ends it
    /// with the server.
    pub fn stream(
        &self,
        principal: &Principal,
        server: &CancellationToken,
    ) -> Result<Lease, TooManyStreams> {
        self.open(principal, server, self.streams_max)
    }

    /// Lets a principal have a stream that it cannot be refused any more: one that is open, and is
    /// its from here on.
    pub fn lease(&self, principal: &Principal, server: &CancellationToken) -> Lease {
        let ended = server.child_token();
        let opened = self.open(principal, server, None);
        opened.unwrap_or(Lease { ended, kept: None })
    }

    fn open(
        &self,
        principal: &Principal,
        server: &CancellationToken,
        most: Option<NonZeroUsize>,
    ) -> Result<Lease, TooManyStreams> {
        let ended = server.child_token();
        let Some(caller) = Caller::of(principal) else {
            return Ok(Lease { ended, kept: None });
        };
        let mut open = self.leases.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.of.get(&caller).copied().unwrap_or_default();
        if let Some(most) = most
            && count >= most.get()
        {
            return Err(TooManyStreams(count));
        }
        open.of.insert(caller.clone(), count + 1);
        open.last += 1;
        let number = open.last;
        open.streams
            .insert(number, (principal.clone(), ended.clone()));
        Ok(Lease {
            ended,
            kept: Some((self.leases.clone(), number, caller)),
        })
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
