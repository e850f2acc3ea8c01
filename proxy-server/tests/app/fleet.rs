//! Several proxy-servers of one authority in this process, and lines between them that can be cut.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proxy_server::peer::Standing;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;

use crate::stack::{Stack, allow, eventually, rewrite, text};

/// What a server of a fleet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Full,
    FrontendsOnly,
}

fn configuration(dir: &Path, name: &str, kind: Kind, more: &str) -> String {
    let (backend, listen) = match kind {
        Kind::Full => ("'127.0.0.1:0'", "listen: ['127.0.0.1:0'], "),
        Kind::FrontendsOnly => ("", ""),
    };
    let drain = if more.contains("drain:") {
        ""
    } else {
        "drain: {minDelay: 10ms, grace: 10s}\n"
    };
    format!(
        "name: {name}\nstateDir: {d}/state\nbackend: {{listen: [{backend}]}}\n\
         frontends: [{{type: httpConnect, listen: 'unix:{d}/connect.sock'}}]\n\
         peers: {{{listen}servers: [nobody.invalid:1]}}\n\
         observe: {{listen: '127.0.0.1:0'}}\nadmin: {{listen: '127.0.0.1:0', socket: {d}/admin.sock}}\n{drain}{more}\n",
        d = dir.display(),
    )
}

/// A server that has the authority of `first`, if there is one, and knows no other server yet.
pub(crate) fn server(first: Option<&Stack>, name: &str, kind: Kind, more: &str) -> Stack {
    let dir = tempfile::tempdir().unwrap();
    if let Some(first) = first {
        copy_authority(first, dir.path());
    }
    let file = dir.path().join("proxy-server.yaml");
    std::fs::write(&file, configuration(dir.path(), name, kind, more)).unwrap();
    Stack::start_with(dir, &file)
}

/// A server whose members are the endpoints of the Service `corvid/peers`.
pub(crate) fn server_of_service(first: Option<&Stack>, name: &str, kubeconfig: &Path) -> Stack {
    let dir = tempfile::tempdir().unwrap();
    if let Some(first) = first {
        copy_authority(first, dir.path());
    }
    let kubernetes = format!("kubernetes: {{kubeconfig: {}}}", kubeconfig.display());
    let config = configuration(dir.path(), name, Kind::Full, &kubernetes)
        .replace("servers: [nobody.invalid:1]", "service: corvid/peers");
    let file = dir.path().join("proxy-server.yaml");
    std::fs::write(&file, config).unwrap();
    Stack::start_with(dir, &file)
}

fn copy_authority(first: &Stack, dir: &Path) {
    let (from, to) = (first.state().join("ca"), dir.join("state/ca"));
    std::fs::create_dir_all(&to).unwrap();
    for file in ["ca.crt", "ca.key"] {
        std::fs::copy(from.join(file), to.join(file)).unwrap();
    }
}

/// Tells a server where the others are, and waits until it has heard of each.
pub(crate) async fn introduce(to: &Stack, others: &[SocketAddr]) {
    let file = to.dir.path().join("proxy-server.yaml");
    let before = text(&file);
    let from = before.find("servers: [").unwrap();
    let until = from + before[from..].find(']').unwrap();
    let list: Vec<_> = others.iter().map(|other| format!("'{other}'")).collect();
    let list = format!("servers: [{}", list.join(", "));
    rewrite(
        &file,
        &format!("{}{list}{}", &before[..from], &before[until..]),
    );
    to.reload.reload();
    let wanted: BTreeSet<_> = others.iter().copied().collect();
    eventually("every other server is known", || {
        let members = to.peers.members();
        let known: BTreeSet<_> = members.keys().copied().collect();
        let heard =
            |standing: &Standing| *standing == Standing::Up || *standing == Standing::Ourselves;
        known == wanted && members.values().all(heard)
    })
    .await;
}

