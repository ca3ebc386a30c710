//! The life of a build's Job, from its first pod to its end.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use daybook_events::Digest;
use daybook_workers::ports::{Output, StepError};
use daybook_workers::target::Problem;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use k8s_openapi::api::batch::v1::{Job, JobCondition};
use k8s_openapi::api::core::v1::{ContainerStateTerminated, Event as Occurrence, Pod};
use kube::api::ListParams;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt as _, watcher as watch};
use kube::{Api, ResourceExt};
use tokio::sync::watch as channel;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::printer::{Printer, View};
use super::{ClusterBuilds, Made, job, refused, say};
use crate::apply::timely;
use crate::diagnosis::{self, Warning};
use crate::watches::{SaidAt, said_at};

/// What a pod whose Job has ended may still have to say is waited for so long.
const LAST_WORDS: Duration = Duration::from_secs(30);
/// So often the pods are asked for at the end, and so long apart.
const LAST_LOOKS: u32 = 5;
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// So many lines of what a container printed last are in the message of its failure.
const TAIL: usize = 20;

/// Why there is no image, and whether the Job is to be deleted for it.
pub(super) struct Ending {
    pub(super) error: StepError,
    pub(super) delete: bool,
}

/// What the watches see: one at a time, so that its size does not matter.
#[allow(clippy::large_enum_variant)]
enum Sight {
    Job(Event<Job>),
    Pod(Event<Pod>),
    Warning(Event<Occurrence>),
}

/// What is known of a Job.
#[derive(Default)]
struct World {
    /// Its name, which those of its pods begin with.
    name: String,
    job: Option<Job>,
    /// The Job was seen, and is gone.
    gone: bool,
    /// It was in the list that is being read.
    listed: bool,
    pods: HashMap<String, Pod>,
    /// The newest about each object, by name.
    warnings: HashMap<String, (SaidAt, Warning)>,
}

