//! Alerts fire when they should, and every metric that rules, dashboard and scrape jobs name is one that a running
//! daemon has.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::kubelet::Behaviour;
use e2e::lab::{self, Lab, Small};
use e2e::manifests::{Overlay, folder, list, text};
use e2e::net::Host;
use e2e::{process, wait};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// promtool reads files and computes.
const PROMTOOL: Duration = Duration::from_secs(60);
/// What a scenario waits for happens within seconds.
const SOON: Duration = Duration::from_secs(60);
/// In front of every metric of ours.
const PREFIX: &str = "corvid_";

/// The rules as Prometheus reads them, in a folder with their tests.
fn rules() -> Result<(tempfile::TempDir, Value)> {
    let monitoring = Overlay::build("monitoring")?;
    let spec = monitoring
        .object("PrometheusRule", "corvid")?
        .pointer("/spec");
    let spec = spec.context("no spec")?.clone();
    let dir = tempfile::tempdir()?;
    // JSON is YAML.
    fs::write(dir.path().join("rules.yaml"), spec.to_string())?;
    let tests = folder().join("overlays/monitoring/rules_test.yaml");
    fs::copy(tests, dir.path().join("rules_test.yaml"))?;
    Ok((dir, spec))
}

fn promtool(dir: &Path, args: &[&str]) -> Result<()> {
    let mut command = Command::new("promtool");
    command.args(args).current_dir(dir);
    let done = process::output(command, PROMTOOL)?;
    let said = [done.stdout, done.stderr].concat();
    ensure!(
        done.status.success(),
        "promtool {args:?}: {}",
        String::from_utf8_lossy(&said)
    );
    Ok(())
}

fn alerts(spec: &Value) -> impl Iterator<Item = &Value> {
    list(spec, "/groups").flat_map(|group| list(group, "/rules"))
}

#[test]
fn alerts_fire_when_they_should_and_not_when_they_should_not() {
    let (dir, spec) = rules().unwrap();
    promtool(dir.path(), &["check", "rules", "rules.yaml"]).unwrap();
    promtool(dir.path(), &["test", "rules", "rules_test.yaml"]).unwrap();
    // promtool does not miss what nobody tests.
    let tests = fs::read_to_string(dir.path().join("rules_test.yaml")).unwrap();
    let tests: Value = serde_saphyr::from_str(&tests).unwrap();
    let (mut fires, mut silent) = (BTreeSet::new(), BTreeSet::new());
    for case in list(&tests, "/tests").flat_map(|group| list(group, "/alert_rule_test")) {
        let name = text(case, "/alertname").to_owned();
        if list(case, "/exp_alerts").next().is_some() {
            fires.insert(name);
        } else {
            silent.insert(name);
        }
    }
    let all: BTreeSet<_> = alerts(&spec)
        .map(|alert| text(alert, "/alert").to_owned())
        .collect();
    assert!(all.len() >= 10, "{all:?}");
    assert_eq!(fires, all, "each is seen to fire");
    assert_eq!(silent, all, "each is seen not to");
}

/// The dashboard in its ConfigMap.
fn dashboard() -> Result<Value> {
    let monitoring = Overlay::build("monitoring")?;
    let map = monitoring.object("ConfigMap", "corvid-dashboard")?;
    serde_json::from_str(text(map, "/data/corvid.json")).context("corvid.json")
}

/// What the panels ask Prometheus for.
fn asked(dashboard: &Value) -> Vec<String> {
    list(dashboard, "/panels")
        .flat_map(|panel| list(panel, "/targets"))
        .map(|target| text(target, "/expr").replace("$__rate_interval", "5m"))
        .collect()
}

