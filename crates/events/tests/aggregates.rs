//! Build, GitOps repository, routes, project and environment: given, when, then.

#![allow(clippy::unwrap_used)]

use daybook_events::build::{self, Build, BuildEvent, BuildStatus};
use daybook_events::deployment::Status;
use daybook_events::environment::{self, Environment};
use daybook_events::gitops::{self, Change, Gitops, GitopsEvent};
use daybook_events::project::{self, Project, ProjectEvent};
use daybook_events::routing::{
    self, Applied, Command, IngressSeen, Ingresses, Rejected, Routing, RoutingEvent, SwitchReason,
    Switched, Target,
};
use daybook_events::secret::{Secret, SecretId, SecretScope, SecretSet, applicable};
use daybook_events::spec::Autoscaling;
use daybook_events::testing::{Given, given, samples};
use daybook_events::{DeploymentId, Hostname, InstanceRef, Position, RepositoryUrl};

fn of_attempt(name: &str, attempt: u32) -> BuildEvent {
    let index = [
        "requested",
        "started",
        "builder_started",
        "push_started",
        "succeeded",
        "failed",
        "cancelled",
    ]
    .iter()
    .position(|n| *n == name)
    .unwrap();
    let mut event = samples::build_events(1).swap_remove(index);
    match &mut event {
        BuildEvent::Requested(_) => {}
        BuildEvent::Started(e) => e.attempt = attempt,
        BuildEvent::BuilderStarted(e) => e.attempt = attempt,
        BuildEvent::PushStarted(e) => e.attempt = attempt,
        BuildEvent::Succeeded(e) => e.attempt = attempt,
        BuildEvent::Failed(e) => e.attempt = attempt,
        BuildEvent::Cancelled(e) => e.attempt = attempt,
    }
    event
}

fn build_after(path: &[(&str, u32)]) -> Given<Build> {
    given(
        path.iter()
            .map(|(name, attempt)| of_attempt(name, *attempt)),
    )
}

const RUN: [(&str, u32); 5] = [
    ("requested", 0),
    ("started", 1),
    ("builder_started", 1),
    ("push_started", 1),
    ("succeeded", 1),
];

#[test]
fn a_build_takes_its_steps_in_order_and_only_from_its_attempt() {
    // Which events of attempt 1 and 2 each state of attempt 1 takes.
    type Row = (
        &'static [(&'static str, u32)],
        &'static [(&'static str, u32)],
    );
    let table: [Row; 7] = [
        (
            &RUN[..1],
            &[("started", 1), ("failed", 0), ("cancelled", 0)],
        ),
        (
            &RUN[..2],
            &[
                ("builder_started", 1),
                ("started", 2),
                ("failed", 1),
                ("cancelled", 1),
            ],
        ),
        (
            &RUN[..3],
            &[
                ("push_started", 1),
                ("started", 2),
                ("failed", 1),
                ("cancelled", 1),
            ],
        ),
        (
            &RUN[..4],
            &[
                ("succeeded", 1),
                ("started", 2),
                ("failed", 1),
                ("cancelled", 1),
            ],
        ),
        (&RUN[..5], &[]),
        (&[("requested", 0), ("failed", 0)], &[("requested", 0)]),
        (
            &[("requested", 0), ("started", 1), ("cancelled", 1)],
            &[("requested", 0)],
        ),
    ];
    for (path, legal) in table {
        for name in [
            "requested",
            "started",
            "builder_started",
            "push_started",
            "succeeded",
            "failed",
            "cancelled",
        ] {
            for attempt in 0..=3 {
                if name == "requested" && attempt > 0 {
                    continue;
                }
                let event = of_attempt(name, attempt);
                let mut given = build_after(path);
                let before = given.state.clone();
                let decided = build::decide(before.as_ref(), event.clone());
                let applied = given.try_apply(event.clone());
                let expected = legal.contains(&(name, attempt));
                assert_eq!(applied.is_ok(), expected, "{name} {attempt} after {path:?}");
                let appends = decided == Ok(daybook_events::Decision::Append(event));
                assert_eq!(appends, expected, "{name} {attempt} after {path:?}");
                if !expected {
                    assert_eq!(given.state, before);
                }
            }
        }
    }
}

#[test]
fn a_build_that_is_there_is_shared() {
    for length in 1..=5 {
        build_after(&RUN[..length])
            .when(|s| build::decide(s, of_attempt("requested", 0)))
            .then_nothing();
    }
}

#[test]
fn a_worker_taken_for_dead_changes_nothing() {
    build_after(&[("requested", 0), ("started", 1), ("started", 2)])
        .when(|s| build::decide(s, of_attempt("builder_started", 1)))
        .then_refused("stale_attempt");
    // Nor does it when the build was given up and asked for again meanwhile.
    let path = [
        ("requested", 0),
        ("started", 1),
        ("failed", 1),
        ("requested", 0),
    ];
    for late in ["failed", "cancelled", "succeeded"] {
        build_after(&path)
            .when(|s| build::decide(s, of_attempt(late, 1)))
            .then_refused("stale_attempt");
    }
    let given = build_after(&path).and(of_attempt("started", 2));
    let state = given.state.unwrap();
    assert_eq!((state.status, state.requests), (BuildStatus::Cloning, 2));
    assert_eq!(state.failure, None);
}

#[test]
fn a_build_that_ended_says_why() {
    let state = build_after(&[("requested", 0), ("cancelled", 0)])
        .state
        .unwrap();
    assert_eq!(state.failure.unwrap().code, "cancelled");
    assert_eq!(state.log.lines, 42);
    given::<Build>([])
        .when(|s| build::decide(s, of_attempt("started", 1)))
        .then_refused("build_not_found");
}

