//! Webhooks: how the providers of source repositories tell a project of pushes and pull requests.

pub mod delivery;

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::Refusal;
use crate::names::{CommitId, EnvKey, EnvironmentName, GitRef, HookName, InvalidName};
use crate::project::Project;
use crate::secret::{SecretId, SecretRef, SecretScope};

/// Whose deliveries they are.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Provider {
    /// GitHub, in the cloud or of one's own.
    Github,
    /// GitLab, in the cloud or of one's own.
    Gitlab,
    /// Gitea and Forgejo.
    Gitea,
}

impl Provider {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Github => "github",
            Self::Gitlab => "gitlab",
            Self::Gitea => "gitea",
        }
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Provider {
    type Err = InvalidName;
    fn from_str(s: &str) -> Result<Self, InvalidName> {
        match s {
            "github" => Ok(Self::Github),
            "gitlab" => Ok(Self::Gitlab),
            "gitea" | "forgejo" => Ok(Self::Gitea),
            _ => Err(InvalidName {
                what: "provider",
                code: "invalid_provider",
                value: s.chars().take(80).collect(),
                rule: "it must be github, gitlab or gitea",
            }),
        }
    }
}

/// A webhook of a project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Hook {
    /// Its name, which is part of its address.
    pub name: HookName,
    /// Who calls it.
    pub provider: Provider,
    /// What its deliveries are signed with. The value is in the secret store only.
    pub secret: SecretRef,
    /// The environment that those of pull requests are made from; none for empty ones.
    pub base: Option<EnvironmentName>,
    /// What the names of those environments begin with: `pr` for `pr-142`.
    pub prefix: EnvironmentName,
    /// Whether pull requests from other repositories get an environment. Their code is then built
    /// and run.
    pub forks: bool,
}

/// A webhook was added, or defined anew, perhaps with another secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HookDefined {
    /// The webhook.
    pub hook: Hook,
}

/// A webhook was removed: nobody can call it any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HookRemoved {
    /// Its name.
    pub name: HookName,
}

/// Something was pushed to a branch that environments of the project ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BranchPushed {
    /// The webhook that told of it.
    pub hook: HookName,
    /// The repository, as [`repository_key`] writes it.
    pub repository: String,
    /// The branch.
    pub branch: GitRef,
    /// Its newest commit when the delivery was made. What is deployed is its newest one then.
    pub head: CommitId,
}

/// The longest prefix, which leaves room for a hyphen and a number.
const PREFIX_MAX: usize = 20;

impl Hook {
    /// The secret that the given version of a webhook's key is kept as. No variable of a
    /// deployment can be called so.
    pub fn secret_id(name: &HookName, version: u32) -> Result<SecretId, InvalidName> {
        let name = name.as_str().to_ascii_uppercase().replace('-', "_");
        Ok(SecretId {
            name: EnvKey::parse(format!("DAYBOOK_HOOK_{name}_V{version}"))?,
            scope: SecretScope::default(),
        })
    }

    /// The environment of a pull request.
    pub fn environment(&self, number: u64) -> Result<EnvironmentName, InvalidName> {
        EnvironmentName::parse(format!("{}-{number}", self.prefix))
    }
}

pub(crate) fn check(project: &Project, hook: &Hook) -> Result<(), Refusal> {
    if hook.prefix.as_str().len() > PREFIX_MAX {
        return Err(Refusal::new(
            "invalid_prefix",
            format!("the prefix {} is too long", hook.prefix),
            format!("use at most {PREFIX_MAX} characters"),
        ));
    }
    let next = project
        .hooks
        .get(&hook.name)
        .map_or(1, |h| h.secret.version.saturating_add(1));
    let kept = project
        .hooks
        .get(&hook.name)
        .is_some_and(|h| h.secret == hook.secret);
    if kept || hook.secret.version >= next {
        Ok(())
    } else {
        Err(Refusal::new(
            "stale_secret_version",
            format!("the webhook {} was changed meanwhile", hook.name),
            "repeat the command",
        ))
    }
}

pub(crate) fn not_found(name: &HookName) -> Refusal {
    Refusal::new(
        "hook_not_found",
        format!("there is no webhook {name}"),
        "add it with `daybook hook add PROJECT --provider PROVIDER`",
    )
}

/// A repository as it can be compared, whichever of its addresses is given: host and path in
/// lowercase, without scheme, user, port and `.git`.
pub fn repository_key(address: &str) -> String {
    let address = address.trim();
    let key = match address.split_once("://") {
        Some((scheme, path)) if scheme.eq_ignore_ascii_case("file") => path.to_owned(),
        Some((_, rest)) => {
            let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
            let host = authority.rsplit_once('@').map_or(authority, |(_, h)| h);
            let host = match host.rsplit_once(':') {
                Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
                _ => host,
            };
            format!("{host}/{path}")
        }
        // A path, or the short form of ssh: git@host:path
        None if address.starts_with('/') => address.to_owned(),
        None => match address.split_once(':') {
            Some((host, path)) => {
                let host = host.rsplit_once('@').map_or(host, |(_, h)| h);
                format!("{host}/{}", path.trim_start_matches('/'))
            }
            None => address.to_owned(),
        },
    };
    let key = key.trim_end_matches('/');
    let key = key.strip_suffix(".git").unwrap_or(key);
    key.to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_addresses_of_a_repository_have_one_key() {
        for address in [
            "https://github.com/Acme/Shop.git",
            "https://github.com/acme/shop",
            "https://github.com/acme/shop/",
            "git@github.com:acme/shop.git",
            "ssh://git@github.com:22/acme/shop.git",
            "git://github.com/acme/shop.git",
        ] {
            assert_eq!(repository_key(address), "github.com/acme/shop", "{address}");
        }
        assert_eq!(repository_key("/srv/git/shop.git"), "/srv/git/shop");
        assert_eq!(repository_key("file:///srv/git/shop"), "/srv/git/shop");
        assert_eq!(repository_key("http://[::1]:3000/a/b"), "[::1]/a/b");
        assert_ne!(
            repository_key("https://github.com/acme/shop-api"),
            repository_key("https://github.com/acme/shop")
        );
    }

    #[test]
    fn no_two_keys_of_webhooks_have_one_name() {
        let id = |name: &str, version| {
            Hook::secret_id(&HookName::parse(name).unwrap(), version)
                .unwrap()
                .name
        };
        assert_eq!(id("git-hub", 2).as_str(), "DAYBOOK_HOOK_GIT_HUB_V2");
        assert_ne!(id("a", 2), id("a-v2", 1));
    }
}
