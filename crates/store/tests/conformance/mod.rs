//! What every backend of the log and of the line log has to do: one suite, run by each of them.
//!
//! A backend implements [`Backend`] and names a function that makes fresh ones to
//! `conformance_suite!`, which turns each case into a test of its own. A case gets a backend with
//! nothing in it. Cases wait for states, with a bound, and never for a time.

#![allow(clippy::unwrap_used, unreachable_pub)]

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use daybook_events::Position;
use daybook_events::lines::LineLog;
use daybook_events::log::{Append, AppendError, Appended, EventLog, Expected};
use daybook_events::names::{BuildId, DeploymentId, EnvironmentName, EventId, ProjectName};
use daybook_events::subject::Subject;
use uuid::Uuid;

pub mod appending;
pub mod consuming;
pub mod faults;
pub mod lines;
pub mod reading;

/// What the suite needs of a backend.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// The log. All handles are equal.
    async fn log(&self) -> Arc<dyn EventLog>;

    /// The line log that stands beside it.
    async fn lines(&self) -> Arc<dyn LineLog>;

    /// What the backend can do in this suite.
    fn abilities(&self) -> Abilities;

    /// Ends the backend in order and starts it again over what it stored. Unless
    /// [`Abilities::handles_survive`], the suite has dropped all handles before.
    async fn restart(&self);

    /// Ends the backend as abruptly as it can be ended here, and starts it again.
    async fn crash(&self) {
        self.restart().await;
    }

    /// Makes the backend answer nothing until [`resume`](Self::resume).
    async fn pause(&self) {
        unreachable!("only asked for with Abilities::pauses");
    }

    /// Ends a [`pause`](Self::pause).
    async fn resume(&self) {
        unreachable!("only asked for with Abilities::pauses");
    }
}

/// What differs between backends without one of them being wrong.
#[derive(Debug, Clone, Copy)]
pub struct Abilities {
    /// Handles and streams taken before a restart go on after it.
    pub handles_survive: bool,
    /// `pause` and `resume` do something.
    pub pauses: bool,
    /// Of two appends that expect the same position and race each other, both may be accepted:
    /// the folds then let the first count. So it is in a NATS cluster.
    pub may_accept_twice: bool,
}

/// Makes each case of the suite a test that runs on a fresh backend.
///
/// `$start` is the path of an `async fn() -> Vec<B>` with `B: Backend`: one backend for each
/// variant that is there to be tested, empty if there is none.
macro_rules! conformance_suite {
    ($start:path) => {
        conformance_suite!(@ $start =>
            appending: events_come_back_in_order_with_their_exact_bytes,
            appending: a_right_expectation_is_accepted_and_a_wrong_one_learns_the_truth,
            appending: racing_writers_lose_no_update,
            appending: an_id_that_was_stored_is_a_duplicate_whatever_is_expected,
            appending: an_id_that_was_refused_is_not_remembered,
            appending: an_event_that_is_too_large_is_refused,
            appending: many_appends_are_in_flight_at_once,
            appending: a_log_says_what_it_is,
            reading: filters_choose_by_project_environment_aggregate_and_subject,
            reading: an_aggregate_is_read_without_its_neighbours,
            reading: a_read_ends_at_its_limit_and_at_the_end,
            reading: many_events_are_read_and_tailed_whole,
            reading: a_single_event_is_got_by_its_position,
            reading: a_tail_starts_in_the_middle_and_goes_on_live,
            reading: a_filtered_tail_skips_what_it_does_not_want,
            reading: a_tail_ahead_of_a_quiet_log_waits,
            reading: a_tail_goes_on_across_a_restart,
            consuming: what_is_acknowledged_is_not_delivered_again,
            consuming: two_readers_share_a_consumer,
            consuming: a_consumer_delivers_only_what_it_wants,
            consuming: a_refused_delivery_comes_again_after_its_delay,
            consuming: an_unanswered_delivery_comes_again,
            consuming: progress_keeps_a_delivery,
            consuming: a_terminated_delivery_never_comes_again,
            consuming: deliveries_end_at_the_bound_and_the_last_one_says_so,
            consuming: only_so_many_deliveries_are_in_flight,
            consuming: a_wait_that_is_given_up_loses_nothing,
            consuming: a_consumer_remembers_across_a_restart,
            consuming: consumers_of_different_names_are_independent,
            consuming: a_consumer_can_be_opened_with_other_settings,
            lines: lines_are_numbered_within_their_source,
            lines: lines_keep_all_that_they_say,
            lines: batches_of_several_writers_stay_together,
            lines: a_reader_follows_from_any_line,
            lines: a_long_output_is_read_in_parts,
            lines: lines_and_followers_survive_a_restart,
            faults: a_restart_loses_nothing,
            faults: a_crash_loses_nothing_and_the_same_ids_are_duplicates,
            faults: every_acknowledged_event_is_there_once_after_crashes_amid_appends,
            faults: a_consumer_goes_on_across_crashes,
            faults: an_append_that_timed_out_is_stored_once,
        );
    };
    (@ $start:path => $($module:ident: $case:ident,)*) => { $(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $case() {
            for backend in $start().await {
                $crate::conformance::$module::$case(&backend).await;
            }
        }
    )* };
}
/// How long anything may take before the suite says that it does not happen.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for something that must happen.
pub async fn within<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("not within {PATIENCE:?}: {what}"),
    }
}

