//! Packets in scope and packets out of scope.

use bridge_common::filter::counters::Reason;
use bridge_lab::packet::{Packet, Tcp};
use etherparse::IpNumber;

use crate::world::{ExternalIngress, InternalIngress, OPEN, SHUT, families, ip, node};

#[test]
fn packets_with_at_most_one_side_in_scope_pass_untouched() {
    let mut node = node();
    for f in families() {
        for (source, destination) in [
            (f.stranger, f.pod),
            (f.pod, f.stranger),
            (f.stranger, f.lan),
            (f.lan, f.stranger),
            (f.lan, f.lan),
            (f.pod, f.pod),
        ] {
            for hook in [ExternalIngress, InternalIngress] {
                node.ignores(hook, &Packet::new(source, destination).tcp(Tcp::syn(50_000, SHUT)));
            }
        }
    }
}

#[test]
fn the_node_itself_is_never_cut_off() {
    let mut node = node();
    for f in families() {
        // From the LAN to the node's SSH, from a pod to the node, and back: the node is inside networks.external.
        node.ignores(ExternalIngress, &Packet::new(f.lan, f.node).tcp(Tcp::syn(50_000, 22)));
        node.ignores(InternalIngress, &Packet::new(f.pod, f.node).tcp(Tcp::syn(50_000, 10_250)));
        node.ignores(InternalIngress, &Packet::new(f.pod, f.node).tcp(Tcp::ack(10_250, 50_000, 1, 1)));
        node.ignores(ExternalIngress, &Packet::new(f.lan, f.node).udp(50_000, 53, b"x"));
    }
}

#[test]
fn other_nodes_of_the_cluster_are_no_lan_hosts() {
    let mut node = node();
    let (pod, other) = (ip("10.200.1.91"), ip("192.168.31.18"));
    node.ignores(ExternalIngress, &Packet::new(other, pod).tcp(Tcp::syn(50_000, SHUT)));
    node.ignores(InternalIngress, &Packet::new(pod, other).tcp(Tcp::syn(50_000, 6443)));
}

#[test]
fn what_is_not_ip_passes_untouched() {
    let mut node = node();
    for ether_type in [0x0806_u16, 0x88cc, 0x8847, 0x0000] {
        let mut frame = vec![0; 60];
        frame[12..14].copy_from_slice(&ether_type.to_be_bytes());
        let judged = node.run(ExternalIngress, &frame).expect("the program runs");
        assert_eq!((judged.counted, judged.frame), (None, frame));
    }
}

#[test]
fn tagged_frames_are_judged_like_others() {
    let mut node = node();
    for f in families() {
        let base = || Packet::new(f.lan, f.pod);
        let tagged: [fn(Packet) -> Packet; 3] =
            [|p| p.vlan(31), |p| p.service_vlan(7), |p| p.service_vlan(7).vlan(31)];
        for (i, tag) in (0u16..).zip(tagged) {
            node.passes(ExternalIngress, &tag(base()).tcp(Tcp::syn(50_000 + i, OPEN)), Reason::new_flow);
            node.denies(ExternalIngress, &tag(base()).tcp(Tcp::syn(50_000 + i, SHUT)), Reason::no_rule);
        }
    }
}

#[test]
fn ip_options_and_extension_headers_hide_nothing() {
    let mut node = node();
    let [v4, v6] = families();
    // Timestamp, record route, router alert, and as many options as there can be.
    for (i, options) in (0u16..).zip([&[68, 4, 5, 0][..], &[7, 3, 4], &[148, 4, 0, 0], &[1; 40]]) {
        let base = Packet::new(v4.lan, v4.pod).options(options);
        node.passes(ExternalIngress, &base.clone().tcp(Tcp::syn(50_000 + i, OPEN)), Reason::new_flow);
        node.denies(ExternalIngress, &base.tcp(Tcp::syn(50_000 + i, SHUT)), Reason::no_rule);
    }
    let chains: [fn(Packet) -> Packet; 6] = [
        |p| p.hop_by_hop(0),
        |p| p.destination_options(3),
        |p| p.routing(),
        |p| p.authentication(),
        |p| p.hop_by_hop(1).destination_options(0).routing().authentication().destination_options(2),
        |p| (0..7).fold(p, |p, _| p.destination_options(0)),
    ];
    for (i, chain) in (0u16..).zip(chains) {
        let base = || chain(Packet::new(v6.lan, v6.pod));
        node.passes(ExternalIngress, &base().tcp(Tcp::syn(50_000 + i, OPEN)), Reason::new_flow);
        node.denies(ExternalIngress, &base().tcp(Tcp::syn(50_000 + i, SHUT)), Reason::no_rule);
    }
}

#[test]
fn extension_headers_that_cannot_be_followed_are_denied() {
    let mut node = node();
    let [_, v6] = families();
    let base = Packet::new(v6.lan, v6.pod);
    let deep = (0..9).fold(base.clone(), |p, _| p.destination_options(0)).tcp(Tcp::syn(50_000, OPEN));
    node.denies(ExternalIngress, &deep, Reason::malformed_ip);
    // Segments left: the destination in the header is not where the packet goes.
    let routed = base
        .clone()
        .raw_extension(IpNumber::IPV6_ROUTE_HEADER, vec![0, 0, 0, 1, 0, 0, 0, 0])
        .tcp(Tcp::syn(50_000, OPEN));
    node.denies(ExternalIngress, &routed, Reason::malformed_ip);
    // Nothing behind it: no rule can mean such a packet.
    let empty = base.clone().raw(IpNumber::IPV6_NO_NEXT_HEADER, &[]);
    node.denies(ExternalIngress, &empty, Reason::malformed_ip);
    // An extension header that says it is longer than the packet.
    let mut frame = base.destination_options(0).tcp(Tcp::syn(50_000, OPEN)).frame();
    frame[14 + 40 + 1] = 200;
    let judged = node.run(ExternalIngress, &frame).expect("the program runs");
    assert_eq!(judged.counted.map(|(_, reason)| reason), Some(Reason::malformed_ip));
}

#[test]
fn an_ipv4_header_that_contradicts_itself_is_denied() {
    let mut node = node();
    let [v4, _] = families();
    let frame = Packet::new(v4.lan, v4.pod).tcp(Tcp::syn(50_000, OPEN)).frame();
    // Header length below 20 bytes; header longer than the packet; packet that ends inside the TCP header.
    for (offset, value, reason) in
        [(14, 0x44, Reason::malformed_ip), (17, 19, Reason::malformed_ip), (17, 39, Reason::malformed_l4)]
    {
        let mut frame = frame.clone();
        frame[offset] = value;
        let judged = node.run(ExternalIngress, &frame).expect("the program runs");
        assert_eq!(judged.counted.map(|(_, reason)| reason), Some(reason), "byte {offset} = {value}");
    }
    // Not IPv4 at all, whatever the frame says.
    let mut frame = frame;
    frame[14] = 0x65;
    assert_eq!(node.run(ExternalIngress, &frame).expect("the program runs").counted, None);
}
