//! What is negotiated, who speaks another protocol, and the same rules over QUIC.

use certs::test_ca::{TestCa, TestLeaf};
use certs::{ALPN_TUNNEL, HandshakeFailure, LiveBundle, Own, Peer, Revocations, Role, SERVER_SNI};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{Door, door, shake, visitor};

#[tokio::test]
async fn the_tunnels_protocol_is_not_spoken_between_servers() {
    let ca = TestCa::new();
    let own = ca.own(ca.server("s1"));
    let peers = door(Door::Peer, &own, &Revocations::new());
    let client = certs::tunnel_client(&ca.own(ca.server("s2"))).unwrap();
    let refused = shake(&peers, &client).await.refused_by_server();
    assert_eq!(refused, HandshakeFailure::Alpn);
}

#[tokio::test]
async fn the_tunnel_negotiates_its_protocol_and_a_post_quantum_key_exchange() {
    let ca = TestCa::new();
    let tunnel = door(Door::Tunnel, &ca.own(ca.server("s1")), &Revocations::new());
    let client = certs::tunnel_client(&ca.own(ca.agent("edge1"))).unwrap();
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = SERVER_SNI.try_into().unwrap();
    let (server, _client) = tokio::join!(
        TlsAcceptor::from(tunnel).accept(far),
        TlsConnector::from(client).connect(name, near),
    );
    let server = server.unwrap();
    let connection = server.get_ref().1;
    assert_eq!(connection.alpn_protocol(), Some(ALPN_TUNNEL));
    let group = connection.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
    let suite = connection.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
}

#[tokio::test]
async fn without_the_tunnels_protocol_the_tunnel_stays_closed() {
    let ca = TestCa::new();
    let tunnel = door(Door::Tunnel, &ca.own(ca.server("s1")), &Revocations::new());
    let client = visitor(Door::Enroll, &ca, Some(ca.agent("edge1")));
    assert_eq!(
        shake(&tunnel, &client).await.refused_by_server(),
        HandshakeFailure::Alpn
    );
}

/// A QUIC connection over loopback: what each side saw.
async fn quic(
    server: &Own,
    agent: &Own,
) -> (
    Result<Peer, HandshakeFailure>,
    Result<Peer, HandshakeFailure>,
) {
    let loopback = (std::net::Ipv4Addr::LOCALHOST, 0).into();
    let crypto = certs::tunnel_server_quic(server, &Revocations::new()).unwrap();
    let config = quinn::ServerConfig::with_crypto(crypto);
    let server = quinn::Endpoint::server(config, loopback).unwrap();
    let client = quinn::Endpoint::client(loopback).unwrap();
    let config = quinn::ClientConfig::new(certs::tunnel_client_quic(agent).unwrap());
    let serve = async {
        let accepted = server.accept().await.unwrap().await;
        let connection = accepted.map_err(|error| HandshakeFailure::of_quic(&error))?;
        let peer = certs::quic_peer(&connection).unwrap();
        let mut stream = connection.open_uni().await.unwrap();
        stream.write_all(b"!").await.unwrap();
        stream.finish().unwrap();
        stream.stopped().await.unwrap();
        Ok(peer)
    };
    let dial = async {
        let failure = |error: quinn::ConnectionError| HandshakeFailure::of_quic(&error);
        let connecting = client.connect_with(config, server.local_addr().unwrap(), SERVER_SNI);
        let connection = connecting.unwrap().await.map_err(failure)?;
        let mut stream = connection.accept_uni().await.map_err(failure)?;
        stream.read_to_end(1).await.unwrap();
        certs::quic_peer(&connection).map_err(|_error| HandshakeFailure::NoCertificate)
    };
    tokio::join!(serve, dial)
}

#[tokio::test]
async fn the_same_rules_hold_over_quic() {
    let (ca, foreign) = (TestCa::new(), TestCa::new());
    let server = ca.own(ca.server("s1"));
    let (at_server, at_agent) = quic(&server, &ca.own(ca.agent("edge1"))).await;
    assert_eq!(
        at_server.unwrap().identity.to_string(),
        "spiffe://corvid/agent/edge1"
    );
    assert_eq!(
        at_agent.unwrap().identity.to_string(),
        "spiffe://corvid/server/s1"
    );

    let expired = ca.leaf(&TestLeaf::new(Role::Agent, "edge1").expired(60));
    let mut other = ca.own(foreign.agent("edge1"));
    other.bundle = LiveBundle::new(ca.bundle());
    let cases = [
        (ca.own(ca.client("kube")), HandshakeFailure::WrongRole),
        (ca.own(expired), HandshakeFailure::Expired),
        (other, HandshakeFailure::UnknownIssuer),
    ];
    for (agent, failure) in cases {
        let (at_server, at_agent) = quic(&server, &agent).await;
        assert_eq!(at_server.unwrap_err(), failure);
        assert_eq!(at_agent.unwrap_err(), failure);
    }
    let (_, at_agent) = quic(
        &foreign.own(foreign.server("s1")),
        &ca.own(ca.agent("edge1")),
    )
    .await;
    assert_eq!(at_agent.unwrap_err(), HandshakeFailure::UnknownIssuer);
}
