//! `make bench`: Corvid, straight and by way of another server, beside a plain TCP splice and a TLS splice of two hops in
//! two processes, in one run on one machine. Rounds are interleaved and medians shown; the load and the target share the cores with what is measured,
//! so ratios say more than figures. Then the same past the tunnel, by a line; a thousand nodes on a line that are looked at;
//! and a thousand nodes that are scraped beside other requests.
#![expect(clippy::print_stdout, reason = "a table is the product")]
#![expect(
    clippy::indexing_slicing,
    reason = "a wrong index ends a benchmark, and nothing else"
)]

mod hop;
mod load;
mod memory;
mod probes;
mod scrapes;
mod splice;
mod table;
mod tunnel;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Measures Corvid beside plain splices.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    role: Option<Role>,
    /// Rounds; the medians are shown.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// MiB moved in each transfer.
    #[arg(long, default_value_t = 256)]
    mib: u64,
    /// Sessions for the memory of an idle one.
    #[arg(long, default_value_t = 500)]
    sessions: usize,
    #[command(flatten)]
    scrapes: scrapes::Options,
    #[command(flatten)]
    probes: probes::Options,
    /// Measures the scrapes alone.
    #[arg(long, conflicts_with = "line_only")]
    scrapes_only: bool,
    /// Measures lines alone.
    #[arg(long)]
    line_only: bool,
}

/// What this program is when it starts itself.
#[derive(Debug, Subcommand)]
enum Role {
    /// One hop: accepts and connects on, plain or with TLS on one side.
    #[command(hide = true)]
    Splice(splice::Splice),
    #[command(hide = true)]
    Exporters(scrapes::Exporters),
    #[command(hide = true)]
    Agents(scrapes::Agents),
    #[command(hide = true)]
    Scraper(scrapes::Scraper),
}

fn main() -> Result<()> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    match args.role {
        Some(Role::Splice(splice)) => runtime.block_on(splice.run()),
        Some(Role::Exporters(exporters)) => runtime.block_on(exporters.run()),
        Some(Role::Agents(agents)) => runtime.block_on(agents.run()),
        Some(Role::Scraper(scraper)) => runtime.block_on(Box::pin(scraper.run())),
        None => runtime.block_on(Box::pin(measure(&args))),
    }
}

async fn measure(args: &Args) -> Result<()> {
    if !args.scrapes_only {
        if !args.line_only {
            beside_splices(args).await?;
        }
        by_a_line(args).await?;
        probes::measure(&args.probes)?;
    }
    if args.line_only {
        return Ok(());
    }
    Box::pin(scrapes::measure(&args.scrapes)).await
}

async fn beside_splices(args: &Args) -> Result<()> {
    let target = load::Target::start().await?;
    let ways = [
        tunnel::Way::plain(target.address).await?,
        tunnel::Way::tls(target.address).await?,
        tunnel::Way::corvid(target.address).await?,
        tunnel::Way::by_a_peer(target.address).await?,
    ];
    let results = rounds(args, &ways).await?;
    let [_, _, corvid, _] = &ways;
    let streams = memory::idle_streams(corvid, 1000).await?;
    drop(ways);
    let sessions = memory::idle_sessions(args.sessions).await?;
    table::print(&results, &streams, &sessions);
    Ok(())
}

async fn by_a_line(args: &Args) -> Result<()> {
    let target = load::Target::start().await?;
    let ways = [
        tunnel::Way::straight(target.address).await?,
        tunnel::Way::one_splice(target.address).await?,
        tunnel::Way::by_a_line(target.address).await?,
    ];
    table::print_line(&rounds(args, &ways).await?);
    Ok(())
}

/// Everything by each way, one after the other, so many times.
async fn rounds(args: &Args, ways: &[tunnel::Way]) -> Result<Vec<table::Samples>> {
    let mut results: Vec<table::Samples> = ways.iter().map(|_| table::Samples::default()).collect();
    for round in 0..args.rounds {
        for (way, samples) in ways.iter().zip(&mut results) {
            load::round(way, args.mib << 20, samples).await?;
            eprint_progress(round, args.rounds, way.name);
        }
    }
    Ok(results)
}

fn eprint_progress(round: usize, rounds: usize, name: &str) {
    use std::io::Write as _;
    writeln!(std::io::stderr(), "round {}/{rounds}: {name}", round + 1).ok(); // progress is no result
}
