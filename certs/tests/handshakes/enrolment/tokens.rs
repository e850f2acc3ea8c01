//! A first certificate, by a join token: who gets one, who is refused and why, and what costs a use.

use std::os::unix::fs::PermissionsExt as _;

use certs::test_ca::now;
use certs::{AgentFiles, Csr, EnrollError, JoinToken, Key, NewToken};

use super::{Agent, HOUR, Server};

#[tokio::test]
async fn an_agent_with_a_token_gets_its_certificate_and_keeps_it() {
    let server = Server::start().await;
    let agent = Agent::new("edge1");
    let enrolled = agent
        .enroll(&server, &server.token(1, "edge*"))
        .await
        .unwrap();
    enrolled.stored.unwrap();
    assert_eq!(
        enrolled.credential.identity().to_string(),
        "spiffe://corvid/agent/edge1"
    );
    assert_eq!(enrolled.bundle.pins(), [server.ca.pin()]);
    assert!(enrolled.skew_seconds.abs() <= 1);
    let left = enrolled.credential.not_after().as_secs() - now().as_secs();
    assert!((86_000..=86_400).contains(&left), "{left}");

    let (credential, bundle) = agent.files.load().unwrap().unwrap();
    assert_eq!(credential.fingerprint(), enrolled.credential.fingerprint());
    assert_eq!(bundle.pins(), [server.ca.pin()]);
    let key = std::fs::metadata(agent.files.key()).unwrap();
    assert_eq!(key.permissions().mode() & 0o777, 0o600);
    let known = server.store.snapshot().unwrap().agents;
    assert_eq!(
        known[&agent.name].not_after,
        credential.not_after().as_secs()
    );
}

#[tokio::test]
async fn an_agent_that_was_never_enrolled_has_nothing_to_load() {
    assert!(Agent::new("edge1").files.load().unwrap().is_none());
}

#[tokio::test]
async fn a_token_that_was_used_is_refused() {
    let server = Server::start().await;
    let token = server.token(1, "*");
    Agent::new("edge1").enroll(&server, &token).await.unwrap();
    let again = Agent::new("edge2").enroll(&server, &token).await;
    assert!(matches!(again, Err(EnrollError::TokenUsedUp)), "{again:?}");
    let same_name = Agent::new("edge1").enroll(&server, &token).await;
    assert!(
        matches!(same_name, Err(EnrollError::TokenUsedUp)),
        "{same_name:?}"
    );
}

#[tokio::test]
async fn an_answer_that_was_lost_costs_no_second_use() {
    let server = Server::start().await;
    let agent = Agent::new("edge1");
    let token = server.token(1, "*");
    // The first attempt reached the server, its answer did not reach the agent: the key waits.
    std::fs::create_dir_all(agent.files.dir()).unwrap();
    let key = Key::load_or_create(&agent.files.dir().join("agent.key.next")).unwrap();
    let csr = Csr::check(&Csr::make(&key).unwrap()).unwrap();
    server
        .store
        .redeem(&token, &agent.name, &csr.key_digest(), now())
        .unwrap();
    agent.enroll(&server, &token).await.unwrap();
    assert!(agent.files.load().unwrap().is_some());
}

#[tokio::test]
async fn wrong_tokens_are_refused_each_with_its_reason() {
    let server = Server::start().await;
    let agent = Agent::new("edge1");
    let unknown = JoinToken::generate().unwrap();
    let known = server.token(1, "*");
    let wrong_secret = format!("{}.{}", known.id(), "a".repeat(32))
        .parse()
        .unwrap();
    for token in [unknown, wrong_secret] {
        let refused = agent.enroll(&server, &token).await.unwrap_err();
        assert!(
            matches!(refused, EnrollError::WrongToken) && refused.is_final(),
            "{refused:?}"
        );
    }
    let new = NewToken {
        ttl: HOUR,
        uses: 1,
        agents: "*".parse().unwrap(),
    };
    let expired = server
        .store
        .create_token(&new, certs::test_ca::in_seconds(-7200))
        .unwrap();
    let refused = agent.enroll(&server, &expired).await;
    assert!(
        matches!(refused, Err(EnrollError::TokenExpired)),
        "{refused:?}"
    );
    let other = server.token(1, "site-b-*");
    let refused = agent.enroll(&server, &other).await;
    assert!(
        matches!(refused, Err(EnrollError::NameNotAllowed)),
        "{refused:?}"
    );
    // None of all these was counted.
    assert!(
        server
            .store
            .list_tokens()
            .unwrap()
            .iter()
            .all(|token| token.uses_left == 1)
    );
    agent.enroll(&server, &known).await.unwrap();
}

#[tokio::test]
async fn a_revoked_agent_gets_no_certificate_even_with_a_good_token() {
    let server = Server::start().await;
    let agent = Agent::new("edge1");
    let token = server.token(1, "*");
    server.store.revoke_agent(&agent.name, now()).unwrap();
    let refused = agent.enroll(&server, &token).await;
    assert!(matches!(refused, Err(EnrollError::Revoked)), "{refused:?}");
    server.store.allow_agent(&agent.name).unwrap();
    agent.enroll(&server, &token).await.unwrap();
}

#[tokio::test]
async fn of_many_that_come_at_once_one_gets_the_token_of_one_use() {
    let server = Server::start().await;
    let token = server.token(1, "*");
    let agents: Vec<_> = (0..8)
        .map(|index| Agent::new(&format!("edge{index}")))
        .collect();
    let attempts = agents.iter().map(|agent| agent.enroll(&server, &token));
    let outcomes = futures_join(attempts).await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    let used_up = |outcome: &&Result<_, _>| matches!(outcome, Err(EnrollError::TokenUsedUp));
    assert_eq!(outcomes.iter().filter(used_up).count(), 7, "{outcomes:?}");
}

/// Polls all at once, on this task.
async fn futures_join<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut pending: Vec<_> = futures.map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|cx| {
        for (future, output) in &mut pending {
            if output.is_none()
                && let std::task::Poll::Ready(ready) = future.as_mut().poll(cx)
            {
                *output = Some(ready);
            }
        }
        if pending.iter().all(|(_, output)| output.is_some()) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    pending
        .into_iter()
        .map(|(_, output)| output.unwrap())
        .collect()
}

#[tokio::test]
async fn a_state_directory_that_cannot_be_made_costs_no_use() {
    let server = Server::start().await;
    let mut agent = Agent::new("edge1");
    let token = server.token(1, "*");
    agent.files = AgentFiles::new("/proc/none");
    let refused = agent.enroll(&server, &token).await;
    assert!(matches!(refused, Err(EnrollError::Store(_))), "{refused:?}");
    assert_eq!(server.store.list_tokens().unwrap()[0].uses_left, 1);
}
