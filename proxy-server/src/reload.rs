//! What changes without a restart: routes, log level, the operator's CA, tokens and passwords, who may ask
//! for what, revocations. Sessions
//! and streams are not touched. A reload that is wrong is refused as a whole and the old settings stay.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use arc_swap::ArcSwap;
use certs::{FrontendTrust, OperatorPki, Own, TrustBundle};
use daemon::{Change, LogHandle, Reload, Watch, WatchOptions};
use proto::Destination;
use rustls::ServerConfig;
use tokio::sync::watch;

use crate::authority::Authority;
use crate::backend::Backend;
use crate::config::{self, Config, Frontend, Overrides};
use crate::frontend::LiveTls;
use crate::frontend::credentials::Credentials;
use crate::frontend::forward_proxy::ForwardProxy;
use crate::frontend::http_connect::HttpConnect;
use crate::frontend::intercept::Intercept;
use crate::frontend::konnectivity::Konnectivity;
use crate::route::RouteTable;

/// Where the configuration comes from; `None` for an app that was given values.
#[derive(Debug, Clone)]
pub struct Source {
    /// The file.
    pub file: Option<PathBuf>,
    /// What goes over it.
    pub overrides: Overrides,
}

/// One frontend's parts that can change.
#[derive(Debug)]
pub(crate) struct Changeable {
    pub(crate) tls: Option<LiveTls>,
    pub(crate) connect: Option<Arc<HttpConnect>>,
    pub(crate) konnectivity: Option<Arc<Konnectivity>>,
    pub(crate) proxy: Option<Arc<ForwardProxy>>,
    pub(crate) intercept: Option<Arc<Intercept>>,
}

/// What a reload applies to.
#[derive(Debug)]
pub(crate) struct Reloader {
    pub(crate) source: Source,
    pub(crate) running: Config,
    pub(crate) log: LogHandle,
    pub(crate) authority: Arc<Authority>,
    pub(crate) backend: Arc<Backend>,
    /// The configured members, where there are peers.
    pub(crate) named_peers: Option<watch::Sender<Vec<Destination>>>,
    /// In the order of `running.frontends`.
    pub(crate) frontends: Vec<Changeable>,
}

/// TLS of a frontend; `None` on a Unix socket.
pub(crate) fn frontend_tls(
    own: &Own,
    frontend: &Frontend,
) -> anyhow::Result<Option<Arc<ServerConfig>>> {
    if !matches!(frontend.listen(), daemon::Listen::Tcp(_)) {
        return Ok(None);
    }
    let (client_ca, names, optional) = match frontend {
        Frontend::Konnectivity { .. } => return Ok(None),
        Frontend::HttpConnect {
            client_ca,
            allowed_names,
            ..
        } => (client_ca, allowed_names, false),
        Frontend::ForwardProxy {
            client_ca,
            allowed_names,
            ..
        } => (client_ca, allowed_names, true),
        // The TLS that comes there is the nodes'.
        Frontend::Intercept(_) => return Ok(None),
    };
    let trust = match client_ca {
        None => FrontendTrust::Ours,
        Some(file) => {
            let roots = TrustBundle::load(file)
                .with_context(|| format!("read the CA in {}", file.display()))?;
            FrontendTrust::Operator(
                OperatorPki::new(roots, names.clone()).context("use allowedNames")?,
            )
        }
    };
    let tls = if optional {
        certs::frontend_server_optional(own, &trust)
    } else {
        certs::frontend_server(own, &trust)
    };
    Ok(Some(tls.context("build the TLS settings of a frontend")?))
}

/// Tokens and passwords of a frontend.
pub(crate) fn frontend_credentials(frontend: &Frontend) -> anyhow::Result<Credentials> {
    match frontend {
        Frontend::HttpConnect { .. } | Frontend::Konnectivity { .. } | Frontend::Intercept(_) => {
            Ok(Credentials::default())
        }
        Frontend::ForwardProxy {
            bearer_token_file,
            basic_auth_file,
            ..
        } => Ok(Credentials::load(
            bearer_token_file.as_deref(),
            basic_auth_file.as_deref(),
        )?),
    }
}

impl Reloader {
    fn files(&self) -> Vec<PathBuf> {
        let named = self.running.frontends.iter().flat_map(Frontend::files);
        self.source.file.iter().cloned().chain(named).collect()
    }

    /// Watches and applies, for ever.
    pub(crate) async fn run(mut self, reload: Reload) -> Infallible {
        let mut settings = Watch::new(self.files(), WatchOptions::default(), reload);
        let store = [self.authority.store.path().to_owned()];
        let mut store = Watch::new(store, WatchOptions::default(), Reload::never());
        loop {
            tokio::select! {
                change = settings.changed() => {
                    let result = self.apply();
                    self.backend.forwarder.metrics.reloaded(result.is_ok());
                    match result {
                        Ok(()) => {
                            let asked = change == Change::Requested;
                            tracing::info!(asked, "configuration reloaded");
                            settings.replace(self.files());
                        }
                        Err(error) => tracing::error!(error = format!("{error:#}"), "the new configuration is refused, the old one stays"),
                    }
                }
                _ = store.changed() => self.refresh(),
            }
        }
    }

