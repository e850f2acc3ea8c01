//! Every kind of stream by one way: content, end, and who served it.

use std::io::{Read, Write};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::client::Door;
use e2e::kubelet::Behaviour;
use e2e::process::Process;
use e2e::{pattern, wait};

use super::{MIB, SOON};
use crate::steps::{cut, name_of, orderly, ping, whole};

/// Streams of every kind to `edge3`, each of which that one must have served.
pub(super) fn every_kind(door: &Door, by: &Process, name: &str) -> Result<()> {
    let (mark, to) = (by.mark(), "edge3:10250");
    let mut kinds = Vec::new();
    let mut open = |behaviour: Behaviour| {
        kinds.push(behaviour.to_string());
        door.open(to, behaviour)
    };

    let mut echo = open(Behaviour::Echo)?;
    for number in 0..50 {
        ping(&mut echo, &format!("line {number}"))?;
    }
    echo.finish()?;
    orderly(&echo.read_out().1)?;

    let bytes = 2 * MIB;
    whole(&mut open(Behaviour::Send { bytes, seed: 1 })?, bytes, 1)?;

    let mut up = open(Behaviour::Sink { bytes })?;
    pattern::write(&mut up, bytes, 2)?;
    up.flush()?;
    ensure!(
        up.line()? == pattern::expected(bytes, 2).to_string(),
        "not what was sent up"
    );
    drop(up);

    let mut half = open(Behaviour::HalfClose)?;
    pattern::write(&mut half, MIB, 3)?;
    half.finish()?;
    ensure!(
        half.line()? == pattern::expected(MIB, 3).to_string(),
        "not what was sent before the end"
    );
    orderly(&half.read_out().1)?;

    let mut ended = open(Behaviour::EndFirst)?;
    ensure!(ended.line()? == "done", "not the last words");
    orderly(&ended.read_out().1)?;
    pattern::write(&mut ended, MIB, 4)?;
    ended.finish()?;

    let (lines, every_ms) = (20, 10);
    let trickle = open(Behaviour::Trickle { lines, every_ms })?;
    for (number, line) in trickle.lines().enumerate() {
        ensure!(line? == format!("line {number}"), "another line {number}");
    }

    let after = MIB / 16;
    let mut reset = open(Behaviour::Reset { after })?;
    cut(&reset.read_out().1)?;

    ensure!(name_of(door, "edge3")? == name, "another has the name");
    kinds.push(Behaviour::Name.to_string());
    scraped(door, name)?;

    // The reports come when the connections end there; probes connect and say nothing.
    for kind in kinds {
        let what = format!("{name} served {kind:?}");
        wait::poll(SOON, &what, || {
            let log = by.log_since(mark);
            let is_served = log
                .lines()
                .any(|line| line.starts_with(&format!("{kind}: ")));
            if is_served { Ok(()) } else { Err(log) }
        })?;
    }
    Ok(())
}

/// The metrics are those of that one.
fn scraped(door: &Door, name: &str) -> Result<()> {
    let mut scrape = door.connect("edge3:9100")??;
    scrape.patience(Duration::from_secs(20))?;
    write!(
        scrape,
        "GET /metrics HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n"
    )?;
    scrape.flush()?;
    let mut answer = String::new();
    scrape
        .read_to_string(&mut answer)
        .context("the answer to a scrape")?;
    let wanted = format!("stand_in{{name=\"{name}\"}} 1");
    ensure!(answer.contains(&wanted), "not of {name}: {answer}");
    Ok(())
}
