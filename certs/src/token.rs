//! Join tokens: what a new agent shows once, in the form of kubeadm's, `id.secret`.
//!
//! The id is public: it names the token in lists and logs. The secret is kept as SHA-256 alone; with its
//! 165 random bits there is nothing to guess, so a slow hash would only slow the server down.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};

use crate::identity::Name;
use crate::x509;

const ID_LENGTH: usize = 6;
const SECRET_LENGTH: usize = 32;
/// As short as kubeadm's are, for tokens that were made elsewhere.
const SECRET_LENGTHS: std::ops::RangeInclusive<usize> = 16..=64;
const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";

/// A text is no join token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a join token has the form id.secret: 6, then 16 to 64 characters of a-z and 0-9")]
pub struct TokenError;

/// The system has no randomness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the system has no randomness")]
pub struct NoRandomness;

/// `id.secret`. The secret is in no `Debug` output.
#[derive(Clone)]
pub struct JoinToken {
    id: String,
    secret: SecretString,
}

impl JoinToken {
    /// A new random token.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn generate() -> Result<Self, NoRandomness> {
        Ok(Self {
            id: random(ID_LENGTH)?,
            secret: random(SECRET_LENGTH)?.into(),
        })
    }

    /// The public half.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The whole token, to be shown to the operator once or sent to the server.
    #[must_use]
    pub fn expose(&self) -> SecretString {
        SecretString::from(format!("{}.{}", self.id, self.secret.expose_secret()))
    }

    pub(crate) fn hash(&self) -> SecretHash {
        SecretHash(x509::hex(&x509::sha256(
            self.secret.expose_secret().as_bytes(),
        )))
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (id, secret) = text.split_once('.').ok_or(TokenError)?;
        let good = |part: &str| part.bytes().all(|byte| ALPHABET.contains(&byte));
        if id.len() != ID_LENGTH
            || !SECRET_LENGTHS.contains(&secret.len())
            || !good(id)
            || !good(secret)
        {
            return Err(TokenError);
        }
        Ok(Self {
            id: id.to_owned(),
            secret: secret.into(),
        })
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}.…)", self.id)
    }
}

/// SHA-256 of a token's secret, hex.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct SecretHash(String);

impl SecretHash {
    /// Compares in constant time.
    pub(crate) fn matches(&self, other: &Self) -> bool {
        verify_slices_are_equal(self.0.as_bytes(), other.0.as_bytes()).is_ok()
    }
}

impl fmt::Debug for SecretHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretHash")
    }
}

/// `length` characters of the alphabet, each as likely as the others.
fn random(length: usize) -> Result<String, NoRandomness> {
    // Bytes from here on would make the first characters likelier.
    let fair = 256 - 256 % ALPHABET.len();
    let mut text = String::with_capacity(length);
    let mut bytes = [0_u8; 64];
    while text.len() < length {
        if aws_lc_rs::rand::fill(&mut bytes).is_err() {
            return Err(NoRandomness);
        }
        let fair_bytes = bytes
            .iter()
            .map(|byte| usize::from(*byte))
            .filter(|byte| *byte < fair);
        let characters = fair_bytes.filter_map(|byte| ALPHABET.get(byte % ALPHABET.len()));
        text.extend(
            characters
                .take(length - text.len())
                .map(|byte| char::from(*byte)),
        );
    }
    Ok(text)
}

/// Which agent names a token is good for: text in which `*` stands for anything, also for nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AgentPattern(String);

/// A text is no pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an agent pattern has 1 to 253 characters of a-z, 0-9, '-', '.' and '*'")]
pub struct PatternError;

impl AgentPattern {
    /// Every name.
    #[must_use]
    pub fn any() -> Self {
        Self("*".to_owned())
    }

    /// Whether `name` fits.
    #[must_use]
    pub fn matches(&self, name: &Name) -> bool {
        fits(&self.0, name.as_str())
    }
}

