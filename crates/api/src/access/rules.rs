//! Which verb each address asks for, and of which project.
//!
//! What is not in here is denied where credentials are asked for, and a test fails for each
//! address of the document that has no rule.

use std::collections::HashMap;
use std::sync::LazyLock;

use super::authorise::Verb;

/// What an address asks of whoever comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    /// Nothing: it says nothing of any project, or knows its callers by their own signatures.
    Public,
    /// Nothing either, but not as often as one likes: it takes work.
    Counted,
    /// A verb.
    Asks(Verb, Of),
}

/// What the verb is asked of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Of {
    /// The project that the path names as `{project}`.
    Project,
    /// The project of the repository that the path names as `{repository}`.
    Repository,
    /// The project that the path names as `{project}`, asked by git.
    Uploads,
    /// The project of the deployment that the path names as `{id}`.
    Deployment,
    /// The project of the instance that the path names as `{instance_id}`.
    Instance,
    /// The project of the webhook that the path names as `{webhook}`.
    Webhook,
    /// The project that the body names. The use case asks once it is known; here it is asked
    /// whether there is any.
    Body,
    /// Whatever may be seen: the handler leaves the rest out.
    Visible,
    /// The same. A socket may also be opened without a credential, which its first message then
    /// has to bring.
    Socket,
    /// Everything.
    Everything,
    /// Hashes are for everybody, and the entries of the ledger for who sees everything.
    Tile,
}

use Of::{
    Body, Deployment, Everything, Instance, Project, Repository, Socket, Tile, Uploads, Visible,
    Webhook,
};
use Rule::{Asks, Counted, Public};
use Verb::{Administer, Approve, Configure, Deploy, Override, Oversee, Read};

