//! Each verb that `deploy/rbac` grants is needed: without it a named thing fails and says why, and with it again works
//! without anybody's help.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use certs::TrustBundle;
use e2e::cluster::{BY_LINE, Cluster, Grant, NODES, Steps, until};
use serde_json::{Value, json};

use crate::{enrol, reach, services};

/// For what needs a try of the proxy-server to reach kube-apiserver: 10 s lie between two at most.
const DEADLINE: Duration = Duration::from_secs(60);

/// What becomes of a verb's absence, and of its return. Both may restart the proxy-server.
struct Row {
    verb: &'static str,
    resource: &'static str,
    role: &'static str,
    /// Shows what fails, and returns what is said about it.
    breaks: fn(&mut Cluster) -> Result<String>,
    /// Waits until it works.
    recovers: fn(&mut Cluster) -> Result<()>,
}

impl Row {
    fn is_of(&self, grant: &Grant) -> bool {
        (self.verb, self.resource, self.role) == (&grant.verb, &grant.resource, grant.role())
    }
}

const ROWS: [Row; 27] = [
    Row {
        verb: "list",
        resource: "nodes",
        role: "corvid-proxy-server",
        breaks: no_node_is_known,
        recovers: nodes_are_known,
    },
    Row {
        verb: "watch",
        resource: "nodes",
        role: "corvid-proxy-server",
        breaks: nodes_are_not_followed,
        recovers: nodes_are_known,
    },
    Row {
        verb: "list",
        resource: "endpointslices",
        role: "corvid-proxy-server-peers",
        breaks: other_servers_are_not_listed,
        recovers: other_servers_are_followed,
    },
    Row {
        verb: "watch",
        resource: "endpointslices",
        role: "corvid-proxy-server-peers",
        breaks: other_servers_are_not_followed,
        recovers: other_servers_are_followed,
    },
    Row {
        verb: "create",
        resource: "leases",
        role: "corvid-proxy-server",
        breaks: nobody_leads_anew,
        recovers: the_map_is_written,
    },
    Row {
        verb: "get",
        resource: "leases",
        role: "corvid-proxy-server",
        breaks: no_leader_is_known,
        recovers: the_map_is_written,
    },
    Row {
        verb: "update",
        resource: "leases",
        role: "corvid-proxy-server",
        breaks: a_leader_can_not_go_on,
        recovers: the_map_is_written,
    },
    Row {
        verb: "get",
        resource: "services",
        role: "corvid-proxy-server",
        breaks: names_have_nowhere_to_point,
        recovers: the_map_is_written,
    },
    Row {
        verb: "create",
        resource: "configmaps",
        role: "corvid-proxy-server",
        breaks: a_lost_map_stays_lost,
        recovers: the_map_is_written,
    },
    Row {
        verb: "get",
        resource: "configmaps",
        role: "corvid-proxy-server",
        breaks: the_map_can_not_be_looked_at,
        recovers: the_map_is_written,
    },
    Row {
        verb: "patch",
        resource: "configmaps",
        role: "corvid-proxy-server",
        breaks: a_spoilt_map_stays_so,
        recovers: the_map_is_written,
    },
    Row {
        verb: "create",
        resource: "secrets",
        role: "corvid-proxy-server-authority",
        breaks: a_lost_authority_is_not_made_again,
        recovers: the_authority_is_kept,
    },
    Row {
        verb: "get",
        resource: "secrets",
        role: "corvid-proxy-server-authority",
        breaks: the_authority_is_not_followed,
        recovers: the_authority_is_kept,
    },
    Row {
        verb: "patch",
        resource: "secrets",
        role: "corvid-proxy-server-authority",
        breaks: no_root_is_made,
        recovers: a_new_root_ends_no_session,
    },
    Row {
        verb: "create",
        resource: "configmaps",
        role: "corvid-proxy-server-authority",
        breaks: lost_roots_stay_lost,
        recovers: the_roots_are_written,
    },
    Row {
        verb: "get",
        resource: "configmaps",
        role: "corvid-proxy-server-authority",
        breaks: the_roots_can_not_be_looked_at,
        recovers: the_roots_are_written,
    },
    Row {
        verb: "patch",
        resource: "configmaps",
        role: "corvid-proxy-server-authority",
        breaks: spoilt_roots_stay_so,
        recovers: the_roots_are_written,
    },
    Row {
        verb: "create",
        resource: "tokenreviews",
        role: "corvid-proxy-server",
        breaks: no_token_is_known,
        recovers: a_pod_enrols,
    },
    Row {
        verb: "list",
        resource: "pods",
        role: "corvid-proxy-server-pods",
        breaks: no_pod_is_a_destination,
        recovers: pods_are_destinations,
    },
    Row {
        verb: "watch",
        resource: "pods",
        role: "corvid-proxy-server-pods",
        breaks: pods_are_not_followed,
        recovers: pods_are_destinations,
    },
    Row {
        verb: "list",
        resource: "services",
        role: "corvid-proxy-server-services",
        breaks: no_service_is_a_destination,
        recovers: services_are_destinations,
    },
    Row {
        verb: "watch",
        resource: "services",
        role: "corvid-proxy-server-services",
        breaks: services_are_not_followed,
        recovers: services_are_destinations,
    },
    Row {
        verb: "list",
        resource: "endpointslices",
        role: "corvid-proxy-server-services",
        breaks: nothing_is_behind_a_service,
        recovers: services_are_destinations,
    },
    Row {
        verb: "watch",
        resource: "endpointslices",
        role: "corvid-proxy-server-services",
        breaks: endpoints_are_not_followed,
        recovers: services_are_destinations,
    },
    Row {
        verb: "get",
        resource: "pods",
        role: "corvid-proxy-server-enrol",
        breaks: no_pod_is_known,
        recovers: a_pod_enrols,
    },
    Row {
        verb: "create",
        resource: "events",
        role: "corvid-proxy-server-events",
        breaks: no_event_is_made,
        recovers: events_are_made,
    },
    Row {
        verb: "patch",
        resource: "events",
        role: "corvid-proxy-server-events",
        breaks: no_event_counts,
        recovers: events_count,
    },
];