#[test]
fn a_cause_has_one_commit() {
    let mut events = samples::gitops_events(&samples::shop(), samples::deployment_id(1));
    events.truncate(3);
    let [created, committed, foreign]: [GitopsEvent; 3] = events.try_into().unwrap();
    given::<Gitops>([])
        .when(|s| gitops::decide(s, committed.clone()))
        .then_refused("repository_not_found");
    let given = given::<Gitops>([])
        .when(|s| gitops::decide(s, created.clone()))
        .then(created.clone())
        .when(|s| gitops::decide(s, created.clone()))
        .then_nothing()
        .when(|s| gitops::decide(s, committed.clone()))
        .then(committed.clone());
    let mut again = given.clone();
    assert!(again.try_apply(committed.clone()).is_err());
    assert_eq!(again.state, given.state);
    let given = given
        .when(|s| gitops::decide(s, committed.clone()))
        .then_nothing()
        .when(|s| gitops::decide(s, foreign.clone()))
        .then(foreign.clone())
        .when(|s| gitops::decide(s, foreign.clone()))
        .then_nothing();
    let state = given.state.unwrap();
    assert_eq!((state.commits, &state.head), (3, &samples::commit(2)));
    let GitopsEvent::Committed(c) = committed else {
        panic!()
    };
    assert_eq!(state.commit_of(c.cause), Some(&c.commit));
}

/// A repository of which these commits of others were found.
fn with_foreign(numbers: &[u64]) -> Given<Gitops> {
    let created = samples::gitops_events(&samples::shop(), samples::deployment_id(1));
    let mut given = given::<Gitops>([created.into_iter().next().unwrap()]);
    for number in numbers {
        let mut found = samples::foreign_commit(*number);
        found.ordinal = Some(number + 1);
        found.environments = vec![samples::shop().environment];
        given = given.and(GitopsEvent::ForeignCommitFound(Box::new(found)));
    }
    given
}

#[test]
fn the_newest_commit_is_the_head_in_whatever_order_they_are_recorded() {
    let (instance, production) = (samples::shop(), samples::shop().environment);
    let commits: Vec<_> = (1..=4)
        .map(|number| {
            let change = Change::EnvironmentCreated { from: None };
            let mut commit =
                samples::committed(&instance, samples::deployment_id(number), number, change);
            commit.ordinal = Some(number + 1);
            // No chain of parents to tell by.
            commit.parent = None;
            commit
        })
        .collect();
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]] {
        let mut given = with_foreign(&[]);
        for number in order {
            given = given.and(GitopsEvent::Committed(Box::new(commits[number].clone())));
        }
        let state = given.state.unwrap();
        assert_eq!(state.head, samples::commit(4), "{order:?}");
        assert_eq!(state.environments[&production], samples::commit(4));
        assert_eq!(state.commits, 5);
    }
}

#[test]
fn a_commit_of_somebody_else_is_adopted_or_undone() {
    let adopted = GitopsEvent::ForeignCommitAdopted(gitops::ForeignCommitAdopted {
        commit: samples::commit(1),
        reason: None,
    });
    let revert = GitopsEvent::RevertRequested(gitops::RevertRequested {
        commit: samples::commit(1),
        reason: None,
    });
    let failed = GitopsEvent::RevertFailed(gitops::RevertFailed {
        commit: samples::commit(1),
        code: "revert_conflicts".into(),
        message: "it conflicts".into(),
        remedy: "undo it by hand".into(),
    });
    with_foreign(&[2])
        .when(|s| gitops::decide(s, adopted.clone()))
        .then_refused("foreign_commit_not_found");
    let production = samples::shop().environment;
    let given = with_foreign(&[1, 2]);
    assert_eq!(given.state.as_ref().unwrap().undecided().count(), 2);
    // Nobody accepted it: nothing of it is synced.
    assert!(given.state.as_ref().unwrap().environments.is_empty());
    let given = given
        .when(|s| gitops::decide(s, adopted.clone()))
        .then(adopted.clone())
        .when(|s| gitops::decide(s, adopted.clone()))
        .then_nothing();
    let state = given.state.clone().unwrap();
    assert_eq!(state.undecided().count(), 1);
    assert_eq!(state.environments[&production], samples::commit(1));
    let given = given
        .when(|s| gitops::decide(s, revert.clone()))
        .then(revert.clone())
        .when(|s| gitops::decide(s, revert.clone()))
        .then_nothing()
        .when(|s| gitops::decide(s, adopted.clone()))
        .then_refused("foreign_commit_decided")
        .when(|s| gitops::decide(s, failed.clone()))
        .then(failed.clone())
        .when(|s| gitops::decide(s, failed.clone()))
        .then_nothing();
    let state = given.state.unwrap();
    let known = state.foreign_commit(&samples::commit(1)).unwrap();
    assert_eq!(known.status, gitops::ForeignStatus::Found);
    assert_eq!(known.problem.as_deref(), Some("it conflicts"));
}

#[test]
fn a_remote_that_fails_is_told_when_it_begins_changes_and_ends() {
    let failing = |during, code: &str, message: &str| {
        GitopsEvent::RemoteFailing(gitops::RemoteFailing {
            during,
            code: code.to_owned(),
            message: message.to_owned(),
            remedy: String::new(),
        })
    };
    let recovered = GitopsEvent::RemoteRecovered(gitops::RemoteRecovered {});
    let (push, fetch) = (gitops::RemoteStep::Push, gitops::RemoteStep::Fetch);
    let given = with_foreign(&[])
        .when(|s| gitops::decide(s, recovered.clone()))
        .then_nothing()
        .when(|s| gitops::decide(s, failing(push, "a", "once")))
        .then(failing(push, "a", "once"))
        .when(|s| gitops::decide(s, failing(push, "a", "in other words")))
        .then_nothing();
    let since = given.state.as_ref().unwrap().remote_trouble.as_ref();
    let since = since.unwrap().since;
    let given = given
        .when(|s| gitops::decide(s, failing(fetch, "a", "")))
        .then(failing(fetch, "a", ""));
    let trouble = given.state.clone().unwrap().remote_trouble.unwrap();
    assert_eq!((trouble.since, trouble.failing.during), (since, fetch));
    let given = given
        .when(|s| gitops::decide(s, recovered.clone()))
        .then(recovered.clone());
    assert_eq!(given.state.unwrap().remote_trouble, None);
}

