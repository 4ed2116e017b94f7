//! Classes of denied connections: counted whatever the rate of events, and only for packets that ask for a connection.

use bridge_agent::{
    datapath::Denial,
    model::{Action as Outcome, Direction, Protocol, Rule},
};
use bridge_common::filter::{counters::Reason, event::Event};
use bridge_lab::packet::{Packet, Tcp};
use bridge_lab::prog::{Action, LAN_INTERFACE, Node, behaviour};

use crate::world::{
    Connection, ExternalIngress, Family, InternalIngress, OPEN, OUT, SHUT, families, node, node_of, policy,
    range, rule, usual_policy,
};

fn denials(node: &mut Node) -> Vec<Denial> {
    let (list, evicted) = node.datapath().maps.denials(None).expect("denials");
    assert_eq!(evicted, 0);
    list
}

#[test]
fn connections_that_rules_deny_are_counted_without_events() {
    let mut node = node();
    for audit in [false, true] {
        let quiet = bridge_agent::datapath::Behaviour { audit, events_per_second: 0, ..behaviour() };
        node.publish(&usual_policy(), &quiet).expect("a policy");
        for f in families() {
            // Each connection from another port.
            for port in 0..100 {
                let c = Connection::inbound(f, SHUT);
                let syn = Packet::new(f.lan, f.pod).tcp(Tcp::syn(50_000 + port, SHUT));
                node.run(c.client_hook, &syn.frame()).expect("the program runs");
            }
        }
        assert!(node.events().is_empty());
        let found = denials(&mut node);
        assert_eq!(found.len(), 2, "{found:?}");
        for (denial, f) in found.iter().zip(families()) {
            let class = &denial.class;
            assert_eq!((class.external, class.pod, class.port), (f.lan, f.pod, SHUT));
            assert_eq!((class.direction.as_str(), class.protocol.as_str()), ("inbound", "tcp"));
            assert_eq!(denial.source_ports, [50_000, 50_099]);
            assert_eq!(denial.count, if audit { 200 } else { 100 });
            assert_eq!(denial.verdict == "audit", audit, "{denial:?}");
            assert!(denial.first <= denial.last, "{denial:?}");
        }
    }
}

#[test]
fn packets_of_flows_and_stray_packets_are_no_class() {
    let mut node = node();
    for f in families() {
        let (open, shut) = (Connection::inbound(f, OPEN), Connection::inbound(f, SHUT));
        for (hook, packet) in [
            (open.client_hook, open.syn()),
            (open.server_hook, open.syn_ack()),
            (open.client_hook, open.ack()),
            // A segment of no flow is denied, and asks for none.
            (shut.client_hook, shut.ack()),
        ] {
            node.run(hook, &packet.frame()).expect("the program runs");
        }
    }
    assert!(denials(&mut node).is_empty());
}

/// A UDP packet to the pod of a family, from a port of its LAN host.
fn datagram(f: Family, source_port: u16, port: u16) -> Packet {
    Packet::new(f.lan, f.pod).udp(source_port, port, &[0; 18])
}

#[test]
fn a_repeated_refusal_is_as_the_first() {
    let mut node = node();
    for f in families() {
        let c = Connection::inbound(f, SHUT);
        for packet in [c.syn(), datagram(f, 50_000, SHUT)] {
            let first = node.denies(ExternalIngress, &packet, Reason::no_rule);
            let event = |node: &Node| {
                let [event] = node.events()[..] else { panic!("one event") };
                Event { time: 0, ..event }
            };
            let reported = event(&node);
            for _ in 0..3 {
                assert_eq!(node.denies(ExternalIngress, &packet, Reason::no_rule), first);
                assert_eq!(event(&node), reported);
            }
            assert_eq!(first.action, Action::Answer);
        }
        for denial in denials(&mut node).iter().filter(|denial| denial.class.external == f.lan) {
            assert_eq!((denial.count, denial.verdict.as_str()), (4, "reject"), "{denial:?}");
        }
    }
}

#[test]
fn a_class_that_was_denied_is_judged_again_once_it_may_pass() {
    let mut node = node();
    for f in families() {
        let packets = [Connection::inbound(f, SHUT).syn(), datagram(f, 50_000, SHUT)];
        for _ in 0..2 {
            for packet in &packets {
                node.denies(ExternalIngress, packet, Reason::no_rule);
            }
        }
        // A pod of another node: to be forwarded, and judged there.
        node.host(f.pod, 0).expect("a pod that was here");
        for packet in &packets {
            node.ignores(ExternalIngress, packet);
        }
        node.host(f.pod, LAN_INTERFACE).expect("room for a pod");
        for packet in &packets {
            node.denies(ExternalIngress, packet, Reason::no_rule);
        }
        let mut open = usual_policy();
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            open.rules.push(rule("more", Direction::Inbound, protocol, &[range(SHUT, SHUT)]));
        }
        node.publish(&open, &behaviour()).expect("a policy");
        for packet in &packets {
            node.passes(ExternalIngress, packet, Reason::new_flow);
        }
        node.publish(&usual_policy(), &behaviour()).expect("a policy");
    }
}

