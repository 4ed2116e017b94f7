//! What a machine does.

use std::{fs, path::Path, time::Duration};

use anyhow::Result;

use crate::build;

/// A command.
pub(super) struct Job {
    name: String,
    /// To be run by a shell in the folder of the repository.
    command: String,
    pub(super) limit: Duration,
}

/// What came of a job.
pub(super) struct Outcome {
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
        Self { ok: read("status").trim() == "0", output: read("out"), errors: read("err") }
    }

    /// The end of what a failed one has written.
    pub(super) fn why(&self) -> String {
        let lines: Vec<_> = self.output.lines().chain(self.errors.lines()).collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

/// The scenes.
///
/// # Errors
/// They cannot be built.
pub(super) fn scenes() -> Result<Job> {
    let program = build::program(false, "bridge-tests", "lab")?;
    Ok(Job::new("scenes", format!("{} --once --json", program.display()), Duration::from_secs(400)))
}
