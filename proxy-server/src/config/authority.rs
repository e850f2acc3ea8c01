//! `kubernetes.authority`: where the authority is kept that all servers of a cluster have.

use std::time::Duration;

use certs::Name;
use daemon::Problems;
use serde::Deserialize;

/// Shortest time between two looks at the Secret.
const LEAST_REFRESH: Duration = Duration::from_millis(100);

/// The authority of all servers of a cluster, in the namespace of our own objects.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Authority {
    /// The Secret with its key; made by the first server that starts.
    pub secret: String,
    /// The ConfigMap with its roots under `ca.crt`, for agents in pods; kept in line by every server.
    pub config_map: String,
    /// How often it is read: a rotation has reached every server after this.
    #[serde(with = "humantime_serde")]
    pub refresh: Duration,
}

impl Default for Authority {
    fn default() -> Self {
        Self {
            secret: "corvid-ca".to_owned(),
            config_map: "corvid-trust".to_owned(),
            refresh: Duration::from_secs(15),
        }
    }
}

impl Authority {
    pub(super) fn check(&self, problems: &mut Problems) {
        for (key, name) in [
            ("kubernetes.authority.secret", &self.secret),
            ("kubernetes.authority.configMap", &self.config_map),
        ] {
            problems.check(
                Name::parse(name).is_ok(),
                key,
                format!("{name:?} is no name"),
            );
        }
        problems.check(
            self.refresh >= LEAST_REFRESH,
            "kubernetes.authority.refresh",
            "at least 100ms: kube-apiserver has other things to do",
        );
    }
}
