//! The flow cache: it is used, and only timing shows it.

use std::{thread, time::Duration};

use bridge_agent::datapath::Behaviour;
use bridge_common::filter::{
    counters::Reason, fast_path::nanoseconds, flow::state, flow_cache::LIFETIME_TICKS, policy::direction,
};
use bridge_lab::{
    cpu::stay_on,
    packet::{Packet, Tcp},
    prog::{Node, behaviour},
};

use crate::world::{
    Connection, ExternalIngress, InternalIngress, OPEN, OUT, SHUT, families, node, node_of, usual_policy,
};

/// Connections of either direction that packets of both ends have gone through since they were established.
fn spoken() -> (Node, [Connection; 2]) {
    // Each CPU has a cache of its own.
    stay_on(0).expect("a CPU");
    let mut node = node();
    let [v4, _] = families();
    let connections = [Connection::inbound(v4, OPEN), Connection::outbound(v4, OUT)];
    for c in &connections {
        c.establish(&mut node);
        speak(&mut node, c);
    }
    (node, connections)
}

fn speak(node: &mut Node, c: &Connection) {
    node.passes(c.client_hook, &c.ack(), Reason::established);
    node.passes(c.server_hook, &c.server_ack(), Reason::established);
}

fn is_unknown(node: &mut Node, c: &Connection) {
    node.denies(c.client_hook, &c.ack(), Reason::not_syn);
    node.denies(c.server_hook, &c.server_ack(), Reason::not_syn);
}

#[test]
fn a_cpu_knows_a_flow_without_the_table_for_half_a_second() {
    let (mut node, connections) = spoken();
    node.empty_tables().expect("empty tables");
    for c in &connections {
        speak(&mut node, c);
    }
    thread::sleep(Duration::from_nanos(nanoseconds(LIFETIME_TICKS + 2)));
    for c in &connections {
        is_unknown(&mut node, c);
    }
}

#[test]
fn a_flow_that_is_taken_from_the_table_is_forgotten_at_once() {
    let (mut node, connections) = spoken();
    node.forget_flows().expect("empty tables");
    for c in &connections {
        is_unknown(&mut node, c);
    }
}

#[test]
fn what_begins_or_ends_a_connection_is_never_answered_from_memory() {
    let (mut node, connections) = spoken();
    node.empty_tables().expect("empty tables");
    for c in &connections {
        speak(&mut node, c);
        node.denies(c.client_hook, &c.client_sends(|s, d| Tcp::rst(s, d, 1001)), Reason::not_syn);
        node.denies(c.client_hook, &c.client_sends(|s, d| Tcp::fin(s, d, 1001, 5001)), Reason::not_syn);
        node.denies(c.client_hook, &c.client_sends(Tcp::syn_ack), Reason::not_syn);
        node.passes(c.client_hook, &c.syn(), Reason::new_flow);
    }
}

#[test]
fn the_end_of_a_connection_that_one_side_tells_reaches_the_other() {
    let (mut node, connections) = spoken();
    for c in &connections {
        // Undone by further packets of the connection, which the judge must see.
        node.passes(c.server_hook, &c.server_sends(|s, d| Tcp::rst(s, d, 5001)), Reason::established);
        assert_eq!(node.flow(&c.key()).map(|(_, f)| f.state), Some(state::RESET));
        node.passes(c.client_hook, &c.ack(), Reason::established);
        assert_eq!(node.flow(&c.key()).map(|(_, f)| f.state), Some(state::ESTABLISHED));
    }
}

#[test]
fn ports_that_are_used_again_begin_anew() {
    let (mut node, connections) = spoken();
    for c in &connections {
        node.passes(c.client_hook, &c.client_sends(|s, d| Tcp::fin(s, d, 1001, 5001)), Reason::established);
        node.passes(c.server_hook, &c.server_sends(|s, d| Tcp::fin(s, d, 5001, 1002)), Reason::established);
        node.passes(c.client_hook, &c.syn(), Reason::new_flow);
        node.passes(c.server_hook, &c.syn_ack(), Reason::established);
        // The one that completes the handshake looks like any other.
        node.passes(c.client_hook, &c.ack(), Reason::established);
        assert_eq!(
            node.flow(&c.key()).map(|(table, f)| (table, f.state)),
            Some(("flows", state::ESTABLISHED))
        );
    }
}

#[test]
fn another_policy_is_heard_at_once() {
    let (mut node, connections) = spoken();
    let timeouts = [1; state::COUNT];
    node.publish(&usual_policy(), &Behaviour { timeouts, ..behaviour() }).expect("a policy");
    thread::sleep(Duration::from_millis(20));
    for c in &connections {
        is_unknown(&mut node, c);
    }
}

#[test]
fn a_flow_is_known_by_where_its_packets_come_in() {
    let (mut node, connections) = spoken();
    node.denies(InternalIngress, &connections[0].ack(), Reason::spoofed);
    node.denies(InternalIngress, &connections[1].server_ack(), Reason::spoofed);
}

#[test]
fn no_other_flow_is_taken_for_one_that_is_known() {
    let (mut node, connections) = spoken();
    node.level_stamps().expect("stamps");
    for c in &connections {
        // Enough that some lead to the places of known flows.
        for client_port in (1024..=u16::MAX).filter(|port| *port != c.client_port) {
            if client_port % 256 == 0 {
                // The lifetime of the known flows passes.
                speak(&mut node, c);
            }
            let other = Connection { client_port, ..*c };
            let judged = node.run(c.client_hook, &other.ack().frame()).expect("the program runs");
            assert_eq!(judged.counted.map(|(_, reason)| reason), Some(Reason::not_syn), "{client_port}");
        }
        let datagram = Packet::new(c.client, c.server).udp(c.client_port, c.server_port, b"x");
        node.passes(c.client_hook, &datagram, Reason::new_flow);
        speak(&mut node, c);
    }
}

#[test]
fn what_passes_in_audit_mode_alone_is_audited_packet_by_packet() {
    stay_on(0).expect("a CPU");
    let mut node = node_of(&usual_policy(), &Behaviour { audit: true, ..behaviour() });
    let [v4, _] = families();
    let c = Connection::inbound(v4, SHUT);
    for packet in [c.syn(), c.ack()] {
        node.run(c.client_hook, &packet.frame()).expect("the program runs");
        node.run(c.server_hook, &c.syn_ack().frame()).expect("the program runs");
    }
    for _ in 0..3 {
        let judged = node.run(c.client_hook, &c.ack().frame()).expect("the program runs");
        assert_eq!(judged.audited, Some((direction::INBOUND, Reason::established)));
        assert_eq!(judged.counted, None);
    }
}

#[test]
fn datagrams_of_a_flow_that_was_replied_to_are_known() {
    stay_on(0).expect("a CPU");
    let mut node = node();
    let [v4, _] = families();
    let request = Packet::new(v4.lan, v4.pod).udp(5000, OPEN, b"x");
    let reply = Packet::new(v4.pod, v4.lan).udp(OPEN, 5000, b"x");
    node.passes(ExternalIngress, &request, Reason::new_flow);
    // Unreplied: the policy decides on each.
    node.passes(ExternalIngress, &request, Reason::new_flow);
    node.passes(InternalIngress, &reply, Reason::established);
    node.passes(InternalIngress, &reply, Reason::established);
    node.passes(ExternalIngress, &request, Reason::established);
    node.empty_tables().expect("empty tables");
    node.passes(InternalIngress, &reply, Reason::established);
    node.passes(ExternalIngress, &request, Reason::established);
}
