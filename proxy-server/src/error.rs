//! What a requester is told: a [`Reason`] and a sentence about this very case.

use std::fmt;

use proto::Reason;

/// A request that is not served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Which of the closed list.
    pub reason: Reason,
    /// For the person who typed `kubectl`: names the node and the cause. Printable ASCII only where it is sent.
    pub sentence: String,
}

impl Refusal {
    /// A refusal about `subject` (a node, a destination): "subject: the reason's sentence".
    pub fn about(subject: impl fmt::Display, reason: Reason) -> Self {
        Self {
            reason,
            sentence: format!("{subject}: {}", reason.sentence()),
        }
    }

    /// As [`Refusal::about`], with what else is known.
    pub fn detailed(subject: impl fmt::Display, reason: Reason, detail: &str) -> Self {
        if detail.is_empty() {
            return Self::about(subject, reason);
        }
        Self {
            reason,
            sentence: format!("{subject}: {}: {detail}", reason.sentence()),
        }
    }

    /// The sentence as an HTTP reason phrase (RFC 9112 section 4): one line of printable ASCII, bounded.
    #[must_use]
    pub fn reason_phrase(&self) -> String {
        // kube-apiserver reads heads up to 1 MiB; people read a line or two.
        const MOST: usize = 400;
        let printable = |c: char| {
            if c.is_ascii_graphic() || c == ' ' {
                c
            } else {
                '?'
            }
        };
        self.sentence.chars().take(MOST).map(printable).collect()
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_phrase_is_one_printable_line() {
        let refusal = Refusal::detailed("node edge1", Reason::DialRefused, "dial\r\nX: y é");
        assert_eq!(
            refusal.reason_phrase(),
            "node edge1: connection refused: dial??X: y ?"
        );
    }
}
