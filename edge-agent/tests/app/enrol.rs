//! Tokens, renewal, and the examples in `deploy/`.

use std::fmt::Write as _;
use std::process::{Command, Output};
use std::time::Duration;

use certs::test_ca::{TestCa, TestLeaf, now};
use certs::{AgentFiles, NewToken, Role};
use daemon::Exit;
use proto::Reason;
use secrecy::ExposeSecret as _;

use crate::harness::{Server, Settings, eventually, scenario};

fn token(server: &Server, agents: &str) -> String {
    let new = NewToken {
        ttl: Duration::from_secs(3600),
        uses: 1,
        agents: agents.parse().unwrap(),
    };
    let token = server
        .store
        .as_ref()
        .unwrap()
        .create_token(&new, now())
        .unwrap();
    token.expose().expose_secret().to_owned()
}

/// An agent without a credential, with that token in a file.
fn joining(ca: &TestCa, server: &Server, token: &str) -> Settings {
    let mut settings = Settings::without_credential(&[server]);
    let file = settings.dir.path().join("token");
    std::fs::write(&file, format!("{token}\nwhat else was printed\n")).unwrap();
    writeln!(
        settings.more,
        "join: {{tokenFile: {file:?}, caPin: '{}'}}",
        ca.pin()
    )
    .unwrap();
    settings
}

#[test]
fn a_token_gives_a_credential_that_stays() {
    scenario("enrol::a_token_gives_a_credential_that_stays", async {
        let ca = TestCa::new();
        let mut server = Server::enrolling(&ca, "s1").await;
        let settings = joining(&ca, &server, &token(&server, "edge*"));
        let agent = settings.start();
        let peer = server.session().await;
        agent.stopped().await;
        drop(peer);
        // The token is used up, the credential is there.
        let agent = settings.start();
        let peer = server.session().await;
        agent.stopped().await;
        drop(peer);
        server.stop().await;
    });
}

#[test]
fn a_refused_token_can_be_put_right_while_the_agent_waits() {
    scenario(
        "enrol::a_refused_token_can_be_put_right_while_the_agent_waits",
        async {
            let ca = TestCa::new();
            let mut server = Server::enrolling(&ca, "s1").await;
            let settings = joining(&ca, &server, &token(&server, "other-*"));
            let agent = settings.start();
            eventually("it is up", async || {
                if agent.is_ready().await {
                    Err(())
                } else {
                    Ok(())
                }
            })
            .await;
            std::fs::write(settings.dir.path().join("token"), token(&server, "edge1")).unwrap();
            let peer = server.session().await;
            agent.stopped().await;
            drop(peer);

            let mut agent = joining(&ca, &server, "abcdef.0123456789abcdef").start();
            eventually("it is up", async || {
                if agent.is_ready().await {
                    Err(())
                } else {
                    Ok(())
                }
            })
            .await;
            agent.stop.shutdown.cancel();
            assert_eq!(
                agent.ended().await.unwrap(),
                Exit::Drained,
                "it stops while it enrols"
            );
            server.stop().await;
        },
    );
}

/// A leaf past two thirds of its life, which is renewed at once.
fn old_leaf() -> TestLeaf {
    TestLeaf {
        starts_in: -3000,
        ends_in: 600,
        ..TestLeaf::new(Role::Agent, "edge1")
    }
}

#[test]
fn a_renewed_certificate_makes_a_new_session_first() {
    scenario(
        "enrol::a_renewed_certificate_makes_a_new_session_first",
        async {
            let ca = TestCa::new();
            let mut server = Server::enrolling(&ca, "s1").await;
            let settings = Settings::new(&ca, &[&server]);
            let old = ca.leaf(&old_leaf());
            settings.keep(&old, &ca);
            let agent = settings.start();
            let fingerprint = |peer: &crate::harness::Peer| {
                certs::peer(&peer.session.peer_certificates())
                    .unwrap()
                    .fingerprint
            };
            // Renewal and first session race; the last session is that of the new leaf.
            let mut last = server.session().await;
            if fingerprint(&last) == old.fingerprint() {
                let new = server.session().await;
                assert_eq!(last.told().await.reason, Reason::Replaced);
                assert_eq!(last.closed().await, Reason::Replaced);
                last = new;
            }
            let (kept, _) = AgentFiles::new(settings.dir.path())
                .load()
                .unwrap()
                .unwrap();
            assert_eq!(fingerprint(&last), kept.fingerprint());
            agent
                .counts("corvid_renewals_total{result=\"ok\"}", 1.0)
                .await;
            agent.has_sessions(1).await;
            agent.stopped().await;
            drop(last);
            server.stop().await;
        },
    );
}

