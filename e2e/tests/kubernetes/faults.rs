//! Readers that stop, agents that die, nodes that are not there.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::content::{LINE, LineCheck};
use e2e::cluster::{Cluster, pods, until};
use nix::sys::signal::Signal;
use parking_lot::Mutex;
use serde_json::json;
use tokio::time::Instant;

use crate::logs::{self, Followed};

/// How often a small request is timed.
const PROBES: usize = 10;
/// How long the reader stays stopped at least: konnectivity's own client gives up after 10 s.
const STOPPED: Duration = Duration::from_secs(15);
/// A small request beside a stopped reader may take this much longer than the slowest before; all share two cores.
const SLACK: Duration = Duration::from_secs(2);

/// Times small requests to the node with the stopped reader, returns the slowest.
fn probe(cluster: &Cluster) -> Result<Duration> {
    let mut slowest = Duration::ZERO;
    for _ in 0..PROBES {
        let start = Instant::now();
        let line =
            cluster
                .kubectl()
                .ok(&["logs", &pods::name("edge1"), "-c", "book", "--tail=1"])?;
        ensure!(line.len() == LINE, "{}", String::from_utf8_lossy(&line));
        slowest = slowest.max(start.elapsed());
    }
    Ok(slowest)
}

/// Stops a `kubectl logs -f` that has 100 MB to read, and measures what others get meanwhile; then lets it read on to the
/// end: nothing may be missing.
pub(super) fn stopped_reader(cluster: &Cluster) -> Result<String> {
    let pod = pods::name("edge1");
    let usual = (probe(cluster)?, logs::long_log(cluster, "edge1")?);
    let check = Arc::new(Mutex::new(LineCheck::new("edge1")));
    let (sink, seen) = (Arc::clone(&check), Arc::clone(&check));
    let args = ["logs", "-f", &pod, "-c", "firehose"];
    let mut reader = cluster
        .kubectl()
        .start_into(&args, move |bytes| sink.lock().feed(bytes))?;
    let go = [
        "exec",
        &pod,
        "-c",
        "firehose",
        "--",
        "sh",
        "-c",
        "echo >/tmp/go",
    ];
    cluster.kubectl().ok(&go)?;
    let count = move || seen.lock().count();
    until(Duration::from_secs(60), "the firehose runs", || {
        let lines = count()?;
        ensure!(lines > 1000, "{lines} lines; {}", reader.errors());
        Ok(())
    })?;

    reader.signal(Signal::SIGSTOP)?;
    let stopped = Instant::now();
    let mut beside = (Duration::ZERO, Duration::ZERO);
    while stopped.elapsed() < STOPPED {
        beside.0 = beside.0.max(probe(cluster)?);
        beside.1 = beside.1.max(logs::long_log(cluster, "edge1")?);
    }
    let before = count()?;
    ensure!(
        before < pods::FIREHOSE_LINES,
        "it had read everything before it was stopped"
    );
    let note = format!(
        "small request {:.0?}, beside it {:.0?}; 50 MB {:.1?}, beside it {:.1?}; stopped at line {before}",
        usual.0, beside.0, usual.1, beside.1
    );
    ensure!(beside.0 < usual.0 + SLACK, "{note}");
    ensure!(beside.1 < usual.1 * 3 + SLACK, "{note}");

    reader.signal(Signal::SIGCONT)?;
    until(
        Duration::from_secs(120),
        "the stopped reader reads to the end",
        || {
            let lines = count()?;
            ensure!(
                lines == pods::FIREHOSE_LINES,
                "{lines} lines; {}",
                reader.errors()
            );
            Ok(())
        },
    )?;
    Ok(note)
}

/// As [`stopped_reader`], through konnectivity's gRPC: nobody else is delayed. The stopped one itself is given up after 10 s
/// by kube-apiserver's own client, whatever the server does; what it reads until then has no gap.
pub(super) fn stopped_reader_of_konnectivity(cluster: &Cluster) -> Result<String> {
    let pod = pods::name("edge1");
    let usual = probe(cluster)?;
    let check = Arc::new(Mutex::new(LineCheck::new("edge1")));
    let (sink, seen) = (Arc::clone(&check), Arc::clone(&check));
    let args = ["logs", "-f", &pod, "-c", "firehose"];
    let mut reader = cluster
        .kubectl()
        .start_into(&args, move |bytes| sink.lock().feed(bytes))?;
    let count = move || seen.lock().count();
    until(Duration::from_secs(60), "the firehose is read", || {
        let lines = count()?;
        ensure!(lines > 1000, "{lines} lines; {}", reader.errors());
        Ok(())
    })?;
    reader.signal(Signal::SIGSTOP)?;
    let stopped = Instant::now();
    let mut beside = Duration::ZERO;
    while stopped.elapsed() < STOPPED {
        beside = beside.max(probe(cluster)?);
    }
    let before = count()?;
    ensure!(
        before < pods::FIREHOSE_LINES,
        "it had read everything before it was stopped"
    );
    ensure!(
        beside < usual + SLACK,
        "small request {usual:.0?}, beside it {beside:.0?}"
    );
    reader.signal(Signal::SIGCONT)?;
    // The container does not end, so neither would its log.
    let mut given_up = false;
    let lines = until(Duration::from_secs(120), "the reader goes on", || {
        given_up = reader.wait(Duration::ZERO).is_ok();
        let lines = count()?;
        ensure!(
            given_up || lines == pods::FIREHOSE_LINES,
            "{lines} lines; {}",
            reader.errors()
        );
        Ok(lines)
    })?;
    Ok(format!(
        "small request {usual:.0?}, beside it {beside:.0?}; stopped at line {before}, read to line {lines}, given up: {given_up}"
    ))
}

