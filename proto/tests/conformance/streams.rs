//! Streams: order, ends, resets, credit and their limit.

use std::time::Duration;

use bytes::Bytes;
use proto::Reason;
use proto::transport::{RecvHalf, SendHalf, Session, SessionError, StreamError};

use super::{DEADLINE, STREAMS, Transport, WINDOW, pattern, read_to_end, stream};

pub(super) async fn bytes_arrive_in_order<T: Transport>() {
    let (a, b, _keep) = T::pair(DEADLINE).await;
    let ((mut send, _r), (_s, mut recv)) = stream(&a, &b).await;
    let data = pattern(3 << 20);
    let write = async {
        for piece in data.chunks(10_007) {
            send.write_chunk(Bytes::copy_from_slice(piece))
                .await
                .unwrap();
        }
        send.finish().unwrap();
    };
    let (read, ()) = tokio::join!(read_to_end(&mut recv), write);
    assert!(read.unwrap() == data);
}

pub(super) async fn each_half_closes_on_its_own<T: Transport>() {
    let (a, b, _keep) = T::pair(DEADLINE).await;
    let ((mut send, mut back), (mut answer, mut recv)) = stream(&a, &b).await;
    send.finish().unwrap();
    assert_eq!(read_to_end(&mut recv).await.unwrap(), b"");
    answer
        .write_chunk(Bytes::from_static(b"late"))
        .await
        .unwrap();
    answer.finish().unwrap();
    assert_eq!(read_to_end(&mut back).await.unwrap(), b"late");
}

pub(super) async fn a_reset_ends_both_ways_with_its_reason<T: Transport>() {
    let (a, b, _keep) = T::pair(DEADLINE).await;
    let ((mut send, mut back), (mut answer, mut recv)) = stream(&a, &b).await;
    send.reset(Reason::SlowReader);
    let reset = StreamError::Reset(Reason::SlowReader);
    assert_eq!(
        read_to_end(&mut back).await.unwrap_err(),
        reset,
        "own receiving half"
    );
    assert_eq!(
        read_to_end(&mut recv).await.unwrap_err(),
        reset,
        "the peer's receiving half"
    );
    drop((send, back));
    let refused = loop {
        if let Err(error) = answer.write_chunk(pattern(1000)).await {
            break error;
        }
    };
    assert_eq!(refused, reset, "the peer's sending half");
}

pub(super) async fn a_reset_by_the_reader_reaches_the_writer<T: Transport>() {
    let (a, b, _keep) = T::pair(DEADLINE).await;
    let ((mut send, _back), (_answer, mut recv)) = stream(&a, &b).await;
    recv.reset(Reason::DestinationReset);
    let error = loop {
        if let Err(error) = send.write_chunk(pattern(1000)).await {
            break error;
        }
    };
    assert_eq!(error, StreamError::Reset(Reason::DestinationReset));
}

pub(super) async fn a_half_dropped_unfinished_is_a_reset<T: Transport>() {
    let (a, b, _keep) = T::pair(DEADLINE).await;
    let ((mut send, _back), (_answer, mut recv)) = stream(&a, &b).await;
    send.write_chunk(pattern(100)).await.unwrap();
    drop(send);
    assert_eq!(
        read_to_end(&mut recv).await.unwrap_err(),
        StreamError::Reset(Reason::Cancelled)
    );
}

pub(super) async fn a_finished_half_may_be_dropped<T: Transport>() {
    let (a, b, _keep) = T::pair(DEADLINE).await;
    let ((mut send, _back), (_answer, mut recv)) = stream(&a, &b).await;
    send.write_chunk(pattern(100)).await.unwrap();
    send.finish().unwrap();
    drop(send);
    assert_eq!(read_to_end(&mut recv).await.unwrap(), pattern(100));
}

pub(super) async fn stopped_readers_hold_back_no_other_stream_and_little_memory<T: Transport>() {
    let (a, b, _keep) = T::pair(DEADLINE).await;
    let mut stopped = Vec::new();
    for _ in 0..64 {
        let ((mut send, back), far) = stream(&a, &b).await;
        let mut taken = 0_usize;
        // Until credit is used up; nobody reads at the other side.
        while tokio::time::timeout(
            Duration::from_millis(20),
            send.write_chunk(pattern(8 << 10)),
        )
        .await
        .is_ok()
        {
            taken += 8 << 10;
            assert!(
                taken < 40 * WINDOW as usize,
                "an unread stream takes bytes without end"
            );
        }
        stopped.push((send, back, far));
    }
    let ((mut send, _r), (_s, mut recv)) = stream(&a, &b).await;
    let data = pattern(8 << 20);
    let write = async {
        for piece in data.chunks(64 << 10) {
            send.write_chunk(Bytes::copy_from_slice(piece))
                .await
                .unwrap();
        }
        send.finish().unwrap();
    };
    let both = async { tokio::join!(read_to_end(&mut recv), write) };
    let (read, ()) = tokio::time::timeout(DEADLINE, both)
        .await
        .expect("64 stopped readers stall another");
    assert!(read.unwrap() == data);
    drop(stopped);
}

pub(super) async fn the_stream_limit_makes_openers_wait<T: Transport>() {
    let (a, b, _keep) = T::pair(DEADLINE).await;
    let mut all = Vec::new();
    for _ in 0..STREAMS {
        all.push(stream(&a, &b).await);
    }
    let more = tokio::time::timeout(Duration::from_millis(200), a.open()).await;
    assert!(more.is_err(), "a stream beyond the limit");
    all.truncate(1);
    tokio::time::timeout(DEADLINE, stream(&a, &b))
        .await
        .expect("room again");
}

pub(super) async fn closing_tells_the_peer_why_and_ends_its_streams<T: Transport>() {
    let (a, b, _keep) = T::pair(DEADLINE).await;
    let (_near, (_answer, mut recv)) = stream(&a, &b).await;
    a.close(Reason::Draining);
    assert_eq!(b.closed().await, SessionError::Peer(Reason::Draining));
    let lost = StreamError::Session(SessionError::Peer(Reason::Draining));
    assert_eq!(read_to_end(&mut recv).await.unwrap_err(), lost);
    assert!(b.open().await.is_err() && b.accept().await.is_err());
}
