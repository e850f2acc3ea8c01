//! What becomes of a stream: bytes, half-closes, refusals, resets, bad input.

use std::time::Duration;

use bytes::Bytes;
use certs::test_ca::TestCa;
use proto::Reason;
use proto::transport::{SendHalf, StreamError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{
    Agent, DEADLINE, Destination, Hanging, Peer, Server, Settings, closed_port, read_to_end,
    scenario,
};

/// An agent with one session, and what it takes to end both.
async fn site(more: &str) -> (Agent, Server, Peer) {
    let ca = TestCa::new();
    let mut server = Server::new(&ca, "s1").await;
    let mut settings = Settings::new(&ca, &[&server]);
    settings.more = more.to_owned();
    let agent = settings.start();
    let peer = server.session().await;
    (agent, server, peer)
}

async fn end(agent: Agent, server: Server, peer: Peer) {
    agent.stopped().await;
    assert_eq!(peer.closed().await, Reason::Draining);
    drop(peer);
    server.stop().await;
}

#[test]
fn half_close_travels_both_ways() {
    scenario("streams::half_close_travels_both_ways", async {
        let (agent, server, peer) = site("").await;
        let destination = Destination::new().await;
        let address = destination.address.to_string();

        let (mut send, mut recv) = peer.connect(&address).await;
        let mut dialled = destination.accept().await;
        send.write_chunk(Bytes::from_static(b"question"))
            .await
            .unwrap();
        send.finish().unwrap();
        let mut got = Vec::new();
        dialled.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"question");
        dialled.write_all(b"answer after the end").await.unwrap();
        drop(dialled);
        assert_eq!(
            read_to_end(&mut recv).await.unwrap(),
            b"answer after the end"
        );

        let (mut send, mut recv) = peer.connect(&address).await;
        let mut dialled = destination.accept().await;
        dialled.write_all(b"greeting").await.unwrap();
        dialled.shutdown().await.unwrap();
        assert_eq!(read_to_end(&mut recv).await.unwrap(), b"greeting");
        send.write_chunk(Bytes::from_static(b"still here"))
            .await
            .unwrap();
        send.finish().unwrap();
        let mut got = Vec::new();
        dialled.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"still here");
        drop((dialled, send, recv));

        agent
            .counts("corvid_streams_total{reason=\"finished\"}", 2.0)
            .await;
        agent
            .counts("corvid_stream_bytes_total{direction=\"upstream\"}", 18.0)
            .await;
        agent
            .counts("corvid_stream_bytes_total{direction=\"downstream\"}", 28.0)
            .await;
        end(agent, server, peer).await;
    });
}

#[test]
fn the_node_is_dialled_by_its_name_at_localhost_and_then_at_its_other_addresses() {
    scenario(
        "streams::the_node_is_dialled_by_its_name_at_localhost_and_then_at_its_other_addresses",
        async {
            let (agent, server, peer) = site("nodeAddresses: [127.0.0.2]\n").await;
            let local = Destination::new().await;
            let other = Destination::at("127.0.0.2:0").await;
            for destination in [&local, &other] {
                drop(peer.connect(&format!("edge1:{}", destination.port())).await);
                drop(destination.accept().await);
            }
            end(agent, server, peer).await;
        },
    );
}

#[test]
fn a_localhost_port_is_dialled_at_localhost() {
    scenario("streams::a_localhost_port_is_dialled_at_localhost", async {
        let kubelet = Destination::new().await;
        let more = format!(
            "nodeAddresses: [127.0.0.3]\nlocalhostPorts: [{}]\n",
            kubelet.port()
        );
        let (agent, server, peer) = site(&more).await;
        drop(peer.connect(&format!("127.0.0.3:{}", kubelet.port())).await);
        drop(kubelet.accept().await);
        end(agent, server, peer).await;
    });
}

#[test]
fn each_refusal_has_its_reason() {
    scenario("streams::each_refusal_has_its_reason", async {
        let (agent, server, peer) = site("").await;
        let closed = closed_port().await;
        for (destination, reason) in [
            ("10.9.8.7:22".to_owned(), Reason::DestinationDenied),
            (
                "169.254.169.254:80".to_owned(),
                Reason::ForbiddenDestination,
            ),
            ("0.0.0.0:80".to_owned(), Reason::ForbiddenDestination),
            (
                "[::ffff:169.254.169.254]:80".to_owned(),
                Reason::ForbiddenDestination,
            ),
            (format!("127.0.0.1:{closed}"), Reason::DialRefused),
            (format!("edge1:{closed}"), Reason::DialRefused),
            ("no-such-host.invalid:80".to_owned(), Reason::Resolve),
        ] {
            assert_eq!(peer.refusal(&destination).await, reason, "{destination}");
            let name = format!("corvid_streams_total{{reason=\"{reason}\"}}");
            let text = agent.metrics().await;
            assert!(text.contains("corvid_streams_open"), "{text}");
            crate::harness::eventually(&name, async || {
                crate::harness::metric(&agent.metrics().await, &name).ok_or("not counted")
            })
            .await;
        }
        end(agent, server, peer).await;
    });
}

