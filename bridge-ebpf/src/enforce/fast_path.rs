//! The fast path: packets of established flows, from interface to interface past the network stack.
//!
//! [`learn`] sees where the stack brings the packets of a flow, [`forward`] does the same without it. See
//! `bridge_common::fast_path`.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{
        bpf_fib_lookup, bpf_redirect, bpf_redirect_peer, bpf_skb_load_bytes, bpf_skb_store_bytes,
    },
};
use bridge_common::{
    fast_path::{Control, LEASE_TICKS, Outcome, Path, ability, means, protocols, ticks, towards},
    flow::{Flow, flag, state},
    policy::direction,
};

use crate::{
    NEXT,
    maps::{FAST_PATH, INTERFACES, OUTCOMES, Scratch, scratch},
    packet::{Packet, protocol, tcp},
};

const ETHERNET: u32 = 14;
/// Address families of the socket API (linux/socket.h).
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// In `__sk_buff::tc_index`: has taken the fast path. Nothing but classifiers of times past reads that field.
const TAKEN: u32 = 0xb21d;
const BPF_F_RECOMPUTE_CSUM: u64 = 1;

/// Whether flows may take the fast path at all, and the epoch.
#[inline(always)]
fn control(now: u64) -> Option<&'static Control> {
    FAST_PATH.get(0).filter(|control| control.until > now)
}

/// Why a packet of a flow cannot take the fast path, whatever its way.
#[inline(always)]
fn obstacle(control: &Control, flow: &Flow, packet: &Packet) -> Option<Outcome> {
    let (allowed, settled) = match packet.protocol {
        protocol::TCP => (protocols::TCP, state::ESTABLISHED),
        protocol::UDP => (protocols::UDP, state::UDP_REPLIED),
        _ => return Some(Outcome::protocol),
    };
    if control.protocols & allowed == 0 {
        return Some(Outcome::off);
    }
    let turning = packet.protocol == protocol::TCP && packet.detail & (tcp::SYN | tcp::FIN | tcp::RST) != 0;
    if flow.state != settled || turning || flow.flags & flag::AUDIT != 0 {
        return Some(Outcome::state);
    }
    if packet.plain == 0 {
        return Some(Outcome::header);
    }
    None
}

/// Sends the packet of [`scratch`], of an established flow, on its way, if the way is known, or lets it go the normal one.
/// What to return from the program.
///
/// A subprogram, as `judge::judge_unknown`: what it has on its stack is not there for others.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn forward(skb: *mut __sk_buff, flow: *const Flow, from_lan: u32, now: u64) -> i32 {
    // SAFETY: a valid element, or null as far as the verifier knows.
    let Some(flow) = (unsafe { flow.as_ref() }) else { return NEXT };
    let Some(Scratch { packet, .. }) = scratch() else { return NEXT };
    // SAFETY: the context is valid while the program runs.
    let length = unsafe { (*skb).len };
    let (action, outcome) = match try_forward(skb, packet, flow, from_lan != 0, now) {
        Ok(action) => (action, Outcome::forwarded),
        Err(outcome) => (NEXT, outcome),
    };
    count(flow.direction, outcome, length);
    action
}

#[inline(always)]
fn try_forward(
    skb: *mut __sk_buff,
    packet: &Packet,
    flow: &Flow,
    from_lan: bool,
    now: u64,
) -> Result<i32, Outcome> {
    let Some(control) = control(now) else { return Err(Outcome::off) };
    if let Some(obstacle) = obstacle(control, flow, packet) {
        return Err(obstacle);
    }
    let (path, back) = if from_lan {
        (&flow.paths[towards::POD], &flow.paths[towards::LAN])
    } else {
        (&flow.paths[towards::LAN], &flow.paths[towards::POD])
    };
    if path.input == 0 || back.input == 0 {
        return Err(Outcome::unseen);
    }
    if !path.holds(ticks(now), control.epoch) || back.epoch != control.epoch {
        return Err(Outcome::expired);
    }
    // SAFETY: the context is valid while the program runs.
    let (ifindex, tagged) = unsafe { ((*skb).ifindex, (*skb).vlan_present) };
    if path.input != ifindex || tagged != 0 {
        return Err(Outcome::interface);
    }
    if segment_length(skb, packet) > u32::from(path.mtu) {
        return Err(Outcome::mtu);
    }
    let written =
        if packet.version == 4 { rewrite_v4(skb, packet, path) } else { rewrite_v6(skb, packet, path) };
    if !written {
        return Err(Outcome::ttl);
    }
    // SAFETY: no precondition; the context is valid while the program runs.
    Ok(unsafe {
        if path.means == means::PEER {
            bpf_redirect_peer(path.output, 0) as i32
        } else {
            (*skb).tc_index = TAKEN;
            bpf_redirect(path.output, 0) as i32
        }
    })
}

