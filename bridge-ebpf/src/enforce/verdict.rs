//! The verdict on a packet, and its way into a counter, an event, and a TC action.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use aya_log_ebpf::debug;
use bridge_common::filter::{counters::Reason, event::verdict as shown, flow::flag, policy::reference};

use crate::{
    action::{DROP, NEXT},
    active::Active,
    hook::Hook,
    mark,
    packet::Packet,
    reject,
    report::{self, EventInfo},
    sides::Sides,
    track::{self, Admission},
};

/// A verdict.
pub(crate) struct Verdict {
    pub(crate) reason: Reason,
    /// The leaf of the policy that decided; 0: none did.
    pub(crate) leaf: u32,
    /// Belongs to a flow that passes in audit mode only.
    pub(crate) audited: bool,
    /// Neither counted nor reported: no rule restricts the flow.
    pub(crate) silent: bool,
    /// The mark of the packet if it passes; [`mark::NONE`]: that of a judged packet.
    pub(crate) mark: u32,
}

impl Verdict {
    #[inline(always)]
    pub(crate) fn of(reason: Reason) -> Self {
        Self { reason, leaf: 0, audited: false, silent: false, mark: mark::NONE }
    }
}

/// Updates counters, emits the event, returns the TC action.
#[inline(always)]
pub(crate) fn conclude(
    skb: *mut __sk_buff,
    active: &Active,
    sides: &Sides,
    packet: &Packet,
    verdict: &Verdict,
    length: u32,
    hook: u32,
) -> i32 {
    let settings = active.settings;
    let direction = sides.direction as u8;
    let mut info = EventInfo {
        now: active.now,
        rule: verdict.leaf & reference::RULE,
        verdict: shown::ALLOW,
        reason: verdict.reason as u8,
        direction,
        settled: 0,
    };
    if !verdict.reason.denies() {
        if verdict.silent {
            return NEXT;
        }
        if verdict.audited {
            report::count_audited(direction, verdict.reason, length);
            return NEXT;
        }
        report::count(direction, verdict.reason, length);
        if settings.report_allowed != 0 && verdict.reason == Reason::new_flow {
            report::emit(skb, active, &info);
        }
        return NEXT;
    }
    debug!(
        &TcContext::new(skb),
        "deny: reason {} direction {} protocol {} bytes {}",
        verdict.reason as u8,
        direction,
        packet.protocol,
        length
    );
    if settings.audit != 0 {
        // One event per flow: the rest of it follows from its first packet.
        if matches!(verdict.reason, Reason::no_rule | Reason::deny_rule) {
            let admission = Admission {
                direction: sides.direction as u8,
                generation: settings.generation,
                rule: info.rule.wrapping_sub(1),
                flags: flag::AUDIT | sides.flags as u8,
                interface: sides.interface,
            };
            let _ = track::open(packet, &admission, active.settings, active.now, true);
        }
        report::count_audited(direction, verdict.reason, length);
        info.verdict = shown::AUDIT;
        report::emit_denial(skb, active, &info);
        return NEXT;
    }
    report::count(direction, verdict.reason, length);
    info.settled = u8::from(hook == Hook::EXTERNAL_INGRESS && sides.is_settled(settings));
    let answerable = hook <= Hook::INTERNAL_INGRESS && may_answer(active, packet, verdict.reason);
    info.verdict = if answerable { shown::REJECT } else { shown::DROP };
    report::emit_denial(skb, active, &info);
    if answerable { answer(skb, packet) } else { DROP }
}

/// Whether this CPU answers the packet, which is denied for this reason at an ingress hook; counts the answer.
#[inline(always)]
pub(crate) fn may_answer(active: &Active, packet: &Packet, reason: Reason) -> bool {
    active.settings.reject != 0
        && reject::is_answerable(packet, reason)
        && report::may_answer(active.settings, active.now)
}

/// Answers a denied packet. Returns the TC action.
#[inline(always)]
pub(crate) fn answer(skb: *mut __sk_buff, packet: &Packet) -> i32 {
    let action = reject::answer(skb);
    if action == DROP {
        debug!(&TcContext::new(skb), "no room for an answer to protocol {}: dropped", packet.protocol);
    }
    action
}
