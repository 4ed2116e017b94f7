//! ICMP and ICMPv6: queries and their replies, errors and the packets that they quote.

use bridge_common::filter::{counters::Reason, flow::state};
use bridge_lab::packet::{Icmp, Packet, Tcp};

use crate::world::{
    Connection, ExternalEgress, ExternalIngress, InternalEgress, InternalIngress, OPEN, families, from_lan,
    key, node,
};

#[test]
fn a_query_is_judged_and_its_replies_pass() {
    let mut node = node();
    for f in families() {
        let request = Packet::new(f.lan, f.pod).icmp(&Icmp::EchoRequest(77, 1));
        let reply = Packet::new(f.pod, f.lan).icmp(&Icmp::EchoReply(77, 1));
        node.denies(InternalIngress, &reply, Reason::icmp_unsolicited);
        node.passes(ExternalIngress, &request, Reason::new_flow);
        node.passes(InternalIngress, &reply, Reason::established);
        node.passes(ExternalIngress, &request, Reason::established);
        let number = if f.lan.is_ipv4() { 1 } else { 58 };
        let flow = node.flow(&key(&request, number, 77, 77)).map(|(table, flow)| (table, flow.state));
        assert_eq!(flow, Some(("other_flows", state::ICMP_REPLIED)));
        // Another identifier is another flow; the other direction has no rule.
        let other = Packet::new(f.pod, f.lan).icmp(&Icmp::EchoReply(78, 1));
        node.denies(InternalIngress, &other, Reason::icmp_unsolicited);
        let back = Packet::new(f.pod, f.lan).icmp(&Icmp::EchoRequest(77, 1));
        node.denies(InternalIngress, &back, Reason::no_rule);
        let wrong_way = Packet::new(f.lan, f.pod).icmp(&Icmp::EchoReply(77, 1));
        node.denies(ExternalIngress, &wrong_way, Reason::icmp_unsolicited);
    }
}

#[test]
fn an_error_passes_if_it_quotes_a_flow_of_its_addressee() {
    let mut node = node();
    for f in families() {
        let c = Connection::inbound(f, OPEN);
        let quoted = c.syn_ack().ip();
        let errors = || {
            [
                Icmp::Unreachable(1, quoted.clone()),
                Icmp::TooBig(1280, quoted.clone()),
                Icmp::TimeExceeded(quoted.clone()),
            ]
        };
        for error in errors() {
            node.denies(ExternalIngress, &Packet::new(f.lan, f.pod).icmp(&error), Reason::icmp_unrelated);
        }
        c.establish(&mut node);
        for error in errors() {
            // From the LAN host itself, and from a router of the LAN on the way to it.
            node.passes(ExternalIngress, &Packet::new(f.lan, f.pod).icmp(&error), Reason::related);
            // The quoted packet was not sent by the receiver of the error.
            node.denies(InternalIngress, &Packet::new(f.pod, f.lan).icmp(&error), Reason::icmp_unrelated);
        }
    }
}

#[test]
fn a_router_of_the_lan_may_report_about_a_flow_that_goes_beyond_it() {
    let mut node = node();
    for f in families() {
        let beyond = |port| Packet::new(f.pod, f.stranger).tcp(Tcp::syn(50_000, port));
        let router = |quoted| Packet::new(f.lan, f.pod).icmp(&Icmp::TooBig(1280, quoted));
        node.denies(ExternalIngress, &router(beyond(443).ip()), Reason::icmp_unrelated);
        node.ignores(InternalIngress, &beyond(443));
        node.passes(ExternalIngress, &router(beyond(443).ip()), Reason::related);
        // Neither about packets of others, nor about flows that are not known.
        let others = Packet::new(f.stranger, f.pod).tcp(Tcp::syn(443, 50_000)).ip();
        node.denies(ExternalIngress, &router(others), Reason::icmp_unrelated);
        let unknown = Packet::new(f.pod, f.lan).tcp(Tcp::syn(50_000, 443)).ip();
        node.denies(ExternalIngress, &router(unknown), Reason::icmp_unrelated);
    }
}

#[test]
fn a_redirect_is_related_to_nothing() {
    let mut node = node();
    let [v4, v6] = families();
    for (f, kind, reason) in [(v4, 5, Reason::icmp_unrelated), (v6, 137, Reason::icmp_type)] {
        let c = Connection::inbound(f, OPEN);
        c.establish(&mut node);
        let redirect = |quoted| Packet::new(f.lan, f.pod).icmp(&Icmp::Other(kind, 1, [0; 4], quoted));
        node.denies(ExternalIngress, &redirect(c.syn_ack().ip()), reason);
        node.denies(from_lan(InternalEgress), &redirect(c.syn_ack().ip()), reason);
        let error = Packet::new(f.lan, f.pod).icmp(&Icmp::Unreachable(1, c.syn_ack().ip()));
        node.passes(ExternalIngress, &error, Reason::related);
    }
}

