//! Whether a packet is in scope, and in which direction.

use aya_ebpf::btf_maps::lpm_trie::Key;
use bridge_common::filter::{
    address::Address,
    control::Settings,
    counters::Reason,
    policy::{AddressInfo, direction, side},
};
use bridge_ebpf::protocol;

use crate::{
    maps::{ADDRESSES4, ADDRESSES6},
    packet::{Kind, Packet},
    sides::Sides,
};

#[inline(always)]
fn lookup(slot: u32, address: &Address, version: u8) -> Option<&'static AddressInfo> {
    if version == 4 {
        ADDRESSES4.get(slot)?.get(&Key::new(32, address.v4()))
    } else {
        ADDRESSES6.get(slot)?.get(&Key::new(128, address.octets))
    }
}

/// Finds the sides of a packet. Returns `false` if it is out of scope.
#[inline(always)]
pub(crate) fn find(
    slot: u32,
    settings: &Settings,
    packet: &Packet,
    from_lan: bool,
    sides: &mut Sides,
) -> bool {
    let Some(destination) = lookup(slot, &packet.destination, packet.version) else { return false };
    let Some(source) = lookup(slot, &packet.source, packet.version) else { return false };
    if source.side == side::POD && destination.side == side::EXTERNAL {
        sides.direction = u32::from(direction::OUTBOUND);
        (sides.internal, sides.external) = (*source, *destination);
        return true;
    }
    if source.side != side::EXTERNAL {
        return false;
    }
    (sides.internal, sides.external) = (*destination, *source);
    if destination.side == side::POD {
        sides.direction = u32::from(direction::INBOUND);
        true
    } else {
        sides.direction = u32::from(direction::NODE_PORT);
        from_lan && destination.side == side::LOCAL && is_node_port(settings, packet, packet.destination_port)
    }
}

/// Whether flows between these addresses are tracked.
#[inline(always)]
pub(crate) fn is_judged(slot: u32, settings: &Settings, packet: &Packet) -> bool {
    let Some(destination) = lookup(slot, &packet.destination, packet.version) else { return false };
    let Some(source) = lookup(slot, &packet.source, packet.version) else { return false };
    match (source.side, destination.side) {
        (side::POD, side::EXTERNAL) | (side::EXTERNAL, side::POD) => true,
        (side::EXTERNAL, side::LOCAL) => is_node_port(settings, packet, packet.destination_port),
        _ => false,
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