#[test]
fn the_dashboard_asks_what_prometheus_understands() {
    let dashboard = dashboard().unwrap();
    let asked = asked(&dashboard);
    assert!(asked.len() > 20, "{asked:?}");
    let rules: Vec<_> = (0..)
        .zip(&asked)
        .map(|(i, expr)| json!({"record": format!("x:{i}"), "expr": expr}))
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let file = json!({"groups": [{"name": "panels", "rules": rules}]});
    fs::write(dir.path().join("panels.yaml"), file.to_string()).unwrap();
    promtool(dir.path(), &["check", "rules", "panels.yaml"]).unwrap();
    let ids: BTreeSet<_> = list(&dashboard, "/panels")
        .map(|panel| panel.pointer("/id").and_then(Value::as_u64))
        .collect();
    assert_eq!(ids.len(), list(&dashboard, "/panels").count(), "{ids:?}");
}

/// The words of an expression that are metrics of ours.
fn metrics_in(expr: &str) -> BTreeSet<String> {
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    expr.split(word)
        .filter(|word| word.starts_with(PREFIX))
        .map(str::to_owned)
        .collect()
}

/// Everything that is asked for anywhere, by whom: `true` are agents.
fn wanted() -> Result<Vec<(bool, String)>> {
    let (_, spec) = rules()?;
    let exprs = alerts(&spec).map(|alert| text(alert, "/expr").to_owned());
    let mut all = Vec::new();
    for expr in exprs.chain(asked(&dashboard()?)) {
        let of_agent = expr.contains("job=\"edge-agent\"");
        all.extend(metrics_in(&expr).into_iter().map(|name| (of_agent, name)));
    }
    Ok(all)
}

/// What `host` shows at `port`, as a scraper sees it.
fn scrape(host: &Host, port: u16) -> Result<String> {
    let answer = host.enter(|| -> Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        write!(
            stream,
            "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })??;
    ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    Ok(answer)
}

/// The names of samples in a scrape.
fn samples(scrape: &str) -> BTreeSet<String> {
    let name = |line: &str| {
        let end = line.find(['{', ' '])?;
        line.starts_with(PREFIX).then(|| line[..end].to_owned())
    };
    scrape.lines().filter_map(name).collect()
}

/// A lab whose server asks a cluster, which does not answer, and which has a node on a line that leads nowhere.
fn small(lab: &Lab) -> Result<Small> {
    let kubeconfig = lab.dir().join("kubeconfig");
    let cluster = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "it",
        "clusters": [{"name": "it", "cluster": {"server": "https://127.0.0.1:6443"}}],
        "users": [{"name": "it", "user": {"token": "none"}}],
        "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
    });
    fs::write(&kubeconfig, cluster.to_string())?;
    lab.small_with(
        |config| {
            config["kubernetes"] =
                json!({"kubeconfig": kubeconfig, "dns": {"addresses": ["10.96.0.7"]}});
            config["lines"] = json!([{"name": "express", "networks": ["192.0.2.0/24"]}]);
            config["path"] = json!({"probes": {"interval": "1s", "timeout": "1s"}});
            config["routes"] = json!([{"node": "gone", "addresses": ["192.0.2.9"]}]);
        },
        |_| {},
    )
}

/// Makes happen what the metrics count: labelled ones are not there before.
fn let_it_happen(lab: &Lab, small: &mut Small) -> Result<()> {
    let Small { agent, server, .. } = small;
    let mut tunnel = server.door().open("edge1:10250", Behaviour::Name)?;
    ensure!(tunnel.line()? == "edge1");
    // An agent that comes back after its server went. The server counts from here on.
    server.stop(SOON)?;
    server.start_again()?;
    server.wait_session("edge1", SOON)?;
    let mut tunnel = server.door().open("edge1:10250", Behaviour::Name)?;
    ensure!(tunnel.line()? == "edge1");
    // A requester without TLS at a door that asks for it.
    lab.host("cloud")?.enter(|| -> Result<()> {
        let mut stream = TcpStream::connect("203.0.113.10:8444")?;
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
        stream.read_to_end(&mut Vec::new()).ok(); // an alert or a reset
        Ok(())
    })??;
    let by_line = server.door().open("gone:10250", Behaviour::Name);
    ensure!(
        by_line.is_err(),
        "a line that leads nowhere leads to a node"
    );
    // A configuration that is refused.
    let file = lab.dir().join("proxy-server.yaml");
    let right = fs::read(&file)?;
    fs::write(&file, "nonsense: 1\n")?;
    let mark = server.process().mark();
    server.process().signal(Signal::SIGHUP)?;
    let refused = "refused";
    server.process().wait_for_line_since(mark, refused, SOON)?;
    fs::write(&file, right)?;
    // It is no longer wanted.
    let mark = agent.process().mark();
    server.tool(&["agent", "revoke", "edge1"])?;
    agent.process().wait_for_line_since(mark, "revoked", SOON)?;
    Ok(())
}

