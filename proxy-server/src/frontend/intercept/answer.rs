//! How a requester is told that it can't be served, in what it speaks: a TLS alert, an HTTP response, or a reset.

use std::time::Duration;

use daemon::Stream;
use proto::Reason;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::flight::Speech;
use crate::error::Refusal;

/// For a requester to take its answer, a few hundred bytes.
const ANSWER: Duration = Duration::from_secs(5);
/// For it to hang up after that. Closed at once with bytes unread, the connection would end with a reset, which may
/// overtake the answer.
const LINGER: Duration = Duration::from_secs(1);
/// Most bytes that are thrown away meanwhile.
const MAX_THROWN: usize = 1 << 20;

/// Alert descriptions, RFC 8446 section 6.
const ACCESS_DENIED: u8 = 49;
const DECODE_ERROR: u8 = 50;
const INTERNAL_ERROR: u8 = 80;
const UNRECOGNIZED_NAME: u8 = 112;

/// Answers and closes.
pub(super) async fn refuse(mut stream: Stream, speech: Speech, refusal: &Refusal) {
    let answer = match speech {
        Speech::Tls => alert(refusal.reason).to_vec(),
        Speech::Http => response(refusal).into_bytes(),
        // Nothing that it would understand.
        Speech::Unknown => return stream.abort(),
    };
    let said = async {
        stream.write_all(&answer).await?;
        stream.shutdown().await
    };
    if matches!(timeout(ANSWER, said).await, Ok(Ok(()))) {
        timeout(LINGER, throw_away(&mut stream)).await.ok();
    }
}

async fn throw_away(stream: &mut Stream) {
    let mut chunk = [0; 1024];
    let mut thrown = 0;
    while thrown < MAX_THROWN {
        match stream.read(&mut chunk).await {
            Ok(0) | Err(_) => return,
            Ok(count) => thrown += count,
        }
    }
}

/// A fatal alert in a plaintext record, as a server sends it in place of its ServerHello.
fn alert(reason: Reason) -> [u8; 7] {
    [21, 3, 3, 0, 2, 2, description(reason)]
}

const fn description(reason: Reason) -> u8 {
    match reason {
        // Go's TLS says "unrecognized name", OpenSSL "unrecognized name".
        Reason::UnknownDestination | Reason::AmbiguousDestination => UNRECOGNIZED_NAME,
        Reason::NotAllowed
        | Reason::Unauthenticated
        | Reason::DestinationDenied
        | Reason::ForbiddenDestination
        | Reason::Revoked => ACCESS_DENIED,
        Reason::BadRequest | Reason::TooLarge => DECODE_ERROR,
        Reason::Unspecified
        | Reason::Cancelled
        | Reason::Protocol
        | Reason::Internal
        | Reason::Draining
        | Reason::Timeout
        | Reason::Version
        | Reason::NoSession
        | Reason::SessionLost
        | Reason::Replaced
        | Reason::CertificateExpired
        | Reason::IdentityMismatch
        | Reason::Tls
        | Reason::Unreachable
        | Reason::NodeGone
        | Reason::Overloaded
        | Reason::DialRefused
        | Reason::DialTimeout
        | Reason::DialUnreachable
        | Reason::Resolve
        | Reason::FilesExhausted
        | Reason::DialFailed
        | Reason::DestinationReset
        | Reason::RequesterReset
        | Reason::SlowReader
        | Reason::HalfOpenIdle => INTERNAL_ERROR,
    }
}

/// The sentence in the status line and as the body: `kubectl` and scrapers show the one, people with `curl` the other.
fn response(refusal: &Refusal) -> String {
    let (status, phrase) = (refusal.reason.http_status(), refusal.reason_phrase());
    format!(
        "HTTP/1.1 {status} {phrase}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{phrase}\n",
        phrase.len() + 1
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alerts_are_fatal_and_fit_the_reason() {
        assert_eq!(alert(Reason::UnknownDestination), [21, 3, 3, 0, 2, 2, 112]);
        assert_eq!(alert(Reason::NoSession)[6], INTERNAL_ERROR);
        assert_eq!(alert(Reason::DestinationDenied)[6], ACCESS_DENIED);
        assert_eq!(alert(Reason::BadRequest)[6], DECODE_ERROR);
    }

    #[test]
    fn a_response_is_whole_and_says_it_in_one_line() {
        let text = response(&Refusal::about("node edge1", Reason::NoSession));
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(
            head.starts_with("HTTP/1.1 503 node edge1: no session\r\n"),
            "{head}"
        );
        assert!(
            head.contains(&format!("Content-Length: {}", body.len())),
            "{head}"
        );
    }
}
