//! Short stories of packets: a flow that is opened, answered, goes on; one that is not opened as it should; odd forms.

mod forms;
mod icmp;
mod sctp;
mod tcp;

use bridge_agent::model::{Action, Policy, Protocol};
use bridge_agent::policy::reference;
use bridge_common::filter::policy::class;
use std::net::IpAddr;

use etherparse::{IpNumber, TcpHeader, UdpHeader};

use ipnet::IpNet;

use super::dice::Dice;
use super::endpoints::{self, Flow};
use super::{Difference, Expected, Sent, local};
use crate::packet::Packet;

/// Protocols without ports: GRE, ESP, and two for experiments (RFC 3692).
const OTHERS: [u8; 4] = [47, 50, 253, 254];
/// One story. `tag` is a number that no other story has; its packets carry it.
pub(super) struct Story<'a> {
    policy: &'a Policy,
    flow: Flow,
    tag: u32,
    sent: Vec<Sent>,
}

/// The flow, the protocol number and the packets of a story, drawn at random.
pub(super) fn story(dice: &mut Dice, policy: &Policy, tag: u32) -> (Flow, u8, Vec<Sent>) {
    let node_port = if dice.percent(12) { endpoints::node_port_flow(dice, policy) } else { None };
    let to_node = node_port.is_some();
    let (flow, protocol) = node_port.unwrap_or_else(|| endpoints::flow(dice, policy));
    let mut story = Story { policy, flow, tag, sent: Vec::new() };
    let number = match protocol {
        _ if story.is_foreign() => {
            story.foreign();
            IpNumber::UDP.0
        }
        Protocol::Tcp => {
            match dice.below(20) {
                0..=4 => story.tcp_stray(dice),
                5..=10 if !to_node => story.tcp_connection(dice),
                11..=12 if !to_node => story.tcp_refusal(dice),
                13..=14 => story.fragments(dice, IpNumber::TCP),
                _ => story.tcp_opening(dice),
            }
            IpNumber::TCP.0
        }
        Protocol::Udp => {
            match dice.below(10) {
                0..=2 if !to_node => story.udp_exchange(dice),
                3..=4 if !to_node => story.icmp_error(dice),
                5..=6 => story.fragments(dice, IpNumber::UDP),
                _ => story.udp(dice),
            }
            IpNumber::UDP.0
        }
        Protocol::Sctp => {
            story.sctp(dice);
            IpNumber::SCTP.0
        }
        Protocol::Icmp => {
            story.icmp(dice);
            if flow.source.is_ipv4() { IpNumber::ICMP.0 } else { IpNumber::IPV6_ICMP.0 }
        }
        Protocol::Any => {
            story.flow = Flow { source_port: 0, destination_port: 0, ..flow };
            let no_next_header = flow.source.is_ipv6() && dice.percent(10);
            let number = if no_next_header { IpNumber::IPV6_NO_NEXT_HEADER.0 } else { *dice.pick(&OTHERS) };
            story.other(dice, number);
            number
        }
    };
    story.forms();
    (story.flow, number, story.sent)
}

