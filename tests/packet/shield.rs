//! The shield: the packets that it drops, counts and notes, and those that it leaves to the hook behind it. `cargo xtask model`
//! compares it with the model on random packets.

use std::{thread, time::Duration};

use bridge_agent::{
    datapath::Behaviour,
    model::{Action, Direction, Policy, Protocol, Rule},
};
use bridge_common::filter::{
    counters::Reason, event::verdict, fast_path::nanoseconds, flow_cache::LIFETIME_TICKS,
};
use bridge_lab::{
    cpu::stay_on,
    packet::{Icmp, Packet, Tcp},
    prog::{Node, POD_INTERFACE, behaviour},
};

use crate::world::{
    Connection, ExternalIngress, Family, InternalIngress, OPEN, OUT, SHUT, families, node_of, range, rule,
    usual_policy,
};

/// Neither answers nor events are left.
fn dry() -> Behaviour {
    Behaviour { answers_per_second: 0, events_per_second: 0, ..behaviour() }
}

fn node() -> Node {
    node_of(&usual_policy(), &dry())
}

fn to_pod(family: Family) -> Packet {
    Packet::new(family.lan, family.pod)
}

#[track_caller]
fn drops(node: &mut Node, packet: &Packet, reason: Reason) {
    let dropped = node.run_shield(&packet.frame()).expect("the shield runs");
    assert_eq!(dropped, Some(reason), "{packet:?}");
    node.denies(ExternalIngress, packet, reason);
}

#[track_caller]
fn leaves(node: &mut Node, packet: &Packet) {
    assert_eq!(node.run_shield(&packet.frame()).expect("the shield runs"), None, "{packet:?}");
}

#[test]
fn denied_packets_to_pods_are_dropped_for_the_reason_of_the_hook() {
    let mut node = node();
    for f in families() {
        drops(&mut node, &to_pod(f).udp(50_000, SHUT, b"data"), Reason::no_rule);
        drops(&mut node, &to_pod(f).tcp(Tcp::syn(50_000, SHUT)), Reason::no_rule);
        drops(&mut node, &to_pod(f).tcp(Tcp::ack(50_000, OPEN, 1, 1)), Reason::not_syn);
        drops(&mut node, &Packet::new(f.stranger, f.pod).udp(50_000, OPEN, b"data"), Reason::no_rule);
        drops(&mut node, &Packet::new(f.lan, f.other_pod).tcp(Tcp::syn(50_000, SHUT)), Reason::no_rule);
    }
}

#[test]
fn allowed_packets_and_packets_of_flows_go_on() {
    let mut node = node();
    for f in families() {
        leaves(&mut node, &to_pod(f).udp(50_000, OPEN, b"data"));
        leaves(&mut node, &to_pod(f).tcp(Tcp::syn(50_000, OPEN)));
        let inbound = Connection::inbound(f, OPEN);
        node.passes(inbound.client_hook, &inbound.syn(), Reason::new_flow);
        leaves(&mut node, &inbound.ack());
        let outbound = Connection::outbound(f, OUT);
        node.passes(outbound.client_hook, &outbound.syn(), Reason::new_flow);
        leaves(&mut node, &outbound.syn_ack());
        node.passes(outbound.server_hook, &outbound.syn_ack(), Reason::established);
        node.passes(outbound.client_hook, &outbound.ack(), Reason::established);
        leaves(&mut node, &outbound.server_ack());
        // Answers come to a port that no rule opens.
        let asked = Packet::new(f.pod, f.lan).udp(SHUT, OUT, b"question");
        let answer = to_pod(f).udp(OUT, SHUT, b"answer");
        drops(&mut node, &answer, Reason::no_rule);
        node.passes(InternalIngress, &asked, Reason::new_flow);
        leaves(&mut node, &answer);
        node.passes(ExternalIngress, &answer, Reason::established);
        leaves(&mut node, &answer);
        // A SYN of the same ports is judged by the rules.
        let again = to_pod(f).tcp(Tcp::syn(OUT, 61_001));
        drops(&mut node, &again, Reason::no_rule);
    }
}

