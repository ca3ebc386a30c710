//! The values files of a GitOps repository: what the package worker writes and a target reads.
//!
//! `environments/<env>/values.yaml` is the whole desired state of an environment. Targets read it
//! at a commit, as Argo CD would, and converge to it.
//!
//! The repository's chart depends on the chart [`CHART`], and Helm hands a dependency what stands
//! under its name. So all of it stands there, beside the labels of everything that is made of it:
//!
//! ```yaml
//! daybook-app:
//!   environment: production
//!   ephemeral: false
//!   labels:
//!     daybook.dev/environment: production
//!     daybook.dev/ephemeral: "false"
//!     daybook.dev/project: shop
//!   project: shop
//!   services: {}
//! ```
//!
//! Keys are sorted, so that the same values always have the same bytes. Whatever somebody wrote
//! beside what Daybook knows is kept when Daybook writes the file again, comments included.

mod comments;

use std::collections::BTreeMap;

use daybook_events::chart::PinnedChart;
use daybook_events::secret::SecretRef;
use daybook_events::spec::{PinnedImage, RunSpec};
use daybook_events::{
    ClusterName, DeploymentId, EnvKey, EnvironmentName, ProjectName, ServiceName,
};
use serde::ser::{SerializeMap as _, SerializeSeq as _};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

/// The chart that a project's chart depends on, and the key that its values stand under.
pub const CHART: &str = "daybook-app";

/// What a values file begins with.
const HEADER: &str = "# Written by Daybook. Changes by hand are kept.\n";

/// The largest values file that is read, in bytes.
pub const MAX_VALUES_BYTES: usize = 4 << 20;

/// One environment's values file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvironmentValues {
    /// The project.
    pub project: ProjectName,
    /// The environment.
    pub environment: EnvironmentName,
    /// Whether the environment goes away with its pull request.
    #[serde(default)]
    pub ephemeral: bool,
    /// Its services.
    #[serde(default)]
    pub services: BTreeMap<ServiceName, ServiceValues>,
}

/// One service of an environment.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ServiceValues {
    /// The image that was deployed last; a promotion copies it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<PinnedImage>,
    /// All releases that exist side by side, by deployment.
    #[serde(default)]
    pub releases: BTreeMap<DeploymentId, ReleaseValues>,
    /// Those of Helm charts.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub charts: BTreeMap<DeploymentId, RenderedChart>,
}

impl ServiceValues {
    /// Whether a deployment has a release, of an image or of a chart.
    pub fn lists(&self, deployment: &DeploymentId) -> bool {
        self.releases.contains_key(deployment) || self.charts.contains_key(deployment)
    }

    /// Whether there are no releases.
    pub fn is_bare(&self) -> bool {
        self.releases.is_empty() && self.charts.is_empty()
    }
}

/// One release of a Helm chart: what one deployment of it runs, word for word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenderedChart {
    /// What it was rendered from.
    pub chart: PinnedChart,
    /// Where it runs: a cluster that is not listed leaves it alone.
    pub clusters: Vec<ClusterName>,
    /// The secrets that stand in the release's own Secret, by key: references, never values.
    #[serde(
        rename = "secretEnv",
        default,
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub secret_env: BTreeMap<EnvKey, SecretRef>,
    /// Whether none of its workloads is to have instances.
    #[serde(default)]
    pub stopped: bool,
    /// Its objects, as [`crate::charts::objects::objects`] made them: without a namespace.
    pub objects: Vec<Value>,
}

/// One release: what one deployment runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseValues {
    /// What it runs.
    pub image: PinnedImage,
    /// Where it runs: a cluster that is not listed leaves it alone.
    pub clusters: Vec<ClusterName>,
    /// The secrets that it gets in its environment, by variable: references, never values. A chart
    /// makes a `secretKeyRef` of each.
    #[serde(
        rename = "secretEnv",
        default,
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub secret_env: BTreeMap<EnvKey, SecretRef>,
    /// How it runs. `replicas: 0` is a stopped release.
    #[serde(flatten)]
    pub run: RunSpec,
}

/// A values file that cannot be read, or values that cannot be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidValues(pub String);

/// The file, as far as it is Daybook's.
#[derive(Deserialize)]
struct ValuesFile {
    #[serde(rename = "daybook-app")]
    app: EnvironmentValues,
}

impl EnvironmentValues {
    /// An environment without services.
    pub fn new(project: ProjectName, environment: EnvironmentName, ephemeral: bool) -> Self {
        Self {
            project,
            environment,
            ephemeral,
            services: BTreeMap::new(),
        }
    }

    /// The labels of everything that belongs to the environment.
    pub fn labels(&self) -> BTreeMap<String, String> {
        [
            ("project", self.project.to_string()),
            ("environment", self.environment.to_string()),
            ("ephemeral", self.ephemeral.to_string()),
        ]
        .into_iter()
        .map(|(key, value)| (format!("daybook.dev/{key}"), value))
        .collect()
    }

