//! Names to addresses by the system's resolver, with a bound of time and of threads.
//!
//! getaddrinfo(3) can't be interrupted: a lookup that takes too long is left to end by itself, and while as many as
//! there are places do so, others wait.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use proto::{Destination, Host, Reason};
use tokio::sync::Semaphore;

/// Threads that wait for a name server at once.
pub(crate) const LOOKUPS: usize = 8;
/// Addresses of one name that are looked at.
const MOST_ADDRESSES: usize = 16;

/// A name without addresses.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResolveError {
    /// The resolver said no.
    #[error("resolve {name}")]
    Failed {
        name: String,
        #[source]
        source: io::Error,
    },
    /// The resolver knows the name, but no address of it.
    #[error("{name} has no address")]
    Empty { name: String },
    /// No answer in time.
    #[error("no answer for {name} within {limit:?}")]
    Timeout { name: String, limit: Duration },
}

impl ResolveError {
    pub(crate) const fn reason(&self) -> Reason {
        match self {
            Self::Failed { .. } | Self::Empty { .. } | Self::Timeout { .. } => Reason::Resolve,
        }
    }
}

/// The system's resolver. Clones share its places.
#[derive(Debug, Clone)]
pub(crate) struct Resolver {
    places: Arc<Semaphore>,
}

impl Resolver {
    pub(crate) fn new() -> Self {
        Self {
            places: Arc::new(Semaphore::new(LOOKUPS)),
        }
    }

    /// The addresses of the destination, in the resolver's order (RFC 6724), without duplicates.
    pub(crate) async fn resolve(
        &self,
        destination: &Destination,
        limit: Duration,
    ) -> Result<Vec<SocketAddr>, ResolveError> {
        let name = match &destination.host {
            Host::Ip(ip) => return Ok(vec![SocketAddr::new(*ip, destination.port)]),
            Host::Name(name) => name.clone(),
        };
        let lookup = self.lookup(name.clone(), destination.port);
        let found = tokio::time::timeout(limit, lookup)
            .await
            .map_err(|_elapsed| ResolveError::Timeout {
                name: name.clone(),
                limit,
            })?
            .map_err(|source| ResolveError::Failed {
                name: name.clone(),
                source,
            })?;
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for address in found {
            let address = canonical(address);
            if addresses.len() < MOST_ADDRESSES && !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if addresses.is_empty() {
            Err(ResolveError::Empty { name })
        } else {
            Ok(addresses)
        }
    }

    async fn lookup(&self, name: String, port: u16) -> io::Result<Vec<SocketAddr>> {
        let place = Arc::clone(&self.places)
            .acquire_owned()
            .await
            .map_err(io::Error::other)?;
        let found = tokio::task::spawn_blocking(move || {
            let _place = place; // held for as long as the thread is
            (name.as_str(), port)
                .to_socket_addrs()
                .map(Iterator::collect)
        });
        found.await.map_err(io::Error::other)?
    }
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

    const LIMIT: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn addresses_need_no_resolver_and_names_do() {
        let resolver = Resolver::new();
        let at = async |text: &str| resolver.resolve(&text.parse().unwrap(), LIMIT).await;
        assert_eq!(
            at("10.0.0.1:80").await.unwrap(),
            ["10.0.0.1:80".parse().unwrap()]
        );
        assert!(
            at("localhost:80")
                .await
                .unwrap()
                .iter()
                .all(|a| a.ip().is_loopback())
        );
        let unknown = at("no-such-host.invalid:80").await.unwrap_err();
        assert_eq!(unknown.reason(), Reason::Resolve);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lookup_that_finds_no_place_ends_in_time() {
        let resolver = Resolver::new();
        let places = u32::try_from(LOOKUPS).unwrap();
        let _taken = resolver.places.acquire_many(places).await.unwrap();
        let ended = resolver
            .resolve(&"localhost:80".parse().unwrap(), LIMIT)
            .await;
        assert!(
            matches!(ended, Err(ResolveError::Timeout { .. })),
            "{ended:?}"
        );
    }
}
