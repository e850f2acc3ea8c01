//! Rotation of an authority: whoever has heard of it and whoever has not, no two peers refuse each other. Real handshakes
//! in any order of events, until the last leaf of the old key is gone and then without the old root.

#![expect(
    clippy::unwrap_used,
    clippy::unwrap_in_result,
    clippy::indexing_slicing,
    reason = "helpers of tests, where a panic is the report"
)]

use std::sync::Arc;
use std::time::Duration;

use certs::test_ca::now;
use certs::{
    Ca, Clock, Credential, FrontendTrust, LiveBundle, LiveCredential, Name, Own, Pin, Revocations,
    SERVER_SNI, ServerSans, TrustBundle, TrustDomain,
};
use proptest::prelude::*;
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};

const DAY: Duration = Duration::from_secs(86_400);

fn domain() -> TrustDomain {
    TrustDomain::default()
}

fn own(credential: Credential, bundle: TrustBundle) -> Own {
    Own {
        credential: LiveCredential::new(credential),
        bundle: LiveBundle::new(bundle),
        clock: Clock::system(),
        trust_domain: domain(),
    }
}

/// Both sides of a handshake, and a byte of the server's, since a client learns of a refusal by reading.
fn shake(server: &Arc<ServerConfig>, client: &Arc<ClientConfig>, name: &str) -> Result<(), String> {
    let name = name.to_owned().try_into().unwrap();
    let mut client = ClientConnection::new(Arc::clone(client), name).unwrap();
    let mut server = ServerConnection::new(Arc::clone(server)).unwrap();
    for _ in 0..8 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        server.read_tls(&mut wire.as_slice()).unwrap();
        let served = server.process_new_packets();
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        client.read_tls(&mut wire.as_slice()).unwrap();
        let asked = client.process_new_packets();
        served.map_err(|error| format!("the server: {error}"))?;
        asked.map_err(|error| format!("the client: {error}"))?;
        if !client.is_handshaking() && !server.is_handshaking() {
            return Ok(());
        }
    }
    Err("the handshake has no end".to_owned())
}

/// A server as far as it has heard.
struct Server {
    knows: Ca,
    own: Own,
    tunnel: Arc<ServerConfig>,
    frontend: Arc<ServerConfig>,
}

fn server_leaf(ca: &Ca) -> Credential {
    let sans = ServerSans {
        dns_names: vec!["localhost".to_owned()],
        ip_addresses: Vec::new(),
    };
    let issuer = ca.issuer(now()).unwrap();
    issuer
        .issue_server(&Name::parse("s1").unwrap(), &sans, now())
        .unwrap()
}

impl Server {
    fn new(ca: &Ca) -> Self {
        let own = own(server_leaf(ca), ca.bundle().unwrap());
        Self {
            knows: ca.clone(),
            tunnel: certs::tunnel_server(&own, &Revocations::new()).unwrap(),
            frontend: certs::frontend_server(&own, &FrontendTrust::Ours).unwrap(),
            own,
        }
    }

    /// As a running server takes over what it hears, and as one starts again with what it had heard.
    fn take(&mut self, ca: &Ca) {
        self.knows = ca.clone();
        self.own.bundle.replace(ca.bundle().unwrap());
        self.own.credential.replace(server_leaf(ca));
    }
}

/// An agent with its mounted roots, or a client of a frontend with what it was handed out.
struct Peer {
    own: Own,
    /// Who has signed its leaf.
    signer: Pin,
    mounted: TrustBundle,
    config: Arc<ClientConfig>,
}

impl Peer {
    fn agent(ca: &Ca) -> Self {
        let own = own(agent_leaf(ca), ca.bundle().unwrap());
        Self {
            signer: ca.pin(),
            mounted: ca.bundle().unwrap(),
            config: certs::tunnel_client(&own).unwrap(),
            own,
        }
    }

    fn client(ca: &Ca) -> Self {
        let own = own(client_leaf(ca), ca.bundle().unwrap());
        Self {
            signer: ca.pin(),
            mounted: ca.bundle().unwrap(),
            config: certs::frontend_client(&own).unwrap(),
            own,
        }
    }

    fn take(&mut self, leaf: Credential, ca: &Ca) {
        self.own.credential.replace(leaf);
        self.own.bundle.replace(ca.bundle().unwrap());
        self.signer = ca.pin();
    }
}

fn agent_leaf(ca: &Ca) -> Credential {
    let issuer = ca.issuer(now()).unwrap();
    issuer
        .issue_agent(&Name::parse("edge1").unwrap(), None, now())
        .unwrap()
}

fn client_leaf(ca: &Ca) -> Credential {
    let issuer = ca.issuer(now()).unwrap();
    issuer
        .issue_client(&Name::parse("kube").unwrap(), 1, now())
        .unwrap()
}

#[derive(Debug, Clone)]
enum Op {
    Rotate,
    /// The old root leaves, if the last leaf of its key is gone.
    Retire,
    /// A server hears of it.
    Hear(usize),
    /// A server starts again, with what it has in its directory.
    Start(usize),
    /// An agent renews its certificate there.
    Renew(usize, usize),
    /// The roots in an agent's file change.
    Mount(usize),
    /// An agent starts again: it trusts what is mounted.
    Restart(usize),
    /// A client is handed out a new certificate.
    Issue,
}