/// What kube-apiserver's user reads of a node that no agent serves.
const UNKNOWN: &str = "ghost:10250: the destination is no node at the edge";

/// A node that no agent serves: the user is told which, and why.
pub(super) fn unknown_node(cluster: &Cluster) -> Result<String> {
    if cluster.kubectl().ok(&["get", "node", "ghost"]).is_err() {
        cluster.create(&json!({
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": "ghost"},
            "status": {
                "addresses": [
                    {"type": "InternalIP", "address": "192.168.1.10"},
                    {"type": "Hostname", "address": "ghost"},
                ],
                "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
            },
        }))?;
        cluster.create(&pods::pod("ghost"))?;
    }
    let start = Instant::now();
    let logs = cluster
        .kubectl()
        .fails(&["logs", &pods::name("ghost"), "-c", "tools"])?;
    let exec =
        cluster
            .kubectl()
            .fails(&["exec", &pods::name("ghost"), "-c", "tools", "--", "true"])?;
    let raw = cluster
        .kubectl()
        .fails(&["get", "--raw", "/api/v1/nodes/ghost/proxy/metrics"])?;
    let seconds = start.elapsed().as_secs_f64();
    for text in [&logs, &exec, &raw] {
        ensure!(text.contains(UNKNOWN), "{text:?} does not tell {UNKNOWN:?}");
    }
    ensure!(seconds < 10.0, "three refusals took {seconds:.1} s");
    Ok(logs)
}

/// Kills an agent under a running exec and a followed log; another edge must not notice.
pub(super) fn killed_agent(cluster: &mut Cluster) -> Result<String> {
    let pod = pods::name("edge1");
    let script = "while :; do echo alive; sleep 1; done";
    let args = ["exec", &pod, "-c", "tools", "--", "sh", "-c", script];
    let mut exec = cluster.kubectl().start(&args)?;
    exec.wait_for("alive", Duration::from_secs(30))?;
    let mut followed = Followed::start(cluster, "edge1")?;
    let other = Followed::start(cluster, "edge2")?;
    until(Duration::from_secs(30), "both logs flow", || {
        let (own, other) = (followed.count()?, other.count()?);
        ensure!(own > 0 && other > 0, "{own} and {other} lines");
        Ok(())
    })?;

    let edge = cluster.host("edge1")?;
    cluster.tunnel().agent("edge1")?.kill()?;
    let start = Instant::now();
    let first = cluster.kubectl().fails(&["logs", &pod, "-c", "tools"])?;
    let status = exec
        .wait(Duration::from_secs(60))
        .context("exec after its agent was killed")?;
    ensure!(
        !status.success(),
        "exec ended with {status}, as if all were well"
    );
    followed
        .ended(Duration::from_secs(60))
        .context("logs -f after its agent was killed")?;
    let ended = start.elapsed().as_secs_f64();
    let lines = followed.count()?;
    let later = cluster.kubectl().fails(&["logs", &pod, "-c", "tools"])?;
    for told in ["node edge1: no session ", " since ", "last error: "] {
        ensure!(later.contains(told), "{later:?} does not tell {told:?}");
    }
    let seen = other.count()?;
    until(Duration::from_secs(10), "the other edge goes on", || {
        let count = other.count()?;
        ensure!(count > seen, "{count} lines");
        Ok(())
    })?;

    // An agent that comes back is used again, and the log has gone on meanwhile.
    let start = Instant::now();
    cluster.tunnel_mut().start_agent(&edge)?;
    cluster.tunnel().wait_session("edge1")?;
    let back = start.elapsed().as_secs_f64();
    let tail = cluster
        .kubectl()
        .ok(&["logs", &pod, "-c", "ticker", "--tail=1"])?;
    let tail = String::from_utf8(tail)?;
    let last = tail.split(' ').next().unwrap_or_default().parse::<u64>()?;
    ensure!(last > lines, "line {last} after {lines}");
    Ok(format!(
        "all ended after {ended:.1} s, back after {back:.1} s; at once {first:?}, later {later:?}"
    ))
}
