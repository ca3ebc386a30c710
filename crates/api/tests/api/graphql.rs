//! GraphQL, as a client written from the documents would use it.

use std::sync::{Arc, Mutex};

use daybook_api::commands::{Caller, Commands};
use daybook_events::lines::{LineKind, LineSource};
use daybook_events::{Actor, DeploymentId};
use futures_util::SinkExt;
use reqwest::Method;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tracing::field::{Field, Visit};
use tracing::{Metadata, Subscriber, span};

use crate::sockets::{Socket, closed, open, text};
use crate::support::*;

/// The documents, word for word.
const DEPLOY: &str = r#"mutation {
deploy(input: {
projectId: "shop"
service: "api"
environment: "production"
gitRef: "main"
}) {
id
phase
}
}"#;
const DEPLOY_BUILD: &str = r#"mutation {
deployBuild(input: {
projectId: "shop"
service: "cache"
environment: "production"
tag: "a1b2c3d"
})
}"#;
const PROJECT: &str = r#"query {
project(id: "shop") {
services {
name
instances {
environment
imageTag
deployments {
imageTag
active
timestamp
revision
message
sourceCommitMessage
sourceUrl
}
}
}
}
}"#;

fn status_of(id: &str) -> String {
    format!(
        r#"query {{
deployStatus(id: "{id}") {{
phase
rolloutHealth
rolloutMessage
}}
}}"#
    )
}

async fn ask(server: &Server, body: Value) -> Value {
    let reply = server.post("/graphql", body).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.header("content-type"), Some("application/json"));
    reply.json()
}

/// The data of an answer that has no errors.
async fn data(server: &Server, query: impl Into<String>) -> Value {
    let mut answer = ask(server, json!({ "query": query.into() })).await;
    assert_eq!(answer.get("errors"), None, "{answer}");
    answer["data"].take()
}

/// The code of the one error that an answer has.
#[track_caller]
fn code(answer: &Value) -> &str {
    let errors = answer["errors"].as_array().expect("there is an error");
    assert_eq!(errors.len(), 1, "{answer}");
    for field in ["remedy", "status", "retryable"] {
        assert!(!errors[0]["extensions"][field].is_null(), "{answer}");
    }
    errors[0]["extensions"]["code"].as_str().unwrap()
}

pub async fn socket(server: &Server) -> Socket {
    let protocol = ("sec-websocket-protocol", "graphql-transport-ws");
    let mut socket = open(server, "/graphql", &[protocol]).await.unwrap();
    say(
        &mut socket,
        json!({ "type": "connection_init", "payload": {} }),
    )
    .await;
    assert_eq!(text(&mut socket).await, json!({ "type": "connection_ack" }));
    socket
}

async fn say(socket: &mut Socket, message: Value) {
    let message = Message::text(message.to_string());
    socket.send(message).await.unwrap();
}

pub async fn subscribe(socket: &mut Socket, id: &str, query: &str) {
    let payload = json!({ "query": query });
    say(
        socket,
        json!({ "type": "subscribe", "id": id, "payload": payload }),
    )
    .await;
}

/// The data of the next message of a subscription.
pub async fn next(socket: &mut Socket, id: &str) -> Value {
    let mut message = text(socket).await;
    assert_eq!(message["type"], "next", "{message}");
    assert_eq!(message["id"], id);
    assert_eq!(message["payload"].get("errors"), None, "{message}");
    message["payload"]["data"].take()
}

#[tokio::test]
async fn the_documents_of_the_seed_are_answered_as_they_stand() {
    let server = server().await;
    server.shop().await;
    let deployed = data(&server, DEPLOY).await;
    assert_eq!(deployed["deploy"]["phase"], "QUEUED");
    let id = deployed["deploy"]["id"].as_str().unwrap();
    let status = data(&server, &status_of(id)).await;
    assert_eq!(
        status["deployStatus"],
        json!({ "phase": "QUEUED", "rolloutHealth": null, "rolloutMessage": null })
    );
    let deployment: DeploymentId = id.parse().unwrap();
    server.make_live_to_building(deployment).await;
    let status = data(&server, &status_of(id)).await;
    assert_eq!(status["deployStatus"]["phase"], "BUILDING");
    server.finish_live(deployment).await;
    let status = data(&server, &status_of(id)).await;
    assert_eq!(status["deployStatus"]["phase"], "SUCCEEDED");
    assert_eq!(status["deployStatus"]["rolloutHealth"], "HEALTHY");
    let took = data(
        &server,
        format!(
            "{{ deployStatus(id: \"{id}\") {{ durations {{ cloneMs syncMs pushMs totalMs }} }} }}"
        ),
    );
    let took = took.await["deployStatus"]["durations"].clone();
    for step in ["cloneMs", "syncMs", "totalMs"] {
        assert!(took[step].is_u64(), "no {step} in {took}");
    }
    assert!(took["pushMs"].is_null(), "{took}");

    let built = data(&server, DEPLOY_BUILD).await;
    let build: DeploymentId = built["deployBuild"].as_str().unwrap().parse().unwrap();
    let row = server.ledger.projections().deployment(build).unwrap();
    let version = row.unwrap().state.request.version.to_string();
    assert_eq!(version, "registry.example/cache:a1b2c3d");

    let shown = data(&server, PROJECT).await;
    let services = shown["project"]["services"].as_array().unwrap();
    assert_eq!(services.len(), 2);
    assert_eq!(services[0]["name"], "api");
    let production = &services[0]["instances"][0];
    assert_eq!(production["environment"], "production");
    assert_eq!(production["imageTag"], "0123456");
    let shipped = &production["deployments"][0];
    assert_eq!(shipped["imageTag"], "0123456");
    assert_eq!(shipped["active"], true);
    assert_eq!(shipped["revision"], COMMIT);
    assert_eq!(shipped["sourceCommitMessage"], "Faster carts\n");
    assert_eq!(shipped["sourceUrl"], "https://git.example/shop.git");
    assert!(shipped["timestamp"].is_string());
    let staging = &services[0]["instances"][1];
    assert_eq!(staging["imageTag"], Value::Null);
    assert_eq!(staging["deployments"], json!([]));
}

