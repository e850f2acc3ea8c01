//! A stand-in for kube-apiserver as an egress client: `CONNECT` over a Unix socket or over TCP with mutual TLS.
//!
//! It sends the very bytes that kube-apiserver sends, takes nothing but 200 for success, and reads not one byte beyond the
//! answer's head. What follows is a raw stream.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustls::{ClientConnection, StreamOwned};
use socket2::SockRef;

use crate::pattern::{self, Content};

mod door;

pub use door::{Door, TlsDoor};

/// Longest answer head that is read.
const HEAD: usize = 4 * 1024;

/// A CONNECT that was not answered with 200.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status.
    pub status: u16,
    /// The reason phrase, which is what `kubectl` shows.
    pub sentence: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "refused: {} {}", self.status, self.sentence)
    }
}

impl std::error::Error for Refusal {}

/// How a stream ended, as far as the requester can see.
#[derive(Debug)]
pub enum End {
    /// The other side ended its direction in an orderly way, and still takes ours.
    Orderly,
    /// Anything else.
    Cut(io::Error),
}

/// A connection to a frontend; after the answer, a raw stream.
#[derive(Debug)]
pub struct Tunnel {
    io: Io,
    finished: bool,
}

#[derive(Debug)]
enum Io {
    Unix(UnixStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Tunnel {
    /// Writes the request as kube-apiserver does: the destination is the request-target, and the `Host` is no use.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn ask(&mut self, destination: &str) -> io::Result<()> {
        write!(
            self,
            "CONNECT {destination} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        )?;
        self.flush()
    }

    /// Reads the answer's head, and nothing behind it.
    ///
    /// # Errors
    /// When it does not come or is not HTTP.
    pub fn answer(mut self) -> Result<Result<Self, Refusal>> {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            ensure!(head.len() < HEAD, "the head of the answer has no end");
            self.read_exact(&mut byte)
                .context("reading the answer to CONNECT")?;
            head.extend_from_slice(&byte);
        }
        let head = String::from_utf8(head)?;
        let mut words = head.lines().next().unwrap_or_default().splitn(3, ' ');
        ensure!(
            words.next() == Some("HTTP/1.1"),
            "not an answer to CONNECT: {head:?}"
        );
        let status = words.next().and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| anyhow!("no status: {head:?}"))?;
        let sentence = words.next().unwrap_or_default().to_owned();
        Ok(if status == 200 {
            Ok(self)
        } else {
            Err(Refusal { status, sentence })
        })
    }

    /// Ends the direction to the destination, and only that.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn finish(&mut self) -> io::Result<()> {
        self.finished = true;
        match &mut self.io {
            Io::Unix(stream) => stream.shutdown(Shutdown::Write),
            Io::Tls(stream) => {
                stream.conn.send_close_notify();
                stream.flush()
            }
        }
    }

    /// Longest silence that reading stands.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn patience(&self, longest: Duration) -> io::Result<()> {
        match &self.io {
            Io::Unix(stream) => stream.set_read_timeout(Some(longest)),
            Io::Tls(stream) => stream.sock.set_read_timeout(Some(longest)),
        }
    }

    /// Longest time that writing waits for room.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn impatient(&self, longest: Duration) -> io::Result<()> {
        match &self.io {
            Io::Unix(stream) => stream.set_write_timeout(Some(longest)),
            Io::Tls(stream) => stream.sock.set_write_timeout(Some(longest)),
        }
    }

    /// A second handle to the same stream, to read and to write at the same time.
    ///
    /// # Errors
    /// When this is no Unix socket: the TLS of this client has one handle only.
    pub fn second(&self) -> Result<Self> {
        match &self.io {
            Io::Unix(stream) => Ok(Self {
                io: Io::Unix(stream.try_clone()?),
                finished: self.finished,
            }),
            Io::Tls(_) => bail!("a TLS stream has one handle"),
        }
    }

    /// Reads to the end and says what came and how it ended.
    pub fn read_out(&mut self) -> (Content, End) {
        let (content, end) = pattern::read(self, u64::MAX);
        (
            content,
            end.and_then(|()| self.still_open())
                .map_or_else(End::Cut, |()| End::Orderly),
        )
    }

    /// One line, without its end.
    ///
    /// # Errors
    /// Those of the socket; `UnexpectedEof` when the stream ends before the line does.
    pub fn line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        let mut byte = [0];
        loop {
            self.read_exact(&mut byte)?;
            match byte {
                [b'\n'] => return Ok(String::from_utf8_lossy(&line).into_owned()),
                [other] => line.push(other),
            }
        }
    }

    /// All lines to the end of the stream, each as it arrives; bytes behind the last line's end are an error.
    pub fn lines(self) -> impl Iterator<Item = io::Result<String>> {
        BufReader::new(self).lines()
    }

    /// After an end of file: does the other side still take what we write? A Unix socket knows no reset, so a stream that
    /// was cut shows only in this, that both directions are gone at once.
    fn still_open(&self) -> io::Result<()> {
        match &self.io {
            // Nothing is sent, and still a socket whose peer is gone answers EPIPE.
            Io::Unix(stream) if !self.finished => SockRef::from(stream).send(&[]).map(|_| ()),
            // Both directions have ended, and nobody can tell any more how.
            Io::Unix(_) => Ok(()),
            // rustls tells an end without close_notify from one with it.
            Io::Tls(_) => Ok(()),
        }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        if !self.finished && matches!(self.io, Io::Tls(_)) {
            // As kube-apiserver's TLS does when it closes. The other side may be gone already.
            self.finish().ok();
        }
    }
}

impl Read for Tunnel {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match &mut self.io {
            Io::Unix(stream) => stream.read(buf),
            Io::Tls(stream) => stream.read(buf),
        }
    }
}

impl Write for Tunnel {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match &mut self.io {
            Io::Unix(stream) => stream.write(buf),
            Io::Tls(stream) => stream.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.io {
            Io::Unix(stream) => stream.flush(),
            Io::Tls(stream) => stream.flush(),
        }
    }
}
