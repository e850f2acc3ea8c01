//! `proxy-server redirect`: rules in the network namespace of a control-plane host that lead what it dials at edge nodes
//! (kube-apiserver: `InternalIP:10250`) to the `intercept` frontend on the same host.
//!
//! What is led there follows from the configuration that the server itself runs on: ports from its `intercept`
//! frontends, addresses from `routes` and the cluster's nodes, the exempted mark from `direct`. It is always shown
//! before it is done. Which rules (`redirect/ruleset.rs`) and for which addresses (`redirect/addresses.rs`) are pure
//! decisions; `redirect/nft.rs` alone touches the kernel.
//!
//! | command | reads | does |
//! | --- | --- | --- |
//! | `--dry-run` | the configuration, all nodes once | shows, and needs no privilege |
//! | `--apply` | the same | shows, makes the table in one transaction, ends |
//! | `--run` | the same, and follows the nodes | the same, keeps the table right (`redirect/keep.rs`), removes it at its end unless another run is there (`redirect/presence.rs`) |
//! | `--remove` | nothing | removes the table; it need not be there |
//!
//! | failure | what happens |
//! | --- | --- |
//! | no `intercept` frontend in the configuration, or only with `transparent` or port 0 | said; exit 64; nothing is touched |
//! | the nodes can't be listed in time | `--dry-run`, `--apply`: said, nothing is touched; `--run`: begins with `routes` and what a killed run has left |
//! | no `nft`, no `CAP_NET_ADMIN`, the kernel refuses | said; `--run` ends if that is so at its start |
//! | the same later, or the table vanished or is another | `redirect/keep.rs` |
//! | SIGKILL | the table stays until `--remove`, or is replaced by the next `--run` or `--apply` |

mod addresses;
mod keep;
mod nft;
mod presence;
mod report;
mod ruleset;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use addresses::Addresses;
use daemon::{ConfigError, Exit, Signals, Tasks};
use ipnet::IpNet;
use keep::Keeper;
use nft::NftError;
use presence::Presence;
use proto::{Destination, Host};
use report::Report;
use ruleset::{Lead, Ruleset};
use tokio::time::timeout;

use crate::cluster::{ClientError, Cluster, ClusterTable, Source, Watch};
use crate::commands::{fail, say};
use crate::config::{self, Config, Mark, Overrides};
use crate::path::{Known, Meant, Paths, direct};
use crate::route::RouteTable;

/// For reading all nodes once.
const LIST: Duration = Duration::from_secs(15);
/// `--run` waits so long for them before it begins with what it knows.
const PATIENCE: Duration = Duration::from_secs(5);

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Make the table and end.
    Apply,
    /// Show only.
    DryRun,
    /// Remove the table.
    Remove,
    /// Make the table and keep it right.
    Run,
}

/// What was typed.
#[derive(Debug, Clone)]
pub struct Command {
    /// What to do.
    pub action: Action,
    /// Show JSON.
    pub json: bool,
    /// The configuration file.
    pub file: PathBuf,
    /// What goes over it.
    pub overrides: Overrides,
}

