//! Packets larger than the path takes: the ICMP error that says so belongs to its connection, and fragments follow
//! their datagram.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Host, Lab};
use bridge_lab::traffic::icmp::echo;
use bridge_lab::traffic::{Attempt, tcp, udp};
use bridge_lab::wait::eventually;
use bridge_lab::wire::{Capture, Frame};
use etherparse::{NetHeaders, TransportHeader};

use crate::support::{
    DEADLINE, DENIED, INBOUND, OUTBOUND, SECOND, SILENCE, USUAL_RULES, config, seen_until_now,
};

/// The least that IPv6 allows; every other link of the lab takes 1500.
const MTU: u32 = 1280;

/// Gives `far` an address that is reached from the node through `router` and a link of [`MTU`] behind it, and answers by the
/// same way: a pod is known by its interface. It promises larger segments than it can get.
fn narrow_link(lab: &Lab, router: &Host, far: &Host, address: IpAddr, by: &str) -> Result<()> {
    let far_netns = far.netns.name();
    for command in [
        format!("link add narrow mtu {MTU} type veth peer name narrow mtu {MTU} netns {far_netns}"),
        "link set narrow up".to_owned(),
        format!("route add {address} dev narrow"),
    ] {
        // The second family finds the link there.
        if !(command.starts_with("link add") && router.netns.ip("link show narrow").is_ok()) {
            router.netns.ip(&command)?;
        }
    }
    far.netns.ip("link set narrow up")?;
    let (gateway, prefix) = if address.is_ipv4() { ("169.254.77.1", 32) } else { ("fe80::77", 64) };
    let nodad = if address.is_ipv6() { "nodad" } else { "" };
    router.netns.ip(&format!("address add {gateway}/{prefix} dev narrow {nodad}"))?;
    let version = if address.is_ipv4() { "-4" } else { "-6" };
    far.netns.ip(&format!("{version} rule add from {address} lookup 77"))?;
    far.netns
        .ip(&format!("{version} route add default via {gateway} dev narrow onlink advmss 1440 table 77"))?;
    far.netns.ip(&format!("address add {address} dev narrow {nodad}"))?;
    router.netns.set_sysctl("ipv4/ip_forward", "1")?;
    router.netns.set_sysctl("ipv6/conf/all/forwarding", "1")?;
    let via = router.ip(if address.is_ipv4() { Family::V4 } else { Family::V6 });
    lab.b().netns.ip(&format!("route add {address} via {via} dev {by}"))?;
    // Neighbours are found; the node's own packets are not judged.
    let is_there = || echo(&lab.b().netns, address, SECOND).ok().filter(Attempt::succeeded);
    eventually(DEADLINE, is_there).with_context(|| format!("no answer from {address} to the node"))?;
    Ok(())
}

/// Fragmentation needed (RFC 792), or packet too big (RFC 4443).
fn says_too_big(frame: &Frame) -> bool {
    use etherparse::{Icmpv4Type, Icmpv6Type, icmpv4::DestUnreachableHeader};
    match frame.headers().and_then(|headers| headers.transport) {
        Some(TransportHeader::Icmpv4(icmp)) => matches!(
            icmp.icmp_type,
            Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded { .. })
        ),
        Some(TransportHeader::Icmpv6(icmp)) => matches!(icmp.icmp_type, Icmpv6Type::PacketTooBig { .. }),
        _ => false,
    }
}

/// Of a fragment that came in, where it belongs in its datagram, in units of 8 octets.
fn fragment_offset(frame: &Frame) -> Option<u16> {
    let (offset, more) = match frame.headers()?.net? {
        NetHeaders::Ipv4(ip, _) => (ip.fragment_offset.value(), ip.more_fragments),
        NetHeaders::Ipv6(_, extensions) => {
            let fragment = extensions.fragment?;
            (fragment.fragment_offset.value(), fragment.more_fragments)
        }
        NetHeaders::Arp(_) => return None,
    };
    (!frame.outgoing && (more || offset > 0)).then_some(offset)
}

