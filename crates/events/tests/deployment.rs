//! The deployment's life: every state meets every event.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use daybook_events::aggregate::Decision;
use daybook_events::deployment::{
    self, ClusterState, Deployment, DeploymentEvent, EndpointPlanesChanged, Failed, Operation,
    Phase, Plane, PlaneChange, PlaneSeen, PlaneState, ReadinessState, Status, TRANSITIONS, Version,
    decide,
};
use daybook_events::secret::{Commitment, SecretRef, SecretScope};
use daybook_events::testing::{Given, given, samples};
use daybook_events::{DeploymentId, Payload, VolumeName};

/// What may follow on each state, written down once more by hand: events that leave the state as
/// it is are in the second list.
const LIFE: &[(Status, &str, &str)] = &[
    (
        Status::Requested,
        "queued failed cancelled",
        "held released emergency_freeze_override cancel_requested overtaken",
    ),
    (
        Status::Queued,
        "cloning_started image_pinned chart_pinned failed cancelled",
        "cancel_requested",
    ),
    (
        Status::Cloning,
        "building_started pushing_started image_pinned failed cancelled",
        "source_resolved cancel_requested",
    ),
    (
        Status::Building,
        "pushing_started image_pinned failed cancelled",
        "cancel_requested",
    ),
    (
        Status::Pushing,
        "image_pinned failed cancelled",
        "cancel_requested",
    ),
    (
        Status::Packaging,
        "deploying_started approval_requested approvals_voided failed cancelled",
        "held released emergency_freeze_override cancel_requested",
    ),
    (
        Status::AwaitingApproval,
        "approved failed cancelled",
        "approvals_voided approval_granted approval_rejected emergency_override cancel_requested",
    ),
    (
        Status::Deploying,
        "succeeded partially_succeeded failed cancelled",
        "workload_observed image_pulled endpoint_observed endpoint_planes_changed openapi_found cancel_requested cluster_failed \
         stop_scheduled stop_unscheduled",
    ),
    (
        Status::Started,
        "stop_requested",
        "workload_observed image_pulled endpoint_observed endpoint_planes_changed openapi_found stop_scheduled stop_unscheduled \
         change_committed scale_requested",
    ),
    (
        Status::PartiallyStarted,
        "succeeded stop_requested terminate_requested",
        "workload_observed image_pulled endpoint_observed endpoint_planes_changed openapi_found cluster_failed retry_requested \
         cluster_retried stop_scheduled stop_unscheduled",
    ),
    (
        Status::Stopping,
        "stopped stop_failed",
        "workload_observed image_pulled endpoint_observed endpoint_planes_changed change_committed",
    ),
    (
        Status::Stopped,
        "start_requested terminate_requested",
        "workload_observed image_pulled endpoint_observed endpoint_planes_changed",
    ),
    (
        Status::Starting,
        "started partially_succeeded start_failed",
        "workload_observed image_pulled endpoint_observed endpoint_planes_changed change_committed cluster_failed cluster_retried",
    ),
    (
        Status::StartError,
        "start_requested stop_requested terminate_requested",
        "workload_observed image_pulled",
    ),
    (
        Status::StopError,
        "stop_requested terminate_requested",
        "workload_observed image_pulled",
    ),
    (
        Status::Terminating,
        "terminated terminate_failed",
        "workload_observed image_pulled change_committed",
    ),
    (
        Status::TerminateError,
        "terminate_requested",
        "workload_observed image_pulled",
    ),
    (Status::Terminated, "deleted", ""),
    (Status::Failed, "deleted", "change_committed"),
    (Status::Cancelled, "deleted", "change_committed"),
    (Status::Deleted, "", "change_committed"),
];

fn events() -> Vec<DeploymentEvent> {
    samples::deployment_events(samples::shop(), 1)
}

fn event(name: &str) -> DeploymentEvent {
    let kind = format!("deployment.{name}.v1");
    let found = events().into_iter().find(|e| e.kind() == kind);
    found.unwrap_or_else(|| panic!("no sample of {kind}"))
}

fn after(names: &str) -> Given<Deployment> {
    given(names.split_whitespace().map(event))
}

const TO_DEPLOYING: &str = "requested queued cloning_started source_resolved building_started \
                            pushing_started image_pinned deploying_started";

