//! Answers a denied packet in place: the buffer becomes the answer and leaves by the interface that it came in by.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{
        bpf_csum_diff, bpf_l4_csum_replace, bpf_redirect, bpf_skb_change_tail, bpf_skb_load_bytes,
        bpf_skb_store_bytes,
    },
};
use bridge_common::filter::counters::Reason;

use bridge_ebpf::protocol;

use crate::{
    action::DROP,
    maps::{INTERFACES, Scratch, scratch},
    mark,
    packet::{Kind, Packet, tcp},
};

const IPV4_HEADER: u32 = 20;
const IPV6_HEADER: u32 = 40;
const TCP_HEADER: u32 = 20;
const ICMP_HEADER: u32 = 8;
/// How much of the layer 4 header an ICMP error quotes (RFC 792).
const QUOTED_L4: u32 = 8;
const TTL: u8 = 64;
const ICMP_UNREACHABLE: u8 = 3;
const ICMP_PORT_UNREACHABLE: u8 = 3;
const ICMPV6_UNREACHABLE: u8 = 1;
const ICMPV6_PORT_UNREACHABLE: u8 = 4;

/// Whether a packet is answered: TCP other than RST, and UDP. Packets with options, extension headers, or a VLAN tag inside
/// the buffer are dropped silently. So are segments that cannot belong to the handshake of their ports: the RST, seen on
/// its way to the initiator, would end it.
#[inline(always)]
pub(crate) fn is_answerable(packet: &Packet, reason: Reason) -> bool {
    if matches!(reason, Reason::invalid_state | Reason::spoofed) {
        return false;
    }
    let plain_header = if packet.version == 4 { IPV4_HEADER } else { IPV6_HEADER };
    if packet.l3 != 0 || packet.l4 != plain_header || !packet.is_intact() {
        return false;
    }
    // It holds no layer 4 header.
    if packet.kind == Kind::LaterFragment {
        return false;
    }
    match packet.protocol {
        protocol::TCP => packet.detail & tcp::RST == 0,
        protocol::UDP => true,
        _ => false,
    }
}

/// Turns the packet of [`scratch`] into its answer and sends it back. Returns the TC action.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn answer(skb: *mut __sk_buff) -> i32 {
    let Some(Scratch { packet, .. }) = scratch() else { return DROP };
    // SAFETY: the context is valid while the program runs.
    let ifindex = unsafe { (*skb).ifindex };
    // SAFETY: only copied.
    let Some(interface) = (unsafe { INTERFACES.get(&ifindex) }) else { return DROP };
    let buffer = Buffer { skb, l3: interface.link_header };
    let written =
        if packet.protocol == protocol::TCP { reset(&buffer, packet) } else { unreachable(&buffer, packet) };
    if written.is_none() || (interface.link_header != 0 && buffer.turn_link_header().is_none()) {
        return DROP;
    }
    mark::put(skb, mark::JUDGED);
    // SAFETY: no precondition.
    unsafe { bpf_redirect(ifindex, 0) as i32 }
}

/// The packet, with the offset of its network header from its first byte.
struct Buffer {
    skb: *mut __sk_buff,
    l3: u32,
}

impl Buffer {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = [0u8; N];
        // SAFETY: the helper writes N bytes to the array, and checks the offset.
        let result =
            unsafe { bpf_skb_load_bytes(self.skb.cast(), offset, bytes.as_mut_ptr().cast(), N as u32) };
        (result == 0).then_some(bytes)
    }

    #[inline(always)]
    fn store<const N: usize>(&self, offset: u32, bytes: &[u8; N]) -> Option<()> {
        // SAFETY: the helper reads N bytes from the array, and checks the offset.
        let result =
            unsafe { bpf_skb_store_bytes(self.skb.cast(), offset, bytes.as_ptr().cast(), N as u32, 0) };
        (result == 0).then_some(())
    }

    /// Cuts or extends the packet to `length` bytes after the link layer header.
    #[inline(always)]
    fn resize(&self, length: u32) -> Option<()> {
        // SAFETY: no precondition.
        let result = unsafe { bpf_skb_change_tail(self.skb, self.l3 + length, 0) };
        (result == 0).then_some(())
    }

    /// Swaps the two Ethernet addresses.
    #[inline(always)]
    fn turn_link_header(&self) -> Option<()> {
        let old = self.load::<12>(0)?;
        let mut new = [0u8; 12];
        new[..6].copy_from_slice(&old[6..]);
        new[6..].copy_from_slice(&old[..6]);
        self.store(0, &new)
    }

    /// Whether the sender has left the checksum at `offset` to the device (`CHECKSUM_PARTIAL`).
    ///
    /// Programs cannot see that, but the kernel updates such a checksum only for changes of the pseudo-header
    /// (`inet_proto_csum_replace4`, net/core/utils.c): a change of anything else leaves it as it is.
    #[inline(always)]
    fn checksum_is_partial(&self, offset: u32) -> Option<bool> {
        let before = self.load::<2>(offset)?;
        // SAFETY: no precondition.
        let result = unsafe { bpf_l4_csum_replace(self.skb, offset, 0, 1, 4) };
        if result != 0 {
            return None;
        }
        Some(self.load::<2>(offset)? == before)
    }
}

