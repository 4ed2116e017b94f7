//! TCP: from SYN to the end, and packets that do not fit.

use std::time::Duration;

use bridge_agent::datapath::Hook;
use bridge_common::filter::{counters::Reason, flow::state, policy::direction};
use bridge_lab::{
    packet::{Packet, Tcp},
    prog::{Action, Node, TIMEOUT, behaviour},
};

use crate::world::{Connection, ExternalIngress, OPEN, OUT, SHUT, families, node, policy, usual_policy};

fn connections() -> impl Iterator<Item = Connection> {
    families()
        .into_iter()
        .flat_map(|family| [Connection::inbound(family, OPEN), Connection::outbound(family, OUT)])
}

fn state_of(node: &Node, c: &Connection) -> Option<u8> {
    node.flow(&c.key()).map(|(_, flow)| flow.state)
}

/// Whether the client is the pod.
fn is_outbound(c: &Connection) -> bool {
    c.client_hook != ExternalIngress
}

/// Where packets of the LAN host come in.
const LAN: Hook = ExternalIngress;

/// A segment of the LAN host; ports in the order of its headers.
fn lan_sends(c: &Connection, make: impl FnOnce(u16, u16) -> Tcp) -> Packet {
    if is_outbound(c) { c.server_sends(make) } else { c.client_sends(make) }
}

fn pod_sends(c: &Connection, make: impl FnOnce(u16, u16) -> Tcp) -> Packet {
    if is_outbound(c) { c.client_sends(make) } else { c.server_sends(make) }
}

/// The next sequence numbers of the LAN host and of the pod after the handshake.
fn numbers(c: &Connection) -> (u32, u32) {
    if is_outbound(c) { (5001, 1001) } else { (1001, 5001) }
}

#[test]
fn a_connection_passes_from_syn_to_fin_and_its_table_entry_follows() {
    let mut node = node();
    for c in connections() {
        node.passes(c.client_hook, &c.syn(), Reason::new_flow);
        assert_eq!(
            node.flow(&c.key()).map(|(table, f)| (table, f.state)),
            Some(("half_open", state::SYN_SENT))
        );
        node.passes(c.server_hook, &c.syn_ack(), Reason::established);
        assert_eq!(
            node.flow(&c.key()).map(|(table, f)| (table, f.state)),
            Some(("half_open", state::SYN_RECEIVED))
        );
        node.passes(c.client_hook, &c.ack(), Reason::established);
        assert_eq!(
            node.flow(&c.key()).map(|(table, f)| (table, f.state)),
            Some(("flows", state::ESTABLISHED))
        );
        node.passes(c.server_hook, &c.server_ack(), Reason::established);

        let fin = c.client_sends(|s, d| Tcp::fin(s, d, 1001, 5001));
        node.passes(c.client_hook, &fin, Reason::established);
        let ack = c.server_sends(|s, d| Tcp::ack(s, d, 5001, 1002));
        node.passes(c.server_hook, &ack, Reason::established);
        assert_eq!(state_of(&node, &c), Some(state::FIN_WAIT));
        let fin = c.server_sends(|s, d| Tcp::fin(s, d, 5001, 1002));
        node.passes(c.server_hook, &fin, Reason::established);
        let ack = c.client_sends(|s, d| Tcp::ack(s, d, 1002, 5002));
        node.passes(c.client_hook, &ack, Reason::established);
        assert_eq!(state_of(&node, &c), Some(state::CLOSING));
    }
}

#[test]
fn a_shut_port_is_denied_in_both_directions() {
    let mut node = node();
    for family in families() {
        for c in [Connection::inbound(family, SHUT), Connection::outbound(family, SHUT)] {
            node.denies(c.client_hook, &c.syn(), Reason::no_rule);
            assert_eq!(node.flow(&c.key()), None);
        }
    }
}

#[test]
fn nothing_but_a_syn_opens_a_connection() {
    let mut node = node();
    for c in connections() {
        for packet in [c.ack(), c.client_sends(|s, d| Tcp::rst(s, d, 1)), c.client_sends(Tcp::syn_ack)] {
            node.denies(c.client_hook, &packet, Reason::not_syn);
        }
        node.denies(c.client_hook, &c.client_sends(|s, d| Tcp::fin(s, d, 1, 1)), Reason::not_syn);
    }
}

