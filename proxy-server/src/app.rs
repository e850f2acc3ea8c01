//! Start and stop of a proxy-server, in order: [`App::bind`] and [`Bound::run`].

mod door;
mod http;
mod obtain;
mod peers;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use arc_swap::ArcSwap;
use certs::{Ca, tunnel_server_quic};
use daemon::{BindOptions, Drained, Exit, Listen, Listener, LogHandle, Reload, Tasks};
use door::Door;
use http::Ground;
pub(crate) use obtain::vault;
use peers::Peering;
use proto::Budget;
use proto::transport::keepalive::Keepalive;
use proto::transport::quic::{Endpoint, QuicSession, Tuning};
use proto::wire::ServerOffer;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::authority::Authority;
use crate::backend::{Backend, stream_limits};
use crate::cluster::{
    Cluster, Events, Publisher, Questions, Source as ClusterSource, Standing, Tokens, Vault, Watch,
};
use crate::config::{Config, Mark};
use crate::enrolment::Enrolment;
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::path::{Paths, dial, direct, probe};
use crate::peer::{Peers, SETTLE};
use crate::registry::Registry;
use crate::reload::{Reloader, Source, frontend_tls, live};
use crate::route::RouteTable;
use crate::serve::{Forwarder, Routing};

/// Enrolments at once: each lives 30 s at most.
const MAX_ENROLMENTS: usize = 512;
/// How long resets and good-byes may take to leave.
const FLUSH: Duration = Duration::from_secs(3);
/// How long agents that have no session with another server are waited for in a drain, and half of `drain.grace` at most:
/// each looks for one within [`RETRY_SPREAD`](crate::backend::RETRY_SPREAD) and half as long again, and may have to look twice.
const HANDOVER: Duration = Duration::from_secs(15);
/// How often gauges that nobody sets in passing are set.
const GAUGES: Duration = Duration::from_secs(5);
/// Tries to find a port that is free for UDP and TCP, where the configuration leaves it open.
const PORT_TRIES: usize = 16;

/// What an app is given beside its configuration.
#[derive(Debug)]
pub struct Environment {
    /// Where the configuration came from.
    pub source: Source,
    /// To change the log level.
    pub log: LogHandle,
    /// Asks for reloads.
    pub reload: Reload,
}

/// How a proxy-server comes up.
#[derive(Debug)]
pub struct App;

/// A proxy-server whose addresses are bound and which serves nobody yet.
pub struct Bound {
    /// Where agents come in: QUIC and enrolment, the same port.
    pub backend: Vec<SocketAddr>,
    /// Where requests come in, in the order of the configuration.
    pub frontends: Vec<Listen>,
    /// livez, readyz, metrics.
    pub observe: Listen,
    /// Admin endpoints.
    pub admin: Vec<Listen>,
    /// Sessions, for tests and the demo.
    pub registry: Registry<QuicSession>,
    /// Where other servers come in.
    pub peer_listeners: Vec<SocketAddr>,
    /// Other servers, for tests.
    pub peers: Arc<Peers<QuicSession>>,
    config: Config,
    reload: Reload,
    ground: Ground,
    endpoints: Vec<(Endpoint, Listener)>,
    doors: Vec<Door>,
    enrolment: Arc<Enrolment>,
    watch: Option<Watch>,
    publisher: Option<Publisher>,
    events: Option<Events>,
    peering: Option<Peering>,
    standing: Option<Arc<Standing>>,
    vault: Option<Vault>,
    reloader: Reloader,
    streams: Tasks,
    stop_enrolment: CancellationToken,
}

impl std::fmt::Debug for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bound")
            .field("backend", &self.backend)
            .field("frontends", &self.frontends)
            .finish_non_exhaustive()
    }
}

impl App {
    /// As [`App::bind`], and waits for the authority where that is kept in the cluster. `None` if it is told to stop
    /// before that has come.
    ///
    /// # Errors
    /// What could not be opened, read or bound.
    pub async fn start(
        config: Config,
        environment: Environment,
        shutdown: &CancellationToken,
    ) -> anyhow::Result<Option<Bound>> {
        let mut ground = Ground::bind(&config)?;
        let Some(vault) = vault(&config, None) else {
            return Self::build(config, environment, ground, None).map(Some);
        };
        let obtained = obtain::obtain(&config, &vault, &mut ground, shutdown);
        match Box::pin(obtained).await? {
            Some(ca) => Self::build(config, environment, ground, Some(ca)).map(Some),
            None => {
                ground.ops.drain(FLUSH).await;
                Ok(None)
            }
        }
    }

