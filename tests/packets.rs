//! Hand-made packets are judged by the kernel itself: it checks every checksum and length before a socket, a
//! listener or the connection tracker gets to see them.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bridge_lab::lab::{Family, Lab};
use bridge_lab::packet::{Icmp, Packet, Tcp};
use bridge_lab::traffic::{tcp, udp};
use bridge_lab::wait::eventually;
use bridge_lab::wire::{Capture, Injector};
use etherparse::{IpNumber, Ipv6Extensions, NetHeaders, TransportHeader};

const SECOND: Duration = Duration::from_secs(1);
const PORT: u16 = 40002;

/// A packet from A to C1, on its first hop.
fn to_pod(lab: &Lab, family: Family) -> Packet {
    Packet::new(lab.a().ip(family), lab.c1().ip(family)).between(lab.a(), lab.b())
}

fn injector(lab: &Lab) -> Result<Injector> {
    Ok(Injector::new(&lab.a().netns, "eth0")?)
}

/// Waits until the server has received `last`, and returns all it has received.
fn received_until(server: &udp::Server, last: &[u8]) -> Result<Vec<Vec<u8>>> {
    let datagrams = || server.received().into_iter().map(|(_, datagram)| datagram).collect::<Vec<_>>();
    eventually(SECOND, || Some(datagrams()).filter(|all| all.iter().any(|datagram| datagram == last)))
        .with_context(|| format!("no {:?} among {:?}", String::from_utf8_lossy(last), datagrams()))
}

#[test]
fn udp_arrives_at_a_socket_and_a_wrong_checksum_does_not() -> Result<()> {
    let lab = Lab::builder().build()?;
    let injector = injector(&lab)?;
    for family in Family::BOTH {
        let server = udp::Server::echo(&lab.c1().netns, lab.c1().at(family, PORT))?;
        let mut wrong = to_pod(&lab, family).udp(61001, PORT, b"wrong").frame();
        *wrong.last_mut().context("a frame")? ^= 1;
        injector.send(&wrong)?;
        injector.send(&to_pod(&lab, family).udp(61001, PORT, b"right").frame())?;
        assert_eq!(received_until(&server, b"right")?, [b"right"]);
        assert_eq!(server.received()[0].0, lab.a().at(family, 61001));
    }
    Ok(())
}

#[test]
fn options_and_extension_headers_are_accepted() -> Result<()> {
    let lab = Lab::builder().build()?;
    let injector = injector(&lab)?;
    // No operation three times; padded to four octets.
    let v4 = to_pod(&lab, Family::V4).options(&[1, 1, 1]);
    let v6 = to_pod(&lab, Family::V6).hop_by_hop(0).routing().destination_options(2);
    let mut capture = Capture::start(&lab.c1().netns, "eth0")?;
    for (family, packet) in [(Family::V4, v4), (Family::V6, v6)] {
        let server = udp::Server::echo(&lab.c1().netns, lab.c1().at(family, PORT))?;
        injector.send(&packet.udp(61001, PORT, b"optional").frame())?;
        received_until(&server, b"optional")?;
        let ends = Some((lab.a().at(family, 61001), lab.c1().at(family, PORT)));
        let frame = capture.find(SECOND, |frame| frame.endpoints() == ends)?.context("was not seen")?;
        match frame.headers().and_then(|headers| headers.net).context("an IP header")? {
            NetHeaders::Ipv4(ip, _) => assert_eq!(ip.options.as_slice(), [1, 1, 1, 0]),
            NetHeaders::Ipv6(ip, Ipv6Extensions { hop_by_hop_options, routing, .. }) => {
                assert_eq!(ip.next_header, IpNumber::IPV6_HEADER_HOP_BY_HOP);
                let last = routing.and_then(|routing| routing.final_destination_options);
                assert_eq!(last.context("destination options")?.payload().len(), 22);
                assert!(hop_by_hop_options.is_some());
            }
            NetHeaders::Arp(_) => unreachable!("it has endpoints"),
        }
    }
    Ok(())
}

#[test]
fn fragments_are_put_together_in_any_order() -> Result<()> {
    let lab = Lab::builder().build()?;
    let injector = injector(&lab)?;
    let payload: Vec<u8> = (0..2000_u16).flat_map(u16::to_be_bytes).collect();
    for family in Family::BOTH {
        let server = udp::Server::echo(&lab.c1().netns, lab.c1().at(family, PORT))?;
        let fragments = to_pod(&lab, family).udp(61001, PORT, &payload).fragments(1400, 7);
        assert_eq!(fragments.len(), 3);
        for fragment in fragments.iter().rev() {
            injector.send(&fragment.frame())?;
        }
        received_until(&server, &payload)?;
    }
    Ok(())
}

#[test]
fn a_syn_is_answered_by_a_listener() -> Result<()> {
    let lab = Lab::builder().build()?;
    let injector = injector(&lab)?;
    let mut capture = Capture::start(&lab.a().netns, "eth0")?;
    for family in Family::BOTH {
        let server = tcp::Server::sink(&lab.c1().netns, lab.c1().at(family, PORT))?;
        injector.send(&to_pod(&lab, family).tcp(Tcp::syn(61001, PORT)).frame())?;
        let answer = Some((server.address(), lab.a().at(family, 61001)));
        let frame = capture.find(SECOND, |frame| !frame.outgoing && frame.endpoints() == answer)?;
        let tcp = frame.and_then(|frame| frame.tcp()).context("no answer")?;
        assert!(tcp.syn && tcp.ack && !tcp.rst, "{tcp:?}");
        assert_eq!(tcp.acknowledgment_number, 1001);
    }
    Ok(())
}

