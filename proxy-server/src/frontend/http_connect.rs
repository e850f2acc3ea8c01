//! HTTP CONNECT as kube-apiserver's egress selector speaks it (`proxyProtocol: HTTPConnect`), over a Unix socket or
//! over TCP with mutual TLS.
//!
//! kube-apiserver sends `CONNECT host:port HTTP/1.1`, `Host: 127.0.0.1` and an empty line. Only the request-target
//! counts. It takes nothing but status 200 for success, shows the reason phrase to the user and nothing of the body, has
//! no time limit of its own, and fails on any byte behind the head that came with it. So: 200 alone and only once the
//! destination has answered; the sentence in the reason phrase; our own limits; the requester watched while we dial.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::{Bytes, BytesMut};
use daemon::{Peer, Stream};
use proto::{Destination, Reason, RelayEnd};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::policy::Policy;
use super::{Io, LiveTls, handshake};
use crate::config::Elsewhere;
use crate::error::Refusal;
use crate::serve::{Forwarder, Request};

/// Metric label.
const NAME: &str = "http_connect";
/// Largest head. kube-apiserver's has under 350 bytes with the longest DNS name.
const MAX_HEAD: usize = 8 << 10;
/// Most header fields that are looked past.
const MAX_HEADERS: usize = 64;
/// What a requester may send before it is answered; more waits in its socket.
const MAX_EARLY: usize = 16 << 10;

/// For a requester to take its answer, a few hundred bytes.
const ANSWER: Duration = Duration::from_secs(5);

/// One listener's settings.
#[derive(Debug)]
pub struct HttpConnect {
    /// What carries requests.
    pub forwarder: Arc<Forwarder>,
    /// TLS, on TCP.
    pub tls: Option<LiveTls>,
    /// What about destinations that are not at the edge.
    pub elsewhere: ArcSwap<Elsewhere>,
    /// Who may ask for what.
    pub policy: ArcSwap<Policy>,
}

impl HttpConnect {
    /// Serves one connection.
    pub async fn serve(self: Arc<Self>, stream: Stream, peer: Peer) {
        let limit = self.forwarder.timeouts.header;
        let metrics = &self.forwarder.metrics;
        let Ok((mut io, requester)) =
            handshake(stream, &peer, self.tls.as_ref(), limit, metrics).await
        else {
            return;
        };
        let mut buffer = BytesMut::new();
        let head = timeout(limit, read_head(&mut io, &mut buffer)).await;
        let late = Refusal {
            reason: Reason::Timeout,
            sentence: "no request came in time".into(),
        };
        let destination = match head.unwrap_or(Err(Head::Bad(late))) {
            Ok(destination) => destination,
            // Opened and closed: a probe of a load balancer.
            Err(Head::Gone) => return,
            Err(Head::Bad(refusal)) => {
                metrics.stream(
                    NAME,
                    crate::record::Path::None,
                    crate::record::Outcome::Failed(refusal.reason),
                );
                tracing::info!(target: "access", frontend = NAME, %requester, from = requester.source(), reason = refusal.reason.label(), said = %refusal, "request refused");
                return answer(&mut io, &refusal).await;
            }
        };
        let request = Request {
            frontend: NAME,
            requester,
            destination,
            elsewhere: **self.elsewhere.load(),
            policy: self.policy.load_full(),
        };
        let opened = self
            .forwarder
            .open(request, until_gone(&mut io, &mut buffer))
            .await;
        match opened {
            Err(refusal) if refusal.reason == Reason::Cancelled => {}
            Err(refusal) => answer(&mut io, &refusal).await,
            Ok(opened) => {
                let said = async {
                    io.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
                    io.flush().await
                };
                // The relay finds out what a requester that left means; one that takes nothing is not waited for.
                let Ok(_) = timeout(ANSWER, said).await else {
                    return io.abort();
                };
                if let RelayEnd::Cut(_) = opened.relay(&mut io, buffer.freeze()).await {
                    io.abort();
                }
            }
        }
    }
}

/// Why there is no destination.
#[derive(Debug)]
enum Head {
    /// The requester left without a word.
    Gone,
    /// What it said is not a request we serve.
    Bad(Refusal),
}

fn bad(reason: Reason, sentence: &str) -> Head {
    Head::Bad(Refusal {
        reason,
        sentence: sentence.to_owned(),
    })
}

/// Reads the head; what came behind it stays in `buffer`.
async fn read_head(io: &mut Io, buffer: &mut BytesMut) -> Result<Destination, Head> {
    loop {
        if let Some((destination, length)) = parse(buffer)? {
            drop(buffer.split_to(length));
            return Ok(destination);
        }
        if buffer.len() >= MAX_HEAD {
            return Err(bad(
                Reason::TooLarge,
                "the request's head is larger than 8 KiB",
            ));
        }
        buffer.reserve(1024);
        match io.read_buf(buffer).await {
            Ok(0) | Err(_) if buffer.is_empty() => return Err(Head::Gone),
            Ok(0) | Err(_) => {
                return Err(bad(Reason::BadRequest, "the request ended within its head"));
            }
            Ok(_) => {}
        }
    }
}

