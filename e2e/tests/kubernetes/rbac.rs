//! Each verb that `deploy/rbac` grants is needed: without it a named thing fails and says why, and with it again works
//! without anybody's help.

mod authority;
mod destinations;
mod events;
mod names;
mod nodes;
mod peers;
mod rows;
mod tokens;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{Cluster, Grant, NODES, Steps, until};
use rows::ROWS;

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

/// Waits until the log has kube-apiserver's refusal.
fn told_soon(cluster: &Cluster, mark: u64, what: &str) -> Result<String> {
    until(DEADLINE, what, || told(cluster, mark, what))
}
