//! For how long a subscription is this process's.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The right to send, which ends by itself unless it is renewed. A process that was stopped for a
/// while, and does not know it, finds that it has ended.
#[derive(Debug, Clone)]
pub(super) struct Lease {
    renewed: Arc<Mutex<Instant>>,
    valid: Duration,
}

impl Lease {
    /// A lease that others may take over after `length`. It ends a little before that.
    pub(super) fn new(length: Duration) -> Self {
        Self {
            renewed: Arc::new(Mutex::new(Instant::now())),
            valid: length.mul_f64(0.8),
        }
    }

    /// Renews it.
    pub(super) fn renew(&self) {
        *self.renewed.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Whether it is still this process's.
    pub(super) fn holds(&self) -> bool {
        let renewed = *self.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        renewed.elapsed() < self.valid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_that_nobody_renews_has_ended() {
        let lease = Lease::new(Duration::from_secs(100));
        assert!(lease.holds());
        let ended = Lease::new(Duration::ZERO);
        assert!(!ended.holds());
        let long_ago = Instant::now().checked_sub(Duration::from_secs(90)).unwrap();
        *lease.renewed.lock().unwrap() = long_ago;
        assert!(!lease.holds());
        lease.renew();
        assert!(lease.holds());
    }
}
