//! Answers that are sent again.
//!
//! What was at a position never changes, and what is does not change before the next event: the same
//! question about the same position has the same answer, byte for byte. A dashboard on many
//! screens, and a report that goes back to one moment again and again, cost a look in here.

use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use daybook_events::Position;
use daybook_events::access::Projects;
use daybook_projections::StateHash;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use serde::Serialize;

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
    /// The position that the answer stands on.
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

/// The answers that were given lately.
#[derive(Debug)]
pub(crate) struct Answers(Cache<Asked, Sent, Bytewise>);

impl Default for Answers {
    fn default() -> Self {
        Self(Cache::with_weighter(ANSWERS, BYTES, Bytewise))
    }
}

impl Answers {
    /// What was answered to this before, if that is remembered.
    pub(crate) fn to(&self, asked: &Asked) -> Option<Sent> {
        self.0.get(asked)
    }

    /// Remembers an answer, if it stands on the position that was asked about, and says its hash: one
    /// that lacks it is given once.
    pub(crate) fn remember(&self, asked: Asked, sent: &Sent) {
        if sent.position == asked.position && sent.state_hash.is_some() {
            self.0.insert(asked, sent.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use daybook_events::Position;
    use daybook_events::access::Projects;
    use daybook_projections::StateHash;

    use super::{Answers, Asked, BYTES, Of, Sent};
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

    #[test]
    fn an_answer_is_for_what_was_asked_at_its_position_only() {
        let answers = Answers::default();
        answers.remember(asked(7, "v1"), &sent(7, "then"));
        assert_eq!(answers.to(&asked(7, "v1")).expect("it").body, "\"then\"");
        assert!(answers.to(&asked(8, "v1")).is_none(), "another position");
        assert!(answers.to(&asked(7, "v2")).is_none(), "another question");
        let visible = Projects::Named(std::collections::BTreeSet::new());
        let other = Asked {
            visible,
            ..asked(7, "v1")
        };
        assert!(answers.to(&other).is_none(), "somebody who sees less");
    }

    #[test]
    fn what_went_on_meanwhile_or_lacks_its_hash_is_not_remembered() {
        let answers = Answers::default();
        answers.remember(asked(7, "v1"), &sent(8, "later"));
        assert!(answers.to(&asked(7, "v1")).is_none());
        let mut without = sent(7, "then");
        without.state_hash = None;
        answers.remember(asked(7, "v1"), &without);
        assert!(answers.to(&asked(7, "v1")).is_none());
    }

    #[test]
    fn what_is_remembered_is_bounded_in_bytes() {
        let answers = Answers::default();
        let large = "x".repeat(100_000);
        for n in 0..400 {
            answers.remember(asked(n, &large), &sent(n, &large));
        }
        assert!(answers.0.weight() <= BYTES);
        assert!(answers.0.len() > 20, "{}", answers.0.len());
    }
}
