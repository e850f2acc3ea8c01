//! Logs: one subscriber a process, text or JSON on stderr, with a filter that can be changed while it runs, and a
//! hook that turns every panic into one error event and a count.
//!
//! Invariant: a panic is never silent. It must not print anything by itself once a subscriber listens.

use std::fmt;
use std::panic::PanicHookInfo;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tracing::Level;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, Registry, reload};

use crate::tasks;

/// Dependencies warn of each try; we tell of a failure once. A filter that names them has its way.
const REPEATED: &str = "kube_runtime=error";
/// Longest filter that is parsed; real ones have a few dozen bytes.
const MAX_FILTER_LEN: usize = 4096;

static PANICS: AtomicU64 = AtomicU64::new(0);

/// How a line of log looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum LogFormat {
    /// One JSON object a line, for log collectors.
    Json,
    /// For people.
    #[default]
    Text,
}

impl FromStr for LogFormat {
    type Err = TelemetryError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "json" => Ok(Self::Json),
            "text" => Ok(Self::Text),
            other => Err(TelemetryError::Format(other.to_owned())),
        }
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Json => "json",
            Self::Text => "text",
        })
    }
}

/// Why logging could not be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter does not parse.
    #[error("log filter `{filter}` is not valid")]
    Filter {
        /// What was asked for.
        filter: String,
        /// What is wrong with it.
        #[source]
        source: ParseError,
    },
    /// Neither `text` nor `json`.
    #[error("log format `{0}` is neither text nor json")]
    Format(String),
    /// The subscriber that the handle belongs to is gone.
    #[error("change the log filter")]
    Reload(#[source] reload::Error),
    /// The process already has a subscriber.
    #[error("install the log subscriber")]
    Subscriber(#[source] TryInitError),
    /// The filter is longer than anything sensible.
    #[error("log filter is longer than {MAX_FILTER_LEN} bytes")]
    TooLong,
}

/// Changes the filter of a running process.
#[derive(Clone, Debug)]
pub struct LogHandle {
    filter: Option<reload::Handle<EnvFilter, Registry>>,
    current: Arc<Mutex<String>>,
}

impl LogHandle {
    /// A handle for a process whose logs belong to somebody else (an embedding program): filters are checked and
    /// remembered, nothing is filtered.
    pub fn detached() -> Self {
        Self {
            filter: None,
            current: Arc::new(Mutex::new("info".to_owned())),
        }
    }

    /// Replaces the filter, in the syntax of [`EnvFilter`]: `info`, `warn,edge_agent=debug`.
    ///
    /// # Errors
    /// [`TelemetryError::Filter`] and [`TelemetryError::TooLong`]; the old filter stays.
    pub fn set(&self, filter: &str) -> Result<(), TelemetryError> {
        let filter = filter.trim();
        let parsed = parse_filter(filter)?;
        let mut current = self.current.lock();
        if let Some(handle) = &self.filter {
            handle.reload(parsed).map_err(TelemetryError::Reload)?;
        }
        filter.clone_into(&mut current);
        Ok(())
    }

    /// The filter as it was last set.
    pub fn current(&self) -> String {
        self.current.lock().clone()
    }
}

/// Installs the subscriber of this process and the panic hook. Call it once, first thing.
///
/// # Errors
/// The filter does not parse, or the process has a subscriber already.
pub fn init(format: LogFormat, filter: &str) -> Result<LogHandle, TelemetryError> {
    let (layer, handle) = reload::Layer::new(parse_filter(filter)?);
    let registry = tracing_subscriber::registry().with(layer);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let installed = match format {
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
        LogFormat::Text => {
            let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
            registry.with(lines.with_ansi(colours)).try_init()
        }
    };
    installed.map_err(TelemetryError::Subscriber)?;
    install_panic_hook();
    Ok(LogHandle {
        filter: Some(handle),
        current: Arc::new(Mutex::new(filter.to_owned())),
    })
}

/// Makes every panic of this process one error event, with its place, and counts it. Calling it again does nothing.
///
/// While nobody listens for events, the hook that was installed before prints the panic as usual.
pub fn install_panic_hook() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.fetch_add(1, Ordering::Relaxed);
            if tracing::enabled!(Level::ERROR) {
                log_panic(panic);
            } else {
                previous(panic);
            }
        }));
    });
}

