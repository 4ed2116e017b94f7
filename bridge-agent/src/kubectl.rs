//! Agents of a cluster, reached by `kubectl exec`: contexts, credential plugins and proxies are those of the user.

use std::io;
use std::process::{Command, Stdio};

use clap::Args;
use serde::Deserialize;

const NAMESPACE: &str = "bridge-system";
const SELECTOR: &str = "app.kubernetes.io/name=bridge-agent";
const CONTAINER: &str = "bridge-agent";

/// Options that choose a cluster and its agents.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct Access {
    /// The kubeconfig, as for kubectl
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<String>,
    /// The context, as for kubectl
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
    /// The namespace of the agents
    #[arg(long, short, value_name = "NAME", default_value = NAMESPACE)]
    pub namespace: String,
    /// The label of the agents' pods
    #[arg(long, short = 'l', value_name = "LABEL", default_value = SELECTOR)]
    pub selector: String,
    /// Only this node; may be repeated
    #[arg(long, value_name = "NAME")]
    pub node: Vec<String>,
}

impl Default for Access {
    fn default() -> Self {
        let (namespace, selector) = (NAMESPACE.to_owned(), SELECTOR.to_owned());
        Self { kubeconfig: None, context: None, namespace, selector, node: Vec::new() }
    }
}

/// Why no node could be asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program does not start.
    #[error("cannot run kubectl: {0}; is it in PATH?")]
    Kubectl(#[source] io::Error),
    /// The API server or the kubeconfig refuses the list.
    #[error("kubectl cannot list the agents: {0}")]
    List(String),
    /// The list is no list of pods.
    #[error("kubectl lists the agents in a form that is not understood: {0}")]
    Form(#[from] serde_json::Error),
    /// The list is empty.
    #[error(
        "no agent runs in namespace {namespace} under the label {selector}{nodes}; see --namespace, --selector and --node"
    )]
    NoAgents {
        /// See [`Access::namespace`].
        namespace: String,
        /// See [`Access::selector`].
        selector: String,
        /// The selected nodes, each after ` on `.
        nodes: String,
    },
}

/// An agent's pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Agent {
    /// Name of its node.
    pub node: String,
    /// Name of the pod.
    pub pod: String,
}

impl Access {
    fn kubectl(&self) -> Command {
        let mut kubectl = Command::new("kubectl");
        for (option, value) in [("kubeconfig", &self.kubeconfig), ("context", &self.context)] {
            kubectl.args(value.iter().map(|value| format!("--{option}={value}")));
        }
        kubectl.arg(format!("--namespace={}", self.namespace)).stdin(Stdio::null());
        kubectl
    }

    /// Returns the command that lists the pods of the agents, for [`Self::listed`].
    pub(crate) fn list(&self) -> Command {
        let mut list = self.kubectl();
        list.args(["get", "pods", "--output=json", "--request-timeout=10s"]);
        list.arg(format!("--selector={}", self.selector));
        list
    }

    /// Returns the running agents of the selected nodes, ordered by node.
    pub(crate) fn listed(&self, output: io::Result<std::process::Output>) -> Result<Vec<Agent>, Error> {
        let output = output.map_err(Error::Kubectl)?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(Error::List(self.with_remedy(text)));
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

    /// Returns the command that runs `bridge-agent` with these arguments beside an agent, without standard input.
    pub(crate) fn exec(&self, agent: &Agent, arguments: &[String]) -> Command {
        let mut exec = self.kubectl();
        exec.args(["exec", &agent.pod]).arg(format!("--container={CONTAINER}"));
        exec.args(["--", "bridge-agent"]).args(arguments);
        exec
    }

    /// Returns the command that connects its standard input and output to the socket of an agent.
    pub(crate) fn dial(&self, agent: &Agent) -> Command {
        let mut exec = self.kubectl();
        exec.args(["exec", "--stdin", &agent.pod]).arg(format!("--container={CONTAINER}"));
        exec.args(["--", "bridge-agent", "dial-stdio"]).stdin(Stdio::piped());
        exec
    }

    /// Appends the remedy to an error of kubectl, if one is known.
    pub(crate) fn with_remedy(&self, error: String) -> String {
        match self.remedy(&error) {
            Some(remedy) => format!("{error}; {remedy}"),
            None => error,
        }
    }

    /// Returns the remedy of an error of kubectl or of the agent's program, if it is known.
    pub(crate) fn remedy(&self, error: &str) -> Option<String> {
        let Self { namespace, selector, .. } = self;
        if error.contains("(Forbidden)") || error.contains("is forbidden") {
            return Some(format!(
                "the user needs a Role in namespace {namespace} that allows `list` of pods and `create` of pods/exec"
            ));
        }
        if error.contains("unrecognized subcommand") {
            return Some("its agent is older than this program: upgrade it".to_owned());
        }
        // Words of the API server, of the kubelet and of the container runtime.
        let no_program =
            ["is not valid for pod", "container not found", "executable file not found", "no such file"];
        no_program.iter().any(|text| error.contains(text)).then(|| {
            format!("the label {selector} selects a pod without a container {CONTAINER} that runs the agent: see --selector")
        })
    }
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
    #[serde(rename_all = "camelCase")]
    struct Metadata {
        name: String,
        #[serde(default)]
        deletion_timestamp: Option<String>,
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
    // A pod that ends is still in phase Running, beside its successor.
    let runs = |pod: &Pod| pod.status.phase == "Running" && pod.metadata.deletion_timestamp.is_none();
    let agent = |pod: Pod| Agent { node: pod.spec.node_name, pod: pod.metadata.name };
    let mut agents: Vec<_> = list.items.into_iter().filter(runs).map(agent).collect();
    agents.sort();
    Ok(agents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_running_pods_are_asked_in_order_of_nodes() {
        let list = r#"{"items": [
            {"metadata": {"name": "z"}, "spec": {"nodeName": "b"}, "status": {"phase": "Running"}},
            {"metadata": {"name": "y"}, "spec": {"nodeName": "a"}, "status": {"phase": "Running"}},
            {"metadata": {"name": "old", "deletionTimestamp": "2026-01-01T00:00:00Z"}, "spec": {"nodeName": "a"},
             "status": {"phase": "Running"}},
            {"metadata": {"name": "x"}, "spec": {}, "status": {"phase": "Pending"}}]}"#;
        let agents = running(list.as_bytes()).unwrap();
        assert_eq!(agents.iter().map(|agent| agent.pod.as_str()).collect::<Vec<_>>(), ["y", "z"]);
    }

    #[test]
    fn errors_of_the_cluster_come_with_a_remedy() {
        let access = Access::default();
        let remedy = |error: &str| access.remedy(error).unwrap_or_default();
        let forbidden = "Error from server (Forbidden): pods \"x\" is forbidden: User \"u\" cannot create resource \"pods/exec\"";
        assert!(remedy(forbidden).contains("`create` of pods/exec"));
        assert!(remedy("error: container bridge-agent is not valid for pod x").contains("--selector"));
        assert!(remedy("error: unrecognized subcommand 'dial-stdio'").contains("upgrade"));
        assert_eq!(access.remedy("no agent answers on /run/bridge/agent.sock"), None);
    }
}
