//! Questions about one packet and about one address.

use std::net::IpAddr;

use bridge_agent::model::{Direction, Protocol, Rule};
use bridge_common::filter::{
    counters::Reason,
    policy::direction::{INBOUND, OUTBOUND},
};
use ipnet::IpNet;

use super::{
    flow::{End, Key},
    header::{self, Content, Header, IcmpKind, SCTP, TCP, UDP},
};
use crate::prog::TUNNELS;

/// Why a packet is denied before its addresses mean anything.
pub(super) fn unreadable(header: &Header) -> Option<Reason> {
    if header.content == Content::Unreadable {
        Some(Reason::malformed_ip)
    } else if is_mapped(header.source) || is_mapped(header.destination) {
        Some(Reason::spoofed)
    } else {
        None
    }
}

/// Whether it is an outer packet of a tunnel.
pub(super) fn is_for_tunnel(header: &Header) -> bool {
    let port = header.ports.filter(|_| header.protocol == UDP).map_or(0, |(_, port)| port);
    header.content != Content::MalformedIp && TUNNELS.contains(&(header.protocol, port))
}

/// Whether it is an IPv6 address that stands for an IPv4 address.
pub(super) fn is_mapped(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some())
}

pub(super) fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// Whether packets to an address stay on their link: link-local, multicast, broadcast.
pub(super) fn stays_on_link(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_multicast() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.is_multicast(),
    }
}

/// Whether a packet's own ports name its flow.
pub(super) fn names_flow(header: &Header) -> bool {
    match &header.content {
        Content::Tcp(segment) => header::flags_make_sense(segment.flags),
        Content::Udp | Content::Sctp(_) | Content::Other => true,
        Content::Icmp { kind, .. } => matches!(kind, IcmpKind::Query | IcmpKind::Reply),
        _ => false,
    }
}

/// Why a packet cannot open a flow.
pub(super) fn no_opening(header: &Header) -> Option<Reason> {
    match &header.content {
        Content::Tcp(segment) if !segment.is_syn() => Some(Reason::not_syn),
        Content::Sctp(chunk) if !chunk.is_init() => Some(Reason::not_init),
        Content::Icmp { kind: IcmpKind::Reply, .. } => Some(Reason::icmp_unsolicited),
        _ => None,
    }
}

/// Where a packet comes from, and its flow: ICMP queries have their identifier for both ports.
pub(super) fn flow_of(header: &Header) -> (End, Key) {
    let ports = match &header.content {
        Content::Icmp { identifier, .. } => (*identifier, *identifier),
        _ => header.ports.unwrap_or_default(),
    };
    let (source, destination) = ((header.source, ports.0), (header.destination, ports.1));
    (source, Key::new(source, destination, header.protocol))
}

pub(super) fn matches(rule: &Rule, header: &Header, direction: u8) -> bool {
    let (asked, external, pod) = match rule.direction {
        Direction::Inbound => (INBOUND, header.source, header.destination),
        Direction::Outbound => (OUTBOUND, header.destination, header.source),
    };
    let side =
        |named: &Option<Vec<IpNet>>, address| named.as_ref().is_none_or(|nets| contains(nets, address));
    let with_ports = matches!(header.protocol, TCP | UDP | SCTP);
    let names_ports = !rule.ports.is_empty() || !rule.source_ports.is_empty();
    let protocol = match rule.protocol {
        Protocol::Tcp => header.protocol == TCP,
        Protocol::Udp => header.protocol == UDP,
        Protocol::Sctp => header.protocol == SCTP,
        Protocol::Icmp => matches!(header.content, Content::Icmp { .. }),
        Protocol::Any => with_ports || !names_ports,
    };
    let (source_port, destination_port) = header.ports.unwrap_or_default();
    let port = |ranges: &[bridge_agent::model::PortRange], port| {
        ranges.is_empty() || ranges.iter().any(|range| range.first <= port && port <= range.last)
    };
    asked == direction
        && protocol
        && side(&rule.external, external)
        && side(&rule.pods, pod)
        && port(&rule.ports, destination_port)
        && port(&rule.source_ports, source_port)
}

pub(super) fn contains(networks: &[IpNet], address: IpAddr) -> bool {
    networks.iter().any(|network| network.contains(&address))
}