    /// Reads a values file.
    pub fn from_yaml(text: &str) -> Result<Self, InvalidValues> {
        check_size(text)?;
        let file: ValuesFile =
            serde_saphyr::from_str(text).map_err(|e| InvalidValues(first_line(&e)))?;
        Ok(file.app)
    }

    /// The values file, the same bytes for the same values.
    pub fn to_yaml(&self) -> Result<String, InvalidValues> {
        write(&self.document()?)
    }

    /// The values file that takes the place of `previous`, which holds `before`, with what others
    /// wrote there: keys that Daybook does not know, in places that still exist, and comments with
    /// their keys.
    pub fn to_yaml_over(&self, previous: &str, before: &Self) -> Result<String, InvalidValues> {
        let known = before.document()?;
        if write(&known)? == previous {
            return self.to_yaml();
        }
        let whole: Value =
            serde_saphyr::from_str(previous).map_err(|e| InvalidValues(first_line(&e)))?;
        let mut document = self.document()?;
        keep_foreign(&mut document, &whole, &known);
        let text = comments::carry_over(previous, write(&document)?);
        check_size(&text)?;
        Ok(text)
    }

    fn document(&self) -> Result<Value, InvalidValues> {
        let invalid = |e: serde_json::Error| InvalidValues(e.to_string());
        let mut app = serde_json::to_value(self).map_err(invalid)?;
        app["labels"] = serde_json::to_value(self.labels()).map_err(invalid)?;
        Ok(serde_json::json!({ CHART: app }))
    }
}

/// Copies from `whole` what `known` does not have, wherever all three have a map.
fn keep_foreign(new: &mut Value, whole: &Value, known: &Value) {
    let (Value::Object(new), Value::Object(whole), Value::Object(known)) = (new, whole, known)
    else {
        return;
    };
    for (key, value) in whole {
        match (new.get_mut(key), known.get(key)) {
            (None, None) => {
                new.insert(key.clone(), value.clone());
            }
            (Some(new), Some(known)) => keep_foreign(new, value, known),
            // Removed now, or new now.
            (None, Some(_)) | (Some(_), None) => {}
        }
    }
}

fn write(document: &Value) -> Result<String, InvalidValues> {
    // Block scalars are nicer to read and full of traps; quotes are exact.
    let options = serde_saphyr::ser_options! { prefer_block_scalars: false };
    let body = serde_saphyr::to_string_with_options(&Sorted(document), options)
        .map_err(|e| InvalidValues(e.to_string()))?;
    let text = format!("{HEADER}{body}");
    check_size(&text)?;
    Ok(text)
}

fn check_size(text: &str) -> Result<(), InvalidValues> {
    if text.len() > MAX_VALUES_BYTES {
        return Err(InvalidValues(format!(
            "a values file has at most {MAX_VALUES_BYTES} bytes, this one {}",
            text.len()
        )));
    }
    Ok(())
}

/// What is wrong and where, without the excerpt of the file, which may hold anything.
fn first_line(error: &serde_saphyr::Error) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().to_owned()
}

/// A document with the keys of its maps in order, whatever order they were made in.
struct Sorted<'a>(&'a Value);

impl Serialize for Sorted<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Value::Object(map) => {
                let sorted: BTreeMap<_, _> = map.iter().collect();
                let mut out = serializer.serialize_map(Some(sorted.len()))?;
                for (key, value) in sorted {
                    out.serialize_entry(key, &Sorted(value))?;
                }
                out.end()
            }
            Value::Array(items) => {
                let mut out = serializer.serialize_seq(Some(items.len()))?;
                for item in items {
                    out.serialize_element(&Sorted(item))?;
                }
                out.end()
            }
            other => other.serialize(serializer),
        }
    }
}

#[cfg(test)]
mod tests {
    use daybook_events::resources::{Amounts, Quantity, Resources};
    use daybook_events::secret::{Commitment, SecretScope};
    use daybook_events::spec::{Autoscaling, HealthSpec, VolumeSpec};
    use daybook_events::{Digest, ImageRepository, ImageTag, VolumeName};
    use proptest::prelude::*;

    use super::*;

