//! Content that can be told from any other: pseudo-random bytes of a seed, and hashes of what arrived.
//!
//! The same seed and length give the same bytes in every process of one build, which is all that a test needs.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};

use aws_lc_rs::digest::{Context, SHA256};
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};

/// Bytes made, written or read at once.
const CHUNK: usize = 64 * 1024;

/// How much there was, and its hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// Bytes in all.
    pub bytes: u64,
    /// SHA-256 of them, in hex.
    pub hash: String,
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.bytes, self.hash)
    }
}

/// What `bytes` bytes of `seed` are, without sending them anywhere.
#[must_use]
pub fn expected(bytes: u64, seed: u64) -> Content {
    tail(bytes, 0, seed)
}

/// The same without the first `skip` bytes.
#[must_use]
pub fn tail(bytes: u64, skip: u64, seed: u64) -> Content {
    let (mut hash, mut skip) = (Hash::default(), skip);
    each_chunk(bytes, seed, |chunk| {
        let skipped = usize::try_from(skip).map_or(chunk.len(), |skip| skip.min(chunk.len()));
        skip -= skipped as u64;
        hash.add(chunk.get(skipped..).unwrap_or_default());
        Ok(())
    })
    .ok(); // nothing in there can fail
    hash.finish()
}

/// Writes `bytes` bytes of `seed`.
///
/// # Errors
/// Those of the writer.
pub fn write(to: &mut impl Write, bytes: u64, seed: u64) -> io::Result<()> {
    each_chunk(bytes, seed, |chunk| to.write_all(chunk))
}

/// Reads to the end, or to `limit`. The content is what came before an error too.
pub fn read(from: &mut impl Read, limit: u64) -> (Content, io::Result<()>) {
    let mut hash = Hash::default();
    let mut chunk = vec![0; CHUNK];
    let mut from = from.take(limit);
    let end = loop {
        match from.read(&mut chunk) {
            Ok(0) => break Ok(()),
            Ok(count) => hash.add(chunk.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => break Err(error),
        }
    };
    (hash.finish(), end)
}

/// Hands over `bytes` bytes of `seed` piece by piece.
///
/// # Errors
/// Those of `take`.
pub fn each_chunk(
    bytes: u64,
    seed: u64,
    mut take: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut chunk = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        // Whole chunks are drawn always, so that the bytes do not depend on the length.
        random.fill_bytes(&mut chunk);
        let count = usize::try_from(left).map_or(CHUNK, |left| left.min(CHUNK));
        take(chunk.get(..count).unwrap_or_default())?;
        left -= count as u64;
    }
    Ok(())
}

struct Hash {
    context: Context,
    bytes: u64,
}

impl Default for Hash {
    fn default() -> Self {
        Self {
            context: Context::new(&SHA256),
            bytes: 0,
        }
    }
}

impl Hash {
    fn add(&mut self, bytes: &[u8]) {
        self.context.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    fn finish(self) -> Content {
        let digest = self.context.finish();
        let hash = digest
            .as_ref()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Content {
            bytes: self.bytes,
            hash,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_bytes_and_another_seed_others() {
        let mut sent = Vec::new();
        write(&mut sent, 100_001, 7).unwrap();
        let (content, end) = read(&mut &*sent, u64::MAX);
        assert!(end.is_ok());
        assert_eq!(content, expected(100_001, 7));
        assert_ne!(content, expected(100_001, 8));
        assert_ne!(content, expected(100_000, 7));
        let (rest, _) = read(&mut sent.split_at(70_000).1, u64::MAX);
        assert_eq!(rest, tail(100_001, 70_000, 7));
    }
}
