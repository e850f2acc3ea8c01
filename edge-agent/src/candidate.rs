//! Which addresses to dial: what the configured servers resolve to now.
//!
//! Invariant: a name server that does not answer takes no address away, for servers don't vanish with it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use arc_swap::ArcSwap;
use daemon::chain;
use futures_util::future::join_all;
use proto::Destination;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

use crate::resolve::Resolver;

/// For one name: glibc's default is 5 s an attempt.
const LOOKUP: Duration = Duration::from_secs(5);
/// Several supervisors that fail together ask once.
const COALESCE: Duration = Duration::from_millis(250);

/// The configured servers and where they are.
#[derive(Debug)]
pub(crate) struct Candidates {
    servers: ArcSwap<Vec<Destination>>,
    resolver: Resolver,
    last: Mutex<Last>,
    wanted: watch::Sender<BTreeSet<SocketAddr>>,
}

/// The last answers, for names that can't be resolved at the moment.
#[derive(Debug, Default)]
struct Last {
    at: Option<Instant>,
    known: BTreeMap<String, Vec<SocketAddr>>,
}

impl Candidates {
    pub(crate) fn new(servers: Vec<Destination>, resolver: Resolver) -> Self {
        Self {
            servers: ArcSwap::from_pointee(servers),
            resolver,
            last: Mutex::default(),
            wanted: watch::Sender::new(BTreeSet::new()),
        }
    }

    /// Takes other servers; they are resolved by the next [`Candidates::refresh`].
    pub(crate) async fn replace(&self, servers: Vec<Destination>) {
        self.servers.store(servers.into());
        self.last.lock().await.at = None;
    }

    /// The addresses as they become known.
    pub(crate) fn watch(&self) -> watch::Receiver<BTreeSet<SocketAddr>> {
        self.wanted.subscribe()
    }

    /// Resolves all servers again and says where they are.
    pub(crate) async fn refresh(&self) -> BTreeSet<SocketAddr> {
        let mut last = self.last.lock().await;
        if last.at.is_some_and(|at| at.elapsed() < COALESCE) {
            return self.wanted.borrow().clone();
        }
        let servers = self.servers.load_full();
        let mut known = BTreeMap::new();
        let lookups = servers
            .iter()
            .map(|server| self.resolver.resolve(server, LOOKUP));
        for (server, found) in servers.iter().zip(join_all(lookups).await) {
            let key = server.to_string();
            match found {
                Ok(addresses) => {
                    known.insert(key, addresses);
                }
                Err(error) => {
                    tracing::warn!(server = key, error = %chain(&error), "server can't be resolved");
                    if let Some(old) = last.known.get(&key) {
                        known.insert(key, old.clone());
                    }
                }
            }
        }
        let wanted: BTreeSet<SocketAddr> = known.values().flatten().copied().collect();
        last.known = known;
        last.at = Some(Instant::now());
        self.wanted.send_if_modified(|old| {
            let differs = *old != wanted;
            old.clone_from(&wanted);
            differs
        });
        wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn servers(texts: &[&str]) -> Vec<Destination> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn addresses(texts: &[&str]) -> BTreeSet<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[tokio::test]
    async fn two_names_of_one_address_are_one_candidate() {
        let listed = servers(&["127.0.0.1:8443", "[::ffff:127.0.0.1]:8443", "[::1]:8443"]);
        let candidates = Candidates::new(listed, Resolver::new());
        assert_eq!(
            candidates.refresh().await,
            addresses(&["127.0.0.1:8443", "[::1]:8443"])
        );
        candidates.replace(servers(&["127.0.0.2:1"])).await;
        let mut watch = candidates.watch();
        assert_eq!(candidates.refresh().await, addresses(&["127.0.0.2:1"]));
        assert!(watch.has_changed().unwrap());
        assert_eq!(*watch.borrow_and_update(), addresses(&["127.0.0.2:1"]));
    }

    #[tokio::test]
    async fn a_name_that_is_unknown_takes_nothing_away() {
        let candidates = Candidates::new(
            servers(&["no-such-host.invalid:1", "127.0.0.1:2"]),
            Resolver::new(),
        );
        let before = addresses(&["10.0.0.1:1"]).into_iter().collect();
        candidates
            .last
            .lock()
            .await
            .known
            .insert("no-such-host.invalid:1".into(), before);
        assert_eq!(
            candidates.refresh().await,
            addresses(&["10.0.0.1:1", "127.0.0.1:2"])
        );
    }
}
