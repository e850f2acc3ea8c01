//! Between two tunnel streams: at a server that has the session of what another server asked for.
//!
//! The two flow controls are coupled by nothing but this loop: a chunk is read only when the one before was taken, so a
//! reader that has stopped at the far end stops its own stream on both hops, costs one window on each, and is counted in
//! the budget here as any other stopped reader.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;

use bytes::Bytes;

use super::{Early, FLUSH, Relay, RelayEnd, both};
use crate::transport::{READ_CHUNKS, RecvHalf, SendHalf};
use crate::{Reason, Stopped};

/// Relays between the stream towards the requester and the one towards the edge, until both ways are finished, one
/// fails, or `stop` says why to end it. Both streams then end alike: with FINs, or reset with the reason. What comes
/// from the requester counts as sent; in `early` it is what counts as local.
pub async fn relay_streams<S1, R1, S2, R2>(
    settings: &Relay,
    requester: (&mut S1, &mut R1),
    edge: (&mut S2, &mut R2),
    early: Early,
    stop: impl Future<Output = Reason> + Send,
) -> RelayEnd
where
    S1: SendHalf,
    R1: RecvHalf,
    S2: SendHalf,
    R2: RecvHalf,
{
    let counters = &settings.counters;
    let ended = {
        let up = pin!(one_way(
            settings,
            requester.1,
            edge.0,
            early.from_local,
            &counters.sent
        ));
        let down = pin!(one_way(
            settings,
            edge.1,
            requester.0,
            early.from_tunnel,
            &counters.received
        ));
        both(settings, up, down, pin!(stop)).await
    };
    match ended {
        Ok(()) => {
            let flushed = async { tokio::join!(edge.0.flushed(), requester.0.flushed()) };
            tokio::time::timeout(FLUSH, flushed).await.ok(); // an end that takes nothing more has gone
            RelayEnd::Finished
        }
        Err(reason) => {
            requester.0.reset(reason);
            requester.1.reset(reason);
            edge.0.reset(reason);
            edge.1.reset(reason);
            RelayEnd::Cut(reason)
        }
    }
}

async fn one_way<R: RecvHalf, S: SendHalf>(
    settings: &Relay,
    from: &mut R,
    to: &mut S,
    early: Bytes,
    count: &AtomicU64,
) -> Result<(), Reason> {
    let mut chunks = [const { Bytes::new() }; READ_CHUNKS];
    let mut stopped = None;
    if !early.is_empty() {
        pass_on(settings, to, early, count, &mut stopped).await?;
    }
    loop {
        let read = {
            let mut read = pin!(from.read_chunks(&mut chunks));
            match poll_fn(|cx| Poll::Ready(read.as_mut().poll(cx))).await {
                Poll::Ready(read) => read,
                Poll::Pending => {
                    // The reader has caught up: nothing is held for it any more.
                    stopped = None;
                    read.await
                }
            }
        };
        let Some(filled) = read.map_err(|error| error.reason())? else {
            return to.finish().map_err(|error| error.reason());
        };
        for chunk in chunks.get_mut(..filled).unwrap_or_default() {
            // Taken out, so that it is freed as soon as it is sent.
            let chunk = std::mem::take(chunk);
            pass_on(settings, to, chunk, count, &mut stopped).await?;
        }
    }
}

/// Sends one chunk; once that has to wait, the stream counts as stopped until its reader has caught up.
async fn pass_on<S: SendHalf>(
    settings: &Relay,
    to: &mut S,
    chunk: Bytes,
    count: &AtomicU64,
    stopped: &mut Option<Stopped>,
) -> Result<(), Reason> {
    let length = chunk.len() as u64;
    let mut write = pin!(to.write_chunk(chunk));
    let wrote = match poll_fn(|cx| Poll::Ready(write.as_mut().poll(cx))).await {
        Poll::Ready(wrote) => wrote,
        Poll::Pending => {
            let stopped = stopped.get_or_insert_with(|| {
                settings
                    .budget
                    .stopped(settings.budget.stream_window().into())
            });
            tokio::select! {
                wrote = &mut write => wrote,
                () = stopped.evicted() => return Err(Reason::SlowReader),
            }
        }
    };
    if let Some(stopped) = stopped {
        stopped.moved();
    }
    wrote.map_err(|error| error.reason())?;
    count.fetch_add(length, Ordering::Relaxed);
    Ok(())
}
