//! Which agent has which sessions, and which of them takes the next stream. No IO, nothing awaited.
//!
//! An agent that reconnects has a new session while the old one is not dead yet. Newer sessions are preferred, suspect
//! ones and those told to go are used only when there is nothing else, and old ones are kept until they end.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::SystemTime;

use certs::NodeUid;
use parking_lot::Mutex;
use proto::control::{ControlHandle, GoAway, Liveness};
use proto::transport::Session;
use proto::transport::keepalive::Verdict;
use proto::{AgentName, Reason, SessionId};

/// One live session and what is known of it.
#[derive(Debug)]
pub struct LiveSession<S> {
    /// Its id.
    pub id: SessionId,
    /// Whose.
    pub agent: AgentName,
    /// Which node of that name its certificate is for; `None` outside the cluster.
    pub node_uid: Option<NodeUid>,
    /// The transport.
    pub transport: S,
    /// Name of the transport.
    pub kind: &'static str,
    /// When the agent was last heard.
    pub liveness: Arc<Liveness>,
    /// For GoAways.
    pub control: ControlHandle,
    /// Since when.
    pub since: SystemTime,
    /// The agent's software.
    pub software: String,
    /// Told to go, or going by itself: takes streams only if there is no other.
    pub going: AtomicBool,
    /// A sign of life was asked for and is waited for.
    pub probed: AtomicBool,
    /// Open streams.
    pub streams: AtomicUsize,
}

impl<S: Session> LiveSession<S> {
    /// Whether nothing was heard of it for a while.
    pub fn is_suspect(&self) -> bool {
        self.liveness.verdict() != Verdict::Healthy
    }

    /// Tells the agent to go; from then on another session is preferred.
    pub fn go_away(&self, away: GoAway) {
        self.going.store(true, Ordering::Relaxed);
        self.control.go_away(away);
    }

    fn rank(&self) -> u8 {
        match (self.is_suspect(), self.going.load(Ordering::Relaxed)) {
            (false, false) => 3,
            (false, true) => 2,
            (true, false) => 1,
            (true, true) => 0,
        }
    }
}

/// How an agent's last session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost {
    /// When.
    pub at: SystemTime,
    /// Why.
    pub reason: Reason,
}

/// What is known of an agent without a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absent {
    /// It never had one since this server started.
    Never,
    /// It had.
    Since(Lost),
}

#[derive(Debug)]
struct Agent<S> {
    /// Oldest first.
    sessions: Vec<Arc<LiveSession<S>>>,
    lost: Option<Lost>,
}

/// Agents and their sessions. Clones are handles to the same one.
#[derive(Debug)]
pub struct Registry<S>(Arc<Mutex<HashMap<AgentName, Agent<S>>>>);

impl<S> Clone for Registry<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S> Default for Registry<S> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<S: Session> Registry<S> {
    /// Adds a session for as long as the guard lives.
    pub fn register(&self, session: Arc<LiveSession<S>>) -> Registration<S> {
        let mut agents = self.0.lock();
        let agent = agents
            .entry(session.agent.clone())
            .or_insert_with(|| Agent {
                sessions: Vec::new(),
                lost: None,
            });
        agent.sessions.push(Arc::clone(&session));
        drop(agents);
        Registration {
            registry: self.clone(),
            session,
            lost: None,
        }
    }

    /// The session for the next stream: healthy before suspect, staying before going, then the newest.
    ///
    /// # Errors
    /// [`Absent`] when the agent has none.
    pub fn pick(&self, agent: &AgentName) -> Result<Arc<LiveSession<S>>, Absent> {
        let agents = self.0.lock();
        let Some(agent) = agents.get(agent) else {
            return Err(Absent::Never);
        };
        // `max_by_key` returns the last of equals: the newest.
        let best = agent.sessions.iter().max_by_key(|session| session.rank());
        best.cloned()
            .ok_or_else(|| agent.lost.map_or(Absent::Never, Absent::Since))
    }

    /// Whether the agent has or had a session.
    pub fn knows(&self, agent: &AgentName) -> bool {
        self.0.lock().contains_key(agent)
    }

    /// How many agents have or had a session.
    pub fn agents(&self) -> usize {
        self.0.lock().len()
    }

    /// Agents that have or had a session, and whether they have one.
    pub fn names(&self) -> BTreeMap<AgentName, bool> {
        let agents = self.0.lock();
        let open =
            |(name, agent): (&AgentName, &Agent<S>)| (name.clone(), !agent.sessions.is_empty());
        agents.iter().map(open).collect()
    }

