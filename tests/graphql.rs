//! GraphQL through the binary: a deployment that is asked for, and followed over a real WebSocket
//! until it is live, although the server dies in between.

use futures_util::{SinkExt, StreamExt};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use crate::support::{PATIENCE, Server, Settings, application, request};

/// A subscription over a socket of its own.
struct Subscribed(WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Subscribed {
    async fn to(server: &Server, query: &str) -> Self {
        let url = format!("{}/graphql", server.url().replacen("http", "ws", 1));
        let mut request = url.into_client_request().unwrap();
        let protocol = "graphql-transport-ws".parse().unwrap();
        request
            .headers_mut()
            .insert("Sec-WebSocket-Protocol", protocol);
        let (socket, _) = tokio_tungstenite::connect_async(request).await.unwrap();
        let mut subscribed = Self(socket);
        subscribed.say(json!({ "type": "connection_init" })).await;
        let payload = json!({ "query": query });
        let subscribe = json!({ "type": "subscribe", "id": "1", "payload": payload });
        subscribed.say(subscribe).await;
        subscribed
    }

    async fn say(&mut self, message: Value) {
        let message = Message::text(message.to_string());
        self.0.send(message).await.unwrap();
    }

    /// The next data; none at the end, or where the server is gone.
    async fn next(&mut self) -> Option<Value> {
        loop {
            let message = tokio::time::timeout(PATIENCE, self.0.next())
                .await
                .expect("nothing came");
            let Some(Ok(Message::Text(text))) = message else {
                match message {
                    Some(Ok(Message::Ping(_))) => continue,
                    _ => return None,
                }
            };
            let mut message: Value = serde_json::from_str(&text).unwrap();
            match message["type"].as_str().unwrap() {
                "connection_ack" => {}
                "next" => {
                    let payload = &mut message["payload"];
                    assert_eq!(payload.get("errors"), None, "{payload}");
                    return Some(payload["data"].take());
                }
                "complete" => return None,
                _ => panic!("{message}"),
            }
        }
    }
}

#[test]
fn a_deployment_is_asked_for_and_followed_although_the_server_dies_in_between() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut server = Server::start(Settings::default());
    let source = application("--text one --slow-start 1500");
    server.define("shop", "web", &source, &[]);
    let query = r#"mutation { deploy(input: { projectId: "shop", service: "web",
        environment: "production" }) { id phase } }"#;
    let url = format!("{}/graphql", server.url());
    let body = json!({ "query": query });
    let answer = request(Method::POST, &url, &[("Daybook-Actor", "ada")], Some(&body)).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    let deploy = answer.json()["data"]["deploy"].clone();
    assert_eq!(deploy["phase"], "QUEUED");
    let id = deploy["id"].as_str().unwrap().to_owned();
    let status = |after: &str| {
        format!("subscription {{ deployStatus(id: \"{id}\"{after}) {{ phase position }} }}")
    };
    let logs = |after: &str| {
        format!("subscription {{ deployLogLines(id: \"{id}\"{after}) {{ cursor text }} }}")
    };

    // Until it is being deployed.
    let (mut phases, mut positions, mut lines) = (Vec::new(), Vec::new(), Vec::new());
    let line = |seen: Value| {
        let text = |name: &str| seen["deployLogLines"][name].as_str().unwrap().to_owned();
        (text("cursor"), text("text"))
    };
    let (mut position, mut cursor) = (Value::Null, Value::Null);
    runtime.block_on(async {
        let mut subscribed = Subscribed::to(&server, &status("")).await;
        while phases.last().is_none_or(|p| p != "DEPLOYING") {
            let seen = subscribed.next().await.expect("it has not settled");
            phases.push(seen["deployStatus"]["phase"].as_str().unwrap().to_owned());
            position = seen["deployStatus"]["position"].clone();
            positions.push(position.as_u64().unwrap());
        }
        let mut subscribed = Subscribed::to(&server, &logs("")).await;
        while lines.len() < 2 {
            let seen = subscribed.next().await.expect("it has not settled");
            cursor = seen["deployLogLines"]["cursor"].clone();
            lines.push(line(seen));
        }
    });
    server.kill();
    server.restart();
    // And from there on until it has succeeded, nothing missed and nothing twice.
    runtime.block_on(async {
        let query = status(&format!(", after: {position}"));
        let mut subscribed = Subscribed::to(&server, &query).await;
        while let Some(seen) = subscribed.next().await {
            phases.push(seen["deployStatus"]["phase"].as_str().unwrap().to_owned());
            positions.push(seen["deployStatus"]["position"].as_u64().unwrap());
        }
        let query = logs(&format!(", after: {cursor}"));
        let mut subscribed = Subscribed::to(&server, &query).await;
        while let Some(seen) = subscribed.next().await {
            lines.push(line(seen));
        }
    });
    assert!(positions.is_sorted_by(|a, b| a < b), "{positions:?}");
    phases.dedup();
    assert_eq!(phases.last().unwrap(), "SUCCEEDED");
    let order = [
        "QUEUED",
        "CLONING",
        "BUILDING",
        "PUSHING",
        "DEPLOYING",
        "SUCCEEDED",
    ];
    let mut rest = order.iter();
    for phase in &phases {
        assert!(rest.any(|p| p == phase), "{phases:?}");
    }
    // The lines are those that REST has, in the same order.
    let text = request(
        Method::GET,
        &format!("{}/api/v1/deployments/{id}/logs", server.url()),
        &[("Accept", "application/x-ndjson")],
        None,
    );
    let text = text.unwrap().body;
    let kept: Vec<(String, String)> = text
        .lines()
        .map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            let text = |name: &str| line[name].as_str().unwrap().to_owned();
            (text("cursor"), text("text"))
        })
        .collect();
    assert!(lines.len() > 2, "{lines:?}");
    // What was said after it had settled comes to nobody who followed.
    assert!(
        kept.starts_with(&lines),
        "{lines:?} is not how {kept:?} begins"
    );
    let history = r#"{ project(id: "shop") { services { instances { imageTag deployments {
        active message } } } } audit(filter: { kind: "deployment.requested.v1" }) { entries {
        actor signed } } }"#;
    let url = format!("{}/graphql", server.url());
    let shown = request(Method::POST, &url, &[], Some(&json!({ "query": history })));
    let shown = shown.unwrap().json();
    let instance = &shown["data"]["project"]["services"][0]["instances"][0];
    assert_eq!(instance["deployments"][0]["active"], true, "{shown}");
    let entry = &shown["data"]["audit"]["entries"][0];
    assert_eq!(entry["actor"], "ada");
    assert_eq!(entry["signed"], true);
}
