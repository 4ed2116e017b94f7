//! The verdict of the program at one hook on one packet, from the policy and the state of the node. Pure.
//!
//! Follows `docs/decisions/0012-complete-mediation.md` for packets that open a flow, or belong to one. `cargo xtask model`
//! compares every result with the programs.

use std::net::IpAddr;

use bridge_common::filter::{
    address::Address,
    counters::Reason,
    flow::{Flow, FlowKey, flag},
    policy::{class, direction},
};

use crate::{
    model::{Action, Direction, Hook, Policy},
    policy::reference,
};

pub(crate) use bridge_common::protocol as ip;

/// The meaning of a packet to its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// May open a flow: a SYN, an INIT, a datagram, an ICMP query.
    Opening,
    /// A TCP segment that is no SYN, an SCTP packet that is no INIT, an ICMP reply.
    Following,
}

/// A packet with a readable header, and no fragment but the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Host byte order; for ICMP the identifier, 0 where the protocol has neither.
    pub source_port: u16,
    /// As [`Packet::source_port`].
    pub destination_port: u16,
    /// See [`Kind`].
    pub kind: Kind,
}

impl Packet {
    /// Whether it is ICMP of its own IP version; the other is read as a protocol without ports.
    fn is_icmp(&self) -> bool {
        matches!((self.protocol, self.source), (ip::ICMP, IpAddr::V4(_)) | (ip::ICMPV6, IpAddr::V6(_)))
    }

    /// Whether its protocol has ports.
    #[must_use]
    pub fn has_ports(&self) -> bool {
        reference::has_ports(self.class())
    }

    /// Returns the key of its flow, and the end that its source is.
    #[must_use]
    pub fn flow_key(&self) -> (FlowKey, u8) {
        let (source, destination) = (Address::from(self.source), Address::from(self.destination));
        let [source_port, destination_port] = [self.source_port, self.destination_port].map(u16::to_be_bytes);
        FlowKey::new(&source, source_port, &destination, destination_port, self.protocol)
    }

    fn class(&self) -> usize {
        match self.protocol {
            ip::TCP => class::TCP,
            ip::UDP => class::UDP,
            ip::SCTP => class::SCTP,
            _ if self.is_icmp() => class::ICMP,
            _ => class::OTHER,
        }
    }

    /// Returns the packet as rules see it.
    #[must_use]
    pub fn for_rules(&self) -> reference::Packet {
        let port = |port| if self.has_ports() { port } else { 0 };
        reference::Packet {
            source: self.source,
            destination: self.destination,
            protocol: self.class(),
            source_port: port(self.source_port),
            destination_port: port(self.destination_port),
        }
    }
}

/// The two tables of flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowTable {
    /// Flows that both sides have confirmed.
    Established,
    /// Flows that wait for a reply.
    HalfOpen,
}

/// An entry of a flow table that has not expired, and that the mode lets packets use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownFlow {
    /// Whether the source of the packet has opened it.
    pub by_source: bool,
    /// One of [`direction`].
    pub direction: u8,
    /// Would have been denied.
    pub audit: bool,
    /// No rule restricts it.
    pub unrestricted: bool,
    /// Index of the pod's interface; 0: unknown.
    pub interface: u32,
}

impl KnownFlow {
    /// Returns an entry of a flow table as the packet sees it whose source is this end.
    #[must_use]
    pub const fn new(flow: &Flow, end_of_source: u8) -> Self {
        Self {
            by_source: flow.initiator == end_of_source,
            direction: flow.direction,
            audit: flow.flags & flag::AUDIT != 0,
            unrestricted: flow.flags & flag::UNRESTRICTED != 0,
            interface: flow.interface,
        }
    }

    /// Whether the source of the packet is its LAN host.
    const fn is_from_lan(&self) -> bool {
        self.by_source == (self.direction != direction::OUTBOUND)
    }
}