const RULES: &[(&str, &str, Rule)] = &[
    ("GET", "/", Public),
    ("GET", "/page/{file}", Public),
    ("GET", "/openapi.json", Counted),
    // Resolvers ask for each project.
    ("GET", "/graphql", Asks(Read, Socket)),
    ("POST", "/graphql", Asks(Read, Visible)),
    ("GET", "/asyncapi.json", Counted),
    ("GET", "/healthz", Public),
    ("GET", "/readyz", Counted),
    ("GET", "/metrics", Asks(Oversee, Everything)),
    ("GET", "/tlog/checkpoint", Counted),
    ("GET", "/tlog/keys", Counted),
    ("GET", "/tlog/tile/{*rest}", Asks(Oversee, Tile)),
    ("GET", "/tlog/tile/{path}", Asks(Oversee, Tile)),
    ("GET", "/git/{repository}/info/refs", Asks(Read, Repository)),
    (
        "POST",
        "/git/{repository}/git-upload-pack",
        Asks(Read, Repository),
    ),
    // Who may deploy has uploaded them, and workers build them. To see what runs is less.
    (
        "GET",
        "/uploads/{project}/{repository}/info/refs",
        Asks(Deploy, Uploads),
    ),
    (
        "POST",
        "/uploads/{project}/{repository}/git-upload-pack",
        Asks(Deploy, Uploads),
    ),
    (
        "POST",
        "/api/v1/projects/{project}/services/{service}/uploads",
        Asks(Deploy, Project),
    ),
    (
        "POST",
        "/api/v1/projects/{project}/services/{service}/uploads/missing",
        Asks(Deploy, Project),
    ),
    (
        "GET",
        "/api/v1/projects/{project}/services/{service}/uploads/{tree}",
        Asks(Deploy, Project),
    ),
    ("GET", "/api/v1/whoami", Asks(Read, Visible)),
    ("GET", "/api/v1/tokens", Asks(Oversee, Everything)),
    ("POST", "/api/v1/tokens", Asks(Administer, Everything)),
    (
        "POST",
        "/api/v1/tokens/{token}/rotate",
        Asks(Administer, Everything),
    ),
    (
        "DELETE",
        "/api/v1/tokens/{token}",
        Asks(Administer, Everything),
    ),
    // It says of the log what the checkpoint and its notary say, for whoever appends or audits.
    ("GET", "/api/v1/ledger", Counted),
    // It reads every row, of all projects, and holds up the fold meanwhile.
    ("GET", "/api/v1/projections", Asks(Oversee, Everything)),
    ("GET", "/api/v1/projects", Asks(Read, Visible)),
    ("POST", "/api/v1/projects", Asks(Administer, Body)),
    ("GET", "/api/v1/projects/{project}", Asks(Read, Project)),
    (
        "GET",
        "/api/v1/projects/{project}/services",
        Asks(Read, Project),
    ),
    (
        "GET",
        "/api/v1/projects/{project}/services/{service}",
        Asks(Read, Project),
    ),
    (
        "PUT",
        "/api/v1/projects/{project}/services/{service}",
        Asks(Deploy, Project),
    ),
    (
        "GET",
        "/api/v1/projects/{project}/environments",
        Asks(Read, Project),
    ),
    (
        "POST",
        "/api/v1/projects/{project}/environments",
        Asks(Configure, Project),
    ),
    (
        "GET",
        "/api/v1/projects/{project}/environments/{environment}",
        Asks(Read, Project),
    ),
    (
        "PUT",
        "/api/v1/projects/{project}/environments/{environment}",
        Asks(Configure, Project),
    ),
    (
        "PATCH",
        "/api/v1/projects/{project}/environments/{environment}",
        Asks(Configure, Project),
    ),
    (
        "DELETE",
        "/api/v1/projects/{project}/environments/{environment}",
        Asks(Configure, Project),
    ),
    (
        "PUT",
        "/api/v1/projects/{project}/environments/{environment}/auto-deploy",
        Asks(Configure, Project),
    ),
    (
        "GET",
        "/api/v1/projects/{project}/environments/{environment}/freezes",
        Asks(Read, Project),
    ),
    (
        "PUT",
        "/api/v1/projects/{project}/environments/{environment}/freezes/{freeze}",
        Asks(Configure, Project),
    ),
    (
        "DELETE",
        "/api/v1/projects/{project}/environments/{environment}/freezes/{freeze}",
        Asks(Configure, Project),
    ),
    (
        "GET",
        "/api/v1/projects/{project}/logs",
        Asks(Read, Project),
    ),
    (
        "GET",
        "/api/v1/projects/{project}/hooks",
        Asks(Read, Project),
    ),
    (
        "PUT",
        "/api/v1/projects/{project}/hooks/{hook}",
        Asks(Configure, Project),
    ),
    (
        "DELETE",
        "/api/v1/projects/{project}/hooks/{hook}",
        Asks(Configure, Project),
    ),
    // Deliveries are signed with the webhook's own secret; the handler counts those that are not.
    ("POST", "/api/v1/projects/{project}/hooks/{hook}", Public),
    (
        "GET",
        "/api/v1/projects/{project}/secrets",
        Asks(Read, Project),
    ),
    (
        "DELETE",
        "/api/v1/projects/{project}/secrets",
        Asks(Configure, Project),
    ),
    (
        "PUT",
        "/api/v1/projects/{project}/secrets/{name}",
        Asks(Deploy, Project),
    ),
    (
        "DELETE",
        "/api/v1/projects/{project}/secrets/{name}",
        Asks(Deploy, Project),
    ),
    (
        "POST",
        "/api/v1/projects/{project}/secrets/{name}/verify",
        Asks(Deploy, Project),
    ),
    (
        "GET",
        "/api/v1/projects/{project}/routes",
        Asks(Read, Project),
    ),
    (
        "POST",
        "/api/v1/projects/{project}/routes",
        Asks(Deploy, Project),
    ),
    (
        "GET",
        "/api/v1/projects/{project}/records",
        Asks(Read, Project),
    ),
    (
        "POST",
        "/api/v1/projects/{project}/routes/policy",
        Asks(Deploy, Project),
    ),
    (
        "GET",
        "/api/v1/projects/{project}/domains",
        Asks(Read, Project),
    ),
    (
        "POST",
        "/api/v1/projects/{project}/domains",
        Asks(Configure, Project),
    ),
    (
        "DELETE",
        "/api/v1/projects/{project}/domains/{hostname}",
        Asks(Configure, Project),
    ),
    (
        "GET",
        "/api/v1/projects/{project}/gitops",
        Asks(Read, Project),
    ),
    (
        "PUT",
        "/api/v1/projects/{project}/gitops/remote",
        Asks(Configure, Project),
    ),
    (
        "DELETE",
        "/api/v1/projects/{project}/gitops/remote",
        Asks(Configure, Project),
    ),
    (
        "GET",
        "/api/v1/projects/{project}/gitops/eject",
        Asks(Read, Project),
    ),
    (
        "GET",
        "/api/v1/projects/{project}/gitops/commits/{commit}/diff",
        Asks(Read, Project),
    ),
    (
        "POST",
        "/api/v1/projects/{project}/gitops/commits/{commit}/adopt",
        Asks(Deploy, Project),
    ),
    (
        "POST",
        "/api/v1/projects/{project}/gitops/commits/{commit}/revert",
        Asks(Deploy, Project),
    ),
    ("GET", "/api/v1/instances", Asks(Read, Visible)),
    (
        "GET",
        "/api/v1/instances/{instance_id}",
        Asks(Read, Instance),
    ),
    ("GET", "/api/v1/deployments", Asks(Read, Visible)),
    ("POST", "/api/v1/deployments", Asks(Deploy, Body)),
    ("GET", "/api/v1/deployments/{id}", Asks(Read, Deployment)),
    (
        "DELETE",
        "/api/v1/deployments/{id}",
        Asks(Deploy, Deployment),
    ),
    (
        "GET",
        "/api/v1/deployments/{id}/logs",
        Asks(Read, Deployment),
    ),
    (
        "POST",
        "/api/v1/deployments/{id}/stop",
        Asks(Deploy, Deployment),
    ),
    (
        "POST",
        "/api/v1/deployments/{id}/start",
        Asks(Deploy, Deployment),
    ),
    (
        "POST",
        "/api/v1/deployments/{id}/retry",
        Asks(Deploy, Deployment),
    ),
    (
        "POST",
        "/api/v1/deployments/{id}/terminate",
        Asks(Deploy, Deployment),
    ),
    (
        "POST",
        "/api/v1/deployments/{id}/cancel",
        Asks(Deploy, Deployment),
    ),
    (
        "POST",
        "/api/v1/deployments/{id}/keep",
        Asks(Deploy, Deployment),
    ),
    (
        "POST",
        "/api/v1/deployments/{id}/mark-main",
        Asks(Deploy, Deployment),
    ),
    (
        "POST",
        "/api/v1/deployments/{id}/redeploy",
        Asks(Deploy, Deployment),
    ),
    (
        "GET",
        "/api/v1/deployments/{id}/approval",
        Asks(Read, Deployment),
    ),
    (
        "POST",
        "/api/v1/deployments/{id}/approve",
        Asks(Approve, Deployment),
    ),
    (
        "POST",
        "/api/v1/deployments/{id}/reject",
        Asks(Approve, Deployment),
    ),
    (
        "POST",
        "/api/v1/deployments/{id}/review",
        Asks(Approve, Deployment),
    ),
    (
        "POST",
        "/api/v1/deployments/{id}/override",
        Asks(Override, Deployment),
    ),
    (
        "POST",
        "/api/v1/deployments/{id}/override-freeze",
        Asks(Override, Deployment),
    ),
    ("GET", "/api/v1/approvals", Asks(Read, Visible)),
    ("POST", "/api/v1/rollback", Asks(Deploy, Body)),
    ("POST", "/api/v1/promote", Asks(Deploy, Body)),
    ("POST", "/api/v1/scale", Asks(Deploy, Body)),
    ("POST", "/api/v1/config", Asks(Deploy, Body)),
    ("GET", "/api/v1/templates", Asks(Read, Visible)),
    ("GET", "/api/v1/templates/{template}", Asks(Read, Visible)),
    (
        "POST",
        "/api/v1/templates/{template}/deploy",
        Asks(Deploy, Body),
    ),
    ("GET", "/api/v1/dora", Asks(Read, Visible)),
    ("GET", "/api/v1/history", Asks(Read, Visible)),
    ("GET", "/api/v1/audit", Asks(Read, Visible)),
    ("GET", "/api/v1/state", Asks(Read, Visible)),
    ("GET", "/api/v1/events", Asks(Read, Visible)),
    ("GET", "/api/v1/events/chain", Asks(Read, Visible)),
    ("GET", "/api/v1/events/{position}", Asks(Read, Visible)),
    ("GET", "/api/v1/cdevents", Asks(Read, Visible)),
    ("GET", "/api/v1/webhooks", Asks(Read, Visible)),
    ("POST", "/api/v1/webhooks", Asks(Configure, Body)),
    ("GET", "/api/v1/webhooks/{webhook}", Asks(Read, Webhook)),
    (
        "PUT",
        "/api/v1/webhooks/{webhook}",
        Asks(Configure, Webhook),
    ),
    (
        "DELETE",
        "/api/v1/webhooks/{webhook}",
        Asks(Configure, Webhook),
    ),
    (
        "GET",
        "/api/v1/webhooks/{webhook}/deliveries",
        Asks(Read, Webhook),
    ),
    (
        "POST",
        "/api/v1/webhooks/{webhook}/rotate",
        Asks(Configure, Webhook),
    ),
    (
        "POST",
        "/api/v1/webhooks/{webhook}/pause",
        Asks(Configure, Webhook),
    ),
    (
        "POST",
        "/api/v1/webhooks/{webhook}/resume",
        Asks(Configure, Webhook),
    ),
    (
        "POST",
        "/api/v1/webhooks/{webhook}/test",
        Asks(Configure, Webhook),
    ),
    (
        "POST",
        "/api/v1/webhooks/{webhook}/replay",
        Asks(Configure, Webhook),
    ),
    (
        "POST",
        "/api/v1/webhooks/{webhook}/discard",
        Asks(Configure, Webhook),
    ),
    (
        "GET",
        "/api/v1/deployments/{id}/attestation",
        Asks(Read, Deployment),
    ),
];

