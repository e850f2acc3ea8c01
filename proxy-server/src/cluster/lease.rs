//! Leader election by a Lease: of all proxy-servers of a cluster one writes to it.
//!
//! | state | from it by | what it may do |
//! | --- | --- | --- |
//! | waits | the Lease is free, given away, or has not changed for its duration | nothing |
//! | leads | – | write, until `renewDeadline` after its last renewal was sent |
//! | resigned (this server stops) | – | nothing; the Lease names nobody and the next one leads within its `retryPeriod` |
//!
//! | failure | what happens |
//! | --- | --- |
//! | kube-apiserver can't be reached, is late, 429, 5xx | asked again each `retryPeriod`; a leader leads until its time is over, then no more |
//! | 401, 403, the namespace is missing | the same; said in log and `status` |
//! | somebody else wrote in between (409) | a leader stops at once; the Lease is read again at once |
//! | an answer is lost | the next look tells what became of the write |
//! | the Lease is deleted | its holder makes a new one; others wait as if it were there, but a server that starts just then may lead at once, beside the old leader for a `retryPeriod` |
//! | this server is killed | the next one leads after `duration` |
//!
//! What is decided is in `lease/election.rs`, which has no IO. Nobody may write without asking [`Leadership::until`] first.

mod election;
#[cfg(test)]
mod model;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use election::{Action, Election};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use kube::api::PostParams;
use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;
use tokio::time::{Instant, sleep};

use super::ask::{AskError, Asker, within};
use super::client::Source;
use crate::config::LeaseTimes;

/// The Lease that all proxy-servers of a cluster compete for.
pub const NAME: &str = "corvid-proxy-server";
/// Who writes, in the managed fields of what is written.
pub(super) const FIELD_MANAGER: &str = "corvid-proxy-server";
/// For giving the Lease away; a process that stops does not wait longer for it.
const RESIGN: Duration = Duration::from_secs(2);

/// Whether this server leads, for those who write.
#[derive(Debug, Default)]
pub struct Leadership {
    standing: Mutex<Standing>,
    gauge: Gauge,
}

/// How the election stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    /// This server leads until then.
    pub until: Option<Instant>,
    /// Who leads, by the Lease.
    pub holder: Option<String>,
    /// Why that is not known.
    pub failure: Option<String>,
}

impl Leadership {
    pub(super) fn new(gauge: Gauge) -> Self {
        Self {
            standing: Mutex::default(),
            gauge,
        }
    }

    /// Until when this server may write; `None` if it may not.
    #[must_use]
    pub fn until(&self) -> Option<Instant> {
        let until = self.standing.lock().until;
        until.filter(|until| Instant::now() < *until)
    }

    /// How the election stands.
    #[must_use]
    pub fn standing(&self) -> Standing {
        self.standing.lock().clone()
    }

    /// Sets the gauge, which time changes too.
    pub(super) fn export(&self) {
        self.gauge.set(self.until().is_some().into());
    }

    fn set(&self, new: Standing) {
        let mut standing = self.standing.lock();
        let (led, leads) = (standing.until.is_some(), new.until.is_some());
        match (led, leads) {
            (false, true) => tracing::info!("this server leads: it writes to the cluster"),
            (true, false) => match &new.failure {
                Some(error) => tracing::warn!(error, "this server leads no more"),
                None => tracing::info!("this server leads no more"),
            },
            (false, false) | (true, true) => {}
        }
        if !leads && new.holder.is_some() && new.holder != standing.holder {
            tracing::info!(holder = new.holder, "another server leads");
        }
        match (&standing.failure, &new.failure) {
            (None, Some(error)) => tracing::warn!(error, "the Lease can't be read or written"),
            (Some(_), None) => tracing::info!("the Lease can be read and written again"),
            (None, None) | (Some(_), Some(_)) => {}
        }
        *standing = new;
        drop(standing);
        self.export();
    }
}

/// One server in the election.
#[derive(Debug)]
pub(super) struct Candidate {
    leadership: Arc<Leadership>,
    election: Election,
    times: LeaseTimes,
    namespace: String,
    asker: Asker,
}

