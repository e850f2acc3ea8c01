//! What takes effect while the agent runs, and what is refused.

use std::path::PathBuf;

use certs::Role;
use certs::test_ca::{TestCa, TestLeaf};
use proto::Reason;

use crate::harness::{Destination, Server, Settings, eventually, metric, scenario};

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

#[test]
fn the_roots_of_a_mounted_file_are_followed() {
    scenario("reload::the_roots_of_a_mounted_file_are_followed", async {
        let (ca, other) = (TestCa::new(), TestCa::new());
        let mut first = Server::new(&ca, "s1").await;
        let mut second = Server::certified_by(&ca, &other, "s2").await;
        let mut settings = Settings::new(&ca, &[&first, &second]);
        let volume = Volume::new();
        volume.swap("1", ca.bundle().to_pem().as_bytes());
        settings.more = format!(
            "join: {{serviceAccountTokenFile: /not/needed, caFile: {:?}}}\n",
            volume.file()
        );
        let agent = settings.start();
        let peer = first.session().await;
        eventually("the second server is not believed", async || {
            let text = agent.metrics().await;
            metric(&text, "corvid_reconnects_total{reason=\"tls\"}").ok_or(text)
        })
        .await;

        // What is broken changes nothing, and is counted.
        volume.swap("2", b"nonsense");
        agent
            .counts("corvid_config_reloads_total{result=\"error\"}", 1.0)
            .await;
        let both = ca.bundle().merge(&other.bundle()).unwrap();
        volume.swap("3", both.to_pem().as_bytes());
        let rotated = second.session().await;
        agent.has_sessions(2).await;

        // And what is mounted counts at the start, whatever was kept.
        agent.stopped().await;
        drop((peer, rotated));
        let agent = settings.start();
        let sessions = (first.session().await, second.session().await);
        agent.has_sessions(2).await;
        agent.stopped().await;
        drop(sessions);
        first.stop().await;
        second.stop().await;
    });
}

/// A ConfigMap as the kubelet mounts it: the file is a link through `..data`, and that is what is swapped.
struct Volume(tempfile::TempDir);

impl Volume {
    fn new() -> Self {
        let volume = Self(tempfile::tempdir().unwrap());
        std::os::unix::fs::symlink("..data/ca.crt", volume.file()).unwrap();
        volume
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("ca.crt")
    }

    fn swap(&self, version: &str, text: &[u8]) {
        let (dir, new) = (self.0.path().join(version), self.0.path().join("..tmp"));
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("ca.crt"), text).unwrap();
        std::os::unix::fs::symlink(version, &new).unwrap();
        std::fs::rename(new, self.0.path().join("..data")).unwrap();
    }
}
