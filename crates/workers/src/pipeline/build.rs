//! Runs builds: clone, build, push; each step an event, each line of output kept as it comes.
//!
//! Whoever takes a build on starts a new attempt, and everything that it reports names it. If
//! this process dies, the request is delivered to another one, which starts the next attempt; if
//! this one then comes back, its events no longer fit and it gives up.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use daybook_events::build::{
    self, Build, BuildEvent, BuildStatus, BuilderStarted, Cancelled, Failed, LogSeal, PushStarted,
    Started, Succeeded,
};
use daybook_events::lines::{LineKind, LineLog, LineSource, NewLine};
use daybook_events::{
    AggregateKind, BuildId, DeploymentId, Digest, EventId, Subject, SubjectFilter,
};
use daybook_projections::Executed;
use daybook_trace::figures;
use jiff::Timestamp;
use sha2::Digest as _;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::{Bench, Stop};
use crate::driver::{Activation, Outcome, Worker};
use crate::ports::{BuildInput, Images, Output, Sources, StepError};

const ROLE: &str = "build";

/// The build worker.
pub struct Builds {
    /// Shared.
    pub bench: Bench,
    /// Source repositories.
    pub sources: Arc<dyn Sources>,
    /// Images.
    pub images: Arc<dyn Images>,
}

#[async_trait]
impl Worker for Builds {
    fn name(&self) -> String {
        ROLE.into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Build)
    }
    fn wants(&self, kind: &str) -> bool {
        kind == "build.requested.v1"
    }
    fn concurrency(&self) -> usize {
        self.bench.settings.builds
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Subject::Build(_, id) = a.subject else {
            return Outcome::Done;
        };
        match self.run(a, id).await {
            Ok(()) => Outcome::Done,
            Err(Stop::Moved(refusal)) => {
                tracing::info!(build.id = %id, code = refusal.code, "what this attempt found came too late");
                match self.build(&a.subject) {
                    Ok(Some(build)) if !build.status.is_final() => Outcome::Overtaken,
                    _ => Outcome::Done,
                }
            }
            Err(Stop::Interrupted) => Outcome::Interrupted,
            Err(Stop::Retry(why)) => Outcome::Retry(why),
            Err(Stop::Fail(error)) => self.record_failure(a, id, &error).await,
        }
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        let Subject::Build(_, id) = a.subject else {
            return Outcome::Done;
        };
        let (code, message) = why.split_once(": ").unwrap_or(("gave_up", why));
        let code = if code.contains(' ') { "gave_up" } else { code };
        let error = StepError::fatal(
            code,
            format!("{message} (given up after {} tries)", a.attempt),
            "mend the cause and deploy again",
        );
        self.record_failure(a, id, &error).await
    }
}

/// An attempt in progress.
struct Attempt<'a> {
    worker: &'a Builds,
    subject: &'a Subject,
    cause: EventId,
    id: BuildId,
    number: u32,
    correlation: uuid::Uuid,
}

impl Attempt<'_> {
    async fn append(&self, step: &str, event: BuildEvent) -> Result<(), Stop> {
        let bench = &self.worker.bench;
        let event = bench.masked(self.subject, event);
        let step = format!("{step}-{}", self.number);
        let context = bench.follow_up(ROLE, self.cause, self.correlation, &step);
        let executed = bench
            .append::<Build>(self.subject, &context, |state| {
                build::decide(state, event.clone())
            })
            .await?;
        if matches!(executed, Executed::Appended { .. }) {
            count(&event);
        }
        Ok(())
    }
}

/// Counts what a build has come to.
fn count(event: &BuildEvent) {
    let builds = figures::builds();
    let counted = match event {
        BuildEvent::Succeeded(_) => &builds.succeeded,
        BuildEvent::Failed(_) => &builds.failed,
        BuildEvent::Cancelled(_) => &builds.cancelled,
        _ => return,
    };
    counted.fetch_add(1, Ordering::Relaxed);
}

impl Builds {
    fn build(&self, subject: &Subject) -> Result<Option<Build>, Stop> {
        Ok(self
            .bench
            .ledger
            .projections()
            .folded::<Build>(subject)?
            .state)
    }

