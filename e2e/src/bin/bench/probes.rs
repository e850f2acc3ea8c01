//! Nodes on a line that are looked at: what that costs, while they answer and while the line is cut. Needs root, as
//! the nodes' addresses, and the only packets that are counted, are in namespaces.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use e2e::lab::{START, binary};
use e2e::net::{self, Host, Net};
use e2e::process::{Process, Spawn};
use e2e::wait;
use serde_json::{Value, json};

/// How many, and for how long.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Nodes on a line.
    #[arg(long, default_value_t = 1000)]
    probed: usize,
    /// Seconds for which each of their states is measured.
    #[arg(long, default_value_t = 30)]
    probed_for: u64,
}

/// What it came to, a second.
struct Cost {
    cpu: f64,
    sent: f64,
    received: f64,
    kilobits: f64,
    mib: u64,
}

pub(crate) fn measure(options: &Options) -> Result<()> {
    if !net::may_run() {
        return Ok(());
    }
    let net = Net::new()?;
    let (cloud, edge) = (net.add("cloud")?, net.add("edge")?);
    net.link(
        (&cloud, "line0", "10.40.0.1/30"),
        (&edge, "line0", "10.40.0.2/30"),
    )?;
    // All of them are there.
    edge.ip("route add local 10.50.0.0/16 dev lo")?;
    cloud.ip("route add 10.50.0.0/16 via 10.40.0.2")?;
    let dir = tempfile::tempdir()?;
    let kubelet = Spawn::new("kubelet", binary("kubelet")?).args(["--name", "all"]);
    let kubelet = kubelet.host(&edge).start(dir.path())?;
    kubelet.wait_for_line("ready", START)?;
    let span = Duration::from_secs(options.probed_for);

    let alone = {
        let server = server(&cloud, dir.path(), options.probed, &json!([]))?;
        cost(&server, &cloud, span)?
    };
    let line = json!([{"name": "express", "networks": ["10.50.0.0/16"]}]);
    let server = server(&cloud, dir.path(), options.probed, &line)?;
    let probes = "corvid_line_probes_total{line=\"express\",result=\"ok\"}";
    until(&cloud, probes, options.probed)?;
    let probed = cost(&server, &cloud, span)?;
    edge.nft("table ip cut {\n chain all_of_it {\n type filter hook prerouting priority -300\n drop\n }\n }")?;
    until(
        &cloud,
        "corvid_line_nodes{line=\"express\",state=\"down\"}",
        options.probed,
    )?;
    let cut = cost(&server, &cloud, span)?;

    let count = options.probed;
    println!("| {count} nodes on a line | not looked at | looked at | the line is cut |");
    println!("| --- | --: | --: | --: |");
    let row = |name: &str, figure: fn(&Cost) -> f64, digits: usize| {
        let [alone, probed, cut] = [&alone, &probed, &cut].map(figure);
        println!("| {name} | {alone:.digits$} | {probed:.digits$} | {cut:.digits$} |");
    };
    row("CPU of the proxy-server, s/s", |cost| cost.cpu, 4);
    row("packets sent/s", |cost| cost.sent, 1);
    row("packets received/s", |cost| cost.received, 1);
    row("kbit/s, both ways", |cost| cost.kilobits, 0);
    row("memory of the proxy-server, MiB", |cost| cost.mib as f64, 0);
    println!();
    Ok(())
}

/// A server with these nodes, and these lines to them.
fn server(cloud: &Host, dir: &std::path::Path, nodes: usize, lines: &Value) -> Result<Process> {
    let node = |i: usize| json!({"node": format!("n{i}"), "addresses": [format!("10.50.{}.{}", i / 250, i % 250 + 1)]});
    let config = json!({
        "stateDir": dir.join("server"),
        "name": "bench",
        "backend": {"listen": ["127.0.0.1:8443"]},
        "frontends": [{"type": "httpConnect", "listen": format!("unix:{}", dir.join("connect.sock").display())}],
        "routes": (0..nodes).map(node).collect::<Vec<_>>(),
        "lines": lines,
        "observe": {"listen": "127.0.0.1:9440"},
        "admin": {"listen": "127.0.0.1:9442", "socket": dir.join("admin.sock")},
    });
    let file = dir.join("proxy-server.yaml");
    fs::write(&file, config.to_string())?;
    let server = Spawn::new("proxy-server", binary("proxy-server")?);
    let server = server.args(["run", "--config"]).arg(&file).host(cloud);
    let log = dir.join("proxy-server.log");
    let mark = fs::metadata(log).map_or(0, |log| log.len());
    let server = server.start(dir)?;
    server.wait_for_line_since(mark, "ready", START)?;
    Ok(server)
}

/// Waits until a metric is so much.
fn until(cloud: &Host, metric: &str, wanted: usize) -> Result<()> {
    wait::poll(Duration::from_mins(3), metric, || {
        let seen = e2e::lab::metric(cloud, metric);
        match seen {
            Ok(seen) if seen >= wanted as f64 => Ok(()),
            other => Err(other),
        }
    })
}

fn cost(server: &Process, cloud: &Host, span: Duration) -> Result<Cost> {
    let (cpu, before) = (server.cpu()?, counters(cloud)?);
    wait::pass(span);
    let (spent, after) = (server.cpu()? - cpu, counters(cloud)?);
    let seconds = span.as_secs_f64();
    let rate = |i: usize| (after[i] - before[i]) as f64 / seconds;
    Ok(Cost {
        cpu: spent.as_secs_f64() / seconds,
        sent: rate(0),
        received: rate(1),
        kilobits: (rate(2) + rate(3)) * 8.0 / 1000.0,
        mib: server.rss()? >> 20,
    })
}

/// Packets sent and received by the line, and bytes.
fn counters(cloud: &Host) -> Result<[u64; 4]> {
    let shown: Value = serde_json::from_str(&cloud.ip("-j -s link show dev line0")?)?;
    let count = |what: &str| {
        let count = shown.pointer(&format!("/0/stats64/{what}"));
        count
            .and_then(Value::as_u64)
            .with_context(|| what.to_owned())
    };
    Ok([
        count("tx/packets")?,
        count("rx/packets")?,
        count("tx/bytes")?,
        count("rx/bytes")?,
    ])
}
