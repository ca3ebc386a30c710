//! Where a deployment answers on a cluster, and how fast.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use arc_swap::ArcSwap;

/// Where a deployment answers on a cluster. Shared by all routes that lead there.
#[derive(Debug)]
pub(super) struct Endpoint {
    known: ArcSwap<Known>,
    turn: AtomicUsize,
    latency: Latency,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) why_none: String,
}

impl Default for Endpoint {
    fn default() -> Self {
        Self {
            known: ArcSwap::from_pointee(Known {
                addresses: Vec::new(),
                why_none: "nothing is known of it on this cluster yet".into(),
            }),
            turn: AtomicUsize::new(0),
            latency: Latency::default(),
        }
    }
}

impl Endpoint {
    /// All addresses, each call starting with another one.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        let known = self.known.load();
        let mut addresses = known.addresses.clone();
        if addresses.len() > 1 {
            let turn = self.turn.fetch_add(1, Relaxed) % addresses.len();
            addresses.rotate_left(turn);
        }
        addresses
    }

    /// Whether an instance is ready there.
    pub(super) fn is_ready(&self) -> bool {
        !self.known.load().addresses.is_empty()
    }

    /// Why it has no ready instance, in words.
    pub(super) fn why_none(&self) -> String {
        self.known.load().why_none.clone()
    }

    /// Takes over what is known of it now. Returns the addresses at which nothing is expected any
    /// more. Instances that are all new are measured anew.
    pub(super) fn set(&self, new: Known) -> Vec<SocketAddr> {
        let old = self.known.load_full();
        if *old == new {
            return Vec::new();
        }
        let (stay, gone): (Vec<_>, Vec<_>) = old
            .addresses
            .iter()
            .copied()
            .partition(|a| new.addresses.contains(a));
        if stay.is_empty() {
            self.latency.forget();
        }
        self.known.store(Arc::new(new));
        gone
    }

    /// Notes how long an answer took to begin, with the connection if one had to be made.
    pub(super) fn answered_after(&self, time: Duration) {
        self.latency.note(time);
    }

    /// How long answers take to begin, in microseconds; none before the first one.
    pub(super) fn latency(&self) -> Option<u64> {
        self.latency.micros()
    }
}

/// A moving average in which each answer weighs an eighth, in microseconds. 0 stands for nothing
/// yet. Two answers at once may count as one: nobody decides anything by a single answer.
#[derive(Debug, Default)]
struct Latency(AtomicU64);

impl Latency {
    fn note(&self, time: Duration) {
        let new = u64::try_from(time.as_micros())
            .unwrap_or(u64::MAX)
            .clamp(1, 1 << 40);
        let old = self.0.load(Relaxed);
        let average = match old {
            0 => new,
            old => (old * 7 + new).div_ceil(8),
        };
        self.0.store(average, Relaxed);
    }

    fn micros(&self) -> Option<u64> {
        Some(self.0.load(Relaxed)).filter(|micros| *micros > 0)
    }

    fn forget(&self) {
        self.0.store(0, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_follows_what_is_measured_and_forgets_instances_that_are_gone() {
        let endpoint = Endpoint::default();
        assert_eq!(endpoint.latency(), None);
        let known = |port| Known {
            addresses: vec![SocketAddr::from(([127, 0, 0, 1], port))],
            why_none: String::new(),
        };
        assert!(endpoint.set(known(1)).is_empty());
        endpoint.answered_after(Duration::from_millis(8));
        assert_eq!(endpoint.latency(), Some(8_000));
        for _ in 0..100 {
            endpoint.answered_after(Duration::from_millis(1));
        }
        let settled = endpoint.latency().unwrap();
        assert!((1_000..1_010).contains(&settled), "{settled}");
        assert_eq!(endpoint.set(known(2)), known(1).addresses);
        assert_eq!(endpoint.latency(), None);
    }
}
