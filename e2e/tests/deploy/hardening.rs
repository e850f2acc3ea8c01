//! What the pods may do, and how they come and go.

use anyhow::Context as _;
use e2e::manifests::{Container, list, pod, text};
use serde_json::{Value, json};

use crate::each_overlay;

/// Containers that run as root, and why nothing less will do.
const ROOT: [(&str, &str, &str); 5] = [
    (
        "default",
        "proxy-server-control-plane/redirect",
        "NET_ADMIN counts for root alone",
    ),
    (
        "host-network",
        "proxy-server-control-plane/redirect",
        "as default",
    ),
    ("dev", "proxy-server-control-plane/redirect", "as default"),
    (
        "egress",
        "proxy-server-control-plane/proxy-server",
        "its sockets are root's, as kube-apiserver is",
    ),
    (
        "dedicated-line",
        "proxy-server-control-plane/proxy-server",
        "as egress",
    ),
];

fn container_setting<'a>(it: &Container<'a>, key: &str) -> Option<&'a Value> {
    let own = it.container.pointer(&format!("/securityContext/{key}"));
    own.or_else(|| it.pod.pointer(&format!("/securityContext/{key}")))
}

#[test]
fn no_container_has_more_than_it_needs() {
    each_overlay(|overlay| {
        let mut wrong = Vec::new();
        for it in overlay.containers() {
            let name = it.name();
            let root = ROOT
                .iter()
                .any(|(of, container, _)| *of == overlay.name && *container == name);
            let mut must = |key: &str, wanted: Value| {
                let found = container_setting(&it, key);
                if found != Some(&wanted) {
                    wrong.push(format!("{name}: {key} is {found:?}, not {wanted}"));
                }
            };
            must("allowPrivilegeEscalation", json!(false));
            must("readOnlyRootFilesystem", json!(true));
            must("seccompProfile", json!({"type": "RuntimeDefault"}));
            must("runAsNonRoot", json!(!root));
            must("runAsUser", json!(if root { 0 } else { 65532 }));
            let added = if name.ends_with("/redirect") {
                json!({"drop": ["ALL"], "add": ["NET_ADMIN"]})
            } else {
                json!({"drop": ["ALL"]})
            };
            must("capabilities", added);
            if it
                .container
                .pointer("/securityContext/privileged")
                .is_some()
            {
                wrong.push(format!("{name}: says something about privileged"));
            }
            for path in [
                "/resources/limits/memory",
                "/resources/requests/memory",
                "/resources/requests/cpu",
            ] {
                if it.container.pointer(path).is_none() {
                    wrong.push(format!("{name}: no {path}"));
                }
            }
            // A limit of processor time stops a program in the middle of somebody's keystroke.
            if it.container.pointer("/resources/limits/cpu").is_some() {
                wrong.push(format!("{name}: has a limit of processor time"));
            }
        }
        Ok(wrong)
    });
}

#[test]
fn only_pods_that_ask_kube_apiserver_have_a_token_for_it() {
    each_overlay(|overlay| {
        let mut wrong = Vec::new();
        for workload in overlay.workloads() {
            let name = text(workload, "/metadata/name");
            let mounts = pod(workload).pointer("/automountServiceAccountToken");
            if mounts != Some(&json!(name != "edge-agent")) {
                wrong.push(format!(
                    "{name}: automountServiceAccountToken is {mounts:?}"
                ));
            }
        }
        for account in overlay.of("ServiceAccount") {
            if account.pointer("/automountServiceAccountToken") != Some(&json!(false)) {
                wrong.push(format!(
                    "{}: gives tokens to every pod",
                    text(account, "/metadata/name")
                ));
            }
        }
        Ok(wrong)
    });
}

#[test]
fn agents_are_what_the_edge_is_promised() {
    each_overlay(|overlay| {
        let Ok(agent) = overlay.object("DaemonSet", "edge-agent") else {
            return Ok(Vec::new()); // an overlay that only adds to others
        };
        let host_network = overlay.name == "host-network";
        let pod = pod(agent);
        let mut wrong = Vec::new();
        for (of, pointer, wanted) in [
            (
                agent,
                "/spec/updateStrategy/rollingUpdate",
                json!({"maxSurge": "10%", "maxUnavailable": 0}),
            ),
            (pod, "/priorityClassName", json!("system-node-critical")),
            (pod, "/tolerations", json!([{"operator": "Exists"}])),
            (
                pod,
                "/nodeSelector/openyurt.io~1is-edge-worker",
                json!("true"),
            ),
            (
                pod,
                "/hostNetwork",
                if host_network {
                    json!(true)
                } else {
                    Value::Null
                },
            ),
            (pod, "/containers/0/resources/limits/memory", json!("32Mi")),
            (pod, "/serviceAccountName", json!("edge-agent")),
        ] {
            let found = of.pointer(pointer).unwrap_or(&Value::Null);
            if *found != wanted {
                wrong.push(format!("{pointer} is {found}, not {wanted}"));
            }
        }
        let token = list(pod, "/volumes")
            .flat_map(|volume| list(volume, "/projected/sources"))
            .find_map(|source| source.pointer("/serviceAccountToken"));
        let wanted = json!({"audience": "corvid", "expirationSeconds": 3600, "path": "token"});
        if token != Some(&wanted) {
            wrong.push(format!("the token is {token:?}"));
        }
        // Kubernetes refuses a surge of pods that declare a port of the host.
        if host_network && list(pod, "/containers/0/ports").next().is_some() {
            wrong.push("declares ports of the host".into());
        }
        Ok(wrong)
    });
}

