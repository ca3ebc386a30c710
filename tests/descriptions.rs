//! What a deployment says of its API, at an address that anybody may have written.

use std::io::ErrorKind;
use std::net::TcpListener;

use serde_json::Value;

use crate::support::{Server, Settings, application, replace_flags, until};

const INSTANCE: &str = "shop.production.web";

/// The largest document that is looked at, in bytes.
const MOST: usize = 1024 * 1024;

#[test]
fn a_description_is_read_up_to_a_size_and_never_from_elsewhere() {
    let server = Server::start(Settings::default());
    let title = |id: &str| server.deployment(id)["openapi"]["title"].clone();
    let is_found = |id: &str, said: &str| {
        until(&format!("the description of {said}"), || {
            (title(id) == said).then_some(())
        });
    };
    // Whoever is asked for one says so.
    let is_asked = |id: &str| {
        until("it is asked for its description", || {
            let said = server.ok(&["logs", id, "--type", "container"]).stdout;
            said.contains("asked for a description").then_some(())
        });
    };
    let source = application(&format!("--describe Largest --describe-bytes {MOST}"));
    server.define("shop", "web", &source, &[]);
    let largest = server.deploy(INSTANCE, &[]);
    is_found(&largest, "Largest");

    let more = MOST + 1;
    replace_flags(
        &source,
        &format!("--describe Larger --describe-bytes {more}"),
    );
    let larger = server.deploy(INSTANCE, &[]);
    is_asked(&larger);

    // Such as an address that only this machine reaches.
    let elsewhere = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    elsewhere.set_nonblocking(true).unwrap();
    let url = format!("http://{}/openapi.json", elsewhere.local_addr().unwrap());
    replace_flags(&source, &format!("--describe-at {url}"));
    let redirected = server.deploy(INSTANCE, &[]);
    is_asked(&redirected);

    // By then the others were looked at as well.
    replace_flags(&source, "--describe Last");
    let last = server.deploy(INSTANCE, &[]);
    is_found(&last, "Last");
    for id in [&larger, &redirected] {
        assert_eq!(server.deployment(id)["openapi"], Value::Null, "{id}");
    }
    let asked = elsewhere.accept().unwrap_err();
    assert_eq!(asked.kind(), ErrorKind::WouldBlock);
    server.check_replay();
}
