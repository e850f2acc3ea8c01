//! The authority in a Secret: made once whoever comes first, followed by all, never lost.

use std::path::{Path, PathBuf};

use certs::{Ca, CaDir, Clock, IssuerError, Pin, TrustDomain};
use daemon::{Exit, Listen};
use proxy_server::App;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::api::Api;
use crate::stack::{Stack, bare_session, configuration, eventually, within};

pub(crate) const SECRET: &str = "corvid/corvid-ca";

fn authority_of(api: &Api, dir: &Path) -> PathBuf {
    let kubeconfig = api.kubeconfig(dir);
    let more = format!(
        "kubernetes: {{kubeconfig: {}, authority: {{refresh: 100ms}}}}",
        kubeconfig.display()
    );
    configuration(dir, &more)
}

/// A server whose authority is kept there.
pub(crate) async fn start(api: &Api) -> Stack {
    again(api, tempfile::tempdir().unwrap()).await
}

pub(crate) async fn again(api: &Api, dir: tempfile::TempDir) -> Stack {
    let file = authority_of(api, dir.path());
    Stack::launch(dir, &file).await
}

/// What is kept is that, whoever has put it there.
pub(crate) fn put(api: &Api, ca: &Ca) {
    use base64::Engine as _;
    use secrecy::ExposeSecret as _;
    let mut secret = api.object("secrets", SECRET).unwrap();
    for (name, text) in ca.to_files().unwrap() {
        let text = base64::engine::general_purpose::STANDARD.encode(text.expose_secret());
        secret["data"][name] = Value::String(text);
    }
    api.set("secrets", SECRET, secret);
}

pub(crate) fn kept(api: &Api) -> Ca {
    use base64::Engine as _;
    let secret = api.object("secrets", SECRET).unwrap();
    let read = |name: &str| {
        let text = secret["data"][name].as_str()?;
        Some(
            base64::engine::general_purpose::STANDARD
                .decode(text)
                .unwrap(),
        )
    };
    Ca::from_files(&TrustDomain::default(), read).unwrap()
}

fn copy(dir: &Path) -> Option<Ca> {
    let dir = CaDir::new(dir.join("state/ca"));
    dir.load(&TrustDomain::default()).unwrap()
}

pub(crate) fn pin(stack: &Stack) -> Pin {
    copy(stack.dir.path()).unwrap().pin()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_start_at_once_make_one_authority_and_know_each_others_agents() {
    let api = Api::start().await;
    let mut starting = JoinSet::new();
    let servers = (0..4).map(|_| {
        let dir = tempfile::tempdir().unwrap();
        (authority_of(&api, dir.path()), dir)
    });
    for (file, dir) in servers.collect::<Vec<_>>() {
        starting.spawn(async move { Stack::launch(dir, &file).await });
    }
    let stacks = within(starting.join_all()).await;
    // One that is up may have written the roots already.
    let mut writes = api.writes();
    writes.retain(|write| write.what.ends_with(" secrets"));
    let made = writes.iter().filter(|write| write.code == 200).count();
    assert_eq!(made, 1, "create-only: one has won");
    assert!(writes.iter().all(|write| write.what == "POST secrets"));
    let ca = kept(&api);
    assert!(stacks.iter().all(|stack| pin(stack) == ca.pin()));
    // An agent of one is believed by the others, and believes them.
    let own = stacks[0].enrolled("edge1").await;
    for stack in &stacks {
        bare_session(stack, &own).await.unwrap();
    }
    // The copy of its key is for nobody else.
    let key = std::fs::metadata(stacks[0].state().join("ca/ca.key")).unwrap();
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&key.permissions()) & 0o777,
        0o600
    );
    for stack in stacks {
        stack.stop().await;
    }
}

