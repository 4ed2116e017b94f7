//! Pods of other nodes: behind an overlay, or behind another node of the LAN. Packets to and from them, also in transit between
//! LAN hosts and them; packets that come to this node's pods through the overlay; and packets that pretend to.
//!
//! They come behind the plain packets of a case, once every flow is forgotten. Their dice are of these alone.

use std::collections::HashSet;
use std::net::IpAddr;

use bridge_agent::model::{Action, Policy, Protocol, Tunnel};
use bridge_agent::policy::reference;
use bridge_common::filter::policy::class;
use etherparse::IpNumber;
use ipnet::IpNet;

use super::dice::Dice;
use super::endpoints::{self, Flow, is_pod, side};
use super::{Expected, Sent, Side, local};
use crate::packet::{Packet, Tcp};

/// Pods of other nodes, which the node routes to the overlay.
pub(super) const OVERLAY: [&str; 2] = ["10.201.0.0/16", "fd21::/32"];
/// Pods of other nodes, which the node routes to another node of the LAN.
pub(super) const BEYOND: [&str; 2] = ["10.202.0.0/16", "fd22::/32"];
/// UDP port of the overlay.
pub(super) const VXLAN: u16 = 8472;
/// Tunnels of the node; it has an interface for the first one only.
pub(super) const TUNNELS: [Tunnel; 2] = [Tunnel::Udp(VXLAN), Tunnel::Protocol(IPIP)];
/// Link layer addresses of both ends of the overlay: of the node, and of the other one.
pub(super) const OVERLAY_MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 4], [2, 0, 0, 0, 0, 3]];

const IPIP: u8 = 4;
/// Stories of a case.
const STORIES: usize = 40;

/// Another node, the other end of the overlay. On the LAN, but no address that other packets are drawn from.
pub(super) fn other_node() -> [IpAddr; 2] {
    [IpAddr::from([172, 31, 0, 18]), IpAddr::from([0xfd41, 0, 0, 0, 0, 0, 0, 0x18])]
}

/// The policy of a cluster that has these pods and this node, too. Of some seeds, it names no nodes, not even this one.
pub(super) fn policy(seed: u64, policy: &Policy) -> Policy {
    let mut policy = policy.clone();
    policy.pods.extend(OVERLAY.iter().chain(&BEYOND).filter_map(|block| block.parse::<IpNet>().ok()));
    if seed % 8 == 7 && policy.nodes == local().map(IpNet::from) {
        policy.nodes.clear();
    } else {
        policy.nodes.extend(other_node().map(IpNet::from));
    }
    policy
}

/// Whether packets of `address` come through a tunnel from a node that the policy does not name: none of them gets in.
pub(super) fn is_cut_off(policy: &Policy, address: IpAddr) -> bool {
    policy.nodes.is_empty() && side(address) == Side::Overlay
}

/// An address of a pod of another node.
pub(super) fn remote(dice: &mut Dice, v4: bool) -> IpAddr {
    let blocks = if dice.percent(50) { OVERLAY } else { BEYOND };
    dice.address(&blocks[usize::from(!v4)].parse().expect("a prefix"))
}

/// A VXLAN packet (RFC 7348) of network 1.
pub(super) fn encapsulated(source: IpAddr, to: IpAddr, port: u16, inner: &Packet) -> Packet {
    let [own, other] = OVERLAY_MACS;
    let frame = inner.clone().macs(other, own).frame();
    Packet::new(source, to).udp(port, VXLAN, &[&[8, 0, 0, 0, 0, 0, 1, 0][..], &frame].concat())
}

/// `of` draws addresses and ports; `policy` is that of [`policy`].
pub(super) fn stories(seed: u64, of: &Policy, policy: &Policy, mut tag: u32) -> Vec<Sent> {
    let mut dice = Dice::new(seed ^ 0x656c_7365_7768_6572);
    let (mut sent, mut flows) = (Vec::new(), HashSet::new());
    for _ in 0..STORIES {
        tag += 1;
        let (near, protocol) = endpoints::flow(&mut dice, of);
        let far = remote(&mut dice, near.source.is_ipv4());
        let kind = match dice.below(10) {
            6 | 7 if policy.nodes.is_empty() => 9,
            kind => kind,
        };
        if kind < 6 && is_cut_off(policy, far) {
            continue;
        }
        let flow = match kind {
            // Between a pod or LAN host and a pod of another node, either of which asks.
            0..=5 if dice.percent(50) => Flow { source: far, ..near },
            0..=5 => Flow { destination: far, ..near },
            _ => near,
        };
        let mut ends = [(flow.source, flow.source_port), (flow.destination, flow.destination_port)];
        ends.sort_unstable();
        if !flows.insert(ends) {
            continue;
        }
        let is_tcp = protocol != Protocol::Udp;
        let mut story = Story { policy, flow, from: side(flow.source), tag, sent: &mut sent };
        match kind {
            0..=4 => story.transit(&mut dice, is_tcp),
            5 => story.fragments(&mut dice),
            6 | 7 => story.through_the_overlay(&mut dice, is_tcp),
            8 => story.forged(&mut dice, far),
            _ => story.outer(&mut dice, far),
        }
    }
    sent
}

