//! The authority at work in this server, and what follows from it: the server's own leaf, whom it trusts and whom it
//! refuses. All of it is replaced in place when the authority is rotated; sessions are not touched.

use std::collections::HashSet;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use certs::{
    Ca, CaDir, Clock, IssuerError, LiveBundle, LiveCredential, LiveIssuer, Name, Own, Pin,
    Revocations, ServerSans, Store, UnixTime,
};
use daemon::{Reload, Watch, WatchOptions};
use parking_lot::Mutex;
use proto::AgentName;
use tokio::time::sleep;

use crate::config::Config;
use crate::metrics::{CertificateLabels, Metrics};

/// How often it is looked whether an older root is to leave: that is decided in days.
const LOOK: Duration = Duration::from_secs(3600);

/// The authority and what follows from it.
#[derive(Debug)]
pub(crate) struct Authority {
    pub(crate) issuer: LiveIssuer,
    pub(crate) own: Own,
    pub(crate) store: Store,
    pub(crate) revoked: Revocations,
    /// As it was last taken over.
    taken: Mutex<Ca>,
    dir: CaDir,
    name: Name,
    sans: ServerSans,
    shown: PathBuf,
    metrics: Arc<Metrics>,
}

/// An authority is not taken over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TakeError {
    /// Nothing says that it comes from ours.
    #[error(
        "the authority was replaced by one that does not come from ours by a rotation: {found} in place of {ours}; a restart of this server adopts it"
    )]
    Foreign {
        /// The new one.
        found: Pin,
        /// The one at work.
        ours: Pin,
    },
    /// It can't be used.
    #[error("use the authority")]
    Issuer(#[from] IssuerError),
}

/// Where the authority's files are.
pub(crate) fn dir(config: &Config) -> CaDir {
    CaDir::new(config.state_dir.join("ca"))
}

impl Authority {
    /// Opens the state directory, making the authority on the first start unless it was `obtained` elsewhere. The
    /// server's leaf is made anew at each start: its key never touches the disk.
    pub(crate) fn open(
        config: &Config,
        obtained: Option<Ca>,
        metrics: Arc<Metrics>,
    ) -> anyhow::Result<Self> {
        let clock = Clock::system();
        let now = clock.now();
        let dir = dir(config);
        let opened = || format!("open the authority in {}", dir.path().display());
        let ca = match obtained {
            Some(ca) => ca,
            None => dir
                .load_or_create(&config.trust_domain, now)
                .with_context(opened)?,
        };
        let issuer = dir.issuer(&ca, now).with_context(opened)?;
        let store = Store::open(&config.state_dir)
            .with_context(|| format!("open the token store in {}", config.state_dir.display()))?;
        let name = config.server_name().context("read the server's name")?;
        let sans = ServerSans {
            dns_names: config.certificate.dns_names.clone(),
            ip_addresses: config.certificate.ip_addresses.clone(),
        };
        let credential = issuer
            .issue_server(&name, &sans, now)
            .context("issue the server's certificate")?;
        let own = Own {
            credential: LiveCredential::new(credential),
            bundle: LiveBundle::new(issuer.bundle().clone()),
            clock,
            trust_domain: config.trust_domain.clone(),
        };
        let authority = Self {
            issuer: Arc::new(issuer).into(),
            own,
            store,
            revoked: Revocations::new(),
            taken: Mutex::new(ca),
            dir,
            name,
            sans,
            shown: config.state_dir.join("server.crt"),
            metrics,
        };
        authority.show();
        authority.export();
        Ok(authority)
    }

    /// The secret by which servers of this authority, later processes of this one among them, know each other's sessions.
    pub(crate) fn quic_secret(&self) -> [u8; 32] {
        self.issuer
            .load()
            .secret_for("quic: connection ids and resets")
    }

    /// Keeps the chain, without its key, where `cert show` finds it.
    fn show(&self) {
        let chain = self.own.credential.load().chain_pem();
        if let Err(error) = certs::write_atomic(&self.shown, chain.as_bytes(), certs::MODE_PUBLIC) {
            tracing::warn!(error = %daemon::chain(&error), "could not store the server's certificate; it is used all the same");
        }
    }

    /// Reads revocations and enrolled agents again.
    pub(crate) fn refresh(
        &self,
    ) -> Result<(HashSet<Name>, HashSet<AgentName>), certs::TokenStoreError> {
        let snapshot = self.store.snapshot()?;
        self.revoked.replace(snapshot.revoked.clone());
        let enrolled = snapshot
            .agents
            .keys()
            .filter_map(|name| name.as_str().parse().ok())
            .collect();
        Ok((snapshot.revoked, enrolled))
    }

