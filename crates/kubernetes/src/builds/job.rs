//! The Job of a build, as it is handed to the API server.

use std::time::Duration;

use daybook_workers::builder::LABEL_BUILD;
use daybook_workers::ports::BuildInput;
use k8s_openapi::api::batch::v1::Job;
use serde_json::{Value, json};

use super::{BUILD, BuildOptions, REQUEST, Tool};
use crate::names::{MANAGED_BY, MANAGER, PROJECT, SERVICE};

/// Fetches the source.
pub(super) const SOURCE: &str = "source";
/// Makes the plan where there is no Dockerfile.
pub(super) const PLAN: &str = "plan";
/// Makes the image and pushes it.
pub(super) const BUILDER: &str = "build";

/// The user that everything but Kaniko runs as: the one of BuildKit's rootless image.
const USER: i64 = 1000;

/// Fetches one commit and leaves only its files. A server that does not hand out single commits is
/// asked for all that it has. Credentials are only ever read, and only for the hosts that they are of.
pub(super) const FETCH: &str = r#"set -eu
export GIT_TERMINAL_PROMPT=0 GIT_CONFIG_NOSYSTEM=1 GIT_ALLOW_PROTOCOL=http:https
mkdir -p "$INTO" && cd "$INTO"
git init -q .
if [ -n "${GIT_CREDENTIALS:-}" ]; then
  git config credential.helper '!f() { [ "$1" = get ] && git credential-store --file="$GIT_CREDENTIALS" get; }; f'
fi
echo "fetching $COMMIT"
git fetch -q --depth=1 --no-tags "$URL" "$COMMIT" 2>/dev/null ||
  git fetch -q --no-tags "$URL" '+refs/*:refs/fetched/*'
git -c advice.detachedHead=false checkout -q --force --detach "$COMMIT"
rm -rf .git
"#;

/// Builds with what is in its arguments, and leaves the digest where Kubernetes picks it up.
pub(super) const BUILDKIT: &str = r#"set -eu
buildctl-daemonless.sh "$@" --metadata-file "$METADATA"
sed -n 's/.*"containerimage\.digest": *"\(sha256:[0-9a-f]*\)".*/\1/p' "$METADATA" > "$DIGEST"
"#;

/// What a Job is called.
pub(super) fn name(input: &BuildInput<'_>) -> String {
    format!("daybook-build-{}-{}", input.build.0.simple(), input.request)
}

/// The Job of a build, which fetches its source from `url`. Without a Dockerfile, railpack plans it.
pub(super) fn of(
    options: &BuildOptions,
    input: &BuildInput<'_>,
    url: &str,
    dockerfile: Option<&str>,
) -> Job {
    let build = input.build.to_string();
    let labels = json!({
        MANAGED_BY: MANAGER,
        "app.kubernetes.io/component": "build",
        BUILD: build,
        REQUEST: input.request.to_string(),
        PROJECT: input.project,
        SERVICE: input.service,
    });
    // Not the label that the watches of releases go by.
    let pod_labels = json!({
        "app.kubernetes.io/component": "build",
        BUILD: build,
        PROJECT: input.project,
        SERVICE: input.service,
    });
    let mut prepare = vec![source(options, input, url)];
    if dockerfile.is_none() {
        prepare.push(plan(options, input));
    }
    let mut pod = json!({
        "restartPolicy": "Never",
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "nodeSelector": { "kubernetes.io/os": "linux" },
        "securityContext": {
            "fsGroup": USER,
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "initContainers": prepare,
        "containers": [builder(options, input, dockerfile)],
        "volumes": volumes(options),
    });
    if let Some(secret) = &options.registry_secret {
        // The images of the builders may be in a registry that asks for it, too.
        pod["imagePullSecrets"] = json!([{ "name": secret }]);
    }
    let job = json!({
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name(input),
            "namespace": options.namespace,
            "labels": labels,
            "annotations": {
                "daybook.dev/source": format!("{}@{}", input.url, input.commit.commit),
                "daybook.dev/image": format!("{}:{}", input.repository, input.tag),
            },
        },
        "spec": {
            // Daybook tries again, and says so.
            "backoffLimit": 0,
            "completions": 1,
            "parallelism": 1,
            "activeDeadlineSeconds": seconds(options.deadline),
            "ttlSecondsAfterFinished": seconds(options.keep),
            "template": { "metadata": { "labels": pod_labels }, "spec": pod },
        },
    });
    serde_json::from_value(job).expect("it has the shape of a Job")
}

