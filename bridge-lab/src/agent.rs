//! A real `bridge-agent` on a station of the lab.

use std::env;
use std::fs::{self, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::{
    fs::PermissionsExt as _,
    net::{UnixDatagram, UnixStream},
};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::Signal;
use rustix::time::{ClockId, clock_gettime};

use crate::lab::{Host, Lab, Process};
use crate::wait::patience;

/// How long the agent may take to start, to reload or to stop.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long to wait for a notification before looking whether the agent still runs.
const GLANCE: Duration = Duration::from_millis(20);

/// Exit code of `status` with a report, when no agent runs.
const NOT_RUNNING: i32 = 3;

/// An agent. Dropping it kills it; its enforcement stays active until the lab is removed or `bridge-agent down` runs.
#[derive(Debug)]
pub struct Agent {
    program: PathBuf,
    host: Host,
    files: Files,
    notifications: UnixDatagram,
    process: Process,
}

/// Each station's own.
#[derive(Debug)]
struct Files {
    config: PathBuf,
    socket: PathBuf,
    notify: PathBuf,
    log: PathBuf,
    pins: PathBuf,
}

impl Agent {
    /// Starts the agent on a station, at most one at a time on each, and waits until it says that it is ready.
    ///
    /// `config` is the YAML without `api.socket`: the lab names it. The program is `$BRIDGE_AGENT`, else the
    /// one built beside this one.
    ///
    /// # Errors
    /// It ends before it is ready, or is not ready in time; with its log.
    pub fn start(lab: &Lab, host: &Host, config: &str) -> Result<Self> {
        Self::start_program(program()?, lab, host, config)
    }

    /// As [`Agent::start`], with a program of the caller's choice: another version, another build.
    pub fn start_program(program: PathBuf, lab: &Lab, host: &Host, config: &str) -> Result<Self> {
        let directory = lab.directory().join(&host.name);
        let pins = lab.pin_directory()?.join(&host.name);
        for directory in [&directory, &pins] {
            fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
        }
        let files = Files {
            config: directory.join("agent.yaml"),
            socket: directory.join("agent.sock"),
            notify: directory.join("notify.sock"),
            log: directory.join("agent.log"),
            pins,
        };
        if !files.config.exists() {
            // Of an earlier lab with the same name.
            drop(fs::remove_dir_all(state_directory(&files.socket)));
        }
        files.write_config(config)?;
        let notifications = files.bind_notifications().context("bind the notification socket")?;
        let process = files.spawn(&program, host)?;
        let mut agent = Self { program, host: host.clone(), files, notifications, process };
        agent.await_notification(|notification| notification.ready)?;
        Ok(agent)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The unix socket of its API.
    pub fn socket(&self) -> &Path {
        &self.files.socket
    }

    /// The root of its pinned eBPF objects.
    pub fn pins(&self) -> &Path {
        &self.files.pins
    }

    /// Its directory of state across restarts.
    pub fn state_directory(&self) -> PathBuf {
        state_directory(&self.files.socket)
    }

    /// Its configuration file.
    pub fn config(&self) -> &Path {
        &self.files.config
    }

    /// All it has logged, also before a restart.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.files.log).unwrap_or_default()
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill().context("kill the agent")?;
        Ok(())
    }

    /// Asks it to end (SIGTERM), and waits until it has.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.process.signal(Signal::TERM).context("signal the agent")?;
        let status = self.process.wait(patience(DEADLINE))?;
        status.with_context(|| format!("the agent did not stop in {DEADLINE:?}:\n{}", self.log()))
    }

    /// Starts it again, killing it first if it runs, with the configuration that is there.
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        self.notifications = self.files.bind_notifications().context("bind the notification socket")?;
        self.process = self.files.spawn(&self.program, &self.host)?;
        self.await_notification(|notification| notification.ready)
    }

    /// From the next start on it is this program; returns the one of before.
    pub fn replace_program(&mut self, program: PathBuf) -> PathBuf {
        std::mem::replace(&mut self.program, program)
    }

    /// Replaces the configuration file, sends SIGHUP, and waits until the agent has dealt with it, whether it
    /// took the new configuration or stays with the old one.
    ///
    /// # Errors
    /// It has not in time, or ends; with its log.
    pub fn reload(&mut self, config: &str) -> Result<()> {
        self.files.write_config(config)?;
        // After writing: a reload that an earlier change has set off may begin, and read that one's file, until then.
        let before = clock_gettime(ClockId::Monotonic);
        let before = Duration::new(before.tv_sec.unsigned_abs(), u32::try_from(before.tv_nsec)?);
        self.process.signal(Signal::HUP).context("signal the agent")?;
        // The file's change alone makes it reload, too; whichever began after the file was in place will do.
        let mut begun = false;
        self.await_notification(|notification| {
            begun |= notification.reloading.is_some_and(|since| since >= before);
            begun && notification.ready
        })
    }

    /// A command of `bridge-agent` that talks to this agent, to be run with [`crate::lab::Netns::output`].
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).arg("--config").arg(&self.files.config);
        command.arg("--pin-root").arg(&self.files.pins);
        command
    }

    /// Waits until a running agent has finished its current work, so that later queries include all that it observed.
    fn settle(&self) {
        let settle = || -> io::Result<()> {
            let mut stream = UnixStream::connect(self.socket())?;
            stream.set_read_timeout(Some(patience(DEADLINE)))?;
            stream.write_all(b"GET /v1/settled HTTP/1.1\r\nHost: bridge\r\nConnection: close\r\n\r\n")?;
            stream.read_to_end(&mut Vec::new()).map(drop)
        };
        // An agent that is not there is at nothing.
        drop(settle());
    }

    /// Runs a command of `bridge-agent` against this agent, and returns its output; also that of `status` after the agent has
    /// ended.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        self.settle();
        let reports = arguments.first() == Some(&"status") && !arguments.contains(&"--ready");
        let fine: &[i32] = if reports { &[NOT_RUNNING] } else { &[] };
        self.host.netns.output_with(self.command(arguments), fine)
    }

    /// Returns a scrape of its metrics.
    pub fn metrics(&self) -> Result<String> {
        self.get("/metrics")
    }

    /// Returns its answer to a GET.
    pub fn get(&self, path: &str) -> Result<String> {
        self.settle();
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--fail-with-body", "--max-time", "5", "--unix-socket"]);
        curl.arg(self.socket()).arg(format!("http://bridge{path}"));
        self.host.netns.output(curl)
    }

    fn await_notification(&mut self, mut wanted: impl FnMut(&Notification) -> bool) -> Result<()> {
        let end = Instant::now() + patience(DEADLINE);
        let mut buffer = [0; 4096];
        while Instant::now() < end {
            match self.notifications.recv(&mut buffer) {
                Ok(length) if wanted(&Notification::parse(&buffer[..length])) => return Ok(()),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if let Some(status) = self.process.wait(Duration::ZERO)? {
                        bail!("the agent ended ({status}) before it was ready:\n{}", self.log());
                    }
                }
                // A read with a timeout ends so when the process is stopped and continued (signal(7)).
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e).context("receive a notification"),
            }
        }
        bail!("the agent was not ready in {DEADLINE:?}:\n{}", self.log())
    }
}