    fn export(&self) {
        let set = |certificate, at: UnixTime| {
            let expiry = &self.metrics.expiry;
            let gauge = expiry
                .get_or_create(&CertificateLabels { certificate })
                .clone();
            gauge.set(i64::try_from(at.as_secs()).unwrap_or(i64::MAX));
        };
        let issuer = self.issuer.load();
        set("ca", issuer.not_after());
        set("server", self.own.credential.not_after());
        let roots = issuer.bundle().roots().len();
        let roots = i64::try_from(roots).unwrap_or(i64::MAX);
        self.metrics.roots.set(roots);
    }

    /// The authority as it was last taken over.
    pub(crate) fn taken(&self) -> Ca {
        self.taken.lock().clone()
    }

    /// Works with `ca` from now on. Says whether anything has changed.
    ///
    /// More is trusted before anything is signed anew, so that nobody meets a certificate of ours that we would not
    /// take.
    pub(crate) fn take(&self, ca: &Ca) -> Result<bool, TakeError> {
        let mut taken = self.taken.lock();
        if *taken == *ca {
            return Ok(false);
        }
        let (found, ours) = (ca.pin(), taken.pin());
        if !ca.follows(ours) {
            return Err(TakeError::Foreign { found, ours });
        }
        let now = self.own.clock.now();
        let issuer = self.dir.issuer(ca, now)?;
        let credential = issuer.issue_server(&self.name, &self.sans, now)?;
        tracing::info!(target: "audit", pin = %found, trusted = ?issuer.bundle().pins(), "authority taken over");
        self.own.bundle.replace(issuer.bundle().clone());
        self.own.credential.replace(credential);
        self.issuer.replace(Arc::new(issuer));
        *taken = ca.clone();
        drop(taken);
        self.show();
        self.export();
        Ok(true)
    }

    /// Keeps a copy of what was taken over from elsewhere, for a start while that is away.
    pub(crate) fn keep_copy(&self, origin: &str) -> Result<(), IssuerError> {
        self.dir.save_copy(&self.taken(), origin)
    }

    /// Follows the directory, where the authority is kept there: takes over what `ca rotate` has written, and ends the
    /// trust in older roots when it is time. For ever.
    pub(crate) async fn follow_dir(self: Arc<Self>) -> Infallible {
        let never = Reload::never();
        let mut watch = Watch::new(self.dir.files(), WatchOptions::default(), never);
        loop {
            let authority = Arc::clone(&self);
            let read = tokio::task::spawn_blocking(move || authority.read_dir()).await;
            if let Ok(Err(error)) = read {
                self.metrics.authority_failures.inc();
                tracing::error!(error = %daemon::chain(&error), "the authority's files are not taken over, the one at work goes on");
            }
            tokio::select! {
                _ = watch.changed() => {}
                () = sleep(LOOK) => {}
            }
        }
    }

    fn read_dir(&self) -> Result<(), TakeError> {
        let now = self.own.clock.now();
        let retired = |ca: &Ca| {
            Ok(if ca.is_due(now) {
                ca.retire()
            } else {
                ca.clone()
            })
        };
        let ca = self.dir.update(&self.own.trust_domain, retired)?;
        self.take(&ca)?;
        Ok(())
    }

    /// Renews the server's leaf at two thirds of its life, for ever; swapped in place.
    #[expect(clippy::infinite_loop, reason = "ended by being dropped")]
    pub(crate) async fn keep_renewed(self: Arc<Self>) -> Infallible {
        let mut failures = 0;
        loop {
            let now = self.own.clock.now().as_secs();
            let current = self.own.credential.load();
            let wait = if failures == 0 {
                let at = current.renew_at(rand::random()).as_secs();
                Duration::from_secs(at.saturating_sub(now))
            } else {
                let left = Duration::from_secs(current.not_after().as_secs().saturating_sub(now));
                certs::retry_after(failures, left, rand::random())
            };
            sleep(wait).await;
            match self.renew() {
                Ok(()) => {
                    failures = 0;
                    self.show();
                    self.export();
                    tracing::info!("the server's certificate is renewed");
                }
                Err(error) => {
                    failures += 1;
                    tracing::error!(error = %daemon::chain(&error), "could not renew the server's certificate");
                }
            }
        }
    }

    fn renew(&self) -> Result<(), IssuerError> {
        // Held, so that a leaf of an older authority never takes the place of a newer one's.
        let _taken = self.taken.lock();
        let issuer = self.issuer.load();
        let credential = issuer.issue_server(&self.name, &self.sans, self.own.clock.now())?;
        self.own.credential.replace(credential);
        Ok(())
    }
}
