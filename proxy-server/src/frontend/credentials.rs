//! Bearer tokens and passwords of scrapers: read from files as digests, compared in constant time. The secret itself is
//! in no file of ours.
//!
//! A line is `name:sha256:digest`, as [`line()`] makes it. The digest is a plain SHA-256: a secret is meant to be random
//! and long, so there is nothing to guess, and a slow hash for each scrape would only slow the server down.

use std::path::Path;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderMap;
use http::header::HeaderName;

/// Largest file of tokens or passwords: thousands of entries.
const MAX_FILE: u64 = 1 << 20;
/// Shortest token or password that is taken; a random one of so many letters and digits has 95 bits.
const MIN_SECRET: usize = 16;
/// Longest name.
const MAX_NAME: usize = 64;

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
    /// A line is not what it should be. The line itself may be a secret and is not shown.
    #[error(
        "{file}:{line}: wanted NAME:sha256:DIGEST, as `proxy-server credential hash NAME` prints it; a secret in plain text is not taken"
    )]
    Line {
        /// The file.
        file: String,
        /// Counted from 1.
        line: usize,
    },
}

/// A name or a secret that makes no credential.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LineError {
    /// The name.
    #[error("a name has 1 to 64 of a-z, A-Z, 0-9, '.', '-' and '_'")]
    Name,
    /// The secret.
    #[error(
        "a token or password has at least 16 characters of printable ASCII and no space; take a random one, as of `openssl rand -hex 24`"
    )]
    Secret,
}

/// Name and digest of a secret.
type Entry = (String, [u8; 32]);

/// What a scraper may show in place of a certificate.
#[derive(Default, Clone)]
pub struct Credentials {
    bearer: Vec<Entry>,
    basic: Vec<Entry>,
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

fn is_name(text: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || b".-_".contains(&b);
    (1..=MAX_NAME).contains(&text.len()) && text.bytes().all(good)
}

/// The line that lets the holder of `secret` in under that name.
///
/// # Errors
/// The name is none, or the secret is too short or can't be sent in a header.
pub fn line(name: &str, secret: &str) -> Result<String, LineError> {
    use std::fmt::Write as _;
    if !is_name(name) {
        return Err(LineError::Name);
    }
    if secret.len() < MIN_SECRET || !secret.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(LineError::Secret);
    }
    let mut line = format!("{name}:sha256:");
    for byte in sha256(secret.as_bytes()) {
        write!(line, "{byte:02x}").ok(); // a String takes everything
    }
    Ok(line)
}

fn entry(line: &str) -> Option<Entry> {
    let (name, hex) = line.split_once(":sha256:")?;
    if !is_name(name) || hex.len() != 64 || !hex.is_ascii() {
        return None;
    }
    let mut digest = [0; 32];
    for (i, byte) in digest.iter_mut().enumerate() {
        let pair = hex.get(2 * i..2 * i + 2)?;
        if !pair.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some((name.to_owned(), digest))
}

fn entries(file: &Path) -> Result<Vec<Entry>, CredentialsError> {
    use std::io::Read;
    let name = file.display().to_string();
    let mut text = String::new();
    let read = std::fs::File::open(file)
        .and_then(|opened| opened.take(MAX_FILE).read_to_string(&mut text));
    if let Err(source) = read {
        return Err(CredentialsError::Read { file: name, source });
    }
    let lines = text.lines().map(str::trim).enumerate();
    lines
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(i, line)| {
            entry(line).ok_or_else(|| CredentialsError::Line {
                file: name.clone(),
                line: i + 1,
            })
        })
        .collect()
}

impl Credentials {
    /// Reads both files, each if given.
    ///
    /// # Errors
    /// When one can't be read or has a line that is no credential.
    pub fn load(bearer: Option<&Path>, basic: Option<&Path>) -> Result<Self, CredentialsError> {
        let read = |file: Option<&Path>| file.map_or_else(|| Ok(Vec::new()), entries);
        Ok(Self {
            bearer: read(bearer)?,
            basic: read(basic)?,
        })
    }

    /// Whose token or password that field shows, as `Bearer` or `Basic`: `Proxy-Authorization` where something is asked
    /// through us (Go clients can send no other on CONNECT), whose `Authorization` is for the destination.
    #[must_use]
    pub fn user(&self, headers: &HeaderMap, field: &HeaderName) -> Option<String> {
        let value = headers.get(field)?.to_str().ok()?;
        let (scheme, rest) = value.split_once(' ')?;
        let rest = rest.trim();
        if scheme.eq_ignore_ascii_case("bearer") {
            return holder(&self.bearer, rest.as_bytes(), |_name| true);
        }
        if scheme.eq_ignore_ascii_case("basic") {
            let pair = STANDARD.decode(rest).ok()?;
            let colon = pair.iter().position(|byte| *byte == b':')?;
            let (user, secret) = pair.split_at_checked(colon)?;
            let secret = secret.strip_prefix(b":")?;
            return holder(&self.basic, secret, |name| name.as_bytes() == user);
        }
        None
    }
}

