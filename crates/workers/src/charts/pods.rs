//! What the pods of a chart ask of their node and of their namespace.
//!
//! A node is shared by everybody whose pods run there: what the profile "baseline" of the Pod Security
//! Standards refuses would let a pod out of its container. In a namespace there are releases of other
//! services, with Secrets and accounts of their own.

use serde_json::Value;

/// Capabilities that a container may add: it has them anyway, unless it drops them.
const CAPABILITIES: &[&str] = &[
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// Settings of the kernel that end with the pod that has them.
const SYSCTLS: &[&str] = &[
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_syncookies",
];

/// Types of SELinux that are for containers.
const SELINUX_TYPES: &[&str] = &[
    "",
    "container_engine_t",
    "container_init_t",
    "container_kvm_t",
    "container_t",
];

/// Profiles that a pod is confined by.
const PROFILES: &[&str] = &["Localhost", "RuntimeDefault"];

/// Before the name of a container, on the pod: its profile of AppArmor, as it was said before there was a
/// field for it.
const APPARMOR: &str = "container.apparmor.security.beta.kubernetes.io/";

/// The first field of a pod's template that the profile "baseline" refuses.
pub(super) fn privileged(template: &Value) -> Option<String> {
    let pod = &template["spec"];
    let is_unconfined = |profile: &Value| {
        let known =
            |profile: &str| profile == "runtime/default" || profile.starts_with("localhost/");
        !profile.as_str().is_some_and(known)
    };
    let annotations = template["metadata"]["annotations"].as_object();
    let mut annotations = annotations.into_iter().flatten();
    if let Some((key, _)) = annotations.find(|(k, v)| k.starts_with(APPARMOR) && is_unconfined(v)) {
        return Some(format!("metadata.annotations[{key}]"));
    }
    for field in ["hostIPC", "hostNetwork", "hostPID"] {
        if !is_off(&pod[field]) {
            return Some(field.to_owned());
        }
    }
    let security = &pod["securityContext"];
    if let Some(field) = unconfined(security) {
        return Some(format!("securityContext.{field}"));
    }
    for (at, sysctl) in list(&security["sysctls"]) {
        if !is_one_of(&sysctl["name"], SYSCTLS) {
            return Some(format!("securityContext.sysctls[{at}]"));
        }
    }
    for (at, volume) in list(&pod["volumes"]) {
        if !volume["hostPath"].is_null() {
            return Some(format!("volumes[{at}].hostPath"));
        }
    }
    for kind in ["initContainers", "containers", "ephemeralContainers"] {
        for (at, container) in list(&pod[kind]) {
            if let Some(field) = privileged_container(container) {
                return Some(format!("{kind}[{at}].{field}"));
            }
        }
    }
    None
}

fn privileged_container(container: &Value) -> Option<String> {
    let security = &container["securityContext"];
    if !is_off(&security["privileged"]) {
        return Some("securityContext.privileged".to_owned());
    }
    let mut added = list(&security["capabilities"]["add"]);
    if added.any(|(_, capability)| !is_one_of(capability, CAPABILITIES)) {
        return Some("securityContext.capabilities.add".to_owned());
    }
    let mask = &security["procMount"];
    if !mask.is_null() && mask != "Default" {
        return Some("securityContext.procMount".to_owned());
    }
    if let Some(field) = unconfined(security) {
        return Some(format!("securityContext.{field}"));
    }
    for (at, port) in list(&container["ports"]) {
        let of_node = &port["hostPort"];
        if !of_node.is_null() && *of_node != 0 {
            return Some(format!("ports[{at}].hostPort"));
        }
    }
    // The node itself asks, so that these would be asked of whoever the node reaches.
    for (of, when) in [
        ("livenessProbe", ""),
        ("readinessProbe", ""),
        ("startupProbe", ""),
        ("lifecycle", "postStart"),
        ("lifecycle", "preStop"),
    ] {
        let (asks, path) = match when {
            "" => (&container[of], of.to_owned()),
            when => (&container[of][when], format!("{of}.{when}")),
        };
        for how in ["httpGet", "tcpSocket"] {
            let host = &asks[how]["host"];
            if !host.is_null() && host != "" {
                return Some(format!("{path}.{how}.host"));
            }
        }
    }
    None
}

/// The first field of a security context, of a pod or of a container, that loosens what confines it.
fn unconfined(security: &Value) -> Option<&'static str> {
    if !is_off(&security["windowsOptions"]["hostProcess"]) {
        return Some("windowsOptions.hostProcess");
    }
    for (profile, field) in [
        ("appArmorProfile", "appArmorProfile.type"),
        ("seccompProfile", "seccompProfile.type"),
    ] {
        let kind = &security[profile]["type"];
        if !kind.is_null() && !is_one_of(kind, PROFILES) {
            return Some(field);
        }
    }
    let options = &security["seLinuxOptions"];
    let kind = &options["type"];
    if !kind.is_null() && !is_one_of(kind, SELINUX_TYPES) {
        return Some("seLinuxOptions.type");
    }
    for (key, field) in [
        ("role", "seLinuxOptions.role"),
        ("user", "seLinuxOptions.user"),
    ] {
        if !options[key].is_null() && options[key] != "" {
            return Some(field);
        }
    }
    None
}

