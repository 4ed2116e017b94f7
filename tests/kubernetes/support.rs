//! Helpers of the tests against an API server.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bridge_lab::agent::Agent;
use bridge_lab::kubernetes::{ApiServer, User};
use bridge_lab::lab::{Family, Host, Lab};
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;
use serde_json::{Value, json};

/// For effects that take the API server or an agent some time, on a busy machine.
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

/// A cluster with agents on the node and on the LAN host, in which that may talk to the first pod on [`OPEN`], and does.
/// The agent on the node, and other values to keep alive.
pub(crate) fn allowing_cluster() -> Result<(Lab, ApiServer, Agent, (Agent, tcp::Server))> {
    let (lab, server) = cluster()?;
    server.apply(&policy("devices", "pods: [10.200.1.0/24]"))?;
    let node = on_node(&lab, &server)?;
    let host = on_host(&lab, &server)?;
    let to = lab.c1().at(Family::V4, OPEN);
    let echo = tcp::Server::echo(&lab.c1().netns, to)?;
    until_open(lab.a(), to, &node)?;
    Ok((lab, server, node, (host, echo)))
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

/// The configuration of the LAN host: its routes come from the API server, from who is asked by `podNetworks`.
pub(crate) fn host_config(server: &ApiServer, pod_networks: &str) -> String {
    let kubeconfig = server.kubeconfig(User::Host);
    let section = format!("kubeconfig: {}, podNetworks: {pod_networks}", kubeconfig.display());
    format!("role: host\nkubernetes: {{{section}}}\nroutes: {{}}\n")
}

/// The agent of the LAN host.
pub(crate) fn on_host(lab: &Lab, server: &ApiServer) -> Result<Agent> {
    let agent = Agent::start(lab, lab.a(), &host_config(server, "auto"))?;
    until_current(&agent)?;
    Ok(agent)
}

/// Returns the cluster's part of the agent's status.
pub(crate) fn cluster_status(agent: &Agent) -> Result<Value> {
    let status: Value = serde_json::from_str(&agent.run(&["status", "--json"])?)?;
    Ok(status["agent"]["kubernetes"].clone())
}

/// Waits until the agent says this of the cluster.
#[track_caller]
pub(crate) fn until(agent: &Agent, condition: impl Fn(&Value) -> bool) -> Result<Value> {
    until_within(DEADLINE, agent, condition)
}

/// As [`until`], with another deadline.
#[track_caller]
pub(crate) fn until_within(
    deadline: Duration,
    agent: &Agent,
    condition: impl Fn(&Value) -> bool,
) -> Result<Value> {
    eventually(deadline, || cluster_status(agent).ok().filter(&condition))
        .with_context(|| format!("{:#}\n{}", cluster_status(agent).unwrap_or_default(), agent.log()))
}

/// Waits until the whole known state of the cluster is applied.
pub(crate) fn until_current(agent: &Agent) -> Result<Value> {
    until(agent, |cluster| cluster["current"] == true && cluster["waitingFor"] == json!([]))
}

/// Keys of a rule that selects every pod; an empty selector is refused.
pub(crate) const EVERY_POD: &str = "podSelector: {matchExpressions: [{key: none, operator: DoesNotExist}]}";

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

/// Returns whether a connection is refused, rather than unanswered.
pub(crate) fn is_refused(from: &Host, to: SocketAddr) -> Result<bool> {
    Ok(tcp::Client::new(&from.netns).connect(to)?.refused())
}

/// Returns network and next hop of each route of the LAN host with bridge's protocol number.
fn routes(lab: &Lab) -> BTreeSet<String> {
    let of = |family: &str| lab.a().netns.ip(&format!("{family} route show proto 98")).unwrap_or_default();
    let text = of("-4") + &of("-6");
    text.lines().filter_map(|line| line.split(" dev ").next()).map(str::to_owned).collect()
}

/// Waits until the kernel of the LAN host has these routes and no others of bridge.
#[track_caller]
pub(crate) fn until_routes(lab: &Lab, wanted: &[&str]) -> Result<()> {
    until_routes_within(DEADLINE, lab, wanted)
}

/// As [`until_routes`], with another deadline.
#[track_caller]
pub(crate) fn until_routes_within(deadline: Duration, lab: &Lab, wanted: &[&str]) -> Result<()> {
    let wanted: BTreeSet<String> = wanted.iter().map(ToString::to_string).collect();
    eventually(deadline, || (routes(lab) == wanted).then_some(()))
        .with_context(|| format!("wanted {wanted:?}, found {:?}", routes(lab)))
}

/// Waits until a scrape of the agent has these lines.
#[track_caller]
pub(crate) fn until_metrics(agent: &Agent, lines: &[&str]) -> Result<()> {
    let has = |text: &String| lines.iter().all(|line| text.lines().any(|there| there == *line));
    eventually(DEADLINE, || agent.metrics().ok().filter(has))
        .map(drop)
        .with_context(|| format!("wanted {lines:?} in\n{}", agent.metrics().unwrap_or_default()))
}
