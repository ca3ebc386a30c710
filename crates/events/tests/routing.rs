//! Shares, policies and what leaves: given, when, then.
#![allow(clippy::unwrap_used)]

use daybook_events::aggregate::Refusal;
use daybook_events::approval::Plan;
use daybook_events::deployment::{Deployment, DeploymentEvent, Status};
use daybook_events::log::MAX_EVENT_BYTES;
use daybook_events::routing::{
    self, Backend, ClusterPolicy, Command, Hostnames, Routing, RoutingEvent, SetDomain, SetPolicy,
    Share, Split, Stickiness, SwitchReason, Switched, Target,
};
use daybook_events::testing::{Given, given, samples};
use daybook_events::{ClusterName, DeploymentId, Hostname};

fn id(number: u64) -> DeploymentId {
    samples::deployment_id(number)
}

fn target(number: u64) -> Target {
    Target {
        deployment: id(number),
        instance: samples::shop(),
        status: Status::Started,
        ready: true,
    }
}

fn names(number: u64) -> Hostnames {
    samples::hostnames(&samples::shop(), id(number))
}

fn assign(number: u64) -> Command {
    Command::Assign {
        target: target(number),
        hostnames: names(number),
        take_over: true,
    }
}

fn mark_main(number: u64) -> Command {
    Command::MarkMain {
        target: target(number),
        hostnames: names(number),
        expected_main: None,
        note: None,
    }
}

fn rollback(number: u64) -> Command {
    Command::Rollback {
        target: target(number),
        hostnames: names(number),
        note: None,
    }
}

fn shares(weights: &[(u64, u32)]) -> Split {
    let share = |(number, weight): &(u64, u32)| Share {
        target: target(*number),
        weight: *weight,
    };
    Split {
        instance: samples::shop(),
        hostnames: names(0),
        only: None,
        shares: weights.iter().map(share).collect(),
        expected_table: None,
        note: None,
    }
}

fn split(weights: &[(u64, u32)]) -> Command {
    Command::Split(shares(weights))
}

fn leave(number: u64) -> Command {
    Command::Leave {
        deployment: id(number),
        instance: samples::shop(),
        heir: None,
    }
}

fn withdraw(number: u64) -> Command {
    Command::Withdraw {
        deployment: id(number),
        instance: samples::shop(),
        heir: None,
    }
}

fn policy(policy: ClusterPolicy) -> Command {
    Command::SetPolicy(SetPolicy {
        instance: samples::shop(),
        hostnames: names(0),
        policy,
        note: None,
    })
}

/// Carries out commands, each of which must append a switch, and gives the last one.
fn after(commands: impl IntoIterator<Item = Command>) -> (Switched, Given<Routing>) {
    let mut last = None;
    let mut given = given::<Routing>([]);
    for command in commands {
        let (event, next) = given.when(|s| routing::decide(s, command)).then_some();
        given = next;
        let RoutingEvent::Switched(switch) = event else {
            panic!("{event:?}")
        };
        last = Some(*switch);
    }
    (last.unwrap(), given)
}

/// The weights by which a hostname is shared.
fn leads_to(given: &Given<Routing>, hostname: &Hostname) -> Vec<(u64, u32)> {
    let state = given.state.as_ref().unwrap();
    let backends = state.routes.get(hostname).map_or(&[][..], |r| &r.backends);
    let number = |b: &Backend| (0..30).find(|n| id(*n) == b.deployment).unwrap();
    backends.iter().map(|b| (number(b), b.weight)).collect()
}

fn main_of(given: &Given<Routing>) -> Option<u64> {
    let main = given.state.as_ref()?.traffic(&samples::shop())?.main?;
    (0..30).find(|n| id(*n) == main)
}

fn refusal(given: &Given<Routing>, command: Command) -> Refusal {
    routing::decide(given.state.as_ref(), command).unwrap_err()
}

