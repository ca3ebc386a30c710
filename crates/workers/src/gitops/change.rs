//! Changes of an environment, as data.

use daybook_events::spec::{PinnedImage, RunSpec};
use daybook_events::{DeploymentId, EnvKey, EnvironmentName, ServiceName};

use crate::values::{EnvironmentValues, ReleaseValues, RenderedChart, ServiceValues};

/// What shall be different in an environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A release runs beside those that are there. An environment that is not in the repository
    /// yet is added: whether it exists is for the ledger to say.
    Deploy {
        /// The service.
        service: ServiceName,
        /// The deployment.
        deployment: DeploymentId,
        /// What runs, where and how.
        release: ReleaseValues,
    },
    /// The same for a release of a Helm chart.
    DeployChart {
        /// The service.
        service: ServiceName,
        /// The deployment.
        deployment: DeploymentId,
        /// What runs, and where.
        chart: RenderedChart,
    },
    /// The same as [`Self::Deploy`], with an image that another environment has. If it does not have it, nothing is
    /// committed.
    Promote {
        /// The environment that has the image.
        from: EnvironmentName,
        /// The service.
        service: ServiceName,
        /// The deployment.
        deployment: DeploymentId,
        /// What runs, where and how.
        release: ReleaseValues,
    },
    /// A release like [`Self::Deploy`], of what runs already, with other variables.
    Reconfigure {
        /// The service.
        service: ServiceName,
        /// The deployment.
        deployment: DeploymentId,
        /// What runs, where and how.
        release: ReleaseValues,
        /// The variables that differ.
        keys: Vec<EnvKey>,
    },
    /// A release has this many instances in each cluster; 0 stops it. Stopping what is not there
    /// changes nothing.
    Scale {
        /// The service.
        service: ServiceName,
        /// The deployment.
        deployment: DeploymentId,
        /// How many.
        replicas: u32,
    },
    /// A release runs in another way.
    Configure {
        /// The service.
        service: ServiceName,
        /// The deployment.
        deployment: DeploymentId,
        /// How.
        run: RunSpec,
    },
    /// A release is there no more. Removing what is not there changes nothing.
    Remove {
        /// The service.
        service: ServiceName,
        /// The deployment.
        deployment: DeploymentId,
    },
    /// An environment is there. If it is, nothing changes.
    CreateEnvironment {
        /// The environment that it takes its services with their images from. Releases belong to
        /// their environment and are not copied.
        from: Option<EnvironmentName>,
        /// Whether it goes away with its pull request.
        ephemeral: bool,
    },
    /// An environment is there no more, with everything in its folder.
    DeleteEnvironment,
}

impl Change {
    /// The deployment that it is about.
    pub fn deployment(&self) -> Option<DeploymentId> {
        match self {
            Self::Deploy { deployment, .. }
            | Self::DeployChart { deployment, .. }
            | Self::Promote { deployment, .. }
            | Self::Reconfigure { deployment, .. }
            | Self::Scale { deployment, .. }
            | Self::Configure { deployment, .. }
            | Self::Remove { deployment, .. } => Some(*deployment),
            Self::CreateEnvironment { .. } | Self::DeleteEnvironment => None,
        }
    }

    /// The service whose configuration it is about, for a message whose title does not name it.
    pub(super) fn configures(&self) -> Option<&ServiceName> {
        match self {
            Self::Scale { service, .. } | Self::Reconfigure { service, .. } => Some(service),
            _ => None,
        }
    }

    /// The other environment that it reads.
    pub(super) fn reads(&self) -> Option<&EnvironmentName> {
        match self {
            Self::Promote { from, .. } => Some(from),
            Self::CreateEnvironment { from, .. } => from.as_ref(),
            _ => None,
        }
    }
}

/// Why a change cannot be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CannotChange {
    EnvironmentMissing,
    ReleaseMissing,
    NothingToPromote,
}

/// What becomes of an environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum After {
    /// These are its values.
    Values(EnvironmentValues),
    /// It is there no more.
    Deleted,
    /// Nothing is touched.
    AsBefore,
}

/// What a change comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Changed {
    /// What becomes of the environment.
    pub(super) after: After,
    /// The tag of the image that the change is about, or the version of the chart.
    pub(super) tag: Option<String>,
}