    async fn run(&self, a: &Activation, id: BuildId) -> Result<(), Stop> {
        let Some(build) = self.build(&a.subject)? else {
            return Ok(());
        };
        if build.status.is_final() {
            return Ok(());
        }
        let attempt = Attempt {
            worker: self,
            subject: &a.subject,
            cause: a.event.id,
            id,
            number: build.attempt + 1,
            correlation: a.event.correlationid,
        };
        if !self.is_wanted(id, DeploymentId(a.event.correlationid))? {
            return attempt
                .append(
                    "cancelled",
                    BuildEvent::Cancelled(Cancelled {
                        attempt: current(&build),
                        message: "no deployment waits for it any more".into(),
                        log: LogSeal::default(),
                    }),
                )
                .await;
        }
        attempt
            .append(
                "started",
                BuildEvent::Started(Started {
                    attempt: attempt.number,
                    worker: self.bench.settings.worker.clone(),
                }),
            )
            .await?;

        let _running = figures::builds().begin();
        let handed_over = a.cancel.child_token();
        let cancel = handed_over.child_token();
        let watch = CancelOnDrop(tokio::spawn(watch_wanted(
            self.bench.clone(),
            a.subject.clone(),
            id,
            DeploymentId(a.event.correlationid),
            attempt.number,
            (handed_over.clone(), cancel.clone()),
        )));
        let (output, writer) = open_output(self.bench.lines.clone(), id);
        if attempt.number > 1 {
            let text = format!(
                "-- attempt {}: the worker before was lost --",
                attempt.number
            );
            let _ = output.send(text).await;
        }
        let result = self
            .attempt(&attempt, &build, &output, (&handed_over, &cancel))
            .await;
        drop(watch);
        drop(output);
        let _ = writer.await;
        if a.cancel.is_cancelled() && result.is_err() {
            return Err(Stop::Interrupted);
        }
        match result {
            Ok(image) => {
                let log = self.seal(id).await?;
                attempt
                    .append(
                        "succeeded",
                        BuildEvent::Succeeded(Succeeded {
                            attempt: attempt.number,
                            image,
                            log,
                        }),
                    )
                    .await
            }
            Err(_) if cancel.is_cancelled() => {
                let log = self.seal(id).await?;
                attempt
                    .append(
                        "cancelled",
                        BuildEvent::Cancelled(Cancelled {
                            attempt: attempt.number,
                            message: "no deployment waits for it any more".into(),
                            log,
                        }),
                    )
                    .await
            }
            Err(stop) => Err(stop),
        }
    }

    async fn attempt(
        &self,
        attempt: &Attempt<'_>,
        build: &Build,
        output: &Output,
        (handed_over, cancel): (&CancellationToken, &CancellationToken),
    ) -> Result<daybook_events::spec::PinnedImage, Stop> {
        let request = &build.request;
        let scratch = Scratch::new(&self.bench.settings.scratch, attempt.id, attempt.number)?;
        let checkout = scratch.0.join("source");
        let work = scratch.0.join("work");
        for folder in [&checkout, &work] {
            std::fs::create_dir_all(folder).map_err(|e| scratch_failed(&e))?;
        }
        let summary = request.commit.message.lines().next().unwrap_or_default();
        let text = format!(
            "cloning {} at {} {summary}",
            request.url,
            request.commit.commit.short()
        );
        let _ = output.send(text).await;
        let cloned = self.sources.checkout(
            &request.url,
            &request.commit.commit,
            &checkout,
            output,
            cancel,
        );
        daybook_trace::part("clone", cloned).await?;
        attempt
            .append(
                "builder_started",
                BuildEvent::BuilderStarted(BuilderStarted {
                    attempt: attempt.number,
                    commit: request.commit.commit.clone(),
                }),
            )
            .await?;
        let input = BuildInput {
            build: attempt.id,
            request: build.requests,
            project: &request.project,
            service: &request.service,
            checkout: &checkout,
            path: &request.path,
            spec: &request.spec,
            commit: &request.commit,
            url: &request.url,
            scratch: &work,
            repository: &request.repository,
            tag: &request.tag,
            handed_over,
        };
        let built = self.images.build(input, output, cancel);
        let built = daybook_trace::part("build image", built).await?;
        attempt
            .append(
                "push_started",
                BuildEvent::PushStarted(PushStarted {
                    attempt: attempt.number,
                    digest: built.digest.clone(),
                    builder: built.builder.clone(),
                    detected: built.detected.clone(),
                    size_bytes: built.size_bytes,
                }),
            )
            .await?;
        let push = self
            .images
            .push(&built, &work, &request.repository, &request.tag, output);
        let image = tokio::select! {
            image = daybook_trace::part("push", push) => image?,
            () = cancel.cancelled() => return Err(Stop::Interrupted),
        };
        Ok(image)
    }

    async fn record_failure(&self, a: &Activation, id: BuildId, error: &StepError) -> Outcome {
        let result = async {
            let Some(build) = self.build(&a.subject)? else {
                return Ok(());
            };
            let attempt = Attempt {
                worker: self,
                subject: &a.subject,
                cause: a.event.id,
                id,
                number: build.attempt,
                correlation: a.event.correlationid,
            };
            let log = self.seal(id).await?;
            attempt
                .append(
                    "failed",
                    BuildEvent::Failed(Failed {
                        attempt: current(&build),
                        code: error.code.clone(),
                        message: error.message.clone(),
                        remedy: error.remedy.clone(),
                        log,
                    }),
                )
                .await
        }
        .await;
        match result {
            Ok(()) | Err(Stop::Moved(_)) => Outcome::Done,
            Err(Stop::Interrupted) => Outcome::Interrupted,
            Err(Stop::Retry(why)) => Outcome::Retry(why),
            Err(Stop::Fail(e)) => Outcome::Retry(e.message),
        }
    }

