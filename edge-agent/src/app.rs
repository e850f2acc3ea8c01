//! The whole agent: what starts and stops in which order.
//!
//! Start: endpoints bound → credential loaded or asked for → sessions → ready.
//! Stop: not ready → GoAway to each server → once they know, new streams refused → open ones wait ≤ `drain.grace` →
//! the rest cut with `draining` → sessions closed → endpoints closed.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use daemon::admin::{Endpoint, Routes};
use daemon::{Exit, Listen, LogHandle, Metrics, Readiness, Reload, Tasks, WatchOptions, sd};
use futures_util::future::join_all;
use proto::transport::keepalive::Keepalive;
use proto::{Budget, Reason};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::candidate::Candidates;
use crate::connector::Connector;
use crate::drain::{CUT, Stop, drain};
use crate::enroll::{Enrolment, Expiry};
use crate::error::AppError;
use crate::files::Files;
use crate::metrics::{AgentMetrics, Gauges};
use crate::own::OwnAddresses;
use crate::policy::Policy;
use crate::registry::Registry;
use crate::reload::{ConfigSource, Operators, Reloading, Roots};
use crate::resolve::Resolver;
use crate::serve::Serving;
use crate::session::{self, Terms};
use crate::{Config, endpoints, ready};

/// The agent before it is bound.
#[derive(Debug)]
pub struct App;

/// The agent with its endpoints bound.
#[derive(Debug)]
pub struct Bound {
    config: Config,
    observe: Endpoint,
    admin: Endpoint,
    metrics: Metrics,
    agent_metrics: AgentMetrics,
    registry: Arc<Registry>,
    serving: Arc<Serving>,
    candidates: Arc<Candidates>,
    enrolment: Enrolment,
    expiry: Expiry,
    log: LogHandle,
    source: Option<ConfigSource>,
    watching: WatchOptions,
}

impl App {
    /// Binds the endpoints. To be called within a Tokio runtime.
    ///
    /// # Errors
    /// When an address is taken or not allowed.
    pub fn bind(config: Config) -> Result<Bound, AppError> {
        let metrics = Metrics::new(env!("CARGO_PKG_VERSION"));
        let observe = Endpoint::observe(&config.observe, &metrics, config.handover)?;
        let admin = Endpoint::admin(&config.admin, &metrics, config.handover)?;
        let registry = Registry::new();
        let resolver = Resolver::new();
        let agent_metrics = AgentMetrics::new();
        let expiry = Expiry::default();
        let candidates = Arc::new(Candidates::new(config.servers.clone(), resolver.clone()));
        let enrolment = Enrolment::new(
            &config,
            Arc::clone(&candidates),
            agent_metrics.clone(),
            expiry.clone(),
        );
        let serving = Arc::new(Serving {
            policy: ArcSwap::from_pointee(Policy::from(&config)),
            own: OwnAddresses::new(),
            resolver,
            files: Files::of_process(),
            budget: Budget::new(config.memory),
            timeouts: config.timeouts,
            metrics: agent_metrics.clone(),
            refusing: CancellationToken::new(),
            cut: CancellationToken::new(),
        });
        let gauges = Gauges {
            registry: Arc::clone(&registry),
            budget: serving.budget.clone(),
            files: serving.files.clone(),
            clock: enrolment.clock().clone(),
            expiry: expiry.clone(),
        };
        metrics.register(|registry| agent_metrics.register(registry, gauges));
        Ok(Bound {
            config,
            observe,
            admin,
            metrics,
            agent_metrics,
            registry,
            serving,
            candidates,
            enrolment,
            expiry,
            log: LogHandle::detached(),
            source: None,
            watching: WatchOptions::default(),
        })
    }
}

impl Bound {
    /// Where livez, readyz and metrics are.
    #[must_use]
    pub const fn observe(&self) -> &Listen {
        self.observe.bound()
    }

    /// Where sessions and log level are.
    #[must_use]
    pub const fn admin(&self) -> &Listen {
        self.admin.bound()
    }

    /// Lets the configuration and the admin endpoint change the log level.
    #[must_use]
    pub fn with_log(mut self, log: LogHandle) -> Self {
        self.log = log;
        self
    }

    /// Reloads the configuration from there when it changes.
    #[must_use]
    pub fn with_source(mut self, source: ConfigSource) -> Self {
        self.source = Some(source);
        self
    }

    /// Looks for changes of files at other times than usual.
    #[must_use]
    pub const fn with_watching(mut self, watching: WatchOptions) -> Self {
        self.watching = watching;
        self
    }

