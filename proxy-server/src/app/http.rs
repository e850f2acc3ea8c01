//! The observe and admin endpoints of a proxy-server.

use std::sync::Arc;

use daemon::admin::{Endpoint, Reply, Routes};
use daemon::{Listen, LogHandle, Readiness, Tasks};

use super::log_end;
use crate::config::Config;
use crate::serve::Forwarder;
use crate::status;

pub(super) fn bind(
    config: &Config,
    metrics: &daemon::Metrics,
) -> anyhow::Result<(Endpoint, Vec<Endpoint>)> {
    let observe = Endpoint::observe(&config.observe.listen, metrics)?;
    let mut admin = vec![Endpoint::admin(&config.admin.listen, metrics)?];
    if let Some(socket) = &config.admin.socket {
        admin.push(Endpoint::admin(&Listen::Unix(socket.clone()), metrics)?);
    }
    Ok((observe, admin))
}

pub(super) fn serve(
    config: &Config,
    (observe, admin): (Endpoint, Vec<Endpoint>),
    readiness: &Readiness,
    alive: &[&Tasks],
    ops: &Tasks,
    (metrics, log): (daemon::Metrics, LogHandle),
    forwarder: &Arc<Forwarder>,
) {
    let alive: Vec<Tasks> = alive.iter().map(|tasks| (*tasks).clone()).collect();
    let routes = Routes::observe(readiness.clone(), &alive, metrics);
    let mut all = vec![(observe, routes)];
    for endpoint in admin {
        let (server, registry) = (config.name.clone(), forwarder.registry.clone());
        let (of_nodes, of_cluster) = (Arc::clone(forwarder), Arc::clone(forwarder));
        let routes = Routes::admin(log.clone())
            .get("/sessions", move |_request| {
                let reply = Reply::json(&status::sessions(&server, &registry));
                async move { reply }
            })
            .get("/nodes", move |_request| {
                let reply = Reply::json(&status::nodes(&of_nodes));
                async move { reply }
            })
            .get("/cluster", move |_request| {
                let reply = Reply::json(&status::cluster(&of_cluster));
                async move { reply }
            });
        all.push((endpoint, routes));
    }
    for (endpoint, routes) in all {
        let tasks = ops.clone();
        ops.critical("http", async move {
            log_end("http", endpoint.serve(routes, &tasks).await);
        });
    }
}
