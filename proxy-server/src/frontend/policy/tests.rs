use proptest::prelude::*;

use super::*;

fn rules(yaml: &str) -> Vec<Rule> {
    daemon::config::parse(std::path::Path::new("rules.yaml"), yaml).unwrap()
}

fn tcp(who: Who, from: &str) -> Requester {
    let from = SocketAddr::new(from.parse().unwrap(), 40_000);
    Requester::new(&Peer::Tcp(from)).proved(who)
}

fn client(name: &str, from: &str) -> Requester {
    tcp(Who::Client(name.into()), from)
}

fn user(name: &str, from: &str) -> Requester {
    tcp(Who::User(name.into()), from)
}

fn source(from: &str) -> Requester {
    Requester::from_source(SocketAddr::new(from.parse().unwrap(), 40_000), None)
}

fn uid(uid: Option<u32>) -> Requester {
    Requester::new(&Peer::Unix { uid, pid: Some(7) })
}

const RULES: &str = "
- {clients: [prometheus, 'scraper-*'], nodes: ['*'], ports: [10250, 9100]}
- {users: [grafana], from: [10.0.0.0/8, 'fd00::/64'], nodes: ['edge-*'], ports: ['9000-9199']}
- {uids: [0, 65532], nodes: ['*'], ports: ['1-65535'], elsewhere: true}
- {clients: [kube-apiserver], nodes: [edge-1], ports: [10250]}
- {from: [10.96.0.0/16, 'fd01::/64'], nodes: ['edge-*'], ports: [10250]}
- {clients: [narrow], from: [10.97.0.0/16], nodes: ['*'], ports: [10250]}
";

#[test]
fn the_first_rule_that_fits_permits_and_without_one_nothing_is() {
    let rules = rules(RULES);
    let edge = Target::Node;
    for (requester, target, port, wanted) in [
        (client("prometheus", "192.0.2.1"), edge("x"), 9100, Some(0)),
        (client("scraper-7", "192.0.2.1"), edge("x"), 10250, Some(0)),
        (client("prometheus", "192.0.2.1"), edge("x"), 22, None),
        (client("prometheus2", "192.0.2.1"), edge("x"), 9100, None),
        (
            client("prometheus", "192.0.2.1"),
            Target::Elsewhere,
            9100,
            None,
        ),
        // A name means something in its own list only.
        (user("prometheus", "10.1.2.3"), edge("x"), 9100, None),
        (client("grafana", "10.1.2.3"), edge("edge-1"), 9100, None),
        (client("0", "10.1.2.3"), edge("edge-1"), 9100, None),
        (user("grafana", "10.1.2.3"), edge("edge-1"), 9100, Some(1)),
        (user("grafana", "10.1.2.3"), edge("edge-1"), 9200, None),
        (user("grafana", "10.1.2.3"), edge("site-1"), 9100, None),
        (user("grafana", "11.1.2.3"), edge("edge-1"), 9100, None),
        (
            user("grafana", "::ffff:10.1.2.3"),
            edge("edge-1"),
            9100,
            Some(1),
        ),
        (user("grafana", "fd00::9"), edge("edge-1"), 9100, Some(1)),
        (user("grafana", "fd00:1::9"), edge("edge-1"), 9100, None),
        (uid(Some(0)), edge("x"), 1, Some(2)),
        (uid(Some(65532)), Target::Elsewhere, 65535, Some(2)),
        (uid(Some(1)), edge("x"), 1, None),
        (uid(None), edge("x"), 1, None),
        (
            client("kube-apiserver", "192.0.2.1"),
            edge("edge-1"),
            10250,
            Some(3),
        ),
        (
            client("kube-apiserver", "192.0.2.1"),
            edge("edge-2"),
            10250,
            None,
        ),
        (tcp(Who::Unproved, "10.1.2.3"), edge("edge-1"), 9100, None),
        (Requester::pool(), edge("edge-1"), 9100, None),
        // Known by network alone: only rules that ask for nothing else, and for proof no such rule.
        (source("10.96.0.9"), edge("edge-1"), 10250, Some(4)),
        (source("::ffff:10.96.0.9"), edge("edge-1"), 10250, Some(4)),
        (source("fd01::9"), edge("edge-1"), 10250, Some(4)),
        (source("10.96.0.9"), edge("edge-1"), 9100, None),
        (source("10.96.0.9"), edge("site-1"), 10250, None),
        (source("10.96.0.9"), Target::Elsewhere, 10250, None),
        (source("10.97.0.9"), edge("edge-1"), 10250, None),
        (source("10.1.2.3"), edge("edge-1"), 9100, None),
        (client("other", "10.96.0.9"), edge("edge-1"), 10250, None),
        (user("other", "10.96.0.9"), edge("edge-1"), 10250, None),
        (tcp(Who::Unproved, "10.96.0.9"), edge("edge-1"), 10250, None),
    ] {
        let decided = decide(&rules, &requester, target, port).ok();
        let wanted = wanted.map(|n: usize| &rules[n]);
        assert_eq!(decided, wanted, "{requester:?} {target:?} {port}");
    }
}

#[test]
fn a_star_fits_names_and_not_the_lack_of_one() {
    let rules = rules("[{clients: ['*'], users: ['*'], nodes: ['*'], ports: ['1-65535']}]");
    let to = Target::Node("edge1");
    for (requester, permitted) in [
        (client("a", "192.0.2.1"), true),
        (user("a", "192.0.2.1"), true),
        (client("", "192.0.2.1"), false),
        (uid(Some(0)), false),
        (tcp(Who::Unproved, "192.0.2.1"), false),
    ] {
        assert_eq!(
            decide(&rules, &requester, to, 1).is_ok(),
            permitted,
            "{requester:?}"
        );
    }
}

