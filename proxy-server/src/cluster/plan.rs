//! What has to be written so that a ConfigMap says what it should. Pure.
//!
//! Of a map that exists one key and one annotation are ours, and a change names the version that it was made for: nothing
//! else is touched, and nothing that somebody else writes meanwhile is lost. Where the annotation says which server wrote
//! last, a new leader writes its name even if the text is right: whatever an earlier one has still under way is for an
//! older version from then on, and refused.

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::ObjectMeta;
use serde_json::{Value, json};

use crate::config::ObjectName;

/// The annotation that names who wrote last.
pub(super) const WRITTEN_BY: &str = "corvid.io/written-by";
/// What the values of a ConfigMap may have together (Kubernetes, `MaxSecretSize`).
pub(super) const MOST: usize = 1 << 20;

/// What a map should say.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) map: &'a ObjectName,
    pub(super) key: &'a str,
    pub(super) text: &'a str,
    /// Its name and what it says.
    pub(super) annotation: (&'a str, &'a str),
}

/// What is to be done for that.
#[derive(Debug, PartialEq)]
pub(super) enum Plan {
    Keep,
    Create(Box<ConfigMap>),
    /// A JSON merge patch (RFC 7396).
    Change(Value),
}

/// The values would have so many bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLarge(pub(super) usize);

/// What is to be done about the map that was found.
pub(super) fn plan(found: Option<&ConfigMap>, wanted: Wanted<'_>) -> Result<Plan, TooLarge> {
    let Wanted {
        map,
        key,
        text,
        annotation: (note, noted),
    } = wanted;
    let bytes = text.len() + found.map_or(0, |found| others(found, key));
    if bytes > MOST {
        return Err(TooLarge(bytes));
    }
    let Some(found) = found else {
        let entry = |key: &str, value: &str| Some([(key.to_owned(), value.to_owned())].into());
        return Ok(Plan::Create(Box::new(ConfigMap {
            metadata: ObjectMeta {
                name: Some(map.name.clone()),
                annotations: entry(note, noted),
                ..ObjectMeta::default()
            },
            data: entry(key, text),
            ..ConfigMap::default()
        })));
    };
    let said = found.data.as_ref().and_then(|data| data.get(key));
    let annotations = found.metadata.annotations.as_ref();
    let by = annotations.and_then(|annotations| annotations.get(note));
    if said.is_some_and(|said| said == text) && by.is_some_and(|by| by == noted) {
        return Ok(Plan::Keep);
    }
    Ok(Plan::Change(json!({
        "metadata": {"resourceVersion": found.metadata.resource_version, "annotations": {note: noted}},
        "data": {key: text},
    })))
}

/// Bytes of the other values.
fn others(found: &ConfigMap, key: &str) -> usize {
    let texts = found.data.iter().flatten();
    let texts = texts
        .filter(|(name, _)| *name != key)
        .map(|(_, text)| text.len());
    let binary = found.binary_data.iter().flatten();
    texts.chain(binary.map(|(_, bytes)| bytes.0.len())).sum()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;

    use super::*;

    fn map() -> ObjectName {
        "kube-system/m".to_owned().try_into().unwrap()
    }

    fn planned(found: Option<&ConfigMap>, text: &str) -> Result<Plan, TooLarge> {
        let map = map();
        plan(
            found,
            Wanted {
                map: &map,
                key: "k",
                text,
                annotation: (WRITTEN_BY, "me"),
            },
        )
    }

    #[expect(
        clippy::needless_pass_by_value,
        reason = "the tables of the tests read better so"
    )]
    fn found(data: Value, annotations: Value) -> ConfigMap {
        serde_json::from_value(json!({
            "metadata": {"name": "m", "resourceVersion": "7", "annotations": annotations, "labels": {"l": "1"}},
            "data": data,
        }))
        .unwrap()
    }

    #[test]
    fn only_what_differs_is_written_and_only_ours() {
        let Plan::Create(created) = planned(None, "a").unwrap() else {
            panic!()
        };
        assert_eq!(created.data.unwrap()["k"], "a");
        assert_eq!(created.metadata.annotations.unwrap()[WRITTEN_BY], "me");

        let ours = json!({WRITTEN_BY: "me", "x": "y"});
        let good = found(json!({"k": "a", "other": "b"}), ours.clone());
        assert_eq!(planned(Some(&good), "a"), Ok(Plan::Keep));
        let change = Ok(Plan::Change(json!({
            "metadata": {"resourceVersion": "7", "annotations": {WRITTEN_BY: "me"}},
            "data": {"k": "a"},
        })));
        for different in [
            found(json!({"k": "A"}), ours.clone()),
            found(json!({"other": "a"}), ours.clone()),
            found(json!(null), ours),
            // As Raven left it, and as another server did.
            found(json!({"k": "a"}), json!(null)),
            found(json!({"k": "a"}), json!({WRITTEN_BY: "another"})),
        ] {
            assert_eq!(planned(Some(&different), "a"), change, "{different:?}");
        }
    }

    #[test]
    fn what_does_not_fit_beside_the_other_keys_is_not_written() {
        let most = "x".repeat(MOST);
        assert!(planned(None, &most).is_ok());
        assert_eq!(planned(None, &format!("{most}x")), Err(TooLarge(MOST + 1)));
        let mut other = found(json!({"k": most, "other": "12345"}), json!(null));
        other.binary_data = Some([("b".to_owned(), ByteString(vec![0; 5]))].into());
        assert!(planned(Some(&other), &"x".repeat(MOST - 10)).is_ok());
        assert_eq!(
            planned(Some(&other), &"x".repeat(MOST - 9)),
            Err(TooLarge(MOST + 1))
        );
    }
}
