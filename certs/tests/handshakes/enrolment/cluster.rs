//! Agents that a cluster vouches for: by the token of a ServiceAccount, as long as their node is there.

use std::sync::Arc;

use certs::test_ca::{TestCa, TestLeaf, now};
use certs::{
    Answer, EnrollError, EnrollLimits, HandshakeFailure, Name, NodeUid, NotVouched, Role,
    ServiceAccountToken, Vouch, Vouched, WhyNot,
};

use super::{Agent, Server};

/// A cluster with one node, and a pod there whose token is `a.b.c`.
#[derive(Debug)]
struct OneNode {
    name: &'static str,
    uid: &'static str,
}

impl OneNode {
    const TOKEN: &'static str = "a.b.c";
}

impl Vouch for OneNode {
    fn vouch<'a>(
        &'a self,
        token: &'a ServiceAccountToken,
    ) -> Answer<'a, Result<Vouched, NotVouched>> {
        let answer = match token.expose() {
            Self::TOKEN => Ok(Vouched {
                name: Name::parse(self.name).unwrap(),
                node_uid: self.uid.parse().unwrap(),
                workload: "a pod".to_owned(),
            }),
            other => {
                let why = match other {
                    "not.taken.here" => WhyNot::NotTaken,
                    "other.account.x" => WhyNot::OtherAccount,
                    "not.running.x" => WhyNot::NotRunning,
                    "node.gone.x" => WhyNot::NodeGone,
                    "api.away.x" => WhyNot::Unavailable,
                    _ => WhyNot::Refused,
                };
                Err(why.because("for the audit"))
            }
        };
        Box::pin(async move { answer })
    }

    fn is_gone<'a>(&'a self, name: &'a Name, uid: &'a NodeUid) -> Answer<'a, bool> {
        let there = (name.as_str(), uid.as_str()) == (self.name, self.uid);
        Box::pin(async move { !there })
    }
}

#[tokio::test]
async fn a_renewed_leaf_is_of_the_same_node_and_none_is_given_once_that_is_gone() {
    const UID: &str = "6f1c5b0e-9d1f-4c5e-8a55-0123456789ab";
    const OTHER: &str = "00000000-9d1f-4c5e-8a55-0123456789ab";
    let cluster = OneNode {
        name: "edge1",
        uid: UID,
    };
    let limits = EnrollLimits::default();
    let server = Server::of_cluster(TestCa::new(), limits, Some(Arc::new(cluster))).await;
    let leaf = |name: &str, uid: &str| {
        let leaf = TestLeaf::new(Role::Agent, name).of_node(uid);
        server.ca.leaf(&leaf)
    };
    let edge1 = Agent::new("edge1");
    let renewed = edge1.renew(&server, leaf("edge1", UID)).await.unwrap();
    let peer = certs::peer(renewed.credential.chain()).unwrap();
    assert_eq!(peer.node_uid.unwrap().as_str(), UID);
    for (name, uid) in [("edge1", OTHER), ("edge2", UID)] {
        let refused = edge1.renew(&server, leaf(name, uid)).await;
        assert!(matches!(refused, Err(EnrollError::NodeGone)), "{refused:?}");
    }
    // Edges outside the cluster have no uid, and nobody is asked about them.
    let outside = server.ca.agent("edge2");
    let renewed = edge1.renew(&server, outside).await.unwrap();
    let peer = certs::peer(renewed.credential.chain()).unwrap();
    assert_eq!(peer.node_uid, None);
}

#[tokio::test]
async fn whom_a_cluster_vouches_for_gets_the_certificate_of_its_node_and_no_other() {
    const UID: &str = "6f1c5b0e-9d1f-4c5e-8a55-0123456789ab";
    let cluster = OneNode {
        name: "edge1",
        uid: UID,
    };
    let limits = EnrollLimits::default();
    let server = Server::of_cluster(TestCa::new(), limits, Some(Arc::new(cluster))).await;
    let token = |text: &str| text.parse::<ServiceAccountToken>().unwrap();
    let good = token(OneNode::TOKEN);
    // Any of the roots will do, as during a rotation.
    let roots = TestCa::new().bundle().merge(&server.ca.bundle()).unwrap();
    let agent = Agent::new("edge1");
    // As often as it likes: what it gets is always the same node's.
    for _ in 0..2 {
        let enrolled = agent
            .enroll_trusting(&server, roots.clone(), &good)
            .await
            .unwrap();
        let peer = certs::peer(enrolled.credential.chain()).unwrap();
        assert_eq!(peer.identity.name.as_str(), "edge1");
        assert_eq!(peer.node_uid.unwrap().as_str(), UID);
        assert_eq!(enrolled.bundle.pins(), [server.ca.pin()]);
    }
    let other = Agent::new("edge2")
        .enroll_trusting(&server, roots.clone(), &good)
        .await;
    assert!(matches!(other, Err(EnrollError::OtherNode)), "{other:?}");

    for (text, is_final) in [
        ("not.taken.here", true),
        ("other.account.x", true),
        ("not.running.x", false),
        ("node.gone.x", false),
        ("api.away.x", false),
        ("ref.us.ed", false),
    ] {
        let refused = agent
            .enroll_trusting(&server, roots.clone(), &token(text))
            .await
            .unwrap_err();
        let named = match text {
            "not.taken.here" => matches!(refused, EnrollError::NoServiceAccounts),
            "other.account.x" => matches!(refused, EnrollError::OtherAccount),
            "not.running.x" => matches!(refused, EnrollError::NotRunning),
            "node.gone.x" => matches!(refused, EnrollError::NodeGone),
            "api.away.x" => matches!(refused, EnrollError::ClusterUnavailable),
            _ => matches!(refused, EnrollError::ServiceAccountRefused),
        };
        assert!(
            named && refused.is_final() == is_final,
            "{text}: {refused:?}"
        );
    }

    server.store.revoke_agent(&agent.name, now()).unwrap();
    let refused = agent.enroll_trusting(&server, roots, &good).await;
    assert!(matches!(refused, Err(EnrollError::Revoked)), "{refused:?}");

    // A server whose roots are others sees no token; one without a cluster takes none.
    let strangers = TestCa::new().bundle();
    let refused = agent.enroll_trusting(&server, strangers, &good).await;
    let Err(EnrollError::Handshake { failure, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(failure, HandshakeFailure::UnknownIssuer);
    let alone = Server::start().await;
    let refused = agent
        .enroll_trusting(&alone, alone.ca.bundle(), &good)
        .await;
    assert!(
        matches!(refused, Err(EnrollError::NoServiceAccounts)),
        "{refused:?}"
    );
}
