//! A control stream after its handshake: what is read, what is written, and what silence means.

use std::future::pending;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::{Control, GoAway, Liveness, frame};
use crate::Reason;
use crate::framed::FrameReader;
use crate::transport::keepalive::{Keepalive, Verdict};
use crate::transport::{RecvHalf, SendHalf, Session, SessionError};
use crate::wire::pb::control_frame::Body;
use crate::wire::{Announcement, encode, pb};

/// What the other end says beside its signs of life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// It wants the session gone.
    GoAway(GoAway),
    /// It has those agents.
    Announcement(Announcement),
    /// There are so many servers.
    Servers(u32),
}

/// What there is to say beside signs of life: asked for whenever the stream takes more, so that nothing is queued.
pub trait Outbox: Send {
    /// The next frame, encoded. Cancel-safe.
    fn next(&mut self) -> impl Future<Output = Bytes> + Send;
}

/// Nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quiet;

impl Outbox for Quiet {
    async fn next(&mut self) -> Bytes {
        pending().await
    }
}

impl<S: Session> Control<S> {
    /// Keeps the session alive and says how it ended. `on_go_away` is called for each GoAway of the other end.
    pub async fn run(
        self,
        liveness: &Liveness,
        mut on_go_away: impl FnMut(GoAway) + Send,
    ) -> SessionError {
        let on = |heard| {
            if let Heard::GoAway(away) = heard {
                on_go_away(away);
            }
        };
        self.run_with(liveness, on, Quiet).await
    }

    /// As [`Control::run`], for an end that listens to more than GoAways, or has more to say.
    pub async fn run_with(
        self,
        liveness: &Liveness,
        on: impl FnMut(Heard) + Send,
        mut outbox: impl Outbox,
    ) -> SessionError {
        let Self {
            session,
            mut send,
            mut reader,
            handle,
            mut outgoing,
        } = self;
        liveness.heard();
        let broken = tokio::select! {
            biased;
            error = session.closed() => return error,
            reason = read_frames(&mut reader, liveness, &handle, on) => reason,
            reason = write_frames(&mut send, liveness.keepalive, &mut outgoing, &mut outbox) => reason,
            reason = watch(&session, liveness) => reason,
        };
        // The control stream often shows first what ended the whole session.
        tokio::select! {
            biased;
            error = session.closed() => error,
            () = std::future::ready(()) => {
                session.close(broken);
                SessionError::Local(broken)
            }
        }
    }
}

async fn read_frames<R: RecvHalf>(
    reader: &mut FrameReader<R>,
    liveness: &Liveness,
    outgoing: &mpsc::Sender<Bytes>,
    mut on: impl FnMut(Heard),
) -> Reason {
    loop {
        let frame = match reader.read::<pb::ControlFrame>().await {
            Ok(Some(frame)) => frame,
            // The control stream lives as long as the session.
            Ok(None) => return Reason::Protocol,
            Err(error) => return error.reason(),
        };
        liveness.heard();
        match frame.body {
            Some(Body::Keepalive(pb::Keepalive { sequence })) => {
                let ack = super::frame(Body::KeepaliveAck(pb::KeepaliveAck { sequence }));
                outgoing.try_send(encode(&ack)).ok(); // full: see OUTGOING
            }
            Some(Body::GoAway(away)) => on(Heard::GoAway(away.into())),
            Some(Body::Announce(announce)) => match Announcement::from_pb(&announce) {
                Ok(announcement) => on(Heard::Announcement(announcement)),
                Err(_wrong) => return Reason::Protocol,
            },
            Some(Body::Servers(pb::Servers { servers })) => on(Heard::Servers(servers)),
            // A body of a later version is a sign of life and nothing more.
            Some(Body::KeepaliveAck(_)) | None => {}
            Some(Body::Hello(_) | Body::HelloAck(_)) => return Reason::Protocol,
        }
    }
}

async fn write_frames<S: SendHalf>(
    send: &mut S,
    keepalive: Keepalive,
    outgoing: &mut mpsc::Receiver<Bytes>,
    outbox: &mut impl Outbox,
) -> Reason {
    let mut sequence = 0;
    let mut due = Instant::now() + keepalive.next(rand::random());
    loop {
        let next = tokio::select! {
            biased;
            Some(frame) = outgoing.recv() => frame,
            () = tokio::time::sleep_until(due) => {
                due = Instant::now() + keepalive.next(rand::random());
                sequence += 1;
                encode(&frame(Body::Keepalive(pb::Keepalive { sequence })))
            }
            frame = outbox.next() => frame,
        };
        if let Err(error) = send.write_chunk(next).await {
            return error.reason();
        }
    }
}

async fn watch<S: Session>(session: &S, liveness: &Liveness) -> Reason {
    loop {
        let silence = liveness.silence();
        match liveness.keepalive.verdict(silence) {
            Verdict::Healthy => {}
            Verdict::Suspect => session.nudge(),
            Verdict::Dead => return Reason::SessionLost,
        }
        // A keepalive does not bear on when to look, so none is due.
        sleep(
            liveness
                .keepalive
                .look_in(silence, Duration::MAX)
                .max(Duration::from_millis(10)),
        )
        .await;
    }
}
