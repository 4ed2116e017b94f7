//! The fast path: packets of established flows, from interface to interface past the network stack.
//!
//! [`learn`] observes where the network stack sends the packets of a flow, [`forward`] sends them there without it. See
//! `bridge_common::filter::fast_path`.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{bpf_redirect, bpf_redirect_peer, bpf_skb_load_bytes, bpf_skb_store_bytes},
};
use bridge_common::filter::{
    fast_path::{Control, LEASE_TICKS, Lease, Outcome, Path, ability, means, ticks, towards},
    flow::Flow,
    policy::direction,
};

use bridge_ebpf::protocol;

use crate::{
    action::NEXT,
    fib::{self, End},
    maps::{FAST_PATH, INTERFACES, OUTCOMES, Route, Scratch, scratch},
    mark,
    packet::{Packet, tcp},
    parse::fast::Headers,
    paths::{held, place},
    values::FibLookup,
};

const ETHERNET: u32 = 14;
const BPF_F_RECOMPUTE_CSUM: u64 = 1;
/// The Ethernet header has the address of the interface (linux/if_packet.h): an interface in promiscuous mode hears more.
const PACKET_HOST: u32 = 0;

/// Returns the control word if flows may take the fast path.
#[inline(always)]
pub(crate) fn control(now: u64) -> Option<&'static Control> {
    FAST_PATH.get(0).filter(|control| control.until > now)
}

/// Returns why a packet of a flow cannot take any path.
#[inline(always)]
fn obstacle(control: &Control, flow: &Flow, packet: &Packet) -> Option<Outcome> {
    if !matches!(packet.protocol, protocol::TCP | protocol::UDP) {
        return Some(Outcome::protocol);
    }
    if !control.allows(packet.protocol) {
        return Some(Outcome::off);
    }
    let turning = packet.protocol == protocol::TCP && packet.detail & (tcp::SYN | tcp::FIN | tcp::RST) != 0;
    if turning || !flow.is_settled(packet.protocol) {
        return Some(Outcome::state);
    }
    if packet.plain == 0 {
        return Some(Outcome::header);
    }
    None
}

/// Forwards the packet of [`scratch`], of an established flow, by its path if one is known, else passes it to the network
/// stack. Returns the TC action, and notes the route in [`scratch`].
///
/// A subprogram, as `judge::judge_unknown`: its stack is free again for others afterwards.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn forward(skb: *mut __sk_buff, flow: *mut Flow, from_lan: u32, now: u64) -> i32 {
    // SAFETY: a valid element, or null as far as the verifier knows.
    let Some(flow) = (unsafe { flow.as_mut() }) else { return NEXT };
    let Some(Scratch { packet, route, .. }) = scratch() else { return NEXT };
    let leased = leased(packet, flow, from_lan != 0, now);
    route.kind = match &leased {
        Ok((lease, _)) => {
            route.lease = *lease;
            Route::PATH
        }
        Err(Outcome::off) => Route::STACK,
        Err(_) => Route::UNKNOWN,
    };
    let sent = leased.and_then(|(_, path)| {
        let l4_header = if packet.protocol == protocol::TCP { packet.tcp_header } else { 8 };
        let headers = Headers { head: packet.head, version: packet.version, length: packet.l4 + l4_header };
        send(skb, &headers, &path)
    });
    conclude(skb, flow.direction, sent)
}

/// Sends a packet of a flow of this direction by a path that it holds. Returns the TC action.
#[inline(always)]
pub(crate) fn forward_by(skb: *mut __sk_buff, headers: &Headers, path: &Path, direction: u8) -> i32 {
    conclude(skb, direction, send(skb, headers, path))
}

/// Counts the outcome of a packet of a flow of this direction, and marks the packet if it teaches no path. Returns the TC
/// action.
#[inline(always)]
pub(crate) fn conclude(skb: *mut __sk_buff, direction: u8, sent: Result<i32, Outcome>) -> i32 {
    // SAFETY: the context is valid while the program runs.
    let length = unsafe { (*skb).len };
    let (action, outcome) = match sent {
        Ok(action) => (action, Outcome::forwarded),
        Err(outcome) => {
            let learns = matches!(outcome, Outcome::unseen | Outcome::expired);
            let judged = mark::of_judged(direction);
            mark::put(skb, if learns && judged == mark::JUDGED { mark::LEARN } else { judged });
            (NEXT, outcome)
        }
    };
    count(direction, outcome, length);
    action
}

