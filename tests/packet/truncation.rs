//! Packets cut off at every byte: in scope they are denied, never let through and never a fault.

use bridge_common::filter::counters::Reason;
use bridge_lab::packet::{Icmp, Packet, Tcp};
use etherparse::IpNumber;

use crate::world::{Connection, ExternalIngress, Family, OPEN, families, node};

/// A packet of each protocol that the policy lets through, and from how many bytes on.
fn packets(f: &Family) -> Vec<(Packet, usize)> {
    let base = || Packet::new(f.lan, f.pod);
    let ip = 14 + if f.lan.is_ipv4() { 20 } else { 40 };
    let mut packets = vec![
        (base().tcp(Tcp::syn(50_000, OPEN)), ip + 20),
        (base().udp(50_000, OPEN, &[0; 12]), ip + 8),
        (base().sctp_init(50_000, OPEN), ip + 32),
        (base().icmp(&Icmp::EchoRequest(1, 1)), ip + 8),
        (base().vlan(3).tcp(Tcp::syn(50_000, OPEN)), ip + 4 + 20),
    ];
    if f.lan.is_ipv4() {
        packets.push((base().options(&[1; 40]).tcp(Tcp::syn(50_000, OPEN)), ip + 40 + 20));
    } else {
        let chain = base().hop_by_hop(0).destination_options(1).tcp(Tcp::syn(50_000, OPEN));
        packets.push((chain, ip + 8 + 16 + 20));
    }
    packets
}

#[test]
fn cut_off_at_every_byte() {
    for f in families() {
        for (packet, enough) in packets(&f) {
            let mut node = node();
            let frame = packet.frame();
            let addresses = frame.len() - packet.ip().len() + if f.lan.is_ipv4() { 20 } else { 40 };
            // BPF_PROG_TEST_RUN takes no IP header that is cut off, unless a VLAN tag stands before it.
            let tagged = frame.len() - packet.ip().len() > 14;
            for length in if tagged { 14 } else { addresses }..=frame.len() {
                let judged = node.run(ExternalIngress, &frame[..length]).expect("the program runs");
                let reason = judged.counted.map(|(_, reason)| reason);
                if length < addresses {
                    assert_eq!(reason, None, "{length} bytes of {packet:?}");
                } else if length < enough {
                    let known = [Reason::malformed_ip, Reason::malformed_l4].map(Some);
                    assert!(known.contains(&reason), "{length} bytes of {packet:?}: {reason:?}");
                } else {
                    assert!(reason.is_some_and(|reason| !reason.denies()), "{length} bytes: {reason:?}");
                }
            }
        }
    }
}

#[test]
fn an_error_cut_off_inside_what_it_quotes() {
    for f in families() {
        let mut node = node();
        let c = Connection::inbound(f, OPEN);
        c.establish(&mut node);
        let packet = Packet::new(f.lan, f.pod).icmp(&Icmp::TimeExceeded(c.syn_ack().ip()));
        let frame = packet.frame();
        let (ip, quoted) = if f.lan.is_ipv4() { (20, 20) } else { (40, 40) };
        for length in 14 + ip + 8..=frame.len() {
            let judged = node.run(ExternalIngress, &frame[..length]).expect("the program runs");
            let enough = length >= 14 + ip + 8 + quoted + 8;
            let expected = if enough { Reason::related } else { Reason::icmp_unrelated };
            assert_eq!(judged.counted.map(|(_, reason)| reason), Some(expected), "{length} bytes");
        }
    }
}

#[test]
fn random_bytes_are_never_a_fault() {
    use rand::{RngExt as _, SeedableRng as _};
    let mut random = rand::rngs::StdRng::seed_from_u64(1);
    let mut node = node();
    for _ in 0..20_000 {
        let f = families()[random.random_range(0..2)];
        let mut frame = Packet::new(f.lan, f.pod).raw(IpNumber::TCP, &[]).frame();
        frame.extend((0..random.random_range(0..80)).map(|_| random.random::<u8>()));
        for _ in 0..random.random_range(0..4) {
            let at = random.random_range(0..frame.len());
            frame[at] = random.random();
        }
        node.run(ExternalIngress, &frame).expect("the program runs, and counts once at most");
    }
}

/// The quoted packet ends with the error: the padding of its frame is not part of it.
#[test]
fn an_error_whose_quote_goes_on_in_the_padding_of_the_frame() {
    for f in families() {
        let mut node = node();
        let c = Connection::inbound(f, OPEN);
        c.establish(&mut node);
        let quoted = c.syn_ack().ip();
        let ports = if f.lan.is_ipv4() { 20 } else { 40 };
        for (within, related) in [(ports, false), (ports + 4, false), (ports + 7, false), (ports + 8, true)] {
            let error = Packet::new(f.lan, f.pod).icmp(&Icmp::TimeExceeded(quoted[..within].to_vec()));
            let frame = [error.frame(), quoted[within..].to_vec()].concat();
            let judged = node.run(ExternalIngress, &frame).expect("the program runs");
            let expected = if related { Reason::related } else { Reason::icmp_unrelated };
            assert_eq!(judged.counted.map(|(_, reason)| reason), Some(expected), "{within} octets quoted");
        }
    }
}
