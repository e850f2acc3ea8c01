//! Bad lines: cuts that a session survives and one that it does not, new source addresses, delay, loss and reordering.
//!
//! How long a healed line takes to carry bytes again is printed; `docs/protocol.md` quotes it.

use std::io::Write;
use std::net::SocketAddr;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use e2e::client::Door;
use e2e::kubelet::Behaviour;
use e2e::lab::{self, Lab, SERVER, Small};
use e2e::link::{Link, Weather};
use e2e::{pattern, wait};
use proto::Reason;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::steps::{MIB, Watch, cut, name_of, ping, whole};

/// Where the line of `edge1` listens: the router's address at its NAT box.
const NEAR: &str = "198.51.100.1:8443";
/// A second address that the router is given towards the cloud.
const OTHER: &str = "203.0.113.2";
/// A line every so many milliseconds, so that there is always something to lose.
const EVERY: u64 = 50;

/// The small lab, with a line of the harness between NAT box and server.
fn on_a_line(lab: &Lab, server: impl FnOnce(&mut Value)) -> Result<(Link, Small)> {
    let inet = lab.host("inet")?;
    let link = Link::lay(&inet, NEAR.parse()?, &inet, SERVER.parse()?, 7)?;
    link.weather(Weather {
        delay: Duration::from_millis(10),
        ..Weather::default()
    });
    let small = lab.small_with(server, |config| config["servers"] = json!([NEAR]))?;
    Ok((link, small))
}

/// A download that is read on a thread of its own; it has begun when this returns.
fn download(door: &Door, bytes: u64, patience: Duration) -> Result<JoinHandle<Result<()>>> {
    let mut tunnel = door.open("edge1:10250", Behaviour::Send { bytes, seed: 9 })?;
    tunnel.patience(patience)?;
    let (first, end) = pattern::read(&mut tunnel, MIB);
    end?;
    ensure!(
        first == pattern::expected(MIB, 9),
        "the first MiB is another"
    );
    Ok(std::thread::spawn(move || {
        let (rest, end) = pattern::read(&mut tunnel, u64::MAX);
        end?;
        ensure!(
            rest == pattern::tail(bytes, MIB, 9),
            "not what was sent: {rest}"
        );
        Ok(())
    }))
}

fn joined(thread: JoinHandle<Result<()>>) -> Result<()> {
    thread
        .join()
        .map_err(|_panic| anyhow!("the reader panicked"))?
}

/// Streams of both kinds go through a cut of `span` whole, in the same session, and flow again within `recovery`.
fn survives_a_cut_of(span: Duration, recovery: Duration) {
    lab::scenario(|lab| {
        let (link, small) = on_a_line(lab, |_| {})?;
        let (door, patience) = (small.server.door(), span + recovery);
        let session = small.server.wait_session("edge1", lab::START)?.session;
        // It must still be written when the line is healed, and for a while after.
        let lines = (span.as_secs() + 10) * 1000 / EVERY;
        let trickle = Watch::open(&door, lines, EVERY, patience)?;
        let bulk = download(&door, 512 * MIB, patience)?;
        ensure!(!bulk.is_finished(), "the download ended before the cut");
        link.cut();
        wait::pass(span);
        link.heal();
        let healed = Instant::now();
        let times = trickle.whole(lines)?;
        joined(bulk).context("the download")?;
        let first = times
            .iter()
            .find(|time| **time > healed)
            .context("no line after the cut")?;
        let took = first.duration_since(healed);
        lab::measured(&format!(
            "cut of {span:?}: bytes flowed again {took:?} after healing"
        ));
        ensure!(took < recovery, "bytes flowed only {took:?} after healing");
        let after = small.server.wait_session("edge1", lab::START)?;
        ensure!(after.session == session, "the session is another");
        Ok(())
    });
}

#[test]
fn streams_survive_a_cut_of_5_s() {
    survives_a_cut_of(Duration::from_secs(5), Duration::from_secs(15));
}

