//! Packets arrive unchanged.

use std::collections::HashSet;
use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};
use bridge_common::filter::fast_path::{Lease, Outcome};
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Lab};
use bridge_lab::traffic::{tcp, udp};
use bridge_lab::wait::eventually;
use bridge_lab::wire::{Capture, Frame};
use etherparse::{Icmpv4Type, Icmpv6Type, NetHeaders, PacketHeaders, TransportHeader};

use super::support::{ask_by_udp, directions, open_fast, outcomes, packets, round_trip};
use crate::support::{DEADLINE, SECOND, USUAL_RULES, config, open};

#[test]
fn connections_of_both_directions_take_it_and_end_properly() -> Result<()> {
    let lab = Lab::builder().build()?;
    let agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    for family in Family::BOTH {
        for (client, server, port) in directions(&lab) {
            let to = server.at(family, port);
            let _server = tcp::Server::echo(&server.netns, to)?;
            let connection = open_fast(&agent, client, to)?;
            let flow = || crate::support::flow(&agent, connection.source().ok()?, to, 6).ok().flatten();
            let from = connection.source()?;
            ensure!(flow().is_some_and(|flow| flow.leases.iter().all(Lease::is_known)), "{from} {to}");
            drop(connection);
            // Both FINs are followed, though all between them went by.
            let closing = || {
                let flow = crate::support::flow(&agent, from, to, 6).ok()??;
                (flow.state == bridge_common::filter::flow::state::CLOSING).then_some(())
            };
            eventually(DEADLINE, closing).context("the FINs were not followed")?;
        }
    }
    Ok(())
}

#[test]
fn connections_that_go_the_same_way_share_what_was_learnt_of_it() -> Result<()> {
    let lab = Lab::builder().build()?;
    let agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    let mut ways = HashSet::new();
    for (client, server, port) in directions(&lab) {
        let to = server.at(Family::V4, port);
        let _server = tcp::Server::echo(&server.netns, to)?;
        for _ in 0..8 {
            let connection = open_fast(&agent, client, to)?;
            let flow = crate::support::flow(&agent, connection.source()?, to, 6)?.context("no flow")?;
            ways.insert(flow.leases.map(|lease| lease.path));
        }
    }
    let [to_pod, to_lan] = *ways.iter().next().context("no connection")?;
    ensure!(ways.len() == 1 && to_pod != to_lan, "{ways:?}");
    Ok(())
}

/// The frame with this payload, as it comes in at the far side.
fn arrival(capture: &mut Capture, payload: &[u8]) -> Result<Frame> {
    let is_it = |frame: &Frame| !frame.outgoing && frame.bytes.ends_with(payload);
    capture.find(SECOND, is_it)?.with_context(|| format!("{payload:?} did not arrive"))
}

/// All that must be the same of two datagrams but for their payloads, checksums and identification: that of Ethernet and
/// IP; and both checksums, as they should be.
fn looks(frame: &Frame) -> Result<(Vec<u8>, Vec<u8>, u16, u16)> {
    let headers = PacketHeaders::from_ethernet_slice(&frame.bytes)?;
    let Some(TransportHeader::Udp(udp)) = &headers.transport else { anyhow::bail!("no UDP") };
    let payload = headers.payload.slice();
    let (ip, expected) = match headers.net.context("no IP")? {
        NetHeaders::Ipv4(mut ip, _) => {
            ensure!(ip.header_checksum == ip.calc_header_checksum(), "IP checksum");
            let expected = udp.calc_checksum_ipv4(&ip, payload)?;
            (ip.identification, ip.header_checksum) = (0, 0);
            (ip.to_bytes().to_vec(), expected)
        }
        NetHeaders::Ipv6(ip, _) => (ip.to_bytes().to_vec(), udp.calc_checksum_ipv6(&ip, payload)?),
        NetHeaders::Arp(_) => anyhow::bail!("ARP"),
    };
    Ok((frame.bytes[..14].to_vec(), ip, udp.checksum, expected))
}

