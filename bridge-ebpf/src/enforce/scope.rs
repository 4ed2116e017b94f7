//! Whether a packet is judged, in which direction, and as whose: by its interface first, then by its addresses. See
//! `docs/decisions/0012-complete-mediation.md`, whose tables these functions are.

use aya_ebpf::bindings::__sk_buff;
use bridge_common::filter::{
    address::Address,
    control::Settings,
    counters::Reason,
    flow::flag,
    interface::{Interface, family, role, tunnel},
    policy::{AddressInfo, direction, side},
};
use bridge_ebpf::protocol;

use crate::{
    active::Active,
    addresses::{lookup, lookup_cached},
    fib::{DIRECT, FROM_NEXT_HOP, TO_SOURCE, route_of},
    hook::Hook,
    maps::{HOSTED, INTERFACES, ORIGINS, Scratch, TUNNELS, scratch},
    mark,
    packet::{Kind, Packet},
    sides::{SETTLED, Sides},
};

/// The packet passes unjudged.
pub(crate) const PASS: u32 = 0;
/// The packet is judged.
pub(crate) const JUDGE: u32 = 1;
/// The source does not belong to the interface.
pub(crate) const SPOOFED: u32 = 2;
/// The packet passes, and its flow is followed, so that the answers pass.
pub(crate) const FOLLOW: u32 = 3;
/// The source was translated and is unknown.
pub(crate) const UNATTRIBUTED: u32 = 4;

/// Returns the index of the interface that leads to a pod of this node; 0: none is known to the agent.
#[inline(always)]
pub(crate) fn hosted(address: &Address) -> u32 {
    // SAFETY: only copied.
    unsafe { HOSTED.get(address) }.copied().unwrap_or(0)
}

/// Whether an address means something on one link only, so that the kernel forwards no packet from it: link-local (RFC
/// 4291, 2.5.6) and unspecified.
#[inline(always)]
fn stays_on_link(address: &Address, version: u8) -> bool {
    let (high, low) = address.halves();
    if version == 4 { low as u32 == 0 } else { high >> 54 == 0x3fa || (high == 0 && low == 0) }
}

/// Whether an IPv6 address is link-local (RFC 4291, 2.5.6).
#[inline(always)]
fn is_link_local(address: &Address, version: u8) -> bool {
    version == 6 && address.halves().0 >> 54 == 0x3fa
}

/// Whether packets to a destination stay on their link: link-local, multicast, broadcast.
#[inline(always)]
fn is_for_link(address: &Address, version: u8) -> bool {
    let (high, low) = address.halves();
    let first = low as u32;
    if version == 4 {
        first >> 28 == 0xe || first >> 16 == 0xa9fe || first == u32::MAX
    } else {
        high >> 54 == 0x3fa || high >> 56 == 0xff
    }
}

/// Whether the source of the packet of [`scratch`] leads to the interface that it came in by.
#[inline(always)]
pub(crate) fn leads_here(skb: *mut __sk_buff, packet: &Packet) -> bool {
    // SAFETY: the context is valid while the program runs.
    let ifindex = unsafe { (*skb).ifindex };
    let known = hosted(&packet.source);
    if known != 0 {
        return known == ifindex;
    }
    // SAFETY: only read.
    let Some(interface) = (unsafe { INTERFACES.get(&ifindex) }) else { return false };
    if interface.upper == 0 {
        return routes_to_source(skb, packet, ifindex);
    }
    // A port of a bridge, whose pod the agent does not know yet. The routing table names the bridge only; the neighbour
    // table has the pod's link layer address.
    interface.bound & family_of(packet) == 0
        && (is_neighbour_discovery(packet) || is_of_next_hop(skb, interface.upper))
}

/// Returns the bit of [`family`] of a packet.
#[inline(always)]
fn family_of(packet: &Packet) -> u32 {
    if packet.version == 4 { family::V4 } else { family::V6 }
}

/// Whether the route to the source of the packet of [`scratch`] leaves by `input`, or by a gateway whose packets a program
/// of the network plugin brings to `input`: the tunnel to pods of other nodes, or the interface of a pod that the agent does
/// not know yet.
#[inline(always)]
fn routes_to_source(skb: *mut __sk_buff, packet: &Packet, input: u32) -> bool {
    let out = route_of(skb, input, TO_SOURCE);
    // SAFETY: only read.
    let interface = |index: u32| unsafe { INTERFACES.get(&index) };
    let is_behind = |input: &Interface| {
        input.tunnel != 0 || (input.role == role::INTERNAL && input.bound & family_of(packet) == 0)
    };
    out == input
        || interface(out).is_some_and(|out| out.role == role::GATEWAY)
            && interface(input).is_some_and(is_behind)
}

