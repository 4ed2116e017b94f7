//! Pods that take part in the transparent port pool because their annotation says so.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::kubernetes::{ApiServer, User};
use bridge_lab::lab::{Family, Lab};
use bridge_lab::pool::{in_cgroup, output, python};
use bridge_lab::traffic::tcp;
use bridge_lab::wait::eventually;
use serde_json::json;

use crate::support::{DEADLINE, cluster, node_config, until_current};

const POOL: std::ops::RangeInclusive<u16> = 61001..=61040;
const PORT: u16 = 8080;
const POD: &str = "/api/v1/namespaces/shop/pods/c1";

/// Makes the control group of a pod as kubelet does, and one of a container in it.
fn container(lab: &Lab, server: &ApiServer) -> Result<PathBuf> {
    let pod = server.request(User::Admin, "GET", POD, None)?;
    let uid = pod["metadata"]["uid"].as_str().context("the API server gives every pod a UID")?;
    let container = lab.kubepods()?.join(format!("burstable/pod{uid}/0123"));
    fs::create_dir_all(&container)?;
    Ok(container)
}

/// A program that knows nothing of bridge connects from the container; the port it comes from, as the LAN host sees it.
fn seen_from(lab: &Lab, container: &Path, server: &tcp::Server) -> Result<u16> {
    let before = server.peers().len();
    let script = format!(
        "import socket; s = socket.create_connection(('{}', {PORT}), 5); s.send(b'x'); s.recv(1)",
        lab.a().v4
    );
    output(&lab.c1().netns, in_cgroup(container, python(&script)), Duration::from_secs(10))?;
    let peers = server.peers();
    ensure!(peers.len() == before + 1, "one connection: {peers:?}");
    ensure!(peers[before].ip() == lab.c1().v4, "with the address of the pod: {peers:?}");
    Ok(peers[before].port())
}

fn hooked(agent: &Agent) -> Result<u64> {
    let status: serde_json::Value = serde_json::from_str(&agent.run(&["status", "--json"])?)?;
    status["agent"]["pool"]["pods"]["hooked"].as_u64().with_context(|| status.to_string())
}

#[track_caller]
fn until_hooked(agent: &Agent, count: u64) -> Result<()> {
    eventually(DEADLINE, || hooked(agent).ok().filter(|hooked| *hooked == count))
        .map(drop)
        .with_context(|| format!("{count} pods are not hooked, but {:?}:\n{}", hooked(agent), agent.log()))
}

#[test]
fn a_pod_with_the_annotation_leaves_from_the_pool_until_it_has_it_no_more_or_is_deleted() -> Result<()> {
    let (lab, server) = cluster()?;
    server.add_pod("shop", "c1", &json!({}), "b")?;
    server.run_pod("shop", "c1", lab.c1())?;
    let more = "routes: {static: [{to: 10.200.1.0/24, via: 192.168.31.17}]}\nrole: host\n";
    let _host = Agent::start(&lab, lab.a(), more)?;
    let more = format!(
        "rules: [{{name: out, direction: outbound, protocol: tcp, ports: [{PORT}]}}]\n\
         portPool: {{ports: {}-{}, destinations: [192.168.31.0/24]}}\n",
        POOL.start(),
        POOL.end()
    );
    let mut node = Agent::start(&lab, lab.b(), &node_config(&server, &more))?;
    until_current(&node)?;
    let container = container(&lab, &server)?;
    let a = tcp::Server::echo(&lab.a().netns, lab.a().at(Family::V4, PORT))?;
    let from = |port: u16| POOL.contains(&port);

    ensure!(!from(seen_from(&lab, &container, &a)?), "it does not say that it takes part");
    server.kubectl(&["annotate", "-n", "shop", "pod", "c1", "bridge.lan/port-pool=transparent"], "")?;
    until_hooked(&node, 1)?;
    for _ in 0..5 {
        let port = seen_from(&lab, &container, &a)?;
        ensure!(from(port), "{port}");
    }
    // The state stays without news: also without an agent, and with the next one.
    node.kill()?;
    ensure!(from(seen_from(&lab, &container, &a)?), "without an agent");
    node.restart()?;
    until_current(&node)?;
    until_hooked(&node, 1)?;
    ensure!(from(seen_from(&lab, &container, &a)?), "the next agent");

    server.kubectl(&["annotate", "-n", "shop", "pod", "c1", "bridge.lan/port-pool-"], "")?;
    until_hooked(&node, 0)?;
    ensure!(!from(seen_from(&lab, &container, &a)?), "the annotation is gone");

    // Deleted, while its container is still about.
    server.kubectl(&["annotate", "-n", "shop", "pod", "c1", "bridge.lan/port-pool=transparent"], "")?;
    until_hooked(&node, 1)?;
    ensure!(from(seen_from(&lab, &container, &a)?), "and again");
    server.delete(POD)?;
    until_hooked(&node, 0)?;
    // The address is judged, which is a pod's all the same.
    ensure!(!from(seen_from(&lab, &container, &a)?), "the pod is gone");
    Ok(())
}
