//! The stand-in kubelet as a process of its own; see `e2e::kubelet`. Reports go to the standard output.

use std::io::Write;
use std::net::{SocketAddr, TcpListener};

use anyhow::{Context, Result};
use clap::Parser;
use e2e::kubelet;

#[derive(Parser)]
struct Cli {
    /// Name that `name` and the metrics answer with.
    #[arg(long)]
    name: String,
    /// Where the behaviours are served.
    #[arg(long, default_value = "0.0.0.0:10250")]
    listen: SocketAddr,
    /// Where /metrics is served.
    #[arg(long, default_value = "0.0.0.0:9100")]
    metrics: SocketAddr,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let bind = |addr| TcpListener::bind(addr).with_context(|| format!("listening on {addr}"));
    let (listener, metrics) = (bind(cli.listen)?, bind(cli.metrics)?);
    say(&format!(
        "ready on {} and {}",
        listener.local_addr()?,
        metrics.local_addr()?
    ));
    std::thread::scope(|scope| {
        scope.spawn(|| kubelet::metrics(&metrics, &cli.name));
        kubelet::serve(&listener, &cli.name, say)
    })?;
    Ok(())
}

fn say(line: &str) {
    // Nobody reads any more: then there is nobody to tell.
    writeln!(std::io::stdout().lock(), "{line}").ok();
}
