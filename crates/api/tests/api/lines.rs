use daybook_events::DeploymentId;
use daybook_events::deployment::*;
use daybook_events::lines::{LineKind, LineSource};
use reqwest::Method;
use serde_json::Value;

use crate::streams::{next, sent};
use crate::support::*;

async fn printed(server: &Server, id: DeploymentId) {
    let build = LineSource::Build(build_of(id));
    let own = LineSource::Deployment(id);
    server
        .print(build, LineKind::Build, 1, "Collecting flask")
        .await;
    server
        .print(own, LineKind::Status, 2, "pushing layer 1 of 2")
        .await;
    server
        .print(build, LineKind::Build, 3, "WARNING: old pip")
        .await;
    server
        .print(own, LineKind::Container, 4, "Server started on port 3000")
        .await;
}

#[tokio::test]
async fn lines_are_text_like_the_seed_or_json_with_a_cursor() {
    let server = server().await;
    server.shop().await;
    let id = server.deploy("shop.production.api", "v1").await;
    server.make_live(id).await;
    printed(&server, id).await;
    let path = format!("/api/v1/deployments/{id}/logs");
    let text = server.get(&path).await;
    assert!(
        text.header("content-type")
            .unwrap()
            .starts_with("text/plain")
    );
    assert_eq!(
        text.text,
        "2023-11-14T22:13:21Z [INFO] Collecting flask\n\
         2023-11-14T22:13:22Z [INFO] pushing layer 1 of 2\n\
         2023-11-14T22:13:23Z [WARN] WARNING: old pip\n\
         2023-11-14T22:13:24Z [INFO] Server started on port 3000\n"
    );
    for (kind, lines) in [
        ("build", 2),
        ("container", 1),
        ("status", 1),
        ("platform", 0),
    ] {
        let text = server.get(&format!("{path}?type={kind}")).await.text;
        assert_eq!(text.lines().count(), lines, "{kind}");
    }
    let json = async |query: &str| -> Vec<Value> {
        let request = server.request(Method::GET, &format!("{path}{query}"));
        let reply = server
            .send(request.header("Accept", "application/x-ndjson"))
            .await;
        let lines = reply.text.lines().map(|l| serde_json::from_str(l).unwrap());
        lines.collect()
    };
    let all = json("").await;
    assert_eq!(all[0]["kind"], "build");
    // From every line on, the rest follows.
    for (n, line) in all.iter().enumerate() {
        let cursor = line["cursor"].as_str().unwrap();
        assert_eq!(json(&format!("?after={cursor}")).await, all[n + 1..]);
    }
    assert_eq!(json("?type=build&after=1").await, all[2..3]);

    server
        .get(&format!("{path}?type=x"))
        .await
        .refused(422, "unknown_log_type");
    server
        .get(&format!("{path}?after=x"))
        .await
        .refused(400, "invalid_cursor");
    server
        .get("/api/v1/deployments/0190c0de-0000-7000-8000-000000000000/logs")
        .await
        .refused(404, "deployment_not_found");
}