/// The state of a node that a verdict depends on.
pub trait NodeState {
    /// Returns the index of the interface that leads to a pod of this node; `None`: the address is not such a pod.
    fn hosted(&self, pod: IpAddr) -> Option<u32>;
    /// Whether the route to `source` leaves by `interface`, and, of a LAN interface, the packet comes from its next hop.
    fn leads_to(&self, source: IpAddr, interface: u32) -> bool;
    /// Whether an interface leads to the LAN.
    fn is_external(&self, interface: u32) -> bool;
    /// Whether a tunnel of the node receives such outer packets.
    fn has_tunnel(&self, protocol: u8, port: u16) -> bool;
    /// Returns the flow of a packet, if it is usable.
    fn flow(&self, table: FlowTable, packet: &Packet) -> Option<KnownFlow>;
    /// Whether the control group of a pod is hooked for the port pool, since the pod has the annotation.
    fn is_pooled(&self, _pod: IpAddr) -> bool {
        false
    }
}

/// The mark of an earlier hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// No hook has seen the packet.
    None,
    /// Fully judged.
    Judged,
    /// From a believed node, or a pod of another node.
    Cluster,
    /// Let in on a NodePort.
    Admitted,
    /// Came from this address, which may have been translated since.
    Origin(IpAddr),
}

/// Where a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The program.
    pub hook: Hook,
    /// Index of the interface that the packet came in by; 0: the node itself sends it.
    pub input: u32,
    /// The mark that it has there.
    pub mark: Mark,
}

/// The verdict at a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Passes unjudged, with this mark.
    Unjudged(Mark),
    /// Passes unjudged, and its flow is followed so that the answers pass.
    Followed(Mark),
    /// Belongs to a known flow.
    Known(KnownFlow),
    /// A packet of a TCP or SCTP handshake: its sequence numbers, or its verification tag, decide.
    Handshake(KnownFlow),
    /// A rule allows it: direction and index of the rule. One beyond the rules stands for `nodePorts.allow`.
    Allowed(u8, u32),
    /// Denied: direction, reason, and the rule that denies.
    Denied(u8, Reason, Option<u32>),
}

/// The place of an address in the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Of this node.
    Local,
    /// Of another node.
    Node,
    /// In `networks.pods`.
    Pod,
    /// In `networks.external`.
    External,
    /// Any other.
    Foreign,
}

/// A row of a hook's decision table.
enum Row {
    Pass(Mark),
    Follow(Mark),
    Deny(u8, Reason),
    /// By the rules of this direction, between these two.
    Judge {
        direction: u8,
        external: Option<IpAddr>,
        pod: IpAddr,
    },
}

/// Whose packet it is at an egress hook.
enum Sender {
    Cluster,
    Pod(IpAddr),
    /// `None`: foreign.
    Peer(Option<IpAddr>),
    Spoofed,
    Unknown,
}

/// Judges packets.
#[derive(Clone, Copy)]
pub struct Judge<'a> {
    /// The active policy.
    pub policy: &'a Policy,
    /// The addresses of this node.
    pub local: &'a [IpAddr],
    /// The rest of its state.
    pub state: &'a dyn NodeState,
}

