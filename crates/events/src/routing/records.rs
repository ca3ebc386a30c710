//! The DNS records of a hostname: where it leads, how the clusters share that, and where their
//! Gateways say that they are reached, in the shape that external-dns has for it.
//!
//! Nothing is made up: a cluster whose Gateway has not said where it is reached is left out, and so
//! is said. What a name server cannot be told is left out, and so is said, too.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{ClusterPolicy, GatewayAddress};
use crate::names::{ClusterName, Hostname};

/// How long a record may be kept by those who ask, in seconds, if nobody says otherwise.
pub const TTL_USUAL: u32 = 60;
/// The longest that a record may be kept, in seconds: a week.
pub const TTL_MAX: u32 = 7 * 24 * 3600;

/// The largest weight of a record of Route 53.
const WEIGHT_MAX: f64 = 255.0;

/// Who serves the records, which decides what they can say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DnsProvider {
    /// Route 53 of AWS: records of one name may have weights, stand in for each other, or be for
    /// regions. It is the only provider for which external-dns has names for that.
    #[default]
    Aws,
    /// Any name server: records of one name are alike.
    Any,
}

/// What the records are to be like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// Who serves them.
    pub provider: DnsProvider,
    /// How long they may be kept, in seconds.
    pub ttl: u32,
    /// The regions of AWS that clusters are in: what latency is measured from.
    pub regions: BTreeMap<ClusterName, String>,
    /// The health checks of Route 53 for the Gateways of clusters.
    pub health_checks: BTreeMap<ClusterName, String>,
}

impl Default for Wish {
    fn default() -> Self {
        Self {
            provider: DnsProvider::default(),
            ttl: TTL_USUAL,
            regions: BTreeMap::new(),
            health_checks: BTreeMap::new(),
        }
    }
}

/// One deployment's part of a hostname.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Serving {
    /// Its share, relative to the others' weights.
    pub weight: u32,
    /// The clusters that it is on, and whether it has a ready instance there.
    pub clusters: BTreeMap<ClusterName, bool>,
}

/// What is known of where a cluster's Gateway is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach<'a> {
    /// No Gateway of the cluster has reported any table.
    NoGateway,
    /// It has reported tables, and not where it is reached.
    Unsaid,
    /// There, as it says; nowhere, if there are none.
    At(&'a [GatewayAddress]),
}

/// The type of a record.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "UPPERCASE")]
pub enum RecordType {
    /// An IPv4 address.
    A,
    /// An IPv6 address.
    Aaaa,
    /// Another name.
    Cname,
}

impl RecordType {
    /// As zones have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::A => "A",
            Self::Aaaa => "AAAA",
            Self::Cname => "CNAME",
        }
    }
}

/// Records of one name and type: an endpoint of a `DNSEndpoint` of external-dns
/// (`externaldns.k8s.io/v1alpha1`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DnsEndpoint {
    /// The hostname.
    pub dns_name: Hostname,
    /// The type.
    pub record_type: RecordType,
    /// How long they may be kept, in seconds.
    #[serde(rename = "recordTTL")]
    pub record_ttl: u32,
    /// Where they lead.
    pub targets: Vec<String>,
    /// What tells them from others of the same name and type: the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set_identifier: Option<String>,
    /// What only one provider of DNS understands.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub provider_specific: Vec<ProviderProperty>,
}

/// What only one provider of DNS understands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProviderProperty {
    /// Its name, such as `aws/weight`.
    pub name: String,
    /// Its value.
    pub value: String,
}

/// What the records of a hostname do not say, or say otherwise than the route table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RecordNote {
    /// In a word.
    pub reason: RecordNoteReason,
    /// The cluster that it is about, if it is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<ClusterName>,
    /// In a sentence.
    pub message: String,
}

