//! Which deployment, and which of its clusters, a request goes to.
//!
//! First a deployment is chosen, by weight among those that have a ready instance anywhere; then
//! one of its clusters, by the policy among those that have one. The rest follows in an order in
//! which it may stand in, should the chosen one turn out not to be reachable.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use daybook_events::routing::ClusterPolicy;
use daybook_events::{ClusterName, DeploymentId};

use super::counters::Counter;
use super::endpoint::Endpoint;

/// Under [`ClusterPolicy::Latency`], one request in so many goes to a cluster that is not the
/// fastest, so that it is known when that becomes faster.
const MEASURE_EVERY: u64 = 16;

/// A route with everything that a request needs.
#[derive(Debug)]
pub(super) struct LiveRoute {
    backends: Vec<LiveBackend>,
    turn: Turn,
}

/// A deployment's part of a route.
#[derive(Debug)]
pub(super) struct LiveBackend {
    weight: u64,
    clusters: Vec<OnCluster>,
    spread: Spread,
    turn: Turn,
}

/// A deployment on one cluster.
#[derive(Debug)]
pub(super) struct OnCluster {
    pub(super) deployment: DeploymentId,
    pub(super) cluster: ClusterName,
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) counter: Arc<Counter>,
}

/// How a cluster is chosen.
#[derive(Debug)]
enum Spread {
    /// By these weights, one for each cluster.
    ByWeight(Vec<u64>),
    /// In the order in which they stand.
    InOrder,
    /// By what is measured.
    Fastest,
}

/// What to try for one request.
pub(super) struct Candidates<'a> {
    /// What the request is for, whether it can be reached or not.
    pub(super) chosen: &'a OnCluster,
    /// In this order: all addresses there, then those of others that may stand in.
    pub(super) addresses: Vec<(&'a OnCluster, SocketAddr)>,
}

impl LiveRoute {
    pub(super) fn new(backends: Vec<LiveBackend>) -> Self {
        Self {
            backends,
            turn: Turn::default(),
        }
    }

    /// What to try for the next request; `None` if the route has no backend at all.
    pub(super) fn candidates(&self) -> Option<Candidates<'_>> {
        let sharing = self.backends.iter().filter(|b| b.weight > 0);
        let mut ready: Vec<_> = sharing.clone().filter(|b| b.is_ready()).collect();
        if ready.len() > 1 {
            let weights = ready.iter().map(|b| b.weight);
            let chosen = choose(self.turn.next(), weights);
            ready[..=chosen].rotate_right(1);
        }
        // Only what is chosen takes its turn; the others may stand in.
        let order = ready.into_iter().enumerate().flat_map(|(i, backend)| {
            let turn = match i {
                0 => backend.turn.next(),
                _ => backend.turn.now(),
            };
            backend.order(turn)
        });
        let addresses: Vec<_> = order
            .flat_map(|on| on.endpoint.addresses().into_iter().map(move |a| (on, a)))
            .collect();
        let first_listed = || {
            let mut listed = sharing.chain(&self.backends).flat_map(|b| &b.clusters);
            listed.next()
        };
        let chosen = addresses.first().map(|(on, _)| *on).or_else(first_listed)?;
        Some(Candidates { chosen, addresses })
    }
}

impl LiveBackend {
    /// A deployment on these clusters, among which the policy chooses.
    pub(super) fn new(mut clusters: Vec<OnCluster>, weight: u32, policy: &ClusterPolicy) -> Self {
        let spread = match policy {
            ClusterPolicy::Simple => Spread::ByWeight(vec![1; clusters.len()]),
            ClusterPolicy::Weighted(weights) => {
                let weight = |on: &OnCluster| weights.get(&on.cluster).copied().unwrap_or(0);
                Spread::ByWeight(clusters.iter().map(|on| weight(on).into()).collect())
            }
            ClusterPolicy::Failover(order) => {
                let place = |on: &OnCluster| order.iter().position(|c| *c == on.cluster);
                clusters.sort_by_key(|on| place(on).unwrap_or(usize::MAX));
                Spread::InOrder
            }
            ClusterPolicy::Latency => Spread::Fastest,
        };
        Self {
            weight: weight.into(),
            clusters,
            spread,
            turn: Turn::default(),
        }
    }

    fn is_ready(&self) -> bool {
        self.clusters.iter().any(|on| on.endpoint.is_ready())
    }

