//! How sessions come up, are kept one a server, and are replaced.

use std::net::UdpSocket;
use std::time::Duration;

use certs::test_ca::TestCa;
use certs::{Name, Role};
use proto::Reason;
use proto::transport::Session;
use tokio::time::Instant;

use crate::harness::{Destination, Server, Settings, eventually, metric, read_to_end, scenario};

#[test]
fn a_server_that_went_away_is_reached_again() {
    scenario(
        "sessions::a_server_that_went_away_is_reached_again",
        async {
            let ca = TestCa::new();
            let mut server = Server::new(&ca, "s1").await;
            let address = server.address;
            let agent = Settings::new(&ca, &[&server]).start();
            let peer = server.session().await;
            assert_eq!(peer.hello.agent, "edge1");
            eventually("ready", async || {
                agent.is_ready().await.then_some(()).ok_or(())
            })
            .await;
            peer.session.close(Reason::Draining);
            drop(peer);
            server.stop().await;
            agent.has_sessions(0).await;
            eventually("not ready", async || {
                (!agent.is_ready().await).then_some(()).ok_or(())
            })
            .await;

            let mut server = Server::at(&ca, "s1", address).await;
            let peer = server.session().await;
            eventually("ready again", async || {
                agent.is_ready().await.then_some(()).ok_or(())
            })
            .await;
            agent.stopped().await;
            drop(peer);
            server.stop().await;
        },
    );
}

#[test]
fn two_addresses_of_one_server_are_one_session() {
    scenario(
        "sessions::two_addresses_of_one_server_are_one_session",
        async {
            let ca = TestCa::new();
            let mut server = Server::at(&ca, "s1", "[::]:0".parse().unwrap()).await;
            let mut settings = Settings::new(&ca, &[]);
            let port = server.address.port();
            settings.servers = vec![format!("127.0.0.1:{port}"), format!("[::1]:{port}")];
            let agent = settings.start();
            let mut first = server.session().await;
            let second = server.session().await;
            assert_eq!(first.told().await.reason, Reason::Replaced);
            assert_eq!(first.closed().await, Reason::Replaced);
            agent.has_sessions(1).await;

            // The one that gave way takes over when the other is gone.
            second.session.close(Reason::Internal);
            let third = server.session().await;
            agent.has_sessions(1).await;
            agent.stopped().await;
            drop((first, second, third));
            server.stop().await;
        },
    );
}

#[test]
fn a_go_away_makes_a_new_session_before_the_old_one_ends() {
    scenario(
        "sessions::a_go_away_makes_a_new_session_before_the_old_one_ends",
        async {
            let ca = TestCa::new();
            let mut server = Server::new(&ca, "s1").await;
            let agent = Settings::new(&ca, &[&server]).start();
            let destination = Destination::new().await;
            let address = destination.address.to_string();
            let mut old = server.session().await;
            let (send, mut recv) = old.connect(&address).await;
            let dialled = destination.accept().await;

            old.go_away(Reason::Draining, Duration::ZERO);
            let new = server.session().await;
            assert_eq!(old.told().await.reason, Reason::Replaced);
            // Both serve: the old one what it has and what still comes, the new one the rest.
            drop(old.connect(&address).await);
            drop(destination.accept().await);
            drop(new.connect(&address).await);
            drop(destination.accept().await);

            drop(dialled);
            assert!(read_to_end(&mut recv).await.unwrap().is_empty());
            let mut send = send;
            proto::transport::SendHalf::finish(&mut send).unwrap();
            assert_eq!(old.closed().await, Reason::Replaced);
            agent.has_sessions(1).await;
            agent.stopped().await;
            drop((send, recv, old, new));
            server.stop().await;
        },
    );
}

#[test]
fn a_server_is_not_asked_before_it_said() {
    scenario("sessions::a_server_is_not_asked_before_it_said", async {
        let ca = TestCa::new();
        let mut server = Server::new(&ca, "s1").await;
        let agent = Settings::new(&ca, &[&server]).start();
        let old = server.session().await;
        let told = Instant::now();
        old.go_away(Reason::Draining, Duration::from_secs(2));
        let new = server.session().await;
        assert!(
            told.elapsed() >= Duration::from_secs(2),
            "{:?}",
            told.elapsed()
        );
        agent.stopped().await;
        drop((old, new));
        server.stop().await;
    });
}

