//! A stand-in for the kubelet, for everything that a tunnel does to bytes.
//!
//! The tunnel never looks into a stream, so plain TCP stands for TLS here. The first line of a connection is a
//! [`Behaviour`]; what it did and how the connection ended is reported as one line, so that a test sees that side too.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::SockRef;

use crate::{pattern, wait};

mod metrics;

pub use metrics::metrics;

/// Longest first line that is read.
const FIRST_LINE: u64 = 128;

/// What the stand-in does with one connection. `Display` and `FromStr` are the first line, without its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// Sends back what comes, as it comes, and ends when the other side has.
    Echo,
    /// Writes so many lines `line 0`, `line 1`, …, one every so many milliseconds, then ends.
    Trickle {
        /// Lines in all.
        lines: u64,
        /// Milliseconds between two.
        every_ms: u64,
    },
    /// Writes so many bytes of a seed (see [`pattern`]), then ends.
    Send {
        /// Bytes in all.
        bytes: u64,
        /// Seed of the pattern.
        seed: u64,
    },
    /// Reads so many bytes and answers with their count and hash; the other side need not end.
    Sink {
        /// Bytes in all.
        bytes: u64,
    },
    /// Reads until the other side has ended, and only then answers with count and hash.
    HalfClose,
    /// Says `done`, ends its own side first, and reads until the other side has ended too.
    EndFirst,
    /// Writes so many bytes of seed 0 and cuts the connection with a TCP reset.
    Reset {
        /// Bytes before the cut.
        after: u64,
    },
    /// Never answers.
    Hang,
    /// Reads nothing and never answers, until the connection is cut.
    Deaf,
    /// Answers with the name of this stand-in.
    Name,
}

impl fmt::Display for Behaviour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Echo => write!(f, "echo"),
            Self::Trickle { lines, every_ms } => write!(f, "trickle {lines} {every_ms}"),
            Self::Send { bytes, seed } => write!(f, "send {bytes} {seed}"),
            Self::Sink { bytes } => write!(f, "sink {bytes}"),
            Self::HalfClose => write!(f, "half-close"),
            Self::EndFirst => write!(f, "end-first"),
            Self::Reset { after } => write!(f, "reset {after}"),
            Self::Hang => write!(f, "hang"),
            Self::Deaf => write!(f, "deaf"),
            Self::Name => write!(f, "name"),
        }
    }
}

impl FromStr for Behaviour {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> anyhow::Result<Self> {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap_or_default();
        let mut number = |what: &str| -> anyhow::Result<u64> {
            let word = words
                .next()
                .with_context(|| format!("{name} wants {what}"))?;
            Ok(word.parse()?)
        };
        Ok(match name {
            "echo" => Self::Echo,
            "trickle" => Self::Trickle {
                lines: number("lines")?,
                every_ms: number("ms")?,
            },
            "send" => Self::Send {
                bytes: number("bytes")?,
                seed: number("a seed")?,
            },
            "sink" => Self::Sink {
                bytes: number("bytes")?,
            },
            "half-close" => Self::HalfClose,
            "end-first" => Self::EndFirst,
            "reset" => Self::Reset {
                after: number("bytes")?,
            },
            "hang" => Self::Hang,
            "deaf" => Self::Deaf,
            "name" => Self::Name,
            _ => return Err(anyhow!("no such behaviour: {line:?}")),
        })
    }
}

/// Serves connections until the process ends, each on a thread of its own. `report` gets one line at the end of each:
/// the behaviour, then what it read or `ok`, or the error.
///
/// # Errors
/// When the listener fails.
pub fn serve(listener: &TcpListener, name: &str, report: impl Fn(&str) + Sync) -> io::Result<()> {
    let report = &report;
    std::thread::scope(|scope| {
        loop {
            let (stream, _) = listener.accept()?;
            // Not buffered: a connection shows what arrived and nothing later.
            stream.set_nodelay(true)?;
            scope.spawn(move || report(&connection(&stream, name)));
        }
    })
}

/// One connection, first line to end.
fn connection(stream: &TcpStream, name: &str) -> String {
    let mut input = BufReader::new(stream);
    let mut line = String::new();
    let first = (&mut input).take(FIRST_LINE).read_line(&mut line);
    let behaviour = match first
        .map_err(anyhow::Error::from)
        .and_then(|_| line.parse())
    {
        Ok(behaviour) => behaviour,
        Err(error) => return format!("no first line: {error:#}"),
    };
    match act(behaviour, &mut input, stream, name) {
        Ok(read) => format!("{behaviour}: {read}"),
        Err(error) => format!("{behaviour}: error: {error}"),
    }
}

/// Does it, and returns what it has read, or `ok`.
fn act(
    behaviour: Behaviour,
    input: &mut BufReader<&TcpStream>,
    mut stream: &TcpStream,
    name: &str,
) -> io::Result<String> {
    let done = Ok("ok".to_owned());
    match behaviour {
        Behaviour::Echo => {
            let mut chunk = vec![0; 64 * 1024];
            loop {
                let count = input.read(&mut chunk)?;
                if count == 0 {
                    return done;
                }
                stream.write_all(chunk.get(..count).unwrap_or_default())?;
            }
        }
        Behaviour::Trickle { lines, every_ms } => {
            for number in 0..lines {
                stream.write_all(format!("line {number}\n").as_bytes())?;
                wait::pass(Duration::from_millis(every_ms));
            }
            done
        }
        Behaviour::Send { bytes, seed } => {
            pattern::write(&mut stream, bytes, seed)?;
            done
        }
        Behaviour::Sink { bytes } => answer(input, stream, bytes),
        Behaviour::HalfClose => answer(input, stream, u64::MAX),
        Behaviour::EndFirst => {
            stream.write_all(b"done\n")?;
            stream.shutdown(Shutdown::Write)?;
            let (content, end) = pattern::read(input, u64::MAX);
            end.map(|()| content.to_string())
        }
        Behaviour::Reset { after } => {
            pattern::write(&mut stream, after, 0)?;
            // With a linger time of zero the close is a reset (socket(7)).
            SockRef::from(stream).set_linger(Some(Duration::ZERO))?;
            done
        }
        Behaviour::Hang => {
            let (content, end) = pattern::read(input, u64::MAX);
            end.map(|()| content.to_string())
        }
        Behaviour::Deaf => {
            // Without being asked it tells of a reset and of an end of both sides (poll(2)).
            let mut end = [PollFd::new(stream.as_fd(), PollFlags::empty())];
            poll(&mut end, PollTimeout::NONE)?;
            done
        }
        Behaviour::Name => {
            stream.write_all(format!("{name}\n").as_bytes())?;
            done
        }
    }
}

fn answer(
    input: &mut BufReader<&TcpStream>,
    mut stream: &TcpStream,
    bytes: u64,
) -> io::Result<String> {
    let (content, end) = pattern::read(input, bytes);
    end?;
    stream.write_all(format!("{content}\n").as_bytes())?;
    Ok(content.to_string())
}
