//! A line is not left alone with a tunnel that does not do: neither while it is down, nor while it is slow.

use bytes::Bytes;
use proto::control::Control;
use proto::transport::{RecvHalf, SendHalf, Session};
use proto::wire::{StreamReply, encode, pb};
use proto::{FrameReader, Reason};

use crate::agents::offer;
use crate::api::Api;
use crate::cluster::start;
use crate::line::{LINE, kubelet_at, route, sites, switched, until_at_least, until_word, who};
use crate::stack::{Stack, allow, bare_session};

/// What was down stays so for an hour.
const HELD: &str = "path: {stable: 1h, probes: {interval: 200ms, timeout: 150ms}}\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_that_is_held_to_be_down_is_taken_where_the_tunnel_does_not_answer() {
    let api = Api::start().await;
    let (_agents, [mut site]) = sites(["127.0.0.9"]);
    let port = site.port();
    let to = format!("edge1:{port}");
    api.put(kubelet_at(port));
    let more = format!(
        "kubernetes: {{kubeconfig: KUBECONFIG}}\n{LINE}{HELD}routes: [{}]",
        route("edge1", "127.0.0.9")
    );
    let mut stack = start(&api, &more);
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    until_at_least(&stack, "corvid_line_probes_total", 1.0).await;
    site.fall_silent().await;
    until_at_least(&stack, &switched("down"), 1.0).await;
    site.come_back().await;
    // As long as the tunnel does, it is left alone.
    assert_eq!(who(&stack, &to).await, "tunnel");
    // The newest session is there, and nobody answers in it.
    let own = stack.enrolled("edge1").await;
    let session = bare_session(&stack, &own).await.unwrap();
    let (_control, _) = Control::dial(session, &offer("edge1")).await.unwrap();
    stack.sessions("edge1", 2).await;
    assert_eq!(who(&stack, &to).await, "line 127.0.0.9");
    stack.shutdown.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_line_has_its_time_though_the_agent_can_take_no_more() {
    let (_agents, [mut site]) = sites(["127.0.0.9"]);
    let to = format!("edge1:{}", site.port());
    let routes = format!("routes: [{}]", route("edge1", "127.0.0.9"));
    let stack = Stack::start(&(LINE.to_owned() + &routes));
    until_word(&stack, &to, "line 127.0.0.9").await;
    let own = stack.enrolled("edge1").await;
    let session = bare_session(&stack, &own).await.unwrap();
    let (_control, _) = Control::dial(session.clone(), &offer("edge1"))
        .await
        .unwrap();
    stack.sessions("edge1", 1).await;
    site.fall_silent().await;
    let asked = who(&stack, &to);
    let refuses = async {
        let (mut send, recv) = session.accept().await.unwrap();
        let mut reader = FrameReader::new(recv);
        reader.read::<pb::StreamHeader>().await.unwrap();
        let reply: StreamReply = Err((Reason::Overloaded, String::new()));
        send.write_chunk(encode(&pb::StreamReply::from(&reply)))
            .await
            .unwrap();
        send.finish().unwrap();
        let (mut recv, _) = reader.into_parts();
        // The server has read it, and is done with this stream.
        while let Ok(Some(_)) = recv.read_chunks(&mut [Bytes::new()]).await {}
        site.answer();
    };
    let (answer, ()) = tokio::join!(asked, refuses);
    assert_eq!(answer, "line 127.0.0.9");
    stack.shutdown.cancel();
}
