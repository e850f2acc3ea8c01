//! The PROXY protocol, versions 1 and 2 (haproxy.org, doc/proxy-protocol.txt): what a load balancer says about the
//! connection that it passes on. Pure: it takes the bytes so far.
//!
//! A receiver must not guess whether there is a header (section 2 of the specification): whether one is required or
//! refused follows from the source address alone. Read by hand: the header is a dozen fixed fields, and the address block
//! of `LOCAL` has to be skipped whatever it holds.

use std::net::{IpAddr, SocketAddr};

/// First bytes of version 2.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// First bytes of version 1.
const WORD: &[u8; 6] = b"PROXY ";
/// Longest line of version 1, its end included.
const MAX_LINE: usize = 107;
/// Signature, version and command, family, length.
const FIXED: usize = 16;
/// Longest rest of version 2 that is taken: addresses have 36 bytes, then come TLVs of the load balancer.
const MAX_REST: usize = 2048;

/// The bytes are no PROXY header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NoHeader;

/// Who speaks to whom, in the load balancer's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
}

/// Whether the bytes begin with a header.
pub(super) fn is_one(bytes: &[u8]) -> bool {
    bytes.starts_with(SIGNATURE) || bytes.starts_with(WORD)
}

/// Whether more bytes may make it one.
pub(super) fn may_become_one(bytes: &[u8]) -> bool {
    SIGNATURE.starts_with(bytes) || WORD.starts_with(bytes)
}

/// The header and its length; `None`: it is not whole yet. Without ends it is `LOCAL`, `UNKNOWN` or of another family than
/// IP: the connection's own ends count.
pub(super) fn parse(bytes: &[u8]) -> Result<Option<(Option<Ends>, usize)>, NoHeader> {
    if bytes.starts_with(SIGNATURE) {
        binary(bytes)
    } else if bytes.starts_with(WORD) {
        line(bytes)
    } else if may_become_one(bytes) {
        Ok(None)
    } else {
        Err(NoHeader)
    }
}

/// `PROXY TCP4 192.0.2.1 203.0.113.9 51000 10250\r\n`
fn line(bytes: &[u8]) -> Result<Option<(Option<Ends>, usize)>, NoHeader> {
    let most = bytes.get(..MAX_LINE).unwrap_or(bytes);
    let Some(end) = most.windows(2).position(|pair| pair == b"\r\n") else {
        return if most.len() < MAX_LINE {
            Ok(None)
        } else {
            Err(NoHeader)
        };
    };
    let text = bytes
        .get(WORD.len()..end)
        .and_then(|text| std::str::from_utf8(text).ok())
        .ok_or(NoHeader)?;
    let length = end + 2;
    let words: Vec<&str> = text.split(' ').collect();
    match words.as_slice() {
        // The rest of the line is to be ignored.
        ["UNKNOWN", ..] => Ok(Some((None, length))),
        [family, source, destination, from, to] => {
            let address = |ip: &str, port: &str| {
                let ip: IpAddr = ip.parse().ok()?;
                let fits = match *family {
                    "TCP4" => ip.is_ipv4(),
                    "TCP6" => ip.is_ipv6(),
                    _ => false,
                };
                let digits = port.bytes().all(|byte| byte.is_ascii_digit());
                let port = port.parse().ok().filter(|_| digits)?;
                fits.then_some(SocketAddr::new(ip, port))
            };
            let ends = address(source, from).zip(address(destination, to));
            let (source, destination) = ends.ok_or(NoHeader)?;
            let ends = Ends {
                source,
                destination,
            };
            Ok(Some((Some(ends), length)))
        }
        _ => Err(NoHeader),
    }
}

fn binary(bytes: &[u8]) -> Result<Option<(Option<Ends>, usize)>, NoHeader> {
    let Some(fixed) = bytes.first_chunk::<FIXED>() else {
        return Ok(None);
    };
    let [.., command, family, high, low] = *fixed;
    let rest = usize::from(u16::from_be_bytes([high, low]));
    // "The receiver must drop connections with anything unexpected in version and command."
    if rest > MAX_REST || !matches!(command, 0x20 | 0x21) {
        return Err(NoHeader);
    }
    let Some(rest) = bytes.get(FIXED..FIXED + rest) else {
        return Ok(None);
    };
    let length = FIXED + rest.len();
    let ends = match (command, family) {
        // LOCAL: the load balancer speaks for itself, as health checks do; the addresses are to be skipped.
        (0x20, _) => None,
        (_, 0x11) => Some(addresses::<4>(rest).ok_or(NoHeader)?),
        (_, 0x21) => Some(addresses::<16>(rest).ok_or(NoHeader)?),
        // Datagrams, Unix sockets, unspecified.
        (_, _) => None,
    };
    Ok(Some((ends, length)))
}