#[tokio::test]
async fn following_ends_when_the_deployment_has_settled_and_all_is_said() {
    let server = server().await;
    server.shop().await;
    let id = server.deploy("shop.production.api", "v1").await;
    let path = format!("/api/v1/deployments/{id}/logs?follow=true");
    let request = server
        .request(Method::GET, &path)
        .header("Accept", "text/event-stream");
    let mut stream = sent(request.send().await.unwrap());
    let own = LineSource::Deployment(id);
    server
        .print(own, LineKind::Status, 0, "waiting for a worker")
        .await;
    let first = next(&mut stream).await;
    assert!(first.data.contains("waiting for a worker"));
    // The build is known only later; its lines come all the same.
    server.make_live_to_building(id).await;
    let build = LineSource::Build(build_of(id));
    for n in 0..10 {
        server
            .print(build, LineKind::Build, n, &format!("step {n}"))
            .await;
    }
    let mut last = first.id;
    for n in 0..10 {
        let line = next(&mut stream).await;
        assert!(line.data.contains(&format!("step {n}")), "{line:?}");
        last = line.id;
    }
    drop(stream);
    server
        .print(build, LineKind::Build, 11, "the last words")
        .await;
    let failed = Failed {
        during: Status::Building,
        code: "build_command_failed".into(),
        message: "it failed".into(),
        remedy: "mend it".into(),
    };
    server.happens(id, DeploymentEvent::Failed(failed)).await;
    let request = server
        .request(Method::GET, &path)
        .header("Accept", "text/event-stream")
        .header("Last-Event-ID", last);
    let mut stream = sent(request.send().await.unwrap());
    assert!(next(&mut stream).await.data.contains("the last words"));
    assert_eq!(next(&mut stream).await.event, "end");
    let text = server.get(&path).await.text;
    assert_eq!(text.lines().count(), 12);
}

#[tokio::test]
async fn a_follower_sees_the_end_come() {
    let server = server().await;
    server.shop().await;
    let id = server.deploy("shop.production.api", "v1").await;
    let path = format!("/api/v1/deployments/{id}/logs?follow=true");
    let container = format!("{path}&type=container");
    let (all, output, ()) = tokio::join!(server.get(&path), server.get(&container), async {
        server.make_live_to_building(id).await;
        printed(&server, id).await;
        server.finish_live(id).await;
        // The containers go on talking until they are stopped.
        let own = LineSource::Deployment(id);
        server.print(own, LineKind::Container, 9, "request 1").await;
        let stop = format!("/api/v1/deployments/{id}/stop");
        server.post(&stop, serde_json::json!({})).await.ok();
        server.finish_stop(id).await;
    });
    assert!(all.text.lines().count() >= 4, "{}", all.text);
    assert_eq!(output.text.lines().count(), 2, "{}", output.text);
}

#[tokio::test]
async fn many_lines_of_both_sources_are_merged_by_time() {
    let server = server().await;
    server.shop().await;
    let id = server.deploy("shop.production.api", "v1").await;
    server.make_live(id).await;
    let build = LineSource::Build(build_of(id));
    let own = LineSource::Deployment(id);
    // Long runs of one source between those of the other, across the bounds of what is read at
    // once.
    for n in 0..2600 {
        let (source, kind) = match (n / 700) % 2 {
            0 => (build, LineKind::Build),
            _ => (own, LineKind::Status),
        };
        server.print(source, kind, n, &format!("line {n}.")).await;
    }
    let path = format!("/api/v1/deployments/{id}/logs");
    for query in ["", "?follow=true"] {
        let text = server.get(&format!("{path}{query}")).await.text;
        assert_eq!(text.lines().count(), 2600);
        for (n, line) in text.lines().enumerate() {
            assert!(line.ends_with(&format!(" line {n}.")), "{line}");
        }
    }
    let rest = server.get(&format!("{path}?after=1400-1150")).await.text;
    assert_eq!(rest.lines().count(), 50);
}

