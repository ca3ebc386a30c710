//! The measures of delivery: the server and an auditor count the same.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::support::{Server, Settings, application, replace_flags, until};

const INSTANCE: &str = "shop.production.web";

/// The rows of the auditor's report, by column, once the signed ledger goes that far.
fn reported(server: &Server, position: u64, period: &[&str]) -> Vec<Value> {
    let data = server.folder().data();
    let keys = server.ok(&["keys", "show", "--data", data.to_str().unwrap()]);
    let file = server.folder().path().join("keys.txt");
    std::fs::write(&file, keys.stdout).unwrap();
    let state = server.folder().path().join("auditor");
    let mut args = vec!["audit", "report", "dora", "--output", "json"];
    args.extend(["--keys", file.to_str().unwrap()]);
    args.extend(["--state", state.to_str().unwrap()]);
    args.extend(period);
    let report: Value = until("the report", || {
        let done = server.cli(&args);
        let report: Value = serde_json::from_str(&done.stdout).ok()?;
        (report["size"].as_u64()? >= position).then_some(report)
    });
    let columns: Vec<&str> = report["columns"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c.as_str().unwrap())
        .collect();
    let rows = report["rows"].as_array().unwrap().iter().map(|row| {
        let cells = row.as_array().unwrap().iter().cloned();
        columns.iter().map(|c| (*c).to_owned()).zip(cells).collect()
    });
    rows.collect()
}

/// What anybody counts who reads the definitions in the guide, and the events.
#[derive(Default)]
struct ByHand {
    deployments: Vec<String>,
    failed: Vec<String>,
    lead_ms: Vec<i64>,
    restored_ms: Vec<i64>,
}

fn recount(server: &Server) -> ByHand {
    let page = server.read("/api/v1/events?project=shop&limit=500");
    assert!(page["next_after"].as_u64() >= page["head"].as_u64());
    let ms = |time: &Value| {
        let time: jiff::Timestamp = time.as_str().unwrap().parse().unwrap();
        time.as_millisecond()
    };
    let mut counted = ByHand::default();
    let (mut given, mut commits) = (BTreeMap::new(), BTreeMap::new());
    let mut seen = BTreeSet::new();
    for entry in page["events"].as_array().unwrap() {
        let event = &entry["event"];
        let (time, data) = (ms(&event["time"]), &event["data"]);
        let kind = event["type"].as_str().unwrap();
        if kind == "dev.daybook.deployment.source_resolved.v1" {
            let id = event["subject"].as_str().unwrap().rsplit('/').next();
            let source = &data["source"];
            let commit = source["commit"].as_str().unwrap().to_owned();
            let commit = (commit, ms(&source["committed_at"]));
            commits.insert(id.unwrap().to_owned(), commit);
        }
        if kind != "dev.daybook.routing.switched.v1" || data["main"].is_null() {
            continue;
        }
        let main = |which: &str| data["main"][which].as_str().map(str::to_owned);
        if data["reason"] == "rollback" {
            let failed = main("previous").unwrap();
            counted.restored_ms.push(time - given[&failed]);
            counted.failed.push(failed);
        } else if let Some(next) = main("next")
            && !given.contains_key(&next)
        {
            let (commit, committed) = &commits[&next];
            if seen.insert(commit.clone()) {
                counted.lead_ms.push(time - committed);
            }
            counted.deployments.push(next);
        }
        if let Some(next) = main("next") {
            given.insert(next, time);
        }
    }
    counted
}