fn reach(status: Status) -> Given<Deployment> {
    let live = format!("{TO_DEPLOYING} succeeded");
    let stopped = format!("{live} stop_requested stopped");
    let path = match status {
        Status::Requested => "requested".to_owned(),
        Status::Queued => "requested queued".to_owned(),
        Status::Cloning => "requested queued cloning_started".to_owned(),
        Status::Building => "requested queued cloning_started building_started".to_owned(),
        Status::Pushing => {
            "requested queued cloning_started building_started pushing_started".to_owned()
        }
        Status::Packaging => "requested queued image_pinned".to_owned(),
        Status::AwaitingApproval => {
            "requested queued image_pinned approval_requested approval_granted".to_owned()
        }
        Status::Deploying => TO_DEPLOYING.to_owned(),
        Status::Started => live,
        Status::PartiallyStarted => format!("{TO_DEPLOYING} partially_succeeded"),
        Status::Stopping => format!("{live} stop_requested"),
        Status::Stopped => stopped,
        Status::Starting => format!("{stopped} start_requested"),
        Status::Terminating => format!("{stopped} terminate_requested"),
        Status::Terminated => format!("{stopped} terminate_requested terminated"),
        Status::Deleted => format!("{stopped} terminate_requested terminated deleted"),
        Status::Failed => "requested failed".to_owned(),
        Status::Cancelled => "requested cancelled".to_owned(),
        Status::StartError => format!("{stopped} start_requested start_failed"),
        Status::StopError => format!("{live} stop_requested stop_failed"),
        Status::TerminateError => format!("{stopped} terminate_requested terminate_failed"),
    };
    let given = after(&path);
    assert_eq!(status_of(&given), status);
    given
}

fn status_of(given: &Given<Deployment>) -> Status {
    given.state.as_ref().unwrap().status
}

#[test]
fn every_state_takes_what_it_should_and_nothing_else() {
    assert_eq!(LIFE.len(), Status::ALL.len());
    for (status, moving, staying) in LIFE {
        let moving: BTreeSet<_> = moving.split_whitespace().collect();
        let staying: BTreeSet<_> = staying.split_whitespace().collect();
        for event in events() {
            let kind = event.kind();
            // These depend on whether there was an emergency or is a freeze, and move nothing.
            let elsewhere = [
                "deployment.post_review_completed.v1",
                "deployment.emergency_freeze_override.v1",
            ];
            if elsewhere.contains(&kind) {
                continue;
            }
            let name = kind
                .trim_start_matches("deployment.")
                .trim_end_matches(".v1");
            let mut given = reach(*status);
            let before = given.state.clone();
            let applied = given.try_apply(event.clone());
            let decided = decide(before.as_ref(), event);
            if moving.contains(name) || staying.contains(name) {
                assert_eq!(applied, Ok(()), "{kind} on {status:?}");
                assert!(decided.is_ok(), "{kind} on {status:?}: {decided:?}");
                let after = status_of(&given);
                if staying.contains(name) {
                    assert_eq!(after, *status, "{kind}");
                } else {
                    let to = TRANSITIONS.iter().find(|t| t.kind == kind).unwrap().to;
                    assert_eq!(Some(after), to, "{kind}");
                    assert_ne!(after, *status, "{kind}");
                    assert!(matches!(decided, Ok(Decision::Append(_))), "{kind}");
                    let state = given.state.unwrap();
                    assert!(state.milestones.entered.contains_key(&after));
                }
            } else {
                assert!(applied.is_err(), "{kind} on {status:?}");
                assert_eq!(given.state, before, "a void {kind} changed something");
                match decided {
                    Ok(Decision::Nothing) => {}
                    Ok(Decision::Append(_)) => panic!("{kind} on {status:?} was decided"),
                    Err(r) => {
                        let known = ["illegal_state", "deployment_exists", "cancel_requested"];
                        assert!(known.contains(&r.code), "{r:?}");
                        assert!(!r.remedy.is_empty());
                    }
                }
            }
        }
    }
}

#[test]
fn nothing_but_a_request_makes_a_deployment() {
    for event in events().into_iter().skip(1) {
        given::<Deployment>([])
            .when(|s| decide(s, event.clone()))
            .then_refused("deployment_not_found");
        let mut empty = given::<Deployment>([]);
        assert!(empty.try_apply(event).is_err());
        assert_eq!(empty.state, None);
    }
}

#[test]
fn a_terminal_state_is_final() {
    for status in [Status::Failed, Status::Cancelled, Status::Deleted] {
        for event in events() {
            let mut given = reach(status);
            let _ = given.try_apply(event);
            assert!([status, Status::Deleted].contains(&status_of(&given)));
        }
    }
}

