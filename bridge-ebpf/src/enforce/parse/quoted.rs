//! Reads layer 4 of the packet inside an ICMP error.

use aya_ebpf::bindings::__sk_buff;
use bridge_ebpf::protocol;

use super::{
    icmp::{icmp_kind, icmpv6_kind},
    words::load,
};
use crate::packet::{Kind, Packet};

/// Beside the IP version: the packet is quoted by an ICMP error.
pub(super) const QUOTED: u32 = 1 << 8;

/// Returns `false` if the quoted packet belongs to no flow that could be known.
#[inline(always)]
pub(super) fn parse_quoted_l4(skb: *mut __sk_buff, packet: &mut Packet) -> bool {
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