#[test]
fn a_remote_of_a_project_is_set_and_cleared() {
    let changed = |url: Option<&str>| {
        ProjectEvent::GitopsRemoteChanged(project::GitopsRemoteChanged {
            url: url.map(|url| url.parse().unwrap()),
        })
    };
    let elsewhere = changed(Some("https://git.example.com/shop.git"));
    given::<Project>([])
        .when(|s| project::decide(s, elsewhere.clone()))
        .then_refused("project_not_found");
    given::<Project>([samples::project_events().remove(0)])
        .when(|s| project::decide(s, changed(None)))
        .then_nothing()
        .when(|s| project::decide(s, elsewhere.clone()))
        .then(elsewhere.clone())
        .when(|s| project::decide(s, elsewhere.clone()))
        .then_nothing()
        .when(|s| project::decide(s, changed(None)))
        .then(changed(None));
}

#[test]
fn a_rewritten_history_is_put_back_or_accepted() {
    let rewritten = GitopsEvent::HistoryRewritten(gitops::HistoryRewritten {
        expected: samples::commit(2),
        found: samples::commit(9),
        found_ordinal: 2,
        common: None,
    });
    let accept = |number| {
        GitopsEvent::RewriteAccepted(gitops::RewriteAccepted {
            commit: samples::commit(number),
            reason: None,
        })
    };
    let restored = GitopsEvent::HistoryRestored(gitops::HistoryRestored {
        found: samples::commit(2),
    });
    let given = with_foreign(&[1, 2])
        .when(|s| gitops::decide(s, restored.clone()))
        .then_nothing()
        .when(|s| gitops::decide(s, rewritten.clone()))
        .then(rewritten.clone())
        .when(|s| gitops::decide(s, rewritten.clone()))
        .then_nothing()
        .when(|s| gitops::decide(s, accept(8)))
        .then_refused("not_rewritten");
    let back = given
        .clone()
        .when(|s| gitops::decide(s, restored.clone()))
        .then(restored.clone());
    let state = back.state.unwrap();
    assert_eq!((state.rewritten, state.head), (None, samples::commit(2)));
    let accepted = given
        .when(|s| gitops::decide(s, accept(9)))
        .then(accept(9))
        .when(|s| gitops::decide(s, accept(9)))
        .then_nothing();
    let state = accepted.state.unwrap();
    assert_eq!(
        (&state.rewritten, &state.head),
        (&None, &samples::commit(9))
    );
    assert_eq!(state.head_ordinal, Some(2));
}

#[test]
fn only_so_many_commits_of_others_are_kept_and_the_undecided_ones_longest() {
    let mut given = with_foreign(&(1..=256).collect::<Vec<_>>());
    given = given.and(GitopsEvent::ForeignCommitAdopted(
        gitops::ForeignCommitAdopted {
            commit: samples::commit(100),
            reason: None,
        },
    ));
    let mut one_more = samples::foreign_commit(300);
    one_more.ordinal = Some(301);
    given = given.and(GitopsEvent::ForeignCommitFound(Box::new(one_more)));
    let state = given.state.unwrap();
    assert_eq!(state.foreign.len(), 256);
    assert!(state.foreign_commit(&samples::commit(100)).is_none());
    assert!(state.foreign_commit(&samples::commit(1)).is_some());
}

#[test]
fn releases_are_what_the_commits_left() {
    let (instance, id) = (samples::shop(), samples::deployment_id(1));
    let service = instance.service.clone();
    let mut given = given::<Gitops>([samples::gitops_events(&instance, id).swap_remove(0)]);
    let changes = [
        (
            Change::Deploy {
                service: service.clone(),
                deployment: id,
                from: None,
            },
            Some(None),
        ),
        (
            Change::Scale {
                service: service.clone(),
                deployment: id,
                replicas: 0,
            },
            Some(Some(0)),
        ),
        (
            Change::Remove {
                service,
                deployment: id,
            },
            None,
        ),
        (Change::EnvironmentDeleted {}, None),
    ];
    for (number, (change, expected)) in changes.into_iter().enumerate() {
        let deleted = change == Change::EnvironmentDeleted {};
        let commit = samples::committed(&instance, id, number as u64 + 1, change);
        given = given.and(GitopsEvent::Committed(Box::new(commit)));
        let state = given.state.as_ref().unwrap();
        assert_eq!(state.releases.get(&id).copied(), expected);
        assert_eq!(
            state.environments.contains_key(&instance.environment),
            !deleted
        );
    }
}

