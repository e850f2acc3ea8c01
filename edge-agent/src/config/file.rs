//! What the configuration file may say, as it is written; [`super::Config`] is what it means.

use std::net::IpAddr;
use std::path::PathBuf;

use daemon::{ByteSize, Listen, LogFormat};
use secrecy::SecretString;
use serde::{Deserialize, Deserializer};

/// The whole file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct File {
    pub(super) name: Option<String>,
    pub(super) state_dir: Option<PathBuf>,
    pub(super) trust_domain: Option<String>,
    pub(super) servers: Vec<super::server::Written>,
    pub(super) join: Option<Join>,
    pub(super) credential: Option<super::CredentialFiles>,
    pub(super) node_addresses: Vec<IpAddr>,
    pub(super) localhost_ports: Vec<u16>,
    pub(super) allow: Vec<Allow>,
    pub(super) pods: crate::policy::Pods,
    pub(super) memory: Option<ByteSize>,
    pub(super) timeouts: super::Timeouts,
    pub(super) backoff: super::BackoffLimits,
    pub(super) congestion: Congestion,
    pub(super) drain: super::Drain,
    pub(super) handover: bool,
    pub(super) observe: Endpoint,
    pub(super) admin: Endpoint,
    pub(super) log: Log,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Join {
    #[serde(deserialize_with = "secret")]
    pub(super) token: Option<SecretString>,
    pub(super) token_file: Option<PathBuf>,
    pub(super) service_account_token_file: Option<PathBuf>,
    pub(super) ca_pin: Option<String>,
    pub(super) ca_file: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Allow {
    pub(super) cidr: String,
    pub(super) ports: Vec<Ports>,
}

/// A port, or a range as text.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Ports {
    One(u16),
    Text(String),
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Congestion {
    #[default]
    Cubic,
    Bbr,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Endpoint {
    pub(super) listen: Option<Listen>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Log {
    pub(super) format: Option<LogFormat>,
    pub(super) level: Option<String>,
}

/// secrecy reads no secrets of its own accord.
fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SecretString>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.map(Into::into))
}