/// Makes a change: of an environment as it is, where it is, and of the other environment that it
/// reads. `empty` is what a new environment begins as.
pub(super) fn make(
    change: &Change,
    empty: EnvironmentValues,
    current: Option<&EnvironmentValues>,
    other: Option<&EnvironmentValues>,
) -> Result<Changed, CannotChange> {
    let existing = || current.cloned().ok_or(CannotChange::EnvironmentMissing);
    match change {
        Change::Deploy {
            service,
            deployment,
            release,
        }
        | Change::Reconfigure {
            service,
            deployment,
            release,
            ..
        } => Ok(deploy(
            current.cloned().unwrap_or(empty),
            service,
            *deployment,
            release,
        )),
        Change::DeployChart {
            service,
            deployment,
            chart,
        } => {
            let mut values = current.cloned().unwrap_or(empty);
            let of_service = values.services.entry(service.clone()).or_default();
            of_service.charts.insert(*deployment, chart.clone());
            Ok(changed(values, Some(chart.chart.version.to_string())))
        }
        Change::Promote {
            service,
            deployment,
            release,
            ..
        } => {
            if !other.is_some_and(|o| has_image(o, service, &release.image)) {
                return Err(CannotChange::NothingToPromote);
            }
            Ok(deploy(
                current.cloned().unwrap_or(empty),
                service,
                *deployment,
                release,
            ))
        }
        Change::Scale {
            service,
            deployment,
            replicas,
        } => {
            let mut values = existing()?;
            if let Some(chart) = chart_mut(&mut values, service, *deployment) {
                chart.stopped = *replicas == 0;
                let version = Some(chart.chart.version.to_string());
                return Ok(changed(values, version));
            }
            match release_mut(&mut values, service, *deployment) {
                Some(release) => {
                    release.run.replicas = *replicas;
                    let tag = tag_of(&release.image);
                    Ok(changed(values, tag))
                }
                None if *replicas == 0 => Ok(AS_BEFORE),
                None => Err(CannotChange::ReleaseMissing),
            }
        }
        Change::Configure {
            service,
            deployment,
            run,
        } => {
            let mut values = existing()?;
            let release = release_mut(&mut values, service, *deployment)
                .ok_or(CannotChange::ReleaseMissing)?;
            release.run = run.clone();
            let tag = tag_of(&release.image);
            Ok(changed(values, tag))
        }
        Change::Remove {
            service,
            deployment,
        } => {
            let Some(mut values) = current.cloned() else {
                return Ok(AS_BEFORE);
            };
            let Some(of_service) = values.services.get_mut(service) else {
                return Ok(AS_BEFORE);
            };
            if let Some(chart) = of_service.charts.remove(deployment) {
                return Ok(changed(values, Some(chart.chart.version.to_string())));
            }
            match of_service.releases.remove(deployment) {
                Some(release) => Ok(changed(values, tag_of(&release.image))),
                None => Ok(AS_BEFORE),
            }
        }
        Change::CreateEnvironment { from, ephemeral } => {
            if current.is_some() {
                return Ok(AS_BEFORE);
            }
            if from.is_some() && other.is_none() {
                return Err(CannotChange::EnvironmentMissing);
            }
            let values = EnvironmentValues {
                ephemeral: *ephemeral,
                services: other.map(images_of).unwrap_or_default(),
                ..empty
            };
            Ok(changed(values, None))
        }
        Change::DeleteEnvironment => Ok(Changed {
            after: After::Deleted,
            tag: None,
        }),
    }
}

const AS_BEFORE: Changed = Changed {
    after: After::AsBefore,
    tag: None,
};

fn changed(values: EnvironmentValues, tag: Option<String>) -> Changed {
    Changed {
        after: After::Values(values),
        tag,
    }
}

fn tag_of(image: &PinnedImage) -> Option<String> {
    Some(image.tag.to_string())
}

fn deploy(
    mut values: EnvironmentValues,
    service: &ServiceName,
    deployment: DeploymentId,
    release: &ReleaseValues,
) -> Changed {
    let service = values.services.entry(service.clone()).or_default();
    service.image = Some(release.image.clone());
    service.releases.insert(deployment, release.clone());
    changed(values, tag_of(&release.image))
}

fn chart_mut<'a>(
    values: &'a mut EnvironmentValues,
    service: &ServiceName,
    deployment: DeploymentId,
) -> Option<&'a mut RenderedChart> {
    values
        .services
        .get_mut(service)?
        .charts
        .get_mut(&deployment)
}

fn release_mut<'a>(
    values: &'a mut EnvironmentValues,
    service: &ServiceName,
    deployment: DeploymentId,
) -> Option<&'a mut ReleaseValues> {
    values
        .services
        .get_mut(service)?
        .releases
        .get_mut(&deployment)
}

fn has_image(values: &EnvironmentValues, service: &ServiceName, image: &PinnedImage) -> bool {
    values.services.get(service).is_some_and(|s| {
        s.image.as_ref() == Some(image) || s.releases.values().any(|r| r.image == *image)
    })
}

fn images_of(values: &EnvironmentValues) -> std::collections::BTreeMap<ServiceName, ServiceValues> {
    values
        .services
        .iter()
        .map(|(name, service)| {
            let values = ServiceValues {
                image: service.image.clone(),
                ..ServiceValues::default()
            };
            (name.clone(), values)
        })
        .collect()
}
