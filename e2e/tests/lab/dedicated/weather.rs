//! A line that works badly, beside a tunnel that works well.

use std::time::Duration;

use anyhow::ensure;
use e2e::kubelet::Behaviour;
use e2e::lab;
use e2e::link::Weather;
use tokio::time::Instant;

use super::{Bed, LINE, SOON, TUNNEL, short, until};
use crate::steps::{MIB, doors, name_of, whole};
use crate::streams::joined;

/// How many requests.
const REQUESTS: usize = 60;

#[test]
fn a_slow_line_is_left_to_the_race_and_one_that_loses_packets_loses_no_request() {
    lab::scenario(|lab| {
        let bed = Bed::lay(lab, &short())?;
        let doors = doors(&bed.server)?;
        let lost = "corvid_line_dials_total{line=\"express\",result=\"lost\"}";

        // 200 ms there and back are less than `raceAfter`: it is the operator's word that counts.
        let slow = |delay| Weather {
            delay: Duration::from_millis(delay),
            ..Weather::default()
        };
        bed.line.weather(slow(100));
        for door in &doors {
            let asked = Instant::now();
            ensure!(name_of(door, "edge3")? == LINE);
            lab::measured(&format!(
                "200 ms there and back: by the line in {:?}",
                asked.elapsed()
            ));
        }
        let before = bed.server.metric(lost)?;
        ensure!(before.abs() < f64::EPSILON, "{before} races were lost");

        // 200 ms each way are more: the tunnel answers first.
        bed.line.weather(slow(200));
        for door in &doors {
            let asked = Instant::now();
            ensure!(name_of(door, "edge3")? == TUNNEL);
            lab::measured(&format!(
                "200 ms each way: by the tunnel in {:?}",
                asked.elapsed()
            ));
        }
        let races = bed.server.metric(lost)?;
        ensure!((races - 2.0).abs() < f64::EPSILON, "{races} races lost");

        // Fast again: nothing is held against it.
        bed.line.weather(Weather::default());
        until(&doors[0], "edge3", LINE)?;

        // A third of all packets are lost. What is on the line stays there, and no request fails.
        let bytes = MIB / 2;
        let mut runs = doors[0].open("edge3:10250", Behaviour::Send { bytes, seed: 5 })?;
        bed.line.weather(Weather {
            delay: Duration::from_millis(5),
            loss: 0.3,
            ..Weather::default()
        });
        runs.patience(Duration::from_mins(2))?;
        let running = std::thread::spawn(move || {
            let began = Instant::now();
            whole(&mut runs, bytes, 5)?;
            Ok(began.elapsed())
        });
        let (mut by_line, mut slowest) = (0, Duration::ZERO);
        for number in 0..REQUESTS {
            let asked = Instant::now();
            let who = name_of(&doors[number % 2], "edge3")?;
            slowest = slowest.max(asked.elapsed());
            ensure!(who == LINE || who == TUNNEL, "{who} answers for edge3");
            by_line += usize::from(who == LINE);
        }
        lab::measured(&format!(
            "30 % loss: {by_line} of {REQUESTS} requests by the line, none failed, the slowest took {slowest:?}; {:?}",
            bed.line.counts()
        ));
        ensure!(slowest < SOON, "{slowest:?}");
        ensure!(bed.line.counts().lost > 0, "nothing was lost");
        bed.line.weather(Weather::default());
        let took = joined(running)?;
        lab::measured(&format!(
            "a stream that was on the line is whole after {took:?}"
        ));
        until(&doors[0], "edge3", LINE)
    });
}