#[test]
fn a_server_cannot_open_the_connection_it_is_to_answer() {
    let mut node = node();
    for c in connections() {
        c.establish(&mut node);
        node.denies(c.server_hook, &c.server_sends(Tcp::syn), Reason::no_rule);
        node.passes(c.server_hook, &c.server_ack(), Reason::established);
    }
}

#[test]
fn an_acknowledgement_without_the_syn_ack_completes_nothing() {
    let mut node = node();
    for c in connections() {
        node.passes(c.client_hook, &c.syn(), Reason::new_flow);
        node.denies(c.client_hook, &c.ack(), Reason::invalid_state);
        node.passes(c.server_hook, &c.syn_ack(), Reason::established);
        for acknowledged in [5000, 0, 5001 + (1 << 20), 0x8000_0000] {
            let blind = c.client_sends(|s, d| Tcp::ack(s, d, 1001, acknowledged));
            let judged = node.denies(c.client_hook, &blind, Reason::invalid_state);
            // An RST, seen on its way to the client, would end the handshake that the packet only claims to be of.
            assert_eq!(judged.action, Action::Drop);
        }
        assert_eq!(node.flow(&c.key()).map(|(table, _)| table), Some("half_open"));
        node.passes(c.client_hook, &c.ack(), Reason::established);
    }
}

#[test]
fn a_repeated_syn_is_judged_by_the_policy_of_now_until_the_connection_stands() {
    let mut node = node();
    let behaviour = behaviour();
    for c in connections() {
        node.publish(&usual_policy(), &behaviour).expect("a policy");
        node.passes(c.client_hook, &c.syn(), Reason::new_flow);
        node.publish(&policy(Vec::new()), &behaviour).expect("a policy");
        node.denies(c.client_hook, &c.syn(), Reason::no_rule);
        node.publish(&usual_policy(), &behaviour).expect("a policy");
        c.establish(&mut node);
        node.publish(&policy(Vec::new()), &behaviour).expect("a policy");
        // Of an established connection as well, which goes on without it.
        node.denies(c.client_hook, &c.syn(), Reason::no_rule);
        node.passes(c.client_hook, &c.ack(), Reason::established);
        node.publish(&usual_policy(), &behaviour).expect("a policy");
        node.passes(c.client_hook, &c.syn(), Reason::new_flow);
        node.passes(c.server_hook, &c.server_ack(), Reason::established);
        node.passes(c.client_hook, &c.ack(), Reason::established);
        assert_eq!(node.flow(&c.key()).map(|(table, _)| table), Some("flows"));
    }
}

#[test]
fn a_syn_ack_that_does_not_acknowledge_the_syn_changes_nothing() {
    let mut node = node();
    for c in connections() {
        node.passes(c.client_hook, &c.syn(), Reason::new_flow);
        let forged = |acknowledgement| {
            c.server_sends(|s, d| {
                let mut tcp = Tcp::ack(s, d, 77_000, acknowledgement);
                tcp.header.syn = true;
                tcp
            })
        };
        for acknowledgement in [1000, 1002, 0, 0x8000_0000] {
            let before = node.flow(&c.key());
            node.passes(c.server_hook, &forged(acknowledgement), Reason::established);
            assert_eq!(node.flow(&c.key()), before);
        }
        node.passes(c.server_hook, &c.syn_ack(), Reason::established);
        // Nor after the one that does.
        node.passes(c.server_hook, &forged(1000), Reason::established);
        node.passes(c.client_hook, &c.ack(), Reason::established);
        assert_eq!(state_of(&node, &c), Some(state::ESTABLISHED));
    }
}