/// Looks for a short while whether something happens that must not.
pub async fn never<F: Future>(what: &str, future: F) {
    if tokio::time::timeout(Duration::from_millis(300), future)
        .await
        .is_ok()
    {
        panic!("it happened: {what}");
    }
}

/// A project's name.
pub fn project(name: &str) -> ProjectName {
    ProjectName::parse(name).unwrap()
}

/// An environment's name.
pub fn environment(name: &str) -> EnvironmentName {
    EnvironmentName::parse(name).unwrap()
}

/// A deployment of its own in project `shop`, environment `production`.
pub fn a_deployment() -> Subject {
    let id = DeploymentId(Uuid::now_v7());
    Subject::Deployment(project("shop"), environment("production"), id)
}

/// A build of its own in project `shop`.
pub fn a_build() -> Subject {
    Subject::Build(project("shop"), BuildId(Uuid::now_v7()))
}

/// An event with a new id that says `text` and expects nothing.
pub fn an_event(subject: &Subject, text: impl std::fmt::Display) -> Append {
    let id = EventId(Uuid::now_v7());
    Append {
        subject: subject.clone(),
        id,
        expected: Expected::Any,
        bytes: Bytes::from(format!(
            r#"{{"specversion":"1.0","id":"{id}","data":"{text}"}}"#
        )),
    }
}

/// The same with an expectation.
pub fn expecting(expected: Position, append: Append) -> Append {
    Append {
        expected: Expected::Last(expected),
        ..append
    }
}

/// Appends an event that must be accepted.
pub async fn append(log: &Arc<dyn EventLog>, append: Append) -> Position {
    let appended = within("an append", log.append(append)).await.unwrap();
    assert!(!appended.duplicate);
    appended.position
}

/// Appends `count` events to a subject, numbered from 1.
pub async fn append_many(log: &Arc<dyn EventLog>, subject: &Subject, count: usize) -> Vec<Append> {
    let mut events = Vec::with_capacity(count);
    for number in 1..=count {
        let event = an_event(subject, number);
        append(log, event.clone()).await;
        events.push(event);
    }
    events
}

/// Appends as a careful writer does: as long as a retry may help, again with the same id.
pub async fn append_with_retries(log: &Arc<dyn EventLog>, append: &Append) -> Appended {
    let attempts = async {
        loop {
            match log.append(append.clone()).await {
                Ok(appended) => return appended,
                Err(error) if error.is_retryable() => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => panic!("no retry helps: {error}"),
            }
        }
    };
    within("an append with retries", attempts).await
}

/// The conflict that an append must run into.
pub fn conflict(result: Result<Appended, AppendError>) -> (Position, Option<Position>) {
    match result {
        Err(AppendError::Conflict { expected, actual }) => (expected, actual),
        other => panic!("not a conflict: {other:?}"),
    }
}