/// A configuration whose endpoints are known before the server is up.
fn waiting(api: &Api, dir: &Path) -> (PathBuf, Listen) {
    let file = authority_of(api, dir);
    let socket = dir.join("observe.sock");
    let text = std::fs::read_to_string(&file).unwrap();
    let text = text.replace(
        "observe: {listen: '127.0.0.1:0'}",
        &format!("observe: {{listen: 'unix:{}'}}", socket.display()),
    );
    std::fs::write(&file, text).unwrap();
    (file, Listen::Unix(socket))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_copy_a_server_waits_lives_and_is_not_ready() {
    let mut api = Api::start().await;
    api.down().await;
    let dir = tempfile::tempdir().unwrap();
    let (file, observe) = waiting(&api, dir.path());
    let mut launching = JoinSet::new();
    launching.spawn(async move { Stack::launch(dir, &file).await });
    let is_up = async || {
        daemon::admin::client::get(&observe, "/livez").await.is_ok()
            && daemon::admin::client::get(&observe, "/readyz")
                .await
                .is_err()
    };
    within(async {
        while !is_up().await {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
    // Neither errors nor nonsense nor what is no authority makes it go on.
    api.up().await;
    for code in [403, 500] {
        api.refuse_nothing();
        api.refuse("secrets", code);
        let asked = api.asked("GET secrets");
        eventually("it has asked", || api.asked("GET secrets") > asked + 1).await;
        assert!(
            is_up().await && launching.try_join_next().is_none(),
            "{code}"
        );
    }
    api.set(
        "secrets",
        SECRET,
        json!({"kind": "Secret", "metadata": {"name": "corvid-ca"}, "data": {"ca.key": "bm9uZQ=="}}),
    );
    api.refuse_nothing();
    let asked = api.asked("GET secrets");
    eventually("it has read that", || api.asked("GET secrets") > asked + 1).await;
    assert!(is_up().await && launching.try_join_next().is_none());
    assert_eq!(
        api.object("secrets", SECRET).unwrap()["data"]["ca.key"],
        "bm9uZQ==",
        "what is there is never written over"
    );
    api.remove("secrets", SECRET);
    let stack = within(launching.join_next()).await.unwrap().unwrap();
    assert_eq!(pin(&stack), kept(&api).pin());
    within(async {
        while daemon::admin::client::get(&observe, "/readyz")
            .await
            .is_err()
        {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_waits_can_be_stopped() {
    let mut api = Api::start().await;
    api.down().await;
    let dir = tempfile::tempdir().unwrap();
    let (file, observe) = waiting(&api, dir.path());
    let (config, environment, _trigger) = crate::stack::read(&file);
    let stop = CancellationToken::new();
    let told = stop.clone();
    let mut starting = JoinSet::new();
    starting.spawn(async move { App::start(config, environment, &told).await });
    within(async {
        while daemon::admin::client::get(&observe, "/livez")
            .await
            .is_err()
        {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    })
    .await;
    stop.cancel();
    let started = within(starting.join_next()).await.unwrap();
    assert!(started.unwrap().unwrap().is_none());
    assert!(copy(dir.path()).is_none(), "nothing was made up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_copy_a_server_starts_while_the_apiserver_is_away() {
    let mut api = Api::start().await;
    let stack = start(&api).await;
    let own = stack.enrolled("edge1").await;
    let before = pin(&stack);
    let dir = stack.stop().await;
    api.down().await;
    let stack = again(&api, dir).await;
    assert_eq!(pin(&stack), before);
    bare_session(&stack, &own).await.unwrap();
    // It is away for long, and comes back without the Secret: what is at work is kept there again.
    api.remove("secrets", SECRET);
    api.up().await;
    eventually("the Secret is made again", || {
        api.object("secrets", SECRET).is_some()
    })
    .await;
    assert_eq!(kept(&api).pin(), before);
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_authority_of_a_single_server_becomes_that_of_the_cluster() {
    let api = Api::start().await;
    let alone = Stack::start("");
    let (before, own) = (pin(&alone), alone.enrolled("edge1").await);
    let dir = alone.stop().await;
    let stack = again(&api, dir).await;
    assert_eq!((pin(&stack), kept(&api).pin()), (before, before));
    bare_session(&stack, &own).await.unwrap();
    // What its directory has is a copy from now on.
    let dir = CaDir::new(stack.state().join("ca"));
    let changed = dir.update(&TrustDomain::default(), |ca| Ok(ca.clone()));
    assert!(matches!(changed, Err(IssuerError::Copy { .. })));
    // A second one with an authority of its own adopts this one, and loses nothing.
    let other = Stack::start("");
    let others = pin(&other);
    let dir = other.stop().await;
    let second = again(&api, dir).await;
    assert_eq!(pin(&second), before);
    bare_session(&second, &own).await.unwrap();
    let aside = std::fs::read_dir(second.state())
        .unwrap()
        .find_map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            name.starts_with("ca.replaced-").then_some(path)
        });
    let aside = CaDir::new(aside.unwrap());
    let aside = aside.load(&TrustDomain::default()).unwrap().unwrap();
    assert_eq!(aside.pin(), others);
    stack.stop().await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_authority_is_not_taken_over_while_running() {
    let api = Api::start().await;
    let stack = start(&api).await;
    let own = stack.enrolled("edge1").await;
    let ours = api.object("secrets", SECRET).unwrap();
    let other = start(&Api::start().await).await;
    let foreign = copy(other.dir.path()).unwrap();
    put(&api, &foreign);
    for wrong in [
        api.object("secrets", SECRET).unwrap(),
        json!({"kind": "Secret", "metadata": {}, "data": {}}),
    ] {
        api.set("secrets", SECRET, wrong);
        let before = stack.metric("corvid_authority_failures_total").await;
        within(async {
            while stack.metric("corvid_authority_failures_total").await < before + 2.0 {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        })
        .await;
        bare_session(&stack, &own).await.unwrap();
        stack.enrolled("edge2").await;
    }
    let writes = api.writes();
    let of_secrets = writes.iter().filter(|write| write.what.contains("secrets"));
    assert_eq!(of_secrets.count(), 1, "nothing was written over it");
    api.set("secrets", SECRET, ours);
    stack.stop().await;
    other.stop().await;
}

#[test]
fn a_configuration_that_makes_no_sense_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let more = "kubernetes: {inCluster: true, authority: {secret: 'No Name', refresh: 1ms}, enrol: {namespace: '', serviceAccount: A, audience: ''}}";
    let file = configuration(dir.path(), more);
    let overrides = proxy_server::config::Overrides::default();
    let error = proxy_server::config::load(&file, &overrides).unwrap_err();
    assert_eq!(error.exit(), Exit::Usage);
    for key in [
        "authority.secret",
        "authority.refresh",
        "enrol.namespace",
        "enrol.serviceAccount",
        "enrol.audience",
    ] {
        let key = format!("kubernetes.{key}");
        assert!(error.to_string().contains(&key), "{key}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_copy_is_no_reason_not_to_start() {
    let api = Api::start().await;
    let stack = start(&api).await;
    let own = pin(&stack);
    let dir = stack.stop().await;
    let key = dir.path().join("state/ca/ca.key");
    std::fs::write(&key, "nonsense").unwrap();
    let stack = again(&api, dir).await;
    assert_eq!(pin(&stack), own);
    stack.stop().await;
}

/// It may be the only one that there is, and repaired by hand.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_authority_of_the_directorys_own_is_never_replaced() {
    let api = Api::start().await;
    let dir = tempfile::tempdir().unwrap();
    CaDir::new(dir.path().join("state/ca"))
        .load_or_create(&TrustDomain::default(), Clock::system().now())
        .unwrap();
    let key = dir.path().join("state/ca/ca.key");
    std::fs::write(&key, "nonsense").unwrap();
    let file = authority_of(&api, dir.path());
    let (config, environment, _trigger) = crate::stack::read(&file);
    let failed = App::start(config, environment, &CancellationToken::new()).await;
    let failed = format!("{:#}", failed.unwrap_err());
    assert!(failed.contains("open the authority in"), "{failed}");
    assert_eq!(std::fs::read_to_string(&key).unwrap(), "nonsense");
    assert!(api.object("secrets", SECRET).is_none());
}
