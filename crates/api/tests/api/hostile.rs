use reqwest::Method;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::*;

/// Sends bytes as they are and returns what comes back.
async fn raw(server: &Server, bytes: &[u8]) -> String {
    let address = server.base.strip_prefix("http://").unwrap();
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    tokio::time::timeout(PATIENCE, read).await.unwrap().unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn bad_bodies_are_refused() {
    let server = server().await;
    let send = async |body: &str, media_type: &str| {
        let request = server
            .request(Method::POST, "/api/v1/projects")
            .header("Content-Type", media_type)
            .body(body.to_owned());
        server.send(request).await
    };
    let json = "application/json";
    send("{\"name\":", json)
        .await
        .refused(400, "malformed_json");
    send("\u{0}", json).await.refused(400, "malformed_json");
    send("{} {}", json).await.refused(400, "malformed_json");
    send(&"[".repeat(100_000), json)
        .await
        .refused(400, "malformed_json");
    send("", json).await.refused(400, "body_missing");
    send("[]", json).await.refused(422, "invalid_body");
    send("{}", json).await.refused(422, "invalid_body");
    send("{\"name\": 7}", json)
        .await
        .refused(422, "invalid_body");
    send("{\"name\": \"a\", \"name\": \"b\"}", json)
        .await
        .refused(422, "invalid_body");
    let unknown = send("{\"name\": \"a\", \"nmae\": 1}", json).await;
    let problem = unknown.refused(422, "invalid_body");
    assert!(problem["detail"].as_str().unwrap().contains("nmae"));
    send("{\"name\": \"a\"}", "text/plain")
        .await
        .refused(415, "unsupported_media_type");
    send("{\"name\": \"a\"}", "")
        .await
        .refused(415, "unsupported_media_type");
    let huge = format!("{{\"name\": \"{}\"}}", "x".repeat(300_000));
    send(&huge, json).await.refused(413, "body_too_large");
    // The same without saying beforehand how long it is.
    let chunks =
        futures_util::stream::iter((0..64).map(|_| Ok::<_, std::io::Error>(vec![b' '; 8192])));
    let request = server
        .request(Method::POST, "/api/v1/projects")
        .header("Content-Type", json)
        .body(reqwest::Body::wrap_stream(chunks));
    server.send(request).await.refused(413, "body_too_large");
    send("{\"name\": \"a\\u0000\"}", json)
        .await
        .refused(422, "invalid_project_name");
    let env = "/api/v1/projects/shop/environments";
    let extra = server
        .post(env, json!({ "name": "a", "clusterz": [] }))
        .await;
    extra.refused(422, "invalid_body");
    // An event too large for the ledger.
    server.shop().await;
    let spec = json!({ "run": { "env": { "A": "x".repeat(70_000) } } });
    server
        .put("/api/v1/projects/shop/services/api", spec)
        .await
        .refused(422, "event_too_large");
}

#[tokio::test]
async fn who_reads_nothing_before_all_is_sent_learns_why_it_is_refused() {
    let server = server().await;
    let large = vec![b' '; 10 * 1024 * 1024];
    let head = |path: &str, more: &str| {
        format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Connection: close\r\n{more}\r\n\r\n"
        )
    };
    let length = format!("Content-Length: {}", large.len());
    // It is refused by its length, or by what it is sent to, before anything of it is read.
    for (path, status, code) in [
        ("/api/v1/projects", "413", "body_too_large"),
        ("/graphql", "413", "body_too_large"),
        ("/api/v1/nothing", "404", "no_such_address"),
    ] {
        let all = [head(path, &length).as_bytes(), &large].concat();
        let answer = raw(&server, &all).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{path}: {answer}"
        );
        assert!(answer.contains(code), "{path}: {answer}");
    }
    // Without a length it is found out in the middle.
    let mut chunked = head("/api/v1/projects", "Transfer-Encoding: chunked").into_bytes();
    for chunk in large.chunks(64 * 1024) {
        chunked.extend(format!("{:x}\r\n", chunk.len()).into_bytes());
        chunked.extend(chunk);
        chunked.extend(b"\r\n");
    }
    chunked.extend(b"0\r\n\r\n");
    let answer = raw(&server, &chunked).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    // Nobody waits for what is not sent before it is asked for, nor for what would never end.
    for more in [
        format!("{length}\r\nExpect: 100-continue"),
        "Content-Length: 1000000000000".to_owned(),
    ] {
        let answer = raw(&server, head("/api/v1/projects", &more).as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    }
    // What was read to its end leaves the connection as good as it was.
    let first = head("/api/v1/projects", &length).replace("Connection: close\r\n", "");
    let second = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    let both = raw(&server, &[first.as_bytes(), &large, second].concat()).await;
    assert!(both.starts_with("HTTP/1.1 413 "), "{both}");
    assert!(both.contains("HTTP/1.1 200 OK"), "{both}");
}

