//! Who may ask for what. Pure: rules, a requester and a destination in, a decision out.
//!
//! | frontend | no `allow` | `allow: []` | rules |
//! | --- | --- | --- | --- |
//! | TCP | nobody | nobody | whom one of them names; intercepted connections have a network and no name |
//! | Unix socket | whom the socket's mode lets in | nobody | whom one of them names |
//!
//! Decided about is the node that the request is routed to, not what it was called: an address of a node counts as
//! that node. It is decided for each request, after it is routed and before a session is picked, so that nothing of a
//! refused request reaches the edge. The refusal names the requester and the destination, never the rules.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use daemon::Peer;
use proto::{Destination, Reason};

use crate::config::Rule;
use crate::error::Refusal;
use crate::route::Route;

/// What a requester has proved to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Who {
    /// Holder of a client certificate of that name.
    Client(String),
    /// Holder of a token or password of that name.
    User(String),
    /// A user of this machine, if the kernel said which.
    Uid(Option<u32>),
    /// Nothing yet.
    Unproved,
    /// Nothing, and it is known by where it comes from alone, as intercepted connections are.
    Source {
        /// From there.
        address: IpAddr,
        /// So says the load balancer at that address.
        via: Option<SocketAddr>,
    },
    /// Whoever another server has let in and decided about, in its words.
    Peer {
        /// The other server, by its certificate.
        server: String,
        /// Who asked there.
        asked: String,
    },
    /// Ourselves: a kept connection, whose requests were each decided about before they came to it.
    Pool,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client(name) => write!(f, "client/{name}"),
            Self::User(name) => write!(f, "user/{name}"),
            Self::Uid(Some(uid)) => write!(f, "uid/{uid}"),
            Self::Uid(None) => f.write_str("uid/unknown"),
            Self::Unproved => f.write_str("unproved"),
            Self::Peer { server, asked } => write!(f, "server/{server} for {asked}"),
            Self::Source { address, via: None } => write!(f, "source/{address}"),
            Self::Source {
                address,
                via: Some(balancer),
            } => write!(f, "source/{address} via {balancer}"),
            Self::Pool => f.write_str("pool"),
        }
    }
}

/// Who asks, and from where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requester {
    /// Who.
    pub who: Who,
    /// From where; `None` only for [`Who::Pool`].
    pub peer: Option<Peer>,
}

impl Requester {
    /// Whoever connected, as far as the connection says.
    #[must_use]
    pub fn new(peer: &Peer) -> Self {
        let who = match peer {
            Peer::Tcp(_) => Who::Unproved,
            Peer::Unix { uid, .. } => Who::Uid(*uid),
        };
        let peer = Some(peer.clone());
        Self { who, peer }
    }

    /// Whoever has nothing to prove anything with and comes from there, by the word of a load balancer if there is one.
    #[must_use]
    pub fn from_source(source: SocketAddr, via: Option<SocketAddr>) -> Self {
        let address = source.ip().to_canonical();
        Self {
            who: Who::Source { address, via },
            peer: Some(Peer::Tcp(source)),
        }
    }

    /// The same connection, now that it has proved that.
    #[must_use]
    pub fn proved(&self, who: Who) -> Self {
        let peer = self.peer.clone();
        Self { who, peer }
    }

    /// A kept connection of ours.
    #[must_use]
    pub const fn pool() -> Self {
        Self {
            who: Who::Pool,
            peer: None,
        }
    }

    /// Log field: the address and port, or the Unix credentials.
    #[must_use]
    pub fn source(&self) -> String {
        self.peer.as_ref().map(Peer::to_string).unwrap_or_default()
    }

    /// Who and from where, in words for another server's log.
    #[must_use]
    pub fn words(&self) -> String {
        match self.source() {
            source if source.is_empty() => self.to_string(),
            source => format!("{self} from {source}"),
        }
    }

    fn address(&self) -> Option<IpAddr> {
        Some(self.peer.as_ref()?.tcp()?.ip())
    }
}

impl fmt::Display for Requester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.who.fmt(f)
    }
}

/// Where a request would go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target<'a> {
    /// To that node at the edge.
    Node(&'a str),
    /// Not to the edge.
    Elsewhere,
}

impl<'a> From<&'a Route> for Target<'a> {
    fn from(route: &'a Route) -> Self {
        match route {
            Route::Edge { node, .. } => Self::Node(node),
            Route::Elsewhere(_) => Self::Elsewhere,
        }
    }
}

/// No rule permits it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no rule permits it")]
pub struct Denied;

/// The first rule that permits it.
///
/// # Errors
/// There is none.
pub fn decide<'a>(
    rules: &'a [Rule],
    requester: &Requester,
    target: Target<'_>,
    port: u16,
) -> Result<&'a Rule, Denied> {
    let permits =
        |rule: &&Rule| names(rule, requester) && leads_to(rule, target) && has_port(rule, port);
    rules.iter().find(permits).ok_or(Denied)
}

fn names(rule: &Rule, requester: &Requester) -> bool {
    let named = match &requester.who {
        Who::Client(name) => rule.clients.iter().any(|client| client.fits(name)),
        Who::User(name) => rule.users.iter().any(|user| user.fits(name)),
        Who::Uid(Some(uid)) => rule.uids.contains(uid),
        Who::Source { .. } => rule.is_of_sources(),
        Who::Uid(None) | Who::Unproved | Who::Peer { .. } | Who::Pool => false,
    };
    let from = |ip| rule.from.iter().any(|net| net.contains(ip));
    named && (rule.from.is_empty() || requester.address().is_some_and(from))
}

fn leads_to(rule: &Rule, target: Target<'_>) -> bool {
    match target {
        Target::Node(node) => rule.nodes.iter().any(|pattern| pattern.fits(node)),
        Target::Elsewhere => rule.elsewhere,
    }
}

fn has_port(rule: &Rule, port: u16) -> bool {
    rule.ports.iter().any(|ports| ports.contains(port))
}

/// What a frontend permits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Policy {
    /// Everything to whoever got in: a Unix socket whose mode decides.
    Open,
    /// What these rules permit.
    Listed(Vec<Rule>),
}

impl Policy {
    /// Decides whether a requester is heard at all, before anything of it is read: some rule must name it.
    ///
    /// # Errors
    /// [`Reason::NotAllowed`]: whatever it asked for, it would be refused.
    pub fn hear(&self, requester: &Requester) -> Result<(), Refusal> {
        let named = match self {
            Self::Open => true,
            Self::Listed(rules) => rules.iter().any(|rule| names(rule, requester)),
        };
        let refusal = || Refusal::detailed(requester, Reason::NotAllowed, "no rule names it");
        named.then_some(()).ok_or_else(refusal)
    }

    /// Decides about a routed request: at the edge by the port that is dialled in the end, elsewhere by the one that was asked
    /// for.
    ///
    /// # Errors
    /// [`Reason::NotAllowed`] in a sentence for the requester.
    pub fn check(
        &self,
        requester: &Requester,
        asked: &Destination,
        route: &Route,
    ) -> Result<(), Refusal> {
        let rules = match self {
            Self::Open => return Ok(()),
            Self::Listed(rules) => rules,
        };
        let port = match route {
            Route::Edge { to, .. } => to.port,
            Route::Elsewhere(_) => asked.port,
        };
        decide(rules, requester, route.into(), port).map_or_else(
            |Denied| {
                let detail = format!("{requester} may not ask for it");
                Err(Refusal::detailed(asked, Reason::NotAllowed, &detail))
            },
            |_rule| Ok(()),
        )
    }
}

#[cfg(test)]
mod tests;