#[test]
fn a_split_is_one_event_over_all_addresses_with_what_was_before() {
    let (switch, given) = after([assign(1), assign(2), split(&[(2, 90), (1, 10)])]);
    assert_eq!(switch.reason, SwitchReason::Split);
    assert_eq!((switch.table, switch.main), (3, None));
    let live = names(0).live.unwrap();
    let hostnames: Vec<_> = switch.changes.iter().map(|c| &c.hostname).collect();
    assert_eq!(hostnames, [&names(0).environment, &live]);
    for change in &switch.changes {
        assert_eq!(change.previous.len(), 1);
        assert_eq!(leads_to(&given, &change.hostname), [(2, 90), (1, 10)]);
        let route = given.state.as_ref().unwrap().routes.get(&change.hostname);
        assert_eq!(route.unwrap().previous, change.previous);
        assert_eq!(route.unwrap().reason, SwitchReason::Split);
    }
    // The addresses of the deployments themselves stay.
    assert_eq!(leads_to(&given, &names(1).preview), [(1, 100)]);
    assert_eq!(main_of(&given), Some(2));
    let again = split(&[(2, 90), (1, 10)]);
    given.when(|s| routing::decide(s, again)).then_nothing();
}

#[test]
fn the_main_deployment_has_all_of_the_traffic_unless_an_address_leads_elsewhere_or_is_missing() {
    let wholly = |given: &Given<Routing>, number, live| {
        let state = given.state.as_ref().unwrap();
        state.leads_wholly_to(id(number), &samples::shop(), live)
    };
    let (_, given) = after([assign(1), assign(2)]);
    assert!(wholly(&given, 2, true) && !wholly(&given, 1, true));
    let (_, shared) = after([assign(1), assign(2), split(&[(2, 90), (1, 10)])]);
    assert!(!wholly(&shared, 2, true));
    // One address of several.
    let one = Command::Split(Split {
        only: names(0).live,
        ..shares(&[(1, 100)])
    });
    let (_, given) = given.when(|s| routing::decide(s, one)).then_some();
    assert_eq!(main_of(&given), Some(2));
    assert!(!wholly(&given, 2, true));
    let (_, given) = given.when(|s| routing::decide(s, mark_main(2))).then_some();
    assert!(wholly(&given, 2, true));
    // It had its traffic before its environment became the live one.
    let early = Command::Assign {
        target: target(1),
        hostnames: Hostnames {
            live: None,
            ..names(1)
        },
        take_over: true,
    };
    let (_, given) = after([early]);
    assert!(wholly(&given, 1, false) && !wholly(&given, 1, true));
    // Hostnames that were brought along count as well, and for none of its own.
    let (_, given) = after([assign(1), brought("www.example.com", 1, true)]);
    assert!(wholly(&given, 1, true));
    let one = Command::Split(Split {
        only: Some("www.example.com".parse().unwrap()),
        ..shares(&[(2, 100)])
    });
    let (_, given) = given.when(|s| routing::decide(s, one)).then_some();
    assert!(!wholly(&given, 1, true));
}

#[test]
fn the_largest_share_is_the_main_deployment_once_that_has_none() {
    let start = [assign(1), assign(2), assign(3)];
    let (switch, given) = after(start.into_iter().chain([split(&[(1, 20), (2, 80)])]));
    assert_eq!(switch.main.unwrap().previous, Some(id(3)));
    assert_eq!(main_of(&given), Some(2));
    let state = given.state.unwrap();
    let former = &state.traffic(&samples::shop()).unwrap().former;
    assert_eq!(former.last(), Some(&id(3)));
}

#[test]
fn only_what_runs_is_ready_and_belongs_there_gets_a_share() {
    let (_, given) = after([assign(1), assign(2)]);
    let refused = |change: fn(&mut Split)| {
        let mut split = shares(&[(1, 50), (2, 50)]);
        change(&mut split);
        refusal(&given, Command::Split(split)).code
    };
    assert_eq!(
        refused(|s| s.shares[0].target.status = Status::Stopped),
        "target_not_running"
    );
    assert_eq!(
        refused(|s| s.shares[1].target.ready = false),
        "target_not_ready"
    );
    assert_eq!(
        refused(|s| s.shares[1].target.instance.service = "worker".parse().unwrap()),
        "other_instance"
    );
    assert_eq!(refused(|s| s.shares.clear()), "invalid_weights");
    assert_eq!(refused(|s| s.shares[0].weight = 0), "invalid_weights");
    assert_eq!(refused(|s| s.shares[0].weight = 10_001), "invalid_weights");
    assert_eq!(
        refused(|s| s.shares[1] = s.shares[0].clone()),
        "invalid_weights"
    );
    assert_eq!(refused(|s| s.only = Some(names(1).preview)), "route_fixed");
    assert_eq!(
        refused(|s| s.only = Some("www.example.com".parse().unwrap())),
        "hostname_not_routed"
    );
    assert_eq!(
        refused(|s| {
            s.instance.service = "worker".parse().unwrap();
            s.shares.iter_mut().for_each(|share| {
                share.target.instance.service = "worker".parse().unwrap();
            });
            s.only = Some(names(1).environment);
        }),
        "other_instance"
    );
    let empty = refusal(&samples_of_nothing(), split(&[(1, 1)]));
    assert_eq!(empty.code, "nothing_routed");
}

