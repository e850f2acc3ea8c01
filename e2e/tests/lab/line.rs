//! Lines that are not cut but bad: new source addresses in the middle of a stream, delay, loss and reordering.

use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::kubelet::Behaviour;
use e2e::lab::{self, Small};
use e2e::link::Weather;
use e2e::pattern;
use tokio::time::Instant;

use crate::steps::{EVERY, MIB, name_of, on_a_line, ping, whole};
use crate::streams::{Watch, after, download, joined};

/// A second address that the router is given towards the cloud.
const OTHER: &str = "203.0.113.2";

/// Streams go through `change` whole, in the same session, which is then seen from another address.
fn survives(small: &Small, change: impl FnOnce() -> Result<()>) -> Result<()> {
    let (door, patience) = (small.server.door(), Duration::from_secs(30));
    let before = small.server.wait_session("edge1", lab::START)?;
    let lines = 10_000 / EVERY;
    let trickle = Watch::open(&door, lines, EVERY, patience)?;
    let bulk = download(&door, 128 * MIB, patience)?;
    change()?;
    let changed = Instant::now();
    let times = trickle.whole(lines)?;
    joined(bulk).context("the download")?;
    let first = after(changed, &times)?;
    lab::measured(&format!(
        "change of address: the next line came {first:?} later"
    ));
    let after = small.server.wait_session("edge1", lab::START)?;
    ensure!(after.session == before.session, "the session is another");
    let addr = |remote: &str| remote.parse::<SocketAddr>();
    ensure!(
        addr(&after.remote)? != addr(&before.remote)?,
        "still from {}",
        before.remote
    );
    ensure!(name_of(&door, "edge1")? == "edge1");
    Ok(())
}

#[test]
fn streams_survive_a_new_port_and_a_new_address_of_the_nat() {
    lab::scenario(|lab| {
        let (link, small) = on_a_line(lab, |_| {})?;
        lab.host("inet")?
            .ip(&format!("addr add {OTHER}/24 dev cloud0"))?;
        survives(&small, || link.rebind("203.0.113.1".parse()?))?;
        survives(&small, || link.rebind(OTHER.parse()?))
    });
}

#[test]
fn streams_survive_another_public_address_of_the_site() {
    lab::scenario(|lab| {
        let small = lab.small()?;
        let nat = lab.host("nat1")?;
        survives(&small, || {
            nat.ip("addr del 198.51.100.2/29 dev wan")?;
            nat.ip("addr add 198.51.100.3/29 dev wan")?;
            nat.ip("route add default via 198.51.100.1")?;
            Ok(())
        })
    });
}

#[test]
fn content_is_whole_at_50_ms_with_loss_and_reordering() {
    lab::scenario(|lab| {
        let (link, small) = on_a_line(lab, |_| {})?;
        link.weather(Weather {
            delay: Duration::from_millis(25),
            loss: 0.01,
            reorder: 0.02,
            late: Duration::from_millis(10),
        });
        let (door, bytes, start) = (small.server.door(), 2 * MIB, Instant::now());
        let mut down = door.open("edge1:10250", Behaviour::Send { bytes, seed: 1 })?;
        whole(&mut down, bytes, 1)?;
        let mut up = door.open("edge1:10250", Behaviour::Sink { bytes })?;
        pattern::write(&mut up, bytes, 2)?;
        up.flush()?;
        ensure!(
            up.line()? == pattern::expected(bytes, 2).to_string(),
            "not what was sent"
        );
        let mut echo = door.open("edge1:10250", Behaviour::Echo)?;
        for number in 0..50 {
            ping(&mut echo, &format!("line {number}"))?;
        }
        let counts = link.counts();
        lab::measured(&format!(
            "2 MiB each way and 50 lines in {:?}: {counts:?}",
            start.elapsed()
        ));
        ensure!(counts.lost > 0 && counts.reordered > 0, "{counts:?}");
        Ok(())
    });
}
