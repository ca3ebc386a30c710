//! For how long a subscription is this process's.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The time since some moment, on a clock that also runs while the machine sleeps: a laptop or a
/// virtual machine that was suspended finds that its leases have ended.
#[cfg(target_os = "linux")]
pub(super) fn now() -> Duration {
    use rustix::time::{ClockId, clock_gettime};
    let time = clock_gettime(ClockId::Boottime);
    Duration::try_from(time).unwrap_or_default()
}

/// The time since some moment.
#[cfg(not(target_os = "linux"))]
pub(super) fn now() -> Duration {
    static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    START.get_or_init(std::time::Instant::now).elapsed()
}

/// The right to send, which ends by itself unless it is renewed. A process that was stopped for a
/// while, and does not know it, finds that it has ended.
#[derive(Debug, Clone)]
pub(super) struct Lease {
    renewed: Arc<Mutex<Duration>>,
    valid: Duration,
}

impl Lease {
    /// A lease that others may take over after `length` from now. It ends a little before that.
    pub(super) fn new(length: Duration) -> Self {
        Self {
            renewed: Arc::new(Mutex::new(now())),
            valid: length.mul_f64(0.8),
        }
    }

    /// Renews it, by what was asked for at the given time: how long the answer took does not
    /// lengthen it.
    pub(super) fn renew(&self, asked: Duration) {
        let mut renewed = self.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        *renewed = asked.max(*renewed);
    }

    /// Whether it is still this process's.
    pub(super) fn holds(&self) -> bool {
        self.holds_at(now())
    }

    fn holds_at(&self, now: Duration) -> bool {
        let renewed = *self.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        now.saturating_sub(renewed) < self.valid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_that_nobody_renews_has_ended() {
        let lease = Lease::new(Duration::from_secs(100));
        let began = now();
        assert!(lease.holds());
        let ended = Lease::new(Duration::ZERO);
        assert!(!ended.holds());
        assert!(!lease.holds_at(began + Duration::from_secs(90)));
        // It counts from the question, however late the answer comes.
        lease.renew(began + Duration::from_secs(50));
        assert!(lease.holds_at(began + Duration::from_secs(129)));
        assert!(!lease.holds_at(began + Duration::from_secs(131)));
        // An older answer that comes late shortens nothing.
        lease.renew(began + Duration::from_secs(10));
        assert!(lease.holds_at(began + Duration::from_secs(129)));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn its_clock_runs_while_the_machine_sleeps() {
        let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
        let uptime: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
        let off = (now().as_secs_f64() - uptime).abs();
        assert!(off < 5.0, "{off} s from the time since the machine started");
    }
}
