//! Running iptables-save and iptables-restore.

use std::ffi::OsStr;
use std::io::{self, Seek, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::MemfdFlags;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::error::Error;
use super::ruleset::Family;

/// How long a program may work once it has the lock. 50,000 rules take some seconds.
const WORK: Duration = Duration::from_secs(60);

/// Which of the kernel's two packet filters a program writes to. The kernel consults both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Backend {
    /// nf_tables, through its x_tables compatibility.
    Nft,
    /// x_tables.
    Legacy,
}

impl Backend {
    /// The ending of program names, as users know it: `nft` or `legacy`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Legacy => "legacy",
        }
    }

    /// The one that it is not.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Nft => Self::Legacy,
            Self::Legacy => Self::Nft,
        }
    }
}

/// Where programs are looked for and how they are called.
#[derive(Clone, Debug)]
pub struct Programs {
    /// Directories, first match wins.
    pub search: Vec<PathBuf>,
    /// How long to wait for the xtables lock, in whole seconds.
    pub lock_wait: Duration,
    /// Another lock than `/run/xtables.lock`, given to the programs as `XTABLES_LOCKFILE`.
    pub lock_file: Option<PathBuf>,
}

impl Default for Programs {
    fn default() -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        // A service's PATH often lacks the directories of root's programs.
        let usual = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
        Self {
            search: std::env::split_paths(&path).chain(usual).collect(),
            lock_wait: Duration::from_secs(5),
            lock_file: None,
        }
    }
}

impl Programs {
    /// The path of `name`, if it is installed.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<PathBuf> {
        self.search.iter().map(|dir| dir.join(name)).find(|path| path.is_file())
    }

    /// The path of the program for `backend` that ends in `tool` (`-save`, `-restore`, or nothing).
    ///
    /// A distribution with one back end only may have no names with `-nft` or `-legacy`.
    ///
    /// # Errors
    /// If there is none.
    pub fn tool(&self, family: Family, backend: Backend, tool: &str) -> Result<PathBuf, Error> {
        let named = format!("{}-{}{tool}", family.program(), backend.name());
        if let Some(path) = self.find(&named) {
            return Ok(path);
        }
        let plain = self.find(&format!("{}{tool}", family.program()));
        match (plain, self.default_backend(family)?) {
            (Some(path), Some(default)) if default == backend => Ok(path),
            _ => Err(Error::ProgramMissing { program: named }),
        }
    }

    /// Returns the back end of `iptables` without an ending.
    ///
    /// # Errors
    /// If it cannot be run.
    pub fn default_backend(&self, family: Family) -> Result<Option<Backend>, Error> {
        let Some(path) = self.find(family.program()) else {
            return Ok(None);
        };
        let output = self.run(&path, ["--version"], None)?;
        Ok(Some(backend_of_version(&String::from_utf8_lossy(&output.stdout))))
    }

    /// Runs a program to its end, in the network namespace of this thread.
    ///
    /// # Errors
    /// If it cannot be started, or has not ended when it should have (it is killed then).
    pub fn run<I, S>(&self, program: &Path, arguments: I, input: Option<&str>) -> Result<Output, Error>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let failed = |source: io::Error| Error::Run { program: program.display().to_string(), source };
        let mut command = Command::new(program);
        command.args(arguments).env("LC_ALL", "C").stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(lock) = &self.lock_file {
            command.env("XTABLES_LOCKFILE", lock);
        }
        command.stdin(match input {
            Some(input) => file_of(input).map_err(failed)?,
            None => Stdio::null(),
        });
        let child = command.spawn().map_err(failed)?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pidfd =
            pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())).transpose().map_err(|e| failed(e.into()))?;

        let limit = self.lock_wait + WORK;
        let (ended, wait) = mpsc::channel::<()>();
        let killer = std::thread::spawn(move || {
            let late = matches!(wait.recv_timeout(limit), Err(mpsc::RecvTimeoutError::Timeout));
            if let (true, Some(pidfd)) = (late, pidfd) {
                return pidfd_send_signal(pidfd.as_fd(), Signal::KILL).is_ok();
            }
            false
        });
        let output = child.wait_with_output().map_err(failed);
        drop(ended);
        if killer.join().unwrap_or(false) {
            return Err(Error::Hung { program: program.display().to_string(), after: limit });
        }
        output
    }
}

/// An input that need not be fed while output is read.
fn file_of(input: &str) -> io::Result<Stdio> {
    let mut file = std::fs::File::from(rustix::fs::memfd_create("iptables-restore", MemfdFlags::CLOEXEC)?);
    file.write_all(input.as_bytes())?;
    file.rewind()?;
    Ok(file.into())
}

/// Versions before 1.8 know no other back end than the legacy one, and do not name it.
fn backend_of_version(version: &str) -> Backend {
    if version.contains("nf_tables") { Backend::Nft } else { Backend::Legacy }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_tells_the_back_end() {
        assert_eq!(backend_of_version("iptables v1.8.9 (nf_tables)\n"), Backend::Nft);
        assert_eq!(backend_of_version("iptables v1.8.9 (legacy)\n"), Backend::Legacy);
        assert_eq!(backend_of_version("iptables v1.6.1\n"), Backend::Legacy);
    }

    #[test]
    fn a_missing_program_is_told_with_a_remedy() {
        let programs = Programs { search: vec!["/nonexistent".into()], ..Programs::default() };
        let error = programs.tool(Family::V6, Backend::Nft, "-restore").unwrap_err().to_string();
        assert!(
            error.contains("ip6tables-nft-restore is not installed: install the package iptables"),
            "{error}"
        );
    }
}
