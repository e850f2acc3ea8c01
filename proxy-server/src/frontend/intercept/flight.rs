//! What a connection's first bytes say about where it wants to go. Pure: it takes the bytes so far.

use proto::Host;

use super::{client_hello, proxy_header};

/// Most bytes that are read before there is a destination. Go's ClientHello with a post-quantum key share has some
/// 1.5 KiB, one with a large session ticket some more.
pub(super) const MAX: usize = 16 << 10;
/// Most header fields that are looked past.
const MAX_FIELDS: usize = 64;
/// First byte of a TLS connection: a handshake record.
const TLS: u8 = 22;

/// Why bytes have no name to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Malformed {
    /// It begins as TLS and is no ClientHello.
    Tls,
    /// It begins as a request and is no HTTP/1.
    Http,
    /// Neither TLS nor HTTP.
    Neither,
    /// Larger than [`MAX`].
    TooLarge,
    /// A PROXY header where none is taken.
    ProxyHeader,
}

/// What the requester speaks, which decides how it can be told anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Speech {
    /// TLS.
    Tls,
    /// HTTP/1.
    Http,
    /// Something else, or nothing yet.
    Unknown,
}

impl Speech {
    /// By the first byte.
    pub(super) fn of(bytes: &[u8]) -> Self {
        match bytes.first() {
            Some(&TLS) => Self::Tls,
            // Methods are upper-case.
            Some(byte) if byte.is_ascii_uppercase() => Self::Http,
            Some(_) | None => Self::Unknown,
        }
    }
}

/// A host by name, and the port if it was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) host: Host,
    pub(super) port: Option<u16>,
}

/// The name in a first flight. `None`: more bytes are needed. `Some(None)`: there is none. An address is none: whoever
/// dialled one has it as its original destination.
pub(super) fn name(bytes: &[u8]) -> Result<Option<Option<Named>>, Malformed> {
    if proxy_header::is_one(bytes) {
        return Err(Malformed::ProxyHeader);
    }
    let found = match Speech::of(bytes) {
        Speech::Tls => client_hello::server_name(bytes)?.map(|name| named(name?.as_str(), None)),
        Speech::Http => host(bytes)?,
        Speech::Unknown if proxy_header::may_become_one(bytes) => None,
        Speech::Unknown => return Err(Malformed::Neither),
    };
    if found.is_none() && bytes.len() >= MAX {
        return Err(Malformed::TooLarge);
    }
    Ok(found)
}

fn named(host: &str, port: Option<u16>) -> Option<Named> {
    match host.parse() {
        Ok(Host::Name(name)) => Some(Named {
            host: Host::Name(name),
            port,
        }),
        Ok(Host::Ip(_)) | Err(_) => None,
    }
}

/// The `Host` of an HTTP/1 request (RFC 9112 section 3.2): more than one is an error, none is none.
fn host(bytes: &[u8]) -> Result<Option<Option<Named>>, Malformed> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(bytes) {
        Ok(httparse::Status::Partial) => return Ok(None),
        Ok(httparse::Status::Complete(_)) => {}
        Err(httparse::Error::TooManyHeaders) => return Err(Malformed::TooLarge),
        Err(_) => return Err(Malformed::Http),
    }
    let hosts = request.headers.iter();
    let mut hosts = hosts.filter(|field| field.name.eq_ignore_ascii_case("host"));
    let Some(field) = hosts.next() else {
        return Ok(Some(None));
    };
    if hosts.next().is_some() {
        return Err(Malformed::Http);
    }
    let value = std::str::from_utf8(field.value).map_err(|_no_text| Malformed::Http)?;
    let value = value.trim();
    Ok(Some(match value.rsplit_once(':') {
        None => named(value, None),
        Some((host, port)) => match port.parse::<u16>() {
            Ok(0) | Err(_) => None,
            Ok(port) => named(host, Some(port)),
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(host: &str, port: Option<u16>) -> Result<Option<Option<Named>>, Malformed> {
        let host = Host::Name(host.into());
        Ok(Some(Some(Named { host, port })))
    }

    #[test]
    fn the_host_of_a_request_is_read_once_its_head_is_whole() {
        let text =
            b"GET /metrics HTTP/1.1\r\nUser-Agent: x\r\nhOsT:  Edge1:9100 \r\n\r\nbody".as_slice();
        assert_eq!(name(text), at("edge1", Some(9100)));
        for cut in 1..text.len() - 4 {
            assert_eq!(name(&text[..cut]), Ok(None), "{cut}");
        }
        assert_eq!(
            name(b"GET / HTTP/1.1\r\nHost: edge1.\r\n\r\n"),
            at("edge1", None)
        );
    }

    #[test]
    fn addresses_and_nonsense_are_no_names() {
        for host in [
            "10.0.0.1:9100",
            "[::1]:9100",
            "[::1]",
            "::1",
            "",
            "a b",
            "edge1:",
            "edge1:0",
            "edge1:65536",
            "edge1:x",
            "-",
        ] {
            let text = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
            assert_eq!(name(text.as_bytes()), Ok(Some(None)), "{host:?}");
        }
        assert_eq!(name(b"GET / HTTP/1.1\r\n\r\n"), Ok(Some(None)));
        assert_eq!(name(b"GET / HTTP/1.0\r\n\r\n"), Ok(Some(None)));
    }

    #[test]
    fn what_is_no_request_is_said_to_be_none_at_once() {
        let two = b"GET / HTTP/1.1\r\nHost: edge1\r\nHost: edge2\r\n\r\n";
        assert_eq!(name(two), Err(Malformed::Http));
        assert_eq!(name(b"SSH-2.0-OpenSSH_9.6\r\n"), Err(Malformed::Http));
        assert_eq!(
            name(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
            Err(Malformed::Http)
        );
        assert_eq!(name(b"\0\x01"), Err(Malformed::Neither));
        assert_eq!(name(b"get / HTTP/1.1\r\n"), Err(Malformed::Neither));
        assert_eq!(
            name(b"GET / HTTP/1.1\r\nHost: \xff\r\n\r\n"),
            Err(Malformed::Http)
        );
    }

    #[test]
    fn a_head_has_its_limits() {
        let many = format!(
            "GET / HTTP/1.1\r\n{}\r\n",
            "a: b\r\n".repeat(MAX_FIELDS + 1)
        );
        assert_eq!(name(many.as_bytes()), Err(Malformed::TooLarge));
        let long = format!("GET / HTTP/1.1\r\na: {}", "b".repeat(MAX));
        assert_eq!(name(long.as_bytes()), Err(Malformed::TooLarge));
        assert_eq!(name(&long.as_bytes()[..MAX - 1]), Ok(None));
    }

    #[test]
    fn a_proxy_header_is_seen_however_it_is_cut() {
        let v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c";
        let v1 = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n";
        for (header, seen) in [(v2.as_slice(), 12), (v1, 6)] {
            for cut in 1..header.len() {
                let wanted = if cut < seen {
                    Ok(None)
                } else {
                    Err(Malformed::ProxyHeader)
                };
                assert_eq!(name(&header[..cut]), wanted, "{cut}");
            }
        }
    }
}
