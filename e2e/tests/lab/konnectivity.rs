//! konnectivity's own client library at our socket: what its users rely on, with real daemons and faults between.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::cluster::content::{noise, sha256};
use e2e::konnectivity::Client;
use e2e::kubelet::Behaviour;
use e2e::lab::{self, Lab, STOP, Small};
use e2e::{pattern, wait};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::steps::{Descriptors, MIB, name_of};

/// A generous limit for what takes milliseconds: below every time-out that might end it in place of what is tested.
const SOON: Duration = Duration::from_secs(5);
/// The library's own last resort for a dial.
const BACKSTOP: Duration = Duration::from_secs(30);
/// The agent gives a dial up after this long.
const AGENT_DIAL: Duration = Duration::from_secs(10);
const KUBELET: &str = "edge1:10250";
/// A port of the edge that swallows what is sent to it.
const HANGS: &str = "edge1:9100";

fn socket(lab: &Lab) -> PathBuf {
    lab.dir().join("konnectivity.sock")
}

/// The small lab with konnectivity's socket, and a port that swallows what is sent to it.
fn small(
    lab: &Lab,
    edit: impl FnOnce(&mut Value),
    agent: impl FnOnce(&mut Value),
) -> Result<Small> {
    let listen = format!("unix:{}", socket(lab).display());
    let small = lab.small_with(
        |config| {
            if let Some(frontends) = config["frontends"].as_array_mut() {
                frontends
                    .push(json!({"type": "konnectivity", "listen": listen, "default": "refuse"}));
            }
            edit(config);
        },
        agent,
    )?;
    lab.host("edge1")?.nft(
        "table ip filter {
            chain swallow { type filter hook input priority filter; tcp dport 9100 drop; }
        }",
    )?;
    Ok(small)
}

/// Whether the agent is dialling the port that swallows.
fn is_dialling(lab: &Lab) -> Result<bool> {
    let args = ["-Htn", "state", "syn-sent", "dport", "=", ":9100"];
    Ok(!lab.host("edge1")?.run("ss", &args)?.is_empty())
}

fn wait_dialling(lab: &Lab, wanted: bool) -> Result<()> {
    wait::poll(SOON, &format!("the agent is dialling: {wanted}"), || {
        let dialling = is_dialling(lab)?;
        ensure!(dialling == wanted, "{dialling}");
        Ok(())
    })
}

/// Begins a dial that the edge does not answer, and waits until the agent is dialling.
fn hang(lab: &Lab, client: &mut Client, id: &str, within: Duration) -> Result<Instant> {
    let begun = Instant::now();
    client.dial(id, HANGS, within)?;
    wait_dialling(lab, true)?;
    Ok(begun)
}

#[test]
fn dial_errors_reach_the_library_word_for_word() {
    lab::scenario(|lab| {
        let small = small(
            lab,
            |_| {},
            |config| config["timeouts"] = json!({"dial": "2s"}),
        )?;
        let descriptors = Descriptors::of(&small)?;
        let mut client = Client::start(&socket(lab))?;
        for (id, to, said) in [
            (
                "unknown",
                "nowhere:10250",
                "nowhere:10250: the destination is no node at the edge",
            ),
            (
                "no-node",
                "192.0.2.1:443",
                "192.0.2.1:443: the destination is no node at the edge",
            ),
            ("denied", "edge1:22", "node edge1: "),
            ("refused", "edge1:10255", "node edge1: "),
            ("late", HANGS, "node edge1: "),
        ] {
            client.dial(id, to, BACKSTOP)?;
            let outcome = client.dialled(id)?;
            let text = outcome.error.with_context(|| format!("{to} was reached"))?;
            // HTTP CONNECT has the same words, and says them to people as well.
            ensure!(
                text == small.server.door().refusal(to)?.sentence,
                "{to}: {text}"
            );
            ensure!(text.starts_with(said), "{to}: {text}");
            ensure!(
                outcome.took < AGENT_DIAL,
                "{to}: told after {:?}",
                outcome.took
            );
        }
        client.dial("no-port", "edge1", BACKSTOP)?;
        let text = client.dialled("no-port")?.error.unwrap_or_default();
        ensure!(text.starts_with("dial edge1: "), "{text}");
        drop(client);
        descriptors.returned(SOON)
    });
}

#[test]
fn a_dial_that_is_given_up_is_given_up_at_the_edge() {
    lab::scenario(|lab| {
        let small = small(lab, |_| {}, |_| {})?;
        let descriptors = Descriptors::of(&small)?;
        let mut client = Client::start(&socket(lab))?;
        // The context of the dial runs out, is cancelled, and goes with all of the client.
        let begun = hang(lab, &mut client, "late", Duration::from_secs(1))?;
        let late = client.dialled("late")?;
        ensure!(
            late.error.as_deref() == Some("dial timeout, context"),
            "{late:?}"
        );
        wait_dialling(lab, false)?;
        ensure!(begun.elapsed() < AGENT_DIAL, "the agent gave up by itself");

        let begun = hang(lab, &mut client, "cancelled", BACKSTOP)?;
        client.tell("cancel cancelled")?;
        let cancelled = client.dialled("cancelled")?;
        ensure!(cancelled.error == late.error, "{cancelled:?}");
        wait_dialling(lab, false)?;
        ensure!(begun.elapsed() < AGENT_DIAL, "the agent gave up by itself");

        let begun = hang(lab, &mut client, "killed", BACKSTOP)?;
        client.kill()?;
        wait_dialling(lab, false)?;
        ensure!(begun.elapsed() < AGENT_DIAL, "the agent gave up by itself");
        descriptors.returned(SOON)
    });
}