fn samples_of_nothing() -> Given<Routing> {
    given::<Routing>([])
}

#[test]
fn a_split_that_was_decided_on_an_older_table_is_refused() {
    let (_, given) = after([assign(1), assign(2)]);
    let on_table = |table| {
        Command::Split(Split {
            expected_table: Some(table),
            ..shares(&[(1, 50), (2, 50)])
        })
    };
    assert_eq!(refusal(&given, on_table(1)).code, "routes_changed");
    // A table that was made for other hostnames is no reason.
    let mut other = target(9);
    other.instance.service = "worker".parse().unwrap();
    let elsewhere = Command::Assign {
        hostnames: samples::hostnames(&other.instance, id(9)),
        target: other,
        take_over: true,
    };
    let (_, given) = given.when(|s| routing::decide(s, elsewhere)).then_some();
    assert_eq!(given.state.as_ref().unwrap().table, 3);
    given.when(|s| routing::decide(s, on_table(2))).then_some();
}

#[test]
fn what_was_rolled_back_from_gets_no_share_until_somebody_marks_a_main_deployment() {
    let before = [assign(1), assign(2), split(&[(2, 60), (1, 40)]), assign(3)];
    let canary = split(&[(3, 60), (2, 40)]);
    let (_, given) = after(before.into_iter().chain([canary, rollback(1)]));
    for bad in [2, 3] {
        let refused = refusal(&given, split(&[(1, 90), (bad, 10)]));
        assert_eq!(refused.code, "pinned_out", "{bad}");
    }
    // What came later may be tried, and the pin stays.
    let (given, newer) = (
        given,
        Command::Assign {
            target: target(4),
            hostnames: names(4),
            take_over: true,
        },
    );
    let (_, given) = given.when(|s| routing::decide(s, newer)).then_some();
    assert_eq!(main_of(&given), Some(1));
    let (_, given) = given
        .when(|s| routing::decide(s, split(&[(1, 90), (4, 10)])))
        .then_some();
    assert_eq!(refusal(&given, split(&[(2, 1)])).code, "pinned_out");
    let (_, given) = given.when(|s| routing::decide(s, mark_main(4))).then_some();
    given
        .when(|s| routing::decide(s, split(&[(4, 50), (2, 50)])))
        .then_some();
}

#[test]
fn going_back_from_a_canary_leads_to_the_main_deployment_alone() {
    let (_, given) = after([assign(1), assign(2)]);
    assert_eq!(refusal(&given, rollback(2)).code, "already_main");
    let (switch, given) = after([
        assign(1),
        assign(2),
        split(&[(2, 90), (1, 10)]),
        rollback(2),
    ]);
    assert_eq!((switch.main, switch.rolled_back), (None, true));
    assert_eq!(leads_to(&given, &names(0).environment), [(2, 100)]);
    assert_eq!(
        refusal(&given, split(&[(2, 90), (1, 10)])).code,
        "pinned_out"
    );
}

#[test]
fn what_stops_leaves_what_it_shares_and_keeps_what_is_its_own() {
    let canary = [assign(1), assign(2), split(&[(2, 60), (1, 30)])];
    let (switch, given) = after(canary.clone().into_iter().chain([leave(2)]));
    assert_eq!(switch.reason, SwitchReason::Leave);
    assert_eq!(leads_to(&given, &names(0).environment), [(1, 30)]);
    assert_eq!(leads_to(&given, &names(2).preview), [(2, 100)]);
    assert_eq!(main_of(&given), Some(1));
    // Alone it keeps its addresses, for when it is started again.
    given.when(|s| routing::decide(s, leave(1))).then_nothing();
    // What is removed leaves everything, and whoever is left is the main deployment.
    let (_, given) = after(canary.into_iter().chain([withdraw(2)]));
    assert!(leads_to(&given, &names(2).preview).is_empty());
    assert_eq!(main_of(&given), Some(1));
}