/// Source, destination, source port, destination port.
fn addresses<const N: usize>(bytes: &[u8]) -> Option<Ends>
where
    IpAddr: From<[u8; N]>,
{
    let (source, rest) = bytes.split_first_chunk::<N>()?;
    let (destination, rest) = rest.split_first_chunk::<N>()?;
    let (from, rest) = rest.split_first_chunk::<2>()?;
    let to = rest.first_chunk::<2>()?;
    Some(Ends {
        source: SocketAddr::new((*source).into(), u16::from_be_bytes(*from)),
        destination: SocketAddr::new((*destination).into(), u16::from_be_bytes(*to)),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ends(source: &str, destination: &str) -> Option<Ends> {
        Some(Ends {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
        })
    }

    /// A header of version 2.
    fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [SIGNATURE.as_slice(), &[command, family], &length, rest].concat()
    }

    /// It is a whole header that says so, and nothing less is.
    fn whole(bytes: &[u8], wanted: Option<Ends>) {
        let length = bytes.len();
        assert_eq!(parse(bytes), Ok(Some((wanted, length))));
        for cut in 0..length {
            assert_eq!(parse(&bytes[..cut]), Ok(None), "cut at {cut}");
        }
        let more = [bytes, b"\x16\x03\x01"].concat();
        assert_eq!(
            parse(&more),
            Ok(Some((wanted, length))),
            "what follows is not touched"
        );
    }

    #[test]
    fn version_1() {
        whole(
            b"PROXY TCP4 192.0.2.1 203.0.113.9 51000 10250\r\n",
            ends("192.0.2.1:51000", "203.0.113.9:10250"),
        );
        whole(
            b"PROXY TCP6 2001:db8::1 2001:db8::2 1 65535\r\n",
            ends("[2001:db8::1]:1", "[2001:db8::2]:65535"),
        );
        whole(b"PROXY UNKNOWN\r\n", None);
        whole(b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", None);
    }

    #[test]
    fn version_2() {
        let mut four = [192, 0, 2, 1, 203, 0, 113, 9].to_vec();
        four.extend([0xc7, 0x38, 0x28, 0x0a]);
        let wanted = ends("192.0.2.1:51000", "203.0.113.9:10250");
        whole(&v2(0x21, 0x11, &four), wanted);
        let tlv = [four.as_slice(), &[0x04, 0, 2, 1, 2]].concat();
        // TLVs are skipped.
        whole(&v2(0x21, 0x11, &tlv), wanted);
        // LOCAL, with addresses, without, with anything.
        whole(&v2(0x20, 0x11, &four), None);
        whole(&v2(0x20, 0x00, &[]), None);
        whole(&v2(0x20, 0x21, &[1]), None);
        // Unix sockets.
        whole(&v2(0x21, 0x31, &[0; 216]), None);
        let mut six = vec![0; 36];
        (six[15], six[31], six[33], six[35]) = (1, 2, 3, 4);
        whole(&v2(0x21, 0x21, &six), ends("[::1]:3", "[::2]:4"));
    }

    #[test]
    fn anything_else_is_no_header() {
        let short = v2(0x21, 0x11, &[0; 11]);
        let huge = [SIGNATURE.as_slice(), &[0x21, 0x11, 0xff, 0xff]].concat();
        let version = v2(0x31, 0x11, &[0; 12]);
        let command = v2(0x22, 0x11, &[0; 12]);
        let long = [b"PROXY UNKNOWN ".as_slice(), &[b'x'; 100]].concat();
        for bytes in [
            b"GET / HTTP/1.1\r\n".as_slice(),
            b"\x16\x03\x01",
            b"PROXX",
            b"PROXY TCP4 192.0.2.1 203.0.113.9 51000\r\n",
            b"PROXY TCP4 2001:db8::1 2001:db8::2 1 2\r\n",
            b"PROXY TCP6 192.0.2.1 203.0.113.9 1 2\r\n",
            b"PROXY TCP4 192.0.2.1 203.0.113.9 +1 2\r\n",
            b"PROXY TCP4 192.0.2.1 203.0.113.9 65536 2\r\n",
            b"PROXY TCP4  192.0.2.1 203.0.113.9 1 2\r\n",
            b"PROXY UDP4 192.0.2.1 203.0.113.9 1 2\r\n",
            b"PROXY \xff\r\n",
            &short,
            &huge,
            &version,
            &command,
            &long,
        ] {
            assert_eq!(parse(bytes), Err(NoHeader), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(version in 0..3, bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let start: &[u8] = match version { 0 => b"", 1 => WORD, _ => SIGNATURE };
            let all = [start, &bytes].concat();
            if let Ok(Some((_, length))) = parse(&all) {
                prop_assert!(length <= all.len());
            }
        }
    }
}
