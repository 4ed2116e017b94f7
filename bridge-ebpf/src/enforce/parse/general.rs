//! Reads any IP packet, by copies from the buffer: VLAN tags, IPv4 options, IPv6 extension headers, fragments, every
//! protocol.

use aya_ebpf::bindings::__sk_buff;
use bridge_common::filter::{address::Address, counters::Reason};
use bridge_ebpf::protocol;

use super::{
    icmp::{icmp_kind, icmpv6_kind},
    quoted::{QUOTED, parse_quoted_l4},
    words::{Word, load},
};
use crate::packet::{Kind, Packet, sctp, tcp};

/// Reads an IP packet whose header is at `l3`; `version` is 4 or 6, with [`QUOTED`]. Returns 0 if the addresses cannot be
/// read.
#[unsafe(no_mangle)]
#[inline(never)]
pub(super) extern "C" fn parse_ip(skb: *mut __sk_buff, l3: u32, version: u32, packet: *mut Packet) -> u32 {
    // SAFETY: a packet of the caller's, or null as far as the verifier knows.
    let Some(packet) = (unsafe { packet.as_mut() }) else { return 0 };
    let quoted = version & QUOTED != 0;
    let version = version & !QUOTED;
    packet.version = version as u8;
    packet.l3 = l3;
    packet.kind = Kind::Plain;
    packet.problem = Reason::established;
    packet.source_port = [0; 2];
    packet.destination_port = [0; 2];
    packet.detail = 0;
    packet.plain = 0;
    packet.first_fragment = 0;
    let read = if version == 4 { parse_v4(skb, l3, packet) } else { parse_v6(skb, l3, packet) };
    if version == 6 && read != Err(0) && (packet.source.is_v4() || packet.destination.is_v4()) {
        // Never on the wire (RFC 4942, 2.2), and the same as IPv4 addresses to every table.
        packet.problem = Reason::spoofed;
    }
    let first_fragment = match read {
        Ok(more) => more && packet.kind != Kind::LaterFragment,
        Err(found) => return found,
    };
    packet.first_fragment = u8::from(first_fragment);
    if packet.kind == Kind::LaterFragment || !packet.is_intact() {
        return 1;
    }
    let header = if version == 4 { 20 } else { 40 };
    packet.plain = u8::from(l3 == 0 && packet.l4 == header && !first_fragment);
    let whole = if quoted { parse_quoted_l4(skb, packet) } else { parse_l4(skb, packet) };
    if !whole {
        packet.problem = if first_fragment { Reason::fragment_short } else { Reason::malformed_l4 };
        read_ports(skb, packet);
        return 1;
    }
    packet.set_key();
    1
}

/// Reads the ports of a truncated header: they decide whether the packet goes to a NodePort.
#[inline(always)]
fn read_ports(skb: *mut __sk_buff, packet: &mut Packet) {
    if let protocol::TCP | protocol::UDP | protocol::SCTP = packet.protocol
        && let Some([ports]) = load(skb, packet.l4)
    {
        [packet.source_port, packet.destination_port] = ports.ports();
    }
}

/// Returns whether the packet is the first of several fragments; `Err`: whether the addresses could be read.
#[inline(always)]
fn parse_v4(skb: *mut __sk_buff, l3: u32, packet: &mut Packet) -> Result<bool, u32> {
    let Some([first, second, third, source, destination]) = load(skb, l3) else { return Err(0) };
    let [version, ..] = first.bytes();
    if version >> 4 != 4 {
        return Err(0);
    }
    packet.head = [first.0, second.0, third.0];
    packet.source = Address::from_v4(source.bytes());
    packet.destination = Address::from_v4(destination.bytes());
    [_, packet.protocol, ..] = third.bytes();
    let header_length = u32::from(version & 0xf) * 4;
    let [_, total] = first.halves();
    // A packet of more than 64 KiB on its way through segmentation offload has 0 here.
    packet.end = if total == 0 { u32::MAX } else { l3 + u32::from(total) };
    packet.l4 = l3 + header_length;
    if header_length < 20 || packet.l4 > packet.end {
        packet.problem = Reason::malformed_ip;
        return Err(1);
    }
    let [_, fragment] = second.halves();
    let more = fragment & 0x2000 != 0;
    fragment_offset(fragment & 0x1fff, packet);
    Ok(more)
}

/// Classifies a fragment by its offset, in units of 8 bytes.
#[inline(always)]
fn fragment_offset(offset: u16, packet: &mut Packet) {
    if offset == 1 {
        packet.problem = Reason::fragment_overlap;
    } else if offset != 0 {
        packet.kind = Kind::LaterFragment;
    }
}

/// Headers read after the first, layer 4 included: RFC 8200, 4.1 allows seven extension headers.
const EXTENSION_HEADERS: usize = 8;

