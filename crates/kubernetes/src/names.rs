//! What Daybook's things are called on a cluster.

use daybook_events::{DeploymentId, EnvironmentName, ProjectName, ServiceName, VolumeName};
use sha2::{Digest as _, Sha256};

/// The field manager of everything that Daybook applies.
pub const MANAGER: &str = "daybook";
/// Says who looks after an object; watches and pruning go by it.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// The project that an object belongs to.
pub const PROJECT: &str = "daybook.dev/project";
/// The environment that an object belongs to.
pub const ENVIRONMENT: &str = "daybook.dev/environment";
/// Whether the environment goes away with its pull request.
pub const EPHEMERAL: &str = "daybook.dev/ephemeral";
/// The service that an object belongs to.
pub const SERVICE: &str = "daybook.dev/service";
/// The deployment that an object is of.
pub const DEPLOYMENT: &str = "daybook.dev/deployment";
/// On the claim of a volume, which it names: such claims outlive the releases that use them.
pub const VOLUME: &str = "daybook.dev/volume";
/// On the pods of a release whose volumes only one node can use at a time, and on the namespace of an
/// environment that has or had any volumes.
pub const VOLUMES: &str = "daybook.dev/volumes";
/// On the HTTPRoute of a hostname that moves from one release to another, so that it is told from
/// those that belong to a release.
pub const ADDRESS: &str = "daybook.dev/address";

/// The namespace of an environment: `<project>--<environment>`.
///
/// No two environments share one. Names may have double hyphens of their own, in which case these
/// are single and a hash of both names is what tells them apart.
pub fn namespace(project: &ProjectName, environment: &EnvironmentName) -> String {
    let (project, environment) = (project.as_str(), environment.as_str());
    if !project.contains("--") && !environment.contains("--") {
        return format!("{project}--{environment}");
    }
    let hash = hex::encode(Sha256::digest(format!("{project}/{environment}")));
    let mut text = format!("{project}-{environment}");
    while text.contains("--") {
        text = text.replace("--", "-");
    }
    text.truncate(50);
    format!("{}-{}", text.trim_end_matches('-'), &hash[..12])
}

/// The name of what is made of one release: `<service>-<end of the deployment's id>`.
pub fn release(service: &ServiceName, deployment: DeploymentId) -> String {
    format!("{service}-{}", deployment.short())
}

/// The name of the claim of a service's volume: `<service>.<volume>`. Neither of them has a dot.
pub fn claim(service: &ServiceName, volume: &VolumeName) -> String {
    format!("{service}.{volume}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(project: &str, environment: &str) -> String {
        let (project, environment) = (project.parse().unwrap(), environment.parse().unwrap());
        namespace(&project, &environment)
    }

    #[test]
    fn no_two_environments_share_a_namespace() {
        let names = ["a", "a-b", "a--b", "b", "b-c", "a---b", "a-b--c", "b--c"];
        let mut all = std::collections::BTreeSet::new();
        for project in names {
            for environment in names {
                let name = of(project, environment);
                assert!(name.len() <= 63);
                assert!(all.insert(name.clone()), "{name} twice");
            }
        }
        assert_eq!(of("shop", "production"), "shop--production");
        let long = "a".repeat(30);
        assert!(of(&long, &long).len() <= 63);
        let long = format!("a--{}", "b".repeat(27));
        assert!(of(&long, &long).len() <= 63);
    }
}