/// Panics of this process since the hook was installed.
pub fn panics() -> u64 {
    PANICS.load(Ordering::Relaxed)
}

fn log_panic(panic: &PanicHookInfo<'_>) {
    let message = panic.payload_as_str().unwrap_or("(not a string)");
    let location = panic
        .location()
        .map(ToString::to_string)
        .unwrap_or_default();
    let thread = std::thread::current();
    let task = tasks::current().unwrap_or("");
    tracing::error!(
        panic = message,
        location,
        task,
        thread = thread.name().unwrap_or(""),
        "panic"
    );
}

fn parse_filter(filter: &str) -> Result<EnvFilter, TelemetryError> {
    if filter.len() > MAX_FILTER_LEN {
        return Err(TelemetryError::TooLong);
    }
    EnvFilter::builder()
        .parse(format!("{REPEATED},{filter}"))
        .map_err(|source| TelemetryError::Filter {
            filter: filter.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{block_on, in_child_process};

    #[test]
    fn formats_are_read_and_printed() {
        for format in [LogFormat::Json, LogFormat::Text] {
            assert_eq!(format.to_string().parse::<LogFormat>().unwrap(), format);
        }
        let error = "xml".parse::<LogFormat>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "log format `xml` is neither text nor json"
        );
    }

    #[test]
    fn a_wrong_filter_is_refused_and_the_old_one_stays() {
        let handle = LogHandle::detached();
        handle.set("warn,daemon=debug").unwrap();
        assert!(matches!(
            handle.set("=,=nonsense"),
            Err(TelemetryError::Filter { .. })
        ));
        assert!(matches!(
            handle.set(&"a".repeat(5000)),
            Err(TelemetryError::TooLong)
        ));
        assert_eq!(handle.current(), "warn,daemon=debug");
    }

    #[test]
    fn the_filter_changes_while_the_process_runs() {
        in_child_process(
            "telemetry::tests::the_filter_changes_while_the_process_runs",
            &[],
            || {
                let handle = init(LogFormat::Text, "info").unwrap();
                assert!(!tracing::enabled!(Level::DEBUG));
                handle.set("debug").unwrap();
                assert!(tracing::enabled!(Level::DEBUG));
                assert!(
                    init(LogFormat::Text, "info").is_err(),
                    "a process has one subscriber"
                );
            },
        );
    }

    /// Prints to stderr what a process logs about two panics, for [`a_panic_is_one_json_event_with_its_place`].
    #[test]
    fn panics_in_a_process_of_their_own() {
        if std::env::var_os("CORVID_TEST_PANICS").is_none() {
            return;
        }
        init(LogFormat::Json, "error").unwrap();
        block_on(async {
            let tasks = crate::Tasks::new();
            tasks.spawn("stream", async { panic!("one stream broke") });
            tasks.drain(std::time::Duration::from_secs(5)).await;
        });
        assert_eq!(panics(), 1);
    }

    #[test]
    fn a_panic_is_one_json_event_with_its_place() {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "telemetry::tests::panics_in_a_process_of_their_own",
                "--nocapture",
            ])
            .env("CORVID_TEST_PANICS", "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        let lines: Vec<&str> = stderr.lines().collect();
        assert_eq!(lines.len(), 1, "one event and nothing else: {stderr}");
        let event: serde_json::Value = serde_json::from_str(lines[0]).unwrap();
        assert_eq!(event["level"], "ERROR");
        assert_eq!(event["panic"], "one stream broke");
        assert_eq!(event["task"], "stream");
        assert!(
            event["location"]
                .as_str()
                .unwrap()
                .contains("telemetry.rs:"),
            "{event}"
        );
    }
}