    /// Opens the state, builds everything and binds every address. Must run within a runtime.
    ///
    /// # Errors
    /// What could not be opened, read or bound; the authority is kept in the cluster, which [`App::start`] asks.
    pub fn bind(config: Config, environment: Environment) -> anyhow::Result<Bound> {
        let elsewhere = vault(&config, None).is_some();
        anyhow::ensure!(!elsewhere, "the authority has to be waited for");
        let ground = Ground::bind(&config)?;
        Self::build(config, environment, ground, None)
    }

    fn build(
        config: Config,
        environment: Environment,
        ground: Ground,
        obtained: Option<Ca>,
    ) -> anyhow::Result<Bound> {
        let Environment {
            source,
            log,
            reload,
        } = environment;
        let daemon_metrics = &ground.metrics;
        let metrics = Metrics::new(daemon_metrics);
        let authority = Arc::new(Authority::open(&config, obtained, Arc::clone(&metrics))?);
        let (_, enrolled) = authority.refresh().context("read the token store")?;
        let cluster = match &config.kubernetes {
            Some(settings) => Cluster::configured(settings, daemon_metrics),
            None => Cluster::default(),
        };
        let peers = match &config.peers {
            Some(_) => Peers::configured(config.has_backend(), daemon_metrics),
            None => Peers::default(),
        };
        let peers = Arc::new(peers);
        let registry = Registry::default();
        registry.enrolled(&enrolled);
        let cluster = Arc::new(cluster);
        let source_of_cluster = config.kubernetes.as_ref().map(ClusterSource::new);
        let standing = source_of_cluster.clone().map(|source| {
            Arc::new(Standing {
                cluster: Arc::clone(&cluster),
                questions: Questions::new(source),
            })
        });
        let questions = standing.as_ref().map(|standing| &standing.questions);
        let vault = vault(&config, questions);
        let budget = Budget::new(config.backend.memory.0);
        let window = budget.stream_window();
        let forwarder = Arc::new(Forwarder {
            routing: Arc::new(Routing {
                table: ArcSwap::from_pointee(RouteTable::new(&config.routes)),
                enrolled: ArcSwap::from_pointee(enrolled),
                cluster,
            }),
            registry,
            peers: Arc::clone(&peers),
            limits: Limits::new(&config.limits),
            metrics,
            budget,
            timeouts: config.timeouts,
            own: ArcSwap::default(),
            paths: paths(&config, daemon_metrics)?,
            mark: mark(&config)?,
            cut: CancellationToken::new(),
        });
        let tuning = Tuning::server(window, config.backend.idle_timeout);
        let name = config.server_name().context("read the server's name")?;
        let backend = Arc::new(Backend {
            forwarder: Arc::clone(&forwarder),
            offer: ServerOffer {
                server: name.as_str().parse().context("read the server's name")?,
                software: concat!("proxy-server ", env!("CARGO_PKG_VERSION")).to_owned(),
                capabilities: Vec::new(),
                limits: stream_limits(window, tuning.max_streams),
                servers: 0,
            },
            clock: authority.own.clock.clone(),
            keepalive: Keepalive {
                // Two may be lost on the way within the shortest idle time-out.
                interval: Keepalive::default()
                    .interval
                    .min(config.backend.idle_timeout / 4),
                idle_timeout: config.backend.idle_timeout,
                ..Keepalive::default()
            },
            sessions_per_agent: config.limits.sessions_per_agent,
            servers: peers.servers(),
            revoked: authority.revoked.clone(),
            standing: standing.clone(),
            stopping: CancellationToken::new(),
            tasks: ground.sessions.clone(),
        });
        let tls =
            tunnel_server_quic(&authority.own, &authority.revoked).context("TLS of the tunnel")?;
        let secret = authority.quic_secret();
        let pauses = daemon_metrics.accept_pauses();
        let options = |max_connections| BindOptions {
            max_connections,
            pauses: pauses.clone(),
            ..BindOptions::default()
        };
        let mut endpoints = Vec::new();
        for address in &config.backend.listen {
            endpoints.push(bind_backend(
                *address,
                || options(MAX_ENROLMENTS),
                |address| Endpoint::listen(address, Arc::clone(&tls), tuning, &secret),
            )?);
        }
        let streams = Tasks::new();
        let peering = Peering::bind(&config, &authority.own, &secret, &backend, &streams)?;
        for useless in config.useless_rules() {
            tracing::warn!("{useless}");
        }
        let (mut doors, mut frontends, mut changeable) = (Vec::new(), Vec::new(), Vec::new());
        for frontend in &config.frontends {
            let mut options = options(config.limits.connections);
            if let Some(mode) = frontend.mode() {
                options.mode = mode;
            }
            options.transparent = frontend.transparent();
            options.handover = config.handover;
            let listen = frontend.listen();
            let listener = Listener::bind_with(listen, options)
                .with_context(|| format!("listen on {listen}"))?;
            frontends.push(listener.bound().clone());
            let tls = live(frontend_tls(&authority.own, frontend)?);
            let door = Door::open(frontend, listener, tls.clone(), &forwarder, &streams)?;
            changeable.push(door.changeable(tls));
            doors.push(door);
        }
        let own: Vec<SocketAddr> = endpoints
            .iter()
            .filter_map(|(_, tcp)| tcp.bound().tcp())
            .chain(frontends.iter().filter_map(Listen::tcp))
            .chain(ground.observe.tcp())
            .collect();
        let (mut watch, mut publisher, mut events) = (None, None, None);
        if let (Some(settings), Some(source)) = (&config.kubernetes, source_of_cluster) {
            source.check(&own).context("kubernetes")?;
            publisher = Publisher::new(&config.name, &forwarder, &source, settings);
            if !forwarder.paths.is_idle() {
                let told = Events::new(&config.name, &forwarder, &source, daemon_metrics);
                events = Some(told);
            }
            watch = Some(Watch {
                cluster: Arc::clone(&forwarder.routing.cluster),
                source,
                settings: settings.clone(),
            });
        }
        forwarder.own.store(Arc::new(own));
        let stop_enrolment = CancellationToken::new();
        let enrol = config.kubernetes.as_ref().and_then(|k| k.enrol.clone());
        let nodes = standing.clone().map(|standing| Tokens { standing, enrol });
        let enrolment = Enrolment::new(&authority, &config, nodes, stop_enrolment.clone())
            .context("TLS of the enrolment")?;
        Ok(Bound {
            backend: endpoints
                .iter()
                .filter_map(|(_, tcp)| tcp.bound().tcp())
                .collect(),
            frontends,
            observe: ground.observe.clone(),
            admin: ground.admin.clone(),
            registry: forwarder.registry.clone(),
            peer_listeners: peering.as_ref().map(Peering::addresses).unwrap_or_default(),
            peers,
            reloader: Reloader {
                named_peers: peering.as_ref().map(|peering| peering.named.clone()),
                source,
                running: config.clone(),
                log,
                authority,
                backend,
                frontends: changeable,
            },
            config,
            reload,
            ground,
            endpoints,
            doors,
            enrolment: Arc::new(enrolment),
            watch,
            publisher,
            events,
            peering,
            standing,
            vault,
            streams,
            stop_enrolment,
        })
    }
}

