//! Who stops reading delays nobody else, at either end.

use std::time::Duration;

use proxy_server::frontend::konnectivity::pb::packet::Payload;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::edge::{pattern, sink, source};
use super::idle;
use super::requester::{Call, channel, data};
use crate::stack::{Stack, allow, echo, within};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_reader_delays_nobody_and_its_source_is_stopped() {
    let mut stack = Stack::start("");
    let mut edge = JoinSet::new();
    let endless = source(&mut edge, pattern(64 << 20)).await;
    let port = echo(&mut edge).await;
    stack.agent("edge1", &allow(&[endless, port]));
    stack.sessions("edge1", 1).await;
    // Room for what the stopped call may be sent, as the window of a connection is the requester's to give.
    let channel = channel(&stack, 1 << 20).await;
    let mut stopped = Call::on(channel.clone()).await;
    stopped.dial(&format!("edge1:{endless}"), 1).await.unwrap();
    for on in [channel, channel_alone(&stack).await] {
        let mut running = Call::on(on).await;
        let id = running.dial(&format!("edge1:{port}"), 2).await.unwrap();
        let sent = pattern(1 << 20);
        for part in sent.chunks(32 << 10) {
            running.say(data(id, part.to_vec())).await;
            assert_eq!(running.bytes(id, part.len()).await, part);
        }
    }
    drop(stopped);
    idle(&stack).await;
    // Of 64 MiB no more than the windows hold has come; the rest is what was echoed.
    let moved = stack.metric("corvid_stream_bytes_total").await;
    assert!(moved > 4e6 && moved < 16e6, "{moved}");
    stack.stop().await;
}

async fn channel_alone(stack: &Stack) -> tonic::transport::Channel {
    channel(stack, 65_535).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_destination_is_cut_for_those_that_share_its_call() {
    let mut stack = Stack::start("");
    let mut edge = JoinSet::new();
    let gate = CancellationToken::new();
    let (stopped, mut sunk) = sink(&mut edge, gate.clone()).await;
    let port = echo(&mut edge).await;
    stack.agent("edge1", &allow(&[stopped, port]));
    stack.sessions("edge1", 1).await;
    let mut call = Call::alone(&stack).await;
    let stuck = call.dial(&format!("edge1:{stopped}"), 1).await.unwrap();
    let running = call.dial(&format!("edge1:{port}"), 2).await.unwrap();
    let start = Instant::now();
    let packets = call.packets.clone();
    let mut flood = JoinSet::new();
    // More than all buffers on the way hold; then the neighbour's word.
    flood.spawn(async move {
        for _ in 0..64 {
            packets.send(data(stuck, vec![1; 1 << 20])).await.unwrap();
        }
        packets.send(data(running, "neighbour")).await.unwrap();
    });
    let mut cut = 0;
    loop {
        match call.answer().await {
            // Once for the cut, then for each packet that comes too late.
            Payload::CloseResponse(close) => {
                assert_eq!(close.connect_id, stuck);
                let first = "the destination took nothing for 10 s, and other connections share this stream";
                let wanted = if cut == 0 { first } else { "unknown connectID" };
                assert_eq!(close.error, wanted);
                cut += 1;
            }
            Payload::Data(data) => {
                assert_eq!(
                    (data.connect_id, &data.data[..]),
                    (running, &b"neighbour"[..])
                );
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(cut > 1, "{cut}");
    assert!(start.elapsed() >= Duration::from_secs(10));
    // The destination sees a reset, not an end.
    gate.cancel();
    within(sunk.recv()).await.unwrap().unwrap_err();
    let slow =
        "corvid_streams_total{frontend=\"konnectivity\",path=\"tunnel\",reason=\"slow_reader\"}";
    assert_eq!(stack.metric(slow).await, 1.0);
    drop(call);
    idle(&stack).await;
    stack.stop().await;
}