    fn is_wanted(&self, id: BuildId, first: DeploymentId) -> Result<bool, Stop> {
        is_wanted(&self.bench, id, first)
    }

    /// Number of lines and a digest over them, as they are kept.
    async fn seal(&self, id: BuildId) -> Result<LogSeal, Stop> {
        let mut hash = sha2::Sha256::new();
        let mut after = 0;
        loop {
            let page = self
                .bench
                .lines
                .read(LineSource::Build(id), after, 1000)
                .await
                .map_err(|e| Stop::Retry(e.to_string()))?;
            let Some(last) = page.last() else {
                break;
            };
            after = last.seq;
            for line in &page {
                hash.update(line.line.text.as_bytes());
                hash.update(b"\n");
            }
        }
        Ok(LogSeal {
            lines: after,
            digest: (after > 0).then(|| Digest::from_sha256(&hash.finalize().into())),
        })
    }
}

/// The attempt that may report an end now: none, 0, before a worker has taken the build on.
fn current(build: &Build) -> u32 {
    if build.status == BuildStatus::Requested {
        0
    } else {
        build.attempt
    }
}

/// Whether a deployment still waits for a build: one that has said so, or the one that asked for
/// the build and is about to say so.
fn is_wanted(bench: &Bench, id: BuildId, first: DeploymentId) -> Result<bool, Stop> {
    if !bench
        .ledger
        .projections()
        .deployments_of_build(id)?
        .is_empty()
    {
        return Ok(true);
    }
    Ok(bench.row(first)?.is_some_and(|row| {
        row.state.status.in_pipeline()
            && row.state.cancel.is_none()
            && row.state.build.is_none_or(|b| b == id)
    }))
}

/// Ends an attempt that nobody waits for any more, or that another worker has taken over.
async fn watch_wanted(
    bench: Bench,
    subject: Subject,
    id: BuildId,
    first: DeploymentId,
    attempt: u32,
    (handed_over, cancel): (CancellationToken, CancellationToken),
) {
    let mut changes = bench.ledger.projections().changes();
    loop {
        let build = bench
            .ledger
            .projections()
            .folded::<Build>(&subject)
            .ok()
            .and_then(|f| f.state);
        if build.as_ref().is_some_and(|b| b.attempt > attempt) {
            handed_over.cancel();
            return;
        }
        let over = build.is_some_and(|b| b.status == BuildStatus::Cancelled);
        if over || matches!(is_wanted(&bench, id, first), Ok(false)) {
            cancel.cancel();
            return;
        }
        // A busy ledger changes often; looking a few times a second is soon enough.
        tokio::time::sleep(Duration::from_millis(200)).await;
        if changes.changed().await.is_err() {
            return;
        }
    }
}

struct CancelOnDrop(JoinHandle<()>);
impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A folder of one attempt's own, removed with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(root: &std::path::Path, id: BuildId, attempt: u32) -> Result<Self, Stop> {
        let folder = root.join(format!("{id}-{attempt}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).map_err(|e| scratch_failed(&e))?;
        Ok(Self(folder))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(folder = %self.0.display(), %error, "a checkout could not be removed");
        }
    }
}

fn scratch_failed(e: &std::io::Error) -> Stop {
    Stop::Retry(format!(
        "scratch_unavailable: no folder for a checkout can be made: {e}"
    ))
}

/// Longest line that is kept, in bytes.
const LINE_MAX: usize = 16 * 1024;

/// A channel whose lines are stored in batches while they come.
pub fn open_output(lines: Arc<dyn LineLog>, build: BuildId) -> (Output, JoinHandle<()>) {
    let (sender, mut receiver) = mpsc::channel::<String>(1024);
    let writer = tokio::spawn(async move {
        let mut batch = Vec::with_capacity(256);
        while receiver.recv_many(&mut batch, 256).await > 0 {
            let time = Timestamp::now();
            let lot = batch
                .drain(..)
                .map(|text| NewLine {
                    time,
                    kind: LineKind::Build,
                    cluster: None,
                    instance: None,
                    text: cut(text),
                })
                .collect();
            if let Err(error) = lines.append(LineSource::Build(build), lot).await {
                tracing::warn!(build.id = %build, %error, "lines of a build were lost");
            }
        }
    });
    (sender, writer)
}

fn cut(mut text: String) -> String {
    if text.len() > LINE_MAX {
        let mut end = LINE_MAX;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let lost = text.len() - end;
        text.truncate(end);
        text.push_str(&format!(" … ({lost} bytes cut)"));
    }
    text
}
