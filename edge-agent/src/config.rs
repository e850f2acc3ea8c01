//! The configuration of an edge-agent: [`load`] returns values that need no further checks.
//!
//! A syntax mistake is reported with its line, all mistakes of meaning at once. `docs/configuration.md` explains
//! every key.

mod check;
mod file;
mod server;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use certs::{Name, Pin, TrustDomain};
use daemon::{ConfigError, Listen, LogFormat};
use proto::transport::quic::Congestion;
use secrecy::SecretString;
use serde::Deserialize;
pub use server::Server;

use crate::policy::{Pods, Rule};

/// Where state is kept unless told otherwise; the systemd unit's `StateDirectory`.
pub const STATE_DIR: &str = "/var/lib/corvid-agent";

/// Everything an edge-agent is told.
#[derive(Debug, Clone)]
pub struct Config {
    /// The agent's name, which is the node's and the certificate's.
    pub name: Name,
    /// Credential, trust bundle and last server time.
    pub state_dir: PathBuf,
    /// Trust domain of every identity.
    pub trust_domain: TrustDomain,
    /// Where proxy-servers are.
    pub servers: Vec<Server>,
    /// How to get the first credential.
    pub join: Option<Join>,
    /// An existing credential, renewed by the operator.
    pub credential: Option<CredentialFiles>,
    /// Own addresses beside those of the interfaces.
    pub node_addresses: Vec<IpAddr>,
    /// Ports of this node that are dialled at 127.0.0.1 whatever own address was asked for.
    pub localhost_ports: Vec<u16>,
    /// Destinations allowed beside the default.
    pub allow: Vec<Rule>,
    /// Pods that are dialled without a rule.
    pub pods: Pods,
    /// Bound of what unread bytes cost.
    pub memory: u64,
    /// Time limits of a stream.
    pub timeouts: Timeouts,
    /// Pauses between attempts to reach a server.
    pub backoff: BackoffLimits,
    /// How the agent sends.
    pub congestion: Congestion,
    /// How to stop.
    pub drain: Drain,
    /// Another agent of this configuration may run until this one has taken over.
    pub handover: bool,
    /// livez, readyz, metrics.
    pub observe: Listen,
    /// Sessions and log level, for operators on this machine.
    pub admin: Listen,
    /// Format of the log.
    pub log_format: LogFormat,
    /// Filter of the log.
    pub log_level: String,
}

/// A token and the authority to expect.
#[derive(Debug, Clone)]
pub struct Join {
    /// Where the token is.
    pub token: TokenSource,
    /// By what the proxy-server's authority is known.
    pub anchor: Anchor,
}

/// By what the proxy-server's authority is known at first.
#[derive(Debug, Clone)]
pub enum Anchor {
    /// The pin of its key.
    Pin(Pin),
    /// A file with its roots, PEM, that somebody keeps current; followed while the agent runs.
    File(PathBuf),
}

/// Where a token is.
#[derive(Debug, Clone)]
pub enum TokenSource {
    /// In a file, read anew at each attempt, so that an operator can replace it.
    File(PathBuf),
    /// Given.
    Value(SecretString),
    /// A projected ServiceAccount token, which the kubelet replaces; read anew at each attempt.
    ServiceAccount(PathBuf),
}

/// Files of a credential that somebody else issues and renews; reloaded on change.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CredentialFiles {
    /// Chain, leaf first, PEM.
    pub certificate: PathBuf,
    /// Private key, PEM.
    pub key: PathBuf,
    /// Roots that servers must come from, PEM.
    pub ca: PathBuf,
}

/// Time limits of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Timeouts {
    /// For the dial of a destination, names resolved included.
    #[serde(with = "humantime_serde")]
    pub dial: Duration,
    /// Silence after which a stream with one way closed ends.
    #[serde(with = "humantime_serde")]
    pub half_open: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            dial: Duration::from_secs(10),
            half_open: Duration::from_secs(600),
        }
    }
}

/// Pauses between attempts to reach a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BackoffLimits {
    /// The shortest.
    #[serde(with = "humantime_serde")]
    pub min: Duration,
    /// The longest.
    #[serde(with = "humantime_serde")]
    pub max: Duration,
}

impl Default for BackoffLimits {
    fn default() -> Self {
        Self {
            min: Duration::from_millis(500),
            max: Duration::from_secs(30),
        }
    }
}

/// How to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Drain {
    /// How long open streams may go on.
    #[serde(with = "humantime_serde")]
    pub grace: Duration,
}

impl Default for Drain {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(30),
        }
    }
}

/// What flags and environment variables say in place of the file.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `name`
    pub name: Option<String>,
    /// `stateDir`
    pub state_dir: Option<PathBuf>,
    /// `servers`, each as `[LINE=]HOST:PORT`; empty keeps the file's.
    pub servers: Vec<String>,
    /// `nodeAddresses`; empty keeps the file's.
    pub node_addresses: Vec<IpAddr>,
    /// `join.token`
    pub join_token: Option<SecretString>,
    /// `join.tokenFile`
    pub join_token_file: Option<PathBuf>,
    /// `join.serviceAccountTokenFile`
    pub service_account_token_file: Option<PathBuf>,
    /// `join.caPin`
    pub ca_pin: Option<String>,
    /// `join.caFile`
    pub ca_file: Option<PathBuf>,
    /// `log.format`
    pub log_format: Option<LogFormat>,
    /// `log.level`
    pub log_level: Option<String>,
}

/// Reads and checks a configuration file.
///
/// # Errors
/// [`ConfigError`], with every mistake of meaning.
pub fn load(path: &Path, overrides: &Overrides) -> Result<Config, ConfigError> {
    check::config(path, daemon::config::load(path)?, overrides)
}

/// As [`load`], from text; `path` is only named in errors.
///
/// # Errors
/// As [`load`].
pub fn parse(path: &Path, text: &str, overrides: &Overrides) -> Result<Config, ConfigError> {
    check::config(path, daemon::config::parse(path, text)?, overrides)
}

impl Config {
    /// The keys that differ in `new` and that a running agent does not take over.
    #[must_use]
    pub fn fixed_differences(&self, new: &Self) -> Vec<&'static str> {
        let differs = [
            ("name", self.name != new.name),
            ("stateDir", self.state_dir != new.state_dir),
            ("trustDomain", self.trust_domain != new.trust_domain),
            ("credential", self.credential != new.credential),
            ("memory", self.memory != new.memory),
            ("timeouts", self.timeouts != new.timeouts),
            ("backoff", self.backoff != new.backoff),
            ("congestion", self.congestion != new.congestion),
            ("drain", self.drain != new.drain),
            ("handover", self.handover != new.handover),
            ("observe", self.observe != new.observe),
            ("admin", self.admin != new.admin),
            ("log.format", self.log_format != new.log_format),
        ];
        differs
            .into_iter()
            .filter_map(|(key, differs)| differs.then_some(key))
            .collect()
    }
}

#[cfg(test)]
mod tests;
