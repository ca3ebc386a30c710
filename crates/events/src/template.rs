//! Templates: entries of a catalogue, from which services are made.
//!
//! A template is a service's definition with parameters: `${name}` stands in its texts for the value
//! of one. It is resolved first, with what a caller gives, to an ordinary definition, and what it was
//! resolved to is what is recorded, beside where it came from. From there on nothing is special
//! about the service, and nothing that is recorded needs the catalogue.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::aggregate::Refusal;
use crate::chart::ChartValues;
use crate::names::{
    Digest, EnvKey, ImageRepository, ParameterName, ServiceName, TemplateName, TemplateVersion,
    VolumeName,
};
use crate::resources::Resources;
use crate::spec::{
    Autoscaling, BuildSpec, HealthSpec, ImageReference, RunSpec, ServiceSpec, VolumeSpec,
};

/// The most characters that a parameter's value has.
const VALUE_MAX: usize = 1000;

/// An entry of a catalogue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// Its name.
    pub name: TemplateName,
    /// Its version.
    pub version: TemplateVersion,
    /// What it makes, in a sentence.
    pub description: String,
    /// What a caller can say.
    #[serde(default)]
    pub parameters: BTreeMap<ParameterName, Parameter>,
    /// The secrets that the service gets in its environment, by variable. Their values go to the
    /// secret store, and nowhere else.
    #[serde(default)]
    pub secrets: BTreeMap<EnvKey, SecretTemplate>,
    /// The service.
    pub service: ServiceTemplate,
}

/// Something that a caller can say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Parameter {
    /// What it is, in a sentence.
    pub description: String,
    /// Its value where the caller says nothing; it has to be given if there is none.
    #[serde(default)]
    pub default: Option<String>,
}

/// A secret that a service needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SecretTemplate {
    /// What it is, in a sentence.
    pub description: String,
    /// How many random letters and digits it is made of where it is not set yet, 16 to 128; it has to
    /// be set by `daybook secret set` before if not given.
    #[serde(default)]
    pub generate: Option<u32>,
}

/// A service with parameters in its texts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServiceTemplate {
    /// Where its source is. Either this or `image` is given.
    #[serde(default)]
    pub source: Option<SourceTemplate>,
    /// The image that it runs: `repository[:tag][@digest]`.
    #[serde(default)]
    pub image: Option<String>,
    /// How it is built.
    #[serde(default)]
    pub build: BuildSpec,
    /// How it runs.
    #[serde(default)]
    pub run: RunTemplate,
}

/// Where the source of a service is, with parameters in its texts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceTemplate {
    /// The repository.
    pub url: String,
    /// What is deployed when a request names no ref.
    #[serde(default = "head")]
    pub default_ref: String,
    /// Folder of the service within the repository.
    #[serde(default)]
    pub path: String,
}

fn head() -> String {
    "HEAD".to_owned()
}

/// How a service runs, with parameters in its texts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RunTemplate {
    /// The port that the container listens on.
    pub port: u16,
    /// The command, if not the image's own.
    pub command: Vec<String>,
    /// Environment variables.
    pub env: BTreeMap<EnvKey, String>,
    /// How many instances run in each cluster.
    pub replicas: u32,
    /// How readiness is asked.
    pub health: HealthSpec,
    /// What is kept from one deployment to the next.
    pub volumes: BTreeMap<VolumeName, VolumeSpec>,
    /// What each instance is given of cpu and memory.
    #[serde(skip_serializing_if = "Resources::is_empty")]
    pub resources: Resources,
    /// How instances come and go by themselves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,
    /// What a Helm chart is rendered with, where one is deployed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chart_values: Option<ChartValues>,
}

impl Default for RunTemplate {
    fn default() -> Self {
        let RunSpec {
            port,
            command,
            env,
            replicas,
            health,
            volumes,
            resources,
            autoscaling,
            chart_values,
        } = RunSpec::default();
        Self {
            port,
            command,
            env,
            replicas,
            health,
            volumes,
            resources,
            autoscaling,
            chart_values,
        }
    }
}

/// Where a definition came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TemplateRef {
    /// The template's name.
    pub name: TemplateName,
    /// Its version.
    pub version: TemplateVersion,
    /// SHA-256 of its JSON, keys in order, no white space.
    pub digest: Digest,
}

/// A service was added, or its definition replaced, from an entry of a catalogue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TemplateResolved {
    /// The service's name.
    pub name: ServiceName,
    /// The entry.
    pub template: TemplateRef,
    /// What was said, and what was left to the entry.
    pub parameters: BTreeMap<ParameterName, String>,
    /// The whole definition that came of it.
    pub spec: ServiceSpec,
    /// The image that it runs, if it has no source.
    pub image: Option<ImageReference>,
    /// The variables whose values are in the secret store.
    pub secrets: BTreeSet<EnvKey>,
}

