//! The answer to the sender of a denied packet: one that its kernel accepts, or silence.

use std::net::IpAddr;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use bridge_lab::agent::Agent;
use bridge_lab::lab::{Family, Host, Lab};
use bridge_lab::traffic::{tcp, udp};
use bridge_lab::wire::{Capture, Frame};
use etherparse::{IpNumber, Ipv4Header};

use crate::support::{DENIED, INBOUND, OUTBOUND, SECOND, SILENCE, USUAL_RULES, config, open, seen_until_now};

/// LAN host to pod, and pod to LAN host.
fn both_ways(lab: &Lab) -> [(&Host, &Host, u16); 2] {
    [(lab.a(), lab.c1(), INBOUND), (lab.c1(), lab.a(), OUTBOUND)]
}

/// The sum of RFC 1071 over all parts, each of an even length but for the last.
fn sum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let sum: u32 = words.map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    u16::try_from((folded & 0xffff) + (folded >> 16)).expect("twice folded")
}

/// Whether every checksum in a frame is right: that of the IPv4 header, and that of TCP, UDP, ICMP or ICMPv6.
fn is_intact(frame: &Frame) -> Result<bool> {
    let ip = frame.bytes.get(14..).context("an IP packet")?;
    let (source, destination) = frame.addresses().context("an IP packet")?;
    let octets = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let (header, payload, protocol) = if source.is_ipv4() {
        let (header, payload) = ip.split_at(Ipv4Header::MIN_LEN);
        (header, payload, header[9])
    } else {
        let (header, payload) = ip.split_at(40);
        (header, payload, header[6])
    };
    let length = u32::try_from(payload.len())?.to_be_bytes();
    let pseudo = [octets(source), octets(destination), length.to_vec(), vec![0, 0, 0, protocol]].concat();
    let pseudo: &[u8] = if protocol == IpNumber::ICMP.0 { &[] } else { &pseudo };
    Ok((source.is_ipv6() || sum(&[header]) == 0xffff) && sum(&[pseudo, payload]) == 0xffff)
}

/// Is refused by TCP and by UDP, and returns the two answers as they came to the client.
fn refusals(client: &Host, server: &Host, family: Family) -> Result<[Frame; 2]> {
    let to = server.at(family, DENIED);
    let _tcp = tcp::Server::echo(&server.netns, to)?;
    let _udp = udp::Server::echo(&server.netns, to)?;
    let mut capture = Capture::start(&client.netns, "eth0")?;
    let attempt = tcp::Client::new(&client.netns).connect(to)?;
    ensure!(attempt.refused(), "TCP to {to}: {attempt}");
    let attempt = udp::ask(&client.netns, 0, to, b"an odd length", SECOND)?;
    ensure!(attempt.refused(), "UDP to {to}: {attempt}");

    let reset = capture.find(SECOND, |frame| !frame.outgoing && frame.tcp().is_some_and(|tcp| tcp.rst))?;
    let from = server.ip(family);
    let unreachable = capture.find(SECOND, |frame| {
        !frame.outgoing
            && frame.tcp().is_none()
            && frame.addresses().is_some_and(|(source, _)| source == from)
    })?;
    Ok([reset.context("no RST was seen")?, unreachable.context("no ICMP error was seen")?])
}

#[test]
fn refusals_reach_clients_that_leave_checksums_to_the_device() -> Result<()> {
    let lab = Lab::builder().build()?;
    let _agent = Agent::start(&lab, lab.b(), &config("onDeny: reject", USUAL_RULES))?;
    for family in Family::BOTH {
        for (client, server, _) in both_ways(&lab) {
            refusals(client, server, family)?;
        }
    }
    Ok(())
}

/// Provokes refusals in both directions and families, and checks their checksums.
fn answers_are_intact(lab: &Lab) -> Result<()> {
    for family in Family::BOTH {
        for (client, server, _) in both_ways(lab) {
            for answer in refusals(client, server, family)? {
                ensure!(is_intact(&answer)?, "{family:?} to {}: {:02x?}", client.name, answer.bytes);
            }
        }
    }
    Ok(())
}

#[test]
fn refusals_have_right_checksums_on_the_wire() -> Result<()> {
    let lab = Lab::builder().without_offloads().build()?;
    let _agent = Agent::start(&lab, lab.b(), &config("onDeny: reject", USUAL_RULES))?;
    answers_are_intact(&lab)
}

/// A packet whose checksum was left to the device becomes an answer whose checksum is left to it, too: here the node's
/// interfaces cannot do it, so the kernel does as it sends, by the metadata of the answer.
#[test]
fn a_checksum_left_to_the_device_is_completed_right() -> Result<()> {
    let lab = Lab::builder().build()?;
    for interface in ["eth0", &lab.c1().peer_interface] {
        let mut ethtool = Command::new("ethtool");
        ethtool.args(["-K", interface, "tx", "off"]);
        lab.b().netns.output(ethtool)?;
    }
    let _agent = Agent::start(&lab, lab.b(), &config("onDeny: reject", USUAL_RULES))?;
    answers_are_intact(&lab)
}

#[test]
fn dropping_is_silence() -> Result<()> {
    let lab = Lab::builder().build()?;
    let _agent = Agent::start(&lab, lab.b(), &config("onDeny: drop", USUAL_RULES))?;
    for family in Family::BOTH {
        for (client, server, allowed) in both_ways(&lab) {
            let to = server.at(family, DENIED);
            let _tcp = tcp::Server::echo(&server.netns, to)?;
            let _udp = udp::Server::echo(&server.netns, to)?;
            let (mut at_client, mut at_server) =
                (Capture::start(&client.netns, "eth0")?, Capture::start(&server.netns, "eth0")?);
            let attempt = tcp::Client::new(&client.netns).deadline(SILENCE).connect(to)?;
            ensure!(attempt.timed_out(), "TCP: {attempt}");
            let attempt = udp::ask(&client.netns, 0, to, b"hello", SILENCE)?;
            ensure!(attempt.timed_out(), "UDP: {attempt}");

            for (capture, host) in [(&mut at_client, client), (&mut at_server, server)] {
                let seen = seen_until_now(capture, lab.b(), host, family)?;
                let other = [client, server].into_iter().find(|other| other.name != host.name);
                let other = other.context("two hosts")?.ip(family);
                let came = seen.iter().filter(|frame| !frame.outgoing);
                let from_other =
                    came.filter(|frame| frame.addresses().is_some_and(|(source, _)| source == other));
                assert_eq!(from_other.count(), 0, "{family:?} at {}", host.name);
            }
            // The silence is the agent's.
            let _server = tcp::Server::echo(&server.netns, server.at(family, allowed))?;
            open(client, server.at(family, allowed))?;
        }
    }
    Ok(())
}
