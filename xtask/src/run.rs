//! `cargo xtask run`, `bench`, `gap`, `model`, `soak` and their like: build, and become the program, as root.

use std::ffi::OsString;

use anyhow::Result;

use crate::{
    build, cmd,
    setup::{self, Scope},
};

/// `cargo xtask run`: the lab, or with arguments for it the agent on this host.
///
/// # Errors
/// Setup or the build fails, or the program cannot be started.
pub(crate) fn main(lab: &[OsString], agent: &[OsString]) -> Result<()> {
    if agent.is_empty() {
        built(false, "bridge-tests", "lab", lab)
    } else {
        built(false, "bridge-agent", "bridge-agent", agent)
    }
}

/// `cargo xtask bench`.
///
/// # Errors
/// Setup or the build fails, or the program cannot be started.
pub(crate) fn bench(arguments: &[OsString]) -> Result<()> {
    if arguments.iter().any(|argument| argument == "--kube") {
        setup::kube_assets::ensure()?;
    }
    built(true, "bridge-tests", "bench", arguments)
}

/// `cargo xtask attack`.
///
/// # Errors
/// Setup or the build fails, or the program cannot be started.
pub(crate) fn attack(arguments: &[OsString]) -> Result<()> {
    built(true, "bridge-tests", "attack", arguments)
}

/// `cargo xtask gap`.
///
/// # Errors
/// Setup or the build fails, or the program cannot be started.
pub(crate) fn gap(arguments: &[OsString]) -> Result<()> {
    built(true, "bridge-tests", "gap", arguments)
}

/// `cargo xtask parity`. Not optimised: what takes its time is the kernel and iptables.
///
/// # Errors
/// Setup or the build fails, or the program cannot be started.
pub(crate) fn parity(arguments: &[OsString]) -> Result<()> {
    built(false, "bridge-tests", "parity", arguments)
}

/// `cargo xtask model`.
///
/// # Errors
/// Setup or the build fails, or the program cannot be started.
pub(crate) fn model(arguments: &[OsString]) -> Result<()> {
    built(true, "bridge-tests", "model", arguments)
}

/// `cargo xtask soak`.
///
/// # Errors
/// Setup or the build fails, or the program cannot be started.
pub(crate) fn soak(arguments: &[OsString]) -> Result<()> {
    built(true, "bridge-tests", "soak", arguments)
}

/// Builds binary `bin` of `package`, and the agent beside it, and becomes it.
fn built(release: bool, package: &str, bin: &str, arguments: &[OsString]) -> Result<()> {
    let ready = setup::ensure(Scope::Lab)?;
    build::objects(&ready.ebpf)?;
    let program = build::program(release, package, bin)?;
    cmd::become_command(&mut cmd::as_root(&program, arguments)?)
}
