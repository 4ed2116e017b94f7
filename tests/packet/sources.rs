//! Whose address a packet may have: before any flow is looked up.

use bridge_common::filter::{counters::Reason, policy::direction};
use bridge_lab::{
    packet::{Icmp, Packet, Tcp},
    prog::{Action, LAN_INTERFACE, POD_INTERFACE, behaviour},
};
use etherparse::IpNumber;

use crate::world::{
    Connection, ExternalEgress, ExternalIngress, InternalEgress, InternalIngress, OPEN, OUT, SHUT, families,
    from_lan, from_pod, ip, node, usual_policy,
};

#[test]
fn a_pod_has_no_address_but_its_own() {
    let mut node = node();
    for f in families() {
        for source in [f.other_pod, f.far_pod, f.lan, f.node, f.other_node, f.stranger, f.service] {
            for destination in [f.lan, f.stranger, f.node, f.other_node, f.far_pod, f.service] {
                for packet in [
                    Packet::new(source, destination).tcp(Tcp::syn(50_000, OUT)),
                    Packet::new(source, destination).udp(50_000, OUT, b"x"),
                    Packet::new(source, destination).udp(50_000, OUT, &[7; 100]).fragments(32, 9)[1].clone(),
                    Packet::new(source, destination).icmp(&Icmp::EchoRequest(1, 1)),
                ] {
                    let judged = node.denies(InternalIngress, &packet, Reason::spoofed);
                    // An answer would go to the pod, from a host that did not send it.
                    assert_eq!(judged.action, Action::Drop);
                    assert_eq!(judged.counted.map(|(of, _)| of), Some(direction::OUTBOUND));
                }
            }
        }
    }
}

#[test]
fn discovery_on_the_link_of_a_pod_passes() {
    let mut node = node();
    for (source, destination) in [
        ("0.0.0.0", "255.255.255.255"),
        ("::", "ff02::1:ff00:91"),
        ("fe80::1", "ff02::2"),
        ("fe80::1", "fd20:1::1"),
    ] {
        node.ignores(InternalIngress, &Packet::new(ip(source), ip(destination)).udp(68, 67, b"x"));
    }
}

#[test]
fn no_host_of_the_lan_has_an_address_of_the_node_or_of_a_pod() {
    let mut node = node();
    for f in families() {
        for source in [f.node, f.pod, f.other_pod, f.far_pod] {
            for destination in [f.pod, f.other_pod, f.far_pod, f.node, f.lan, f.stranger] {
                for packet in [
                    Packet::new(source, destination).tcp(Tcp::syn(50_000, OPEN)),
                    Packet::new(source, destination).udp(50_000, OPEN, b"x"),
                ] {
                    let judged = node.denies(ExternalIngress, &packet, Reason::spoofed);
                    assert_eq!(judged.action, Action::Drop);
                }
            }
        }
    }
}

#[test]
fn a_lan_host_sends_nothing_into_a_tunnel_of_the_node() {
    let mut node = node();
    let [v4, v6] = families();
    for (f, to) in [(v4, v4.node), (v6, v6.node), (v6, ip("fe80::17"))] {
        // No source is believed to be a node's here.
        for source in [f.lan, f.stranger, f.other_node] {
            let base = || Packet::new(source, to);
            node.denies(ExternalIngress, &base().udp(50_000, 8472, &[7; 60]), Reason::spoofed);
            node.denies(ExternalIngress, &base().raw(IpNumber::GRE, &[0; 60]), Reason::spoofed);
            node.ignores(ExternalIngress, &base().udp(50_000, 8473, &[7; 60]));
            node.ignores(ExternalIngress, &base().raw(IpNumber::RSVP, &[0; 60]));
        }
        // Through the node, to another host.
        node.ignores(ExternalIngress, &Packet::new(f.lan, f.stranger).udp(50_000, 8472, &[7; 60]));
    }
}