impl Judge<'_> {
    /// Returns the class of an address.
    #[must_use]
    pub fn class(&self, address: IpAddr) -> Class {
        let in_one = |networks: &[ipnet::IpNet]| networks.iter().any(|network| network.contains(&address));
        if self.local.contains(&address) {
            Class::Local
        } else if in_one(&self.policy.nodes) {
            Class::Node
        } else if in_one(&self.policy.pods) {
            Class::Pod
        } else if in_one(&self.policy.external) {
            Class::External
        } else {
            Class::Foreign
        }
    }

    /// Judges a packet at a hook.
    #[must_use]
    pub fn judge(&self, place: Place, packet: &Packet) -> Outcome {
        match place.hook {
            Hook::ExternalIngress => self.ingress(packet, place.input, true),
            Hook::InternalIngress => self.ingress(packet, place.input, false),
            Hook::InternalEgress => self.egress(packet, place, true),
            Hook::ExternalEgress => self.egress(packet, place, false),
        }
    }

    fn ingress(&self, packet: &Packet, interface: u32, from_lan: bool) -> Outcome {
        let row = if from_lan {
            self.external_ingress(packet, interface)
        } else {
            self.internal_ingress(packet, interface)
        };
        let established = self.state.flow(FlowTable::Established, packet);
        let half_open = self.state.flow(FlowTable::HalfOpen, packet);
        // The interface of the flow proves the source.
        let of_interface = !from_lan && established.is_some_and(|flow| flow.interface == interface);
        if (of_interface || !matches!(row, Row::Deny(..)))
            && let Some(flow) = established.filter(|flow| flow.is_from_lan() == from_lan)
            && let Some(outcome) = goes_on(packet, flow, half_open)
        {
            return outcome;
        }
        match row {
            Row::Pass(mark) => Outcome::Unjudged(mark),
            Row::Follow(mark) => Outcome::Followed(mark),
            Row::Deny(direction, reason) => Outcome::Denied(direction, reason, None),
            Row::Judge { direction, external, pod } => {
                match half_open.and_then(|flow| answers(packet, flow)) {
                    Some(Ok(outcome)) => outcome,
                    Some(Err(reason)) => Outcome::Denied(direction, reason, None),
                    None => self.open(packet, direction, external, pod),
                }
            }
        }
    }

    fn egress(&self, packet: &Packet, Place { input, mark, .. }: Place, to_pod: bool) -> Outcome {
        if mark == Mark::Judged {
            return Outcome::Unjudged(mark);
        }
        let half_open = self.state.flow(FlowTable::HalfOpen, packet);
        if to_pod || input != 0 || self.is_node_port(packet, packet.source_port) {
            let established = self.state.flow(FlowTable::Established, packet);
            if let Some(flow) = established.filter(|flow| flow.is_from_lan() == to_pod)
                && let Some(outcome) = goes_on(packet, flow, half_open)
            {
                return outcome;
            }
            if let Some(flow) = half_open
                && let Some(answer) = answers(packet, flow)
            {
                // Also one that cannot be an answer is left to its receiver here.
                return answer.unwrap_or(Outcome::Known(flow));
            }
        }
        if input == 0 || mark == Mark::Admitted {
            return Outcome::Unjudged(Mark::Judged);
        }
        let row = if to_pod {
            self.internal_egress(packet, input, mark)
        } else {
            self.external_egress(packet, input, mark)
        };
        match row {
            Row::Pass(_) | Row::Follow(_) => Outcome::Unjudged(Mark::Judged),
            Row::Deny(direction, reason) => Outcome::Denied(direction, reason, None),
            Row::Judge { direction, external, pod } => self.open(packet, direction, external, pod),
        }
    }

    fn external_ingress(&self, packet: &Packet, interface: u32) -> Row {
        use direction::{INBOUND, NODE_PORT};
        if is_mapped(packet) {
            return Row::Deny(INBOUND, Reason::spoofed);
        }
        let source = self.class(packet.source);
        let for_tunnel = self.is_for_tunnel(packet);
        let external = match source {
            _ if for_tunnel && source != Class::Node => return Row::Deny(INBOUND, Reason::spoofed),
            Class::Local => return Row::Deny(INBOUND, Reason::spoofed),
            Class::Pod | Class::Node if self.state.leads_to(packet.source, interface) => {
                return Row::Pass(Mark::Cluster);
            }
            Class::Pod => return Row::Deny(INBOUND, Reason::spoofed),
            Class::External => Some(packet.source),
            Class::Node | Class::Foreign => None,
        };
        let destination = self.class(packet.destination);
        let pod = packet.destination;
        let mark = Mark::Origin(packet.source);
        if destination == Class::Pod {
            return match self.state.hosted(pod) {
                Some(_) => Row::Judge { direction: INBOUND, external, pod },
                None => Row::Pass(mark),
            };
        }
        if for_tunnel {
            return Row::Deny(INBOUND, Reason::spoofed);
        }
        let to_node = destination == Class::Local || is_link_local(packet.destination);
        if to_node && external.is_some() && self.is_node_port(packet, packet.destination_port) {
            return Row::Judge { direction: NODE_PORT, external, pod };
        }
        Row::Pass(mark)
    }

    /// Whether a packet to a node is for a tunnel: the packet inside would be believed, so that only nodes may send it.
    fn is_for_tunnel(&self, packet: &Packet) -> bool {
        let outer_port = if packet.protocol == ip::UDP { packet.destination_port } else { 0 };
        let to_node = matches!(self.class(packet.destination), Class::Local | Class::Node);
        (to_node || is_link_local(packet.destination)) && self.state.has_tunnel(packet.protocol, outer_port)
    }

    fn internal_ingress(&self, packet: &Packet, interface: u32) -> Row {
        use direction::OUTBOUND;
        let Packet { source, destination, .. } = *packet;
        if is_mapped(packet) {
            return Row::Deny(OUTBOUND, Reason::spoofed);
        }
        if self.class(source) != Class::Node && self.is_for_tunnel(packet) {
            return Row::Deny(OUTBOUND, Reason::spoofed);
        }
        if source.is_unspecified() || is_link_local(source) {
            return Row::Pass(Mark::Judged);
        }
        let leads_here = match self.state.hosted(source) {
            Some(hosted) => hosted == interface,
            None => self.state.leads_to(source, interface),
        };
        if !leads_here {
            return Row::Deny(OUTBOUND, Reason::spoofed);
        }
        if self.class(source) != Class::Pod {
            return Row::Pass(Mark::Judged);
        }
        match self.class(destination) {
            Class::External => Row::Judge { direction: OUTBOUND, external: Some(destination), pod: source },
            Class::Pod => Row::Pass(Mark::Judged),
            Class::Node => Row::Pass(Mark::Origin(source)),
            _ if stays_on_link(destination) => Row::Pass(Mark::Judged),
            Class::Local | Class::Foreign => Row::Follow(Mark::Origin(source)),
        }
    }

    /// Returns the sender of a packet by its mark, else by its source address.
    fn sender(&self, packet: &Packet, input: u32, mark: Mark) -> Sender {
        let peer = |address| match self.class(address) {
            Class::External => Sender::Peer(Some(address)),
            Class::Pod => Sender::Pod(address),
            _ => Sender::Peer(None),
        };
        match mark {
            Mark::Cluster | Mark::Admitted => return Sender::Cluster,
            Mark::Origin(address) => return peer(address),
            Mark::None | Mark::Judged => {}
        }
        let leads_there =
            || self.state.hosted(packet.source) == Some(input) || self.state.leads_to(packet.source, input);
        match self.class(packet.source) {
            Class::Local => Sender::Unknown,
            Class::Node if leads_there() => Sender::Cluster,
            Class::Pod if !leads_there() => Sender::Spoofed,
            _ => peer(packet.source),
        }
    }

    fn internal_egress(&self, packet: &Packet, input: u32, mark: Mark) -> Row {
        use direction::INBOUND;
        let pod = packet.destination;
        if is_mapped(packet) {
            return Row::Deny(INBOUND, Reason::spoofed);
        }
        if self.class(pod) != Class::Pod {
            return Row::Pass(Mark::Judged);
        }
        match self.sender(packet, input, mark) {
            Sender::Cluster | Sender::Pod(_) => Row::Pass(Mark::Judged),
            Sender::Peer(external) => Row::Judge { direction: INBOUND, external, pod },
            Sender::Spoofed => Row::Deny(INBOUND, Reason::spoofed),
            Sender::Unknown => Row::Deny(INBOUND, Reason::unattributed),
        }
    }

    fn external_egress(&self, packet: &Packet, input: u32, mark: Mark) -> Row {
        use direction::{INBOUND, OUTBOUND};
        let destination = packet.destination;
        if is_mapped(packet) {
            return Row::Deny(INBOUND, Reason::spoofed);
        }
        match self.class(destination) {
            Class::External => match self.sender(packet, input, mark) {
                // Pods of other nodes in transit were judged by theirs.
                Sender::Pod(pod) if !self.state.is_external(input) => {
                    Row::Judge { direction: OUTBOUND, external: Some(destination), pod }
                }
                _ => Row::Pass(Mark::Judged),
            },
            Class::Pod if self.class(packet.source) == Class::Local => {
                match self.sender(packet, input, mark) {
                    Sender::Cluster | Sender::Pod(_) => Row::Pass(Mark::Judged),
                    Sender::Peer(external) => Row::Judge { direction: INBOUND, external, pod: destination },
                    Sender::Spoofed => Row::Deny(INBOUND, Reason::spoofed),
                    Sender::Unknown => Row::Deny(INBOUND, Reason::unattributed),
                }
            }
            _ => Row::Pass(Mark::Judged),
        }
    }

    fn is_node_port(&self, packet: &Packet, port: u16) -> bool {
        let range = self.policy.node_ports.as_ref().map(|node_ports| node_ports.range);
        packet.has_ports() && range.is_some_and(|range| range.contains(port))
    }

    /// Judges a packet that may open a flow.
    fn open(&self, packet: &Packet, direction: u8, external: Option<IpAddr>, pod: IpAddr) -> Outcome {
        let denied = |reason, rule| Outcome::Denied(direction, reason, rule);
        if packet.kind == Kind::Following {
            return match packet.protocol {
                ip::TCP => denied(Reason::not_syn, None),
                ip::SCTP => denied(Reason::not_init, None),
                _ => denied(Reason::icmp_unsolicited, None),
            };
        }
        let Some(external) = external else { return denied(Reason::no_rule, None) };
        let winner = match direction {
            direction::NODE_PORT => {
                let allow = self.policy.node_ports.iter().flat_map(|node_ports| &node_ports.allow);
                let index = u32::try_from(self.policy.rules.len()).unwrap_or(u32::MAX);
                let allowed = allow.copied().any(|range| range.contains(packet.destination_port));
                allowed.then_some((index, Action::Allow))
            }
            direction => {
                let direction =
                    if direction == direction::INBOUND { Direction::Inbound } else { Direction::Outbound };
                reference::winner(&self.policy.rules, direction, external, pod, &packet.for_rules())
            }
        };
        match winner {
            None => denied(Reason::no_rule, None),
            Some((rule, Action::Deny)) => denied(Reason::deny_rule, Some(rule)),
            Some((rule, Action::Allow)) => Outcome::Allowed(direction, rule),
        }
    }
}

