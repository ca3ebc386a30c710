//! Any mix of appends, right and wrong ones, at once and one after another, across reopenings, is
//! answered as a list in memory would answer it.

use std::collections::HashMap;

use futures_util::future::join_all;
use proptest::prelude::*;

use super::*;

/// What is expected of the aggregate's last event.
#[derive(Debug, Clone, Copy)]
enum Belief {
    Nothing,
    /// The truth, as it is when the append has its turn.
    Right,
    /// This position, right or not.
    At(u64),
}

#[derive(Debug, Clone)]
struct Try {
    aggregate: usize,
    /// Ids are few, so that many are repeated.
    id: u8,
    belief: Belief,
}

#[derive(Debug, Clone)]
enum Step {
    /// Appends that are under way at once, in this order.
    Together(Vec<Try>),
    Reopen,
}

fn a_try() -> impl Strategy<Value = Try> {
    let belief = prop_oneof![
        2 => Just(Belief::Nothing),
        4 => Just(Belief::Right),
        1 => (0..40u64).prop_map(Belief::At),
    ];
    (0..5usize, any::<u8>(), belief).prop_map(|(aggregate, id, belief)| Try {
        aggregate,
        id,
        belief,
    })
}

fn a_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => prop::collection::vec(a_try(), 1..12).prop_map(Step::Together),
        1 => Just(Step::Reopen),
    ]
}

/// The list in memory.
#[derive(Default)]
struct Model {
    events: Vec<Append>,
    ids: HashMap<EventId, u64>,
    lasts: HashMap<usize, u64>,
}

/// An answer that can be compared.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    Stored(u64),
    Duplicate(u64),
    Conflict(u64),
}

impl Model {
    /// The append that a try stands for, and what it must be answered.
    fn append(&mut self, t: &Try) -> (Append, Told) {
        let last = self.lasts.get(&t.aggregate).copied().unwrap_or(0);
        let expected = match t.belief {
            Belief::Nothing => Expected::Any,
            Belief::Right => Expected::Last(Position(last)),
            Belief::At(position) => Expected::Last(Position(position)),
        };
        let append = event(t.aggregate, t.id.into(), expected);
        let told = if let Some(first) = self.ids.get(&append.id) {
            Told::Duplicate(*first)
        } else if matches!(expected, Expected::Last(p) if p.0 != last) {
            Told::Conflict(last)
        } else {
            self.events.push(append.clone());
            let position = self.events.len() as u64;
            self.ids.insert(append.id, position);
            self.lasts.insert(t.aggregate, position);
            Told::Stored(position)
        };
        (append, told)
    }

    async fn is(&self, log: &EmbeddedLog) {
        let all = all(log).await.unwrap();
        assert_eq!(log.head().await.unwrap().0, self.events.len() as u64);
        assert_eq!(all.len(), self.events.len());
        for (i, (found, wanted)) in all.iter().zip(&self.events).enumerate() {
            assert_eq!(found.position.0, i as u64 + 1);
            assert_eq!(found.subject, wanted.subject);
            assert_eq!(found.bytes, wanted.bytes);
        }
        for aggregate in 0..5 {
            let subject = subject(aggregate);
            let own: Vec<_> = all.iter().filter(|r| r.subject == subject).collect();
            let read = log.read_aggregate(&subject).await.unwrap();
            assert_eq!(read.iter().collect::<Vec<_>>(), own);
        }
    }
}

async fn run(steps: Vec<Step>) {
    let dir = tempfile::tempdir().unwrap();
    // Small enough that segments and rounds of the index end all the time.
    let config = EmbeddedConfig {
        sync: false,
        segment_bytes: 700,
        index_round: 7,
    };
    let mut log = EmbeddedLog::open(dir.path(), config.clone()).await.unwrap();
    let mut model = Model::default();
    for step in steps {
        match step {
            Step::Together(tries) => {
                let (appends, wanted): (Vec<_>, Vec<_>) =
                    tries.iter().map(|t| model.append(t)).unzip();
                let answers = join_all(appends.into_iter().map(|a| log.append(a))).await;
                let told: Vec<_> = answers
                    .into_iter()
                    .map(|answer| match answer {
                        Ok(a) if a.duplicate => Told::Duplicate(a.position.0),
                        Ok(a) => Told::Stored(a.position.0),
                        Err(AppendError::Conflict {
                            actual: Some(actual),
                            ..
                        }) => Told::Conflict(actual.0),
                        Err(e) => panic!("{e}"),
                    })
                    .collect();
                assert_eq!(told, wanted);
            }
            Step::Reopen => {
                drop(log);
                log = EmbeddedLog::open(dir.path(), config.clone()).await.unwrap();
            }
        }
    }
    model.is(&log).await;
    drop(log);
    let log = EmbeddedLog::open(dir.path(), config).await.unwrap();
    model.is(&log).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_log_is_a_list(steps in prop::collection::vec(a_step(), 1..30)) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(run(steps));
    }
}
