//! ClientHellos as rustls makes them, and what may become of them on the way.

use std::sync::Arc;

use proptest::prelude::*;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use super::*;

/// What a TLS client sends first.
fn hello(to: &str, sni: bool) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    config.enable_sni = sni;
    let name = ServerName::try_from(to.to_owned()).unwrap();
    let mut connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    connection.write_tls(&mut bytes).unwrap();
    bytes
}

/// The message of a single record.
fn unwrapped(record: &[u8]) -> &[u8] {
    assert_eq!(
        usize::from(u16::from_be_bytes([record[3], record[4]])),
        record.len() - 5
    );
    &record[5..]
}

/// The message in records of so many bytes.
fn records(message: &[u8], size: usize) -> Vec<u8> {
    let mut all = Vec::new();
    for part in message.chunks(size) {
        all.extend([22, 3, 1]);
        all.extend(u16::try_from(part.len()).unwrap().to_be_bytes());
        all.extend(part);
    }
    all
}

/// A ClientHello made by hand, with these extensions.
fn made(extensions: &[u8]) -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0x13, 1, 1, 0]);
    body.extend(u16::try_from(extensions.len()).unwrap().to_be_bytes());
    body.extend(extensions);
    wrapped(&body)
}

fn wrapped(body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    records(&[&[1], &length[1..], body].concat(), MAX_FRAGMENT)
}

/// A server_name extension of these entries.
fn sni(entries: &[(u8, &[u8])]) -> Vec<u8> {
    let mut list = Vec::new();
    for (kind, name) in entries {
        list.push(*kind);
        list.extend(u16::try_from(name.len()).unwrap().to_be_bytes());
        list.extend(*name);
    }
    let length = u16::try_from(list.len()).unwrap();
    let mut all = vec![0, 0];
    all.extend((length + 2).to_be_bytes());
    all.extend(length.to_be_bytes());
    all.extend(list);
    all
}

fn found(name: &str) -> Result<Option<Option<String>>, Malformed> {
    Ok(Some(Some(name.to_owned())))
}

#[test]
fn the_name_is_found_wherever_the_bytes_are_cut() {
    let bytes = hello("edge1.example", true);
    assert!(
        bytes.len() > 1200,
        "a post-quantum key share: {}",
        bytes.len()
    );
    for cut in 0..bytes.len() {
        assert_eq!(server_name(&bytes[..cut]), Ok(None), "cut at {cut}");
    }
    assert_eq!(server_name(&bytes), found("edge1.example"));
    let early_data = [bytes.as_slice(), &[20, 3, 3, 0, 1, 1, 23, 3, 3, 0, 1, 0]].concat();
    assert_eq!(server_name(&early_data), found("edge1.example"));
}

#[test]
fn the_message_may_be_in_any_number_of_records() {
    let bytes = hello("edge1", true);
    for size in [1, 2, 3, 4, 5, 100, 1000] {
        let all = records(unwrapped(&bytes), size);
        assert_eq!(server_name(&all), found("edge1"), "records of {size}");
        for cut in 0..all.len() - 1 {
            assert_eq!(
                server_name(&all[..cut]),
                Ok(None),
                "records of {size}, cut at {cut}"
            );
        }
    }
}

#[test]
fn no_name_is_no_mistake() {
    assert_eq!(server_name(&hello("edge1", false)), Ok(Some(None)));
    assert_eq!(
        server_name(&hello("10.0.0.1", true)),
        Ok(Some(None)),
        "no SNI for addresses"
    );
    assert_eq!(server_name(&made(&[])), Ok(Some(None)));
    assert_eq!(server_name(&made(&sni(&[]))), Ok(Some(None)));
    assert_eq!(
        server_name(&made(&sni(&[(0, b"\xff\xfe")]))),
        Ok(Some(None)),
        "no text"
    );
    assert_eq!(
        server_name(&made(&sni(&[(9, b"x")]))),
        Ok(Some(None)),
        "another type"
    );
    let old = [[3, 3].as_slice(), &[7; 32], &[0, 0, 2, 0, 47, 1, 0]].concat();
    assert_eq!(
        server_name(&wrapped(&old)),
        Ok(Some(None)),
        "without extensions"
    );
}

