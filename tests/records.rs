//! What a name server is to say of hostnames that two clusters serve: two real API servers, whose
//! kubelets and controllers of Gateways are played.

use daybook_testkit::kubernetes::{ControlPlane, Crd, Fate, Gateway, gateway};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::kubernetes::{Cluster, Stage, make_namespace};
use crate::support::{Server, application, until};

const PROJECT: &str = "spread";
const INSTANCE: &str = "spread.production.web";
const HOST: &str = "www.spread.example.com";
const EDGE: &str = "edge-of-spread";

/// A Gateway on a cluster.
fn edge(cluster: &Cluster) -> Option<(Client, Gateway)> {
    cluster.runtime.block_on(async {
        let client = cluster.plane.client().await;
        for crd in [Crd::Gateway, Crd::HttpRoute, Crd::DnsEndpoint] {
            if !crd.install(&client).await {
                return None;
            }
        }
        make_namespace(&client, EDGE).await;
        let gateway = Gateway::start(client.clone(), EDGE, "public", |_| None).await;
        Some((client, gateway))
    })
}

/// One kubeconfig for both: the context `test` of the one, and `bergen` for the other's.
pub(crate) fn both(oslo: &Cluster, bergen: &Cluster) -> Value {
    let read = |cluster: &Cluster| -> Value {
        let text = std::fs::read_to_string(cluster.plane.kubeconfig()).unwrap();
        serde_saphyr::from_str(&text).unwrap()
    };
    let (mut all, other) = (read(oslo), read(bergen));
    for list in ["clusters", "users", "contexts"] {
        let mut added = other[list][0].clone();
        added["name"] = json!("bergen");
        if list == "contexts" {
            added["context"] = json!({ "cluster": "bergen", "user": "bergen" });
        }
        all[list].as_array_mut().unwrap().push(added);
    }
    all
}

/// What is known of the hostname's records.
fn records(server: &Server) -> Value {
    let path = format!("/api/v1/projects/{PROJECT}/records?hostname={HOST}");
    server.read(&path)["hostnames"][0].clone()
}

