//! The path of a packet at an ingress hook: cache, headers, flow table, scope, policy, verdict.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use aya_log_ebpf::debug;
use bridge_common::filter::{
    counters::Reason,
    flow::{Flow, flag},
    policy::{direction, reference},
};
use bridge_ebpf::protocol;

use crate::{
    active::Active,
    cache, fast_path,
    maps::{FLOWS, HALF_OPEN, Route, Scratch, scratch},
    mark,
    packet::{Kind, Packet},
    parse, policy, report, scope,
    sides::Sides,
    track::{self, Admission, TrackVerdict},
    verdict::{self, NEXT, Verdict},
};

/// The ingress hook of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Hook {
    /// From the LAN into the node.
    External,
    /// From a pod into the node.
    Internal,
}

/// Judges a packet that came in by an interface.
#[inline(always)]
pub(crate) fn judge(skb: *mut __sk_buff, hook: Hook) -> i32 {
    let Some(scratch) = scratch() else { return NEXT };
    let packet = &mut scratch.packet;
    mark::take_off(skb);
    let action = cache::serve(skb, hook as u32);
    if action != cache::MISS {
        return action;
    }
    if !parse::parse(skb, packet) {
        return NEXT;
    }
    let Some(active) = Active::get() else {
        debug!(&TcContext::new(skb), "no active policy: packet passes");
        return NEXT;
    };
    let mut found = 0;
    if packet.follows_flow()
        && let Some(flow) = FLOWS.get_ptr_mut(&packet.key)
    {
        found = FLOW_OF_PORTS;
        // SAFETY: a valid element; the fields that racing CPUs write are single bytes and a time stamp.
        let flow = unsafe { &mut *flow };
        let from_initiator = flow.initiator == packet.end_of_source;
        let from_lan = from_initiator == (flow.direction != direction::OUTBOUND);
        let spoofed = from_lan && hook == Hook::Internal;
        if !spoofed
            && track::is_usable(flow, active.settings, active.now)
            && track::established(flow, packet, from_initiator, active.now) == TrackVerdict::Pass
        {
            // SAFETY: the context is valid while the program runs.
            let length = unsafe { (*skb).len };
            if flow.flags & flag::AUDIT != 0 {
                report::count_audited(flow.direction, Reason::established, length);
            } else {
                report::count(flow.direction, Reason::established, length);
            }
            let action = match fast_path::control(active.now) {
                Some(_) => fast_path::forward(skb, flow, from_lan.into(), active.now),
                None => {
                    scratch.route.kind = Route::STACK;
                    mark::put_on(skb, flow.direction);
                    NEXT
                }
            };
            cache::remember(flow, active.now);
            return action;
        }
    }
    // Called here rather than in `decide`: with that frame, too, the stack would exceed 512 bytes on Linux 6.1, which rounds
    // each frame up to 32 bytes.
    if packet.kind == Kind::Error && packet.is_intact() && quotes_flow(skb, active.slot, active.now) != 0 {
        found = FLOW_OF_QUOTE;
    }
    judge_unknown(skb, active.slot, hook as u32, active.now, found)
}

/// The flow table has an entry for the packet's ports, but the packet does not belong to it.
const FLOW_OF_PORTS: u32 = 1;
/// The packet is an ICMP error about a known flow: see [`quotes_flow`].
const FLOW_OF_QUOTE: u32 = 2;

/// Judges a packet that belongs to no established flow; `found` is [`FLOW_OF_PORTS`], [`FLOW_OF_QUOTE`] or 0.
///
/// This and the other functions with C linkage are subprograms: the verifier checks each once, for any arguments. Inlined,
/// the paths through one would multiply with the paths through the next.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_unknown(skb: *mut __sk_buff, slot: u32, hook: u32, now: u64, found: u32) -> i32 {
    let Some(Scratch { packet, sides, .. }) = scratch() else { return NEXT };
    let Some(active) = Active::of_slot(slot, now) else { return NEXT };
    let from_lan = hook == Hook::External as u32;
    if !scope::find(slot, active.settings, packet, from_lan, sides) {
        return NEXT;
    }
    // SAFETY: the context is valid while the program runs.
    let length = unsafe { (*skb).len };
    let verdict = decide(from_lan, found, &active, sides, packet, length);
    verdict::conclude(skb, &active, sides, packet, &verdict, length)
}

