//! To the edge: which session is tried, in which order, and which beside another.
//!
//! A healthy session of the agent here goes before one at another server, then those over a line that was silent of late,
//! then those that are to go, then those that are silent; of several here one over a dedicated line goes first, then the
//! newest, and among servers the newest announcement. The next way is tried when one has failed without a byte of the
//! request on its way, and *beside* one that does not acknowledge what it is sent within a few round trips: a live one
//! acknowledges the header at once, however long the dial takes, and what else comes of it shows one direction alone. A
//! server that is alive and does not answer is given three seconds more. The first answer counts; what it leaves behind is
//! reset, and the agent there gives its dial up.

use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use proto::Reason;
use proto::transport::{Session, SessionStats};
use proto::wire::Departure;
use tokio::time::{Instant, sleep};

use super::Forwarder;
use super::open::{Ask, Failure, Stream, Way, open_on};
use crate::registry::{Absent, Over};

/// Ways that are tried for a request: an agent has two or three, and a few that are false may be in front of them.
const TRIES: usize = 8;
/// A sign of life is waited for at least and at most so long: a few round trips, and a lost packet sent again.
const LEAST_PATIENCE: Duration = Duration::from_millis(200);
const MOST_PATIENCE: Duration = Duration::from_secs(2);
/// Another server that is alive and does not answer is not waited for any longer: its agent may dial for as long as it
/// likes, but so may that of the next way.
const SLOW_PEER: Duration = Duration::from_secs(3);
/// How long a request waits for the first word of other servers, just after the start.
const FIRST_WORD: Duration = Duration::from_secs(2);

/// How far a request may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Sessions here alone: another server asks, and no request goes two hops.
    Here,
    /// Sessions of other servers as well.
    Anywhere,
}

impl Forwarder {
    /// Opens a stream to the edge. `tried` is told of each way that is tried, and last of the one that counts.
    pub(crate) async fn tunnel(
        &self,
        ask: &Ask,
        reach: Reach,
        mut tried: impl FnMut(&Way) + Send,
    ) -> Result<Stream, Failure> {
        let mut ways: Vec<Way> = Vec::new();
        let mut running = FuturesUnordered::new();
        let (mut last, mut waited) = (None, false);
        // What the way that was tried last is watched for, and until when.
        let mut watched = Watched::NoMore;
        let mut until = pin!(sleep(Duration::ZERO));
        let mut beside = false;
        loop {
            if running.is_empty() || beside {
                beside = false;
                let room = ways.len() < TRIES;
                match self.next_way(ask, reach, &ways).filter(|_| room) {
                    Some(way) => {
                        tried(&way);
                        let stats = way.transport().stats();
                        until.as_mut().reset(Instant::now() + patience(stats.rtt));
                        watched = Watched::Sign(Before {
                            at: Instant::now(),
                            stats,
                        });
                        ways.push(way.clone());
                        running.push(attempt(way, ask));
                    }
                    None if !running.is_empty() => {}
                    None if ways.is_empty() && !waited && reach == Reach::Anywhere => {
                        self.peers.settled(FIRST_WORD).await;
                        waited = true;
                        continue;
                    }
                    None => return Err(last.unwrap_or_else(|| self.absent(ask, reach))),
                }
            }
            tokio::select! {
                biased;
                Some((way, result)) = running.next() => match result {
                    Ok(stream) => {
                        tried(&way);
                        return Ok(stream);
                    }
                    Err(failure) if failure.another => {
                        let retries = &self.peers.metrics.retries;
                        retries.get_or_create(&failure.reason.into()).inc();
                        // A stale announcement says nothing of the agent.
                        if failure.reason != Reason::NoSession {
                            last = Some(failure);
                        }
                    }
                    Err(failure) => {
                        tried(&way);
                        return Err(failure);
                    }
                },
                () = &mut until, if watched != Watched::NoMore => {
                    beside = watched == Watched::Answer || doubted(ways.last(), watched);
                    watched = if beside || !ways.last().is_some_and(Way::is_peer) {
                        Watched::NoMore
                    } else {
                        until.as_mut().reset(Instant::now() + SLOW_PEER);
                        Watched::Answer
                    };
                }
            }
        }
    }

