//! `daybook routes records`: what a name server is to say so that users get to the Gateways of the
//! clusters that serve a project's hostnames.

use std::fmt::Write as _;

use clap::{Args, ValueEnum};
use daybook_events::EventId;
use daybook_events::routing::records::{DnsEndpoint, RecordType, TTL_MAX};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::manage::segment;
use super::routes::instance;
use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// Which records, and in which form.
#[derive(Debug, Args)]
pub struct RecordsArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The project, or one service instance as `project.environment.service`.
    project: String,
    /// Only those of this hostname.
    #[arg(long)]
    hostname: Option<String>,
    /// As a table, as objects for external-dns to be applied, or as lines of a zone file. With
    /// `--output json` it is the server's answer.
    #[arg(long, value_enum, default_value_t)]
    format: RecordFormat,
    /// Who serves them: Route 53, whose records can have weights, stand in for each other and be for
    /// regions, or any name server. A zone file is for any.
    #[arg(long, value_enum)]
    provider: Option<ProviderWord>,
    /// How long they may be kept by those who ask, in seconds.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=i64::from(TTL_MAX)))]
    ttl: Option<u32>,
    /// The region of AWS that a cluster is in, for the policy `latency`; once for each cluster.
    #[arg(long = "region", value_name = "CLUSTER=REGION")]
    regions: Vec<String>,
    /// The health check of Route 53 for the Gateway of a cluster, for the policy `failover`; once
    /// for each cluster.
    #[arg(long = "health-check", value_name = "CLUSTER=ID")]
    health_checks: Vec<String>,
}

/// The form of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum RecordFormat {
    /// For people.
    #[default]
    Table,
    /// `DNSEndpoint` of external-dns, in YAML.
    Dnsendpoint,
    /// Lines of a zone file.
    Zone,
}

/// Who serves records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ProviderWord {
    /// Route 53.
    Aws,
    /// Any name server.
    Any,
}

/// What the server says.
#[derive(Debug, Deserialize)]
struct Found {
    table: u32,
    hostnames: Vec<OfHostname>,
}

#[derive(Debug, Deserialize)]
struct OfHostname {
    hostname: String,
    endpoints: Vec<DnsEndpoint>,
    notes: Vec<Note>,
}

#[derive(Debug, Deserialize)]
struct Note {
    reason: String,
    cluster: Option<String>,
    message: String,
}

/// The most endpoints of one object: what is applied is kept in an annotation, which has its bounds.
const ENDPOINTS_MAX: usize = 500;

/// The longest value of a label of Kubernetes, and how much of it a digest takes.
const LABEL_MAX: usize = 63;
const DIGEST: usize = 12;

pub async fn run(args: RecordsArgs) -> Outcome {
    if args.format == RecordFormat::Zone && args.provider == Some(ProviderWord::Aws) {
        return Err(Failure::new(
            Code::Usage,
            "invalid_provider",
            "a zone file has no weights, regions or health checks",
        )
        .hint("leave --provider out, or print a table or objects for external-dns"));
    }
    let client = Client::new(&args.server)?;
    let (project, only) = match args.project.contains('.') {
        true => {
            let instance = instance(&args.project)?;
            (instance.project.to_string(), Some(instance.to_string()))
        }
        false => (args.project.clone(), None),
    };
    let provider = match (args.format, args.provider) {
        (RecordFormat::Zone, _) | (_, Some(ProviderWord::Any)) => Some("any".to_owned()),
        (_, Some(ProviderWord::Aws)) => Some("aws".to_owned()),
        (_, None) => None,
    };
    let listed = |all: &[String]| (!all.is_empty()).then(|| all.join(","));
    let path = format!("/api/v1/projects/{}/records", segment(&project)?);
    let query = [
        ("instance_id", only),
        ("hostname", args.hostname.clone()),
        ("ttl", args.ttl.map(|ttl| ttl.to_string())),
        ("provider", provider),
        ("regions", listed(&args.regions)),
        ("health_checks", listed(&args.health_checks)),
    ];
    let answer: Value = client.get(&path, &query).await?;
    if output::is_json() {
        output::json(&answer);
        return Ok(Code::Success);
    }
    let found: Found = serde_json::from_value(answer).map_err(|error| {
        Failure::new(
            Code::Failure,
            "invalid_answer",
            format!("the server's answer cannot be read: {error}"),
        )
        .hint("use the version of daybook that the server has")
    })?;
    match args.format {
        RecordFormat::Table => print_table(&found),
        RecordFormat::Dnsendpoint => {
            // As the server writes it, whatever it was asked for.
            let of = found.hostnames.first().filter(|_| args.hostname.is_some());
            let scope = match (of, args.project.contains('.')) {
                (Some(of), _) => scope("hostname", &of.hostname),
                (None, true) => scope("instance", &args.project),
                (None, false) => scope("project", &args.project),
            };
            print_objects(&found, &scope)?;
        }
        RecordFormat::Zone => output::line(zone(&found, &args.project).trim_end()),
    }
    Ok(Code::Success)
}