/// Returns the path of a packet of a flow, and its lease.
#[inline(always)]
fn leased(packet: &Packet, flow: &Flow, from_lan: bool, now: u64) -> Result<(Lease, Path), Outcome> {
    let Some(control) = control(now) else { return Err(Outcome::off) };
    if let Some(obstacle) = obstacle(control, flow, packet) {
        return Err(obstacle);
    }
    let towards = if from_lan { towards::POD } else { towards::LAN };
    let lease = flow.leases[towards];
    if !lease.holds(ticks(now), control.epoch) {
        let both = lease.is_known() && flow.leases[1 - towards].is_known();
        return Err(if both { Outcome::expired } else { Outcome::unseen });
    }
    held(lease.path, control.epoch).map(|path| (lease, path)).ok_or(Outcome::expired)
}

#[inline(always)]
fn send(skb: *mut __sk_buff, headers: &Headers, path: &Path) -> Result<i32, Outcome> {
    // SAFETY: the context is valid while the program runs.
    let (ifindex, to, tagged) = unsafe { ((*skb).ifindex, (*skb).pkt_type, (*skb).vlan_present) };
    if tagged != 0 {
        return Err(Outcome::header);
    }
    if path.input != ifindex || to != PACKET_HOST {
        return Err(Outcome::interface);
    }
    if segment_length(skb, headers) > u32::from(path.mtu) {
        return Err(Outcome::mtu);
    }
    let written = if headers.version == 4 {
        rewrite_v4(skb, headers.head, path)
    } else {
        rewrite_v6(skb, headers.head, path)
    };
    if !written {
        return Err(Outcome::ttl);
    }
    // SAFETY: no precondition.
    Ok(unsafe {
        if path.means == means::PEER {
            bpf_redirect_peer(path.output, 0) as i32
        } else {
            mark::put(skb, mark::JUDGED);
            bpf_redirect(path.output, 0) as i32
        }
    })
}

/// Returns the length of the longest packet that this one becomes on the wire, from the IP header on.
#[inline(always)]
fn segment_length(skb: *mut __sk_buff, headers: &Headers) -> u32 {
    // SAFETY: the context is valid while the program runs.
    let (length, gso_size) = unsafe { ((*skb).len, (*skb).gso_size) };
    if gso_size == 0 { length - ETHERNET } else { headers.length + gso_size }
}

/// Writes the Ethernet header and decrements the time to live. Returns `false` if the time to live runs out.
#[inline(always)]
fn rewrite_v4(skb: *mut __sk_buff, [first, second, third]: [u32; 3], path: &Path) -> bool {
    let [time_to_live, protocol, high, low] = third.to_ne_bytes();
    if time_to_live <= 1 {
        return false;
    }
    // As `ip_decrease_ttl` (include/net/ip.h): RFC 1624.
    let checksum = u32::from(u16::from_be_bytes([high, low])) + 0x100;
    let [high, low] = ((checksum + u32::from(checksum >= 0xffff)) as u16).to_be_bytes();
    let third = u32::from_ne_bytes([time_to_live - 1, protocol, high, low]);
    let [a, b, c] = path.addresses;
    // The type ends the Ethernet header in the middle of a word.
    let [f0, f1, f2, f3] = first.to_ne_bytes();
    let [s0, s1, s2, s3] = second.to_ne_bytes();
    let [t0, t1, t2, t3] = third.to_ne_bytes();
    let bytes = [
        a,
        b,
        c,
        u32::from_ne_bytes([0x08, 0, f0, f1]),
        u32::from_ne_bytes([f2, f3, s0, s1]),
        u32::from_ne_bytes([s2, s3, t0, t1]),
        u32::from_ne_bytes([t2, t3, 0, 0]),
    ];
    // The sum over the header stays what it was, and so does that of a device that has summed up the whole packet.
    // SAFETY: the helper reads as many bytes from the array, and checks the offset.
    unsafe { bpf_skb_store_bytes(skb.cast(), 0, bytes.as_ptr().cast(), ETHERNET + 12, 0) == 0 }
}

