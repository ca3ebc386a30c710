//! HTTPRoutes and Gateways, as far as they are read here.

use std::borrow::Cow;
use std::collections::BTreeSet;

use daybook_events::Hostname;
use daybook_events::routing::{ADDRESSES_MAX, GatewayAddress};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde_json::Value;

use crate::objects::GatewayRef;

/// `httproutes.gateway.networking.k8s.io`.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct HttpRoute {
    #[serde(default)]
    metadata: ObjectMeta,
    #[serde(default)]
    pub(super) spec: Value,
    #[serde(default)]
    status: RouteStatus,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct RouteStatus {
    parents: Vec<Parent>,
}

/// What one Gateway says of a route.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Parent {
    parent_ref: ParentRef,
    conditions: Vec<Condition>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ParentRef {
    name: String,
    namespace: Option<String>,
    section_name: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
    reason: String,
    message: String,
    observed_generation: Option<i64>,
}

impl Condition {
    fn text(&self) -> String {
        format!("{} ({})", self.message.trim(), self.reason)
    }
}

/// What a Gateway has come to about a route as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It serves it.
    Taken,
    /// It does not, for this reason.
    Refused(String),
    /// It has not looked at it yet, or something is still to come, as this says.
    Waiting(String),
}

impl HttpRoute {
    /// What a Gateway says of it. What was said of an earlier generation is of no interest.
    pub(super) fn verdict(&self, gateway: &GatewayRef) -> Verdict {
        let own = self.metadata.namespace.as_deref();
        let parent = self.status.parents.iter().find(|p| {
            let of = &p.parent_ref;
            let namespace = of.namespace.as_deref().or(own);
            of.name == gateway.name
                && namespace == gateway.namespace.as_deref().or(own)
                && of.section_name == gateway.section_name
        });
        let Some(parent) = parent else {
            return silent();
        };
        let mut verdict = Verdict::Taken;
        for kind in ["Accepted", "ResolvedRefs"] {
            let condition = parent.conditions.iter().find(|c| {
                let seen = c.observed_generation;
                c.kind == kind && (seen.is_none() || seen >= self.metadata.generation)
            });
            match condition {
                Some(c) if c.status == "True" => {}
                // The cluster may be behind with the releases.
                Some(c) if c.reason == "BackendNotFound" => verdict = Verdict::Waiting(c.text()),
                Some(c) if c.status == "False" => return Verdict::Refused(c.text()),
                _ => verdict = silent(),
            }
        }
        verdict
    }
}

pub(super) fn silent() -> Verdict {
    Verdict::Waiting("it has not said anything of it".to_owned())
}

/// `gateways.gateway.networking.k8s.io`.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct GatewayObject {
    #[serde(default)]
    metadata: ObjectMeta,
    #[serde(default)]
    status: GatewayStatus,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct GatewayStatus {
    conditions: Vec<Condition>,
    addresses: Vec<StatusAddress>,
}

/// Where a Gateway is reached, as Gateway API has it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct StatusAddress {
    #[serde(rename = "type")]
    kind: Option<String>,
    value: String,
}

impl StatusAddress {
    /// What a name server can be told of it. Controllers have types of their own, which say
    /// nothing to anybody else.
    fn known(&self) -> Option<GatewayAddress> {
        match self.kind.as_deref().unwrap_or("IPAddress") {
            "IPAddress" => self.value.parse().ok().map(GatewayAddress::Ip),
            "Hostname" => {
                let name = self.value.trim_end_matches('.').to_ascii_lowercase();
                Hostname::parse(name).ok().map(GatewayAddress::Hostname)
            }
            _ => None,
        }
    }
}

impl GatewayObject {
    /// Why it serves nothing, if it says so.
    pub(super) fn unprogrammed(&self) -> Option<String> {
        let mut conditions = self.status.conditions.iter();
        let found = conditions.find(|c| c.kind == "Programmed" && c.status == "False")?;
        Some(found.text())
    }

