//! `redirect --run` once it has begun: the table is what the nodes and `routes` say, whatever happens to it.
//!
//! | event | what happens |
//! | --- | --- |
//! | nodes come, change or go; `routes` are reloaded | the sets are changed in one transaction, by the difference |
//! | ports are reloaded, or CIDRs come or go | the whole table is replaced in one transaction |
//! | kube-apiserver is away | nothing: the last known nodes stay |
//! | the table vanished or is another (`nft flush ruleset`, somebody's edit) | noticed within [`CHECK`], said, replaced |
//! | `nft` fails | said once; tried again at the next check; what the kernel has stays |
//! | a reload that is wrong | said; the old settings stay |
//! | a changed `kubernetes`, `direct.mark`, `lines` or `path` | said; taken at the next start, as the server does |

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use daemon::{Reload, WatchOptions};
use ipnet::IpNet;
use tokio::sync::watch::Receiver;
use tokio::time::{MissedTickBehavior, interval};

use super::nft::{self, NftError};
use super::report::{Report, Shown};
use super::ruleset::Ruleset;
use super::{Command, Settings};
use crate::cluster::Cluster;
use crate::commands::say;
use crate::config::{self, Config, Overrides};
use crate::path::direct;

/// How often the kernel's table is compared: a few ms of work, and 5 ms more for each 1,000 addresses.
const CHECK: Duration = Duration::from_secs(5);
/// So many addresses that are newly left out are told; the rest is counted.
const TOLD: usize = 20;

/// Keeps the table right.
#[derive(Debug)]
pub(super) struct Keeper {
    file: PathBuf,
    overrides: Overrides,
    config: Config,
    settings: Settings,
    cluster: Arc<Cluster>,
    /// Since before the first plan, so that none is missed.
    changes: Receiver<()>,
    /// Addresses of a table that a killed run has left; they stay until the nodes are known.
    left: Vec<IpNet>,
    /// This machine's addresses.
    own: Vec<IpAddr>,
    applied: Option<Applied>,
    told: BTreeSet<Shown>,
    noted: Vec<String>,
    failing: bool,
}

/// What the kernel was given, and how it shows that.
#[derive(Debug)]
struct Applied {
    ruleset: Ruleset,
    seen: Option<String>,
}

impl Keeper {
    pub(super) fn new(
        command: &Command,
        config: Config,
        settings: Settings,
        cluster: Arc<Cluster>,
    ) -> Self {
        Self {
            file: command.file.clone(),
            overrides: command.overrides.clone(),
            config,
            settings,
            changes: cluster.changes(),
            cluster,
            left: Vec::new(),
            own: Vec::new(),
            applied: None,
            told: BTreeSet::new(),
            noted: Vec::new(),
            failing: false,
        }
    }

    /// Shows the rules, and makes the table.
    pub(super) async fn begin(&mut self) -> Result<(), NftError> {
        if self.cluster.is_waiting() {
            self.left = nft::addresses().await?.unwrap_or_default();
            tracing::warn!(
                left = self.left.len(),
                "the cluster's nodes are not known yet: `routes` and the addresses that an earlier run has left are led"
            );
        }
        let (ruleset, report) = self.plan();
        say(&report.text());
        self.tell(&report);
        self.bring(ruleset).await
    }

