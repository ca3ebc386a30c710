//! What a name server is to say of a hostname that several clusters serve.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use daybook_events::routing::records::{
    DnsProvider, Reach, RecordNoteReason, Records, Serving, Wish, records,
};
use daybook_events::routing::{ClusterPolicy, GatewayAddress};
use daybook_events::{ClusterName, Hostname};
use proptest::prelude::*;

fn cluster(name: &str) -> ClusterName {
    ClusterName::parse(name).unwrap()
}

/// A deployment on these clusters, each ready or not.
fn on(weight: u32, clusters: &[(&str, bool)]) -> Serving {
    let clusters = clusters.iter().map(|(name, ready)| (cluster(name), *ready));
    Serving {
        weight,
        clusters: clusters.collect(),
    }
}

/// Where the Gateways of clusters are reached: `203.0.113.1 lb.example.net`. A dash stands for one
/// that has not said so.
fn gateways(gateways: &[(&str, &str)]) -> BTreeMap<ClusterName, Option<Vec<GatewayAddress>>> {
    let address = |text: &str| match text.parse() {
        Ok(ip) => GatewayAddress::Ip(ip),
        Err(_) => GatewayAddress::Hostname(text.parse().unwrap()),
    };
    let all = gateways.iter().map(|(name, addresses)| {
        let said = (*addresses != "-").then(|| addresses.split(' ').filter(|a| !a.is_empty()));
        (cluster(name), said.map(|said| said.map(address).collect()))
    });
    all.collect()
}

/// Three clusters, each with an address of its own.
fn three() -> BTreeMap<ClusterName, Option<Vec<GatewayAddress>>> {
    gateways(&[
        ("bergen", "203.0.113.2"),
        ("oslo", "203.0.113.1"),
        ("trondheim", "203.0.113.3"),
    ])
}

fn of(
    policy: &ClusterPolicy,
    serving: &[Serving],
    gateways: &BTreeMap<ClusterName, Option<Vec<GatewayAddress>>>,
    wish: &Wish,
) -> Records {
    let hostname = Hostname::parse("www.example.com").unwrap();
    let reach = |cluster: &ClusterName| match gateways.get(cluster) {
        None => Reach::NoGateway,
        Some(None) => Reach::Unsaid,
        Some(Some(addresses)) => Reach::At(addresses),
    };
    records(&hostname, policy, serving, reach, wish)
}

/// The records, a line each.
fn lines(records: &Records) -> Vec<String> {
    let lines = records.endpoints.iter().map(|endpoint| {
        assert_eq!(endpoint.dns_name.as_str(), "www.example.com");
        let mut words = vec![endpoint.record_type.as_str().to_owned()];
        words.extend(endpoint.targets.iter().cloned());
        words.extend(endpoint.set_identifier.clone());
        let specific = endpoint.provider_specific.iter();
        words.extend(specific.map(|p| format!("{}={}", p.name, p.value)));
        words.join(" ")
    });
    lines.collect()
}

/// What is said of them, and of which cluster.
fn said(records: &Records) -> Vec<(RecordNoteReason, &str)> {
    let notes = records.notes.iter();
    let notes = notes.map(|n| (n.reason, n.cluster.as_ref().map_or("", |c| c.as_str())));
    notes.collect()
}

fn any_server() -> Wish {
    Wish {
        provider: DnsProvider::Any,
        ..Wish::default()
    }
}

fn checked(clusters: &[&str]) -> Wish {
    let checks = clusters.iter();
    let checks = checks.map(|name| (cluster(name), format!("check-of-{name}")));
    Wish {
        health_checks: checks.collect(),
        ..Wish::default()
    }
}

fn weighted(weights: &[(&str, u32)]) -> ClusterPolicy {
    let weights = weights.iter().map(|(name, w)| (cluster(name), *w));
    ClusterPolicy::Weighted(weights.collect())
}

fn failover(order: &[&str]) -> ClusterPolicy {
    ClusterPolicy::Failover(order.iter().map(|name| cluster(name)).collect())
}

use RecordNoteReason::*;

