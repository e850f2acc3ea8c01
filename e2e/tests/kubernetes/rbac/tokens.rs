//! Pods that enrol by the token of their ServiceAccount.

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::Cluster;

use super::{MAY_NOT_ASK, forbidden};
use crate::enrol;

pub(super) fn no_token_is_known(cluster: &mut Cluster) -> Result<String> {
    may_not_ask(cluster, &forbidden("create", "tokenreviews"))
}

pub(super) fn no_pod_is_known(cluster: &mut Cluster) -> Result<String> {
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

pub(super) fn a_pod_enrols(cluster: &mut Cluster) -> Result<()> {
    enrol::ask(cluster).map(drop)
}
