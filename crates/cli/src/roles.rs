//! The roles that a process can take on.

use std::collections::BTreeSet;

use clap::ValueEnum;

/// A part of Daybook that a process runs. Any number of processes may run each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Role {
    /// The HTTP interface.
    Api,
    /// Resolves sources and builds images.
    Build,
    /// Makes the GitOps commits.
    Package,
    /// Looks after clusters: hands them commits, and records what they show.
    Sync,
    /// Admits deployments, switches routes, and concludes rollouts.
    Route,
    /// Asks the public addresses.
    Probe,
    /// Looks at addresses from where users are: DNS, TLS and who answers, as --endpoint-checks says.
    /// A process with the role `probe` does so too, if it has that file.
    Endpoints,
    /// Does what falls due: scheduled stops, ends of freezes, approvals that expire.
    Timers,
    /// Sends events to those who subscribed to them.
    Notify,
    /// The local gateway, which serves the routes.
    Gateway,
    /// Signs the ledger, and compares the log with what was signed.
    Notary,
    /// All roles but `api`, `gateway`, `notary` and `endpoints`.
    Worker,
}

impl Role {
    /// All roles, each for itself.
    pub fn all() -> BTreeSet<Self> {
        Self::expand([Self::Api, Self::Worker, Self::Gateway, Self::Notary])
    }

    /// Roles with `worker` taken apart.
    pub fn expand(roles: impl IntoIterator<Item = Self>) -> BTreeSet<Self> {
        roles
            .into_iter()
            .flat_map(|role| match role {
                Self::Worker => vec![
                    Self::Build,
                    Self::Package,
                    Self::Sync,
                    Self::Route,
                    Self::Probe,
                    Self::Timers,
                    Self::Notify,
                ],
                one => vec![one],
            })
            .collect()
    }

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Build => "build",
            Self::Package => "package",
            Self::Sync => "sync",
            Self::Route => "route",
            Self::Probe => "probe",
            Self::Endpoints => "endpoints",
            Self::Timers => "timers",
            Self::Notify => "notify",
            Self::Gateway => "gateway",
            Self::Notary => "notary",
            Self::Worker => "worker",
        }
    }
}
