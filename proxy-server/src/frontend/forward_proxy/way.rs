//! What kept connections are told apart by: the node, its agent, what that dials, and whether a line goes there now. Not by
//! what was asked for: an address or a name that is another node's by now must not be answered by the old one.
//!
//! hyper's client tells connections apart by the authority of a URI, so a way is written as one: `agent+node@host:port`, and
//! where a pod is meant `agent+node+namespace+pod+declared@host:port`, its last word 1 or 0. Behind that stands `+line` where
//! a line is to be taken.

use std::fmt;

use http::Uri;
use http::uri::{Authority, Scheme};
use proto::wire::PodPort;
use proto::{AgentName, Destination};

use crate::path::Meant;
use crate::route::Route;

/// What stands behind a way by a line.
const BY_LINE: &str = "line";

/// Where a request over a kept connection goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Way {
    agent: AgentName,
    /// As people call it.
    node: String,
    /// By the agent.
    pub(super) dialled: Destination,
    pod: Option<PodPort>,
    /// By a line, as far as is known when it is asked for.
    pub(super) by_line: bool,
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
                by_line: false,
            }),
            Route::Elsewhere(_) => None,
        }
    }

    /// The way that the client was given.
    pub(super) fn of(uri: &Uri) -> Option<Self> {
        let (who, dialled) = uri.authority()?.as_str().split_once('@')?;
        let words: Vec<_> = who.split('+').collect();
        let (agent, node, pod, line) = match *words {
            [agent, node] => (agent, node, None, None),
            [agent, node, line] => (agent, node, None, Some(line)),
            [agent, node, namespace, pod, declared] => {
                (agent, node, Some((namespace, pod, declared)), None)
            }
            [agent, node, namespace, pod, declared, line] => {
                (agent, node, Some((namespace, pod, declared)), Some(line))
            }
            _ => return None,
        };
        Some(Self {
            agent: agent.parse().ok()?,
            node: node.to_owned(),
            dialled: dialled.parse().ok()?,
            pod: pod.map(|(namespace, pod, declared)| PodPort {
                pod: format!("{namespace}/{pod}"),
                node: node.to_owned(),
                declared: declared == "1",
            }),
            by_line: match line {
                Some(word) if word == BY_LINE => true,
                Some(_) => return None,
                None => false,
            },
        })
    }

    /// The same path on this way.
    pub(super) fn uri(&self, asked: &Uri) -> Option<Uri> {
        let mut parts = asked.clone().into_parts();
        parts.scheme = Some(Scheme::HTTP);
        parts.authority = Some(Authority::try_from(self.to_string()).ok()?);
        Uri::from_parts(parts).ok()
    }

    /// What is meant, for who decides about lines.
    pub(super) fn meant(&self) -> Meant<'_> {
        Meant {
            node: &self.node,
            to: &self.dialled,
            pod: self.pod.as_ref(),
        }
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
        if self.by_line {
            write!(f, "+{BY_LINE}")?;
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
            assert_eq!(Way::new(way.route()).as_ref(), Some(&way));
            let by_line = Way {
                by_line: true,
                ..way
            };
            let uri = by_line.uri(&asked).unwrap();
            let (who, at) = written.split_once('@').unwrap();
            assert_eq!(
                uri.to_string(),
                format!("http://{who}+line@{at}/metrics?x=1")
            );
            assert_eq!(Way::of(&uri), Some(by_line));
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
            "http://a+b+lines@c:1/",
            "http://a+b+c+d@c:1/",
            "http://a+b+c+d+1+line+e@c:1/",
        ] {
            assert_eq!(Way::of(&uri.parse().unwrap()), None, "{uri}");
        }
    }
}
