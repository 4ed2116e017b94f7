//! Short stories of packets: a flow that is opened, answered, goes on; one that is not opened as it should; odd forms.

use bridge_agent::model::{Action, Policy, Protocol};
use bridge_agent::policy::reference;
use bridge_common::policy::protocol;
use etherparse::IpNumber;

use super::dice::Dice;
use super::endpoints::{self, Flow};
use super::{Sent, local};
use crate::packet::{Icmp, Packet, Tcp};

/// Protocols without ports: GRE, ESP, and two for experiments (RFC 3692).
const OTHERS: [u8; 4] = [47, 50, 253, 254];
/// ICMP types that are neither query, reply nor error, or not of these days: alternate host address, router
/// solicitation, traceroute, photuris.
const ODD_V4: [u8; 4] = [6, 10, 30, 40];
/// Node information query (RFC 4620), multicast listener report, one for experiments.
const ODD_V6: [u8; 3] = [139, 131, 200];
/// What a scan sends. In the order FIN, SYN, RST, PSH, ACK, URG.
const STRAYS: [(&str, [bool; 6]); 9] = [
    ("ACK", [false, false, false, false, true, false]),
    ("SYN ACK", [false, true, false, false, true, false]),
    ("RST", [false, false, true, false, false, false]),
    ("FIN ACK", [true, false, false, false, true, false]),
    ("no flags", [false; 6]),
    ("FIN PSH URG", [true, false, false, true, false, true]),
    ("SYN FIN", [true, true, false, false, false, false]),
    ("SYN RST", [false, true, true, false, false, false]),
    ("all flags", [true; 6]),
];

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
        Protocol::Tcp => {
            match dice.below(10) {
                0..=2 => story.tcp_stray(dice),
                3..=5 if !to_node => story.tcp_connection(dice),
                _ => story.tcp_opening(dice),
            }
            IpNumber::TCP.0
        }
        Protocol::Udp => {
            match dice.below(10) {
                0..=2 if !to_node => story.udp_exchange(),
                3..=4 if !to_node => story.icmp_error(dice),
                5..=6 => story.fragments(dice),
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
            let number = *dice.pick(&OTHERS);
            story.other(number);
            number
        }
    };
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

    /// Eight octets that tell this packet from all others.
    fn mark(&self) -> Vec<u8> {
        let number = u32::try_from(self.sent.len()).unwrap_or_default();
        [self.tag.to_be_bytes(), number.to_be_bytes()].concat()
    }

    fn send(&mut self, what: &'static str, from_opener: bool, packet: Packet, passes: Option<bool>) {
        self.send_all(what, from_opener, vec![packet], passes);
    }

    fn send_all(
        &mut self,
        what: &'static str,
        from_opener: bool,
        packets: Vec<Packet>,
        passes: Option<bool>,
    ) {
        let from = if from_opener { self.flow.from() } else { self.flow.from().other() };
        self.sent.push(Sent { what, from, packets, passes });
    }

    /// Sequence numbers of both sides.
    fn numbers(&self) -> (u32, u32) {
        (self.tag << 12, !(self.tag << 12))
    }

    fn tcp_syn(&self) -> Tcp {
        let mut syn = Tcp::syn(self.flow.source_port, self.flow.destination_port);
        syn.header.sequence_number = self.numbers().0;
        syn
    }

    fn tcp_opening(&mut self, dice: &mut Dice) {
        let passes = Some(self.opens(protocol::TCP));
        let mut syn = self.tcp_syn();
        let what = if dice.percent(20) {
            (syn.header.ece, syn.header.cwr) = (true, true);
            "SYN that asks for ECN"
        } else {
            "SYN"
        };
        let (packet, what, passes) = self.dressed(dice, self.there().tcp(syn), what, passes);
        self.send(what, true, packet, passes);
    }

    fn tcp_stray(&mut self, dice: &mut Dice) {
        let (what, [fin, syn, rst, psh, ack, urg]) = *dice.pick(&STRAYS);
        let mut tcp = self.tcp_syn().payload(&self.mark());
        let header = &mut tcp.header;
        (header.fin, header.syn, header.rst) = (fin, syn, rst);
        (header.psh, header.ack, header.urg) = (psh, ack, urg);
        header.acknowledgment_number = if ack { 1 } else { 0 };
        let passes = Some(self.is_free(protocol::TCP));
        self.send(what, true, self.there().tcp(tcp), passes);
    }

    /// A handshake, data both ways, and now and then an end.
    fn tcp_connection(&mut self, dice: &mut Dice) {
        let passes = Some(self.opens(protocol::TCP));
        let Flow { source_port: a, destination_port: b, .. } = self.flow;
        let (mine, theirs) = self.numbers();
        self.send("SYN of a connection", true, self.there().tcp(self.tcp_syn()), passes);
        let mut syn_ack = Tcp::syn_ack(b, a);
        syn_ack.header.sequence_number = theirs;
        syn_ack.header.acknowledgment_number = mine.wrapping_add(1);
        self.send("SYN ACK of a connection", false, self.back().tcp(syn_ack), passes);
        let (mine, theirs) = (mine.wrapping_add(1), theirs.wrapping_add(1));
        self.send("ACK of a connection", true, self.there().tcp(Tcp::ack(a, b, mine, theirs)), passes);
        let data = Tcp::ack(a, b, mine, theirs).payload(&self.mark());
        self.send("data", true, self.there().tcp(data), passes);
        let mine = mine.wrapping_add(8);
        let data = Tcp::ack(b, a, theirs, mine).payload(&self.mark());
        self.send("data of the other side", false, self.back().tcp(data), passes);
        let theirs = theirs.wrapping_add(8);
        match dice.below(3) {
            0 => {
                self.send("FIN", true, self.there().tcp(Tcp::fin(a, b, mine, theirs)), passes);
                let fin = Tcp::fin(b, a, theirs, mine.wrapping_add(1));
                self.send("FIN of the other side", false, self.back().tcp(fin), passes);
                let ack = Tcp::ack(a, b, mine.wrapping_add(1), theirs.wrapping_add(1));
                self.send("last ACK", true, self.there().tcp(ack), passes);
            }
            1 => self.send("RST of a connection", false, self.back().tcp(Tcp::rst(b, a, theirs)), passes),
            _ => {}
        }
    }

    fn udp(&mut self, dice: &mut Dice) {
        let passes = Some(self.opens(protocol::UDP));
        let packet = self.there().udp(self.flow.source_port, self.flow.destination_port, &self.mark());
        let (packet, what, passes) = self.dressed(dice, packet, "datagram", passes);
        self.send(what, true, packet, passes);
    }

    fn udp_exchange(&mut self) {
        let passes = Some(self.opens(protocol::UDP));
        let Flow { source_port: a, destination_port: b, .. } = self.flow;
        self.send("question", true, self.there().udp(a, b, &self.mark()), passes);
        // If the question was denied, the answer may be a question that a rule allows.
        let mirrored =
            Story { policy: self.policy, flow: self.flow.reversed(), tag: self.tag, sent: Vec::new() };
        let answer = passes == Some(true) || mirrored.opens(protocol::UDP);
        self.send("answer", false, self.back().udp(b, a, &self.mark()), Some(answer));
        self.send("another question", true, self.there().udp(a, b, &self.mark()), Some(answer));
    }

    /// A datagram cut up, in either order. It passes if all of it does.
    fn fragments(&mut self, dice: &mut Dice) {
        let mut passes = Some(self.opens(protocol::UDP));
        let payload = [self.mark(), vec![0x55; 40 + 8 * dice.below(20)]].concat();
        let packet = self.there().udp(self.flow.source_port, self.flow.destination_port, &payload);
        let size = 8 * (1 + dice.below(6));
        if size == 8 {
            // The second fragment is at an offset of 8 octets, at which TCP flags could be overwritten (RFC 3128).
            passes = None;
        }
        let mut fragments = packet.fragments(size, self.tag);
        let what = if dice.percent(50) {
            fragments.reverse();
            "fragments, the last first"
        } else {
            "fragments"
        };
        self.send_all(what, true, fragments, passes);
    }

    fn sctp(&mut self, dice: &mut Dice) {
        let Flow { source_port: a, destination_port: b, .. } = self.flow;
        let marked = |kind: u8, mark: &[u8]| -> Vec<u8> {
            let length = u8::try_from(4 + mark.len()).unwrap_or(u8::MAX);
            [&[kind, 0, 0, length], mark].concat()
        };
        if dice.percent(65) {
            let passes = Some(self.opens(protocol::SCTP));
            self.send("INIT", true, self.there().sctp_init(a, b), passes);
            return;
        }
        let (what, chunk) =
            *dice.pick(&[("DATA", 0), ("INIT ACK", 2), ("SACK", 3), ("HEARTBEAT", 4), ("ABORT", 6)]);
        let packet = self.there().sctp(a, b, self.tag | 1, &marked(chunk, &self.mark()));
        let passes = Some(self.is_free(protocol::SCTP));
        self.send(what, true, packet, passes);
    }

    fn icmp(&mut self, dice: &mut Dice) {
        let v4 = self.flow.source.is_ipv4();
        let id = dice.port();
        self.flow = Flow { source_port: id, destination_port: id, ..self.flow };
        let (request, reply) = if v4 { (8, 0) } else { (128, 129) };
        let message = |kind: u8, mark: Vec<u8>| {
            let [high, low] = id.to_be_bytes();
            Icmp::Other(kind, 0, [high, low, 0, 1], mark)
        };
        let (opens, free) = (self.opens(protocol::ICMP), self.is_free(protocol::ICMP));
        match dice.below(10) {
            0 | 1 => {
                let packet = self.there().icmp(&message(reply, self.mark()));
                self.send("echo reply that nobody asked for", true, packet, Some(free));
            }
            2 => {
                let odd = if v4 { *dice.pick(&ODD_V4) } else { *dice.pick(&ODD_V6) };
                let packet = self.there().icmp(&message(odd, self.mark()));
                self.send("odd ICMP type", true, packet, Some(free));
            }
            3 if v4 => {
                let query = *dice.pick(&[13, 15, 17]);
                let packet = self.there().icmp(&message(query, self.mark()));
                self.send("ICMP query", true, packet, Some(opens));
            }
            _ => {
                self.send(
                    "echo request",
                    true,
                    self.there().icmp(&message(request, self.mark())),
                    Some(opens),
                );
                self.send("echo reply", false, self.back().icmp(&message(reply, self.mark())), Some(opens));
            }
        }
    }

    /// A datagram, and an error about it; or an error about one that was never sent.
    fn icmp_error(&mut self, dice: &mut Dice) {
        let Flow { source_port: a, destination_port: b, .. } = self.flow;
        let opens = self.opens(protocol::UDP);
        let datagram = self.there().udp(a, b, &self.mark());
        let quoted = datagram.ip();
        let known = dice.percent(60);
        if known {
            self.send("datagram before its error", true, datagram, Some(opens));
        }
        let mark = self.mark();
        let quoted = [quoted, mark].concat();
        let error = match dice.below(3) {
            0 => Icmp::Unreachable(if self.flow.source.is_ipv4() { 3 } else { 4 }, quoted),
            1 => Icmp::TooBig(1280, quoted),
            _ => Icmp::TimeExceeded(quoted),
        };
        let passes = if self.is_free(protocol::UDP) { true } else { known && opens };
        let what = if known { "error about a known flow" } else { "error about an unknown flow" };
        self.send(what, false, self.back().icmp(&error), Some(passes));
    }

    fn other(&mut self, number: u8) {
        let passes = Some(self.opens(protocol::OTHER));
        // Zeroes are a plain GRE header, and an ESP header with its index; the mark is behind.
        let payload = [vec![0; 8], self.mark()].concat();
        self.send("another protocol", true, self.there().raw(IpNumber(number), &payload), passes);
    }

    /// Now and then with IP options or extension headers, which change no verdict.
    fn dressed(
        &self,
        dice: &mut Dice,
        packet: Packet,
        what: &'static str,
        passes: Option<bool>,
    ) -> (Packet, &'static str, Option<bool>) {
        if dice.percent(70) {
            return (packet, what, passes);
        }
        match (self.flow.source.is_ipv4(), dice.below(4)) {
            (true, 0 | 1) => (packet.options(&[1, 1, 1, 1]), "with IP options", passes),
            (true, 2) => (packet.options(&[1; 40]), "with all the IP options there may be", passes),
            (true, _) => (packet.options(&[148, 4, 0, 0]), "with router alert", passes),
            (false, 0) => (packet.hop_by_hop(0), "with hop-by-hop options", passes),
            (false, 1) => (packet.destination_options(3), "with destination options", passes),
            (false, 2) => (packet.routing(), "with a routing header", passes),
            // Whether what an authentication header protects is still TCP is a matter of opinion.
            (false, _) => (packet.authentication(), "with an authentication header", None),
        }
    }
}
