//! The command line.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use daemon::admin::Probe;
use daemon::{Listen, LogFormat};

use crate::config::Overrides;

/// The edge side of a Corvid tunnel.
#[derive(Debug, Parser)]
#[command(
    name = "edge-agent",
    version,
    about = "The edge side of a Corvid tunnel",
    long_about = "The edge side of a Corvid tunnel.\n\n\
        It dials out to proxy-servers over QUIC (8443/udp) and lets them reach this node: its kubelet and node \
        exporter, and what the configuration allows beside. It needs no open port and no privileges.\n\n\
        A new agent enrols with a join token, which `proxy-server token create` prints, or in a pod with its \
        ServiceAccount token, and renews its certificate by itself from then on.",
    after_long_help = "Examples:\n  \
        edge-agent check-config --config /etc/corvid/edge-agent.yaml\n  \
        CORVID_JOIN_TOKEN=abcdef.0123456789abcdef CORVID_CA_PIN=sha256:… edge-agent run --server proxy.example.com:8443\n  \
        edge-agent run --config /etc/corvid/edge-agent.yaml\n  \
        edge-agent status\n\n\
        Exit codes: 0 stopped as told, 1 failed, 64 wrong command line or configuration.\n\
        Signals: SIGTERM drains (a second one ends at once), SIGHUP reloads the configuration."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Keep sessions with the proxy-servers and serve their streams.
    Run(Settings),
    /// Get a certificate with the join token, and end.
    #[command(
        long_about = "Get a certificate with the join token, keep it in the state directory, and end.\n\n\
        `run` does this by itself; use this where the token must not stay on the host. Does nothing if there is a \
        certificate already. Exits with 1 and a sentence if the server refuses."
    )]
    Enroll(Settings),
    /// Say everything that is wrong with the configuration.
    CheckConfig(Settings),
    /// Show the sessions of the agent that runs on this host.
    Status(Status),
    /// Ask the agent that runs on this host whether it is alive or ready.
    #[command(
        long_about = "Ask the agent that runs on this host whether it is alive or ready; exit with 0 or 1 and say what is \
        missing.\n\n\
        For probes, where agents share an address (`handover`) and the one that answers there may be another."
    )]
    Probe {
        /// live or ready.
        what: Probe,
        /// Where.
        #[command(flatten)]
        admin: Admin,
    },
}

/// Where the configuration comes from; flags and variables go before the file.
#[derive(Debug, Args)]
pub struct Settings {
    /// The configuration file; without it, flags and variables say everything.
    #[arg(long, value_name = "FILE", env = "CORVID_CONFIG")]
    pub config: Option<PathBuf>,
    /// Name of the agent, which is the node's [default: the host name].
    #[arg(long, env = "CORVID_NAME")]
    pub name: Option<String>,
    /// Where the certificate is kept.
    #[arg(long, value_name = "DIR", env = "CORVID_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// A proxy-server, and the dedicated line that leads to that address if it is reached over one; may be given several
    /// times.
    #[arg(
        long = "server",
        value_name = "[LINE=]HOST:PORT",
        env = "CORVID_SERVERS",
        value_delimiter = ','
    )]
    pub servers: Vec<String>,
    /// An address of the node beside those of the interfaces; may be given several times.
    #[arg(
        long = "node-address",
        value_name = "IP",
        env = "CORVID_NODE_ADDRESSES",
        value_delimiter = ','
    )]
    pub node_addresses: Vec<IpAddr>,
    /// File with the join token; read anew at each attempt.
    #[arg(long, value_name = "FILE", env = "CORVID_JOIN_TOKEN_FILE")]
    pub join_token_file: Option<PathBuf>,
    /// File with a projected ServiceAccount token, for agents in pods; read anew at each attempt.
    #[arg(long, value_name = "FILE", env = "CORVID_SERVICE_ACCOUNT_TOKEN_FILE")]
    pub service_account_token_file: Option<PathBuf>,
    /// Pin of the proxy-server's authority, as `proxy-server cert show` prints it.
    #[arg(long, value_name = "sha256:HEX", env = "CORVID_CA_PIN")]
    pub ca_pin: Option<String>,
    /// File with the roots of the proxy-server's authority, in place of the pin; followed when it changes.
    #[arg(long, value_name = "FILE", env = "CORVID_CA_FILE")]
    pub ca_file: Option<PathBuf>,
    /// Filter of the log, such as `info` or `warn,edge_agent=debug`.
    #[arg(long, value_name = "FILTER", env = "CORVID_LOG_LEVEL")]
    pub log_level: Option<String>,
    /// Format of the log: text or json.
    #[arg(long, value_name = "FORMAT", env = "CORVID_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// What to show.
#[derive(Debug, Args)]
pub struct Status {
    /// As JSON.
    #[arg(long)]
    pub json: bool,
    /// Where.
    #[command(flatten)]
    pub admin: Admin,
}

/// Where the agent is asked.
#[derive(Debug, Args)]
pub struct Admin {
    /// Admin endpoint of the agent.
    #[arg(
        long,
        value_name = "ADDRESS",
        env = "CORVID_ADMIN",
        default_value = "127.0.0.1:9443"
    )]
    pub admin: Listen,
}

impl Settings {
    /// What goes before the file. The join token comes from the environment alone: arguments are seen by everybody
    /// on the host.
    #[must_use]
    pub fn overrides(&self) -> Overrides {
        let join_token = std::env::var("CORVID_JOIN_TOKEN")
            .ok()
            .filter(|token| !token.is_empty());
        Overrides {
            name: self.name.clone(),
            state_dir: self.state_dir.clone(),
            servers: self
                .servers
                .iter()
                .filter(|text| !text.is_empty())
                .cloned()
                .collect(),
            node_addresses: self.node_addresses.clone(),
            join_token: join_token.map(Into::into),
            join_token_file: self.join_token_file.clone(),
            service_account_token_file: self.service_account_token_file.clone(),
            ca_pin: self.ca_pin.clone(),
            ca_file: self.ca_file.clone(),
            log_format: self.log_format,
            log_level: self.log_level.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_explains_itself() {
        Cli::command().debug_assert();
        let help = Cli::command().render_long_help().to_string();
        for word in ["join token", "Examples:", "Exit codes:", "SIGHUP"] {
            assert!(help.contains(word), "{word}: {help}");
        }
    }

    #[test]
    fn servers_may_be_listed_with_commas() {
        let cli = Cli::parse_from([
            "edge-agent",
            "run",
            "--server",
            "a:1,b:2",
            "--server",
            "c:3",
        ]);
        let Command::Run(settings) = cli.command else {
            panic!("not run")
        };
        assert_eq!(settings.overrides().servers, ["a:1", "b:2", "c:3"]);
    }
}
