//! The configurations in ConfigMaps go through the programs' own `check-config`, and agree with the pods around them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use e2e::lab::binary;
use e2e::manifests::{Container, Overlay, list, text};
use e2e::process;
use serde_json::{Value, json};

use crate::each_overlay;

/// Reading a file and saying what is wrong with it.
const CHECK: Duration = Duration::from_secs(20);
/// What the end of a daemon needs beyond its drain: flushing sessions, closing listeners.
const END: Duration = Duration::from_secs(10);

/// The file that a container is told to read, and its text.
fn configuration(overlay: &Overlay, it: &Container<'_>) -> Result<(String, String)> {
    let args: Vec<_> = list(it.container, "/args")
        .filter_map(Value::as_str)
        .collect();
    let at = args
        .iter()
        .position(|arg| *arg == "--config")
        .context("no --config")?;
    let file = Path::new(args.get(at + 1).context("--config of nothing")?);
    let (folder, key) = (file.parent().context("no folder")?, file.file_name());
    let key = key.and_then(|key| key.to_str()).context("no name")?;
    let mount = list(it.container, "/volumeMounts")
        .find(|mount| Path::new(text(mount, "/mountPath")) == folder)
        .with_context(|| format!("nothing is mounted at {}", folder.display()))?;
    let volume = list(it.pod, "/volumes")
        .find(|volume| text(volume, "/name") == text(mount, "/name"))
        .context("no such volume")?;
    let map = overlay.object("ConfigMap", text(volume, "/configMap/name"))?;
    let data = map.pointer("/data").and_then(|data| data.get(key));
    let data = data.and_then(Value::as_str);
    let data = data.with_context(|| format!("no {key} in the ConfigMap"))?;
    Ok((key.to_owned(), data.to_owned()))
}

/// The container's variables, with what the cluster would fill in.
fn environment(it: &Container<'_>) -> Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    for variable in list(it.container, "/env") {
        let value = match text(variable, "/valueFrom/fieldRef/fieldPath") {
            "" => text(variable, "/value"),
            "metadata.name" => "proxy-server-7d9f8c6b5-x2x4z",
            "spec.nodeName" => "edge1",
            "status.hostIP" => "192.168.1.10",
            other => anyhow::bail!("a variable from {other}"),
        };
        all.insert(text(variable, "/name").to_owned(), value.to_owned());
    }
    Ok(all)
}

