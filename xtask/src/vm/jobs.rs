//! What a machine does.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result};

use crate::{build, cmd, workspace};

/// The tests that are run beside the scenes, each a program of its own, with a part of the names if not all are.
const TESTS: [(&str, &str); 3] = [("pool_connect", ""), ("pool_run", ""), ("enforcement", "restart")];

/// A command.
pub(super) struct Job {
    name: String,
    /// To be run by a shell in the folder of the repository.
    command: String,
    pub(super) limit: Duration,
}

/// What came of a job.
pub(super) struct Outcome {
    pub(super) name: String,
    pub(super) ok: bool,
    pub(super) output: String,
    pub(super) errors: String,
}

impl Job {
    fn new(name: &str, command: String, limit: Duration) -> Self {
        Self { name: name.to_owned(), command, limit }
    }

    pub(super) fn of_user(words: &[String]) -> Self {
        Self::new("command", words.join(" "), Duration::from_secs(900))
    }

    /// As the machine reads it.
    pub(super) fn line(&self) -> String {
        format!("{}\t{}\t{}\n", self.name, self.limit.as_secs(), self.command)
    }
}

impl Outcome {
    pub(super) fn read(job: &Job, directory: &Path) -> Self {
        let read = |kind: &str| {
            let path = directory.join(format!("{}.{kind}", job.name));
            fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
        };
        Self {
            name: job.name.clone(),
            ok: read("status").trim() == "0",
            output: read("out"),
            errors: read("err"),
        }
    }

    /// The end of what a failed one has written.
    pub(super) fn why(&self) -> String {
        let lines: Vec<_> = self.output.lines().chain(self.errors.lines()).collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

/// The scenes, and the tests that tell kernels apart.
///
/// # Errors
/// Something cannot be built.
pub(super) fn all() -> Result<Vec<Job>> {
    let scenes = build::program(false, "bridge-tests", "lab")?;
    let mut jobs =
        vec![Job::new("scenes", format!("{} --once --json", scenes.display()), Duration::from_secs(400))];
    for (test, filter) in TESTS {
        let program = test_program(test)?;
        jobs.push(Job::new(test, format!("{program} --test-threads=1 {filter}"), Duration::from_secs(600)));
    }
    Ok(jobs)
}

/// Builds a test program and returns its path.
fn test_program(name: &str) -> Result<String> {
    let mut cargo = cmd::cargo();
    cargo
        .args([
            "test",
            "--quiet",
            "--package",
            "bridge-tests",
            "--no-run",
            "--message-format=json",
            "--test",
            name,
        ])
        .current_dir(workspace::root());
    let messages = cmd::output(&mut cargo)?;
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(str::to_owned))
        .with_context(|| format!("cargo built no test program {name}"))
}