#[test]
fn a_dial_that_hangs_ends_in_time() {
    scenario("streams::a_dial_that_hangs_ends_in_time", async {
        let (agent, server, peer) = site("timeouts: {dial: 1s}\n").await;
        let hanging = Hanging::new();
        let address = hanging.address.to_string();
        let soon = Duration::from_millis(200);
        for deadline in [soon, Duration::from_secs(600)] {
            let mut stream = peer.ask_within(&address, deadline).await;
            assert_eq!(stream.reply().await.unwrap_err().0, Reason::DialTimeout);
        }
        end(agent, server, peer).await;
    });
}

#[test]
fn a_requester_that_goes_away_ends_the_dial() {
    scenario("streams::a_requester_that_goes_away_ends_the_dial", async {
        let (agent, server, peer) = site("timeouts: {dial: 60s}\n").await;
        let hanging = Hanging::new();
        let mut stream = peer
            .ask_within(&hanging.address.to_string(), DEADLINE)
            .await;
        agent.counts("corvid_stream_descriptors", 1.0).await;
        stream.send.reset(Reason::Cancelled);
        agent
            .counts("corvid_streams_total{reason=\"cancelled\"}", 1.0)
            .await;
        agent.counts("corvid_stream_descriptors", 0.0).await;
        drop(stream);
        end(agent, server, peer).await;
    });
}

#[test]
fn bytes_that_come_before_the_reply_reach_the_destination() {
    scenario(
        "streams::bytes_that_come_before_the_reply_reach_the_destination",
        async {
            let (agent, server, peer) = site("").await;
            let destination = Destination::new().await;
            let mut stream = peer.ask(&destination.address.to_string()).await;
            let early = Bytes::from(vec![7; 300_000]);
            stream.send.write_chunk(early.clone()).await.unwrap();
            stream.send.finish().unwrap();
            let mut dialled = destination.accept().await;
            let mut got = Vec::new();
            dialled.read_to_end(&mut got).await.unwrap();
            assert!(got == early, "{} bytes", got.len());
            drop(dialled);
            drop(stream.connected().await);
            end(agent, server, peer).await;
        },
    );
}

#[test]
fn a_reset_is_passed_on_both_ways() {
    scenario("streams::a_reset_is_passed_on_both_ways", async {
        let (agent, server, peer) = site("").await;
        let destination = Destination::new().await;
        let address = destination.address.to_string();

        let (mut send, _recv) = peer.connect(&address).await;
        let mut dialled = destination.accept().await;
        send.reset(Reason::RequesterReset);
        let error = dialled.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);

        let (_send, mut recv) = peer.connect(&address).await;
        let dialled = destination.accept().await;
        socket2::SockRef::from(&dialled)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(dialled);
        let ended = read_to_end(&mut recv).await.unwrap_err();
        assert_eq!(ended, StreamError::Reset(Reason::DestinationReset));
        drop((send, _send));
        agent
            .counts("corvid_streams_total{reason=\"requester_reset\"}", 1.0)
            .await;
        agent
            .counts("corvid_streams_total{reason=\"destination_reset\"}", 1.0)
            .await;
        end(agent, server, peer).await;
    });
}

#[test]
fn a_header_that_breaks_the_protocol_resets_its_stream_alone() {
    scenario(
        "streams::a_header_that_breaks_the_protocol_resets_its_stream_alone",
        async {
            let (agent, server, peer) = site("").await;
            let destination = Destination::new().await;
            let (mut send, mut recv) = peer.connect(&destination.address.to_string()).await;
            let garbage: &[&'static [u8]] = &[
                b"\x05\xff\xff\xff\xff\xff", // no message
                b"\xff\xff\x7f",             // a length of three bytes
                b"\x81\x20",                 // 4,097 bytes announced
            ];
            for bytes in garbage {
                let mut stream = peer.open().await;
                stream
                    .send
                    .write_chunk(Bytes::from_static(bytes))
                    .await
                    .unwrap();
                assert_eq!(stream.reset().await, Reason::Protocol, "{bytes:?}");
            }
            let mut cut_short = peer.open().await;
            cut_short
                .send
                .write_chunk(Bytes::from_static(b"\x20ab"))
                .await
                .unwrap();
            cut_short.send.finish().unwrap();
            assert_eq!(cut_short.reset().await, Reason::Protocol);

            let mut dialled = destination.accept().await;
            send.write_chunk(Bytes::from_static(b"untouched"))
                .await
                .unwrap();
            send.finish().unwrap();
            let mut got = Vec::new();
            dialled.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, b"untouched");
            drop(dialled);
            assert!(read_to_end(&mut recv).await.unwrap().is_empty());
            agent
                .counts("corvid_streams_total{reason=\"protocol\"}", 4.0)
                .await;
            end(agent, server, peer).await;
        },
    );
}

#[test]
fn a_header_that_never_comes_is_not_waited_for() {
    scenario(
        "streams::a_header_that_never_comes_is_not_waited_for",
        async {
            let (agent, server, peer) = site("").await;
            let mut stream = peer.open().await;
            // The first byte of a header: without any the agent would not know of the stream.
            stream
                .send
                .write_chunk(Bytes::from_static(b"\x20"))
                .await
                .unwrap();
            assert_eq!(stream.reset().await, Reason::Timeout);
            end(agent, server, peer).await;
        },
    );
}