#[test]
fn the_records_of_a_hostname_follow_its_clusters_their_gateways_and_its_policy() {
    let Some(stage) = Stage::start(PROJECT) else {
        return;
    };
    let Some(plane) = ControlPlane::start() else {
        return;
    };
    let (oslo, bergen) = (
        &stage.cluster,
        Cluster::on(Box::leak(Box::new(plane)), PROJECT),
    );
    let Some((in_oslo, _oslo)) = edge(oslo) else {
        return;
    };
    let Some((in_bergen, _bergen)) = edge(&bergen) else {
        return;
    };
    let reach = |cluster: &Cluster, client: &Client, kind, value| {
        let addresses = [(kind, value)];
        let told = gateway::reach(client.clone(), EDGE, "public", &addresses);
        cluster.runtime.block_on(told);
    };
    reach(oslo, &in_oslo, "IPAddress", "203.0.113.1");
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = folder.path().join("kubeconfig");
    std::fs::write(&kubeconfig, both(oslo, &bergen).to_string()).unwrap();
    let settings = stage.settings_with(&kubeconfig);
    let settings = settings.arg("--kubernetes").arg("bergen");
    let settings = settings
        .arg("--kubernetes-gateway")
        .arg(format!("{EDGE}/public"));
    let server = Server::start(settings);
    server.ok(&["project", "create", PROJECT]);
    let env = ["env", "create", PROJECT, "production", "--live"];
    server.ok(&[&env[..], &["--cluster", "oslo", "--cluster", "bergen"]].concat());
    let port = stage.app.addr.port().to_string();
    let source = application("--text unused");
    server.service(PROJECT, "web", &source, &["--port", &port]);
    server.deploy(INSTANCE, &[]);
    server.ok(&["domain", "add", INSTANCE, HOST]);

    // The Gateway of the one has an address, the other's has none yet.
    let found = until("what is known of both", || {
        let found = records(&server);
        let clusters = &found["clusters"];
        let said = clusters["oslo"]["addresses"] == json!(["203.0.113.1"])
            && clusters["bergen"]["addresses"] == json!([])
            && clusters["bergen"]["ready"] == true;
        said.then_some(found)
    });
    assert_eq!(found["endpoints"][0]["targets"], json!(["203.0.113.1"]));
    assert_eq!(found["notes"][0]["reason"], "AddressUnknown", "{found}");
    let list = ["routes", "records", PROJECT];
    let table = server.ok(&list).stdout;
    let unknown = |line: &str| line.contains("unknown") && line.contains("bergen");
    assert!(table.lines().any(unknown), "{table}");
    assert!(table.contains("localhost have no records"), "{table}");

    // It comes, without any switch.
    let before = server.read(&format!("/api/v1/projects/{PROJECT}/routes"))["table"].clone();
    reach(&bergen, &in_bergen, "IPAddress", "203.0.113.2");
    let all = json!(["203.0.113.1", "203.0.113.2"]);
    until("both addresses", || {
        let found = records(&server);
        (found["endpoints"][0]["targets"] == all && found["notes"] == json!([])).then_some(())
    });
    let after = server.read(&format!("/api/v1/projects/{PROJECT}/routes"));
    assert_eq!(after["table"], before);

    // What external-dns is given is taken as it is, field by field.
    let weights = ["weighted", "oslo=90", "bergen=10"];
    server.ok(&[&["routes", "policy", INSTANCE], &weights[..]].concat());
    let objects = ["--format", "dnsendpoint", "--ttl", "30"];
    let text = server.ok(&[&list[..], &objects].concat()).stdout;
    let object: Value = serde_saphyr::from_str(&text).unwrap();
    let endpoints = object["spec"]["endpoints"].as_array().unwrap();
    let weight = |n: usize| endpoints[n]["providerSpecific"][0].clone();
    assert_eq!(endpoints.len(), 2, "{text}");
    assert_eq!(weight(0), json!({ "name": "aws/weight", "value": "10" }));
    assert_eq!(weight(1), json!({ "name": "aws/weight", "value": "90" }));
    let kind = GroupVersionKind::gvk("externaldns.k8s.io", "v1alpha1", "DNSEndpoint");
    let resource = ApiResource::from_gvk(&kind);
    let api: Api<DynamicObject> = Api::namespaced_with(in_oslo, EDGE, &resource);
    let parsed: DynamicObject = serde_json::from_value(object.clone()).unwrap();
    let created = oslo.runtime.block_on(async {
        let strict = PostParams {
            field_manager: Some("tests".to_owned()),
            ..PostParams::default()
        };
        api.create(&strict, &parsed).await.unwrap()
    });
    assert_eq!(created.data["spec"], object["spec"]);
    assert_eq!(endpoints[0]["recordTTL"], 30);

    // Whoever is first and has nothing ready is not led to.
    server.ok(&["routes", "policy", INSTANCE, "failover", "bergen", "oslo"]);
    let zone = || {
        let zone = [&list[..], &["--format", "zone"]].concat();
        let text = server.ok(&zone).stdout;
        let lines = text.lines().filter(|line| line.starts_with(HOST));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let line = |address: &str| format!("{HOST}. 60 IN A {address}");
    until("the first one", || {
        (zone() == [line("203.0.113.2")]).then_some(())
    });
    *bergen.fate.lock().unwrap() = Fate::NoImage("manifest unknown".to_owned());
    let pods: Api<Pod> = Api::namespaced(in_bergen.clone(), "spread--production");
    let remove_all = || {
        let (params, all) = (DeleteParams::default(), ListParams::default());
        let gone = pods.delete_collection(&params, &all);
        bergen.runtime.block_on(gone).unwrap();
    };
    remove_all();
    until("the next one comes", || {
        (zone() == [line("203.0.113.1")]).then_some(())
    });
    *bergen.fate.lock().unwrap() = Fate::Ready {
        ip: "127.0.0.1".to_owned(),
    };
    remove_all();
    until("the first one is back", || {
        (zone() == [line("203.0.113.2")]).then_some(())
    });

    // A load balancer has a name, and a hostname has not both.
    reach(&bergen, &in_bergen, "Hostname", "lb.example.net");
    until("it is an alias", || {
        let alias = format!("{HOST}. 60 IN CNAME lb.example.net.");
        (zone() == [alias]).then_some(())
    });
    server.ok(&["routes", "policy", INSTANCE, "simple"]);
    let found = records(&server);
    assert_eq!(found["endpoints"], json!([]));
    assert_eq!(found["notes"][0]["reason"], "MixedAddresses", "{found}");

    // What makes no sense is refused.
    for (flags, code) in [
        (["--provider", "aws"], "invalid_provider"),
        (["--region", "oslo"], "invalid_cluster_value"),
        (["--health-check", "oslo=a b"], "invalid_cluster_value"),
        (["--hostname", "no name"], "invalid_hostname"),
    ] {
        let zone = ["--format", "zone", "--output", "json"];
        let done = server.cli(&[&list[..], &zone, &flags].concat());
        assert_ne!(done.code, 0, "{done:?}");
        assert_eq!(done.error()["code"], code, "{done:?}");
    }
    server.check_replay();
}