#[test]
fn what_nothing_tells_apart_is_one_set_of_addresses() {
    let both = [on(100, &[("oslo", true), ("bergen", true)])];
    for wish in [Wish::default(), any_server()] {
        let found = of(&ClusterPolicy::Simple, &both, &three(), &wish);
        assert_eq!(lines(&found), ["A 203.0.113.1 203.0.113.2"]);
        assert_eq!(said(&found), []);
        assert_eq!(found.endpoints[0].record_ttl, 60);
    }
    // One with more addresses than the other is not to get more than its half.
    let many = gateways(&[
        ("bergen", "203.0.113.2"),
        ("oslo", "203.0.113.1 203.0.113.4 2001:db8::1"),
    ]);
    let found = of(&ClusterPolicy::Simple, &both, &many, &Wish::default());
    let expected = [
        "A 203.0.113.2 bergen aws/weight=1",
        "A 203.0.113.1 203.0.113.4 oslo aws/weight=1",
    ];
    assert_eq!(lines(&found), expected);
    assert_eq!(said(&found), [(PolicyNotExpressed, "")]);
    // Of several load balancers a name is an alias of one only.
    let names = gateways(&[("bergen", "b.example.net"), ("oslo", "o.example.net")]);
    let found = of(&ClusterPolicy::Simple, &both, &names, &Wish::default());
    let expected = [
        "CNAME b.example.net bergen aws/weight=1",
        "CNAME o.example.net oslo aws/weight=1",
    ];
    assert_eq!(lines(&found), expected);
    let found = of(&ClusterPolicy::Simple, &both, &names, &any_server());
    assert_eq!(lines(&found), ["CNAME b.example.net"]);
    assert_eq!(said(&found), [(PolicyNotExpressed, "bergen")]);
}

#[test]
fn an_address_that_is_not_known_is_said_to_be_unknown() {
    let all = [("a", true), ("b", true), ("c", true), ("d", true)];
    let known = gateways(&[("a", "-"), ("b", ""), ("d", "203.0.113.1")]);
    let found = of(
        &ClusterPolicy::Simple,
        &[on(1, &all)],
        &known,
        &any_server(),
    );
    assert_eq!(lines(&found), ["A 203.0.113.1"]);
    let unknown = ["a", "b", "c"].map(|name| (AddressUnknown, name));
    assert_eq!(said(&found), unknown);
    let found = of(
        &ClusterPolicy::Simple,
        &[on(1, &all)],
        &gateways(&[]),
        &any_server(),
    );
    assert!(found.endpoints.is_empty());
    assert_eq!(found.notes.len(), 4);
    // Nor is a name on this machine anybody's.
    let hostname = Hostname::parse("web.shop.localhost").unwrap();
    let reach = |_: &ClusterName| Reach::NoGateway;
    let simple = ClusterPolicy::Simple;
    let found = records(&hostname, &simple, &[on(1, &all)], reach, &any_server());
    assert!(found.endpoints.is_empty());
    assert_eq!(said(&found), [(LocalName, "")]);
}

#[test]
fn a_cluster_without_a_ready_instance_is_left_out_unless_none_has_one() {
    let one = [on(1, &[("oslo", true), ("bergen", false)])];
    let found = of(&ClusterPolicy::Simple, &one, &three(), &Wish::default());
    assert_eq!(lines(&found), ["A 203.0.113.1"]);
    assert_eq!(said(&found), [(NotReady, "bergen")]);
    let none = [on(1, &[("oslo", false), ("bergen", false)])];
    let found = of(&ClusterPolicy::Simple, &none, &three(), &Wish::default());
    assert_eq!(lines(&found), ["A 203.0.113.1 203.0.113.2"]);
    assert_eq!(said(&found), [(NoneReady, "")]);
}

