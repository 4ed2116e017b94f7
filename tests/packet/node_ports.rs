//! LAN host to node on a NodePort: judged before the node rewrites the destination, and known again after it.

use bridge_common::filter::{counters::Reason, flow::state, policy::direction};
use bridge_lab::{
    packet::{Icmp, Packet, Tcp},
    prog::behaviour,
};

use crate::world::{
    Connection, ExternalEgress, ExternalIngress, InternalEgress, InternalIngress, OPEN, SHUT, families,
    from_lan, from_pod, ip, node, usual_policy,
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
fn a_connection_is_followed_where_the_node_has_translated_its_answers() {
    let mut node = node();
    for f in families() {
        let c = Connection {
            server: f.node,
            server_port: ALLOWED,
            server_hook: ExternalEgress,
            ..Connection::inbound(f, OPEN)
        };
        node.passes(ExternalIngress, &c.syn(), Reason::new_flow);
        // By the node itself, or by a pod.
        node.ignores(ExternalEgress, &c.syn_ack());
        node.passes(ExternalIngress, &c.ack(), Reason::established);
        assert_eq!(node.flow(&c.key()).map(|(t, f)| (t, f.state)), Some(("flows", state::ESTABLISHED)));
        node.ignores(from_pod(ExternalEgress), &c.server_ack());
    }
}

/// A run of one program has no mark of an earlier hook; `tests/mediation.rs` sends real packets through both.
#[test]
fn an_allowed_node_port_opens_nothing_else_from_its_source_port() {
    let mut node = node();
    for f in families() {
        node.passes(
            ExternalIngress,
            &Packet::new(f.lan, f.node).tcp(Tcp::syn(50_000, ALLOWED)),
            Reason::new_flow,
        );
        let inside = Connection::inbound(f, SHUT);
        node.denies(from_lan(InternalEgress), &inside.syn(), Reason::no_rule);
        assert_eq!(node.flow(&inside.key()), None);
        node.denies(InternalIngress, &inside.syn_ack(), Reason::not_syn);
    }
}

#[test]
fn a_link_local_address_of_the_node_has_the_same_node_ports() {
    let mut node = node();
    let [_, f] = families();
    let syn = |port| Packet::new(f.lan, ip("fe80::17")).tcp(Tcp::syn(50_000, port));
    node.denies(ExternalIngress, &syn(ALLOWED + 1), Reason::no_rule);
    node.passes(ExternalIngress, &syn(ALLOWED), Reason::new_flow);
    node.ignores(ExternalIngress, &syn(22));
}
