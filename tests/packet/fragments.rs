//! A denied datagram never completes, an allowed one completes if its first fragment arrives first.

use bridge_common::filter::counters::Reason;
use bridge_lab::packet::{Packet, Tcp};

use crate::world::{ExternalIngress, InternalEgress, InternalIngress, OPEN, SHUT, families, from_lan, node};

fn datagram(family: &crate::world::Family, port: u16) -> Packet {
    Packet::new(family.lan, family.pod).udp(50_000, port, &[7; 100])
}

#[test]
fn later_fragments_pass_after_a_first_one_that_passes() {
    let mut node = node();
    for f in families() {
        let denied = datagram(&f, SHUT).fragments(32, 10);
        node.denies(ExternalIngress, &denied[0], Reason::no_rule);
        for part in &denied[1..] {
            node.denies(ExternalIngress, part, Reason::fragment_unknown);
        }
        let parts = datagram(&f, OPEN).fragments(32, 9);
        node.passes(ExternalIngress, &parts[0], Reason::new_flow);
        for part in parts[1..].iter().rev() {
            node.passes(ExternalIngress, part, Reason::later_fragment);
        }
        // The other way, and another host, are others.
        let back = Packet::new(f.pod, f.lan).udp(OPEN, 50_000, &[7; 100]).fragments(32, 11);
        node.denies(InternalIngress, &back[1], Reason::fragment_unknown);
        node.passes(InternalIngress, &back[0], Reason::established);
        node.passes(InternalIngress, &back[1], Reason::later_fragment);
        let other = Packet::new(f.stranger, f.pod).udp(50_000, OPEN, &[7; 100]).fragments(32, 12);
        node.denies(ExternalIngress, &other[1], Reason::fragment_unknown);
    }
}

#[test]
fn a_reply_in_fragments_that_was_translated_reaches_the_pod() {
    let mut node = node();
    for f in families() {
        let parts = Packet::new(f.stranger, f.pod).udp(53, 50_000, &[7; 100]).fragments(32, 9);
        node.denies(from_lan(InternalEgress), &parts[1], Reason::fragment_unknown);
        node.ignores(InternalIngress, &Packet::new(f.pod, f.stranger).udp(50_000, 53, b"x"));
        node.ignores(from_lan(InternalEgress), &parts[0]);
        node.passes(from_lan(InternalEgress), &parts[1], Reason::later_fragment);
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
        node.denies(ExternalIngress, &parts[2], Reason::fragment_unknown);
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
        for part in Packet::new(f.lan, f.far_pod).udp(50_000, SHUT, &[7; 100]).fragments(8, 9) {
            node.ignores(ExternalIngress, &part);
        }
        for part in Packet::new(f.lan, f.node).udp(50_000, SHUT, &[7; 100]).fragments(8, 9) {
            node.ignores(ExternalIngress, &part);
        }
    }
}
