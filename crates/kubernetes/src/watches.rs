//! One watch a kind over all namespaces, whatever the number of environments.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event as Occurrence;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt as _, watcher as watch};
use kube::{Api, Client, ResourceExt};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use crate::diagnosis::Warning;
use crate::error;
use crate::names::{MANAGED_BY, MANAGER};

/// What became of the objects of a kind.
pub(crate) enum Change<K> {
    /// These are all that there are.
    All(Vec<K>),
    /// It is new, or different.
    Applied(Box<K>),
    /// It is gone.
    Deleted(Box<K>),
}

impl<K> Change<K> {
    /// The objects that are there.
    pub(crate) fn there(&mut self) -> &mut [K] {
        match self {
            Self::All(all) => all,
            Self::Applied(object) => std::slice::from_mut(&mut **object),
            Self::Deleted(_) => &mut [],
        }
    }
}

/// What keeps a kind from being watched.
#[derive(Debug, Clone)]
pub(crate) struct Trouble {
    /// Why its watch was cut.
    pub(crate) why: String,
    /// The cluster does not know it.
    pub(crate) is_unknown: bool,
}

/// A kind that can be watched.
pub(crate) trait Watched:
    kube::Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static
{
}

impl<K> Watched for K where
    K: kube::Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static
{
}

/// Watches Daybook's objects of a kind until `cancel`. A watch that is cut, or too old, is begun
/// anew by listing them all; nothing is missed.
pub(crate) async fn objects<K: Watched>(
    api: Api<K>,
    changed: impl Fn(Change<K>),
    troubled: impl Fn(Option<Trouble>),
    cancel: CancellationToken,
) {
    let config = watcher::Config::default()
        .labels(&format!("{MANAGED_BY}={MANAGER}"))
        .page_size(PAGE);
    run(api, config, changed, troubled, cancel).await;
}

/// Watches one object by its name, whosever it is, until `cancel`.
pub(crate) async fn named<K: Watched>(
    api: Api<K>,
    name: &str,
    changed: impl Fn(Change<K>),
    troubled: impl Fn(Option<Trouble>),
    cancel: CancellationToken,
) {
    let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
    run(api, config, changed, troubled, cancel).await;
}

/// Told of a warning about a pod: its namespace, its name, and what it says.
pub(crate) type Warned = Arc<dyn Fn(&str, &str, Warning) + Send + Sync>;

/// When something was said, and which of two things of the same second was written later.
pub(crate) type SaidAt = (Option<Timestamp>, u64);

/// When an event was seen to happen for the last time: those of API servers are in no order, and one
/// that happens again is the older object with a later time.
pub(crate) fn said_at(event: &Occurrence) -> SaidAt {
    let metadata = &event.metadata;
    let series = event.series.as_ref();
    let times = [
        series.and_then(|s| s.last_observed_time.as_ref().map(|t| t.0)),
        event.last_timestamp.as_ref().map(|t| t.0),
        event.event_time.as_ref().map(|t| t.0),
        event.first_timestamp.as_ref().map(|t| t.0),
        metadata.creation_timestamp.as_ref().map(|t| t.0),
    ];
    let version = metadata.resource_version.as_deref();
    let version = version.and_then(|version| version.parse().ok());
    (
        times.into_iter().flatten().max(),
        version.unwrap_or_default(),
    )
}

/// Watches what kubelets and controllers warn of about pods, of which the newest is told last.
pub(crate) async fn warnings(client: Client, warned: Warned, cancel: CancellationToken) {
    let config = watcher::Config::default().fields("involvedObject.kind=Pod,type=Warning");
    let tell = |event: &Occurrence| {
        let about = &event.involved_object;
        if let (Some(namespace), Some(name)) = (&about.namespace, &about.name) {
            let warning = Warning {
                reason: event.reason.clone().unwrap_or_default(),
                message: event.message.clone().unwrap_or_default(),
            };
            warned(namespace, name, warning);
        }
    };
    let changed = |change: Change<Occurrence>| match change {
        Change::All(mut all) => {
            all.sort_by_cached_key(said_at);
            all.iter().for_each(tell);
        }
        Change::Applied(event) => tell(&event),
        Change::Deleted(_) => {}
    };
    run(Api::all(client), config, changed, |_| {}, cancel).await;
}

async fn run<K: Watched>(
    api: Api<K>,
    config: watcher::Config,
    changed: impl Fn(Change<K>),
    troubled: impl Fn(Option<Trouble>),
    cancel: CancellationToken,
) {
    let mut pause = PAUSE_MIN;
    loop {
        let stream = watch(api.clone(), config.clone()).modify(|object| {
            object.managed_fields_mut().clear();
        });
        let mut stream = std::pin::pin!(stream);
        let mut listed: HashMap<(Option<String>, String), K> = HashMap::new();
        let error = loop {
            let next = tokio::select! {
                () = cancel.cancelled() => return,
                next = stream.try_next() => next,
            };
            match next {
                Ok(Some(Event::Init)) => listed.clear(),
                Ok(Some(Event::InitApply(object))) => {
                    listed.insert((object.namespace(), object.name_any()), object);
                }
                Ok(Some(Event::InitDone)) => {
                    pause = PAUSE_MIN;
                    troubled(None);
                    changed(Change::All(listed.drain().map(|(_, o)| o).collect()));
                }
                Ok(Some(Event::Apply(object))) => changed(Change::Applied(Box::new(object))),
                Ok(Some(Event::Delete(object))) => changed(Change::Deleted(Box::new(object))),
                Ok(None) => return,
                Err(error) => break error,
            }
        };
        // Listed anew and not resumed: of a kind that is quiet, nothing else would show that it is
        // watched again.
        let why = error::cut(&error);
        tracing::warn!(kind = %K::kind(&()), why, "a watch was cut; it is begun again");
        troubled(Some(Trouble {
            why,
            is_unknown: error::is_of_unknown_kind(&error),
        }));
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Objects in one part of a list, which is in memory whole: as text, and as all that was in it.
const PAGE: u32 = 50;

/// How long it is waited before a watch that was cut is begun again: at first, and at most.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(15);

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn what_happens_again_is_newer_than_what_was_first_seen_after_it() {
        let event = |version: &str, body: Value| -> Occurrence {
            let mut event = json!({
                "metadata": {
                    "resourceVersion": version,
                    "creationTimestamp": "2026-01-01T00:00:00Z",
                },
                "involvedObject": {},
            });
            for (key, value) in body.as_object().unwrap() {
                event[key] = value.clone();
            }
            serde_json::from_value(event).unwrap()
        };
        let in_order = [
            event("9", json!({})),
            event("10", json!({})),
            event("4", json!({ "lastTimestamp": "2026-01-01T00:00:01Z" })),
            event("3", json!({ "eventTime": "2026-01-01T00:00:02.000000Z" })),
            event(
                "2",
                json!({
                    "eventTime": "2026-01-01T00:00:00.000000Z",
                    "series": { "count": 2, "lastObservedTime": "2026-01-01T00:00:03.000000Z" },
                }),
            ),
            event(
                "1",
                json!({
                    "firstTimestamp": "2026-01-01T00:00:00Z",
                    "lastTimestamp": "2026-01-01T00:00:04Z",
                }),
            ),
        ];
        let times: Vec<_> = in_order.iter().map(said_at).collect();
        assert!(times.is_sorted(), "{times:?}");
    }
}
