//! `cargo xtask crds`: the custom resource definitions, as the agent itself makes them from its types.

use anyhow::Result;

use crate::{
    build, cmd,
    setup::{self, Scope},
    workspace,
};

/// `cargo xtask crds`. A unit test of the agent fails where they are out of date.
///
/// # Errors
/// Setup or the build fails, or the files cannot be written.
pub(crate) fn main() -> Result<()> {
    let ready = setup::ensure(Scope::Build)?;
    build::objects(&ready.ebpf)?;
    let mut agent = cmd::cargo();
    agent.args(["run", "--quiet", "--package", "bridge-agent", "--bin", "bridge-agent", "--"]);
    agent.args(["crds", "--directory", "deploy/kubernetes/crds"]);
    cmd::run(agent.current_dir(workspace::root()))
}
