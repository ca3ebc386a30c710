//! Who goes next where more deployments wait for build capacity than there is.
//!
//! Production goes first, with a bound so that nobody starves: whoever was overtaken
//! [`OVERTAKEN_MAX`] times, or has waited for [`WAIT_MAX`], goes next. The order follows from the
//! ledger alone, so that whoever admits and whoever shows the queue agree on it.

use std::time::Duration;

use jiff::Timestamp;

use crate::aggregate::Refusal;
use crate::log::Position;
use crate::names::{DeploymentId, EnvironmentName};

/// So often one that waits is overtaken, and then no more.
pub const OVERTAKEN_MAX: usize = 5;

/// Whoever has waited for so long is overtaken no more.
pub const WAIT_MAX: Duration = Duration::from_secs(600);

/// The code of the refusal to overtake one that was overtaken [`OVERTAKEN_MAX`] times.
pub const ENOUGH: &str = "overtaken_enough";

/// A deployment that waits for build capacity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// The deployment.
    pub id: DeploymentId,
    /// Position of its request.
    pub created: Position,
    /// Since when it waits.
    pub since: Timestamp,
    /// Whether it goes to production.
    pub production: bool,
    /// How often others were admitted before it that came later.
    pub overtaken: usize,
}

/// Whether deployments to an environment go first: to the live one, and to one that is called
/// `production`.
pub fn goes_first(environment: &EnvironmentName, live: bool) -> bool {
    live || environment.as_str() == "production"
}

/// Which of those that wait goes next.
pub fn next(waiting: &[Waiting], now: Timestamp) -> Option<&Waiting> {
    let first = |fits: &dyn Fn(&Waiting) -> bool| {
        let fitting = waiting.iter().filter(|w| fits(w));
        fitting.min_by_key(|w| w.created)
    };
    let waited = |w: &Waiting| Duration::try_from(now.duration_since(w.since)).unwrap_or_default();
    first(&|w| w.overtaken >= OVERTAKEN_MAX || waited(w) >= WAIT_MAX)
        .or_else(|| first(&|w| w.production))
        .or_else(|| first(&|_| true))
}

/// Somebody's turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// Who goes next.
    pub next: Waiting,
    /// Who came first of all, if that is somebody else: only that one counts as overtaken. Whoever
    /// stands behind it is overtaken once it stands first.
    pub overtaken: Option<DeploymentId>,
}

/// Takes the one that goes next out of those that wait.
pub fn take_next(waiting: &mut Vec<Waiting>, now: Timestamp) -> Option<Turn> {
    let next = next(waiting, now)?.id;
    let first = waiting.iter().min_by_key(|w| w.created)?.id;
    let next = waiting.swap_remove(waiting.iter().position(|w| w.id == next)?);
    let overtaken = waiting.iter_mut().find(|w| w.id == first);
    let overtaken = overtaken.map(|w| {
        w.overtaken += 1;
        w.id
    });
    Some(Turn { next, overtaken })
}

/// In which order those that wait are admitted, if nobody else comes.
pub fn order(mut waiting: Vec<Waiting>, now: Timestamp) -> Vec<Waiting> {
    std::iter::from_fn(|| take_next(&mut waiting, now).map(|turn| turn.next)).collect()
}

/// Refuses to let one more overtake a deployment that was overtaken often enough. Whoever admits
/// asks before, so that the bound holds however many admit at once.
pub(crate) fn check_overtaken(so_often: usize) -> Result<(), Refusal> {
    if so_often < OVERTAKEN_MAX {
        return Ok(());
    }
    Err(Refusal::new(
        ENOUGH,
        format!("it was overtaken {so_often} times"),
        "admit it before any other",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{samples, time};

    fn waiting(number: u64, production: bool) -> Waiting {
        Waiting {
            id: samples::deployment_id(number),
            created: Position(number),
            since: time(0),
            production,
            overtaken: 0,
        }
    }

    fn numbers(order: &[Waiting]) -> Vec<u64> {
        order.iter().map(|w| w.created.0).collect()
    }

    #[test]
    fn production_goes_first_and_nobody_starves() {
        let staging = (1..=3).map(|n| waiting(n, false));
        let production = (4..=20).map(|n| waiting(n, true));
        let all: Vec<_> = staging.chain(production).collect();
        let order = numbers(&order(all.clone(), time(1)));
        assert_eq!(order[..8], [4, 5, 6, 7, 8, 1, 9, 10]);
        // Each that becomes the first is overtaken as often.
        assert_eq!(order.iter().position(|n| *n == 2), Some(11));
        assert_eq!(order.len(), 20);

        // Whoever has waited too long goes before all others.
        let later = time(1).saturating_add(jiff::SignedDuration::try_from(WAIT_MAX).unwrap());
        assert_eq!(next(&all, later.unwrap()).map(|w| w.created.0), Some(1));
    }

    #[test]
    fn nobody_is_overtaken_more_often_than_the_bound_says() {
        // However many to production keep coming, all that came before are admitted.
        let mut waiting: Vec<_> = (1..=4).map(|n| waiting(n, false)).collect();
        let mut overtaken = std::collections::BTreeMap::<_, usize>::new();
        let mut admitted = Vec::new();
        for number in 5..=40 {
            waiting.push(super::tests::waiting(number, true));
            let turn = take_next(&mut waiting, time(1)).unwrap();
            admitted.push(turn.next.created.0);
            if let Some(id) = turn.overtaken {
                *overtaken.entry(id).or_default() += 1;
            }
        }
        let places = [1, 2, 3, 4].map(|n| admitted.iter().position(|a| *a == n));
        assert_eq!(places, [Some(5), Some(11), Some(17), Some(23)]);
        let staging = |n| overtaken.get(&samples::deployment_id(n)).copied();
        assert_eq!([1, 2, 3, 4].map(staging), [Some(OVERTAKEN_MAX); 4]);
    }

    #[test]
    fn without_production_it_is_first_come_first_served() {
        let all: Vec<_> = [3, 1, 2].map(|n| waiting(n, false)).into();
        assert_eq!(numbers(&order(all, time(1))), [1, 2, 3]);
        assert_eq!(next(&[], time(1)), None);
    }
}