#[test]
fn an_expired_certificate_is_renewed_before_any_session() {
    scenario(
        "enrol::an_expired_certificate_is_renewed_before_any_session",
        async {
            let ca = TestCa::new();
            let mut server = Server::enrolling(&ca, "s1").await;
            let settings = Settings::new(&ca, &[&server]);
            settings.keep(
                &ca.leaf(&TestLeaf::new(Role::Agent, "edge1").expired(86_400)),
                &ca,
            );
            let agent = settings.start();
            let peer = server.session().await;
            agent.counts("corvid_sessions_opened_total", 1.0).await;
            agent.stopped().await;
            drop(peer);
            server.stop().await;
        },
    );
}

#[test]
fn a_state_directory_that_takes_nothing_ends_no_session() {
    scenario(
        "enrol::a_state_directory_that_takes_nothing_ends_no_session",
        async {
            let ca = TestCa::new();
            let mut server = Server::enrolling(&ca, "s1").await;
            let settings = Settings::new(&ca, &[&server]);
            let file = settings.dir.path().join("agent.yaml");
            settings.keep(&ca.leaf(&old_leaf()), &ca);
            // Nothing may grow any more, as on a full disk.
            let agent = settings.start();
            nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_FSIZE, 0, 0)
                .unwrap();
            assert!(std::fs::write(file.with_extension("probe"), "x").is_err());
            let mut last = server.session().await;
            if server.has_session() {
                last = server.session().await;
            }
            agent
                .counts("corvid_renewals_total{result=\"ok\"}", 1.0)
                .await;
            agent.has_sessions(1).await;
            agent.stopped().await;
            drop(last);
            server.stop().await;
        },
    );
}

fn agent(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_edge-agent"))
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn a_wrong_configuration_exits_with_64_and_every_mistake() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("agent.yaml");
    std::fs::write(&file, "name: BAD!\nservers: [nowhere]\nmemory: 1KiB\n").unwrap();
    for command in ["check-config", "run", "enroll"] {
        let output = agent(&[command, "--config", file.to_str().unwrap()]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{command}: {said}");
        assert!(
            ["name", "servers[0]", "memory"]
                .iter()
                .all(|key| said.contains(key)),
            "{said}"
        );
    }
    assert_eq!(agent(&["run", "--no-such-flag"]).status.code(), Some(64));
    assert_eq!(agent(&["--help"]).status.code(), Some(0));
}

#[test]
fn the_enroll_command_says_in_a_sentence_why_not() {
    scenario(
        "enrol::the_enroll_command_says_in_a_sentence_why_not",
        async {
            let ca = TestCa::new();
            let server = Server::enrolling(&ca, "s1").await;
            let enroll = async |settings: &Settings| {
                settings.write();
                let file = settings.file();
                let command = move || agent(&["enroll", "--config", file.to_str().unwrap()]);
                tokio::task::spawn_blocking(command).await.unwrap()
            };
            let settings = joining(&ca, &server, "abcdef.0123456789abcdef");
            let output = enroll(&settings).await;
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{said}");
            assert!(said.contains("the join token is wrong"), "{said}");

            let settings = joining(&ca, &server, &token(&server, "edge1"));
            for expected in ["edge1 is enrolled; ", "edge1 is enrolled already; "] {
                let output = enroll(&settings).await;
                let said = String::from_utf8_lossy(&output.stdout);
                assert_eq!(output.status.code(), Some(0), "{said}");
                assert!(said.starts_with(expected), "{said}");
            }
            server.stop().await;
        },
    );
}

#[test]
fn the_example_configuration_starts() {
    scenario("enrol::the_example_configuration_starts", async {
        let ca = TestCa::new();
        let mut server = Server::enrolling(&ca, "s1").await;
        let example = include_str!("../../../deploy/examples/edge-agent.yaml");
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        std::fs::write(&file, token(&server, "edge1")).unwrap();
        // Only what names this very host differs: addresses, files, the authority.
        let text = example
            .replace("proxy.example.com:8443", &server.address.to_string())
            .replace("/etc/corvid/token", file.to_str().unwrap())
            .replace(&format!("sha256:{}", "0".repeat(64)), &ca.pin().to_string());
        assert_ne!(text, example);
        let config = dir.path().join("edge-agent.yaml");
        let state = dir.path().join("state");
        let ports = "observe: {listen: '127.0.0.1:0'}\nadmin: {listen: '127.0.0.1:0'}\n";
        std::fs::write(&config, text + ports).unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_edge-agent"))
            .args(["run", "--config", config.to_str().unwrap()])
            .args(["--state-dir", state.to_str().unwrap()])
            .spawn()
            .unwrap();
        let mut peer = server.session().await;
        let id = nix::unistd::Pid::from_raw(process.id().try_into().unwrap());
        nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert_eq!(peer.told().await.reason, Reason::Draining);
        assert_eq!(peer.closed().await, Reason::Draining);
        let ended = tokio::task::spawn_blocking(move || process.wait())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(ended.code(), Some(0));
        drop(peer);
        server.stop().await;
    });
}
