//! `kubectl bridge COMMAND`: a command of the agent on every node of a cluster, by `pods/exec`.
//!
//! The same program, started under the name `kubectl-bridge`. It runs `kubectl` for the cluster's part, so that contexts,
//! credential plugins and proxies are those of the user.

mod merge;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, Command, ExitCode, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use clap::Parser;
use serde::Deserialize;

use merge::Answer;

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
                  kubectl bridge --node node-1 monitor --verdict reject\n\nExit code 1: the command failed on a node."
)]
struct Plugin {
    /// The kubeconfig, as for kubectl
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<String>,
    /// The context, as for kubectl
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// The namespace of the agents
    #[arg(long, short, default_value = "bridge-system")]
    namespace: String,
    /// The label of the agents' pods
    #[arg(long, short = 'l', value_name = "LABEL", default_value = "app.kubernetes.io/name=bridge-agent")]
    selector: String,
    /// Only this node; may be repeated
    #[arg(long, value_name = "NAME")]
    node: Vec<String>,
    /// A command of bridge-agent with its arguments, such as status, flows, rules, monitor; --json after it merges JSON
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Why no node could be asked.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot run kubectl: {0}; is it in PATH?")]
    Kubectl(#[source] io::Error),
    #[error("kubectl cannot list the agents: {0}")]
    List(String),
    #[error("kubectl lists the agents in a form that is not understood: {0}")]
    Form(#[from] serde_json::Error),
    #[error(
        "no agent runs in namespace {namespace} under the label {selector}{nodes}; see --namespace, --selector and --node"
    )]
    NoAgents { namespace: String, selector: String, nodes: String },
}

/// An agent's pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Agent {
    node: String,
    pod: String,
}

/// Runs the plugin with the arguments of this process.
#[must_use]
pub fn main() -> ExitCode {
    let plugin = Plugin::parse();
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
        let agents = self.agents()?;
        if self.is_endless() { self.stream(&agents) } else { self.collect(&agents) }
    }

    fn kubectl(&self) -> Command {
        let mut kubectl = Command::new("kubectl");
        for (option, value) in [("kubeconfig", &self.kubeconfig), ("context", &self.context)] {
            kubectl.args(value.iter().map(|value| format!("--{option}={value}")));
        }
        kubectl.arg(format!("--namespace={}", self.namespace)).stdin(Stdio::null());
        kubectl
    }

    /// Returns the running agents, ordered by node.
    fn agents(&self) -> Result<Vec<Agent>, Error> {
        let mut list = self.kubectl();
        list.args(["get", "pods", "--output=json"]).arg(format!("--selector={}", self.selector));
        let output = list.output().map_err(Error::Kubectl)?;
        if !output.status.success() {
            return Err(Error::List(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        }
        let wanted = |agent: &Agent| self.node.is_empty() || self.node.contains(&agent.node);
        let agents: Vec<_> = running(&output.stdout)?.into_iter().filter(wanted).collect();
        if agents.is_empty() {
            let nodes = self.node.iter().map(|node| format!(" on {node}")).collect();
            let (namespace, selector) = (self.namespace.clone(), self.selector.clone());
            return Err(Error::NoAgents { namespace, selector, nodes });
        }
        Ok(agents)
    }

    fn exec(&self, agent: &Agent, arguments: &[String]) -> Command {
        let mut exec = self.kubectl();
        exec.args(["exec", &agent.pod, "--container=bridge-agent", "--", "bridge-agent"]).args(arguments);
        exec
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
                        let output = self.exec(agent, &arguments).output();
                        *slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(output);
                    }
                });
            }
        });
        let mut answers = Vec::new();
        let mut ok = true;
        for (agent, slot) in agents.iter().zip(outputs) {
            let output = slot.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
            let output =
                output.unwrap_or_else(|| Err(io::ErrorKind::Interrupted.into())).map_err(Error::Kubectl)?;
            ok &= output.status.success();
            report(&agent.node, &String::from_utf8_lossy(&output.stderr));
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
        Ok(ok)
    }

    /// Prints each line that the nodes print, under the name of its node.
    fn stream(&self, agents: &[Agent]) -> Result<bool, Error> {
        let width = agents.iter().map(|agent| agent.node.len()).max().unwrap_or(0);
        let mut children = Vec::new();
        for agent in agents {
            let mut exec = self.exec(agent, &self.command);
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

/// Reads the running pods of `kubectl get pods --output=json`, ordered by node.
fn running(list: &[u8]) -> Result<Vec<Agent>, serde_json::Error> {
    #[derive(Deserialize)]
    struct List {
        items: Vec<Pod>,
    }
    #[derive(Deserialize)]
    struct Pod {
        metadata: Metadata,
        spec: Spec,
        #[serde(default)]
        status: Status,
    }
    #[derive(Deserialize)]
    struct Metadata {
        name: String,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Spec {
        #[serde(default)]
        node_name: String,
    }
    #[derive(Default, Deserialize)]
    struct Status {
        #[serde(default)]
        phase: String,
    }
    let list: List = serde_json::from_slice(list)?;
    let running = list.items.into_iter().filter(|pod| pod.status.phase == "Running");
    let mut agents: Vec<_> =
        running.map(|pod| Agent { node: pod.spec.node_name, pod: pod.metadata.name }).collect();
    agents.sort();
    Ok(agents)
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
        assert_eq!(plugin.node, ["a", "b"]);
        assert_eq!(plugin.command, ["flows", "--state", "open", "--json"]);
        assert!(plugin.is_json() && !plugin.is_endless());
        let plugin = Plugin::try_parse_from(["kubectl-bridge", "ports", "watch"]).unwrap();
        assert!(plugin.is_endless());
        assert!(Plugin::try_parse_from(["kubectl-bridge"]).is_err());
    }

    #[test]
    fn only_running_pods_are_asked_in_order_of_nodes() {
        let list = r#"{"items": [
            {"metadata": {"name": "z"}, "spec": {"nodeName": "b"}, "status": {"phase": "Running"}},
            {"metadata": {"name": "y"}, "spec": {"nodeName": "a"}, "status": {"phase": "Running"}},
            {"metadata": {"name": "x"}, "spec": {}, "status": {"phase": "Pending"}}]}"#;
        let agents = running(list.as_bytes()).unwrap();
        assert_eq!(agents.iter().map(|agent| agent.pod.as_str()).collect::<Vec<_>>(), ["y", "z"]);
    }
}
