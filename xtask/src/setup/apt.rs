//! Debian's packages.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result, bail};

use crate::cmd;

/// The package manager, and whether it has been asked for news in this run.
#[derive(Default)]
pub(super) struct Apt {
    updated: bool,
}

impl Apt {
    /// Installs packages, each with the reason that is shown; nothing happens if there are none.
    ///
    /// Never removes a package: a conflict with an installed package is an error.
    ///
    /// # Errors
    /// No apt here, no root, or apt fails; the message names the command to type.
    pub(super) fn install<'a>(&mut self, wanted: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<()> {
        let mut packages: Vec<&str> = Vec::new();
        for (package, why) in wanted {
            if !packages.contains(&package) {
                super::announce(package, why);
                packages.push(package);
            }
        }
        if packages.is_empty() {
            return Ok(());
        }
        let by_hand = format!("apt-get update && apt-get install {}", packages.join(" "));
        if !is_here() {
            bail!(
                "there is no apt-get here: install the equivalent of Debian's packages {} by the package manager of this \
                 system, then try again",
                packages.join(", ")
            );
        }
        if !cmd::can_be_root() {
            bail!("packages are missing, and there is no sudo here: as root, type\n  {by_hand}");
        }
        self.update();
        let arguments = ["install", "--yes", "--no-install-recommends", "--no-remove"];
        let arguments: Vec<_> = arguments.iter().chain(&packages).map(OsString::from).collect();
        apt_get(&arguments).with_context(|| format!("packages are missing; as root, type\n  {by_hand}"))
    }

    /// The version of `package` that would be installed, if any.
    ///
    /// # Errors
    /// apt fails.
    pub(super) fn candidate(&mut self, package: &str) -> Result<Option<String>> {
        if !is_here() {
            return Ok(None);
        }
        self.update();
        let mut policy = cmd::command("apt-cache");
        policy.args(["policy", package]).env("LC_ALL", "C");
        Ok(parse_candidate(&cmd::output(&mut policy)?))
    }

    /// The first package that `package` depends on, if apt knows it.
    ///
    /// # Errors
    /// apt fails.
    pub(super) fn dependency(&mut self, package: &str) -> Result<Option<String>> {
        if self.candidate(package)?.is_none() {
            return Ok(None);
        }
        let mut depends = cmd::command("apt-cache");
        depends.args(["depends", package]).env("LC_ALL", "C");
        let depends = cmd::output(&mut depends)?;
        Ok(depends.lines().find_map(|line| line.trim().strip_prefix("Depends: ")).map(str::to_owned))
    }

    /// Fetches the package lists, once. A failure is ignored: old lists may do, and the installation fails if they do
    /// not.
    fn update(&mut self) {
        if self.updated || !cmd::can_be_root() {
            return;
        }
        self.updated = true;
        if let Err(error) = apt_get(&["update".into()]) {
            eprintln!("setup: going on with the old lists of Debian's packages: {error:#}");
        }
    }
}

fn is_here() -> bool {
    cmd::find_program("apt-get").is_some()
}

/// Runs apt-get as root, without questions; shows its output only if it fails.
fn apt_get(arguments: &[OsString]) -> Result<()> {
    let options = ["DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-o", "DPkg::Lock::Timeout=600"];
    let arguments: Vec<_> = options.iter().map(OsString::from).chain(arguments.iter().cloned()).collect();
    let env = cmd::find_program("env").unwrap_or_else(|| PathBuf::from("/usr/bin/env"));
    cmd::output(cmd::as_root(Path::new(&env), &arguments)?.stdin(Stdio::null())).map(drop)
}

fn parse_candidate(policy: &str) -> Option<String> {
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (version != "(none)").then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidate_is_read() {
        let policy =
            "rustc-web:\n  Installed: (none)\n  Candidate: 1.96.0+dfsg1-1~deb12u2\n  Version table:\n";
        assert_eq!(parse_candidate(policy).as_deref(), Some("1.96.0+dfsg1-1~deb12u2"));
    }

    #[test]
    fn package_without_candidate() {
        assert_eq!(parse_candidate("rustc-web:\n  Installed: (none)\n  Candidate: (none)\n"), None);
        assert_eq!(parse_candidate(""), None);
    }
}
