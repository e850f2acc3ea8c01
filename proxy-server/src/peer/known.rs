//! What is known of the other servers: the members, the sessions with them, and what these have announced.
//!
//! The lock of the state is taken before that of a session's table, never the other way round, and nothing is awaited
//! under either.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use proto::transport::Session;
use proto::wire::Departure;
use proto::{AgentName, ServerName};
use tokio::sync::watch;
use tokio::time::Instant;

use super::table::{Believed, Table};
use super::{Accepted, PeerSession, members, table};
use crate::metrics::{PeerLabels, PeerMetrics};
use crate::registry::Rank;

/// How long names outlive the session that announced them.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// Names that a server had announced before its session was lost.
#[derive(Debug)]
struct Remembered {
    until: Instant,
    table: Table,
}

/// What an address of a member has come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It is dialled for the first time, or has not told everything yet.
    Awaited,
    /// There is a session with it, which has told everything.
    Up,
    /// There is no session with it; why.
    Failed(String),
    /// It leads to this very server.
    Ourselves,
    /// It leads to a server that another address leads to as well.
    Twin(ServerName),
}

#[derive(Debug)]
struct State<S> {
    /// Those that were dialled, oldest first.
    sessions: Vec<Arc<PeerSession<S>>>,
    /// Those that the others have dialled, oldest first.
    accepted: Vec<Arc<Accepted<S>>>,
    remembered: HashMap<ServerName, Remembered>,
    /// `None` while it is not known which there are.
    members: Option<BTreeMap<SocketAddr, Standing>>,
}

/// Whom could be asked for an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// Servers whose agents are known, this one included if it has any.
    pub servers: usize,
    /// Members that can't be asked.
    pub silent: usize,
}

/// The other servers. The default is that of a server that is alone.
#[derive(Debug)]
pub struct Peers<S> {
    state: Mutex<State<S>>,
    /// Whether there is a `peers` section at all.
    configured: bool,
    /// Whether this server has agents of its own.
    backend: bool,
    /// Counts announcements of sessions, over all servers.
    number: AtomicU64,
    /// Counts changes of which names are known.
    names: AtomicU64,
    settled: watch::Sender<bool>,
    /// Servers that agents may go to, this one included; 0 if that is not known.
    servers: watch::Sender<u32>,
    /// What is counted.
    pub metrics: PeerMetrics,
}

impl<S> Default for Peers<S> {
    fn default() -> Self {
        Self::with(false, true, PeerMetrics::default())
    }
}

impl<S> Peers<S> {
    fn with(configured: bool, backend: bool, metrics: PeerMetrics) -> Self {
        let state = State {
            sessions: Vec::new(),
            accepted: Vec::new(),
            remembered: HashMap::new(),
            members: None,
        };
        Self {
            state: Mutex::new(state),
            configured,
            backend,
            number: AtomicU64::new(0),
            names: AtomicU64::new(0),
            settled: watch::Sender::new(!configured),
            servers: watch::Sender::new(u32::from(configured && backend)),
            metrics,
        }
    }
}

impl<S: Session> Peers<S> {
    /// Of a server that has others beside it; `backend` says whether it has agents itself.
    pub fn configured(backend: bool, metrics: &daemon::Metrics) -> Self {
        let counted = PeerMetrics::default();
        metrics.register(|registry| counted.register(registry));
        Self::with(true, backend, counted)
    }

    /// Whether there are others at all.
    pub const fn is_configured(&self) -> bool {
        self.configured
    }

    /// How many servers agents may go to, as it changes.
    pub fn servers(&self) -> watch::Receiver<u32> {
        self.servers.subscribe()
    }

    /// Adds a session for as long as the guard lives.
    pub(crate) fn enter(self: &Arc<Self>, session: Arc<PeerSession<S>>) -> Entered<S> {
        self.state.lock().sessions.push(Arc::clone(&session));
        self.export();
        Entered {
            peers: Arc::clone(self),
            session,
        }
    }

    /// Adds a session that another server has dialled, for as long as the guard lives; says which older ones of that
    /// server there are.
    pub(crate) fn came_in(
        self: &Arc<Self>,
        session: Arc<Accepted<S>>,
    ) -> (CameIn<S>, Vec<Arc<Accepted<S>>>) {
        let mut state = self.state.lock();
        let older = state.accepted.iter();
        let older = older.filter(|old| old.server == session.server);
        let older = older.cloned().collect();
        state.accepted.push(Arc::clone(&session));
        drop(state);
        self.export();
        let peers = Arc::clone(self);
        (CameIn { peers, session }, older)
    }

