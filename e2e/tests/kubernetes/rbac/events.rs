//! Events at the Node whose path changes.

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{BY_LINE, Cluster, until};
use serde_json::{Value, json};

use super::{DEADLINE, forbidden, told_soon};
use crate::events::on_node;

/// edge1 is to be reached by a line and nothing else, or as before: its path changes. It shares its address, so no line
/// may be taken to it.
fn is_by_line(cluster: &Cluster, is_so: bool) -> Result<()> {
    let (pool, mode) = match is_so {
        true => (json!(BY_LINE), "refused"),
        false => (json!(null), "tunnel"),
    };
    let patch = json!({"metadata": {"labels": {"apps.openyurt.io/nodepool": pool}}});
    let patch = patch.to_string();
    cluster
        .kubectl()
        .ok(&["patch", "node", "edge1", "--type=merge", "-p", &patch])?;
    until(DEADLINE, &format!("the path of edge1 is {mode}"), || {
        let node = cluster.tunnel().wait_node("edge1")?;
        let path = node.path.context("it has no path")?;
        // Noticed, and so to be told of.
        ensure!(path.mode == mode && path.since_s.is_some(), "{path:?}");
        Ok(())
    })
}

fn changes_its_path(cluster: &Cluster, times: usize) -> Result<()> {
    (0..times).try_for_each(|_| {
        is_by_line(cluster, true)?;
        is_by_line(cluster, false)
    })
}

/// The Events that tell that edge1 is led another way.
fn events(cluster: &Cluster) -> Result<Vec<Value>> {
    on_node(cluster, "edge1", "PathChanged")
}

pub(super) fn no_event_is_made(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    is_by_line(cluster, true)?;
    let told = told_soon(cluster, mark, &forbidden("create", "events"));
    let there = events(cluster)?;
    is_by_line(cluster, false)?;
    ensure!(there.is_empty(), "{there:?}");
    told
}

/// `kubectl describe` shows them at the Node.
pub(super) fn events_are_made(cluster: &mut Cluster) -> Result<()> {
    changes_its_path(cluster, 1)?;
    until(DEADLINE, "an Event is told of edge1", || {
        let shown = cluster.kubectl().ok(&["describe", "node", "edge1"])?;
        let shown = String::from_utf8(shown)?;
        let there = events(cluster)?;
        ensure!(
            !there.is_empty() && shown.contains("PathChanged"),
            "{shown}"
        );
        Ok(())
    })
}

pub(super) fn no_event_counts(cluster: &mut Cluster) -> Result<String> {
    let mark = cluster.tunnel().server().mark();
    // What was told within the last minutes is told again.
    changes_its_path(cluster, 2)?;
    // Those between that are made anew are taken, so it may be told more than once.
    let what = forbidden("patch", "events");
    until(DEADLINE, &what, || {
        let log = cluster.tunnel().server().log_since(mark);
        ensure!(log.replace('\\', "").contains(&what), "{log}");
        Ok(what.clone())
    })
}

pub(super) fn events_count(cluster: &mut Cluster) -> Result<()> {
    changes_its_path(cluster, 2)?;
    until(DEADLINE, "an Event counts", || {
        let there = events(cluster)?;
        let counts = |event: &Value| {
            let count = event.pointer("/series/count").and_then(Value::as_u64);
            count.is_some_and(|count| count > 1)
        };
        ensure!(there.iter().any(counts), "{there:#?}");
        Ok(())
    })
}