/// The longest packet that comes of this one on the wire, from the IP header on.
#[inline(always)]
fn segment_length(skb: *mut __sk_buff, packet: &Packet) -> u32 {
    // SAFETY: the context is valid while the program runs.
    let (length, gso_size) = unsafe { ((*skb).len, (*skb).gso_size) };
    if gso_size == 0 {
        return length - ETHERNET;
    }
    let header = if packet.protocol == protocol::TCP { packet.tcp_header } else { 8 };
    packet.l4 + header + gso_size
}

/// Writes the Ethernet header, and takes one off the time to live. `false`: nothing is left of that.
#[inline(always)]
fn rewrite_v4(skb: *mut __sk_buff, packet: &Packet, path: &Path) -> bool {
    let head = &packet.head;
    if head[8] <= 1 {
        return false;
    }
    let mut bytes = [0u8; 26];
    bytes[..12].copy_from_slice(&path.addresses);
    bytes[12] = 0x08;
    bytes[14..].copy_from_slice(head);
    bytes[22] = head[8] - 1;
    // As `ip_decrease_ttl` (include/net/ip.h): RFC 1624.
    let checksum = u32::from(u16::from_be_bytes([head[10], head[11]])) + 0x100;
    let checksum = ((checksum + u32::from(checksum >= 0xffff)) as u16).to_be_bytes();
    bytes[24] = checksum[0];
    bytes[25] = checksum[1];
    // The sum over the header stays what it was, and so does that of a device that has summed up the whole packet.
    // SAFETY: the helper reads as many bytes from the array, and checks the offset.
    unsafe { bpf_skb_store_bytes(skb.cast(), 0, bytes.as_ptr().cast(), bytes.len() as u32, 0) == 0 }
}

/// As [`rewrite_v4`].
#[inline(always)]
fn rewrite_v6(skb: *mut __sk_buff, packet: &Packet, path: &Path) -> bool {
    let hop_limit = packet.head[7];
    if hop_limit <= 1 {
        return false;
    }
    let mut bytes = [0u8; 14];
    bytes[..12].copy_from_slice(&path.addresses);
    (bytes[12], bytes[13]) = (0x86, 0xdd);
    let next = [hop_limit - 1];
    // SAFETY: the helpers read as many bytes from the arrays, and check the offset.
    unsafe {
        bpf_skb_store_bytes(skb.cast(), ETHERNET + 7, next.as_ptr().cast(), 1, BPF_F_RECOMPUTE_CSUM) == 0
            && bpf_skb_store_bytes(skb.cast(), 0, bytes.as_ptr().cast(), bytes.len() as u32, 0) == 0
    }
}

/// Counts what became of a packet of an established flow.
#[inline(always)]
fn count(direction: u8, outcome: Outcome, length: u32) {
    let Some(outcomes) = OUTCOMES.get_ptr_mut(u32::from(direction)) else { return };
    // SAFETY: the element is this CPU's own.
    let outcomes = unsafe { &mut *outcomes };
    if let Some(counter) = outcomes.by_outcome.get_mut(core::hint::black_box(outcome as usize)) {
        counter.packets += 1;
        counter.bytes += u64::from(length);
    }
}

/// Whether a packet at the egress hook has come by the fast path. Its mark is taken off.
#[inline(always)]
pub(crate) fn has_taken(skb: *mut __sk_buff) -> bool {
    // SAFETY: the context is valid while the program runs.
    unsafe {
        let taken = (*skb).tc_index == TAKEN;
        if taken {
            (*skb).tc_index = 0;
        }
        taken
    }
}

