//! Flows that the node translates: Services, host ports and NodePorts, masqueraded or not, both ways.
//!
//! They come behind all other packets of a case, once the rules of [`Service`]s are loaded and every flow is forgotten.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::net::IpAddr;

use bridge_agent::model::{Action, Policy, Protocol};
use bridge_agent::policy::reference;
use bridge_common::filter::policy::{class, direction};

use super::dice::Dice;
use super::endpoints::{self, Flow, is_pod, side};
use super::{Difference, Expected, Sent, Side, elsewhere, local};
use crate::packet::{Packet, Tcp};

/// Stories of a case that lead to a pod of this node or to a LAN host.
const STORIES: usize = 6;
/// Those that lead to a pod of another node.
const REMOTE_STORIES: usize = 4;

/// An address and port that stand for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// The address that clients see: of no host, or of the node.
    at: IpAddr,
    port: u16,
    protocol: Protocol,
    /// The pod or LAN host behind it.
    to: (IpAddr, u16),
    /// Whether the node hides the client's address.
    masquerade: bool,
}

impl Service {
    const fn word(&self) -> &'static str {
        if matches!(self.protocol, Protocol::Tcp) { "tcp" } else { "udp" }
    }
}

/// The table of the services of a case, for `nft -f`; an empty one if there are none.
pub(super) fn table(services: &[Service]) -> String {
    let (mut before, mut after) = (String::new(), String::new());
    for service in services {
        let Service { at, port, to: (to, to_port), masquerade, .. } = service;
        let (word, family, own) = if at.is_ipv4() {
            (service.word(), "ip", local()[0])
        } else {
            (service.word(), "ip6", local()[1])
        };
        let to = if to.is_ipv4() { format!("{to}:{to_port}") } else { format!("[{to}]:{to_port}") };
        // Writing to a string does not fail.
        let _ = writeln!(before, "  {family} daddr {at} {word} dport {port} dnat {family} to {to}");
        if *masquerade {
            let original =
                format!("meta l4proto {word} ct original {family} daddr {at} ct original proto-dst {port}");
            let _ = writeln!(after, "  {original} snat {family} to {own}");
        }
    }
    format!(
        "table inet translated {{\n chain before {{\n  type nat hook prerouting priority dstnat;\n{before} }}\n \
         chain after {{\n  type nat hook postrouting priority srcnat;\n{after} }}\n}}\n"
    )
}

/// Services, and packets through them. The dice are of these alone: a seed means the same packets before. `of` draws addresses and
/// ports; `policy` is that of [`elsewhere::policy`].
pub(super) fn stories(seed: u64, of: &Policy, policy: &Policy, mut tag: u32) -> (Vec<Service>, Vec<Sent>) {
    let mut dice = Dice::new(seed ^ 0x7472_616e_736c_6174);
    let (mut services, mut sent, mut used) = (Vec::new(), Vec::new(), HashSet::new());
    for number in 0..STORIES + REMOTE_STORIES {
        tag += 1;
        let (mut flow, protocol) = endpoints::flow(&mut dice, of);
        if number >= STORIES {
            flow.destination = elsewhere::remote(&mut dice, flow.source.is_ipv4());
            if elsewhere::is_cut_off(policy, flow.destination) {
                continue;
            }
        }
        let protocol = if protocol == Protocol::Udp { protocol } else { Protocol::Tcp };
        let Flow { source_port, destination_port, .. } = flow;
        let service = service(&mut dice, policy, flow, protocol);
        // Neither two services at a port, nor two flows that a masquerade would have to distinguish.
        let fresh = used.insert((service.at, service.port)) && used.insert((service.to.0, source_port));
        if source_port == 0 || destination_port == 0 || !fresh {
            continue;
        }
        let story = Story { policy, flow, service, tag, sent: &mut sent };
        if story.answers_to_a_node_port() || story.is_unattributed() {
            continue;
        }
        services.push(service);
        story.tell(&mut dice);
    }
    (services, sent)
}

fn service(dice: &mut Dice, policy: &Policy, flow: Flow, protocol: Protocol) -> Service {
    let v4 = flow.destination.is_ipv4();
    let own = local()[usize::from(!v4)];
    let low = dice.port();
    let nowhere = if v4 {
        let [high, low] = low.to_be_bytes();
        IpAddr::from([10, 96, high, low])
    } else {
        IpAddr::from([0xfd96, 0, 0, 0, 0, 0, 0, low])
    };
    let inbound = flow.from() == Side::Lan;
    let any = 1 + dice.port() % 65_535;
    let (at, port) = match (dice.below(5), &policy.node_ports) {
        // A port of the node, in the NodePort range or not.
        (0, _) if inbound => (own, any),
        (1 | 2, Some(node_ports)) if inbound => {
            let choices = [vec![node_ports.range], node_ports.allow.clone()].concat();
            let range = *dice.pick(&choices);
            (own, if dice.percent(50) { range.first } else { range.last })
        }
        _ => (nowhere, any),
    };
    Service {
        at,
        port,
        protocol,
        to: (flow.destination, flow.destination_port),
        masquerade: dice.percent(40),
    }
}

struct Story<'a> {
    policy: &'a Policy,
    /// From the client to the end behind the service.
    flow: Flow,
    service: Service,
    tag: u32,
    sent: &'a mut Vec<Sent>,
}

