//! What is written to the cluster: `kubernetes.dns` and `kubernetes.lease`.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use daemon::Problems;
use serde::Deserialize;

/// Node names as a `hosts` map for CoreDNS. Without this section nothing is written to the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Dns {
    /// The ConfigMap.
    pub config_map: ObjectName,
    /// Its key.
    pub key: String,
    /// Where names of nodes at the edge point.
    pub addresses: Vec<IpAddr>,
    /// The Service whose ClusterIPs are those addresses.
    pub service: Option<ObjectName>,
    /// Domains in which nodes may have further names.
    pub domains: Vec<String>,
}

impl Default for Dns {
    fn default() -> Self {
        Self {
            // Those of OpenYurt's Raven, so that CoreDNS need not be told anything new.
            config_map: ObjectName {
                namespace: "kube-system".to_owned(),
                name: "edge-tunnel-nodes".to_owned(),
            },
            key: "tunnel-nodes".to_owned(),
            addresses: Vec::new(),
            service: None,
            domains: Vec::new(),
        }
    }
}

/// How long what may take in the election of the one server that writes; the defaults are those of Kubernetes' own
/// controllers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LeaseTimes {
    /// How long others wait for a leader that does not renew, before one of them takes over.
    #[serde(with = "humantime_serde")]
    pub duration: Duration,
    /// After so long without a renewal a leader stops leading by itself.
    #[serde(with = "humantime_serde")]
    pub renew_deadline: Duration,
    /// Between two looks at the Lease.
    #[serde(with = "humantime_serde")]
    pub retry_period: Duration,
}

impl Default for LeaseTimes {
    fn default() -> Self {
        Self {
            duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry_period: Duration::from_secs(2),
        }
    }
}

/// An object of the cluster: `NAMESPACE/NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct ObjectName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl TryFrom<String> for ObjectName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.split_once('/') {
            Some((namespace, name)) if is_label(namespace) && is_subdomain(name) => Ok(Self {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
            }),
            Some(_) | None => Err(format!("{text:?} is not NAMESPACE/NAME")),
        }
    }
}

/// RFC 1123, as Kubernetes has it: names of namespaces.
pub(super) fn is_label(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let (bytes, ends) = (text.as_bytes(), [text.bytes().next(), text.bytes().last()]);
    bytes.len() <= 63
        && ends.iter().all(|end| end.is_some_and(plain))
        && bytes.iter().all(|b| plain(*b) || *b == b'-')
}

/// RFC 1123, as Kubernetes has it: names of most objects.
pub(crate) fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_label)
}

fn is_key(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    let dots = text == "." || text.starts_with("..");
    (1..=253).contains(&text.len()) && !dots && text.bytes().all(plain)
}

pub(super) fn check(dns: &Dns, problems: &mut Problems) {
    problems.check(
        dns.addresses.is_empty() == dns.service.is_some(),
        "kubernetes.dns",
        "say where names of edge nodes point: either addresses: [ADDRESS] or service: NAMESPACE/NAME",
    );
    for (i, address) in dns.addresses.iter().enumerate() {
        problems.check(
            !address.is_unspecified() && !address.is_multicast(),
            format!("kubernetes.dns.addresses[{i}]"),
            format!("nobody can connect to {address}"),
        );
    }
    problems.check(
        is_key(&dns.key),
        "kubernetes.dns.key",
        format!("{:?} is no key of a ConfigMap", dns.key),
    );
    for (i, domain) in dns.domains.iter().enumerate() {
        problems.check(
            is_subdomain(domain),
            format!("kubernetes.dns.domains[{i}]"),
            format!("{domain:?} is no domain; write it in lower case, without a dot at either end"),
        );
    }
}

pub(super) fn check_times(times: &LeaseTimes, problems: &mut Problems) {
    let LeaseTimes {
        duration,
        renew_deadline,
        retry_period,
    } = *times;
    // A Lease holds whole seconds, as an i32.
    problems.check(
        duration.subsec_nanos() == 0 && (1..=3600).contains(&duration.as_secs()),
        "kubernetes.lease.duration",
        "must be whole seconds, 1s to 1h",
    );
    problems.check(
        renew_deadline < duration,
        "kubernetes.lease.renewDeadline",
        "must be less than duration: a leader stops before another begins",
    );
    problems.check(
        !retry_period.is_zero() && retry_period.saturating_mul(2) <= renew_deadline,
        "kubernetes.lease.retryPeriod",
        "must be more than 0 and at most half of renewDeadline",
    );
}

#[cfg(test)]
mod tests {
    use super::super::kubernetes::tests::problems;
    use super::*;

    #[test]
    fn the_defaults_are_those_of_raven_and_of_kubernetes() {
        let dns = Dns::default();
        assert_eq!(dns.config_map.to_string(), "kube-system/edge-tunnel-nodes");
        assert_eq!(dns.key, "tunnel-nodes");
        for good in [
            "inCluster: true",
            "{inCluster: true, dns: {service: corvid/proxy-server}}",
            "{inCluster: true, dns: {addresses: [10.96.0.50, 'fd00::50'], key: a.b_c-D}, namespace: x-1}",
            "{inCluster: true, lease: {duration: 1s, renewDeadline: 700ms, retryPeriod: 100ms}}",
        ] {
            assert_eq!(problems(good), "", "{good}");
        }
    }

    #[test]
    fn mistakes_are_told_with_their_key() {
        for (yaml, key) in [
            ("dns: {}", "kubernetes.dns:"),
            (
                "dns: {addresses: [10.0.0.1], service: a/b}",
                "kubernetes.dns:",
            ),
            ("dns: {addresses: ['::']}", "kubernetes.dns.addresses[0]"),
            (
                "dns: {addresses: [10.0.0.1, 224.0.0.1]}",
                "kubernetes.dns.addresses[1]",
            ),
            ("dns: {service: a/b, key: 'a b'}", "kubernetes.dns.key"),
            ("dns: {service: a/b, key: ..}", "kubernetes.dns.key"),
            ("dns: {service: a/b, key: ''}", "kubernetes.dns.key"),
            (
                "dns: {service: a/b, domains: [site., A.b]}",
                "kubernetes.dns.domains[1]",
            ),
            ("dns: {service: b}", "is not NAMESPACE/NAME"),
            ("dns: {service: a.b/c}", "is not NAMESPACE/NAME"),
            (
                "dns: {configMap: a/b/c, service: a/b}",
                "is not NAMESPACE/NAME",
            ),
            ("namespace: A", "kubernetes.namespace"),
            ("lease: {duration: 1500ms}", "kubernetes.lease.duration"),
            ("lease: {duration: 2h}", "kubernetes.lease.duration"),
            ("lease: {duration: 10s}", "kubernetes.lease.renewDeadline"),
            ("lease: {retryPeriod: 6s}", "kubernetes.lease.retryPeriod"),
            ("lease: {retryPeriod: 0s}", "kubernetes.lease.retryPeriod"),
        ] {
            let told = problems(&format!("inCluster: true\n{yaml}\n"));
            assert!(told.contains(key), "{yaml}: {told}");
        }
    }
}
