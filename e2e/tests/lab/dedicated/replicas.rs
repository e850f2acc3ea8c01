//! Two servers, each with a line of its own to the same node; one of them alone loses its.

use std::fs;

use anyhow::ensure;
use e2e::lab::{self, Another};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    ADDRESS, LINE, SOON, TUNNEL, agent, every_kind, kubelet, line, on_a_line, short, until,
};
use crate::steps::name_of;

/// Where the servers' peers come in; each is told of both.
const PEERS: [&str; 2] = ["203.0.113.10:8446", "192.0.2.10:8446"];
const SECOND: &str = "192.0.2.10";

#[test]
fn a_server_that_alone_has_lost_its_line_uses_the_tunnel_or_another_servers_session() {
    lab::scenario(|lab| {
        let (net, inet) = (lab.net(), lab.host("inet")?);
        let second = net.add("second")?;
        net.link(
            (&second, "wan", &format!("{SECOND}/24")),
            (&inet, "second0", "192.0.2.1/24"),
        )?;
        second.ip("route add default via 192.0.2.1")?;
        let (line_of_first, line_of_second) = (line(lab, "cloud", 40)?, line(lab, "second", 41)?);
        let first = lab.server(|config| {
            on_a_line(config, &short(), "auto");
            config["peers"] = json!({"listen": [PEERS[0]], "servers": PEERS});
        })?;
        let another = Another {
            host: "second",
            address: Some(SECOND),
            peers: &PEERS,
        };
        let second =
            lab.another_server_with(another, |config| on_a_line(config, &short(), "auto"))?;
        first.wait_peers(1, 0, SOON)?;
        let by_line = kubelet(lab, "edge3", LINE, ADDRESS)?;
        let by_tunnel = kubelet(lab, "edge3", TUNNEL, "127.0.0.1")?;
        let mut agent = agent(lab, &first)?;
        let (door, other) = (first.door(), second.door());
        for door in [&door, &other] {
            until(door, "edge3", LINE)?;
        }

        // It has a session of its own.
        line_of_first.cut();
        let asked = Instant::now();
        ensure!(name_of(&door, "edge3")? == TUNNEL);
        lab::measured(&format!(
            "one of two servers has lost its line: its next request took {:?}",
            asked.elapsed()
        ));
        ensure!(name_of(&other, "edge3")? == LINE, "the other has its line");

        // It has none: the other one has.
        let file = lab.dir().join("edge3.yaml");
        let mut config: Value = serde_json::from_slice(&fs::read(&file)?)?;
        config["servers"] = json!([format!("{SECOND}:8443")]);
        fs::write(&file, config.to_string())?;
        agent.process().terminate(lab::STOP)?;
        agent.start_again()?;
        second.wait_session("edge3", SOON)?;
        first.wait_peers(1, 1, SOON)?;
        ensure!(first.sessions()?.is_empty(), "{:?}", first.sessions()?);
        let forwarded =
            "corvid_streams_total{frontend=\"http_connect\",path=\"peer\",reason=\"ok\"}";
        let before = first.metric(forwarded)?;
        every_kind(&door, &by_tunnel, TUNNEL)?;
        ensure!(
            first.metric(forwarded)? > before,
            "nothing was forwarded to the other server"
        );
        every_kind(&other, &by_line, LINE)?;
        ensure!(line_of_second.counts().forwarded > 0);

        // And back.
        line_of_first.heal();
        until(&door, "edge3", LINE)?;
        every_kind(&door, &by_line, LINE)
    });
}
