//! The smallest exporter that a scraper takes for one.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

/// Longest request head that is read.
const HEAD: u64 = 8 * 1024;
/// Between two scrapes of a kept connection.
const IDLE: Duration = Duration::from_secs(90);

/// Answers every `GET /metrics` with one gauge that carries this stand-in's name, and anything else with 404.
///
/// # Errors
/// When the listener fails.
pub fn metrics(listener: &TcpListener, name: &str) -> io::Result<()> {
    std::thread::scope(|scope| {
        loop {
            let (stream, _) = listener.accept()?;
            // A scraper that goes away in the middle is its own business.
            scope.spawn(move || serve(&stream, name).ok());
        }
    })
}

/// Answers requests until the scraper leaves.
fn serve(mut stream: &TcpStream, name: &str) -> io::Result<()> {
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_nodelay(true)?;
    let mut input = BufReader::new(stream);
    loop {
        let mut head = (&mut input).take(HEAD).lines();
        let Some(request) = head.next().transpose()? else {
            return Ok(());
        };
        let mut last = false;
        for line in head {
            let line = line?;
            if line.is_empty() {
                break;
            }
            last |= line.eq_ignore_ascii_case("connection: close");
        }
        let (status, body) = if request.starts_with("GET /metrics ") {
            (
                "200 OK",
                format!("# TYPE stand_in gauge\nstand_in{{name=\"{name}\"}} 1\n"),
            )
        } else {
            ("404 Not Found", String::new())
        };
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(answer.as_bytes())?;
        if last {
            return Ok(());
        }
    }
}
