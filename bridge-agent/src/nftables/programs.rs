//! Running nft.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

use super::error::Error;
use crate::kernel::program;

/// How long nft may work. 50,000 elements take some seconds.
const WORK: Duration = Duration::from_secs(60);

/// Where nft is looked for.
#[derive(Clone, Debug)]
pub struct Programs {
    /// Directories, first match wins.
    pub search: Vec<PathBuf>,
}

impl Default for Programs {
    fn default() -> Self {
        Self { search: program::search_path() }
    }
}

impl Programs {
    /// Returns the path of nft.
    ///
    /// # Errors
    /// If it is not installed.
    pub fn nft(&self) -> Result<PathBuf, Error> {
        let mut paths = self.search.iter().map(|dir| dir.join("nft"));
        paths.find(|path| path.is_file()).ok_or(Error::ProgramMissing)
    }

    fn run(&self, arguments: &[&str], input: Option<&str>) -> Result<Output, Error> {
        let mut command = Command::new(self.nft()?);
        command.args(arguments);
        program::run(command, input, WORK).map_err(|error| match error {
            program::Error::Run(source) => Error::Run(source),
            program::Error::Hung(after) => Error::Hung(after),
        })
    }

    /// Applies a script. The kernel takes all of it or nothing.
    pub(super) fn apply(&self, script: &str) -> Result<(), Error> {
        let output = self.run(&["-f", "/dev/stdin"], Some(script))?;
        if output.status.success() {
            return Ok(());
        }
        Err(explain(script, &output.status.to_string(), &String::from_utf8_lossy(&output.stderr)))
    }

    /// Returns the output of a `list` command; `None` if the table does not exist.
    pub(super) fn list(&self, arguments: &[&str]) -> Result<Option<String>, Error> {
        let output = self.run(arguments, None)?;
        if output.status.success() {
            return Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned()));
        }
        let said = String::from_utf8_lossy(&output.stderr);
        if said.contains("No such file or directory") {
            return Ok(None);
        }
        Err(explain("", &output.status.to_string(), &said))
    }
}

/// Finds the line of the script that nft complains about.
fn explain(script: &str, status: &str, said: &str) -> Error {
    if said.contains("Operation not permitted") {
        return Error::NotPermitted;
    }
    let first = said.lines().map(str::trim).find(|line| line.contains("Error:")).unwrap_or_default();
    let reason = first.split_once("Error:").map_or(said.trim(), |(_, reason)| reason.trim()).to_owned();
    let number = first.split(':').nth(1).and_then(|number| number.trim().parse::<usize>().ok());
    let line = number.and_then(|number| script.lines().nth(number.checked_sub(1)?));
    match line {
        Some(line) => Error::Refused {
            rule: line
                .split('"')
                .nth(1)
                .filter(|_| line.contains(" comment \""))
                .unwrap_or("bridge")
                .to_owned(),
            line: line.trim().to_owned(),
            reason,
        },
        None => Error::Failed { status: status.to_owned(), reason },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_rule() {
        let script = "add element inet t m {\n\t1.2.3.4 . 6 . 80 counter comment \"web\" : accept,\n}\n";
        let said = "/dev/stdin:2:2-8: Error: Could not process rule: No space left on device\n\t1.2.3.4\n";
        let Error::Refused { rule, reason, .. } = explain(script, "exit status: 1", said) else { panic!() };
        assert_eq!(
            (rule.as_str(), reason.as_str()),
            ("web", "Could not process rule: No space left on device")
        );
        let said = "/dev/stdin:1:1-3: Error: syntax error\n";
        let Error::Refused { rule, line, .. } = explain(script, "exit status: 1", said) else { panic!() };
        assert_eq!((rule.as_str(), line.as_str()), ("bridge", "add element inet t m {"));
    }

    #[test]
    fn a_missing_program_is_reported_with_a_remedy() {
        let programs = Programs { search: vec!["/nonexistent".into()] };
        assert!(programs.nft().unwrap_err().to_string().contains("install the package nftables"));
    }
}
