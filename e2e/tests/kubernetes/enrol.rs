//! Agents that show the ServiceAccount tokens of their pods to the real TokenReview.

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, pods};
use serde_json::json;

/// A pod on edge1, as the agents' DaemonSet has it there, and one of an account that is not theirs.
const POD: &str = "edge-agent-of-edge1";
const OTHER: &str = "somebody-elses";

/// Makes the account and the pods.
pub(super) fn pods(cluster: &Cluster) -> Result<String> {
    let in_corvid = |args: &[&str]| cluster.kubectl().ok(&[args, &["-n", "corvid"]].concat());
    in_corvid(&["create", "serviceaccount", "edge-agent"])?;
    in_corvid(&["create", "serviceaccount", "other"])?;
    for (name, account) in [(POD, "edge-agent"), (OTHER, "other")] {
        cluster.create(&json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "corvid"},
            "spec": {
                "nodeName": "edge1",
                "serviceAccountName": account,
                "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": 0,
                "containers": [{
                    "name": "agent",
                    "image": pods::BUSYBOX,
                    "imagePullPolicy": "Never",
                    "command": ["/bin/sh", "-c", "exec sleep 86400"],
                }],
            },
        }))?;
    }
    for name in [POD, OTHER] {
        in_corvid(&[
            "wait",
            "--timeout=120s",
            "--for",
            "condition=Ready",
            &format!("pod/{name}"),
        ])?;
    }
    Ok("on edge1".to_owned())
}

/// A token of a pod's account.
fn token(cluster: &Cluster, account: &str, pod: &str, audience: &str) -> Result<String> {
    let create = [
        "create",
        "token",
        account,
        "-n",
        "corvid",
        "--audience",
        audience,
    ];
    let bound = ["--bound-object-kind", "Pod", "--bound-object-name", pod];
    let token = cluster.kubectl().ok(&[&create[..], &bound].concat())?;
    Ok(String::from_utf8(token)?.trim().to_owned())
}

/// Enrols edge1 with its pod's token.
pub(super) fn ask(cluster: &Cluster) -> Result<String> {
    let token = token(cluster, "edge-agent", POD, "corvid")?;
    cluster.tunnel().enroll(&cluster.host("edge1")?, &token)
}

/// The pod's node gets its certificate, with the Node's uid in it; nobody else's token gets any, nor another node's name.
pub(super) fn each_token(cluster: &Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    let told = ask(cluster)?;
    ensure!(told.starts_with("edge1 is enrolled; "), "{told}");
    let uid = ["get", "node", "edge1", "-o", "jsonpath={.metadata.uid}"];
    let uid = String::from_utf8(cluster.kubectl().ok(&uid)?)?;
    let log = cluster.tunnel().server().log_since(mark);
    let names_it = |line: &str| line.contains("audit") && line.contains(&uid);
    ensure!(log.lines().any(names_it), "no {uid} in {log}");

    let (edge1, edge2) = (cluster.host("edge1")?, cluster.host("edge2")?);
    let ours = token(cluster, "edge-agent", POD, "corvid")?;
    for (edge, token, why) in [
        (&edge2, ours.clone(), "is of a pod on another node"),
        (
            &edge1,
            token(cluster, "other", OTHER, "corvid")?,
            "is not of the account that enrols agents",
        ),
        (
            &edge1,
            token(cluster, "edge-agent", POD, "elsewhere")?,
            "the cluster does not accept the ServiceAccount token",
        ),
        (
            &edge1,
            format!("{ours}x"),
            "the cluster does not accept the ServiceAccount token",
        ),
    ] {
        let refused = cluster.tunnel().enroll(edge, &token);
        let refused = format!("{:#}", refused.err().context(why)?);
        ensure!(refused.contains(why), "{refused:?} does not say {why}");
    }
    Ok(told.trim().to_owned())
}

/// A token is worth nothing once its pod is gone.
pub(super) fn deleted_pod(cluster: &Cluster) -> Result<String> {
    let token = token(cluster, "edge-agent", POD, "corvid")?;
    let delete = ["delete", "pod", POD, OTHER, "-n", "corvid", "--wait"];
    cluster.kubectl().ok(&delete)?;
    let refused = cluster.tunnel().enroll(&cluster.host("edge1")?, &token);
    let refused = format!("{:#}", refused.err().context("it was let in")?);
    // The real TokenReview knows a deleted pod's token for what it is, sooner or later; the pod itself is looked at, too.
    let told = ["the cluster does not accept", "pod does not run"];
    ensure!(told.iter().any(|why| refused.contains(why)), "{refused}");
    Ok(refused)
}
