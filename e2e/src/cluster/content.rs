//! What the tests send through the tunnel and expect back: numbered lines and blocks that are all different, so that a
//! byte that is lost, doubled or from another node is seen.

use anyhow::{Result, bail, ensure};
use aws_lc_rs::digest::{Context, SHA256, digest};

/// Lines are long, since a line costs more on its way through containerd and kubelet than its bytes do.
const FILL: &str = "the quick brown fox jumps over the lazy dog ";
const FILLS: usize = 11;
/// Length of a line of a node whose name has five letters, with its end.
pub const LINE: usize = 500;

/// Line `number` of a node, without its end: what [`awk`] prints in a container.
#[must_use]
pub fn line(node: &str, number: u64) -> String {
    format!("{number:08} {}", rest(node))
}

/// What follows the number and a blank.
pub(super) fn rest(node: &str) -> String {
    format!("{node} {}", FILL.repeat(FILLS))
}

/// Lines 0 to `count` of a node as text.
#[must_use]
pub fn lines(node: &str, count: u64) -> String {
    (0..count).map(|number| line(node, number) + "\n").collect()
}

/// A shell command that prints lines 0 to `count` of a node.
#[must_use]
pub fn awk(node: &str, count: u64) -> String {
    let rest = rest(node);
    format!("awk 'BEGIN {{ for (i = 0; i < {count}; i++) printf \"%08d {rest}\\n\", i }}'")
}

/// `length` bytes that look random and follow from `seed` (xorshift64*).
#[must_use]
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// SHA-256 as hex.
#[must_use]
pub fn sha256(data: &[u8]) -> String {
    hex(digest(&SHA256, data).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Checks a stream of numbered lines as it comes in, without keeping it.
#[derive(Debug)]
pub struct LineCheck {
    node: String,
    next: u64,
    rest: Vec<u8>,
    broken: Option<String>,
}

impl LineCheck {
    /// For lines of a node from number 0 on.
    #[must_use]
    pub fn new(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            next: 0,
            rest: Vec::new(),
            broken: None,
        }
    }

    /// Takes the next bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.rest.extend_from_slice(part);
            let Some(found) = self.rest.strip_suffix(b"\n") else {
                return;
            };
            let wanted = line(&self.node, self.next);
            if self.broken.is_none() && found != wanted.as_bytes() {
                let found = String::from_utf8_lossy(found);
                self.broken = Some(format!("in place of line {}: {found:?}", self.next));
            }
            self.next += 1;
            self.rest.clear();
        }
    }

    /// How many lines were there.
    ///
    /// # Errors
    /// When one of them was not the one that had to come.
    pub fn count(&self) -> Result<u64> {
        match &self.broken {
            Some(what) => bail!("{what}"),
            None => Ok(self.next),
        }
    }
}

/// A hash of a stream as it comes in, for content that need not be kept.
pub struct HashCheck(Context, u64);

impl std::fmt::Debug for HashCheck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("HashCheck").field(&self.1).finish()
    }
}

impl Default for HashCheck {
    fn default() -> Self {
        Self(Context::new(&SHA256), 0)
    }
}

impl HashCheck {
    /// Takes the next bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
        self.1 += bytes.len() as u64;
    }

    /// Compares all that came in with what was expected.
    ///
    /// # Errors
    /// With both lengths, when it is not the same.
    pub fn expect(&self, wanted: &[u8]) -> Result<()> {
        let found = hex(self.0.clone().finish().as_ref());
        ensure!(
            found == sha256(wanted),
            "{} bytes that are not the {} expected ones",
            self.1,
            wanted.len()
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_the_length_they_are_said_to_have() {
        assert_eq!(lines("edge1", 3).len(), 3 * LINE);
    }

    #[test]
    fn lines_are_followed_across_pieces() {
        let text = lines("edge1", 100);
        let mut check = LineCheck::new("edge1");
        for piece in text.as_bytes().chunks(7) {
            check.feed(piece);
        }
        assert_eq!(check.count().unwrap(), 100);
    }

    #[test]
    fn a_missing_line_is_seen() {
        let text = lines("edge1", 10).replace("00000005", "00000006");
        let mut check = LineCheck::new("edge1");
        check.feed(text.as_bytes());
        let error = check.count().unwrap_err().to_string();
        assert!(error.starts_with("in place of line 5"), "{error}");
    }

    #[test]
    fn noise_is_the_same_each_time_and_differs_by_seed() {
        assert_eq!(noise(7, 1001), noise(7, 1001));
        assert_ne!(noise(7, 1001), noise(9, 1001));
    }
}
