//! Pods and Services, as what is asked for by name.

use anyhow::{Result, ensure};
use e2e::cluster::{Cluster, NODES, until};

use super::{DEADLINE, forbidden, restart, told_soon};
use crate::{reach, services};

fn at_cluster_scope(verb: &str) -> String {
    let said = forbidden(verb, "endpointslices");
    format!("{said} in API group \"discovery.k8s.io\" at the cluster scope")
}

pub(super) fn no_pod_is_a_destination(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    restart(cluster)?;
    let told = told_soon(cluster, mark, &forbidden("list", "pods"))?;
    let refused = reach::by_name(cluster, "edge1");
    ensure!(refused.is_err(), "a pod that nobody knows is reached");
    Ok(told)
}

pub(super) fn pods_are_not_followed(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    restart(cluster)?;
    let told = told_soon(cluster, mark, &forbidden("watch", "pods"))?;
    // They were listed.
    until(DEADLINE, "pods are known", || {
        reach::by_name(cluster, "edge1")
    })?;
    Ok(told)
}

pub(super) fn pods_are_destinations(cluster: &mut Cluster) -> Result<()> {
    for node in NODES {
        until(DEADLINE, "pods are known", || reach::by_name(cluster, node))?;
    }
    Ok(())
}

pub(super) fn no_service_is_a_destination(cluster: &mut Cluster) -> Result<String> {
    leads_nowhere(cluster, &forbidden("list", "services"))
}

pub(super) fn nothing_is_behind_a_service(cluster: &mut Cluster) -> Result<String> {
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

pub(super) fn services_are_not_followed(cluster: &mut Cluster) -> Result<String> {
    leads_there_unfollowed(cluster, &forbidden("watch", "services"))
}

pub(super) fn endpoints_are_not_followed(cluster: &mut Cluster) -> Result<String> {
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

pub(super) fn services_are_destinations(cluster: &mut Cluster) -> Result<()> {
    for node in NODES {
        until(DEADLINE, "Services are known", || {
            services::by_name(cluster, node)
        })?;
    }
    Ok(())
}
