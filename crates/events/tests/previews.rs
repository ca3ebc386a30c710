//! Deliveries about a pull request, in every order.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use daybook_events::aggregate::{At, Decision};
use daybook_events::environment::{self, Environment, EnvironmentEvent, EnvironmentSpec};
use daybook_events::environment::{DeletionRequested, EnvironmentStatus};
use daybook_events::preview::{self, Action, Seen};
use daybook_events::testing::{samples, time};
use daybook_events::{Aggregate, CommitId, EventId, Position};
use proptest::prelude::*;
use uuid::Uuid;

/// Folds what is decided.
#[derive(Default)]
struct Folded {
    state: Option<Environment>,
    position: u64,
}

impl Folded {
    fn apply(&mut self, event: EnvironmentEvent) {
        self.position += 1;
        let at = At {
            position: Position(self.position),
            id: EventId(Uuid::from_u128(u128::from(self.position))),
            time: time(self.position),
            trace: None,
        };
        match &mut self.state {
            Some(state) => state.apply(event, at).unwrap(),
            none => *none = Some(Environment::first(event, at).unwrap()),
        }
    }

    /// What a delivery comes to: whether it is an event, or the code of its refusal.
    fn see(&mut self, seen: Seen) -> Result<bool, &'static str> {
        match preview::decide(self.state.as_ref(), seen) {
            Ok(Decision::Append(event)) => {
                self.apply(event);
                Ok(true)
            }
            Ok(Decision::Nothing) => Ok(false),
            Err(refusal) => {
                assert!(preview::IGNORED.contains(&refusal.code), "{refusal}");
                Err(refusal.code)
            }
        }
    }

    fn status(&self) -> Option<EnvironmentStatus> {
        self.state.as_ref().map(|s| s.status)
    }

    /// What the workers do when nothing is left of an environment, and what follows.
    fn settle(&mut self) {
        let Some(state) = &self.state else { return };
        if state.status == EnvironmentStatus::Deleting {
            self.apply(EnvironmentEvent::Deleted(environment::Deleted {
                commit: None,
            }));
        }
        let state = self.state.as_ref().unwrap();
        let preview = state.preview.as_ref();
        let wanted = preview.is_some_and(|p| p.open && !p.dismissed);
        if state.status == EnvironmentStatus::Deleted && wanted {
            let event = EnvironmentEvent::Created(environment::Created {
                project: state.project.clone(),
                name: state.name.clone(),
                spec: preview.unwrap().spec.clone(),
                from: None,
                auto_deploy: None,
            });
            self.apply(event);
        }
    }

    /// What there is in the end: the environment with its head, or none.
    fn end(&mut self) -> Option<CommitId> {
        self.settle();
        let state = self.state.as_ref()?;
        let preview = state.preview.as_ref()?;
        assert_eq!(preview.open, state.status == EnvironmentStatus::Active);
        assert!(preview.rivals.is_empty(), "each second has one head here");
        preview.open.then(|| preview.pull_request.head.clone())
    }
}

fn seen(action: Action, head: u64, second: u64) -> Seen {
    let mut pull_request = samples::pull_request(142, head);
    pull_request.updated_at = time(second);
    Seen {
        project: "shop".parse().unwrap(),
        name: "pr-142".parse().unwrap(),
        spec: EnvironmentSpec {
            ephemeral: true,
            ..EnvironmentSpec::default()
        },
        from: None,
        pull_request,
        action,
        open: action != Action::Closed,
    }
}

