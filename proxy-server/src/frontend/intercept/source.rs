//! Who may connect: the one place that says so for intercepted connections, which carry no credentials.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use proto::Reason;

use crate::config::Cidr;
use crate::error::Refusal;

/// Source networks.
#[derive(Debug, Default)]
pub(super) struct Networks(Vec<IpNet>);

impl Networks {
    pub(super) fn new<'a>(cidrs: impl IntoIterator<Item = &'a Cidr>) -> Self {
        Self(cidrs.into_iter().map(|cidr| cidr.0).collect())
    }

    /// IPv4 addresses count as such on an IPv6 socket too.
    pub(super) fn contains(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        self.0.iter().any(|net| net.contains(&ip))
    }
}

/// Whether a source may connect; nobody may that is not named.
pub(super) fn admit(from: &Networks, source: SocketAddr) -> Result<(), Refusal> {
    if from.contains(source.ip()) {
        return Ok(());
    }
    let subject = format!("source {}", source.ip().to_canonical());
    let detail = "its network is in no rule's `from`";
    Err(Refusal::detailed(subject, Reason::NotAllowed, detail))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_may_that_is_not_named() {
        let cidr = |text: &str| Cidr::try_from(text.to_owned()).unwrap();
        let from = Networks::new(&[cidr("10.0.0.0/8"), cidr("fd00::1")]);
        for (source, may) in [
            ("10.1.2.3:1", true),
            ("[::ffff:10.1.2.3]:1", true),
            ("[fd00::1]:1", true),
            ("[fd00::2]:1", false),
            ("11.0.0.1:1", false),
        ] {
            assert_eq!(
                admit(&from, source.parse().unwrap()).is_ok(),
                may,
                "{source}"
            );
        }
        let refusal = admit(&Networks::default(), "127.0.0.1:1".parse().unwrap()).unwrap_err();
        assert_eq!(refusal.reason, Reason::NotAllowed);
    }
}
