//! What an authority consists of, as values: to be kept as four files, in a directory or elsewhere. Pure.
//!
//! | file | holds |
//! | --- | --- |
//! | `ca.key` | the key that signs; the only secret |
//! | `ca.crt` | its root. While an older root is still trusted, behind it a certificate that the older key has given the new one: the *cross certificate*, which stands in each chain |
//! | `old.crt` | roots that signed before and are still trusted |
//! | `ca.json` | when those leave, until when clients were certified, and the pins of the last authorities before this one |
//!
//! A rotation is one step from one value to the next. From then on
//! * who knows only the old root believes what the new key signs, by the cross certificate in the chain;
//! * who knows the new root knows the old one too, and believes what the old key has signed.
//!
//! So there is no moment at which two peers refuse each other, whichever of them has heard of it. The old key is gone
//! after it has signed the cross certificate. The old root leaves when the last of its leaves has ended.

use std::fmt;
use std::time::Duration;

use rustls_pki_types::{CertificateDer, UnixTime};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};

use crate::bundle::{Pin, TrustBundle, certificates};
use crate::clock::from_secs;
use crate::credential::Key;
use crate::identity::TrustDomain;
use crate::issuer::{Issuer, IssuerError, make_root};
use crate::x509::{self, Facts};

/// The names of the files.
pub(crate) const KEY: &str = "ca.key";
/// See [`KEY`].
pub(crate) const ROOT: &str = "ca.crt";
/// See [`KEY`].
pub(crate) const OLD: &str = "old.crt";
/// See [`KEY`].
pub(crate) const NOTES: &str = "ca.json";

/// How many authorities before this one are remembered.
const REMEMBERED: usize = 16;

/// An authority with its key. Cheap to compare, never shown.
#[derive(Clone)]
pub struct Ca {
    trust_domain: TrustDomain,
    /// PEM.
    key: SecretString,
    root: TrustBundle,
    pin: Pin,
    cross: Option<CertificateDer<'static>>,
    old: Vec<CertificateDer<'static>>,
    notes: Notes,
}

/// Times are seconds since 1970.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Notes {
    /// When the old roots leave.
    #[serde(skip_serializing_if = "Option::is_none")]
    retire_at: Option<u64>,
    /// End of the last leaf that a client was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    clients_until: Option<u64>,
    /// Which authorities it comes from by rotations, the latest last; also those whose roots have left.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    after: Vec<Pin>,
}

impl Ca {
    /// Makes an authority: an ECDSA P-256 root of ten years.
    ///
    /// # Errors
    /// The system has no randomness, or signing fails.
    pub fn create(trust_domain: &TrustDomain, now: UnixTime) -> Result<Self, IssuerError> {
        Self::of_key(&Key::generate()?, trust_domain, now)
    }

    /// Makes the root of a key that is there already.
    pub(crate) fn of_key(
        key: &Key,
        trust_domain: &TrustDomain,
        now: UnixTime,
    ) -> Result<Self, IssuerError> {
        Ok(Self {
            trust_domain: trust_domain.clone(),
            key: key.to_pem(),
            root: make_root(key, trust_domain, now)?,
            pin: Pin::of_public_key(&key.public_key()),
            cross: None,
            old: Vec::new(),
            notes: Notes::default(),
        })
    }

