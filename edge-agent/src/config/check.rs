//! Turns the file and its overrides into a [`Config`], or into the list of everything that is wrong.

use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use certs::{Name, Pin, TrustDomain};
use daemon::{ConfigError, Listen, Problems};
use ipnet::IpNet;
use proto::Host;
use proto::transport::quic::Congestion;
use secrecy::ExposeSecret;

use super::file::{self, File};
use super::server::{self, Written};
use super::{Anchor, BackoffLimits, Config, Join, Overrides, TokenSource};
use crate::policy::Rule;

/// 20 MiB: a node with 512 MiB has that to spare (design: one budget a process).
const MEMORY: u64 = 20 << 20;
/// Below one stream window of 64 KiB for each of 16 readers nothing runs well.
const LEAST_MEMORY: u64 = 1 << 20;
/// A server waits 15 s for a dial in all.
const LONGEST_DIAL: Duration = Duration::from_secs(60);
const OBSERVE_PORT: u16 = 9441;
const ADMIN_PORT: u16 = 9443;
const ALL_PORTS: RangeInclusive<u16> = 1..=u16::MAX;

pub(super) fn config(path: &Path, file: File, over: &Overrides) -> Result<Config, ConfigError> {
    let mut problems = Problems::new();
    let name = over.name.clone().or(file.name).or_else(host_name);
    problems.check(
        name.is_some(),
        "name",
        "the host has no name, so this must be given",
    );
    let name = name.and_then(|text| read::<Name>(&mut problems, "name", &text));
    let trust_domain = file.trust_domain.map_or_else(
        || Some(TrustDomain::default()),
        |text| read(&mut problems, "trustDomain", &text),
    );
    let written = if over.servers.is_empty() {
        file.servers
    } else {
        let over = over.servers.iter();
        over.map(|text| Written::from(text.as_str())).collect()
    };
    let servers = server::servers(&written, &mut problems);
    // A service manager may hand over a token to every agent; one that has a credential doesn't need it.
    let join = match (&file.credential, &file.join) {
        (Some(_), None) => None,
        (Some(_) | None, Some(_)) | (None, None) => join(&mut problems, file.join, over),
    };
    let both = join.is_some() && file.credential.is_some();
    problems.check(!both, "credential", "give either this or join, not both");
    for (i, port) in file.localhost_ports.iter().enumerate() {
        problems.check(*port != 0, format!("localhostPorts[{i}]"), "0 is no port");
    }
    let allow = file
        .allow
        .iter()
        .enumerate()
        .filter_map(|(i, allow)| rule(&mut problems, i, allow))
        .collect();
    for (i, node) in file.pods.nodes.iter().enumerate() {
        let is_name = matches!(node.parse(), Ok(Host::Name(name)) if name == *node);
        problems.check(
            is_name,
            format!("pods.nodes[{i}]"),
            format!("{node:?} is no name of a node"),
        );
    }
    let memory = file.memory.map_or(MEMORY, |size| size.0);
    problems.check(memory >= LEAST_MEMORY, "memory", "at least 1MiB is needed");
    times(
        &mut problems,
        &file.backoff,
        file.timeouts.dial,
        file.timeouts.half_open,
    );
    let observe = listen(file.observe.listen, Ipv4Addr::UNSPECIFIED, OBSERVE_PORT);
    let admin = listen(file.admin.listen, Ipv4Addr::LOCALHOST, ADMIN_PORT);
    problems.check(
        daemon::admin::is_local(&admin),
        "admin.listen",
        "must be a loopback address or a unix socket: it has no authentication",
    );
    let log_level = over
        .log_level
        .clone()
        .or(file.log.level)
        .unwrap_or_else(|| "info".to_owned());
    if let Err(error) = daemon::LogHandle::detached().set(&log_level) {
        problems.push("log.level", error);
    }
    let (Some(name), Some(trust_domain)) = (name, trust_domain) else {
        return Err(wrong(path, problems));
    };
    let config = Config {
        name,
        state_dir: (over.state_dir.clone())
            .or(file.state_dir)
            .unwrap_or_else(|| super::STATE_DIR.into()),
        trust_domain,
        servers,
        join,
        credential: file.credential,
        node_addresses: if over.node_addresses.is_empty() {
            &file.node_addresses
        } else {
            &over.node_addresses
        }
        .iter()
        .map(IpAddr::to_canonical)
        .collect(),
        localhost_ports: file.localhost_ports,
        allow,
        pods: file.pods,
        memory,
        timeouts: file.timeouts,
        backoff: file.backoff,
        congestion: match file.congestion {
            file::Congestion::Cubic => Congestion::Cubic,
            file::Congestion::Bbr => Congestion::Bbr,
        },
        drain: file.drain,
        handover: file.handover,
        observe,
        admin,
        log_format: over.log_format.or(file.log.format).unwrap_or_default(),
        log_level,
    };
    problems.into_result(path)?;
    Ok(config)
}

/// The error of problems that are known not to be empty.
fn wrong(path: &Path, problems: Problems) -> ConfigError {
    ConfigError::Invalid {
        file: path.to_owned(),
        problems,
    }
}

