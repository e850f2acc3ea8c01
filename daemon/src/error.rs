//! How an error is printed with all its sources.
//!
//! Messages never repeat their source (house rule), so a log line that wants the whole story prints the chain.

use std::error::Error;
use std::fmt;

/// Prints an error and all its sources, separated by `: `.
///
/// ```
/// let err = std::io::Error::other("disk is full");
/// assert_eq!(daemon::chain(&err).to_string(), "disk is full");
/// ```
pub fn chain<'a>(error: &'a (dyn Error + 'static)) -> Chain<'a> {
    Chain(error)
}

/// See [`chain`].
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a>(&'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut printed = self.0.to_string();
        f.write_str(&printed)?;
        let mut next = self.0.source();
        while let Some(error) = next {
            let message = error.to_string();
            // Errors of other crates may break the rule and repeat their source; a repeated sentence helps nobody.
            if !printed.ends_with(&message) {
                write!(f, ": {message}")?;
            }
            printed = message;
            next = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("read /a")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn a_chain_names_every_source_once() {
        let err = Outer(std::io::Error::other("no such thing"));
        assert_eq!(chain(&err).to_string(), "read /a: no such thing");
    }
}