#[test]
fn a_policy_names_the_routes_that_it_concerns_and_can_be_undone() {
    let cluster = |name: &str| ClusterName::parse(name).unwrap();
    let failover = ClusterPolicy::Failover(vec![cluster("oslo"), cluster("berlin")]);
    let (switch, given) = after([assign(1), policy(failover.clone())]);
    assert_eq!(switch.reason, SwitchReason::Policy);
    assert_eq!(switch.changes.len(), 2);
    assert!(switch.changes.iter().all(|c| c.previous == c.next));
    let state = given.state.as_ref().unwrap();
    assert_eq!(state.policy(&samples::shop()), &failover);
    let preview = state.routes.get(&names(1).preview).unwrap();
    assert_eq!(state.policy_of(preview), &ClusterPolicy::Simple);
    given
        .when(|s| routing::decide(s, policy(failover.clone())))
        .then_nothing();
    let undo = Command::Compensate {
        table: 2,
        note: "a gateway refused it".to_owned(),
    };
    let (_, given) = after([assign(1), policy(failover), undo]);
    let state = given.state.as_ref().unwrap();
    assert_eq!(state.policy(&samples::shop()), &ClusterPolicy::Simple);
    let twice = ClusterPolicy::Failover(vec![cluster("oslo"), cluster("oslo")]);
    assert_eq!(refusal(&given, policy(twice)).code, "invalid_policy");
    let none = ClusterPolicy::Weighted([(cluster("oslo"), 0)].into());
    assert_eq!(refusal(&given, policy(none)).code, "invalid_policy");
    let early = refusal(&samples_of_nothing(), policy(ClusterPolicy::Latency));
    assert_eq!(early.code, "nothing_routed");
}

#[test]
fn a_switch_without_a_policy_is_written_as_before_there_were_any() {
    let (switch, _) = after([assign(1)]);
    let json = serde_json::to_value(&switch).unwrap();
    assert!(json.get("policy").is_none(), "{json}");
    assert_eq!(serde_json::from_value::<Switched>(json).unwrap(), switch);
    let (switch, _) = after([assign(1), policy(ClusterPolicy::Latency)]);
    let json = serde_json::to_value(&switch).unwrap();
    assert_eq!(json["policy"]["next"], "latency");
    assert_eq!(serde_json::from_value::<Switched>(json).unwrap(), switch);
}

fn brought(hostname: &str, claim: u32, attach: bool) -> Command {
    Command::SetDomain(SetDomain {
        hostname: hostname.parse().unwrap(),
        instance: samples::shop(),
        stickiness: Stickiness::Live,
        claim,
        attach: attach.then(|| names(0)),
    })
}

#[test]
fn a_hostname_that_was_brought_along_moves_with_the_main_deployment_in_the_same_event() {
    let www: Hostname = "www.example.com".parse().unwrap();
    let (joined, given) = after([assign(1), brought("www.example.com", 1, true)]);
    assert_eq!(joined.reason, SwitchReason::Domain);
    assert_eq!(leads_to(&given, &www), [(1, 100)]);
    let start = [assign(1), brought("www.example.com", 1, true)];
    for (moved, to) in [
        (vec![assign(2)], 2),
        (vec![assign(2), rollback(1)], 1),
        (vec![assign(2), rollback(1), mark_main(2)], 2),
    ] {
        let (switch, given) = after(start.clone().into_iter().chain(moved));
        assert!(
            switch.changes.iter().any(|c| c.hostname == www),
            "{switch:?}"
        );
        assert_eq!(leads_to(&given, &www), [(to, 100)]);
    }
    // The pin of a rollback holds on it too.
    let pinned = [assign(2), rollback(1), assign(3)];
    let (_, given) = after(start.into_iter().chain(pinned));
    assert_eq!(leads_to(&given, &www), [(1, 100)]);
    // One that is there before the first deployment waits for it.
    let (early, given) = after([brought("www.example.com", 1, true), assign(1)]);
    assert_eq!(early.changes.len(), 4);
    assert_eq!(leads_to(&given, &www), [(1, 100)]);
}

#[test]
fn what_people_are_asked_to_allow_names_the_hostnames_that_were_brought_along() {
    let deployed = samples::deployment_events(samples::shop(), 2).into_iter();
    let pinned = |e: &DeploymentEvent| matches!(e, DeploymentEvent::ImagePinned(_));
    let until_pinned: Vec<_> = {
        let mut seen = false;
        let events = deployed.take_while(|e| !std::mem::replace(&mut seen, pinned(e)));
        events.collect()
    };
    let deployment = given::<Deployment>(until_pinned).state.unwrap();
    let (_, given) = after([assign(1), brought("www.example.com", 1, true)]);
    let routing = given.state.as_ref();
    let rule = samples::plan(&samples::shop(), 1).rule;
    let plan = Plan::of(&deployment, &rule, None, routing, None, &names(2)).unwrap();
    let www: Hostname = "www.example.com".parse().unwrap();
    assert_eq!(plan.routes[&www], [id(1)]);
    assert_eq!(plan.routes.len(), 4);
}