/// The program that the container's image starts.
fn program(it: &Container<'_>) -> &'static str {
    if text(it.container, "/image").contains("/edge-agent:") {
        "edge-agent"
    } else {
        "proxy-server"
    }
}

#[test]
fn the_programs_take_their_configurations() {
    each_overlay(|overlay| {
        let mut wrong = Vec::new();
        for it in overlay.containers() {
            let name = it.name();
            let (key, data) = configuration(overlay, &it).context(name.clone())?;
            let dir = tempfile::tempdir()?;
            fs::write(dir.path().join(&key), data)?;
            let mut command = Command::new(binary(program(&it))?);
            command
                .args(["check-config", "--config"])
                .arg(dir.path().join(&key))
                .env_clear()
                .envs(environment(&it)?);
            let checked = process::output(command, CHECK)?;
            let said = [checked.stdout, checked.stderr].concat();
            let said = String::from_utf8_lossy(&said).into_owned();
            // A rule that can never match is warned of, with exit code 0.
            if !checked.status.success() || said.contains("never") {
                wrong.push(format!("{name}: {said}"));
            }
        }
        Ok(wrong)
    });
}

/// The parsed configuration of each container that serves.
fn servers(overlay: &Overlay) -> Result<Vec<(Container<'_>, Value)>> {
    let mut all = Vec::new();
    for it in overlay.containers() {
        if list(it.container, "/args").next() == Some(&json!("run")) {
            let (_, data) = configuration(overlay, &it)?;
            all.push((it, serde_saphyr::from_str(&data)?));
        }
    }
    Ok(all)
}

fn duration(config: &Value, pointer: &str) -> Result<Duration> {
    let seconds = text(config, pointer).strip_suffix('s');
    let seconds = seconds.and_then(|seconds| seconds.parse().ok());
    let seconds = seconds.with_context(|| format!("{pointer} is no number of seconds"))?;
    Ok(Duration::from_secs(seconds))
}

/// SIGKILL comes after the drain, never in it.
#[test]
fn pods_have_the_time_that_their_drain_takes() {
    each_overlay(|overlay| {
        let mut wrong = Vec::new();
        for (it, config) in servers(overlay)? {
            let mut drain = duration(&config, "/drain/grace")?;
            if program(&it) == "proxy-server" {
                drain += duration(&config, "/drain/minDelay")?;
            }
            let given = it.pod.pointer("/terminationGracePeriodSeconds");
            let given = given
                .and_then(Value::as_u64)
                .context("no grace period")
                .map(Duration::from_secs)?;
            if given < drain + END {
                wrong.push(format!(
                    "{}: drains for {drain:?}, is killed after {given:?}",
                    it.name()
                ));
            }
        }
        Ok(wrong)
    });
}

/// Bytes of a quantity such as `32Mi` or `8MiB`.
fn bytes(quantity: &str) -> Result<u64> {
    let quantity = quantity.trim_end_matches('B');
    let number = quantity.strip_suffix("Mi").context("not in Mi")?;
    Ok(number.parse::<u64>()? << 20)
}

/// What unread bytes may cost leaves room for the rest.
#[test]
fn the_memory_budget_fits_into_the_limit() {
    each_overlay(|overlay| {
        let mut wrong = Vec::new();
        for (it, config) in servers(overlay)? {
            let (budget, default) = match program(&it) {
                "edge-agent" => ("/memory", "20MiB"),
                _ => ("/backend/memory", "256MiB"),
            };
            let budget = config
                .pointer(budget)
                .and_then(Value::as_str)
                .unwrap_or(default);
            let limit = text(it.container, "/resources/limits/memory");
            if bytes(budget)? * 2 > bytes(limit)? {
                wrong.push(format!(
                    "{}: a budget of {budget} within {limit}",
                    it.name()
                ));
            }
        }
        Ok(wrong)
    });
}

/// The label by which nodes get an agent is the one by which servers know the edge, and keeps servers away from it.
#[test]
fn everybody_means_the_same_edge() {
    each_overlay(|overlay| {
        let mut wrong = Vec::new();
        let label = "openyurt.io/is-edge-worker";
        for (it, config) in servers(overlay)? {
            let name = it.name();
            if program(&it) == "proxy-server" {
                let selector = config.pointer("/kubernetes/edgeSelector");
                let selector = selector
                    .and_then(Value::as_str)
                    .unwrap_or("openyurt.io/is-edge-worker=true");
                if selector != format!("{label}=true") {
                    wrong.push(format!("{name}: edgeSelector is {selector}"));
                }
            }
            let deployed = text(it.workload, "/kind") == "Deployment";
            let away = "/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms/0/matchExpressions";
            let away = list(it.pod, away).any(|term| {
                *term == json!({"key": label, "operator": "NotIn", "values": ["true"]})
            });
            if deployed && !away {
                wrong.push(format!("{name}: may be put on the edge"));
            }
        }
        Ok(wrong)
    });
}

/// Each port that a configuration listens on within the pod is declared, and none else.
#[test]
fn declared_ports_are_those_of_the_configuration() {
    each_overlay(|overlay| {
        let mut wrong = Vec::new();
        for (it, config) in servers(overlay)? {
            if it.pod.pointer("/hostNetwork").is_some() {
                continue; // declares none, see hardening.rs
            }
            let port = |listen: &str| -> Result<u64> {
                let (_, port) = listen.rsplit_once(':').context("no port")?;
                Ok(port.parse()?)
            };
            let mut listened = Vec::new();
            if program(&it) == "edge-agent" {
                listened.push(("TCP", 9441));
            } else {
                listened.extend([("TCP", 9440), ("TCP", 8443), ("UDP", 8443)]);
                if config.pointer("/peers").is_some() {
                    listened.push(("UDP", 8446));
                }
                for frontend in list(&config, "/frontends") {
                    listened.push(("TCP", port(text(frontend, "/listen"))?));
                }
            }
            let mut declared: Vec<_> = list(it.container, "/ports")
                .map(|declared| {
                    let protocol = match text(declared, "/protocol") {
                        "" => "TCP",
                        protocol => protocol,
                    };
                    let port = declared.pointer("/containerPort").and_then(Value::as_u64);
                    (protocol, port.unwrap_or_default())
                })
                .collect();
            listened.sort_unstable();
            declared.sort_unstable();
            if listened != declared {
                wrong.push(format!(
                    "{}: listens on {listened:?}, declares {declared:?}",
                    it.name()
                ));
            }
        }
        Ok(wrong)
    });
}

/// What a pod listens on, writes to and reads is where its volumes are: the root is read-only.
#[test]
fn what_is_written_is_on_a_volume() {
    each_overlay(|overlay| {
        let mut wrong = Vec::new();
        for (it, config) in servers(overlay)? {
            let mounts: Vec<_> = list(it.container, "/volumeMounts")
                .map(|mount| Path::new(text(mount, "/mountPath")))
                .collect();
            let (state, admin) = match program(&it) {
                "edge-agent" => ("/var/lib/corvid-agent", ""),
                _ => ("/var/lib/corvid", "/run/corvid/admin.sock"),
            };
            let or = |pointer: &str, default: &'static str| {
                let found = config.pointer(pointer).and_then(Value::as_str);
                found.unwrap_or(default).to_owned()
            };
            let mut files = vec![or("/stateDir", state), or("/admin/socket", admin)];
            for frontend in list(&config, "/frontends") {
                files.extend(
                    text(frontend, "/listen")
                        .strip_prefix("unix:")
                        .map(str::to_owned),
                );
                files.push(text(frontend, "/basicAuthFile").to_owned());
            }
            for file in ["/join/serviceAccountTokenFile", "/join/caFile"] {
                files.push(text(&config, file).to_owned());
            }
            for file in files.iter().filter(|file| !file.is_empty()) {
                if !mounts
                    .iter()
                    .any(|mount| Path::new(file).starts_with(mount))
                {
                    wrong.push(format!("{}: {file} is on no volume", it.name()));
                }
            }
        }
        Ok(wrong)
    });
}

/// Where overlays differ they must; everything else in the agents' configuration is one text.
#[test]
fn nothing_is_to_be_edited_but_where_the_servers_are() {
    for name in ["default", "dedicated-line", "egress", "dns", "host-network"] {
        let overlay = Overlay::build(name).unwrap();
        let map = overlay.object("ConfigMap", "edge-agent").unwrap();
        let text = text(map, "/data/edge-agent.yaml");
        let first = text.lines().find(|line| !line.starts_with('#'));
        assert_eq!(
            first,
            Some("servers: [\"proxy-server.example.com:8443\"]"),
            "{name}"
        );
        let places = overlay.text.matches("example.com").count();
        assert_eq!(places, 1, "{name}: values to set");
    }
}