/// As [`parse_v4`].
#[inline(always)]
fn parse_v6(skb: *mut __sk_buff, l3: u32, packet: &mut Packet) -> Result<bool, u32> {
    let Some([first, second, a, b, c, d, e, f, g, h]) = load(skb, l3) else { return Err(0) };
    let [version, ..] = first.bytes();
    if version >> 4 != 6 {
        return Err(0);
    }
    packet.head = [first.0, second.0, 0];
    packet.source = Address::from_words([a.0, b.0, c.0, d.0]);
    packet.destination = Address::from_words([e.0, f.0, g.0, h.0]);
    let [payload, _] = second.halves();
    // A jumbogram has 0 here.
    packet.end = if payload == 0 { u32::MAX } else { l3 + 40 + u32::from(payload) };
    [_, _, packet.protocol, _] = second.bytes();
    packet.l4 = l3 + 40;
    let mut first_fragment = false;
    for _ in 0..EXTENSION_HEADERS {
        let is_extension = matches!(
            packet.protocol,
            protocol::HOP_BY_HOP
                | protocol::ROUTING
                | protocol::FRAGMENT
                | protocol::AUTHENTICATION
                | protocol::DESTINATION
        );
        if !is_extension {
            if packet.protocol == protocol::NO_NEXT_HEADER {
                break;
            }
            return Ok(first_fragment);
        }
        // The second word is not read, but must be there.
        let Some([extension, _]) = load(skb, packet.l4) else { break };
        let [_, field] = extension.halves();
        let extension = extension.bytes();
        let length = match packet.protocol {
            protocol::FRAGMENT => {
                first_fragment = field & 1 != 0;
                fragment_offset(field >> 3, packet);
                8
            }
            protocol::AUTHENTICATION => (u32::from(extension[1]) + 2) * 4,
            // Segments left: the destination in the header is not where the packet goes.
            protocol::ROUTING if extension[3] != 0 => break,
            _ => (u32::from(extension[1]) + 1) * 8,
        };
        packet.protocol = extension[0];
        packet.l4 += length;
        if packet.kind == Kind::LaterFragment || !packet.is_intact() {
            return Ok(first_fragment);
        }
        if packet.l4 > packet.end {
            break;
        }
    }
    packet.problem = if first_fragment { Reason::fragment_short } else { Reason::malformed_ip };
    Err(1)
}

/// Reads a TCP header; `available`: bytes from its start to the end of the packet. Returns `false` if it is inconsistent.
#[inline(always)]
pub(super) fn tcp_header(packet: &mut Packet, header: &[Word; 5], available: u32) -> bool {
    let [ports, sequence, acknowledgement, rest, _] = header;
    [packet.source_port, packet.destination_port] = ports.ports();
    packet.sequence = sequence.number();
    packet.acknowledgement = acknowledgement.number();
    let [offset, flags, ..] = rest.bytes();
    packet.tcp_header = u32::from(offset >> 4) * 4;
    packet.detail = flags;
    if packet.tcp_header < 20 || available < packet.tcp_header {
        return false;
    }
    if tcp::VALID >> (packet.detail & tcp::DECISIVE) & 1 == 0 {
        packet.problem = Reason::invalid_flags;
    }
    true
}

/// Returns `false` if the layer 4 header is truncated or inconsistent.
#[inline(always)]
fn parse_l4(skb: *mut __sk_buff, packet: &mut Packet) -> bool {
    let available = packet.end - packet.l4;
    match packet.protocol {
        protocol::TCP => {
            let Some(header) = load(skb, packet.l4) else { return false };
            if !tcp_header(packet, &header, available) {
                return false;
            }
        }
        protocol::UDP => {
            let Some([ports, _]) = load(skb, packet.l4) else { return false };
            [packet.source_port, packet.destination_port] = ports.ports();
            return available >= 8;
        }
        protocol::SCTP => {
            let Some([ports, tag, _, chunk]) = load(skb, packet.l4) else { return false };
            [packet.source_port, packet.destination_port] = ports.ports();
            let [chunk, flags, ..] = chunk.bytes();
            (packet.detail, packet.tcp_header) = (chunk, flags.into());
            packet.sequence = tag.number();
            if !matches!(chunk, sctp::INIT | sctp::INIT_ACK) {
                return available >= 16;
            }
            // The whole of their fixed part must be there (RFC 9260, 3.3.2).
            let Some([announced, _, _, _]) = load(skb, packet.l4 + 16) else { return false };
            packet.acknowledgement = announced.number();
            let has_tags = packet.acknowledgement != 0 && (chunk != sctp::INIT || packet.sequence == 0);
            return available >= 32 && has_tags;
        }
        protocol::ICMP if packet.version == 4 => return parse_icmp(skb, packet, icmp_kind),
        protocol::ICMPV6 if packet.version == 6 => return parse_icmp(skb, packet, icmpv6_kind),
        _ => {}
    }
    true
}

#[inline(always)]
fn parse_icmp(skb: *mut __sk_buff, packet: &mut Packet, kind: fn(u8) -> Option<Kind>) -> bool {
    let Some([first, second]) = load(skb, packet.l4) else { return false };
    [packet.detail, ..] = first.bytes();
    match kind(packet.detail) {
        Some(Kind::Error) => packet.kind = Kind::Error,
        Some(kind) => {
            packet.kind = kind;
            [packet.source_port, _] = second.ports();
            packet.destination_port = packet.source_port;
        }
        None => packet.problem = Reason::icmp_type,
    }
    packet.end - packet.l4 >= 8
}
