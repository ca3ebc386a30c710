//! Scheduled stops: what is decided and folded, in a time that the test makes.

#![allow(clippy::unwrap_used)]

use daybook_events::aggregate::Decision;
use daybook_events::deployment::{Deployment, DeploymentEvent, Status, decide};
use daybook_events::testing::{Given, given, samples, time};
use daybook_events::timer::{
    KeepCause, KeepFor, StopCause, StopScheduled, StopUnscheduled, fire, keep,
};
use daybook_events::{Aggregate, EventId, Payload, Position};
use jiff::Timestamp;

fn event(name: &str) -> DeploymentEvent {
    let kind = format!("deployment.{name}.v1");
    let mut all = samples::deployment_events(samples::shop(), 1).into_iter();
    all.find(|e| e.kind() == kind).unwrap()
}

fn started() -> Given<Deployment> {
    given(
        [
            "requested",
            "queued",
            "image_pinned",
            "deploying_started",
            "succeeded",
        ]
        .map(event),
    )
}

fn stop(number: u64, due: u64, cause: StopCause, table: Option<u32>) -> DeploymentEvent {
    DeploymentEvent::StopScheduled(StopScheduled {
        due: time(due),
        cause,
        keep: KeepFor::OLD,
        by: None,
        table,
        nonce: samples::nonce(number),
    })
}

fn replaced(number: u64, due: u64, table: u32) -> DeploymentEvent {
    stop(number, due, StopCause::Replaced, Some(table))
}

/// What comes of the timer with this number at a time.
fn fired(of: &Given<Deployment>, number: u64, now: u64, traffic: bool) -> Option<DeploymentEvent> {
    match fire(
        of.state.as_ref(),
        samples::nonce(number),
        time(now),
        traffic,
    ) {
        Ok(Decision::Append(event)) => Some(event),
        Ok(Decision::Nothing) => None,
        Err(refusal) => panic!("{refusal}"),
    }
}

fn stops(of: &Given<Deployment>, number: u64, now: u64) -> bool {
    matches!(
        fired(of, number, now, false),
        Some(DeploymentEvent::StopRequested(_))
    )
}

#[test]
fn a_stop_fires_from_its_time_on_and_once() {
    let of = started().and(replaced(1, 1800, 3));
    assert_eq!(of.state.as_ref().unwrap().due(), Some(time(1800)));
    assert!(!stops(&of, 1, 1799));
    assert!(stops(&of, 1, 1800));
    assert!(stops(&of, 1, 1_000_000), "an overdue one fires too");
    assert!(!stops(&of, 2, 1800), "another nonce does not");

    // It is appended under its nonce; from then on the nonce is worth nothing.
    let mut state = of.state.clone().unwrap();
    let stopping = fired(&of, 1, 1800, false).unwrap();
    state.apply(stopping, at(samples::nonce(1))).unwrap();
    assert_eq!((state.status, state.due()), (Status::Stopping, None));
    assert_eq!(state.stops.stopped_by().unwrap().cause, StopCause::Replaced);
    let again = fire(Some(&state), samples::nonce(1), time(1801), false);
    assert_eq!(again, Ok(Decision::Nothing));
    assert_eq!(
        fire(None, samples::nonce(1), time(1801), false),
        Ok(Decision::Nothing)
    );
}

fn at(id: EventId) -> daybook_events::aggregate::At {
    daybook_events::aggregate::At {
        position: Position(99),
        id,
        time: Timestamp::UNIX_EPOCH,
        trace: None,
    }
}

#[test]
fn what_has_traffic_is_kept_unless_nobody_asks_for_it() {
    let of = started().and(replaced(1, 1800, 3));
    let Some(DeploymentEvent::StopUnscheduled(kept)) = fired(&of, 1, 1800, true) else {
        panic!("it has traffic");
    };
    assert_eq!(kept.cause, KeepCause::Traffic);
    let of = of.and(DeploymentEvent::StopUnscheduled(kept));
    assert_eq!(of.state.as_ref().unwrap().due(), None);
    let idle = started().and(stop(1, 1800, StopCause::Idle, None));
    let event = fired(&idle, 1, 1800, true);
    assert!(
        matches!(event, Some(DeploymentEvent::StopRequested(_))),
        "{event:?}"
    );
}

#[test]
fn a_later_stop_takes_the_place_of_an_earlier_one() {
    let of = started()
        .and(stop(1, 1800, StopCause::Idle, None))
        .and(stop(2, 3600, StopCause::Idle, None));
    assert!(!stops(&of, 1, 5000), "its nonce was superseded");
    assert!(!stops(&of, 2, 1800));
    assert!(stops(&of, 2, 3600));
}

#[test]
fn what_was_decided_is_not_decided_again() {
    let nothing = |of: &Given<Deployment>, event| {
        assert_eq!(decide(of.state.as_ref(), event), Ok(Decision::Nothing));
    };
    let of = started().and(replaced(1, 1800, 3));
    nothing(&of, replaced(1, 1800, 3));
    nothing(&of, replaced(2, 1900, 2));
    // It was kept as of table 4: what an older table led to comes too late.
    let kept = keep(of.state.as_ref(), KeepCause::Asked, Some(4), None);
    let Ok(Decision::Append(kept)) = kept else {
        panic!("{kept:?}");
    };
    let of = of.and(kept);
    nothing(&of, replaced(1, 1800, 3));
    nothing(&of, replaced(2, 1900, 4));
    let newer = replaced(3, 2000, 5);
    assert!(matches!(
        decide(of.state.as_ref(), newer),
        Ok(Decision::Append(_))
    ));
    // The end of a stop that is not the present one changes nothing.
    nothing(
        &of,
        DeploymentEvent::StopUnscheduled(StopUnscheduled {
            nonce: samples::nonce(1),
            cause: KeepCause::Asked,
            table: None,
            reason: None,
        }),
    );
}

#[test]
fn only_what_runs_is_stopped() {
    for path in [
        "stop_requested",
        "stop_requested stopped",
        "stop_requested stopped start_requested started",
        "stop_requested stopped terminate_requested",
    ] {
        let of = path
            .split_whitespace()
            .fold(started().and(replaced(1, 1800, 3)), |of, name| {
                of.and(event(name))
            });
        assert_eq!(of.state.as_ref().unwrap().due(), None, "{path}");
        assert!(!stops(&of, 1, 5000), "{path}");
        assert_eq!(
            of.state.as_ref().unwrap().stops.stopped_by(),
            None,
            "{path}"
        );
    }
    // What is still being deployed waits until it is.
    let deploying: Given<Deployment> =
        given(["requested", "queued", "image_pinned", "deploying_started"].map(event))
            .and(replaced(1, 1800, 3));
    assert_eq!(deploying.state.as_ref().unwrap().due(), None);
    assert!(!stops(&deploying, 1, 5000));
    let live = deploying.and(event("succeeded"));
    assert!(stops(&live, 1, 5000));
}

#[test]
fn there_is_nothing_to_keep_where_nothing_is_scheduled() {
    let of = started();
    let refused = keep(of.state.as_ref(), KeepCause::Asked, None, None).unwrap_err();
    assert_eq!(refused.code, "no_stop_scheduled");
    let refused = keep(None, KeepCause::Asked, None, None).unwrap_err();
    assert_eq!(refused.code, "deployment_not_found");
    let quiet = keep(of.state.as_ref(), KeepCause::Traffic, None, None);
    assert_eq!(quiet, Ok(Decision::Nothing));
}
