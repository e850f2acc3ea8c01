//! Who leads, decided from a Lease as it was read. Pure: the time is an argument, nothing is asked.
//!
//! | the Lease | action |
//! | --- | --- |
//! | there is none, and none was seen that may still be good | create |
//! | names us | renew |
//! | names nobody, or did not change for as long as it says since we first saw it so | take over |
//! | names another | wait; step down if we led |
//!
//! Expiry is a matter of our own monotonic clock: how long *we* have seen no change. Times within a Lease are for people.
//! Whoever leads does so until `renewDeadline` after it *sent* its last write that succeeded, which is before anybody can have
//! seen that write; others wait for `duration`. So clocks may run apart by a third, whatever they show, before two lead.
//! Every write names the version that it replaces: of two that are sent at once, one is refused.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::ObjectMeta;
use tokio::time::Instant;

use crate::config::LeaseTimes;

/// What is to be done about a Lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Create,
    Renew,
    TakeOver,
    Wait,
    StepDown,
}

/// What one candidate knows.
#[derive(Debug)]
pub(super) struct Election {
    name: &'static str,
    identity: String,
    times: LeaseTimes,
    observed: Option<Observed>,
    leads_until: Option<Instant>,
}

#[derive(Debug)]
struct Observed {
    lease: Lease,
    /// When it was first seen like this.
    since: Instant,
    /// It is not there any more. Who deletes a Lease does not tell its holder, so it counts until it expires.
    gone: bool,
}

impl Observed {
    fn holder(&self) -> Option<&str> {
        let holder = self.lease.spec.as_ref()?.holder_identity.as_deref();
        holder.filter(|holder| !holder.is_empty())
    }

    fn is_expired(&self, now: Instant, default: Duration) -> bool {
        let spec = self.lease.spec.as_ref();
        let seconds = spec.and_then(|spec| spec.lease_duration_seconds);
        let duration = seconds.map_or(default, |seconds| {
            Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
        });
        now.saturating_duration_since(self.since) >= duration
    }
}

impl Election {
    pub(super) const fn new(name: &'static str, identity: String, times: LeaseTimes) -> Self {
        Self {
            name,
            identity,
            times,
            observed: None,
            leads_until: None,
        }
    }

    /// Until when this candidate leads, if nothing else comes about.
    pub(super) const fn leads_until(&self) -> Option<Instant> {
        self.leads_until
    }

    /// Who holds the Lease, as far as is known.
    pub(super) fn holder(&self) -> Option<&str> {
        let observed = self.observed.as_ref().filter(|observed| !observed.gone)?;
        observed.holder()
    }

    /// The Lease was read.
    pub(super) fn observe(&mut self, found: Option<Lease>, now: Instant) {
        let Some(lease) = found else {
            if let Some(observed) = &mut self.observed {
                observed.gone = true;
            }
            return;
        };
        let version = |lease: &Lease| lease.metadata.resource_version.clone();
        let same = |observed: &Observed| {
            !observed.gone
                && version(&lease).is_some()
                && version(&observed.lease) == version(&lease)
        };
        if !self.observed.as_ref().is_some_and(same) {
            self.observed = Some(Observed {
                lease,
                since: now,
                gone: false,
            });
        }
    }

    /// What is to be done now.
    pub(super) fn decide(&self, now: Instant) -> Action {
        let Some(observed) = &self.observed else {
            return Action::Create;
        };
        let (ours, free) = match observed.holder() {
            Some(holder) => (
                holder == self.identity,
                observed.is_expired(now, self.times.duration),
            ),
            None => (false, true),
        };
        match (observed.gone, ours, free) {
            (true, true, _) | (true, false, true) => Action::Create,
            (false, true, _) => Action::Renew,
            (false, false, true) => Action::TakeOver,
            (_, false, false) if self.leads_until.is_some() => Action::StepDown,
            (_, false, false) => Action::Wait,
        }
    }

    /// The Lease as this candidate writes it, over what it has observed. `wall` is for people.
    pub(super) fn claim(&self, action: Action, wall: Timestamp) -> Lease {
        let mut lease = self.base();
        let spec = lease.spec.get_or_insert_default();
        let wall = Self::touch(spec, wall);
        if action != Action::Renew {
            spec.acquire_time = Some(wall);
        }
        let transitions = spec.lease_transitions.unwrap_or_default();
        spec.lease_transitions = Some(match action {
            Action::TakeOver => transitions.saturating_add(1),
            Action::Create | Action::Renew | Action::Wait | Action::StepDown => transitions,
        });
        spec.holder_identity = Some(self.identity.clone());
        let seconds = self.times.duration.as_secs();
        spec.lease_duration_seconds = Some(i32::try_from(seconds).unwrap_or(i32::MAX));
        lease
    }