#[inline(always)]
fn decide(
    from_lan: bool,
    found: u32,
    active: &Active,
    sides: &mut Sides,
    packet: &Packet,
    length: u32,
) -> Verdict {
    if !packet.is_intact() {
        return Verdict::of(packet.problem);
    }
    if sides.direction == u32::from(direction::INBOUND) && !from_lan {
        return Verdict::of(Reason::spoofed);
    }
    match packet.kind {
        Kind::LaterFragment => return Verdict::of(Reason::later_fragment),
        Kind::Error => {
            let related = found == FLOW_OF_QUOTE;
            return Verdict::of(if related { Reason::related } else { Reason::icmp_unrelated });
        }
        _ => {}
    }
    // A SYN is judged by policy, whatever came before it.
    if !(packet.protocol == protocol::TCP && packet.opens_tcp())
        && let Some(flow) = HALF_OPEN.get_ptr_mut(&packet.key)
    {
        // SAFETY: as for established flows in `judge`.
        let flow = unsafe { &mut *flow };
        let from_initiator = flow.initiator == packet.end_of_source;
        if track::is_usable(flow, active.settings, active.now) {
            let (direction, audited) = (flow.direction, flow.flags & flag::AUDIT != 0);
            match track::half_open(flow, packet, from_initiator, active.now) {
                TrackVerdict::Pass => {
                    // As of every packet of the flow: a reply is no packet of the other direction.
                    sides.direction = u32::from(direction);
                    return Verdict { audited, ..Verdict::of(Reason::established) };
                }
                TrackVerdict::Deny(reason) => return Verdict::of(reason),
                TrackVerdict::Judge => {}
            }
        }
    }
    if let Err(reason) = track::opening(packet) {
        return Verdict::of(reason);
    }
    let leaf = policy::evaluate(active.slot);
    if leaf == 0 {
        return Verdict::of(Reason::no_rule);
    }
    policy::count_hit(active.slot, active.settings, leaf, length);
    if leaf & reference::DENY != 0 {
        return Verdict { leaf, ..Verdict::of(Reason::deny_rule) };
    }
    let admission = Admission {
        direction: sides.direction as u8,
        generation: active.settings.generation,
        rule: (leaf & reference::RULE) - 1,
        flags: 0,
    };
    match track::open(packet, &admission, active.settings, active.now, found == FLOW_OF_PORTS) {
        Ok(()) => Verdict { leaf, ..Verdict::of(Reason::new_flow) },
        Err(reason) => Verdict::of(reason),
    }
}

/// Returns 1 if an ICMP error quotes a packet that its addressee sent in a known flow or in one out of scope, else 0.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn quotes_flow(skb: *mut __sk_buff, slot: u32, now: u64) -> u32 {
    let Some(Scratch { packet: error, quoted, .. }) = scratch() else { return 0 };
    let Some(active) = Active::of_slot(slot, now) else { return 0 };
    let settings = active.settings;
    if !parse::parse_quoted(skb, error, quoted) || quoted.source != error.destination {
        return 0;
    }
    if !scope::is_judged(slot, settings, quoted) {
        // About a flow that is out of scope.
        return 1;
    }
    // SAFETY: valid elements, only read.
    let is_usable = |flow: *const Flow| track::is_usable(unsafe { &*flow }, settings, now);
    let known = FLOWS.get_ptr(&quoted.key).is_some_and(is_usable)
        || HALF_OPEN.get_ptr(&quoted.key).is_some_and(is_usable);
    u32::from(known)
}