fn read<T: FromStr<Err: Display>>(
    problems: &mut Problems,
    key: impl Display,
    text: &str,
) -> Option<T> {
    text.parse()
        .map_err(|error| problems.push(key, format_args!("`{text}`: {error}")))
        .ok()
}

fn host_name() -> Option<String> {
    let name = nix::unistd::gethostname().ok()?.into_string().ok()?;
    Some(name.to_ascii_lowercase()).filter(|name| !name.is_empty())
}

fn listen(given: Option<Listen>, address: Ipv4Addr, port: u16) -> Listen {
    given.unwrap_or_else(|| SocketAddr::from((address, port)).into())
}

fn join(problems: &mut Problems, file: Option<file::Join>, over: &Overrides) -> Option<Join> {
    let given = file.is_some();
    let file = file.unwrap_or_default();
    let in_file = [
        file.token.map(TokenSource::Value),
        file.token_file.map(TokenSource::File),
        file.service_account_token_file
            .map(TokenSource::ServiceAccount),
    ];
    let mut in_file = in_file.into_iter().flatten();
    let from_file = in_file.next();
    if in_file.next().is_some() {
        problems.push(
            "join",
            "give one of token, tokenFile and serviceAccountTokenFile",
        );
        return None;
    }
    let token = (over.join_token.clone().map(TokenSource::Value))
        .or_else(|| over.join_token_file.clone().map(TokenSource::File))
        .or_else(|| {
            let file = over.service_account_token_file.clone();
            file.map(TokenSource::ServiceAccount)
        })
        .or(from_file);
    if let Some(TokenSource::Value(value)) = &token
        && value.expose_secret().parse::<certs::JoinToken>().is_err()
    {
        problems.push(
            "join.token",
            "this is no join token, which looks like id.secret",
        );
    }
    let anchor = anchor(problems, file.ca_pin, file.ca_file, over);
    match (token, anchor) {
        (Some(token), Ok(Some(anchor))) => Some(Join { token, anchor }),
        (Some(_), Ok(None)) => {
            problems.push(
                "join.caPin",
                "this or caFile is needed with a token; `proxy-server cert show` prints it",
            );
            None
        }
        // A pin may be set for a whole fleet, tokens come and go.
        (None, Ok(Some(_))) | (Some(_) | None, Err(Told)) => None,
        (None, Ok(None)) => {
            problems.check(
                !given,
                "join",
                "token, tokenFile or serviceAccountTokenFile is needed",
            );
            None
        }
    }
}

/// A problem was pushed.
struct Told;

fn anchor(
    problems: &mut Problems,
    pin: Option<String>,
    file: Option<std::path::PathBuf>,
    over: &Overrides,
) -> Result<Option<Anchor>, Told> {
    let (pin, file) = match (&over.ca_pin, &over.ca_file) {
        (None, None) => (pin, file),
        (pin, file) => (pin.clone(), file.clone()),
    };
    match (pin, file) {
        (Some(_), Some(_)) => {
            problems.push("join", "give either caPin or caFile, not both");
            Err(Told)
        }
        (Some(pin), None) => match read::<Pin>(problems, "join.caPin", &pin) {
            Some(pin) => Ok(Some(Anchor::Pin(pin))),
            None => Err(Told),
        },
        (None, Some(file)) => Ok(Some(Anchor::File(file))),
        (None, None) => Ok(None),
    }
}

fn rule(problems: &mut Problems, index: usize, allow: &file::Allow) -> Option<Rule> {
    let cidr = cidr(problems, index, &allow.cidr);
    let key = format!("allow[{index}].ports");
    problems.check(
        !allow.ports.is_empty(),
        &key,
        "name ports; \"1-65535\" means all",
    );
    let ports = allow
        .ports
        .iter()
        .filter_map(|ports| {
            let range = match ports {
                file::Ports::One(port) => Some(*port..=*port),
                file::Ports::Text(text) => range(text),
            };
            let good = range.filter(|r| ALL_PORTS.contains(r.start()) && r.start() <= r.end());
            if good.is_none() {
                problems.push(
                    &key,
                    "a port is 1 to 65535, a range is written \"10000-10100\"",
                );
            }
            good
        })
        .collect();
    Some(Rule { cidr: cidr?, ports })
}

/// A bare address is the network of that address alone.
fn cidr(problems: &mut Problems, index: usize, text: &str) -> Option<IpNet> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Some(ip.into());
    }
    read::<IpNet>(problems, format!("allow[{index}].cidr"), text)
}

fn range(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
}

fn times(problems: &mut Problems, backoff: &BackoffLimits, dial: Duration, half_open: Duration) {
    problems.check(
        backoff.min >= Duration::from_millis(10),
        "backoff.min",
        "at least 10ms: a server must not be knocked at in a loop",
    );
    problems.check(
        backoff.max >= backoff.min,
        "backoff.max",
        "must not be less than backoff.min",
    );
    let within = !dial.is_zero() && dial <= LONGEST_DIAL;
    problems.check(within, "timeouts.dial", "must be above 0 and at most 1m");
    problems.check(!half_open.is_zero(), "timeouts.halfOpen", "must be above 0");
}
