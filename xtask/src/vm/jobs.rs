//! Jobs of a virtual machine and their results.

use std::{fs, path::Path, time::Duration};

use anyhow::Result;
use serde_json::Value;

use crate::build;

/// Tests that are to be run on every kernel, by file and, where not all of the file are, by name.
const TESTS: [(&str, &[&str]); 3] = [
    (
        "pool_connect",
        &[
            "a_full_pool_is_eaddrnotavail_at_once_with_an_event_and_a_counter",
            "one_port_serves_many_destinations_and_two_pods_never_the_same",
            "a_port_that_a_program_binds_itself_is_adopted_or_refused",
            "udp_connected_and_unconnected",
            "ipv6_and_what_the_pool_is_not_for",
        ],
    ),
    ("pool_run", &["what_is_held_outlives_kill_and_restart_and_down_leaves_no_trace"]),
    // It needs a machine of its own, and is left to this.
    ("wall_clock", &[]),
];

/// Seconds that a job may take: several times its duration on idle processors.
const LIMIT: u64 = 900;
/// The same for the gap meter, which takes 800 s there beside another kernel.
const GAP_LIMIT: u64 = 2400;

/// The exit code of `timeout` for a command that it has ended.
const CUT: &str = "124";

/// A command.
pub(super) struct Job {
    name: &'static str,
    /// To be run by a shell in the folder of the repository.
    command: String,
    limit: Duration,
}

/// Result of a job.
pub(super) struct Outcome {
    pub(super) name: &'static str,
    pub(super) ok: bool,
    /// Whether its time was over before its end.
    pub(super) is_cut: bool,
    pub(super) output: String,
    pub(super) errors: String,
}

impl Job {
    const fn new(name: &'static str, command: String, seconds: u64) -> Self {
        Self { name, command, limit: Duration::from_secs(seconds) }
    }

    pub(super) fn of_user(words: &[String]) -> Self {
        Self::new("command", words.join(" "), LIMIT)
    }

    /// As the machine reads it.
    fn line(&self) -> String {
        format!("{}\t{}\t{}\n", self.name, self.limit.as_secs(), self.command)
    }
}

/// As the machine reads them.
pub(super) fn lines(jobs: &[Job]) -> String {
    jobs.iter().map(Job::line).collect()
}

/// For all of them.
pub(super) fn limit(jobs: &[Job]) -> Duration {
    jobs.iter().map(|job| job.limit).sum()
}

impl Outcome {
    pub(super) fn read(job: &Job, directory: &Path) -> Self {
        let read = |kind: &str| {
            let path = directory.join(format!("{}.{kind}", job.name));
            fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
        };
        let status = read("status");
        let (ok, is_cut) = (status.trim() == "0", status.trim() == CUT);
        Self { name: job.name, ok, is_cut, output: read("out"), errors: read("err") }
    }

    /// Returns the results of the job, each with whether it passed: scenes, rows of the gap meter, tests.
    pub(super) fn rows(&self) -> Vec<(String, bool)> {
        self.output.lines().filter_map(row).collect()
    }

    /// Returns the end of a failed job's output.
    pub(super) fn why(&self) -> String {
        let lines: Vec<_> = self.output.lines().chain(self.errors.lines()).collect();
        format!("{}:\n{}", self.name, lines[lines.len().saturating_sub(60)..].join("\n"))
    }
}

fn row(line: &str) -> Option<(String, bool)> {
    if let Some((test, result)) = line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")) {
        return Some((format!("`{test}`"), result == "ok"));
    }
    let row: Value = serde_json::from_str(line).ok()?;
    if let Some(scene) = row["name"].as_str() {
        return Some((scene.to_owned(), row["ok"].as_bool()?));
    }
    let (event, engines) = (row["what"].as_str()?, row["engines"].as_str()?);
    let clean = row["lost"].as_u64()? == 0 && row["leaked"].as_u64()? == 0;
    Some((format!("nothing lost, nothing let through: {event} ({engines})"), clean))
}

/// Everything that a kernel is to do.
///
/// # Errors
/// It cannot be built.
pub(super) fn all() -> Result<Vec<Job>> {
    let scenes = build::program(false, "bridge-lab", "lab")?;
    let gap = build::program(false, "bridge-lab", "gap")?;
    let gap = format!("{} --rate 200 --kills 1 --times 1 --rules 200 --json", gap.display());
    let mut jobs = vec![
        Job::new("scenes", format!("{} --once --json", scenes.display()), LIMIT),
        Job::new("gap", gap, GAP_LIMIT),
    ];
    let programs = build::tests("bridge-tests", &TESTS.map(|(file, _)| file))?;
    for ((name, program), (_, tests)) in programs.into_iter().zip(TESTS) {
        let command = format!("{} --include-ignored --test-threads 2 {}", program.display(), tests.join(" "));
        jobs.push(Job::new(name, command, LIMIT));
    }
    Ok(jobs)
}

#[cfg(test)]
impl Outcome {
    pub(super) fn of(output: &str) -> Self {
        Self { name: "job", ok: true, is_cut: false, output: output.to_owned(), errors: String::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scenes_rows_and_tests_are_read_and_nothing_else() {
        let output = "running 2 tests\ntest a_port ... ok\ntest a_pool ... FAILED\n\
             {\"name\":\"scene\",\"ok\":true}\n\
             {\"what\":\"kill\",\"engines\":\"ebpf\",\"lost\":0,\"leaked\":1}\ntest result: FAILED. 1 passed\n";
        let row = |name: &str, ok| (name.to_owned(), ok);
        let expected = [
            row("`a_port`", true),
            row("`a_pool`", false),
            row("scene", true),
            row("nothing lost, nothing let through: kill (ebpf)", false),
        ];
        assert_eq!(Outcome::of(output).rows(), expected);
    }

    #[test]
    fn a_machine_is_given_time_for_each_of_its_jobs() {
        let jobs = [Job::new("a", "x".into(), 5), Job::new("b", "y z".into(), 7)];
        assert_eq!(lines(&jobs), "a\t5\tx\nb\t7\ty z\n");
        assert_eq!(limit(&jobs), Duration::from_secs(12));
    }
}
