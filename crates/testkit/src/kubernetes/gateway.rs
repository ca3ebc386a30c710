//! What a controller of Gateways does with HTTPRoutes, without one.
//!
//! The shapes are those of Gateway API 1.6: conditions for each parent, with the generation that
//! they are about.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

/// Between two looks at the routes.
const EVERY: Duration = Duration::from_millis(50);

/// Stands in for the controller of one Gateway, until it is dropped.
#[derive(Debug)]
pub struct Gateway(JoinHandle<()>);

impl Drop for Gateway {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Gateway {
    /// Makes a Gateway and takes the routes that are attached to it; `refuses` may say why it does
    /// not take one.
    ///
    /// # Panics
    /// If the API server does not take the Gateway.
    pub async fn start(
        client: Client,
        namespace: &str,
        name: &str,
        refuses: impl Fn(&Value) -> Option<String> + Send + Sync + 'static,
    ) -> Self {
        let api = |kind: &str| -> Api<DynamicObject> {
            let kind = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", kind);
            let resource = ApiResource::from_gvk(&kind);
            match kind.kind.as_str() {
                "Gateway" => Api::namespaced_with(client.clone(), namespace, &resource),
                _ => Api::all_with(client.clone(), &resource),
            }
        };
        let gateway = json!({
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "Gateway",
            "metadata": { "name": name, "namespace": namespace },
            "spec": {
                "gatewayClassName": "played",
                "listeners": [{ "name": "http", "port": 80, "protocol": "HTTP" }],
            },
        });
        let gateway: DynamicObject = serde_json::from_value(gateway).expect("a Gateway");
        let created = api("Gateway")
            .create(&PostParams::default(), &gateway)
            .await;
        created.expect("the Gateway is taken");
        let programmed = json!({ "status": { "conditions": [
            condition("Accepted", None, 1),
            condition("Programmed", None, 1),
        ]}});
        let params = PatchParams::default();
        let patch = Patch::Merge(programmed);
        let patched = api("Gateway").patch_status(name, &params, &patch).await;
        patched.expect("its status is taken");
        let routes = api("HTTPRoute");
        let own = json!({ "name": name, "namespace": namespace });
        Self(tokio::spawn(async move {
            loop {
                let all = routes.list(&ListParams::default()).await;
                for route in all.into_iter().flatten() {
                    if let Some(status) = status(&route, &own, &refuses) {
                        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(
                            "gateway.networking.k8s.io",
                            "v1",
                            "HTTPRoute",
                        ));
                        let namespace = route.namespace().unwrap_or_default();
                        let api: Api<DynamicObject> =
                            Api::namespaced_with(client.clone(), &namespace, &resource);
                        let patch = Patch::Merge(json!({ "status": status }));
                        let params = PatchParams::default();
                        // What could not be written is written at the next look.
                        let _ = api.patch_status(&route.name_any(), &params, &patch).await;
                    }
                }
                tokio::time::sleep(EVERY).await;
            }
        }))
    }
}

/// Has a Gateway say in its status where it is reached: `(type, value)` each.
///
/// # Panics
/// If the API server does not take the status.
pub async fn reach(client: Client, namespace: &str, name: &str, addresses: &[(&str, &str)]) {
    let kind = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", "Gateway");
    let resource = ApiResource::from_gvk(&kind);
    let api: Api<DynamicObject> = Api::namespaced_with(client, namespace, &resource);
    let addresses = addresses.iter();
    let addresses = addresses.map(|(kind, value)| json!({ "type": kind, "value": value }));
    let status = json!({ "status": { "addresses": addresses.collect::<Vec<_>>() } });
    let (params, patch) = (PatchParams::default(), Patch::Merge(status));
    let patched = api.patch_status(name, &params, &patch).await;
    patched.expect("its addresses are taken");
}

/// The status of a route of this Gateway, unless it has it already.
fn status(
    route: &DynamicObject,
    gateway: &Value,
    refuses: &(impl Fn(&Value) -> Option<String> + ?Sized),
) -> Option<Value> {
    let parent = &route.data["spec"]["parentRefs"][0];
    let generation = route.metadata.generation.unwrap_or_default();
    let refused = refuses(&route.data);
    let known = &route.data["status"]["parents"][0]["conditions"][0];
    let is_known = known["observedGeneration"] == generation
        && (known["status"] == "False") == refused.is_some();
    let is_other = ["name", "namespace"]
        .into_iter()
        .any(|key| parent[key] != gateway[key]);
    if is_other || is_known {
        return None;
    }
    Some(json!({ "parents": [{
        "parentRef": parent,
        "controllerName": "example.com/played",
        "conditions": [
            condition("Accepted", refused, generation),
            condition("ResolvedRefs", None, generation),
        ],
    }]}))
}

fn condition(kind: &str, refused: Option<String>, generation: i64) -> Value {
    json!({
        "type": kind,
        "status": if refused.is_some() { "False" } else { "True" },
        "reason": if refused.is_some() { "NotAllowedByListeners" } else { kind },
        "message": refused.unwrap_or_default(),
        "observedGeneration": generation,
        "lastTransitionTime": format!("{:.0}", Timestamp::now()),
    })
}
