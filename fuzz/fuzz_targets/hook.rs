//! What providers send to webhooks: whatever it is, it is read or refused, and nothing panics.
#![no_main]

use daybook_events::hook::delivery::parse;
use daybook_events::hook::{Provider, repository_key};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let body = &bytes[bytes.len().min(1)..];
    let provider = match bytes.first().map(|b| b % 3) {
        Some(0) => Provider::Github,
        Some(1) => Provider::Gitlab,
        _ => Provider::Gitea,
    };
    for event in ["pull_request", "push", "ping", "Merge Request Hook", "Push Hook"] {
        let _ = parse(provider, event, body);
    }
    if let Ok(text) = std::str::from_utf8(body) {
        let key = repository_key(text);
        let _ = repository_key(&key);
    }
});
