//! Many at once: readers that have stopped, and connections that say nothing, beside somebody who works.

use std::io::Read;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use e2e::client::{Door, Tunnel};
use e2e::kubelet::Behaviour;
use e2e::lab;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;
use tokio::time::Instant;

use crate::steps::{Descriptors, MIB, name_of, ping, whole};

/// Streams whose reader has stopped.
const STOPPED: usize = 64;
/// The server's budget for streams in the lab's configuration is the default of 256 MiB, the agent's 20 MiB; the programs
/// themselves, their sessions and what the allocator keeps get this much more.
const SERVER_BOUND: u64 = (256 + 96) * MIB;
const AGENT_BOUND: u64 = (20 + 44) * MIB;

/// How long a download takes.
fn download(door: &Door, bytes: u64) -> Result<Duration> {
    let start = Instant::now();
    let mut tunnel = door.open("edge1:10250", Behaviour::Send { bytes, seed: 2 })?;
    whole(&mut tunnel, bytes, 2)?;
    Ok(start.elapsed())
}

#[test]
fn stopped_readers_do_not_slow_one_that_reads() {
    lab::scenario(|lab| {
        let small = lab.small()?;
        let descriptors = Descriptors::of(&small)?;
        let (door, bytes) = (small.server.door(), 128 * MIB);
        let alone = download(&door, bytes)?;
        let mut stopped = Vec::new();
        for seed in 0..STOPPED as u64 {
            let behaviour = Behaviour::Send {
                bytes: 1 << 40,
                seed,
            };
            let mut tunnel = door.open("edge1:10250", behaviour)?;
            tunnel.read_exact(&mut [0; 1])?;
            stopped.push(tunnel);
        }
        let beside = [
            download(&door, bytes)?,
            download(&door, bytes)?,
            download(&door, bytes)?,
        ];
        let (server, agent) = (small.server.process().rss()?, small.agent.process().rss()?);
        lab::measured(&format!(
            "128 MiB alone in {alone:?}, beside {STOPPED} stopped readers in {beside:?}; server {} MiB, agent {} MiB",
            server / MIB,
            agent / MIB
        ));
        // Generous: other builds may share the machine. A stream that waits for a stopped one would never end.
        let limit = alone * 4 + Duration::from_secs(5);
        ensure!(
            beside.iter().all(|time| *time < limit),
            "alone {alone:?}, beside {beside:?}"
        );
        ensure!(
            server < SERVER_BOUND && agent < AGENT_BOUND,
            "server {server}, agent {agent} bytes"
        );
        drop(stopped);
        descriptors.returned(Duration::from_secs(30))
    });
}

/// Connections that say nothing.
const SILENT: usize = 10_000;
/// Threads that open them, so that a full backlog stops none of the others.
const OPENERS: usize = 8;

#[test]
fn ten_thousand_silent_connections_hurt_nobody_and_are_gone_after_the_header_time_out() {
    lab::scenario(|lab| {
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        ensure!(
            most > SILENT as u64 + 1000,
            "the limit of open files is {most}"
        );
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
        let small = lab.small_with(|config| config["timeouts"]["header"] = json!("5s"), |_| {})?;
        let descriptors = Descriptors::of(&small)?;
        let door = small.server.door();
        let mut echo = door.open("edge1:10250", Behaviour::Echo)?;
        let (start, mut slowest, mut requests) = (Instant::now(), Duration::ZERO, Vec::new());
        let openers: Vec<_> = (0..OPENERS)
            .map(|_| {
                let door = door.clone();
                std::thread::spawn(move || -> Result<Vec<Tunnel>> {
                    (0..SILENT / OPENERS).map(|_| door.knock()).collect()
                })
            })
            .collect();
        let mut silent = Vec::new();
        let mut most_files = 0;
        for opener in openers {
            while !opener.is_finished() {
                let sent = Instant::now();
                ping(&mut echo, "are you there")?;
                slowest = slowest.max(sent.elapsed());
                let asked = Instant::now();
                ensure!(name_of(&door, "edge1")? == "edge1");
                requests.push(asked.elapsed());
                most_files = most_files.max(small.server.process().fds()?);
            }
            silent.extend(
                opener
                    .join()
                    .map_err(|_panic| anyhow!("an opener panicked"))??,
            );
        }
        let request = requests
            .iter()
            .max()
            .context("no request while they came")?;
        lab::measured(&format!(
            "{SILENT} silent connections in {:?}: slowest ping {slowest:?}, slowest of {} requests {request:?}, {most_files} descriptors",
            start.elapsed(),
            requests.len()
        ));
        ensure!(slowest < Duration::from_secs(2), "a ping took {slowest:?}");
        ensure!(
            *request < Duration::from_secs(15),
            "a request took {request:?}"
        );
        let waiting = Instant::now();
        for mut tunnel in silent {
            let mut answer = Vec::new();
            // Whether it is told something before is the frontend's business; that it ends is the point.
            tunnel
                .read_to_end(&mut answer)
                .context("a silent connection is still open")?;
        }
        let gone = waiting.elapsed();
        lab::measured(&format!("the last of them was gone after {gone:?}"));
        ensure!(
            gone < Duration::from_secs(15),
            "the header time-out of 5 s took {gone:?}"
        );
        ping(&mut echo, "and still there")?;
        drop(echo);
        descriptors.returned(Duration::from_secs(20))
    });
}