fn row(grant: &Grant) -> Option<&'static Row> {
    ROWS.iter().find(|row| row.is_of(grant))
}

/// A step for each verb of the files, and one that fails when a verb has no row here or a row no verb.
pub(super) fn each_verb(steps: &mut Steps, cluster: &mut Cluster) {
    let mut grants = Vec::new();
    steps.run("rbac_each_verb_has_a_step", || {
        grants = cluster.grants()?;
        let without = grants.iter().find(|grant| row(grant).is_none());
        ensure!(without.is_none(), "no row for {without:?}");
        for row in &ROWS {
            let granted = grants.iter().any(|grant| row.is_of(grant));
            ensure!(granted, "{} {} is not granted", row.verb, row.resource);
        }
        Ok(format!("{} verbs", grants.len()))
    });
    for grant in cluster.grants().unwrap_or_default() {
        let Some(row) = row(&grant) else { continue };
        // A resource of two roles has its verbs twice.
        let role = row
            .role
            .trim_start_matches("corvid-proxy-server")
            .replace('-', "_");
        let name = format!(
            "rbac_without_{}_{}{role}_it_is_told",
            grant.verb, grant.resource
        );
        steps.run(&name, || {
            cluster.revoke(&grant)?;
            let told = (row.breaks)(cluster);
            // Put back whatever was seen, or all that follows fails too.
            cluster.restore(&grant)?;
            let told = told.with_context(|| format!("without {grant}"))?;
            (row.recovers)(cluster).with_context(|| format!("with {grant} again"))?;
            Ok(told)
        });
    }
}

/// What the proxy-server logs as an error when it may not ask whose token it was shown.
pub(super) const MAY_NOT_ASK: &str = "may not ask about a ServiceAccount token";

/// The sentence of kube-apiserver, which `status` has.
fn forbidden(verb: &str, resource: &str) -> String {
    format!(
        "User \"system:serviceaccount:corvid:proxy-server\" cannot {verb} resource \"{resource}\""
    )
}

