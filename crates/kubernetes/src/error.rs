//! What an API server refuses, in words that say what to do.

use daybook_workers::target::TargetError;
use kube::core::Status;

/// Why a cluster could not be reached at start.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kubeconfig cannot be used.
    #[error("the kubeconfig cannot be used")]
    Config(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The API server took the request and gave no answer.
    #[error("the API server gave no answer in time")]
    Silent,
    /// The API server gave no answer, or not a fitting one.
    #[error("the API server does not answer")]
    Api(#[source] kube::Error),
}

/// What an error of the API server means for who applies `what`.
pub(crate) fn refusal(what: &str, error: &kube::Error) -> TargetError {
    match error {
        kube::Error::Api(status) => refused(what, status),
        other => TargetError::Unavailable(format!(
            "{what}: the API server gave no answer: {}",
            daybook_events::with_causes(other)
        )),
    }
}

fn refused(what: &str, status: &Status) -> TargetError {
    let message = &status.message;
    match status.code {
        409 if status.reason == "Conflict" && has_cause(status, "FieldManagerConflict") => {
            TargetError::Refused(format!(
                "{what}: somebody else has set fields that Daybook is to set: {}. Undo that, or \
                 take those fields from their manager (kubectl apply --server-side \
                 --force-conflicts --field-manager=daybook)",
                conflicts(status)
            ))
        }
        403 if has_cause(status, "NamespaceTerminating") => TargetError::Unavailable(format!(
            "{what}: its namespace is still being deleted: {message}"
        )),
        403 => TargetError::Refused(format!(
            "{what}: not allowed: {message}. Give the account that Daybook uses there this right"
        )),
        404 if status.reason == "NotFound" && has_no_name(status) => TargetError::Refused(format!(
            "{what}: the cluster does not know this kind of object. Install the custom resource \
             definitions that it belongs to"
        )),
        400 | 404 | 405 | 406 | 413 | 415 | 422 => {
            TargetError::Refused(format!("{what}: {message}"))
        }
        code => TargetError::Unavailable(format!("{what}: the API server says {code}: {message}")),
    }
}

/// Whether the account has no right to that, or the cluster does not know this kind of object.
pub(crate) fn is_denied(error: &kube::Error) -> bool {
    let kube::Error::Api(status) = error else {
        return false;
    };
    match status.code {
        403 => !has_cause(status, "NamespaceTerminating"),
        404 => has_no_name(status),
        _ => false,
    }
}

/// Whether somebody else has set this field, and no other that is to be set.
pub(crate) fn conflicts_in(error: &kube::Error, field: &str) -> bool {
    let kube::Error::Api(status) = error else {
        return false;
    };
    let causes = || status.details.iter().flat_map(|details| &details.causes);
    status.code == 409
        && has_cause(status, "FieldManagerConflict")
        && causes().all(|cause| cause.field == field)
}

fn has_cause(status: &Status, reason: &str) -> bool {
    let details = status.details.iter();
    let mut causes = details.flat_map(|d| &d.causes);
    causes.any(|cause| cause.reason == reason)
}

/// Whether an object was not found; its kind is known, and its namespace is there.
pub(crate) fn is_missing(status: &Status) -> bool {
    let is_namespace = status.details.iter().any(|d| d.kind == "namespaces");
    status.code == 404 && !has_no_name(status) && !is_namespace
}

/// Whether it is not an object that was not found, but the collection.
fn has_no_name(status: &Status) -> bool {
    let details = status.details.as_ref();
    details.is_none_or(|d| d.name.is_empty())
}

/// `.spec.replicas (kubectl-edit)`, for each field.
fn conflicts(status: &Status) -> String {
    let causes = status.details.iter().flat_map(|d| &d.causes);
    let fields: Vec<String> = causes
        .map(|cause| {
            let manager = cause.message.split('"').nth(1).unwrap_or(&cause.message);
            format!("{} ({manager})", cause.field)
        })
        .collect();
    fields.join(", ")
}
