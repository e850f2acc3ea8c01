//! Several proxy-servers: one that is killed, and a load balancer in front of two.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::kubelet::Behaviour;
use e2e::lab::{self, Agent, Another, Lab, Server};
use e2e::process::Process;
use e2e::wait;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::steps::{name_of, ping};
use crate::streams::Watch;

const PATIENCE: Duration = Duration::from_secs(60);
/// Where the servers' peers come in; each is told of both.
const PEERS: [&str; 2] = ["203.0.113.10:8446", "192.0.2.10:8446"];
/// Where the load balancer is.
const BALANCER: &str = "203.0.113.100:8443";

/// Two servers with agents, and one with frontends only, as a control-plane host has it.
struct Servers {
    first: Server,
    second: Server,
    control: Server,
}

fn servers(lab: &Lab) -> Result<Servers> {
    let (net, inet) = (lab.net(), lab.host("inet")?);
    for (name, network, route) in [
        ("second", "192.0.2", "second0"),
        ("control", "198.18.0", "control0"),
    ] {
        let host = net.add(name)?;
        let (own, gateway) = (format!("{network}.10/24"), format!("{network}.1"));
        net.link(
            (&host, "wan", &own),
            (&inet, route, &format!("{gateway}/24")),
        )?;
        host.ip(&format!("route add default via {gateway}"))?;
    }
    let first = lab.server(|config: &mut Value| {
        config["peers"] = json!({"listen": [PEERS[0]], "servers": PEERS});
    })?;
    let second = lab.another_server(Another {
        host: "second",
        address: Some("192.0.2.10"),
        peers: &PEERS,
    })?;
    let control = lab.another_server(Another {
        host: "control",
        address: None,
        peers: &PEERS,
    })?;
    for server in [&first, &second] {
        server.wait_peers(1, 0, PATIENCE)?;
    }
    control.wait_peers(2, 0, PATIENCE)?;
    Ok(Servers {
        first,
        second,
        control,
    })
}

fn edge(lab: &Lab, servers: &Servers, at: &[&str]) -> Result<(Process, Agent)> {
    let kubelet = lab.kubelet("edge1")?;
    let agent = lab.agent(&servers.first, "edge1", |config| {
        config["servers"] = json!(at);
    })?;
    servers.second.wait_session("edge1", PATIENCE)?;
    servers.control.wait_peers(2, 2, PATIENCE)?;
    Ok((kubelet, agent))
}

#[test]
fn a_server_that_is_killed_is_not_missed_by_the_next_request() {
    lab::scenario(|lab| {
        let mut servers = servers(lab)?;
        let at = ["203.0.113.10:8443", "192.0.2.10:8443"];
        let (_kubelet, _agent) = edge(lab, &servers, &at)?;
        let doors = [&servers.first, &servers.second, &servers.control].map(Server::door);
        for door in &doors {
            ensure!(name_of(door, "edge1")? == "edge1");
        }
        // One of each: it runs through the server that will die, or beside it.
        let [first, second, control] = &doors;
        let lost = Watch::open(first, 100_000, 50, PATIENCE)?;
        let mut kept = second.open("edge1:10250", Behaviour::Echo)?;
        ping(&mut kept, "before")?;

        servers.first.process().kill()?;
        let killed = Instant::now();
        for (name, door) in [("control plane", control), ("other server", second)] {
            let asked = Instant::now();
            ensure!(name_of(door, "edge1")? == "edge1");
            lab::measured(&format!(
                "a server killed: the next request at the {name} took {:?}",
                asked.elapsed()
            ));
            // Far below any time-out of a session: 15 s for a request, 6 s until a server is suspect.
            ensure!(
                asked.elapsed() < Duration::from_secs(5),
                "{:?}",
                asked.elapsed()
            );
        }
        for _ in 0..20 {
            ensure!(name_of(control, "edge1")? == "edge1");
        }
        ping(&mut kept, "after")?;
        crate::steps::cut(&lost.end()?.1)?;

        // Started again: its sessions of before are answered with resets that everybody believes.
        servers.first.start_again()?;
        servers.first.wait_session("edge1", PATIENCE)?;
        servers.control.wait_peers(2, 2, PATIENCE)?;
        lab::measured(&format!(
            "a server killed and started again: all sessions are back {:?} after",
            killed.elapsed()
        ));
        ensure!(name_of(first, "edge1")? == "edge1");
        ping(&mut kept, "in the end")?;
        Ok(())
    });
}

