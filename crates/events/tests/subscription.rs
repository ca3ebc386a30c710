//! Webhooks out: given, when, then.
#![allow(clippy::unwrap_used)]

use daybook_events::subscription::{
    self, Command, EndpointUrl, EventDeadLettered, Format, KindPattern, MAX_DEAD, PauseReason,
    Subscription, SubscriptionEvent,
};
use daybook_events::testing::{Given, given, samples, time};
use daybook_events::{EventId, Position};

fn made() -> Given<Subscription> {
    given([samples::subscription_events().remove(0)])
}

fn set_aside(position: u64) -> Command {
    Command::SetAside(EventDeadLettered {
        position: Position(position),
        event: EventId(uuid::Uuid::from_u128(position.into())),
        tries: 3,
        code: "status_500".into(),
    })
}

#[test]
fn what_is_set_aside_can_be_sent_again_and_nothing_else() {
    let (_, given) = made()
        .when(|s| subscription::decide(s, set_aside(7)))
        .then_some();
    given
        .clone()
        .when(|s| subscription::decide(s, Command::Replay(Some(vec![Position(8)]))))
        .then_refused("not_dead_lettered");
    let (event, given) = given
        .when(|s| subscription::decide(s, Command::Replay(None)))
        .then_some();
    let SubscriptionEvent::ReplayRequested(asked) = event else {
        panic!("{event:?}");
    };
    assert_eq!(asked.positions, [Position(7)]);
    assert!(given.state.as_ref().unwrap().dead[&Position(7)].replaying);
    let replayed = Command::Replayed {
        position: Position(7),
        event: EventId(uuid::Uuid::from_u128(7)),
    };
    let (_, given) = given
        .when(|s| subscription::decide(s, replayed.clone()))
        .then_some();
    assert!(given.state.as_ref().unwrap().dead.is_empty());
    given
        .when(|s| subscription::decide(s, replayed))
        .then_nothing();
}

#[test]
fn too_much_that_is_set_aside_pauses() {
    let mut given = made();
    for position in 0..MAX_DEAD as u64 {
        given = given
            .when(|s| subscription::decide(s, set_aside(10 + position)))
            .then_some()
            .1;
    }
    let (event, given) = given
        .when(|s| subscription::decide(s, set_aside(5)))
        .then_some();
    let SubscriptionEvent::Paused(paused) = event else {
        panic!("{event:?}");
    };
    assert_eq!(paused.reason, PauseReason::Failing);
    let state = given.state.as_ref().unwrap();
    assert!(!state.is_active() && state.dead.len() == MAX_DEAD);
    given
        .when(|s| subscription::decide(s, Command::Test))
        .then_refused("webhook_paused");
}

#[test]
fn what_is_discarded_makes_room() {
    let mut given = made();
    for position in 0..MAX_DEAD as u64 {
        given = given
            .when(|s| subscription::decide(s, set_aside(10 + position)))
            .then_some()
            .1;
    }
    given
        .clone()
        .when(|s| subscription::decide(s, Command::Discard(Some(vec![Position(5)]))))
        .then_refused("not_dead_lettered");
    let two = vec![Position(11), Position(10), Position(11)];
    let (event, given) = given
        .when(|s| subscription::decide(s, Command::Discard(Some(two))))
        .then_some();
    let SubscriptionEvent::DeadLettersDiscarded(discarded) = event else {
        panic!("{event:?}");
    };
    assert_eq!(discarded.positions, [Position(10), Position(11)]);
    assert_eq!(given.state.as_ref().unwrap().dead.len(), MAX_DEAD - 2);
    let (event, given) = given
        .when(|s| subscription::decide(s, set_aside(5)))
        .then_some();
    assert!(matches!(event, SubscriptionEvent::EventDeadLettered(_)));
    let (_, given) = given
        .when(|s| subscription::decide(s, Command::Discard(None)))
        .then_some();
    assert!(given.state.as_ref().unwrap().dead.is_empty());
    given
        .when(|s| subscription::decide(s, Command::Discard(None)))
        .then_nothing();
}

#[test]
fn two_secrets_are_in_use_until_the_overlap_ends() {
    let SubscriptionEvent::SecretRotated(rotated) = samples::subscription_events().remove(2) else {
        panic!("the third sample is a rotation");
    };
    let rotate = Command::Rotate {
        secret: rotated.secret.clone(),
        overlap_until: time(100),
    };
    let (_, given) = made()
        .when(|s| subscription::decide(s, rotate.clone()))
        .then_some();
    let state = given.state.as_ref().unwrap();
    let versions = |at| -> Vec<u32> { state.secrets_at(time(at)).map(|s| s.version).collect() };
    assert_eq!(versions(99), [2, 1]);
    assert_eq!(versions(100), [2]);
    given
        .when(|s| subscription::decide(s, rotate))
        .then_refused("stale_secret_version");
}

#[test]
fn what_was_deleted_is_gone() {
    let (_, given) = made()
        .when(|s| subscription::decide(s, Command::Delete))
        .then_some();
    for command in [Command::Resume, Command::Test, set_aside(9)] {
        given
            .clone()
            .when(|s| subscription::decide(s, command))
            .then_refused("webhook_not_found");
    }
    given
        .when(|s| subscription::decide(s, Command::Delete))
        .then_nothing();
}

#[test]
fn a_proof_is_of_what_is_stored_and_kinds_are_known() {
    let endpoint = made().state.unwrap().endpoint;
    let change = |endpoint| subscription::decide(made().state.as_ref(), Command::Change(endpoint));
    let mut other = endpoint.clone();
    other.format = Format::Cdevents;
    assert_eq!(change(other).unwrap_err().code, "proof_needs_cloudevents");
    let mut other = endpoint.clone();
    other.filter.kinds = vec![KindPattern::parse("weather").unwrap()];
    assert_eq!(change(other).unwrap_err().code, "unknown_kind");
    let mut other = endpoint;
    other.tries = 0;
    assert_eq!(change(other).unwrap_err().code, "invalid_tries");
}

#[test]
fn a_pattern_is_a_type_or_all_of_an_aggregate() {
    let pattern = |text: &str| KindPattern::parse(text);
    assert!(pattern("deployment").unwrap().fits("deployment.queued.v1"));
    assert!(!pattern("deploy").unwrap().fits("deployment.queued.v1"));
    let exact = pattern("deployment.queued.v1").unwrap();
    assert!(exact.fits("deployment.queued.v1") && !exact.fits("deployment.queued.v2"));
    for bad in [
        "",
        "Deployment",
        "a.b",
        "a.b.c",
        "a.b.v",
        "a..v1",
        "a.b.v1.c",
        "a b",
    ] {
        assert!(pattern(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn the_ledger_keeps_no_address_with_something_to_hide() {
    for good in [
        "https://example.com",
        "http://127.0.0.1:9/x",
        "https://[::1]/a/b",
    ] {
        EndpointUrl::parse(good).unwrap();
    }
    for bad in [
        "",
        "example.com/x",
        "ftp://example.com/",
        "https://user@example.com/",
        "https://user:word@example.com/",
        "https://example.com/?token=x",
        "https://example.com/#x",
        "https:///x",
        "https:example.com",
        "https://example.com/a b",
        "https://example.com\\@other.example/",
    ] {
        assert!(EndpointUrl::parse(bad).is_err(), "{bad:?}");
    }
}
