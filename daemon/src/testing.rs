//! Helpers of this crate's own tests.

use std::process::Command;

const CHILD: &str = "CORVID_TEST_CHILD";

/// Runs `body` in a process of its own: the test binary is started again for this one test, so that limits, signals
/// and the environment of the other tests stay as they are. `name` is the test's full path.
pub(crate) fn in_child_process(name: &str, env: &[(&str, &str)], body: impl FnOnce()) {
    if std::env::var_os(CHILD).is_some() {
        body();
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CHILD, "1")
        .envs(env.iter().copied())
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "child of {name} failed:\n{stdout}\n{stderr}"
    );
    assert!(
        stdout.contains("1 passed"),
        "no test is called {name}:\n{stdout}"
    );
}

/// A runtime for the body of a child process.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}