/// Starts the proxy-server, which knows nothing then, and waits for its agents.
fn restart(cluster: &mut Cluster) -> Result<()> {
    cluster.tunnel().server().kill()?;
    cluster.tunnel_mut().start_server()?;
    NODES
        .iter()
        .try_for_each(|name| cluster.tunnel().wait_session(name))
}

fn no_node_is_known(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    restart(cluster)?;
    let status = cluster.tunnel().wait_status(&forbidden("list", "nodes"))?;
    ensure!(status.starts_with("nodes: not known yet"), "{status}");
    let nodes = cluster.tunnel().nodes()?;
    ensure!(nodes.iter().all(|node| node.source == "agent"), "{nodes:?}");
    ensure!(cluster.tunnel().metric("corvid_cluster_synced")? == 0.0);
    told(cluster, mark, &forbidden("list", "nodes"))
}

fn nodes_are_not_followed(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    restart(cluster)?;
    let failures = cluster.tunnel().metric("corvid_cluster_failures_total")?;
    // All nodes are read anew before each try to watch them: they are known, and not followed.
    cluster.tunnel().wait_status(&forbidden("watch", "nodes"))?;
    cluster.tunnel().wait_node("edge1")?;
    until(DEADLINE, "failures are counted", || {
        let now = cluster.tunnel().metric("corvid_cluster_failures_total")?;
        ensure!(now > failures, "{now}");
        Ok(())
    })?;
    told(cluster, mark, &forbidden("watch", "nodes"))
}

/// The log has it too, once.
fn told(cluster: &Cluster, mark: u64, what: &str) -> Result<String> {
    let log = cluster.tunnel().server().log_since(mark);
    // kube-apiserver's quotes are escaped there.
    let log = log.replace('\\', "");
    let lines = log
        .lines()
        .filter(|line| line.contains(what))
        .collect::<Vec<_>>();
    ensure!(lines.len() == 1, "{lines:#?}");
    Ok(what.to_owned())
}

/// Known and followed: a change is seen.
fn nodes_are_known(cluster: &mut Cluster) -> Result<()> {
    for name in NODES {
        cluster.tunnel().wait_node(name)?;
    }
    until(DEADLINE, "nothing is complained of", || {
        let status = cluster.tunnel().status()?;
        ensure!(!status.contains("kube-apiserver: "), "{status}");
        Ok(())
    })?;
    for pool in ["press-shop", ""] {
        let value = if pool.is_empty() {
            json!(null)
        } else {
            json!(pool)
        };
        let patch = json!({"metadata": {"labels": {"apps.openyurt.io/nodepool": value}}});
        let patch = patch.to_string();
        cluster
            .kubectl()
            .ok(&["patch", "node", "edge1", "--type=merge", "-p", &patch])?;
        until(DEADLINE, &format!("edge1 is in pool {pool:?}"), || {
            let node = cluster.tunnel().wait_node("edge1")?;
            ensure!(node.pool.as_deref().unwrap_or_default() == pool, "{node:?}");
            Ok(())
        })?;
    }
    Ok(())
}

const LEASE: &str = "corvid-proxy-server";
const MAP: &str = "edge-tunnel-nodes";
const MAP_KEY: &str = "tunnel-nodes";

/// Waits until `status` has kube-apiserver's refusal in the line of the election or of the map.
fn told_of(cluster: &Cluster, line: &str, verb: &str, resource: &str) -> Result<String> {
    let wanted = forbidden(verb, resource);
    until(DEADLINE, &format!("{line} {wanted}"), || {
        let status = cluster.tunnel().status()?;
        let found = status
            .lines()
            .find(|said| said.starts_with(line) && said.contains(&wanted));
        Ok(found.context(status.clone())?.to_owned())
    })
}

fn nobody_leads_anew(cluster: &mut Cluster) -> Result<String> {
    cluster
        .kubectl()
        .ok(&["delete", "lease", LEASE, "-n", "corvid"])?;
    told_of(cluster, "lease: ", "create", "leases")
}

