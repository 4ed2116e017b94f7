//! Running iptables-save and iptables-restore.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use super::error::Error;
use super::ruleset::Family;
use crate::kernel::program;

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
        Self { search: program::search_path(), lock_wait: Duration::from_secs(5), lock_file: None }
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
        let mut command = Command::new(program);
        command.args(arguments);
        if let Some(lock) = &self.lock_file {
            command.env("XTABLES_LOCKFILE", lock);
        }
        let program = || program.display().to_string();
        program::run(command, input, self.lock_wait + WORK).map_err(|error| match error {
            program::Error::Run(source) => Error::Run { program: program(), source },
            program::Error::Hung(after) => Error::Hung { program: program(), after },
        })
    }
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