#[test]
fn an_echo_request_is_answered() -> Result<()> {
    let lab = Lab::builder().build()?;
    let injector = injector(&lab)?;
    let mut capture = Capture::start(&lab.a().netns, "eth0")?;
    for family in Family::BOTH {
        injector.send(&to_pod(&lab, family).icmp(&Icmp::EchoRequest(3, 5)).frame())?;
        let is_reply = |transport| match transport {
            Some(TransportHeader::Icmpv4(icmp)) => {
                matches!(icmp.icmp_type, etherparse::Icmpv4Type::EchoReply(e) if (e.id, e.seq) == (3, 5))
            }
            Some(TransportHeader::Icmpv6(icmp)) => {
                matches!(icmp.icmp_type, etherparse::Icmpv6Type::EchoReply(e) if (e.id, e.seq) == (3, 5))
            }
            _ => false,
        };
        let reply = capture.find(SECOND, |frame| {
            frame.addresses() == Some((lab.c1().ip(family), lab.a().ip(family)))
                && is_reply(frame.headers().and_then(|headers| headers.transport))
        })?;
        reply.with_context(|| format!("no echo reply in {family:?}"))?;
    }
    Ok(())
}

/// The pod asks, and the LAN answers with a hand-made ICMP error that quotes the question.
#[test]
fn an_icmp_error_reaches_the_socket_whose_packet_it_quotes() -> Result<()> {
    let lab = Lab::builder().build()?;
    let injector = injector(&lab)?;
    for (family, port_unreachable) in [(Family::V4, 3), (Family::V6, 4)] {
        // A's own, real error finds no way back.
        lab.a().netns.ip(match family {
            Family::V4 => "route replace blackhole 10.200.1.0/24",
            Family::V6 => "-6 route replace blackhole fd20:1::/64",
        })?;
        let question = Packet::new(lab.c1().ip(family), lab.a().ip(family)).udp(61001, 50000, b"?").ip();
        let error = to_pod(&lab, family).icmp(&Icmp::Unreachable(port_unreachable, question)).frame();
        let attempt = std::thread::scope(|scope| {
            let client = || udp::ask(&lab.c1().netns, 61001, lab.a().at(family, 50000), b"?", SECOND);
            let client = scope.spawn(client);
            while !client.is_finished() {
                injector.send(&error)?;
                std::thread::yield_now();
            }
            client.join().expect("no panic").context("a client")
        })?;
        assert!(attempt.refused(), "{family:?}: {attempt}");
    }
    Ok(())
}

#[test]
fn vlan_tags_arrive_as_sent() -> Result<()> {
    let lab = Lab::builder().build()?;
    let injector = injector(&lab)?;
    let mut capture = Capture::start(&lab.b().netns, "eth0")?;
    let single = to_pod(&lab, Family::V4).vlan(31).udp(61001, PORT, b"tagged").frame();
    let double = to_pod(&lab, Family::V6).service_vlan(5).vlan(31).udp(61001, PORT, b"tagged").frame();
    for sent in [single, double] {
        injector.send(&sent)?;
        let seen = capture.find(SECOND, |frame| frame.endpoints().is_some())?.context("was not seen")?;
        assert_eq!(seen.bytes, sent);
    }
    Ok(())
}

/// There are no SCTP sockets without CONFIG_IP_SCTP, but the connection tracker checks the checksum, too.
#[test]
fn sctp_is_tracked_and_a_wrong_checksum_is_not() -> Result<()> {
    let lab = Lab::builder().conntrack().build()?;
    let injector = injector(&lab)?;
    for family in Family::BOTH {
        let mut wrong = to_pod(&lab, family).sctp_init(61001, PORT).frame();
        *wrong.last_mut().context("a frame")? ^= 1;
        injector.send(&wrong)?;
        injector.send(&to_pod(&lab, family).sctp_init(61002, PORT).frame())?;
        let tracked = || {
            let mut list = Command::new("conntrack");
            let family = if family == Family::V4 { "ipv4" } else { "ipv6" };
            list.args(["--dump", "--family", family, "--proto", "sctp"]);
            lab.b().netns.output(list).ok().filter(|list| list.contains("sport=61002"))
        };
        let tracked = eventually(SECOND, tracked).with_context(|| format!("{family:?}: not tracked"))?;
        assert!(!tracked.contains("sport=61001"), "{tracked}");
    }
    Ok(())
}

/// The main use of captures: to show that a packet did not get through.
#[test]
fn a_capture_shows_forwarded_packets_and_no_dropped_ones() -> Result<()> {
    let lab = Lab::builder().build()?;
    let injector = injector(&lab)?;
    let b = &lab.b().netns;
    let mut came = Capture::start(b, "eth0")?;
    let mut went = Capture::start(b, &lab.c1().peer_interface)?;
    let packet = |port| to_pod(&lab, Family::V4).udp(61001, port, b"");
    // With its last hop used up on the node.
    injector.send(&packet(1).hop_limit(1).frame())?;
    injector.send(&packet(2).frame())?;
    let ports = |capture: &mut Capture, outgoing| -> Result<Vec<u16>> {
        let to_c1 = |frame: &bridge_lab::wire::Frame| {
            let (_, to) = frame.endpoints().filter(|_| frame.outgoing == outgoing)?;
            (to.ip() == lab.c1().ip(Family::V4)).then_some(to.port())
        };
        let frames = capture.until(SECOND, |frame| to_c1(frame) == Some(2))?;
        Ok(frames.iter().filter_map(to_c1).collect())
    };
    assert_eq!(ports(&mut came, false)?, [1, 2]);
    assert_eq!(ports(&mut went, true)?, [2]);
    Ok(())
}