    /// The Lease as this candidate gives it away; `None` if it is not ours.
    pub(super) fn resign(&self, wall: Timestamp) -> Option<Lease> {
        if self.holder() != Some(&self.identity) {
            return None;
        }
        let mut lease = self.base();
        let spec = lease.spec.get_or_insert_default();
        Self::touch(spec, wall);
        spec.holder_identity = None;
        // None is not allowed to be 0; whom it names is what counts.
        spec.lease_duration_seconds = Some(1);
        Some(lease)
    }

    fn base(&self) -> Lease {
        let observed = self.observed.as_ref().filter(|observed| !observed.gone);
        observed.map_or_else(
            || Lease {
                metadata: ObjectMeta {
                    name: Some(self.name.to_owned()),
                    ..ObjectMeta::default()
                },
                spec: None,
            },
            |observed| observed.lease.clone(),
        )
    }

    /// A write that changes nothing makes no new version, and nobody would see that it happened: each has a time of its own.
    fn touch(spec: &mut LeaseSpec, wall: Timestamp) -> MicroTime {
        let mut time = MicroTime(wall);
        if spec.renew_time.as_ref() == Some(&time) {
            let later = wall.checked_add(Duration::from_micros(1));
            time = MicroTime(later.unwrap_or(Timestamp::UNIX_EPOCH));
        }
        spec.renew_time = Some(time.clone());
        time
    }

    /// Our claim, sent at `sent`, was accepted.
    pub(super) fn won(&mut self, written: Lease, sent: Instant, now: Instant) {
        self.observe(Some(written), now);
        self.leads_until = Some(sent + self.times.renew_deadline);
    }

    /// Somebody else wrote in between, or leads.
    pub(super) const fn lost(&mut self) {
        self.leads_until = None;
    }

