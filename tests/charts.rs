//! Helm charts as versions: taken, kept and shown as what they are; not rendered by clusters that
//! run images.

use serde_json::json;

use crate::support::{Server, Settings, application};

const CHART: &str = "https://charts.example.com/stable/web";
const INSTANCE: &str = "shop.production.web";

#[test]
fn a_chart_is_a_version_that_local_clusters_refuse() {
    let server = Server::start(Settings::default());
    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    let live = server.deploy(INSTANCE, &[]);

    let flags = ["--chart", CHART, "--chart-version", "1.4.2"];
    let done = server.cli(&[&["deploy", INSTANCE][..], &flags].concat());
    assert_eq!(done.code, 6, "{done:?}");
    assert!(
        done.stdout.contains("local-a cannot render charts"),
        "{done:?}"
    );
    assert!(done.stdout.contains("deploy an image"), "{done:?}");

    let id = server.begin(INSTANCE, &flags);
    assert_eq!(server.wait_for_failure(&id), "charts_not_supported");
    let text = format!("{CHART}:1.4.2");
    let detail = server.deployment(&id);
    assert_eq!(detail["version"], text.as_str());
    let typed = json!({ "helm": { "chart": CHART, "version": "1.4.2" } });
    assert_eq!(detail["snapshot"]["version"], typed);
    assert_eq!(server.history(&id)["version"], text.as_str());
    assert!(
        server
            .ok(&["history", "--project", "shop"])
            .stdout
            .contains(&text)
    );
    let list = server.read(&format!("/api/v1/deployments?version={CHART}:1.4.2"));
    assert_eq!(list["deployments"].as_array().unwrap().len(), 2);
    // Its chart is what is deployed once more.
    let again = server.json(&["redeploy", &id, "--detach"])["id"].clone();
    let again = again.as_str().unwrap();
    assert_eq!(server.wait_for_failure(again), "charts_not_supported");
    assert_eq!(server.deployment(again)["snapshot"]["version"], typed);

    // What is no chart, or no version of one, leaves nothing behind.
    let events = server.events().len();
    for (chart, version, code, said) in [
        (
            "http://charts.example.com/web",
            "1.4.2",
            "invalid_chart",
            "must begin with https",
        ),
        (
            "https://ada:canary@example.com/web",
            "1.4.2",
            "invalid_chart",
            "credentials",
        ),
        (CHART, "^1.4", "invalid_chart_version", "one exact version"),
    ] {
        let flags = ["--chart", chart, "--chart-version", version];
        let done = server.cli(&[&["deploy", INSTANCE][..], &flags].concat());
        assert_eq!(done.code, 2);
        assert!(done.stderr.contains(said), "{done:?}");
        assert!(!done.stderr.contains("canary"), "{done:?}");
        let body = json!({ "instance_id": INSTANCE, "chart": chart, "chart_version": version });
        let answer = server.post("/api/v1/deployments", &body, None);
        assert_eq!(answer.json()["code"], code, "{answer:?}");
    }
    assert_eq!(server.cli(&["deploy", INSTANCE, "--chart", CHART]).code, 2);
    for (body, code) in [
        (json!({ "chart": CHART }), "chart_incomplete"),
        (json!({ "chart_version": "1.4.2" }), "chart_incomplete"),
        (
            json!({ "chart": CHART, "chart_version": "1.4.2", "git_ref": "main" }),
            "version_ambiguous",
        ),
    ] {
        let mut body = body;
        body["instance_id"] = INSTANCE.into();
        let answer = server.post("/api/v1/deployments", &body, None);
        assert!((400..500).contains(&answer.status), "{answer:?}");
        assert_eq!(answer.json()["code"], code);
    }
    assert_eq!(server.events().len(), events);
    assert_eq!(server.deployment(&live)["main"], true);
    server.check_replay();
}
