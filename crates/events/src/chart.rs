//! Helm charts: their versions as they are asked for, as they are pinned, and what they are
//! rendered with.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::aggregate::Refusal;
use crate::names::{Digest, validated};

validated! {
    /// A Helm chart in its repository: `https://host[:port]/path/name` or
    /// `oci://host[:port]/path/name`, without credentials.
    ChartReference, "chart", "invalid_chart",
    pattern = "^(https|oci)://[^/@?#%\\\\\\s]+(/[^/@?#%\\\\\\s]+)*/[a-z0-9][a-z0-9._-]*$", |s| {
        if s.len() > 255 {
            return Err("at most 255 characters are allowed");
        }
        let Some(rest) = s.strip_prefix("https://").or_else(|| s.strip_prefix("oci://")) else {
            return Err("it must begin with https:// or oci://");
        };
        if rest.contains('@') {
            return Err("credentials do not belong here");
        }
        if rest.chars().any(|c| c.is_whitespace() || c.is_control() || "?#%\\".contains(c)) {
            return Err("white space, control characters and ? # % \\ are not allowed");
        }
        let mut parts = rest.split('/');
        if !parts.next().is_some_and(is_host) {
            return Err("it must name a host, with a port or without");
        }
        let Some(name) = parts.next_back() else {
            return Err("it must end with the name of a chart");
        };
        if parts.any(|p| p.is_empty() || p == "." || p == "..") {
            return Err("no part of it may be empty, `.` or `..`");
        }
        let starts = name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
        if !starts || !name.bytes().all(fits) {
            return Err("a chart's name has lowercase letters, digits, hyphens, dots and underscores");
        }
        Ok(())
    }
}

validated! {
    /// The version of a Helm chart: one exact version as Semantic Versioning 2 has it, with or
    /// without a `v` before it as Helm takes it, and no range.
    ChartVersion, "chart version", "invalid_chart_version",
    pattern = "^v?(0|[1-9][0-9]*)\\.(0|[1-9][0-9]*)\\.(0|[1-9][0-9]*)(-[0-9A-Za-z.-]+)?(\\+[0-9A-Za-z.-]+)?$", |s| {
        if s.len() > 128 {
            return Err("at most 128 characters are allowed");
        }
        let text = s.strip_prefix('v').unwrap_or(s);
        let (text, build) = text.split_once('+').map_or((text, None), |(t, b)| (t, Some(b)));
        let (core, pre) = text.split_once('-').map_or((text, None), |(c, p)| (c, Some(p)));
        let number = |p: &str| {
            let digits = !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit());
            digits && (p.len() == 1 || !p.starts_with('0'))
        };
        if core.split('.').count() != 3 || !core.split('.').all(number) {
            return Err("it must be one exact version, such as 1.2.3");
        }
        let word = |p: &str| !p.is_empty() && p.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        let leading = |p: &str| p.len() > 1 && p.starts_with('0') && p.bytes().all(|b| b.is_ascii_digit());
        if pre.is_some_and(|pre| pre.split('.').any(leading)) {
            return Err("numbers of a pre-release have no leading zeros");
        }
        let words = |part: Option<&str>| part.is_none_or(|p| p.split('.').all(word));
        if !words(pre) || !words(build) {
            return Err("what follows - and + must be letters, digits and hyphens between dots");
        }
        Ok(())
    }
}

/// Whether a text is a host's name or address, with a port or without.
fn is_host(text: &str) -> bool {
    let (host, port) = text
        .split_once(':')
        .map_or((text, None), |(h, p)| (h, Some(p)));
    let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'.' || b == b'-';
    let begins = host.starts_with(|c: char| c.is_ascii_alphanumeric());
    begins && host.bytes().all(fits) && port.is_none_or(|p| p.parse::<u16>().is_ok_and(|p| p > 0))
}

/// A chart that is pinned: what a deployment is rendered from, by digest from here on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PinnedChart {
    /// The chart in its repository.
    pub chart: ChartReference,
    /// Its version.
    pub version: ChartVersion,
    /// SHA-256 of its archive. In an OCI registry this is the digest of the layer that is the chart.
    pub digest: Digest,
}

impl fmt::Display for PinnedChart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}@{}", self.chart, self.version, self.digest)
    }
}

