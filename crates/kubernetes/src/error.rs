//! What an API server refuses, in words that say what to do.

use std::error::Error;

use daybook_workers::target::TargetError;
use kube::client::{AuthError, RustlsTlsError};
use kube::config::KubeconfigError;
use kube::core::Status;
use kube::runtime::watcher;

/// Why a cluster could not be reached at start.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kubeconfig cannot be used.
    #[error("the kubeconfig cannot be used")]
    Config(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The API server took the request and gave no answer.
    #[error("the API server gave no answer in time")]
    Silent,
    /// The API server does not know who asks, or there is nothing to tell it who does.
    #[error("{0}")]
    Unauthenticated(String),
    /// The API server gave no answer, or not a fitting one.
    #[error("the API server does not answer")]
    Api(#[source] kube::Error),
}

impl ConnectError {
    /// Why the kubeconfig was not read.
    pub(crate) fn of_kubeconfig(error: KubeconfigError) -> Self {
        match error {
            // Its own words quote the lines around the place, and there are tokens in them.
            KubeconfigError::Parse(error) => {
                let place = error.location().map_or_else(String::new, |at| {
                    format!(" (line {}, column {})", at.line(), at.column())
                });
                Self::Config(format!("it is no kubeconfig{place}").into())
            }
            other => Self::Config(Box::new(other)),
        }
    }

    /// Why there is no client: credential plugins are run to make one.
    pub(crate) fn of_client(error: kube::Error) -> Self {
        if let Some(why) = unauthenticated(&error) {
            return Self::Unauthenticated(why);
        }
        match error {
            // Its own words quote a line, which may be one of the key.
            kube::Error::RustlsTls(RustlsTlsError::InvalidIdentityPem(_)) => {
                Self::Config("the client certificate or its key is no PEM".into())
            }
            other => Self::Config(Box::new(other)),
        }
    }

    /// Why the first question was not answered.
    pub(crate) fn of(error: kube::Error) -> Self {
        match unauthenticated(&error) {
            Some(why) => Self::Unauthenticated(why),
            None => Self::Api(error),
        }
    }
}

/// What helps where the API server does not know who asks.
const RENEW: &str = "Renew what the context of the kubeconfig names. A token file is read again within a \
                     minute, and a credential plugin is run again when what it gave expires; a token or \
                     a certificate in the kubeconfig itself counts when Daybook connects anew: at the \
                     next try if it has not reached the cluster yet, otherwise when it starts again";

/// What is wrong with Daybook's credentials, and what helps; none if they are not what is the matter.
fn unauthenticated(error: &kube::Error) -> Option<String> {
    if let kube::Error::Api(status) = error {
        return (status.code == 401).then(|| {
            let message = &status.message;
            format!(
                "the API server does not take Daybook's credentials (401: {message}): they have \
                 expired, were revoked, or are those of another cluster. {RENEW}"
            )
        });
    }
    without_any(error)
}

/// The same of an error that may come of there being none to tell the API server.
fn without_any(error: &(dyn Error + 'static)) -> Option<String> {
    let mut source = Some(error);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<AuthError>() {
            let why = without_credentials(error);
            return Some(format!(
                "Daybook has no credentials for the API server: {why}. {RENEW}"
            ));
        }
        source = error.source();
    }
    None
}

/// What is printed of a credential plugin that fails, in characters.
const PLUGIN_SAYS: usize = 400;

/// Why there are no credentials. The command of a plugin is not said, whose variables may be secrets,
/// nor anything that quotes what it printed, which are credentials: what is not known not to is left
/// out.
fn without_credentials(error: &AuthError) -> String {
    match error {
        AuthError::AuthExecRun { out, .. } => {
            let said = String::from_utf8_lossy(&out.stderr);
            let said: String = said.trim().chars().take(PLUGIN_SAYS).collect();
            let said = match said.is_empty() {
                true => said,
                false => format!(": {said}"),
            };
            format!("the credential plugin failed ({}){said}", out.status)
        }
        AuthError::AuthExecParse(_) | AuthError::ParseTokenKey(_) => {
            "the credential plugin printed no ExecCredential".to_owned()
        }
        AuthError::MalformedTokenExpirationDate(_) => "their expiry is no time".to_owned(),
        AuthError::InvalidBasicAuth(_)
        | AuthError::InvalidBearerToken(_)
        | AuthError::UnrefreshableTokenResponse
        | AuthError::ExecPluginFailed
        | AuthError::AuthExecStart(_)
        | AuthError::AuthExec(_)
        | AuthError::ReadTokenFile(..)
        | AuthError::MissingCommand
        | AuthError::ExecMissingClusterInfo
        | AuthError::NoValidNativeRootCA(_) => daybook_events::with_causes(error),
        _ => "what the kubeconfig says of them cannot be followed".to_owned(),
    }
}

/// An error that may come of one of the API server, in one line.
pub(crate) fn said(error: &(dyn Error + 'static)) -> String {
    without_any(error).unwrap_or_else(|| daybook_events::with_causes(error))
}

/// Why a watch was cut.
pub(crate) fn cut(error: &watcher::Error) -> String {
    let of_request = match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => unauthenticated(error),
        _ => None,
    };
    of_request.unwrap_or_else(|| daybook_events::with_causes(error))
}

/// Whether a watch was cut because the cluster does not know the kind.
pub(crate) fn is_of_unknown_kind(error: &watcher::Error) -> bool {
    let (watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error)) =
        error
    else {
        return false;
    };
    matches!(error, kube::Error::Api(status) if status.code == 404 && has_no_name(status))
}

