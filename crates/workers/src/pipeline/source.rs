//! The first step of a run: the ref becomes a commit, once and for all, and its build is asked
//! for; or the given image or chart is fetched and pinned.

use async_trait::async_trait;
use daybook_events::build::{self, Build, BuildEvent};
use daybook_events::chart::{ChartReference, ChartVersion};
use daybook_events::deployment::{
    ChartPinned, CloningStarted, DeploymentEvent, ImagePinned, SourceResolved, Status, Version,
    build_id,
};
use daybook_events::routing::Routing;
use daybook_events::{AggregateKind, Digest, ImageTag, Subject, SubjectFilter};
use daybook_projections::DeploymentRow;
use std::sync::Arc;

use super::{Bench, Stop, give_up, settle};
use crate::charts::Charts;
use crate::driver::{Activation, Outcome, Worker};
use crate::ports::{Images, Sources, StepError};

const ROLE: &str = "source";

/// The worker that resolves what is to be deployed.
pub struct Source {
    /// Shared.
    pub bench: Bench,
    /// Source repositories.
    pub sources: Arc<dyn Sources>,
    /// Images.
    pub images: Arc<dyn Images>,
    /// Charts; none can be deployed without.
    pub charts: Option<Arc<dyn Charts>>,
}

#[async_trait]
impl Worker for Source {
    fn name(&self) -> String {
        ROLE.into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Deployment)
    }
    fn wants(&self, kind: &str) -> bool {
        kind == "deployment.queued.v1"
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Subject::Deployment(_, _, id) = a.subject else {
            return Outcome::Done;
        };
        let result = tokio::select! {
            result = self.step(a) => result,
            () = a.cancel.cancelled() => Err(Stop::Interrupted),
        };
        settle(&self.bench, ROLE, id, result).await
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        give_up(&self.bench, ROLE, a, why).await
    }
}

impl Source {
    async fn step(&self, a: &Activation) -> Result<(), Stop> {
        let Subject::Deployment(_, _, id) = a.subject else {
            return Ok(());
        };
        let Some(mut row) = self.bench.row(id)? else {
            return Ok(());
        };
        if !matches!(row.state.status, Status::Queued | Status::Cloning)
            || row.state.source.is_some()
        {
            return Ok(());
        }
        let (url, git_ref, path) = match row.state.request.version.clone() {
            Version::Image { reference } => {
                self.bench
                    .say(id, None, format!("checking that image {reference} exists"))
                    .await;
                let image = self.images.resolve(&reference).await?;
                self.bench
                    .say(id, None, format!("image {} is {}", reference, image.digest))
                    .await;
                let event = DeploymentEvent::ImagePinned(ImagePinned {
                    image,
                    build: None,
                    shared: false,
                });
                self.bench
                    .advance(ROLE, &row, "image_pinned", event)
                    .await?;
                return Ok(());
            }
            Version::Helm { chart, version } => return self.pin_chart(&row, chart, version).await,
            Version::Git { url, git_ref, path } => (url, git_ref, path),
        };
        if row.state.status == Status::Queued {
            let event = DeploymentEvent::CloningStarted(CloningStarted {
                worker: self.bench.settings.worker.clone(),
            });
            row = match self
                .bench
                .advance(ROLE, &row, "cloning_started", event)
                .await
            {
                // Somebody else took it on, who may die: the event is only done when its commit is
                // known.
                Err(Stop::Moved(refusal)) => return Err(Stop::Retry(refusal.message)),
                advanced => advanced?,
            };
        }
        let resolved = self.sources.resolve(&url, &git_ref).await?;
        let branch = resolved.branch;
        let source = self.bench.masked(&row.subject, resolved.commit);
        let summary = source.message.lines().next().unwrap_or_default();
        self.bench
            .say(
                id,
                None,
                format!("{git_ref} is {}: {summary}", source.commit.short()),
            )
            .await;

        let repository = self.bench.image_repository(&row)?;
        let request = &row.state.request;
        let build = build_id(&url, &source.commit, &path, &request.build, &repository);
        let tag = ImageTag::parse(source.commit.short()).map_err(|e| Stop::Retry(e.to_string()))?;
        let asked = BuildEvent::Requested(Box::new(build::Requested {
            project: request.instance.project.clone(),
            service: request.instance.service.clone(),
            url: url.clone(),
            commit: source.clone(),
            path,
            spec: request.build.clone(),
            repository,
            tag,
        }));
        // The build is asked for before the deployment says that it waits for it: whoever finds
        // it waiting finds a build.
        let subject = Subject::Build(request.instance.project.clone(), build);
        let context =
            self.bench
                .follow_up(ROLE, row.state.status_event, row.id.0, "build_requested");
        self.bench
            .append::<Build>(&subject, &context, |state| {
                build::decide(state, asked.clone())
            })
            .await?;
        let event = DeploymentEvent::SourceResolved(SourceResolved {
            source,
            build,
            branch,
        });
        self.bench
            .advance(ROLE, &row, "source_resolved", event)
            .await?;
        Ok(())
    }

