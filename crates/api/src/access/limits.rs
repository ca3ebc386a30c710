//! How often somebody may ask.
//!
//! Each caller has a bucket that fills at a steady rate and holds some requests in reserve (GCRA:
//! one moment of time a caller). What is remembered has a bound: a crowd of callers shares a bucket.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::principal::{Credential, Principal};

/// Most callers that are remembered one by one.
const CALLERS_MAX: usize = 10_000;

/// Requests of one caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// How many a second, in the long run.
    pub per_second: NonZeroU32,
    /// How many at once, after some quiet.
    pub burst: NonZeroU32,
}

impl Rate {
    /// A rate, with two seconds of it at once.
    pub fn per_second(per_second: NonZeroU32) -> Self {
        Self {
            per_second,
            burst: per_second.saturating_mul(NonZeroU32::MIN.saturating_add(1)),
        }
    }

    fn interval(self) -> Duration {
        Duration::from_secs(1) / self.per_second.get()
    }
}

/// Where a connection comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer(pub(crate) IpAddr);

/// Who a bucket is of.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Caller {
    /// A token, by its id.
    Token(String),
    /// A user of an identity provider.
    User(String),
    /// Whoever fails to say who they are, from an address.
    Stranger(Option<IpAddr>),
}

impl Caller {
    /// Whose bucket a principal's requests are taken from; none where nobody is told apart.
    pub(super) fn of(principal: &Principal) -> Option<Self> {
        match principal.credential() {
            Credential::None => None,
            Credential::Token(id, _) => Some(Self::Token(id.to_string())),
            Credential::Vouched(_) => principal.actor().map(|a| Self::User(a.id.clone())),
        }
    }
}

/// The buckets of all callers.
#[derive(Debug)]
pub(super) struct Buckets<K> {
    rate: Rate,
    /// When each bucket is full again; and for those that find no place, the last.
    full_at: Mutex<(HashMap<K, Instant>, Option<Instant>)>,
}

impl<K: Eq + Hash> Buckets<K> {
    pub(super) fn new(rate: Rate) -> Self {
        Self {
            rate,
            full_at: Mutex::default(),
        }
    }

    /// Takes one request out of a bucket, or says how long it takes until there is one.
    pub(super) fn take(&self, caller: K, now: Instant) -> Result<(), Duration> {
        let interval = self.rate.interval();
        let reserve = interval * self.rate.burst.get();
        let mut kept = self.full_at.lock().unwrap_or_else(PoisonError::into_inner);
        let (callers, others) = &mut *kept;
        if callers.len() >= CALLERS_MAX && !callers.contains_key(&caller) {
            callers.retain(|_, full_at| *full_at > now);
        }
        let full_at = if callers.len() >= CALLERS_MAX && !callers.contains_key(&caller) {
            others.get_or_insert(now)
        } else {
            callers.entry(caller).or_insert(now)
        };
        let next = (*full_at).max(now) + interval;
        let wait = next.saturating_duration_since(now + reserve);
        if wait.is_zero() {
            *full_at = next;
            Ok(())
        } else {
            Err(wait)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(per_second: u32, burst: u32) -> Rate {
        Rate {
            per_second: per_second.try_into().unwrap(),
            burst: burst.try_into().unwrap(),
        }
    }

    #[test]
    fn a_burst_is_let_through_and_then_the_rate() {
        let buckets = Buckets::new(rate(10, 5));
        let start = Instant::now();
        for _ in 0..5 {
            buckets.take("a", start).unwrap();
        }
        let wait = buckets.take("a", start).unwrap_err();
        assert_eq!(wait, Duration::from_millis(100));
        // Others do not wait for it, and being refused costs nothing.
        buckets.take("b", start).unwrap();
        let later = start + Duration::from_millis(100);
        buckets.take("a", later).unwrap();
        buckets.take("a", later).unwrap_err();
        // After some quiet there is a burst again, and no more than one.
        let much_later = start + Duration::from_secs(60);
        for _ in 0..5 {
            buckets.take("a", much_later).unwrap();
        }
        buckets.take("a", much_later).unwrap_err();
    }

    #[test]
    fn a_crowd_takes_no_memory_beyond_a_bound() {
        let buckets = Buckets::new(rate(1, 2));
        let now = Instant::now();
        for caller in 0..CALLERS_MAX {
            buckets.take(caller, now).unwrap();
        }
        let more = CALLERS_MAX..CALLERS_MAX + 3;
        let taken: Vec<_> = more.map(|c| buckets.take(c, now).is_ok()).collect();
        assert_eq!(taken, [true, true, false]);
        // The first ones are forgotten once their buckets are full.
        let later = now + Duration::from_secs(5);
        buckets.take(usize::MAX, later).unwrap();
        let kept = buckets.full_at.lock().unwrap();
        assert_eq!(kept.0.len(), 1);
    }
}