#[test]
fn weights_are_those_of_the_policy_as_far_as_route_53_has_them() {
    let all = |ready| {
        let clusters = [("oslo", ready), ("bergen", true), ("trondheim", true)];
        [on(100, &clusters)]
    };
    let policy = weighted(&[("oslo", 90), ("bergen", 10)]);
    let found = of(&policy, &all(true), &three(), &Wish::default());
    let expected = [
        "A 203.0.113.2 bergen aws/weight=10",
        "A 203.0.113.1 oslo aws/weight=90",
    ];
    assert_eq!(lines(&found), expected);
    assert_eq!(said(&found), [(StandsIn, "trondheim")]);
    // Without the one, all goes to the other.
    let found = of(&policy, &all(false), &three(), &Wish::default());
    assert_eq!(lines(&found), ["A 203.0.113.2"]);
    let stand_in = [on(1, &[("oslo", false), ("trondheim", true)])];
    let found = of(&policy, &stand_in, &three(), &Wish::default());
    assert_eq!(lines(&found), ["A 203.0.113.3"]);
    // Route 53 has 255 at most.
    let policy = weighted(&[("oslo", 10_000), ("bergen", 1)]);
    let found = of(&policy, &all(true), &three(), &Wish::default());
    let expected = [
        "A 203.0.113.2 bergen aws/weight=1",
        "A 203.0.113.1 oslo aws/weight=255",
    ];
    assert_eq!(lines(&found), expected);
    let found = of(&policy, &all(true), &three(), &any_server());
    assert_eq!(lines(&found), ["A 203.0.113.1 203.0.113.2"]);
    let expected = [(StandsIn, "trondheim"), (PolicyNotExpressed, "")];
    assert_eq!(said(&found), expected);
}

#[test]
fn deployments_on_different_clusters_divide_their_parts_among_those() {
    let canary = [
        on(90, &[("oslo", true), ("bergen", true)]),
        on(10, &[("bergen", true)]),
    ];
    let found = of(&ClusterPolicy::Simple, &canary, &three(), &Wish::default());
    let expected = [
        "A 203.0.113.2 bergen aws/weight=55",
        "A 203.0.113.1 oslo aws/weight=45",
    ];
    assert_eq!(lines(&found), expected);
    let policy = weighted(&[("oslo", 2), ("bergen", 1)]);
    let found = of(&policy, &canary, &three(), &Wish::default());
    let expected = [
        "A 203.0.113.2 bergen aws/weight=40",
        "A 203.0.113.1 oslo aws/weight=60",
    ];
    assert_eq!(lines(&found), expected);
    let policy = failover(&["oslo", "bergen"]);
    let found = of(&policy, &canary, &three(), &any_server());
    assert_eq!(lines(&found), ["A 203.0.113.1"]);
    assert_eq!(said(&found)[0], (PolicyNotExpressed, ""));
}

#[test]
fn the_next_cluster_comes_when_those_before_have_no_ready_instance() {
    let policy = failover(&["oslo", "bergen"]);
    let all = |oslo, bergen| {
        let clusters = [("oslo", oslo), ("bergen", bergen), ("trondheim", true)];
        [on(100, &clusters)]
    };
    // Route 53 looks itself, where it has something to look with.
    let found = of(&policy, &all(true, true), &three(), &checked(&["oslo"]));
    let expected = [
        "A 203.0.113.1 oslo aws/failover=PRIMARY aws/health-check-id=check-of-oslo",
        "A 203.0.113.2 bergen aws/failover=SECONDARY",
    ];
    assert_eq!(lines(&found), expected);
    assert_eq!(said(&found), [(PolicyNotExpressed, "trondheim")]);
    let found = of(&policy, &all(true, true), &three(), &Wish::default());
    assert_eq!(lines(&found), ["A 203.0.113.1"]);
    assert_eq!(said(&found), [(PolicyNotExpressed, "oslo")]);
    let aws = gateways(&[
        ("bergen", "b.eu-west-1.elb.amazonaws.com"),
        ("oslo", "o.eu-north-1.elb.amazonaws.com"),
    ]);
    let found = of(&policy, &all(true, true), &aws, &Wish::default());
    let expected = [
        "CNAME o.eu-north-1.elb.amazonaws.com oslo aws/failover=PRIMARY",
        "CNAME b.eu-west-1.elb.amazonaws.com bergen aws/failover=SECONDARY",
    ];
    assert_eq!(lines(&found), expected);
    // What the ledger sees moves the records of any name server.
    for (oslo, bergen, expected) in [
        (true, true, "A 203.0.113.1"),
        (false, true, "A 203.0.113.2"),
        (false, false, "A 203.0.113.3"),
    ] {
        let found = of(&policy, &all(oslo, bergen), &three(), &any_server());
        assert_eq!(lines(&found), [expected]);
    }
}