#[tokio::test]
async fn an_image_is_pinned_by_the_digest_that_is_given() {
    let server = server().await;
    server.shop().await;
    let deploy = |digest: &str| {
        let query = "mutation($d: String) { deployBuild(input: { projectId: \"shop\", \
                     service: \"cache\", environment: \"staging\", tag: \"7\", digest: $d }) }";
        json!({ "query": query, "variables": { "d": digest } })
    };
    let built = ask(&server, deploy(DIGEST)).await;
    let id: DeploymentId = built["data"]["deployBuild"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    let row = server.ledger.projections().deployment(id).unwrap().unwrap();
    let version = row.state.request.version.to_string();
    assert_eq!(version, format!("registry.example/cache:7@{DIGEST}"));
    let refused = ask(&server, deploy("sha256:abc")).await;
    assert_eq!(code(&refused), "invalid_digest");
}

#[tokio::test]
async fn what_is_refused_has_the_codes_of_rest() {
    let server = server().await;
    server.shop().await;
    let deploy = |project: &str, service: &str, environment: &str| {
        format!(
            "mutation {{ deploy(input: {{ projectId: {project:?}, service: {service:?}, \
             environment: {environment:?} }}) {{ id }} }}"
        )
    };
    let rest = |project: &str, service: &str, environment: &str| json!({ "project": project, "service": service, "environment": environment });
    for (project, service, environment) in [
        ("none", "api", "production"),
        ("shop", "none", "production"),
        ("shop", "api", "none"),
        ("shop", "cache", "production"),
        ("Not a name", "api", "production"),
        ("shop", "../..", "production"),
    ] {
        let over_rest = server
            .post("/api/v1/deployments", rest(project, service, environment))
            .await
            .json();
        let query = deploy(project, service, environment);
        let answer = ask(&server, json!({ "query": query })).await;
        assert_eq!(code(&answer), over_rest["code"], "{query}");
        let extensions = &answer["errors"][0]["extensions"];
        assert_eq!(extensions["remedy"], over_rest["remedy"]);
        assert_eq!(extensions["status"], over_rest["status"]);
        assert_eq!(answer["errors"][0]["message"], over_rest["detail"]);
    }
    for (query, expected) in [
        (r#"{ project(id: "none") { name } }"#, "project_not_found"),
        (
            r#"{ deployStatus(id: "deploy-xyz789") { phase } }"#,
            "invalid_deployment_id",
        ),
        (
            r#"{ deployStatus(id: "00000000-0000-7000-8000-000000000000") { phase } }"#,
            "deployment_not_found",
        ),
        (r#"{ history(at: "yesterday") { next } }"#, "invalid_at"),
        (r#"{ history(at: "9999") { next } }"#, "position_ahead"),
        (r#"{ history(first: 0) { next } }"#, "invalid_limit"),
        (r#"{ history(after: "x") { next } }"#, "invalid_cursor"),
        (r#"{ events(after: 9999) { head } }"#, "position_ahead"),
        (
            r#"{ events(filter: { kind: "nothing" }) { head } }"#,
            "unknown_kind",
        ),
        (
            r#"mutation { createProject(name: "shop") { name } }"#,
            "project_exists",
        ),
        (
            r#"mutation { rollback(input: { projectId: "shop", service: "api",
                environment: "production" }) { id } }"#,
            "nothing_to_roll_back",
        ),
    ] {
        let answer = ask(&server, json!({ "query": query })).await;
        assert_eq!(code(&answer), expected, "{query}");
    }
    // Nothing of that is in the ledger.
    assert_eq!(server.ledger.projections().position().0, 5);
}

#[tokio::test]
async fn a_mutation_is_carried_out_once_however_often_it_is_repeated() {
    let server = server().await;
    server.shop().await;
    let send = async |key: &str, query: &str| {
        let reply = server
            .post_with_key("/graphql", key, json!({ "query": query }))
            .await;
        reply.json()
    };
    let first = send("one", DEPLOY).await;
    let head = server.ledger.projections().position();
    assert_eq!(send("one", DEPLOY).await, first);
    // Not a word of the request is different, although it is written in another way.
    let rewritten = "mutation Other { deploy(input: { gitRef: \"main\", environment: \"production\", \
                     service: \"api\", projectId: \"shop\" }) { id phase } }";
    assert_eq!(send("one", rewritten).await["data"], first["data"]);
    let other = DEPLOY.replace("\"main\"", "\"next\"");
    assert_eq!(code(&send("one", &other).await), "idempotency_key_reused");
    assert_eq!(server.ledger.projections().position(), head);
    // Two fields of one document are two requests; and the key may be an argument.
    let two = "mutation { a: deploy(input: { projectId: \"shop\", service: \"api\", environment: \
               \"staging\" }) { id } b: deploy(input: { projectId: \"shop\", service: \"api\", \
               environment: \"staging\" }) { id } }";
    let both = send("two", two).await;
    assert_ne!(both["data"]["a"], both["data"]["b"]);
    assert_eq!(send("two", two).await, both);
    let argument = "mutation { deploy(input: { projectId: \"shop\", service: \"api\", environment: \
                    \"staging\", idempotencyKey: \"three\" }) { id } }";
    let by_argument = data(&server, argument).await;
    assert_eq!(data(&server, argument).await, by_argument);
    let bad = argument.replace("three", "");
    let refused = ask(&server, json!({ "query": bad })).await;
    assert_eq!(code(&refused), "invalid_idempotency_key");
}

#[tokio::test]
async fn everything_else_can_be_asked_and_done_too() {
    let server = server().await;
    let made = data(
        &server,
        r#"mutation {
            createProject(name: "shop", description: "a shop") { id description }
            defineService(projectId: "shop", service: "api",
                spec: { source: { url: "https://git.example/shop.git", default_ref: "main" } }) {
                services { name spec } }
            production: createEnvironment(input: { projectId: "shop", name: "production",
                clusters: ["east"], live: true }) { name live clusters }
            staging: createEnvironment(input: { projectId: "shop", name: "staging",
                clusters: ["east"], switch: MANUAL }) { name switch status }
        }"#,
    )
    .await;
    assert_eq!(made["createProject"]["id"], "shop");
    assert_eq!(made["staging"]["switch"], "MANUAL");
    let one = server.deploy("shop.production.api", "v1").await;
    server.make_live(one).await;
    let before = server.ledger.projections().position();
    let two = server.deploy("shop.production.api", "v2").await;
    server.make_live(two).await;

    let back = data(
        &server,
        r#"mutation { rollback(input: { projectId: "shop", service: "api",
            environment: "production", reason: "slow" }) { id instanceId previousMain } }"#,
    )
    .await;
    assert_eq!(back["rollback"]["id"], one.to_string());
    assert_eq!(back["rollback"]["previousMain"], two.to_string());
    let marked = data(
        &server,
        format!("mutation {{ markMain(id: \"{two}\") {{ id }} }}"),
    );
    assert_eq!(marked.await["markMain"]["id"], two.to_string());
    let promoted = data(
        &server,
        r#"mutation { promote(input: { projectId: "shop", service: "api", from: "production",
            to: "staging" }) { id phase environment version } }"#,
    )
    .await;
    assert_eq!(promoted["promote"]["environment"], "staging");
    assert!(
        promoted["promote"]["version"]
            .as_str()
            .unwrap()
            .contains(DIGEST)
    );
    // It was built for another one, whose commit it is made from.
    let id = promoted["promote"]["id"].as_str().unwrap();
    let detail = server.get(&format!("/api/v1/deployments/{id}")).await.ok();
    assert_eq!(detail["source"]["commit"], COMMIT);
    let listed = data(
        &server,
        r#"{ history(projectId: "shop", first: 1) { deployments { id sourceCommit
            sourceCommitMessage sourceUrl } } }"#,
    );
    let row = listed.await["history"]["deployments"][0].clone();
    assert_eq!(row["id"], id);
    assert_eq!(row["sourceCommit"], COMMIT);
    assert_eq!(row["sourceCommitMessage"], "Faster carts\n");
    assert!(row["sourceUrl"].is_string(), "{row}");
    let address = format!("/api/v1/history?version={}", &COMMIT[..7]);
    let found = server.get(&address);
    assert_eq!(found.await.ok()["history"][0]["deployment"], id);
    let stopped = data(
        &server,
        format!("mutation {{ stopDeployment(id: \"{one}\") {{ state }} }}"),
    );
    assert_eq!(stopped.await["stopDeployment"]["state"], "stopping");

    let shown = data(
        &server,
        r#"{ project(id: "shop") { environments { name urls } routes { table routes { hostname
            backends { deployment weight } } switches { reason } } }
            routes(projectId: "shop") { table } environments(projectId: "shop") { name }
            ledger { head position durability condition }
            audit(filter: { kind: "routing" }, first: 2) { next entries { position kind summary
                signed deployment } }
            history(projectId: "shop", first: 2) { next deployments { id environment phase } } }"#,
    )
    .await;
    assert_eq!(shown["project"]["environments"][0]["name"], "production");
    let routes = shown["project"]["routes"]["routes"].as_array().unwrap();
    assert!(routes.iter().any(|r| r["hostname"] == "api.shop.localhost"));
    assert_eq!(shown["audit"]["entries"].as_array().unwrap().len(), 2);
    assert_eq!(shown["audit"]["entries"][0]["signed"], false);
    assert_eq!(shown["ledger"]["durability"], "synced");
    let history = &shown["history"];
    assert_eq!(history["deployments"][0]["environment"], "staging");
    let cursor = history["next"].as_str().unwrap();
    let rest = data(
        &server,
        format!("{{ history(after: \"{cursor}\") {{ next deployments {{ id }} }} }}"),
    );
    let rest = rest.await;
    assert_eq!(rest["history"]["deployments"][0]["id"], one.to_string());

    // As it was.
    let then = data(
        &server,
        format!(
            r#"{{ state(at: "{before}") {{ position stateHash instances {{ id main {{ id phase }} }} }}
                history(at: "{before}") {{ deployments {{ id active }} }} }}"#
        ),
    )
    .await;
    assert_eq!(then["state"]["position"], before.0);
    assert_eq!(
        then["state"]["instances"],
        json!([{ "id": "shop.production.api",
            "main": { "id": one.to_string(), "phase": "SUCCEEDED" } }])
    );
    assert!(
        then["state"]["stateHash"]
            .as_str()
            .unwrap()
            .starts_with("s3:")
    );
    assert_eq!(then["history"]["deployments"].as_array().unwrap().len(), 1);
    let split = data(
        &server,
        format!(
            r#"mutation {{ setRoutes(input: {{ projectId: "shop", instanceId: "shop.production.api",
                to: [{{ deployment: "{two}", weight: 1 }}] }}) {{ instanceId }}
                deleteEnvironment(projectId: "shop", name: "staging") {{ status }} }}"#
        ),
    )
    .await;
    assert_eq!(split["deleteEnvironment"]["status"], "deleting");
    let events = data(
        &server,
        r#"{ events(filter: { projectId: "shop" }, first: 1) { head nextAfter events { position
            subject event } } }"#,
    )
    .await;
    let event = &events["events"]["events"][0]["event"];
    assert_eq!(event["type"], "dev.daybook.project.created.v1");
}

