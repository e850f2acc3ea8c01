//! An edge that has no agent at all.

use std::time::Duration;

use anyhow::ensure;
use e2e::lab;
use proto::Reason;
use serde_json::json;
use tokio::time::Instant;

use super::{Bed, LINE, SOON, every_kind, until};
use crate::steps::{doors, name_of};

fn reached_without_an_agent(mode: &str) {
    lab::scenario(|lab| {
        let path = json!({"stable": "3s", "silence": "6s", "raceAfter": "100ms", "probes": {"interval": "1s", "timeout": "1s"}});
        let bed = Bed::without_agent(lab, &path, mode)?;
        let doors = doors(&bed.server)?;
        until(&doors[0], "edge3", LINE)?;
        for door in &doors {
            every_kind(door, &bed.by_line, LINE)?;
        }
        ensure!(
            bed.server.sessions()?.is_empty(),
            "there is an agent's session"
        );

        // There is nothing else: the failure names the line and the address, and whoever asks is told in time.
        bed.line.cut();
        let asked = Instant::now();
        let refusal = doors[0].refusal("edge3:10250")?;
        lab::measured(&format!(
            "no agent, path {mode}, line cut: refused after {:?}: {refusal}",
            asked.elapsed()
        ));
        ensure!(
            refusal.status == Reason::DialTimeout.http_status(),
            "{refusal}"
        );
        ensure!(
            refusal
                .sentence
                .contains("dialled 10.33.0.10:10250 by line express"),
            "{refusal}"
        );
        ensure!(asked.elapsed() < SOON, "{:?}", asked.elapsed());
        bed.line.heal();
        // Nobody waits for `stable`, as there is no other way.
        let healed = Instant::now();
        ensure!(name_of(&doors[1], "edge3")? == LINE);
        ensure!(
            healed.elapsed() < Duration::from_secs(15),
            "{:?}",
            healed.elapsed()
        );
        Ok(())
    });
}

#[test]
fn an_edge_without_an_agent_is_reached_by_its_line_while_it_works() {
    reached_without_an_agent("auto");
}

#[test]
fn an_edge_without_an_agent_is_always_reached_by_its_line() {
    reached_without_an_agent("direct");
}