    /// Where it says that it is reached: in order, each once, and not more than are kept.
    pub(super) fn addresses(&self) -> Vec<GatewayAddress> {
        let said = self.status.addresses.iter();
        let known: BTreeSet<_> = said.filter_map(StatusAddress::known).collect();
        known.into_iter().take(ADDRESSES_MAX).collect()
    }
}

macro_rules! resource {
    ($object:ty, $kind:literal, $plural:literal) => {
        impl kube::Resource for $object {
            type DynamicType = ();
            type Scope = NamespaceResourceScope;

            fn kind((): &()) -> Cow<'_, str> {
                $kind.into()
            }
            fn group((): &()) -> Cow<'_, str> {
                "gateway.networking.k8s.io".into()
            }
            fn version((): &()) -> Cow<'_, str> {
                "v1".into()
            }
            fn plural((): &()) -> Cow<'_, str> {
                $plural.into()
            }
            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }
            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

resource!(HttpRoute, "HTTPRoute", "httproutes");
resource!(GatewayObject, "Gateway", "gateways");

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn verdict(parents: Value) -> Verdict {
        let route = json!({
            "metadata": { "name": "x", "namespace": "own", "generation": 2 },
            "status": { "parents": parents },
        });
        let route: HttpRoute = serde_json::from_value(route).unwrap();
        let gateway = GatewayRef {
            name: "public".to_owned(),
            namespace: Some("edge".to_owned()),
            section_name: None,
        };
        route.verdict(&gateway)
    }

    fn parent(name: &str, accepted: &str, resolved: &str, generation: i64) -> Value {
        let condition = |kind: &str, status: &str| {
            json!({
                "type": kind,
                "status": status,
                "reason": "Because",
                "message": "said so",
                "observedGeneration": generation,
            })
        };
        json!({
            "parentRef": { "name": name, "namespace": "edge" },
            "controllerName": "example.com/gateway",
            "conditions": [condition("Accepted", accepted), condition("ResolvedRefs", resolved)],
        })
    }

    #[test]
    fn a_gateway_is_reached_where_its_status_says_and_nowhere_else() {
        let gateway = |addresses: Value| -> GatewayObject {
            let status = json!({ "addresses": addresses });
            serde_json::from_value(json!({ "status": status })).unwrap()
        };
        let said = gateway(json!([
            { "type": "Hostname", "value": "LB-1.example.net." },
            { "value": "2001:db8::7" },
            { "type": "IPAddress", "value": "203.0.113.7" },
            { "type": "IPAddress", "value": "203.0.113.7" },
            { "type": "IPAddress", "value": "the usual one" },
            { "type": "Hostname", "value": "no name" },
            { "type": "example.com/pool", "value": "blue" },
        ]));
        let said: Vec<_> = said.addresses().iter().map(ToString::to_string).collect();
        assert_eq!(said, ["203.0.113.7", "2001:db8::7", "lb-1.example.net"]);
        let none: GatewayObject = serde_json::from_value(json!({})).unwrap();
        assert!(none.addresses().is_empty());
    }

    #[test]
    fn what_the_gateway_says_of_the_route_as_it_is_now_counts() {
        let mut behind = json!([parent("public", "True", "False", 2)]);
        behind[0]["conditions"][1]["reason"] = json!("BackendNotFound");
        let refused = Verdict::Refused("said so (Because)".to_owned());
        for (parents, expected) in [
            (json!([]), silent()),
            (json!([parent("other", "False", "True", 2)]), silent()),
            (json!([parent("public", "True", "True", 1)]), silent()),
            (json!([parent("public", "Unknown", "True", 2)]), silent()),
            (json!([parent("public", "True", "True", 2)]), Verdict::Taken),
            (
                json!([parent("public", "True", "False", 2)]),
                refused.clone(),
            ),
            (json!([parent("public", "False", "True", 2)]), refused),
            (
                behind,
                Verdict::Waiting("said so (BackendNotFound)".to_owned()),
            ),
        ] {
            assert_eq!(verdict(parents.clone()), expected, "{parents}");
        }
    }
}
