//! Counters and events.

use aya_ebpf::bindings::__sk_buff;
use bridge_common::filter::{
    control::Settings,
    counters::{Counter, Counters, Reason},
    denial::Class,
    event::{Event, EventBudget},
    policy::direction,
};
use bridge_ebpf::protocol;

use crate::active::Active;
use crate::maps::{AUDITED, COUNTERS, DENIALS, EVENT_BUDGET, EVENTS, SETTINGS, Scratch, scratch};

/// In nanoseconds.
const SECOND: u64 = 1_000_000_000;

/// Counts a packet that passed or was denied.
#[inline(always)]
pub(crate) fn count(direction: u8, reason: Reason, length: u32) {
    if let Some(counters) = COUNTERS.get_ptr_mut(u32::from(direction)) {
        add(counters, reason, length);
    }
}

/// Counts a packet that passed in audit mode only.
#[inline(always)]
pub(crate) fn count_audited(direction: u8, reason: Reason, length: u32) {
    if let Some(counters) = AUDITED.get_ptr_mut(u32::from(direction)) {
        add(counters, reason, length);
    }
}

#[inline(always)]
fn add(counters: *mut Counters, reason: Reason, length: u32) {
    // The compiler knows that no reason is out of bounds, and would drop the check that the verifier needs.
    let index = core::hint::black_box(reason as usize);
    if index >= Reason::ALL.len() {
        return;
    }
    // SAFETY: `Counters` is as many `Counter`s as there are reasons, in the order of their numbers; the element is
    // this CPU's own.
    unsafe {
        let counter = counters.cast::<Counter>().add(index);
        (*counter).packets += 1;
        (*counter).bytes += u64::from(length);
    }
}

/// The part of an event that is not in the packet.
#[repr(C)]
pub(crate) struct EventInfo {
    pub(crate) now: u64,
    /// Index of the rule that decided, plus one.
    pub(crate) rule: u32,
    pub(crate) verdict: u8,
    pub(crate) reason: u8,
    pub(crate) direction: u8,
    /// See `Denial::settled`.
    pub(crate) settled: u8,
}

/// Returns the budget of this CPU for the current second.
#[inline(always)]
pub(crate) fn budget(now: u64) -> Option<&'static mut EventBudget> {
    // SAFETY: the element is this CPU's own.
    let budget = unsafe { &mut *EVENT_BUDGET.get_ptr_mut(0)? };
    if now >= budget.until {
        budget.until = now + SECOND;
        (budget.sent, budget.answered) = (0, 0);
    }
    Some(budget)
}

/// Whether this CPU may still answer a denied packet in this second; counts the answer.
#[inline(always)]
pub(crate) fn may_answer(settings: &Settings, now: u64) -> bool {
    let Some(budget) = budget(now) else { return false };
    let may = budget.answered < settings.answers_per_second;
    budget.answered += u32::from(may);
    may
}

/// As [`emit`]; and counts the connection that the packet asks for, if rules deny it, in its class.
#[inline(always)]
pub(crate) fn emit_denial(skb: *mut __sk_buff, active: &Active, info: &EventInfo) {
    let by_rules = info.reason == Reason::no_rule as u8 || info.reason == Reason::deny_rule as u8;
    if by_rules {
        note(info, active.settings.generation);
    }
    emit(skb, active, info);
}

/// Sends an event about the packet of [`scratch`], unless this CPU is rate limited or the ring buffer is full.
#[inline(always)]
pub(crate) fn emit(skb: *mut __sk_buff, active: &Active, info: &EventInfo) {
    let Some(budget) = budget(active.now) else { return };
    if budget.sent >= active.settings.events_per_second || send(skb, active.slot, info) == 0 {
        budget.suppressed += 1;
        budget.suppressed_total += 1;
    }
}

/// Counts a denied packet of [`scratch`] as [`emit`] does where it sends no event.
#[inline(always)]
pub(crate) fn suppress(info: &EventInfo, active: &Active) {
    if info.reason == Reason::no_rule as u8 || info.reason == Reason::deny_rule as u8 {
        note(info, active.settings.generation);
    }
    if let Some(budget) = budget(active.now) {
        budget.suppressed += 1;
        budget.suppressed_total += 1;
    }
}

/// Counts the connection that the packet of [`scratch`] asks for in its class. Returns how many were counted.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn note(info: *const EventInfo, generation: u32) -> u32 {
    // SAFETY: the caller's own, or null as far as the verifier knows.
    let Some(info) = (unsafe { info.as_ref() }) else { return 0 };
    let Some(Scratch { packet, .. }) = scratch() else { return 0 };
    let is_outbound = info.direction == direction::OUTBOUND;
    let (external, pod) = if is_outbound {
        (&packet.destination, &packet.source)
    } else {
        (&packet.source, &packet.destination)
    };
    let has_ports = matches!(packet.protocol, protocol::TCP | protocol::UDP | protocol::SCTP);
    let source_port = if has_ports { u16::from_be_bytes(packet.source_port) } else { 0 };
    let port = if has_ports { packet.destination_port } else { [0; 2] };
    let class = Class::new(external, pod, port, packet.protocol, info.direction);
    let Some(set) = DENIALS.get_ptr_mut(class.set()) else { return 0 };
    // SAFETY: the element is this CPU's own.
    let entry = unsafe { &mut *set }.entry(class, info.reason);
    entry.see(info.now, source_port);
    entry.rule = info.rule;
    entry.generation = generation;
    entry.verdict = info.verdict;
    entry.settled = info.settled;
    1
}

/// Sends an event. Returns how many were sent.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn send(skb: *mut __sk_buff, slot: u32, info: *const EventInfo) -> u32 {
    // SAFETY: the caller's own, or null as far as the verifier knows.
    let Some(info) = (unsafe { info.as_ref() }) else { return 0 };
    let Some(Scratch { packet, .. }) = scratch() else { return 0 };
    let Some(settings) = SETTINGS.get(slot) else { return 0 };
    let Some(budget) = EVENT_BUDGET.get_ptr_mut(0) else { return 0 };
    // SAFETY: the element is this CPU's own.
    let budget = unsafe { &mut *budget };
    let Some(mut entry) = EVENTS.reserve(0) else { return 0 };
    // SAFETY: the context is valid while the program runs.
    let (ifindex, length) = unsafe { ((*skb).ifindex, (*skb).len) };
    entry.write(Event {
        time: info.now,
        source: packet.source,
        destination: packet.destination,
        ifindex,
        generation: settings.generation,
        rule: info.rule,
        length,
        suppressed: budget.suppressed,
        source_port: packet.source_port,
        destination_port: packet.destination_port,
        protocol: packet.protocol,
        verdict: info.verdict,
        reason: info.reason,
        direction: info.direction,
        detail: packet.detail,
        padding: [0; 11],
    });
    entry.submit(0);
    budget.sent += 1;
    budget.suppressed = 0;
    1
}
