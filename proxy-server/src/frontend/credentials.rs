//! Bearer tokens and passwords of scrapers, read from files; compared in constant time, kept as digests.

use std::path::Path;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, header};

/// Largest file of tokens or passwords: tens of thousands of entries.
const MAX_FILE: u64 = 1 << 20;
/// Shortest token or password that is taken: a guess a millisecond would need more than a lifetime.
const MIN_SECRET: usize = 12;

/// A file of tokens or passwords that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// It can't be read.
    #[error("read {file}")]
    Read {
        /// The file.
        file: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A line is not what it should be. The line itself is a secret and not shown.
    #[error("{file}:{line}: {problem}")]
    Line {
        /// The file.
        file: String,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// What a scraper may show in place of a certificate.
#[derive(Default, Clone)]
pub struct Credentials {
    /// Digests of tokens.
    bearer: Vec<[u8; 32]>,
    /// User and digest of `user:password`.
    basic: Vec<(String, [u8; 32])>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Credentials({} tokens, {} users)",
            self.bearer.len(),
            self.basic.len()
        )
    }
}

fn sha256(secret: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, secret).as_ref());
    out
}

fn lines(file: &Path) -> Result<Vec<(usize, String)>, CredentialsError> {
    use std::io::Read;
    let name = file.display().to_string();
    let read = |source| CredentialsError::Read {
        file: name.clone(),
        source,
    };
    let mut text = String::new();
    std::fs::File::open(file)
        .and_then(|opened| opened.take(MAX_FILE).read_to_string(&mut text))
        .map_err(read)?;
    let kept = text
        .lines()
        .enumerate()
        .map(|(i, line)| (i + 1, line.trim().to_owned()));
    Ok(kept
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .collect())
}

impl Credentials {
    /// Reads both files, each if given.
    ///
    /// # Errors
    /// When one can't be read or has a line that is no credential.
    pub fn load(bearer: Option<&Path>, basic: Option<&Path>) -> Result<Self, CredentialsError> {
        let mut all = Self::default();
        if let Some(file) = bearer {
            for (line, token) in lines(file)? {
                let problem = "a token has at least 12 characters and no space";
                if token.len() < MIN_SECRET || token.contains(char::is_whitespace) {
                    return Err(CredentialsError::Line {
                        file: file.display().to_string(),
                        line,
                        problem,
                    });
                }
                all.bearer.push(sha256(token.as_bytes()));
            }
        }
        if let Some(file) = basic {
            for (line, entry) in lines(file)? {
                let problem = "wanted user:password, the password with at least 12 characters";
                match entry.split_once(':') {
                    Some((user, password)) if !user.is_empty() && password.len() >= MIN_SECRET => {
                        all.basic.push((user.to_owned(), sha256(entry.as_bytes())));
                    }
                    Some(_) | None => {
                        return Err(CredentialsError::Line {
                            file: file.display().to_string(),
                            line,
                            problem,
                        });
                    }
                }
            }
        }
        Ok(all)
    }

    /// Who the request proves to come from: `Proxy-Authorization: Bearer` or `Basic` (Go clients can send no other
    /// header on CONNECT).
    #[must_use]
    pub fn requester(&self, headers: &HeaderMap) -> Option<String> {
        let value = headers.get(header::PROXY_AUTHORIZATION)?.to_str().ok()?;
        let (scheme, rest) = value.split_once(' ')?;
        let rest = rest.trim();
        if scheme.eq_ignore_ascii_case("bearer") {
            let given = sha256(rest.as_bytes());
            // Every entry is compared, so that time tells nothing of which one matched.
            let matches = self
                .bearer
                .iter()
                .filter(|known| same(&given, known))
                .count();
            return (matches > 0).then(|| "bearer".to_owned());
        }
        if scheme.eq_ignore_ascii_case("basic") {
            let pair = STANDARD.decode(rest).ok()?;
            let given = sha256(&pair);
            let found = self.basic.iter().filter(|(_, known)| same(&given, known));
            return found.fold(None, |_, (user, _)| Some(format!("user/{user}")));
        }
        None
    }
}

fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    verify_slices_are_equal(a, b).is_ok()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn asks(credentials: &Credentials, value: &str) -> Option<String> {
        let mut headers = HeaderMap::new();
        headers.insert(header::PROXY_AUTHORIZATION, value.parse().unwrap());
        credentials.requester(&headers)
    }

    #[test]
    fn tokens_and_passwords_open_and_nothing_else_does() {
        let bearer = file("# scrapers\ntoken-of-prometheus\n");
        let basic = file("prom:a-long-password\n");
        let all = Credentials::load(Some(bearer.path()), Some(basic.path())).unwrap();
        assert_eq!(
            asks(&all, "Bearer token-of-prometheus").as_deref(),
            Some("bearer")
        );
        let basic = |pair: &str| format!("Basic {}", STANDARD.encode(pair));
        assert_eq!(
            asks(&all, &basic("prom:a-long-password")).as_deref(),
            Some("user/prom")
        );
        for wrong in [
            "Bearer token-of-prometheu".to_owned(),
            "Bearer ".into(),
            "Basic !!".into(),
            basic("prom:wrong-password"),
            basic("other:a-long-password"),
            "Digest x".into(),
            "token-of-prometheus".into(),
        ] {
            assert_eq!(asks(&all, &wrong), None, "{wrong}");
        }
        assert_eq!(asks(&Credentials::default(), "Bearer "), None);
        assert!(!format!("{all:?}").contains("prom"));
    }

    #[test]
    fn a_bad_line_is_named_and_not_shown() {
        let short = file("\nshort\n");
        let error = Credentials::load(Some(short.path()), None)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(":2:") && !error.contains("short\n"),
            "{error}"
        );
        let no_colon = file("just-a-password\n");
        Credentials::load(None, Some(no_colon.path())).unwrap_err();
    }
}
