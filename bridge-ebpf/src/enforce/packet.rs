//! Reads what a verdict needs from the headers of a packet.

use aya_ebpf::{bindings::__sk_buff, helpers::generated::bpf_skb_load_bytes_relative};
use bridge_common::{address::Address, counters::Reason, flow::FlowKey};

/// Offsets count from the network header, so that devices with and without a link layer header read alike.
const BPF_HDR_START_NET: u32 = 1;

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const ETH_P_8021Q: u16 = 0x8100;
const ETH_P_8021AD: u16 = 0x88a8;

/// IP protocol numbers.
pub(crate) mod protocol {
    pub(crate) const ICMP: u8 = 1;
    pub(crate) const TCP: u8 = 6;
    pub(crate) const UDP: u8 = 17;
    pub(crate) const ICMPV6: u8 = 58;
    pub(crate) const SCTP: u8 = 132;
    // IPv6 extension headers.
    pub(crate) const HOP_BY_HOP: u8 = 0;
    pub(crate) const ROUTING: u8 = 43;
    pub(crate) const FRAGMENT: u8 = 44;
    pub(crate) const AUTHENTICATION: u8 = 51;
    pub(crate) const NO_NEXT_HEADER: u8 = 59;
    pub(crate) const DESTINATION: u8 = 60;
}

/// TCP flags (RFC 9293, 3.1).
pub(crate) mod tcp {
    pub(crate) const FIN: u8 = 0x01;
    pub(crate) const SYN: u8 = 0x02;
    pub(crate) const RST: u8 = 0x04;
    pub(crate) const ACK: u8 = 0x10;
    pub(crate) const URG: u8 = 0x20;
    /// Without PSH, ECE and CWR, which may be on any segment.
    pub(crate) const DECISIVE: u8 = FIN | SYN | RST | ACK | URG;

    /// The combinations of [`DECISIVE`] that senders make, a bit each (`tcp_valid_flags`,
    /// net/netfilter/nf_conntrack_proto_tcp.c).
    pub(crate) const VALID: u64 = 1 << SYN
        | 1 << (SYN | URG)
        | 1 << (SYN | ACK)
        | 1 << RST
        | 1 << (RST | ACK)
        | 1 << (FIN | ACK)
        | 1 << (FIN | ACK | URG)
        | 1 << ACK
        | 1 << (ACK | URG);
}

const SCTP_INIT: u8 = 1;

/// What a packet is to the flow table.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Belongs to a flow, and may open one.
    Plain,
    /// ICMP query: may open a flow.
    Query,
    /// ICMP reply: follows a query.
    Reply,
    /// ICMP error: related to the flow it quotes.
    Error,
    /// Fragment without layer 4 header.
    LaterFragment,
}

const PADDING: usize = 1;
const _: () = assert!(size_of::<Packet>() == 40 + 2 * 16 + 2 * 2 + 4 + 6 * 4 + 12 + 3 + PADDING);

/// The headers of a packet, as far as a verdict needs them.
#[repr(C)]
pub(crate) struct Packet {
    /// Of its flow, where it has ports.
    pub(crate) key: FlowKey,
    pub(crate) source: Address,
    pub(crate) destination: Address,
    /// Network byte order. For ICMP queries and replies both ports are the identifier.
    pub(crate) source_port: [u8; 2],
    pub(crate) destination_port: [u8; 2],
    pub(crate) protocol: u8,
    pub(crate) kind: Kind,
    /// TCP flags, ICMP type, or type of the first SCTP chunk.
    pub(crate) detail: u8,
    /// 4 or 6.
    pub(crate) version: u8,
    /// Offset of the IP header, from the network header.
    pub(crate) l3: u32,
    /// Offset of the layer 4 header, from the network header.
    pub(crate) l4: u32,
    /// Offset of the end of the packet by its IP header, from the network header.
    pub(crate) end: u32,
    /// TCP: host byte order.
    pub(crate) sequence: u32,
    /// TCP: host byte order.
    pub(crate) acknowledgement: u32,
    /// TCP: length of the header in bytes.
    pub(crate) tcp_header: u32,
    /// The first bytes of the IP header: 12 of IPv4, 8 of IPv6.
    pub(crate) head: [u8; 12],
    /// Which end of the key the source is.
    pub(crate) end_of_source: u8,
    /// 1: nothing but an IP header stands before layer 4, and nothing but the Ethernet header before that; no fragment.
    pub(crate) plain: u8,
    /// So that no byte is without a value: subprograms take the packet as a whole.
    pub(crate) padding: [u8; PADDING],
    /// Why the packet must be denied if it is in scope; [`Reason::established`] where nothing speaks against it.
    pub(crate) problem: Reason,
}