#[tokio::test]
async fn lines_are_looked_for_in_all_deployments_of_a_project() {
    let server = server().await;
    server.shop().await;
    let older = server.deploy("shop.production.api", "v1").await;
    server.make_live(older).await;
    printed(&server, older).await;
    let newer = server.deploy("shop.staging.api", "v2").await;
    server.make_live(newer).await;
    printed(&server, newer).await;
    let path = "/api/v1/projects/shop/logs";
    let found = async |query: &str| -> Vec<(String, String)> {
        let page = server.get(&format!("{path}?{query}")).await.json();
        assert_eq!(page["next"], Value::Null, "{page}");
        let lines = page["lines"].as_array().unwrap().iter().map(|line| {
            let text = |name: &str| line[name].as_str().unwrap().to_owned();
            (text("deployment"), text("text"))
        });
        lines.collect()
    };
    let of = |id: DeploymentId, text: &str| (id.to_string(), text.to_owned());
    assert_eq!(
        found("q=old%20PIP").await,
        [of(newer, "WARNING: old pip"), of(older, "WARNING: old pip")]
    );
    assert_eq!(
        found("level=warn&environment=production").await,
        [of(older, "WARNING: old pip")]
    );
    assert_eq!(found("q=old%20pip&type=container").await, []);
    assert_eq!(found("service=web").await, []);
    assert_eq!(
        found("from=2023-11-14T22:13:24Z&environment=staging").await,
        [of(newer, "Server started on port 3000")]
    );
    // Page by page it is the same.
    let all = found("").await;
    assert_eq!(all.len(), 8);
    let (mut paged, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = server.get(&format!("{path}?limit=3{cursor}")).await.json();
        let lines = page["lines"].as_array().unwrap();
        assert!(lines.len() <= 3);
        paged.extend(lines.iter().map(|l| l["text"].as_str().unwrap().to_owned()));
        let Some(next) = page["next"].as_str() else {
            break;
        };
        cursor = format!("&cursor={next}");
    }
    let texts: Vec<String> = all.into_iter().map(|(_, text)| text).collect();
    assert_eq!(paged, texts);
    for (query, status, code) in [
        ("?q=", 400, "invalid_search"),
        ("?cursor=x", 400, "invalid_cursor"),
        ("?cursor=1-b99999999999999999999", 400, "invalid_cursor"),
        ("?level=loud", 422, "unknown_log_level"),
        ("?limit=0", 400, "invalid_limit"),
        ("?from=yesterday", 400, "invalid_time"),
    ] {
        let reply = server.get(&format!("{path}{query}")).await;
        reply.refused(status, code);
    }
    let nowhere = server.get("/api/v1/projects/nothing/logs").await;
    nowhere.refused(404, "project_not_found");
}

#[tokio::test]
async fn the_lines_of_a_deployment_are_filtered_and_kept_as_a_file() {
    let server = server().await;
    server.shop().await;
    let id = server.deploy("shop.production.api", "v1").await;
    server.make_live(id).await;
    printed(&server, id).await;
    let path = format!("/api/v1/deployments/{id}/logs");
    for (query, lines) in [
        ("level=warn", 1),
        ("q=SERVER", 1),
        ("q=server&type=build", 0),
        ("cluster=elsewhere", 0),
        ("until=2023-11-14T22:13:23Z", 2),
    ] {
        let text = server.get(&format!("{path}?{query}")).await.text;
        assert_eq!(text.lines().count(), lines, "{query}");
    }
    let file = server.get(&format!("{path}?download=true")).await;
    assert_eq!(
        file.header("content-disposition").unwrap(),
        format!("attachment; filename=\"{id}.log\"")
    );
    assert_eq!(file.text.lines().count(), 4);
}

#[tokio::test]
async fn all_lines_that_are_found_are_kept_as_a_file() {
    let server = server().await;
    server.shop().await;
    let older = server.deploy("shop.production.api", "v1").await;
    server.make_live(older).await;
    printed(&server, older).await;
    let newer = server.deploy("shop.staging.api", "v2").await;
    server.make_live(newer).await;
    printed(&server, newer).await;
    let path = "/api/v1/projects/shop/logs?download=true";
    let all = server.get(path).await;
    assert_eq!(
        all.header("content-disposition").unwrap(),
        "attachment; filename=\"shop.log\""
    );
    assert_eq!(all.text.lines().count(), 8, "{}", all.text);
    let warned = server.get(&format!("{path}&level=warn")).await.text;
    let line = |id, environment: &str| {
        format!("2023-11-14T22:13:23Z {environment}.api {id} - [WARN] WARNING: old pip")
    };
    let expected = [line(newer, "staging"), line(older, "production")];
    assert_eq!(warned.lines().collect::<Vec<_>>(), expected);
    server
        .get("/api/v1/projects/shop/logs?download=true&cursor=x")
        .await
        .refused(400, "invalid_cursor");
}