#[test]
fn what_is_repeated_changes_nothing() {
    let repeated = [
        (TO_DEPLOYING.to_owned(), "deploying_started"),
        (
            format!("{TO_DEPLOYING} workload_observed"),
            "workload_observed",
        ),
        (
            format!("{TO_DEPLOYING} endpoint_observed"),
            "endpoint_observed",
        ),
        (format!("{TO_DEPLOYING} image_pulled"), "image_pulled"),
        (format!("{TO_DEPLOYING} openapi_found"), "openapi_found"),
        (
            format!("{TO_DEPLOYING} cancel_requested"),
            "cancel_requested",
        ),
        (
            "requested queued cloning_started source_resolved".into(),
            "source_resolved",
        ),
        ("requested cancelled".into(), "cancel_requested"),
        ("requested failed".into(), "failed"),
        (
            format!("{TO_DEPLOYING} succeeded stop_requested"),
            "stop_requested",
        ),
        (
            format!("{TO_DEPLOYING} succeeded stop_requested change_committed"),
            "change_committed",
        ),
    ];
    for (path, again) in repeated {
        after(&path)
            .when(|s| decide(s, event(again)))
            .then_nothing();
    }
}

#[test]
fn no_step_forward_once_it_is_to_be_cancelled() {
    let steps = [
        ("requested", "queued"),
        ("requested queued", "cloning_started"),
        ("requested queued cloning_started", "building_started"),
        ("requested queued cloning_started", "image_pinned"),
        ("requested queued image_pinned", "deploying_started"),
        (TO_DEPLOYING, "succeeded"),
    ];
    for (path, step) in steps {
        after(&format!("{path} cancel_requested"))
            .when(|s| decide(s, event(step)))
            .then_refused("cancel_requested");
        for end in ["cancelled", "failed"] {
            after(&format!("{path} cancel_requested"))
                .when(|s| decide(s, event(end)))
                .then(event(end));
        }
    }
}

#[test]
fn nobody_is_overtaken_more_often_than_the_bound_says() {
    let overtaken = |number: u64| {
        DeploymentEvent::Overtaken(deployment::Overtaken {
            by: samples::deployment_id(100 + number),
            reason: "it goes to production".to_owned(),
        })
    };
    let requested = DeploymentEvent::Requested(Box::new(samples::request(samples::shop())));
    let mut events = vec![requested];
    for number in 0..5 {
        given::<Deployment>(events.clone())
            .when(|s| decide(s, overtaken(number)))
            .then(overtaken(number));
        events.push(overtaken(number));
    }
    given::<Deployment>(events.clone())
        .when(|s| decide(s, overtaken(5)))
        .then_refused("overtaken_enough");
    // Once more by the same one is no news.
    given::<Deployment>(events)
        .when(|s| decide(s, overtaken(4)))
        .then_nothing();
}

fn secret_ref(name: &str) -> SecretRef {
    SecretRef {
        secret: name.parse().unwrap(),
        scope: SecretScope::default(),
        version: 1,
        commitment: Commitment::from_hmac(&[7; 32]),
    }
}

#[test]
fn a_bad_request_is_refused() {
    let refused = |code: &str, change: &dyn Fn(&mut daybook_events::deployment::Requested)| {
        let mut request = samples::request(samples::shop());
        change(&mut request);
        given::<Deployment>([])
            .when(|s| decide(s, DeploymentEvent::Requested(Box::new(request))))
            .then_refused(code);
    };
    refused("no_clusters", &|r| r.clusters.clear());
    refused("duplicate_cluster", &|r| {
        r.clusters = vec![
            samples::cluster("a"),
            samples::cluster("b"),
            samples::cluster("a"),
        ];
    });
    refused("invalid_replicas", &|r| r.run.replicas = 0);
    refused("invalid_replicas", &|r| r.run.replicas = 101);
    refused("invalid_port", &|r| r.run.port = 0);
    // Also of a service that was defined before that was looked at.
    let volume = |path: &str| daybook_events::spec::VolumeSpec {
        path: path.to_owned(),
        ..Default::default()
    };
    let volumes = |paths: &[&str]| -> std::collections::BTreeMap<VolumeName, _> {
        let names = ["one", "two"].map(|name| name.parse().unwrap());
        let volumes = paths.iter().map(|path| volume(path));
        names.into_iter().zip(volumes).collect()
    };
    refused("invalid_volume_path", &|r| r.run.volumes = volumes(&["/"]));
    refused("invalid_volume_path", &|r| {
        r.run.volumes = volumes(&["/data", "/data/"]);
    });
    refused("volume_variable_taken", &|r| {
        r.run.volumes = volumes(&["/data"]);
        let secret = secret_ref("VOLUME_ONE");
        r.secrets.insert(secret.secret.clone(), secret);
    });
    for bad in [
        "../etc",
        "/etc",
        "a/../../b",
        "a\\b",
        ".git",
        "a/.git/hooks",
        "a\nb",
    ] {
        refused("invalid_source_path", &|r| {
            if let Version::Git { path, .. } = &mut r.version {
                bad.clone_into(path);
            }
        });
    }
    reach(Status::Requested)
        .when(|s| decide(s, event("requested")))
        .then_refused("deployment_exists");
}

