//! Which of the nodes of one name: a node that is deleted and joins again has its name back, but another uid.

use std::fmt;
use std::str::FromStr;

/// The uid that a cluster has given a node: a UUID in its usual form, lower case (RFC 9562, section 4).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NodeUid(String);

/// A text is no uid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a node's uid has the form 00000000-0000-0000-0000-000000000000, in lower-case hex digits")]
pub struct NodeUidError;

impl NodeUid {
    /// The uid as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeUid {
    type Err = NodeUidError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let groups = text.split('-').map(str::len);
        let hex = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f' | b'-');
        if groups.eq([8, 4, 4, 4, 12]) && text.bytes().all(hex) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NodeUidError)
        }
    }
}

impl fmt::Display for NodeUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uid_is_a_uuid_and_nothing_else() {
        let good = "6f1c5b0e-9d1f-4c5e-8a55-0123456789ab";
        assert_eq!(good.parse::<NodeUid>().unwrap().as_str(), good);
        for bad in [
            "",
            "-",
            "6f1c5b0e",
            "6F1C5B0E-9D1F-4C5E-8A55-0123456789AB",
            "6f1c5b0e-9d1f-4c5e-8a55-0123456789abc",
            "6f1c5b0e-9d1f-4c5e-8a55-0123456789ag",
            "6f1c5b0e9-d1f-4c5e-8a55-0123456789ab",
            "6f1c5b0e-9d1f-4c5e-8a55-0123456789ab\n",
            "{6f1c5b0e-9d1f-4c5e-8a55-0123456789ab}",
            &"6f1c5b0e-".repeat(1000),
        ] {
            assert!(bad.parse::<NodeUid>().is_err(), "{bad}");
        }
    }
}
