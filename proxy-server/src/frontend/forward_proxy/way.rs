//! What kept connections are told apart by: the node, its agent, and what that dials. Not by what was asked for: an
//! address or a name that is another node's by now must not be answered by the old one.
//!
//! hyper's client tells connections apart by the authority of a URI, so a way is written as one: `agent+node@host:port`.

use std::fmt;

use http::Uri;
use http::uri::{Authority, Scheme};
use proto::{AgentName, Destination};

use crate::route::Route;

/// Where a request over a kept connection goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Way {
    agent: AgentName,
    /// As people call it.
    node: String,
    /// By the agent.
    pub(super) dialled: Destination,
}

impl Way {
    /// The way of a routed destination; `None` if it is not at the edge.
    pub(super) fn new(route: Route, asked: &Destination) -> Option<Self> {
        let Route::Edge {
            agent,
            node,
            dialled,
        } = route
        else {
            return None;
        };
        let dialled = Destination {
            host: dialled.unwrap_or_else(|| asked.host.clone()),
            port: asked.port,
        };
        Some(Self {
            agent,
            node,
            dialled,
        })
    }

    /// The way that the client was given.
    pub(super) fn of(uri: &Uri) -> Option<Self> {
        let (who, dialled) = uri.authority()?.as_str().split_once('@')?;
        let (agent, node) = who.split_once('+')?;
        Some(Self {
            agent: agent.parse().ok()?,
            node: node.to_owned(),
            dialled: dialled.parse().ok()?,
        })
    }

    /// The same path on this way.
    pub(super) fn uri(&self, asked: &Uri) -> Option<Uri> {
        let mut parts = asked.clone().into_parts();
        parts.scheme = Some(Scheme::HTTP);
        parts.authority = Some(Authority::try_from(self.to_string()).ok()?);
        Uri::from_parts(parts).ok()
    }

    /// As a route, for what the agent dials.
    pub(super) fn route(&self) -> Route {
        Route::Edge {
            agent: self.agent.clone(),
            node: self.node.clone(),
            dialled: None,
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}@{}", self.agent, self.node, self.dialled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(agent: &str, node: &str, dialled: Option<&str>, asked: &str) -> Way {
        let route = Route::Edge {
            agent: agent.parse().unwrap(),
            node: node.into(),
            dialled: dialled.map(|host| host.parse().unwrap()),
        };
        Way::new(route, &asked.parse().unwrap()).unwrap()
    }

    #[test]
    fn a_way_comes_back_from_the_clients_uri_with_the_path_that_was_asked_for() {
        for (way, written) in [
            (
                way("edge1", "edge1", None, "edge1:9100"),
                "edge1+edge1@edge1:9100",
            ),
            (
                way("site-a", "press_1.x", Some("10.9.0.7"), "press_1.x:9100"),
                "site-a+press_1.x@10.9.0.7:9100",
            ),
            (
                way("edge1", "edge1", None, "[fd00::1]:80"),
                "edge1+edge1@[fd00::1]:80",
            ),
        ] {
            let asked: Uri = "http://user:secret@asked/metrics?x=1".parse().unwrap();
            let uri = way.uri(&asked).unwrap();
            assert_eq!(uri.to_string(), format!("http://{written}/metrics?x=1"));
            assert_eq!(Way::of(&uri).as_ref(), Some(&way));
            let edge = way.route();
            assert_eq!(Way::new(edge, &way.dialled), Some(way));
        }
    }

    #[test]
    fn whatever_differs_is_another_way_except_how_it_was_asked_for() {
        let one = way("site-a", "press", Some("10.9.0.7"), "press:9100");
        assert_eq!(one, way("site-a", "press", None, "10.9.0.7:9100"));
        for other in [
            way("site-b", "press", Some("10.9.0.7"), "press:9100"),
            way("site-a", "lathe", Some("10.9.0.7"), "press:9100"),
            way("site-a", "press", Some("10.9.0.8"), "press:9100"),
            way("site-a", "press", Some("10.9.0.7"), "press:9101"),
            way("site-a", "press", None, "press:9100"),
        ] {
            assert_ne!(one.to_string(), other.to_string());
        }
    }

    #[test]
    fn what_is_not_at_the_edge_and_what_is_no_way_has_none() {
        assert_eq!(Way::new(Route::Elsewhere, &"a:1".parse().unwrap()), None);
        for uri in [
            "http://edge1:9100/",
            "http://edge1@edge1:1/",
            "/metrics",
            "http://a+b@c/",
        ] {
            assert_eq!(Way::of(&uri.parse().unwrap()), None, "{uri}");
        }
    }
}
