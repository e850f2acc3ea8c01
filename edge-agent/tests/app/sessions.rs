//! How sessions come up, are kept one a server, and are replaced.

use std::net::UdpSocket;
use std::time::Duration;

use certs::test_ca::TestCa;
use certs::{Name, Role};
use proto::Reason;
use proto::transport::Session;
use tokio::time::Instant;

use crate::harness::{
    Destination, Peer, Server, Settings, eventually, metric, read_to_end, scenario,
};

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
            let (mut server, port) = twice(&ca).await;
            let mut settings = Settings::new(&ca, &[]);
            settings.servers = vec![format!("127.0.0.1:{port}"), format!("[::1]:{port}")];
            let agent = settings.start();
            let (first, second) = one_gives_way(&mut server).await;
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

/// The next two sessions, of which the first gives way to the second. In which order the server sees them is another matter.
async fn one_gives_way(server: &mut Server) -> (Peer, Peer) {
    let (mut one, mut other) = (server.session().await, server.session().await);
    let (away, (first, second)) = tokio::select! {
        away = one.told() => (away, (one, other)),
        away = other.told() => (away, (other, one)),
    };
    assert_eq!(away.reason, Reason::Replaced);
    assert_eq!(first.closed().await, Reason::Replaced);
    (first, second)
}

/// A server at two addresses of loopback, `127.0.0.1` and `[::1]`.
async fn twice(ca: &TestCa) -> (Server, u16) {
    let server = Server::at(ca, "s1", "[::]:0".parse().unwrap()).await;
    let port = server.address.port();
    (server, port)
}

#[test]
fn one_server_has_a_session_over_the_internet_and_one_over_the_line() {
    scenario(
        "sessions::one_server_has_a_session_over_the_internet_and_one_over_the_line",
        async {
            let ca = TestCa::new();
            let (mut server, port) = twice(&ca).await;
            let mut settings = Settings::new(&ca, &[]);
            settings.servers = vec![format!("127.0.0.1:{port}"), format!("express=[::1]:{port}")];
            let agent = settings.start();
            let destination = Destination::new().await;
            let address = destination.address.to_string();
            let (one, other) = (server.session().await, server.session().await);
            let (line, internet) = match one.hello.line.as_str() {
                "express" => (one, other),
                _ => (other, one),
            };
            assert_eq!((&*line.hello.line, &*internet.hello.line), ("express", ""));
            assert_eq!(line.hello.instance, internet.hello.instance);
            agent.has_sessions(2).await;
            agent.counts("corvid_sessions_over_lines", 1.0).await;
            let held = line.connect(&address).await;
            let dialled = destination.accept().await;

            // Each is kept for itself: the other's end is nothing to it.
            internet.session.close(Reason::Internal);
            let internet = server.session().await;
            internet.go_away(Reason::Draining, Duration::ZERO);
            let newest = server.session().await;
            for again in [&internet, &newest] {
                assert_eq!(again.hello.line, "");
            }
            assert_eq!(internet.closed().await, Reason::Replaced);
            let sessions = agent.sessions().await;
            let over_line: Vec<_> = sessions
                .iter()
                .filter_map(|it| it.line.as_deref())
                .collect();
            assert_eq!(over_line, ["express"]);
            drop(line.connect(&address).await);
            drop(destination.accept().await);
            agent.stopped().await;
            drop((held, dialled, line, internet, newest));
            server.stop().await;
        },
    );
}

#[test]
fn two_addresses_over_one_line_are_one_session_over_it() {
    scenario(
        "sessions::two_addresses_over_one_line_are_one_session_over_it",
        async {
            let ca = TestCa::new();
            let (mut server, port) = twice(&ca).await;
            let mut settings = Settings::new(&ca, &[]);
            settings.servers = vec![
                format!("express=127.0.0.1:{port}"),
                format!("express=[::1]:{port}"),
            ];
            let agent = settings.start();
            let (first, second) = one_gives_way(&mut server).await;
            agent.has_sessions(1).await;
            second.session.close(Reason::Internal);
            let third = server.session().await;
            assert_eq!(third.hello.line, "express");
            agent.has_sessions(1).await;
            agent.stopped().await;
            drop((first, second, third));
            server.stop().await;
        },
    );
}

#[test]
fn an_address_that_is_said_to_be_on_a_line_moves_there_without_a_gap() {
    scenario(
        "sessions::an_address_that_is_said_to_be_on_a_line_moves_there_without_a_gap",
        async {
            let ca = TestCa::new();
            let mut server = Server::new(&ca, "s1").await;
            let mut settings = Settings::new(&ca, &[&server]);
            let agent = settings.start();
            let mut before = server.session().await;
            assert_eq!(before.hello.line, "");
            settings.servers = vec![format!("express={}", server.address)];
            settings.write();
            let mut over_line = server.session().await;
            assert_eq!(over_line.hello.line, "express");
            assert_eq!(before.told().await.reason, Reason::Replaced);
            assert_eq!(before.closed().await, Reason::Replaced);
            agent.has_sessions(1).await;

            // And back.
            settings.servers = vec![server.address.to_string()];
            settings.write();
            let after = server.session().await;
            assert_eq!(after.hello.line, "");
            assert_eq!(over_line.told().await.reason, Reason::Replaced);
            agent.has_sessions(1).await;
            agent.stopped().await;
            drop((before, over_line, after));
            server.stop().await;
        },
    );
}

#[test]
fn an_agent_whose_line_never_answers_is_ready_all_the_same() {
    scenario(
        "sessions::an_agent_whose_line_never_answers_is_ready_all_the_same",
        async {
            let ca = TestCa::new();
            let dead = UdpSocket::bind("127.0.0.1:0").unwrap();
            let mut server = Server::new(&ca, "s1").await;
            let mut settings = Settings::new(&ca, &[&server]);
            let address = dead.local_addr().unwrap();
            settings.servers.insert(0, format!("express={address}"));
            let begin = Instant::now();
            let agent = settings.start();
            let peer = server.session().await;
            eventually("ready", async || {
                agent.is_ready().await.then_some(()).ok_or(())
            })
            .await;
            // What is waited for is given up after 10 s.
            assert!(begin.elapsed() < Duration::from_secs(8));
            // It goes on being tried, and that costs the other nothing.
            let tried = "corvid_reconnects_total{reason=\"unreachable\"}";
            agent.counts(tried, 1.0).await;
            assert!(agent.is_ready().await);
            agent.has_sessions(1).await;
            agent.stopped().await;
            drop(peer);
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
