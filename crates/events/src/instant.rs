//! Times in states. JSON has the usual text of a time; rows, which nobody reads, have its seconds
//! and nanoseconds, so that a state with twenty times in it is written without spelling them out.

use jiff::Timestamp;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

struct Instant(Timestamp);

impl Serialize for Instant {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            return self.0.serialize(serializer);
        }
        (self.0.as_second(), self.0.subsec_nanosecond()).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Instant {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        if input.is_human_readable() {
            return Timestamp::deserialize(input).map(Self);
        }
        let (seconds, nanoseconds) = Deserialize::deserialize(input)?;
        Timestamp::new(seconds, nanoseconds)
            .map(Self)
            .map_err(D::Error::custom)
    }
}

pub(crate) fn serialize<S: Serializer>(at: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    Instant(*at).serialize(serializer)
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Timestamp, D::Error> {
    Instant::deserialize(input).map(|instant| instant.0)
}

/// A time that there may be none of.
pub(crate) mod option {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(
        at: &Option<Timestamp>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        at.map(Instant).serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        input: D,
    ) -> Result<Option<Timestamp>, D::Error> {
        Ok(Option::<Instant>::deserialize(input)?.map(|instant| instant.0))
    }
}

/// Times by what happened then.
pub(crate) mod values {
    use std::collections::BTreeMap;

    use super::*;

    pub(crate) fn serialize<K: Serialize, S: Serializer>(
        times: &BTreeMap<K, Timestamp>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(times.iter().map(|(what, at)| (what, Instant(*at))))
    }

    pub(crate) fn deserialize<'de, K, D>(input: D) -> Result<BTreeMap<K, Timestamp>, D::Error>
    where
        K: Deserialize<'de> + Ord,
        D: Deserializer<'de>,
    {
        let times = BTreeMap::<K, Instant>::deserialize(input)?.into_iter();
        Ok(times.map(|(what, instant)| (what, instant.0)).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Times {
        #[serde(with = "super")]
        one: Timestamp,
        #[serde(with = "super::option")]
        perhaps: Option<Timestamp>,
        #[serde(with = "super::values")]
        many: BTreeMap<u8, Timestamp>,
    }

    #[test]
    fn times_are_text_in_json_and_numbers_in_rows() {
        let coding = bincode::config::standard();
        for nanoseconds in [i64::from(i32::MIN), -1, 0, 1, 1_750_000_000_123_456_789] {
            let one = Timestamp::from_nanosecond(i128::from(nanoseconds)).unwrap();
            for perhaps in [None, Some(one)] {
                let many = BTreeMap::from([(1, one), (2, Timestamp::MAX)]);
                let times = Times { one, perhaps, many };
                let json = serde_json::to_string(&times).unwrap();
                assert!(json.contains(&format!("\"one\":\"{one}\"")), "{json}");
                assert_eq!(serde_json::from_str::<Times>(&json).unwrap(), times);
                let row = bincode::serde::encode_to_vec(&times, coding).unwrap();
                assert!(row.len() < json.len() / 2);
                let read: (Times, usize) = bincode::serde::decode_from_slice(&row, coding).unwrap();
                assert_eq!(read, (times, row.len()));
            }
        }
    }

    #[test]
    fn a_number_that_is_no_time_is_refused() {
        let coding = bincode::config::standard();
        let row = bincode::serde::encode_to_vec((i64::MAX, 0), coding).unwrap();
        assert!(bincode::serde::decode_from_slice::<Instant, _>(&row, coding).is_err());
    }
}
