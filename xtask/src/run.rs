//! `cargo xtask run`, `bench` and the other programs of the lab: build, and become the program, as root.

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
        built(false, "bridge-lab", "lab", lab)
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
    built(true, "bridge-lab", "bench", arguments)
}

/// `cargo xtask attack`, `gap`, `model`, `parity`, `soak`: the program of that name, optimised unless its time goes to
/// the kernel and iptables.
///
/// # Errors
/// Setup or the build fails, or the program cannot be started.
pub(crate) fn tool(name: &str, arguments: &[OsString]) -> Result<()> {
    built(name != "parity", "bridge-lab", name, arguments)
}

/// `cargo xtask record`.
///
/// # Errors
/// Setup or the build fails, or the program cannot be started.
pub(crate) fn record() -> Result<()> {
    built(false, "bridge-lab", "record", &[crate::workspace::root().join("docs").into()])
}

/// Builds binary `bin` of `package`, and the agent beside it, and becomes it.
fn built(release: bool, package: &str, bin: &str, arguments: &[OsString]) -> Result<()> {
    let ready = setup::ensure(Scope::Lab)?;
    build::objects(&ready.ebpf)?;
    let program = build::program(release, package, bin)?;
    cmd::become_command(&mut cmd::as_root(&program, arguments)?)
}
