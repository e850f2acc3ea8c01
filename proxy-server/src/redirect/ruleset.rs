//! The rules, as text for `nft`. Pure; what is shown is what is applied, byte for byte.
//!
//! One table of our own with two sets and one chain, which sees the first packet of each connection that this machine
//! itself opens: marked ones (our own direct dials) go their way, those to an address of the sets go to the
//! `intercept` frontend. Other machines' connections are not seen, and nobody else's table is touched.
//!
//! [`Ruleset::text`] replaces the whole table, [`Ruleset::update`] changes the sets; each is one transaction of the
//! kernel, so there is no moment without rules. Nothing that a cluster wrote but addresses is in it.

use std::fmt::{self, Write as _};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::config::{Config, Frontend, Mark};

/// The table, of the family `inet`.
pub(super) const TABLE: &str = "corvid_redirect";
/// Addresses a line.
const LINE: usize = 6;

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    pub(super) const ALL: [Self; 2] = [Self::V4, Self::V6];

    pub(super) const fn of(net: &IpNet) -> Self {
        match net {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }

    /// Name of its set.
    pub(super) const fn set(self) -> &'static str {
        match self {
            Self::V4 => "nodes4",
            Self::V6 => "nodes6",
        }
    }

    const fn protocol(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// Where connections to a port of the nodes are led.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lead {
    pub(super) family: Family,
    pub(super) port: u16,
    pub(super) to: SocketAddr,
}

impl Lead {
    /// Those of the `intercept` frontends; where two of a family take the same port, that of the first.
    pub(super) fn all(config: &Config) -> Vec<Self> {
        let mut leads: Vec<Self> = Vec::new();
        for family in Family::ALL {
            for frontend in &config.frontends {
                let Some(lead) = Self::new(family, frontend) else {
                    continue;
                };
                if !leads
                    .iter()
                    .any(|other| (other.family, other.port) == (family, lead.port))
                {
                    leads.push(lead);
                }
            }
        }
        leads
    }

    fn new(family: Family, frontend: &Frontend) -> Option<Self> {
        let Frontend::Intercept(intercept) = frontend else {
            return None;
        };
        // What TPROXY rules hand over is not what is redirected, and a port that is chosen at the start is not known.
        let to = intercept.listen.tcp().filter(|to| to.port() != 0)?;
        let takes = match (family, to) {
            (Family::V4, SocketAddr::V4(_)) | (Family::V6, SocketAddr::V6(_)) => true,
            // `[::]` takes both.
            (Family::V4, SocketAddr::V6(to)) => to.ip().is_unspecified(),
            (Family::V6, SocketAddr::V4(_)) => false,
        };
        (takes && !intercept.transparent).then(|| Self {
            family,
            port: intercept.port.unwrap_or_else(|| to.port()),
            to,
        })
    }

    /// `redirect` leads to the loopback address, which only some listen on.
    fn verdict(&self) -> String {
        let (to, protocol) = (self.to, self.family.protocol());
        if to.ip().is_unspecified() || is_default_loopback(to.ip()) {
            format!("redirect to :{}", to.port())
        } else {
            format!("dnat {protocol} to {to}")
        }
    }
}

/// 127.0.0.1 or ::1.
fn is_default_loopback(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip == std::net::Ipv4Addr::LOCALHOST,
        IpAddr::V6(ip) => ip.is_loopback(),
    }
}

/// All that the table says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ruleset {
    pub(super) mark: Mark,
    pub(super) leads: Vec<Lead>,
    /// In order, none within another; only of families that are led somewhere.
    pub(super) addresses: Vec<IpNet>,
}

impl Ruleset {
    pub(super) fn new(mark: Mark, leads: &[Lead], addresses: &[IpNet]) -> Self {
        let led = |net: &&IpNet| leads.iter().any(|lead| lead.family == Family::of(net));
        let mut all: Vec<IpNet> = addresses.iter().filter(led).copied().collect();
        // A net stands before those within it.
        all.sort_unstable();
        all.dedup_by(|net, before| before.contains(&*net));
        Self {
            mark,
            leads: leads.to_vec(),
            addresses: all,
        }
    }

