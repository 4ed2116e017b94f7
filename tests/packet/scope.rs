//! Packets in scope and packets out of scope.

use bridge_common::filter::counters::Reason;
use bridge_lab::packet::{Packet, Tcp};
use etherparse::IpNumber;

use crate::world::{
    ExternalEgress, ExternalIngress, InternalEgress, InternalIngress, OPEN, SHUT, families, from_lan,
    from_pod, ip, key, node,
};

#[test]
fn packets_between_others_pass_untouched() {
    let mut node = node();
    for f in families() {
        let packet = |source, destination| Packet::new(source, destination).tcp(Tcp::syn(50_000, SHUT));
        for (source, destination) in [
            (f.stranger, f.lan),
            (f.lan, f.stranger),
            (f.lan, f.service),
            (f.lan, f.lan),
            // The other node judges its pods.
            (f.lan, f.far_pod),
            (f.stranger, f.far_pod),
        ] {
            node.ignores(ExternalIngress, &packet(source, destination));
            node.ignores(from_lan(ExternalEgress), &packet(source, destination));
        }
        for destination in [f.other_pod, f.far_pod, f.other_node] {
            node.ignores(InternalIngress, &packet(f.pod, destination));
        }
        node.ignores(from_pod(InternalEgress), &packet(f.other_pod, f.pod));
    }
}

#[test]
fn a_source_outside_the_external_networks_reaches_no_pod() {
    let mut node = node();
    for f in families() {
        // Nor does another node, whose address is believed of its own link layer address alone.
        for source in [f.stranger, f.service, f.other_node] {
            for port in [OPEN, SHUT] {
                let (syn, datagram) = (
                    Packet::new(source, f.pod).tcp(Tcp::syn(50_000, port)),
                    Packet::new(source, f.pod).udp(50_000, port, b"x"),
                );
                for packet in [syn, datagram] {
                    node.denies(ExternalIngress, &packet, Reason::no_rule);
                    node.denies(from_lan(InternalEgress), &packet, Reason::no_rule);
                }
            }
        }
    }
}

#[test]
fn a_pod_opens_flows_to_anywhere_else_and_their_answers_pass() {
    let mut node = node();
    for f in families() {
        for peer in [f.stranger, f.service, f.node] {
            let unasked = if peer == f.node { Reason::unattributed } else { Reason::no_rule };
            let request = Packet::new(f.pod, peer).udp(50_000, SHUT, b"x");
            let reply = |port| Packet::new(peer, f.pod).udp(SHUT, port, b"x");
            node.denies(from_lan(InternalEgress), &reply(50_000), unasked);
            node.ignores(InternalIngress, &request);
            node.ignores(from_lan(InternalEgress), &reply(50_000));
            node.ignores(InternalIngress, &request);
            node.ignores(from_lan(InternalEgress), &reply(50_000));
            node.denies(from_lan(InternalEgress), &reply(50_001), unasked);
            // Of TCP, also a connection that was open before.
            for first in [Tcp::syn(50_000, SHUT), Tcp::ack(50_000, SHUT, 1001, 5001)] {
                node.forget_flows().expect("empty tables");
                node.ignores(InternalIngress, &Packet::new(f.pod, peer).tcp(first));
                let answer = Packet::new(peer, f.pod).tcp(Tcp::syn_ack(SHUT, 50_000));
                node.ignores(from_lan(InternalEgress), &answer);
            }
            // A peer may not turn round.
            let back = Packet::new(peer, f.pod).tcp(Tcp::syn(SHUT, 50_000));
            node.denies(from_lan(InternalEgress), &back, unasked);
        }
        // Without translation the answer is known where it comes in.
        node.ignores(InternalIngress, &Packet::new(f.pod, f.stranger).udp(50_000, SHUT, b"x"));
        node.ignores(ExternalIngress, &Packet::new(f.stranger, f.pod).udp(SHUT, 50_000, b"x"));
        node.denies(
            ExternalIngress,
            &Packet::new(f.stranger, f.pod).udp(SHUT, 50_001, b"x"),
            Reason::no_rule,
        );
    }
}

#[test]
fn multicast_of_a_pod_passes_and_opens_no_flow() {
    let mut node = node();
    for (pod, group) in [("10.200.1.91", "224.0.0.251"), ("fd20:1::91", "ff02::fb")] {
        let packet = Packet::new(ip(pod), ip(group)).udp(5353, 5353, b"x");
        node.ignores(InternalIngress, &packet);
        assert_eq!(node.flow(&key(&packet, 17, 5353, 5353)), None);
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
    for f in families() {
        node.ignores(InternalIngress, &Packet::new(f.pod, f.other_node).tcp(Tcp::syn(50_000, 6443)));
        node.ignores(ExternalIngress, &Packet::new(f.other_node, f.node).tcp(Tcp::syn(50_000, 6443)));
    }
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
        let tagged: [fn(Packet) -> Packet; 4] = [
            |p| p.vlan(31),
            |p| p.service_vlan(7),
            |p| p.service_vlan(7).vlan(31),
            |p| (0..8).fold(p, |p, _| p.vlan(0)),
        ];
        for (i, tag) in (0u16..).zip(tagged) {
            node.passes(ExternalIngress, &tag(base()).tcp(Tcp::syn(50_000 + i, OPEN)), Reason::new_flow);
            node.denies(ExternalIngress, &tag(base()).tcp(Tcp::syn(50_000 + i, SHUT)), Reason::no_rule);
        }
    }
}

#[test]
fn more_tags_than_are_read_pass_nowhere() {
    let mut node = node();
    for f in families() {
        for tags in [9, 10, 16] {
            let tagged = |source, destination| {
                (0..tags).fold(Packet::new(source, destination), |p, _| p.vlan(0)).tcp(Tcp::syn(50_000, OPEN))
            };
            for destination in [f.pod, f.node, f.lan] {
                node.denies(ExternalIngress, &tagged(f.lan, destination), Reason::malformed_ip);
                node.denies(InternalIngress, &tagged(f.pod, destination), Reason::malformed_ip);
            }
            node.denies(from_lan(InternalEgress), &tagged(f.lan, f.pod), Reason::malformed_ip);
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
