//! A throw-away Kubernetes PKI: one CA, EC keys, everything as files that the Kubernetes programs read.
//!
//! It is Kubernetes' own PKI and has nothing to do with Corvid's: the tunnel carries TLS that is proved with these
//! certificates from kube-apiserver to kubelet, and must never need to see one of them.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

/// The files of the PKI, all in one folder.
#[derive(Debug)]
pub(super) struct Pki {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate that is wanted: who it names and what it is good for.
#[derive(Debug, Default)]
pub(super) struct Leaf<'a> {
    /// File name without extension.
    pub(super) file: &'a str,
    /// Common name: the user, to kube-apiserver.
    pub(super) user: &'a str,
    /// Organisation: the group, to kube-apiserver.
    pub(super) group: Option<&'a str>,
    pub(super) dns: &'a [&'a str],
    pub(super) ips: &'a [IpAddr],
}

impl Pki {
    /// Makes the CA and the key pair that signs service account tokens.
    pub(super) fn new(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "test-cluster-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?;
        let pki = Self {
            dir: dir.to_owned(),
            issuer: Issuer::new(params, key),
        };
        pki.write("ca.crt", &certificate.pem())?;
        let signer = KeyPair::generate()?;
        pki.write("sa.key", &signer.serialize_pem())?;
        pki.write("sa.pub", &signer.public_key_pem())?;
        Ok(pki)
    }

    /// Issues a leaf for both roles (server and client) and writes `FILE.crt` and `FILE.key`.
    pub(super) fn issue(&self, leaf: &Leaf<'_>) -> Result<()> {
        let key = KeyPair::generate()?;
        let mut params =
            CertificateParams::new(leaf.dns.iter().map(|&n| n.to_owned()).collect::<Vec<_>>())?;
        let addresses = leaf.ips.iter().map(|&ip| SanType::IpAddress(ip));
        params.subject_alt_names.extend(addresses);
        params
            .distinguished_name
            .push(DnType::CommonName, leaf.user);
        if let Some(group) = leaf.group {
            params
                .distinguished_name
                .push(DnType::OrganizationName, group);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = params.signed_by(&key, &self.issuer)?;
        self.write(&format!("{}.crt", leaf.file), &certificate.pem())?;
        self.write(&format!("{}.key", leaf.file), &key.serialize_pem())
    }

    /// The path of a file of the PKI, as text for flags and YAML.
    pub(super) fn path(&self, file: &str) -> String {
        self.dir.join(file).display().to_string()
    }

    /// Writes a kubeconfig that shows the leaf `file` to the kube-apiserver at `server`.
    pub(super) fn kubeconfig(&self, file: &str, server: &str) -> Result<PathBuf> {
        let text = format!(
            "apiVersion: v1\n\
             kind: Config\n\
             clusters: [{{name: test, cluster: {{certificate-authority: {ca}, server: \"{server}\"}}}}]\n\
             users: [{{name: user, user: {{client-certificate: {crt}, client-key: {key}}}}}]\n\
             contexts: [{{name: test, context: {{cluster: test, user: user}}}}]\n\
             current-context: test\n",
            ca = self.path("ca.crt"),
            crt = self.path(&format!("{file}.crt")),
            key = self.path(&format!("{file}.key")),
        );
        let name = format!("{file}.kubeconfig");
        self.write(&name, &text)?;
        Ok(self.dir.join(name))
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.dir.join(file);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    }
}
