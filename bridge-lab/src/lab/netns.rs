//! A network namespace: running code, async code and commands inside it.
//!
//! Only the network namespace is entered. `ip netns exec` would mount a /sys of its own on top, and hide
//! cgroups and pinned eBPF objects.

use std::fs;
use std::future::Future;
use std::io;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

use super::id::LabId;
use super::process::{self, Process};
use crate::netns::Ns;

/// Where iproute2 keeps the names of network namespaces.
pub(super) const NAMES: &str = "/run/netns";

/// A network namespace of a lab. Clones stand for the same namespace; it is removed with its lab.
#[derive(Clone, Debug)]
pub struct Netns {
    name: String,
    lab: LabId,
    ns: Ns,
}

impl Netns {
    /// Opens the namespace that iproute2 knows by `name`.
    pub(super) fn open(lab: LabId, name: String) -> Result<Self> {
        let path = Path::new(NAMES).join(&name);
        let ns = Ns::open(&path).with_context(|| format!("open {}", path.display()))?;
        Ok(Self { name, lab, ns })
    }

    /// Opens the namespace of a running process.
    pub(super) fn of_process(lab: LabId, process: u32, name: String) -> Result<Self> {
        let path = Path::new("/proc").join(process.to_string()).join("ns/net");
        let ns = Ns::open(&path).with_context(|| format!("open {}", path.display()))?;
        Ok(Self { name, lab, ns })
    }

    /// The name, as `ip netns` lists it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` on a thread of its own inside the namespace. A panic in it goes on in the caller.
    ///
    /// A socket belongs for ever to the namespace it was made in: make it here, use it anywhere.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.ns.enter(work)
    }

    /// Runs a future to its end inside the namespace, on a thread of its own with a current-thread runtime:
    /// no task of it can wander to a thread that is elsewhere.
    pub fn run_async<F: Future<Output = T>, T: Send>(&self, work: impl FnOnce() -> F + Send) -> T {
        self.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a current-thread runtime").block_on(work())
        })
    }

    /// Starts `command` inside the namespace. It dies with its handle, with the lab, and with this process.
    pub fn spawn_command(&self, command: Command) -> io::Result<Process> {
        process::spawn(command, self.lab, self.ns.file())
    }

    /// Runs `command` inside the namespace to its end and returns its standard output. A failure is an error with its
    /// standard error.
    pub fn output(&self, command: Command) -> Result<String> {
        self.output_with(command, &[])
    }

    /// As [`Netns::output`], with the exit codes that are no failure where there is output.
    pub fn output_with(&self, mut command: Command, fine: &[i32]) -> Result<String> {
        let shown = format!("{command:?}");
        let output =
            self.run(|| command.output()).with_context(|| format!("start {shown} (is it installed?)"))?;
        anyhow::ensure!(
            output.status.success() || output.status.code().is_some_and(|code| fine.contains(&code)),
            "{shown} in {}: {}: {}",
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs `ip` with these arguments, separated by spaces, inside the namespace.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        let mut command = Command::new("ip");
        command.args(arguments.split_ascii_whitespace());
        self.output(command)
    }

    /// Writes a sysctl of the namespace, named by its path below `/proc/sys/net`.
    pub fn set_sysctl(&self, path: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys/net").join(path);
        self.run(|| fs::write(&path, value)).with_context(|| format!("write {value} to {}", path.display()))
    }
}