fn no_leader_is_known(cluster: &mut Cluster) -> Result<String> {
    restart(cluster)?;
    told_of(cluster, "lease: ", "get", "leases")
}

fn a_leader_can_not_go_on(cluster: &mut Cluster) -> Result<String> {
    let told = told_of(cluster, "lease: ", "update", "leases")?;
    // It stops by itself, and so does what it writes.
    until(DEADLINE, "nobody writes", || {
        let status = cluster.tunnel().status()?;
        ensure!(!status.contains("this server writes"), "{status}");
        Ok(())
    })?;
    Ok(told)
}

fn names_have_nowhere_to_point(cluster: &mut Cluster) -> Result<String> {
    told_of(cluster, "dns: ", "get", "services")
}

fn a_lost_map_stays_lost(cluster: &mut Cluster) -> Result<String> {
    cluster
        .kubectl()
        .ok(&["delete", "configmap", MAP, "-n", "kube-system"])?;
    told_of(cluster, "dns: ", "create", "configmaps")
}

fn the_map_can_not_be_looked_at(cluster: &mut Cluster) -> Result<String> {
    told_of(cluster, "dns: ", "get", "configmaps")
}

fn a_spoilt_map_stays_so(cluster: &mut Cluster) -> Result<String> {
    let patch = json!({"data": {MAP_KEY: "198.51.100.1\tedge1\n"}}).to_string();
    let patch = ["patch", "configmap", MAP, "-n", "kube-system", "-p", &patch];
    cluster.kubectl().ok(&patch)?;
    let told = told_of(cluster, "dns: ", "patch", "configmaps")?;
    ensure!(map(cluster)?.contains("198.51.100.1"), "it was repaired");
    Ok(told)
}

fn map(cluster: &Cluster) -> Result<String> {
    let data = format!("jsonpath={{.data.{MAP_KEY}}}");
    let get = ["get", "configmap", MAP, "-n", "kube-system", "-o", &data];
    Ok(String::from_utf8(cluster.kubectl().ok(&get)?)?)
}

/// This server leads, complains of nothing, and the names of both nodes point to the Service.
fn the_map_is_written(cluster: &mut Cluster) -> Result<()> {
    let address = "jsonpath={.spec.clusterIP}";
    let address = [
        "get",
        "service",
        "proxy-server",
        "-n",
        "corvid",
        "-o",
        address,
    ];
    let address = String::from_utf8(cluster.kubectl().ok(&address)?)?;
    until(DEADLINE, "the map is written", || {
        let status = cluster.tunnel().status()?;
        let of_dns = |line: &&str| line.starts_with("dns: ") || line.starts_with("lease: ");
        let lines = status.lines().filter(of_dns).collect::<Vec<_>>();
        let wanted = format!("dns: this server writes kube-system/{MAP}; ");
        let [only] = lines.as_slice() else {
            bail!("{status}");
        };
        ensure!(only.starts_with(&wanted), "{status}");
        let map = map(cluster)?;
        for node in NODES {
            let line = format!("{address}\t{node}");
            ensure!(map.lines().any(|there| there == line), "{map}");
        }
        Ok(())
    })
}

const SECRET: [&str; 4] = ["secret", "corvid-ca", "-n", "corvid"];

/// Waits until the log has kube-apiserver's refusal.
fn told_soon(cluster: &Cluster, mark: u64, what: &str) -> Result<String> {
    until(DEADLINE, what, || told(cluster, mark, what))
}

fn a_lost_authority_is_not_made_again(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    cluster.kubectl().ok(&[&["delete"], &SECRET[..]].concat())?;
    told_soon(cluster, mark, &forbidden("create", "secrets"))
}

fn the_authority_is_not_followed(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    let told = told_soon(cluster, mark, &forbidden("get", "secrets"))?;
    // What is at work goes on.
    enrol::ask(cluster)?;
    Ok(told)
}

