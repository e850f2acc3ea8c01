//! What a call has under way: dials by the requester's number, connections by ours. Taking an entry out is the right to
//! say its end, so that it is said once.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use parking_lot::Mutex;
use proto::Reason;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::connection::Connection;

/// The next connection's number, unique in the process: a requester that mixes calls up is told so, and logs are clear.
static NEXT: AtomicI64 = AtomicI64::new(1);

/// The dials and connections of one call.
#[derive(Debug, Default)]
pub(super) struct Table {
    entries: Mutex<Entries>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Entries {
    dials: HashMap<i64, CancellationToken>,
    connections: HashMap<i64, Arc<Connection>>,
}

impl Table {
    /// Notes a dial; `None` if one of that number is under way.
    pub(super) fn begin(&self, random: i64) -> Option<CancellationToken> {
        match self.entries.lock().dials.entry(random) {
            Entry::Occupied(_) => None,
            Entry::Vacant(vacant) => Some(vacant.insert(CancellationToken::new()).clone()),
        }
    }

    /// Makes a connection of a dial, unless it was given up.
    pub(super) fn connect(&self, random: i64) -> Option<Arc<Connection>> {
        let mut entries = self.entries.lock();
        entries.dials.remove(&random)?;
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let connection = Connection::new(id, random);
        entries.connections.insert(id, Arc::clone(&connection));
        Some(connection)
    }

    /// Takes a dial out, to cancel it or because it has failed.
    pub(super) fn end_dial(&self, random: i64) -> Option<CancellationToken> {
        let dial = self.entries.lock().dials.remove(&random);
        self.changed.notify_one();
        dial
    }

    pub(super) fn connection(&self, id: i64) -> Option<Arc<Connection>> {
        self.entries.lock().connections.get(&id).map(Arc::clone)
    }

    /// The connection that a dial has become.
    pub(super) fn dialled(&self, random: i64) -> Option<Arc<Connection>> {
        let entries = self.entries.lock();
        let mut all = entries.connections.values();
        all.find(|connection| connection.random == random)
            .map(Arc::clone)
    }

    /// Takes a connection out: its end is the taker's to say.
    pub(super) fn remove(&self, id: i64) -> Option<Arc<Connection>> {
        let connection = self.entries.lock().connections.remove(&id);
        self.changed.notify_one();
        connection
    }

    pub(super) fn len(&self) -> usize {
        let entries = self.entries.lock();
        entries.dials.len() + entries.connections.len()
    }

    /// Resolves when nothing is under way. One task at a time may ask.
    pub(super) async fn is_empty(&self) {
        while self.len() > 0 {
            self.changed.notified().await;
        }
    }

    /// Nobody is there to be told: cancels every dial and cuts every connection.
    pub(super) fn cut_all(&self, reason: Reason) {
        let Entries { dials, connections } = std::mem::take(&mut *self.entries.lock());
        dials.into_values().for_each(|dial| dial.cancel());
        connections
            .into_values()
            .for_each(|connection| connection.cut(reason));
    }
}