    /// Builds everything first, so that nothing is half applied.
    fn apply(&mut self) -> anyhow::Result<()> {
        let new = match &self.source.file {
            Some(file) => config::load(file, &self.source.overrides)?,
            None => self.running.clone(),
        };
        let kind = std::mem::discriminant::<Frontend>;
        let same = |a: &Frontend, b: &Frontend| {
            a.listen() == b.listen() && kind(a) == kind(b) && a.transparent() == b.transparent()
        };
        let frontends_fit = new.frontends.len() == self.frontends.len()
            && new
                .frontends
                .iter()
                .zip(&self.running.frontends)
                .all(|(a, b)| same(a, b));
        anyhow::ensure!(
            frontends_fit,
            "frontends can't be added, removed or moved without a restart"
        );
        let own = &self.authority.own;
        let built = new
            .frontends
            .iter()
            .map(|frontend| {
                Ok((
                    frontend_tls(own, frontend)?,
                    frontend_credentials(frontend)?,
                ))
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        self.log.set(&new.log.level).context("log.level")?;
        let parts = self.frontends.iter().zip(&new.frontends).zip(built);
        for ((changeable, frontend), (tls, credentials)) in parts {
            if let (Some(connect), Frontend::HttpConnect { default, .. }) =
                (&changeable.connect, frontend)
            {
                connect.elsewhere.store(Arc::new(*default));
            }
            if let (Some(intercept), Frontend::Intercept(new)) = (&changeable.intercept, frontend) {
                intercept.change(new);
                intercept.policy.store(Arc::new(frontend.policy()));
            }
            if let (Some(konnectivity), Frontend::Konnectivity { default, .. }) =
                (&changeable.konnectivity, frontend)
            {
                konnectivity.elsewhere.store(Arc::new(*default));
                konnectivity.policy.store(Arc::new(frontend.policy()));
            }
            if let Some(connect) = &changeable.connect {
                connect.policy.store(Arc::new(frontend.policy()));
            }
            if let (Some(live), Some(tls)) = (&changeable.tls, tls) {
                live.store(tls);
            }
            if let Some(proxy) = &changeable.proxy {
                proxy.credentials.store(Arc::new(credentials));
                proxy.policy.store(Arc::new(frontend.policy()));
            }
        }
        let table = RouteTable::new(&new.routes);
        self.backend.forwarder.routing.table.store(Arc::new(table));
        if let (Some(named), Some(peers)) = (&self.named_peers, &new.peers) {
            named.send_replace(peers.destinations());
        }
        if needs_restart(&self.running, &new) {
            tracing::warn!(
                "some changed settings take effect at the next start only: stateDir, name, trustDomain, log.format, certificate, backend, limits, timeouts, drain, observe, admin, kubernetes, direct, lines, path, peers (but for servers)"
            );
        }
        for useless in new.useless_rules() {
            tracing::warn!("{useless}");
        }
        self.running = new;
        Ok(())
    }

    fn refresh(&self) {
        match self.authority.refresh() {
            Ok((revoked, enrolled)) => {
                let forwarder = &self.backend.forwarder;
                forwarder.registry.enrolled(&enrolled);
                forwarder.routing.enrolled.store(Arc::new(enrolled));
                self.backend.end_revoked(&revoked);
            }
            Err(error) => {
                tracing::error!(error = %daemon::chain(&error), "could not read the token store, the last state stays");
            }
        }
    }
}

fn needs_restart(old: &Config, new: &Config) -> bool {
    old.name != new.name
        || old.state_dir != new.state_dir
        || old.trust_domain != new.trust_domain
        || old.log.format != new.log.format
        || old.certificate != new.certificate
        || old.backend != new.backend
        || old.limits != new.limits
        || old.timeouts != new.timeouts
        || old.drain != new.drain
        || old.observe != new.observe
        || old.admin != new.admin
        || old.kubernetes != new.kubernetes
        || old.direct != new.direct
        || old.lines != new.lines
        || old.path != new.path
        || unnamed(old.peers.as_ref()) != unnamed(new.peers.as_ref())
}

/// All of the section but for what is changed in place.
fn unnamed(peers: Option<&config::Peers>) -> Option<config::Peers> {
    peers.map(|peers| config::Peers {
        servers: Vec::new(),
        ..peers.clone()
    })
}

/// A frontend's TLS as a value that can be swapped.
pub(crate) fn live(tls: Option<Arc<ServerConfig>>) -> Option<LiveTls> {
    tls.map(|tls| Arc::new(ArcSwap::from(tls)))
}