/// The Secret is there, with the authority that is at work.
fn the_authority_is_kept(cluster: &mut Cluster) -> Result<()> {
    let pin = cluster.tunnel().pin()?;
    let kept = "jsonpath={.metadata.annotations.corvid\\.io/ca-pin}";
    let kept = [&["get", "-o", kept], &SECRET[..]].concat();
    until(DEADLINE, "the authority is kept", || {
        let kept = String::from_utf8(cluster.kubectl().ok(&kept)?)?;
        ensure!(kept == pin, "{kept} in place of {pin}");
        Ok(())
    })
}

fn no_root_is_made(cluster: &mut Cluster) -> Result<String> {
    let refused = cluster
        .tunnel()
        .as_account("ca-rotate-refused", &["ca", "rotate"]);
    let refused = format!("{:#}", refused.err().context("it was made")?);
    let told = forbidden("patch", "secrets");
    ensure!(refused.contains(&told), "{refused}");
    Ok(told)
}

/// A new root is at work at once, the sessions of before go on, and what enrols now is certified by it.
fn a_new_root_ends_no_session(cluster: &mut Cluster) -> Result<()> {
    let mark = cluster.tunnel().server().mark();
    let before = cluster.tunnel().pin()?;
    cluster
        .tunnel()
        .as_account("ca-rotate", &["ca", "rotate"])?;
    until(DEADLINE, "the new root is at work", || {
        let now = cluster.tunnel().pin()?;
        ensure!(now != before, "{now} still");
        Ok(())
    })?;
    the_authority_is_kept(cluster)?;
    enrol::ask(cluster)?;
    for node in NODES {
        cluster.tunnel().wait_session(node)?;
    }
    let log = cluster.tunnel().server().log_since(mark);
    ensure!(!log.contains("session down"), "{log}");
    Ok(())
}

fn other_servers_are_not_listed(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    restart(cluster)?;
    told_soon(cluster, mark, &in_a_namespace("list"))
}

/// The sentence about slices of one namespace; about those of all there may be another.
fn in_a_namespace(verb: &str) -> String {
    let said = forbidden(verb, "endpointslices");
    format!("{said} in API group \"discovery.k8s.io\" in the namespace")
}

fn at_cluster_scope(verb: &str) -> String {
    let said = forbidden(verb, "endpointslices");
    format!("{said} in API group \"discovery.k8s.io\" at the cluster scope")
}

fn other_servers_are_not_followed(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    restart(cluster)?;
    told_soon(cluster, mark, &in_a_namespace("watch"))
}

/// A server that comes is heard of: one that nobody runs, at an address of documentation.
fn other_servers_are_followed(cluster: &mut Cluster) -> Result<()> {
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": "proxy-server-peers-other", "namespace": "corvid",
            "labels": {"kubernetes.io/service-name": "proxy-server-peers"},
        },
        "ports": [{"name": "peers", "port": 8446, "protocol": "UDP"}],
        "endpoints": [{"addresses": ["192.0.2.7"], "conditions": {"ready": true}}],
    });
    cluster.create(&slice)?;
    until(DEADLINE, "the other server is known", || {
        let peers = cluster.tunnel().peers()?;
        ensure!(peers.contains("192.0.2.7:8446"), "{peers}");
        Ok(())
    })?;
    let delete = [
        "delete",
        "endpointslice",
        "proxy-server-peers-other",
        "-n",
        "corvid",
    ];
    cluster.kubectl().ok(&delete)?;
    until(DEADLINE, "the other server is gone", || {
        let peers = cluster.tunnel().peers()?;
        ensure!(!peers.contains("192.0.2.7:8446"), "{peers}");
        Ok(())
    })
}

fn no_token_is_known(cluster: &mut Cluster) -> Result<String> {
    may_not_ask(cluster, &forbidden("create", "tokenreviews"))
}

fn no_pod_is_known(cluster: &mut Cluster) -> Result<String> {
    may_not_ask(cluster, &forbidden("get", "pods"))
}

/// The agent is told to come back later, the log why.
fn may_not_ask(cluster: &Cluster, why: &str) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    let told = enrol::ask(cluster).err().context("it was let in")?;
    let told = format!("{told:#}");
    let wanted = "can't ask the cluster about the ServiceAccount token at the moment";
    ensure!(told.contains(wanted), "{told}");
    let log = cluster.tunnel().server().log_since(mark).replace('\\', "");
    let said = |line: &str| line.contains(MAY_NOT_ASK) && line.contains(why);
    ensure!(log.lines().any(said), "{log}");
    Ok(told)
}