#[test]
fn a_claim_that_was_taken_out_never_comes_back() {
    let www: Hostname = "www.example.com".parse().unwrap();
    let (switch, given) = after([
        assign(1),
        brought("www.example.com", 1, true),
        brought("www.example.com", 1, false),
    ]);
    assert!(switch.changes[0].next.is_empty());
    assert!(leads_to(&given, &www).is_empty());
    let late = brought("www.example.com", 1, true);
    let given = given.when(|s| routing::decide(s, late)).then_nothing();
    let again = brought("www.example.com", 2, true);
    let (_, given) = given.when(|s| routing::decide(s, again)).then_some();
    assert_eq!(leads_to(&given, &www), [(1, 100)]);
    let zombie = brought("www.example.com", 1, false);
    given.when(|s| routing::decide(s, zombie)).then_nothing();
    // Taken out before it was ever taken in: the late one is too late.
    let (_, given) = after([assign(1), brought("www.example.com", 1, false)]);
    let late = brought("www.example.com", 1, true);
    given.when(|s| routing::decide(s, late)).then_nothing();
}

fn compensate(table: u32) -> Command {
    Command::Compensate {
        table,
        note: "a gateway refused it".to_owned(),
    }
}

#[test]
fn a_hostname_that_could_not_be_taken_in_stays_out_whatever_was_switched_since() {
    let www: Hostname = "www.example.com".parse().unwrap();
    let bad = [
        assign(1),
        assign(2),
        brought("www.example.com", 1, true),
        rollback(1),
    ];
    let (undo, given) = after(bad.into_iter().chain([compensate(3)]));
    assert!(!undo.domain.unwrap().next.attached);
    assert!(given.state.as_ref().unwrap().domain(&www).is_none());
    assert!(leads_to(&given, &www).is_empty());
    // The rollback, which was decided since, stands, and later switches leave the hostname out.
    assert_eq!(leads_to(&given, &names(0).environment), [(1, 100)]);
    let (switch, given) = given.when(|s| routing::decide(s, mark_main(2))).then_some();
    assert!(leads_to(&given, &www).is_empty(), "{switch:?}");

    // One that led nowhere yet is taken out as well.
    let (undo, given) = after([brought("www.example.com", 1, true), compensate(1)]);
    assert!(undo.changes.is_empty());
    let (_, given) = given.when(|s| routing::decide(s, assign(1))).then_some();
    assert!(leads_to(&given, &www).is_empty());

    // The next claim of it is none of that switch's business.
    let again = [
        assign(1),
        brought("www.example.com", 1, true),
        brought("www.example.com", 1, false),
        brought("www.example.com", 3, true),
    ];
    let (_, given) = after(again);
    let given = given
        .when(|s| routing::decide(s, compensate(2)))
        .then_nothing();
    assert_eq!(leads_to(&given, &www), [(1, 100)]);
    assert_eq!(given.state.unwrap().domain(&www).unwrap().claim, 3);
}

#[test]
fn a_hostname_that_joined_a_switch_that_is_undone_goes_back_with_it() {
    let www: Hostname = "www.example.com".parse().unwrap();
    let joined = brought("www.example.com", 1, true);
    let (_, given) = after([assign(1), assign(2), joined, compensate(2)]);
    assert_eq!(
        leads_to(&given, names(0).live.as_ref().unwrap()),
        [(1, 100)]
    );
    assert_eq!(leads_to(&given, &www), [(1, 100)]);
    // Led elsewhere by itself, it stays there.
    let alone = Command::Split(Split {
        only: Some(www.clone()),
        ..shares(&[(3, 100)])
    });
    let joined = brought("www.example.com", 1, true);
    let (_, given) = after([
        assign(1),
        assign(2),
        joined,
        Command::Assign {
            target: target(3),
            hostnames: names(3),
            take_over: false,
        },
        alone,
        compensate(2),
    ]);
    assert_eq!(leads_to(&given, &names(0).environment), [(1, 100)]);
    assert_eq!(leads_to(&given, &www), [(3, 100)]);
}

