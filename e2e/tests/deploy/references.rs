//! Names that must agree: between objects, with the images that are built, and with the version.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, Result};
use e2e::manifests::{Overlay, folder, list, pod, text};
use serde_json::Value;

use crate::each_overlay;

/// What is there without being applied: written by a proxy-server, in this namespace.
const WRITTEN_LATER: [&str; 1] = ["ConfigMap/corvid-trust"];

fn names(overlay: &Overlay) -> BTreeSet<String> {
    let name = |object: &Value| {
        format!(
            "{}/{}",
            text(object, "/kind"),
            text(object, "/metadata/name")
        )
    };
    let written = WRITTEN_LATER.map(str::to_owned);
    overlay.objects.iter().map(name).chain(written).collect()
}

/// What a pod's specification names.
fn named_by(pod: &Value) -> Vec<String> {
    let mut named = vec![format!(
        "ServiceAccount/{}",
        text(pod, "/serviceAccountName")
    )];
    for volume in list(pod, "/volumes") {
        let sources: Vec<&Value> = list(volume, "/projected/sources").collect();
        for source in std::iter::once(volume).chain(sources) {
            for (pointer, kind) in [
                ("/configMap/name", "ConfigMap"),
                ("/secret/secretName", "Secret"),
                ("/secret/name", "Secret"),
            ] {
                if let Some(name) = source.pointer(pointer).and_then(Value::as_str) {
                    named.push(format!("{kind}/{name}"));
                }
            }
        }
    }
    named
}

#[test]
fn what_pods_and_bindings_name_is_there() {
    each_overlay(|overlay| {
        let there = names(overlay);
        let mut named: Vec<String> = overlay
            .workloads()
            .flat_map(|workload| named_by(pod(workload)))
            .collect();
        for kind in ["RoleBinding", "ClusterRoleBinding"] {
            for binding in overlay.of(kind) {
                named.push(format!(
                    "{}/{}",
                    text(binding, "/roleRef/kind"),
                    text(binding, "/roleRef/name")
                ));
                for subject in list(binding, "/subjects") {
                    named.push(format!(
                        "{}/{}",
                        text(subject, "/kind"),
                        text(subject, "/name")
                    ));
                }
            }
        }
        let missing = |name: &String| !there.contains(name);
        Ok(named
            .into_iter()
            .filter(missing)
            .map(|name| format!("no {name}"))
            .collect())
    });
}

#[test]
fn volumes_that_are_mounted_are_there_and_used() {
    each_overlay(|overlay| {
        let mut wrong = Vec::new();
        for workload in overlay.workloads() {
            let pod = pod(workload);
            let there: BTreeSet<_> = list(pod, "/volumes").map(|v| text(v, "/name")).collect();
            let mounted: BTreeSet<_> = list(pod, "/containers")
                .flat_map(|container| list(container, "/volumeMounts"))
                .map(|mount| text(mount, "/name"))
                .collect();
            if there != mounted {
                let name = text(workload, "/metadata/name");
                wrong.push(format!("{name}: has {there:?}, mounts {mounted:?}"));
            }
        }
        Ok(wrong)
    });
}

/// Whether a selector of labels takes the pods of a workload.
fn selects(selector: &Value, workload: &Value) -> bool {
    let labels = workload.pointer("/spec/template/metadata/labels");
    let wanted = selector.as_object().filter(|wanted| !wanted.is_empty());
    wanted.is_some_and(|wanted| {
        wanted
            .iter()
            .all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
    })
}

/// Of a port of a Service or of a container.
fn protocol(port: &Value) -> &str {
    match text(port, "/protocol") {
        "" => "TCP",
        protocol => protocol,
    }
}

#[test]
fn services_lead_to_ports_of_pods() {
    each_overlay(|overlay| {
        let mut wrong = Vec::new();
        for service in overlay.of("Service") {
            let name = text(service, "/metadata/name");
            let selector = service.pointer("/spec/selector").unwrap_or(&Value::Null);
            let chosen: Vec<_> = overlay
                .workloads()
                .filter(|workload| selects(selector, workload))
                .collect();
            // An overlay that only adds to others has the Service, and they have the pods.
            if chosen.len() != 1 && overlay.workloads().next().is_some() {
                wrong.push(format!("{name}: selects {} workloads", chosen.len()));
            }
            for (port, workload) in
                list(service, "/spec/ports").flat_map(|port| chosen.iter().map(move |w| (port, w)))
            {
                let declared = list(pod(workload), "/containers")
                    .flat_map(|container| list(container, "/ports"))
                    .any(|declared| {
                        text(declared, "/name") == text(port, "/targetPort")
                            && protocol(declared) == protocol(port)
                    });
                if !declared {
                    wrong.push(format!("{name}: no container has the port {port}"));
                }
            }
        }
        for kind in ["Deployment", "DaemonSet", "PodDisruptionBudget"] {
            for object in overlay.of(kind) {
                let selector = object
                    .pointer("/spec/selector/matchLabels")
                    .unwrap_or(&Value::Null);
                let chosen = overlay
                    .workloads()
                    .filter(|workload| selects(selector, workload))
                    .count();
                if chosen != 1 {
                    let name = text(object, "/metadata/name");
                    wrong.push(format!("{kind}/{name}: selects {chosen} workloads"));
                }
            }
        }
        Ok(wrong)
    });
}

