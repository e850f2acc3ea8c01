//! An authority kept in a directory: made once, changed as a whole.
//!
//! Beside the files of [`crate::ca`] it may have `old/*.crt`, further roots that an operator wants trusted. Processes that
//! use it at once are kept apart by a lock; a crash between two files leaves what was or what should be.

use std::path::{Path, PathBuf};

use rustls_pki_types::UnixTime;
use secrecy::ExposeSecret as _;

use crate::bundle::{TrustBundle, certificates};
use crate::ca::{Ca, KEY, NOTES, OLD, ROOT};
use crate::credential::{Key, next_key_path};
use crate::identity::TrustDomain;
use crate::issuer::{Issuer, IssuerError};
use crate::store::{self, FileLock, StoreError};

/// Says where the authority is kept of which the directory has a copy.
const ORIGIN: &str = "origin";

/// A directory with an authority, or for one.
#[derive(Debug, Clone)]
pub struct CaDir {
    dir: PathBuf,
}

/// One write of a save.
enum Step {
    Write(PathBuf, String, u32),
    Rename(PathBuf, PathBuf),
}

impl Step {
    fn run(self) -> Result<(), StoreError> {
        match self {
            Self::Write(path, text, mode) => store::write_atomic(&path, text.as_bytes(), mode),
            Self::Rename(from, to) => store::rename(&from, &to),
        }
    }
}

