//! What a workload shows that has an account of its cluster: a signed token that the cluster gives it, for this purpose
//! and a short time, and that only the cluster can judge. Here it is text.

use std::fmt;
use std::str::FromStr;

use secrecy::{ExposeSecret as _, SecretString};

/// Largest token: a cluster's has some 1,200 bytes, names of 253 characters included less than twice that.
const MOST: usize = 8 * 1024;

/// A ServiceAccount's token (a JWT, RFC 7519, in its compact form). It is in no `Debug` output.
#[derive(Clone)]
pub struct ServiceAccountToken(SecretString);

/// A text is no such token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a ServiceAccount token has three parts of base64url, joined by dots, and at most 8 KiB")]
pub struct ServiceAccountTokenError;

impl ServiceAccountToken {
    /// The token, for whoever judges it.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

impl FromStr for ServiceAccountToken {
    type Err = ServiceAccountTokenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let base64url = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let good = |part: &str| !part.is_empty() && part.bytes().all(base64url);
        if text.len() > MOST || text.split('.').count() != 3 || !text.split('.').all(good) {
            return Err(ServiceAccountTokenError);
        }
        Ok(Self(text.to_owned().into()))
    }
}

impl fmt::Debug for ServiceAccountToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServiceAccountToken")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_three_parts_and_is_not_shown() {
        let token: ServiceAccountToken = "eyJh.eyJz_-.c2ln".parse().unwrap();
        assert_eq!(token.expose(), "eyJh.eyJz_-.c2ln");
        assert_eq!(format!("{token:?}"), "ServiceAccountToken");
        let giant = format!("a.{}.c", "b".repeat(MOST));
        for bad in [
            "", ".", "..", "a.b", "a.b.c.d", "a..c", "a.b.c\n", "a.b=.c", "a. .c", &giant,
        ] {
            assert!(bad.parse::<ServiceAccountToken>().is_err());
        }
    }
}
