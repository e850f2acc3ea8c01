//! Agents whose certificate names a Node: let in while it is there, closed and refused once it is gone, and never
//! because nobody knows.

use certs::{AgentFiles, EnrollError, Own};
use futures_util::FutureExt;
use proto::Reason;
use proto::control::{Control, ControlError, Liveness};
use proto::transport::Session;
use proto::transport::keepalive::Keepalive;
use proto::transport::quic::QuicSession;
use proto::wire::{HandshakeError, Limits, Offer};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::api::{Api, Mood};
use crate::cluster::{edge, is_told, start, until_metric};
use crate::stack::{Stack, bare_session, end, eventually, within};

const UID: &str = "6f1c5b0e-9d1f-4c5e-8a55-0123456789ab";
const OTHER: &str = "00000000-9d1f-4c5e-8a55-0123456789ab";

fn edge_of(name: &str, uid: &str) -> Value {
    let mut node = edge(name, &[]);
    node["metadata"]["uid"] = json!(uid);
    node
}

/// An agent that does nothing but keep its session.
pub(crate) struct Quiet {
    session: QuicSession,
    tasks: JoinSet<()>,
}

/// Opens a session with what `own` has; the reason if it is refused.
pub(crate) async fn come(stack: &Stack, own: &Own) -> Result<Quiet, Reason> {
    let session = bare_session(stack, own).await.unwrap();
    let offer: Offer = Offer {
        agent: own
            .credential
            .load()
            .identity()
            .name
            .as_str()
            .parse()
            .unwrap(),
        software: "test".into(),
        capabilities: vec![],
        limits: Limits {
            max_streams: 16,
            stream_window: 1 << 16,
        },
        instance: String::new(),
        line: None,
    };
    let control = match within(Control::dial(session.clone(), &offer)).await {
        Ok((control, _)) => control,
        Err(ControlError::Handshake(HandshakeError::Refused { reason, .. })) => return Err(reason),
        Err(error) => panic!("{error:?}"),
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        control
            .run(&Liveness::new(Keepalive::default()), |_| ())
            .await;
    });
    Ok(Quiet { session, tasks })
}

impl Quiet {
    /// Why the server has closed it.
    async fn end(mut self) -> Reason {
        let reason = end(&self.session).await;
        within(self.tasks.join_next()).await.unwrap().unwrap();
        reason
    }

    /// Whether the server has left it alone.
    pub(crate) fn is_up(&self) -> bool {
        self.session.closed().now_or_never().is_none()
    }

    pub(crate) fn leave(self) {
        self.session.close(Reason::Draining);
    }
}

async fn renewed(stack: &Stack, own: &Own) -> Result<(), EnrollError> {
    let dir = tempfile::tempdir().unwrap();
    certs::renew(stack.backend, own, &AgentFiles::new(dir.path()))
        .await
        .map(|_enrolled| ())
}

