//! What programs of others make of the interfaces: clients that generators make of the OpenAPI
//! document, the SDK of CloudEvents, NATS' own client, the reference implementation of GraphQL, the
//! libraries of DSSE and in-toto, the schema that OpenAPI documents have, and a fuzzer of them.
//! `tools/judges-python` and `tools/judges-node` pin them.

use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use daybook_store::tlog::Envelope;
use daybook_testkit::nats::{NatsBinary, NatsServer};
use reqwest::Method;
use serde_json::Value;

use crate::support::{Server, Settings, request, site};

/// The header that says what position an answer needs.
const WAITS: &str = "#/components/parameters/MinPosition";
const INSTANCE: &str = "shop.production.web";
/// What git sends, and what it is answered, is of git.
const NOT_FUZZED: &str = "^/(git|uploads)/";
/// What the fuzzer does.
const PHASES: &str = "examples,coverage,fuzzing";
/// How many cases of each operation it makes up.
const CASES: &str = "5";

/// What an environment variable names, or nothing, after saying so.
fn judge(variable: &str, what: &str) -> Option<PathBuf> {
    let set = std::env::var_os(variable).filter(|value| !value.is_empty());
    if set.is_none() {
        daybook_testkit::left_out(format!("{what}: {variable} names none"));
    }
    set.map(PathBuf::from)
}

fn python() -> Option<PathBuf> {
    judge("DAYBOOK_JUDGES_PYTHON", "the judges in Python")
}

/// Where the packages of Node.js are that judge.
pub fn node() -> Option<PathBuf> {
    judge("DAYBOOK_JUDGES_NODE", "the judges of Node.js").map(|folder| folder.join("node_modules"))
}

fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
}

/// Runs it to a good end and returns what it said.
#[track_caller]
fn ok(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}\n{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    said
}

/// The OpenAPI document, as the server serves it.
fn document(server: &Server, folder: &Path) -> PathBuf {
    let path = folder.join("openapi.json");
    std::fs::write(&path, server.read("/openapi.json").to_string()).unwrap();
    path
}

#[test]
fn a_generated_client_in_python_deploys() {
    let Some(python) = python() else { return };
    let server = Server::start(Settings::default());
    let folder = tempfile::tempdir().unwrap();
    let client = folder.path().join("client");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut generate = Command::new(&python);
    generate
        .args(["-m", "openapi_python_client", "generate", "--path"])
        .arg(document(&server, folder.path()))
        .arg("--output-path")
        .arg(&client)
        // It puts its own work in order with a program beside the interpreter.
        .env(
            "PATH",
            format!("{}:{path}", python.parent().unwrap().display()),
        );
    let output = generate.output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(!said.contains("Unable to process schema"), "{said}");
    let source = site("one");
    let said = ok(Command::new(&python)
        .arg(file("tests/judges/client.py"))
        .args([server.url(), source.url()])
        .env("PYTHONPATH", &client));
    assert_eq!(said, "deployed by a client that was generated\n");
}

#[test]
fn a_generated_client_in_typescript_deploys() {
    let Some(modules) = node() else { return };
    let server = Server::start(Settings::default());
    let folder = tempfile::tempdir().unwrap();
    ok(Command::new("node")
        .arg(modules.join("openapi-typescript/bin/cli.js"))
        .arg(document(&server, folder.path()))
        .args(["--default-non-nullable", "false", "-o"])
        .arg(folder.path().join("daybook.d.ts")));
    std::os::unix::fs::symlink(&modules, folder.path().join("node_modules")).unwrap();
    std::fs::copy(
        file("tests/judges/client.ts"),
        folder.path().join("client.ts"),
    )
    .unwrap();
    ok(Command::new("node")
        .current_dir(folder.path())
        .arg("node_modules/typescript/bin/tsc")
        .args(["--strict", "--module", "commonjs", "--target", "es2022"])
        .args(["--skipLibCheck", "--types", "node", "client.ts"]));
    let source = site("one");
    let said = ok(Command::new("node")
        .current_dir(folder.path())
        .arg("client.js")
        .args([server.url(), source.url()]));
    assert_eq!(said, "deployed by a client that was generated\n");
}