#[test]
fn the_outer_name_of_an_encrypted_hello_is_a_name_like_any() {
    let ech = [0xfe, 0x0d, 0, 4, 0, 0, 1, 0];
    let all = made(&[sni(&[(0, b"public.example")]).as_slice(), &ech].concat());
    assert_eq!(server_name(&all), found("public.example"));
}

#[test]
fn lengths_that_lie_are_refused() {
    let name = sni(&[(0, b"edge1")]);
    let mut long_list = name.clone();
    long_list[5] += 1;
    let mut short_list = name.clone();
    short_list[5] -= 1;
    let mut long_extension = name.clone();
    long_extension[3] += 1;
    for (what, extensions) in [
        ("two extensions of a type", name.repeat(2)),
        ("two names", sni(&[(0, b"edge1"), (0, b"edge2")])),
        ("an empty name", sni(&[(0, b"")])),
        ("a list beyond its extension", long_list),
        ("a list short of its extension", short_list),
        ("an extension beyond the message", long_extension),
        ("half an extension", vec![0, 0, 0]),
    ] {
        assert_eq!(
            server_name(&made(&extensions)),
            Err(Malformed::Tls),
            "{what}"
        );
    }
    let mut body = [[3, 3].as_slice(), &[7; 32], &[0, 0, 2, 0x13, 1, 1, 0, 0, 0]].concat();
    assert_eq!(server_name(&wrapped(&body)), Ok(Some(None)));
    body.push(0);
    assert_eq!(
        server_name(&wrapped(&body)),
        Err(Malformed::Tls),
        "more behind the extensions"
    );
    assert_eq!(
        server_name(&wrapped(&[3, 3, 7])),
        Err(Malformed::Tls),
        "too short"
    );
}

#[test]
fn what_is_no_client_hello_is_refused_at_once() {
    for bytes in [
        [22, 2].as_slice(),
        &[23],
        &[22, 3, 1, 0, 0],
        &[22, 3, 1, 0x40, 1],
        &[22, 3, 1, 0, 5, 2],
        &[22, 3, 1, 0, 1, 1, 23],
        &[22, 3, 1, 0, 1, 1, 22, 4],
    ] {
        assert_eq!(server_name(bytes), Err(Malformed::Tls), "{bytes:?}");
    }
}

#[test]
fn a_huge_message_is_refused_by_its_length() {
    assert_eq!(
        server_name(&[22, 3, 1, 0x40, 0, 1, 0, 0x40, 1]),
        Err(Malformed::TooLarge)
    );
    assert_eq!(server_name(&[22, 3, 1, 0x40, 0, 1, 0, 0x40, 0]), Ok(None));
}

proptest! {
    #[test]
    fn no_change_of_a_hello_makes_it_panic(
        changes in proptest::collection::vec((0_usize..2000, any::<u8>()), 1..20),
        cut in 0_usize..2000,
        size in 1_usize..600,
    ) {
        let bytes = hello("edge1.example", true);
        let mut all = records(unwrapped(&bytes), size);
        for (at, byte) in changes {
            let at = at % all.len();
            all[at] = byte;
        }
        all.truncate(cut);
        // Nothing is known of the outcome but that there is one, and no name longer than what was there.
        if let Ok(Some(Some(name))) = server_name(&all) {
            prop_assert!(name.len() <= all.len());
        }
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let all = [[22, 3, 1, 2, 0, 1, 0, 1, 0xf0].as_slice(), &bytes].concat();
        server_name(&all).ok();
        server_name(&bytes).ok();
    }

    #[test]
    fn more_bytes_never_change_what_was_found(extra in proptest::collection::vec(any::<u8>(), 0..100)) {
        let all = [made(&sni(&[(0, b"edge1")])), extra].concat();
        prop_assert_eq!(server_name(&all), found("edge1"));
    }
}