#[test]
fn a_network_needs_an_address_to_be_in() {
    let rules = rules("[{uids: [0], from: [0.0.0.0/0, '::/0'], nodes: ['*'], ports: [1]}]");
    assert_eq!(
        decide(&rules, &uid(Some(0)), Target::Node("a"), 1),
        Err(Denied)
    );
}

#[test]
fn a_refusal_names_who_and_what_and_not_the_rules() {
    let policy = Policy::Listed(rules(RULES));
    let requester = client("kube-apiserver", "192.0.2.1");
    let asked = "ssh.default.svc:80".parse().unwrap();
    let route = Route::Edge {
        agent: "edge-1".parse().unwrap(),
        node: "edge-1".into(),
        to: "10.2.0.5:22".parse().unwrap(),
        pod: None,
    };
    let refusal = policy.check(&requester, &asked, &route).unwrap_err();
    assert_eq!(refusal.reason, Reason::NotAllowed);
    assert_eq!(refusal.reason.http_status(), 403);
    assert_eq!(
        refusal.sentence,
        "ssh.default.svc:80: not allowed: client/kube-apiserver may not ask for it"
    );
}

#[test]
fn who_is_named_by_no_rule_is_not_heard_at_all() {
    let listed = Policy::Listed(rules(RULES));
    let balancer = Some("192.0.2.10:7".parse().unwrap());
    let through =
        |from: &str| Requester::from_source(SocketAddr::new(from.parse().unwrap(), 1), balancer);
    for (requester, heard) in [
        (source("10.96.0.9"), true),
        (source("::ffff:10.96.0.9"), true),
        (through("10.96.0.9"), true),
        // Where the balancer is says nothing of whom it speaks for.
        (through("192.0.2.10"), false),
        (source("10.97.0.9"), false),
        (source("fd01:1::9"), false),
        (tcp(Who::Unproved, "10.96.0.9"), false),
    ] {
        assert_eq!(listed.hear(&requester).is_ok(), heard, "{requester:?}");
        assert!(Policy::Listed(Vec::new()).hear(&requester).is_err());
        assert!(Policy::Open.hear(&requester).is_ok());
    }
    let refusal = listed.hear(&through("::ffff:10.97.0.9")).unwrap_err();
    assert_eq!(refusal.reason, Reason::NotAllowed);
    assert_eq!(
        refusal.sentence,
        "source/10.97.0.9 via 192.0.2.10:7: not allowed: no rule names it"
    );
}

fn anybody() -> impl Strategy<Value = Requester> {
    let who = prop_oneof![
        ".*".prop_map(Who::Client),
        ".*".prop_map(Who::User),
        any::<Option<u32>>().prop_map(Who::Uid),
        Just(Who::Unproved),
        any::<(IpAddr, Option<SocketAddr>)>()
            .prop_map(|(address, via)| Who::Source { address, via }),
        Just(Who::Pool),
    ];
    let peer = prop_oneof![
        any::<SocketAddr>().prop_map(Peer::Tcp),
        any::<(Option<u32>, Option<i32>)>().prop_map(|(uid, pid)| Peer::Unix { uid, pid }),
    ];
    (who, proptest::option::of(peer)).prop_map(|(who, peer)| Requester { who, peer })
}

fn some_rule() -> impl Strategy<Value = Rule> {
    let name = || prop_oneof![Just("*".to_owned()), "[a-c]{0,2}\\*?"];
    let names = move || proptest::collection::vec(name().prop_map(crate::config::Pattern), 0..3);
    let ports = prop_oneof![Just("1-65535"), Just("80"), Just("9000-9100")];
    let from = prop_oneof![Just("0.0.0.0/0"), Just("10.0.0.0/8")];
    let parts = (
        names(),
        names(),
        proptest::collection::vec(0_u32..3, 0..3),
        names(),
        proptest::collection::vec(ports, 0..2),
        proptest::collection::vec(from, 0..2),
        any::<bool>(),
    );
    parts.prop_map(|(clients, users, uids, nodes, ports, from, elsewhere)| {
        let shown = serde_json::to_string(&(ports, from)).unwrap();
        let (ports, from): (Vec<_>, Vec<_>) = serde_json::from_str(&shown).unwrap();
        Rule {
            clients,
            users,
            uids,
            from,
            nodes,
            ports,
            elsewhere,
        }
    })
}

proptest! {
    #[test]
    fn no_rule_permits_nothing(requester in anybody(), node in ".*", port: u16) {
        for target in [Target::Node(&node), Target::Elsewhere] {
            prop_assert_eq!(decide(&[], &requester, target, port), Err(Denied));
        }
    }

    #[test]
    fn whoever_proved_nothing_is_never_permitted(rule in some_rule(), node in "[a-c]{1,2}", port: u16) {
        for requester in [tcp(Who::Unproved, "10.0.0.1"), uid(None), Requester::pool()] {
            for target in [Target::Node(&node), Target::Elsewhere] {
                prop_assert!(decide(std::slice::from_ref(&rule), &requester, target, port).is_err());
            }
        }
    }

    /// Rules only ever add: what one permits, more of them permit.
    #[test]
    fn another_rule_takes_nothing_away(
        rules in proptest::collection::vec(some_rule(), 1..4), requester in anybody(), node in "[a-c]{1,2}", port: u16,
    ) {
        let target = Target::Node(&node);
        let alone = rules.iter().any(|rule| decide(std::slice::from_ref(rule), &requester, target, port).is_ok());
        prop_assert_eq!(decide(&rules, &requester, target, port).is_ok(), alone);
    }
}