#[tokio::test]
async fn bad_addresses_are_refused() {
    let server = server().await;
    server.shop().await;
    for (path, status, code) in [
        ("/page/none.js", 404, "no_such_address"),
        ("/api/v1", 404, "no_such_address"),
        ("/api/v1/deployments/", 404, "no_such_address"),
        ("/api/v2/projects", 404, "no_such_address"),
        ("/api/v1/deployments/x", 422, "invalid_deployment_id"),
        ("/api/v1/deployments/%00", 422, "invalid_deployment_id"),
        ("/api/v1/deployments/%ff", 400, "invalid_path"),
        ("/api/v1/projects/UPPER", 422, "invalid_project_name"),
        (
            "/api/v1/projects/..%2f..%2fetc",
            422,
            "invalid_project_name",
        ),
        ("/api/v1/instances/a.b", 422, "invalid_instance_id"),
        ("/api/v1/projects?x=1", 400, "invalid_query"),
        ("/api/v1/deployments?instance=1", 400, "invalid_query"),
        ("/api/v1/deployments?limit=0", 400, "invalid_limit"),
        ("/api/v1/deployments?limit=501", 400, "invalid_limit"),
        ("/api/v1/deployments?limit=-1", 400, "invalid_query"),
        (
            "/api/v1/deployments?limit=99999999999",
            400,
            "invalid_query",
        ),
        ("/api/v1/deployments?cursor=x", 400, "invalid_cursor"),
        (
            "/api/v1/deployments?cursor=c1-ffffffffffffffffff",
            400,
            "invalid_cursor",
        ),
        ("/api/v1/deployments?status=sleeping", 422, "unknown_status"),
        (
            "/api/v1/deployments?instance_id=a.b.c&project=a",
            422,
            "instance_ambiguous",
        ),
        ("/api/v1/history?cursor=%ff", 400, "invalid_cursor"),
        ("/api/v1/audit?from=yesterday", 400, "invalid_time"),
        ("/api/v1/audit?correlation=1", 400, "invalid_correlation"),
        ("/api/v1/audit?deployment=1", 422, "invalid_deployment_id"),
        ("/api/v1/state?cursor=1", 400, "invalid_cursor"),
        ("/api/v1/state?limit=0", 400, "invalid_limit"),
        ("/api/v1/state?at=yesterday", 400, "invalid_at"),
        ("/api/v1/history?at=-1", 400, "invalid_at"),
        // What has not come is refused with one code, however it is named.
        ("/api/v1/state?at=99999999", 409, "position_ahead"),
        ("/api/v1/history?at=99999999", 409, "position_ahead"),
        (
            "/api/v1/state?at=2999-01-01T00:00:00Z",
            409,
            "position_ahead",
        ),
        (
            "/api/v1/history?at=2999-01-01T00:00:00Z",
            409,
            "position_ahead",
        ),
        ("/api/v1/events?after=-1", 400, "invalid_position"),
        (
            "/api/v1/events?after=18446744073709551616",
            400,
            "invalid_position",
        ),
        (
            "/api/v1/events?after=18446744073709551615",
            409,
            "position_ahead",
        ),
        ("/api/v1/events?kind=x", 422, "unknown_kind"),
        ("/api/v1/events?kind=.", 422, "unknown_kind"),
        ("/api/v1/events/x", 400, "invalid_position"),
        (
            "/api/v1/events/18446744073709551615",
            404,
            "event_not_found",
        ),
        ("/metrics?x", 400, "invalid_query"),
    ] {
        let reply = server.get(path).await;
        assert_eq!(reply.status.as_u16(), status, "{path}: {reply:?}");
        reply.refused(status, code);
    }
    // The largest cursor that can be written is simply past the end.
    let list = server
        .get("/api/v1/deployments?cursor=c1-ffffffffffffffff")
        .await;
    assert_eq!(list.status, 200);
    let request = server.request(Method::PATCH, "/api/v1/projects");
    let refused = server.send(request).await;
    assert!(
        refused.header("allow").unwrap().contains("POST"),
        "{refused:?}"
    );
    refused.refused(405, "method_not_allowed");
}

