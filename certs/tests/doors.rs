//! Who may enter where: real handshakes of every role at every door, right and wrong.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests, where a panic is the report"
)]

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use certs::test_ca::{TestCa, TestLeaf, in_seconds};
use certs::{
    ALPN_ENROLL, ALPN_PEER, ALPN_TUNNEL, Clock, Credential, FrontendTrust, HandshakeFailure,
    LiveBundle, Name, OperatorPki, Own, Peer, Revocations, Role, SERVER_SNI, TrustBundle, UnixTime,
};
use rustls::client::ResolvesClientCert;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ServerConfig, SignatureScheme};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const GRACE: Duration = Duration::from_secs(30 * 86_400);

/// What became of a handshake, as each side saw it.
#[derive(Debug)]
struct Outcome {
    server: Result<Option<Peer>, HandshakeFailure>,
    client: Result<Peer, HandshakeFailure>,
}

impl Outcome {
    /// Accepted by both; who the client was to the server.
    fn accepted(self) -> Option<Peer> {
        self.client.expect("the client is content");
        self.server.expect("the server is content")
    }

    /// Refused by the server, and the client knows why.
    fn refused_by_server(self) -> HandshakeFailure {
        let failure = self.server.expect_err("the server refuses");
        assert_eq!(self.client.expect_err("the client learns of it"), failure);
        failure
    }

    /// Refused by the client.
    fn refused_by_client(self) -> HandshakeFailure {
        self.server.expect_err("the server learns of it");
        self.client.expect_err("the client refuses")
    }
}

async fn shake(server: &Arc<ServerConfig>, client: &Arc<ClientConfig>) -> Outcome {
    shake_as(server, client, SERVER_SNI).await
}

/// Both sides of a handshake in memory. In TLS 1.3 the client learns of a refusal only when it reads.
async fn shake_as(server: &Arc<ServerConfig>, client: &Arc<ClientConfig>, name: &str) -> Outcome {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let failure = |error: std::io::Error| HandshakeFailure::of(&error);
    let serve = async {
        let mut stream = TlsAcceptor::from(Arc::clone(server))
            .accept(far)
            .await
            .map_err(failure)?;
        let peer = certs::tls_peer(stream.get_ref().1).unwrap_or(None);
        stream.write_all(b"!").await.map_err(failure)?;
        stream.shutdown().await.map_err(failure)?;
        Ok(peer)
    };
    let dial = async {
        let name = name.to_owned().try_into().unwrap();
        let connector = TlsConnector::from(Arc::clone(client));
        let mut stream = connector.connect(name, near).await.map_err(failure)?;
        let peer = certs::tls_peer(stream.get_ref().1).unwrap().unwrap();
        let mut byte = [0];
        stream.read_exact(&mut byte).await.map_err(failure)?;
        Ok(peer)
    };
    let (server, client) = tokio::join!(serve, dial);
    Outcome { server, client }
}

/// The doors of one server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Door {
    Tunnel,
    Frontend,
    FrontendOptional,
    Enroll,
    Peer,
}

const DOORS: [Door; 5] = [
    Door::Tunnel,
    Door::Frontend,
    Door::FrontendOptional,
    Door::Enroll,
    Door::Peer,
];

fn door(door: Door, own: &Own, revoked: &Revocations) -> Arc<ServerConfig> {
    match door {
        Door::Tunnel => certs::tunnel_server(own, revoked),
        Door::Frontend => certs::frontend_server(own, &FrontendTrust::Ours),
        Door::FrontendOptional => certs::frontend_server_optional(own, &FrontendTrust::Ours),
        Door::Enroll => certs::enroll_server(own, revoked, GRACE),
        Door::Peer => certs::peer_server(own),
    }
    .unwrap()
}

#[derive(Debug)]
struct NoCertificate;

impl ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// A client that comes to `door` with `credential`, or with none.
fn visitor(door: Door, ca: &TestCa, credential: Option<Credential>) -> Arc<ClientConfig> {
    let shown = credential.is_some();
    let own = ca.own(credential.unwrap_or_else(|| ca.agent("nobody")));
    let mut config = ClientConfig::clone(&certs::tunnel_client(&own).unwrap());
    config.alpn_protocols = match door {
        Door::Tunnel => vec![ALPN_TUNNEL.to_vec()],
        Door::Frontend | Door::FrontendOptional => Vec::new(),
        Door::Enroll => vec![ALPN_ENROLL.to_vec()],
        Door::Peer => vec![ALPN_PEER.to_vec()],
    };
    if !shown {
        config.client_auth_cert_resolver = Arc::new(NoCertificate);
    }
    Arc::new(config)
}