/// What the records of a hostname do not say, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RecordNoteReason {
    /// Where a cluster is reached is not known: it is left out.
    AddressUnknown,
    /// A cluster has no ready instance: it is left out.
    NotReady,
    /// No cluster has a ready instance: all are left in, as they would answer again first.
    NoneReady,
    /// A cluster has no share while the others have ready instances.
    StandsIn,
    /// Some clusters are reached by address and others by name, which one hostname cannot have.
    MixedAddresses,
    /// It would be an alias and is probably the name of a zone itself, which cannot be one.
    ZoneApex,
    /// The records say less than the policy.
    PolicyNotExpressed,
    /// A cluster's Gateway has not applied yet where the hostname leads now.
    Behind,
    /// A name that no name server is to be asked for.
    LocalName,
}

/// The records of one hostname.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Records {
    /// The records; none if there can be none.
    pub endpoints: Vec<DnsEndpoint>,
    /// What they do not say.
    pub notes: Vec<RecordNote>,
}

impl Records {
    fn note(&mut self, reason: RecordNoteReason, cluster: Option<&ClusterName>, message: String) {
        self.notes.push(RecordNote {
            reason,
            cluster: cluster.cloned(),
            message,
        });
    }
}

/// How clusters share a hostname, the clusters in the order in which they count.
enum Sharing {
    /// By these shares, all above zero.
    Shares(Vec<(ClusterName, f64)>),
    /// The first, and the others in its place.
    InOrder(Vec<ClusterName>),
    /// The one that answers soonest.
    Fastest(Vec<ClusterName>),
}

impl Sharing {
    fn clusters(&self) -> Vec<&ClusterName> {
        match self {
            Self::Shares(shares) => shares.iter().map(|(cluster, _)| cluster).collect(),
            Self::InOrder(clusters) | Self::Fastest(clusters) => clusters.iter().collect(),
        }
    }

    fn keep(&mut self, is_kept: impl Fn(&ClusterName) -> bool) {
        match self {
            Self::Shares(shares) => shares.retain(|(cluster, _)| is_kept(cluster)),
            Self::InOrder(clusters) | Self::Fastest(clusters) => clusters.retain(is_kept),
        }
    }
}

/// The addresses of a Gateway, as records can have them: its IP addresses or, where it has none,
/// one name.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Targets {
    Addresses {
        v4: BTreeSet<String>,
        v6: BTreeSet<String>,
    },
    Name(String),
}

impl Targets {
    /// Those that a hostname can lead to: any but itself.
    fn of(addresses: &[GatewayAddress], hostname: &Hostname) -> Option<Self> {
        let (mut v4, mut v6, mut name) = (BTreeSet::new(), BTreeSet::new(), None);
        for address in addresses {
            match address {
                GatewayAddress::Ip(ip) if ip.is_ipv4() => drop(v4.insert(ip.to_string())),
                GatewayAddress::Ip(ip) => drop(v6.insert(ip.to_string())),
                GatewayAddress::Hostname(found) if found == hostname => {}
                GatewayAddress::Hostname(found) => {
                    name.get_or_insert_with(|| found.to_string());
                }
            }
        }
        match (v4.is_empty() && v6.is_empty(), name) {
            (false, _) => Some(Self::Addresses { v4, v6 }),
            (true, Some(name)) => Some(Self::Name(name)),
            (true, None) => None,
        }
    }

    fn is_name(&self) -> bool {
        matches!(self, Self::Name(_))
    }

    /// What there is to lead to, by type.
    fn by_type(&self) -> Vec<(RecordType, Vec<String>)> {
        let all = |set: &BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>();
        let found = match self {
            Self::Addresses { v4, v6 } => {
                vec![(RecordType::A, all(v4)), (RecordType::Aaaa, all(v6))]
            }
            Self::Name(name) => vec![(RecordType::Cname, vec![name.clone()])],
        };
        let some = found.into_iter().filter(|(_, targets)| !targets.is_empty());
        some.collect()
    }

    /// Whether Route 53 knows by itself whether it answers: external-dns makes an alias of it.
    fn is_watched_by_aws(&self) -> bool {
        matches!(self, Self::Name(name) if is_load_balancer_of_aws(name))
    }

