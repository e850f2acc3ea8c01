//! The authority is rotated while agents are connected: nobody loses a session, and whoever has heard nothing of it comes
//! back all the same.

use std::path::Path;
use std::time::Duration;

use certs::{AgentFiles, Ca, CaDir, LiveBundle, LiveCredential, Own, TrustDomain};
use proxy_server::cli::StateArgs;
use proxy_server::commands;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::{JoinSet, spawn_blocking};

use crate::api::Api;
use crate::authority::{again, kept, put, start};
use crate::stack::{Stack, allow, bare_session, echo, eventually, tls, within};
use crate::standing::come;

pub(crate) const DAY: Duration = Duration::from_secs(86_400);

fn args(dir: &Path) -> StateArgs {
    StateArgs {
        config: dir.join("proxy-server.yaml"),
        state_dir: None,
        trust_domain: None,
    }
}

pub(crate) async fn command(
    stack: &Stack,
    run: impl FnOnce(&StateArgs) -> anyhow::Result<String> + Send + 'static,
) -> anyhow::Result<String> {
    let args = args(stack.dir.path());
    spawn_blocking(move || run(&args)).await.unwrap()
}

fn copy(stack: &Stack) -> Ca {
    let dir = CaDir::new(stack.state().join("ca"));
    dir.load(&TrustDomain::default()).unwrap().unwrap()
}

/// What somebody has who heard of nothing since.
fn as_of_now(own: &Own) -> Own {
    Own {
        credential: LiveCredential::new((*own.credential.load()).clone()),
        bundle: LiveBundle::new((*own.bundle.load()).clone()),
        clock: own.clock.clone(),
        trust_domain: own.trust_domain.clone(),
    }
}