    /// Texts that YAML takes for something else as soon as they are not quoted.
    fn nasty() -> impl Strategy<Value = String> {
        prop_oneof![
            any::<String>(),
            "[ -~]{0,200}",
            "[\\x00-\\x20:#'\"\\\\|>-]{0,12}",
            prop::sample::select(vec![
                "",
                "~",
                "null",
                "yes",
                "no",
                "on",
                "off",
                "true",
                "0",
                "007",
                "0x1f",
                "0o7",
                "1e3",
                "1_000",
                ".inf",
                ".nan",
                "-",
                "---",
                "...",
                "- a",
                "a: b",
                "# no",
                "!!int",
                "&a",
                "*a",
                "<<",
                "=",
                "2024-01-01",
                "12:30:45",
                "%YAML",
                "@x",
                "`x`",
                "{a: b}",
                "[a]",
                "a\nb",
                "a\n",
                "\n\na",
                " a ",
                "\ta",
                "a\r\nb",
                "\u{85}",
                "\u{feff}",
                "\u{2028}",
                "\0",
                "\u{1f600}",
                "|",
                ">",
                "? a",
                "é",
            ])
            .prop_map(str::to_owned),
        ]
    }

    fn resources() -> impl Strategy<Value = Resources> {
        let quantity = prop_oneof![nasty(), "[0-9]{1,4}(\\.[0-9])?(m|Mi|Gi|M)?"];
        let quantity = prop::option::of(quantity.prop_map(|text| Quantity::new(&text)));
        let amounts = || {
            (quantity.clone(), quantity.clone()).prop_map(|(cpu, memory)| Amounts { cpu, memory })
        };
        (amounts(), amounts()).prop_map(|(requests, limits)| Resources { requests, limits })
    }

    fn run() -> impl Strategy<Value = RunSpec> {
        let env = prop::collection::btree_map(
            "[A-Z_][A-Z0-9_]{0,8}|y|n|no|null|true".prop_map(|k| EnvKey::parse(k).unwrap()),
            nasty(),
            0..6,
        );
        let command = prop::collection::vec(nasty(), 0..4);
        let volume = (nasty(), prop::option::of(nasty()), any::<bool>());
        let volume = volume.prop_map(|(path, text, many_nodes)| VolumeSpec {
            path,
            env: None,
            size: text.as_deref().map(Quantity::new),
            storage_class: text,
            many_nodes,
        });
        let volumes = prop::collection::btree_map(
            "[a-z]([a-z-]{0,4}[a-z])?|no|on".prop_map(|n| VolumeName::parse(n).unwrap()),
            volume,
            0..3,
        );
        let autoscaling = (any::<u32>(), any::<u32>());
        let autoscaling =
            autoscaling.prop_map(|(max, cpu_percent)| Autoscaling { max, cpu_percent });
        (
            any::<u16>(),
            command,
            env,
            any::<u32>(),
            nasty(),
            any::<u32>(),
            (resources(), prop::option::of(autoscaling), volumes),
        )
            .prop_map(
                |(port, command, env, replicas, path, deadline_seconds, capacity)| {
                    let (resources, autoscaling, volumes) = capacity;
                    RunSpec {
                        port,
                        command,
                        env,
                        replicas,
                        health: HealthSpec {
                            path,
                            deadline_seconds,
                        },
                        volumes,
                        resources,
                        autoscaling,
                        chart_values: None,
                    }
                },
            )
    }

    fn image() -> impl Strategy<Value = PinnedImage> {
        (
            "[0-9]{7}|[0-9]{2}e[0-9]{3}|[a-f0-9]{7}|v1\\.[0-9]",
            any::<[u8; 32]>(),
        )
            .prop_map(|(tag, hash)| PinnedImage {
                repository: ImageRepository::parse("localhost:5000/shop/api").unwrap(),
                tag: ImageTag::parse(tag).unwrap(),
                digest: Digest::from_sha256(&hash),
            })
    }

    fn name() -> impl Strategy<Value = String> {
        "[a-z]([a-z0-9-]{0,10}[a-z0-9])?|y|n|no|on|off|null|true|e1".prop_map(String::from)
    }

    prop_compose! {
        fn secret()(name in "[A-Z_][A-Z0-9_]{0,8}|y|no", version in 1..u32::MAX, scoped in any::<bool>())
            -> (EnvKey, SecretRef)
        {
            let secret = EnvKey::parse(name).unwrap();
            let scope = SecretScope {
                environment: scoped.then(|| EnvironmentName::parse("no").unwrap()),
                service: None,
            };
            let commitment = Commitment::from_hmac(&[7; 32]);
            (secret.clone(), SecretRef { secret, scope, version, commitment })
        }
    }

    prop_compose! {
        fn release()(
            image in image(),
            run in run(),
            clusters in prop::collection::vec(name(), 0..3),
            secrets in prop::collection::vec(secret(), 0..3),
        ) -> ReleaseValues {
            ReleaseValues {
                secret_env: secrets.into_iter().collect(),
                image,
                clusters: clusters.into_iter().map(|c| ClusterName::parse(c).unwrap()).collect(),
                run,
            }
        }
    }

