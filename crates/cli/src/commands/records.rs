//! `daybook routes records`: what a name server is to say so that users get to the Gateways of the
//! clusters that serve a project's hostnames.

use std::fmt::Write as _;

use clap::{Args, ValueEnum};
use daybook_events::routing::records::{DnsEndpoint, TTL_MAX};
use serde::Deserialize;
use serde_json::{Value, json};

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
            let what = args.hostname.as_deref().unwrap_or(&args.project);
            print_objects(&found, what)?;
        }
        RecordFormat::Zone => print_zone(&found, &args.project),
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

/// Prints objects for external-dns. Where there is no record there is no object: an empty one would
/// have records removed.
fn print_objects(found: &Found, what: &str) -> Result<(), Failure> {
    for note in found.notes() {
        output::line(&format!("# {note}"));
    }
    let endpoints: Vec<_> = found.endpoints().collect();
    for (n, endpoints) in endpoints.chunks(ENDPOINTS_MAX).enumerate() {
        let name = match n {
            0 => format!("daybook-{what}"),
            n => format!("daybook-{what}-{}", n + 1),
        };
        let object = json!({
            "apiVersion": "externaldns.k8s.io/v1alpha1",
            "kind": "DNSEndpoint",
            "metadata": {
                "name": name,
                "annotations": { "daybook.dev/table": found.table.to_string() },
            },
            "spec": { "endpoints": endpoints },
        });
        let text = serde_saphyr::to_string(&object).map_err(|error| {
            let message = format!("the records cannot be printed: {error}");
            Failure::new(Code::Failure, "unprintable", message)
                .hint("print them with `--output json`")
        })?;
        output::line(&format!("---\n{}", text.trim_end()));
    }
    Ok(())
}

fn print_zone(found: &Found, what: &str) {
    let mut text = format!("; {what}, table {}\n", found.table);
    for note in found.notes() {
        let _ = writeln!(text, "; {note}");
    }
    for endpoint in found.endpoints() {
        let (name, ttl) = (&endpoint.dns_name, endpoint.record_ttl);
        let kind = endpoint.record_type.as_str();
        let dot = if kind == "CNAME" { "." } else { "" };
        for target in &endpoint.targets {
            let _ = writeln!(text, "{name}. {ttl} IN {kind} {target}{dot}");
        }
    }
    output::line(text.trim_end());
}
