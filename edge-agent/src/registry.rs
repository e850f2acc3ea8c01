//! The sessions that are up, and which of them serves each server.
//!
//! Invariant: of one server's sessions over one line, or over none, the newest is kept and the others are let go, as the
//! server itself prefers the newest; so of those to one address, whatever line that is said to be reached over by now.
//! No IO, no await while the lock is held.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::seeker::Standing;
use crate::session::Live;

/// The sessions of this process.
#[derive(Debug)]
pub(crate) struct Registry {
    sessions: Mutex<Sessions>,
    /// How many there are; changes with each that comes or goes.
    changed: watch::Sender<usize>,
}

#[derive(Debug, Default)]
struct Sessions {
    next: u64,
    up: BTreeMap<u64, Arc<Live>>,
}

/// A session's place; dropping it takes the session out.
#[derive(Debug)]
pub(crate) struct Entered {
    registry: Arc<Registry>,
    key: u64,
}

impl Registry {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            sessions: Mutex::default(),
            changed: watch::Sender::new(0),
        })
    }

    /// Adds a session; older ones that it takes the place of are let go.
    pub(crate) fn enter(self: &Arc<Self>, live: Arc<Live>) -> Entered {
        let mut sessions = self.sessions.lock();
        let older: Vec<_> = sessions
            .up
            .values()
            .filter(|old| old.way() == live.way() || old.far_end() == live.far_end())
            .cloned()
            .collect();
        let key = sessions.next;
        sessions.next += 1;
        sessions.up.insert(key, live);
        let count = sessions.up.len();
        drop(sessions);
        for old in older {
            old.supersede();
        }
        self.changed.send_replace(count);
        Entered {
            registry: Arc::clone(self),
            key,
        }
    }

    /// All sessions, oldest first.
    pub(crate) fn all(&self) -> Vec<Arc<Live>> {
        self.sessions.lock().up.values().cloned().collect()
    }

    /// What of all sessions bears on whether another server is sought.
    pub(crate) fn standings(&self) -> Vec<Standing> {
        self.all().iter().map(|live| live.standing()).collect()
    }

    /// Something else of a session has changed than that it is there.
    pub(crate) fn touch(&self) {
        self.changed.send_modify(|_count| {});
    }

    /// How many sessions are up; seen as changed also when one of them has.
    pub(crate) fn watch(&self) -> watch::Receiver<usize> {
        self.changed.subscribe()
    }

    /// Waits until there is no session with the server of that one over the same line.
    pub(crate) async fn vacant(&self, of: &Live) {
        let mut changed = self.changed.subscribe();
        let taken = || {
            self.sessions
                .lock()
                .up
                .values()
                .any(|live| live.way() == of.way())
        };
        while taken() {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut sessions = self.registry.sessions.lock();
        sessions.up.remove(&self.key);
        let count = sessions.up.len();
        drop(sessions);
        self.registry.changed.send_replace(count);
    }
}
