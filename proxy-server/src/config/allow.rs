//! `allow` of a frontend: who may ask for what, as the file says it. [`crate::frontend::policy`] decides by it.

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use daemon::{Listen, Problems};
use serde::Deserialize;

use super::{Cidr, Config, Elsewhere, Frontend};
use crate::frontend::policy::Policy;

/// One rule. Who asks fits `clients`, `users` or `uids`, and comes from `from`, if that is given; at a frontend whose
/// requesters prove nothing ([`Frontend::Intercept`]) `from` alone says who. What is asked for fits `nodes` or is
/// `elsewhere`, and its port is one of `ports`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Rule {
    /// Names in client certificates.
    pub clients: Vec<Pattern>,
    /// Names of tokens and passwords.
    pub users: Vec<Pattern>,
    /// Users at the other end of a Unix socket.
    pub uids: Vec<u32>,
    /// Networks that requesters come from; empty means any.
    pub from: Vec<Cidr>,
    /// Names of nodes at the edge.
    pub nodes: Vec<Pattern>,
    /// Ports of the destination.
    pub ports: Vec<Ports>,
    /// Also what is not at the edge, where the frontend has `default: direct`.
    pub elsewhere: bool,
}

impl Rule {
    /// Whether it names somebody by what they prove.
    pub(crate) const fn has_names(&self) -> bool {
        !(self.clients.is_empty() && self.users.is_empty() && self.uids.is_empty())
    }

    pub(super) fn check(&self, proof: Proof, key: &impl fmt::Display, problems: &mut Problems) {
        match proof {
            Proof::Credential => problems.check(
                self.has_names(),
                key,
                "says nothing of who: name clients, users or uids",
            ),
            Proof::Network => {
                problems.check(
                    !self.from.is_empty(),
                    format!("{key}.from"),
                    "say which source networks may, such as that of the control plane",
                );
                problems.check(
                    !self.has_names(),
                    key,
                    "connections that are intercepted carry no credentials: `from` alone says who, not clients, users or uids",
                );
            }
        }
        problems.check(
            !self.nodes.is_empty() || self.elsewhere,
            format!("{key}.nodes"),
            "name nodes; '*' means all",
        );
        problems.check(
            !self.ports.is_empty(),
            format!("{key}.ports"),
            "name ports; '1-65535' means all",
        );
        for (i, ports) in self.ports.iter().enumerate() {
            problems.check(
                ports.range.is_some(),
                format!("{key}.ports[{i}]"),
                format!(
                    "{:?}: a port is 1 to 65535, a range is written '10000-10100'",
                    ports.text
                ),
            );
        }
        for (list, patterns) in [
            ("clients", &self.clients),
            ("users", &self.users),
            ("nodes", &self.nodes),
        ] {
            for (i, pattern) in patterns.iter().enumerate() {
                problems.check(
                    !pattern.0.is_empty(),
                    format!("{key}.{list}[{i}]"),
                    "an empty name fits nobody",
                );
            }
        }
    }
}

/// By what a frontend's requesters are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Proof {
    /// A certificate, a token, a password, or what the kernel says.
    Credential,
    /// Nothing but the network that they come from.
    Network,
}

/// What a frontend's rules can match.
#[derive(Debug, Clone, Copy)]
struct Reach {
    /// Client certificates are asked for.
    clients: bool,
    /// There are tokens or passwords.
    users: bool,
    /// Requesters are users of this machine and have no address; else they have one and no uid.
    unix: bool,
    /// Requesters prove nothing.
    anybody: bool,
    /// What is not at the edge is dialled.
    elsewhere: bool,
}

impl Rule {
    /// Why no request can ever match it.
    fn useless(&self, reach: Reach) -> Option<&'static str> {
        let clients = reach.clients && !self.clients.is_empty();
        let users = reach.users && !self.users.is_empty();
        let uids = reach.unix && !self.uids.is_empty();
        let anybody = reach.anybody && !self.from.is_empty();
        if reach.unix && !self.from.is_empty() {
            return Some("requests over a Unix socket come from no network");
        }
        if !(clients || users || uids || anybody) {
            return Some(if reach.unix {
                "whoever asks over a Unix socket is known by uid only"
            } else if self.uids.is_empty() && !reach.users {
                "this frontend has no tokens and no passwords, so there are no users"
            } else {
                "whoever asks over TCP has no uid"
            });
        }
        (self.nodes.is_empty() && self.elsewhere && !reach.elsewhere)
            .then_some("this frontend dials nothing that is not at the edge")
    }
}

