//! Doors of frontends: an operator's own PKI, names that clients verify, TLS 1.2.

use std::sync::Arc;

use certs::test_ca::TestCa;
use certs::{FrontendTrust, HandshakeFailure, OperatorPki, Revocations};
use rustls::client::ResolvesClientCert;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, SignatureScheme};

use super::{Door, door, shake, shake_as, visitor};

#[tokio::test]
async fn an_operators_own_pki_lets_those_in_whom_it_names() {
    let (ours, theirs, foreign) = (TestCa::new(), TestCa::new(), TestCa::new());
    let names = vec![
        "kube-apiserver".to_owned(),
        "spiffe://example.org/scraper".to_owned(),
    ];
    let trust = FrontendTrust::Operator(OperatorPki::new(theirs.bundle(), names).unwrap());
    let frontend = certs::frontend_server(&ours.own(ours.server("s1")), &trust).unwrap();
    let visit = |pki: &TestCa, common_name: &str, uris: &[&str]| {
        let (chain, key) = pki.plain_client(common_name, uris);
        let mut config = ClientConfig::clone(&visitor(Door::Frontend, &ours, None));
        config.client_auth_cert_resolver = Arc::new(Shown::new(&chain, &key));
        Arc::new(config)
    };
    let apiserver = visit(&theirs, "kube-apiserver", &[]);
    shake(&frontend, &apiserver).await.accepted();
    let scraper = visit(&theirs, "x", &["spiffe://example.org/scraper"]);
    shake(&frontend, &scraper).await.accepted();
    let other = visit(&theirs, "system:node:a", &["spiffe://example.org/other"]);
    let refused = shake(&frontend, &other).await.refused_by_server();
    assert_eq!(refused, HandshakeFailure::WrongRole);
    let impostor = visit(&foreign, "kube-apiserver", &[]);
    let refused = shake(&frontend, &impostor).await.refused_by_server();
    assert_eq!(refused, HandshakeFailure::UnknownIssuer);
    // Where the operator's PKI is in force, ours is not.
    let our_client = visitor(Door::Frontend, &ours, Some(ours.client("kube")));
    let refused = shake(&frontend, &our_client).await.refused_by_server();
    assert_eq!(refused, HandshakeFailure::UnknownIssuer);
}

#[test]
fn an_operators_own_pki_without_names_is_refused() {
    assert!(OperatorPki::new(TestCa::new().bundle(), Vec::new()).is_err());
}

/// Shows a certificate that is none of ours.
#[derive(Debug)]
struct Shown(Arc<CertifiedKey>);

impl Shown {
    fn new(chain: &str, key: &str) -> Self {
        use rustls::pki_types::pem::PemObject as _;
        use rustls::pki_types::{CertificateDer, PrivateKeyDer};

        let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<_, _>>();
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        let shown = CertifiedKey::from_der(chain.unwrap(), key, &certs::provider());
        Self(Arc::new(shown.unwrap()))
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[tokio::test]
async fn a_frontends_client_verifies_the_name_it_dials() {
    let ca = TestCa::new();
    let frontend = door(
        Door::Frontend,
        &ca.own(ca.server("s1")),
        &Revocations::new(),
    );
    let client = certs::frontend_client(&ca.own(ca.client("kube"))).unwrap();
    for name in ["localhost", "127.0.0.1", "::1"] {
        shake_as(&frontend, &client, name).await.accepted();
    }
    let refused = shake_as(&frontend, &client, "elsewhere.example")
        .await
        .refused_by_client();
    assert_eq!(refused, HandshakeFailure::WrongName);
}

#[tokio::test]
async fn frontends_speak_tls_1_2_and_our_own_doors_do_not() {
    let ca = TestCa::new();
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(ca.bundle().roots().iter().cloned());
    let mut config = ClientConfig::builder_with_provider(certs::provider())
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.client_auth_cert_resolver = Arc::clone(
        &visitor(Door::Frontend, &ca, Some(ca.client("kube"))).client_auth_cert_resolver,
    );
    let old = Arc::new(config);
    let own = ca.own(ca.server("s1"));
    for each in [Door::Frontend, Door::FrontendOptional] {
        shake(&door(each, &own, &Revocations::new()), &old)
            .await
            .accepted();
    }
    for each in [Door::Tunnel, Door::Enroll, Door::Peer] {
        let outcome = shake(&door(each, &own, &Revocations::new()), &old).await;
        assert_eq!(outcome.server.unwrap_err(), HandshakeFailure::Protocol);
    }
}