/// Whether a packet is of neighbour discovery (RFC 4861): no router forwards it, and receivers take none that a router has
/// forwarded.
#[inline(always)]
fn is_neighbour_discovery(packet: &Packet) -> bool {
    let [_, _, _, hop_limit] = packet.head[1].to_ne_bytes();
    packet.version == 6
        && packet.protocol == protocol::ICMPV6
        && packet.kind != Kind::LaterFragment
        && (133..=136).contains(&packet.detail)
        && hop_limit == 255
}

/// Returns the index of the bridge that an interface is a port of; 0: none.
#[inline(always)]
fn bridge_of(ifindex: u32) -> u32 {
    // SAFETY: only read.
    unsafe { INTERFACES.get(&ifindex) }.map_or(0, |interface| interface.upper)
}

/// Whether an interface is the inner side of a tunnel.
#[inline(always)]
fn is_tunnel(ifindex: u32) -> bool {
    // SAFETY: only read.
    unsafe { INTERFACES.get(&ifindex) }.is_some_and(|interface| interface.tunnel != 0)
}

/// Whether the route to the source of the packet of [`scratch`] leaves by `interface`, and the packet comes from its next
/// hop.
#[inline(always)]
fn is_of_next_hop(skb: *mut __sk_buff, interface: u32) -> bool {
    route_of(skb, interface, TO_SOURCE | FROM_NEXT_HOP) == interface
}

/// Finds the sides of the packet of [`scratch`], and what is to become of it: [`PASS`], [`JUDGE`], ...
///
/// A subprogram, as `judge::judge_unknown`.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn find(skb: *mut __sk_buff, slot: u32, hook: u32, mark: u32) -> u32 {
    let Some(Scratch { packet, sides, .. }) = scratch() else { return PASS };
    let Some(active) = Active::of_slot(slot, 0) else { return PASS };
    sides.mark = mark::NONE;
    sides.interface = 0;
    sides.flags = 0;
    // IPv4-mapped addresses, or addresses that cannot be read.
    let unreadable = packet.is_unreadable();
    if unreadable || packet.problem as u8 == Reason::spoofed as u8 {
        sides.direction = if hook == Hook::INTERNAL_INGRESS {
            u32::from(direction::OUTBOUND)
        } else {
            u32::from(direction::INBOUND)
        };
        return if unreadable { JUDGE } else { SPOOFED };
    }
    match hook {
        Hook::EXTERNAL_INGRESS => external_ingress(skb, &active, packet, sides),
        Hook::INTERNAL_INGRESS => internal_ingress(skb, &active, packet, sides),
        Hook::INTERNAL_EGRESS => internal_egress(skb, &active, packet, sides, mark),
        _ => external_egress(skb, &active, packet, sides, mark),
    }
}

#[inline(always)]
fn external_ingress(skb: *mut __sk_buff, active: &Active, packet: &Packet, sides: &mut Sides) -> u32 {
    // SAFETY: the context is valid while the program runs.
    let ifindex = unsafe { (*skb).ifindex };
    let source = lookup_cached(active, &packet.source, packet.version);
    let destination = lookup_cached(active, &packet.destination, packet.version);
    sides.direction = u32::from(direction::INBOUND);
    let generation = active.settings.generation;
    // Rules can allow no other side than `side::EXTERNAL`.
    sides.external = source;
    sides.mark = mark::FOREIGN;
    let to_node = destination.side == side::LOCAL || is_link_local(&packet.destination, packet.version);
    let for_tunnel = (to_node || destination.side == side::NODE) && enters_tunnel(packet);
    if for_tunnel && source.side != side::NODE {
        return SPOOFED;
    }
    match source.side {
        side::LOCAL => return SPOOFED,
        // The table of hosted addresses is cheaper to ask than the routing table.
        side::POD if hosted(&packet.source) != 0 => return SPOOFED,
        side::POD | side::NODE => {
            let upper = bridge_of(ifindex);
            // A node may send through a tunnel with its LAN address. Who may send into the tunnel was checked outside of it.
            if source.side == side::NODE && is_tunnel(ifindex) {
                sides.mark = mark::CLUSTER;
                return PASS;
            }
            if is_of_next_hop(skb, if upper == 0 { ifindex } else { upper })
                || (is_tunnel(ifindex) && routes_to_source(skb, packet, ifindex))
            {
                sides.mark = mark::CLUSTER;
                return PASS;
            }
            if source.side == side::POD {
                return SPOOFED;
            }
        }
        side::EXTERNAL => sides.mark = mark::of_origin(&source, generation),
        _ => {}
    }
    sides.internal = destination;
    if is_neighbour_discovery(packet) && bridge_of(ifindex) != 0 {
        // Between a host and a pod on one segment.
        sides.mark = mark::JUDGED;
        return PASS;
    }
    if destination.side == side::POD {
        sides.interface = hosted(&packet.destination);
        if sides.interface == 0 {
            let out = route_of(skb, ifindex, 0);
            // SAFETY: only copied.
            let leads_to_pods = match unsafe { INTERFACES.get(&out) } {
                Some(interface) => interface.role != role::EXTERNAL,
                // A new pod of this node, whose interface has no programs yet.
                None => out != 0 && route_of(skb, ifindex, DIRECT) == out,
            };
            if !leads_to_pods {
                return PASS;
            }
            sides.interface = out;
        } else if source.side != side::NODE {
            // A node's address that comes by another way than the node's own is a foreign one, as long as that is the way.
            sides.flags = SETTLED;
        }
        return JUDGE;
    }
    // In the name of a node, by a way that is not the node's.
    if for_tunnel {
        return SPOOFED;
    }
    if to_node
        && source.side == side::EXTERNAL
        && is_node_port(active.settings, packet, packet.destination_port)
    {
        sides.direction = u32::from(direction::NODE_PORT);
        return JUDGE;
    }
    PASS
}

