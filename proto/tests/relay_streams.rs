//! The relay between two streams over the in-memory transport, with paused time.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proto::transport::memory::{MemoryRecv, MemorySend, MemorySession, pair};
use proto::transport::{RecvHalf, SendHalf, Session, StreamError};
use proto::{Budget, Counters, Early, Local, Reason, Relay, RelayEnd, relay_streams};
use tokio::task::JoinHandle;

const WINDOW: usize = 64 << 10;
const HALF_OPEN: Duration = Duration::from_secs(600);

fn settings(budget: u64) -> Relay {
    Relay {
        local: Local::Requester,
        budget: Budget::new(budget),
        local_buffer: 0,
        half_open: HALF_OPEN,
        counters: Arc::new(Counters::default()),
    }
}

type Halves = (MemorySend, MemoryRecv);

/// A relay in the middle of two lines, and their outer ends.
struct Middle {
    requester: Halves,
    edge: Halves,
    /// Requester, then edge; each with its far end.
    lines: [MemorySession; 4],
    relay: JoinHandle<RelayEnd>,
}

async fn middle(settings: &Relay, stop: impl Future<Output = Reason> + Send + 'static) -> Middle {
    let (entry, here) = pair(WINDOW, 8);
    let (there, agent) = pair(WINDOW, 8);
    let requester = entry.open().await.unwrap();
    let mut near = here.accept().await.unwrap();
    let mut far = there.open().await.unwrap();
    let edge = agent.accept().await.unwrap();
    let settings = settings.clone();
    #[expect(clippy::disallowed_methods, reason = "joined by the test")]
    let relay = tokio::task::spawn(async move {
        let early = Early {
            from_local: Bytes::from_static(b"early "),
            from_tunnel: Bytes::from_static(b"head "),
        };
        let (near, far) = ((&mut near.0, &mut near.1), (&mut far.0, &mut far.1));
        relay_streams(&settings, near, far, early, stop).await
    });
    Middle {
        requester,
        edge,
        lines: [entry, here, there, agent],
        relay,
    }
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
    let settings = settings(1 << 20);
    let mut middle = middle(&settings, pending()).await;
    let (up, down) = (&mut middle.requester, &mut middle.edge);
    up.0.write_chunk(Bytes::from_static(b"up")).await.unwrap();
    up.0.finish().unwrap();
    assert_eq!(read_to_end(&mut down.1).await.unwrap(), b"early up");
    // The other way is still open after this one has closed.
    down.0
        .write_chunk(Bytes::from_static(b"down"))
        .await
        .unwrap();
    down.0.finish().unwrap();
    assert_eq!(read_to_end(&mut up.1).await.unwrap(), b"head down");
    assert_eq!(middle.relay.await.unwrap(), RelayEnd::Finished);
    let counters = settings.counters;
    assert_eq!((counters.sent(), counters.received()), (8, 9));
}

#[tokio::test(start_paused = true)]
async fn a_large_transfer_is_whole() {
    let settings = settings(1 << 20);
    let mut middle = middle(&settings, pending()).await;
    let data: Vec<u8> = (0..1_000_000_u32)
        .map(|i| (i % 251).to_le_bytes()[0])
        .collect();
    let (up, down) = (&mut middle.requester, &mut middle.edge);
    let write = async {
        for piece in data.chunks(9_973) {
            let piece = Bytes::copy_from_slice(piece);
            down.0.write_chunk(piece).await.unwrap();
        }
        down.0.finish().unwrap();
    };
    let (got, ()) = tokio::join!(read_to_end(&mut up.1), write);
    let got = got.unwrap();
    assert!(got.strip_prefix(b"head ") == Some(&data[..]));
    up.0.finish().unwrap();
    assert_eq!(read_to_end(&mut down.1).await.unwrap(), b"early ");
    assert_eq!(middle.relay.await.unwrap(), RelayEnd::Finished);
}

