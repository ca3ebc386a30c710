//! Credentials that the API server does not take any more, or not yet.

use serde_json::Value;

use super::*;

/// How long a token file that was renewed may take to be read again: a minute, and what a busy
/// machine adds.
const READ_AGAIN: Duration = Duration::from_secs(240);

/// A kubeconfig of the control plane whose only user is this one, and the token of its
/// administrator.
fn kubeconfig(plane: &ControlPlane, folder: &Path, user: &Value) -> (std::path::PathBuf, String) {
    let text = std::fs::read_to_string(plane.kubeconfig()).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    let token = config["users"][0]["user"]["token"].as_str().unwrap();
    let token = token.to_owned();
    config["users"][0]["user"] = user.clone();
    let file = folder.join("kubeconfig");
    std::fs::write(&file, config.to_string()).unwrap();
    (file, token)
}

async fn connect(kubeconfig: &Path) -> Client {
    let client = daybook_kubernetes::connect(Some(kubeconfig), "test");
    client.await.unwrap()
}

/// What a credential plugin gives: a token that is to be asked for again at once.
fn credential(token: &str) -> String {
    json!({
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": { "token": token, "expirationTimestamp": "2001-01-01T00:00:00Z" },
    })
    .to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_that_end_are_named_with_what_helps_and_count_again_once_renewed() {
    let plane = tokio::task::spawn_blocking(ControlPlane::shared);
    let Some(plane) = plane.await.unwrap() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let given = folder.path().join("given");
    let user = json!({ "exec": {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "cat",
        "args": [given],
        "interactiveMode": "Never",
    }});
    let (file, token) = kubeconfig(plane, folder.path(), &user);
    let give = |token: &str| std::fs::write(&given, credential(token)).unwrap();

    // Those that were never taken: it is not said that nobody answers.
    give("of-another-cluster");
    let mut unknown = options(connect(&file).await);
    unknown.name = "bergen".parse().unwrap();
    let refused = KubernetesCluster::open(unknown).await.unwrap_err();
    let why = daybook_events::with_causes(&refused);
    for said in ["does not take Daybook's credentials (401", "Renew what"] {
        assert!(why.contains(said), "{why}");
    }

    give(&token);
    let client = connect(&file).await;
    let stage = Stage::of("credentials", |options| options.client = client).await;
    let stage = stage.unwrap();
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let mut values = stage.values();
    release(&mut values, 1, 1);
    stage.apply(1, &values).await.unwrap();
    stage.until("it is ready", |s| ready(s, 1) == 1).await;

    // They expire, and then the plugin has none any more. Either may pass.
    release(&mut values, 2, 1);
    let ends: [(&dyn Fn(), &str); 2] = [
        (
            &|| give("expired"),
            "does not take Daybook's credentials (401",
        ),
        (
            &|| std::fs::remove_file(&given).unwrap(),
            "the credential plugin failed",
        ),
    ];
    for (end, said) in ends {
        end();
        let refused = stage.apply(2, &values).await;
        let Err(TargetError::Unavailable(why)) = refused else {
            panic!("{refused:?}");
        };
        for said in [said, "namespace shop--credentials", "Renew what"] {
            assert!(why.contains(said), "{why}");
        }
        assert!(!why.contains(&token), "{why}");
    }

    give(&token);
    stage.apply(2, &values).await.unwrap();
    let both = |s: &AppStatus| ready(s, 1) == 1 && ready(s, 2) == 1;
    stage.until("both are ready", both).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_file_that_is_renewed_counts_without_a_restart() {
    let plane = tokio::task::spawn_blocking(ControlPlane::shared);
    let Some(plane) = plane.await.unwrap() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let given = folder.path().join("token");
    let (file, token) = kubeconfig(plane, folder.path(), &json!({ "tokenFile": given }));
    std::fs::write(&given, "expired").unwrap();
    let client = connect(&file).await;
    let refused = KubernetesCluster::open(options(client.clone())).await;
    let why = refused.unwrap_err().to_string();
    assert!(why.contains("A token file is read again"), "{why}");
    std::fs::write(&given, token).unwrap();
    let taken = tokio::time::timeout(READ_AGAIN, async {
        while KubernetesCluster::open(options(client.clone()))
            .await
            .is_err()
        {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
    taken.await.unwrap();
}
