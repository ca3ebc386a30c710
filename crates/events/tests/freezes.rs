//! Freezes: what is decided and folded, in a time that the test makes.

#![allow(clippy::unwrap_used)]

use daybook_events::aggregate::Decision;
use daybook_events::approval::PostReviewCompleted;
use daybook_events::deployment::{Deployment, DeploymentEvent, Operation, decide};
use daybook_events::environment::{self, Environment, EnvironmentEvent};
use daybook_events::freeze::{
    self, Freeze, FreezeOverride, FreezeRemoved, FreezeRule, FreezeSet, Freezes, Held, OneOff,
    ReleaseCause, Released, Verdict, fire, judge,
};
use daybook_events::testing::{Given, given, samples};
use daybook_events::{EventId, Payload};
use jiff::Timestamp;

fn event(name: &str) -> DeploymentEvent {
    let kind = format!("deployment.{name}.v1");
    let mut all = samples::deployment_events(samples::shop(), 1).into_iter();
    all.find(|e| e.kind() == kind).unwrap()
}

fn requested() -> Given<Deployment> {
    given([event("requested")])
}

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn once(from: &str, until: Option<&str>) -> Freeze {
    Freeze {
        rule: FreezeRule::Once(OneOff {
            from: from.parse().unwrap(),
            until: until.map(|u| u.parse().unwrap()),
            zone: "UTC".parse().unwrap(),
        }),
        reason: None,
    }
}

fn windows<const N: usize>(all: [(&str, Freeze); N]) -> Freezes {
    all.map(|(name, freeze)| (name.parse().unwrap(), freeze))
        .into()
}

/// From 10:00 to 12:00, and from 11:00 to 13:00.
fn two() -> Freezes {
    windows([
        ("early", once("2026-12-01T10:00", Some("2026-12-01T12:00"))),
        ("late", once("2026-12-01T11:00", Some("2026-12-01T13:00"))),
    ])
}

/// What is recorded about a deployment at a time.
#[track_caller]
fn recorded(of: &Given<Deployment>, windows: &Freezes, now: &str) -> DeploymentEvent {
    match judge(of.state.as_ref().unwrap(), windows, at(now)) {
        Verdict::Record(event) => *event,
        other => panic!("{other:?} at {now}"),
    }
}

#[track_caller]
fn held(of: Given<Deployment>, windows: &Freezes, now: &str) -> (Held, Given<Deployment>) {
    let event = recorded(&of, windows, now);
    let DeploymentEvent::Held(held) = event.clone() else {
        panic!("{event:?}");
    };
    (held, of.when(|s| decide(s, event.clone())).then(event))
}

fn fired(
    of: &Given<Deployment>,
    w: &Freezes,
    nonce: EventId,
    now: &str,
) -> Option<DeploymentEvent> {
    match fire(of.state.as_ref(), w, nonce, at(now)).unwrap() {
        Decision::Append(event) => Some(event),
        Decision::Nothing => None,
    }
}

#[test]
fn what_is_asked_for_in_a_window_waits_for_its_end_and_no_longer() {
    let of = requested();
    let before = judge(
        of.state.as_ref().unwrap(),
        &two(),
        at("2026-12-01T09:59:59Z"),
    );
    assert_eq!(before, Verdict::Goes);
    let (first, of) = held(of, &two(), "2026-12-01T10:00:00Z");
    assert_eq!(first.freeze.as_str(), "early");
    let state = of.state.as_ref().unwrap();
    assert_eq!(state.due(), Some(at("2026-12-01T12:00:00Z")));
    assert_eq!(
        judge(state, &two(), at("2026-12-01T10:30:00Z")),
        Verdict::Waits
    );
    // Neither is it admitted, nor is it recorded twice.
    let of = of
        .when(|s| decide(s, event("queued")))
        .then_refused("environment_frozen");
    let again = DeploymentEvent::Held(first.clone());
    let of = of.when(|s| decide(s, again)).then_nothing();

    // It is held by whatever window ends last.
    let (second, of) = held(of, &two(), "2026-12-01T11:30:00Z");
    assert_eq!(second.freeze.as_str(), "late");
    assert_ne!(second.nonce, first.nonce);
    assert_eq!(
        fired(&of, &two(), first.nonce, "2026-12-01T12:00:00Z"),
        None
    );
    assert_eq!(
        fired(&of, &two(), second.nonce, "2026-12-01T12:59:59Z"),
        None
    );
    let end = fired(&of, &two(), second.nonce, "2026-12-01T13:00:00Z").unwrap();
    assert!(
        matches!(&end, DeploymentEvent::Released(e) if e.cause == ReleaseCause::Ended),
        "{end:?}"
    );
    let of = of.and(end);
    assert_eq!(of.state.as_ref().unwrap().due(), None);
    assert_eq!(
        fired(&of, &two(), second.nonce, "2026-12-01T13:00:01Z"),
        None
    );
    of.when(|s| decide(s, event("queued")))
        .then(event("queued"));
}

#[test]
fn the_end_of_one_window_may_be_that_of_another() {
    let one = windows([("early", once("2026-12-01T10:00", Some("2026-12-01T12:00")))]);
    let (first, of) = held(requested(), &one, "2026-12-01T10:00:00Z");
    let next = fired(&of, &two(), first.nonce, "2026-12-01T12:00:00Z").unwrap();
    let DeploymentEvent::Held(held) = &next else {
        panic!("{next:?}");
    };
    assert_eq!(held.freeze.as_str(), "late");
    let state = of.state.clone().unwrap();
    let since = state.hold.unwrap().since;
    assert_eq!(of.and(next).state.unwrap().hold.unwrap().since, since);
}

