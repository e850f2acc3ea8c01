//! What a configuration may not mean: all mistakes at once, each with its key.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use certs::Name;
use daemon::{ConfigError, Listen, Problems};

use super::{Config, Frontend, Intercept};

/// Below this, agents behind ordinary lines are lost for nothing: three keepalives are missed in 36 s.
const LEAST_IDLE: Duration = Duration::from_secs(5);

pub(super) fn check(config: &Config, file: &Path) -> Result<(), ConfigError> {
    let mut problems = Problems::new();
    problems.check(
        Name::parse(&config.name).is_ok(),
        "name",
        format!(
            "{:?} is no DNS name; set it, the host name won't do",
            config.name
        ),
    );
    problems.check(
        config.backend.idle_timeout >= LEAST_IDLE,
        "backend.idleTimeout",
        format!(
            "must be at least {}",
            humantime::format_duration(LEAST_IDLE)
        ),
    );
    problems.check(
        config.backend.memory.0 >= 1 << 20,
        "backend.memory",
        "must be at least 1MiB",
    );
    super::peers::check(config, &mut problems);
    frontends(config, &mut problems);
    routes(config, &mut problems);
    super::lines::check(config, &mut problems);
    if let Some(kubernetes) = &config.kubernetes {
        super::kubernetes::check(kubernetes, &mut problems);
    }
    for (key, value) in [
        ("timeouts.header", config.timeouts.header),
        ("timeouts.dial", config.timeouts.dial),
        ("timeouts.halfOpen", config.timeouts.half_open),
    ] {
        problems.check(!value.is_zero(), key, "must not be zero");
    }
    problems.check(
        config.timeouts.dial < Duration::from_secs(30),
        "timeouts.dial",
        "must be under 30s, after which kube-apiserver gives up without a word",
    );
    for (key, value) in [
        ("limits.streams", config.limits.streams),
        ("limits.pendingDials", config.limits.pending_dials),
        ("limits.connections", config.limits.connections),
        ("limits.handshakes", config.limits.handshakes),
        ("limits.sessionsPerAgent", config.limits.sessions_per_agent),
        (
            "limits.sessionsPerSecond",
            config.limits.sessions_per_second as usize,
        ),
    ] {
        problems.check(value > 0, key, "must not be zero");
    }
    problems.check(
        daemon::admin::is_local(&config.admin.listen),
        "admin.listen",
        format!(
            "{} is not a loopback address, and the endpoint asks for no password",
            config.admin.listen
        ),
    );
    problems.into_result(file)
}

fn frontends(config: &Config, problems: &mut Problems) {
    let mut seen = BTreeSet::new();
    for (i, frontend) in config.frontends.iter().enumerate() {
        let key = |rest: &str| format!("frontends[{i}].{rest}");
        let listen = frontend.listen();
        // Port 0 is a new port each time.
        if listen.port() != Some(0) && !seen.insert(listen.to_string()) {
            problems.push(key("listen"), format!("{listen} is listened on twice"));
        }
        for (n, rule) in frontend.allow().unwrap_or_default().iter().enumerate() {
            rule.check(frontend, &key(&format!("allow[{n}]")), problems);
        }
        let (client_ca, allowed_names) = match frontend {
            Frontend::HttpConnect {
                client_ca,
                allowed_names,
                ..
            } => {
                let unix = matches!(listen, Listen::Unix(_));
                problems.check(
                    !(unix && client_ca.is_some()),
                    key("clientCa"),
                    "a Unix socket has no TLS; its permissions decide who may connect",
                );
                (client_ca, allowed_names)
            }
            Frontend::Konnectivity { .. } => {
                problems.check(
                    matches!(listen, Listen::Unix(_)),
                    key("listen"),
                    "konnectivity's gRPC is served on a Unix socket, whose permissions decide who may connect; kube-apiserver speaks it nowhere else",
                );
                continue;
            }
            Frontend::ForwardProxy {
                client_ca,
                allowed_names,
                ..
            } => {
                problems.check(
                    matches!(listen, Listen::Tcp(_)),
                    key("listen"),
                    "a forward proxy listens on a TCP address",
                );
                (client_ca, allowed_names)
            }
            Frontend::Intercept(settings) => {
                intercept(settings, key, problems);
                continue;
            }
        };
        problems.check(
            client_ca.is_none() || !allowed_names.is_empty(),
            key("allowedNames"),
            "with a CA of your own, say which names may connect",
        );
        problems.check(
            client_ca.is_some() || allowed_names.is_empty(),
            key("allowedNames"),
            "goes with clientCa; certificates of Corvid's CA are told apart by role",
        );
    }
}