#[test]
fn secrets_have_versions_and_the_nearest_one_wins() {
    let [created, defined, set, unset, erased, ..]: [ProjectEvent; 11] =
        samples::project_events().try_into().unwrap();
    let other = |version, commitment| {
        ProjectEvent::SecretSet(SecretSet {
            secret: samples::secret(),
            version,
            commitment: samples::commitment(commitment),
            key: uuid::Uuid::from_u128(1),
        })
    };
    given::<Project>([created.clone()])
        .when(|s| project::decide(s, set.clone()))
        .then_refused("service_not_found")
        .when(|s| project::decide(s, unset.clone()))
        .then_refused("secret_not_found");
    given::<Project>([created.clone(), defined.clone()])
        .when(|s| project::decide(s, other(2, 1)))
        .then_refused("stale_secret_version")
        .when(|s| project::decide(s, set.clone()))
        .then(set.clone())
        // The same value again, under whatever number, is no change.
        .when(|s| project::decide(s, other(2, 1)))
        .then_nothing()
        .when(|s| project::decide(s, unset.clone()))
        .then(unset.clone())
        .when(|s| project::decide(s, unset.clone()))
        .then_nothing()
        // Numbers go on, also when the value is the one before.
        .when(|s| project::decide(s, other(2, 1)))
        .then(other(2, 1))
        .when(|s| project::decide(s, unset.clone()))
        .then_refused("stale_secret_version")
        // Erasing takes all away, and may be asked for again in case values were left over.
        .when(|s| project::decide(s, erased.clone()))
        .then(erased.clone())
        .when(|s| project::decide(s, other(2, 1)))
        .then_refused("stale_secret_version")
        .when(|s| project::decide(s, erased.clone()))
        .then(erased.clone());
    given::<Project>([created.clone(), defined.clone()])
        .when(|s| project::decide(s, erased.clone()))
        .then_refused("no_secrets");
    let rekeyed = ProjectEvent::SecretSet(SecretSet {
        secret: samples::secret(),
        version: 2,
        commitment: samples::commitment(2),
        key: uuid::Uuid::from_u128(2),
    });
    given::<Project>([created.clone(), defined.clone(), set.clone(), rekeyed])
        .when(|s| project::decide(s, erased.clone()))
        .then_refused("stale_secret_keys");
    let reserved = |name: &str| {
        let mut secret = samples::secret();
        secret.name = name.parse().unwrap();
        ProjectEvent::SecretSet(SecretSet {
            secret,
            version: 1,
            commitment: samples::commitment(1),
            key: uuid::Uuid::from_u128(1),
        })
    };
    for name in ["PORT", "PATH", "DAYBOOK_PROJECT"] {
        given::<Project>([created.clone(), defined.clone()])
            .when(|s| project::decide(s, reserved(name)))
            .then_refused("reserved_secret_name");
    }

    // Of several scopes the narrowest wins, and what is unset wins over nothing.
    let scoped = |environment: Option<&str>, service: Option<&str>, version, is_set| Secret {
        id: SecretId {
            name: "KEY".parse().unwrap(),
            scope: SecretScope {
                environment: environment.map(|e| e.parse().unwrap()),
                service: service.map(|s| s.parse().unwrap()),
            },
        },
        version,
        commitment: samples::commitment(1),
        key: uuid::Uuid::from_u128(1),
        is_set,
        changed_at: "2026-01-01T00:00:00Z".parse().unwrap(),
        changed_by: Position(1),
    };
    let mut secrets = Vec::new();
    for (secret, chosen) in [
        (scoped(Some("staging"), None, 9, true), None),
        (scoped(None, Some("web"), 9, true), None),
        (scoped(None, None, 1, true), Some(1)),
        (scoped(Some("production"), None, 2, true), Some(2)),
        (scoped(None, Some("api"), 3, true), Some(3)),
        (scoped(Some("production"), Some("api"), 4, false), Some(3)),
        (scoped(Some("production"), Some("api"), 5, true), Some(5)),
    ] {
        secrets.push(secret);
        let found = applicable(&secrets, &samples::shop());
        let version = found.get(&"KEY".parse().unwrap()).map(|r| r.version);
        assert_eq!(version, chosen);
    }
}

#[test]
fn projects_and_services_are_made_once() {
    let [created, defined, ..]: [ProjectEvent; 11] = samples::project_events().try_into().unwrap();
    given::<Project>([])
        .when(|s| project::decide(s, defined.clone()))
        .then_refused("project_not_found")
        .when(|s| project::decide(s, created.clone()))
        .then(created.clone())
        .when(|s| project::decide(s, created.clone()))
        .then_refused("project_exists")
        .when(|s| project::decide(s, defined.clone()))
        .then(defined.clone())
        .when(|s| project::decide(s, defined.clone()))
        .then_nothing();
    let ProjectEvent::ServiceDefined(mut bad) = defined else {
        panic!()
    };
    let volume = |path: &str, env: Option<&str>| daybook_events::spec::VolumeSpec {
        path: path.to_owned(),
        env: env.map(|key| key.parse().unwrap()),
        ..Default::default()
    };
    let of = |size: &str, class: &str| daybook_events::spec::VolumeSpec {
        size: Some(daybook_events::resources::Quantity::new(size)),
        storage_class: Some(class.to_owned()),
        ..volume("/data", None)
    };
    let set = "GREETING";
    let env = &mut bad.spec.run.env;
    env.insert(set.parse().unwrap(), "good morning".to_owned());
    for (volumes, code) in [
        (vec![volume("data", None)], "invalid_volume_path"),
        (vec![volume("/a/../b", None)], "invalid_volume_path"),
        (vec![volume("/", None)], "invalid_volume_path"),
        (vec![volume("/a:b", None)], "invalid_volume_path"),
        (
            vec![volume("/a", None), volume("/a/", None)],
            "invalid_volume_path",
        ),
        (vec![of("10", "fast")], "invalid_quantity"),
        (vec![of("ten", "fast")], "invalid_quantity"),
        (vec![of("10Gi", "Fast one")], "invalid_storage_class"),
        (vec![of("10Gi", "")], "invalid_storage_class"),
        (vec![volume("/data", Some("PORT"))], "volume_variable_taken"),
        (
            vec![volume("/data", Some("DAYBOOK_PROJECT"))],
            "volume_variable_taken",
        ),
        (vec![volume("/data", Some(set))], "volume_variable_taken"),
        (
            vec![volume("/a", Some("DATA")), volume("/b", Some("DATA"))],
            "volume_variable_taken",
        ),
    ] {
        let mut bad = bad.clone();
        let names = ["one", "two"].map(|name| name.parse().unwrap());
        bad.spec.run.volumes = names.into_iter().zip(volumes).collect();
        given::<Project>([created.clone()])
            .when(|s| project::decide(s, ProjectEvent::ServiceDefined(bad)))
            .then_refused(code);
    }
    let asks = serde_json::json!({ "requests": { "cpu": "250m" } });
    let nothing = serde_json::json!({ "requests": { "memory": "256Mi" } });
    for (autoscaling, resources, code) in [
        ((1, 80), &asks, "invalid_autoscaling"),
        ((101, 80), &asks, "invalid_autoscaling"),
        ((5, 0), &asks, "invalid_autoscaling"),
        ((5, 1001), &asks, "invalid_autoscaling"),
        ((5, 80), &nothing, "autoscaling_without_cpu"),
    ] {
        let mut bad = bad.clone();
        let (max, cpu_percent) = autoscaling;
        bad.spec.run.replicas = 2;
        bad.spec.run.autoscaling = Some(Autoscaling { max, cpu_percent });
        bad.spec.run.resources = serde_json::from_value(resources.clone()).unwrap();
        given::<Project>([created.clone()])
            .when(|s| project::decide(s, ProjectEvent::ServiceDefined(bad)))
            .then_refused(code);
    }
    bad.spec.build.dockerfile = Some("../Dockerfile".to_owned());
    given::<Project>([created.clone()])
        .when(|s| project::decide(s, ProjectEvent::ServiceDefined(bad.clone())))
        .then_refused("invalid_source_path");
    bad.spec.build.dockerfile = None;
    let source = bad.spec.source.as_mut().unwrap();
    source.url = RepositoryUrl::of_uploads(&"bank".parse().unwrap(), &"api".parse().unwrap());
    given::<Project>([created])
        .when(|s| project::decide(s, ProjectEvent::ServiceDefined(bad)))
        .then_refused("source_is_uploads");
}