/// The targets of the Dockerfile, which are the names of the images.
fn targets() -> Result<BTreeSet<String>> {
    let dockerfile = fs::read_to_string(folder().join("../Dockerfile"))?;
    let target = |line: &str| {
        let line = line.strip_prefix("FROM ")?;
        let (from, name) = line.split_once(" AS ")?;
        let last = from == "${BASE}" || from == "proxy-server";
        last.then(|| name.to_owned())
    };
    Ok(dockerfile.lines().filter_map(target).collect())
}

#[test]
fn images_are_those_that_are_built_and_of_this_version() {
    let targets = targets().unwrap();
    assert_eq!(
        targets,
        ["edge-agent", "proxy-server", "proxy-server-redirect"]
            .map(str::to_owned)
            .into()
    );
    let version = env!("CARGO_PKG_VERSION");
    each_overlay(|overlay| {
        let mut wrong = Vec::new();
        for it in overlay.containers() {
            let image = text(it.container, "/image");
            let built = image
                .strip_prefix("localhost/corvid/")
                .and_then(|rest| rest.strip_suffix(&format!(":{version}")))
                .is_some_and(|name| targets.contains(name));
            if !built {
                wrong.push(format!("{}: {image}", it.name()));
            }
        }
        Ok(wrong)
    });
}

#[test]
fn every_object_of_ours_says_whose_it_is_and_where() {
    each_overlay(|overlay| {
        let mut wrong = Vec::new();
        for object in &overlay.objects {
            let name = format!(
                "{}/{}",
                text(object, "/kind"),
                text(object, "/metadata/name")
            );
            if text(object, "/metadata/labels/app.kubernetes.io~1part-of") != "corvid" {
                wrong.push(format!("{name}: is part of nothing"));
            }
            let namespace = text(object, "/metadata/namespace");
            let wide = ["Namespace", "ClusterRole", "ClusterRoleBinding"];
            let wanted: &[&str] = match text(object, "/kind") {
                kind if wide.contains(&kind) => &[""],
                // Events on Nodes, which are in no namespace, are in `default`.
                "Role" | "RoleBinding" => &["corvid", "kube-system", "default"],
                _ => &["corvid"],
            };
            if !wanted.contains(&namespace) {
                wrong.push(format!("{name}: is in {namespace:?}"));
            }
        }
        Ok(wrong)
    });
}

/// The builder of the Dockerfile is the compiler that this repository is written for.
#[test]
fn the_builder_is_the_toolchain() {
    let read = |file: &str| fs::read_to_string(folder().join("..").join(file)).unwrap();
    let toolchain = read("rust-toolchain.toml");
    let channel = toolchain
        .lines()
        .find_map(|line| line.strip_prefix("channel = "))
        .context("no channel")
        .unwrap()
        .trim_matches('"');
    let wanted = format!("ARG BUILDER=rust:{channel}-");
    assert!(read("Dockerfile").contains(&wanted), "{wanted}");
}

/// The overlay that the README tells a user to keep is built, and sets what it says.
#[test]
fn the_readmes_own_overlay_sets_what_is_the_users() {
    let readme = fs::read_to_string(folder().join("README.md")).unwrap();
    let block = readme.split("```yaml\n").nth(1).unwrap();
    let block = block.split("```").next().unwrap();
    // kustomize takes relative paths alone.
    let dir = tempfile::tempdir_in(folder()).unwrap();
    let here = block.replace("corvid/deploy/overlays/default", "../overlays/default");
    assert_ne!(here, block);
    fs::write(dir.path().join("kustomization.yaml"), here).unwrap();
    let base = fs::read_to_string(folder().join("base/edge-agent/edge-agent.yaml")).unwrap();
    let mine = base.replace("proxy-server.example.com:8443", "192.0.2.7:30843");
    fs::write(dir.path().join("edge-agent.yaml"), mine).unwrap();
    let overlay = Overlay::build_at("mine", dir.path()).unwrap();
    let map = overlay.object("ConfigMap", "edge-agent").unwrap();
    assert!(
        text(map, "/data/edge-agent.yaml").contains("192.0.2.7:30843"),
        "{map}"
    );
    for it in overlay.containers() {
        let image = text(it.container, "/image");
        assert!(image.starts_with("registry.example.com/corvid/"), "{image}");
    }
}
