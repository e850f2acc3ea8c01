//! One entry of `frontends:`: how requests come in, and from whom.

use std::path::PathBuf;

use daemon::{FileMode, Listen};
use serde::Deserialize;

use super::{Cidr, Rule, defaults};
use crate::frontend::policy::Policy;

/// What happens to a destination that is not at the edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Elsewhere {
    /// It is dialled from here.
    Direct,
    /// It is refused.
    Refuse,
}

/// One way in.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", deny_unknown_fields)]
pub enum Frontend {
    /// HTTP CONNECT, as kube-apiserver's egress selector speaks it.
    #[serde(rename_all = "camelCase")]
    HttpConnect {
        /// A Unix socket, or a TCP address (then mutual TLS, always).
        listen: Listen,
        /// Permission bits of the Unix socket.
        #[serde(default = "defaults::socket_mode")]
        mode: FileMode,
        /// What is not at the edge.
        #[serde(default = "defaults::refuse")]
        default: Elsewhere,
        /// CA of the operator's own PKI, in place of ours.
        #[serde(default)]
        client_ca: Option<PathBuf>,
        /// Names that CA's certificates may have.
        #[serde(default)]
        allowed_names: Vec<String>,
        /// Who may ask for what; without it nobody on TCP, and on a Unix socket whoever may connect.
        #[serde(default)]
        allow: Option<Vec<Rule>>,
    },
    /// konnectivity's gRPC, as kube-apiserver's egress selector speaks it.
    #[serde(rename_all = "camelCase")]
    Konnectivity {
        /// A Unix socket.
        listen: Listen,
        /// Permission bits of the socket.
        #[serde(default = "defaults::konnectivity_mode")]
        mode: FileMode,
        /// What is not at the edge.
        #[serde(default = "defaults::refuse")]
        default: Elsewhere,
        /// Who may ask for what; without it whoever may connect.
        #[serde(default)]
        allow: Option<Vec<Rule>>,
    },
    /// For scrapers: CONNECT and absolute-form requests over TLS.
    #[serde(rename_all = "camelCase")]
    ForwardProxy {
        /// A TCP address.
        listen: Listen,
        /// File of bearer tokens: a name and a digest a line, as `proxy-server credential hash` prints it.
        #[serde(default)]
        bearer_token_file: Option<PathBuf>,
        /// File of passwords, in the same form.
        #[serde(default)]
        basic_auth_file: Option<PathBuf>,
        /// CA of the operator's own PKI, in place of ours.
        #[serde(default)]
        client_ca: Option<PathBuf>,
        /// Names that CA's certificates may have.
        #[serde(default)]
        allowed_names: Vec<String>,
        /// Who may ask for what; without it nobody.
        #[serde(default)]
        allow: Option<Vec<Rule>>,
    },
    /// Connections meant for nodes, led here by DNS or firewall rules.
    Intercept(Intercept),
}

/// Connections meant for nodes, led here by DNS or firewall rules.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Intercept {
    /// A TCP address.
    pub listen: Listen,
    /// Port of the destination, where the request does not say; the one listened on by default.
    #[serde(default)]
    pub port: Option<u16>,
    /// Who may ask for what, by source network; without it nobody.
    #[serde(default)]
    pub allow: Option<Vec<Rule>>,
    /// Stands in a rule of `allow`; refused here.
    #[serde(default)]
    pub from: Option<Vec<Cidr>>,
    /// Load balancers that say whom they speak for.
    #[serde(default)]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Takes what TPROXY rules hand over.
    #[serde(default)]
    pub transparent: bool,
}

/// Whose PROXY headers are believed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProxyProtocol {
    /// Networks of the load balancers. A header is required from them and refused from everybody else.
    pub trusted: Vec<Cidr>,
}

impl Frontend {
    /// Where it listens.
    #[must_use]
    pub const fn listen(&self) -> &Listen {
        match self {
            Self::HttpConnect { listen, .. }
            | Self::Konnectivity { listen, .. }
            | Self::ForwardProxy { listen, .. } => listen,
            Self::Intercept(intercept) => &intercept.listen,
        }
    }

    /// Permission bits, where it can be a Unix socket.
    #[must_use]
    pub const fn mode(&self) -> Option<u32> {
        match self {
            Self::HttpConnect { mode, .. } | Self::Konnectivity { mode, .. } => Some(mode.0),
            Self::ForwardProxy { .. } | Self::Intercept(_) => None,
        }
    }

    /// Whether it takes what TPROXY rules hand over.
    #[must_use]
    pub const fn transparent(&self) -> bool {
        match self {
            Self::HttpConnect { .. } | Self::Konnectivity { .. } | Self::ForwardProxy { .. } => {
                false
            }
            Self::Intercept(intercept) => intercept.transparent,
        }
    }

    /// Its `allow`, if it has one.
    #[must_use]
    pub fn allow(&self) -> Option<&[Rule]> {
        match self {
            Self::HttpConnect { allow, .. }
            | Self::Konnectivity { allow, .. }
            | Self::ForwardProxy { allow, .. } => allow.as_deref(),
            Self::Intercept(intercept) => intercept.allow.as_deref(),
        }
    }

    /// Who may ask for what.
    #[must_use]
    pub fn policy(&self) -> Policy {
        match (self.allow(), self.listen()) {
            (Some(rules), _) => Policy::Listed(rules.to_vec()),
            (None, Listen::Unix(_)) => Policy::Open,
            (None, Listen::Tcp(_)) => Policy::Listed(Vec::new()),
        }
    }

    /// Files it reads, to be watched.
    pub fn files(&self) -> Vec<PathBuf> {
        match self {
            Self::HttpConnect { client_ca, .. } => client_ca.iter().cloned().collect(),
            Self::Konnectivity { .. } => Vec::new(),
            Self::ForwardProxy {
                bearer_token_file,
                basic_auth_file,
                client_ca,
                ..
            } => [bearer_token_file, basic_auth_file, client_ca]
                .into_iter()
                .flatten()
                .cloned()
                .collect(),
            Self::Intercept(_) => Vec::new(),
        }
    }
}
