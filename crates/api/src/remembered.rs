//! Answers that are sent again.
//!
//! What was at a position never changes, and what is does not change before the next event: the same
//! question about the same position has the same answer, byte for byte. A dashboard on many
//! screens, and a report that goes back to one moment again and again, cost a look in here. While an
//! answer is worked out, whoever asks the same waits for it: after an event, many do at once.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use daybook_events::Position;
use daybook_events::access::Projects;
use daybook_projections::StateHash;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use serde::Serialize;
use tokio::sync::watch;

use crate::answer::{POSITION, insert_state_hash};
use crate::problem::Problem;
use crate::routes::history::{HistoryQuery, StateQuery};

/// Most bytes of answers that are remembered, with what was asked. What was not asked for lately
/// gives way.
const BYTES: u64 = 16 << 20;

/// How many answers there is room for without making more: of a page of the history each.
const ANSWERS: usize = 1024;

/// What a remembered answer takes beside its bytes and texts, about.
const OVERHEAD: usize = 512;

/// All that an answer follows from. Two that are equal have the same answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Asked {
    /// What was asked; a moment of the past by its position.
    pub(crate) of: Of,
    /// What whoever asked may see.
    pub(crate) visible: Projects,
    /// The position that the answer stands on. Of what is in a project now: one since which nothing
    /// has changed there.
    pub(crate) position: Position,
}

/// Which question, and how it was put.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Of {
    History(HistoryQuery),
    /// The state says how many events were set aside, up to now, also where it is of the past.
    State {
        query: StateQuery,
        set_aside: u64,
    },
}

/// An answer as it is sent.
#[derive(Debug, Clone)]
pub(crate) struct Sent {
    body: Bytes,
    position: Position,
    state_hash: Option<StateHash>,
    /// What is asked for has been like that since then, or before.
    since: Position,
}

impl Sent {
    /// This answer, which stands on exactly this position, where the states have this hash.
    pub(crate) fn new(
        body: &impl Serialize,
        position: Position,
        state_hash: Option<StateHash>,
    ) -> Result<Self, Problem> {
        let body = serde_json::to_vec(body).map_err(|e| Problem::internal(&e))?;
        Ok(Self {
            body: body.into(),
            position,
            state_hash,
            since: position,
        })
    }

    /// Nothing in it has changed since a position, and until a later one than it stands on, perhaps.
    pub(crate) fn unchanged_since(mut self, since: Position) -> Self {
        self.since = since.min(self.position);
        self
    }

    /// The same answer at a later position, up to which nothing in it has changed. None if it does not
    /// end with what it stands on, as answers do.
    fn at(&self, of: &Of, position: Position, state_hash: Option<StateHash>) -> Option<Self> {
        let before = of.standing(self.position, self.state_hash);
        let content = self.body.strip_suffix(before.as_bytes())?;
        let standing = of.standing(position, state_hash);
        Some(Self {
            body: [content, standing.as_bytes()].concat().into(),
            position,
            state_hash,
            since: self.since,
        })
    }
}

impl IntoResponse for Sent {
    fn into_response(self) -> Response {
        let mut response = (
            [(header::CONTENT_TYPE, "application/json")],
            axum::body::Body::from(self.body),
        )
            .into_response();
        let headers = response.headers_mut();
        headers.insert(POSITION, HeaderValue::from(self.position.0));
        if let Some(hash) = self.state_hash {
            insert_state_hash(headers, hash);
        }
        response
    }
}

#[derive(Debug, Clone)]
struct Bytewise;

impl Weighter<Asked, Sent> for Bytewise {
    fn weight(&self, asked: &Asked, sent: &Sent) -> u64 {
        let names = match &asked.visible {
            Projects::All => 0,
            Projects::Named(names) => names.iter().map(|n| n.as_str().len() + OVERHEAD / 8).sum(),
        };
        (sent.body.len() + names + asked.of.length() + OVERHEAD) as u64
    }
}

