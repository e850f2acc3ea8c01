//! What goes in comes out: every kind of stream that `kubectl` makes, over both frontends, compared byte for byte.

use std::io::{Read, Write};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::client::Tunnel;
use e2e::kubelet::Behaviour;
use e2e::{lab, pattern};
use proto::Reason;
use serde_json::json;
use tokio::time::Instant;

use crate::steps::{Descriptors, MIB, cut, doors, name_of, orderly, ping, whole};

const SOON: Duration = Duration::from_secs(10);

#[test]
fn an_exec_like_echo_answers_every_line() {
    lab::scenario(|lab| {
        let small = lab.small()?;
        let descriptors = Descriptors::of(&small)?;
        for door in doors(&small.server)? {
            let mut tunnel = door.open("edge1:10250", Behaviour::Echo)?;
            for number in 0..500 {
                ping(&mut tunnel, &format!("line {number}"))?;
            }
            tunnel.finish()?;
            let (rest, end) = tunnel.read_out();
            ensure!(rest.bytes == 0, "more came back than was sent: {rest}");
            orderly(&end)?;
        }
        descriptors.returned(SOON)
    });
}

#[test]
fn a_trickle_like_logs_f_arrives_line_by_line() {
    lab::scenario(|lab| {
        let small = lab.small()?;
        for door in doors(&small.server)? {
            let behaviour = Behaviour::Trickle {
                lines: 50,
                every_ms: 100,
            };
            let tunnel = door.open("edge1:10250", behaviour)?;
            let (start, mut times) = (Instant::now(), Vec::new());
            for (number, line) in tunnel.lines().enumerate() {
                ensure!(
                    line? == format!("line {number}"),
                    "line {number} is another"
                );
                times.push(start.elapsed());
            }
            ensure!(times.len() == 50, "{} of 50 lines", times.len());
            // Written over 4.9 s: lines that were held back and came together would be late.
            let last = times.last().context("no line")?;
            let late = times.iter().enumerate().filter(|(number, time)| {
                **time > Duration::from_millis(100 * *number as u64) + Duration::from_secs(2)
            });
            ensure!(
                late.count() == 0 && *last > Duration::from_secs(4),
                "{times:?}"
            );
        }
        Ok(())
    });
}

#[test]
fn one_gib_goes_up_and_comes_down_whole_at_the_same_time() {
    lab::scenario(|lab| {
        let small = lab.small()?;
        let descriptors = Descriptors::of(&small)?;
        let bytes = 1024 * MIB;
        let mut down = small.server.door().open("edge1:10250", Behaviour::Echo)?;
        let mut up = down.second()?;
        let start = Instant::now();
        let (sent, received) = std::thread::scope(|scope| {
            let sent = scope.spawn(move || -> Result<()> {
                pattern::write(&mut up, bytes, 3)?;
                Ok(up.finish()?)
            });
            let received = pattern::read(&mut down, u64::MAX);
            (sent.join(), received)
        });
        sent.expect("the writer panicked")?;
        received.1?;
        ensure!(
            received.0 == pattern::expected(bytes, 3),
            "not what was sent: {}",
            received.0
        );
        let seconds = start.elapsed().as_secs_f64();
        lab::measured(&format!("1 GiB up and down on one stream: {seconds:.1} s"));
        for process in [small.server.process(), small.agent.process()] {
            lab::measured(&format!(
                "{}: {} MiB, {:?}",
                process.name(),
                process.rss()? / MIB,
                process.cpu()?
            ));
        }
        descriptors.returned(SOON)
    });
}

#[test]
fn one_gib_each_way_over_mutual_tls_is_whole() {
    lab::scenario(|lab| {
        let small = lab.small()?;
        let door = small.server.tls_door("kube-apiserver")?;
        let bytes = 1024 * MIB;
        let mut down = door.open("edge1:10250", Behaviour::Send { bytes, seed: 4 })?;
        whole(&mut down, bytes, 4)?;
        let mut up = door.open("edge1:10250", Behaviour::Sink { bytes })?;
        pattern::write(&mut up, bytes, 5)?;
        up.flush()?;
        ensure!(
            up.line()? == pattern::expected(bytes, 5).to_string(),
            "not what was sent"
        );
        Ok(())
    });
}

