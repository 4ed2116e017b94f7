//! `cargo xtask crds`: writes the custom resource definitions and their reference, which the agent makes from its types.

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
    for target in [["--directory", "deploy/kubernetes/crds"], ["--reference", "docs/kubernetes.md"]] {
        let mut agent = cmd::cargo();
        agent.args(["run", "--quiet", "--package", "bridge-agent", "--bin", "bridge-agent", "--"]);
        agent.arg("crds").args(target);
        cmd::run(agent.current_dir(workspace::root()))?;
    }
    Ok(())
}
