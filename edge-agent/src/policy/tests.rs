use std::net::Ipv6Addr;

use proptest::prelude::*;

use super::*;

fn policy(allow: &[(&str, RangeInclusive<u16>)]) -> Policy {
    let rule = |(cidr, ports): &(&str, RangeInclusive<u16>)| Rule {
        cidr: cidr.parse().unwrap(),
        ports: vec![ports.clone()],
    };
    Policy {
        node: "edge1".into(),
        localhost_ports: BTreeSet::new(),
        node_addresses: Vec::new(),
        allow: allow.iter().map(rule).collect(),
        pods: Pods::default(),
    }
}

fn own() -> Vec<IpAddr> {
    ["192.168.1.10", "fd00::10"]
        .map(|ip| ip.parse().unwrap())
        .into()
}

fn allowed(policy: &Policy, target: &str) -> bool {
    let target: SocketAddr = target.parse().unwrap();
    policy
        .target(&own(), target.ip(), target.port(), None)
        .is_ok()
}

#[test]
fn by_default_the_node_alone_on_its_ports() {
    let policy = policy(&[]);
    for good in [
        "127.0.0.1:10250",
        "[::1]:9100",
        "192.168.1.10:10250",
        "192.168.1.10:10255",
        "[fd00::10]:9100",
        "[::ffff:192.168.1.10]:10250",
    ] {
        assert!(allowed(&policy, good), "{good}");
    }
    for bad in [
        "127.0.0.1:22",
        "192.168.1.10:6443",
        "192.168.1.11:10250",
        "8.8.8.8:53",
        "[fd00::11]:10250",
    ] {
        assert!(!allowed(&policy, bad), "{bad}");
    }
}

#[test]
fn what_is_listed_is_allowed_on_its_ports() {
    let policy = policy(&[("192.168.1.0/24", 9100..=9200), ("fd00::/64", 80..=80)]);
    for good in [
        "192.168.1.77:9100",
        "192.168.1.77:9200",
        "[fd00::77]:80",
        "[::ffff:192.168.1.77]:9150",
    ] {
        assert!(allowed(&policy, good), "{good}");
    }
    for bad in ["192.168.1.77:9201", "192.168.2.1:9100", "[fd00::77]:81"] {
        assert!(!allowed(&policy, bad), "{bad}");
    }
}

#[test]
fn some_addresses_are_refused_whatever_is_listed() {
    let policy = policy(&[("0.0.0.0/0", 1..=65535), ("::/0", 1..=65535)]);
    for bad in [
        "169.254.169.254:80",
        "169.254.0.1:80",
        "[fe80::1]:80",
        "[febf::1]:80",
        "[fd00:ec2::254]:80",
        "100.100.100.200:80",
        "168.63.129.16:80",
        "0.0.0.0:80",
        "0.1.2.3:80",
        "[::]:80",
        "224.0.0.1:80",
        "[ff02::1]:80",
        "255.255.255.255:80",
        "[::ffff:169.254.169.254]:80",
        "[::169.254.169.254]:80",
        "[64:ff9b::a9fe:a9fe]:80",
        "[2002:a9fe:a9fe::1]:80",
        "[64:ff9b:1::a9fe:a9fe]:80",
    ] {
        let target: SocketAddr = bad.parse().unwrap();
        let denied = policy.target(&own(), target.ip(), 80, None).unwrap_err();
        assert_eq!(denied.reason(), Reason::ForbiddenDestination, "{bad}");
    }
    for good in [
        "8.8.8.8:80",
        "[2001:db8::1]:80",
        "[64:ff9b::808:808]:80",
        "[::1]:80",
        "127.0.0.1:80",
    ] {
        assert!(allowed(&policy, good), "{good}");
    }
}

#[test]
fn a_link_local_own_address_is_refused_too() {
    let own = ["169.254.20.10".parse().unwrap()];
    let denied = policy(&[]).target(&own, own[0], 10250, None).unwrap_err();
    assert_eq!(
        denied,
        Denied::Forbidden("169.254.20.10:10250".parse().unwrap())
    );
}

#[test]
fn the_node_is_dialled_at_localhost_first() {
    let targets = policy(&[]).node_targets(&own(), 10250).unwrap();
    let shown: Vec<_> = targets.iter().map(ToString::to_string).collect();
    assert_eq!(
        shown,
        ["127.0.0.1:10250", "192.168.1.10:10250", "[fd00::10]:10250"]
    );
    let denied = policy(&[]).node_targets(&own(), 22).unwrap_err();
    assert_eq!(denied.reason(), Reason::DestinationDenied);
}