    /// Fetches a chart and pins it.
    async fn pin_chart(
        &self,
        row: &DeploymentRow,
        chart: ChartReference,
        version: ChartVersion,
    ) -> Result<(), Stop> {
        let charts = self.charts.as_deref();
        let clusters = &row.state.request.clusters;
        let able = charts.filter(|charts| clusters.iter().all(|c| charts.run_on(c)));
        let Some(able) = able else {
            return Err(not_rendered(row, charts, &chart).into());
        };
        let text = format!("fetching the chart {chart}:{version}");
        self.bench.say(row.id, None, text).await;
        let expected = self.expected(row, &chart, &version)?;
        let chart = able.pin(&chart, &version, expected.as_ref()).await?;
        let text = format!(
            "chart {}:{} is {}",
            chart.chart, chart.version, chart.digest
        );
        self.bench.say(row.id, None, text).await;
        let event = DeploymentEvent::ChartPinned(ChartPinned { chart });
        self.bench.advance(ROLE, row, "chart_pinned", event).await?;
        Ok(())
    }

    /// The digest that this version of a chart has where it was deployed before: by the deployment
    /// that this one repeats or promotes, or by the one that has the traffic.
    fn expected(
        &self,
        row: &DeploymentRow,
        chart: &ChartReference,
        version: &ChartVersion,
    ) -> Result<Option<Digest>, Stop> {
        let request = &row.state.request;
        let subject = Subject::Routing(request.instance.project.clone());
        let routing = self
            .bench
            .ledger
            .projections()
            .shared::<Routing>(&subject)?;
        let traffic = routing
            .state
            .as_ref()
            .and_then(|r| r.traffic(&request.instance));
        let main = traffic.and_then(|traffic| traffic.main);
        let promoted = request.promoted_from.as_ref().map(|from| from.deployment);
        for id in [request.redeploy_of, promoted, main].into_iter().flatten() {
            let before = self.bench.row(id)?.and_then(|row| row.state.chart.clone());
            let same = before.filter(|b| b.chart == *chart && b.version == *version);
            if let Some(same) = same {
                return Ok(Some(same.digest));
            }
        }
        Ok(None)
    }
}

/// Why a chart is not deployed: some of its clusters run no charts.
fn not_rendered(
    row: &DeploymentRow,
    charts: Option<&dyn Charts>,
    chart: &ChartReference,
) -> StepError {
    let clusters = row.state.request.clusters.iter();
    let clusters = clusters.filter(|c| charts.is_none_or(|charts| !charts.run_on(c)));
    let clusters: Vec<_> = clusters.map(|c| c.as_str()).collect();
    StepError::fatal(
        "charts_not_supported",
        format!(
            "{chart} is a Helm chart, and {} cannot render charts",
            clusters.join(", ")
        ),
        "deploy an image (`--image`) or a git ref (`--ref`) of the service, or a chart to Kubernetes \
         clusters (`daybook up --kubernetes`)",
    )
}
