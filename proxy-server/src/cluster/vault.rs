//! The authority kept in a Secret: made by whichever server comes first, read by all, changed by one step at a time.
//!
//! | step | what happens |
//! | --- | --- |
//! | at start, there is none | one is made in memory, or the one of the state directory is taken, and *created*: of two that do so at once one is refused and takes the other's |
//! | at start, there is one | it is used; another one in the state directory is moved aside, not lost |
//! | at start, kube-apiserver is away | the copy in the state directory is used; without one the server waits, says so, and is not ready |
//! | while running, it has changed | it is taken over, if it comes from ours by a rotation |
//! | while running, it is gone | it is created again from what is at work |
//! | while running, it was replaced by a foreign one | refused and said: agents trust ours |
//! | after each look | the ConfigMap with the roots is brought in line ([`trust`](super::trust)) |
//!
//! Nothing is ever written over what somebody else has written meanwhile: creation fails where there is one, and a change
//! names the version that it changes and touches no key or label of others. The Secret is read every few seconds in place of being watched, which needs the
//! right to read this one Secret and no list.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use certs::{Ca, IssuerError, TrustDomain, UnixTime};
use http::Method;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use secrecy::ExposeSecret as _;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::ask::AskError;
use super::questions::Questions;
use super::trust::{PIN, TrustError, TrustMap};
use crate::authority::{Authority, TakeError};
use crate::config::{self, ObjectName};

/// Attempts at a change that others are making too.
const ATTEMPTS: u32 = 5;

