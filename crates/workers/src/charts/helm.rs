//! Charts by the program `helm`, with a folder for what was fetched.
//!
//! The folder has each archive under its digest, and beside them which digest a version of a chart
//! had. A version that is there is not fetched again, so that it stays what it was; one that has to
//! be is refused if it is another one now.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use daybook_events::chart::{ChartReference, ChartVersion, PinnedChart};
use daybook_events::{ClusterName, Digest, EnvironmentName, ProjectName};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use super::egress::Egress;
use super::objects;
use super::program::{Helm, Said, too_large};
use super::{ChartRelease, Charts, RELEASE_VARIABLE};
use crate::git_transport::{SourcePolicy, TransportError, resolve};
use crate::ports::StepError;

/// The largest archive, in bytes.
const ARCHIVE_MAX: u64 = 32 << 20;

/// What the folders of calls begin with.
const CALL: &str = "call-";

/// What charts are made with.
#[derive(Debug, Clone)]
pub struct HelmOptions {
    /// The program; that of `DAYBOOK_HELM` or on the `PATH` if it is not named.
    pub program: Option<PathBuf>,
    /// The folder with what was fetched, made if it is not there. Whatever is in it may be deleted.
    pub folder: PathBuf,
    /// Clusters that are known to run no charts.
    pub never_on: BTreeSet<ClusterName>,
    /// The namespace of an environment, which charts may write into what they make.
    pub namespace: fn(&ProjectName, &EnvironmentName) -> String,
    /// Where charts may be fetched from.
    pub policy: SourcePolicy,
}

/// Charts by the program `helm`.
#[derive(Debug)]
pub struct HelmCharts {
    options: HelmOptions,
    /// Filled when the program was found to be new enough.
    is_usable: OnceCell<()>,
}