#[tokio::test]
async fn the_lines_of_a_build_that_is_shared_are_found_once() {
    let server = server().await;
    server.shop().await;
    let older = server.deploy("shop.production.api", "v1").await;
    server.make_live(older).await;
    printed(&server, older).await;
    // The same build, in another environment and later.
    let newer = server.deploy("shop.staging.api", "v1").await;
    server
        .happens(newer, DeploymentEvent::Queued(Queued {}))
        .await;
    let state = server.ledger.projections().deployment(older).unwrap();
    let resolved = SourceResolved {
        source: state.unwrap().state.source.unwrap(),
        build: build_of(older),
        branch: None,
    };
    let worker = "builder-1".to_owned();
    let cloning = DeploymentEvent::CloningStarted(CloningStarted { worker });
    server.happens(newer, cloning).await;
    server
        .happens(newer, DeploymentEvent::SourceResolved(resolved))
        .await;
    let path = "/api/v1/projects/shop/logs";
    let found = async |query: &str| -> Vec<(String, String)> {
        let (mut found, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = server.get(&format!("{path}?{query}{cursor}")).await.ok();
            for line in page["lines"].as_array().unwrap() {
                let text = |name: &str| line[name].as_str().unwrap().to_owned();
                found.push((text("deployment"), text("text")));
            }
            match page["next"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return found,
            }
        }
    };
    let of = |id: DeploymentId, text: &str| (id.to_string(), text.to_owned());
    let all = [
        of(newer, "Collecting flask"),
        of(newer, "WARNING: old pip"),
        of(older, "pushing layer 1 of 2"),
        of(older, "Server started on port 3000"),
    ];
    assert_eq!(found("").await, all);
    for limit in 1..4 {
        assert_eq!(found(&format!("limit={limit}")).await, all, "{limit}");
    }
    // Where only the older one is looked at, they are its lines.
    assert_eq!(
        found("environment=production&type=build").await,
        [of(older, "Collecting flask"), of(older, "WARNING: old pip")]
    );
    // A deployment that came too late has no line in time, but its build has: it is older.
    let between = server.ledger.projections().deployment(newer).unwrap();
    let before = between.unwrap().state.created_at;
    assert_eq!(
        found(&format!("environment=staging&until={before}")).await,
        [of(newer, "Collecting flask"), of(newer, "WARNING: old pip")]
    );
}

#[tokio::test]
async fn an_answer_ends_with_what_was_there_however_fast_more_is_printed() {
    let server = server().await;
    server.shop().await;
    let id = server.deploy("shop.production.api", "v1").await;
    server.make_live(id).await;
    printed(&server, id).await;
    let growing = [LineSource::Build(build_of(id)), LineSource::Deployment(id)];
    *server.watched.growing.lock().unwrap() = growing.to_vec();
    for path in [
        format!("/api/v1/deployments/{id}/logs"),
        format!("/api/v1/deployments/{id}/logs?download=true"),
        "/api/v1/projects/shop/logs?download=true".to_owned(),
    ] {
        for accept in ["text/plain", "application/x-ndjson"] {
            let before = lines_there(&server, id).await;
            let request = server.request(Method::GET, &path).header("Accept", accept);
            let reply = tokio::time::timeout(PATIENCE, server.send(request)).await;
            let text = reply.expect("it never ends").text;
            assert_eq!(text.lines().count() as u64, before, "{path}\n{text}");
        }
    }
}

/// How many lines a deployment and its build have.
async fn lines_there(server: &Server, id: DeploymentId) -> u64 {
    let build = LineSource::Build(build_of(id));
    let own = LineSource::Deployment(id);
    server.lines.last(build).await.unwrap() + server.lines.last(own).await.unwrap()
}
