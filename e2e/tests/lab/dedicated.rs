//! A dedicated line: a way of its own between the cloud and `edge3`, beside the internet and NAT.
//!
//! ```text
//! cloud 10.40.0.1 ======== line0 ======== 10.40.0.2 edge3 (10.33.0.10 on lo)
//!       203.0.113.10 --- inet --- nat3 --- 192.168.3.10
//! ```
//!
//! What listens at the node's address on the line and what the agent dials have names of their own, so each answer says
//! by which way it came; so do those of other sites.

use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::client::Door;
use e2e::lab::{self, Agent, Lab, Server};
use e2e::link::IpLink;
use e2e::net::Host;
use e2e::process::{Process, Spawn};
use e2e::wait;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::steps::{MIB, doors, name_of};

mod alone;
mod bouncing;
mod kinds;
mod out;
mod replicas;
mod running;
mod same_address;
mod weather;

use kinds::every_kind;

/// The node's address on the line.
const ADDRESS: &str = "10.33.0.10";
/// Who answers by the line, and who by the tunnel.
const LINE: &str = "edge3 by the line";
const TUNNEL: &str = "edge3 by the tunnel";
/// A destination of `edge3` that no line has.
const TUNNEL_ONLY: &str = "192.168.3.10";
/// For what is generous on a machine that builds something else meanwhile.
const SOON: Duration = Duration::from_secs(30);
const STABLE: Duration = Duration::from_secs(3);

/// The line, and what is at both its ends.
struct Bed {
    agent: Option<Agent>,
    by_line: Process,
    by_tunnel: Process,
    server: Server,
    line: IpLink,
}

impl Bed {
    /// With that configuration of paths, and an agent at `edge3`.
    fn lay(lab: &Lab, path: &Value) -> Result<Self> {
        let mut bed = Self::without_agent(lab, path, "auto")?;
        bed.agent = Some(agent(lab, &bed.server)?);
        until(&bed.server.door(), "edge3", LINE)?;
        Ok(bed)
    }

    /// Nothing at `edge3` knows of us.
    fn without_agent(lab: &Lab, path: &Value, mode: &str) -> Result<Self> {
        let line = line(lab, "cloud", 40)?;
        let server = lab.server(|config| on_a_line(config, path, mode))?;
        Ok(Self {
            agent: None,
            by_line: kubelet(lab, "edge3", LINE, ADDRESS)?,
            by_tunnel: kubelet(lab, "edge3", TUNNEL, "127.0.0.1")?,
            server,
            line,
        })
    }

    /// Cuts the line, and says how long the first request after took, which must go by the tunnel.
    fn cut(&self) -> Result<Duration> {
        self.line.cut();
        let asked = Instant::now();
        let who = name_of(&self.server.door(), "edge3")?;
        let took = asked.elapsed();
        ensure!(who == TUNNEL, "{who} answers after the line was cut");
        Ok(took)
    }
}

/// The server's settings: `edge3` is on the line.
fn on_a_line(config: &mut Value, path: &Value, mode: &str) {
    let addresses = json!([ADDRESS, TUNNEL_ONLY]);
    config["routes"] = json!([{"node": "edge3", "addresses": addresses}]);
    config["lines"] = json!([{"name": "express", "networks": ["10.33.0.0/24"], "mode": mode}]);
    config["path"] = path.clone();
    // A line that is cut is told of sooner than by default.
    config["timeouts"] = json!({"dial": "4s"});
}

/// Times as short as a test wants them.
fn short() -> Value {
    json!({
        "stable": "3s", "silence": "6s",
        "probes": {"interval": "1s", "timeout": "1s"},
    })
}

/// A line between a server's host and `edge3`, which has its address on it.
fn line(lab: &Lab, host: &str, network: u8) -> Result<IpLink> {
    let (near, far) = (lab.host(host)?, lab.host("edge3")?);
    let (own, other) = (
        format!("10.{network}.0.1/30"),
        format!("10.{network}.0.2/30"),
    );
    let interface = format!("line{network}");
    let line = IpLink::lay((&near, "line0", &own), (&far, &interface, &other), 7)?;
    // A second server's line leads to the same node.
    far.ip(&format!("addr replace {ADDRESS}/32 dev lo"))?;
    near.ip(&format!("route add {ADDRESS}/32 dev line0"))?;
    Ok(line)
}

