//! Keeps one session with each server, and one over each dedicated line that leads there: one supervisor for each address
//! that the servers resolve to. Over which of them requests come is the server's choice (docs/protocol.md section 4), so
//! when one fails the other is there already.
//!
//! | state | until |
//! | --- | --- |
//! | *connecting* | a session is up; after each failure a pause (full jitter, never shorter than the server asks) |
//! | *holding* | the session ends, the server says GoAway, or the certificate was renewed: then *connecting*, while the old session goes on in its own task (make before break) |
//! | *parked* | another supervisor has a newer session with the same server over the same line, or none, and that one is up |
//!
//! A supervisor ends when its address is no longer wanted and it holds no session. What one address hides, a load
//! balancer in front of several servers, is the affair of [`crate::seeker`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use daemon::{Tasks, chain};
use proto::Reason;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{interval, sleep};

use crate::backoff::{Backoff, obey};
use crate::candidate::{Candidate, Candidates};
use crate::config::BackoffLimits;
use crate::error::{OpenError, is_hopeless};
use crate::seeker::Seeker;
use crate::session::{self, Live, Phase, Terms};

/// How often names are resolved without a cause: finds servers that were added.
const RESOLVE_EVERY: Duration = Duration::from_secs(30);
/// Over which sessions move to a renewed certificate.
const RENEWAL_SPREAD: Duration = Duration::from_secs(5);
/// A failure that repeats is logged as a warning again after so many.
const REPEAT_WARNING: u32 = 20;

/// What the supervisors share.
#[derive(Clone)]
pub(crate) struct Connector {
    pub(crate) terms: Arc<Terms>,
    pub(crate) candidates: Arc<Candidates>,
    pub(crate) limits: BackoffLimits,
    /// Changes with each renewed certificate.
    pub(crate) renewed: watch::Receiver<u64>,
    /// Fingerprint of the certificate whose node, a server says, is not there any more.
    pub(crate) gone: watch::Sender<String>,
    /// Fingerprint of the certificate whose authority a server does not know.
    pub(crate) unknown: watch::Sender<String>,
}

impl Connector {
    /// Starts a supervisor for each address as it becomes known. Ends with `tasks`.
    pub(crate) async fn run(self, tasks: Tasks) {
        let mut wanted = self.candidates.watch();
        let mut running: BTreeMap<Candidate, AbortHandle> = BTreeMap::new();
        let mut ticks = interval(RESOLVE_EVERY);
        tasks.spawn("seeker", Seeker::new(self.clone()).run());
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    self.candidates.refresh().await;
                }
                Ok(()) = wanted.changed() => {}
            }
            running.retain(|_, supervisor| !supervisor.is_finished());
            for way in wanted.borrow_and_update().iter() {
                running.entry(way.clone()).or_insert_with(|| {
                    let supervisor = Supervisor::new(self.clone(), way.clone());
                    tasks.spawn("supervisor", supervisor.run())
                });
            }
        }
    }
}

/// Keeps a session with the server at one address.
struct Supervisor {
    shared: Connector,
    way: Candidate,
    backoff: Backoff,
    /// Read up to the certificate that the last attempt was made with.
    renewed: watch::Receiver<u64>,
    /// Why the last attempt failed, and how often in a row.
    failing: Option<(Reason, u32)>,
}

/// What to do after a session was held.
enum Next {
    /// Open another one after a pause; its cause is for the count.
    Reconnect(Duration, Reason),
    /// Wait until the server has no session.
    Park,
}

impl Supervisor {
    fn new(shared: Connector, way: Candidate) -> Self {
        let backoff = Backoff::new(shared.limits);
        let renewed = shared.renewed.clone();
        Self {
            shared,
            way,
            backoff,
            renewed,
            failing: None,
        }
    }

    async fn run(mut self) {
        let mut previous: Option<Arc<Live>> = None;
        while let Some(live) = self.connect().await {
            // Usually the registry has let it go already; not where another server took over at this address.
            if let Some(old) = previous.take() {
                old.supersede();
            }
            match self.hold(&live).await {
                Next::Reconnect(after, reason) => {
                    self.shared
                        .terms
                        .metrics
                        .reconnects
                        .get_or_create(&reason.into())
                        .inc();
                    tokio::select! {
                        () = sleep(after) => {}
                        // It may be what was missing.
                        Ok(()) = self.renewed.changed() => {}
                    }
                    previous = Some(live);
                }
                Next::Park => {
                    let (address, line) = (self.way.address, self.way.line());
                    tracing::debug!(%address, line, server = %live.server(), "parked");
                    self.shared.terms.registry.vacant(&live).await;
                    let pause = self.backoff.failed(rand::random());
                    sleep(pause).await;
                }
            }
        }
        let (address, line) = (self.way.address, self.way.line());
        tracing::debug!(%address, line, "address is not wanted any more");
    }