    /// Every session that another server has dialled, oldest first.
    pub fn accepted(&self) -> Vec<Arc<Accepted<S>>> {
        self.state.lock().accepted.clone()
    }

    /// The sessions to servers that have announced one of that agent, with their rank and the number of the announcement.
    pub fn with_session_of(&self, agent: &AgentName) -> Vec<(Rank, u64, Arc<PeerSession<S>>)> {
        let announced = |session: &Arc<PeerSession<S>>| match session.table.lock().of(agent) {
            Some(Believed::Session(number)) => Some((number, Arc::clone(session))),
            Some(Believed::Known(_)) | None => None,
        };
        let found: Vec<_> = {
            let state = self.state.lock();
            state.sessions.iter().filter_map(announced).collect()
        };
        let ranked =
            |(number, session): (u64, Arc<PeerSession<S>>)| (session.rank(), number, session);
        found.into_iter().map(ranked).collect()
    }

    /// Whether any server knows that agent, or knew it a while ago.
    pub fn knows(&self, agent: &AgentName) -> bool {
        let state = self.state.lock();
        let now = Instant::now();
        let told = |session: &Arc<PeerSession<S>>| session.table.lock().of(agent).is_some();
        let remembered = |old: &Remembered| old.until > now && old.table.of(agent).is_some();
        state.sessions.iter().any(told) || state.remembered.values().any(remembered)
    }

    /// A number that differs from an earlier one if [`Peers::knows`] may differ.
    pub fn changes_of_names(&self) -> u64 {
        self.names.load(Ordering::Relaxed)
    }

    /// Where and how the agent's last session at another server ended.
    pub fn departure(&self, agent: &AgentName) -> Option<(ServerName, Departure)> {
        let state = self.state.lock();
        let departed = |server: &ServerName, table: &Table| match table.of(agent) {
            Some(Believed::Known(Some(departure))) => Some((server.clone(), departure)),
            Some(Believed::Known(None) | Believed::Session(_)) | None => None,
        };
        let told = state
            .sessions
            .iter()
            .filter_map(|session| departed(&session.server, &session.table.lock()));
        let remembered = state
            .remembered
            .iter()
            .filter_map(|(server, old)| departed(server, &old.table));
        told.chain(remembered)
            .max_by_key(|(_, departure)| departure.at_ms)
    }

    /// Every agent that is known to other servers, or was a while ago, and the servers that have a session of it.
    pub fn agents(&self) -> HashMap<AgentName, BTreeSet<ServerName>> {
        let mut all: HashMap<AgentName, BTreeSet<ServerName>> = HashMap::new();
        let now = Instant::now();
        let state = self.state.lock();
        let remembered = state.remembered.values().filter(|old| old.until > now);
        let names = remembered.flat_map(|old| old.table.names());
        all.extend(names.map(|(agent, _)| (agent.clone(), BTreeSet::new())));
        drop(state);
        for session in self.all() {
            for (agent, open) in session.table.lock().names() {
                let servers = all.entry(agent.clone()).or_default();
                if open {
                    servers.insert(session.server.clone());
                }
            }
        }
        all
    }

    /// Every session, oldest first.
    pub fn all(&self) -> Vec<Arc<PeerSession<S>>> {
        self.state.lock().sessions.clone()
    }

    /// Whom a request can be asked of.
    pub fn asked(&self) -> Asked {
        let state = self.state.lock();
        let complete = |session: &&Arc<PeerSession<S>>| session.table.lock().is_complete();
        let told = state.sessions.iter().filter(complete);
        let told: BTreeSet<_> = told.map(|session| &session.server).collect();
        let silent =
            |standing: &&Standing| matches!(standing, Standing::Awaited | Standing::Failed(_));
        let members = state.members.iter().flatten();
        Asked {
            servers: told.len() + usize::from(self.backend),
            silent: members.map(|(_, standing)| standing).filter(silent).count(),
        }
    }

    /// Whether a member has that address.
    pub(crate) fn has_member(&self, ip: IpAddr) -> bool {
        let state = self.state.lock();
        let mut members = state.members.iter().flatten();
        members.any(|(at, _)| at.ip().to_canonical() == ip)
    }

    /// The members' addresses and what each has come to.
    pub fn members(&self) -> BTreeMap<SocketAddr, Standing> {
        self.state.lock().members.clone().unwrap_or_default()
    }

    /// Waits until every member was heard of once since the start, or `most` is over.
    pub async fn settled(&self, most: Duration) {
        let mut settled = self.settled.subscribe();
        let wait = settled.wait_for(|settled| *settled);
        let _late_is_as_good_as_never = tokio::time::timeout(most, wait).await.is_err();
    }