#[test]
fn a_node_is_believed_behind_a_tunnel_and_a_pod_is_not() {
    let mut node = node();
    for f in families() {
        let packet = Packet::new(f.other_node, f.pod).tcp(Tcp::syn(50_000, OPEN + 1));
        node.denies(ExternalIngress, &packet, Reason::no_rule);
    }
    node.make_tunnel(LAN_INTERFACE).expect("an entry");
    for f in families() {
        node.ignores(ExternalIngress, &Packet::new(f.other_node, f.pod).tcp(Tcp::syn(50_000, OPEN + 1)));
        for source in [f.node, f.pod, f.other_pod] {
            let packet = Packet::new(source, f.pod).tcp(Tcp::syn(50_000, OPEN));
            node.denies(ExternalIngress, &packet, Reason::spoofed);
        }
        let packet = Packet::new(f.stranger, f.pod).tcp(Tcp::syn(50_000, OPEN));
        node.denies(ExternalIngress, &packet, Reason::no_rule);
    }
}

#[test]
fn an_ipv4_mapped_address_passes_no_hook() {
    let mut node = node();
    let [v4, v6] = families();
    let mapped = |address: std::net::IpAddr| {
        let std::net::IpAddr::V4(v4) = address else { panic!("{address} is not IPv4") };
        std::net::IpAddr::from(v4.to_ipv6_mapped())
    };
    Connection::inbound(v4, OPEN).establish(&mut node);
    for (source, destination) in [
        (mapped(v4.lan), mapped(v4.pod)),
        (mapped(v4.lan), v6.pod),
        (v6.lan, mapped(v4.pod)),
        (v6.lan, mapped(v4.node)),
    ] {
        let base = || Packet::new(source, destination);
        for packet in [
            base().tcp(Tcp::syn(50_000, OPEN)),
            base().tcp(Tcp::ack(50_000, OPEN, 1001, 5001)),
            base().udp(50_000, OPEN, &[7; 100]).fragments(32, 9)[1].clone(),
            // Extension headers that cannot be followed change nothing.
            (0..9).fold(base(), |p, _| p.destination_options(0)).tcp(Tcp::syn(50_000, OPEN)),
        ] {
            node.denies(ExternalIngress, &packet, Reason::spoofed);
            node.denies(InternalIngress, &packet, Reason::spoofed);
            node.denies(from_lan(InternalEgress), &packet, Reason::spoofed);
        }
    }
}

#[test]
fn a_pod_touches_no_flow_of_another() {
    let mut node = node();
    for f in families() {
        // The connection is that of the pod behind the other interface.
        let c = Connection { server: f.other_pod, ..Connection::inbound(f, OPEN) };
        node.passes(ExternalIngress, &c.syn(), Reason::new_flow);
        node.denies(InternalIngress, &c.syn_ack(), Reason::spoofed);
        node.host(f.other_pod, LAN_INTERFACE).expect("a pod that moves");
        node.passes(InternalIngress, &c.syn_ack(), Reason::established);
        node.passes(ExternalIngress, &c.ack(), Reason::established);
        node.host(f.other_pod, POD_INTERFACE).expect("a pod that moves");
        let before = node.flow(&c.key());
        for forged in [
            c.server_ack(),
            c.server_sends(|s, d| Tcp::rst(s, d, 5001)),
            c.server_sends(|s, d| Tcp::fin(s, d, 5001, 1001)),
        ] {
            node.denies(InternalIngress, &forged, Reason::spoofed);
        }
        assert_eq!(node.flow(&c.key()), before);
    }
}

#[test]
fn a_flow_of_the_interface_needs_no_other_proof() {
    let mut node = node();
    for f in families() {
        let c = Connection::outbound(f, OUT);
        c.establish(&mut node);
        // The agent may learn late of an interface that is new.
        node.host(f.pod, 0).expect("a known pod");
        node.passes(InternalIngress, &c.ack(), Reason::established);
        node.denies(InternalIngress, &c.syn(), Reason::spoofed);
    }
}

#[test]
fn a_flow_of_a_pod_with_the_node_is_not_open_to_the_lan() {
    let mut node = node();
    for f in families() {
        node.ignores(InternalIngress, &Packet::new(f.pod, f.node).udp(50_000, 53, b"x"));
        let reply = Packet::new(f.node, f.pod).udp(53, 50_000, b"x");
        node.denies(ExternalIngress, &reply, Reason::spoofed);
        // The node itself.
        node.ignores(InternalEgress, &reply);
        node.denies(ExternalIngress, &reply, Reason::spoofed);
    }
}

