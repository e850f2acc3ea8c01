//! What leaves by which interface, and what a line needs.

use anyhow::{Context, Result, ensure};
use e2e::client::Door;
use e2e::lab::{self, Lab};
use e2e::link::IpLink;
use e2e::net::Host;
use e2e::process::{Process, Spawn};
use serde_json::{Value, json};

use super::{ADDRESS, LINE, SOON, kubelet};
use crate::steps::name_of;

/// The mark of a line.
const MARK: u32 = 0x77;
/// Counts what the cloud sends: with the mark, from the source address, by the interface alone; and to all of them
/// elsewhere.
const COUNTERS: &str = "table inet count {
    counter marked {}
    counter sourced {}
    counter bound {}
    counter plain {}
    counter elsewhere {}
    chain out {
        type filter hook postrouting priority 100;
        oifname \"line0\" ip daddr 10.33.0.11 meta mark 0x77 counter name marked
        oifname \"line0\" ip daddr 10.33.0.12 ip saddr 10.40.1.1 counter name sourced
        oifname \"line0\" ip daddr 10.33.0.13 meta mark 0 counter name bound
        oifname \"line0\" counter name plain
        oifname \"wan\" ip daddr 10.33.0.0/24 counter name elsewhere
    }
}";

fn counted(host: &Host, counter: &str) -> Result<u64> {
    let args = ["-j", "list", "counter", "inet", "count", counter];
    let listing: Value = serde_json::from_str(&host.run("nft", &args)?)?;
    let objects = listing.get("nftables").and_then(Value::as_array);
    let mut objects = objects.into_iter().flatten();
    let packets = objects.find_map(|object| object.pointer("/counter/packets")?.as_u64());
    packets.with_context(|| format!("no counter {counter} in {listing}"))
}

/// What the routes of the cloud's host would lead to in place of the line.
fn decoy(lab: &Lab) -> Result<Process> {
    let inet = lab.host("inet")?;
    for last in 10..=13 {
        inet.ip(&format!("addr add 10.33.0.{last}/32 dev lo"))?;
    }
    kubelet(lab, "inet", "the internet", "0.0.0.0")
}

/// The line's far end has four addresses, and the routes of the cloud's host lead to none of them.
fn line(lab: &Lab) -> Result<IpLink> {
    let (cloud, edge) = (lab.host("cloud")?, lab.host("edge3")?);
    let line = IpLink::lay(
        (&cloud, "line0", "10.40.0.1/30"),
        (&edge, "line0", "10.40.0.2/30"),
        7,
    )?;
    for last in 10..=13 {
        edge.ip(&format!("addr add 10.33.0.{last}/32 dev lo"))?;
    }
    edge.ip("route add 10.40.1.1/32 dev line0")?;
    Ok(line)
}

#[test]
fn what_is_dialled_leaves_as_its_line_says_whatever_the_routes_say() {
    lab::scenario(|lab| {
        let _line = line(lab)?;
        let _edge = kubelet(lab, "edge3", LINE, "0.0.0.0")?;
        let _decoy = decoy(lab)?;
        let cloud = lab.host("cloud")?;
        cloud.nft(COUNTERS)?;
        for rule in [
            "addr add 10.40.1.1/32 dev lo",
            "rule add fwmark 0x77 table 77",
            "rule add from 10.40.1.1 table 77",
            "route add 10.33.0.0/24 dev line0 table 77",
        ] {
            cloud.ip(rule)?;
        }
        let server = lab.server(|config| {
            let node = |name: &str, last: u8| json!({"node": name, "addresses": [format!("10.33.0.{last}")]});
            let line = |name: &str, last: u8| json!({"name": name, "networks": [format!("10.33.0.{last}/32")], "mode": "direct"});
            let mut lines = [
                line("marked", 11),
                line("sourced", 12),
                line("bound", 13),
                line("plain", 10),
            ];
            lines[0]["mark"] = json!(MARK);
            lines[1]["source"] = json!("10.40.1.1");
            lines[2]["interface"] = json!("line0");
            config["lines"] = json!(lines);
            config["routes"] = json!([
                node("marked", 11),
                node("sourced", 12),
                node("bound", 13),
                node("plain", 10)
            ]);
        })?;
        let door = server.door();
        for name in ["marked", "sourced", "bound"] {
            let before = counted(&cloud, name)?;
            ensure!(name_of(&door, name)? == LINE, "another answers for {name}");
            // A handshake, a question and an end at least.
            let packets = counted(&cloud, name)? - before;
            ensure!(packets >= 4, "{packets} packets of {name} left by the line");
        }
        ensure!(
            counted(&cloud, "elsewhere")? == 0,
            "something left by the internet"
        );
        // The routes do lead elsewhere.
        ensure!(name_of(&door, "plain")? == "the internet");
        ensure!(counted(&cloud, "elsewhere")? > 0, "nothing was counted");
        Ok(())
    });
}

