//! Questions to the routing table.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{bpf_fib_lookup, bpf_skb_load_bytes},
};

use bridge_common::filter::address::Address;

use crate::{
    maps::{INTERFACES, Scratch, scratch},
    packet::Packet,
    values::FibLookup,
};

/// Address families of the socket API (linux/socket.h).
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// The route is known, the neighbour's address is not (linux/bpf.h).
const NO_NEIGHBOUR: i64 = 7;

/// Which end of a packet a question is about.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Source,
    Destination,
}

/// Asks for the route of a packet, as if it had come in by `input`, towards one of its ends. Returns the result of the
/// helper and its answer.
#[inline(always)]
pub(crate) fn lookup<'a>(
    skb: *mut __sk_buff,
    packet: &Packet,
    fib: &'a mut FibLookup,
    input: u32,
    towards: End,
    mtu: u16,
) -> (i64, &'a FibLookup) {
    // Towards the source from no address in particular: the kernel answers nothing to a question from a multicast or
    // link-local one, to which neighbour discovery sends (`bpf_ipv6_fib_lookup`, net/core/filter.c).
    let nowhere = Address::from_words([0; 4]);
    let (from, to) = match towards {
        End::Destination => (&packet.source, &packet.destination),
        End::Source => (&nowhere, &packet.source),
    };
    (fib.source_port, fib.destination_port) = match towards {
        End::Destination => (packet.source_port, packet.destination_port),
        End::Source => ([0; 2], [0; 2]),
    };
    fib.l4_protocol = packet.protocol;
    fib.mtu = mtu;
    fib.ifindex = input;
    fib.vlan = [0; 4];
    let [version, class, ..] = packet.head[0].to_ne_bytes();
    if packet.version == 4 {
        fib.family = AF_INET;
        fib.traffic_class = [class, 0, 0, 0];
        let (from, to) = (from.v4(), to.v4());
        fib.source[..4].copy_from_slice(&from);
        fib.destination[..4].copy_from_slice(&to);
    } else {
        fib.family = AF_INET6;
        fib.traffic_class = packet.head[0].to_ne_bytes();
        fib.traffic_class[0] = version & 0xf;
        fib.source = from.octets;
        fib.destination = to.octets;
    }
    let size = size_of::<FibLookup>() as i32;
    // SAFETY: the helper reads and writes 64 bytes, laid out as `struct bpf_fib_lookup`.
    let result = unsafe { bpf_fib_lookup(skb.cast(), (&raw mut *fib).cast(), size, 0) };
    (result, fib)
}

/// Bits of the question of [`route_of`].
pub(crate) const TO_SOURCE: u32 = 1;
/// The packet must also come from the next hop's link layer address.
pub(crate) const FROM_NEXT_HOP: u32 = 2;
/// Only a route without a gateway counts.
pub(crate) const DIRECT: u32 = 4;

/// Returns the index of the interface that the route to the source, or the destination, of the packet of [`scratch`] leads
/// out by; 0: there is no such route, or, with [`FROM_NEXT_HOP`], the packet does not come from its next hop, or, with
/// [`DIRECT`], the route has a gateway.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn route_of(skb: *mut __sk_buff, input: u32, question: u32) -> u32 {
    let Some(Scratch { packet, fib, .. }) = scratch() else { return 0 };
    let (answer, route) = if question & TO_SOURCE != 0 {
        lookup(skb, packet, fib, input, End::Source, 0)
    } else {
        lookup(skb, packet, fib, input, End::Destination, 0)
    };
    if answer != 0 && (answer != NO_NEIGHBOUR || question & FROM_NEXT_HOP != 0) {
        return 0;
    }
    if question & DIRECT != 0 {
        // The helper puts the gateway in place of the destination.
        let [a, b, c, d, ..] = route.destination;
        let direct = if packet.version == 4 {
            [a, b, c, d] == packet.destination.v4()
        } else {
            route.destination == packet.destination.octets
        };
        if !direct {
            return 0;
        }
    }
    if question & FROM_NEXT_HOP != 0 {
        // SAFETY: only copied.
        let Some(interface) = (unsafe { INTERFACES.get(&route.ifindex) }) else { return 0 };
        let mut addresses = [0u16; 6];
        if interface.link_header != 0 {
            // SAFETY: the helper writes 12 bytes to the array, and checks the offset.
            if unsafe { bpf_skb_load_bytes(skb.cast(), 0, addresses.as_mut_ptr().cast(), 12) } != 0 {
                return 0;
            }
            let [_, _, _, a, b, c] = addresses;
            let [d, e, f] = route.destination_address;
            if a != d || b != e || c != f {
                return 0;
            }
        }
    }
    route.ifindex
}
