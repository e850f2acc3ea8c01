//! What changes while the agent runs: servers, policy and log level from the configuration file, the operator's
//! credential files, and the roots to trust where a file says them. Sessions and streams are not touched.
//!
//! Invariant: what is wrong is refused as a whole, logged and counted, and what was stays.

use std::path::PathBuf;
use std::sync::Arc;

use certs::{Credential, LiveBundle, Own, TrustBundle};
use daemon::{Change, LogHandle, Reload, Watch, WatchOptions, chain};
use tokio::sync::watch;

use crate::candidate::Candidates;
use crate::config::{self, Config, Overrides};
use crate::enroll::{Enrolment, Expiry, roots};
use crate::metrics::{AgentMetrics, ResultLabel};
use crate::policy::Policy;
use crate::serve::Serving;

/// Where the configuration came from, to read it again.
#[derive(Debug, Clone)]
pub struct ConfigSource {
    /// The file.
    pub file: PathBuf,
    /// Flags and variables that go before it.
    pub overrides: Overrides,
    /// Asks for a reload whatever the file says (SIGHUP).
    pub reload: Reload,
}

/// The configuration as it is applied now.
pub(crate) struct Reloading {
    pub(crate) source: ConfigSource,
    pub(crate) config: Config,
    pub(crate) serving: Arc<Serving>,
    pub(crate) candidates: Arc<Candidates>,
    pub(crate) log: LogHandle,
    pub(crate) metrics: AgentMetrics,
}

impl Reloading {
    /// Watches the configuration file, for ever.
    #[expect(clippy::infinite_loop, reason = "ends with its task")]
    pub(crate) async fn run(mut self, options: WatchOptions) {
        let file = self.source.file.clone();
        let mut watch = Watch::new([file], options, self.source.reload.clone());
        loop {
            let _change: Change = watch.changed().await;
            match config::load(&self.source.file, &self.source.overrides) {
                Ok(new) => {
                    self.apply(new).await;
                    self.metrics.reloads.get_or_create(&ResultLabel::OK).inc();
                }
                Err(error) => {
                    self.metrics
                        .reloads
                        .get_or_create(&ResultLabel::ERROR)
                        .inc();
                    tracing::error!(error = %chain(&error), "configuration refused, the old one stays");
                }
            }
        }
    }

    async fn apply(&mut self, new: Config) {
        let fixed = self.config.fixed_differences(&new);
        if !fixed.is_empty() {
            tracing::warn!(
                keys = fixed.join(", "),
                "these keys take effect with the next start"
            );
        }
        self.serving.policy.store(Arc::new(Policy::from(&new)));
        if new.servers != self.config.servers {
            self.candidates.replace(new.servers.clone()).await;
            self.candidates.refresh().await;
        }
        if new.log_level != self.config.log_level
            && let Err(error) = self.log.set(&new.log_level)
        {
            tracing::error!(error = %chain(&error), "log level not changed");
        }
        tracing::info!(file = %self.source.file.display(), "configuration reloaded");
        self.config = new;
    }
}

/// The file with the roots to trust.
pub(crate) struct Roots {
    pub(crate) file: PathBuf,
    pub(crate) bundle: LiveBundle,
    pub(crate) metrics: AgentMetrics,
}

impl Roots {
    /// Watches the file, for ever. What it says is trusted from the next handshake on, and nothing else.
    #[expect(clippy::infinite_loop, reason = "ends with its task")]
    pub(crate) async fn run(self, options: WatchOptions, reload: Reload) {
        let mut watch = Watch::new([self.file.clone()], options, reload);
        loop {
            let _change: Change = watch.changed().await;
            let result = match roots(&self.file) {
                Ok(bundle) => {
                    tracing::info!(roots = ?bundle.pins(), "trust bundle reloaded");
                    self.bundle.replace(bundle);
                    ResultLabel::OK
                }
                Err(error) => {
                    tracing::error!(error = %chain(&error), "trust bundle refused, the old one stays");
                    ResultLabel::ERROR
                }
            };
            self.metrics.reloads.get_or_create(&result).inc();
        }
    }
}

/// The operator's credential files.
pub(crate) struct Operators {
    pub(crate) enrolment: Enrolment,
    pub(crate) own: Own,
    pub(crate) expiry: Expiry,
    pub(crate) renewed: watch::Sender<u64>,
    pub(crate) metrics: AgentMetrics,
}

impl Operators {
    /// Watches the files, for ever.
    #[expect(clippy::infinite_loop, reason = "ends with its task")]
    pub(crate) async fn run(self, options: WatchOptions, reload: Reload) {
        let Some(files) = self.enrolment.operators().cloned() else {
            return;
        };
        let all = [&files.certificate, &files.key, &files.ca].map(Clone::clone);
        let mut watch = Watch::new(all, options, reload);
        loop {
            let _change: Change = watch.changed().await;
            let result = match self.enrolment.read(&files) {
                Ok((credential, bundle)) => {
                    self.apply(credential, bundle);
                    ResultLabel::OK
                }
                Err(error) => {
                    tracing::error!(error = %chain(&error), "credential refused, the old one stays");
                    ResultLabel::ERROR
                }
            };
            self.metrics.reloads.get_or_create(&result).inc();
        }
    }

    fn apply(&self, credential: Credential, bundle: TrustBundle) {
        self.own.bundle.replace(bundle);
        if credential.fingerprint() == self.own.credential.load().fingerprint() {
            return;
        }
        tracing::info!(serial = credential.serial(), "credential reloaded");
        self.expiry.set(&credential);
        self.own.credential.replace(credential);
        self.renewed.send_modify(|count| *count += 1);
    }
}
