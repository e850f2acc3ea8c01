//! What `deploy/` becomes: overlays built by kustomize (kubectl's), and what is looked at in them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::cluster::tools;
use crate::process;

/// kustomize reads files and writes text.
const KUSTOMIZE: Duration = Duration::from_secs(60);

/// The folder `deploy` of the repository.
#[must_use]
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// The names of all overlays.
///
/// # Errors
/// When the folder can't be read.
pub fn overlays() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder().join("overlays"))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// One overlay, built.
#[derive(Debug, Clone)]
pub struct Overlay {
    /// Its name.
    pub name: String,
    /// What `kubectl apply` is given.
    pub text: String,
    /// The objects.
    pub objects: Vec<Value>,
}

/// A container of a workload.
#[derive(Debug, Clone, Copy)]
pub struct Container<'a> {
    /// Whose it is.
    pub workload: &'a Value,
    /// The pod's specification.
    pub pod: &'a Value,
    /// The container's.
    pub container: &'a Value,
}

impl Overlay {
    /// Builds it.
    ///
    /// # Errors
    /// When kustomize refuses it, or writes what is no YAML.
    pub fn build(name: &str) -> Result<Self> {
        Self::build_at(name, &folder().join("overlays").join(name))
    }

    /// Builds what is in that folder.
    ///
    /// # Errors
    /// As [`Overlay::build`].
    pub fn build_at(name: &str, folder: &Path) -> Result<Self> {
        let mut command = Command::new(tools()?.join("kubectl"));
        command.arg("kustomize").arg(folder);
        let built = process::output(command, KUSTOMIZE)?;
        let said = String::from_utf8_lossy(&built.stderr).into_owned();
        // A deprecated field is still built, and said.
        ensure!(
            built.status.success() && said.is_empty(),
            "kustomize {name}: {said}"
        );
        let text = String::from_utf8(built.stdout)?;
        let objects = serde_saphyr::from_multiple(&text).context("read what kustomize wrote")?;
        Ok(Self {
            name: name.to_owned(),
            text,
            objects,
        })
    }

    /// The objects of a kind.
    pub fn of(&self, kind: &str) -> impl Iterator<Item = &Value> {
        let is = move |object: &&Value| text(object, "/kind") == kind;
        self.objects.iter().filter(is)
    }

    /// One object.
    ///
    /// # Errors
    /// When it is not there.
    pub fn object(&self, kind: &str, name: &str) -> Result<&Value> {
        let found = self
            .of(kind)
            .find(|object| text(object, "/metadata/name") == name);
        found.with_context(|| format!("{}: no {kind} {name}", self.name))
    }

    /// Deployments and DaemonSets.
    pub fn workloads(&self) -> impl Iterator<Item = &Value> + use<'_> {
        self.of("Deployment").chain(self.of("DaemonSet"))
    }

    /// All containers.
    pub fn containers(&self) -> impl Iterator<Item = Container<'_>> + use<'_> {
        self.workloads().flat_map(|workload| {
            let pod = pod(workload);
            list(pod, "/containers").map(move |container| Container {
                workload,
                pod,
                container,
            })
        })
    }
}

impl Container<'_> {
    /// How messages call it.
    #[must_use]
    pub fn name(&self) -> String {
        let workload = text(self.workload, "/metadata/name");
        format!("{workload}/{}", text(self.container, "/name"))
    }
}

/// The pod's specification of a workload.
#[must_use]
pub fn pod(workload: &Value) -> &Value {
    workload
        .pointer("/spec/template/spec")
        .unwrap_or(&Value::Null)
}

/// The text at a JSON pointer; empty if there is none.
#[must_use]
pub fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// The elements of the list at a JSON pointer; none if there is none.
pub fn list<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
    let found = value.pointer(pointer).and_then(Value::as_array);
    found.into_iter().flatten()
}
