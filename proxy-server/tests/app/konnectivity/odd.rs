//! Packets, calls and connections that make no sense or say nothing.

use proxy_server::frontend::konnectivity::pb::packet::Payload;
use proxy_server::frontend::konnectivity::pb::{Drain, Packet, PacketType};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::task::JoinSet;

use super::idle;
use super::requester::{Call, channel, data, packet};
use crate::stack::{Stack, allow, echo, within};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_packets_are_passed_over_and_garbage_ends_its_call_alone() {
    let mut stack = Stack::start("");
    let mut edge = JoinSet::new();
    let port = echo(&mut edge).await;
    stack.agent("edge1", &allow(&[port]));
    stack.sessions("edge1", 1).await;
    let channel = channel(&stack, 1 << 20).await;
    let mut call = Call::on(channel.clone()).await;
    let id = call.dial(&format!("edge1:{port}"), 1).await.unwrap();
    let unknown = Packet {
        r#type: 99,
        ..data(id, "of an unknown type")
    };
    let misfit = Packet {
        r#type: PacketType::CloseReq.into(),
        ..data(id, "not what its type says")
    };
    for odd in [
        Packet::default(),
        unknown,
        misfit,
        packet(PacketType::Drain, Payload::Drain(Drain {})),
        data(id, ""),
        data(id, "seen"),
    ] {
        call.say(odd).await;
    }
    assert_eq!(call.bytes(id, 4).await, b"seen");
    // Larger than a message may be.
    let mut other = Call::on(channel).await;
    other.say(data(id, vec![0; 5 << 20])).await;
    let end = other.heard().await;
    assert!(matches!(end, Ok(None) | Err(_)), "{end:?}");
    call.say(data(id, "and the first goes on")).await;
    assert_eq!(call.bytes(id, 21).await, b"and the first goes on");
    // No HTTP/2 at all.
    let mut raw = UnixStream::connect(stack.dir.path().join("konnectivity.sock"))
        .await
        .unwrap();
    raw.write_all(b"CONNECT edge1:1 HTTP/1.1\r\n\r\n\0\0\0\x01\0\0\0\0\x01")
        .await
        .unwrap();
    let mut rest = Vec::new();
    let end = tokio::io::AsyncReadExt::read_to_end(&mut raw, &mut rest);
    within(end).await.ok();
    drop(call);
    idle(&stack).await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_and_calls_that_say_nothing_are_ended() {
    let stack = Stack::start("timeouts: {header: 300ms}");
    let mut silent = UnixStream::connect(stack.dir.path().join("konnectivity.sock"))
        .await
        .unwrap();
    let mut rest = Vec::new();
    let end = tokio::io::AsyncReadExt::read_to_end(&mut silent, &mut rest);
    within(end).await.ok();
    let mut call = Call::alone(&stack).await;
    assert!(call.heard().await.unwrap().is_none());
    stack.stop().await;
}
