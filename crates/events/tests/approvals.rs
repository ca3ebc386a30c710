//! What people allow is one plan, and each of them counts once.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use daybook_events::approval::{
    ApprovalGranted, ApprovalRequested, ApprovalRule, ApprovalsVoided, EmergencyOverride, Plan,
    PostReviewCompleted, ValueChange,
};
use daybook_events::deployment::{self, Deployment, DeploymentEvent, SwitchMode};
use daybook_events::testing::{Given, given, samples};
use daybook_events::timer::KeepFor;
use daybook_events::{Digest, Payload};

fn plan(number: u64) -> Plan {
    let rule = ApprovalRule {
        required: 2,
        approvers: BTreeSet::new(),
        expires: KeepFor::IDLE,
    };
    Plan {
        rule,
        ..samples::plan(&samples::shop(), number)
    }
}

/// A deployment that ada asked for, whose first plan waits to be allowed by two.
fn waiting() -> Given<Deployment> {
    let mut events = Vec::new();
    for event in samples::deployment_events(samples::shop(), 1) {
        let wanted = ["requested", "queued", "image_pinned"];
        let name = event.kind().split('.').nth(1).unwrap_or_default();
        if wanted.contains(&name) {
            events.push(event);
        }
    }
    events.push(DeploymentEvent::ApprovalRequested(Box::new(
        ApprovalRequested {
            plan: plan(1),
            hash: plan(1).hash(),
            requester: "ada@example.com".to_owned(),
            author: None,
            expires: None,
            nonce: samples::nonce(1),
        },
    )));
    given(events)
}

fn grant(who: &str, number: u64) -> DeploymentEvent {
    DeploymentEvent::ApprovalGranted(ApprovalGranted {
        hash: plan(number).hash(),
        approver: who.to_owned(),
        reason: None,
    })
}

fn override_by(who: &str, number: u64) -> DeploymentEvent {
    DeploymentEvent::EmergencyOverride(EmergencyOverride {
        hash: plan(number).hash(),
        by: who.to_owned(),
        reason: "the shop is down".to_owned(),
    })
}

fn becomes(number: u64) -> DeploymentEvent {
    DeploymentEvent::ApprovalsVoided(Box::new(ApprovalsVoided {
        plan: plan(number),
        hash: plan(number).hash(),
        was: plan(number - 1).hash(),
        voided: Vec::new(),
    }))
}

fn review(who: &str) -> DeploymentEvent {
    DeploymentEvent::PostReviewCompleted(PostReviewCompleted {
        reviewer: who.to_owned(),
        reason: None,
    })
}

fn goes_on(given: &Given<Deployment>) -> bool {
    let state = given.state.as_ref().unwrap();
    let approval = state.approval.as_ref().unwrap();
    let event = DeploymentEvent::Approved(approval.approved());
    let allowed = deployment::decide(Some(state), event).is_ok();
    assert_eq!(allowed, approval.is_enough());
    allowed
}

#[test]
fn an_emergency_is_about_one_plan() {
    let given = waiting().and(override_by("carol", 1));
    assert!(goes_on(&given));
    // Another plan is one that nobody went ahead with; that somebody did is still to be reviewed.
    let given = given.and(becomes(2));
    assert!(!goes_on(&given));
    let state = given.state.as_ref().unwrap();
    assert!(state.needs_review());
    assert!(!state.approval.as_ref().unwrap().approved().emergency);
    // Who wants that one too has to say so, and it is recorded.
    let late = override_by("carol", 1);
    let given = given
        .when(|s| deployment::decide(s, late))
        .then_refused("plan_changed");
    let (_, given) = given
        .when(|s| deployment::decide(s, override_by("carol", 2)))
        .then_some();
    assert!(goes_on(&given));
    let given = given
        .when(|s| deployment::decide(s, override_by("dave", 2)))
        .then_nothing();
    given
        .when(|s| deployment::decide(s, review("bob")))
        .then_some();
}

#[test]
fn one_person_counts_once_however_the_name_is_written() {
    let given = waiting().and(grant("Bob", 1));
    for again in ["bob", "BOB", "bob@example.com"] {
        given
            .clone()
            .when(|s| deployment::decide(s, grant(again, 1)))
            .then_nothing();
    }
    for own in ["ada", "Ada", "ADA@example.com"] {
        given
            .clone()
            .when(|s| deployment::decide(s, grant(own, 1)))
            .then_refused("own_change");
    }
    assert!(!goes_on(&given));
    let (_, given) = given
        .when(|s| deployment::decide(s, grant("Jörg", 1)))
        .then_some();
    assert!(goes_on(&given));
    let given = given
        .when(|s| deployment::decide(s, grant("JÖRG", 1)))
        .then_nothing();

    let given = given.and(override_by("ada", 1));
    for own in ["Ada", "ada@example.com"] {
        given
            .clone()
            .when(|s| deployment::decide(s, review(own)))
            .then_refused("own_change");
    }
    given
        .when(|s| deployment::decide(s, review("adam")))
        .then_some();
}