    fn of(&self, family: Family) -> impl Iterator<Item = &IpNet> {
        let same = move |net: &&IpNet| Family::of(net) == family;
        self.addresses.iter().filter(same)
    }

    /// Whether a set of that family holds CIDRs.
    fn has_cidrs(&self, family: Family) -> bool {
        self.of(family)
            .any(|net| net.prefix_len() < net.max_prefix_len())
    }

    /// Makes the table, in place of one that is there.
    pub(super) fn text(&self) -> String {
        let mut text = removal();
        writeln!(text, "table inet {TABLE} {{").ok(); // a String takes everything
        for family in Family::ALL {
            self.set(&mut text, family);
        }
        text.push_str("\tchain output {\n\t\ttype nat hook output priority -100; policy accept;\n");
        writeln!(text, "\t\tmeta mark {} counter return", self.mark).ok();
        for lead in &self.leads {
            let (family, port) = (lead.family, lead.port);
            let (protocol, set, verdict) = (family.protocol(), family.set(), lead.verdict());
            writeln!(
                text,
                "\t\t{protocol} daddr @{set} tcp dport {port} counter {verdict}"
            )
            .ok();
        }
        text.push_str("\t}\n}\n");
        text
    }

    fn set(&self, text: &mut String, family: Family) {
        let kind = match family {
            Family::V4 => "ipv4_addr",
            Family::V6 => "ipv6_addr",
        };
        writeln!(text, "\tset {} {{\n\t\ttype {kind}", family.set()).ok();
        if self.has_cidrs(family) {
            text.push_str("\t\tflags interval\n");
        }
        let addresses: Vec<_> = self.of(family).collect();
        if !addresses.is_empty() {
            writeln!(
                text,
                "\t\telements = {{\n{}\t\t}}",
                lines("\t\t\t", &addresses)
            )
            .ok();
        }
        text.push_str("\t}\n");
    }

    /// Makes the table of `self` that of `new` by changing its sets; `None` if that is not enough.
    pub(super) fn update(&self, new: &Self) -> Option<String> {
        // Neighbouring intervals are one in some versions of nft: those sets are rather made anew.
        let plain = |family| !self.has_cidrs(family) && !new.has_cidrs(family);
        let same = (self.mark, &self.leads) == (new.mark, &new.leads);
        if !same || !Family::ALL.into_iter().all(plain) {
            return None;
        }
        let mut text = String::new();
        for (verb, from, to) in [("delete", self, new), ("add", new, self)] {
            for family in Family::ALL {
                let other = |net: &&IpNet| to.addresses.binary_search(net).is_err();
                let addresses: Vec<_> = from.of(family).filter(other).collect();
                if !addresses.is_empty() {
                    let (set, lines) = (family.set(), lines("\t", &addresses));
                    writeln!(text, "{verb} element inet {TABLE} {set} {{\n{lines}}}").ok();
                }
            }
        }
        Some(text)
    }
}

/// Removes the table, whether or not it is there.
pub(super) fn removal() -> String {
    format!("add table inet {TABLE}\ndelete table inet {TABLE}\n")
}

fn lines(indent: &str, addresses: &[&IpNet]) -> String {
    let mut text = String::new();
    for (i, line) in addresses.chunks(LINE).enumerate() {
        let line: Vec<_> = line.iter().map(|net| element(net)).collect();
        let comma = if (i + 1) * LINE < addresses.len() {
            ","
        } else {
            ""
        };
        writeln!(text, "{indent}{}{comma}", line.join(", ")).ok();
    }
    text
}

