//! Which agent has which sessions, and which of them takes the next stream. No IO, nothing awaited.
//!
//! An agent that reconnects has a new session while the old one is not dead yet, and one over each dedicated line that it
//! has. Sessions over a line are preferred, then newer ones; suspect ones and those told to go are used only when there is
//! nothing else, and old ones are kept until they end.
//!
//! Other servers are told of what changes: [`Registry::tell`].

mod changes;
mod loss;
mod over;
mod rank;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use certs::NodeUid;
pub use changes::Place;
pub use loss::Loss;
pub use over::{Over, OverLine};
use parking_lot::Mutex;
use proto::control::{ControlHandle, GoAway, Liveness};
use proto::transport::Session;
use proto::transport::keepalive::Verdict;
use proto::wire::{AgentState, Departure, Draft};
use proto::{AgentName, LineName, Reason, SessionId};
pub use rank::{Doubt, Rank};
use tokio::sync::watch;
use tokio::time::Instant;

/// So many lines of an agent are remembered.
const MOST_LINES: usize = 4;

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
    /// The dedicated line that it goes over, by the agent's word.
    pub line: Option<OverLine>,
    /// Differs with each start of the agent.
    pub instance: String,
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
    /// Whether a request has found it silent.
    pub doubt: Doubt,
    /// Open streams.
    pub streams: AtomicUsize,
    /// What was lost of late.
    pub loss: Mutex<Loss>,
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

    /// Goes on counting what is lost, from now on of what is later.
    pub fn look(&self, now: Instant) {
        self.loss.lock().look(now, &self.transport.stats());
    }

    /// How good it is for the next stream.
    pub fn rank(&self) -> Rank {
        let doubted = self.doubt.is_there(|| self.transport.answered());
        let silent = self.is_suspect() || doubted;
        Rank::of(silent, self.going.load(Ordering::Relaxed))
    }

    /// How good it is, and over what: of those that are equal in both the newest is taken.
    pub fn worth(&self) -> (Rank, Over) {
        let rank = self.rank();
        let silent = rank <= Rank::Silent;
        let over = self.line.as_ref().map(|line| line.look(silent));
        (rank, over.unwrap_or(Over::Internet))
    }

    /// The name of the line that it goes over.
    pub fn line(&self) -> Option<&str> {
        self.line.as_ref().map(OverLine::name)
    }

    /// Whether an older session of the agent is dead if it is silent now that this one has come: what carries this one
    /// would carry its answer, unless it goes over something else. Of what an agent had before it started anew nothing is
    /// left, whatever it went over.
    pub fn tells_of(&self, older: &Self) -> bool {
        self.line() == older.line() || self.instance != older.instance
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

impl From<Lost> for Departure {
    fn from(lost: Lost) -> Self {
        let since = lost.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            // 0 would say that it never had a session.
            at_ms: i64::try_from(since.as_millis()).unwrap_or(i64::MAX).max(1),
            reason: lost.reason,
        }
    }
}

#[derive(Debug)]
struct Agent<S> {
    /// Oldest first.
    sessions: Vec<Arc<LiveSession<S>>>,
    lost: Option<Lost>,
    /// What is known of lines by sessions that have ended, the newest last; [`MOST_LINES`] at most.
    lines: VecDeque<OverLine>,
}

impl<S> Agent<S> {
    /// What is known of that line.
    fn line(&self, name: &str) -> Option<&OverLine> {
        let is_it = |line: &&OverLine| line.name() == name;
        let of_sessions = self.sessions.iter().rev();
        let mut running = of_sessions.filter_map(|session| session.line.as_ref());
        running
            .find(is_it)
            .or_else(|| self.lines.iter().find(is_it))
    }
}

#[derive(Debug)]
struct Agents<S> {
    /// Those that have or had a session.
    seen: HashMap<AgentName, Agent<S>>,
    /// Those that enrolled here.
    enrolled: HashSet<AgentName>,
    changes: changes::Changes,
}

impl<S> Agents<S> {
    /// Notes what has become of that agent, to be told to other servers.
    fn note(&mut self, agent: &AgentName) -> Place {
        let state = match self.seen.get(agent) {
            Some(seen) if !seen.sessions.is_empty() => AgentState::Session,
            Some(seen) => AgentState::Known(seen.lost.map(Departure::from)),
            None if self.enrolled.contains(agent) => AgentState::Known(None),
            None => AgentState::Forgotten,
        };
        self.changes.note(agent, state)
    }
}

#[derive(Debug)]
struct Inner<S> {
    agents: Mutex<Agents<S>>,
    /// The place of the last change.
    changed: watch::Sender<Place>,
}

/// Agents and their sessions. Clones are handles to the same one.
#[derive(Debug)]
pub struct Registry<S>(Arc<Inner<S>>);

impl<S> Clone for Registry<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S> Default for Registry<S> {
    fn default() -> Self {
        let agents = Agents {
            seen: HashMap::new(),
            enrolled: HashSet::new(),
            changes: changes::Changes::default(),
        };
        Self(Arc::new(Inner {
            agents: Mutex::new(agents),
            changed: watch::Sender::new(0),
        }))
    }
}