#[test]
fn half_close_reaches_the_kubelet() {
    lab::scenario(|lab| {
        let small = lab.small()?;
        let descriptors = Descriptors::of(&small)?;
        for (door, seed) in doors(&small.server)?.iter().zip(10..) {
            let mut tunnel = door.open("edge1:10250", Behaviour::HalfClose)?;
            pattern::write(&mut tunnel, 3 * MIB, seed)?;
            tunnel.finish()?;
            ensure!(
                tunnel.line()? == pattern::expected(3 * MIB, seed).to_string(),
                "{door:?}"
            );
            let (rest, end) = tunnel.read_out();
            ensure!(rest.bytes == 0, "more came: {rest}");
            orderly(&end)?;
        }
        descriptors.returned(SOON)
    });
}

#[test]
fn half_close_of_the_kubelet_leaves_the_way_up_open() {
    lab::scenario(|lab| {
        let small = lab.small()?;
        let descriptors = Descriptors::of(&small)?;
        for (door, seed) in doors(&small.server)?.iter().zip(20..) {
            let mut tunnel = door.open("edge1:10250", Behaviour::EndFirst)?;
            ensure!(tunnel.line()? == "done");
            let (rest, end) = tunnel.read_out();
            ensure!(rest.bytes == 0, "more came: {rest}");
            orderly(&end)?;
            pattern::write(&mut tunnel, 3 * MIB, seed)?;
            tunnel.finish()?;
            let report = format!("end-first: {}", pattern::expected(3 * MIB, seed));
            small.kubelet.wait_for_line(&report, SOON)?;
        }
        descriptors.returned(SOON)
    });
}

#[test]
fn a_reset_of_the_kubelet_is_seen_as_a_cut_and_not_as_an_end() {
    lab::scenario(|lab| {
        let small = lab.small()?;
        let descriptors = Descriptors::of(&small)?;
        for door in doors(&small.server)? {
            for after in [0, 1000, 10 * MIB] {
                let mut tunnel = door.open("edge1:10250", Behaviour::Reset { after })?;
                let (content, end) = tunnel.read_out();
                ensure!(content.bytes <= after, "{} of {after} bytes", content.bytes);
                cut(&end).with_context(|| format!("after {after} bytes"))?;
            }
        }
        descriptors.returned(SOON)
    });
}

#[test]
fn a_requester_that_goes_away_frees_the_kubelet() {
    lab::scenario(|lab| {
        let small = lab.small()?;
        let descriptors = Descriptors::of(&small)?;
        for (door, seed) in doors(&small.server)?.iter().zip(30..) {
            let behaviour = Behaviour::Send {
                bytes: 1 << 40,
                seed,
            };
            let mut tunnel = door.open("edge1:10250", behaviour)?;
            tunnel.read_exact(&mut vec![0; 1 << 20])?;
            drop(tunnel);
            small
                .kubelet
                .wait_for_line(&format!("{behaviour}: error"), SOON)?;
        }
        descriptors.returned(SOON)
    });
}

#[test]
fn two_edges_with_one_private_address_are_told_apart() {
    lab::scenario(|lab| {
        let _kubelets = [
            lab.kubelet("edge1")?,
            lab.kubelet("edge2")?,
            lab.kubelet("edge3")?,
        ];
        let server = lab.server(|config| {
            config["routes"] = json!([
                {"node": "edge1", "agent": "edge1", "addresses": ["192.168.1.10"]},
                {"node": "edge2", "agent": "edge2", "addresses": ["192.168.1.10"]},
                {"node": "edge3", "agent": "edge3", "addresses": ["192.168.3.10"]},
            ]);
        })?;
        let _agents = [
            lab.agent(&server, "edge1", |_| {})?,
            lab.agent(&server, "edge2", |_| {})?,
            lab.agent(&server, "edge3", |_| {})?,
        ];
        let doors = doors(&server)?;
        for node in ["edge1", "edge2", "edge3"].into_iter().cycle().take(30) {
            for door in &doors {
                ensure!(name_of(door, node)? == node, "{node} is another");
                ensure!(
                    scrape(door.connect(&format!("{node}:9100"))??)?.contains(node),
                    "{node}"
                );
            }
        }
        ensure!(
            name_of(&doors[0], "192.168.3.10")? == "edge3",
            "an address of one node is enough"
        );
        let refusal = doors[0].refusal("192.168.1.10:10250")?;
        ensure!(
            refusal.status == Reason::AmbiguousDestination.http_status(),
            "{refusal}"
        );
        ensure!(
            refusal.sentence.contains("edge1") && refusal.sentence.contains("edge2"),
            "{refusal}"
        );
        Ok(())
    });
}

/// A scrape of the stand-in's metrics.
fn scrape(mut tunnel: Tunnel) -> Result<String> {
    write!(
        tunnel,
        "GET /metrics HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n"
    )?;
    tunnel.flush()?;
    let mut answer = String::new();
    tunnel.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200 "), "{answer:?}");
    Ok(answer)
}
