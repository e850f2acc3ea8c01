//! A thousand nodes scraped beside other requests: what it costs, and what the others notice.
//!
//! Real are the proxy-server (a process, its log at `info`), whole edge-agents (one process) with QUIC sessions of their own,
//! TLS, credentials, routes. Stand-ins are the exporters and kubelets (one process) and the scraper (one process). Three
//! phases with the same other requests: no scrapes; scrapes through the forward proxy; the same scrapes straight to the
//! stand-ins, for what the machine would spend anyway. The first interval of each opens the connections and is not counted.

mod agents;
mod content;
mod door;
mod exporters;
mod nodes;
mod others;
mod scraper;
mod table;
mod times;

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

pub(crate) use agents::Agents;
use anyhow::{Context as _, Result, ensure};
use clap::Args;
pub(crate) use exporters::Exporters;
use others::{Asked, Others};
use scraper::Scraped;
pub(crate) use scraper::Scraper;
use times::Failures;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::hop::{Hop, Lines};
use crate::tunnel::{Server, address, wait_for_backend, wait_for_sessions};

/// The scraper's credentials.
const USER: &str = "prometheus";
const PASSWORD: &str = "only-for-this-benchmark";

/// How much is scraped.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// Nodes that are scraped.
    #[arg(long, default_value_t = 1000)]
    nodes: usize,
    /// Seconds from one scrape of a target to the next.
    #[arg(long, default_value_t = 15)]
    interval: u64,
    /// Intervals that are measured, after one that is not.
    #[arg(long, default_value_t = 2)]
    intervals: u32,
    /// Seconds without scrapes.
    #[arg(long, default_value_t = 10)]
    idle: u64,
    /// KiB of each answer of an exporter (plain HTTP).
    #[arg(long, default_value_t = 100)]
    exporter_kib: usize,
    /// KiB of each answer of a kubelet (TLS).
    #[arg(long, default_value_t = 400)]
    cadvisor_kib: usize,
}

/// Everything that takes part.
struct Cast {
    server: Hop,
    agents: Hop,
    exporters: Hop,
    others: Arc<Others>,
    dir: tempfile::TempDir,
    proxy: SocketAddr,
}

/// One phase.
#[derive(Debug, Default)]
struct Phase {
    /// CPU seconds a second.
    server: f64,
    agents: f64,
    exporters: f64,
    scraper: f64,
    asked: Asked,
    scraped: Option<Scraped>,
    seconds: f64,
}

/// Measures and prints a table.
///
/// # Errors
/// When a single request failed.
pub(crate) async fn measure(options: &Options) -> Result<()> {
    let cast = Cast::new(options)?;
    // The first request of each process pays for what is made once.
    let warm = cast.idle(1).await?;
    let idle = cast.idle(options.idle).await?;
    let tunnel = cast
        .scrapes(options, Some(cast.proxy), options.intervals)
        .await?;
    let direct = cast.scrapes(options, None, 1).await?;
    table::print(options, [&idle, &tunnel, &direct])?;
    let mut failures = Failures::default();
    for phase in [warm, idle, tunnel, direct] {
        failures.extend(phase.failures());
    }
    ensure!(
        failures.count == 0,
        "{} requests failed: {:#?}",
        failures.count,
        failures.said
    );
    Ok(())
}