/// Why nothing was done.
#[derive(Debug, thiserror::Error)]
enum RedirectError {
    /// The configuration can't be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is no frontend to lead anything to.
    #[error(
        "{}: no `intercept` frontend to lead connections to; add one, such as {{type: intercept, listen: '[::]:10250', allow: [{{from: [the addresses of this host], nodes: ['*'], ports: [10250]}}]}}, without `transparent` and with a port", file.display()
    )]
    NoFrontend {
        /// The configuration.
        file: PathBuf,
    },
    /// The way to kube-apiserver can't be used.
    #[error("kubernetes")]
    Kubernetes(#[source] ClientError),
    /// The nodes are not known.
    #[error("the cluster's nodes could not be listed within {} s: {why}", LIST.as_secs())]
    List {
        /// What was said last.
        why: String,
    },
    /// The rules could not be changed.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// The process could not be set up.
    #[error("set up the process")]
    Process(#[source] std::io::Error),
    /// The configured log filter can't be used.
    #[error(transparent)]
    Log(#[from] daemon::telemetry::TelemetryError),
}

impl RedirectError {
    /// Starting it again does not help if the configuration is wrong.
    const fn exit(&self) -> Exit {
        match self {
            Self::Config(error) => error.exit(),
            Self::NoFrontend { .. } | Self::Log(_) => Exit::Usage,
            Self::Kubernetes(_) | Self::List { .. } | Self::Nft(_) | Self::Process(_) => {
                Exit::Failed
            }
        }
    }
}

/// What the rules are made of, apart from the nodes.
#[derive(Debug)]
struct Settings {
    routes: RouteTable,
    leads: Vec<Lead>,
    mark: Mark,
    paths: Box<Paths>,
}

impl Settings {
    fn new(file: &Path, config: &Config) -> Result<Self, RedirectError> {
        let leads = Lead::all(config);
        if leads.is_empty() {
            let file = file.to_owned();
            return Err(RedirectError::NoFrontend { file });
        }
        Ok(Self {
            routes: RouteTable::new(&config.routes),
            leads,
            mark: config.mark(),
            paths: Box::new(Paths::unwatched(config)),
        })
    }

    /// The rules for these nodes on a machine with the addresses `own`; `more` are led too, unless they must not be.
    fn plan(&self, cluster: &ClusterTable, own: &[IpAddr], more: &[IpNet]) -> (Ruleset, Report) {
        let past_us = |node: &str, address| self.leaves_to_itself(cluster, node, address);
        let mut addresses = Addresses::new(&self.routes, cluster, own, past_us);
        let left_out = &addresses.left_out;
        let may = |net: &&IpNet| !left_out.iter().any(|left| left.address.contains(*net));
        let more: Vec<_> = more.iter().filter(may).copied().collect();
        addresses.led.extend(more);
        let ruleset = Ruleset::new(self.mark, &self.leads, &addresses.led);
        let report = Report::new(&ruleset, &addresses, cluster);
        (ruleset, report)
    }

    /// Whether what is dialled there needs us for nothing.
    fn leaves_to_itself(&self, cluster: &ClusterTable, node: &str, address: IpAddr) -> bool {
        let known = Known {
            routes: &self.routes,
            cluster,
            // Who dials a proxy-server's address reaches it, whatever we say.
            servers: &|_| None,
        };
        let at = |lead: &Lead| Destination {
            host: Host::Ip(address),
            port: lead.port,
        };
        self.leads.iter().map(at).all(|to| {
            let (to, pod) = (&to, None);
            let meant = Meant { node, to, pod };
            self.paths.leaves_to_itself(known, meant) == Some(address)
        })
    }
}

/// Does what was typed.
#[must_use]
pub fn main(command: &Command) -> Exit {
    let done = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(RedirectError::Process)
        .and_then(|runtime| runtime.block_on(Box::pin(act(command))));
    done.unwrap_or_else(|error| fail(&error, error.exit()))
}

async fn act(command: &Command) -> Result<Exit, RedirectError> {
    if command.action == Action::Remove {
        nft::remove().await?;
        let table = ruleset::TABLE;
        return Ok(say(&format!("there is no table inet {table} any more")));
    }
    let config = config::load(&command.file, &command.overrides)?;
    let settings = Settings::new(&command.file, &config)?;
    let source = config.kubernetes.as_ref().map(Source::new);
    if let Some(source) = &source {
        source.check(&[]).map_err(RedirectError::Kubernetes)?;
    }
    let watch = source.zip(config.kubernetes.clone());
    // Nobody scrapes a command.
    let metrics = daemon::Metrics::new(env!("CARGO_PKG_VERSION"));
    let watch = watch.map(|(source, settings)| Watch {
        cluster: Arc::new(Cluster::configured(&settings, &metrics)),
        source,
        settings,
    });
    if command.action == Action::Run {
        return run(command, config, settings, watch).await;
    }
    let cluster = match watch {
        Some(watch) => listed(watch).await?,
        None => Arc::default(),
    };
    let (ruleset, report) = settings.plan(&cluster.table(), &direct::interfaces(), &[]);
    if command.json {
        say(&serde_json::to_string_pretty(&report).unwrap_or_default());
    } else {
        say(&report.text());
    }
    if command.action == Action::Apply {
        nft::apply(&ruleset).await?;
        if !command.json {
            say("# in place; nodes that come later are not in it");
        }
    }
    Ok(Exit::Drained)
}

/// The cluster once all nodes are known.
async fn listed(watch: Watch) -> Result<Arc<Cluster>, RedirectError> {
    let cluster = Arc::clone(&watch.cluster);
    let known = tokio::select! {
        never = watch.run() => match never {},
        known = timeout(LIST, synced(&cluster)) => known,
    };
    let silent = |_elapsed| {
        let why = cluster.freshness().failure;
        let why = why.unwrap_or_else(|| "kube-apiserver says nothing".to_owned());
        RedirectError::List { why }
    };
    known.map_err(silent)?;
    Ok(cluster)
}

/// Waits until all nodes were read once.
async fn synced(cluster: &Cluster) {
    let mut changes = cluster.changes();
    // Its sender is in `cluster`.
    while cluster.is_waiting() && changes.changed().await.is_ok() {}
}

/// Shows, applies and keeps the rules until it is told to stop, and removes them.
async fn run(
    command: &Command,
    config: Config,
    settings: Settings,
    watch: Option<Watch>,
) -> Result<Exit, RedirectError> {
    daemon::telemetry::init(config.log.format, &config.log.level)?;
    let signals = Signals::install().map_err(RedirectError::Process)?;
    let (shutdown, tasks) = (signals.shutdown(), Tasks::new());
    let presence = Presence::new().map_err(RedirectError::Process)?;
    let cluster = match watch {
        Some(watch) => {
            let cluster = Arc::clone(&watch.cluster);
            let stop = tasks.stopping();
            tasks.critical("cluster", async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    never = watch.run() => match never {},
                }
            });
            cluster
        }
        None => Arc::default(),
    };
    tokio::select! {
        _late = timeout(PATIENCE, synced(&cluster)) => {}
        () = shutdown.cancelled() => {}
    }
    if shutdown.is_cancelled() {
        leave(presence).await?;
        return Ok(Exit::Drained);
    }
    let mut keeper = Keeper::new(command, config, settings, cluster);
    let begun = keeper.begin().await;
    if let Err(error) = begun {
        // What a killed run has left is removed too: nobody would keep it right.
        leave(presence).await.ok();
        return Err(error.into());
    }
    daemon::sd::ready();
    let watched = tasks.clone();
    let _watchdog = daemon::sd::Watchdog::start(move || watched.failure().is_none());
    let stop = tasks.stopping();
    let kept = keeper.keep(signals.reload());
    tasks.critical("rules", async move {
        tokio::select! {
            () = stop.cancelled() => {}
            never = kept => match never {},
        }
    });
    let exit = tokio::select! {
        () = shutdown.cancelled() => Exit::Drained,
        name = tasks.failed() => {
            tracing::error!(task = name, "a task that must not end has ended");
            Exit::Failed
        }
    };
    daemon::sd::stopping();
    tasks.drain(nft::LIMIT).await;
    leave(presence).await?;
    Ok(exit)
}