/// What only a server has whose cluster has answered; the cluster suite looks for them.
const OF_A_CLUSTER: [&str; 2] = ["corvid_cluster_nodes", "corvid_dns_writes_total"];

#[test]
fn every_metric_that_is_asked_for_is_one_that_a_daemon_has() {
    lab::scenario(|lab| {
        let wanted = wanted()?;
        let mut small = small(lab)?;
        let_it_happen(lab, &mut small)?;
        let (cloud, edge) = (lab.host("cloud")?, lab.host("edge1")?);
        wait::poll(SOON, "all metrics", || -> Result<()> {
            let (server, agent) = (
                samples(&scrape(&cloud, 9440)?),
                samples(&scrape(&edge, 9441)?),
            );
            let has = |(of_agent, name): &&(bool, String)| {
                if OF_A_CLUSTER.contains(&name.as_str()) {
                    return true;
                }
                let theirs = if *of_agent { &agent } else { &server };
                // What goes for both programs is not asked of one job.
                theirs.contains(name) || (!of_agent && agent.contains(name))
            };
            let missing: BTreeSet<_> = wanted.iter().filter(|it| !has(it)).collect();
            ensure!(missing.is_empty(), "nobody has {missing:?}");
            Ok(())
        })
    });
}

/// Labels go by those of other overlays, which have the pods.
#[test]
fn what_is_scraped_is_there() {
    let monitoring = Overlay::build("monitoring").unwrap();
    let default = Overlay::build("default").unwrap();
    let monitor = monitoring.object("ServiceMonitor", "proxy-server").unwrap();
    let chosen = monitor.pointer("/spec/selector/matchLabels").unwrap();
    let mut jobs = BTreeSet::new();
    for service in monitoring.of("Service") {
        let labels = service.pointer("/metadata/labels").unwrap();
        for (key, value) in chosen.as_object().unwrap() {
            assert_eq!(labels.get(key), Some(value), "{service}");
        }
        let job = text(labels, "/app.kubernetes.io~1name");
        let pods = default.workloads().find(|workload| {
            workload.pointer("/spec/template/metadata/labels/app.kubernetes.io~1name")
                == service.pointer("/spec/selector/app.kubernetes.io~1name")
        });
        let pods = pods.unwrap_or_else(|| panic!("nobody is {job}"));
        assert_eq!(text(pods, "/metadata/name"), job);
        let port = list(service, "/spec/ports").next().unwrap();
        assert_eq!(text(port, "/name"), text(monitor, "/spec/endpoints/0/port"));
        assert_eq!(port.pointer("/port"), Some(&json!(9440)));
        jobs.insert(job);
    }
    assert_eq!(jobs, ["proxy-server", "proxy-server-control-plane"].into());
    let scraped = fs::read_to_string(folder().join("prometheus/edge-nodes.yaml")).unwrap();
    let scraped: Value = serde_saphyr::from_str(&scraped).unwrap();
    let agents =
        list(&scraped, "/scrape_configs").any(|job| text(job, "/job_name") == "edge-agent");
    assert!(agents, "rules and dashboard ask for this job");
}