#[test]
fn readiness_follows_what_is_seen() {
    use ReadinessState::{Failed as No, NotReady, Pending, Ready};
    let answers = |given: &Given<Deployment>| {
        let s = given.state.as_ref().unwrap();
        (
            s.build_readiness.state,
            s.workload_readiness.state,
            s.endpoint_readiness.state,
        )
    };
    let seen = |cluster, wanted, ready| samples::observed(cluster, 1, wanted, ready);
    assert_eq!(answers(&after("requested")), (Pending, Pending, Pending));
    let given = after(TO_DEPLOYING);
    assert_eq!(answers(&given), (Ready, Pending, Pending));
    // One of two clusters is not enough.
    let given = given.and(seen("berlin", 1, true));
    assert_eq!(answers(&given).1, Pending);
    let given = given.and(seen("oslo", 1, true));
    assert_eq!(answers(&given).1, Ready);
    assert!(given.state.as_ref().unwrap().workload_is_ready());
    let given = given
        .and(event("endpoint_observed"))
        .and(event("succeeded"));
    assert_eq!(answers(&given), (Ready, Ready, Ready));
    // A live one that loses an instance is still started, and no longer ready.
    let given = given.and(seen("oslo", 1, false));
    assert_eq!(status_of(&given), Status::Started);
    assert_eq!(answers(&given).1, NotReady);
    let given = given
        .and(event("stop_requested"))
        .and(seen("berlin", 0, true))
        .and(seen("oslo", 0, true));
    assert!(given.state.as_ref().unwrap().workload_is_gone());
    let given = given.and(event("stopped"));
    assert_eq!(answers(&given), (Ready, NotReady, NotReady));

    let failed = |during, code: &str| {
        DeploymentEvent::Failed(Failed {
            during,
            code: code.to_owned(),
            message: "it failed".to_owned(),
            remedy: "mend it".to_owned(),
        })
    };
    let given =
        after("requested queued cloning_started").and(failed(Status::Cloning, "ref_not_found"));
    assert_eq!(answers(&given).0, No);
    let given = after(TO_DEPLOYING).and(failed(Status::Deploying, "CrashLoopBackOff"));
    assert_eq!(answers(&given), (Ready, No, No));
}

#[test]
fn operations_are_those_that_are_not_refused() {
    for status in Status::ALL {
        let given = reach(status);
        let state = given.state.as_ref().unwrap();
        let offered = state.operations();
        let commands = [
            (Operation::Cancel, "cancel_requested"),
            (Operation::Stop, "stop_requested"),
            (Operation::Start, "start_requested"),
            (Operation::Retry, "retry_requested"),
            (Operation::Terminate, "terminate_requested"),
            (Operation::Delete, "deleted"),
        ];
        for (operation, command) in commands {
            let possible = matches!(decide(Some(state), event(command)), Ok(Decision::Append(_)));
            assert_eq!(
                offered.contains(&operation),
                possible,
                "{operation:?} on {status:?}"
            );
        }
    }
}

/// Every operation in every state: it is offered exactly where it is not refused, and where it is
/// refused the refusal names the state and what would make it possible.
#[test]
fn what_is_not_possible_says_why_and_what_would_make_it_so() {
    let mut told = String::new();
    for status in Status::ALL {
        let given = reach(status);
        let state = given.state.as_ref().unwrap();
        let possibilities = state.possibilities();
        // Those of approvals are only named where somebody was asked, those of freezes where one is.
        let unasked = if state.approval.is_some() { 1 } else { 5 };
        assert_eq!(possibilities.len() + unasked, Operation::ALL.len());
        for possibility in possibilities {
            let operation = possibility.name;
            assert_eq!(
                possibility.possible,
                state.operations().contains(&operation)
            );
            assert_eq!(possibility.possible, possibility.reason.is_none());
            let command = match operation {
                Operation::Cancel => "cancel_requested",
                Operation::Stop => "stop_requested",
                Operation::Start => "start_requested",
                Operation::Retry => "retry_requested",
                Operation::Terminate => "terminate_requested",
                Operation::Delete => "deleted",
                // Those are decided elsewhere.
                Operation::MarkMain
                | Operation::Redeploy
                | Operation::Keep
                | Operation::Approve
                | Operation::Reject
                | Operation::Override
                | Operation::OverrideFreeze
                | Operation::Review => continue,
            };
            match decide(Some(state), event(command)) {
                Ok(Decision::Append(_)) => assert!(possibility.possible),
                // What is under way already is not refused when it is asked for again.
                Ok(Decision::Nothing) => assert!(!possibility.possible),
                Err(refusal) => {
                    assert_eq!(possibility.reason.as_deref(), Some(&*refusal.message));
                    assert_eq!(possibility.remedy.as_deref(), Some(&*refusal.remedy));
                    assert!(refusal.message.contains(status.as_str()), "{refusal:?}");
                    let line = format!("{} {command}: {}\n", status.as_str(), refusal.remedy);
                    told.push_str(&line);
                }
            }
        }
    }
    for line in [
        "requested stop_requested: wait until it is started",
        "started start_requested: first `daybook stop` it",
        "started deleted: first `daybook stop` it, then `daybook terminate` it",
        "stopping terminate_requested: wait until it is stopped",
        "stopping deleted: first wait until it is stopped, then `daybook terminate` it",
        "deploying deleted: first `daybook cancel` it",
        "stopped cancel_requested: it is possible only before",
        "started retry_requested: it is possible only after a partial success",
        "terminated stop_requested: it has ended; `daybook redeploy`",
        "failed start_requested: it has ended; `daybook redeploy`",
    ] {
        assert!(told.contains(line), "{line:?} is not in:\n{told}");
    }
}

