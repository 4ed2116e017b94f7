//! The very first start cuts no connection that is already there.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Lab, NodePort};
use bridge_lab::traffic::tcp::{Client, Connection, Server};
use serde_json::Value;

const SECOND: Duration = Duration::from_secs(1);
const PORT: u16 = 7;
const NODE_PORT: u16 = 30080;

/// Allows nothing.
const CONFIG: &str = r#"
role: node
networks:
  pods: [10.200.1.0/24, "fd20:1::/64"]
  external: [192.168.31.0/24, "fd31::/64"]
enforcement: {engines: [ebpf], interfaces: {external: [eth0], internal: ["cali*"]}}
nodePorts: {range: "30000-32767", allow: []}
"#;

fn connect(client: &Client<'_>, to: std::net::SocketAddr) -> Result<Connection> {
    let mut connection = client.connect(to)?.reached()?;
    connection.round_trip(SECOND)?;
    Ok(connection)
}

fn seeded(agent: &Agent) -> Result<Vec<(String, String)>> {
    let flows: Value = serde_json::from_str(&agent.run(&["flows", "--json", "--protocol", "tcp"])?)?;
    let mut seeded: Vec<_> = flows["flows"]
        .as_array()
        .context("flows")?
        .iter()
        .filter(|flow| flow["seeded"] == true)
        .map(|flow| {
            let destination = flow["destination"].as_str().unwrap_or_default().to_owned();
            (flow["direction"].as_str().unwrap_or_default().to_owned(), destination)
        })
        .collect();
    seeded.sort();
    Ok(seeded)
}

#[test]
fn open_connections_live_on_and_new_ones_are_judged() -> Result<()> {
    let lab = Lab::builder().pods(1).conntrack().build()?;
    let (a, c) = (lab.a(), lab.c1());
    let mut servers = Vec::new();
    let mut connections = Vec::new();
    for family in Family::BOTH {
        for (client, server) in [(a, c), (c, a)] {
            servers.push(Server::echo(&server.netns, server.at(family, PORT))?);
            connections.push(connect(&Client::new(&client.netns), server.at(family, PORT))?);
        }
    }
    let mut agent = Agent::start(&lab, lab.b(), CONFIG)?;
    for connection in &mut connections {
        connection.round_trip(SECOND).with_context(|| format!("cut by the first start:\n{}", agent.log()))?;
    }
    let pair = |direction: &str, to: std::net::IpAddr| (direction.to_owned(), to.to_string());
    let expected = [
        pair("inbound", c.v4.into()),
        pair("inbound", c.v6.into()),
        pair("outbound", a.v4.into()),
        pair("outbound", a.v6.into()),
    ];
    assert_eq!(seeded(&agent)?, expected);
    for (client, server) in [(a, c), (c, a)] {
        let attempt = Client::new(&client.netns).connect(server.at(Family::V4, PORT))?;
        ensure!(attempt.refused(), "a new connection from {}: {attempt}", client.name);
    }
    agent.restart()?;
    for connection in &mut connections {
        connection.round_trip(SECOND).context("cut by the restart")?;
    }
    Ok(())
}

#[test]
fn translated_connections_live_on() -> Result<()> {
    let node_port = NodePort { port: NODE_PORT, pod: 0, pod_port: PORT };
    let lab = Lab::builder().pods(1).masquerade().node_port(node_port).build()?;
    let (a, b, c) = (lab.a(), lab.b(), lab.c1());
    let _in_pod = Server::echo(&c.netns, c.at(Family::V4, PORT))?;
    let on_lan = Server::echo(&a.netns, a.at(Family::V4, PORT))?;
    let mut connections = vec![
        connect(&Client::new(&c.netns), a.at(Family::V4, PORT))?,
        connect(&Client::new(&a.netns), b.at(Family::V4, NODE_PORT))?,
    ];
    ensure!(on_lan.peers()[0].ip() == b.ip(Family::V4), "the lab does not masquerade");
    let agent = Agent::start(&lab, b, CONFIG)?;
    for connection in &mut connections {
        connection.round_trip(SECOND).with_context(|| format!("cut by the first start:\n{}", agent.log()))?;
    }
    let pair = |direction: &str, to: std::net::Ipv4Addr| (direction.to_owned(), to.to_string());
    // What the pod opened is known under its own address and under the node's.
    let expected =
        [pair("inbound", c.v4), pair("nodeport", b.v4), pair("outbound", a.v4), pair("outbound", a.v4)];
    assert_eq!(seeded(&agent)?, expected);
    let attempt = Client::new(&a.netns).connect(b.at(Family::V4, NODE_PORT))?;
    ensure!(attempt.refused(), "a new connection to the NodePort: {attempt}");
    Ok(())
}
