//! The commands of a client, in text and in JSON.

use crate::support::{Server, Settings, application, replace_flags};

#[test]
fn a_deployment_is_followed_until_it_is_live_and_replaced_by_the_next() {
    let server = Server::start(Settings::default());
    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    let done = server.ok(&["deploy", "shop.production.web"]);
    assert!(done.stdout.contains("it is live"), "{done:?}");
    let first = server.get("web.shop.localhost", "/");
    assert_eq!(first.body, "one");
    replace_flags(&source, "--text two");
    let second = server.deploy("shop.production.web", &[]);
    let answer = server.get_from("web.shop.localhost", "/", &second);
    assert_eq!(answer.body, "two");
    server.check_replay();
}
