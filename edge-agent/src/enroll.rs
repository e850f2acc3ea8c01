//! Who the agent is: its credential loaded, asked for with a token, and renewed in place.
//!
//! Invariant: what works goes on working. A renewal that fails leaves the credential that is, and one that can't be
//! kept on disk is used all the same.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use certs::{
    AgentFiles, Clock, Credential, EnrollError, EnrollRequest, Enrolled, Identity, LiveBundle,
    LiveCredential, Own, Proof, Role, Trust, TrustBundle,
};
use daemon::chain;
use secrecy::ExposeSecret;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::backoff::{Backoff, obey};
use crate::candidate::{Candidate, Candidates};
use crate::config::{Anchor, Config, CredentialFiles, Join, TokenSource};
use crate::error::{AppError, JoinError};
use crate::metrics::{AgentMetrics, ResultLabel};

/// How often the clock is looked at while a renewal is not due: a wrong clock may be put right meanwhile.
const LOOK: Duration = Duration::from_secs(60);

/// When the certificate ends, for its gauge. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Expiry(Arc<AtomicU64>);

impl Expiry {
    /// Unix time; 0 without a certificate.
    pub(crate) fn seconds(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self, credential: &Credential) {
        self.0
            .store(credential.not_after().as_secs(), Ordering::Relaxed);
    }
}

/// What the agent needs to come by its credential.
#[derive(Debug)]
pub(crate) struct Enrolment {
    identity: Identity,
    join: Option<Join>,
    operators: Option<CredentialFiles>,
    files: AgentFiles,
    clock: Clock,
    candidates: Arc<Candidates>,
    metrics: AgentMetrics,
    expiry: Expiry,
    backoff: Backoff,
}

impl Enrolment {
    pub(crate) fn new(
        config: &Config,
        candidates: Arc<Candidates>,
        metrics: AgentMetrics,
        expiry: Expiry,
    ) -> Self {
        let files = AgentFiles::new(&config.state_dir);
        let (domain, name) = (config.trust_domain.clone(), config.name.clone());
        Self {
            identity: Identity::new(domain, Role::Agent, name),
            join: config.join.clone(),
            operators: config.credential.clone(),
            clock: Clock::with_file(files.clock()),
            files,
            candidates,
            metrics,
            expiry,
            backoff: Backoff::new(config.backoff),
        }
    }

    pub(crate) const fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The files of a credential that somebody else renews.
    pub(crate) const fn operators(&self) -> Option<&CredentialFiles> {
        self.operators.as_ref()
    }

    /// The credential that is there: the operator's, or the one in the state directory.
    pub(crate) fn load(&self) -> Result<Option<Own>, AppError> {
        let loaded = match &self.operators {
            Some(files) => Some(self.read(files)?),
            None => match self.files.load() {
                Ok(loaded) => loaded,
                // With a token a new one can be had; without, somebody has to look.
                Err(error) if self.join.is_some() => {
                    tracing::warn!(error = %chain(&error), "the kept credential is unusable, enrolling again");
                    None
                }
                Err(source) => {
                    let dir = self.files.dir().to_owned();
                    return Err(AppError::State {
                        dir,
                        source: source.into(),
                    });
                }
            },
        };
        let Some((credential, bundle)) = loaded else {
            return match self.join {
                Some(_) => Ok(None),
                None => Err(AppError::NotEnrolled {
                    dir: self.files.dir().to_owned(),
                }),
            };
        };
        self.check(&credential)?;
        // What is mounted is newer than what was kept, or as old.
        let bundle = match self.mounted() {
            Some(Ok(mounted)) => mounted,
            Some(Err(error)) => {
                tracing::warn!(error = %chain(&error), "the kept trust bundle is used");
                bundle
            }
            None => bundle,
        };
        Ok(Some(self.own(credential, bundle)))
    }

    /// The file with the roots to trust, if there is one.
    pub(crate) fn ca_file(&self) -> Option<&PathBuf> {
        match &self.join.as_ref()?.anchor {
            Anchor::File(file) => Some(file),
            Anchor::Pin(_) => None,
        }
    }

    fn mounted(&self) -> Option<Result<TrustBundle, JoinError>> {
        self.ca_file().map(|file| roots(file))
    }

    /// What is trusted from now on, given that bundle: what is mounted stays trusted beside it. A file that is behind
    /// the servers, or ahead of the one that answered, thus cuts nobody off.
    fn with_mounted(&self, given: TrustBundle) -> TrustBundle {
        let mounted = self.mounted().and_then(Result::ok);
        mounted
            .and_then(|mounted| given.merge(&mounted).ok())
            .unwrap_or(given)
    }

