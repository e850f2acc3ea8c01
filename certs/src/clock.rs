//! The time that certificates are checked against.
//!
//! Edges boot with wrong clocks, and often without any: certificates are therefore checked against the
//! *later* of the system's clock and the last server time that was told over an authenticated session.
//! A told time is believed only within the life of the server leaf that vouches for it, so that no
//! server can push an agent to where it trusts no server any more.
//!
//! The only place of this crate that asks the system for the time.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustls::time_provider::TimeProvider;
use rustls_pki_types::UnixTime;
use tokio::time::Instant;

use crate::store;
use crate::verify::Peer;

/// 2026-01-01T00:00:00Z, seconds since 1970: no host that runs this software lives before it.
///
/// A board without a battery boots in 1970 or at the date of its firmware; starting here saves it the
/// refusal of certificates that look centuries away.
const EARLIEST: u64 = 1_767_225_600;

/// Told times are written to the file only when they moved by this much: flash of edges wears out.
const PERSIST_STEP: Duration = Duration::from_secs(60 * 60);

/// A source of wall-clock time; clones share it.
#[derive(Debug, Clone)]
pub struct Clock {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    source: Source,
    file: Option<PathBuf>,
    told: Mutex<Told>,
}

#[derive(Debug)]
enum Source {
    System,
    Fixed(Mutex<UnixTime>),
}

#[derive(Debug, Default)]
struct Told {
    /// Server time and when it was told; the time since is added.
    last: Option<(UnixTime, Instant)>,
    persisted: u64,
    skew_seconds: i64,
}

impl Clock {
    /// The system's clock, raised by what servers tell; nothing is kept on disk.
    #[must_use]
    pub fn system() -> Self {
        Self::new(Source::System, None)
    }

    /// As [`Clock::system`], but the last told time survives a restart in `file` (best effort: a clock
    /// that can't be written or read is only a clock that starts earlier).
    #[must_use]
    pub fn with_file(file: impl Into<PathBuf>) -> Self {
        let file = file.into();
        let told = read_told(&file);
        let clock = Self::new(Source::System, Some(file));
        if let Some(told) = told {
            let mut state = clock.shared.told.lock();
            state.persisted = told.as_secs();
            state.last = Some((told, Instant::now()));
        }
        clock
    }

    /// A clock that stands still until it is [set](Clock::set); for tests.
    #[must_use]
    pub fn fixed(now: UnixTime) -> Self {
        Self::new(Source::Fixed(Mutex::new(now)), None)
    }

    fn new(source: Source, file: Option<PathBuf>) -> Self {
        Self {
            shared: Arc::new(Shared {
                source,
                file,
                told: Mutex::default(),
            }),
        }
    }

    /// Moves a [fixed](Clock::fixed) clock; any other ignores it.
    pub fn set(&self, now: UnixTime) {
        match &self.shared.source {
            Source::System => {}
            Source::Fixed(time) => *time.lock() = now,
        }
    }

    /// The later of the own clock and the last told server time (plus what passed since).
    #[must_use]
    pub fn now(&self) -> UnixTime {
        let told = self
            .shared
            .told
            .lock()
            .last
            .map_or(0, |(told, at)| match &self.shared.source {
                Source::System => told.as_secs().saturating_add(at.elapsed().as_secs()),
                Source::Fixed(_) => told.as_secs(),
            });
        from_secs(self.own().as_secs().max(told).max(EARLIEST))
    }

    /// Takes note of the time that a server told over a session whose leaf is `server`; returns the skew,
    /// server minus own clock, in seconds.
    ///
    /// The time is believed only if it lies within the life of that leaf; the skew is returned anyway.
    pub fn observe(&self, server_time: UnixTime, server: &Peer) -> i64 {
        let skew = signed_difference(server_time.as_secs(), self.own().as_secs());
        let life = server.not_before.as_secs()..=server.not_after.as_secs();
        let persist = {
            let mut told = self.shared.told.lock();
            told.skew_seconds = skew;
            if !life.contains(&server_time.as_secs()) {
                tracing::warn!(
                    server = %server.identity.name,
                    skew_seconds = skew,
                    "server told a time outside of its own certificate's life; not believed"
                );
                return skew;
            }
            told.last = Some((server_time, Instant::now()));
            let moved = told.persisted.abs_diff(server_time.as_secs());
            let due = self.shared.file.is_some() && moved >= PERSIST_STEP.as_secs();
            if due {
                told.persisted = server_time.as_secs();
            }
            due
        };
        if let (true, Some(file)) = (persist, &self.shared.file) {
            let text = format!("{}\n", server_time.as_secs());
            if let Err(error) = store::write_unsynced(file, text.as_bytes(), store::MODE_PUBLIC) {
                tracing::debug!(%error, "could not keep the server's time");
            }
        }
        skew
    }

