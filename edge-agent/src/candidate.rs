//! Which addresses to dial: what the configured servers resolve to now.
//!
//! Invariants: a name server that does not answer takes no address away, for servers don't vanish with it. No address is
//! there twice: one that is reached over a line goes over that line, whatever else resolves to it.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use arc_swap::ArcSwap;
use daemon::chain;
use futures_util::future::join_all;
use proto::LineName;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

use crate::config::Server;
use crate::resolve::Resolver;

/// For one name: glibc's default is 5 s an attempt.
const LOOKUP: Duration = Duration::from_secs(5);
/// Several supervisors that fail together ask once.
const COALESCE: Duration = Duration::from_millis(250);

/// One way to a server. Those over the internet come first: who asks one after the other, as for a certificate, is not to
/// wait for a line that is cut.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Candidate {
    /// The dedicated line that leads there.
    pub(crate) line: Option<LineName>,
    pub(crate) address: SocketAddr,
}

impl Candidate {
    /// The line's name, for the log.
    pub(crate) fn line(&self) -> Option<&str> {
        self.line.as_ref().map(LineName::as_str)
    }
}

/// The configured servers and where they are.
#[derive(Debug)]
pub(crate) struct Candidates {
    servers: ArcSwap<Vec<Server>>,
    resolver: Resolver,
    last: Mutex<Last>,
    wanted: watch::Sender<BTreeSet<Candidate>>,
}

/// The last answers, for names that can't be resolved at the moment.
#[derive(Debug, Default)]
struct Last {
    at: Option<Instant>,
    known: BTreeMap<String, Vec<SocketAddr>>,
}

impl Candidates {
    pub(crate) fn new(servers: Vec<Server>, resolver: Resolver) -> Self {
        Self {
            servers: ArcSwap::from_pointee(servers),
            resolver,
            last: Mutex::default(),
            wanted: watch::Sender::new(BTreeSet::new()),
        }
    }

    /// Takes other servers; they are resolved by the next [`Candidates::refresh`].
    pub(crate) async fn replace(&self, servers: Vec<Server>) {
        self.servers.store(servers.into());
        self.last.lock().await.at = None;
    }

    /// The addresses as they become known.
    pub(crate) fn watch(&self) -> watch::Receiver<BTreeSet<Candidate>> {
        self.wanted.subscribe()
    }

    /// Resolves all servers again and says where they are.
    pub(crate) async fn refresh(&self) -> BTreeSet<Candidate> {
        let mut last = self.last.lock().await;
        if last.at.is_some_and(|at| at.elapsed() < COALESCE) {
            return self.wanted.borrow().clone();
        }
        let servers = self.servers.load_full();
        let mut known = BTreeMap::new();
        let lookups = servers
            .iter()
            .map(|server| self.resolver.resolve(&server.address, LOOKUP));
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
        let wanted = servers.iter().flat_map(|server| {
            let addresses = known.get(&server.to_string()).into_iter().flatten();
            addresses.map(|address| (*address, server.line.clone()))
        });
        let wanted = one_each(wanted);
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

/// Each address once; over a line, if one leads there, and the first of several.
fn one_each(ways: impl Iterator<Item = (SocketAddr, Option<LineName>)>) -> BTreeSet<Candidate> {
    let mut by_address: BTreeMap<SocketAddr, Option<LineName>> = BTreeMap::new();
    for (address, line) in ways {
        match by_address.entry(address) {
            Entry::Vacant(vacant) => {
                vacant.insert(line);
            }
            Entry::Occupied(mut known) if known.get().is_none() => {
                known.insert(line);
            }
            Entry::Occupied(_) => {}
        }
    }
    by_address
        .into_iter()
        .map(|(address, line)| Candidate { line, address })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `[LINE=]HOST:PORT`.
    fn way(text: &str) -> (Option<LineName>, &str) {
        match text.split_once('=') {
            Some((line, address)) => (line.parse().ok(), address),
            None => (None, text),
        }
    }

    fn servers(texts: &[&str]) -> Vec<Server> {
        let server = |text: &&str| {
            let (line, address) = way(text);
            let address = address.parse().unwrap();
            Server { address, line }
        };
        texts.iter().map(server).collect()
    }

    fn addresses(texts: &[&str]) -> BTreeSet<Candidate> {
        let candidate = |text: &&str| {
            let (line, address) = way(text);
            let address = address.parse().unwrap();
            Candidate { line, address }
        };
        texts.iter().map(candidate).collect()
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
    async fn an_address_that_a_line_leads_to_is_reached_over_it_alone() {
        let listed = servers(&[
            "localhost:1",
            "vpn=127.0.0.1:1",
            "express=localhost:1",
            "[::1]:1",
        ]);
        let candidates = Candidates::new(listed, Resolver::new());
        let found = candidates.refresh().await;
        let over = |address: &str| {
            let address: SocketAddr = address.parse().unwrap();
            let mut all = found.iter().filter(|it| it.address == address);
            let line = all.next().map(|it| it.line().unwrap_or("none"));
            assert_eq!(all.next(), None, "{address} is there twice");
            line
        };
        assert_eq!(over("127.0.0.1:1"), Some("vpn"), "the first of two");
        // localhost may have one address or two.
        assert!(
            matches!(over("[::1]:1"), Some("none" | "express")),
            "{found:?}"
        );
    }

    #[test]
    fn of_several_ways_to_an_address_the_first_line_counts_in_any_order() {
        let address: SocketAddr = "10.0.0.1:1".parse().unwrap();
        for (lines, wanted) in [
            (&["", ""][..], None),
            (&["", "a"], Some("a")),
            (&["a", ""], Some("a")),
            (&["", "b", "a"], Some("b")),
        ] {
            let ways = lines.iter().map(|line| (address, line.parse().ok()));
            let found = one_each(ways);
            assert_eq!(found.len(), 1);
            assert_eq!(found.first().unwrap().line(), wanted, "{lines:?}");
        }
    }

    #[test]
    fn the_internet_comes_before_lines() {
        let all = addresses(&["express=10.0.0.1:1", "203.0.113.1:1", "express=10.0.0.2:1"]);
        let lines: Vec<_> = all.iter().map(Candidate::line).collect();
        assert_eq!(lines, [None, Some("express"), Some("express")]);
    }

    #[tokio::test]
    async fn a_name_that_is_unknown_takes_nothing_away() {
        let candidates = Candidates::new(
            servers(&["no-such-host.invalid:1", "127.0.0.1:2"]),
            Resolver::new(),
        );
        let before = vec!["10.0.0.1:1".parse().unwrap()];
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