    /// What may stand in an object.
    fn object() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            nasty().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<bool>().prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(
                    "[a-zA-Z0-9][a-zA-Z0-9_./-]{0,11}|on|null|0644",
                    inner,
                    0..4
                )
                .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    prop_compose! {
        fn rendered()(
            version in 0..9_u8,
            clusters in prop::collection::vec(name(), 0..3),
            stopped in any::<bool>(),
            objects in prop::collection::vec(object(), 0..4),
        ) -> RenderedChart {
            RenderedChart {
                chart: PinnedChart {
                    chart: "https://charts.example.com/on/no".parse().unwrap(),
                    version: format!("1.{version}.0").parse().unwrap(),
                    digest: Digest::of(&[version]),
                },
                clusters: clusters.into_iter().map(|c| ClusterName::parse(c).unwrap()).collect(),
                secret_env: BTreeMap::new(),
                stopped,
                objects,
            }
        }
    }

    fn values() -> impl Strategy<Value = EnvironmentValues> {
        let releases = prop::collection::btree_map(
            any::<u128>().prop_map(|u| DeploymentId(uuid::Uuid::from_u128(u))),
            release(),
            0..3,
        );
        let charts = prop::collection::btree_map(
            any::<u128>().prop_map(|u| DeploymentId(uuid::Uuid::from_u128(u))),
            rendered(),
            0..3,
        );
        let service = (prop::option::of(image()), releases, charts);
        let service = service.prop_map(|(image, releases, charts)| ServiceValues {
            image,
            releases,
            charts,
        });
        let services = prop::collection::btree_map(
            name().prop_map(|n| ServiceName::parse(n).unwrap()),
            service,
            0..3,
        );
        (name(), name(), any::<bool>(), services).prop_map(
            |(project, environment, ephemeral, services)| EnvironmentValues {
                project: ProjectName::parse(project).unwrap(),
                environment: EnvironmentName::parse(environment).unwrap(),
                ephemeral,
                services,
            },
        )
    }

    proptest! {
        #[test]
        fn values_survive_their_file(values in values()) {
            let text = values.to_yaml().unwrap();
            prop_assert_eq!(&EnvironmentValues::from_yaml(&text).unwrap(), &values, "{}", text);
            // Writing over a file that nobody touched changes nothing.
            prop_assert_eq!(values.to_yaml_over(&text, &values).unwrap(), text);
        }

        #[test]
        fn what_others_wrote_survives_a_change(before in values(), after in values(), note in nasty()) {
            let mut document = before.document().unwrap();
            document["global"] = serde_json::json!({ "note": note });
            document[CHART]["nodeSelector"] = serde_json::json!({ "disk": "ssd" });
            document[CHART]["labels"]["team"] = "payments".into();
            let text = write(&document).unwrap();
            let written = after.to_yaml_over(&text, &before).unwrap();
            prop_assert_eq!(EnvironmentValues::from_yaml(&written).unwrap(), after);
            let read: Value = serde_saphyr::from_str(&written).unwrap();
            prop_assert_eq!(&read["global"]["note"], &Value::from(note));
            prop_assert_eq!(&read[CHART]["nodeSelector"]["disk"], "ssd");
            prop_assert_eq!(&read[CHART]["labels"]["team"], "payments");
        }

        #[test]
        fn any_text_is_read_or_refused(text in any::<String>()) {
            let _ = EnvironmentValues::from_yaml(&text);
        }
    }

    fn example() -> EnvironmentValues {
        EnvironmentValues::new(
            ProjectName::parse("shop").unwrap(),
            EnvironmentName::parse("production").unwrap(),
            false,
        )
    }

    #[test]
    fn the_file_has_the_labels_and_stands_under_the_chart() {
        assert_eq!(
            example().to_yaml().unwrap(),
            "# Written by Daybook. Changes by hand are kept.\n\
             daybook-app:\n  environment: production\n  ephemeral: false\n  labels:\n    \
             daybook.dev/environment: production\n    daybook.dev/ephemeral: \"false\"\n    \
             daybook.dev/project: shop\n  project: shop\n  services: {}\n"
        );
    }

    #[test]
    fn files_that_would_exhaust_the_reader_are_refused() {
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for i in 1..30 {
            let item = format!("*a{}", i - 1);
            bomb += &format!("a{i}: &a{i} [{}]\n", vec![item; 10].join(", "));
        }
        assert!(EnvironmentValues::from_yaml(&bomb).is_err());
        assert!(EnvironmentValues::from_yaml(&"[".repeat(100_000)).is_err());
        assert!(EnvironmentValues::from_yaml(&" ".repeat(MAX_VALUES_BYTES + 1)).is_err());
        let text = example().to_yaml().unwrap();
        assert!(
            example()
                .to_yaml_over(&format!("{text}{bomb}"), &example())
                .is_err()
        );
    }
}
