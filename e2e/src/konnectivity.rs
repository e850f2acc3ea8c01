//! The client library of konnectivity, as kube-apiserver uses it, driven from here: a program (`e2e/kubernetes/konnectivity`)
//! takes a command a line and answers with a line. Its doc has the commands.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use parking_lot::Mutex;

use crate::cluster::Running;
use crate::wait;

/// Longest wait for an answer: beyond every time limit of the library, whose longest is 30 s.
const DEADLINE: Duration = Duration::from_secs(60);

/// The running program.
#[derive(Debug)]
pub struct Client {
    program: Running,
    answers: Arc<Mutex<Answers>>,
}

#[derive(Debug, Default)]
struct Answers {
    lines: Vec<String>,
    rest: Vec<u8>,
}

/// How a dial or a close ended, and what the library said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The error's text, word for word.
    pub error: Option<String>,
    /// How long it took.
    pub took: Duration,
}

impl Client {
    /// Starts it for a socket.
    ///
    /// # Errors
    /// When it was not built, or does not start.
    pub fn start(socket: &Path) -> Result<Self> {
        // Dies with the test.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]);
        command.arg(program()?).arg(socket);
        let answers = Arc::new(Mutex::new(Answers::default()));
        let sink = Arc::clone(&answers);
        let program = Running::start_into("konnectivity's client", command, move |bytes| {
            sink.lock().take(bytes);
        })?;
        let client = Self { program, answers };
        client.hear("ready")?;
        Ok(client)
    }

    /// Gives a command, and waits for nothing.
    ///
    /// # Errors
    /// When the program is gone.
    pub fn tell(&mut self, command: &str) -> Result<()> {
        self.program.write(format!("{command}\n").as_bytes())
    }

    /// Waits for the answer to a command of that id, and returns what follows both.
    ///
    /// # Errors
    /// At the deadline.
    pub fn answer(&self, command: &str, id: &str) -> Result<String> {
        self.hear(&format!("{id} {command}"))
    }

    /// Gives a command and waits for its answer.
    ///
    /// # Errors
    /// As [`Self::tell`] and [`Self::answer`].
    pub fn ask(&mut self, command: &str, id: &str, args: &str) -> Result<String> {
        self.tell(&format!("{command} {id} {args}"))?;
        self.answer(command, id)
    }

    /// As [`Self::ask`], for what must be answered with `ok`.
    ///
    /// # Errors
    /// With the library's text, when it is not.
    pub fn ok(&mut self, command: &str, id: &str, args: &str) -> Result<()> {
        let answer = self.ask(command, id, args)?;
        ensure!(answer == "ok", "{command} {id} {args}: {answer}");
        Ok(())
    }

    /// Begins a dial with a time-out.
    ///
    /// # Errors
    /// When the program is gone.
    pub fn dial(&mut self, id: &str, to: &str, within: Duration) -> Result<()> {
        self.tell(&format!("dial {id} {to} {}ms", within.as_millis()))
    }

    /// How a dial that was begun ended.
    ///
    /// # Errors
    /// At the deadline.
    pub fn dialled(&self, id: &str) -> Result<Outcome> {
        self.answer("dial", id)?.parse()
    }

    /// Dials, and tells the stand-in kubelet there what to do.
    ///
    /// # Errors
    /// With the library's text, when the dial fails.
    pub fn open(&mut self, id: &str, to: &str, behaviour: crate::kubelet::Behaviour) -> Result<()> {
        self.dial(id, to, DEADLINE)?;
        let outcome = self.dialled(id)?;
        ensure!(outcome.error.is_none(), "dial {to}: {outcome:?}");
        self.ok("write", id, &behaviour.to_string())
    }

    /// Closes a connection, and waits until its tunnel has ended.
    ///
    /// # Errors
    /// At the deadline.
    pub fn close(&mut self, id: &str) -> Result<Outcome> {
        self.ask("close", id, "")?.parse()
    }

    /// Ends it with all that it has open, at once.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.program.kill()
    }

    fn hear(&self, wanted: &str) -> Result<String> {
        let heard = wait::poll(DEADLINE, &format!("an answer {wanted:?}"), || {
            let lines = &mut self.answers.lock().lines;
            let position = lines.iter().position(|line| {
                let rest = line.strip_prefix(wanted);
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
            });
            position.map(|at| lines.remove(at)).ok_or("none")
        });
        let line = heard.with_context(|| self.program.errors())?;
        let rest = line.get(wanted.len()..).unwrap_or_default();
        Ok(rest.trim_start().to_owned())
    }
}

impl Answers {
    fn take(&mut self, bytes: &[u8]) {
        self.rest.extend_from_slice(bytes);
        while let Some(end) = self.rest.iter().position(|&byte| byte == b'\n') {
            let line = self.rest.drain(..=end).collect::<Vec<_>>();
            let line = String::from_utf8_lossy(&line);
            self.lines.push(line.trim_end_matches('\n').to_owned());
        }
    }
}

impl std::str::FromStr for Outcome {
    type Err = anyhow::Error;

    fn from_str(answer: &str) -> Result<Self> {
        let mut words = answer.splitn(3, ' ');
        let how = words.next().unwrap_or_default();
        let took = words.next().and_then(|ms| ms.parse().ok());
        let took = took.map(Duration::from_millis);
        let took = took.ok_or_else(|| anyhow!("no time in {answer:?}"))?;
        let error = match (how, words.next()) {
            ("ok", None) => None,
            ("error", Some(text)) => Some(text.to_owned()),
            _ => bail!("no outcome: {answer:?}"),
        };
        Ok(Self { error, took })
    }
}

/// Where `e2e/kubernetes/build.sh` puts it.
fn program() -> Result<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/bin/konnectivity");
    ensure!(
        path.exists(),
        "no {}: run e2e/kubernetes/build.sh",
        path.display()
    );
    Ok(path)
}
