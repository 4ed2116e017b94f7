//! The answers to denied packets, byte by byte.

use bridge_common::filter::{counters::Reason, event::verdict};
use bridge_lab::{
    packet::{Packet, Tcp},
    prog::{Action, behaviour},
};
use etherparse::{IpNumber, NetSlice, SlicedPacket, TransportSlice};

use crate::world::{ExternalIngress, InternalIngress, SHUT, families, node, usual_policy};

const MAC_A: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MAC_B: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Parses an answer to `packet`, after checking the properties that all answers share.
fn check_answer<'a>(frame: &'a [u8], packet: &Packet) -> SlicedPacket<'a> {
    assert_eq!((&frame[..6], &frame[6..12]), (&MAC_A[..], &MAC_B[..]), "back to where it came from");
    let sliced = SlicedPacket::from_ethernet(frame).expect("a packet");
    let (source, destination) = packet.addresses();
    match sliced.net.as_ref().expect("an IP header") {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            assert_eq!((header.source_addr(), header.destination_addr()), {
                let (std::net::IpAddr::V4(s), std::net::IpAddr::V4(d)) = (source, destination) else {
                    panic!()
                };
                (d, s)
            });
            assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
            assert_eq!(usize::from(header.total_len()), frame.len() - 14, "the length is right");
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            assert_eq!((header.source_addr(), header.destination_addr()), {
                let (std::net::IpAddr::V6(s), std::net::IpAddr::V6(d)) = (source, destination) else {
                    panic!()
                };
                (d, s)
            });
            assert_eq!(usize::from(header.payload_length()), frame.len() - 14 - 40, "the length is right");
        }
        other => panic!("{other:?}"),
    }
    sliced
}

