//! The daemons themselves: where their sessions come from, what they hold, what they log.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::content::LINE;
use e2e::cluster::{Cluster, NODES, pods, until};

use crate::rbac;

/// The address of the NAT box of each node, in their order.
const BOXES: [&str; 2] = ["198.51.100.2", "198.51.100.10"];

/// Both nodes have one session, from their NAT box, and their logs have come through it.
pub(super) fn sessions(cluster: &Cluster) -> Result<String> {
    let sessions = cluster.tunnel().sessions()?;
    ensure!(sessions.len() == NODES.len(), "{sessions:?}");
    for (node, address) in NODES.iter().zip(BOXES) {
        let session = sessions.iter().find(|session| session.agent == *node);
        let session = session.with_context(|| format!("{node} has no session"))?;
        ensure!(session.remote.ip().to_string() == address, "{session:?}");
        ensure!(session.transport == "quic", "{session:?}");
        let least = pods::BOOK_LINES * LINE as u64;
        ensure!(
            session.bytes_in > least,
            "{session:?} has carried no {least} bytes"
        );
    }
    Ok(BOXES.join(", "))
}

/// How many descriptors the daemons had before the first request.
pub(super) struct Open(Vec<(String, usize)>);

impl Open {
    pub(super) fn count(cluster: &Cluster) -> Result<Self> {
        let counts = cluster
            .tunnel()
            .daemons()
            .map(|daemon| Ok((daemon.name().to_owned(), daemon.fds()?)));
        Ok(Self(counts.collect::<Result<_>>()?))
    }

    /// Ends kube-apiserver, which keeps connections for later, and waits until the daemons have as little open as before.
    pub(super) fn compare(&self, cluster: &mut Cluster) -> Result<String> {
        cluster.stop_apiserver()?;
        cluster.tunnel().wait_idle()?;
        until(Duration::from_secs(20), "descriptors are closed", || {
            let open = Self::count(cluster)?.0;
            let fewer = open
                .iter()
                .zip(&self.0)
                .all(|(after, before)| after.1 <= before.1);
            ensure!(fewer, "{open:?}, and before {:?}", self.0);
            Ok(())
        })?;
        let counts = self.0.iter().map(|(name, count)| format!("{name} {count}"));
        Ok(format!(
            "descriptors: {}",
            counts.collect::<Vec<_>>().join(", ")
        ))
    }
}

/// No daemon has logged an error or a panic; the edge whose agent was killed is a warning at most.
pub(super) fn no_complaints(cluster: &Cluster) -> Result<String> {
    let mut lines = 0;
    for daemon in cluster.tunnel().daemons() {
        let log = daemon.log();
        let is_bad = |line: &&str| line.contains("ERROR") || line.contains("panicked");
        let mut bad = log.lines().filter(is_bad);
        // Said where it should be: when a right was taken away.
        let bad = bad.find(|line| !line.contains(rbac::MAY_NOT_ASK));
        ensure!(bad.is_none(), "{} logs {bad:?}", daemon.name());
        lines += log.lines().count();
    }
    Ok(format!("{lines} lines of log"))
}
