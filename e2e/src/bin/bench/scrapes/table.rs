//! The table, as Markdown.

use std::fmt::Write as _;

use anyhow::Result;

use super::scraper::Scraped;
use super::{Options, Phase};

const QUANTILES: [(f64, &str); 3] = [(0.5, "p50"), (0.99, "p99"), (1.0, "longest")];

pub(super) fn print(options: &Options, phases: [&Phase; 3]) -> Result<()> {
    let Options {
        nodes,
        interval,
        exporter_kib,
        cadvisor_kib,
        ..
    } = options;
    println!();
    println!(
        "| {nodes} nodes, {exporter_kib} and {cadvisor_kib} KiB each {interval} s | no scrapes | through Corvid | directly |"
    );
    println!("| --- | --: | --: | --: |");
    let table = Table(phases);
    table.row("CPU of the proxy-server, s/s", 3, |p| Ok(p.server))?;
    table.row("CPU of all agents, s/s", 3, |p| Ok(p.agents))?;
    table.row("CPU of scraper, exporters and kubelets, s/s", 3, |p| {
        Ok(p.scraper + p.exporters)
    })?;
    table.scrapes("scrapes/s", 1, |s, seconds| {
        Ok((s.exporter.count() + s.cadvisor.count()) as f64 / seconds)
    })?;
    table.scrapes(
        "Mbit/s",
        0,
        |s, seconds| Ok(s.bytes as f64 * 8e-6 / seconds),
    )?;
    table.scrapes("connections that the scraper opened", 0, |s, _| {
        Ok(s.opened as f64)
    })?;
    for (share, name) in QUANTILES {
        let name = format!("an exporter's answer, {name}, ms");
        table.scrapes(&name, 1, |s, _| s.exporter.quantile(share))?;
    }
    for (share, name) in QUANTILES {
        let name = format!("a kubelet's answer, {name}, ms");
        table.scrapes(&name, 1, |s, _| s.cadvisor.quantile(share))?;
    }
    table.row("other requests/s", 1, |p| {
        Ok(p.asked.times.count() as f64 / p.seconds)
    })?;
    for (share, name) in QUANTILES {
        let name = format!("another request, {name}, ms");
        table.row(&name, 1, |p| p.asked.times.quantile(share))?;
    }
    table.row("failed", 0, |p| Ok(p.failures().count as f64))
}

struct Table<'a>([&'a Phase; 3]);

impl Table<'_> {
    fn row(&self, name: &str, digits: usize, value: impl Fn(&Phase) -> Result<f64>) -> Result<()> {
        self.line(name, digits, |phase| value(phase).map(Some))
    }

    /// A row for the phases with scrapes.
    fn scrapes(
        &self,
        name: &str,
        digits: usize,
        value: impl Fn(&Scraped, f64) -> Result<f64>,
    ) -> Result<()> {
        self.line(name, digits, |phase| {
            let scraped = phase.scraped.as_ref();
            scraped.map(|s| value(s, phase.seconds)).transpose()
        })
    }

    fn line(
        &self,
        name: &str,
        digits: usize,
        value: impl Fn(&Phase) -> Result<Option<f64>>,
    ) -> Result<()> {
        let mut line = format!("| {name} |");
        for phase in self.0 {
            match value(phase)? {
                Some(value) => write!(line, " {value:.digits$} |")?,
                None => line.push_str(" |"),
            }
        }
        println!("{line}");
        Ok(())
    }
}
