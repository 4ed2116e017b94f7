//! What the tests against an API server share.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bridge_tests::agent::Agent;
use bridge_tests::kubernetes::{ApiServer, User};
use bridge_tests::lab::{Host, Lab};
use bridge_tests::traffic::tcp;
use bridge_tests::wait::eventually;
use serde_json::{Value, json};

/// For what takes the API server or an agent some time, on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);
/// A port that policies open.
pub(crate) const OPEN: u16 = 40002;

/// A lab with an API server that knows its node and the namespaces `shop` and `test`.
pub(crate) fn cluster() -> Result<(Lab, ApiServer)> {
    let lab = Lab::builder().without_routes().build()?;
    let server = ApiServer::start(&lab)?;
    server.add_node(&lab, 0)?;
    server.add_namespace("shop", &json!({"tier": "gold"}))?;
    server.add_namespace("test", &json!({}))?;
    Ok((lab, server))
}

/// The configuration of the lab's node: all that it knows of pods and rules comes from the API server, and from `more`.
pub(crate) fn node_config(server: &ApiServer, more: &str) -> String {
    format!(
        "role: node\nnetworks: {{external: [192.168.31.0/24, 'fd31::/64']}}\n\
         enforcement: {{engines: [ebpf], interfaces: {{external: [eth0], internal: ['cali*']}}}}\n\
         kubernetes: {{kubeconfig: {}, nodeName: b}}\npersistence: {{save: never}}\n{more}",
        server.kubeconfig(User::Node).display()
    )
}

/// The agent of the lab's node.
pub(crate) fn on_node(lab: &Lab, server: &ApiServer) -> Result<Agent> {
    let agent = Agent::start(lab, lab.b(), &node_config(server, ""))?;
    until_current(&agent)?;
    Ok(agent)
}

/// The agent of the LAN host: its routes come from the API server.
pub(crate) fn on_host(lab: &Lab, server: &ApiServer) -> Result<Agent> {
    let kubeconfig = server.kubeconfig(User::Host);
    let config = format!("role: host\nkubernetes: {{kubeconfig: {}}}\nroutes: {{}}\n", kubeconfig.display());
    let agent = Agent::start(lab, lab.a(), &config)?;
    until_current(&agent)?;
    Ok(agent)
}

/// What the agent says of the cluster.
pub(crate) fn cluster_status(agent: &Agent) -> Result<Value> {
    let status: Value = serde_json::from_str(&agent.run(&["status", "--json"])?)?;
    Ok(status["agent"]["kubernetes"].clone())
}

/// Waits until the agent says this of the cluster.
#[track_caller]
pub(crate) fn until(agent: &Agent, what: impl Fn(&Value) -> bool) -> Result<Value> {
    eventually(DEADLINE, || cluster_status(agent).ok().filter(&what))
        .with_context(|| format!("{:#}\n{}", cluster_status(agent).unwrap_or_default(), agent.log()))
}

/// Waits until all that the agent knows of the cluster is in force.
pub(crate) fn until_current(agent: &Agent) -> Result<Value> {
    until(agent, |cluster| cluster["current"] == true && cluster["waitingFor"] == json!([]))
}

/// A policy that lets LAN hosts in on [`OPEN`], to the pods that `pods` (keys of a rule) names.
pub(crate) fn policy(name: &str, pods: &str) -> String {
    format!(
        "apiVersion: bridge.lan/v1alpha1\nkind: BridgePolicy\nmetadata: {{name: {name}}}\nspec:\n  rules:\n  \
         - {{name: in, direction: inbound, protocol: tcp, ports: [{OPEN}], {pods}}}\n"
    )
}

/// Connects, and has a round trip.
pub(crate) fn open(from: &Host, to: SocketAddr) -> Result<tcp::Connection> {
    let attempt = tcp::Client::new(&from.netns).connect(to)?;
    let mut connection = attempt.reached().with_context(|| format!("{} to {to}", from.name))?;
    connection.round_trip(Duration::from_secs(5))?;
    Ok(connection)
}

/// Waits until a connection comes about.
#[track_caller]
pub(crate) fn until_open(from: &Host, to: SocketAddr, agent: &Agent) -> Result<tcp::Connection> {
    eventually(DEADLINE, || open(from, to).ok())
        .with_context(|| format!("{} to {to} stays closed:\n{}", from.name, agent.log()))
}

/// Waits until connections are refused.
#[track_caller]
pub(crate) fn until_closed(from: &Host, to: SocketAddr, agent: &Agent) -> Result<()> {
    eventually(DEADLINE, || is_refused(from, to).ok().filter(|refused| *refused).map(drop))
        .with_context(|| format!("{} to {to} stays open:\n{}", from.name, agent.log()))
}

/// Whether a connection is refused, rather than nobody answering.
pub(crate) fn is_refused(from: &Host, to: SocketAddr) -> Result<bool> {
    Ok(tcp::Client::new(&from.netns).connect(to)?.refused())
}