impl Frontend {
    const fn reach(&self) -> Reach {
        match self {
            Self::HttpConnect {
                listen, default, ..
            } => {
                let unix = matches!(listen, Listen::Unix(_));
                Reach {
                    clients: !unix,
                    users: false,
                    unix,
                    anybody: false,
                    elsewhere: matches!(default, Elsewhere::Direct),
                }
            }
            Self::Konnectivity { default, .. } => Reach {
                clients: false,
                users: false,
                unix: true,
                anybody: false,
                elsewhere: matches!(default, Elsewhere::Direct),
            },
            Self::Intercept(_) => Reach {
                clients: false,
                users: false,
                unix: false,
                anybody: true,
                elsewhere: false,
            },
            Self::ForwardProxy {
                bearer_token_file,
                basic_auth_file,
                ..
            } => Reach {
                clients: true,
                users: bearer_token_file.is_some() || basic_auth_file.is_some(),
                unix: false,
                anybody: false,
                elsewhere: false,
            },
        }
    }
}

impl Config {
    /// Rules that no request can ever match, and frontends that permit nothing: no mistakes, but hardly meant. A sentence
    /// each.
    #[must_use]
    pub fn useless_rules(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (i, frontend) in self.frontends.iter().enumerate() {
            let listen = frontend.listen();
            let rules = match frontend.policy() {
                Policy::Open => continue,
                Policy::Listed(rules) => rules,
            };
            if rules.is_empty() {
                found.push(format!(
                    "frontends[{i}].allow: {listen} has no rule and so permits nothing to anybody"
                ));
            }
            for (n, rule) in rules.iter().enumerate() {
                if let Some(why) = rule.useless(frontend.reach()) {
                    found.push(format!("frontends[{i}].allow[{n}]: can never match: {why}"));
                }
            }
        }
        found
    }
}

/// A name in which `*` stands for anything, also for nothing.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Pattern(pub String);

impl Pattern {
    /// Whether the name fits.
    #[must_use]
    pub fn fits(&self, name: &str) -> bool {
        !name.is_empty() && certs::fits(&self.0, name)
    }
}

/// A port or a range of ports.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "Written")]
pub struct Ports {
    text: String,
    /// `None` is refused when the file is read, and has no port.
    range: Option<RangeInclusive<u16>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Number(u64),
    Text(String),
}

impl From<Written> for Ports {
    fn from(written: Written) -> Self {
        let text = match written {
            Written::Number(number) => number.to_string(),
            Written::Text(text) => text,
        };
        let (first, last) = text.split_once('-').unwrap_or((&text, &text));
        let range = first.trim().parse().ok().zip(last.trim().parse().ok());
        let range = range
            .filter(|(first, last)| *first != 0 && first <= last)
            .map(|(first, last)| first..=last);
        Self { text, range }
    }
}

impl Ports {
    /// Whether the port is one of them.
    #[must_use]
    pub fn contains(&self, port: u16) -> bool {
        self.range
            .as_ref()
            .is_some_and(|range| range.contains(&port))
    }
}

impl Cidr {
    /// Whether the address is in it; an IPv4 address that is written as IPv6 is the IPv4 address.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::check;
    use super::*;

    fn parse(frontends: &str) -> Result<Config, daemon::ConfigError> {
        let file = std::path::Path::new("proxy-server.yaml");
        let config: Config =
            daemon::config::parse(file, &format!("name: a\nfrontends:\n{frontends}"))?;
        check(&config, file)?;
        Ok(config)
    }

