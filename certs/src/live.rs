//! A credential that is replaced in place: rotation without a restart and without touching sessions.
//!
//! The next handshake shows the new leaf; what is established keeps the one it was made with.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::UnixTime;

use crate::credential::Credential;

/// The credential of now, as rustls asks for it on either side. Clones share it.
#[derive(Clone)]
pub struct LiveCredential {
    current: Arc<ArcSwap<Credential>>,
}

impl LiveCredential {
    /// Starts with `credential`.
    #[must_use]
    pub fn new(credential: Credential) -> Self {
        Self {
            current: Arc::new(ArcSwap::from_pointee(credential)),
        }
    }

    /// The credential of now.
    #[must_use]
    pub fn load(&self) -> Arc<Credential> {
        self.current.load_full()
    }

    /// Shows `credential` from the next handshake on.
    pub fn replace(&self, credential: Credential) {
        self.current.store(Arc::new(credential));
    }

    /// End of the leaf's life, for the gauge.
    #[must_use]
    pub fn not_after(&self) -> UnixTime {
        self.current.load().not_after()
    }
}

impl fmt::Debug for LiveCredential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LiveCredential").field(&self.load()).finish()
    }
}

impl ResolvesServerCert for LiveCredential {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(self.current.load().certified()))
    }
}

impl ResolvesClientCert for LiveCredential {
    fn resolve(&self, _roots: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        // Always the one we have: a server that doesn't take it says why, which no certificate wouldn't.
        Some(Arc::clone(self.current.load().certified()))
    }

    fn has_certs(&self) -> bool {
        true
    }
}
