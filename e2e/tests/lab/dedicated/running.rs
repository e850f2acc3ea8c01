//! What runs over a line that is cut: twenty of each kind, half of them over each frontend.

use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use e2e::client::{Door, End, Tunnel};
use e2e::kubelet::Behaviour;
use e2e::lab::{self, Server};
use e2e::link::Weather;
use e2e::{pattern, wait};
use tokio::time::Instant;

use super::{Bed, LINE, SOON, TUNNEL, short, until};
use crate::steps::{Descriptors, cut, doors, name_of, ping};
use crate::streams::joined;

/// Of each kind.
const COUNT: u64 = 20;
/// `path.silence` of the tests.
const SILENCE: Duration = Duration::from_secs(6);
/// So much is read or written at once, and then nothing for a while: that is enough to fill every buffer on the way.
const PIECE: usize = 16 << 10;
const BEAT: Duration = Duration::from_millis(100);
/// A line with a little delay, as it has.
const CLEAR: Weather = Weather {
    delay: Duration::from_millis(2),
    loss: 0.0,
    reorder: 0.0,
    late: Duration::ZERO,
};

/// What a stream does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
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

const KINDS: [Kind; 6] = [
    Kind::Download,
    Kind::Upload,
    Kind::Trickle,
    Kind::Quiet,
    Kind::EndedFirst,
    Kind::Stopped,
];

/// What the streams are told.
#[derive(Debug, Default)]
struct Told {
    /// Nothing more is held back.
    hurry: AtomicBool,
    /// All others have ended: who has stopped may look.
    look: AtomicBool,
}

/// A stream that runs until it is cut.
struct Runs {
    kind: Kind,
    thread: JoinHandle<Result<(Instant, End)>>,
}

impl Runs {
    /// It has begun when this returns.
    fn start(mut tunnel: Tunnel, kind: Kind, seed: u64, told: &Arc<Told>) -> Result<Self> {
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
fn open(door: &Door, kind: Kind, seed: u64) -> Result<Tunnel> {
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

/// One of each kind by that door, over the line: what was faster by the tunnel is let go and opened again.
fn one_of_each(server: &Server, door: &Door, seed: u64, told: &Arc<Told>) -> Result<Vec<Runs>> {
    let opened = wait::poll(SOON, "one of each kind is open over the line", || {
        let each = |kind| open(door, kind, seed).with_context(|| format!("{kind:?}, the {seed}th"));
        let all: Vec<_> = KINDS.into_iter().map(each).collect::<Result<_>>()?;
        let sessions = server.sessions()?;
        // Nor is anything left of a try before.
        let is_idle = sessions.iter().all(|session| session.streams == 0);
        ensure!(is_idle, "{sessions:?}");
        Ok(all)
    })?;
    let all = KINDS.into_iter().zip(opened);
    all.map(|(kind, tunnel)| Runs::start(tunnel, kind, seed, told))
        .collect()
}

#[test]
fn what_runs_over_a_line_that_is_cut_ends_after_the_time_out_and_what_is_new_goes_elsewhere() {
    lab::scenario(|lab| {
        let bed = Bed::lay(lab, &short())?;
        // Who must never answer: another site, with an agent.
        let _other = lab.kubelet("edge1")?;
        let other_agent = lab.agent(&bed.server, "edge1", |_| {})?;
        bed.line.weather(CLEAR);
        let doors = doors(&bed.server)?;
        ensure!(name_of(&doors[0], "edge1")? == "edge1");
        let agent = bed.agent.as_ref().context("no agent")?;
        let agents = [("edge1", &other_agent), ("edge3", agent)];
        let descriptors = Descriptors::of_all(&bed.server, &agents)?;
        let streams = "corvid_streams_total{frontend=\"http_connect\",path=\"direct\",reason=";
        let timed_out = format!("{streams}\"timeout\"");
        let told = Arc::new(Told::default());
        let mut running = Vec::new();
        for seed in 0..COUNT {
            let door = if seed % 2 == 0 { &doors[0] } else { &doors[1] };
            running.extend(one_of_each(&bed.server, door, seed, &told)?);
        }

        // Less than the time-out: nothing is lost, nothing ends.
        bed.line.cut();
        wait::pass(SILENCE / 4);
        bed.line.heal();
        let healed = Instant::now();
        until(&doors[0], "edge3", LINE)?;
        wait::pass((SILENCE * 2).saturating_sub(healed.elapsed()));
        if let Some(runs) = running
            .iter()
            .position(|runs| runs.thread.is_finished())
            .map(|ended| running.swap_remove(ended))
        {
            let kind = runs.kind;
            let (ended, end) = joined(runs.thread)?;
            let after = ended.duration_since(healed);
            let log = bed.server.process().log();
            let why: Vec<_> = log
                .lines()
                .filter(|line| line.contains("access: stream") && !line.contains("reason=\"ok\""))
                .collect();
            bail!("{kind:?} ended {after:?} after a line was back in time: {end:?}; {why:#?}");
        }
        let cuts = bed.server.metric(&timed_out)?;
        ensure!(cuts.abs() < f64::EPSILON, "{cuts} are cut");

        // For good: what is new goes by the tunnel, and to nobody else.
        let cut_at = Instant::now();
        let mut slowest = bed.cut()?;
        lab::measured(&format!(
            "line cut under {} streams: the first new request took {slowest:?}",
            running.len()
        ));
        told.hurry.store(true, Ordering::Relaxed);
        let mut requests = 1;
        let is_over = |runs: &Runs| runs.kind == Kind::Stopped || runs.thread.is_finished();
        while !running.iter().all(is_over) {
            let door = if requests % 2 == 0 {
                &doors[0]
            } else {
                &doors[1]
            };
            let asked = Instant::now();
            let who = name_of(door, "edge3")?;
            slowest = slowest.max(asked.elapsed());
            ensure!(who == TUNNEL, "{who} answers for edge3");
            ensure!(name_of(door, "edge1")? == "edge1", "another for edge1");
            requests += 1;
            let left = running.iter().filter(|runs| !is_over(runs));
            let left: Vec<_> = left.map(|runs| runs.kind).collect();
            ensure!(cut_at.elapsed() < SILENCE * 5 + SOON, "still run: {left:?}");
            wait::pass(BEAT);
        }
        lab::measured(&format!(
            "{requests} new requests while they ended, the slowest took {slowest:?}"
        ));
        ensure!(slowest < SOON, "{slowest:?}");
        told.look.store(true, Ordering::Relaxed);
        for kind in KINDS {
            let mut times = Vec::new();
            for runs in running.extract_if(.., |runs| runs.kind == kind) {
                let (ended, end) = joined(runs.thread)?;
                cut(&end).with_context(|| format!("{kind:?}"))?;
                times.push(ended.duration_since(cut_at));
            }
            times.sort();
            let (first, last) = times.first().zip(times.last()).context("none")?;
            lab::measured(&format!(
                "{} of {kind:?} ended {first:?} to {last:?} after the cut, `silence` being {SILENCE:?}",
                times.len()
            ));
            // None before its time.
            ensure!(*first >= SILENCE, "{kind:?}: {times:?}");
        }
        let cuts = bed.server.metric(&timed_out)?;
        let wanted = 20.0 * 6.0;
        ensure!((cuts - wanted).abs() < f64::EPSILON, "{cuts} timed out");
        bed.line.heal();
        until(&doors[1], "edge3", LINE)?;
        descriptors.returned(SOON)
    });
}
