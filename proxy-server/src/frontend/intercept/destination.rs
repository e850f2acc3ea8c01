//! Where an intercepted connection goes. Pure: a decision over what was read and what the routes say.
//!
//! | name in the first flight | original destination | goes to |
//! | --- | --- | --- |
//! | a node's | any | that node |
//! | none, or not a node's | an address at the edge | that address |
//! | none, or not a node's | an address that two nodes share | nowhere: ambiguous |
//! | none, or not a node's | none, or not at the edge (a ClusterIP) | nowhere: unknown |
//!
//! The port is that of the `Host`, else that of an original destination at the edge, else the listener's.

use std::net::SocketAddr;

use proto::{Destination, Host};

use super::flight::Named;
use crate::error::Refusal;

/// Whether a destination is at the edge; an error if two nodes share it.
pub(super) type AtEdge<'a> = &'a (dyn Fn(&Destination) -> Result<bool, Refusal> + Sync);

/// What a connection says about where it wants to go.
#[derive(Debug, Clone, Default)]
pub(super) struct Clues {
    /// Server name or `Host`.
    pub(super) named: Option<Named>,
    /// The address that was dialled, if it is known and not ours.
    pub(super) original: Option<SocketAddr>,
}

impl Clues {
    fn address(&self) -> Option<Destination> {
        self.original.map(|original| Destination {
            host: Host::Ip(original.ip().to_canonical()),
            port: original.port(),
        })
    }

    /// Whether the original destination alone leads somewhere.
    pub(super) fn need_no_name(&self, at_edge: AtEdge<'_>) -> bool {
        self.address()
            .is_some_and(|address| at_edge(&address) == Ok(true))
    }

    /// The destination, if there is one; `port` is the listener's.
    ///
    /// # Errors
    /// An original destination that two nodes share, and no name that tells them apart.
    pub(super) fn destination(
        &self,
        port: u16,
        at_edge: AtEdge<'_>,
    ) -> Result<Option<Destination>, Refusal> {
        let address = self.address();
        let address_at_edge = address.as_ref().map(|address| (address, at_edge(address)));
        if let Some(named) = &self.named {
            // An address that is shared is at the edge too, and its port was dialled for a node.
            let dialled = address_at_edge
                .as_ref()
                .filter(|(_, at_edge)| *at_edge != Ok(false))
                .map(|(address, _)| address.port);
            let destination = Destination {
                host: named.host.clone(),
                port: named.port.or(dialled).unwrap_or(port),
            };
            if at_edge(&destination)? {
                return Ok(Some(destination));
            }
        }
        match address_at_edge {
            Some((address, at_edge)) => Ok(at_edge?.then(|| address.clone())),
            None => Ok(None),
        }
    }

    /// What was looked at, for people.
    pub(super) fn tell(&self) -> String {
        let name = match &self.named {
            Some(named) => format!("{} is no node", named.host),
            None => "no node is named".to_owned(),
        };
        match self.original {
            Some(original) => format!("{name}, and {original} is no node's address"),
            None => format!("{name}, and there is no original destination"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::Reason;

    use super::*;

    /// `edge1` and `edge2` share 192.168.1.10; 10.0.0.3 is one node's; the rest is not at the edge.
    fn at_edge(to: &Destination) -> Result<bool, Refusal> {
        match to.host.to_string().as_str() {
            "edge1" | "edge2" | "10.0.0.3" => Ok(true),
            "192.168.1.10" => Err(Refusal::about(to, Reason::AmbiguousDestination)),
            _ => Ok(false),
        }
    }

    fn decide(
        name: Option<&str>,
        port: Option<u16>,
        original: Option<&str>,
    ) -> Result<Option<String>, Reason> {
        let named = name.map(|name| Named {
            host: name.parse().unwrap(),
            port,
        });
        let original = original.map(|original| original.parse().unwrap());
        let found = Clues { named, original }.destination(10250, &at_edge);
        found
            .map(|found| found.map(|to| to.to_string()))
            .map_err(|refusal| refusal.reason)
    }

    #[test]
    fn the_order_is_name_then_original_destination() {
        let some = |to: &str| Ok(Some(to.to_owned()));
        for (name, port, original, wanted) in [
            (Some("edge1"), None, None, some("edge1:10250")),
            (Some("edge1"), Some(9100), None, some("edge1:9100")),
            (
                Some("edge1"),
                None,
                Some("10.0.0.3:9100"),
                some("edge1:9100"),
            ),
            (Some("edge1"), Some(1), Some("10.0.0.3:2"), some("edge1:1")),
            // Two nodes with one address are told apart by name.
            (Some("edge2"), None, Some("192.168.1.10:9"), some("edge2:9")),
            // A ClusterIP counts for nothing, its port neither.
            (
                Some("edge1"),
                None,
                Some("10.96.0.7:30250"),
                some("edge1:10250"),
            ),
            (None, None, Some("10.96.0.7:10250"), Ok(None)),
            (
                Some("other"),
                Some(1),
                Some("10.0.0.3:2"),
                some("10.0.0.3:2"),
            ),
            (None, None, Some("[::ffff:10.0.0.3]:2"), some("10.0.0.3:2")),
            (Some("other"), None, None, Ok(None)),
            (None, None, None, Ok(None)),
            (
                None,
                None,
                Some("192.168.1.10:1"),
                Err(Reason::AmbiguousDestination),
            ),
            (
                Some("other"),
                None,
                Some("192.168.1.10:1"),
                Err(Reason::AmbiguousDestination),
            ),
        ] {
            assert_eq!(
                decide(name, port, original),
                wanted,
                "{name:?} {port:?} {original:?}"
            );
        }
    }
}