impl CaDir {
    /// The authority in `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// What changes when the authority does.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        [KEY, ROOT, OLD, NOTES]
            .map(|name| self.dir.join(name))
            .into()
    }

    /// The authority that is there, if there is one.
    ///
    /// # Errors
    /// What is there can't be read, or does not belong together.
    pub fn load(&self, trust_domain: &TrustDomain) -> Result<Option<Ca>, IssuerError> {
        // Nothing is made where nothing is.
        if store::read_if_there(&self.dir.join(ROOT))?.is_none() {
            return Ok(None);
        }
        let _lock = self.lock()?;
        self.read(trust_domain)
    }

    /// The authority that is there, or a new one.
    ///
    /// Two processes that start at once make one. A root without its key, or with another's, is an error and never
    /// replaced.
    ///
    /// # Errors
    /// As [`CaDir::load`], or nothing can be written.
    pub fn load_or_create(
        &self,
        trust_domain: &TrustDomain,
        now: UnixTime,
    ) -> Result<Ca, IssuerError> {
        let _lock = self.lock()?;
        if let Some(ca) = self.read(trust_domain)? {
            return Ok(ca);
        }
        // The key comes first: one that a crash left without its certificate is used, not replaced.
        let key = Key::load_or_create(&self.dir.join(KEY))?;
        let ca = Ca::of_key(&key, trust_domain, now)?;
        self.write(&ca)?;
        Ok(ca)
    }

    /// Replaces the authority by what `change` makes of it; what it returns is what is there then.
    ///
    /// # Errors
    /// As [`CaDir::load`]; there is none, or a copy only; `change` fails; nothing can be written.
    pub fn update(
        &self,
        trust_domain: &TrustDomain,
        change: impl FnOnce(&Ca) -> Result<Ca, IssuerError>,
    ) -> Result<Ca, IssuerError> {
        let _lock = self.lock()?;
        self.own_only()?;
        let found = self.read(trust_domain)?;
        let found = found.ok_or(IssuerError::Missing("certificate"))?;
        let changed = change(&found)?;
        if changed != found {
            self.write(&changed)?;
        }
        Ok(changed)
    }

    /// Keeps an authority that comes from elsewhere, in place of what is there.
    ///
    /// # Errors
    /// Nothing can be written.
    pub fn save(&self, ca: &Ca) -> Result<(), IssuerError> {
        let _lock = self.lock()?;
        self.write(ca)
    }

    /// Keeps a copy of an authority that is kept elsewhere, at `origin`, in place of what is there. It can be read here
    /// and not changed: a change would be undone by the next copy.
    ///
    /// # Errors
    /// Nothing can be written.
    pub fn save_copy(&self, ca: &Ca, origin: &str) -> Result<(), IssuerError> {
        let _lock = self.lock()?;
        let marker = self.dir.join(ORIGIN);
        store::write_atomic(&marker, origin.as_bytes(), store::MODE_PUBLIC)?;
        self.write(ca)
    }

    /// Whether what is there is a copy of what is kept elsewhere, readable or not.
    #[must_use]
    pub fn is_copy(&self) -> bool {
        self.dir.join(ORIGIN).exists()
    }

    fn own_only(&self) -> Result<(), IssuerError> {
        let marker = self.dir.join(ORIGIN);
        match store::read_if_there(&marker)? {
            Some(origin) => Err(IssuerError::Copy {
                origin: String::from_utf8_lossy(&origin).into_owned(),
                marker,
            }),
            None => Ok(()),
        }
    }

    /// Moves what is there out of the way, and says where it is then.
    ///
    /// # Errors
    /// It can't be moved.
    pub fn set_aside(&self, mark: &str) -> Result<PathBuf, IssuerError> {
        let beside = |suffix: &str| {
            let mut aside = self.dir.as_os_str().to_owned();
            aside.push(format!(".replaced-{mark}{suffix}"));
            PathBuf::from(aside)
        };
        // It may have been there before: nothing is put in the place of a key.
        let mut aside = beside("");
        let mut count = 1_u32;
        while aside.exists() {
            count += 1;
            aside = beside(&format!("-{count}"));
        }
        store::rename(&self.dir, &aside)?;
        Ok(aside)
    }

    /// The authority at work, with the further roots of `old/`.
    ///
    /// # Errors
    /// The root has expired, or a root can't be read.
    pub fn issuer(&self, ca: &Ca, now: UnixTime) -> Result<Issuer, IssuerError> {
        let bundle = further_roots(&self.dir.join("old"), &ca.bundle()?)?;
        ca.issuer_trusting(bundle, now)
    }

    fn lock(&self) -> Result<FileLock, IssuerError> {
        store::create_dir(&self.dir)?;
        Ok(FileLock::hold(&self.dir.join(".lock"))?)
    }

    fn read(&self, trust_domain: &TrustDomain) -> Result<Option<Ca>, IssuerError> {
        let (key, next) = (self.dir.join(KEY), next_key_path(&self.dir.join(KEY)));
        if store::read_if_there(&self.dir.join(ROOT))?.is_none() {
            return Ok(None);
        }
        let mut files = Vec::new();
        for name in [ROOT, OLD, NOTES] {
            files.push((name, store::read_if_there(&self.dir.join(name))?));
        }
        let with = |key: Option<Vec<u8>>| {
            Ca::from_files(trust_domain, |name| match name {
                KEY => key.clone(),
                name => {
                    let named = files.iter().find(|(other, _)| *other == name);
                    named.and_then(|(_, text)| text.clone())
                }
            })
        };
        let read = with(store::read_if_there(&key)?);
        let lacks_its_key = matches!(
            read,
            Err(IssuerError::KeyMismatch | IssuerError::Missing(_))
        );
        // A crash between the certificate and its key: the key waits beside its place.
        if lacks_its_key && let Ok(ca) = with(store::read_if_there(&next)?) {
            store::rename(&next, &key)?;
            return Ok(Some(ca));
        }
        if matches!(read, Err(IssuerError::Missing(_))) {
            return Err(IssuerError::KeyMissing(key));
        }
        read.map(Some)
    }

    fn write(&self, ca: &Ca) -> Result<(), IssuerError> {
        for step in self.steps(ca)? {
            step.run()?;
        }
        Ok(())
    }

    fn steps(&self, ca: &Ca) -> Result<Vec<Step>, IssuerError> {
        let mut steps = Vec::new();
        let key = self.dir.join(KEY);
        for (name, text) in ca.to_files()? {
            let (path, mode) = match name {
                KEY => (next_key_path(&key), store::MODE_SECRET),
                name => (self.dir.join(name), store::MODE_PUBLIC),
            };
            steps.push(Step::Write(path, text.expose_secret().to_owned(), mode));
        }
        steps.push(Step::Rename(next_key_path(&key), key));
        Ok(steps)
    }
}

/// Those that are trusted anyway, and those of `dir/*.crt`.
fn further_roots(dir: &Path, root: &TrustBundle) -> Result<TrustBundle, IssuerError> {
    let listing = match std::fs::read_dir(dir) {
        Ok(listing) => listing,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(root.clone()),
        Err(source) => {
            return Err(StoreError::Read {
                path: dir.to_owned(),
                source,
            }
            .into());
        }
    };
    let mut paths = Vec::new();
    for entry in listing {
        let entry = entry.map_err(|source| StoreError::Read {
            path: dir.to_owned(),
            source,
        })?;
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "crt") {
            paths.push(path);
        }
    }
    paths.sort();
    let mut roots = root.roots().to_vec();
    for path in paths {
        let pem = store::read(&path)?;
        let old = certificates(&pem).map_err(|source| IssuerError::OldRoot { path, source })?;
        roots.extend(old);
    }
    Ok(TrustBundle::from_der(roots)?)
}

#[cfg(test)]
mod tests;