/// What is known of the template of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TemplateOrigin {
    /// The entry.
    pub template: TemplateRef,
    /// What was said, and what was left to the entry.
    pub parameters: BTreeMap<ParameterName, String>,
    /// The image that it runs, if it has no source.
    pub image: Option<ImageReference>,
    /// The variables whose values are in the secret store.
    pub secrets: BTreeSet<EnvKey>,
}

impl TemplateResolved {
    /// Where the definition came from.
    pub fn origin(&self) -> TemplateOrigin {
        TemplateOrigin {
            template: self.template.clone(),
            parameters: self.parameters.clone(),
            image: self.image.clone(),
            secrets: self.secrets.clone(),
        }
    }
}

impl Template {
    /// The digest that names exactly this entry.
    pub fn digest(&self) -> Digest {
        // A map of `serde_json` is in the order of its keys.
        let value = serde_json::to_value(self).unwrap_or_default();
        Digest::of(value.to_string().as_bytes())
    }

    /// Refuses an entry that nobody could use.
    pub fn check(&self) -> Result<(), Refusal> {
        let service = &self.service;
        if service.source.is_some() == service.image.is_some() {
            return Err(invalid("it needs a source or an image, and not both"));
        }
        let lengths = self.secrets.values().filter_map(|s| s.generate);
        if let Some(length) = lengths.into_iter().find(|n| !(16..=128).contains(n)) {
            return Err(invalid(format!("a secret of {length} characters")));
        }
        for key in self.secrets.keys() {
            crate::secret::check_name(key)?;
            if service.run.env.contains_key(key) {
                return Err(invalid(format!("{key} is a variable and a secret")));
            }
        }
        let known = |name: &str| self.parameters.keys().any(|known| known.as_str() == name);
        let mut texts = serde_json::to_value(service).unwrap_or_default();
        substitute(&mut texts, &|name| match known(name) {
            true => Ok(String::new()),
            false => Err(invalid(format!("{name:?} is no parameter of it"))),
        })
    }

    /// Resolves it to the definition of a service, with what a caller says.
    pub fn resolve(
        &self,
        service: ServiceName,
        given: &BTreeMap<ParameterName, String>,
    ) -> Result<TemplateResolved, Refusal> {
        self.check()?;
        let values = self.values(given)?;
        let mut resolved = serde_json::to_value(&self.service).unwrap_or_default();
        substitute(&mut resolved, &|name| {
            let found = values.iter().find(|(known, _)| known.as_str() == name);
            Ok(found.map_or_else(String::new, |(_, value)| value.clone()))
        })?;
        let wrong = |e: serde_json::Error| {
            Refusal::new(
                "template_unresolvable",
                format!("{} makes no service of these values: {e}", self.name),
                "give other values; `daybook template show` says what they are",
            )
        };
        let image = match resolved.as_object_mut().and_then(|o| o.remove("image")) {
            Some(Value::String(image)) => {
                Some(serde_json::from_value(image.into()).map_err(wrong)?)
            }
            _ => None,
        };
        let mut spec: ServiceSpec = serde_json::from_value(resolved).map_err(wrong)?;
        spec.image_repository = image
            .as_ref()
            .map(|i: &ImageReference| -> ImageRepository { i.repository.clone() });
        Ok(TemplateResolved {
            name: service,
            template: TemplateRef {
                name: self.name.clone(),
                version: self.version.clone(),
                digest: self.digest(),
            },
            parameters: values,
            spec,
            image,
            secrets: self.secrets.keys().cloned().collect(),
        })
    }

    /// The value of every parameter.
    fn values(
        &self,
        given: &BTreeMap<ParameterName, String>,
    ) -> Result<BTreeMap<ParameterName, String>, Refusal> {
        let names = || {
            let names: Vec<_> = self.parameters.keys().map(ParameterName::as_str).collect();
            match names.is_empty() {
                true => "it has none".to_owned(),
                false => format!("it has: {}", names.join(", ")),
            }
        };
        for (name, value) in given {
            if !self.parameters.contains_key(name) {
                return Err(Refusal::new(
                    "unknown_parameter",
                    format!("{} has no parameter {name}", self.name),
                    names(),
                ));
            }
            if value.chars().count() > VALUE_MAX || value.chars().any(char::is_control) {
                return Err(Refusal::new(
                    "invalid_parameter",
                    format!("the value of {name} is too long or not printable"),
                    format!("give at most {VALUE_MAX} printable characters"),
                ));
            }
        }
        let value = |(name, parameter): (&ParameterName, &Parameter)| {
            let value = given.get(name).or(parameter.default.as_ref());
            let value = value.ok_or_else(|| {
                Refusal::new(
                    "parameter_missing",
                    format!("{name} is not given: {}", parameter.description),
                    format!("give it with `--set {name}=…`; {}", names()),
                )
            })?;
            Ok((name.clone(), value.clone()))
        };
        self.parameters.iter().map(value).collect()
    }
}

fn invalid(problem: impl std::fmt::Display) -> Refusal {
    Refusal::new(
        "invalid_template",
        format!("the template cannot be used: {problem}"),
        "`daybook schema template` prints the schema of templates",
    )
}

