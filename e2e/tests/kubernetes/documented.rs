//! What README.md and docs/ tell an operator to give to Kubernetes: the same that this suite gives to the real
//! kube-apiserver, and something that the real kubeadm takes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use e2e::cluster::{ADDRESS_TYPES, Egress, tools};
use e2e::process;
use serde_json::Value;

/// The objects of a kind in the YAML blocks, each with its document.
fn objects(kind: &str) -> Result<Vec<(PathBuf, String)>> {
    let mut all = blocks()?;
    all.retain(|(_, block)| block.contains(&format!("kind: {kind}\n")));
    Ok(all)
}

/// The first YAML block that has both.
pub(super) fn block(one: &str, other: &str) -> Result<String> {
    let mut all = blocks()?.into_iter();
    let found = all.find(|(_, block)| block.contains(one) && block.contains(other));
    let (_, block) = found.with_context(|| format!("no block has {one:?} and {other:?}"))?;
    Ok(block)
}

/// All YAML blocks, each with its document.
fn blocks() -> Result<Vec<(PathBuf, String)>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut documents = vec![root.join("README.md")];
    for file in fs::read_dir(root.join("docs"))? {
        documents.push(file?.path());
    }
    documents.retain(|path| path.extension().is_some_and(|e| e == "md"));
    let mut blocks = Vec::new();
    for document in documents {
        let text = fs::read_to_string(&document)?;
        for block in text.split("```yaml\n").skip(1) {
            let block = block.split("```").next().unwrap_or_default();
            blocks.push((document.clone(), block.to_owned()));
        }
    }
    Ok(blocks)
}

fn parse(text: &str) -> Result<Value> {
    serde_saphyr::from_str(text).with_context(|| text.to_owned())
}

#[test]
fn documented_egress_selectors_are_those_that_kube_apiserver_is_given() {
    let documented = objects("EgressSelectorConfiguration").unwrap();
    assert!(documented.len() >= 3, "{documented:?}");
    for (document, text) in documented {
        let told = parse(&text).unwrap();
        let socket = told.pointer("/egressSelections/0/connection/transport/uds/udsName");
        let socket = PathBuf::from(socket.and_then(Value::as_str).unwrap());
        let protocol = told.pointer("/egressSelections/0/connection/proxyProtocol");
        let given = match protocol.and_then(Value::as_str) {
            Some("GRPC") => Egress::Grpc(socket),
            _ => Egress::Unix(socket),
        };
        assert_eq!(Some(told), given.config(), "{}", document.display());
    }
}

/// What kubeadm would write as the manifest of kube-apiserver.
fn manifest(configuration: &str) -> Result<Value> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("kubeadm.yaml");
    // Else it would ask the internet for the newest one.
    fs::write(
        &file,
        format!("{configuration}kubernetesVersion: v1.36.0\n"),
    )?;
    for action in [
        ["config", "validate"].as_slice(),
        &["init", "phase", "control-plane", "apiserver", "--dry-run"],
    ] {
        let mut kubeadm = Command::new(tools()?.join("kubeadm"));
        kubeadm.args(action).arg("--config").arg(&file);
        kubeadm.env("KUBEADM_INIT_DRYRUN_DIR", dir.path().join("out"));
        let done = process::output(kubeadm, Duration::from_secs(60))?;
        let said = String::from_utf8_lossy(&done.stderr);
        ensure!(done.status.success(), "kubeadm {action:?}: {said}");
    }
    parse(&fs::read_to_string(
        dir.path().join("out/kube-apiserver.yaml"),
    )?)
}

#[test]
fn kubeadm_makes_its_manifest_of_the_documented_configuration() {
    if !e2e::net::may_run() {
        return;
    }
    let [(_, documented)] = objects("ClusterConfiguration").unwrap().try_into().unwrap();
    let made = manifest(&documented).unwrap();
    let container = made.pointer("/spec/containers/0").unwrap();
    let flags: Vec<&str> = container["command"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let value = |flag: &str| {
        let start = format!("--{flag}=");
        let mut values = flags.iter().filter_map(|f| f.strip_prefix(&start));
        let first = values.next();
        assert_eq!(values.next(), None, "{flags:?}");
        first.unwrap_or_else(|| panic!("no {flag}: {flags:?}"))
    };
    assert_eq!(value("kubelet-preferred-address-types"), ADDRESS_TYPES);
    let selector = Path::new(value("egress-selector-config-file"));
    // The file and the sockets are seen in the pod where they are on the machine.
    let host = |name: &Value| -> String {
        let volumes = made["spec"]["volumes"].as_array().unwrap();
        let volume = volumes.iter().find(|volume| volume["name"] == *name);
        volume.unwrap()["hostPath"]["path"].as_str().unwrap().into()
    };
    let mounts = container["volumeMounts"].as_array().unwrap();
    let mount = |path: &Path| {
        let mount = mounts
            .iter()
            .find(|mount| mount["mountPath"] == path.to_str().unwrap());
        let mount = mount.unwrap_or_else(|| panic!("{} is not mounted", path.display()));
        assert_eq!(host(&mount["name"]), path.to_str().unwrap());
    };
    mount(selector.parent().unwrap());
    mount(Path::new("/run/corvid"));

    // Why the documents say that both flags are needed.
    let plain =
        manifest("apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\n").unwrap();
    let command = plain.pointer("/spec/containers/0/command").unwrap();
    let own = "--kubelet-preferred-address-types=InternalIP,ExternalIP,Hostname";
    assert!(
        command.as_array().unwrap().contains(&own.into()),
        "{command}"
    );
}
