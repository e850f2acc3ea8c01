//! Where a service listens: a TCP address or the path of a Unix socket.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::de::{self, Deserialize, Deserializer};
use serde::{Serialize, Serializer};

/// Longest path of a Unix socket: `sun_path` has 108 bytes, one of them the final NUL (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// An address to listen on, or to reach what listens there.
///
/// ```
/// let unix: daemon::Listen = "unix:/run/corvid/admin.sock".parse()?;
/// let tcp: daemon::Listen = "127.0.0.1:9442".parse()?;
/// assert_eq!((unix.port(), tcp.port()), (None, Some(9442)));
/// # Ok::<(), daemon::config::ListenError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Listen {
    /// `tcp:address:port`, or bare `address:port`; port 0 lets the system choose.
    Tcp(SocketAddr),
    /// `unix:/absolute/path`.
    Unix(PathBuf),
}

/// The text is not an address to listen on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListenError {
    /// Not `address:port`.
    #[error("`{0}` is not host:port with a numeric host, such as 0.0.0.0:8444 or [::]:8444")]
    Address(String),
    /// A path that is not absolute.
    #[error(
        "the path of a unix socket must be absolute, such as unix:/run/corvid/connect.sock, not `{0}`"
    )]
    Relative(String),
    /// A path that the kernel cannot hold.
    #[error("the path of a unix socket must not be longer than {MAX_SOCKET_PATH} bytes")]
    TooLong,
}

impl Listen {
    /// The port; Unix sockets have none.
    pub const fn port(&self) -> Option<u16> {
        match self {
            Self::Tcp(addr) => Some(addr.port()),
            Self::Unix(_) => None,
        }
    }

    /// The TCP address; Unix sockets have none.
    pub const fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(addr) => Some(*addr),
            Self::Unix(_) => None,
        }
    }
}

impl From<SocketAddr> for Listen {
    fn from(addr: SocketAddr) -> Self {
        Self::Tcp(addr)
    }
}

impl FromStr for Listen {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(path) = text.strip_prefix("unix:") {
            return if !path.starts_with('/') {
                Err(ListenError::Relative(path.to_owned()))
            } else if path.len() > MAX_SOCKET_PATH {
                Err(ListenError::TooLong)
            } else {
                Ok(Self::Unix(PathBuf::from(path)))
            };
        }
        let addr = text.strip_prefix("tcp:").unwrap_or(text);
        addr.parse()
            .map(Self::Tcp)
            .ok()
            .ok_or_else(|| ListenError::Address(text.to_owned()))
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => write!(f, "tcp:{addr}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Serialize for Listen {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Listen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_printed() {
        for (text, printed) in [
            ("tcp:0.0.0.0:8444", "tcp:0.0.0.0:8444"),
            ("127.0.0.1:0", "tcp:127.0.0.1:0"),
            ("[::1]:9440", "tcp:[::1]:9440"),
            ("unix:/run/a.sock", "unix:/run/a.sock"),
        ] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), printed);
        }
    }

    #[test]
    fn what_cannot_be_listened_on_is_refused_with_a_sentence() {
        assert!(matches!(
            "localhost:80".parse::<Listen>(),
            Err(ListenError::Address(_))
        ));
        assert!(matches!(
            "8443".parse::<Listen>(),
            Err(ListenError::Address(_))
        ));
        assert!(matches!(
            "unix:a.sock".parse::<Listen>(),
            Err(ListenError::Relative(_))
        ));
        let long = format!("unix:/{}", "a".repeat(107));
        assert_eq!(long.parse::<Listen>(), Err(ListenError::TooLong));
    }
}
