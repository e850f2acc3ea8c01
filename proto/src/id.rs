//! Names and addresses that the tunnel speaks of. To parse one is to validate it; nothing else makes one.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

/// Why a name or destination was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The host part is missing or no valid name or address.
    #[error("the host is neither a DNS name nor an IP address")]
    Host,
    /// The name is no DNS-1123 subdomain.
    #[error("the name is not lower-case letters, digits, '-' and '.', at most 253 characters")]
    Name,
    /// The name is none of a line.
    #[error("the name is not lower-case letters, digits and '-', 1 to 63 of them")]
    Line,
    /// The port is missing or not within 1 to 65535.
    #[error("the port is missing or not within 1 to 65535")]
    Port,
}

/// The longest DNS name, RFC 1035 section 2.3.4.
const MAX_NAME: usize = 253;
/// The longest DNS label, RFC 1035 section 2.3.4.
const MAX_LABEL: usize = 63;

fn is_dns_name(name: &str) -> bool {
    name.len() <= MAX_NAME
        && name.split('.').all(|label| {
            let alphanumeric = |b: Option<&u8>| {
                b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'_')
            };
            let bytes = label.as_bytes();
            label.len() <= MAX_LABEL
                && alphanumeric(bytes.first())
                && alphanumeric(bytes.last())
                && bytes
                    .iter()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_".contains(b))
        })
}

fn is_line_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !name.is_empty() && name.len() <= MAX_LABEL && name.bytes().all(plain)
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $is_one:ident, $error:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $type(String);

        impl $type {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                if $is_one(text) { Ok(Self(text.to_owned())) } else { Err(IdError::$error) }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name! {
    /// Name of an agent, as its certificate has it. By default also the name of the node it serves.
    AgentName, is_dns_name, Name
}
name! {
    /// Name of a proxy-server, as its certificate has it.
    ServerName, is_dns_name, Name
}
name! {
    /// What a dedicated line is called, by whoever configures it: an agent for its way to a server, a server for its way to
    /// nodes.
    LineName, is_line_name, Line
}

/// Random id of one session, made by the server; 16 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(u64);

impl SessionId {
    /// A new random id.
    #[must_use]
    pub fn random() -> Self {
        Self(rand::random())
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Host part of a destination.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Host {
    /// An address. IPv4-mapped IPv6 addresses are turned into IPv4, so that no rule can be passed by in disguise.
    Ip(IpAddr),
    /// A DNS name in lower case, without a final dot.
    Name(String),
}

impl FromStr for Host {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let bare = text
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        if let Ok(ip) = bare.unwrap_or(text).parse::<IpAddr>() {
            return Ok(Self::Ip(ip.to_canonical()));
        }
        let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        // A name whose last label is a number is some spelling of an IPv4 address (WHATWG URL, "ends in a number").
        let numeric = name
            .rsplit('.')
            .next()
            .is_some_and(|l| l.bytes().all(|b| b.is_ascii_digit()) || l.starts_with("0x"));
        if bare.is_some() || numeric || !is_dns_name(&name) {
            return Err(IdError::Host);
        }
        Ok(Self::Name(name))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]"),
            Self::Ip(IpAddr::V4(ip)) => write!(f, "{ip}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// What a requester asks for: a host and a port, as in `edge1:10250` or `[2001:db8::1]:9100`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Destination {
    /// Name or address.
    pub host: Host,
    /// TCP port, never 0.
    pub port: u16,
}

impl FromStr for Destination {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let (host, port) = text.rsplit_once(':').ok_or(IdError::Port)?;
        // "::1:80" would be read as the host "::1"; RFC 3986 section 3.2.2 wants brackets.
        if host.contains(':') && !host.starts_with('[') {
            return Err(IdError::Host);
        }
        if !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(IdError::Port);
        }
        match port.parse() {
            Ok(0) | Err(_) => Err(IdError::Port),
            Ok(port) => Ok(Self {
                host: host.parse()?,
                port,
            }),
        }
    }
}

impl From<SocketAddr> for Destination {
    fn from(addr: SocketAddr) -> Self {
        Self {
            host: Host::Ip(addr.ip().to_canonical()),
            port: addr.port(),
        }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn destinations_are_read_as_kube_apiserver_writes_them() {
        for (text, shown) in [
            ("edge1:10250", "edge1:10250"),
            ("EDGE1.site.example.:10250", "edge1.site.example:10250"),
            ("192.168.1.10:9100", "192.168.1.10:9100"),
            ("[fd00::1]:10250", "[fd00::1]:10250"),
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
            ("node_1:1", "node_1:1"),
        ] {
            assert_eq!(
                text.parse::<Destination>().unwrap().to_string(),
                shown,
                "{text}"
            );
        }
    }

    #[test]
    fn bad_destinations_are_refused() {
        for text in [
            "",
            ":",
            "edge1",
            "edge1:",
            "edge1:0",
            "edge1:65536",
            "edge1:+1",
            "fd00::1:80",
            "[edge1]:80",
            "a b:80",
            "-a:80",
            "a-:80",
            "a..b:80",
            "ü:80",
            "127.1:80",
            "4711:80",
            "0x7f000001:80",
            "10.0.0.0x1:80",
            "user@edge1:80",
        ] {
            assert!(text.parse::<Destination>().is_err(), "{text}");
        }
        assert!(
            format!("{}:1", "a".repeat(64))
                .parse::<Destination>()
                .is_err()
        );
    }

    #[test]
    fn names_are_dns_names() {
        assert!("edge-1.site".parse::<AgentName>().is_ok());
        for bad in ["", "Edge", "a/b", "a b", "..", "-", &"a".repeat(254)] {
            assert!(bad.parse::<AgentName>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_reads_back(text in "\\PC{0,40}:[0-9]{1,5}") {
            if let Ok(destination) = text.parse::<Destination>() {
                prop_assert_eq!(destination.to_string().parse::<Destination>().unwrap(), destination);
            }
        }

        #[test]
        fn a_line_name_is_short_and_plain(text in "\\PC{0,70}|[a-z0-9-]{0,70}") {
            let plain = text.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '-'));
            let fits = plain && (1..=63).contains(&text.len());
            match text.parse::<LineName>() {
                Ok(name) => prop_assert!(fits && name.as_str() == text),
                Err(error) => prop_assert!(!fits && error == IdError::Line),
            }
        }
    }
}