impl Found {
    fn endpoints(&self) -> impl Iterator<Item = &DnsEndpoint> {
        self.hostnames.iter().flat_map(|of| &of.endpoints)
    }

    /// What the records do not say, a line each. Names of this machine are only counted.
    fn notes(&self) -> Vec<String> {
        let is_local = |note: &&Note| note.reason == "LocalName";
        let mut lines = Vec::new();
        let mut local = 0;
        for of in &self.hostnames {
            local += of.notes.iter().filter(is_local).count();
            let notes = of.notes.iter().filter(|note| !is_local(note));
            lines.extend(notes.map(|note| format!("{}: {}", of.hostname, note.message)));
        }
        match local {
            0 => {}
            1 => lines.push("1 hostname under localhost has no records".to_owned()),
            n => lines.push(format!("{n} hostnames under localhost have no records")),
        }
        lines
    }
}

fn print_table(found: &Found) {
    let mut table = Table::new(["HOSTNAME", "TYPE", "TTL", "LEADS TO", "CLUSTER", "HOW"]);
    for of in &found.hostnames {
        for endpoint in &of.endpoints {
            let specific = endpoint.provider_specific.iter();
            let how = specific.map(|p| format!("{}={}", p.name, p.value));
            table.row(Row::new([
                of.hostname.clone(),
                endpoint.record_type.as_str().to_owned(),
                endpoint.record_ttl.to_string(),
                endpoint.targets.join(" "),
                endpoint.set_identifier.clone().unwrap_or_default(),
                how.collect::<Vec<_>>().join(" "),
            ]));
        }
        let unknown = of.notes.iter().filter(|n| n.reason == "AddressUnknown");
        for cluster in unknown.filter_map(|n| n.cluster.as_ref()) {
            let unknown = output::style().warn("unknown");
            let cells = [of.hostname.clone(), String::new(), String::new(), unknown];
            let rest = [cluster.clone(), String::new()];
            table.row(Row::new(cells.into_iter().chain(rest)));
        }
    }
    table.print();
    for note in found.notes() {
        output::line(&format!("note: {note}"));
    }
    output::line(&format!("table {}", found.table));
}

/// What objects are of, as a label can say it: `project.shop`. What is too long for one ends in a
/// digest of it.
fn scope(kind: &str, of: &str) -> String {
    let scope = format!("{kind}.{of}");
    if scope.len() <= LABEL_MAX {
        return scope;
    }
    let digest = EventId::derived(Uuid::nil(), &scope).0.simple().to_string();
    let digest = digest.get(..DIGEST).unwrap_or_default();
    let start = scope.get(..LABEL_MAX - 1 - DIGEST).unwrap_or(kind);
    let start = start.trim_end_matches(['.', '-']);
    format!("{start}-{digest}")
}

/// Prints objects for external-dns. Where there is no record there is no object: an empty one would
/// have records removed.
fn print_objects(found: &Found, scope: &str) -> Result<(), Failure> {
    for note in found.notes() {
        output::line(&format!("# {note}"));
    }
    for object in objects(found, scope) {
        let text = serde_saphyr::to_string(&object).map_err(|error| {
            let message = format!("the records cannot be printed: {error}");
            Failure::new(Code::Failure, "unprintable", message)
                .hint("print them with `--output json`")
        })?;
        output::line(&format!("---\n{}", text.trim_end()));
    }
    Ok(())
}