#[test]
fn a_localhost_port_is_dialled_at_localhost_whatever_own_address_was_asked_for() {
    let policy = Policy {
        localhost_ports: [10250].into(),
        ..policy(&[("10.0.0.0/8", 1..=65535)])
    };
    let target = |ip: &str, port| {
        policy
            .target(&own(), ip.parse().unwrap(), port, None)
            .unwrap()
            .to_string()
    };
    assert_eq!(target("192.168.1.10", 10250), "127.0.0.1:10250");
    assert_eq!(target("fd00::10", 10250), "127.0.0.1:10250");
    assert_eq!(target("192.168.1.10", 9100), "192.168.1.10:9100");
    assert_eq!(
        target("10.0.0.7", 10250),
        "10.0.0.7:10250",
        "another host's port is its own"
    );
    assert_eq!(policy.node_targets(&own(), 10250).unwrap().len(), 1);
}

#[test]
fn pods_of_the_node_are_dialled_where_they_declare_it_and_settings_say_so() {
    let with = |ports, nodes: &[&str]| Policy {
        pods: Pods {
            ports,
            nodes: nodes.iter().map(|&node| node.into()).collect(),
        },
        ..policy(&[])
    };
    let pod = |node: &str, declared| PodPort {
        pod: "default/web".into(),
        node: node.into(),
        declared,
    };
    let denied = "10.2.0.5:80 is not in the agent's allow-list";
    let undeclared = &format!("{denied}, and pod default/web declares no such port");
    let foreign =
        &format!("{denied}, and pod default/web is on lathe, which `pods.nodes` does not have");
    for (ports, nodes, pod, wanted) in [
        (
            PodPorts::Declared,
            &[][..],
            Some(pod("edge1", true)),
            "10.2.0.5:80",
        ),
        (
            PodPorts::Declared,
            &[],
            Some(pod("edge1", false)),
            undeclared,
        ),
        (PodPorts::Declared, &[], Some(pod("lathe", true)), foreign),
        (
            PodPorts::Declared,
            &["lathe"],
            Some(pod("lathe", true)),
            "10.2.0.5:80",
        ),
        (
            PodPorts::Declared,
            &["lathe"],
            Some(pod("edge1", true)),
            "10.2.0.5:80",
        ),
        (PodPorts::Declared, &[], None, denied),
        (PodPorts::Any, &[], Some(pod("edge1", false)), "10.2.0.5:80"),
        (PodPorts::Any, &[], Some(pod("lathe", false)), foreign),
        (PodPorts::Any, &[], None, denied),
        (PodPorts::None, &["lathe"], Some(pod("edge1", true)), denied),
    ] {
        let policy = with(ports, nodes);
        let decided = policy.target(&own(), "10.2.0.5".parse().unwrap(), 80, pod.as_ref());
        let said = decided.map_or_else(|denied| denied.to_string(), |target| target.to_string());
        assert_eq!(said, wanted, "{ports:?} {nodes:?} {pod:?}");
    }
    // Whatever the server says: what is never dialled, and what listens on the node itself.
    let policy = with(PodPorts::Any, &[]);
    let pod = pod("edge1", true);
    for (ip, reason) in [
        ("169.254.169.254", Reason::ForbiddenDestination),
        ("127.0.0.1", Reason::DestinationDenied),
        ("::ffff:127.0.0.1", Reason::DestinationDenied),
        ("192.168.1.10", Reason::DestinationDenied),
        ("fd00::10", Reason::DestinationDenied),
    ] {
        let denied = policy.target(&own(), ip.parse().unwrap(), 80, Some(&pod));
        assert_eq!(denied.unwrap_err().reason(), reason, "{ip}");
    }
}

proptest! {
    #[test]
    fn no_rule_lets_a_forbidden_ipv4_through_in_any_clothes(a in 0u8..=255, b in 0u8..=255) {
        let policy = policy(&[("0.0.0.0/0", 1..=65535), ("::/0", 1..=65535)]);
        let ip = Ipv4Addr::new(169, 254, a, b);
        let [x, y] = [u16::from_be_bytes([169, 254]), u16::from_be_bytes([a, b])];
        let clothes = [
            IpAddr::V4(ip),
            ip.to_ipv6_mapped().into(),
            Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, x, y).into(),
            Ipv6Addr::new(0x2002, x, y, 0, 0, 0, 0, 1).into(),
        ];
        for ip in clothes {
            prop_assert!(policy.target(&own(), ip, 10250, None).is_err());
        }
    }
}
