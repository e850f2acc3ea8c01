//! The simulated nodes: what the processes of this benchmark know of each other, as a file.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

/// Loopback ports of a node; each node has its own, so that no agent reaches what is another's.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Node {
    /// Also the agent's, and in the kubelet's certificate.
    pub(super) name: String,
    /// Plain HTTP.
    pub(super) exporter: u16,
    /// TLS.
    pub(super) kubelet: u16,
}

pub(super) fn name(index: usize) -> String {
    format!("edge{index:04}")
}

pub(super) fn write(dir: &Path, nodes: &[Node]) -> Result<()> {
    Ok(fs::write(
        dir.join("nodes.json"),
        serde_json::to_vec(nodes)?,
    )?)
}

pub(super) fn read(dir: &Path) -> Result<Vec<Node>> {
    let text = fs::read(dir.join("nodes.json")).context("read the list of nodes")?;
    Ok(serde_json::from_slice(&text)?)
}
