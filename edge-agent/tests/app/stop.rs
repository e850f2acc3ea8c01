//! SIGTERM with streams open: nobody who is not told, nothing that hangs.

use std::time::Duration;

use bytes::Bytes;
use certs::test_ca::TestCa;
use daemon::Exit;
use proto::Reason;
use proto::transport::{SendHalf, StreamError};
use tokio::io::AsyncReadExt;

use crate::harness::{
    DEADLINE, Destination, Hanging, Server, Settings, eventually, read_to_end, scenario,
};

#[test]
fn open_streams_may_end_and_new_ones_are_refused() {
    scenario(
        "stop::open_streams_may_end_and_new_ones_are_refused",
        async {
            let ca = TestCa::new();
            let mut server = Server::new(&ca, "s1").await;
            let mut agent = Settings::new(&ca, &[&server]).start();
            let mut peer = server.session().await;
            let destination = Destination::new().await;
            let address = destination.address.to_string();
            let (mut send, mut recv) = peer.connect(&address).await;
            let mut dialled = destination.accept().await;

            agent.stop.shutdown.cancel();
            let away = peer.told().await;
            assert_eq!(
                (away.reason, away.deadline),
                (Reason::Draining, Duration::from_secs(30))
            );
            eventually("new streams are refused", async || {
                match peer.ask(&address).await.reply().await {
                    Err((Reason::Draining, _)) => Ok(()),
                    other => Err(other),
                }
            })
            .await;
            send.write_chunk(Bytes::from_static(b"to the end"))
                .await
                .unwrap();
            send.finish().unwrap();
            let mut got = Vec::new();
            dialled.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, b"to the end");
            drop(dialled);
            assert!(read_to_end(&mut recv).await.unwrap().is_empty());
            assert_eq!(agent.ended().await.unwrap(), Exit::Drained);
            assert_eq!(peer.closed().await, Reason::Draining);
            drop((send, recv, peer, destination));
            server.stop().await;
        },
    );
}

#[test]
fn streams_that_do_not_end_are_cut_with_a_reason() {
    scenario(
        "stop::streams_that_do_not_end_are_cut_with_a_reason",
        async {
            for (grace, immediately) in [("300ms", false), ("10m", true)] {
                let ca = TestCa::new();
                let mut server = Server::new(&ca, "s1").await;
                let mut settings = Settings::new(&ca, &[&server]);
                settings.more = format!("drain: {{grace: {grace}}}\n");
                let mut agent = settings.start();
                let mut peer = server.session().await;
                let destination = Destination::new().await;
                let (send, mut recv) = peer.connect(&destination.address.to_string()).await;
                let mut dialled = destination.accept().await;
                agent.stop.shutdown.cancel();
                peer.told().await;
                if immediately {
                    agent.stop.immediate.cancel();
                }
                let cut = read_to_end(&mut recv).await.unwrap_err();
                assert_eq!(cut, StreamError::Reset(Reason::Draining));
                let error = dialled.read(&mut [0; 8]).await.unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
                assert_eq!(agent.ended().await.unwrap(), Exit::Drained);
                drop((send, recv, peer, destination));
                server.stop().await;
            }
        },
    );
}

#[test]
fn a_dial_that_outlasts_the_grace_is_refused_with_a_reason() {
    scenario(
        "stop::a_dial_that_outlasts_the_grace_is_refused_with_a_reason",
        async {
            let ca = TestCa::new();
            let mut server = Server::new(&ca, "s1").await;
            let mut settings = Settings::new(&ca, &[&server]);
            settings.more = "drain: {grace: 300ms}\n".to_owned();
            let mut agent = settings.start();
            let mut peer = server.session().await;
            let hanging = Hanging::new();
            let address = hanging.address.to_string();
            let mut asked = peer.ask_within(&address, DEADLINE).await;
            agent.stop.shutdown.cancel();
            peer.told().await;
            let (reason, said) = asked.reply().await.unwrap_err();
            assert_eq!(
                (reason, said.as_str()),
                (Reason::Draining, "the agent is stopping")
            );
            assert_eq!(agent.ended().await.unwrap(), Exit::Drained);
            drop((peer, hanging));
            server.stop().await;
        },
    );
}

#[test]
fn an_agent_without_a_server_stops_at_once() {
    scenario("stop::an_agent_without_a_server_stops_at_once", async {
        let ca = TestCa::new();
        let mut settings = Settings::new(&ca, &[]);
        settings.servers = vec!["no-such-host.invalid:8443".to_owned()];
        let agent = settings.start();
        eventually("it is up", async || {
            if agent.is_ready().await {
                Err(())
            } else {
                Ok(())
            }
        })
        .await;
        agent.stopped().await;
    });
}