    /// What it is among others of one hostname.
    fn kind(&self, provider: DnsProvider) -> Kind {
        match self {
            Self::Addresses { .. } => Kind::Addresses,
            Self::Name(_) if provider == DnsProvider::Aws && self.is_watched_by_aws() => {
                Kind::LoadBalancer
            }
            Self::Name(_) => Kind::Name,
        }
    }
}

/// Whether a name is that of a load balancer of AWS: of an application by its region and `elb`, of a
/// network by `elb` and its region.
fn is_load_balancer_of_aws(name: &str) -> bool {
    let of_aws = name.strip_suffix(".amazonaws.com");
    let of_aws = of_aws.or_else(|| name.strip_suffix(".amazonaws.com.cn"));
    let mut labels = of_aws.unwrap_or_default().rsplit('.');
    let (last, before, own) = (labels.next(), labels.next(), labels.next());
    own.is_some() && (last == Some("elb") || before == Some("elb"))
}

/// What clusters of one hostname have to be alike in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Addresses,
    /// What external-dns makes an alias of: to Route 53, records of addresses.
    LoadBalancer,
    Name,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Addresses => "by address",
            Self::LoadBalancer => "by the name of a load balancer of AWS",
            Self::Name => "by name",
        }
    }
}

/// The records of a hostname that these deployments share. `reach` says where the Gateway of a
/// cluster is reached.
pub fn records<'a>(
    hostname: &Hostname,
    policy: &ClusterPolicy,
    serving: &[Serving],
    reach: impl Fn(&ClusterName) -> Reach<'a>,
    wish: &Wish,
) -> Records {
    let mut records = Records::default();
    let name = hostname.as_str();
    if name == "localhost" || name.ends_with(".localhost") {
        let message = "names under localhost are for this machine only".to_owned();
        records.note(RecordNoteReason::LocalName, None, message);
        return records;
    }
    let mut sharing = sharing(policy, serving, &mut records);
    let mut targets = BTreeMap::new();
    for cluster in sharing.clusters() {
        let unknown = match reach(cluster) {
            Reach::At(addresses) => match Targets::of(addresses, hostname) {
                Some(found) => {
                    targets.insert(cluster.clone(), found);
                    continue;
                }
                None if addresses.is_empty() => {
                    format!("the Gateway of {cluster} says that it has no address")
                }
                None => format!("the Gateway of {cluster} is reached by this very name, it says"),
            },
            Reach::Unsaid => format!("the Gateway of {cluster} has not said where it is reached"),
            Reach::NoGateway => format!(
                "no Gateway of {cluster} has reported. Where Daybook's own gateway serves it, its \
                 address is yours to give"
            ),
        };
        records.note(RecordNoteReason::AddressUnknown, Some(cluster), unknown);
    }
    sharing.keep(|cluster| targets.contains_key(cluster));
    let write = Write {
        hostname,
        wish,
        targets,
    };
    match wish.provider {
        DnsProvider::Aws => write.for_aws(sharing, &mut records),
        DnsProvider::Any => write.for_any(sharing, &mut records),
    }
    // Route 53 has aliases of its own for load balancers, and external-dns makes those.
    let is_alias = |e: &DnsEndpoint| {
        let by_aws = wish.provider == DnsProvider::Aws;
        let is_own = |target: &String| by_aws && is_load_balancer_of_aws(target);
        e.record_type == RecordType::Cname && !e.targets.iter().all(is_own)
    };
    if name.matches('.').count() < 2 && records.endpoints.iter().any(is_alias) {
        let message = format!(
            "{name} is the name of a zone, it seems, and that cannot be a CNAME: use what your \
             provider has instead (ALIAS, ANAME), or an address"
        );
        records.note(RecordNoteReason::ZoneApex, None, message);
    }
    records
}