fn a_pod_enrols(cluster: &mut Cluster) -> Result<()> {
    enrol::ask(cluster).map(drop)
}

const TRUST: [&str; 4] = ["configmap", "corvid-trust", "-n", "corvid"];

fn lost_roots_stay_lost(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    cluster.kubectl().ok(&[&["delete"], &TRUST[..]].concat())?;
    told_soon(cluster, mark, &forbidden("create", "configmaps"))
}

fn the_roots_can_not_be_looked_at(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    told_soon(cluster, mark, &forbidden("get", "configmaps"))
}

fn spoilt_roots_stay_so(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    let patch = json!({"data": {"ca.crt": "spoilt"}}).to_string();
    let patch = [&["patch"], &TRUST[..], &["-p", &patch]].concat();
    cluster.kubectl().ok(&patch)?;
    let told = told_soon(cluster, mark, &forbidden("patch", "configmaps"))?;
    ensure!(roots(cluster)? == "spoilt", "they were repaired");
    Ok(told)
}

fn roots(cluster: &Cluster) -> Result<String> {
    let data = "jsonpath={.data.ca\\.crt}";
    let get = [&["get", "-o", data], &TRUST[..]].concat();
    Ok(String::from_utf8(cluster.kubectl().ok(&get)?)?)
}

/// What agents in pods would mount names the authority that is at work.
fn the_roots_are_written(cluster: &mut Cluster) -> Result<()> {
    let pin = cluster.tunnel().pin()?;
    until(DEADLINE, "the roots are written", || {
        let bundle = TrustBundle::from_pem(roots(cluster)?.as_bytes())?;
        let pins: Vec<_> = bundle.pins().iter().map(ToString::to_string).collect();
        ensure!(pins.contains(&pin), "{pins:?} without {pin}");
        Ok(())
    })
}

fn no_pod_is_a_destination(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    restart(cluster)?;
    let told = told_soon(cluster, mark, &forbidden("list", "pods"))?;
    let refused = reach::by_name(cluster, "edge1");
    ensure!(refused.is_err(), "a pod that nobody knows is reached");
    Ok(told)
}

fn pods_are_not_followed(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    restart(cluster)?;
    let told = told_soon(cluster, mark, &forbidden("watch", "pods"))?;
    // They were listed.
    until(DEADLINE, "pods are known", || {
        reach::by_name(cluster, "edge1")
    })?;
    Ok(told)
}

fn pods_are_destinations(cluster: &mut Cluster) -> Result<()> {
    for node in NODES {
        until(DEADLINE, "pods are known", || reach::by_name(cluster, node))?;
    }
    Ok(())
}

fn no_service_is_a_destination(cluster: &mut Cluster) -> Result<String> {
    leads_nowhere(cluster, &forbidden("list", "services"))
}

fn nothing_is_behind_a_service(cluster: &mut Cluster) -> Result<String> {
    leads_nowhere(cluster, &at_cluster_scope("list"))
}

fn leads_nowhere(cluster: &mut Cluster, why: &str) -> Result<String> {
    services::offer(cluster)?;
    let mark = cluster.tunnel().server().mark();
    restart(cluster)?;
    let told = told_soon(cluster, mark, why)?;
    // Pods are known, so that is not why.
    pods_are_destinations(cluster)?;
    let refused = services::by_name(cluster, "edge1");
    ensure!(refused.is_err(), "a Service that nobody knows is reached");
    Ok(told)
}

fn services_are_not_followed(cluster: &mut Cluster) -> Result<String> {
    leads_there_unfollowed(cluster, &forbidden("watch", "services"))
}

fn endpoints_are_not_followed(cluster: &mut Cluster) -> Result<String> {
    leads_there_unfollowed(cluster, &at_cluster_scope("watch"))
}