impl Candidate {
    pub(super) fn new(
        leadership: Arc<Leadership>,
        identity: String,
        times: LeaseTimes,
        namespace: String,
        source: Source,
    ) -> Self {
        Self {
            leadership,
            election: Election::new(NAME, identity, times),
            times,
            namespace,
            asker: Asker::new(source),
        }
    }

    /// Takes part for ever.
    #[expect(clippy::infinite_loop, reason = "ended by being dropped")]
    pub(super) async fn run(&mut self) -> Infallible {
        loop {
            let mut result = self.round().await;
            if matches!(result, Err(AskError::Conflict)) {
                self.publish(None);
                result = self.round().await;
            }
            if let Err(error) = &result {
                self.asker.failed(error);
            }
            self.election.lapse(Instant::now());
            let failure = result.err().map(|error| daemon::chain(&error).to_string());
            self.publish(failure);
            // Candidates that were started together don't ask together for ever.
            let pause = self.times.retry_period;
            let pause = pause + pause.mul_f64(rand::random::<f64>() / 5.0);
            let over = self
                .election
                .leads_until()
                .map(|until| until.saturating_duration_since(Instant::now()));
            sleep(over.map_or(pause, |over| over.min(pause))).await;
            if self.election.lapse(Instant::now()) {
                self.publish(Some("it was not renewed in time".to_owned()));
            }
        }
    }

    fn publish(&self, failure: Option<String>) {
        self.leadership.set(Standing {
            until: self.election.leads_until(),
            holder: self.election.holder().map(ToOwned::to_owned),
            failure,
        });
    }

    /// Reads the Lease and does what is to be done.
    async fn round(&mut self) -> Result<(), AskError> {
        let client = self.asker.client().await?;
        let leases = Api::<Lease>::namespaced(client, &self.namespace);
        let (limit, until) = (self.times.renew_deadline / 2, self.election.leads_until());
        let found = within(limit, until, leases.get_opt(NAME)).await?;
        let now = Instant::now();
        self.election.observe(found, now);
        let action = self.election.decide(now);
        let claim = self.election.claim(action, wall());
        let params = params();
        let sent = Instant::now();
        let written = match action {
            Action::Wait => return Ok(()),
            Action::StepDown => {
                self.election.lost();
                return Ok(());
            }
            Action::Create => within(limit, until, leases.create(&params, &claim)).await,
            Action::Renew | Action::TakeOver => {
                within(limit, until, leases.replace(NAME, &params, &claim)).await
            }
        };
        match written {
            Ok(lease) => {
                self.election.won(lease, sent, Instant::now());
                Ok(())
            }
            Err(error) => {
                // Deleted in between.
                let gone = matches!(error, AskError::Missing(_)) && action != Action::Create;
                if gone || matches!(error, AskError::Conflict) {
                    self.election.lost();
                    return Err(AskError::Conflict);
                }
                Err(error)
            }
        }
    }

    /// Gives the Lease away, if it is ours, so that the next one need not wait for its end.
    pub(super) async fn resign(&mut self) {
        self.election.lost();
        self.publish(None);
        match tokio::time::timeout(RESIGN, self.try_resign()).await {
            Ok(Ok(true)) => tracing::info!("the Lease was given away"),
            Ok(Ok(false)) => {}
            Ok(Err(error)) => {
                tracing::warn!(error = %daemon::chain(&error), "the Lease could not be given away");
            }
            Err(_elapsed) => tracing::warn!("the Lease could not be given away in time"),
        }
    }

    async fn try_resign(&mut self) -> Result<bool, AskError> {
        let client = self.asker.client().await?;
        let leases = Api::<Lease>::namespaced(client, &self.namespace);
        loop {
            // A renewal may have been under way.
            let found = leases.get_opt(NAME).await?;
            self.election.observe(found, Instant::now());
            let Some(away) = self.election.resign(wall()) else {
                return Ok(false);
            };
            match leases
                .replace(NAME, &params(), &away)
                .await
                .map_err(AskError::from)
            {
                Ok(_lease) => return Ok(true),
                Err(AskError::Conflict) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn params() -> PostParams {
    PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    }
}

/// The time that people see in the Lease.
fn wall() -> Timestamp {
    let seconds = certs::Clock::system().now().as_secs();
    Timestamp::from_second(i64::try_from(seconds).unwrap_or_default()).unwrap_or_default()
}
