//! Agents that enrol with their pods' ServiceAccount tokens, against an emulated Kubernetes API, and those that should
//! not.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use certs::{AgentFiles, Clock, EnrollError, EnrollRequest, Name, Peer, Proof, Trust, TrustDomain};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use proto::Reason;
use proto::transport::Session as _;
use proxy_server::commands::{ca_retire, ca_rotate};
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::api::tokens::{Issued, NODE_NAME, NODE_UID};
use crate::api::{Api, Mood};
use crate::cluster::{edge, is_told, start, until_metric};
use crate::rotation::{command, until_roots};
use crate::stack::{Stack, eventually, rewrite, within};

const UID: &str = "6f1c5b0e-9d1f-4c5e-8a55-0123456789ab";
const OTHER: &str = "00000000-9d1f-4c5e-8a55-0123456789ab";

const ENROL: &str = "kubernetes: {kubeconfig: KUBECONFIG, enrol: {}}";

fn edge_of(name: &str, uid: &str) -> Value {
    let mut node = edge(name, &[]);
    node["metadata"]["uid"] = json!(uid);
    node
}

/// An API with the node `edge1` and an agent's pod on it, whose path and token are returned.
async fn cluster() -> (Api, String, String) {
    let api = Api::start().await;
    api.put(edge_of("edge1", UID));
    let pod = api.pod("edge-agent-1", "uid-of-pod-1", "edge1");
    let token = api.token_of(&pod);
    (api, pod, token)
}

/// Asks for the certificate of `name`, trusting the roots of that server.
async fn enrol(stack: &Stack, name: &str, token: &str) -> Result<Peer, EnrollError> {
    let dir = tempfile::tempdir().unwrap();
    let (name, trust_domain) = (Name::parse(name).unwrap(), TrustDomain::default());
    let enrolled = certs::enroll(&EnrollRequest {
        server: stack.backend,
        trust: &Trust::Bundle(stack.issuer().bundle().clone()),
        proof: &Proof::ServiceAccount(token.parse().unwrap()),
        name: &name,
        trust_domain: &trust_domain,
        files: &AgentFiles::new(dir.path()),
        clock: &Clock::system(),
    })
    .await?;
    Ok(certs::peer(enrolled.credential.chain()).unwrap())
}

fn uid(peer: &Peer) -> &str {
    peer.node_uid.as_ref().unwrap().as_str()
}

/// Token and roots in files, as they are mounted in a pod.
fn mounted(stack: &Stack, token: &str) -> (PathBuf, String) {
    let file = |name: &str| stack.dir.path().join(name);
    std::fs::write(file("pod-token"), token).unwrap();
    stack
        .issuer()
        .bundle()
        .save(&file("mounted-ca.crt"))
        .unwrap();
    let join = format!(
        "{{serviceAccountTokenFile: {}, caFile: {}}}",
        file("pod-token").display(),
        file("mounted-ca.crt").display()
    );
    (file("pod-token"), join)
}

