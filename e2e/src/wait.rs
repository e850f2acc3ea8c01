//! Waiting for a condition.
//!
//! [`poll`] is the only polling loop of the harness, and [`pass`] the only place that lets time go by on purpose.
//! Scenarios wait for what they need to see; they never sleep in the hope that it has happened.

use std::fmt::Debug;
use std::time::Duration;

use anyhow::bail;
use tokio::time::Instant;

/// Time between two looks: short beside all deadlines, long beside what one look costs.
const EVERY: Duration = Duration::from_millis(20);

/// Looks until `probe` answers `Ok`.
///
/// # Panics
/// At the deadline, with `what` and the last error of `probe`.
#[track_caller]
#[expect(clippy::panic, reason = "this is an assertion of a test")]
pub fn eventually<T, E: Debug>(
    deadline: Duration,
    what: &str,
    probe: impl FnMut() -> Result<T, E>,
) -> T {
    match poll(deadline, what, probe) {
        Ok(value) => value,
        Err(error) => panic!("{error}"),
    }
}

/// [`eventually`] for harness code, which reports and does not panic.
///
/// # Errors
/// At the deadline, with `what` and the last error of `probe`.
pub fn poll<T, E: Debug>(
    deadline: Duration,
    what: &str,
    mut probe: impl FnMut() -> Result<T, E>,
) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        let last = match probe() {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if start.elapsed() >= deadline {
            bail!("not within {deadline:?}: {what}; last seen: {last:?}");
        }
        rest(EVERY);
    }
}

/// Lets a span pass that is the scenario itself, such as a line that stays cut for 5 s, and never stands for a condition.
pub fn pass(span: Duration) {
    rest(span);
}

#[expect(
    clippy::disallowed_methods,
    reason = "a test thread may block, nothing else runs on it"
)]
fn rest(span: Duration) {
    std::thread::sleep(span);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_that_never_holds_is_reported_with_its_last_value() {
        let mut looks = 0;
        let seen = poll::<(), _>(Duration::from_millis(50), "three sheep", || {
            looks += 1;
            Err(looks)
        })
        .unwrap_err()
        .to_string();
        assert!(
            seen.contains("three sheep") && seen.ends_with(&looks.to_string()),
            "{seen}"
        );
    }
}