/// What may happen to a pull request, one second after the other.
fn life() -> impl Strategy<Value = Vec<Seen>> {
    prop::collection::vec((any::<bool>(), 0..4_u64), 0..7).prop_map(|steps| {
        let mut open = true;
        let mut head = 1;
        let mut all = vec![seen(Action::Opened, head, 1)];
        for (second, (toggle, next)) in (2..).zip(steps) {
            let action = match (open, toggle) {
                (true, true) => Action::Closed,
                (false, _) => Action::Reopened,
                (true, false) => {
                    head = next;
                    Action::Updated
                }
            };
            open = action != Action::Closed;
            all.push(seen(action, head, second));
        }
        all
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Late, twice and in any order, with the workers in between or not: what is there in the end
    /// is what was last.
    #[test]
    fn in_whatever_order_they_come_the_last_state_is_what_counts(
        life in life(),
        order in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 0..30),
    ) {
        let last = life.last().unwrap();
        let expected = last.open.then(|| last.pull_request.head.clone());
        let mut folded = Folded::default();
        let mut newest = 0;
        for (index, settles) in &order {
            let delivery = index.get(&life).clone();
            let at = delivery.pull_request.updated_at;
            let outcome = folded.see(delivery.clone());
            // An older one never changes anything, a newer one always does.
            let second = u64::try_from(at.as_second() - time(0).as_second()).unwrap();
            prop_assert_eq!(outcome == Ok(true), second > newest);
            newest = newest.max(second);
            if *settles {
                folded.settle();
            }
        }
        // Each of them has come once at least.
        for delivery in life.iter().rev() {
            let _ = folded.see(delivery.clone());
        }
        prop_assert_eq!(folded.end(), expected);
    }
}

#[test]
fn every_order_of_open_push_close_and_reopen_ends_the_same() {
    let all = [
        seen(Action::Opened, 1, 1),
        seen(Action::Updated, 2, 2),
        seen(Action::Closed, 2, 3),
        seen(Action::Reopened, 2, 4),
        seen(Action::Updated, 3, 5),
    ];
    for upto in 1..=all.len() {
        let last = &all[upto - 1];
        let expected = last.open.then(|| last.pull_request.head.clone());
        let mut orders = vec![vec![]];
        for _ in 0..upto {
            orders = orders
                .into_iter()
                .flat_map(|order: Vec<usize>| {
                    (0..upto)
                        .filter(|i| !order.contains(i))
                        .map(|i| [order.clone(), vec![i]].concat())
                        .collect::<Vec<_>>()
                })
                .collect();
        }
        for order in orders {
            for settles in [false, true] {
                let mut folded = Folded::default();
                for i in &order {
                    let _ = folded.see(all[*i].clone());
                    if settles {
                        folded.settle();
                    }
                }
                assert_eq!(folded.end(), expected, "{order:?}");
            }
        }
    }
}

#[test]
fn within_one_second_a_close_stands_but_against_a_reopening() {
    let mut folded = Folded::default();
    assert_eq!(folded.see(seen(Action::Opened, 1, 1)), Ok(true));
    assert_eq!(folded.see(seen(Action::Closed, 1, 1)), Ok(true));
    assert_eq!(
        folded.see(seen(Action::Updated, 2, 1)),
        Err("stale_delivery")
    );
    assert_eq!(
        folded.see(seen(Action::Opened, 1, 1)),
        Err("stale_delivery")
    );
    assert_eq!(folded.see(seen(Action::Closed, 1, 1)), Ok(false));
    assert_eq!(folded.see(seen(Action::Reopened, 1, 1)), Ok(true));
    assert_eq!(folded.see(seen(Action::Closed, 1, 1)), Ok(true));
    assert_eq!(folded.end(), None);
}

#[test]
fn of_two_heads_of_one_second_the_one_counts_that_names_the_other() {
    let follows = |head: u64, before: u64| {
        let mut delivery = seen(Action::Updated, head, 1);
        delivery.pull_request.before = Some(samples::commit(before));
        delivery
    };
    let mut folded = Folded::default();
    folded.see(seen(Action::Opened, 1, 1)).unwrap();
    assert_eq!(folded.see(follows(2, 1)), Ok(true));
    assert_eq!(
        folded.see(seen(Action::Opened, 1, 1)),
        Err("stale_delivery")
    );
    assert_eq!(folded.end(), Some(samples::commit(2)));

    // The other way round.
    let mut folded = Folded::default();
    folded.see(follows(2, 1)).unwrap();
    assert_eq!(
        folded.see(seen(Action::Opened, 1, 1)),
        Err("stale_delivery")
    );
    assert_eq!(folded.end(), Some(samples::commit(2)));
}

#[test]
fn heads_that_do_not_name_each_other_wait_until_somebody_has_asked() {
    let mut folded = Folded::default();
    folded.see(seen(Action::Opened, 1, 1)).unwrap();
    assert_eq!(folded.see(seen(Action::Updated, 2, 1)), Ok(true));
    let preview = folded.state.as_ref().unwrap().preview.clone().unwrap();
    assert_eq!(preview.rivals, [samples::commit(1)]);
    assert_eq!(folded.see(seen(Action::Updated, 1, 1)), Ok(false));
    let found = EnvironmentEvent::PullRequestHeadFound(preview::PullRequestHeadFound {
        head: samples::commit(1),
        reason: "refs/pull/142/head leads to it".into(),
    });
    let decided = environment::decide(folded.state.as_ref(), found.clone()).unwrap();
    assert_eq!(decided, Decision::Append(found.clone()));
    folded.apply(found.clone());
    assert_eq!(folded.end(), Some(samples::commit(1)));
    // Asked again, it is known.
    let again = environment::decide(folded.state.as_ref(), found).unwrap();
    assert_eq!(again, Decision::Nothing);
}

#[test]
fn an_environment_deleted_by_hand_stays_so_until_the_pull_request_is_reopened() {
    let mut folded = Folded::default();
    folded.see(seen(Action::Opened, 1, 1)).unwrap();
    folded.apply(EnvironmentEvent::DeletionRequested(DeletionRequested {
        reason: None,
    }));
    folded.settle();
    assert_eq!(folded.status(), Some(EnvironmentStatus::Deleted));
    folded.see(seen(Action::Updated, 2, 2)).unwrap();
    folded.settle();
    assert_eq!(folded.status(), Some(EnvironmentStatus::Deleted));
    folded.see(seen(Action::Closed, 2, 3)).unwrap();
    folded.see(seen(Action::Reopened, 2, 4)).unwrap();
    assert_eq!(folded.end(), Some(samples::commit(2)));
}

#[test]
fn what_is_not_its_own_is_left_alone() {
    let mut folded = Folded::default();
    folded.see(seen(Action::Opened, 1, 1)).unwrap();
    let mut other = seen(Action::Closed, 1, 2);
    other.pull_request.repository = "git.example.com/shop/web".into();
    assert_eq!(folded.see(other), Err("other_pull_request"));

    let mut folded = Folded::default();
    folded.apply(EnvironmentEvent::Created(environment::Created {
        project: "shop".parse().unwrap(),
        name: "pr-142".parse().unwrap(),
        spec: EnvironmentSpec::default(),
        from: None,
        auto_deploy: None,
    }));
    for action in [Action::Opened, Action::Updated, Action::Closed] {
        assert_eq!(folded.see(seen(action, 1, 1)), Err("environment_taken"));
    }
}