#[test]
fn what_was_rolled_back_from_is_nothing_to_go_back_to() {
    let (_, given) = after([assign(1), assign(2), assign(3), rollback(2)]);
    assert_eq!(refusal(&given, rollback(3)).code, "pinned_out");
    let (_, given) = given.when(|s| routing::decide(s, rollback(1))).then_some();
    assert_eq!(refusal(&given, rollback(2)).code, "pinned_out");
    let (_, given) = given.when(|s| routing::decide(s, mark_main(2))).then_some();
    given.when(|s| routing::decide(s, rollback(3))).then_some();
}

#[test]
fn addresses_that_daybook_gives_cannot_be_brought_along() {
    let (_, given) = after([assign(1)]);
    for hostname in [names(1).preview, names(0).environment] {
        let refused = refusal(&given, brought(hostname.as_str(), 1, true));
        assert_eq!(refused.code, "hostname_reserved");
    }
}

/// Even the largest switch that there can be is an event.
#[test]
fn so_many_hostnames_can_be_brought_along_that_a_switch_still_names_them_all() {
    let longest = |n: usize| {
        let label = "a".repeat(62);
        format!("{n:02}{}.{label}.{label}.{label}", "b".repeat(60))
    };
    let hosts = (0..routing::DOMAINS_MAX).map(|n| brought(&longest(n), 1, true));
    let versions = (1..=16).map(assign);
    let everything = versions.chain(hosts).chain([
        split(&(1..=16).map(|n| (n, 10_000)).collect::<Vec<_>>()),
        split(&(1..=16).map(|n| (n, 9_999)).collect::<Vec<_>>()),
    ]);
    let (switch, given) = after(everything);
    assert_eq!(switch.changes.len(), routing::DOMAINS_MAX + 2);
    let bytes = serde_json::to_vec(&switch).unwrap().len();
    // The envelope, and a reason of the greatest length.
    assert!(bytes + 10_000 < MAX_EVENT_BYTES, "{bytes}");

    let one_more = brought("www.example.com", 1, true);
    assert_eq!(refusal(&given, one_more.clone()).code, "too_many_domains");
    // The same one again, under a new claim, is none more.
    let again = brought(&longest(3), 2, true);
    let (_, given) = given.when(|s| routing::decide(s, again)).then_some();
    let removed = brought(&longest(0), 1, false);
    let (_, given) = given.when(|s| routing::decide(s, removed)).then_some();
    given.when(|s| routing::decide(s, one_more)).then_some();
}

#[test]
fn the_address_of_a_branch_goes_to_its_heir_and_never_to_what_is_anothers() {
    let branch: Hostname = "main.api.production.shop.localhost".parse().unwrap();
    let with_branch = |number: u64| Hostnames {
        branch: Some(branch.clone()),
        ..names(number)
    };
    let ready = |number| Command::Assign {
        target: target(number),
        hostnames: with_branch(number),
        take_over: false,
    };
    let (_, given) = after([ready(1), ready(2)]);
    assert_eq!(leads_to(&given, &branch), [(2, 100)]);
    let gone = Command::Leave {
        deployment: id(2),
        instance: samples::shop(),
        heir: Some(target(1)),
    };
    let (switch, given) = given.when(|s| routing::decide(s, gone)).then_some();
    let RoutingEvent::Switched(switch) = switch else {
        panic!()
    };
    assert_eq!((switch.reason, switch.main), (SwitchReason::Leave, None));
    assert_eq!(leads_to(&given, &branch), [(1, 100)]);
    let back = Command::FollowBranch {
        target: target(2),
        hostnames: with_branch(2),
    };
    let (_, given) = given.when(|s| routing::decide(s, back)).then_some();
    assert_eq!(leads_to(&given, &branch), [(2, 100)]);
    // An heir that does not run is none.
    let mut stopped = target(1);
    stopped.status = Status::Stopped;
    let gone = Command::Withdraw {
        deployment: id(2),
        instance: samples::shop(),
        heir: Some(stopped),
    };
    let (_, given) = given.when(|s| routing::decide(s, gone)).then_some();
    assert!(leads_to(&given, &branch).is_empty());
    // A name that leads elsewhere is left alone.
    let clash = Command::Assign {
        target: target(3),
        hostnames: Hostnames {
            branch: Some(names(1).preview),
            ..names(3)
        },
        take_over: false,
    };
    let (_, given) = given.when(|s| routing::decide(s, clash)).then_some();
    assert_eq!(leads_to(&given, &names(1).preview), [(1, 100)]);
}
