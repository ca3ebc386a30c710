//! Whose the objects are that releases of charts are to have. They are called as a chart says, so that
//! two releases may be after one of them, or somebody else may have it.

use std::collections::{BTreeSet, HashMap};

use daybook_events::DeploymentId;
use daybook_workers::target::{Problem, TargetError};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt as _;
use kube::core::DynamicObject;

use crate::apply::{Found, Space, was_applied};
use crate::asked::Asked;
use crate::names::DEPLOYMENT;
use crate::objects::{Kind, Object};

/// An object that a release is to have and does not get.
#[derive(Debug)]
pub(crate) struct Withheld {
    /// The release.
    pub(crate) deployment: DeploymentId,
    kind: Kind,
    name: String,
    /// Why.
    pub(crate) problem: Problem,
}

impl Withheld {
    fn new(deployment: DeploymentId, object: &Object, problem: Problem) -> Self {
        Self {
            deployment,
            kind: object.kind,
            name: object.name.clone(),
            problem,
        }
    }

    /// Whether it is this object, of the same release.
    pub(crate) fn is(&self, object: &Object) -> bool {
        self.kind == object.kind
            && self.name == object.name
            && release_of(object) == Some(self.deployment)
    }
}

/// The release that an object is to be of.
pub(crate) fn release_of(object: &Object) -> Option<DeploymentId> {
    let label = object.body["metadata"]["labels"][DEPLOYMENT].as_str();
    label.and_then(|id| id.parse().ok())
}

/// The release that an object is to be of, if it is one of a chart.
pub(crate) fn chart_of(object: &Object, asked: &Asked) -> Option<DeploymentId> {
    release_of(object).filter(|id| asked.workloads(*id).is_some())
}

/// The release that an object says it is of.
pub(crate) fn says(there: &DynamicObject) -> Option<DeploymentId> {
    there.labels().get(DEPLOYMENT)?.parse().ok()
}

/// Whether something was made for a release, as its labels say.
fn is_of(there: &ObjectMeta, deployment: DeploymentId) -> bool {
    let labels = there.labels.as_ref();
    let says = labels.and_then(|labels| labels.get(DEPLOYMENT));
    says.and_then(|id| id.parse().ok()) == Some(deployment)
}

/// The releases of which something is there.
pub(crate) fn live(found: &Found) -> BTreeSet<DeploymentId> {
    let staying = found
        .values()
        .filter(|there| there.metadata.deletion_timestamp.is_none());
    staying.filter_map(says).collect()
}

/// The objects that releases of charts are to have and do not get: those of another release, those of
/// somebody else, and those that may not be looked at. What is Daybook's was found.
///
/// Argo CD makes them all the same, so that it is known only before it has: of a release of which
/// something is there already, nothing is said to be somebody else's. Secrets are none of its.
pub(crate) async fn withheld(
    space: &Space<'_>,
    wanted: &[Object],
    found: &Found,
    asked: &Asked,
) -> Result<Vec<Withheld>, TargetError> {
    let by_argocd = asked.is_by_argocd();
    let live = live(found);
    let contested = contested(wanted, found, asked).into_iter();
    let mut withheld: Vec<_> = contested
        .map(|(deployment, object)| Withheld::new(deployment, object, taken(object)))
        .collect();
    for object in wanted {
        let Some(deployment) = chart_of(object, asked) else {
            continue;
        };
        let is_live = live.contains(&deployment);
        let is_not_seen = by_argocd && (is_live || object.kind == Kind::SECRET);
        if is_not_seen || found.contains_key(&(object.kind, object.name.clone())) {
            continue;
        }
        let problem = match space.there(object).await {
            Ok(None) => continue,
            // It has lost a label by which it would have been found, and is given it again.
            Ok(Some(there)) if is_live && was_applied(&there) => continue,
            // Made since the others were looked for, by Argo CD or by another process.
            Ok(Some(there)) if is_of(&there, deployment) => continue,
            Ok(Some(_)) => taken(object),
            // Whoever applies has rights of its own.
            Err(TargetError::Refused(_)) if by_argocd => continue,
            Err(TargetError::Refused(why)) => refused(&why),
            Err(e) => return Err(e),
        };
        withheld.push(Withheld::new(deployment, object, problem));
    }
    Ok(withheld)
}

