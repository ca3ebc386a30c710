//! When a delivery that was refused is tried again.

use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

/// How long is waited between tries.
#[derive(Debug, Clone)]
pub struct Pace {
    /// After the first try.
    pub first: Duration,
    /// At most, also if the receiver asks for more.
    pub longest: Duration,
}

impl Default for Pace {
    /// A second, two, four, and so on up to an hour: sixteen tries take between two hours and a
    /// half and five.
    fn default() -> Self {
        Self {
            first: Duration::from_secs(1),
            longest: Duration::from_hours(1),
        }
    }
}

impl Pace {
    /// How long is waited after the given try, from 1: twice as long as after the one before, of
    /// which up to the half is left out by chance. `chance` is any number. A receiver that says
    /// when it wants to be asked again is not asked earlier.
    pub fn after(&self, number: u32, asked: Option<Duration>, chance: u32) -> Duration {
        let doubled = 2_u32.saturating_pow(number.saturating_sub(1).min(31));
        let full = self.first.saturating_mul(doubled).min(self.longest);
        let share = f64::from(chance) / f64::from(u32::MAX);
        let drawn = full.mul_f64(1.0 - share / 2.0);
        drawn.max(asked.unwrap_or_default()).min(self.longest)
    }
}

/// A random number.
pub(super) fn chance() -> u32 {
    let (number, ..) = Uuid::new_v4().as_fields();
    number
}

/// What a `Retry-After` header asks for: seconds, or a time.
pub(super) fn retry_after(value: &str, now: Timestamp) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<u32>() {
        return Some(Duration::from_secs(seconds.into()));
    }
    let at = jiff::fmt::rfc2822::parse(value).ok()?.timestamp();
    let seconds = at.as_second().saturating_sub(now.as_second());
    Some(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_a_bound_and_lose_at_most_a_half() {
        let pace = Pace::default();
        let seconds = |number, chance| pace.after(number, None, chance).as_secs_f64();
        assert_eq!(seconds(1, 0), 1.0);
        assert_eq!(seconds(1, u32::MAX), 0.5);
        assert_eq!(seconds(4, 0), 8.0);
        assert_eq!(seconds(40, 0), 3600.0);
        assert_eq!(seconds(u32::MAX, u32::MAX), 1800.0);
    }

    #[test]
    fn a_receiver_that_names_a_time_is_not_asked_earlier_but_not_after_the_bound() {
        let pace = Pace::default();
        let asked = |s| Some(Duration::from_secs(s));
        assert_eq!(pace.after(1, asked(30), 0).as_secs(), 30);
        assert_eq!(pace.after(6, asked(30), 0).as_secs(), 32);
        assert_eq!(pace.after(1, asked(1_000_000), 0).as_secs(), 3600);
    }

    #[test]
    fn retry_after_is_seconds_or_a_time() {
        let now: Timestamp = "1994-11-06T08:49:00Z".parse().unwrap();
        let read = |text| retry_after(text, now).map(|d| d.as_secs());
        assert_eq!(read("120"), Some(120));
        assert_eq!(read("Sun, 06 Nov 1994 08:49:37 GMT"), Some(37));
        assert_eq!(read("Sun, 06 Nov 1994 08:48:37 GMT"), Some(0));
        assert_eq!(read("soon"), None);
        assert_eq!(read("-3"), None);
    }
}
