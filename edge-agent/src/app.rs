//! The whole agent: what starts and stops in which order.
//!
//! Start: endpoints bound → credential loaded or asked for → sessions → ready.
//! Stop: not ready → GoAway to each server → once they know, new streams refused → open ones wait ≤ `drain.grace` →
//! the rest cut with `draining` → sessions closed → endpoints closed.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use daemon::admin::{Endpoint, Reply, Routes};
use daemon::{
 Drained, Exit, Listen, LogHandle, Metrics, Readiness, Reload, Tasks, WatchOptions, chain, sd};
use futures_util::future::join_all;
use proto::transport::keepalive::Keepalive;
use proto::transport::quic::Tuning;
use proto::wire::{Limits, Offer};
use proto::{Budget, Reason};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::Config;
use crate::candidate::Candidates;
use crate::connector::Connector;
use crate::enroll::{Enrolment, Expiry};
use crate::error::AppError;
use crate::files::Files;
use crate::metrics::{AgentMetrics, Gauges};
use crate::own::OwnAddresses;
use crate::policy::Policy;
use crate::registry::Registry;
use crate::reload::{self, ConfigSource, Reloading};
use crate::resolve::Resolver;
use crate::serve::Serving;
use crate::session::Terms;
use crate::status::SessionStatus;

/// Streams that a server may have open in one session (design: limits).
pub const MAX_STREAMS: u32 = 4096;
/// For cut streams to go away.
const CUT: Duration = Duration::from_secs(2);

/// Name and version, as servers see them.
pub const SOFTWARE: &str = concat!("edge-agent ", env!("CARGO_PKG_VERSION"));

/// The agent before it is bound.
#[derive(Debug)]
pub struct App;

/// Ends a running agent.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    /// Drain.
    pub shutdown: CancellationToken,
    /// Skip what is left of the drain.
    pub immediate: CancellationToken,
}

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
        let observe = Endpoint::observe(&config.observe, &metrics)?;
        let admin = Endpoint::admin(&config.admin, &metrics)?;
        let registry = Registry::new();
        let resolver = Resolver::new();
        let agent_metrics = AgentMetrics::new();
        let expiry = Expiry::default();
        let candidates = Arc::new(Candidates::new(config.servers.clone(), resolver.clone()));
        let enrolment =
            Enrolment::new(&config, Arc::clone(&candidates), agent_metrics.clone(), expiry.clone());
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

    /// Runs until it is told to stop, and drains.
    ///
    /// # Errors
    /// When it has no credential and no way to one, or a task that it can't do without has ended.
    pub async fn run(self, stop: Stop) -> Result<Exit, AppError> {
        let readiness = Readiness::new();
        let no_session = readiness.register("session");
        let endpoints = Tasks::new();
        let background = Tasks::new();
        let (sessions, streams) = (Tasks::new(), Tasks::new());
        let Self { mut enrolment, registry, serving, candidates, .. } = self;

        let owners = [&endpoints, &background, &sessions, &streams].map(Clone::clone);
        let routes = Routes::observe(readiness.clone(), &owners, self.metrics.clone());
        listen(&endpoints, "observe", self.observe, routes);
        let routes = sessions_route(self.log.clone(), Arc::clone(&registry), self.config.name.to_string());
        listen(&endpoints, "admin", self.admin, routes);
        let _watchdog = {
            let endpoints = endpoints.clone();
            sd::Watchdog::start(move || endpoints.failure().is_none())
        };

        let own = match enrolment.load()? {
            Some(own) => own,
            None => tokio::select! {
                own = enrolment.join() => own,
                () = stop.shutdown.cancelled() => {
                    endpoints.drain(CUT).await;
                    return Ok(Exit::Drained);
                }
            },
        };
        let terms = Arc::new(Terms {
            tls: certs::tunnel_client_quic(&own)?,
            tuning: tuning(&self.config, &serving.budget),
            keepalive: Keepalive::default(),
            offer: offer(&self.config, &serving.budget)?,
            serving: Arc::clone(&serving),
            registry: Arc::clone(&registry),
            metrics: self.agent_metrics.clone(),
            sessions: sessions.clone(),
            streams: streams.clone(),
            own: own.clone(),
        });
        let (renewals, renewed) = watch::channel(0);
        if enrolment.operators().is_some() {
            let reload = self.source.as_ref().map_or_else(Reload::never, |s| s.reload.clone());
            let reload = (reload, self.watching);
            let watch = reload::credential(enrolment, own, self.expiry, renewals, reload);
            background.critical("credential", watch);
        } else {
            background.critical("renewal", enrolment.keep_renewed(own, renewals));
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
        let connector = Connector { terms, candidates, limits: self.config.backoff, renewed };
        background.critical("connector", connector.run(background.clone()));
        background.critical("readiness", keep_ready(Arc::clone(&registry), readiness.clone(), no_session));

        let failed = tokio::select! {
            () = stop.shutdown.cancelled() => None,
            name = endpoints.failed() => Some(name),
            name = background.failed() => Some(name),
        };
        if let Some(name) = failed {
            tracing::error!(task = name, "a task that the agent can't do without has ended, stopping");
        }

        readiness.begin_drain();
        sd::stopping();
        background.drain(Duration::ZERO).await;
        let drained = drain(&registry, &serving, &streams, self.config.drain.grace, &stop).await;
        let all = registry.all();
        all.iter().for_each(|live| live.close(Reason::Draining));
        sessions.drain(CUT).await;
        join_all(all.iter().map(|live| live.flush(CUT))).await;
        endpoints.drain(CUT).await;
        tracing::info!(cut = drained, "stopped");
        Ok(if failed.is_some() { Exit::Failed } else { Exit::Drained })
    }
}