/// Whether `text` fits `pattern`, in which `*` stands for anything, also for nothing; in time linear in both.
///
/// The first and the last piece between stars are anchored; of the others each is taken as far left
/// as it occurs, which leaves most to those that follow.
#[must_use]
pub fn fits(pattern: &str, text: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let (middle, last) = rest.rsplit_once('*').unwrap_or(("", rest));
    let Some(left) = text
        .strip_prefix(first)
        .and_then(|left| left.strip_suffix(last))
    else {
        return false;
    };
    let mut pieces = middle.split('*').filter(|piece| !piece.is_empty());
    let end = pieces.try_fold(left, |left, piece| Some(left.split_once(piece)?.1));
    end.is_some()
}

impl FromStr for AgentPattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let good = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'*');
        if text.is_empty() || text.len() > 253 || !text.bytes().all(good) {
            return Err(PatternError);
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for AgentPattern {
    type Error = PatternError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<AgentPattern> for String {
    fn from(pattern: AgentPattern) -> Self {
        pattern.0
    }
}

impl fmt::Display for AgentPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_token_survives_the_way_through_text_and_shows_no_secret() {
        let token = JoinToken::generate().unwrap();
        let text = token.expose();
        let read: JoinToken = text.expose_secret().parse().unwrap();
        assert_eq!(read.id(), token.id());
        assert!(read.hash().matches(&token.hash()));
        let (_, secret) = text.expose_secret().split_once('.').unwrap();
        assert_eq!(secret.len(), 32);
        assert!(!format!("{token:?} {:?}", token.hash()).contains(secret));
    }

    #[test]
    fn two_tokens_differ() {
        let (one, other) = (
            JoinToken::generate().unwrap(),
            JoinToken::generate().unwrap(),
        );
        assert!(!one.hash().matches(&other.hash()));
    }

    #[test]
    fn malformed_tokens_are_refused() {
        for bad in [
            "",
            "abcdef",
            "abcdef.",
            ".0123456789abcdef",
            "abcde.0123456789abcdef",
            "abcdef.0123456789abcde",
            "ABCDEF.0123456789abcdef",
            "abcdef.0123456789abcdef.x",
            "abcdef.0123456789abcdeF",
            &format!("abcdef.{}", "a".repeat(65)),
        ] {
            assert!(bad.parse::<JoinToken>().is_err(), "{bad}");
        }
        assert!("abcdef.0123456789abcdef".parse::<JoinToken>().is_ok());
    }

    #[test]
    fn a_star_stands_for_anything() {
        let matches = |pattern: &str, name: &str| {
            pattern
                .parse::<AgentPattern>()
                .unwrap()
                .matches(&Name::parse(name).unwrap())
        };
        for (pattern, name) in [
            ("*", "edge1"),
            ("edge1", "edge1"),
            ("edge-*", "edge-7"),
            ("edge-*", "edge-7.site.b"),
            ("*-a", "x-a"),
            ("a*b*c", "abc"),
            ("a*b*c", "axxbyybzzc"),
            ("**a**", "a"),
            ("*ab*ba*", "abba"),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("edge1", "edge12"),
            ("edge-*", "edge"),
            ("edge-*", "ledge-7"),
            ("*-a", "x-ab"),
            ("a*a", "a"),
            ("*ab*ba*", "aba"),
            ("a*b*c", "acb"),
        ] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }

    /// The textbook definition, exponential and obviously right.
    fn slow(pattern: &[u8], name: &[u8]) -> bool {
        match (pattern, name) {
            ([], []) => true,
            ([b'*', rest @ ..], _) => (0..=name.len()).any(|skip| slow(rest, &name[skip..])),
            ([p, pattern @ ..], [n, name @ ..]) => p == n && slow(pattern, name),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn patterns_agree_with_the_textbook(pattern in "[ab*]{1,8}", name in "[ab]{1,10}") {
            let fast = pattern.parse::<AgentPattern>().unwrap().matches(&Name::parse(&name).unwrap());
            prop_assert_eq!(fast, slow(pattern.as_bytes(), name.as_bytes()));
        }
    }
}
