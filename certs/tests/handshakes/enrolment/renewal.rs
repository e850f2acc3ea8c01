//! A certificate in place of one that is there: within the grace, during a rotation, with a full disk; and who gets none.

use std::collections::HashSet;
use std::sync::Arc;

use certs::test_ca::{TestCa, TestLeaf, now};
use certs::{
    AgentFiles, Ca, EnrollError, HandshakeFailure, LiveBundle, LiveCredential, Own, Role,
    TrustDomain,
};

use super::{Agent, HOUR, Server};

#[tokio::test]
async fn a_renewed_leaf_has_the_old_name_and_a_new_key() {
    let server = Server::start().await;
    let agent = Agent::new("edge1");
    let enrolled = agent.enroll(&server, &server.token(1, "*")).await.unwrap();
    let renewed = agent
        .renew(&server, enrolled.credential.clone())
        .await
        .unwrap();
    renewed.stored.unwrap();
    assert_eq!(
        renewed.credential.identity(),
        enrolled.credential.identity()
    );
    assert_ne!(renewed.credential.serial(), enrolled.credential.serial());
    assert_ne!(
        secrecy::ExposeSecret::expose_secret(&renewed.credential.key_pem()),
        secrecy::ExposeSecret::expose_secret(&enrolled.credential.key_pem())
    );
    let (kept, _) = agent.files.load().unwrap().unwrap();
    assert_eq!(kept.fingerprint(), renewed.credential.fingerprint());
}

#[tokio::test]
async fn a_leaf_that_expired_within_the_grace_is_renewed() {
    let server = Server::start().await;
    let expired = server
        .ca
        .leaf(&TestLeaf::new(Role::Agent, "edge1").expired(29 * 86_400));
    let renewed = Agent::new("edge1").renew(&server, expired).await.unwrap();
    assert!(renewed.credential.not_after() > now());
}

#[tokio::test]
async fn a_leaf_that_expired_beyond_the_grace_is_not() {
    let server = Server::start().await;
    let expired = server
        .ca
        .leaf(&TestLeaf::new(Role::Agent, "edge1").expired(31 * 86_400));
    let refused = Agent::new("edge1")
        .renew(&server, expired)
        .await
        .unwrap_err();
    assert!(
        matches!(refused, EnrollError::TooLate) && refused.is_final(),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_revoked_agent_is_not_renewed_whoever_notices_first() {
    let server = Server::start().await;
    let agent = Agent::new("edge1");
    server.store.revoke_agent(&agent.name, now()).unwrap();
    // The store knows, the handshake not yet.
    let refused = agent.renew(&server, server.ca.agent("edge1")).await;
    assert!(matches!(refused, Err(EnrollError::Revoked)), "{refused:?}");
    server.revoked.replace(HashSet::from([agent.name.clone()]));
    let refused = agent.renew(&server, server.ca.agent("edge1")).await;
    assert!(matches!(refused, Err(EnrollError::Revoked)), "{refused:?}");
}

#[tokio::test]
async fn clients_and_strangers_are_not_renewed() {
    let server = Server::start().await;
    let agent = Agent::new("edge1");
    for credential in [server.ca.client("kube"), server.ca.server("s2")] {
        let refused = agent.renew(&server, credential).await.unwrap_err();
        let EnrollError::Handshake { failure, .. } = refused else {
            panic!("{refused:?}")
        };
        assert_eq!(failure, HandshakeFailure::WrongRole);
    }
    let stranger = TestCa::new().agent("edge1");
    let refused = agent.renew(&server, stranger).await.unwrap_err();
    assert!(
        matches!(refused, EnrollError::UnknownAuthority),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_renewal_during_rotation_brings_both_roots_and_a_chain_for_either() {
    let old = Ca::create(&TrustDomain::default(), now()).unwrap();
    let server = Server::start_with(&old).await;
    let agent = Agent::new("edge1");
    let before = agent.enroll(&server, &server.token(1, "*")).await.unwrap();
    let new = old.rotate(HOUR, now()).unwrap();
    server.issuer.replace(Arc::new(new.issuer(now()).unwrap()));
    let own = Own {
        credential: LiveCredential::new(before.credential),
        bundle: LiveBundle::new(before.bundle),
        clock: agent.clock.clone(),
        trust_domain: TrustDomain::default(),
    };
    let renewed = certs::renew(server.address, &own, &agent.files)
        .await
        .unwrap();
    assert_eq!(renewed.bundle.pins(), [new.pin(), old.pin()]);
    assert_eq!(renewed.credential.chain().len(), 2);
    let (kept, _) = agent.files.load().unwrap().unwrap();
    assert_eq!(kept.chain(), renewed.credential.chain());
}

#[tokio::test]
async fn a_full_disk_at_renewal_leaves_a_credential_that_works_in_memory() {
    let server = Server::start().await;
    let mut agent = Agent::new("edge1");
    let own = server.ca.own(server.ca.agent("edge1"));
    agent.files = AgentFiles::new("/proc/none");
    let renewed = certs::renew(server.address, &own, &agent.files)
        .await
        .unwrap();
    assert!(renewed.stored.is_err());
    assert_eq!(renewed.credential.identity().name, agent.name);
}

#[tokio::test]
async fn a_full_disk_at_the_server_keeps_no_agent_from_its_renewal() {
    let server = Server::start().await;
    // The store's place is taken by a directory: notes can't be written any more.
    std::fs::create_dir(server.store.path()).unwrap();
    let refused = Agent::new("edge1")
        .renew(&server, server.ca.agent("edge1"))
        .await;
    // But without a readable store nobody is certified: revocations are in it.
    assert!(
        matches!(refused, Err(EnrollError::Unavailable)),
        "{refused:?}"
    );
    std::fs::remove_dir(server.store.path()).unwrap();
    let lock = server.store.path().with_file_name("store.lock");
    std::fs::create_dir(&lock).unwrap();
    Agent::new("edge1")
        .renew(&server, server.ca.agent("edge1"))
        .await
        .unwrap();
}
