//! Streams that go on while a scenario does something to them, each on a thread of its own.

use std::io::{self, ErrorKind, Write};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use e2e::client::{Door, End};
use e2e::kubelet::Behaviour;
use e2e::pattern;
use tokio::time::Instant;

use crate::steps::{MIB, orderly};

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

/// A download that is read on a thread of its own; it has begun when this returns.
pub(crate) fn download(
    door: &Door,
    bytes: u64,
    patience: Duration,
) -> Result<JoinHandle<Result<()>>> {
    let mut tunnel = door.open("edge1:10250", Behaviour::Send { bytes, seed: 9 })?;
    tunnel.patience(patience)?;
    let (first, end) = pattern::read(&mut tunnel, MIB);
    end?;
    ensure!(
        first == pattern::expected(MIB, 9),
        "the first MiB is another"
    );
    Ok(std::thread::spawn(move || {
        let (rest, end) = pattern::read(&mut tunnel, u64::MAX);
        end?;
        ensure!(
            rest == pattern::tail(bytes, MIB, 9),
            "not what was sent: {rest}"
        );
        Ok(())
    }))
}

/// An upload that is written on a thread of its own; it has begun when this returns. In the end, when each piece was taken.
pub(crate) fn upload(
    door: &Door,
    kubelet: &str,
    bytes: u64,
    patience: Duration,
) -> Result<JoinHandle<Result<Vec<Instant>>>> {
    let mut tunnel = door.open(kubelet, Behaviour::Sink { bytes })?;
    tunnel.patience(patience)?;
    let (begun, first) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::spawn(move || {
        let mut times = Vec::new();
        pattern::each_chunk(bytes, 8, |chunk| {
            tunnel.write_all(chunk)?;
            times.push(Instant::now());
            // Told once; nobody listens after.
            begun.try_send(()).ok();
            Ok(())
        })?;
        ensure!(
            tunnel.line()? == pattern::expected(bytes, 8).to_string(),
            "not what was sent"
        );
        Ok(times)
    });
    first.recv().context("the upload did not begin")?;
    Ok(thread)
}

/// What such a thread found.
pub(crate) fn joined<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    thread
        .join()
        .map_err(|_panic| anyhow!("the thread of a stream panicked"))?
}

/// How long after `since` the first of these times is.
pub(crate) fn after(since: Instant, times: &[Instant]) -> Result<Duration> {
    let first = times
        .iter()
        .find(|time| **time > since)
        .context("nothing came after")?;
    Ok(first.duration_since(since))
}