/// Returns the outcome for a packet of a flow in the established table. `None`: it is judged as if there were none.
fn goes_on(packet: &Packet, flow: KnownFlow, half_open: Option<KnownFlow>) -> Option<Outcome> {
    match (packet.protocol, packet.kind) {
        // Each asks for a connection of its own.
        (ip::TCP | ip::SCTP, Kind::Opening) => None,
        // Beside a new connection of the same ports, its numbers decide which of the two it belongs to.
        (ip::TCP | ip::SCTP, Kind::Following) if half_open.is_some() => Some(Outcome::Handshake(flow)),
        _ if packet.is_icmp() && (packet.kind == Kind::Opening) != flow.by_source => None,
        _ => Some(Outcome::Known(flow)),
    }
}

/// Returns the outcome for a packet of a flow in the half-open table, or why it cannot be one of it. `None`: it is judged as if
/// there were none.
fn answers(packet: &Packet, flow: KnownFlow) -> Option<Result<Outcome, Reason>> {
    match (packet.protocol, packet.kind) {
        (ip::TCP | ip::SCTP, Kind::Opening) => None,
        (ip::TCP | ip::SCTP, Kind::Following) => Some(Ok(Outcome::Handshake(flow))),
        _ if packet.is_icmp() && packet.kind == Kind::Opening && !flow.by_source => None,
        _ if packet.is_icmp() && packet.kind == Kind::Following && flow.by_source => {
            Some(Err(Reason::icmp_unsolicited))
        }
        _ if flow.by_source => None,
        _ => Some(Ok(Outcome::Known(flow))),
    }
}

/// Whether a denied packet is answered with an RST or an ICMP error: it is plain, and no RST itself. `rejects`: `onDeny` is
/// `reject`, not `drop`.
#[must_use]
pub fn is_rejected(packet: &Packet, hook: Hook, reason: Reason, rejects: bool) -> bool {
    rejects
        && matches!(hook, Hook::ExternalIngress | Hook::InternalIngress)
        && matches!(packet.protocol, ip::TCP | ip::UDP)
        && reason != Reason::spoofed
}

/// Whether one end is an IPv6 address that stands for an IPv4 address.
fn is_mapped(packet: &Packet) -> bool {
    let mapped = |address| matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
    mapped(packet.source) || mapped(packet.destination)
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// Whether packets to an address stay on their link: link-local, multicast, broadcast.
fn stays_on_link(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_multicast() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.is_multicast(),
    }
}