    /// Nothing more is awaited, whatever has not been heard of.
    pub(crate) fn settle(&self) {
        self.settled.send_replace(true);
    }

    /// These are the members from now on.
    pub(crate) fn expect(&self, addresses: &BTreeSet<SocketAddr>) {
        let mut state = self.state.lock();
        let before = state.members.take().unwrap_or_default();
        let standing = |address: &SocketAddr| {
            let known = before.get(address).cloned();
            (*address, known.unwrap_or(Standing::Awaited))
        };
        state.members = Some(addresses.iter().map(standing).collect());
        self.stand(&state);
    }

    /// That member has come to that; nothing, if it is none any more.
    pub(crate) fn stands(&self, member: SocketAddr, standing: Standing) {
        let mut state = self.state.lock();
        let known = state
            .members
            .as_mut()
            .and_then(|members| members.get_mut(&member));
        if let Some(before) = known {
            *before = standing;
            self.stand(&state);
        }
    }

    fn stand(&self, state: &State<S>) {
        let all = || state.members.iter().flatten().map(|(_, standing)| standing);
        let others =
            all().filter(|standing| !matches!(standing, Standing::Ourselves | Standing::Twin(_)));
        let members = i64::try_from(others.count()).unwrap_or(i64::MAX);
        self.metrics.members.set(members);
        if !all().any(|standing| *standing == Standing::Awaited) {
            self.settle();
        }
    }

    /// Takes in what a server has announced in that session.
    ///
    /// # Errors
    /// [`table::Excess`].
    pub(crate) fn hear(
        &self,
        session: &PeerSession<S>,
        announcement: proto::wire::Announcement,
    ) -> Result<(), table::Excess> {
        self.metrics.heard.inc();
        let mut table = session.table.lock();
        let before = table.is_complete();
        let heard = table.hear(announcement, || self.number.fetch_add(1, Ordering::Relaxed));
        let complete = !before && table.is_complete();
        drop(table);
        if complete || heard.is_ok_and(|other_names| other_names) {
            self.names.fetch_add(1, Ordering::Relaxed);
        }
        if complete {
            // What it says now goes for what it said in an earlier session.
            self.state.lock().remembered.remove(&session.server);
            self.stands(session.address, Standing::Up);
            self.export();
        }
        heard.map(|_other_names| ())
    }

    /// Sets what follows from the sessions there are.
    pub(crate) fn export(&self) {
        let all = self.all();
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        for (side, count) in [("dialled", all.len()), ("accepted", self.accepted().len())] {
            let sessions = self.metrics.sessions.get_or_create(&PeerLabels { side });
            sessions.set(number(count));
        }
        let agents = all.iter().map(|session| session.table.lock().sessions());
        self.metrics.agents.set(number(agents.sum()));
        if !self.configured {
            return;
        }
        let others: BTreeSet<_> = all.iter().map(|session| &session.server).collect();
        let servers = u32::try_from(others.len()).unwrap_or(u32::MAX);
        let servers = servers.saturating_add(self.backend.into());
        self.servers.send_if_modified(|before| {
            let differs = *before != servers;
            *before = servers;
            differs
        });
    }
}

/// Keeps a session among those that are asked.
#[derive(Debug)]
pub(crate) struct Entered<S: Session> {
    peers: Arc<Peers<S>>,
    session: Arc<PeerSession<S>>,
}

impl<S: Session> Drop for Entered<S> {
    fn drop(&mut self) {
        let table = std::mem::take(&mut *self.session.table.lock());
        let server = &self.session.server;
        let mut state = self.peers.state.lock();
        state.sessions.retain(|s| !Arc::ptr_eq(s, &self.session));
        state.remembered.retain(|_, old| old.until > Instant::now());
        let again = state.sessions.iter().any(|s| s.server == *server);
        if !again && table.is_complete() && state.remembered.len() < members::MOST {
            let until = Instant::now() + REMEMBERED;
            let old = Remembered { until, table };
            state.remembered.insert(server.clone(), old);
        }
        drop(state);
        self.peers.export();
    }
}

/// Keeps a session among those that others have dialled.
#[derive(Debug)]
pub(crate) struct CameIn<S: Session> {
    peers: Arc<Peers<S>>,
    session: Arc<Accepted<S>>,
}

impl<S: Session> Drop for CameIn<S> {
    fn drop(&mut self) {
        let mut state = self.peers.state.lock();
        state.accepted.retain(|s| !Arc::ptr_eq(s, &self.session));
        drop(state);
        self.peers.export();
    }
}

#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;