fn states(given: &Given<Deployment>) -> Vec<(&str, ClusterState)> {
    let state = given.state.as_ref().unwrap();
    let clusters = state.clusters.iter();
    clusters.map(|(c, p)| (c.as_str(), p.state)).collect()
}

#[test]
fn what_is_seen_explains_a_failure_only_where_it_was_given_up_for_that() {
    let seen = |remedy: &str| {
        let event = samples::observed("oslo", 1, 1, false);
        let DeploymentEvent::WorkloadObserved(mut seen) = event else {
            panic!("{event:?}");
        };
        let problem = seen.problem.as_mut().unwrap();
        problem.remedy = remedy.to_owned();
        problem.likely_causes = vec!["It leaks.".to_owned()];
        problem.remedies = vec![remedy.to_owned(), "Mend it.".to_owned()];
        DeploymentEvent::WorkloadObserved(seen)
    };
    let shown = |given: &Given<Deployment>| {
        let clusters = &given.state.as_ref().unwrap().clusters;
        let oslo = clusters.get(&samples::cluster("oslo")).unwrap();
        assert_eq!(oslo.state, ClusterState::Failed);
        let cause = oslo.cause.clone().unwrap();
        assert_eq!(cause.code, "rollout_timeout");
        (cause.likely_causes, cause.remedies)
    };
    let remedy = samples::failed_in("oslo").remedy;
    let given = after(TO_DEPLOYING)
        .and(seen(&remedy))
        .and(event("cluster_failed"));
    let (likely_causes, remedies) = shown(&given);
    assert_eq!(likely_causes, ["It leaks."]);
    assert_eq!(remedies, [remedy.as_str(), "Mend it."]);

    // Something else is seen by now.
    let given = given.and(seen("Give it more memory."));
    assert_eq!(shown(&given), (Vec::new(), Vec::new()));
}

#[test]
fn each_cluster_has_a_state_of_its_own() {
    use ClusterState as C;
    let both = |a, b| vec![("berlin", a), ("oslo", b)];
    let seen = |cluster, wanted, ready| samples::observed(cluster, 1, wanted, ready);
    assert_eq!(states(&after("requested")), both(C::Pending, C::Pending));
    let given = after(TO_DEPLOYING);
    assert_eq!(states(&given), both(C::Syncing, C::Syncing));
    let given = given.and(seen("berlin", 1, true));
    assert_eq!(states(&given), both(C::Started, C::Syncing));
    assert!(!given.state.as_ref().unwrap().serves());
    // What waiting may mend is no failure.
    let given = given.and(seen("oslo", 1, false));
    assert_eq!(states(&given), both(C::Started, C::Starting));
    let given = given.and(event("cluster_failed"));
    assert_eq!(states(&given), both(C::Started, C::Failed));
    let state = given.state.as_ref().unwrap();
    assert!(state.may_end_partially() && state.serves());
    assert_eq!(state.failed_clusters(), [samples::failed_in("oslo")]);
    let given = given.and(event("partially_succeeded"));
    let state = given.state.as_ref().unwrap();
    assert_eq!(state.failure.as_ref().unwrap().code, "rollout_timeout");

    // A new try: nothing that was seen before counts.
    let given = given.and(event("retry_requested"));
    assert_eq!(states(&given), both(C::Started, C::Pending));
    let given = given.and(event("cluster_retried"));
    assert_eq!(states(&given), both(C::Started, C::Syncing));
    let progress = given
        .state
        .as_ref()
        .unwrap()
        .clusters
        .get(&samples::cluster("oslo"))
        .unwrap();
    assert_eq!(progress.tries, 2);
    let given = given.and(seen("oslo", 1, true)).and(event("succeeded"));
    assert_eq!(states(&given), both(C::Started, C::Started));
    assert_eq!(given.state.as_ref().unwrap().failure, None);

    let given = given.and(seen("berlin", 1, false));
    assert_eq!(states(&given), both(C::Degraded, C::Started));
    let given = given.and(event("stop_requested"));
    assert_eq!(states(&given), both(C::Stopping, C::Stopping));
    let given = given.and(seen("oslo", 0, true));
    assert_eq!(states(&given), both(C::Stopping, C::Stopped));
    let given = given.and(event("stop_failed"));
    assert_eq!(states(&given), both(C::Failed, C::Stopped));

    // What nobody has seen is not guessed.
    let given = after(&format!("{TO_DEPLOYING} workload_observed failed"));
    assert_eq!(states(&given), both(C::Unknown, C::Unknown));
    let given = after("requested cancelled");
    assert_eq!(states(&given), both(C::Absent, C::Absent));
}