#[test]
fn a_folder_is_uploaded_for_a_service_that_there_is() {
    let [created, defined, ..]: [ProjectEvent; 11] = samples::project_events().try_into().unwrap();
    let uploaded = samples::project_events().pop().unwrap();
    given::<Project>([created.clone()])
        .when(|s| project::decide(s, uploaded.clone()))
        .then_refused("service_not_found");
    given::<Project>([created, defined])
        .when(|s| project::decide(s, uploaded.clone()))
        .then(uploaded.clone());
}

#[test]
fn environments_are_made_once_changed_and_deleted_in_two_steps() {
    let [created, changed, asked, deleted, ..]: [_; 11] =
        samples::environment_events().try_into().unwrap();
    given::<Environment>([])
        .when(|s| environment::decide(s, changed.clone()))
        .then_refused("environment_not_found")
        .when(|s| environment::decide(s, asked.clone()))
        .then_refused("environment_not_found")
        .when(|s| environment::decide(s, created.clone()))
        .then(created.clone())
        .when(|s| environment::decide(s, created.clone()))
        .then_refused("environment_exists")
        .when(|s| environment::decide(s, changed.clone()))
        .then(changed.clone())
        .when(|s| environment::decide(s, changed.clone()))
        .then_nothing()
        .when(|s| environment::decide(s, deleted.clone()))
        .then_refused("environment_active")
        .when(|s| environment::decide(s, asked.clone()))
        .then(asked.clone())
        .when(|s| environment::decide(s, asked.clone()))
        .then(asked.clone())
        .when(|s| environment::decide(s, created.clone()))
        .then_refused("environment_deleting")
        .when(|s| environment::decide(s, changed.clone()))
        .then_refused("environment_deleting")
        .when(|s| environment::decide(s, deleted.clone()))
        .then(deleted.clone())
        .when(|s| environment::decide(s, deleted.clone()))
        .then_nothing()
        .when(|s| environment::decide(s, asked.clone()))
        .then_nothing()
        .when(|s| environment::decide(s, changed.clone()))
        .then_refused("environment_not_found")
        .when(|s| environment::decide(s, created.clone()))
        .then(created.clone())
        .when(|s| environment::decide(s, changed.clone()))
        .then(changed);
}

fn target(number: u64, instance: &InstanceRef) -> Target {
    Target {
        deployment: samples::deployment_id(number),
        instance: instance.clone(),
        status: Status::Started,
        ready: true,
    }
}

fn names(number: u64, instance: &InstanceRef) -> routing::Hostnames {
    samples::hostnames(instance, samples::deployment_id(number))
}

fn assign(number: u64, take_over: bool) -> Command {
    let shop = samples::shop();
    Command::Assign {
        target: target(number, &shop),
        hostnames: names(number, &shop),
        take_over,
    }
}

fn mark_main(number: u64, expected_main: Option<DeploymentId>) -> Command {
    let shop = samples::shop();
    Command::MarkMain {
        target: target(number, &shop),
        hostnames: names(number, &shop),
        expected_main,
        note: None,
    }
}

fn rollback(number: u64) -> Command {
    let shop = samples::shop();
    Command::Rollback {
        target: target(number, &shop),
        hostnames: names(number, &shop),
        note: None,
    }
}

fn withdraw(number: u64) -> Command {
    Command::Withdraw {
        deployment: samples::deployment_id(number),
        instance: samples::shop(),
        heir: None,
    }
}

/// Carries out commands, each of which must append a switch.
fn switched(commands: impl IntoIterator<Item = Command>) -> (Switched, Given<Routing>) {
    let mut last = None;
    let mut given = given::<Routing>([]);
    for command in commands {
        let (event, next) = given.when(|s| routing::decide(s, command)).then_some();
        given = next;
        let RoutingEvent::Switched(switch) = event else {
            panic!()
        };
        last = Some(*switch);
    }
    (last.unwrap(), given)
}

fn main_of(given: &Given<Routing>) -> Option<u64> {
    let main = given.state.as_ref()?.traffic(&samples::shop())?.main?;
    (0..20).find(|n| samples::deployment_id(*n) == main)
}

fn leads_to(given: &Given<Routing>, hostname: &Hostname) -> Option<DeploymentId> {
    let route = given.state.as_ref()?.routes.get(hostname)?;
    assert_eq!(route.backends.len(), 1);
    Some(route.backends[0].deployment)
}

fn rolled_back(given: &Given<Routing>) -> bool {
    let state = given.state.as_ref().unwrap();
    state.traffic(&samples::shop()).unwrap().rolled_back
}

