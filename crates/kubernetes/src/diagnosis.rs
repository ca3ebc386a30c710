//! Why pods do not run: typed causes in Kubernetes' own words, each with a sentence and a remedy.
//!
//! Conditions and reasons are those of the API reference: `PodStatus`, `ContainerStateWaiting`,
//! `ContainerStateTerminated`, `DeploymentCondition`. Kubelets word their messages differently from
//! version to version, so only reasons, exit codes and states decide, where these tell causes
//! apart; messages are quoted.

use std::sync::Arc;

use daybook_events::ProjectName;
use daybook_secrets::SecretStore;
use daybook_workers::target::{Cause, Problem};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod, PodCondition, PodStatus};

use crate::names::PROJECT;

/// How many characters of a message are quoted.
const QUOTED: usize = 400;
/// What a container said last may begin in the middle of more where it has so many bytes, or lines:
/// kubelets take the last 2048 bytes and 80 lines of an output.
const CUT_BYTES: usize = 2000;
const CUT_LINES: usize = 80;

/// What the newest warning about a pod said, where its status does not say it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Warning {
    /// `Unhealthy`, `FailedMount`, `FailedCreatePodSandBox`, …
    pub reason: String,
    /// In the words of who reported it.
    pub message: String,
}

/// The cause that matters most of all pods of a release: what keeps it from being ready.
///
/// `pods` are those of the present revision, each with its newest warning. With `over`, the
/// rollout's time is up and nothing passes by itself any more.
pub fn release<'a>(
    workload: &Deployment,
    pods: impl IntoIterator<Item = (&'a Pod, Option<&'a Warning>)>,
    over: bool,
) -> Option<Problem> {
    let of_pods = pods
        .into_iter()
        .filter_map(|(pod, warning)| pod_problem(pod, warning))
        .max_by_key(|found| found.rank);
    let found = of_pods.or_else(|| not_created(workload));
    let found = found.or_else(|| over.then(deadline))?;
    let mut problem = found.problem;
    if over {
        problem.message = format!("{} (the rollout's deadline has passed)", problem.message);
    }
    problem.transient = !over && !found.hopeless;
    Some(problem)
}

/// The cause that matters most of pods of whose workload nothing else is known.
pub fn pods<'a>(pods: impl IntoIterator<Item = (&'a Pod, Option<&'a Warning>)>) -> Option<Problem> {
    let found = pods
        .into_iter()
        .filter_map(|(pod, warning)| pod_problem(pod, warning))
        .max_by_key(|found| found.rank)?;
    Some(Problem {
        transient: !found.hopeless,
        ..found.problem
    })
}

/// What keeps a pod that runs to an end from beginning: nothing that has begun and ended is looked
/// at. It is `transient` unless waiting cannot mend it.
pub fn not_begun(pod: &Pod, warning: Option<&Warning>) -> Option<Problem> {
    let name = pod.metadata.name.as_deref().unwrap_or("a pod");
    let status = pod.status.as_ref()?;
    let all = status.init_container_statuses.iter().flatten();
    let waits = all
        .chain(status.container_statuses.iter().flatten())
        .filter(|c| c.state.as_ref().is_some_and(|s| s.waiting.is_some()));
    let worst = waits
        .filter_map(|container| container_problem(name, container))
        .max_by_key(|found| found.rank);
    let found = worst.or_else(|| {
        let mut conditions = status.conditions.iter().flatten();
        let unscheduled = conditions.find(|c| c.type_ == "PodScheduled" && c.status == "False")?;
        Some(unschedulable(name, unscheduled))
    });
    let all = status.init_container_statuses.iter().flatten();
    let mut states = all
        .chain(status.container_statuses.iter().flatten())
        .filter_map(|c| c.state.as_ref());
    let has_begun = states.any(|s| s.running.is_some() || s.terminated.is_some());
    let found = found.or_else(|| {
        let unmountable =
            |w: &&Warning| matches!(w.reason.as_str(), "FailedMount" | "FailedAttachVolume");
        let warning = warning.filter(|_| !has_begun).filter(unmountable)?;
        Some(unmounted(name, warning))
    });
    found.map(|found| Problem {
        transient: !found.hopeless,
        ..found.problem
    })
}

/// Why no pod of a Job could be made, as its controller warns of it.
pub fn not_made(warning: &Warning) -> Option<Problem> {
    if warning.reason != "FailedCreate" {
        return None;
    }
    Some(uncreatable(quoted(Some(&warning.message))).problem)
}

/// A cause, and how much it says beside others.
struct Found {
    rank: u8,
    /// Whether waiting cannot mend it.
    hopeless: bool,
    problem: Problem,
}