    /// Its clusters that have a ready instance, in the order in which they are to be tried.
    fn order(&self, turn: u64) -> Vec<&OnCluster> {
        let mut ready: Vec<_> = (0..self.clusters.len())
            .filter(|i| self.clusters[*i].endpoint.is_ready())
            .collect();
        if ready.len() > 1 {
            match &self.spread {
                Spread::InOrder => {}
                Spread::ByWeight(weights) => {
                    // One without a weight stands in for the others only.
                    ready.sort_by_key(|i| weights[*i] == 0);
                    let weighted = ready.iter().map(|i| weights[*i]);
                    let chosen = choose(turn, weighted);
                    ready[..=chosen].rotate_right(1);
                }
                Spread::Fastest => self.by_latency(turn, &mut ready),
            }
        }
        ready.into_iter().map(|i| &self.clusters[i]).collect()
    }

    /// What was never measured comes first, then the fastest; now and then another one does.
    fn by_latency(&self, turn: u64, ready: &mut [usize]) {
        ready.sort_by_key(|i| self.clusters[*i].endpoint.latency());
        if turn % MEASURE_EVERY == MEASURE_EVERY - 1 {
            let others = ready.len() as u64 - 1;
            let other = 1 + (turn / MEASURE_EVERY) % others;
            ready[..=other as usize].rotate_right(1);
        }
    }
}

/// Counts choices.
#[derive(Debug, Default)]
struct Turn(AtomicU64);

impl Turn {
    fn next(&self) -> u64 {
        self.0.fetch_add(1, Relaxed)
    }

