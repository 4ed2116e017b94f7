//! A run of several steps, each timed, with a table at the end.

use std::{
    fmt,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Steps that were run. A failed one does not keep the next from running, so that one run shows all that is wrong.
#[derive(Default)]
pub(crate) struct Steps {
    /// Part of the names of the steps to run.
    filter: Option<String>,
    done: Vec<Step>,
}

struct Step {
    name: &'static str,
    took: Duration,
    outcome: Outcome,
    /// Closing line of a test runner.
    closing: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Ok,
    Failed,
    /// A prerequisite is unavailable here; the table says so.
    NotRun,
}

impl Steps {
    /// Skips each step whose name does not contain `filter`.
    pub(crate) fn only(filter: Option<String>) -> Self {
        Self { filter, done: Vec::new() }
    }

    /// Runs `action` under `name`; nothing is returned if it failed or was skipped.
    pub(crate) fn step<T>(&mut self, name: &'static str, action: impl FnOnce() -> Result<T>) -> Option<T> {
        self.step_or_not_run(name, true, action)
    }

    /// As [`Self::step`]; but where it is not `required`, a failure is listed as not run, and fails nothing.
    pub(crate) fn step_or_not_run<T>(
        &mut self,
        name: &'static str,
        required: bool,
        action: impl FnOnce() -> Result<T>,
    ) -> Option<T> {
        if self.filter.as_deref().is_some_and(|filter| !name.contains(filter)) {
            return None;
        }
        println!("==> {name}");
        let start = Instant::now();
        let result = action();
        let took = start.elapsed();
        let (mut outcome, mut closing) = (Outcome::Ok, None);
        if let Err(error) = &result {
            let text = format!("{error:#}");
            eprintln!("error: {name}: {text}");
            outcome = if required { Outcome::Failed } else { Outcome::NotRun };
            closing = text.lines().next().filter(|_| !required).map(str::to_owned);
        }
        self.done.push(Step { name, took, outcome, closing });
        result.ok()
    }

    /// Shows `line` beside the last step.
    pub(crate) fn closing(&mut self, line: Option<String>) {
        if let Some(step) = self.done.last_mut() {
            step.closing = line;
        }
    }

    /// Prints the table.
    ///
    /// # Errors
    /// A step failed, or the filter left none.
    pub(crate) fn finish(self) -> Result<()> {
        println!("\n{self}");
        if let Some(filter) = self.filter.filter(|_| self.done.is_empty()) {
            bail!("no step's name contains {filter:?}");
        }
        let failed: Vec<_> =
            self.done.iter().filter(|step| step.outcome == Outcome::Failed).map(|step| step.name).collect();
        if !failed.is_empty() {
            bail!("failed: {}", failed.join("; "));
        }
        Ok(())
    }
}

impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for step in &self.done {
            let outcome = match step.outcome {
                Outcome::Ok => "ok     ",
                Outcome::Failed => "FAILED ",
                Outcome::NotRun => "NOT RUN",
            };
            write!(f, "{outcome} {:7.1} s  {}", step.took.as_secs_f64(), step.name)?;
            if let Some(closing) = &step.closing {
                write!(f, ": {closing}")?;
            }
            writeln!(f)?;
        }
        let total: Duration = self.done.iter().map(|step| step.took).sum();
        write!(f, "        {:7.1} s  in all", total.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn a_failed_step_fails_the_run_and_not_the_next_step() {
        let mut steps = Steps::default();
        assert_eq!(steps.step("first", || Ok(1)), Some(1));
        assert_eq!(steps.step("second", || Err::<(), _>(anyhow!("broken"))), None);
        assert_eq!(steps.step("third", || Ok(3)), Some(3));
        steps.closing(Some("7 tests run".into()));
        let table = steps.to_string();
        assert!(table.contains("FAILED") && table.contains("third: 7 tests run"), "{table}");
        assert_eq!(steps.finish().unwrap_err().to_string(), "failed: second");
    }

    #[test]
    fn an_unavailable_step_is_listed_as_not_run_or_fails_where_required() {
        let mut steps = Steps::default();
        steps.step_or_not_run("server", false, || Err::<(), _>(anyhow!("no network")));
        assert!(
            steps.to_string().contains("NOT RUN") && steps.to_string().contains(": no network"),
            "{steps}"
        );
        steps.finish().unwrap();
        let mut steps = Steps::default();
        steps.step_or_not_run("server", true, || Err::<(), _>(anyhow!("no network")));
        steps.finish().unwrap_err();
    }

    #[test]
    fn a_filter_skips_other_steps_and_fails_if_it_leaves_none() {
        let mut steps = Steps::only(Some("deb".into()));
        assert_eq!(steps.step("the .rpm", || Err::<(), _>(anyhow!("broken"))), None);
        assert_eq!(steps.step("the .deb", || Ok(1)), Some(1));
        steps.finish().unwrap();
        let mut steps = Steps::only(Some("deb".into()));
        steps.step_or_not_run("the .rpm", false, || Err::<(), _>(anyhow!("broken")));
        assert_eq!(steps.finish().unwrap_err().to_string(), "no step's name contains \"deb\"");
    }

    #[test]
    fn a_run_without_failures_succeeds() {
        let mut steps = Steps::default();
        steps.step("only", || Ok(()));
        steps.finish().unwrap();
    }
}