#[test]
fn latency_needs_the_regions_of_all() {
    let both = [on(100, &[("oslo", true), ("bergen", true)])];
    let regions = |of: &[(&str, &str)]| Wish {
        regions: of
            .iter()
            .map(|(c, r)| (cluster(c), (*r).to_owned()))
            .collect(),
        ..Wish::default()
    };
    let wish = regions(&[("oslo", "eu-north-1"), ("bergen", "eu-west-1")]);
    let found = of(&ClusterPolicy::Latency, &both, &three(), &wish);
    let expected = [
        "A 203.0.113.2 bergen aws/region=eu-west-1",
        "A 203.0.113.1 oslo aws/region=eu-north-1",
    ];
    assert_eq!(lines(&found), expected);
    for wish in [regions(&[("oslo", "eu-north-1")]), any_server()] {
        let found = of(&ClusterPolicy::Latency, &both, &three(), &wish);
        assert_eq!(lines(&found), ["A 203.0.113.1 203.0.113.2"]);
        assert_eq!(said(&found), [(PolicyNotExpressed, "")]);
    }
}

#[test]
fn a_name_and_an_address_at_once_are_no_records() {
    let both = [on(100, &[("oslo", true), ("bergen", true)])];
    let mixed = gateways(&[("bergen", "b.example.net"), ("oslo", "203.0.113.1")]);
    for wish in [Wish::default(), any_server()] {
        let found = of(&ClusterPolicy::Simple, &both, &mixed, &wish);
        assert!(found.endpoints.is_empty());
        assert_eq!(said(&found), [(MixedAddresses, "")]);
    }
    let policy = failover(&["oslo", "bergen"]);
    let found = of(&policy, &both, &mixed, &any_server());
    assert_eq!(lines(&found), ["A 203.0.113.1"]);
    // That of the first is right where it is only stood in for.
    let found = of(&policy, &both, &mixed, &checked(&["oslo"]));
    assert_eq!(lines(&found), ["A 203.0.113.1"]);
    assert_eq!(said(&found), [(MixedAddresses, "")]);
    // One Gateway that says both is reached at its addresses.
    let one = gateways(&[("oslo", "o.example.net 203.0.113.1")]);
    let alone = [on(100, &[("oslo", true)])];
    let found = of(&ClusterPolicy::Simple, &alone, &one, &any_server());
    assert_eq!(lines(&found), ["A 203.0.113.1"]);
}

#[test]
fn records_of_a_set_are_of_the_types_that_all_have() {
    let both = [on(100, &[("oslo", true), ("bergen", true)])];
    let dual = gateways(&[
        ("bergen", "203.0.113.2"),
        ("oslo", "203.0.113.1 2001:db8::1"),
    ]);
    let regions = [("oslo", "eu-north-1"), ("bergen", "eu-west-1")];
    let in_regions = Wish {
        regions: regions.map(|(c, r)| (cluster(c), r.to_owned())).into(),
        ..Wish::default()
    };
    // An IPv6 address here only would have all who ask for one led here.
    let of_each = [
        (weighted(&[("oslo", 10), ("bergen", 90)]), Wish::default()),
        (failover(&["oslo", "bergen"]), checked(&["oslo"])),
        (ClusterPolicy::Latency, in_regions.clone()),
    ];
    for (policy, wish) in of_each {
        let found = of(&policy, &both, &dual, &wish);
        let targets: Vec<_> = found.endpoints.iter().flat_map(|e| &e.targets).collect();
        assert_eq!(targets.len(), 2, "{found:?}");
        assert!(targets.iter().all(|t| t.starts_with("203.")), "{found:?}");
        assert_eq!(said(&found), [(PolicyNotExpressed, "")]);
    }
    // Alone, it has what it has.
    let alone = [on(100, &[("oslo", true)])];
    let found = of(&ClusterPolicy::Simple, &alone, &dual, &Wish::default());
    assert_eq!(lines(&found), ["A 203.0.113.1", "AAAA 2001:db8::1"]);
    assert_eq!(said(&found), []);

    let apart = gateways(&[("bergen", "203.0.113.2"), ("oslo", "2001:db8::1")]);
    for (policy, wish) in [
        (weighted(&[("oslo", 10), ("bergen", 90)]), Wish::default()),
        (ClusterPolicy::Latency, in_regions),
    ] {
        let found = of(&policy, &both, &apart, &wish);
        assert_eq!(lines(&found), [""; 0]);
        assert_eq!(said(&found), [(MixedAddresses, "")]);
    }
    let policy = failover(&["oslo", "bergen"]);
    let found = of(&policy, &both, &apart, &checked(&["oslo"]));
    assert_eq!(lines(&found), ["AAAA 2001:db8::1"]);
    assert_eq!(said(&found), [(MixedAddresses, "")]);
}