#[test]
fn an_error_about_a_half_open_connection_passes() {
    let mut node = node();
    for f in families() {
        let c = Connection::outbound(f, crate::world::OUT);
        node.passes(InternalIngress, &c.syn(), Reason::new_flow);
        let error = Packet::new(f.lan, f.pod).icmp(&Icmp::Unreachable(3, c.syn().ip()));
        node.passes(ExternalIngress, &error, Reason::related);
    }
}

#[test]
fn eight_bytes_of_the_quoted_header_are_enough_and_fewer_are_not() {
    let mut node = node();
    for f in families() {
        let c = Connection::inbound(f, OPEN);
        c.establish(&mut node);
        let quoted = c.syn_ack().ip();
        let header = if f.lan.is_ipv4() { 20 } else { 40 };
        let error =
            |length: usize| Packet::new(f.lan, f.pod).icmp(&Icmp::Unreachable(1, quoted[..length].to_vec()));
        node.passes(ExternalIngress, &error(header + 8), Reason::related);
        for length in [header + 7, header, header - 1, 1, 0] {
            node.denies(ExternalIngress, &error(length), Reason::icmp_unrelated);
        }
    }
}

#[test]
fn an_error_about_an_error_or_a_later_fragment_is_denied() {
    let mut node = node();
    for f in families() {
        let c = Connection::inbound(f, OPEN);
        c.establish(&mut node);
        let inner = Packet::new(f.pod, f.lan).icmp(&Icmp::Unreachable(1, c.ack().ip())).ip();
        let outer = Packet::new(f.lan, f.pod).icmp(&Icmp::Unreachable(1, inner));
        node.denies(ExternalIngress, &outer, Reason::icmp_unrelated);
        let fragment = Packet::new(f.pod, f.lan).tcp(Tcp::ack(OPEN, 50_000, 1, 1)).fragment(5, false, 1).ip();
        let error = Packet::new(f.lan, f.pod).icmp(&Icmp::Unreachable(1, fragment));
        node.denies(ExternalIngress, &error, Reason::icmp_unrelated);
    }
}

#[test]
fn an_error_about_a_query_follows_the_query() {
    let mut node = node();
    for f in families() {
        let request = Packet::new(f.lan, f.pod).icmp(&Icmp::EchoRequest(5, 1));
        let error = Packet::new(f.pod, f.lan).icmp(&Icmp::Unreachable(1, request.ip()));
        node.denies(InternalIngress, &error, Reason::icmp_unrelated);
        node.passes(ExternalIngress, &request, Reason::new_flow);
        node.passes(InternalIngress, &error, Reason::related);
    }
}

#[test]
fn types_that_are_neither_query_reply_nor_error_are_denied() {
    let mut node = node();
    let [v4, v6] = families();
    let queries = [8, 13, 15, 17];
    let replies = [0, 14, 16, 18];
    let errors = [3, 4, 5, 11, 12];
    for kind in 0..=u8::MAX {
        let packet = Packet::new(v4.lan, v4.pod).icmp(&Icmp::Other(kind, 0, [0, kind, 0, 1], vec![0; 28]));
        let judged = node.run(ExternalIngress, &packet.frame()).expect("the program runs");
        let expected = match kind {
            kind if queries.contains(&kind) => Reason::new_flow,
            kind if replies.contains(&kind) => Reason::icmp_unsolicited,
            kind if errors.contains(&kind) => Reason::icmp_unrelated,
            _ => Reason::icmp_type,
        };
        assert_eq!(judged.counted.map(|(_, reason)| reason), Some(expected), "ICMP type {kind}");
        let packet = Packet::new(v6.lan, v6.pod).icmp(&Icmp::Other(kind, 0, [0, kind, 0, 1], vec![0; 48]));
        let judged = node.run(ExternalIngress, &packet.frame()).expect("the program runs");
        let expected = match kind {
            128 => Reason::new_flow,
            129 => Reason::icmp_unsolicited,
            1..=4 => Reason::icmp_unrelated,
            _ => Reason::icmp_type,
        };
        assert_eq!(judged.counted.map(|(_, reason)| reason), Some(expected), "ICMPv6 type {kind}");
    }
}

#[test]
fn an_identifier_is_no_node_port() {
    let mut node = node();
    for f in families() {
        // On its way out to the LAN, the reply has an identifier that would be a NodePort.
        let request = Packet::new(f.lan, f.pod).icmp(&Icmp::EchoRequest(30_080, 1));
        let reply = Packet::new(f.pod, f.lan).icmp(&Icmp::EchoReply(30_080, 1));
        node.passes(ExternalIngress, &request, Reason::new_flow);
        node.ignores(ExternalEgress, &reply);
        let number = if f.lan.is_ipv4() { 1 } else { 58 };
        let flow = node.flow(&key(&request, number, 30_080, 30_080)).map(|(table, flow)| (table, flow.state));
        assert_eq!(flow, Some(("half_open", state::ICMP_UNREPLIED)));
    }
}