    #[test]
    fn without_rules_tcp_permits_nothing_and_a_unix_socket_leaves_it_to_its_mode() {
        let config = parse(
            "- {type: httpConnect, listen: 'unix:/a'}\n- {type: httpConnect, listen: 'unix:/b', allow: []}\n\
             - {type: httpConnect, listen: '0.0.0.0:1'}\n- {type: forwardProxy, listen: '0.0.0.0:2'}\n\
             - {type: intercept, listen: '0.0.0.0:3'}\n",
        )
        .unwrap();
        let nothing = Policy::Listed(Vec::new());
        let policies: Vec<Policy> = config.frontends.iter().map(Frontend::policy).collect();
        assert_eq!(
            policies,
            [
                Policy::Open,
                nothing.clone(),
                nothing.clone(),
                nothing.clone(),
                nothing
            ]
        );
        let told = config.useless_rules();
        assert_eq!(told.len(), 4, "{told:?}");
        assert!(
            told[1].contains("frontends[2].allow") && told[1].contains("permits nothing"),
            "{told:?}"
        );
    }

    #[test]
    fn all_mistakes_in_rules_are_told_at_once() {
        let error = parse(
            "- {type: httpConnect, listen: '0.0.0.0:1', allow: [{nodes: ['*'], ports: [1]}, {clients: [a], ports: [1]}, \
             {clients: [''], nodes: [a], ports: [0, 70000, 9-1, x, '1-65535']}, {clients: [a], nodes: [a]}]}\n",
        )
        .unwrap_err()
        .to_string();
        for wanted in [
            "frontends[0].allow[0]: says nothing of who",
            "frontends[0].allow[1].nodes:",
            "frontends[0].allow[2].clients[0]:",
            "frontends[0].allow[2].ports[0]: \"0\"",
            "frontends[0].allow[2].ports[1]: \"70000\"",
            "frontends[0].allow[2].ports[2]: \"9-1\"",
            "frontends[0].allow[2].ports[3]: \"x\"",
            "frontends[0].allow[3].ports:",
        ] {
            assert!(error.contains(wanted), "{wanted} is missing in: {error}");
        }
        assert!(!error.contains("ports[4]"), "{error}");
        let error = parse(
            "- {type: httpConnect, listen: '0.0.0.0:1', allow: [{client: [a], nodes: [a], ports: [1]}]}\n",
        );
        assert!(error.unwrap_err().to_string().contains("client"));
    }

    #[test]
    fn rules_that_can_never_match_are_told() {
        let config = parse(
            "- {type: httpConnect, listen: 'unix:/a', allow: [{clients: [a], nodes: ['*'], ports: [1]}, \
             {uids: [0], from: [10.0.0.0/8], nodes: ['*'], ports: [1]}, {uids: [0], nodes: ['*'], ports: [1]}]}\n\
             - {type: httpConnect, listen: '0.0.0.0:1', allow: [{uids: [0], nodes: ['*'], ports: [1]}, \
             {users: [a], nodes: ['*'], ports: [1]}, {clients: [a], elsewhere: true, ports: [1]}, {clients: [a], nodes: [b], ports: [1]}]}\n\
             - {type: forwardProxy, listen: '0.0.0.0:2', allow: [{users: [a], nodes: ['*'], ports: [1]}, \
             {clients: [a], users: [a], nodes: ['*'], ports: [1]}]}\n\
             - {type: intercept, listen: '0.0.0.0:3', allow: [{from: [10.0.0.1], elsewhere: true, ports: [1]}, \
             {from: [10.0.0.1], nodes: [a], ports: [1]}]}\n",
        )
        .unwrap();
        let told = config.useless_rules();
        let wanted = [
            ("frontends[0].allow[0]", "uid only"),
            ("frontends[0].allow[1]", "no network"),
            ("frontends[1].allow[0]", "no uid"),
            ("frontends[1].allow[1]", "no users"),
            ("frontends[1].allow[2]", "not at the edge"),
            ("frontends[2].allow[0]", "no users"),
            ("frontends[3].allow[0]", "not at the edge"),
        ];
        assert_eq!(told.len(), wanted.len(), "{told:#?}");
        for ((place, why), told) in wanted.into_iter().zip(&told) {
            assert!(told.starts_with(place) && told.contains(why), "{told}");
        }
    }
}