    /// Ends a leadership that was not renewed in time; whether that was so.
    pub(super) fn lapse(&mut self, now: Instant) -> bool {
        let over = self.leads_until.is_some_and(|until| until <= now);
        if over {
            self.lost();
        }
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn lease(version: &str, holder: Option<&str>, seconds: Option<i32>) -> Lease {
        Lease {
            metadata: ObjectMeta {
                name: Some("l".to_owned()),
                resource_version: Some(version.to_owned()),
                annotations: Some([("a".to_owned(), "b".to_owned())].into()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: holder.map(ToOwned::to_owned),
                lease_duration_seconds: seconds,
                lease_transitions: Some(4),
                // However wrong the other's clock is, it counts for nothing.
                renew_time: Some(MicroTime(Timestamp::from_second(1).unwrap())),
                ..LeaseSpec::default()
            }),
        }
    }

    fn election() -> Election {
        Election::new("l", "me".to_owned(), LeaseTimes::default())
    }

    #[test]
    fn each_lease_has_its_action() {
        let now = Instant::now();
        for (found, after, wanted) in [
            (None, 0, Action::Create),
            (Some(lease("1", Some("me"), Some(15))), 0, Action::Renew),
            (Some(lease("1", Some("me"), Some(15))), 99, Action::Renew),
            (Some(lease("1", None, Some(15))), 0, Action::TakeOver),
            (Some(lease("1", Some(""), Some(15))), 0, Action::TakeOver),
            (Some(lease("1", Some("other"), Some(15))), 0, Action::Wait),
            (Some(lease("1", Some("other"), Some(15))), 14, Action::Wait),
            (
                Some(lease("1", Some("other"), Some(15))),
                15,
                Action::TakeOver,
            ),
            // As long as the holder says, not as long as we would.
            (Some(lease("1", Some("other"), Some(60))), 59, Action::Wait),
            (
                Some(lease("1", Some("other"), Some(3))),
                3,
                Action::TakeOver,
            ),
            (Some(lease("1", Some("other"), None)), 14, Action::Wait),
            (Some(lease("1", Some("other"), None)), 15, Action::TakeOver),
            (
                Some(lease("1", Some("other"), Some(-5))),
                0,
                Action::TakeOver,
            ),
            (Some(Lease::default()), 0, Action::TakeOver),
        ] {
            let mut election = election();
            let case = format!("{found:?} after {after} s");
            election.observe(found.clone(), now);
            // Seen again, unchanged.
            election.observe(found, now + SECOND * after / 2);
            assert_eq!(election.decide(now + SECOND * after), wanted, "{case}");
        }
    }

    #[test]
    fn a_renewal_is_seen_and_begins_the_wait_anew() {
        let (mut election, now) = (election(), Instant::now());
        election.observe(Some(lease("1", Some("other"), Some(15))), now);
        election.observe(Some(lease("2", Some("other"), Some(15))), now + SECOND * 14);
        assert_eq!(election.decide(now + SECOND * 28), Action::Wait);
        assert_eq!(election.decide(now + SECOND * 29), Action::TakeOver);
    }

    #[test]
    fn a_leader_steps_down_for_another_and_when_it_can_not_renew() {
        let (mut election, now) = (election(), Instant::now());
        assert_eq!(election.decide(now), Action::Create);
        let claim = election.claim(Action::Create, Timestamp::UNIX_EPOCH);
        election.won(claim, now, now + SECOND);
        assert_eq!(
            election.leads_until(),
            Some(now + SECOND * 10),
            "as of when it was sent"
        );
        assert!(!election.lapse(now + SECOND * 9));
        assert!(election.lapse(now + SECOND * 10));
        assert_eq!(election.leads_until(), None);
        // It is ours still, by name: nobody took it over, so we may go on.
        assert_eq!(election.decide(now + SECOND * 11), Action::Renew);
        let claim = election.claim(Action::Renew, Timestamp::UNIX_EPOCH);
        election.won(claim, now + SECOND * 11, now + SECOND * 11);
        election.observe(Some(lease("9", Some("other"), Some(15))), now + SECOND * 12);
        assert_eq!(election.decide(now + SECOND * 12), Action::StepDown);
        election.lost();
        assert_eq!(election.decide(now + SECOND * 12), Action::Wait);
    }

    #[test]
    fn a_deleted_lease_counts_until_it_expires_except_for_its_holder() {
        let (mut election, now) = (election(), Instant::now());
        election.observe(Some(lease("1", Some("other"), Some(15))), now);
        election.observe(None, now + SECOND);
        assert_eq!(election.holder(), None);
        assert_eq!(election.decide(now + SECOND * 14), Action::Wait);
        assert_eq!(election.decide(now + SECOND * 15), Action::Create);
        assert_eq!(
            election
                .claim(Action::Create, Timestamp::UNIX_EPOCH)
                .metadata
                .resource_version,
            None
        );
        election.observe(Some(lease("5", Some("me"), Some(15))), now);
        election.observe(None, now);
        assert_eq!(election.decide(now), Action::Create);
    }

    #[test]
    fn a_claim_replaces_what_was_observed_and_keeps_the_rest() {
        let (mut election, now) = (election(), Instant::now());
        let wall = Timestamp::from_second(1).unwrap();
        election.observe(Some(lease("7", Some("other"), Some(3))), now);
        let claim = election.claim(Action::TakeOver, wall);
        assert_eq!(claim.metadata.resource_version.as_deref(), Some("7"));
        assert_eq!(
            claim.metadata.annotations,
            lease("7", None, None).metadata.annotations
        );
        let spec = claim.spec.clone().unwrap();
        assert_eq!(spec.holder_identity.as_deref(), Some("me"));
        assert_eq!(
            (spec.lease_duration_seconds, spec.lease_transitions),
            (Some(15), Some(5))
        );
        assert_eq!(spec.acquire_time, spec.renew_time);
        // The wall clock stands still: the renewal is another text all the same.
        let mut claim = claim;
        for version in ["8", "9"] {
            claim.metadata.resource_version = Some(version.to_owned());
            let before = claim.spec.clone().unwrap();
            election.won(claim, now, now);
            claim = election.claim(Action::Renew, wall);
            let after = claim.spec.clone().unwrap();
            assert_ne!(before.renew_time, after.renew_time);
            assert_eq!(before.acquire_time, after.acquire_time);
            assert_eq!(after.lease_transitions, Some(5));
        }
        let away = election.resign(wall).unwrap();
        assert_eq!(away.metadata.resource_version.as_deref(), Some("9"));
        assert_eq!(away.spec.unwrap().holder_identity, None);
        election.observe(Some(lease("10", Some("other"), Some(15))), now);
        assert_eq!(election.resign(wall), None);
    }
}
