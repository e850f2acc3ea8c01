//! The configuration file of a proxy-server: what it may say, its defaults, and what makes no sense.
//!
//! [`load`] returns values that need no further checks. `docs/configuration.md` explains every key.

mod allow;
mod authority;
mod check;
mod direct;
mod dns;
mod enrol;
mod frontend;
mod kubernetes;
mod lines;
mod peers;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use allow::{Pattern, Ports, Rule};
pub use authority::Authority;
use certs::{Name, TrustDomain};
use daemon::{ByteSize, ConfigError, Listen, LogFormat};
pub use direct::{Direct, Mark};
pub(crate) use dns::is_subdomain;
pub use dns::{Dns, LeaseTimes, ObjectName};
pub use enrol::Enrol;
pub use frontend::{Elsewhere, Frontend, Intercept, ProxyProtocol};
use ipnet::IpNet;
pub use kubernetes::{Kubernetes, NAMESPACE, Pods, Pool, Selector, Services};
pub use lines::{Line, PathMode, PathSettings, Probes, ROUTE};
pub use peers::Peers;
use proto::AgentName;
use serde::Deserialize;

/// Everything a proxy-server is told.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// CA, token store and the server's own leaf.
    #[serde(default = "defaults::state_dir")]
    pub state_dir: PathBuf,
    /// Identity of this server; empty means the host name.
    #[serde(default)]
    pub name: String,
    /// Trust domain of every identity.
    #[serde(default)]
    pub trust_domain: TrustDomain,
    /// What the server's leaf says beside its identity.
    #[serde(default)]
    pub certificate: Certificate,
    /// Where agents come in.
    #[serde(default)]
    pub backend: Backend,
    /// Where requests come in.
    #[serde(default = "defaults::frontends")]
    pub frontends: Vec<Frontend>,
    /// What the cluster knows of its nodes; without it nothing of Kubernetes is asked.
    #[serde(default)]
    pub kubernetes: Option<Kubernetes>,
    /// Other proxy-servers beside this one.
    #[serde(default)]
    pub peers: Option<Peers>,
    /// Nodes whose agent has another name, or that are asked for by address. They go before what the cluster says.
    #[serde(default)]
    pub routes: Vec<RouteEntry>,
    /// How what is not at the edge is dialled.
    #[serde(default)]
    pub direct: Direct,
    /// Ways to nodes beside the tunnel.
    #[serde(default)]
    pub lines: Vec<Line>,
    /// When they are taken.
    #[serde(default)]
    pub path: PathSettings,
    /// Time limits of a request.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// How many at once.
    #[serde(default)]
    pub limits: Limits,
    /// How to stop.
    #[serde(default)]
    pub drain: Drain,
    /// Another process of this configuration may run until this one has taken over.
    #[serde(default)]
    pub handover: bool,
    /// livez, readyz, metrics.
    #[serde(default)]
    pub observe: Observe,
    /// Sessions and log level, for operators on this machine.
    #[serde(default)]
    pub admin: Admin,
    /// Logging.
    #[serde(default)]
    pub log: Log,
}

/// Extra SANs of the server's leaf, for CONNECT clients over TLS.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Certificate {
    /// DNS names.
    pub dns_names: Vec<String>,
    /// Addresses.
    pub ip_addresses: Vec<IpAddr>,
}

/// Where agents come in.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Backend {
    /// QUIC on UDP and enrolment on TCP, at each of these addresses. None: a server with frontends only.
    pub listen: Vec<SocketAddr>,
    /// Silence after which a session is lost.
    #[serde(with = "humantime_serde")]
    pub idle_timeout: Duration,
    /// How long an expired certificate is still good for its renewal.
    #[serde(with = "humantime_serde")]
    pub renew_grace: Duration,
    /// Bound of what unread bytes cost.
    pub memory: ByteSize,
}

impl Default for Backend {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from((Ipv4Addr::UNSPECIFIED, 8443))],
            idle_timeout: Duration::from_secs(120),
            renew_grace: Duration::from_secs(30 * 24 * 3600),
            memory: ByteSize(256 << 20),
        }
    }
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RouteEntry {
    /// Its name, as kube-apiserver asks for it.
    pub node: String,
    /// Its agent; empty means the agent of the same name.
    #[serde(default)]
    pub agent: Option<String>,
    /// Addresses and CIDRs that lead to it.
    #[serde(default)]
    pub addresses: Vec<Cidr>,
}

impl RouteEntry {
    /// Who serves it; `None` if neither name is one (refused by [`load`]).
    #[must_use]
    pub fn agent(&self) -> Option<AgentName> {
        self.agent.as_deref().unwrap_or(&self.node).parse().ok()
    }
}

/// An address or a CIDR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Cidr(pub IpNet);

impl TryFrom<String> for Cidr {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let net = text
            .parse::<IpNet>()
            .or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        net.map(|net| Self(canonical(net).trunc()))
            .map_err(|_neither| format!("{text:?} is neither an address nor a CIDR"))
    }
}

/// IPv4 that is written as IPv6 is IPv4, as in addresses that are compared with it.
fn canonical(net: IpNet) -> IpNet {
    const MAPPED: u8 = 96;
    let v4 = net.addr().to_canonical();
    let len = net.prefix_len().checked_sub(MAPPED);
    let mapped = len.filter(|_| net.addr().is_ipv6() && v4.is_ipv4());
    mapped
        .and_then(|len| IpNet::new(v4, len).ok())
        .unwrap_or(net)
}