#[test]
fn load_balancers_of_aws_are_known_by_their_names() {
    let policy = failover(&["oslo", "bergen"]);
    let both = [on(100, &[("oslo", true), ("bergen", true)])];
    for (name, is_one) in [
        ("o-1.eu-north-1.elb.amazonaws.com", true),
        ("o-1.elb.eu-north-1.amazonaws.com", true),
        ("o-1.elb.cn-north-1.amazonaws.com.cn", true),
        ("elb.amazonaws.com", false),
        ("s3.eu-north-1.amazonaws.com", false),
        ("o-1.elb.example.com", false),
        ("o-1.eu-north-1.elb.amazonaws.com.example.com", false),
    ] {
        // Only one of those needs no health check.
        let known = gateways(&[("bergen", name), ("oslo", name)]);
        let found = of(&policy, &both, &known, &Wish::default());
        assert_eq!(found.endpoints.len(), if is_one { 2 } else { 1 }, "{name}");
        // It is an alias, which nothing that is a CNAME can be beside.
        let known = gateways(&[("bergen", "lb.example.net"), ("oslo", name)]);
        let found = of(&ClusterPolicy::Simple, &both, &known, &Wish::default());
        match is_one {
            true => assert_eq!(said(&found), [(MixedAddresses, "")], "{name}"),
            false => assert_eq!(found.endpoints.len(), 2, "{name}"),
        }
        let found = of(&ClusterPolicy::Simple, &both, &known, &any_server());
        assert_eq!(lines(&found), ["CNAME lb.example.net"], "{name}");
    }
}

#[test]
fn a_region_has_one_record() {
    let all = [("oslo", true), ("bergen", true), ("trondheim", true)];
    let regions = [
        ("oslo", "eu-north-1"),
        ("bergen", "eu-west-1"),
        ("trondheim", "eu-north-1"),
    ];
    let wish = Wish {
        regions: regions.map(|(c, r)| (cluster(c), r.to_owned())).into(),
        ..Wish::default()
    };
    let found = of(&ClusterPolicy::Latency, &[on(1, &all)], &three(), &wish);
    assert_eq!(lines(&found), ["A 203.0.113.1 203.0.113.2 203.0.113.3"]);
    assert_eq!(said(&found), [(PolicyNotExpressed, "")]);
    let message = &found.notes[0].message;
    assert!(message.contains("oslo and trondheim are both in eu-north-1"));
}

#[test]
fn a_name_leads_neither_to_itself_nor_from_a_zone() {
    let alone = [on(1, &[("oslo", true)])];
    let itself = gateways(&[("oslo", "www.example.com")]);
    let simple = ClusterPolicy::Simple;
    let found = of(&simple, &alone, &itself, &any_server());
    assert_eq!(lines(&found), [""; 0]);
    assert_eq!(said(&found), [(AddressUnknown, "oslo")]);
    let besides = gateways(&[("oslo", "www.example.com lb.example.net")]);
    let found = of(&simple, &alone, &besides, &any_server());
    assert_eq!(lines(&found), ["CNAME lb.example.net"]);
    assert_eq!(said(&found), []);

    let apex = Hostname::parse("example.com").unwrap();
    let aws = "o-1.elb.eu-north-1.amazonaws.com";
    for (address, wish, expected) in [
        ("lb.example.net", any_server(), true),
        ("lb.example.net", Wish::default(), true),
        (aws, any_server(), true),
        (aws, Wish::default(), false),
        ("203.0.113.1", any_server(), false),
    ] {
        let known = gateways(&[("oslo", address)]);
        let known = known[&cluster("oslo")].as_deref().unwrap();
        let found = records(&apex, &simple, &alone, |_| Reach::At(known), &wish);
        assert_eq!(found.endpoints.len(), 1);
        let is_said = said(&found).contains(&(ZoneApex, ""));
        assert_eq!(is_said, expected, "{address}");
    }
}