#[test]
fn servers_are_spread_and_never_all_gone() {
    each_overlay(|overlay| {
        let Ok(server) = overlay.object("Deployment", "proxy-server") else {
            return Ok(Vec::new());
        };
        let replicas = if overlay.name == "dev" { 1 } else { 2 };
        let mut wrong = Vec::new();
        for (pointer, wanted) in [
            ("/spec/replicas", json!(replicas)),
            (
                "/spec/strategy/rollingUpdate",
                json!({"maxSurge": 1, "maxUnavailable": 0}),
            ),
            (
                "/spec/template/spec/priorityClassName",
                json!("system-cluster-critical"),
            ),
            (
                "/spec/template/spec/topologySpreadConstraints/0/topologyKey",
                json!("kubernetes.io/hostname"),
            ),
        ] {
            let found = server.pointer(pointer).unwrap_or(&Value::Null);
            if *found != wanted {
                wrong.push(format!("{pointer} is {found}, not {wanted}"));
            }
        }
        let budget = overlay.object("PodDisruptionBudget", "proxy-server")?;
        if budget.pointer("/spec/maxUnavailable") != Some(&json!(1)) {
            wrong.push(format!("{budget}"));
        }
        let service = overlay.object("Service", "proxy-server")?;
        let ports: Vec<_> = list(service, "/spec/ports")
            .map(|port| {
                (
                    text(port, "/protocol"),
                    port.pointer("/port"),
                    port.pointer("/nodePort"),
                )
            })
            .collect();
        let (port, node_port) = (json!(8443), json!(30843));
        let wanted = ["UDP", "TCP"].map(|protocol| (protocol, Some(&port), Some(&node_port)));
        if ports != wanted {
            wrong.push(format!(
                "agents dial one number on UDP and TCP, and it is {ports:?}"
            ));
        }
        let peers = overlay.object("Service", "proxy-server-peers")?;
        if text(peers, "/spec/clusterIP") != "None"
            || peers.pointer("/spec/publishNotReadyAddresses") != Some(&json!(false))
        {
            wrong.push(format!("{peers}"));
        }
        Ok(wrong)
    });
}

/// Each container that serves is asked whether it lives and whether it is ready.
#[test]
fn probes_ask_the_ports_that_the_programs_have() {
    each_overlay(|overlay| {
        let mut wrong = Vec::new();
        for it in overlay.containers() {
            let name = it.name();
            if name.ends_with("/redirect") {
                continue; // it ends when something is wrong
            }
            let program = text(it.container, "/name");
            let port = if program == "edge-agent" { 9441 } else { 9440 };
            // Behind a Service a server that drains stays ready: docs/operations.md.
            let behind = program == "proxy-server";
            let ready = if behind {
                "/readyz?exclude=draining"
            } else {
                "/readyz"
            };
            let on_host = it.pod.pointer("/hostNetwork") == Some(&json!(true));
            for (probe, path, word) in [
                ("livenessProbe", "/livez", "live"),
                ("readinessProbe", ready, "ready"),
            ] {
                let found = it
                    .container
                    .get(probe)
                    .with_context(|| format!("{name}: no {probe}"))?;
                let right = if on_host {
                    // Two pods share the host's address for a while: each is asked over its own socket.
                    found.pointer("/exec/command")
                        == Some(&json!([format!("/bin/{program}"), "probe", word]))
                } else {
                    let declared = list(it.container, "/ports").any(|declared| {
                        text(declared, "/name") == "observe"
                            && declared.pointer("/containerPort") == Some(&json!(port))
                    });
                    declared
                        && found.pointer("/httpGet")
                            == Some(&json!({"path": path, "port": "observe"}))
                };
                if !right {
                    wrong.push(format!("{name}: {probe} is {found}"));
                }
            }
        }
        Ok(wrong)
    });
}

/// The strictest level of pod security that the overlay's pods meet is the one that its namespace asks for.
#[test]
fn the_namespace_asks_for_what_its_pods_meet() {
    each_overlay(|overlay| {
        let Ok(namespace) = overlay.object("Namespace", "corvid") else {
            return Ok(Vec::new());
        };
        let level = text(
            namespace,
            "/metadata/labels/pod-security.kubernetes.io~1enforce",
        );
        let host = overlay
            .workloads()
            .any(|workload| pod(workload).pointer("/hostNetwork").is_some());
        let wanted = if host { "privileged" } else { "restricted" };
        Ok((level != wanted)
            .then(|| format!("{level}, not {wanted}"))
            .into_iter()
            .collect())
    });
}
