//! Tests of what an authority consists of.

use std::collections::BTreeMap;

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::ParsedExtension;

use super::*;
use crate::credential::Credential;
use crate::identity::{Name, Role};
use crate::issuer::ServerSans;

const NOW: UnixTime = from_secs(1_800_000_000);
const DAY: Duration = Duration::from_secs(86_400);

fn authority() -> Ca {
    Ca::create(&TrustDomain::default(), NOW).unwrap()
}

fn files(ca: &Ca) -> BTreeMap<&'static str, Vec<u8>> {
    let file = |(name, text): (&'static str, SecretString)| {
        (name, text.expose_secret().as_bytes().to_vec())
    };
    ca.to_files().unwrap().map(file).into()
}

fn read(files: &BTreeMap<&'static str, Vec<u8>>) -> Result<Ca, IssuerError> {
    Ca::from_files(&TrustDomain::default(), |name| files.get(name).cloned())
}

fn server(ca: &Ca) -> Credential {
    let issuer = ca.issuer(NOW).unwrap();
    let name = Name::parse("s1").unwrap();
    issuer
        .issue_server(&name, &ServerSans::default(), NOW)
        .unwrap()
}

#[test]
fn an_authority_survives_the_way_through_its_files() {
    let old = authority();
    let rotated = old.rotate(DAY, NOW).unwrap();
    let noted = rotated.certifying_client_until(from_secs(NOW.as_secs() + 7));
    for ca in [&old, &rotated, &noted, &rotated.retire()] {
        assert_eq!(read(&files(ca)).unwrap(), *ca);
    }
    assert_ne!(rotated, noted);
    let shown = format!("{rotated:?}");
    assert!(!shown.contains("PRIVATE") && shown.len() < 500, "{shown}");
}

#[test]
fn a_rotation_keeps_the_old_root_and_forgets_its_key() {
    let old = authority();
    let new = old.rotate(30 * DAY, NOW).unwrap();
    assert_ne!(new.pin(), old.pin());
    assert_eq!(new.bundle().unwrap().pins(), [new.pin(), old.pin()]);
    assert!(new.follows(old.pin()) && new.follows(new.pin()));
    assert!(!old.follows(new.pin()) && !authority().follows(old.pin()));
    let old_key = files(&old)[KEY].clone();
    assert!(files(&new).values().all(|file| *file != old_key));
    // What the new one signs has the old one's word behind it; what the old one signed has nothing.
    let (before, after) = (server(&old), server(&new));
    assert_eq!((before.chain().len(), after.chain().len()), (1, 2));
    assert_eq!(after.identity().role, Role::Server);

    let end = new.retires_at().unwrap();
    assert_eq!(end.as_secs(), NOW.as_secs() + 30 * DAY.as_secs());
    assert!(!new.is_due(from_secs(end.as_secs() - 1)) && new.is_due(end));
    let retired = new.retire();
    assert_eq!(retired.bundle().unwrap().pins(), [new.pin()]);
    assert_eq!(server(&retired).chain().len(), 1);
    assert!(!retired.is_due(from_secs(u64::MAX)) && retired.retires_at().is_none());
    assert!(!old.is_due(from_secs(u64::MAX)));
}

#[test]
fn where_it_comes_from_outlasts_the_old_root_and_its_files() {
    let first = authority();
    let second = first.rotate(DAY, NOW).unwrap().retire();
    assert!(second.follows(first.pin()));
    let mut last = read(&files(&second)).unwrap();
    for _ in 0..REMEMBERED {
        assert!(last.follows(second.pin()), "{last:?}");
        last = last.rotate(DAY, NOW).unwrap().retire();
    }
    assert!(last.follows(second.pin()) && !last.follows(first.pin()));
    assert!(!second.follows(last.pin()));
}

#[test]
fn the_old_root_waits_for_the_last_client_that_it_has_certified() {
    let year = from_secs(NOW.as_secs() + 365 * DAY.as_secs());
    let earlier = from_secs(NOW.as_secs() + DAY.as_secs());
    let old = authority()
        .certifying_client_until(year)
        .certifying_client_until(earlier);
    assert_eq!(old.rotate(DAY, NOW).unwrap().retires_at(), Some(year));
}

#[test]
fn one_rotation_at_a_time() {
    let rotated = authority().rotate(DAY, NOW).unwrap();
    let again = rotated.rotate(DAY, NOW);
    assert!(matches!(again, Err(IssuerError::UnderWay)), "{again:?}");
    rotated.retire().rotate(DAY, NOW).unwrap();
}