/// How nodes are reached; each line must be possible.
fn paths(config: &Config, metrics: &daemon::Metrics) -> anyhow::Result<Paths> {
    for line in &config.lines {
        dial::check(line)?;
    }
    Ok(Paths::new(config, metrics))
}

/// The mark of direct dials. Asked for by name, it must be possible; else they do without.
fn mark(config: &Config) -> anyhow::Result<Option<Mark>> {
    if config.direct.mark.is_none() && !config.may_meet_itself() {
        return Ok(None);
    }
    let mark = config.mark();
    let Err(error) = direct::may_mark(mark) else {
        return Ok(Some(mark));
    };
    if config.direct.mark.is_some() {
        return Err(error).context("direct.mark: marking a connection needs CAP_NET_ADMIN");
    }
    tracing::warn!(
        %error,
        "direct dials can't be marked without CAP_NET_ADMIN: where `proxy-server redirect` has rules on this machine, one that goes to a node's address comes back here"
    );
    Ok(None)
}

/// TCP and UDP on one port; a port that was left open is chosen so that it is free for both.
fn bind_backend(
    address: SocketAddr,
    options: impl Fn() -> BindOptions,
    listen: impl Fn(SocketAddr) -> Result<Endpoint, proto::transport::quic::QuicError>,
) -> anyhow::Result<(Endpoint, Listener)> {
    let mut tries = if address.port() == 0 { PORT_TRIES } else { 1 };
    loop {
        tries -= 1;
        let tcp = Listener::bind_with(&Listen::Tcp(address), options())
            .with_context(|| format!("listen on {address}/tcp"))?;
        let port = tcp
            .bound()
            .tcp()
            .map_or_else(|| address.port(), |bound| bound.port());
        match listen(SocketAddr::new(address.ip(), port)) {
            Ok(udp) => return Ok((udp, tcp)),
            Err(error) if tries == 0 => return Err(error.into()),
            Err(_taken) => {}
        }
    }
}

