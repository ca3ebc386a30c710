//! What an instance is given of a machine: amounts of cpu and memory, as Kubernetes writes them.

use std::fmt;

use schemars::JsonSchema;
use serde::ser::SerializeStruct as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::aggregate::Refusal;
use crate::names::Text;

/// The most cpu that can be asked for, in thousandths: 1024 cores.
const CPU_MAX: u128 = 1_024_000;
/// The least memory that can be asked for, in bytes. Less than that is a forgotten unit.
const MEMORY_MIN: u128 = 1_000_000;
/// The most memory that can be asked for, in bytes: 64 TiB.
const MEMORY_MAX: u128 = 64 << 40;
/// The most characters of a quantity.
const LENGTH_MAX: usize = 40;

const DECIMAL: [&str; 8] = ["m", "", "k", "M", "G", "T", "P", "E"];
const BINARY: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

/// An amount, as Kubernetes writes them: `250m`, `1.5`, `512Mi`.
///
/// One that can be read is kept in the form that an API server keeps (`0.5` is `500m`, `1024Mi` is
/// `1Gi`), so that two that are the same are equal. What cannot be read is kept as it was written:
/// [`Resources::check`] refuses it, and says why.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Quantity(Text);

impl Quantity {
    /// An amount, whatever it is.
    pub fn new(text: &str) -> Self {
        match read(text) {
            Some((thousandths, is_binary)) => Self(written(thousandths, is_binary)),
            None => Self(text.into()),
        }
    }

    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// How much it is, in thousandths; none if it cannot be read.
    fn thousandths(&self) -> Option<u128> {
        read(&self.0).map(|(thousandths, _)| thousandths)
    }

    /// How much it is as an amount of memory or storage, in bytes; none if it is none.
    pub fn bytes(&self) -> Option<u64> {
        let thousandths = self.thousandths().filter(|n| n % 1000 == 0)?;
        let bytes = thousandths / 1000;
        let fits = (MEMORY_MIN..=MEMORY_MAX).contains(&bytes);
        u64::try_from(bytes).ok().filter(|_| fits)
    }

    /// How much it is as an amount of cpu, in thousandths of a core; none if it is none.
    fn cpu(&self) -> Option<u128> {
        let fits = |n: &u128| (1..=CPU_MAX).contains(n);
        self.thousandths().filter(fits)
    }

    /// Whether both can be read, and this is the larger one, whatever they are amounts of.
    pub fn exceeds(&self, other: &Self) -> bool {
        let both = self.thousandths().zip(other.thousandths());
        both.is_some_and(|(this, other)| this > other)
    }

    /// Cut, where it may be anything.
    pub(crate) fn shown(&self) -> String {
        self.0.chars().take(LENGTH_MAX).collect()
    }
}

/// An amount in thousandths, and whether its unit is a power of 1024; none if it is none.
fn read(text: &str) -> Option<(u128, bool)> {
    if text.len() > LENGTH_MAX {
        return None;
    }
    let is_unit = |c: char| c.is_ascii_alphabetic();
    let (number, unit) = text.split_at(text.find(is_unit).unwrap_or(text.len()));
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(fraction) {
        return None;
    }
    // In thousandths.
    let (factor, is_binary) = match DECIMAL.iter().position(|known| *known == unit) {
        Some(n) => (1000_u128.pow(u32::try_from(n).ok()?), false),
        None => {
            let n = BINARY.iter().position(|known| *known == unit)?;
            (1000 << (10 * n), true)
        }
    };
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    let tenths = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let thousandths = digits.checked_mul(factor)?;
    // Less than a thousandth is nothing that anybody could be given.
    (thousandths % tenths == 0).then_some((thousandths / tenths, is_binary))
}

/// The form that an API server keeps: the largest unit that leaves a whole number.
fn written(thousandths: u128, is_binary: bool) -> Text {
    let is_whole = thousandths.is_multiple_of(1000);
    let (mut number, units, step): (_, &[&str], _) =
        if is_binary && is_whole && thousandths >= 1_024_000 {
            (thousandths / 1000, &BINARY, 1024)
        } else {
            (thousandths, &DECIMAL, 1000)
        };
    if number == 0 {
        return "0".into();
    }
    let mut unit = 0;
    while number.is_multiple_of(step) && unit + 1 < units.len() {
        number /= step;
        unit += 1;
    }
    format!("{number}{}", units[unit]).into()
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl Serialize for Quantity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// Numbers are taken as well where a format has them: people write `cpu: 2`.
impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            deserializer.deserialize_any(Written)
        } else {
            deserializer.deserialize_str(Written)
        }
    }
}

struct Written;

