//! How much at once, in one place. Everything here is a semaphore whose permit lives as long as what it counts.
//!
//! | limit | when it is full |
//! | --- | --- |
//! | streams | the request is refused with [`Reason::Overloaded`] |
//! | pending dials | the same; agents that hang can't fill the server |
//! | handshakes, at each door | above a quarter, unproved addresses are asked to come again (Retry); when full, they are turned away |
//! | new sessions a second, of one agent and of all | the agent is told when to come again |

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, Quota, RateLimiter};
use proto::{AgentName, Reason};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::Limits as Settings;

/// New sessions a minute of one agent, and at once. A healthy one needs two a day; one that restarts in a loop, or is
/// hostile, must not use up what all share.
const OF_ONE_AGENT: NonZeroU32 = NonZeroU32::new(30).unwrap();

/// Permits of a proxy-server.
#[derive(Debug)]
pub struct Limits {
    streams: Arc<Semaphore>,
    pending: Arc<Semaphore>,
    handshakes: [Arc<Semaphore>; 2],
    most_handshakes: usize,
    sessions: DefaultDirectRateLimiter,
    sessions_of_one: DefaultKeyedRateLimiter<AgentName>,
    clock: DefaultClock,
}

/// Where handshakes begin. Whoever crowds one door, which may be anybody, keeps nobody out at the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Agents.
    Agents,
    /// Other servers.
    Servers,
}

/// What to do with a peer that begins a handshake.
#[derive(Debug)]
pub enum Knock {
    /// Go on; holds the place.
    Enter(OwnedSemaphorePermit),
    /// Show first that you receive at your address.
    Retry,
    /// No room.
    Refuse,
}

impl Limits {
    /// Limits by these settings.
    #[must_use]
    pub fn new(settings: &Settings) -> Self {
        let rate = NonZeroU32::new(settings.sessions_per_second).unwrap_or(NonZeroU32::MIN);
        Self {
            streams: Arc::new(Semaphore::new(settings.streams)),
            pending: Arc::new(Semaphore::new(settings.pending_dials)),
            handshakes: [(); 2].map(|()| Arc::new(Semaphore::new(settings.handshakes))),
            most_handshakes: settings.handshakes,
            sessions: RateLimiter::direct(Quota::per_second(rate)),
            sessions_of_one: RateLimiter::keyed(Quota::per_minute(OF_ONE_AGENT)),
            clock: DefaultClock::default(),
        }
    }

    /// A place for a stream.
    ///
    /// # Errors
    /// [`Reason::Overloaded`].
    pub fn stream(&self) -> Result<OwnedSemaphorePermit, Reason> {
        Arc::clone(&self.streams)
            .try_acquire_owned()
            .map_err(|_full| Reason::Overloaded)
    }

    /// A place among the streams that are being opened.
    ///
    /// # Errors
    /// [`Reason::Overloaded`].
    pub fn pending_dial(&self) -> Result<OwnedSemaphorePermit, Reason> {
        Arc::clone(&self.pending)
            .try_acquire_owned()
            .map_err(|_full| Reason::Overloaded)
    }

    /// Whether a peer may begin its handshake; `validated` once it has shown that it receives at its address.
    #[must_use]
    pub fn knock(&self, side: Side, validated: bool) -> Knock {
        let [agents, servers] = &self.handshakes;
        let handshakes = match side {
            Side::Agents => agents,
            Side::Servers => servers,
        };
        let busy = self.most_handshakes - handshakes.available_permits();
        if !validated && busy > self.most_handshakes / 4 {
            return Knock::Retry;
        }
        Arc::clone(handshakes)
            .try_acquire_owned()
            .map_or(Knock::Refuse, Knock::Enter)
    }

    /// Whether a session of that agent may come about now, else when to come again.
    ///
    /// # Errors
    /// How long to stay away.
    pub fn admit(&self, agent: &AgentName) -> Result<(), Duration> {
        let now = self.clock.now();
        self.sessions_of_one
            .check_key(agent)
            .and_then(|()| self.sessions.check())
            .map_err(|until| until.wait_time_from(now))
    }

    /// Streams open now, of the limit given.
    #[must_use]
    pub fn free_streams(&self) -> usize {
        self.streams.available_permits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits::new(&Settings {
            streams: 1,
            pending_dials: 1,
            handshakes: 4,
            sessions_per_second: 1,
            ..Settings::default()
        })
    }

    #[test]
    fn a_place_is_given_back_when_its_holder_goes() {
        let limits = limits();
        let held = limits.stream().unwrap();
        assert_eq!(limits.stream().unwrap_err(), Reason::Overloaded);
        drop(held);
        assert!(limits.stream().is_ok());
    }

    #[test]
    fn above_the_mark_strangers_prove_their_address_and_when_full_nobody_enters() {
        let limits = limits();
        let held: Vec<_> = (0..4).map(|_| limits.knock(Side::Agents, true)).collect();
        assert!(held.iter().all(|k| matches!(k, Knock::Enter(_))));
        assert!(matches!(limits.knock(Side::Agents, false), Knock::Retry));
        assert!(matches!(limits.knock(Side::Agents, true), Knock::Refuse));
        drop(held);
        assert!(matches!(limits.knock(Side::Agents, false), Knock::Enter(_)));
    }

    #[test]
    fn agents_over_the_rate_are_told_when_to_come_again() {
        let limits = limits();
        let agent = |name: &str| name.parse().unwrap();
        limits.admit(&agent("edge1")).unwrap();
        assert!(limits.admit(&agent("edge2")).unwrap_err() > Duration::ZERO);
    }

    #[test]
    fn an_agent_that_comes_too_often_leaves_room_for_the_others() {
        let limits = Limits::new(&Settings {
            sessions_per_second: 1000,
            ..Settings::default()
        });
        let agent = |name: &str| name.parse().unwrap();
        for _ in 0..OF_ONE_AGENT.get() {
            limits.admit(&agent("edge1")).unwrap();
        }
        assert!(limits.admit(&agent("edge1")).unwrap_err() > Duration::ZERO);
        limits.admit(&agent("edge2")).unwrap();
    }
}