#[test]
fn a_window_that_is_taken_away_lets_go_and_one_that_is_open_ended_holds() {
    let open = windows([("sale", once("2026-12-01T10:00", None))]);
    let (held, of) = held(requested(), &open, "2026-12-01T10:00:00Z");
    assert_eq!((held.until, of.state.as_ref().unwrap().due()), (None, None));
    let event = recorded(&of, &Freezes::new(), "2026-12-01T10:30:00Z");
    let expected = DeploymentEvent::Released(Released {
        freeze: "sale".parse().unwrap(),
        nonce: held.nonce,
        cause: ReleaseCause::Removed,
    });
    assert_eq!(event, expected);
    let of = of.when(|s| decide(s, event.clone())).then(event.clone());
    of.when(|s| decide(s, event)).then_nothing();
}

#[test]
fn what_is_under_way_waits_before_its_commit() {
    let open = windows([("sale", once("2026-12-01T10:00", None))]);
    let packaging = given(["requested", "queued", "image_pinned"].map(event));
    let (_, of) = held(packaging, &open, "2026-12-01T10:00:00Z");
    let of = of
        .when(|s| decide(s, event("deploying_started")))
        .then_refused("environment_frozen");
    // It can be given up, and superseded, like everything that waits.
    of.when(|s| decide(s, event("cancelled"))).then_some();
}

#[test]
fn an_emergency_lets_one_deployment_through_and_is_reviewed_by_somebody_else() {
    let through = |freeze: &str| {
        DeploymentEvent::FreezeOverride(FreezeOverride {
            freeze: freeze.parse().unwrap(),
            by: "carol".to_owned(),
            reason: "the shop is down".to_owned(),
        })
    };
    let review = |reviewer: &str| {
        DeploymentEvent::PostReviewCompleted(PostReviewCompleted {
            reviewer: reviewer.to_owned(),
            reason: None,
        })
    };
    let of = requested()
        .when(|s| decide(s, through("early")))
        .then_refused("not_held");
    let (held, of) = held(of, &two(), "2026-12-01T10:00:00Z");
    let possible = |of: &Given<Deployment>| {
        let operations = of.state.as_ref().unwrap().operations();
        operations.contains(&Operation::OverrideFreeze)
    };
    assert!(possible(&of));
    let of = of
        .when(|s| decide(s, through("late")))
        .then_refused("freeze_changed");
    let of = of
        .when(|s| decide(s, through("early")))
        .then(through("early"));
    assert!(!possible(&of));
    let of = of.when(|s| decide(s, through("early"))).then_nothing();
    // No other window holds it, and no timer does anything to it.
    let state = of.state.as_ref().unwrap();
    assert_eq!(
        judge(state, &two(), at("2026-12-01T11:30:00Z")),
        Verdict::Goes
    );
    assert_eq!(fired(&of, &two(), held.nonce, "2026-12-01T12:00:00Z"), None);
    let of = ["queued", "image_pinned"].map(event).into_iter();
    let of = of.fold(
        requested()
            .and(DeploymentEvent::Held(held))
            .and(through("early")),
        Given::and,
    );
    assert!(of.state.as_ref().unwrap().needs_review());
    let of = of
        .when(|s| decide(s, review("carol")))
        .then_refused("own_change");
    let of = of.when(|s| decide(s, review("bob"))).then(review("bob"));
    assert!(!of.state.as_ref().unwrap().needs_review());
    of.when(|s| decide(s, review("dora"))).then_nothing();
}

#[test]
fn windows_are_set_changed_and_taken_away() {
    let created = samples::environment_events().remove(0);
    let of: Given<Environment> = given([created]);
    let now = at("2026-12-01T10:00:00Z");
    let set = |freeze: Freeze| FreezeSet {
        name: "sale".parse().unwrap(),
        freeze,
    };
    let over = set(once("2026-11-01T10:00", Some("2026-12-01T10:00")));
    let of = of
        .when(|s| freeze::set(s, over, now))
        .then_refused("freeze_over");
    let sale = set(once("2026-11-01T10:00", Some("2026-12-01T10:01")));
    let of = of
        .when(|s| freeze::set(s, sale.clone(), now))
        .then(EnvironmentEvent::FreezeSet(sale.clone()));
    let of = of
        .when(|s| freeze::set(s, sale.clone(), now))
        .then_nothing();
    let told = freeze::refusal(of.state.as_ref().unwrap(), now).unwrap();
    assert_eq!(told.code, "environment_frozen");
    assert!(
        told.message.contains("sale until 2026-12-01 10:01 UTC"),
        "{told}"
    );
    assert!(
        told.remedy
            .contains("daybook freeze remove shop production sale")
    );
    let remove = |name: &str| {
        EnvironmentEvent::FreezeRemoved(FreezeRemoved {
            name: name.parse().unwrap(),
            reason: None,
        })
    };
    let of = of
        .when(|s| environment::decide(s, remove("holidays")))
        .then_refused("freeze_not_found");
    let of = of
        .when(|s| environment::decide(s, remove("sale")))
        .then(remove("sale"));
    assert_eq!(freeze::refusal(of.state.as_ref().unwrap(), now), None);
    let many = (0..50).map(|n| {
        EnvironmentEvent::FreezeSet(FreezeSet {
            name: format!("w{n}").parse().unwrap(),
            freeze: samples::weekend(),
        })
    });
    let full = many.fold(of, Given::and);
    full.when(|s| freeze::set(s, sale, at("2026-11-30T00:00:00Z")))
        .then_refused("too_many_freezes");
}