struct Story<'a> {
    policy: &'a Policy,
    flow: Flow,
    /// Where the packets of the opener come from.
    from: Side,
    tag: u32,
    sent: &'a mut Vec<Sent>,
}

impl Story<'_> {
    /// Whether the first packet of the flow passes, if this node judges it.
    fn opens(&self, protocol: usize) -> bool {
        let Flow { source, destination, source_port, destination_port } = self.flow;
        let packet = reference::Packet { source, destination, protocol, source_port, destination_port };
        reference::scope_model(self.policy, &local(), &packet).is_none()
            || reference::evaluate_model(self.policy, &local(), &packet)
                .is_some_and(|(_, action)| action == Action::Allow)
    }

    /// Eight octets that distinguish this packet from all others.
    fn mark(&self) -> Vec<u8> {
        let number = u32::try_from(self.sent.len()).unwrap_or_default();
        [self.tag.to_be_bytes(), number.to_be_bytes()].concat()
    }

    fn push(&mut self, label: &'static str, from: Side, packets: Vec<Packet>, passes: bool) {
        let expected = Expected::from(passes);
        self.sent.push(Sent { label, from, packets, arrives: None, expected });
    }

    /// Sends a packet of the opener, or an answer; `load` makes it between these ports.
    fn send(
        &mut self,
        label: &'static str,
        by_opener: bool,
        passes: bool,
        load: impl FnOnce(Packet, u16, u16) -> Packet,
    ) {
        let Flow { source, destination, source_port, destination_port } = self.flow;
        let (from, packet) = if by_opener {
            (self.from, load(Packet::new(source, destination), source_port, destination_port))
        } else {
            (side(destination), load(Packet::new(destination, source), destination_port, source_port))
        };
        self.push(label, from, vec![packet], passes);
    }

    /// Nothing of it is judged here, be it only half of a connection, or the middle of one.
    fn transit(&mut self, dice: &mut Dice, is_tcp: bool) {
        let one_way = dice.percent(30);
        if !is_tcp {
            self.exchange("datagram in transit", "answer in transit", one_way);
        } else if dice.percent(30) {
            let number = self.tag << 12;
            let mut stray = Tcp::ack(0, 0, number, !number);
            stray.header.rst = dice.percent(30);
            stray.header.fin = !stray.header.rst && dice.percent(30);
            stray.header.syn = !stray.header.rst && !stray.header.fin && dice.percent(30);
            self.send("stray segment in transit", true, true, |packet, a, b| {
                packet.tcp(between(stray, a, b))
            });
        } else {
            let segment = "segment in transit";
            self.connection(["SYN in transit", "SYN ACK in transit", segment, segment], one_way);
        }
    }

    fn exchange(&mut self, question: &'static str, answer: &'static str, one_way: bool) {
        for _ in 0..2 {
            let mark = self.mark();
            self.send(question, true, true, |packet, a, b| packet.udp(a, b, &mark));
            if !one_way {
                let mark = self.mark();
                self.send(answer, false, true, |packet, a, b| packet.udp(a, b, &mark));
            }
        }
    }

    /// All of it passes. The labels are of its SYN, its SYN ACK, and the segments of either side after them.
    fn connection(&mut self, [opening, answer, there, back]: [&'static str; 4], one_way: bool) {
        let (mine, theirs) = (self.tag << 12, !(self.tag << 12));
        let mut syn = Tcp::syn(0, 0);
        syn.header.sequence_number = mine;
        self.send(opening, true, true, |packet, a, b| packet.tcp(between(syn, a, b)));
        let (mine, answered) = (mine.wrapping_add(1), theirs.wrapping_add(1));
        if !one_way {
            let mut syn_ack = Tcp::syn_ack(0, 0);
            (syn_ack.header.sequence_number, syn_ack.header.acknowledgment_number) = (theirs, mine);
            self.send(answer, false, true, |packet, a, b| packet.tcp(between(syn_ack, a, b)));
        }
        self.send(there, true, true, |packet, a, b| packet.tcp(Tcp::ack(a, b, mine, answered)));
        let mark = self.mark();
        let data = |packet: Packet, a, b| packet.tcp(Tcp::ack(a, b, mine, answered).payload(&mark));
        self.send(there, true, true, data);
        if !one_way {
            let mark = self.mark();
            let data = |packet: Packet, a, b| {
                packet.tcp(Tcp::ack(a, b, answered, mine.wrapping_add(8)).payload(&mark))
            };
            self.send(back, false, true, data);
        }
    }

    fn fragments(&mut self, dice: &mut Dice) {
        let Flow { source, destination, source_port, destination_port } = self.flow;
        let payload = [self.mark(), vec![0x55; 40 + 8 * dice.below(10)]].concat();
        let packet = Packet::new(source, destination).udp(source_port, destination_port, &payload);
        let mut fragments = packet.fragments(8 * (2 + dice.below(4)), self.tag);
        if dice.percent(50) {
            fragments.reverse();
        }
        self.push("fragments in transit", self.from, fragments, true);
    }

    /// A LAN host, or a node, to a pod of this node, by the overlay of another node. The answers go the direct way.
    fn through_the_overlay(&mut self, dice: &mut Dice, is_tcp: bool) {
        if self.from != Side::Lan {
            return;
        }
        self.from = Side::Overlay;
        let opens = self.opens(if is_tcp { class::TCP } else { class::UDP });
        match (is_tcp, opens) {
            (true, true) => {
                let labels = [
                    "SYN through the overlay",
                    "SYN ACK to the LAN",
                    "segment through the overlay",
                    "segment to the LAN",
                ];
                self.connection(labels, false);
            }
            (false, true) => {
                self.exchange("datagram through the overlay", "answer to the LAN", dice.percent(30))
            }
            (true, false) => {
                let mut syn = Tcp::syn(0, 0);
                syn.header.sequence_number = self.tag << 12;
                self.send("SYN through the overlay", true, false, |packet, a, b| {
                    packet.tcp(between(syn, a, b))
                });
            }
            (false, false) => {
                let mark = self.mark();
                let load = |packet: Packet, a, b| packet.udp(a, b, &mark);
                self.send("datagram through the overlay", true, false, load);
            }
        }
    }

    /// In the name of a pod, by an interface that does not lead to it.
    fn forged(&mut self, dice: &mut Dice, far: IpAddr) {
        let (one, other) = (self.flow.source, self.flow.destination);
        let pod = if side(one) == Side::Pods { one } else { other };
        let source = if dice.percent(50) && is_pod(self.policy, pod) { pod } else { far };
        let destination = if source == one { other } else { one };
        let wrong: Vec<Side> = Side::ALL.into_iter().filter(|from| *from != side(source)).collect();
        self.from = *dice.pick(&wrong);
        self.flow = Flow { source, destination, ..self.flow };
        let mark = self.mark();
        self.send("datagram in the name of a pod", true, false, |packet, a, b| packet.udp(a, b, &mark));
    }

    /// An outer packet of a tunnel, whose inner one would come from a pod of another node: from a node, or from anybody else.
    fn outer(&mut self, dice: &mut Dice, far: IpAddr) {
        let v4 = far.is_ipv4();
        let Flow { source, destination, source_port, destination_port } = self.flow;
        let to = if side(source) == Side::Pods { source } else { destination };
        let inner = Packet::new(far, to).udp(source_port, destination_port, &self.mark());
        let at = usize::from(!v4);
        let (node, own) = (other_node()[at], local()[at]);
        let sender = match dice.below(4) {
            0 => node,
            1 => far,
            _ => source,
        };
        // A pod of this node has no business with the tunnels of other nodes either.
        let is_hosted = side(sender) == Side::Pods && is_pod(self.policy, sender);
        let to_other = is_hosted && dice.percent(30) && !self.policy.nodes.is_empty();
        let receiver = if to_other { node } else { own };
        let passes = self.policy.nodes.iter().any(|network| network.contains(&sender));
        let (label, packets) = match dice.below(4) {
            0 => {
                let outer = Packet::new(sender, receiver).raw(IpNumber(IPIP), &inner.ip());
                ("IP in IP packet to a node", vec![outer])
            }
            1 => {
                let outer = encapsulated(sender, receiver, source_port, &inner);
                ("VXLAN packet to a node, in fragments", outer.fragments(8 * (2 + dice.below(5)), self.tag))
            }
            _ => ("VXLAN packet to a node", vec![encapsulated(sender, receiver, source_port, &inner)]),
        };
        self.push(label, side(sender), packets, passes);
    }
}

/// The segment, between these ports.
fn between(mut segment: Tcp, source: u16, destination: u16) -> Tcp {
    (segment.header.source_port, segment.header.destination_port) = (source, destination);
    segment
}
