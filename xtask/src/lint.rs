//! `cargo xtask lint`: checks that run no test.

use anyhow::Result;

use crate::{
    abi, build, cmd, docs, prose,
    setup::{self, Checks, Ready, Scope},
    steps::Steps,
    workspace,
};

/// `cargo xtask lint`.
///
/// # Errors
/// Setup or a check fails.
pub(crate) fn main() -> Result<()> {
    let mut steps = Steps::default();
    if let Some((ready, checks)) = prepare(&mut steps) {
        check(&mut steps, &ready, &checks);
    }
    steps.finish()
}

/// Sets up and builds the prerequisites of every other step; `None` if that failed.
pub(crate) fn prepare(steps: &mut Steps) -> Option<(Ready, Checks)> {
    let mut ready = steps.step("setup", || setup::ensure(Scope::Test))?;
    let checks = ready.checks.take()?;
    let built = steps.step("eBPF objects", || build::objects(&ready.ebpf));
    steps.closing(Some(format!("compiled by {}", ready.ebpf.name)));
    built?;
    Some((ready, checks))
}

/// Every check.
pub(crate) fn check(steps: &mut Steps, ready: &Ready, checks: &Checks) {
    steps.step("rustfmt", || cargo(&["fmt", "--all", "--check"]));
    steps.step("clippy", || {
        cargo(&["clippy", "--workspace", "--exclude", "bridge-ebpf", "--all-targets", "--", "-D", "warnings"])
    });
    steps.step("clippy, kernel side", || build::lint_objects(&ready.ebpf));
    steps.step("licences, bans, sources", || {
        let mut deny = cmd::command(&checks.deny);
        deny.args(["--workspace", "check", "--hide-inclusion-graph", "licenses", "bans", "sources"]);
        cmd::run(deny.current_dir(workspace::root()))
    });
    advisories(steps, checks);
    steps.step("unused dependencies", || {
        let mut machete = cmd::command(&checks.machete);
        cmd::run(machete.arg("--skip-target-dir").current_dir(workspace::root()))
    });
    steps.step("ABI", abi::check);
    steps.step("words", prose::check_words);
    steps.step("links of the documentation", docs::check);
    // A release archive has no history.
    steps.step_or_not_run("commit subjects", workspace::root().join(".git").exists(), prose::check_subjects);
}

/// Checks the dependencies for known vulnerabilities. Without network access, the table lists this check as not run.
fn advisories(steps: &mut Steps, checks: &Checks) {
    /// In seconds: who cannot be reached may not say so.
    const PATIENCE: &str = "60";
    let deny = |arguments: &[&str]| {
        let mut deny = cmd::command("timeout");
        deny.arg(PATIENCE).arg(&checks.deny).arg("--workspace").args(arguments);
        cmd::run(deny.current_dir(workspace::root()))
    };
    if steps.step_or_not_run("database of advisories", false, || deny(&["fetch", "db"])).is_some() {
        steps.step("advisories", || {
            deny(&["check", "--disable-fetch", "--hide-inclusion-graph", "advisories"])
        });
    }
}

fn cargo(arguments: &[&str]) -> Result<()> {
    cmd::run(cmd::cargo().args(arguments).current_dir(workspace::root()))
}