/// `credential` of `ca` at each door of a server of `ca`: what each said.
async fn at_each_door(
    ca: &TestCa,
    credential: Option<&Credential>,
    revoked: &Revocations,
) -> Vec<Outcome> {
    let own = ca.own(ca.server("s1"));
    let mut outcomes = Vec::new();
    for each in DOORS {
        let client = visitor(each, ca, credential.cloned());
        outcomes.push(shake(&door(each, &own, revoked), &client).await);
    }
    outcomes
}

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
async fn an_expired_server_is_refused_by_other_servers() {
    let ca = TestCa::new();
    let peers = door(Door::Peer, &ca.own(ca.server("s1")), &Revocations::new());
    let expired = ca.leaf(&TestLeaf::new(Role::Server, "s2").expired(60));
    let client = certs::peer_client(&ca.own(expired)).unwrap();
    let refused = shake(&peers, &client).await.refused_by_server();
    assert_eq!(refused, HandshakeFailure::Expired);
}

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

#[tokio::test]
async fn an_operators_own_pki_lets_those_in_whom_it_names() {
    let (ours, theirs, foreign) = (TestCa::new(), TestCa::new(), TestCa::new());
    let names = vec![
        "kube-apiserver".to_owned(),
        "spiffe://example.org/scraper".to_owned(),
    ];
    let trust = FrontendTrust::Operator(OperatorPki::new(theirs.bundle(), names).unwrap());
    let frontend = certs::frontend_server(&ours.own(ours.server("s1")), &trust).unwrap();
    let visit = |pki: &TestCa, common_name: &str, uris: &[&str]| {
        let (chain, key) = pki.plain_client(common_name, uris);
        let mut config = ClientConfig::clone(&visitor(Door::Frontend, &ours, None));
        config.client_auth_cert_resolver = Arc::new(Shown::new(&chain, &key));
        Arc::new(config)
    };
    let apiserver = visit(&theirs, "kube-apiserver", &[]);
    shake(&frontend, &apiserver).await.accepted();
    let scraper = visit(&theirs, "x", &["spiffe://example.org/scraper"]);
    shake(&frontend, &scraper).await.accepted();
    let other = visit(&theirs, "system:node:a", &["spiffe://example.org/other"]);
    let refused = shake(&frontend, &other).await.refused_by_server();
    assert_eq!(refused, HandshakeFailure::WrongRole);
    let impostor = visit(&foreign, "kube-apiserver", &[]);
    let refused = shake(&frontend, &impostor).await.refused_by_server();
    assert_eq!(refused, HandshakeFailure::UnknownIssuer);
    // Where the operator's PKI is in force, ours is not.
    let our_client = visitor(Door::Frontend, &ours, Some(ours.client("kube")));
    let refused = shake(&frontend, &our_client).await.refused_by_server();
    assert_eq!(refused, HandshakeFailure::UnknownIssuer);
}

#[test]
fn an_operators_own_pki_without_names_is_refused() {
    assert!(OperatorPki::new(TestCa::new().bundle(), Vec::new()).is_err());
}

/// Shows a certificate that is none of ours.
#[derive(Debug)]
struct Shown(Arc<CertifiedKey>);

impl Shown {
    fn new(chain: &str, key: &str) -> Self {
        use rustls::pki_types::pem::PemObject as _;
        use rustls::pki_types::{CertificateDer, PrivateKeyDer};

        let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<_, _>>();
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        let shown = CertifiedKey::from_der(chain.unwrap(), key, &certs::provider());
        Self(Arc::new(shown.unwrap()))
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[tokio::test]
async fn a_frontends_client_verifies_the_name_it_dials() {
    let ca = TestCa::new();
    let frontend = door(
        Door::Frontend,
        &ca.own(ca.server("s1")),
        &Revocations::new(),
    );
    let client = certs::frontend_client(&ca.own(ca.client("kube"))).unwrap();
    for name in ["localhost", "127.0.0.1", "::1"] {
        shake_as(&frontend, &client, name).await.accepted();
    }
    let refused = shake_as(&frontend, &client, "elsewhere.example")
        .await
        .refused_by_client();
    assert_eq!(refused, HandshakeFailure::WrongName);
}

#[tokio::test]
async fn frontends_speak_tls_1_2_and_our_own_doors_do_not() {
    let ca = TestCa::new();
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(ca.bundle().roots().iter().cloned());
    let mut config = ClientConfig::builder_with_provider(certs::provider())
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.client_auth_cert_resolver = Arc::clone(
        &visitor(Door::Frontend, &ca, Some(ca.client("kube"))).client_auth_cert_resolver,
    );
    let old = Arc::new(config);
    let own = ca.own(ca.server("s1"));
    for each in [Door::Frontend, Door::FrontendOptional] {
        shake(&door(each, &own, &Revocations::new()), &old)
            .await
            .accepted();
    }
    for each in [Door::Tunnel, Door::Enroll, Door::Peer] {
        let outcome = shake(&door(each, &own, &Revocations::new()), &old).await;
        assert_eq!(outcome.server.unwrap_err(), HandshakeFailure::Protocol);
    }
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