fn leads_there_unfollowed(cluster: &mut Cluster, why: &str) -> Result<String> {
    services::offer(cluster)?;
    let mark = cluster.tunnel().server().mark();
    restart(cluster)?;
    let told = told_soon(cluster, mark, why)?;
    // They were listed.
    services_are_destinations(cluster)?;
    Ok(told)
}

fn services_are_destinations(cluster: &mut Cluster) -> Result<()> {
    for node in NODES {
        until(DEADLINE, "Services are known", || {
            services::by_name(cluster, node)
        })?;
    }
    Ok(())
}

/// edge1 is to be reached by a line and nothing else, or as before: its path changes. It shares its address, so no line
/// may be taken to it.
fn is_by_line(cluster: &Cluster, is_so: bool) -> Result<()> {
    let (pool, mode) = match is_so {
        true => (json!(BY_LINE), "refused"),
        false => (json!(null), "tunnel"),
    };
    let patch = json!({"metadata": {"labels": {"apps.openyurt.io/nodepool": pool}}});
    let patch = patch.to_string();
    cluster
        .kubectl()
        .ok(&["patch", "node", "edge1", "--type=merge", "-p", &patch])?;
    until(DEADLINE, &format!("the path of edge1 is {mode}"), || {
        let node = cluster.tunnel().wait_node("edge1")?;
        let path = node.path.context("it has no path")?;
        // Noticed, and so to be told of.
        ensure!(path.mode == mode && path.since_s.is_some(), "{path:?}");
        Ok(())
    })
}

fn changes_its_path(cluster: &Cluster, times: usize) -> Result<()> {
    (0..times).try_for_each(|_| {
        is_by_line(cluster, true)?;
        is_by_line(cluster, false)
    })
}

/// The Events that a proxy-server has told of edge1.
fn events(cluster: &Cluster) -> Result<Vec<Value>> {
    let get = ["get", "events.events.k8s.io", "-n", "default", "-o", "json"];
    let all: Value = serde_json::from_slice(&cluster.kubectl().ok(&get)?)?;
    let all = all.pointer("/items").and_then(Value::as_array);
    let is_ours = |event: &&Value| {
        let said = |pointer| event.pointer(pointer).and_then(Value::as_str);
        said("/reportingController") == Some("corvid.io/proxy-server")
            && said("/regarding/name") == Some("edge1")
            && said("/reason") == Some("PathChanged")
    };
    let all = all.context("no list of Events")?;
    Ok(all.iter().filter(is_ours).cloned().collect())
}

fn no_event_is_made(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    is_by_line(cluster, true)?;
    let told = told_soon(cluster, mark, &forbidden("create", "events"));
    let there = events(cluster)?;
    is_by_line(cluster, false)?;
    ensure!(there.is_empty(), "{there:?}");
    told
}

/// `kubectl describe` shows them at the Node.
fn events_are_made(cluster: &mut Cluster) -> Result<()> {
    changes_its_path(cluster, 1)?;
    until(DEADLINE, "an Event is told of edge1", || {
        let shown = cluster.kubectl().ok(&["describe", "node", "edge1"])?;
        let shown = String::from_utf8(shown)?;
        let there = events(cluster)?;
        ensure!(
            !there.is_empty() && shown.contains("PathChanged"),
            "{shown}"
        );
        Ok(())
    })
}

fn no_event_counts(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    // What was told within the last minutes is told again.
    changes_its_path(cluster, 2)?;
    // Those between that are made anew are taken, so it may be told more than once.
    let what = forbidden("patch", "events");
    until(DEADLINE, &what, || {
        let log = cluster.tunnel().server().log_since(mark);
        ensure!(log.replace('\\', "").contains(&what), "{log}");
        Ok(what.clone())
    })
}

fn events_count(cluster: &mut Cluster) -> Result<()> {
    changes_its_path(cluster, 2)?;
    until(DEADLINE, "an Event counts", || {
        let there = events(cluster)?;
        let counts = |event: &Value| {
            let count = event.pointer("/series/count").and_then(Value::as_u64);
            count.is_some_and(|count| count > 1)
        };
        ensure!(there.iter().any(counts), "{there:#?}");
        Ok(())
    })
}
