//! Cut lines: outages that a session survives, and one that it does not.
//!
//! How long a healed line takes to carry bytes again is printed; `docs/protocol.md` quotes it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::kubelet::Behaviour;
use e2e::lab::{self, Agent, Lab, Server};
use e2e::link::{Link, Weather};
use e2e::process::Process;
use e2e::wait;
use proto::Reason;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::steps::{Descriptors, EVERY, LINE, MIB, NEAR, cut, lay, name_of, on_a_line, ping};
use crate::streams::{Watch, after, download, joined, upload};

/// An edge on a line of its own.
struct Site {
    name: &'static str,
    link: Link,
    agent: Agent,
    _kubelet: Process,
}

impl Site {
    fn start(lab: &Lab, server: &Server, name: &'static str, near: &str) -> Result<Self> {
        let link = lay(lab, near)?;
        let _kubelet = lab.kubelet(name)?;
        let agent = lab.agent(server, name, |config| config["servers"] = json!([near]))?;
        Ok(Self {
            name,
            link,
            agent,
            _kubelet,
        })
    }

    fn kubelet(&self) -> String {
        format!("{}:10250", self.name)
    }
}

/// Three sites lose their lines for `span`: one that downloads and trickles, one that uploads, one whose stream is silent.
/// Content is whole, sessions are the same, and bytes flow again within `recovery`.
fn survives_a_cut_of(span: Duration, recovery: Duration) {
    lab::scenario(|lab| {
        let server = lab.server(|_| {})?;
        let down = Site::start(lab, &server, "edge1", NEAR)?;
        let up = Site::start(lab, &server, "edge2", "198.51.100.9:8443")?;
        let quiet = Site::start(lab, &server, "edge3", "198.51.100.17:8443")?;
        let sites = [&down, &up, &quiet];
        let (door, patience) = (server.door(), span + recovery);
        let sessions = || -> Result<Vec<Value>> {
            let of = |site: &&Site| Ok(server.wait_session(site.name, lab::START)?.session);
            sites.iter().map(of).collect()
        };
        let before = sessions()?;
        let agents = sites.map(|site| (site.name, &site.agent));
        let descriptors = Descriptors::of_all(&server, &agents)?;
        let mut echo = door.open(&quiet.kubelet(), Behaviour::Echo)?;
        echo.patience(patience)?;
        ping(&mut echo, "before")?;
        // Loss keeps a sender at what its congestion window allows, which is the hard case: nothing new may be sent then.
        for busy in [&down, &up] {
            busy.link.weather(Weather { loss: 0.01, ..LINE });
        }
        // It must still be written when the line is healed, and for a while after.
        let lines = (span.as_secs() + 10) * 1000 / EVERY;
        let trickle = Watch::open(&door, lines, EVERY, patience)?;
        let download = download(&door, 64 * MIB, patience)?;
        let upload = upload(&door, &up.kubelet(), 64 * MIB, patience)?;
        ensure!(
            !download.is_finished() && !upload.is_finished(),
            "ended before the cut"
        );
        sites.iter().for_each(|site| site.link.cut());
        wait::pass(span);
        for site in sites {
            site.link.weather(LINE);
            site.link.heal();
        }
        let healed = Instant::now();
        ping(&mut echo, "after")?;
        let took = [
            ("a silent stream", healed.elapsed()),
            (
                "a trickle beside a download",
                after(healed, &trickle.whole(lines)?)?,
            ),
            ("an upload", after(healed, &joined(upload)?)?),
        ];
        joined(download).context("the download")?;
        for (what, took) in took {
            lab::measured(&format!(
                "cut of {span:?}: {what} flowed again after {took:?}"
            ));
            ensure!(
                took < recovery,
                "{what} flowed again only {took:?} after healing"
            );
        }
        ensure!(sessions()? == before, "a session is another");
        drop(echo);
        descriptors.returned(Duration::from_secs(30))
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