    /// Reads the operator's files and checks them.
    pub(crate) fn read(
        &self,
        files: &CredentialFiles,
    ) -> Result<(Credential, TrustBundle), AppError> {
        let credential = Credential::load(&files.certificate, &files.key).map_err(|source| {
            AppError::Credential {
                file: files.certificate.clone(),
                source: source.into(),
            }
        })?;
        let bundle = TrustBundle::load(&files.ca).map_err(|source| AppError::Bundle {
            file: files.ca.clone(),
            source: source.into(),
        })?;
        self.check(&credential)?;
        Ok((credential, bundle))
    }

    fn check(&self, credential: &Credential) -> Result<(), AppError> {
        if *credential.identity() == self.identity {
            return Ok(());
        }
        let (found, wanted) = (credential.identity().to_string(), self.identity.to_string());
        Err(AppError::OtherIdentity { found, wanted })
    }

    fn own(&self, credential: Credential, bundle: TrustBundle) -> Own {
        self.expiry.set(&credential);
        Own {
            credential: LiveCredential::new(credential),
            bundle: LiveBundle::new(bundle),
            clock: self.clock.clone(),
            trust_domain: self.identity.trust_domain.clone(),
        }
    }

    /// Enrols, for as long as it takes: an operator may put a refused token right meanwhile.
    pub(crate) async fn join(&mut self) -> Own {
        let mut last = None;
        loop {
            let error = match self.join_once().await {
                Ok(enrolled) => {
                    let bundle = self.with_mounted(enrolled.bundle);
                    return self.own(enrolled.credential, bundle);
                }
                Err(error) => error,
            };
            let random = rand::random();
            let pause = if error.is_final() {
                self.backoff.hopeless(random)
            } else {
                self.backoff.failed(random)
            };
            let pause = obey(pause, retry_after(&error), rand::random());
            let said = chain(&error).to_string();
            // Once loud; the same again is for who looks.
            if last.as_ref() == Some(&said) {
                tracing::debug!(error = said, "not enrolled");
            } else if error.is_final() {
                tracing::error!(
                    error = said,
                    "not enrolled, and trying again does not help unless this is put right"
                );
            } else {
                tracing::warn!(error = said, "not enrolled yet");
            }
            last = Some(said);
            sleep(pause).await;
        }
    }

    /// Asks each server once, until one gives a certificate: a token is known to the server that made it, and that may be
    /// any of them.
    pub(crate) async fn join_once(&self) -> Result<Enrolled, JoinError> {
        let Some(join) = &self.join else {
            return Err(JoinError::NoAddress);
        };
        let (trust, proof) = (trust(&join.anchor)?, proof(&join.token)?);
        let mut last = JoinError::NoAddress;
        for Candidate {
            address: server, ..
        } in self.candidates.refresh().await
        {
            let request = EnrollRequest {
                server,
                trust: &trust,
                proof: &proof,
                name: &self.identity.name,
                trust_domain: &self.identity.trust_domain,
                files: &self.files,
                clock: &self.clock,
            };
            match certs::enroll(&request).await {
                Ok(enrolled) => {
                    self.given(&enrolled, "enrolled");
                    return Ok(enrolled);
                }
                Err(source) => last = JoinError::Server { server, source },
            }
        }
        Err(last)
    }

    async fn renew_once(&self, own: &Own) -> Result<Enrolled, JoinError> {
        let mut last = JoinError::NoAddress;
        for Candidate {
            address: server, ..
        } in self.candidates.refresh().await
        {
            match certs::renew(server, own, &self.files).await {
                Ok(enrolled) => {
                    self.given(&enrolled, "certificate renewed");
                    return Ok(enrolled);
                }
                Err(source) => last = JoinError::Server { server, source },
            }
        }
        // Off for longer than the grace, of a node that is gone, or of an authority that is: the token, if there is one, is
        // what is left.
        if matches!(
            last.server_error(),
            Some(EnrollError::TooLate | EnrollError::NodeGone | EnrollError::UnknownAuthority)
        ) && self.join.is_some()
        {
            tracing::warn!(error = %chain(&last), "the certificate can't be renewed, enrolling again");
            return self.join_once().await;
        }
        Err(last)
    }

    fn given(&self, enrolled: &Enrolled, what: &'static str) {
        let not_after = crate::status::timestamp(enrolled.credential.not_after());
        tracing::info!(
            name = %self.identity.name, serial = enrolled.credential.serial(), not_after,
            skew_seconds = enrolled.skew_seconds, "{what}"
        );
        if let Err(error) = &enrolled.stored {
            tracing::error!(
                error = %chain(error),
                "the new certificate can't be kept on disk; it is used until the next restart"
            );
        }
    }