/// The authority can't be had from where it is kept, or not be changed there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VaultError {
    #[error("ask for the authority's Secret")]
    Ask(#[from] AskError),
    #[error("read the authority's {0}")]
    Content(String, #[source] IssuerError),
    #[error("the authority's {0} is not to be read: {1}")]
    Form(String, &'static str),
    #[error(transparent)]
    Issuer(#[from] IssuerError),
    #[error(
        "there is no {0} yet: it is made by the first proxy-server that starts with kubernetes.authority"
    )]
    Missing(String),
    #[error("others keep changing the authority's {0} at the same time")]
    Contested(String),
    #[error(transparent)]
    Take(#[from] TakeError),
    #[error(transparent)]
    Trust(#[from] TrustError),
}

/// Where the authority is kept.
#[derive(Debug)]
pub(crate) struct Vault {
    questions: Arc<Questions>,
    trust: TrustMap,
    namespace: String,
    settings: config::Authority,
    trust_domain: TrustDomain,
}

/// The authority as it was read.
struct Kept {
    ca: Ca,
    /// Which version of the Secret that is.
    version: String,
}

#[derive(Deserialize)]
struct Secret {
    kind: String,
    metadata: ObjectMeta,
    #[serde(default)]
    data: BTreeMap<String, String>,
}

impl Vault {
    pub(crate) fn new(
        questions: Arc<Questions>,
        namespace: String,
        settings: config::Authority,
        trust_domain: TrustDomain,
    ) -> Self {
        let map = ObjectName {
            namespace: namespace.clone(),
            name: settings.config_map.clone(),
        };
        Self {
            trust: TrustMap::new(Arc::clone(&questions), map),
            questions,
            namespace,
            settings,
            trust_domain,
        }
    }

    /// How often it is looked at.
    pub(crate) const fn refresh(&self) -> std::time::Duration {
        self.settings.refresh
    }

    /// What it is called, for people.
    pub(crate) fn origin(&self) -> String {
        format!("Secret {}/{}", self.namespace, self.settings.secret)
    }

    fn secrets(&self) -> String {
        format!("/api/v1/namespaces/{}/secrets", self.namespace)
    }

    fn path(&self) -> String {
        format!("{}/{}", self.secrets(), self.settings.secret)
    }

    async fn read(&self) -> Result<Option<Kept>, VaultError> {
        let secret: Secret = match self.questions.get(&self.path()).await {
            Ok(secret) => secret,
            Err(AskError::Missing(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Not the answer of something between that knows nothing of it.
        if secret.kind != "Secret" {
            return Err(AskError::Answer.into());
        }
        let mut files = BTreeMap::new();
        for (name, text) in &secret.data {
            let bytes = STANDARD
                .decode(text)
                .map_err(|_base64| VaultError::Form(self.origin(), "its data is no base64"))?;
            files.insert(name.as_str(), bytes);
        }
        let ca = Ca::from_files(&self.trust_domain, |name| files.get(name).cloned())
            .map_err(|source| VaultError::Content(self.origin(), source))?;
        let version = secret.metadata.resource_version;
        let version =
            version.ok_or_else(|| VaultError::Form(self.origin(), "it has no version"))?;
        Ok(Some(Kept { ca, version }))
    }

    /// What is ours of the Secret.
    fn object(&self, ca: &Ca, version: Option<&str>) -> Result<Value, VaultError> {
        let files = ca.to_files()?.map(|(name, text)| {
            let text = STANDARD.encode(text.expose_secret());
            (name.to_owned(), Value::String(text))
        });
        let mut object = json!({
            "apiVersion": "v1", "kind": "Secret", "type": "Opaque",
            "metadata": {
                "name": self.settings.secret,
                "labels": {"app.kubernetes.io/name": "corvid", "app.kubernetes.io/component": "authority"},
                "annotations": {PIN: ca.pin().to_string()},
            },
            "data": Value::Object(files.into_iter().collect()),
        });
        if let (Some(version), Some(Value::Object(metadata))) =
            (version, object.get_mut("metadata"))
        {
            metadata.insert("resourceVersion".to_owned(), version.into());
        }
        Ok(object)
    }

    /// Makes the Secret; `false` if there is one.
    async fn create(&self, ca: &Ca) -> Result<bool, VaultError> {
        let (path, object) = (self.secrets(), self.object(ca, None)?);
        let made = self.questions.send(Method::POST, &path, &object);
        let made: Result<Value, _> = made.await;
        written(made)
    }

    /// Changes that version of the Secret; `false` if it is another by now.
    async fn replace(&self, ca: &Ca, version: &str) -> Result<bool, VaultError> {
        let (path, object) = (self.path(), self.object(ca, Some(version))?);
        let replaced = self.questions.send(Method::PATCH, &path, &object);
        let replaced: Result<Value, _> = replaced.await;
        written(replaced)
    }

    /// The authority, made if there is none: `cached` if that is given, else a new one.
    pub(crate) async fn obtain(
        &self,
        cached: Option<&Ca>,
        now: UnixTime,
    ) -> Result<Ca, VaultError> {
        for _ in 0..ATTEMPTS {
            if let Some(kept) = self.read().await? {
                return Ok(kept.ca);
            }
            let ca = match cached {
                Some(cached) => cached.clone(),
                None => Ca::create(&self.trust_domain, now)?,
            };
            if self.create(&ca).await? {
                tracing::info!(target: "audit", secret = self.origin(), pin = %ca.pin(), "authority made");
                return Ok(ca);
            }
        }
        Err(VaultError::Contested(self.origin()))
    }

    /// The authority as it is kept.
    pub(crate) async fn show(&self) -> Result<Ca, VaultError> {
        let kept = self.read().await?;
        let missing = || VaultError::Missing(self.origin());
        kept.map(|kept| kept.ca).ok_or_else(missing)
    }

    /// Changes the authority by one step, from whatever it is at that moment; returns what it is then.
    pub(crate) async fn update(
        &self,
        change: impl Fn(&Ca) -> Result<Ca, IssuerError>,
    ) -> Result<Ca, VaultError> {
        for _ in 0..ATTEMPTS {
            let missing = || VaultError::Missing(self.origin());
            let kept = self.read().await?.ok_or_else(missing)?;
            let changed = change(&kept.ca)?;
            if changed == kept.ca || self.replace(&changed, &kept.version).await? {
                return Ok(changed);
            }
        }
        Err(VaultError::Contested(self.origin()))
    }

    /// Follows the Secret, for ever: see the table above.
    #[expect(clippy::infinite_loop, reason = "ended by being dropped")]
    pub(crate) async fn follow(
        self,
        authority: Arc<Authority>,
        metrics: Arc<crate::metrics::Metrics>,
    ) -> Infallible {
        let (mut failing, mut copied) = (None, true);
        loop {
            match self.round(&authority, &mut copied).await {
                Ok(()) => {
                    if failing.take().is_some() {
                        tracing::info!("the authority is in step with the cluster again");
                    }
                }
                Err(error) => {
                    metrics.authority_failures.inc();
                    let said = daemon::chain(&error).to_string();
                    // Once loud; the same again is for who looks.
                    if failing.as_ref() != Some(&said) {
                        tracing::warn!(
                            error = said,
                            "the authority is not in step with the cluster, the one at work goes on"
                        );
                    }
                    failing = Some(said);
                }
            }
            // Not all servers at the same moment.
            let every = self.settings.refresh;
            sleep(every.mul_f64(0.8 + 0.4 * rand::random::<f64>())).await;
        }
    }

    async fn round(&self, authority: &Arc<Authority>, copied: &mut bool) -> Result<(), VaultError> {
        let taken = self.look(authority).await?;
        if taken || !*copied {
            *copied = self.keep_copy(authority).await;
        }
        let issuer = authority.issuer.load();
        let pin = issuer.pin().to_string();
        Ok(self.trust.publish(issuer.bundle(), &pin).await?)
    }

    /// Takes over what the Secret says. Whether that was anything new.
    async fn look(&self, authority: &Arc<Authority>) -> Result<bool, VaultError> {
        let Some(kept) = self.read().await? else {
            let ours = authority.taken();
            if self.create(&ours).await? {
                tracing::warn!(target: "audit", secret = self.origin(), pin = %ours.pin(), "the authority's Secret was gone and is made again");
            }
            return Ok(false);
        };
        let due = kept.ca.is_due(authority.own.clock.now());
        let ca = if due && kept.ca.follows(authority.taken().pin()) {
            let retired = kept.ca.retire();
            if !self.replace(&retired, &kept.version).await? {
                // Somebody else was first; what it is now is seen at the next look.
                return Ok(false);
            }
            tracing::info!(target: "audit", pin = %retired.pin(), "older roots are trusted no longer");
            retired
        } else {
            kept.ca
        };
        Ok(authority.take(&ca)?)
    }

    /// Keeps what is at work in the state directory, for a start while kube-apiserver is away. Whether that is done.
    async fn keep_copy(&self, authority: &Arc<Authority>) -> bool {
        let (authority, origin) = (Arc::clone(authority), self.origin());
        let kept = tokio::task::spawn_blocking(move || authority.keep_copy(&origin)).await;
        if let Ok(Err(error)) = kept {
            tracing::warn!(error = %daemon::chain(&error), "the authority is not kept in the state directory; it is at work all the same");
            return false;
        }
        true
    }
}

/// Whether a write has come about; a conflict is no error.
fn written(answer: Result<Value, AskError>) -> Result<bool, VaultError> {
    match answer {
        Ok(_object) => Ok(true),
        Err(AskError::Conflict) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
