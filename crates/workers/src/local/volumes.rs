//! What is kept from one deployment of an instance to the next.
//!
//! A volume is a folder below the cluster's own, one for each volume of each service instance. All
//! deployments and instances of that share it, and find it by a variable: an image is a folder of
//! files here and no root file system, so that nothing can be mounted into it. It goes when its
//! environment does.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use daybook_events::spec::RunSpec;
use daybook_events::{ServiceName, VolumeName};

use super::{make_private, state_file};
use crate::target::AppRef;

/// The volumes of a cluster.
#[derive(Debug, Clone)]
pub(super) struct Volumes(PathBuf);

impl Volumes {
    /// Below a cluster's folder.
    pub(super) fn of(cluster: &Path) -> Self {
        Self(cluster.join("volumes"))
    }

    fn of_app(&self, app: &AppRef) -> PathBuf {
        self.0.join(format!("{}.{}", app.project, app.environment))
    }

    fn path(&self, app: &AppRef, service: &ServiceName, name: &VolumeName) -> PathBuf {
        let service = self.of_app(app).join(service.as_str());
        service.join(name.as_str())
    }

    /// The variables that say where an instance's volumes are.
    pub(super) fn variables(
        &self,
        app: &AppRef,
        service: &ServiceName,
        run: &RunSpec,
    ) -> BTreeMap<String, String> {
        let one = |(name, volume): (&VolumeName, &daybook_events::spec::VolumeSpec)| {
            let path = self.path(app, service, name);
            (volume.variable(name), path.display().to_string())
        };
        run.volumes.iter().map(one).collect()
    }

    /// Makes the folders of an instance's volumes that are not there yet.
    pub(super) fn make(
        &self,
        app: &AppRef,
        service: &ServiceName,
        run: &RunSpec,
    ) -> io::Result<()> {
        for name in run.volumes.keys() {
            make_private(&self.path(app, service, name))?;
        }
        Ok(())
    }

    /// Removes all volumes of an environment.
    pub(super) fn remove(&self, app: &AppRef) -> io::Result<()> {
        state_file::remove(&self.of_app(app))
    }
}
