//! JSON in one form only, so that equal documents have equal digests.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

/// The document without white space and with the keys of every object in order.
///
/// The types of `oci-spec` keep labels and annotations in hash maps, whose order differs from run
/// to run.
pub(crate) fn canonical_json(document: &impl Serialize) -> Result<Vec<u8>, serde_json::Error> {
    let value = serde_json::to_value(document)?;
    serde_json::to_vec(&Sorted(&value))
}

/// Serialises a value with sorted keys, whatever map type `serde_json` was built with.
struct Sorted<'a>(&'a Value);

impl Serialize for Sorted<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Value::Object(map) => {
                let sorted: BTreeMap<&str, Sorted<'_>> =
                    map.iter().map(|(k, v)| (k.as_str(), Sorted(v))).collect();
                sorted.serialize(serializer)
            }
            Value::Array(items) => serializer.collect_seq(items.iter().map(Sorted)),
            other => other.serialize(serializer),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn equal_maps_have_equal_bytes() {
        let keys: Vec<String> = (0..64).map(|i| format!("key{i}")).collect();
        let forward: HashMap<_, _> = keys.iter().map(|k| (k, 1)).collect();
        let backward: HashMap<_, _> = keys.iter().rev().map(|k| (k, 1)).collect();
        let bytes = canonical_json(&forward).unwrap();
        assert_eq!(bytes, canonical_json(&backward).unwrap());
        assert!(bytes.starts_with(br#"{"key0":1,"key1":1,"key10":1"#));
    }
}
