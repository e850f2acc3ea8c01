//! A bound frontend: its listener, and what serves its connections.

use std::sync::Arc;

use arc_swap::ArcSwap;
use daemon::{Listener, Tasks};
use tokio_util::sync::CancellationToken;

use super::log_end;
use crate::config::{Elsewhere, Frontend};
use crate::frontend::LiveTls;
use crate::frontend::forward_proxy::{ForwardProxy, Pool};
use crate::frontend::http_connect::HttpConnect;
use crate::frontend::intercept::Intercept;
use crate::frontend::konnectivity::Konnectivity;
use crate::reload::{Changeable, frontend_credentials};
use crate::serve::Forwarder;

pub(super) enum Door {
    Connect(Listener, Arc<HttpConnect>),
    Konnectivity(Listener, Arc<Konnectivity>),
    Proxy(Listener, Arc<ForwardProxy>),
    Intercept(Listener, Arc<Intercept>),
}

impl Door {
    pub(super) fn open(
        frontend: &Frontend,
        listener: Listener,
        tls: Option<LiveTls>,
        forwarder: &Arc<Forwarder>,
        streams: &Tasks,
    ) -> anyhow::Result<Self> {
        let forwarder = Arc::clone(forwarder);
        match (frontend, tls) {
            (Frontend::HttpConnect { default, .. }, tls) => {
                let door = HttpConnect {
                    forwarder,
                    tls,
                    elsewhere: ArcSwap::from_pointee(*default),
                    policy: ArcSwap::from_pointee(frontend.policy()),
                };
                Ok(Self::Connect(listener, Arc::new(door)))
            }
            (Frontend::Konnectivity { default, .. }, _) => {
                let door = Konnectivity {
                    forwarder,
                    elsewhere: ArcSwap::from_pointee(*default),
                    policy: ArcSwap::from_pointee(frontend.policy()),
                    tasks: streams.clone(),
                };
                Ok(Self::Konnectivity(listener, Arc::new(door)))
            }
            (Frontend::ForwardProxy { .. }, Some(tls)) => {
                let credentials = ArcSwap::from_pointee(frontend_credentials(frontend)?);
                let pool = Pool::new(Arc::clone(&forwarder), streams);
                let tasks = streams.clone();
                let proxy = Arc::new(ForwardProxy {
                    forwarder,
                    tls,
                    credentials,
                    policy: ArcSwap::from_pointee(frontend.policy()),
                    pool,
                    tasks,
                });
                Ok(Self::Proxy(listener, proxy))
            }
            (Frontend::Intercept(settings), _) => {
                let stop = streams.stopping();
                let port = listener.bound().port().unwrap_or_default();
                let door = Intercept::new(forwarder, settings, frontend.policy(), port, stop);
                Ok(Self::Intercept(listener, Arc::new(door)))
            }
            (Frontend::ForwardProxy { listen, .. }, None) => {
                anyhow::bail!("a forward proxy has TLS and so a TCP address, not {listen}")
            }
        }
    }

    /// What a reload changes of it.
    pub(super) fn changeable(&self, tls: Option<LiveTls>) -> Changeable {
        let mut changeable = Changeable {
            tls,
            connect: None,
            konnectivity: None,
            proxy: None,
            intercept: None,
        };
        match self {
            Self::Connect(_, door) => changeable.connect = Some(Arc::clone(door)),
            Self::Proxy(_, door) => changeable.proxy = Some(Arc::clone(door)),
            Self::Intercept(_, door) => changeable.intercept = Some(Arc::clone(door)),
            Self::Konnectivity(_, door) => changeable.konnectivity = Some(Arc::clone(door)),
        }
        changeable
    }

    pub(super) async fn run(self, tasks: &Tasks, stop: CancellationToken) {
        match self {
            Self::Connect(listener, door) => {
                tracing::info!(listen = %listener.bound(), direct = **door.elsewhere.load() == Elsewhere::Direct, "requests: HTTP CONNECT");
                let serve = |stream, peer| Arc::clone(&door).serve(stream, peer);
                log_end(
                    "frontend",
                    listener.serve("request", tasks, stop, serve).await,
                );
            }
            Self::Intercept(listener, door) => {
                tracing::info!(listen = %listener.bound(), "requests: intercepted");
                let serve = |stream, peer| Arc::clone(&door).serve(stream, peer);
                log_end(
                    "frontend",
                    listener.serve("request", tasks, stop, serve).await,
                );
            }
            Self::Konnectivity(listener, door) => {
                tracing::info!(listen = %listener.bound(), direct = **door.elsewhere.load() == Elsewhere::Direct, "requests: konnectivity");
                let serve = |stream, peer| Arc::clone(&door).serve(stream, peer);
                // It refuses in words to the end of the drain, where others close: its clients would wait for a closed one.
                let never = CancellationToken::new();
                log_end(
                    "frontend",
                    listener.serve("request", tasks, never, serve).await,
                );
            }
            Self::Proxy(listener, door) => {
                tracing::info!(listen = %listener.bound(), "requests: forward proxy");
                let serve = |stream, peer| Arc::clone(&door).serve(stream, peer);
                log_end(
                    "frontend",
                    listener.serve("request", tasks, stop, serve).await,
                );
                door.pool.close();
            }
        }
    }
}