#[test]
fn rules_by_source_port_are_asked_about_each_packet() {
    for action in [Outcome::Allow, Outcome::Deny] {
        let mut rules = usual_policy().rules;
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let by_source = rule("source", Direction::Inbound, protocol, &[range(SHUT, SHUT)]);
            rules.push(Rule { source_ports: vec![range(600, 700)], action, ..by_source });
        }
        let mut node = node_of(&policy(rules), &behaviour());
        let (within, reason) = match action {
            Outcome::Allow => (Reason::new_flow, Reason::no_rule),
            Outcome::Deny => (Reason::deny_rule, Reason::no_rule),
        };
        for f in families() {
            for (port, wanted) in [(599, reason), (599, reason), (650, within), (701, reason), (651, within)]
            {
                let syn = Packet::new(f.lan, f.pod).tcp(Tcp::syn(port, SHUT));
                for packet in [syn, datagram(f, port, SHUT)] {
                    let judged = node.run(ExternalIngress, &packet.frame()).expect("the program runs");
                    assert_eq!(judged.counted.map(|(_, reason)| reason), Some(wanted), "{packet:?}");
                }
            }
        }
    }
}

#[test]
fn packets_of_flows_pass_whatever_their_class() {
    let mut node = node();
    for f in families() {
        let back = |port, to| Packet::new(f.pod, f.lan).udp(port, to, &[0; 18]);
        let opened =
            |node: &mut Node| node.passes(ExternalIngress, &datagram(f, 50_000, OPEN), Reason::new_flow);
        opened(&mut node);
        node.passes(InternalIngress, &back(OPEN, 50_000), Reason::established);
        // Nothing is open any more; another port of the same host is denied until its class is known to be.
        node.publish(&policy(Vec::new()), &behaviour()).expect("a policy");
        for _ in 0..3 {
            node.denies(ExternalIngress, &datagram(f, 50_001, OPEN), Reason::no_rule);
        }
        node.passes(ExternalIngress, &datagram(f, 50_000, OPEN), Reason::established);

        // The answer to a pod has the addresses and the ports of a denied class.
        node.publish(&usual_policy(), &behaviour()).expect("a policy");
        for _ in 0..3 {
            node.denies(ExternalIngress, &datagram(f, OUT, 61_001), Reason::no_rule);
        }
        node.passes(InternalIngress, &back(61_001, OUT), Reason::new_flow);
        node.passes(ExternalIngress, &datagram(f, OUT, 61_001), Reason::established);
    }
}

#[test]
fn each_packet_that_a_rule_denies_is_a_hit_of_it() {
    let mut rules = usual_policy().rules;
    let deny = rule("no", Direction::Inbound, Protocol::Any, &[]);
    rules.push(Rule { action: Outcome::Deny, ..deny });
    let index = rules.len() - 1;
    let mut node = node_of(&policy(rules), &behaviour());
    for (round, f) in (1..).zip(families()) {
        let c = Connection::inbound(f, SHUT);
        for _ in 0..5 {
            node.denies(ExternalIngress, &c.syn(), Reason::deny_rule);
            node.denies(ExternalIngress, &datagram(f, 50_000, SHUT), Reason::deny_rule);
        }
        let maps = &node.datapath().maps;
        let hits = maps.rule_hits(maps.slot()).expect("hits");
        assert_eq!(hits[index].packets, 10 * round, "{hits:?}");
    }
}

/// It holds no ports, as a packet to port 0 seems to.
#[test]
fn a_later_fragment_is_of_no_class() {
    let mut node = node_of(&usual_policy(), &behaviour());
    for f in families() {
        let to = |port| Packet::new(f.lan, f.pod).udp(50_000, port, &[0; 18]);
        for _ in 0..2 {
            node.denies(ExternalIngress, &to(0), Reason::no_rule);
        }
        node.denies(ExternalIngress, &to(OPEN).fragment(100, false, 1), Reason::fragment_unknown);
        node.passes(ExternalIngress, &to(OPEN).fragment(0, true, 2), Reason::new_flow);
        node.passes(ExternalIngress, &to(OPEN).fragment(100, false, 2), Reason::later_fragment);
    }
}