struct AbortOnDrop(JoinHandle<()>);
impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl ClusterBuilds {
    /// Follows a Job to its end. The digest of the image, unless the pod that knew is gone.
    pub(super) async fn follow(
        &self,
        made: &Made,
        output: &Output,
        handed_over: &CancellationToken,
        cancel: &CancellationToken,
    ) -> Result<Option<Digest>, Ending> {
        let (view, seen) = channel::channel(View::default());
        let printer = Printer {
            pods: self.pods(),
            output: output.clone(),
            view: seen,
        };
        let mut printer = AbortOnDrop(tokio::spawn(printer.run()));
        let mut sights = self.sights(made);
        let mut world = World {
            name: made.name.clone(),
            ..World::default()
        };
        let mut stuck: Option<(Problem, Instant)> = None;
        let mut troubled = false;
        loop {
            let patience = stuck
                .as_ref()
                .map(|(_, since)| *since + self.options.start_within);
            let out_of_patience = async {
                match patience {
                    Some(until) => tokio::time::sleep_until(until.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(cancelled(handed_over)),
                sight = sights.next() => match sight {
                    Some(Ok(sight)) => {
                        troubled = false;
                        world.take(sight);
                    }
                    Some(Err(error)) => {
                        if let Some(error) = forbidden(&error, made) {
                            return Err(Ending { error, delete: true });
                        }
                        let why = crate::error::cut(&error);
                        tracing::debug!(job = made.name, why, "a watch of a build was cut");
                        if !std::mem::replace(&mut troubled, true) {
                            say(output, format!("the Job is not seen for now: {why}")).await;
                        }
                    }
                    None => tokio::time::sleep(LOOK_AGAIN).await,
                },
                () = out_of_patience => {
                    if let Some((problem, _)) = &stuck {
                        let seconds = self.options.start_within.as_secs();
                        let error = stopped_by(problem, &format!("for {seconds} s"));
                        return Err(Ending { error, delete: true });
                    }
                }
            }
            if world.gone {
                let error = StepError::fatal(
                    "build_job_deleted",
                    format!("somebody deleted Job {} before it had ended", made.name),
                    "Deploy again if the image is still wanted.",
                );
                return Err(Ending {
                    error,
                    delete: false,
                });
            }
            if let Some(pod) = world.pod() {
                view.send_if_modified(|before| {
                    let now = View::of(pod);
                    let differs = *before != now;
                    *before = now;
                    differs
                });
            }
            if let Some(condition) = world.job.as_ref().and_then(finished) {
                let pod = self.last_look(made).await.or_else(|| world.pod().cloned());
                view.send_modify(|view| {
                    if let Some(pod) = &pod {
                        *view = View::of(pod);
                    }
                    view.over = true;
                });
                if tokio::time::timeout(LAST_WORDS, &mut printer.0)
                    .await
                    .is_err()
                {
                    say(
                        output,
                        "the end of the output is not waited for any more".into(),
                    )
                    .await;
                }
                return conclude(&condition, pod.as_ref(), stuck.map(|(problem, _)| problem));
            }
            let problem = world.problem();
            if problem.as_ref().map(|p| &p.reason) != stuck.as_ref().map(|(p, _)| &p.reason) {
                if let Some(problem) = &problem {
                    say(output, format!("{}: {}", problem.reason, problem.message)).await;
                }
                stuck = problem.map(|problem| (problem, Instant::now()));
            }
            if let Some((problem, _)) = stuck.as_ref().filter(|(p, _)| !p.transient) {
                let error = stopped_by(problem, "for ever");
                return Err(Ending {
                    error,
                    delete: true,
                });
            }
        }
    }

    /// The watches of a Job, its pods, and what is warned of about them.
    fn sights(&self, made: &Made) -> BoxStream<'static, Result<Sight, watcher::Error>> {
        let (client, namespace) = (&self.options.client, &self.options.namespace);
        let name = format!("metadata.name={}", made.name);
        let jobs = watch(self.jobs(), watcher::Config::default().fields(&name));
        let pods = watch(
            self.pods(),
            watcher::Config::default().labels(&of_job(made)),
        );
        let warnings: Api<Occurrence> = Api::namespaced(client.clone(), namespace);
        let warnings = watch(warnings, watcher::Config::default().fields("type=Warning"));
        stream::select_all([
            jobs.default_backoff().map(|e| e.map(Sight::Job)).boxed(),
            pods.default_backoff().map(|e| e.map(Sight::Pod)).boxed(),
            warnings
                .default_backoff()
                .map(|e| e.map(Sight::Warning))
                .boxed(),
        ])
        .boxed()
    }

    /// The pod as it is now that its Job has ended. Its watch may be behind that of Jobs.
    async fn last_look(&self, made: &Made) -> Option<Pod> {
        let list = ListParams::default().labels(&of_job(made));
        for _ in 0..LAST_LOOKS {
            match timely("the pods of a build", self.pods().list(&list)).await {
                Ok(Ok(found)) => return newest(found.items.iter()).cloned(),
                Ok(Err(error)) => {
                    let why = crate::error::said(&error);
                    tracing::debug!(job = made.name, why, "its pod is not seen");
                }
                Err(error) => tracing::debug!(job = made.name, %error, "its pod is not seen"),
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        None
    }
}

fn of_job(made: &Made) -> String {
    format!("batch.kubernetes.io/controller-uid={}", made.uid)
}

fn newest<'a>(pods: impl Iterator<Item = &'a Pod>) -> Option<&'a Pod> {
    pods.max_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0))
}

