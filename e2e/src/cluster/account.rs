//! Who the proxy-server is to kube-apiserver: the service account that `deploy/rbac` is bound to, as a pod has it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::control_plane::PUBLIC;
use super::kubectl::Kubectl;
use super::pki::Pki;
use super::scrapers::PROXY;
use crate::process::Spawn;

/// The account's namespace and name, as `deploy/rbac` has them.
pub(super) const NAMESPACE: &str = "corvid";
/// The Service that names of nodes at the edge point to.
pub(super) const SERVICE: &str = "proxy-server";
const NAME: &str = "proxy-server";
/// What kube-apiserver calls the account.
pub(super) const USER: &str = "system:serviceaccount:corvid:proxy-server";

/// Mounts the account where pods have it. Nothing else of this machine sees that.
const POD: &str = "account=/var/run/secrets/kubernetes.io/serviceaccount
mount -t tmpfs tmpfs /var/run && mkdir -p $account && mount --bind \"$0\" $account && exec \"$@\"";

/// Where the objects are that an operator applies.
pub(super) fn manifests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/rbac")
}

/// The files of a service account.
#[derive(Debug)]
pub(super) struct Account(PathBuf);

impl Account {
    /// Makes the account, applies `deploy/rbac` and gets a token.
    pub(super) fn new(kubectl: &Kubectl, pki: &Pki, dir: PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir)?;
        kubectl.ok(&["create", "namespace", NAMESPACE])?;
        kubectl.ok(&["create", "serviceaccount", NAME, "-n", NAMESPACE])?;
        let service = ["create", "service", "clusterip", SERVICE, "--tcp=10250"];
        kubectl.ok(&[&service[..], &["-n", NAMESPACE]].concat())?;
        kubectl.ok(&["apply", "-k", &manifests().display().to_string()])?;
        let token = kubectl.ok(&["create", "token", NAME, "-n", NAMESPACE])?;
        let token = String::from_utf8(token)?;
        fs::write(dir.join("token"), token.trim())?;
        fs::write(dir.join("namespace"), NAMESPACE)?;
        fs::copy(pki.path("ca.crt"), dir.join("ca.crt")).context("the cluster's CA")?;
        Ok(Self(dir))
    }

    /// A program that runs as in a pod of the account. In its environment is a proxy that would lead every request for
    /// kube-apiserver back to the proxy-server itself.
    pub(super) fn spawn(&self, name: &str, program: &Path) -> Spawn {
        let proxy = format!("https://{PUBLIC}:{PROXY}");
        let mut spawn = Spawn::new(name, "unshare")
            .args(["--mount", "sh", "-c", POD])
            .arg(&self.0)
            .arg(program)
            .env("KUBERNETES_SERVICE_HOST", PUBLIC.to_string())
            .env("KUBERNETES_SERVICE_PORT", "6443");
        for variable in ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "ALL_PROXY"] {
            spawn = spawn.env(variable, &proxy);
        }
        spawn
    }
}
