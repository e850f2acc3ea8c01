//! The peers of a proxy-server: what dials them, what they dial, and how both stop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use certs::{Own, peer_client_quic, peer_server_quic};
use daemon::Tasks;
use proto::transport::Session as _;
use proto::transport::quic::{Endpoint, Tuning};
use proto::wire::{Offer, ServerOffer};
use proto::{Destination, Reason};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{FLUSH, for_ever};
use crate::backend::{Backend, stream_limits};
use crate::cluster::{Endpoints as ServiceEndpoints, Source as ClusterSource};
use crate::config::Config;
use crate::peer::{Acceptor, Dialler, Members, keepalive};

/// Streams of one other server at once, at the most: state is allocated for each permitted one.
const MOST_STREAMS: usize = 16_384;

/// What a server has that is not alone.
pub(super) struct Peering {
    dialler: Arc<Dialler>,
    members: Members,
    /// What follows the members in Kubernetes.
    service: Option<ServiceEndpoints>,
    /// The configured members, to be changed by a reload.
    pub(super) named: watch::Sender<Vec<Destination>>,
    acceptor: Arc<Acceptor>,
    endpoints: Vec<Endpoint>,
}

/// What is left of it while the server runs.
pub(super) struct Running {
    dialler: Arc<Dialler>,
    acceptor: Arc<Acceptor>,
    endpoints: Vec<Endpoint>,
}

impl Peering {
    /// Binds; `None` for a server that is alone.
    pub(super) fn bind(
        config: &Config,
        own: &Own,
        secret: &[u8; 32],
        backend: &Arc<Backend>,
        streams: &Tasks,
    ) -> anyhow::Result<Option<Self>> {
        let Some(settings) = &config.peers else {
            return Ok(None);
        };
        let forwarder = &backend.forwarder;
        let window = forwarder.budget.stream_window();
        let idle_timeout = config.backend.idle_timeout;
        let dialling = Tuning::server(window, idle_timeout);
        let most = config.limits.streams.min(MOST_STREAMS);
        let accepting = Tuning {
            max_streams: u32::try_from(most).unwrap_or(u32::MAX),
            ..dialling
        };
        let limits = stream_limits(window, accepting.max_streams);
        let ServerOffer {
            server, software, ..
        } = backend.offer.clone();
        let sessions = Tasks::new();
        let tls = peer_server_quic(own).context("TLS between servers")?;
        let endpoints = config.peer_listeners().into_iter().map(|address| {
            Endpoint::listen(address, Arc::clone(&tls), accepting, secret)
                .with_context(|| format!("listen on {address}/udp for peers"))
        });
        let endpoints = endpoints.collect::<anyhow::Result<Vec<_>>>()?;
        let acceptor = Acceptor {
            forwarder: Arc::clone(forwarder),
            offer: ServerOffer {
                limits,
                ..backend.offer.clone()
            },
            clock: own.clock.clone(),
            keepalive: keepalive(idle_timeout),
            stopping: CancellationToken::new(),
            refusing: CancellationToken::new(),
            tasks: sessions.clone(),
            streams: streams.clone(),
        };
        let dialler = Dialler {
            peers: Arc::clone(&forwarder.peers),
            backend: Arc::clone(backend),
            own: own.clone(),
            tls: peer_client_quic(own).context("TLS towards other servers")?,
            tuning: dialling,
            keepalive: keepalive(idle_timeout),
            offer: Offer {
                agent: server,
                software,
                capabilities: Vec::new(),
                limits: stream_limits(window, dialling.max_streams),
                instance: format!("{:016x}", rand::random::<u64>()),
                line: None,
            },
            sessions,
        };
        let (named, names) = watch::channel(settings.destinations());
        let service = match (&settings.service, &config.kubernetes) {
            (Some(service), Some(kubernetes)) => {
                let source = ClusterSource::new(kubernetes);
                Some(ServiceEndpoints::new(&source, service))
            }
            (Some(_), None) | (None, _) => None,
        };
        let members = match &service {
            Some(service) => Members::of_service(service.watch()),
            None => Members::named(names),
        };
        Ok(Some(Self {
            dialler: Arc::new(dialler),
            members,
            service,
            named,
            acceptor: Arc::new(acceptor),
            endpoints,
        }))
    }

    /// Where other servers come in.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.endpoints
            .iter()
            .filter_map(|endpoint| endpoint.local_address().ok())
            .collect()
    }

    /// Starts dialling and accepting.
    pub(super) fn start(self, service: &Tasks) -> Running {
        for (endpoint, address) in self.endpoints.iter().zip(self.addresses()) {
            tracing::info!(%address, "peers: QUIC on udp");
            let accept = Arc::clone(&self.acceptor).accept(endpoint.clone());
            service.critical("peers", accept);
        }
        if let Some(endpoints) = self.service {
            for_ever(service, "members", endpoints.run());
        }
        let dial = Arc::clone(&self.dialler).run(self.members, service.clone());
        for_ever(service, "peers", dial);
        Running {
            dialler: self.dialler,
            acceptor: self.acceptor,
            endpoints: self.endpoints,
        }
    }
}

impl Running {
    /// Tells other servers to ask elsewhere. What they ask for all the same is still served.
    pub(super) fn go_away(&self, deadline: Duration) {
        self.acceptor.go_away(deadline);
    }

    /// Nothing more is served that other servers ask for.
    pub(super) fn refuse(&self) {
        self.acceptor.refusing.cancel();
    }

    /// Closes every session, and waits until the other servers have been told.
    pub(super) async fn close(self) {
        self.acceptor.close_all();
        for session in self.dialler.peers.all() {
            session.transport.close(Reason::Draining);
        }
        for endpoint in self.endpoints {
            endpoint.flush(FLUSH).await;
        }
        self.dialler.sessions.drain(FLUSH).await;
    }
}
