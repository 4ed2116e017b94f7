//! The shield: drops packets from the LAN before the network stack makes anything of them.
//!
//! It drops a packet only where the hook behind it, [`crate::judge::ingress`], would certainly drop it in silence, and counts it as
//! that would. Every other packet goes on: headers that are not plain, a destination that is no pod of this node, a source whose
//! interface matters, a flow that may be known, a rule in audit mode, and as many denied packets as the hook may still answer or
//! report in this second.

use aya_ebpf::{
    bindings::{xdp_action, xdp_md},
    helpers::generated::bpf_xdp_get_buff_len,
};
use bridge_common::filter::{
    control::Settings,
    counters::Reason,
    event::verdict,
    policy::{AddressInfo, direction, reference, side},
    shield::Shielded,
};
use bridge_ebpf::protocol;

use crate::{
    active::Active,
    addresses::lookup_cached,
    cache, flow_filter,
    maps::{HALF_OPEN, SHIELDED, established, scratch},
    packet::Packet,
    parse::fast::read_frame,
    policy, reject,
    report::{self, EventInfo},
    scope::hosted,
    sides::SETTLED,
    track,
};

/// In nanoseconds.
const SECOND: u64 = 1_000_000_000;
/// Offset of the type in an Ethernet header.
const ETHER_TYPE: usize = 12;

/// Returns the XDP action for a packet.
#[inline(always)]
pub(crate) fn shield(xdp: *mut xdp_md) -> u32 {
    match drop_denied(xdp) {
        Some(()) => xdp_action::XDP_DROP,
        None => xdp_action::XDP_PASS,
    }
}

/// Counts a packet that is to be dropped; `None`: it goes on.
#[inline(always)]
fn drop_denied(xdp: *mut xdp_md) -> Option<()> {
    let scratch = scratch()?;
    let (packet, sides) = (&mut scratch.packet, &mut scratch.sides);
    // SAFETY: the context is valid while the program runs; the verifier checks the access, and the reads follow a comparison
    // with the end.
    let (start, end) = unsafe { ((*xdp).data as usize, (*xdp).data_end as usize) };
    if start + ETHER_TYPE + 2 > end {
        return None;
    }
    // SAFETY: as above.
    let ether_type = u16::from_be(unsafe { *((start + ETHER_TYPE) as *const u16) });
    if !read_frame(start, end, ether_type, packet) {
        return None;
    }
    let active = Active::get()?;
    let settings = active.settings;
    if settings.audit != 0 {
        return None;
    }
    let destination = lookup_cached(&active, &packet.destination, packet.version);
    // Where the pod is elsewhere, or not known yet, routes decide.
    if destination.side != side::POD || hosted(&packet.destination) == 0 {
        return None;
    }
    let source = lookup_cached(&active, &packet.source, packet.version);
    let is_lan_host = source.side == side::EXTERNAL;
    // The interface decides about a source of the cluster.
    if !is_lan_host && source.side != 0 {
        return None;
    }
    let opens_tcp = packet.protocol == protocol::TCP && packet.opens_tcp();
    // In this order: a flow is entered in the second table before it leaves the first.
    if packet.is_intact()
        && !opens_tcp
        && flow_filter::may_know(&packet.source, &packet.destination, packet.protocol)
        && (HALF_OPEN.get_ptr(&packet.key).is_some()
            || established(&packet.key).is_some()
            || cache::may_serve(packet, &active))
    {
        return None;
    }
    sides.external = if is_lan_host { source } else { AddressInfo::default() };
    sides.internal = destination;
    sides.direction = u32::from(direction::INBOUND);
    sides.flags = SETTLED;
    let mut leaf = 0;
    let reason = if !packet.is_intact() {
        packet.problem
    } else if let Err(reason) = track::opening(packet) {
        reason
    } else {
        if is_lan_host {
            if settings.has_audited != 0 {
                return None;
            }
            leaf = policy::evaluate(active.slot, policy::ENFORCED);
        }
        match leaf {
            0 => Reason::no_rule,
            leaf if leaf & reference::DENY != 0 => Reason::deny_rule,
            _ => return None,
        }
    };
    // SAFETY: a valid element, of this CPU alone.
    let shielded = unsafe { &mut *SHIELDED.get_ptr_mut(0)? };
    if goes_on(shielded, settings, packet, reason, active.now) {
        return None;
    }
    // SAFETY: the context is valid while the program runs.
    let length = unsafe { bpf_xdp_get_buff_len(xdp) } as u32;
    if leaf != 0 {
        policy::count_hit(active.slot, settings, leaf, length);
    }
    report::count(direction::INBOUND, reason, length);
    shielded.dropped.packets += 1;
    shielded.dropped.bytes += u64::from(length);
    let info = EventInfo {
        now: active.now,
        rule: leaf & reference::RULE,
        verdict: verdict::DROP,
        reason: reason as u8,
        direction: direction::INBOUND,
        settled: u8::from(sides.is_settled(settings)),
    };
    report::suppress(&info, &active);
    Some(())
}

/// Whether a denied packet goes on, since the hook behind may still answer or report it in this second.
///
/// No more than both limits together: without a reader of events, or with another CPU behind, the hook keeps its own budget.
#[inline(always)]
fn goes_on(shielded: &mut Shielded, settings: &Settings, packet: &Packet, reason: Reason, now: u64) -> bool {
    let Some(budget) = report::budget(now) else { return true };
    let is_answered = settings.reject != 0
        && budget.answered < settings.answers_per_second
        && reject::is_answerable(packet, reason);
    if !is_answered && budget.sent >= settings.events_per_second {
        return false;
    }
    if now >= shielded.until {
        shielded.until = now + SECOND;
        shielded.left = 0;
    }
    let goes_on = shielded.left < settings.events_per_second.saturating_add(settings.answers_per_second);
    shielded.left += u32::from(goes_on);
    goes_on
}