impl Of {
    /// How an answer ends, with what it stands on: the last fields of [`HistoryList`] and of
    /// [`StateView`].
    ///
    /// [`HistoryList`]: crate::view::HistoryList
    /// [`StateView`]: crate::view::StateView
    fn standing(&self, position: Position, state_hash: Option<StateHash>) -> String {
        let position = position.0;
        match self {
            Self::History(_) => format!(r#","position":{position}}}"#),
            Self::State { set_aside, .. } => {
                let hash = state_hash.map_or("null".to_owned(), |hash| format!("\"{hash}\""));
                format!(r#","position":{position},"state_hash":{hash},"set_aside":{set_aside}}}"#)
            }
        }
    }

    /// How long its texts are.
    fn length(&self) -> usize {
        let texts: &[&Option<String>] = match self {
            Self::History(q) => &[
                &q.instance_id,
                &q.project,
                &q.environment,
                &q.service,
                &q.version,
                &q.at,
                &q.cursor,
            ],
            Self::State { query: q, .. } => {
                &[&q.project, &q.environment, &q.service, &q.at, &q.cursor]
            }
        };
        texts
            .iter()
            .filter_map(|t| t.as_ref())
            .map(String::len)
            .sum()
    }
}

/// The answers that were given lately, and those that are being worked out.
#[derive(Debug)]
pub(crate) struct Answers {
    given: Cache<Asked, Sent, Bytewise>,
    under_way: Mutex<HashMap<Asked, Outcome>>,
}

/// An answer does not end as [`Of::standing`] says.
#[derive(Debug, thiserror::Error)]
#[error("an answer does not end with the position that it stands on")]
struct NoStanding;

/// How the work on an answer ended. Closed without a word if it was given up.
type Outcome = watch::Receiver<Option<Result<Sent, Problem>>>;

impl Default for Answers {
    fn default() -> Self {
        Self {
            given: Cache::with_weighter(ANSWERS, BYTES, Bytewise),
            under_way: Mutex::default(),
        }
    }
}

/// What there is to do about a question.
enum Turn<'a> {
    /// Work it out.
    Work(Work<'a>),
    /// Wait for somebody who does.
    Wait(Outcome),
}

/// The work on one answer; given up when it is dropped.
struct Work<'a> {
    asked: &'a Asked,
    answers: &'a Answers,
    outcome: watch::Sender<Option<Result<Sent, Problem>>>,
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        self.answers.under_way().remove(self.asked);
    }
}

impl Answers {
    /// What was answered to this before, if that is remembered; else what `work` finds, which is done
    /// for all who ask this meanwhile. Answers and failures are shared. Where whoever works gives up
    /// (its client went away), another one of those who wait takes over.
    ///
    /// An answer about now may stand on a later position than was asked about.
    pub(crate) async fn to(
        &self,
        asked: Asked,
        work: impl Future<Output = Result<Sent, Problem>>,
    ) -> Result<Sent, Problem> {
        let turn = loop {
            if let Some(sent) = self.given.get(&asked) {
                return Ok(sent);
            }
            match self.turn(&asked) {
                Turn::Work(turn) => break turn,
                Turn::Wait(mut outcome) => {
                    if let Ok(Some(result)) = outcome.wait_for(Option::is_some).await.as_deref() {
                        return result.clone();
                    }
                }
            }
        };
        // It may have been given since it was looked for.
        if let Some(sent) = self.given.get(&asked) {
            return Ok(sent);
        }
        let result = work.await;
        if let Ok(sent) = &result {
            self.remember(&asked, sent);
        }
        turn.outcome.send_replace(Some(result.clone()));
        result
    }

    fn turn<'a>(&'a self, asked: &'a Asked) -> Turn<'a> {
        let mut under_way = self.under_way();
        if let Some(outcome) = under_way.get(asked) {
            return Turn::Wait(outcome.clone());
        }
        let (outcome, receiver) = watch::channel(None);
        under_way.insert(asked.clone(), receiver);
        Turn::Work(Work {
            asked,
            answers: self,
            outcome,
        })
    }