    /// Renews the credential at two thirds of its life and swaps it in place; `renewed` counts. One whose node, a server
    /// says in `gone`, is not there any more is replaced by a new enrolment at once, if there is a way to one. One whose
    /// authority a server does not know, it says in `unknown`, is renewed at once, or replaced likewise.
    pub(crate) async fn keep_renewed(
        self,
        own: Own,
        renewed: watch::Sender<u64>,
        mut gone: watch::Receiver<String>,
        mut unknown: watch::Receiver<String>,
    ) {
        loop {
            let credential = own.credential.load();
            let mut anew = tokio::select! {
                () = due(&own, credential.renew_at(rand::random()).as_secs()) => false,
                () = self.refused(&credential, &mut gone) => {
                    tracing::warn!("the node of this certificate is no longer in the cluster, enrolling again");
                    true
                }
                () = self.refused(&credential, &mut unknown) => {
                    tracing::warn!("a server does not trust the authority of this certificate, renewing it");
                    false
                }
            };
            let mut attempt = 0_u32;
            let enrolled = loop {
                let tried = if anew {
                    self.join_once().await
                } else {
                    self.renew_once(&own).await
                };
                match tried {
                    Ok(enrolled) => break enrolled,
                    Err(error) => {
                        attempt = attempt.saturating_add(1);
                        self.metrics
                            .renewals
                            .get_or_create(&ResultLabel::ERROR)
                            .inc();
                        let left = own.credential.not_after().as_secs();
                        let left = left.saturating_sub(own.clock.now().as_secs());
                        let left = Duration::from_secs(left);
                        let pause = certs::retry_after(attempt, left, rand::random());
                        let pause = obey(pause, retry_after(&error), rand::random());
                        tracing::warn!(
                            error = %chain(&error), attempt, left_s = left.as_secs(),
                            pause_s = pause.as_secs(), "certificate not renewed, the old one goes on"
                        );
                        tokio::select! {
                            () = sleep(pause) => {}
                            () = self.refused(&credential, &mut gone), if !anew => anew = true,
                        }
                    }
                }
            };
            self.metrics.renewals.get_or_create(&ResultLabel::OK).inc();
            self.expiry.set(&enrolled.credential);
            own.bundle.replace(self.with_mounted(enrolled.bundle));
            own.credential.replace(enrolled.credential);
            renewed.send_modify(|count| *count += 1);
        }
    }

    /// Resolves once a server has refused this very certificate for good, if another can be had.
    async fn refused(&self, credential: &Credential, said: &mut watch::Receiver<String>) {
        let refused = said.wait_for(|refused| refused == credential.fingerprint());
        if refused.await.is_err() || self.join.is_none() {
            std::future::pending::<()>().await;
        }
    }
}

/// Waits for that time. The clock is looked at again and again: a wrong one may be put right meanwhile.
async fn due(own: &Own, at: u64) {
    while own.clock.now().as_secs() < at {
        let left = Duration::from_secs(at.saturating_sub(own.clock.now().as_secs()));
        sleep(left.min(LOOK)).await;
    }
}

fn trust(anchor: &Anchor) -> Result<Trust, JoinError> {
    match anchor {
        Anchor::Pin(pin) => Ok(Trust::Pin(*pin)),
        Anchor::File(file) => Ok(Trust::Bundle(roots(file)?)),
    }
}

/// Reads a file of roots.
pub(crate) fn roots(file: &Path) -> Result<TrustBundle, JoinError> {
    TrustBundle::load(file).map_err(|source| JoinError::CaFile {
        file: file.to_owned(),
        source: source.into(),
    })
}

fn proof(source: &TokenSource) -> Result<Proof, JoinError> {
    let read = |file: &Path| {
        fs::read_to_string(file).map_err(|source| JoinError::TokenFile {
            file: file.to_owned(),
            source,
        })
    };
    match source {
        TokenSource::Value(value) => Ok(Proof::Join(value.expose_secret().trim().parse()?)),
        TokenSource::File(file) => {
            let text = read(file)?;
            // What `proxy-server token create` prints may have been redirected whole.
            let line = text.lines().next().unwrap_or_default();
            Ok(Proof::Join(line.trim().parse()?))
        }
        TokenSource::ServiceAccount(file) => Ok(Proof::ServiceAccount(read(file)?.trim().parse()?)),
    }
}

const fn retry_after(error: &JoinError) -> Duration {
    match error.server_error() {
        Some(EnrollError::RateLimited { after }) => *after,
        Some(_) | None => Duration::ZERO,
    }
}
