//! Ingresses of others that serve hostnames which are led here: read, and never written.

use std::collections::{BTreeSet, HashMap};

use daybook_events::Hostname;
use daybook_events::routing::{INGRESSES_MAX, IngressSeen, Ingresses};
use daybook_workers::host_routes::HostRoutes;
use daybook_workers::target::TargetError;
use k8s_openapi::api::networking::v1::{Ingress, IngressBackend, IngressRule};
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};

use crate::apply::timely;
use crate::error::refusal;

/// How many Ingresses are read at once, and how often at most.
const PAGE: u32 = 100;
const PAGES: usize = 100;
/// The most places that one of them is said to lead to, and the most characters of each.
const BACKENDS_MAX: usize = 8;
const BACKEND_MAX: usize = 150;
/// The most bytes that Ingresses take in a report, which has others besides, and a bound itself.
const BYTES_MAX: usize = 16 * 1024;

/// The Ingresses that serve hostnames of a project as well. Nothing where the API server gives no
/// answer that would be the same the next time.
pub(crate) async fn seen(client: &Client, routes: &HostRoutes) -> Option<Ingresses> {
    if routes.hosts.is_empty() {
        return Some(Ingresses::default());
    }
    let wanted = Wanted::new(routes.hosts.iter().map(|host| &host.hostname));
    let what = "the Ingresses that serve hostnames as well";
    let api: Api<Ingress> = Api::all(client.clone());
    let mut list = ListParams::default().limit(PAGE);
    let mut found = BTreeSet::new();
    for _ in 0..PAGES {
        let page = timely(what, api.list(&list)).await;
        let page = match page.and_then(|page| page.map_err(|e| refusal(what, &e))) {
            Ok(page) => page,
            Err(TargetError::Refused(why)) => {
                let why = why.chars().take(WHY_MAX).collect();
                return Some(Ingresses::Unread(why));
            }
            Err(error) => {
                tracing::debug!(%error, "Ingresses were not read");
                return None;
            }
        };
        for ingress in &page.items {
            found.extend(wanted.served_by(ingress));
            while found.len() > INGRESSES_MAX {
                found.pop_last();
            }
        }
        match page.metadata.continue_.filter(|next| !next.is_empty()) {
            Some(next) => list = list.continue_token(&next),
            None => return Some(Ingresses::Seen(first(found))),
        }
    }
    let many = PAGE as usize * PAGES;
    Some(Ingresses::Unread(format!("there are more than {many}")))
}

/// The most characters of a reason that are reported.
const WHY_MAX: usize = 500;

/// As many of them as a report has place for, in order.
fn first(found: BTreeSet<IngressSeen>) -> Vec<IngressSeen> {
    let mut bytes = 0;
    let fits = |seen: &IngressSeen| {
        bytes += serde_json::to_vec(seen).map_or(BYTES_MAX, |json| json.len());
        bytes <= BYTES_MAX
    };
    let first = found.into_iter().take(INGRESSES_MAX);
    first.take_while(fits).collect()
}

/// The hostnames that are looked for, and those right below each name.
struct Wanted<'a> {
    below: HashMap<&'a str, Vec<&'a Hostname>>,
}

impl<'a> Wanted<'a> {
    fn new(hostnames: impl Iterator<Item = &'a Hostname>) -> Self {
        let mut below: HashMap<_, Vec<_>> = HashMap::new();
        for hostname in hostnames {
            let parent = hostname.as_str().split_once('.').map_or("", |(_, p)| p);
            below.entry(parent).or_default().push(hostname);
        }
        Self { below }
    }

    /// The hostnames that a rule is for. A wildcard stands for one label. A rule without a host is
    /// for whatever nobody else serves.
    fn of(&self, host: &str) -> impl Iterator<Item = &'a Hostname> {
        let (first, parent) = host.split_once('.').unwrap_or((host, ""));
        let is_any = first == "*";
        let siblings = self.below.get(parent).into_iter().flatten().copied();
        siblings.filter(move |hostname| is_any || hostname.as_str() == host)
    }

    fn served_by(&self, ingress: &Ingress) -> Vec<IngressSeen> {
        let Some(spec) = &ingress.spec else {
            return Vec::new();
        };
        let mut served = Vec::new();
        for rule in spec.rules.iter().flatten() {
            for hostname in rule.host.iter().flat_map(|host| self.of(host)) {
                served.push(IngressSeen {
                    hostname: hostname.clone(),
                    namespace: ingress.namespace().unwrap_or_default(),
                    name: ingress.name_any(),
                    backends: backends(rule, spec.default_backend.as_ref()),
                });
            }
        }
        served
    }
}

/// Where a rule leads, each once.
fn backends(rule: &IngressRule, default: Option<&IngressBackend>) -> Vec<String> {
    let paths = rule.http.iter().flat_map(|http| &http.paths);
    let of_paths: BTreeSet<_> = paths.map(|path| text(&path.backend)).collect();
    match of_paths.is_empty() {
        true => default.map(text).into_iter().collect(),
        false => of_paths.into_iter().take(BACKENDS_MAX).collect(),
    }
}

/// A backend in a word. That of a Service has bounds; another kind's may be called anything.
fn text(backend: &IngressBackend) -> String {
    named(backend).chars().take(BACKEND_MAX).collect()
}

fn named(backend: &IngressBackend) -> String {
    if let Some(service) = &backend.service {
        let port = service.port.as_ref();
        let port = port.and_then(|p| p.name.clone().or_else(|| Some(p.number?.to_string())));
        return match port {
            Some(port) => format!("{}:{port}", service.name),
            None => service.name.clone(),
        };
    }
    let resource = backend.resource.as_ref();
    resource.map_or_else(String::new, |r| format!("{}/{}", r.kind, r.name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_said_of_ingresses_has_bounds_whatever_they_lead_to() {
        // Written with six bytes each.
        let long = "\u{1}".repeat(1_000);
        let paths = (0..20).map(|n| {
            let resource = json!({ "apiGroup": "example.com", "kind": format!("K{n:02}{long}"), "name": long });
            json!({ "path": "/", "pathType": "Prefix", "backend": { "resource": resource } })
        });
        let paths: Vec<_> = paths.collect();
        let ingress = |n: usize| -> Ingress {
            let rule = json!({ "host": "shop.example.com", "http": { "paths": paths } });
            let ingress = json!({
                "metadata": { "name": format!("i{n:02}"), "namespace": "theirs" },
                "spec": { "rules": [rule] },
            });
            serde_json::from_value(ingress).unwrap()
        };
        let hostname: Hostname = "shop.example.com".parse().unwrap();
        let wanted = Wanted::new([&hostname].into_iter());
        let all: BTreeSet<_> = (0..40)
            .flat_map(|n| wanted.served_by(&ingress(n)))
            .collect();
        assert_eq!(all.len(), 40);
        let one = all.first().unwrap();
        assert_eq!(one.backends.len(), BACKENDS_MAX);
        assert!(
            one.backends
                .iter()
                .all(|b| b.chars().count() == BACKEND_MAX)
        );
        let said = first(all.clone());
        assert_eq!(said.first(), all.first());
        assert!(serde_json::to_vec(&said).unwrap().len() < 2 * BYTES_MAX);
        // What is usual is said, all of it.
        let usual = all.into_iter().map(|mut seen| {
            seen.backends = vec!["web:80".to_owned()];
            seen
        });
        assert_eq!(first(usual.collect()).len(), INGRESSES_MAX);
    }
}