/// Puts values in the place of `${name}` in all texts; `$${` stands for `${`.
fn substitute(
    value: &mut Value,
    of: &impl Fn(&str) -> Result<String, Refusal>,
) -> Result<(), Refusal> {
    match value {
        Value::String(text) => *text = fill(text, of)?,
        Value::Array(all) => all.iter_mut().try_for_each(|v| substitute(v, of))?,
        Value::Object(all) => all.values_mut().try_for_each(|v| substitute(v, of))?,
        _ => {}
    }
    Ok(())
}

fn fill(text: &str, of: &impl Fn(&str) -> Result<String, Refusal>) -> Result<String, Refusal> {
    let mut filled = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        let (before, from) = rest.split_at(at);
        if let Some(before) = before.strip_suffix('$') {
            filled.push_str(before);
            filled.push_str("${");
            rest = &from[2..];
            continue;
        }
        let end = from
            .find('}')
            .ok_or_else(|| invalid(format!("{from:?} has no end")))?;
        filled.push_str(before);
        filled.push_str(&of(&from[2..end])?);
        rest = &from[end + 1..];
    }
    filled.push_str(rest);
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(service: Value) -> Template {
        serde_json::from_value(serde_json::json!({
            "name": "site",
            "version": "1.0.0",
            "description": "A site.",
            "parameters": {
                "repository": { "description": "Its repository." },
                "ref": { "description": "What is deployed.", "default": "main" },
            },
            "secrets": { "SESSION_KEY": { "description": "Signs sessions.", "generate": 32 } },
            "service": service,
        }))
        .unwrap()
    }

    fn site() -> Template {
        template(serde_json::json!({
            "source": { "url": "${repository}", "default_ref": "${ref}" },
            "run": {
                "env": { "TITLE": "$${ref} is ${ref}" },
                "volumes": { "data": { "path": "/data" } },
            },
        }))
    }

    fn given(values: &[(&str, &str)]) -> BTreeMap<ParameterName, String> {
        let one = |(k, v): &(&str, &str)| (k.parse().unwrap(), (*v).to_owned());
        values.iter().map(one).collect()
    }

    #[test]
    fn values_stand_where_their_names_stood() {
        let url = "https://git.example.com/site.git";
        let name: ServiceName = "web".parse().unwrap();
        let resolved = site()
            .resolve(name.clone(), &given(&[("repository", url)]))
            .unwrap();
        let source = resolved.spec.source.as_ref().unwrap();
        assert_eq!(
            (source.url.as_str(), source.default_ref.as_str()),
            (url, "main")
        );
        let env: Vec<_> = resolved.spec.run.env.values().cloned().collect();
        assert_eq!(env, ["${ref} is main"]);
        assert_eq!(resolved.spec.run.volumes.len(), 1);
        assert_eq!(resolved.parameters.len(), 2);
        assert_eq!(resolved.template.digest, site().digest());
        // The same, and nothing of a value is looked at again.
        let again = site().resolve(name.clone(), &given(&[("repository", url)]));
        assert_eq!(again.unwrap(), resolved);
        let nested = given(&[("repository", url), ("ref", "a${repository}")]);
        let nested = site().resolve(name, &nested).unwrap();
        let source = nested.spec.source.unwrap();
        assert_eq!(source.default_ref.as_str(), "a${repository}");
    }

    #[test]
    fn what_is_missing_unknown_or_wrong_is_refused_with_a_way_out() {
        let code = |values: &[(&str, &str)]| {
            let refused = site().resolve("web".parse().unwrap(), &given(values));
            let refused = refused.unwrap_err();
            assert!(!refused.remedy.is_empty());
            refused.code
        };
        assert_eq!(code(&[]), "parameter_missing");
        assert_eq!(code(&[("colour", "red")]), "unknown_parameter");
        assert_eq!(code(&[("repository", "a\nb")]), "invalid_parameter");
        assert_eq!(code(&[("repository", "no URL")]), "template_unresolvable");
    }

    #[test]
    fn an_entry_is_an_image_or_a_source_and_knows_its_parameters() {
        let image = template(serde_json::json!({ "image": "registry.example.com/site:${ref}" }));
        let resolved = image.resolve("web".parse().unwrap(), &given(&[("repository", "x")]));
        let image = resolved.unwrap().image.unwrap();
        assert_eq!(image.to_string(), "registry.example.com/site:main");
        for bad in [
            serde_json::json!({}),
            serde_json::json!({ "image": "a/b:c", "source": { "url": "https://a.example/b" } }),
            serde_json::json!({ "image": "a/b:${tag}" }),
            serde_json::json!({ "image": "a/b:${tag" }),
            serde_json::json!({ "image": "a/b:c", "run": { "env": { "SESSION_KEY": "x" } } }),
        ] {
            let refused = template(bad.clone()).check().unwrap_err();
            assert_eq!(refused.code, "invalid_template", "{bad}");
        }
    }
}