#[test]
fn content_comes_whole_before_the_end_and_a_close_is_answered() {
    lab::scenario(|lab| {
        let small = small(lab, |_| {}, |_| {})?;
        let descriptors = Descriptors::of(&small)?;
        let mut client = Client::start(&socket(lab))?;
        let (down, up) = (20 * MIB, 5_000_003);

        client.open(
            "down",
            KUBELET,
            Behaviour::Send {
                bytes: down,
                seed: 5,
            },
        )?;
        let read = client.ask("read", "down", "")?;
        ensure!(read == pattern::expected(down, 5).to_string(), "{read}");
        // The tunnel has ended by then, with CLOSE_RSP: nothing is waited for.
        let closed = client.close("down")?;
        ensure!(closed.took < SOON, "{closed:?}");

        // What was written before the close arrives before the end.
        client.open("up", KUBELET, Behaviour::HalfClose)?;
        client.ok("noise", "up", &format!("7 {up}"))?;
        let closed = client.close("up")?;
        ensure!(closed.error.is_none() && closed.took < SOON, "{closed:?}");
        let hash = sha256(&noise(7, up));
        small
            .kubelet
            .wait_for_line(&format!("half-close: {up} {hash}"), SOON)?;

        // The destination ends first, and sees the other way end too: there are no halves.
        client.open("first", KUBELET, Behaviour::EndFirst)?;
        let read = client.ask("read", "first", "")?;
        ensure!(read == format!("5 {}", sha256(b"done\n")), "{read}");
        small
            .kubelet
            .wait_for_line(&format!("end-first: 0 {}", sha256(b"")), SOON)?;
        client.close("first")?;

        // Closed while the destination neither reads to an end nor writes.
        client.open("hang", KUBELET, Behaviour::Hang)?;
        client.ok("noise", "hang", "9 100")?;
        let closed = client.close("hang")?;
        ensure!(closed.error.is_none() && closed.took < SOON, "{closed:?}");
        let hash = sha256(&noise(9, 100));
        small
            .kubelet
            .wait_for_line(&format!("hang: 100 {hash}"), SOON)?;
        descriptors.returned(SOON)
    });
}

/// Dials at once.
const MANY: usize = 1_000;

#[test]
fn a_thousand_dials_at_once_each_get_their_own_content() {
    lab::scenario(|lab| {
        let small = small(lab, |_| {}, |_| {})?;
        let descriptors = Descriptors::of(&small)?;
        let mut client = Client::start(&socket(lab))?;
        let start = Instant::now();
        each_has_its_own(&mut client, MANY, "")?;
        lab::measured(&format!(
            "{MANY} dials at once with konnectivity's client, 10 kB each way: {:?}",
            start.elapsed()
        ));
        descriptors.returned(BACKSTOP)
    });
}

/// Opens so many, all before the first is used; sends to each and reads from each what belongs to no other; closes them.
fn each_has_its_own(client: &mut Client, count: usize, how: &str) -> Result<()> {
    let ids = (0..count).map(|number| format!("{how}c{number}"));
    let ids = ids.collect::<Vec<_>>();
    for id in &ids {
        if !how.is_empty() {
            client.tell(&format!("tunnel {id} {how}"))?;
        }
        client.dial(id, KUBELET, BACKSTOP)?;
    }
    for id in &ids {
        let outcome = client.dialled(id)?;
        ensure!(outcome.error.is_none(), "dial {id}: {outcome:?}");
    }
    for (seed, id) in (1..).step_by(2).zip(&ids) {
        let length = 10_000 + seed;
        client.tell(&format!("write {id} {}", Behaviour::Sink { bytes: length }))?;
        client.tell(&format!("noise {id} {seed} {length}"))?;
        client.tell(&format!("line {id}"))?;
    }
    for (seed, id) in (1..).step_by(2).zip(&ids) {
        let length = 10_000 + seed;
        let heard = client.answer("line", id)?;
        let sent = noise(seed, usize::try_from(length)?);
        ensure!(
            heard == format!("{length} {}", sha256(&sent)),
            "{id}: {heard}"
        );
    }
    for id in &ids {
        client.tell(&format!("close {id}"))?;
    }
    for id in &ids {
        let answer = client.answer("close", id)?;
        let closed: e2e::konnectivity::Outcome = answer.parse()?;
        ensure!(closed.took < BACKSTOP, "{id}: {closed:?}");
    }
    Ok(())
}