impl Packet {
    #[inline(always)]
    pub(crate) fn is_intact(&self) -> bool {
        self.problem as u8 == Reason::established as u8
    }

    /// Whether it is the SYN that opens a TCP connection.
    #[inline(always)]
    pub(crate) fn opens_tcp(&self) -> bool {
        self.detail & (tcp::SYN | tcp::ACK | tcp::RST | tcp::FIN) == tcp::SYN
    }

    /// Whether it is the chunk that opens an SCTP association (RFC 9260, 3.3.2).
    #[inline(always)]
    pub(crate) fn opens_sctp(&self) -> bool {
        self.detail == SCTP_INIT
    }
}

#[inline(always)]
fn load<const N: usize>(skb: *mut __sk_buff, offset: u32) -> Option<[u8; N]> {
    let mut bytes = [0u8; N];
    if load_into(skb, offset, &mut bytes) { Some(bytes) } else { None }
}

#[inline(always)]
fn load_into<const N: usize>(skb: *mut __sk_buff, offset: u32, bytes: &mut [u8; N]) -> bool {
    // SAFETY: the helper writes at most N bytes to the array, and checks the offset against the packet.
    let result = unsafe {
        bpf_skb_load_bytes_relative(
            skb.cast(),
            offset,
            bytes.as_mut_ptr().cast(),
            N as u32,
            BPF_HDR_START_NET,
        )
    };
    result == 0
}

/// Reads the packet itself. `false`: it is not IP, or too short to have addresses, so that it cannot be in scope.
#[inline(always)]
pub(crate) fn parse(skb: *mut __sk_buff, packet: &mut Packet) -> bool {
    // SAFETY: the context is valid while the program runs; the verifier checks the access.
    let mut ether_type = u16::from_be(unsafe { (*skb).protocol } as u16);
    let mut l3 = 0;
    // The tag of a VLAN that the kernel has not taken off: the inner one of two, or both on a device without offload.
    for _ in 0..2 {
        if ether_type != ETH_P_8021Q && ether_type != ETH_P_8021AD {
            break;
        }
        let Some(tag) = load::<4>(skb, l3) else { return false };
        ether_type = u16::from_be_bytes([tag[2], tag[3]]);
        l3 += 4;
    }
    match ether_type {
        ETH_P_IP => parse_ip(skb, l3, 4, packet) != 0,
        ETH_P_IPV6 => parse_ip(skb, l3, 6, packet) != 0,
        _ => false,
    }
}

/// Reads the packet that an ICMP error quotes: as much of it as the error must hold (RFC 792: 8 bytes of layer 4).
/// `false`: its ports cannot be read.
#[inline(always)]
pub(crate) fn parse_quoted(skb: *mut __sk_buff, error: &Packet, quoted: &mut Packet) -> bool {
    parse_ip(skb, error.l4 + 8, u32::from(error.version) | QUOTED, quoted) != 0
        && quoted.is_intact()
        && quoted.kind != Kind::LaterFragment
}

/// Beside the IP version: the packet is quoted by an ICMP error.
const QUOTED: u32 = 1 << 8;