#[tokio::test(start_paused = true)]
async fn a_reset_at_one_end_reaches_the_other_with_its_reason() {
    for at_edge in [false, true] {
        let mut middle = middle(&settings(1 << 20), pending()).await;
        let (from, to) = if at_edge {
            (&mut middle.edge, &mut middle.requester)
        } else {
            (&mut middle.requester, &mut middle.edge)
        };
        from.0.reset(Reason::DestinationReset);
        let seen = read_to_end(&mut to.1).await.unwrap_err();
        assert_eq!(seen, StreamError::Reset(Reason::DestinationReset));
        let end = middle.relay.await.unwrap();
        assert_eq!(end, RelayEnd::Cut(Reason::DestinationReset));
    }
}

#[tokio::test(start_paused = true)]
async fn a_half_that_is_dropped_is_no_clean_end_at_the_other_side() {
    let mut middle = middle(&settings(1 << 20), pending()).await;
    drop(middle.edge);
    let seen = read_to_end(&mut middle.requester.1).await.unwrap_err();
    assert_eq!(seen, StreamError::Reset(Reason::Cancelled));
}

#[tokio::test(start_paused = true)]
async fn a_lost_session_cuts_both_streams() {
    for line in [0, 3] {
        let mut middle = middle(&settings(1 << 20), pending()).await;
        middle.lines[line].cut();
        let other = if line == 0 {
            &mut middle.edge
        } else {
            &mut middle.requester
        };
        let seen = read_to_end(&mut other.1).await.unwrap_err();
        assert_eq!(seen, StreamError::Reset(Reason::SessionLost));
        let end = middle.relay.await.unwrap();
        assert_eq!(end, RelayEnd::Cut(Reason::SessionLost));
    }
}

#[tokio::test(start_paused = true)]
async fn being_told_to_stop_resets_both_streams() {
    let stop = async { Reason::Draining };
    let mut middle = middle(&settings(1 << 20), stop).await;
    for recv in [&mut middle.edge.1, &mut middle.requester.1] {
        let seen = read_to_end(recv).await.unwrap_err();
        assert_eq!(seen, StreamError::Reset(Reason::Draining));
    }
    let end = middle.relay.await.unwrap();
    assert_eq!(end, RelayEnd::Cut(Reason::Draining));
}

#[tokio::test(start_paused = true)]
async fn half_closed_and_silent_is_reaped() {
    let mut middle = middle(&settings(1 << 20), pending()).await;
    middle.requester.0.finish().unwrap();
    let end = middle.relay.await.unwrap();
    assert_eq!(end, RelayEnd::Cut(Reason::HalfOpenIdle));
}

#[tokio::test(start_paused = true)]
async fn a_stopped_reader_holds_a_window_a_hop_and_is_reset_over_budget() {
    // 64 KiB windows; room for 32 stopped readers.
    let settings = settings(2 << 20);
    let mut all = Vec::new();
    for _ in 0..40 {
        let mut middle = middle(&settings, pending()).await;
        // Nobody reads at the requester's end: one window fills there, and one here.
        let mut taken = 0;
        let fill = async {
            loop {
                let chunk = Bytes::from(vec![0; 4 << 10]);
                middle.edge.0.write_chunk(chunk).await.unwrap();
                taken += 4 << 10;
            }
        };
        tokio::time::timeout(Duration::from_secs(2), fill)
            .await
            .unwrap_err();
        assert!(
            (WINDOW..=2 * WINDOW + (64 << 10)).contains(&taken),
            "{taken}"
        );
        all.push(middle);
    }
    let mut cut = 0;
    for middle in &mut all {
        if let Ok(end) = tokio::time::timeout(Duration::from_secs(2), &mut middle.relay).await {
            assert_eq!(end.unwrap(), RelayEnd::Cut(Reason::SlowReader));
            cut += 1;
        }
    }
    assert_eq!(cut, 8, "the first to stop go, the others stay");
    assert!(settings.budget.held() <= 2 << 20);
}
