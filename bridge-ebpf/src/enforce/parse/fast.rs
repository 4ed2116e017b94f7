//! Reads the packets that nearly all packets are, directly from the linear part of the buffer.

use aya_ebpf::bindings::__sk_buff;
use bridge_common::filter::{address::Address, counters::Reason};
use bridge_ebpf::protocol;

use super::{
    general::tcp_header,
    words::{ETH_P_IP, ETH_P_IPV6, ETHERNET, Word, is_ethernet},
};
use crate::packet::{Kind, Packet, tcp};

/// Length of a UDP header, and of a TCP header without options.
const UDP_HEADER: usize = 8;
const TCP_HEADER: usize = 20;

/// Reads the common packet in place: TCP or UDP in IP in Ethernet, without options, all headers in the linear part.
/// Returns 0 for every other packet, which [`super::general`] reads.
#[unsafe(no_mangle)]
#[inline(never)]
pub(super) extern "C" fn parse_plain(skb: *mut __sk_buff, ether_type: u32, packet: *mut Packet) -> u32 {
    // SAFETY: a packet of the caller's, or null as far as the verifier knows.
    let Some(packet) = (unsafe { packet.as_mut() }) else { return 0 };
    u32::from(read_plain(skb, ether_type as u16, packet))
}

/// See [`parse_plain`].
#[inline(always)]
fn read_plain(skb: *mut __sk_buff, ether_type: u16, packet: &mut Packet) -> bool {
    // SAFETY: the context is valid while the program runs; the verifier checks the access, and every read
    // below follows a comparison with the end.
    let (start, end) = unsafe { ((*skb).data as usize, (*skb).data_end as usize) };
    if start + ETHERNET + 20 + UDP_HEADER > end {
        return false;
    }
    // SAFETY: as above.
    if !is_ethernet(skb, unsafe { *(start as *const u8) }) {
        return false;
    }
    read_frame(start, end, ether_type, packet)
}

/// Reads an Ethernet frame of this type from `start` to `end`, which point into the packet. Returns `false` for every packet
/// that is not plain; see [`parse_plain`].
#[inline(always)]
pub(crate) fn read_frame(start: usize, end: usize, ether_type: u16, packet: &mut Packet) -> bool {
    let words = |offset: usize| (start + offset) as *const Word;
    if start + ETHERNET + 20 + UDP_HEADER > end {
        return false;
    }
    // SAFETY: every read follows a comparison with the end. To the kernel, words of a header are aligned where it lets programs
    // read them (`check_pkt_ptr_alignment`, kernel/bpf/verifier.c).
    let word = |offset: usize| unsafe { *words(ETHERNET + offset) };
    packet.l3 = 0;
    packet.kind = Kind::Plain;
    packet.problem = Reason::established;
    packet.plain = 1;
    packet.first_fragment = 0;
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
            if packet.source.is_v4() || packet.destination.is_v4() {
                return false;
            }
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

/// The headers of a packet that the flow cache may serve.
pub(crate) struct PlainV4 {
    /// Source address; addresses and ports as they lie in the header.
    pub(crate) source: u32,
    pub(crate) destination: u32,
    pub(crate) ports: u32,
    pub(crate) protocol: u8,
    pub(crate) headers: Headers,
}

impl PlainV4 {
    /// Source and destination port, as they lie in the header.
    #[inline(always)]
    pub(crate) fn ports(&self) -> [u16; 2] {
        Word(self.ports).ports().map(u16::from_ne_bytes)
    }
}

/// Reads an IPv4 packet that [`parse_plain`] would read and that changes nothing in an established flow: UDP, or TCP
/// without SYN, FIN and RST. Returns `None` for every other packet.
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
            // Every other valid combination opens or ends a connection.
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

/// The headers of a packet that the fast path may forward.
pub(crate) struct Headers {
    /// See [`Packet::head`].
    pub(crate) head: [u32; 3],
    /// 4 or 6.
    pub(crate) version: u8,
    /// From the IP header to the payload, in bytes.
    pub(crate) length: u32,
}
