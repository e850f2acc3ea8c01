//! Daemons that stop, die and come back, with streams open.

use std::time::Duration;

use anyhow::{Context, ensure};
use e2e::kubelet::Behaviour;
use e2e::lab::{self, STOP};
use proto::Reason;
use serde_json::json;
use tokio::time::Instant;

use crate::steps::{cut, doors, name_of};
use crate::streams::Watch;

/// Longest wait for an agent to come back by itself: its longest back-off and a busy machine.
const BACK: Duration = Duration::from_mins(1);
/// Longest silence of a trickle that is no end.
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn the_agent_comes_back_after_the_server_was_killed() {
    lab::scenario(|lab| {
        let mut small = lab.small()?;
        let door = small.server.door();
        let open = Watch::open(&door, 10_000, 50, PATIENCE)?;
        small.server.process().kill()?;
        cut(&open.end()?.1)?;
        small.server.start_again()?;
        let start = Instant::now();
        small.server.wait_session("edge1", BACK)?;
        lab::measured(&format!(
            "server killed: a session again after {:?}",
            start.elapsed()
        ));
        ensure!(name_of(&door, "edge1")? == "edge1");
        Ok(())
    });
}

#[test]
fn a_server_that_is_told_to_stop_drains_and_cuts_what_is_left() {
    lab::scenario(|lab| {
        let grace = Duration::from_secs(4);
        let edit = |config: &mut serde_json::Value| {
            config["drain"] = json!({"minDelay": "500ms", "grace": "4s"});
        };
        let mut small = lab.small_with(edit, |_| {})?;
        let mut short = Vec::new();
        let mut long = Vec::new();
        for door in doors(&small.server)? {
            short.push(Watch::open(&door, 20, 50, PATIENCE)?);
            long.push(Watch::open(&door, 10_000, 50, PATIENCE)?);
        }
        let start = Instant::now();
        let status = small.server.stop(grace + STOP)?;
        let took = start.elapsed();
        lab::measured(&format!("server told to stop: gone after {took:?}"));
        ensure!(status.code() == Some(0), "{status}");
        for watch in short {
            watch
                .whole(20)
                .context("a stream that ended within the grace")?;
        }
        for watch in long {
            let (times, end) = watch.end()?;
            cut(&end)?;
            let last = times.last().context("no line")?.duration_since(start);
            ensure!(
                last > grace / 2,
                "the last line came {last:?} after the signal"
            );
        }
        small
            .server
            .process()
            .wait_for_line(Reason::Draining.label(), PATIENCE)?;
        small.server.start_again()?;
        let start = Instant::now();
        small.server.wait_session("edge1", BACK)?;
        lab::measured(&format!(
            "server started again: a session after {:?}",
            start.elapsed()
        ));
        ensure!(name_of(&small.server.door(), "edge1")? == "edge1");
        Ok(())
    });
}

#[test]
fn an_agent_that_is_told_to_stop_cuts_its_streams_and_comes_back() {
    lab::scenario(|lab| {
        let mut small = lab.small()?;
        let door = small.server.door();
        let open = Watch::open(&door, 10_000, 50, PATIENCE)?;
        let status = small.agent.process().terminate(BACK)?;
        ensure!(status.code() == Some(0), "{status}");
        cut(&open.end()?.1)?;
        let refusal = door.refusal("edge1:10250")?;
        ensure!(
            refusal.status == Reason::NoSession.http_status(),
            "{refusal}"
        );
        ensure!(
            refusal.sentence.contains("edge1: no session since"),
            "{refusal}"
        );
        small.agent.start_again()?;
        small.server.wait_session("edge1", BACK)?;
        ensure!(name_of(&door, "edge1")? == "edge1");
        Ok(())
    });
}

#[test]
fn a_killed_agent_is_replaced_by_its_next_start() {
    lab::scenario(|lab| {
        let edit = |config: &mut serde_json::Value| {
            config["backend"]["idleTimeout"] = json!("30s");
        };
        let mut small = lab.small_with(edit, |_| {})?;
        let door = small.server.door();
        let before = small.server.wait_session("edge1", BACK)?.session;
        let open = Watch::open(&door, 10_000, 50, Duration::from_mins(2))?;
        small.agent.process().kill()?;
        let killed = Instant::now();
        small.agent.start_again()?;
        e2e::wait::poll(BACK, "a new session", || {
            let newest = small.server.wait_session("edge1", BACK)?;
            ensure!(newest.session != before, "only {newest:?}");
            Ok(())
        })?;
        // The old session may still be there: the newest is the one that is used.
        ensure!(name_of(&door, "edge1")? == "edge1");
        lab::measured(&format!(
            "agent killed: the next request went through after {:?}",
            killed.elapsed()
        ));
        cut(&open.end()?.1)?;
        lab::measured(&format!(
            "agent killed: its stream ended after {:?}",
            killed.elapsed()
        ));
        let report = format!(
            "{}: error",
            Behaviour::Trickle {
                lines: 10_000,
                every_ms: 50
            }
        );
        small.kubelet.wait_for_line(&report, PATIENCE)?;
        Ok(())
    });
}