fn check_reset(frame: &[u8], packet: &Packet, sequence: u32, acknowledgement: Option<u32>) {
    let sliced = check_answer(frame, packet);
    let Some(TransportSlice::Tcp(tcp)) = &sliced.transport else { panic!("no TCP: {sliced:?}") };
    let header = tcp.to_header();
    let checksum = match sliced.net.as_ref().expect("an IP header") {
        NetSlice::Ipv4(ip) => {
            header.calc_checksum_ipv4_raw(ip.header().source(), ip.header().destination(), &[])
        }
        NetSlice::Ipv6(ip) => {
            header.calc_checksum_ipv6_raw(ip.header().source(), ip.header().destination(), &[])
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(header.checksum, checksum.expect("short"), "checksum");
    assert!(header.rst && !header.syn && !header.fin && !header.psh);
    assert_eq!(header.ack, acknowledgement.is_some());
    assert_eq!(header.sequence_number, sequence);
    assert_eq!(header.acknowledgment_number, acknowledgement.unwrap_or(0));
    assert_eq!((header.source_port, header.destination_port), (SHUT, 50_000));
    assert!(tcp.payload().is_empty());
}

#[test]
fn tcp_gets_the_reset_that_its_segment_calls_for() {
    let mut node = node();
    for f in families() {
        let base = || Packet::new(f.lan, f.pod).macs(MAC_A, MAC_B);
        let syn = base().tcp(Tcp::syn(50_000, SHUT));
        let judged = node.denies(ExternalIngress, &syn, Reason::no_rule);
        assert_eq!(judged.action, Action::Answer);
        check_reset(&judged.frame, &syn, 0, Some(1001));

        // Data on a SYN counts (RFC 7413).
        let syn = base().tcp(Tcp::syn(50_000, SHUT).payload(&[1; 300]));
        let judged = node.denies(ExternalIngress, &syn, Reason::no_rule);
        check_reset(&judged.frame, &syn, 0, Some(1301));

        let ack = base().tcp(Tcp::ack(50_000, SHUT, 7, 4242).payload(&[1; 1000]));
        let judged = node.denies(ExternalIngress, &ack, Reason::not_syn);
        check_reset(&judged.frame, &ack, 4242, None);

        let rst = base().tcp(Tcp::rst(50_000, SHUT, 7));
        let judged = node.denies(ExternalIngress, &rst, Reason::not_syn);
        assert_eq!(judged.action, Action::Drop, "no reset answers a reset");
    }
}

#[test]
fn udp_gets_a_port_unreachable_that_quotes_it() {
    let mut node = node();
    for f in families() {
        for payload in [0, 1, 2, 7, 400] {
            let packet = Packet::new(f.lan, f.pod).macs(MAC_A, MAC_B).udp(50_000, SHUT, &vec![9; payload]);
            let judged = node.denies(ExternalIngress, &packet, Reason::no_rule);
            assert_eq!(judged.action, Action::Answer);
            let sliced = check_answer(&judged.frame, &packet);
            let quoted = packet.ip();
            match &sliced.transport {
                Some(TransportSlice::Icmpv4(icmp)) => {
                    assert_eq!((icmp.type_u8(), icmp.code_u8()), (3, 3));
                    assert_eq!(icmp.payload(), &quoted[..28]);
                    let header = icmp.header();
                    assert_eq!(header.checksum, header.icmp_type.calc_checksum(icmp.payload()));
                }
                Some(TransportSlice::Icmpv6(icmp)) => {
                    assert_eq!((icmp.type_u8(), icmp.code_u8()), (1, 4));
                    assert_eq!(icmp.payload(), &quoted[..48]);
                    let Some(NetSlice::Ipv6(ip)) = &sliced.net else { panic!() };
                    assert!(icmp.is_checksum_valid(ip.header().source(), ip.header().destination()));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn what_cannot_be_answered_is_dropped() {
    let mut node = node();
    let [v4, v6] = families();
    let packets = [
        Packet::new(v4.lan, v4.pod).options(&[7, 3, 4]).tcp(Tcp::syn(50_000, SHUT)),
        Packet::new(v6.lan, v6.pod).hop_by_hop(0).tcp(Tcp::syn(50_000, SHUT)),
        Packet::new(v4.lan, v4.pod).vlan(5).tcp(Tcp::syn(50_000, SHUT)),
        Packet::new(v4.lan, v4.pod).sctp_init(50_000, SHUT),
        Packet::new(v6.lan, v6.pod).raw(IpNumber::GRE, &[0; 8]),
    ];
    for packet in packets {
        let judged = node.denies(ExternalIngress, &packet, Reason::no_rule);
        assert_eq!(judged.action, Action::Drop, "{packet:?}");
        assert_eq!(node.events().pop().map(|event| event.verdict), Some(verdict::DROP));
    }
}

#[test]
fn a_later_fragment_has_no_header_to_answer() {
    let mut node = node();
    let [v4, _] = families();
    let whole = Packet::new(v4.lan, v4.pod).udp(50_000, SHUT, &[0; 64]);
    for part in &whole.fragments(24, 9)[1..] {
        let judged = node.denies(InternalIngress, part, Reason::spoofed);
        assert_eq!(judged.action, Action::Drop);
    }
}

#[test]
fn silence_where_silence_is_configured() {
    let mut node = node();
    let mut silent = behaviour();
    silent.reject = false;
    node.publish(&usual_policy(), &silent).expect("a policy");
    for f in families() {
        for packet in [
            Packet::new(f.lan, f.pod).tcp(Tcp::syn(50_000, SHUT)),
            Packet::new(f.lan, f.pod).udp(50_000, SHUT, b"x"),
        ] {
            assert_eq!(node.denies(ExternalIngress, &packet, Reason::no_rule).action, Action::Drop);
        }
    }
}

#[test]
fn an_event_tells_what_happened_to_whom() {
    let mut node = node();
    for f in families() {
        let packet = Packet::new(f.pod, f.lan).tcp(Tcp::syn(61_001, SHUT));
        node.denies(InternalIngress, &packet, Reason::no_rule);
        let event = node.events().pop().expect("an event");
        assert_eq!(std::net::IpAddr::from(event.source), f.pod);
        assert_eq!(std::net::IpAddr::from(event.destination), f.lan);
        assert_eq!(u16::from_be_bytes(event.source_port), 61_001);
        assert_eq!(u16::from_be_bytes(event.destination_port), SHUT);
        assert_eq!((event.protocol, event.detail), (6, 2));
        assert_eq!((event.verdict, event.reason), (verdict::REJECT, Reason::no_rule as u8));
        assert_eq!((event.direction, event.rule), (1, 0));
        assert_eq!(event.length as usize, packet.frame().len());
    }
}

#[test]
fn events_stop_at_the_limit_and_say_how_many_were_kept_back() {
    let mut node = node();
    let mut limited = behaviour();
    limited.events_per_second = 3;
    node.publish(&usual_policy(), &limited).expect("a policy");
    let [f, _] = families();
    let packet = Packet::new(f.lan, f.pod).tcp(Tcp::syn(50_000, SHUT));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let mut sent = 0;
    let mut seen: Vec<u32> = Vec::new();
    // The first event of the next second reports the suppressed ones.
    while seen.iter().all(|suppressed| *suppressed == 0) {
        assert!(std::time::Instant::now() < deadline, "no event reports suppressed ones");
        node.denies(ExternalIngress, &packet, Reason::no_rule);
        sent += 1;
        seen.extend(node.events().iter().map(|event| event.suppressed));
    }
    let reported: u32 = seen.iter().sum();
    assert!(reported > 0 && (reported as usize) < sent, "{reported} of {sent} suppressed");
    assert!(seen.len() < sent, "{} of {sent} sent", seen.len());
}

#[test]
fn answers_stop_at_the_limit_and_packets_are_denied_as_before() {
    // Each CPU has a limit of its own.
    bridge_lab::cpu::stay_on(0).expect("a CPU");
    let mut node = node();
    let mut limited = behaviour();
    limited.answers_per_second = 3;
    node.publish(&usual_policy(), &limited).expect("a policy");
    let [f, _] = families();
    let packets = [
        Packet::new(f.lan, f.pod).tcp(Tcp::syn(50_000, SHUT)),
        Packet::new(f.lan, f.pod).udp(50_000, SHUT, b"x"),
    ];
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    // By the clock of the kernel side a second may end in between: then there are six.
    let mut answers = Vec::new();
    for packet in packets.iter().cycle().take(40) {
        answers.push(node.denies(ExternalIngress, packet, Reason::no_rule).action == Action::Answer);
    }
    let answered = answers.iter().filter(|answered| **answered).count();
    assert!(answered == 3 || answered == 6, "{answers:?}");
    let verdicts: Vec<_> = node.events().iter().map(|event| event.verdict == verdict::REJECT).collect();
    assert_eq!(verdicts, answers, "an event says whether the packet was answered");
    // The next second has answers again.
    while node.denies(ExternalIngress, &packets[0], Reason::no_rule).action != Action::Answer {
        assert!(std::time::Instant::now() < deadline, "no answer in the next second");
    }
}