#[test]
fn packets_that_are_not_plain_or_not_for_a_pod_here_go_on() {
    let mut node = node();
    for f in families() {
        let udp = |packet: Packet| packet.udp(50_000, SHUT, b"data");
        leaves(&mut node, &udp(to_pod(f).vlan(7)));
        leaves(&mut node, &udp(to_pod(f).fragment(0, true, 1)));
        leaves(&mut node, &udp(to_pod(f).fragment(8, false, 1)));
        leaves(&mut node, &to_pod(f).icmp(&Icmp::EchoRequest(7, 1)));
        leaves(&mut node, &to_pod(f).sctp_init(50_000, SHUT));
        if f.pod.is_ipv4() {
            leaves(&mut node, &udp(to_pod(f).options(&[1, 1, 1, 0])));
        } else {
            leaves(&mut node, &udp(to_pod(f).hop_by_hop(0)));
        }
        for destination in [f.node, f.other_node, f.service, f.far_pod, f.stranger] {
            leaves(&mut node, &udp(Packet::new(f.lan, destination)));
            leaves(&mut node, &Packet::new(f.lan, destination).tcp(Tcp::syn(50_000, 30_081)));
        }
        for source in [f.node, f.other_node, f.pod, f.far_pod] {
            leaves(&mut node, &udp(Packet::new(source, f.pod)));
        }
        node.host(f.far_pod, POD_INTERFACE).expect("room for a pod");
        drops(&mut node, &udp(Packet::new(f.lan, f.far_pod)), Reason::no_rule);
    }
}

#[test]
fn truncated_and_odd_frames_go_on() {
    let mut node = node();
    for f in families() {
        for packet in [to_pod(f).udp(50_000, SHUT, b""), to_pod(f).tcp(Tcp::syn(50_000, SHUT))] {
            let frame = packet.frame();
            for length in 14..frame.len() {
                let dropped = node.run_shield(&frame[..length]).expect("the shield runs");
                assert_eq!(dropped, None, "{length} of {} bytes", frame.len());
            }
            assert!(node.run_shield(&frame).expect("the shield runs").is_some());
        }
    }
}

/// More than a page: its rest is not in the linear part.
#[test]
fn the_length_of_a_long_frame_is_counted_whole() {
    let mut node = node();
    for f in families() {
        let packet = to_pod(f).udp(50_000, SHUT, &[7; 9000]);
        let before = node.datapath().maps.shielded().expect("a counter");
        assert_eq!(node.run_shield(&packet.frame()).expect("the shield runs"), Some(Reason::no_rule));
        let after = node.datapath().maps.shielded().expect("a counter");
        assert_eq!(after.packets - before.packets, 1);
        assert_eq!(after.bytes - before.bytes, packet.frame().len() as u64);
    }
}

fn denying(audited: Vec<Rule>) -> Policy {
    let shut = Rule {
        action: Action::Deny,
        ..rule("shut", Direction::Inbound, Protocol::Any, &[range(SHUT, SHUT)])
    };
    let mut policy = usual_policy();
    policy.rules.push(shut);
    Policy { audited, ..policy }
}

#[test]
fn a_rule_that_denies_is_counted_and_noted() {
    stay_on(0).expect("a CPU");
    let mut node = node_of(&denying(Vec::new()), &dry());
    let slot = node.slot();
    let hits = |node: &Node| -> u64 {
        node.rule_hits(slot).expect("hits").iter().map(|hits| hits.expect("a hit").packets).sum()
    };
    for f in families() {
        let (before, packet) = (hits(&node), to_pod(f).udp(50_000, SHUT, b"data"));
        let suppressed = node.datapath().maps.suppressed_events().expect("a counter");
        assert_eq!(node.run_shield(&packet.frame()).expect("the shield runs"), Some(Reason::deny_rule));
        assert_eq!(hits(&node) - before, 1);
        assert_eq!(node.datapath().maps.suppressed_events().expect("a counter") - suppressed, 1);
        let (denials, _) = node.datapath().maps.denials(None).expect("denials");
        let known: Vec<_> =
            denials.iter().filter(|one| one.class.pod == f.pod && one.class.external == f.lan).collect();
        assert_eq!(known.iter().map(|one| one.count).sum::<u64>(), 1, "{known:?}");
    }
}