#[test]
fn the_cross_certificate_is_one_that_every_verifier_takes() {
    let old = authority();
    let new = old.rotate(DAY, NOW).unwrap();
    let parse = |der| x509_parser::parse_x509_certificate(der).unwrap().1;
    let roots = new.bundle().unwrap();
    let (root, old_root) = (parse(&roots.roots()[0]), parse(&roots.roots()[1]));
    let cross = new.cross.clone().unwrap();
    let (cross, after) = (parse(&cross), server(&new));
    let leaf = parse(&after.chain()[0]);
    // Go and OpenSSL count authorities below each one, roots included.
    let path_length = |certificate: &X509Certificate<'_>| {
        let found = certificate.basic_constraints().unwrap().unwrap();
        found.value.path_len_constraint
    };
    assert_eq!(path_length(&old_root), Some(1));
    assert_eq!(path_length(&root), Some(1));
    assert_eq!(path_length(&cross), Some(0));
    // The same key under the same name, so that either ends a path.
    assert_eq!(cross.subject().as_raw(), root.subject().as_raw());
    assert_eq!(cross.public_key(), root.public_key());
    assert_eq!(leaf.issuer().as_raw(), cross.subject().as_raw());
    assert_eq!(cross.issuer().as_raw(), old_root.subject().as_raw());
    cross.verify_signature(Some(old_root.public_key())).unwrap();
    leaf.verify_signature(Some(cross.public_key())).unwrap();
    // Key identifiers lead the same way.
    let own = |certificate: &X509Certificate<'_>| {
        let mut parsed = certificate.iter_extensions().map(|e| e.parsed_extension());
        parsed.find_map(|extension| {
            if let ParsedExtension::SubjectKeyIdentifier(id) = extension {
                Some(id.0.to_vec())
            } else {
                None
            }
        })
    };
    let of_issuer = |certificate: &X509Certificate<'_>| {
        let mut parsed = certificate.iter_extensions().map(|e| e.parsed_extension());
        parsed.find_map(|extension| {
            if let ParsedExtension::AuthorityKeyIdentifier(id) = extension {
                Some(id.key_identifier.as_ref()?.0.to_vec())
            } else {
                None
            }
        })
    };
    assert!(own(&cross).is_some() && own(&cross) == own(&root));
    assert_eq!(of_issuer(&cross), own(&old_root));
    assert_eq!(of_issuer(&leaf), own(&cross));
    // It is of no use beyond the root that gave it.
    assert!(cross.validity().not_after <= old_root.validity().not_after);
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let old = authority();
    let good = files(&old.rotate(DAY, NOW).unwrap());
    let (other, stranger) = (files(&old), files(&authority()));
    let with = |name: &'static str, text: &[u8]| {
        let mut files = good.clone();
        files.insert(name, text.to_vec());
        read(&files)
    };
    let without = |name: &str| {
        let mut files = good.clone();
        files.remove(name);
        read(&files)
    };
    assert!(matches!(without(KEY), Err(IssuerError::Missing(_))));
    assert!(matches!(without(ROOT), Err(IssuerError::Missing(_))));
    assert!(matches!(
        with(KEY, &other[KEY]),
        Err(IssuerError::KeyMismatch)
    ));
    assert!(matches!(with(KEY, b"x"), Err(IssuerError::Key(_))));
    assert!(matches!(with(ROOT, b""), Err(IssuerError::Cross)));
    assert!(matches!(with(NOTES, b"{"), Err(IssuerError::Notes(_))));
    assert!(matches!(with(OLD, b"x"), Err(IssuerError::Bundle(_))));
    // A leaf, a stranger's root, or too many behind the root.
    let behind = |more: &[u8]| {
        let root = good[ROOT].as_slice();
        let text = std::str::from_utf8(root).unwrap();
        let end = text.find("-----END").unwrap() + "-----END CERTIFICATE-----\n".len();
        with(ROOT, &[&root[..end], more].concat())
    };
    let leaf = server(&old).chain_pem();
    assert!(matches!(behind(leaf.as_bytes()), Err(IssuerError::Cross)));
    assert!(matches!(behind(&stranger[ROOT]), Err(IssuerError::Cross)));
    let three = [good[ROOT].as_slice(), &good[ROOT]].concat();
    assert!(matches!(with(ROOT, &three), Err(IssuerError::Cross)));
    // Without notes or old roots it is whole.
    assert!(without(NOTES).unwrap().retires_at().is_none());
    assert!(without(OLD).unwrap().is_due(NOW));
}
