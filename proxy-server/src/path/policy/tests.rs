use std::path::Path;

use proptest::prelude::*;

use super::*;

fn policy(text: &str) -> Policy {
    let config: Config = daemon::config::parse(Path::new("x.yaml"), text).unwrap();
    Policy::new(&config)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

const MODES: [PathMode; 3] = [PathMode::Tunnel, PathMode::Direct, PathMode::Auto];

/// `tunnel`, `refused`, `direct LINE ADDRESS`, `auto LINE ADDRESS`.
fn shown(decided: &Decided) -> String {
    match &decided.decision {
        Decision::Tunnel => "tunnel".to_owned(),
        Decision::Refused => "refused".to_owned(),
        Decision::Direct(by) => format!("direct {} {}", by.line.name, by.address),
        Decision::Auto(by) => format!("auto {} {}", by.line.name, by.address),
    }
}

fn decide(policy: &Policy, subject: Subject<'_>) -> String {
    shown(&policy.decide(subject, |_| Vec::new()))
}

#[test]
fn every_combination_is_decided_by_the_first_rule_that_counts() {
    let options = |none: bool| MODES.map(Some).into_iter().chain(none.then_some(None));
    let mut cases = 0;
    for annotation in options(true) {
        for of_pool in options(true) {
            for is_private in [false, true] {
                for line in options(true) {
                    for default in MODES {
                        for believe in [false, true] {
                            let mut text =
                                format!("path: {{default: {default}, believeNodes: {believe}}}\n");
                            if let Some(mode) = line {
                                text += &format!(
                                    "lines: [{{name: l, networks: [10.0.0.0/8], mode: {mode}}}]\n"
                                );
                            }
                            if let Some(mode) = of_pool {
                                text +=
                                    &format!("kubernetes: {{pools: {{p: {{path: {mode}}}}}}}\n");
                            }
                            let wish = annotation.map(Wish::Path);
                            let subject = Subject {
                                wish: wish.as_ref(),
                                pool: Some("p"),
                                is_private,
                                addresses: &[ip("10.0.0.7")],
                            };
                            // By the words of the issue, said another way than the code does.
                            let believed = believe || line.is_some();
                            let word =
                                annotation.filter(|mode| believed || *mode == PathMode::Tunnel);
                            let private = line.filter(|mode| *mode != PathMode::Tunnel);
                            let label =
                                (is_private && believed).then(|| private.unwrap_or(PathMode::Auto));
                            let mode = word.or(of_pool).or(label).or(line).unwrap_or(default);
                            let name = if line.is_some() { "l" } else { "route" };
                            let wanted = match mode {
                                PathMode::Tunnel => "tunnel".to_owned(),
                                PathMode::Direct | PathMode::Auto => {
                                    format!("{mode} {name} 10.0.0.7")
                                }
                            };
                            assert_eq!(
                                decide(&policy(&text), subject),
                                wanted,
                                "{text} {subject:?}"
                            );
                            cases += 1;
                        }
                    }
                }
            }
        }
    }
    assert_eq!(cases, 4 * 4 * 2 * 4 * 3 * 2);
}

#[test]
fn each_rule_is_told_with_what_became_of_it() {
    let policy = policy("path: {default: auto}\nkubernetes: {pools: {p: {path: tunnel}}}");
    let findings = |wish: Option<Wish>, pool, is_private| {
        let subject = Subject {
            wish: wish.as_ref(),
            pool,
            is_private,
            addresses: &[ip("10.0.0.7")],
        };
        let decided = policy.decide(subject, |_| Vec::new());
        decided.rules.map(|(_, finding)| finding)
    };
    use Finding::{Decides, NotBelieved, NotReached, Nothing, Unknown};
    use PathMode::{Auto, Direct, Tunnel};
    assert_eq!(
        findings(Some(Wish::Path(Direct)), None, true),
        [
            NotBelieved(Direct),
            Nothing,
            NotBelieved(Auto),
            Nothing,
            Decides(Auto)
        ]
    );
    assert_eq!(
        findings(Some(Wish::Unknown("x".into())), Some("p"), true),
        [
            Unknown("x".into()),
            Decides(Tunnel),
            NotReached,
            NotReached,
            NotReached
        ]
    );
    assert_eq!(
        findings(Some(Wish::Path(Tunnel)), Some("q"), false),
        [
            Decides(Tunnel),
            NotReached,
            NotReached,
            NotReached,
            NotReached
        ]
    );
}

#[test]
fn the_line_that_has_the_address_best_is_taken() {
    let policy = policy(
        "lines:\n\
         - {name: wide, networks: [10.0.0.0/8, 'fd00::/8']}\n\
         - {name: narrow, networks: [10.1.0.0/16]}\n\
         - {name: site, networks: [10.1.0.0/16], pools: [hz]}\n\
         - {name: pool, pools: [bj], source: 10.0.0.1}\n\
         - {name: twin-a, networks: [10.2.0.0/16]}\n\
         - {name: twin-b, networks: [10.2.0.0/16]}\n\
         - {name: twin-c, networks: [10.2.3.0/24]}\n",
    );
    for (pool, addresses, wanted) in [
        (None, &["10.9.0.1"][..], "auto wide 10.9.0.1"),
        (None, &["10.1.0.1"], "auto narrow 10.1.0.1"),
        (Some("hz"), &["10.1.0.1"], "auto site 10.1.0.1"),
        // A network goes before a pool alone.
        (Some("bj"), &["10.1.0.1"], "auto narrow 10.1.0.1"),
        (Some("bj"), &["192.168.1.1"], "auto pool 192.168.1.1"),
        // Its source is of the other family.
        (Some("bj"), &["2001:db8::1"], "tunnel"),
        (None, &["fd00::1"], "auto wide fd00::1"),
        // The first address that a line has.
        (None, &["203.0.113.1", "10.9.0.1"], "auto wide 10.9.0.1"),
        (None, &["203.0.113.1"], "tunnel"),
        (None, &[], "tunnel"),
        (None, &["10.2.0.1"], "tunnel"),
        (None, &["10.2.3.1"], "auto twin-c 10.2.3.1"),
    ] {
        let addresses: Vec<_> = addresses.iter().map(|text| ip(text)).collect();
        let subject = Subject {
            pool,
            addresses: &addresses,
            ..Subject::default()
        };
        assert_eq!(decide(&policy, subject), wanted, "{pool:?} {addresses:?}");
    }
}

#[test]
fn two_lines_with_one_address_are_named_and_direct_is_refused() {
    for (mode, wanted) in [("auto", "tunnel"), ("direct", "refused")] {
        let policy = policy(&format!(
            "lines: [{{name: a, networks: [10.0.0.0/8], mode: {mode}}}, {{name: b, networks: [10.0.0.0/8], mode: {mode}}}]"
        ));
        let addresses = [ip("10.0.0.7")];
        let subject = Subject {
            addresses: &addresses,
            ..Subject::default()
        };
        let decided = policy.decide(subject, |_| Vec::new());
        assert_eq!(shown(&decided), wanted);
        let why = decided.unfit.unwrap().to_string();
        assert_eq!(why, "lines a and b have 10.0.0.7 alike");
    }
}

#[test]
fn a_shared_address_is_dialled_only_by_an_interface_that_tells_the_sites_apart() {
    let line = |name: &str, pool: &str, interface: &str| {
        format!(
            "- {{name: {name}, networks: [192.168.0.0/16], pools: [{pool}], mode: direct{interface}}}\n"
        )
    };
    let (a, b) = (", interface: eth1", ", interface: eth2");
    for (lines, others, wanted) in [
        // Alone.
        (line("a", "pa", ""), &[][..], "direct a 192.168.1.10"),
        // The other is on no line, but nothing says that this one leads to ours.
        (line("a", "pa", ""), &[Some("pb")], "refused"),
        (line("a", "pa", a), &[Some("pb")], "direct a 192.168.1.10"),
        (
            line("a", "pa", a),
            &[None, Some("px")],
            "direct a 192.168.1.10",
        ),
        // On the same line.
        (line("a", "pa", a), &[Some("pa")], "refused"),
        (line("a", "pa", a), &[Some("pb"), Some("pa")], "refused"),
        // On lines of their own.
        (
            line("a", "pa", a) + &line("b", "pb", b),
            &[Some("pb")],
            "direct a 192.168.1.10",
        ),
        // On another line by the same interface, or by none.
        (
            line("a", "pa", a) + &line("b", "pb", a),
            &[Some("pb")],
            "refused",
        ),
        (
            line("a", "pa", a) + &line("b", "pb", ""),
            &[Some("pb")],
            "refused",
        ),
    ] {
        let policy = policy(&format!("lines:\n{lines}"));
        let addresses = [ip("192.168.1.10")];
        let subject = Subject {
            pool: Some("pa"),
            addresses: &addresses,
            ..Subject::default()
        };
        let claimant = |(i, pool): (usize, &Option<&str>)| Claimant {
            name: format!("node n{i}"),
            pool: pool.map(str::to_owned),
            leads_back: false,
        };
        let decided = policy.decide(subject, |address| {
            assert_eq!(address, ip("192.168.1.10"));
            others.iter().enumerate().map(claimant).collect()
        });
        assert_eq!(shown(&decided), wanted, "{lines} {others:?}");
        if wanted == "refused" {
            let why = decided.unfit.unwrap().to_string();
            assert!(why.contains("also that of node n"), "{why}");
        }
    }
}

#[test]
fn without_an_address_there_is_no_bypass() {
    for (default, wanted) in [
        ("auto", "tunnel"),
        ("direct", "refused"),
        ("tunnel", "tunnel"),
    ] {
        let policy = policy(&format!("path: {{default: {default}}}"));
        assert_eq!(decide(&policy, Subject::default()), wanted);
    }
}

#[test]
fn an_address_that_leads_back_is_dialled_by_no_line_whatever_its_interface() {
    let claimant = |name: &str, leads_back| Claimant {
        name: name.to_owned(),
        pool: None,
        leads_back,
    };
    for (mode, wanted) in [("auto", "tunnel"), ("direct", "refused")] {
        let policy = policy(&format!(
            "lines: [{{name: a, networks: [10.0.0.0/8], interface: eth1, mode: {mode}}}]"
        ));
        let subject = Subject {
            addresses: &[ip("10.96.0.50")],
            ..Subject::default()
        };
        let others = [
            claimant("node edge2", false),
            claimant("service corvid/tunnel", true),
        ];
        let decided = policy.decide(subject, |_| others.to_vec());
        assert_eq!(shown(&decided), wanted);
        assert_eq!(
            decided.unfit.unwrap().to_string(),
            "10.96.0.50 is that of service corvid/tunnel, and what is dialled there may come back here"
        );
    }
}

fn any_mode() -> impl Strategy<Value = PathMode> {
    prop::sample::select(MODES.to_vec())
}

proptest! {
    /// Whatever a node says, it reaches no address that the operator has given to no line.
    #[test]
    fn a_node_chooses_no_address_that_no_line_has(
        wish in prop::option::of(any_mode()),
        is_private in any::<bool>(),
        pool in prop::sample::select(vec![None, Some("hz"), Some("bj")]),
        addresses in prop::collection::vec(any::<u32>(), 0..4),
        interfaces in prop::collection::vec(any::<bool>(), 3),
        sharers in prop::collection::vec(prop::sample::select(vec![None, Some("hz"), Some("bj")]), 0..3),
    ) {
        let interface = |i: usize| if interfaces[i] { format!(", interface: eth{i}") } else { String::new() };
        let policy = policy(&format!(
            "lines:\n- {{name: a, networks: [0.0.0.0/2, 128.0.0.0/3]{}}}\n- {{name: b, networks: [0.0.0.0/3], pools: [hz], mode: direct{}}}\n- {{name: c, networks: [64.0.0.0/2], pools: [bj]{}}}",
            interface(0), interface(1), interface(2),
        ));
        let addresses: Vec<IpAddr> = addresses.into_iter().map(|bits| IpAddr::from(bits.to_be_bytes())).collect();
        let wish = wish.map(Wish::Path);
        let subject = Subject { wish: wish.as_ref(), pool, is_private, addresses: &addresses };
        let claimant = |pool: &Option<&str>| Claimant { name: "n".into(), pool: pool.map(str::to_owned), leads_back: false };
        let decided = policy.decide(subject, |_| sharers.iter().map(claimant).collect());
        let deciding = decided.rules.iter().filter(|(_, finding)| matches!(finding, Finding::Decides(_)));
        prop_assert_eq!(deciding.count(), 1);
        match &decided.decision {
            Decision::Direct(by) | Decision::Auto(by) => {
                prop_assert!(addresses.contains(&by.address));
                prop_assert!(by.line.networks.iter().any(|net| net.0.contains(&by.address)));
                prop_assert!(by.line.pools.is_empty() || by.line.pools.iter().any(|name| Some(name.as_str()) == pool));
                prop_assert!(sharers.is_empty() || by.line.interface.is_some());
                prop_assert!(decided.unfit.is_none());
                prop_assert!(!matches!(subject.wish, Some(Wish::Path(PathMode::Tunnel))));
            }
            Decision::Refused => prop_assert!(decided.unfit.is_some()),
            Decision::Tunnel => {}
        }
    }
}