/// How the clusters share a hostname, as far as they have ready instances.
fn sharing(policy: &ClusterPolicy, serving: &[Serving], records: &mut Records) -> Sharing {
    let serving: Vec<_> = serving.iter().filter(|s| s.weight > 0).collect();
    let all: BTreeSet<_> = serving.iter().flat_map(|s| s.clusters.keys()).collect();
    let is_ready = |cluster: &ClusterName| {
        let mut parts = serving.iter();
        parts.any(|s| s.clusters.get(cluster) == Some(&true))
    };
    let any_ready = all.iter().any(|cluster| is_ready(cluster));
    if !any_ready && !all.is_empty() {
        let message = "no cluster has a ready instance: all are left in".to_owned();
        records.note(RecordNoteReason::NoneReady, None, message);
    }
    let serves = |part: &Serving, cluster: &ClusterName| match part.clusters.get(cluster) {
        Some(ready) => *ready || !any_ready,
        None => false,
    };
    let (there, away): (Vec<&ClusterName>, Vec<_>) = all
        .into_iter()
        .partition(|cluster| is_ready(cluster) || !any_ready);
    for cluster in away {
        let message = format!("{cluster} has no ready instance");
        records.note(RecordNoteReason::NotReady, Some(cluster), message);
    }
    let alike = serving.iter().all(|part| {
        let mut there = there.iter();
        there.all(|cluster| serves(part, cluster))
    });
    let weights = match policy {
        ClusterPolicy::Simple => None,
        ClusterPolicy::Weighted(weights) => Some(weights),
        ClusterPolicy::Failover(_) | ClusterPolicy::Latency => {
            if !alike {
                let message = "the deployments that share it are on different clusters: each \
                    cluster serves its own only, whatever their weights";
                records.note(
                    RecordNoteReason::PolicyNotExpressed,
                    None,
                    message.to_owned(),
                );
            }
            let mut clusters: Vec<_> = there.into_iter().cloned().collect();
            let ClusterPolicy::Failover(order) = policy else {
                return Sharing::Fastest(clusters);
            };
            let place = |cluster: &ClusterName| order.iter().position(|c| c == cluster);
            clusters.sort_by_key(|cluster| place(cluster).unwrap_or(usize::MAX));
            return Sharing::InOrder(clusters);
        }
    };
    // Of what all are on, the policy's own figures are the shares. Otherwise each deployment
    // divides its part among its clusters, in hundredths of the whole.
    let of_policy = |cluster: &ClusterName| {
        weights.map_or(1.0, |weights| {
            f64::from(weights.get(cluster).copied().unwrap_or(0))
        })
    };
    let total: f64 = serving.iter().map(|s| f64::from(s.weight)).sum();
    let mut shares: BTreeMap<&ClusterName, f64> = BTreeMap::new();
    for part in &serving {
        let its: Vec<_> = there.iter().copied().filter(|c| serves(part, c)).collect();
        let sum: f64 = its.iter().map(|c| of_policy(c)).sum();
        let whole = match alike {
            true => 1.0,
            false => 100.0 * f64::from(part.weight) / total,
        };
        for cluster in &its {
            // Where none of its clusters has a weight, they stand in alike.
            let share = match (sum > 0.0, alike) {
                (true, true) => of_policy(cluster),
                (true, false) => whole * of_policy(cluster) / sum,
                (false, true) => 1.0,
                (false, false) => whole / its.len() as f64,
            };
            let entry = shares.entry(cluster).or_default();
            *entry = if alike { share } else { *entry + share };
        }
    }
    let (some, none): (Vec<_>, Vec<_>) = shares.into_iter().partition(|(_, share)| *share > 0.0);
    for (cluster, _) in none {
        let message = format!("{cluster} has no weight, and stands in for the others only");
        records.note(RecordNoteReason::StandsIn, Some(cluster), message);
    }
    let some = some.into_iter().map(|(c, share)| (c.clone(), share));
    Sharing::Shares(some.collect())
}

/// What is left to do where there can be no records.
const BY_YOURSELF: &str = "Give it one record yourself";

/// Writes the records of one hostname.
struct Write<'a> {
    hostname: &'a Hostname,
    wish: &'a Wish,
    targets: BTreeMap<ClusterName, Targets>,
}