/// Waits until each trusts so many roots, and has a copy of that.
pub(crate) async fn until_roots(stacks: &[&Stack], count: u16) {
    let is_there = async |stack: &Stack| {
        let copied = copy(stack).bundle().unwrap().roots().len();
        let trusted = stack.metric("corvid_authority_roots").await;
        copied == usize::from(count) && (trusted - f64::from(count)).abs() < 0.5
    };
    for stack in stacks {
        within(async {
            while !is_there(stack).await {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }
}

async fn renewed(stack: &Stack, own: &Own) {
    let dir = tempfile::tempdir().unwrap();
    let files = AgentFiles::new(dir.path());
    let enrolled = certs::renew(stack.backend, own, &files).await.unwrap();
    own.bundle.replace(enrolled.bundle);
    own.credential.replace(enrolled.credential);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_reaches_all_servers_and_costs_nobody_a_session() {
    let api = Api::start().await;
    let mut one = start(&api).await;
    let two = start(&api).await;
    let mut edge = JoinSet::new();
    let port = echo(&mut edge).await;
    one.agent("edge1", &allow(&[port]));
    one.sessions("edge1", 1).await;
    let mut stream = one.connect(&format!("edge1:{port}")).await.unwrap();
    let kube = one.client("kube-apiserver");
    // Two who hear of nothing: one stays connected, one comes back now and then.
    let own = one.enrolled("quiet").await;
    let quiet = as_of_now(&own);
    let kept = come(&one, &quiet).await.unwrap();
    let before = copy(&one).pin();

    let said = command(&one, |args| commands::ca_rotate(args, Some(DAY))).await;
    let said = said.unwrap();
    assert!(said.contains(&before.to_string()), "{said}");
    until_roots(&[&one, &two], 2).await;
    let rotated = copy(&one);
    assert!(rotated.pin() != before && rotated.follows(before));
    assert_eq!(copy(&two), rotated);
    let again = command(&one, |args| commands::ca_rotate(args, None)).await;
    let refused = format!("{:#}", again.unwrap_err());
    assert!(refused.contains("a rotation is under way"), "{refused}");
    let shown = command(&two, |args| commands::ca_show(args, true))
        .await
        .unwrap();
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["pin"], rotated.pin().to_string());
    assert_eq!(shown["trusted"].as_array().unwrap().len(), 2);

    // Who knows only the old root: still there, comes back to each server, asks through a frontend, renews.
    for stack in [&one, &two] {
        bare_session(stack, &quiet).await.unwrap();
        tls(stack.tcp(1), &kube).await.unwrap();
    }
    // Who has renewed brings a chain that a server would take which has heard of nothing.
    renewed(&two, &own).await;
    assert_eq!(own.bundle.load().pins(), [rotated.pin(), before]);
    assert_eq!(own.credential.load().chain().len(), 2);
    bare_session(&one, &own).await.unwrap();

    // A server starts again in the middle, with what it has, while the others go on.
    let dir = two.stop().await;
    let two = self::again(&api, dir).await;
    assert_eq!(copy(&two), rotated);
    bare_session(&two, &quiet).await.unwrap();
    bare_session(&two, &own).await.unwrap();

    // The old root leaves: first asked for too soon, then for good.
    let soon = command(&one, |args| commands::ca_retire(args, false)).await;
    assert!(soon.unwrap_err().to_string().contains("--force"));
    command(&one, |args| commands::ca_retire(args, true))
        .await
        .unwrap();
    until_roots(&[&one, &two], 1).await;
    bare_session(&one, &own).await.unwrap();
    bare_session(&two, &own).await.unwrap();
    assert!(
        bare_session(&one, &quiet).await.is_err(),
        "its root has left"
    );

    // No session has ended for any of this, and no stream.
    assert!(kept.is_up());
    assert_eq!(one.registry.of(&"quiet".parse().unwrap()).len(), 1);
    stream.write_all(b"still here").await.unwrap();
    let mut answer = [0; 10];
    within(stream.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"still here");
    assert_eq!(one.metric("corvid_sessions_ended_total").await, 0.0);
    drop(stream);
    kept.leave();
    one.stop().await;
    two.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_old_root_leaves_by_itself_when_its_time_is_over() {
    let api = Api::start().await;
    let (one, two) = (start(&api).await, start(&api).await);
    let own = one.enrolled("edge1").await;
    let first = copy(&one).pin();
    let keep = Some(Duration::from_secs(3));
    command(&one, move |args| commands::ca_rotate(args, keep))
        .await
        .unwrap();
    until_roots(&[&one, &two], 2).await;
    renewed(&one, &own).await;
    until_roots(&[&one, &two], 1).await;
    assert!(!copy(&two).bundle().unwrap().pins().contains(&first));
    bare_session(&two, &own).await.unwrap();
    // A client that was certified holds the next one back.
    let out = one.dir.path().join("kube");
    let said = command(&one, move |args| {
        commands::cert_issue(args, &"kube-apiserver".parse().unwrap(), 2, &out)
    })
    .await
    .unwrap();
    assert!(said.contains("kube-apiserver.crt"), "{said}");
    let second = copy(&one).pin();
    command(&one, |args| commands::ca_rotate(args, Some(Duration::ZERO)))
        .await
        .unwrap();
    until_roots(&[&one, &two], 2).await;
    let left = copy(&one).retires_at().unwrap().as_secs() - certs::Clock::system().now().as_secs();
    assert!((2 * 86_400 - 60..=2 * 86_400).contains(&left), "{left}");
    assert!(copy(&one).bundle().unwrap().pins().contains(&second));
    one.stop().await;
    two.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hears_of_a_rotation_when_all_is_over_takes_it_over() {
    let api = Api::start().await;
    let apart = api.another_door().await;
    let (one, two) = (start(&api).await, start(&apart).await);
    let first = copy(&one).pin();
    apart.refuse("secrets", 500);
    // As when the old key is in wrong hands.
    command(&one, |args| commands::ca_rotate(args, None))
        .await
        .unwrap();
    command(&one, |args| commands::ca_retire(args, true))
        .await
        .unwrap();
    let rotated = kept(&api);
    assert!(rotated.pin() != first && rotated.bundle().unwrap().pins() == [rotated.pin()]);
    assert_eq!(copy(&two).pin(), first);
    apart.refuse_nothing();
    for stack in [&one, &two] {
        eventually("it works with the new one", || copy(stack) == rotated).await;
    }
    let own = one.enrolled("edge1").await;
    bare_session(&two, &own).await.unwrap();
    one.stop().await;
    two.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retirement_is_of_what_was_looked_at_and_of_nothing_newer() {
    let api = Api::start().await;
    let one = start(&api).await;
    command(&one, |args| commands::ca_rotate(args, None))
        .await
        .unwrap();
    until_roots(&[&one], 2).await;
    let rotated = copy(&one);
    api.hold("PATCH secrets");
    let (args, mut retiring) = (args(one.dir.path()), JoinSet::new());
    retiring.spawn_blocking(move || commands::ca_retire(&args, true));
    eventually("it is about to be written", || api.waiting() == 1).await;
    let next = rotated.retire().rotate(DAY, certs::Clock::system().now());
    let next = next.unwrap();
    put(&api, &next);
    api.release();
    let refused = within(retiring.join_next()).await.unwrap().unwrap();
    let refused = format!("{:#}", refused.unwrap_err());
    assert!(refused.contains("changed at the same moment"), "{refused}");
    assert_eq!(kept(&api), next, "its old root is trusted on");
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_server_takes_over_what_the_command_writes_into_its_directory() {
    let stack = Stack::start("");
    let own = stack.enrolled("edge1").await;
    let quiet = as_of_now(&own);
    let kept = come(&stack, &quiet).await.unwrap();
    let before = copy(&stack).pin();
    command(&stack, |args| commands::ca_rotate(args, None))
        .await
        .unwrap();
    until_roots(&[&stack], 2).await;
    assert!(copy(&stack).pin() != before);
    bare_session(&stack, &quiet).await.unwrap();
    renewed(&stack, &own).await;
    command(&stack, |args| commands::ca_retire(args, true))
        .await
        .unwrap();
    until_roots(&[&stack], 1).await;
    bare_session(&stack, &own).await.unwrap();
    assert!(bare_session(&stack, &quiet).await.is_err());
    assert!(kept.is_up());

    // Another authority in its place is not taken over while it runs.
    let foreign = Ca::create(&TrustDomain::default(), certs::Clock::system().now()).unwrap();
    CaDir::new(stack.state().join("ca")).save(&foreign).unwrap();
    within(async {
        while stack.metric("corvid_authority_failures_total").await < 1.0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    renewed(&stack, &own).await;
    assert!(kept.is_up());
    kept.leave();
    stack.stop().await;
}