impl serde::de::Visitor<'_> for Written {
    type Value = Quantity;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a quantity such as \"250m\", \"2\" or \"512Mi\"")
    }
    fn visit_str<E>(self, text: &str) -> Result<Quantity, E> {
        Ok(Quantity::new(text))
    }
    fn visit_u64<E>(self, number: u64) -> Result<Quantity, E> {
        Ok(Quantity::new(&number.to_string()))
    }
    fn visit_i64<E>(self, number: i64) -> Result<Quantity, E> {
        Ok(Quantity::new(&number.to_string()))
    }
    fn visit_f64<E>(self, number: f64) -> Result<Quantity, E> {
        Ok(Quantity::new(&number.to_string()))
    }
}

impl JsonSchema for Quantity {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Quantity".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "pattern": "^[0-9]+(\\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$",
            "maxLength": LENGTH_MAX,
            "description": "An amount, as Kubernetes writes them: 250m, 1.5, 512Mi",
        })
    }
}

/// An amount of each resource.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Amounts {
    /// Of cpu, in cores: `250m` is a quarter of one.
    #[serde(default)]
    pub cpu: Option<Quantity>,
    /// Of memory, in bytes: `512Mi`.
    #[serde(default)]
    pub memory: Option<Quantity>,
}

/// As derived, but that JSON leaves out what is not given: it is what a chart copies into a pod.
impl Serialize for Amounts {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let all = !serializer.is_human_readable();
        let fields = [("cpu", &self.cpu), ("memory", &self.memory)];
        let written = fields.iter().filter(|(_, amount)| all || amount.is_some());
        let mut out = serializer.serialize_struct("Amounts", written.clone().count())?;
        for (name, amount) in written {
            out.serialize_field(name, amount)?;
        }
        out.end()
    }
}

impl Amounts {
    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        self.cpu.is_none() && self.memory.is_none()
    }

    /// Says otherwise what `other` says.
    fn set(&mut self, other: Self) {
        self.cpu = other.cpu.or(self.cpu.take());
        self.memory = other.memory.or(self.memory.take());
    }
}

/// What each instance is given of cpu and memory. Kubernetes sees to it; local clusters do not.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Resources {
    /// What a node has to have free for an instance, and keeps for it.
    #[serde(default)]
    pub requests: Amounts,
    /// What an instance gets at most: more cpu is not given, more memory ends it.
    #[serde(default)]
    pub limits: Amounts,
}

/// As derived, but that JSON leaves out what is not given.
impl Serialize for Resources {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let all = !serializer.is_human_readable();
        let fields = [("requests", &self.requests), ("limits", &self.limits)];
        let written = fields.iter().filter(|(_, of)| all || !of.is_empty());
        let mut out = serializer.serialize_struct("Resources", written.clone().count())?;
        for (name, amounts) in written {
            out.serialize_field(name, amounts)?;
        }
        out.end()
    }
}

