//! The relay over the in-memory transport, with paused time.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proto::transport::memory::{MemoryRecv, MemorySend, MemorySession, pair};
use proto::transport::{RecvHalf, SendHalf, Session, StreamError};
use proto::{Budget, Counters, Early, Local, Reason, Relay, RelayEnd, relay};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

const WINDOW: usize = 64 << 10;
const HALF_OPEN: Duration = Duration::from_secs(600);

fn settings(budget: u64) -> Relay {
    Relay {
        local: Local::Destination,
        budget: Budget::new(budget),
        local_buffer: 0,
        half_open: HALF_OPEN,
        counters: Arc::new(Counters::default()),
    }
}

type Halves = (MemorySend, MemoryRecv);

/// A stream, its far end, and a local connection with its far end. The sessions have to live as long.
async fn parts() -> (
    Halves,
    Halves,
    DuplexStream,
    DuplexStream,
    [MemorySession; 2],
) {
    let (a, b) = pair(WINDOW, 8);
    let near = a.open().await.unwrap();
    let far = b.accept().await.unwrap();
    let (local, outside) = duplex(4 << 10);
    (near, far, local, outside, [a, b])
}

async fn read_to_end(recv: &mut MemoryRecv) -> Result<Vec<u8>, StreamError> {
    let mut all = Vec::new();
    let mut chunks = [Bytes::new()];
    while recv.read_chunks(&mut chunks).await?.is_some() {
        all.extend_from_slice(&chunks[0]);
    }
    Ok(all)
}

#[tokio::test(start_paused = true)]
async fn bytes_and_both_half_closes_travel_and_are_counted() {
    let (mut near, mut far, mut local, mut outside, _sessions) = parts().await;
    let settings = settings(1 << 20);
    let early = Early {
        from_local: Bytes::from_static(b"early "),
        from_tunnel: Bytes::from_static(b"head "),
    };
    let relayed = relay(
        &settings,
        (&mut near.0, &mut near.1),
        &mut local,
        early,
        pending(),
    );
    let ends = async {
        outside.write_all(b"up").await.unwrap();
        outside.shutdown().await.unwrap();
        assert_eq!(read_to_end(&mut far.1).await.unwrap(), b"early up");
        // The other way is still open after this one has closed.
        far.0
            .write_chunk(Bytes::from_static(b"down"))
            .await
            .unwrap();
        far.0.finish().unwrap();
        let mut down = Vec::new();
        outside.read_to_end(&mut down).await.unwrap();
        assert_eq!(down, b"head down");
    };
    let (end, ()) = tokio::join!(relayed, ends);
    assert_eq!(end, RelayEnd::Finished);
    assert_eq!(
        (settings.counters.sent(), settings.counters.received()),
        (8, 9)
    );
}

#[tokio::test(start_paused = true)]
async fn a_large_transfer_is_whole_through_small_pipes() {
    let (mut near, mut far, mut local, mut outside, _sessions) = parts().await;
    let settings = settings(1 << 20);
    let data: Vec<u8> = (0..1_000_000_u32)
        .map(|i| (i % 251).to_le_bytes()[0])
        .collect();
    let relayed = relay(
        &settings,
        (&mut near.0, &mut near.1),
        &mut local,
        Early::default(),
        pending(),
    );
    let ends = async {
        let write = async {
            for piece in data.chunks(9_973) {
                far.0
                    .write_chunk(Bytes::copy_from_slice(piece))
                    .await
                    .unwrap();
            }
            far.0.finish().unwrap();
        };
        let mut got = Vec::new();
        let (read, ()) = tokio::join!(outside.read_to_end(&mut got), write);
        read.unwrap();
        assert!(got == data);
        outside.shutdown().await.unwrap();
        assert_eq!(read_to_end(&mut far.1).await.unwrap(), b"");
    };
    let (end, ()) = tokio::join!(relayed, ends);
    assert_eq!(end, RelayEnd::Finished);
}

#[tokio::test(start_paused = true)]
async fn a_reset_from_the_tunnel_ends_it_with_its_reason() {
    let (mut near, mut far, mut local, _outside, _sessions) = parts().await;
    far.0.reset(Reason::RequesterReset);
    let end = relay(
        &settings(1 << 20),
        (&mut near.0, &mut near.1),
        &mut local,
        Early::default(),
        pending(),
    )
    .await;
    assert_eq!(end, RelayEnd::Cut(Reason::RequesterReset));
}

#[tokio::test(start_paused = true)]
async fn being_told_to_stop_resets_the_stream_with_that_reason() {
    let (mut near, mut far, mut local, _outside, _sessions) = parts().await;
    let stop = async { Reason::Draining };
    let settings = settings(1 << 20);
    let end = relay(
        &settings,
        (&mut near.0, &mut near.1),
        &mut local,
        Early::default(),
        stop,
    )
    .await;
    assert_eq!(end, RelayEnd::Cut(Reason::Draining));
    let seen = read_to_end(&mut far.1).await.unwrap_err();
    assert_eq!(seen, StreamError::Reset(Reason::Draining));
}

#[tokio::test(start_paused = true)]
async fn a_lost_session_cuts_it() {
    let (mut near, _far, mut local, _outside, [a, _b]) = parts().await;
    a.cut();
    let settings = settings(1 << 20);
    let end = relay(
        &settings,
        (&mut near.0, &mut near.1),
        &mut local,
        Early::default(),
        pending(),
    )
    .await;
    assert_eq!(end, RelayEnd::Cut(Reason::SessionLost));
}

