//! The node's own addresses: those of its interfaces and those the operator adds.
//!
//! Read from the kernel and kept for a few seconds: addresses come by DHCP and go, and a stream must not cost a dump
//! of all interfaces of a node with hundreds of pods.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Longest time an answer is used for; also how long a new address may stay unknown.
const FRESH: Duration = Duration::from_secs(5);

/// The node's own addresses.
#[derive(Debug)]
pub(crate) struct OwnAddresses {
    read: Mutex<Option<Read>>,
}

/// What the kernel said, and when.
#[derive(Debug)]
struct Read {
    at: Instant,
    addresses: Arc<[IpAddr]>,
}

impl OwnAddresses {
    pub(crate) fn new() -> Self {
        Self {
            read: Mutex::default(),
        }
    }

    /// The addresses: `configured` first, then the interfaces', IPv4 before IPv6, loopback last.
    pub(crate) fn with(&self, configured: &[IpAddr]) -> Vec<IpAddr> {
        let mut all = configured.to_vec();
        for ip in self.interfaces().iter() {
            if !all.contains(ip) {
                all.push(*ip);
            }
        }
        all
    }

    fn interfaces(&self) -> Arc<[IpAddr]> {
        let mut read = self.read.lock();
        if let Some(last) = &*read
            && last.at.elapsed() < FRESH
        {
            return Arc::clone(&last.addresses);
        }
        let addresses: Arc<[IpAddr]> = interface_addresses().into();
        *read = Some(Read {
            at: Instant::now(),
            addresses: Arc::clone(&addresses),
        });
        addresses
    }
}

fn interface_addresses() -> Vec<IpAddr> {
    let interfaces = match nix::ifaddrs::getifaddrs() {
        Ok(interfaces) => interfaces,
        Err(error) => {
            tracing::warn!(%error, "the addresses of the interfaces can't be read");
            return Vec::new();
        }
    };
    let mut addresses: Vec<IpAddr> = interfaces
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        })
        .collect();
    addresses.sort_by_key(|ip| (ip.is_loopback(), ip.is_ipv6(), *ip));
    addresses.dedup();
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_interfaces_and_what_is_configured_are_own() {
        let configured = ["203.0.113.7".parse().unwrap()];
        let own = OwnAddresses::new().with(&configured);
        assert_eq!(own[0], configured[0]);
        assert!(own.contains(&"127.0.0.1".parse().unwrap()), "{own:?}");
        assert!(!own.contains(&"203.0.113.8".parse().unwrap()));
    }
}
