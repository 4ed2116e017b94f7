//! Clients of the agent's API.

use std::{path::PathBuf, process::Command, sync::atomic::Ordering, time::Duration};

use anyhow::{Context as _, Result, ensure};

use super::Course;
use crate::{agent::Agent, lab::Lab};

pub(super) const READ: &str = "the API is read";
pub(super) const LEASE: &str = "a port is leased for a second";
pub(super) const EXEC: &str = "a program is run with ports of the pool";

const PAUSE: Duration = Duration::from_millis(50);

/// Asks an agent, whichever is there.
#[derive(Debug)]
pub(super) struct Client {
    /// `bridge-agent` and the arguments common to all its commands.
    program: PathBuf,
    arguments: Vec<std::ffi::OsString>,
    socket: PathBuf,
}

impl Client {
    pub(super) fn new(agent: &Agent) -> Self {
        let command = agent.command(&[]);
        let arguments = command.get_args().map(ToOwned::to_owned).collect();
        Self { program: command.get_program().into(), arguments, socket: agent.socket().to_owned() }
    }

    fn command(&self, words: &[&str], behind: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(words).args(&self.arguments).args(behind);
        command
    }

    fn get(&self, path: &str) -> Command {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--fail", "--max-time", "10", "--unix-socket"]).arg(&self.socket);
        curl.arg(format!("http://bridge{path}"));
        curl
    }

    /// Works until the end. Failures while the agent is being replaced do not count.
    pub(super) fn work(&self, lab: &Lab, course: &Course) {
        let netns = &lab.b().netns;
        let to = format!("{}:8443", lab.a().v4);
        let mut round = 0_usize;
        while course.pause(PAUSE) {
            round += 1;
            let agent = course.node.load(Ordering::Relaxed);
            let paths = ["/v1/status", "/v1/flows", "/v1/rules", "/v1/counters", "/metrics", "/v1/leases"];
            let (work, result): (_, Result<()>) = match round % 10 {
                0 => (
                    LEASE,
                    netns.output(self.command(&["ports", "acquire", &to, "--for", "1s"], &[])).map(drop),
                ),
                5 => (EXEC, netns.output(self.command(&["exec"], &["--", "true"])).map(drop)),
                7 => (READ, self.events(lab)),
                _ => (READ, netns.output(self.get(paths[round % paths.len()])).map(drop)),
            };
            if agent != 0 && agent == course.node.load(Ordering::Relaxed) {
                course.count(work, 1, result);
            }
        }
    }

    /// A client that goes away in the middle of an answer.
    fn events(&self, lab: &Lab) -> Result<()> {
        const TIMED_OUT: i32 = 28;
        let mut curl = self.get("/v1/events");
        curl.args(["--no-buffer", "--max-time", "0.2", "--output", "/dev/null"]);
        let mut process = lab.b().netns.spawn_command(curl)?;
        let status = process.wait(Duration::from_secs(10))?.context("it does not end")?;
        ensure!(status.code() == Some(TIMED_OUT), "{status}");
        Ok(())
    }
}