#[test]
fn a_reset_in_the_name_of_a_lan_host_counts_by_its_number() {
    let mut node = node();
    for c in connections() {
        c.establish(&mut node);
        let (lan, _) = numbers(&c);
        for forged in [0, 77, lan.wrapping_sub(1), lan + (1 << 16), lan.wrapping_add(1 << 31)] {
            node.passes(LAN, &lan_sends(&c, |s, d| Tcp::rst(s, d, forged)), Reason::established);
            assert_eq!(state_of(&node, &c), Some(state::ESTABLISHED), "{forged}");
        }
        for right in [lan, lan + (1 << 16) - 1] {
            node.passes(LAN, &lan_sends(&c, |s, d| Tcp::rst(s, d, right)), Reason::established);
            assert_eq!(state_of(&node, &c), Some(state::RESET), "{right}");
            node.passes(c.client_hook, &c.ack(), Reason::established);
            assert_eq!(state_of(&node, &c), Some(state::ESTABLISHED));
        }
    }
}

#[test]
fn a_fin_in_the_name_of_a_lan_host_counts_when_the_pod_acknowledges_it() {
    let mut node = node();
    for c in connections() {
        c.establish(&mut node);
        let (lan, pod) = numbers(&c);
        let pod_hook = if is_outbound(&c) { c.client_hook } else { c.server_hook };
        let ack = |number| pod_sends(&c, |s, d| Tcp::ack(s, d, pod, number));
        // Forged; the pod does not move.
        node.passes(LAN, &lan_sends(&c, |s, d| Tcp::fin(s, d, 99_000, pod)), Reason::established);
        for number in [lan, 99_000, 99_002] {
            node.passes(pod_hook, &ack(number), Reason::established);
            assert_eq!(state_of(&node, &c), Some(state::ESTABLISHED));
        }
        // With data.
        let fin = lan_sends(&c, |s, d| Tcp::fin(s, d, lan, pod).payload(&[7; 30]));
        node.passes(LAN, &fin, Reason::established);
        assert_eq!(state_of(&node, &c), Some(state::ESTABLISHED));
        node.passes(pod_hook, &ack(lan + 30), Reason::established);
        assert_eq!(state_of(&node, &c), Some(state::ESTABLISHED));
        node.passes(pod_hook, &ack(lan + 31), Reason::established);
        assert_eq!(state_of(&node, &c), Some(state::FIN_WAIT));
    }
}

#[test]
fn an_acknowledgement_that_comes_late_confirms_no_fin() {
    let mut node = node();
    for c in connections() {
        let (lan, pod) = numbers(&c);
        let pod_hook = if is_outbound(&c) { c.client_hook } else { c.server_hook };
        for (seconds, state) in [(11, state::ESTABLISHED), (8, state::FIN_WAIT)] {
            node.forget_flows().expect("empty tables");
            c.establish(&mut node);
            node.passes(LAN, &lan_sends(&c, |s, d| Tcp::fin(s, d, lan, pod)), Reason::established);
            node.age(&c.key(), Duration::from_secs(seconds));
            node.passes(pod_hook, &pod_sends(&c, |s, d| Tcp::ack(s, d, pod, lan + 1)), Reason::established);
            assert_eq!(state_of(&node, &c), Some(state), "{seconds} s");
        }
    }
}

#[test]
fn a_half_closed_connection_lives_until_the_other_side_ends_it() {
    let mut node = node();
    let mut quick = behaviour();
    quick.timeouts[usize::from(state::CLOSING)] = 5_000_000_000;
    node.publish(&usual_policy(), &quick).expect("a policy");
    for c in connections() {
        c.establish(&mut node);
        node.passes(c.client_hook, &c.client_sends(|s, d| Tcp::fin(s, d, 1001, 5001)), Reason::established);
        node.passes(c.server_hook, &c.server_sends(|s, d| Tcp::ack(s, d, 5001, 1002)), Reason::established);
        node.age(&c.key(), Duration::from_secs(130));
        let data = c.server_sends(|s, d| Tcp::ack(s, d, 5001, 1002).payload(&[7; 9]));
        node.passes(c.server_hook, &data, Reason::established);
        node.passes(c.server_hook, &c.server_sends(|s, d| Tcp::fin(s, d, 5010, 1002)), Reason::established);
        node.passes(c.client_hook, &c.client_sends(|s, d| Tcp::ack(s, d, 1002, 5011)), Reason::established);
        node.age(&c.key(), Duration::from_secs(6));
        node.denies(c.server_hook, &data, Reason::not_syn);
    }
}