/// Time limits of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Timeouts {
    /// For the request's head, TLS handshake included.
    #[serde(with = "humantime_serde")]
    pub header: Duration,
    /// From the request to the destination's answer.
    #[serde(with = "humantime_serde")]
    pub dial: Duration,
    /// Longest silence of a half-closed stream.
    #[serde(with = "humantime_serde")]
    pub half_open: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            header: Duration::from_secs(10),
            dial: Duration::from_secs(15),
            half_open: Duration::from_secs(600),
        }
    }
}

/// How many at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Limits {
    /// Streams open, in all.
    pub streams: usize,
    /// Streams being opened, in all.
    pub pending_dials: usize,
    /// Connections of a frontend.
    pub connections: usize,
    /// QUIC handshakes at once.
    pub handshakes: usize,
    /// New sessions a second.
    pub sessions_per_second: u32,
    /// Sessions of one agent.
    pub sessions_per_agent: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            streams: 16_384,
            pending_dials: 4_096,
            connections: 16_384,
            handshakes: 256,
            sessions_per_second: 500,
            sessions_per_agent: 4,
        }
    }
}

/// How to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Drain {
    /// How long requests are still accepted, so that load balancers notice and agents are elsewhere.
    #[serde(with = "humantime_serde")]
    pub min_delay: Duration,
    /// How long streams may go on after that.
    #[serde(with = "humantime_serde")]
    pub grace: Duration,
}

impl Default for Drain {
    fn default() -> Self {
        Self {
            min_delay: Duration::from_secs(2),
            grace: Duration::from_secs(30),
        }
    }
}

/// livez, readyz, metrics.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Observe {
    /// Where.
    pub listen: Listen,
}

impl Default for Observe {
    fn default() -> Self {
        Self {
            listen: Listen::Tcp(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 9440))),
        }
    }
}

/// Sessions and log level, for operators on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Admin {
    /// A loopback address.
    pub listen: Listen,
    /// A Unix socket; `status` uses it.
    pub socket: Option<PathBuf>,
}

/// Where `status` looks for the admin socket.
pub const ADMIN_SOCKET: &str = "/run/corvid/admin.sock";

impl Default for Admin {
    fn default() -> Self {
        Self {
            listen: Listen::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 9442))),
            socket: Some(ADMIN_SOCKET.into()),
        }
    }
}

/// Logging.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Log {
    /// text or json.
    pub format: LogFormat,
    /// A level, or a filter like `info,proto=debug`.
    pub level: String,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            format: LogFormat::default(),
            level: "info".to_owned(),
        }
    }
}

mod defaults {
    use std::path::PathBuf;

    use daemon::{FileMode, Listen};

    use super::{Elsewhere, Frontend};

    pub(super) fn state_dir() -> PathBuf {
        "/var/lib/corvid".into()
    }

    pub(super) const fn socket_mode() -> FileMode {
        // Owner and group, as konnectivity-server's socket: kube-apiserver needs to write.
        FileMode(0o660)
    }

    pub(super) const fn konnectivity_mode() -> FileMode {
        // That of konnectivity-server's socket, so that one can take the other's place.
        FileMode(0o770)
    }

    pub(super) const fn refuse() -> Elsewhere {
        Elsewhere::Refuse
    }

    pub(super) fn frontends() -> Vec<Frontend> {
        vec![Frontend::HttpConnect {
            listen: Listen::Unix("/run/corvid/connect.sock".into()),
            mode: socket_mode(),
            default: Elsewhere::Direct,
            client_ca: None,
            allowed_names: Vec::new(),
            allow: None,
        }]
    }
}

/// What flags and `CORVID_*` variables say over the file.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `--state-dir`
    pub state_dir: Option<PathBuf>,
    /// `--name`
    pub name: Option<String>,
    /// `--log-level`
    pub log_level: Option<String>,
    /// `--log-format`
    pub log_format: Option<LogFormat>,
}

/// Reads and checks the file.
///
/// # Errors
/// A mistake of form with its place, or every mistake of meaning at once.
pub fn load(file: &Path, overrides: &Overrides) -> Result<Config, ConfigError> {
    let mut config: Config = daemon::config::load(file)?;
    overrides.apply(&mut config);
    check::check(&config, file)?;
    Ok(config)
}

impl Overrides {
    fn apply(&self, config: &mut Config) {
        if let Some(state_dir) = &self.state_dir {
            config.state_dir.clone_from(state_dir);
        }
        if let Some(name) = &self.name {
            config.name.clone_from(name);
        }
        if config.name.is_empty() {
            config.name = host_name();
        }
        if let Some(level) = &self.log_level {
            config.log.level.clone_from(level);
        }
        if let Some(format) = self.log_format {
            config.log.format = format;
        }
    }
}

impl Config {
    /// The server's name; [`load`] has made sure that it is one.
    ///
    /// # Errors
    /// If this value did not come from [`load`].
    pub fn server_name(&self) -> Result<Name, certs::IdentityError> {
        Name::parse(&self.name)
    }
}

/// The machine's name in lower case.
fn host_name() -> String {
    nix::unistd::gethostname()
        .map(|name| name.to_string_lossy().to_ascii_lowercase())
        .unwrap_or_default()
}