    /// The last skew seen, server minus own clock, in seconds; 0 before the first.
    #[must_use]
    pub fn skew_seconds(&self) -> i64 {
        self.shared.told.lock().skew_seconds
    }

    fn own(&self) -> UnixTime {
        match &self.shared.source {
            Source::System => system_now(),
            Source::Fixed(time) => *time.lock(),
        }
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(self.now())
    }
}

/// `secs` since 1970.
pub(crate) const fn from_secs(secs: u64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(secs))
}

#[expect(
    clippy::disallowed_methods,
    reason = "the one place that asks the system for the time"
)]
fn system_now() -> UnixTime {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    UnixTime::since_unix_epoch(since.unwrap_or_default())
}

fn signed_difference(a: u64, b: u64) -> i64 {
    let distance = i64::try_from(a.abs_diff(b)).unwrap_or(i64::MAX);
    if a >= b { distance } else { -distance }
}

fn read_told(file: &Path) -> Option<UnixTime> {
    let text = std::fs::read_to_string(file).ok()?;
    text.trim().parse().ok().map(from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Identity;

    const NOW: u64 = 1_800_000_000;

    fn server(not_before: u64, not_after: u64) -> Peer {
        Peer {
            identity: Identity::parse("spiffe://corvid/server/s").unwrap(),
            node_uid: None,
            not_before: from_secs(not_before),
            not_after: from_secs(not_after),
            fingerprint: String::new(),
        }
    }

    #[test]
    fn the_later_of_both_clocks_counts() {
        let clock = Clock::fixed(from_secs(NOW - 5_000));
        assert_eq!(
            clock.observe(from_secs(NOW), &server(NOW - 10, NOW + 10)),
            5_000
        );
        assert_eq!(clock.now().as_secs(), NOW);
        clock.set(from_secs(NOW + 7));
        assert_eq!(clock.now().as_secs(), NOW + 7);
        assert_eq!(
            clock.observe(from_secs(NOW), &server(NOW - 10, NOW + 10)),
            -7
        );
        assert_eq!(clock.skew_seconds(), -7);
    }

    #[test]
    fn a_time_outside_the_life_of_the_servers_leaf_is_not_believed() {
        let clock = Clock::fixed(from_secs(NOW));
        assert_eq!(
            clock.observe(from_secs(NOW + 11), &server(NOW - 10, NOW + 10)),
            11
        );
        assert_eq!(clock.now().as_secs(), NOW);
    }

    #[test]
    fn a_board_that_boots_in_1970_starts_at_a_sane_year() {
        assert_eq!(Clock::fixed(from_secs(0)).now().as_secs(), EARLIEST);
    }

    #[test]
    fn the_told_time_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("clock");
        let first = Clock::with_file(&file);
        let later = first.now().as_secs() + 1_000_000;
        first.observe(from_secs(later), &server(0, u64::MAX));
        assert!(Clock::with_file(&file).now().as_secs() >= later);
    }

    #[test]
    fn a_clock_file_of_garbage_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("clock");
        std::fs::write(&file, "next week").unwrap();
        assert!(Clock::with_file(&file).now().as_secs() >= EARLIEST);
    }

    #[test]
    fn a_clock_that_cannot_be_kept_still_runs() {
        let clock = Clock::with_file("/proc/none/clock");
        let later = clock.now().as_secs() + 1_000_000;
        clock.observe(from_secs(later), &server(0, u64::MAX));
        assert!(clock.now().as_secs() >= later);
    }
}