/// Takes note of where the network stack has brought the packet of [`scratch`], of an established flow: to the egress hook
/// of the interface that it leaves by. 1: it was worth noting, else 0.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn learn(skb: *mut __sk_buff, flow: *mut Flow, from_lan: u32, now: u64) -> u32 {
    // SAFETY: a valid element, or null as far as the verifier knows. What racing CPUs write is the same, or else not used
    // before another packet has confirmed it.
    let Some(flow) = (unsafe { flow.as_mut() }) else { return 0 };
    let Some(Scratch { packet, .. }) = scratch() else { return 0 };
    let Some(control) = control(now) else { return 0 };
    if obstacle(control, flow, packet).is_some() || flow.direction == direction::NODE_PORT {
        return 0;
    }
    let path = if from_lan != 0 { &mut flow.paths[towards::POD] } else { &mut flow.paths[towards::LAN] };
    let now = ticks(now);
    if path.holds(now, control.epoch) {
        return 0;
    }
    // Before the tables are asked: what changes after that brings another epoch.
    let epoch = control.epoch;
    let Some(seen) = way(skb, packet) else { return 0 };
    let same = path.input == seen.input
        && path.output == seen.output
        && path.mtu == seen.mtu
        && path.means == seen.means
        && path.addresses == seen.addresses;
    if same {
        // The last word: whoever reads the epoch finds the rest in place, which was written by an earlier packet.
        path.expires = now.wrapping_add(LEASE_TICKS);
        path.epoch = epoch;
    } else {
        *path = seen;
    }
    1
}

/// `struct bpf_fib_lookup` (linux/bpf.h), with the members of its unions that matter here.
#[repr(C)]
struct FibLookup {
    family: u8,
    l4_protocol: u8,
    source_port: [u8; 2],
    destination_port: [u8; 2],
    /// In: anything but 0 asks for the MTU of the route; out: that.
    mtu: u16,
    /// In: of the interface that the packet came in by; out: that it leaves by.
    ifindex: u32,
    /// IPv4: type of service in the first byte; IPv6: first word of the header, without the version.
    traffic_class: [u8; 4],
    source: [u8; 16],
    destination: [u8; 16],
    vlan: [u8; 4],
    source_address: [u8; 6],
    destination_address: [u8; 6],
}
const _: () = assert!(size_of::<FibLookup>() == 64);

/// Which way a packet has taken, if it is the one that the routing table and the neighbour table say it must take, and
/// the fast path may take it too.
#[inline(always)]
fn way(skb: *mut __sk_buff, packet: &Packet) -> Option<Path> {
    // SAFETY: the context is valid while the program runs.
    let (input, output) = unsafe { ((*skb).ingress_ifindex, (*skb).ifindex) };
    // SAFETY: only copied.
    let (from, to) = unsafe { (*INTERFACES.get(&input)?, *INTERFACES.get(&output)?) };
    if from.fast_path & ability::INPUT == 0 || to.fast_path & ability::OUTPUT == 0 {
        return None;
    }
    let mut addresses = [0u8; 12];
    // SAFETY: the helper writes 12 bytes to the array, and checks the offset.
    if unsafe { bpf_skb_load_bytes(skb.cast(), 0, addresses.as_mut_ptr().cast(), 12) } != 0 {
        return None;
    }
    let head = &packet.head;
    let mut lookup = FibLookup {
        family: AF_INET,
        l4_protocol: packet.protocol,
        source_port: packet.source_port,
        destination_port: packet.destination_port,
        mtu: 1,
        ifindex: input,
        traffic_class: [head[1], 0, 0, 0],
        source: [0; 16],
        destination: [0; 16],
        vlan: [0; 4],
        source_address: [0; 6],
        destination_address: [0; 6],
    };
    if packet.version == 4 {
        lookup.source[..4].copy_from_slice(&packet.source.v4());
        lookup.destination[..4].copy_from_slice(&packet.destination.v4());
    } else {
        lookup.family = AF_INET6;
        lookup.traffic_class = [head[0] & 0xf, head[1], head[2], head[3]];
        lookup.source = packet.source.octets;
        lookup.destination = packet.destination.octets;
    }
    let size = size_of::<FibLookup>() as i32;
    // SAFETY: the helper reads and writes 64 bytes, laid out as `struct bpf_fib_lookup`.
    if unsafe { bpf_fib_lookup(skb.cast(), (&raw mut lookup).cast(), size, 0) } != 0 {
        return None;
    }
    let same = lookup.ifindex == output
        && addresses[..6] == lookup.destination_address
        && addresses[6..] == lookup.source_address;
    same.then_some(Path {
        expires: 0,
        epoch: 0,
        input,
        output,
        mtu: lookup.mtu,
        means: if to.fast_path & ability::PEER != 0 { means::PEER } else { means::QUEUE },
        padding: 0,
        addresses,
    })
}
