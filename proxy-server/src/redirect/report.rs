//! What is shown before anything is done: the exact rules, and what is not in them and why. Pure.
//!
//! As text the report is comments behind the rules, so that the whole can be handed to `nft`. Names come from the
//! cluster and are shown escaped: one with a line break in it would add a rule otherwise.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use ipnet::IpNet;
use serde::Serialize;

use super::addresses::{Addresses, LeftOut, Why};
use super::ruleset::{Family, Lead, Ruleset, element};
use crate::cluster::ClusterTable;

/// What is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Report {
    /// The text that `nft` gets.
    pub(super) ruleset: String,
    mark: String,
    ports: Vec<Port>,
    addresses: Vec<String>,
    pub(super) left_out: Vec<Shown>,
    pub(super) notes: Vec<String>,
}

/// Where a port is led.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Port {
    family: String,
    port: u16,
    to: String,
}

/// An address that is left out.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Shown {
    pub(super) address: String,
    pub(super) why: String,
    pub(super) nodes: Vec<String>,
    /// Nobody has to do anything about it.
    #[serde(skip)]
    pub(super) is_meant: bool,
}

impl From<&LeftOut> for Shown {
    fn from(left: &LeftOut) -> Self {
        Self {
            address: element(&left.address),
            why: left.why.to_string(),
            nodes: left.nodes.clone(),
            is_meant: left.why == Why::AlwaysDirect,
        }
    }
}

impl Shown {
    /// One line, whatever the names are.
    pub(super) fn line(&self) -> String {
        let names: Vec<_> = self.nodes.iter().map(|name| escaped(name)).collect();
        format!("{} is {}: {}", self.address, self.why, names.join(", "))
    }
}

/// In printable ASCII.
fn escaped(name: &str) -> String {
    name.escape_default().to_string()
}

impl Report {
    pub(super) fn new(ruleset: &Ruleset, addresses: &Addresses, cluster: &ClusterTable) -> Self {
        let port = |lead: &Lead| Port {
            family: lead.family.to_string(),
            port: lead.port,
            to: lead.to.to_string(),
        };
        Self {
            ruleset: ruleset.text(),
            mark: ruleset.mark.to_string(),
            ports: ruleset.leads.iter().map(port).collect(),
            addresses: ruleset.addresses.iter().map(element).collect(),
            left_out: addresses.left_out.iter().map(Shown::from).collect(),
            notes: notes(&ruleset.leads, &addresses.led, cluster),
        }
    }

    /// The rules, and the rest as comments.
    pub(super) fn text(&self) -> String {
        let mut text = self.ruleset.clone();
        let plural = if self.addresses.len() == 1 { "" } else { "es" };
        writeln!(
            text,
            "# {} address{plural} of edge nodes",
            self.addresses.len()
        )
        .ok(); // a String takes everything
        for left in &self.left_out {
            writeln!(text, "# left out: {}", left.line()).ok();
        }
        for note in &self.notes {
            writeln!(text, "# {note}").ok();
        }
        text
    }
}

/// What an operator would wonder about.
fn notes(leads: &[Lead], led: &[IpNet], cluster: &ClusterTable) -> Vec<String> {
    let mut notes = Vec::new();
    for family in Family::ALL {
        let addresses = led.iter().filter(|net| Family::of(net) == family).count();
        if addresses > 0 && !leads.iter().any(|lead| lead.family == family) {
            notes.push(format!(
                "left out: all {family} addresses ({addresses}), as no `intercept` frontend listens on {family}; one on '[::]:PORT' takes both"
            ));
        }
    }
    let mut ports: BTreeMap<u16, Vec<&str>> = BTreeMap::new();
    for node in cluster.nodes().values() {
        let port = node.kubelet_port;
        if node.edge && !leads.iter().any(|lead| lead.port == port) {
            ports.entry(port).or_default().push(&node.name);
        }
    }
    for (port, nodes) in ports {
        let first = nodes.first().copied().unwrap_or_default();
        notes.push(format!(
            "no `intercept` frontend is for port {port}, where {} kubelets listen, such as that of {}",
            nodes.len(),
            escaped(first)
        ));
    }
    notes
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::cluster::nodes::AGENT;
    use crate::cluster::nodes::tests::{node, trim};
    use crate::config::{Config, Kubernetes, Mark};
    use crate::route::RouteTable;

    #[test]
    fn the_report_says_what_is_left_out_and_no_name_breaks_out_of_its_line() {
        let hostile = "x\n}\nflush ruleset\n#\u{2028}é\"'";
        let nodes = ["edge1", hostile].map(|name| {
            let value = node(
                name,
                json!({}),
                json!({AGENT: if name == "edge1" { "a" } else { "b" }}),
                &[("InternalIP", "10.1.0.1"), ("InternalIP", "fd00::1")],
            );
            let node = trim(value, &Kubernetes::default()).unwrap();
            (node.name.clone(), Arc::new(node))
        });
        let cluster = ClusterTable::new(nodes.into());
        let text = "frontends: [{type: intercept, listen: '0.0.0.0:10250'}]\n\
                    routes: [{node: edge2, addresses: [10.1.0.2, 'fd00::2']}]";
        let config: Config = daemon::config::parse(Path::new("x.yaml"), text).unwrap();
        let leads = Lead::all(&config);
        let addresses = Addresses::new(&RouteTable::new(&config.routes), &cluster, &[], |_, _| {
            false
        });
        let ruleset = Ruleset::new(Mark::DEFAULT, &leads, &addresses.led);
        let report = Report::new(&ruleset, &addresses, &cluster);
        let text = report.text();
        let (rules, comments) = text.split_at(ruleset.text().len());
        assert_eq!(rules, ruleset.text());
        let escaped = r#"x\n}\nflush ruleset\n#\u{2028}\u{e9}\"\'"#;
        let wanted = [
            "# 1 address of edge nodes".to_owned(),
            format!("# left out: 10.1.0.1 is shared by nodes that different agents serve: edge1, {escaped}"),
            format!("# left out: fd00::1 is shared by nodes that different agents serve: edge1, {escaped}"),
            "# left out: all IPv6 addresses (1), as no `intercept` frontend listens on IPv6; one on '[::]:PORT' takes both".to_owned(),
            "# no `intercept` frontend is for port 10350, where 2 kubelets listen, such as that of edge1".to_owned(),
        ];
        assert_eq!(comments.lines().collect::<Vec<_>>(), wanted);
        let shown = serde_json::to_value(&report).unwrap();
        assert_eq!(shown["addresses"], json!(["10.1.0.2"]));
        assert_eq!(shown["leftOut"][0]["nodes"], json!(["edge1", hostile]));
        assert_eq!(
            shown["ports"][0],
            json!({"family": "IPv4", "port": 10250, "to": "0.0.0.0:10250"})
        );
    }
}
