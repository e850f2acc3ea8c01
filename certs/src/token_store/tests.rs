//! Tests of the token store.

use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::clock::from_secs;
use crate::credential::Key;
use crate::csr::Csr;

const NOW: UnixTime = from_secs(1_800_000_000);
const HOUR: Duration = Duration::from_secs(3600);

fn later(seconds: u64) -> UnixTime {
    from_secs(NOW.as_secs() + seconds)
}

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn key() -> KeyDigest {
    Csr::of_own_key(&Key::generate().unwrap()).key_digest()
}

fn token(store: &Store, uses: u32, agents: &str) -> JoinToken {
    let new = NewToken {
        ttl: HOUR,
        uses,
        agents: agents.parse().unwrap(),
    };
    store.create_token(&new, NOW).unwrap()
}

fn fresh() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    (dir, store)
}

#[test]
fn a_token_is_good_for_its_uses_and_no_more() {
    let (_dir, store) = fresh();
    let token = token(&store, 2, "*");
    store.redeem(&token, &name("edge1"), &key(), NOW).unwrap();
    store.redeem(&token, &name("edge2"), &key(), NOW).unwrap();
    let third = store.redeem(&token, &name("edge3"), &key(), NOW);
    assert!(matches!(third, Err(RedeemError::UsedUp)));
    let listed = store.list_tokens().unwrap();
    assert_eq!(listed[0].uses_left, 0);
    assert_eq!(listed[0].used_by, [name("edge1"), name("edge2")]);
}

#[test]
fn the_same_agent_with_the_same_key_is_counted_once() {
    let (_dir, store) = fresh();
    let token = token(&store, 1, "*");
    let key1 = key();
    store.redeem(&token, &name("edge1"), &key1, NOW).unwrap();
    store.redeem(&token, &name("edge1"), &key1, NOW).unwrap();
    let other_key = store.redeem(&token, &name("edge1"), &key(), NOW);
    assert!(matches!(other_key, Err(RedeemError::UsedUp)));
    let other_name = store.redeem(&token, &name("edge2"), &key1, NOW);
    assert!(matches!(other_name, Err(RedeemError::UsedUp)));
    let too_late = store.redeem(&token, &name("edge1"), &key1, later(3600));
    assert!(matches!(too_late, Err(RedeemError::Expired)));
}

#[test]
fn wrong_tokens_are_refused_each_for_its_reason() {
    let (_dir, store) = fresh();
    let token = token(&store, 9, "edge-*");
    let try_with =
        |token: &JoinToken, agent: &str, now| store.redeem(token, &name(agent), &key(), now);
    let unknown = JoinToken::generate().unwrap();
    assert!(matches!(
        try_with(&unknown, "edge-1", NOW),
        Err(RedeemError::UnknownToken)
    ));
    let wrong = format!("{}.{}", token.id(), "a".repeat(32))
        .parse()
        .unwrap();
    assert!(matches!(
        try_with(&wrong, "edge-1", NOW),
        Err(RedeemError::WrongSecret)
    ));
    assert!(matches!(
        try_with(&token, "edge-1", later(3600)),
        Err(RedeemError::Expired)
    ));
    assert!(matches!(
        try_with(&token, "other", NOW),
        Err(RedeemError::NameNotAllowed)
    ));
    assert!(matches!(
        try_with(&token, "edge-1.shop.svc.cluster.local", NOW),
        Err(RedeemError::NameNotAllowed)
    ));
    store.revoke_agent(&name("edge-1"), NOW).unwrap();
    assert!(matches!(
        try_with(&token, "edge-1", NOW),
        Err(RedeemError::Revoked)
    ));
    assert_eq!(store.list_tokens().unwrap()[0].uses_left, 9);
    try_with(&token, "edge-2", later(3599)).unwrap();
}

#[test]
fn of_many_at_once_exactly_one_wins_a_token_of_one_use() {
    let (dir, store) = fresh();
    let token = token(&store, 1, "*");
    let other_process = Store::open(dir.path()).unwrap();
    let won: usize = std::thread::scope(|scope| {
        let attempts: Vec<_> = (0..16)
            .map(|index| {
                let store = if index % 2 == 0 {
                    &store
                } else {
                    &other_process
                };
                let token = &token;
                scope.spawn(move || {
                    store
                        .redeem(token, &name(&format!("edge{index}")), &key(), NOW)
                        .is_ok()
                })
            })
            .collect();
        attempts
            .into_iter()
            .map(|thread| usize::from(thread.join().unwrap()))
            .sum()
    });
    assert_eq!(won, 1);
}

