//! Events about the node, as `kubectl get events` shows them.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::kubernetes::{ApiServer, User};
use bridge_lab::lab::{Family, Lab};
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;
use serde_json::{Value, json};

use crate::support::{DEADLINE, OPEN, cluster, node_config, policy, until_current, until_open};

const NODE: &str = "/apis/bridge.lan/v1alpha1/bridgenodes/b";
const EVENTS: &str = "/apis/events.k8s.io/v1/namespaces/default/events";
/// A port that no policy opens.
const DENIED: u16 = 40019;

/// Starts the agent, and waits for its first report: an event is a change since then.
fn reporting(lab: &Lab, server: &ApiServer, config: &str) -> Result<Agent> {
    let node = Agent::start(lab, lab.b(), config)?;
    until_current(&node)?;
    eventually(DEADLINE, || server.request(User::Admin, "GET", NODE, None).ok())
        .with_context(|| node.log())?;
    ensure!(list(server)?.is_empty(), "{:?}", list(server)?);
    Ok(node)
}

fn list(server: &ApiServer) -> Result<Vec<Value>> {
    let list = server.request(User::Admin, "GET", EVENTS, None)?;
    let own = |event: &&Value| event["reportingController"].as_str().is_some_and(|by| by.contains("bridge"));
    Ok(list["items"].as_array().into_iter().flatten().filter(own).cloned().collect())
}

/// Returns the note of the event about the node with this reason, of which there is one.
fn note(server: &ApiServer, reason: &str) -> Option<String> {
    let events = list(server).ok()?;
    let found: Vec<&Value> = events.iter().filter(|event| event["reason"] == reason).collect();
    let [event] = found.as_slice() else { return None };
    let about = &event["regarding"];
    let right = about["kind"] == "BridgeNode" && about["name"] == "b" && event["reportingInstance"] == "b";
    (right && event["type"] == "Warning").then(|| event["note"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn engines_that_differ_after_a_change_of_the_cluster_are_an_event() -> Result<()> {
    let (lab, server) = cluster()?;
    server.add_pod("shop", "c1", &json!({"app": "api"}), "b")?;
    server.run_pod("shop", "c1", lab.c1())?;
    lab.a().netns.ip("route add 10.200.1.0/24 via 192.168.31.17")?;
    let config = node_config(&server, "").replace("engines: [ebpf]", "engines: [ebpf, iptables]");
    let node = reporting(&lab, &server, &config)?;
    server.apply(&policy("devices", "pods: [10.200.1.0/24]"))?;
    let to = lab.c1().at(Family::V4, OPEN);
    let _echo = tcp::Server::echo(&lab.c1().netns, to)?;
    until_open(lab.a(), to, &node)?;
    let denied = lab.c1().at(Family::V4, DENIED);
    let said = eventually(DEADLINE, || {
        // The watch removes the rule soon: again and again, until a packet comes in between.
        let mut insert = Command::new("iptables");
        insert.args(["-I", "BRIDGE-FORWARD", "-s", &format!("{}/32", lab.a().v4), "-j", "ACCEPT"]);
        lab.b().netns.output(insert).ok()?;
        tcp::Client::new(&lab.a().netns).deadline(Duration::from_millis(20)).connect(denied).ok()?;
        note(&server, "EngineDiverged")
    });
    let said = said.with_context(|| format!("{:?}\n{}", list(&server), node.log()))?;
    ensure!(said.starts_with("packets denied by iptables alone: 0, by eBPF alone: "), "{said}");
    Ok(())
}

#[test]
fn a_trial_that_expires_is_an_event() -> Result<()> {
    let (lab, server) = cluster()?;
    let node = reporting(&lab, &server, &node_config(&server, ""))?;
    let rule = format!("rules: [{{name: tried, direction: inbound, protocol: tcp, ports: [{OPEN}]}}]\n");
    let api = format!("api: {{socket: {}}}\n", node.socket().display());
    let file = lab.directory().join("candidate.yaml");
    fs::write(&file, node_config(&server, &rule) + &api)?;
    node.run(&["apply", "--confirm", "2s", &file.display().to_string()])?;
    let said = eventually(DEADLINE, || note(&server, "TrialExpired"));
    let said = said.with_context(|| format!("{:?}\n{}", list(&server), node.log()))?;
    ensure!(said.contains("was not confirmed"), "{said}");
    Ok(())
}

/// Asks for a lease that ends by itself, and returns the head of the answer.
fn lease(node: &Agent) -> Result<String> {
    let mut stream = UnixStream::connect(node.socket())?;
    let body = r#"{"destination": "192.168.31.67:443", "ttlMs": 60000}"#;
    let head = "POST /v1/leases HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json";
    write!(stream, "{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.lines().next().unwrap_or_default().to_owned())
}

#[test]
fn a_pool_without_a_free_port_is_an_event() -> Result<()> {
    let (lab, server) = cluster()?;
    let pool = "portPool: {ports: 61001-61001, destinations: [192.168.31.0/24]}\n";
    let node = reporting(&lab, &server, &node_config(&server, pool))?;
    let (first, second) = (lease(&node)?, lease(&node)?);
    ensure!(first.contains(" 201 ") && second.contains(" 409 "), "{first}, {second}");
    let said = eventually(DEADLINE, || note(&server, "PoolExhausted"));
    let said = said.with_context(|| format!("{:?}\n{}", list(&server), node.log()))?;
    ensure!(said.starts_with("1 connects and leases found no free port"), "{said}");
    Ok(())
}
