//! The `peers:` section: other proxy-servers beside this one.

use std::net::{Ipv4Addr, SocketAddr};

use daemon::Problems;
use proto::Destination;
use serde::Deserialize;

use super::{Config, ObjectName};

/// Where other servers come in unless configured.
const PORT: u16 = 8446;

/// Other servers. Without this section this one is alone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Peers {
    /// Where they come in; they don't where there is no backend.
    pub listen: Option<Vec<SocketAddr>>,
    /// Their names and addresses; all addresses of a name are servers.
    pub servers: Vec<String>,
    /// The headless Service whose endpoints they are.
    pub service: Option<ObjectName>,
}

impl Peers {
    /// The configured servers; those that are none are refused by [`super::load`].
    #[must_use]
    pub fn destinations(&self) -> Vec<Destination> {
        self.servers
            .iter()
            .filter_map(|server| server.parse().ok())
            .collect()
    }
}

impl Config {
    /// Whether agents may come here. A server without a backend has frontends only, and asks its peers.
    #[must_use]
    pub const fn has_backend(&self) -> bool {
        !self.backend.listen.is_empty()
    }

    /// Where other servers come in.
    #[must_use]
    pub fn peer_listeners(&self) -> Vec<SocketAddr> {
        match &self.peers {
            Some(peers) if self.has_backend() => match &peers.listen {
                Some(listen) => listen.clone(),
                None => vec![SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT))],
            },
            Some(_) | None => Vec::new(),
        }
    }
}

pub(super) fn check(config: &Config, problems: &mut Problems) {
    let Some(peers) = &config.peers else {
        problems.check(
            config.has_backend(),
            "backend.listen",
            "at least one address is needed; a server with frontends only needs `peers`",
        );
        return;
    };
    problems.check(
        peers.servers.is_empty() == peers.service.is_some(),
        "peers",
        "say either servers: [HOST:PORT, …] or service: NAMESPACE/NAME",
    );
    for (i, server) in peers.servers.iter().enumerate() {
        problems.check(
            server.parse::<Destination>().is_ok(),
            format!("peers.servers[{i}]"),
            format!("{server:?} is not HOST:PORT"),
        );
    }
    problems.check(
        peers.service.is_none() || config.kubernetes.is_some(),
        "peers.service",
        "needs the `kubernetes` section, which says how kube-apiserver is asked",
    );
    let listens = peers
        .listen
        .as_ref()
        .is_some_and(|listen| !listen.is_empty());
    problems.check(
        config.has_backend() || !listens,
        "peers.listen",
        "nobody asks a server without a backend: it has no agents",
    );
    problems.check(
        !config.has_backend() || listens || peers.listen.is_none(),
        "peers.listen",
        "at least one address is needed, or others can't ask for the agents of this server",
    );
    problems.check(
        config.has_backend() || !config.frontends.is_empty(),
        "frontends",
        "a server without a backend and without frontends does nothing",
    );
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::check::check;
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        let file = Path::new("proxy-server.yaml");
        let text = format!("name: proxy-1\n{text}");
        let config: Config = daemon::config::parse(file, &text).map_err(|e| e.to_string())?;
        check(&config, file).map_err(|e| e.to_string())?;
        Ok(config)
    }

    #[test]
    fn a_server_may_have_frontends_only_if_it_has_peers() {
        let error = parse("backend: {listen: []}").unwrap_err();
        assert!(
            error.contains("backend.listen") && error.contains("`peers`"),
            "{error}"
        );
        let config = parse("backend: {listen: []}\npeers: {servers: ['proxy-2:8446']}").unwrap();
        assert!(!config.has_backend() && config.peer_listeners().is_empty());
        let config = parse("peers: {servers: ['10.0.0.2:8446', 'proxy.example:8446']}").unwrap();
        assert_eq!(config.peer_listeners(), ["0.0.0.0:8446".parse().unwrap()]);
        assert_eq!(config.peers.unwrap().destinations().len(), 2);
        assert!(parse("").unwrap().peer_listeners().is_empty());
    }

    #[test]
    fn mistakes_are_told() {
        for (text, told) in [
            ("peers: {}", "either servers"),
            (
                "peers: {servers: ['a:1'], service: a/b}\nkubernetes: {inCluster: true}",
                "either servers",
            ),
            ("peers: {servers: ['a']}", "peers.servers[0]"),
            ("peers: {service: corvid/peers}", "`kubernetes` section"),
            ("peers: {service: peers}", "NAMESPACE/NAME"),
            ("peers: {service: 'A/b'}", "is not NAMESPACE/NAME"),
            (
                "peers: {servers: ['a:1'], listen: []}",
                "at least one address",
            ),
            (
                "backend: {listen: []}\npeers: {servers: ['a:1'], listen: ['0.0.0.0:8446']}",
                "nobody asks",
            ),
            (
                "backend: {listen: []}\nfrontends: []\npeers: {servers: ['a:1']}",
                "does nothing",
            ),
            ("peers: {list: ['a:1']}", "list"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(told), "{text}: {error}");
        }
    }
}