fn seconds(time: Duration) -> u64 {
    time.as_secs().max(1)
}

fn folder(input: &BuildInput<'_>) -> String {
    let path = input.path.trim_matches('/');
    match path {
        "" | "." => "/workspace/source".to_owned(),
        path => format!("/workspace/source/{path}"),
    }
}

fn variable(name: &str, value: impl Into<String>) -> Value {
    json!({ "name": name, "value": value.into() })
}

/// As little as can be allowed.
fn restricted() -> Value {
    json!({
        "runAsNonRoot": true,
        "runAsUser": USER,
        "runAsGroup": USER,
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": { "drop": ["ALL"] },
    })
}

fn small() -> Value {
    json!({ "requests": { "cpu": "100m", "memory": "128Mi" }, "limits": { "memory": "1Gi" } })
}

fn source(options: &BuildOptions, input: &BuildInput<'_>, url: &str) -> Value {
    let mut env = vec![
        variable("HOME", "/tmp"),
        variable("URL", url),
        variable("COMMIT", input.commit.commit.as_str()),
        variable("INTO", "/workspace/source"),
    ];
    let mut mounts = vec![
        json!({ "name": "workspace", "mountPath": "/workspace" }),
        json!({ "name": "tmp", "mountPath": "/tmp" }),
    ];
    if options.git_secret.is_some() {
        env.push(variable("GIT_CREDENTIALS", "/etc/daybook/git/credentials"));
        mounts.push(json!({ "name": "git", "mountPath": "/etc/daybook/git", "readOnly": true }));
    }
    json!({
        "name": SOURCE,
        "image": options.source_image,
        "command": ["sh", "-c", FETCH],
        "env": env,
        "securityContext": restricted(),
        "resources": small(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    })
}

fn plan(options: &BuildOptions, input: &BuildInput<'_>) -> Value {
    json!({
        "name": PLAN,
        "image": options.railpack_image,
        "command": ["/railpack", "prepare", folder(input), "--plan-out",
            "/workspace/plan/railpack-plan.json"],
        "env": [variable("HOME", "/tmp")],
        "securityContext": restricted(),
        "resources": small(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            { "name": "workspace", "mountPath": "/workspace" },
            { "name": "tmp", "mountPath": "/tmp" },
        ],
    })
}

fn builder(options: &BuildOptions, input: &BuildInput<'_>, dockerfile: Option<&str>) -> Value {
    let mut container = match options.tool {
        Tool::BuildKit => buildkit(options, input, dockerfile),
        Tool::Kaniko => kaniko(options, input, dockerfile.unwrap_or("Dockerfile")),
    };
    container["name"] = json!(BUILDER);
    container["image"] = json!(options.image);
    container["terminationMessagePolicy"] = json!("FallbackToLogsOnError");
    container["resources"] = json!({
        "requests": { "cpu": options.cpu, "memory": "256Mi" },
        "limits": { "memory": options.memory },
    });
    container
}

/// The image's labels, by the names that the OCI specification gives them.
fn labels(input: &BuildInput<'_>) -> [(&'static str, String); 3] {
    [
        (
            "org.opencontainers.image.revision",
            input.commit.commit.to_string(),
        ),
        ("org.opencontainers.image.source", input.url.to_string()),
        (LABEL_BUILD, input.build.to_string()),
    ]
}