#[test]
fn the_reference_implementation_of_graphql_takes_the_schema() {
    let Some(modules) = node() else { return };
    let judge = file("tests/judges/sdl.cjs");
    ok(Command::new("node")
        .arg(&judge)
        .arg(file("schemas/graphql/daybook.graphql"))
        .env("NODE_PATH", &modules));
    let folder = tempfile::tempdir().unwrap();
    let bad = folder.path().join("bad.graphql");
    std::fs::write(&bad, "type Query { lost: Nothing }").unwrap();
    let refused = Command::new("node")
        .arg(judge)
        .arg(bad)
        .env("NODE_PATH", &modules)
        .output()
        .unwrap();
    assert!(!refused.status.success(), "it judges nothing");
}

#[test]
fn the_sdk_of_cloudevents_and_the_client_of_nats_read_the_ledger() {
    let Some(python) = python() else { return };
    let Some(binary) = NatsBinary::newest().or_else(|| NatsBinary::installed().pop()) else {
        daybook_testkit::left_out("the client of NATS: there is no nats-server");
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let nats = runtime.block_on(NatsServer::start(&binary));
    let server = Server::start(Settings::default().arg("--nats").arg(nats.url()));
    let source = site("one");
    server.define("shop", "web", &source, &[]);
    server.deploy(INSTANCE, &[]);
    let said = ok(Command::new(python)
        .arg(file("tests/judges/events.py"))
        .args([server.url(), nats.url()]));
    assert!(said.ends_with("CloudEvents\n"), "{said}");
}

#[test]
fn the_libraries_of_in_toto_verify_an_attestation() {
    let Some(python) = python() else { return };
    let server = Server::start(Settings::default());
    let source = site("one");
    server.define("shop", "web", &source, &[]);
    let id = server.deploy(INSTANCE, &[]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("attestation.json");
    let named = file.to_str().unwrap();
    server.ok(&["audit", "attestation", &id, "--out", named]);
    let url = format!("{}/tlog/keys", server.url());
    let keys = request(Method::GET, &url, &[], None).unwrap().body;
    let key = keys.lines().next().unwrap();
    let judge = |file: &Path| {
        let mut command = Command::new(&python);
        let judge = crate::judged::file("tests/judges/attestation.py");
        command.arg(judge).arg(file).arg(key);
        command
    };
    let said: Value = serde_json::from_str(&ok(&mut judge(&file))).unwrap();
    let kind = "https://daybook.dev/attestation/deployment/v1";
    assert_eq!(said["predicateType"], kind);
    let state = server.deployment(&id);
    let digest = state["image"]["digest"].as_str().unwrap();
    let digest = digest.trim_start_matches("sha256:");
    assert_eq!(said["subjects"][0]["sha256"], digest, "{said}");
    assert_eq!(said["subjects"][1]["gitCommit"], state["commit"], "{said}");

    // They do not take everything.
    let mut envelope: Envelope = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let mut statement = BASE64.decode(&envelope.payload).unwrap();
    let end = statement.iter().rposition(u8::is_ascii_hexdigit).unwrap();
    statement[end] = if statement[end] == b'0' { b'1' } else { b'0' };
    envelope.payload = BASE64.encode(statement);
    let changed = folder.path().join("changed.json");
    std::fs::write(&changed, serde_json::to_vec(&envelope).unwrap()).unwrap();
    let refused = judge(&changed).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success(), "they judge nothing");
    assert!(said.contains("VerificationError"), "{said}");
}

#[test]
fn the_document_is_what_the_openapi_initiative_calls_one() {
    let Some(python) = python() else { return };
    let server = Server::start(Settings::default());
    let folder = tempfile::tempdir().unwrap();
    let served = document(&server, folder.path());
    let judge = |document: &Path| {
        let mut command = Command::new(&python);
        command.arg(file("tests/judges/document.py")).arg(document);
        command
    };
    ok(&mut judge(&served));
    ok(&mut judge(&file("schemas/openapi.json")));

    // It does not take everything: neither what the schema refuses, nor what is no schema, nor a
    // reference to nothing.
    let document: Value = serde_json::from_slice(&std::fs::read(&served).unwrap()).unwrap();
    let health = "/components/schemas/Health";
    let nowhere = serde_json::json!({ "$ref": "#/components/schemas/Nowhere" });
    for (pointer, wrong) in [
        ("/info/title", Value::Null),
        (health, serde_json::json!({ "type": "objekt" })),
        (health, nowhere),
    ] {
        let mut bad = document.clone();
        *bad.pointer_mut(pointer).unwrap() = wrong;
        let path = folder.path().join("bad.json");
        std::fs::write(&path, bad.to_string()).unwrap();
        let refused = judge(&path).output().unwrap();
        assert!(!refused.status.success(), "{pointer}: it judges nothing");
    }
}

#[test]
fn what_the_fuzzer_is_not_asked_for_is_said() {
    let architecture = std::fs::read_to_string(file("ARCHITECTURE.md")).unwrap();
    let (_, said) = architecture.split_once("### Judges of others").unwrap();
    let (said, _) = said.split_once("### ").unwrap();
    let config = std::fs::read_to_string(file("tests/judges/schemathesis.toml")).unwrap();
    let config: toml::Table = toml::from_str(&config).unwrap();
    let taken = &config["checks"]["positive_data_acceptance"]["expected-statuses"];
    let statuses = taken.as_array().unwrap().iter();
    let statuses = statuses.filter_map(|status| status.as_integer());
    let mut wanted: Vec<String> = statuses.map(|status| status.to_string()).collect();
    assert!(wanted.len() > 5, "{wanted:?}");
    // A table has its bars escaped.
    let not_fuzzed = NOT_FUZZED.replace('|', "\\|");
    wanted.extend(
        [
            not_fuzzed.as_str(),
            PHASES,
            CASES,
            "follow",
            "Daybook-Min-Position",
        ]
        .map(str::to_owned),
    );
    for wanted in wanted {
        assert!(said.contains(&format!("`{wanted}`")), "{wanted}: {said}");
    }
    // No other check is turned off, and no other part of what it judges changed.
    assert_eq!(config.len(), 1, "{config:?}");
    assert_eq!(config["checks"].as_table().unwrap().len(), 1, "{config:?}");
}

#[test]
fn a_fuzzer_finds_that_the_server_does_what_its_document_says() {
    let Some(python) = python() else { return };
    let server = Server::start(Settings::default());
    let source = site("one");
    server.define("shop", "web", &source, &[]);
    server.deploy(INSTANCE, &[]);
    let folder = tempfile::tempdir().unwrap();
    let document = document(&server, folder.path());
    // What is followed never ends, and a position that is not reached yet is waited for.
    let mut asked: Value = serde_json::from_slice(&std::fs::read(&document).unwrap()).unwrap();
    let operations = asked["paths"].as_object_mut().unwrap().values_mut();
    for operation in operations.flat_map(|o| o.as_object_mut().unwrap().values_mut()) {
        let waits = |p: &Value| p["name"] == "follow" || p["$ref"] == WAITS;
        let parameters = operation["parameters"].as_array_mut();
        parameters.unwrap().retain(|p| !waits(p));
    }
    std::fs::write(&document, asked.to_string()).unwrap();
    ok(Command::new(python)
        .current_dir(folder.path())
        .args(["-m", "schemathesis.cli", "--config-file"])
        .arg(file("tests/judges/schemathesis.toml"))
        .env("SCHEMATHESIS_HOOKS", "bodies")
        .env("PYTHONPATH", file("tests/judges"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .args(["run", "openapi.json", "--url", &server.url()])
        .args(["--no-color", "--continue-on-failure"])
        .args(["--exclude-path-regex", NOT_FUZZED])
        .args(["--phases", PHASES, "-n", CASES])
        .args(["--request-timeout", "30", "--generation-deterministic"]));
}