impl Write<'_> {
    fn endpoint(&self, record_type: RecordType, targets: Vec<String>) -> DnsEndpoint {
        DnsEndpoint {
            dns_name: self.hostname.clone(),
            record_type,
            record_ttl: self.wish.ttl,
            targets,
            set_identifier: None,
            provider_specific: Vec::new(),
        }
    }

    /// The records of one cluster.
    fn plain(&self, cluster: &ClusterName) -> Vec<DnsEndpoint> {
        let targets = self.targets.get(cluster).into_iter();
        let by_type = targets.flat_map(Targets::by_type);
        let endpoints = by_type.map(|(kind, targets)| self.endpoint(kind, targets));
        endpoints.collect()
    }

    /// The records of one cluster among others, told from theirs.
    fn in_set(&self, cluster: &ClusterName, name: &str, value: &str) -> Vec<DnsEndpoint> {
        let property = |name: &str, value: &str| ProviderProperty {
            name: name.to_owned(),
            value: value.to_owned(),
        };
        let mut endpoints = self.plain(cluster);
        for endpoint in &mut endpoints {
            endpoint.set_identifier = Some(cluster.to_string());
            endpoint.provider_specific.push(property(name, value));
            if let Some(check) = self.wish.health_checks.get(cluster) {
                let check = property("aws/health-check-id", check);
                endpoint.provider_specific.push(check);
            }
        }
        endpoints
    }

    /// The addresses of several clusters as one set of records.
    fn merged<'c>(&self, clusters: impl Iterator<Item = &'c ClusterName>) -> Vec<DnsEndpoint> {
        let mut all: BTreeMap<RecordType, BTreeSet<String>> = BTreeMap::new();
        for targets in clusters.filter_map(|cluster| self.targets.get(cluster)) {
            for (kind, targets) in targets.by_type() {
                all.entry(kind).or_default().extend(targets);
            }
        }
        let all = all.into_iter();
        let endpoints = all.map(|(kind, targets)| self.endpoint(kind, Vec::from_iter(targets)));
        endpoints.collect()
    }

    /// Whether these are reached by address here and by name there, after saying so, and what comes
    /// of it.
    fn are_mixed(&self, clusters: &[&ClusterName], so: &str, records: &mut Records) -> bool {
        let mut kinds: BTreeMap<Kind, Vec<&str>> = BTreeMap::new();
        for cluster in clusters {
            if let Some(targets) = self.targets.get(*cluster) {
                let alike = kinds.entry(targets.kind(self.wish.provider));
                alike.or_default().push(cluster.as_str());
            }
        }
        if kinds.len() < 2 {
            return false;
        }
        let each = kinds.iter().map(|(kind, clusters)| {
            format!("{} is reached {}", clusters.join(", "), kind.as_str())
        });
        let each = Vec::from_iter(each).join(" and ");
        let message = format!("{each}: one hostname cannot have both. {so}");
        records.note(RecordNoteReason::MixedAddresses, None, message);
        true
    }

    /// Records of clusters that are told from each other by what `name` is for each of them; none if
    /// there can be none. Route 53 chooses among those of one type, so that each cluster has to have
    /// all types.
    fn set(
        &self,
        name: &str,
        members: &[(&ClusterName, String)],
        so: &str,
        records: &mut Records,
    ) -> Option<Vec<DnsEndpoint>> {
        let mut having: BTreeMap<RecordType, Vec<&str>> = BTreeMap::new();
        for (cluster, _) in members {
            let targets = self.targets.get(*cluster).into_iter();
            for (kind, _) in targets.flat_map(Targets::by_type) {
                having.entry(kind).or_default().push(cluster.as_str());
            }
        }
        let (all, some): (Vec<_>, Vec<_>) = having
            .into_iter()
            .partition(|(_, having)| having.len() == members.len());
        let of_some = some.iter().map(|(kind, having)| {
            format!("only {} has {} records", having.join(", "), kind.as_str())
        });
        let of_some = Vec::from_iter(of_some).join(" and ");
        if all.is_empty() {
            let message = format!("{of_some}: they have nothing in common. {so}");
            records.note(RecordNoteReason::MixedAddresses, None, message);
            return None;
        }
        if !some.is_empty() {
            let message = format!(
                "{of_some}, which would lead all who ask for those there: they are left out"
            );
            records.note(RecordNoteReason::PolicyNotExpressed, None, message);
        }
        let mut endpoints = Vec::new();
        for (cluster, value) in members {
            let its = self.in_set(cluster, name, value);
            let of_all = |e: &DnsEndpoint| all.iter().any(|(kind, _)| *kind == e.record_type);
            endpoints.extend(its.into_iter().filter(of_all));
        }
        Some(endpoints)
    }

    fn for_aws(&self, sharing: Sharing, records: &mut Records) {
        match sharing {
            Sharing::Shares(shares) => self.shared_on_aws(&shares, records),
            Sharing::InOrder(clusters) => self.in_order_on_aws(&clusters, records),
            Sharing::Fastest(clusters) => {
                let Some(message) = self.not_by_region(&clusters) else {
                    return self.by_region(&clusters, records);
                };
                records.note(RecordNoteReason::PolicyNotExpressed, None, message);
                let alike: Vec<_> = clusters.into_iter().map(|c| (c, 1.0)).collect();
                self.shared_on_aws(&alike, records);
            }
        }
    }

    /// Why several clusters cannot be told apart by their regions, if they cannot.
    fn not_by_region(&self, clusters: &[ClusterName]) -> Option<String> {
        if clusters.len() < 2 {
            return None;
        }
        let mut places: BTreeMap<&str, &ClusterName> = BTreeMap::new();
        for cluster in clusters {
            let Some(region) = self.wish.regions.get(cluster) else {
                return Some(format!(
                    "the region of AWS that {cluster} is in is not given, from which latency is \
                     measured: all are alike"
                ));
            };
            if let Some(other) = places.insert(region, cluster) {
                return Some(format!(
                    "{other} and {cluster} are both in {region}, and Route 53 has one record for a \
                     region: all are alike"
                ));
            }
        }
        None
    }

    fn by_region(&self, clusters: &[ClusterName], records: &mut Records) {
        let all: Vec<_> = clusters.iter().collect();
        if self.are_mixed(&all, BY_YOURSELF, records) {
            return;
        }
        if let [only] = clusters {
            records.endpoints = self.plain(only);
            return;
        }
        let regions = clusters.iter().filter_map(|cluster| {
            let region = self.wish.regions.get(cluster)?;
            Some((cluster, region.clone()))
        });
        let regions = Vec::from_iter(regions);
        let found = self.set("aws/region", &regions, BY_YOURSELF, records);
        records.endpoints = found.unwrap_or_default();
    }

    fn shared_on_aws(&self, shares: &[(ClusterName, f64)], records: &mut Records) {
        let clusters: Vec<_> = shares.iter().map(|(cluster, _)| cluster).collect();
        if self.are_mixed(&clusters, BY_YOURSELF, records) {
            return;
        }
        // Where nothing tells clusters apart, records without weights say the same.
        let first = shares.first();
        let is_same = |(cluster, share): &(ClusterName, f64)| {
            let count = |c: &ClusterName| {
                let by_type = self.targets.get(c).map(Targets::by_type);
                let by_type = by_type.into_iter().flatten();
                by_type.map(|(k, t)| (k, t.len())).collect::<Vec<_>>()
            };
            first.is_some_and(|(f, of_first)| {
                (share - of_first).abs() < 1e-9 && count(cluster) == count(f)
            })
        };
        let names = clusters.len() > 1
            && clusters
                .iter()
                .any(|c| self.targets.get(*c).is_some_and(Targets::is_name));
        let checked = clusters
            .iter()
            .any(|c| self.wish.health_checks.contains_key(*c));
        if shares.iter().all(is_same) && !names && !(checked && clusters.len() > 1) {
            records.endpoints = self.merged(clusters.into_iter());
            return;
        }
        let most = shares.iter().map(|(_, share)| *share).fold(0.0, f64::max);
        let scale = (WEIGHT_MAX / most).min(1.0);
        let weighted = shares.iter().map(|(cluster, share)| {
            let weight = (share * scale).round().max(1.0);
            (cluster, format!("{weight:.0}"))
        });
        let weighted = Vec::from_iter(weighted);
        let found = self.set("aws/weight", &weighted, BY_YOURSELF, records);
        records.endpoints = found.unwrap_or_default();
    }

    fn in_order_on_aws(&self, clusters: &[ClusterName], records: &mut Records) {
        let [first, second, others @ ..] = clusters else {
            records.endpoints = clusters.first().map_or_else(Vec::new, |c| self.plain(c));
            return;
        };
        let checked = self.wish.health_checks.contains_key(first)
            || self
                .targets
                .get(first)
                .is_some_and(Targets::is_watched_by_aws);
        if !checked {
            let message = format!(
                "Route 53 fails over only from what it checks: without a health check for {first} \
                 it leads there alone, for as long as {first} has a ready instance"
            );
            records.note(RecordNoteReason::PolicyNotExpressed, Some(first), message);
            records.endpoints = self.plain(first);
            return;
        }
        let so = format!("It leads to {first}, for as long as that has a ready instance");
        let places = [("PRIMARY", first), ("SECONDARY", second)];
        let places = places.map(|(place, cluster)| (cluster, place.to_owned()));
        let found = match self.are_mixed(&[first, second], &so, records) {
            true => None,
            false => self.set("aws/failover", &places, &so, records),
        };
        let Some(found) = found else {
            records.endpoints = self.plain(first);
            return;
        };
        records.endpoints = found;
        for later in others {
            let message = format!(
                "Route 53 fails over once: {later} comes when one of those before is not ready"
            );
            records.note(RecordNoteReason::PolicyNotExpressed, Some(later), message);
        }
    }

    fn for_any(&self, sharing: Sharing, records: &mut Records) {
        let not_said = |message: &str| RecordNote {
            reason: RecordNoteReason::PolicyNotExpressed,
            cluster: None,
            message: message.to_owned(),
        };
        let clusters = match sharing {
            Sharing::InOrder(clusters) => {
                let Some(first) = clusters.first() else {
                    return;
                };
                if clusters.len() > 1 {
                    let message =
                        format!("it leads to {first} for as long as that has a ready instance");
                    records.note(RecordNoteReason::PolicyNotExpressed, Some(first), message);
                }
                records.endpoints = self.plain(first);
                return;
            }
            Sharing::Fastest(clusters) => {
                if clusters.len() > 1 {
                    let message = "records of any name server do not say which answers soonest: all are alike";
                    records.notes.push(not_said(message));
                }
                clusters
            }
            Sharing::Shares(mut shares) => {
                let first = shares.first().map_or(0.0, |(_, share)| *share);
                if shares.iter().any(|(_, share)| (share - first).abs() > 1e-9) {
                    let message = "records of any name server have no weights: all are alike";
                    records.notes.push(not_said(message));
                }
                shares.sort_by(|(_, a), (_, b)| b.total_cmp(a));
                shares.into_iter().map(|(cluster, _)| cluster).collect()
            }
        };
        let all: Vec<_> = clusters.iter().collect();
        if self.are_mixed(&all, BY_YOURSELF, records) {
            return;
        }
        let by_name = |c: &ClusterName| self.targets.get(c).is_some_and(Targets::is_name);
        match clusters.as_slice() {
            [first, _, ..] if by_name(first) => {
                let message = format!(
                    "a hostname is an alias of one name only: it leads to {first}, and not to the others"
                );
                records.note(RecordNoteReason::PolicyNotExpressed, Some(first), message);
                records.endpoints = self.plain(first);
            }
            _ => records.endpoints = self.merged(clusters.iter()),
        }
    }
}