    /// Remembers an answer for the position that it stands on, or since which it is the same, if it
    /// says its hash: one that lacks it is given to those who wait for it only.
    fn remember(&self, asked: &Asked, sent: &Sent) {
        if sent.state_hash.is_some() {
            let asked = Asked {
                position: sent.since,
                ..asked.clone()
            };
            self.given.insert(asked, sent.clone());
        }
    }

    /// The same as [`Self::to`] for what is in a project now. It was `now` when it was asked, and
    /// nothing had changed in there since [`Asked::position`]: what was answered in between is brought
    /// to this position.
    pub(crate) async fn to_now(
        &self,
        asked: Asked,
        now: Position,
        state_hash: impl FnOnce(Position) -> Option<StateHash>,
        work: impl Future<Output = Result<Sent, Problem>>,
    ) -> Result<Sent, Problem> {
        let question = asked.clone();
        let sent = self.to(asked, work).await?;
        if sent.position >= now {
            return Ok(sent);
        }
        let at = sent.at(&question.of, now, state_hash(now));
        let sent = at.ok_or_else(|| Problem::internal(&NoStanding))?;
        self.remember(&question, &sent);
        Ok(sent)
    }

    fn under_way(&self) -> MutexGuard<'_, HashMap<Asked, Outcome>> {
        self.under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::http::StatusCode;
    use daybook_events::Position;
    use daybook_events::access::Projects;
    use daybook_projections::StateHash;
    use futures_util::future::join_all;
    use futures_util::poll;
    use tokio::sync::oneshot;

    use super::{Answers, Asked, BYTES, Of, Sent};
    use crate::problem::Problem;
    use crate::routes::history::HistoryQuery;

    fn asked(position: u64, version: &str) -> Asked {
        Asked {
            of: Of::History(HistoryQuery {
                version: Some(version.to_owned()),
                ..HistoryQuery::default()
            }),
            visible: Projects::All,
            position: Position(position),
        }
    }

    fn sent(position: u64, body: &str) -> Sent {
        let hash = format!("s3:{}", "0".repeat(64));
        let hash: StateHash = serde_json::from_value(hash.into()).expect("a hash");
        Sent::new(&body, Position(position), Some(hash)).expect("JSON")
    }

    /// What is remembered of a question.
    fn kept(answers: &Answers, asked: &Asked) -> Option<Sent> {
        answers.given.get(asked)
    }

    #[test]
    fn an_answer_is_for_what_was_asked_at_its_position_only() {
        let answers = Answers::default();
        answers.remember(&asked(7, "v1"), &sent(7, "then"));
        let given = kept(&answers, &asked(7, "v1")).expect("it");
        assert_eq!(given.body, "\"then\"");
        assert!(
            kept(&answers, &asked(8, "v1")).is_none(),
            "another position"
        );
        assert!(
            kept(&answers, &asked(7, "v2")).is_none(),
            "another question"
        );
        let visible = Projects::Named(std::collections::BTreeSet::new());
        let other = Asked {
            visible,
            ..asked(7, "v1")
        };
        assert!(kept(&answers, &other).is_none(), "somebody who sees less");
    }

    #[test]
    fn an_answer_is_remembered_for_the_position_that_it_stands_on_and_with_its_hash_only() {
        let answers = Answers::default();
        answers.remember(&asked(7, "v1"), &sent(8, "later"));
        assert!(kept(&answers, &asked(7, "v1")).is_none());
        assert!(kept(&answers, &asked(8, "v1")).is_some());
        let mut without = sent(7, "then");
        without.state_hash = None;
        answers.remember(&asked(7, "v1"), &without);
        assert!(kept(&answers, &asked(7, "v1")).is_none());
    }