#[inline(always)]
fn internal_ingress(skb: *mut __sk_buff, active: &Active, packet: &Packet, sides: &mut Sides) -> u32 {
    sides.direction = u32::from(direction::OUTBOUND);
    sides.mark = mark::JUDGED;
    let source = lookup(active.slot, &packet.source, packet.version);
    let destination = lookup(active.slot, &packet.destination, packet.version);
    let to_node = matches!(destination.side, side::LOCAL | side::NODE)
        || is_link_local(&packet.destination, packet.version);
    if to_node && source.side != side::NODE && enters_tunnel(packet) {
        return SPOOFED;
    }
    if stays_on_link(&packet.source, packet.version) {
        return PASS;
    }
    if !leads_here(skb, packet) {
        return SPOOFED;
    }
    if source.side != side::POD {
        // Routed to an interface of pods, but not in their networks: out of scope, unless it answers for a NodePort.
        sides.mark = mark::NONE;
        return PASS;
    }
    // SAFETY: the context is valid while the program runs.
    if is_neighbour_discovery(packet) && bridge_of(unsafe { (*skb).ifindex }) != 0 {
        return PASS;
    }
    sides.internal = source;
    sides.external = destination;
    // SAFETY: the context is valid while the program runs.
    sides.interface = unsafe { (*skb).ifindex };
    match destination.side {
        side::EXTERNAL => JUDGE,
        side::POD => PASS,
        side::NODE => {
            sides.mark = mark::of_origin(&source, active.settings.generation);
            PASS
        }
        _ if is_for_link(&packet.destination, packet.version) => PASS,
        _ => {
            sides.mark = mark::of_origin(&source, active.settings.generation);
            sides.flags = flag::UNRESTRICTED.into();
            FOLLOW
        }
    }
}

/// Whether a packet to a node is for a tunnel, of which this node has the same: the packet inside would be believed. Only nodes
/// may send such; pods may not.
#[inline(always)]
fn enters_tunnel(packet: &Packet) -> bool {
    let port = match packet.protocol {
        _ if packet.problem as u8 == Reason::malformed_ip as u8 => return false,
        protocol::TCP | protocol::SCTP | protocol::ICMP | protocol::ICMPV6 => return false,
        protocol::UDP => u16::from_be_bytes(packet.destination_port),
        _ => 0,
    };
    // SAFETY: not read.
    unsafe { TUNNELS.get(&tunnel(packet.protocol, port)) }.is_some()
}

/// Who has sent a packet, at an egress hook.
enum Sender {
    /// A source of this node's cluster that is not judged here.
    Cluster,
    Pod(AddressInfo),
    /// A LAN host, or with the default properties a foreign source.
    Peer(AddressInfo),
    /// The source is a pod's, and does not lead to the interface that the packet came in by.
    Spoofed,
    /// The source was translated.
    Unknown,
}

