//! What several scenarios do.

use std::io::{self, ErrorKind, Write};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use e2e::client::{Door, End, Tunnel};
use e2e::kubelet::Behaviour;
use e2e::lab::{Server, Small};
use e2e::{pattern, wait};
use tokio::time::Instant;

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

/// The open descriptors of both daemons after a first request, to see at the end that none was kept.
pub(crate) struct Descriptors {
    server: usize,
    agent: usize,
}

impl Descriptors {
    /// Counts them.
    pub(crate) fn of(small: &Small) -> Result<Self> {
        name_of(&small.server.door(), "edge1")?;
        let idle = Duration::from_secs(10);
        let server = wait::poll(idle, "no stream is left", || {
            let sessions = small.server.sessions()?;
            ensure!(
                sessions.iter().all(|session| session.streams == 0),
                "{sessions:?}"
            );
            small.server.process().fds()
        })?;
        Ok(Self {
            server,
            agent: small.agent.process().fds()?,
        })
    }

    /// Waits until there are no more than before.
    pub(crate) fn returned(&self, small: &Small, within: Duration) -> Result<()> {
        for (process, before) in [
            (small.server.process(), self.server),
            (small.agent.process(), self.agent),
        ] {
            let what = format!("{} has {before} descriptors again", process.name());
            wait::poll(within, &what, || match process.fds() {
                Ok(count) if count <= before => Ok(()),
                other => Err(other),
            })?;
        }
        Ok(())
    }
}

/// A trickle that is read on a thread of its own, with the time of each line.
pub(crate) struct Watch {
    thread: JoinHandle<(Vec<Instant>, End)>,
}

impl Watch {
    /// Opens the trickle and waits for its first line. `patience` is the longest silence that is no end.
    pub(crate) fn open(door: &Door, lines: u64, every_ms: u64, patience: Duration) -> Result<Self> {
        let mut tunnel = door.open("edge1:10250", Behaviour::Trickle { lines, every_ms })?;
        tunnel.patience(patience)?;
        ensure!(tunnel.line()? == "line 0", "not the first line");
        let thread = std::thread::spawn(move || {
            let mut times = vec![Instant::now()];
            loop {
                match tunnel.line() {
                    Ok(line) if line == format!("line {}", times.len()) => {
                        times.push(Instant::now());
                    }
                    Ok(other) => {
                        let text = format!("{other:?} in place of line {}", times.len());
                        return (times, End::Cut(io::Error::other(text)));
                    }
                    Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                        return (times, tunnel.read_out().1);
                    }
                    Err(error) => return (times, End::Cut(error)),
                }
            }
        });
        Ok(Self { thread })
    }

    /// Waits for the end, and says when each line came and how it ended.
    pub(crate) fn end(self) -> Result<(Vec<Instant>, End)> {
        self.thread
            .join()
            .map_err(|_panic| anyhow!("the reader panicked"))
    }

    /// Waits for the end, which must be that of a whole trickle.
    pub(crate) fn whole(self, lines: u64) -> Result<Vec<Instant>> {
        let (times, end) = self.end()?;
        orderly(&end)?;
        ensure!(
            times.len() as u64 == lines,
            "{} of {lines} lines",
            times.len()
        );
        Ok(times)
    }
}
