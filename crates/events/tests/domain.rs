//! Whose a hostname is: given, when, then.
#![allow(clippy::unwrap_used)]

use daybook_events::domain::{self, Command, Domain, DomainEvent};
use daybook_events::routing::Stickiness;
use daybook_events::testing::{Given, given, samples};
use daybook_events::{Hostname, InstanceRef};

fn www() -> Hostname {
    "www.example.com".parse().unwrap()
}

fn other_project() -> InstanceRef {
    InstanceRef {
        project: "bakery".parse().unwrap(),
        ..samples::shop()
    }
}

fn claim(instance: InstanceRef) -> Command {
    Command::Claim {
        hostname: www(),
        instance,
        stickiness: Stickiness::Live,
    }
}

fn release(of: &InstanceRef) -> Command {
    Command::Release {
        project: of.project.clone(),
    }
}

fn after(commands: impl IntoIterator<Item = Command>) -> Given<Domain> {
    commands.into_iter().fold(given::<Domain>([]), |given, c| {
        given.when(|s| domain::decide(s, c)).then_some().1
    })
}

#[test]
fn a_hostname_has_one_owner_until_that_has_given_it_up() {
    let given = after([claim(samples::shop())]);
    let given = given
        .when(|s| domain::decide(s, claim(samples::shop())))
        .then_nothing();
    let mut elsewhere = samples::shop();
    elsewhere.service = "worker".parse().unwrap();
    for other in [other_project(), elsewhere] {
        given
            .clone()
            .when(|s| domain::decide(s, claim(other)))
            .then_refused("hostname_taken");
    }
    // Others can neither give it up, nor learn whose it is.
    let refused = domain::decide(given.state.as_ref(), claim(other_project())).unwrap_err();
    assert!(!refused.message.contains("shop"), "{refused:?}");
    given
        .clone()
        .when(|s| domain::decide(s, release(&other_project())))
        .then_refused("domain_not_found");
    // While it is being given up, nobody has it yet.
    let (_, given) = given
        .when(|s| domain::decide(s, release(&samples::shop())))
        .then_some();
    for other in [other_project(), samples::shop()] {
        given
            .clone()
            .when(|s| domain::decide(s, claim(other)))
            .then_refused("hostname_taken");
    }
    let free = |number| Command::Free { number };
    let given = given.when(|s| domain::decide(s, free(7))).then_nothing();
    let (_, given) = given.when(|s| domain::decide(s, free(1))).then_some();
    let (event, given) = given
        .when(|s| domain::decide(s, claim(other_project())))
        .then_some();
    let DomainEvent::Claimed(claimed) = event else {
        panic!("{event:?}")
    };
    assert_eq!(claimed.number, 2);
    // Who was late with the claim before ends nothing.
    given.when(|s| domain::decide(s, free(1))).then_nothing();
}

#[test]
fn what_does_not_follow_is_void() {
    let mut given = after([claim(samples::shop())]);
    for event in [
        DomainEvent::Released(domain::Released { number: 2 }),
        DomainEvent::ReleaseRequested(domain::ReleaseRequested { number: 0 }),
        DomainEvent::Claimed(domain::Claimed {
            hostname: www(),
            number: 2,
            instance: other_project(),
            stickiness: Stickiness::Live,
        }),
    ] {
        let before = given.state.clone();
        assert!(given.try_apply(event).is_err());
        assert_eq!(given.state, before);
    }
}