static BY_ADDRESS: LazyLock<HashMap<&str, Vec<(&str, Rule)>>> = LazyLock::new(|| {
    let mut by_address = HashMap::<_, Vec<_>>::new();
    for (method, path, rule) in RULES {
        by_address.entry(*path).or_default().push((*method, *rule));
    }
    by_address
});

/// What is known of an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    /// Its rule.
    Rule(Rule),
    /// It does not have this method; it has these.
    OtherMethods(String),
    /// It has no rule.
    Nothing,
}

/// The rule of an address, as the router writes its path.
pub(crate) fn rule(method: &str, path: &str) -> Found {
    let Some(rules) = BY_ADDRESS.get(path) else {
        return Found::Nothing;
    };
    // Whoever may GET may ask for the head alone.
    let asked = if method == "HEAD" { "GET" } else { method };
    match rules.iter().find(|(m, _)| *m == asked) {
        Some((_, rule)) => Found::Rule(*rule),
        None => {
            let mut methods: Vec<_> = rules.iter().map(|(m, _)| *m).collect();
            if methods.contains(&"GET") {
                methods.push("HEAD");
            }
            Found::OtherMethods(methods.join(","))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_of_the_document_has_a_rule_and_every_rule_an_address() {
        let document = crate::openapi();
        let mut missing = Vec::new();
        let mut described = std::collections::BTreeSet::new();
        for (path, operations) in document["paths"].as_object().unwrap() {
            for method in operations.as_object().unwrap().keys() {
                let method = method.to_uppercase();
                if !matches!(rule(&method, path), Found::Rule(_)) {
                    missing.push(format!("{method} {path}"));
                }
                described.insert((method, path.clone()));
            }
        }
        assert!(missing.is_empty(), "without a rule: {missing:#?}");
        // What the document does not describe is listed here, and routed by hand.
        let by_hand = [
            "/",
            "/page/{file}",
            "/openapi.json",
            "/asyncapi.json",
            "/graphql",
            "/tlog/tile/{*rest}",
        ];
        for (method, path, _) in RULES {
            let known = described.contains(&((*method).to_owned(), (*path).to_owned()));
            assert!(
                known || by_hand.contains(path),
                "{method} {path} is nowhere"
            );
        }
    }

    #[test]
    fn no_address_has_two_rules_for_a_method() {
        for (path, rules) in &*BY_ADDRESS {
            let mut methods: Vec<_> = rules.iter().map(|(m, _)| m).collect();
            methods.sort();
            methods.dedup();
            assert_eq!(methods.len(), rules.len(), "{path}");
        }
    }
}