/// The Secrets that something refers to, wherever: volumes of some kinds name theirs in ways of their own.
pub(super) fn secrets(value: &Value) -> Vec<&str> {
    let mut names = Vec::new();
    refer(value, &mut names);
    names.retain(|name| !name.is_empty());
    names
}

fn refer<'a>(value: &'a Value, names: &mut Vec<&'a str>) {
    match value {
        Value::Array(list) => list.iter().for_each(|value| refer(value, names)),
        Value::Object(map) => {
            for (key, value) in map {
                match (key.as_str(), value) {
                    ("secretName", Value::String(name)) => names.push(name),
                    ("imagePullSecrets" | "secrets", Value::Array(list)) => {
                        names.extend(list.iter().filter_map(|of| of["name"].as_str()));
                    }
                    ("secret" | "secretKeyRef" | "secretRef" | "nodePublishSecretRef", of) => {
                        names.extend(of["name"].as_str());
                    }
                    _ => {}
                }
                refer(value, names);
            }
        }
        _ => {}
    }
}

/// The account that a pod runs as; the namespace's own if it names none. There are two fields for it.
pub(super) fn accounts(template: &Value) -> impl Iterator<Item = &str> {
    let fields = ["serviceAccount", "serviceAccountName"];
    let names = fields.into_iter();
    let names = names.filter_map(move |field| template["spec"][field].as_str());
    names.filter(|name| !name.is_empty())
}

fn is_off(value: &Value) -> bool {
    value.is_null() || *value == false
}

fn is_one_of(value: &Value, known: &[&str]) -> bool {
    value.as_str().is_some_and(|text| known.contains(&text))
}