/// Sends a megabyte to the address behind the narrow link, which cannot arrive unless the sender learns of the link.
fn transfer(client: &Host, server: &Host, to: SocketAddr) -> Result<()> {
    const LENGTH: usize = 1 << 20;
    let server = tcp::Server::sink(&server.netns, to)?;
    let mut capture = Capture::start(&client.netns, "eth0")?;
    let mut connection = tcp::Client::new(&client.netns).connect(to)?.reached()?;
    connection.stream().set_write_timeout(Some(DEADLINE))?;
    connection.stream().write_all(&vec![b'.'; LENGTH]).context("send")?;
    let arrived = || (server.received() == LENGTH as u64).then_some(());
    eventually(DEADLINE, arrived)
        .with_context(|| format!("{} of {LENGTH} octets arrived", server.received()))?;
    let error = capture.find(SECOND, |frame| !frame.outgoing && says_too_big(frame))?;
    ensure!(error.is_some(), "it took no ICMP error: the path was not narrow");
    Ok(())
}

#[test]
fn a_lan_host_learns_of_a_narrow_link_behind_a_pod() -> Result<()> {
    let lab = Lab::builder().build()?;
    let _agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    for address in ["10.200.1.200", "fd20:1::200"] {
        let address = address.parse()?;
        narrow_link(&lab, lab.c1(), lab.c2(), address, &lab.c1().peer_interface)?;
        transfer(lab.a(), lab.c2(), SocketAddr::new(address, INBOUND))
            .with_context(|| format!("to {address}"))?;
    }
    Ok(())
}

#[test]
fn a_pod_learns_of_a_narrow_link_behind_a_lan_host() -> Result<()> {
    let lab = Lab::builder().second_host().build()?;
    let _agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    for address in ["192.168.31.200", "fd31::200"] {
        let address = address.parse()?;
        narrow_link(&lab, lab.a(), lab.a2(), address, "eth0")?;
        transfer(lab.c1(), lab.a2(), SocketAddr::new(address, OUTBOUND))
            .with_context(|| format!("to {address}"))?;
    }
    Ok(())
}

#[test]
fn fragments_of_an_allowed_datagram_arrive_whole_and_of_a_denied_one_not_at_all() -> Result<()> {
    let lab = Lab::builder().build()?;
    let _agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    let datagram: Vec<u8> = (0..5000_u32).map(|i| (i % 251) as u8).collect();
    for family in Family::BOTH {
        for (client, server, allowed) in [(lab.a(), lab.c1(), INBOUND), (lab.c1(), lab.a(), OUTBOUND)] {
            let open = udp::Server::echo(&server.netns, server.at(family, allowed))?;
            let shut = udp::Server::echo(&server.netns, server.at(family, DENIED))?;
            let mut capture = Capture::start(&server.netns, "eth0")?;
            let attempt = udp::ask(&client.netns, 0, shut.address(), &datagram, SILENCE)?;
            // Behind an extension header, as that of IPv6 fragments, a denied packet gets no answer.
            let as_expected = if family == Family::V4 { attempt.refused() } else { attempt.timed_out() };
            ensure!(as_expected, "{family:?} to {}, denied: {attempt}", server.name);
            let seen = seen_until_now(&mut capture, lab.b(), server, family)?;
            let offsets: Vec<_> = seen.iter().filter_map(fragment_offset).collect();
            ensure!(!offsets.contains(&0), "a first fragment has arrived: {offsets:?}");

            let attempt = udp::ask(&client.netns, 0, open.address(), &datagram, SECOND)?;
            ensure!(attempt.succeeded(), "{family:?} to {}, allowed: {attempt}", server.name);
            let lengths: Vec<_> = open.received().iter().map(|(_, datagram)| datagram.len()).collect();
            assert_eq!(lengths, [datagram.len()]);
            let seen = seen_until_now(&mut capture, lab.b(), server, family)?;
            let offsets: Vec<_> = seen.iter().filter_map(fragment_offset).collect();
            ensure!(offsets.contains(&0) && offsets.len() > 3, "it was not fragmented: {offsets:?}");
            assert_eq!(shut.received(), []);
        }
    }
    Ok(())
}