/// GoAway → the servers know → no new streams → wait → cut. Says how many streams were cut.
async fn drain(
    registry: &Registry,
    serving: &Serving,
    streams: &Tasks,
    grace: Duration,
    stop: &Stop,
) -> usize {
    let all = registry.all();
    let settled = all.iter().map(|live| live.settled()).max().unwrap_or_default();
    all.iter().for_each(|live| live.go_away(Reason::Draining, grace));
    let orderly = async {
        sleep(settled).await;
        serving.refusing.cancel();
        timeout(grace, all_closed(registry)).await.ok(); // over time they are cut
    };
    tokio::select! {
        () = orderly => {}
        () = stop.immediate.cancelled() => serving.refusing.cancel(),
    }
    let cut = streams.len();
    serving.cut.cancel();
    match streams.drain(CUT).await {
        Drained::Clean => cut,
        Drained::Aborted(stuck) => cut.max(stuck),
    }
}

/// Waits until no session has a stream.
async fn all_closed(registry: &Registry) {
    for live in registry.all() {
        live.idle().await;
    }
}

fn listen(tasks: &Tasks, name: &'static str, endpoint: Endpoint, routes: Routes) {
    tracing::info!(listen = %endpoint.bound(), "{name} endpoint");
    let owner = tasks.clone();
    tasks.critical(name, async move {
        if let Err(error) = endpoint.serve(routes, &owner).await {
            tracing::error!(error = %chain(&error), "{name} endpoint");
        }
    });
}

fn sessions_route(log: LogHandle, registry: Arc<Registry>, agent: String) -> Routes {
    Routes::admin(log).get("/sessions", move |_| {
        let all = registry.all();
        let sessions: Vec<_> = all.iter().map(|live| SessionStatus::of(live, &agent)).collect();
        std::future::ready(Reply::json(&sessions))
    })
}

/// Ready while there is a session; the service manager hears of the first.
async fn keep_ready(registry: Arc<Registry>, readiness: Readiness, first: daemon::ReadinessGuard) {
    let mut count = registry.watch();
    let mut missing = Some(first);
    let mut told = false;
    loop {
        let up = count.borrow_and_update().ne(&0);
        if up && missing.take().is_some() && !told {
            told = true;
            tracing::info!("ready");
            sd::ready();
        } else if !up && missing.is_none() {
            missing = Some(readiness.register("session"));
        }
        if count.changed().await.is_err() {
            return;
        }
    }
}

fn tuning(config: &Config, budget: &Budget) -> Tuning {
    Tuning {
        stream_window: budget.stream_window(),
        max_streams: MAX_STREAMS,
        idle_timeout: Keepalive::default().idle_timeout,
        congestion: config.congestion,
    }
}

fn offer(config: &Config, budget: &Budget) -> Result<Offer, AppError> {
    let limits = Limits { max_streams: MAX_STREAMS, stream_window: budget.stream_window().into() };
    Ok(Offer {
        agent: config.name.as_str().parse()?,
        software: SOFTWARE.to_owned(),
        capabilities: Vec::new(),
        limits,
        instance: format!("{:016x}", rand::random::<u64>()),
    })
}
