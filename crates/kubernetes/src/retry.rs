//! Has a workload that Kubernetes gave up try again, without touching what is ready of it.

use daybook_workers::target::TargetError;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;

use crate::apply::timely;
use crate::error::refusal;
use crate::names::MANAGER;

/// Gives a workload its whole deadline again, and has the pods that are not ready made anew: what a
/// kubelet waits for longer each time begins from the start.
///
/// Once the deadline has passed, the controller of Deployments never takes that back by itself
/// while nothing moves. Its condition is the only place where the time is kept, so that is what is
/// set; nothing of the specification changes.
pub(crate) async fn again(
    client: &Client,
    namespace: &str,
    workload: &str,
    unready: &[String],
) -> Result<(), TargetError> {
    let what = format!("status of Deployment {workload}");
    let workloads: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    let now = format!("{:.0}", Timestamp::now());
    let patch = Patch::Strategic(json!({ "status": { "conditions": [{
        "type": "Progressing",
        "status": "True",
        "reason": "TriedAgain",
        "message": "Daybook was asked to try again.",
        "lastUpdateTime": now,
        "lastTransitionTime": now,
    }]}}));
    let params = PatchParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let patched = timely(&what, workloads.patch_status(workload, &params, &patch)).await?;
    patched.map_err(|e| refusal(&what, &e))?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    for pod in unready {
        let what = format!("pod {pod}");
        match timely(&what, pods.delete(pod, &DeleteParams::default())).await? {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(e) => return Err(refusal(&what, &e)),
        }
    }
    Ok(())
}
