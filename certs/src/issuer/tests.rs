//! Tests of the authority.

use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::x509::Facts;

const NOW: UnixTime = from_secs(1_800_000_000);

fn authority(dir: &Path) -> Issuer {
    Issuer::load_or_create(dir, &TrustDomain::default(), NOW).unwrap()
}

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

#[test]
fn the_root_is_made_once_and_its_key_is_0600() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("ca");
    let first = authority(&dir);
    assert_eq!(authority(&dir).pin(), first.pin());
    assert_eq!(first.bundle().pins(), [first.pin()]);
    let mode = |file: &str| {
        std::fs::metadata(dir.join(file))
            .unwrap()
            .permissions()
            .mode()
    };
    assert_eq!(mode("ca.key") & 0o777, 0o600);
    assert_eq!(mode("") & 0o777, 0o700);
    assert_eq!(
        first.not_after().as_secs(),
        NOW.as_secs() + ROOT_LIFE.as_secs()
    );
}

#[test]
fn a_secret_is_the_same_for_all_who_have_the_key_and_another_for_each_purpose() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, again) = (authority(dir.path()), authority(dir.path()));
    let secret = first.secret_for("a");
    assert_eq!(secret, again.secret_for("a"));
    assert_ne!(secret, first.secret_for("b"));
    assert_ne!(secret, authority(other.path()).secret_for("a"));
    assert_ne!(secret, [0; 32]);
}

#[test]
fn processes_that_start_at_once_make_one_root() {
    let dir = tempfile::tempdir().unwrap();
    let pins: Vec<Pin> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| authority(dir.path()).pin()))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert!(pins.iter().all(|pin| *pin == pins[0]));
}

#[test]
fn a_root_without_its_key_is_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    authority(dir.path());
    std::fs::remove_file(dir.path().join("ca.key")).unwrap();
    let load = || Issuer::load_or_create(dir.path(), &TrustDomain::default(), NOW);
    assert!(matches!(load(), Err(IssuerError::KeyMissing(_))));
    Key::load_or_create(&dir.path().join("ca.key")).unwrap();
    assert!(matches!(load(), Err(IssuerError::KeyMismatch)));
}

#[test]
fn a_key_that_a_crash_left_without_certificate_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let pin = authority(dir.path()).pin();
    std::fs::remove_file(dir.path().join("ca.crt")).unwrap();
    assert_eq!(authority(dir.path()).pin(), pin);
}

#[test]
fn an_expired_root_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let end = authority(dir.path()).not_after();
    let late = Issuer::load_or_create(dir.path(), &TrustDomain::default(), end);
    assert!(matches!(late, Err(IssuerError::Expired)));
}

#[test]
fn old_roots_stay_trusted() {
    let (dir, before) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let old = authority(before.path());
    std::fs::create_dir(dir.path().join("old")).unwrap();
    old.bundle().save(&dir.path().join("old/2025.crt")).unwrap();
    std::fs::write(dir.path().join("old/README"), "not a root").unwrap();
    let new = authority(dir.path());
    assert_eq!(new.bundle().pins(), [new.pin(), old.pin()]);
}

#[test]
fn the_role_decides_life_and_usage() {
    let dir = tempfile::tempdir().unwrap();
    let issuer = authority(dir.path());
    let key = Key::generate().unwrap();
    let csr = Csr::check(&Csr::make(&key).unwrap()).unwrap();
    let agent = issuer.sign_agent(&name("edge1"), None, &csr, NOW).unwrap();
    let server = issuer
        .issue_server(&name("s1"), &ServerSans::default(), NOW)
        .unwrap();
    let client = issuer
        .issue_client(&name("kube"), CLIENT_DAYS, NOW)
        .unwrap();
    let life = |not_after: UnixTime| not_after.as_secs() - NOW.as_secs();
    assert_eq!(life(agent.not_after), 86_400);
    assert_eq!(life(server.not_after()), 90 * 86_400);
    assert_eq!(life(client.not_after()), 365 * 86_400);
    assert_eq!(server.not_before().as_secs(), NOW.as_secs() - 300);

    let usage = |der: &[u8]| {
        let (_, certificate) = x509_parser::parse_x509_certificate(der).unwrap();
        assert!(!certificate.is_ca());
        let usage = certificate.extended_key_usage().unwrap().unwrap().value;
        (usage.server_auth, usage.client_auth)
    };
    assert_eq!(usage(&agent.chain[0]), (false, true));
    assert_eq!(usage(&server.chain()[0]), (true, true));
    assert_eq!(usage(&client.chain()[0]), (false, true));
    assert_eq!(
        Facts::read(&agent.chain[0]).unwrap().public_key,
        key.public_key()
    );
}

#[test]
fn a_servers_leaf_has_the_fixed_name_and_the_configured_ones() {
    let dir = tempfile::tempdir().unwrap();
    let sans = ServerSans {
        dns_names: vec!["proxy.example.com".to_owned()],
        ip_addresses: vec!["203.0.113.10".parse().unwrap()],
    };
    let leaf = authority(dir.path())
        .issue_server(&name("s1"), &sans, NOW)
        .unwrap();
    let facts = Facts::read(&leaf.chain()[0]).unwrap();
    assert_eq!(facts.dns_names, [SERVER_SNI, "proxy.example.com"]);
    assert_eq!(facts.uris, ["spiffe://corvid/server/s1"]);
    let bad = ServerSans {
        dns_names: vec!["bücher.de".to_owned()],
        ..ServerSans::default()
    };
    let refused = authority(dir.path()).issue_server(&name("s1"), &bad, NOW);
    assert!(matches!(refused, Err(IssuerError::DnsName { .. })));
}

#[test]
fn no_leaf_outlives_its_root() {
    let dir = tempfile::tempdir().unwrap();
    let issuer = authority(dir.path());
    let late = from_secs(issuer.not_after().as_secs() - 60);
    let client = issuer
        .issue_client(&name("kube"), CLIENT_DAYS, late)
        .unwrap();
    assert_eq!(client.not_after(), issuer.not_after());
}

#[test]
fn a_client_lives_one_to_3650_days() {
    let dir = tempfile::tempdir().unwrap();
    let issuer = authority(dir.path());
    for wrong in [0, 3651] {
        let refused = issuer.issue_client(&name("kube"), wrong, NOW);
        assert!(matches!(refused, Err(IssuerError::Days)));
    }
}

#[test]
fn a_client_is_exported_with_its_key_0600() {
    let dir = tempfile::tempdir().unwrap();
    let issuer = authority(&dir.path().join("ca"));
    let client = issuer.issue_client(&name("kube"), 1, NOW).unwrap();
    let out = dir.path().join("out");
    export_client(&client, issuer.bundle(), &out).unwrap();
    let loaded = Credential::load(&out.join("kube.crt"), &out.join("kube.key")).unwrap();
    assert_eq!(loaded.fingerprint(), client.fingerprint());
    let key = std::fs::metadata(out.join("kube.key")).unwrap();
    assert_eq!(key.permissions().mode() & 0o777, 0o600);
    assert_eq!(
        TrustBundle::load(&out.join("ca.crt")).unwrap().pins(),
        [issuer.pin()]
    );
}

#[test]
fn the_longest_name_can_be_certified() {
    let dir = tempfile::tempdir().unwrap();
    let long = name(&format!("{0}.{0}.{0}.{1}", "a".repeat(63), "b".repeat(61)));
    let leaf = authority(dir.path()).issue_client(&long, 1, NOW).unwrap();
    assert_eq!(leaf.identity().name, long);
}
