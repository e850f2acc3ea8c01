//! Tests of an authority in a directory.

use std::time::Duration;

use super::*;
use crate::clock::from_secs;

const NOW: UnixTime = from_secs(1_800_000_000);
const DAY: Duration = Duration::from_secs(86_400);

fn domain() -> TrustDomain {
    TrustDomain::default()
}

/// Whatever the last write of a save was: what is there is the old authority or the new one, and the root that signed
/// before is trusted as long as it was to be.
fn interrupted_anywhere(from: &Ca, to: &Ca) {
    let count = CaDir::new("x").steps(to).unwrap().len();
    for written in 0..=count {
        let root = tempfile::tempdir().unwrap();
        let dir = CaDir::new(root.path().join("ca"));
        dir.save(from).unwrap();
        for step in dir.steps(to).unwrap().into_iter().take(written) {
            step.run().unwrap();
        }
        let found = dir.load(&domain()).unwrap().unwrap();
        let (is_old, is_new) = (found.pin() == from.pin(), found.pin() == to.pin());
        assert!(is_old || is_new, "{written}");
        let issuer = dir.issuer(&found, NOW).unwrap();
        let bundle = issuer.bundle().pins();
        assert!(to.bundle().unwrap().pins().iter().all(|pin| {
            // The new root is not known before it signs.
            bundle.contains(pin) || (is_old && *pin == to.pin())
        }));
        // And what was begun can be done.
        dir.save(to).unwrap();
        assert_eq!(dir.load(&domain()).unwrap().unwrap(), *to, "{written}");
    }
}

#[test]
fn a_crash_leaves_the_old_authority_or_the_new_one() {
    let old = Ca::create(&domain(), NOW).unwrap();
    let new = old.rotate(DAY, NOW).unwrap();
    interrupted_anywhere(&old, &new);
    interrupted_anywhere(&new, &new.retire());
    interrupted_anywhere(&old, &old.certifying_client_until(NOW));
}

#[test]
fn changes_of_many_processes_come_one_after_the_other() {
    let root = tempfile::tempdir().unwrap();
    let dir = CaDir::new(root.path().join("ca"));
    assert!(dir.load(&domain()).unwrap().is_none());
    assert!(!dir.path().exists(), "looking makes nothing");
    let update = |dir: &CaDir| dir.update(&domain(), |ca| ca.rotate(DAY, NOW));
    assert!(matches!(update(&dir), Err(IssuerError::Missing(_))));
    dir.load_or_create(&domain(), NOW).unwrap();
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| update(&dir))).collect();
        let end = |thread: std::thread::ScopedJoinHandle<'_, _>| thread.join().unwrap();
        threads.into_iter().map(end).collect()
    });
    let rotated: Vec<_> = outcomes.iter().flatten().collect();
    assert_eq!(rotated.len(), 1, "one rotation at a time");
    assert_eq!(dir.load(&domain()).unwrap().unwrap(), *rotated[0]);
}

#[test]
fn an_authority_is_set_aside_and_not_lost() {
    let root = tempfile::tempdir().unwrap();
    let dir = CaDir::new(root.path().join("ca"));
    let ca = dir.load_or_create(&domain(), NOW).unwrap();
    let aside = dir.set_aside("abc").unwrap();
    assert!(dir.load(&domain()).unwrap().is_none());
    let kept = CaDir::new(aside).load(&domain()).unwrap().unwrap();
    assert_eq!(kept, ca);
    // Back again, and away again.
    dir.save(&ca).unwrap();
    let again = dir.set_aside("abc").unwrap();
    let kept = CaDir::new(again).load(&domain()).unwrap().unwrap();
    assert_eq!(kept, ca);
}

#[test]
fn a_copy_is_read_and_never_changed() {
    let root = tempfile::tempdir().unwrap();
    let dir = CaDir::new(root.path().join("ca"));
    let ca = Ca::create(&domain(), NOW).unwrap();
    dir.save_copy(&ca, "Secret corvid/corvid-ca").unwrap();
    assert_eq!(dir.load(&domain()).unwrap().unwrap(), ca);
    assert_eq!(dir.load_or_create(&domain(), NOW).unwrap(), ca);
    let refused = dir.update(&domain(), |ca| ca.rotate(DAY, NOW)).unwrap_err();
    assert!(
        refused.to_string().contains("corvid/corvid-ca"),
        "{refused}"
    );
    let next = ca.rotate(DAY, NOW).unwrap();
    dir.save_copy(&next, "Secret corvid/corvid-ca").unwrap();
    assert_eq!(dir.load(&domain()).unwrap().unwrap(), next);
}