#[test]
fn an_endpoint_is_written_as_external_dns_reads_it() {
    let policy = weighted(&[("oslo", 90), ("bergen", 10)]);
    let both = [on(100, &[("oslo", true), ("bergen", true)])];
    let found = of(&policy, &both, &three(), &Wish::default());
    let expected = serde_json::json!({
        "dnsName": "www.example.com",
        "recordType": "A",
        "recordTTL": 60,
        "targets": ["203.0.113.2"],
        "setIdentifier": "bergen",
        "providerSpecific": [{ "name": "aws/weight", "value": "10" }],
    });
    assert_eq!(serde_json::to_value(&found.endpoints[0]).unwrap(), expected);
}

proptest! {
    /// Whatever is known: no target is made up, no two records of a name and type are told apart by
    /// nothing, a name is nothing beside an alias, and weights are those of Route 53.
    #[test]
    fn records_are_what_a_name_server_takes(
        parts in prop::collection::vec(
            (1u32..=10_000, prop::collection::btree_map(0usize..4, any::<bool>(), 0..4)),
            0..4,
        ),
        reach in prop::collection::vec(0usize..7, 4),
        kind in 0usize..4,
        weights in prop::collection::vec(0u32..=10_000, 4),
        aws in any::<bool>(),
        checks in any::<bool>(),
    ) {
        let names = ["a", "b", "c", "d"];
        let addresses = [
            "-", "", "203.0.113.9", "lb.example.net", "203.0.113.8 2001:db8::8", "2001:db8::9",
            "lb.elb.eu-north-1.amazonaws.com",
        ];
        let known: Vec<_> = names.iter().zip(&reach).map(|(n, r)| (*n, addresses[*r])).collect();
        let known = gateways(&known);
        let serving: Vec<_> = parts.iter().map(|(weight, clusters)| {
            let clusters: Vec<_> = clusters.iter().map(|(n, ready)| (names[*n], *ready)).collect();
            on(*weight, &clusters)
        }).collect();
        let of_each: Vec<_> = names.iter().zip(&weights).map(|(n, w)| (*n, *w)).collect();
        let policy = vec![
            ClusterPolicy::Simple, ClusterPolicy::Latency, weighted(&of_each), failover(&["c", "a"]),
        ].remove(kind);
        let wish = match (aws, checks) {
            (false, _) => any_server(),
            (true, false) => Wish::default(),
            (true, true) => checked(&names),
        };
        let found = of(&policy, &serving, &known, &wish);
        let mut keys = std::collections::BTreeSet::new();
        let said: Vec<String> = known.values().flatten().flatten().map(ToString::to_string).collect();
        let has_name = found.endpoints.iter().any(|e| e.record_type.as_str() == "CNAME");
        for endpoint in &found.endpoints {
            prop_assert!(!endpoint.targets.is_empty());
            prop_assert!(endpoint.targets.iter().all(|t| said.contains(t)));
            prop_assert!(keys.insert((endpoint.record_type, endpoint.set_identifier.clone())));
            prop_assert!(!has_name || endpoint.record_type.as_str() == "CNAME");
            prop_assert_eq!(
                found.endpoints.iter().any(|e| e.set_identifier.is_some()),
                endpoint.set_identifier.is_some()
            );
            // What a name server chooses from has a record of each of them.
            let of_set = |kind| {
                let of_set = found.endpoints.iter().filter(move |e| e.record_type == kind);
                of_set.count()
            };
            let set = found.endpoints.iter().filter_map(|e| e.set_identifier.as_ref());
            let set = set.collect::<std::collections::BTreeSet<_>>();
            prop_assert!(set.is_empty() || of_set(endpoint.record_type) == set.len());
            for property in &endpoint.provider_specific {
                prop_assert!(aws);
                if property.name == "aws/weight" {
                    prop_assert!((1..=255).contains(&property.value.parse::<u32>().unwrap()));
                }
            }
        }
        let ready = serving.iter().any(|s| s.clusters.values().any(|ready| *ready));
        let reached = serving.iter().flat_map(|s| &s.clusters).any(|(cluster, is_ready)| {
            (*is_ready || !ready) && known[cluster].as_ref().is_some_and(|a| !a.is_empty())
        });
        if !reached {
            prop_assert!(found.endpoints.is_empty());
        }
    }
}
