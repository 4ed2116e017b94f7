//! Floods of flows, and connections that are silent meanwhile.

use std::{sync::atomic::AtomicBool, time::Duration};

use bridge_common::filter::{counters::Reason, flow::state};
use bridge_lab::{
    packet::{Icmp, Packet},
    prog::{Node, TABLES, TIMEOUT, behaviour},
};

use crate::world::{
    Connection, ExternalIngress, InternalIngress, OPEN, families, key, node_of, usual_policy,
};

/// More than any table has room for: see `Node::new`.
const FLOOD: u16 = 12_000;

/// Idle connections to a pod.
fn connections() -> Vec<Connection> {
    let of = |(number, family): (u16, _)| Connection {
        client_port: 40_000 + number,
        ..Connection::inbound(family, OPEN)
    };
    (0..20).zip(families().into_iter().cycle()).map(of).collect()
}

#[test]
fn answered_flows_of_other_protocols_crowd_out_no_connection() {
    let mut node = node_of(&usual_policy(), &behaviour());
    let connections = connections();
    connections.iter().for_each(|connection| connection.establish(&mut node));
    let [v4, _] = families();
    let flood = |node: &mut Node, question: &Packet, answer: &Packet| {
        node.passes(ExternalIngress, question, Reason::new_flow);
        node.passes(InternalIngress, answer, Reason::established);
        // The kernel evicts first those that were never used again.
        node.passes(ExternalIngress, question, Reason::established);
        node.passes(InternalIngress, answer, Reason::established);
    };
    for port in 0..FLOOD {
        let (there, back) = (Packet::new(v4.lan, v4.pod), Packet::new(v4.pod, v4.lan));
        let datagrams =
            (there.clone().udp(2000 + port, OPEN, b"x"), back.clone().udp(OPEN, 2000 + port, b"x"));
        flood(&mut node, &datagrams.0, &datagrams.1);
        let pings = (there.icmp(&Icmp::EchoRequest(port, 1)), back.icmp(&Icmp::EchoReply(port, 1)));
        flood(&mut node, &pings.0, &pings.1);
    }
    let alive = connections
        .iter()
        .filter(|one| node.flow(&one.key()).is_some_and(|(_, flow)| flow.state == state::ESTABLISHED));
    assert_eq!(alive.count(), connections.len(), "idle connections");
    for connection in &connections {
        node.passes(connection.server_hook, &connection.server_ack(), Reason::established);
    }
}

#[test]
fn a_sweep_removes_what_has_expired_and_nothing_else() {
    let mut node = node_of(&usual_policy(), &behaviour());
    let connections = connections();
    connections.iter().for_each(|connection| connection.establish(&mut node));
    let [f, _] = families();
    let question = |port| Packet::new(f.lan, f.pod).udp(port, OPEN, b"x");
    let ports: Vec<u16> = (2000..2100).collect();
    for port in &ports {
        node.passes(ExternalIngress, &question(*port), Reason::new_flow);
    }
    let (old, young) = connections.split_at(5);
    old.iter().for_each(|connection| node.age(&connection.key(), TIMEOUT + Duration::from_secs(1)));
    young.iter().for_each(|connection| node.age(&connection.key(), TIMEOUT - Duration::from_secs(60)));
    for port in &ports[..30] {
        node.age(&key(&question(*port), 17, *port, OPEN), TIMEOUT + Duration::from_secs(1));
    }
    let running = AtomicBool::new(false);
    let removed = node.datapath().maps.remove_expired_flows(&running).expect("the tables can be read");
    assert_eq!(removed, 35);
    assert!(old.iter().all(|connection| node.flow(&connection.key()).is_none()));
    assert!(young.iter().all(|connection| node.flow(&connection.key()).is_some()));
    let left: usize =
        TABLES.iter().map(|table| node.flow_table(table).expect("a table").keys().count()).sum();
    assert_eq!(left, young.len() + 70);
}
