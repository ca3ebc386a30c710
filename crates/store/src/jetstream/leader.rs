//! Questions that only the leader of a stream can answer.
//!
//! While a cluster chooses a leader, it answers "temporarily unavailable" (503, code 10008 of
//! nats-server's `errors.json`) at once. That takes seconds (nats-server waits 4 to 9 before
//! an election), so a question is asked again until it is over, as an append is.

use std::error::Error;
use std::time::Duration;

use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::{RequestError, RequestErrorKind};
use async_nats::jetstream::stream::{RawMessageError, RawMessageErrorKind};
use tokio::time::Instant;

use super::connection::Connection;

const PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// An error that may say that nobody leads the stream at the moment.
pub(super) trait Leaderless {
    /// Whether it does: nothing else is wrong, and asking again soon helps.
    fn is_leaderless(&self) -> bool;
}

impl Leaderless for RawMessageError {
    fn is_leaderless(&self) -> bool {
        match self.kind() {
            RawMessageErrorKind::JetStream(error) => is_unavailable(&error),
            _ => false,
        }
    }
}

impl Leaderless for RequestError {
    fn is_leaderless(&self) -> bool {
        let reason = self.source().and_then(|reason| reason.downcast_ref());
        self.kind() == RequestErrorKind::Other && reason.is_some_and(is_unavailable)
    }
}

fn is_unavailable(error: &async_nats::jetstream::Error) -> bool {
    error.error_code() == ErrorCode::CLUSTER_NOT_AVAILABLE
}

/// Asks until somebody leads, at most for twice as long as an answer may take; what was said last
/// is returned then.
pub(super) async fn ask<T, E, F>(connection: &Connection, question: impl Fn() -> F) -> Result<T, E>
where
    E: Leaderless,
    F: Future<Output = Result<T, E>>,
{
    ask_for(2 * connection.answer_timeout(), question).await
}

async fn ask_for<T, E, F>(patience: Duration, question: impl Fn() -> F) -> Result<T, E>
where
    E: Leaderless,
    F: Future<Output = Result<T, E>>,
{
    let until = Instant::now() + patience;
    let mut pause = PAUSE;
    loop {
        match question().await {
            Err(error) if error.is_leaderless() && Instant::now() < until => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            answer => return answer,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use async_nats::jetstream::context::RequestError;
    use async_nats::jetstream::stream::{RawMessageError, RawMessageErrorKind};

    use super::{Leaderless, ask_for};

    /// An error as a server sends it.
    fn error(code: u64) -> async_nats::jetstream::Error {
        let text = format!(r#"{{"code":503,"err_code":{code},"description":"it"}}"#);
        serde_json::from_str(&text).expect("an error of JetStream")
    }

    fn of_a_message(code: u64) -> RawMessageError {
        RawMessageErrorKind::JetStream(error(code)).into()
    }

    #[test]
    fn only_a_cluster_without_leader_is_one() {
        assert!(of_a_message(10008).is_leaderless());
        assert!(RequestError::from(error(10008)).is_leaderless());
        assert!(!of_a_message(10037).is_leaderless());
        assert!(!RequestError::from(error(10037)).is_leaderless());
        assert!(!RawMessageError::from(RawMessageErrorKind::NoMessageFound).is_leaderless());
    }

    #[tokio::test]
    async fn a_question_is_asked_until_somebody_leads_or_patience_ends() {
        let asked = Cell::new(0);
        let until = |leads: u32, code| {
            let asked = &asked;
            asked.set(0);
            move || {
                asked.set(asked.get() + 1);
                std::future::ready(if asked.get() < leads {
                    Err(of_a_message(code))
                } else {
                    Ok(())
                })
            }
        };
        let long = Duration::from_secs(60);
        ask_for(long, until(3, 10008)).await.expect("an answer");
        assert_eq!(asked.get(), 3);
        ask_for(long, until(3, 10037)).await.expect_err("at once");
        assert_eq!(asked.get(), 1);
        let soon = Duration::from_millis(50);
        let error = ask_for(soon, until(u32::MAX, 10008)).await;
        assert!(error.expect_err("what was said last").is_leaderless());
        assert!(asked.get() > 1);
    }
}
