//! `edge-agent`: see `edge-agent --help`.

use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser as _;
use daemon::Exit;
use edge_agent::cli::Cli;
use edge_agent::commands;

/// Threads beside the runtime's own: name lookups, which may hang, and a few for files.
const BLOCKING_THREADS: usize = 12;
/// For threads that hang at the end, in a name lookup.
const LAST: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            error.print().ok(); // nobody is left to tell
            let failed = error.use_stderr();
            return if failed {
                Exit::Usage.into()
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    // One thread spends the least CPU a byte, and leaves a small board's other cores to its workload.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build();
    let ended = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        let ended = runtime.block_on(commands::run(cli.command));
        runtime.shutdown_timeout(LAST);
        ended
    });
    match ended {
        Ok(exit) => exit.into(),
        Err(error) => {
            let exit = commands::exit_of(&error);
            writeln!(std::io::stderr(), "edge-agent: {error:#}").ok(); // nobody is left to tell
            exit.into()
        }
    }
}