#[tokio::test]
async fn malformed_input_gets_a_graphql_error_with_a_code() {
    let server = server().await;
    server.shop().await;
    let deep = format!(
        "{}{}",
        "{ project(id: \"shop\") ".repeat(30),
        "}".repeat(30)
    );
    let wide: String = (0..5)
        .map(|n| format!("p{n}: {} ", &PROJECT["query {".len()..PROJECT.len() - 1]))
        .collect();
    for (body, status, expected) in [
        (String::new(), 400, "malformed_json"),
        ("{".into(), 400, "malformed_json"),
        ("[]".into(), 400, "invalid_body"),
        (
            r#"[{"query":"{ projects { name } }"}]"#.into(),
            400,
            "invalid_body",
        ),
        ("{}".into(), 400, "query_missing"),
        (r#"{"query":7}"#.into(), 400, "invalid_body"),
        (r#"{"query":"{"}"#.into(), 400, "malformed_query"),
        (
            json!({ "query": "{ nothing }" }).to_string(),
            200,
            "invalid_query",
        ),
        (
            json!({ "query": "{ project { name } }" }).to_string(),
            200,
            "invalid_query",
        ),
        (
            json!({ "query": "query($x: ID!) { project(id: $x) { name } }" }).to_string(),
            200,
            "invalid_query",
        ),
        (
            json!({ "query": "{ events(after: -1) { head } }" }).to_string(),
            200,
            "invalid_query",
        ),
        (
            json!({ "query": "subscription { deployLogs(id: \"x\") }" }).to_string(),
            200,
            "invalid_query",
        ),
        (json!({ "query": deep }).to_string(), 400, "query_too_deep"),
        (
            json!({ "query": format!("{{ {wide} }}") }).to_string(),
            200,
            "query_too_complex",
        ),
        (
            json!({ "query": "{ history(first: 4294967295) { deployments { id } } }" }).to_string(),
            200,
            "query_too_complex",
        ),
        (
            json!({ "query": "{a".repeat(15_000) }).to_string(),
            400,
            "query_too_large",
        ),
        (
            json!({ "query": format!("{{ projects {{ name }} }} #{}", "x".repeat(40_000)) })
                .to_string(),
            400,
            "query_too_large",
        ),
        ("x".repeat(300_000), 413, "body_too_large"),
    ] {
        let shown: String = body.chars().take(60).collect();
        let request = server
            .request(Method::POST, "/graphql")
            .header("Content-Type", "application/json")
            .body(body);
        let reply = server.send(request).await;
        assert_eq!(reply.status, status, "{shown}: {reply:?}");
        let answer = reply.json();
        let found = answer["errors"][0]["extensions"]["code"].as_str();
        assert_eq!(found, Some(expected), "{shown}: {answer}");
        assert!(answer["data"].is_null());
    }
    let form = server
        .request(Method::POST, "/graphql")
        .header("Content-Type", "application/x-www-form-urlencoded")
        .body("query={projects{name}}");
    let reply = server.send(form).await;
    assert_eq!(reply.status, 415);
    assert_eq!(code(&reply.json()), "unsupported_media_type");
    // With the newer media type a request that was not carried out is refused by its status too.
    let request = server
        .request(Method::POST, "/graphql")
        .header("Accept", "application/graphql-response+json")
        .json(&json!({ "query": "{ nothing }" }));
    let reply = server.send(request).await;
    assert_eq!(reply.status, 400);
    assert_eq!(
        reply.header("content-type"),
        Some("application/graphql-response+json")
    );
}

#[tokio::test]
async fn the_schema_can_be_read_and_asked_for() {
    let server = server().await;
    let schema = server.get("/graphql").await.text;
    let committed = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../schemas/graphql/daybook.graphql");
    let committed = std::fs::read_to_string(committed).unwrap();
    assert!(schema.ends_with(&committed), "cargo xtask schemas");
    // What tools ask, as deep as they go.
    let mut type_ref = String::from("kind name");
    for _ in 0..9 {
        type_ref = format!("kind name ofType {{ {type_ref} }}");
    }
    let query = format!(
        "query IntrospectionQuery {{ __schema {{ queryType {{ name }} mutationType {{ name }} \
         subscriptionType {{ name }} types {{ ...FullType }} directives {{ name locations args \
         {{ ...InputValue }} }} }} }} \
         fragment FullType on __Type {{ kind name description fields(includeDeprecated: true) {{ \
         name description args {{ ...InputValue }} type {{ ...TypeRef }} isDeprecated \
         deprecationReason }} inputFields {{ ...InputValue }} interfaces {{ ...TypeRef }} \
         enumValues(includeDeprecated: true) {{ name description }} possibleTypes {{ ...TypeRef }} }} \
         fragment InputValue on __InputValue {{ name description type {{ ...TypeRef }} defaultValue }} \
         fragment TypeRef on __Type {{ {type_ref} }}"
    );
    let schema = data(&server, &query).await;
    assert_eq!(
        schema["__schema"]["subscriptionType"]["name"],
        "Subscription"
    );
}

#[tokio::test]
async fn a_deployment_is_followed_over_a_socket_also_across_a_cut() {
    let server = server().await;
    server.shop().await;
    let id = server.deploy("shop.production.api", "v1").await;
    let status = |after: &str| {
        format!("subscription {{ deployStatus(id: \"{id}\"{after}) {{ phase position }} }}")
    };
    let logs = |after: &str| {
        format!("subscription {{ deployLogLines(id: \"{id}\"{after}) {{ text cursor type }} }}")
    };
    let mut first = socket(&server).await;
    subscribe(&mut first, "s", &status("")).await;
    let seen = next(&mut first, "s").await["deployStatus"].take();
    assert_eq!(seen["phase"], "QUEUED");
    server.make_live_to_building(id).await;
    let mut phases = vec!["QUEUED".to_owned()];
    let mut position = seen["position"].clone();
    while phases.last().unwrap() != "CLONING" {
        let seen = next(&mut first, "s").await["deployStatus"].take();
        phases.push(seen["phase"].as_str().unwrap().to_owned());
        position = seen["position"].clone();
    }
    let build = LineSource::Build(build_of(id));
    server.print(build, LineKind::Build, 1, "one").await;
    server.print(build, LineKind::Build, 2, "two").await;
    subscribe(&mut first, "l", &logs("")).await;
    let mut cursor = Value::Null;
    while cursor.is_null() {
        let message = text(&mut first).await;
        if message["id"] == "l" {
            let line = &message["payload"]["data"]["deployLogLines"];
            assert_eq!(line["text"], "one");
            assert_eq!(line["type"], "build");
            cursor = line["cursor"].clone();
        }
    }
    drop(first);
    // While nobody listens, it goes on.
    server.print(build, LineKind::Build, 3, "three").await;
    server.finish_live(id).await;

    let mut second = socket(&server).await;
    subscribe(&mut second, "s", &status(&format!(", after: {position}"))).await;
    loop {
        let message = text(&mut second).await;
        if message["type"] == "complete" {
            break;
        }
        let seen = &message["payload"]["data"]["deployStatus"];
        phases.push(seen["phase"].as_str().unwrap().to_owned());
    }
    phases.dedup();
    assert_eq!(
        phases,
        ["QUEUED", "CLONING", "BUILDING", "DEPLOYING", "SUCCEEDED"]
    );
    subscribe(&mut second, "l", &logs(&format!(", after: {cursor}"))).await;
    let mut lines = Vec::new();
    loop {
        let message = text(&mut second).await;
        if message["type"] == "complete" {
            break;
        }
        let line = &message["payload"]["data"]["deployLogLines"];
        lines.push(line["text"].as_str().unwrap().to_owned());
    }
    assert_eq!(lines, ["two", "three"]);
    // As the document has it: each message is a line as a plain string.
    let plain = format!("subscription {{\ndeployLogs(id: \"{id}\")\n}}");
    subscribe(&mut second, "p", &plain).await;
    for line in ["one", "two", "three"] {
        assert_eq!(next(&mut second, "p").await["deployLogs"], line);
    }
    assert_eq!(
        text(&mut second).await,
        json!({ "type": "complete", "id": "p" })
    );
    // It has settled, and the subscriber has had that: there is nothing to come.
    let head = server.ledger.projections().position();
    subscribe(&mut second, "s", &status(&format!(", after: {head}"))).await;
    assert_eq!(text(&mut second).await["type"], "complete");
}

#[tokio::test]
async fn events_come_over_a_socket_with_their_chain() {
    let server = server().await;
    server.shop().await;
    let mut socket = socket(&server).await;
    let query = "subscription { events(filter: { projectId: \"shop\" }) { position chain leafHash \
                 event } }";
    subscribe(&mut socket, "e", query).await;
    for position in 1..=5 {
        let event = next(&mut socket, "e").await["events"].take();
        assert_eq!(event["position"], position);
        let report = format!("/api/v1/events/chain?project=shop&to={position}");
        assert_eq!(event["chain"], server.get(&report).await.ok()["chain"]);
    }
    server.deploy("shop.staging.api", "v1").await;
    let event = next(&mut socket, "e").await["events"].take();
    assert_eq!(
        event["event"]["type"],
        "dev.daybook.deployment.requested.v1"
    );
    // A client that has enough says so; others go on, and questions are answered too.
    say(&mut socket, json!({ "type": "complete", "id": "e" })).await;
    subscribe(&mut socket, "q", "{ projects { name } }").await;
    let answer = next(&mut socket, "q").await;
    assert_eq!(answer["projects"][0]["name"], "shop");
    assert_eq!(text(&mut socket).await["type"], "complete");
    say(&mut socket, json!({ "type": "ping" })).await;
    assert_eq!(text(&mut socket).await, json!({ "type": "pong" }));
}

#[tokio::test]
async fn what_is_wrong_with_one_operation_ends_that_one() {
    let server = server().await;
    server.shop().await;
    let mut socket = socket(&server).await;
    for (query, expected) in [
        ("subscription { nothing }", "invalid_query"),
        ("{", "malformed_query"),
        (
            "subscription { deployLogs(id: \"deploy-xyz789\") }",
            "invalid_deployment_id",
        ),
        (
            "subscription { deployStatus(id: \"00000000-0000-7000-8000-000000000000\") { phase } }",
            "deployment_not_found",
        ),
        (
            "subscription { events(after: 99) { position } }",
            "position_ahead",
        ),
    ] {
        subscribe(&mut socket, "x", query).await;
        let message = text(&mut socket).await;
        let errors = match message["type"].as_str().unwrap() {
            "error" => &message["payload"],
            _ => &message["payload"]["errors"],
        };
        assert_eq!(errors[0]["extensions"]["code"], expected, "{message}");
        if message["type"] == "next" {
            assert_eq!(text(&mut socket).await["type"], "complete");
        }
    }
    // More at once than anybody needs.
    for n in 0..64 {
        let query = "subscription { events(after: 5) { position } }";
        subscribe(&mut socket, &format!("e{n}"), query).await;
    }
    subscribe(&mut socket, "one more", "{ projects { name } }").await;
    let message = text(&mut socket).await;
    assert_eq!(message["type"], "error");
    let error = &message["payload"][0];
    assert_eq!(error["extensions"]["code"], "too_many_operations");
}

#[tokio::test]
async fn the_protocol_is_kept_to() {
    let server = server().await;
    let protocol = ("sec-websocket-protocol", "graphql-transport-ws");
    let query = json!({ "query": "subscription { events { position } }" });
    let subscribe = json!({ "type": "subscribe", "id": "a", "payload": query });
    let init = json!({ "type": "connection_init" });
    for (messages, code) in [
        (vec![json!("nonsense")], 4400),
        (vec![json!({ "type": "nothing" })], 4400),
        (vec![init.clone(), json!({ "type": "subscribe" })], 4400),
        (vec![subscribe.clone()], 4401),
        (vec![init.clone(), subscribe.clone(), subscribe], 4409),
        (vec![init.clone(), init], 4429),
    ] {
        let mut socket = open(&server, "/graphql", &[protocol]).await.unwrap();
        for message in &messages {
            say(&mut socket, message.clone()).await;
        }
        let frame = closed(&mut socket).await;
        assert_eq!(u16::from(frame.code), code, "{messages:?}");
    }
    let mut socket = open(&server, "/graphql", &[protocol]).await.unwrap();
    socket.send(Message::binary(vec![0])).await.unwrap();
    assert_eq!(u16::from(closed(&mut socket).await.code), 4400);
}

#[tokio::test]
async fn what_searches_the_ledger_costs_more_than_the_little_that_it_finds() {
    let server = server().await;
    server.shop().await;
    let audit = |n: usize| {
        let one = "audit(filter: { from: \"2999-01-01T00:00:00Z\" }, first: 1) { next }";
        let all: String = (0..n).map(|n| format!(" a{n}: {one}")).collect();
        json!({ "query": format!("{{{all} }}") })
    };
    assert_eq!(ask(&server, audit(2)).await.get("errors"), None);
    assert_eq!(code(&ask(&server, audit(30)).await), "query_too_complex");
    let past: String = (0..20)
        .map(|n| format!(" a{n}: history(at: \"3\", first: 1) {{ next }}"))
        .collect();
    let answer = ask(&server, json!({ "query": format!("{{{past} }}") })).await;
    assert_eq!(code(&answer), "query_too_complex");
}

#[tokio::test]
async fn lists_that_are_longer_than_usual_are_counted() {
    let server = server().await;
    server.shop().await;
    let cache = json!({ "image_repository": "registry.example/cache" });
    for n in 0..30 {
        let service = format!("/api/v1/projects/shop/services/s{n}");
        server.put(&service, cache.clone()).await.ok();
        let environment = json!({ "name": format!("e{n}"), "clusters": ["east"] });
        let path = "/api/v1/projects/shop/environments";
        server.post(path, environment).await.ok();
    }
    // 32 services in 32 environments each: a thousand instances for each of the aliases.
    let aliases = |n: usize| {
        let one = "projects { services { instances { id } } }";
        let all: String = (0..n).map(|n| format!(" a{n}: {one}")).collect();
        json!({ "query": format!("{{{all} }}") })
    };
    let one = ask(&server, aliases(1)).await;
    let services = one["data"]["a0"][0]["services"].as_array().unwrap();
    assert_eq!(services.len(), 32);
    assert_eq!(services[31]["instances"].as_array().unwrap().len(), 32);
    let answer = ask(&server, aliases(20)).await;
    let codes: Vec<_> = answer["errors"].as_array().unwrap().iter().collect();
    assert!(!codes.is_empty());
    for error in codes {
        assert_eq!(error["extensions"]["code"], "query_too_complex", "{error}");
    }
    // What is in the list can be asked for in parts.
    let part = "{ project(id: \"shop\") { services(first: 2, after: \"s28\") { name } } }";
    let part = data(&server, part).await;
    let names = &part["project"]["services"];
    assert_eq!(*names, json!([{ "name": "s29" }, { "name": "s3" }]));
    let part = data(&server, "{ projects(first: 1, after: \"shop\") { name } }").await;
    assert_eq!(part["projects"], json!([]));
}

/// What was read for items of lists, and for how many at once.
#[derive(Clone, Default)]
struct Reads(Arc<Mutex<Vec<(String, u64)>>>);

impl Subscriber for Reads {
    fn enabled(&self, about: &Metadata<'_>) -> bool {
        about.target() == "daybook_api::graphql::loads"
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut read = Read::default();
        event.record(&mut read);
        self.0.lock().unwrap().push((read.what, read.items));
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[derive(Default)]
struct Read {
    what: String,
    items: u64,
}

impl Visit for Read {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "what" {
            self.what = value.to_owned();
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "items" {
            self.items = value;
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

#[tokio::test]
async fn thirty_services_take_no_more_reads_than_three() {
    let server = server().await;
    server.shop().await;
    let reads = Reads::default();
    // While there is but one subscriber, `tracing` asks that of the thread that comes to a place first
    // whether anybody wants to hear of it, for good: tests beside this one have none.
    let _second = tracing::Dispatch::new(reads.clone());
    // All of a test runs on its own thread.
    let _counting = tracing::subscriber::set_default(reads.clone());
    let ask_for_all = async |services: usize| {
        let query = "{ project(id: \"shop\") { environments { name } services { name instances { id imageTag \
                     rolledBack main { id phase } deployments(first: 3) { id } } } } }";
        reads.0.lock().unwrap().clear();
        let shown = data(&server, query).await;
        let shown = shown["project"]["services"].as_array().unwrap().clone();
        let live = shown
            .iter()
            .flat_map(|s| s["instances"].as_array().unwrap());
        let live =
            live.filter(|i| !i["main"].is_null() && i["deployments"][0]["id"] == i["main"]["id"]);
        assert_eq!(live.count(), services);
        std::mem::take(&mut *reads.0.lock().unwrap())
    };
    let cache = json!({ "image_repository": "registry.example/cache" });
    let live = async |name: String| {
        let service = format!("/api/v1/projects/shop/services/{name}");
        server.put(&service, cache.clone()).await.ok();
        let id = server.deploy(&format!("shop.production.{name}"), "7").await;
        server.make_live(id).await;
    };
    for n in 0..3 {
        live(format!("s{n}")).await;
    }
    let few = ask_for_all(3).await;
    for n in 3..30 {
        live(format!("s{n}")).await;
    }
    let many = ask_for_all(30).await;
    let read = |what: &str| -> (usize, u64) {
        let of = many.iter().filter(|(read, _)| read == what);
        of.fold((0, 0), |(times, items), read| (times + 1, items + read.1))
    };
    for what in ["environments", "running", "deployments", "history"] {
        assert!(few.iter().any(|(read, _)| read == what), "{what}: {few:?}");
    }
    // What is asked for in one moment is read at once. A busy machine may make two moments of one.
    assert!(few.len() <= 8 && many.len() <= 8, "{few:?}, then {many:?}");
    assert_eq!(read("deployments").1, 30, "{many:?}");
    // Each service is in two environments, and there are two more services.
    assert_eq!(read("history").1, 64, "{many:?}");
}

#[tokio::test]
async fn the_history_of_an_instance_goes_on_after_a_cursor() {
    let server = server().await;
    server.shop().await;
    let mut all = Vec::new();
    for n in 0..23 {
        let id = server.deploy("shop.staging.cache", &format!("v{n}")).await;
        all.push(id.to_string());
    }
    all.reverse();
    let page = async |arguments: &str| -> Vec<(String, String)> {
        let query = format!(
            "{{ project(id: \"shop\") {{ services {{ name instances(environment: \"staging\") {{ \
             deployments({arguments}) {{ id cursor }} }} }} }} }}"
        );
        let shown = data(&server, query).await;
        let services = shown["project"]["services"].as_array().unwrap();
        let cache = services.iter().find(|s| s["name"] == "cache").unwrap();
        let rows = cache["instances"][0]["deployments"].as_array().unwrap();
        let text = |row: &Value, name: &str| row[name].as_str().unwrap().to_owned();
        let rows = rows.iter().map(|r| (text(r, "id"), text(r, "cursor")));
        rows.collect()
    };
    let mut seen = Vec::new();
    let mut next = page("first: 20").await;
    while let Some((_, cursor)) = next.last().cloned() {
        seen.extend(next.into_iter().map(|(id, _)| id));
        next = page(&format!("first: 20, after: \"{cursor}\"")).await;
    }
    assert_eq!(seen, all);
    let now = server.ledger.projections().position();
    let then = page(&format!("first: 50, at: \"{now}\"")).await;
    assert_eq!(then.len(), 23);
    // One that is wrong hurts no other.
    let query = "{ project(id: \"shop\") { services { instances { good: deployments(first: 1) { id } \
                 bad: deployments(first: 0) { id } } } } }";
    let answer = ask(&server, json!({ "query": query })).await;
    for error in answer["errors"].as_array().unwrap() {
        assert_eq!(error["extensions"]["code"], "invalid_limit", "{error}");
        assert!(error["path"].as_array().unwrap().contains(&json!("bad")));
    }
}

#[tokio::test]
async fn what_is_no_subscription_has_a_limit_of_time_over_a_socket_too() {
    // What does not stand ready at once takes too long.
    let server = server_with(|settings, _| settings.request_timeout = std::time::Duration::ZERO);
    let server = server.await;
    let settings = std::sync::Arc::new(daybook_api::Settings::loopback(7080));
    let commands = Commands::new(server.ledger.clone(), settings);
    let caller = Caller::new(Actor::unauthenticated("ada"));
    let made = commands.create_project(&caller, "shop".parse().unwrap(), None);
    made.await.unwrap();
    let mut socket = socket(&server).await;
    subscribe(&mut socket, "q", "{ projects { environments { name } } }").await;
    let message = text(&mut socket).await;
    assert_eq!(message["type"], "error", "{message}");
    assert_eq!(message["payload"][0]["extensions"]["code"], "timeout");
    subscribe(&mut socket, "s", "subscription { events { position } }").await;
    say(&mut socket, json!({ "type": "ping" })).await;
    let said = [text(&mut socket).await, text(&mut socket).await];
    let mut kinds = said.each_ref().map(|message| message["type"].as_str());
    kinds.sort_unstable();
    assert_eq!(kinds, [Some("next"), Some("pong")], "{said:?}");
}

#[tokio::test]
async fn a_cursor_of_lines_that_there_are_not_is_refused() {
    let server = server().await;
    server.shop().await;
    let id = server.deploy("shop.production.api", "v1").await;
    server.make_live(id).await;
    let build = LineSource::Build(build_of(id));
    server.print(build, LineKind::Build, 1, "one").await;
    let own = LineSource::Deployment(id);
    server.print(own, LineKind::Status, 2, "two").await;
    let path = format!("/api/v1/deployments/{id}/logs");
    for after in ["999999-999999", "2-0", "0-2", "999999"] {
        for query in ["", "&follow=true"] {
            let reply = server.get(&format!("{path}?after={after}{query}")).await;
            reply.refused(409, "position_ahead");
        }
        let request = server.request(Method::GET, &path);
        let request = request.header("Accept", "text/event-stream");
        let reply = server.send(request.header("Last-Event-ID", after)).await;
        reply.refused(409, "position_ahead");
        let query = format!(
            "subscription {{ deployLogLines(id: \"{id}\", after: \"{after}\") {{ text }} }}"
        );
        let mut socket = socket(&server).await;
        subscribe(&mut socket, "l", &query).await;
        let message = text(&mut socket).await.to_string();
        assert!(message.contains("position_ahead"), "{message}");
    }
    for (after, lines) in [("1-1", 0), ("1-0", 1), ("1", 0), ("all-0", 1)] {
        let text = server.get(&format!("{path}?after={after}")).await.text;
        assert_eq!(text.lines().count(), lines, "{after}");
    }
    // One number is enough for lines of one kind.
    server.print(build, LineKind::Build, 3, "three").await;
    let rest = server.get(&format!("{path}?type=build&after=2")).await;
    assert_eq!((rest.status.as_u16(), rest.text.as_str()), (200, ""));
    // A line of the deployment that was found by itself goes on after it.
    let found = server.get("/api/v1/projects/shop/logs?q=two").await.ok();
    assert_eq!(found["lines"][0]["cursor"], "all-1");
}

#[tokio::test]
async fn freezes_configuration_and_measures_are_there_too() {
    let server = server().await;
    server.shop().await;
    let set = data(
        &server,
        r#"mutation { setFreeze(input: { projectId: "shop", environment: "staging", name: "sale",
            rule: { once: { from: "2020-01-01T00:00:00" } }, reason: "sale" }) { name open when } }"#,
    )
    .await;
    assert_eq!(set["setFreeze"]["open"], true);
    let listed = data(
        &server,
        r#"{ freezes(projectId: "shop", environment: "staging") { name reason rule }
            whoami { authentication actor actorKind grants { role projects } } }"#,
    )
    .await;
    assert_eq!(listed["freezes"][0]["reason"], "sale");
    assert_eq!(
        listed["freezes"][0]["rule"]["once"]["from"],
        "2020-01-01T00:00:00"
    );
    assert_eq!(
        listed["whoami"],
        json!({ "authentication": "open", "actor": "anonymous",
            "actorKind": "unauthenticated", "grants": [{ "role": "admin", "projects": null }] })
    );
    let removed = r#"mutation { removeFreeze(projectId: "shop", environment: "staging",
        name: "sale") }"#;
    assert_eq!(data(&server, removed).await["removeFreeze"], "sale");
    let wrong = removed.replace("removeFreeze", "setFreeze").replace(
        "projectId: \"shop\", environment: \"staging\",\n        name: \"sale\"",
        "input: { projectId: \"shop\", environment: \"staging\", name: \"x\", rule: 1 }",
    );
    let wrong = wrong.replace(") }", ") { name } }");
    assert_eq!(
        code(&ask(&server, json!({ "query": wrong })).await),
        "invalid_body"
    );

    let id = server.deploy("shop.production.api", "v1").await;
    server.make_live(id).await;
    let on = r#"projectId: "shop", service: "api", environment: "production""#;
    let scaled = format!("mutation {{ scale(input: {{ {on}, replicas: 3 }}) {{ id state }} }}");
    assert_eq!(data(&server, scaled).await["scale"]["id"], id.to_string());
    let row = server.ledger.projections().deployment(id).unwrap().unwrap();
    let changed = format!(
        "mutation {{ changeConfig(input: {{ {on}, set: [{{ name: \"MODE\", value: \"test\" }}] }}) \
         {{ id phase }} }}"
    );
    let changed = data(&server, changed).await;
    let next: DeploymentId = changed["changeConfig"]["id"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    assert_ne!(next, id);
    let found = server
        .ledger
        .projections()
        .deployment(next)
        .unwrap()
        .unwrap();
    let env = serde_json::to_value(&found.state.request.run).unwrap();
    assert!(env.to_string().contains("\"test\""), "{env}");
    assert!(row.position < found.position);

    let measured = data(
        &server,
        r#"{ dora(projectId: "shop", from: "2000-01-01T00:00:00Z") { position instances {
            instanceId deployments failedChanges leadTime { samples medianMs } counted } }
            approvals { approvals { id } letThrough { id } } templates { name } }"#,
    )
    .await;
    let instance = &measured["dora"]["instances"][0];
    assert_eq!(instance["instanceId"], "shop.production.api");
    assert_eq!(instance["deployments"], 1);
    assert_eq!(instance["leadTime"]["samples"], 1);
    let rest = server
        .get("/api/v1/dora?project=shop&from=2000-01-01T00:00:00Z")
        .await
        .ok();
    assert_eq!(instance["counted"], rest["instances"][0]["counted"]);
    assert_eq!(
        measured["approvals"],
        json!({ "approvals": [], "letThrough": [] })
    );
    for (query, expected) in [
        (
            format!(r#"{{ approval(id: "{id}") {{ hash }} }}"#),
            "no_approval_asked_for",
        ),
        (
            r#"{ template(name: "none") { name } }"#.to_owned(),
            "template_not_found",
        ),
        (
            r#"{ dora(from: "2024-01-02T00:00:00Z", until: "2024-01-01T00:00:00Z") { position } }"#
                .to_owned(),
            "invalid_period",
        ),
        (
            format!(r#"mutation {{ retryDeployment(id: "{id}", clusters: ["no"]) {{ id }} }}"#),
            "illegal_state",
        ),
    ] {
        let answer = ask(&server, json!({ "query": query })).await;
        assert_eq!(code(&answer), expected, "{query}");
    }
}
