//! Bundles and credentials that are replaced count from the next handshake.

use certs::test_ca::TestCa;
use certs::{HandshakeFailure, LiveBundle, Own, Revocations};

use super::{Door, door, shake};

#[tokio::test]
async fn old_and_new_authority_are_both_trusted_during_rotation() {
    let (old, new) = (TestCa::new(), TestCa::new());
    let both = old.bundle().merge(&new.bundle()).unwrap();
    let with_both = |mut own: Own| {
        own.bundle = LiveBundle::new(both.clone());
        own
    };
    for server in [&old, &new] {
        let server = with_both(server.own(server.server("s1")));
        let tunnel = door(Door::Tunnel, &server, &Revocations::new());
        for agent in [&old, &new] {
            let agent = with_both(agent.own(agent.agent("edge1")));
            shake(&tunnel, &certs::tunnel_client(&agent).unwrap())
                .await
                .accepted();
        }
    }
}

#[tokio::test]
async fn a_bundle_that_is_replaced_counts_from_the_next_handshake() {
    let (old, new) = (TestCa::new(), TestCa::new());
    let server = old.own(old.server("s1"));
    let tunnel = door(Door::Tunnel, &server, &Revocations::new());
    let mut agent = old.own(new.agent("edge1"));
    agent.bundle = LiveBundle::new(old.bundle());
    let client = certs::tunnel_client(&agent).unwrap();
    assert_eq!(
        shake(&tunnel, &client).await.refused_by_server(),
        HandshakeFailure::UnknownIssuer
    );
    server
        .bundle
        .replace(old.bundle().merge(&new.bundle()).unwrap());
    shake(&tunnel, &client).await.accepted();
    server.bundle.replace(old.bundle());
    assert_eq!(
        shake(&tunnel, &client).await.refused_by_server(),
        HandshakeFailure::UnknownIssuer
    );
}

#[tokio::test]
async fn a_credential_that_is_swapped_is_shown_from_the_next_handshake() {
    let ca = TestCa::new();
    let (server, agent) = (ca.own(ca.server("s1")), ca.own(ca.agent("edge1")));
    let tunnel = door(Door::Tunnel, &server, &Revocations::new());
    let client = certs::tunnel_client(&agent).unwrap();
    for _ in 0..2 {
        let outcome = shake(&tunnel, &client).await;
        assert_eq!(
            outcome.client.as_ref().unwrap().fingerprint,
            server.credential.load().fingerprint()
        );
        assert_eq!(
            outcome.accepted().unwrap().fingerprint,
            agent.credential.load().fingerprint()
        );
        server.credential.replace(ca.server("s1"));
        agent.credential.replace(ca.agent("edge1"));
    }
}