impl HelmCharts {
    /// The program is looked for when it is needed. What calls of a process that was killed left in the
    /// folder is removed: no two processes have the same.
    pub fn new(mut options: HelmOptions) -> Self {
        // Helm is run in another folder than that which a path is relative to.
        if let Ok(folder) = std::path::absolute(&options.folder) {
            options.folder = folder;
        }
        let entries = std::fs::read_dir(&options.folder).into_iter().flatten();
        for entry in entries.flatten() {
            let name = entry.file_name();
            if name.to_str().is_some_and(|name| name.starts_with(CALL)) {
                // It is in nobody's way, and goes with the folder at the latest.
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        Self {
            options,
            is_usable: OnceCell::new(),
        }
    }

    /// The program, if it is one that may be used.
    async fn helm(&self, scratch: &Path) -> Result<Helm, StepError> {
        let helm = Helm::find(self.options.program.as_deref(), scratch)?;
        let check = || helm.check_version();
        self.is_usable.get_or_try_init(check).await?;
        Ok(helm)
    }

    fn archive(&self, digest: &Digest) -> PathBuf {
        self.options.folder.join(format!("{}.tgz", digest.hex()))
    }

    /// The file that says which digest a version of a chart had.
    fn note(&self, chart: &ChartReference, version: &ChartVersion) -> PathBuf {
        let named = Digest::of(format!("{chart} {version}").as_bytes());
        self.options.folder.join("versions").join(named.hex())
    }

    /// The digest that a version of a chart had when it was fetched here.
    fn noted(&self, chart: &ChartReference, version: &ChartVersion) -> Option<Digest> {
        let text = std::fs::read_to_string(self.note(chart, version)).ok()?;
        Digest::parse(text.trim()).ok()
    }

    /// Whether an archive is there, and is what it is to be.
    fn has(&self, digest: &Digest) -> bool {
        let file = self.archive(digest);
        let bytes = std::fs::metadata(&file).and_then(|found| match found.len() {
            0..=ARCHIVE_MAX => std::fs::read(&file),
            _ => Err(std::io::ErrorKind::FileTooLarge.into()),
        });
        bytes.is_ok_and(|bytes| Digest::of(&bytes) == *digest)
    }

    /// A folder for one call, which is gone after it.
    fn scratch(&self) -> Result<tempfile::TempDir, StepError> {
        let folder = &self.options.folder;
        let made = std::fs::create_dir_all(folder.join("versions"));
        let made = made.and_then(|()| tempfile::Builder::new().prefix(CALL).tempdir_in(folder));
        made.map_err(|e| unusable(folder, &e))
    }

    /// Fetches a version, and keeps it if it is what it is to be.
    async fn fetch(
        &self,
        chart: &ChartReference,
        version: &ChartVersion,
        expected: Option<&Digest>,
    ) -> Result<Digest, StepError> {
        let scratch = self.scratch()?;
        let helm = self.helm(scratch.path()).await?;
        let into = scratch.path().join("fetched");
        std::fs::create_dir(&into).map_err(|e| unusable(&into, &e))?;
        let egress = self.egress(chart, version).await?;
        let said = helm.run(pull(chart, version, &into), egress.as_ref());
        let said = said.await?;
        if !said.worked {
            let refused = egress.and_then(|egress| egress.refused());
            return Err(match refused {
                Some(refused) => not_allowed(chart, version, &refused),
                None => not_fetched(chart, version, &said),
            });
        }
        let file = only_file(&into).ok_or_else(|| {
            StepError::passing(
                "helm_failed",
                format!("helm fetched {chart}:{version} and left no archive"),
                "check the program that DAYBOOK_HELM or the PATH names",
            )
        })?;
        let found = std::fs::metadata(&file).map_err(|e| unusable(&file, &e))?;
        if found.len() > ARCHIVE_MAX {
            return Err(too_large(&format!("an archive of {} bytes", found.len())));
        }
        let bytes = std::fs::read(&file).map_err(|e| unusable(&file, &e))?;
        let digest = Digest::of(&bytes);
        check_version(&helm, &file, chart, version).await?;
        if let Some(expected) = expected
            && *expected != digest
        {
            return Err(changed(chart, version, expected, &digest));
        }
        let kept = self.archive(&digest);
        let done = std::fs::rename(&file, &kept).and_then(|()| {
            let mut note = tempfile::NamedTempFile::new_in(scratch.path())?;
            note.write_all(digest.as_str().as_bytes())?;
            note.persist(self.note(chart, version))
                .map_err(|e| e.error)?;
            Ok(())
        });
        done.map_err(|e| unusable(&self.options.folder, &e))?;
        Ok(digest)
    }

    /// The way out for fetching a chart where it may not come from everywhere. Refuses one whose own host
    /// is where it may not be: Helm would not ask a proxy for what is on loopback.
    async fn egress(
        &self,
        chart: &ChartReference,
        version: &ChartVersion,
    ) -> Result<Option<Egress>, StepError> {
        let policy = &self.options.policy;
        if policy.allow_private_addresses {
            return Ok(None);
        }
        let (host, port) = host_of(chart.as_str());
        resolve(policy, host, port)
            .await
            .map_err(|e| not_allowed(chart, version, &e))?;
        let egress = Egress::start(policy.clone()).await.map_err(|e| {
            StepError::passing(
                "helm_failed",
                format!("there is no way out for helm: {e}"),
                "check that Daybook's workers may listen on loopback",
            )
        })?;
        Ok(Some(egress))
    }

    /// What the manifests of a chart say, as JSON. Helm reads them itself: its YAML has numbers that
    /// begin with a zero, and words for yes and no.
    async fn documents(
        &self,
        helm: &Helm,
        scratch: &Path,
        manifests: Vec<u8>,
    ) -> Result<Vec<Value>, StepError> {
        let reader = scratch.join("reader");
        let into = reader.clone();
        tokio::task::spawn_blocking(move || write_reader(&into, &manifests))
            .await
            .unwrap_or_else(|e| Err(unusable(&reader, &std::io::Error::other(e))))?;
        let said = helm
            .call([
                OsString::from("template"),
                "reader".into(),
                reader.into_os_string(),
            ])
            .await?;
        if !said.worked {
            return Err(not_rendered(&said));
        }
        let text = String::from_utf8_lossy(&said.output);
        let lines = text.lines().map(str::trim);
        let lines = lines.filter(|line| line.starts_with(['{', '[', '"']));
        lines
            .map(|line| {
                serde_json::from_str(line).map_err(|e| {
                    StepError::fatal(
                        "chart_invalid",
                        format!("what the chart makes cannot be read: {e}"),
                        "mend the chart, or change `run.chart_values` of the service",
                    )
                })
            })
            .collect()
    }
}

/// Writes a chart that has the documents of these manifests in it.
fn write_reader(reader: &Path, manifests: &[u8]) -> Result<(), StepError> {
    let documents = split(manifests);
    // Each is a file, and comes to an object that is bounded like that in any case.
    if documents.len() > objects::OBJECTS_MAX {
        return Err(too_large(&format!(
            "{} objects, of at most {}",
            documents.len(),
            objects::OBJECTS_MAX
        )));
    }
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(reader.join("templates"))?;
        std::fs::create_dir_all(reader.join("documents"))?;
        std::fs::write(reader.join("Chart.yaml"), READER_CHART)?;
        std::fs::write(reader.join("templates/all.yaml"), READER)?;
        for (number, document) in documents.iter().enumerate() {
            std::fs::write(reader.join(format!("documents/{number:05}")), document)?;
        }
        Ok(())
    };
    write().map_err(|e| unusable(reader, &e))
}

/// A chart that says what the documents in it are, a line each.
const READER_CHART: &str = "apiVersion: v2\nname: reader\nversion: 0.1.0\n";
const READER: &str = "\
{{- range $path, $_ := .Files.Glob \"documents/*\" }}
---
{{ $.Files.Get $path | fromYaml | toJson }}
{{- end }}
";

#[async_trait]
impl Charts for HelmCharts {
    fn run_on(&self, cluster: &ClusterName) -> bool {
        !self.options.never_on.contains(cluster)
    }