/// Whose secret it is. Every entry is compared, so that time tells nothing of which one matched.
fn holder(entries: &[Entry], secret: &[u8], fits: impl Fn(&str) -> bool) -> Option<String> {
    let given = sha256(secret);
    let found = entries
        .iter()
        .filter(|(name, known)| verify_slices_are_equal(&given, known).is_ok() & fits(name));
    found.fold(None, |_, (name, _)| Some(name.clone()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use http::header;

    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn asks(credentials: &Credentials, value: &str) -> Option<String> {
        let mut headers = HeaderMap::new();
        headers.insert(header::PROXY_AUTHORIZATION, value.parse().unwrap());
        credentials.user(&headers, &header::PROXY_AUTHORIZATION)
    }

    fn basic(pair: &str) -> String {
        format!("Basic {}", STANDARD.encode(pair))
    }

    fn both() -> Credentials {
        let bearer = file(&format!(
            "# scrapers\n{}\n\n{}\n",
            line("prom", "token-of-prometheus").unwrap(),
            line("prom", "next-token-of-prometheus").unwrap()
        ));
        let basic = file(&line("grafana", "long:random:password").unwrap());
        Credentials::load(Some(bearer.path()), Some(basic.path())).unwrap()
    }

    #[test]
    fn tokens_and_passwords_say_whose_they_are() {
        let all = both();
        for token in ["token-of-prometheus", "next-token-of-prometheus"] {
            assert_eq!(
                asks(&all, &format!("bearer {token}")).as_deref(),
                Some("prom")
            );
        }
        assert_eq!(
            asks(&all, &basic("grafana:long:random:password")).as_deref(),
            Some("grafana")
        );
    }

    #[test]
    fn nothing_else_opens() {
        let all = both();
        let digest = line("prom", "token-of-prometheus").unwrap();
        let digest = digest.rsplit(':').next().unwrap();
        for wrong in [
            "Bearer token-of-prometheu".to_owned(),
            "Bearer ".into(),
            format!("Bearer {digest}"),
            "Bearer long:random:password".into(),
            "Basic !!".into(),
            basic("grafana"),
            basic("grafana:"),
            basic("grafana:long:random:passwor"),
            basic("prom:long:random:password"),
            basic("prom:token-of-prometheus"),
            basic(":long:random:password"),
            "Digest x".into(),
            "token-of-prometheus".into(),
        ] {
            assert_eq!(asks(&all, &wrong), None, "{wrong}");
        }
        assert_eq!(asks(&Credentials::default(), "Bearer "), None);
        let shown = format!("{all:?}");
        assert!(!shown.contains("prom") && !shown.contains(digest));
    }

    #[test]
    fn a_bad_line_is_named_and_not_shown_and_plain_text_is_one() {
        for bad in [
            "token-of-prometheus",
            "prom:a-long-password",
            "prom:sha256:0123",
            ":sha256:0000000000000000000000000000000000000000000000000000000000000000",
            "prom:sha256:+000000000000000000000000000000000000000000000000000000000000000",
            "prom:sha256:000000000000000000000000000000000000000000000000000000000000000é",
        ] {
            let file = file(&format!("\n{bad}\n"));
            for error in [
                Credentials::load(Some(file.path()), None),
                Credentials::load(None, Some(file.path())),
            ] {
                let error = error.unwrap_err().to_string();
                assert!(error.contains(":2:") && !error.contains(bad), "{error}");
            }
        }
    }

    #[test]
    fn short_secrets_and_odd_names_make_no_line() {
        for (name, secret, wanted) in [
            ("", "0123456789abcdef", LineError::Name),
            ("a:b", "0123456789abcdef", LineError::Name),
            ("a", "0123456789abcde", LineError::Secret),
            ("a", "0123456789 abcdef", LineError::Secret),
            ("a", "0123456789abcdefé", LineError::Secret),
        ] {
            assert_eq!(line(name, secret), Err(wanted), "{name} {secret}");
        }
        assert_eq!(
            line("a", "0123456789abcdef").unwrap(),
            "a:sha256:9f9f5111f7b27a781f1f1ddde5ebc2dd2b796bfc7365c9c28b548e564176929f"
        );
    }
}
