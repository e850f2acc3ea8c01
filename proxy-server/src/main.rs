//! The proxy-server's process: parse, run, exit code.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    proxy_server::cli::main(proxy_server::cli::Cli::parse()).into()
}