/// What is in a list, with its place.
fn list(value: &Value) -> impl Iterator<Item = (usize, &Value)> {
    value.as_array().into_iter().flatten().enumerate()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What is refused of a pod with this.
    fn of_pod(spec: Value) -> Option<String> {
        privileged(&json!({ "spec": spec }))
    }

    /// What is refused of a container with this.
    fn of_container(container: Value) -> Option<String> {
        of_pod(json!({ "containers": [{ "name": "first" }, container] }))
    }

    #[test]
    fn a_pod_stays_within_its_node() {
        for (spec, field) in [
            (json!({ "hostNetwork": true }), "hostNetwork"),
            (json!({ "hostPID": true }), "hostPID"),
            (json!({ "hostIPC": true }), "hostIPC"),
            (json!({ "hostPID": "true" }), "hostPID"),
            (
                json!({ "volumes": [{ "emptyDir": {} }, { "hostPath": { "path": "/" } }] }),
                "volumes[1].hostPath",
            ),
            (
                json!({ "securityContext": { "sysctls": [{ "name": "kernel.msgmax" }] } }),
                "securityContext.sysctls[0]",
            ),
            (
                json!({ "securityContext": { "windowsOptions": { "hostProcess": true } } }),
                "securityContext.windowsOptions.hostProcess",
            ),
            (
                json!({ "securityContext": { "seLinuxOptions": { "type": "spc_t" } } }),
                "securityContext.seLinuxOptions.type",
            ),
            (
                json!({ "securityContext": { "seLinuxOptions": { "user": "system_u" } } }),
                "securityContext.seLinuxOptions.user",
            ),
            (
                json!({ "securityContext": { "seccompProfile": { "type": "Unconfined" } } }),
                "securityContext.seccompProfile.type",
            ),
            (
                json!({ "securityContext": { "appArmorProfile": { "type": "Unconfined" } } }),
                "securityContext.appArmorProfile.type",
            ),
            (
                json!({ "initContainers": [{ "securityContext": { "privileged": true } }] }),
                "initContainers[0].securityContext.privileged",
            ),
        ] {
            assert_eq!(of_pod(spec.clone()).as_deref(), Some(field), "{spec}");
        }
        let key = format!("{APPARMOR}web");
        let annotated =
            |profile: &str| json!({ "metadata": { "annotations": { key.as_str(): profile } } });
        let refused = privileged(&annotated("unconfined")).unwrap();
        assert_eq!(refused, format!("metadata.annotations[{key}]"));
        assert_eq!(privileged(&annotated("runtime/default")), None);
    }

    #[test]
    fn a_container_has_no_rights_beyond_those_of_every_container() {
        for (container, field) in [
            (
                json!({ "securityContext": { "privileged": true } }),
                "securityContext.privileged",
            ),
            (
                json!({ "securityContext": { "capabilities": { "add": ["CHOWN", "SYS_ADMIN"] } } }),
                "securityContext.capabilities.add",
            ),
            (
                json!({ "securityContext": { "capabilities": { "add": ["ALL"] } } }),
                "securityContext.capabilities.add",
            ),
            (
                json!({ "securityContext": { "procMount": "Unmasked" } }),
                "securityContext.procMount",
            ),
            (
                json!({ "securityContext": { "seccompProfile": { "type": "Unconfined" } } }),
                "securityContext.seccompProfile.type",
            ),
            (
                json!({ "ports": [{ "containerPort": 80 }, { "hostPort": 80 }] }),
                "ports[1].hostPort",
            ),
            (
                json!({ "livenessProbe": { "httpGet": { "host": "169.254.169.254" } } }),
                "livenessProbe.httpGet.host",
            ),
            (
                json!({ "lifecycle": { "preStop": { "tcpSocket": { "host": "10.0.0.1" } } } }),
                "lifecycle.preStop.tcpSocket.host",
            ),
        ] {
            let refused = of_container(container.clone()).unwrap_or_default();
            assert_eq!(refused, format!("containers[1].{field}"), "{container}");
        }
    }

    #[test]
    fn what_charts_usually_ask_for_is_taken() {
        let pod = json!({
            "hostNetwork": false,
            "securityContext": {
                "fsGroup": 1001,
                "sysctls": [{ "name": "net.ipv4.tcp_syncookies", "value": "1" }],
                "seccompProfile": { "type": "RuntimeDefault" },
                "seLinuxOptions": {},
            },
            "volumes": [{ "name": "tmp", "emptyDir": {} }, { "name": "data", "persistentVolumeClaim": { "claimName": "x" } }],
            "containers": [{
                "ports": [{ "containerPort": 8080, "hostPort": 0 }],
                "livenessProbe": { "httpGet": { "path": "/", "port": "web" } },
                "securityContext": {
                    "privileged": false,
                    "allowPrivilegeEscalation": false,
                    "procMount": "Default",
                    "runAsUser": 0,
                    "capabilities": { "drop": ["ALL"], "add": ["NET_BIND_SERVICE"] },
                },
            }],
        });
        assert_eq!(of_pod(pod), None);
    }

    #[test]
    fn secrets_are_found_wherever_a_pod_names_them() {
        let pod = json!({
            "imagePullSecrets": [{ "name": "a" }, { "name": "" }],
            "volumes": [
                { "secret": { "secretName": "b" } },
                { "projected": { "sources": [{ "secret": { "name": "c" } }, { "configMap": { "name": "no" } }] } },
                { "csi": { "nodePublishSecretRef": { "name": "d" } } },
                { "azureFile": { "secretName": "e" } },
            ],
            "initContainers": [{ "envFrom": [{ "secretRef": { "name": "f" } }, { "configMapRef": { "name": "no" } }] }],
            "containers": [{ "env": [
                { "name": "secret", "value": "no" },
                { "name": "X", "valueFrom": { "secretKeyRef": { "name": "g", "key": "x" } } },
            ] }],
        });
        let mut names = secrets(&pod);
        names.sort_unstable();
        assert_eq!(names, ["a", "b", "c", "d", "e", "f", "g"]);
    }

    #[test]
    fn an_account_is_named_in_one_of_two_ways() {
        let pod = json!({ "spec": { "serviceAccount": "old", "serviceAccountName": "new" } });
        assert_eq!(accounts(&pod).collect::<Vec<_>>(), ["old", "new"]);
        assert_eq!(accounts(&json!({ "spec": {} })).count(), 0);
    }
}