#[test]
fn one_switch_moves_all_hostnames_and_keeps_what_was_before() {
    let (first, given) = switched([assign(1, true)]);
    assert_eq!((first.table, first.reason), (1, SwitchReason::Deploy));
    assert_eq!(first.changes.len(), 3);
    assert!(first.changes.iter().all(|c| c.previous.is_empty()));
    assert_eq!(main_of(&given), Some(1));
    let (second, given) = switched([assign(1, true), assign(2, true)]);
    let n = names(2, &samples::shop());
    assert_eq!(second.changes.len(), 3);
    for c in &second.changes {
        assert_eq!(c.previous.is_empty(), c.hostname == n.preview);
    }
    for host in [&n.environment, n.live.as_ref().unwrap(), &n.preview] {
        assert_eq!(leads_to(&given, host), Some(samples::deployment_id(2)));
    }
    // The old preview address never moves.
    let old = names(1, &samples::shop()).preview;
    assert_eq!(leads_to(&given, &old), Some(samples::deployment_id(1)));
    given
        .when(|s| routing::decide(s, assign(2, true)))
        .then_nothing();
}

#[test]
fn without_taking_over_only_the_preview_address_is_given() {
    let (switch, given) = switched([assign(1, false), assign(2, false)]);
    assert_eq!(switch.changes.len(), 1);
    assert_eq!(switch.main, None);
    assert_eq!(main_of(&given), Some(1), "the first one always takes over");
}

#[test]
fn a_deploy_does_not_undo_a_rollback_but_marking_as_main_does() {
    let (_, given) = switched([
        assign(1, true),
        assign(2, true),
        rollback(1),
        assign(3, true),
    ]);
    assert_eq!(main_of(&given), Some(1));
    assert!(rolled_back(&given));
    let (_, given) = given
        .when(|s| routing::decide(s, mark_main(3, None)))
        .then_some();
    assert_eq!(main_of(&given), Some(3));
    assert!(!rolled_back(&given));
    let (_, given) = given
        .when(|s| routing::decide(s, assign(4, true)))
        .then_some();
    assert_eq!(main_of(&given), Some(4));
}

#[test]
fn what_does_not_run_takes_no_traffic() {
    let shop = samples::shop();
    for status in Status::ALL {
        let runs = matches!(
            status,
            Status::Deploying | Status::Started | Status::PartiallyStarted
        );
        for ready in [true, false] {
            let target = || Target {
                status,
                ready,
                ..target(2, &shop)
            };
            let hostnames = || names(2, &shop);
            let commands = [
                Command::Assign {
                    target: target(),
                    hostnames: hostnames(),
                    take_over: true,
                },
                Command::MarkMain {
                    target: target(),
                    hostnames: hostnames(),
                    expected_main: None,
                    note: None,
                },
                Command::Rollback {
                    target: target(),
                    hostnames: hostnames(),
                    note: None,
                },
            ];
            for command in commands {
                let (_, given) = switched([assign(1, true)]);
                let decided = given.when(|s| routing::decide(s, command));
                match (runs, ready) {
                    (true, true) => drop(decided.then_some()),
                    (true, false) => drop(decided.then_refused("target_not_ready")),
                    (false, _) => drop(decided.then_refused("target_not_running")),
                }
            }
        }
    }
}

#[test]
fn marking_and_rolling_back_check_what_is_main() {
    let (_, given) = switched([assign(1, true), assign(2, true)]);
    given
        .clone()
        .when(|s| routing::decide(s, mark_main(1, Some(samples::deployment_id(1)))))
        .then_refused("main_changed");
    given
        .clone()
        .when(|s| routing::decide(s, mark_main(1, Some(samples::deployment_id(2)))))
        .then_some();
    given
        .when(|s| routing::decide(s, rollback(2)))
        .then_refused("already_main");
    given_nothing()
        .when(|s| routing::decide(s, rollback(1)))
        .then_refused("nothing_to_roll_back");
}

fn given_nothing() -> Given<Routing> {
    given::<Routing>([])
}

#[test]
fn a_withdrawn_deployment_has_no_routes_left() {
    let (switch, given) = switched([assign(1, true), withdraw(1)]);
    assert_eq!(switch.changes.len(), 3);
    assert_eq!(main_of(&given), None);
    assert!(given.state.as_ref().unwrap().routes.is_empty());
    given
        .when(|s| routing::decide(s, withdraw(1)))
        .then_nothing();
    // The others keep theirs.
    let (switch, given) = switched([assign(1, true), assign(2, true), withdraw(1)]);
    assert_eq!(switch.changes.len(), 1);
    assert_eq!(main_of(&given), Some(2));
}

/// The hostnames of a deployment are known by a way of their own; the routes are the truth.
fn hostnames_are_those_of_the_routes(given: &Given<Routing>) {
    let state = given.state.as_ref().unwrap();
    for n in 0..20 {
        let id = samples::deployment_id(n);
        let expected: Vec<_> = state
            .routes
            .iter()
            .filter(|(_, r)| r.backends.iter().any(|b| b.deployment == id))
            .collect();
        assert_eq!(state.hostnames_of(id), expected);
        let newest = expected.iter().map(|(_, r)| r.table).max();
        assert_eq!(state.table_of(id), newest);
    }
}

#[test]
fn the_hostnames_of_a_deployment_follow_every_switch() {
    let commands = [
        assign(1, true),
        assign(2, true),
        assign(3, false),
        rollback(1),
        mark_main(3, None),
        compensate(5),
        withdraw(1),
        withdraw(3),
    ];
    for n in 1..=commands.len() {
        let (_, given) = switched(commands[..n].iter().cloned());
        hostnames_are_those_of_the_routes(&given);
    }
}

#[test]
fn a_gateway_reports_what_was_switched_since_its_last_table() {
    let (_, given) = switched([assign(1, true), assign(2, true), withdraw(1)]);
    let state = given.state.as_ref().unwrap();
    let (one, two) = (names(1, &samples::shop()), names(2, &samples::shop()));
    let removed: Vec<_> = state.switched(2, 3).unwrap().into_iter().collect();
    assert_eq!(removed, [&one.preview]);
    assert_eq!(state.switched(1, 2).unwrap().len(), 3);
    assert_eq!(state.switched(3, 3).unwrap().len(), 0);
    assert_eq!(state.report("a", 3).hostnames.len(), 4);
    let report = state.report("a", 1);
    let (_, given) = given
        .when(|s| routing::decide(s, Command::ReportApplied(report.clone())))
        .then_some();
    let state = given.state.as_ref().unwrap();
    let report = state.report("a", 3);
    assert!(report.hostnames.contains(&two.preview));
    assert!(report.hostnames.contains(&one.preview));
}