    /// Puts together what `read` finds under the names of the files.
    ///
    /// # Errors
    /// Something is missing, broken, or does not belong together.
    pub fn from_files(
        trust_domain: &TrustDomain,
        read: impl Fn(&str) -> Option<Vec<u8>>,
    ) -> Result<Self, IssuerError> {
        let key = read(KEY).ok_or(IssuerError::Missing("key"))?;
        let key = Key::from_pem(&key)?;
        let chain = read(ROOT).ok_or(IssuerError::Missing("certificate"))?;
        let chain = certificates(&chain).map_err(crate::bundle::BundleError::Pem)?;
        let (root, cross) = match chain.as_slice() {
            [root] => (root, None),
            [root, cross] => (root, Some(cross.clone())),
            [] | [_, _, _, ..] => return Err(IssuerError::Cross),
        };
        let root = TrustBundle::from_der(vec![root.clone()])?;
        let pin = Pin::of_public_key(&key.public_key());
        if root.pins() != [pin] {
            return Err(IssuerError::KeyMismatch);
        }
        let is_of_key = |cross: &CertificateDer<'_>| {
            Facts::read(cross)
                .is_ok_and(|facts| facts.is_ca && facts.public_key == key.public_key())
        };
        if !cross.as_ref().is_none_or(is_of_key) {
            return Err(IssuerError::Cross);
        }
        let mut old = match read(OLD) {
            Some(pem) if !pem.is_empty() => TrustBundle::from_pem(&pem)?.roots().to_vec(),
            Some(_) | None => Vec::new(),
        };
        // A save that was interrupted leaves the present root among the old ones.
        old.retain(|old| !root.roots().contains(old));
        let notes = match read(NOTES) {
            Some(json) => serde_json::from_slice(&json).map_err(IssuerError::Notes)?,
            None => Notes::default(),
        };
        Ok(Self {
            trust_domain: trust_domain.clone(),
            key: key.to_pem(),
            root,
            pin,
            cross,
            old,
            notes,
        })
    }

    /// The files, in an order in which they may be written one after the other: whatever was written, what is there
    /// trusts at least what it trusted before, until the last one is written.
    ///
    /// # Errors
    /// The notes can't be written as JSON.
    pub fn to_files(&self) -> Result<[(&'static str, SecretString); 4], IssuerError> {
        let notes = serde_json::to_string(&self.notes).map_err(IssuerError::Notes)?;
        let chain: Vec<_> = self.root.roots().iter().chain(&self.cross).collect();
        Ok([
            (OLD, x509::pem("CERTIFICATE", &self.old).into()),
            (NOTES, notes.into()),
            (KEY, self.key.clone()),
            (ROOT, x509::pem("CERTIFICATE", &chain).into()),
        ])
    }

    /// The authority at work.
    ///
    /// # Errors
    /// The root has expired, or the key is unusable.
    pub fn issuer(&self, now: UnixTime) -> Result<Issuer, IssuerError> {
        self.issuer_trusting(self.bundle()?, now)
    }

    /// As [`Ca::issuer`], with other roots to trust.
    pub(crate) fn issuer_trusting(
        &self,
        bundle: TrustBundle,
        now: UnixTime,
    ) -> Result<Issuer, IssuerError> {
        if self.root.not_after() <= now {
            return Err(IssuerError::Expired);
        }
        let key = Key::from_pem(self.key.expose_secret().as_bytes())?;
        let behind = self.cross.iter().cloned().collect();
        Issuer::new(
            key,
            self.root.clone(),
            behind,
            bundle,
            self.trust_domain.clone(),
        )
    }

    /// The root that signs, then those that are still trusted.
    ///
    /// # Errors
    /// They are too many.
    pub fn bundle(&self) -> Result<TrustBundle, IssuerError> {
        let roots = self.root.roots().iter().chain(&self.old);
        Ok(TrustBundle::from_der(roots.cloned().collect())?)
    }

    /// The pin of the root that signs.
    #[must_use]
    pub const fn pin(&self) -> Pin {
        self.pin
    }

    /// When the root that signs expires.
    #[must_use]
    pub fn not_after(&self) -> UnixTime {
        self.root.not_after()
    }

    /// When the old roots leave; `None` without any.
    #[must_use]
    pub fn retires_at(&self) -> Option<UnixTime> {
        let at = self.notes.retire_at.map(from_secs);
        at.filter(|_| !self.old.is_empty())
    }

    /// End of the last leaf that a client was given, if one was.
    #[must_use]
    pub fn clients_until(&self) -> Option<UnixTime> {
        self.notes.clients_until.map(from_secs)
    }

    /// The next authority: a new key, whose root the present one vouches for.
    ///
    /// The present root stays trusted for `keep`, and until the last client's leaf that it has signed has ended. Its key
    /// is not part of what is returned.
    ///
    /// # Errors
    /// An older root is still trusted; signing fails.
    pub fn rotate(&self, keep: Duration, now: UnixTime) -> Result<Self, IssuerError> {
        if !self.old.is_empty() {
            return Err(IssuerError::UnderWay);
        }
        let key = Key::generate()?;
        let next = Self::of_key(&key, &self.trust_domain, now)?;
        let kept = now.as_secs().saturating_add(keep.as_secs());
        let retire_at = kept.max(self.notes.clients_until.unwrap_or_default());
        let mut after = self.notes.after.clone();
        after.push(self.pin);
        after.drain(..after.len().saturating_sub(REMEMBERED));
        Ok(Self {
            cross: Some(self.issuer(now)?.sign_root(&key, now)?),
            old: self.root.roots().to_vec(),
            notes: Notes {
                retire_at: Some(retire_at),
                after,
                ..self.notes
            },
            ..next
        })
    }

    /// Without older roots. Who knows only those has to enrol again, and what only those have signed is worthless.
    #[must_use]
    pub fn retire(&self) -> Self {
        Self {
            cross: None,
            old: Vec::new(),
            notes: Notes {
                retire_at: None,
                ..self.notes.clone()
            },
            ..self.clone()
        }
    }

    /// Whether the older roots are to leave.
    #[must_use]
    pub fn is_due(&self, now: UnixTime) -> bool {
        let over = self.retires_at().is_some_and(|at| at <= now);
        // The second: a retirement that was interrupted.
        over || (self.cross.is_some() && self.old.is_empty())
    }

    /// With a note that a client's leaf lives until then.
    #[must_use]
    pub fn certifying_client_until(&self, until: UnixTime) -> Self {
        let latest = self.notes.clients_until.unwrap_or_default();
        let mut noted = self.clone();
        noted.notes.clients_until = Some(latest.max(until.as_secs()));
        noted
    }

    /// Whether this is `earlier` itself or comes from it by rotations, also if its root is trusted no longer: whoever
    /// has missed one step may take the next.
    #[must_use]
    pub fn follows(&self, earlier: Pin) -> bool {
        self.pin == earlier || self.notes.after.contains(&earlier)
    }
}

impl PartialEq for Ca {
    fn eq(&self, other: &Self) -> bool {
        self.trust_domain == other.trust_domain
            && self.root.roots() == other.root.roots()
            && self.cross == other.cross
            && self.old == other.old
            && self.notes == other.notes
    }
}

impl Eq for Ca {}

impl fmt::Debug for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ca")
            .field("trust_domain", &self.trust_domain.as_str())
            .field("pin", &self.pin())
            .field("old", &self.old.len())
            .field("notes", &self.notes)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