#[test]
fn datagrams_arrive_as_the_kernel_forwards_them() -> Result<()> {
    // As on a wire, with complete checksums.
    let lab = Lab::builder().without_offloads().build()?;
    let agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    for family in Family::BOTH {
        for (client, server, port) in directions(&lab) {
            let to = server.at(family, port);
            let _server = udp::Server::echo(&server.netns, to)?;
            let mut there = Capture::start(&server.netns, "eth0")?;
            let mut back = Capture::start(&client.netns, "eth0")?;
            let socket = ask_by_udp(client, to)?;
            round_trip(&socket, b"by the network stack")?;
            let slow =
                (arrival(&mut there, b"by the network stack")?, arrival(&mut back, b"by the network stack")?);
            let mut round = 0_u32;
            let fast = eventually(DEADLINE, || {
                round += 1;
                let before = packets(&agent, Outcome::forwarded).ok()?;
                // As long as the one before.
                let payload = format!("{round:020}");
                round_trip(&socket, payload.as_bytes()).ok()?;
                let fast = packets(&agent, Outcome::forwarded).ok()? == before + 2;
                fast.then_some(payload)
            });
            let payload = fast.with_context(|| outcomes(&agent))?;
            let fast = (arrival(&mut there, payload.as_bytes())?, arrival(&mut back, payload.as_bytes())?);
            for (slow, fast) in [(slow.0, fast.0), (slow.1, fast.1)] {
                let (slow, fast) = (looks(&slow)?, looks(&fast)?);
                assert_eq!((&slow.0, &slow.1), (&fast.0, &fast.1), "{family:?} to {}", server.name);
                assert_eq!(fast.2, fast.3, "UDP checksum, {family:?} to {}", server.name);
            }
        }
    }
    Ok(())
}

#[test]
fn a_packet_whose_time_is_over_is_answered_by_the_node() -> Result<()> {
    let lab = Lab::builder().build()?;
    let agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    for family in Family::BOTH {
        for (client, server, port) in directions(&lab) {
            let to = server.at(family, port);
            let _server = tcp::Server::echo(&server.netns, to)?;
            let mut connection = open_fast(&agent, client, to)?;
            let mut capture = Capture::start(&client.netns, "eth0")?;
            let before = packets(&agent, Outcome::ttl)?;
            let socket = socket2::SockRef::from(&*connection.stream());
            if family == Family::V4 {
                socket.set_ttl_v4(1)?
            } else {
                socket.set_unicast_hops_v6(1)?
            }
            let _ = connection.round_trip(SECOND / 5);
            let exceeded = |frame: &Frame| {
                !frame.outgoing
                    && match frame.headers().and_then(|headers| headers.transport) {
                        Some(TransportHeader::Icmpv4(icmp)) => {
                            matches!(icmp.icmp_type, Icmpv4Type::TimeExceeded(_))
                        }
                        Some(TransportHeader::Icmpv6(icmp)) => {
                            matches!(icmp.icmp_type, Icmpv6Type::TimeExceeded(_))
                        }
                        _ => false,
                    }
            };
            let answer = capture.find(SECOND, exceeded)?;
            ensure!(answer.is_some(), "{family:?} from {}: no answer", client.name);
            ensure!(packets(&agent, Outcome::ttl)? > before, "{}", outcomes(&agent));
        }
    }
    Ok(())
}

#[test]
fn many_octets_arrive_whole_both_ways() -> Result<()> {
    use std::io::{Read as _, Write as _};
    const LENGTH: usize = 8 << 20;
    let lab = Lab::builder().build()?;
    let agent = Agent::start(&lab, lab.b(), &config("", USUAL_RULES))?;
    let sent: Vec<u8> = (0..LENGTH).map(|i| (i * 7 + i / 251).to_le_bytes()[0]).collect();
    for family in Family::BOTH {
        for (client, server, port) in directions(&lab) {
            let to: SocketAddr = server.at(family, port);
            let _server = tcp::Server::echo(&server.netns, to)?;
            let mut connection = open(client, to)?;
            connection.stream().set_read_timeout(Some(DEADLINE))?;
            let before = packets(&agent, Outcome::forwarded)?;
            let mut writer = connection.stream().try_clone()?;
            let received = std::thread::scope(|scope| -> Result<Vec<u8>> {
                let sending = scope.spawn(|| writer.write_all(&sent));
                let mut received = vec![0; LENGTH];
                connection.stream().read_exact(&mut received)?;
                sending.join().expect("no panic while sending")?;
                Ok(received)
            })?;
            ensure!(received == sent, "{family:?} to {}: other bytes arrived", server.name);
            // Large ones, put together by segmentation offload.
            let forwarded = packets(&agent, Outcome::forwarded)? - before;
            ensure!(forwarded > 100, "{forwarded} packets took the fast path:\n{}", outcomes(&agent));
        }
    }
    Ok(())
}
