//! Which certificate opens which door: by role, authority, trust domain, age and revocation.

use std::collections::HashSet;

use certs::test_ca::{TestCa, TestLeaf};
use certs::{HandshakeFailure, Name, Revocations, Role};

use super::{DOORS, Door, at_each_door, door, shake, visitor};

#[tokio::test]
async fn each_role_opens_its_own_door_and_no_other() {
    let ca = TestCa::new();
    let cases = [
        (ca.agent("edge1"), [true, false, false, true, false]),
        (ca.client("kube"), [false, true, true, false, false]),
        (ca.server("s2"), [false, false, false, false, true]),
    ];
    for (credential, opens) in cases {
        let outcomes = at_each_door(&ca, Some(&credential), &Revocations::new()).await;
        for ((outcome, opens), door) in outcomes.into_iter().zip(opens).zip(DOORS) {
            let who = credential.identity();
            if opens {
                assert_eq!(outcome.accepted().unwrap().identity, *who, "{who} {door:?}");
            } else {
                assert_eq!(
                    outcome.refused_by_server(),
                    HandshakeFailure::WrongRole,
                    "{who} {door:?}"
                );
            }
        }
    }
}

#[tokio::test]
async fn without_a_certificate_only_enrolment_and_the_optional_frontend_open() {
    let ca = TestCa::new();
    let outcomes = at_each_door(&ca, None, &Revocations::new()).await;
    let [tunnel, frontend, optional, enroll, peer] = outcomes.try_into().unwrap();
    assert_eq!(peer.refused_by_server(), HandshakeFailure::NoCertificate);
    assert_eq!(tunnel.refused_by_server(), HandshakeFailure::NoCertificate);
    assert_eq!(
        frontend.refused_by_server(),
        HandshakeFailure::NoCertificate
    );
    assert_eq!(optional.accepted(), None);
    assert_eq!(enroll.accepted(), None);
}

#[tokio::test]
async fn certificates_of_another_authority_open_nothing() {
    let (ca, foreign) = (TestCa::new(), TestCa::new());
    let shown = [
        foreign.agent("edge1"),
        foreign.client("kube"),
        foreign.server("s1"),
    ];
    for credential in shown {
        for outcome in at_each_door(&ca, Some(&credential), &Revocations::new()).await {
            assert_eq!(outcome.refused_by_server(), HandshakeFailure::UnknownIssuer);
        }
    }
}

#[tokio::test]
async fn certificates_of_another_trust_domain_open_nothing() {
    let ca = TestCa::new();
    let leaf = |role| ca.leaf(&TestLeaf::new(role, "x").of_trust_domain("elsewhere"));
    for credential in [leaf(Role::Agent), leaf(Role::Client), leaf(Role::Server)] {
        for outcome in at_each_door(&ca, Some(&credential), &Revocations::new()).await {
            assert_eq!(outcome.refused_by_server(), HandshakeFailure::WrongRole);
        }
    }
}

#[tokio::test]
async fn an_expired_agent_may_renew_and_nothing_else() {
    let ca = TestCa::new();
    let expired = ca.leaf(&TestLeaf::new(Role::Agent, "edge1").expired(86_400));
    let outcomes = at_each_door(&ca, Some(&expired), &Revocations::new()).await;
    let [tunnel, frontend, optional, enroll, peer] = outcomes.try_into().unwrap();
    for outcome in [tunnel, frontend, optional, peer] {
        assert_eq!(outcome.refused_by_server(), HandshakeFailure::Expired);
    }
    assert_eq!(enroll.accepted().unwrap().identity, *expired.identity());
}

#[tokio::test]
async fn the_grace_excuses_nothing_but_expiry() {
    let (ca, foreign) = (TestCa::new(), TestCa::new());
    let own = ca.own(ca.server("s1"));
    let revoked = Revocations::new();
    let enroll = door(Door::Enroll, &own, &revoked);
    let expired = |role| TestLeaf::new(role, "edge1").expired(86_400);
    let late = TestLeaf::new(Role::Agent, "edge1").expired(31 * 86_400);
    let early = TestLeaf::new(Role::Agent, "edge1").not_yet_valid();
    let cases = [
        (ca.leaf(&late), HandshakeFailure::Expired),
        (
            foreign.leaf(&expired(Role::Agent)),
            HandshakeFailure::UnknownIssuer,
        ),
        (ca.leaf(&expired(Role::Client)), HandshakeFailure::WrongRole),
        (ca.leaf(&expired(Role::Server)), HandshakeFailure::WrongRole),
        (
            ca.leaf(&expired(Role::Agent).of_trust_domain("elsewhere")),
            HandshakeFailure::WrongRole,
        ),
    ];
    for (credential, failure) in cases {
        let client = visitor(Door::Enroll, &ca, Some(credential));
        assert_eq!(shake(&enroll, &client).await.refused_by_server(), failure);
    }
    // The other side can't tell "not yet" from "no more": TLS has one alert for both.
    let client = visitor(Door::Enroll, &ca, Some(ca.leaf(&early)));
    let outcome = shake(&enroll, &client).await;
    assert_eq!(outcome.server.unwrap_err(), HandshakeFailure::NotYetValid);

    revoked.replace(HashSet::from([Name::parse("edge1").unwrap()]));
    let client = visitor(Door::Enroll, &ca, Some(ca.leaf(&expired(Role::Agent))));
    assert_eq!(
        shake(&enroll, &client).await.refused_by_server(),
        HandshakeFailure::Revoked
    );
}

#[tokio::test]
async fn a_revoked_agent_is_refused_until_it_is_allowed_again() {
    let ca = TestCa::new();
    let own = ca.own(ca.server("s1"));
    let revoked = Revocations::new();
    let tunnel = door(Door::Tunnel, &own, &revoked);
    let client = visitor(Door::Tunnel, &ca, Some(ca.agent("edge1")));
    shake(&tunnel, &client).await.accepted();
    revoked.replace(HashSet::from([Name::parse("edge1").unwrap()]));
    assert_eq!(
        shake(&tunnel, &client).await.refused_by_server(),
        HandshakeFailure::Revoked
    );
    let other = visitor(Door::Tunnel, &ca, Some(ca.agent("edge2")));
    shake(&tunnel, &other).await.accepted();
    revoked.replace(HashSet::new());
    shake(&tunnel, &client).await.accepted();
}

#[tokio::test]
async fn an_expired_server_is_refused_by_other_servers() {
    let ca = TestCa::new();
    let peers = door(Door::Peer, &ca.own(ca.server("s1")), &Revocations::new());
    let expired = ca.leaf(&TestLeaf::new(Role::Server, "s2").expired(60));
    let client = certs::peer_client(&ca.own(expired)).unwrap();
    let refused = shake(&peers, &client).await.refused_by_server();
    assert_eq!(refused, HandshakeFailure::Expired);
}
