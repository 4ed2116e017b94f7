//! `cargo xtask test`: every check and every test.

use std::{
    env,
    io::{BufRead, BufReader, IsTerminal, Write, stderr},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::{
    cluster, cmd, lint,
    setup::{Checks, kube_assets},
    steps::Steps,
    workspace::{self, Metadata},
};

/// The packages whose tests need root.
const PRIVILEGED: [&str; 2] = ["bridge-tests", "bridge-lab"];
/// cargo-nextest's exit code where a filter leaves no test (`NextestExitCode::NO_TESTS_RUN`).
const NO_TESTS_RUN: i32 = 4;

/// `cargo xtask test`.
///
/// # Errors
/// Setup, a check or a test fails, or `filter` matches no test.
pub(crate) fn main(filter: Option<&str>) -> Result<()> {
    let mut steps = Steps::default();
    let Some((ready, checks)) = lint::prepare(&mut steps) else { return steps.finish() };
    if filter.is_none() {
        lint::check(&mut steps, &ready, &checks);
    }
    let mut unprivileged = vec!["--workspace", "--exclude", "bridge-ebpf"];
    unprivileged.extend(PRIVILEGED.iter().flat_map(|package| ["--exclude", package]));
    let mut found = nextest(&mut steps, "unit tests", &checks, filter, &unprivileged, false);
    if filter.is_none() {
        steps.step("doc tests", || {
            let arguments = ["test", "--doc", "--workspace", "--exclude", "bridge-ebpf"];
            cmd::run(cmd::cargo().args(arguments).current_dir(workspace::root()))
        });
    }
    let mut privileged: Vec<&str> = PRIVILEGED.iter().flat_map(|package| ["--package", package]).collect();
    let mut excluded = Vec::new();
    if steps.step_or_not_run("API server of the Kubernetes tests", is_ci(), kube_assets::ensure).is_none() {
        excluded.push("not binary(kubernetes)");
    }
    let cluster = || cluster::ensure(None).map(drop);
    if steps.step_or_not_run("programs of the test cluster", is_ci(), cluster).is_none() {
        excluded.push("not binary(cluster)");
    }
    // Several -E would be joined by "or".
    let excluded = excluded.join(" and ");
    if !excluded.is_empty() {
        privileged.extend(["-E", &excluded]);
    }
    found |= nextest(&mut steps, "privileged tests", &checks, filter, &privileged, true);
    steps.finish()?;
    if !found {
        bail!("no test's name contains {:?}", filter.unwrap_or_default());
    }
    Ok(())
}

/// Returns whether this is CI, where a step that was not run would go unnoticed.
fn is_ci() -> bool {
    env::var_os("CI").is_some_and(|value| value == "true" || value == "1")
}

/// Runs the tests of `packages` (arguments of cargo); whether there were any.
fn nextest(
    steps: &mut Steps,
    name: &'static str,
    checks: &Checks,
    filter: Option<&str>,
    packages: &[&str],
    privileged: bool,
) -> bool {
    let result = steps.step(name, || {
        // The tests start the agent and the tools of the lab themselves.
        let build = ["build", "--package", "bridge-agent", "--package", "bridge-lab", "--bins"];
        if privileged {
            cmd::run(cmd::cargo().args(build).current_dir(workspace::root()))?;
        }
        let mut command = cmd::command(&checks.nextest);
        command
            .current_dir(workspace::root())
            .args(["nextest", "run", "--no-fail-fast"])
            .args(packages)
            .args(filter);
        // Errors name their cause; thirty frames of the test harness below each hide it.
        if env::var_os("RUST_BACKTRACE").is_none() || is_ci() {
            command.env("RUST_BACKTRACE", "0");
        }
        if privileged && !cmd::is_root() {
            run_tests_by_sudo(&mut command)?;
        }
        if stderr().is_terminal() {
            command.args(["--color", "always"]);
        }
        run_to_closing_line(&mut command, filter.is_some())
    });
    let closing = result.flatten();
    let found = closing.is_some();
    steps.closing(closing);
    found
}

/// Makes cargo start each test binary by sudo; cargo itself, and its output files, stay with the user.
pub(crate) fn run_tests_by_sudo(command: &mut Command) -> Result<()> {
    let sudo = cmd::as_root(Path::new("true"), &[]).context("the privileged tests need root")?;
    let sudo = sudo.get_program().to_owned();
    // Asks for the password now rather than in the middle of the tests.
    cmd::run(Command::new(&sudo).arg("-v"))?;
    let host = Metadata::host()?.to_uppercase().replace('-', "_");
    command.env(format!("CARGO_TARGET_{host}_RUNNER"), format!("{} -E", sudo.display()));
    Ok(())
}

/// Runs nextest, forwards its output, and returns its closing line; `None` if a filter left no test.
fn run_to_closing_line(command: &mut Command, filtered: bool) -> Result<Option<String>> {
    let shown = cmd::show(command);
    let mut child =
        command.stderr(Stdio::piped()).spawn().with_context(|| format!("cannot start `{shown}`"))?;
    let mut closing = None;
    let pipe = child.stderr.take().context("nextest has no standard error")?;
    for line in BufReader::new(pipe).split(b'\n') {
        let line = line?;
        stderr().write_all(&[&line[..], b"\n"].concat())?;
        let text = without_colours(&String::from_utf8_lossy(&line));
        if let Some(summary) = text.trim_start().strip_prefix("Summary ") {
            closing = Some(summary.to_owned());
        }
    }
    let status = child.wait()?;
    if filtered && status.code() == Some(NO_TESTS_RUN) {
        return Ok(None);
    }
    if !status.success() {
        bail!("{}", closing.unwrap_or_else(|| format!("`{shown}` failed ({status})")));
    }
    closing.map(Some).context("nextest has written no closing line")
}

/// `text` without the escape sequences that set colours (ECMA-48, SGR).
fn without_colours(text: &str) -> String {
    let mut parts = text.split("\x1b[");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |plain, part| plain + part.split_once('m').map_or(part, |(_, rest)| rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn closing_line_is_found_under_colours() {
        let script = r"printf '\033[32;1m     Summary\033[0m [   0.1s] 2 tests run: 2 passed\n' >&2";
        let closing = run_to_closing_line(&mut shell(script), false).unwrap();
        assert_eq!(closing.as_deref(), Some("[   0.1s] 2 tests run: 2 passed"));
    }

    #[test]
    fn failing_tests_and_a_run_without_tests_fail() {
        assert!(run_to_closing_line(&mut shell("echo Summary x >&2; exit 100"), false).is_err());
        assert!(run_to_closing_line(&mut shell("exit 4"), false).is_err());
        assert!(run_to_closing_line(&mut shell("exit 0"), false).is_err());
    }

    #[test]
    fn a_filter_may_leave_no_test_in_one_of_the_runs() {
        let closing = run_to_closing_line(&mut shell("echo Summary x >&2; exit 4"), true).unwrap();
        assert_eq!(closing, None);
    }
}