impl World {
    fn take(&mut self, sight: Sight) {
        match sight {
            Sight::Job(Event::Init) => self.listed = false,
            Sight::Job(Event::InitApply(job) | Event::Apply(job)) => {
                self.listed = true;
                self.job = Some(job);
            }
            Sight::Job(Event::InitDone) => self.gone |= !self.listed,
            Sight::Job(Event::Delete(_)) => self.gone = true,
            Sight::Pod(Event::Init) => self.pods.clear(),
            Sight::Pod(Event::InitApply(pod) | Event::Apply(pod)) => {
                self.pods.insert(pod.name_any(), pod);
            }
            Sight::Pod(Event::Delete(pod)) => {
                self.pods.remove(&pod.name_any());
            }
            Sight::Warning(Event::InitApply(warning) | Event::Apply(warning)) => {
                let said_at = said_at(&warning);
                let about = warning.involved_object.name.unwrap_or_default();
                let before = self.warnings.get(&about);
                let is_newer = before.is_none_or(|(before, _)| *before <= said_at);
                if is_newer && about.starts_with(&self.name) {
                    let warning = Warning {
                        reason: warning.reason.unwrap_or_default(),
                        message: warning.message.unwrap_or_default(),
                    };
                    self.warnings.insert(about, (said_at, warning));
                }
            }
            Sight::Pod(Event::InitDone) | Sight::Warning(_) => {}
        }
    }

    fn pod(&self) -> Option<&Pod> {
        newest(self.pods.values())
    }

    /// What keeps it from beginning, if anything.
    fn problem(&self) -> Option<Problem> {
        let warning = |name: &str| self.warnings.get(name).map(|(_, warning)| warning);
        match self.pod() {
            Some(pod) => diagnosis::not_begun(pod, warning(&pod.name_any())),
            None => {
                let job = self.job.as_ref()?;
                diagnosis::not_made(warning(&job.name_any())?)
            }
        }
    }
}

/// The condition with which a Job has ended, if it has.
pub(super) fn finished(job: &Job) -> Option<JobCondition> {
    let conditions = job.status.as_ref()?.conditions.iter().flatten();
    let mut ends = conditions.filter(|c| c.status == "True");
    ends.find(|c| matches!(c.type_.as_str(), "Complete" | "Failed"))
        .cloned()
}

fn cancelled(handed_over: &CancellationToken) -> Ending {
    let error = StepError::fatal(
        "cancelled",
        "the build was cancelled",
        "Start it again if it is still wanted.",
    );
    Ending {
        error,
        delete: !handed_over.is_cancelled(),
    }
}

/// A right that is missing is not waited for.
fn forbidden(error: &watcher::Error, made: &Made) -> Option<StepError> {
    let error = match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => error,
        _ => return None,
    };
    let is_refused = matches!(error, kube::Error::Api(status) if status.code == 403);
    is_refused.then(|| refused(&format!("following Job {}", made.name), error))
}

/// Something has kept it from beginning.
fn stopped_by(problem: &Problem, how_long: &str) -> StepError {
    let message = format!("the build could not begin {how_long}: {}", problem.message);
    StepError::fatal(code_of(&problem.reason), message, problem.remedy.clone())
}

fn code_of(reason: &str) -> &'static str {
    match reason {
        "ImagePullBackOff" => "build_image_pull_failed",
        "Unschedulable" => "build_unschedulable",
        "QuotaExceeded" => "build_quota_exceeded",
        "FailedCreate" => "build_pod_refused",
        "CreateContainerConfigError" | "FailedMount" | "FailedAttachVolume" => {
            "build_config_missing"
        }
        _ => "build_not_started",
    }
}

