//! What a long queue costs in memory: deployments that are all asked for before the first of them
//! is admitted, to targets that do nothing, with the real log, projections and workers.

use std::path::Path;
use std::time::{Duration, Instant};

use daybook_events::deployment::Status;

use crate::orchestrate::World;
use crate::report::{Comparison, Report};
use crate::{Failure, temporary_folder};

/// What the process may take at most, in MiB.
const ALLOWED_MIB: f64 = 300.0;
const MIB_PER_GIB: f64 = 1024.0;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Deployments that are queued at once
    #[arg(long, default_value_t = 1000)]
    deployments: usize,
    /// Service instances that they are for; of those for the same one all but the newest are
    /// superseded
    #[arg(long, value_delimiter = ',', default_values_t = [50, 1000])]
    services: Vec<usize>,
    /// Instances that each deployment runs
    #[arg(long, default_value_t = 50)]
    replicas: u32,
    /// Where the log is kept meanwhile
    #[arg(long)]
    folder: Option<std::path::PathBuf>,
}

pub(crate) async fn run(options: Options) -> Result<Report, Failure> {
    let mut comparisons = Vec::new();
    for &services in &options.services {
        let folder = temporary_folder(options.folder.as_deref())?;
        let (peak, taken, live) = drain(folder.path(), &options, services).await?;
        comparisons.push(Comparison {
            subject: format!(
                "{} deployments of {services} services, {} instances each: {live} became live, \
                 drained in {:.1} s with {peak:.0} MiB",
                options.deployments,
                options.replicas,
                taken.as_secs_f64()
            ),
            yardstick: "300 MiB",
            measured: vec![MIB_PER_GIB / peak],
            against: vec![MIB_PER_GIB / ALLOWED_MIB],
            limit: Some(1.0),
        });
    }
    Ok(Report {
        title: "The most memory that a process takes while a long queue drains".to_owned(),
        unit: "1/GiB",
        notes: Vec::new(),
        comparisons,
    })
}

/// The most memory in MiB, how long it took, and how many became live.
async fn drain(
    folder: &Path,
    options: &Options,
    services: usize,
) -> Result<(f64, Duration, usize), Failure> {
    crate::audit::reset_peak()?;
    let world = World::open(folder).await?;
    let mut all = Vec::with_capacity(options.deployments);
    for number in 0..options.deployments {
        let service = format!("s{}", number % services);
        all.push(world.request(&service, options.replicas).await?);
    }
    let begun = Instant::now();
    world.work().await?;
    let mut live = 0;
    for subject in &all {
        match world.settled(subject).await? {
            Status::Started => live += 1,
            Status::Cancelled => {}
            other => return Err(format!("{subject} is {}", other.as_str()).into()),
        }
    }
    let taken = begun.elapsed();
    let peak = crate::audit::peak()?;
    world.stop().await;
    Ok((peak, taken, live))
}
