//! Who asks too often is refused for a while; strangers cost no agent its renewal.

use std::num::NonZeroU32;

use certs::test_ca::TestCa;
use certs::{EnrollError, EnrollLimits};

use super::{Agent, Server};

#[tokio::test]
async fn who_asks_too_often_is_told_when_to_come_again() {
    let one = NonZeroU32::new(1).unwrap();
    let limits = EnrollLimits {
        per_address_per_minute: one,
        per_second: one,
    };
    let server = Server::with(TestCa::new(), limits).await;
    let token = server.token(2, "*");
    Agent::new("edge1").enroll(&server, &token).await.unwrap();
    let refused = Agent::new("edge2")
        .enroll(&server, &token)
        .await
        .unwrap_err();
    let EnrollError::RateLimited { after } = refused else {
        panic!("{refused:?}")
    };
    assert!((1..=60).contains(&after.as_secs()), "{after:?}");
    assert!(!refused.is_final());
}

#[tokio::test]
async fn strangers_who_ask_too_often_keep_no_agent_from_its_renewal() {
    let one = NonZeroU32::new(1).unwrap();
    let limits = EnrollLimits {
        per_address_per_minute: one,
        per_second: NonZeroU32::new(20).unwrap(),
    };
    let server = Server::with(TestCa::new(), limits).await;
    let token = server.token(2, "*");
    let agent = Agent::new("edge1");
    let enrolled = agent.enroll(&server, &token).await.unwrap();
    // The address, which they share, is used up.
    let refused = Agent::new("edge2").enroll(&server, &token).await;
    assert!(matches!(refused, Err(EnrollError::RateLimited { .. })));
    let credential = agent
        .renew(&server, enrolled.credential)
        .await
        .unwrap()
        .credential;
    // An agent has its own limit, whatever its certificate is used for.
    let mut refused = None;
    for _ in 0..30 {
        refused = agent.renew(&server, credential.clone()).await.err();
        if refused.is_some() {
            break;
        }
    }
    assert!(
        matches!(refused, Some(EnrollError::RateLimited { .. })),
        "{refused:?}"
    );
}
