//! One request to an endpoint of this machine: what `status` commands use.

use std::io;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use crate::Listen;

/// A local connect takes microseconds; longer means that the service hangs.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// For the whole answer; the endpoint gives up earlier.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// Largest answer: ten thousand sessions are some 3 MB of JSON.
const MAX_ANSWER: usize = 32 * 1024 * 1024;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there, or we may not connect.
    #[error("connect to {addr}; is the service running?")]
    Connect {
        /// The address.
        addr: Listen,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The answer broke off, or is no HTTP.
    #[error("talk HTTP with {addr}")]
    Http {
        /// The address.
        addr: Listen,
        /// What was wrong.
        #[source]
        source: hyper::Error,
    },
    /// The path is not one.
    #[error("make the request")]
    Request(#[source] http::Error),
    /// The answer is not 200.
    #[error("{addr} answers {status}: {body}")]
    Status {
        /// The address.
        addr: Listen,
        /// The status.
        status: StatusCode,
        /// The answer's sentence.
        body: String,
    },
    /// No answer in time.
    #[error("no answer from {addr} within {after:?}")]
    Timeout {
        /// The address.
        addr: Listen,
        /// What was waited for.
        after: Duration,
    },
    /// The answer is too large, or broke off.
    #[error("read the answer of {addr}")]
    Truncated {
        /// The address.
        addr: Listen,
        /// What was wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// What a probe asks for: see [`super::Routes::probes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// `/livez`
    Live,
    /// `/readyz`
    Ready,
}

impl Probe {
    /// Where the answer is.
    pub const fn path(self) -> &'static str {
        match self {
            Self::Live => "/livez",
            Self::Ready => "/readyz",
        }
    }
}

impl FromStr for Probe {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "live" => Ok(Self::Live),
            "ready" => Ok(Self::Ready),
            _ => Err("there are live and ready"),
        }
    }
}

/// `GET path`; the answer's body if its status is 200.
///
/// # Errors
/// [`ClientError`].
pub async fn get(addr: &Listen, path: &str) -> Result<Bytes, ClientError> {
    send(addr, Method::GET, path, Bytes::new()).await
}

/// `PUT path` with a body; the answer's body if its status is 200.
///
/// # Errors
/// [`ClientError`].
pub async fn put(addr: &Listen, path: &str, body: Bytes) -> Result<Bytes, ClientError> {
    send(addr, Method::PUT, path, body).await
}

async fn send(
    addr: &Listen,
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<Bytes, ClientError> {
    let late = |after| ClientError::Timeout {
        addr: addr.clone(),
        after,
    };
    let refused = |source| ClientError::Connect {
        addr: addr.clone(),
        source,
    };
    let answer = async {
        match addr {
            Listen::Tcp(socket_addr) => {
                #[expect(
                    clippy::disallowed_methods,
                    reason = "an operator's command, not the data path"
                )]
                let connecting = TcpStream::connect(*socket_addr);
                let stream = timeout(CONNECT_TIMEOUT, connecting).await;
                let stream = stream
                    .ok()
                    .ok_or_else(|| late(CONNECT_TIMEOUT))?
                    .map_err(refused)?;
                exchange(addr, stream, method, path, body).await
            }
            Listen::Unix(file) => {
                let stream = timeout(CONNECT_TIMEOUT, UnixStream::connect(file)).await;
                let stream = stream
                    .ok()
                    .ok_or_else(|| late(CONNECT_TIMEOUT))?
                    .map_err(refused)?;
                exchange(addr, stream, method, path, body).await
            }
        }
    };
    timeout(ANSWER_TIMEOUT, answer)
        .await
        .ok()
        .ok_or_else(|| late(ANSWER_TIMEOUT))?
}

async fn exchange<S>(
    addr: &Listen,
    stream: S,
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<Bytes, ClientError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let host = addr
        .tcp()
        .map_or_else(|| "localhost".to_owned(), |addr| addr.to_string());
    let request = http::Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, host)
        .header(header::CONNECTION, "close")
        .body(Full::new(body))
        .map_err(ClientError::Request)?;
    let broken = |source| ClientError::Http {
        addr: addr.clone(),
        source,
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(broken)?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER)
            .collect()
            .await;
        let body = body
            .map_err(|source| ClientError::Truncated {
                addr: addr.clone(),
                source,
            })?
            .to_bytes();
        if status == StatusCode::OK {
            return Ok(body);
        }
        let body = String::from_utf8_lossy(&body).trim_end().to_owned();
        Err(ClientError::Status {
            addr: addr.clone(),
            status,
            body,
        })
    };
    // The connection is driven here, beside the exchange that uses it; nothing outlives this function. The exchange
    // sees whatever goes wrong with the connection.
    let mut answer = std::pin::pin!(answer);
    tokio::select! {
        answer = answer.as_mut() => answer,
        _ = connection => answer.await,
    }
}