const SERVERS: usize = 2;
const AGENTS: usize = 3;

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        2 => Just(Op::Rotate),
        2 => Just(Op::Retire),
        4 => (0..SERVERS).prop_map(Op::Hear),
        1 => (0..SERVERS).prop_map(Op::Start),
        6 => (0..AGENTS, 0..SERVERS).prop_map(|(agent, server)| Op::Renew(agent, server)),
        4 => (0..AGENTS).prop_map(Op::Mount),
        1 => (0..AGENTS).prop_map(Op::Restart),
        2 => Just(Op::Issue),
    ]
}

struct World {
    truth: Ca,
    servers: Vec<Server>,
    agents: Vec<Peer>,
    client: Peer,
    retired: u32,
}

impl World {
    fn new() -> Self {
        let truth = Ca::create(&domain(), now()).unwrap();
        Self {
            servers: (0..SERVERS).map(|_| Server::new(&truth)).collect(),
            agents: (0..AGENTS).map(|_| Peer::agent(&truth)).collect(),
            client: Peer::client(&truth),
            truth,
            retired: 0,
        }
    }

    fn does(&mut self, op: &Op) {
        match *op {
            Op::Rotate => {
                if let Ok(next) = self.truth.rotate(DAY, now()) {
                    self.truth = next;
                }
            }
            Op::Retire => {
                let pin = self.truth.pin();
                let rotating = self.truth.retires_at().is_some();
                let all = self.agents.iter().chain([&self.client]);
                let gone = all.clone().all(|peer| peer.signer == pin)
                    && self.servers.iter().all(|server| server.knows == self.truth);
                // A month is long enough for a file to be mounted, if there is one.
                let mounted = all.clone().all(|peer| peer.mounted.pins().contains(&pin));
                if rotating && gone && mounted {
                    self.truth = self.truth.retire();
                    self.retired += 1;
                }
            }
            Op::Hear(server) => self.servers[server].take(&self.truth),
            Op::Start(server) => {
                let knows = self.servers[server].knows.clone();
                self.servers[server] = Server::new(&knows);
            }
            Op::Renew(agent, server) => {
                let ca = &self.servers[server].knows;
                self.agents[agent].take(agent_leaf(ca), ca);
            }
            Op::Mount(agent) => {
                let bundle = self.truth.bundle().unwrap();
                self.agents[agent].mounted = bundle.clone();
                self.agents[agent].own.bundle.replace(bundle);
            }
            Op::Restart(agent) => {
                let mounted = self.agents[agent].mounted.clone();
                self.agents[agent].own.bundle.replace(mounted);
            }
            Op::Issue => {
                // Where the operator is: at any server, here one that has heard.
                let truth = self.truth.clone();
                self.client.take(client_leaf(&truth), &truth);
                self.client.mounted = truth.bundle().unwrap();
            }
        }
    }

    fn all_agree(&self) -> Result<(), String> {
        for (s, server) in self.servers.iter().enumerate() {
            for (a, agent) in self.agents.iter().enumerate() {
                shake(&server.tunnel, &agent.config, SERVER_SNI)
                    .map_err(|error| format!("agent {a} and server {s}: {error}"))?;
            }
            shake(&server.frontend, &self.client.config, "localhost")
                .map_err(|error| format!("the client and server {s}: {error}"))?;
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_step_leaves_a_pair_of_peers_that_refuse_each_other(ops in proptest::collection::vec(op(), 0..40)) {
        let mut world = World::new();
        for (i, op) in ops.iter().enumerate() {
            world.does(op);
            if let Err(error) = world.all_agree() {
                return Err(TestCaseError::fail(format!("after {:?}: {error}", &ops[..=i])));
            }
        }
    }
}

#[test]
fn a_whole_rotation_and_another_one() {
    let mut world = World::new();
    for round in 1..=3 {
        let before = world.truth.pin();
        let steps = [Op::Rotate]
            .into_iter()
            // The first server hears; agents renew there and at the other.
            .chain([Op::Hear(0), Op::Renew(0, 0), Op::Renew(1, 1), Op::Start(1)])
            .chain([Op::Hear(1), Op::Renew(1, 0), Op::Renew(2, 1), Op::Issue])
            .chain((0..AGENTS).map(Op::Mount))
            .chain([Op::Retire, Op::Hear(1), Op::Restart(0), Op::Hear(0)])
            .chain((0..AGENTS).map(Op::Mount));
        for step in steps {
            world.does(&step);
            let agreed = world.all_agree();
            assert_eq!(agreed, Ok(()), "{round}: {step:?}");
        }
        assert_eq!(world.retired, round);
        let trusted = world.truth.bundle().unwrap();
        assert!(!trusted.pins().contains(&before), "the old root is gone");
    }
}

#[test]
fn who_kept_the_old_key_is_believed_until_its_root_leaves_and_no_longer() {
    let old = Ca::create(&domain(), now()).unwrap();
    let new = old.rotate(DAY, now()).unwrap();
    let (thief, honest) = (Peer::agent(&old), Server::new(&new));
    shake(&honest.tunnel, &thief.config, SERVER_SNI).unwrap();
    let retired = Server::new(&new.retire());
    shake(&retired.tunnel, &thief.config, SERVER_SNI).unwrap_err();
    // Nor does the old key pass for the new one: the cross certificate leads one way only.
    let agent = Peer::agent(&new.retire());
    shake(&Server::new(&old).tunnel, &agent.config, SERVER_SNI).unwrap_err();
}
