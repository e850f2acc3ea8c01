//! A server that reads nothing.

use std::time::Duration;

use bytes::Bytes;
use proto::Reason;
use proto::transport::{RecvHalf, SendHalf, StreamError};
use proto::wire::encode;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;

use super::{ask, header, metric_reaches, shouts, visit};
use crate::fleet::{Kind, server};
use crate::stack::{Stack, allow, shouter, text, within};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_reads_nothing_stalls_nobody_and_costs_no_more_than_the_budget() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = {
        // 4 MiB: 64 stopped readers.
        let mut small = server(None, "proxy-a", Kind::Full, "");
        let file = small.dir.path().join("proxy-server.yaml");
        let config = text(&file).replace("backend: {", "backend: {memory: 4MiB, ");
        small.shutdown.cancel();
        small.exit().await;
        let file = dir.path().join("proxy-server.yaml");
        std::fs::write(
            &file,
            config.replace(
                &small.dir.path().display().to_string(),
                &dir.path().display().to_string(),
            ),
        )
        .unwrap();
        Stack::start_with(dir, &file)
    };
    let mut edge = JoinSet::new();
    let (port, flood) = (shouter(&mut edge).await, floods(&mut edge).await);
    a.agent("edge1", &allow(&[port, flood]));
    a.sessions("edge1", 1).await;
    let (hostile, _tasks) = visit(&a, "proxy-x").await;
    let mut stopped = Vec::new();
    for _ in 0..100 {
        let (reply, send, reader) = ask(&hostile, encode(&header("edge1", flood)))
            .await
            .unwrap();
        reply.unwrap();
        stopped.push((send, reader));
    }
    let (honest, _others) = visit(&a, "proxy-y").await;
    for session in [&honest, &hostile] {
        let (reply, mut send, reader) = ask(session, encode(&header("edge1", port))).await.unwrap();
        reply.unwrap();
        send.write_chunk(Bytes::from_static(b"hello"))
            .await
            .unwrap();
        send.finish().unwrap();
        let (mut recv, _) = reader.into_parts();
        let mut chunk = [Bytes::new()];
        assert_eq!(within(recv.read_chunks(&mut chunk)).await.unwrap(), Some(1));
    }
    shouts(&a, &format!("edge1:{port}")).await;
    // Those that stopped longest are reset, until the others fit.
    metric_reaches(
        &a,
        "corvid_streams_total{frontend=\"peer\",path=\"tunnel\",reason=\"slow_reader\"}",
        36.0,
    )
    .await;
    let mut reset = 0;
    for (_send, reader) in stopped {
        let (mut recv, _) = reader.into_parts();
        let read = async {
            let mut chunks = [const { Bytes::new() }; 8];
            loop {
                match recv.read_chunks(&mut chunks).await {
                    Ok(_) => {}
                    Err(error) => return error,
                }
            }
        };
        if let Ok(error) = tokio::time::timeout(Duration::from_millis(100), read).await {
            assert_eq!(error, StreamError::Reset(Reason::SlowReader));
            reset += 1;
        }
    }
    assert!(reset >= 36, "{reset}");
    a.shutdown.cancel();
}

/// A stand-in that writes for ever to whoever connects.
async fn floods(tasks: &mut JoinSet<()>) -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let block = vec![0; 16 << 10];
                while stream.write_all(&block).await.is_ok() {}
            });
        }
    });
    port
}
