//! What takes effect while the agent runs, and what is refused.

use certs::Role;
use certs::test_ca::{TestCa, TestLeaf};
use proto::Reason;

use crate::harness::{Destination, Server, Settings, scenario};

#[test]
fn policy_and_servers_take_effect_without_touching_sessions() {
    scenario(
        "reload::policy_and_servers_take_effect_without_touching_sessions",
        async {
            let ca = TestCa::new();
            let mut first = Server::new(&ca, "s1").await;
            let mut second = Server::new(&ca, "s2").await;
            let mut settings = Settings::new(&ca, &[&first]);
            let everything = std::mem::replace(&mut settings.allow, "[]".to_owned());
            let agent = settings.start();
            let peer = first.session().await;
            let destination = Destination::new().await;
            let address = destination.address.to_string();
            assert_eq!(peer.refusal(&address).await, Reason::DestinationDenied);

            settings.allow = everything;
            settings.servers.push(second.address.to_string());
            settings.write();
            let other = second.session().await;
            agent
                .counts("corvid_config_reloads_total{result=\"ok\"}", 1.0)
                .await;
            drop(peer.connect(&address).await);
            drop(destination.accept().await);

            // A wrong file changes nothing.
            settings.allow = "[{cidr: nonsense, ports: [1]}]".to_owned();
            settings.write();
            agent
                .counts("corvid_config_reloads_total{result=\"error\"}", 1.0)
                .await;
            drop(peer.connect(&address).await);
            drop(destination.accept().await);
            agent.counts("corvid_sessions_opened_total", 2.0).await;
            agent.has_sessions(2).await;

            agent.stopped().await;
            drop((peer, other, destination));
            first.stop().await;
            second.stop().await;
        },
    );
}

#[test]
fn a_credential_of_the_operator_is_reloaded() {
    scenario("reload::a_credential_of_the_operator_is_reloaded", async {
        let ca = TestCa::new();
        let mut server = Server::new(&ca, "s1").await;
        let mut settings = Settings::without_credential(&[&server]);
        let pki = tempfile::tempdir().unwrap();
        let [crt, key, roots] = ["a.crt", "a.key", "ca.crt"].map(|name| pki.path().join(name));
        ca.agent("edge1").save(&crt, &key).unwrap();
        ca.bundle().save(&roots).unwrap();
        settings.more =
            format!("credential: {{certificate: {crt:?}, key: {key:?}, ca: {roots:?}}}\n");
        let agent = settings.start();
        let mut old = server.session().await;

        let longer = TestLeaf {
            ends_in: 7200,
            ..TestLeaf::new(Role::Agent, "edge1")
        };
        let longer = ca.leaf(&longer);
        longer.save(&crt, &key).unwrap();
        let new = server.session().await;
        let leaf = certs::peer(&new.session.peer_certificates()).unwrap();
        assert_eq!(leaf.fingerprint, longer.fingerprint());
        let ends = longer.not_after().as_secs();
        agent
            .counts("corvid_certificate_expiry_timestamp_seconds", ends as f64)
            .await;
        assert_eq!(old.told().await.reason, Reason::Replaced);
        assert_eq!(old.closed().await, Reason::Replaced);

        // A broken one is refused, and counted.
        std::fs::write(&crt, "nonsense").unwrap();
        agent
            .counts("corvid_config_reloads_total{result=\"error\"}", 1.0)
            .await;
        agent.has_sessions(1).await;
        agent.stopped().await;
        drop((old, new));
        server.stop().await;
    });
}
