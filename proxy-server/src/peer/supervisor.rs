//! Keeps a session with the server at one address.
//!
//! | state | until |
//! | --- | --- |
//! | *connecting* | a session is up; after each failure a pause (full jitter) |
//! | *holding* | it ends, its server says GoAway, or it is suspect: then *connecting*, while the old one goes on in its own task |
//! | *parked* | for 5 min, as the address leads to ourselves, or to a server that another address leads to as well |
//!
//! A supervisor ends when its address is none of a member any more; its session then runs out.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use proto::{Reason, ServerName};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::Standing;
use super::dial::{DialError, Dialler, Held, Phase};

/// Pauses after failures: random below a ceiling that doubles.
const LEAST_PAUSE: Duration = Duration::from_millis(200);
const MOST_PAUSE: Duration = Duration::from_secs(10);
/// The shortest pause after a refusal that trying again does not mend; up to three times as long.
const HOPELESS: Duration = Duration::from_secs(20);
/// How long an address is left alone that leads to ourselves, or to a server that has a session already.
const PARKED: Duration = Duration::from_secs(300);
/// How often a session that is held is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Keeps a session with the server at one address.
pub(super) struct Supervisor {
    dialler: Arc<Dialler>,
    address: SocketAddr,
    /// Cancelled when the address is none of a member any more.
    unwanted: CancellationToken,
    /// In a row.
    failures: u32,
    /// The server that another address leads to as well.
    twin_of: Option<ServerName>,
}

impl Supervisor {
    pub(super) fn new(
        dialler: &Arc<Dialler>,
        address: SocketAddr,
        unwanted: &CancellationToken,
    ) -> Self {
        Self {
            dialler: Arc::clone(dialler),
            address,
            unwanted: unwanted.clone(),
            failures: 0,
            twin_of: None,
        }
    }

    /// Until the address is not wanted any more.
    pub(super) async fn run(mut self) {
        let unwanted = self.unwanted.clone();
        tokio::select! {
            () = unwanted.cancelled() => {}
            never = self.keep() => match never {},
        }
    }

    /// For ever.
    #[expect(clippy::infinite_loop, reason = "ended by being dropped")]
    async fn keep(&mut self) -> Infallible {
        let mut held: Option<Held> = None;
        let peers = Arc::clone(&self.dialler.peers);
        loop {
            let opened = self.dialler.open(self.address, self.twin_of.as_ref()).await;
            match opened {
                Ok(new) => {
                    self.twin_of = None;
                    // Make before break: the old one serves until the new one knows as much.
                    let old = held.replace(new);
                    let Some(new) = held.as_mut() else { continue };
                    let after = self.hold(new, old).await;
                    sleep(after).await;
                }
                Err(error @ DialError::Ourselves(_)) => {
                    tracing::debug!(error = %daemon::chain(&error), "parked");
                    peers.stands(self.address, Standing::Ourselves);
                    sleep(PARKED).await;
                }
                Err(DialError::Twin(_, server)) => {
                    tracing::debug!(address = %self.address, %server, "parked");
                    peers.stands(self.address, Standing::Twin(server.clone()));
                    self.while_there(&server).await;
                    self.twin_of = Some(server);
                }
                Err(error) => {
                    let reason = error.reason();
                    let asked = error.retry_after().min(MOST_PAUSE);
                    let pause = pause(self.failures, reason, rand::random()).max(asked);
                    self.fail(&error, pause);
                    sleep(pause).await;
                }
            }
        }
    }

    fn fail(&mut self, error: &DialError, pause: Duration) {
        let reason = error.reason();
        let peers = &self.dialler.peers;
        peers.metrics.refused.get_or_create(&reason.into()).inc();
        let why = daemon::chain(error).to_string();
        // Once loud, then quiet: a server that is away for hours must not fill a disk.
        if self.failures == 0 {
            tracing::warn!(address = %self.address, reason = reason.label(), error = why, "no session with a peer");
        } else {
            let pause_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
            tracing::debug!(address = %self.address, reason = reason.label(), error = why, pause_ms, "no session with a peer");
        }
        peers.stands(self.address, Standing::Failed(why));
        self.failures = self.failures.saturating_add(1);
    }

    /// Until that server has no session, or it is time to look again.
    async fn while_there(&self, server: &ServerName) {
        let there = async {
            loop {
                sleep(LOOK).await;
                let all = self.dialler.peers.all();
                if !all.iter().any(|session| session.server == *server) {
                    return;
                }
            }
        };
        timeout(PARKED, there).await.ok(); // looked at again all the same
    }

    /// *Holding*. Says after which pause to connect again.
    async fn hold(&mut self, held: &mut Held, mut old: Option<Held>) -> Duration {
        loop {
            if old.is_some() && held.session.table.lock().is_complete() {
                old = None;
            }
            let phase = tokio::select! {
                Ok(()) = held.phase.changed() => held.phase.borrow_and_update().clone(),
                () = sleep(LOOK) => {
                    if held.session.is_suspect() {
                        tracing::info!(server = %held.session.server, "a peer is silent, it is dialled anew");
                        self.dialler.peers.stands(self.address, Standing::Failed("it is silent".to_owned()));
                        return Duration::ZERO;
                    }
                    self.failures = 0;
                    continue;
                }
            };
            let why = match phase {
                Phase::Up => continue,
                Phase::Told(after) => {
                    self.dialler
                        .peers
                        .stands(self.address, Standing::Failed("it goes away".to_owned()));
                    return after.clamp(LEAST_PAUSE, MOST_PAUSE);
                }
                Phase::Ended(reason) => reason,
            };
            let pause = pause(self.failures, why, rand::random());
            self.failures = self.failures.saturating_add(1);
            let sentence = why.sentence().to_owned();
            self.dialler
                .peers
                .stands(self.address, Standing::Failed(sentence));
            return pause;
        }
    }
}

const fn is_hopeless(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::IdentityMismatch
            | Reason::Overloaded
            | Reason::Protocol
            | Reason::Tls
            | Reason::Version
    )
}

/// The pause after so many failures in a row.
fn pause(failures: u32, reason: Reason, random: f64) -> Duration {
    if is_hopeless(reason) {
        return HOPELESS.mul_f64(2.0f64.mul_add(random, 1.0));
    }
    let ceiling = LEAST_PAUSE
        .saturating_mul(1 << failures.min(10))
        .min(MOST_PAUSE);
    LEAST_PAUSE + ceiling.saturating_sub(LEAST_PAUSE).mul_f64(random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_longest_and_hopeless_ones_are_long_at_once() {
        let longest = |failures| pause(failures, Reason::Timeout, 1.0).as_millis();
        let longest: Vec<_> = [0, 1, 2, 5, 6, 60].map(longest).into();
        assert_eq!(longest, [200, 400, 800, 6400, 10_000, 10_000]);
        assert_eq!(pause(60, Reason::Timeout, 0.0), LEAST_PAUSE);
        assert_eq!(pause(0, Reason::Tls, 0.0), HOPELESS);
        assert_eq!(pause(9, Reason::Overloaded, 1.0), HOPELESS * 3);
    }
}