    /// Runs until it is told to stop, and drains.
    ///
    /// # Errors
    /// When it has no credential and no way to one, or a task that it can't do without has ended.
    pub async fn run(self, stop: Stop) -> Result<Exit, AppError> {
        let Self {
            mut enrolment,
            registry,
            serving,
            candidates,
            ..
        } = self;
        let readiness = Readiness::new();
        let no_session = readiness.register("session");
        let groups = Groups::default();
        let owners = groups.all();
        let routes = Routes::observe(readiness.clone(), &owners, self.metrics.clone());
        endpoints::serve(&groups.endpoints, "observe", self.observe, routes);
        let agent = self.config.name.to_string();
        let routes = endpoints::admin(self.log.clone(), Arc::clone(&registry), agent)
            .probes(readiness.clone(), &owners);
        endpoints::serve(&groups.endpoints, "admin", self.admin, routes);
        let watched = groups.endpoints.clone();
        let _watchdog = sd::Watchdog::start(move || watched.failure().is_none());

        let started = async {
            let own = match enrolment.load()? {
                Some(own) => own,
                None => enrolment.join().await,
            };
            Ok::<_, AppError>((
                certs::tunnel_client_quic(&own)?,
                session::offer(&self.config, &serving.budget)?,
                own,
            ))
        };
        let started = tokio::select! {
            started = started => started,
            () = stop.shutdown.cancelled() => {
                groups.endpoints.drain(CUT).await;
                return Ok(Exit::Drained);
            }
        };
        let (tls, offer, own) = match started {
            Ok(started) => started,
            Err(error) => {
                groups.endpoints.drain(CUT).await;
                return Err(error);
            }
        };
        let terms = Arc::new(Terms {
            tls,
            offer,
            tuning: session::tuning(&self.config, &serving.budget),
            keepalive: Keepalive::default(),
            serving: Arc::clone(&serving),
            registry: Arc::clone(&registry),
            metrics: self.agent_metrics.clone(),
            sessions: groups.sessions.clone(),
            streams: groups.streams.clone(),
            own: own.clone(),
        });
        let background = &groups.background;
        let (renewals, renewed) = watch::channel(0);
        let (gone, told_gone) = watch::channel(String::new());
        let (unknown, told_unknown) = watch::channel(String::new());
        let reload = || {
            let source = self.source.as_ref();
            source.map_or_else(Reload::never, |source| source.reload.clone())
        };
        if let Some(file) = enrolment.ca_file() {
            let roots = Roots {
                file: file.clone(),
                bundle: own.bundle.clone(),
                metrics: self.agent_metrics.clone(),
            };
            background.critical("roots", roots.run(self.watching, reload()));
        }
        if enrolment.operators().is_some() {
            let metrics = self.agent_metrics.clone();
            let operators = Operators {
                enrolment,
                own,
                expiry: self.expiry,
                renewed: renewals,
                metrics,
            };
            background.critical("credential", operators.run(self.watching, reload()));
        } else {
            background.critical(
                "renewal",
                enrolment.keep_renewed(own, renewals, told_gone, told_unknown),
            );
        }
        if let Some(source) = self.source {
            let reloading = Reloading {
                source,
                config: self.config.clone(),
                serving: Arc::clone(&serving),
                candidates: Arc::clone(&candidates),
                log: self.log,
                metrics: self.agent_metrics,
            };
            background.critical("reload", reloading.run(self.watching));
        }
        let connector = Connector {
            terms,
            candidates,
            limits: self.config.backoff,
            renewed,
            gone,
            unknown,
        };
        background.critical("connector", connector.run(background.clone()));
        let ready = ready::keep(Arc::clone(&registry), readiness.clone(), no_session);
        background.critical("readiness", ready);

        let failed = tokio::select! {
            () = stop.shutdown.cancelled() => None,
            name = groups.endpoints.failed() => Some(name),
            name = groups.background.failed() => Some(name),
        };
        if let Some(name) = failed {
            tracing::error!(
                task = name,
                "a task that the agent can't do without has ended, stopping"
            );
        }

        readiness.begin_drain();
        sd::stopping();
        groups.background.drain(Duration::ZERO).await;
        let cut = drain(
            &registry,
            &serving,
            &groups.streams,
            self.config.drain.grace,
            &stop,
        )
        .await;
        let all = registry.all();
        all.iter().for_each(|live| live.close(Reason::Draining));
        groups.sessions.drain(CUT).await;
        join_all(all.iter().map(|live| live.flush(CUT))).await;
        groups.endpoints.drain(CUT).await;
        tracing::info!(cut, "stopped");
        Ok(if failed.is_some() {
            Exit::Failed
        } else {
            Exit::Drained
        })
    }
}

/// The agent's tasks, in groups that end one after the other.
#[derive(Debug, Default)]
struct Groups {
    /// Answer until the very end.
    endpoints: Tasks,
    /// Renewal, reload, supervisors: nothing new once the agent stops.
    background: Tasks,
    sessions: Tasks,
    streams: Tasks,
}

impl Groups {
    fn all(&self) -> [Tasks; 4] {
        [
            &self.endpoints,
            &self.background,
            &self.sessions,
            &self.streams,
        ]
        .map(Clone::clone)
    }
}
