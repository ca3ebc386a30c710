//! Custom resource definitions of others, in their published form.

use std::time::Duration;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Api, Client};
use serde_json::Value;

use crate::nats::tools_folder;

/// A definition that `cargo xtask tools crds` fetches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crd {
    /// Argo CD's `Application`.
    Application,
    /// The `DNSEndpoint` of external-dns.
    DnsEndpoint,
    /// Gateway API's `Gateway`.
    Gateway,
    /// Gateway API's `HTTPRoute`.
    HttpRoute,
}

impl Crd {
    /// Installs it, unless it is there; `false`, after saying so with [`crate::left_out`], if it is
    /// not on this machine.
    ///
    /// # Panics
    /// If the API server does not take it.
    pub async fn install(self, client: &Client) -> bool {
        let (file, name) = match self {
            Self::Application => ("application.yaml", "applications.argoproj.io"),
            Self::DnsEndpoint => ("dnsendpoint.yaml", "dnsendpoints.externaldns.k8s.io"),
            Self::Gateway => ("gateway.yaml", "gateways.gateway.networking.k8s.io"),
            Self::HttpRoute => ("httproute.yaml", "httproutes.gateway.networking.k8s.io"),
        };
        let path = tools_folder().map(|folder| folder.join("crds").join(file));
        let text = path.and_then(|path| std::fs::read_to_string(path).ok());
        let Some(text) = text else {
            crate::left_out("no custom resource definitions: `cargo xtask tools crds`");
            return false;
        };
        let definition: Value = serde_saphyr::from_str(&text).expect("a definition");
        let api: Api<CustomResourceDefinition> = Api::all(client.clone());
        let params = PatchParams::apply("tests").force();
        api.patch(name, &params, &Patch::Apply(definition))
            .await
            .expect("the definition is taken");
        let known = await_condition(api, name, conditions::is_crd_established());
        let known = tokio::time::timeout(Duration::from_secs(60), known).await;
        known.expect("it is known in time").expect("it is known");
        true
    }
}
