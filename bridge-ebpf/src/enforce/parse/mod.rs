//! Reads the headers of a packet: plain TCP and UDP in one go ([`fast`]), everything else step by step ([`general`]),
//! and the packet inside an ICMP error ([`quoted`]).

pub(crate) mod fast;
mod general;
mod icmp;
mod quoted;
mod words;

use aya_ebpf::bindings::__sk_buff;

use self::{
    quoted::QUOTED,
    words::{ETH_P_IP, ETH_P_IPV6, load},
};
use crate::packet::{Kind, Packet};

const ETH_P_8021Q: u16 = 0x8100;
const ETH_P_8021AD: u16 = 0x88a8;
/// VLAN tags inside the buffer that are read.
const VLAN_TAGS: usize = 8;

/// Reads a packet. Returns `false` for packets that are not IP or too short for addresses: they cannot be in scope.
#[inline(always)]
pub(crate) fn parse(skb: *mut __sk_buff, packet: &mut Packet) -> bool {
    // SAFETY: the context is valid while the program runs; the verifier checks the access.
    let mut ether_type = u16::from_be(unsafe { (*skb).protocol } as u16);
    if fast::parse_plain(skb, ether_type.into(), packet) != 0 {
        return true;
    }
    let mut l3 = 0;
    // VLAN tags inside the buffer: the inner one of two, or both on a device without offload.
    for _ in 0..VLAN_TAGS {
        if ether_type != ETH_P_8021Q && ether_type != ETH_P_8021AD {
            break;
        }
        let Some([tag]) = load(skb, l3) else { return false };
        [_, ether_type] = tag.halves();
        l3 += 4;
    }
    match ether_type {
        ETH_P_IP => general::parse_ip(skb, l3, 4, packet) != 0,
        ETH_P_IPV6 => general::parse_ip(skb, l3, 6, packet) != 0,
        // The kernel removes any number of tags. No sender needs more than are read.
        ETH_P_8021Q | ETH_P_8021AD => {
            packet.set_unreadable();
            true
        }
        _ => false,
    }
}

/// Reads the packet that an ICMP error quotes, which holds at least 8 bytes of layer 4 (RFC 792). Returns `false` if its
/// ports cannot be read.
#[inline(always)]
pub(crate) fn parse_quoted(skb: *mut __sk_buff, error: &Packet, quoted: &mut Packet) -> bool {
    general::parse_ip(skb, error.l4 + 8, u32::from(error.version) | QUOTED, quoted) != 0
        && quoted.is_intact()
        && quoted.kind != Kind::LaterFragment
        // Not the padding of a short frame behind the error.
        && quoted.l4 <= error.end - 8
}
