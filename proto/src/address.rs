//! Addresses that neither end ever dials for a requester, whatever is configured. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Addresses of metadata services that are not link-local: credentials of the machine are behind them.
const METADATA_V4: [Ipv4Addr; 3] = [
    Ipv4Addr::new(100, 100, 100, 200), // Alibaba Cloud
    Ipv4Addr::new(168, 63, 129, 16),   // Azure
    Ipv4Addr::new(192, 0, 0, 192),     // Oracle Cloud
];
const METADATA_V6: [Ipv6Addr; 3] = [
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254), // AWS
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23),  // AWS, pods
    Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),  // Google Cloud
];

/// Whether the address is link-local, of a cloud's metadata service, multicast, or no address of a host; also in the
/// disguise of IPv6.
#[must_use]
pub fn is_never_dialled(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => is_forbidden_v4(ip),
        IpAddr::V6(ip) => {
            ip.is_unspecified()
                || ip.is_multicast()
                || ip.is_unicast_link_local()
                || METADATA_V6.contains(&ip)
                || embedded(ip).is_some_and(is_forbidden_v4)
        }
    }
}

fn is_forbidden_v4(ip: Ipv4Addr) -> bool {
    // RFC 1122 section 3.2.1.3: 0/8 is "this network", no destination. Linux dials 0.0.0.0 as loopback.
    ip.octets().first() == Some(&0)
        || ip.is_multicast()
        || ip.is_broadcast()
        || ip.is_link_local()
        || METADATA_V4.contains(&ip)
}

/// Whether the address leads to this machine itself, also in the disguise of IPv6.
#[must_use]
pub fn is_loopback(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.is_loopback(),
        IpAddr::V6(ip) => ip.is_loopback() || embedded(ip).is_some_and(|ip| ip.is_loopback()),
    }
}

/// The IPv4 address that a translator or tunnel would take out of that IPv6 address.
fn embedded(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let last = |high: u16, low: u16| Ipv4Addr::from(u32::from(high) << 16 | u32::from(low));
    match ip.segments() {
        [0, 0, 0, 0, 0, 0, 0, 1] => None,
        // RFC 4291 section 2.5.5.1, IPv4-compatible.
        [0, 0, 0, 0, 0, 0, high, low] => Some(last(high, low)),
        // RFC 6052 section 2.1 and RFC 8215, NAT64.
        [0x64, 0xff9b, 0 | 1, .., high, low] => Some(last(high, low)),
        // RFC 3056 section 2, 6to4.
        [0x2002, high, low, ..] => Some(last(high, low)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_disguise_helps() {
        for ip in [
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "2002:a9fe:a9fe::1",
            "::169.254.169.254",
            "fe80::1",
            "fd00:ec2::254",
            "fd00:ec2::23",
            "fd20:ce::254",
            "100.100.100.200",
            "168.63.129.16",
            "0.0.0.0",
            "0.1.2.3",
            "::",
            "224.0.0.1",
            "ff02::1",
            "255.255.255.255",
        ] {
            assert!(is_never_dialled(ip.parse().unwrap()), "{ip}");
        }
        for ip in [
            "127.0.0.1",
            "127.9.9.9",
            "::1",
            "::ffff:127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "::127.0.0.1",
        ] {
            assert!(is_loopback(ip.parse().unwrap()), "{ip}");
        }
        for ip in [
            "10.96.0.1",
            "192.168.1.10",
            "203.0.113.1",
            "fd00::1",
            "2001:db8::1",
            "64:ff9b::a00:1",
        ] {
            let ip = ip.parse().unwrap();
            assert!(!is_never_dialled(ip) && !is_loopback(ip), "{ip}");
        }
    }
}
