//! The Secret of the authority, and the ConfigMap of its roots.

use anyhow::{Context as _, Result, ensure};
use certs::TrustBundle;
use e2e::cluster::{Cluster, NODES, until};
use serde_json::json;

use super::{DEADLINE, forbidden, told_soon};
use crate::enrol;

const SECRET: [&str; 4] = ["secret", "corvid-ca", "-n", "corvid"];

pub(super) fn a_lost_authority_is_not_made_again(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    cluster.kubectl().ok(&[&["delete"], &SECRET[..]].concat())?;
    told_soon(cluster, mark, &forbidden("create", "secrets"))
}

pub(super) fn the_authority_is_not_followed(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    let told = told_soon(cluster, mark, &forbidden("get", "secrets"))?;
    // What is at work goes on.
    enrol::ask(cluster)?;
    Ok(told)
}

/// The Secret is there, with the authority that is at work.
pub(super) fn the_authority_is_kept(cluster: &mut Cluster) -> Result<()> {
    let pin = cluster.tunnel().pin()?;
    let kept = "jsonpath={.metadata.annotations.corvid\\.io/ca-pin}";
    let kept = [&["get", "-o", kept], &SECRET[..]].concat();
    until(DEADLINE, "the authority is kept", || {
        let kept = String::from_utf8(cluster.kubectl().ok(&kept)?)?;
        ensure!(kept == pin, "{kept} in place of {pin}");
        Ok(())
    })
}

pub(super) fn no_root_is_made(cluster: &mut Cluster) -> Result<String> {
    let refused = cluster
        .tunnel()
        .as_account("ca-rotate-refused", &["ca", "rotate"]);
    let refused = format!("{:#}", refused.err().context("it was made")?);
    let told = forbidden("patch", "secrets");
    ensure!(refused.contains(&told), "{refused}");
    Ok(told)
}

/// A new root is at work at once, the sessions of before go on, and what enrols now is certified by it.
pub(super) fn a_new_root_ends_no_session(cluster: &mut Cluster) -> Result<()> {
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

const TRUST: [&str; 4] = ["configmap", "corvid-trust", "-n", "corvid"];

pub(super) fn lost_roots_stay_lost(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    cluster.kubectl().ok(&[&["delete"], &TRUST[..]].concat())?;
    told_soon(cluster, mark, &forbidden("create", "configmaps"))
}

pub(super) fn the_roots_can_not_be_looked_at(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    told_soon(cluster, mark, &forbidden("get", "configmaps"))
}

pub(super) fn spoilt_roots_stay_so(cluster: &mut Cluster) -> Result<String> {
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
pub(super) fn the_roots_are_written(cluster: &mut Cluster) -> Result<()> {
    let pin = cluster.tunnel().pin()?;
    until(DEADLINE, "the roots are written", || {
        let bundle = TrustBundle::from_pem(roots(cluster)?.as_bytes())?;
        let pins: Vec<_> = bundle.pins().iter().map(ToString::to_string).collect();
        ensure!(pins.contains(&pin), "{pins:?} without {pin}");
        Ok(())
    })
}