    /// Every session, by agent and age.
    pub fn all(&self) -> Vec<Arc<LiveSession<S>>> {
        let agents = self.0.lock();
        let mut all: Vec<_> = agents
            .values()
            .flat_map(|a| a.sessions.iter().cloned())
            .collect();
        drop(agents);
        all.sort_by(|a, b| (&a.agent, a.since).cmp(&(&b.agent, b.since)));
        all
    }

    /// That agent's sessions, oldest first.
    pub fn of(&self, agent: &AgentName) -> Vec<Arc<LiveSession<S>>> {
        self.0
            .lock()
            .get(agent)
            .map(|a| a.sessions.clone())
            .unwrap_or_default()
    }

    /// How many sessions there are.
    pub fn len(&self) -> usize {
        self.0
            .lock()
            .values()
            .map(|agent| agent.sessions.len())
            .sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Keeps a session in the registry.
#[derive(Debug)]
pub struct Registration<S: Session> {
    registry: Registry<S>,
    session: Arc<LiveSession<S>>,
    lost: Option<Lost>,
}

impl<S: Session> Registration<S> {
    /// Takes the session out and remembers why it ended.
    pub fn lost(mut self, lost: Lost) {
        self.lost = Some(lost);
    }
}

impl<S: Session> Drop for Registration<S> {
    fn drop(&mut self) {
        let mut agents = self.registry.0.lock();
        if let Some(agent) = agents.get_mut(&self.session.agent) {
            agent.sessions.retain(|s| s.id != self.session.id);
            agent.lost = self.lost.or(agent.lost);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proto::control::Control;
    use proto::transport::keepalive::Keepalive;
    use proto::transport::memory::{self, MemorySession};
    use proto::wire::{Limits, Offer};

    use super::*;

    async fn live(agent: &str) -> (Arc<LiveSession<MemorySession>>, MemorySession) {
        let (server, client) = memory::pair(1 << 16, 8);
        let offer = Offer {
            agent: agent.parse().unwrap(),
            software: String::new(),
            capabilities: vec![],
            limits: Limits {
                max_streams: 8,
                stream_window: 1 << 16,
            },
            instance: String::new(),
        };
        let dial = Control::dial(client.clone(), &offer);
        let accept = Control::accept(server.clone());
        // Only the server's handle is wanted, so nobody answers the hello.
        let (control, _hello) = tokio::select! {
            accepted = accept => accepted.unwrap(),
            _ = dial => unreachable!("the dial waits for an answer"),
        };
        let session = LiveSession {
            id: SessionId::random(),
            agent: agent.parse().unwrap(),
            node_uid: None,
            transport: server,
            kind: "memory",
            liveness: Liveness::new(Keepalive::default()),
            control: control.handle(),
            since: SystemTime::UNIX_EPOCH,
            software: String::new(),
            going: AtomicBool::new(false),
            probed: AtomicBool::new(false),
            streams: AtomicUsize::new(0),
        };
        (Arc::new(session), client)
    }

    #[tokio::test(start_paused = true)]
    async fn the_newest_healthy_session_is_picked_and_older_ones_are_kept() {
        let registry = Registry::default();
        let name = "edge1".parse().unwrap();
        assert_eq!(registry.pick(&name).unwrap_err(), Absent::Never);
        let (old, _a) = live("edge1").await;
        let old_guard = registry.register(Arc::clone(&old));
        tokio::time::advance(Duration::from_secs(31)).await;
        assert_eq!(
            registry.pick(&name).unwrap().id,
            old.id,
            "suspect, but the only one"
        );
        let (new, _b) = live("edge1").await;
        let new_guard = registry.register(Arc::clone(&new));
        assert_eq!(registry.pick(&name).unwrap().id, new.id);
        let (newest, _c) = live("edge1").await;
        let newest_guard = registry.register(Arc::clone(&newest));
        assert_eq!(registry.pick(&name).unwrap().id, newest.id);
        newest.going.store(true, Ordering::Relaxed);
        assert_eq!(
            registry.pick(&name).unwrap().id,
            new.id,
            "not the one that goes"
        );
        drop(new_guard);
        assert_eq!(
            registry.pick(&name).unwrap().id,
            newest.id,
            "going before suspect"
        );
        drop(newest_guard);
        let lost = Lost {
            at: SystemTime::UNIX_EPOCH,
            reason: Reason::SessionLost,
        };
        old_guard.lost(lost);
        assert_eq!(registry.pick(&name).unwrap_err(), Absent::Since(lost));
        assert!(registry.knows(&name) && registry.is_empty());
    }
}