impl Bound {
    /// Serves until `shutdown`, then drains; `immediate` cuts the drain short.
    pub async fn run(mut self, shutdown: CancellationToken, immediate: CancellationToken) -> Exit {
        let backend = Arc::clone(&self.reloader.backend);
        let forwarder = Arc::clone(&backend.forwarder);
        let drain = self.config.drain;

        self.ground.serve_observe();
        let log = &self.reloader.log;
        self.ground.serve_admin(&self.config.name, log, &forwarder);
        let Ground {
            readiness,
            starting,
            service,
            writes,
            ops,
            ..
        } = self.ground;
        let streams = self.streams.clone();
        let authority = Arc::clone(&self.reloader.authority);
        for_ever(&service, "renewal", Arc::clone(&authority).keep_renewed());
        match self.vault {
            Some(vault) => {
                let metrics = Arc::clone(&forwarder.metrics);
                for_ever(&service, "authority", vault.follow(authority, metrics));
            }
            None => for_ever(&service, "authority", authority.follow_dir()),
        }
        if let Some(watch) = self.watch {
            if let Some(pods) = watch.cluster.pods() {
                for_ever(&service, "pods", pods.follow(watch.source.clone()));
            }
            if let Some(services) = watch.cluster.services() {
                let slices = Arc::clone(&services).follow_slices(watch.source.clone());
                for_ever(&service, "services", services.follow(watch.source.clone()));
                for_ever(&service, "endpoints", slices);
            }
            for_ever(&service, "cluster", watch.run());
        }
        if let Some(publisher) = self.publisher {
            writes.critical("dns", publisher.run(writes.stopping()));
        }
        if let Some(events) = self.events {
            for_ever(&service, "events", events.run());
        }
        if let Some(standing) = self.standing {
            let registry = forwarder.registry.clone();
            for_ever(&service, "standing", standing.close_gone(registry));
        }
        if !forwarder.paths.is_idle() {
            for_ever(&service, "probes", probe::run(Arc::clone(&forwarder)));
        }
        for_ever(&service, "gauges", gauges(Arc::clone(&forwarder)));
        for_ever(&service, "reload", self.reloader.run(self.reload));
        let udp: Vec<Endpoint> = self.endpoints.iter().map(|(udp, _)| udp.clone()).collect();
        for (endpoint, tcp) in self.endpoints {
            tracing::info!(address = %tcp.bound(), "agents: QUIC on udp, enrolment on tcp");
            service.critical("backend", Arc::clone(&backend).accept(endpoint));
            let (enrolment, tasks, stop) = (
                Arc::clone(&self.enrolment),
                backend.tasks.clone(),
                self.stop_enrolment.clone(),
            );
            service.critical("enrolment", async move {
                let serve = move |stream, peer| Arc::clone(&enrolment).serve(stream, peer);
                log_end(
                    "enrolment",
                    tcp.serve("enrolment", &tasks, stop, serve).await,
                );
            });
        }
        let stop_requests = CancellationToken::new();
        for door in self.doors {
            let (tasks, stop) = (streams.clone(), stop_requests.clone());
            service.critical("frontend", async move { door.run(&tasks, stop).await });
        }
        let peering = self.peering.map(|peering| peering.start(&service));
        // What other servers have is known before this one is called ready.
        tokio::select! {
            () = self.peers.settled(SETTLE) => {}
            () = shutdown.cancelled() => {}
        }
        drop(starting);
        daemon::sd::ready();
        let watched = [service.clone(), writes.clone()];
        let healthy = move || watched.iter().all(|tasks| tasks.failure().is_none());
        let _watchdog = daemon::sd::Watchdog::start(healthy);
        tracing::info!("ready");

        let exit = tokio::select! {
            () = shutdown.cancelled() => Exit::Drained,
            name = async { tokio::select! { name = service.failed() => name, name = writes.failed() => name } } => {
                tracing::error!(task = name, "a task that must not end has ended");
                Exit::Failed
            }
        };
        daemon::sd::stopping();
        readiness.begin_drain();
        writes.stop();
        tracing::info!(
            sessions = forwarder.registry.len(),
            streams = streams.len(),
            "stopping"
        );
        let stopping = async {
            let end = Instant::now() + drain.min_delay + drain.grace;
            backend.go_away(drain.min_delay + drain.grace);
            peering
                .iter()
                .for_each(|p| p.go_away(drain.min_delay + drain.grace));
            sleep(drain.min_delay).await;
            // An agent that is nowhere else is reached through us alone.
            let most = HANDOVER.min(drain.grace / 2);
            timeout(most, backend.handed_over()).await.ok(); // one that can't get elsewhere is not waited for any longer
            service.stop();
            stop_requests.cancel();
            peering.iter().for_each(peers::Running::refuse);
            self.stop_enrolment.cancel();
            sleep_until(end).await;
        };
        let finished = async {
            stop_requests.cancelled().await;
            streams.drain(drain.grace + FLUSH).await
        };
        tokio::select! {
            drained = finished => report(drained),
            // What is left is cut with a reason, then its tasks end by themselves.
            () = async { tokio::select! { () = stopping => {}, () = immediate.cancelled() => {} } } => {
                tracing::warn!(streams = streams.len(), "time is over, cutting what is left");
                stop_requests.cancel();
                forwarder.cut.cancel();
                report(streams.drain(FLUSH).await);
            }
        }
        backend.close_all();
        if let Some(peering) = peering {
            peering.close().await;
        }
        for endpoint in udp {
            endpoint.flush(FLUSH).await;
        }
        backend.tasks.drain(FLUSH).await;
        service.drain(Duration::ZERO).await;
        writes.drain(FLUSH).await;
        ops.drain(FLUSH).await;
        tracing::info!("stopped");
        exit
    }
}