/// The largest values of a chart, as JSON, in bytes: events that have them have other things, too, and a
/// bound.
const VALUES_MAX: usize = 32 << 10;
/// How deep values may be nested.
const DEPTH_MAX: usize = 32;

/// What a chart is rendered with where it is to be otherwise than its own values say: a JSON object.
///
/// It is kept as text, with the keys of its maps in order: the same values are the same bytes, also
/// in rows of projections, which are not self-describing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChartValues(String);

impl ChartValues {
    /// These values.
    pub fn new(values: &Map<String, Value>) -> Self {
        // A map of `serde_json` is in the order of its keys.
        let text = serde_json::to_string(values);
        Self(text.unwrap_or_else(|_| "{}".to_owned()))
    }

    /// The values.
    pub fn to_map(&self) -> Map<String, Value> {
        serde_json::from_str(&self.0).unwrap_or_default()
    }

    /// The values as JSON text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Refuses what is too large or too deep.
    pub fn check(&self) -> Result<(), Refusal> {
        if self.0.len() > VALUES_MAX {
            return Err(Refusal::new(
                "invalid_chart_values",
                format!("{} bytes of values are too many for a chart", self.0.len()),
                format!("give {VALUES_MAX} bytes at most; a chart has defaults of its own"),
            ));
        }
        if self
            .to_map()
            .values()
            .any(|value| is_deeper(value, DEPTH_MAX))
        {
            return Err(Refusal::new(
                "invalid_chart_values",
                "the values of the chart are nested too deeply",
                format!("nest them {DEPTH_MAX} levels at most"),
            ));
        }
        Ok(())
    }
}

/// Whether a value has more levels than these.
fn is_deeper(value: &Value, levels: usize) -> bool {
    let Some(below) = levels.checked_sub(1) else {
        return true;
    };
    match value {
        Value::Object(map) => map.values().any(|value| is_deeper(value, below)),
        Value::Array(list) => list.iter().any(|value| is_deeper(value, below)),
        _ => false,
    }
}

impl Serialize for ChartValues {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match serializer.is_human_readable() {
            true => self.to_map().serialize(serializer),
            false => self.0.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for ChartValues {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match deserializer.is_human_readable() {
            true => Map::deserialize(deserializer).map(|values| Self::new(&values)),
            false => String::deserialize(deserializer).map(Self),
        }
    }
}

impl JsonSchema for ChartValues {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ChartValues".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "object",
            "description": "What a chart is rendered with where its own values are to be otherwise",
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn values(value: Value) -> ChartValues {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn the_same_values_are_the_same_bytes_however_they_are_written() {
        let one = values(json!({ "b": { "y": 1, "x": [true, null] }, "a": 0.5 }));
        let other: ChartValues =
            serde_json::from_str(r#"{"a":0.5, "b":{"x":[true,null],"y":1}}"#).unwrap();
        assert_eq!(one, other);
        assert_eq!(one.as_str(), r#"{"a":0.5,"b":{"x":[true,null],"y":1}}"#);
        assert_eq!(serde_json::to_string(&one).unwrap(), one.as_str());
        // Rows are not self-describing.
        let row = bincode::serde::encode_to_vec(&one, bincode::config::standard()).unwrap();
        let read = bincode::serde::decode_from_slice(&row, bincode::config::standard());
        let (read, length): (ChartValues, usize) = read.unwrap();
        assert_eq!((read, length), (one, row.len()));
    }

    #[test]
    fn values_are_an_object_of_a_size() {
        assert!(serde_json::from_value::<ChartValues>(json!([1])).is_err());
        assert!(serde_json::from_value::<ChartValues>(json!("text")).is_err());
        values(json!({})).check().unwrap();
        let large = values(json!({ "x": "x".repeat(VALUES_MAX) }));
        assert_eq!(large.check().unwrap_err().code, "invalid_chart_values");
        let deep = |levels| (0..levels).fold(json!(1), |inner, _| json!([inner]));
        values(json!({ "x": deep(DEPTH_MAX - 1) })).check().unwrap();
        let error = values(json!({ "x": deep(DEPTH_MAX) })).check().unwrap_err();
        assert_eq!(error.code, "invalid_chart_values");
    }
}