#[test]
fn ports_used_again_after_a_close_are_judged_anew() {
    let mut node = node();
    for c in connections() {
        node.publish(&usual_policy(), &behaviour()).expect("a policy");
        c.establish(&mut node);
        node.passes(c.client_hook, &c.client_sends(|s, d| Tcp::rst(s, d, 1001)), Reason::established);
        assert_eq!(state_of(&node, &c), Some(state::RESET));
        c.establish(&mut node);
        node.passes(c.client_hook, &c.client_sends(|s, d| Tcp::rst(s, d, 1001)), Reason::established);
        node.publish(&policy(Vec::new()), &behaviour()).expect("a policy");
        node.denies(c.client_hook, &c.syn(), Reason::no_rule);
    }
}

#[test]
fn a_reset_that_its_receiver_ignores_closes_nothing() {
    let mut node = node();
    for c in connections() {
        c.establish(&mut node);
        node.passes(c.server_hook, &c.server_sends(|s, d| Tcp::rst(s, d, 77)), Reason::established);
        node.passes(c.client_hook, &c.ack(), Reason::established);
        assert_eq!(state_of(&node, &c), Some(state::ESTABLISHED));
    }
}

#[test]
fn a_refused_connection_may_be_tried_again() {
    let mut node = node();
    for c in connections() {
        node.passes(c.client_hook, &c.syn(), Reason::new_flow);
        let refusal = |acknowledgement| {
            c.server_sends(|s, d| {
                let mut tcp = Tcp::ack(s, d, 0, acknowledgement);
                tcp.header.rst = true;
                tcp
            })
        };
        node.passes(c.server_hook, &refusal(77), Reason::established);
        assert_eq!(state_of(&node, &c), Some(state::SYN_SENT));
        node.passes(c.server_hook, &refusal(1001), Reason::established);
        assert_eq!(state_of(&node, &c), Some(state::RESET));
        c.establish(&mut node);
    }
}

#[test]
fn a_server_that_remembers_an_older_connection_may_say_so() {
    // RFC 5961, 4.2: it answers the SYN with a challenge ACK, the client resets it and tries again.
    let mut node = node();
    for c in connections() {
        node.passes(c.client_hook, &c.syn(), Reason::new_flow);
        node.passes(c.server_hook, &c.server_sends(|s, d| Tcp::ack(s, d, 9000, 8000)), Reason::established);
        node.passes(c.client_hook, &c.client_sends(|s, d| Tcp::rst(s, d, 8000)), Reason::established);
        c.establish(&mut node);
    }
}

#[test]
fn a_silent_connection_ends_with_its_timeout_and_not_before() {
    let mut node = node();
    let second = Duration::from_secs(1);
    // The machine may not have been up for an hour.
    let short = Duration::from_secs(20);
    let mut quick = behaviour();
    quick.timeouts = [u64::try_from(short.as_nanos()).expect("20 s"); state::COUNT];
    node.publish(&usual_policy(), &quick).expect("a policy");
    assert!(short < TIMEOUT);
    for c in connections() {
        c.establish(&mut node);
        node.age(&c.key(), short - 5 * second);
        node.passes(c.server_hook, &c.server_ack(), Reason::established);
        node.age(&c.key(), short + second);
        node.denies(c.server_hook, &c.server_ack(), Reason::not_syn);

        node.passes(c.client_hook, &c.syn(), Reason::new_flow);
        node.age(&c.key(), short + second);
        node.denies(c.server_hook, &c.syn_ack(), Reason::not_syn);
    }
}

