//! Reads what a verdict needs from the headers of a packet.

use core::mem::MaybeUninit;

use aya_ebpf::{bindings::__sk_buff, helpers::generated::bpf_skb_load_bytes_relative};
use bridge_common::filter::{address::Address, counters::Reason, flow::FlowKey};

use crate::maps::INTERFACES;

/// Offsets count from the network header, so that devices with and without a link layer header read alike.
const BPF_HDR_START_NET: u32 = 1;

/// Length of an Ethernet header.
const ETHERNET: usize = 14;
/// Length of a UDP header, and of a TCP header without options.
const UDP_HEADER: usize = 8;
const TCP_HEADER: usize = 20;
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const ETH_P_8021Q: u16 = 0x8100;
const ETH_P_8021AD: u16 = 0x88a8;

/// IP protocol numbers.
pub(crate) mod protocol {
    pub(crate) use bridge_common::filter::flow::protocol::{TCP, UDP};

    pub(crate) const ICMP: u8 = 1;
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
    /// The first words of the IP header, as they lie there: three of IPv4, two of IPv6.
    pub(crate) head: [u32; 3],
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

    #[inline(always)]
    fn set_key(&mut self) {
        self.end_of_source = self.key.set(
            &self.source,
            self.source_port,
            &self.destination,
            self.destination_port,
            self.protocol,
        );
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

/// Reads `N` words of the packet, each as it lies there. By words, since the target has no unaligned access, and moves
/// bytes one by one where it knows nothing of their alignment.
#[inline(always)]
fn load<const N: usize>(skb: *mut __sk_buff, offset: u32) -> Option<[Word; N]> {
    // Not zeroed first: that would be a loop.
    let mut words = MaybeUninit::<[Word; N]>::uninit();
    // SAFETY: the helper writes as many bytes as the array has, and checks the offset against the packet.
    let result = unsafe {
        bpf_skb_load_bytes_relative(
            skb.cast(),
            offset,
            words.as_mut_ptr().cast(),
            size_of::<[Word; N]>() as u32,
            BPF_HDR_START_NET,
        )
    };
    // SAFETY: the helper has filled it, and any bits are a word.
    (result == 0).then(|| unsafe { words.assume_init() })
}

/// Four bytes of a packet, as they lie there.
#[repr(C, align(4))]
#[derive(Clone, Copy)]
struct Word(u32);

impl Word {
    #[inline(always)]
    fn bytes(self) -> [u8; 4] {
        self.0.to_ne_bytes()
    }

    /// As a number in network byte order.
    #[inline(always)]
    fn number(self) -> u32 {
        u32::from_be(self.0)
    }

    /// As two numbers in network byte order.
    #[inline(always)]
    fn halves(self) -> [u16; 2] {
        let number = self.number();
        [(number >> 16) as u16, number as u16]
    }

    /// As two ports, which stay in network byte order.
    #[inline(always)]
    fn ports(self) -> [[u8; 2]; 2] {
        let [a, b, c, d] = self.bytes();
        [[a, b], [c, d]]
    }
}

/// Reads the packet itself. `false`: it is not IP, or too short to have addresses, so that it cannot be in scope.
#[inline(always)]
pub(crate) fn parse(skb: *mut __sk_buff, packet: &mut Packet) -> bool {
    // SAFETY: the context is valid while the program runs; the verifier checks the access.
    let mut ether_type = u16::from_be(unsafe { (*skb).protocol } as u16);
    if parse_plain(skb, ether_type.into(), packet) != 0 {
        return true;
    }
    let mut l3 = 0;
    // The tag of a VLAN that the kernel has not taken off: the inner one of two, or both on a device without offload.
    for _ in 0..2 {
        if ether_type != ETH_P_8021Q && ether_type != ETH_P_8021AD {
            break;
        }
        let Some([tag]) = load(skb, l3) else { return false };
        [_, ether_type] = tag.halves();
        l3 += 4;
    }
    match ether_type {
        ETH_P_IP => parse_ip(skb, l3, 4, packet) != 0,
        ETH_P_IPV6 => parse_ip(skb, l3, 6, packet) != 0,
        _ => false,
    }
}

/// Whether a packet that begins with this byte begins with an Ethernet header. On a device that has none, the IP header
/// is there.
#[inline(always)]
fn is_ethernet(skb: *mut __sk_buff, first: u8) -> bool {
    if !matches!(first >> 4, 4 | 6) {
        return true;
    }
    // SAFETY: the context is valid while the program runs.
    let ifindex = unsafe { (*skb).ifindex };
    // SAFETY: only copied.
    unsafe { INTERFACES.get(&ifindex) }.is_some_and(|interface| interface.link_header == ETHERNET as u32)
}

/// Reads a packet of the kind that nearly all are of, where it lies: nothing but TCP or UDP in IP in Ethernet, with all
/// headers in one piece. 0: it is of another kind, and to be read by those who know them all.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn parse_plain(skb: *mut __sk_buff, ether_type: u32, packet: *mut Packet) -> u32 {
    // SAFETY: a packet of the caller's, or null as far as the verifier knows.
    let Some(packet) = (unsafe { packet.as_mut() }) else { return 0 };
    u32::from(read_plain(skb, ether_type as u16, packet))
}

/// See [`parse_plain`].
#[inline(always)]
fn read_plain(skb: *mut __sk_buff, ether_type: u16, packet: &mut Packet) -> bool {
    // SAFETY: the context is valid while the program runs; the verifier checks the access, and all that is read below is
    // read after it was compared with the end.
    let (start, end) = unsafe { ((*skb).data as usize, (*skb).data_end as usize) };
    let words = |offset: usize| (start + offset) as *const Word;
    if start + ETHERNET + 20 + UDP_HEADER > end {
        return false;
    }
    // SAFETY: as above.
    if !is_ethernet(skb, unsafe { *(start as *const u8) }) {
        return false;
    }
    // SAFETY: as above. To the kernel, words of a header are aligned where it lets programs read them
    // (`check_pkt_ptr_alignment`, kernel/bpf/verifier.c).
    let word = |offset: usize| unsafe { *words(ETHERNET + offset) };
    packet.l3 = 0;
    packet.kind = Kind::Plain;
    packet.problem = Reason::established;
    packet.plain = 1;
    let l4 = match ether_type {
        ETH_P_IP => {
            let (first, second, third) = (word(0), word(4), word(8));
            let [version, ..] = first.bytes();
            // No options, no fragment.
            if version != 0x45 || second.number() & 0x3fff != 0 {
                return false;
            }
            packet.head = [first.0, second.0, third.0];
            packet.source = Address::from_v4(word(12).bytes());
            packet.destination = Address::from_v4(word(16).bytes());
            [_, packet.protocol, ..] = third.bytes();
            let [_, total] = first.halves();
            packet.end = if total == 0 { u32::MAX } else { u32::from(total) };
            packet.version = 4;
            20
        }
        ETH_P_IPV6 => {
            let (first, second) = (word(0), word(4));
            let [version, ..] = first.bytes();
            if version >> 4 != 6 || start + ETHERNET + 40 + UDP_HEADER > end {
                return false;
            }
            packet.head = [first.0, second.0, 0];
            packet.source = Address::from_words([word(8).0, word(12).0, word(16).0, word(20).0]);
            packet.destination = Address::from_words([word(24).0, word(28).0, word(32).0, word(36).0]);
            [_, _, packet.protocol, _] = second.bytes();
            let [payload, _] = second.halves();
            packet.end = if payload == 0 { u32::MAX } else { 40 + u32::from(payload) };
            packet.version = 6;
            40
        }
        _ => return false,
    };
    packet.l4 = l4;
    if packet.end < l4 {
        return false;
    }
    let available = packet.end - l4;
    let l4 = l4 as usize;
    let known = match packet.protocol {
        protocol::TCP if start + ETHERNET + l4 + TCP_HEADER <= end => {
            let header = [word(l4), word(l4 + 4), word(l4 + 8), word(l4 + 12), word(l4 + 16)];
            tcp_header(packet, &header, available)
        }
        protocol::UDP => {
            [packet.source_port, packet.destination_port] = word(l4).ports();
            packet.detail = 0;
            available >= 8
        }
        _ => false,
    };
    if known {
        packet.set_key();
    }
    known
}

/// What the flow cache needs of a packet's headers.
pub(crate) struct PlainV4 {
    /// As they lie in the header, as all that is not a length.
    pub(crate) source: u32,
    pub(crate) destination: u32,
    pub(crate) ports: u32,
    pub(crate) protocol: u8,
    pub(crate) headers: Headers,
}

impl PlainV4 {
    /// Source and destination port, as they lie there.
    #[inline(always)]
    pub(crate) fn ports(&self) -> [u16; 2] {
        Word(self.ports).ports().map(u16::from_ne_bytes)
    }
}

/// Reads a packet of IPv4 of the kind that [`parse_plain`] reads, if it is one that changes nothing in an established flow:
/// UDP, and TCP with neither SYN, FIN nor RST. `None`: another one.
#[inline(always)]
pub(crate) fn established_v4(skb: *mut __sk_buff) -> Option<PlainV4> {
    // SAFETY: as in `read_plain`.
    let (start, end) = unsafe { ((*skb).data as usize, (*skb).data_end as usize) };
    let words = |offset: usize| (start + offset) as *const Word;
    // SAFETY: as in `read_plain`.
    let word = |offset: usize| unsafe { *words(ETHERNET + offset) };
    // SAFETY: as in `read_plain`.
    let ether_type = u16::from_be(unsafe { (*skb).protocol } as u16);
    if ether_type != ETH_P_IP || start + ETHERNET + 20 + UDP_HEADER > end {
        return None;
    }
    // SAFETY: as in `read_plain`.
    if !is_ethernet(skb, unsafe { *(start as *const u8) }) {
        return None;
    }
    let (first, second, third) = (word(0), word(4), word(8));
    let [version, ..] = first.bytes();
    let [_, total] = first.halves();
    if version != 0x45 || second.number() & 0x3fff != 0 || total < 20 {
        return None;
    }
    let available = u32::from(total) - 20;
    let [_, protocol, ..] = third.bytes();
    let l4_header = match protocol {
        protocol::TCP if start + ETHERNET + 20 + TCP_HEADER <= end => {
            let [offset, flags, ..] = word(20 + 12).bytes();
            // What else is valid opens or ends a connection.
            if flags & tcp::DECISIVE & !tcp::URG != tcp::ACK || offset < 0x50 {
                return None;
            }
            u32::from(offset >> 4) * 4
        }
        protocol::UDP => UDP_HEADER as u32,
        _ => return None,
    };
    if available < l4_header {
        return None;
    }
    Some(PlainV4 {
        source: word(12).0,
        destination: word(16).0,
        ports: word(20).0,
        protocol,
        headers: Headers { head: [first.0, second.0, third.0], version: 4, length: 20 + l4_header },
    })
}

/// What the fast path needs of a packet's headers.
pub(crate) struct Headers {
    /// See [`Packet::head`].
    pub(crate) head: [u32; 3],
    /// 4 or 6.
    pub(crate) version: u8,
    /// From the IP header to the payload, in bytes.
    pub(crate) length: u32,
}

/// Reads the packet that an ICMP error quotes: as much of it as the error must hold (RFC 792: 8 bytes of layer 4).
/// `false`: its ports cannot be read.
#[inline(always)]
pub(crate) fn parse_quoted(skb: *mut __sk_buff, error: &Packet, quoted: &mut Packet) -> bool {
    parse_ip(skb, error.l4 + 8, u32::from(error.version) | QUOTED, quoted) != 0
        && quoted.is_intact()
        && quoted.kind != Kind::LaterFragment
        // Not what stands behind the error: the padding of a short frame.
        && quoted.l4 <= error.end - 8
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
    packet.set_key();
    1
}

/// Reads the ports of a header that is cut off behind them: they tell whether the packet goes to a NodePort.
#[inline(always)]
fn read_ports(skb: *mut __sk_buff, packet: &mut Packet) {
    if let protocol::TCP | protocol::UDP | protocol::SCTP = packet.protocol
        && let Some([ports]) = load(skb, packet.l4)
    {
        [packet.source_port, packet.destination_port] = ports.ports();
    }
}

/// `Ok`: whether it is the first of several fragments. `Err`: whether the addresses could be read at all.
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

/// Takes note of a fragment's offset, in units of 8 bytes.
#[inline(always)]
fn fragment_offset(offset: u16, packet: &mut Packet) {
    if offset == 1 {
        packet.problem = Reason::fragment_overlap;
    } else if offset != 0 {
        packet.kind = Kind::LaterFragment;
    }
}

/// How many headers behind the first are looked at, that of layer 4 among them: seven extension headers are as many as
/// RFC 8200, 4.1 lets a packet have.
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
        // The second word is not looked at, but must be there.
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

/// Takes in a TCP header, of which `available` bytes are there with what follows it. `false`: it is inconsistent.
#[inline(always)]
fn tcp_header(packet: &mut Packet, header: &[Word; 5], available: u32) -> bool {
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

/// `false`: the layer 4 header is cut off or inconsistent.
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
            let Some([ports, _, _, chunk]) = load(skb, packet.l4) else { return false };
            [packet.source_port, packet.destination_port] = ports.ports();
            [packet.detail, ..] = chunk.bytes();
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
    let Some([first, second]) = load(skb, packet.l4) else { return false };
    let [icmp_type, ..] = first.bytes();
    let kind = match packet.protocol {
        protocol::TCP | protocol::UDP | protocol::SCTP => {
            [packet.source_port, packet.destination_port] = first.ports();
            return true;
        }
        protocol::ICMP if packet.version == 4 => icmp_kind(icmp_type),
        protocol::ICMPV6 if packet.version == 6 => icmpv6_kind(icmp_type),
        _ => return true,
    };
    [packet.source_port, _] = second.ports();
    packet.destination_port = packet.source_port;
    matches!(kind, Some(Kind::Query | Kind::Reply))
}