/// As [`rewrite_v4`].
#[inline(always)]
fn rewrite_v6(skb: *mut __sk_buff, [_, second, _]: [u32; 3], path: &Path) -> bool {
    let [.., hop_limit] = second.to_ne_bytes();
    if hop_limit <= 1 {
        return false;
    }
    let [a, b, c] = path.addresses;
    let bytes = [a, b, c, u32::from_ne_bytes([0x86, 0xdd, 0, 0])];
    let next = [hop_limit - 1];
    // SAFETY: the helpers read as many bytes from the arrays, and check the offset.
    unsafe {
        bpf_skb_store_bytes(skb.cast(), ETHERNET + 7, next.as_ptr().cast(), 1, BPF_F_RECOMPUTE_CSUM) == 0
            && bpf_skb_store_bytes(skb.cast(), 0, bytes.as_ptr().cast(), ETHERNET, 0) == 0
    }
}

/// Counts the outcome of a packet of an established flow.
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

/// Learns the path of the packet of [`scratch`], of an established flow, at the egress hook of the interface that it leaves
/// by. Returns 1 if the packet taught a path, else 0.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn learn(skb: *mut __sk_buff, flow: *mut Flow, from_lan: u32, now: u64) -> u32 {
    // SAFETY: a valid element, or null as far as the verifier knows. Racing CPUs write the same, or a path that is not used
    // before another packet confirms it.
    let Some(flow) = (unsafe { flow.as_mut() }) else { return 0 };
    let Some(Scratch { packet, fib, .. }) = scratch() else { return 0 };
    let Some(control) = control(now) else { return 0 };
    if obstacle(control, flow, packet).is_some() || flow.direction == direction::NODE_PORT {
        return 0;
    }
    let towards = if from_lan != 0 { towards::POD } else { towards::LAN };
    let epoch = Lease::epoch_of(control.epoch);
    let back = flow.leases[1 - towards].epoch;
    let lease = &mut flow.leases[towards];
    let now = ticks(now);
    if lease.holds(now, control.epoch) {
        return 0;
    }
    // `control.epoch` was read before the tables are asked: a later change brings another epoch.
    let Some(seen) = taken(skb, packet, fib) else { return 0 };
    let Some(path) = place(&seen, now, control.epoch) else { return 0 };
    // Packets of both directions have left, this one's not for the first time, and nothing has changed between them.
    let confirmed = lease.path == path && lease.epoch == epoch && back == epoch;
    (lease.path, lease.epoch) = (path, epoch);
    lease.expires = if confirmed { now.wrapping_add(LEASE_TICKS) } else { now };
    1
}

/// Returns the path that a packet has taken, if the routing table and the neighbour table say the same, and both interfaces
/// allow it to the fast path.
#[inline(always)]
fn taken(skb: *mut __sk_buff, packet: &Packet, fib: &mut FibLookup) -> Option<Path> {
    // SAFETY: the context is valid while the program runs.
    let (input, output) = unsafe { ((*skb).ingress_ifindex, (*skb).ifindex) };
    // SAFETY: only copied.
    let (from, to) = unsafe { (*INTERFACES.get(&input)?, *INTERFACES.get(&output)?) };
    if from.fast_path & ability::INPUT == 0 || to.fast_path & ability::OUTPUT == 0 {
        return None;
    }
    let mut addresses = [0u32; 3];
    // SAFETY: the helper writes 12 bytes to the array, and checks the offset.
    if unsafe { bpf_skb_load_bytes(skb.cast(), 0, addresses.as_mut_ptr().cast(), 12) } != 0 {
        return None;
    }
    let (answer, lookup) = fib::lookup(skb, packet, fib, input, End::Destination, 1);
    if answer != 0 {
        return None;
    }
    let ([d0, d1, d2], [s0, s1, s2]) = (lookup.destination_address, lookup.source_address);
    let same = lookup.ifindex == output
        && addresses[0].to_ne_bytes() == halves(d0, d1)
        && addresses[1].to_ne_bytes() == halves(d2, s0)
        && addresses[2].to_ne_bytes() == halves(s1, s2);
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

#[inline(always)]
fn halves(first: u16, second: u16) -> [u8; 4] {
    let ([a, b], [c, d]) = (first.to_ne_bytes(), second.to_ne_bytes());
    [a, b, c, d]
}