#[test]
fn the_newest_table_that_led_a_hostname_away_is_known() {
    let (_, given) = switched([assign(1, true), assign(2, true), assign(3, false)]);
    let state = given.state.as_ref().unwrap();
    let left = |n| state.left_by(samples::deployment_id(n));
    assert_eq!([left(1), left(2), left(3)], [Some(2), None, None]);
}

#[test]
fn what_was_switched_long_ago_is_not_told_as_if_it_were_all() {
    let (_, given) = switched((1..=18).map(|n| assign(n, true)));
    let state = given.state.as_ref().unwrap();
    assert_eq!(state.switched(0, 18), None);
    assert_eq!(state.switched(1, 18), None);
    assert!(state.switched(2, 18).is_some());
    assert!(state.report("new", 18).hostnames.is_empty());
}

fn compensate(table: u32) -> Command {
    Command::Compensate {
        table,
        note: "refused".to_owned(),
    }
}

#[test]
fn a_compensation_restores_routes_main_and_pin() {
    // Of a deploy, a rollback, a second rollback, a promotion.
    let histories: [(Vec<Command>, Command); 4] = [
        (vec![assign(1, true)], assign(2, true)),
        (vec![assign(1, true), assign(2, true)], rollback(1)),
        (
            vec![
                assign(1, true),
                assign(2, true),
                assign(3, true),
                rollback(2),
            ],
            rollback(1),
        ),
        (
            vec![assign(1, true), assign(2, true), rollback(1)],
            mark_main(2, None),
        ),
    ];
    for (before, bad) in histories {
        let (_, expected) = switched(before.clone());
        let table = u32::try_from(before.len()).unwrap() + 1;
        let (undo, given) = switched(before.into_iter().chain([bad.clone(), compensate(table)]));
        assert_eq!(undo.undoes, Some(table));
        assert_eq!(main_of(&given), main_of(&expected), "{bad:?}");
        assert_eq!(rolled_back(&given), rolled_back(&expected), "{bad:?}");
        let backends = |g: &Given<Routing>| -> Vec<_> {
            let routes = &g.state.as_ref().unwrap().routes;
            routes
                .iter()
                .map(|(h, r)| (h.clone(), r.backends.clone()))
                .collect()
        };
        assert_eq!(backends(&given), backends(&expected), "{bad:?}");
        given
            .when(|s| routing::decide(s, compensate(table)))
            .then_nothing();
    }
}

#[test]
fn a_compensation_leaves_a_later_switch_alone() {
    let (_, given) = switched([
        assign(1, true),
        assign(2, true),
        assign(3, true),
        compensate(2),
    ]);
    assert_eq!(main_of(&given), Some(3));
    let n = names(2, &samples::shop());
    assert_eq!(
        leads_to(&given, &n.environment),
        Some(samples::deployment_id(3))
    );
    assert_eq!(leads_to(&given, &n.preview), None);
    let (_, given) = switched([assign(1, true), assign(2, true), rollback(1), compensate(2)]);
    assert!(rolled_back(&given), "the pin that was decided since stands");
    given
        .when(|s| routing::decide(s, compensate(40)))
        .then_refused("switch_unknown");
}

#[test]
fn what_undoes_a_switch_or_takes_out_what_goes_is_not_undone() {
    let (_, given) = switched([assign(1, true), assign(2, true), compensate(2)]);
    let given = given
        .when(|s| routing::decide(s, compensate(3)))
        .then_nothing();
    assert_eq!(main_of(&given), Some(1));
    let (_, given) = switched([assign(1, true), assign(2, true), withdraw(2)]);
    let given = given
        .when(|s| routing::decide(s, compensate(3)))
        .then_nothing();
    assert_eq!(main_of(&given), None);
}

#[test]
fn a_refused_hostname_undoes_only_what_led_it_elsewhere_since_it_was_applied() {
    let (one, two) = (names(1, &samples::shop()), names(2, &samples::shop()));
    let undoable = |given: &Given<Routing>, hostname: &Hostname| {
        given.state.as_ref().unwrap().undoable("oslo", hostname)
    };
    let (_, given) = switched([assign(1, true), assign(2, true), assign(3, false)]);
    assert_eq!(undoable(&given, &one.preview), Some(1));
    assert_eq!(undoable(&given, &two.environment), Some(2));
    assert_eq!(
        undoable(&given, &"other.example.com".parse().unwrap()),
        None
    );
    let applied = given.state.as_ref().unwrap().report("oslo", 2);
    let (_, given) = given
        .when(|s| routing::decide(s, Command::ReportApplied(applied)))
        .then_some();
    assert_eq!(undoable(&given, &two.environment), None);
    let elsewhere = given.state.as_ref().unwrap();
    assert_eq!(elsewhere.undoable("bergen", &two.environment), Some(2));
    // What restored it is not undone in turn.
    let (_, given) = given
        .when(|s| routing::decide(s, mark_main(3, None)))
        .then_some();
    assert_eq!(undoable(&given, &two.environment), Some(4));
    let (_, given) = given
        .when(|s| routing::decide(s, compensate(4)))
        .then_some();
    assert_eq!(undoable(&given, &two.environment), None);
}