fn agent(lab: &Lab, server: &Server) -> Result<Agent> {
    lab.agent(server, "edge3", |config| {
        config["localhostPorts"] = json!([10250]);
    })
}

/// A stand-in kubelet at one address of a host, with a name of its own.
fn kubelet(lab: &Lab, host: &str, name: &str, at: &str) -> Result<Process> {
    let log = format!("kubelet-{}", name.replace(' ', "-"));
    let (port, metrics) = (format!("{at}:10250"), format!("{at}:9100"));
    let process = Spawn::new(&log, lab::binary("kubelet")?)
        .args(["--name", name, "--listen", &port, "--metrics", &metrics])
        .host(&lab.host(host)?)
        .start(lab.dir())?;
    process.wait_for_line("ready", lab::START)?;
    Ok(process)
}

/// Waits until that one answers.
fn until(door: &Door, node: &str, who: &str) -> Result<()> {
    wait::poll(SOON, &format!("{who} answers for {node}"), || {
        let now = name_of(door, node).map_err(|error| format!("{error:#}"))?;
        if now == who { Ok(()) } else { Err(now) }
    })
}

/// While this lives, no datagram of the agent gets through its NAT box.
struct Blocked(Host);

impl Blocked {
    fn new(lab: &Lab) -> Result<Self> {
        let nat = lab.host("nat3")?;
        nat.nft(
            "table ip blocked {
                 chain datagrams {
                     type filter hook forward priority -10
                     meta l4proto udp drop
                 }
             }",
        )?;
        Ok(Self(nat))
    }

    fn end(self) -> Result<()> {
        self.0.run("nft", &["delete", "table", "ip", "blocked"])?;
        Ok(())
    }
}

#[test]
fn the_line_is_taken_while_it_works_and_the_tunnel_while_it_does_not() {
    lab::scenario(|lab| {
        let bed = Bed::lay(lab, &short())?;
        let doors = doors(&bed.server)?;
        let blocked = Blocked::new(lab)?;
        for door in &doors {
            every_kind(door, &bed.by_line, LINE)?;
        }
        ensure!(
            bed.line.counts().forwarded > 0,
            "nothing went over the line"
        );
        blocked.end()?;
        until(&doors[0], TUNNEL_ONLY, TUNNEL)?;

        let took = bed.cut()?;
        lab::measured(&format!("line cut: the first request after took {took:?}"));
        ensure!(took < SOON, "{took:?}");
        for door in &doors {
            every_kind(door, &bed.by_tunnel, TUNNEL)?;
        }

        // Not known to be down: each request after a first one that was slow would be slow as well.
        wait::poll(SOON, "the node is known to be down", || {
            let told = bed.server.explain("edge3")?;
            let is_up = told.pointer("/line/node/up").and_then(Value::as_bool);
            ensure!(is_up == Some(false), "{told}");
            Ok(())
        })?;
        let asked = Instant::now();
        ensure!(name_of(&doors[0], "edge3")? == TUNNEL);
        let known = asked.elapsed();

        let healed = Instant::now();
        bed.line.heal();
        until(&doors[0], "edge3", LINE)?;
        let back = healed.elapsed();
        lab::measured(&format!(
            "line known to be down: a request took {known:?}; line healed: it is taken after {back:?}, `stable` being {STABLE:?}"
        ));
        // What was good before the cut does not count; the first probe may be a little while after it.
        ensure!(back >= STABLE, "taken again after {back:?}");
        every_kind(&doors[1], &bed.by_line, LINE)?;
        let down = "corvid_line_switches_total{line=\"express\",of=\"node\"";
        let switches = bed.server.metric(down)?;
        ensure!((switches - 2.0).abs() < f64::EPSILON, "{switches} switches");
        Ok(())
    });
}