#[test]
fn rules_in_audit_mode_see_every_packet_that_they_may_be_about() {
    let audited = rule("watch", Direction::Inbound, Protocol::Udp, &[range(SHUT, SHUT)]);
    let mut node = node_of(&denying(vec![audited]), &dry());
    for f in families() {
        leaves(&mut node, &to_pod(f).udp(50_000, SHUT, b"data"));
        leaves(&mut node, &to_pod(f).tcp(Tcp::syn(50_000, 9)));
        // They are about LAN hosts, and about flows that begin.
        drops(&mut node, &Packet::new(f.stranger, f.pod).udp(50_000, SHUT, b"data"), Reason::no_rule);
        drops(&mut node, &to_pod(f).tcp(Tcp::ack(50_000, SHUT, 1, 1)), Reason::not_syn);
    }
    node.publish(&usual_policy(), &Behaviour { audit: true, ..dry() }).expect("a policy");
    for f in families() {
        leaves(&mut node, &to_pod(f).udp(50_000, SHUT, b"data"));
    }
}

/// A flow of the cache that the table has no room for any more.
#[test]
fn packets_that_the_cache_may_pass_go_on() {
    stay_on(0).expect("a CPU");
    let mut node = node();
    let [f, _] = families();
    let c = Connection::inbound(f, OPEN);
    c.establish(&mut node);
    node.passes(c.client_hook, &c.ack(), Reason::established);
    node.empty_tables().expect("empty tables");
    leaves(&mut node, &c.ack());
    node.passes(c.client_hook, &c.ack(), Reason::established);
    thread::sleep(Duration::from_nanos(nanoseconds(LIFETIME_TICKS + 2)));
    drops(&mut node, &c.ack(), Reason::not_syn);
}

#[test]
fn as_many_go_on_as_may_be_answered_or_reported() {
    const LIMIT: u32 = 7;
    stay_on(0).expect("a CPU");
    let [f, _] = families();
    let (udp, ack) = (to_pod(f).udp(50_000, SHUT, b"data"), to_pod(f).tcp(Tcp::ack(50_000, OPEN, 1, 1)));
    let gone_on = |node: &mut Node, (packet, reason): (&Packet, Reason), behind: bool| {
        let mut gone_on = 0;
        for _ in 0..100 {
            if node.run_shield(&packet.frame()).expect("the shield runs").is_none() {
                gone_on += 1;
                if behind {
                    node.denies(ExternalIngress, packet, reason);
                }
            }
        }
        gone_on
    };
    for (packet, reject, events_per_second, answers_per_second, wanted) in [
        ((&udp, Reason::no_rule), true, 0, LIMIT, LIMIT),
        ((&ack, Reason::not_syn), false, LIMIT, LIMIT, LIMIT),
        ((&udp, Reason::no_rule), false, 0, LIMIT, 0),
        // Each that is answered is reported, too.
        ((&ack, Reason::not_syn), true, 2 * LIMIT, LIMIT, 2 * LIMIT),
    ] {
        let behaviour = Behaviour { reject, events_per_second, answers_per_second, ..behaviour() };
        let mut node = node_of(&usual_policy(), &behaviour);
        assert_eq!(gone_on(&mut node, packet, true), wanted, "{behaviour:?}");
        let events = node.events();
        assert_eq!(events.len(), events_per_second as usize);
        let rejected = events.iter().filter(|event| event.verdict == verdict::REJECT).count();
        assert!(!reject || events.is_empty() || rejected == LIMIT as usize, "{rejected} rejected");
        // In the next second: a hook that neither answers nor reports them gets no more.
        thread::sleep(Duration::from_millis(1100));
        let most = if wanted == 0 { 0 } else { events_per_second + answers_per_second };
        assert_eq!(gone_on(&mut node, packet, false), most, "{behaviour:?}");
    }
}
