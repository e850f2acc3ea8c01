//! Which server is believed by whoever dials it, by its certificate or by a pin, and at what time.

use std::sync::Arc;
use std::time::Duration;

use certs::test_ca::{TestCa, TestLeaf, in_seconds};
use certs::{
    Clock, HandshakeFailure, LiveBundle, Revocations, Role, SERVER_SNI, TrustBundle, UnixTime,
};
use rustls::ClientConfig;

use super::{Door, door, shake};

#[tokio::test]
async fn an_agent_believes_no_server_but_a_genuine_one() {
    let ca = TestCa::new();
    let client = certs::tunnel_client(&ca.own(ca.agent("edge1"))).unwrap();
    believes_only_genuine_servers(&ca, Door::Tunnel, &client).await;
}

#[tokio::test]
async fn a_server_believes_no_other_server_but_a_genuine_one() {
    let ca = TestCa::new();
    let client = certs::peer_client(&ca.own(ca.server("s2"))).unwrap();
    believes_only_genuine_servers(&ca, Door::Peer, &client).await;
}

async fn believes_only_genuine_servers(ca: &TestCa, behind: Door, client: &Arc<ClientConfig>) {
    let foreign = TestCa::new();
    let server = TestLeaf::new(Role::Server, "s1");
    let cases = [
        (foreign.server("s1"), HandshakeFailure::UnknownIssuer),
        (
            ca.leaf(&server.clone().expired(60)),
            HandshakeFailure::Expired,
        ),
        (
            ca.leaf(&server.clone().not_yet_valid()),
            HandshakeFailure::NotYetValid,
        ),
        (
            ca.leaf(&server.clone().with_dns_names(&["localhost"])),
            HandshakeFailure::WrongName,
        ),
        (
            ca.leaf(&server.of_trust_domain("elsewhere")),
            HandshakeFailure::WrongRole,
        ),
        // Without server authentication among its usages, whatever its name.
        (
            ca.leaf(&TestLeaf::new(Role::Agent, "edge2").with_dns_names(&[SERVER_SNI])),
            HandshakeFailure::WrongRole,
        ),
    ];
    for (credential, failure) in cases {
        let door = door(behind, &ca.own(credential), &Revocations::new());
        assert_eq!(shake(&door, client).await.refused_by_client(), failure);
    }
}

#[tokio::test]
async fn an_agent_whose_clock_is_behind_goes_by_the_last_server_time() {
    let ca = TestCa::new();
    let tunnel = door(Door::Tunnel, &ca.own(ca.server("s1")), &Revocations::new());
    let mut agent = ca.own(ca.agent("edge1"));
    agent.clock = Clock::fixed(UnixTime::since_unix_epoch(Duration::ZERO));
    let client = certs::tunnel_client(&agent).unwrap();
    let refused = shake(&tunnel, &client).await.refused_by_client();
    assert_eq!(refused, HandshakeFailure::NotYetValid);

    let server = certs::peer(ca.server("s1").chain()).unwrap();
    agent.clock.observe(in_seconds(0), &server);
    shake(&tunnel, &client).await.accepted();
}

#[tokio::test]
async fn an_agent_whose_told_time_is_ahead_refuses_what_has_expired_by_it() {
    let ca = TestCa::new();
    let leaf = TestLeaf {
        ends_in: 600,
        ..TestLeaf::new(Role::Server, "s1")
    };
    let tunnel = door(Door::Tunnel, &ca.own(ca.leaf(&leaf)), &Revocations::new());
    let agent = ca.own(ca.agent("edge1"));
    let client = certs::tunnel_client(&agent).unwrap();
    let other = certs::peer(ca.server("s2").chain()).unwrap();
    agent.clock.observe(in_seconds(1200), &other);
    let refused = shake(&tunnel, &client).await.refused_by_client();
    assert_eq!(refused, HandshakeFailure::Expired);
}

#[tokio::test]
async fn a_pin_is_enough_to_know_a_server_and_the_wrong_one_to_refuse_it() {
    let (ca, foreign) = (TestCa::new(), TestCa::new());
    let own = ca.own(ca.server("s1"));
    let enroll = door(Door::Enroll, &own, &Revocations::new());
    let pinned = |pin| certs::enroll_client_pinned(pin, &own.trust_domain, &own.clock).unwrap();
    assert_eq!(shake(&enroll, &pinned(ca.pin())).await.accepted(), None);
    let refused = shake(&enroll, &pinned(foreign.pin()))
        .await
        .refused_by_client();
    assert_eq!(refused, HandshakeFailure::PinMismatch);

    // An impostor who shows the pinned root beside a leaf of his own authority.
    let mut impostor = ca.own(foreign.server("s1"));
    impostor.bundle = LiveBundle::new(TrustBundle::from_der(ca.bundle().roots().to_vec()).unwrap());
    let enroll = door(Door::Enroll, &impostor, &Revocations::new());
    let refused = shake(&enroll, &pinned(ca.pin())).await.refused_by_client();
    assert_eq!(refused, HandshakeFailure::UnknownIssuer);

    // A leaf of the pinned authority that is no server's.
    let agent = TestLeaf::new(Role::Agent, "edge1").with_dns_names(&[SERVER_SNI]);
    let enroll = door(Door::Enroll, &ca.own(ca.leaf(&agent)), &Revocations::new());
    let refused = shake(&enroll, &pinned(ca.pin())).await.refused_by_client();
    assert_eq!(refused, HandshakeFailure::WrongRole);
}