#[test]
fn flags_that_no_sender_sets_together_are_denied() {
    let mut node = node();
    let valid: [u8; 9] = [0x02, 0x22, 0x12, 0x04, 0x14, 0x11, 0x31, 0x10, 0x30];
    for c in connections() {
        for flags in 0..=u8::MAX {
            // PSH, ECE and CWR may stand beside anything.
            let known = valid.contains(&(flags & 0x37));
            let packet = c.client_sends(|s, d| {
                let mut tcp = Tcp::ack(s, d, 1, 1);
                tcp.header.fin = flags & 0x01 != 0;
                tcp.header.syn = flags & 0x02 != 0;
                tcp.header.rst = flags & 0x04 != 0;
                tcp.header.psh = flags & 0x08 != 0;
                tcp.header.ack = flags & 0x10 != 0;
                tcp.header.urg = flags & 0x20 != 0;
                tcp.header.ece = flags & 0x40 != 0;
                tcp.header.cwr = flags & 0x80 != 0;
                tcp
            });
            let judged = node.run(c.client_hook, &packet.frame()).expect("the program runs");
            let reason = judged.counted.map(|(_, reason)| reason);
            assert_eq!(reason == Some(Reason::invalid_flags), !known, "flags {flags:#04x}: {reason:?}");
        }
    }
}

#[test]
fn no_packet_of_a_pod_bears_the_address_of_a_lan_host() {
    let mut node = node();
    for family in families() {
        let c = Connection::inbound(family, OPEN);
        node.denies(crate::world::InternalIngress, &c.syn(), Reason::spoofed);
        c.establish(&mut node);
        node.denies(crate::world::InternalIngress, &c.ack(), Reason::spoofed);
        node.passes(ExternalIngress, &c.ack(), Reason::established);
    }
}

#[test]
fn a_forged_end_and_a_forged_beginning_do_not_end_a_connection() {
    // By a sender that knows the ports and sees no packet: an RST, or a FIN, and a SYN that the rules allow.
    let mut node = node();
    let families = families();
    for end in [|s, d| Tcp::rst(s, d, 77), |s, d| Tcp::fin(s, d, 77, 77)] {
        let inbound = families.map(|family| Connection::inbound(family, OPEN));
        let outbound = families.map(|family| Connection::outbound(family, OUT));
        for c in inbound.into_iter().chain(outbound) {
            node.forget_flows().expect("empty tables");
            c.establish(&mut node);
            node.passes(c.client_hook, &c.client_sends(end), Reason::established);
            let forged = c.client_sends(|source, destination| {
                let mut syn = Tcp::syn(source, destination);
                syn.header.sequence_number = 4_000_000;
                syn
            });
            node.passes(c.client_hook, &forged, Reason::new_flow);
            // The responder says that it knows of a connection (RFC 5961, 4.2), and both go on with it.
            for _ in 0..3 {
                node.passes(c.server_hook, &c.server_ack(), Reason::established);
                node.passes(c.client_hook, &c.ack(), Reason::established);
            }
            assert_eq!(node.flow(&c.key()).map(|(table, _)| table), Some("flows"));
        }
    }
}

#[test]
fn a_reset_that_its_receiver_ignores_leaves_a_half_closed_connection_half_closed() {
    let mut node = node();
    for c in connections() {
        c.establish(&mut node);
        node.passes(c.client_hook, &c.client_sends(|s, d| Tcp::fin(s, d, 1001, 5001)), Reason::established);
        let ack = c.server_sends(|s, d| Tcp::ack(s, d, 5001, 1002));
        node.passes(c.server_hook, &ack, Reason::established);
        assert_eq!(state_of(&node, &c), Some(state::FIN_WAIT));
        node.passes(c.server_hook, &c.server_sends(|s, d| Tcp::rst(s, d, 5001)), Reason::established);
        assert_eq!(state_of(&node, &c), Some(state::RESET));
        node.passes(c.server_hook, &ack, Reason::established);
        assert_eq!(state_of(&node, &c), Some(state::FIN_WAIT));
    }
}

#[test]
fn a_reply_is_counted_under_the_direction_of_its_flow() {
    let mut node = node();
    for c in connections() {
        let of_flow = if c.client_hook == ExternalIngress { direction::INBOUND } else { direction::OUTBOUND };
        for (hook, packet) in [
            (c.client_hook, c.syn()),
            (c.server_hook, c.syn_ack()),
            (c.client_hook, c.ack()),
            (c.server_hook, c.server_ack()),
        ] {
            let judged = node.run(hook, &packet.frame()).expect("the program runs");
            assert_eq!(judged.counted.map(|(direction, _)| direction), Some(of_flow), "{packet:?}");
        }
    }
}
