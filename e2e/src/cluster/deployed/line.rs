//! A dedicated line from the cloud to each edge, beside the internet; and what can happen to either.

use std::fs;
use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::super::{Cluster, NODES};
use super::{CLOUD, Deployed, NODE_PORT};

/// The networks of all lines.
pub const LINES: &str = "10.77.0.0/16";
/// What an edge calls its end.
const END: &str = "line";

/// The edge's address on its line.
fn address(number: u8) -> IpAddr {
    IpAddr::from([10, 77, number, 2])
}

impl Cluster<Deployed> {
    /// Lays a line to each edge, and has its kubelet take the address there.
    ///
    /// # Errors
    /// When `ip` fails, or Kubernetes does not learn of the address.
    pub fn lay_lines(&mut self) -> Result<()> {
        let cloud = self.host(CLOUD)?;
        for (number, name) in (1..).zip(NODES) {
            let edge = self.host(name)?;
            let near = format!("line{number}");
            self.net.link(
                (&cloud, &near, &format!("10.77.{number}.1/30")),
                (&edge, END, &format!("{}/30", address(number))),
            )?;
            self.move_node(name, address(number))?;
        }
        Ok(())
    }

    /// What goes over the lines vanishes from now on, or does so no more; nobody is told.
    ///
    /// # Errors
    /// When `nft` fails.
    pub fn cut_lines(&self, cut: bool) -> Result<()> {
        for name in NODES {
            let edge = self.host(name)?;
            if cut {
                edge.nft(&format!(
                    "table inet cut {{
                         chain from {{ type filter hook input priority -10; iifname \"{END}\" drop; }}
                         chain to {{ type filter hook output priority -10; oifname \"{END}\" drop; }}
                     }}"
                ))?;
            } else {
                edge.nft("delete table inet cut")?;
            }
        }
        Ok(())
    }

    /// What the agents of both edges send to the servers vanishes from now on, or does so no more.
    ///
    /// # Errors
    /// When `nft` fails.
    pub fn block_tunnel(&self, blocked: bool) -> Result<()> {
        for number in 1..=NODES.len() {
            let nat = self.host(&format!("nat{number}"))?;
            if blocked {
                nat.nft(&format!(
                    "table inet blocked {{
                         chain out {{ type filter hook forward priority -10; meta l4proto {{ tcp, udp }} th dport {NODE_PORT} drop; }}
                     }}"
                ))?;
            } else {
                nat.nft("delete table inet blocked")?;
            }
        }
        Ok(())
    }

    /// Replaces something in a file of the user's copy of `deploy/`.
    ///
    /// # Errors
    /// When it is not in there.
    pub fn edit(&self, file: &str, from: &str, to: &str) -> Result<()> {
        let file = self.tunnel.folder.join("deploy").join(file);
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        ensure!(text.contains(from), "no {from:?} in {}", file.display());
        Ok(fs::write(&file, text.replace(from, to))?)
    }

    /// What the next request of kube-apiserver to that node does, as the server on its host explains it.
    ///
    /// # Errors
    /// When it does not.
    pub fn explained(&self, node: &str) -> Result<String> {
        let (pod, server) = ("daemonset/proxy-server-control-plane", "/bin/proxy-server");
        let socket = "/var/lib/corvid/admin.sock";
        let exec = ["-n", "corvid", "exec", pod, "--", server];
        let explain = ["explain", node, "--json", "--socket", socket];
        let told = self.kubectl.ok(&[&exec[..], &explain].concat())?;
        let told: Value = serde_json::from_slice(&told)?;
        let next = told.get("next").and_then(Value::as_str);
        Ok(next.with_context(|| told.to_string())?.to_owned())
    }
}
