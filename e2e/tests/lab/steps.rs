//! What several scenarios do.

use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::client::{Door, End, Tunnel};
use e2e::kubelet::Behaviour;
use e2e::lab::{Server, Small};
use e2e::{pattern, wait};

/// One MiB.
pub const MIB: u64 = 1 << 20;

/// Both frontends for CONNECT.
pub fn doors(server: &Server) -> Result<[Door; 2]> {
    Ok([server.door(), server.tls_door("kube-apiserver")?])
}

/// Asks the stand-in kubelet of a node for its name.
pub fn name_of(door: &Door, node: &str) -> Result<String> {
    let mut tunnel = door.open(&format!("{node}:10250"), Behaviour::Name)?;
    Ok(tunnel.line()?)
}

/// Sends a line to an echo and reads it back.
pub fn ping(tunnel: &mut Tunnel, text: &str) -> Result<()> {
    use std::io::Write;
    writeln!(tunnel, "{text}")?;
    tunnel.flush()?;
    let back = tunnel.line()?;
    ensure!(back == text, "sent {text:?}, got back {back:?}");
    Ok(())
}

/// Reads a stream of [`Behaviour::Send`] to its end, which must be whole and orderly.
pub fn whole(tunnel: &mut Tunnel, bytes: u64, seed: u64) -> Result<()> {
    let (content, end) = tunnel.read_out();
    orderly(&end)?;
    ensure!(content == pattern::expected(bytes, seed), "not what was sent: {content}");
    Ok(())
}

/// The stream ended as its sender ended it.
pub fn orderly(end: &End) -> Result<()> {
    ensure!(matches!(end, End::Orderly), "not an orderly end: {end:?}");
    Ok(())
}

/// The stream did not look finished to its reader.
pub fn cut(end: &End) -> Result<()> {
    ensure!(matches!(end, End::Cut(_)), "a stream that was cut looks finished");
    Ok(())
}

/// The open descriptors of both daemons after a first request, to see at the end that none was kept.
pub struct Descriptors {
    server: usize,
    agent: usize,
}

impl Descriptors {
    /// Counts them.
    pub fn of(small: &Small) -> Result<Self> {
        name_of(&small.server.door(), "edge1")?;
        let idle = Duration::from_secs(10);
        let server = wait::poll(idle, "no stream is left", || {
            let sessions = small.server.sessions()?;
            ensure!(sessions.iter().all(|session| session.streams == 0), "{sessions:?}");
            Ok(small.server.process().fds()?)
        })?;
        Ok(Self { server, agent: small.agent.process().fds()? })
    }

    /// Waits until there are no more than before.
    pub fn returned(&self, small: &Small, within: Duration) -> Result<()> {
        for (process, before) in
            [(small.server.process(), self.server), (small.agent.process(), self.agent)]
        {
            let what = format!("{} has {before} descriptors again", process.name());
            wait::poll(within, &what, || match process.fds() {
                Ok(count) if count <= before => Ok(()),
                other => Err(other),
            })?;
        }
        Ok(())
    }
}
