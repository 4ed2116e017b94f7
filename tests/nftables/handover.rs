//! The first packet filter of a node that tracked no connections: those that are open go on.

use anyhow::{Context as _, Result, ensure};
use bridge_lab::lab::Family;
use bridge_lab::traffic::tcp::{Client, Connection, Server};

use crate::node::{ALLOWED, DEADLINE, Node, RULES, config};

/// A connection of each family each way through the node, with its server.
fn open(node: &Node) -> Result<Vec<(Server, Connection)>> {
    let (a, pod) = (node.lab.a(), node.lab.c1());
    let ways = Family::BOTH.into_iter().flat_map(|family| [(family, a, pod), (family, pod, a)]);
    let opened = ways.map(|(family, client, host)| {
        let server = Server::echo(&host.netns, host.at(family, ALLOWED))?;
        let connection = Client::new(&client.netns).connect(server.address())?.split();
        let connection = connection.0.with_context(|| format!("{family:?}: {}", connection.1))?;
        Ok((server, connection))
    });
    opened.collect()
}

fn tracked(node: &Node) -> Result<usize> {
    let all = node.run("conntrack -L -f ipv4")? + &node.run("conntrack -L -f ipv6")?;
    Ok(all.lines().filter(|line| line.contains("ESTABLISHED")).count())
}

#[test]
fn open_connections_survive_the_first_packet_filter_beside_or_instead_of_ebpf() -> Result<()> {
    for engines in ["ebpf, nftables", "nftables", "ebpf, iptables", "iptables"] {
        let node = Node::new()?;
        let mut agent = node.start(&config("ebpf", RULES))?;
        let mut connections = open(&node)?;
        ensure!(tracked(&node)? == 0, "the node tracks connections already");
        agent.reload(&config(engines, RULES))?;
        ensure!(
            tracked(&node)? == connections.len(),
            "{engines}: {} of {}",
            tracked(&node)?,
            connections.len()
        );
        for (server, connection) in &mut connections {
            // Twice: the answer of the first round must not be the last packet that passes.
            for _ in 0..2 {
                let passed = connection.round_trip(DEADLINE);
                passed.with_context(|| format!("{engines}: {}\n{}", server.address(), agent.log()))?;
            }
        }
        drop(connections);
        node.holds()?;
        let tables = node.run("nft list tables")?;
        ensure!(!tables.contains("tracking"), "{tables}");
    }
    Ok(())
}

#[test]
fn open_connections_survive_a_restart_with_a_packet_filter_in_the_place_of_ebpf() -> Result<()> {
    for engines in ["nftables", "iptables"] {
        let node = Node::new()?;
        let mut agent = node.start(&config("ebpf", RULES))?;
        let mut connections = open(&node)?;
        agent.stop()?;
        let agent = node.start(&config(engines, RULES))?;
        for (server, connection) in &mut connections {
            let passed = connection.round_trip(DEADLINE);
            passed.with_context(|| format!("{engines}: {}\n{}", server.address(), agent.log()))?;
        }
        drop(connections);
        node.holds()?;
    }
    Ok(())
}