#[tokio::test]
async fn bad_headers_are_refused() {
    let server = server().await;
    let long = "x".repeat(300);
    for (name, value, code) in [
        ("Daybook-Actor", "", "invalid_actor"),
        ("Daybook-Actor", "a b", "invalid_actor"),
        ("Daybook-Actor", "../etc", "invalid_actor"),
        ("Daybook-Actor", long.as_str(), "invalid_actor"),
        ("Idempotency-Key", "", "invalid_idempotency_key"),
        ("Idempotency-Key", long.as_str(), "invalid_idempotency_key"),
        ("Daybook-Min-Position", "x", "invalid_position"),
        ("Daybook-Min-Position", "-1", "invalid_position"),
        ("Daybook-Min-Position", "1.5", "invalid_position"),
    ] {
        let request = server
            .request(Method::POST, "/api/v1/projects")
            .header(name, value)
            .json(&json!({ "name": "a" }));
        server.send(request).await.refused(400, code);
    }
}

#[tokio::test]
async fn web_pages_of_others_do_not_reach_the_server() {
    let server = server_with(|settings, _| settings.hosts = vec!["daybook.example".into()]).await;
    let with_host = async |host: &str| {
        let request = server.request(Method::GET, "/healthz").header("Host", host);
        server.send(request).await
    };
    with_host("evil.example")
        .await
        .refused(403, "host_not_allowed");
    with_host("127.0.0.1.evil.example:7070")
        .await
        .refused(403, "host_not_allowed");
    assert_eq!(with_host("localhost:1").await.status, 200);
    assert_eq!(with_host("[::1]:7070").await.status, 200);
    assert_eq!(with_host("daybook.example").await.status, 200);
    let answer = raw(
        &server,
        b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
    let answer = raw(
        &server,
        b"GET http://evil.example/healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");

    let body = json!({ "name": "a" });
    let from = |origin: &str| {
        server
            .request(Method::POST, "/api/v1/projects")
            .header("Origin", origin)
            .json(&body)
    };
    server
        .send(from("http://evil.example"))
        .await
        .refused(403, "cross_origin");
    server.send(from("null")).await.refused(403, "cross_origin");
    server
        .send(from("http://localhost:9999"))
        .await
        .refused(403, "cross_origin");
    let own = server.send(from(&server.base)).await;
    assert_eq!(own.status, 201);
    // And no page may read what it asks for.
    assert_eq!(own.header("access-control-allow-origin"), None);
}

#[tokio::test]
async fn garbage_on_the_wire_ends_the_connection_only() {
    let server = server().await;
    for bytes in [
        &b"\x16\x03\x01\x02\x00\x01\x00"[..],
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /api/v1/projects HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"\r\n\r\n\r\n\0\0\0\0\r\n\r\n",
    ] {
        let answer = raw(&server, bytes).await;
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 400"),
            "{answer}"
        );
    }
    assert_eq!(server.get("/healthz").await.status, 200);
}