#[test]
fn an_auditor_counts_what_the_server_says() {
    let source = application("--text one");
    let server = Server::start(Settings::default());
    server.define("shop", "web", &source, &[]);
    let first = server.deploy(INSTANCE, &[]);
    // The same commit again: a deployment, but no new change.
    let again = server.deploy(INSTANCE, &[]);
    replace_flags(&source, "--text two");
    let bad = server.deploy(INSTANCE, &[]);
    server.ok(&["rollback", INSTANCE]);
    // This one never gets the traffic.
    replace_flags(&source, "--exit 3");
    let failed = server.begin(INSTANCE, &[]);
    server.wait_for(&failed, "failed");

    let period = ["--from", "2020-01-01T00:00:00Z"];
    let until = "2100-01-01T00:00:00Z";
    let said = server.json(&[&["dora"][..], &period, &["--until", until]].concat());
    let all = said["instances"].as_array().unwrap();
    assert_eq!(all.len(), 1, "{said}");
    let measured = &all[0];
    assert_eq!(measured["instance_id"], INSTANCE);
    assert_eq!(measured["deployments"], 3);
    assert_eq!(measured["lead_time"]["samples"], 2);
    assert_eq!(measured["failed_changes"], 1);
    assert_eq!(measured["change_failure_rate"], 0.333);
    assert_eq!(measured["time_to_restore"]["samples"], 1);
    assert_eq!(measured["failed_before"], 1);
    let counted = |what: &str| {
        let of = measured["counted"][what].as_array().unwrap().iter();
        of.map(|c| c["deployment"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(counted("deployments"), [&*first, &again, &bad]);
    assert_eq!(counted("lead_times"), [&*first, &bad]);
    assert_eq!(counted("failed_before"), [&*failed]);
    let restore = &measured["counted"]["restores"][0];
    assert_eq!(restore["rollback"]["deployment"], *bad);
    // What is counted can be looked at.
    let position = restore["rollback"]["position"].as_u64().unwrap();
    let event = server.read(&format!("/api/v1/events/{position}"));
    assert_eq!(event["id"], restore["rollback"]["event"]);
    assert_eq!(event["data"]["reason"], "rollback");

    // Counted once more, by hand, from the events as they are.
    let by_hand = recount(&server);
    assert_eq!(by_hand.deployments, [&*first, &again, &bad]);
    assert_eq!(by_hand.failed, [&*bad]);
    let ms = |name: &str| &measured[name]["median_ms"];
    assert_eq!(*ms("time_to_restore"), by_hand.restored_ms[0]);
    let leads = measured["counted"]["lead_times"].as_array().unwrap().iter();
    let leads: Vec<_> = leads.map(|l| l["ms"].as_i64().unwrap()).collect();
    assert_eq!(leads, by_hand.lead_ms);

    let position = said["position"].as_u64().unwrap();
    let rows = reported(&server, position, &[&period[..], &["--to", until]].concat());
    assert_eq!(rows.len(), 1);
    let same = |column: &str, said: &Value| {
        let reported = rows[0][column].as_str().unwrap();
        // Numbers are numbers, however many digits are written.
        match said.as_f64() {
            Some(number) => assert_eq!(reported.parse::<f64>().unwrap(), number, "{column}"),
            None => assert_eq!(reported, said.as_str().unwrap(), "{column}"),
        }
    };
    same("instance", &measured["instance_id"]);
    same("deployments", &measured["deployments"]);
    same("per_day", &measured["deployments_per_day"]);
    same("lead_time_median_ms", &measured["lead_time"]["median_ms"]);
    same("lead_time_p90_ms", &measured["lead_time"]["p90_ms"]);
    same("failed_changes", &measured["failed_changes"]);
    same("change_failure_rate", &measured["change_failure_rate"]);
    same(
        "time_to_restore_median_ms",
        &measured["time_to_restore"]["median_ms"],
    );
    same("failed_before", &measured["failed_before"]);

    // Before all this there was nothing, and a period without time is none.
    let none = server.json(&["dora", "--until", "2021-01-01T00:00:00Z"]);
    assert_eq!(none["instances"], Value::Array(Vec::new()));
    let period = ["--from", until, "--until", "2021-01-01T00:00:00Z"];
    let wrong = server.cli(&[&["dora", "--output", "json"][..], &period].concat());
    assert_eq!(wrong.error()["code"], "invalid_period");
}
