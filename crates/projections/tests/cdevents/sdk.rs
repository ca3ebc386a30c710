//! The SDK of CDEvents: what the project that writes the specification made of its published schemas.
//! It is compiled into the tests, so there is no machine on which it does not judge.
//!
//! It knows the types of 0.5.1 with their members, which of them must be there and what may stand in
//! them. It takes any `links` and any `specversion`; those are looked at by the tests' schemas.

use cdevents_sdk::CDEvent;
use serde_json::Value;

/// Whether the SDK reads a CDEvent, and finds in it all that stands there; else what it says of it.
pub(crate) fn takes(cdevent: &Value) -> Result<(), String> {
    let kind = &cdevent["context"]["type"];
    let about = |what: String| format!("{kind}: {what}: {cdevent:#}");
    let read: CDEvent =
        serde_json::from_value(cdevent.clone()).map_err(|e| about(e.to_string()))?;
    let mut written = serde_json::to_value(&read).map_err(|e| about(e.to_string()))?;
    // It writes another form of the same time.
    let time = read.timestamp().unix_timestamp_nanos();
    let stamped: jiff::Timestamp = serde_json::from_value(cdevent["context"]["timestamp"].clone())
        .map_err(|e| about(e.to_string()))?;
    if stamped.as_nanosecond() != time {
        return Err(about(format!("it reads the time {}", read.timestamp())));
    }
    written["context"]["timestamp"] = cdevent["context"]["timestamp"].clone();
    if written == *cdevent {
        Ok(())
    } else {
        Err(about(format!("it reads no more than {written:#}")))
    }
}
