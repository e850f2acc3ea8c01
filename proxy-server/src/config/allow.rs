//! `allow` of a frontend: who may ask for what, as the file says it. [`crate::frontend::policy`] decides by it.

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use daemon::{Listen, Problems};
use serde::Deserialize;

use super::{Cidr, Config, Elsewhere, Frontend};
use crate::frontend::policy::Policy;

/// One rule. Who asks fits `clients`, `users` or `uids`, and comes from `from`, if that is given; an intercepted connection
/// can prove nothing and is known by `from` alone. What is asked for fits `nodes` or is `elsewhere`, and its port is one
/// of `ports`.
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
    const fn asks_for_proof(&self) -> bool {
        !(self.clients.is_empty() && self.users.is_empty() && self.uids.is_empty())
    }

    /// Whether it names requesters by their networks alone.
    #[must_use]
    pub const fn is_of_sources(&self) -> bool {
        !self.asks_for_proof() && !self.from.is_empty()
    }

    pub(super) fn check(&self, of: &Frontend, key: &impl fmt::Display, problems: &mut Problems) {
        if matches!(of, Frontend::Intercept(_)) {
            problems.check(
                !self.from.is_empty(),
                format!("{key}.from"),
                "say which source networks may, such as that of the control plane",
            );
            problems.check(
                !self.asks_for_proof(),
                key,
                "connections that are intercepted carry no credentials: `from` alone says who, not clients, users or uids",
            );
        } else {
            problems.check(
                self.asks_for_proof(),
                key,
                "says nothing of who: name clients, users or uids",
            );
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

/// What a frontend's rules can match.
#[derive(Debug, Clone, Copy)]
struct Reach {
    proof: Proof,
    /// What is not at the edge is dialled.
    elsewhere: bool,
}

/// What requesters of a frontend can prove.
#[derive(Debug, Clone, Copy)]
enum Proof {
    /// Client certificates; tokens and passwords too, if there are any. They have an address.
    Tls { users: bool },
    /// They are users of this machine, and have no address.
    Uid,
    /// Nothing; they have an address.
    Source,
}

impl Rule {
    /// Why no request can ever match it.
    fn useless(&self, reach: Reach) -> Option<&'static str> {
        let (has_users, has_uids) = (!self.users.is_empty(), !self.uids.is_empty());
        match reach.proof {
            Proof::Uid if !self.from.is_empty() => {
                return Some("requests over a Unix socket come from no network");
            }
            Proof::Uid if !has_uids => {
                return Some("whoever asks over a Unix socket is known by uid only");
            }
            Proof::Tls { users } if self.clients.is_empty() && !(users && has_users) => {
                return Some(if has_uids || users {
                    "whoever asks over TCP has no uid"
                } else {
                    "this frontend has no tokens and no passwords, so there are no users"
                });
            }
            Proof::Tls { .. } | Proof::Uid | Proof::Source => {}
        }
        (self.nodes.is_empty() && self.elsewhere && !reach.elsewhere)
            .then_some("this frontend dials nothing that is not at the edge")
    }
}

impl Frontend {
    const fn reach(&self) -> Reach {
        let (proof, elsewhere) = match self {
            Self::HttpConnect {
                listen, default, ..
            } => {
                let proof = match listen {
                    Listen::Unix(_) => Proof::Uid,
                    Listen::Tcp(_) => Proof::Tls { users: false },
                };
                (proof, matches!(default, Elsewhere::Direct))
            }
            Self::Konnectivity { default, .. } => {
                (Proof::Uid, matches!(default, Elsewhere::Direct))
            }
            Self::ForwardProxy {
                bearer_token_file,
                basic_auth_file,
                ..
            } => {
                let users = bearer_token_file.is_some() || basic_auth_file.is_some();
                (Proof::Tls { users }, false)
            }
            Self::Intercept(_) => (Proof::Source, false),
        };
        Reach { proof, elsewhere }
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
             {clients: [''], nodes: [a], ports: [0, 70000, 9-1, x, '1-65535']}, {clients: [a], nodes: [a]}, \
             {from: [10.0.0.0/8], nodes: [a], ports: [1]}]}\n\
             - {type: intercept, listen: '0.0.0.0:2', allow: [{nodes: ['*'], ports: [1]}, {from: [], nodes: ['*'], ports: [1]}, \
             {from: [10.0.0.0/8], ports: [x]}, {clients: [a], from: [10.0.0.0/8], nodes: [a], ports: [1]}, \
             {users: [a], from: [10.0.0.0/8], nodes: [a], ports: [1]}, {uids: [0], from: [10.0.0.0/8], nodes: [a], ports: [1]}]}\n\
             - {type: konnectivity, listen: 'unix:/k', allow: [{uids: [0], nodes: ['*']}]}\n",
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
            "frontends[0].allow[4]: says nothing of who: name clients, users or uids",
            "frontends[1].allow[0].from: say which source networks",
            "frontends[1].allow[1].from:",
            "frontends[1].allow[2].nodes:",
            "frontends[1].allow[2].ports[0]:",
            "frontends[1].allow[3]: connections that are intercepted carry no credentials",
            "frontends[1].allow[4]: connections that are intercepted",
            "frontends[1].allow[5]: connections that are intercepted",
            "frontends[2].allow[0].ports:",
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
    fn from_of_an_intercepting_frontend_is_refused_with_the_rule_to_write() {
        let told = |settings: &str| {
            let frontend = format!("- {{type: intercept, {settings}}}\n");
            parse(&frontend).unwrap_err().to_string()
        };
        for (settings, rule) in [
            (
                "listen: '[::]:10250', from: [10.0.0.0/24, 'fd00::/64']",
                "write `allow: [{from: [10.0.0.0/24, fd00::/64], nodes: ['*'], ports: [10250]}]`",
            ),
            (
                "listen: '[::]:10251', port: 10250, from: [10.0.0.7], allow: []",
                "write `allow: [{from: [10.0.0.7/32], nodes: ['*'], ports: [10250]}]`",
            ),
        ] {
            let told = told(settings);
            assert!(
                told.contains("frontends[0].from: ") && told.contains(rule),
                "{told}"
            );
        }
        assert!(told("listen: '[::]:1', from: [nonsense]").contains("nonsense"));
    }

    #[test]
    fn ipv4_that_is_written_as_ipv6_is_ipv4() {
        let net = |text: &str| Cidr::try_from(text.to_owned()).unwrap();
        for (text, address, wanted) in [
            ("10.0.0.0/24", "::ffff:10.0.0.9", true),
            ("::ffff:10.0.0.0/120", "10.0.0.9", true),
            ("::ffff:10.0.0.0/120", "::ffff:10.0.0.9", true),
            ("::ffff:10.0.0.0/120", "10.0.1.9", false),
            ("::ffff:10.0.0.9", "10.0.0.9", true),
            ("::/0", "10.0.0.9", false),
            ("0.0.0.0/0", "fd00::1", false),
            ("::/0", "fd00::1", true),
        ] {
            let fits = net(text).contains(address.parse().unwrap());
            assert_eq!(fits, wanted, "{text} {address}");
        }
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
             - {type: intercept, listen: '0.0.0.0:3', allow: [{from: [10.0.0.0/8], elsewhere: true, ports: [1]}, {from: [10.0.0.0/8], nodes: ['*'], ports: [1]}]}\n",
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