    /// *Connecting*. `None` once the address is not wanted any more.
    async fn connect(&mut self) -> Option<Arc<Live>> {
        loop {
            self.wait_for_a_valid_certificate().await;
            let wanted = self.shared.candidates.refresh().await;
            if !wanted.contains(&self.way) {
                return None;
            }
            match session::open(&self.shared.terms, &self.way, |_server| false).await {
                Ok(live) => {
                    self.failing = None;
                    return Some(live);
                }
                Err(error) => {
                    let reason = error.reason();
                    self.shared
                        .terms
                        .metrics
                        .reconnects
                        .get_or_create(&reason.into())
                        .inc();
                    if error.is_unknown() {
                        self.shared.unknown.send_replace(self.fingerprint());
                    }
                    let pause = self.pause(reason, error.retry_after());
                    self.log(&error, pause);
                    tokio::select! {
                        () = sleep(pause) => {}
                        // It may be what was missing.
                        Ok(()) = self.renewed.changed() => {}
                    }
                }
            }
        }
    }

    /// An expired certificate opens no session; renewal or enrolment is under way.
    async fn wait_for_a_valid_certificate(&mut self) {
        let own = &self.shared.terms.own;
        self.renewed.mark_unchanged();
        while own.credential.not_after().as_secs() <= own.clock.now().as_secs() {
            if self.renewed.changed().await.is_err() {
                return;
            }
        }
    }

    fn fingerprint(&self) -> String {
        let credential = self.shared.terms.own.credential.load();
        credential.fingerprint().to_owned()
    }

    fn pause(&mut self, reason: Reason, retry_after: Duration) -> Duration {
        if reason == Reason::NodeGone {
            self.shared.gone.send_replace(self.fingerprint());
        }
        let random = rand::random();
        let pause = if is_hopeless(reason) {
            self.backoff.hopeless(random)
        } else {
            self.backoff.failed(random)
        };
        obey(pause, retry_after, rand::random())
    }

    /// *Holding*.
    async fn hold(&mut self, live: &Arc<Live>) -> Next {
        let mut phase = live.phase();
        let phase = tokio::select! {
            phase = phase.wait_for(|phase| *phase != Phase::Up) => match phase {
                Ok(phase) => phase.clone(),
                Err(_gone) => return Next::Park,
            },
            Ok(()) = self.renewed.changed() => {
                let after = RENEWAL_SPREAD.mul_f64(rand::random());
                return Next::Reconnect(after, Reason::CertificateExpired);
            }
        };
        match phase {
            Phase::Told(away) if away.reason == Reason::Replaced => Next::Park,
            Phase::Up | Phase::Superseded => Next::Park,
            Phase::Told(away) => {
                if live.is_useful() {
                    self.backoff.reset();
                }
                let pause = self.pause(away.reason, away.retry_after);
                Next::Reconnect(pause, away.reason)
            }
            Phase::Ended(end) => {
                if end.useful {
                    self.backoff.reset();
                }
                if end.reason == Reason::Revoked {
                    revoked(&self.way);
                }
                let pause = self.pause(end.reason, Duration::ZERO);
                Next::Reconnect(pause, end.reason)
            }
        }
    }

    /// Once loud, then quiet: an outage of hours must not fill a disk.
    fn log(&mut self, error: &OpenError, pause: Duration) {
        let reason = error.reason();
        let count = match self.failing {
            Some((last, count)) if last == reason => count.saturating_add(1),
            Some(_) | None => 0,
        };
        self.failing = Some((reason, count));
        let pause_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        let (address, line) = (self.way.address, self.way.line());
        if count > 0 && count % REPEAT_WARNING != 0 {
            tracing::debug!(%address, line, %reason, error = %chain(error), pause_ms, "no session");
        } else if reason == Reason::Revoked {
            revoked(&self.way);
        } else {
            let tls = error.tls_failure();
            tracing::warn!(%address, line, %reason, tls, error = %chain(error), pause_ms, "no session");
        }
    }
}

/// The one clear line.
fn revoked(way: &Candidate) {
    tracing::error!(
        address = %way.address,
        line = way.line(),
        "this agent is revoked: no server takes it until `proxy-server agent allow` is run there"
    );
}
