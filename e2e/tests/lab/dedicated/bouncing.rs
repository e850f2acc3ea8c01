//! A line that comes and goes.

use std::time::Duration;

use anyhow::ensure;
use e2e::kubelet::Behaviour;
use e2e::{lab, wait};
use serde_json::json;
use tokio::time::Instant;

use super::{Bed, LINE, SOON, TUNNEL};
use crate::steps::{doors, name_of, ping};

/// It is there for so long, and away for so long.
const PHASE: Duration = Duration::from_secs(3);

#[test]
fn a_line_that_bounces_is_left_once_a_minute_at_most_and_loses_nothing_that_runs() {
    lab::scenario(|lab| {
        // The default: nothing is looked at more often than each 10 s, but for what requests have to do without.
        let bed = Bed::lay(lab, &json!({}))?;
        let doors = doors(&bed.server)?;
        let mut echo = doors[0].open("edge3:10250", Behaviour::Echo)?;
        echo.patience(SOON)?;
        ping(&mut echo, "before")?;
        let (start, minute) = (Instant::now(), Duration::from_mins(1));
        let (mut requests, mut by_line, mut pings, mut slowest) = (0, 0, 0, Duration::ZERO);
        while start.elapsed() < minute {
            let phase = start.elapsed().as_secs() / PHASE.as_secs();
            if phase.is_multiple_of(2) {
                bed.line.cut();
            } else {
                bed.line.heal();
                // Over the line, and so only while it is there: what was sent before arrives as well.
                ping(&mut echo, &format!("line {requests}"))?;
                pings += 1;
            }
            let asked = Instant::now();
            let who = name_of(&doors[requests % 2], "edge3")?;
            slowest = slowest.max(asked.elapsed());
            ensure!(who == LINE || who == TUNNEL, "{who} answers for edge3");
            by_line += usize::from(who == LINE);
            requests += 1;
            wait::pass(Duration::from_millis(100));
        }
        let switches = bed.server.metric("corvid_line_switches_total")?;
        lab::measured(&format!(
            "a minute of {PHASE:?} up and {PHASE:?} down: {switches} switches; {requests} requests, {by_line} by the line, the slowest took {slowest:?}; {pings} pings on one stream of the line"
        ));
        ensure!(
            (switches - 1.0).abs() < f64::EPSILON,
            "{switches} switches in a minute"
        );
        ensure!(slowest < SOON, "{slowest:?}");
        ensure!(pings > 0, "the line was never there");
        Ok(())
    });
}
