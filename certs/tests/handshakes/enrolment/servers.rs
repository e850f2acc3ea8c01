//! Servers that are another than the one meant, not there or silent; and a clock that fits none.

use std::net::Ipv4Addr;

use certs::test_ca::TestCa;
use certs::{Clock, EnrollError, JoinToken};
use tokio::net::TcpListener;

use super::{Agent, Server};

#[tokio::test]
async fn another_authority_than_the_pinned_one_sees_no_token() {
    let (server, other) = (Server::start().await, TestCa::new());
    let agent = Agent::new("edge1");
    let token = server.token(1, "*");
    let refused = agent
        .enroll_pinned(server.address, other.pin(), &token)
        .await;
    assert!(
        matches!(refused, Err(EnrollError::PinMismatch)),
        "{refused:?}"
    );
    assert_eq!(server.store.list_tokens().unwrap()[0].uses_left, 1);
}

#[tokio::test]
async fn an_agent_whose_clock_is_far_off_is_told_so() {
    let server = Server::start().await;
    let mut agent = Agent::new("edge1");
    agent.clock = Clock::fixed(certs::test_ca::in_seconds(400 * 86_400));
    let refused = agent.enroll(&server, &server.token(1, "*")).await;
    assert!(matches!(refused, Err(EnrollError::Clock)), "{refused:?}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_unreachable() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let token = JoinToken::generate().unwrap();
    let refused = Agent::new("edge1")
        .enroll_pinned(address, TestCa::new().pin(), &token)
        .await;
    assert!(
        matches!(refused, Err(EnrollError::Unreachable { .. })),
        "{refused:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_server_that_says_nothing_is_given_up() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let token = JoinToken::generate().unwrap();
    let refused = Agent::new("edge1")
        .enroll_pinned(address, TestCa::new().pin(), &token)
        .await;
    assert!(
        matches!(refused, Err(EnrollError::Timeout { .. })),
        "{refused:?}"
    );
}
