//! A drain: what is open may finish, and what does not is cut.

use daemon::Exit;
use tokio::task::JoinSet;

use super::requester::{Call, close, data};
use crate::stack::{Stack, allow, echo};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_lets_connections_finish_and_dials_nothing_new() {
    let mut stack = Stack::start("drain: {minDelay: 50ms, grace: 30s}");
    let mut edge = JoinSet::new();
    let port = echo(&mut edge).await;
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    let address = format!("edge1:{port}");
    let mut call = Call::alone(&stack).await;
    let idle_call = Call::alone(&stack).await;
    let id = call.dial(&address, 1).await.unwrap();
    stack.shutdown.cancel();
    // Until the socket is closed, dials are still served.
    let mut random = 1;
    let refused = loop {
        random += 1;
        match call.dial(&address, random).await {
            Ok(other) => {
                call.say(close(other)).await;
                assert_eq!(call.closed(other).await, "");
            }
            Err(said) => break said,
        }
    };
    assert_eq!(refused, "proxy-server: stopping");
    // The socket is still there: who comes now is told, too.
    let mut late = Call::alone(&stack).await;
    let refused = late.dial(&address, 1).await.unwrap_err();
    assert_eq!(refused, "proxy-server: stopping");
    assert!(late.heard().await.unwrap().is_none());
    call.say(data(id, "still served")).await;
    assert_eq!(call.bytes(id, 12).await, b"still served");
    call.say(close(id)).await;
    assert_eq!(call.closed(id).await, "");
    assert!(
        call.heard().await.unwrap().is_none(),
        "the call ends by itself"
    );
    assert_eq!(stack.exit().await, Exit::Drained);
    drop(idle_call);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_end_in_a_drain_is_cut_with_a_reason() {
    let mut stack = Stack::start("drain: {minDelay: 50ms, grace: 200ms}");
    let mut edge = JoinSet::new();
    let port = echo(&mut edge).await;
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    let mut call = Call::alone(&stack).await;
    let address = format!("edge1:{port}");
    let id = call.dial(&address, 1).await.unwrap();
    stack.shutdown.cancel();
    assert_eq!(call.closed(id).await, format!("{address}: stopping"));
    assert!(call.heard().await.unwrap().is_none());
    assert_eq!(stack.exit().await, Exit::Drained);
}