fn node_of_session(stack: &Stack, agent: &str) -> Option<String> {
    let sessions = stack.registry.of(&agent.parse().unwrap());
    let uid = sessions.last()?.node_uid.as_ref()?;
    Some(uid.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_in_a_pod_needs_no_secret_and_comes_back_with_a_node_that_joins_again() {
    let (api, pod, token) = cluster().await;
    let mut stack = start(&api, ENROL);
    let (file, join) = mounted(&stack, &token);
    stack.agent_joining("edge1", &join, "backoff: {min: 10ms, max: 100ms}");
    stack.sessions("edge1", 1).await;
    assert_eq!(node_of_session(&stack, "edge1").as_deref(), Some(UID));

    // The node is deleted, and its pod with it: the session ends, and the token is of no use either.
    api.remove("pods", &pod);
    api.delete("edge1");
    is_told(&stack, "edge1:10250", "last error: the node was deleted").await;
    eventually("it asks in vain", || api.seen("tokenreview") >= 3).await;
    assert_eq!(node_of_session(&stack, "edge1"), None);

    // It joins again under its name. A new pod, a new token: a new certificate, without anybody's help.
    api.put(edge_of("edge1", OTHER));
    let pod = api.pod("edge-agent-1", "uid-of-pod-2", "edge1");
    rewrite(&file, &format!("{}\n", api.token_of(&pod)));
    stack.sessions("edge1", 1).await;
    assert_eq!(node_of_session(&stack, "edge1").as_deref(), Some(OTHER));
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_in_a_pod_comes_back_by_itself_when_its_authority_was_retired_at_once() {
    let (api, _pod, token) = cluster().await;
    let mut stack = start(&api, ENROL);
    let (_file, join) = mounted(&stack, &token);
    stack.agent_joining("edge1", &join, "backoff: {min: 10ms, max: 100ms}");
    stack.sessions("edge1", 1).await;
    let session = Arc::clone(&stack.registry.all()[0]);

    // The old key is in wrong hands: everything it has signed is worthless at once, this agent's leaf too.
    command(&stack, |args| ca_rotate(args, None)).await.unwrap();
    until_roots(&[&stack], 2).await;
    command(&stack, |args| ca_retire(args, true)).await.unwrap();
    until_roots(&[&stack], 1).await;
    let roots = stack.issuer().bundle().clone();
    roots
        .save(&stack.dir.path().join("mounted-ca.crt"))
        .unwrap();
    session.transport.close(Reason::SessionLost);
    eventually("it is back, with another certificate", || {
        let all = stack.registry.all();
        matches!(&all[..], [new] if new.id != session.id)
    })
    .await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_waits_for_a_cluster_that_is_away() {
    let (mut api, _pod, token) = cluster().await;
    api.down().await;
    let mut stack = start(&api, ENROL);
    let (_file, join) = mounted(&stack, &token);
    let refused = enrol(&stack, "edge1", &token).await.unwrap_err();
    assert!(
        matches!(refused, EnrollError::ClusterUnavailable) && !refused.is_final(),
        "{refused:?}"
    );
    stack.agent_joining("edge1", &join, "backoff: {min: 10ms, max: 100ms}");
    api.up().await;
    for mood in [
        Mood::Status(500),
        Mood::Status(429),
        Mood::Status(403),
        Mood::Elsewhere,
        Mood::Nonsense,
        // Nothing is said, and that is noticed in time.
        Mood::Silent,
    ] {
        api.mood(mood);
        let refused = enrol(&stack, "edge1", &token).await;
        assert!(
            matches!(refused, Err(EnrollError::ClusterUnavailable)),
            "{mood:?}: {refused:?}"
        );
    }
    assert_eq!(node_of_session(&stack, "edge1"), None);
    api.mood(Mood::Well);
    stack.sessions("edge1", 1).await;
    assert_eq!(node_of_session(&stack, "edge1").as_deref(), Some(UID));
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_is_not_quite_right_gives_nothing() {
    let (api, pod, token) = cluster().await;
    let stack = start(&api, ENROL);
    api.put(edge_of("edge2", OTHER));
    let other = api.pod("edge-agent-2", "uid-of-pod-2", "edge2");
    let good = api.issued_for(&pod);
    let like = |change: &dyn Fn(&mut Issued)| {
        let mut issued = good.clone();
        change(&mut issued);
        api.token(issued)
    };
    let of_user = |name: &'static str| {
        like(&move |issued| issued.username = format!("system:serviceaccount:{name}"))
    };
    let says = |key: &'static str, value: Value| {
        like(&move |issued| {
            issued.extra.insert(key.to_owned(), json!([value.clone()]));
        })
    };
    let refused = async |token: &str| enrol(&stack, "edge1", token).await.unwrap_err();
    for (what, token) in [
        ("another cluster's", "eyJ.eyJ.c2ln".to_owned()),
        (
            "another audience's",
            like(&|issued| issued.audiences = vec!["https://kubernetes.default.svc".to_owned()]),
        ),
        (
            "of a pod that was deleted",
            like(&|issued| issued.bound = Some(("/nowhere".to_owned(), "x".to_owned()))),
        ),
    ] {
        let error = refused(&token).await;
        let named = matches!(error, EnrollError::ServiceAccountRefused);
        assert!(named, "{what}: {error:?}");
    }
    for token in [
        of_user("corvid:default"),
        of_user("shop:edge-agent"),
        like(&|issued| issued.username = "system:node:edge1".to_owned()),
        like(&|issued| issued.username = "system:serviceaccount:corvid:edge-agent2".to_owned()),
    ] {
        let error = refused(&token).await;
        assert!(matches!(error, EnrollError::OtherAccount), "{error:?}");
    }
    // kube-apiserver believes the token, but what it says fits no pod that runs there.
    let unbound = like(&|issued| {
        issued.bound = None;
        issued.extra.clear();
    });
    let pod_name = "authentication.kubernetes.io/pod-name";
    let pod_uid = "authentication.kubernetes.io/pod-uid";
    for (what, token) in [
        ("a token without a pod", unbound),
        ("a pod that is gone", says(pod_name, json!("edge-agent-9"))),
        ("another pod's uid", says(pod_uid, json!("uid-of-pod-9"))),
        ("another pod's name", says(pod_name, json!("edge-agent-2"))),
        ("another node's name", says(NODE_NAME, json!("edge2"))),
        (
            "a way out",
            says(pod_name, json!("../../secrets/corvid-ca")),
        ),
    ] {
        let error = refused(&token).await;
        assert!(
            matches!(error, EnrollError::NotRunning),
            "{what}: {error:?}"
        );
    }
    for (at, value) in [
        (
            "/metadata",
            json!({"name": "edge-agent-1", "uid": "uid-of-pod-1", "deletionTimestamp": "2026-01-01T00:00:00Z"}),
        ),
        ("/status", json!({"phase": "Failed"})),
        (
            "/spec",
            json!({"nodeName": "edge1", "serviceAccountName": "default"}),
        ),
        (
            "/spec",
            json!({"nodeName": "edge2", "serviceAccountName": "edge-agent"}),
        ),
        ("/spec", json!({"serviceAccountName": "edge-agent"})),
    ] {
        let before = api.object("pods", &pod).unwrap();
        api.change(&pod, |pod| *pod.pointer_mut(at).unwrap() = value.clone());
        let error = refused(&token).await;
        assert!(
            matches!(error, EnrollError::NotRunning),
            "{value}: {error:?}"
        );
        api.set("pods", &pod, before);
    }
    // The other node's token is good for the other node alone.
    let error = refused(&api.token_of(&other)).await;
    assert!(matches!(error, EnrollError::OtherNode), "{error:?}");
    let error = refused(&says(NODE_UID, json!(OTHER))).await;
    assert!(matches!(error, EnrollError::NodeGone), "{error:?}");

    // After all that the good one is as good as before.
    let peer = enrol(&stack, "edge1", &token).await.unwrap();
    assert_eq!((peer.identity.name.as_str(), uid(&peer)), ("edge1", UID));
    api.delete("edge1");
    until_metric(&stack, "corvid_cluster_nodes{kind=\"all\"}", 1.0).await;
    let error = refused(&token).await;
    assert!(matches!(error, EnrollError::NodeGone), "{error:?}");
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_of_older_clusters_say_no_node_and_their_pods_do() {
    let (api, pod, _token) = cluster().await;
    let stack = start(&api, ENROL);
    let mut old = api.issued_for(&pod);
    old.extra.remove(NODE_NAME);
    old.extra.remove(NODE_UID);
    let token = api.token(old);
    let peer = enrol(&stack, "edge1", &token).await.unwrap();
    assert_eq!((peer.identity.name.as_str(), uid(&peer)), ("edge1", UID));
    // The node as it is now, not as our watch knows it.
    api.put_quietly(edge_of("edge1", OTHER));
    let peer = enrol(&stack, "edge1", &token).await.unwrap();
    assert_eq!(uid(&peer), OTHER);
    let refused = enrol(&stack, "edge2", &token).await;
    assert!(
        matches!(refused, Err(EnrollError::OtherNode)),
        "{refused:?}"
    );
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_shown_again_elsewhere_gives_its_own_node_and_ends_with_its_pod() {
    let (api, pod, token) = cluster().await;
    let stacks = [start(&api, ENROL), start(&api, ENROL)];
    for stack in &stacks {
        let peer = enrol(stack, "edge1", &token).await.unwrap();
        assert_eq!((peer.identity.name.as_str(), uid(&peer)), ("edge1", UID));
        let other = enrol(stack, "edge2", &token).await;
        assert!(matches!(other, Err(EnrollError::OtherNode)), "{other:?}");
    }
    api.remove("pods", &pod);
    for stack in &stacks {
        let refused = enrol(stack, "edge1", &token).await;
        assert!(
            matches!(refused, Err(EnrollError::ServiceAccountRefused)),
            "{refused:?}"
        );
    }
    for stack in stacks {
        stack.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_taken_only_where_the_operator_said_so_and_not_from_the_revoked() {
    let (api, pod, token) = cluster().await;
    let off = start(&api, "");
    let refused = enrol(&off, "edge1", &token).await;
    assert!(
        matches!(refused, Err(EnrollError::NoServiceAccounts)),
        "{refused:?}"
    );
    assert_eq!(api.seen("tokenreview"), 0);
    off.stop().await;

    let own = "kubernetes: {kubeconfig: KUBECONFIG, enrol: {namespace: corvid, serviceAccount: agents, audience: tunnel}}";
    let stack = start(&api, own);
    let refused = enrol(&stack, "edge1", &token).await;
    assert!(
        matches!(refused, Err(EnrollError::ServiceAccountRefused)),
        "{refused:?}"
    );
    let mut issued = api.issued_for(&pod);
    issued.username = "system:serviceaccount:corvid:agents".to_owned();
    issued.audiences = vec!["tunnel".to_owned()];
    api.change(&pod, |pod| {
        pod["spec"]["serviceAccountName"] = json!("agents");
    });
    let token = api.token(issued);
    enrol(&stack, "edge1", &token).await.unwrap();
    let edge1 = Name::parse("edge1").unwrap();
    stack
        .store()
        .revoke_agent(&edge1, Clock::system().now())
        .unwrap();
    let refused = enrol(&stack, "edge1", &token).await;
    assert!(matches!(refused, Err(EnrollError::Revoked)), "{refused:?}");
    stack.stop().await;
}

/// The request as it is on the wire, for what our own client can't say.
#[derive(Clone, PartialEq, Message)]
struct Raw {
    #[prost(string, tag = "1")]
    token: String,
    #[prost(string, tag = "2")]
    agent_name: String,
    #[prost(bytes = "vec", tag = "3")]
    csr: Vec<u8>,
    #[prost(string, tag = "4")]
    service_account_token: String,
}

/// Sends that request and returns `corvid-reason`, or the gRPC status where there is none.
async fn raw(stack: &Stack, request: &Raw) -> String {
    let pin = stack.issuer().pin();
    let (trust_domain, clock) = (TrustDomain::default(), Clock::system());
    let tls = certs::enroll_client_pinned(pin, &trust_domain, &clock).unwrap();
    #[expect(clippy::disallowed_methods, reason = "a peer that misbehaves")]
    let tcp = TcpStream::connect(stack.backend).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from(certs::SERVER_SNI).unwrap();
    let stream = tokio_rustls::TlsConnector::from(Arc::clone(&tls))
        .connect(name, tcp)
        .await
        .unwrap();
    let http = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    let (mut sender, connection) = http.handshake(TokioIo::new(stream)).await.unwrap();
    let mut body = vec![0];
    body.extend(u32::try_from(request.encoded_len()).unwrap().to_be_bytes());
    request.encode(&mut body).unwrap();
    let request = http::Request::post("https://x/corvid.enroll.v1.Enrollment/Enroll")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(Bytes::from(body)))
        .unwrap();
    let answer = async {
        let response = sender.send_request(request).await.unwrap();
        let (head, body) = response.into_parts();
        let trailers = body.collect().await.unwrap().trailers().cloned();
        let mut all = head.headers;
        all.extend(trailers.unwrap_or_default());
        let said = all.get("corvid-reason").or_else(|| all.get("grpc-status"));
        said.unwrap().to_str().unwrap().to_owned()
    };
    tokio::select! {
        answer = within(answer) => answer,
        ended = connection => panic!("{ended:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_request_costs_the_cluster_nothing() {
    let (api, _pod, token) = cluster().await;
    let stack = start(&api, ENROL);
    let csr = certs::Csr::make(&certs::Key::generate().unwrap()).unwrap();
    let good = Raw {
        token: String::new(),
        agent_name: "edge1".to_owned(),
        csr,
        service_account_token: token.clone(),
    };
    let with = |change: &dyn Fn(&mut Raw)| {
        let mut raw = good.clone();
        change(&mut raw);
        raw
    };
    let giant = |length: usize| {
        let token = format!("a.{}.c", "b".repeat(length));
        with(&move |raw| raw.service_account_token.clone_from(&token))
    };
    for (what, request, wanted) in [
        (
            "two tokens",
            with(&|raw| raw.token = "abcdef.0123456789abcdef".to_owned()),
            "bad_request",
        ),
        (
            "no token",
            with(&|raw| raw.service_account_token.clear()),
            "wrong_token",
        ),
        ("9 KiB", giant(9 << 10), "bad_request"),
        (
            "lines",
            with(&|raw| raw.service_account_token.push('\n')),
            "bad_request",
        ),
        (
            "no name",
            with(&|raw| raw.agent_name = "../edge1".to_owned()),
            "bad_request",
        ),
        (
            "no CSR",
            with(&|raw| raw.csr = vec![0x30; 300]),
            "bad_request",
        ),
        // More than a message may have: gRPC's "out of range".
        ("100 KiB", giant(100 << 10), "11"),
    ] {
        assert_eq!(raw(&stack, &request).await, wanted, "{what}");
    }
    assert_eq!(api.seen("tokenreview"), 0);
    assert_eq!(raw(&stack, &good).await, "0");
    assert_eq!(api.seen("tokenreview"), 1);
    stack.stop().await;
}