/// Reads an IP packet whose header is at `l3`; `version` is 4 or 6, and [`QUOTED`]. 0: the addresses cannot be read.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn parse_ip(skb: *mut __sk_buff, l3: u32, version: u32, packet: *mut Packet) -> u32 {
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
    let first_fragment = if version == 4 {
        match parse_v4(skb, l3, packet) {
            Ok(first) => first,
            Err(found) => return found,
        }
    } else {
        match parse_v6(skb, l3, packet) {
            Ok(first) => first,
            Err(found) => return found,
        }
    };
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
    packet.end_of_source = packet.key.set(
        &packet.source,
        packet.source_port,
        &packet.destination,
        packet.destination_port,
        packet.protocol,
    );
    1
}

/// Reads the ports of a header that is cut off behind them: they tell whether the packet goes to a NodePort.
#[inline(always)]
fn read_ports(skb: *mut __sk_buff, packet: &mut Packet) {
    if let protocol::TCP | protocol::UDP | protocol::SCTP = packet.protocol
        && let Some(ports) = load::<4>(skb, packet.l4)
    {
        packet.source_port = [ports[0], ports[1]];
        packet.destination_port = [ports[2], ports[3]];
    }
}

/// `Ok`: whether it is the first of several fragments. `Err`: whether the addresses could be read at all.
#[inline(always)]
fn parse_v4(skb: *mut __sk_buff, l3: u32, packet: &mut Packet) -> Result<bool, u32> {
    let Some(header) = load::<20>(skb, l3) else { return Err(0) };
    if header[0] >> 4 != 4 {
        return Err(0);
    }
    packet.source = Address::from_v4([header[12], header[13], header[14], header[15]]);
    packet.destination = Address::from_v4([header[16], header[17], header[18], header[19]]);
    packet.protocol = header[9];
    packet.head.copy_from_slice(&header[..12]);
    let header_length = u32::from(header[0] & 0xf) * 4;
    let total = u32::from(u16::from_be_bytes([header[2], header[3]]));
    // A packet of more than 64 KiB on its way through segmentation offload has 0 here.
    packet.end = if total == 0 { u32::MAX } else { l3 + total };
    packet.l4 = l3 + header_length;
    if header_length < 20 || packet.l4 > packet.end {
        packet.problem = Reason::malformed_ip;
        return Err(1);
    }
    let fragment = u16::from_be_bytes([header[6], header[7]]);
    let more = fragment & 0x2000 != 0;
    fragment_offset(fragment & 0x1fff, packet);
    Ok(more)
}

/// Takes note of a fragment's offset, in units of 8 bytes.
#[inline(always)]
fn fragment_offset(offset: u16, packet: &mut Packet) {
    if offset == 1 {
        packet.problem = Reason::fragment_overlap;
    } else if offset != 0 {
        packet.kind = Kind::LaterFragment;
    }
}

/// How many extension headers are followed: more than RFC 8200, 4.1 has kinds of.
const EXTENSION_HEADERS: usize = 8;

