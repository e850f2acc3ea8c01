//! Streams and descriptors are bounded, and what is over the bound is refused, not broken.

use certs::test_ca::TestCa;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use proto::Reason;
use proto::transport::{SendHalf, Session};

use crate::harness::{Destination, Server, Settings, scenario};

#[test]
fn a_session_has_4096_streams_and_no_more() {
    scenario("limits::a_session_has_4096_streams_and_no_more", async {
        let limit = daemon::limits::raise_nofile();
        assert!(
            limit > 9000,
            "this test needs 9,000 descriptors, the limit is {limit}"
        );
        let ca = TestCa::new();
        let mut server = Server::new(&ca, "s1").await;
        let agent = Settings::new(&ca, &[&server]).start();
        let peer = server.session().await;
        let destination = Destination::new().await;
        let address = destination.address.to_string();
        let mut open = Vec::new();
        for _ in 0..4096 {
            let stream = peer.connect(&address).await;
            open.push((stream, destination.accept().await));
        }
        let session = peer.session.clone();
        let mut more = Box::pin(async move { session.open().await });
        agent.counts("corvid_streams_open", 4096.0).await;
        tokio::select! {
            biased;
            _ = &mut more => panic!("the 4,097th must wait"),
            () = std::future::ready(()) => {}
        }
        // The transport announces room once an eighth of the limit is free.
        open.truncate(4096 - 4096 / 8 - 1);
        drop(more.await.unwrap());
        drop(open);
        agent.counts("corvid_streams_open", 0.0).await;
        agent.stopped().await;
        drop((peer, destination));
        server.stop().await;
    });
}

#[test]
fn streams_leave_descriptors_for_the_rest() {
    scenario("limits::streams_leave_descriptors_for_the_rest", async {
        setrlimit(Resource::RLIMIT_NOFILE, 100, 100).unwrap();
        let ca = TestCa::new();
        let mut server = Server::new(&ca, "s1").await;
        let agent = Settings::new(&ca, &[&server]).start();
        let peer = server.session().await;
        let destination = Destination::new().await;
        let address = destination.address.to_string();
        let mut open = Vec::new();
        for _ in 0..36 {
            open.push(peer.connect(&address).await);
        }
        assert_eq!(peer.refusal(&address).await, Reason::FilesExhausted);
        // The endpoints still answer, and a stream that ends makes room.
        agent.counts("corvid_stream_descriptors", 36.0).await;
        let (mut send, recv) = open.pop().unwrap();
        send.reset(Reason::Cancelled);
        drop((send, recv));
        agent.counts("corvid_stream_descriptors", 35.0).await;
        drop(peer.connect(&address).await);
        drop(open);
        agent.counts("corvid_stream_descriptors", 0.0).await;
        agent.stopped().await;
        drop((peer, destination));
        server.stop().await;
    });
}

#[test]
fn running_out_of_descriptors_refuses_a_stream_and_nothing_else() {
    scenario(
        "limits::running_out_of_descriptors_refuses_a_stream_and_nothing_else",
        async {
            let ca = TestCa::new();
            let mut server = Server::new(&ca, "s1").await;
            let agent = Settings::new(&ca, &[&server]).start();
            let peer = server.session().await;
            let destination = Destination::new().await;
            let address = destination.address.to_string();
            drop(peer.connect(&address).await);
            drop(destination.accept().await);
            agent.counts("corvid_streams_open", 0.0).await;

            let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
            setrlimit(Resource::RLIMIT_NOFILE, 0, hard).unwrap();
            assert_eq!(peer.refusal(&address).await, Reason::FilesExhausted);
            setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
            drop(peer.connect(&address).await);
            drop(destination.accept().await);
            agent.has_sessions(1).await;
            agent.stopped().await;
            drop((peer, destination));
            server.stop().await;
        },
    );
}
