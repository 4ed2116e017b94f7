//! `kubectl bridge COMMAND`: a command of the agent on every node of a cluster, by `pods/exec`.
//!
//! The same program, started under the name `kubectl-bridge`. It runs `kubectl` for the cluster's part, so that contexts,
//! credential plugins and proxies are those of the user.

mod merge;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, ExitCode, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use clap::Parser;

use self::merge::Answer;
use super::ui::{self, Listen};
use crate::kubectl::{Access, Agent, Error};
use crate::ui::Source;

/// The file name that makes the agent this plugin.
pub const NAME: &str = "kubectl-bridge";
/// Nodes that are asked at the same time.
const PARALLEL: usize = 16;

/// Run a command of bridge-agent on every node, and show the answers as one
#[derive(Debug, Parser)]
#[command(
    name = "kubectl bridge",
    version,
    after_help = "Examples:\n  kubectl bridge status\n  kubectl bridge flows --state established\n  \
                  kubectl bridge --node node-1 monitor --verdict reject\n  kubectl bridge ui\n\n\
                  Exit code 1: the command failed on a node."
)]
struct Plugin {
    #[command(flatten)]
    access: Access,
    /// A command of bridge-agent with its arguments, such as status, flows, rules, monitor; --json after it merges JSON
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Serve a page that shows every node, until Ctrl-C
#[derive(Debug, Parser)]
#[command(name = "ui", bin_name = "kubectl bridge ui")]
struct PageCommand {
    #[command(flatten)]
    listen: Listen,
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
}

/// Runs the plugin with the arguments of this process.
#[must_use]
pub fn main() -> ExitCode {
    let plugin = Plugin::parse();
    // The page runs here, not on the nodes.
    if plugin.command.first().is_some_and(|command| command == "ui") {
        let PageCommand { listen, json } = PageCommand::parse_from(&plugin.command);
        return match ui::serve(&listen, Source::Cluster(plugin.access), json) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {error}");
                ExitCode::FAILURE
            }
        };
    }
    match plugin.run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

impl Plugin {
    /// Returns whether the command succeeded on every node.
    fn run(&self) -> Result<bool, Error> {
        let agents = self.access.listed(self.access.list().output())?;
        if self.is_endless() { self.stream(&agents) } else { self.collect(&agents) }
    }

    fn is_json(&self) -> bool {
        self.command.iter().any(|word| word == "--json")
    }

    /// Whether the command prints events until it is interrupted.
    fn is_endless(&self) -> bool {
        self.command.iter().any(|word| matches!(word.as_str(), "monitor" | "watch" | "--watch" | "--follow"))
    }

    /// Runs the command on each node to its end, and prints the answers merged.
    fn collect(&self, agents: &[Agent]) -> Result<bool, Error> {
        // The summary is made of the JSON form.
        let is_summary = self.command == ["status"];
        let mut arguments = self.command.clone();
        if is_summary {
            arguments.push("--json".to_owned());
        }
        let next = AtomicUsize::new(0);
        let outputs: Vec<Mutex<Option<io::Result<Output>>>> =
            agents.iter().map(|_| Mutex::default()).collect();
        thread::scope(|scope| {
            for _ in 0..PARALLEL.min(agents.len()) {
                scope.spawn(|| {
                    while let Some((agent, slot)) = {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        agents.get(index).zip(outputs.get(index))
                    } {
                        let output = self.access.exec(agent, &arguments).output();
                        *slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(output);
                    }
                });
            }
        });
        let mut answers = Vec::new();
        let (mut ok, mut remedy) = (true, None);
        for (agent, slot) in agents.iter().zip(outputs) {
            let output = slot.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
            let output =
                output.unwrap_or_else(|| Err(io::ErrorKind::Interrupted.into())).map_err(Error::Kubectl)?;
            ok &= output.status.success();
            let errors = String::from_utf8_lossy(&output.stderr);
            report(&agent.node, &errors);
            remedy = remedy.or_else(|| self.access.remedy(&errors).filter(|_| !output.status.success()));
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            answers.push(Answer { node: agent.node.clone(), text });
        }
        let text = if is_summary {
            merge::status(&answers)
        } else if self.is_json() {
            merge::json(&answers)
        } else {
            merge::text(&answers)
        };
        print(&text);
        if let Some(remedy) = remedy {
            eprintln!("{remedy}");
        }
        Ok(ok)
    }

    /// Prints each line that the nodes print, under the name of its node.
    fn stream(&self, agents: &[Agent]) -> Result<bool, Error> {
        let width = agents.iter().map(|agent| agent.node.len()).max().unwrap_or(0);
        let mut children = Vec::new();
        for agent in agents {
            let mut exec = self.access.exec(agent, &self.command);
            let child = exec.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(Error::Kubectl)?;
            children.push((agent, child));
        }
        let json = self.is_json();
        let results = thread::scope(|scope| {
            let threads: Vec<_> = children
                .into_iter()
                .map(|(agent, child)| scope.spawn(move || follow(&agent.node, child, width, json)))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or(false)).collect::<Vec<_>>()
        });
        Ok(results.into_iter().all(|ok| ok))
    }
}

/// Prints the lines of one node; returns whether its command succeeded.
fn follow(node: &str, mut child: Child, width: usize, json: bool) -> bool {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        scope.spawn(|| lines(stderr).for_each(|line| report(node, &line)));
        for line in lines(stdout) {
            print(&if json { merge::json_line(node, &line) } else { format!("{node:width$}  {line}\n") });
        }
    });
    child.wait().is_ok_and(|status| status.success())
}

/// Returns the lines of a pipe, as they arrive.
fn lines(pipe: Option<impl Read>) -> impl Iterator<Item = String> {
    let lines = pipe.into_iter().flat_map(|pipe| BufReader::new(pipe).split(b'\n').map_while(Result::ok));
    lines.map(|line| String::from_utf8_lossy(&line).into_owned())
}

/// Prints the error lines of a node.
fn report(node: &str, text: &str) {
    // kubectl adds the exit code, which this program has, too.
    for line in text.lines().filter(|line| !line.starts_with("command terminated with exit code")) {
        eprintln!("{node}: {line}");
    }
}

/// Prints; ends the program once nothing reads any more.
fn print(text: &str) {
    let mut stdout = io::stdout().lock();
    if stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_err() {
        std::process::exit(0);
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_is_consistent_and_arguments_of_the_agent_pass_through() {
        Plugin::command().debug_assert();
        let words =
            ["kubectl-bridge", "-n", "x", "--node", "a", "--node", "b", "flows", "--state", "open", "--json"];
        let plugin = Plugin::try_parse_from(words).unwrap();
        assert_eq!(plugin.access.node, ["a", "b"]);
        assert_eq!(plugin.command, ["flows", "--state", "open", "--json"]);
        assert!(plugin.is_json() && !plugin.is_endless());
        let plugin = Plugin::try_parse_from(["kubectl-bridge", "ports", "watch"]).unwrap();
        assert!(plugin.is_endless());
        assert!(Plugin::try_parse_from(["kubectl-bridge"]).is_err());
    }
}
