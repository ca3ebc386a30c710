//! Where an object differs from what it is to be.

use serde_json::Value;

/// The fields that are asked for and are not so, as `.spec.template.spec.containers[web].image`.
///
/// What nobody asked for is no difference: defaults, what controllers fill in, and what somebody
/// else has set beside it. Values are never part of it.
pub fn differences(wanted: &Value, live: &Value) -> Vec<String> {
    let mut found = Vec::new();
    compare(wanted, Some(live), &mut String::new(), &mut found);
    found
}

fn compare(wanted: &Value, live: Option<&Value>, path: &mut String, found: &mut Vec<String>) {
    let length = path.len();
    match (wanted, live) {
        (Value::Object(wanted), Some(Value::Object(live))) => {
            for (key, value) in wanted {
                path.push('.');
                path.push_str(key);
                compare(value, live.get(key), path, found);
                path.truncate(length);
            }
        }
        (Value::Array(wanted), Some(Value::Array(live))) if has_names(wanted) => {
            for item in wanted {
                let name = name(item).unwrap_or_default();
                path.push_str(&format!("[{name}]"));
                let same = live.iter().find(|l| self::name(l) == Some(name));
                compare(item, same, path, found);
                path.truncate(length);
            }
        }
        (Value::Array(wanted), Some(Value::Array(live))) if wanted.len() == live.len() => {
            for (n, (item, live)) in wanted.iter().zip(live).enumerate() {
                path.push_str(&format!("[{n}]"));
                compare(item, Some(live), path, found);
                path.truncate(length);
            }
        }
        (wanted, Some(live)) if wanted == live => {}
        // An API server leaves out what is empty.
        (wanted, None) if is_empty(wanted) => {}
        _ => found.push(path.clone()),
    }
}

/// The fields that are there in what is asked for, and that nobody has asked for. A list with more
/// or fewer items than it is to have is one such field.
pub(crate) fn unasked(wanted: &Value, live: &Value) -> Vec<String> {
    let mut found = Vec::new();
    find_unasked(wanted, live, &mut String::new(), &mut found);
    found
}

fn find_unasked(wanted: &Value, live: &Value, path: &mut String, found: &mut Vec<String>) {
    let length = path.len();
    match (wanted, live) {
        (Value::Object(wanted), Value::Object(live)) => {
            for (key, value) in live {
                path.push('.');
                path.push_str(key);
                match wanted.get(key) {
                    Some(wanted) => find_unasked(wanted, value, path, found),
                    None if is_empty(value) => {}
                    None => found.push(path.clone()),
                }
                path.truncate(length);
            }
        }
        (Value::Array(wanted), Value::Array(live)) if wanted.len() != live.len() => {
            found.push(path.clone());
        }
        (Value::Array(wanted), Value::Array(live)) if has_names(wanted) => {
            for item in wanted {
                let name = name(item).unwrap_or_default();
                let Some(same) = live.iter().find(|l| self::name(l) == Some(name)) else {
                    continue;
                };
                path.push_str(&format!("[{name}]"));
                find_unasked(item, same, path, found);
                path.truncate(length);
            }
        }
        (Value::Array(wanted), Value::Array(live)) => {
            for (n, (item, live)) in wanted.iter().zip(live).enumerate() {
                path.push_str(&format!("[{n}]"));
                find_unasked(item, live, path, found);
                path.truncate(length);
            }
        }
        _ => {}
    }
}

fn name(item: &Value) -> Option<&str> {
    item.get("name")?.as_str()
}

/// Whether the items of a list are told apart by name, whatever their order.
fn has_names(items: &[Value]) -> bool {
    !items.is_empty() && items.iter().all(|item| name(item).is_some())
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_is_asked_for_is_compared() {
        let wanted = json!({ "spec": { "replicas": 2, "paused": "", "containers": [
            { "name": "web", "image": "a", "command": ["x", "y"], "env": [] },
            { "name": "helper", "image": "b" },
        ]}});
        let mut live = json!({ "status": {}, "spec": {
            "replicas": 2,
            "revisionHistoryLimit": 10,
            "containers": [
                { "name": "injected", "image": "z" },
                { "name": "helper", "image": "b", "imagePullPolicy": "IfNotPresent" },
                { "name": "web", "image": "a", "command": ["x", "y"] },
            ],
        }});
        assert_eq!(differences(&wanted, &live), Vec::<String>::new());
        live["spec"]["replicas"] = json!(5);
        live["spec"]["containers"][2]["image"] = json!("c");
        live["spec"]["containers"][2]["command"] = json!(["x"]);
        live["spec"]["containers"][1]["name"] = json!("other");
        let mut found = differences(&wanted, &live);
        found.sort();
        let expected = [
            ".spec.containers[helper]",
            ".spec.containers[web].command",
            ".spec.containers[web].image",
            ".spec.replicas",
        ];
        assert_eq!(found, expected);
        assert_eq!(differences(&json!({ "a": 1 }), &json!({})), [".a"]);
    }
}