/// A proxy-server in the cloud without capabilities for the network, and with that line.
fn limited(lab: &Lab, name: &str, line: &Value) -> Result<Process> {
    let dir = lab.dir().join(name);
    std::fs::create_dir_all(&dir)?;
    let config = json!({
        "stateDir": dir.join("state"),
        "name": "limited",
        "backend": {"listen": ["203.0.113.10:8443"]},
        "frontends": [{"type": "httpConnect", "listen": format!("unix:{}", dir.join("connect.sock").display())}],
        "routes": [{"node": "edge3", "addresses": [ADDRESS]}],
        "lines": [line],
        "observe": {"listen": "127.0.0.1:0"},
        "admin": {"listen": "127.0.0.1:0", "socket": dir.join("admin.sock")},
    });
    let config = lab.config(name, &config)?;
    let without = "-net_admin,-net_raw";
    Spawn::new(name, "setpriv")
        .args(["--bounding-set", without, "--inh-caps", without, "--"])
        .arg(lab::binary("proxy-server")?)
        .args(["run", "--config"])
        .arg(config)
        .host(&lab.host("cloud")?)
        .start(lab.dir())
}

#[test]
fn what_a_line_needs_and_does_not_have_is_told_at_the_start() {
    lab::scenario(|lab| {
        let _line = line(lab)?;
        let _edge = kubelet(lab, "edge3", LINE, "0.0.0.0")?;
        let _decoy = decoy(lab)?;
        let mut marked = json!({"name": "express", "networks": ["10.33.0.0/24"], "mode": "direct"});
        marked["mark"] = json!(MARK);
        let server = limited(lab, "marked", &marked)?;
        ensure!(!server.wait(SOON)?.success(), "it runs without its mark");
        let said = "line express: marking a connection needs CAP_NET_ADMIN";
        ensure!(server.log().contains(said), "{}", server.log());

        // An interface needs nothing on kernels since 5.7, and one that is not there may come.
        for (interface, is_there) in [("line0", true), ("line9", false)] {
            let mut bound = marked.clone();
            bound["mark"] = Value::Null;
            bound["interface"] = json!(interface);
            let server = limited(lab, interface, &bound)?;
            server.wait_for_line("ready", lab::START)?;
            let warned = "the line's interface or source address is not there";
            ensure!(
                server.log().contains(warned) != is_there,
                "{}",
                server.log()
            );
            let door = Door::Unix(lab.dir().join(interface).join("connect.sock"));
            if is_there {
                ensure!(name_of(&door, "edge3")? == LINE);
            } else {
                let refusal = door.refusal("edge3:10250")?;
                let said = "dialled 10.33.0.10:10250 by line express, No such device";
                ensure!(refusal.sentence.contains(said), "{refusal}");
            }
            ensure!(server.terminate(lab::STOP)?.success(), "{}", server.log());
        }
        Ok(())
    });
}
