//! What can be typed, and which function it leads to.

use std::path::PathBuf;
use std::time::Duration;

use certs::AgentPattern;
use clap::{Args, Parser, Subcommand};
use daemon::admin::Probe;
use daemon::{Exit, LogFormat, Signals};
use proto::{Destination, Host};

use crate::app::{App, Environment};
use crate::cluster::nodes::KUBELET_PORT;
use crate::config::{self, Overrides};
use crate::reload::Source;
use crate::{commands, redirect};

/// The cloud side of a Corvid tunnel.
///
/// Edge nodes behind NAT can't be dialled. Their edge-agents dial this server, and it carries `kubectl logs`, `exec`,
/// `attach`, `port-forward`, `cp` and metrics scrapes back to them.
#[derive(Debug, Parser)]
#[command(name = "proxy-server", version, propagate_version = true, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  proxy-server run --config /etc/corvid/proxy-server.yaml
  proxy-server token create --config /etc/corvid/proxy-server.yaml --agents 'edge-*' --uses 10
  proxy-server ca rotate --config /etc/corvid/proxy-server.yaml
  proxy-server cert issue --client kube-apiserver --out /etc/kubernetes/corvid --state-dir /var/lib/corvid
  proxy-server status
  proxy-server explain edge1";

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve until SIGTERM or SIGINT. SIGHUP reloads the configuration.
    Run(ConfigArgs),
    /// Read and check the configuration, say what is wrong with it, and exit with 0 or 64.
    CheckConfig(ConfigArgs),
    /// Show the sessions of the server that runs here, with agents and with other servers, how fresh its knowledge of the
    /// cluster is, and, where there are lines, which way each node is reached.
    Status(StatusArgs),
    /// Ask the server that runs here whether it is alive or ready; exit with 0 or 1 and say what is missing.
    ///
    /// For probes, where servers share an address (`handover`) and the one that answers there may be another.
    Probe {
        /// live or ready.
        what: Probe,
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Show the nodes that are known, who serves each, and whether it is reached through a session.
    ///
    /// Where there are lines, also which way each takes now and since when, round trip and loss of the line (of its last
    /// dials, 32 at most) and of the tunnel (of the packets of the last minutes), and what decides. `explain` tells more of one.
    Nodes(StatusArgs),
    /// Show the other proxy-servers: where each is, whether there is a session with it or why not, and how many agents it has
    /// announced.
    Peers(StatusArgs),
    /// Tell where a destination leads now: to which node and agent, through the tunnel or by which line, each rule that was
    /// looked at for that, and how the line does.
    ///
    /// Asks the server that runs here, which dials nothing for it. Rights are not looked at: what a requester may ask for
    /// is in `allow` of the frontends.
    Explain {
        /// A node, address, pod or Service and its port, as a requester would ask for; without a port it is 10250.
        #[arg(value_parser = destination)]
        destination: Destination,
        #[command(flatten)]
        args: StatusArgs,
    },
    /// Join tokens: with one of them a new agent gets its first certificate.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Revoke an agent, or allow it again.
    #[command(subcommand)]
    Agent(AgentCommand),
    /// The authority's certificates.
    #[command(subcommand)]
    Cert(CertCommand),
    /// Lead what this machine dials at edge nodes to its `intercept` frontend, by nftables rules.
    ///
    /// For a kube-apiserver that dials nodes by address and whose flags can't be changed: on the machine where it and
    /// this server both run. Ports come from the `intercept` frontends of the configuration, addresses from its `routes`
    /// and from the cluster's nodes that are at the edge by label, annotation or pool. An address that two nodes share is
    /// left out and reported. The rules are one nftables table, `inet corvid_redirect`, shown before anything is done;
    /// connections with the mark `direct.mark`, which are this server's own, are exempt.
    Redirect(RedirectArgs),
    /// The authority: show it, rotate it.
    #[command(subcommand)]
    Ca(CaCommand),
    /// Tokens and passwords of scrapers.
    #[command(subcommand)]
    Credential(CredentialCommand),
}

#[derive(Debug, Args)]
struct ConfigArgs {
    /// The configuration file.
    #[arg(
        long,
        env = "CORVID_CONFIG",
        default_value = "/etc/corvid/proxy-server.yaml"
    )]
    config: PathBuf,
    /// CA and token store, in place of `stateDir`.
    #[arg(long, env = "CORVID_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// Name of this server, in place of `name`.
    #[arg(long, env = "CORVID_NAME")]
    name: Option<String>,
    /// error, warn, info, debug, trace, or a filter like `info,proto=debug`; in place of `log.level`.
    #[arg(long, env = "CORVID_LOG_LEVEL")]
    log_level: Option<String>,
    /// text or json, in place of `log.format`.
    #[arg(long, env = "CORVID_LOG_FORMAT")]
    log_format: Option<LogFormat>,
}

impl ConfigArgs {
    fn overrides(&self) -> Overrides {
        Overrides {
            state_dir: self.state_dir.clone(),
            name: self.name.clone(),
            log_level: self.log_level.clone(),
            log_format: self.log_format,
        }
    }
}