/// The directory of state of an agent with this socket.
pub fn state_directory(socket: &Path) -> PathBuf {
    let name = socket.to_string_lossy().trim_start_matches('/').replace('/', "-");
    Path::new("/var/lib/bridge/sockets").join(name)
}

impl Files {
    /// In one step: a watcher never sees half of it.
    fn write_config(&self, config: &str) -> Result<()> {
        let socket = format!("socket: {}", self.socket.display());
        let whole = match config.split_once("\napi: {") {
            Some((before, after)) => format!("{before}\napi: {{{socket}, {after}"),
            None => format!("{}\napi: {{{socket}}}\n", config.trim_end()),
        };
        let new = self.config.with_extension("new");
        fs::write(&new, whole)
            .and_then(|()| fs::rename(&new, &self.config))
            .context("write the configuration")
    }

    /// Binds a new socket for each start, so that no message of an earlier agent is taken for one of the new agent. By
    /// path, since an abstract address belongs to one network namespace.
    fn bind_notifications(&self) -> io::Result<UnixDatagram> {
        match fs::remove_file(&self.notify) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let socket = UnixDatagram::bind(&self.notify)?;
        // As that of systemd: for whatever user the agent is.
        fs::set_permissions(&self.notify, fs::Permissions::from_mode(0o777))?;
        socket.set_read_timeout(Some(GLANCE))?;
        Ok(socket)
    }

