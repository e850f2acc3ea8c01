//! `kubernetes.enrol`: whose tokens enrol agents.

use certs::Name;
use daemon::Problems;
use serde::Deserialize;

/// Whose tokens enrol agents: those of pods of one ServiceAccount, made for one audience.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Enrol {
    /// The namespace of the agents' pods.
    pub namespace: String,
    /// Their ServiceAccount.
    pub service_account: String,
    /// For whom the token says that it is meant.
    pub audience: String,
}

impl Default for Enrol {
    fn default() -> Self {
        Self {
            namespace: "corvid".to_owned(),
            service_account: "edge-agent".to_owned(),
            audience: "corvid".to_owned(),
        }
    }
}

impl Enrol {
    pub(super) fn check(&self, problems: &mut Problems) {
        for (key, name) in [
            ("namespace", &self.namespace),
            ("serviceAccount", &self.service_account),
        ] {
            problems.check(
                Name::parse(name).is_ok(),
                format!("kubernetes.enrol.{key}"),
                format!("{name:?} is no name"),
            );
        }
        problems.check(
            !self.audience.is_empty(),
            "kubernetes.enrol.audience",
            "must not be empty: a token that is meant for anybody proves nothing here",
        );
    }
}