/// The destination and the head's length, once it is whole.
fn parse(bytes: &[u8]) -> Result<Option<(Destination, usize)>, Head> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(bytes) {
        Ok(httparse::Status::Partial) => return Ok(None),
        Ok(httparse::Status::Complete(length)) => length,
        Err(httparse::Error::TooManyHeaders) => {
            return Err(bad(
                Reason::TooLarge,
                "the request has more than 64 header fields",
            ));
        }
        Err(_) => return Err(bad(Reason::BadRequest, "the request is not HTTP/1.1")),
    };
    if request.method != Some("CONNECT") {
        return Err(bad(Reason::BadRequest, "only CONNECT is served here"));
    }
    let target = request.path.unwrap_or_default();
    match target.parse() {
        Ok(destination) => Ok(Some((destination, length))),
        Err(error) => Err(bad(
            Reason::BadRequest,
            // It may have more than ASCII in it, and one line stays one line.
            &format!("CONNECT {}: {error}", target.escape_debug()),
        )),
    }
}

/// Resolves when the requester hangs up. What it sends meanwhile is kept, up to a limit.
async fn until_gone(io: &mut Io, early: &mut BytesMut) {
    while early.len() < MAX_EARLY {
        early.reserve(1024);
        match io.read_buf(early).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
    std::future::pending::<()>().await;
}

/// The answer that is no success, in one line that the user reads.
fn refusal_head(refusal: &Refusal) -> String {
    let status = refusal.reason.http_status();
    format!(
        "HTTP/1.1 {status} {}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        refusal.reason_phrase()
    )
}

async fn answer(io: &mut Io, refusal: &Refusal) {
    let head = Bytes::from(refusal_head(refusal));
    let said = async {
        io.write_all(&head).await?;
        io.shutdown().await
    };
    timeout(ANSWER, said).await.ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Option<(String, usize)>, Reason> {
        match parse(text.as_bytes()) {
            Ok(found) => Ok(found.map(|(d, n)| (d.to_string(), n))),
            Err(Head::Bad(refusal)) => Err(refusal.reason),
            Err(Head::Gone) => unreachable!(),
        }
    }

    #[test]
    fn what_kube_apiserver_sends_is_read_to_its_last_byte() {
        let text = "CONNECT edge1:10250 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";
        assert_eq!(parsed(text), Ok(Some(("edge1:10250".into(), text.len()))));
        for cut in 0..text.len() {
            assert_eq!(parsed(&text[..cut]), Ok(None), "{cut}");
        }
        assert_eq!(
            parsed(&format!("{text}\x16\x03")).unwrap().unwrap().1,
            text.len()
        );
    }

    #[test]
    fn anything_else_is_a_bad_request() {
        for text in [
            "GET / HTTP/1.1\r\n\r\n",
            "CONNECT / HTTP/1.1\r\n\r\n",
            "CONNECT edge1 HTTP/1.1\r\n\r\n",
            "CONNECT edge1:0 HTTP/1.1\r\n\r\n",
            "CONNECT http://edge1:1/ HTTP/1.1\r\n\r\n",
            "\x16\x03\x01\x02\x00\x01",
            "CONNECT edge1:1 HTTP/2\r\n\r\n",
            "CONNECT edge1:1\r\n\r\n",
        ] {
            assert_eq!(parsed(text), Err(Reason::BadRequest), "{text:?}");
        }
        let many = format!("CONNECT a:1 HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(65));
        assert_eq!(parsed(&many), Err(Reason::TooLarge));
    }

    #[test]
    fn what_is_said_of_a_target_is_one_line_without_controls() {
        for target in ["edge1\u{85}forged:1", "edge1\u{9b}2J:1", "\u{2028}:1"] {
            let Err(Head::Bad(refusal)) =
                parse(format!("CONNECT {target} HTTP/1.1\r\n\r\n").as_bytes())
            else {
                panic!("{target:?}")
            };
            let odd = |c: char| c.is_control() || c == '\u{2028}';
            assert!(!refusal.sentence.contains(odd), "{:?}", refusal.sentence);
        }
    }

    #[test]
    fn the_answer_is_one_status_line_with_the_sentence() {
        let refusal = Refusal::about("node edge1", Reason::NoSession);
        let head = refusal_head(&refusal);
        assert!(
            head.starts_with("HTTP/1.1 503 node edge1: no session\r\n"),
            "{head}"
        );
        assert!(head.ends_with("\r\n\r\n"));
    }
}