impl Cast {
    fn new(options: &Options) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let d = dir.path();
        let (exporters, mut lines) = Hop::talking(
            role("exporters", d)?
                .arg(format!("--nodes={}", options.nodes))
                .args(sizes(options)),
        )?;
        ensure!(lines.next()? == "ready", "the exporters are not ready");
        let server = proxy_server(d, options.nodes)?;
        let backend = wait_for_backend(d)?;
        let proxy = address(d, "requests: forward proxy", "listen=")?.parse()?;
        let (agents, _) = Hop::talking(role("agents", d)?.arg(format!("--server={backend}")))?;
        wait_for_sessions(d, options.nodes)?;
        Ok(Self {
            server,
            agents,
            exporters,
            others: Others::new(d)?,
            dir,
            proxy,
        })
    }

    async fn idle(&self, seconds: u64) -> Result<Phase> {
        let nothing = async {
            sleep(Duration::from_secs(seconds)).await;
            Ok(None)
        };
        self.phase(None, nothing).await
    }

    async fn scrapes(
        &self,
        options: &Options,
        proxy: Option<SocketAddr>,
        intervals: u32,
    ) -> Result<Phase> {
        let mut command = role("scraper", self.dir.path())?;
        command
            .args(sizes(options))
            .arg(format!("--interval={}", options.interval))
            .arg(format!("--intervals={intervals}"));
        if let Some(proxy) = proxy {
            command.arg(format!("--proxy={proxy}"));
        }
        let (scraper, lines) = Hop::talking(&mut command)?;
        let (lines, warm) = said(lines).await?;
        ensure!(warm == "warm", "the scraper says {warm:?}");
        let scraped = async {
            let (_, text) = said(lines).await?;
            let scraped = serde_json::from_str(&text).context("read what was scraped")?;
            Ok(Some(scraped))
        };
        self.phase(Some(&scraper), scraped).await
    }

    /// Asks other things while `work` goes on, and says what both cost.
    async fn phase(
        &self,
        scraper: Option<&Hop>,
        work: impl Future<Output = Result<Option<Scraped>>>,
    ) -> Result<Phase> {
        let hops = [
            Some(&self.server),
            Some(&self.agents),
            Some(&self.exporters),
            scraper,
        ];
        let cpu = || -> Result<Vec<Duration>> {
            let each = hops.iter();
            each.map(|hop| hop.map_or(Ok(Duration::ZERO), Hop::cpu))
                .collect()
        };
        let (began, before) = (Instant::now(), cpu()?);
        let stop = CancellationToken::new();
        let work = async {
            let scraped = work.await;
            stop.cancel();
            // What a process spends is gone once it has been waited for.
            (scraped, cpu(), began.elapsed())
        };
        let ((scraped, after, lasted), asked) = tokio::join!(work, self.others.ask(stop.clone()));
        let seconds = lasted.as_secs_f64();
        let spent: Vec<f64> = before
            .into_iter()
            .zip(after?)
            .map(|(before, after)| after.saturating_sub(before).as_secs_f64() / seconds)
            .collect();
        Ok(Phase {
            server: spent[0],
            agents: spent[1],
            exporters: spent[2],
            scraper: spent[3],
            asked: asked?,
            scraped: scraped?,
            seconds,
        })
    }
}

impl Phase {
    fn failures(&self) -> Failures {
        let mut all = self.asked.failures.clone();
        if let Some(scraped) = &self.scraped {
            all.extend(scraped.failures.clone());
        }
        all
    }
}

/// This program in another role.
fn role(name: &str, dir: &Path) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(name).arg("--dir").arg(dir);
    Ok(command)
}

fn sizes(options: &Options) -> [String; 2] {
    [
        format!("--exporter-kib={}", options.exporter_kib),
        format!("--cadvisor-kib={}", options.cadvisor_kib),
    ]
}

/// The next line of a child, waited for elsewhere.
async fn said(mut lines: Lines) -> Result<(Lines, String)> {
    tokio::task::spawn_blocking(move || {
        let line = lines.next()?;
        Ok((lines, line))
    })
    .await?
}

fn proxy_server(dir: &Path, nodes: usize) -> Result<Hop> {
    let d = dir.display();
    let user = proxy_server::frontend::credentials::line(USER, PASSWORD)?;
    std::fs::write(dir.join("users"), user)?;
    let scrapers = format!(
        "{{type: forwardProxy, listen: '127.0.0.1:0', basicAuthFile: {d}/users, \
         allow: [{{users: [{USER}], nodes: ['*'], ports: ['1024-65535']}}]}}"
    );
    let mut routes = String::from("certificate: {ipAddresses: [127.0.0.1]}\nroutes:\n");
    for index in 0..nodes {
        let (name, high, low) = (nodes::name(index), index / 250, index % 250 + 1);
        routes.push_str(&format!(
            "- {{node: {name}, agent: {name}, addresses: [10.0.{high}.{low}]}}\n"
        ));
    }
    let server = Server {
        frontends: &[&scrapers],
        more: &routes,
        frontends_only: false,
        access_log: true,
    };
    server.start(dir)
}