/// The sum of bytes in the arithmetic of RFC 1071, added to `seed`. N must be a multiple of 4.
#[inline(always)]
fn sum<const N: usize>(bytes: &mut [u8; N], seed: u32) -> u32 {
    const { assert!(N.is_multiple_of(4)) };
    // SAFETY: the helper reads N bytes.
    unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, bytes.as_mut_ptr().cast(), N as u32, seed) as u32 }
}

/// The sum as 16 bits, in the order that it is stored in.
#[inline(always)]
fn fold(sum: u32) -> u16 {
    let folded = (sum & 0xffff) + (sum >> 16);
    ((folded & 0xffff) + (folded >> 16)) as u16
}

/// The sum of the pseudo-header of an answer of `length` bytes (RFC 9293, 3.1; RFC 8200, 8.1).
#[inline(always)]
fn pseudo_header(packet: &Packet, next_header: u8, length: u32) -> u32 {
    let mut addresses = [0u8; 32];
    // The prefix of mapped IPv4 addresses must not count.
    if packet.version == 4 {
        addresses[..4].copy_from_slice(&packet.source.v4());
        addresses[4..8].copy_from_slice(&packet.destination.v4());
    } else {
        addresses[..16].copy_from_slice(&packet.source.octets);
        addresses[16..].copy_from_slice(&packet.destination.octets);
    }
    let mut rest = [0u8; 8];
    rest[..4].copy_from_slice(&length.to_be_bytes());
    rest[7] = next_header;
    sum(&mut rest, sum(&mut addresses, 0))
}

/// The IPv4 header of an answer with `length` bytes behind it.
#[inline(always)]
fn ipv4_header(packet: &Packet, next_header: u8, length: u32) -> [u8; IPV4_HEADER as usize] {
    let total = ((IPV4_HEADER + length) as u16).to_be_bytes();
    let from = packet.destination.v4();
    let to = packet.source.v4();
    let mut header = [
        0x45,
        0,
        total[0],
        total[1],
        0,
        0,
        0x40,
        0,
        TTL,
        next_header,
        0,
        0,
        from[0],
        from[1],
        from[2],
        from[3],
        to[0],
        to[1],
        to[2],
        to[3],
    ];
    let checksum = (!fold(sum(&mut header, 0))).to_ne_bytes();
    header[10] = checksum[0];
    header[11] = checksum[1];
    header
}

/// The IPv6 header of an answer with `length` bytes behind it.
#[inline(always)]
fn ipv6_header(packet: &Packet, next_header: u8, length: u32) -> [u8; IPV6_HEADER as usize] {
    let mut header = [0u8; IPV6_HEADER as usize];
    let payload = (length as u16).to_be_bytes();
    header[0] = 0x60;
    header[4] = payload[0];
    header[5] = payload[1];
    header[6] = next_header;
    header[7] = TTL;
    header[8..24].copy_from_slice(&packet.destination.octets);
    header[24..40].copy_from_slice(&packet.source.octets);
    header
}