#[test]
fn approvers_are_people_and_not_spellings() {
    let mut rule = ApprovalRule {
        required: 2,
        approvers: BTreeSet::from(["bob".to_owned(), "Bob".to_owned()]),
        expires: KeepFor::IDLE,
    };
    assert_eq!(rule.check().unwrap_err().code, "invalid_approval_rule");
    rule.approvers.insert("carol".to_owned());
    rule.check().unwrap();
}

#[test]
fn whatever_of_a_plan_becomes_different_it_is_another_plan() {
    let same = plan(1);
    assert_eq!(same.hash(), plan(1).hash());
    let other = samples::commit(77);
    let change = ValueChange {
        before: None,
        after: Some("debug".to_owned()),
    };
    // Each field once; one that is added fails to compile here until it is changed below too.
    let Plan {
        instance,
        source,
        image,
        base,
        main,
        values,
        routes,
        rule,
    } = same.clone();
    let with = |change: &dyn Fn(&mut Plan)| {
        let mut plan = same.clone();
        change(&mut plan);
        plan
    };
    let elsewhere = samples::instance("shop.staging.api");
    assert!(instance != elsewhere && source.as_ref() != Some(&other));
    assert!(base.as_ref() != Some(&other) && main.is_some());
    assert!(!values.is_empty() && !routes.is_empty() && rule.required == 2);
    let mut digest = image.clone().unwrap();
    digest.digest = samples::image(9).digest;
    let host = routes.keys().next().unwrap().clone();
    let changed = [
        with(&|p| p.instance = elsewhere.clone()),
        with(&|p| p.source = Some(other.clone())),
        with(&|p| p.source = None),
        with(&|p| p.image = Some(digest.clone())),
        with(&|p| p.base = Some(other.clone())),
        with(&|p| p.base = None),
        with(&|p| p.main = Some(samples::deployment_id(9))),
        with(&|p| p.main = None),
        with(&|p| p.values = BTreeMap::new()),
        with(&|p| {
            p.values.insert("env.LEVEL".to_owned(), change.clone());
        }),
        with(&|p| {
            let replicas = p.values.get_mut("run.replicas").unwrap();
            replicas.after = Some("3".to_owned());
        }),
        with(&|p| p.routes = BTreeMap::new()),
        with(&|p| {
            p.routes
                .insert("www.example.com".parse().unwrap(), Vec::new());
        }),
        with(&|p| {
            p.routes
                .insert(host.clone(), vec![samples::deployment_id(9)]);
        }),
        with(&|p| p.rule.required = 3),
        with(&|p| {
            p.rule.approvers.insert("bob".to_owned());
        }),
        with(&|p| p.rule.expires = KeepFor::OLD),
    ];
    let hashes: BTreeSet<_> = changed.iter().chain([&same]).map(Plan::hash).collect();
    assert_eq!(hashes.len(), changed.len() + 1);
}

#[test]
fn a_plan_names_every_address_that_may_come_to_lead_there() {
    let given = waiting();
    let mut state = given.state.unwrap();
    let hostnames = samples::hostnames(&samples::shop(), samples::deployment_id(1));
    let of = |state: &Deployment| {
        let plan = Plan::of(state, &plan(1).rule, None, None, None, &hostnames).unwrap();
        plan.routes.into_keys().collect::<BTreeSet<_>>()
    };
    let automatic = of(&state);
    assert!(automatic.contains(&hostnames.environment));
    // Traffic that is moved later is moved to what was allowed.
    state.request.switch = SwitchMode::Manual;
    assert_eq!(of(&state), automatic);
}

#[test]
fn the_plan_of_a_chart_names_its_digest_also_where_it_is_the_same() {
    let wanted = ["requested", "queued", "chart_pinned"];
    let events = wanted.map(|name| {
        let kind = format!("deployment.{name}.v1");
        let mut all = samples::deployment_events(samples::shop(), 1).into_iter();
        all.find(|event| event.kind() == kind).unwrap()
    });
    let state: Deployment = given(events).state.unwrap();
    let hostnames = samples::hostnames(&samples::shop(), samples::deployment_id(1));
    let rule = plan(1).rule;
    let main = Some((samples::deployment_id(2), &state));
    for main in [None, main] {
        let plan = Plan::of(&state, &rule, main, None, None, &hostnames).unwrap();
        assert_eq!(plan.image, None);
        let chart = &plan.values["chart"];
        let digest = samples::chart(1).digest.to_string();
        assert_eq!(chart.after.as_ref(), Some(&digest));
        assert_eq!(chart.before.is_some(), main.is_some());
        // What was rendered of it is part of what is allowed.
        assert_eq!(plan.rendered(), None);
        let with = |objects: &[u8]| plan.clone().with_rendered(&Digest::of(objects));
        assert_eq!(with(b"one").rendered(), Some(Digest::of(b"one")));
        assert_ne!(with(b"one").hash(), with(b"other").hash());
        assert_ne!(with(b"one").hash(), plan.hash());
    }
    let mut bare = state;
    bare.chart = None;
    assert!(Plan::of(&bare, &rule, None, None, None, &hostnames).is_none());
}