    async fn pin(
        &self,
        chart: &ChartReference,
        version: &ChartVersion,
        expected: Option<&Digest>,
    ) -> Result<PinnedChart, StepError> {
        let noted = self.noted(chart, version);
        let known = expected.or(noted.as_ref());
        let digest = match known.filter(|known| self.has(known)) {
            Some(known) => known.clone(),
            None => self.fetch(chart, version, known).await?,
        };
        Ok(PinnedChart {
            chart: chart.clone(),
            version: version.clone(),
            digest,
        })
    }

    async fn render(
        &self,
        chart: &PinnedChart,
        release: &ChartRelease<'_>,
    ) -> Result<Vec<Value>, StepError> {
        if !self.has(&chart.digest) {
            self.fetch(&chart.chart, &chart.version, Some(&chart.digest))
                .await?;
        }
        let scratch = self.scratch()?;
        let helm = self.helm(scratch.path()).await?;
        let values = scratch.path().join("values.json");
        let given = given(release);
        std::fs::write(&values, given.to_string()).map_err(|e| unusable(&values, &e))?;
        let namespace = (self.options.namespace)(release.project, release.environment);
        let arguments: [OsString; 10] = [
            "template".into(),
            release.name().into(),
            self.archive(&chart.digest).into_os_string(),
            "--namespace".into(),
            namespace.clone().into(),
            "--values".into(),
            values.into_os_string(),
            // So that they can be refused.
            "--include-crds".into(),
            "--skip-tests".into(),
            // A schema refers to others, which may be anywhere.
            "--skip-schema-validation".into(),
        ];
        let said = helm.call(arguments).await?;
        if !said.worked {
            return Err(not_rendered(&said));
        }
        let documents = self.documents(&helm, scratch.path(), said.output).await?;
        objects::objects(documents, &namespace, chart, release)
    }
}

/// The arguments that fetch one version.
fn pull(chart: &ChartReference, version: &ChartVersion, into: &Path) -> Vec<OsString> {
    let text = chart.as_str();
    let mut arguments: Vec<OsString> = vec!["pull".into()];
    match text
        .rsplit_once('/')
        .filter(|_| text.starts_with("https://"))
    {
        Some((repository, name)) => {
            arguments.extend([name, "--repo", repository].map(OsString::from));
        }
        None => {
            arguments.push(text.into());
            if is_on_loopback(text) {
                arguments.push("--plain-http".into());
            }
        }
    }
    arguments.extend(["--version", version.as_str(), "--destination"].map(OsString::from));
    arguments.push(into.into());
    arguments
}

/// Whether a registry is on this machine, and so is spoken to without TLS, as for images.
fn is_on_loopback(reference: &str) -> bool {
    let (host, _) = host_of(reference);
    let address = host.parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// The host of a chart, with the port that it is asked at.
fn host_of(reference: &str) -> (&str, u16) {
    let rest = reference.split_once("://").map_or(reference, |(_, r)| r);
    let host = rest.split('/').next().unwrap_or_default();
    match host.rsplit_once(':') {
        Some((host, port)) => (host, port.parse().unwrap_or(443)),
        None => (host, 443),
    }
}

/// The file in a folder, if it has one and no more.
fn only_file(folder: &Path) -> Option<PathBuf> {
    let mut entries = std::fs::read_dir(folder).ok()?;
    let first = entries.next()?.ok()?.path();
    entries.next().is_none().then_some(first)
}

/// Refuses an archive of another version: what is asked for is one version, and to Helm a constraint.
async fn check_version(
    helm: &Helm,
    archive: &Path,
    chart: &ChartReference,
    version: &ChartVersion,
) -> Result<(), StepError> {
    let said = helm
        .call([OsString::from("show"), "chart".into(), archive.into()])
        .await?;
    if !said.worked {
        return Err(not_rendered(&said));
    }
    let text = String::from_utf8_lossy(&said.output);
    let about: Value = serde_saphyr::from_str(&text).map_err(|_| {
        StepError::fatal(
            "chart_invalid",
            format!("the Chart.yaml of {chart}:{version} cannot be read"),
            "deploy another version of the chart",
        )
    })?;
    let found = about["version"].as_str().unwrap_or_default();
    let plain = |version: &str| version.trim_start_matches('v').to_owned();
    if plain(found) == plain(version.as_str()) {
        return Ok(());
    }
    Err(StepError::fatal(
        "chart_not_found",
        format!("{chart} has no version {version}: Helm found {found:?} instead"),
        "name a version that the chart has (helm search repo --versions, or helm show chart)",
    ))
}

/// What a chart is rendered with.
fn given(release: &ChartRelease<'_>) -> Value {
    let name = release.name();
    let mut values = release
        .values
        .map(|values| values.to_map())
        .unwrap_or_default();
    for value in values.values_mut() {
        name_release(value, &name);
    }
    let about = json!({
        "project": release.project,
        "environment": release.environment,
        "service": release.service,
        "deployment": release.deployment,
        "release": name,
    });
    let global = values.entry("global").or_insert_with(|| json!({}));
    if let Some(global) = global.as_object_mut() {
        global.insert("daybook".to_owned(), about);
    }
    Value::Object(values)
}

/// Puts the release's name where it is asked for.
fn name_release(value: &mut Value, name: &str) {
    match value {
        Value::String(text) if text.contains(RELEASE_VARIABLE) => {
            *text = text.replace(RELEASE_VARIABLE, name);
        }
        Value::Array(list) => list.iter_mut().for_each(|value| name_release(value, name)),
        Value::Object(map) => map.values_mut().for_each(|value| name_release(value, name)),
        _ => {}
    }
}

/// The documents of a stream of YAML. What begins one stands at the beginning of a line, where
/// nothing that belongs to an object can stand.
fn split(manifests: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(manifests);
    let mut documents = vec![String::new()];
    for line in text.lines() {
        if line.trim_end() == "---" {
            documents.push(String::new());
        } else if let Some(document) = documents.last_mut() {
            document.push_str(line);
            document.push('\n');
        }
    }
    documents.retain(|document| {
        let mut lines = document.lines().map(str::trim);
        lines.any(|line| !line.is_empty() && !line.starts_with('#'))
    });
    documents
}

fn unusable(path: &Path, error: &std::io::Error) -> StepError {
    StepError::passing(
        "charts_unusable",
        format!("{} cannot be used: {error}", path.display()),
        "check the folder `charts` in the data folder, and the space that is left",
    )
}

fn changed(
    chart: &ChartReference,
    version: &ChartVersion,
    expected: &Digest,
    found: &Digest,
) -> StepError {
    StepError::fatal(
        "chart_changed",
        format!(
            "{chart}:{version} is another archive now: it was {expected}, and {found} is what its \
             repository has"
        ),
        "ask whoever publishes the chart what has changed, and deploy another version of it",
    )
}

/// Why a chart is not fetched from where it is, or from where that leads.
fn not_allowed(chart: &ChartReference, version: &ChartVersion, why: &TransportError) -> StepError {
    if why.is_retryable() {
        return StepError::passing(
            "chart_unreachable",
            format!("{chart}:{version} cannot be fetched: {why}"),
            "check that the chart's repository answers where Daybook's workers run",
        );
    }
    let why = match why {
        TransportError::NotAllowed { what, .. } => format!("its repository leads to {what}"),
        other => other.to_string(),
    };
    StepError::fatal(
        "chart_address_refused",
        format!("{chart}:{version} is not fetched: {why}"),
        "publish the chart in a repository that is on https at a public address with all that it leads to; \
         where everybody who may deploy may also reach what Daybook's workers do, start Daybook with \
         --allow-local-sources true",
    )
}

fn not_fetched(chart: &ChartReference, version: &ChartVersion, said: &Said) -> StepError {
    let why = &said.complaint;
    let lower = why.to_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    let message = format!("{chart}:{version} cannot be fetched: {why}");
    if says(&["unauthorized", "forbidden", "denied"]) {
        return StepError::fatal(
            "chart_denied",
            message,
            "log in to the registry as the user that Daybook's workers run as (helm registry login)",
        );
    }
    if says(&[
        "not found",
        "no chart version",
        "no chart name",
        "improper constraint",
    ]) {
        return StepError::fatal(
            "chart_not_found",
            message,
            "check the chart and its version (helm show chart)",
        );
    }
    StepError::passing(
        "chart_unreachable",
        message,
        "check that the chart's repository answers where Daybook's workers run",
    )
}

fn not_rendered(said: &Said) -> StepError {
    StepError::fatal(
        "chart_render_failed",
        format!("the chart cannot be rendered: {}", said.complaint),
        "give it what it asks for in `run.chart_values` of the service (helm show values)",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_fetched_from_where_the_chart_is() {
        let pull = |chart: &str| {
            let (chart, version) = (chart.parse().unwrap(), "1.4.2".parse().unwrap());
            let arguments = pull(&chart, &version, Path::new("/x"));
            let arguments = arguments.iter().map(|a| a.to_str().unwrap().to_owned());
            arguments.collect::<Vec<_>>().join(" ")
        };
        let end = "--version 1.4.2 --destination /x";
        assert_eq!(
            pull("https://charts.example.com/stable/web"),
            format!("pull web --repo https://charts.example.com/stable {end}")
        );
        assert_eq!(
            pull("oci://registry.example.com/charts/web"),
            format!("pull oci://registry.example.com/charts/web {end}")
        );
        for here in [
            "oci://localhost:5000/web",
            "oci://127.0.0.1:5000/charts/web",
        ] {
            assert_eq!(pull(here), format!("pull {here} --plain-http {end}"));
        }
    }

    #[tokio::test]
    async fn charts_come_from_public_addresses_unless_others_are_allowed() {
        let folder = tempfile::tempdir().unwrap();
        let charts = HelmCharts::new(HelmOptions {
            program: None,
            folder: folder.path().to_owned(),
            never_on: BTreeSet::new(),
            namespace: |_, _| String::new(),
            policy: SourcePolicy::default(),
        });
        let version = "1.4.2".parse().unwrap();
        for chart in [
            "https://169.254.169.254/latest/web",
            "https://localhost/web",
            "oci://127.0.0.1:5000/charts/web",
            "oci://10.0.0.1/charts/web",
        ] {
            let refused = charts.egress(&chart.parse().unwrap(), &version).await;
            let refused = refused.err().unwrap();
            assert_eq!(refused.code, "chart_address_refused", "{chart}");
            assert!(!refused.retryable && refused.remedy.contains("--allow-local-sources"));
        }
        let chart = "oci://93.184.215.14/charts/web".parse().unwrap();
        assert!(charts.egress(&chart, &version).await.unwrap().is_some());
    }

    #[test]
    fn too_many_documents_are_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let reader = folder.path().join("reader");
        let manifests = "---\na: 1\n".repeat(objects::OBJECTS_MAX + 1);
        let error = write_reader(&reader, manifests.as_bytes()).unwrap_err();
        assert_eq!(error.code, "chart_too_large");
        assert!(!reader.exists());
    }

    #[test]
    fn documents_are_told_apart_at_the_beginning_of_a_line() {
        let text = "---\n# Source: a\na: |\n  x\n  ---\n  y\n---\n# nothing\n---   \nb: 1\n";
        assert_eq!(
            split(text.as_bytes()),
            ["# Source: a\na: |\n  x\n  ---\n  y\n", "b: 1\n"]
        );
        assert!(split(b"").is_empty());
    }

    #[test]
    fn the_name_of_the_release_is_put_in_where_it_is_asked_for() {
        let mut value = json!({
            "auth": { "existingSecret": "$(DAYBOOK_RELEASE)" },
            "args": ["--name=$(DAYBOOK_RELEASE)-x", 1, null],
        });
        name_release(&mut value, "api-1");
        let named =
            json!({ "auth": { "existingSecret": "api-1" }, "args": ["--name=api-1-x", 1, null] });
        assert_eq!(value, named);
    }
}
