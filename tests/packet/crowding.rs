//! Floods of flows, and connections that are silent meanwhile.

use std::{sync::atomic::AtomicBool, time::Duration};

use bridge_common::filter::{
    counters::Reason,
    flow::{FlowKey, state},
};
use bridge_lab::{
    packet::{Icmp, Packet, Tcp},
    prog::{Node, TABLES, TIMEOUT, behaviour},
};

use crate::world::{
    Connection, ExternalIngress, InternalIngress, OPEN, families, ip, key, node_of, usual_policy,
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

/// A LAN host that a rule allows, and that opens more than any table has room for.
#[test]
fn flows_of_one_initiator_crowd_out_no_flow_of_another() {
    let mut node = node_of(&usual_policy(), &behaviour());
    let (connections, [v4, _]) = (connections(), families());
    connections.iter().for_each(|connection| connection.establish(&mut node));
    let datagrams = |from, port| {
        let (there, back) = (Packet::new(from, v4.pod), Packet::new(v4.pod, from));
        [there.udp(port, OPEN, b"x"), back.udp(OPEN, port, b"x")]
    };
    let ask = |node: &mut Node, [question, answer]: [Packet; 2]| {
        node.passes(ExternalIngress, &question, Reason::new_flow);
        node.passes(InternalIngress, &answer, Reason::established);
        // The kernel evicts first those that were never used again.
        node.passes(InternalIngress, &answer, Reason::established);
    };
    ask(&mut node, datagrams(v4.lan, 2000));
    let busy = ip("192.168.31.99");
    let flood = |port| Connection { client: busy, client_port: port, ..Connection::inbound(v4, OPEN) };
    for port in 2000..2000 + FLOOD {
        ask(&mut node, datagrams(busy, port));
        flood(port).establish(&mut node);
        node.passes(InternalIngress, &flood(port).server_ack(), Reason::established);
    }
    let alive = |node: &mut Node, key: &FlowKey| node.flow(key).map(|(table, _)| table);
    for connection in &connections {
        assert_eq!(alive(&mut node, &connection.key()), Some("flows"));
        node.passes(connection.server_hook, &connection.server_ack(), Reason::established);
    }
    let [question, answer] = datagrams(v4.lan, 2000);
    assert_eq!(alive(&mut node, &key(&question, 17, 2000, OPEN)), Some("other_flows"));
    node.passes(InternalIngress, &answer, Reason::established);

    // Those beyond the share live as any other, until they end.
    let last = flood(1999 + FLOOD);
    assert_eq!(alive(&mut node, &last.key()), Some("overflow"));
    node.passes(last.client_hook, &last.ack(), Reason::established);
    let rst = last.server_sends(|source, destination| Tcp::rst(source, destination, 5001));
    node.passes(last.server_hook, &rst, Reason::established);
    let known = node.datapath().maps.usable_flow(false, &last.key()).expect("the tables can be read");
    assert_eq!(known.map(|flow| flow.state), Some(state::RESET));
    let forgotten = node.datapath().maps.forget_addresses(&[busy].into()).expect("the tables can be read");
    assert!(forgotten > 0);
    assert_eq!(alive(&mut node, &last.key()), None);
    node.denies(last.client_hook, &last.ack(), Reason::not_syn);

    // The sweep corrects the counters, and the initiator has its share again.
    std::thread::sleep(Duration::from_millis(1100));
    node.datapath().maps.remove_expired_flows(&AtomicBool::new(false)).expect("the tables can be read");
    flood(2000).establish(&mut node);
    assert_eq!(alive(&mut node, &flood(2000).key()), Some("flows"));
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