fn log_end(what: &'static str, end: std::io::Result<()>) {
    if let Err(error) = end {
        tracing::error!(what, %error, "a listener is broken");
    }
}

fn report(drained: Drained) {
    match drained {
        Drained::Clean => tracing::info!("every stream has ended"),
        Drained::Aborted(streams) => tracing::warn!(streams, "streams were cut"),
    }
}

/// Runs a loop without an end as a task that is told to stop by being dropped.
fn for_ever(
    tasks: &Tasks,
    name: &'static str,
    work: impl Future<Output = Infallible> + Send + 'static,
) {
    let stop = tasks.stopping();
    tasks.critical(name, async move {
        tokio::select! {
            () = stop.cancelled() => {}
            never = work => match never {},
        }
    });
}

#[expect(clippy::infinite_loop, reason = "ended by being dropped, see for_ever")]
async fn gauges(forwarder: Arc<Forwarder>) -> Infallible {
    loop {
        let held = i64::try_from(forwarder.budget.held()).unwrap_or(i64::MAX);
        forwarder.metrics.held.set(held);
        forwarder.routing.cluster.export();
        forwarder.peers.export();
        for session in forwarder.registry.all() {
            session.look(Instant::now());
        }
        if !forwarder.paths.is_idle() {
            forwarder.paths.export();
        }
        sleep(GAUGES).await;
    }
}
