//! Repeated refusals: packets of a class that the policy is known to deny. See `bridge_common::filter::denial`.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use aya_log_ebpf::debug;
use bridge_common::filter::{counters::Reason, denial::Class, event::verdict as shown, policy::direction};
use bridge_ebpf::protocol;

use crate::{
    action::DROP,
    active::Active,
    maps::{DENIALS, HALF_OPEN, Scratch, scratch},
    policy,
    report::{self, EventInfo},
    scope, verdict,
};

/// The flow tables have no entry for the packet's ports: see [`crate::flow_filter`].
pub(crate) const NO_FLOW: u32 = 4;

/// Returned by [`repeat`] where nothing is settled.
pub(crate) const MISS: i32 = i32::MIN;

/// Denies the packet of [`scratch`] at external ingress, a SYN or a UDP packet of no established flow, if its class is settled. `found` may be [`NO_FLOW`].
/// Returns the TC action, or [`MISS`].
///
/// Counters, events and answers are those of a packet that the policy is asked about.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn repeat(skb: *mut __sk_buff, slot: u32, now: u64, found: u32) -> i32 {
    let Some(Scratch { packet, .. }) = scratch() else { return MISS };
    let Some(active) = Active::of_slot(slot, now) else { return MISS };
    // Nothing is denied then, whatever this policy has denied before.
    if active.settings.audit != 0 {
        return MISS;
    }
    let class = Class::new(
        &packet.source,
        &packet.destination,
        packet.destination_port,
        packet.protocol,
        direction::INBOUND,
    );
    let Some(set) = DENIALS.get_ptr_mut(class.set()) else { return MISS };
    // SAFETY: the element is this CPU's own.
    let Some(class) = (unsafe { &mut *set }).settled(&class, active.settings.generation) else {
        return MISS;
    };
    // A pod that is none of this node any more, or an answer of the LAN host.
    if scope::hosted(&packet.destination) == 0
        || (packet.protocol == protocol::UDP && found != NO_FLOW && HALF_OPEN.get_ptr(&packet.key).is_some())
    {
        return MISS;
    }
    // SAFETY: the context is valid while the program runs.
    let length = unsafe { (*skb).len };
    let reason = if class.rule == 0 { Reason::no_rule } else { Reason::deny_rule };
    debug!(
        &TcContext::new(skb),
        "deny: reason {} protocol {} bytes {}, as before", reason as u8, packet.protocol, length
    );
    if class.rule != 0 {
        policy::count_hit(slot, active.settings, class.rule, length);
    }
    report::count(direction::INBOUND, reason, length);
    let answerable = verdict::may_answer(&active, packet, reason);
    let info = EventInfo {
        now,
        rule: class.rule,
        verdict: if answerable { shown::REJECT } else { shown::DROP },
        reason: reason as u8,
        direction: direction::INBOUND,
        settled: 1,
    };
    class.see(now, u16::from_be_bytes(packet.source_port));
    class.verdict = info.verdict;
    report::emit(skb, &active, &info);
    if answerable { verdict::answer(skb, packet) } else { DROP }
}
