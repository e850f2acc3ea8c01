//! What runs over a line that is cut: twenty of each kind, half of them over each frontend.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use e2e::client::Door;
use e2e::kubelet::Behaviour;
use e2e::lab::{self, Server};
use e2e::link::Weather;
use e2e::{pattern, wait};
use tokio::time::Instant;

use super::{Bed, LINE, SOON, TUNNEL, short, until};
use crate::steps::{Descriptors, cut, doors, name_of, orderly};
use crate::streams::joined;

mod kind;

use kind::{BEAT, KINDS, Kind, PIECE, Runs, Told, open};

/// Of each kind.
const COUNT: u64 = 20;
/// `path.silence` of the tests.
const SILENCE: Duration = Duration::from_secs(6);
/// A line with a little delay, as it has.
const CLEAR: Weather = Weather {
    delay: Duration::from_millis(2),
    loss: 0.0,
    reorder: 0.0,
    late: Duration::ZERO,
};

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

/// A trickle and an upload that last twice as long as the line is away.
struct Across {
    trickle: JoinHandle<Result<()>>,
    upload: JoinHandle<Result<()>>,
}

impl Across {
    fn begin(door: &Door, span: Duration) -> Result<Self> {
        let every = Duration::from_millis(50);
        let count = u64::try_from((span * 2).as_millis() / every.as_millis())?;
        let mut trickle = door.open(
            "edge3:10250",
            Behaviour::Trickle {
                lines: count,
                every_ms: 50,
            },
        )?;
        ensure!(trickle.line()? == "line 0", "not the first line");
        let bytes = count * PIECE as u64;
        let mut upload = door.open("edge3:10250", Behaviour::Sink { bytes })?;
        Ok(Self {
            trickle: std::thread::spawn(move || {
                for number in 1..count {
                    let line = trickle.line()?;
                    ensure!(line == format!("line {number}"), "{line:?} is {number}");
                }
                orderly(&trickle.read_out().1)
            }),
            upload: std::thread::spawn(move || {
                pattern::each_chunk(bytes, 6, |chunk| {
                    for piece in chunk.chunks(PIECE) {
                        upload.write_all(piece)?;
                        wait::pass(every);
                    }
                    Ok(())
                })?;
                let (answer, wanted) = (upload.line()?, pattern::expected(bytes, 6));
                ensure!(answer == wanted.to_string(), "not what was sent: {answer}");
                Ok(())
            }),
        })
    }

    fn whole(self) -> Result<()> {
        joined(self.trickle).context("a trickle across the cut")?;
        joined(self.upload).context("an upload across the cut")
    }
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
        let span = SILENCE / 4;
        let finite = [
            Across::begin(&doors[0], span)?,
            Across::begin(&doors[1], span)?,
        ];
        bed.line.cut();
        wait::pass(span);
        bed.line.heal();
        let healed = Instant::now();
        for across in finite {
            across.whole()?;
        }
        until(&doors[0], "edge3", LINE)?;
        wait::pass((SILENCE * 2).saturating_sub(healed.elapsed()));
        if let Some(ended) = running.iter().position(|runs| runs.thread.is_finished()) {
            let Runs { kind, thread } = running.swap_remove(ended);
            let (ended, end) = joined(thread)?;
            let after = ended.duration_since(healed);
            bail!("{kind:?} ended {after:?} after a line was back in time: {end:?}");
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
            // None before its time, which counts from what was last heard: that may be a moment older than the cut.
            ensure!(*first >= SILENCE * 9 / 10, "{kind:?}: {times:?}");
        }
        let cuts = bed.server.metric(&timed_out)?;
        let wanted = 20.0 * 6.0;
        ensure!((cuts - wanted).abs() < f64::EPSILON, "{cuts} timed out");
        bed.line.heal();
        until(&doors[1], "edge3", LINE)?;
        descriptors.returned(SOON)
    });
}