impl Resources {
    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty() && self.limits.is_empty()
    }

    /// Says otherwise what `other` says.
    pub fn set(&mut self, other: Self) {
        self.requests.set(other.requests);
        self.limits.set(other.limits);
    }

    /// All amounts that are given, by name.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &Quantity)> {
        [
            ("requests.cpu", &self.requests.cpu),
            ("requests.memory", &self.requests.memory),
            ("limits.cpu", &self.limits.cpu),
            ("limits.memory", &self.limits.memory),
        ]
        .into_iter()
        .filter_map(|(name, amount)| Some((name, amount.as_ref()?)))
    }

    /// Refuses what no cluster could give.
    pub fn check(&self) -> Result<(), Refusal> {
        for (name, amount) in self.named() {
            let (known, rule) = if name.ends_with("cpu") {
                let rule = "give cores, from 1m (a thousandth) to 1024, such as 250m, 0.5 or 2";
                (amount.cpu().is_some(), rule)
            } else {
                let rule = "give whole bytes with a unit, from 1M to 64Ti, such as 512Mi or 2Gi";
                (amount.bytes().is_some(), rule)
            };
            if !known {
                return Err(Refusal::new(
                    "invalid_quantity",
                    format!("{:?} is no amount for {name}", amount.shown()),
                    rule,
                ));
            }
        }
        let exceeds = |of: fn(&Amounts) -> &Option<Quantity>| {
            let (least, most) = (of(&self.requests).as_ref()?, of(&self.limits).as_ref()?);
            (least.thousandths() > most.thousandths()).then_some((least, most))
        };
        let cpu = exceeds(|a| &a.cpu).map(|found| ("cpu", found));
        let found = cpu.or_else(|| Some(("memory", exceeds(|a| &a.memory)?)));
        match found {
            None => Ok(()),
            Some((name, (least, most))) => Err(Refusal::new(
                "request_above_limit",
                format!("{least} of {name} are requested, and the limit is {most}"),
                "request as much as the limit at most, or leave one of them out",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn amounts_are_kept_in_the_form_of_an_api_server() {
        for (written, kept) in [
            ("0.5", "500m"),
            ("1000m", "1"),
            ("2", "2"),
            ("2.0", "2"),
            ("2000", "2k"),
            ("1.5Gi", "1536Mi"),
            ("1024Mi", "1Gi"),
            ("1000Mi", "1000Mi"),
            ("512Mi", "512Mi"),
            ("0.5Ki", "512"),
            ("1000M", "1G"),
            ("128974848", "128974848"),
            ("0", "0"),
        ] {
            assert_eq!(Quantity::new(written).as_str(), kept, "{written}");
        }
        for wrong in [
            "", ".5", "5.", "1.5.2", "-1", "+1", "1 Gi", "1gi", "1K", "1e3", "0.0001", "1Gi ",
            "ten",
        ] {
            assert_eq!(Quantity::new(wrong).as_str(), wrong);
            assert_eq!(Quantity::new(wrong).thousandths(), None, "{wrong}");
        }
        let long = "9".repeat(400);
        assert_eq!(Quantity::new(&long).thousandths(), None);
        assert_eq!(Quantity::new(&long).shown().len(), LENGTH_MAX);
    }

    #[test]
    fn only_what_can_be_read_exceeds_anything() {
        let exceeds = |this, other| Quantity::new(this).exceeds(&Quantity::new(other));
        assert!(exceeds("1536Mi", "1Gi"));
        assert!(exceeds("1Gi", "1G"));
        assert!(!exceeds("1Gi", "1024Mi"));
        // More than anybody could ask for here.
        assert!(!exceeds("1Gi", "100Ti"));
        // As API servers may keep it, and nothing at all.
        for unread in ["5e9", ""] {
            assert!(
                !exceeds("1Gi", unread) && !exceeds(unread, "1Gi"),
                "{unread}"
            );
        }
    }

    fn resources(json: &str) -> Resources {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn what_no_cluster_could_give_is_refused() {
        for (json, code) in [
            (r#"{"requests":{"cpu":"much"}}"#, "invalid_quantity"),
            (r#"{"requests":{"cpu":"512Mi"}}"#, "invalid_quantity"),
            (r#"{"limits":{"cpu":0}}"#, "invalid_quantity"),
            (r#"{"limits":{"memory":"512"}}"#, "invalid_quantity"),
            (r#"{"limits":{"memory":"512m"}}"#, "invalid_quantity"),
            (r#"{"limits":{"memory":-1}}"#, "invalid_quantity"),
            (
                r#"{"requests":{"cpu":2},"limits":{"cpu":"1500m"}}"#,
                "request_above_limit",
            ),
            (
                r#"{"requests":{"memory":"1Gi"},"limits":{"memory":"1G"}}"#,
                "request_above_limit",
            ),
        ] {
            let refused = resources(json).check().unwrap_err();
            assert_eq!(refused.code, code, "{json}");
            assert!(!refused.remedy.is_empty());
        }
        let whole = resources(
            r#"{"requests":{"cpu":0.25,"memory":"256Mi"},"limits":{"cpu":1,"memory":"0.5Gi"}}"#,
        );
        whole.check().unwrap();
        assert_eq!(
            serde_json::to_string(&whole).unwrap(),
            r#"{"requests":{"cpu":"250m","memory":"256Mi"},"limits":{"cpu":"1","memory":"512Mi"}}"#
        );
        let mut other = resources(r#"{"limits":{"cpu":"2"}}"#);
        assert_eq!(
            serde_json::to_string(&other).unwrap(),
            r#"{"limits":{"cpu":"2"}}"#
        );
        other.check().unwrap();
        other.set(resources(r#"{"requests":{"cpu":"1"}}"#));
        let named: Vec<_> = other.named().map(|(n, q)| format!("{n} {q}")).collect();
        assert_eq!(named, ["requests.cpu 1", "limits.cpu 2"]);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_kept(text in any::<String>()) {
            let quantity = Quantity::new(&text);
            prop_assert_eq!(&Quantity::new(quantity.as_str()), &quantity);
        }

        #[test]
        fn the_form_does_not_change_the_amount(
            whole in 0_u64..1 << 40, fraction in prop::option::of("[0-9]{1,6}"),
            unit in prop::sample::select([&DECIMAL[..], &BINARY[..]].concat()),
        ) {
            let fraction = fraction.map_or_else(String::new, |f| format!(".{f}"));
            let text = format!("{whole}{fraction}{unit}");
            let amount = read(&text).map(|(thousandths, _)| thousandths);
            let kept = Quantity::new(&text);
            prop_assert_eq!(kept.thousandths(), amount, "{} as {}", text, kept);
        }
    }
}