    fn spawn(&self, program: &Path, host: &Host) -> Result<Process> {
        let log = OpenOptions::new().create(true).append(true).open(&self.log).context("open the log")?;
        let mut command = Command::new(program);
        command.arg("run").arg("--config").arg(&self.config).arg("--pin-root").arg(&self.pins);
        command.env("NOTIFY_SOCKET", &self.notify);
        command.stdout(log.try_clone()?).stderr(log);
        host.netns.spawn_command(command).with_context(|| format!("start {}", program.display()))
    }
}

/// State that the agent reports by sd_notify(3).
#[derive(Debug, PartialEq, Eq)]
struct Notification {
    ready: bool,
    /// On CLOCK_MONOTONIC, when a reload began.
    reloading: Option<Duration>,
}

impl Notification {
    fn parse(message: &[u8]) -> Self {
        let message = String::from_utf8_lossy(message);
        let is = |line| message.lines().any(|other| other == line);
        let since = || message.lines().find_map(|line| line.strip_prefix("MONOTONIC_USEC=")?.parse().ok());
        let reloading = if is("RELOADING=1") { since().map(Duration::from_micros) } else { None };
        Self { ready: is("READY=1"), reloading }
    }
}

/// `$BRIDGE_AGENT`, else `bridge-agent` beside this program, or one up (test programs are in `deps`).
pub fn program() -> Result<PathBuf> {
    if let Some(path) = env::var_os("BRIDGE_AGENT") {
        return Ok(path.into());
    }
    sibling("bridge-agent").context("build it (cargo xtask build) or set BRIDGE_AGENT")
}

/// Returns the path of the program `name` that the workspace builds beside this one, or one folder up (test programs
/// are in `deps`).
///
/// # Errors
/// There is no such program: it was not built.
pub fn sibling(name: &str) -> Result<PathBuf> {
    let own = env::current_exe().context("find this program")?;
    let found = own.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("no {name} beside {}", own.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notifications_are_told_apart() {
        let parse = |message: &str| Notification::parse(message.as_bytes());
        assert_eq!(parse("READY=1"), Notification { ready: true, reloading: None });
        assert_eq!(parse("STATUS=READY=1\nREADY=0"), Notification { ready: false, reloading: None });
        let since = Some(Duration::from_millis(1500));
        assert_eq!(
            parse("RELOADING=1\nMONOTONIC_USEC=1500000"),
            Notification { ready: false, reloading: since }
        );
    }

    #[test]
    fn an_agent_that_ends_early_is_an_error_with_its_log() -> Result<()> {
        let lab = Lab::builder().build()?;
        let failing = lab.directory().join("failing");
        fs::write(&failing, "#!/bin/sh\necho no such interface >&2\nexit 1\n")?;
        rustix::fs::chmod(&failing, rustix::fs::Mode::RWXU)?;
        let error =
            Agent::start_program(failing, &lab, lab.b(), "role: node").expect_err("it ended").to_string();
        assert!(error.contains("exit status: 1") && error.contains("no such interface"), "{error}");
        Ok(())
    }
}
