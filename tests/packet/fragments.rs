//! A denied datagram never completes, an allowed one completes in any order of arrival.

use bridge_common::filter::counters::Reason;
use bridge_lab::packet::{Packet, Tcp};

use crate::world::{ExternalIngress, OPEN, SHUT, families, node};

fn datagram(family: &crate::world::Family, port: u16) -> Packet {
    Packet::new(family.lan, family.pod).udp(50_000, port, &[7; 100])
}

#[test]
fn the_first_fragment_is_judged_and_the_others_pass() {
    let mut node = node();
    for f in families() {
        let parts = datagram(&f, OPEN).fragments(32, 9);
        node.passes(ExternalIngress, &parts[0], Reason::new_flow);
        for part in &parts[1..] {
            node.passes(ExternalIngress, part, Reason::later_fragment);
        }
        let parts = datagram(&f, SHUT).fragments(32, 10);
        node.denies(ExternalIngress, &parts[0], Reason::no_rule);
        for part in &parts[1..] {
            node.passes(ExternalIngress, part, Reason::later_fragment);
        }
    }
}

#[test]
fn the_order_of_arrival_does_not_matter() {
    let mut node = node();
    for f in families() {
        for (i, part) in datagram(&f, OPEN).fragments(32, 9).iter().enumerate().rev() {
            let reason = if i == 0 { Reason::new_flow } else { Reason::later_fragment };
            node.passes(ExternalIngress, part, reason);
        }
    }
}

#[test]
fn a_first_fragment_without_the_whole_layer_4_header_is_denied() {
    let mut node = node();
    for f in families() {
        let parts = Packet::new(f.lan, f.pod).tcp(Tcp::syn(50_000, OPEN)).fragments(16, 9);
        node.denies(ExternalIngress, &parts[0], Reason::fragment_short);
        // Even if the first fragment says that more of the header follows than it holds.
        let mut tcp = Tcp::syn(50_000, OPEN);
        tcp.header.set_options_raw(&[1; 12]).expect("12 bytes of options");
        let parts = Packet::new(f.lan, f.pod).tcp(tcp).fragments(24, 9);
        node.denies(ExternalIngress, &parts[0], Reason::fragment_short);
    }
}

#[test]
fn a_fragment_that_could_overwrite_tcp_flags_is_denied() {
    let mut node = node();
    for f in families() {
        let parts = Packet::new(f.lan, f.pod).tcp(Tcp::syn(50_000, OPEN).payload(&[0; 40])).fragments(8, 9);
        node.denies(ExternalIngress, &parts[1], Reason::fragment_overlap);
        node.passes(ExternalIngress, &parts[2], Reason::later_fragment);
    }
}

#[test]
fn a_whole_packet_in_one_fragment_is_judged_as_a_whole_one() {
    // RFC 6946: offset 0 and no more to come.
    let mut node = node();
    for f in families() {
        let packet = |port| Packet::new(f.lan, f.pod).tcp(Tcp::syn(50_000, port)).fragment(0, false, 9);
        node.passes(ExternalIngress, &packet(OPEN), Reason::new_flow);
        node.denies(ExternalIngress, &packet(SHUT), Reason::no_rule);
    }
}

#[test]
fn fragments_out_of_scope_pass_untouched() {
    let mut node = node();
    for f in families() {
        for part in Packet::new(f.stranger, f.pod).udp(50_000, SHUT, &[7; 100]).fragments(8, 9) {
            node.ignores(ExternalIngress, &part);
        }
        for part in Packet::new(f.lan, f.node).udp(50_000, SHUT, &[7; 100]).fragments(8, 9) {
            node.ignores(ExternalIngress, &part);
        }
    }
}
