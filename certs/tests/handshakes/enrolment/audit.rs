//! What is decided is logged, and no secret with it.

use std::cell::RefCell;

use certs::JoinToken;
use certs::test_ca::now;

use super::{Agent, Server};

thread_local! {
    /// What was logged on this thread. A test has a thread of its own, and its server runs on it.
    static LINES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Writes to [`LINES`].
struct Sink;

impl std::io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LINES.with_borrow_mut(|lines| lines.extend_from_slice(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn each_decision_leaves_one_audit_line_without_the_secret() {
    // For the whole process: a subscriber of one thread misses what others met first.
    tracing_subscriber::fmt()
        .json()
        .with_env_filter("audit=info")
        .with_writer(|| Sink)
        .init();
    let server = Server::start().await;
    let token = server.token(1, "edge*");
    let wrong = format!("{}.{}", token.id(), "a".repeat(32))
        .parse()
        .unwrap();
    let unknown = JoinToken::generate().unwrap();
    let edge1 = Agent::new("edge1");
    edge1.enroll(&server, &wrong).await.unwrap_err();
    edge1.enroll(&server, &unknown).await.unwrap_err();
    let enrolled = edge1.enroll(&server, &token).await.unwrap();
    Agent::new("edge2")
        .enroll(&server, &token)
        .await
        .unwrap_err();
    edge1.renew(&server, enrolled.credential).await.unwrap();
    server.store.revoke_agent(&edge1.name, now()).unwrap();
    edge1
        .renew(&server, server.ca.agent("edge1"))
        .await
        .unwrap_err();

    let text = String::from_utf8(LINES.take()).unwrap();
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let field = |line: &serde_json::Value, name: &str| {
        line["fields"][name].as_str().unwrap_or_default().to_owned()
    };
    let seen: Vec<[String; 5]> = lines
        .iter()
        .map(|line| ["event", "outcome", "detail", "agent", "token"].map(|name| field(line, name)))
        .collect();
    let id = token.id();
    let expected = [
        ["enroll", "wrong_token", "wrong secret", "edge1", id],
        [
            "enroll",
            "wrong_token",
            "unknown token",
            "edge1",
            unknown.id(),
        ],
        ["enroll", "granted", "", "edge1", id],
        ["enroll", "token_used_up", "", "edge2", id],
        ["renew", "granted", "", "edge1", ""],
        ["renew", "revoked", "", "edge1", ""],
    ];
    assert_eq!(seen, expected.map(|line| line.map(str::to_owned)));
    assert!(
        lines
            .iter()
            .all(|line| field(line, "remote").starts_with("127.0.0.1:"))
    );
    assert!(!text.contains(&"a".repeat(32)));
}