/// Returns the sender of a packet by its mark, else by its source address.
#[inline(always)]
fn sender(skb: *mut __sk_buff, active: &Active, packet: &Packet, input: u32, mark: u32) -> Sender {
    // SAFETY: only copied.
    let known = unsafe { INTERFACES.get(&input) }.is_some();
    if known {
        match mark {
            mark::CLUSTER | mark::ADMITTED => return Sender::Cluster,
            mark::FOREIGN => return Sender::Peer(AddressInfo::default()),
            _ => {}
        }
        if let Some(index) = mark::origin(mark, active.settings.generation)
            && let Some(info) = ORIGINS.get_value(active.slot, &index)
        {
            return if info.side == side::POD { Sender::Pod(*info) } else { Sender::Peer(*info) };
        }
    }
    let source = lookup(active.slot, &packet.source, packet.version);
    match source.side {
        side::LOCAL => Sender::Unknown,
        side::POD | side::NODE => {
            // The link layer header is no longer that of the sender.
            let leads_there = hosted(&packet.source) == input
                || routes_to_source(skb, packet, input)
                || (source.side == side::NODE && is_tunnel(input));
            if !leads_there && source.side == side::POD {
                Sender::Spoofed
            } else if !leads_there {
                Sender::Peer(AddressInfo::default())
            } else if source.side == side::NODE {
                Sender::Cluster
            } else {
                Sender::Pod(source)
            }
        }
        _ => Sender::Peer(source),
    }
}

#[inline(always)]
fn internal_egress(
    skb: *mut __sk_buff,
    active: &Active,
    packet: &Packet,
    sides: &mut Sides,
    mark: u32,
) -> u32 {
    // SAFETY: the context is valid while the program runs.
    let (input, output) = unsafe { ((*skb).ingress_ifindex, (*skb).ifindex) };
    let destination = lookup(active.slot, &packet.destination, packet.version);
    if destination.side != side::POD {
        return PASS;
    }
    sides.direction = u32::from(direction::INBOUND);
    sides.internal = destination;
    sides.external = AddressInfo::default();
    sides.interface = output;
    sides.flags = flag::TRANSLATED.into();
    match sender(skb, active, packet, input, mark) {
        Sender::Cluster | Sender::Pod(_) => PASS,
        Sender::Peer(info) => {
            sides.external = info;
            JUDGE
        }
        Sender::Spoofed => SPOOFED,
        Sender::Unknown => UNATTRIBUTED,
    }
}

#[inline(always)]
fn external_egress(
    skb: *mut __sk_buff,
    active: &Active,
    packet: &Packet,
    sides: &mut Sides,
    mark: u32,
) -> u32 {
    // SAFETY: the context is valid while the program runs.
    let input = unsafe { (*skb).ingress_ifindex };
    let destination = lookup(active.slot, &packet.destination, packet.version);
    let source = lookup(active.slot, &packet.source, packet.version).side;
    sides.flags = flag::TRANSLATED.into();
    match destination.side {
        // Another one is restricted by nothing, but answers: a translated flow is followed as its peer sees it, too.
        side::EXTERNAL | 0 => {
            // SAFETY: only copied.
            let from_lan =
                unsafe { INTERFACES.get(&input) }.is_some_and(|interface| interface.role == role::EXTERNAL);
            let restricted = destination.side == side::EXTERNAL;
            // Answers to the node's own address need no entry.
            if !restricted && source != side::POD {
                return PASS;
            }
            let Sender::Pod(info) = sender(skb, active, packet, input, mark) else { return PASS };
            // Pods of other nodes in transit were judged by theirs.
            if from_lan {
                return PASS;
            }
            sides.direction = u32::from(direction::OUTBOUND);
            (sides.internal, sides.external) = (info, destination);
            if restricted {
                return JUDGE;
            }
            sides.flags |= u32::from(flag::UNRESTRICTED);
            FOLLOW
        }
        side::POD => {
            if source != side::LOCAL {
                return PASS;
            }
            sides.direction = u32::from(direction::INBOUND);
            sides.internal = destination;
            match sender(skb, active, packet, input, mark) {
                Sender::Peer(info) => {
                    sides.external = info;
                    JUDGE
                }
                Sender::Unknown => UNATTRIBUTED,
                Sender::Spoofed => SPOOFED,
                Sender::Cluster | Sender::Pod(_) => PASS,
            }
        }
        _ => PASS,
    }
}

/// Whether a port of the packet, in network byte order, is in the NodePort range.
#[inline(always)]
pub(crate) fn is_node_port(settings: &Settings, packet: &Packet, port: [u8; 2]) -> bool {
    // Without a layer 4 header there is no port. Such a packet goes nowhere without the fragment that has one.
    let has_port = packet.kind != Kind::LaterFragment
        && packet.problem as u8 != Reason::fragment_overlap as u8
        && packet.problem as u8 != Reason::malformed_ip as u8;
    let [first, last] = settings.node_ports;
    let port = u16::from_be_bytes(port);
    has_port
        && last != 0
        && first <= port
        && port <= last
        && matches!(packet.protocol, protocol::TCP | protocol::UDP | protocol::SCTP)
}
