//! Streams that run until they are cut, and say when that was and how it looked.

use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::client::{Door, End, Tunnel};
use e2e::kubelet::Behaviour;
use e2e::{pattern, wait};
use tokio::time::Instant;

use super::SILENCE;
use crate::steps::ping;

/// So much is read or written at once, and then nothing for a while: that is enough to fill every buffer on the way.
pub(super) const PIECE: usize = 16 << 10;
pub(super) const BEAT: Duration = Duration::from_millis(100);
/// What a stream does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Reads what comes faster than it is read.
    Download,
    /// Writes more than is taken.
    Upload,
    /// Reads a line from time to time.
    Trickle,
    /// Says nothing, and hears nothing.
    Quiet,
    /// The node has ended its side; the requester goes on.
    EndedFirst,
    /// The requester has stopped to read.
    Stopped,
}

pub(super) const KINDS: [Kind; 6] = [
    Kind::Download,
    Kind::Upload,
    Kind::Trickle,
    Kind::Quiet,
    Kind::EndedFirst,
    Kind::Stopped,
];

/// What the streams are told.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// Nothing more is held back.
    pub(super) hurry: AtomicBool,
    /// All others have ended: who has stopped may look.
    pub(super) look: AtomicBool,
}

/// A stream that runs until it is cut.
pub(super) struct Runs {
    pub(super) kind: Kind,
    pub(super) thread: JoinHandle<Result<(Instant, End)>>,
}

impl Runs {
    /// It has begun when this returns.
    pub(super) fn start(
        mut tunnel: Tunnel,
        kind: Kind,
        seed: u64,
        told: &Arc<Told>,
    ) -> Result<Self> {
        let (begun, first) = std::sync::mpsc::sync_channel(1);
        let told = Arc::clone(told);
        let thread = std::thread::spawn(move || {
            // Told once; nobody listens after.
            let begun = || {
                begun.try_send(()).ok();
            };
            run(&mut tunnel, kind, seed, &told, begun)
        });
        first.recv().context("it did not begin")?;
        Ok(Self { kind, thread })
    }
}

/// A stream of that kind, which was answered.
pub(super) fn open(door: &Door, kind: Kind, seed: u64) -> Result<Tunnel> {
    let bytes = 1 << 40;
    let behaviour = match kind {
        Kind::Download | Kind::Stopped => Behaviour::Send { bytes, seed },
        Kind::Upload => Behaviour::Sink { bytes },
        Kind::Trickle => Behaviour::Trickle {
            lines: 100_000,
            every_ms: 50,
        },
        Kind::Quiet => Behaviour::Echo,
        Kind::EndedFirst => Behaviour::EndFirst,
    };
    let mut tunnel = door.open("edge3:10250", behaviour)?;
    tunnel.patience(SILENCE * 100)?;
    tunnel.impatient(SILENCE * 100)?;
    match kind {
        Kind::Download | Kind::Stopped | Kind::Upload => {}
        Kind::Trickle => ensure!(tunnel.line()? == "line 0", "not the first line"),
        Kind::Quiet => ping(&mut tunnel, "is anybody there?")?,
        Kind::EndedFirst => {
            ensure!(tunnel.line()? == "done", "not the last words");
            ensure!(tunnel.read(&mut [0])? == 0, "more than the last words");
        }
    }
    Ok(tunnel)
}

/// Until it is cut: when that was seen, and how.
fn run(
    tunnel: &mut Tunnel,
    kind: Kind,
    seed: u64,
    told: &Told,
    mut begun: impl FnMut(),
) -> Result<(Instant, End)> {
    let error = match kind {
        Kind::Download => compare(tunnel, seed, told, &mut begun),
        Kind::Upload => pattern::each_chunk(1 << 40, seed, |chunk| {
            for piece in chunk.chunks(PIECE) {
                tunnel.write_all(piece)?;
                begun();
                pause(told);
            }
            Ok(())
        }),
        Kind::Trickle => {
            begun();
            trickled(tunnel)
        }
        Kind::Quiet => {
            begun();
            tunnel.read_exact(&mut [0])
        }
        Kind::EndedFirst => loop {
            begun();
            if let Err(error) = tunnel
                .write_all(b"still here\n")
                .and_then(|()| tunnel.flush())
            {
                break Err(error);
            }
            wait::pass(BEAT);
        },
        Kind::Stopped => {
            begun();
            while !told.look.load(Ordering::Relaxed) {
                wait::pass(BEAT);
            }
            compare(tunnel, seed, told, &mut begun)
        }
    };
    let ended = Instant::now();
    let error = error.err().context("it came to its end")?;
    ensure!(error.kind() != ErrorKind::InvalidData, "{kind:?}: {error}");
    // An end of file says nothing yet: see what is left of the other direction.
    let end = match (kind, error.kind()) {
        (Kind::Upload | Kind::EndedFirst, _) => End::Cut(error),
        (_, ErrorKind::UnexpectedEof) => tunnel.read_out().1,
        _ => End::Cut(error),
    };
    Ok((ended, end))
}

/// Reads and compares with what is sent, for ever.
fn compare(
    tunnel: &mut Tunnel,
    seed: u64,
    told: &Told,
    begun: &mut impl FnMut(),
) -> io::Result<()> {
    let mut got = vec![0; PIECE];
    pattern::each_chunk(1 << 40, seed, |chunk| {
        for piece in chunk.chunks(PIECE) {
            let mut rest = piece;
            while !rest.is_empty() {
                let part = got.get_mut(..rest.len()).unwrap_or_default();
                let count = tunnel.read(part)?;
                let (now, later) = rest.split_at(count);
                if count == 0 {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                if part.get(..count) != Some(now) {
                    return Err(io::Error::new(ErrorKind::InvalidData, "not what was sent"));
                }
                rest = later;
            }
            begun();
            pause(told);
        }
        Ok(())
    })
}

fn trickled(tunnel: &mut Tunnel) -> io::Result<()> {
    for number in 1.. {
        let line = tunnel.line()?;
        if line != format!("line {number}") {
            return Err(io::Error::new(ErrorKind::InvalidData, line));
        }
    }
    Ok(())
}

fn pause(told: &Told) {
    if !told.hurry.load(Ordering::Relaxed) {
        wait::pass(BEAT);
    }
}