impl Story<'_> {
    /// The allow list of NodePorts decides about them; about all else the rules, by the client and the end behind.
    fn opens(&self) -> bool {
        let allowed = |packet: &reference::Packet| {
            reference::evaluate_model(self.policy, &local(), packet)
                .is_some_and(|(_, action)| action == Action::Allow)
        };
        if self.is_node_port() {
            return allowed(&self.asked(self.service.at, self.service.port));
        }
        let after = self.asked(self.service.to.0, self.service.to.1);
        reference::scope_model(self.policy, &local(), &after).is_none() || allowed(&after)
    }

    fn is_node_port(&self) -> bool {
        let before = self.asked(self.service.at, self.service.port);
        reference::scope_model(self.policy, &local(), &before) == Some(direction::NODE_PORT)
    }

    fn asked(&self, destination: IpAddr, destination_port: u16) -> reference::Packet {
        let protocol = if self.service.protocol == Protocol::Tcp { class::TCP } else { class::UDP };
        let Flow { source, source_port, .. } = self.flow;
        reference::Packet { source, destination, protocol, source_port, destination_port }
    }

    /// Whether the answers to a client that is no pod come to the node's own address at a port of the NodePort range. eBPF takes
    /// them for requests: see docs/parity.md.
    fn answers_to_a_node_port(&self) -> bool {
        let range = self.policy.node_ports.as_ref().map(|node_ports| node_ports.range);
        let port = self.flow.source_port;
        let within = self.policy.pods.iter().any(|network| network.contains(&self.flow.source));
        self.service.masquerade
            && self.flow.from() == Side::Pods
            && !within
            && range.is_some_and(|range| range.first <= port && port <= range.last)
    }

    /// Whether the client is no pod, comes from the pods' side, and asks for a pod of another node: no table knows it.
    fn is_unattributed(&self) -> bool {
        self.is_remote() && self.flow.from() == Side::Pods && !is_pod(self.policy, self.flow.source)
    }

    /// Whether the pod behind the service is of another node.
    fn is_remote(&self) -> bool {
        is_pod(self.policy, self.flow.destination) && side(self.flow.destination) != Side::Pods
    }

    /// The pod's own node judges the real peer, unless this one hides it.
    fn expected(&self) -> Expected {
        let opens = self.opens();
        if self.is_remote() && !self.service.masquerade && !self.is_node_port() {
            return Expected::differing(Difference::Relayed, true, opens);
        }
        opens.into()
    }

    /// The node's address where it hides the client's.
    fn seen_client(&self) -> IpAddr {
        let Flow { source, .. } = self.flow;
        if self.service.masquerade { local()[usize::from(source.is_ipv6())] } else { source }
    }

    fn mark(&self) -> Vec<u8> {
        let number = u32::try_from(self.sent.len()).unwrap_or_default();
        [self.tag.to_be_bytes(), number.to_be_bytes()].concat()
    }

    /// Sends a packet of the client, or of the end behind; `load` makes it between any addresses and ports.
    fn send(
        &mut self,
        label: &'static str,
        by_client: bool,
        expected: impl Into<Expected>,
        load: impl Fn(Packet, u16, u16) -> Packet,
    ) {
        let Flow { source, source_port, .. } = self.flow;
        let Service { at, port, to: (to, to_port), .. } = self.service;
        let seen = self.seen_client();
        let (sent, arrives) = if by_client {
            (
                load(Packet::new(source, at), source_port, port),
                load(Packet::new(seen, to), source_port, to_port),
            )
        } else {
            (
                load(Packet::new(to, seen), to_port, source_port),
                load(Packet::new(at, source), port, source_port),
            )
        };
        let from = if by_client { side(source) } else { side(to) };
        self.sent.push(Sent {
            label,
            from,
            packets: vec![sent],
            arrives: Some(arrives),
            expected: expected.into(),
        });
    }

    fn tell(mut self, dice: &mut Dice) {
        let expected = self.expected();
        match self.service.protocol {
            Protocol::Tcp => self.tcp(dice, expected),
            _ => self.udp(expected),
        }
    }

    fn tcp(&mut self, dice: &mut Dice, expected: Expected) {
        let (mine, theirs) = (self.tag << 12, !(self.tag << 12));
        let syn = |packet: Packet, a, b| {
            let mut syn = Tcp::syn(a, b);
            syn.header.sequence_number = mine;
            packet.tcp(syn)
        };
        self.send("SYN to a service", true, expected, syn);
        if !expected.passes_all() {
            return;
        }
        self.send("SYN ACK of a service", false, true, |packet, a, b| {
            let mut syn_ack = Tcp::syn_ack(a, b);
            syn_ack.header.sequence_number = theirs;
            syn_ack.header.acknowledgment_number = mine.wrapping_add(1);
            packet.tcp(syn_ack)
        });
        let (mut mine, mut theirs) = (mine.wrapping_add(1), theirs.wrapping_add(1));
        let ack = move |packet: Packet, a, b| packet.tcp(Tcp::ack(a, b, mine, theirs));
        self.send("ACK to a service", true, true, ack);
        for _ in 0..1 + dice.below(3) {
            let mark = self.mark();
            let data = |packet: Packet, a, b| packet.tcp(Tcp::ack(a, b, mine, theirs).payload(&mark));
            self.send("data to a service", true, true, data);
            mine = mine.wrapping_add(8);
            let mark = self.mark();
            let data = |packet: Packet, a, b| packet.tcp(Tcp::ack(a, b, theirs, mine).payload(&mark));
            self.send("data of a service", false, true, data);
            theirs = theirs.wrapping_add(8);
        }
    }

    fn udp(&mut self, expected: Expected) {
        for turn in 0..2 {
            let mark = self.mark();
            self.send("question to a service", true, expected, |packet, a, b| packet.udp(a, b, &mark));
            if !expected.passes_all() {
                return;
            }
            let mark = self.mark();
            let label = if turn == 0 { "answer of a service" } else { "another answer of a service" };
            self.send(label, false, true, |packet, a, b| packet.udp(a, b, &mark));
        }
    }
}
