//! Bodies that are counted on their way: a request over a kept connection has a record of its own.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use proto::Reason;

use super::pool;
use crate::record::{Outcome, RequestRecord};

type Polled = Poll<Option<Result<Frame<Bytes>, hyper::Error>>>;

fn length(frame: &Frame<Bytes>) -> u64 {
    let bytes = frame.data_ref().map_or(0, Bytes::len);
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// A request's body.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) body: Incoming,
    pub(super) moved: Arc<AtomicU64>,
}

impl Body for Sent {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Polled {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            this.moved.fetch_add(length(frame), Ordering::Relaxed);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body; the record ends with it.
#[derive(Debug)]
pub(super) struct Answered {
    pub(super) body: Incoming,
    pub(super) record: RequestRecord,
}

impl Body for Answered {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Polled {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => this.record.from_edge += length(frame),
            Poll::Ready(Some(Err(error))) => {
                let reason = pool::cut(error).unwrap_or(Reason::DestinationReset);
                this.record.end(Outcome::Failed(reason), "");
            }
            Poll::Ready(None) | Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Answered {
    fn drop(&mut self) {
        // Else the requester did not want the rest, or it broke off.
        if self.body.is_end_stream() {
            self.record.end(Outcome::Ok, "");
        }
    }
}