impl<S: Session> Registry<S> {
    /// Adds a session for as long as the guard lives.
    pub fn register(&self, session: Arc<LiveSession<S>>) -> Registration<S> {
        let mut agents = self.0.agents.lock();
        let agent = agents
            .seen
            .entry(session.agent.clone())
            .or_insert_with(|| Agent {
                sessions: Vec::new(),
                lost: None,
                lines: VecDeque::new(),
            });
        agent.sessions.push(Arc::clone(&session));
        // Told anew with each session: the last to be told is where an agent was last seen to come.
        let place = agents.note(&session.agent);
        drop(agents);
        self.changed(place);
        Registration {
            registry: self.clone(),
            session,
            lost: None,
        }
    }

    /// The line that a new session of that agent goes over: as well as the last one over it has found it to be.
    #[must_use]
    pub fn over_line(&self, agent: &AgentName, name: LineName, stable: Duration) -> OverLine {
        let agents = self.0.agents.lock();
        let known = agents.seen.get(agent);
        let before = known.and_then(|agent| agent.line(name.as_str()));
        OverLine::new(name, stable).after(before)
    }

    /// The session for the next stream: healthy before suspect, staying before going, a line
    /// before the internet, then the newest.
    ///
    /// # Errors
    /// [`Absent`] when the agent has none.
    pub fn pick(&self, agent: &AgentName) -> Result<Arc<LiveSession<S>>, Absent> {
        let agents = self.0.agents.lock();
        let Some(agent) = agents.seen.get(agent) else {
            return Err(Absent::Never);
        };
        // `max_by_key` returns the last of equals: the newest.
        let best = agent.sessions.iter().max_by_key(|session| session.worth());
        best.cloned()
            .ok_or_else(|| agent.lost.map_or(Absent::Never, Absent::Since))
    }

    /// Whether the agent has or had a session.
    pub fn knows(&self, agent: &AgentName) -> bool {
        self.0.agents.lock().seen.contains_key(agent)
    }

    /// How many agents have or had a session.
    pub fn agents(&self) -> usize {
        self.0.agents.lock().seen.len()
    }

    /// Agents that have or had a session, and whether they have one.
    pub fn names(&self) -> BTreeMap<AgentName, bool> {
        let agents = self.0.agents.lock();
        let open =
            |(name, agent): (&AgentName, &Agent<S>)| (name.clone(), !agent.sessions.is_empty());
        agents.seen.iter().map(open).collect()
    }

    /// Every session, by agent and age.
    pub fn all(&self) -> Vec<Arc<LiveSession<S>>> {
        let agents = self.0.agents.lock();
        let mut all: Vec<_> = agents
            .seen
            .values()
            .flat_map(|a| a.sessions.iter().cloned())
            .collect();
        drop(agents);
        all.sort_by(|a, b| (&a.agent, a.since).cmp(&(&b.agent, b.since)));
        all
    }

    /// That agent's sessions, oldest first.
    pub fn of(&self, agent: &AgentName) -> Vec<Arc<LiveSession<S>>> {
        let agents = self.0.agents.lock();
        agents
            .seen
            .get(agent)
            .map(|a| a.sessions.clone())
            .unwrap_or_default()
    }

    /// How many sessions there are.
    pub fn len(&self) -> usize {
        let agents = self.0.agents.lock();
        agents.seen.values().map(|agent| agent.sessions.len()).sum()
    }

    /// Takes in who has enrolled here.
    pub fn enrolled(&self, names: &HashSet<AgentName>) {
        let mut agents = self.0.agents.lock();
        let unseen = |agent: &&AgentName| !agents.seen.contains_key(*agent);
        let differ = agents.enrolled.symmetric_difference(names).filter(unseen);
        let differ: Vec<_> = differ.cloned().collect();
        agents.enrolled.clone_from(names);
        let place = differ.iter().map(|agent| agents.note(agent)).max();
        drop(agents);
        if let Some(place) = place {
            self.changed(place);
        }
    }

    /// For other servers: fills the draft with what has changed behind `told`, each agent with what it has now. Says how
    /// far that came, and whether it is all there is.
    pub fn tell(&self, told: Place, draft: &mut Draft) -> (Place, bool) {
        self.0.agents.lock().changes.tell(told, draft)
    }

    /// The place of the last change, as it changes.
    pub fn watch(&self) -> watch::Receiver<Place> {
        self.0.changed.subscribe()
    }

    fn changed(&self, place: Place) {
        // Two that change at once may come here in the other order.
        self.0.changed.send_if_modified(|last| {
            let newer = place > *last;
            *last = (*last).max(place);
            newer
        });
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
        let mut agents = self.registry.0.agents.lock();
        let Some(agent) = agents.seen.get_mut(&self.session.agent) else {
            return;
        };
        agent.sessions.retain(|s| s.id != self.session.id);
        if let Some(line) = &self.session.line {
            // Whether it was silent at its end, though nobody asked.
            self.session.worth();
            agent.lines.retain(|other| other.name() != line.name());
            agent.lines.push_back(line.copy());
            if agent.lines.len() > MOST_LINES {
                agent.lines.pop_front();
            }
        }
        agent.lost = self.lost.or(agent.lost);
        if !agent.sessions.is_empty() {
            return;
        }
        let place = agents.note(&self.session.agent);
        drop(agents);
        self.registry.changed(place);
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