/// `proxy-a`, `proxy-b`, …, each of which knows all others.
pub(crate) async fn fleet<const N: usize>(kinds: [(Kind, &str); N]) -> [Stack; N] {
    let mut servers: Vec<Stack> = Vec::new();
    for (letter, (kind, more)) in ('a'..).zip(kinds) {
        let name = format!("proxy-{letter}");
        servers.push(server(servers.first(), &name, kind, more));
    }
    let all: Vec<_> = servers
        .iter()
        .flat_map(|s| s.peer_listeners.clone())
        .collect();
    for server in &servers {
        // With its own address among them, as in a headless Service.
        introduce(server, &all).await;
    }
    servers.try_into().ok().unwrap()
}

/// A real agent that keeps sessions with all of these servers.
pub(crate) fn agent(of: &mut Stack, name: &str, servers: &[SocketAddr], ports: &[u16]) {
    of.agent_of(name, servers, &allow(ports));
}

/// Waits until `at` has been told that so many other servers have a session of that agent.
pub(crate) async fn announced(at: &Stack, agent: &str, servers: usize) {
    let name = agent.parse().unwrap();
    eventually(&format!("{agent} is announced by {servers}"), || {
        at.peers.with_session_of(&name).len() == servers
    })
    .await;
}

/// A UDP line to a server, as a forwarder in the middle. What comes in while it is cut is lost.
pub(crate) struct Line {
    pub(crate) address: SocketAddr,
    cut: Arc<AtomicBool>,
    /// What the server sends is lost, and no more.
    deaf: Arc<AtomicBool>,
    _forwarder: JoinSet<()>,
}

impl Line {
    pub(crate) async fn lay(to: SocketAddr) -> Self {
        let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let address = front.local_addr().unwrap();
        let cut = Arc::new(AtomicBool::new(false));
        let mut forwarder = JoinSet::new();
        let is_cut = Arc::clone(&cut);
        let deaf = Arc::new(AtomicBool::new(false));
        let is_deaf = Arc::clone(&deaf);
        forwarder.spawn(async move {
            let mut backs: std::collections::HashMap<SocketAddr, Arc<UdpSocket>> =
                Default::default();
            let mut returns = JoinSet::new();
            let mut buffer = vec![0; 65_536];
            while let Ok((count, from)) = front.recv_from(&mut buffer).await {
                let back = match backs.get(&from) {
                    Some(back) => Arc::clone(back),
                    None => {
                        let back = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
                        back.connect(to).await.unwrap();
                        backs.insert(from, Arc::clone(&back));
                        let (back, front) = (Arc::clone(&back), Arc::clone(&front));
                        let (cut, deaf) = (Arc::clone(&is_cut), Arc::clone(&is_deaf));
                        returns.spawn(async move {
                            let mut buffer = vec![0; 65_536];
                            loop {
                                // A closed port at the far end is reported once and is no end.
                                let Ok(count) = back.recv(&mut buffer).await else {
                                    continue;
                                };
                                if !cut.load(Ordering::Relaxed) && !deaf.load(Ordering::Relaxed) {
                                    front.send_to(&buffer[..count], from).await.ok();
                                }
                            }
                        });
                        Arc::clone(&backs[&from])
                    }
                };
                if !is_cut.load(Ordering::Relaxed) {
                    back.send(&buffer[..count]).await.ok(); // lost, as on any line
                }
            }
        });
        Self {
            address,
            cut,
            deaf,
            _forwarder: forwarder,
        }
    }

    pub(crate) fn cut(&self) {
        self.cut.store(true, Ordering::Relaxed);
    }

    /// From now on the agent hears nothing, and is heard.
    pub(crate) fn deafen(&self) {
        self.deaf.store(true, Ordering::Relaxed);
    }

    pub(crate) fn heal(&self) {
        self.deaf.store(false, Ordering::Relaxed);
        self.cut.store(false, Ordering::Relaxed);
    }
}