#[test]
fn only_what_has_failed_is_tried_again() {
    let retry = |clusters: &[&str]| {
        DeploymentEvent::RetryRequested(daybook_events::deployment::RetryRequested {
            clusters: clusters.iter().map(|c| samples::cluster(c)).collect(),
            reason: None,
        })
    };
    let partial = || reach(Status::PartiallyStarted).and(samples::observed("berlin", 1, 1, true));
    partial()
        .when(|s| decide(s, retry(&["berlin"])))
        .then_refused("cluster_not_failed");
    partial()
        .when(|s| decide(s, retry(&["paris"])))
        .then_refused("not_its_cluster");
    partial()
        .when(|s| decide(s, retry(&[])))
        .then_refused("nothing_to_retry");
    let asked = partial().and(retry(&["oslo"]));
    asked.when(|s| decide(s, retry(&["oslo"]))).then_nothing();
}

#[test]
fn phases_only_go_forward() {
    let order = |p: Phase| match p {
        Phase::Queued => 0,
        Phase::Cloning => 1,
        Phase::Building => 2,
        Phase::Pushing => 3,
        Phase::Deploying => 4,
        Phase::Succeeded => 5,
        Phase::Failed => 6,
    };
    for row in TRANSITIONS {
        for from in row.from {
            let Some(to) = row.to else { continue };
            if to == Status::Deleted {
                continue;
            }
            assert!(order(to.phase()) >= order(from.phase()), "{}", row.kind);
        }
    }
}

#[test]
fn the_same_commit_and_configuration_is_the_same_build() {
    let request = samples::request(samples::shop());
    let image = samples::image(1);
    let Version::Git { url, .. } = &request.version else {
        panic!()
    };
    let id = |commit: u64, path: &str, command: &[&str]| {
        let mut build = request.build.clone();
        build.command = command.iter().map(|s| (*s).to_owned()).collect();
        daybook_events::deployment::build_id(
            url,
            &samples::commit(commit),
            path,
            &build,
            &image.repository,
        )
    };
    assert_eq!(id(1, "", &[]), id(1, "", &[]));
    let different = [
        id(1, "", &[]),
        id(2, "", &[]),
        id(1, "a", &[]),
        id(1, "", &["make"]),
    ];
    assert_eq!(different.iter().collect::<BTreeSet<_>>().len(), 4);
    let _: DeploymentId = samples::deployment_id(1);
}

#[test]
fn what_will_not_come_any_more_is_not_pending() {
    for names in [
        "requested queued cloning_started failed",
        "requested queued cloning_started cancelled",
    ] {
        let state = after(names).state.unwrap();
        for readiness in [
            &state.build_readiness,
            &state.workload_readiness,
            &state.endpoint_readiness,
        ] {
            assert_eq!(readiness.state, ReadinessState::Failed, "{names}");
        }
    }
}

#[test]
fn a_running_deployment_is_scaled_until_its_commit_is_recorded() {
    let scale = |replicas| {
        DeploymentEvent::ScaleRequested(deployment::ScaleRequested {
            replicas,
            reason: None,
        })
    };
    let committed = |replicas| {
        DeploymentEvent::ChangeCommitted(deployment::ChangeCommitted {
            commit: samples::commit(7),
            replicas: Some(replicas),
        })
    };
    let given = reach(Status::Started)
        .when(|s| decide(s, scale(1)))
        .then_nothing()
        .when(|s| decide(s, scale(0)))
        .then_refused("invalid_replicas")
        .when(|s| decide(s, scale(101)))
        .then_refused("invalid_replicas")
        .when(|s| decide(s, scale(3)))
        .then(scale(3))
        .when(|s| decide(s, scale(3)))
        .then_nothing();
    let state = given.state.clone().unwrap();
    assert_eq!(state.config().replicas, Some(3));
    let asked = state.scaling.expect("it is to be committed");
    assert_eq!(state.request.run.replicas, 1, "the snapshot stays");
    // A commit of another number, as of a stop, is not the one that was asked for.
    let given = given.and(committed(0));
    assert_eq!(given.state.as_ref().unwrap().scaling, Some(asked));
    let given = given.and(committed(3));
    assert_eq!(given.state.unwrap().scaling, None);
}

