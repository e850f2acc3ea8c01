//! What stands before anything else does: the observe and admin endpoints, readiness, and the tasks whose health livez
//! tells.

use std::sync::Arc;

use daemon::admin::{Endpoint, Reply, Routes};
use daemon::{Listen, LogHandle, Readiness, ReadinessGuard, Tasks};
use http::StatusCode;

use super::log_end;
use crate::config::Config;
use crate::serve::Forwarder;
use crate::status;

/// The endpoints, bound, and what they tell of.
pub(super) struct Ground {
    pub(super) metrics: daemon::Metrics,
    pub(super) readiness: Readiness,
    /// Dropped once requests are served.
    pub(super) starting: ReadinessGuard,
    /// What must not end.
    pub(super) service: Tasks,
    /// Sessions of agents.
    pub(super) sessions: Tasks,
    /// What writes to the cluster; stops first: from then on another server may do so.
    pub(super) writes: Tasks,
    /// The endpoints, which answer until the very end.
    pub(super) ops: Tasks,
    /// Where livez, readyz and metrics are.
    pub(super) observe: Listen,
    /// Where the admin endpoints are.
    pub(super) admin: Vec<Listen>,
    to_observe: Option<Endpoint>,
    to_admin: Vec<Endpoint>,
}

impl Ground {
    pub(super) fn bind(config: &Config) -> anyhow::Result<Self> {
        let handover = config.handover;
        let metrics = daemon::Metrics::new(env!("CARGO_PKG_VERSION"));
        let observe = Endpoint::observe(&config.observe.listen, &metrics, handover)?;
        let mut admin = vec![Endpoint::admin(&config.admin.listen, &metrics, handover)?];
        if let Some(socket) = &config.admin.socket {
            let socket = Listen::Unix(socket.clone());
            admin.push(Endpoint::admin(&socket, &metrics, handover)?);
        }
        let readiness = Readiness::new();
        Ok(Self {
            metrics,
            starting: readiness.register("proxy-server"),
            readiness,
            service: Tasks::new(),
            sessions: Tasks::new(),
            writes: Tasks::new(),
            ops: Tasks::new(),
            observe: observe.bound().clone(),
            admin: admin
                .iter()
                .map(|endpoint| endpoint.bound().clone())
                .collect(),
            to_observe: Some(observe),
            to_admin: admin,
        })
    }

    /// Answers livez, readyz and metrics, if it does not yet.
    pub(super) fn serve_observe(&mut self) {
        let Some(endpoint) = self.to_observe.take() else {
            return;
        };
        let (readiness, metrics) = (self.readiness.clone(), self.metrics.clone());
        self.serve(endpoint, Routes::observe(readiness, &self.alive(), metrics));
    }

    pub(super) fn serve_admin(&mut self, server: &str, log: &LogHandle, of: &Arc<Forwarder>) {
        for endpoint in std::mem::take(&mut self.to_admin) {
            let (server, registry) = (server.to_owned(), of.registry.clone());
            let (of_nodes, of_cluster) = (Arc::clone(of), Arc::clone(of));
            let (of_ways, here) = (Arc::clone(of), server.clone());
            let peers = Arc::clone(&of.peers);
            let routes = Routes::admin(log.clone())
                .probes(self.readiness.clone(), &self.alive())
                .get("/sessions", move |_request| {
                    let reply = Reply::json(&status::sessions(&server, &registry));
                    async move { reply }
                })
                .get("/nodes", move |_request| {
                    let reply = Reply::json(&status::nodes(&of_nodes));
                    async move { reply }
                })
                .get("/peers", move |_request| {
                    let reply = Reply::json(&status::peers(&peers));
                    async move { reply }
                })
                .get("/explain", move |request| {
                    let asked = request.query.as_deref().unwrap_or_default();
                    let asked = asked.strip_prefix("to=").unwrap_or_default();
                    let reply = match asked.parse() {
                        Ok(to) => Reply::json(&status::explain(&of_ways, &here, &to)),
                        Err(_) => Reply::text(
                            StatusCode::BAD_REQUEST,
                            "/explain?to=HOST:PORT, with a node, address or name\n",
                        ),
                    };
                    async move { reply }
                })
                .get("/cluster", move |_request| {
                    let reply = Reply::json(&status::cluster(&of_cluster));
                    async move { reply }
                });
            self.serve(endpoint, routes);
        }
    }

    /// What must go on for the process to be alive.
    fn alive(&self) -> [Tasks; 3] {
        [&self.service, &self.sessions, &self.writes].map(Clone::clone)
    }

    fn serve(&self, endpoint: Endpoint, routes: Routes) {
        let tasks = self.ops.clone();
        self.ops.critical("http", async move {
            log_end("http", endpoint.serve(routes, &tasks).await);
        });
    }
}
