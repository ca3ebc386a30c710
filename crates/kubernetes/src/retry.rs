//! Has a workload that Kubernetes gave up try again, without touching what is ready of it.

use daybook_workers::target::TargetError;
use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimeParser;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, GetParams, Patch, PatchParams};
use kube::client::Body;
use kube::core::Request;
use kube::{Api, Client};
use serde_json::json;

use crate::apply::timely;
use crate::error::refusal;
use crate::names::MANAGER;

/// Gives a workload its whole deadline again.
///
/// Once the deadline has passed, the controller of Deployments never takes that back by itself
/// while nothing moves. Its condition is the only place where the time is kept, so that is what is
/// set; nothing of the specification changes. The deadline is counted from that time by the cluster,
/// and so it is the cluster's: a clock here that is behind by a deadline would have every try fail
/// at once, one that is ahead would have it never fail.
pub(crate) async fn again(
    client: &Client,
    namespace: &str,
    workload: &str,
) -> Result<(), TargetError> {
    let what = format!("status of Deployment {workload}");
    let workloads: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    let now = format!("{:.0}", time_there(client, namespace).await?);
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
    patched.map(|_| ()).map_err(|e| refusal(&what, &e))
}

/// Has the pods that are not ready made anew: what a kubelet waits for longer each time begins from
/// the start.
pub(crate) async fn anew(
    client: &Client,
    namespace: &str,
    unready: &[String],
) -> Result<(), TargetError> {
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

/// What time it is by the clock of the API server, to the second, as its answers say (`Date`). One
/// that says nothing leaves it to the clock here.
async fn time_there(client: &Client, namespace: &str) -> Result<Timestamp, TargetError> {
    let what = format!("namespace {namespace}");
    let request = Request::new("/api/v1/namespaces").get(namespace, &GetParams::default());
    let request = request.map_err(|e| TargetError::Refused(format!("{what}: {e}")))?;
    // Whatever is answered, it is dated.
    let answer = timely(&what, client.send(request.map(Body::from))).await?;
    let answer = answer.map_err(|e| refusal(&what, &e))?;
    let date = answer.headers().get("date");
    let said = date.and_then(|date| {
        let date = date.to_str().ok()?;
        DateTimeParser::new().parse_timestamp(date).ok()
    });
    Ok(said.unwrap_or_else(Timestamp::now))
}
