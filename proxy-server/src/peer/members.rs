//! Where the other servers are: names that are resolved again and again, or what Kubernetes says.
//!
//! Invariant: a name server that does not answer, or a kube-apiserver that is away, takes no member away.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use proto::{Destination, Host};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

/// Members at the most: each costs a session and a table of names. More are not dialled, and that is said.
pub(crate) const MOST: usize = 32;
/// How often names are resolved: a server that was added is found within this time.
const EVERY: Duration = Duration::from_secs(10);
/// How often while none of them has an address yet.
const AT_FIRST: Duration = Duration::from_secs(1);
/// For one name: glibc's default is 5 s an attempt. A lookup that takes longer ends by itself, on a thread of its own.
const LOOKUP: Duration = Duration::from_secs(5);

/// Addresses of the other servers, this one perhaps among them.
#[derive(Debug)]
pub(crate) struct Members {
    source: Source,
    last: Option<BTreeSet<SocketAddr>>,
}

#[derive(Debug)]
enum Source {
    Named {
        /// As configured, and as changed by a reload.
        servers: watch::Receiver<Vec<Destination>>,
        /// The last answers, for names that can't be resolved at the moment.
        known: BTreeMap<String, BTreeSet<SocketAddr>>,
    },
    /// `None` until kube-apiserver has answered.
    Service(watch::Receiver<Option<BTreeSet<SocketAddr>>>),
}

impl Members {
    /// What these names resolve to, all addresses of each.
    pub(crate) const fn named(servers: watch::Receiver<Vec<Destination>>) -> Self {
        Self {
            source: Source::Named {
                servers,
                known: BTreeMap::new(),
            },
            last: None,
        }
    }

    /// What is sent there.
    pub(crate) const fn of_service(
        addresses: watch::Receiver<Option<BTreeSet<SocketAddr>>>,
    ) -> Self {
        Self {
            source: Source::Service(addresses),
            last: None,
        }
    }

    /// The addresses, once they are known, and then whenever they have changed.
    pub(crate) async fn next(&mut self) -> BTreeSet<SocketAddr> {
        loop {
            let found = match &mut self.source {
                Source::Named { servers, known } => {
                    if let Some(last) = &self.last {
                        let pause = if last.is_empty() { AT_FIRST } else { EVERY };
                        tokio::select! {
                            () = sleep(pause) => {}
                            Ok(()) = servers.changed() => {}
                        }
                    }
                    let now = servers.borrow_and_update().clone();
                    resolve(&now, known).await
                }
                Source::Service(addresses) => {
                    let now = addresses.borrow_and_update().clone();
                    match now {
                        Some(now) if self.last.as_ref() != Some(&now) => now,
                        Some(_) | None => {
                            if addresses.changed().await.is_err() {
                                // The watch ends with the server.
                                std::future::pending::<()>().await;
                            }
                            continue;
                        }
                    }
                }
            };
            let found = at_most(found);
            let first = self.last.is_none() && found.is_empty() && self.is_named();
            if self.last.as_ref() == Some(&found) || first {
                // Nothing resolved yet is no answer.
                self.last = Some(found);
                continue;
            }
            self.last = Some(found.clone());
            return found;
        }
    }

    const fn is_named(&self) -> bool {
        matches!(self.source, Source::Named { .. })
    }
}

fn at_most(mut found: BTreeSet<SocketAddr>) -> BTreeSet<SocketAddr> {
    if found.len() > MOST {
        tracing::error!(
            found = found.len(),
            most = MOST,
            "more proxy-servers than are dialled; those with the highest addresses are left out"
        );
        found = found.into_iter().take(MOST).collect();
    }
    found
}

async fn resolve(
    servers: &[Destination],
    known: &mut BTreeMap<String, BTreeSet<SocketAddr>>,
) -> BTreeSet<SocketAddr> {
    let names: BTreeSet<_> = servers.iter().map(ToString::to_string).collect();
    known.retain(|name, _| names.contains(name));
    for server in servers {
        match lookup(server).await {
            Ok(addresses) => {
                known.insert(server.to_string(), addresses);
            }
            Err(error) => {
                let stay = known.get(&server.to_string()).map_or(0, BTreeSet::len);
                tracing::warn!(%server, error, stay, "a proxy-server's name can't be resolved");
            }
        }
    }
    known.values().flatten().copied().collect()
}

async fn lookup(server: &Destination) -> Result<BTreeSet<SocketAddr>, String> {
    let name = match &server.host {
        Host::Ip(ip) => return Ok([SocketAddr::new(*ip, server.port)].into()),
        Host::Name(name) => name,
    };
    let found = tokio::net::lookup_host((name.as_str(), server.port));
    let found = timeout(LOOKUP, found)
        .await
        .map_err(|_elapsed| format!("no answer within {LOOKUP:?}"))?;
    Ok(found
        .map_err(|error| error.to_string())?
        .map(canonical)
        .collect())
}

/// Without the disguises of IPv4; a scope stays, as link-local addresses need it.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => SocketAddr::new(ip.into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> BTreeSet<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn names_and_addresses_are_members_with_all_their_addresses_once() {
        let servers = ["127.0.0.1:1", "[::ffff:127.0.0.1]:1", "localhost:2"];
        let servers = servers.map(|text| text.parse().unwrap());
        let (reload, names) = watch::channel(servers.to_vec());
        let mut members = Members::named(names);
        let found = members.next().await;
        assert!(found.contains(&"127.0.0.1:1".parse().unwrap()));
        assert!(found.iter().any(|address| address.port() == 2));
        // Nothing changes, so nothing more is said.
        let again = timeout(EVERY * 3, members.next()).await;
        again.unwrap_err();
        reload.send_replace(vec!["127.0.0.1:3".parse().unwrap()]);
        assert_eq!(members.next().await, addresses(&["127.0.0.1:3"]));
    }

    #[tokio::test]
    async fn a_name_that_is_unknown_takes_nothing_away() {
        let servers = ["no-such-host.invalid:1", "127.0.0.1:2"].map(|text| text.parse().unwrap());
        let before = addresses(&["10.0.0.1:1"]);
        let mut known = BTreeMap::from([("no-such-host.invalid:1".to_owned(), before)]);
        let found = resolve(&servers, &mut known).await;
        assert_eq!(found, addresses(&["10.0.0.1:1", "127.0.0.1:2"]));
    }

    #[tokio::test]
    async fn what_kubernetes_says_is_passed_on_once_it_is_known_and_when_it_changes() {
        let (say, heard) = watch::channel(None);
        let mut members = Members::of_service(heard);
        let waits = timeout(Duration::from_millis(20), members.next()).await;
        waits.unwrap_err();
        for said in [
            &["10.0.0.1:8446", "10.0.0.2:8446"][..],
            &["10.0.0.2:8446"],
            &[],
        ] {
            say.send_replace(Some(addresses(said)));
            assert_eq!(members.next().await, addresses(said));
        }
    }

    #[tokio::test]
    async fn thousands_of_addresses_are_cut_to_the_limit() {
        let many = (0..5000_u32).map(|i| SocketAddr::new(IpAddr::V4(i.into()), 1));
        let (_say, heard) = watch::channel(Some(many.collect()));
        let mut members = Members::of_service(heard);
        assert_eq!(members.next().await.len(), MOST);
    }
}