/// As [`parse_v4`].
#[inline(always)]
fn parse_v6(skb: *mut __sk_buff, l3: u32, packet: &mut Packet) -> Result<bool, u32> {
    let Some(header) = load::<8>(skb, l3) else { return Err(0) };
    if header[0] >> 4 != 6
        || !load_into(skb, l3 + 8, &mut packet.source.octets)
        || !load_into(skb, l3 + 24, &mut packet.destination.octets)
    {
        return Err(0);
    }
    packet.head[..8].copy_from_slice(&header);
    let payload = u32::from(u16::from_be_bytes([header[4], header[5]]));
    // A jumbogram has 0 here.
    packet.end = if payload == 0 { u32::MAX } else { l3 + 40 + payload };
    packet.protocol = header[6];
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
        let Some(extension) = load::<8>(skb, packet.l4) else { break };
        let length = match packet.protocol {
            protocol::FRAGMENT => {
                let field = u16::from_be_bytes([extension[2], extension[3]]);
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

/// `false`: the layer 4 header is cut off or inconsistent.
#[inline(always)]
fn parse_l4(skb: *mut __sk_buff, packet: &mut Packet) -> bool {
    let available = packet.end - packet.l4;
    match packet.protocol {
        protocol::TCP => {
            let Some(header) = load::<20>(skb, packet.l4) else { return false };
            packet.source_port = [header[0], header[1]];
            packet.destination_port = [header[2], header[3]];
            packet.sequence = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
            packet.acknowledgement = u32::from_be_bytes([header[8], header[9], header[10], header[11]]);
            packet.tcp_header = u32::from(header[12] >> 4) * 4;
            packet.detail = header[13];
            if packet.tcp_header < 20 || available < packet.tcp_header {
                return false;
            }
            if tcp::VALID >> (packet.detail & tcp::DECISIVE) & 1 == 0 {
                packet.problem = Reason::invalid_flags;
            }
        }
        protocol::UDP => {
            let Some(header) = load::<8>(skb, packet.l4) else { return false };
            packet.source_port = [header[0], header[1]];
            packet.destination_port = [header[2], header[3]];
            return available >= 8;
        }
        protocol::SCTP => {
            let Some(header) = load::<16>(skb, packet.l4) else { return false };
            packet.source_port = [header[0], header[1]];
            packet.destination_port = [header[2], header[3]];
            packet.detail = header[12];
            return available >= 16;
        }
        protocol::ICMP if packet.version == 4 => return parse_icmp(skb, packet, icmp_kind),
        protocol::ICMPV6 if packet.version == 6 => return parse_icmp(skb, packet, icmpv6_kind),
        _ => {}
    }
    true
}

#[inline(always)]
fn parse_icmp(skb: *mut __sk_buff, packet: &mut Packet, kind: fn(u8) -> Option<Kind>) -> bool {
    let Some(header) = load::<8>(skb, packet.l4) else { return false };
    packet.detail = header[0];
    match kind(header[0]) {
        Some(Kind::Error) => packet.kind = Kind::Error,
        Some(kind) => {
            packet.kind = kind;
            packet.source_port = [header[4], header[5]];
            packet.destination_port = packet.source_port;
        }
        None => packet.problem = Reason::icmp_type,
    }
    packet.end - packet.l4 >= 8
}

/// RFC 792, RFC 950.
#[inline(always)]
fn icmp_kind(icmp_type: u8) -> Option<Kind> {
    match icmp_type {
        8 | 13 | 15 | 17 => Some(Kind::Query),
        0 | 14 | 16 | 18 => Some(Kind::Reply),
        3 | 4 | 5 | 11 | 12 => Some(Kind::Error),
        _ => None,
    }
}

/// RFC 4443.
#[inline(always)]
fn icmpv6_kind(icmp_type: u8) -> Option<Kind> {
    match icmp_type {
        128 => Some(Kind::Query),
        129 => Some(Kind::Reply),
        1..=4 => Some(Kind::Error),
        _ => None,
    }
}

/// `false`: the quoted packet belongs to no flow that could be known.
#[inline(always)]
fn parse_quoted_l4(skb: *mut __sk_buff, packet: &mut Packet) -> bool {
    let Some(header) = load::<8>(skb, packet.l4) else { return false };
    let kind = match packet.protocol {
        protocol::TCP | protocol::UDP | protocol::SCTP => {
            packet.source_port = [header[0], header[1]];
            packet.destination_port = [header[2], header[3]];
            return true;
        }
        protocol::ICMP if packet.version == 4 => icmp_kind(header[0]),
        protocol::ICMPV6 if packet.version == 6 => icmpv6_kind(header[0]),
        _ => return true,
    };
    packet.source_port = [header[4], header[5]];
    packet.destination_port = packet.source_port;
    matches!(kind, Some(Kind::Query | Kind::Reply))
}