    fn now(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// An index by weight: a Weyl sequence, which keeps to the shares even over few turns. The first,
/// if none has a weight.
fn choose(turn: u64, weights: impl Iterator<Item = u64> + Clone) -> usize {
    let total: u64 = weights.clone().sum();
    let step = turn.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut point = ((step >> 32) * total) >> 32;
    for (i, weight) in weights.enumerate() {
        if point < weight {
            return i;
        }
        point -= weight;
    }
    0
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use uuid::Uuid;

    use super::super::endpoint::Known;
    use super::*;

    fn cluster(name: &str) -> ClusterName {
        ClusterName::parse(name).unwrap()
    }

    /// A deployment with one instance on each of these clusters.
    fn on(deployment: u128, clusters: &[&str]) -> Vec<OnCluster> {
        let clusters = clusters.iter().map(|name| OnCluster {
            deployment: DeploymentId(Uuid::from_u128(deployment)),
            cluster: cluster(name),
            endpoint: Arc::new(endpoint(true)),
            counter: Arc::default(),
        });
        clusters.collect()
    }

    fn endpoint(ready: bool) -> Endpoint {
        let endpoint = Endpoint::default();
        endpoint.set(instances(ready));
        endpoint
    }

    fn instances(ready: bool) -> Known {
        let one = SocketAddr::from(([127, 0, 0, 1], 9));
        Known {
            addresses: ready.then_some(one).into_iter().collect(),
            why_none: "it is stopped".into(),
        }
    }

    /// How often each deployment and cluster is chosen.
    fn chosen(route: &LiveRoute, times: usize) -> BTreeMap<(u128, String), usize> {
        let mut seen = BTreeMap::new();
        for _ in 0..times {
            let on = route.candidates().unwrap().chosen;
            let key = (on.deployment.0.as_u128(), on.cluster.to_string());
            *seen.entry(key).or_default() += 1;
        }
        seen
    }

    fn share(seen: &BTreeMap<(u128, String), usize>, deployment: u128, cluster: &str) -> usize {
        let key = (deployment, cluster.to_owned());
        seen.get(&key).copied().unwrap_or_default()
    }

    #[test]
    fn deployments_share_by_weight_however_many_clusters_they_run_on() {
        let simple = ClusterPolicy::Simple;
        let route = LiveRoute::new(vec![
            LiveBackend::new(on(1, &["a", "b"]), 90, &simple),
            LiveBackend::new(on(2, &["a"]), 10, &simple),
        ]);
        let seen = chosen(&route, 1000);
        assert!(share(&seen, 2, "a").abs_diff(100) <= 2, "{seen:?}");
        assert!(share(&seen, 1, "a").abs_diff(450) <= 5, "{seen:?}");
        assert!(share(&seen, 1, "b").abs_diff(450) <= 5, "{seen:?}");
        // Even a few requests keep to the shares.
        let mut tens = (0..20).map(|_| share(&chosen(&route, 20), 2, "a"));
        assert!(tens.all(|n| (1..=3).contains(&n)));
    }

    #[test]
    fn what_is_stopped_or_has_no_weight_gets_nothing() {
        let simple = ClusterPolicy::Simple;
        let stopped = on(1, &["a"]);
        let endpoint = stopped[0].endpoint.clone();
        let route = LiveRoute::new(vec![
            LiveBackend::new(stopped, 90, &simple),
            LiveBackend::new(on(2, &["a"]), 10, &simple),
            LiveBackend::new(on(3, &["a"]), 0, &simple),
        ]);
        endpoint.set(instances(false));
        for _ in 0..100 {
            let candidates = route.candidates().unwrap();
            assert_eq!(candidates.chosen.deployment.0.as_u128(), 2);
            assert_eq!(candidates.addresses.len(), 1);
        }
        endpoint.set(instances(true));
        let seen = chosen(&route, 100);
        assert!(share(&seen, 1, "a").abs_diff(90) <= 2, "{seen:?}");
        assert_eq!(share(&seen, 3, "a"), 0);
    }

    #[test]
    fn clusters_share_by_weight_and_the_rest_stands_in() {
        let weights = [("a", 3), ("b", 1), ("c", 0)];
        let weights = weights.map(|(name, weight)| (cluster(name), weight));
        let policy = ClusterPolicy::Weighted(weights.into_iter().collect());
        let clusters = on(1, &["a", "b", "c", "d"]);
        let endpoints: Vec<_> = clusters.iter().map(|on| on.endpoint.clone()).collect();
        let route = LiveRoute::new(vec![LiveBackend::new(clusters, 1, &policy)]);
        let seen = chosen(&route, 400);
        assert!(share(&seen, 1, "a").abs_diff(300) <= 3, "{seen:?}");
        assert!(share(&seen, 1, "b").abs_diff(100) <= 3, "{seen:?}");
        endpoints[0].set(instances(false));
        assert_eq!(share(&chosen(&route, 50), 1, "b"), 50);
        endpoints[1].set(instances(false));
        let seen = chosen(&route, 50);
        assert_eq!(share(&seen, 1, "c") + share(&seen, 1, "d"), 50);
    }

    #[test]
    fn the_next_cluster_serves_only_while_the_one_before_has_no_ready_instance() {
        let policy = ClusterPolicy::Failover(vec![cluster("b"), cluster("a")]);
        let clusters = on(1, &["a", "b", "c"]);
        let endpoints: Vec<_> = clusters.iter().map(|on| on.endpoint.clone()).collect();
        let route = LiveRoute::new(vec![LiveBackend::new(clusters, 1, &policy)]);
        let only = |name: &str| assert_eq!(share(&chosen(&route, 20), 1, name), 20, "{name}");
        only("b");
        endpoints[1].set(instances(false));
        only("a");
        endpoints[0].set(instances(false));
        only("c");
        endpoints[1].set(instances(true));
        only("b");
        // The others are tried if it turns out not to be reachable.
        let order = route.candidates().unwrap().addresses;
        let order: Vec<_> = order.iter().map(|(on, _)| on.cluster.as_str()).collect();
        assert_eq!(order, ["b", "c"]);
    }

    #[test]
    fn the_fastest_cluster_serves_and_the_others_are_measured_now_and_then() {
        let clusters = on(1, &["a", "b"]);
        let endpoints: Vec<_> = clusters.iter().map(|on| on.endpoint.clone()).collect();
        let route = LiveRoute::new(vec![LiveBackend::new(clusters, 1, &ClusterPolicy::Latency)]);
        endpoints[0].answered_after(Duration::from_millis(9));
        // What was never measured is.
        assert_eq!(route.candidates().unwrap().chosen.cluster.as_str(), "b");
        endpoints[1].answered_after(Duration::from_millis(3));
        let seen = chosen(&route, 160);
        assert_eq!((share(&seen, 1, "a"), share(&seen, 1, "b")), (10, 150));
        for _ in 0..50 {
            endpoints[1].answered_after(Duration::from_millis(30));
        }
        let seen = chosen(&route, 160);
        assert_eq!((share(&seen, 1, "a"), share(&seen, 1, "b")), (150, 10));
    }

    #[test]
    fn a_route_without_a_ready_instance_still_names_what_it_is_for() {
        let clusters = on(1, &["a"]);
        clusters[0].endpoint.set(instances(false));
        let route = LiveRoute::new(vec![LiveBackend::new(clusters, 1, &ClusterPolicy::Simple)]);
        let candidates = route.candidates().unwrap();
        assert_eq!(candidates.chosen.endpoint.why_none(), "it is stopped");
        assert!(candidates.addresses.is_empty());
        assert!(LiveRoute::new(Vec::new()).candidates().is_none());
    }
}
