//! What kept connections are told apart by: the node, its agent, and what that dials. Not by what was asked for: an
//! address or a name that is another node's by now must not be answered by the old one.
//!
//! hyper's client tells connections apart by the authority of a URI, so a way is written as one: `agent+node@host:port`, and
//! where a pod is meant `agent+node+namespace+pod+declared@host:port`, its last word 1 or 0.

use std::fmt;

use http::Uri;
use http::uri::{Authority, Scheme};
use proto::wire::PodPort;
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
    pod: Option<PodPort>,
}

impl Way {
    /// The way of a routed destination; `None` if it is not at the edge.
    pub(super) fn new(route: Route) -> Option<Self> {
        match route {
            Route::Edge {
                agent,
                node,
                to,
                pod,
            } => Some(Self {
                agent,
                node,
                dialled: to,
                pod,
            }),
            Route::Elsewhere(_) => None,
        }
    }

    /// The way that the client was given.
    pub(super) fn of(uri: &Uri) -> Option<Self> {
        let (who, dialled) = uri.authority()?.as_str().split_once('@')?;
        let mut who = who.split('+');
        let (agent, node) = (who.next()?, who.next()?);
        let pod = match (who.next(), who.next(), who.next(), who.next()) {
            (None, ..) => None,
            (Some(namespace), Some(pod), Some(declared), None) => Some(PodPort {
                pod: format!("{namespace}/{pod}"),
                node: node.to_owned(),
                declared: declared == "1",
            }),
            (Some(_), ..) => return None,
        };
        Some(Self {
            agent: agent.parse().ok()?,
            node: node.to_owned(),
            dialled: dialled.parse().ok()?,
            pod,
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
            to: self.dialled.clone(),
            pod: self.pod.clone(),
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.agent, self.node)?;
        if let Some(PodPort { pod, declared, .. }) = &self.pod {
            write!(f, "+{}+{}", pod.replace('/', "+"), u8::from(*declared))?;
        }
        write!(f, "@{}", self.dialled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(agent: &str, node: &str, to: &str, pod: Option<(&str, bool)>) -> Way {
        let route = Route::Edge {
            agent: agent.parse().unwrap(),
            node: node.into(),
            to: to.parse().unwrap(),
            pod: pod.map(|(pod, declared)| PodPort {
                pod: pod.into(),
                node: node.into(),
                declared,
            }),
        };
        Way::new(route).unwrap()
    }

    #[test]
    fn a_way_comes_back_from_the_clients_uri_with_the_path_that_was_asked_for() {
        for (way, written) in [
            (
                way("edge1", "edge1", "edge1:9100", None),
                "edge1+edge1@edge1:9100",
            ),
            (
                way("site-a", "press_1.x", "10.9.0.7:9100", None),
                "site-a+press_1.x@10.9.0.7:9100",
            ),
            (
                way("edge1", "edge1", "[fd00::1]:80", None),
                "edge1+edge1@[fd00::1]:80",
            ),
            (
                way(
                    "edge1",
                    "edge1",
                    "10.2.0.1:80",
                    Some(("default/web-0.x", true)),
                ),
                "edge1+edge1+default+web-0.x+1@10.2.0.1:80",
            ),
            (
                way(
                    "edge1",
                    "edge1",
                    "10.2.0.1:81",
                    Some(("default/web-0.x", false)),
                ),
                "edge1+edge1+default+web-0.x+0@10.2.0.1:81",
            ),
        ] {
            let asked: Uri = "http://user:secret@asked/metrics?x=1".parse().unwrap();
            let uri = way.uri(&asked).unwrap();
            assert_eq!(uri.to_string(), format!("http://{written}/metrics?x=1"));
            assert_eq!(Way::of(&uri).as_ref(), Some(&way));
            assert_eq!(Way::new(way.route()), Some(way));
        }
    }

    #[test]
    fn whatever_differs_is_another_way() {
        let one = way("site-a", "press", "10.9.0.7:9100", Some(("a/b", true)));
        for other in [
            way("site-b", "press", "10.9.0.7:9100", Some(("a/b", true))),
            way("site-a", "lathe", "10.9.0.7:9100", Some(("a/b", true))),
            way("site-a", "press", "10.9.0.8:9100", Some(("a/b", true))),
            way("site-a", "press", "10.9.0.7:9101", Some(("a/b", true))),
            way("site-a", "press", "press:9100", Some(("a/b", true))),
            way("site-a", "press", "10.9.0.7:9100", Some(("a/c", true))),
            way("site-a", "press", "10.9.0.7:9100", Some(("a/b", false))),
            way("site-a", "press", "10.9.0.7:9100", None),
        ] {
            assert_ne!(one.to_string(), other.to_string());
        }
    }

    #[test]
    fn what_is_not_at_the_edge_and_what_is_no_way_has_none() {
        assert_eq!(Way::new(Route::Elsewhere("a:1".parse().unwrap())), None);
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