fn buildkit(options: &BuildOptions, input: &BuildInput<'_>, dockerfile: Option<&str>) -> Value {
    let folder = folder(input);
    let mut arguments = vec![
        "build".to_owned(),
        "--progress=plain".to_owned(),
        format!("--local=context={folder}"),
        format!(
            "--output=type=image,name={}:{},push=true,oci-mediatypes=true",
            input.repository, input.tag
        ),
    ];
    match dockerfile {
        Some(dockerfile) => {
            arguments.extend([
                "--frontend=dockerfile.v0".to_owned(),
                format!("--local=dockerfile={folder}"),
                format!("--opt=filename={dockerfile}"),
                // The same commit makes the same image, as far as the Dockerfile allows.
                format!(
                    "--opt=build-arg:SOURCE_DATE_EPOCH={}",
                    input.commit.committed_at.as_second().max(0)
                ),
            ]);
            let labels = labels(input);
            arguments.extend(labels.map(|(name, value)| format!("--opt=label:{name}={value}")));
        }
        None => arguments.extend([
            "--frontend=gateway.v0".to_owned(),
            format!("--opt=source={}", options.railpack_image),
            "--local=dockerfile=/workspace/plan".to_owned(),
        ]),
    }
    let mut env = vec![
        // Kubernetes has no way to unmask /proc, which a sandbox for each step would need.
        variable("BUILDKITD_FLAGS", "--oci-worker-no-process-sandbox"),
        variable("METADATA", "/tmp/metadata.json"),
        variable("DIGEST", "/dev/termination-log"),
    ];
    let mut mounts = vec![
        json!({ "name": "workspace", "mountPath": "/workspace", "readOnly": true }),
        json!({ "name": "state", "mountPath": "/home/user/.local/share/buildkit" }),
        json!({ "name": "tmp", "mountPath": "/tmp" }),
    ];
    if options.registry_secret.is_some() {
        env.push(variable("DOCKER_CONFIG", "/etc/daybook/registry"));
        mounts.push(registry("/etc/daybook/registry"));
    }
    json!({
        "command": ["sh", "-c", BUILDKIT, "build"],
        "args": arguments,
        "env": env,
        // What BuildKit's guide to its rootless mode asks for: unshare and mount within a user
        // namespace, and newuidmap to make one.
        "securityContext": {
            "runAsNonRoot": true,
            "runAsUser": USER,
            "runAsGroup": USER,
            "seccompProfile": { "type": "Unconfined" },
            "appArmorProfile": { "type": "Unconfined" },
        },
        "volumeMounts": mounts,
    })
}

fn kaniko(options: &BuildOptions, input: &BuildInput<'_>, dockerfile: &str) -> Value {
    let mut arguments = vec![
        format!("--context=dir://{}", folder(input)),
        format!("--dockerfile={dockerfile}"),
        format!("--destination={}:{}", input.repository, input.tag),
        "--digest-file=/dev/termination-log".to_owned(),
        "--log-format=text".to_owned(),
    ];
    let labels = labels(input);
    arguments.extend(labels.map(|(name, value)| format!("--label={name}={value}")));
    let mut mounts =
        vec![json!({ "name": "workspace", "mountPath": "/workspace", "readOnly": true })];
    if options.registry_secret.is_some() {
        mounts.push(registry("/kaniko/.docker"));
    }
    json!({
        "args": arguments,
        // It unpacks images over its own root, and changes owners there.
        "securityContext": {
            "runAsUser": 0,
            "runAsGroup": 0,
            "privileged": false,
            "allowPrivilegeEscalation": false,
        },
        "volumeMounts": mounts,
    })
}

fn registry(path: &str) -> Value {
    json!({ "name": "registry", "mountPath": path, "readOnly": true })
}

fn volumes(options: &BuildOptions) -> Vec<Value> {
    let empty = |name: &str| json!({ "name": name, "emptyDir": {} });
    let mut volumes = vec![empty("workspace"), empty("tmp")];
    if options.tool == Tool::BuildKit {
        volumes.push(empty("state"));
    }
    // The group of the pod reads them, and nobody else.
    if let Some(secret) = &options.git_secret {
        volumes.push(json!({ "name": "git", "secret": {
            "secretName": secret,
            "defaultMode": 0o440,
            "items": [{ "key": "credentials", "path": "credentials" }],
        }}));
    }
    if let Some(secret) = &options.registry_secret {
        volumes.push(json!({ "name": "registry", "secret": {
            "secretName": secret,
            "defaultMode": 0o440,
            "items": [{ "key": ".dockerconfigjson", "path": "config.json" }],
        }}));
    }
    volumes
}