#[test]
fn a_revoked_token_is_unknown() {
    let (_dir, store) = fresh();
    let token = token(&store, 1, "*");
    assert!(store.revoke_token(token.id()).unwrap());
    assert!(!store.revoke_token(token.id()).unwrap());
    let refused = store.redeem(&token, &name("edge1"), &key(), NOW);
    assert!(matches!(refused, Err(RedeemError::UnknownToken)));
}

#[test]
fn expired_tokens_are_forgotten_a_week_later() {
    let (_dir, store) = fresh();
    let old = token(&store, 1, "*");
    let new = NewToken {
        ttl: HOUR,
        uses: 1,
        agents: AgentPattern::any(),
    };
    store.create_token(&new, later(7 * 86_400)).unwrap();
    assert!(
        store
            .list_tokens()
            .unwrap()
            .iter()
            .any(|entry| entry.id == old.id())
    );
    store.create_token(&new, later(7 * 86_400 + 3600)).unwrap();
    assert!(
        !store
            .list_tokens()
            .unwrap()
            .iter()
            .any(|entry| entry.id == old.id())
    );
}

#[test]
fn agents_are_revoked_and_allowed_again_also_seen_by_another_process() {
    let (dir, store) = fresh();
    let other_process = Store::open(dir.path()).unwrap();
    let edge1 = name("edge1");
    store.record_agent(&edge1, later(86_400), NOW).unwrap();
    store
        .record_agent(&edge1, later(2 * 86_400), later(60))
        .unwrap();
    assert!(store.revoke_agent(&edge1, NOW).unwrap());
    assert!(!store.revoke_agent(&name("edge2"), NOW).unwrap());
    assert!(other_process.is_revoked(&edge1).unwrap());
    let snapshot = other_process.snapshot().unwrap();
    assert_eq!(
        snapshot.revoked,
        HashSet::from([edge1.clone(), name("edge2")])
    );
    let known = AgentEntry {
        enrolled_at: NOW.as_secs(),
        not_after: later(2 * 86_400).as_secs(),
    };
    assert_eq!(snapshot.agents, BTreeMap::from([(edge1.clone(), known)]));
    assert!(other_process.allow_agent(&edge1).unwrap());
    assert!(!store.is_revoked(&edge1).unwrap());
    assert!(!store.allow_agent(&edge1).unwrap());
}

#[test]
fn the_file_is_0600_and_has_no_secret() {
    let (_dir, store) = fresh();
    let token = token(&store, 1, "*");
    let text = std::fs::read_to_string(store.path()).unwrap();
    let exposed = secrecy::ExposeSecret::expose_secret(&token.expose()).to_owned();
    let (_, secret) = exposed.split_once('.').unwrap();
    assert!(text.contains(token.id()) && !text.contains(secret));
    let mode = std::fs::metadata(store.path())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_damaged_or_newer_file_is_an_error_and_stays_as_it_is() {
    let (dir, store) = fresh();
    for text in [
        "",
        "{",
        "[]",
        r#"{"version":2}"#,
        r#"{"version":1,"tokens":[{}]}"#,
    ] {
        std::fs::write(store.path(), text).unwrap();
        assert!(Store::open(dir.path()).is_err(), "{text}");
        assert!(store.revoke_agent(&name("edge1"), NOW).is_err(), "{text}");
        assert_eq!(std::fs::read_to_string(store.path()).unwrap(), text);
    }
}

#[test]
fn senseless_tokens_are_not_made() {
    let (_dir, store) = fresh();
    let new = |ttl, uses| NewToken {
        ttl,
        uses,
        agents: AgentPattern::any(),
    };
    let made = |new| store.create_token(&new, NOW);
    assert!(matches!(made(new(HOUR, 0)), Err(TokenStoreError::Uses)));
    assert!(matches!(
        made(new(HOUR, MAX_USES + 1)),
        Err(TokenStoreError::Uses)
    ));
    assert!(matches!(
        made(new(Duration::ZERO, 1)),
        Err(TokenStoreError::Ttl)
    ));
}
