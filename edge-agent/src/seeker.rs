//! A second server behind the same address. One supervisor an address keeps one session; where a load balancer stands in
//! front of several servers that is one in all, and its server's loss would be felt.
//!
//! | state | until |
//! | --- | --- |
//! | *content* | the sessions that are up are with one server alone, and it has said that there are more |
//! | *seeking* | a session with another server is up; after each attempt a pause: three short ones, as most balancers place each attempt anew, then 30 s doubling to 5 min |
//! | *holding* | that session ends, is told to go or gives way to a newer one; not sooner sought again than its server asks, and one that was of no use counts as an attempt |
//!
//! An attempt that leads to a server that has a session already is given up before its hello, so nothing of it is seen
//! there but a handshake. The servers say how many they are with each session and whenever that changes, so nothing is
//! tried while there is but one.

use std::sync::Arc;
use std::time::Duration;

use proto::ServerName;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::backoff::obey;
use crate::candidate::Candidate;
use crate::connector::Connector;
use crate::error::OpenError;
use crate::session::{self, Live, Phase};

/// Sessions with so many servers are enough.
const ENOUGH: usize = 2;
/// Over which the agents of a fleet begin to seek, when their servers become more than one.
const SPREAD: Duration = Duration::from_secs(5);
/// Attempts with a short pause.
const QUICK: u32 = 3;
const QUICK_PAUSE: Duration = Duration::from_secs(1);
/// The pauses after that, each up to half longer or shorter.
const LEAST_PAUSE: Duration = Duration::from_secs(30);
const MOST_PAUSE: Duration = Duration::from_secs(300);

/// What of a session bears on whether another one is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) server: ServerName,
    /// It serves, and nobody wants it gone.
    pub(crate) up: bool,
    /// How many servers it has said that there are.
    pub(crate) servers: u32,
}

/// Whether another server is to be sought. Without any session the supervisors are at work already.
pub(crate) fn wants(sessions: &[Standing]) -> bool {
    let up = || sessions.iter().filter(|standing| standing.up);
    let Some(first) = up().next() else {
        return false;
    };
    let one = up().all(|standing| standing.server == first.server);
    let several = up().any(|standing| standing.servers as usize >= ENOUGH);
    one && several
}

/// The pause after so many attempts. `random` is uniform in 0..1.
fn pause(attempts: u32, random: f64) -> Duration {
    let around = 0.5 + random.clamp(0.0, 1.0);
    if attempts <= QUICK {
        return QUICK_PAUSE.mul_f64(around);
    }
    let doubled = LEAST_PAUSE.saturating_mul(1 << (attempts - QUICK - 1).min(10));
    doubled.min(MOST_PAUSE).mul_f64(around)
}

/// Seeks for as long as the agent runs.
pub(crate) struct Seeker {
    shared: Connector,
    attempts: u32,
    /// Which address is next.
    turn: usize,
}

impl Seeker {
    pub(crate) fn new(shared: Connector) -> Self {
        Self {
            shared,
            attempts: 0,
            turn: rand::random::<u32>() as usize,
        }
    }

    pub(crate) async fn run(mut self) {
        let registry = Arc::clone(&self.shared.terms.registry);
        let mut changed = registry.watch();
        loop {
            changed.mark_unchanged();
            if !wants(&registry.standings()) {
                self.attempts = 0;
                if changed.changed().await.is_err() {
                    return;
                }
                continue;
            }
            let pause = if self.attempts == 0 {
                SPREAD.mul_f64(rand::random())
            } else {
                pause(self.attempts, rand::random())
            };
            self.rest(pause, &mut changed).await;
            if !wants(&registry.standings()) {
                continue;
            }
            match self.attempt().await {
                Some(Ok(live)) => {
                    let asked = self.hold(&live).await;
                    // A server that takes everybody and drops them must not be stormed.
                    self.attempts = match live.is_useful() {
                        true => 0,
                        false => self.attempts.saturating_add(1),
                    };
                    sleep(obey(Duration::ZERO, asked, rand::random())).await;
                }
                Some(Err(error)) => {
                    self.attempts = self.attempts.saturating_add(1);
                    tracing::debug!(error = %daemon::chain(&error), attempts = self.attempts, "no second server");
                    sleep(obey(Duration::ZERO, error.retry_after(), rand::random())).await;
                }
                None => self.attempts = self.attempts.saturating_add(1),
            }
        }
    }

    /// Pauses, unless nothing is wanted any more meanwhile.
    async fn rest(&self, pause: Duration, changed: &mut watch::Receiver<usize>) {
        let registry = &self.shared.terms.registry;
        let content = async {
            while wants(&registry.standings()) {
                if changed.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = sleep(pause) => {}
            () = content => {}
        }
    }

    /// `None` without an address, or without a certificate that is valid: the supervisors see to both.
    async fn attempt(&mut self) -> Option<Result<Arc<Live>, OpenError>> {
        let terms = &self.shared.terms;
        if terms.own.credential.not_after().as_secs() <= terms.own.clock.now().as_secs() {
            return None;
        }
        let wanted: Vec<Candidate> = self.shared.candidates.refresh().await.into_iter().collect();
        // One after the other: behind that of a line there is mostly one server, and that has a session.
        self.turn = self.turn.wrapping_add(1);
        let way = wanted.get(self.turn.checked_rem(wanted.len())?)?;
        let held = |server: &ServerName| {
            let standings = terms.registry.standings();
            standings
                .iter()
                .any(|standing| standing.up && standing.server == *server)
        };
        Some(session::open(terms, way, held).await)
    }

    /// *Holding*. Says how long its server asked to stay away.
    async fn hold(&self, live: &Live) -> Duration {
        let mut phase = live.phase();
        match phase.wait_for(|phase| *phase != Phase::Up).await.as_deref() {
            Ok(Phase::Told(away)) => away.retry_after,
            Ok(Phase::Up | Phase::Superseded | Phase::Ended(_)) | Err(_) => Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(server: &str, up: bool, servers: u32) -> Standing {
        let server = server.parse().unwrap();
        Standing {
            server,
            up,
            servers,
        }
    }

    #[test]
    fn another_server_is_sought_while_there_are_more_than_the_one() {
        for (sessions, wanted) in [
            (&[][..], false),
            (&[standing("a", true, 0)], false),
            (&[standing("a", true, 1)], false),
            (&[standing("a", true, 2)], true),
            (&[standing("a", true, 2), standing("b", true, 2)], false),
            // Told to go: its server will be no more.
            (&[standing("a", true, 2), standing("b", false, 2)], true),
            (&[standing("a", false, 2)], false),
            // Two sessions with one server, over two ways or while one takes over from the other.
            (&[standing("a", true, 2), standing("a", true, 2)], true),
            (&[standing("a", true, 1), standing("b", false, 3)], false),
        ] {
            assert_eq!(wants(sessions), wanted, "{sessions:?}");
        }
    }

    #[test]
    fn pauses_are_short_at_first_and_never_longer_than_they_should_be() {
        let middle = |attempts| pause(attempts, 0.5).as_secs();
        let middle: Vec<_> = [1, 2, 3, 4, 5, 6, 7, 8, 60].map(middle).into();
        assert_eq!(middle, [1, 1, 1, 30, 60, 120, 240, 300, 300]);
        assert_eq!(pause(9, 0.0), MOST_PAUSE / 2);
        assert_eq!(pause(9, 1.0), MOST_PAUSE * 3 / 2);
    }
}