#[test]
fn a_packet_that_no_ingress_hook_has_seen_is_judged_towards_the_pod() {
    let mut node = node();
    for f in families() {
        let c = Connection::inbound(f, OPEN);
        let shut = Packet::new(f.lan, f.pod).tcp(Tcp::syn(50_000, SHUT));
        let judged = node.denies(from_lan(InternalEgress), &shut, Reason::no_rule);
        // The client may not know the address that would answer.
        assert_eq!(judged.action, Action::Drop);
        node.passes(from_lan(InternalEgress), &c.syn(), Reason::new_flow);
        node.passes(InternalIngress, &c.syn_ack(), Reason::established);
        node.ignores(from_lan(InternalEgress), &c.ack());
        node.passes(InternalIngress, &c.server_ack(), Reason::established);
        // From a pod: by the interface that leads to it alone.
        let of_pod = Packet::new(f.other_pod, f.pod).tcp(Tcp::syn(50_000, SHUT));
        node.ignores(from_pod(InternalEgress), &of_pod);
        node.denies(from_lan(InternalEgress), &of_pod, Reason::spoofed);
        // From the node: if it is the one that sends it.
        let of_node = Packet::new(f.node, f.pod).tcp(Tcp::syn(50_000, SHUT));
        node.ignores(InternalEgress, &of_node);
        node.denies(from_lan(InternalEgress), &of_node, Reason::unattributed);
        node.denies(
            from_lan(ExternalEgress),
            &Packet::new(f.node, f.far_pod).tcp(Tcp::syn(1, SHUT)),
            Reason::unattributed,
        );
    }
}

#[test]
fn a_packet_of_a_pod_is_judged_by_the_lan_host_that_it_goes_to_in_the_end() {
    let mut node = node();
    for f in families() {
        let to = |port| Packet::new(f.other_pod, f.lan).tcp(Tcp::syn(50_000, port));
        node.denies(from_pod(ExternalEgress), &to(SHUT), Reason::no_rule);
        node.passes(from_pod(ExternalEgress), &to(OUT), Reason::new_flow);
        let answer = Packet::new(f.lan, f.other_pod).tcp(Tcp::syn_ack(OUT, 50_000));
        node.passes(ExternalIngress, &answer, Reason::established);
        // In transit: its own node has judged it.
        node.ignores(from_lan(ExternalEgress), &Packet::new(f.far_pod, f.lan).tcp(Tcp::syn(50_000, SHUT)));
    }
}

#[test]
fn an_error_about_a_flow_does_not_prove_its_source() {
    let mut node = node();
    for f in families() {
        Connection::inbound(f, OPEN).establish(&mut node);
        let quoted = Connection::inbound(f, OPEN).server_ack().ip();
        let error = |source| Packet::new(source, f.pod).icmp(&Icmp::Unreachable(1, quoted.clone()));
        node.ignores(from_lan(InternalEgress), &error(f.lan));
        node.ignores(from_lan(InternalEgress), &error(f.stranger));
        node.denies(from_lan(InternalEgress), &error(f.far_pod), Reason::spoofed);
        node.denies(ExternalIngress, &error(f.far_pod), Reason::spoofed);
        node.passes(ExternalIngress, &error(f.stranger), Reason::related);
    }
}

#[test]
fn a_spoofed_packet_is_audited_in_audit_mode() {
    let mut node = node();
    let mut audit = behaviour();
    audit.audit = true;
    node.publish(&usual_policy(), &audit).expect("a policy");
    for f in families() {
        let packet = Packet::new(f.lan, f.stranger).udp(50_000, SHUT, b"x");
        let judged = node.run(InternalIngress, &packet.frame()).expect("the program runs");
        assert_eq!((judged.action, judged.counted), (Action::Next, None));
        assert_eq!(judged.audited, Some((direction::OUTBOUND, Reason::spoofed)));
    }
}
