//! Trouble that lasts: told when it begins, changes and ends, and looked at ever more rarely.

use std::time::Duration;

const SHORTEST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(8);

/// What keeps a loop from its work, as far as people were told of it.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    why: Option<String>,
    /// How often it was met since it began.
    times: u32,
}

impl Trouble {
    /// It is there, or still there. Says whether people have not heard of it yet.
    pub(super) fn met(&mut self, why: &str) -> bool {
        self.times = self.times.saturating_add(1);
        let news = self.why.as_deref() != Some(why);
        if news {
            self.why = Some(why.to_owned());
        }
        news
    }

    /// It is not there. Says whether people think that it is.
    pub(super) fn over(&mut self) -> bool {
        self.times = 0;
        self.why.take().is_some()
    }

    /// How long to wait before it is worth another try: half a second at first, and twice as long
    /// each time, up to eight seconds.
    pub(super) fn pause(&self) -> Duration {
        let doublings = self.times.saturating_sub(1).min(8);
        (SHORTEST * (1 << doublings)).min(LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_change_is_told_once() {
        let mut trouble = Trouble::default();
        assert!(!trouble.over());
        let told: Vec<bool> = ["a", "a", "b", "b", "a"].map(|w| trouble.met(w)).to_vec();
        assert_eq!(told, [true, false, true, false, true]);
        assert!(trouble.over());
        assert!(!trouble.over());
        assert!(trouble.met("a"));
    }

    #[test]
    fn pauses_grow_to_a_bound_and_begin_anew() {
        let mut trouble = Trouble::default();
        let mut pauses = Vec::new();
        for _ in 0..40 {
            trouble.met("a");
            pauses.push(trouble.pause().as_millis());
        }
        assert_eq!(pauses[..6], [500, 1000, 2000, 4000, 8000, 8000]);
        assert_eq!(pauses[39], 8000);
        trouble.over();
        assert_eq!(trouble.pause(), SHORTEST);
    }
}