/// What a Job that has ended has come to.
fn conclude(
    condition: &JobCondition,
    pod: Option<&Pod>,
    stuck: Option<Problem>,
) -> Result<Option<Digest>, Ending> {
    if condition.type_ == "Complete" {
        let ended = pod.and_then(|pod| terminated(pod, job::BUILDER));
        let said = ended.and_then(|ended| ended.message.as_deref());
        return Ok(said.and_then(|text| Digest::parse(text.trim()).ok()));
    }
    let error = if condition.reason.as_deref() == Some("DeadlineExceeded") {
        let why = stuck.map_or(String::new(), |p| format!("; {}", p.message));
        StepError::fatal(
            "build_deadline_exceeded",
            format!("the build took longer than it may{why}"),
            "Make it smaller, or allow more time: --build-deadline.",
        )
    } else if pod.is_some_and(was_evicted) {
        let why = pod.and_then(|pod| pod.status.as_ref()?.message.as_deref());
        let why = why.unwrap_or("its node says no more");
        StepError::passing(
            "build_evicted",
            format!("the pod of the build was evicted: {why}"),
            "It is tried again; ask for the memory that builds need: --build-memory.",
        )
    } else if let Some((container, ended)) = pod.and_then(failed) {
        failure_of(container, ended)
    } else {
        let why = condition.message.as_deref();
        let why = why.unwrap_or("the Job says no more");
        StepError::passing(
            "build_lost",
            format!("the pod of the build is gone: {why}"),
            "It is tried again.",
        )
    };
    // What is tried again needs its name.
    let delete = error.retryable;
    Err(Ending { error, delete })
}

fn terminated<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStateTerminated> {
    let status = pod.status.as_ref()?;
    let all = status.init_container_statuses.iter().flatten();
    let mut all = all.chain(status.container_statuses.iter().flatten());
    let found = all.find(|status| status.name == container)?;
    found.state.as_ref()?.terminated.as_ref()
}

/// The container that has failed.
fn failed(pod: &Pod) -> Option<(&'static str, &ContainerStateTerminated)> {
    let mut all = [job::SOURCE, job::PLAN, job::BUILDER].into_iter();
    all.find_map(|name| Some((name, terminated(pod, name).filter(|e| e.exit_code != 0)?)))
}

fn was_evicted(pod: &Pod) -> bool {
    pod.status.as_ref().is_some_and(|status| {
        let mut conditions = status.conditions.iter().flatten();
        status.reason.as_deref() == Some("Evicted")
            || conditions.any(|c| c.type_ == "DisruptionTarget" && c.status == "True")
    })
}

fn failure_of(container: &str, ended: &ContainerStateTerminated) -> StepError {
    let lines: Vec<&str> = ended.message.iter().flat_map(|text| text.lines()).collect();
    let tail = lines[lines.len().saturating_sub(TAIL)..].join("\n");
    let tail = match tail.is_empty() {
        true => "; it printed nothing".to_owned(),
        false => format!("; its last lines:\n{tail}"),
    };
    if ended.reason.as_deref() == Some("OOMKilled") {
        return StepError::fatal(
            "build_out_of_memory",
            "the build used more memory than it may and was killed",
            "Allow more: --build-memory, or have the build do less at once.",
        );
    }
    let how = match ended.signal.filter(|signal| *signal != 0) {
        Some(signal) => format!("was ended by signal {signal}"),
        None => format!("ended with exit code {}", ended.exit_code),
    };
    match container {
        job::SOURCE => StepError::passing(
            "build_source_failed",
            format!("the source could not be fetched in the cluster: git {how}{tail}"),
            "See that the cluster reaches the repository, and that the Secret of --build-git-secret \
             has credentials for its host.",
        ),
        // What railpack says of failures that may pass.
        job::PLAN if ended.exit_code == 75 => StepError::passing(
            "build_plan_failed",
            format!("railpack could not make a plan: it {how}{tail}"),
            "It is tried again; see that the cluster reaches the Internet.",
        ),
        job::PLAN => StepError::fatal(
            "build_plan_failed",
            format!("railpack could not make a plan: it {how}{tail}"),
            "Add a Dockerfile, or what railpack misses; the build's log has all that it printed.",
        ),
        _ => StepError::fatal(
            "dockerfile_build_failed",
            format!("the image could not be built or pushed: the builder {how}{tail}"),
            "Correct the step that failed; the build's log has all that it printed. If it is the \
             push: --build-registry-secret names who may.",
        ),
    }
}
