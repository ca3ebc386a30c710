//! Mirrors a build's steps to the deployments that wait for it.
//!
//! A build may be shared, and a deployment may come to it late. Woken by an event of the build,
//! the worker takes every waiting deployment to where the build *was* at that event, so that each
//! phase is seen; woken by a deployment that has just found its build, it takes that one to where
//! the build *is*.

use async_trait::async_trait;
use daybook_events::build::{Build, BuildStatus};
use daybook_events::deployment::{
    BuildingStarted, DeploymentEvent, ImagePinned, PushingStarted, Status,
};
use daybook_events::{AggregateKind, BuildId, DeploymentId, Subject, SubjectFilter};
use daybook_projections::DeploymentRow;

use super::{Bench, Stop, give_up, settle};
use crate::driver::{Activation, Outcome, Worker};
use crate::ports::StepError;

const ROLE: &str = "follow";

/// Follows builds.
#[derive(Debug)]
pub struct FollowBuild(pub Bench);

/// Takes deployments to where their build is.
#[derive(Debug)]
pub struct FollowDeployment(pub Bench);

#[async_trait]
impl Worker for FollowBuild {
    fn name(&self) -> String {
        "follow-build".into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Build)
    }
    fn wants(&self, kind: &str) -> bool {
        !matches!(kind, "build.requested.v1" | "build.started.v1")
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Subject::Build(_, build) = a.subject else {
            return Outcome::Done;
        };
        let waiting = match self.0.ledger.projections().deployments_of_build(build) {
            Ok(ids) => ids,
            Err(e) => return Outcome::Retry(e.to_string()),
        };
        let was = match a.event.short_kind() {
            "build.builder_started.v1" => Some(BuildStatus::Building),
            "build.push_started.v1" => Some(BuildStatus::Pushing),
            _ => None,
        };
        let mut outcome = Outcome::Done;
        for id in waiting {
            let stepped = Box::pin(async {
                let result = step(&self.0, id, &a.subject, build, was, false).await;
                settle(&self.0, ROLE, id, result).await
            });
            match self.0.in_its_own_trace(ROLE, id, &a.event, stepped).await {
                Outcome::Done => {}
                other => outcome = other,
            }
        }
        outcome
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        give_up(&self.0, ROLE, a, why).await
    }
}

#[async_trait]
impl Worker for FollowDeployment {
    fn name(&self) -> String {
        "follow-deployment".into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Deployment)
    }
    fn wants(&self, kind: &str) -> bool {
        kind == "deployment.source_resolved.v1"
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Subject::Deployment(project, _, id) = &a.subject else {
            return Outcome::Done;
        };
        let result = async {
            let Some(build) = self.0.row(*id)?.and_then(|row| row.state.build) else {
                return Ok(());
            };
            step(
                &self.0,
                *id,
                &Subject::Build(project.clone(), build),
                build,
                None,
                true,
            )
            .await
        }
        .await;
        settle(&self.0, ROLE, *id, result).await
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        give_up(&self.0, ROLE, a, why).await
    }
}

async fn step(
    bench: &Bench,
    id: DeploymentId,
    subject: &Subject,
    build_id: BuildId,
    was: Option<BuildStatus>,
    late: bool,
) -> Result<(), Stop> {
    let Some(build) = bench.ledger.projections().folded::<Build>(subject)?.state else {
        return Ok(());
    };
    let Some(row) = bench.row(id)? else {
        return Ok(());
    };
    if row.state.build != Some(build_id) {
        return Ok(());
    }
    let status = row.state.status;
    match was.unwrap_or(build.status) {
        BuildStatus::Requested | BuildStatus::Cloning => Ok(()),
        BuildStatus::Building if status == Status::Cloning => {
            let event = DeploymentEvent::BuildingStarted(BuildingStarted { build: build_id });
            bench.advance(ROLE, &row, "building_started", event).await?;
            Ok(())
        }
        BuildStatus::Pushing if matches!(status, Status::Cloning | Status::Building) => {
            let event = DeploymentEvent::PushingStarted(PushingStarted { build: build_id });
            bench.advance(ROLE, &row, "pushing_started", event).await?;
            Ok(())
        }
        BuildStatus::Succeeded => pin(bench, &row, &build, build_id, late).await,
        BuildStatus::Failed | BuildStatus::Cancelled
            if matches!(status, Status::Cloning | Status::Building | Status::Pushing) =>
        {
            let error = match build.failure {
                Some(f) => StepError::fatal(&f.code, f.message, f.remedy),
                None => {
                    StepError::fatal("build_cancelled", "the build was cancelled", "deploy again")
                }
            };
            Err(Stop::Fail(error))
        }
        _ => Ok(()),
    }
}

async fn pin(
    bench: &Bench,
    row: &DeploymentRow,
    build: &Build,
    id: BuildId,
    late: bool,
) -> Result<(), Stop> {
    let (Some(image), Status::Cloning | Status::Building | Status::Pushing) =
        (build.image.clone(), row.state.status)
    else {
        return Ok(());
    };
    if late {
        let text = format!(
            "image {} of this commit was built before: {}",
            image.tag, image.digest
        );
        bench.say(row.id, None, text).await;
    }
    let event = DeploymentEvent::ImagePinned(ImagePinned {
        image,
        build: Some(id),
        shared: late,
    });
    bench.advance(ROLE, row, "image_pinned", event).await?;
    Ok(())
}