/// Objects with the records. Their names end in a number that belongs to nothing else, and their
/// label finds those of which there is no other any more.
fn objects(found: &Found, scope: &str) -> Vec<Value> {
    let endpoints: Vec<_> = found.endpoints().collect();
    let chunks = endpoints.chunks(ENDPOINTS_MAX).zip(1..);
    let objects = chunks.map(|(endpoints, n)| {
        json!({
            "apiVersion": "externaldns.k8s.io/v1alpha1",
            "kind": "DNSEndpoint",
            "metadata": {
                "name": format!("daybook.{scope}.{n}"),
                "labels": { "daybook.dev/records": scope },
                "annotations": { "daybook.dev/table": found.table.to_string() },
            },
            "spec": { "endpoints": endpoints },
        })
    });
    objects.collect()
}

/// Lines of a zone file. What cannot be in one is there as a comment, below the note that says why.
fn zone(found: &Found, what: &str) -> String {
    let mut text = format!("; {what}, table {}\n", found.table);
    for note in found.notes() {
        let _ = writeln!(text, "; {note}");
    }
    for of in &found.hostnames {
        let is_apex = of.notes.iter().any(|note| note.reason == "ZoneApex");
        for endpoint in &of.endpoints {
            let (name, ttl) = (&endpoint.dns_name, endpoint.record_ttl);
            let kind = endpoint.record_type.as_str();
            let is_alias = endpoint.record_type == RecordType::Cname;
            let start = if is_alias && is_apex { "; " } else { "" };
            let dot = if is_alias { "." } else { "" };
            for target in &endpoint.targets {
                let _ = writeln!(text, "{start}{name}. {ttl} IN {kind} {target}{dot}");
            }
        }
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// So many hostnames that are aliases of a load balancer.
    fn found(hostnames: usize) -> Found {
        let hostnames = (0..hostnames).map(|n| {
            let hostname = format!("h{n}.example.com");
            let endpoint = json!({
                "dnsName": hostname,
                "recordType": "CNAME",
                "recordTTL": 60,
                "targets": ["lb.example.net"],
            });
            json!({ "hostname": hostname, "endpoints": [endpoint], "notes": [] })
        });
        let hostnames: Vec<_> = hostnames.collect();
        serde_json::from_value(json!({ "table": 7, "hostnames": hostnames })).unwrap()
    }

    fn names(found: &Found, scope: &str) -> Vec<String> {
        let objects = objects(found, scope);
        let names = objects.iter().map(|o| {
            assert_eq!(o["metadata"]["labels"]["daybook.dev/records"], scope);
            o["metadata"]["name"].as_str().unwrap().to_owned()
        });
        names.collect()
    }

    #[test]
    fn objects_have_names_that_nothing_else_has() {
        let (two, one) = (found(ENDPOINTS_MAX + 1), found(1));
        let shop = names(&two, &scope("project", "shop"));
        assert_eq!(shop, ["daybook.project.shop.1", "daybook.project.shop.2"]);
        let second = names(&one, &scope("project", "shop-2"));
        assert_eq!(second, ["daybook.project.shop-2.1"]);
        // A hostname may read as an instance does.
        let instance = names(&one, &scope("instance", "shop.production.web"));
        assert_ne!(
            instance,
            names(&one, &scope("hostname", "shop.production.web"))
        );
        assert!(names(&found(0), "project.shop").is_empty());
    }

    #[test]
    fn what_is_long_is_still_a_label_and_a_name() {
        let label = "a".repeat(53);
        let first = scope("hostname", &format!("{label}.example.com"));
        let other = scope("hostname", &format!("{label}.example.org"));
        assert_ne!(first, other);
        for scope in [first, other, scope("hostname", &"ab.".repeat(80))] {
            assert!(scope.len() <= LABEL_MAX, "{scope}");
            assert!(!scope.contains(".-"), "{scope}");
            assert!(scope.starts_with("hostname.a"), "{scope}");
        }
    }

    #[test]
    fn an_alias_of_a_zone_itself_is_a_comment_in_a_zone_file() {
        let mut found = found(2);
        found.hostnames[0].notes.push(Note {
            reason: "ZoneApex".to_owned(),
            cluster: None,
            message: "it is the name of a zone".to_owned(),
        });
        let zone = zone(&found, "shop");
        let expected = [
            "; shop, table 7",
            "; h0.example.com: it is the name of a zone",
            "; h0.example.com. 60 IN CNAME lb.example.net.",
            "h1.example.com. 60 IN CNAME lb.example.net.",
        ];
        assert_eq!(zone.lines().collect::<Vec<_>>(), expected);
    }
}
