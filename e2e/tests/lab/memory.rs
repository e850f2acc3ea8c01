//! An agent with the memory that its pod has.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cgroup::MemoryGroup;
use e2e::client::{Door, Tunnel};
use e2e::kubelet::Behaviour;
use e2e::lab;
use serde_json::json;
use tokio::time::Instant;

use crate::steps::{MIB, ping, whole};
use crate::streams::{download, joined, upload};

/// The limit of the DaemonSet in `deploy/`, and what its configuration says about unread bytes.
const LIMIT: u64 = 32 * MIB;
const BUDGET: &str = "2MiB";
/// Of the limit, what the kernel may keep for sockets, where it counts that apart.
const SOCKETS: u64 = 10 * MIB;
/// Streams whose reader in the cloud has stopped, whose reader at the edge has, and that are open and quiet.
const STOPPED: u64 = 150;
const HANGING: u64 = 150;
const QUIET: usize = 150;
/// Bulk each way beside them.
const BULK: u64 = 64 * MIB;
const BULKS: usize = 3;
/// Downloads at once that are read as they come: more than the budget has room for, were they to count.
const CROWD: u64 = 150;
/// Dials when all of that is open.
const DIALS: u32 = 20;
/// Longest silence of a bulk stream: other builds may share the machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// Downloads that share the line: each is whole, however long it waits for its turn.
fn crowd(door: &Door) -> Result<()> {
    let fetch = |seed| {
        let door = door.clone();
        std::thread::spawn(move || {
            let mut tunnel = door.open("edge1:10250", Behaviour::Send { bytes: MIB, seed })?;
            tunnel.patience(PATIENCE)?;
            whole(&mut tunnel, MIB, seed)
        })
    };
    let all: Vec<_> = (0..CROWD).map(fetch).collect();
    for fetched in all {
        joined(fetched).context("one of many downloads")?;
    }
    Ok(())
}

/// Writes until nothing more is taken: what is between is full.
fn fill(tunnel: &mut Tunnel) -> Result<u64> {
    tunnel.impatient(Duration::from_millis(500))?;
    let (chunk, mut written) = ([0x5a; 64 << 10], 0);
    loop {
        match tunnel.write(&chunk) {
            Ok(count) => written += count as u64,
            // Stopped, or reset because the budget is spent on others.
            Err(_) => return Ok(written),
        }
    }
}

#[test]
fn an_agent_with_32_mib_survives_hundreds_of_streams_and_loses_no_byte() {
    lab::scenario(|lab| {
        let group = MemoryGroup::new(LIMIT, SOCKETS)?;
        let start = Instant::now();
        let small = lab.small_within(&group, |config| config["memory"] = json!(BUDGET))?;
        let (door, rested) = (small.server.door(), group.peak()?);
        let mut stopped = Vec::new();
        for seed in 0..STOPPED {
            let bytes = 1 << 40;
            let mut tunnel = door.open("edge1:10250", Behaviour::Send { bytes, seed })?;
            tunnel.read_exact(&mut [0; 1])?;
            stopped.push(tunnel);
        }
        let mut quiet = Vec::new();
        for _ in 0..QUIET {
            let mut tunnel = door.open("edge1:10250", Behaviour::Echo)?;
            ping(&mut tunnel, "hello")?;
            quiet.push(tunnel);
        }
        let mut hanging = Vec::new();
        for _ in 0..HANGING {
            hanging.push(door.open("edge1:10250", Behaviour::Deaf)?);
        }
        let fillers: Vec<_> = hanging
            .into_iter()
            .map(|mut tunnel| std::thread::spawn(move || fill(&mut tunnel).map(|_| tunnel)))
            .collect();
        let mut bulk = Vec::new();
        for _ in 0..BULKS {
            bulk.push(download(&door, BULK, PATIENCE)?);
        }
        let mut uploads = Vec::new();
        for _ in 0..BULKS {
            uploads.push(upload(&door, "edge1:10250", BULK, PATIENCE)?);
        }
        let hanging: Vec<_> = fillers.into_iter().map(joined).collect::<Result<_>>()?;
        for download in bulk {
            joined(download).context("a download beside the rest")?;
        }
        for upload in uploads {
            joined(upload).context("an upload beside the rest")?;
        }
        crowd(&door)?;
        for (i, tunnel) in quiet.iter_mut().enumerate() {
            ping(tunnel, &format!("still there {i}")).context("a quiet stream")?;
        }
        // With all of them still open.
        let dialled = Instant::now();
        for seed in 0..DIALS.into() {
            let mut tunnel = door.open("edge1:10250", Behaviour::Send { bytes: MIB, seed })?;
            whole(&mut tunnel, MIB, seed).context("a dial beside all the rest")?;
        }
        let dialled = dialled.elapsed() / DIALS;
        let sockets = group.socket_peak()?.unwrap_or_default();
        lab::measured(&format!(
            "agent with {} MiB: peak {:.1} MiB ({:.1} at rest), sockets {:.1} MiB beside it; a dial and 1 MiB in {dialled:?}; {STOPPED} + {HANGING} stopped, {QUIET} quiet, {BULKS} x {} MiB each way and {CROWD} x 1 MiB in {:?}",
            LIMIT / MIB,
            group.peak()? as f64 / MIB as f64,
            rested as f64 / MIB as f64,
            sockets as f64 / MIB as f64,
            BULK / MIB,
            start.elapsed()
        ));
        drop((stopped, hanging, quiet));
        let mut after = door.open(
            "edge1:10250",
            Behaviour::Send {
                bytes: 4 * MIB,
                seed: 3,
            },
        )?;
        whole(&mut after, 4 * MIB, 3)?;
        ensure!(
            small.agent.process().exited()?.is_none(),
            "the agent is gone"
        );
        ensure!(group.kills()? == 0, "the kernel killed for want of memory");
        // What the limits enforce, said again: one day there may be none for sockets.
        ensure!(
            group.peak()? + group.socket_peak()?.unwrap_or_default() <= LIMIT,
            "the process and its sockets had more than the limit"
        );
        ensure!(
            group.sockets_refused()? == 0,
            "the kernel refused sockets memory: they had {sockets} bytes"
        );
        Ok(())
    });
}