#[test]
fn tunnels_share_one_connection_and_a_stopped_one_delays_nobody() {
    lab::scenario(|lab| {
        let small = small(lab, |_| {}, |_| {})?;
        let descriptors = Descriptors::of(&small)?;
        let before = small.server.process().fds()?;
        let mut client = Client::start(&socket(lab))?;
        // Never read: more than all buffers on the way could hold.
        client.ok("tunnel", "stopped", "shared")?;
        client.open(
            "stopped",
            KUBELET,
            Behaviour::Send {
                bytes: 1 << 40,
                seed: 1,
            },
        )?;
        each_has_its_own(&mut client, 100, "shared")?;
        let after = small.server.process().fds()?;
        ensure!(
            after == before + 1,
            "{before} descriptors before, {after} with the connection"
        );
        drop(client);
        descriptors.returned(SOON)
    });
}

#[test]
fn an_agent_that_stops_during_a_dial_fails_it_at_once() {
    lab::scenario(|lab| {
        let mut small = small(
            lab,
            |config| config["backend"]["idleTimeout"] = json!("60s"),
            |config| config["drain"] = json!({"grace": "1s"}),
        )?;
        let mut client = Client::start(&socket(lab))?;
        let begun = hang(lab, &mut client, "stopped", BACKSTOP)?;
        small.agent.process().signal(Signal::SIGTERM)?;
        small.agent.process().wait(STOP)?;
        let outcome = client.dialled("stopped")?;
        lab::measured(&format!(
            "agent stopped during a dial, which failed after {:?}",
            outcome.took
        ));
        let text = outcome.error.context("reached")?;
        let said = "node edge1: stopping: edge1:9100: the agent is stopping";
        ensure!(text == said, "{text}");
        ensure!(begun.elapsed() < AGENT_DIAL, "after {:?}", begun.elapsed());
        small.agent.start_again()?;
        small.server.wait_session("edge1", BACKSTOP)?;
        ensure!(name_of(&small.server.door(), "edge1")? == "edge1");
        Ok(())
    });
}

/// One that is killed is noticed when it is back, and is asked again then: nothing was sent to the destination yet. One that
/// never comes back is noticed by the limit of the dial.
#[test]
fn a_dial_whose_agent_is_killed_is_dialled_again_when_it_is_back() {
    lab::scenario(|lab| {
        let mut small = small(
            lab,
            |config| config["backend"]["idleTimeout"] = json!("60s"),
            |_| {},
        )?;
        let mut client = Client::start(&socket(lab))?;
        hang(lab, &mut client, "killed", BACKSTOP)?;
        small.agent.process().signal(Signal::SIGKILL)?;
        small.agent.process().wait(STOP)?;
        lab.host("edge1")?
            .run("nft", &["delete", "table", "ip", "filter"])?;
        small.agent.start_again()?;
        let outcome = client.dialled("killed")?;
        lab::measured(&format!(
            "agent killed during a dial, which got there after {:?}",
            outcome.took
        ));
        ensure!(outcome.error.is_none(), "{outcome:?}");
        ensure!(outcome.took < BACKSTOP / 2, "{outcome:?}");
        client.close("killed")?;
        Ok(())
    });
}

#[test]
fn a_server_that_stops_finishes_what_runs_and_refuses_dials_in_words() {
    lab::scenario(|lab| {
        let edit =
            |config: &mut Value| config["drain"] = json!({"minDelay": "500ms", "grace": "20s"});
        let small = small(lab, edit, |_| {})?;
        let mut client = Client::start(&socket(lab))?;
        // Both go on for some seconds.
        let lines = 100;
        client.open(
            "runs",
            KUBELET,
            Behaviour::Trickle {
                lines,
                every_ms: 50,
            },
        )?;
        client.open("shared", KUBELET, Behaviour::Echo)?;
        let start = Instant::now();
        small.server.process().signal(Signal::SIGTERM)?;
        small.server.process().wait_for_line("stopping", SOON)?;
        // For a moment dials are served as before.
        let mut dials = 0;
        let (text, took) = wait::poll(SOON, "a dial is refused", || {
            let id = format!("fresh{dials}");
            dials += 1;
            client.dial(&id, KUBELET, BACKSTOP)?;
            let outcome = client.dialled(&id)?;
            if outcome.error.is_none() {
                client.close(&id)?;
            }
            Ok::<_, anyhow::Error>((outcome.error.context("reached")?, outcome.took))
        })?;
        ensure!(text == "proxy-server: stopping", "{text}");
        ensure!(took < SOON, "told after {took:?}");
        client.ok("write", "shared", "still there")?;
        ensure!(client.ask("line", "shared", "")? == "still there");
        client.close("shared")?;
        let read = client.ask("read", "runs", "")?;
        let wanted = (0..lines)
            .map(|line| format!("line {line}\n"))
            .collect::<String>();
        ensure!(
            read == format!("{} {}", wanted.len(), sha256(wanted.as_bytes())),
            "{read}"
        );
        let status = small.server.process().wait(STOP)?;
        ensure!(status.code() == Some(0), "{status}");
        lab::measured(&format!(
            "server told to stop: gone after {:?}",
            start.elapsed()
        ));
        Ok(())
    });
}
