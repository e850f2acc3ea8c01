//! The commands beside `run`: each works on the state directory, with or without a server that runs on it, and returns
//! what is to be printed.

mod ca;

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use bytes::Bytes;
pub use ca::{ca_retire, ca_rotate, ca_show, cert_issue};
use certs::{CaDir, Clock, Issuer, Name, NewToken, Store, TrustDomain};
use daemon::admin::Probe;
use daemon::{Exit, Listen};
use proto::Destination;
use secrecy::ExposeSecret as _;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::cli::StateArgs;
use crate::config::{self, Config, Overrides};
use crate::frontend::credentials;
use crate::status::{self, ClusterStatus, Explained, NodeStatus, PeerStatus, SessionStatus};

/// Prints to standard output.
pub fn say(text: &str) -> Exit {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    // A reader that has gone (`| head`) has what it wanted.
    out.write_all(text.as_bytes())
        .and_then(|()| {
            if text.ends_with('\n') {
                Ok(())
            } else {
                out.write_all(b"\n")
            }
        })
        .ok();
    Exit::Drained
}

/// Prints an error to standard error.
pub fn fail(error: &(dyn std::error::Error + 'static), exit: Exit) -> Exit {
    complain(&daemon::chain(error).to_string(), exit)
}

fn complain(text: &str, exit: Exit) -> Exit {
    use std::io::Write as _;
    writeln!(std::io::stderr().lock(), "proxy-server: {text}").ok(); // nobody reads it: nothing to do
    exit
}

/// Prints a command's outcome.
pub fn finish(outcome: anyhow::Result<String>) -> Exit {
    match outcome {
        Ok(text) => say(&text),
        Err(error) => complain(&format!("{error:#}"), Exit::Failed),
    }
}

/// The opened state directory.
struct State {
    issuer: Issuer,
    store: Store,
    clock: Clock,
    dir: std::path::PathBuf,
}

impl State {
    fn open(args: &StateArgs) -> anyhow::Result<Self> {
        let (dir, trust_domain) = match &args.state_dir {
            Some(dir) => (dir.clone(), args.trust_domain.clone().unwrap_or_default()),
            None => {
                let config = config::load(&args.config, &Overrides::default())
                    .context("find the state directory (or give --state-dir)")?;
                let of_cluster = config.kubernetes.and_then(|k| k.authority).is_some();
                let dir = CaDir::new(config.state_dir.join("ca"));
                // Not made here: another one would be in the way of the cluster's.
                anyhow::ensure!(
                    !of_cluster || dir.load(&config.trust_domain)?.is_some(),
                    "there is no copy of the authority in {} yet; the server that runs here makes it",
                    dir.path().display()
                );
                (config.state_dir, config.trust_domain)
            }
        };
        Self::at(dir, &trust_domain)
    }

    fn at(dir: std::path::PathBuf, trust_domain: &TrustDomain) -> anyhow::Result<Self> {
        let clock = Clock::system();
        let issuer = Issuer::load_or_create(&dir.join("ca"), trust_domain, clock.now())
            .with_context(|| format!("open the authority in {}", dir.display()))?;
        let store = Store::open(&dir)
            .with_context(|| format!("open the token store in {}", dir.display()))?;
        Ok(Self {
            issuer,
            store,
            clock,
            dir,
        })
    }
}

fn time(seconds: u64) -> String {
    i64::try_from(seconds)
        .ok()
        .and_then(|s| jiff::Timestamp::from_second(s).ok())
        .map(|t| t.to_string())
        .unwrap_or_default()
}

/// `token create`
///
/// # Errors
/// The state directory can't be used.
pub fn token_create(args: &StateArgs, new: &NewToken) -> anyhow::Result<String> {
    let state = State::open(args)?;
    let token = state.store.create_token(new, state.clock.now())?;
    let secret = token.expose();
    let snippet = format!(
        "\n# for edge-agent.yaml; the token is not shown again\njoin:\n  token: {}\n  caPin: {}\n",
        secret.expose_secret(),
        state.issuer.pin()
    );
    use std::io::Write as _;
    // The token alone goes to standard output, so that a script can take it.
    std::io::stderr().lock().write_all(snippet.as_bytes()).ok(); // a closed stderr is the caller's choice
    Ok(secret.expose_secret().to_owned())
}

/// `token list`
///
/// # Errors
/// The state directory can't be used.
pub fn token_list(args: &StateArgs, json: bool) -> anyhow::Result<String> {
    let tokens = State::open(args)?.store.list_tokens()?;
    if json {
        return Ok(serde_json::to_string_pretty(&tokens)?);
    }
    let mut out = format!("{:<10}{:<24}{:<10}{}\n", "ID", "EXPIRES", "USES", "AGENTS");
    for token in tokens {
        let uses = format!("{}/{}", token.uses - token.uses_left, token.uses);
        writeln!(
            out,
            "{:<10}{:<24}{uses:<10}{}",
            token.id,
            time(token.expires),
            token.agents
        )?;
    }
    Ok(out)
}

/// `token revoke`
///
/// # Errors
/// There is no such token, or the state directory can't be used.
pub fn token_revoke(args: &StateArgs, id: &str) -> anyhow::Result<String> {
    anyhow::ensure!(
        State::open(args)?.store.revoke_token(id)?,
        "there is no token {id}"
    );
    Ok(format!("token {id} is revoked"))
}

/// `agent revoke`
///
/// # Errors
/// The state directory can't be used.
pub fn agent_revoke(args: &StateArgs, name: &Name) -> anyhow::Result<String> {
    let state = State::open(args)?;
    let known = state.store.revoke_agent(name, state.clock.now())?;
    let hint = if known {
        ""
    } else {
        " (no agent of that name has enrolled here)"
    };
    Ok(format!("agent {name} is revoked{hint}"))
}

/// `agent allow`
///
/// # Errors
/// The agent is not revoked, or the state directory can't be used.
pub fn agent_allow(args: &StateArgs, name: &Name) -> anyhow::Result<String> {
    anyhow::ensure!(
        State::open(args)?.store.allow_agent(name)?,
        "agent {name} is not revoked"
    );
    Ok(format!("agent {name} is allowed again"))
}

#[derive(Debug, Serialize)]
struct Shown {
    pin: String,
    trust_domain: String,
    ca_not_after: String,
    roots: usize,
    server: Option<ShownLeaf>,
}

#[derive(Debug, Serialize)]
struct ShownLeaf {
    identity: String,
    not_after: String,
    fingerprint: String,
}

/// `cert show`
///
/// # Errors
/// The state directory can't be used.
pub fn cert_show(args: &StateArgs, json: bool) -> anyhow::Result<String> {
    let state = State::open(args)?;
    let server = shown_leaf(&state.dir.join("server.crt"));
    let shown = Shown {
        pin: state.issuer.pin().to_string(),
        trust_domain: state.issuer.trust_domain().to_string(),
        ca_not_after: time(state.issuer.not_after().as_secs()),
        roots: state.issuer.bundle().roots().len(),
        server,
    };
    if json {
        return Ok(serde_json::to_string_pretty(&shown)?);
    }
    let mut out = String::new();
    writeln!(out, "caPin:        {}", shown.pin)?;
    writeln!(out, "trust domain: {}", shown.trust_domain)?;
    writeln!(
        out,
        "CA expires:   {} ({} trusted)",
        shown.ca_not_after, shown.roots
    )?;
    match shown.server {
        Some(leaf) => {
            writeln!(out, "server:       {}", leaf.identity)?;
            writeln!(out, "  expires:    {}", leaf.not_after)?;
            writeln!(out, "  sha256:     {}", leaf.fingerprint)?;
        }
        None => writeln!(
            out,
            "server:       none yet; it is made when the server starts"
        )?,
    }
    Ok(out)
}

fn shown_leaf(file: &Path) -> Option<ShownLeaf> {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject;
    let chain: Vec<_> = CertificateDer::pem_file_iter(file)
        .ok()?
        .collect::<Result<_, _>>()
        .ok()?;
    let leaf = certs::peer(&chain).ok()?;
    Some(ShownLeaf {
        identity: leaf.identity.to_string(),
        not_after: time(leaf.not_after.as_secs()),
        fingerprint: leaf.fingerprint,
    })
}

/// `credential hash`: the secret comes by standard input, so that it is in no list of processes.
///
/// # Errors
/// Nothing can be read, or it makes no credential.
pub fn credential_hash(name: &str) -> anyhow::Result<String> {
    // A line that is longer can be sent in no header.
    const MOST: u64 = 8 << 10;
    use std::io::Read as _;
    let mut secret = String::new();
    std::io::stdin()
        .lock()
        .take(MOST)
        .read_to_string(&mut secret)
        .context("read the secret from standard input")?;
    Ok(credentials::line(
        name,
        secret.trim_end_matches(['\r', '\n']),
    )?)
}

/// `check-config` of a file that can be used: what in it is of no use.
#[must_use]
pub fn checked(file: &Path, config: &Config) -> String {
    let useless = config.useless_rules();
    let warnings = useless.iter().map(|line| format!("warning: {line}\n"));
    let mut said: String = warnings.collect();
    said.push_str(&format!("{}: ok", file.display()));
    said
}

/// `status`
///
/// # Errors
/// No server answers on the socket.
pub fn status(socket: &Path, json: bool) -> anyhow::Result<String> {
    let sessions: Vec<SessionStatus> = ask(socket, "/sessions")?;
    if json {
        return Ok(serde_json::to_string_pretty(&sessions)?);
    }
    let cluster: ClusterStatus = ask(socket, "/cluster")?;
    let peers: Vec<PeerStatus> = ask(socket, "/peers")?;
    let nodes: Vec<NodeStatus> = ask(socket, "/nodes")?;
    let mut shown = cluster.lines() + &status::table(&sessions);
    shown.push_str(&paths(&nodes));
    if !peers.is_empty() {
        shown.push('\n');
        shown.push_str(&status::peer_table(&peers));
    }
    Ok(shown)
}

/// `peers`
///
/// # Errors
/// No server answers on the socket.
pub fn peers(socket: &Path, json: bool) -> anyhow::Result<String> {
    let peers: Vec<PeerStatus> = ask(socket, "/peers")?;
    if json {
        return Ok(serde_json::to_string_pretty(&peers)?);
    }
    if peers.is_empty() {
        return Ok("no other proxy-server\n".to_owned());
    }
    Ok(status::peer_table(&peers))
}

/// `probe`
///
/// # Errors
/// The answer is no, or no server answers on the socket.
pub fn probe(socket: &Path, what: Probe) -> anyhow::Result<String> {
    let answer = get(socket, what.path())?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// `nodes`
///
/// # Errors
/// No server answers on the socket.
pub fn nodes(socket: &Path, json: bool) -> anyhow::Result<String> {
    let nodes: Vec<NodeStatus> = ask(socket, "/nodes")?;
    if json {
        return Ok(serde_json::to_string_pretty(&nodes)?);
    }
    Ok(status::node_table(&nodes) + &paths(&nodes))
}

/// How nodes are reached, behind an empty line; nothing where they have the tunnel alone.
fn paths(nodes: &[NodeStatus]) -> String {
    let table = status::path_table(nodes).map(|table| format!("\n{table}"));
    table.unwrap_or_default()
}

/// `explain`
///
/// # Errors
/// No server answers on the socket.
pub fn explain(socket: &Path, to: &Destination, json: bool) -> anyhow::Result<String> {
    let told: Explained = ask(socket, &format!("/explain?to={to}"))?;
    if json {
        return Ok(serde_json::to_string_pretty(&told)?);
    }
    Ok(status::explained(&told))
}

fn ask<T: DeserializeOwned>(socket: &Path, path: &str) -> anyhow::Result<T> {
    serde_json::from_slice(&get(socket, path)?).context("read the answer")
}

fn get(socket: &Path, path: &str) -> anyhow::Result<Bytes> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let listen = Listen::Unix(socket.to_owned());
    runtime
        .block_on(daemon::admin::client::get(&listen, path))
        .with_context(|| format!("ask the server at {}", socket.display()))
}
