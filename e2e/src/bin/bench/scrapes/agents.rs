//! Many whole edge-agents in one process: of each its session, its policy, its dials, its endpoints.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use certs::{AgentFiles, Clock, Issuer, TrustDomain};
use clap::Args;
use edge_agent::config::{self, Overrides};
use edge_agent::{App, Stop};
use secrecy::ExposeSecret as _;
use tokio::task::JoinSet;

use super::nodes::{self, Node};
use crate::memory::credential;

/// The agents of the nodes in `nodes.json`.
#[derive(Debug, Args)]
pub(crate) struct Agents {
    #[arg(long)]
    dir: PathBuf,
    #[arg(long)]
    server: String,
}

impl Agents {
    /// Runs until one of them ends, which none should.
    pub(crate) async fn run(self) -> Result<()> {
        daemon::limits::raise_nofile();
        let now = Clock::system().now();
        let ca = self.dir.join("server/ca");
        let issuer = Issuer::load_or_create(&ca, &TrustDomain::default(), now)?;
        let mut agents = JoinSet::new();
        for node in nodes::read(&self.dir)? {
            let agent = self.agent(&issuer, &node)?;
            agents.spawn(async move { (node.name, agent.run(Stop::default()).await) });
        }
        match agents.join_next().await {
            Some(ended) => bail!("an agent has ended: {:?}", ended?),
            None => bail!("no node"),
        }
    }

    /// An agent that has enrolled before.
    fn agent(&self, issuer: &Issuer, node: &Node) -> Result<edge_agent::Bound> {
        let state = self.dir.join("agents").join(&node.name);
        fs::create_dir_all(&state)?;
        let files = AgentFiles::new(&state);
        let credential = credential(issuer, &node.name)?;
        fs::write(files.certificate(), credential.chain_pem())?;
        fs::write(files.key(), credential.key_pem().expose_secret())?;
        fs::write(files.bundle(), issuer.bundle().to_pem())?;
        let text = format!(
            "name: {}\nstateDir: {}\nservers: ['{}']\nallow: [{{cidr: 127.0.0.1/32, ports: [{}, {}]}}]\n\
             observe: {{listen: '127.0.0.1:0'}}\nadmin: {{listen: '127.0.0.1:0'}}\n",
            node.name,
            state.display(),
            self.server,
            node.exporter,
            node.kubelet,
        );
        let config = config::parse(&state.join("edge-agent.yaml"), &text, &Overrides::default())?;
        App::bind(config).with_context(|| format!("bind the agent of {}", node.name))
    }
}