/// Where the state directory is: given, or named by the configuration.
#[derive(Debug, Args)]
pub struct StateArgs {
    /// The configuration file that names the state directory.
    #[arg(
        long,
        env = "CORVID_CONFIG",
        default_value = "/etc/corvid/proxy-server.yaml"
    )]
    pub config: PathBuf,
    /// The state directory itself; no configuration file is read then.
    #[arg(long, env = "CORVID_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// The trust domain, with --state-dir and where it is not the default.
    #[arg(long, env = "CORVID_TRUST_DOMAIN", requires = "state_dir")]
    pub trust_domain: Option<certs::TrustDomain>,
}

#[derive(Debug, Args)]
struct StatusArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArgs,
}

#[derive(Debug, Args)]
struct SocketArgs {
    /// The server's admin socket.
    #[arg(long, env = "CORVID_ADMIN_SOCKET", default_value = config::ADMIN_SOCKET)]
    socket: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_help = REDIRECT_EXAMPLES)]
struct RedirectArgs {
    #[command(flatten)]
    action: RedirectAction,
    /// Print JSON.
    #[arg(long, conflicts_with_all = ["run", "remove"])]
    json: bool,
    #[command(flatten)]
    config: ConfigArgs,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct RedirectAction {
    /// Show the rules and what is left out of them; needs no privilege.
    #[arg(long)]
    dry_run: bool,
    /// Show the rules, put them in place and end. They stay, and nodes that come later are not in them.
    #[arg(long)]
    apply: bool,
    /// Remove the rules, also those of a run that was killed.
    #[arg(long)]
    remove: bool,
    /// Show the rules, put them in place, follow the nodes, and remove them at the end (SIGTERM, SIGINT).
    #[arg(long)]
    run: bool,
}

impl RedirectArgs {
    fn command(&self) -> redirect::Command {
        let RedirectAction {
            dry_run,
            apply,
            remove,
            run: _,
        } = self.action;
        let action = match (dry_run, apply, remove) {
            (true, _, _) => redirect::Action::DryRun,
            (_, true, _) => redirect::Action::Apply,
            (_, _, true) => redirect::Action::Remove,
            // One of them is required.
            (false, false, false) => redirect::Action::Run,
        };
        redirect::Command {
            action,
            json: self.json,
            file: self.config.config.clone(),
            overrides: self.config.overrides(),
        }
    }
}

const REDIRECT_EXAMPLES: &str = "\
Examples:
  proxy-server redirect --dry-run
  proxy-server redirect --dry-run --json | jq .leftOut
  proxy-server redirect --run --config /etc/corvid/proxy-server.yaml";

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Make a token and print it; it is stored hashed and can't be shown again.
    Create {
        #[command(flatten)]
        state: StateArgs,
        /// How long it can be used, as in 30m, 24h, 7d.
        #[arg(long, default_value = "24h", value_parser = humantime::parse_duration)]
        ttl: Duration,
        /// How many agents may enrol with it.
        #[arg(long, default_value_t = 1)]
        uses: u32,
        /// Names of agents that may enrol with it; `*` stands for any characters.
        #[arg(long, default_value = "*")]
        agents: AgentPattern,
    },
    /// List tokens, without their secrets.
    List {
        #[command(flatten)]
        state: StateArgs,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Make a token useless. Agents that enrolled with it are not touched.
    Revoke {
        #[command(flatten)]
        state: StateArgs,
        /// Its id: the part before the dot.
        id: String,
    },
}

#[derive(Debug, Subcommand)]
enum AgentCommand {
    /// End the agent's sessions and refuse it from now on.
    Revoke {
        #[command(flatten)]
        state: StateArgs,
        /// Its name.
        name: certs::Name,
    },
    /// Take a revocation back.
    Allow {
        #[command(flatten)]
        state: StateArgs,
        /// Its name.
        name: certs::Name,
    },
}

#[derive(Debug, Subcommand)]
enum CertCommand {
    /// Show the authority, its pin for agents, and the server's certificate.
    Show {
        #[command(flatten)]
        state: StateArgs,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Issue a client certificate for a frontend: writes NAME.crt, NAME.key and ca.crt.
    Issue {
        #[command(flatten)]
        state: StateArgs,
        /// Name of the client, as in kube-apiserver or prometheus.
        #[arg(long)]
        client: certs::Name,
        /// Days until it expires. kube-apiserver reads its certificate at its start only.
        #[arg(long, default_value_t = certs::CLIENT_DAYS, value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
        /// The directory to write to.
        #[arg(long)]
        out: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum CaCommand {
    /// Show the root that signs, those that are trusted, and until when.
    Show {
        #[command(flatten)]
        state: StateArgs,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Make a new root. The old one stays trusted until its last certificate is gone; no session ends.
    ///
    /// The old key signs the new root and is forgotten. Peers that know only the old root believe the new one by that;
    /// those that know the new one trust the old one too. So servers, agents and clients may hear of it in any order.
    Rotate {
        #[command(flatten)]
        state: StateArgs,
        /// How long the old root stays trusted, as in 31d [default: 24h and `backend.renewGrace`]; in any case until
        /// the last client certificate has ended.
        #[arg(long, value_parser = humantime::parse_duration)]
        keep: Option<Duration>,
    },
    /// Trust older roots no longer. Servers do this by themselves when it is time.
    Retire {
        #[command(flatten)]
        state: StateArgs,
        /// Before it is time: agents and clients that have nothing newer are cut off and have to enrol again.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Subcommand)]
enum CredentialCommand {
    /// Read a token or password from standard input and print its line for `bearerTokenFile` or `basicAuthFile`.
    ///
    /// The line has the name and a SHA-256 digest, so take a random secret: `openssl rand -hex 24 | tee secret |
    /// proxy-server credential hash prometheus`.
    Hash {
        /// Whose it is: the user of a password, and what `users` of a frontend's `allow` calls it.
        name: String,
    },
}

/// A destination whose port may be left out.
fn destination(text: &str) -> Result<Destination, proto::IdError> {
    match text.parse::<Host>() {
        Ok(host) => Ok(Destination {
            host,
            port: KUBELET_PORT,
        }),
        Err(_) => text.parse(),
    }
}

/// Does what was typed.
pub fn main(cli: Cli) -> Exit {
    match cli.command {
        Command::Run(args) => run(&args),
        Command::CheckConfig(args) => match config::load(&args.config, &args.overrides()) {
            Ok(config) => commands::say(&commands::checked(&args.config, &config)),
            Err(error) => commands::fail(&error, error.exit()),
        },
        Command::Status(args) => commands::finish(commands::status(&args.socket.socket, args.json)),
        Command::Probe { what, socket } => commands::finish(commands::probe(&socket.socket, what)),
        Command::Nodes(args) => commands::finish(commands::nodes(&args.socket.socket, args.json)),
        Command::Peers(args) => commands::finish(commands::peers(&args.socket.socket, args.json)),
        Command::Explain { destination, args } => {
            let socket = &args.socket.socket;
            commands::finish(commands::explain(socket, &destination, args.json))
        }
        Command::Token(command) => commands::finish(token(command)),
        Command::Agent(AgentCommand::Revoke { state, name }) => {
            commands::finish(commands::agent_revoke(&state, &name))
        }
        Command::Agent(AgentCommand::Allow { state, name }) => {
            commands::finish(commands::agent_allow(&state, &name))
        }
        Command::Cert(CertCommand::Show { state, json }) => {
            commands::finish(commands::cert_show(&state, json))
        }
        Command::Cert(CertCommand::Issue {
            state,
            client,
            days,
            out,
        }) => commands::finish(commands::cert_issue(&state, &client, days, &out)),
        Command::Redirect(args) => redirect::main(&args.command()),
        Command::Ca(command) => commands::finish(ca(command)),
        Command::Credential(CredentialCommand::Hash { name }) => {
            commands::finish(commands::credential_hash(&name))
        }
    }
}

fn ca(command: CaCommand) -> anyhow::Result<String> {
    match command {
        CaCommand::Show { state, json } => commands::ca_show(&state, json),
        CaCommand::Rotate { state, keep } => commands::ca_rotate(&state, keep),
        CaCommand::Retire { state, force } => commands::ca_retire(&state, force),
    }
}

fn token(command: TokenCommand) -> anyhow::Result<String> {
    match command {
        TokenCommand::Create {
            state,
            ttl,
            uses,
            agents,
        } => commands::token_create(&state, &certs::NewToken { ttl, uses, agents }),
        TokenCommand::List { state, json } => commands::token_list(&state, json),
        TokenCommand::Revoke { state, id } => commands::token_revoke(&state, &id),
    }
}

fn run(args: &ConfigArgs) -> Exit {
    let overrides = args.overrides();
    let config = match config::load(&args.config, &overrides) {
        Ok(config) => config,
        Err(error) => return commands::fail(&error, error.exit()),
    };
    let log = match daemon::telemetry::init(config.log.format, &config.log.level) {
        Ok(log) => log,
        Err(error) => return commands::fail(&error, Exit::Usage),
    };
    let files = daemon::limits::raise_nofile();
    tracing::debug!(files, "limit of descriptors");
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return commands::fail(&error, Exit::Failed),
    };
    runtime.block_on(async {
        let signals = match Signals::install() {
            Ok(signals) => signals,
            Err(error) => return commands::fail(&error, Exit::Failed),
        };
        let source = Source {
            file: Some(args.config.clone()),
            overrides,
        };
        let environment = Environment {
            source,
            log,
            reload: signals.reload(),
        };
        let shutdown = signals.shutdown();
        match App::start(config, environment, &shutdown).await {
            Ok(Some(bound)) => Box::pin(bound.run(shutdown, signals.immediate())).await,
            Ok(None) => Exit::Drained,
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "could not start");
                Exit::Failed
            }
        }
    })
}