#[test]
fn a_server_that_stops_in_the_handshake_does_not_hold_up_another() {
    scenario(
        "sessions::a_server_that_stops_in_the_handshake_does_not_hold_up_another",
        async {
            let ca = TestCa::new();
            let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
            let mut server = Server::new(&ca, "s1").await;
            let mut settings = Settings::new(&ca, &[&server]);
            settings
                .servers
                .insert(0, silent.local_addr().unwrap().to_string());
            let agent = settings.start();
            let peer = server.session().await;
            agent
                .counts("corvid_reconnects_total{reason=\"unreachable\"}", 1.0)
                .await;
            agent.has_sessions(1).await;
            agent.stopped().await;
            drop(peer);
            server.stop().await;
        },
    );
}

#[test]
fn a_server_that_is_not_the_one_it_says_is_left() {
    scenario(
        "sessions::a_server_that_is_not_the_one_it_says_is_left",
        async {
            let ca = TestCa::new();
            let mut server = Server::lying(&ca).await;
            let agent = Settings::new(&ca, &[&server]).start();
            let peer = server.session().await;
            assert_eq!(peer.closed().await, Reason::IdentityMismatch);
            agent
                .counts("corvid_reconnects_total{reason=\"identity_mismatch\"}", 1.0)
                .await;
            agent.has_sessions(0).await;
            agent.stopped().await;
            drop(peer);
            server.stop().await;
        },
    );
}

#[test]
fn a_refusal_is_counted_by_its_reason_and_obeyed() {
    scenario(
        "sessions::a_refusal_is_counted_by_its_reason_and_obeyed",
        async {
            let ca = TestCa::new();
            let server = Server::refusing(&ca, Reason::Overloaded, Duration::from_secs(600)).await;
            let agent = Settings::new(&ca, &[&server]).start();
            agent
                .counts("corvid_reconnects_total{reason=\"overloaded\"}", 1.0)
                .await;
            agent.stopped().await;
            server.stop().await;
        },
    );
}

#[test]
fn a_revoked_agent_comes_back_when_it_is_allowed() {
    scenario(
        "sessions::a_revoked_agent_comes_back_when_it_is_allowed",
        async {
            let ca = TestCa::new();
            let mut server = Server::new(&ca, "s1").await;
            server
                .revoked
                .replace([Name::parse("edge1").unwrap()].into());
            let agent = Settings::new(&ca, &[&server]).start();
            let name = "corvid_reconnects_total{reason=\"revoked\"}";
            eventually("revoked", async || {
                metric(&agent.metrics().await, name).ok_or("not yet")
            })
            .await;
            assert!(!server.has_session());
            server.revoked.replace([].into());
            let peer = server.session().await;
            agent.stopped().await;
            drop(peer);
            server.stop().await;
        },
    );
}

#[test]
fn a_server_of_another_authority_or_role_is_not_trusted() {
    scenario(
        "sessions::a_server_of_another_authority_or_role_is_not_trusted",
        async {
            let (ours, theirs) = (TestCa::new(), TestCa::new());
            let server = Server::new(&theirs, "s1").await;
            let agent = Settings::new(&ours, &[&server]).start();
            let name = "corvid_reconnects_total{reason=\"tls\"}";
            eventually("refused", async || {
                metric(&agent.metrics().await, name).ok_or("not yet")
            })
            .await;
            assert!(agent.sessions().await.is_empty());
            agent.stopped().await;
            server.stop().await;

            let ca = TestCa::new();
            let settings = Settings::new(&ca, &[]);
            settings.keep(
                &ca.leaf(&certs::test_ca::TestLeaf::new(Role::Client, "edge1")),
                &ca,
            );
            settings.write();
            let config = edge_agent::config::load(
                &settings.file(),
                &edge_agent::config::Overrides::default(),
            );
            assert!(config.is_err(), "no servers");
        },
    );
}

#[test]
fn a_wrong_credential_is_told_apart() {
    scenario("sessions::a_wrong_credential_is_told_apart", async {
        let ca = TestCa::new();
        let server = Server::new(&ca, "s1").await;
        let settings = Settings::new(&ca, &[&server]);
        settings.keep(&ca.agent("edge2"), &ca);
        let mut agent = settings.start();
        let error = agent.ended().await.unwrap_err();
        assert_eq!(error.exit(), daemon::Exit::Usage);
        assert!(
            error.to_string().contains("spiffe://corvid/agent/edge2"),
            "{error}"
        );

        let mut agent = Settings::without_credential(&[&server]).start();
        let error = agent.ended().await.unwrap_err();
        assert!(
            error.to_string().contains("no token: make one with"),
            "{error}"
        );
        server.stop().await;
    });
}