    #[tokio::test]
    async fn what_has_not_changed_since_is_brought_to_now() {
        let answers = Answers::default();
        let hash = sent(0, "").state_hash;
        let of = asked(0, "v1").of;
        let body = |position: u64| format!(r#"{{"history":[],"next":null,"position":{position}}}"#);
        let works = AtomicUsize::new(0);
        // Asked at 5 and 9, while nothing has changed since 3.
        for now in [5, 9, 9] {
            let work = async {
                works.fetch_add(1, Ordering::Relaxed);
                let body: serde_json::Value = serde_json::from_str(&body(now)).expect("JSON");
                Ok(Sent::new(&body, Position(now), hash)?.unchanged_since(Position(3)))
            };
            let given = answers.to_now(asked(3, "v1"), Position(now), |_| hash, work);
            let given = given.await.expect("an answer");
            assert_eq!(given.body, body(now));
            assert_eq!((given.position, given.state_hash), (Position(now), hash));
        }
        assert_eq!(works.load(Ordering::Relaxed), 1);
        // Where the hash there is not known, it is not said, and what is remembered stays.
        let work = async { unreachable!() };
        let given = answers.to_now(asked(3, "v1"), Position(11), |_| None, work);
        assert_eq!(given.await.expect("an answer").state_hash, None);
        let stays = kept(&answers, &asked(3, "v1")).expect("it");
        assert_eq!(stays.position, Position(9));
        // What does not end with what it stands on is never sent as if it did.
        assert!(sent(3, "then").at(&of, Position(4), hash).is_none());
    }

    #[test]
    fn what_is_remembered_is_bounded_in_bytes() {
        let answers = Answers::default();
        let large = "x".repeat(100_000);
        for n in 0..400 {
            answers.remember(&asked(n, &large), &sent(n, &large));
        }
        assert!(answers.given.weight() <= BYTES);
        assert!(answers.given.len() > 20, "{}", answers.given.len());
    }

    /// Asks, and works for as long as nobody says how that ends.
    fn ask<'a>(
        answers: &'a Answers,
        works: &'a AtomicUsize,
        end: oneshot::Receiver<Result<Sent, Problem>>,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Sent, Problem>> + 'a>> {
        Box::pin(answers.to(asked(7, "v1"), async move {
            works.fetch_add(1, Ordering::Relaxed);
            end.await.expect("an end")
        }))
    }

    #[tokio::test]
    async fn what_many_ask_at_once_is_worked_out_once() {
        let (answers, works) = (Answers::default(), AtomicUsize::new(0));
        let unavailable = Problem::new(StatusCode::SERVICE_UNAVAILABLE, "a_code", "", "");
        let mut without = sent(7, "without a hash");
        without.state_hash = None;
        for (round, outcome) in [Err(unavailable), Ok(without), Ok(sent(8, "later"))]
            .into_iter()
            .enumerate()
        {
            let (end, ends) = oneshot::channel();
            let first = ask(&answers, &works, ends);
            let others = (0..3).map(|_| ask(&answers, &works, oneshot::channel().1));
            let all = join_all(std::iter::once(first).chain(others));
            let tell = async { end.send(outcome.clone()).expect("somebody works") };
            let (all, ()) = tokio::join!(all, tell);
            let outcome = outcome.map(|sent| sent.body);
            for one in all {
                assert_eq!(one.map(|sent| sent.body), outcome);
            }
            assert_eq!(works.load(Ordering::Relaxed), round + 1);
            assert!(answers.under_way().is_empty());
        }
    }

    #[tokio::test]
    async fn whoever_waits_takes_over_from_one_who_went_away() {
        let (answers, works) = (Answers::default(), AtomicUsize::new(0));
        let (_never, ends) = oneshot::channel();
        let mut gone = ask(&answers, &works, ends);
        let (end, ends) = oneshot::channel();
        let mut waits = ask(&answers, &works, ends);
        assert!(poll!(&mut gone).is_pending() && poll!(&mut waits).is_pending());
        assert_eq!(works.load(Ordering::Relaxed), 1);
        drop(gone);
        end.send(Ok(sent(7, "then"))).expect("somebody waits");
        assert_eq!(waits.await.expect("an answer").body, "\"then\"");
        assert_eq!(works.load(Ordering::Relaxed), 2);
    }
}