#[test]
fn a_chart_is_pinned_in_place_of_an_image() {
    let given = after("requested queued");
    assert!(!given.state.as_ref().unwrap().is_pinned());
    let given = given.and(event("chart_pinned"));
    let state = given.state.clone().unwrap();
    assert_eq!(state.status, Status::Packaging);
    assert!(state.is_pinned() && state.image.is_none());
    assert_eq!(state.chart, Some(samples::chart(1)));
    assert_eq!(state.digest(), Some(&samples::chart(1).digest));
    assert_eq!(state.build_readiness.state, ReadinessState::Ready);
    assert_eq!(state.build_readiness.reason, "ChartGiven");
    // What fails from here on has not failed to be built.
    let failed = given.and(event("failed")).state.unwrap();
    assert_eq!(failed.build_readiness.state, ReadinessState::Ready);
    assert!(failed.operations().contains(&Operation::Redeploy));

    // How many instances there are is for the chart to say.
    let live = after("requested queued chart_pinned deploying_started succeeded");
    live.when(|s| decide(s, event("scale_requested")))
        .then_refused("chart_not_scaled");
}

/// The table as a Mermaid state diagram: one arrow for each pair of states, with the short names
/// of the events that lead along it.
fn diagram() -> String {
    let mut arrows: Vec<(Status, Status, Vec<&str>)> = Vec::new();
    for row in TRANSITIONS {
        let name = row
            .kind
            .trim_start_matches("deployment.")
            .trim_end_matches(".v1");
        for from in row.from {
            let Some(to) = row.to else { continue };
            match arrows.iter_mut().find(|(f, t, _)| (*f, *t) == (*from, to)) {
                Some((_, _, names)) => names.push(name),
                None => arrows.push((*from, to, vec![name])),
            }
        }
    }
    arrows.sort_by_key(|(from, to, _)| (*from, *to));
    let mut text = String::from("stateDiagram-v2\n    [*] --> requested: requested\n");
    for (from, to, names) in arrows {
        let (from, to) = (from.as_str(), to.as_str());
        text.push_str(&format!("    {from} --> {to}: {}\n", names.join(", ")));
    }
    text.push_str("    deleted --> [*]\n");
    text
}

#[test]
fn the_diagram_in_the_documentation_is_the_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../ARCHITECTURE.md");
    let text = std::fs::read_to_string(path).unwrap();
    let drawn = text
        .split("```mermaid\n")
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .any(|block| block == diagram());
    assert!(
        drawn,
        "draw this in ARCHITECTURE.md:\n```mermaid\n{}```",
        diagram()
    );
}

/// What is seen of an address from where users are, in one event.
fn planes(seen: &[(Plane, PlaneState, &str)]) -> DeploymentEvent {
    planes_of("api.shop.localhost", seen)
}

fn planes_of(hostname: &str, seen: &[(Plane, PlaneState, &str)]) -> DeploymentEvent {
    let changes = seen.iter().map(|(plane, state, reason)| PlaneChange {
        before: None,
        now: PlaneSeen::new(*plane, *state, reason),
    });
    DeploymentEvent::EndpointPlanesChanged(EndpointPlanesChanged {
        hostname: hostname.parse().unwrap(),
        changes: changes.collect(),
    })
}

fn changed(event: &DeploymentEvent) -> Vec<(Plane, Option<PlaneState>, PlaneState)> {
    let DeploymentEvent::EndpointPlanesChanged(e) = event else {
        panic!("{event:?}");
    };
    let changes = e.changes.iter();
    changes
        .map(|c| (c.now.plane, c.before, c.now.state))
        .collect()
}

