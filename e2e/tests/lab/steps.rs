//! What several scenarios do.

use std::io::Write;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::client::{Door, End, Tunnel};
use e2e::kubelet::Behaviour;
use e2e::lab::{Agent, Lab, SERVER, Server, Small};
use e2e::link::{Link, Weather};
use e2e::process::Process;
use e2e::{pattern, wait};
use serde_json::{Value, json};

/// Where the line of `edge1` listens: the router's address at its NAT box.
pub(crate) const NEAR: &str = "198.51.100.1:8443";
/// Milliseconds between two lines of a trickle: there is always something to lose.
pub(crate) const EVERY: u64 = 50;
/// An ordinary line.
pub(crate) const LINE: Weather = Weather {
    delay: Duration::from_millis(10),
    loss: 0.0,
    reorder: 0.0,
    late: Duration::ZERO,
};
/// One MiB.
pub(crate) const MIB: u64 = 1 << 20;

/// Both frontends for CONNECT.
pub(crate) fn doors(server: &Server) -> Result<[Door; 2]> {
    Ok([server.door(), server.tls_door("kube-apiserver")?])
}

/// Asks the stand-in kubelet of a node for its name.
pub(crate) fn name_of(door: &Door, node: &str) -> Result<String> {
    let mut tunnel = door.open(&format!("{node}:10250"), Behaviour::Name)?;
    Ok(tunnel.line()?)
}

/// Sends a line to an echo and reads it back.
pub(crate) fn ping(tunnel: &mut Tunnel, text: &str) -> Result<()> {
    writeln!(tunnel, "{text}")?;
    tunnel.flush()?;
    let back = tunnel.line()?;
    ensure!(back == text, "sent {text:?}, got back {back:?}");
    Ok(())
}

/// Reads a stream of [`Behaviour::Send`] to its end, which must be whole and orderly.
pub(crate) fn whole(tunnel: &mut Tunnel, bytes: u64, seed: u64) -> Result<()> {
    let (content, end) = tunnel.read_out();
    orderly(&end)?;
    ensure!(
        content == pattern::expected(bytes, seed),
        "not what was sent: {content}"
    );
    Ok(())
}

/// The stream ended as its sender ended it.
pub(crate) fn orderly(end: &End) -> Result<()> {
    ensure!(matches!(end, End::Orderly), "not an orderly end: {end:?}");
    Ok(())
}

/// The stream did not look finished to its reader.
pub(crate) fn cut(end: &End) -> Result<()> {
    ensure!(
        matches!(end, End::Cut(_)),
        "a stream that was cut looks finished"
    );
    Ok(())
}

/// The open descriptors of daemons after a first request to each agent, to see at the end that none was kept.
pub(crate) struct Descriptors<'a>(Vec<(&'a Process, usize)>);

impl<'a> Descriptors<'a> {
    /// Counts those of the small lab.
    pub(crate) fn of(small: &'a Small) -> Result<Self> {
        Self::of_all(&small.server, &[("edge1", &small.agent)])
    }

    /// Counts those of a server and of agents, each with a stand-in kubelet.
    pub(crate) fn of_all(server: &'a Server, agents: &[(&str, &'a Agent)]) -> Result<Self> {
        for (node, _) in agents {
            name_of(&server.door(), node)?;
        }
        wait::poll(Duration::from_secs(10), "no stream is left", || {
            let sessions = server.sessions()?;
            ensure!(
                sessions.iter().all(|session| session.streams == 0),
                "{sessions:?}"
            );
            Ok(())
        })?;
        let agents = agents.iter().map(|(_, agent)| agent.process());
        let count = |process: &'a Process| Ok((process, process.fds()?));
        agents
            .chain([server.process()])
            .map(count)
            .collect::<Result<_>>()
            .map(Self)
    }

    /// Waits until there are no more than before.
    pub(crate) fn returned(&self, within: Duration) -> Result<()> {
        for (process, before) in &self.0 {
            let what = format!("{} has {before} descriptors again", process.name());
            wait::poll(within, &what, || match process.fds() {
                Ok(count) if count <= *before => Ok(()),
                other => Err(other),
            })?;
        }
        Ok(())
    }
}

/// Lays an ordinary line from a router's address at a NAT box to the server.
pub(crate) fn lay(lab: &Lab, near: &str) -> Result<Link> {
    let inet = lab.host("inet")?;
    let link = Link::lay(&inet, near.parse()?, &inet, SERVER.parse()?, 7)?;
    link.weather(LINE);
    Ok(link)
}

/// The small lab, with a line of the harness between NAT box and server.
pub(crate) fn on_a_line(lab: &Lab, server: impl FnOnce(&mut Value)) -> Result<(Link, Small)> {
    let link = lay(lab, NEAR)?;
    let small = lab.small_with(server, |config| config["servers"] = json!([NEAR]))?;
    Ok((link, small))
}
