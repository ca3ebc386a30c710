//! The one function that says whether somebody may do something, and the table it reads.

use std::fmt;

use daybook_events::ProjectName;
use daybook_events::access::{Projects, Role};
use schemars::JsonSchema;
use serde::Serialize;

use super::Principal;

/// What can be done, as far as permissions tell it apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Verb {
    /// See a project: what runs, what ran, its output, its events and its GitOps repository.
    Read,
    /// Deploy, change what runs, and move traffic.
    Deploy,
    /// Allow or refuse what is to be deployed, and review what went past that.
    Approve,
    /// Let something past an approval or a freeze, which has to be reviewed.
    Override,
    /// Change what holds for all deployments of a project: environments, their rules and freezes,
    /// webhooks, hostnames, the GitOps remote.
    Configure,
    /// See what belongs to no project: accesses, the entries of the ledger, the server's figures.
    Oversee,
    /// Make projects, and say who may do what.
    Administer,
}

impl Verb {
    /// All verbs.
    pub const ALL: [Self; 7] = [
        Self::Read,
        Self::Deploy,
        Self::Approve,
        Self::Override,
        Self::Configure,
        Self::Oversee,
        Self::Administer,
    ];

    /// The roles that may do it. This is the whole table.
    pub fn roles(self) -> &'static [Role] {
        use Role::{Admin, Approver, Auditor, Deployer, Viewer};
        match self {
            Self::Read => &[Viewer, Deployer, Approver, Auditor, Admin],
            Self::Deploy => &[Deployer, Admin],
            Self::Approve | Self::Override => &[Approver, Admin],
            Self::Oversee => &[Auditor, Admin],
            Self::Configure | Self::Administer => &[Admin],
        }
    }
}

/// Where a principal may do something; none where it may do it nowhere.
pub fn allowed(principal: &Principal, verb: Verb) -> Option<Projects> {
    let grants = principal.grants().iter();
    let fitting = grants.filter(|g| verb.roles().contains(&g.role));
    fitting
        .map(|g| g.projects.clone())
        .reduce(|all, more| all.union(&more))
}

/// What something is to be done to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over<'a> {
    /// A project.
    Project(&'a ProjectName),
    /// Any one project at least: for lists that hold only what may be seen, and for what is in no
    /// project and no secret.
    Some,
    /// Everything, with what belongs to no project.
    Everything,
}

/// Why somebody may not do something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// They may not even know of the project. It is to look like one that does not exist.
    #[error("this project is not to be seen")]
    Unseen,
    /// They lack the role.
    #[error("this takes the role {}{place}", any_of(.roles))]
    Lacking {
        /// The roles of which any one is enough.
        roles: &'static [Role],
        /// Where.
        place: Place,
    },
}

fn any_of(roles: &[Role]) -> String {
    let names: Vec<_> = roles.iter().map(|r| r.as_str()).collect();
    names.join(" or ")
}

/// Where a role is lacking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In this project.
    Project(ProjectName),
    /// In every project.
    Any,
    /// For all projects at once.
    Everything,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Project(project) => write!(f, " in the project {project}"),
            Self::Any => f.write_str(" in a project"),
            Self::Everything => f.write_str(" for all projects"),
        }
    }
}

/// Says whether a principal may do something to something.
pub fn authorise(principal: &Principal, verb: Verb, over: Over<'_>) -> Result<(), Denied> {
    let roles = verb.roles();
    let mut fitting = principal
        .grants()
        .iter()
        .filter(|g| roles.contains(&g.role));
    let allowed = match over {
        Over::Project(project) => fitting.any(|g| g.projects.contains(project)),
        Over::Some => fitting.next().is_some(),
        Over::Everything => fitting.any(|g| g.projects.sees(None)),
    };
    if allowed {
        return Ok(());
    }
    let place = match over {
        Over::Project(project) if !principal.sees(project) => return Err(Denied::Unseen),
        Over::Project(project) => Place::Project(project.clone()),
        Over::Some => Place::Any,
        Over::Everything => Place::Everything,
    };
    Err(Denied::Lacking { roles, place })
}

#[cfg(test)]
mod tests {
    use daybook_events::Actor;
    use daybook_events::access::Grant;

    use super::*;

    fn of(role: Role, projects: &[&str]) -> Principal {
        let names = projects.iter().map(|p| p.parse().unwrap()).collect();
        let grant = Grant {
            role,
            projects: if projects.is_empty() {
                Projects::All
            } else {
                Projects::Named(names)
            },
        };
        Principal::granted(Actor::unauthenticated("x"), vec![grant])
    }

    #[test]
    fn the_table_is_what_it_is() {
        // Verb by verb: viewer, deployer, approver, auditor, admin.
        for (verb, may) in [
            (Verb::Read, [true; 5]),
            (Verb::Deploy, [false, true, false, false, true]),
            (Verb::Approve, [false, false, true, false, true]),
            (Verb::Override, [false, false, true, false, true]),
            (Verb::Configure, [false, false, false, false, true]),
            (Verb::Oversee, [false, false, false, true, true]),
            (Verb::Administer, [false, false, false, false, true]),
        ] {
            for (role, may) in Role::ALL.into_iter().zip(may) {
                let shop = "shop".parse().unwrap();
                let everywhere = authorise(&of(role, &[]), verb, Over::Everything);
                let here = authorise(&of(role, &["shop"]), verb, Over::Project(&shop));
                assert_eq!(
                    (everywhere.is_ok(), here.is_ok()),
                    (may, may),
                    "{role} {verb:?}"
                );
            }
        }
    }

    #[test]
    fn what_is_allowed_is_what_is_authorised() {
        for role in Role::ALL {
            for verb in Verb::ALL {
                let here = allowed(&of(role, &["shop"]), verb);
                let everywhere = allowed(&of(role, &[]), verb);
                let may = verb.roles().contains(&role);
                assert_eq!(here.is_some(), may, "{role} {verb:?}");
                assert_eq!(everywhere, may.then_some(Projects::All), "{role} {verb:?}");
            }
        }
        let grant = |role, project: &str| Grant {
            role,
            projects: Projects::Named([project.parse().unwrap()].into()),
        };
        let grants = vec![grant(Role::Viewer, "bank"), grant(Role::Admin, "shop")];
        let both = Principal::granted(Actor::unauthenticated("x"), grants);
        let named = |names: &[&str]| {
            let names = names.iter().map(|n| n.parse().unwrap()).collect();
            Some(Projects::Named(names))
        };
        assert_eq!(allowed(&both, Verb::Read), named(&["bank", "shop"]));
        assert_eq!(allowed(&both, Verb::Configure), named(&["shop"]));
        assert_eq!(allowed(&both, Verb::Oversee), named(&["shop"]));
    }

    #[test]
    fn a_project_of_others_is_unseen_whatever_the_role() {
        let other = "bank".parse().unwrap();
        for role in Role::ALL {
            for verb in Verb::ALL {
                let principal = of(role, &["shop"]);
                assert_eq!(
                    authorise(&principal, verb, Over::Project(&other)),
                    Err(Denied::Unseen)
                );
                assert!(authorise(&principal, verb, Over::Everything).is_err());
            }
        }
    }

    #[test]
    fn what_is_lacking_is_named() {
        let shop = "shop".parse().unwrap();
        let denied = authorise(
            &of(Role::Viewer, &["shop"]),
            Verb::Deploy,
            Over::Project(&shop),
        );
        assert_eq!(
            denied.unwrap_err().to_string(),
            "this takes the role deployer or admin in the project shop"
        );
    }
}