/// An address is written without its length.
pub(super) fn element(net: &IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() {
        net.addr().to_string()
    } else {
        net.to_string()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    fn leads(frontends: &str) -> Vec<Lead> {
        let text = format!("frontends:\n{frontends}");
        Lead::all(&daemon::config::parse(Path::new("x.yaml"), &text).unwrap())
    }

    fn both() -> Vec<Lead> {
        leads("- {type: intercept, listen: '[::]:10250'}")
    }

    fn ruleset(leads: &[Lead], addresses: &[&str]) -> Ruleset {
        let net = |text: &&str| {
            let address = || text.parse::<IpAddr>().map(IpNet::from);
            text.parse::<IpNet>().or_else(|_| address()).unwrap()
        };
        let addresses: Vec<_> = addresses.iter().map(net).collect();
        Ruleset::new(Mark::DEFAULT, leads, &addresses)
    }

    #[test]
    fn the_text_is_this() {
        let leads = leads(
            "- {type: intercept, listen: '[::]:10260', port: 10250}\n\
             - {type: intercept, listen: '10.0.0.5:9100'}\n\
             - {type: intercept, listen: '[fd00::5]:9101', port: 9100}\n\
             - {type: intercept, listen: '[::]:9102', port: 9100}\n",
        );
        let addresses = [
            "10.1.0.7",
            "10.1.0.1",
            "10.1.0.2",
            "10.1.0.3",
            "10.1.0.4",
            "10.1.0.5",
            "10.1.0.6",
            "fd01::/64",
            "fd00::1",
            "fd01::7",
        ];
        let wanted = "\
add table inet corvid_redirect
delete table inet corvid_redirect
table inet corvid_redirect {
\tset nodes4 {
\t\ttype ipv4_addr
\t\telements = {
\t\t\t10.1.0.1, 10.1.0.2, 10.1.0.3, 10.1.0.4, 10.1.0.5, 10.1.0.6,
\t\t\t10.1.0.7
\t\t}
\t}
\tset nodes6 {
\t\ttype ipv6_addr
\t\tflags interval
\t\telements = {
\t\t\tfd00::1, fd01::/64
\t\t}
\t}
\tchain output {
\t\ttype nat hook output priority -100; policy accept;
\t\tmeta mark 0x20c5 counter return
\t\tip daddr @nodes4 tcp dport 10250 counter redirect to :10260
\t\tip daddr @nodes4 tcp dport 9100 counter dnat ip to 10.0.0.5:9100
\t\tip6 daddr @nodes6 tcp dport 10250 counter redirect to :10260
\t\tip6 daddr @nodes6 tcp dport 9100 counter dnat ip6 to [fd00::5]:9101
\t}
}
";
        assert_eq!(ruleset(&leads, &addresses).text(), wanted);
    }

    #[test]
    fn empty_sets_have_no_elements() {
        let wanted = "\
add table inet corvid_redirect
delete table inet corvid_redirect
table inet corvid_redirect {
\tset nodes4 {
\t\ttype ipv4_addr
\t}
\tset nodes6 {
\t\ttype ipv6_addr
\t}
\tchain output {
\t\ttype nat hook output priority -100; policy accept;
\t\tmeta mark 0x20c5 counter return
\t\tip daddr @nodes4 tcp dport 10250 counter redirect to :10250
\t}
}
";
        let leads = leads("- {type: intercept, listen: '0.0.0.0:10250'}");
        // Nobody listens on IPv6.
        assert_eq!(ruleset(&leads, &["fd00::1"]).text(), wanted);
    }

    #[test]
    fn frontends_that_nothing_can_be_redirected_to_are_passed_over() {
        for (listen, families) in [
            ("listen: '[::]:1'", vec![Family::V4, Family::V6]),
            ("listen: '0.0.0.0:1'", vec![Family::V4]),
            ("listen: '127.0.0.1:1'", vec![Family::V4]),
            ("listen: '[::1]:1'", vec![Family::V6]),
            ("listen: '[fd00::5]:1'", vec![Family::V6]),
            ("listen: '[::]:0', port: 1", vec![]),
            ("listen: '[::]:1', transparent: true", vec![]),
        ] {
            let leads = leads(&format!("- {{type: intercept, {listen}}}"));
            let found: Vec<_> = leads.iter().map(|lead| lead.family).collect();
            assert_eq!(found, families, "{listen}");
        }
        assert!(leads("- {type: httpConnect, listen: 'unix:/x'}").is_empty());
        let verdict = |listen: &str| {
            leads(&format!("- {{type: intercept, listen: '{listen}'}}"))[0].verdict()
        };
        assert_eq!(verdict("127.0.0.1:7"), "redirect to :7");
        assert_eq!(verdict("127.0.0.2:7"), "dnat ip to 127.0.0.2:7");
        assert_eq!(verdict("[::1]:7"), "redirect to :7");
    }

    #[test]
    fn a_change_is_the_difference() {
        let (leads, others) = (both(), leads("- {type: intercept, listen: '[::]:9'}"));
        let old = ruleset(&leads, &["10.1.0.1", "10.1.0.2", "fd00::1"]);
        let new = ruleset(&leads, &["10.1.0.2", "10.1.0.3", "fd00::2"]);
        let wanted = "\
delete element inet corvid_redirect nodes4 {
\t10.1.0.1
}
delete element inet corvid_redirect nodes6 {
\tfd00::1
}
add element inet corvid_redirect nodes4 {
\t10.1.0.3
}
add element inet corvid_redirect nodes6 {
\tfd00::2
}
";
        assert_eq!(old.update(&new).unwrap(), wanted);
        assert_eq!(old.update(&old).unwrap(), "");
        assert_eq!(old.update(&ruleset(&others, &["10.1.0.2"])), None);
        assert_eq!(old.update(&ruleset(&leads, &["10.1.0.0/24"])), None);
        assert_eq!(ruleset(&leads, &["10.1.0.0/24"]).update(&old), None);
    }

    #[test]
    fn ten_thousand_addresses_are_all_there() {
        let all: Vec<IpNet> = (0..10_000_u32)
            .map(|i| IpNet::from(IpAddr::from((0x0a00_0000 + i * 7).to_be_bytes())))
            .collect();
        let text = Ruleset::new(Mark::DEFAULT, &both(), &all).text();
        let elements = text
            .split("elements = {")
            .nth(1)
            .unwrap()
            .split('}')
            .next()
            .unwrap();
        let read: Vec<IpNet> = elements
            .split(',')
            .map(|address| IpNet::from(address.trim().parse::<IpAddr>().unwrap()))
            .collect();
        assert_eq!(read, all);
    }

    proptest! {
        /// What a change deletes and adds makes the old set the new one.
        #[test]
        fn a_change_leads_from_one_to_the_other(
            from in proptest::collection::btree_set(any::<u8>(), 0..40),
            to in proptest::collection::btree_set(any::<u8>(), 0..40),
        ) {
            let set = |hosts: &std::collections::BTreeSet<u8>| {
                let all: Vec<_> = hosts.iter().map(|host| IpNet::from(IpAddr::from([10, 0, 0, *host]))).collect();
                Ruleset::new(Mark::DEFAULT, &both(), &all)
            };
            let change = set(&from).update(&set(&to)).unwrap();
            let mut now: std::collections::BTreeSet<_> = set(&from).addresses.iter().map(element).collect();
            for command in change.split_inclusive('}').filter(|command| command.contains('{')) {
                let (head, body) = command.trim().split_once('{').unwrap();
                for address in body.trim_end_matches('}').split(',').map(str::trim) {
                    let new = if head.starts_with("add") { now.insert(address.to_owned()) } else { now.remove(address) };
                    prop_assert!(new, "{} {}", head, address);
                }
            }
            let wanted: std::collections::BTreeSet<_> = set(&to).addresses.iter().map(element).collect();
            prop_assert_eq!(now, wanted);
        }
    }
}