/// What an error of the API server means for who applies `what`.
pub(crate) fn refusal(what: &str, error: &kube::Error) -> TargetError {
    // They may be renewed, and then it works.
    if let Some(why) = unauthenticated(error) {
        return TargetError::Unavailable(format!("{what}: {why}"));
    }
    match error {
        kube::Error::Api(status) => refused(what, status),
        other => TargetError::Unavailable(format!(
            "{what}: the API server gave no answer: {}",
            daybook_events::with_causes(other)
        )),
    }
}

/// The same about objects of Gateway API, which a cluster may be without.
pub(crate) fn refusal_of_gateway_api(what: &str, error: &kube::Error) -> TargetError {
    match error {
        kube::Error::Api(status) if status.code == 404 && has_no_name(status) => {
            let why = no_gateway_api(&format!("{what}: the cluster does not know Gateway API"));
            TargetError::Refused(why)
        }
        other => refusal(what, other),
    }
}

/// What helps where there is no Gateway API.
pub(crate) fn no_gateway_api(what: &str) -> String {
    format!(
        "{what}. Install it (kubectl apply --server-side --filename \
         https://github.com/kubernetes-sigs/gateway-api/releases/latest/download/standard-install.yaml) \
         and a controller that serves its Gateways, or start Daybook without --kubernetes-gateway"
    )
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
        404 if has_no_name(status) => TargetError::Refused(format!(
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

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(code: u16) -> kube::Error {
        let status = Status::failure("404 page not found", "by order of a test");
        kube::Error::Api(status.with_code(code).boxed())
    }

    #[test]
    fn what_a_plugin_printed_is_not_said_however_deep_it_is() {
        let parsed = || {
            let parsed = serde_saphyr::from_str::<serde_json::Value>("token: [printed-token");
            AuthError::AuthExecParse(Box::new(parsed.unwrap_err()))
        };
        assert_eq!(
            without_credentials(&parsed()),
            "the credential plugin printed no ExecCredential"
        );
        let sent = kube::Error::Service(Box::new(parsed()));
        let why = said(&sent);
        assert!(why.contains("printed no ExecCredential"), "{why}");
        assert!(!why.contains("printed-token"), "{why}");
        let why = cut(&watcher::Error::WatchFailed(sent));
        assert!(!why.contains("printed-token"), "{why}");
    }

    #[test]
    fn a_kind_is_unknown_where_its_collection_is_not_found() {
        let at_first = watcher::Error::InitialListFailed;
        assert!(is_of_unknown_kind(&at_first(answered(404))));
        assert!(is_of_unknown_kind(&watcher::Error::WatchStartFailed(
            answered(404)
        )));
        for code in [401, 403, 503] {
            assert!(!is_of_unknown_kind(&at_first(answered(code))), "{code}");
        }
        let cut = watcher::Error::WatchFailed(answered(404));
        assert!(!is_of_unknown_kind(&cut));
    }
}