#[tokio::test(start_paused = true)]
async fn half_closed_and_silent_is_reaped_but_not_while_bytes_move() {
    let (mut near, mut far, mut local, mut outside, _sessions) = parts().await;
    let settings = settings(1 << 20);
    let began = tokio::time::Instant::now();
    let relayed = relay(
        &settings,
        (&mut near.0, &mut near.1),
        &mut local,
        Early::default(),
        pending(),
    );
    let ends = async {
        far.0.finish().unwrap();
        for _ in 0..3 {
            tokio::time::sleep(HALF_OPEN / 2).await;
            outside.write_all(b"still here").await.unwrap();
        }
    };
    let (end, ()) = tokio::join!(relayed, ends);
    assert_eq!(end, RelayEnd::Cut(Reason::HalfOpenIdle));
    assert!(began.elapsed() >= HALF_OPEN * 2, "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn over_budget_the_reader_that_stopped_longest_is_reset_and_the_others_go_on() {
    // 64 KiB windows; room for 32 stopped readers.
    let settings = settings(2 << 20);
    let mut relays = tokio::task::JoinSet::new();
    let mut kept = Vec::new();
    for i in 0..40 {
        let (mut near, mut far, mut local, outside, sessions) = parts().await;
        let settings = settings.clone();
        relays.spawn(async move {
            let early = Early::default();
            let end = relay(
                &settings,
                (&mut near.0, &mut near.1),
                &mut local,
                early,
                pending(),
            )
            .await;
            (i, end)
        });
        // More than the local pipe takes: its reader has stopped.
        far.0
            .write_chunk(Bytes::from(vec![0; 32 << 10]))
            .await
            .unwrap();
        kept.push((far, outside, sessions));
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    let mut cut = Vec::new();
    while let Ok(Some(ended)) =
        tokio::time::timeout(Duration::from_secs(1), relays.join_next()).await
    {
        let (i, end) = ended.unwrap();
        assert_eq!(end, RelayEnd::Cut(Reason::SlowReader));
        cut.push(i);
    }
    cut.sort_unstable();
    assert_eq!(
        cut,
        (0..8).collect::<Vec<_>>(),
        "the first to stop go first"
    );
    assert!(settings.budget.held() <= 2 << 20);
    drop(kept);
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_the_tunnel_is_not_its_readers_fault() {
    // Less than one stopped reader costs.
    let settings = Relay {
        local_buffer: 128 << 10,
        ..settings(1)
    };
    let (mut near, mut far, mut local, mut outside, _sessions) = parts().await;
    let relayed = relay(
        &settings,
        (&mut near.0, &mut near.1),
        &mut local,
        Early::default(),
        pending(),
    );
    let sent = vec![7; 2 * WINDOW];
    let talk = async {
        let writes = async {
            outside.write_all(&sent).await.unwrap();
            outside.shutdown().await.unwrap();
        };
        let reads = async {
            // A line that takes nothing for longer than any grace.
            tokio::time::sleep(Duration::from_secs(60)).await;
            assert_eq!(settings.budget.held(), 0);
            let got = read_to_end(&mut far.1).await.unwrap();
            far.0.finish().unwrap();
            got
        };
        tokio::join!(writes, reads).1
    };
    let (end, got) = tokio::join!(relayed, talk);
    assert_eq!((end, got.len()), (RelayEnd::Finished, 2 * WINDOW));
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_the_tunnel_makes_reads_small() {
    let settings = settings(1 << 20);
    let (mut near, mut far, mut local, mut outside, _sessions) = parts().await;
    let usual = settings.budget.read_buffer();
    // One chunk less than it takes.
    let others = settings.budget.waiting((128 << 10) - (4 << 10));
    assert_eq!(settings.budget.read_buffer(), usual);
    let relayed = relay(
        &settings,
        (&mut near.0, &mut near.1),
        &mut local,
        Early::default(),
        pending(),
    );
    let sent = vec![7; 2 * WINDOW];
    let talk = async {
        let writes = async {
            outside.write_all(&sent).await.unwrap();
            outside.shutdown().await.unwrap();
        };
        let reads = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert!(settings.budget.read_buffer() < usual);
            let got = read_to_end(&mut far.1).await.unwrap();
            assert_eq!(settings.budget.read_buffer(), usual);
            far.0.finish().unwrap();
            got
        };
        tokio::join!(writes, reads).1
    };
    let (end, got) = tokio::join!(relayed, talk);
    assert_eq!((end, got.len()), (RelayEnd::Finished, 2 * WINDOW));
    drop(others);
}

#[tokio::test(start_paused = true)]
async fn a_stopped_reader_costs_what_the_kernel_keeps_of_it_too() {
    let settings = Relay {
        local_buffer: 128 << 10,
        ..settings(2 << 20)
    };
    let (mut near, mut far, mut local, mut outside, _sessions) = parts().await;
    let relayed = relay(
        &settings,
        (&mut near.0, &mut near.1),
        &mut local,
        Early::default(),
        pending(),
    );
    let talk = async {
        let sent = Bytes::from(vec![0; 32 << 10]);
        far.0.write_chunk(sent).await.unwrap();
        far.0.finish().unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let window = u64::from(settings.budget.stream_window());
        assert_eq!(settings.budget.held(), window + (128 << 10));
        outside.shutdown().await.unwrap();
        let mut got = Vec::new();
        outside.read_to_end(&mut got).await.unwrap();
        read_to_end(&mut far.1).await.unwrap();
        got.len()
    };
    let (end, got) = tokio::join!(relayed, talk);
    assert_eq!((end, got), (RelayEnd::Finished, 32 << 10));
    assert_eq!(settings.budget.held(), 0);
}
