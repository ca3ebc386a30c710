//! Releases that Argo CD is to leave alone although the commit that it syncs does not list them any
//! more: their objects say so themselves, as long as they are kept.

use std::collections::HashSet;

use daybook_workers::target::TargetError;
use kube::ResourceExt;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::apply::{Space, timely};
use crate::error::refusal;
use crate::names::MANAGER;
use crate::objects::Kind;

/// The label by which kept objects are found again.
const KEPT: &str = "daybook.dev/kept";
/// Has Argo CD not remove an object.
const SYNC_OPTIONS: &str = "argocd.argoproj.io/sync-options";
/// Has it take the Application for synced all the same.
const COMPARE_OPTIONS: &str = "argocd.argoproj.io/compare-options";

/// What Argo CD makes of a release.
pub(crate) const KINDS: [Kind; 6] = [
    Kind::HTTP_ROUTE,
    Kind::SERVICE,
    Kind::DEPLOYMENT,
    Kind::AUTOSCALER,
    Kind::DISRUPTION_BUDGET,
    Kind::CONFIG_MAP,
];

/// Has Argo CD leave these objects alone, as far as they are there.
pub(crate) async fn keep(
    space: &Space<'_>,
    objects: &HashSet<(Kind, String)>,
) -> Result<(), TargetError> {
    let marks = json!({ "metadata": {
        "labels": { KEPT: "true" },
        "annotations": { SYNC_OPTIONS: "Prune=false", COMPARE_OPTIONS: "IgnoreExtraneous" },
    }});
    for (kind, name) in objects {
        mark(space, *kind, name, &marks).await?;
    }
    Ok(())
}

/// What was kept so far, by kind and name. Among what only charts make it is looked for where there
/// are any, or a release of one was kept.
pub(crate) async fn kept(
    space: &Space<'_>,
    has_charts: bool,
) -> Result<Vec<(Kind, String)>, TargetError> {
    let mut kept = kept_of(space, &KINDS).await?;
    let is_of_chart =
        |(kind, name): &(Kind, String)| *kind == Kind::CONFIG_MAP && name.ends_with("-chart");
    if has_charts || kept.iter().any(is_of_chart) {
        kept.extend(kept_of(space, &Kind::OF_CHARTS).await?);
    }
    Ok(kept)
}

async fn kept_of(space: &Space<'_>, kinds: &[Kind]) -> Result<Vec<(Kind, String)>, TargetError> {
    let list = ListParams::default().labels(KEPT);
    let mut kept = Vec::new();
    for kind in kinds {
        let kind = *kind;
        let what = format!("the {} of namespace {}", kind.plural, space.namespace);
        let found = match timely(&what, space.objects(kind).list_metadata(&list)).await? {
            // A cluster that does not know the kind has none of it.
            Err(kube::Error::Api(status)) if status.code == 404 => continue,
            Err(kube::Error::Api(status)) if status.code == 403 && kind.is_spare() => continue,
            found => found.map_err(|e| refusal(&what, &e))?,
        };
        kept.extend(found.iter().map(|object| (kind, object.name_any())));
    }
    Ok(kept)
}

/// Leaves objects to Argo CD again.
pub(crate) async fn let_go(
    space: &Space<'_>,
    objects: &[(Kind, String)],
) -> Result<(), TargetError> {
    let none = json!({ "metadata": {
        "labels": { KEPT: null },
        "annotations": { SYNC_OPTIONS: null, COMPARE_OPTIONS: null },
    }});
    for (kind, name) in objects {
        mark(space, *kind, name, &none).await?;
    }
    Ok(())
}

async fn mark(space: &Space<'_>, kind: Kind, name: &str, marks: &Value) -> Result<(), TargetError> {
    let what = format!("{} {name}", kind.kind);
    // Not the manager that applies: what it does not apply, it would take away.
    let params = PatchParams {
        field_manager: Some(format!("{MANAGER}-keep")),
        ..PatchParams::default()
    };
    let api = space.objects(kind);
    match timely(&what, api.patch(name, &params, &Patch::Merge(marks))).await? {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 403 && kind.is_spare() => Ok(()),
        Err(e) => Err(refusal(&what, &e)),
    }
}
