//! The agent's two HTTP endpoints: observe (livez, readyz, metrics) and admin (sessions, log level).

use std::sync::Arc;

use daemon::admin::{Endpoint, Reply, Routes};
use daemon::{LogHandle, Tasks, chain};

use crate::registry::Registry;
use crate::status::SessionStatus;

/// Answers until the end of `tasks`, which fail if it ends before.
pub(crate) fn serve(tasks: &Tasks, name: &'static str, endpoint: Endpoint, routes: Routes) {
    tracing::info!(listen = %endpoint.bound(), "{name} endpoint");
    let owner = tasks.clone();
    tasks.critical(name, async move {
        if let Err(error) = endpoint.serve(routes, &owner).await {
            tracing::error!(error = %chain(&error), "{name} endpoint");
        }
    });
}

/// What the admin endpoint answers.
pub(crate) fn admin(log: LogHandle, registry: Arc<Registry>, agent: String) -> Routes {
    Routes::admin(log).get("/sessions", move |_| {
        let all = registry.all();
        let sessions: Vec<_> = all
            .iter()
            .map(|live| SessionStatus::of(live, &agent))
            .collect();
        std::future::ready(Reply::json(&sessions))
    })
}