fn intercept(settings: &Intercept, key: impl Fn(&str) -> String, problems: &mut Problems) {
    problems.check(
        matches!(settings.listen, Listen::Tcp(_)),
        key("listen"),
        "connections are intercepted on a TCP address",
    );
    problems.check(
        settings.port != Some(0),
        key("port"),
        "must be within 1 to 65535",
    );
    if let Some(from) = &settings.from {
        let port = settings.port.or_else(|| settings.listen.port());
        let from: Vec<String> = from.iter().map(|cidr| cidr.0.to_string()).collect();
        let rule = format!(
            "{{from: [{}], nodes: ['*'], ports: [{}]}}",
            from.join(", "),
            port.unwrap_or_default()
        );
        problems.push(
            key("from"),
            format!(
                "source networks stand in the rules that say what they may reach: write `allow: [{rule}]`"
            ),
        );
    }
    let nobody = |proxy: &super::ProxyProtocol| proxy.trusted.is_empty();
    problems.check(
        !settings.proxy_protocol.as_ref().is_some_and(nobody),
        key("proxyProtocol.trusted"),
        "name the load balancers' addresses, or leave proxyProtocol out",
    );
}

fn routes(config: &Config, problems: &mut Problems) {
    let mut seen = BTreeSet::new();
    for (i, route) in config.routes.iter().enumerate() {
        let key = |rest: &str| format!("routes[{i}].{rest}");
        problems.check(
            route.node.parse::<proto::AgentName>().is_ok(),
            key("node"),
            format!("{:?} is no node name", route.node),
        );
        if let Some(agent) = &route.agent {
            let valid = agent.parse::<proto::AgentName>().is_ok();
            problems.check(valid, key("agent"), format!("{agent:?} is no agent name"));
        }
        problems.check(
            seen.insert(&route.node),
            key("node"),
            format!("{:?} stands here twice", route.node),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        let file = Path::new("proxy-server.yaml");
        let config: Config = daemon::config::parse(file, text)?;
        check(&config, file)?;
        Ok(config)
    }

    #[test]
    fn the_smallest_configuration_has_sane_defaults() {
        let config = parse("name: proxy-1").unwrap();
        assert_eq!(config.backend.listen[0].port(), 8443);
        assert_eq!(config.backend.idle_timeout.as_secs(), 120);
        assert_eq!(config.backend.memory.0, 256 << 20);
        assert_eq!(config.frontends.len(), 1);
        assert_eq!(config.timeouts.dial.as_secs(), 15);
    }

    #[test]
    fn all_mistakes_of_meaning_are_told_at_once() {
        let error = parse(
            "name: 'No Name'\nbackend: {listen: [], memory: 1KiB}\nroutes: [{node: a}, {node: a, agent: B}]\n\
             timeouts: {dial: 40s, header: 0s}\nadmin: {listen: '0.0.0.0:9442'}\n\
             frontends:\n- {type: httpConnect, listen: 'unix:/x', clientCa: /ca}\n- {type: forwardProxy, listen: 'unix:/x', allowedNames: [a]}\n\
             - {type: intercept, listen: 'unix:/y', port: 0, proxyProtocol: {trusted: []}, allow: [{nodes: ['*'], ports: [1]}, {from: [10.0.0.1], clients: [a], nodes: ['*'], ports: [1]}]}\n\
             - {type: konnectivity, listen: 'tcp:127.0.0.1:1'}\n",
        )
        .unwrap_err()
        .to_string();
        for key in [
            "name",
            "backend.listen",
            "backend.memory",
            "routes[1].node",
            "routes[1].agent",
            "timeouts.dial",
            "timeouts.header",
            "admin.listen",
            "frontends[0].clientCa",
            "frontends[0].allowedNames",
            "frontends[1].listen",
            "frontends[1].allowedNames",
            "frontends[2].listen",
            "frontends[2].port",
            "frontends[2].allow[0].from: ",
            "frontends[2].allow[1]: ",
            "frontends[2].proxyProtocol.trusted",
            "frontends[3].listen",
        ] {
            assert!(error.contains(key), "{key} is missing in: {error}");
        }
    }

    #[test]
    fn unknown_keys_and_syntax_are_refused_with_their_line() {
        for (text, place) in [
            ("name: a\nbackends: {}\n", "proxy-server.yaml:2:"),
            ("name: a\nbackend:\n  listn: []\n", "proxy-server.yaml:3:"),
            ("name: a\nroutes: [\n", "proxy-server.yaml:"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with(place), "{error}");
        }
        let error = parse(
            "name: a\nfrontends:\n- {type: httpConnect, listen: 'unix:/x', defalt: direct}\n",
        );
        assert!(error.unwrap_err().to_string().contains("defalt"));
    }
}
