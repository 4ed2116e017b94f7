//! LAN host to node on a NodePort: judged before the node rewrites the destination, and known again after it.

use bridge_common::filter::{counters::Reason, flow::state, policy::direction};
use bridge_lab::{
    packet::{Icmp, Packet, Tcp},
    prog::behaviour,
};

use crate::world::{
    Connection, ExternalEgress, ExternalIngress, InternalEgress, InternalIngress, OPEN, SHUT, families, node,
    usual_policy,
};

/// The NodePort that the policy allows.
const ALLOWED: u16 = 30_080;

#[test]
fn the_allowed_ports_of_the_range_are_open_and_the_others_are_not() {
    let mut node = node();
    for f in families() {
        let syn = |port| Packet::new(f.lan, f.node).tcp(Tcp::syn(50_000, port));
        node.passes(ExternalIngress, &syn(ALLOWED), Reason::new_flow);
        for port in [30_000, ALLOWED - 1, ALLOWED + 1, 32_767] {
            let judged = node.denies(ExternalIngress, &syn(port), Reason::no_rule);
            assert_eq!(judged.counted.map(|(direction, _)| direction), Some(direction::NODE_PORT));
        }
        for port in [29_999, 32_768, 22] {
            node.ignores(ExternalIngress, &syn(port));
        }
        // Not a LAN host; not the node; and a pod, whose packets to the node are out of scope.
        node.ignores(ExternalIngress, &Packet::new(f.stranger, f.node).tcp(Tcp::syn(50_000, 30_000)));
        node.ignores(InternalIngress, &Packet::new(f.pod, f.node).tcp(Tcp::syn(50_000, 30_000)));
        node.ignores(ExternalIngress, &Packet::new(f.lan, f.node).icmp(&Icmp::EchoRequest(1, 1)));
    }
}

#[test]
fn a_header_that_is_cut_off_behind_its_ports_is_judged_by_them() {
    let mut node = node();
    for f in families() {
        let first = |port, size| {
            let whole = Packet::new(f.lan, f.node).tcp(Tcp::syn(50_000, port).payload(&[7; 40]));
            whole.fragments(size, 9)[0].clone()
        };
        for size in [8, 16] {
            node.denies(ExternalIngress, &first(30_000, size), Reason::fragment_short);
            node.denies(ExternalIngress, &first(ALLOWED, size), Reason::fragment_short);
            node.ignores(ExternalIngress, &first(22, size));
        }
    }
}

#[test]
fn without_node_ports_in_the_configuration_none_is_judged() {
    let mut node = node();
    let mut policy = usual_policy();
    policy.node_ports = None;
    node.publish(&policy, &behaviour()).expect("a policy");
    for f in families() {
        node.ignores(ExternalIngress, &Packet::new(f.lan, f.node).tcp(Tcp::syn(50_000, 30_000)));
    }
}

#[test]
fn a_connection_is_known_under_both_addresses() {
    let mut node = node();
    for f in families() {
        let outside = Connection {
            server: f.node,
            server_port: ALLOWED,
            server_hook: ExternalEgress,
            ..Connection::inbound(f, OPEN)
        };
        // The pod listens on a port that is not open to the LAN but through the NodePort.
        let inside = Connection { client_port: outside.client_port, ..Connection::inbound(f, SHUT) };

        node.denies(InternalIngress, &inside.syn_ack(), Reason::not_syn);
        node.passes(ExternalIngress, &outside.syn(), Reason::new_flow);
        node.ignores(InternalEgress, &inside.syn());
        node.passes(InternalIngress, &inside.syn_ack(), Reason::established);
        node.ignores(ExternalEgress, &outside.syn_ack());
        node.passes(ExternalIngress, &outside.ack(), Reason::established);
        node.ignores(InternalEgress, &inside.ack());
        for c in [outside, inside] {
            assert_eq!(node.flow(&c.key()).map(|(t, f)| (t, f.state)), Some(("flows", state::ESTABLISHED)));
        }
        node.passes(InternalIngress, &inside.server_ack(), Reason::established);
        // The pod's port is not open beside that.
        let beside = Connection { client_port: 50_001, ..inside };
        node.denies(ExternalIngress, &beside.syn(), Reason::no_rule);
    }
}

#[test]
fn nobody_who_was_not_let_in_is_known_inside() {
    let mut node = node();
    for f in families() {
        let inside = Connection::inbound(f, SHUT);
        let denied = Packet::new(f.lan, f.node).tcp(Tcp::syn(inside.client_port, ALLOWED + 1));
        node.denies(ExternalIngress, &denied, Reason::no_rule);
        node.ignores(InternalEgress, &inside.syn());
        assert_eq!(node.flow(&inside.key()), None);
        node.denies(InternalIngress, &inside.syn_ack(), Reason::not_syn);
    }
}
