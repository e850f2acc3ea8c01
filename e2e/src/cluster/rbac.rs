//! What `deploy/rbac` grants, verb by verb, and a cluster in which one of them is missing.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::Cluster;
use super::account::{USER, manifests};
use super::steps::until;

/// kube-apiserver learns of a changed role within milliseconds.
const SOON: Duration = Duration::from_secs(30);

/// One verb on one resource.
#[derive(Debug, Clone)]
pub struct Grant {
    /// `get`, `list`, …
    pub verb: String,
    /// `nodes`, `leases`, …
    pub resource: String,
    role: Value,
}

impl Display for Grant {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.verb, self.resource)
    }
}

impl Grant {
    /// The name of the role that grants it.
    #[must_use]
    pub fn role(&self) -> &str {
        let name = self.role.pointer("/metadata/name");
        name.and_then(Value::as_str).unwrap_or_default()
    }

    /// Whether it grants in all namespaces what the other grants in one.
    fn is_wider_than(&self, other: &Self) -> bool {
        let is_of_all = |grant: &Self| grant.role.pointer("/metadata/namespace").is_none();
        (&self.verb, &self.resource) == (&other.verb, &other.resource)
            && is_of_all(self)
            && !is_of_all(other)
    }

    fn all_of(role: &Value) -> Vec<Self> {
        let mut grants = Vec::new();
        // As it was applied: what kube-apiserver adds names one version, which the next change ends.
        let mut role = role.clone();
        if let Some(metadata) = role.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.retain(|key, _value| key == "name" || key == "namespace");
        }
        let role = &role;
        for rule in list(role, "rules") {
            for resource in texts(rule, "resources") {
                for verb in texts(rule, "verbs") {
                    grants.push(Self {
                        verb: verb.to_owned(),
                        resource: resource.to_owned(),
                        role: role.clone(),
                    });
                }
            }
        }
        grants
    }

    /// The role without it.
    fn removed(&self) -> Value {
        let mut rules = Vec::new();
        for rule in list(&self.role, "rules") {
            let all = |key| texts(rule, key).collect::<Vec<_>>();
            let (resources, verbs) = (all("resources"), all("verbs"));
            let (resource, verb) = (self.resource.as_str(), self.verb.as_str());
            if !resources.contains(&resource) || !verbs.contains(&verb) {
                rules.push(rule.clone());
                continue;
            }
            let but = |all: &[&str], one: &str| -> Vec<String> {
                let others = all.iter().filter(|other| **other != one);
                others.map(|other| (*other).to_owned()).collect()
            };
            // The other resources keep all verbs, and this one the others.
            let (resources, verbs) = (but(&resources, resource), but(&verbs, verb));
            for (key, left, of) in [
                ("resources", resources, None),
                ("verbs", verbs, Some([resource])),
            ] {
                if !left.is_empty() {
                    let rule = with(rule, key, &json!(left));
                    rules.push(match of {
                        Some(of) => with(&rule, "resources", &json!(of)),
                        None => rule,
                    });
                }
            }
        }
        with(&self.role, "rules", &json!(rules))
    }
}

impl Cluster {
    /// All that the roles of `deploy/rbac` grant.
    ///
    /// # Errors
    /// When kubectl can't read the files.
    pub fn grants(&self) -> Result<Vec<Grant>> {
        let files = manifests().display().to_string();
        let all = ["apply", "-k", &files, "--dry-run=client", "-o", "json"];
        let all: Value = serde_json::from_slice(&self.kubectl().ok(&all)?)?;
        let roles = list(&all, "items").filter(|object| {
            let kind = object.get("kind").and_then(Value::as_str);
            kind.is_some_and(|kind| kind == "ClusterRole" || kind == "Role")
        });
        let grants = roles.flat_map(Grant::all_of).collect::<Vec<_>>();
        ensure!(!grants.is_empty(), "{files} grants nothing: {all}");
        Ok(grants)
    }

    /// Applies the role without one of its verbs, and any that grants the same in all namespaces; waits until that counts.
    ///
    /// # Errors
    /// When the account still has it.
    pub fn revoke(&self, grant: &Grant) -> Result<()> {
        let all = self.grants()?;
        let wider = all.iter().filter(|other| other.is_wider_than(grant));
        let file = self.dir().join("role.json");
        for grant in wider.chain([grant]) {
            fs::write(&file, grant.removed().to_string())?;
            self.kubectl()
                .ok(&["apply", "-f", &file.display().to_string()])?;
        }
        self.wait_granted(grant, false)
    }

    /// Applies `deploy/rbac` as it is, and waits until that counts.
    ///
    /// # Errors
    /// When the account does not have it.
    pub fn restore(&self, grant: &Grant) -> Result<()> {
        let files = manifests().display().to_string();
        self.kubectl().ok(&["apply", "-k", &files])?;
        self.wait_granted(grant, true)
    }

    fn wait_granted(&self, grant: &Grant, wanted: bool) -> Result<()> {
        let Grant { verb, resource, .. } = grant;
        let user = format!("--as={USER}");
        let rule = list(&grant.role, "rules").find(|rule| {
            texts(rule, "resources").any(|it| it == resource)
                && texts(rule, "verbs").any(|it| it == verb)
        });
        let rule = rule.context("no rule has it")?;
        let group = texts(rule, "apiGroups").find(|group| !group.is_empty());
        let mut object =
            group.map_or_else(|| resource.clone(), |group| format!("{resource}.{group}"));
        if let Some(name) = texts(rule, "resourceNames").next() {
            object += &format!("/{name}");
        }
        let mut args = vec!["auth", "can-i", verb, &object, &user];
        let namespace = grant.role.pointer("/metadata/namespace");
        if let Some(namespace) = namespace.and_then(Value::as_str) {
            args.extend(["-n", namespace]);
        }
        until(SOON, &format!("{grant} is granted: {wanted}"), || {
            let output = self.kubectl().output(&args)?;
            ensure!(output.status.success() == wanted, "{output:?}");
            Ok(())
        })
    }
}

fn with(object: &Value, key: &str, value: &Value) -> Value {
    let mut object = object.clone();
    if let Some(fields) = object.as_object_mut() {
        fields.insert(key.to_owned(), value.clone());
    }
    object
}

fn list<'a>(object: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    object
        .get(key)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

fn texts<'a>(object: &'a Value, key: &str) -> impl Iterator<Item = &'a str> {
    list(object, key).filter_map(Value::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_verb_is_removed_and_every_other_stays() {
        let role = json!({"rules": [
            {"apiGroups": [""], "resources": ["nodes", "services"], "verbs": ["list", "watch"]},
            {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]},
        ]});
        let all = Grant::all_of(&role);
        let names = |grants: &[Grant]| {
            let mut names = grants.iter().map(ToString::to_string).collect::<Vec<_>>();
            names.sort();
            names
        };
        assert_eq!(all.len(), 5);
        for grant in &all {
            let left = names(&Grant::all_of(&grant.removed()));
            let mut wanted = names(&all);
            wanted.retain(|name| *name != grant.to_string());
            assert_eq!(left, wanted, "without {grant}");
        }
    }
}