impl Story<'_> {
    /// Whether the first packet of the flow passes: what the documentation of the rules says.
    fn opens(&self, protocol: usize) -> bool {
        let packet = self.reference(protocol);
        reference::scope_model(self.policy, &local(), &packet).is_none()
            || reference::evaluate_model(self.policy, &local(), &packet)
                .is_some_and(|(_, action)| action == Action::Allow)
    }

    /// Whether the flow is none of bridge's business.
    fn is_free(&self, protocol: usize) -> bool {
        reference::scope_model(self.policy, &local(), &self.reference(protocol)).is_none()
    }

    /// Whether one end is a pod and the other one is nothing that a rule can name.
    fn is_foreign(&self) -> bool {
        let within = |nets: &[IpNet], address: &IpAddr| nets.iter().any(|net| net.contains(address));
        let node = |address: &IpAddr| local().contains(address) || within(&self.policy.nodes, address);
        let pod = |address: &IpAddr| within(&self.policy.pods, address) && !node(address);
        let foreign = |address: &IpAddr| {
            ![&self.policy.pods, &self.policy.external].iter().any(|nets| within(nets, address))
                && !node(address)
        };
        let Flow { source, destination, .. } = &self.flow;
        (pod(source) && foreign(destination)) || (foreign(source) && pod(destination))
    }

    fn to_pod(&self) -> bool {
        self.policy.pods.iter().any(|net| net.contains(&self.flow.destination))
    }

    /// A pod asks and gets an answer; or a foreign host sends a datagram that no rule can allow.
    fn foreign(&mut self) {
        let Flow { source_port: a, destination_port: b, .. } = self.flow;
        let question = self.there().udp(a, b, &self.mark());
        if self.to_pod() {
            self.send("datagram of a foreign host", true, question, false);
        } else {
            self.send("question to a foreign host", true, question, true);
            let answer = self.back().udp(b, a, &self.mark());
            self.send("answer of a foreign host", false, answer, true);
        }
    }

    fn reference(&self, protocol: usize) -> reference::Packet {
        let Flow { source, destination, source_port, destination_port } = self.flow;
        reference::Packet { source, destination, protocol, source_port, destination_port }
    }

    /// From who opens the flow to who is asked.
    fn there(&self) -> Packet {
        Packet::new(self.flow.source, self.flow.destination)
    }

    fn back(&self) -> Packet {
        Packet::new(self.flow.destination, self.flow.source)
    }

    /// Eight octets that distinguish this packet from all others.
    fn mark(&self) -> Vec<u8> {
        let number = u32::try_from(self.sent.len()).unwrap_or_default();
        [self.tag.to_be_bytes(), number.to_be_bytes()].concat()
    }

    fn send(&mut self, what: &'static str, from_opener: bool, packet: Packet, expected: impl Into<Expected>) {
        self.send_all(what, from_opener, vec![packet], expected);
    }

    fn send_all(
        &mut self,
        what: &'static str,
        from_opener: bool,
        packets: Vec<Packet>,
        expected: impl Into<Expected>,
    ) {
        let from = if from_opener { self.flow.from() } else { self.flow.from().other() };
        self.sent.push(Sent { label: what, from, packets, arrives: None, expected: expected.into() });
    }

    /// The same story with the other side first.
    fn mirrored(&self) -> Self {
        Self { policy: self.policy, flow: self.flow.reversed(), tag: self.tag, sent: Vec::new() }
    }

    fn udp(&mut self, dice: &mut Dice) {
        let opens = self.opens(class::UDP);
        let packet = self.there().udp(self.flow.source_port, self.flow.destination_port, &self.mark());
        if dice.percent(12) {
            let expected = Expected::differing(Difference::Damage, opens, self.is_free(class::UDP));
            let (what, packet) = if dice.percent(70) {
                ("datagram with a wrong checksum", self.with_another(&packet, 6))
            } else {
                ("datagram with a wrong length", self.with_another(&packet, 4))
            };
            self.send(what, true, packet, expected);
            return;
        }
        let (packet, what, expected) = self.dressed(dice, packet, "datagram", class::UDP);
        self.send(what, true, packet, expected);
    }

    fn udp_exchange(&mut self, dice: &mut Dice) {
        let opens = self.opens(class::UDP);
        let Flow { source_port: a, destination_port: b, .. } = self.flow;
        self.send("question", true, self.there().udp(a, b, &self.mark()), opens);
        // If the question was denied, the answer may be a question that a rule allows.
        let answer = opens || self.mirrored().opens(class::UDP);
        self.send("answer", false, self.back().udp(b, a, &self.mark()), answer);
        // In half of them enough that the last ones may take the fast path.
        for _ in 0..1 + dice.below(7).saturating_sub(3) {
            self.send("another question", true, self.there().udp(a, b, &self.mark()), answer);
            self.send("another answer", false, self.back().udp(b, a, &self.mark()), answer);
        }
    }

    /// A datagram or a SYN cut up, in either order. It passes if all of it does.
    fn fragments(&mut self, dice: &mut Dice, number: IpNumber) {
        let Flow { source_port: a, destination_port: b, .. } = self.flow;
        let payload = [self.mark(), vec![0x55; 40 + 8 * dice.below(20)]].concat();
        let (packet, header, protocol) = match number {
            IpNumber::TCP => {
                (self.there().tcp(self.tcp_syn().payload(&payload)), TcpHeader::MIN_LEN, class::TCP)
            }
            _ => (self.there().udp(a, b, &payload), UdpHeader::LEN, class::UDP),
        };
        let size = 8 * (1 + dice.below(6));
        let (free, opens) = (self.is_free(protocol), self.opens(protocol));
        let to_node = local().contains(&self.flow.destination);
        let expected = if size >= header {
            // A fragment at octet 8 has no port that would lead it to a NodePort.
            let refused = size == 8 && !to_node;
            Expected::differing(Difference::ShortFragment, free || opens && !refused, opens)
        } else if self.flow.source.is_ipv4() {
            Expected::differing(Difference::ShortFragment, free, opens)
        } else {
            // Linux reassembles no such thing (RFC 8200, section 4.5), be it for itself or for connection tracking.
            Expected::differing(Difference::ShortFragment, free && !to_node, false)
        };
        let mut fragments = packet.fragments(size, self.tag);
        let what = if dice.percent(50) {
            // Ahead of the first one, eBPF lets none through.
            fragments[1..].reverse();
            "fragments, the later ones in reverse"
        } else {
            "fragments"
        };
        self.send_all(what, true, fragments, expected);
    }

    /// The packet, which has nothing between its IP header and TCP or UDP, with another number there, `at` octets from
    /// the start.
    fn with_another(&self, packet: &Packet, at: usize) -> Packet {
        let (ip, v4) = (packet.ip(), self.flow.source.is_ipv4());
        let (header, number) = if v4 { (20, ip[9]) } else { (40, ip[6]) };
        let mut rest = ip[header..].to_vec();
        // As a checksum, 0 would mean that there is none (RFC 768).
        let other = if rest[at..at + 2] == [1, 1] { 2 } else { 1 };
        rest[at..at + 2].iter_mut().for_each(|octet| *octet ^= other);
        let (source, destination) = packet.addresses();
        Packet::new(source, destination).raw(IpNumber(number), &rest)
    }

    fn other(&mut self, dice: &mut Dice, number: u8) {
        if IpNumber(number) == IpNumber::IPV6_NO_NEXT_HEADER {
            let packet = self.there().raw(IpNumber(number), &self.mark());
            self.send("no next header", true, packet, self.is_free(class::OTHER));
            return;
        }
        let opens = self.opens(class::OTHER);
        // Zeroes are a plain GRE header, and an ESP header with its index; the mark is behind.
        let payload = |mark: Vec<u8>| [vec![0; 8], mark].concat();
        let packet = self.there().raw(IpNumber(number), &payload(self.mark()));
        self.send("another protocol", true, packet, opens);
        if dice.percent(50) {
            let answer = opens || self.mirrored().opens(class::OTHER);
            let packet = self.back().raw(IpNumber(number), &payload(self.mark()));
            self.send("answer in another protocol", false, packet, answer);
        }
    }

    /// Now and then with IP options or extension headers. `protocol`: as in [`Story::opens`].
    fn dressed(
        &self,
        dice: &mut Dice,
        packet: Packet,
        what: &'static str,
        protocol: usize,
    ) -> (Packet, &'static str, Expected) {
        let opens = self.opens(protocol);
        let same = opens.into();
        if dice.percent(70) {
            return (packet, what, same);
        }
        match (self.flow.source.is_ipv4(), dice.below(6)) {
            (true, 0 | 1) => (packet.options(&[1, 1, 1, 1]), "with IP options", same),
            (true, 2 | 3) => (packet.options(&[1; 40]), "with all the IP options there may be", same),
            (true, _) => (packet.options(&[148, 4, 0, 0]), "with router alert", same),
            (false, 0) => (packet.hop_by_hop(0), "with hop-by-hop options", same),
            (false, 1) => (packet.destination_options(3), "with destination options", same),
            (false, 2) => (packet.routing(), "with a routing header", same),
            (false, 3) => {
                let packet = packet.hop_by_hop(1).destination_options(0).routing().destination_options(2);
                (packet, "with several extension headers", same)
            }
            // The node itself answers such a packet with an ICMPv6 error.
            (false, 4) if !local().contains(&self.flow.destination) => {
                // Type 0, one segment left, and its address.
                let header = [&[0, 2, 0, 1, 0, 0, 0, 0][..], &[0xfd; 16]].concat();
                let free = self.is_free(protocol);
                let expected = Expected::differing(Difference::SourceRoute, free, opens);
                let packet = packet.raw_extension(IpNumber::IPV6_ROUTE_HEADER, header);
                (packet, "with a segment left to go to", expected)
            }
            (false, _) => {
                let as_a_protocol = self.opens(class::OTHER);
                let expected = Expected::differing(Difference::AuthenticationHeader, opens, as_a_protocol);
                (packet.authentication(), "with an authentication header", expected)
            }
        }
    }
}