    /// For ever.
    pub(super) async fn keep(mut self, reload: Reload) -> Infallible {
        let files = [self.file.clone()];
        let mut settings = daemon::Watch::new(files, WatchOptions::default(), reload);
        let mut checks = interval(CHECK);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let mut look = false;
            tokio::select! {
                // Its sender is in `self.cluster`.
                Ok(()) = self.changes.changed() => {}
                _ = settings.changed() => self.reload(),
                _ = checks.tick() => look = true,
            }
            match self.round(look).await {
                Ok(()) if std::mem::take(&mut self.failing) => {
                    tracing::info!("the rules can be kept right again");
                }
                Ok(()) => {}
                Err(error) if !std::mem::replace(&mut self.failing, true) => {
                    tracing::error!(error = %daemon::chain(&error), "the rules can't be kept right; what the kernel has stays");
                }
                Err(_told) => {}
            }
        }
    }

    async fn round(&mut self, look: bool) -> Result<(), NftError> {
        if look {
            self.check().await?;
            if self.applied.is_some() && self.own == direct::interfaces() {
                return Ok(());
            }
        }
        let (ruleset, report) = self.plan();
        self.tell(&report);
        self.bring(ruleset).await
    }

    fn plan(&mut self) -> (Ruleset, Report) {
        if !self.cluster.is_waiting() {
            self.left = Vec::new();
        }
        self.own = direct::interfaces();
        let table = self.cluster.table();
        self.settings.plan(&table, &self.own, &self.left)
    }

    /// Forgets what was applied if the kernel has it no more.
    async fn check(&mut self) -> Result<(), NftError> {
        let Some(applied) = &self.applied else {
            return Ok(());
        };
        let now = nft::look().await?;
        if now.is_none() || now != applied.seen {
            let what = if now.is_some() { "changed" } else { "removed" };
            tracing::warn!("somebody has {what} the rules; they are put back");
            self.applied = None;
        }
        Ok(())
    }

    /// Makes the kernel's table the wanted one.
    async fn bring(&mut self, wanted: Ruleset) -> Result<(), NftError> {
        let applied = self.applied.take();
        let had = applied
            .as_ref()
            .map_or(0, |applied| applied.ruleset.addresses.len());
        match applied {
            Some(applied) if applied.ruleset == wanted => {
                self.applied = Some(applied);
                return Ok(());
            }
            Some(applied) => match applied.ruleset.update(&wanted) {
                Some(change) => {
                    tracing::debug!(%change, "changing the sets");
                    match nft::load(&change).await {
                        // The table is not what it was: all of it is made anew.
                        Err(NftError::Refused { .. }) => nft::apply(&wanted).await?,
                        done => done?,
                    }
                }
                None => nft::apply(&wanted).await?,
            },
            None => nft::apply(&wanted).await?,
        }
        let addresses = wanted.addresses.len();
        tracing::info!(addresses, had, "the rules are in place");
        self.applied = Some(Applied {
            seen: nft::look().await?,
            ruleset: wanted,
        });
        Ok(())
    }

    /// Logs what is newly left out, and what is no more.
    fn tell(&mut self, report: &Report) {
        let now: BTreeSet<Shown> = report.left_out.iter().cloned().collect();
        let new: Vec<_> = now.difference(&self.told).collect();
        for left in new.iter().take(TOLD) {
            if left.is_meant {
                tracing::info!("left out: {}", left.line());
            } else {
                tracing::warn!("left out: {}", left.line());
            }
        }
        if let Some(more) = new.len().checked_sub(TOLD).filter(|more| *more > 0) {
            tracing::warn!("left out: {more} more addresses (`redirect --dry-run` has all)");
        }
        for back in self.told.difference(&now).take(TOLD) {
            tracing::info!("left out no more: {}", back.line());
        }
        self.told = now;
        for note in report
            .notes
            .iter()
            .filter(|note| !self.noted.contains(note))
        {
            tracing::warn!("{note}");
        }
        self.noted.clone_from(&report.notes);
    }

    fn reload(&mut self) {
        let loaded = config::load(&self.file, &self.overrides);
        let loaded = loaded.map_err(super::RedirectError::from);
        let new = loaded.and_then(|new| Ok((Settings::new(&self.file, &new)?, new)));
        match new {
            Ok((settings, new)) => {
                let old = &self.config;
                let is_late = new.kubernetes != old.kubernetes
                    || new.mark() != old.mark()
                    || new.lines != old.lines
                    || new.path != old.path;
                if is_late {
                    tracing::warn!(
                        "changed `kubernetes`, `direct`, `lines` and `path` take effect at the next start only"
                    );
                }
                self.settings.routes = settings.routes;
                self.settings.leads = settings.leads;
                self.config = new;
                tracing::info!("configuration reloaded");
            }
            Err(error) => {
                tracing::error!(error = %daemon::chain(&error), "the new configuration is refused, the old one stays");
            }
        }
    }
}
