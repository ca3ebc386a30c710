//! Events, subjects and names as they come from a log that others may have written to.
#![no_main]

use daybook_events::access::AccessEvent;
use daybook_events::build::BuildEvent;
use daybook_events::deployment::DeploymentEvent;
use daybook_events::domain::DomainEvent;
use daybook_events::environment::EnvironmentEvent;
use daybook_events::gitops::GitopsEvent;
use daybook_events::ledger::LedgerEvent;
use daybook_events::project::ProjectEvent;
use daybook_events::routing::RoutingEvent;
use daybook_events::{Event, Subject};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(subject) = text.parse::<Subject>()
    {
        assert_eq!(subject.to_string(), text);
    }
    let Ok(event) = Event::from_bytes(data) else {
        return;
    };
    let _ = event.payload::<ProjectEvent>();
    let _ = event.payload::<EnvironmentEvent>();
    let _ = event.payload::<BuildEvent>();
    let _ = event.payload::<DeploymentEvent>();
    let _ = event.payload::<GitopsEvent>();
    let _ = event.payload::<RoutingEvent>();
    let _ = event.payload::<DomainEvent>();
    let _ = event.payload::<LedgerEvent>();
    let _ = event.payload::<AccessEvent>();
});