/// An RST as RFC 9293, 3.10.7.1 wants it.
#[inline(always)]
fn reset(buffer: &Buffer, packet: &Packet) -> Option<()> {
    let l4 = buffer.l3 + packet.l4;
    let partial = buffer.checksum_is_partial(l4 + 16)?;
    buffer.resize(packet.l4 + TCP_HEADER)?;
    let (sequence, acknowledgement, flags) = if packet.detail & tcp::ACK != 0 {
        (packet.acknowledgement, 0, tcp::RST)
    } else {
        // SAFETY: the context is valid while the program runs.
        let length = u32::from(packet.detail & tcp::SYN != 0)
            + u32::from(packet.detail & tcp::FIN != 0)
            + packet.end.wrapping_sub(packet.l4 + packet.tcp_header);
        (0, packet.sequence.wrapping_add(length), tcp::RST | tcp::ACK)
    };
    let mut header = [0u8; TCP_HEADER as usize];
    header[..2].copy_from_slice(&packet.destination_port);
    header[2..4].copy_from_slice(&packet.source_port);
    header[4..8].copy_from_slice(&sequence.to_be_bytes());
    header[8..12].copy_from_slice(&acknowledgement.to_be_bytes());
    header[12] = (TCP_HEADER as u8 / 4) << 4;
    header[13] = flags;
    let pseudo = pseudo_header(packet, protocol::TCP, TCP_HEADER);
    let checksum = if partial { fold(pseudo) } else { !fold(sum(&mut header, pseudo)) }.to_ne_bytes();
    header[16] = checksum[0];
    header[17] = checksum[1];
    buffer.store(l4, &header)?;
    if packet.version == 4 {
        buffer.store(buffer.l3, &ipv4_header(packet, protocol::TCP, TCP_HEADER))
    } else {
        buffer.store(buffer.l3, &ipv6_header(packet, protocol::TCP, TCP_HEADER))
    }
}

/// ICMP port unreachable (RFC 792, RFC 4443) with the IP header and the UDP header of what it answers.
#[inline(always)]
fn unreachable(buffer: &Buffer, packet: &Packet) -> Option<()> {
    let l4 = buffer.l3 + packet.l4;
    // Read before the test of the checksum changes it.
    if packet.version == 4 {
        let mut quote = buffer.load::<{ (IPV4_HEADER + QUOTED_L4) as usize }>(buffer.l3)?;
        let partial = buffer.checksum_is_partial(l4 + 6)?;
        let length = ICMP_HEADER + IPV4_HEADER + QUOTED_L4;
        buffer.resize(IPV4_HEADER + length)?;
        let icmp = icmp_header(ICMP_UNREACHABLE, ICMP_PORT_UNREACHABLE, &mut quote, partial, 0);
        buffer.store(l4, &icmp)?;
        buffer.store(l4 + ICMP_HEADER, &quote)?;
        buffer.store(buffer.l3, &ipv4_header(packet, protocol::ICMP, length))
    } else {
        let mut quote = buffer.load::<{ (IPV6_HEADER + QUOTED_L4) as usize }>(buffer.l3)?;
        let partial = buffer.checksum_is_partial(l4 + 6)?;
        let length = ICMP_HEADER + IPV6_HEADER + QUOTED_L4;
        buffer.resize(IPV6_HEADER + length)?;
        let pseudo = pseudo_header(packet, protocol::ICMPV6, length);
        let icmp = icmp_header(ICMPV6_UNREACHABLE, ICMPV6_PORT_UNREACHABLE, &mut quote, partial, pseudo);
        buffer.store(l4, &icmp)?;
        buffer.store(l4 + ICMP_HEADER, &quote)?;
        buffer.store(buffer.l3, &ipv6_header(packet, protocol::ICMPV6, length))
    }
}

/// The header of an ICMP error. Where the checksum is left to the sender of the packet, that will write it to
/// offset 6, where UDP has its own: into bytes that the error does not use, so that the whole adds up all the same.
#[inline(always)]
fn icmp_header<const N: usize>(
    icmp_type: u8,
    code: u8,
    quote: &mut [u8; N],
    partial: bool,
    pseudo: u32,
) -> [u8; ICMP_HEADER as usize] {
    let mut header = [icmp_type, code, 0, 0, 0, 0, 0, 0];
    if partial {
        header[6..8].copy_from_slice(&fold(pseudo).to_ne_bytes());
    } else {
        let checksum = !fold(sum(quote, sum(&mut header, pseudo)));
        header[2..4].copy_from_slice(&checksum.to_ne_bytes());
    }
    header
}