#[test]
fn gateways_report_tables_that_exist_and_only_newer_ones() {
    let applied = |table| Applied {
        gateway: "berlin".into(),
        table,
        hostnames: Vec::new(),
        addresses: None,
        ingresses: None,
    };
    let rejected = |table| Rejected {
        gateway: "berlin".into(),
        table,
        code: "x".into(),
        message: "y".into(),
    };
    for nothing in [
        Command::ReportApplied(applied(1)),
        Command::ReportRejected(rejected(0)),
    ] {
        given_nothing()
            .when(|s| routing::decide(s, nothing))
            .then_refused("table_unknown");
    }
    let (_, given) = switched([assign(1, true), assign(2, true)]);
    let given = given
        .when(|s| routing::decide(s, Command::ReportApplied(applied(0))))
        .then_nothing()
        .when(|s| routing::decide(s, Command::ReportApplied(applied(2))))
        .then(RoutingEvent::Applied(applied(2)))
        .when(|s| routing::decide(s, Command::ReportApplied(applied(1))))
        .then_nothing()
        .when(|s| routing::decide(s, Command::ReportApplied(applied(3))))
        .then_refused("table_unknown")
        .when(|s| routing::decide(s, Command::ReportRejected(rejected(2))))
        .then(RoutingEvent::Rejected(rejected(2)))
        .when(|s| routing::decide(s, Command::ReportRejected(rejected(2))))
        .then_nothing()
        .when(|s| routing::decide(s, Command::ReportRejected(rejected(3))))
        .then_refused("table_unknown");
    let mut stale = given.clone();
    assert!(stale.try_apply(RoutingEvent::Applied(applied(1))).is_err());
    assert_eq!(stale.state, given.state);
}

#[test]
fn where_a_gateway_is_reached_is_reported_when_it_changes() {
    let at = |table, addresses: Option<&[&str]>| Applied {
        gateway: "berlin".into(),
        table,
        hostnames: Vec::new(),
        addresses: addresses.map(|all| {
            let all = all
                .iter()
                .map(|a| routing::GatewayAddress::Ip(a.parse().unwrap()));
            all.collect()
        }),
        ingresses: None,
    };
    let report = |e: Applied| {
        move |s: Option<&Routing>| routing::decide(s, Command::ReportApplied(e.clone()))
    };
    let (one, two) = (["203.0.113.1"], ["203.0.113.1", "2001:db8::1"]);
    let (_, given) = switched([assign(1, true), assign(2, true)]);
    let given = given
        .when(report(at(1, None)))
        .then(RoutingEvent::Applied(at(1, None)))
        // It comes later than the table.
        .when(report(at(1, Some(&one))))
        .then(RoutingEvent::Applied(at(1, Some(&one))))
        .when(report(at(1, Some(&one))))
        .then_nothing()
        // What is known is not said again.
        .when(report(at(2, Some(&one))))
        .then(RoutingEvent::Applied(at(2, None)))
        .when(report(at(1, Some(&two))))
        .then_nothing()
        .when(report(at(2, Some(&two))))
        .then(RoutingEvent::Applied(at(2, Some(&two))))
        .when(report(at(2, None)))
        .then_nothing()
        // And back, and to nowhere.
        .when(report(at(2, Some(&one))))
        .then(RoutingEvent::Applied(at(2, Some(&one))))
        .when(report(at(2, Some(&[]))))
        .then(RoutingEvent::Applied(at(2, Some(&[]))));
    let state = given.state.as_ref().unwrap();
    assert_eq!(state.addresses["berlin"], []);
    assert_eq!(state.applied["berlin"], 2);
    for illegal in [
        at(2, Some(&[])),
        at(1, Some(&one)),
        at(0, Some(&one)),
        at(2, None),
    ] {
        let mut stale = given.clone();
        assert!(stale.try_apply(RoutingEvent::Applied(illegal)).is_err());
        assert_eq!(stale.state, given.state);
    }
    // It is written as before there were any where there are none.
    let json = serde_json::to_value(at(1, None)).unwrap();
    assert!(json.get("addresses").is_none(), "{json}");
    let json = serde_json::to_value(at(1, Some(&one))).unwrap();
    assert_eq!(
        json["addresses"],
        serde_json::json!([{ "ip": "203.0.113.1" }])
    );
}

#[test]
fn ingresses_are_reported_when_there_are_others() {
    let at = |table, ingresses: Option<Ingresses>| Applied {
        gateway: "berlin".into(),
        table,
        hostnames: Vec::new(),
        addresses: None,
        ingresses,
    };
    let report = |e: Applied| {
        move |s: Option<&Routing>| routing::decide(s, Command::ReportApplied(e.clone()))
    };
    let hostname = names(1, &samples::shop()).environment;
    let seen = Ingresses::Seen(vec![IngressSeen {
        hostname: hostname.clone(),
        namespace: "legacy".into(),
        name: "shop".into(),
        backends: vec!["web:80".into()],
    }]);
    let unread = Ingresses::Unread("not allowed".into());
    let (_, given) = switched([assign(1, true)]);
    // That there are none goes without saying.
    let none = Some(Ingresses::default());
    let given = given
        .when(report(at(1, none.clone())))
        .then(RoutingEvent::Applied(at(1, None)))
        .when(report(at(1, none.clone())))
        .then_nothing();
    let given = given
        .when(report(at(1, Some(unread.clone()))))
        .then(RoutingEvent::Applied(at(1, Some(unread.clone()))))
        .when(report(at(1, Some(unread))))
        .then_nothing()
        .when(report(at(1, Some(seen.clone()))))
        .then(RoutingEvent::Applied(at(1, Some(seen.clone()))));
    let state = given.state.as_ref().unwrap();
    let also: Vec<_> = state.also_served(&hostname).collect();
    assert_eq!(also.len(), 1);
    assert_eq!((also[0].0, also[0].1.name.as_str()), ("berlin", "shop"));
    let other = names(2, &samples::shop()).preview;
    assert_eq!(state.also_served(&other).count(), 0);
    let given = given
        .when(report(at(1, none.clone())))
        .then(RoutingEvent::Applied(at(1, none)));
    let state = given.state.as_ref().unwrap();
    assert_eq!(state.also_served(&hostname).count(), 0);
    let json = serde_json::to_value(at(1, Some(seen))).unwrap();
    assert_eq!(json["ingresses"]["seen"][0]["backends"][0], "web:80");
}
