//! UDP, and protocols without ports.

use bridge_agent::model::{Direction, Protocol};
use bridge_common::filter::{counters::Reason, flow::state};
use bridge_lab::{
    packet::Packet,
    prog::{Node, behaviour},
};
use etherparse::IpNumber;

use crate::world::{
    ExternalIngress, InternalEgress, InternalIngress, OPEN, OUT, SHUT, families, from_lan, key, node, policy,
    rule, usual_policy,
};

#[test]
fn udp_replies_pass_and_nothing_unasked_does() {
    let mut node = node();
    for f in families() {
        for (client, server, port, hook, back) in [
            (f.lan, f.pod, OPEN, ExternalIngress, InternalIngress),
            (f.pod, f.lan, OUT, InternalIngress, ExternalIngress),
        ] {
            let request = Packet::new(client, server).udp(50_000, port, b"request");
            let reply = Packet::new(server, client).udp(port, 50_000, b"reply");
            node.denies(back, &reply, Reason::no_rule);
            node.passes(hook, &request, Reason::new_flow);
            let entry = |node: &Node| {
                node.flow(&key(&request, 17, 50_000, port)).map(|(table, flow)| (table, flow.state))
            };
            assert_eq!(entry(&node), Some(("half_open", state::UDP_UNREPLIED)));
            node.passes(back, &reply, Reason::established);
            assert_eq!(entry(&node), Some(("other_flows", state::UDP_REPLIED)));
            node.passes(hook, &request, Reason::established);
            node.denies(hook, &Packet::new(client, server).udp(50_000, SHUT, b"x"), Reason::no_rule);
        }
    }
}

#[test]
fn an_unanswered_flow_is_judged_by_the_policy_of_now() {
    let mut node = node();
    for f in families() {
        let request = Packet::new(f.lan, f.pod).udp(50_000, OPEN, b"request");
        node.publish(&usual_policy(), &behaviour()).expect("a policy");
        node.passes(ExternalIngress, &request, Reason::new_flow);
        node.publish(&policy(Vec::new()), &behaviour()).expect("a policy");
        node.denies(ExternalIngress, &request, Reason::no_rule);
    }
}

#[test]
fn a_reply_that_came_in_under_the_nodes_address_is_seen_on_its_way_to_the_pod() {
    let mut node = node();
    for f in families() {
        let request = Packet::new(f.pod, f.lan).udp(61_001, OUT, b"request");
        let reply = Packet::new(f.lan, f.pod).udp(OUT, 61_001, b"reply");
        node.passes(InternalIngress, &request, Reason::new_flow);
        node.ignores(from_lan(InternalEgress), &reply);
        let flow = node.flow(&key(&request, 17, 61_001, OUT)).map(|(table, flow)| (table, flow.state));
        assert_eq!(flow, Some(("other_flows", state::UDP_REPLIED)));
        node.passes(InternalIngress, &request, Reason::established);
    }
}

#[test]
fn protocols_without_ports_are_judged_by_rules_for_any_protocol() {
    let gre = |from, to| Packet::new(from, to).raw(IpNumber::GRE, &[0; 8]);
    let mut node = node();
    for f in families() {
        node.denies(ExternalIngress, &gre(f.lan, f.pod), Reason::no_rule);
    }
    let any = policy(vec![rule("any", Direction::Inbound, Protocol::Any, &[])]);
    node.publish(&any, &behaviour()).expect("a policy");
    for f in families() {
        node.denies(InternalIngress, &gre(f.pod, f.lan), Reason::no_rule);
        node.passes(ExternalIngress, &gre(f.lan, f.pod), Reason::new_flow);
        node.passes(InternalIngress, &gre(f.pod, f.lan), Reason::established);
    }
}

#[test]
fn icmp_of_the_other_ip_version_is_no_ping() {
    let mut node = node();
    let [v4, v6] = families();
    let echo = [8, 0, 0, 0, 0, 1, 0, 1];
    node.denies(
        ExternalIngress,
        &Packet::new(v4.lan, v4.pod).raw(IpNumber::IPV6_ICMP, &echo),
        Reason::no_rule,
    );
    node.denies(ExternalIngress, &Packet::new(v6.lan, v6.pod).raw(IpNumber::ICMP, &echo), Reason::no_rule);
}