fn found(rank: u8, cause: Cause, message: String, remedy: &str) -> Found {
    Found {
        rank,
        hopeless: false,
        problem: Problem::new(cause, message, remedy, true),
    }
}

/// What Kubernetes, or somebody's controller, says in words that are not known here.
fn found_other(rank: u8, reason: &str, message: String, remedy: &str) -> Found {
    Found {
        rank,
        hopeless: false,
        problem: Problem::other(reason, message, remedy, true),
    }
}

fn quoted(text: Option<&str>) -> String {
    let text = text.unwrap_or_default().trim();
    let mut short: String = text.chars().take(QUOTED).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// Masks the secrets of a pod's project in what its containers said last. To be done before that is
/// cut and its lines are joined: afterwards they would not be recognised.
pub fn mask_last_words(pod: &mut Pod, secrets: &Arc<dyn SecretStore>) {
    let labels = pod.metadata.labels.as_ref();
    let project = labels.and_then(|l| l.get(PROJECT)?.parse::<ProjectName>().ok());
    let Some(status) = &mut pod.status else {
        return;
    };
    let first = status.init_container_statuses.iter_mut().flatten();
    let all = first.chain(status.container_statuses.iter_mut().flatten());
    let states = all.flat_map(|c| [&mut c.state, &mut c.last_state]);
    let ended = states.flatten().filter_map(|s| s.terminated.as_mut());
    let mut masker = None;
    for said in ended.filter_map(|ended| ended.message.as_mut()) {
        if said.is_empty() {
            continue;
        }
        let masker = masker.get_or_insert_with(|| secrets.masker_or_withhold(project.as_ref()));
        let masked = match said.len() >= CUT_BYTES || said.lines().count() >= CUT_LINES {
            true => masker.mask_end(said),
            false => masker.mask(said),
        };
        *said = masked.into_owned();
    }
}

/// The end of what a program said, on one line: why it ended is in its last lines.
fn last_words(text: Option<&str>) -> String {
    let lines = text.unwrap_or_default().lines().map(str::trim);
    let lines: Vec<_> = lines.filter(|line| !line.is_empty()).collect();
    let said = lines.join(" | ").replace(char::is_control, " ");
    let over = said.chars().count().saturating_sub(QUOTED);
    if over == 0 {
        return said;
    }
    let end: String = said.chars().skip(over).collect();
    let whole = end.split_once(' ').map_or(&*end, |(_, whole)| whole);
    format!("…{}", whole.trim_start_matches("| "))
}

fn deadline() -> Found {
    found(
        0,
        Cause::ProgressDeadlineExceeded,
        "the rollout made no progress".to_owned(),
        "Look at the pods of the release: `daybook logs`, or kubectl describe.",
    )
}

/// Somebody has set fields of a workload otherwise than they are to be.
pub fn drift(workload: &str, fields: &[String]) -> Problem {
    Problem::new(
        Cause::Drift,
        format!(
            "Deployment {workload} was changed by somebody else: {}",
            fields.join(", ")
        ),
        "Undo that in the cluster, or change the service and deploy it.",
        true,
    )
}

/// Argo CD says that a workload is synced, and it is not as the commit asks for.
pub fn otherwise(workload: &str, fields: &[String]) -> Problem {
    Problem::new(
        Cause::Drift,
        format!(
            "Argo CD has synced Deployment {workload}, and it is otherwise than the commit asks for: {}",
            fields.join(", ")
        ),
        "Look for what changes Deployments as they are written (kubectl get \
         mutatingwebhookconfigurations), and for ignoreDifferences in Argo CD; exempt this one, or \
         have the service ask for the same.",
        true,
    )
}

/// No pod could even be made: quota, admission, a missing service account.
fn not_created(workload: &Deployment) -> Option<Found> {
    let conditions = workload.status.as_ref()?.conditions.as_ref()?;
    let failure = conditions
        .iter()
        .find(|c| c.type_ == "ReplicaFailure" && c.status == "True")?;
    Some(uncreatable(quoted(failure.message.as_deref())))
}

fn uncreatable(message: String) -> Found {
    let (reason, remedy) = if message.contains("exceeded quota") {
        (
            Cause::QuotaExceeded,
            "Ask for less, end something else in the namespace, or have its ResourceQuota raised.",
        )
    } else {
        (
            Cause::FailedCreate,
            "Mend what the message names: an admission policy, a limit range or a service account.",
        )
    };
    found(
        90,
        reason,
        format!("no pod can be created: {message}"),
        remedy,
    )
}

fn pod_problem(pod: &Pod, warning: Option<&Warning>) -> Option<Found> {
    let name = pod.metadata.name.as_deref().unwrap_or("a pod");
    let status = pod.status.as_ref()?;
    let containers = status.container_statuses.iter().flatten();
    let all = status.init_container_statuses.iter().flatten();
    let worst = all
        .chain(containers)
        .filter_map(|container| container_problem(name, container))
        .max_by_key(|found| found.rank);
    if worst.is_some() {
        return worst;
    }
    if status.reason.as_deref() == Some("Evicted") {
        return Some(found(
            60,
            Cause::Evicted,
            format!(
                "pod {name} was evicted: {}",
                quoted(status.message.as_deref())
            ),
            "Ask for the memory and storage that it really uses, or give the nodes more.",
        ));
    }
    let condition = |kind: &str| {
        let mut conditions = status.conditions.iter().flatten();
        conditions.find(|c| c.type_ == kind)
    };
    if let Some(unscheduled) = condition("PodScheduled").filter(|c| c.status == "False") {
        return Some(unschedulable(name, unscheduled));
    }
    let not_ready = condition("Ready").is_some_and(|c| c.status == "False");
    let warning = warning.filter(|_| not_ready)?;
    Some(match warning.reason.as_str() {
        "Unhealthy" => unhealthy(name, status, warning),
        "FailedMount" | "FailedAttachVolume" => unmounted(name, warning),
        _ => found_other(
            20,
            &warning.reason,
            format!("pod {name}: {}", quoted(Some(&warning.message))),
            "Look at the message; kubectl describe shows what happened before it.",
        ),
    })
}

/// Which probe fails. As long as its startup probe has not succeeded a container has not started,
/// and no other probe is asked; the two others differ in nothing but the message.
fn unhealthy(name: &str, status: &PodStatus, warning: &Warning) -> Found {
    let mut containers = status.container_statuses.iter().flatten();
    let is_starting = |c: &ContainerStatus| {
        let is_running = c.state.as_ref().is_some_and(|s| s.running.is_some());
        is_running && c.started == Some(false)
    };
    let (cause, what, remedy) = if containers.any(is_starting) {
        (
            Cause::StartupProbeFailed,
            "has not started yet",
            "Read its log; correct the application, the port or the health path, or raise the \
             deadline, and deploy again.",
        )
    } else if warning.message.starts_with("Liveness probe") {
        (
            Cause::LivenessProbeFailed,
            "is to be started again",
            "Read its log; find out why it hangs, or give it more cpu, and deploy again.",
        )
    } else {
        (
            Cause::ReadinessProbeFailed,
            "is not ready",
            "Read its log; correct the application, the port or the health path, and deploy again.",
        )
    };
    let said = quoted(Some(&warning.message));
    found(40, cause, format!("pod {name} {what}: {said}"), remedy)
}

fn unmounted(name: &str, warning: &Warning) -> Found {
    let cause = match warning.reason.as_str() {
        "FailedAttachVolume" => Cause::FailedAttachVolume,
        _ => Cause::FailedMount,
    };
    found(
        45,
        cause,
        format!(
            "a volume of pod {name} cannot be mounted: {}",
            quoted(Some(&warning.message))
        ),
        "Check the claim, the secret or the ConfigMap that the message names.",
    )
}

fn unschedulable(name: &str, condition: &PodCondition) -> Found {
    let why = quoted(condition.message.as_deref());
    found(
        50,
        Cause::Unschedulable,
        format!("no node takes pod {name}: {why}"),
        "Ask for less memory and CPU, add nodes, or correct the node selector and tolerations.",
    )
}

fn container_problem(pod: &str, container: &ContainerStatus) -> Option<Found> {
    let last = container.last_state.as_ref();
    let state = container.state.as_ref()?;
    if let Some(ended) = &state.terminated
        && ended.exit_code != 0
    {
        return Some(ended_badly(pod, container, state));
    }
    let waiting = state.waiting.as_ref()?;
    let reason = waiting.reason.as_deref()?;
    let message = quoted(waiting.message.as_deref());
    let image = &container.image;
    Some(match reason {
        "ContainerCreating" | "PodInitializing" => return None,
        "ErrImagePull"
        | "ImagePullBackOff"
        | "InvalidImageName"
        | "ErrImageNeverPull"
        | "RegistryUnavailable" => {
            let mut found = found(
                80,
                Cause::ImagePullBackOff,
                format!("the image {image} of pod {pod} cannot be pulled: {message}"),
                "Check that the image exists in the registry, and that the cluster may pull it \
                 (image pull secrets).",
            );
            found.hopeless = reason == "InvalidImageName";
            found
        }
        "CreateContainerConfigError" => found(
            75,
            Cause::CreateContainerConfigError,
            format!("a part of the configuration of pod {pod} is missing: {message}"),
            "Make the secret or ConfigMap that the message names, or take the variable out.",
        ),
        "CreateContainerError" | "RunContainerError" | "StartError" => unstartable(pod, &message),
        "CrashLoopBackOff" => match last.filter(|l| l.terminated.is_some()) {
            Some(last) => ended_badly(pod, container, last),
            None => crash(pod, container.restart_count, "it ended", &message),
        },
        other => found_other(
            30,
            other,
            format!("pod {pod} waits: {message}"),
            "Look at the message.",
        ),
    })
}

fn unstartable(pod: &str, why: &str) -> Found {
    found(
        75,
        Cause::StartError,
        format!("the container of pod {pod} cannot be started: {why}"),
        "Correct the command, or put the program into the image.",
    )
}

/// A container that ended: what with, and what it said last.
fn ended_badly(pod: &str, container: &ContainerStatus, state: &ContainerState) -> Found {
    let Some(ended) = &state.terminated else {
        return crash(pod, container.restart_count, "it ended", "");
    };
    let said = last_words(ended.message.as_deref());
    // What the container runtime says of a program that it could not begin.
    if let Some("StartError" | "ContainerCannotRun") = ended.reason.as_deref() {
        return unstartable(pod, &said);
    }
    if ended.reason.as_deref() == Some("OOMKilled") {
        return found(
            85,
            Cause::OomKilled,
            format!(
                "pod {pod} used more memory than it may and was killed, {} so far",
                restarts(container.restart_count)
            ),
            "Raise the memory limit, or find out what the application needs so much for.",
        );
    }
    let how = match ended.signal.filter(|s| *s != 0) {
        Some(signal) => format!("it was ended by signal {signal}"),
        None if ended.exit_code > 128 => {
            format!("it was ended by signal {}", ended.exit_code - 128)
        }
        None => format!("it ended with exit code {}", ended.exit_code),
    };
    crash(pod, container.restart_count, &how, &said)
}

fn restarts(count: i32) -> String {
    match count {
        1 => "1 restart".to_owned(),
        n => format!("{n} restarts"),
    }
}

fn crash(pod: &str, count: i32, how: &str, said: &str) -> Found {
    let said = if said.is_empty() {
        String::new()
    } else {
        format!("; its last words: {said}")
    };
    found(
        70,
        Cause::CrashLoopBackOff,
        format!(
            "pod {pod} does not keep running: {how}, {} so far{said}",
            restarts(count)
        ),
        "Read the log, correct the application or its variables, and deploy again.",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_what_a_program_said_the_end_is_quoted_from_a_whole_word_on() {
        assert_eq!(last_words(None), "");
        assert_eq!(last_words(Some(" a\n\n\tb\u{1b}[0m \n")), "a | b [0m");
        let printed = format!("token=\u{fc}{}\nthe end", "x y".repeat(QUOTED));
        let said = last_words(Some(&printed));
        assert!(said.starts_with("\u{2026}yx"), "{said}");
        assert!(said.ends_with("x y | the end"), "{said}");
        assert!(said.chars().count() <= QUOTED + 1);
        let word = "z".repeat(QUOTED + 1);
        assert_eq!(last_words(Some(&word)).chars().count(), QUOTED + 1);
    }

    #[test]
    fn each_probe_that_fails_is_a_cause_of_its_own() {
        let cause = |started: bool, message: &str| {
            let pod = serde_json::json!({
                "metadata": { "name": "web-1" },
                "status": {
                    "conditions": [{ "type": "Ready", "status": "False" }],
                    "containerStatuses": [{
                        "name": "web",
                        "image": "web",
                        "imageID": "",
                        "ready": false,
                        "restartCount": 0,
                        "started": started,
                        "state": { "running": {} },
                    }],
                },
            });
            let pod: Pod = serde_json::from_value(pod).unwrap();
            let warning = Warning {
                reason: "Unhealthy".to_owned(),
                message: message.to_owned(),
            };
            release(&Deployment::default(), [(&pod, Some(&warning))], false).unwrap()
        };
        let words = "probe failed: connection refused";
        for (started, message, reason) in [
            (false, format!("Startup {words}"), "StartupProbeFailed"),
            (true, format!("Liveness {words}"), "LivenessProbeFailed"),
            (true, format!("Readiness {words}"), "ReadinessProbeFailed"),
        ] {
            let problem = cause(started, &message);
            assert_eq!(problem.reason, reason);
            assert!(problem.message.ends_with(&message), "{problem:?}");
        }
    }
}