#[test]
fn what_is_known_of_a_plane_is_no_event_and_what_was_before_is_said() {
    use Plane::{Dns, Http, Tls};
    use PlaneState::{Drifted, Failing, Ok, Unknown};
    let all_well = planes(&[(Dns, Ok, "Resolves"), (Http, Ok, "Answers")]);
    let (event, given) = reach(Status::Started)
        .when(|s| decide(s, all_well.clone()))
        .then_some();
    assert_eq!(changed(&event), [(Dns, None, Ok), (Http, None, Ok)]);
    let broken = planes(&[(Dns, Drifted, "WrongAddress"), (Http, Ok, "Answers")]);
    let (event, given) = given
        .when(|s| decide(s, all_well.clone()))
        .then_nothing()
        .when(|s| decide(s, broken.clone()))
        .then_some();
    assert_eq!(changed(&event), [(Dns, Some(Ok), Drifted)], "news only");
    // Another reason is news, and so is the way back.
    let gone = planes(&[(Dns, Failing, "NxDomain"), (Dns, Ok, "Resolves")]);
    let (event, given) = given
        .when(|s| decide(s, broken))
        .then_nothing()
        .when(|s| decide(s, gone))
        .then_some();
    assert_eq!(
        changed(&event),
        [(Dns, Some(Drifted), Failing)],
        "once each"
    );
    let (event, given) = given.when(|s| decide(s, all_well)).then_some();
    assert_eq!(changed(&event), [(Dns, Some(Failing), Ok)]);
    // A certificate that was renewed is news, though all is well.
    let certificate = |end: &str| {
        let mut event = planes(&[(Tls, Ok, "Valid")]);
        if let DeploymentEvent::EndpointPlanesChanged(e) = &mut event {
            e.changes[0].now.expires = Some(end.parse().unwrap());
        }
        event
    };
    let (_, given) = given
        .when(|s| decide(s, certificate("2026-01-01T00:00:00Z")))
        .then_some();
    let (_, given) = given
        .when(|s| decide(s, certificate("2026-01-01T00:00:00Z")))
        .then_nothing()
        .when(|s| decide(s, certificate("2026-04-01T00:00:00Z")))
        .then_some();
    // An address that is looked at no more leaves nothing.
    let nothing = Plane::ALL.map(|plane| (plane, Unknown, PlaneSeen::NOT_LOOKED_AT));
    let given = given
        .when(|s| decide(s, planes_of("other.shop.localhost", &nothing)))
        .then_nothing();
    let (event, given) = given.when(|s| decide(s, planes(&nothing))).then_some();
    assert_eq!(changed(&event).len(), 3, "those that were known");
    let state = given.state.as_ref().unwrap();
    assert_eq!(state.planes.iter().count(), 0);
    given.when(|s| decide(s, planes(&nothing))).then_nothing();
}

#[test]
fn what_users_see_counts_for_more_than_what_the_gateway_was_asked() {
    use Plane::{Dns, Http};
    use PlaneState::{Drifted, Ok, Unknown};
    let answer = |given: &Given<Deployment>| {
        let endpoint = &given.state.as_ref().unwrap().endpoint_readiness;
        (endpoint.state, endpoint.reason.clone())
    };
    let asked = |ready| {
        let mut event = event("endpoint_observed");
        if let DeploymentEvent::EndpointObserved(e) = &mut event {
            e.ready = ready;
        }
        event
    };
    let is = |state, reason: &str| (state, reason.to_owned());
    let given = reach(Status::Started).and(asked(true));
    assert_eq!(answer(&given), is(ReadinessState::Ready, "Reachable"));
    // Nobody looks from where users are: nothing changes.
    let given = given.and(planes(&[(Dns, Unknown, "NotConfigured")]));
    assert_eq!(answer(&given), is(ReadinessState::Ready, "Reachable"));
    let given = given.and(planes(&[(Dns, Drifted, "WrongAddress")]));
    assert_eq!(answer(&given), is(ReadinessState::NotReady, "DnsDrifted"));
    let message = given.state.as_ref().unwrap();
    let message = message.endpoint_readiness.message.clone().unwrap();
    assert_eq!(message, "api.shop.localhost: DNS: WrongAddress");
    let given = given.and(asked(true));
    assert_eq!(answer(&given), is(ReadinessState::NotReady, "DnsDrifted"));
    let given = given.and(planes(&[(Dns, Ok, "Resolves")]));
    assert_eq!(answer(&given), is(ReadinessState::Ready, "Reachable"));
    // The gateway here may be out of reach, where users are not.
    let given = given.and(asked(false));
    assert_eq!(answer(&given), is(ReadinessState::NotReady, "Unreachable"));
    let given = given.and(planes(&[(Http, Ok, "Answers")]));
    assert_eq!(answer(&given), is(ReadinessState::Ready, "Reachable"));
    // What is stopped is reached by nobody, whoever looks.
    let given = given.and(event("stop_requested")).and(event("stopped"));
    assert_eq!(given.state.as_ref().unwrap().planes.iter().count(), 0);
    let given = given.and(planes(&[(Http, Ok, "Answers")]));
    assert_eq!(answer(&given), is(ReadinessState::NotReady, "Stopped"));
}