    /// The best way that was not tried yet.
    fn next_way(&self, ask: &Ask, reach: Reach, tried: &[Way]) -> Option<Way> {
        // The registry has the oldest first.
        let here = self.registry.of(&ask.agent).into_iter().zip(0_u64..);
        let here = here.map(|(session, age)| {
            let (rank, over) = session.worth();
            (
                (rank, over != Over::ShakyLine),
                true,
                (over, age),
                Way::Agent(session),
            )
        });
        let there = match reach {
            Reach::Here => Vec::new(),
            Reach::Anywhere => self.peers.with_session_of(&ask.agent),
        };
        let there = there.into_iter().map(|(rank, number, peer)| {
            (
                (rank, true),
                false,
                (Over::Internet, number),
                Way::Peer(peer),
            )
        });
        here.chain(there)
            .filter(|(.., way)| !tried.iter().any(|other| other.is(way)))
            .max_by_key(|(rank, is_here, order, _)| (*rank, *is_here, *order))
            .map(|(.., way)| way)
    }

    /// What is said of an agent without any session.
    fn absent(&self, ask: &Ask, reach: Reach) -> Failure {
        let here = match self.registry.pick(&ask.agent) {
            Err(Absent::Since(lost)) => Some((None, Departure::from(lost))),
            Err(Absent::Never) | Ok(_) => None,
        };
        let several = reach == Reach::Anywhere && self.peers.is_configured();
        let there = several.then(|| self.peers.departure(&ask.agent)).flatten();
        let there = there.map(|(server, departure)| (Some(server), departure));
        let last = here.into_iter().chain(there).max_by_key(|(_, d)| d.at_ms);
        let asked = self.peers.asked();
        let mut detail = String::new();
        if several {
            detail = match asked.servers {
                0 => "that is known of, as no other proxy-server answers".to_owned(),
                1 => "at the one proxy-server that answers".to_owned(),
                count => format!("at any of {count} proxy-servers"),
            };
            detail.push(' ');
        }
        match last {
            Some((server, departure)) => {
                let at = clock_time(departure.at_ms);
                detail.push_str(&format!(
                    "since {at}, last error: {}",
                    departure.reason.sentence()
                ));
                if let Some(server) = server {
                    detail.push_str(&format!(" at {server}"));
                }
            }
            None if several => detail.push_str("since they started"),
            None => detail.push_str("since this server started"),
        }
        if several && asked.silent > 0 && asked.servers > 0 {
            detail.push_str(&format!("; {} more can't be asked", asked.silent));
        }
        Failure {
            reason: Reason::NoSession,
            detail,
            another: false,
            answered: false,
        }
    }
}

async fn attempt(way: Way, ask: &Ask) -> (Way, Result<Stream, Failure>) {
    let result = open_on(&way, ask).await;
    (way, result)
}

fn patience(rtt: Duration) -> Duration {
    (rtt * 4).clamp(LEAST_PATIENCE, MOST_PATIENCE)
}

/// What a way was like before a request was sent on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Before {
    at: Instant,
    stats: SessionStats,
}

impl Before {
    /// Whether nothing shows that what was sent since has arrived. Where nothing could be sent, bytes that came must do.
    fn is_silent(&self, transport: &impl Session) -> bool {
        let now = transport.stats();
        if now.sent_packets > self.stats.sent_packets {
            transport.answered().is_none_or(|sent| sent < self.at)
        } else {
            now.received <= self.stats.received
        }
    }
}

/// What a way is watched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watched {
    /// Any sign of life, since then.
    Sign(Before),
    /// The answer.
    Answer,
    /// Nothing: it is alive, and an agent that is alive dials.
    NoMore,
}

/// Whether that way is silent since. It is then doubted by other requests as well.
fn doubted(way: Option<&Way>, watched: Watched) -> bool {
    let (Some(way), Watched::Sign(before)) = (way, watched) else {
        return false;
    };
    let silent = before.is_silent(way.transport());
    if silent {
        way.doubt().raise(before.at);
    }
    silent
}

/// UTC, to the second.
fn clock_time(at_ms: i64) -> String {
    jiff::Timestamp::from_millisecond(at_ms)
        .map(|t| t.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
        .unwrap_or_default()
}