async fn synced(stack: &Stack) {
    until_metric(stack, "corvid_cluster_synced", 1.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sessions_of_a_deleted_node_are_closed_and_its_certificate_is_of_no_use() {
    let api = Api::start().await;
    api.put(edge_of("edge1", UID));
    api.put(edge_of("edge2", OTHER));
    let stack = start(&api, "");
    synced(&stack).await;
    let (edge1, edge2) = (stack.of_node("edge1", UID), stack.of_node("edge2", OTHER));
    let outside = stack.enrolled("edge3").await;
    let one = come(&stack, &edge1).await.unwrap();
    let two = come(&stack, &edge2).await.unwrap();
    let three = come(&stack, &outside).await.unwrap();
    renewed(&stack, &edge1).await.unwrap();

    api.delete("edge1");
    assert_eq!(one.end().await, Reason::NodeGone);
    is_told(
        &stack,
        "edge1:10250",
        "last error: the node was deleted from the cluster",
    )
    .await;
    assert_eq!(come(&stack, &edge1).await.err(), Some(Reason::NodeGone));
    let refused = renewed(&stack, &edge1).await;
    assert!(matches!(refused, Err(EnrollError::NodeGone)), "{refused:?}");

    // It joins again: another node, whose name the old certificate must not have.
    api.put(edge_of("edge1", OTHER));
    let again = stack.of_node("edge1", OTHER);
    let new = come(&stack, &again).await.unwrap();
    assert_eq!(come(&stack, &edge1).await.err(), Some(Reason::NodeGone));

    // Nobody else was touched.
    stack.sessions("edge2", 1).await;
    stack.sessions("edge3", 1).await;
    renewed(&stack, &outside).await.unwrap();
    assert!(
        stack
            .metric("corvid_sessions_ended_total{reason=\"node_gone\"}")
            .await
            > 0.0
    );
    [two, three, new].into_iter().for_each(Quiet::leave);
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_refused_before_the_nodes_were_read_nor_while_the_apiserver_is_away() {
    let mut api = Api::start().await;
    api.down().await;
    let stack = start(&api, "");
    let (edge1, gone) = (stack.of_node("edge1", UID), stack.of_node("gone", OTHER));
    let one = come(&stack, &edge1).await.unwrap();
    let two = come(&stack, &gone).await.unwrap();
    renewed(&stack, &gone).await.unwrap();
    api.put(edge_of("edge1", UID));
    api.up().await;
    // Now it is known.
    assert_eq!(two.end().await, Reason::NodeGone);
    stack.sessions("edge1", 1).await;

    // Away: what is deleted meanwhile is there for us, and what is not known is let in.
    api.down().await;
    api.delete("edge1");
    let before = stack.metric("corvid_cluster_failures_total").await;
    let three = come(&stack, &gone).await.unwrap();
    renewed(&stack, &gone).await.unwrap();
    let four = come(&stack, &edge1).await.unwrap();
    api.mood(Mood::Nonsense);
    api.up().await;
    let answers = ["node", "watch"].map(|kind| api.seen(kind));
    let five = come(&stack, &gone).await.unwrap();
    let errors = [500, 403, 404].map(Mood::Status);
    for mood in errors.into_iter().chain([Mood::Elsewhere]) {
        api.mood(mood);
        renewed(&stack, &gone).await.unwrap();
    }
    assert!(api.seen("node") > answers[0], "it was asked");
    assert!(stack.metric("corvid_cluster_failures_total").await >= before);
    stack.sessions("edge1", 2).await;
    stack.sessions("gone", 2).await;

    api.mood(Mood::Well);
    for session in [one, three, four, five] {
        assert_eq!(session.end().await, Reason::NodeGone);
    }
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_that_is_not_complete_closes_nobody() {
    let mut api = Api::start().await;
    api.put_all((0..1200).map(|i| edge(&format!("edge{i:04}"), &[])));
    api.put(edge_of("last", UID));
    let stack = start(&api, "");
    synced(&stack).await;
    let own = stack.of_node("last", UID);
    let session = come(&stack, &own).await.unwrap();
    api.down().await;
    api.delete("edge0000");
    api.compact();
    api.mood(Mood::PagesGone);
    api.up().await;
    eventually("five lists have failed", || api.seen("list+") >= 6).await;
    stack.sessions("last", 1).await;
    let second = come(&stack, &own).await.unwrap();
    api.mood(Mood::Well);
    is_told(&stack, "edge0000:1", "the destination is no node").await;
    stack.sessions("last", 2).await;
    [session, second].into_iter().for_each(Quiet::leave);
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_our_watch_has_not_told_of_yet_is_asked_for() {
    let api = Api::start().await;
    api.put(edge_of("edge1", UID));
    let stack = start(&api, "");
    synced(&stack).await;
    // Deleted, joined again, and certified by another server, all before our watch says a word.
    api.put_quietly(edge_of("edge1", OTHER));
    api.put_quietly(edge_of("edge2", UID));
    let new = come(&stack, &stack.of_node("edge1", OTHER)).await.unwrap();
    let two = come(&stack, &stack.of_node("edge2", UID)).await.unwrap();
    assert_eq!(api.seen("node"), 2);
    renewed(&stack, &stack.of_node("edge2", UID)).await.unwrap();
    // And nobody is asked about what is known.
    api.bookmark();
    until_metric(&stack, "corvid_cluster_nodes{kind=\"all\"}", 2.0).await;
    let asked = api.seen("node");
    let three = come(&stack, &stack.of_node("edge2", UID)).await.unwrap();
    assert_eq!(api.seen("node"), asked);
    [new, two, three].into_iter().for_each(Quiet::leave);
    stack.stop().await;
}
