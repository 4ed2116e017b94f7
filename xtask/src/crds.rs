//! `cargo xtask crds`: writes the custom resource definitions, their reference, the schema of the configuration file, and the
//! description of the API, which the agent makes from its types.

use std::fs;

use anyhow::{Context, Result};

use crate::{
    build, cmd,
    setup::{self, Scope},
    workspace,
};

/// Schema of the configuration file, for editors.
const SCHEMA: &str = "deploy/bridge.schema.json";

/// Description of the API.
const API: &str = "docs/openapi.json";

/// `cargo xtask crds`. A unit test of the agent fails where they are out of date.
///
/// # Errors
/// Setup or the build fails, or the files cannot be written.
pub(crate) fn main() -> Result<()> {
    let ready = setup::ensure(Scope::Build)?;
    build::objects(&ready.ebpf)?;
    let agent = || {
        let mut agent = cmd::cargo();
        agent.args(["run", "--quiet", "--package", "bridge-agent", "--bin", "bridge-agent", "--"]);
        agent.current_dir(workspace::root());
        agent
    };
    for target in [["--directory", "deploy/kubernetes/crds"], ["--reference", "docs/kubernetes.md"]] {
        cmd::run(agent().arg("crds").args(target))?;
    }
    let schema = cmd::output(agent().args(["check", "--schema"]))?;
    fs::write(workspace::root().join(SCHEMA), schema).context(SCHEMA)?;
    let api = cmd::output(agent().args(["generate", "--openapi"]))?;
    fs::write(workspace::root().join(API), api).context(API)?;
    Ok(())
}