/// Removes the rules, unless another run keeps them.
async fn leave(presence: Presence) -> Result<(), NftError> {
    if presence.leaves_nobody() {
        nft::remove().await?;
        tracing::info!("the rules are removed");
    } else {
        tracing::info!("the rules stay: another run keeps them");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cluster::nodes::tests::{node, trim};
    use crate::config::Kubernetes;

    /// Which of the addresses of two nodes at the edge are led to us with that configuration.
    fn led(lines: &str) -> Vec<String> {
        let text = format!("frontends: [{{type: intercept, listen: '0.0.0.0:10250'}}]\n{lines}");
        let config: Config = daemon::config::parse(Path::new("x.yaml"), &text).unwrap();
        let settings = Settings::new(Path::new("x.yaml"), &config).unwrap();
        let label = json!({"openyurt.io/is-edge-worker": "true"});
        let nodes = [("press", "10.20.0.7"), ("lathe", "192.168.1.10")].map(|(name, ip)| {
            let value = node(name, label.clone(), json!({}), &[("InternalIP", ip)]);
            let node = trim(value, &Kubernetes::default()).unwrap();
            (node.name.clone(), Arc::new(node))
        });
        let (rules, _report) = settings.plan(&ClusterTable::new(nodes.into()), &[], &[]);
        rules
            .addresses
            .iter()
            .map(|a| a.addr().to_string())
            .collect()
    }

    #[test]
    fn what_is_always_dialled_as_any_machine_would_is_not_led_to_us() {
        let both = ["10.20.0.7", "192.168.1.10"];
        assert_eq!(led(""), both);
        let line = |more: &str| {
            led(&format!(
                "lines: [{{name: express, networks: [10.20.0.0/16]{more}}}]"
            ))
        };
        assert_eq!(line(", mode: direct"), ["192.168.1.10"]);
        // The tunnel may be needed, or more than routes.
        assert_eq!(line(""), both);
        assert_eq!(line(", mode: direct, interface: vpn0"), both);
        assert_eq!(line(", mode: direct, source: 10.0.0.1"), both);
        assert_eq!(line(", mode: direct, mark: 7"), both);
    }
}