/// The servers that the balancer places new flows on; enrolment goes to the first, which has the token.
fn balance(lab: &Lab, servers: &[&str]) -> Result<()> {
    let places: Vec<String> = servers
        .iter()
        .enumerate()
        .map(|(number, server)| format!("{number} : {server}"))
        .collect();
    lab.host("inet")?.nft(&format!(
        "table ip balancer
         delete table ip balancer
         table ip balancer {{
             chain place {{
                 type nat hook prerouting priority dstnat;
                 ip daddr 203.0.113.100 tcp dport 8443 dnat to 203.0.113.10
                 ip daddr 203.0.113.100 udp dport 8443 dnat to numgen inc mod {} map {{ {} }}
             }}
         }}",
        places.len(),
        places.join(", ")
    ))
}

#[test]
fn behind_a_load_balancer_both_servers_have_the_agent_and_a_moved_flow_is_a_new_session_at_once() {
    lab::scenario(|lab| {
        let servers = servers(lab)?;
        balance(lab, &["203.0.113.10", "192.0.2.10"])?;
        let (_kubelet, agent) = edge(lab, &servers, &[BALANCER])?;
        let control = servers.control.door();
        ensure!(name_of(&control, "edge1")? == "edge1");
        let first = servers.first.wait_session("edge1", PATIENCE)?;

        // The site gets another address, and the balancer places the flows anew: all at the second server. What comes
        // there of the session with the first is answered with a reset that the agent believes.
        balance(lab, &["192.0.2.10"])?;
        let mark = agent.process().mark();
        let moved = Instant::now();
        let nat = lab.host("nat1")?;
        nat.ip("addr del 198.51.100.2/29 dev wan")?;
        nat.ip("addr add 198.51.100.3/29 dev wan")?;
        nat.ip("route replace default via 198.51.100.1")?;
        let line = agent
            .process()
            .wait_for_line_since(mark, "session over", PATIENCE)?;
        lab::measured(&format!(
            "flows moved by the balancer: the session is known to be over after {:?}",
            moved.elapsed()
        ));
        ensure!(line.contains("reset by peer"), "{line}");
        // Before it would be suspect, let alone lost.
        ensure!(
            moved.elapsed() < Duration::from_secs(29),
            "{:?}",
            moved.elapsed()
        );
        for _ in 0..20 {
            ensure!(name_of(&control, "edge1")? == "edge1");
        }
        let new = || -> Result<()> {
            let sessions = servers.second.sessions()?;
            let from_there = |session: &lab::Session| session.remote.starts_with("198.51.100.3:");
            ensure!(sessions.iter().any(from_there), "{sessions:?}");
            Ok(())
        };
        wait::poll(PATIENCE, "a session from the new address", new)?;
        lab::measured(&format!(
            "flows moved by the balancer: a session from the new address after {:?}",
            moved.elapsed()
        ));
        // With both servers behind it again, the agent finds the first one again.
        balance(lab, &["203.0.113.10", "192.0.2.10"])?;
        let found = || -> Result<()> {
            let all = servers.first.sessions()?;
            let newest = all.last().context("no session")?;
            ensure!(newest.session != first.session, "{all:?}");
            Ok(())
        };
        wait::poll(PATIENCE * 3, "a session with the first server again", found)?;
        lab::measured(&format!(
            "flows moved by the balancer: two servers again after {:?}",
            moved.elapsed()
        ));
        ensure!(name_of(&servers.first.door(), "edge1")? == "edge1");
        Ok(())
    });
}