/// The objects that several releases are to have, for each that does not get one. Who has it on the
/// cluster keeps it; otherwise it is for whoever is there already, and then for who came first, as most
/// ids begin with the time. What is made of an image always is for that.
///
/// Argo CD gives an object to each of them in turn, so that who has it says nothing there.
fn contested<'a>(
    wanted: &'a [Object],
    found: &Found,
    asked: &Asked,
) -> Vec<(DeploymentId, &'a Object)> {
    let live = live(found);
    // The least has it.
    let claim = |object: &Object, own: DeploymentId| {
        let there = found.get(&(object.kind, object.name.clone()));
        let has_it = !asked.is_by_argocd() && there.and_then(says) == Some(own);
        let is_of_chart = asked.workloads(own).is_some();
        (is_of_chart, !has_it, !live.contains(&own), own)
    };
    let claims = wanted.iter().filter_map(|object| {
        let own = release_of(object)?;
        Some((object, claim(object, own)))
    });
    let claims: Vec<_> = claims.collect();
    let mut owners = HashMap::new();
    for (object, claim) in &claims {
        let owner = owners
            .entry((object.kind, object.name.as_str()))
            .or_insert(*claim);
        *owner = (*owner).min(*claim);
    }
    let others = claims.iter().filter(|(object, claim)| {
        let owner = owners.get(&(object.kind, object.name.as_str()));
        owner.is_some_and(|owner| owner != claim)
    });
    others.map(|(object, claim)| (claim.3, *object)).collect()
}

/// An object that another release has, or somebody else.
fn taken(object: &Object) -> Problem {
    Problem::other(
        "NameTaken",
        format!(
            "{} {} is somebody else's or of another release already, and releases of a chart stand \
             beside each other",
            object.kind.kind, object.name
        ),
        "Have the chart name what it makes by its release: in `run.chart_values` of the service, \
         often with `fullnameOverride: $(DAYBOOK_RELEASE)`.",
        false,
    )
}

/// An object of a chart that the API server does not take.
pub(crate) fn refused(why: &str) -> Problem {
    Problem::other(
        "ObjectRefused",
        format!("the cluster does not take all that the chart makes: {why}"),
        "Mend what it names and ask again with `daybook retry`, or change `run.chart_values` of the \
         service and deploy again.",
        false,
    )
}

#[cfg(test)]
mod tests {
    use daybook_events::CommitId;
    use serde_json::{Value, json};

    use super::*;
    use crate::asked::Chart;

    fn id(n: u128) -> DeploymentId {
        DeploymentId(uuid::Uuid::from_u128(n))
    }

    fn body(n: u128, name: &str) -> Value {
        json!({
            "apiVersion": Kind::SERVICE.api_version,
            "kind": Kind::SERVICE.kind,
            "metadata": { "name": name, "labels": { DEPLOYMENT: id(n) } },
        })
    }

    /// Services that releases are to have, of these numbers and names.
    fn wanted(all: &[(u128, &str)]) -> Vec<Object> {
        let all = all.iter().map(|(n, name)| Object {
            kind: Kind::SERVICE,
            name: (*name).to_owned(),
            body: body(*n, name),
        });
        all.collect()
    }

    /// The same, as they are on a cluster.
    fn found(all: &[(u128, &str)]) -> Found {
        let all = all.iter().map(|(n, name)| {
            let there = serde_json::from_value(body(*n, name)).unwrap();
            ((Kind::SERVICE, (*name).to_owned()), there)
        });
        all.collect()
    }

    fn asked(mut asked: Asked, charts: &[u128]) -> Asked {
        for n in charts {
            asked.renders(id(*n), Chart::of(&[], "none"));
        }
        asked
    }

    fn commit() -> CommitId {
        CommitId::parse("01".repeat(20)).unwrap()
    }

    fn blamed(asked: &Asked, all: &[(u128, &str)], there: &[(u128, &str)]) -> Vec<DeploymentId> {
        let wanted = wanted(all);
        let contested = contested(&wanted, &found(there), asked);
        contested.into_iter().map(|(id, _)| id).collect()
    }

    #[test]
    fn an_object_is_for_who_has_it_or_is_there_or_came_first() {
        let asked = asked(Asked::new(commit()), &[1, 2, 3]);
        let both = [(2, "x"), (1, "x"), (3, "own")];
        assert_eq!(blamed(&asked, &both, &[]), [id(2)]);
        assert_eq!(blamed(&asked, &both, &[(2, "own")]), [id(1)]);
        assert_eq!(blamed(&asked, &both, &[(2, "x"), (1, "own")]), [id(1)]);
        // Who does not ask for it has no claim to it, whatever its label says.
        assert_eq!(blamed(&asked, &both, &[(3, "x")]), [id(2)]);
        assert!(blamed(&asked, &[(1, "x")], &[(2, "x")]).is_empty());
    }

    #[test]
    fn where_argocd_applies_it_is_for_who_was_there() {
        let asked = asked(Asked::by_argocd(commit()), &[1, 2]);
        let both = [(1, "x"), (2, "x")];
        assert_eq!(blamed(&asked, &both, &[(2, "own")]), [id(1)]);
        // It has made both of them by now.
        let there = [(1, "own"), (2, "x")];
        assert_eq!(blamed(&asked, &both, &there), [id(2)]);
    }

    #[test]
    fn what_is_of_an_image_is_never_withheld() {
        let asked = asked(Asked::new(commit()), &[1]);
        let both = [(1, "x"), (2, "x")];
        assert_eq!(blamed(&asked, &both, &[(1, "x")]), [id(1)]);
    }
}