#[test]
fn streams_survive_a_cut_of_60_s() {
    survives_a_cut_of(Duration::from_mins(1), Duration::from_mins(1));
}

#[test]
fn a_cut_beyond_the_idle_time_out_ends_streams_and_names_the_reason() {
    lab::scenario(|lab| {
        let idle = Duration::from_secs(30);
        let (link, small) = on_a_line(lab, |config| {
            config["backend"]["idleTimeout"] = json!("30s");
        })?;
        let door = small.server.door();
        let trickle = Watch::open(&door, 10_000, EVERY, idle * 2)?;
        let tls = Watch::open(
            &small.server.tls_door("kube-apiserver")?,
            10_001,
            EVERY,
            idle * 2,
        )?;
        link.cut();
        let start = Instant::now();
        for (trickle, lines) in [(trickle, 10_000), (tls, 10_001)] {
            let (_, end) = trickle.end()?;
            cut(&end)?;
            let report = format!(
                "{}: error",
                Behaviour::Trickle {
                    lines,
                    every_ms: EVERY
                }
            );
            small.kubelet.wait_for_line(&report, idle * 2)?;
        }
        lab::measured(&format!(
            "idle time-out of {idle:?}: both ends let go after {:?}",
            start.elapsed()
        ));
        let lost = Reason::SessionLost.label();
        small.server.process().wait_for_line(lost, lab::START)?;
        let refusal = door.refusal("edge1:10250")?;
        ensure!(
            refusal.status == Reason::NoSession.http_status(),
            "{refusal}"
        );
        for part in ["edge1", "no session since", "last error"] {
            ensure!(refusal.sentence.contains(part), "{refusal}");
        }
        link.heal();
        let healed = Instant::now();
        small.server.wait_session("edge1", Duration::from_mins(1))?;
        lab::measured(&format!(
            "a session again {:?} after healing",
            healed.elapsed()
        ));
        ensure!(name_of(&door, "edge1")? == "edge1");
        Ok(())
    });
}

/// Streams go through `change` whole, in the same session, which is then seen from another address.
fn survives_a_change_of_address(
    lab: &Lab,
    small: &Small,
    change: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let (door, patience) = (small.server.door(), Duration::from_secs(30));
    let before = small.server.wait_session("edge1", lab::START)?;
    let lines = 10_000 / EVERY;
    let trickle = Watch::open(&door, lines, EVERY, patience)?;
    let bulk = download(&door, 512 * MIB, patience)?;
    change()?;
    let changed = Instant::now();
    let times = trickle.whole(lines)?;
    joined(bulk).context("the download")?;
    let first = times
        .iter()
        .find(|time| **time > changed)
        .context("no line after the change")?;
    lab::measured(&format!(
        "change of address: the next line came {:?} later",
        first.duration_since(changed)
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
    ensure!(lab.dir().exists());
    Ok(())
}

#[test]
fn streams_survive_a_new_port_and_a_new_address_of_the_nat() {
    lab::scenario(|lab| {
        let (link, small) = on_a_line(lab, |_| {})?;
        lab.host("inet")?
            .ip(&format!("addr add {OTHER}/24 dev cloud0"))?;
        survives_a_change_of_address(lab, &small, || link.rebind("203.0.113.1".parse()?))?;
        survives_a_change_of_address(lab, &small, || link.rebind(OTHER.parse()?))
    });
}

#[test]
fn streams_survive_another_public_address_of_the_site() {
    lab::scenario(|lab| {
        let small = lab.small()?;
        let nat = lab.host("nat1")?;
        survives_a_change_of_address(lab, &small, || {
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
        let (door, bytes, start) = (small.server.door(), 4 * MIB, Instant::now());
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
            "4 MiB each way and 50 lines in {:?}: {counts:?}",
            start.elapsed()
        ));
        ensure!(counts.lost > 0 && counts.reordered > 0, "{counts:?}");
        Ok(())
    });
}
